"""Single kernels on a GPU, on memory that the host wrote and without kernels of torch in between, for racecheck and
initcheck of compute-sanitizer: torch's own kernels read uninitialised memory and race by design."""

from __future__ import annotations

from dataclasses import astuple, dataclass

import pytest
import torch
from query_negatives_oracle import OwnCase, assert_results, wanted_outputs
from query_negatives_oracle import compute as compute_own
from query_negatives_oracle import make as make_own
from raw_operators import assert_equal_to_reference
from row_oracle import EVERY, PLAIN, assert_gradient, assert_outputs, make, oracle
from torch import Tensor

import sslkernels as sk
from sslkernels.core.dtypes import accumulation_dtype
from sslkernels.core.scale import scale_gradient_
from sslkernels.latent import free_energy, gumbel_quantize, prediction_energy
from sslkernels.latent.free_energy import free_energy_bwd, free_energy_fwd
from sslkernels.latent.gumbel_quantize import gumbel_quantize_bwd, gumbel_quantize_fwd
from sslkernels.latent.gumbel_rows import NoisyLogits, State
from sslkernels.latent.gumbel_softmax import gumbel_softmax_bwd, gumbel_softmax_fwd
from sslkernels.latent.prediction_energy import prediction_energy_bwd, prediction_energy_fwd
from sslkernels.latent.vector_quantize import KERNELS
from sslkernels.random.streams import STREAMS, stream_values
from sslkernels.vocabulary.softmax_rows import NativeRows, TritonRows

pytestmark = [pytest.mark.gpu, pytest.mark.sanitize, pytest.mark.kernel_only]
OP = "cross_entropy"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _uninitialised_memory():
    """No kernel of torch fills uninitialised memory."""
    torch.use_deterministic_algorithms(False)


@dataclass
class Rows:
    logits: Tensor
    target: Tensor
    bias: Tensor | None
    weight: Tensor | None
    coefficient: Tensor

    def to(self, device: str) -> Rows:
        return Rows(*(None if tensor is None else tensor.to(device) for tensor in astuple(self)))


def kernels(backend: str):
    if backend not in ("cuda", "triton"):
        pytest.skip("has no GPU kernel")
    return NativeRows() if backend == "cuda" else TritonRows()


