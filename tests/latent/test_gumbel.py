"""gumbel_softmax: values, gradients, noise, memory, transformations and error messages."""

from __future__ import annotations

import inspect
import itertools

import gumbel_oracle
import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, REPEATED_DTYPES
from cuda_graphs import captured
from kernel_files import kernels
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import sslkernels as sk
from benchmarks import memory
from sslkernels.latent.gumbel_rows import NoisyLogits
from sslkernels.latent.gumbel_softmax import gumbel_softmax_bwd, gumbel_softmax_fwd

pytestmark = pytest.mark.pairwise

OP = "gumbel_softmax"
HALF = (torch.bfloat16, torch.float16)


def draw(*shape, dtype=torch.float32, device="cpu", scale=2.0, seed=1):
    g = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=g, dtype=torch.float64)).to(device, dtype)


def oracle(logits: Tensor, tau: float, hard: bool, dim: int, seed: int, grad: Tensor | None = None):
    """(y, gradient) in float64, and the index, along `dim`."""
    moved = logits.detach().movedim(dim, -1)
    s = gumbel_oracle.perturbed(moved, seed).reshape(-1, moved.shape[-1])
    truth = gumbel_oracle.reduced(s, tau)
    y = gumbel_oracle.hard(truth) if hard else truth.y
    results = [y.reshape(moved.shape).movedim(-1, dim), None, truth.index.reshape(moved.shape[:-1])]
    if grad is not None:
        rows = grad.movedim(dim, -1).reshape(s.shape)
        results[1] = gumbel_oracle.gradient(moved.reshape(s.shape), s, tau, rows).reshape(moved.shape).movedim(-1, dim)
    return results


def assert_close(got: Tensor, true: Tensor, dtype: torch.dtype, scale: float = 1.0) -> None:
    """An exponent of -80 has an error of 80 roundings; then one rounding to the dtype."""
    rounding = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    eps = torch.finfo(dtype).eps
    tolerances = {
        "rtol": 100 * rounding + eps,
        "atol": scale * 16 * rounding + torch.finfo(dtype).smallest_normal * eps,
    }
    torch.testing.assert_close(got.double(), true.double().to(got.device), **tolerances, equal_nan=True)


SHAPES = [
    ((5, 7), -1),
    ((3, 4, 5), 1),
    ((6, 3), 0),
    ((2, 1030), -1),
    ((2049,), 0),
    ((6, 1), 1),
    ((37, 2), 1),
    ((9, 320), 1),
]


@pytest.mark.slow_for(backend="triton", dtype=REPEATED_DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "dim"), SHAPES)
def test_values_and_gradients(backend, device, shape, dim, dtype):
    for hard, tau in ((False, 0.7), (True, 0.7), (False, 4.0), (True, 0.05)):
        logits, grad = (draw(*shape, dtype=dtype, device=device, seed=s) for s in (1, 2))
        logits.requires_grad_()
        y = sk.gumbel_softmax(logits, tau, hard, dim, seed=-3)
        true, true_grad, _ = oracle(logits, tau, hard, dim, -3, grad)
        assert (y.dtype, y.shape, y.device) == (dtype, logits.shape, logits.device)
        if hard:
            assert torch.equal(y.double(), true)
        else:
            assert_close(y, true, dtype)
        (got,) = torch.autograd.grad(y, logits, grad)
        assert (got.dtype, got.shape) == (dtype, logits.shape)
        assert_close(got, true_grad, dtype, 8 / tau)


@pytest.mark.slow_for(backend="triton", dtype=REPEATED_DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_longer_than_a_tile(backend, device, dtype):
    logits = draw(1, 8197, dtype=dtype, device=device).requires_grad_()
    grad = draw(1, 8197, dtype=dtype, device=device, seed=2)
    y = sk.gumbel_softmax(logits, 3.0, seed=1)
    true, true_grad, index = oracle(logits, 3.0, False, -1, 1, grad)
    assert_close(y, true, dtype)
    assert_close(torch.autograd.grad(y, logits, grad)[0], true_grad, dtype)
    assert sk.gumbel_softmax(logits, 3.0, True, seed=1)[0, index].item() == 1


def test_gradcheck(backend, device):
    if backend == "triton":
        pytest.skip("the numerical Jacobian runs the interpreter hundreds of times")
    logits = draw(3, 5, dtype=torch.float64, device=device).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: sk.gumbel_softmax(x, 0.7, seed=5), logits)


