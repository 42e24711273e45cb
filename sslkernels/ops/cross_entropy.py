"""Cross-entropy on logits, a drop-in for `torch.nn.functional.cross_entropy`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from sslkernels import checks
from sslkernels.dispatch import PREFERENCE, Op
from sslkernels.ops import kept_gradient
from sslkernels.ops.rows import (
    NativeRows,
    ReferenceRows,
    RowOptions,
    RowOutputs,
    Rows,
    TritonRows,
    accumulation_dtype,
    check_target_range,
    empty_outputs,
)

# Those whose kernel makes the gradient without reading the logits once more: a saved gradient saves them a pass.
KEEPING_BACKENDS = ("cuda",)


class CrossEntropyStats(NamedTuple):
    """Per-row statistics of the logits, detached, of the shape of the target.

    lse: log-sum-exp; logprob: log-probability of the target; prediction: the lowest index of the largest logit (int64);
    correct: prediction equals target (bool); entropy: of the softmax, in nats. Rows whose target is `ignore_index` are
    not computed: they hold 0, prediction -1, correct False. Where a row holds a NaN, its prediction is some index.
    """

    lse: Tensor
    logprob: Tensor
    prediction: Tensor
    correct: Tensor
    entropy: Tensor


def _fwd(
    rows: Rows,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    stats: bool,
) -> RowOutputs:
    check_target_range("cross_entropy", target, logits.shape[1], ignore_index)
    options = RowOptions(ignore_index, label_smoothing, z_loss, softcap)
    return rows.forward(logits, target, None, weight, options, stats=stats)


def _bwd(
    rows: Rows,
    grad_loss: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    row_max: Tensor,
    sum_exp: Tensor,
    logprob: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> Tensor:
    options = RowOptions(ignore_index, label_smoothing, z_loss, softcap)
    state = RowOutputs(grad_loss, row_max, sum_exp, logprob, *empty_outputs(logits, 0, False)[4:])
    grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
    rows.backward(logits, target, None, weight, options, state, grad_loss, grad)
    return grad


def _grad(
    rows: Rows,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    coefficient: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    stats: bool,
) -> tuple[Tensor, ...]:
    check_target_range("cross_entropy", target, logits.shape[1], ignore_index)
    options = RowOptions(ignore_index, label_smoothing, z_loss, softcap)
    grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
    outputs = rows.forward(logits, target, None, weight, options, stats=stats, coefficient=coefficient, grad=grad)
    return (*outputs, grad)


def _implementations(function: Callable[..., Any]) -> dict[str, Callable[..., Any] | str]:
    native = partial(function, NativeRows())
    return {
        "reference": partial(function, ReferenceRows()),
        "cpu": native,
        "cuda": native,
        "triton": partial(function, TritonRows()),
    }


cross_entropy_fwd = Op(
    "cross_entropy",
    "cross_entropy_fwd(Tensor logits, Tensor target, Tensor? weight, int ignore_index, float label_smoothing, "
    "float z_loss, float softcap, bool stats) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=lambda logits, target, weight, ignore_index, label_smoothing, z_loss, softcap, stats: empty_outputs(
        logits, logits.shape[0], stats
    ),
    implementations=_implementations(_fwd),
    native_ops=NativeRows.OPS,
    prefer=PREFERENCE,
)
cross_entropy_bwd = Op(
    "cross_entropy",
    "cross_entropy_bwd(Tensor grad_loss, Tensor logits, Tensor target, Tensor? weight, Tensor row_max, Tensor sum_exp, "
    "Tensor logprob, int ignore_index, float label_smoothing, float z_loss, float softcap) -> Tensor",
    fake=lambda grad_loss, logits, *rest: torch.empty_like(logits, memory_format=torch.contiguous_format),
    implementations=_implementations(_bwd),
    native_ops=NativeRows.OPS,
    prefer=PREFERENCE,
)


cross_entropy_grad = Op(
    "cross_entropy",
    "cross_entropy_grad(Tensor logits, Tensor target, Tensor? weight, Tensor coefficient, int ignore_index, "
    "float label_smoothing, float z_loss, float softcap, bool stats) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=lambda logits, *rest: (
        *empty_outputs(logits, logits.shape[0], rest[-1]),
        torch.empty_like(logits, memory_format=torch.contiguous_format),
    ),
    implementations=_implementations(_grad),
    native_ops=NativeRows.OPS,
    prefer=PREFERENCE,
)


class _CrossEntropy(Function):
    """Per-row losses and statistics; saves the logits and three numbers a row."""

    generate_vmap_rule = True

    @staticmethod
    def forward(logits, target, weight, ignore_index, label_smoothing, z_loss, softcap, stats):
        return cross_entropy_fwd(logits, target, weight, ignore_index, label_smoothing, z_loss, softcap, stats)

    @staticmethod
    def setup_context(ctx, inputs, output):
        logits, target, weight, *ctx.options, _ = inputs
        _, row_max, sum_exp, logprob, prediction, entropy = output
        ctx.mark_non_differentiable(row_max, sum_exp, logprob, prediction, entropy)
        ctx.save_for_backward(logits, target, weight, row_max, sum_exp, logprob)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad_loss, *_):
        grad = None
        if grad_loss is not None:
            grad = _CrossEntropyBackward.apply(grad_loss.contiguous(), *ctx.saved_tensors, *ctx.options)
        return grad, None, None, None, None, None, None, None


class _CrossEntropyBackward(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        grad_loss, logits, target, weight, row_max, sum_exp, logprob, ignore_index, label_smoothing, z_loss, softcap
    ):
        return cross_entropy_bwd(
            grad_loss, logits, target, weight, row_max, sum_exp, logprob, ignore_index, label_smoothing, z_loss, softcap
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError("cross_entropy: double backward is not supported; use F.cross_entropy for it")


class _ReducedCrossEntropy(Function):
    """sum(loss), or that / divisor; its gradient is computed in the same pass over the logits and kept.

    The logits are read once and the gradient is written once, where a pass for the loss and another for the gradient
    read them twice. They need not live until backward: `anchor`, an empty tensor that depends on them, stands for them
    where the gradient is differentiated again, which raises.
    """

    @staticmethod
    def forward(logits, anchor, target, weight, divisor, ignore_index, label_smoothing, z_loss, softcap, stats):
        coefficient = torch.ones_like(target, dtype=accumulation_dtype(logits.dtype))
        if divisor is not None:
            coefficient = coefficient / divisor
        rows, *rest = cross_entropy_grad(
            logits, target, weight, coefficient, ignore_index, label_smoothing, z_loss, softcap, stats
        )
        loss = rows.sum()
        return (loss if divisor is None else loss / divisor, *rest)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(inputs[1], output[-1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad_loss, *_):
        grad = None
        if grad_loss is not None:
            anchor, kept = ctx.saved_tensors
            grad = kept_gradient.kept("cross_entropy", kept, grad_loss, kept.dtype, anchor)
        return grad, *(None,) * 9


def _keeps_gradient(logits: Tensor, reduction: str) -> bool:
    """Whether backward follows at once, as far as can be seen, and the kernel makes the gradient in the same pass.

    Not in float16, where the gradient of a mean over many rows is only exact with grad_output multiplied in; nor where
    saved tensors are hooked, as by activation checkpointing, whose first forward would make it for nothing.
    """
    return (
        not torch.compiler.is_compiling()
        and not torch._C._functorch.is_functorch_wrapped_tensor(logits)
        and torch.is_grad_enabled()
        and logits.requires_grad
        and torch._C._autograd._top_saved_tensors_default_hooks(True) is None
        and reduction != "none"
        and logits.dtype in (torch.float32, torch.bfloat16)
        and cross_entropy_grad.choose(logits.device) in KEEPING_BACKENDS
    )


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
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, CrossEntropyStats]:
    """Cross-entropy between logits and targets; a drop-in for `torch.nn.functional.cross_entropy`.

    No log-probabilities are kept: backward regenerates the gradient from the logits and three numbers a row. On the
    cuda backend the loss of reduction "mean" or "sum" of float32 or bfloat16 logits has its gradient computed in the
    same pass, which reads the logits once; it is kept, in their dtype, until backward.

    Args:
        input: logits `(N, V)` or `(V,)`; `(N, V, d1, ...)` as in torch; or `(..., V)` with a target `(...)`, where
            torch's reading of the shapes does not fit. float32, bfloat16, float16 or float64.
        target: class indices `(N,)`, `()`, `(N, d1, ...)` or `(...)`, int64 or int32; or class probabilities of the
            shape of `input`, which take torch's own path.
        weight: weight of each class `(V,)`.
        ignore_index: a target that adds nothing to the loss, the gradient or the divisor.
        reduction: "mean" divides by the sum of the class weights of the valid rows (NaN where there are none), "sum",
            or "none", of the shape of the target.
        label_smoothing: in [0, 1]; the part of the target spread over all classes.
        z_loss: adds `z_loss * logsumexp(logits)**2` to each row (PaLM, Chowdhery et al. 2022, section 5).
        softcap: replaces the logits by `softcap * tanh(logits / softcap)` (Gemma 2, 2024).
        return_stats: also return `CrossEntropyStats`, from the same pass.

    Returns:
        The loss, float32 (float64 for float64 logits); with `return_stats` the pair (loss, statistics).

    Raises:
        TypeError, ValueError: for an argument of the wrong type, dtype, shape or range. A target out of range raises
            `ValueError` on the CPU; on a GPU, where checking would synchronise, the loss of its row is NaN.

    >>> import sslkernels as sk
    >>> logits = torch.randn(4, 1000, requires_grad=True)
    >>> sk.cross_entropy(logits, torch.tensor([3, -100, 7, 999])).backward()
    """
    name = "cross_entropy"
    checks.tensor(name, "input", input, checks.FLOAT_DTYPES)
    checks.dims(name, "input", input, 1, "(V,), (N, V), (N, V, d1, ...) or (..., V)")
    checks.tensor(name, "target", target, (*checks.INDEX_DTYPES, *checks.FLOAT_DTYPES))
    checks.same_device(name, "target", target, "input", input.device)
    class_dim = 1 if input.dim() > 1 else 0
    if target.is_floating_point():
        checks.shape(name, "target (class probabilities)", target, input.shape, "that of input")
    else:
        torch_shape = (*input.shape[:class_dim], *input.shape[class_dim + 1 :])
        if tuple(target.shape) != torch_shape and tuple(target.shape) == tuple(input.shape[:-1]):
            class_dim = input.dim() - 1
        elif tuple(target.shape) != torch_shape:
            must = f"have shape {torch_shape} (or that of input, for class probabilities)"
            checks.fail(ValueError, name, "target", must, tuple(target.shape))
    vocab = input.shape[class_dim]
    check_options(name, vocab, input.device, weight, reduction, ignore_index, label_smoothing, z_loss, softcap)
    cap = 0.0 if softcap is None else float(softcap)

    if target.is_floating_point():
        if return_stats:
            checks.fail(ValueError, name, "return_stats", "be False with class probabilities", True)
        return _with_probabilities(input, target, weight, ignore_index, reduction, label_smoothing, z_loss, cap)

    logits = input.movedim(class_dim, -1).reshape(-1, vocab)
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    rows = target.reshape(-1).contiguous()
    options = (ignore_index, float(label_smoothing), float(z_loss), cap, return_stats)
    divisor = None
    if reduction == "mean":
        divisor = valid_weight(rows, weight, vocab, ignore_index, accumulation_dtype(logits.dtype))
    if _keeps_gradient(logits, reduction):
        anchor = logits[:0].clone()
        loss, *state, _ = _ReducedCrossEntropy.apply(logits, anchor, rows, contiguous(weight), divisor, *options)
    else:
        loss, *state = _CrossEntropy.apply(logits, rows, contiguous(weight), *options)
        loss = loss.reshape(target.shape) if reduction == "none" else loss.sum()
        if divisor is not None:
            loss = loss / divisor
    if not return_stats:
        return loss
    return loss, row_stats(rows, *state, ignore_index, target.shape)


def contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def check_options(
    name: str,
    vocab: int,
    device: torch.device,
    weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
) -> None:
    """Checks what `cross_entropy` and `linear_cross_entropy` have in common."""
    checks.tensor(name, "weight", weight, checks.FLOAT_DTYPES, optional=True)
    checks.shape(name, "weight", weight, (vocab,), "(V,)")
    checks.same_device(name, "weight", weight, "input", device)
    if weight is not None and weight.requires_grad:
        checks.fail(ValueError, name, "weight", "not require grad (class weights are constants)", "requires_grad=True")
    checks.choice(name, "reduction", reduction, ("none", "mean", "sum"))
    checks.integer(name, "ignore_index", ignore_index)
    checks.number(name, "label_smoothing", label_smoothing, low=0.0, high=1.0)
    checks.number(name, "z_loss", z_loss, low=0.0)
    if softcap is not None:
        checks.number(name, "softcap", softcap, low=0.0, low_open=True)


def valid_weight(target: Tensor, weight: Tensor | None, vocab: int, ignore_index: int, dtype: torch.dtype) -> Tensor:
    """The divisor of "mean": the sum of the class weights of the rows that are not ignored."""
    valid = target != ignore_index
    if weight is None:
        return valid.sum().to(dtype)
    index = torch.where(valid, target, 0).clamp(0, vocab - 1).long()
    return torch.where(valid, weight.to(dtype)[index], 0).sum()


def row_stats(
    target: Tensor,
    row_max: Tensor,
    sum_exp: Tensor,
    logprob: Tensor,
    prediction: Tensor,
    entropy: Tensor,
    ignore_index: int,
    shape: torch.Size,
) -> CrossEntropyStats:
    correct = (prediction == target) & (target != ignore_index)
    parts = (row_max + sum_exp.log(), logprob, prediction, correct, entropy)
    return CrossEntropyStats(*(part.detach().reshape(shape) for part in parts))


def _with_probabilities(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> Tensor:
    """Class probabilities: torch's own cross-entropy in the accumulation dtype."""
    acc = accumulation_dtype(input.dtype)
    logits = input.to(acc)
    if softcap > 0:
        logits = softcap * torch.tanh(logits / softcap)
    class_dim = 1 if input.dim() > 1 else 0
    loss = F.cross_entropy(
        logits,
        target.to(acc),
        None if weight is None else weight.to(acc),
        ignore_index=ignore_index,
        reduction="none",
        label_smoothing=label_smoothing,
    )
    if z_loss > 0:
        loss = loss + z_loss * logits.logsumexp(class_dim).square()
    if reduction == "none":
        return loss
    # torch divides the mean by the number of rows here, whatever the class weights are.
    return loss.sum() if reduction == "sum" else loss.sum() / loss.numel()
