"""The row kernels of `linear_distillation`: a teacher's rows become exponentials, a student's their gradient."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sslkernels.vocabulary.prototypes.distillation_records import RowOutputs


class Head(NamedTuple):
    """What turns products into z: z = scale * product + offset. offset (V,) or None, scale (1,)."""

    offset: Tensor | None
    scale: Tensor


class TeacherState(NamedTuple):
    """Rows (K, V) of exp(z - max z), and per row (K,) the sum of all but the largest, and its column (int64)."""

    exponentials: Tensor
    others: Tensor
    best: Tensor


class Choice(NamedTuple):
    """The teachers of each row (n, T), as rows of a `TeacherState`, -1 for none, and their weights; None: row i has
    teacher row i."""

    index: Tensor | None
    share: Tensor | None


class DistillationRows:
    """The row kernels of a backend, over buffers in the accumulation dtype."""

    def teacher(self, products: Tensor, head: Head) -> TeacherState:
        """Overwrites the products with the exponentials."""
        raise NotImplementedError

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
        """Fills the rows of `outputs`, with statistics if they have room. coefficient (n,): also fills `grad`, which
        may be the products, with the gradient with respect to z times that."""
        raise NotImplementedError

    def add_column_sums(self, grad: Tensor, total: Tensor, first: bool) -> None:
        """total (V,) = (0 if first else total) + the sum of the rows of grad (n, V)."""
        part = grad.sum(0, dtype=total.dtype)
        total.copy_(part) if first else total.add_(part)


def _empty_state(products: Tensor) -> TeacherState:
    count = products.shape[0]
    return TeacherState(products, products.new_empty(count), products.new_empty(count, dtype=torch.int64))


class NativeRows(DistillationRows):
    """The compiled extension. On a CPU the gradient is written in place."""

    OPS = ("teacher_rows", "distillation_rows", "column_sums")

    def teacher(self, products, head):
        state = _empty_state(products)
        torch.ops.sslkernels_native.teacher_rows(products, *head, state.others, state.best)
        return state

    def student(self, products, head, teacher, choice, coefficient, outputs, divergence, grad):
        stats = outputs.usage.numel() > 0
        torch.ops.sslkernels_native.distillation_rows(
            products, *head, *teacher, *choice, coefficient, *outputs.rows, grad, divergence, stats
        )

    def add_column_sums(self, grad, total, first):
        torch.ops.sslkernels_native.column_sums(grad, total, not first)


class TritonRows(DistillationRows):
    """The Triton kernels, imported at the first call."""

    def teacher(self, products, head):
        from sslkernels.vocabulary.triton.distillation_rows import teacher_rows

        state = _empty_state(products)
        teacher_rows(head, state)
        return state

    def student(self, products, head, teacher, choice, coefficient, outputs, divergence, grad):
        from sslkernels.vocabulary.triton.distillation_rows import distillation_rows

        distillation_rows(products, head, teacher, choice, coefficient, outputs, divergence, grad)