def test_hard_has_the_gradient_of_soft(backend, device):
    """Straight-through, as torch's `y_hard - y_soft.detach() + y_soft`."""
    logits, grad = draw(4, 9, device=device).requires_grad_(), draw(4, 9, device=device, seed=2)
    soft, hard = (
        torch.autograd.grad(sk.gumbel_softmax(logits, 0.5, h, seed=2), logits, grad)[0] for h in (False, True)
    )
    assert torch.equal(soft, hard)
    g = sk.random_gumbel((4, 9), 2, device=device)
    y_soft = ((logits + g) / 0.5).softmax(-1)
    y_hard = torch.zeros_like(logits).scatter_(-1, y_soft.argmax(-1, keepdim=True), 1.0)
    torch.testing.assert_close(hard, torch.autograd.grad(y_hard - y_soft.detach() + y_soft, logits, grad)[0])


def test_all_backends_draw_the_same(device):
    """Bitwise: the noise is the same on every backend, it is added once, and ties go to the lowest index."""
    for dtype, columns in itertools.product(DTYPES, (3, 33, 1030)):
        logits = draw(5, columns, dtype=dtype, device=device)
        drawn = []
        for name in sk.available_backends(OP, device):
            with sk.use_backend(name):
                drawn.append(sk.gumbel_softmax(logits, 0.1, True, seed=7).argmax(-1))
        assert all(torch.equal(drawn[0], other) for other in drawn[1:])
        assert torch.equal(drawn[0], (logits.float() + sk.random_gumbel(logits.shape, 7, device=device)).argmax(-1))


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_draws_as_float32(backend, device, dtype):
    """Noise in the dtype of the logits would be biased."""
    logits = draw(7, 65, dtype=dtype, device=device)
    for dim in (0, 1):
        got = sk.gumbel_softmax(logits, hard=True, dim=dim, seed=1)
        assert torch.equal(got.float(), sk.gumbel_softmax(logits.float(), hard=True, dim=dim, seed=1))


def test_the_index_does_not_depend_on_tau(backend, device):
    logits = draw(20, 17, device=device)
    expected = sk.gumbel_softmax(logits, 1.0, True, seed=3)
    for tau in (1e-30, 1e-3, 0.3, 50.0, 1e30):
        assert torch.equal(sk.gumbel_softmax(logits, tau, True, seed=3), expected)


def test_ties_go_to_the_lowest_index(backend, device):
    """Logits that cancel the noise: all sums are 0, in the same tile and in different ones."""
    for columns in (2, 9, 300, 1030):
        noise = sk.random_gumbel((3, columns), 4, device=device)
        logits = -noise
        logits[1, 0] -= 1
        logits[2, : columns - 1] -= 1
        y = sk.gumbel_softmax(logits, hard=True, seed=4)
        assert y.argmax(-1).tolist() == [0, 1, columns - 1]
        assert torch.equal(y.sum(-1), torch.ones(3, device=device))


def test_the_drop_in(device):
    """torch's argument names and defaults; `eps` has no effect there either."""
    theirs, ours = (inspect.signature(f).parameters for f in (F.gumbel_softmax, sk.gumbel_softmax))
    assert theirs.keys() <= ours.keys()
    assert {name: theirs[name].default for name in theirs} == {name: ours[name].default for name in theirs}
    assert list(ours)[:4] == ["logits", "tau", "hard", "dim"]
    logits = draw(2, 5, device=device)
    expected = sk.gumbel_softmax(logits, 0.5, True, 0, seed=1)
    with pytest.warns(UserWarning, match="eps is deprecated"):
        assert torch.equal(sk.gumbel_softmax(logits, tau=0.5, hard=True, eps=1e-20, dim=-2, seed=1), expected)
    assert F.gumbel_softmax(logits[0, 0], hard=True) == sk.gumbel_softmax(logits[0, 0], hard=True) == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tau", [1e-30, 1e-3, 1.0, 1e30])
