"""gaussian_rsample and gaussian_kl: values, gradients, the divergence, statistics and shapes."""

from __future__ import annotations

import itertools
import math

import gaussian_oracle
import mpmath
import oracle
import pytest
import torch
from cases import DTYPES, REPEATED_DTYPES
from gaussian_oracle import CASES, LEAVES, Case, call

import sslkernels as sk
from sslkernels.core.dtypes import accumulation_dtype
from sslkernels.latent import gaussian as module
from sslkernels.latent.gaussian_operators import NO_KL, ROWS, OutputGrads, Wanted

pytestmark = pytest.mark.pairwise

OP = "gaussian_rsample"
LONG_ROWS = next(case for case in CASES if str(case) == "long_rows")


def rounding(dtype):
    """The relative error of the norm by roundings of the accumulation dtype and of the result."""
    return 8 * torch.finfo(accumulation_dtype(dtype)).eps + torch.finfo(dtype).eps


def weights(outputs):
    """A gradient for each output, the same for every dtype."""
    g = torch.Generator().manual_seed(3)
    return [torch.randn(o.shape, generator=g, dtype=torch.float64).bfloat16().to(o) for o in outputs]


def differentiate(function, leaves, options, requires_grad=LEAVES):
    leaves = {name: leaf.detach().requires_grad_(name in requires_grad) for name, leaf in leaves.items()}
    outputs = [o for o in call(function, leaves, options) if o is not None]
    pairs = [(o, w) for o, w in zip(outputs, weights(outputs), strict=True) if o.requires_grad]
    wanted = [leaf for leaf in leaves.values() if leaf.requires_grad]
    grads = torch.autograd.grad([o for o, _ in pairs], wanted, [w for _, w in pairs], allow_unused=True)
    return outputs, dict(zip([n for n, leaf in leaves.items() if leaf.requires_grad], grads, strict=True))


