"""Cross-entropy of rows of logits of which each rank has a slice of the classes.

The row kernels of a backend reduce the slice: maximum m_r, sum s_r of exp(z - m_r), and on the rank that has the
target's class its log-probability p within the slice. One all-reduce gives the maximum m of all slices, a second one
the sums; no logits are sent:

    others = sum_r s_r exp(m_r - m) (on the rank of the target: times 1 - e^p)        z_y - m
    label smoothing: sum_j w_j (m - z_j)        statistics: sum_j exp(z_j - m) (z_j - m), then the lowest largest index

From these follow loss and state as in `softmax_rows`. The gradient of a slice needs the state of the whole row: it is a
second pass of the row kernels over the logits. They treat one column of a row as its target: column `own`, which is the
target on the rank that has it, and arbitrary on the others. The gradient of that column is computed separately.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from sslkernels.core.dtypes import accumulation_dtype
from sslkernels.core.slices import Slices, slices_of
from sslkernels.vocabulary.linear_records import NAME, Operands, PlanOptions
from sslkernels.vocabulary.probability_rows import blocks_of, probability_rows
from sslkernels.vocabulary.softmax_rows import RowOptions, RowOutputs, Rows, RowState, empty_outputs, transform


class _Targets(NamedTuple):
    """Per row: whether it is ignored; whether its target is wrong, out of range; index, the target's class, 0 if it has
    none; whether the class is owned by this rank; own, this rank's column that the row kernels treat as the target;
    local, which is `own`, or -1 for an ignored row, since ignore_index may be a column."""

    ignored: Tensor
    wrong: Tensor
    index: Tensor
    owned: Tensor
    own: Tensor
    local: Tensor


class SlicedRows(Rows):
    """The row kernels `rows`, with targets, class weights and outputs of the whole vocabulary, and logits, bias and
    gradients of this rank's slice."""

    def __init__(self, rows: Rows, slices: Slices) -> None:
        self.rows = rows
        self.slices = slices

    def forward(self, logits, target, bias, weight, options, *, stats, coefficient=None, grad=None):
        targets = self._targets(target, bias, options)
        if logits.shape[1] == 0:
            part = _empty_slice_outputs(logits, stats)
        else:
            part = self.rows.forward(logits, targets.local, bias, *self._smoothing(weight, options), stats=stats)
        outputs = self._merged(part, targets, bias, weight, options, stats)
        if grad is not None:
            self.backward(logits, target, bias, weight, options, outputs.state, coefficient, grad)
        return outputs

    def evaluate(self, input, linear_weight, target, bias, weight, options, *, stats):
        if 0 in self.slices.sizes:
            return None  # on every rank: all reduce alike
        targets = self._targets(target, bias, options)
        smoothing = self._smoothing(weight, options)
        part = self.rows.evaluate(input, linear_weight, targets.local, bias, *smoothing, stats=stats)
        return None if part is None else self._merged(part, targets, bias, weight, options, stats)

    def backward(self, logits, target, bias, weight, options, state, coefficient, grad):
        if logits.shape[1] == 0:
            return
        targets, acc = self._targets(target, bias, options), accumulation_dtype(logits.dtype)
        coefficient = coefficient.to(acc).masked_fill(targets.wrong, math.nan).masked_fill(targets.ignored, 0)
        smoothing = options.label_smoothing
        target_weight = torch.ones_like(coefficient) if weight is None else weight.to(acc)[targets.index]
        total = self.slices.total if weight is None else weight.to(acc).sum()
        lse = state.row_max + state.sum_exp.log()
        other = smoothing / self.slices.total * total + 2 * options.z_loss * lse
        # The column `own`, before the gradient takes the place of the logits.
        column = targets.own.unsqueeze(1)
        bias_there = None if bias is None else bias.to(acc)[column]
        z, slope = transform(logits.gather(1, column), bias_there, options)
        probability = (z.squeeze(1) - state.row_max).exp() / state.sum_exp
        positive = (1 - smoothing) * target_weight
        at_own = other * probability + positive * torch.where(targets.owned, state.logprob.expm1(), probability)
        if smoothing > 0:
            own_weight = 1.0 if weight is None else self.slices.part(weight).to(acc)[targets.own]
            at_own = at_own - smoothing / self.slices.total * own_weight
        at_own = (at_own if slope is None else at_own * slope.squeeze(1)) * coefficient

        factor = (positive + other) * coefficient
        if weight is not None and smoothing > 0:
            self._write(logits, bias, weight, options, state, coefficient, factor, grad)
        else:
            share = smoothing * logits.shape[1] / self.slices.total  # the kernels divide it by the size of the slice
            apart = options._replace(ignore_index=-1, label_smoothing=share)
            if weight is None:
                self.rows.backward(logits, targets.local, bias, None, apart, state, coefficient, grad)
            else:  # one factor a row holds its class weight and the z-loss
                apart = apart._replace(z_loss=0.0)
                self.rows.backward(logits, targets.local, bias, None, apart, state, factor, grad)
        at_own = at_own.masked_fill(targets.ignored, 0)
        grad.scatter_(1, column, at_own.to(grad.dtype).unsqueeze(1))

    def _write(self, logits, bias, weight, options, state, coefficient, factor, grad):
        """The gradient in plain torch, for class weights with label smoothing: its two terms need a factor each, and
        the row kernels take one factor a row."""
        smooth = options.label_smoothing / self.slices.total * self.slices.part(weight).to(coefficient.dtype)
        for rows in blocks_of(logits):
            z, slope = transform(logits[rows], bias, options)
            result = (z - state.row_max[rows].unsqueeze(1)).exp_()
            result.mul_((factor[rows] / state.sum_exp[rows]).unsqueeze(1))
            result.addcmul_(smooth, coefficient[rows].unsqueeze(1), value=-1)
            grad[rows] = result if slope is None else result.mul_(slope)

    def _targets(self, target: Tensor, bias: Tensor | None, options: RowOptions) -> _Targets:
        target, slices = target.long(), self.slices
        ignored = target == options.ignore_index
        wrong = ((target < 0) | (target >= slices.total)) & ~ignored
        index = torch.where(ignored | wrong, 0, target)
        owned = (target >= slices.start) & (target < slices.stop) & ~ignored
        # A class that is not masked by its bias, if there is one: the row kernels leave this column out of their sums.
        other = 0 if bias is None or bias.numel() == 0 else bias.argmax()
        own = torch.where(owned, target - slices.start, other)
        return _Targets(ignored, wrong, index, owned, own, own.masked_fill(ignored, -1))

    def _smoothing(self, weight: Tensor | None, options: RowOptions) -> tuple[Tensor | None, RowOptions]:
        """Class weights and options with which the loss of a row is (1 / size) sum_j w_j (lse - z_j) of the slice, if
        label smoothing needs it."""
        smoothed = options.label_smoothing > 0
        own = None if weight is None or not smoothed else self.slices.part(weight).contiguous()
        return own, options._replace(ignore_index=-1, label_smoothing=1.0 if smoothed else 0.0, z_loss=0.0)

    def _merged(
        self,
        part: RowOutputs,
        targets: _Targets,
        bias: Tensor | None,
        weight: Tensor | None,
        options: RowOptions,
        stats: bool,
    ) -> RowOutputs:
        slices, acc = self.slices, part.loss.dtype
        sum_exp, logprob = part.sum_exp, part.logprob
        no_logits = _rows_without_logits(part.row_max, bias, self.slices)
        if no_logits is not None:
            sum_exp, logprob = sum_exp.masked_fill(no_logits, 0), logprob.masked_fill(no_logits, -math.inf)
        row_max = part.row_max.clone()
        dist.all_reduce(row_max, dist.ReduceOp.MAX, group=slices.group)
        shift = part.row_max - row_max
        scaled = sum_exp * shift.exp()
        others = torch.where(targets.owned, -logprob.expm1(), 1) * scaled
        log_sum = sum_exp.log()
        parts = [others, torch.where(targets.owned, shift + log_sum + logprob, 0)]
        if options.label_smoothing > 0:
            size = part.loss.new_tensor(slices.sizes[slices.rank])
            own_weight = size if weight is None else slices.part(weight).to(acc).sum()
            gaps = part.loss * size - own_weight * (shift + log_sum)
            if no_logits is not None:
                gaps = torch.where(no_logits, torch.where(own_weight > 0, math.inf, 0.0), gaps)
            parts.append(gaps)
        if stats:
            moment = scaled * (log_sum - part.entropy + shift)
            parts.append(torch.where(scaled > 0, moment, scaled))
        sums = torch.stack(parts)
        dist.all_reduce(sums, group=slices.group)

        others, target_shifted, *more = sums
        target_exp = target_shifted.exp()
        sum_exp = others + target_exp
        log_sum = sum_exp.log()
        logprob = torch.where(target_exp > others, -torch.log1p(others / target_exp), target_shifted - log_sum)
        smoothing = options.label_smoothing
        target_weight = 1.0 if weight is None else weight.to(acc)[targets.index]
        loss = -(1 - smoothing) * target_weight * logprob
        if smoothing > 0:
            weight_sum = slices.total if weight is None else weight.to(acc).sum()
            loss = loss + smoothing / slices.total * (more[0] + weight_sum * log_sum)
        if options.z_loss > 0:
            loss = loss + options.z_loss * (row_max + log_sum).square()

        def valid_only(values: Tensor, otherwise: float = 0) -> Tensor:
            return values.masked_fill(targets.ignored, otherwise)

        outputs = RowOutputs(
            valid_only(loss.masked_fill(targets.wrong, math.nan)),
            valid_only(row_max),
            valid_only(sum_exp, 1),
            valid_only(logprob.masked_fill(targets.wrong, math.nan)),
            part.prediction,
            part.entropy,
        )
        if not stats:
            return outputs
        prediction = torch.where(part.row_max == row_max, part.prediction + slices.start, slices.total - 1)
        dist.all_reduce(prediction, dist.ReduceOp.MIN, group=slices.group)
        entropy = log_sum - more[-1] / sum_exp
        return outputs._replace(prediction=valid_only(prediction, -1), entropy=valid_only(entropy))


