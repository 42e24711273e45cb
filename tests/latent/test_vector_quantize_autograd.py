"""vector_quantize: gradients, autograd, transformations and torch.compile."""

from __future__ import annotations

import itertools
import warnings

import code_oracle
import oracle
import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES
from torch.utils.checkpoint import checkpoint

import sslkernels as sk
from sslkernels.latent.vector_quantize import Operands, Wanted, code_sums, vector_quantize_bwd, vector_quantize_fwd

pytestmark = pytest.mark.pairwise

OP = "vector_quantize"


def draw(device, rows, codes, dim, dtype=torch.float32, seed=1):
    g = torch.Generator().manual_seed(seed)
    x, c = (torch.randn(n, dim, generator=g, dtype=torch.float64) for n in (rows, codes))
    return x.to(device, dtype), c.to(device, dtype)


def interpreted(backend, device):
    return backend == "triton" and device == "cpu"


OPTIONS = [(st, weight) for st in (True, False) for weight in (0.0, 1.0, 4.0)]


def graded(x, c, straight_through, weight, function, seed=3):
    """Gradients of a loss of values and commitment with a grad_output that is not 1."""
    leaves = [t for t in (x, c) if t.requires_grad]
    values, commitment = function(x, c, straight_through, weight)
    g = torch.Generator().manual_seed(seed)
    direction = torch.randn(values.shape, generator=g, dtype=torch.float64).to(values)
    loss = (values * direction).sum().double() + 3 * commitment.double()
    return torch.autograd.grad(loss, leaves, allow_unused=True)


def ours(x, c, straight_through, weight):
    got = sk.vector_quantize(x, c, straight_through=straight_through, codebook_weight=weight)
    return got.values, got.commitment


@pytest.mark.slow_for(backend="triton")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("straight_through", "weight"), OPTIONS)
def test_gradients_against_float64(backend, straight_through, weight, dtype, device):
    x, c = (t.requires_grad_() for t in draw(device, 60, 9, 20, dtype))
    got = graded(x, c, straight_through, weight, ours)
    exact = [t.detach().double().requires_grad_() for t in (x, c)]
    truth = graded(*exact, straight_through, weight, code_oracle.quantized)
    for leaf, grad, true in zip((x, c), got, truth, strict=True):
        if true is None or not true.any():
            assert grad is None or not grad.any()
            continue
        assert grad.dtype == dtype
        assert grad.shape == leaf.shape
        assert oracle.error(grad, true) < 2 * torch.finfo(dtype).eps + 8 * torch.finfo(torch.float32).eps


@pytest.mark.full_for(backend="triton")
@pytest.mark.parametrize(("straight_through", "weight"), OPTIONS)
def test_every_subset_of_inputs_gets_the_same_gradients(backend, straight_through, weight, device):
    x, c = draw(device, 30, 7, 5)
    full = graded(x.clone().requires_grad_(), c.clone().requires_grad_(), straight_through, weight, ours)
    for wanted in ((True, False), (False, True)):
        leaves = [t.clone().requires_grad_(want) for t, want in zip((x, c), wanted, strict=True)]
        expected = full[wanted.index(True)]
        if wanted == (False, True) and straight_through and weight == 0:
            assert not any(part.requires_grad for part in ours(*leaves, straight_through, weight))
            continue
        (got,) = graded(*leaves, straight_through, weight, ours)
        assert torch.equal(got, expected)
    assert not any(part.requires_grad for part in ours(x, c, straight_through, weight))


def test_a_loss_without_a_codebook_gradient_raises(backend, device):
    """Straight-through values have no gradient in the codebook: backward raises instead of training nothing."""
    x, c = draw(device, 30, 7, 5)
    with pytest.warns(UserWarning, match="codebook requires a gradient and gets none"):
        got = sk.vector_quantize(x, c.requires_grad_())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # a codebook that is frozen on purpose
        sk.vector_quantize(x, c, codebook_weight=0.0)
        sk.vector_quantize(x, c, straight_through=False)
        with torch.no_grad():
            sk.vector_quantize(x, c)
    for loss in (got.values.sum(), got.commitment):
        with pytest.raises(RuntimeError, match="does not require grad"):
            loss.backward()
    for trained in (
        sk.vector_quantize(x, c, codebook_weight=1.0).commitment,
        F.mse_loss(sk.vector_quantize(x, c, straight_through=False).values, x),
    ):
        (grad,) = torch.autograd.grad(trained, c)
        codes = F.embedding(got.indices, c)
        torch.testing.assert_close(grad, torch.autograd.grad(F.mse_loss(codes, x), c)[0])


