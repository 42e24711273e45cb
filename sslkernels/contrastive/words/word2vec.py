"""Skip-gram with negative sampling by index, from two tables (word2vec, Mikolov et al. 2013)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sslkernels.core import checks, segment_sum
from sslkernels.core.autograd import Function, may_want_gradient, once_differentiable, save, saved
from sslkernels.core.dtypes import accumulation_dtype, contiguous
from sslkernels.core.operator import operator
from sslkernels.core.segment_sum import SparseRows

NAME = "negative_sampling_loss"
NATIVE_OPS = ("negative_sampling_fwd", "weighted_row_sums")


class Tables(NamedTuple):
    """Rows of words: center_weight (V, D), context_weight (V2, D)."""

    center_weight: Tensor
    context_weight: Tensor


class Indices(NamedTuple):
    """center (N,), context (N,) and negatives (N, K), -1 for none, of each pair."""

    center: Tensor
    context: Tensor
    negatives: Tensor


class Wanted(NamedTuple):
    """Which gradients to compute."""

    center_weight: bool
    context_weight: bool


class Outputs(NamedTuple):
    """Per pair, in the accumulation dtype: the loss (N,), and its derivatives in the scores, slopes (N, 1 + K) with the
    positive first, and in the center's row, direction (N, D). The derivatives have no elements where not wanted."""

    loss: Tensor
    slopes: Tensor
    direction: Tensor


def _empty_outputs(tables: Tables, indices: Indices, wanted: Wanted) -> Outputs:
    (count, negative_count), dim = indices.negatives.shape, tables.center_weight.shape[1]
    acc = accumulation_dtype(tables.center_weight.dtype)
    new_empty = partial(tables.center_weight.new_empty, dtype=acc)
    return Outputs(
        new_empty(count),
        new_empty((count, 1 + negative_count) if wanted.context_weight else 0),
        new_empty((count, dim) if wanted.center_weight else 0),
    )


def _empty_gradients(tables: Tables, wanted: Wanted) -> Tables:
    return Tables(*(table.new_empty(table.shape if want else 0) for table, want in zip(tables, wanted, strict=True)))


def _fwd(
    fill: Callable[..., None], tables: Tables, indices: Indices, exclude_positive: bool, wanted: Wanted
) -> Outputs:
    for name, index in indices._asdict().items():
        table = tables.center_weight if name == "center" else tables.context_weight
        checks.indices(NAME, name, index, table.shape[0], none=name == "negatives")
    outputs = _empty_outputs(tables, indices, wanted)
    fill(tables, indices, exclude_positive, outputs)
    return outputs


def _fill_reference(tables: Tables, indices: Indices, exclude_positive: bool, outputs: Outputs) -> None:
    center, context, negatives = indices
    center_weight, context_weight = tables
    acc = outputs.loss.dtype
    candidates = torch.cat([context[:, None], negatives], dim=1)
    wrong = (center < 0) | (center >= center_weight.shape[0])
    excluded = candidates == -1
    excluded[:, 0] = False
    wrong |= (((candidates < 0) | (candidates >= context_weight.shape[0])) & ~excluded).any(1)
    u = center_weight[center.long().clamp(0, center_weight.shape[0] - 1)].to(acc)
    v = context_weight[candidates.long().clamp(0, context_weight.shape[0] - 1)].to(acc)

    scores = (v @ u[:, :, None]).squeeze(2)
    sign = torch.ones_like(scores)
    sign[:, 0] = -1
    terms, slope = -F.logsigmoid(-sign * scores), sign * torch.sigmoid(sign * scores)
    if exclude_positive:
        excluded[:, 1:] |= negatives == context[:, None]
    terms, slope = terms.masked_fill(excluded, 0), slope.masked_fill(excluded, 0)
    v = v.masked_fill(excluded[:, :, None], 0)
    outputs.loss.copy_(terms.sum(1).masked_fill(wrong, float("nan")))
    slope = slope.masked_fill(wrong[:, None], float("nan"))
    if outputs.slopes.numel():
        outputs.slopes.copy_(slope)
    if outputs.direction.numel():
        outputs.direction.copy_((slope[:, None] @ v).squeeze(1))


