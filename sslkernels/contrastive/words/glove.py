"""GloVe: weighted least squares of the logarithms of co-occurrence counts, by index, from two tables."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from sslkernels.core import checks, segment_sum
from sslkernels.core.autograd import Function, may_want_gradient, once_differentiable, save, saved, wanted_only
from sslkernels.core.dtypes import accumulation_dtype
from sslkernels.core.operator import full, operator
from sslkernels.core.segment_sum import SparseRows

NAME = "glove_loss"
NATIVE_OPS = ("glove_fwd", "weighted_row_sums")


class Parameters(NamedTuple):
    """Rows and biases of words: center_weight (V, D), context_weight (V2, D), center_bias (V,), context_bias (V2,)."""

    center_weight: Tensor
    context_weight: Tensor
    center_bias: Tensor
    context_bias: Tensor


class Pairs(NamedTuple):
    """center and context: indices (N,) of each pair; target: the logarithm of its count, and weight (N,), in the
    accumulation dtype."""

    center: Tensor
    context: Tensor
    target: Tensor
    weight: Tensor


class Wanted(NamedTuple):
    """Which gradients to compute."""

    center_weight: bool
    context_weight: bool
    center_bias: bool
    context_bias: bool


class Outputs(NamedTuple):
    """Per pair, in the accumulation dtype: the loss (N,) and its derivative in the score, slope (N,), without elements
    where no gradient is wanted."""

    loss: Tensor
    slope: Tensor


def _empty_outputs(pairs: Pairs, wanted: Wanted) -> Outputs:
    count = pairs.center.numel()
    return Outputs(pairs.target.new_empty(count), pairs.target.new_empty(count if any(wanted) else 0))


def _fwd(fill: Callable[..., None], parameters: Parameters, pairs: Pairs, wanted: Wanted) -> Outputs:
    checks.indices(NAME, "center", pairs.center, parameters.center_weight.shape[0])
    checks.indices(NAME, "context", pairs.context, parameters.context_weight.shape[0])
    outputs = _empty_outputs(pairs, wanted)
    fill(parameters, pairs, outputs)
    return outputs


def _fill_reference(parameters: Parameters, pairs: Pairs, outputs: Outputs) -> None:
    acc = outputs.loss.dtype
    centers, contexts = parameters.center_weight.shape[0], parameters.context_weight.shape[0]
    wrong = (pairs.center < 0) | (pairs.center >= centers) | (pairs.context < 0) | (pairs.context >= contexts)
    center, context = pairs.center.long().clamp(0, centers - 1), pairs.context.long().clamp(0, contexts - 1)
    u, b = parameters.center_weight[center].to(acc), parameters.center_bias[center].to(acc)
    v, c = parameters.context_weight[context].to(acc), parameters.context_bias[context].to(acc)
    error = (u * v).sum(1) + (b + c) - pairs.target
    error = error.masked_fill(wrong, float("nan"))
    outputs.loss.copy_(pairs.weight * error * error)
    if outputs.slope.numel():
        outputs.slope.copy_(2 * pairs.weight * error)


def _fill_native(parameters: Parameters, pairs: Pairs, outputs: Outputs) -> None:
    slope = outputs.slope if outputs.slope.numel() else None
    torch.ops.sslkernels_native.glove_fwd(
        pairs.center, pairs.context, *parameters, pairs.target, pairs.weight, outputs.loss, slope
    )


def _fill_triton(parameters: Parameters, pairs: Pairs, outputs: Outputs) -> None:
    from sslkernels.contrastive.triton.glove import glove_fwd as launch_glove_fwd

    launch_glove_fwd(parameters, pairs, outputs)


class Side(NamedTuple):
    """The entries of the segment sums that are the gradients of one table and its bias: see `segment_sum`."""

    keys: Tensor
    coefficient: Tensor
    source: Tensor
    source_index: Tensor

    def fill(self, sum_rows: Callable[..., None], table: Tensor | None, bias: Tensor | None) -> None:
        """Fills the gradients of the table and of the bias, None where not wanted."""
        if table is not None:
            sum_rows(self.keys, self.coefficient, self.source, self.source_index, table, bias)
        elif bias is not None:
            sum_rows(self.keys, self.coefficient, segment_sum.one_row(self.coefficient), None, bias.unsqueeze(1))


def _sides(grad_loss: Tensor, parameters: Parameters, pairs: Pairs, slope: Tensor) -> tuple[Side, Side]:
    """The side of the center's table and the side of the context's."""
    coefficient = grad_loss * slope
    return (
        Side(pairs.center, coefficient, parameters.context_weight, pairs.context),
        Side(pairs.context, coefficient, parameters.center_weight, pairs.center),
    )


def _empty_gradients(parameters: Parameters, wanted: Wanted) -> Parameters:
    return Parameters(*(t.new_empty(t.shape if want else 0) for t, want in zip(parameters, wanted, strict=True)))


def _bwd(
    sum_rows: Callable[..., None],
    grad_loss: Tensor,
    parameters: Parameters,
    pairs: Pairs,
    slope: Tensor,
    wanted: Wanted,
) -> Parameters:
    gradients = _empty_gradients(parameters, wanted)
    filled = wanted_only(gradients, wanted)
    center, context = _sides(grad_loss, parameters, pairs, slope)
    center.fill(sum_rows, filled.center_weight, filled.center_bias)
    context.fill(sum_rows, filled.context_weight, filled.context_bias)
    return gradients


# Rows of the gradients of both tables, and the gradients of both biases, without elements where not wanted.
SparseGradients = tuple[SparseRows, SparseRows, Tensor, Tensor]


def _empty_sparse_gradients(parameters: Parameters, pairs: Pairs, wanted: Wanted) -> SparseGradients:
    count = pairs.center.numel()
    biases = _empty_gradients(parameters, wanted._replace(center_weight=False, context_weight=False))
    return (
        SparseRows.empty(parameters.center_weight, count if wanted.center_weight else 0),
        SparseRows.empty(parameters.context_weight, count if wanted.context_weight else 0),
        biases.center_bias,
        biases.context_bias,
    )


def _sparse_bwd(
    backend: str, grad_loss: Tensor, parameters: Parameters, pairs: Pairs, slope: Tensor, wanted: Wanted
) -> SparseGradients:
    gradients = _empty_sparse_gradients(parameters, pairs, wanted)
    in_center, in_context, center_bias, context_bias = gradients
    center, context = _sides(grad_loss, parameters, pairs, slope)
    sparse_sum, sum_rows = segment_sum.SPARSE_SUMS[backend], segment_sum.SUMS[backend]
    if wanted.center_weight:
        sparse_sum(*center, parameters.center_weight.shape[0], in_center)
    if wanted.context_weight:
        sparse_sum(*context, parameters.context_weight.shape[0], in_context)
    center.fill(sum_rows, None, center_bias if wanted.center_bias else None)
    context.fill(sum_rows, None, context_bias if wanted.context_bias else None)
    return gradients


def _flops(parameters: Parameters, pairs: Pairs) -> int:
    """The dot products of the pairs."""
    return 2 * pairs.center.numel() * parameters.center_weight.shape[1]


def _flops_of_gradients(grad_loss: Tensor, parameters: Parameters, pairs: Pairs, slope: Tensor, wanted: Wanted) -> int:
    return _flops(parameters, pairs) * (wanted.center_weight + wanted.context_weight)


_NATIVE = partial(_fwd, _fill_native)


@operator(
    NAME,
    {
        "reference": partial(_fwd, _fill_reference),
        "cpu": _NATIVE,
        "triton": partial(_fwd, _fill_triton),
        "cuda": _NATIVE,
    },
    native_ops=NATIVE_OPS,
    flops=lambda parameters, pairs, wanted: _flops(parameters, pairs),
)
def glove_fwd(parameters: Parameters, pairs: Pairs, wanted: Wanted) -> Outputs:
    return _empty_outputs(pairs, wanted)


@operator(
    NAME,
    {name: partial(_bwd, sum_rows) for name, sum_rows in segment_sum.SUMS.items()},
    native_ops=NATIVE_OPS,
    flops=_flops_of_gradients,
)
def glove_bwd(grad_loss: Tensor, parameters: Parameters, pairs: Pairs, slope: Tensor, wanted: Wanted) -> Parameters:
    """The gradients of sum(grad_loss * loss), without elements where not wanted."""
    return _empty_gradients(parameters, wanted)


@operator(
    NAME,
    {name: partial(_sparse_bwd, name) for name in segment_sum.SPARSE_SUMS},
    native_ops=NATIVE_OPS,
    flops=_flops_of_gradients,
)
def glove_sparse_bwd(
    grad_loss: Tensor, parameters: Parameters, pairs: Pairs, slope: Tensor, wanted: Wanted
) -> SparseGradients:
    """The same gradients, with only the rows of the tables that are not zero."""
    return _empty_sparse_gradients(parameters, pairs, wanted)


class _PairLosses(Function):
    """The loss of each pair. Forward keeps one number per pair; backward gathers the rows again. grad_output multiplies
    in float32, inside the sums of backward."""

    differentiable = 1

    @staticmethod
    def forward(parameters: Parameters, pairs: Pairs, wanted: Wanted, sparse: bool) -> Outputs:
        return glove_fwd(parameters, pairs, wanted)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        parameters, pairs, ctx.computed, ctx.sparse = inputs
        (losses,) = outputs
        save(ctx, parameters, pairs, losses.slope)

    @staticmethod
    def backward(ctx, grads):
        if grads.loss is None:
            return None
        needs, needs_pairs, *_ = _PairLosses.wanted(ctx)
        wanted = Wanted(*needs)
        if any(needs_pairs):  # under vmap the count hides that an outer transform differentiates it
            _refuse_gradient_of_count()
        if not any(ctx.computed):
            raise RuntimeError(f"{NAME}: forward saw no gradient wanted")
        parameters, pairs, slope = saved(ctx)
        arguments = (grads.loss.contiguous(), parameters, pairs, slope, wanted)
        if not ctx.sparse:
            return (wanted_only(_gradients(*arguments), wanted),)
        in_center, in_context, center_bias, context_bias = _sparse_gradients(*arguments)
        center_weight = in_center.tensor(parameters.center_weight.shape[0]) if wanted.center_weight else None
        context_weight = in_context.tensor(parameters.context_weight.shape[0]) if wanted.context_weight else None
        return (wanted_only(Parameters(center_weight, context_weight, center_bias, context_bias), wanted),)


@once_differentiable(NAME)
def _gradients(grad_loss: Tensor, parameters: Parameters, pairs: Pairs, slope: Tensor, wanted: Wanted) -> Parameters:
    return glove_bwd(grad_loss, parameters, pairs, slope, wanted)


@once_differentiable(NAME)
def _sparse_gradients(
    grad_loss: Tensor, parameters: Parameters, pairs: Pairs, slope: Tensor, wanted: Wanted
) -> SparseGradients:
    return glove_sparse_bwd(grad_loss, parameters, pairs, slope, wanted)


@checks.with_python_numbers
def glove_loss(
    center: Tensor,
    context: Tensor,
    count: Tensor,
    center_weight: Tensor,
    context_weight: Tensor,
    center_bias: Tensor,
    context_bias: Tensor,
    *,
    x_max: float = 100.0,
    alpha: float = 0.75,
    sparse: bool = False,
    reduction: str = "mean",
    on_empty: str = "nan",
) -> Tensor:
    """GloVe: fits inner products of words to the logarithms of how often they occur together.

    With `u = center_weight`, `v = context_weight`, `b = center_bias` and `c = context_bias` the loss of a pair is
    `f(count) (<u[center], v[context]> + b[center] + c[context] - ln(count))^2`, where
    `f(count) = min((count / x_max)^alpha, 1)`. The `(N, D)` rows of the pairs are never materialised, in forward or in
    backward, which keeps one number per pair. The rows of the gradients are summed in float32, in the order of the
    pairs, without atomics.

    Args:
        center: index of each pair's center word `(...)`, int64 or int32.
        context: index of the word that occurs with it, of the shape of `center`.
        count: how often, of the shape of `center`: any float dtype, int64 or int32, and not a tensor that requires
            grad. A count of 0 has weight 0 and adds nothing (the limit of the loss, for `alpha` > 0); a negative one
            gives NaN.
        center_weight: table of center words `(V, D)`; float32, bfloat16, float16 or float64.
        context_weight: table of context words `(V2, D)`, of the dtype of `center_weight` outside autocast; it may be
            the same tensor. Tables and biases may be frozen, each by itself.
        center_bias: bias of each center word `(V,)`, of the dtype of `center_weight` outside autocast.
        context_bias: bias of each context word `(V2,)`, likewise.
        x_max: the count from which on all pairs weigh 1; positive.
        alpha: the power of the weight of smaller counts; 0 or more.
        sparse: the gradients of the two tables are coalesced sparse tensors of the rows that occur, for the optimisers
            that work with `nn.Embedding(sparse=True)`: `SGD`, `SparseAdam`, `Adagrad`. Time and memory then grow with
            the tables no more than the biases do, whose gradients stay dense. Backward reads the number of rows, which
            synchronises on a GPU. Not inside `torch.compile`.
        reduction: "mean" over the pairs, "sum", or "none", of the shape of `center`.
        on_empty: loss of a mean over no pairs: "nan", as in torch, or "zero", with gradients of zero.

    Returns:
        The loss, float32 (float64 for float64 tables).

    Raises:
        TypeError, ValueError: for an argument of the wrong type, dtype, shape or range. An index out of range raises
            `ValueError` on the CPU; on a GPU, where checking would synchronise, the loss of its pair is NaN, and so are
            the gradients of the other row of the pair.

    Source: Pennington, Socher and Manning, "GloVe: global vectors for word representation", EMNLP 2014, equation 8.

    >>> import sslkernels as sk
    >>> u, v = (torch.randn(1000, 16, requires_grad=True) for _ in range(2))
    >>> b, c = (torch.zeros(1000, requires_grad=True) for _ in range(2))
    >>> center, context = torch.tensor([3, 14]), torch.tensor([15, 92])
    >>> sk.glove_loss(center, context, torch.tensor([7.0, 1.5]), u, v, b, c).backward()
    """
    parameters = Parameters(center_weight, context_weight, center_bias, context_bias)
    _check(center, context, count, parameters)
    checks.number(NAME, "x_max", x_max, low=0, high=checks.LARGEST, low_open=True)
    checks.number(NAME, "alpha", alpha, low=0, high=checks.LARGEST)
    checks.boolean(NAME, "sparse", sparse)
    checks.choice(NAME, "reduction", reduction, ("none", "mean", "sum"))
    checks.choice(NAME, "on_empty", on_empty, ("nan", "zero"))
    if sparse and torch.compiler.is_compiling():
        raise NotImplementedError(f"{NAME}: sparse=True is not supported inside torch.compile; use sparse=False")
    dtype = center_weight.dtype
    for other in parameters:  # they differ under autocast alone
        dtype = dtype if other.dtype == dtype else torch.promote_types(dtype, other.dtype)
    parameters = Parameters(*(t.to(dtype).contiguous() for t in parameters))
    shape, index = center.shape, torch.promote_types(center.dtype, context.dtype)
    center, context = (t.reshape(-1).to(index).contiguous() for t in (center, context))
    pairs = Pairs(center, context, *_targets(count.reshape(-1), x_max, alpha, accumulation_dtype(dtype)))
    wanted = Wanted(*map(may_want_gradient, parameters))
    loss = _PairLosses.run(parameters, pairs, wanted, sparse).loss
    if reduction == "none":
        return loss.reshape(shape)
    if reduction == "sum" or (on_empty == "zero" and loss.numel() == 0):
        return loss.sum()
    return loss.mean()


def _targets(count: Tensor, x_max: float, alpha: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(logarithm, weight) of each count in `dtype`; a logarithm of 0 where a count of 0 has weight 0."""
    count = count.to(torch.float64 if count.dtype == torch.float64 else dtype)
    # A tensor, since torch.compile makes a constant of a Python number as an exponent.
    weight = (count / x_max).pow(full((), alpha, count.dtype, count.device)).clamp(max=1)
    nothing = (count == 0) & (weight == 0)
    return count.log().masked_fill(nothing, 0).to(dtype).contiguous(), weight.to(dtype).contiguous()


