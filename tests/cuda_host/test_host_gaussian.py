"""The CUDA kernels of gaussian_rsample and gaussian_kl, run on the host under sanitizers, against float64."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import oracle
import pytest
import torch
from cases import DTYPES
from cuda_host import run
from cuda_host.run import ELEMENTS, Call
from torch import Tensor

from sslkernels.core.dtypes import accumulation_dtype
from sslkernels.latent import gaussian_operators as operators
from sslkernels.latent.gaussian_operators import ELEMENTS as BY_ELEMENT
from sslkernels.latent.gaussian_operators import NO_KL, ROWS, Gradients, Inputs, Options

pytestmark = run.required
NAMES = Gradients._fields
SEED = -(2**40)


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def offsets_of(inputs: Inputs) -> dict[str, int]:
    return {name: tensor.storage_offset() for name, tensor in zip(NAMES, inputs, strict=False) if tensor is not None}


@dataclass(frozen=True)
class Latent:
    """One forward and one backward. prior: "full", "shared" or "mixed"; halves: mean and logvar are the
    halves of one tensor; offset: elements before them."""

    dtype: torch.dtype = torch.float32
    rows: int = 5
    columns: int = 32
    samples: int = 1
    first: bool = False
    kl: int = ROWS
    expanded: bool = False  # both gradients are one row for all
    free_bits: float = 0.0
    low: float = -math.inf
    high: float = math.inf
    prior: str = ""
    halves: bool = False
    offset: int = 0
    row_ids: bool = False
    statistics: bool = False
    scale: float = 1.0
    wanted: tuple[bool, bool] = (True, True)

    def options(self) -> Options:
        return Options(self.samples, self.first, self.kl, self.free_bits, self.low, self.high)

    def tensors(self) -> tuple[Inputs, Tensor | None, Tensor | None]:
        """The inputs, and the gradients of z (rows, samples, columns) and kl."""
        g = torch.Generator().manual_seed(self.rows + 100 * self.columns + 7 * self.samples)

        def draw(*shape: int, dtype: torch.dtype = self.dtype, offset: int = 0) -> Tensor:
            size = offset + math.prod(shape)
            values = self.scale * torch.randn(size, generator=g, dtype=torch.float64)
            return values.to(dtype)[offset:].view(shape)

        shape = (self.rows, self.columns)
        if self.halves:
            mean, logvar = draw(self.rows, 2 * self.columns, offset=self.offset).chunk(2, 1)
        else:
            mean, logvar = (draw(*shape, offset=self.offset) for _ in range(2))
        priors: list[Tensor | None] = [None, None]
        if self.prior:
            rows = {"full": (self.rows,) * 2, "shared": (1, 1), "mixed": (1, self.rows)}[self.prior]
            priors = [draw(count, self.columns) for count in rows]
        row_ids = torch.randint(-(2**60), 2**60, (self.rows,), generator=g) if self.row_ids else None
        acc = accumulation_dtype(self.dtype)
        grad_z = draw(self.rows, self.samples, self.columns) if self.samples >= 0 else None
        grad_kl = {NO_KL: None, ROWS: draw(self.rows, dtype=acc), BY_ELEMENT: draw(*shape, dtype=acc)}[self.kl]
        seed = torch.tensor(SEED) if self.samples >= 0 else None
        if self.expanded:
            grad_z = grad_z[:1, :1].expand(grad_z.shape)
            grad_kl = grad_kl[:1].expand(grad_kl.shape)
        return Inputs(mean, logvar, *priors, row_ids, seed), grad_z, grad_kl

    def common(self, inputs: Inputs) -> tuple[dict[str, int], dict[str, float], dict[str, Tensor]]:
        ints = {"element": ELEMENTS[self.dtype], "rows": self.rows, "columns": self.columns}
        ints |= {"samples": max(self.samples, 0), "by_row": self.kl == ROWS}
        outer, inner = self.columns, max(self.samples, 1) * self.columns
        strides = (outer, self.rows * outer) if self.first else (inner, outer)
        ints |= dict(zip(("row_stride", "sample_stride"), strides, strict=True))
        ints["kl_stride"] = 1 if self.kl == ROWS else self.columns
        arrays = {}
        for name, tensor in zip(NAMES, inputs, strict=False):
            if tensor is not None:
                # The whole storage of the rows, so that an access one byte beyond it is detected.
                arrays[name] = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
                shared = name.startswith("prior") and tensor.shape[0] == 1
                ints[f"{name}_stride"] = tensor.stride(0)
                ints[f"{name}_shared"] = shared
        if inputs.row_ids is not None:
            arrays["row_ids"] = inputs.row_ids
        if inputs.seed is not None:
            arrays["seed"] = inputs.seed.view(1)
        return ints, {"free_bits": self.free_bits, "low": self.low, "high": self.high}, arrays

    def forward(self) -> Call:
        inputs, grad_z, _ = self.tensors()
        ints, reals, arrays = self.common(inputs)
        acc = accumulation_dtype(self.dtype)
        if grad_z is not None:
            shape = (self.samples, self.rows) if self.first else (self.rows, self.samples)
            arrays["z"] = torch.full((*shape, self.columns), 7.0, dtype=self.dtype)
        parts = -(-self.columns // operators._cuda_columns(self.dtype, self.columns))
        if self.kl != NO_KL:
            arrays["kl"] = torch.full((self.rows, parts if self.kl == ROWS else self.columns), 7.0, dtype=acc)
        if self.statistics:
            blocks = operators._row_blocks(self.rows)
            arrays["statistics"] = torch.full((blocks, 3, self.columns), 7.0, dtype=acc)
        return Call("gaussian_fwd", ints, reals, arrays, offsets_of(inputs))

    def backward(self) -> Call:
        inputs, grad_z, grad_kl = self.tensors()
        ints, reals, arrays = self.common(inputs)
        if grad_z is not None:
            arrays["grad_z"] = grad_z.transpose(0, 1).contiguous() if self.first else grad_z
        if grad_kl is not None:
            arrays["grad_kl"] = grad_kl
        if self.expanded:
            ints |= dict.fromkeys(("row_stride", "sample_stride", "kl_stride"), 0)
            arrays |= {name: arrays[name].flatten()[: self.columns] for name in ("grad_z", "grad_kl")}
        for name, want in zip(NAMES, self.wanted, strict=False):
            if want:
                arrays[f"grad_{name}"] = torch.full((self.rows, self.columns), 7.0, dtype=self.dtype)
        for name, prior in zip(NAMES[2:], inputs[2:4], strict=True):
            if prior is not None and self.kl != NO_KL:
                shared = prior.shape[0] == 1
                rows = operators._row_blocks(self.rows) if shared else self.rows
                dtype = accumulation_dtype(self.dtype) if shared else self.dtype
                arrays[f"grad_{name}"] = torch.full((rows, self.columns), 7.0, dtype=dtype)
        return Call("gaussian_bwd", ints, reals, arrays, offsets_of(inputs))

    def expected(self) -> tuple[operators.Outputs, dict[str, Tensor]]:
        """In float64, by autograd of the definition, with the noise of the reference."""
        inputs, grad_z, grad_kl = self.tensors()
        wide = inputs._replace(**{n: t.double() for n, t in zip(NAMES, inputs, strict=False) if t is not None})
        outputs = operators._reference_fwd(wide, self.options(), self.statistics)
        leaves = [None if t is None else t.detach().requires_grad_() for t in wide[:4]]
        v = leaves[1].clamp(self.low, self.high)
        d, t = v, leaves[0]
        if leaves[2] is not None:
            d, t = v - leaves[3], (t - leaves[2]) * (-leaves[3] / 2).exp()
        kl = ((t * t + d.expm1() - d) / 2).clamp_min(self.free_bits)
        total = torch.zeros((), dtype=torch.float64)
        if grad_z is not None:
            noise = operators._noise(wide, self.options())
            total = total + (grad_z.double() * (leaves[0][:, None] + (v / 2).exp()[:, None] * noise)).sum()
        if grad_kl is not None:
            total = total + ((kl.sum(1) if self.kl == ROWS else kl) * grad_kl.double()).sum()
        if not total.requires_grad:
            return outputs, {}
        present = {name: leaf for name, leaf in zip(NAMES, leaves, strict=True) if leaf is not None}
        grads = torch.autograd.grad(total, list(present.values()), allow_unused=True)
        return outputs, dict(zip(present, grads, strict=True))


def cases() -> dict[str, Latent]:
    found = {}
    for dtype, columns in itertools.product(DTYPES, (1, 3, 32, 77, 264)):
        odd = columns % 4 != 0
        found[f"{short(dtype)}-{columns}"] = Latent(
            dtype, columns=columns, samples=3 if odd else 1, first=odd, row_ids=odd, offset=int(odd)
        )
        found[f"{short(dtype)}-{columns}-prior"] = Latent(
            dtype, columns=columns, kl=BY_ELEMENT if odd else ROWS, prior="full", free_bits=0.3, low=-0.7, high=0.6
        )
        found[f"{short(dtype)}-{columns}-shared"] = Latent(
            dtype, rows=67, columns=columns, prior="mixed" if odd else "shared", statistics=True
        )
    return found | {
        "halves": Latent(halves=True, columns=64, rows=9),
        "halves_half": Latent(torch.bfloat16, halves=True, columns=24, rows=9, samples=2),
        "halves_odd": Latent(torch.float16, halves=True, columns=13, rows=3, offset=3),
        "many_samples": Latent(rows=2, columns=5, samples=17),
        "no_samples": Latent(samples=0, columns=8),
        "kl_alone": Latent(samples=-1, columns=20, statistics=True, rows=130),
        "kl_alone_elements": Latent(torch.bfloat16, samples=-1, columns=20, kl=BY_ELEMENT, statistics=True),
        "expanded": Latent(samples=2, columns=20, kl=BY_ELEMENT, expanded=True),
        "expanded_rows": Latent(torch.bfloat16, samples=1, columns=12, expanded=True),
        "z_alone": Latent(kl=NO_KL, columns=12, samples=2),
        "statistics_alone": Latent(kl=NO_KL, samples=-1, columns=9, statistics=True, rows=70),
        "frozen_logvar": Latent(wanted=(True, False), samples=2, row_ids=True),
        "frozen_mean": Latent(torch.float16, wanted=(False, True), prior="full"),
        "several_blocks": Latent(torch.bfloat16, rows=70, columns=256),
        "small": Latent(scale=1e-4, rows=3, kl=BY_ELEMENT),
        "large": Latent(scale=6.0, rows=9, columns=40, kl=BY_ELEMENT),
    }


CASES = cases()


def calls() -> dict[str, Call]:
    found = {f"fwd-{name}": case.forward() for name, case in CASES.items()}
    return found | {
        f"bwd-{name}": case.backward() for name, case in CASES.items() if case.samples >= 0 or case.kl != NO_KL
    }


results, test_no_kernel_races = run.results_and_races(calls)


def roundings(dtype: torch.dtype) -> float:
    """Relative to the norm: rounding of terms and sums in the accumulation dtype, and of the result."""
    return 16 * torch.finfo(accumulation_dtype(dtype)).eps + torch.finfo(dtype).eps


@pytest.mark.parametrize("name", CASES)
def test_forward(name, results):
    case, result = CASES[name], results[f"fwd-{name}"]
    assert result.error == ""
    truth, _ = case.expected()
    acc = accumulation_dtype(case.dtype)
    if case.samples >= 0:
        assert oracle.error(result.arrays["z"], truth.z) <= roundings(case.dtype)
    if case.kl != NO_KL:
        kl = result.arrays["kl"].double()
        assert (kl >= 0).all()
        assert oracle.error(kl.sum(1) if case.kl == ROWS else kl, truth.kl) <= roundings(acc)
    if case.statistics:
        outputs = operators._empty_outputs(case.tensors()[0], case.options(), True)
        operators._finish_statistics(result.arrays["statistics"], case.rows, outputs)
        assert oracle.error(outputs.kl_per_dim, truth.kl_per_dim) <= roundings(acc)
        assert oracle.error(outputs.mean_variance, truth.mean_variance) <= roundings(acc)
    for key, value in case.forward().arrays.items():
        if key not in ("z", "kl", "statistics"):
            assert torch.equal(result.arrays[key], value), key


@pytest.mark.parametrize("name", [name.removeprefix("bwd-") for name in calls() if name.startswith("bwd-")])
def test_backward(name, results):
    case, result = CASES[name], results[f"bwd-{name}"]
    assert result.error == ""
    _, truth = case.expected()
    for key in (key for key in result.arrays if key.startswith("grad_") and key[5:] in NAMES):
        got, want = result.arrays[key], truth[key.removeprefix("grad_")]
        if want.shape[0] == 1 != got.shape[0] or got.dtype != case.dtype:
            got = got.double().sum(0, keepdim=True)
        assert oracle.error(got, want) <= 4 * roundings(case.dtype), key


def test_every_kernel_runs(results, request):
    program = run.build(request.node.callspec.params["results"])
    compiled = {name for name in run.kernels(program).values() if name.startswith("gaussian")}
    assert len(compiled) == 4 + 8
    assert {name for result in results.values() for name in result.launched} == compiled


def test_rows_too_long_are_an_error(tmp_path):
    call = Latent(rows=1).forward()
    call.ints["columns"] = 2**30 + 1
    (result,) = run.run(run.build("address"), [call], tmp_path)
    assert "2^30" in result.error
