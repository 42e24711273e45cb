"""gumbel_quantize and GumbelQuantizer, compared with the quantizer of wav2vec 2.0 written with a one-hot product."""

from __future__ import annotations

import itertools

import gumbel_oracle
import oracle
import pytest
import torch
from cases import DTYPES, REPEATED_DTYPES
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import sslkernels as sk
from benchmarks import memory
from sslkernels.latent import gumbel_quantize as module
from sslkernels.latent.gumbel_quantize import OutputGrads, Wanted, gumbel_quantize_bwd, gumbel_quantize_fwd
from sslkernels.latent.gumbel_rows import NoisyLogits

pytestmark = pytest.mark.pairwise

OP = "gumbel_quantize"
NAMES = ("logits", "codebook")


def problem(
    device, *, batch=(3, 4), groups=2, codes=5, dim=6, dtype=torch.float64, codebook_dtype=None, requires_grad=NAMES
):
    """(logits, codebook); groups None: without groups."""
    g = torch.Generator().manual_seed(1)
    per_group = () if groups is None else (groups,)
    logits = 2 * torch.randn(*batch, *per_group, codes, generator=g, dtype=torch.float64)
    codebook = torch.randn(*per_group, codes, dim, generator=g, dtype=torch.float64)
    tensors = [logits.to(device, dtype), codebook.to(device, codebook_dtype or dtype)]
    return [t.requires_grad_(name in requires_grad) for name, t in zip(NAMES, tensors, strict=True)]


def mask_of(batch, device) -> Tensor:
    mask = torch.rand(batch, generator=torch.Generator().manual_seed(2)) < 0.6
    mask.view(-1)[:1] = True
    return mask.to(device)


def weights(values: Tensor) -> Tensor:
    numbers = torch.arange(values.numel(), dtype=torch.float64, device=values.device)
    return (numbers * 12.9898).sin().reshape(values.shape).to(values.dtype)


def loss_of(quantized, share: float = 2.0) -> Tensor:
    loss = (quantized.values * weights(quantized.values)).sum()
    return loss if quantized.prob_perplexity is None else loss + share * quantized.prob_perplexity


def tolerance(dtype: torch.dtype) -> float:
    rounding = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    return 64 * rounding + 2 * torch.finfo(dtype).eps


SIZES = [((3, 4), 2, 5, 6), ((5,), 1, 1, 3), ((2, 1, 3), 3, 33, 1), ((), 2, 4, 4), ((9,), 2, 130, 16)]


