"""The module that holds a codebook of `vector_quantize`."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sslkernels.core import checks
from sslkernels.core.modules import OverRanks
from sslkernels.latent import codebook as codebooks
from sslkernels.latent.codebook import Averages, Draw, DrawnRows, Rows
from sslkernels.latent.vector_quantize import METRICS, Quantized, check_mask, vector_quantize
from sslkernels.random.seeds import in_backward, seed_tensor
from sslkernels.random.streams import random_normal

NAME = "VectorQuantizer"
# Defaults of options that only one mode uses: the other mode refuses them.
EPS, REVIVE_BELOW, CODEBOOK_WEIGHT = 1e-5, 0.4, 4.0


class VectorQuantizer(OverRanks):
    """Module of `vector_quantize` that holds the codebook: moved by averages of the rows of each code, or learned.

    In training, a forward quantises with the current codebook and then moves the codebook once. The averages decay by
    `decay`; codes are sums over sizes with Laplace smoothing `eps` (van den Oord et al., appendix A.1). Values and
    commitment have the gradients of `vector_quantize`, and none goes to the codebook. In evaluation nothing changes.

    With `metric="cosine"` and averages, rows count in them by their direction and codes have norm 1, at the start and
    after each step; give rows of norm 1, for `commitment` is the squared distance to the row as it is.

    Dead codes: a code whose average size is less than `revive_below` times the mean (None: never) becomes a random row
    of the batch, with the mean size, so that it has time to be used. The rows are drawn from the package's streams by
    `seed` and the number of the step: there is no random state but the buffers `seed` and `steps`. A code of the mean
    size that no row takes any more is dead after `log(revive_below) / log(decay)` steps: 92 with the defaults, at the
    start about 20. A code that is used steadily, but less than `revive_below` times the mean, is replaced as often.

    Over a `process_group` sizes, sums and drawn rows are those of the batch of all ranks. Every rank must call forward
    equally often, with any number of rows. Codebooks stay bitwise equal on all ranks, and equal those of one process
    with all rows up to the rounding of sums. Without a process group, each process moves its own codebook, with a
    warning if there are several; a learned codebook then raises `RuntimeError` where it would start from the rows of
    one process. Copies and pickles share the group.

    The state is in floating buffers, float32 (float64 for that `dtype`) whatever the module is cast to and the input
    is; one that was loaded in half precision raises `TypeError` in training. The buffers alone are the state: a module
    into which they were copied, in any way, continues as if it had not been stopped. `started` is 0 until the codebook
    has started from rows. Rows that are not finite move nothing. On a GPU nothing is read on the host but `started`,
    after it was written, and with `init="kmeans"` in each step that `torch.compile` compiled.

    Args:
        num_codes: the number of codes; the codebook is `(num_codes, dim)`.
        dim: the size of a code.
        metric: as in `vector_quantize`.
        decay: decay of the averages, in [0, 1). None: the codebook is a parameter; `commitment` also has a gradient in
            the codes, `codebook_weight` times as strong as in the input, and `beta * commitment` is the loss of VQ-VAE
            for beta = 1 / codebook_weight.
        eps: Laplace smoothing of the sizes, 1e-5 by default. Only with averages.
        revive_below: the share of the mean size below which a code is dead; "auto": 0.4 with averages. Only with
            averages, for an optimiser knows nothing of a code that was replaced.
        codebook_weight: the weight of the codes in `commitment` for `decay=None`, 4 by default.
        init: "data": distinct random rows of the first batch in training (repeated if it has too few; until a batch has
            a finite row, "normal"); "kmeans": rows of that batch drawn by k-means++, each with a probability
            proportional to its squared distance to those before, which takes `num_codes` passes over the batch, over
            ranks over all their rows on each; "normal": standard normal numbers from `seed`; or the codes themselves,
            `(num_codes, dim)`. A learned codebook cannot start from rows under FSDP2, where a write in forward is lost.
        seed: seed of all draws. Modules that are to draw different rows need different seeds.
        process_group: the ranks that share the codebook.
        device: device of the codebook.
        dtype: torch.float32 or torch.float64, the dtype of the codebook and the averages.

    Forward takes `(..., dim)` in any floating dtype and returns `Quantized(values, indices, commitment, usage)`; usage
    counts this rank's rows alone. Rows that are False in its `mask`, `(...)` bool, get values and indices, but count in
    nothing: averages, usage, revival, start and commitment. In training with averages, recomputing forward in backward
    (activation checkpointing) raises `RuntimeError`, because the codebook has moved.

    Sources: van den Oord, Vinyals and Kavukcuoglu, "Neural discrete representation learning", NeurIPS 2017; Razavi, van
    den Oord and Vinyals, "Generating diverse high-fidelity images with VQ-VAE-2", NeurIPS 2019; Arthur and
    Vassilvitskii, "k-means++", SODA 2007.

    >>> import sslkernels as sk
    >>> quantizer = sk.nn.VectorQuantizer(512, 16)
    >>> x = torch.randn(8, 100, 16, requires_grad=True)
    >>> quantized = quantizer(x)
    >>> (quantized.values.square().mean() + 0.25 * quantized.commitment).backward()
    >>> codes_in_use = quantized.perplexity
    """

    @checks.with_python_numbers
    def __init__(
        self,
        num_codes: int,
        dim: int,
        *,
        metric: str = "l2",
        decay: float | None = 0.99,
        eps: float | None = None,
        revive_below: float | str | None = "auto",
        codebook_weight: float | None = None,
        init: str | Tensor = "data",
        seed: int = 0,
        process_group: Any = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        _check_shape(num_codes, dim, metric, init, dtype)
        _check_averages(decay, eps, revive_below, codebook_weight)
        averages = decay is not None
        self.metric = metric
        self.decay = decay
        self.eps = (EPS if eps is None else eps) if averages else None
        self.revive_below = (REVIVE_BELOW if revive_below == "auto" else revive_below) if averages else None
        self.codebook_weight = CODEBOOK_WEIGHT if codebook_weight is None and not averages else codebook_weight
        self.kmeans = isinstance(init, str) and init == "kmeans"
        self.process_group = process_group
        device = torch.empty(0, device=device).device
        where = {"device": device, "dtype": dtype}
        number = seed_tensor(NAME, seed, None, device)
        if isinstance(init, Tensor):
            codes = init.detach().to(copy=True, **where)
        else:
            codes = random_normal((num_codes, dim), number, dtype=dtype)
        if averages:
            codes = codebooks.unit_rows(codes) if self._unit else codes
            self.register_buffer("codebook", codes)
            self.register_buffer("sizes", torch.ones(num_codes, **where))
            self.register_buffer("sums", codes.clone())
        else:
            self.codebook = nn.Parameter(codes)
        # Floating point, because some tools copy or average only floating-point buffers.
        self.register_buffer("seed", codebooks.bytes_of_seed(number))
        # One-dimensional: torch.compile loses what is written into a float64 scalar on a CPU.
        self.register_buffer("steps", torch.zeros(1, dtype=torch.float64, device=device))
        started = isinstance(init, Tensor) or init == "normal"
        self.register_buffer("started", torch.full((), float(started), device=device))
        self._seen_started: tuple[Tensor, int] | None = None  # the buffer and its version when it was read as set

    @property
    def num_codes(self) -> int:
        return self.codebook.shape[0]

    @property
    def dim(self) -> int:
        return self.codebook.shape[1]

    @property
    def _unit(self) -> bool:
        """Whether codes have norm 1."""
        return self.metric == "cosine" and self.decay is not None

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Quantized:
        learned = self.decay is None
        options = {
            "metric": self.metric,
            "codebook_weight": self.codebook_weight if learned else 0.0,
            "mask": mask,
        }
        if not self.training:
            return vector_quantize(input, self.codebook, **options)
        if not learned:
            _refuse_recomputation()
        self._check_input(input, mask)
        self._check_state()
        with torch.no_grad():
            rows = self._rows(input.detach(), mask)
            self._start(rows)
        codes = self.codebook if learned else codebooks.codebook_snapshot(self.codebook)
        quantized = vector_quantize(input, codes, **options)
        with torch.no_grad():
            if not learned:
                self._move(rows, quantized.indices.reshape(-1))
            self.steps.add_(1)
        return quantized

    def decode(self, indices: Tensor) -> Tensor:
        """The codes of indices `(...)`, int32 or int64: `(..., dim)`, in the dtype of the codebook."""
        return codes_of(NAME, indices, self.codebook)

    def _check_input(self, input: Tensor, mask: Tensor | None) -> None:
        checks.tensor(NAME, "input", input, checks.FLOAT_DTYPES)
        checks.dims(NAME, "input", input, 1, "(..., dim)")
        if input.shape[-1] != self.dim:
            checks.fail(ValueError, NAME, "input", f"have shape (..., dim) with dim = {self.dim}", tuple(input.shape))
        check_mask(NAME, mask, input)

    def _check_state(self) -> None:
        for name, buffer in self._buffers.items():
            if buffer.dtype not in (torch.float32, torch.float64):
                must = "be float32 or float64 in training, for averages stop moving in half precision"
                checks.fail(TypeError, NAME, f"buffer {name!r}", must, buffer.dtype)

    def _rows(self, input: Tensor, mask: Tensor | None) -> Rows:
        values = (input.reshape(1, -1) if input.dim() == 1 else input.flatten(0, -2)).to(self.codebook.dtype)
        valid = values.isfinite().all(1)
        if mask is not None:
            valid &= mask.reshape(-1)
        return Rows(codebooks.unit_rows(values) if self._unit else values, valid)

    def _draw(self) -> Draw:
        return Draw(codebooks.seed_of_bytes(self.seed), self.steps)

    def _has_started(self) -> bool:
        """Whether the buffer `started` is set. On a GPU the host reads it only after it was written or replaced."""
        started = self.started
        if started.device.type != "cpu" and self._seen_started is not None:
            tensor, version = self._seen_started
            if tensor is started and version == started._version:
                return True
        has = bool(started > 0)
        self._seen_started = (started, started._version) if has else None
        return has

    def _start(self, rows: Rows) -> None:
        if torch.compiler.is_compiling() and self.process_group is None:
            new = codebooks.start_codebook(self.codebook, rows, self.started, self._draw(), self.kmeans)
            begins = (self.started <= 0) & (new.started > 0)
        else:
            alone = self.process_group is None and _several_ranks()
            if alone and self.decay is not None:
                _warn_of_ranks()
            if self._has_started():
                return
            if self.decay is None:
                self._refuse_lost_start(alone)
            new = codebooks.start(self.codebook, rows, self._draw(), self.kmeans, self.process_group)
            begins = new.started > 0
        self.codebook.copy_(new.codebook)
        if self.decay is not None:
            self.sums.copy_(torch.where(begins, new.codebook, self.sums))
        self.started.copy_(new.started)

    def _refuse_lost_start(self, alone: bool) -> None:
        if alone:
            raise RuntimeError(
                f"{NAME}: there are {dist.get_world_size()} ranks, each of which would start its codebook from its own "
                "rows; pass process_group=torch.distributed.group.WORLD, or another init"
            )
        if _is_sharded(self):
            raise RuntimeError(
                f"{NAME}: fully_shard would lose the start of the codebook from rows; pass init='normal' or the codes, "
                "or leave the module out of fully_shard"
            )

    def _move(self, rows: Rows, indices: Tensor) -> None:
        count, group = self.num_codes, self.process_group
        drawn: DrawnRows | None = None
        if self.revive_below is not None:
            drawn = codebooks.draw_rows(rows, count, self._draw(), codebooks.REVIVAL, group)
        batch = codebooks.batch_sums(rows, indices, count, None if drawn is None else drawn.rows, group)
        averages = Averages(self.codebook, self.sizes, self.sums)
        codebooks.move_averages(averages, batch, self.decay, self.eps, self._unit)
        if drawn is not None:
            codebooks.revive(averages, drawn._replace(rows=batch.drawn), self.revive_below)

    def _apply(self, fn: Any, recurse: bool = True) -> VectorQuantizer:
        """Keeps the dtypes of the state: a cast to half precision would stop the averages, and any cast would round
        `steps`."""
        kept = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, before in kept.items():
            after = self._buffers[name]
            if after.dtype != before.dtype and (name == "steps" or after.dtype in (torch.float16, torch.bfloat16)):
                self._buffers[name] = before.to(after.device)
        return self

    def extra_repr(self) -> str:
        how = f"codebook_weight={self.codebook_weight}" if self.decay is None else f"decay={self.decay}"
        revival = "" if self.revive_below is None else f", revive_below={self.revive_below}"
        return f"{self.num_codes}, {self.dim}, metric={self.metric!r}, {how}{revival}"


def codes_of(name: str, indices: Tensor, codebook: Tensor) -> Tensor:
    checks.tensor(name, "indices", indices, checks.INDEX_DTYPES)
    checks.same_device(name, "indices", indices, "the codebook", codebook.device)
    if indices.device.type == "cpu" and not torch.compiler.is_compiling() and indices.numel() > 0:
        least, most = (int(value) for value in indices.aminmax())
        if least < 0 or most >= codebook.shape[0]:
            checks.fail(ValueError, name, "indices", f"be in [0, {codebook.shape[0]})", least if least < 0 else most)
    return nn.functional.embedding(indices, codebook)


def _several_ranks() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _warn_of_ranks() -> None:
    warnings.warn(
        f"{NAME}: there are {dist.get_world_size()} ranks and no process_group: each moves its own codebook by its own "
        "rows; pass process_group=torch.distributed.group.WORLD to share it",
        stacklevel=4,
    )


def _is_sharded(module: nn.Module) -> bool:
    """Whether fully_shard (FSDP2) holds the parameters of the module. In forward they are plain tensors, so that only
    torch's internal registry of modules tells."""
    if not dist.is_available():
        return False
    from torch.distributed._composable_state import _module_state_mapping

    for reference in list(_module_state_mapping.values()):
        state = reference()
        groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
        for group in groups:
            for parameter in getattr(group, "fsdp_params", ()):
                if parameter._module_info.module is module:
                    return True
    return False


