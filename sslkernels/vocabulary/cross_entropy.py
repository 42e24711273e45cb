"""Cross-entropy on logits, a drop-in for `torch.nn.functional.cross_entropy`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy as torch_cross_entropy  # a user may patch F.cross_entropy with ours

from sslkernels.core import checks
from sslkernels.core.autograd import Function, once_differentiable, save, saved
from sslkernels.core.dtypes import accumulation_dtype, contiguous
from sslkernels.core.operator import operator
from sslkernels.core.overloads import returns_stats
from sslkernels.core.scale import scaled
from sslkernels.vocabulary.reduction import (
    check_probabilities,
    check_reduction,
    check_token_weight,
    check_weight,
    mean_divisor,
    reduced,
)
from sslkernels.vocabulary.softmax_rows import (
    NativeRows,
    ReferenceRows,
    RowOptions,
    RowOutputs,
    Rows,
    RowState,
    TritonRows,
    check_target_range,
    comparable_target,
    empty_outputs,
)

NAME = "cross_entropy"
# Backends whose forward kernel emits the gradient in the same pass: keeping it saves a second read of the logits.
KEEPING_BACKENDS = ("cuda",)


class CrossEntropyStats(NamedTuple):
    """Per-row statistics of the logits, detached, of the shape of the target.

    lse: log-sum-exp; logprob: log-probability of the target; prediction: index of the largest logit, ties going to the
    lowest (int64); correct: prediction equals target (bool); entropy: entropy of the softmax, in nats. Ignored rows are
    not computed: they hold 0, prediction -1, correct False. The prediction of a row with a NaN is arbitrary.
    """

    lse: Tensor
    logprob: Tensor
    prediction: Tensor
    correct: Tensor
    entropy: Tensor


def _implementations(function: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    native = partial(function, NativeRows())
    return {
        "reference": partial(function, ReferenceRows()),
        "cpu": native,
        "cuda": native,
        "triton": partial(function, TritonRows()),
    }


def _factor(coefficient: Tensor, options: RowOptions) -> Tensor:
    """coefficient * logit_scale, because the row kernels' gradient is with respect to the scaled logits."""
    return coefficient if options.logit_scale == 1.0 else coefficient * options.logit_scale


def _empty_gradient(logits: Tensor) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _fwd(
    rows: Rows,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    coefficient: Tensor | None,
    options: RowOptions,
    stats: bool,
) -> tuple[RowOutputs, Tensor]:
    grad = None if coefficient is None else _empty_gradient(logits)
    coefficient = None if coefficient is None else _factor(coefficient, options)
    outputs = rows.forward(logits, target, None, weight, options, stats=stats, coefficient=coefficient, grad=grad)
    check_target_range(NAME, outputs.loss, target, logits.shape[1], options.ignore_index)
    return outputs, logits.new_empty(0) if grad is None else grad


def _bwd(
    rows: Rows,
    grad_loss: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    state: RowState,
    options: RowOptions,
) -> Tensor:
    grad = _empty_gradient(logits)
    rows.backward(logits, target, None, weight, options, state, _factor(grad_loss, options), grad)
    return grad


@operator(NAME, _implementations(_fwd), native_ops=NativeRows.OPS)
def cross_entropy_fwd(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    coefficient: Tensor | None,
    options: RowOptions,
    stats: bool,
) -> tuple[RowOutputs, Tensor]:
    """The outputs and, given a coefficient, the gradient of sum(coefficient * loss), in one pass over the logits."""
    grad = logits.new_empty(0) if coefficient is None else _empty_gradient(logits)
    return empty_outputs(logits, logits.shape[0], stats), grad


@operator(NAME, _implementations(_bwd), native_ops=NativeRows.OPS)
def cross_entropy_bwd(
    grad_loss: Tensor, logits: Tensor, target: Tensor, weight: Tensor | None, state: RowState, options: RowOptions
) -> Tensor:
    return _empty_gradient(logits)