class SlicedProbabilityRows(Rows):
    """Class probabilities of this rank's slice; the class weights are whole. With the state of the whole row the
    gradient is one process's."""

    def __init__(self, rows: Rows, slices: Slices) -> None:
        self.rows = probability_rows(rows, slices.total)
        self.slices = slices

    def forward(self, logits, target, bias, weight, options, *, stats, coefficient=None, grad=None):
        if logits.shape[1] == 0:
            part = _empty_slice_outputs(logits, False)._replace(logprob=logits.new_zeros(logits.shape[0]))
        else:
            own = None if weight is None else self.slices.part(weight)
            apart, parts = options._replace(z_loss=0.0), []
            for rows in blocks_of(logits):
                kept = logits[rows] if grad is None else logits[rows].clone()  # the sums overwrite them
                parts.append(self.rows.forward(kept, target[rows], bias, own, apart, stats=False))
            part = RowOutputs(*map(torch.cat, zip(*parts, strict=True))) if parts else empty_outputs(logits, 0, False)
        no_logits = _rows_without_logits(part.row_max, bias, self.slices)
        row_max = part.row_max.clone()
        dist.all_reduce(row_max, dist.ReduceOp.MAX, group=self.slices.group)
        shift = part.row_max - row_max
        to_max, sum_exp = part.loss - part.logprob * (shift + part.sum_exp.log()), part.sum_exp * shift.exp()
        if no_logits is not None:
            to_max = torch.where(no_logits, torch.where(part.logprob > 0, math.inf, 0.0), to_max)
            sum_exp = sum_exp.masked_fill(no_logits, 0)
        sums = torch.stack([sum_exp, part.logprob, to_max])
        dist.all_reduce(sums, group=self.slices.group)
        sum_exp, total, to_max = sums
        log_sum = sum_exp.log()
        loss = to_max + total * log_sum
        if options.z_loss > 0:
            loss = loss + options.z_loss * (row_max + log_sum).square()
        outputs = RowOutputs(loss, row_max, sum_exp, total, part.prediction, part.entropy)
        if grad is not None:
            self.backward(logits, target, bias, weight, options, outputs.state, coefficient, grad)
        return outputs

    def backward(self, logits, target, bias, weight, options, state, coefficient, grad):
        if logits.shape[1]:
            own = None if weight is None else self.slices.part(weight)
            self.rows.backward(logits, target, bias, own, options, state, coefficient, grad)


