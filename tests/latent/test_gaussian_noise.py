"""The noise of gaussian_rsample: its stream, its recomputation, the mean of its gradients, transformations, errors."""

from __future__ import annotations

import copy
import itertools
import math
import pickle

import gaussian_oracle
import oracle
import pytest
import torch
import torch._functorch.config as functorch_config
from cases import DTYPES
from gaussian_oracle import CASES, call
from torch.utils.checkpoint import checkpoint

import sslkernels as sk
from benchmarks import memory
from sslkernels.latent.gaussian_operators import Inputs, Options, OutputGrads, Wanted, gaussian_bwd, gaussian_fwd

pytestmark = pytest.mark.pairwise

OP = "gaussian_rsample"


def parameters(device, rows=6, columns=7, dtype=torch.float32, requires_grad=True):
    g = torch.Generator().manual_seed(rows)
    draws = [torch.randn(rows, columns, generator=g).to(dtype).to(device) for _ in range(2)]
    return [t.requires_grad_() if requires_grad else t for t in draws]


def step(mean, logvar, **options):
    """z, kl, and the gradients of both."""
    z, kl = sk.gaussian_rsample(mean, logvar, **options)
    return z, kl, *torch.autograd.grad((z * torch.linspace(-1, 1, z.shape[-1]).to(z)).sum() + kl.sum(), (mean, logvar))


