"""The best code of each row, exact in float64, from products in the precision of the matrix units.

The codebook is divided into splits. A program of the first kernel takes a block of rows and a split, and multiplies
tile by tile. With s the computed score of a code and e a bound of its error over the tile, it keeps for each row the
largest s + e with its code, the second largest s + e, and the largest s - e. If only one code of all splits has s + e
at least as large as the largest s - e, the second kernel takes it. Otherwise it rescores in float64, from the input as
given, the codes of the splits that may hold the best. For standard normal data with D = 64 and 8192 codes, these are
0.3 % of the rows in half precision, and 1 % in float32.

s = gain <x, c> - half_square, with half_square = |c|^2 / 2 for the squared distance and gain = 1 / |c| for the cosine.
e = product |x| factor + constant, where `factor` is |c|, or 1 for the cosine. Matrix units multiply half precision
exactly, but truncate sums to 24 bits or a few more, aligned to the largest term: each of the D terms and each sum of 16
loses at most 2^-23 of |x| |c|; `MATRIX_ROUNDING` is four times that. A float32 number is cut into two of TF32, of which
three products are summed: beside the roundings of three times as many terms, the fourth product and what the second
numbers leave out are each at most 2^-20 of |x| |c|. Products that may overflow have an infinite e.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sslkernels.core.triton.launch import Config, capability, next_power_of_2, on_device_of, processors
from sslkernels.core.triton.products import feature_offsets, splits, tile_products

# Metrics that the kernels compare with; the third is the dot product.
L2, COSINE = tl.constexpr(0), tl.constexpr(1)
NOT_SPECIALIZED = ["rows", "codes", "tiles_per_split", "splits", "count"]

FLOAT_ROUNDING = 2.0**-24
MATRIX_ROUNDING = 2.0**-21
TINY = 2.0**-126
# From LARGEST_NORM on products may overflow; below SMALLEST_NORM the inverse of a code's norm amplifies underflow.
LARGEST_NORM = tl.constexpr(2.0**60)
SMALLEST_NORM = tl.constexpr(2.0**-100)
# Added to the norms, because products may flush subnormal numbers to zero.
NORM_FLOOR = tl.constexpr(2.0**-100)
NONE = tl.constexpr(2147483647)
EXACT_ELEMENTS = 2048  # float64 elements that a program of the second kernel holds
NORM_ROWS = 16


@triton.jit
def _rounded_up(norm):
    return (norm * (1.0 + 1.0 / 1048576.0)).to(tl.float32) + NORM_FLOOR


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def code_norms_kernel(
    vectors, norm_out, constant_out, number_out, count, dim, square, underflow,
    METRIC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Norms |x| of rows (constant_out is None), or factor, constant, and half_square or gain of codes."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    valid = row < count
    sums = tl.zeros((BLOCK_R,), tl.float64)
    for start in range(0, dim, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        inside = valid[:, None] & (column < dim)[None, :]
        x = tl.load(vectors + row[:, None] * dim + column[None, :], inside, other=0.0).to(tl.float64)
        sums += tl.sum(x * x, 1)
    norm = tl.sqrt(sums)
    infinity = float("inf")
    factor = tl.where(norm < LARGEST_NORM, _rounded_up(norm), infinity)  # infinite for NaN
    if constant_out is None:
        tl.store(norm_out + row, factor, valid)
    else:
        constant = tl.where(norm < LARGEST_NORM, underflow, infinity)
        if METRIC == L2:
            constant += square * factor * factor
            tl.store(number_out + row, (0.5 * sums).to(tl.float32), valid)
        if METRIC == COSINE:
            usual = (norm > SMALLEST_NORM) & (norm < LARGEST_NORM)
            gain = tl.where(usual, (1.0 / tl.where(usual, norm, 1.0)).to(tl.float32), 1.0)
            constant = tl.where(usual | (norm == 0.0), constant * gain, infinity)
            factor = tl.full((BLOCK_R,), 1.0, tl.float32)
            tl.store(number_out + row, gain, valid)
        tl.store(norm_out + row, factor, valid)
        tl.store(constant_out + row, constant, valid)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def best_codes_kernel(
    input, codebook, norm, factor, constant, number, best_out, second_out, bound_out, index_out,
    rows, codes, tiles_per_split, product,
    DIM: tl.constexpr, METRIC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The best, the second best and the bound of a block of rows over one split."""
    row = tl.program_id(0) * BLOCK_M
    row_lane, lane = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    row_inside = row_lane < rows - row
    depth = tl.arange(0, BLOCK_D)
    input_at = (input + row.to(tl.int64) * DIM) + feature_offsets(row_lane, row_inside, DIM)[:, None] + depth[None, :]
    row_error = product * tl.load(norm + row + row_lane, row_inside, other=0.0)
    best = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    second = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    bound = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    index = tl.full((BLOCK_M,), 0, tl.int32)
    first = tl.program_id(1) * tiles_per_split
    last = tl.minimum(first + tiles_per_split, tl.cdiv(codes, BLOCK_N))
    for tile in range(first, last):
        code = tile * BLOCK_N
        inside = lane < codes - code
        code_offsets = feature_offsets(lane, inside, DIM)
        codes_at = (codebook + code.to(tl.int64) * DIM) + code_offsets[None, :] + depth[:, None]
        s = tile_products(input_at, codes_at, depth, DIM, BLOCK_D, PRECISION)
        if METRIC == L2:
            s -= tl.load(number + code + lane, inside, other=0.0)[None, :]
        if METRIC == COSINE:
            s *= tl.load(number + code + lane, inside, other=0.0)[None, :]
        s = tl.where(inside[None, :], s, float("-inf"))
        largest_factor = tl.max(tl.load(factor + code + lane, inside, other=0.0), 0)
        largest_constant = tl.max(tl.load(constant + code + lane, inside, other=0.0), 0)
        error = row_error * largest_factor + largest_constant

        tile_best = tl.max(s, 1)
        tile_index = tl.min(tl.where(s == tile_best[:, None], lane[None, :], BLOCK_N), 1)
        tile_second = tl.max(tl.where(lane[None, :] == tile_index[:, None], float("-inf"), s), 1)
        known = error < float("inf")
        bound = tl.maximum(bound, tl.where(known, tile_best - error, float("-inf")))
        tile_best = tl.where(known, tile_best + error, float("inf"))
        tile_second = tl.where(known, tile_second + error, float("inf"))
        better = tile_best > best
        second = tl.maximum(second, tl.where(better, tl.maximum(best, tile_second), tile_best))
        index = tl.where(better, code + tile_index, index)
        best = tl.where(better, tile_best, best)
    at = tl.program_id(1).to(tl.int64) * rows + row + row_lane
    tl.store(best_out + at, best, row_inside)
    tl.store(second_out + at, second, row_inside)
    tl.store(bound_out + at, bound, row_inside)
    tl.store(index_out + at, index, row_inside)


