"""vector_quantize on a GPU: single kernels, real sizes, matrix units, streams, graphs, synchronisations and memory."""

from __future__ import annotations

import pytest
import torch
from cases import DTYPES
from cuda_graphs import captured, no_synchronisation
from kernel_files import kernels
from raw_operators import single_kernels, skip_without_kernel

import sslkernels as sk
from sslkernels.core.dtypes import accumulation_dtype
from sslkernels.latent.vector_quantize import KERNELS

pytestmark = [pytest.mark.gpu, kernels("vector_quantize"), pytest.mark.usefixtures("as_users_run")]
OP = "vector_quantize"
METRICS = ("l2", "cosine", "dot")


def problem(rows, codes, dim, dtype):
    g = torch.Generator("cuda").manual_seed(0)
    return tuple(torch.randn(n, dim, generator=g, device="cuda").to(dtype) for n in (rows, codes))


@single_kernels
@pytest.mark.parametrize("dim", [1, 64, 77])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codes_and_their_differences(backend, dtype, dim):
    skip_without_kernel(backend)
    generator = torch.Generator().manual_seed(0)
    x, c = (torch.randn(n, dim, generator=generator, dtype=torch.float64).to(dtype) for n in (37, 11))
    index = torch.randint(11, (37,), generator=generator)
    score = torch.where(torch.arange(37) % 5 > 0, 0.0, torch.nan).double()
    acc = accumulation_dtype(dtype)
    values, distance = torch.zeros_like(x), torch.zeros(37, dtype=acc)
    coefficient, out = torch.full((), -0.3, dtype=acc), torch.zeros_like(x)
    gather, difference = (x, c, index, score, values, distance), (coefficient, x, c, index, out)
    for name, arguments, count in (("gather", gather, 2), ("difference", difference, 1)):
        there = [t.cuda() for t in arguments]
        getattr(KERNELS[backend], name)(*there)
        getattr(KERNELS["reference"], name)(*arguments)
        for got, want in zip(there[-count:], arguments[-count:], strict=True):
            torch.testing.assert_close(got.cpu(), want, equal_nan=True)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(4096, 8192, 64), (1000, 1024, 256), (513, 65536, 32), (300, 517, 770)], ids=str)
def test_the_codes_equal_the_host(backend, shape, dtype, metric):
    """Codes are exact and so do not depend on the device; matrix units alone would get near ties wrong."""
    if backend == "reference":
        pytest.skip("this is compared with the reference")
    x, c = problem(*shape, dtype)
    c[-100:] = c[:100]
    c[-200:-100] = torch.nextafter(c[:100], torch.full_like(c[:100], float("inf")))
    got = sk.vector_quantize(x, c, metric=metric)
    with sk.use_backend("cpu" if "cpu" in sk.available_backends(OP, "cpu") else "reference"):
        expected = sk.vector_quantize(x.cpu(), c.cpu(), metric=metric)
    assert torch.equal(got.indices.cpu(), expected.indices)
    assert torch.equal(got.values.cpu(), expected.values)
    assert torch.equal(got.usage.cpu(), expected.usage)
    torch.testing.assert_close(got.commitment.cpu(), expected.commitment)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equal_codes_and_rows_that_are_not_finite(backend, dtype):
    x, c = problem(300, 700, 64, dtype)
    assert not sk.vector_quantize(x, c[:1].expand(700, 64)).indices.any()
    x[7, 3], x[9, 5], c[600, 1] = float("nan"), float("inf"), float("-inf")
    got = sk.vector_quantize(x, c)
    with sk.use_backend("reference"):
        expected = sk.vector_quantize(x, c)
    assert torch.equal(got.indices, expected.indices)
    assert torch.equal(got.values.isnan(), expected.values.isnan())


def test_nothing_synchronises_and_a_graph_replays(backend):
    x, c = (t.requires_grad_() for t in problem(1000, 300, 64, torch.float32))

    def step():
        got = sk.vector_quantize(x, c, codebook_weight=1.0)
        return *got, *torch.autograd.grad(got.values.square().sum() + got.commitment, (x, c))

    expected = step()
    graph, got = captured(step)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("decay", [0.99, None])