def equal(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("columns", [1, 3, 8])
def test_the_noise_is_random_normal_to_the_bit(backend, columns, dtype, device):
    zeros = torch.zeros(5, columns, dtype=dtype, device=device)
    row_ids = torch.tensor([3, 0, 2**33 + 1, -5, 2**63 - 1], device=device)
    for ids in (None, row_ids):
        z = sk.gaussian_rsample(zeros, zeros, 3, row_ids=ids, seed=-7).z
        expected = gaussian_oracle.noise(zeros.shape, 3, torch.tensor(-7, device=device), ids)
        assert torch.equal(z, expected.to(dtype))
        assert torch.equal(z[:, 0], sk.gaussian_rsample(zeros, zeros, row_ids=ids, seed=-7).z)


def test_the_first_samples_are_the_same_for_every_number_of_them(backend, device):
    mean, logvar = parameters(device)
    five = sk.gaussian_rsample(mean, logvar, 5, seed=2).z
    for count in (1, 2, 4):
        assert torch.equal(sk.gaussian_rsample(mean, logvar, count, seed=2).z, five[:, :count])


@pytest.mark.full_for(backend="triton")
@pytest.mark.parametrize("columns", [5, 16])
def test_a_batch_in_parts_or_in_another_order_is_the_same(backend, columns, device):
    """Bit for bit: samples, divergence and gradients; rows are numbered as in the whole batch."""
    mean, logvar = parameters(device, 9, columns)
    whole = step(mean, logvar, num_samples=2, seed=4)
    ids = torch.arange(9, device=device)
    for order in ([4, 0, 8, 3, 1, 2, 5, 7, 6], list(range(9))):
        for parts in ((9,), (4, 5), (1, 1, 7)):
            index = torch.tensor(order, device=device)
            for part in index.split(parts):
                leaves = [t.detach()[part].requires_grad_() for t in (mean, logvar)]
                got = step(*leaves, num_samples=2, seed=4, row_ids=ids[part])
                assert equal(got, [t[part] for t in whole])


def test_row_numbers_do_not_wrap(backend, device):
    """Row numbers whose groups exceed 2^32, in forward and backward."""
    ids = torch.tensor([2**33 + 1, 1, 2**62 + 5], device=device)
    mean, logvar = (torch.zeros(3, 13, device=device, requires_grad=True) for _ in range(2))
    z = sk.gaussian_rsample(mean, logvar, 2, row_ids=ids, seed=6).z
    eps = torch.stack([sk.random_normal((3, 13), 6, row_ids=ids, sample=k) for k in range(2)], 1)
    assert torch.equal(z, eps)
    torch.testing.assert_close(torch.autograd.grad(z.sum(), logvar)[0], eps.sum(1) / 2)
    assert not torch.equal(eps, sk.gaussian_rsample(mean, logvar, 2, row_ids=ids % 2**32, seed=6).z)


def test_seeds_and_generators(backend, device):
    mean, logvar = parameters(device)
    first = step(mean, logvar, seed=5)
    assert equal(first, step(mean, logvar, seed=torch.tensor(5, device=device)))
    assert not torch.equal(first[0], step(mean, logvar, seed=6)[0])
    generator = torch.Generator(device).manual_seed(1)
    drawn = [step(mean, logvar, generator=generator) for _ in range(2)]
    assert not torch.equal(drawn[0][0], drawn[1][0])
    assert equal(drawn[0], step(mean, logvar, generator=generator.manual_seed(1)))
    torch.manual_seed(3)
    default = step(mean, logvar)
    after = torch.rand(1, device=device)
    torch.manual_seed(3)
    sk.gaussian_rsample(mean[:2], logvar[:2], 7)  # any size draws one number of the generator
    assert torch.equal(torch.rand(1, device=device), after)
    torch.manual_seed(3)
    assert equal(step(mean, logvar), default)


def test_backward_leaves_the_generators_alone(backend, device):
    mean, logvar = parameters(device)
    z, kl = sk.gaussian_rsample(mean, logvar)
    state = torch.get_rng_state() if device == "cpu" else torch.cuda.get_rng_state()
    torch.autograd.grad(z.sum() + kl.sum(), (mean, logvar))
    assert torch.equal(torch.get_rng_state() if device == "cpu" else torch.cuda.get_rng_state(), state)


def test_the_divergence_alone_draws_nothing(device):
    mean, logvar = parameters(device)
    torch.manual_seed(0)
    expected = torch.rand(1, device=device)
    torch.manual_seed(0)
    sk.gaussian_kl(mean, logvar).sum().backward()
    assert torch.equal(torch.rand(1, device=device), expected)


@pytest.mark.parametrize("samples", [None, 3])
def test_only_the_inputs_are_saved(backend, samples, device):
    base = torch.randn(300, 64, device=device, requires_grad=True)
    mean, logvar = base.chunk(2, -1)
    prior = tuple(torch.randn(32, device=device, requires_grad=True) for _ in range(2))
    known = {t.untyped_storage().data_ptr() for t in (base, *prior)}
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        z, kl = sk.gaussian_rsample(mean, logvar, samples, prior=prior, kl="none", free_bits=0.1)
    assert {t.untyped_storage().data_ptr() for t in kept if t.numel() > 1} <= known
    (z.sum() + kl.sum()).backward()


def test_memory(backend, device):
    """Peak memory beyond what is returned: less than a tenth of a tensor, forward and backward (64 MiB each here)."""
    if backend in ("reference", "triton"):
        pytest.skip("the reference materialises the noise; the interpreter copies tensors")
    mean, logvar = parameters(device, 16384, 1024)
    grad = torch.randn_like(mean)

    def run():
        z, kl = sk.gaussian_rsample(mean, logvar, return_stats=False)
        return z, *torch.autograd.grad([z, kl.mean()], [mean, logvar], [grad, torch.ones((), device=device)])

    run()
    peak, results = memory.peak_extra(run, torch.device(device))
    if peak is None:
        pytest.skip("this system has no resettable peak resident set")
    assert peak - sum(r.nbytes for r in results) < 7 << 20


@pytest.mark.full_for(backend="triton")
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("preserve", [False, True])
def test_checkpoint_regenerates_the_same_noise(backend, use_reentrant, preserve, device):
    """From torch's default generators if their state is restored, from seed= in any case."""
    mean, logvar = parameters(device)
    options = {} if preserve else {"seed": torch.tensor(9, device=device)}

    def block(mean, logvar):
        z, kl = sk.gaussian_rsample(mean.tanh(), logvar, **options)
        return z.square().sum() + kl.sum()

    torch.manual_seed(0)
    expected = torch.autograd.grad(block(mean, logvar), (mean, logvar))
    torch.manual_seed(0)
    checkpoint(block, mean, logvar, use_reentrant=use_reentrant, preserve_rng_state=preserve).backward()
    for leaf, true in zip((mean, logvar), expected, strict=True):
        torch.testing.assert_close(leaf.grad, true)


@pytest.mark.full_for(backend=("triton", "reference"))
@pytest.mark.full_for(dynamic=False)
@pytest.mark.costly("the compiler")
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_equals_eager(backend, dynamic, device, compiler):
    torch._dynamo.reset()

    def f(mean, logvar, prior_mean, seed):
        options = {"kl": "mean", "free_bits": 0.1, "logvar_bounds": (-3.0, 3.0), "return_stats": True}
        prior = (prior_mean, logvar.detach()[0])
        (z, kl), stats = sk.gaussian_rsample(2 * mean, logvar, 2, prior=prior, seed=seed, **options)
        return z + 1, kl, stats.mean_variance

    compiled = torch.compile(f, fullgraph=True, dynamic=dynamic, backend=compiler)
    for rows in (6, 4):
        leaves = [*parameters(device, rows), torch.randn(7, device=device, requires_grad=True)]
        seed = torch.tensor(rows, device=device)
        got, expected = compiled(*leaves, seed), f(*leaves, seed)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)
        grads = [torch.autograd.grad(out[0].sum() + out[1], leaves) for out in (got, expected)]
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b)


