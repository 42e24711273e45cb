"""linear_sample on a GPU: real sizes, the draws of the host, graphs, synchronisations, memory."""

from __future__ import annotations

import pytest
import torch
from cuda_graphs import captured
from kernel_files import kernels
from torch import Tensor

import sslkernels as sk
from benchmarks import memory
from sslkernels.vocabulary import linear_sample as module

pytestmark = [pytest.mark.gpu, kernels("linear_sample"), pytest.mark.usefixtures("as_users_run")]
OP = "linear_sample"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def inputs(rows: int, vocab: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(rows, dim, generator=g, device="cuda").to(dtype)
    w = (2 * dim**-0.5 * torch.randn(vocab, dim, generator=g, device="cuda")).to(dtype)
    return x, w, torch.randn(vocab, generator=g, device="cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 128256, 256), (300, 5003, 770), (64, 4096, 64), (1500, 50_257, 32), (7, 3, 8)], ids=str
)
def test_draws_the_winner(backend, dtype, shape):
    """Products are float32 for every dtype."""
    x, w, bias = inputs(*shape, dtype)
    index, logprob = sk.linear_sample(x, w, linear_bias=bias, temperature=0.7, seed=5)
    logits = (x.double() @ w.double().t() + bias) / 0.7
    perturbed = logits + sk.random_gumbel(logits.shape, 5, device="cuda")
    margin = 1e-5 * (1 + logits.abs().amax(1))
    assert (perturbed.gather(1, index[:, None])[:, 0] >= perturbed.amax(1) - margin).all()
    exact = logits.log_softmax(1).gather(1, index[:, None])[:, 0]
    assert ((logprob - exact).abs() <= margin).all()


@pytest.mark.parametrize("spread", [0.0, 1.0, 30.0])
def test_the_draws_of_the_host(backend, spread):
    """Bit for bit if the products are exact."""
    rows, vocab = 3000, 9001
    w = torch.zeros(vocab, 16, dtype=torch.bfloat16)
    w[:, 0] = spread * torch.randn(vocab, generator=torch.Generator().manual_seed(0))
    x = torch.ones(rows, 16, dtype=torch.bfloat16)
    got = sk.linear_sample(x.cuda(), w.cuda(), seed=3).index
    with sk.use_backend("reference"):
        noise = sk.random_gumbel((rows, vocab), 3)
    assert torch.equal(got.cpu(), (w[:, 0].float() + noise).argmax(1))


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tiles_of_any_size_give_the_same(monkeypatch, dtype):
    if "cuda" not in sk.available_backends(OP, "cuda"):
        pytest.skip("no CUDA kernels")
    x, w, bias = inputs(37, 9001, 16, dtype)
    with sk.use_backend("cuda"):
        expected = sk.linear_sample(x, w, linear_bias=bias, seed=1)
        monkeypatch.setitem(module.WORKSPACE_BYTES, "cuda", 1)
        monkeypatch.setattr(module, "ROWS_AT_ONCE", 16)
        got = sk.linear_sample(x, w, linear_bias=bias, seed=1)
    same = got.index == expected.index  # another matmul may round differently
    assert same.sum() >= 36
    torch.testing.assert_close(got.logprob[same], expected.logprob[same])


def test_no_synchronisation_and_new_draws_on_each_replay(backend):
    if backend == "reference":
        pytest.skip("it is not held to it")
    x, w = torch.zeros(64, 16, device="cuda"), torch.zeros(300_000, 16, device="cuda")
    graph, (index, _) = captured(lambda: sk.linear_sample(x, w))
    graph.replay()
    first = index.clone()
    graph.replay()
    assert not torch.equal(first, index)


@pytest.mark.large
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_logits(backend, dtype):
    """Logits of 4096 rows and 128256 classes would be 2.1 GB in float32."""
    if backend == "reference":
        pytest.skip("it holds them")
    x, w, _ = inputs(4096, 128_256, 64, dtype)
    sk.linear_sample(x, w, seed=0)
    peak, results = memory.peak_extra(lambda: sk.linear_sample(x, w, seed=0), torch.device("cuda"))
    assert peak - sum(result.nbytes for result in results) < 32 << 20