def test_no_nan(backend, device, tau, dtype):
    """Finite logits, up to the largest, give finite results and gradients, unless the dtype overflows."""
    largest = torch.finfo(torch.float16 if dtype == torch.float16 else torch.float32).max / 8
    for scale in (1.0, 1e3, largest):
        logits = (draw(6, 40, device=device, dtype=torch.float64).clamp(-4, 4) * scale).to(dtype).requires_grad_()
        for hard in (False, True):
            y = sk.gumbel_softmax(logits, tau, hard, seed=1)
            assert y.isfinite().all()
            assert (y >= 0).all()
            torch.testing.assert_close(y.double().sum(-1), torch.ones(6).double().to(device), rtol=0, atol=0.05)
            (grad,) = torch.autograd.grad(y, logits, draw(6, 40, dtype=dtype, device=device, scale=1e-3))
            assert not grad.isnan().any()
            assert grad.isfinite().all() or tau < 1e-3


def test_small_tau_is_one_hot(backend, device):
    """The documented limit that gives NaN in torch (pytorch#184031)."""
    logits = draw(50, 10, device=device)
    assert torch.equal(sk.gumbel_softmax(logits, 1e-30, seed=2).round(), sk.gumbel_softmax(logits, hard=True, seed=2))
    with pytest.raises(ValueError, match=r"^gumbel_softmax: tau must be in \[1e-30, 1e\+30\]; got 0"):
        sk.gumbel_softmax(logits, 0)


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("columns", [6, 300, 1030])
def test_rows_that_are_not_finite(backend, device, columns, hard):
    logits = draw(6, columns, device=device)
    logits[0, 1] = float("nan")
    logits[1, -1] = float("inf")
    logits[2] = float("-inf")
    logits[3, 1:] = float("-inf")
    logits[4, ::2] = float("-inf")
    logits.requires_grad_()
    grad = draw(6, columns, device=device, seed=3)
    y = sk.gumbel_softmax(logits, 0.8, hard, seed=6)
    true, true_grad, _ = oracle(logits, 0.8, hard, -1, 6, grad)
    assert_close(y, true, torch.float32)
    assert y[:3].isnan().all()
    assert y[3].tolist() == [1.0, *[0.0] * (columns - 1)]
    (got,) = torch.autograd.grad(y, logits, grad)
    assert_close(got, true_grad, torch.float32, 10)
    assert got[:3].isnan().all()
    assert torch.equal(got[3], torch.zeros(columns, device=device))
    assert torch.equal(got[4, ::2], torch.zeros_like(got[4, ::2]))


def test_layouts(backend, device):
    """Any strides of logits and of the gradient give the same bits."""
    values, weight = draw(4, 6, 10, device=device), draw(4, 6, 10, device=device, seed=2)
    padded = torch.zeros(4, 6, 13, device=device)
    padded[..., 3:] = values
    variants = [
        values,
        values.transpose(0, 1).contiguous().transpose(0, 1),
        values.movedim(-1, 0).contiguous().movedim(0, -1),
        values.repeat_interleave(2, -1)[..., ::2],
        padded[..., 3:],
    ]
    for dim, hard in ((-1, False), (1, True)):
        found = []
        for logits, grad in zip(variants, [weight, *(v * 0 + weight for v in variants[1:])], strict=True):
            leaf = logits.detach().requires_grad_()
            y = sk.gumbel_softmax(leaf, 0.5, hard, dim, seed=1)
            found.append((y, *torch.autograd.grad(y, leaf, torch.empty_like(logits).copy_(grad))))
        for other in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_grad_output_of_every_kind(backend, device):
    logits = draw(5, 8, device=device).requires_grad_()
    y = sk.gumbel_softmax(logits, seed=1)

    def gradient(value, **options):
        return torch.autograd.grad(value, logits, retain_graph=True, **options)[0]

    expanded = gradient(y.sum())
    assert torch.equal(expanded, gradient(y, grad_outputs=torch.ones_like(y)))
    rows = torch.arange(5.0, device=device)[:, None].expand(5, 8)
    assert torch.equal(gradient(y, grad_outputs=rows), gradient(y, grad_outputs=rows.clone()))
    strided = draw(8, 5, device=device, seed=4).t()
    assert torch.equal(gradient(y, grad_outputs=strided), gradient(y, grad_outputs=strided.contiguous()))
    torch.testing.assert_close(gradient(7 * y[2, 3]), 7 * gradient(y[2, 3]))