def test_the_loss_of_vq_vae(backend, device):
    x, c = (t.requires_grad_() for t in draw(device, 40, 6, 8))
    got = 0.25 * sk.vector_quantize(x, c, codebook_weight=4.0).commitment
    codes = F.embedding(sk.vector_quantize(x, c).indices, c)
    loss = F.mse_loss(codes, x.detach()) + 0.25 * F.mse_loss(x, codes.detach())
    for a, b in zip(torch.autograd.grad(got, (x, c)), torch.autograd.grad(loss, (x, c)), strict=True):
        torch.testing.assert_close(a, b)


def test_the_straight_through_gradient_is_the_identity(backend, device):
    x, c = draw(device, 12, 5, 6, torch.float16)
    x.requires_grad_()
    for grad in (torch.randn(12, 6), torch.randn(6, 12).t(), torch.ones(1, 1).expand(12, 6)):
        grad = grad.to(device, torch.float16)
        (got,) = torch.autograd.grad(sk.vector_quantize(x, c).values, x, grad)
        assert torch.equal(got, grad)


@pytest.mark.full_for(backend="triton")
@pytest.mark.parametrize(("straight_through", "weight"), OPTIONS)
def test_second_backward_gives_the_same_gradients(backend, straight_through, weight, device):
    x, c = (t.requires_grad_() for t in draw(device, 30, 7, 5))
    got = sk.vector_quantize(x, c, straight_through=straight_through, codebook_weight=weight)
    loss = got.values.square().sum() + 2 * got.commitment
    first = torch.autograd.grad(loss, (x, c), retain_graph=True, allow_unused=True)
    second = torch.autograd.grad(loss, (x, c), allow_unused=True)
    for one, two in zip(first, second, strict=True):
        assert (one is None and two is None) or torch.equal(one, two)


def test_a_codebook_changed_before_backward_raises(backend, device):
    x, c = draw(device, 30, 7, 5)
    got = sk.vector_quantize(x.requires_grad_(), c)
    c.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        got.commitment.backward()


def test_half_precision_gradient_of_a_mean_over_many_rows(backend, device):
    """2 / (N D) is below the smallest float16 until the loss scale multiplies it."""
    rows = 300 if interpreted(backend, device) else 30000
    x, c = (t.requires_grad_() for t in draw(device, rows, 8, 8, torch.float16))
    got = torch.autograd.grad(65536.0 * sk.vector_quantize(x, c, codebook_weight=1.0).commitment, (x, c))
    exact = [t.detach().double().requires_grad_() for t in (x, c)]
    truth = torch.autograd.grad(65536.0 * code_oracle.quantized(*exact, codebook_weight=1.0)[1], exact)
    for grad, true in zip(got, truth, strict=True):
        assert oracle.error(grad, true) < torch.finfo(torch.float16).eps


@pytest.mark.full_for(backend="triton")
def test_double_backward(backend, device):
    """Straight-through values are the identity; gradients of the codebook raise."""
    x, c = (t.requires_grad_() for t in draw(device, 10, 4, 3))
    (grad,) = torch.autograd.grad(sk.vector_quantize(x, c).values.pow(2).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), x)
    assert torch.equal(second, torch.full_like(x, 2.0))
    for loss in (
        sk.vector_quantize(x, c, codebook_weight=1.0).commitment,
        sk.vector_quantize(x, c, straight_through=False).values.pow(2).sum(),
    ):
        (grad,) = torch.autograd.grad(loss, c, create_graph=True)
        with pytest.raises(NotImplementedError, match="vector_quantize: double backward"):
            (grad.square().sum() + c.square().sum()).backward()


