"""Random words in Triton: Philox4x32-10 of Random123, and its addressing by rows and columns."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def group_words(seed, group, draw):
    """Words 0 ... 3 (uint32) of each group: four tensors of shape (BLOCK,) from int64 groups (BLOCK,)."""
    c0 = tl.full(group.shape, 0, tl.uint32) + (draw & 0xFFFFFFFF).to(tl.uint32)
    c1 = tl.full(group.shape, 0, tl.uint32) + ((draw >> 32) & 0xFFFFFFFF).to(tl.uint32)
    c2 = (group & 0xFFFFFFFF).to(tl.uint32)
    c3 = ((group >> 32) & 0xFFFFFFFF).to(tl.uint32)
    k0 = (seed & 0xFFFFFFFF).to(tl.uint32)
    k1 = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    for _ in tl.static_range(10):
        # One 64-bit product gives both halves; `tl.philox` multiplies twice.
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = p1.to(tl.uint32)
        c3 = p0.to(tl.uint32)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def in_columns(v0, v1, v2, v3):
    """Interleaves values of columns 0 ... 3 of each group, in the order of the columns: shape (4 * BLOCK,)."""
    values = tl.join(tl.join(v0, v2), tl.join(v1, v3))
    return tl.reshape(values, (4 * v0.shape[0],))


@triton.jit
def philox_words(seed, group, draw):
    """The words (uint32) of the groups in the order of the columns: shape (4 * BLOCK,) from int64 groups (BLOCK,)."""
    w0, w1, w2, w3 = group_words(seed, group, draw)
    return in_columns(w0, w1, w2, w3)


@triton.jit
def column_offsets(row, group, in_range, columns, BLOCK: tl.constexpr):
    """Element offsets and masks (4 * BLOCK,) of the columns of the groups, in a contiguous (rows, columns)."""
    lane = tl.arange(0, 4)[None, :]
    column = group[:, None] * 4 + lane
    offset = tl.reshape(row[:, None] * columns + column, (4 * BLOCK,))
    return offset, tl.reshape(in_range[:, None] & (column < columns), (4 * BLOCK,))


@triton.jit
def token_groups(first, rows, groups, BLOCK: tl.constexpr):
    """Row and group in the row (int64) of the groups first ... first + BLOCK - 1 of all rows, and their range mask."""
    # One 64-bit division per program; the lanes divide in 32 bits if `groups` has 32.
    row = first // groups
    local = (first - row * groups).to(groups.dtype) + tl.arange(0, BLOCK)
    row = row + (local // groups).to(tl.int64)
    return row, (local % groups).to(tl.int64), row < rows