def _fill_native(tables: Tables, indices: Indices, exclude_positive: bool, outputs: Outputs) -> None:
    slopes, direction = (t if t.numel() else None for t in (outputs.slopes, outputs.direction))
    torch.ops.sslkernels_native.negative_sampling_fwd(
        *indices, *tables, outputs.loss, slopes, direction, exclude_positive
    )


def _fill_triton(tables: Tables, indices: Indices, exclude_positive: bool, outputs: Outputs) -> None:
    from sslkernels.contrastive.triton.word2vec import negative_sampling_fwd

    negative_sampling_fwd(tables, indices, exclude_positive, outputs)


class Entries(NamedTuple):
    """The entries of the segment sum that is the gradient of a table: see `segment_sum`."""

    keys: Tensor
    coefficient: Tensor
    source: Tensor
    source_index: Tensor | None


def _entries_of_center(grad_loss: Tensor, outputs: Outputs, indices: Indices) -> Entries:
    return Entries(indices.center, grad_loss, outputs.direction, None)


def _entries_of_context(grad_loss: Tensor, tables: Tables, indices: Indices, outputs: Outputs) -> Entries:
    keys = torch.cat([indices.context[:, None], indices.negatives], dim=1).flatten()
    coefficient = (outputs.slopes * grad_loss[:, None]).flatten()
    return Entries(keys, coefficient, tables.center_weight, indices.center)


def _bwd(
    sum_rows: Callable[..., None], grad_loss: Tensor, tables: Tables, indices: Indices, outputs: Outputs, wanted: Wanted
) -> Tables:
    gradients = _empty_gradients(tables, wanted)
    if wanted.center_weight:
        sum_rows(*_entries_of_center(grad_loss, outputs, indices), gradients.center_weight)
    if wanted.context_weight:
        sum_rows(*_entries_of_context(grad_loss, tables, indices, outputs), gradients.context_weight)
    return gradients


def _empty_sparse_gradients(tables: Tables, indices: Indices, wanted: Wanted) -> tuple[SparseRows, SparseRows]:
    pairs, candidates = indices.center.numel(), indices.context.numel() + indices.negatives.numel()
    return (
        SparseRows.empty(tables.center_weight, pairs if wanted.center_weight else 0),
        SparseRows.empty(tables.context_weight, candidates if wanted.context_weight else 0),
    )


def _sparse_bwd(
    sum_rows: Callable[..., None], grad_loss: Tensor, tables: Tables, indices: Indices, outputs: Outputs, wanted: Wanted
) -> tuple[SparseRows, SparseRows]:
    gradients = in_center, in_context = _empty_sparse_gradients(tables, indices, wanted)
    if wanted.center_weight:
        entries = _entries_of_center(grad_loss, outputs, indices)
        sum_rows(*entries, tables.center_weight.shape[0], in_center)
    if wanted.context_weight:
        entries = _entries_of_context(grad_loss, tables, indices, outputs)
        sum_rows(*entries, tables.context_weight.shape[0], in_context)
    return gradients


def _flops(tables: Tables, indices: Indices) -> int:
    """The dot products of each pair and its negatives."""
    count, negative_count = indices.negatives.shape
    return 2 * count * (1 + negative_count) * tables.center_weight.shape[1]


@operator(
    NAME,
    {
        "reference": partial(_fwd, _fill_reference),
        "cpu": partial(_fwd, _fill_native),
        "triton": partial(_fwd, _fill_triton),
        "cuda": partial(_fwd, _fill_native),
    },
    native_ops=NATIVE_OPS,
    flops=lambda tables, indices, exclude_positive, wanted: _flops(tables, indices) * (1 + wanted.center_weight),
)
def negative_sampling_fwd(tables: Tables, indices: Indices, exclude_positive: bool, wanted: Wanted) -> Outputs:
    return _empty_outputs(tables, indices, wanted)