def test_compile_draws_the_seed_and_takes_one_tensor_twice(device):
    torch._dynamo.reset()
    mean, _ = parameters(device)

    def f(mean):
        return sk.gaussian_rsample(mean, mean, prior=(mean, mean))

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    torch.manual_seed(0)
    first, second = compiled(mean), compiled(mean)
    assert not torch.equal(first.z, second.z)
    torch.manual_seed(0)
    expected = f(mean)
    torch.testing.assert_close(first, expected)
    for a, b in zip(torch.autograd.grad(first.z.sum(), mean), torch.autograd.grad(expected.z.sum(), mean), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.full
def test_a_memory_budget_of_the_compiler_changes_no_noise(device):
    """Below 1 torch draws again in backward what forward drew from a generator (pytorch issue 190758)."""
    mean, logvar = parameters(device)

    def block(mean, logvar, seed):
        return sk.gaussian_rsample(mean.tanh(), logvar.sin(), kl=None, seed=seed).z.square().sum()

    expected = torch.autograd.grad(block(mean, logvar, 9), (mean, logvar))
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager_decomp_partition")
    with functorch_config.patch(activation_memory_budget=0.0):
        for seed in (9, torch.tensor(9, device=device)):
            grads = torch.autograd.grad(compiled(mean, logvar, seed), (mean, logvar))
            for a, b in zip(grads, expected, strict=True):
                torch.testing.assert_close(a, b)
        with pytest.raises(Exception, match=r"torch\.compile may draw another seed in backward"):
            compiled(mean, logvar, None)
        with torch.no_grad():
            assert compiled(mean, logvar, None).isfinite()
    assert torch.autograd.grad(compiled(mean, logvar, None), mean)[0].isfinite().all()


def test_a_compiled_checkpoint_regenerates_the_same_noise(device):
    """The compiler recomputes the block in backward, with the seed that forward drew."""
    mean, logvar = parameters(device)

    def block(mean, logvar):
        z = sk.gaussian_rsample(mean.tanh(), logvar.sin(), kl=None).z
        return z, z.square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *tensors: checkpoint(block, *tensors, use_reentrant=False),
        fullgraph=True,
        backend="aot_eager_decomp_partition",
    )
    z, loss = compiled(mean, logvar)
    scale = (logvar.sin() / 2).exp()
    eps = ((z - mean.tanh()) / scale).detach()
    expected = torch.autograd.grad((mean.tanh() + scale * eps).square().sum(), (mean, logvar))
    for a, b in zip(torch.autograd.grad(loss, (mean, logvar)), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_functional_transforms(device):
    mean, logvar = parameters(device, dtype=torch.float64, requires_grad=False)
    seed = torch.tensor(1, device=device)

    def loss_of(function):
        def loss(mean, logvar, row_ids):
            z, kl = function(mean, logvar, 2, seed=seed, row_ids=row_ids)
            return (z**3).sum() + kl.sum()

        return loss

    ids = torch.arange(6, device=device)
    ours, truth = loss_of(sk.gaussian_rsample), loss_of(gaussian_oracle.gaussian_rsample)
    got = torch.func.grad(ours, argnums=(0, 1))(mean, logvar, ids)
    torch.testing.assert_close(got, torch.func.grad(truth, argnums=(0, 1))(mean, logvar, ids))
    each = torch.func.vmap(torch.func.grad(ours, argnums=(0, 1)))(mean[:, None], logvar[:, None], ids[:, None])
    torch.testing.assert_close(tuple(g[:, 0] for g in each), got)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_takes_any_mix_of_dtypes(dtype, device):
    for kinds in itertools.product((torch.float32, dtype), repeat=3):
        mean, logvar = parameters(device)
        prior = torch.randn(7, device=device)
        leaves = [t.detach().to(kind).requires_grad_() for t, kind in zip((mean, logvar, prior), kinds, strict=True)]
        with torch.autocast(device, dtype):
            z, kl = sk.gaussian_rsample(*leaves[:2], prior=(leaves[2], leaves[2]), seed=0)
        assert z.dtype == kinds[0]
        assert kl.dtype == torch.float32
        grads = torch.autograd.grad(z.float().sum() + kl.sum(), leaves)
        exact = [t.detach().double().requires_grad_() for t in leaves]
        true_z, true_kl = gaussian_oracle.gaussian_rsample(*exact[:2], prior=(exact[2], exact[2]))
        assert oracle.error(z, true_z) < torch.finfo(kinds[0]).eps + 1e-6
        assert oracle.error(kl, true_kl) < 1e-6
        true_grads = torch.autograd.grad(true_z.sum() + true_kl.sum(), exact)
        for grad, true, leaf in zip(grads, true_grads, leaves, strict=True):
            assert grad.dtype == leaf.dtype
            assert oracle.error(grad, true) < 2 * torch.finfo(leaf.dtype).eps + 2e-6


@pytest.mark.full_for(backend="triton")
@pytest.mark.parametrize("case", [c for c in CASES if c.name in ("odd", "bounds", "shared_prior", "no_kl")], ids=str)
def test_opcheck(backend, case, device):
    leaves, options = case.arguments(torch.bfloat16, device)
    mean, logvar = (leaves[n].reshape(-1, case.columns) for n in ("mean", "logvar"))
    prior = [leaves[n].reshape(-1, case.columns) for n in ("prior_mean", "prior_logvar") if n in leaves] or [None] * 2
    ids = options["row_ids"].reshape(-1) if case.row_ids else None
    inputs = Inputs(mean, logvar, *prior, ids, torch.tensor(3, device=device))
    mode = 0 if options.get("kl", "row") is None else 2
    flags = Options(case.samples or 1, True, mode, options.get("free_bits", 0.0), -2.0, 2.0)
    torch.library.opcheck(gaussian_fwd.raw, tuple(gaussian_fwd.inputs.pack((inputs, flags, True))))
    outputs = gaussian_fwd(inputs, flags, False)
    has_prior = inputs.prior_mean is not None
    grads = OutputGrads(outputs.z, outputs.kl if mode else None)
    arguments = (grads, inputs, flags, Wanted(True, True, has_prior, has_prior))
    torch.library.opcheck(gaussian_bwd.raw, tuple(gaussian_bwd.inputs.pack(arguments)))


@pytest.mark.full_for(backend="triton")
@pytest.mark.parametrize("columns", [33, 1500])
def test_bitwise_equal_for_any_number_of_threads(backend, columns, device):
    if backend == "triton" and device == "cpu":
        pytest.skip("the interpreter has one thread")
    rows = 70 if backend == "reference" else 700
    mean, logvar = parameters(device, rows, columns)
    prior = [torch.randn(columns, device=device, requires_grad=True) for _ in range(2)]
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, threads):
            torch.set_num_threads(count)
            (z, kl), stats = sk.gaussian_rsample(mean, logvar, prior=tuple(prior), seed=0, return_stats=True)
            results.append((z, kl, *stats, *torch.autograd.grad(z.sum() + kl.sum(), (mean, logvar, *prior))))
    finally:
        torch.set_num_threads(threads)
    assert all(equal(results[0], other) for other in results[1:])


