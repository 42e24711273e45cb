"""Records of the raw operator of `linear_distillation`, and the mathematics of its row.

For a row i with student logits l = input @ linear_weight.T + linear_bias and teacher logits u of some rows k:

    z = l / student_temperature                   p_i = softmax(z_i)
    Q_k = softmax((u_k + teacher_offset) / teacher_temperature)      q_i = mean of Q_k over its teachers
    cross-entropy = -sum_v q_iv log p_iv          kl = sum_v q_iv (log q_iv - log p_iv)

The gradient of either with respect to z is p - q. A backend computes both losses as sums of terms that are at least 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from sslkernels.core.dtypes import accumulation_dtype
from sslkernels.core.slices import Slices
from sslkernels.vocabulary.linear_records import Gradients, Wanted

NAME = "linear_distillation"

__all__ = ["NAME", "Gradients", "Operands", "Options", "RowOutputs", "Wanted", "empty_outputs"]


class Operands(NamedTuple):
    """Student: input (N, D), linear_weight (V, D), linear_bias (V,). Teacher: teacher (M, Dt), teacher_weight (V, Dt),
    teacher_offset (V,), its bias minus the center, float64. teacher_index (N, T), the teacher rows of each row, -1 for
    none; without it row i has teacher row i. temperature (2,), of student and teacher, float64."""

    input: Tensor
    linear_weight: Tensor
    linear_bias: Tensor | None
    teacher: Tensor
    teacher_weight: Tensor
    teacher_offset: Tensor | None
    teacher_index: Tensor | None
    temperature: Tensor

    @property
    def student_temperature(self) -> Tensor:
        return self.temperature[0]

    @property
    def teacher_temperature(self) -> Tensor:
        return self.temperature[1]


class Options(NamedTuple):
    """divergence: subtract the entropy of q. stats: fill the statistics. The dtypes of the matmuls, and the caller's
    bound of the bytes of the buffers, None for the default. group: name of the process group over which the prototypes
    are sliced, None: they are not; sizes: the sizes of all slices, empty if they are still to be exchanged. Heads,
    offsets and the usage then hold this rank's slice."""

    divergence: bool
    stats: bool
    student_dtype: torch.dtype
    teacher_dtype: torch.dtype
    workspace_bytes: int | None
    group: str | None = None
    sizes: tuple[int, ...] = ()


class RowOutputs(NamedTuple):
    """Per row (N,), in the accumulation dtype: the loss; the gap, E_p[max z - z] - E_q[max z - z], which is the
    derivative by the student's temperature, times that; the entropies of q and p and whether they are largest in the
    same column, which are empty without statistics, as is the usage (V,), the mean of q over the rows. A row without
    a teacher is left out: its values are 0."""

    loss: Tensor
    gap: Tensor
    teacher_entropy: Tensor
    student_entropy: Tensor
    agreement: Tensor
    usage: Tensor

    @property
    def rows(self) -> tuple[Tensor, ...]:
        """The fields with a value per row: all but the usage."""
        *rows, _ = self
        return tuple(rows)


def empty_outputs(operands: Operands, count: int, stats: bool) -> RowOutputs:
    input = operands.input
    acc = accumulation_dtype(input.dtype)
    some = count if stats else 0
    return RowOutputs(
        input.new_empty(count, dtype=acc),
        input.new_empty(count, dtype=acc),
        input.new_empty(some, dtype=acc),
        input.new_empty(some, dtype=acc),
        input.new_empty(some, dtype=torch.bool),
        input.new_empty(operands.linear_weight.shape[0] if stats else 0, dtype=acc),
    )


def centered(vector: Tensor | None, slices: Slices | None = None) -> Tensor | None:
    """The vector minus its mean over all slices, float64: no softmax changes, and a vector far from 0 costs no digits.
    Infinities, which mask columns, do not count."""
    if vector is None:
        return None
    finite = torch.isfinite(vector)
    sums = torch.stack([torch.where(finite, vector, 0).sum(dtype=torch.float64), finite.sum()])
    if slices is not None:
        dist.all_reduce(sums, group=slices.group)
    return vector.double() - sums[0] / sums[1].clamp_min(1)


def inverse_of(temperature: Tensor) -> Tensor:
    """1 / temperature; NaN unless it is positive."""
    return torch.where(temperature > 0, 1 / temperature, float("nan"))


def shares(index: Tensor, teachers: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The index with 0 in place of -1, and the weight of each of a row's teachers: one over their number; 0 for none,
    NaN in a row with an index out of range."""
    index = index.long()
    chosen = (index >= 0) & (index < teachers)
    wrong = ~chosen & (index != -1)
    share = chosen.to(dtype) / chosen.sum(1, keepdim=True).clamp_min(1)
    return torch.where(chosen, index, 0), share.masked_fill(wrong, float("nan"))
