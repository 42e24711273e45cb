"""Skip-gram with negative sampling by index, from two tables (word2vec, Mikolov et al. 2013)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from sslkernels.core import checks, segment_sum
from sslkernels.core.autograd import distinct
from sslkernels.core.dtypes import accumulation_dtype
from sslkernels.core.legacy import PREFERENCE, Op

NAME = "negative_sampling_loss"


class Outputs(NamedTuple):
    """In the accumulation dtype, per pair: the loss (N,); where asked for (else without elements) its derivatives in
    the scores, slopes (N, 1 + K), the positive first, and in the center's row, direction (N, D)."""

    loss: Tensor
    slopes: Tensor
    direction: Tensor


def _empty_outputs(negatives: Tensor, center_weight: Tensor, want_slopes: bool, want_direction: bool) -> Outputs:
    (count, negative_count), dim = negatives.shape, center_weight.shape[1]
    shapes = ((count,), (count, 1 + negative_count) if want_slopes else (0,), (count, dim) if want_direction else (0,))
    acc = accumulation_dtype(center_weight.dtype)
    return Outputs(*(center_weight.new_empty(shape, dtype=acc) for shape in shapes))


def _empty_gradients(center_weight: Tensor, context_weight: Tensor, *wanted: bool) -> tuple[Tensor, ...]:
    tables = (center_weight, context_weight)
    return tuple(table.new_empty(table.shape if want else 0) for table, want in zip(tables, wanted, strict=True))


def _check_range(argument: str, index: Tensor, rows: int) -> None:
    """Raises `ValueError` for a CPU index outside [0, rows). On a GPU this would be a synchronisation."""
    if index.device.type != "cpu" or index.numel() == 0:
        return
    for got in map(int, index.aminmax()):
        if not 0 <= got < rows:
            checks.fail(ValueError, NAME, argument, f"be in [0, {rows})", got)


def _fwd(
    fill: Callable[..., None],
    center: Tensor,
    context: Tensor,
    negatives: Tensor,
    center_weight: Tensor,
    context_weight: Tensor,
    exclude_positive: bool,
    want_slopes: bool,
    want_direction: bool,
) -> Outputs:
    _check_range("center", center, center_weight.shape[0])
    _check_range("context", context, context_weight.shape[0])
    _check_range("negatives", negatives, context_weight.shape[0])
    outputs = _empty_outputs(negatives, center_weight, want_slopes, want_direction)
    slopes = outputs.slopes if want_slopes else None
    direction = outputs.direction if want_direction else None
    tensors = (center, context, negatives, center_weight, context_weight)
    fill(*tensors, outputs.loss, slopes, direction, exclude_positive)
    return outputs


def _fill_reference(
    center: Tensor,
    context: Tensor,
    negatives: Tensor,
    center_weight: Tensor,
    context_weight: Tensor,
    loss: Tensor,
    slopes: Tensor | None,
    direction: Tensor | None,
    exclude_positive: bool,
) -> None:
    candidates = torch.cat([context[:, None], negatives], dim=1)
    wrong = (center < 0) | (center >= center_weight.shape[0])
    wrong |= ((candidates < 0) | (candidates >= context_weight.shape[0])).any(1)
    u = center_weight[center.long().clamp(0, center_weight.shape[0] - 1)].to(loss.dtype)
    v = context_weight[candidates.long().clamp(0, context_weight.shape[0] - 1)].to(loss.dtype)

    scores = (v @ u[:, :, None]).squeeze(2)
    sign = torch.ones_like(scores)
    sign[:, 0] = -1
    terms, slope = -F.logsigmoid(-sign * scores), sign * torch.sigmoid(sign * scores)
    if exclude_positive:
        excluded = candidates == context[:, None]
        excluded[:, 0] = False
        terms, slope = terms.masked_fill(excluded, 0), slope.masked_fill(excluded, 0)
    loss.copy_(terms.sum(1).masked_fill(wrong, float("nan")))
    slope = slope.masked_fill(wrong[:, None], float("nan"))
    if slopes is not None:
        slopes.copy_(slope)
    if direction is not None:
        direction.copy_((slope[:, None] @ v).squeeze(1))


def _fill_native(*arguments: Any) -> None:
    torch.ops.sslkernels_native.negative_sampling_fwd(*arguments)


def _fill_triton(*arguments: Any) -> None:
    from sslkernels.contrastive.triton.word2vec import negative_sampling_fwd

    negative_sampling_fwd(*arguments)