def test_gradients_are_unbiased(backend, device):
    """d E[z^2] / d mean = 2 mean and / d logvar = sigma^2, over all elements within 6 standard errors."""
    rows = 20000 if backend in ("cpu", "cuda") else 500
    for location, logvar in ((0.7, -1.0), (-2.0, 0.5)):
        leaves = [torch.full((rows, 8), x, device=device, requires_grad=True) for x in (location, logvar)]
        z, _ = sk.gaussian_rsample(*leaves, 2, seed=11, kl=None)
        in_mean, in_logvar = (g.double() for g in torch.autograd.grad(z.square().sum() / 2, leaves))
        for grad, expected in ((in_mean, 2 * location), (in_logvar, math.exp(logvar))):
            error = grad.std() / math.sqrt(grad.numel())
            assert abs(grad.mean() - expected) < 6 * error


def test_module(backend, device):
    mean, logvar = parameters(device)
    prior = (torch.randn(7, device=device), torch.randn(7, device=device))
    options = {"kl": "mean", "free_bits": 0.2, "logvar_bounds": (-1.0, 1.0), "return_stats": True}
    latent = sk.nn.GaussianLatent(3, **options)
    for module in (latent, copy.deepcopy(latent), pickle.loads(pickle.dumps(latent)).eval()):
        got, stats = module(mean, logvar, prior=prior, seed=1)
        expected, true_stats = sk.gaussian_rsample(mean, logvar, 3, prior=prior, seed=1, **options)
        assert equal(got, expected)
        assert equal(stats, true_stats)
        (z, kl), stats = module(mean, logvar, prior=prior, sample=False)
        assert torch.equal(z, mean.unsqueeze(1).expand(6, 3, 7))
        assert torch.equal(kl, expected.kl)
        assert equal(stats, true_stats)
    z, kl = sk.nn.GaussianLatent(kl=None)(mean, logvar, sample=False)
    assert z is mean
    assert kl is None
    with pytest.raises(TypeError, match=r"^GaussianLatent: sample must be a bool; got int"):
        latent(mean, logvar, sample=1)
    assert "num_samples=3, kl='mean', free_bits=0.2" in repr(latent)


