"""Corruption of spans in Triton: a lane walks a row from left to right, four columns at a time."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from sslkernels.random.triton.philox import group_words

BLOCK = 32  # rows per program


@triton.jit
def _step(word, column, row, state, ids_ptr, sentinels_ptr, output_ptr, labels_ptr, sizes, valid):
    """The state of each row after a token: how many tokens and ends of spans are left of both kinds, the kind of the
    next token, the number of spans so far, and what was written to both results."""
    kept, noise, kept_cuts, noise_cuts, kind, span, to_output, to_labels = state
    columns, output_columns, label_columns = sizes
    valid = valid & (column < columns)
    token = tl.load(ids_ptr + row * columns + column, mask=valid, other=0)
    is_noise = kind == 1
    tl.store(output_ptr + row * output_columns + to_output, token, mask=valid & ~is_noise)
    tl.store(labels_ptr + row * label_columns + to_labels, token, mask=valid & is_noise)
    to_output += (~is_noise).to(tl.int32)
    to_labels += is_noise.to(tl.int32)
    noise -= is_noise.to(tl.int32)
    kept -= (~is_noise).to(tl.int32)
    left = tl.where(is_noise, noise, kept)
    cuts = tl.where(is_noise, noise_cuts, kept_cuts)
    cut = ((word.to(tl.int64) * left.to(tl.int64)) >> 32).to(tl.int32) < cuts
    noise_cuts -= (is_noise & cut).to(tl.int32)
    kept_cuts -= (~is_noise & cut).to(tl.int32)
    ends = cut | (left == 0)
    begins = valid & ends & ~is_noise
    sentinel = tl.load(sentinels_ptr + span, mask=begins, other=0).to(token.dtype)
    tl.store(output_ptr + row * output_columns + to_output, sentinel, mask=begins)
    tl.store(labels_ptr + row * label_columns + to_labels, sentinel, mask=begins)
    begun = begins.to(tl.int32)
    kind = tl.where(ends, 1 - kind, kind)
    return kept, noise, kept_cuts, noise_cuts, kind, span + begun, to_output + begun, to_labels + begun


@triton.jit
def corrupt_spans_kernel(
    ids_ptr,
    seed_ptr,
    sentinels_ptr,
    row_ids_ptr,
    output_ptr,
    labels_ptr,
    rows,
    columns,
    noise_tokens,
    spans,
    eos_id,
    HAS_ROW_IDS: tl.constexpr,
    HAS_EOS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = row < rows
    groups = (columns + 3) // 4
    number = row
    if HAS_ROW_IDS:
        number = tl.load(row_ids_ptr + row, mask=valid, other=0)
    number = number * groups
    seed, draw = tl.load(seed_ptr), tl.full((), 0, tl.int64)
    zero = tl.zeros((BLOCK,), tl.int32)
    state = (zero + (columns - noise_tokens), zero + noise_tokens, zero + (spans - 1), zero + (spans - 1), zero, zero,
             zero, zero)  # fmt: skip
    sizes = (columns, columns - noise_tokens + spans + HAS_EOS, noise_tokens + spans + HAS_EOS)
    for group in range(0, groups):
        w0, w1, w2, w3 = group_words(seed, number + group, draw)
        first = 4 * group
        state = _step(w0, first, row, state, ids_ptr, sentinels_ptr, output_ptr, labels_ptr, sizes, valid)
        state = _step(w1, first + 1, row, state, ids_ptr, sentinels_ptr, output_ptr, labels_ptr, sizes, valid)
        state = _step(w2, first + 2, row, state, ids_ptr, sentinels_ptr, output_ptr, labels_ptr, sizes, valid)
        state = _step(w3, first + 3, row, state, ids_ptr, sentinels_ptr, output_ptr, labels_ptr, sizes, valid)
    if HAS_EOS:
        end = tl.zeros((BLOCK,), output_ptr.dtype.element_ty) + eos_id
        tl.store(output_ptr + row * sizes[1] + sizes[1] - 1, end, mask=valid)
        tl.store(labels_ptr + row * sizes[2] + sizes[2] - 1, end, mask=valid)


def corrupt_spans(inputs: Any, options: Any, outputs: Any) -> None:
    """Fills `outputs` from the records `SpanInputs` and `SpanOptions`."""
    rows, columns = inputs.input_ids.shape
    if rows == 0:
        return
    corrupt_spans_kernel[(triton.cdiv(rows, BLOCK),)](
        inputs.input_ids, inputs.seed, inputs.sentinels, inputs.row_ids, *outputs, rows, columns, options.noise,
        options.spans, options.eos_id, HAS_ROW_IDS=inputs.row_ids is not None, HAS_EOS=options.has_eos, BLOCK=BLOCK,
        num_warps=1,
    )  # fmt: skip