@operator(
    NAME,
    {name: partial(_bwd, sum_rows) for name, sum_rows in segment_sum.SUMS.items()},
    native_ops=NATIVE_OPS,
    flops=lambda grad_loss, tables, indices, outputs, wanted: _flops(tables, indices) * wanted.context_weight,
)
def negative_sampling_bwd(
    grad_loss: Tensor, tables: Tables, indices: Indices, outputs: Outputs, wanted: Wanted
) -> Tables:
    """The gradients of sum(grad_loss * loss), without elements where not wanted."""
    return _empty_gradients(tables, wanted)


@operator(
    NAME,
    {name: partial(_sparse_bwd, sums) for name, sums in segment_sum.SPARSE_SUMS.items()},
    native_ops=NATIVE_OPS,
    flops=lambda grad_loss, tables, indices, outputs, wanted: _flops(tables, indices) * wanted.context_weight,
)
def negative_sampling_sparse_bwd(
    grad_loss: Tensor, tables: Tables, indices: Indices, outputs: Outputs, wanted: Wanted
) -> tuple[SparseRows, SparseRows]:
    """The rows of the gradients that are not zero, unfilled for a table whose gradient is not wanted."""
    return _empty_sparse_gradients(tables, indices, wanted)


class _PairLosses(Function):
    """The loss of each pair. Forward reads the negatives once and keeps what the center's gradient needs of them, a row
    of D numbers per pair. grad_output multiplies in float32, inside the sums of backward."""

    differentiable = 1

    @staticmethod
    def forward(tables: Tables, indices: Indices, exclude_positive: bool, wanted: Wanted, sparse: bool) -> Outputs:
        return negative_sampling_fwd(tables, indices, exclude_positive, wanted)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        tables, indices, _, ctx.computed, ctx.sparse = inputs
        (pairs,) = outputs
        save(ctx, tables, indices, pairs)

    @staticmethod
    def backward(ctx, grads):
        if grads.loss is None:
            return None
        needs, *_ = _PairLosses.wanted(ctx)
        wanted = Wanted(*needs)
        for name in Wanted._fields:
            if getattr(wanted, name) and not getattr(ctx.computed, name):
                raise RuntimeError(f"{NAME}: forward saw no gradient wanted for {name}")
        compute = _sparse_gradients if ctx.sparse else _gradients
        tables, indices, pairs = saved(ctx)
        gradients = compute(grads.loss.contiguous(), tables, indices, pairs, wanted)
        if ctx.sparse:
            gradients = (
                grad.tensor(table.shape[0]) if want else None
                for grad, table, want in zip(gradients, tables, wanted, strict=True)
            )
        return (Tables(*(grad if want else None for grad, want in zip(gradients, wanted, strict=True))),)


@once_differentiable(NAME)
def _gradients(grad_loss: Tensor, tables: Tables, indices: Indices, outputs: Outputs, wanted: Wanted) -> Tables:
    return negative_sampling_bwd(grad_loss, tables, indices, outputs, wanted)


@once_differentiable(NAME)
def _sparse_gradients(
    grad_loss: Tensor, tables: Tables, indices: Indices, outputs: Outputs, wanted: Wanted
) -> tuple[SparseRows, SparseRows]:
    return negative_sampling_sparse_bwd(grad_loss, tables, indices, outputs, wanted)