class _RowLosses(Function):
    """Per-row losses and statistics; saves the logits and three numbers per row."""

    differentiable = 1

    @staticmethod
    def forward(logits: Tensor, target: Tensor, weight: Tensor | None, options: RowOptions, stats: bool) -> RowOutputs:
        rows, _ = cross_entropy_fwd(logits, target, weight, None, options, stats)
        return rows

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        logits, target, weight, ctx.options, _ = inputs
        (rows,) = outputs
        save(ctx, logits, target, weight, rows.state)

    @staticmethod
    def backward(ctx, grads):
        if grads.loss is None:
            return None
        return (_row_gradients(grads.loss.contiguous(), *saved(ctx), ctx.options),)


@once_differentiable(NAME, "use F.cross_entropy for it")
def _row_gradients(
    grad_loss: Tensor, logits: Tensor, target: Tensor, weight: Tensor | None, state: RowState, options: RowOptions
) -> Tensor:
    return cross_entropy_bwd(grad_loss, logits, target, weight, state, options)


class _ReducedLoss(Function):
    """sum(loss), or sum(loss) / divisor; backward regenerates the gradient. Separate graph nodes for the sum and the
    division would take as long as the kernels at small sizes."""

    differentiable = 1

    @staticmethod
    def forward(
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        divisor: Tensor | None,
        options: RowOptions,
        stats: bool,
    ) -> tuple[Tensor, RowOutputs]:
        rows, _ = cross_entropy_fwd(logits, target, weight, None, options, stats)
        loss = rows.loss.sum()
        return loss if divisor is None else loss / divisor, rows

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        logits, target, weight, divisor, ctx.options, _ = inputs
        _, rows = outputs
        save(ctx, logits, target, weight, divisor, rows.state)

    @staticmethod
    def backward(ctx, grad_loss, _):
        if grad_loss is None:
            return None
        logits, target, weight, divisor, state = saved(ctx)
        coefficient = grad_loss.expand(target.shape)
        coefficient = (coefficient if divisor is None else coefficient / divisor).contiguous()
        return (_row_gradients(coefficient, logits, target, weight, state, ctx.options),)


class _KeptLoss(Function):
    """`_ReducedLoss` whose gradient is computed in the same pass over the logits and kept.

    This reads the logits once, where separate passes for loss and gradient read them twice. The logits need not live
    until backward: `anchor`, an empty tensor that depends on them, takes their place in the graph, so that double
    backward raises.
    """

    differentiable = 1

    @staticmethod
    def forward(
        logits: Tensor,
        anchor: Tensor,
        target: Tensor,
        weight: Tensor | None,
        divisor: Tensor | None,
        options: RowOptions,
        stats: bool,
    ) -> tuple[Tensor, RowOutputs, Tensor]:
        coefficient = torch.ones_like(target, dtype=accumulation_dtype(logits.dtype))
        if divisor is not None:
            coefficient = coefficient / divisor
        rows, grad = cross_entropy_fwd(logits, target, weight, coefficient, options, stats)
        loss = rows.loss.sum()
        return loss if divisor is None else loss / divisor, rows, grad

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        _, anchor, *_ = inputs
        _, _, grad = outputs
        save(ctx, anchor, grad)

    @staticmethod
    def backward(ctx, grad_loss, *_):
        if grad_loss is None:
            return None
        anchor, grad = saved(ctx)
        return (_kept_gradient(grad, grad_loss, grad.dtype, anchor),)


@once_differentiable(NAME, "use F.cross_entropy for it")
def _kept_gradient(gradient: Tensor, scale: Tensor, dtype: torch.dtype, anchor: Tensor) -> Tensor:
    return scaled(gradient, scale, dtype, saved=True)


def _keeps_gradient(logits: Tensor) -> bool:
    """Whether backward is likely to follow, and the kernel computes the gradient in the same pass.

    Not in float16, where the gradient of a mean over many rows underflows until grad_output is multiplied in; nor while
    saved tensors are hooked, as by activation checkpointing, whose first forward would compute it in vain.
    """
    return (
        not torch.compiler.is_compiling()
        and cross_entropy_fwd.choose(logits.device) in KEEPING_BACKENDS
        and not torch._C._functorch.is_functorch_wrapped_tensor(logits)
        and torch.is_grad_enabled()
        and logits.requires_grad
        and torch._C._autograd._top_saved_tensors_default_hooks(True) is None
        and logits.dtype in (torch.float32, torch.bfloat16)
    )


