"""Linear cross-entropy without gradients: logits are computed tile by tile, reduced at once, and never materialised.

The vocabulary is cut into splits. A program of the first kernel takes a block of rows and a split, multiplies tile by
tile and keeps per row the maximum, the sums relative to it without the target, and the best column; the second kernel
combines these partial results in the order of the splits. The program whose split contains the target of a row stores
its logit.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sslkernels.core.triton.launch import Config, capability, next_power_of_2, on_device_of, processors
from sslkernels.core.triton.numerics import shifted_moment
from sslkernels.core.triton.products import splits, tile_products
from sslkernels.vocabulary.triton.softmax_row_kernels import log_probability, ranked, transformed
from sslkernels.vocabulary.triton.softmax_rows import scalars

NOT_SPECIALIZED = ["count", "vocab", "tiles_per_split", "splits", "ignore_index"]
REDUCE_ROWS = 128


@triton.jit
def _rows_of_block(target, row_index, count, ignore_index, BLOCK_M: tl.constexpr):
    """Rows of the block, mask of rows in range, their row in the input (0 if unused), targets, mask of used rows."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = rows < count
    source = tl.load(row_index + rows, valid, other=-1).to(tl.int64)
    present = valid & (source >= 0)
    label = tl.load(target + source, present, other=0).to(tl.int64)
    used = present & (label != ignore_index)
    return rows, valid, tl.where(used, source, 0), label, used


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def linear_cross_entropy_stream_kernel(
    input, linear_weight, target, row_index, bias, weight,
    row_max_out, others_out, moment_out, best_out, best_col_out, smooth_out, weights_out, target_z_out,
    count, vocab, tiles_per_split, input_stride, weight_stride, ignore_index,
    label_smoothing: tl.float32, z_loss: tl.float32, softcap: tl.float32, logit_scale: tl.float32,
    DIM: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    SMOOTHING: tl.constexpr, STATS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    rows, valid, source, label, used = _rows_of_block(target, row_index, count, ignore_index, BLOCK_M)
    if tl.max(used.to(tl.int32), 0) == 0:
        return

    split = tl.program_id(1)
    y = tl.where((label >= 0) & (label < vocab), label, 0).to(tl.int32)
    depth = tl.arange(0, BLOCK_D)
    input_at = input + source[:, None] * input_stride + depth[None, :]
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    others = tl.zeros((BLOCK_M,), tl.float32)
    moment = tl.zeros((BLOCK_M,), tl.float32)
    best = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    best_col = tl.full((BLOCK_M,), -1, tl.int32)
    smooth = tl.zeros((BLOCK_M,), tl.float32)
    weights = tl.full((), 0.0, tl.float32)
    target_z = tl.zeros((BLOCK_M,), tl.float32)
    first = split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, tl.cdiv(vocab, BLOCK_N))
    for tile in range(first, last):
        cols = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = cols < vocab
        weight_row = tl.where(inside, cols, 0).to(tl.int64)
        weight_at = linear_weight + weight_row[None, :] * weight_stride + depth[:, None]
        dots = tile_products(input_at, weight_at, depth, DIM, BLOCK_D, "ieee")

        z = transformed(dots, bias, cols[None, :], inside[None, :], logit_scale, softcap, HAS_BIAS, HAS_SOFTCAP)
        at_target = cols[None, :] == y[:, None]
        target_z += tl.sum(tl.where(at_target, z, 0.0), 1)
        if STATS:
            # A NaN ranks as the largest, like in torch.argmax; ties go to the lowest index.
            rank = tl.where(inside[None, :], ranked(z), float("-inf"))
            tile_best = tl.max(rank, 1)
            equal = inside[None, :] & (rank == tile_best[:, None])
            tile_col = tl.min(tl.where(equal, cols[None, :], 2147483647), 1)
            better = (tile_best > best) | (best_col < 0)
            best = tl.where(better, tile_best, best)
            best_col = tl.where(better, tile_col, best_col)

        new_max = tl.maximum(row_max, tl.max(z, 1))
        anchor = tl.where(new_max == float("-inf"), 0.0, new_max)
        shift = tl.where(row_max == float("-inf"), 0.0, row_max - anchor)
        decay = tl.exp(row_max - anchor)
        shifted = z - anchor[:, None]
        e = tl.where(at_target, 0.0, tl.exp(shifted))
        if STATS:
            moment = shifted_moment(moment, others, shift, decay)
            moment += tl.sum(tl.where(e > 0.0, e * shifted, 0.0), 1)
        if SMOOTHING:
            w = inside.to(tl.float32)
            if HAS_WEIGHT:
                w = tl.load(weight + cols, inside, other=0.0).to(tl.float32)
            smooth += weights * shift + tl.sum(tl.where(w[None, :] > 0.0, w[None, :] * shifted, 0.0), 1)
            weights += tl.sum(w, 0)
        others = others * decay + tl.sum(e, 1)
        row_max = new_max

    at = split.to(tl.int64) * count + rows
    tl.store(row_max_out + at, row_max, valid)
    tl.store(others_out + at, others, valid)
    if STATS:
        tl.store(moment_out + at, moment, valid)
        tl.store(best_out + at, best, valid)
        tl.store(best_col_out + at, best_col, valid)
    if SMOOTHING:
        tl.store(smooth_out + at, smooth, valid)
        tl.store(weights_out + at, tl.zeros((BLOCK_M,), tl.float32) + weights, valid)
    target_in_split = (y >= first * BLOCK_N) & (y < last * BLOCK_N)
    tl.store(target_z_out + rows, target_z, valid & target_in_split)


