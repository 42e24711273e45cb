"""Cases of public ops, and the tests that run every case: the error beside eager torch's, and shapes without data.

A test module of a family lists its cases and makes its tests from them:

    CASES = [Case("free_energy", "plain", make_energy, (37, 53), options={"mode": "soft"}), ...]
    test_error_is_at_most_that_of_eager = error_is_at_most_that_of_eager(CASES)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import oracle
import pytest
import torch
from torch import Tensor

import sslkernels as sk
from sslkernels.core import backends

# Without a GPU there are no cases of "cuda", which could only be skipped.
BACKENDS = tuple(name for name in backends.BACKENDS if name != "cuda" or torch.cuda.is_available())
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Tests on Triton's interpreter mark these `full_for`: there they run the code of float32 and bfloat16.
REPEATED_DTYPES = (torch.float16, torch.float64)

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One call of a public op.

    make(generator, *sizes, **tensors) gives the (differentiable, constant) arguments by name, in float32 on the CPU.
    """

    op: str
    name: str
    make: Callable[..., tuple[Tensors, Tensors]]
    sizes: tuple[int, ...]
    tensors: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.op}-{self.name}"

    def inputs(self, dtype: torch.dtype, device: str) -> tuple[Tensors, Tensors]:
        """(differentiable, constant) arguments: the same float32 draws on every device, rounded to `dtype`."""
        g = torch.Generator().manual_seed(hash(self.sizes) % 2**31)

        def convert(tensor: Tensor) -> Tensor:
            return tensor.to(device, dtype) if tensor.is_floating_point() else tensor.to(device)

        return tuple(
            {name: convert(t) for name, t in tensors.items()} for tensors in self.make(g, *self.sizes, **self.tensors)
        )


def roundings(dtype: torch.dtype) -> float:
    """Relative error allowed beyond eager's: rounding of the output and of the tile before it.

    In float64 eager itself is the truth, with an error of 0: its own roundings over the sums of a row are allowed.
    """
    return (32 if dtype == torch.float64 else 1) * torch.finfo(dtype).eps


def differentiate(function, case: Case, inputs, constant, grad_output):
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    loss = function(**leaves, **constant, **case.options)
    if grad_output is None:
        grad_output = torch.randn(loss.shape, dtype=torch.float32)
    grads = torch.autograd.grad(loss, list(leaves.values()), grad_output.to(loss))
    return loss, dict(zip(leaves, grads, strict=True)), grad_output


def error_is_at_most_that_of_eager(cases: Sequence[Case], formulas: ModuleType = oracle) -> Callable[..., None]:
    """The test, for every backend, case and dtype, that the error against float64 is at most eager's plus roundings.

    formulas: has the op in plain torch under its public name; run in float64 it is the truth, run in the dtype under
    test it is eager torch.
    """

    @pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
    @pytest.mark.parametrize("case", cases, ids=str)
    @pytest.mark.parametrize("name", BACKENDS)
    def test(name, case, dtype, device):
        if name not in sk.available_backends(case.op, device):
            pytest.skip(str(backends.why_not(case.op, name, torch.device(device))))
        inputs, constant = case.inputs(dtype, device)
        with sk.use_backend(name):
            loss, grads, grad_output = differentiate(getattr(sk, case.op), case, inputs, constant, None)

        def as_double(tensors):
            return {k: v.double() if v.is_floating_point() else v for k, v in tensors.items()}

        eager = getattr(formulas, case.op)
        truth, true_grads, _ = differentiate(eager, case, as_double(inputs), as_double(constant), grad_output)
        eager_loss, eager_grads, _ = differentiate(eager, case, inputs, constant, grad_output)

        assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert loss.shape == truth.shape
        allowed = roundings(dtype)
        loss_rounding = 4 * torch.finfo(torch.float32).eps if dtype != torch.float64 else allowed
        assert oracle.error(loss, truth) <= oracle.error(eager_loss, truth) + loss_rounding
        for argument, grad in grads.items():
            assert grad.dtype == inputs[argument].dtype
            assert grad.shape == inputs[argument].shape
            limit = oracle.error(eager_grads[argument], true_grads[argument]) + allowed
            assert oracle.error(grad, true_grads[argument]) <= limit, argument

    return test


def shapes_without_data(cases: Sequence[Case]) -> Callable[..., None]:
    """The test that forward and backward of every case run on the device "meta"."""

    @pytest.mark.parametrize("case", cases, ids=str)
    def test(case):
        inputs, constant = case.inputs(torch.float32, "meta")
        _, grads, _ = differentiate(getattr(sk, case.op), case, inputs, constant, None)
        assert {name: grad.shape for name, grad in grads.items()} == {n: t.shape for n, t in inputs.items()}

    return test