X = torch.randn(4, 3)
ERRORS = [
    (dict(mean=[1.0]), TypeError, r"mean must be a torch.Tensor; got list"),
    (dict(mean=X.long()), TypeError, r"mean must have dtype .*; got torch.int64"),
    (dict(mean=torch.tensor(1.0)), ValueError, r"mean must have shape \(..., D\); got \(\)"),
    (dict(logvar=X[:2]), ValueError, r"logvar must have shape mean.shape = \(4, 3\); got \(2, 3\)"),
    (dict(logvar=X.half()), TypeError, r"logvar must have the dtype of mean, torch.float32, outside autocast; got"),
    (dict(logvar=X.to("meta")), ValueError, r"logvar must be on the device of mean, cpu; got meta"),
    (dict(prior=X), TypeError, r"prior must be a pair of tensors, \(mean, logvar\), or None; got Tensor"),
    (dict(prior=(X, X, X)), TypeError, r"prior must be a pair of tensors.*; got 3 values"),
    (dict(prior=(X, 0.0)), TypeError, r"prior\[1\] must be a torch.Tensor; got float"),
    (dict(prior=(X[:3], X)), ValueError, r"prior\[0\] must have a shape that broadcasts to .*\(4, 3\); got \(3, 3\)"),
    (dict(prior=(X, X[None])), ValueError, r"prior\[1\] must have a shape that broadcasts .*; got \(1, 4, 3\)"),
    (dict(prior=(X, X.double())), TypeError, r"prior\[1\] must have the dtype of mean"),
    (dict(free_bits=-0.1), ValueError, r"free_bits must be in \[0, inf\]; got -0.1"),
    (dict(free_bits="1"), TypeError, r"free_bits must be a number; got str"),
    (dict(logvar_bounds=3.0), TypeError, r"logvar_bounds must be two numbers, \(low, high\), or None; got 3.0"),
    (dict(logvar_bounds=(2, 1)), ValueError, r"logvar_bounds must have low <= high; got \(2, 1\)"),
    (dict(logvar_bounds=(math.nan, 1)), ValueError, r"logvar_bounds must be in \[-inf, inf\]; got nan"),
    (dict(return_stats=1), TypeError, r"return_stats must be a bool; got int"),
]
SAMPLE_ERRORS = [
    (dict(num_samples=-1), ValueError, r"num_samples must be at least 0; got -1"),
    (dict(num_samples=2.0), TypeError, r"num_samples must be an int or None; got float"),
    (dict(kl="rows"), ValueError, r"kl must be 'none', 'row', 'sum', 'mean' or None; got 'rows'"),
    (dict(row_ids=torch.arange(3)), ValueError, r"row_ids must have shape mean.shape\[:-1\] = \(4,\); got \(3,\)"),
    (dict(row_ids=torch.arange(4).int()), TypeError, r"row_ids must have dtype torch.int64; got torch.int32"),
    (dict(row_ids=torch.arange(4).to("meta")), ValueError, r"row_ids must be on the device of mean, cpu; got meta"),
    (dict(seed=1.5), TypeError, r"seed must be an int, a 0-d int64 tensor or None; got float"),
    (dict(seed=0, generator=torch.Generator()), ValueError, r"generator must be None where seed is given; got both"),
]


@pytest.mark.parametrize(("change", "kind", "message"), ERRORS + SAMPLE_ERRORS)
def test_errors(change, kind, message):
    with pytest.raises(kind, match=r"^gaussian_rsample: " + message):
        sk.gaussian_rsample(**{"mean": X, "logvar": X, **change})


@pytest.mark.parametrize(("change", "kind", "message"), ERRORS)
def test_errors_of_the_divergence_alone(change, kind, message):
    with pytest.raises(kind, match=r"^gaussian_kl: " + message):
        sk.gaussian_kl(**{"mean": X, "logvar": X, **change})
    with pytest.raises(ValueError, match=r"^gaussian_kl: reduction must be 'none', 'row', 'sum' or 'mean'; got None"):
        sk.gaussian_kl(X, X, reduction=None)


def test_the_oracle_is_called_with_the_same_seed():
    leaves, options = CASES[0].arguments(torch.float64, "cpu")
    for a, b in zip(
        call(sk.gaussian_rsample, leaves, options), call(gaussian_oracle.gaussian_rsample, leaves, options), strict=True
    ):
        torch.testing.assert_close(a, b)