@pytest.mark.full_for(backend="triton")
def test_second_backward_gives_the_same_gradient(backend, device):
    logits, weight = draw(5, 8, device=device).requires_grad_(), draw(5, 8, device=device)
    loss = (sk.gumbel_softmax(logits, 0.5, True) * weight).sum()
    (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
    kept = first.clone()
    first.mul_(7)
    assert torch.equal(torch.autograd.grad(loss, logits)[0], kept)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_double_backward_raises(device):
    logits = draw(5, 8, device=device).requires_grad_()
    (grad,) = torch.autograd.grad(sk.gumbel_softmax(logits).square().sum(), logits, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"^gumbel_softmax: double backward is not supported"):
        grad.sum().backward()


def test_nothing_requires_grad(backend, device):
    logits = draw(3, 4, device=device)
    assert not sk.gumbel_softmax(logits).requires_grad
    with torch.no_grad():
        assert not sk.gumbel_softmax(logits.requires_grad_()).requires_grad


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (2, 0, 4), (0,)])
@pytest.mark.parametrize("hard", [False, True])
def test_empty_shapes(backend, device, shape, hard):
    logits = torch.zeros(shape, device=device, requires_grad=True)
    y = sk.gumbel_softmax(logits, 0.5, hard)
    assert y.shape == shape
    y.sum().backward()
    assert logits.grad.shape == shape


def test_the_noise_equals_random_gumbel(backend, device):
    for shape, dim in (((4, 7), 1), ((3, 4, 5), 0), ((3, 4, 5), 1)):
        logits = draw(*shape, dtype=torch.float64, device=device)
        moved = logits.movedim(dim, -1)
        s = moved + sk.random_gumbel(moved.shape, 2**63 + 5, device=device)
        got = sk.gumbel_softmax(logits, 1.0, dim=dim, seed=2**63 + 5)
        torch.testing.assert_close(got, s.softmax(-1).movedim(-1, dim))


def test_batches_split_by_row_ids(backend, device):
    logits, ids = draw(6, 3, 9, device=device), torch.arange(18, device=device).reshape(6, 3)
    whole = sk.gumbel_softmax(logits, 0.5, seed=1)
    assert torch.equal(sk.gumbel_softmax(logits, 0.5, seed=1, row_ids=ids), whole)
    parts = [sk.gumbel_softmax(logits[i : i + 2], 0.5, seed=1, row_ids=ids[i : i + 2]) for i in (0, 2, 4)]
    assert torch.equal(torch.cat(parts), whole)
    order = torch.tensor([3, 1, 5, 0, 2, 4], device=device)
    assert torch.equal(sk.gumbel_softmax(logits[order], 0.5, seed=1, row_ids=ids[order]), whole[order])
    turned = logits.movedim(-1, 1).requires_grad_()
    y = sk.gumbel_softmax(turned, 0.5, dim=1, seed=1, row_ids=ids)
    assert torch.equal(y.movedim(1, -1), whole)
    leaf = logits.clone().requires_grad_()
    (grad,) = torch.autograd.grad(y.square().sum(), turned)
    (expected,) = torch.autograd.grad(sk.gumbel_softmax(leaf, 0.5, seed=1).square().sum(), leaf)
    assert torch.equal(grad.movedim(1, -1), expected)


@pytest.mark.parametrize("codes", [5, 50])
def test_row_numbers_do_not_wrap(backend, device, codes):
    """Row numbers whose groups exceed 2^32, in forward and backward."""
    ids = torch.tensor([2**33 + 1, 1, 2**62 + 5], device=device)
    logits = draw(3, codes, device=device).requires_grad_()
    y = sk.gumbel_softmax(logits, 0.5, row_ids=ids, seed=6)
    expected = ((logits + sk.random_gumbel((3, codes), 6, row_ids=ids)) / 0.5).softmax(-1)
    torch.testing.assert_close(y, expected)
    grads = [torch.autograd.grad(v.square().sum(), logits)[0] for v in (y, expected)]
    torch.testing.assert_close(*grads)