@triton.jit
def _relative(values, largest):
    """values - largest, and 0 for a value of -inf: a split without a finite logit."""
    return tl.where(values == float("-inf"), 0.0, values - largest)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def linear_cross_entropy_reduce_kernel(
    target, row_index, weight, weight_sum,
    row_max_in, others_in, moment_in, best_in, best_col_in, smooth_in, weights_in, target_z_in,
    loss, row_max_out, sum_exp_out, logprob_out, prediction, entropy,
    count, vocab, splits, ignore_index,
    label_smoothing: tl.float32, z_loss: tl.float32, softcap: tl.float32, logit_scale: tl.float32,
    HAS_WEIGHT: tl.constexpr, SMOOTHING: tl.constexpr, STATS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    rows, valid, _, label, used = _rows_of_block(target, row_index, count, ignore_index, BLOCK_M)
    wrong = used & ((label < 0) | (label >= vocab))
    y = tl.where(used & (label >= 0) & (label < vocab), label, 0)
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    best = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    best_col = tl.full((BLOCK_M,), -1, tl.int32)
    for split in range(0, splits):
        at = split * count.to(tl.int64) + rows
        row_max = tl.maximum(row_max, tl.load(row_max_in + at, used, other=0.0))
        if STATS:
            split_best = tl.load(best_in + at, used, other=0.0)
            split_col = tl.load(best_col_in + at, used, other=0)
            better = (split_best > best) | (best_col < 0)
            best = tl.where(better, split_best, best)
            best_col = tl.where(better, split_col, best_col)

    others = tl.zeros((BLOCK_M,), tl.float32)
    moment = tl.zeros((BLOCK_M,), tl.float32)
    smooth = tl.zeros((BLOCK_M,), tl.float32)
    for split in range(0, splits):
        at = split * count.to(tl.int64) + rows
        split_max = tl.load(row_max_in + at, used, other=0.0)
        split_others = tl.load(others_in + at, used, other=0.0)
        shift = _relative(split_max, row_max)
        decay = tl.exp(split_max - tl.where(row_max == float("-inf"), 0.0, row_max))
        others += split_others * decay
        if STATS:
            moment += shifted_moment(tl.load(moment_in + at, used, other=0.0), split_others, shift, decay)
        if SMOOTHING:
            split_weights = tl.load(weights_in + at, used, other=0.0)
            smooth += tl.load(smooth_in + at, used, other=0.0) + split_weights * shift

    target_z = tl.load(target_z_in + rows, used, other=0.0)
    sum_exp, log_sum, logprob = log_probability(target_z, row_max, others)
    target_weight = tl.full((BLOCK_M,), 1.0, tl.float32)
    if HAS_WEIGHT:
        target_weight = tl.load(weight + y).to(tl.float32)
    row_loss = -(1.0 - label_smoothing) * target_weight * logprob
    if SMOOTHING:
        all_weights = vocab.to(tl.float32)
        if HAS_WEIGHT:
            all_weights = tl.load(weight_sum)
        row_loss += label_smoothing / vocab * (all_weights * log_sum - smooth)
    lse = row_max + log_sum
    row_loss += tl.where(z_loss > 0.0, z_loss * lse * lse, 0.0)

    row_loss = tl.where(wrong, float("nan"), row_loss)
    tl.store(loss + rows, tl.where(used, row_loss, 0.0), valid)
    tl.store(row_max_out + rows, tl.where(used, row_max, 0.0), valid)
    tl.store(sum_exp_out + rows, tl.where(used, sum_exp, 1.0), valid)
    tl.store(logprob_out + rows, tl.where(used, tl.where(wrong, float("nan"), logprob), 0.0), valid)
    if STATS:
        shifted = target_z - row_max
        target_term = tl.where(tl.exp(shifted) > 0.0, tl.exp(shifted) * shifted, 0.0)
        tl.store(entropy + rows, tl.where(used, log_sum - (moment + target_term) / sum_exp, 0.0), valid)
        tl.store(prediction + rows, tl.where(used, best_col, -1), valid)


def config(count: int, dim: int, dtype: torch.dtype, capability: tuple[int, int], *, plain: bool) -> Config:
    """Tiles of the matmul. plain: no options and no statistics, which need registers beside the logits."""
    rows = min(max(16, next_power_of_2(count)), 128)
    if dtype == torch.float32:
        tiles = {"BLOCK_M": min(rows, 64), "BLOCK_N": 64, "BLOCK_D": 32}
        return Config(tiles, {"num_warps": 4 if plain else 8, "num_stages": 3})
    depth = 64 if capability >= (9, 0) and dim % 64 == 0 else 32
    return Config(
        {"BLOCK_M": rows, "BLOCK_N": 128 if plain else 64, "BLOCK_D": depth}, {"num_warps": 8, "num_stages": 3}
    )


def stream_forward(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    weight: Tensor | None,
    outputs: Any,
    options: Any,
    stats: bool,
    row_index: Tensor,
) -> None:
    """Fills the record `RowOutputs` from the logits input (N, D) @ linear_weight (V, D)^T and the record `RowOptions`.

    `target` (N,). The outputs have M rows, of the rows `row_index` (M,) of input and target; a negative index is an
    ignored row. Input and linear_weight are both float32, bfloat16 or float16, with last stride 1; float64 raises
    `TypeError`. Logits are never rounded to the dtype of the input. Workspace: 8 to 28 bytes per row and split of the
    vocabulary.
    """
    if input.dtype not in (torch.float32, torch.bfloat16, torch.float16) or linear_weight.dtype != input.dtype:
        raise TypeError(f"stream_forward: dtypes {input.dtype} and {linear_weight.dtype} are not one of the three")
    count, (vocab, dim) = row_index.shape[0], linear_weight.shape
    if count == 0:
        return

    smoothing, softcap = options.label_smoothing > 0, options.softcap
    plain = bias is None and not (stats or smoothing or softcap > 0)
    chosen = config(count, dim, input.dtype, capability(input), plain=plain)
    parts, tiles_per_split = splits(count, vocab, chosen, processors(input))

    def partial(wanted: bool, dtype: torch.dtype = torch.float32) -> Tensor | None:
        return input.new_empty(parts, count, dtype=dtype) if wanted else None

    moment, best, best_col = partial(stats), partial(stats), partial(stats, torch.int32)
    partials = (partial(True), partial(True), moment, best, best_col, partial(smoothing), partial(smoothing))
    target_z = input.new_empty(count, dtype=torch.float32)
    weight_sum = weight.sum(dtype=torch.float32) if smoothing and weight is not None else None
    flags = {"HAS_WEIGHT": weight is not None, "SMOOTHING": smoothing, "STATS": stats}
    with on_device_of(input):
        linear_cross_entropy_stream_kernel[(-(-count // chosen.constexprs["BLOCK_M"]), parts)](
            *(input, linear_weight, target, row_index, bias, weight, *partials, target_z),
            *(count, vocab, tiles_per_split, input.stride(0), linear_weight.stride(0), *scalars(options)),
            DIM=dim,
            HAS_BIAS=bias is not None,
            HAS_SOFTCAP=softcap > 0,
            **flags,
            **chosen.constexprs,
            **chosen.options,
        )
        linear_cross_entropy_reduce_kernel[(-(-count // REDUCE_ROWS),)](
            *(target, row_index, weight, weight_sum, *partials, target_z, *outputs),
            *(count, vocab, parts, *scalars(options)),
            **flags,
            BLOCK_M=REDUCE_ROWS,
            num_warps=4,
        )
