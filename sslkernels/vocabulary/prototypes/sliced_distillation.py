"""Rows of `linear_distillation` when each rank has the logits of a slice of the prototypes, in plain torch on every
backend. No logits are sent: the ranks gather their maxima of each row, where the first of the largest wins, and reduce
the sums over their columns, relative to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from sslkernels.core.slices import Slices, slices_of
from sslkernels.vocabulary.prototypes.distillation_records import NAME, Operands, Options, RowOutputs
from sslkernels.vocabulary.prototypes.distillation_rows import Choice, DistillationRows, Head, TeacherState

BLOCK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 24}  # elements of the temporaries of a few rows


def slices_in(options: Options, operands: Operands) -> Slices | None:
    """The slices of the prototypes, None if the heads are whole."""
    if options.group is None:
        return None
    return slices_of(NAME, options.group, operands.linear_weight, None, options.sizes)


class _Largest(NamedTuple):
    """Per row (n,): the largest value of all slices, whether it is in this rank's, and the column of this rank's
    largest."""

    value: Tensor
    owned: Tensor
    column: Tensor


class SlicedRows(DistillationRows):
    """`best` of the teacher's state is -1 where another rank has the largest column of the row."""

    def __init__(self, slices: Slices) -> None:
        self.slices = slices

    def teacher(self, products: Tensor, head: Head) -> TeacherState:
        z = _scaled(products, head)
        largest = self._largest(z)
        exponentials = z.sub_(largest.value[:, None]).exp_()
        _write(exponentials, largest, 0)
        others = exponentials.sum(1)
        dist.all_reduce(others, group=self.slices.group)
        _write(exponentials, largest, 1)
        return TeacherState(exponentials, others, torch.where(largest.owned, largest.column, -1))

    def student(
        self,
        products: Tensor,
        head: Head,
        teacher: TeacherState,
        choice: Choice,
        coefficient: Tensor | None,
        outputs: RowOutputs,
        divergence: bool,
        grad: Tensor | None,
    ) -> None:
        z, group = _scaled(products, head), self.slices.group
        largest = self._largest(z)
        targets = _Targets(teacher, choice)
        sums = z.new_zeros(3, z.shape[0])
        for rows in _blocks(z):
            q, gap = targets.mixture(rows), largest.value[rows, None] - z[rows]
            e = (-gap).exp()
            _write(e, _Largest(*(values[rows] for values in largest)), 0)
            sums[0, rows] = e.sum(1)
            sums[1, rows] = torch.where(e == 0, 0, e * gap).sum(1)  # 0 where a logit is -inf
            sums[2, rows] = torch.where(q == 0, 0, q * gap).sum(1)
        dist.all_reduce(sums, group=group)
        others, student_gap, target_gap = sums
        total, log_sum = 1 + others, others.log1p()
        student_gap = student_gap / total
        left_out = targets.left_out(z.shape[0])
        loss = target_gap + log_sum
        stats = outputs.teacher_entropy.numel() > 0

        compared = z.new_zeros(3, z.shape[0])  # entropy of q, divergence, whether the largest columns are the same
        most, at = z.new_full(z.shape[:1], -torch.inf), torch.zeros_like(largest.column)
        for rows in _blocks(z) if divergence or stats or coefficient is not None else ():
            q, gap = targets.mixture(rows), largest.value[rows, None] - z[rows]
            p = (-gap).exp() / total[rows, None]
            difference = p - q
            own = largest.column[rows, None]
            rest_of_p = (others / total)[rows, None]
            q_own, rest_of_q = targets.at(rows, own)
            sure = largest.owned[rows, None] & (p.gather(1, own) > 0.5) & (q_own > 0.5)
            difference.scatter_(1, own, torch.where(sure, rest_of_q - rest_of_p, difference.gather(1, own)))
            if divergence or stats:
                most[rows], at[rows] = q.max(1)
                column = at[rows, None]
                q_most, rest_of_q = targets.at(rows, column)
                log_q = q.log()
                log_q.scatter_(1, column, torch.where(q_most > 0.5, (-rest_of_q).log1p(), q_most.log()))
                log_p = -gap - log_sum[rows, None]
                compared[0, rows] = -torch.where(q == 0, 0, q * log_q).sum(1)
                compared[1, rows] = torch.where(q == 0, p, q * (log_q - log_p) + difference).sum(1)
            if coefficient is not None:
                grad[rows] = (coefficient[rows, None] * difference).masked_fill_(left_out[rows, None], 0)
        if divergence or stats:
            target = self._owner(most, at)
            compared[2] = target.owned & largest.owned & (target.column == largest.column)
            dist.all_reduce(compared, group=group)
            if divergence:
                loss = compared[1] + 0 * (target_gap + others)  # NaN where the row has one
        found = [loss, student_gap - target_gap]
        if stats:
            found += [compared[0], student_gap + log_sum, compared[2] > 0]
        for out, values in zip(outputs.rows, found, strict=False):
            out.copy_(values.masked_fill(left_out, 0))

    def _largest(self, z: Tensor) -> _Largest:
        if z.shape[1] == 0:
            return self._owner(z.new_full(z.shape[:1], -torch.inf), torch.zeros_like(z[:, :0].sum(1), dtype=torch.long))
        return self._owner(*z.max(1))

    def _owner(self, value: Tensor, column: Tensor) -> _Largest:
        every = [torch.empty_like(value) for _ in self.slices.sizes]
        dist.all_gather(every, value.contiguous(), group=self.slices.group)
        largest, owner = torch.stack(every).max(0)
        return _Largest(largest, owner == self.slices.rank, column)