def test_seeds_and_generators(backend, device):
    logits = torch.zeros(3, 50, device=device)
    generator = torch.Generator(device).manual_seed(1)
    first = sk.gumbel_softmax(logits, generator=generator)
    second = sk.gumbel_softmax(logits, generator=generator)
    assert not torch.equal(first, second)
    assert torch.equal(sk.gumbel_softmax(logits, generator=generator.manual_seed(1)), first)
    torch.manual_seed(5)
    default = sk.gumbel_softmax(logits)
    assert not torch.equal(sk.gumbel_softmax(logits), default)
    torch.manual_seed(5)
    assert torch.equal(sk.gumbel_softmax(logits), default)
    seed = torch.tensor(9, device=device)
    assert torch.equal(sk.gumbel_softmax(logits, seed=seed), sk.gumbel_softmax(logits, seed=9))


def test_backward_uses_the_noise_of_forward(backend, device):
    """Draws from the default generator in between change nothing."""
    logits = draw(3, 9, device=device).requires_grad_()
    torch.manual_seed(3)
    seed = torch.randint(-(2**63), 2**63 - 1, (), device=device)
    torch.manual_seed(3)
    y = sk.gumbel_softmax(logits, 0.5)
    torch.rand(100, device=device)
    (grad,) = torch.autograd.grad(y.square().sum(), logits)
    (expected,) = torch.autograd.grad(sk.gumbel_softmax(logits, 0.5, seed=seed).square().sum(), logits)
    assert torch.equal(grad, expected)


def test_tau_as_a_tensor(backend, device):
    logits = draw(3, 9, device=device).requires_grad_()
    for dtype in DTYPES:
        y = sk.gumbel_softmax(logits, torch.tensor(0.5, dtype=dtype, device=device), seed=1)
        assert torch.equal(y, sk.gumbel_softmax(logits, 0.5, seed=1))
    for out_of_range in (0.0, float("nan"), float("inf")):
        assert sk.gumbel_softmax(logits, torch.tensor(out_of_range, device=device), seed=1).isnan().all()
    negative = torch.tensor(-1.0, device=device)
    if device != "cpu":
        assert sk.gumbel_softmax(logits, negative, seed=1).isnan().all()
        return
    for call in (
        lambda: sk.gumbel_softmax(logits, negative),
        lambda: sk.gumbel_quantize(logits, logits.t(), tau=negative),
    ):
        with pytest.raises(ValueError, match=r"^gumbel_\w+: tau must not be negative; got -1\.0"):
            call()


def test_only_the_logits_and_two_numbers_a_row_are_saved(backend, device):
    logits = draw(16, 96, device=device).requires_grad_()
    saved = []
    for dim, hard in ((-1, True), (0, False)):
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            sk.gumbel_softmax(logits, 0.5, hard, dim)
        others = [t for t in saved if t.data_ptr() != logits.data_ptr()]
        assert len(others) == len(saved) - 1
        assert sum(t.numel() for t in others) == 2 * logits.numel() // logits.shape[dim] + 2  # seed and tau


def test_memory(backend, device):
    """Beyond y and the gradient, peak memory is small compared with the logits (64 MiB)."""
    if backend in ("reference", "triton"):
        pytest.skip("the reference materialises words and exponentials; the interpreter copies tensors")
    logits, grad = draw(2048, 8192, device=device).requires_grad_(), torch.ones(2048, 8192, device=device)

    def run():
        y = sk.gumbel_softmax(logits, 0.5, True)
        return y, *torch.autograd.grad(y, logits, grad)

    run()
    peak, results = memory.peak_extra(run, torch.device(device))
    if peak is None:
        pytest.skip("this system has no resettable peak resident set")
    assert peak - sum(result.nbytes for result in results) < 8 << 20


@pytest.mark.full_for(backend="triton")
def test_bitwise_equal_from_run_to_run(backend, device):
    rows = {"reference": 50, "triton": 9}.get(backend, 3000)
    threads = torch.get_num_threads()
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        logits = draw(rows, 130, dtype=dtype, device=device).requires_grad_()
        grad = draw(rows, 130, dtype=dtype, device=device)
        found = []
        try:
            for count in (1, 2, 3, threads):
                torch.set_num_threads(count)
                y = sk.gumbel_softmax(logits, 0.5, seed=8)
                found.append((y, *torch.autograd.grad(y, logits, grad)))
        finally:
            torch.set_num_threads(threads)
        results.append(found)
    for found in results:
        for other in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.full_for(dynamic=False)
