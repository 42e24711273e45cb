"""Tiles of pair scores, per-query negatives, skip-gram with negative sampling, and GloVe."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.launches.call import BF16, DTYPES, FP16, FP32, FP64, Call, binding, call, when
from sslkernels.contrastive.pair_rows import (
    HINGE,
    SIGMOID,
    SOFTMAX,
    ColumnSums,
    FeatureGradient,
    LossOptions,
    LossOutputs,
    LossRows,
    PositivePairs,
    SideGrad,
)
from sslkernels.contrastive.query_negatives import NegativeInputs, RowMerge, empty_outputs
from sslkernels.contrastive.score_tiles import (
    GradientOutputs,
    Labels,
    Masks,
    RowSums,
    Thresholds,
    Tile,
)
from sslkernels.contrastive.triton import pair_rows
from sslkernels.contrastive.triton.glove import glove_fwd
from sslkernels.contrastive.triton.query_negatives import query_negatives
from sslkernels.contrastive.triton.tile_gradients import add_gradients
from sslkernels.contrastive.triton.tile_positives import positives_in_tile
from sslkernels.contrastive.triton.tile_sums import add_sums
from sslkernels.contrastive.triton.tile_weighted_sums import add_weighted_sums
from sslkernels.contrastive.triton.word2vec import negative_sampling_fwd
from sslkernels.contrastive.words import glove
from sslkernels.contrastive.words.word2vec import Indices, Outputs, Tables
from sslkernels.core.dtypes import accumulation_dtype

ENERGIES = {"softmax": SOFTMAX, "sigmoid": SIGMOID, "hinge": HINGE}
NONE, EVERY, BARE = "", "norm bias self id", "bare"  # parts of a tile
MASKS = "pairs columns"
LARGE, SMALL = (65536, 8192), (2048, 4096)  # SMALL has too few pairs for a fixed shift
RAGGED, SMALL_RAGGED = (65532, 8188), (2044, 4092)


def calls() -> Iterator[Call]:
    yield from sum_calls()
    yield from gradient_calls()
    yield from weighted_calls()
    yield from negative_calls()
    yield from row_calls()
    for dtype in DTYPES:
        yield call(negative_sampling, dtype, torch.int64, (128, 5), gradient=True)
        if dtype == FP16:  # as bfloat16, but for the conversions
            continue
        yield call(negative_sampling, dtype, torch.int32, (1000, 20), gradient=True)
        yield call(negative_sampling, dtype, torch.int64, (100, 5))
    yield binding(negative_sampling, FP16, torch.int64, (1, 1), rows=1)
    yield binding(negative_sampling, FP16, torch.int32, (16, 16), rows=32768, gradient=True)
    for dtype in DTYPES:
        yield call(glove_pairs, dtype, torch.int64, 100, gradient=True)
        yield call(glove_pairs, dtype, torch.int32, 1000, gradient=dtype == FP32)
    yield binding(glove_pairs, FP16, torch.int64, 1, rows=1)
    yield binding(glove_pairs, FP16, torch.int32, 16, rows=32768, gradient=True)


def tile_of(dtype: torch.dtype, dim: int, energy: str, shape: tuple[int, int], parts: str) -> Tile:
    """parts: which of the norms, the bias, the labels of a sample itself, the ids and the masks there are, or BARE: no
    labels. A mask of pairs is contiguous, or "transposed"; "index": the columns of the tile are some of its."""

    def pair(part: str, dtype: torch.dtype) -> list[Tensor | None]:
        return [when(part in parts, torch.empty(n, dtype=dtype)) for n in shape]

    queries, candidates = (torch.empty(n, dim, dtype=dtype) for n in shape)
    positives = [when(parts != BARE, torch.empty(n, dtype=torch.int32)) for n in shape]
    labels = Labels(*positives, *pair("self", torch.int32), *pair("id", torch.int32))
    products, bias = torch.empty(shape, dtype=dtype), when("bias" in parts, torch.empty(1))
    norms = pair("norm", FP32)
    columns, order = shape[1], shape[::-1] if "transposed" in parts else shape
    pairs = when("pairs" in parts, torch.empty(order, dtype=torch.bool))
    masks = Masks(
        pairs.t() if "transposed" in parts else pairs,
        when("index" in parts, torch.empty(columns, dtype=torch.int64)),
        when("columns" in parts, torch.empty(columns, dtype=torch.bool)),
    )
    numbers = (torch.empty(1), bias, ENERGIES[energy])
    return Tile(queries, candidates, products, *norms, *numbers, labels, "id" in parts, masks)


def numbers(count: int) -> Tensor:
    return torch.empty(count, dtype=FP64)


def row_calls() -> Iterator[Call]:
    for dtype, shape, parts in (
        (BF16, (8192, 768), "norm"),
        (BF16, (8192, 768), "bias"),
        (FP16, (8192, 250), "norm index"),
        (FP32, (1024, 128), "norm bias index extra"),
        (FP32, (1000, 3), ""),
        (FP64, (1024, 2000), "norm index extra"),
    ):
        yield call(feature_rows, dtype, shape, parts)
    for dtype, energy, parts in (
        (FP32, "softmax", "gradient"),
        (FP32, "softmax", ""),
        (FP32, "softmax", "gradient smoothing ids index"),
        (FP32, "sigmoid", "gradient"),
        (FP32, "sigmoid", "index"),
        (FP32, "hinge", "gradient index"),
        (FP64, "softmax", "gradient smoothing ids"),
        (FP64, "sigmoid", "gradient"),
        (FP64, "hinge", "gradient"),
    ):
        yield call(loss_rows, dtype, energy, parts)
    for shape in ((1, 1), (16, 16), (1003, 1003)):
        yield binding(feature_rows, FP32, shape, "norm bias index extra")
    for rows in (1, 16):
        yield binding(loss_rows, FP32, "softmax", "gradient smoothing ids index", rows=rows)


def feature_rows(dtype: torch.dtype, shape: tuple[int, int], parts: str) -> None:
    """Norms and scores of the positives, and the finished gradients."""
    rows, dim = shape
    acc = accumulation_dtype(dtype)
    query, key = torch.empty(shape, dtype=dtype), torch.empty(rows + 1, dim, dtype=dtype)
    norm, key_norm = torch.empty(rows, dtype=acc), torch.empty(rows + 1, dtype=acc)
    norms = (norm, key_norm) if "norm" in parts else (None, None)
    index = when("index" in parts, torch.empty(rows, dtype=torch.int64))
    scale, vector = torch.empty(1, dtype=acc), torch.empty(rows, dtype=acc)
    pair_rows.inverse_norm(query, norm)
    pairs = PositivePairs(query, key, *norms, index)
    pair_rows.positive_scores(pairs, scale, when("bias" in parts, scale), vector, vector)
    total = torch.empty(shape, dtype=acc)
    alone = FeatureGradient(total, query, norms[0])
    paired = alone._replace(
        partner=key, partner_norm=norms[1], index=index, score_gradient=vector, extra=when("extra" in parts, total)
    )
    pair_rows.finish_gradient(paired, scale, query if dtype == BF16 else total)
    pair_rows.finish_gradient(alone, scale, total)


def loss_rows(dtype: torch.dtype, energy: str, parts: str, *, rows: int = 8192) -> None:
    def vector(part: str = "", dtype: torch.dtype = dtype) -> Tensor | None:
        return when(part in parts, torch.empty(rows, dtype=dtype))

    softmax = energy == "softmax"
    sums = ColumnSums(
        vector() if softmax else None,
        numbers(rows),
        when(energy == "hinge", numbers(rows)),
        vector("smoothing", FP64),
        vector("ids", FP64),
    )
    side = SideGrad(vector("gradient"), None, vector("ids"), vector("smoothing"))
    counts = (vector("ids", torch.int64), vector("smoothing", torch.int64))
    losses = LossRows(sums, vector(), vector(), vector("index", torch.int64), *counts, side)
    written = (numbers(rows), vector("gradient"), vector("gradient")) if softmax else (None, None, None)
    options = LossOptions(ENERGIES[energy], 0.5, 0.1 if "smoothing" in parts else 0.0, "ids" in parts)
    pair_rows.add_losses(losses, options, LossOutputs(*written, vector(), vector(), numbers(rows), numbers(rows)))


def sum_calls() -> Iterator[Call]:
    for dtype, dim, energy, shape, parts, options in (
        (BF16, 512, "softmax", SMALL, "norm", {"columns": True}),
        (BF16, 512, "softmax", LARGE, "norm", {"columns": True}),
        (BF16, 512, "softmax", SMALL, "norm", {}),
        (BF16, 128, "softmax", LARGE, "norm", {}),
        (BF16, 770, "softmax", SMALL_RAGGED, EVERY, {"columns": True, "statistics": True}),
        (FP16, 64, "softmax", LARGE, EVERY, {"columns": True, "statistics": True}),
        (FP32, 128, "softmax", SMALL, EVERY, {"columns": True, "statistics": True}),
        (FP32, 128, "softmax", LARGE, "norm", {"columns": True}),
        (BF16, 512, "softmax", SMALL, "norm self", {"columns": True}),
        (BF16, 128, "softmax", LARGE, "norm self", {"columns": True}),
        (BF16, 19, "softmax", SMALL_RAGGED, "norm", {"columns": True}),
        (FP16, 768, "softmax", LARGE, "norm", {"columns": True}),
        (BF16, 768, "sigmoid", LARGE, "norm bias", {}),
        (FP16, 768, "sigmoid", LARGE, "norm bias id", {}),
        (BF16, 768, "hinge", LARGE, "norm", {"columns": True}),
        (FP32, 19, "hinge", RAGGED, NONE, {"columns": True}),
        (BF16, 512, "softmax", LARGE, f"norm {MASKS}", {"columns": True}),
        (FP16, 770, "softmax", SMALL_RAGGED, f"{EVERY} {MASKS} transposed", {"columns": True, "statistics": True}),
        (FP32, 128, "hinge", SMALL, "norm pairs index", {"columns": True}),
        (BF16, 128, "sigmoid", LARGE, "norm bias columns", {}),
    ):
        yield call(sums, dtype, dim, energy, shape, parts, **options)
    for dtype, dim, shape, parts in (
        (BF16, 512, LARGE, "norm bias"),
        (FP16, 19, RAGGED, NONE),
        (FP32, 128, SMALL, "norm"),
    ):
        yield call(positives, dtype, dim, "softmax", shape, parts)
    yield binding(sums, FP16, 64, "softmax", (1, 1), BARE, columns=True)
    yield binding(sums, FP16, 64, "softmax", (1, 1), EVERY, columns=True, statistics=True)
    yield binding(sums, BF16, 400, "sigmoid", (2, 1003), BARE)
    yield binding(sums, BF16, 400, "sigmoid", (2, 16), EVERY)


def positives(dtype: torch.dtype, dim: int, energy: str, shape: tuple[int, int], parts: str) -> None:
    """The scores of the positives of a tile."""
    rows, _ = shape
    column = torch.empty(rows, dtype=torch.int64)
    positives_in_tile(tile_of(dtype, dim, energy, shape, parts), column, torch.empty(rows))


def sums(
    dtype: torch.dtype, dim: int, energy: str, shape: tuple[int, int], parts: str, *, columns: bool = False,
    statistics: bool = False,
) -> None:  # fmt: skip
    """The sums of the rows, and of the columns; statistics: everything there is."""

    def fields(count: int) -> tuple[Tensor | None, ...]:
        most, active = when(energy == "softmax", torch.empty(count)), when(energy == "hinge", numbers(count))
        return most, numbers(count), active, *[when(statistics, numbers(count))] * 2

    rows, width = shape
    of_rows = RowSums(
        *fields(rows), when(statistics, numbers(rows)),
        *[when(statistics, torch.empty(rows, dtype=torch.int64))] * 2,
    )  # fmt: skip
    thresholds = Thresholds(*(torch.empty(n) for n in shape), torch.empty(rows))
    cosine_norms = torch.empty(rows), torch.empty(width)
    of_columns = ColumnSums(*fields(width)) if columns else None
    add_sums(tile_of(dtype, dim, energy, shape, parts), of_rows, of_columns, thresholds, cosine_norms)


def gradient_calls() -> Iterator[Call]:
    for dtype, dim, energy, shape, parts, options in (
        # G is written.
        (BF16, 768, "softmax", LARGE, "norm", {"columns": True}),
        (BF16, 512, "softmax", LARGE, "norm", {}),
        (FP16, 770, "softmax", RAGGED, EVERY, {"columns": True, "every": True}),
        (FP32, 128, "softmax", LARGE, EVERY, {"columns": True, "every": True}),
        (BF16, 768, "sigmoid", LARGE, EVERY, {"cost": True}),
        (BF16, 768, "sigmoid", LARGE, "norm bias", {"cost": True}),
        (FP32, 128, "sigmoid", LARGE, "norm bias", {"cost": True}),
        (BF16, 768, "hinge", LARGE, "norm", {"columns": True}),
        (BF16, 512, "softmax", LARGE, "norm self", {"columns": True}),
        (BF16, 275, "softmax", RAGGED, "norm", {"columns": True}),
        # Only sums of G.
        (BF16, 128, "softmax", LARGE, "norm", {"columns": True, "of": "sums"}),
        (BF16, 256, "sigmoid", LARGE, "norm bias", {"cost": True, "of": "sums"}),
        # A program owns rows of a gradient.
        (BF16, 128, "softmax", LARGE, "norm self", {"columns": True, "of": "queries"}),
        (BF16, 256, "softmax", LARGE, "norm self", {"columns": True, "of": "queries"}),
        (BF16, 256, "softmax", LARGE, "norm", {"columns": True, "of": "queries"}),
        (BF16, 256, "softmax", SMALL, "norm", {"columns": True, "of": "queries"}),
        (BF16, 128, "softmax", LARGE[::-1], "norm", {"columns": True, "of": "candidates"}),
        (FP16, 250, "softmax", RAGGED, EVERY, {"columns": True, "every": True, "of": "queries"}),
        (FP16, 64, "softmax", LARGE, EVERY, {"columns": True, "every": True, "of": "queries"}),
        (BF16, 256, "sigmoid", LARGE, EVERY, {"cost": True, "of": "queries"}),
        (FP16, 128, "sigmoid", LARGE, "norm bias", {"cost": True, "of": "queries"}),
        (FP16, 64, "sigmoid", LARGE, EVERY, {"cost": True, "of": "queries"}),
        (BF16, 256, "sigmoid", LARGE[::-1], "norm bias", {"of": "candidates"}),
        (FP16, 128, "hinge", LARGE, "norm", {"columns": True, "of": "queries"}),
        (BF16, 1, "softmax", RAGGED, NONE, {"of": "queries"}),
        # Masks.
        (BF16, 768, "softmax", LARGE, f"norm {MASKS}", {"columns": True}),
        (FP32, 128, "sigmoid", RAGGED, f"{EVERY} {MASKS} transposed", {"cost": True}),
        (BF16, 256, "softmax", LARGE, f"norm {MASKS}", {"columns": True, "of": "queries"}),
        (BF16, 128, "softmax", LARGE[::-1], f"norm {MASKS} transposed", {"columns": True, "of": "candidates"}),
        (FP16, 250, "hinge", RAGGED, "norm pairs index", {"columns": True, "of": "queries candidates"}),
    ):
        yield call(gradients, dtype, dim, energy, shape, parts, **options)
    for dtype, dim in ((FP16, 64), (BF16, 400)):
        yield binding(gradients, dtype, dim, "softmax", (1, 1), BARE, columns=True)
        yield binding(gradients, dtype, dim, "softmax", (2, 16), EVERY, columns=True, every=True)


def gradients(
    dtype: torch.dtype, dim: int, energy: str, shape: tuple[int, int], parts: str, *, columns: bool = False,
    every: bool = False, cost: bool = False, of: str = "queries candidates",
) -> None:  # fmt: skip
    """columns: the energy also has a part of the columns; of: whose gradients are wanted, or only the sums of G."""

    def side(count: int) -> SideGrad:
        return SideGrad(*[torch.empty(count)] * (4 if every else 1 if energy == "sigmoid" else 2))

    rows, width = shape
    row, column = side(rows), side(width) if columns else SideGrad()
    outputs = GradientOutputs(
        numbers(rows), numbers(rows), when("queries" in of, torch.empty(rows, dim)),
        when("candidates" in of, torch.empty(width, dim)), RowSums(None, numbers(rows), *[None] * 6) if cost else None,
    )  # fmt: skip
    add_gradients(tile_of(dtype, dim, energy, shape, parts), row, column, outputs)


def weighted_calls() -> Iterator[Call]:
    for dtype, dim, parts in (
        (BF16, 256, "norm"),
        (BF16, 128, "norm"),
        (FP16, 64, "norm"),
        (BF16, 128, NONE),
        (FP16, 250, EVERY),
        (FP16, 128, EVERY),
        (BF16, 64, EVERY),
        (BF16, 19, "norm"),
        (FP16, 1, "norm"),
        (FP16, 100, EVERY),
        (FP32, 256, "norm"),
        (FP32, 250, EVERY),
        (FP32, 128, "norm"),
        (FP32, 64, "norm"),
        (BF16, 256, f"norm {MASKS}"),
        (FP32, 128, f"{EVERY} {MASKS}"),
    ):
        yield call(weighted_sums, dtype, dim, LARGE if dim % 16 == 0 else RAGGED, parts)
    yield binding(weighted_sums, FP16, 64, (1, 1), BARE)
    yield binding(weighted_sums, FP16, 64, (2, 1003), EVERY)


def weighted_sums(dtype: torch.dtype, dim: int, shape: tuple[int, int], parts: str) -> None:
    tile = tile_of(dtype, dim, "softmax", shape, parts)._replace(ids_positive=False)
    rows = RowSums(torch.empty(shape[0]), numbers(shape[0]), *[None] * 6)
    add_weighted_sums(tile, rows, torch.empty(shape[0], dim), torch.empty(shape[0]))


def negative_calls() -> Iterator[Call]:
    plain = "norm reference gradient"
    every = f"{plain} mask bias smoothing scores"
    for dtype, shape, energy, parts in (
        (BF16, (32, 1024), "softmax", plain),
        (BF16, (16, 1024), "softmax", every),
        (BF16, (256, 768), "softmax", plain),
        (BF16, (16, 1024), "softmax", f"{plain} final"),
        (BF16, (8, 512), "sigmoid", every),
        (BF16, (16, 40000), "softmax", every),
        (FP16, (32, 512), "hinge", every),
        (FP16, (7, 300), "softmax", "reference"),
        (FP32, (32, 256), "softmax", every),
        (FP32, (4, 2048), "softmax", every),
        (FP32, (5, 128), "sigmoid", plain),
        (FP32, (256, 768), "softmax", every),
        (FP64, (8, 100), "softmax", every),
        (FP64, (33, 3000), "sigmoid", every),
        (FP32, (100, 256), "softmax", f"{plain} index"),
        (BF16, (100, 256), "softmax", f"{every} index bank"),
        (FP16, (16, 1000), "sigmoid", "norm gradient index int32"),
        (BF16, (300, 768), "hinge", f"{every} index bank int32"),
        (FP64, (33, 100), "softmax", f"{every} index bank"),
    ):
        yield call(negatives, dtype, shape, energy, parts)
    yield binding(negatives, BF16, (1, 1), "softmax", every)
    yield binding(negatives, BF16, (1, 1), "sigmoid", NONE)


def negatives(dtype: torch.dtype, shape: tuple[int, int], energy: str, parts: str) -> None:
    """parts: which optional inputs and outputs there are."""
    rows, (count, dim), acc = 4099, shape, accumulation_dtype(dtype)

    def of_rows(part: str) -> Tensor | None:
        return when(part in parts, torch.empty(rows, dtype=acc))

    query, candidates = torch.empty(rows, dim, dtype=dtype), torch.empty(rows, count, dim, dtype=dtype)
    index = bank = None
    if "index" in parts:
        index = torch.empty(rows, count, dtype=torch.int32 if "int32" in parts else torch.int64)
        candidates, bank = torch.empty(8191, dim, dtype=dtype), when("bank" in parts, torch.empty(77, dim, dtype=dtype))
    mask, one = when("mask" in parts, torch.empty(rows, count, dtype=torch.bool)), torch.empty(1, dtype=acc)
    inputs = NegativeInputs(query, candidates, index, bank, mask, of_rows("norm"), one, when("bias" in parts, one))
    reference = when("reference" in parts, numbers(query.shape[0]))
    merge = (reference, of_rows("gradient"), of_rows("smoothing"), "final" in parts)
    outputs = empty_outputs(inputs, "gradient" in parts, True, True, "scores" in parts)
    query_negatives(inputs, RowMerge(ENERGIES[energy], *merge), outputs)


def negative_sampling(
    dtype: torch.dtype, ids: torch.dtype, shape: tuple[int, int], rows: int = 30001, gradient: bool = False
) -> None:
    """shape: the columns of the tables, and the negatives of a pair."""
    (dim, count), pairs, acc = shape, 4099, accumulation_dtype(dtype)
    tables = Tables(*[torch.empty(rows, dim, dtype=dtype)] * 2)
    indices = Indices(*(torch.empty(size, dtype=ids) for size in ((pairs,), (pairs,), (pairs, count))))
    shapes = ((pairs, 1 + count), (pairs, dim)) if gradient else ((0,), (0,))
    outputs = Outputs(torch.empty(pairs, dtype=acc), *(torch.empty(size, dtype=acc) for size in shapes))
    negative_sampling_fwd(tables, indices, gradient, outputs)


def glove_pairs(dtype: torch.dtype, ids: torch.dtype, dim: int, rows: int = 30001, gradient: bool = False) -> None:
    """dim: the columns of the tables."""
    count, acc = 4099, accumulation_dtype(dtype)
    tables, biases = [torch.empty(rows, dim, dtype=dtype)] * 2, [torch.empty(rows, dtype=dtype)] * 2
    index, numbers = [torch.empty(count, dtype=ids)] * 2, [torch.empty(count, dtype=acc)] * 2
    outputs = glove.Outputs(torch.empty(count, dtype=acc), torch.empty(count if gradient else 0, dtype=acc))
    glove_fwd(glove.Parameters(*tables, *biases), glove.Pairs(*index, *numbers), outputs)
