"""The gradient of a tile of pair scores, from scores that are computed again.

Where D is small, a program owns rows of a gradient: it loops over the blocks of columns and adds G times their features
in registers. Swapped arguments give the gradient of the other side: the work of five matmuls in all, and no memory but
the results. Where D is large, G is written in the dtype of the features and multiplied by the library's matmuls: three.
A program's sums are partials of its split of the columns, added up in their order.

float16 kernels multiply G by a power of two (`gain`): otherwise the probabilities of many candidates and the inverse
norms of wide features are subnormal. Values that still overflow are clamped to the largest float16.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from sslkernels.contrastive.triton.score_tiles import (
    SIGMOID,
    SOFTMAX,
    block_products,
    block_scores,
    burden_of,
    config,
    costs_of,
    excluded_pairs,
    extra_positives,
    gain_of,
    inside_of,
    is_even,
    load_block,
    load_features,
    masked,
    masked_pairs,
    narrowed,
    operands,
    owns_rows,
    row_scale,
)
from sslkernels.core.triton.launch import capability, on_device_of, processors
from sslkernels.core.triton.numerics import exp_flushed
from sslkernels.core.triton.products import feature_offsets, splits

NOT_SPECIALIZED = ["rows", "columns", "column_tiles"]


@triton.jit
def _side_gradient(s, extra, weight, reference, share, smoothing, ENERGY: tl.constexpr, IDS_POSITIVE: tl.constexpr):
    """`SideGrad` of a block of scores; share and smoothing may be absent."""
    if ENERGY == SOFTMAX:
        gradient = weight * exp_flushed(s - reference)
        if IDS_POSITIVE and share is not None:
            gradient -= tl.where(extra, share, 0.0)
        if smoothing is not None:
            gradient -= smoothing
    elif ENERGY == SIGMOID:
        if IDS_POSITIVE:
            s = tl.where(extra, -s, s)
            weight = tl.where(extra, -weight, weight)
        e = exp_flushed(-tl.abs(s))  # as in `costs_of`
        gradient = weight * (tl.where(s < 0.0, e, 1.0) / (1.0 + e))
    else:
        over = s - reference
        gradient = tl.where(over > 0.0, weight, tl.where(over <= 0.0, 0.0, over))  # NaN for NaN
    return gradient


@triton.jit
def _side(
    s,
    extra,
    weight,
    reference,
    share,
    smoothing,
    start,
    lane,
    inside,
    AXIS: tl.constexpr,
    ENERGY: tl.constexpr,
    IDS_POSITIVE: tl.constexpr,
):
    return _side_gradient(
        s, extra, _vector(weight, start, lane, inside, AXIS), _vector(reference, start, lane, inside, AXIS),
        _vector(share, start, lane, inside, AXIS), _vector(smoothing, start, lane, inside, AXIS), ENERGY, IDS_POSITIVE,
    )  # fmt: skip


@triton.jit
def _vector(pointer, start, lane, inside, AXIS: tl.constexpr):
    if pointer is None:
        return
    else:
        return tl.expand_dims(load_block(pointer, start, lane, inside, 0.0), AXIS)


@triton.jit
def _score_gradient(
    s, excluded, extra, row, row_lane, row_inside, column, lane, column_inside, row_weight, row_reference, row_share,
    row_smoothing, column_weight, column_reference, column_share, column_smoothing, ENERGY: tl.constexpr,
    IDS_POSITIVE: tl.constexpr,
):  # fmt: skip
    gradient = tl.zeros_like(s)
    if row_weight is not None:
        gradient += _side(
            s, extra, row_weight, row_reference, row_share, row_smoothing, row, row_lane, row_inside, 1,
            ENERGY, IDS_POSITIVE,
        )  # fmt: skip
    if column_weight is not None:
        gradient += _side(
            s, extra, column_weight, column_reference, column_share, column_smoothing, column, lane, column_inside, 0,
            ENERGY, IDS_POSITIVE,
        )  # fmt: skip
    return masked(excluded, gradient, 0.0)


@triton.jit
def _store_sums(dot_out, total_out, cost_out, dot, total, cost, row_norm, row, row_lane, rows):
    at = tl.program_id(1).to(tl.int64) * rows + row
    exists = row_lane < rows - row
    if row_norm is not None:
        dot *= row_norm
    tl.store((dot_out + at) + row_lane, dot, exists)
    tl.store((total_out + at) + row_lane, total, exists)
    if cost_out is not None:
        tl.store((cost_out + at) + row_lane, cost, exists)


@triton.jit(do_not_specialize=["rows", "column_tiles"])  # specialised: columns divisible by 16 allow wide stores of G
def pair_gradient_tile_kernel(
    queries, candidates, row_norm, column_norm, row_positive, column_positive, row_self, column_self, row_id,
    column_id, pair_mask, row_step, column_step, row_index, column_index, row_mask, column_mask,
    logit_scale, logit_bias, row_weight, row_reference, row_share, row_smoothing, column_weight,
    column_reference, column_share, column_smoothing, gain, gradient_out, dot_out, total_out, cost_out, rows, columns,
    column_tiles, DIM: tl.constexpr, ENERGY: tl.constexpr, IDS_POSITIVE: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """G (rows, columns), unless gradient_out is None, and per split of the columns the sums of each row."""
    row = tl.program_id(0) * BLOCK_M
    row_lane = tl.arange(0, BLOCK_M)
    lane = tl.arange(0, BLOCK_N)
    row_inside = inside_of(row_lane, row, rows, EVEN)
    norm = load_block(row_norm, row, row_lane, row_inside, 0.0)
    scale = row_scale(logit_scale, norm)
    positive_of_row = load_block(row_positive, row, row_lane, row_inside, 0)
    self_of_row = load_block(row_self, row, row_lane, row_inside, 0)
    id_of_row = load_block(row_id, row, row_lane, row_inside, 0)
    query_offsets = feature_offsets(row_lane, row_inside, DIM)
    dot = tl.zeros((BLOCK_M,), tl.float64)
    total = tl.zeros((BLOCK_M,), tl.float64)
    cost = tl.zeros((BLOCK_M,), tl.float64)
    first = tl.program_id(1) * column_tiles
    for column_tile in range(first, tl.minimum(first + column_tiles, tl.cdiv(columns, BLOCK_N))):
        column = column_tile * BLOCK_N
        column_inside = inside_of(lane, column, columns, EVEN)
        products = block_products(
            queries + row.to(tl.int64) * DIM, candidates + column.to(tl.int64) * DIM, query_offsets,
            feature_offsets(lane, column_inside, DIM), DIM, BLOCK_D,
        )  # fmt: skip
        u = products
        if column_norm is not None:
            u = products * load_block(column_norm, column, lane, column_inside, 0.0)[None, :]
        id_of_column = load_block(column_id, column, lane, column_inside, 0)
        excluded = excluded_pairs(
            row_inside, column_inside, positive_of_row, load_block(column_positive, column, lane, column_inside, 0),
            self_of_row, load_block(column_self, column, lane, column_inside, 0), id_of_row, id_of_column, IDS_POSITIVE,
        )  # fmt: skip
        excluded = masked_pairs(
            excluded, pair_mask, row_step, column_step, row_index, column_index, row_mask, column_mask, row,
            row_lane, row_inside, column, lane, column_inside,
        )  # fmt: skip
        extra = extra_positives(excluded, id_of_row, id_of_column, IDS_POSITIVE)
        s = block_scores(u, scale, logit_bias, None)
        gradient = _score_gradient(
            s, excluded, extra, row, row_lane, row_inside, column, lane, column_inside, row_weight, row_reference,
            row_share, row_smoothing, column_weight, column_reference, column_share, column_smoothing, ENERGY,
            IDS_POSITIVE,
        )  # fmt: skip
        dot += tl.sum(masked(excluded, gradient * u, 0.0), 1).to(tl.float64)
        total += tl.sum(gradient, 1).to(tl.float64)
        if cost_out is not None:
            costs = costs_of(s, extra, None, ENERGY, IDS_POSITIVE)
            cost += tl.sum(masked(excluded, costs, 0.0), 1).to(tl.float64)
        if gradient_out is not None:
            if column_norm is not None:
                # Loaded again, to free its registers in between.
                gradient *= load_block(column_norm, column, lane, column_inside, 0.0)[None, :]
                gradient *= norm[:, None]
            at = gradient_out + (row.to(tl.int64) * columns + column)
            at += row_lane.to(tl.int64)[:, None] * columns + lane[None, :]
            value = narrowed(gradient, gain, gradient_out.dtype.element_ty)
            if EVEN:
                tl.store(at, value)
            else:
                tl.store(at, value, row_inside[:, None] & column_inside[None, :])
    _store_sums(dot_out, total_out, cost_out, dot, total, cost, norm, row, row_lane, rows)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def pair_gradient_owner_kernel(
    queries, candidates, row_norm, column_norm, row_positive, column_positive, row_self, column_self, row_id,
    column_id, pair_mask, row_step, column_step, row_index, column_index, row_mask, column_mask,
    logit_scale, logit_bias, row_weight, row_reference, row_share, row_smoothing, column_weight,
    column_reference, column_share, column_smoothing, gain, features_out, dot_out, total_out, cost_out, rows, columns,
    column_tiles, DIM: tl.constexpr, ENERGY: tl.constexpr, IDS_POSITIVE: tl.constexpr, EVEN: tl.constexpr,
    ADD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rows of G @ candidates: added to features_out (rows, D) if ADD, else written per split of the columns."""
    row = tl.program_id(0) * BLOCK_M
    row_lane = tl.arange(0, BLOCK_M)
    lane = tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_D)
    row_inside = inside_of(row_lane, row, rows, EVEN)
    norm = load_block(row_norm, row, row_lane, row_inside, 0.0)
    scale = row_scale(logit_scale, norm)
    positive_of_row = load_block(row_positive, row, row_lane, row_inside, 0)
    self_of_row = load_block(row_self, row, row_lane, row_inside, 0)
    id_of_row = load_block(row_id, row, row_lane, row_inside, 0)
    query = load_features(queries, row, row_lane, row_inside, depth, DIM, BLOCK_D)
    features = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    dot = tl.zeros((BLOCK_M,), tl.float64)
    total = tl.zeros((BLOCK_M,), tl.float64)
    cost = tl.zeros((BLOCK_M,), tl.float64)
    first = tl.program_id(1) * column_tiles
    for column_tile in range(first, tl.minimum(first + column_tiles, tl.cdiv(columns, BLOCK_N))):
        column = column_tile * BLOCK_N
        column_inside = inside_of(lane, column, columns, EVEN)
        values = load_features(candidates, column, lane, column_inside, depth, DIM, BLOCK_D)
        products = tl.dot(query, tl.trans(values), input_precision="ieee")
        u = products
        if column_norm is not None:
            u = products * load_block(column_norm, column, lane, column_inside, 0.0)[None, :]
        id_of_column = load_block(column_id, column, lane, column_inside, 0)
        excluded = excluded_pairs(
            row_inside, column_inside, positive_of_row, load_block(column_positive, column, lane, column_inside, 0),
            self_of_row, load_block(column_self, column, lane, column_inside, 0), id_of_row, id_of_column, IDS_POSITIVE,
        )  # fmt: skip
        excluded = masked_pairs(
            excluded, pair_mask, row_step, column_step, row_index, column_index, row_mask, column_mask, row,
            row_lane, row_inside, column, lane, column_inside,
        )  # fmt: skip
        extra = extra_positives(excluded, id_of_row, id_of_column, IDS_POSITIVE)
        s = block_scores(u, scale, logit_bias, None)
        gradient = _score_gradient(
            s, excluded, extra, row, row_lane, row_inside, column, lane, column_inside, row_weight, row_reference,
            row_share, row_smoothing, column_weight, column_reference, column_share, column_smoothing, ENERGY,
            IDS_POSITIVE,
        )  # fmt: skip
        if dot_out is not None:
            dot += tl.sum(masked(excluded, gradient * u, 0.0), 1).to(tl.float64)
            total += tl.sum(gradient, 1).to(tl.float64)
        if cost_out is not None:
            costs = costs_of(s, extra, None, ENERGY, IDS_POSITIVE)
            cost += tl.sum(masked(excluded, costs, 0.0), 1).to(tl.float64)
        if column_norm is not None:
            # Loaded again, to free its registers in between.
            gradient *= load_block(column_norm, column, lane, column_inside, 0.0)[None, :]
        features = tl.dot(narrowed(gradient, gain, values.dtype), values, features, input_precision="ieee")
    if row_norm is not None:
        features *= norm[:, None]
    if gain is not None:
        features /= tl.load(gain)
    at = features_out + (tl.program_id(1).to(tl.int64) * rows + row) * DIM
    at += row_lane[:, None] * DIM + depth[None, :]
    inside = (row_lane[:, None] < rows - row) & (depth[None, :] < DIM)
    if ADD:
        features += tl.load(at, inside, other=0.0)
    tl.store(at, features, inside)
    if dot_out is not None:
        _store_sums(dot_out, total_out, cost_out, dot, total, cost, norm, row, row_lane, rows)


