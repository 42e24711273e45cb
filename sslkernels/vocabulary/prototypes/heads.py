"""Checks of features and the heads that project them to logits."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sslkernels.core import checks
from sslkernels.core.operator import full
from sslkernels.vocabulary.prototypes.distillation_records import NAME


def check_head(
    function: str,
    name: str,
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    device: torch.device | None = None,
    sliced: bool = False,
) -> None:
    """Checks features (..., D), weight (V, D) and bias (V,), named `name`, `name`_weight and `name`_bias. A slice of a
    weight may have no rows."""
    checks.tensor(function, name, features, checks.FLOAT_DTYPES)
    checks.dims(function, name, features, 1, "(..., D)")
    checks.tensor(function, f"{name}_weight", weight, checks.FLOAT_DTYPES)
    checks.dims(function, f"{name}_weight", weight, 2, "(V, D)", high=2)
    checks.shape(function, f"{name}_weight", weight, (weight.shape[0], features.shape[-1]), "(V, D)")
    if weight.shape[0] == 0 and not sliced:
        checks.fail(ValueError, function, f"{name}_weight", "have at least one row", tuple(weight.shape))
    checks.tensor(function, f"{name}_bias", bias, checks.FLOAT_DTYPES, optional=True)
    checks.shape(function, f"{name}_bias", bias, (weight.shape[0],), "(V,)")
    if device is not None:
        checks.same_device(function, name, features, "student", device)
    checks.same_device(function, f"{name}_weight", weight, name, features.device)
    checks.same_device(function, f"{name}_bias", bias, name, features.device)


def temperature_tensor(
    function: str, name: str, value: float | Tensor, features: str, device: torch.device, *, high: float = math.inf
) -> Tensor:
    """A checked temperature as a float64 tensor () on the device of the argument `features`."""
    if not isinstance(value, Tensor):
        checks.number(function, name, value, low=0.0, high=high, low_open=True)
        return full((), value, torch.float64, device)
    checks.tensor(function, name, value, checks.FLOAT_DTYPES)
    checks.same_device(function, name, value, features, device)
    if value.numel() != 1:
        checks.fail(ValueError, function, name, "be a number or a tensor of one element", tuple(value.shape))
    return value.reshape(()).double()


class Heads(NamedTuple):
    """The tensors with a row per prototype; over ranks, per prototype of this rank's slice."""

    student_weight: Tensor
    student_bias: Tensor | None
    teacher_weight: Tensor
    teacher_bias: Tensor | None
    center: Tensor | None


def check_heads(student: Tensor, teacher: Tensor, heads: Heads, sliced: bool) -> None:
    student_weight, student_bias, teacher_weight, teacher_bias, center = heads
    check_head(NAME, "student", student, student_weight, student_bias, sliced=sliced)
    checks.tensor(NAME, "teacher_weight", teacher_weight, checks.FLOAT_DTYPES)
    if teacher_weight.shape[:1] != student_weight.shape[:1]:
        must = f"have as many rows as student_weight, {student_weight.shape[0]}"
        checks.fail(ValueError, NAME, "teacher_weight", must, tuple(teacher_weight.shape))
    check_head(NAME, "teacher", teacher, teacher_weight, teacher_bias, device=student.device, sliced=sliced)
    if teacher.dtype == torch.float64 and student.dtype != torch.float64:
        checks.fail(TypeError, NAME, "teacher", f"not be float64 with a student of {student.dtype}", teacher.dtype)
    checks.tensor(NAME, "center", center, checks.FLOAT_DTYPES, optional=True)
    checks.shape(NAME, "center", center, student_weight.shape[:1], "(V,)")
    checks.same_device(NAME, "center", center, "student", student.device)


def check_rows(student: Tensor, teacher: Tensor, teacher_index: Tensor | None, row_weight: Tensor | None) -> None:
    shape = student.shape[:-1]
    if teacher_index is None:
        checks.shape(NAME, "teacher", teacher, (*shape, teacher.shape[-1]), "the rows of student and features")
    else:
        checks.tensor(NAME, "teacher_index", teacher_index, checks.INDEX_DTYPES)
        checks.dims(NAME, "teacher_index", teacher_index, 1, "(..., T)")
        expected = (*shape, teacher_index.shape[-1])
        checks.shape(NAME, "teacher_index", teacher_index, expected, "the rows of student and T")
        checks.same_device(NAME, "teacher_index", teacher_index, "student", student.device)
        if teacher_index.shape[-1] == 0:
            checks.fail(ValueError, NAME, "teacher_index", "have at least one column", tuple(teacher_index.shape))
    checks.tensor(NAME, "row_weight", row_weight, checks.FLOAT_DTYPES, optional=True)
    checks.shape(NAME, "row_weight", row_weight, shape, "student.shape[:-1]")
    checks.same_device(NAME, "row_weight", row_weight, "student", student.device)
