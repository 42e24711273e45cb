"""Gumbel-softmax over rows in Triton: a program has some short rows, or one, and makes their noise where it reads them.

A row that fits one tile stays in registers. A longer one is read tile by tile: maximum, sum and index are kept one a
lane, which are combined after the loop, and what a second pass needs is made again, noise included. One program a row:
few rows of many columns do not fill a GPU (the CUDA kernel shares such a row among the blocks of a cluster).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sslkernels.core.triton.launch import (
    DTYPE_NAMES,
    VECTOR_BYTES,
    AotEntry,
    Config,
    accumulation_dtype,
    next_power_of_2,
    on_device_of,
    pointers_aligned,
)
from sslkernels.core.triton.numerics import exp_flushed
from sslkernels.random.triton import transforms
from sslkernels.random.triton.philox import group_words

NONE, SOFT, HARD = 0, 1, 2
_SOFT, _HARD = tl.constexpr(SOFT), tl.constexpr(HARD)
_NO_INDEX = tl.constexpr(2147483647)
RARELY = ["row_count", "columns", "first_row", "groups", "chunk_rows"]


@triton.jit
def _exp(x):
    return tl.exp(x) if x.dtype == tl.float64 else exp_flushed(x)


@triton.jit
def _gumbels(seed, number, start, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Noise (ROWS, BLOCK) of the columns from `start` on; number (ROWS,): that of the group of column 0."""
    group = number[:, None] + (start // 4 + tl.arange(0, BLOCK // 4))[None, :]
    w0, w1, w2, w3 = group_words(seed, group, tl.full((), 0, tl.int64))
    g0, g1, g2, g3 = transforms.gumbel(w0), transforms.gumbel(w1), transforms.gumbel(w2), transforms.gumbel(w3)
    return tl.reshape(tl.join(tl.join(g0, g2), tl.join(g1, g3)), (ROWS, BLOCK))


@triton.jit
def _tile(start, columns, in_range, BLOCK: tl.constexpr, ALIGN: tl.constexpr):
    """Columns and which exist; the same for those of an access, so that it stays one."""
    cols = start + tl.arange(0, BLOCK)
    return cols, in_range[:, None] & (cols // ALIGN * ALIGN < columns)[None, :]


@triton.jit
def _load_tile(values, offset, cols, mask, other, ACC: tl.constexpr):
    return tl.load(values + (offset[:, None] + cols[None, :]), mask, other=other).to(ACC)


@triton.jit
def _row_offset(row, stride, ALIGN: tl.constexpr):
    return row * stride // ALIGN * ALIGN


@triton.jit
def _load_s(
    logits, offset, cols, mask, seed, number, start,
    NOISE: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    s = _load_tile(logits, offset, cols, mask, float("-inf"), ACC)
    if NOISE:
        s += _gumbels(seed, number, start, ROWS, BLOCK).to(ACC)
    return s


@triton.jit
def _anchor(largest):
    return tl.where(largest == float("-inf"), 0.0, largest)


@triton.jit
def _accumulate(s, cols, largest, total, col, inverse_tau):
    """Adds a tile to the maximum, the sum and the column of the maximum, one a lane. NaN is never a maximum."""
    better = s > largest
    new = tl.where(better, s, largest)
    anchor = _anchor(new)
    total = total * _exp((largest - anchor) * inverse_tau) + _exp((s - anchor) * inverse_tau)
    return new, total, tl.where(better, cols[None, :], col)


@triton.jit
def _combine(largest, total, col, inverse_tau):
    """(maximum, sum, index) of each row, from one of each a lane."""
    top = tl.max(largest, 1)
    moved = _exp((largest - top[:, None]) * inverse_tau)
    index = tl.min(tl.where(largest == top[:, None], col, _NO_INDEX), 1)
    return top, tl.sum(total * moved, 1), tl.where(index == _NO_INDEX, 0, index)


@triton.jit
def _reduce(s, cols, inverse_tau):
    """(maximum, sum, index) of rows that are one tile."""
    known = tl.where(s != s, float("-inf"), s)
    top = tl.max(known, 1)
    total = tl.sum(_exp((s - top[:, None]) * inverse_tau), 1)
    index = tl.min(tl.where((s == top[:, None]) & (s > float("-inf")), cols[None, :], _NO_INDEX), 1)
    return top, total, tl.where(index == _NO_INDEX, 0, index)


@triton.jit
def _output(s, cols, top, total, index, inverse_tau, OUTPUT: tl.constexpr):
    if OUTPUT == _SOFT:
        y = _exp((s - top[:, None]) * inverse_tau) / total[:, None]
    else:
        one_hot = tl.where(cols[None, :] == index[:, None], 1.0, 0.0).to(total.dtype)
        y = tl.where((total != total)[:, None], float("nan"), one_hot)
    return y


@triton.jit
def _rows_of_program(row_ids, first_row, row_count, groups_of_row, HAS_ROW_IDS: tl.constexpr, ROWS: tl.constexpr):
    """(row, in range, number of the group of column 0), int64."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_range = row < row_count
    number = row + first_row
    if HAS_ROW_IDS:
        number = tl.load(row_ids + row, in_range, other=0)
    return row, in_range, number * groups_of_row


@triton.jit(do_not_specialize=RARELY)
def gumbel_rows_fwd_kernel(
    logits, seed_ptr, row_ids, inverse_tau_ptr, y, index_out, max_out, sum_out, best_out, plain_max_out, plain_sum_out,
    row_count, columns, logits_stride, first_row: tl.int64,
    NOISE: tl.constexpr, HAS_ROW_IDS: tl.constexpr, OUTPUT: tl.constexpr, WITH_INDEX: tl.constexpr,
    STATS: tl.constexpr, ONE_TILE: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = max_out.dtype.element_ty
    inverse_tau = tl.load(inverse_tau_ptr).to(ACC)
    one = tl.full((), 1.0, ACC)
    row, in_range, number = _rows_of_program(row_ids, first_row, row_count, (columns + 3) // 4, HAS_ROW_IDS, ROWS)
    seed = tl.full((), 0, tl.int64)
    if NOISE:
        seed = tl.load(seed_ptr)
    offset = _row_offset(row, logits_stride, ALIGN)
    y_offset = _row_offset(row, columns, ALIGN)

    if ONE_TILE:
        cols, mask = _tile(0, columns, in_range, BLOCK, ALIGN)
        s = _load_tile(logits, offset, cols, mask, float("-inf"), ACC)
        if STATS:
            plain_top, plain_total, best = _reduce(s, cols, one)
        if NOISE:
            s += _gumbels(seed, number, 0, ROWS, BLOCK).to(ACC)
        top, total, index = _reduce(s, cols, inverse_tau)
        if OUTPUT > 0:
            values = _output(s, cols, top, total, index, inverse_tau, OUTPUT)
            tl.store(y + (y_offset[:, None] + cols[None, :]), values.to(y.dtype.element_ty), mask)
    else:
        largest = tl.full((ROWS, BLOCK), float("-inf"), ACC)
        totals = tl.zeros((ROWS, BLOCK), ACC)
        col = tl.full((ROWS, BLOCK), _NO_INDEX, tl.int32)
        if STATS:
            plain_largest, plain_totals, plain_col = largest, totals, col
        for start in range(0, columns, BLOCK):
            cols, mask = _tile(start, columns, in_range, BLOCK, ALIGN)
            s = _load_tile(logits, offset, cols, mask, float("-inf"), ACC)
            if STATS:
                plain_largest, plain_totals, plain_col = _accumulate(
                    s, cols, plain_largest, plain_totals, plain_col, one
                )
            if NOISE:
                s += _gumbels(seed, number, start, ROWS, BLOCK).to(ACC)
            largest, totals, col = _accumulate(s, cols, largest, totals, col, inverse_tau)
        top, total, index = _combine(largest, totals, col, inverse_tau)
        if STATS:
            plain_top, plain_total, best = _combine(plain_largest, plain_totals, plain_col, one)
        if OUTPUT > 0:
            for start in range(0, columns, BLOCK):
                cols, mask = _tile(start, columns, in_range, BLOCK, ALIGN)
                s = tl.zeros((ROWS, BLOCK), ACC)
                if OUTPUT == _SOFT:
                    s = _load_s(logits, offset, cols, mask, seed, number, start, NOISE, ACC, ROWS, BLOCK)
                values = _output(s, cols, top, total, index, inverse_tau, OUTPUT)
                tl.store(y + (y_offset[:, None] + cols[None, :]), values.to(y.dtype.element_ty), mask)

    tl.store(max_out + row, top, in_range)
    tl.store(sum_out + row, total, in_range)
    if WITH_INDEX:
        tl.store(index_out + row, index.to(tl.int64), in_range)
    if STATS:
        tl.store(plain_max_out + row, plain_top, in_range)
        tl.store(plain_sum_out + row, plain_total, in_range)
        tl.store(best_out + row, best.to(tl.int64), in_range)


@triton.jit
def _softmax(s, top, total, inverse_tau):
    return _exp((s - top[:, None]) * inverse_tau) / total[:, None]


@triton.jit(do_not_specialize=RARELY)
def gumbel_rows_bwd_kernel(
    grad, uses, mask_ptr, logits, seed_ptr, row_ids, inverse_tau_ptr, max_in, sum_in, plain_max_in, plain_sum_in,
    grad_logits, row_count, columns, logits_stride, grad_stride, groups, first_row: tl.int64,
    HAS_GRAD: tl.constexpr, HAS_USES: tl.constexpr, HAS_MASK: tl.constexpr, NOISE: tl.constexpr,
    HAS_ROW_IDS: tl.constexpr, FLOAT64: tl.constexpr, ONE_TILE: tl.constexpr, ALIGN: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = tl.float64 if FLOAT64 else tl.float32
    inverse_tau = tl.load(inverse_tau_ptr).to(ACC)
    one = tl.full((), 1.0, ACC)
    row, in_range, number = _rows_of_program(row_ids, first_row, row_count, (columns + 3) // 4, HAS_ROW_IDS, ROWS)
    seed = tl.full((), 0, tl.int64)
    if NOISE:
        seed = tl.load(seed_ptr)
    offset = _row_offset(row, logits_stride, ALIGN)
    out_offset = _row_offset(row, columns, ALIGN)
    dot = tl.zeros((ROWS,), ACC)
    use = tl.zeros((ROWS,), ACC)
    if HAS_GRAD:
        grad_offset = _row_offset(row, grad_stride, ALIGN)
        top = tl.load(max_in + row, in_range, other=0.0)
        total = tl.load(sum_in + row, in_range, other=1.0)
    if HAS_USES:
        uses_offset = _row_offset(row % groups, columns, ALIGN)
        used = in_range
        if HAS_MASK:
            used &= tl.load(mask_ptr + row, in_range, other=0) != 0
        plain_top = tl.load(plain_max_in + row, used, other=0.0)
        plain_total = tl.load(plain_sum_in + row, used, other=1.0)

    tiles = tl.cdiv(columns, BLOCK)
    if ONE_TILE:
        tiles = 1
    lanes = tl.zeros((ROWS, BLOCK), ACC)
    use_lanes = tl.zeros((ROWS, BLOCK), ACC)
    y = lanes
    for tile in range(0, tiles):
        start = tile * BLOCK
        cols, mask = _tile(start, columns, in_range, BLOCK, ALIGN)
        if HAS_GRAD:
            s = _load_s(logits, offset, cols, mask, seed, number, start, NOISE, ACC, ROWS, BLOCK)
            y = _softmax(s, top, total, inverse_tau)
            lanes += y * _load_tile(grad, grad_offset, cols, mask, 0.0, ACC)
        if HAS_USES:
            mask &= used[:, None]
            p = _softmax(_load_tile(logits, offset, cols, mask, float("-inf"), ACC), plain_top, plain_total, one)
            use_lanes += p * _load_tile(uses, uses_offset, cols, mask, 0.0, ACC)
    dot = tl.sum(lanes, 1)
    use = tl.sum(use_lanes, 1)
    for tile in range(0, tiles):
        start = tile * BLOCK
        cols, mask = _tile(start, columns, in_range, BLOCK, ALIGN)
        value = tl.zeros((ROWS, BLOCK), ACC)
        if HAS_GRAD:
            if not ONE_TILE:
                s = _load_s(logits, offset, cols, mask, seed, number, start, NOISE, ACC, ROWS, BLOCK)
                y = _softmax(s, top, total, inverse_tau)
            value += y * (_load_tile(grad, grad_offset, cols, mask, 0.0, ACC) - dot[:, None]) * inverse_tau
        if HAS_USES:
            counted = mask & used[:, None]
            p = _softmax(_load_tile(logits, offset, cols, counted, float("-inf"), ACC), plain_top, plain_total, one)
            value += p * (_load_tile(uses, uses_offset, cols, counted, 0.0, ACC) - use[:, None])
        tl.store(grad_logits + (out_offset[:, None] + cols[None, :]), value.to(grad_logits.dtype.element_ty), mask)


@triton.jit(do_not_specialize=RARELY)
def probability_sums_kernel(
    logits, plain_max, plain_sum, mask_ptr, partial, row_count, columns, logits_stride, groups, chunk_rows,
    HAS_MASK: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = plain_max.dtype.element_ty
    chunk = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1).to(tl.int64)
    start = tl.program_id(2) * BLOCK
    total = tl.zeros((ROWS, BLOCK), ACC)
    last = tl.minimum((chunk + 1) * chunk_rows * groups, row_count)
    for at in range(0, chunk_rows, ROWS):
        lane = at + tl.arange(0, ROWS)
        row = (chunk * chunk_rows + lane) * groups + group
        valid = (row < last) & (lane < chunk_rows)
        if HAS_MASK:
            valid &= tl.load(mask_ptr + row, valid, other=0) != 0
        cols, mask = _tile(start, columns, valid, BLOCK, ALIGN)
        offset = _row_offset(row, logits_stride, ALIGN)
        values = _load_tile(logits, offset, cols, mask, float("-inf"), ACC)
        top = tl.load(plain_max + row, valid, other=0.0)
        total += _softmax(values, top, tl.load(plain_sum + row, valid, other=1.0), 1.0)
    cols = start + tl.arange(0, BLOCK)
    out = partial + _row_offset(chunk * groups + group, columns, ALIGN)
    tl.store(out + cols, tl.sum(total, 0), cols // ALIGN * ALIGN < columns)


def config(columns: int, dtype: torch.dtype) -> Config:
    """Rows and columns of a program; 8 elements a thread, of float64 4."""
    per_warp, held = (128, 1024) if dtype == torch.float64 else (256, 8192)
    size = max(4, next_power_of_2(columns))
    if size <= held:
        rows = max(1, 4 * per_warp // size)
        return Config({"ONE_TILE": True, "ROWS": rows, "BLOCK": size}, {"num_warps": rows * size // per_warp})
    return Config({"ONE_TILE": False, "ROWS": 1, "BLOCK": 8 * per_warp}, {"num_warps": 8})


def sums_config(columns: int, dtype: torch.dtype) -> Config:
    per_warp = 128 if dtype == torch.float64 else 256
    block = min(max(4, next_power_of_2(columns)), 2 * per_warp)
    return Config({"ROWS": 4 * per_warp // block, "BLOCK": block}, {"num_warps": 4})


def _align(logits: Tensor, *strides: int) -> int:
    """Elements of an access of 16 bytes, where all rows start at a multiple of them; else 1."""
    vector = VECTOR_BYTES // logits.element_size()
    return vector if all(size % vector == 0 for size in (logits.shape[1], logits.stride(0), *strides)) else 1


class TritonGumbelRows:
    """The kernels over rows; stream is (seed, row_ids, first_row), states are (max, sum)."""

    PROGRAMS = 1056  # of probability_sums: eight for each multiprocessor of an H100

    def forward(self, logits, stream, inverse_tau, output, y, index, state, best=None, plain=None) -> None:
        rows, columns = logits.shape
        if rows == 0:
            return
        chosen = config(columns, logits.dtype)
        with on_device_of(logits):
            gumbel_rows_fwd_kernel[(triton.cdiv(rows, chosen.constexprs["ROWS"]),)](
                logits, *stream[:2], inverse_tau, y, index, *state, best, *(plain or (None, None)),
                rows, columns, logits.stride(0), stream[2],
                NOISE=stream[0] is not None, HAS_ROW_IDS=stream[1] is not None, OUTPUT=output,
                WITH_INDEX=index is not None, STATS=plain is not None, ALIGN=_align(logits),
                **chosen.constexprs, **chosen.options,
            )  # fmt: skip

    def backward(self, grad, uses, mask, logits, stream, inverse_tau, state, plain, grad_logits) -> None:
        rows, columns = logits.shape
        if rows == 0:
            return
        chosen = config(columns, logits.dtype)
        grad_stride = 0 if grad is None else grad.stride(0)
        with on_device_of(logits):
            gumbel_rows_bwd_kernel[(triton.cdiv(rows, chosen.constexprs["ROWS"]),)](
                grad, uses, None if mask is None else mask.view(torch.uint8), logits, *stream[:2], inverse_tau,
                *(state or (None, None)), *(plain or (None, None)), grad_logits,
                rows, columns, logits.stride(0), grad_stride, 1 if uses is None else uses.shape[0], stream[2],
                HAS_GRAD=grad is not None, HAS_USES=uses is not None, HAS_MASK=mask is not None,
                NOISE=stream[0] is not None, HAS_ROW_IDS=stream[1] is not None, FLOAT64=logits.dtype == torch.float64,
                ALIGN=_align(logits, grad_stride), **chosen.constexprs, **chosen.options,
            )  # fmt: skip

    def probability_sums(self, logits, plain, mask, groups) -> Tensor:
        rows, columns = logits.shape
        chosen = sums_config(columns, logits.dtype)
        tiles = triton.cdiv(columns, chosen.constexprs["BLOCK"])
        per_group = rows // groups
        chunk = max(8, min(512, triton.cdiv(per_group, max(self.PROGRAMS // (groups * tiles), 64))))
        chunks = triton.cdiv(per_group, chunk)
        partial = plain[1].new_empty(chunks, groups, columns)
        if rows == 0:
            return partial.sum(0)
        with on_device_of(logits):
            probability_sums_kernel[(chunks, groups, tiles)](
                logits, *plain, None if mask is None else mask.view(torch.uint8), partial,
                rows, columns, logits.stride(0), groups, chunk,
                HAS_MASK=mask is not None, ALIGN=_align(logits), **chosen.constexprs, **chosen.options,
            )  # fmt: skip
        return partial.sum(0)


def aot_signatures() -> Iterator[AotEntry]:
    for dtype, columns, output, stats in (
        (torch.float32, 8192, HARD, False),
        (torch.float32, 8192, SOFT, False),
        (torch.bfloat16, 320, NONE, True),
        (torch.bfloat16, 50257, SOFT, False),
        (torch.float16, 131072, HARD, True),
        (torch.bfloat16, 4096, HARD, False),
        (torch.float32, 3, SOFT, False),
        (torch.float16, 7000, NONE, True),
        (torch.float64, 1000, SOFT, True),
        (torch.float64, 5000, NONE, True),
    ):
        for row_ids in (False, True):
            yield _forward_entry(dtype, columns, output, stats, row_ids)
    for dtype, columns, wide, uses in (
        (torch.float32, 8192, False, False),
        (torch.bfloat16, 320, True, True),
        (torch.bfloat16, 320, True, False),
        (torch.float16, 50257, False, False),
        (torch.bfloat16, 131072, True, True),
        (torch.float32, 3, False, True),
        (torch.float64, 1000, False, True),
        (torch.float64, 5000, False, True),
    ):
        for row_ids in (False, True):
            yield _backward_entry(dtype, columns, wide, uses, row_ids)
    for dtype in DTYPE_NAMES:
        for columns, masked in ((320, True), (7, False), (131072, False)):
            yield _sums_entry(dtype, columns, masked)


def _shared(dtype: torch.dtype, columns: int) -> tuple[dict[str, str], dict[str, Any], str]:
    """Types and constants of all kernels, and the end of a name."""
    acc = f"*{DTYPE_NAMES[accumulation_dtype(dtype)]}"
    vector = VECTOR_BYTES // dtype.itemsize
    align = vector if columns % vector == 0 else 1
    types = dict.fromkeys(("logits", "y", "grad", "grad_logits"), f"*{DTYPE_NAMES[dtype]}")
    types |= dict.fromkeys(("max_out", "sum_out", "plain_max_out", "plain_sum_out", "max_in", "sum_in"), acc)
    types |= dict.fromkeys(("plain_max_in", "plain_sum_in", "plain_max", "plain_sum", "uses", "partial"), acc)
    types |= dict.fromkeys(("seed_ptr", "row_ids", "index_out", "best_out"), "*i64")
    types |= dict.fromkeys(("row_count", "columns", "logits_stride", "grad_stride", "groups", "chunk_rows"), "i32")
    types |= {"mask_ptr": "*u8", "first_row": "i64", "inverse_tau_ptr": "*fp64"}
    return types, {"ALIGN": align}, f"{DTYPE_NAMES[dtype]}-{columns}" + ("-aligned" if align > 1 else "")


def _absent(constexprs: dict[str, Any], **names: bool) -> dict[str, Any]:
    return constexprs | {name: None for name, present in names.items() if not present}


def _forward_entry(dtype: torch.dtype, columns: int, output: int, stats: bool, row_ids: bool) -> AotEntry:
    types, constants, end = _shared(dtype, columns)
    chosen = config(columns, dtype)
    flags = {"NOISE": not (stats and row_ids), "HAS_ROW_IDS": row_ids, "OUTPUT": output, "STATS": stats}
    flags["WITH_INDEX"] = output == NONE
    constants = _absent(
        {**constants, **flags, **chosen.constexprs}, seed_ptr=flags["NOISE"], row_ids=row_ids, y=output != NONE,
        index_out=output == NONE, best_out=stats, plain_max_out=stats, plain_sum_out=stats,
    )  # fmt: skip
    name = f"gumbel-fwd-{('none', 'soft', 'hard')[output]}" + "-stats" * stats + "-row_ids" * row_ids
    return pointers_aligned(f"{name}-{end}", gumbel_rows_fwd_kernel, types, constants, chosen.options)


def _backward_entry(dtype: torch.dtype, columns: int, wide: bool, uses: bool, row_ids: bool) -> AotEntry:
    types, constants, end = _shared(dtype, columns)
    if wide:
        types["grad"] = types["uses"]
    chosen = config(columns, dtype)
    flags = {"HAS_GRAD": not (uses and row_ids), "HAS_USES": uses, "HAS_MASK": uses and row_ids, "NOISE": True}
    flags |= {"HAS_ROW_IDS": row_ids, "FLOAT64": dtype == torch.float64}
    grad = flags["HAS_GRAD"]
    constants = _absent(
        {**constants, **flags, **chosen.constexprs}, grad=grad, max_in=grad, sum_in=grad, uses=uses, plain_max_in=uses,
        plain_sum_in=uses, mask_ptr=flags["HAS_MASK"], row_ids=row_ids,
    )  # fmt: skip
    name = "gumbel-bwd" + "-wide" * wide + "-uses" * uses + "-row_ids" * row_ids
    return pointers_aligned(f"{name}-{end}", gumbel_rows_bwd_kernel, types, constants, chosen.options)


def _sums_entry(dtype: torch.dtype, columns: int, masked: bool) -> AotEntry:
    types, constants, end = _shared(dtype, columns)
    chosen = sums_config(columns, dtype)
    constants = _absent({**constants, "HAS_MASK": masked, **chosen.constexprs}, mask_ptr=masked)
    name = f"probability-sums-{end}" + "-mask" * masked
    return pointers_aligned(name, probability_sums_kernel, types, constants, chosen.options)
