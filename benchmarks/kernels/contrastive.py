"""Kernels of contrastive losses: scores of pairs, per-query negatives, negative sampling.

Pair scores: N queries with M candidates of D features. The kernels compute sums of rows and columns, or the gradients;
and both from one computation of the scores, if the energy is a sigmoid or the candidates are frozen.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks import providers
from benchmarks.benchmark import Benchmark, HandSum, smoke_test
from benchmarks.harness import Bar, Case, Inputs, Provider, Run
from benchmarks.kernels.kernel import (
    PLAIN,
    Compiled,
    Floor,
    FloorSum,
    Kernel,
    KernelBenchmark,
    accumulation_dtype,
    chosen,
    grid,
    normal,
)
from benchmarks.providers import OURS
from sslkernels import use_backend
from sslkernels.contrastive.pair_rows import SIGMOID, SOFTMAX, ColumnSums, SideGrad
from sslkernels.contrastive.query_negatives import NegativeInputs, RowMerge, empty_outputs, query_negatives_
from sslkernels.contrastive.score_tiles import (
    GradientOutputs,
    Labels,
    PairKernels,
    ReferencePairs,
    RowSums,
    Thresholds,
    Tile,
)
from sslkernels.contrastive.tile_backends import NativePairs, TritonPairs
from sslkernels.contrastive.words import glove, word2vec
from sslkernels.core import native

SUMS, GRADIENTS = "pair_sums", "pair_gradients"
MATMULS = "the bare matmuls (floor)"
SCALE = 1 / 0.07
BIAS = -10.0  # sigmoid energy only
SIGMOID_REGIME, FROZEN = "sigmoid", "frozen"  # regimes whose sums and gradients share the products
NEGATIVES = 5


def query_negatives_floor(
    rows: int, count: int, dim: int, element_bytes: int, normalise: bool, gradient: bool, table_rows: int = 0,
    index_bytes: int = 0,
) -> Floor:  # fmt: skip
    """Per row: the query, its gradient in float32, reference and value in float64, coefficient and two gradients; the
    scores of negatives are never materialised. An element takes a product and its sum (2), for the norm (2) and for the
    query's gradient (2) again, and the negative's gradient (3). By index each row of the table that may occur is read
    once, and the gradient of a negative is one float32 number."""
    elements = rows * count * dim
    moved = elements * element_bytes * (2 if gradient else 1)
    if table_rows:
        moved = min(table_rows, rows * count) * dim * element_bytes
        moved += rows * count * (index_bytes + (4 if gradient else 0))
    moved += rows * dim * (element_bytes + (4 if gradient else 0)) + rows * (16 + (12 if gradient else 0))
    of_gradients = 0 if not gradient else 2 if table_rows else 5
    return Floor(moved, elements * ((4 if normalise else 2) + of_gradients))


def negative_sampling_fwd_floor(
    pairs: int, negatives: int, center_rows: int, context_rows: int, dim: int, element_bytes: int, index_bytes: int,
    gradient: bool,
) -> Floor:  # fmt: skip
    """Reads the indices and each row of the tables that may occur; writes per pair the loss and, for a gradient,
    1 + negatives slopes and the direction, in float32. A score takes a dot product, its part of the direction the same
    again."""
    scores = pairs * (1 + negatives)
    rows = min(pairs, center_rows) + min(scores, context_rows)
    written = pairs + (scores + pairs * dim if gradient else 0)
    moved = rows * dim * element_bytes + (pairs + scores) * index_bytes + written * 4
    return Floor(moved, 2 * scores * dim * (2 if gradient else 1))


def glove_fwd_floor(
    pairs: int, center_rows: int, context_rows: int, dim: int, element_bytes: int, index_bytes: int, gradient: bool
) -> Floor:
    """Reads the indices, and target and weight in float32, and each row of the tables and biases that may occur; writes
    per pair the loss and, for a gradient, the slope, in float32."""
    rows = min(pairs, center_rows) + min(pairs, context_rows)
    moved = rows * (dim + 1) * element_bytes + pairs * (2 * index_bytes + (4 if gradient else 3) * 4)
    return Floor(moved, 2 * pairs * dim)


FLOOR_SUMS = (
    # 7 rows of the centers and all 5 of the contexts with their biases, 2 indices and 4 numbers a pair.
    FloorSum(glove_fwd_floor, (7, 100, 5, 10, 2, 8, True), 12 * 11 * 2 + 7 * (16 + 16), 140),
    # 7 rows of the centers and all 9 of the contexts, 4 indices a pair; loss, slopes and direction in float32.
    FloorSum(
        negative_sampling_fwd_floor, (7, 2, 100, 9, 10, 2, 8, True), 16 * 10 * 2 + 7 * 4 * 8 + 7 * (1 + 3 + 10) * 4, 840
    ),
    # Per row: the query, its float32 gradient, reference and value in float64, coefficient and two gradients.
    FloorSum(query_negatives_floor, (7, 3, 10, 2, False, True), 2 * 210 * 2 + 70 * (2 + 4) + 7 * (16 + 12), 210 * 7),
    FloorSum(query_negatives_floor, (7, 3, 10, 2, True, False), 210 * 2 + 70 * 2 + 7 * 16, 210 * 4),
    # All 9 rows of the table; per row 10 numbers of the query and its gradient, 3 indices and multiples.
    FloorSum(
        query_negatives_floor, (7, 3, 10, 2, False, True, 9, 8), 90 * 2 + 70 * (2 + 4) + 7 * (3 * 12 + 28), 210 * 4
    ),
)
COMPILED = (Compiled("glove_fwd", stores="one number per pair"),)


def floor_of_per_query(case: Case) -> Floor:
    n, k, d, *table = case.shape.values()
    by_index = (table[0], 8) if table else ()
    return query_negatives_floor(n, k, d, case.dtype.itemsize, False, case.backward, *by_index)


def per_query_inputs(case: Case, device: torch.device) -> Inputs:
    """With M in the shape the negatives are M rows and an index."""
    n, k, d, *table = case.shape.values()
    generator = torch.Generator(device).manual_seed(0)
    acc = accumulation_dtype(case.dtype)
    shape = (*table, d) if table else (n, k, d)
    index = {} if not table else {"index": torch.randint(table[0], (n, k), generator=generator, device=device)}
    return {
        **index,
        "query": torch.randn(n, d, generator=generator, device=device).mul_(d**-0.5).to(case.dtype),
        "negatives": torch.empty(shape, dtype=case.dtype, device=device).normal_(generator=generator),
        "scale": torch.full((1,), 2.0, dtype=acc, device=device),
        "reference": torch.randn(n, generator=generator, device=device).double(),
        "coefficient": torch.full((n,), 1 / n, dtype=acc, device=device),
    }


def per_query(backend: str, case: Case, t: Inputs) -> None:
    coefficient = t["coefficient"] if case.backward else None
    with use_backend(chosen(backend, t["query"].device)):
        inputs = NegativeInputs(t["query"], t["negatives"], t.get("index"), None, None, None, t["scale"], None)
        outputs = empty_outputs(inputs, case.backward, True, True, False)
        query_negatives_(inputs, RowMerge(SOFTMAX, t["reference"], coefficient, None, False), outputs)
    t["value"], t["grad_query"], t["grad_negatives"] = outputs.value, outputs.grad_query, outputs.grad_negatives


def per_query_plain(case: Case, t: Inputs, dtype: torch.dtype | None = None) -> None:
    query, negatives = (t[name].detach().to(dtype).requires_grad_(case.backward) for name in ("query", "negatives"))
    rows = negatives[t["index"]] if "index" in t else negatives
    scores = torch.einsum("nd,nkd->nk", query, rows) * t["scale"].to(query.dtype)
    candidates = torch.cat([t["reference"].to(query.dtype).unsqueeze(1), scores], 1)
    value = candidates.logsumexp(1)
    t["value"] = value.detach()
    if case.backward:
        grads = torch.autograd.grad(value, (query, negatives), t["coefficient"].to(query.dtype))
        t["grad_query"], t["grad_negatives"] = grads


def per_query_results(case: Case) -> tuple[str, ...]:
    if not case.backward:
        return ("value",)
    return ("value", "grad_query" if "M" in case.shape else "grad_negatives")  # by index: multiples of the query


def per_query_oracle(case: Case, t: Inputs) -> tuple[Tensor, ...]:
    wide = dict(t)
    per_query_plain(case, wide, torch.float64)
    return tuple(wide[name] for name in per_query_results(case))


def sampling_inputs(case: Case, device: torch.device) -> Inputs:
    """N pairs over a table of N words, V columns."""
    rows, dim = case.shape["N"], case.shape["V"]
    acc, generator = accumulation_dtype(case.dtype), torch.Generator(device).manual_seed(2)
    indices = {"center": (rows,), "context": (rows,), "negatives": (rows, NEGATIVES)}
    outputs = {"loss": (rows,), "slopes": (rows, 1 + NEGATIVES), "direction": (rows, dim)}
    return {
        "table": normal(case, device).mul_(dim**-0.25),
        **{name: torch.randint(rows, shape, generator=generator, device=device) for name, shape in indices.items()},
        **{name: torch.empty(shape, dtype=acc, device=device) for name, shape in outputs.items()},
    }


def sampling(fill: Callable[..., object], t: Inputs) -> None:
    indices = word2vec.Indices(t["center"], t["context"], t["negatives"])
    outputs = word2vec.Outputs(t["loss"], t["slopes"], t["direction"])
    fill(word2vec.Tables(t["table"], t["table"]), indices, False, outputs)


def sampling_oracle(case: Case, t: Inputs) -> tuple[Tensor, ...]:
    exact = {name: t[name].double() for name in ("table", "loss", "slopes", "direction")}
    sampling(word2vec._fill_reference, {**t, **exact})
    return exact["loss"], exact["direction"]


def glove_inputs(case: Case, device: torch.device) -> Inputs:
    """N pairs over a table of N words, V columns."""
    rows, dim = case.shape["N"], case.shape["V"]
    acc, generator = accumulation_dtype(case.dtype), torch.Generator(device).manual_seed(2)
    index = {n: torch.randint(rows, (rows,), generator=generator, device=device) for n in ("center", "context")}
    numbers = {n: torch.rand(rows, generator=generator, device=device).to(acc) for n in ("target", "weight")}
    outputs = {n: torch.empty(rows, dtype=acc, device=device) for n in ("loss", "slope")}
    bias = torch.randn(rows, generator=generator, device=device).to(case.dtype)
    return {"table": normal(case, device).mul_(dim**-0.25), "bias": bias, **index, **numbers, **outputs}


def glove_pairs(fill: Callable[..., object], t: Inputs) -> None:
    pairs = glove.Pairs(t["center"], t["context"], t["target"], t["weight"])
    fill(glove.Parameters(*[t["table"]] * 2, *[t["bias"]] * 2), pairs, glove.Outputs(t["loss"], t["slope"]))


def glove_oracle(case: Case, t: Inputs) -> tuple[Tensor, ...]:
    exact = {name: value.double() if value.is_floating_point() else value for name, value in t.items()}
    glove_pairs(glove._fill_reference, exact)
    return exact["loss"], exact["slope"]


def pair_inputs(case: Case, device: torch.device) -> Inputs:
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
            # Roughly the log-sum-exp for random features, whose cosines have variance 1 / D.
            lse = math.log(others) + SCALE**2 / (2 * width)
            inputs[name] = torch.full((count,), lse, device=device)
        inputs["grad_query"], inputs["grad_key"] = (torch.empty_like(v, dtype=torch.float32) for v in (query, key))
    return inputs


def _tiles(kernels: PairKernels, case: Case, t: Inputs) -> Iterator[tuple[slice, Tile]]:
    """The row blocks of the plan."""
    rows, columns = case.shape["N"], case.shape["M"]
    gradient = case.backward and not (case.regime == FROZEN and kernels.has_weighted_sums(t["query"]))
    (block, _), needs_products = kernels.tile_shape((rows, columns), t["query"], gradient, whole_rows=True)
    energy = SIGMOID if case.regime == SIGMOID_REGIME else SOFTMAX
    for begin in range(0, rows, block):
        part = slice(begin, min(begin + block, rows))
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
        rows = RowSums(row_max[part], row_sum[part], *[None] * 6)
        kernels.sums(tile, rows, ColumnSums(column_max, column_sum, *[None] * 3), Thresholds(None, None, None), None)
    return row_max + row_sum.log(), column_max + column_sum.log()


def _gradients(kernels: PairKernels, case: Case, t: Inputs) -> tuple[Tensor, ...]:
    ones = torch.ones_like(t["row_reference"]), torch.ones_like(t["column_reference"])
    dot, total = (torch.zeros(case.shape["N"], dtype=torch.float64, device=ones[0].device) for _ in range(2))
    grad_query, grad_key = t["grad_query"].zero_(), t["grad_key"].zero_()
    column = SideGrad(ones[1], t["column_reference"])
    for part, tile in _tiles(kernels, case, t):
        row = SideGrad(ones[0][part], t["row_reference"][part])
        kernels.add_gradients(tile, row, column, GradientOutputs(dot[part], total[part], grad_query[part], grad_key))
    return grad_query, grad_key


def _zeros(case: Case, t: Inputs, count: int) -> list[Tensor]:
    return [torch.zeros(case.shape["N"], dtype=torch.float64, device=t["query"].device) for _ in range(count)]


def _sigmoid(kernels: PairKernels, case: Case, t: Inputs) -> tuple[Tensor, ...]:
    """Row sums, and the gradients of both sides."""
    weight = torch.ones_like(t["row_reference"])
    dot, total, cost = _zeros(case, t, 3)
    grad_query, grad_key = t["grad_query"].zero_(), t["grad_key"].zero_()
    fused, nothing = kernels.fuses_sums(t["query"]), Thresholds(None, None, None)
    for part, tile in _tiles(kernels, case, t):
        sums = RowSums(None, cost[part], *[None] * 6)
        if not fused:
            kernels.sums(tile, sums, None, nothing, None)
        outputs = GradientOutputs(dot[part], total[part], grad_query[part], grad_key, sums if fused else None)
        kernels.add_gradients(tile, SideGrad(weight[part]), SideGrad(), outputs)
    return grad_query, grad_key, cost


def _frozen(kernels: PairKernels, case: Case, t: Inputs) -> tuple[Tensor, ...]:
    """A softmax over rows: the gradient of the queries, and the log-sum-exp."""
    dot, total, summed = _zeros(case, t, 3)
    largest = torch.full_like(t["row_reference"], float("-inf"))
    grad_query = t["grad_query"].zero_()
    weighted, nothing = kernels.has_weighted_sums(t["query"]), Thresholds(None, None, None)
    for part, tile in _tiles(kernels, case, t):
        sums = RowSums(largest[part], summed[part], *[None] * 6)
        if weighted:
            dot_part = torch.zeros_like(largest[part])
            kernels.weighted_sums(tile, sums, grad_query[part], dot_part)
            grad_query[part] *= (t["query_norm"][part] / sums.sum).to(grad_query.dtype).unsqueeze(1)
        else:
            kernels.sums(tile, sums, None, nothing, None)
            reference = (sums.max + sums.sum.log()).to(largest.dtype)
            row = SideGrad(torch.ones_like(reference), reference)
            outputs = GradientOutputs(dot[part], total[part], grad_query[part], None)
            kernels.add_gradients(tile, row, SideGrad(), outputs)
    return grad_query, largest + summed.log()


def _call(kernels: PairKernels, case: Case, t: Inputs) -> tuple[Tensor, ...]:
    shared = {SIGMOID_REGIME: _sigmoid, FROZEN: _frozen}
    return shared.get(case.regime, _gradients if case.backward else _sums)(kernels, case, t)


def _run(kernels: PairKernels, case: Case, t: Inputs) -> Run:
    return Run(lambda: _call(kernels, case, t), owned=(t["grad_query"], t["grad_key"]) if case.backward else ())


def _matmuls(case: Case, t: Inputs) -> Run:
    """Only the products, by row blocks that fit the workspace, into preallocated memory."""
    query, key = t["query"], t["key"]
    (block, _), _ = PairKernels().tile_shape((case.shape["N"], case.shape["M"]), query, case.backward, whole_rows=True)
    products = torch.empty(block, len(key), dtype=case.dtype, device=key.device)
    results = torch.empty_like(query), torch.empty_like(key)

    def call() -> tuple[Tensor, ...]:
        for begin in range(0, len(query), block):
            part = query[begin : begin + block]
            scores = products[: len(part)]
            torch.mm(part, key.t(), out=scores)
            if case.backward:
                torch.mm(scores, key, out=results[0][begin : begin + block])
                if case.regime != FROZEN:
                    torch.mm(scores.t(), part, out=results[1])
        return results

    return Run(call, owned=(products, *results))


class PairKernelBenchmark(Benchmark):
    op = "pair_kernels"
    shape_keys = ("N", "M", "D")
    dtype = torch.bfloat16
    baseline = PLAIN
    results = ("rows", "columns", "sums")
    settings = frozenset({"regime", "backward"})
    bars_on_error = False
    inputs = staticmethod(pair_inputs)

    def case(self, *arguments, **settings) -> Case:
        case = super().case(*arguments, **settings)
        return dataclasses.replace(case, op=GRADIENTS if case.backward else SUMS)

    def cost(self, case: Case) -> tuple[int, int]:
        """A softmax over rows and columns of normalised features. Sums take one matmul and the features. Gradients,
        whose scores are not kept, take three and also write float32 gradients, and so do sums and gradients of a
        sigmoid energy over rows. A softmax over rows with frozen candidates takes two."""
        rows, columns, width = (case.shape[key] for key in ("N", "M", "D"))
        features = (rows + columns) * width
        matmul = 2 * rows * columns * width
        if case.regime == FROZEN:
            return features * case.dtype.itemsize + 4 * rows * width, 2 * matmul
        if case.backward:
            return features * (case.dtype.itemsize + 4), 3 * matmul
        return features * case.dtype.itemsize, matmul

    def hand_sums(self) -> list[HandSum]:
        shape = {"N": 10, "M": 20, "D": 8}
        return [
            HandSum(self.case(shape), (2 + 4) * 30 * 8, 6 * 10 * 20 * 8),
            HandSum(self.case(shape, regime=FROZEN), 2 * 30 * 8 + 4 * 10 * 8, 4 * 10 * 20 * 8),
        ]

    def cases(self, device: str) -> list[Case]:
        if device == "cpu":
            shapes, dtypes = [(2048, 2048, 256)], (torch.float32, torch.bfloat16)
            shared = [(*shapes[0], dtype) for dtype in dtypes]
        else:
            shapes, dtypes = [(65536, 65536, d) for d in (64, 128, 256, 512, 768, 1024)], (torch.bfloat16,)
            shapes += [(256, 65536, 128), (4096, 4096, 128), (32768, 32768, 512)]
            shared = [(n, 65536, d, torch.bfloat16) for n, d in ((256, 128), (65536, 128), (65536, 256), (32768, 768))]
            shared += [(4096, 65536, 128, torch.float32)]
        found = [
            self.case({"N": n, "M": m, "D": d}, dtype, backward=backward)
            for n, m, d in shapes
            for dtype in dtypes
            for backward in (False, True)
        ]
        for n, m, d, dtype in shared:
            found += [self.case({"N": n, "M": m, "D": d}, dtype, regime) for regime in (SIGMOID_REGIME, FROZEN)]
        return found

    def smoke_cases(self, device: str) -> list[Case]:
        small = {"N": 70, "M": 90, "D": 48}
        found = [self.case(small, torch.float32, backward=backward) for backward in (False, True)]
        found.append(self.case({"N": 64, "M": 128, "D": 64}, torch.bfloat16))
        for regime in (SIGMOID_REGIME, FROZEN):
            found += [self.case({"N": n, "M": 90, "D": n}, torch.float32, regime) for n in (48, 300)]
        return found

    def providers(self, case: Case, device: torch.device) -> list[Provider]:
        def ours(kernels: PairKernels):
            return lambda case, inputs: _run(kernels, case, inputs)

        missing = native.why_missing(NativePairs.OPS, "CPU") if device.type == "cpu" else "it has no CUDA kernels"
        no_triton = providers.why_not("contrastive_energy", "triton", device)
        return [
            Provider(PLAIN, ours(ReferencePairs()), patience=providers.patience(device)),
            Provider(MATMULS, _matmuls, is_floor=True),
            Provider(f"{OURS} cpu", ours(NativePairs()), unavailable=missing),
            Provider(f"{OURS} triton", ours(TritonPairs()), unavailable=no_triton),
        ]

    def oracle(self, case: Case, t: Inputs) -> tuple[Tensor, ...]:
        wide = {name: value.double() if value.is_floating_point() else value for name, value in t.items()}
        return tuple(result.clone() for result in _call(ReferencePairs(), case, wide))

    def limits(self, case: Case, device: str) -> list[Bar]:
        if device == "cpu" or case.regime != "random" or case.shape["N"] < 32768 or case.shape["D"] < 256:
            return []
        return [Bar("median / the bare matmuls", case.name, providers.time_ratio(OURS, MATMULS), 1.6)]


BY_INDEX = {"N": 4096, "K": 100, "D": 256, "M": 8192}  # M rows to draw from
PER_QUERY = ({"N": 8192, "K": 32, "D": 1024}, {"N": 65536, "K": 8, "D": 512})
KERNELS = {
    "query_negatives": Kernel(
        floor_of_per_query,
        per_query_inputs,
        per_query,
        per_query_results,
        per_query_oracle,
        [
            *grid(*PER_QUERY, dtypes=(torch.bfloat16,)),
            *grid(BY_INDEX),
            {"shape": PER_QUERY[0], "backward": False},
            {"shape": {"N": 8192, "K": 32, "D": 512}, "dtype": torch.float32},
        ],
        cpu=[*grid({"N": 4096, "K": 32, "D": 256}), *grid(BY_INDEX, dtypes=(torch.float32,))],
        smoke={"shape": {"N": 33, "K": 7, "D": 77}},
        plain=per_query_plain,
    ),
    "negative_sampling_fwd": Kernel(
        lambda case: negative_sampling_fwd_floor(
            case.shape["N"], NEGATIVES, case.shape["N"], case.shape["N"], case.shape["V"], case.dtype.itemsize, 8, True
        ),
        sampling_inputs,
        lambda backend, case, t: sampling(word2vec._fill_native, t),
        lambda case: ("loss", "direction"),
        sampling_oracle,
        grid({"N": 1 << 20, "V": 128}, {"N": 1 << 20, "V": 300}),
        plain=lambda case, t: sampling(word2vec._fill_reference, t),
        triton=False,
    ),
    "glove_fwd": Kernel(
        lambda case: glove_fwd_floor(
            case.shape["N"], case.shape["N"], case.shape["N"], case.shape["V"], case.dtype.itemsize, 8, True
        ),
        glove_inputs,
        lambda backend, case, t: glove_pairs(glove._fill_native, t),
        lambda case: ("loss", "slope"),
        glove_oracle,
        grid({"N": 1 << 20, "V": 100}, {"N": 1 << 20, "V": 300}),
        plain=lambda case, t: glove_pairs(glove._fill_reference, t),
        triton=False,
    ),
}
BENCHMARKS = (KernelBenchmark("contrastive", KERNELS), PairKernelBenchmark())
test_contrastive_kernels = smoke_test(BENCHMARKS)
