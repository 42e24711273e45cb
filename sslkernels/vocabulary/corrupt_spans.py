"""Corruption of spans: input and labels of T5's objective from the data (Raffel et al. 2020)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from sslkernels.core import checks
from sslkernels.core.operator import operator
from sslkernels.random.philox import random_words
from sslkernels.random.seeds import seed_tensor

NAME = "corrupt_spans"
ID_DTYPES = (*checks.INDEX_DTYPES, torch.int16, torch.uint16)


class CorruptedSpans(NamedTuple):
    """The ids with a sentinel in place of each span, and the labels: each sentinel and the tokens of its span."""

    input_ids: Tensor
    labels: Tensor


class SpanInputs(NamedTuple):
    """The tensors of `corrupt_spans`: input_ids (rows, T), a 0-d seed, sentinels (spans,) int64 and row_ids (rows,),
    contiguous."""

    input_ids: Tensor
    seed: Tensor
    sentinels: Tensor
    row_ids: Tensor | None


class SpanOptions(NamedTuple):
    """How many tokens of each row are taken out, in how many spans, and the id of the end, if there is one."""

    noise: int
    spans: int
    has_eos: bool
    eos_id: int


def _empty_outputs(inputs: SpanInputs, options: SpanOptions) -> CorruptedSpans:
    rows, columns = inputs.input_ids.shape
    noise, spans, has_eos, _ = options
    end = 1 if has_eos else 0  # torch 2.11 cannot add a bool to a symbolic size
    return CorruptedSpans(
        inputs.input_ids.new_empty((rows, columns - noise + spans + end)),
        inputs.input_ids.new_empty((rows, noise + spans + end)),
    )


def noise_mask(inputs: SpanInputs, options: SpanOptions) -> Tensor:
    """Which tokens are taken out, bool (rows, T): the definition that all backends share.

    A row starts with a kept span, and kept and noise spans alternate. After each token a word of the stream says
    whether its span ends there: of the `left` tokens of its kind that are to come, `cuts` begin another span, and each
    is as likely to (Knuth's algorithm S). Hence the lengths of either kind are uniform among their compositions.
    """
    rows, columns = inputs.input_ids.shape
    words = random_words(inputs.seed, inputs.row_ids, rows, columns, 0).t()
    left = inputs.input_ids.new_empty((2, rows), dtype=torch.int64)
    left[0], left[1] = columns - options.noise, options.noise
    cuts = torch.full_like(left, options.spans - 1)
    kind = torch.zeros_like(left[:1])
    mask = inputs.input_ids.new_empty((columns, rows), dtype=torch.bool)
    for column in range(columns):
        mask[column] = kind[0] == 1
        of_kind = left.gather(0, kind) - 1
        left.scatter_(0, kind, of_kind)
        cuts_of_kind = cuts.gather(0, kind)
        cut = (words[column] * of_kind) >> 32 < cuts_of_kind
        cuts.scatter_(0, kind, cuts_of_kind - cut.long())
        kind = kind ^ (cut | (of_kind == 0)).long()
    return mask.t()


def _reference(inputs: SpanInputs, options: SpanOptions) -> CorruptedSpans:
    ids, (rows, columns) = inputs.input_ids, inputs.input_ids.shape
    noise = noise_mask(inputs, options)
    begins = noise.clone()
    begins[:, 1:] &= ~noise[:, :-1]
    span = begins.long().cumsum(1)  # the span of a noise token, counted from 1
    sentinel = inputs.sentinels[(span - 1).clamp(min=0)].to(ids.dtype)
    outputs = []
    for kept, size in ((~noise, columns - options.noise), (noise, options.noise)):
        size += options.spans + options.has_eos
        before = kept.long().cumsum(1) - kept.long()
        out = ids.new_empty((rows, size + 1))  # the last column is scratch for the tokens of the other result
        out.scatter_(1, torch.where(kept, before + span, size), ids)
        out.scatter_(1, torch.where(begins, before + span - 1, size), sentinel)
        if options.has_eos:
            out[:, size - 1] = options.eos_id
        outputs.append(out[:, :size].contiguous())
    return CorruptedSpans(*outputs)


def _fill_native(inputs: SpanInputs, options: SpanOptions, outputs: CorruptedSpans) -> None:
    torch.ops.sslkernels_native.corrupt_spans(*inputs, *outputs, *options)


def _fill_triton(inputs: SpanInputs, options: SpanOptions, outputs: CorruptedSpans) -> None:
    from sslkernels.vocabulary.triton.corrupt_spans import corrupt_spans as launch_corrupt_spans

    launch_corrupt_spans(inputs, options, outputs)


def _filled_by(fill: Callable[..., None], inputs: SpanInputs, options: SpanOptions) -> CorruptedSpans:
    outputs = _empty_outputs(inputs, options)
    fill(inputs, options, outputs)
    return outputs


@operator(
    NAME,
    {"reference": _reference, "cpu": partial(_filled_by, _fill_native), "triton": partial(_filled_by, _fill_triton)},
    native_ops=(NAME,),
)
def corrupt_spans_fwd(inputs: SpanInputs, options: SpanOptions) -> CorruptedSpans:
    return _empty_outputs(inputs, options)


@checks.with_python_numbers
def corrupt_spans(
    input_ids: Tensor,
    *,
    sentinel_ids: Sequence[int] | Tensor,
    density: float = 0.15,
    mean_span: float = 3.0,
    eos_id: int | None = None,
    row_ids: Tensor | None = None,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
) -> CorruptedSpans:
    """Take spans of tokens out of each row, and return the rest and the labels to predict them from it (T5).

    Of a row of T tokens, `noise = round(density * T)` are taken out, at least 1 and at most T - 1, in
    `spans = round(noise / mean_span)` spans, at least 1 and at most T - noise. The input has a sentinel in place of
    each span; the labels have each sentinel and, after it, the tokens of its span. Both end with `eos_id` where given.
    These numbers depend on T alone, and so do the shapes. The lengths of the spans are uniform among the compositions
    of `noise` tokens into `spans` spans, and the lengths of the parts between them among the compositions of the
    other tokens, as in T5; a row begins with a part that stays and ends with a span.

    A word of `random_bits` (row, column; sample 0) says whether a span ends at a token, so that every backend gives the
    same result bit for bit, for any batch split. The rows run in parallel, each from left to right, in one pass.

    The input is shorter than the row: T - noise + spans tokens, one more with `eos_id`. For inputs of a given length
    take the largest T that fits; for 512 with an end and the defaults it is 568, whose labels have 114:

        def input_length(T, density=0.15, mean_span=3.0):
            noise = min(max(round(density * T), 1), T - 1)
            return T - noise + min(max(round(noise / mean_span), 1), T - noise) + 1  # the end

        T = max(T for T in range(2, 1024) if input_length(T) <= 512)

    Args:
        input_ids: token ids `(..., T)`, int64, int32, int16 or uint16, without an end of their own; T is 2 or more.
            Every token may be taken out: concatenate texts to rows of T instead of padding them.
        sentinel_ids: ids of the sentinels in order of use, at least as many as spans: ints, such as
            `range(32099, 31999, -1)` for T5, or an int64 or int32 tensor `(S,)` on the device of `input_ids`. Ints that
            are not evenly spaced are copied to the device at each call; there pass a tensor, whose values are not read
            on a GPU: they must fit in the dtype of `input_ids`.
        density: the part of the tokens that is taken out, in (0, 1]. It and `mean_span` decide shapes: another value
            makes `torch.compile` compile again, another T does not.
        mean_span: mean length of a span, 1 or more.
        eos_id: id of the end of both results; None: no end.
        row_ids: int64 `(...)`, the number of each row for the random stream, in place of its flattened index: with a
            number per example, what is taken out of it does not depend on its batch.
        seed: an int in [-2**63, 2**64), or a 0-d int64 tensor on the device of `input_ids`.
        generator: draws the seed if `seed` is None; default: torch's default generator of the device.

    Returns:
        `CorruptedSpans(input_ids, labels)`, `(..., T - noise + spans)` and `(..., noise + spans)`, each one longer with
        `eos_id`, of the dtype of `input_ids`.

    Raises:
        TypeError, ValueError: for an argument of the wrong type, dtype, shape, device or range; also for fewer
            sentinels than spans.

    Source: Raffel et al., "Exploring the limits of transfer learning with a unified text-to-text transformer", JMLR 21,
    2020, section 3.1.4.

    >>> import sslkernels as sk
    >>> ids = torch.randint(5, 32000, (2, 568))
    >>> corrupted = sk.corrupt_spans(ids, sentinel_ids=range(32099, 31999, -1), eos_id=1, seed=0)
    >>> corrupted.input_ids.shape, corrupted.labels.shape
    (torch.Size([2, 512]), torch.Size([2, 114]))
    """
    checks.tensor(NAME, "input_ids", input_ids, ID_DTYPES)
    checks.dims(NAME, "input_ids", input_ids, 1, "(..., T)")
    columns = input_ids.shape[-1]
    if not 2 <= columns < 2**31 - 1:
        checks.fail(ValueError, NAME, "input_ids", "have rows of 2 to 2**31 - 2 tokens", tuple(input_ids.shape))
    checks.number(NAME, "density", density, low=0, high=1, low_open=True)
    checks.number(NAME, "mean_span", mean_span, low=1)
    checks.integer(NAME, "eos_id", eos_id, optional=True)
    if eos_id is not None:
        _check_fits("eos_id", eos_id, input_ids.dtype)
    checks.tensor(NAME, "row_ids", row_ids, (torch.int64,), optional=True)
    checks.shape(NAME, "row_ids", row_ids, input_ids.shape[:-1], "input_ids.shape[:-1]")
    checks.same_device(NAME, "row_ids", row_ids, "input_ids", input_ids.device)
    noise = min(max(round(density * columns), 1), columns - 1)
    spans = min(max(round(noise / mean_span), 1), columns - noise)
    sentinels = _sentinels(sentinel_ids, spans, input_ids)

    rows = math.prod(input_ids.shape[:-1])
    wide = input_ids.to(torch.int32) if input_ids.dtype in (torch.int16, torch.uint16) else input_ids
    inputs = SpanInputs(
        wide.reshape(rows, columns).contiguous(),
        seed_tensor(NAME, seed, generator, input_ids.device),
        sentinels,
        None if row_ids is None else row_ids.reshape(rows).contiguous(),
    )
    options = SpanOptions(noise, spans, eos_id is not None, 0 if eos_id is None else eos_id)
    outputs = (part.to(input_ids.dtype) for part in corrupt_spans_fwd(inputs, options))
    return CorruptedSpans(*(part.reshape(*input_ids.shape[:-1], part.shape[1]) for part in outputs))


def _sentinels(sentinel_ids: Sequence[int] | Tensor, spans: int, input_ids: Tensor) -> Tensor:
    """The first `spans` sentinels, int64 on the device of `input_ids`; evenly spaced ints are computed there."""
    device = input_ids.device
    if isinstance(sentinel_ids, Tensor):
        checks.tensor(NAME, "sentinel_ids", sentinel_ids, checks.INDEX_DTYPES)
        checks.dims(NAME, "sentinel_ids", sentinel_ids, 1, "(S,)", high=1)
        checks.same_device(NAME, "sentinel_ids", sentinel_ids, "input_ids", device)
    elif not isinstance(sentinel_ids, Sequence) or isinstance(sentinel_ids, str):
        checks.fail(TypeError, NAME, "sentinel_ids", "be a sequence of ints", type(sentinel_ids).__name__)
    elif not isinstance(sentinel_ids, range) and not all([type(i) is int for i in sentinel_ids]):
        for i in sentinel_ids:
            checks.integer(NAME, "sentinel_ids", i)
    count = len(sentinel_ids)
    if count < spans:
        must = f"be at least as many as the spans of a row, {spans}"
        checks.fail(ValueError, NAME, "sentinel_ids", must, count)
    if isinstance(sentinel_ids, Tensor):
        readable = device.type == "cpu" and not torch.compiler.is_compiling()
        if readable and spans > 0 and not torch._C._functorch.is_functorch_wrapped_tensor(sentinel_ids):
            for end in sentinel_ids[:spans].aminmax():
                _check_fits("sentinel_ids", int(end), input_ids.dtype)
        return sentinel_ids[:spans].long().contiguous()
    for i in (min(sentinel_ids), max(sentinel_ids)):
        _check_fits("sentinel_ids", i, input_ids.dtype)
    first, step = sentinel_ids[0], sentinel_ids[1] - sentinel_ids[0] if count > 1 else 0
    if isinstance(sentinel_ids, range) or list(sentinel_ids) == [first + step * i for i in range(count)]:
        return torch.arange(spans, device=device) * step + first
    return torch.tensor(tuple(sentinel_ids), device=device)[:spans]


def _check_fits(argument: str, value: int, dtype: torch.dtype) -> None:
    limits = torch.iinfo(dtype)
    if not limits.min <= value <= limits.max:
        checks.fail(ValueError, NAME, argument, f"fit in {dtype}, the dtype of input_ids", value)
