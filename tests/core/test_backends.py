"""Every backend x case x dtype: the error against float64 is at most that of eager torch, plus rounding."""

from __future__ import annotations

import oracle
import pytest
import torch
from cases import CASES, DTYPES, Case

import sslkernels as sk
from sslkernels.core import backends


def roundings(dtype: torch.dtype) -> float:
    """What is added to eager's error, relative to the norm: roundings of the output and of the tile before it.

    In float64 eager is the truth itself and its error reads 0: its own roundings over a row's sums are allowed for.
    """
    return (32 if dtype == torch.float64 else 1) * torch.finfo(dtype).eps


def differentiate(function, case: Case, inputs, constant, grad_output):
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    loss = function(**leaves, **constant, **case.options)
    if grad_output is None:
        grad_output = torch.randn(loss.shape, dtype=torch.float32)
    grads = torch.autograd.grad(loss, list(leaves.values()), grad_output.to(loss))
    return loss, dict(zip(leaves, grads, strict=True)), grad_output


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", backends.BACKENDS)
def test_error_is_at_most_that_of_eager(name, case, dtype, device):
    if name not in sk.available_backends(case.op, device):
        pytest.skip(str(backends.why_not(case.op, name, torch.device(device))))
    inputs, constant = case.inputs(dtype, device)
    with sk.use_backend(name):
        loss, grads, grad_output = differentiate(getattr(sk, case.op), case, inputs, constant, None)

    def as_double(tensors):
        return {k: v.double() if v.is_floating_point() else v for k, v in tensors.items()}

    eager = getattr(oracle, case.op)
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