def row_block(count: int, columns: int, features: Tensor, workspace: int) -> tuple[int, bool]:
    """(rows of a row block that gets gradients, whether G is written). A row block has as many rows as fit, rounded
    down to whole waves of the first matmul's tiles of 128 x 256 where one wave fits."""
    dim = features.shape[1]
    if owns_rows(dim, features.dtype):
        return max(count, 1), False
    fit = max(workspace // max(columns * features.element_size(), 1), 16)
    wave = processors(features) * 128 // triton.cdiv(max(dim, 1), 256)
    whole = fit // wave * wave if fit >= wave else fit
    return max(min(whole // 16 * 16, count), 1), True


def add_gradients(tile: Any, row: Any, column: Any, outputs: Any) -> tuple[Tensor | None, bool]:
    """Adds to the sums of `outputs`, the record `GradientOutputs`, and where D is small to its gradients. Where D is
    large, leaves G times a gain in tile.products. Returns (gain (0-d), None for 1; whether G was written)."""
    features = tile.queries
    wanted = outputs.queries is not None or outputs.candidates is not None
    cost = None if outputs.row_sums is None else outputs.row_sums.sum
    running = _Running(outputs.dot, outputs.total, cost)
    with on_device_of(features):
        if not owns_rows(features.shape[1], features.dtype):
            gain = gain_of(tile, True) if wanted else None
            _gradient_tile(tile, row, column, running, gain, tile.products if wanted else None)
            return gain, wanted
        if outputs.queries is not None:
            _gradient_owner(tile, False, row, column, outputs.queries, running)
        else:
            _gradient_tile(tile, row, column, running, None, None)
        if outputs.candidates is not None:
            _gradient_owner(tile, True, column, row, outputs.candidates, _Running(None, None, None))
    return None, False


class _Running(NamedTuple):
    """Running sums of each row, None where not wanted: of gradient * u, of the gradient, and of `costs_of`."""

    dot: Tensor | None
    total: Tensor | None
    cost: Tensor | None

    def partials(self, parts: int) -> "_Running":
        return _Running(*(None if v is None else v.new_empty(parts, *v.shape) for v in self))

    def add(self, partials: "_Running") -> None:
        for total, part in zip(self, partials, strict=True):
            if total is not None:
                total.add_(part.sum(0))


def _flags(tile: Any) -> dict[str, Any]:
    extra = tile.ids_positive and tile.labels.row_id is not None
    return {"DIM": tile.queries.shape[1], "ENERGY": tile.energy, "IDS_POSITIVE": extra}


def _burden(tile: Any, row: Any, column: Any, cost: Tensor | None) -> int:
    burden = burden_of(tile, row.share, row.smoothing, column.share, column.smoothing)
    return max(2 * burden, 1) if cost is not None else burden


def _gradient_tile(
    tile: Any, row: Any, column: Any, running: _Running, gain: Tensor | None, products: Tensor | None
) -> None:
    tensors = operands(tile)
    queries, candidates, *_ = tensors
    (rows, dim), columns = queries.shape, candidates.shape[0]
    if rows == 0 or columns == 0:
        return
    burden = _burden(tile, row, column, running.cost)
    chosen = config("tile", tile.energy, rows, columns, dim, queries.dtype, capability(queries), burden)
    parts, column_tiles = splits(rows, columns, chosen, processors(queries))
    sums = running.partials(parts)
    pair_gradient_tile_kernel[(triton.cdiv(rows, chosen.constexprs["BLOCK_M"]), parts)](
        *(*tensors, *row, *column, gain, products, *sums, rows, columns, column_tiles),
        **_flags(tile),
        EVEN=is_even(rows, columns, chosen),
        **chosen.constexprs,
        **chosen.options,
    )
    running.add(sums)


def _gradient_owner(tile: Any, transposed: bool, row: Any, column: Any, grad: Tensor, running: _Running) -> None:
    """grad += G @ candidates, or G.T @ queries if transposed; row and column: the sides of the rows of grad and of the
    others."""
    tensors = operands(tile, transposed)
    queries, candidates, *_ = tensors
    (rows, dim), columns = queries.shape, candidates.shape[0]
    if rows == 0 or columns == 0:
        return
    burden = _burden(tile, row, column, running.cost)
    chosen = config("owner", tile.energy, rows, columns, dim, queries.dtype, capability(queries), burden)
    parts, column_tiles = splits(rows, columns, chosen, processors(queries))
    features = grad if parts == 1 else grad.new_empty(parts, rows, dim)
    sums = running.partials(parts)
    pair_gradient_owner_kernel[(triton.cdiv(rows, chosen.constexprs["BLOCK_M"]), parts)](
        *(*tensors, *row, *column, gain_of(tile, False, transposed), features, *sums, rows, columns, column_tiles),
        **_flags(tile),
        EVEN=is_even(rows, columns, chosen),
        ADD=parts == 1,
        **chosen.constexprs,
        **chosen.options,
    )
    if parts > 1:
        grad.add_(features.sum(0))
    running.add(sums)
