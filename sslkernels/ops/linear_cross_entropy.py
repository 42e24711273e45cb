"""Cross-entropy of a linear projection, without its logits ever existing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from sslkernels import checks
from sslkernels.ops.cross_entropy import (
    CrossEntropyStats,
    check_options,
    contiguous,
    row_stats,
    valid_weight,
)
from sslkernels.ops.kept_gradient import kept, scaled
from sslkernels.ops.linear_operators import (
    NAME,
    linear_cross_entropy_bwd,
    linear_cross_entropy_fwd,
)
from sslkernels.ops.rows import accumulation_dtype


class _RowLosses(Function):
    """Per-row losses and statistics, "compact": backward computes the logits again (four matmuls in all)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        input, linear_weight, linear_bias, target, weight, compute_dtype,
        ignore_index, label_smoothing, z_loss, softcap, logit_scale, capacity, workspace_bytes, stats,
    ):  # fmt: skip
        return linear_cross_entropy_fwd(
            input, linear_weight, target, linear_bias, weight, None, compute_dtype,
            ignore_index, label_smoothing, z_loss, softcap, logit_scale, capacity, workspace_bytes,
            False, False, False, stats,
        )[:6]  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, linear_weight, linear_bias, target, weight, *ctx.options, _ = inputs
        _, row_max, sum_exp, logprob, prediction, entropy = output
        ctx.mark_non_differentiable(row_max, sum_exp, logprob, prediction, entropy)
        ctx.save_for_backward(input, linear_weight, linear_bias, target, weight, row_max, sum_exp, logprob)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad_loss, *_):
        wanted = ctx.needs_input_grad[:3]
        grads = (None, None, None)
        if grad_loss is not None:
            grads = _RowLossesBackward.apply(grad_loss.contiguous(), *ctx.saved_tensors, *ctx.options, *wanted)
        return *(grad if want else None for grad, want in zip(grads, wanted, strict=True)), *(None,) * 11


class _RowLossesBackward(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        grad_loss, input, linear_weight, linear_bias, target, weight, row_max, sum_exp, logprob, compute_dtype,
        ignore_index, label_smoothing, z_loss, softcap, logit_scale, capacity, workspace_bytes,
        want_input, want_weight, want_bias,
    ):  # fmt: skip
        *grads, scale = linear_cross_entropy_bwd(
            grad_loss, input, linear_weight, target, linear_bias, weight, row_max, sum_exp, logprob, compute_dtype,
            ignore_index, label_smoothing, z_loss, softcap, logit_scale, capacity, workspace_bytes,
            want_input, want_weight, want_bias,
        )  # fmt: skip
        dtypes = (input.dtype, linear_weight.dtype, input.dtype if linear_bias is None else linear_bias.dtype)
        return tuple(scaled(grad, scale, dtype) for grad, dtype in zip(grads, dtypes, strict=True))

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError(f"{NAME}: double backward is not supported")


