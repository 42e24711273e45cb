"""Random words in Triton: one program makes BLOCK groups of four words, wherever rows begin."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sslkernels.triton_kernels.launch import AotEntry, pointers_aligned
from sslkernels.triton_kernels.philox import philox_words, token_groups

BLOCK = 256


@triton.jit(do_not_specialize=["groups", "sample"])
def random_bits_kernel(
    seed_ptr,
    row_ids_ptr,
    out_ptr,
    rows,
    columns,
    groups,
    sample: tl.int64,
    HAS_ROW_IDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, group, in_range = token_groups(tl.program_id(0).to(tl.int64) * BLOCK, rows, groups, BLOCK)
    row_id = row
    if HAS_ROW_IDS:
        row_id = tl.load(row_ids_ptr + row, mask=in_range, other=0)
    words = philox_words(tl.load(seed_ptr), row_id * groups + group, sample.to(tl.int64))

    column = tl.reshape(group[:, None] * 4 + tl.arange(0, 4)[None, :], (4 * BLOCK,))
    offset = tl.reshape((row * columns)[:, None] + tl.zeros((1, 4), tl.int64), (4 * BLOCK,)) + column
    valid = tl.reshape(in_range[:, None] & (tl.arange(0, 4)[None, :] >= 0), (4 * BLOCK,)) & (column < columns)
    tl.store(out_ptr + offset, words.to(tl.int32, bitcast=True), mask=valid)


def random_bits(seed: Tensor, row_ids: Tensor | None, rows: int, columns: int, sample: int) -> Tensor:
    out = torch.empty(rows, columns, dtype=torch.int32, device=seed.device)
    if out.numel() == 0:
        return out
    groups = (columns + 3) // 4
    grid = (triton.cdiv(rows * groups, BLOCK),)
    random_bits_kernel[grid](
        seed, row_ids, out, rows, columns, groups, sample, HAS_ROW_IDS=row_ids is not None, BLOCK=BLOCK
    )
    return out


def aot_signatures() -> Iterator[AotEntry]:
    types = {"seed_ptr": "*i64", "row_ids_ptr": "*i64", "out_ptr": "*i32", "sample": "i64"}
    types |= dict.fromkeys(("rows", "columns", "groups"), "i32")
    for has_row_ids in (False, True):
        constants: dict[str, Any] = {"HAS_ROW_IDS": has_row_ids, "BLOCK": BLOCK}
        constants |= {} if has_row_ids else {"row_ids_ptr": None}
        name = "random_bits" + ("-row_ids" if has_row_ids else "")
        yield pointers_aligned(name, random_bits_kernel, types, constants, {"num_warps": 4})
