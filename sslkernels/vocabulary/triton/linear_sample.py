"""Gumbel-max over a linear projection: logits are computed tile by tile, perturbed by noise, and reduced at once.

The classes are cut into splits. A program takes a block of rows, a split and the number of a draw; draws share nothing,
so that each computes the products again. A program keeps per row the largest logit, the sum of exponentials relative to
it, and the largest sum of logit and noise with its logit and class. These numbers are then combined in the order of the
splits.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from sslkernels.core.triton.launch import Config, capability, next_power_of_2, processors
from sslkernels.core.triton.products import splits, tile_products
from sslkernels.random.triton import transforms
from sslkernels.random.triton.philox import group_words

# exp(3.2): whatever the noise of the largest logit, its sum exceeds that logit less 3.2.
MOST_REACH = tl.constexpr(24.6)
NOT_SPECIALIZED = ["count", "vocab", "tiles_per_split", "pad", "first_group", "groups"]


@triton.jit
def _words_of_tile(seed, row_id, groups, first_group, draw, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Random words (BLOCK_M, BLOCK_N); the first column is 4 * first_group."""
    number = row_id[:, None] * groups + (first_group + tl.arange(0, BLOCK_N // 4))[None, :]
    w0, w1, w2, w3 = group_words(seed, number, draw)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    return tl.reshape(words, (BLOCK_M, BLOCK_N))


@triton.jit
def _may_win(words, part, anchor, best):
    """Whether the noise of a word may lift its logit above `best`, with part = exp(logit - anchor): conservatively, and
    True for NaN. csrc/vocabulary/sample_rows.cu has the reasons for the numbers."""
    reach = 1.001 * tl.minimum(tl.exp(anchor - best), MOST_REACH)
    below = ((words >> 9) | 0x3F800000).to(tl.float32, bitcast=True)  # 1 + a lower bound of the uniform number
    return (below >= part * reach[:, None] + (1.0 + 2.0**-22)) == 0


@triton.jit
def _with_tile(z, words, columns, greedy, best, column, logit):
    """The largest perturbed logit of each row, its column and its logit, joined with a tile."""
    noise = transforms.gumbel(words)
    perturbed = z + noise * tl.where(greedy, 0.0, 1.0)[:, None]
    perturbed = tl.where(perturbed == perturbed, perturbed, float("-inf"))
    winner = tl.max(perturbed, 1)
    at_winner = perturbed == winner[:, None]
    winner_column = tl.min(tl.where(at_winner, columns[None, :], 2147483647), 1)
    winner_logit = tl.max(tl.where(columns[None, :] == winner_column[:, None], z, float("-inf")), 1)
    better = winner > best
    return (
        tl.where(better, winner, best),
        tl.where(better, winner_column, column),
        tl.where(better, winner_logit, logit),
    )


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def linear_sample_kernel(
    input, linear_weight, bias, seed_ptr, row_ids, scale_ptr,
    row_max_out, sum_exp_out, best_out, logit_out, column_out,
    count, vocab, tiles_per_split, input_stride, weight_stride, pad, first_group, groups,
    DIM: tl.constexpr, HAS_BIAS: tl.constexpr, FILTERS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # The slice of classes begins `pad` columns into the noise group first_group, of `groups` in a row.
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = rows < count
    source = tl.where(valid, rows, 0).to(tl.int64)
    row_id = tl.load(row_ids + source)
    seed = tl.load(seed_ptr)
    scale = tl.load(scale_ptr + source)
    groups = groups.to(tl.int64)
    columns_end = vocab + pad
    depth = tl.arange(0, BLOCK_D)
    input_at = input + source[:, None] * input_stride + depth[None, :]
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    sum_exp = tl.zeros((BLOCK_M,), tl.float32)
    best = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    logit = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    column = tl.zeros((BLOCK_M,), tl.int32)
    split = tl.program_id(1)
    first = split * tiles_per_split
    for tile in range(first, tl.minimum(first + tiles_per_split, tl.cdiv(columns_end, BLOCK_N))):
        columns = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = (columns >= pad) & (columns < columns_end)
        weight_row = tl.where(inside, columns - pad, 0)
        weight_at = linear_weight + weight_row.to(tl.int64)[None, :] * weight_stride + depth[:, None]
        z = tile_products(input_at, weight_at, depth, DIM, BLOCK_D, "ieee")
        if HAS_BIAS:
            z += tl.load(bias + weight_row, inside, other=0.0)[None, :]
        greedy = scale == float("inf")
        # 0 * -inf is NaN.
        scaled = tl.where(z == float("-inf"), z, z * tl.where(greedy, 1.0, scale)[:, None])
        z = tl.where(inside[None, :], scaled, float("-inf"))

        new_max = tl.maximum(row_max, tl.max(z, 1))
        anchor = tl.where(new_max == float("-inf"), 0.0, new_max)
        part = tl.exp(z - anchor[:, None])
        sum_exp = sum_exp * tl.exp(row_max - anchor) + tl.sum(part, 1)
        row_max = new_max

        draw = tl.program_id(2).to(tl.int64)
        group = first_group + tile * (BLOCK_N // 4)
        words = _words_of_tile(seed, row_id, groups, group, draw, BLOCK_M, BLOCK_N)
        if FILTERS:
            opens = _may_win(words, part, anchor, best) | (greedy[:, None] & (z > best[:, None]))
            # Later tiles win more rarely, and the two logarithms of a word are half the cost of its noise.
            if tl.max(tl.max(opens.to(tl.int32), 1), 0) > 0:
                best, column, logit = _with_tile(z, words, columns, greedy, best, column, logit)
        else:
            best, column, logit = _with_tile(z, words, columns, greedy, best, column, logit)

    at = (tl.program_id(2).to(tl.int64) * tl.num_programs(1) + split) * count + rows
    tl.store(row_max_out + at, row_max, valid)
    tl.store(sum_exp_out + at, sum_exp, valid)
    tl.store(best_out + at, best, valid)
    tl.store(logit_out + at, logit, valid)
    tl.store(column_out + at, column, valid)


def config(count: int, dim: int, dtype: torch.dtype, capability: tuple[int, int]) -> Config:
    """Smaller tiles than a plain matmul: the noise needs registers beside the products."""
    rows = min(max(16, next_power_of_2(count)), 64)
    if dtype == torch.float32:
        options = {"num_warps": 8, "num_stages": 2}  # a third stage makes ptxas spill 8 bytes
        if capability >= (10, 0):
            options["maxnreg"] = 128  # ptxas uses as many without a limit, and with Triton 3.6 spills 16 bytes
        return Config({"BLOCK_M": rows, "BLOCK_N": 64, "BLOCK_D": 32}, options)
    depth = 64 if capability >= (9, 0) and dim % 64 == 0 else 32
    return Config({"BLOCK_M": rows, "BLOCK_N": 128, "BLOCK_D": depth}, {"num_warps": 8, "num_stages": 3})


def filters(capability: tuple[int, int]) -> bool:
    """Whether tiles without a word that may win are skipped. For sm_80 that spills, and for sm_100 Triton 3.7 cannot
    compile products in tensor memory that a branch reads."""
    return (9, 0) <= capability < (10, 0)


def linear_sample(inputs: Any, outputs: Any, options: Any) -> None:
    """Fills the record `LinearSample` from the records `SampleInputs` and `SampleOptions`, whose compute_dtype is not
    float64."""
    if inputs.input.shape[0] == 0:
        return
    row_max, sum_exp, best, logit, column = _draw_splits(inputs, options, 0, inputs.linear_weight.shape[0])
    winner = best.argmax(1, keepdim=True)  # ties go to the first split
    lse = (row_max + sum_exp.log()).logsumexp(1)
    outputs.index.copy_(column.gather(1, winner)[:, 0])
    torch.sub(logit.gather(1, winner)[:, 0], lse, out=outputs.logprob)
    # Where the largest logit is drawn its log-probability is 0, unless a NaN or the lack of classes made it NaN.
    outputs.logprob.masked_fill_(torch.isinf(inputs.scale) & ~outputs.logprob.isnan(), 0)


def linear_sample_slice(inputs: Any, state: Any, options: Any, start: int, vocab: int) -> None:
    """Fills the record `SliceState` for the classes from `start` of `vocab`, which are at least one."""
    if inputs.input.shape[0] == 0:
        return
    row_max, sum_exp, best, logit, column = _draw_splits(inputs, options, start, vocab)
    winner = best.argmax(1, keepdim=True)
    torch.amax(row_max, 1, out=state.row_max)
    below = (row_max - state.row_max[:, None]).masked_fill_(row_max == float("-inf"), 0)  # -inf - -inf is NaN
    torch.sum(sum_exp * below.exp(), 1, out=state.sum_exp)
    state.best.copy_(best.gather(1, winner)[:, 0])
    state.logit.copy_(logit.gather(1, winner)[:, 0])
    torch.add(column.gather(1, winner)[:, 0], start // 4 * 4, out=state.index)


def _draw_splits(inputs: Any, options: Any, start: int, vocab: int) -> tuple[torch.Tensor, ...]:
    """The outputs of the kernel, (samples, splits, rows). Columns count from the noise group in which the slice
    begins."""
    x, weight = inputs.input.to(options.compute_dtype), inputs.linear_weight.to(options.compute_dtype)
    count, (size, dim), pad = x.shape[0], weight.shape, start % 4
    chosen = config(count, dim, x.dtype, capability(x))
    parts, tiles_per_split = splits(count, size + pad, chosen, processors(x))
    samples = options.samples
    numbers = [x.new_empty(samples, parts, count, dtype=torch.float32) for _ in range(4)]
    column = x.new_empty(samples, parts, count, dtype=torch.int32)
    linear_sample_kernel[(triton.cdiv(count, chosen.constexprs["BLOCK_M"]), parts, samples)](
        *(x, weight, inputs.linear_bias, inputs.seed, inputs.row_ids, inputs.scale),
        *(*numbers, column),
        *(count, size, tiles_per_split, x.stride(0), weight.stride(0), pad, start // 4, triton.cdiv(vocab, 4)),
        DIM=dim,
        HAS_BIAS=inputs.linear_bias is not None,
        FILTERS=filters(capability(x)),
        **chosen.constexprs,
        **chosen.options,
    )
    return (*numbers, column)