@pytest.mark.costly("the compiler")
@pytest.mark.slow_for(backend=("triton", "reference"))
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_equals_eager(backend, device, dynamic, compiler):
    torch._dynamo.reset()

    def step(logits, weight):
        y = sk.gumbel_softmax(2 * logits, 0.5, True, seed=1)
        z = sk.gumbel_softmax(logits, dim=0, generator=None)
        return (y * weight).sum() + 0 * z.sum() + sk.gumbel_softmax(logits, dim=0, seed=2).square().sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend=compiler)
    for rows in (5, 8):
        logits, weight = draw(rows, 11, device=device).requires_grad_(), draw(rows, 11, device=device, seed=2)
        got, expected = compiled(logits, weight), step(logits, weight)
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(torch.autograd.grad(got, logits), torch.autograd.grad(expected, logits))


@pytest.mark.full
def test_a_compiled_graph_takes_another_tau(device):
    """An annealed temperature compiles no new graph for each step."""
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        from torch._dynamo.backends.debugging import aot_eager

        graphs.append(graph)
        return aot_eager(graph, inputs)

    def step(logits, tau):
        return sk.gumbel_softmax(logits, tau, seed=1).square().sum()

    compiled = torch.compile(step, fullgraph=True, backend=count)
    logits = draw(4, 7, device=device).requires_grad_()
    for tau in (2.0, 1.5, 1.2, 0.9, 0.7):
        (grad,) = torch.autograd.grad(compiled(logits, tau), logits)
        torch.testing.assert_close(grad, torch.autograd.grad(step(logits, tau), logits)[0])
    assert len(graphs) <= 2


def test_a_compiled_graph_draws_anew(device):
    torch._dynamo.reset()
    compiled = torch.compile(sk.gumbel_softmax, fullgraph=True, backend="aot_eager")
    logits = draw(4, 7, device=device)
    assert not torch.equal(compiled(logits), compiled(logits))


@pytest.mark.full_for(backend="triton")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(backend, device, use_reentrant):
    """The recomputed forward draws the same: torch restores its default generators, or a seed is given."""
    logits, weight = draw(4, 9, device=device).requires_grad_(), draw(4, 9, device=device, seed=2)
    for preserve, seed in ((True, None), (False, 5)):

        def head(x, seed=seed):
            y = sk.gumbel_softmax(x.tanh(), 0.5, seed=seed)
            return (y * y * weight).sum()

        torch.manual_seed(1)
        (expected,) = torch.autograd.grad(head(logits), logits)
        torch.manual_seed(1)
        logits.grad = None
        options = {"use_reentrant": use_reentrant, "preserve_rng_state": preserve}
        checkpoint(head, logits, **options).backward()
        torch.testing.assert_close(logits.grad, expected)


def test_functional_transforms(device):
    logits, weight = draw(4, 9, device=device), draw(4, 9, device=device, seed=2)

    def loss(x):
        return (sk.gumbel_softmax(x, 0.5, True, seed=3) * weight).sum()

    leaf = logits.clone().requires_grad_()
    torch.testing.assert_close(torch.func.grad(loss)(logits), torch.autograd.grad(loss(leaf), leaf)[0])

    def row_loss(x, row_id):
        return sk.gumbel_softmax(x, 0.5, seed=3, row_ids=row_id).square().sum()

    ids = torch.arange(4, device=device)
    per_row = torch.func.vmap(torch.func.grad(row_loss))(logits, ids)
    whole = torch.autograd.grad(sk.gumbel_softmax(leaf, 0.5, seed=3).square().sum(), leaf)[0]
    torch.testing.assert_close(per_row, whole)
    drawn = torch.func.vmap(lambda x: sk.gumbel_softmax(x), randomness="different")(torch.zeros(3, 9, device=device))
    assert not torch.equal(drawn[0], drawn[1])
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(lambda x: sk.gumbel_softmax(x))(logits)


@pytest.mark.parametrize("dtype", DTYPES)
def test_autocast_changes_nothing(device, dtype):
    logits = draw(4, 9, dtype=dtype, device=device).requires_grad_()
    with torch.autocast(device, torch.bfloat16):
        y = sk.gumbel_softmax(logits, 0.5, seed=1)
    assert torch.equal(y, sk.gumbel_softmax(logits, 0.5, seed=1))
    assert torch.autograd.grad(y.sum(), logits)[0].dtype == dtype