def _bwd(
    sum_rows: Callable[..., None],
    grad_loss: Tensor,
    center: Tensor,
    context: Tensor,
    negatives: Tensor,
    center_weight: Tensor,
    context_weight: Tensor,
    slopes: Tensor,
    direction: Tensor,
    want_center: bool,
    want_context: bool,
) -> tuple[Tensor, ...]:
    gradients = _empty_gradients(center_weight, context_weight, want_center, want_context)
    if want_center:
        sum_rows(center, grad_loss, direction, None, gradients[0])
    if want_context:
        keys = torch.cat([context[:, None], negatives], dim=1).flatten()
        sum_rows(keys, (slopes * grad_loss[:, None]).flatten(), center_weight, center, gradients[1])
    return gradients


NATIVE_OPS = ("negative_sampling_fwd", "weighted_row_sums")

negative_sampling_fwd = Op(
    NAME,
    "negative_sampling_fwd(Tensor center, Tensor context, Tensor negatives, Tensor center_weight, "
    "Tensor context_weight, bool exclude_positive, bool want_slopes, bool want_direction) -> (Tensor, Tensor, Tensor)",
    fake=lambda center, context, negatives, center_weight, context_weight, exclude_positive, *wanted: _empty_outputs(
        negatives, center_weight, *wanted
    ),
    implementations={
        "reference": partial(_fwd, _fill_reference),
        "cpu": partial(_fwd, _fill_native),
        "triton": partial(_fwd, _fill_triton),
        "cuda": partial(_fwd, _fill_native),
    },
    native_ops=NATIVE_OPS,
    prefer=PREFERENCE,
)
negative_sampling_bwd = Op(
    NAME,
    "negative_sampling_bwd(Tensor grad_loss, Tensor center, Tensor context, Tensor negatives, Tensor center_weight, "
    "Tensor context_weight, Tensor slopes, Tensor direction, bool want_center, bool want_context) -> (Tensor, Tensor)",
    fake=lambda grad_loss, center, context, negatives, center_weight, context_weight, slopes, direction, *wanted: (
        _empty_gradients(center_weight, context_weight, *wanted)
    ),
    implementations={
        "reference": partial(_bwd, segment_sum.reference),
        "cpu": partial(_bwd, segment_sum.native),
        "triton": partial(_bwd, segment_sum.triton),
        "cuda": partial(_bwd, segment_sum.native),
    },
    native_ops=NATIVE_OPS,
    prefer=PREFERENCE,
)