class _ReducedLoss(Function):
    """sum(token_weight * loss) / divisor, "fast": its gradients are computed with it and kept (three matmuls in all).

    Backward multiplies them by grad_output; what it needs and forward was not asked for is an error, never a zero.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        input, linear_weight, linear_bias, target, weight, token_weight, divisor, compute_dtype,
        ignore_index, label_smoothing, z_loss, softcap, logit_scale, capacity, workspace_bytes,
        want_input, want_weight, want_bias, stats,
    ):  # fmt: skip
        acc = accumulation_dtype(input.dtype)
        coefficient = torch.ones_like(target, dtype=acc) if token_weight is None else token_weight.to(acc)
        if divisor is not None:
            coefficient = coefficient / divisor
        rows, *rest = linear_cross_entropy_fwd(
            input, linear_weight, target, linear_bias, weight, coefficient, compute_dtype,
            ignore_index, label_smoothing, z_loss, softcap, logit_scale, capacity, workspace_bytes,
            want_input, want_weight, want_bias, stats,
        )  # fmt: skip
        loss = (rows if token_weight is None else rows * token_weight).sum()
        return (loss if divisor is None else loss / divisor, rows, *rest)

    @staticmethod
    def setup_context(ctx, inputs, output):
        leaves = (*inputs[:3], inputs[5])
        ctx.dtypes = [None if t is None else t.dtype for t in leaves]
        ctx.computed = inputs[-4:-1]
        divisor, rows, (grad_input, grad_weight, grad_bias, scale) = inputs[6], output[1], output[-4:]
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(grad_input, grad_weight, grad_bias, scale, rows, divisor, *leaves)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad_loss, *_):
        result = [None] * 19
        if grad_loss is None:
            return tuple(result)
        grad_input, grad_weight, grad_bias, scale, rows, divisor, *leaves = ctx.saved_tensors
        gradients = (grad_input, grad_weight, grad_bias)
        for i, name in enumerate(("input", "linear_weight", "linear_bias")):
            if not ctx.needs_input_grad[i]:
                continue
            if not ctx.computed[i]:
                raise RuntimeError(f"{NAME}: forward saw no gradient wanted for {name}; use mode='compact' here")
            result[i] = kept(NAME, gradients[i], grad_loss * scale, ctx.dtypes[i], *leaves)
        if ctx.needs_input_grad[5]:
            by_row = rows if divisor is None else rows / divisor
            result[5] = kept(NAME, by_row, grad_loss, ctx.dtypes[3], *leaves)
        return tuple(result)


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    token_weight: Tensor | None = None,
    num_items: int | Tensor | None = None,
    mode: str = "auto",
    process_group: Any = None,
    vocab_start: int = 0,
    capacity: int | None = None,
    workspace_bytes: int | None = None,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, CrossEntropyStats]:
    """Cross-entropy of the logits `logit_scale * input @ linear_weight.T + linear_bias`, which never exist as a whole.

    A superset of `torch.nn.functional.linear_cross_entropy`. Rows whose target is `ignore_index` are left out before
    the matmuls; the others go through in chunks whose logits fit a buffer of `workspace_bytes`. Beyond the gradients
    and the valid rows of input and of its gradient, this buffer is all the memory, and in half precision, where the
    rows need more than one chunk, the weight's gradient in float32, which the chunks add up in.

    Args:
        input: hidden states `(..., D)`; float32, bfloat16, float16 or float64. Under autocast the matmuls run in its
            dtype, whatever the dtypes of input and weight; otherwise the two must be equal. float16 on a CPU computes
            in float32.
        linear_weight: `(V, D)`, may be tied to an embedding.
        target: class indices `(...)`, int64 or int32.
        linear_bias: `(V,)`, any float dtype.
        weight: weight of each class `(V,)`.
        reduction: "mean" divides by the sum of the class weights of the valid rows (NaN where there are none) or by
            `num_items`; "sum"; or "none", of the shape of the target.
        ignore_index, label_smoothing, z_loss: as in `cross_entropy`.
        softcap: after scale and bias, replaces the logits by `softcap * tanh(logits / softcap)`.
        logit_scale: multiplies the product before the bias is added.
        token_weight: `(...)`, multiplies the loss of each row; not part of the divisor of "mean". Differentiable.
        num_items: int or 0-d tensor, the divisor of "mean" instead (as for gradient accumulation).
        mode: "fast": three matmuls, the gradients are computed in forward and kept until backward; "compact": four, no
            buffer of the size of a gradient before backward; "auto": fast where a gradient is wanted. With
            `reduction="none"` the weights of the rows are not known in forward, and every mode runs the compact plan.
        process_group, vocab_start: a weight sharded over ranks; not implemented yet.
        capacity: the most rows that may be valid (target other than `ignore_index`) in a call. With it nothing
            synchronises and no shape depends on the targets: that many rows, or all where they are fewer, go through
            the matmuls, valid or not.
        workspace_bytes: the most bytes of the buffer of logits, which holds 16 rows at least. Default: 512 MiB on CUDA;
            on a CPU 80 MiB or, for a weight's gradient in half precision, the bytes of the weight in float32 where that
            is more.
        return_stats: also return `CrossEntropyStats`, from the same pass.

    Returns:
        The loss, float32 (float64 for float64 input); with `return_stats` the pair (loss, statistics).

    Synchronisation: on CUDA without a `capacity` the number of valid rows is read once in forward, and in compact mode
    once in backward. With a `capacity` nothing is read. While a CUDA graph is captured the capacity is N unless given:
    ignored rows are computed along.

    Raises:
        TypeError, ValueError: for an argument of the wrong type, dtype, shape or range. A target out of range raises
            `ValueError` on the CPU; on a GPU the loss of its row is NaN. More valid rows than `capacity` raise
            `ValueError` on the CPU; on a GPU the losses and all gradients are NaN.
        NotImplementedError: for a `process_group`.

    >>> import sslkernels as sk
    >>> hidden = torch.randn(8, 16, requires_grad=True)
    >>> embedding = torch.randn(1000, 16, requires_grad=True)
    >>> target = torch.tensor([3, -100, 7, 999, -100, -100, 0, 1])
    >>> sk.linear_cross_entropy(hidden, embedding, target).backward()
    """
    _check(input, linear_weight, target, linear_bias, token_weight, num_items, reduction, mode, logit_scale)
    vocab = linear_weight.shape[0]
    check_options(NAME, vocab, input.device, weight, reduction, ignore_index, label_smoothing, z_loss, softcap)
    if process_group is not None:
        raise NotImplementedError(f"{NAME}: process_group is not implemented; pass the whole weight on every rank")
    if vocab_start != 0:
        checks.fail(ValueError, NAME, "vocab_start", "be 0 without a process_group", vocab_start)
    checks.integer(NAME, "capacity", capacity, low=0, optional=True)
    checks.integer(NAME, "workspace_bytes", workspace_bytes, low=1, optional=True)
    compute_dtype = compute_dtype_of(NAME, input, linear_weight)

    acc = accumulation_dtype(input.dtype)
    x = input.reshape(target.numel(), input.shape[-1]).contiguous()
    w = linear_weight.contiguous()
    y = target.reshape(-1).contiguous()
    bias = contiguous(linear_bias)
    class_weight = contiguous(weight)
    tokens = None if token_weight is None else token_weight.reshape(-1).contiguous()
    options = (
        ignore_index,
        float(label_smoothing),
        float(z_loss),
        0.0 if softcap is None else float(softcap),
        float(logit_scale),
        capacity,
        workspace_bytes,
    )

    divisor = None
    if reduction == "mean":
        if num_items is None:
            divisor = valid_weight(y, class_weight, vocab, ignore_index, acc)
        elif isinstance(num_items, Tensor):
            divisor = num_items.detach().reshape(()).to(acc)
        else:
            divisor = torch.full((), float(num_items), dtype=acc, device=input.device)

    grad_enabled = torch.is_grad_enabled()
    wanted = tuple(grad_enabled and t is not None and t.requires_grad for t in (x, w, bias))
    if mode != "compact" and reduction != "none" and any(wanted):
        loss, _, *state = _ReducedLoss.apply(
            x, w, bias, y, class_weight, tokens, divisor, compute_dtype, *options, *wanted, return_stats
        )
        state = state[:5]
    else:
        loss, *state = _RowLosses.apply(x, w, bias, y, class_weight, compute_dtype, *options, return_stats)
        if tokens is not None:
            loss = loss * tokens.to(acc)
        loss = loss.reshape(target.shape) if reduction == "none" else loss.sum()
        if divisor is not None:
            loss = loss / divisor
    if not return_stats:
        return loss
    return loss, row_stats(y, *state, ignore_index, target.shape)


def compute_dtype_of(function: str, input: Tensor, linear_weight: Tensor) -> torch.dtype:
    """The dtype of the matmuls: autocast's, else that of the tensors."""
    if checks.autocast(input.device) and torch.float64 not in (input.dtype, linear_weight.dtype):
        return torch.get_autocast_dtype(input.device.type)
    if linear_weight.dtype != input.dtype:
        must = f"have the dtype of input, {input.dtype}, outside autocast"
        checks.fail(TypeError, function, "linear_weight", must, linear_weight.dtype)
    return input.dtype