@pytest.mark.slow_for(backend="triton", case=LONG_ROWS, dtype=REPEATED_DTYPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients_against_float64(backend, case, dtype, device):
    leaves, options = case.arguments(dtype, device)
    outputs, grads = differentiate(sk.gaussian_rsample, leaves, options)
    exact = {name: leaf.double() for name, leaf in leaves.items()}
    truth, true_grads = differentiate(gaussian_oracle.gaussian_rsample, exact, options)
    assert outputs[0].dtype == dtype
    assert oracle.error(outputs[0], truth[0]) <= rounding(dtype)
    for value, true in zip(outputs[1:], truth[1:], strict=True):
        acc = accumulation_dtype(dtype)
        assert value.dtype == acc
        assert oracle.error(value, true) <= rounding(acc)
    for name, grad in grads.items():
        if grad is None:
            assert true_grads[name] is None
            continue
        assert grad.dtype == dtype
        assert grad.shape == leaves[name].shape
        # Autograd sums the rounded gradients of a prior that is expanded first.
        terms = 4 * math.sqrt(case.columns * 7) if case.prior == "column" else 4
        assert oracle.error(grad, true_grads[name]) <= terms * rounding(dtype), name


@pytest.mark.parametrize("case", [c for c in CASES if c.options.get("kl", "row") is not None], ids=str)
def test_gaussian_kl_equals_the_divergence_of_the_samples(backend, case, device):
    leaves, options = case.arguments(torch.float32, device)
    shared = {k: v for k, v in options.items() if k in ("free_bits", "logvar_bounds")}
    reduction = options.get("kl", "row")
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
    _, expected = call(sk.gaussian_rsample, leaves, options)
    value = call(sk.gaussian_kl, leaves, {**shared, "reduction": reduction})
    assert torch.equal(value, expected)
    (weight,) = weights([value])
    for got, true in zip(
        torch.autograd.grad(value, list(leaves.values()), weight),
        torch.autograd.grad(expected, list(leaves.values()), weight),
        strict=True,
    ):
        assert torch.equal(got, true)


SUBSETS = list(itertools.product([False, True], repeat=4))[1:]


@pytest.mark.full_for(backend="triton")
@pytest.mark.parametrize("name", ["mixed_prior", "shared_prior", "prior"])
def test_every_subset_of_leaves_gets_the_same_gradients(backend, name, device):
    case = next(c for c in CASES if c.name == name)
    leaves, options = case.arguments(torch.float32, device)
    full_outputs, full = differentiate(sk.gaussian_rsample, leaves, options)
    slow = backend == "triton" and device == "cpu"
    for subset in SUBSETS[::4] if slow else SUBSETS:
        wanted = [leaf for leaf, want in zip(LEAVES, subset, strict=True) if want]
        outputs, grads = differentiate(sk.gaussian_rsample, leaves, options, wanted)
        assert all(torch.equal(a, b) for a, b in zip(outputs, full_outputs, strict=True))
        assert grads.keys() == set(wanted)
        for leaf, grad in grads.items():
            assert torch.equal(grad, full[leaf]), leaf
    frozen = {leaf: tensor.detach() for leaf, tensor in leaves.items()}
    assert not any(o.requires_grad for o in call(sk.gaussian_rsample, frozen, options))


def test_only_wanted_results_are_computed(monkeypatch, device):
    """Which results and gradients the operators are called for."""
    calls = []
    forward, backward = module.gaussian_fwd, module.gaussian_bwd

    def recorded_forward(inputs, options, statistics):
        calls.append(("fwd", options.samples, options.kl, statistics))
        return forward(inputs, options, statistics)

    def recorded_backward(grads, inputs, options, wanted):
        calls.append(("bwd", OutputGrads(grads.z is not None, grads.kl is not None), wanted))
        return backward(grads, inputs, options, wanted)

    monkeypatch.setattr(module, "gaussian_fwd", recorded_forward)
    monkeypatch.setattr(module, "gaussian_bwd", recorded_backward)

    def calls_of(loss, mean, logvar, **options):
        calls.clear()
        leaves = [torch.ones(3, 4, device=device, requires_grad=r) for r in (mean, logvar)]
        z, kl = sk.gaussian_rsample(*leaves, seed=0, **options)
        loss(z, kl).backward()
        return calls

    def bwd(z, kl, mean, logvar):
        return ("bwd", OutputGrads(z, kl), Wanted(mean, logvar, False, False))

    fwd = ("fwd", 1, ROWS, False)
    assert calls_of(lambda z, kl: z.sum() + kl.sum(), True, True) == [fwd, bwd(True, True, True, True)]
    assert calls_of(lambda z, kl: kl.sum(), True, False) == [fwd, bwd(False, True, True, False)]
    # The gradient of z is the gradient of mean: no kernel runs if logvar is frozen.
    assert calls_of(lambda z, kl: z.sum(), True, False) == [fwd]
    assert calls_of(lambda z, kl: z.sum(), True, True) == [fwd, bwd(True, False, False, True)]
    several = [("fwd", 3, NO_KL, False), bwd(True, False, True, True)]
    assert calls_of(lambda z, kl: z.sum(), True, True, num_samples=3, kl=None) == several


def test_gradients_of_any_layout_and_of_either_output_alone(backend, device):
    case = Case("layouts", batch=(6,), columns=5, samples=2)
    leaves, options = case.arguments(torch.float64, device)
    leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
    tensors = list(leaves.values())
    z, kl = call(sk.gaussian_rsample, leaves, options)
    true_z, true_kl = call(gaussian_oracle.gaussian_rsample, leaves, options)
    layouts = [
        torch.ones((), dtype=torch.float64, device=device).expand_as(z),
        torch.randn(5, 2, 6, dtype=torch.float64, device=device).permute(2, 1, 0),
        torch.randn(6, 2, 10, dtype=torch.float64, device=device)[..., ::2],
        torch.randn(2, 5, dtype=torch.float64, device=device).expand_as(z),
    ]
    for grad in layouts:
        got = torch.autograd.grad(z, tensors, grad, retain_graph=True)
        for a, b in zip(got, torch.autograd.grad(true_z, tensors, grad, retain_graph=True), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    for grad in (torch.randn(12, dtype=torch.float64, device=device)[::2], torch.ones_like(kl[:1]).expand_as(kl)):
        got = torch.autograd.grad(kl, tensors, grad, retain_graph=True)
        for a, b in zip(got, torch.autograd.grad(true_kl, tensors, grad, retain_graph=True), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.full_for(backend="triton")
def test_a_retained_graph_gives_the_same_gradients_again(backend, device):
    case = CASES[2]
    leaves, options = case.arguments(torch.float32, device)
    leaves = [leaf.requires_grad_() for leaf in leaves.values()]
    z, kl = sk.gaussian_rsample(*leaves, **options)
    loss = (z.square().sum() + kl.sum()) * 0.5
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(loss, leaves), strict=True))


@pytest.mark.full_for(backend="triton")
def test_double_backward_raises(backend, device):
    mean, logvar = (torch.randn(3, 4, device=device, requires_grad=True) for _ in range(2))
    z, kl = sk.gaussian_rsample(mean, logvar, seed=0)
    (grad,) = torch.autograd.grad(z.square().sum() + kl.sum(), logvar, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"^gaussian_rsample: double backward is not supported"):
        grad.sum().backward()
    (grad,) = torch.autograd.grad(sk.gaussian_kl(mean, logvar).sum(), mean, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"^gaussian_kl: double backward is not supported"):
        grad.sum().backward()


MAGNITUDES = (0.0, 1e-6, 1e-5, 1e-4, 1e-3, 0.03, 0.3, 0.7, 0.99, 1.01, 1.5, 3.0, 10.0)


def exact_kl(mean, logvar, prior_mean=0.0, prior_logvar=0.0):
    with mpmath.workdps(60):
        d = mpmath.mpf(logvar) - mpmath.mpf(prior_logvar)
        distance = (mpmath.mpf(mean) - mpmath.mpf(prior_mean)) ** 2
        return float((distance * mpmath.exp(-mpmath.mpf(prior_logvar)) + mpmath.expm1(d) - d) / 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_every_divergence_keeps_its_digits(backend, dtype, device):
    """Relative error of each element, over mean and logvar from 1e-6 to 10: 1.5e-6 in float32 (1 in eager torch)."""
    values = [s * m for m in MAGNITUDES for s in (1, -1)]
    grid = torch.tensor(list(itertools.product(values, values)), dtype=torch.float64).to(dtype)
    mean, logvar = (column.contiguous().to(device) for column in grid.unbind(1))
    got = sk.gaussian_kl(mean, logvar, reduction="none").double().cpu()
    exact = torch.tensor([exact_kl(m, v) for m, v in grid.double().tolist()], dtype=torch.float64)
    assert (got >= 0).all()
    assert torch.equal(got == 0, exact == 0)
    eps = torch.finfo(accumulation_dtype(dtype)).eps
    assert ((got - exact).abs() <= 12 * eps * exact).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_divergence_to_a_prior_near_the_posterior_keeps_its_digits(backend, dtype, device):
    base = torch.tensor([-3.0, -0.5, 0.25, 2.0]).repeat_interleave(6)
    moved = torch.tensor([0.0, 1.0, -1.0, 3.0, 40.0, -100.0]).repeat(4) * torch.finfo(dtype).eps
    mean, prior_mean = (1 + moved).to(dtype), torch.ones_like(base).to(dtype)
    logvar, prior_logvar = (base * (1 + moved)).to(dtype), base.to(dtype)
    tensors = [t.to(device) for t in (mean, logvar, prior_mean, prior_logvar)]
    got = sk.gaussian_kl(*tensors[:2], prior=tuple(tensors[2:]), reduction="none").double().cpu()
    numbers = zip(*(t.double().tolist() for t in (mean, logvar, prior_mean, prior_logvar)), strict=True)
    exact = torch.tensor([exact_kl(*n) for n in numbers], dtype=torch.float64)
    assert torch.equal(got == 0, exact == 0)
    assert ((got - exact).abs() <= 2e-6 * exact).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_slope_of_the_divergence_keeps_its_digits(backend, dtype, device):
    """expm1(logvar) / 2; exp(logvar) - 1 would cancel near 0."""
    logvar = torch.tensor([s * m for m in MAGNITUDES[1:] for s in (1, -1)]).to(dtype).to(device).requires_grad_()
    (grad,) = torch.autograd.grad(sk.gaussian_kl(torch.zeros_like(logvar), logvar, reduction="sum"), logvar)
    exact = logvar.detach().double().expm1() / 2
    smallest = torch.finfo(dtype).tiny * torch.finfo(dtype).eps  # a subnormal of float16 rounds to a multiple of it
    allowed = (8 * torch.finfo(torch.float32).eps + torch.finfo(dtype).eps) * exact.abs() + smallest
    assert ((grad.double() - exact).abs() <= allowed).all()


def test_free_bits_stop_the_gradient_below_them(backend, device):
    """Per element, whatever its row and column hold; at the threshold itself the gradient passes, as in clamp."""
    mean = torch.tensor([[0.1, 1.0, 2.0], [3.0, 0.2, 1.0]], device=device, requires_grad=True)
    logvar = torch.zeros(2, 3, device=device, requires_grad=True)
    value, stats = sk.gaussian_kl(mean, logvar, free_bits=0.5, return_stats=True, reduction="none")
    torch.testing.assert_close(value, torch.tensor([[0.5, 0.5, 2.0], [4.5, 0.5, 0.5]], device=device))
    in_mean, in_logvar = torch.autograd.grad(value.sum(), (mean, logvar))
    below = mean.detach().square() / 2 < 0.5
    assert torch.equal(below, torch.tensor([[1, 0, 0], [0, 1, 0]], dtype=torch.bool, device=device))
    assert torch.equal(in_mean, mean.detach().masked_fill(below, 0))
    assert not in_logvar.any()
    torch.testing.assert_close(stats.kl_per_dim, (mean.detach().square() / 2).mean(0))


def test_bounds_clamp_as_torch_does(backend, device):
    logvar = torch.tensor([[-9.0, -2.0, 0.0, 1.5, 8.0]], dtype=torch.float64, device=device, requires_grad=True)
    mean = torch.randn(1, 5, dtype=torch.float64, device=device, requires_grad=True)
    got = sk.gaussian_rsample(mean, logvar, seed=1, logvar_bounds=(-2.0, 1.5))
    expected = gaussian_oracle.gaussian_rsample(mean, logvar, seed=1, logvar_bounds=(-2.0, 1.5))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
    grad, true = (torch.autograd.grad(z.sum() + kl.sum(), logvar)[0] for z, kl in (got, expected))
    torch.testing.assert_close(grad, true)
    assert (grad != 0).tolist() == [[False, True, True, True, False]]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_nonfinite_inputs_affect_only_their_element(backend, dtype, device):
    """NaN in one element (and its row's sum), a variance of 0, and one that overflows."""
    mean = torch.zeros(6, 5, dtype=dtype, device=device)
    logvar = torch.zeros_like(mean)
    mean[0, 1], logvar[1, 2], logvar[2, 3] = math.nan, math.nan, -math.inf
    logvar[3, 4] = math.inf
    mean[4, 0] = math.inf
    leaves = [mean.requires_grad_(), logvar.requires_grad_()]
    z, kl = sk.gaussian_rsample(*leaves, seed=0, kl="none")
    row = sk.gaussian_kl(*leaves)
    nan = torch.zeros(6, 5, dtype=torch.bool, device=device)
    nan[0, 1] = nan[1, 2] = True
    infinite = torch.zeros_like(nan)
    infinite[3, 4] = infinite[4, 0] = True
    assert torch.equal(z.isnan(), nan)
    assert torch.equal(z.isinf(), infinite)
    assert z[2, 3] == 0
    infinite[2, 3] = True
    assert torch.equal(kl.isnan(), nan)
    assert torch.equal(kl == math.inf, infinite)
    assert row.isnan().tolist() == [True, True, False, False, False, False]
    assert row.isinf().tolist() == [False, False, True, True, True, False]
    in_mean, in_logvar = torch.autograd.grad(z.sum() + kl.sum(), leaves)
    assert torch.equal(in_mean.isnan(), nan & mean.isnan())
    in_logvar[3, 4] = 0  # -inf + inf, or inf
    assert torch.equal(in_logvar.isnan(), nan & logvar.isnan())
    assert in_logvar[2, 3] == -0.5
    bounded, _ = sk.gaussian_rsample(mean, logvar, seed=0, logvar_bounds=(-4.0, 4.0))
    assert torch.equal(bounded.isnan(), nan)


def test_the_divergence_of_half_precision_does_not_overflow(backend, device):
    """exp(12) overflows float16, which neither the divergence nor its gradient is computed in."""
    mean = torch.zeros(1, 4, dtype=torch.float16, device=device)
    logvar = torch.tensor([[11.0, 12.0, 16.0, 20.0]], dtype=torch.float16, device=device, requires_grad=True)
    z, kl = sk.gaussian_rsample(mean, logvar, kl="none", seed=0)
    assert z.isfinite().all()
    torch.testing.assert_close(kl.double(), (torch.expm1(logvar.double()) - logvar.double()) / 2, rtol=1e-6, atol=0)
    (grad,) = torch.autograd.grad((kl * 1e-6).sum(), logvar)
    torch.testing.assert_close(grad.double(), torch.expm1(logvar.double()) * 5e-7, rtol=2e-3, atol=1e-6)


def test_scales_over_all_of_float32(backend, device):
    """Relative error of exp(logvar / 2) from underflow to overflow: a few roundings."""
    logvar = torch.linspace(-170, 177, 700, device=device).view(1, -1)
    eps = sk.random_normal(logvar.shape, 0, device=device)
    z, _ = sk.gaussian_rsample(torch.zeros_like(logvar), logvar, seed=0)
    exact = (logvar.double() / 2).exp() * eps
    assert ((z - exact).abs() <= 4e-7 * exact.abs()).all()
    for extreme, expected in ((-1e30, 0.0), (1e30, math.inf)):
        z, _ = sk.gaussian_rsample(torch.zeros(1, 4, device=device), torch.full((1, 4), extreme, device=device), seed=0)
        assert (z.abs() == expected).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize(("rows", "columns", "offset"), [(130, 5, 0.0), (65, 33, 100.0), (64, 1, 1e4), (2, 3, 0.0)])
def test_statistics(backend, rows, columns, offset, dtype, device):
    """The variance loses no digits to a large common offset of the means."""
    g = torch.Generator().manual_seed(rows)
    mean = torch.randn(rows, columns, generator=g, dtype=torch.float64) * torch.linspace(0.05, 2, columns) + offset
    mean = mean.to(dtype).to(device).requires_grad_()
    logvar = torch.randn(rows, columns, generator=g, dtype=torch.float64).to(dtype).to(device).requires_grad_()
    sample, stats = sk.gaussian_rsample(mean, logvar, 2, seed=0, free_bits=1.0, return_stats=True)
    assert sample.z.shape == (rows, 2, columns)
    acc = accumulation_dtype(dtype)
    true_kl = gaussian_oracle.kl_terms(mean.double(), logvar.double(), None).mean(0)
    true_variance = (mean - mean[0]).double().var(0) if dtype == torch.float64 else mean.double().var(0)
    assert stats.kl_per_dim.dtype == stats.mean_variance.dtype == acc
    torch.testing.assert_close(stats.kl_per_dim.double(), true_kl, rtol=16 * torch.finfo(acc).eps, atol=0)
    torch.testing.assert_close(stats.mean_variance.double(), true_variance, rtol=64 * torch.finfo(acc).eps, atol=0)
    assert stats.active_units.shape == ()
    assert stats.active_units == (true_variance > 0.01).sum()
    assert not any(s.requires_grad for s in stats)
    assert all(
        torch.equal(a, b) for a, b in zip(sk.gaussian_kl(mean, logvar, return_stats=True)[1], stats, strict=True)
    )


@pytest.mark.parametrize("rows", [0, 1])
def test_statistics_of_too_few_rows(backend, rows, device):
    mean = torch.randn(rows, 3, device=device)
    _, stats = sk.gaussian_kl(mean, mean, return_stats=True)
    assert stats.mean_variance.isnan().all()
    assert stats.kl_per_dim.isnan().all() == (rows == 0)
    assert stats.active_units == 0


def test_statistics_with_an_outlier_in_the_first_row(backend, device):
    """Distances are relative to row 0; an outlier there costs no digits."""
    mean = 1e-2 * torch.randn(200, 2, device=device, generator=torch.Generator(device).manual_seed(0))
    mean[0] = 3.0
    _, stats = sk.gaussian_kl(mean, mean, return_stats=True)
    torch.testing.assert_close(stats.mean_variance.double(), mean.double().var(0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0), (2, 0, 5), (0,), (1,), (2, 5)])
@pytest.mark.parametrize("samples", [None, 0, 2])
def test_empty_shapes(backend, shape, samples, device):
    mean, logvar = (torch.randn(shape, device=device, requires_grad=True) for _ in range(2))
    prior = tuple(torch.randn(shape[-1], device=device, requires_grad=True) for _ in range(2))
    z_shape = shape if samples is None else (*shape[:-1], samples, shape[-1])
    for kl, kl_shape in (("none", shape), ("row", shape[:-1]), ("sum", ()), ("mean", ())):
        (z, value), stats = sk.gaussian_rsample(mean, logvar, samples, prior=prior, kl=kl, seed=0, return_stats=True)
        assert z.shape == z_shape
        assert value.shape == kl_shape
        assert stats.mean_variance.shape == shape[-1:]
        if mean.numel() == 0:
            empty_mean = kl == "mean" and math.prod(shape[:-1]) == 0
            assert value.isnan().all() if empty_mean else not value.any()
        grads = torch.autograd.grad(z.sum() + value.sum(), (mean, logvar, *prior))
        assert [g.shape for g in grads] == [mean.shape, mean.shape, shape[-1:], shape[-1:]]
        if mean.numel() == 0:
            assert not any(g.any() for g in grads)


@pytest.mark.parametrize("on_empty", ["nan", "zero"])
def test_a_mean_over_no_rows(on_empty, backend, device):
    mean, logvar = (torch.randn(0, 4, device=device, requires_grad=True) for _ in range(2))
    prior = tuple(torch.randn(4, device=device, requires_grad=True) for _ in range(2))
    values = [
        sk.gaussian_kl(mean, logvar, prior=prior, reduction="mean", on_empty=on_empty),
        sk.gaussian_rsample(mean, logvar, prior=prior, kl="mean", on_empty=on_empty).kl,
        sk.nn.GaussianLatent(kl="mean", on_empty=on_empty)(mean, logvar, prior=prior).kl,
    ]
    for value in values:
        assert value.isnan() if on_empty == "nan" else value == 0
        assert not any(grad.any() for grad in torch.autograd.grad(value, (mean, logvar, *prior)))
    with pytest.raises(ValueError, match="gaussian_kl: on_empty must be"):
        sk.gaussian_kl(mean, logvar, on_empty="one")


def test_rows_of_any_stride(backend, device):
    """Halves of one tensor, transposed, strided and broadcast rows, and rows that start at odd addresses."""
    base = torch.randn(8, 24, dtype=torch.float64, device=device)
    views = [
        base.chunk(2, -1),
        (base.t()[:8], base.t()[8:16]),
        (base[::2, ::2], base[1::2, 1::2]),
        (base[:1, :12].expand(8, 12), base[:, 12:]),
        (base[:, 1:6], base[:, 7:12]),
        (base.view(4, 2, 24)[:, 0, :12], base.view(4, 2, 24)[:, 1, 12:]),
        (base.view(2, 4, 24).transpose(0, 1)[..., :12], base.view(2, 4, 24).transpose(0, 1)[..., 12:]),
    ]
    for mean, logvar in views:
        got = differentiate(sk.gaussian_rsample, {"mean": mean, "logvar": logvar}, {"seed": 1, "num_samples": 2})
        plain = {"mean": mean.contiguous(), "logvar": logvar.contiguous()}
        expected = differentiate(sk.gaussian_rsample, plain, {"seed": 1, "num_samples": 2})
        assert all(torch.equal(a, b) for a, b in zip(got[0], expected[0], strict=True))
        assert all(torch.equal(a, expected[1][name]) for name, a in got[1].items())
