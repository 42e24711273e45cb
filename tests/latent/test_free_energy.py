"""free_energy: values, gradients, layouts, compilation and error messages."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator

import energy_oracle
import oracle
import pytest
import torch
from cases import DTYPES, REPEATED_DTYPES, Case, Tensors, error_is_at_most_that_of_eager, shapes_without_data
from torch.utils.checkpoint import checkpoint

import sslkernels as sk
from sslkernels.latent import free_energy as module
from sslkernels.latent.free_energy import Options, free_energy_bwd, free_energy_fwd

pytestmark = pytest.mark.pairwise

OP = "free_energy"
MODES = ("soft", "min")
INF, NAN = math.inf, math.nan


def energies(*shape, device, dtype=torch.float64, spread=3.0, requires_grad=True):
    g = torch.Generator().manual_seed(1)
    values = (spread * torch.randn(shape, generator=g, dtype=torch.float64)).to(device, dtype)
    return values.requires_grad_(requires_grad)


def rows(values, device, dtype=torch.float32):
    return torch.tensor(values, dtype=torch.float64).to(device, dtype).requires_grad_()


def grad_of(value, energy, grad_output=None, **options):
    grad_output = torch.ones_like(value) if grad_output is None else grad_output
    return torch.autograd.grad(value, energy, grad_output, **options)[0]


def make(
    g: torch.Generator, rows: int, candidates: int, _: int, *, shape: tuple[int, ...] = (), spread: float = 1.0
) -> tuple[Tensors, Tensors]:
    return {"energy": spread * torch.randn(shape or (rows, candidates), generator=g)}, {}


def case(name: str, rows: int, candidates: int, *, options: dict, **tensors) -> Case:
    return Case(OP, name, make, (rows, candidates, 0), tensors, options)


def cases() -> Iterator[Case]:
    for mode in ("soft", "min"):
        yield case(f"{mode}_plain", 37, 53, options={"mode": mode})
        yield case(f"{mode}_few_candidates", 70, 5, spread=3.0, options={"mode": mode, "beta": 2.0})
        yield case(f"{mode}_one_candidate", 9, 1, options={"mode": mode})
        yield case(f"{mode}_many_candidates", 2, 2051, spread=2.0, options={"mode": mode})
        yield case(f"{mode}_first_dim", 53, 37, options={"mode": mode, "dim": 0})
        yield case(f"{mode}_middle_dim", 0, 0, shape=(3, 11, 2, 9), options={"mode": mode, "dim": 1})
        yield case(f"{mode}_one_row", 0, 0, shape=(77,), options={"mode": mode})
    yield case("soft_cold", 37, 53, spread=4.0, options={"beta": 30.0})


CASES = list(cases())
test_error_is_at_most_that_of_eager = pytest.mark.slow_for(name="triton", dtype=REPEATED_DTYPES)(
    error_is_at_most_that_of_eager(CASES, energy_oracle)
)
test_shapes_without_data = shapes_without_data(CASES)


LAYOUTS = {
    "last": (lambda x: x, -1),
    "first": (lambda x: x, 0),
    "middle": (lambda x: x, 1),
    "transposed": (lambda x: x.transpose(0, 2), -1),
    "permuted": (lambda x: x.permute(1, 2, 0), 1),
    "part_of_rows": (lambda x: x[..., 1:4], -1),
    "part_of_columns": (lambda x: x[:, 1:3], -1),
    "part_of_candidates": (lambda x: x[:, 1:3], 1),
    "every_second": (lambda x: x[..., ::2], 1),
    "every_second_candidate": (lambda x: x[..., ::2], -1),
    "expanded_rows": (lambda x: x[:1].expand(4, -1, -1), -1),
    "expanded_inner": (lambda x: x[..., :1].expand(-1, -1, 7), 1),
    "expanded_candidates": (lambda x: x[..., :1].expand(-1, -1, 7), -1),
    "ones": (lambda x: x[None, :, :, None, None].transpose(1, 2), 2),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("mode", MODES)
def test_strided_energies_are_not_copied(backend, mode, name, device):
    view, dim = LAYOUTS[name]
    base = energies(6, 4, 5, device=device)
    energy = view(base)
    columns, *_ = module._three_dimensional(energy, dim % energy.dim())
    assert columns.data_ptr() == energy.data_ptr(), "the energies were copied"
    value = sk.free_energy(energy, dim=dim, beta=0.7, mode=mode)
    truth = energy_oracle.free_energy(energy, dim=dim, beta=0.7, mode=mode)
    torch.testing.assert_close(value, truth)
    grad_output = torch.randn_like(truth)
    torch.testing.assert_close(grad_of(value, base, grad_output), grad_of(truth, base, grad_output))


def test_dimensions_that_do_not_merge_are_copied(backend, device):
    base = energies(3, 4, 5, 6, device=device)
    energy = base[:, 1:3, 1:4]
    value, truth = (f.free_energy(energy[..., 0::2], dim=-1) for f in (sk, energy_oracle))
    torch.testing.assert_close(value, truth)
    torch.testing.assert_close(grad_of(value, base), grad_of(truth, base))


@pytest.mark.parametrize(
    ("count", "dtype"), [*((33, dtype) for dtype in DTYPES), (1, torch.float32), (1500, torch.float32)]
)
@pytest.mark.parametrize("mode", MODES)
def test_a_small_beta_gives_the_mean_and_a_large_one_the_minimum(backend, mode, count, dtype, device):
    energy = energies(3, count, device=device, dtype=dtype)
    exact = energy.detach().double()
    for beta, limit in ((1e-37, exact.mean(1)), (1e-9, exact.mean(1)), (1e9, exact.amin(1)), (1e37, exact.amin(1))):
        value = sk.free_energy(energy, beta=beta, mode=mode)
        limit = exact.amin(1) if mode == "min" else limit
        if mode == "soft" and 1 < beta < 1e37:
            limit = limit + math.log(count) / beta
        torch.testing.assert_close(value.double(), limit, rtol=4e-7, atol=2e-6 if beta < 1 else 0)
        assert grad_of(value, energy).isfinite().all()


@pytest.mark.parametrize("shift", [0.0, 1e6, -1e6])
@pytest.mark.parametrize("spread", [1e-3, 1.0, 1e4])
def test_offsets_and_spreads(backend, spread, shift, device):
    """No digits are lost to a large common offset or a large spread."""
    energy = (shift + energies(5, 40, device=device, spread=spread, requires_grad=False)).float().requires_grad_()
    for beta in (1e-3, 1.0):
        value = sk.free_energy(energy, beta=beta)
        leaf = energy.detach().double().requires_grad_()
        truth = energy_oracle.free_energy(leaf, beta=beta)
        error = (value.double() - truth).abs() / leaf.abs().amax(1)
        assert error.max() <= 4e-7
        true_grad = grad_of(truth, leaf)
        assert oracle.error(grad_of(value, energy), true_grad) <= 4e-7 * (1 + beta * spread)


def test_importance_weighted_bound(backend, device):
    """-log mean exp(log_weight), with weights whose exponentials overflow."""
    log_weight = rows([[-1000.0, -1001.0, -1003.5], [800.0, 801.0, 790.0]], device)
    value = sk.free_energy(-log_weight)
    expected = -(torch.logsumexp(log_weight, 1) - math.log(3))
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(grad_of(value, log_weight), -torch.softmax(log_weight, 1))


def test_equal_energies_are_their_own_free_energy(backend, device):
    energy = torch.full((4, 7), 3.25, device=device)
    for beta, mode in itertools.product((1e-9, 1.0, 1e9), MODES):
        assert torch.equal(sk.free_energy(energy, beta=beta, mode=mode), energy[:, 0])


SPECIAL = [
    [INF, 1.0, 2.0, INF],
    [INF, INF, INF, INF],
    [1.0, NAN, 2.0, INF],
    [NAN, NAN, 1.0, 0.0],
    [-INF, 1.0, INF, -INF],
    [0.5, 0.25, 0.25, 0.25],
    [0.0, -0.0, 0.0, 1.0],
    [INF, 3.0, INF, INF],
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [0, 1])
def test_infinite_and_nan_energies_agree_with_torch(backend, dim, dtype, device):
    """The gradient of a row that is all infinite is NaN; other rows are unaffected."""
    energy = rows(SPECIAL, device, dtype) if dim == 1 else rows(SPECIAL, device, dtype).detach().t().requires_grad_()
    exact = energy.detach().double().requires_grad_()
    value, truth = sk.free_energy(energy, dim=dim), math.log(4) - torch.logsumexp(-exact, dim)
    torch.testing.assert_close(value.double(), truth, equal_nan=True, rtol=1e-6, atol=1e-6)
    limit = max(torch.finfo(dtype).eps, 1e-6)
    torch.testing.assert_close(
        grad_of(value, energy).double(), grad_of(truth, exact), equal_nan=True, rtol=limit, atol=1e-6
    )
    value, truth = sk.free_energy(energy, dim=dim, mode="min"), exact.min(dim).values
    assert torch.equal(value.double().nan_to_num(7, 8, 9), truth.nan_to_num(7, 8, 9))
    assert torch.equal(grad_of(value, energy).double(), grad_of(truth, exact))


@pytest.mark.parametrize("count", [4, 33, 3000])
def test_ties_go_to_the_first_candidate(backend, count, device):
    for first in {0, count // 2, count - 2}:
        energy = torch.ones(2, count, device=device)
        energy[:, first:] = 0.0
        energy.requires_grad_()
        grad = grad_of(sk.free_energy(energy, mode="min"), energy, torch.tensor([2.0, -3.0], device=device))
        expected = torch.zeros_like(energy)
        expected[:, first] = torch.tensor([2.0, -3.0], device=device)
        assert torch.equal(grad, expected)


@pytest.mark.parametrize("mode", MODES)
def test_grad_output_of_every_kind(backend, mode, device):
    energy = energies(8, 5, device=device)
    value = sk.free_energy(energy, mode=mode)
    ones = grad_of(value, energy, retain_graph=True)
    assert torch.equal(grad_of(value.sum(), energy, retain_graph=True), ones)
    strided = torch.ones(16, dtype=value.dtype, device=device)[::2]
    assert torch.equal(grad_of(value, energy, strided, retain_graph=True), ones)
    kept = ones.clone()
    ones.mul_(7)
    assert torch.equal(grad_of(value, energy, retain_graph=True), kept)
    truth = energy_oracle.free_energy(energy, mode=mode)
    torch.testing.assert_close(grad_of(value.square().sum(), energy), grad_of(truth.square().sum(), energy))
    with pytest.raises(RuntimeError, match="second time"):
        value.sum().backward()


@pytest.mark.full_for(backend="triton")
def test_double_backward_raises(backend, device):
    energy = energies(8, 5, device=device)
    grad = grad_of(sk.free_energy(energy), energy, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"free_energy: double backward is not supported"):
        (grad.square().sum() + energy.square().sum()).backward()


@pytest.mark.full_for(backend="triton")
def test_double_backward_of_the_minimum(backend, device):
    """The gradient depends on the winner alone, so its derivative in the energies is 0; in grad_output it raises."""
    energy = energies(8, 5, device=device)
    grad = grad_of(sk.free_energy(energy, mode="min"), energy, create_graph=True)
    (grad.square().sum() + energy.square().sum()).backward()
    torch.testing.assert_close(energy.grad, 2 * energy.detach())
    grad = grad_of(sk.free_energy(energy, mode="min").square().sum(), energy, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"free_energy: double backward is not supported"):
        grad.sum().backward()


def test_gradcheck(backend, device):
    if backend == "triton":
        pytest.skip("the numerical Jacobian runs the interpreter hundreds of times; test_backends covers its gradients")
    energy = energies(3, 4, 2, device=device)
    for dim in (0, 1, 2):
        assert torch.autograd.gradcheck(lambda e, d=dim: sk.free_energy(e, beta=0.8, dim=d), energy)


def test_saved_tensors(backend, device):
    """The hard minimum saves one index a row and no energies; without a gradient no state is computed."""
    energy = energies(6, 5, device=device, dtype=torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        sk.free_energy(energy, mode="min")
        assert [t.dtype for t in kept if t.numel()] == [torch.int64]
        kept.clear()
        sk.free_energy(energy)
        assert sum(t.numel() for t in kept) == energy.numel() + 2 * 6
    for minimum in (False, True):
        outputs = free_energy_fwd(energy.detach().unsqueeze(2), Options(1.0, minimum), False)
        assert [part.numel() for part in outputs.state] == [0, 0, 0]
    with torch.no_grad():
        assert not sk.free_energy(energy).requires_grad
    assert not sk.free_energy(energy.detach()).requires_grad


@pytest.mark.parametrize("mode", MODES)
def test_shapes(backend, mode, device):
    for shape, dim, expected in (
        ((5,), 0, ()),
        ((1,), -1, ()),
        ((0, 3), 1, (0,)),
        ((3, 0, 2), 0, (0, 2)),
        ((2, 3, 4, 5), 2, (2, 3, 5)),
        ((2, 3, 4, 5), -4, (3, 4, 5)),
        ((1, 1, 1), 1, (1, 1)),
    ):
        energy = energies(*shape, device=device, dtype=torch.float32)
        value = sk.free_energy(energy, dim=dim, mode=mode)
        assert value.shape == expected
        assert value.dtype == torch.float32
        assert grad_of(value, energy).shape == shape


def test_half_precision_gradient_rounds_once(backend, device):
    """grad_output is below the smallest float16 until the loss scale multiplies it."""
    results = 100 if backend == "triton" and device == "cpu" else 65536
    energy = energies(results, 4, device=device, dtype=torch.float16)
    grad = grad_of(sk.free_energy(energy).mean() * 65536.0, energy)
    exact = energy.detach().double().requires_grad_()
    true = grad_of(energy_oracle.free_energy(exact).mean() * 65536.0, exact)
    assert grad.dtype == torch.float16
    assert oracle.error(grad, true) < torch.finfo(torch.float16).eps


@pytest.mark.full_for(backend="triton")
@pytest.mark.parametrize("shape", [(50, 7), (3, 5000), (30, 40, 50)], ids=str)
def test_bitwise_equal_from_run_to_run(backend, shape, device):
    if backend == "triton" and device == "cpu":
        shape = tuple(min(size, 12) for size in shape)
    energy = energies(*shape, device=device, dtype=torch.float32)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3, threads):
            torch.set_num_threads(count)
            value = sk.free_energy(energy, dim=1)
            found.append((value, grad_of(value, energy)))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.full_for(dynamic=False)
@pytest.mark.costly("the compiler")
@pytest.mark.slow_for(backend=("triton", "reference"))
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_equals_eager(backend, dynamic, device, compiler):
    torch._dynamo.reset()

    def step(x, y):
        return 3 * sk.free_energy(2 * x, beta=0.5) + sk.free_energy(y.transpose(0, 1), dim=0, mode="min")

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend=compiler)
    for count in (7, 5):
        x = energies(11, count, device=device, dtype=torch.float32)
        y = energies(11, count + 1, device=device, dtype=torch.float32)
        got, expected = compiled(x, y), step(x, y)
        torch.testing.assert_close(got, expected)
        grad_output = torch.randn_like(got)
        for a, b in zip(
            torch.autograd.grad(got, (x, y), grad_output),
            torch.autograd.grad(expected, (x, y), grad_output),
            strict=True,
        ):
            torch.testing.assert_close(a, b)


@pytest.mark.full_for(backend="triton")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(backend, use_reentrant, device):
    energy = energies(6, 5, device=device)
    head = lambda e: sk.free_energy(e.tanh(), beta=3.0)  # noqa: E731
    expected = grad_of(head(energy), energy)
    checkpoint(head, energy, use_reentrant=use_reentrant).sum().backward()
    torch.testing.assert_close(energy.grad, expected)


@pytest.mark.parametrize("mode", MODES)
def test_functional_transforms(mode, device):
    energy = energies(6, 5, 4, device=device, requires_grad=False)
    for dim in (0, 1):
        ours, truth = (lambda e, f=f, d=dim: f.free_energy(e, dim=d, mode=mode).sum() for f in (sk, energy_oracle))
        torch.testing.assert_close(torch.func.grad(ours)(energy), torch.func.grad(truth)(energy))
        batched = torch.func.vmap(torch.func.grad(ours))(energy)
        torch.testing.assert_close(batched, torch.func.vmap(torch.func.grad(truth))(energy))


def test_autocast_keeps_float32(device):
    energy = energies(6, 5, device=device, dtype=torch.float32)
    with torch.autocast(device, torch.bfloat16):
        assert torch.equal(sk.free_energy(energy), sk.free_energy(energy.detach()))
        half = sk.free_energy(energy.bfloat16())
    assert half.dtype == torch.float32


@pytest.mark.full_for(backend="triton")
@pytest.mark.parametrize("minimum", [False, True])
def test_opcheck(backend, minimum, device):
    energy = energies(3, 5, 2, device=device, dtype=torch.float16, requires_grad=False)
    options = Options(0.5, minimum)
    for keep_state in (False, True):
        torch.library.opcheck(free_energy_fwd.raw, tuple(free_energy_fwd.inputs.pack((energy, options, keep_state))))
    found = free_energy_fwd(energy, options, True)
    arguments = (found.value, None if minimum else energy, found.state, options, 5, torch.float16)
    torch.library.opcheck(free_energy_bwd.raw, tuple(free_energy_bwd.inputs.pack(arguments)))
    assert free_energy_bwd(*arguments).shape == energy.shape


def test_module(backend, device):
    energy = energies(6, 5, device=device)
    layer = sk.nn.FreeEnergy(2.0, 0, "min")
    assert torch.equal(layer(energy), sk.free_energy(energy, beta=2.0, dim=0, mode="min"))
    assert repr(layer) == "FreeEnergy(beta=2.0, dim=0, mode='min')"
    assert torch.equal(sk.nn.FreeEnergy()(energy), sk.free_energy(energy))


ERRORS = [
    (dict(energy=[1.0]), TypeError, "energy must be a torch.Tensor; got list"),
    (dict(energy=torch.ones(3).long()), TypeError, "energy must have dtype .*; got torch.int64"),
    (dict(energy=torch.tensor(1.0)), ValueError, r"energy must have shape \(..., K, ...\); got \(\)"),
    (dict(energy=torch.ones(3, 0)), ValueError, r"energy must have at least one element along dim 1; got \(3, 0\)"),
    (dict(beta=0.0), ValueError, r"beta must be in \[1e-37, 1e\+37\]; got 0.0"),
    (dict(beta=-1.0), ValueError, r"beta must be in .*; got -1.0"),
    (dict(beta=INF), ValueError, r"beta must be in .*; got inf"),
    (dict(beta=NAN), ValueError, r"beta must be in .*; got nan"),
    (dict(beta="1"), TypeError, "beta must be a number; got str"),
    (dict(beta=torch.ones(())), TypeError, "beta must be a number; got Tensor"),
    (dict(dim=2), ValueError, r"dim must be in \[-2, 1\]; got 2"),
    (dict(dim=-3), ValueError, r"dim must be in \[-2, 1\]; got -3"),
    (dict(dim=0.0), TypeError, "dim must be an int; got float"),
    (dict(mode="hard"), ValueError, "mode must be 'soft' or 'min'; got 'hard'"),
]


@pytest.mark.parametrize(
    ("change", "kind", "message"), ERRORS, ids=lambda v: next(iter(v)) if isinstance(v, dict) else ""
)
def test_errors(change, kind, message):
    with pytest.raises(kind, match=r"^free_energy: " + message):
        sk.free_energy(**{"energy": torch.ones(3, 4), **change})


def test_options_are_keyword_only():
    with pytest.raises(TypeError, match=re.escape("free_energy() takes 1 positional argument")):
        sk.free_energy(torch.ones(3), 1.0)


@pytest.mark.parametrize("mode", ["soft", "min"])
def test_vmap_inside_an_outer_gradient(backend, mode, device):
    x = torch.randn(4, 3, 5, device=device)

    def total(call):
        return lambda x: torch.func.vmap(call)(x).square().sum()

    got = torch.func.grad(total(lambda row: sk.free_energy(row, beta=2.0, mode=mode)))(x)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(sk.free_energy(leaf, beta=2.0, mode=mode).square().sum(), leaf)
    torch.testing.assert_close(got, expected)