@pytest.mark.slow_for(backend="triton", dtype=REPEATED_DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_against_the_one_hot_product(backend, device, sizes, dtype):
    batch, groups, codes, dim = sizes
    for hard, masked in ((True, False), (True, True), (False, True)):
        logits, codebook = problem(device, batch=batch, groups=groups, codes=codes, dim=dim, dtype=dtype)
        mask = mask_of(batch, device) if masked else None
        got = sk.gumbel_quantize(logits, codebook, tau=0.7, hard=hard, mask=mask, seed=9, return_stats=True)
        leaves = [t.detach().requires_grad_() for t in (logits, codebook)]
        true = gumbel_oracle.quantize(*leaves, 0.7, hard, 9, mask)
        assert torch.equal(got.indices, true.indices)
        assert got.values.dtype == dtype
        assert got.values.shape == (*batch, groups * dim)
        if hard:
            codes_of = codebook.detach().double()[torch.arange(groups, device=device), got.indices]
            assert torch.equal(got.values.double(), codes_of.flatten(-2))
        assert oracle.error(got.values, true.values) < tolerance(dtype)
        for name in ("code_perplexity", "prob_perplexity"):
            perplexity = getattr(got, name)
            assert perplexity.dtype == gumbel_oracle.accumulation(dtype)
            torch.testing.assert_close(perplexity.double(), getattr(true, name), rtol=1e-5, atol=0)
        grads = torch.autograd.grad(loss_of(got), (logits, codebook))
        true_grads = torch.autograd.grad(loss_of(true._replace(values=true.values.to(dtype))), leaves)
        for grad, true_grad, leaf in zip(grads, true_grads, (logits, codebook), strict=True):
            assert (grad.dtype, grad.shape) == (dtype, leaf.shape)
            bound = tolerance(dtype) * float(true_grad.double().norm() + 1)
            assert float((grad.double() - true_grad.double()).norm()) < bound


@pytest.mark.slow_for(backend="triton", hard=False)
@pytest.mark.parametrize("hard", [False, True])
def test_mixed_dtypes(backend, device, hard):
    """Half-precision logits with a codebook in float32, as a model under autocast has them, and the other way round."""
    for dtype, codebook_dtype in itertools.permutations(DTYPES, 2):
        logits, codebook = problem(device, dtype=dtype, codebook_dtype=codebook_dtype)
        got = sk.gumbel_quantize(logits, codebook, hard=hard, seed=1)
        assert got.values.dtype == codebook_dtype
        true = gumbel_oracle.quantize(logits, codebook, 1.0, hard, 1)
        allowed = tolerance(dtype) + tolerance(codebook_dtype)
        assert oracle.error(got.values, true.values) < allowed
        grads = torch.autograd.grad(loss_of(got), (logits, codebook))
        assert [g.dtype for g in grads] == [dtype, codebook_dtype]
        true_grads = torch.autograd.grad((true.values * weights(got.values).double()).sum(), (logits, codebook))
        for grad, true_grad in zip(grads, true_grads, strict=True):
            assert oracle.error(grad, true_grad.double()) < 2 * allowed


def test_without_groups(backend, device):
    logits, codebook = problem(device, groups=None, batch=(3, 2))
    got = sk.gumbel_quantize(logits, codebook, seed=4, return_stats=True)
    grouped = sk.gumbel_quantize(logits[..., None, :], codebook[None], seed=4, return_stats=True)
    assert got.values.shape == (3, 2, 6)
    assert got.indices.shape == (3, 2)
    assert torch.equal(got.values, grouped.values)
    assert torch.equal(got.indices, grouped.indices[..., 0])
    assert torch.equal(got.prob_perplexity, grouped.prob_perplexity)
    one = sk.gumbel_quantize(logits[0, 0], codebook, seed=4)
    assert one.values.shape == (6,)
    assert one.indices.shape == ()
    assert torch.equal(one.values, got.values[0, 0])
    for a, b in zip(*(torch.autograd.grad(loss_of(q), (logits, codebook)) for q in (got, grouped)), strict=True):
        assert torch.equal(a, b)


def test_hard_values_equal_gumbel_softmax(backend, device):
    """Group g of row n has the noise of row n * G + g."""
    logits, codebook = problem(device, dtype=torch.float32)
    for hard in (True, False):
        got = sk.gumbel_quantize(logits, codebook, tau=0.5, hard=hard, seed=-8)
        y = sk.gumbel_softmax(logits, 0.5, hard, seed=-8)
        torch.testing.assert_close(got.values, torch.einsum("abgv,gvd->abgd", y, codebook).flatten(-2))
        assert torch.equal(got.indices, sk.gumbel_softmax(logits, 0.5, True, seed=-8).argmax(-1))


def test_without_noise(backend, device):
    """Evaluation as in fairseq: the largest logit, the lowest index among ties; values give the logits no gradient."""
    logits, codebook = problem(device, dtype=torch.float32)
    with torch.no_grad():
        logits[0, 0, 0, 1:3] = 9.0
    for hard in (True, False):
        got = sk.gumbel_quantize(logits, codebook, hard=hard, noise=False, return_stats=True)
        true = gumbel_oracle.quantize(logits, codebook, 1.0, True, None)
        assert torch.equal(got.indices, logits.argmax(-1))
        assert got.indices[0, 0, 0] == 1
        torch.testing.assert_close(got.values.double(), true.values)
        torch.testing.assert_close(got.code_perplexity.double(), true.code_perplexity, rtol=1e-5, atol=0)
        grads = torch.autograd.grad(loss_of(got), (logits, codebook))
        true_grads = torch.autograd.grad(loss_of(true), (logits, codebook))
        for grad, true_grad in zip(grads, true_grads, strict=True):
            torch.testing.assert_close(grad, true_grad, rtol=1e-4, atol=1e-6)
        alone = torch.autograd.grad(loss_of(sk.gumbel_quantize(logits, codebook, noise=False)), codebook)[0]
        torch.testing.assert_close(alone, true_grads[1])


@pytest.mark.full_for(backend="triton")
@pytest.mark.parametrize("hard", [False, True])
def test_every_subset_of_inputs_gets_the_same_gradients(backend, device, hard):
    options = {"hard": hard, "seed": 5, "tau": 0.6}
    for stats in (False, True):
        logits, codebook = problem(device)
        both = torch.autograd.grad(
            loss_of(sk.gumbel_quantize(logits, codebook, **options, return_stats=stats)), (logits, codebook)
        )
        for name, full in zip(NAMES, both, strict=True):
            tensors = problem(device, requires_grad=(name,))
            loss_of(sk.gumbel_quantize(*tensors, **options, return_stats=stats)).backward()
            for other, tensor in zip(NAMES, tensors, strict=True):
                assert tensor.grad is None if other != name else torch.equal(tensor.grad, full)
    tensors = problem(device, requires_grad=())
    quantized = sk.gumbel_quantize(*tensors, **options, return_stats=True)
    assert not any(t.requires_grad for t in quantized)


def test_each_output_alone(backend, device):
    logits, codebook = problem(device)
    got = sk.gumbel_quantize(logits, codebook, seed=5, return_stats=True)
    assert not got.indices.requires_grad
    assert not got.code_perplexity.requires_grad
    true = gumbel_oracle.quantize(logits, codebook, 1.0, True, 5)
    (of_values,) = torch.autograd.grad(got.values.square().sum(), logits, retain_graph=True)
    (of_perplexity,) = torch.autograd.grad(3 * got.prob_perplexity, logits, retain_graph=True)
    torch.testing.assert_close(of_values, torch.autograd.grad(true.values.square().sum(), logits, retain_graph=True)[0])
    expected = torch.autograd.grad(3 * true.prob_perplexity, logits)[0]
    torch.testing.assert_close(of_perplexity, expected, rtol=1e-6, atol=1e-9)
    loss = got.values.square().sum() + 3 * got.prob_perplexity
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], of_values + of_perplexity)