@checks.with_python_numbers
@returns_stats(Tensor, CrossEntropyStats)
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    token_weight: Tensor | None = None,
    num_items: int | Tensor | None = None,
    class_dim: int | None = None,
    on_empty: str = "nan",
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, CrossEntropyStats]:
    """Cross-entropy between logits and targets; a drop-in for `torch.nn.functional.cross_entropy`.

    Log-probabilities are never materialised: backward recomputes the gradient from the logits and three numbers per
    row. On the cuda backend, with reduction "mean" or "sum" and float32 or bfloat16 logits, the same pass also computes
    the gradient, so that the logits are read once; it is kept, in their dtype, until backward.

    Args:
        input: logits `(N, V)` or `(V,)`; `(N, V, d1, ...)` as in torch; or `(..., V)` with a target `(...)`, if the
            shapes do not fit torch's convention or `class_dim` says so. float32, bfloat16, float16 or float64.
        target: class indices of the shape of `input` without its class dimension, int64 or int32; or class
            probabilities of the shape of `input`, which torch's own cross-entropy handles.
        weight: weight of each class `(V,)`.
        ignore_index: rows with this target do not contribute to the loss, the gradient or the divisor.
        reduction: "mean" divides by the sum of the class weights of the valid rows (class probabilities: their number)
            or by `num_items`; "sum"; or "none", which returns the shape of the target.
        label_smoothing: in [0, 1]; the fraction of the target probability that is distributed over all classes.
        z_loss: adds `z_loss * logsumexp(logits)**2` to each row (PaLM, Chowdhery et al. 2022, section 5); this part of
            a mean is divided by the number of valid rows or by `num_items`, whatever the class weights.
        softcap: replaces the logits by `softcap * tanh(logits / softcap)` (Gemma 2, 2024); None or infinity: none.
        logit_scale: multiplies the logits before the softcap.
        token_weight: float tensor of the shape of the row losses, multiplies the loss of each row; not part of the
            divisor of "mean". Differentiable.
        num_items: int or 0-d tensor, overrides the divisor of "mean" (for gradient accumulation).
        class_dim: dimension of `input` that holds the classes. None: the second one (the only one of `(V,)`) if
            `target` fits that, else the last one.
        on_empty: loss of a mean over no valid rows: "nan", as in torch, or "zero", with gradients of zero.
        return_stats: also return `CrossEntropyStats`, from the same pass.

    Returns:
        The loss, float32 (float64 for float64 logits); with `return_stats` the pair (loss, statistics).

    Raises:
        TypeError, ValueError: for an argument of the wrong type, dtype, shape or range. A target out of range raises
            `ValueError` on the CPU; on a GPU, where the check would synchronise, the loss of its row is NaN.

    >>> import sslkernels as sk
    >>> logits = torch.randn(4, 1000, requires_grad=True)
    >>> sk.cross_entropy(logits, torch.tensor([3, -100, 7, 999])).backward()
    """
    checks.tensor(NAME, "input", input, checks.FLOAT_DTYPES)
    checks.dims(NAME, "input", input, 1, "(V,), (N, V), (N, V, d1, ...) or (..., V)")
    checks.tensor(NAME, "target", target, (*checks.INDEX_DTYPES, *checks.FLOAT_DTYPES))
    checks.same_device(NAME, "target", target, "input", input.device)
    class_dim = _class_dim(input, target, class_dim)
    vocab = input.shape[class_dim]
    if vocab == 0:
        checks.fail(ValueError, NAME, "input", "have at least one class", tuple(input.shape))
    rows_shape = (*input.shape[:class_dim], *input.shape[class_dim + 1 :])
    check_weight(NAME, weight, vocab, input.device)
    check_token_weight(NAME, token_weight, rows_shape, input.device, "input.shape without class_dim")
    check_reduction(NAME, reduction, num_items, on_empty, input.device)
    checks.boolean(NAME, "return_stats", return_stats)
    options = RowOptions.checked(
        NAME,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
        logit_scale=logit_scale,
    )
    if target.is_floating_point():
        check_probabilities(NAME, ignore_index, return_stats)

    logits = input
    if input.dim() != 2:
        logits = input.movedim(class_dim, -1).reshape(-1, vocab)
    elif class_dim == 0:
        logits = input.t()
    if target.is_floating_point():
        targets = target if target.dim() == 2 and class_dim == 1 else target.movedim(class_dim, -1).reshape(-1, vocab)
    else:
        targets = comparable_target(target if target.dim() == 1 else target.reshape(-1), ignore_index).contiguous()
    divisor = None
    if reduction == "mean":
        acc = accumulation_dtype(logits.dtype)
        divisor, weight = mean_divisor(targets, weight, vocab, options, num_items, on_empty, acc)
    if target.is_floating_point():
        losses = _probability_losses(logits, targets, weight, options)
        return reduced(losses, token_weight, divisor, reduction, rows_shape)

    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    weight = contiguous(weight)
    if reduction == "none" or token_weight is not None:
        outputs = _RowLosses.run(logits, targets, weight, options, return_stats)
        loss = reduced(outputs.loss, token_weight, divisor, reduction, rows_shape)
    elif _keeps_gradient(logits):
        anchor = logits[:0].clone()
        loss, outputs, _ = _KeptLoss.run(logits, anchor, targets, weight, divisor, options, return_stats)
    else:
        loss, outputs = _ReducedLoss.run(logits, targets, weight, divisor, options, return_stats)
    if not return_stats:
        return loss
    return loss, row_stats(targets, outputs, ignore_index, rows_shape)


