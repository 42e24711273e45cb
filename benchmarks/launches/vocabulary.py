"""Cross-entropy of rows and of a projection, sampling from a projection, masking, and corruption of spans."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.launches.call import BF16, FP16, FP32, FP64, Call, binding, call, indices, when
from sslkernels.core.chunks import row_pitch
from sslkernels.core.dtypes import accumulation_dtype
from sslkernels.vocabulary.corrupt_spans import CorruptedSpans, SpanInputs, SpanOptions
from sslkernels.vocabulary.linear_sample import LinearSample, SampleInputs, SampleOptions
from sslkernels.vocabulary.mask_tokens import MaskedTokens, MaskInputs, MaskRule
from sslkernels.vocabulary.probability_rows import ProbabilityOperands
from sslkernels.vocabulary.prototypes.distillation_records import RowOutputs
from sslkernels.vocabulary.prototypes.distillation_rows import Choice, Head, TeacherState
from sslkernels.vocabulary.softmax_rows import RowOptions, empty_outputs
from sslkernels.vocabulary.triton.corrupt_spans import corrupt_spans
from sslkernels.vocabulary.triton.distillation_rows import distillation_rows, teacher_rows
from sslkernels.vocabulary.triton.linear_cross_entropy import stream_forward
from sslkernels.vocabulary.triton.linear_sample import linear_sample
from sslkernels.vocabulary.triton.mask_tokens import mask_tokens
from sslkernels.vocabulary.triton.probability_rows import probability_rows_bwd, probability_rows_fwd
from sslkernels.vocabulary.triton.softmax_rows import cross_entropy_rows_bwd, cross_entropy_rows_fwd

PLAIN = RowOptions(-100, label_smoothing=0.0, z_loss=0.0, softcap=0.0)
SMOOTHED = PLAIN._replace(label_smoothing=0.1)
EVERY = RowOptions(-100, label_smoothing=0.1, z_loss=1e-4, softcap=30.0, logit_scale=0.5)
ROWS = 4099


def calls() -> Iterator[Call]:
    yield from row_calls()
    yield from stream_calls()
    yield from distillation_calls()
    yield from probability_calls()
    for dtype, shape, bias in (
        (BF16, (8192, 768), True),
        (BF16, (1, 4096), False),
        (FP16, (64, 770), True),
        (FP32, (8192, 768), True),
        (FP32, (5, 70), False),
    ):
        yield call(sample, dtype, shape, 128256, bias=bias)
    for bias in (False, True):
        yield binding(sample, FP16, (1, 1), 1, bias=bias)
    for dtype in (torch.int64, torch.int32):
        yield call(spans, dtype, (255, 568), optional=dtype == torch.int64)
        yield binding(spans, dtype, (1024, 576), optional=dtype == torch.int32)
    yield binding(spans, torch.int64, (1, 2), optional=True)
    for dtype in (torch.int64, torch.int32):
        for units, optional in (("tokens", False), ("tokens", True), ("spans", False), ("words", True)):
            yield call(mask, dtype, units, (255, 512), optional=optional)
    for units in ("tokens", "spans", "words"):
        yield binding(mask, torch.int32, units, (1, 1), optional=units != "spans", words=torch.int64)
        yield binding(mask, torch.int32, units, (256, 1003), optional=units == "spans")


def row_calls() -> Iterator[Call]:
    for dtype, vocab, pitch, options in (
        (BF16, 30522, 30522, {"grad": True}),
        (BF16, 4000, 4001, {"grad": True, "stats": True, "every": True}),
        (BF16, 128256, 128256, {"grad": True}),
        (BF16, 128256, 128257, {"grad": True, "stats": True, "every": True}),
        (BF16, 128256, 128256, {"stats": True}),
        (FP16, 30522, 30528, {}),
        (FP16, 50265, 50265, {"grad": True, "stats": True, "smoothed": True}),
        (FP32, 16000, 16001, {"grad": True}),
        (FP32, 50265, 50265, {"grad": True, "stats": True, "every": True}),
        (FP64, 500, 501, {"grad": True, "stats": True, "every": True}),
        (FP64, 50265, 50265, {"grad": True}),
        (FP64, 50265, 50266, {"grad": True, "stats": True, "every": True}),
    ):
        yield call(rows, dtype, vocab, pitch, **options)
    yield binding(rows, BF16, 1, 1, grad=True, stats=True, every=True, target=torch.int32)
    yield binding(rows, BF16, 1, 1, stats=True)
    yield binding(rows, BF16, 4096, 4096, grad=True, apart=True, one_coefficient=True)


def rows(
    dtype: torch.dtype, vocab: int, pitch: int, *, grad: bool = False, stats: bool = False, every: bool = False,
    smoothed: bool = False, apart: bool = False, one_coefficient: bool = False, target: torch.dtype = torch.int64,
) -> None:  # fmt: skip
    """Forward, and backward if there is a gradient; pitch: the stride of the rows. The gradient overwrites the logits,
    or is `apart` with a stride of its own."""
    acc = accumulation_dtype(dtype)
    options = EVERY if every else SMOOTHED if smoothed else PLAIN
    logits, target = torch.empty(ROWS, pitch, dtype=dtype)[:, :vocab], torch.empty(ROWS, dtype=target)
    gradient = torch.empty(ROWS, vocab + 1, dtype=dtype)[:, :vocab] if apart else when(grad, logits)
    bias, weight = when(every, torch.empty(vocab, dtype=acc)), when(every, torch.empty(vocab, dtype=acc))
    coefficient = torch.empty((), dtype=acc).expand(ROWS) if one_coefficient else torch.empty(ROWS, dtype=acc)
    outputs = empty_outputs(logits, ROWS, stats)
    of_grad = when(grad, coefficient)
    cross_entropy_rows_fwd(logits, target, bias, weight, of_grad, outputs, gradient, options, stats)
    if grad:
        cross_entropy_rows_bwd(logits, target, bias, weight, coefficient, outputs.state, gradient, options)


def distillation_calls() -> Iterator[Call]:
    for dtype, vocab, options in (
        (BF16, 65536, {"index": True, "offset": True}),
        (BF16, 128257, {"index": True, "offset": True, "every": True}),
        (FP16, 65536, {}),
        (FP32, 65536, {"index": True, "offset": True}),
        (FP32, 32003, {"index": True, "offset": True, "every": True}),
        (FP64, 32003, {"index": True, "offset": True, "every": True}),
        (None, 65536, {"every": True}),
    ):
        yield call(distillation, dtype, vocab, **options)
    yield binding(distillation, FP32, 1, index=True, choices=1)
    yield binding(distillation, None, 1, every=True)


def distillation(
    dtype: torch.dtype | None, vocab: int, *, index: bool = False, offset: bool = False, every: bool = False,
    choices: int = 2,
) -> None:  # fmt: skip
    """dtype: of the gradient, None for none; every: divergence and statistics."""
    acc = accumulation_dtype(dtype or FP32)

    def buffer(dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(ROWS, row_pitch(vocab), dtype=dtype)[:, :vocab]

    products = buffer(acc)
    head = Head(when(offset, torch.empty(vocab, dtype=acc)), torch.empty(1, dtype=acc))
    state = TeacherState(buffer(acc), torch.empty(ROWS, dtype=acc), indices(ROWS))
    teacher_rows(head, state)
    choice = Choice(when(index, indices(ROWS, choices)), when(index, torch.empty(ROWS, choices, dtype=acc)))
    some = torch.empty(ROWS, dtype=acc)
    outputs = RowOutputs(some, some, some, some, torch.empty(ROWS, dtype=torch.bool), torch.empty(int(every)))
    grad = products if dtype == acc else when(dtype is not None, buffer(dtype or acc))
    distillation_rows(products, head, state, choice, when(dtype is not None, some), outputs, every, grad)


def probability_calls() -> Iterator[Call]:
    for dtype, target, vocab, options in (
        (BF16, FP32, 32768, {"grad": True}),
        (BF16, BF16, 50257, {"grad": True, "every": True}),
        (FP16, FP32, 32768, {}),
        (FP32, FP32, 32768, {"grad": True}),
        (FP32, FP16, 50257, {"grad": True, "every": True}),
        (FP64, FP64, 500, {"grad": True, "every": True}),
    ):
        yield call(probabilities, dtype, target, vocab, **options)
    yield binding(probabilities, BF16, FP32, 1, grad=True, every=True, one_coefficient=True)


def probabilities(
    dtype: torch.dtype, target: torch.dtype, vocab: int, *, grad: bool = False, every: bool = False,
    one_coefficient: bool = False,
) -> None:  # fmt: skip
    """Forward, and backward if there is a gradient, which overwrites the logits; target: dtype of the probabilities."""
    acc = accumulation_dtype(dtype)
    logits = torch.empty(ROWS, row_pitch(vocab), dtype=dtype)[:, :vocab]
    bias, weight = when(every, torch.empty(vocab, dtype=acc)), when(every, torch.empty(vocab, dtype=acc))
    coefficient = torch.empty((), dtype=acc).expand(ROWS) if one_coefficient else torch.empty(ROWS, dtype=acc)
    given = torch.empty(ROWS, vocab, dtype=target)
    operands = ProbabilityOperands(logits, given, bias, weight, vocab, EVERY if every else PLAIN)
    outputs = empty_outputs(logits, ROWS, False)
    probability_rows_fwd(operands, when(grad, coefficient), outputs, when(grad, logits))
    if grad:
        probability_rows_bwd(operands, coefficient, outputs.state, logits)


def stream_calls() -> Iterator[Call]:
    for dtype, shape, options in (
        (BF16, (8192, 768), {}),
        (BF16, (8192, 2304), {"bias": True, "stats": True}),
        (BF16, (8192, 770), {"every": True}),
        (FP16, (16, 768), {"every": True}),
        (FP32, (8192, 768), {}),
        (FP32, (8192, 770), {"every": True}),
    ):
        yield call(stream, dtype, shape, 128256, **options)
    yield binding(stream, FP16, (1, 1), 1)
    yield binding(stream, FP16, (1, 1), 1, every=True, target=torch.int32)


def stream(
    dtype: torch.dtype, shape: tuple[int, int], vocab: int, *, bias: bool = False, stats: bool = False,
    every: bool = False, target: torch.dtype = torch.int64,
) -> None:  # fmt: skip
    """Linear cross-entropy without gradients."""
    count, dim = shape
    input, linear_weight = torch.empty(count, dim, dtype=dtype), torch.empty(vocab, dim, dtype=dtype)
    linear_bias, weight = when(bias or every, torch.empty(vocab)), when(every, torch.empty(vocab))
    labels, index = torch.empty(count, dtype=target), torch.empty(count, dtype=torch.int64)
    stats = stats or every
    outputs, options = empty_outputs(input, count, stats), EVERY if every else PLAIN
    stream_forward(input, linear_weight, labels, linear_bias, weight, outputs, options, stats, index)


def sample(dtype: torch.dtype, shape: tuple[int, int], vocab: int, bias: bool) -> None:
    count, dim = shape
    linear_bias = when(bias, torch.empty(vocab))
    inputs = SampleInputs(
        torch.empty(count, dim, dtype=dtype),
        torch.empty(vocab, dim, dtype=dtype),
        linear_bias,
        indices(),
        indices(count),
        torch.empty(count),
    )
    outputs = LinearSample(indices(2, count), torch.empty(2, count))
    linear_sample(inputs, outputs, SampleOptions(dtype, samples=2))


def mask(
    dtype: torch.dtype, units: str, shape: tuple[int, int], optional: bool, words: torch.dtype = torch.int32
) -> None:
    ids = torch.empty(shape, dtype=dtype)
    special, numbers = when(optional, torch.empty(shape, dtype=torch.bool)), when(optional, indices(shape[0]))
    word_ids = when(units == "words", torch.empty(shape, dtype=words))
    rule = MaskRule(
        select=2**30, stay=2**31, enter=2**29, to_mask=2**31, to_random=2**30, mask_id=103, allowed=30000,
        ignore_index=-100, ranges=(0, 1, 100, 104),
    )  # fmt: skip
    outputs = MaskedTokens(torch.empty_like(ids), torch.empty_like(ids))
    mask_tokens(MaskInputs(ids, indices(), special, word_ids, numbers), outputs, rule, units != "tokens")


def spans(dtype: torch.dtype, shape: tuple[int, int], optional: bool) -> None:
    """optional: rows have numbers, and both results an end."""
    rows, columns = shape
    noise = max(columns // 8, 1)
    options = SpanOptions(noise, max(noise // 4, 1), optional, 1)
    inputs = SpanInputs(
        torch.empty(shape, dtype=dtype), indices(), indices(options.spans), when(optional, indices(rows))
    )
    sizes = (columns - noise + options.spans + optional, noise + options.spans + optional)
    corrupt_spans(inputs, options, CorruptedSpans(*(torch.empty(rows, size, dtype=dtype) for size in sizes)))