class _Targets:
    """q of this rank's columns."""

    def __init__(self, teacher: TeacherState, choice: Choice) -> None:
        self.teacher, self.choice = teacher, choice

    def left_out(self, count: int) -> Tensor:
        index = self.choice.index
        if index is None:
            return torch.zeros(count, dtype=torch.bool, device=self.teacher.others.device)
        return (index < 0).all(1)

    def _teachers(self, rows: slice) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Per choice the teacher rows (n,), whether they are given, and their shares."""
        index, share = self.choice
        if index is None:
            count = self.teacher.others[rows].shape[0]
            number = torch.arange(rows.start, rows.start + count, device=self.teacher.others.device)
            yield number, torch.ones_like(number, dtype=torch.bool), torch.ones_like(self.teacher.others[rows])
            return
        for number, part in zip(index[rows].unbind(1), share[rows].unbind(1), strict=True):
            yield number.clamp_min(0), number >= 0, part

    def mixture(self, rows: slice) -> Tensor:
        q = None
        for number, given, share in self._teachers(rows):
            factor = share / (1 + self.teacher.others[number])
            part = self.teacher.exponentials[number].mul_(factor[:, None]).masked_fill_(~given[:, None], 0)
            q = part if q is None else q.add_(part)
        return q

    def at(self, rows: slice, column: Tensor) -> tuple[Tensor, Tensor]:
        """q and 1 - q (n, 1) of a column (n, 1) of each row, each without cancellation."""
        q, rest = 0, 0
        for number, given, share in self._teachers(rows):
            number, given, share = number[:, None], given[:, None], share[:, None]
            others = self.teacher.others[number]
            factor = share / (1 + others)
            part = factor * self.teacher.exponentials[number, column]
            missing = torch.where(self.teacher.best[number] == column, factor * others, share - part)
            q, rest = q + torch.where(given, part, 0), rest + torch.where(given, missing, 0)
        return q, rest


def _scaled(products: Tensor, head: Head) -> Tensor:
    z = products.mul_(head.scale)
    return z if head.offset is None else z.add_(head.offset)


def _write(values: Tensor, largest: _Largest, value: float) -> None:
    """Writes the value to the largest column of each row that this rank owns."""
    if values.shape[1] == 0:
        return
    column = largest.column[:, None]
    values.scatter_(1, column, torch.where(largest.owned[:, None], value, values.gather(1, column)))


def _blocks(z: Tensor) -> Iterator[slice]:
    count, vocab = z.shape
    if vocab == 0:
        return
    step = max(BLOCK_ELEMENTS.get(z.device.type, BLOCK_ELEMENTS["cuda"]) // vocab, 1)
    for begin in range(0, count, step):
        yield slice(begin, min(begin + step, count))