@pytest.mark.full_for(backend="triton")
def test_bitwise_equal_from_run_to_run(backend, device):
    rows = 40 if interpreted(backend, device) else 4000
    x, c = (t.requires_grad_() for t in draw(device, rows, 30, 33, torch.float16))
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, threads):
            torch.set_num_threads(count)
            got = sk.vector_quantize(x, c, codebook_weight=2.0)
            grads = torch.autograd.grad(got.commitment, (x, c), retain_graph=True)
            results.append((*got, *grads))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.full_for(backend=("triton", "reference"))
@pytest.mark.full_for(dynamic=False)
@pytest.mark.costly("the compiler")
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_equals_eager(backend, dynamic, device, compiler):
    torch._dynamo.reset()

    def step(x, c):
        got = sk.vector_quantize(2 * x, c, metric="cosine", codebook_weight=4.0)
        learned = sk.vector_quantize(x, c, straight_through=False)
        return got.values.square().sum() + got.commitment + learned.values.sum(), got.indices, got.perplexity

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend=compiler)
    for rows in (13, 9):
        x, c = (t.requires_grad_() for t in draw(device, rows, 12, 6))
        (loss, *rest), (expected, *rest_expected) = compiled(x, c), step(x, c)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(rest, rest_expected)
        for a, b in zip(torch.autograd.grad(loss, (x, c)), torch.autograd.grad(expected, (x, c)), strict=True):
            torch.testing.assert_close(a, b)


def test_compile_with_one_tensor_twice(device, compiler):
    torch._dynamo.reset()
    x = torch.randn(7, 5, device=device, requires_grad=True)

    def step(x):
        return sk.vector_quantize(x, x, codebook_weight=1.0, straight_through=False).values.square().sum()

    torch.testing.assert_close(torch.compile(step, fullgraph=True, backend=compiler)(x), step(x))


@pytest.mark.full_for(backend="triton")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(backend, use_reentrant, device):
    x, c = (t.requires_grad_() for t in draw(device, 20, 6, 5))

    def head(x, c):
        got = sk.vector_quantize(x.tanh(), c, codebook_weight=1.0)
        return got.values.square().sum() + got.commitment

    expected = torch.autograd.grad(head(x, c), (x, c))
    checkpoint(head, x, c, use_reentrant=use_reentrant).backward()
    for leaf, true in zip((x, c), expected, strict=True):
        torch.testing.assert_close(leaf.grad, true)


def test_functional_transforms(device):
    x, c = draw(device, 12, 6, 5)

    def loss_of(function):
        def loss(x, c):
            values, commitment = function(x, c, False, 2.0)
            return values.square().sum() + commitment

        return loss

    ours_loss, oracle_loss = loss_of(ours), loss_of(code_oracle.quantized)
    for argnums in (0, 1, (0, 1)):
        got = torch.func.grad(ours_loss, argnums=argnums)(x, c)
        leaves = [t.clone().requires_grad_() for t in (x, c)]
        true = torch.autograd.grad(oracle_loss(*leaves), [leaves[i] for i in torch.atleast_1d(torch.tensor(argnums))])
        for a, b in zip((got,) if isinstance(argnums, int) else got, true, strict=True):
            torch.testing.assert_close(a, b)

    straight = lambda x, c: sk.vector_quantize(x, c).values.square().sum()  # noqa: E731
    torch.testing.assert_close(torch.func.grad(straight)(x, c), 2 * sk.vector_quantize(x, c).values)
    batch = x.reshape(3, 4, 5)
    got = torch.func.vmap(torch.func.grad(ours_loss, argnums=(0, 1)), in_dims=(0, None))(batch, c)
    for i in range(3):
        for part, want in zip(got, torch.func.grad(ours_loss, argnums=(0, 1))(batch[i], c), strict=True):
            torch.testing.assert_close(part[i], want)
    per_sample = torch.func.vmap(lambda part: sk.vector_quantize(part, c).commitment)
    got = torch.func.grad(lambda b: per_sample(b).sum())(batch)
    want = torch.stack([torch.func.grad(lambda p: sk.vector_quantize(p, c).commitment)(part) for part in batch])
    torch.testing.assert_close(got, want)


