"""Cross-entropy of rows of logits: the mechanism that `cross_entropy` and `linear_cross_entropy` share.

A backend is a `Rows`: `forward` reduces each row to its loss and state (and can overwrite the logits with their
gradient in the same pass), and `backward` writes the gradient from the logits and the state.

For a row with raw logits `raw`, target y, class weights w and V classes:

    l = logit_scale * raw + bias             z = softcap * tanh(l / softcap), or l without a softcap
    lse = logsumexp(z)                       nll = lse - z_y
    loss = (1 - s) * w_y * nll + (s / V) * sum_j w_j * (lse - z_j) + z_loss * lse**2

with s = label_smoothing. The gradient is with respect to l; the caller applies logit_scale to the products that it
computes from it. Rows whose target is `ignore_index` have loss 0, statistics 0, prediction -1 and gradient 0; a target
out of range gives NaN. Sums leave the target out and add it last, so that a confident row keeps its loss,
log1p(sum_{j != y} exp(z_j - z_y)).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sslkernels.core import checks
from sslkernels.core.dtypes import accumulation_dtype


class RowOptions(NamedTuple):
    """Scalars of the row loss; softcap 0 means none. The C++ struct has the same fields in the same order."""

    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float
    logit_scale: float = 1.0

    @classmethod
    def checked(cls, function: str, *, softcap: float | None, **given: Any) -> RowOptions:
        """The record of options as the public `function` takes them, which have no softcap as None."""
        unbounded = softcap is None or (isinstance(softcap, float) and softcap == math.inf)
        options = cls(softcap=0.0 if unbounded else softcap, **given)
        checks.integer(function, "ignore_index", options.ignore_index)
        checks.number(function, "label_smoothing", options.label_smoothing, low=0.0, high=1.0)
        checks.number(function, "z_loss", options.z_loss, low=0.0)
        if softcap is not None:
            checks.number(function, "softcap", softcap, low=0.0, low_open=True)
        checks.number(function, "logit_scale", options.logit_scale)
        return options

    def native(self) -> tuple[int, list[float]]:
        """As the native operators take them."""
        ignore_index, *numbers = self
        return ignore_index, numbers


class RowState(NamedTuple):
    """Per row, saved for backward in the accumulation dtype: the largest logit, the sum of exp(z - row_max), and the
    log-probability of the target."""

    row_max: Tensor
    sum_exp: Tensor
    logprob: Tensor


class RowOutputs(NamedTuple):
    """Per row, in the accumulation dtype: the loss, the fields of `RowState`, and the prediction (int64) and the
    entropy, which are empty without statistics."""

    loss: Tensor
    row_max: Tensor
    sum_exp: Tensor
    logprob: Tensor
    prediction: Tensor
    entropy: Tensor

    @property
    def state(self) -> RowState:
        return RowState(self.row_max, self.sum_exp, self.logprob)


def empty_outputs(like: Tensor, count: int, stats: bool) -> RowOutputs:
    counted = count if stats else 0
    loss = like.new_empty(count, dtype=accumulation_dtype(like.dtype))
    row_max, sum_exp, logprob = torch.empty_like(loss), torch.empty_like(loss), torch.empty_like(loss)
    prediction, entropy = loss.new_empty(counted, dtype=torch.int64), loss.new_empty(counted)
    return RowOutputs(loss, row_max, sum_exp, logprob, prediction, entropy)


def check_target_range(function: str, loss: Tensor, target: Tensor, vocab: int, ignore_index: int) -> None:
    """Raises `ValueError` for a CPU target outside [0, vocab) that is not `ignore_index`.

    The kernels have made the loss of such a row NaN, so the targets are looked at only where a loss is NaN. On a GPU
    even that would be a synchronisation: there the loss stays NaN.
    """
    if target.device.type != "cpu" or not math.isnan(loss.sum()):
        return
    wrong = ((target < 0) | (target >= vocab)) & (target != ignore_index)
    if bool(wrong.any()):
        got = target[wrong][0].item()
        checks.fail(ValueError, function, "target", f"be in [0, {vocab}) or ignore_index={ignore_index}", got)


def comparable_target(target: Tensor, ignore_index: int) -> Tensor:
    """The target in a dtype that holds `ignore_index`: a comparison of int32 with more bits would wrap around."""
    fits = target.dtype == torch.int64 or -(2**31) <= ignore_index < 2**31
    return target if fits else target.long()


class Rows:
    """The row kernels of a backend. `coefficient` (rows,) multiplies the gradient of each row; `grad` may be `logits`
    itself."""

    def forward(
        self,
        logits: Tensor,
        target: Tensor,
        bias: Tensor | None,
        weight: Tensor | None,
        options: RowOptions,
        *,
        stats: bool,
        coefficient: Tensor | None = None,
        grad: Tensor | None = None,
    ) -> RowOutputs:
        raise NotImplementedError

    def backward(
        self,
        logits: Tensor,
        target: Tensor,
        bias: Tensor | None,
        weight: Tensor | None,
        options: RowOptions,
        state: RowState,
        coefficient: Tensor,
        grad: Tensor,
    ) -> None:
        raise NotImplementedError

    def evaluate(
        self,
        input: Tensor,
        linear_weight: Tensor,
        target: Tensor,
        bias: Tensor | None,
        weight: Tensor | None,
        options: RowOptions,
        *,
        stats: bool,
    ) -> RowOutputs | None:
        """The outputs for the logits of a projection, in one kernel without gradients; None if the backend has none."""
        return None

    def add(self, total: Tensor, part: Tensor, first: bool) -> None:
        """total = (0 if first else total) + part; their dtypes differ."""
        total.copy_(part) if first else total.add_(part)

    def add_column_sums(self, grad_logits: Tensor, total: Tensor, first: bool) -> None:
        """total (V,) = (0 if first else total) + the sum of the rows of grad_logits (N, V), in the dtype of total."""
        part = grad_logits.sum(0, dtype=total.dtype)
        total.copy_(part) if first else total.add_(part)


class ReferenceRows(Rows):
    """Plain torch: it defines the row loss."""

    def forward(self, logits, target, bias, weight, options, *, stats, coefficient=None, grad=None):
        z, _ = transform(logits, bias, options)
        vocab = z.shape[1]
        ignored, wrong, index = _split_target(target, vocab, options.ignore_index)

        row_max = z.amax(1)
        shifted = z - row_max.unsqueeze(1)
        exp = shifted.exp()
        others = exp.scatter(1, index.unsqueeze(1), 0).sum(1)
        target_shifted = shifted.gather(1, index.unsqueeze(1)).squeeze(1)
        target_exp = target_shifted.exp()
        sum_exp = others + target_exp
        logprob = torch.where(target_exp > others, -torch.log1p(others / target_exp), target_shifted - sum_exp.log())
        lse = row_max + sum_exp.log()

        smoothing = options.label_smoothing
        target_weight = 1.0 if weight is None else weight.to(z.dtype)[index]
        loss = -(1 - smoothing) * target_weight * logprob
        if smoothing > 0:
            all_weights = z.new_ones(vocab) if weight is None else weight.to(z.dtype)
            to_lse = sum_exp.log().unsqueeze(1) - shifted
            loss = loss + smoothing / vocab * torch.where(all_weights > 0, all_weights * to_lse, 0).sum(1)
        if options.z_loss > 0:
            loss = loss + options.z_loss * lse.square()

        def valid_only(values: Tensor, otherwise: float = 0) -> Tensor:
            return values.masked_fill(ignored, otherwise)

        loss = valid_only(loss.masked_fill(wrong, float("nan")))
        logprob = valid_only(logprob.masked_fill(wrong, float("nan")))
        outputs = empty_outputs(z, 0, False)._replace(loss=loss, row_max=row_max, sum_exp=sum_exp, logprob=logprob)
        if stats:
            expected = torch.where(exp > 0, exp * shifted, exp).sum(1) / sum_exp
            prediction = valid_only(z.argmax(1), -1)
            outputs = outputs._replace(prediction=prediction, entropy=valid_only(sum_exp.log() - expected))
        if grad is not None:
            self.backward(logits, target, bias, weight, options, outputs.state, coefficient, grad)
        return outputs._replace(row_max=valid_only(row_max), sum_exp=valid_only(sum_exp, 1))

    def backward(self, logits, target, bias, weight, options, state, coefficient, grad):
        z, slope = transform(logits, bias, options)
        vocab = z.shape[1]
        ignored, wrong, index = _split_target(target, vocab, options.ignore_index)

        probability = (z - state.row_max.unsqueeze(1)).exp() / state.sum_exp.unsqueeze(1)
        smoothing = options.label_smoothing
        weights = z.new_ones(vocab) if weight is None else weight.to(z.dtype)
        # Three terms of the loss contribute to the gradient: target, label smoothing and z-loss.
        target_weight = (1 - smoothing) * weights[index]
        lse = state.row_max + state.sum_exp.log()
        other_weight = smoothing / vocab * weights.sum() + 2 * options.z_loss * lse
        result = (target_weight + other_weight).unsqueeze(1) * probability - smoothing / vocab * weights
        at_target = probability.gather(1, index.unsqueeze(1)).squeeze(1)
        at_target = target_weight * torch.expm1(state.logprob) + other_weight * at_target
        at_target = at_target - smoothing / vocab * weights[index]
        result = result.scatter(1, index.unsqueeze(1), at_target.unsqueeze(1))
        result = result * coefficient.to(z.dtype).unsqueeze(1)
        if slope is not None:
            result = result * slope
        result = result.masked_fill(wrong.unsqueeze(1), float("nan"))
        grad.copy_(result.masked_fill(ignored.unsqueeze(1), 0))


def transform(logits: Tensor, bias: Tensor | None, options: RowOptions) -> tuple[Tensor, Tensor | None]:
    """z, and dz/dl if there is a softcap."""
    z = logits.to(accumulation_dtype(logits.dtype))
    if options.logit_scale != 1.0:
        z = z * options.logit_scale
    if bias is not None:
        z = z + bias.to(z.dtype)
    if options.softcap == 0.0:
        return z, None
    scaled = z / options.softcap
    e = torch.exp(-2 * scaled.abs())  # 1 - tanh^2 would cancel where the tanh is near 1
    return options.softcap * torch.tanh(scaled), 4 * e / (1 + e).square()


def _split_target(target: Tensor, vocab: int, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """Masks of ignored and of out-of-range rows, and an index that is safe to gather with."""
    target = target.long()
    ignored = target == ignore_index
    wrong = ((target < 0) | (target >= vocab)) & ~ignored
    return ignored, wrong, torch.where(ignored | wrong, 0, target)


class NativeRows(Rows):
    """The compiled extension: the dispatch key of the tensors selects its CPU or CUDA kernels."""

    OPS = ("cross_entropy_rows_fwd", "cross_entropy_rows_bwd", "scale_add")

    def forward(self, logits, target, bias, weight, options, *, stats, coefficient=None, grad=None):
        outputs = empty_outputs(logits, logits.shape[0], stats)
        bias, weight, weight_sum = _prepared(logits, bias, weight)
        torch.ops.sslkernels_native.cross_entropy_rows_fwd(
            logits, target, bias, weight, weight_sum, coefficient, *outputs, grad, *options.native(), stats
        )
        return outputs

    def backward(self, logits, target, bias, weight, options, state, coefficient, grad):
        bias, weight, weight_sum = _prepared(logits, bias, weight)
        torch.ops.sslkernels_native.cross_entropy_rows_bwd(
            logits, target, bias, weight, weight_sum, coefficient, *state, grad, *options.native()
        )

    def add(self, total, part, first):
        torch.ops.sslkernels_native.scale_add(part, None, total, not first)

    def add_column_sums(self, grad_logits, total, first):
        torch.ops.sslkernels_native.column_sums(grad_logits, total, not first)


class TritonRows(Rows):
    """The Triton kernels, imported at the first call."""

    def forward(self, logits, target, bias, weight, options, *, stats, coefficient=None, grad=None):
        from sslkernels.vocabulary.triton.softmax_rows import cross_entropy_rows_fwd

        outputs = empty_outputs(logits, logits.shape[0], stats)
        cross_entropy_rows_fwd(logits, target, bias, weight, coefficient, outputs, grad, options, stats)
        return outputs

    def backward(self, logits, target, bias, weight, options, state, coefficient, grad):
        from sslkernels.vocabulary.triton.softmax_rows import cross_entropy_rows_bwd

        cross_entropy_rows_bwd(logits, target, bias, weight, coefficient, state, grad, options)

    def evaluate(self, input, linear_weight, target, bias, weight, options, *, stats):
        from sslkernels.vocabulary.triton.linear_cross_entropy import stream_forward

        if input.dtype == torch.float64 or prefers_library_matmuls(input.device):
            return None
        # Valid rows first: blocks of ignored rows return at once, and the host need not know the number of valid rows.
        order = torch.argsort((target == options.ignore_index).to(torch.int8), stable=True)
        index = torch.where(target[order] == options.ignore_index, -1, order)
        outputs = empty_outputs(input, target.shape[0], stats)
        stream_forward(input, linear_weight, target, bias, weight, outputs, options, stats, row_index=index)
        return RowOutputs(*(torch.empty_like(o).index_copy_(0, order, o) if o.numel() else o for o in outputs))


def prefers_library_matmuls(device: torch.device) -> bool:
    """Whether the library's matmul and a pass over its logits take less time than one kernel that keeps no logits. From
    sm_90 on matmuls need warp specialisation and the tensor memory accelerator, which the Triton kernel does not use:
    the model gives it half of the floor, and the chunks 0.8."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def _prepared(
    logits: Tensor, bias: Tensor | None, weight: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Bias, class weights and sum of the class weights, in the accumulation dtype."""
    acc = accumulation_dtype(logits.dtype)
    bias = None if bias is None else bias.to(acc).contiguous()
    if weight is None:
        return bias, None, None
    weight = weight.to(acc).contiguous()
    return bias, weight, weight.sum().reshape(1)
