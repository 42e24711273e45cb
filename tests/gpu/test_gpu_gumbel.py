"""gumbel_softmax and gumbel_quantize on a GPU: single kernels, real sizes, the host's draws, graphs, memory."""

from __future__ import annotations

import math

import gumbel_oracle
import oracle
import pytest
import torch
from cuda_graphs import captured
from kernel_files import kernels
from raw_operators import assert_equal_to_reference, single_kernels, skip_without_kernel

import sslkernels as sk
from benchmarks import memory
from sslkernels.latent import gumbel_quantize
from sslkernels.latent.gumbel_quantize import gumbel_quantize_bwd, gumbel_quantize_fwd
from sslkernels.latent.gumbel_rows import NoisyLogits, State
from sslkernels.latent.gumbel_softmax import gumbel_softmax_bwd, gumbel_softmax_fwd

pytestmark = [pytest.mark.gpu, kernels("gumbel_softmax", "gumbel_quantize"), pytest.mark.usefixtures("as_users_run")]
OP = "gumbel_quantize"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def draw(*shape, dtype=torch.float32, seed=0):
    g = torch.Generator("cuda").manual_seed(seed)
    return (2 * torch.randn(shape, generator=g, device="cuda")).to(dtype)


@single_kernels
@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("shape", [(300, 2), (33, 77), (3, 1003), (2, 40_007)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gumbel_softmax(backend, dtype, shape, hard):
    skip_without_kernel(backend)
    g = torch.Generator().manual_seed(0)
    logits, grad = (torch.randn(shape, generator=g).to(dtype) for _ in range(2))
    seed, inverse_tau = torch.tensor(5), torch.tensor(0.5, dtype=torch.float64)
    for ids in (None, torch.arange(shape[0]) + 2**33):
        source = NoisyLogits(logits, seed, ids, inverse_tau)
        found = assert_equal_to_reference(gumbel_softmax_fwd, (source, hard), dtype)
        assert_equal_to_reference(gumbel_softmax_bwd, (grad, source, State(found.max, found.sum)), dtype)


@single_kernels
@pytest.mark.parametrize("shape", [(50, 3, 5), (33, 2, 320), (2, 1, 9001)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics_of_gumbel_quantize(backend, dtype, shape):
    skip_without_kernel(backend)
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    mask, tau = torch.arange(shape[0] * shape[1]) % 3 > 0, torch.tensor(0.5, dtype=torch.float64)
    source = NoisyLogits(logits, torch.tensor(5), None, tau)
    codes = assert_equal_to_reference(gumbel_quantize_fwd, (source, mask, True), dtype)
    codebook = torch.zeros(*shape[1:], 4, dtype=dtype)
    grads, wanted = gumbel_quantize.OutputGrads(None, codes.probability), gumbel_quantize.Wanted(True, False)
    arguments = (grads, source, codebook, mask, codes.code_state, wanted)
    assert_equal_to_reference(gumbel_quantize_bwd, arguments, dtype)


@pytest.mark.parametrize("columns", [2, 17, 320, 4096, 50257, 200_003])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_draws_equal_the_host(backend, dtype, columns):
    """Bitwise, because both add the same noise in float32."""
    rows = max(2, 200_000 // columns)
    logits = draw(rows, columns, dtype=dtype)
    got = sk.gumbel_softmax(logits, 0.5, True, seed=3)
    with sk.use_backend("reference"):
        expected = (logits.cpu().float() + sk.random_gumbel((rows, columns), 3)).argmax(1)
    assert torch.equal(got.argmax(1).cpu(), expected)
    assert torch.equal(got.float().sum(1), torch.ones(rows, device="cuda"))


@pytest.mark.parametrize("columns", [2, 320, 1003, 8192, 70_001, 600_000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(backend, dtype, columns):
    """Rows that stay in registers, rows shared by a cluster, and rows computed twice."""
    rows = max(2, 300_000 // columns)
    logits, grad = draw(rows, columns, dtype=dtype).requires_grad_(), draw(rows, columns, dtype=dtype, seed=1)
    s = gumbel_oracle.perturbed(logits.detach(), -3)
    for tau in (0.2, 3.0):
        y = sk.gumbel_softmax(logits, tau, seed=-3)
        truth = ((s.double() - s.double().amax(1, keepdim=True)) / tau).softmax(1)
        allowed = 1e-5 + 2 * torch.finfo(dtype).eps
        assert oracle.error(y, truth) < allowed
        true_grad = truth * (grad.double() - (grad.double() * truth).sum(1, keepdim=True)) / tau
        assert oracle.error(torch.autograd.grad(y, logits, grad)[0], true_grad) < allowed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5000, 2, 320, 128), (999, 1, 8192, 64), (20000, 4, 7, 3)], ids=str)
def test_quantize(backend, shape, dtype):
    rows, groups, codes, dim = shape
    logits = draw(rows, groups, codes, dtype=dtype).requires_grad_()
    codebook = draw(groups, codes, dim, dtype=dtype, seed=1).requires_grad_()
    mask = torch.arange(rows, device="cuda") % 5 > 0
    got = sk.gumbel_quantize(logits, codebook, tau=2.0, mask=mask, seed=1, return_stats=True)
    leaves = [t.detach().requires_grad_() for t in (logits, codebook)]
    true = gumbel_oracle.quantize(*leaves, 2.0, True, 1, mask)
    assert torch.equal(got.indices, true.indices)
    torch.testing.assert_close(got.code_perplexity.double(), true.code_perplexity, rtol=1e-5, atol=0)
    torch.testing.assert_close(got.prob_perplexity.double(), true.prob_perplexity, rtol=1e-5, atol=0)
    weight = draw(rows, groups * dim, dtype=dtype, seed=2)
    grads = torch.autograd.grad((got.values, got.prob_perplexity), (logits, codebook), (weight, None))
    true_grads = torch.autograd.grad(
        (true.values, true.prob_perplexity), leaves, (weight.double(), torch.ones_like(true.prob_perplexity))
    )
    for grad, true_grad in zip(grads, true_grads, strict=True):
        assert oracle.error(grad, true_grad.double()) < 1e-3 + 4 * torch.finfo(dtype).eps  # 1e-3: TF32 may be on


def test_nothing_synchronises_and_a_graph_draws_anew(backend):
    logits, codebook = draw(1000, 2, 64).requires_grad_(), draw(2, 64, 16, seed=1).requires_grad_()
    tau, mask = torch.tensor(0.5, device="cuda"), torch.arange(1000, device="cuda") % 2 > 0

    def step():
        got = sk.gumbel_quantize(logits, codebook, tau=tau, mask=mask, return_stats=True)
        soft = sk.gumbel_softmax(logits, tau)
        loss = got.values.square().sum() + got.prob_perplexity + soft.square().sum()
        return got.indices, *torch.autograd.grad(loss, (logits, codebook))

    if backend == "reference":
        pytest.skip("the reference may synchronise")
    step()
    graph, got = captured(step)
    graph.replay()
    first = [t.clone() for t in got]
    graph.replay()
    assert not torch.equal(first[0], got[0])
    assert all(t.isfinite().all() for t in got)


@pytest.mark.large
def test_memory(backend):
    """Only samples and gradient have the size of the logits (512 MiB)."""
    if backend == "reference":
        pytest.skip("the reference materialises words and exponentials")
    logits, grad = draw(16384, 8192).requires_grad_(), torch.ones(16384, 8192, device="cuda")

    def run():
        y = sk.gumbel_softmax(logits, 0.5, True)
        return y, *torch.autograd.grad(y, logits, grad)

    run()
    peak, results = memory.peak_extra(run, torch.device("cuda"))
    assert peak - sum(result.nbytes for result in results) < 16 << 20


@pytest.mark.large
def test_more_than_2_to_the_31_elements(backend):
    """The last rows, whose offsets need 64 bits, equal a call with their row numbers alone."""
    if backend == "reference":
        pytest.skip("the reference materialises words and exponentials")
    rows, columns = (1 << 31) // 1000 + 1000, 1000
    logits = torch.zeros(1, columns, dtype=torch.bfloat16, device="cuda").expand(rows, columns)
    y = sk.gumbel_softmax(logits, hard=True, seed=1)
    ids = torch.arange(rows - 500, rows, device="cuda")
    assert torch.equal(y[-500:], sk.gumbel_softmax(logits[:500], hard=True, seed=1, row_ids=ids))
    assert math.isclose(float(y.sum(dtype=torch.float64)), rows)