@pytest.mark.full_for(backend="triton")
def test_autocast_changes_nothing(backend, device):
    x, c = draw(device, 30, 20, 8)
    expected = sk.vector_quantize(x, c)
    with torch.autocast(device, torch.bfloat16):
        for a, b in zip(sk.vector_quantize(x, c), expected, strict=True):
            assert torch.equal(a, b)


@pytest.mark.slow_for(backend="triton", wanted=((False, False), (False, True), (True, False)))
@pytest.mark.slow_for(backend="triton", dtype=torch.float16)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=2)))
def test_opcheck(backend, wanted, dtype, device):
    x, c = draw(device, 11, 6, 5, dtype)
    torch.library.opcheck(vector_quantize_fwd.raw, (x, c, None, 0))
    _, indices, commitment, _ = vector_quantize_fwd(Operands(x, c), None, 0)
    arguments = (commitment, Operands(x, c), None, indices, 2.0, Wanted(*wanted))
    torch.library.opcheck(vector_quantize_bwd.raw, tuple(vector_quantize_bwd.inputs.pack(arguments)))
    for grad, want, tensor in zip(vector_quantize_bwd(*arguments), wanted, (x, c), strict=True):
        assert grad.shape == (tensor.shape if want else (0,))
        assert grad.dtype == tensor.dtype
    for out in (dtype, torch.float32):
        torch.library.opcheck(code_sums.raw, (x, indices, 6, out))
        torch.testing.assert_close(
            code_sums(x, indices, 6, out), F.one_hot(indices, 6).t().to(out) @ x.to(out), rtol=1e-2, atol=1e-2
        )


@pytest.mark.parametrize(("straight_through", "weight"), OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_mask_leaves_rows_out_of_commitment_and_usage(backend, dtype, straight_through, weight, device):
    """As if the rows were not there, but that they also get a value, even if they are not numbers."""
    x, c = draw(device, 30, 7, 5, dtype)
    x[3, 1] = float("nan")
    mask = torch.arange(30, device=device) % 3 != 0
    leaves = [t.clone().requires_grad_() for t in (x, c)]
    shaped = leaves[0].unflatten(0, (5, 6))
    got = sk.vector_quantize(
        shaped, leaves[1], straight_through=straight_through, codebook_weight=weight, mask=mask.view(5, 6)
    )
    kept = [t.clone().requires_grad_() for t in (x[mask], c)]
    expected = sk.vector_quantize(*kept, straight_through=straight_through, codebook_weight=weight)
    everything = sk.vector_quantize(x, c)
    assert torch.equal(got.indices.reshape(-1), everything.indices)
    torch.testing.assert_close(got.values.flatten(0, 1), everything.values, equal_nan=True, rtol=0, atol=0)
    assert torch.equal(got.usage, expected.usage)
    torch.testing.assert_close(got.commitment, expected.commitment)
    grads = torch.autograd.grad(3 * got.commitment, leaves, allow_unused=True)
    expected = torch.autograd.grad(3 * expected.commitment, kept, allow_unused=True)
    torch.testing.assert_close(grads[0][mask], expected[0])
    assert not grads[0][~mask].any()
    assert (grads[1] is None) == (expected[1] is None)
    if grads[1] is not None:
        torch.testing.assert_close(grads[1], expected[1])
    nothing = sk.vector_quantize(leaves[0], c, mask=torch.zeros_like(mask))
    assert nothing.commitment.isnan()
    assert not nothing.usage.any()


@pytest.mark.parametrize(
    ("mask", "kind", "message"),
    [
        (torch.ones(3), TypeError, "mask must have dtype torch.bool; got torch.float32"),
        (torch.ones(2, dtype=torch.bool), ValueError, r"mask must have shape \(...\) = \(3,\); got \(2,\)"),
        ([True] * 3, TypeError, "mask must be a torch.Tensor or None; got list"),
    ],
)
def test_errors_of_the_mask(mask, kind, message):
    with pytest.raises(kind, match="^vector_quantize: " + message):
        sk.vector_quantize(torch.zeros(3, 2), torch.zeros(4, 2), mask=mask)