def _refuse_gradient_of_count() -> None:
    checks.fail(ValueError, NAME, "count", "be data, without a gradient", "a tensor that requires grad")


def _check(center: Tensor, context: Tensor, count: Tensor, parameters: Parameters) -> None:
    checks.tensor(NAME, "center", center, checks.INDEX_DTYPES)
    checks.tensor(NAME, "context", context, checks.INDEX_DTYPES)
    checks.shape(NAME, "context", context, center.shape, "center.shape")
    checks.tensor(NAME, "count", count, (*checks.FLOAT_DTYPES, *checks.INDEX_DTYPES))
    checks.shape(NAME, "count", count, center.shape, "center.shape")
    if count.requires_grad:
        _refuse_gradient_of_count()
    for name, value in parameters._asdict().items():
        checks.tensor(NAME, name, value, checks.FLOAT_DTYPES)
    center_weight, context_weight, center_bias, context_bias = parameters
    checks.dims(NAME, "center_weight", center_weight, 2, "(V, D)", high=2)
    checks.dims(NAME, "context_weight", context_weight, 2, "(V2, D)", high=2)
    checks.shape(NAME, "context_weight", context_weight, (context_weight.shape[0], center_weight.shape[1]), "(V2, D)")
    checks.shape(NAME, "center_bias", center_bias, center_weight.shape[:1], "(V,)")
    checks.shape(NAME, "context_bias", context_bias, context_weight.shape[:1], "(V2,)")
    for name, table in (("center_weight", center_weight), ("context_weight", context_weight)):
        if table.shape[0] == 0:
            checks.fail(ValueError, NAME, name, "have at least one row", tuple(table.shape))
    others = {"context": context, "count": count} | parameters._asdict()
    for name, value in others.items():
        checks.same_device(NAME, name, value, "center", center.device)
    if checks.autocast(center.device):
        return
    for name, value in parameters._asdict().items():
        if value.dtype != center_weight.dtype:
            must = f"have the dtype of center_weight, {center_weight.dtype}, outside autocast"
            checks.fail(TypeError, NAME, name, must, value.dtype)
