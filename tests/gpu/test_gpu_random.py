"""Random numbers on a GPU: equal bits on host and device, CUDA graphs, more than 2^31 elements."""

from __future__ import annotations

import pytest
import torch
from kernel_files import kernels

import sslkernels as sk

pytestmark = [pytest.mark.gpu, kernels("random"), pytest.mark.usefixtures("as_users_run")]
OP = "random_normal"
STREAMS = ("uniform", "exponential", "gumbel", "normal")


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


@pytest.mark.large
def test_more_than_2_to_the_31_elements(backend):
    if backend == "reference":
        pytest.skip("the reference would need float64 memory for every word")
    rows, columns = (1 << 21) + 3, 1024
    if torch.cuda.mem_get_info()[0] < 3 * rows * columns:
        pytest.skip("needs 7 GB")
    numbers = sk.random_normal((rows, columns), 1, dtype=torch.bfloat16, device="cuda")
    last = torch.arange(rows - 5, rows, device="cuda")
    assert torch.equal(numbers[-5:], sk.random_normal((5, columns), 1, row_ids=last, dtype=torch.bfloat16))
