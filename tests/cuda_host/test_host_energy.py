"""The CUDA kernels of free_energy and prediction_energy, run on the host under sanitizers, against float64."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field, replace

import energy_oracle
import oracle
import pytest
import torch
from cases import DTYPES
from cuda_host import run
from cuda_host.run import ELEMENTS, Call
from torch import Tensor

from sslkernels.core.dtypes import accumulation_dtype

pytestmark = run.required
ONE = {"processors": 1}  # a small device: candidates and features are not split
MANY = {"processors": 64}


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def roundings(dtype: torch.dtype) -> float:
    """Relative to the norm: rounding of sums in the accumulation dtype, and of the result."""
    return 16 * torch.finfo(accumulation_dtype(dtype)).eps + torch.finfo(dtype).eps


@dataclass(frozen=True)
class Energies:
    """Energies (outer, count, inner), stored in the dimension order `order` with `pad` padding elements per row;
    offset: elements before the first. backward: the gradient kernel, else forward; dense: its result is contiguous, and
    not stored as the energies are."""

    dtype: torch.dtype = torch.float32
    shape: tuple[int, int, int] = (5, 9, 1)
    order: str = "oki"
    pad: int = 0
    offset: int = 0
    minimum: bool = False
    beta: float = 1.0
    spread: float = 3.0
    shift: float = 0.0
    special: bool = False
    backward: bool = False
    dense: bool = False
    device: dict[str, int] = field(default_factory=dict)

    def grad_strides(self) -> tuple[int, ...]:
        return torch.empty(self.shape).stride() if self.dense else self.layout()[1]

    def layout(self) -> tuple[Tensor, tuple[int, ...]]:
        """The memory, and the strides of the energies in it."""
        g = torch.Generator().manual_seed(sum(self.shape))
        places = ["oki".index(letter) for letter in self.order]
        sizes = [self.shape[place] for place in places]
        sizes[-1] += self.pad
        memory = self.shift + self.spread * torch.randn(self.offset + sizes[0] * sizes[1] * sizes[2], generator=g)
        strides = [0, 0, 0]
        strides[places[0]], strides[places[1]], strides[places[2]] = sizes[1] * sizes[2], sizes[2], 1
        return memory.to(self.dtype), tuple(strides)

    def energies(self) -> tuple[Tensor, Tensor, tuple[int, ...]]:
        memory, strides = self.layout()
        view = memory.as_strided(self.shape, strides, self.offset)
        if self.special:  # one row each: all infinite, one finite, NaN, a tie
            view[0] = torch.inf
            view[1, 1:] = torch.inf
            view[2, 3] = torch.nan
            view[3, 2] = view[3, 7] = view[3].double().amin(0).to(self.dtype) - 1
        return memory, view, strides

    def truth(self) -> tuple[Tensor, Tensor, Tensor]:
        """Value, upstream derivative, gradient."""
        _, view, _ = self.energies()
        leaf = view.double().clone().requires_grad_()
        value = energy_oracle.free_energy(leaf, beta=self.beta, dim=1, mode="min" if self.minimum else "soft")
        g = torch.Generator().manual_seed(3)
        upstream = torch.randn(value.shape, generator=g, dtype=torch.float64).to(accumulation_dtype(self.dtype))
        (grad,) = torch.autograd.grad(value, leaf, upstream.double())
        return value.detach(), upstream, grad

    def call(self) -> Call:
        memory, view, strides = self.energies()
        outer, count, inner = self.shape
        acc = accumulation_dtype(self.dtype)
        ints = {
            "element": ELEMENTS[self.dtype], "outer": outer, "count": count, "inner": inner,
            "outer_stride": strides[0], "count_stride": strides[1], "inner_stride": strides[2],
            "minimum": self.minimum, **self.device,
        }  # fmt: skip
        results = {
            name: torch.full((outer, inner), 7, dtype=torch.int64 if name == "winner" else acc)
            for name in ("winner",) * self.minimum or ("lowest", "total")
        }
        if not self.backward:
            arrays = {"energy": memory, "value": torch.full((outer, inner), 7.0, dtype=acc), **results}
            return Call("free_energy_fwd", ints, {"beta": self.beta}, arrays, {"energy": self.offset})
        wide = view.to(acc)
        grad = torch.full((math.prod(self.shape) if self.dense else memory.numel() - self.offset,), 7.0)
        arrays = {"grad_value": self.truth()[1], "grad": grad.to(self.dtype)}
        if self.minimum:
            arrays["winner"] = wide.min(1).indices
        else:
            lowest = torch.where(wide.isnan(), torch.inf, wide).amin(1)
            total = torch.exp(-self.beta * (wide - lowest.unsqueeze(1))).sum(1)
            arrays |= {"energy": memory, "lowest": lowest, "total": total}
        for name, stride in zip(("outer", "count", "inner"), self.grad_strides(), strict=True):
            ints[f"grad_{name}_stride"] = stride
        return Call("free_energy_bwd", ints, {"beta": self.beta}, arrays, {"energy": self.offset})


@dataclass(frozen=True)
class Predictions:
    """transposed: the predictions are stored as (count, batch, dim); pad: padding elements per row."""

    dtype: torch.dtype = torch.float32
    shape: tuple[int, int, int] = (5, 3, 32)
    minimum: bool = False
    beta: float = 0.1
    transposed: bool = False
    pad: int = 0
    one_target: bool = False
    special: bool = False
    want: tuple[bool, bool] = (True, True)
    backward: bool = False
    device: dict[str, int] = field(default_factory=dict)

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """The memory of the predictions, a view of it, and the targets."""
        batch, count, dim = self.shape
        g = torch.Generator().manual_seed(sum(self.shape))
        lead = (count, batch) if self.transposed else (batch, count)
        memory = torch.randn(*lead, dim + self.pad, generator=g).to(self.dtype)
        view = memory[..., :dim].transpose(0, 1) if self.transposed else memory[..., :dim]
        target = torch.randn(1 if self.one_target else batch, dim, generator=g).to(self.dtype)
        if self.special:  # one row each: one infinite, all infinite, NaN, a tie
            view[0, 1, 0] = torch.inf
            view[1, :, 1] = -torch.inf
            view[2, 2, 0] = torch.nan
            view[3] = view[3, :1]
        return memory, view, target

    def truth(self) -> tuple[Tensor, ...]:
        """Value, weights, upstream derivative, gradients."""
        _, view, target = self.inputs()
        leaves = [view.double().clone().requires_grad_(), target.double().expand(view[:, 0].shape).clone()]
        leaves[1].requires_grad_()
        energies = (leaves[0] - leaves[1].unsqueeze(1)).square().sum(2)
        value = energy_oracle.free_energy(energies, beta=self.beta, dim=1, mode="min" if self.minimum else "soft")
        (weights,) = torch.autograd.grad(value.sum(), energies, retain_graph=True)
        g = torch.Generator().manual_seed(3)
        upstream = torch.randn(value.shape, generator=g, dtype=torch.float64).to(accumulation_dtype(self.dtype))
        upstream[-1:] = 0
        factor = (2 * upstream.double().unsqueeze(1) * weights).unsqueeze(2)
        grad = torch.where(factor == 0, 0, factor * (leaves[0] - leaves[1].unsqueeze(1)).detach())
        return value.detach(), weights, upstream, grad, -grad.sum(1)

    def call(self) -> Call:
        batch, count, dim = self.shape
        memory, view, target = self.inputs()
        value, weights, upstream, *_ = self.truth()
        acc = accumulation_dtype(self.dtype)
        ints = {
            "element": ELEMENTS[self.dtype], "batch": batch, "count": count, "dim": dim, "minimum": self.minimum,
            "batch_stride": view.stride(0), "count_stride": view.stride(1),
            "target_stride": 0 if self.one_target else dim, **self.device,
        }  # fmt: skip
        arrays = {"prediction": memory, "target": target}
        if not self.backward:
            arrays["value"] = torch.full(value.shape, 7.0, dtype=acc)
            if self.want[0]:
                arrays["weights"] = torch.full(weights.shape, 7.0, dtype=acc)
            if self.want[1]:
                arrays["energies"] = torch.full(weights.shape, 7.0, dtype=acc)
            return Call("prediction_energy_fwd", ints, {"beta": self.beta}, arrays)
        ints |= {"grad_batch_stride": view.stride(0), "grad_count_stride": view.stride(1)}
        arrays |= {"value": upstream, "weights": weights.to(acc)}
        if self.want[0]:
            arrays["grad_prediction"] = torch.full_like(memory, 7.0)
        if self.want[1]:
            arrays["grad_target"] = torch.full((batch, dim), 7.0, dtype=self.dtype)
        return Call("prediction_energy_bwd", ints, {"beta": self.beta}, arrays)


def energies_cases() -> dict[str, Energies]:
    found = {}
    shapes = [(dtype, shape) for dtype in DTYPES for shape in ((11, 37, 1), (2, 9, 11))]
    shapes += [(torch.float32, (3, 5, 1)), (torch.bfloat16, (1, 40, 16))]
    for (dtype, shape), minimum, backward in itertools.product(shapes, (False, True), (False, True)):
        name = f"{short(dtype)}-{shape}-{'min' if minimum else 'soft'}-{'bwd' if backward else 'fwd'}"
        found[name] = Energies(dtype, shape, minimum=minimum, backward=backward)
    for backward, minimum in itertools.product((False, True), repeat=2):
        both = {"backward": backward, "minimum": minimum}
        suffix = f"{'min' if minimum else 'soft'}-{'bwd' if backward else 'fwd'}"
        found |= {
            f"warps-{suffix}": Energies(shape=(3, 1100, 1), device=MANY, **both),
            f"shared_candidates-{suffix}": Energies(torch.bfloat16, (1, 300, 24), device=MANY, **both),
            f"special-{suffix}": Energies(shape=(6, 21, 1), special=True, device=MANY, **both),
            f"special_inner-{suffix}": Energies(torch.float16, (6, 21, 9), special=True, device=MANY, **both),
            f"nothing-{suffix}": Energies(shape=(0, 3, 1), **both),
        }
        if minimum == backward:
            found |= {
                f"unaligned-{suffix}": Energies(shape=(2, 70, 5), offset=1, device=MANY, **both),
                f"several_blocks-{suffix}": Energies(torch.float16, (300, 8, 1), device=ONE, **both),
                f"many_results-{suffix}": Energies(torch.bfloat16, (3, 4, 1030), device=ONE, **both),
                f"strided_candidates-{suffix}": Energies(shape=(4, 6, 3), order="kio", **both),
                f"padded-{suffix}": Energies(torch.bfloat16, (6, 21, 1), order="oik", pad=3, **both),
                f"padded_inner-{suffix}": Energies(shape=(4, 9, 8), pad=4, **both),
                f"one_candidate-{suffix}": Energies(shape=(9, 1, 1), **both),
            }
    for backward, numbers in itertools.product((False, True), ({"shift": 1e6}, {"spread": 1e4})):
        name = f"{next(iter(numbers))}-{'bwd' if backward else 'fwd'}"
        found[name] = Energies(shape=(6, 50, 1), backward=backward, **numbers)
    for beta in (1e-37, 1e-6, 1e6, 1e37):
        found[f"beta_{beta}"] = Energies(shape=(5, 100, 1), beta=beta, device=MANY)
        found[f"beta_inner_{beta}"] = Energies(shape=(2, 100, 6), beta=beta, device=MANY)
    return found


def predictions_cases() -> dict[str, Predictions]:
    found = {}
    shapes = [(dtype, dim) for dtype in DTYPES for dim in (32, 77)] + [(torch.float32, 1), (torch.float16, 1)]
    for (dtype, dim), minimum, backward in itertools.product(shapes, (False, True), (False, True)):
        name = f"{short(dtype)}-{dim}-{'min' if minimum else 'soft'}-{'bwd' if backward else 'fwd'}"
        found[name] = Predictions(dtype, (9, 3, dim), minimum=minimum, backward=backward, transposed=dim == 77)
    for dtype in DTYPES:
        found[f"parts-{short(dtype)}"] = Predictions(dtype, (2, 3, 3000), device=MANY)
        found[f"parts_min-{short(dtype)}"] = Predictions(dtype, (1, 2, 2077), minimum=True, device=MANY)
        found[f"candidate_parts-{short(dtype)}"] = Predictions(dtype, (2, 70, 9), backward=True, device=MANY)
    for backward in (False, True):
        suffix = "bwd" if backward else "fwd"
        found |= {
            f"several_rows_a_block-{suffix}": Predictions(shape=(40, 5, 16), backward=backward, device=ONE),
            f"many_candidates-{suffix}": Predictions(shape=(2, 1100, 5), backward=backward, device=ONE),
            f"padded-{suffix}": Predictions(torch.bfloat16, pad=3, backward=backward, device=ONE),
            f"one_target-{suffix}": Predictions(one_target=True, backward=backward),
            f"nothing-{suffix}": Predictions(shape=(0, 3, 8), backward=backward),
            f"no_features-{suffix}": Predictions(shape=(3, 4, 0), backward=backward),
            f"special-{suffix}": Predictions(shape=(6, 4, 9), special=True, backward=backward, device=ONE),
            f"special_parts-{suffix}": Predictions(shape=(6, 40, 9), special=True, backward=backward, device=MANY),
            f"special_min-{suffix}": Predictions(
                shape=(6, 4, 9), special=True, minimum=True, backward=backward, device=ONE
            ),
        }
    return found | {
        "no_weights": Predictions(want=(False, False)),
        "no_weights_parts": Predictions(want=(False, False), shape=(2, 3, 3000), device=MANY),
        "prediction_alone": Predictions(want=(True, False), shape=(2, 70, 9), backward=True, device=MANY),
        "target_alone": Predictions(want=(False, True), backward=True),
        "target_alone_parts": Predictions(want=(False, True), shape=(2, 70, 9), backward=True, device=MANY),
    }


ENERGIES, PREDICTIONS = energies_cases(), predictions_cases()
ENERGIES |= {
    f"{name}-dense": replace(case, dense=True)
    for name, case in ENERGIES.items()
    if case.backward and case.grad_strides() != torch.empty(case.shape).stride()
}
results, test_no_kernel_races = run.results_and_races(
    lambda: {
        **{f"energies-{name}": case.call() for name, case in ENERGIES.items()},
        **{f"predictions-{name}": case.call() for name, case in PREDICTIONS.items()},
    }
)


def unchanged(call: Call, arrays: dict[str, Tensor], names: tuple[str, ...]) -> bool:
    return all(torch.equal(arrays[n].nan_to_num(5), call.arrays[n].nan_to_num(5)) for n in names if n in arrays)


@pytest.mark.parametrize("name", ENERGIES)
def test_free_energy(name, results):
    case, result = ENERGIES[name], results[f"energies-{name}"]
    assert result.error == ""
    assert unchanged(case.call(), result.arrays, ("energy", "grad_value"))
    value, _, grad = case.truth()
    if case.backward:
        strides = case.grad_strides()
        got = result.arrays["grad"]
        view = got.as_strided(case.shape, strides, 0)
        # With a spread of 1e4 the exponent has the rounding errors of the energies.
        assert oracle.error(view, grad) <= roundings(case.dtype) * (1 + case.beta * case.spread)
        outside = torch.ones_like(got, dtype=torch.bool)
        outside.as_strided(case.shape, strides, 0).fill_(False)
        assert bool((got[outside] == 7).all())
        return
    _, view, _ = case.energies()
    finite = view.isfinite().all(1)
    torch.testing.assert_close(result.arrays["value"].isfinite(), value.isfinite())
    torch.testing.assert_close(result.arrays["value"][~finite].double(), value[~finite], equal_nan=True)
    if not case.minimum:
        exact = exact_free_energy(view.double(), case.beta)
        size = view.double().abs().amax(1)
        worst = ((result.arrays["value"].double() - exact).abs() / size)[finite].amax() if finite.any() else 0
        assert worst <= 4 * torch.finfo(accumulation_dtype(case.dtype)).eps
    else:
        assert torch.equal(result.arrays["value"].double().nan_to_num(5), value.nan_to_num(5))
        assert torch.equal(result.arrays["winner"], view.double().min(1).indices)


def exact_free_energy(energy: Tensor, beta: float) -> Tensor:
    """In float64, accurate for small beta: from the deviations d from the mean, whose first-order terms cancel."""
    mean = energy.mean(1, keepdim=True)
    x = beta * (energy - mean)
    small = torch.where(x.abs() < 1e-4, x * x / 2, torch.exp(-x) - 1 + x).mean(1)
    near = mean.squeeze(1) - torch.log1p(small) / beta
    return torch.where(x.abs().amax(1) < 1, near, energy_oracle.free_energy(energy, beta=beta, dim=1))


@pytest.mark.parametrize("name", PREDICTIONS)
def test_prediction_energy(name, results):
    case, result = PREDICTIONS[name], results[f"predictions-{name}"]
    assert result.error == ""
    assert unchanged(case.call(), result.arrays, ("prediction", "target") + ("value", "weights") * case.backward)
    value, weights, _, grad, grad_target = case.truth()
    if not case.backward:
        assert oracle.error(result.arrays["value"], value) <= roundings(accumulation_dtype(case.dtype))
        if "energies" in result.arrays:
            _, view, target = case.inputs()
            energies = (view.double() - target.double().unsqueeze(1)).square().sum(2)
            assert oracle.error(result.arrays["energies"], energies) <= roundings(accumulation_dtype(case.dtype))
        if "weights" in result.arrays:
            # The relative error of a weight is the absolute error of its energy.
            limit = roundings(accumulation_dtype(case.dtype)) * (1 + case.beta * 4 * case.shape[2])
            assert oracle.error(result.arrays["weights"], weights) <= limit
            assert torch.equal(result.arrays["weights"] == 0, weights == 0)
        return
    if case.want[0]:
        got = result.arrays["grad_prediction"]
        view = got[..., : case.shape[2]].transpose(0, 1) if case.transposed else got[..., : case.shape[2]]
        assert oracle.error(view, grad) <= roundings(case.dtype)
        assert torch.equal(view == 0, grad.to(case.dtype) == 0)
        assert bool((got[..., case.shape[2] :] == 7).all())
    if case.want[1]:
        assert oracle.error(result.arrays["grad_target"], grad_target) <= roundings(case.dtype)


def test_every_kernel_runs(results, request):
    program = run.build(request.node.callspec.params["results"])
    compiled = {n for n in run.kernels(program).values() if n.startswith(("free_energy", "prediction_energy"))}
    assert len(compiled) == 2 * 8 + 4 * 4 + 2
    assert {name for result in results.values() for name in result.launched} == compiled


def test_too_many_candidates_are_an_error(tmp_path):
    calls = [Energies().call(), Predictions().call()]
    for call in calls:
        call.ints["count"] = 2**30 + 1
    calls[1].ints["batch"] = 0
    for result in run.run(run.build("address"), calls, tmp_path):
        assert "2^30" in result.error
