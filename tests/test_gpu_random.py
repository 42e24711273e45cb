"""Random numbers and what samples on a GPU: the bits of the host, CUDA graphs, more than 2^31 elements."""

from __future__ import annotations

import pytest
import torch
from cuda_graphs import no_synchronisation

import sslkernels as sk

pytestmark = pytest.mark.gpu
OP = "random_normal"
STREAMS = ("uniform", "exponential", "gumbel", "normal")


@pytest.fixture(autouse=True)
def _as_users_run():
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("stream", STREAMS)
def test_equal_bits_on_host_and_device(backend, stream):
    draw = getattr(sk, f"random_{stream}")
    got = draw((2000, 1000), 12345, sample=3, device="cuda").cpu()
    with sk.use_backend("reference"):
        assert torch.equal(got, draw((2000, 1000), 12345, sample=3))


def test_a_graph_draws_a_new_seed_on_each_replay(backend):
    def draw():
        seed = torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device="cuda")
        return seed, sk.random_normal((33, 77), seed)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        draw()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        seed, numbers = draw()
    seeds = []
    for _ in range(3):
        graph.replay()
        seeds.append(int(seed))
        assert torch.equal(numbers, sk.random_normal((33, 77), seed.clone()))
    assert len(set(seeds)) == 3


def test_more_than_2_to_the_31_elements(backend):
    if backend == "reference":
        pytest.skip("its memory is that of float64 words")
    rows, columns = (1 << 21) + 3, 1024
    if torch.cuda.mem_get_info()[0] < 3 * rows * columns:
        pytest.skip("needs 7 GB")
    numbers = sk.random_normal((rows, columns), 1, dtype=torch.bfloat16, device="cuda")
    last = torch.arange(rows - 5, rows, device="cuda")
    assert torch.equal(numbers[-5:], sk.random_normal((5, columns), 1, row_ids=last, dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 128256, 256), (300, 5003, 770), (64, 4096, 64)], ids=str)
def test_linear_sample(dtype, shape):
    rows, vocab, dim = shape
    g = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(rows, dim, generator=g, device="cuda").to(dtype)
    w = (2 * dim**-0.5 * torch.randn(vocab, dim, generator=g, device="cuda")).to(dtype)
    bias = torch.randn(vocab, generator=g, device="cuda")
    with sk.use_backend("triton"):
        index, logprob = sk.linear_sample(x, w, linear_bias=bias, temperature=0.7, seed=5)
    logits = (x.double() @ w.double().t() + bias) / 0.7
    perturbed = logits + sk.random_gumbel((rows, vocab), 5, device="cuda")
    margin = 1e-5 * (1 + logits.abs().amax(1))
    assert (perturbed.gather(1, index[:, None])[:, 0] >= perturbed.amax(1) - margin).all()
    exact = logits.log_softmax(1).gather(1, index[:, None])[:, 0]
    assert ((logprob - exact).abs() <= margin).all()


def test_linear_sample_synchronises_nothing_and_a_graph_draws_anew():
    x, w = torch.zeros(64, 16, device="cuda"), torch.zeros(1000, 16, device="cuda")
    with sk.use_backend("triton"):
        sk.linear_sample(x, w)
        with no_synchronisation():
            sk.linear_sample(x, w)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            index, _ = sk.linear_sample(x, w)
    graph.replay()
    first = index.clone()
    graph.replay()
    assert not torch.equal(first, index)