class _PairLosses(Function):
    """The loss of each pair. The negatives are read once: what the center's gradient needs of them, a row of D numbers
    a pair, is kept. grad_output multiplies in float32, inside the sums of backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(center_weight, context_weight, center, context, negatives, exclude_positive, want_center, want_context):
        return negative_sampling_fwd(
            center, context, negatives, center_weight, context_weight, exclude_positive, want_context, want_center
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        center_weight, context_weight, center, context, negatives, _, *ctx.computed = inputs
        _, slopes, direction = output
        ctx.mark_non_differentiable(slopes, direction)
        ctx.save_for_backward(center, context, negatives, center_weight, context_weight, slopes, direction)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad_loss, *_):
        wanted = ctx.needs_input_grad[:2]
        grads = (None, None)
        if grad_loss is not None:
            for want, computed, name in zip(wanted, ctx.computed, ("center_weight", "context_weight"), strict=True):
                if want and not computed:
                    raise RuntimeError(f"{NAME}: forward saw no gradient wanted for {name}")
            grads = _PairLossesBackward.apply(grad_loss.contiguous(), *ctx.saved_tensors, *wanted)
        return *(grad if want else None for grad, want in zip(grads, wanted, strict=True)), *(None,) * 6


class _PairLossesBackward(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        grad_loss, center, context, negatives, center_weight, context_weight, slopes, direction, want_center,
        want_context,
    ):  # fmt: skip
        return negative_sampling_bwd(
            grad_loss, center, context, negatives, center_weight, context_weight, slopes, direction, want_center,
            want_context,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError(f"{NAME}: double backward is not supported")


def negative_sampling_loss(
    center: Tensor,
    context: Tensor,
    negatives: Tensor,
    center_weight: Tensor,
    context_weight: Tensor,
    *,
    reduction: str = "mean",
    exclude_positive: bool = False,
) -> Tensor:
    """Skip-gram with negative sampling: tells the context of each center from K sampled words, by inner products.

    With `u = center_weight` and `v = context_weight` the loss of a pair is `-logsigmoid(<u[center], v[context]>)` plus
    the sum over its negatives of `-logsigmoid(-<u[center], v[negative]>)`. Neither the `(N, K, D)` rows of the
    negatives nor their gradients ever exist: forward reads each row once and keeps D numbers a pair, and 1 + K, until
    backward. The gradients are dense; their rows are summed in float32, in the order of the pairs, without atomics.

    Args:
        center: index of each pair's center word `(...)`, int64 or int32.
        context: index of the word that was seen with it, of the shape of `center`.
        negatives: indices of K sampled words a pair `(..., K)`.
        center_weight: table of center words `(V, D)`; float32, bfloat16, float16 or float64.
        context_weight: table of context words `(V2, D)`, of the dtype of `center_weight` outside autocast; it may be
            the same tensor. Either table may be frozen.
        reduction: "mean" over the pairs (NaN where there are none), "sum", or "none", of the shape of `center`.
        exclude_positive: leave out the negatives that are the context of their pair, as word2vec and gensim do.

    Returns:
        The loss, float32 (float64 for float64 tables).

    Raises:
        TypeError, ValueError: for an argument of the wrong type, dtype, shape or range. An index out of range raises
            `ValueError` on the CPU; on a GPU, where checking would synchronise, the loss of its pair is NaN, and so are
            the gradients of the other rows of the pair.

    Source: Mikolov, Sutskever, Chen, Corrado and Dean, "Distributed representations of words and phrases and their
    compositionality", NeurIPS 2013, equation 4.

    >>> import sslkernels as sk
    >>> u, v = (torch.randn(1000, 16, requires_grad=True) for _ in range(2))
    >>> center, context = torch.tensor([3, 14]), torch.tensor([15, 92])
    >>> sk.negative_sampling_loss(center, context, torch.randint(1000, (2, 5)), u, v).backward()
    """
    _check(center, context, negatives, center_weight, context_weight, reduction, exclude_positive)
    if center_weight.dtype != context_weight.dtype:  # under autocast
        dtype = torch.promote_types(center_weight.dtype, context_weight.dtype)
        center_weight, context_weight = center_weight.to(dtype), context_weight.to(dtype)
    indices = (center.reshape(-1), context.reshape(-1), negatives.reshape(center.numel(), negatives.shape[-1]))
    if len({index.dtype for index in indices}) > 1:
        indices = tuple(index.long() for index in indices)
    tables = (center_weight.contiguous(), context_weight.contiguous())
    wanted = tuple(torch.is_grad_enabled() and table.requires_grad for table in tables)
    tensors = distinct((*tables, *(index.contiguous() for index in indices)))
    loss, *_ = _PairLosses.apply(*tensors, exclude_positive, *wanted)
    if reduction == "none":
        return loss.reshape(center.shape)
    return loss.sum() if reduction == "sum" else loss.mean()


def _check(
    center: Tensor,
    context: Tensor,
    negatives: Tensor,
    center_weight: Tensor,
    context_weight: Tensor,
    reduction: str,
    exclude_positive: bool,
) -> None:
    checks.tensor(NAME, "center", center, checks.INDEX_DTYPES)
    checks.tensor(NAME, "context", context, checks.INDEX_DTYPES)
    checks.shape(NAME, "context", context, center.shape, "that of center")
    checks.tensor(NAME, "negatives", negatives, checks.INDEX_DTYPES)
    if tuple(negatives.shape[:-1]) != tuple(center.shape) or negatives.dim() == 0:
        checks.fail(ValueError, NAME, "negatives", "have the shape of center and K", tuple(negatives.shape))
    checks.tensor(NAME, "center_weight", center_weight, checks.FLOAT_DTYPES)
    checks.dims(NAME, "center_weight", center_weight, 2, "(V, D)", high=2)
    checks.tensor(NAME, "context_weight", context_weight, checks.FLOAT_DTYPES)
    checks.dims(NAME, "context_weight", context_weight, 2, "(V, D)", high=2)
    checks.shape(NAME, "context_weight", context_weight, (context_weight.shape[0], center_weight.shape[1]), "(V, D)")
    for argument, table in (("center_weight", center_weight), ("context_weight", context_weight)):
        if table.shape[0] == 0:
            checks.fail(ValueError, NAME, argument, "have at least one row", tuple(table.shape))
    for argument, value in (
        ("context", context),
        ("negatives", negatives),
        ("center_weight", center_weight),
        ("context_weight", context_weight),
    ):
        checks.same_device(NAME, argument, value, "center", center.device)
    autocast = checks.autocast(center.device)
    if center_weight.dtype != context_weight.dtype and not autocast:
        must = f"have the dtype of center_weight, {center_weight.dtype}, outside autocast"
        checks.fail(TypeError, NAME, "context_weight", must, context_weight.dtype)
    checks.choice(NAME, "reduction", reduction, ("none", "mean", "sum"))
    checks.boolean(NAME, "exclude_positive", exclude_positive)