def rows_for(target: Tensor, rows: Rows, slices: Slices | None) -> Rows:
    """The row kernels for this target, of a slice if the vocabulary is sliced: `rows` for class indices."""
    if target.is_floating_point():
        return probability_rows(rows) if slices is None else SlicedProbabilityRows(rows, slices)
    return rows if slices is None else SlicedRows(rows, slices)


def slices_in(plan: PlanOptions, operands: Operands) -> Slices | None:
    """The slices of the vocabulary, None if it is whole."""
    if plan.group is None:
        return None
    return slices_of(NAME, plan.group, operands.linear_weight, plan.vocab_start, plan.sizes)


def _empty_slice_outputs(logits: Tensor, stats: bool) -> RowOutputs:
    """The outputs that the row kernels would give for a slice without classes."""
    none = empty_outputs(logits, logits.shape[0], stats)
    state = RowState(none.row_max.fill_(-math.inf), none.sum_exp.zero_(), none.logprob.fill_(-math.inf))
    return RowOutputs(none.loss.zero_(), *state, none.prediction.zero_(), none.entropy.zero_())


def _rows_without_logits(row_max: Tensor, bias: Tensor | None, slices: Slices) -> Tensor | None:
    """The rows in which all logits of the slice are -inf; None if there can be none. The row kernels' sum is NaN there,
    as it is in rows with a NaN: the bias tells them apart."""
    if slices.sizes[slices.rank] == 0:
        return torch.ones_like(row_max, dtype=torch.bool)
    return None if bias is None else (row_max == -math.inf) & (bias == -math.inf).all()
