"""gaussian_rsample on a GPU: the noise of the host, real sizes, CUDA graphs, synchronisations and memory."""

from __future__ import annotations

import gaussian_oracle
import oracle
import pytest
import torch
from cases import DTYPES
from cuda_graphs import no_synchronisation
from kernel_files import kernels

import sslkernels as sk
from benchmarks import memory

pytestmark = [pytest.mark.gpu, kernels("gaussian_rsample"), pytest.mark.usefixtures("as_users_run")]
OP = "gaussian_rsample"


def parameters(rows, columns, dtype=torch.float32):
    return [torch.randn(rows, columns, device="cuda").to(dtype).requires_grad_() for _ in range(2)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2000, 256), (333, 1000), (7, 100_003), (5000, 3), (300, 8)], ids=str)
def test_values_and_gradients(backend, dtype, shape):
    if backend == "reference":
        pytest.skip("this would be compared with the reference")
    leaves = [*parameters(*shape, dtype), *(torch.randn(shape[1], device="cuda").to(dtype) for _ in range(2))]
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    options = {"num_samples": 2, "seed": 5, "kl": "row"}
    (z, kl), stats = sk.gaussian_rsample(*leaves[:2], prior=tuple(leaves[2:]), return_stats=True, **options)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    true_z, true_kl = gaussian_oracle.gaussian_rsample(*exact[:2], prior=tuple(exact[2:]), **options)
    wide = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    assert oracle.error(z, true_z) < torch.finfo(dtype).eps + 8 * wide
    assert oracle.error(kl, true_kl) < 16 * wide
    assert oracle.error(stats.mean_variance, exact[0].var(0)) < 64 * wide
    weight = torch.randn_like(true_z).to(dtype)
    got = torch.autograd.grad([z, kl.sum()], leaves, [weight, torch.ones((), device="cuda", dtype=kl.dtype)])
    true_grads = torch.autograd.grad((true_z * weight.double()).sum() + true_kl.sum(), exact)
    for grad, true in zip(got, true_grads, strict=True):
        assert oracle.error(grad, true) < 4 * torch.finfo(dtype).eps + 64 * wide


def test_the_noise_equals_the_host(backend):
    zeros = torch.zeros(1000, 300)
    with sk.use_backend("reference"):
        expected = sk.gaussian_rsample(zeros, zeros, 3, seed=7, kl=None).z
    assert torch.equal(sk.gaussian_rsample(zeros.cuda(), zeros.cuda(), 3, seed=7, kl=None).z.cpu(), expected)


def test_nothing_synchronises_and_a_graph_draws_a_new_seed_on_each_replay(backend):
    leaves = parameters(300, 64)

    def step():
        seed = torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device="cuda")
        z, kl = sk.gaussian_rsample(*leaves, 2, seed=seed, free_bits=0.1, logvar_bounds=(-3.0, 3.0))
        return seed, z, *torch.autograd.grad(z.square().sum() + kl.sum(), leaves)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    stream.synchronize()
    with no_synchronisation():
        step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        seed, z, *grads = step()
    seeds = []
    for _ in range(3):
        graph.replay()
        seeds.append(int(seed))
        options = {"seed": seed.clone(), "free_bits": 0.1, "logvar_bounds": (-3.0, 3.0)}
        expected, kl = sk.gaussian_rsample(*leaves, 2, **options)
        assert torch.equal(z, expected)
        for got, true in zip(grads, torch.autograd.grad(expected.square().sum() + kl.sum(), leaves), strict=True):
            assert torch.equal(got, true)
    assert len(set(seeds)) == 3


@pytest.mark.large
def test_memory(backend):
    if backend == "reference":
        pytest.skip("the reference materialises the noise")
    leaves = parameters(1 << 14, 1024, torch.bfloat16)
    grad = torch.randn_like(leaves[0])

    def run():
        z, kl = sk.gaussian_rsample(*leaves)
        return z, *torch.autograd.grad([z, kl.mean()], leaves, [grad, torch.ones((), device="cuda")])

    run()
    peak, results = memory.peak_extra(run, torch.device("cuda"))
    assert peak - sum(r.nbytes for r in results) < 2 << 20


@pytest.mark.large
def test_more_than_2_to_the_31_elements(backend):
    if backend == "reference":
        pytest.skip("the reference materialises float64 words")
    rows, columns = (1 << 21) + 3, 1024
    if torch.cuda.mem_get_info()[0] < 14 * rows * columns:
        pytest.skip("needs 30 GB")
    mean = torch.zeros(rows, columns, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    logvar = torch.zeros_like(mean, requires_grad=True)
    z, kl = sk.gaussian_rsample(mean, logvar, seed=3)
    last = torch.arange(rows - 5, rows, device="cuda")
    tail = [t.detach()[-5:].requires_grad_() for t in (mean, logvar)]
    expected = sk.gaussian_rsample(*tail, seed=3, row_ids=last)
    assert torch.equal(z[-5:], expected.z)
    assert torch.equal(kl[-5:], expected.kl)
    (grad,) = torch.autograd.grad(z, logvar, z.detach())
    (true,) = torch.autograd.grad(expected.z, tail[1], expected.z.detach())
    assert torch.equal(grad[-5:], true)
