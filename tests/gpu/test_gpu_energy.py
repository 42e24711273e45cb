"""free_energy and prediction_energy on a GPU: single kernels, real sizes, graphs and synchronisations."""

from __future__ import annotations

import energy_oracle
import oracle
import pytest
import torch
from cases import DTYPES
from cuda_graphs import captured
from energy_oracle import exact, gradients, problem
from kernel_files import kernels
from raw_operators import assert_equal_to_reference, single_kernels, skip_without_kernel

import sslkernels as sk
from sslkernels.latent import free_energy, prediction_energy
from sslkernels.latent.free_energy import free_energy_bwd, free_energy_fwd
from sslkernels.latent.prediction_energy import prediction_energy_bwd, prediction_energy_fwd

pytestmark = pytest.mark.gpu
OP = "prediction_energy"
MODES = ("soft", "min")
BELOW_FLOAT64 = DTYPES[:3]


@kernels("free_energy")
@single_kernels
@pytest.mark.parametrize("minimum", [False, True])
@pytest.mark.parametrize("shape", [(300, 7, 1), (3, 1003, 1), (2, 9, 77), (1, 300, 64)], ids=str)
@pytest.mark.parametrize("dtype", BELOW_FLOAT64, ids=str)
def test_free_energy(backend, dtype, shape, minimum):
    skip_without_kernel(backend)
    energy = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    options = free_energy.Options(0.7, minimum)
    found = assert_equal_to_reference(free_energy_fwd, (energy, options, True), dtype)
    arguments = (found.value, None if minimum else energy, found.state, options, shape[1], dtype)
    assert_equal_to_reference(free_energy_bwd, arguments, dtype)


@kernels("prediction_energy")
@single_kernels
@pytest.mark.parametrize("minimum", [False, True])
@pytest.mark.parametrize("shape", [(300, 5, 24), (3, 7, 77), (2, 3, 20_000)], ids=str)
@pytest.mark.parametrize("dtype", BELOW_FLOAT64, ids=str)
def test_prediction_energy(backend, dtype, shape, minimum):
    skip_without_kernel(backend)
    g = torch.Generator().manual_seed(0)
    tensors = [torch.randn(s, generator=g).to(dtype) for s in (shape, (shape[0], shape[2]))]
    inputs, reduction = prediction_energy.Inputs(*tensors), prediction_energy.Reduction(1 / shape[2], int(minimum))
    kept = prediction_energy.Kept(weights=True, stats=True)
    value, weights, *_ = assert_equal_to_reference(prediction_energy_fwd, (inputs, None, reduction, kept), dtype)
    wanted = prediction_energy.Wanted(True, True)
    assert_equal_to_reference(prediction_energy_bwd, (value.sign(), inputs, weights, wanted), dtype)


@kernels("free_energy")
@pytest.mark.parametrize("mode", MODES)
def test_free_energy_synchronises_nothing_and_a_graph_replays(backend, mode):
    if backend == "reference":
        pytest.skip("the reference may synchronise")
    torch.use_deterministic_algorithms(False)
    energy = torch.randn(1000, 64, device="cuda", requires_grad=True)

    def step():
        value = sk.free_energy(energy, mode=mode)
        return value, torch.autograd.grad(value.sum(), energy)[0]

    expected = step()
    graph, got = captured(step)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@kernels("prediction_energy")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(512, 8, 64), (2, 8, 100_000)], ids=str)
def test_prediction_energy_synchronises_nothing_and_a_graph_replays(backend, shape, mode):
    if backend == "reference":
        pytest.skip("the reference may synchronise")
    torch.use_deterministic_algorithms(False)
    inputs = problem("cuda", batch=shape[0], count=shape[1], features=shape[2:], dtype=torch.float32)

    def step():
        loss = sk.prediction_energy(**inputs, mode=mode)
        return loss, *gradients(loss, inputs)

    expected = step()
    graph, got = captured(step)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@kernels("prediction_energy")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(4096, 8, 512), (70000, 8, 16), (3, 8, 300_001), (1, 100_000, 24), (2, 3, 77)], ids=str
)
@pytest.mark.parametrize("mode", MODES)
def test_real_sizes(backend, mode, shape, dtype):
    if backend == "reference":
        pytest.skip("the others are compared with the reference")
    inputs = problem("cuda", batch=shape[0], count=shape[1], features=shape[2:], dtype=dtype)
    leaves = exact(inputs)
    beta = 1 / shape[2]
    rows = sk.prediction_energy(**inputs, beta=beta, mode=mode, reduction="none")
    truth = energy_oracle.prediction_energy(**leaves, beta=beta, mode=mode, reduction="none")
    eager = energy_oracle.prediction_energy(**inputs, beta=beta, mode=mode, reduction="none")
    assert oracle.error(rows, truth) <= oracle.error(eager, truth) + 1e-6
    true_grads, eager_grads = gradients(truth.sum(), leaves), gradients(eager.sum(), inputs)
    for got, rough, true in zip(gradients(rows.sum(), inputs), eager_grads, true_grads, strict=True):
        assert oracle.error(got, true) <= oracle.error(rough, true) + 4 * torch.finfo(dtype).eps


@kernels("prediction_energy")
@pytest.mark.large
@pytest.mark.parametrize("shape", [(70_000, 8, 4096), (2, 300_000, 4096)], ids=str)
def test_more_than_2_to_the_31_elements(backend, shape):
    if backend == "reference":
        pytest.skip("the reference materialises the differences in float32")
    prediction = torch.zeros(shape, device="cuda", dtype=torch.bfloat16)
    target = torch.ones(shape[0], shape[2], device="cuda", dtype=torch.bfloat16)
    prediction[-1, -1] = 0.5
    prediction.requires_grad_()
    target.requires_grad_()
    rows = sk.prediction_energy(prediction, target, reduction="none")
    assert rows[-1] == 1024
    assert (rows[:-1] == 4096).all()
    grad, grad_target = torch.autograd.grad(rows[-1], (prediction, target))
    assert (grad[-1, -1] == -1).all()
    assert not grad[:-1].any()
    assert not grad[-1, :-1].any()
    assert (grad_target[-1] == 1).all()