def _class_dim(input: Tensor, target: Tensor, class_dim: int | None) -> int:
    """Finds the class dimension, and checks the shape of the target against it."""
    dims = input.dim()
    checks.integer(NAME, "class_dim", class_dim, optional=True)
    if class_dim is not None and not -dims <= class_dim < dims:
        checks.fail(ValueError, NAME, "class_dim", f"be in [{-dims}, {dims}) for input of {dims} dimensions", class_dim)
    found = min(1, dims - 1) if class_dim is None else class_dim % dims
    if target.is_floating_point():
        checks.shape(NAME, "target (class probabilities)", target, input.shape, "input.shape")
        return found
    expected = (*input.shape[:found], *input.shape[found + 1 :])
    if tuple(target.shape) == expected:
        return found
    if class_dim is None and tuple(target.shape) == tuple(input.shape[:-1]):
        return dims - 1
    checks.fail(
        ValueError,
        NAME,
        "target",
        f"have shape {expected} (or {tuple(input.shape)}, for class probabilities)",
        tuple(target.shape),
    )


def row_stats(target: Tensor, rows: RowOutputs, ignore_index: int, shape: torch.Size) -> CrossEntropyStats:
    correct = (rows.prediction == target) & (target != ignore_index)
    lse = rows.row_max + rows.sum_exp.log()
    parts = (lse, rows.logprob, rows.prediction, correct, rows.entropy)
    return CrossEntropyStats(*(part.detach().reshape(shape) for part in parts))


def _probability_losses(input: Tensor, target: Tensor, weight: Tensor | None, options: RowOptions) -> Tensor:
    """Class probabilities (N, V) as target: torch's own cross-entropy in the accumulation dtype."""
    acc = accumulation_dtype(input.dtype)
    logits = input.to(acc)
    if options.logit_scale != 1.0:
        logits = logits * options.logit_scale
    if options.softcap > 0:
        logits = options.softcap * torch.tanh(logits / options.softcap)
    loss = torch_cross_entropy(
        logits,
        target.to(acc),
        None if weight is None else weight.to(acc),
        reduction="none",
        label_smoothing=options.label_smoothing,
    )
    return loss + options.z_loss * logits.logsumexp(1).square() if options.z_loss > 0 else loss