def _check(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    token_weight: Tensor | None,
    num_items: int | Tensor | None,
    reduction: str,
    mode: str,
    logit_scale: float,
) -> None:
    checks.tensor(NAME, "input", input, checks.FLOAT_DTYPES)
    checks.dims(NAME, "input", input, 1, "(..., D)")
    checks.tensor(NAME, "linear_weight", linear_weight, checks.FLOAT_DTYPES)
    checks.dims(NAME, "linear_weight", linear_weight, 2, "(V, D)", high=2)
    checks.shape(NAME, "linear_weight", linear_weight, (linear_weight.shape[0], input.shape[-1]), "(V, D)")
    if linear_weight.shape[0] == 0:
        checks.fail(ValueError, NAME, "linear_weight", "have at least one row", tuple(linear_weight.shape))
    checks.tensor(NAME, "target", target, checks.INDEX_DTYPES)
    checks.shape(NAME, "target", target, input.shape[:-1], "that of input without its last dimension")
    checks.tensor(NAME, "linear_bias", linear_bias, checks.FLOAT_DTYPES, optional=True)
    checks.shape(NAME, "linear_bias", linear_bias, (linear_weight.shape[0],), "(V,)")
    checks.tensor(NAME, "token_weight", token_weight, checks.FLOAT_DTYPES, optional=True)
    checks.shape(NAME, "token_weight", token_weight, target.shape, "that of target")
    for argument, value in (
        ("linear_weight", linear_weight),
        ("target", target),
        ("linear_bias", linear_bias),
        ("token_weight", token_weight),
    ):
        checks.same_device(NAME, argument, value, "input", input.device)
    checks.choice(NAME, "mode", mode, ("auto", "fast", "compact"))
    checks.number(NAME, "logit_scale", logit_scale)
    if num_items is None:
        return
    if reduction != "mean":
        checks.fail(ValueError, NAME, "num_items", 'be None unless reduction is "mean"', f"reduction={reduction!r}")
    if isinstance(num_items, Tensor):
        if num_items.numel() != 1:
            checks.fail(ValueError, NAME, "num_items", "be an int or a 0-d tensor", tuple(num_items.shape))
        checks.same_device(NAME, "num_items", num_items, "input", input.device)
    else:
        checks.number(NAME, "num_items", num_items, low=0)
