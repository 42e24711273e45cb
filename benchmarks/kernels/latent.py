"""Kernels of latent variables: Gaussian samples, Gumbel samples, the codes of vector_quantize, and energies.

N rows of V columns for Gaussian and Gumbel; N rows of D features with K codes; N free energies of K candidates, or N
targets with K predictions of D features each.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.benchmark import smoke_test
from benchmarks.harness import Case, Inputs
from benchmarks.kernels.kernel import (
    ADJACENT,
    NATIVE,
    ONE_PER_ROW,
    REFERENCE,
    TRITON,
    Compiled,
    Floor,
    FloorSum,
    Kernel,
    KernelBenchmark,
    accumulation_dtype,
    chosen,
    grid,
    normal,
    rows_and_columns,
)
from sslkernels import use_backend
from sslkernels.core import native
from sslkernels.latent import free_energy, gaussian_operators, prediction_energy, vector_quantize
from sslkernels.latent.gumbel_rows import (
    HARD,
    NativeGumbelRows,
    NoisyLogits,
    ReferenceGumbelRows,
    RowGrads,
    RowOutputs,
    State,
    TritonGumbelRows,
    perturbed,
)

BETA = 1.0
SOFT_MINIMUM = free_energy.Options(BETA, False)
GUMBEL_ROWS: dict[str, Any] = {NATIVE: NativeGumbelRows, TRITON: TritonGumbelRows, REFERENCE: ReferenceGumbelRows}


def gaussian_fwd_floor(rows: int, columns: int, samples: int, element_bytes: int) -> Floor:
    """Reads mean and logvar, writes the samples and a float32 divergence per row. The noise of an element takes about
    23 floating-point operations, its scale 8, z 2; the divergence 24."""
    elements = rows * columns
    return Floor(elements * (2 + samples) * element_bytes + rows * 4, elements * (25 * samples + 32))


def gaussian_bwd_floor(rows: int, columns: int, samples: int, element_bytes: int) -> Floor:
    """Reads the gradients of the samples, mean and logvar, writes two gradients; regenerates the noise."""
    elements = rows * columns
    return Floor(elements * (4 + samples) * element_bytes + rows * 4, elements * (26 * samples + 36))


def gumbel_rows_fwd_floor(rows: int, columns: int, element_bytes: int, output: bool, stats: bool) -> Floor:
    """Reads the logits; writes y if it is wanted, and per row a state and, without y, an index. A logit takes the
    noise, an addition, a comparison and, for the sum, an exponential (2) and two more; statistics as much again,
    without noise."""
    per_row = 8 + (0 if output else 8) + (16 if stats else 0)
    moved = rows * columns * element_bytes * (2 if output else 1) + rows * per_row
    return Floor(moved, rows * columns * (11 if stats else 6))


def gumbel_rows_bwd_floor(rows: int, columns: int, element_bytes: int, grad_bytes: int, probabilities: bool) -> Floor:
    """Reads logits, the gradient of y and the state; writes the gradient of the logits. An element takes the noise
    again, the exponential and its scale (5), a product and its sum (2), and the gradient (3); the gradient of the
    probabilities as much again."""
    moved = rows * columns * (2 * element_bytes + grad_bytes) + rows * (16 if probabilities else 8)
    return Floor(moved, rows * columns * (20 if probabilities else 10))


def probability_sums_floor(rows: int, columns: int, element_bytes: int) -> Floor:
    """Reads logits and state; the sums are small."""
    return Floor(rows * columns * element_bytes + rows * 8, rows * columns * 5)


def search_codes_floor(rows: int, codes: int, dim: int, element_bytes: int) -> Floor:
    """Rows and codes once, and each row's code and score; products are never materialised. Measured as an op: a
    matmul."""
    return Floor((rows + codes) * dim * element_bytes + rows * 16, 2 * rows * codes * dim)


def gather_codes_floor(rows: int, codes: int, dim: int, element_bytes: int) -> Floor:
    """Reads the rows and the codes that may occur, writes the values; per row a code, a score, a float32 distance."""
    return Floor((2 * rows + min(rows, codes)) * dim * element_bytes + rows * 20, 3 * rows * dim)


def code_difference_floor(rows: int, codes: int, dim: int, element_bytes: int, out_bytes: int) -> Floor:
    """Per row also the index of its code."""
    moved = (rows + min(rows, codes)) * dim * element_bytes + rows * (dim * out_bytes + 8)
    return Floor(moved, 2 * rows * dim)


def free_energy_fwd_floor(results: int, count: int, element_bytes: int, gradient: bool) -> Floor:
    """Per result its value and, for a gradient, what backward needs: two numbers, or an index. An energy takes a
    comparison, a difference, an exponential (2) and two sums."""
    return Floor(results * (count * element_bytes + 4 + (8 if gradient else 0)), results * count * 6)


def free_energy_bwd_floor(results: int, count: int, element_bytes: int, minimum: bool) -> Floor:
    """The hard minimum does not read the energies."""
    moved = results * (count * element_bytes * (1 if minimum else 2) + 12)
    return Floor(moved, 0 if minimum else results * count * 4)


def prediction_energy_fwd_floor(batch: int, count: int, dim: int, element_bytes: int, gradient: bool) -> Floor:
    """Predictions and targets once; per target its value and, for a gradient, a weight for each prediction. An element
    takes a difference, its square and a sum."""
    weights = count * 4 if gradient else 0
    return Floor(batch * ((count + 1) * dim * element_bytes + 4 + weights), 3 * batch * count * dim)


def prediction_energy_bwd_floor(batch: int, count: int, read: int, dim: int, element_bytes: int, target: bool) -> Floor:
    """read: predictions with a weight; only they and their targets are read. Writes the gradients of all predictions
    and, with `target`, of the targets."""
    rows = read + min(batch, read) + batch * (count + (1 if target else 0))
    return Floor(rows * dim * element_bytes + batch * (count + 1) * 4, read * dim * (3 if target else 2))


FLOOR_SUMS = (
    # Logits read, samples written, and a state; or an index instead of samples, and two states with statistics.
    FloorSum(gumbel_rows_fwd_floor, (7, 9, 2, True, False), 7 * (2 * 9 * 2 + 8), 7 * 9 * 6),
    FloorSum(gumbel_rows_fwd_floor, (7, 9, 2, False, True), 7 * (9 * 2 + 16 + 16), 7 * 9 * 11),
    FloorSum(gumbel_rows_bwd_floor, (7, 9, 2, 4, True), 7 * (9 * (2 + 4 + 2) + 16), 7 * 9 * 20),
    FloorSum(free_energy_fwd_floor, (7, 9, 2, True), 7 * (9 * 2 + 12), 7 * 9 * 6),
    FloorSum(free_energy_bwd_floor, (7, 9, 2, False), 7 * (2 * 9 * 2 + 12), 7 * 9 * 4),
    FloorSum(free_energy_bwd_floor, (7, 9, 2, True), 7 * (9 * 2 + 12), 0),
    FloorSum(prediction_energy_fwd_floor, (5, 3, 10, 2, True), 5 * (4 * 10 * 2 + 4 + 3 * 4), 3 * 5 * 3 * 10),
    # The minimum reads one prediction of each target, and the target; both gradients are written.
    FloorSum(prediction_energy_bwd_floor, (5, 3, 5, 10, 2, True), (5 + 5 + 5 * 4) * 10 * 2 + 5 * 4 * 4, 5 * 10 * 3),
    FloorSum(gaussian_fwd_floor, (7, 10, 3, 2), 70 * (2 + 3) * 2 + 7 * 4, 70 * (25 * 3 + 32)),
    FloorSum(gaussian_bwd_floor, (7, 10, 3, 2), 70 * (4 + 3) * 2 + 7 * 4, 70 * (26 * 3 + 36)),
    FloorSum(probability_sums_floor, (7, 9, 2), 7 * 9 * 2 + 7 * 8, 7 * 9 * 5),
    FloorSum(search_codes_floor, (7, 9, 10, 2), (7 + 9) * 10 * 2 + 7 * 16, 2 * 7 * 9 * 10),
    FloorSum(gather_codes_floor, (7, 9, 10, 2), (7 + 7 + 7) * 10 * 2 + 7 * 20, 3 * 7 * 10),
    FloorSum(code_difference_floor, (7, 4, 10, 2, 4), (7 + 4) * 10 * 2 + 7 * (40 + 8), 2 * 7 * 10),
)
COMPILED = (
    Compiled("free_energy_fwd", stores=ONE_PER_ROW),
    Compiled("prediction_energy_fwd", stores=ONE_PER_ROW),
    Compiled("prediction_energy_parts", stores=ONE_PER_ROW),
    Compiled("prediction_energy_finish", loads=ADJACENT, stores=ADJACENT),
    Compiled("prediction_energy_target", loads=ADJACENT, stores=ADJACENT),
    Compiled("best_codes", stores=ONE_PER_ROW, instead_of="search_codes"),
    Compiled("code_tile_kernel", instead_of="search_codes"),
    Compiled("code_tile_kernel<float, 8>", stores=ONE_PER_ROW, instead_of="search_codes"),
)


def gaussian_inputs(case: Case, device: torch.device) -> Inputs:
    rows = case.shape["N"]
    return {
        "mean": normal(case, device),
        "logvar": normal(case, device, 2).mul_(0.1),
        "grad_z": normal(case, device, 3).mul_(0.1),
        "grad_kl": torch.full((rows,), 1 / rows, dtype=accumulation_dtype(case.dtype), device=device),
        "seed": torch.zeros((), dtype=torch.int64, device=device),
    }


def gaussian(backend: str, case: Case, t: Inputs, dtype: torch.dtype | None = None) -> None:
    """One sample and the divergence of each row, or the gradients of mean and logvar."""
    options = gaussian_operators.Options(1, False, gaussian_operators.ROWS, 0.0, -math.inf, math.inf)
    mean, logvar, grad_z = (t[name].to(dtype) for name in ("mean", "logvar", "grad_z"))
    inputs = gaussian_operators.Inputs(mean, logvar, None, None, None, t["seed"])
    with use_backend(chosen(backend, mean.device)):
        if case.op == "gaussian_fwd":
            outputs = gaussian_operators.gaussian_fwd(inputs, options, False)
            t["first"], t["second"] = outputs.z, outputs.kl
        else:
            kl = t["grad_kl"].to(accumulation_dtype(mean.dtype))
            grads = gaussian_operators.OutputGrads(grad_z.unsqueeze(1), kl)
            wanted = gaussian_operators.Wanted(True, True, False, False)
            gradients = gaussian_operators.gaussian_bwd(grads, inputs, options, wanted)
            t["first"], t["second"] = gradients.mean, gradients.logvar


def gaussian_oracle(case: Case, t: Inputs) -> tuple[Tensor, ...]:
    exact = dict(t)
    gaussian(REFERENCE, case, exact, torch.float64)
    return exact["first"], exact["second"]


def gaussian_kernel(floor: Callable[..., Floor], share: float, **more: Any) -> Kernel:
    return Kernel(
        rows_and_columns(floor, samples=1),
        gaussian_inputs,
        gaussian,
        lambda case: ("first", "second"),
        gaussian_oracle,
        grid({"N": 1 << 20, "V": 256}),
        share=share,
        instructions=75,
        **more,
    )


def gumbel_inputs(case: Case, device: torch.device) -> Inputs:
    """Forward writes one-hot samples; the gradient of the samples has the dtype of the logits."""
    acc = accumulation_dtype(case.dtype)
    logits = normal(case, device)
    t = {"logits": logits, "weight": normal(case, device, 1)}
    t |= {"grad": torch.empty_like(logits), "out": torch.empty_like(logits)}
    t |= {name: torch.empty(len(logits), dtype=acc, device=device) for name in ("max", "sum")}
    t["seed"] = torch.tensor(1, device=device)
    t["inverse_tau"] = torch.ones((), dtype=torch.float64, device=device)
    largest = logits.amax(1, keepdim=True).to(acc)
    t |= {"softmax_max": largest[:, 0], "softmax_sum": torch.logsumexp(logits.to(acc) - largest, 1).exp()}
    rows = ReferenceGumbelRows() if native.extension is None else NativeGumbelRows()
    rows.forward(source_of(t), 0, RowOutputs(None, None, State(t["max"], t["sum"])))
    return t


def source_of(t: Inputs) -> NoisyLogits:
    return NoisyLogits(t["logits"], t["seed"], None, t["inverse_tau"])


def gumbel(backend: str, case: Case, t: Inputs) -> None:
    rows, state = GUMBEL_ROWS[backend](), State(t["max"], t["sum"])
    if case.op == "gumbel_rows_fwd":
        rows.forward(source_of(t), HARD, RowOutputs(t["out"], None, state))
    elif case.op == "gumbel_rows_bwd":
        rows.backward(RowGrads(t["weight"], None, None), source_of(t), state, None, t["grad"])
    else:
        t["total"] = rows.probability_sums(t["logits"], State(t["softmax_max"], t["softmax_sum"]), None, 1)


def gumbel_oracle(case: Case, t: Inputs) -> tuple[Tensor, ...]:
    if case.op == "probability_sums":
        return (t["logits"].double().softmax(1).sum(0, keepdim=True),)
    s = perturbed(source_of(t)).double()
    if case.op == "gumbel_rows_fwd":
        one_hot = torch.zeros_like(s).scatter_(1, s.argmax(1, keepdim=True), 1)
        return (s - s.amax(1, keepdim=True)).exp().sum(1), one_hot
    y = s.softmax(1)
    weight = t["weight"].double()
    return (y * (weight - (weight * y).sum(1, keepdim=True)),)


def gumbel_kernel(floor: Callable[[Case], Floor], share: float, *results: str, **more: Any) -> Kernel:
    """2**28 logits in short and long rows. Making the noise takes longer than the memory traffic: two logarithms and a
    Philox call."""
    shapes = ({"N": (1 << 28) // v, "V": v} for v in (320, 8192, 50257))
    return Kernel(
        floor,
        gumbel_inputs,
        gumbel,
        lambda case: results,
        gumbel_oracle,
        grid(*shapes),
        share=share,
        **more,
    )


def code_inputs(case: Case, device: torch.device) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)
    rows, codes, dim = (case.shape[key] for key in "NKD")
    acc = accumulation_dtype(case.dtype)
    input, codebook = (torch.randn(n, dim, generator=generator, device=device).to(case.dtype) for n in (rows, codes))
    t = {"input": input, "codebook": codebook, "grad": torch.empty_like(input)}
    t["index"] = torch.randint(codes, (rows,), generator=generator, device=device)
    t["score"] = torch.zeros(rows, dtype=torch.float64, device=device)
    t["value"], t["coefficient"] = (torch.ones(shape, dtype=acc, device=device) for shape in (rows, ()))
    return t


def gather(backend: str, case: Case, t: Inputs) -> None:
    kernels = vector_quantize.KERNELS[chosen(backend, t["input"].device)]
    kernels.gather(t["input"], t["codebook"], t["index"], t["score"], t["grad"], t["value"])


def gather_oracle(case: Case, t: Inputs) -> tuple[Tensor, ...]:
    codes = t["codebook"].double()[t["index"]]
    return (t["input"].double() - codes).square().sum(1), codes


def difference(backend: str, case: Case, t: Inputs) -> None:
    kernels = vector_quantize.KERNELS[chosen(backend, t["input"].device)]
    kernels.difference(t["coefficient"], t["input"], t["codebook"], t["index"], t["grad"])


def difference_oracle(case: Case, t: Inputs) -> tuple[Tensor, ...]:
    return (t["coefficient"].double() * (t["input"].double() - t["codebook"].double()[t["index"]]),)


def code_sizes(case: Case) -> tuple[int, int, int, int]:
    return (*(case.shape[key] for key in "NKD"), case.dtype.itemsize)


def energy_inputs(case: Case, device: torch.device) -> Inputs:
    """The soft minimum."""
    generator = torch.Generator(device).manual_seed(0)
    acc = accumulation_dtype(case.dtype)
    rows, count, *features = case.shape.values()

    def values(*shape: int, dtype: torch.dtype = case.dtype) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    if not features:
        t = {"energy": values(rows, count, 1), "value": values(rows, 1, dtype=acc)}
        t["lowest"] = t["energy"].to(acc).amin(1)
        t["total"] = torch.exp(-BETA * (t["energy"].to(acc) - t["lowest"].unsqueeze(1))).sum(1)
        return {**t, "grad": torch.empty_like(t["energy"])}
    t = {"prediction": values(rows, count, *features), "target": values(rows, *features)}
    t["value"] = values(rows, dtype=acc)
    t["weights"] = torch.softmax(values(rows, count, dtype=acc), 1)
    return {**t, "grad": torch.empty_like(t["prediction"]), "grad_target": torch.empty_like(t["target"])}


def fill_of(module: Any, name: str, backend: str) -> Callable[..., None]:
    return getattr(module, f"_{name}_{backend}")


def free_energy_fwd(backend: str, case: Case, t: Inputs) -> None:
    state = (t["lowest"], t["total"]) if case.backward else (None, None)
    outputs = free_energy.Outputs(t["value"], *state, None)
    fill_of(free_energy, "fill", backend)(t["energy"], outputs, SOFT_MINIMUM)


def free_energy_bwd(backend: str, case: Case, t: Inputs) -> None:
    fill = fill_of(free_energy, "fill_gradient", backend)
    fill(t["value"], t["energy"], free_energy.State(t["lowest"], t["total"], None), t["grad"], SOFT_MINIMUM)


def prediction_energy_fwd(backend: str, case: Case, t: Inputs) -> None:
    weights = t["weights"] if case.backward else None
    outputs = prediction_energy.Filled(t["value"], weights, None)
    inputs = prediction_energy.Inputs(t["prediction"], t["target"])
    fill_of(prediction_energy, "fill", backend)(inputs, outputs, SOFT_MINIMUM)


def prediction_energy_bwd(backend: str, case: Case, t: Inputs) -> None:
    fill = fill_of(prediction_energy, "fill_gradients", backend)
    inputs = prediction_energy.Inputs(t["prediction"], t["target"])
    fill(t["value"], inputs, t["weights"], prediction_energy.Gradients(t["grad"], t["grad_target"]))


def energy_kernel(
    floor: Callable[[Case], Floor], call: Callable[..., None], results: tuple[str, ...], **cases: Any
) -> Kernel:
    def oracle(case: Case, t: Inputs) -> tuple[Tensor, ...]:
        wide = {name: tensor.double() for name, tensor in t.items()}
        call(REFERENCE, case, wide)
        return tuple(wide[name] for name in results)

    return Kernel(floor, energy_inputs, call, lambda case: results, oracle, **cases)


CODES = {
    "cuda": grid({"N": 1 << 22, "K": 8192, "D": 64}, {"N": 1 << 19, "K": 1024, "D": 300}),
    "smoke": {"shape": {"N": 33, "K": 9, "D": 77}},
}
ENERGIES = {
    "cuda": grid({"N": 1 << 22, "K": 8}, {"N": 65536, "K": 1024}),
    "smoke": {"shape": {"N": 33, "K": 9}},
    "predicted": ("0.7-0.8", "0.4-0.5"),
}
PREDICTIONS = {
    "cuda": grid(
        {"N": 65536, "K": 8, "D": 512}, {"N": 1 << 20, "K": 8, "D": 16}, {"N": 4, "K": 8, "D": 1 << 22}
    ),
    "smoke": {"shape": {"N": 33, "K": 7, "D": 77}},
    "predicted": ENERGIES["predicted"],
}  # fmt: skip
NOISE = {"instructions": 90, "predicted": ("0.25-0.3", "0.25-0.3")}
KERNELS = {
    "gaussian_fwd": gaussian_kernel(gaussian_fwd_floor, 0.75, predicted=("0.55", "0.55")),
    "gaussian_bwd": gaussian_kernel(gaussian_bwd_floor, 0.85),
    "gumbel_rows_fwd": gumbel_kernel(
        rows_and_columns(gumbel_rows_fwd_floor, output=True, stats=False), 0.3, "sum", "out", **NOISE
    ),
    "gumbel_rows_bwd": gumbel_kernel(
        lambda case: gumbel_rows_bwd_floor(*case.shape.values(), case.dtype.itemsize, case.dtype.itemsize, False),
        0.3, "grad", **NOISE,
    ),
    "probability_sums": gumbel_kernel(rows_and_columns(probability_sums_floor), 0.8, "total"),
    "gather_codes": Kernel(
        lambda case: gather_codes_floor(*code_sizes(case)),
        code_inputs, gather, lambda case: ("value", "grad"), gather_oracle, **CODES,
    ),
    "code_difference": Kernel(
        lambda case: code_difference_floor(*code_sizes(case), out_bytes=case.dtype.itemsize),
        code_inputs, difference, lambda case: ("grad",), difference_oracle, **CODES,
    ),
    "free_energy_fwd": energy_kernel(
        lambda case: free_energy_fwd_floor(*case.shape.values(), case.dtype.itemsize, case.backward),
        free_energy_fwd, ("value",), **ENERGIES,
    ),
    "free_energy_bwd": energy_kernel(
        lambda case: free_energy_bwd_floor(*case.shape.values(), case.dtype.itemsize, False),
        free_energy_bwd, ("grad",), **ENERGIES,
    ),
    "prediction_energy_fwd": energy_kernel(
        lambda case: prediction_energy_fwd_floor(*code_sizes(case), case.backward),
        prediction_energy_fwd, ("value",), **PREDICTIONS,
    ),
    "prediction_energy_bwd": energy_kernel(
        lambda case: prediction_energy_bwd_floor(
            case.shape["N"], case.shape["K"], case.shape["N"] * case.shape["K"], case.shape["D"],
            case.dtype.itemsize, True,
        ),
        prediction_energy_bwd, ("grad", "grad_target"), **PREDICTIONS,
    ),
}  # fmt: skip
BENCHMARKS = (KernelBenchmark("latent", KERNELS),)
test_latent_kernels = smoke_test(BENCHMARKS)
