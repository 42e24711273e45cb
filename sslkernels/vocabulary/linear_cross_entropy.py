"""Cross-entropy of a linear projection, whose logits are never materialised as a whole."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from sslkernels.core import checks
from sslkernels.core.autograd import Function, once_differentiable, save, saved
from sslkernels.core.dtypes import accumulation_dtype, compute_dtype_of, contiguous
from sslkernels.core.overloads import returns_stats
from sslkernels.core.ranks import check_rank_options, check_ranks, on_every_rank, summed_gradient
from sslkernels.core.scale import scaled
from sslkernels.core.slices import own_slice
from sslkernels.vocabulary.cross_entropy import CrossEntropyStats, cross_entropy, row_stats
from sslkernels.vocabulary.linear_operators import linear_cross_entropy_bwd, linear_cross_entropy_fwd
from sslkernels.vocabulary.linear_records import NAME, Gradients, Operands, PlanOptions, Wanted
from sslkernels.vocabulary.reduction import (
    check_probabilities,
    check_reduction,
    check_token_weight,
    check_weight,
    mean_divisor,
    reduced,
)
from sslkernels.vocabulary.softmax_rows import RowOptions, RowOutputs, RowState, comparable_target


class _RowLosses(Function):
    """Per-row losses and statistics, "compact": backward recomputes the logits (four matmuls in all)."""

    differentiable = 1

    @staticmethod
    def forward(operands: Operands, options: RowOptions, plan: PlanOptions, stats: bool) -> RowOutputs:
        nothing = Wanted(input=False, linear_weight=False, linear_bias=False)
        rows, _ = linear_cross_entropy_fwd(operands, None, options, plan, nothing, stats)
        return rows

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        operands, ctx.options, ctx.plan, _ = inputs
        (rows,) = outputs
        save(ctx, operands, rows.state)

    @staticmethod
    def backward(ctx, grads):
        if grads.loss is None:
            return None
        needs, *_ = _RowLosses.wanted(ctx)
        wanted = Wanted(*[getattr(needs, name) for name in Wanted._fields])
        operands, state = saved(ctx)
        return (_row_gradients(grads.loss.contiguous(), operands, state, ctx.options, ctx.plan, wanted),)


@once_differentiable(NAME)
def _row_gradients(
    grad_loss: Tensor, operands: Operands, state: RowState, options: RowOptions, plan: PlanOptions, wanted: Wanted
) -> Operands:
    """The gradients of the operands, None where not wanted."""
    gradients = linear_cross_entropy_bwd(grad_loss, operands, state, options, plan, wanted)
    found = {
        name: scaled(getattr(gradients, name), gradients.scale, getattr(operands, name).dtype)
        for name in Wanted._fields
        if getattr(wanted, name)
    }
    return _operand_gradients(found)


class _Leaves(NamedTuple):
    """The tensors of a reduced loss that may require a gradient."""

    input: Tensor
    linear_weight: Tensor
    linear_bias: Tensor | None
    token_weight: Tensor | None


class _ReducedLoss(Function):
    """sum(token_weight * loss) / divisor, "fast": its gradients are computed with it and kept (three matmuls in all).

    Backward multiplies them by grad_output. A gradient that backward needs but forward was not asked for raises an
    error; it is never silently zero.
    """

    differentiable = 1

    @staticmethod
    def forward(
        operands: Operands,
        token_weight: Tensor | None,
        divisor: Tensor | None,
        options: RowOptions,
        plan: PlanOptions,
        wanted: Wanted,
        stats: bool,
    ) -> tuple[Tensor, RowOutputs, Gradients]:
        acc = accumulation_dtype(operands.input.dtype)
        count = operands.input.shape[0]
        coefficient = operands.input.new_ones(count, dtype=acc) if token_weight is None else token_weight.to(acc)
        if divisor is not None:
            coefficient = coefficient / divisor
        rows, gradients = linear_cross_entropy_fwd(operands, coefficient, options, plan, wanted, stats)
        loss = (rows.loss if token_weight is None else rows.loss * token_weight).sum()
        return loss if divisor is None else loss / divisor, rows, gradients

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        operands, token_weight, divisor, _, _, ctx.computed, _ = inputs
        _, rows, gradients = outputs
        leaves = _Leaves(operands.input, operands.linear_weight, operands.linear_bias, token_weight)
        save(ctx, gradients, rows.loss, divisor, leaves)

    @staticmethod
    def backward(ctx, grad_loss, *_):
        if grad_loss is None:
            return None
        gradients, losses, divisor, leaves = saved(ctx)
        needs, needs_token_weight, *_ = _ReducedLoss.wanted(ctx)
        scale = grad_loss * gradients.scale
        found = {}
        for name in Wanted._fields:
            if not getattr(needs, name):
                continue
            if not getattr(ctx.computed, name):
                raise RuntimeError(f"{NAME}: forward saw no gradient wanted for {name}; use mode='compact' here")
            gradient, leaf = getattr(gradients, name), getattr(leaves, name)
            found[name] = _kept_gradient(gradient, scale, leaf.dtype, leaves)
        grad_token_weight = None
        if needs_token_weight:
            by_row = losses if divisor is None else losses / divisor
            grad_token_weight = _kept_gradient(by_row, grad_loss, leaves.token_weight.dtype, leaves)
        return _operand_gradients(found), grad_token_weight


@once_differentiable(NAME)
def _kept_gradient(gradient: Tensor, scale: Tensor, dtype: torch.dtype, leaves: _Leaves) -> Tensor:
    return scaled(gradient, scale, dtype, saved=True)


def _operand_gradients(found: dict[str, Tensor]) -> Operands:
    return Operands(*[found.get(name) for name in Operands._fields])


@checks.with_python_numbers
@returns_stats(Tensor, CrossEntropyStats)
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float | Tensor = 1.0,
    token_weight: Tensor | None = None,
    num_items: int | Tensor | None = None,
    shift: int = 0,
    mode: str = "auto",
    capacity: int | None = None,
    workspace_bytes: int | None = None,
    process_group: Any = None,
    vocab_start: int | None = None,
    input_grad: str = "reduce",
    sequence_parallel: bool = False,
    on_empty: str = "nan",
    return_stats: bool = False,
    options: Any = None,
) -> Tensor | tuple[Tensor, CrossEntropyStats]:
    """Cross-entropy of the logits `logit_scale * input @ linear_weight.T + linear_bias`, never materialised as a whole.

    A superset of `torch.nn.functional.linear_cross_entropy`. Rows whose target is `ignore_index` are dropped before
    the matmuls; the others are processed in chunks whose logits fit a buffer of `workspace_bytes`. Beyond the gradients
    and the valid rows of input and of its gradient, this buffer is all the memory; in half precision, with more than
    one chunk, there is also a float32 accumulator for the gradient of the weight.

    Args:
        input: hidden states `(..., D)`; float32, bfloat16, float16 or float64. Under autocast the matmuls run in its
            dtype, whatever the dtypes of input and weight; otherwise the two must be equal. float16 on a CPU computes
            in float32.
        linear_weight: `(V, D)`, may be tied to an embedding. `(V, d1, ..., D)` with an input of `(N, D)` is torch's
            K-dimensional loss, of which the logits `(N, V, d1, ...)` are materialised.
        target: class indices `(...)` (`(N, d1, ...)`), int64 or int32; or class probabilities `(..., V)`
            (`(N, V, d1, ...)`) of any float dtype, which are read chunk by chunk. If they require grad, all logits are
            materialised.
        linear_bias: `(V,)` (`(V, d1, ...)`), any float dtype.
        weight: weight of each class `(V,)`.
        reduction: "mean" divides by the sum of the class weights of the valid rows (class probabilities: their number)
            or by `num_items`; "sum"; or "none", which returns the shape of the rows.
        ignore_index: rows with this target do not contribute to the loss, the gradients or the divisor. None: -100.
        label_smoothing: in [0, 1]; the fraction of the target probability that is distributed over all classes.
        z_loss: adds `z_loss * logsumexp(logits)**2` to each row (PaLM, Chowdhery et al. 2022, section 5); this part of
            a mean is divided by the number of valid rows or by `num_items`, whatever the class weights.
        softcap: after scale and bias, replaces the logits by `softcap * tanh(logits / softcap)` (Gemma 2, 2024); None
            or infinity: none.
        logit_scale: multiplies the product before the bias is added; a float, or a float tensor of one element, as of a
            learned scale. Differentiable: it then multiplies the input.
        token_weight: `(...)`, multiplies the loss of each row; not part of the divisor of "mean". Differentiable.
        num_items: int or 0-d tensor, overrides the divisor of "mean" (for gradient accumulation).
        shift: the row at position t predicts the target at t + `shift` of its sequence, the last dimension of `target`;
            its last `shift` rows are ignored. Losses, statistics and `token_weight` belong to the row, at t.
        mode: "fast": three matmuls, the gradients are computed in forward and kept until backward; "compact": four
            matmuls, no buffer of the size of a gradient before backward; "auto": fast if a gradient is wanted. With
            `reduction="none"` forward does not know the weights of the rows, and every mode runs the compact plan.
        capacity: upper bound of the number of valid rows (target other than `ignore_index`) in a call. With it nothing
            synchronises and no shape depends on the targets: `capacity` rows, or all if there are fewer, go through the
            matmuls, valid or not.
        workspace_bytes: upper bound of the bytes of the logits buffer, which holds at least 16 rows. Default: 512 MiB
            on CUDA or, if that is more, a 64th of the GPU's memory; on a CPU 80 MiB or, if the gradient of the weight
            is computed in half precision, the bytes of the weight in float32, whichever is more.
        process_group: ranks that the vocabulary is sliced over, a `torch.distributed.ProcessGroup` or a DeviceMesh of
            one dimension. `linear_weight` and `linear_bias` (and class probabilities) are then this rank's rows
            (columns), of any number, also none; the class weights `weight` are whole, and every other argument is the
            same on every rank, as are loss and statistics. The ranks exchange three numbers a row in forward (one more
            with label smoothing, two with statistics), no logits.
            A `linear_weight` that is a DTensor, `Shard(0)` over a mesh dimension named "tp" or over this group, is the
            slice; on another mesh it is refused: `sslkernels.nn.LinearHead`.
        vocab_start: number of rows of the ranks before this one; None: from the sizes, which are exchanged once as long
            as the weight lives (at each call for a weight that is computed anew).
        input_grad: "reduce": the gradient of the input is complete on every rank; "partial": it is what this rank's
            slice contributes, for a caller who reduces it.
        sequence_parallel: input, target and token_weight are this rank's own rows, any number of the first dimension.
            They are gathered, and the gradient of the input is reduced to its own rows. Losses without a reduction and
            statistics are of all rows, in the order of the ranks.
        on_empty: loss of a mean over no valid rows: "nan", as in torch, or "zero", with gradients of zero.
        return_stats: also return `CrossEntropyStats`, from the same pass.
        options: a `torch.nn.LinearCrossEntropyOptions`, as torch takes it; it changes nothing.

    Returns:
        The loss, float32 (float64 for float64 input); with `return_stats` the pair (loss, statistics).

    Synchronisation: on CUDA without a `capacity` the number of valid rows is read once in forward, and in compact mode
    once in backward. With a `capacity` nothing is read, but for the numbers of rows of `sequence_parallel`. While a
    CUDA graph is captured the capacity defaults to N, and ignored rows are computed too.

    Raises:
        TypeError, ValueError: for an argument of the wrong type, dtype, shape or range. A target out of range raises
            `ValueError` on the CPU; on a GPU the loss of its row is NaN. More valid rows than `capacity` raise
            `ValueError` on the CPU; on a GPU the losses and all gradients are NaN.

    >>> import sslkernels as sk
    >>> hidden = torch.randn(8, 16, requires_grad=True)
    >>> embedding = torch.randn(1000, 16, requires_grad=True)
    >>> target = torch.tensor([3, -100, 7, 999, -100, -100, 0, 1])
    >>> sk.linear_cross_entropy(hidden, embedding, target).backward()
    """
    check_torch_options(options)
    ignore_index = -100 if ignore_index is None else ignore_index
    linear_weight, linear_bias, group, sizes = own_slice(NAME, linear_weight, linear_bias, process_group, vocab_start)
    _check(input, linear_weight, target, linear_bias, token_weight, logit_scale, group is not None)
    check_reduction(NAME, reduction, num_items, on_empty, input.device)
    vocab = sum(sizes) if sizes else linear_weight.shape[0]
    if group is not None and not sizes and weight is not None:  # torch.compile traces: the operator knows
        vocab = weight.shape[0]
    check_weight(NAME, weight, vocab, input.device)
    checks.boolean(NAME, "return_stats", return_stats)
    checks.choice(NAME, "mode", mode, ("auto", "fast", "compact"))
    scaled_by = logit_scale if isinstance(logit_scale, Tensor) else None
    given = {"ignore_index": ignore_index, "label_smoothing": label_smoothing, "z_loss": z_loss, "softcap": softcap}
    row_options = RowOptions.checked(NAME, **given, logit_scale=logit_scale if scaled_by is None else 1.0)
    checks.integer(NAME, "capacity", capacity, low=0, optional=True)
    checks.integer(NAME, "workspace_bytes", workspace_bytes, low=1, optional=True)
    compute_dtype = compute_dtype_of(NAME, input, linear_weight)
    probabilities = target.is_floating_point()
    if probabilities:
        check_probabilities(NAME, ignore_index, return_stats)
        if capacity is not None:
            checks.fail(ValueError, NAME, "capacity", "be None with class probabilities (all rows are valid)", capacity)
    materialised = linear_weight.dim() > 2 or _wants_gradient(target)
    check_rank_options(NAME, group, input, target, input_grad, sequence_parallel)
    if group is not None:
        if materialised:
            must = "be None for K-dimensional weights or a target that requires grad, whose logits are materialised"
            checks.fail(ValueError, NAME, "process_group", must, "a group")
        same = {"linear_weight": linear_weight, "linear_bias": linear_bias, "input": input, "logit_scale": logit_scale}
        same |= {"weight": weight, "token_weight": token_weight, "shift": shift, "mode": mode, "capacity": capacity}
        same |= {"reduction": reduction, "num_items": num_items, "on_empty": on_empty, "return_stats": return_stats}
        same |= {"workspace_bytes": workspace_bytes, "input_grad": input_grad, "sequence_parallel": sequence_parallel}
        check_ranks(NAME, group, same | row_options._asdict())
        input, target, token_weight = on_every_rank(group, input, target, token_weight, input_grad, sequence_parallel)
        scaled_by = None if scaled_by is None else summed_gradient(scaled_by, group)
    target = _shifted(target, shift, ignore_index, probabilities or linear_weight.dim() > 2)

    if materialised:
        ignored = {
            "mode": mode != "auto",
            "capacity": capacity is not None,
            "workspace_bytes": workspace_bytes is not None,
        }
        must = "not be given for K-dimensional weights or a target that requires grad, whose logits are materialised"
        for argument in (name for name, is_given in ignored.items() if is_given):
            checks.fail(ValueError, NAME, argument, must, "a value")
        return cross_entropy(
            _logits(input, linear_weight, linear_bias, logit_scale),
            target,
            weight,
            **given,
            reduction=reduction,
            token_weight=token_weight,
            num_items=num_items,
            class_dim=1 if linear_weight.dim() > 2 else -1,
            on_empty=on_empty,
            return_stats=return_stats,
        )

    acc = accumulation_dtype(input.dtype)
    rows_shape = input.shape[:-1]
    operands = _operands(input, linear_weight, linear_bias, target, weight, scaled_by, ignore_index)
    y = operands.target
    tokens = None if token_weight is None else token_weight.reshape(-1).contiguous()
    plan = PlanOptions(compute_dtype, capacity, workspace_bytes, group, sizes, None if sizes else vocab_start)

    divisor = None
    if reduction == "mean":
        divisor, weight = mean_divisor(y, operands.weight, vocab, row_options, num_items, on_empty, acc)
        if weight is not operands.weight:
            operands = operands._replace(weight=weight)

    wanted = Wanted(
        input=_wants_gradient(operands.input),
        linear_weight=_wants_gradient(operands.linear_weight),
        linear_bias=_wants_gradient(operands.linear_bias),
    )
    if mode != "compact" and reduction != "none" and any(wanted):
        loss, rows, _ = _ReducedLoss.run(operands, tokens, divisor, row_options, plan, wanted, return_stats)
    else:
        rows = _RowLosses.run(operands, row_options, plan, return_stats)
        loss = reduced(rows.loss, tokens, divisor, reduction, rows_shape)
    if not return_stats:
        return loss
    return loss, row_stats(y, rows, ignore_index, rows_shape)


def _operands(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    scale: Tensor | None,
    ignore_index: int,
) -> Operands:
    """The operands with one dimension of rows, contiguous; scale: a tensor that multiplies the input."""
    x = input if input.dim() == 2 else input.reshape(math.prod(input.shape[:-1]), input.shape[-1])
    probabilities = target.is_floating_point()
    if probabilities:
        y = target if target.dim() == 2 else target.reshape(x.shape[0], linear_weight.shape[0])
    else:
        y = (target if target.dim() == 1 else target.reshape(-1)).contiguous()
    if scale is not None:
        x = _ScaledRows.run(x, scale, None if probabilities else y == ignore_index)
    return Operands(x.contiguous(), linear_weight.contiguous(), contiguous(linear_bias), y, contiguous(weight))


def check_torch_options(options: Any) -> None:
    """torch's options of its chunks: the plan here does not need them."""
    kind = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if options is not None and (kind is None or not isinstance(options, kind)):
        must = "be a torch.nn.LinearCrossEntropyOptions or None"
        checks.fail(TypeError, NAME, "options", must, type(options).__name__)


