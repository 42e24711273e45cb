"""Kernels of pair scores, N queries with M candidates of D features: sums of rows and columns, and the gradients; and
what gives both from one computation of the scores, where the energy is a sigmoid or the candidates are frozen."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from benchmarks import harness, providers
from benchmarks.harness import Bar, Benchmark, Case, Provider, Run
from benchmarks.providers import OURS
from sslkernels import native
from sslkernels.ops.pair_scores import (
    SIGMOID,
    SOFTMAX,
    ColumnSums,
    Labels,
    NativePairs,
    PairKernels,
    ReferencePairs,
    RowSums,
    Side,
    Thresholds,
    Tile,
    TritonPairs,
)

OP = "pair_kernels"
SUMS, GRADIENTS = "pair_sums", "pair_gradients"
PLAIN = "plain torch"
MATMULS = "the bare matmuls (floor)"
SCALE = 1 / 0.07
BIAS = -10.0  # of the sigmoid energy
# Regimes whose sums and gradients share the products.
SIGMOID_REGIME, FROZEN = "sigmoid", "frozen"
Inputs = dict[str, Tensor]


def make_case(
    shape: dict[str, int],
    dtype: torch.dtype = torch.bfloat16,
    regime: str = "random",
    ignored: float = 0.0,
    backward: bool = True,
    bias: bool = False,
) -> Case:
    """A softmax over rows and columns of normalised features. The floor: one matmul and the features for the sums;
    three, and the gradients in float32 too, for the gradients (scores are not kept), or for sums and gradients of a
    sigmoid energy over rows; two where the candidates of a softmax over rows are frozen."""
    rows, columns, width = (shape[key] for key in ("N", "M", "D"))
    features = (rows + columns) * width
    matmul = 2 * rows * columns * width
    if regime == FROZEN:
        return Case(GRADIENTS, shape, dtype, features * dtype.itemsize + 4 * rows * width, 2 * matmul, regime)
    if backward:
        return Case(GRADIENTS, shape, dtype, features * (dtype.itemsize + 4), 3 * matmul, regime)
    return Case(SUMS, shape, dtype, features * dtype.itemsize, matmul, backward=False)


def cases(device: str) -> list[Case]:
    if device == "cpu":
        shapes, dtypes = [(2048, 2048, 256)], (torch.float32, torch.bfloat16)
    else:
        shapes, dtypes = [(65536, 65536, d) for d in (64, 128, 256, 512, 768, 1024)], (torch.bfloat16,)
        shapes += [(256, 65536, 128), (4096, 4096, 128), (32768, 32768, 512)]
    found = [
        make_case({"N": n, "M": m, "D": d}, dtype, backward=backward)
        for n, m, d in shapes
        for dtype in dtypes
        for backward in (False, True)
    ]
    if device == "cpu":
        shared = [(*shapes[0], dtype) for dtype in dtypes]
    else:
        shared = [(n, 65536, d, torch.bfloat16) for n, d in ((256, 128), (65536, 128), (65536, 256), (32768, 768))]
        shared += [(4096, 65536, 128, torch.float32)]
    for n, m, d, dtype in shared:
        for regime in (SIGMOID_REGIME, FROZEN):
            found.append(make_case({"N": n, "M": m, "D": d}, dtype, regime))
    return found


def smoke_cases(device: str) -> list[Case]:
    found = [make_case({"N": 70, "M": 90, "D": 48}, torch.float32, backward=backward) for backward in (False, True)]
    found.append(make_case({"N": 64, "M": 128, "D": 64}, torch.bfloat16))
    for regime in (SIGMOID_REGIME, FROZEN):
        found += [make_case({"N": n, "M": 90, "D": n}, torch.float32, regime) for n in (48, 300)]
    return found


def make_inputs(case: Case, device: torch.device) -> Inputs:
    generator = torch.Generator(device).manual_seed(1)
    rows, columns, width = (case.shape[key] for key in ("N", "M", "D"))
    query, key = (torch.randn(n, width, generator=generator, device=device).to(case.dtype) for n in (rows, columns))
    inputs = {"query": query, "key": key, "scale": torch.full((1,), SCALE, device=device)}
    if case.regime == SIGMOID_REGIME:
        inputs["bias"] = torch.full((1,), BIAS, device=device)
    for name, values in (("query_norm", query), ("key_norm", key)):
        inputs[name] = 1 / torch.linalg.vector_norm(values, dim=1, dtype=torch.float32)
    inputs["query_label"], inputs["key_label"] = (
        torch.arange(n, dtype=torch.int32, device=device) for n in (rows, columns)
    )
    if case.backward:
        for name, count, others in (("row_reference", rows, columns), ("column_reference", columns, rows)):
            # About the log-sum-exp of random features, whose cosines have variance 1 / D.
            lse = math.log(others) + SCALE**2 / (2 * width)
            inputs[name] = torch.full((count,), lse, device=device)
        inputs["grad_query"], inputs["grad_key"] = (torch.empty_like(v, dtype=torch.float32) for v in (query, key))
    return inputs


def _tiles(kernels: PairKernels, case: Case, t: Inputs) -> Iterator[tuple[slice, Tile]]:
    """The strips of the plan."""
    rows, columns = case.shape["N"], case.shape["M"]
    gradient = case.backward and not (case.regime == FROZEN and kernels.weighs(t["query"]))
    strip, needs_products = kernels.strip_rows(rows, columns, t["query"], gradient)
    energy = SIGMOID if case.regime == SIGMOID_REGIME else SOFTMAX
    for begin in range(0, rows, strip):
        part = slice(begin, min(begin + strip, rows))
        products = t["query"].new_empty(part.stop - begin, columns) if needs_products else None
        labels = Labels(t["query_label"][part], t["key_label"])
        norms = t["query_norm"][part], t["key_norm"]
        tile = Tile(t["query"][part], t["key"], products, *norms, t["scale"], t.get("bias"), energy, labels, False)
        kernels.begin(tile)
        yield part, tile


def _sums(kernels: PairKernels, case: Case, t: Inputs) -> tuple[Tensor, ...]:
    device = t["query"].device
    found = []
    for size in (case.shape["N"], case.shape["M"]):
        found.append(torch.full((size,), float("-inf"), dtype=t["scale"].dtype, device=device))
        found.append(torch.zeros(size, dtype=torch.float64, device=device))
    row_max, row_sum, column_max, column_sum = found
    for part, tile in _tiles(kernels, case, t):
        rows = RowSums(row_max[part], row_sum[part], *[None] * 5)
        kernels.sums(tile, rows, ColumnSums(column_max, column_sum, *[None] * 3), Thresholds(None, None, None), None)
    return row_max + row_sum.log(), column_max + column_sum.log()


def _gradients(kernels: PairKernels, case: Case, t: Inputs) -> tuple[Tensor, ...]:
    ones = torch.ones_like(t["row_reference"]), torch.ones_like(t["column_reference"])
    dot, total = (torch.zeros(case.shape["N"], dtype=torch.float64, device=ones[0].device) for _ in range(2))
    grad_query, grad_key = t["grad_query"].zero_(), t["grad_key"].zero_()
    column = Side(ones[1], t["column_reference"])
    for part, tile in _tiles(kernels, case, t):
        row = Side(ones[0][part], t["row_reference"][part])
        kernels.add_gradients(tile, row, column, dot[part], total[part], grad_query[part], grad_key)
    return grad_query, grad_key


def _zeros(case: Case, t: Inputs, count: int) -> list[Tensor]:
    return [torch.zeros(case.shape["N"], dtype=torch.float64, device=t["query"].device) for _ in range(count)]


def _sigmoid(kernels: PairKernels, case: Case, t: Inputs) -> tuple[Tensor, ...]:
    """Sums of the rows, and the gradients of both sides."""
    weight = torch.ones_like(t["row_reference"])
    dot, total, cost = _zeros(case, t, 3)
    grad_query, grad_key = t["grad_query"].zero_(), t["grad_key"].zero_()
    fused, nothing = kernels.fuses_sums(t["query"]), Thresholds(None, None, None)
    for part, tile in _tiles(kernels, case, t):
        sums = RowSums(None, cost[part], *[None] * 5)
        if not fused:
            kernels.sums(tile, sums, None, nothing, None)
        kernels.add_gradients(
            tile, Side(weight[part]), Side(), dot[part], total[part], grad_query[part], grad_key,
            sums if fused else None,
        )  # fmt: skip
    return grad_query, grad_key, cost


def _frozen(kernels: PairKernels, case: Case, t: Inputs) -> tuple[Tensor, ...]:
    """The gradient of the queries and the log-sum-exp, of a softmax over rows."""
    dot, total, summed = _zeros(case, t, 3)
    largest = torch.full_like(t["row_reference"], float("-inf"))
    grad_query = t["grad_query"].zero_()
    weighs, nothing = kernels.weighs(t["query"]), Thresholds(None, None, None)
    for part, tile in _tiles(kernels, case, t):
        sums = RowSums(largest[part], summed[part], *[None] * 5)
        if weighs:
            dot_part = torch.zeros_like(largest[part])
            kernels.weighted_sums(tile, sums, grad_query[part], dot_part)
            grad_query[part] *= (t["query_norm"][part] / sums.sum).to(grad_query.dtype).unsqueeze(1)
        else:
            kernels.sums(tile, sums, None, nothing, None)
            reference = (sums.max + sums.sum.log()).to(largest.dtype)
            row = Side(torch.ones_like(reference), reference)
            kernels.add_gradients(tile, row, Side(), dot[part], total[part], grad_query[part], None)
    return grad_query, largest + summed.log()


def _call(kernels: PairKernels, case: Case, t: Inputs) -> tuple[Tensor, ...]:
    shared = {SIGMOID_REGIME: _sigmoid, FROZEN: _frozen}
    return shared.get(case.regime, _gradients if case.backward else _sums)(kernels, case, t)


def _run(kernels: PairKernels, case: Case, t: Inputs) -> Run:
    return Run(lambda: _call(kernels, case, t), owned=(t["grad_query"], t["grad_key"]) if case.backward else ())


def _matmuls(case: Case, t: Inputs) -> Run:
    """The products alone, by strips of the workspace, into memory that is there."""
    query, key = t["query"], t["key"]
    strip, _ = PairKernels().strip_rows(case.shape["N"], case.shape["M"], query, case.backward)
    products = torch.empty(strip, len(key), dtype=case.dtype, device=key.device)
    results = torch.empty_like(query), torch.empty_like(key)

    def call() -> tuple[Tensor, ...]:
        for begin in range(0, len(query), strip):
            part = query[begin : begin + strip]
            scores = products[: len(part)]
            torch.mm(part, key.t(), out=scores)
            if case.backward:
                torch.mm(scores, key, out=results[0][begin : begin + strip])
                if case.regime != FROZEN:
                    torch.mm(scores.t(), part, out=results[1])
        return results

    return Run(call, owned=(products, *results))


def oracle(case: Case, t: Inputs) -> tuple[Tensor, ...]:
    wide = {name: value.double() if value.is_floating_point() else value for name, value in t.items()}
    return tuple(result.clone() for result in _call(ReferencePairs(), case, wide))


def case_providers(case: Case, device: torch.device) -> list[Provider]:
    def ours(kernels: PairKernels):
        return lambda case, inputs: _run(kernels, case, inputs)

    native_missing = native.why_missing(NativePairs.OPS, "CPU") if device.type == "cpu" else "it has no CUDA kernels"
    return [
        Provider(PLAIN, ours(ReferencePairs()), patience=providers.patience(device)),
        Provider(MATMULS, _matmuls, is_floor=True),
        Provider(f"{OURS} cpu", ours(NativePairs()), unavailable=native_missing),
        Provider(
            f"{OURS} triton", ours(TritonPairs()), unavailable=providers.why_not("contrastive_energy", "triton", device)
        ),
    ]


def twin(case: Case) -> Case:
    return harness.rows_twin(make_case, case, 256)


def bars(device: str) -> list[Bar]:
    if device == "cpu":
        return []
    plain = [case for case in cases(device) if case.regime == "random"]
    large = [case for case in plain if case.shape["N"] >= 32768 and case.shape["D"] >= 256]
    return [Bar("median / the bare matmuls", c.name, providers.time_ratio(OURS, MATMULS), 1.6) for c in large]


BENCHMARK = Benchmark(
    op=OP,
    shape_keys=("N", "M", "D"),
    baseline=PLAIN,
    make_case=make_case,
    cases=cases,
    smoke_cases=smoke_cases,
    inputs=make_inputs,
    providers=case_providers,
    twin=twin,
    oracle=oracle,
    errors=harness.named_errors(["rows", "columns", "sums"]),
    bars=bars,
)


@pytest.mark.parametrize(("case", "provider"), providers.smoke_parameters(BENCHMARK))
def test_pair_kernels(benchmark, case, provider):
    providers.smoke(benchmark, BENCHMARK, case, provider)