@checks.with_python_numbers
def negative_sampling_loss(
    center: Tensor,
    context: Tensor,
    negatives: Tensor,
    center_weight: Tensor,
    context_weight: Tensor,
    *,
    pair_weight: Tensor | None = None,
    sparse: bool = False,
    reduction: str = "mean",
    on_empty: str = "nan",
    exclude_positive: bool = False,
) -> Tensor:
    """Skip-gram with negative sampling: tells the context of each center from K sampled words, by inner products.

    With `u = center_weight` and `v = context_weight` the loss of a pair is `-logsigmoid(<u[center], v[context]>)` plus
    the sum over its negatives of `-logsigmoid(-<u[center], v[negative]>)`. Neither the `(N, K, D)` rows of the
    negatives nor their gradients are ever materialised: forward reads each row once and keeps D + 1 + K numbers per
    pair until backward. The rows of the gradients are summed in float32, in the order of the pairs, without atomics.

    Args:
        center: index of each pair's center word `(...)`, int64 or int32.
        context: index of the word that was seen with it, of the shape of `center`.
        negatives: indices of K sampled words per pair `(..., K)`; -1 for none.
        center_weight: table of center words `(V, D)`; float32, bfloat16, float16 or float64.
        context_weight: table of context words `(V2, D)`, of the dtype of `center_weight` outside autocast; it may be
            the same tensor. Either table may be frozen.
        pair_weight: `(...)`, any float dtype, multiplies the loss of each pair; not part of the divisor of "mean".
            Differentiable.
        sparse: gradients are coalesced sparse tensors of the rows that occur, for the optimisers that work with
            `nn.Embedding(sparse=True)`: `SGD`, `SparseAdam`, `Adagrad`. Time and memory then do not grow with the
            tables. Backward reads the number of rows, which synchronises on a GPU. Not inside `torch.compile`.
        reduction: "mean" over the pairs, "sum", or "none", of the shape of `center`.
        on_empty: loss of a mean over no pairs: "nan", as in torch, or "zero", with gradients of zero.
        exclude_positive: leave out negatives that equal the context of their pair, as word2vec and gensim do.

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
    _check(center, context, negatives, center_weight, context_weight)
    checks.tensor(NAME, "pair_weight", pair_weight, checks.FLOAT_DTYPES, optional=True)
    checks.shape(NAME, "pair_weight", pair_weight, center.shape, "(...), as center")
    checks.same_device(NAME, "pair_weight", pair_weight, "center", center.device)
    checks.choice(NAME, "reduction", reduction, ("none", "mean", "sum"))
    checks.choice(NAME, "on_empty", on_empty, ("nan", "zero"))
    checks.boolean(NAME, "exclude_positive", exclude_positive)
    checks.boolean(NAME, "sparse", sparse)
    if sparse and torch.compiler.is_compiling():
        raise NotImplementedError(f"{NAME}: sparse=True is not supported inside torch.compile; use sparse=False")
    if center_weight.dtype != context_weight.dtype:  # under autocast
        dtype = torch.promote_types(center_weight.dtype, context_weight.dtype)
        center_weight, context_weight = center_weight.to(dtype), context_weight.to(dtype)
    indices = Indices(center.reshape(-1), context.reshape(-1), negatives.reshape(center.numel(), negatives.shape[-1]))
    if len({index.dtype for index in indices}) > 1:
        indices = Indices(*(index.long() for index in indices))
    indices = Indices(*map(contiguous, indices))
    tables = Tables(center_weight.contiguous(), context_weight.contiguous())
    wanted = Wanted(*map(may_want_gradient, tables))
    loss = _PairLosses.run(tables, indices, exclude_positive, wanted, sparse).loss
    if pair_weight is not None:
        loss = loss * pair_weight.reshape(-1).to(loss.dtype)
    if reduction == "none":
        return loss.reshape(center.shape)
    if reduction == "sum" or (on_empty == "zero" and loss.numel() == 0):
        return loss.sum()
    return loss.mean()


def _check(
    center: Tensor,
    context: Tensor,
    negatives: Tensor,
    center_weight: Tensor,
    context_weight: Tensor,
) -> None:
    checks.tensor(NAME, "center", center, checks.INDEX_DTYPES)
    checks.tensor(NAME, "context", context, checks.INDEX_DTYPES)
    checks.shape(NAME, "context", context, center.shape, "center.shape")
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