def _shifted(target: Tensor, shift: int, ignore_index: int, unordered: bool) -> Tensor:
    """Each row's target is the one `shift` positions later in its sequence; the last rows are ignored. unordered: the
    last dimension of the target is no sequence."""
    checks.integer(NAME, "shift", shift, low=0)
    if not target.is_floating_point():
        target = comparable_target(target, ignore_index)
    if shift == 0:
        return target
    if unordered or target.dim() == 0:
        must = "be 0 with class probabilities, K-dimensional weights or a single row"
        checks.fail(ValueError, NAME, "shift", must, shift)
    length = target.shape[-1]
    gone = min(shift, length)
    ends = target.new_full((*target.shape[:-1], gone), ignore_index)
    return torch.cat([target[..., gone:], ends], dim=-1)


def _logits(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, logit_scale: float | Tensor) -> Tensor:
    """All logits (N, V, d1, ...), or (..., V)."""
    logits = linear(input, linear_weight.flatten(0, -2))
    if linear_weight.dim() > 2:
        logits = logits.unflatten(-1, linear_weight.shape[:-1])
    if isinstance(logit_scale, Tensor) or logit_scale != 1.0:
        logits = logits * logit_scale
    return logits if linear_bias is None else logits + linear_bias


class _ScaledRows(Function):
    """scale * input, (N, D), rounded once, with the gradients of both. Rows that are `ignored` may hold anything."""

    @staticmethod
    def forward(input: Tensor, scale: Tensor, ignored: Tensor | None) -> Tensor:
        acc = accumulation_dtype(input.dtype)
        product = input.to(acc) * scale.to(acc).reshape(())
        # torch.compile of torch 2.11 loses the gradient of a result that `to` returns as it is.
        return product if product.dtype == input.dtype else product.to(input.dtype)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        save(ctx, *inputs)

    @staticmethod
    def backward(ctx, grad):
        if grad is None:
            return None
        input, scale, ignored = saved(ctx)
        needs_input, needs_scale, _ = _ScaledRows.wanted(ctx)
        acc = accumulation_dtype(input.dtype)
        grad_input = grad_scale = None
        if needs_input:
            grad_input = (grad.to(acc) * scale.to(acc).reshape(())).to(input.dtype)
        if needs_scale:
            by_row = (grad.to(acc) * input.to(acc)).sum(1)
            by_row = by_row if ignored is None else by_row.masked_fill(ignored, 0)
            grad_scale = by_row.sum().to(scale.dtype).reshape(scale.shape)
        return grad_input, grad_scale


