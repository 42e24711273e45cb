"""Modules that hold a codebook."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sslkernels.core import checks
from sslkernels.latent import codebook as codebooks
from sslkernels.latent.codebook import Averages, DrawnRows
from sslkernels.latent.gumbel_quantize import GumbelQuantized, gumbel_quantize
from sslkernels.latent.vector_quantize import METRICS, Quantized, vector_quantize
from sslkernels.random.seeds import in_backward, seed_tensor
from sslkernels.random.streams import random_normal

NAME = "VectorQuantizer"


class VectorQuantizer(nn.Module):
    """Module of `vector_quantize` that holds the codebook: moved by averages of the rows of each code, or learned.

    In training, a forward quantises with the current codebook and then moves the codebook once. The averages decay by
    `decay`; codes are sums over sizes with Laplace smoothing `eps` (van den Oord et al., appendix A.1). Values and
    commitment have the gradients of `vector_quantize`, and none goes to the codebook. In evaluation nothing changes.

    Dead codes: a code whose average size is less than `revive_below` times the mean (None: never) becomes a random row
    of the batch, with the mean size, so that it has time to be used. The rows are drawn from the package's streams by
    `seed` and the number of the step: there is no random state but the buffers `seed` and `steps`.

    Over a `process_group` sizes, sums and drawn rows are those of the batch of all ranks. Every rank must call forward
    equally often, with any number of rows. Codebooks stay bitwise equal on all ranks, and equal those of one process
    with all rows up to the rounding of sums. Without a process group, each process moves its own codebook.

    The state is in buffers, float32 (float64 for that `dtype`) whatever the module is cast to and the input is: a
    module that was loaded from its `state_dict` continues as if it had not been stopped. Rows that are not finite move
    nothing. Nothing synchronises with the host but loading a state.

    Args:
        num_codes: the number of codes; the codebook is `(num_codes, dim)`.
        dim: the size of a code.
        metric: as in `vector_quantize`.
        decay: decay of the averages, in [0, 1). None: the codebook is a parameter; `commitment` also has a gradient in
            the codes, `codebook_weight` times as strong as in the input, and `beta * commitment` is the loss of VQ-VAE
            for beta = 1 / codebook_weight. `eps` and `revive_below` then have no effect.
        eps: Laplace smoothing of the sizes.
        revive_below: the share of the mean size below which a code is dead.
        codebook_weight: the weight of the codes in `commitment` for `decay=None`.
        init: "data": distinct random rows of the first batch in training (repeated if it has too few; until then, and
            if no row is finite, "normal"); "normal": standard normal numbers from `seed`; or the codes themselves,
            `(num_codes, dim)`.
        seed: seed of all draws. Modules that are to draw different rows need different seeds.
        process_group: the ranks that share the codebook.
        device: device of the codebook.
        dtype: torch.float32 or torch.float64, the dtype of the codebook and the averages.

    Forward takes `(..., dim)` in any floating dtype and returns `Quantized(values, indices, commitment, usage)`; usage
    counts this rank's rows alone. In training with averages, recomputing forward in backward (activation checkpointing)
    raises `RuntimeError`, because the codebook has moved.

    Sources: van den Oord, Vinyals and Kavukcuoglu, "Neural discrete representation learning", NeurIPS 2017; Razavi, van
    den Oord and Vinyals, "Generating diverse high-fidelity images with VQ-VAE-2", NeurIPS 2019.

    >>> import sslkernels as sk
    >>> quantizer = sk.nn.VectorQuantizer(512, 16)
    >>> x = torch.randn(8, 100, 16, requires_grad=True)
    >>> quantized = quantizer(x)
    >>> (quantized.values.square().mean() + 0.25 * quantized.commitment).backward()
    >>> codes_in_use = quantized.perplexity
    """

    def __init__(
        self,
        num_codes: int,
        dim: int,
        *,
        metric: str = "l2",
        decay: float | None = 0.99,
        eps: float = 1e-5,
        revive_below: float | None = 0.01,
        codebook_weight: float = 4.0,
        init: str | Tensor = "data",
        seed: int = 0,
        process_group: Any = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        _check(num_codes, dim, metric, decay, eps, revive_below, codebook_weight, init, dtype)
        self.metric = metric
        self.decay = decay
        self.eps = eps
        self.revive_below = None if decay is None else revive_below
        self.codebook_weight = codebook_weight
        self.process_group = process_group
        device = torch.empty(0, device=device).device
        where = {"device": device, "dtype": dtype}
        self.register_buffer("seed", seed_tensor(NAME, seed, None, device))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=device))
        if isinstance(init, Tensor):
            codes = init.detach().to(copy=True, **where)
        else:
            codes = random_normal((num_codes, dim), self.seed, dtype=dtype)
        if decay is None:
            self.codebook = nn.Parameter(codes)
        else:
            self.register_buffer("codebook", codes)
            self.register_buffer("sizes", torch.ones(num_codes, **where))
            self.register_buffer("sums", codes.clone())
        self._started = isinstance(init, Tensor) or init == "normal"
        self.register_buffer("started", torch.tensor(self._started, device=device))

    @property
    def num_codes(self) -> int:
        return self.codebook.shape[0]

    @property
    def dim(self) -> int:
        return self.codebook.shape[1]

    def forward(self, input: Tensor) -> Quantized:
        learned = self.decay is None
        options = {"metric": self.metric, "codebook_weight": self.codebook_weight if learned else 0.0}
        if not self.training:
            return vector_quantize(input, self.codebook, **options)
        if not learned:
            _refuse_recomputation()
        checks.tensor(NAME, "input", input, checks.FLOAT_DTYPES)
        checks.dims(NAME, "input", input, 1, "(..., dim)")
        if input.shape[-1] != self.dim:
            checks.fail(ValueError, NAME, "input", f"have shape (..., dim) with dim = {self.dim}", tuple(input.shape))
        rows = input.detach()
        rows = (rows.reshape(1, -1) if rows.dim() == 1 else rows.flatten(0, -2)).to(self.codebook.dtype)
        with torch.no_grad():
            self._start(rows)
        codes = self.codebook if learned else codebooks.codebook_snapshot(self.codebook)
        quantized = vector_quantize(input, codes, **options)
        with torch.no_grad():
            if not learned:
                self._move(rows, quantized.indices.reshape(-1))
            self.steps.add_(1)
        return quantized

    def _draw(self, rows: Tensor, purpose: int) -> DrawnRows:
        return codebooks.draw_rows(rows, self.num_codes, self.seed, self.steps, purpose, self.process_group)

    def _start(self, rows: Tensor) -> None:
        if self._started or (self.process_group is None and rows.shape[0] == 0):
            return
        drawn = self._draw(rows, codebooks.INITIAL)
        if self.process_group is not None:
            dist.all_reduce(drawn.rows, group=self.process_group)
        self.codebook.copy_(codebooks.start_from(self.codebook, drawn))
        if self.decay is not None:
            self.sums.copy_(self.codebook)
        self.started.fill_(True)
        self._started = True

    def _move(self, rows: Tensor, indices: Tensor) -> None:
        drawn = None if self.revive_below is None else self._draw(rows, codebooks.REVIVAL)
        batch = codebooks.batch_sums(
            rows, indices, self.num_codes, None if drawn is None else drawn.rows, self.process_group
        )
        averages = Averages(self.codebook, self.sizes, self.sums)
        codebooks.move_averages(averages, batch, self.decay, self.eps)
        if drawn is not None:
            codebooks.revive(averages, drawn._replace(rows=batch.drawn), self.revive_below)

    def _apply(self, fn: Any, recurse: bool = True) -> VectorQuantizer:
        """A cast to half precision, whose rounding would stop the averages, does not change their dtype."""
        kept = {} if self.decay is None else {name: getattr(self, name) for name in ("codebook", "sizes", "sums")}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            after = getattr(self, name)
            if after.dtype in (torch.float16, torch.bfloat16):
                setattr(self, name, before.to(after.device))
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if self.started.device.type != "meta":
            self._started = bool(self.started)

    def extra_repr(self) -> str:
        how = f"codebook_weight={self.codebook_weight}" if self.decay is None else f"decay={self.decay}"
        revival = "" if self.revive_below is None else f", revive_below={self.revive_below}"
        return f"{self.num_codes}, {self.dim}, metric={self.metric!r}, {how}{revival}"


def _refuse_recomputation() -> None:
    if in_backward():
        raise RuntimeError(
            f"{NAME}: in training it cannot be computed again in backward (activation checkpointing), for its codebook "
            "has moved since; leave it out of the checkpointed function"
        )


def _check(
    num_codes: int,
    dim: int,
    metric: str,
    decay: float | None,
    eps: float,
    revive_below: float | None,
    codebook_weight: float,
    init: str | Tensor,
    dtype: torch.dtype,
) -> None:
    checks.integer(NAME, "num_codes", num_codes, low=1)
    checks.integer(NAME, "dim", dim, low=1)
    checks.choice(NAME, "metric", metric, METRICS)
    if decay is not None:
        checks.number(NAME, "decay", decay, low=0.0, high=1.0)
        if decay == 1:
            checks.fail(ValueError, NAME, "decay", "be less than 1", decay)
    checks.number(NAME, "eps", eps, low=0.0, high=checks.LARGEST)
    if revive_below is not None:
        checks.number(NAME, "revive_below", revive_below, low=0.0)
        if revive_below >= 1:
            checks.fail(ValueError, NAME, "revive_below", "be less than 1, or None", revive_below)
    checks.number(NAME, "codebook_weight", codebook_weight, low=0.0, high=checks.LARGEST)
    if dtype not in (torch.float32, torch.float64):
        checks.fail(TypeError, NAME, "dtype", "be torch.float32 or torch.float64", dtype)
    if isinstance(init, Tensor):
        checks.tensor(NAME, "init", init, checks.FLOAT_DTYPES)
        checks.shape(NAME, "init", init, (num_codes, dim), "(num_codes, dim)")
    else:
        checks.choice(NAME, "init", init, ("data", "normal"))


class GumbelQuantizer(nn.Module):
    """Module of `gumbel_quantize` that holds the codebook: the quantizer of wav2vec 2.0 without its projection.

    In training codes are drawn; in evaluation each row takes the code with its largest logit, without noise, and
    deterministically. `codebook` is a parameter, `(groups, num_codes, dim // groups)`, or `(num_codes, dim)` without
    groups, drawn from [0, 1) as in fairseq.

    Args:
        num_codes: codes per group.
        dim: size of the values, all groups together.
        groups: None takes logits `(..., num_codes)`, a number `(..., groups, num_codes)`.
        tau: temperature, which may be set at any time, or a schedule `(most, least, decay)`, with which
            `set_num_updates` sets `tau` to `max(most * decay**n, least)` after n updates. It is not part of the state.
        hard: as for `gumbel_quantize`.
        return_stats: as for `gumbel_quantize`.
        device: device of the codebook.
        dtype: dtype of the codebook.

    Forward also takes `mask`, `row_ids`, `seed` and `generator`.

    >>> import sslkernels as sk
    >>> project, quantizer = torch.nn.Linear(512, 640), sk.nn.GumbelQuantizer(320, 256, 2, tau=(2.0, 0.5, 0.999995))
    >>> code = quantizer(project(torch.randn(8, 50, 512)).unflatten(-1, (2, 320)))
    >>> quantizer.set_num_updates(1000)
    """

    def __init__(
        self,
        num_codes: int,
        dim: int,
        groups: int | None = None,
        *,
        tau: float | Tensor | tuple[float, float, float] = 1.0,
        hard: bool = True,
        return_stats: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = "GumbelQuantizer"
        checks.integer(name, "num_codes", num_codes, low=1)
        checks.integer(name, "dim", dim, low=1)
        checks.integer(name, "groups", groups, low=1, optional=True)
        if groups is not None and dim % groups != 0:
            checks.fail(ValueError, name, "dim", f"be a multiple of groups, {groups}", dim)
        self.schedule = None
        if isinstance(tau, (tuple, list)):
            if len(tau) != 3:
                checks.fail(ValueError, name, "tau", "be a number or (most, least, decay)", tau)
            for value in tau:
                checks.number(name, "tau", value, low=0.0, low_open=True)
            self.schedule, tau = tuple(tau), tau[0]
        self.tau, self.hard, self.return_stats = tau, hard, return_stats
        shape = (num_codes, dim) if groups is None else (groups, num_codes, dim // groups)
        self.codebook = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.uniform_(self.codebook)

    def set_num_updates(self, num_updates: int) -> None:
        """Sets `tau` by the schedule, if there is one."""
        if self.schedule is not None:
            most, least, decay = self.schedule
            self.tau = max(most * decay**num_updates, least)

    def forward(
        self,
        logits: Tensor,
        *,
        mask: Tensor | None = None,
        row_ids: Tensor | None = None,
        seed: int | Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> GumbelQuantized:
        return gumbel_quantize(
            logits,
            self.codebook,
            tau=self.tau,
            hard=self.hard,
            noise=self.training,
            mask=mask,
            row_ids=row_ids,
            seed=seed,
            generator=generator,
            return_stats=self.return_stats,
        )

    def extra_repr(self) -> str:
        shape, tau = tuple(self.codebook.shape), self.schedule or self.tau
        return f"codebook={shape}, tau={tau}, hard={self.hard}, return_stats={self.return_stats}"