def test_the_module_does_not_synchronise_and_replays(backend, decay):
    module, twin = (sk.nn.VectorQuantizer(300, 64, decay=decay, revive_below=0.3).cuda() for _ in range(2))
    data = [problem(1000, 1, 64, torch.float32)[0] * (step + 1) for step in range(4)]
    module(data[0])  # starts
    with no_synchronisation():
        module(data[1])
    static = data[2].clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        module(static)
    for x in data[2:]:
        static.copy_(x)
        graph.replay()
    for x in data:
        twin(x)
    for name, value in twin.state_dict().items():
        assert torch.equal(module.state_dict()[name], value), name


@pytest.mark.large
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_distances_are_not_materialised(backend, dtype):
    if backend == "reference":
        pytest.skip("the reference materialises scores")
    x, c = problem(1 << 20, 8192, 64, dtype)  # 32 GB of distances
    sk.vector_quantize(x[:64], c)  # the matmul takes memory of its own for good
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    got = sk.vector_quantize(x, c)
    assert torch.cuda.max_memory_allocated() - before < got.values.nbytes + (96 << 20)


@pytest.mark.large
def test_more_than_2_to_the_31_elements(backend):
    if backend == "reference":
        pytest.skip("the reference would take minutes")
    rows = (1 << 23) + 5
    if torch.cuda.mem_get_info()[0] < 6 * rows * 256:
        pytest.skip("needs 13 GB")
    c = torch.randn(16, 256, device="cuda", dtype=torch.bfloat16)
    index = torch.arange(rows, device="cuda") % 16
    got = sk.vector_quantize(c[index], c)
    assert torch.equal(got.indices, index)
    assert torch.equal(got.usage, torch.bincount(index, minlength=16))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("setting", [("fp32_precision", "tf32"), ("allow_fp16_accumulation", True)], ids=lambda s: s[0])
def test_matmuls_of_reduced_precision(backend, metric, setting):
    """Matmul settings of torch change no code."""
    name, value = setting
    x, c = problem(2000, 3000, 96, torch.float16 if name.startswith("allow") else torch.float32)
    c[1500:] = c[:1500] + 1e-3
    expected = sk.vector_quantize(x, c, metric=metric)
    before = getattr(torch.backends.cuda.matmul, name)
    setattr(torch.backends.cuda.matmul, name, value)
    try:
        got = sk.vector_quantize(x, c, metric=metric)
    finally:
        setattr(torch.backends.cuda.matmul, name, before)
    with sk.use_backend("reference"):
        truth = sk.vector_quantize(x, c, metric=metric)
    assert torch.equal(expected.indices, truth.indices)
    assert torch.equal(got.indices, truth.indices)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.float64)], ids=str)
def test_input_and_codebook_of_different_dtypes(backend, dtypes):
    x, c = (t.to(dtype) for t, dtype in zip(problem(1000, 9000, 40, torch.float32), dtypes, strict=True))
    got = sk.vector_quantize(x, c, codebook_weight=1.0)
    with sk.use_backend("reference"):
        expected = sk.vector_quantize(x, c, codebook_weight=1.0)
    assert torch.equal(got.indices, expected.indices)
    assert torch.equal(got.values, expected.values)
    torch.testing.assert_close(got.commitment, expected.commitment)


@pytest.mark.sanitize
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("shape", [(37, 53, 19), (9, 2100, 5)], ids=str)
def test_small_problems(backend, shape, metric):
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        x, c = problem(*shape, dtype)
        c[-20:] = c[:20]
        x[3] = float("nan")
        got = sk.vector_quantize(x, c, metric=metric)
        with sk.use_backend("reference"):
            expected = sk.vector_quantize(x, c, metric=metric)
        assert torch.equal(got.indices, expected.indices)
