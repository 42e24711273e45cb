"""Single kernels on a GPU, for racecheck and initcheck of compute-sanitizer. An op that has a file in this folder tests
its kernels there."""

from __future__ import annotations

from dataclasses import astuple, dataclass

import pytest
import torch
from kernel_files import kernels
from query_negatives_oracle import OwnCase, assert_results, by_index, gradient_by_index, wanted_outputs
from query_negatives_oracle import compute as compute_own
from query_negatives_oracle import make as make_own
from raw_operators import SINGLE_KERNELS, skip_without_kernel
from row_oracle import EVERY, PLAIN, assert_gradient, assert_outputs, make, oracle
from torch import Tensor

import sslkernels as sk
from sslkernels.core.chunks import row_pitch
from sslkernels.core.scale import scale_gradient_
from sslkernels.random.streams import STREAMS, stream_values
from sslkernels.vocabulary.probability_rows import ProbabilityRows, TritonProbabilityRows
from sslkernels.vocabulary.prototypes.distillation_records import RowOutputs
from sslkernels.vocabulary.prototypes.distillation_rows import Choice, Head
from sslkernels.vocabulary.prototypes.distillation_rows import NativeRows as NativeDistillation
from sslkernels.vocabulary.prototypes.distillation_rows import TritonRows as TritonDistillation
from sslkernels.vocabulary.softmax_rows import NativeRows, TritonRows

pytestmark = [pytest.mark.gpu, *SINGLE_KERNELS]
OP = "cross_entropy"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Rows:
    logits: Tensor
    target: Tensor
    bias: Tensor | None
    weight: Tensor | None
    coefficient: Tensor

    def to(self, device: str) -> Rows:
        return Rows(*(None if tensor is None else tensor.to(device) for tensor in astuple(self)))


def row_kernels(backend: str):
    skip_without_kernel(backend)
    return NativeRows() if backend == "cuda" else TritonRows()


@kernels("cross_entropy")
@pytest.mark.parametrize("every", [False, True])
@pytest.mark.parametrize("vocab", [77, 1003, 40007])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows(backend, dtype, vocab, every):
    rows, options = row_kernels(backend), EVERY if every else PLAIN
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


@kernels("linear_cross_entropy")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_column_sums_and_scaling(backend, dtype):
    rows = row_kernels(backend)
    values = torch.randn(300, 77, generator=torch.Generator().manual_seed(0)).to(dtype)
    there = values.cuda()
    if backend == "cuda":
        total = torch.empty(77, device="cuda")
        rows.add_column_sums(there, total, True)
        torch.testing.assert_close(total.cpu(), values.float().sum(0), rtol=1e-4, atol=1e-4)
    scale = torch.tensor(0.5).cuda()
    scale_gradient_(there, scale)
    assert torch.equal(there.cpu(), values * 0.5)