@pytest.mark.parametrize("every", [False, True])
@pytest.mark.parametrize("vocab", [77, 1003, 40007])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows(backend, dtype, vocab, every):
    rows, options = kernels(backend), EVERY if every else PLAIN
    logits, target, bias, weight, coefficient = make("cpu", 5, vocab, dtype)
    host = Rows(logits, target, bias if every else None, weight if every else None, coefficient)
    want, want_grad = oracle(host.logits, host.target, host.bias, host.weight, options, coefficient)
    r = host.to("cuda")
    grad = torch.empty_like(r.logits)
    inputs = (r.logits, r.target, r.bias, r.weight, options)
    got = rows.forward(*inputs, stats=every, coefficient=r.coefficient, grad=grad)
    assert_outputs((part.cpu() for part in got), want, 32 * torch.finfo(torch.float32).eps, stats=every)
    assert_gradient(grad.cpu(), want_grad, coefficient, 32 * torch.finfo(torch.float32).eps)
    again = torch.empty_like(grad)
    rows.backward(*inputs, got.state, r.coefficient, again)
    assert_gradient(again.cpu(), want_grad, coefficient, 32 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_column_sums_and_scaling(backend, dtype):
    rows = kernels(backend)
    values = torch.randn(300, 77, generator=torch.Generator().manual_seed(0)).to(dtype)
    there = values.cuda()
    if backend == "cuda":
        total = torch.empty(77, device="cuda")
        rows.add_column_sums(there, total, True)
        torch.testing.assert_close(total.cpu(), values.float().sum(0), rtol=1e-4, atol=1e-4)
    scale = torch.tensor(0.5).cuda()
    scale_gradient_(there, scale)
    assert torch.equal(there.cpu(), values * 0.5)


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("shape", [(3, 7, 77), (3, 9, 64), (2, 300, 512)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_query_negatives(backend, dtype, shape, normalise):
    kernels(backend)
    inputs = make_own(OwnCase(dtype, shape=shape, normalise=normalise, mask="some", bias=True, smoothing=True))
    assert_results(inputs, wanted_outputs(inputs, compute_own(inputs, "cuda")))


@pytest.mark.parametrize("minimum", [False, True])
@pytest.mark.parametrize("shape", [(300, 7, 1), (3, 1003, 1), (2, 9, 77), (1, 300, 64)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_free_energy(backend, dtype, shape, minimum):
    kernels(backend)
    energy = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    options = free_energy.Options(0.7, minimum)
    found = assert_equal_to_reference(free_energy_fwd, (energy, options, True), dtype)
    arguments = (found.value, None if minimum else energy, found.state, options, shape[1], dtype)
    assert_equal_to_reference(free_energy_bwd, arguments, dtype)


@pytest.mark.parametrize("minimum", [False, True])
@pytest.mark.parametrize("shape", [(300, 5, 24), (3, 7, 77), (2, 3, 20_000)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_prediction_energy(backend, dtype, shape, minimum):
    kernels(backend)
    g = torch.Generator().manual_seed(0)
    tensors = [torch.randn(s, generator=g).to(dtype) for s in (shape, (shape[0], shape[2]))]
    inputs, options = prediction_energy.Inputs(*tensors), free_energy.Options(1 / shape[2], minimum)
    value, weights = assert_equal_to_reference(prediction_energy_fwd, (inputs, options, True), dtype)
    wanted = prediction_energy.Wanted(True, True)
    assert_equal_to_reference(prediction_energy_bwd, (value.sign(), inputs, weights, wanted), dtype)


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("shape", [(300, 2), (33, 77), (3, 1003), (2, 40_007)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gumbel_softmax(backend, dtype, shape, hard):
    kernels(backend)
    g = torch.Generator().manual_seed(0)
    logits, grad = (torch.randn(shape, generator=g).to(dtype) for _ in range(2))
    seed, inverse_tau = torch.tensor(5), torch.tensor(0.5, dtype=torch.float64)
    for ids in (None, torch.arange(shape[0]) + 2**33):
        source = NoisyLogits(logits, seed, ids, inverse_tau)
        found = assert_equal_to_reference(gumbel_softmax_fwd, (source, hard), dtype)
        assert_equal_to_reference(gumbel_softmax_bwd, (grad, source, State(found.max, found.sum)), dtype)


@pytest.mark.parametrize("shape", [(50, 3, 5), (33, 2, 320), (2, 1, 9001)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics_of_gumbel_quantize(backend, dtype, shape):
    kernels(backend)
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    mask, tau = torch.arange(shape[0] * shape[1]) % 3 > 0, torch.tensor(0.5, dtype=torch.float64)
    source = NoisyLogits(logits, torch.tensor(5), None, tau)
    codes = assert_equal_to_reference(gumbel_quantize_fwd, (source, mask, True), dtype)
    codebook = torch.zeros(*shape[1:], 4, dtype=dtype)
    grads, wanted = gumbel_quantize.OutputGrads(None, codes.probability), gumbel_quantize.Wanted(True, False)
    arguments = (grads, source, codebook, mask, codes.code_state, wanted)
    assert_equal_to_reference(gumbel_quantize_bwd, arguments, dtype)


@pytest.mark.parametrize("shape", [(5, 1), (300, 17), (33, 1030), (3, 40_007)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sample_rows(backend, dtype, shape):
    """Against the CPU kernel, in one tile and in several, with an uninitialised state."""
    if backend != "cuda":
        pytest.skip("only the extension has this kernel")
    rows, vocab = shape
    g = torch.Generator().manual_seed(0)
    products, bias = (torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in (shape, (vocab,)))
    products[0, vocab // 2] = -torch.inf
    ids, seed = torch.arange(rows) + 2**33, torch.tensor(5)
    for tile in (vocab, 4 * -(-vocab // 12)):
        found = []
        for device in ("cpu", "cuda"):
            state = [torch.empty(rows, dtype=dtype, device=device) for _ in range(4)]
            index = torch.empty(rows, dtype=torch.int64, device=device)
            inputs = [tensor.to(device) for tensor in (bias, seed, ids)]
            for first in range(0, vocab, tile):
                part = products[:, first : first + tile].contiguous().to(device)
                torch.ops.sslkernels_native.sample_rows(part, *inputs, first, vocab, 0.7, *state, index)
            found.append([tensor.cpu() for tensor in (index, *state)])
        for got, want in zip(found[1], found[0], strict=True):
            torch.testing.assert_close(got, want, rtol=16 * torch.finfo(dtype).eps, atol=16 * torch.finfo(dtype).eps)


def test_masking_and_random_words(backend):
    kernels(backend)
    ids = torch.randint(0, 1003, (3, 77), generator=torch.Generator().manual_seed(0))
    words = torch.arange(77).expand(3, 77).contiguous() // 3
    options = {"mask_id": 1, "vocab_size": 1003, "special_ids": (0, 2), "seed": torch.tensor(5)}
    for extra in ({}, {"mean_span": 3.0}, {"word_ids": words}):
        with sk.use_backend("reference"):
            expected = sk.mask_tokens(ids, **options, **extra)
        there = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in (options | extra).items()}
        for got, want in zip(sk.mask_tokens(ids.cuda(), **there), expected, strict=True):
            assert torch.equal(got.cpu(), want)


@pytest.mark.parametrize("columns", [1, 77, 132])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("stream", STREAMS)
def test_random_streams_are_those_of_the_host(backend, stream, dtype, columns):
    row_ids = torch.tensor([3, 0, 2**33 + 1, -5, 2**63 - 1])
    for ids in (None, row_ids):
        seed, there = torch.tensor(-(2**40)), None if ids is None else ids.cuda()
        dtype = torch.int32 if stream == "bits" else dtype
        expected = stream_values(stream, seed, ids, 5, columns, 2**35 + 2, dtype)
        got = getattr(torch.ops.sslkernels, f"random_{stream}")(seed.cuda(), there, 5, columns, 2**35 + 2, dtype)
        assert torch.equal(got.cpu(), expected)


@pytest.mark.parametrize("dim", [1, 64, 77])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_codes_and_their_differences(backend, dtype, dim):
    kernels(backend)
    generator = torch.Generator().manual_seed(0)
    x, c = (torch.randn(n, dim, generator=generator, dtype=torch.float64).to(dtype) for n in (37, 11))
    index = torch.randint(11, (37,), generator=generator)
    score = torch.where(torch.arange(37) % 5 > 0, 0.0, torch.nan).double()
    acc = accumulation_dtype(dtype)
    values, distance = torch.zeros_like(x), torch.zeros(37, dtype=acc)
    coefficient, out = torch.linspace(-1, 1, 37).to(acc), torch.zeros_like(x)
    gather, difference = (x, c, index, score, values, distance), (coefficient, x, c, index, out)
    for name, arguments, count in (("gather", gather, 2), ("difference", difference, 1)):
        there = [t.cuda() for t in arguments]
        getattr(KERNELS[backend], name)(*there)
        getattr(KERNELS["reference"], name)(*arguments)
        for got, want in zip(there[-count:], arguments[-count:], strict=True):
            torch.testing.assert_close(got.cpu(), want, equal_nan=True)