@triton.jit
def _exact_scores(x, codebook, code, inside, dim, METRIC: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """float64 scores of the row at x with the codes `code`."""
    total = tl.zeros((BLOCK_N,), tl.float64)
    squares = tl.zeros((BLOCK_N,), tl.float64)
    for start in range(0, dim, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        a = tl.load(x + column, column < dim, other=0.0).to(tl.float64)[None, :]
        valid = inside[:, None] & (column < dim)[None, :]
        c = tl.load(codebook + code[:, None] * dim + column[None, :], valid, other=0.0).to(tl.float64)
        if METRIC == L2:
            total -= tl.sum((a - c) * (a - c), 1)
        else:
            total += tl.sum(a * c, 1)
        if METRIC == COSINE:
            squares += tl.sum(c * c, 1)
    if METRIC == COSINE:
        total /= tl.where(squares == 0.0, 1.0, tl.sqrt(squares))
    return total


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def resolve_codes_kernel(
    input, codebook, best_in, second_in, bound_in, index_in, index_out, score_out,
    rows, codes, dim, splits, tiles_per_split, TILE: tl.constexpr,
    METRIC: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Reduces one row over the splits, and rescores it in float64 if more than one code may be the best."""
    row = tl.program_id(0).to(tl.int64)
    bound = tl.load(bound_in + row)
    best = tl.load(best_in + row)
    index = tl.load(index_in + row)
    second = tl.load(second_in + row)
    for split in range(1, splits):
        at = split * rows.to(tl.int64) + row
        bound = tl.maximum(bound, tl.load(bound_in + at))
        split_best = tl.load(best_in + at)
        second = tl.maximum(second, tl.maximum(tl.load(second_in + at), tl.minimum(best, split_best)))
        index = tl.where(split_best > best, tl.load(index_in + at), index)
        best = tl.maximum(best, split_best)
    if second < bound:
        tl.store(index_out + row, index.to(tl.int64))
        tl.store(score_out + row, 0.0)
        return

    score = tl.full((), float("-inf"), tl.float64)
    index = tl.full((), 2147483647, tl.int32)
    first_nan = tl.full((), 2147483647, tl.int32)  # the first code with a NaN score
    per_split = tiles_per_split * TILE
    for split in range(0, splits):
        if tl.load(best_in + split * rows.to(tl.int64) + row) >= bound:
            last = tl.minimum((split + 1) * per_split, codes)
            for start in range(split * per_split, last, BLOCK_N):
                code = start + tl.arange(0, BLOCK_N)
                inside = code < last
                scores = _exact_scores(
                    input + row * dim, codebook, code.to(tl.int64), inside, dim, METRIC, BLOCK_N, BLOCK_D
                )
                is_nan = inside & (scores != scores)
                first_nan = tl.minimum(first_nan, tl.min(tl.where(is_nan, code, NONE), 0))
                scores = tl.where(inside & (scores == scores), scores, float("-inf"))
                tile_score = tl.max(scores, 0)
                tile_index = tl.min(tl.where(inside & (scores == tile_score), code, NONE), 0)
                better = (tile_score > score) | ((tile_score == score) & (tile_index < index))
                index = tl.where(better, tile_index, index)
                score = tl.where(better, tile_score, score)
    tl.store(index_out + row, tl.where(first_nan < NONE, first_nan, index).to(tl.int64))
    tl.store(score_out + row, tl.where(first_nan < NONE, float("nan"), score))


def config(rows: int, codes: int, dim: int, dtype: torch.dtype, capability: tuple[int, int]) -> Config:
    """Tiles of the products, small enough that scores and their comparisons stay in registers."""
    block_m, block_n = (min(max(16, next_power_of_2(n)), 128) for n in (rows, codes))
    depth = max(16, next_power_of_2(dim))
    if dtype == torch.float32:
        tiles = {"BLOCK_M": min(block_m, 64), "BLOCK_N": min(block_n, 64), "BLOCK_D": min(depth, 32)}
        tiles["PRECISION"] = "tf32x3"
        return Config(tiles, {"num_warps": 8, "num_stages": 3})
    tiles = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_D": min(depth, 64 if capability >= (9, 0) else 32)}
    tiles["PRECISION"] = "ieee"
    return Config(tiles, {"num_warps": 8, "num_stages": 3})


def exact_config(dim: int, dtype: torch.dtype) -> Config:
    depth = min(128, next_power_of_2(dim))
    # As many of float32 spill registers on sm_100.
    elements = EXACT_ELEMENTS // 2 if dtype == torch.float32 else EXACT_ELEMENTS
    return Config({"BLOCK_N": elements // depth, "BLOCK_D": depth}, {"num_warps": 4})


def norm_config(dim: int) -> Config:
    return Config({"BLOCK_R": NORM_ROWS, "BLOCK_D": min(256, next_power_of_2(dim))}, {"num_warps": 4})


def product_error(dim: int, dtype: torch.dtype) -> float:
    """The error of a product relative to the norms of its factors."""
    relative = (3 * dim + 32 if dtype == torch.float32 else dim + 8) * MATRIX_ROUNDING
    return 1.02 * relative / (1 - relative) if relative < 0.25 else float("inf")


def best_codes(input: Tensor, codebook: Tensor, metric: int, indices: Tensor, score: Tensor) -> None:
    """Fills indices (N,), int64, and score (N,), float64, a NaN flag. Workspace: 16 bytes per row and split of the
    codebook, 4 per row and 12 per code; one copy if the dtypes differ."""
    (rows, dim), codes = input.shape, codebook.shape[0]
    if rows == 0:
        return
    dtype = torch.promote_types(input.dtype, codebook.dtype)
    input, codebook = input.to(dtype), codebook.to(dtype)
    chosen = config(rows, codes, dim, dtype, capability(input))
    count, tiles = splits(rows, codes, chosen, processors(input))

    def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return input.new_empty(shape, dtype=dtype)

    norm, factor, constant, number = numbers(rows), numbers(codes), numbers(codes), numbers(codes)
    partials = [numbers(count, rows) for _ in range(3)] + [numbers(count, rows, dtype=torch.int32)]
    exact, norms = exact_config(dim, dtype), norm_config(dim)
    errors = (4 * FLOAT_ROUNDING, 4 * (dim + 8) * TINY)
    with on_device_of(input):
        for vectors, outs in ((input, (norm, None, None)), (codebook, (factor, constant, number))):
            grid = (triton.cdiv(vectors.shape[0], NORM_ROWS),)
            code_norms_kernel[grid](
                vectors, *outs, vectors.shape[0], dim, *errors, METRIC=metric, **norms.constexprs, **norms.options
            )
        best_codes_kernel[(triton.cdiv(rows, chosen.constexprs["BLOCK_M"]), count)](
            input, codebook, norm, factor, constant, number, *partials, rows, codes, tiles, product_error(dim, dtype),
            DIM=dim, METRIC=metric, **chosen.constexprs, **chosen.options,
        )  # fmt: skip
        resolve_codes_kernel[(rows,)](
            input, codebook, *partials, indices, score, rows, codes, dim, count, tiles,
            TILE=chosen.constexprs["BLOCK_N"], METRIC=metric, **exact.constexprs, **exact.options,
        )  # fmt: skip