@kernels("info_nce")
@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("shape", [(3, 7, 77), (3, 9, 64), (2, 300, 512)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_query_negatives(backend, dtype, shape, normalise):
    skip_without_kernel(backend)
    inputs = make_own(OwnCase(dtype, shape=shape, normalise=normalise, mask="some", bias=True, smoothing=True))
    assert_results(inputs, wanted_outputs(inputs, compute_own(inputs, "cuda")))
    found = wanted_outputs(inputs, compute_own(by_index(inputs), "cuda"))
    found["grad_negatives"] = gradient_by_index(inputs, found["grad_negatives"])
    assert_results(inputs, found)


@kernels("linear_sample")
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
            scale = torch.tensor([0.7, torch.inf, 0.0]).repeat(rows)[:rows].to(device, dtype)
            for first in range(0, vocab, tile):
                part = products[:, first : first + tile].contiguous().to(device)
                torch.ops.sslkernels_native.sample_rows(part, *inputs, first, vocab, scale, 2, *state, index)
            found.append([tensor.cpu() for tensor in (index, *state)])
        for got, want in zip(found[1], found[0], strict=True):
            torch.testing.assert_close(got, want, rtol=16 * torch.finfo(dtype).eps, atol=16 * torch.finfo(dtype).eps)


@kernels("linear_distillation")
@pytest.mark.parametrize("every", [False, True])
@pytest.mark.parametrize("vocab", [7, 1003, 40_007])
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_distillation_rows(backend, grad_dtype, vocab, every):
    """Against the CPU kernel: a row without a teacher, one sure of a column, and a teacher row that two share."""
    skip_without_kernel(backend)
    dtype = torch.float64 if grad_dtype == torch.float64 else torch.float32
    g = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

    logits, teacher, offset, coefficient = 4 * numbers(5, vocab), 4 * numbers(3, vocab), numbers(vocab), numbers(5)
    logits[1, 3] = teacher[0, 3] = 60
    index = torch.tensor([[0, 1], [0, -1], [-1, -1], [2, 0], [1, 1]])
    given = (index >= 0).to(dtype)
    share, scale = given / given.sum(1, keepdim=True).clamp_min(1), torch.tensor([0.7], dtype=dtype)
    found = []
    for device in ("cpu", "cuda"):
        rows = TritonDistillation() if device == "cuda" and backend == "triton" else NativeDistillation()
        wide = torch.zeros(len(teacher) + len(logits), vocab + -vocab % 8, dtype=dtype, device=device)
        wide[:3, :vocab], wide[3:, :vocab] = teacher.to(device), logits.to(device)
        padded = torch.zeros(wide.shape[1], dtype=dtype, device=device)
        padded[:vocab] = offset.to(device)
        head = Head(padded[:vocab], scale.to(device))
        state = rows.teacher(wide[:3, :vocab], head)
        stats = 5 if every else 0
        outputs = RowOutputs(
            *(torch.empty(size, dtype=dtype, device=device) for size in (5, 5, stats, stats)),
            torch.empty(stats, dtype=torch.bool, device=device),
            torch.empty(vocab if every else 0, dtype=dtype, device=device),
        )
        grad = wide[3:, :vocab]
        if device == "cuda":
            grad = torch.empty(5, wide.shape[1], dtype=grad_dtype, device=device)[:, :vocab]
        choice = Choice(index.to(device), share.to(device))
        rows.student(wide[3:, :vocab], head, state, choice, coefficient.to(device), outputs, every, grad)
        found.append([tensor.cpu() for tensor in (*state, *outputs.rows, grad)])
    for got, want in zip(found[1], found[0], strict=True):
        eps = torch.finfo(got.dtype).eps if got.is_floating_point() else 0.0
        torch.testing.assert_close(got, want.to(got.dtype), rtol=256 * eps, atol=256 * eps)


@kernels("mask_tokens")
def test_masking_and_random_words(backend):
    skip_without_kernel(backend)
    ids = torch.randint(0, 1003, (3, 77), generator=torch.Generator().manual_seed(0))
    words = torch.arange(77).expand(3, 77).contiguous() // 3
    options = {"mask_id": 1, "vocab_size": 1003, "special_ids": (0, 2), "seed": torch.tensor(5)}
    for extra in ({}, {"mean_span": 3.0}, {"word_ids": words}):
        with sk.use_backend("reference"):
            expected = sk.mask_tokens(ids, **options, **extra)
        there = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in (options | extra).items()}
        for got, want in zip(sk.mask_tokens(ids.cuda(), **there), expected, strict=True):
            assert torch.equal(got.cpu(), want)


@kernels("random")
@pytest.mark.parametrize("columns", [1, 77, 132])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("stream", STREAMS)
def test_random_streams_equal_the_host(backend, stream, dtype, columns):
    row_ids = torch.tensor([3, 0, 2**33 + 1, -5, 2**63 - 1])
    for ids in (None, row_ids):
        seed, there = torch.tensor(-(2**40)), None if ids is None else ids.cuda()
        dtype = torch.int32 if stream == "bits" else dtype
        expected = stream_values(stream, seed, ids, 5, columns, 2**35 + 2, dtype)
        got = getattr(torch.ops.sslkernels, f"random_{stream}")(seed.cuda(), there, 5, columns, 2**35 + 2, dtype)
        assert torch.equal(got.cpu(), expected)


@kernels("linear_cross_entropy")
@pytest.mark.parametrize("vocab", [77, 4096, 40_007])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_class_probabilities(backend, dtype, vocab):
    """The Triton kernel against plain torch in float64; the rows of the logits have room for whole vectors."""
    if backend != "triton":
        pytest.skip("only Triton has this kernel")
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(5, vocab, generator=g).mul(4).to(dtype)
    target, bias, weight = (torch.rand(*shape, generator=g) for shape in ((5, vocab), (vocab,), (vocab,)))
    target = target / target.sum(1, keepdim=True)
    coefficient = torch.rand(5, generator=g)
    wide = [t.double() for t in (logits, target, bias, weight)]
    grads = [torch.empty_like(wide[0])]
    want = ProbabilityRows().forward(*wide, EVERY, stats=False, coefficient=coefficient.double(), grad=grads[0])
    room = torch.empty(5, row_pitch(vocab), dtype=dtype, device="cuda")[:, :vocab].copy_(logits)
    inputs = [t.cuda() for t in (target, bias, weight)]
    got = TritonProbabilityRows().forward(room, *inputs, EVERY, stats=False, coefficient=coefficient.cuda(), grad=room)
    for found, truth in zip((*got[:4], room), (*want[:4], grads[0]), strict=True):
        error, bound = (found.cpu().double() - truth).norm(), 1e-5 * truth.norm()
        if found is room:  # rounded, also to subnormal numbers
            limits = torch.finfo(dtype)
            bound += limits.eps * (truth.norm() + limits.smallest_normal * truth.numel() ** 0.5)
        assert error <= bound
