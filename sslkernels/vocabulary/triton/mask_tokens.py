"""Masking of tokens in Triton: ids are read once, the new ids and the labels are written once, and the draws stay in
registers.

Independent tokens: a flat grid over groups of four tokens. Chained units (words, spans): one program per row, which
scans the maps of the state block by block, since maps of {0, 1} to itself compose associatively.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from sslkernels.random.triton.philox import column_offsets, philox_words, token_groups

BLOCK = 128  # groups of four tokens per program, or per step of a row

_SCALARS = ["select", "stay", "enter", "to_mask", "to_random", "mask_id", "allowed", "ignore_index", "groups"]


@triton.jit
def _eligible(
    ids_ptr,
    special_mask_ptr,
    word_ids_ptr,
    offset,
    valid,
    HAS_SPECIAL_MASK: tl.constexpr,
    HAS_WORDS: tl.constexpr,
    RANGES: tl.constexpr,
):
    """The ids (int64), the word ids (-1 without HAS_WORDS) and whether the tokens may be chosen: never if not valid."""
    ids = tl.load(ids_ptr + offset, mask=valid, other=0).to(tl.int64)
    eligible = valid
    for i in tl.static_range(len(RANGES) // 2):
        eligible &= (ids < RANGES[2 * i]) | (ids >= RANGES[2 * i + 1])
    if HAS_SPECIAL_MASK:
        eligible &= tl.load(special_mask_ptr + offset, mask=valid, other=1) == 0
    word = tl.full(offset.shape, -1, tl.int64)
    if HAS_WORDS:
        word = tl.load(word_ids_ptr + offset, mask=valid, other=-1).to(tl.int64)
        eligible &= word >= 0
    return ids, word, eligible


@triton.jit
def _replace(ids, chosen, seed, group, to_mask, to_random, mask_id, allowed, ignore_index, RANGES: tl.constexpr):
    """The new ids and the labels."""
    action = philox_words(seed, group, tl.full((), 1, tl.int64)).to(tl.int64)
    random_id = (philox_words(seed, group, tl.full((), 2, tl.int64)).to(tl.int64) * allowed) >> 32
    for i in tl.static_range(len(RANGES) // 2):
        if RANGES[2 * i] >= 0:
            random_id += tl.where(random_id >= RANGES[2 * i], RANGES[2 * i + 1] - RANGES[2 * i], 0)
    replaced = tl.where(action < to_mask, mask_id, tl.where(action < to_random, random_id, ids))
    return tl.where(chosen, replaced, ids), tl.where(chosen, ids, ignore_index)


@triton.jit(do_not_specialize=_SCALARS)
def mask_tokens_kernel(
    ids_ptr,
    seed_ptr,
    special_mask_ptr,
    row_ids_ptr,
    output_ids_ptr,
    labels_ptr,
    rows,
    columns,
    groups,
    select: tl.int64,
    to_mask: tl.int64,
    to_random: tl.int64,
    mask_id: tl.int64,
    allowed: tl.int64,
    ignore_index: tl.int64,
    HAS_SPECIAL_MASK: tl.constexpr,
    HAS_ROW_IDS: tl.constexpr,
    RANGES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, group, in_range = token_groups(tl.program_id(0).to(tl.int64) * BLOCK, rows, groups, BLOCK)
    row_id = row
    if HAS_ROW_IDS:
        row_id = tl.load(row_ids_ptr + row, mask=in_range, other=0)
    seed = tl.load(seed_ptr)
    group_id = row_id * groups + group

    offset, valid = column_offsets(row, group, in_range, columns, BLOCK)
    ids, _, eligible = _eligible(ids_ptr, special_mask_ptr, ids_ptr, offset, valid, HAS_SPECIAL_MASK, False, RANGES)
    draw = philox_words(seed, group_id, tl.full((), 0, tl.int64)).to(tl.int64)
    chosen = eligible & (draw < select)
    new_ids, labels = _replace(ids, chosen, seed, group_id, to_mask, to_random, mask_id, allowed, ignore_index, RANGES)
    tl.store(output_ids_ptr + offset, new_ids.to(output_ids_ptr.dtype.element_ty), mask=valid)
    tl.store(labels_ptr + offset, labels.to(labels_ptr.dtype.element_ty), mask=valid)


@triton.jit
def _compose(first, second):
    """The composed map s -> second(first(s)); bit s of a map is its value at state s."""
    return ((second >> (first & 1)) & 1) | (((second >> ((first >> 1) & 1)) & 1) << 1)


@triton.jit(do_not_specialize=_SCALARS)
def mask_tokens_chain_kernel(
    ids_ptr,
    seed_ptr,
    special_mask_ptr,
    word_ids_ptr,
    row_ids_ptr,
    output_ids_ptr,
    labels_ptr,
    columns,
    groups,
    select: tl.int64,
    stay: tl.int64,
    enter: tl.int64,
    to_mask: tl.int64,
    to_random: tl.int64,
    mask_id: tl.int64,
    allowed: tl.int64,
    ignore_index: tl.int64,
    HAS_SPECIAL_MASK: tl.constexpr,
    HAS_WORDS: tl.constexpr,
    HAS_ROW_IDS: tl.constexpr,
    RANGES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_id = row
    if HAS_ROW_IDS:
        row_id = tl.load(row_ids_ptr + row)
    seed = tl.load(seed_ptr)
    lane = tl.arange(0, 4 * BLOCK)
    state = tl.full((), 0, tl.int32)  # state of the last token of the previous step
    for start in range(0, groups, BLOCK):
        group = row_id * groups + start + tl.arange(0, BLOCK)
        column = 4 * (tl.full((), 0, tl.int64) + start) + lane
        valid = column < columns
        offset = row * columns + column
        ids, word, eligible = _eligible(
            ids_ptr, special_mask_ptr, word_ids_ptr, offset, valid, HAS_SPECIAL_MASK, HAS_WORDS, RANGES
        )
        _, word_before, eligible_before = _eligible(
            ids_ptr,
            special_mask_ptr,
            word_ids_ptr,
            offset - 1,
            valid & (column > 0),
            HAS_SPECIAL_MASK,
            HAS_WORDS,
            RANGES,
        )
        draw = philox_words(seed, group, tl.full((), 0, tl.int64)).to(tl.int64)
        if_unchosen = draw < tl.where(eligible_before, enter, select)
        if_chosen = draw < tl.where(eligible_before, stay, select)
        step = if_unchosen.to(tl.int32) | (if_chosen.to(tl.int32) << 1)
        if HAS_WORDS:
            step = tl.where((word >= 0) & (word == word_before), 2, step)  # the identity
        states = (tl.associative_scan(step, 0, _compose) >> state) & 1
        state = tl.sum(tl.where(lane == 4 * BLOCK - 1, states, 0), 0)
        new_ids, labels = _replace(
            ids, eligible & (states == 1), seed, group, to_mask, to_random, mask_id, allowed, ignore_index, RANGES
        )
        tl.store(output_ids_ptr + offset, new_ids.to(output_ids_ptr.dtype.element_ty), mask=valid)
        tl.store(labels_ptr + offset, labels.to(labels_ptr.dtype.element_ty), mask=valid)


def mask_tokens(inputs: Any, outputs: Any, rule: Any, chained: bool) -> None:
    """Fills the record `MaskedTokens` from the records `MaskInputs` and `MaskRule`. chained: whether the choice of a
    token depends on the token before it.

    The ranges of special ids are compiled into the kernel: they are few, and fixed for a tokenizer.
    """
    input_ids = inputs.input_ids
    rows, columns = input_ids.shape
    if input_ids.numel() == 0:
        return
    groups = (columns + 3) // 4
    special = None if inputs.special_mask is None else inputs.special_mask.view(torch.uint8)
    flags = {"HAS_SPECIAL_MASK": special is not None, "HAS_ROW_IDS": inputs.row_ids is not None}
    actions = (rule.to_mask, rule.to_random, rule.mask_id, rule.allowed, rule.ignore_index)
    if chained:
        mask_tokens_chain_kernel[(rows,)](
            input_ids, inputs.seed, special, inputs.word_ids, inputs.row_ids, outputs.input_ids, outputs.labels,
            columns, groups, rule.select, rule.stay, rule.enter, *actions,
            **flags, HAS_WORDS=inputs.word_ids is not None, RANGES=rule.ranges, BLOCK=BLOCK,
        )  # fmt: skip
    else:
        mask_tokens_kernel[(triton.cdiv(rows * groups, BLOCK),)](
            input_ids, inputs.seed, special, inputs.row_ids, outputs.input_ids, outputs.labels,
            rows, columns, groups, rule.select, *actions, **flags, RANGES=rule.ranges, BLOCK=BLOCK,
        )  # fmt: skip
