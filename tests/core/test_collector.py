"""A call leaves nothing to Python's cycle collector: its objects are freed with their last reference."""

from __future__ import annotations

import gc

import pytest
import torch
from cases import BACKENDS
from public_calls import CALLS, DIM, ROWS, differentiable, indices, left_over

import sslkernels as sk
from sslkernels.core import backends


@pytest.fixture(scope="module", autouse=True)
def _unfrozen_afterwards():
    yield
    gc.unfreeze()


@pytest.mark.full_for(backend_name=("reference", "triton"))
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("backend_name", BACKENDS)
def test_a_call_leaves_no_cycles(backend_name, name, device):
    call = CALLS[name]
    if backend_name not in sk.available_backends(call.op, device):
        pytest.skip(str(backends.why_not(call.op, backend_name, torch.device(device))))
    if backend_name == "triton" and device == "cpu":
        pytest.skip("the interpreter leaves its own")
    leaves = call.leaves(device)

    def step():
        sum(output.sum() for output in differentiable(call.run(*leaves))).backward()

    def forward():
        call.run(*leaves)
        with torch.no_grad():
            call.run(*leaves)

    with sk.use_backend(backend_name):
        assert left_over(step) == 0
        assert left_over(forward) == 0


def test_a_cycle_is_seen():
    def step():
        cycle = []
        cycle.append(cycle)

    assert left_over(step) == 1


def draws(device):
    ids = indices(torch.empty(0, device=device), (ROWS, DIM), 20)
    hidden, head = (torch.randn(shape, device=device) for shape in ((ROWS, DIM), (20, DIM)))
    streams = ("random_bits", "random_uniform", "random_exponential", "random_gumbel", "random_normal")
    yield from ((name, lambda name=name: getattr(sk, name)((ROWS, DIM), 1)) for name in streams)
    yield "mask_tokens", lambda: sk.mask_tokens(ids, mask_id=3, vocab_size=20, seed=1)
    yield "linear_sample", lambda: sk.linear_sample(hidden, head, seed=1)
    yield "sinkhorn_center", lambda: sk.sinkhorn_center(hidden, head)
    yield "teacher_center", lambda: sk.teacher_center(hidden, head)
    normal = sk.distributions.FusedNormal(hidden, hidden.exp())
    yield "FusedNormal", lambda: normal.rsample().sum() + normal.log_prob(hidden).sum()


@pytest.mark.parametrize("name", [name for name, _ in draws("cpu")])
def test_a_draw_leaves_no_cycles(name, device):
    assert left_over(dict(draws(device))[name]) == 0


def modules():
    nn = sk.nn
    target, mask = torch.randint(11, (ROWS,)), torch.randint(20, (ROWS, DIM))
    x, y, logits = torch.randn(ROWS, DIM), torch.randn(ROWS, DIM), torch.randn(ROWS, 11)
    weight = torch.nn.Parameter(torch.randn(11, DIM))
    yield "CrossEntropyLoss", nn.CrossEntropyLoss(), (logits, target)
    yield "LinearCrossEntropyLoss", nn.LinearCrossEntropyLoss(), (x, weight, target)
    yield "LinearHead", nn.LinearHead(DIM, 11), (x, target)
    yield "TokenMasker", nn.TokenMasker(mask_id=3, vocab_size=20), (mask,)
    yield "ContrastiveLoss", nn.ContrastiveLoss(), (x, y)
    yield "InfoNCELoss", nn.InfoNCELoss(), (x, y)
    yield "NTXentLoss", nn.NTXentLoss(), (x, y)
    yield "ClipLoss", nn.ClipLoss(), (x, y)
    yield "SigLipLoss", nn.SigLipLoss(), (x, y)
    yield "GaussianLatent", nn.GaussianLatent(), (x, y)
    yield "GumbelQuantizer", nn.GumbelQuantizer(11, DIM), (logits,)
    yield "VectorQuantizer", nn.VectorQuantizer(11, DIM), (x,)
    yield "ResidualVectorQuantizer", nn.ResidualVectorQuantizer(2, 11, DIM), (x,)
    yield "PrototypeLoss", nn.PrototypeLoss(11), (x, weight, y, weight.detach())
    yield "FreeEnergy", nn.FreeEnergy(), (logits,)


@pytest.mark.parametrize("name", [name for name, *_ in modules()])
def test_a_module_leaves_no_cycles(name):
    module, inputs = {name: (module, inputs) for name, module, inputs in modules()}[name]
    inputs = [t.requires_grad_() if t.is_floating_point() else t for t in inputs]

    def step():
        results = [output.sum() for output in differentiable(module(*inputs))]
        if results:
            sum(results).backward()

    assert left_over(step) == 0


def test_modules_are_all_here():
    assert {name for name, *_ in modules()} == set(sk.nn.__all__)