@pytest.mark.full_for(backend="triton")
def test_opcheck(backend, device):
    logits, seed = draw(3, 6, dtype=torch.bfloat16, device=device), torch.tensor(3, device=device)
    inverse_tau = torch.tensor(2.0, dtype=torch.float64, device=device)
    arguments = (NoisyLogits(logits, seed, None, inverse_tau), True)
    torch.library.opcheck(gumbel_softmax_fwd.raw, tuple(gumbel_softmax_fwd.inputs.pack(arguments)))
    found = gumbel_softmax_fwd(*arguments)
    source = NoisyLogits(logits, seed, torch.arange(3, device=device), inverse_tau)
    arguments = (found.y, source, found.state)
    torch.library.opcheck(gumbel_softmax_bwd.raw, tuple(gumbel_softmax_bwd.inputs.pack(arguments)))
    assert gumbel_softmax_bwd(*arguments).shape == logits.shape


LOGITS = torch.zeros(4, 5)
ERRORS = [
    (dict(logits=[1.0]), TypeError, r"logits must be a torch.Tensor; got list"),
    (dict(logits=LOGITS.long()), TypeError, r"logits must have dtype .*; got torch.int64"),
    (dict(logits=LOGITS.to_sparse()), TypeError, r"logits must have a strided layout"),
    (dict(tau=0.0), ValueError, r"tau must be in \[1e-30, 1e\+30\]; got 0.0"),
    (dict(tau=-1), ValueError, r"tau must be in .*; got -1"),
    (dict(tau=float("nan")), ValueError, r"tau must be in .*; got nan"),
    (dict(tau=float("inf")), ValueError, r"tau must be in .*; got inf"),
    (dict(tau="1"), TypeError, r"tau must be a number; got str"),
    (dict(tau=torch.ones(4, 1)), ValueError, r"tau must have shape \(\) = \(\); got \(4, 1\)"),
    (dict(tau=torch.tensor(1)), TypeError, r"tau must have dtype .*; got torch.int64"),
    (dict(tau=torch.tensor(1.0, device="meta")), ValueError, r"tau must be on the device of logits, cpu; got meta"),
    (dict(tau=torch.tensor(1.0, requires_grad=True)), ValueError, r"tau must not require grad"),
    (dict(hard=1), TypeError, r"hard must be a bool; got int"),
    (dict(dim=2), ValueError, r"dim must be in \[-2, 1\]; got 2"),
    (dict(dim=-3), ValueError, r"dim must be in \[-2, 1\]; got -3"),
    (dict(dim=1.0), TypeError, r"dim must be an int; got float"),
    (dict(row_ids=torch.arange(5)), ValueError, r"row_ids must have shape .* = \(4,\); got \(5,\)"),
    (dict(row_ids=torch.arange(4).int()), TypeError, r"row_ids must have dtype"),
    (dict(row_ids=torch.arange(4, device="meta")), ValueError, r"row_ids must be on the device of logits"),
    (dict(seed=1.5), TypeError, r"seed must be an int, a 0-d int64 tensor or None; got float"),
    (dict(seed=1, generator=torch.Generator()), ValueError, r"generator must be None where seed is given"),
]


@pytest.mark.parametrize(
    ("change", "kind", "message"), ERRORS, ids=lambda v: next(iter(v)) if isinstance(v, dict) else ""
)
def test_errors(change, kind, message):
    with pytest.raises(kind, match=r"^gumbel_softmax: " + message):
        sk.gumbel_softmax(**{"logits": LOGITS, **change})


@kernels("gumbel_softmax")
@pytest.mark.gpu
def test_nothing_synchronises_and_a_graph_replays(backend):
    if backend == "reference":
        pytest.skip("the reference may synchronise")
    torch.use_deterministic_algorithms(False)
    logits = draw(64, 1000, device="cuda").requires_grad_()
    tau = torch.tensor(0.5, device="cuda")

    def step():
        y = sk.gumbel_softmax(logits, tau, True)
        return y, *torch.autograd.grad(y.square().sum(), logits)

    step()
    graph, got = captured(step)
    graph.replay()
    first = [t.clone() for t in got]
    graph.replay()
    assert not torch.equal(first[0], got[0])