def _refuse_recomputation() -> None:
    if in_backward():
        raise RuntimeError(
            f"{NAME}: in training it cannot be computed again in backward (activation checkpointing), for its codebook "
            "has moved since; leave it out of the checkpointed function"
        )


def _check_shape(num_codes: int, dim: int, metric: str, init: str | Tensor, dtype: torch.dtype) -> None:
    checks.integer(NAME, "num_codes", num_codes, low=1)
    checks.integer(NAME, "dim", dim, low=1)
    checks.choice(NAME, "metric", metric, METRICS)
    if dtype not in (torch.float32, torch.float64):
        checks.fail(TypeError, NAME, "dtype", "be torch.float32 or torch.float64", dtype)
    if not isinstance(init, Tensor):
        return checks.choice(NAME, "init", init, ("data", "kmeans", "normal"))
    checks.tensor(NAME, "init", init, checks.FLOAT_DTYPES)
    checks.shape(NAME, "init", init, (num_codes, dim), "(num_codes, dim)")
    if init.requires_grad:
        must = "not require grad, for it is copied (decay=None makes the copy a parameter)"
        checks.fail(TypeError, NAME, "init", must, "a tensor that does")


def _check_averages(
    decay: float | None, eps: float | None, revive_below: float | str | None, codebook_weight: float | None
) -> None:
    if decay is not None:
        checks.number(NAME, "decay", decay, low=0.0, high=1.0)
        if decay == 1:
            checks.fail(ValueError, NAME, "decay", "be less than 1", decay)
    if eps is not None:
        checks.number(NAME, "eps", eps, low=0.0, high=checks.LARGEST)
    given = revive_below is not None and revive_below != "auto"
    if given:
        checks.number(NAME, "revive_below", revive_below, low=0.0)
        if revive_below >= 1:
            checks.fail(ValueError, NAME, "revive_below", "be less than 1, or None", revive_below)
    if codebook_weight is not None:
        checks.number(NAME, "codebook_weight", codebook_weight, low=0.0, high=checks.LARGEST)
    if decay is not None and codebook_weight is not None:
        must = "be None with averages, which take no gradient (decay=None learns the codebook)"
        checks.fail(ValueError, NAME, "codebook_weight", must, codebook_weight)
    if decay is None and eps is not None:
        checks.fail(ValueError, NAME, "eps", "be None with decay=None, which has no averages", eps)
    if decay is None and given:
        must = "be None or 'auto' with decay=None: the codebook is the optimiser's"
        checks.fail(ValueError, NAME, "revive_below", must, revive_below)