def _wants_gradient(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.requires_grad and torch.is_grad_enabled()


def _check(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    token_weight: Tensor | None,
    logit_scale: float | Tensor,
    sliced: bool,
) -> None:
    check_projection(NAME, input, linear_weight, linear_bias, k_dimensional=True, sliced=sliced)
    checks.tensor(NAME, "target", target, (*checks.INDEX_DTYPES, *checks.FLOAT_DTYPES))
    classes, *outer = linear_weight.shape[:-1]
    rows = (*input.shape[:-1], *outer)
    meaning = "input.shape[:-1] + linear_weight.shape[1:-1]" if outer else "input.shape[:-1]"
    if target.is_floating_point():
        if tuple(target.shape) == rows:  # indices in a dtype of probabilities
            checks.tensor(NAME, "target", target, checks.INDEX_DTYPES)
        shape = (input.shape[0], classes, *outer) if outer else (*rows, classes)
        checks.shape(NAME, "target (class probabilities)", target, shape, "(..., V)")
    else:
        checks.shape(NAME, "target", target, rows, meaning)
    checks.same_device(NAME, "target", target, "input", input.device)
    check_token_weight(NAME, token_weight, rows, input.device, meaning)
    if isinstance(logit_scale, Tensor):
        checks.tensor(NAME, "logit_scale", logit_scale, checks.FLOAT_DTYPES)
        checks.same_device(NAME, "logit_scale", logit_scale, "input", input.device)
        if logit_scale.numel() != 1:
            must = "be a number or a tensor of one element"
            checks.fail(ValueError, NAME, "logit_scale", must, tuple(logit_scale.shape))


def check_projection(
    function: str,
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    *,
    k_dimensional: bool = False,
    sliced: bool = False,
) -> None:
    """k_dimensional: whether the weight may have the shape (V, d1, ..., D), for an input of (N, D); sliced: whether it
    may have no rows."""
    checks.tensor(function, "input", input, checks.FLOAT_DTYPES)
    checks.dims(function, "input", input, 1, "(..., D)")
    checks.tensor(function, "linear_weight", linear_weight, checks.FLOAT_DTYPES)
    checks.dims(function, "linear_weight", linear_weight, 2, "(V, D)", high=None if k_dimensional else 2)
    if linear_weight.dim() > 2:
        checks.dims(function, "input", input, 2, "(N, D) for a K-dimensional linear_weight", high=2)
    expected = (*linear_weight.shape[:-1], input.shape[-1])
    checks.shape(function, "linear_weight", linear_weight, expected, "(V, D)")
    if linear_weight.shape[0] == 0 and not sliced:
        checks.fail(ValueError, function, "linear_weight", "have at least one row", tuple(linear_weight.shape))
    checks.tensor(function, "linear_bias", linear_bias, checks.FLOAT_DTYPES, optional=True)
    checks.shape(function, "linear_bias", linear_bias, linear_weight.shape[:-1], "(V,)")
    checks.same_device(function, "linear_weight", linear_weight, "input", input.device)
    checks.same_device(function, "linear_bias", linear_bias, "input", input.device)