def test_gradcheck(device):
    """Soft values and perplexity; hard values are step functions."""
    logits, codebook = problem(device, batch=(2,), codes=4, dim=3)
    mask = torch.tensor([True, False], device=device)

    def function(x, c):
        quantized = sk.gumbel_quantize(x, c, hard=False, seed=1, mask=mask, return_stats=True)
        return quantized.values, quantized.prob_perplexity

    assert torch.autograd.gradcheck(function, (logits, codebook))


def test_grad_output_of_every_kind(backend, device):
    logits, codebook = problem(device)
    values = sk.gumbel_quantize(logits, codebook, seed=5).values

    def gradients(value, **options):
        return torch.autograd.grad(value, (logits, codebook), retain_graph=True, **options)

    ones = gradients(values, grad_outputs=torch.ones_like(values))
    for got in (gradients(values.sum()), gradients(values, grad_outputs=values.new_ones(()).expand(values.shape))):
        assert all(torch.equal(a, b) for a, b in zip(got, ones, strict=True))
    strided = weights(values).transpose(0, 1).contiguous().transpose(0, 1)
    for a, b in zip(
        gradients(values, grad_outputs=strided), gradients(values, grad_outputs=strided.contiguous()), strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.full_for(backend="triton")
def test_second_backward_gives_the_same_gradients(backend, device):
    tensors = problem(device, dtype=torch.float32)
    loss = loss_of(sk.gumbel_quantize(*tensors, return_stats=True))
    first = torch.autograd.grad(loss, tensors, retain_graph=True)
    kept = [grad.clone() for grad in first]
    for grad in first:
        grad.mul_(7)
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(loss, tensors), kept, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_double_backward_raises(device):
    for hard in (True, False):
        leaves = problem(device)
        for leaf in leaves[:1] if hard else leaves:
            loss = loss_of(sk.gumbel_quantize(*leaves, hard=hard))
            (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
            with pytest.raises(NotImplementedError, match=r"^gumbel_quantize: double backward is not supported"):
                grad.sum().backward()


@pytest.mark.parametrize("hard", [False, True])
def test_layouts(backend, device, hard):
    logits, codebook = problem(device, requires_grad=())
    others = [
        (logits.movedim(-1, 0).contiguous().movedim(0, -1), codebook.movedim(-1, 0).contiguous().movedim(0, -1)),
        (logits.repeat_interleave(2, 0)[::2], codebook.repeat_interleave(2, -1)[..., ::2]),
        (torch.cat([logits, logits], -2)[..., :2, :], codebook.expand(3, *codebook.shape)[1]),
    ]
    results = []
    for tensors in [(logits, codebook), *others]:
        leaves = [t.detach().requires_grad_() for t in tensors]
        quantized = sk.gumbel_quantize(*leaves, hard=hard, seed=2, return_stats=True)
        results.append((quantized.values, quantized.indices, *torch.autograd.grad(loss_of(quantized), leaves)))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_rows_that_are_not_finite(backend, device):
    """These rows have NaN values, NaN gradients (as have their codes) and an index in range; others are unaffected."""
    logits, codebook = problem(device, batch=(7,), codes=9, dtype=torch.float32, requires_grad=())
    logits[0, 0, 3], logits[1, 1, 0], logits[2, 0] = float("nan"), float("inf"), float("-inf")
    logits[3, :, 1:] = float("-inf")
    bad = torch.zeros(7, 2, dtype=torch.bool, device=device)
    bad[0, 0] = bad[1, 1] = bad[2, 0] = True
    leaves = [logits.requires_grad_(), codebook.requires_grad_()]
    got = sk.gumbel_quantize(*leaves, seed=1)
    values = got.values.view(7, 2, -1)
    assert torch.equal(values.isnan().all(-1), bad)
    assert torch.equal(values.isnan().any(-1), bad)
    assert ((got.indices >= 0) & (got.indices < 9)).all()
    assert got.indices[3].tolist() == [0, 0]
    grads = torch.autograd.grad(loss_of(got), leaves)
    assert torch.equal(grads[0].isnan().all(-1), bad)
    assert torch.equal(grads[0].isnan().any(-1), bad)
    assert torch.equal(grads[0][3], torch.zeros(2, 9, device=device))
    touched = torch.zeros(2, 9, dtype=torch.bool, device=device)
    for n, g in bad.nonzero().tolist():
        touched[g, got.indices[n, g]] = True
    assert torch.equal(grads[1].isnan().any(-1), touched)
    stats = sk.gumbel_quantize(*leaves, seed=1, return_stats=True)
    assert stats.prob_perplexity.isnan()
    fine = torch.tensor([False] * 3 + [True] * 4, device=device)
    masked = sk.gumbel_quantize(*leaves, seed=1, mask=fine, return_stats=True)
    (grad,) = torch.autograd.grad(masked.prob_perplexity, leaves[0])
    assert masked.prob_perplexity.isfinite()
    assert grad[3:].isfinite().all()
    assert torch.equal(grad[:3], torch.zeros_like(grad[:3]))


def test_no_rows(backend, device):
    logits, codebook = problem(device, batch=(0, 3), dtype=torch.float32)
    for hard in (True, False):
        got = sk.gumbel_quantize(logits, codebook, hard=hard, return_stats=True)
        assert got.values.shape == (0, 3, 12)
        assert got.indices.shape == (0, 3, 2)
        assert got.prob_perplexity.isnan()
        grads = torch.autograd.grad(got.values.sum(), (logits, codebook))
        assert torch.equal(grads[1], torch.zeros_like(codebook))
    logits, codebook = problem(device, dtype=torch.float32)
    none = torch.zeros(3, 4, dtype=torch.bool, device=device)
    masked = sk.gumbel_quantize(logits, codebook, mask=none, return_stats=True)
    assert masked.values.isfinite().all()
    assert masked.code_perplexity.isnan()


def test_perplexities_of_wav2vec(device):
    """The definitions: G when each group always takes one code, G * V when all are taken alike."""
    codebook = torch.zeros(2, 8, 3, device=device)
    one = torch.full((50, 2, 8), -100.0, device=device)
    one[..., 3] = 100.0
    collapsed = sk.gumbel_quantize(one, codebook, return_stats=True)
    torch.testing.assert_close(collapsed.code_perplexity.item(), 2.0, rtol=1e-5, atol=0)
    torch.testing.assert_close(collapsed.prob_perplexity.item(), 2.0, rtol=1e-5, atol=0)
    every = 200 * torch.eye(8, device=device).repeat(7, 1)[:, None].expand(56, 2, 8)
    used = sk.gumbel_quantize(every, codebook, return_stats=True)
    torch.testing.assert_close(used.code_perplexity.item(), 16.0, rtol=1e-5, atol=0)
    torch.testing.assert_close(used.prob_perplexity.item(), 16.0, rtol=1e-5, atol=0)
    flat = sk.gumbel_quantize(torch.zeros(50, 2, 8, device=device), codebook, return_stats=True)
    torch.testing.assert_close(flat.code_perplexity.item(), 2.0, rtol=1e-5, atol=0)
    torch.testing.assert_close(flat.prob_perplexity.item(), 16.0, rtol=1e-5, atol=0)
    plain = sk.gumbel_quantize(one, codebook)
    assert plain.code_perplexity is plain.prob_perplexity is None


def test_statistics_over_many_rows(backend, device):
    """Several partial sums, the last one over fewer rows."""
    rows = 300 if backend == "triton" and device == "cpu" else 5003
    logits, codebook = problem(device, batch=(rows,), groups=3, codes=7, dim=1, dtype=torch.float32)
    mask = mask_of((rows,), device)
    for m in (None, mask):
        got = sk.gumbel_quantize(logits, codebook, noise=False, mask=m, return_stats=True)
        true = gumbel_oracle.quantize(logits, codebook, 1.0, True, None, m)
        torch.testing.assert_close(got.prob_perplexity.double(), true.prob_perplexity, rtol=2e-6, atol=0)
        torch.testing.assert_close(got.code_perplexity.double(), true.code_perplexity, rtol=2e-6, atol=0)
        grad, true_grad = (torch.autograd.grad(q.prob_perplexity, logits)[0] for q in (got, true))
        assert oracle.error(grad, true_grad.double()) < 1e-5


def test_batches_split_by_row_ids(backend, device):
    logits, codebook = problem(device, batch=(6,), dtype=torch.float32)
    ids = torch.arange(6, device=device)
    for hard in (True, False):
        whole = sk.gumbel_quantize(logits, codebook, hard=hard, seed=1)
        (grad,) = torch.autograd.grad(whole.values.sum(), logits)
        order = torch.tensor([3, 1, 5, 0, 2, 4], device=device)
        part = sk.gumbel_quantize(logits[order], codebook, hard=hard, seed=1, row_ids=ids[order])
        assert torch.equal(part.values, whole.values[order])
        assert torch.equal(part.indices, whole.indices[order])
        torch.testing.assert_close(torch.autograd.grad(part.values.sum(), logits)[0], grad)


def test_row_numbers_do_not_wrap(backend, device):
    """Row numbers whose groups exceed 2^32."""
    ids = torch.tensor([2**33 + 1, 1, 2**61 + 5], device=device)
    code = sk.gumbel_quantize(
        torch.zeros(3, 2, 9, device=device), torch.zeros(2, 9, 1, device=device), row_ids=ids, seed=6
    )
    of_groups = (2 * ids[:, None] + torch.arange(2, device=device)).flatten()
    expected = sk.random_gumbel((6, 9), 6, row_ids=of_groups).argmax(1).view(3, 2)
    assert torch.equal(code.indices, expected)


def test_row_blocks(backend, device, monkeypatch):
    """The gradient of the logits from blocks of few rows equals that from one block, noise included."""
    monkeypatch.setattr(module, "BLOCK_BYTES", {"cpu": 1 << 30, "cuda": 1 << 30})
    rows = 40 if backend == "triton" and device == "cpu" else 100
    for dtype, ids in ((torch.float32, None), (torch.bfloat16, torch.arange(rows, device=device) + 5)):
        logits, codebook = problem(device, batch=(rows,), dtype=dtype)
        mask = mask_of((rows,), device)
        quantized = sk.gumbel_quantize(logits, codebook, mask=mask, row_ids=ids, seed=1, return_stats=True)
        (whole,) = torch.autograd.grad(loss_of(quantized), logits, retain_graph=True)
        monkeypatch.setattr(module, "BLOCK_BYTES", {"cpu": 1, "cuda": 1})
        (blocks,) = torch.autograd.grad(loss_of(quantized), logits)
        torch.testing.assert_close(blocks, whole)
        monkeypatch.undo()


def test_only_the_inputs_and_three_numbers_a_row_are_saved(backend, device):
    logits, codebook = problem(device, batch=(16,), codes=50, dtype=torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        sk.gumbel_quantize(logits, codebook)
    others = [t for t in saved if t.data_ptr() not in (logits.data_ptr(), codebook.data_ptr())]
    assert sum(t.numel() for t in others) == 3 * 16 * 2 + 2  # index and state of each row; seed and tau


def test_memory(backend, device):
    """Beyond values and gradients, neither the one-hot (32 MiB) nor its product (4 GiB) is materialised."""
    if backend in ("reference", "triton"):
        pytest.skip("the reference materialises words and exponentials; the interpreter copies tensors")
    sizes = {"batch": (8192,), "groups": 2, "codes": 512, "dim": 128}
    for dtype in (torch.float32, torch.bfloat16):
        tensors = problem(device, **sizes, dtype=dtype)
        weight = torch.ones(8192, 256, dtype=dtype, device=device)

        def run(tensors=tensors, weight=weight):
            values = sk.gumbel_quantize(*tensors).values
            return values, *torch.autograd.grad(values, tensors, weight)

        run()
        peak, results = memory.peak_extra(run, torch.device(device))
        if peak is None:
            pytest.skip("this system has no resettable peak resident set")
        assert peak - sum(result.nbytes for result in results) < 20 << 20


@pytest.mark.full_for(backend="triton")
def test_bitwise_equal_from_run_to_run(backend, device):
    rows = {"reference": 50, "triton": 9}.get(backend, 3000)
    threads = torch.get_num_threads()
    for dtype in (torch.float32, torch.bfloat16):
        tensors = problem(device, batch=(rows,), codes=40, dim=9, dtype=dtype)
        found = []
        try:
            for count in (1, 2, 3, threads):
                torch.set_num_threads(count)
                quantized = sk.gumbel_quantize(*tensors, seed=8, return_stats=True)
                found.append((*quantized, *torch.autograd.grad(loss_of(quantized), tensors)))
        finally:
            torch.set_num_threads(threads)
        exact = range(4) if device == "cpu" else range(6)  # torch's matmul on a CPU depends on the number of threads
        for other in found[1:]:
            assert all(torch.equal(found[0][i], other[i]) for i in exact)
            for a, b in zip(found[0], other, strict=True):
                torch.testing.assert_close(a, b)


@pytest.mark.full_for(dynamic=False)
@pytest.mark.costly("the compiler")
@pytest.mark.slow_for(backend=("triton", "reference"))
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_equals_eager(backend, device, dynamic, compiler):
    torch._dynamo.reset()

    def step(logits, codebook, mask):
        hard = sk.gumbel_quantize(2 * logits, codebook, tau=0.5, mask=mask, seed=1, return_stats=True)
        soft = sk.gumbel_quantize(logits, codebook, hard=False, seed=1)
        return loss_of(hard) + soft.values.sum(), hard.indices, hard.code_perplexity

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend=compiler)
    for rows in (5, 8):
        tensors = problem(device, batch=(rows,), dtype=torch.float32)
        mask = mask_of((rows,), device)
        got, expected = compiled(*tensors, mask), step(*tensors, mask)
        torch.testing.assert_close(got, expected)
        grads = (torch.autograd.grad(result[0], tensors) for result in (got, expected))
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(device, use_reentrant):
    logits, codebook = problem(device)

    def head(x, c):
        return loss_of(sk.gumbel_quantize(x.tanh(), c, return_stats=True))

    torch.manual_seed(1)
    expected = torch.autograd.grad(head(logits, codebook), (logits, codebook))
    torch.manual_seed(1)
    checkpoint(head, logits, codebook, use_reentrant=use_reentrant).backward()
    for leaf, true in zip((logits, codebook), expected, strict=True):
        torch.testing.assert_close(leaf.grad, true)


def test_functional_transforms(device):
    logits, codebook = problem(device, requires_grad=())

    def loss(x, c):
        return loss_of(sk.gumbel_quantize(x, c, seed=3, return_stats=True))

    leaves = [t.clone().requires_grad_() for t in (logits, codebook)]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    torch.testing.assert_close(torch.func.grad(loss, argnums=(0, 1))(logits, codebook), expected)

    def row_loss(x, row_id):
        return sk.gumbel_quantize(x, codebook, seed=3, row_ids=row_id).values.square().sum()

    ids = torch.arange(12, device=device).view(3, 4)
    per_row = torch.func.vmap(torch.func.grad(row_loss))(logits, ids)
    whole = torch.autograd.grad(sk.gumbel_quantize(leaves[0], codebook, seed=3).values.square().sum(), leaves[0])[0]
    torch.testing.assert_close(per_row, whole)

    both = torch.func.vmap(lambda x: sk.gumbel_quantize(x, codebook, seed=3, return_stats=True))(
        torch.stack([logits, 2 * logits])
    )
    for got, each in zip(both, sk.gumbel_quantize(2 * logits, codebook, seed=3, return_stats=True), strict=True):
        torch.testing.assert_close(got[1], each)


def test_autocast(device):
    """Hard values and gradients are the same as without it."""
    tensors = problem(device, dtype=torch.bfloat16, codebook_dtype=torch.float32)
    with torch.autocast(device, torch.bfloat16):
        inside = sk.gumbel_quantize(*tensors, seed=1, return_stats=True)
        soft = sk.gumbel_quantize(*tensors, seed=1, hard=False)
    outside = sk.gumbel_quantize(*tensors, seed=1, return_stats=True)
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))
    grads = [torch.autograd.grad(loss_of(q), tensors) for q in (inside, outside)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert [g.dtype for g in torch.autograd.grad(soft.values.float().sum(), tensors)] == [t.dtype for t in tensors]


@pytest.mark.full_for(backend="triton")
def test_opcheck(backend, device):
    logits, codebook = problem(device, batch=(3,), dtype=torch.bfloat16, requires_grad=())
    seed, mask = torch.tensor(3, device=device), mask_of((6,), device)
    inverse_tau = torch.tensor(2.0, dtype=torch.float64, device=device)
    for stats in (False, True):
        arguments = (NoisyLogits(logits, seed, None, inverse_tau), mask, stats)
        torch.library.opcheck(gumbel_quantize_fwd.raw, tuple(gumbel_quantize_fwd.inputs.pack(arguments)))
    codes = gumbel_quantize_fwd(*arguments)
    grads = OutputGrads(torch.randn(3, 2, 6, dtype=torch.bfloat16, device=device), codes.probability)
    source = NoisyLogits(logits, seed, torch.arange(6, device=device), inverse_tau)
    arguments = (grads, source, codebook, mask, codes.code_state, Wanted(True, True))
    torch.library.opcheck(gumbel_quantize_bwd.raw, tuple(gumbel_quantize_bwd.inputs.pack(arguments)))
    assert [g.shape for g in gumbel_quantize_bwd(*arguments)] == [logits.shape, codebook.shape]


X, C = torch.zeros(3, 2, 5), torch.zeros(2, 5, 4)
ERRORS = [
    (dict(logits=[1.0]), TypeError, r"logits must be a torch.Tensor; got list"),
    (dict(codebook=C.long()), TypeError, r"codebook must have dtype .*; got torch.int64"),
    (dict(codebook=C[0, 0]), ValueError, r"codebook must have shape \(G, V, D\) or \(V, D\); got \(4,\)"),
    (dict(codebook=C[:, :0]), ValueError, r"codebook must have at least one code; got \(2, 0, 4\)"),
    (dict(codebook=C[:1]), ValueError, r"logits must have shape \(..., G, V\) with \(1, 5\) last; got \(3, 2, 5\)"),
    (dict(codebook=C[0, :4]), ValueError, r"logits must have shape \(..., V\) with \(4,\) last; got \(3, 2, 5\)"),
    (dict(logits=X[0, 0]), ValueError, r"logits must have shape .*; got \(5,\)"),
    (dict(codebook=C.to("meta")), ValueError, r"codebook must be on the device of logits, cpu; got meta"),
    (dict(tau=0), ValueError, r"tau must be in \[1e-30, 1e\+30\]; got 0"),
    (dict(hard=None), TypeError, r"hard must be a bool; got NoneType"),
    (dict(noise=0), TypeError, r"noise must be a bool; got int"),
    (dict(return_stats="yes"), TypeError, r"return_stats must be a bool; got str"),
    (dict(mask=torch.ones(3)), TypeError, r"mask must have dtype torch.bool; got torch.float32"),
    (dict(mask=torch.ones(3, 2) > 0), ValueError, r"mask must have shape .* = \(3,\); got \(3, 2\)"),
    (dict(row_ids=torch.arange(2)), ValueError, r"row_ids must have shape .* = \(3,\); got \(2,\)"),
    (dict(seed="1"), TypeError, r"seed must be an int"),
]


@pytest.mark.parametrize(
    ("change", "kind", "message"), ERRORS, ids=lambda v: next(iter(v)) if isinstance(v, dict) else ""
)
def test_errors(change, kind, message):
    with pytest.raises(kind, match=r"^gumbel_quantize: " + message):
        sk.gumbel_quantize(**{"logits": X, "codebook": C, **change})


def test_module(device):
    torch.manual_seed(0)
    quantizer = sk.nn.GumbelQuantizer(5, 8, 2, tau=(2.0, 0.5, 0.9), return_stats=True, device=device)
    assert quantizer.codebook.shape == (2, 5, 4)
    assert ((quantizer.codebook >= 0) & (quantizer.codebook < 1)).all()
    logits = problem(device, dtype=torch.float32)[0]
    mask = mask_of((3, 4), device)
    got = quantizer(logits, mask=mask, seed=3)
    options = {"mask": mask, "seed": 3, "return_stats": True}
    expected = sk.gumbel_quantize(logits, quantizer.codebook, tau=2.0, **options)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    loss_of(got).backward()
    assert quantizer.codebook.grad.shape == (2, 5, 4)
    assert "tau" not in "".join(quantizer.state_dict())

    quantizer.eval()
    first, second = quantizer(logits), quantizer(logits)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(first.indices, logits.argmax(-1))
    assert repr(quantizer) == "GumbelQuantizer(codebook=(2, 5, 4), tau=(2.0, 0.5, 0.9), hard=True, return_stats=True)"


def test_schedule_of_tau(device):
    """As in fairseq: (most, least, decay), after a number of updates."""
    quantizer = sk.nn.GumbelQuantizer(5, 8, tau=(2.0, 0.5, 0.9), device=device)
    taus = []
    for updates in (0, 1, 2, 100):
        quantizer.set_num_updates(updates)
        taus.append(quantizer.tau)
    assert taus == [2.0, 1.8, 2.0 * 0.9**2, 0.5]
    fixed = sk.nn.GumbelQuantizer(5, 8, tau=0.7, hard=False, device=device)
    fixed.set_num_updates(10)
    assert fixed.tau == 0.7
    fixed.tau = torch.tensor(0.3, device=device)
    logits = torch.randn(3, 5, device=device)
    expected = sk.gumbel_quantize(logits, fixed.codebook, tau=0.3, hard=False, seed=1)
    assert torch.equal(fixed(logits, seed=1).values, expected.values)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((0, 8), {}, ValueError, "num_codes must be at least 1; got 0"),
        ((5, 8.0), {}, TypeError, "dim must be an int; got float"),
        ((5, 8, 3), {}, ValueError, "dim must be a multiple of groups, 3; got 8"),
        ((5, 8, 0), {}, ValueError, "groups must be at least 1; got 0"),
        ((5, 8), {"tau": (1.0, 2.0)}, ValueError, r"tau must be a number or \(most, least, decay\); got \(1.0, 2.0\)"),
        ((5, 8), {"tau": (1.0, 0.0, 0.9)}, ValueError, r"tau must be in \(0, inf\]; got 0.0"),
    ],
)
def test_errors_of_the_module(arguments, options, error, message):
    with pytest.raises(error, match=f"^GumbelQuantizer: {message}"):
        sk.nn.GumbelQuantizer(*arguments, **options)


@pytest.mark.parametrize("codes", [torch.float32, torch.float16], ids=str)
def test_a_large_gradient_of_soft_values_stays_a_number(backend, codes, device):
    """The gradient of the soft sample exceeds float16; the gradient of the logits need not."""
    logits, codebook = torch.randn(5, 4), torch.rand(4, 64)
    grad = torch.full((5, 64), 6e4 if codes == torch.float16 else 1e6)
    found = []
    for dtype in (torch.float16, torch.float64):
        leaves = (logits.half().to(device, dtype), codebook.half().to(device, codes if dtype.itemsize == 2 else dtype))
        leaves = [leaf.requires_grad_() for leaf in leaves]
        values = sk.gumbel_quantize(*leaves, hard=False, tau=100.0, seed=3).values
        found.append(torch.autograd.grad(values, leaves, grad.to(device, values.dtype)))
    assert found[1][0].abs().max() < 60000
    assert found[0][0].isfinite().all()
    torch.testing.assert_close(found[0][0].double(), found[1][0], rtol=2e-2, atol=100)
