"""prediction_energy: values, gradients, layouts, memory, compilation and error messages."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from collections.abc import Iterator

import energy_oracle
import oracle
import pytest
import torch
from cases import REPEATED_DTYPES, Case, Tensors, error_is_at_most_that_of_eager, shapes_without_data
from energy_oracle import NAMES, exact, gradients, problem
from torch.utils.checkpoint import checkpoint

import sslkernels as sk
from benchmarks import memory
from sslkernels.core import native
from sslkernels.latent import prediction_energy as module
from sslkernels.latent.prediction_energy import (
    Inputs,
    Kept,
    Reduction,
    Wanted,
    prediction_energy_bwd,
    prediction_energy_fwd,
)

pytestmark = pytest.mark.pairwise

OP = "prediction_energy"
MODES = ("soft", "min")
INF, NAN = math.inf, math.nan


def make(
    g: torch.Generator, rows: int, count: int, dim: int, *, features: tuple[int, ...] = ()
) -> tuple[Tensors, Tensors]:
    features = features or (dim,)
    prediction = torch.randn(rows, count, *features, generator=g)
    return {"prediction": prediction, "target": torch.randn(rows, *features, generator=g)}, {}


def case(name: str, rows: int, count: int, dim: int = 0, *, options: dict, **tensors) -> Case:
    return Case(OP, name, make, (rows, count, dim), tensors, options)


def cases() -> Iterator[Case]:
    for mode in ("soft", "min"):
        cold = {"mode": mode, "beta": 0.1}
        yield case(f"{mode}_plain", 37, 8, 32, options=cold)
        yield case(f"{mode}_odd", 13, 5, 77, options=cold)
        yield case(f"{mode}_one_feature", 40, 3, 1, options={"mode": mode})
        yield case(f"{mode}_one_prediction", 11, 1, 24, options=cold)
        yield case(f"{mode}_one_row", 1, 7, 16, options=cold)
        yield case(f"{mode}_many_predictions", 3, 300, 6, options=cold)
        yield case(f"{mode}_many_features", 2, 3, features=(3, 41, 50), options={"mode": mode, "beta": 1e-3})
        yield case(f"{mode}_sum", 21, 4, 16, options={**cold, "reduction": "sum"})
        yield case(f"{mode}_none", 21, 4, 16, options={**cold, "reduction": "none"})


CASES = list(cases())
test_error_is_at_most_that_of_eager = pytest.mark.slow_for(name="triton", dtype=REPEATED_DTYPES)(
    error_is_at_most_that_of_eager(CASES, energy_oracle)
)
test_shapes_without_data = shapes_without_data(CASES)


@pytest.mark.full_for(backend="triton")
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("mode", MODES)
def test_every_subset_of_inputs_gets_the_same_gradients(backend, mode, reduction, device):
    options = {"mode": mode, "reduction": reduction, "beta": 0.3}
    inputs = problem(device)
    loss = sk.prediction_energy(**inputs, **options)
    grad_output = torch.randn_like(loss)
    full = dict(zip(NAMES, gradients(loss, inputs, grad_outputs=grad_output), strict=True))
    for name in NAMES:
        inputs = problem(device, requires_grad=(name,))
        sk.prediction_energy(**inputs, **options).backward(grad_output)
        for other, tensor in inputs.items():
            assert tensor.grad is None if other != name else torch.equal(tensor.grad, full[name])
    assert not sk.prediction_energy(**problem(device, requires_grad=()), **options).requires_grad


def test_only_wanted_results_are_computed_and_saved(monkeypatch, device):
    """Saved for backward: the inputs and B x K weights."""
    asked = []
    outputs, grads = module.empty_outputs, module._empty_gradients
    monkeypatch.setattr(module, "empty_outputs", lambda *a: asked.append(tuple(a[-1])) or outputs(*a))
    monkeypatch.setattr(module, "_empty_gradients", lambda *a: asked.append(a[-1]) or grads(*a))
    for name, expected in (("prediction", (True, False)), ("target", (False, True))):
        asked.clear()
        inputs = problem(device, requires_grad=(name,))
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            loss = sk.prediction_energy(**inputs)
        loss.backward()
        assert asked == [(True, False), expected]
        own = [t for t in kept if t.numel() > 1 and t.data_ptr() not in {x.data_ptr() for x in inputs.values()}]
        assert [tuple(t.shape) for t in own] == [(5, 4)]
    asked.clear()
    with torch.no_grad():
        sk.prediction_energy(**inputs)
    assert asked == [(False, False)]


@pytest.mark.parametrize("features", [(), (1,), (16,), (3, 5, 2)], ids=str)
def test_the_minimum_takes_the_gradient_of_the_winner(backend, features, device):
    inputs = problem(device, features=features, dtype=torch.float32)
    rows = sk.prediction_energy(**inputs, reduction="none")
    grad, grad_target = gradients(rows.sum(), inputs)
    difference = inputs["prediction"] - inputs["target"].unsqueeze(1)
    energies = difference.square().flatten(2).sum(2) if features else difference.square()
    winner = energies.argmin(1)
    index = torch.arange(5, device=device)
    torch.testing.assert_close(rows, energies.amin(1))
    torch.testing.assert_close(grad[index, winner], 2 * difference[index, winner])
    torch.testing.assert_close(grad_target, -2 * difference[index, winner])
    others = torch.ones(5, 4, dtype=torch.bool, device=device)
    others[index, winner] = False
    assert not grad[others].any()
    assert not grad[others].signbit().any()
    zero = gradients(0 * sk.prediction_energy(**inputs), inputs)
    assert not any(part.any() or part.signbit().any() for part in zero)


def test_ties_go_to_the_first_prediction(backend, device):
    inputs = problem(device, count=6)
    with torch.no_grad():
        inputs["prediction"][:, 2:] = inputs["target"].unsqueeze(1) + 0.125
        inputs["prediction"][:, :2] = inputs["target"].unsqueeze(1) + 1
    grad, _ = gradients(sk.prediction_energy(**inputs), inputs)
    assert grad.flatten(2).any(2).tolist() == [[False, False, True, False, False, False]] * 5


@pytest.mark.parametrize("mode", MODES)
def test_grad_output_of_every_kind(backend, mode, device):
    inputs = problem(device)
    rows = sk.prediction_energy(**inputs, mode=mode, reduction="none")
    expanded = gradients(rows.sum(), inputs, retain_graph=True)
    dense = gradients(rows, inputs, grad_outputs=torch.ones_like(rows), retain_graph=True)
    strided = gradients(
        rows, inputs, grad_outputs=torch.ones(10, dtype=rows.dtype, device=device)[::2], retain_graph=True
    )
    for a, b, c in zip(expanded, dense, strided, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    kept = [grad.clone() for grad in expanded]
    for grad in expanded:
        grad.mul_(7)
    assert all(torch.equal(a, b) for a, b in zip(kept, gradients(rows.sum(), inputs), strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        rows.sum().backward()
    loss, truth = (f.prediction_energy(**inputs, mode=mode) for f in (sk, energy_oracle))
    for a, b in zip(gradients(loss.square(), inputs), gradients(truth.square(), inputs), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.full_for(backend="triton")
@pytest.mark.parametrize("mode", MODES)
def test_double_backward_raises(backend, mode, device):
    inputs = problem(device)
    for name, other in (NAMES, NAMES[::-1]):
        loss = sk.prediction_energy(**inputs, mode=mode)
        (grad,) = torch.autograd.grad(loss, inputs[name], create_graph=True)
        with pytest.raises(NotImplementedError, match=r"prediction_energy: double backward is not supported"):
            (grad.square().sum() + inputs[other].square().sum()).backward()


@pytest.mark.parametrize("mode", MODES)
def test_gradcheck(backend, mode, device):
    if backend == "triton":
        pytest.skip("the numerical Jacobian runs the interpreter hundreds of times; test_backends covers its gradients")
    inputs = problem(device, batch=3, count=2, features=(3,))
    function = lambda p, y: sk.prediction_energy(p, y, beta=0.5, mode=mode, reduction="none")  # noqa: E731
    assert torch.autograd.gradcheck(function, tuple(inputs.values()))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_rows(backend, reduction, device):
    inputs = problem(device, batch=0, dtype=torch.float32)
    loss = sk.prediction_energy(**inputs, reduction=reduction)
    assert loss.shape == ((0,) if reduction == "none" else ())
    assert reduction != "mean" or loss.isnan()
    if reduction == "mean":
        assert sk.prediction_energy(**inputs, on_empty="zero") == 0
    for grad, tensor in zip(gradients(loss.sum(), inputs), inputs.values(), strict=True):
        assert grad.shape == tensor.shape


@pytest.mark.parametrize("mode", MODES)
def test_no_features(backend, mode, device):
    inputs = problem(device, features=(3, 0), dtype=torch.float32)
    loss = sk.prediction_energy(**inputs, mode=mode, reduction="none")
    assert torch.equal(loss, torch.zeros(5, device=device))
    assert [grad.shape for grad in gradients(loss.sum(), inputs)] == [(5, 4, 3, 0), (5, 3, 0)]


LAYOUTS = {
    "samples_first": lambda p, y: (p.transpose(0, 1).contiguous().transpose(0, 1), y),
    "padded": lambda p, y: (torch.nn.functional.pad(p, (0, 3))[..., :6], torch.nn.functional.pad(y, (0, 1))[..., :6]),
    "every_second_row": lambda p, y: (p.repeat_interleave(2, 0)[::2], y.repeat_interleave(2, 0)[::2]),
    "some_samples": lambda p, y: (torch.cat([p, p], 1)[:, :4], y),
    "strided_features": lambda p, y: (p.repeat_interleave(2, -1)[..., ::2], y.repeat_interleave(2, -1)[..., ::2]),
    "permuted_features": lambda p, y: (p.permute(0, 1, 3, 2), y.permute(0, 2, 1)),
    "one_target": lambda p, y: (p, y[:1].expand(5, -1, -1)),
    "one_prediction": lambda p, y: (p[:, :1].expand(-1, 4, -1, -1), y),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("mode", MODES)
def test_layouts(backend, mode, name, device):
    inputs = problem(device, features=(3, 6))
    views = LAYOUTS[name](*inputs.values())
    loss, truth = (f.prediction_energy(*views, beta=0.2, mode=mode, reduction="none") for f in (sk, energy_oracle))
    torch.testing.assert_close(loss, truth)
    for got, true in zip(gradients(loss.square().sum(), inputs), gradients(truth.square().sum(), inputs), strict=True):
        torch.testing.assert_close(got, true)


def test_samples_first_predictions_are_not_copied(backend, device):
    """Their gradient has the same strides."""
    base = torch.randn(4, 5, 8, device=device, requires_grad=True)
    prediction = base.transpose(0, 1)
    strides, kept = [], []
    prediction.register_hook(lambda grad: strides.append(grad.stride()))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        loss = sk.prediction_energy(prediction, torch.randn(5, 8, device=device))
    assert any(t.data_ptr() == base.data_ptr() and t.shape == (5, 4, 8) for t in kept)
    loss.backward()
    assert strides == [prediction.stride()]


def special(device, dtype):
    """Rows with one infinite prediction, one that overflows, NaN, all infinite, and a plain one."""
    inputs = problem(device, batch=5, count=3, features=(4,), dtype=dtype)
    with torch.no_grad():
        inputs["prediction"][0, 1, 2] = INF
        inputs["prediction"][1, 0] = torch.finfo(dtype).max
        inputs["prediction"][2, 2, 0] = NAN
        inputs["prediction"][3, :, 1] = -INF
    return inputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_infinite_predictions_have_no_weight_and_nan_stays_in_its_row(backend, dtype, device):
    inputs = special(device, dtype)
    rows = sk.prediction_energy(**inputs, mode="soft", beta=0.1, reduction="none")
    assert rows.isfinite().tolist() == [True, True, False, False, True]
    assert rows[2].isnan()
    assert rows[3] == INF
    grad, grad_target = gradients(rows.sum(), inputs)
    leaves = exact(inputs)
    for row, counted in ((0, [0, 2]), (1, [1, 2]), (4, [0, 1, 2])):
        part = leaves["prediction"][row : row + 1, counted], leaves["target"][row : row + 1]
        truth = energy_oracle.prediction_energy(*part, mode="soft", beta=0.1) + math.log(3 / len(counted)) / 0.1
        torch.testing.assert_close(rows[row].double(), truth, rtol=1e-5, atol=1e-5)
        true_grads = torch.autograd.grad(truth, tuple(leaves.values()))
        limit = torch.finfo(dtype).eps * 2 + 1e-5
        torch.testing.assert_close(grad[row].double(), true_grads[0][row], rtol=limit, atol=limit)
        torch.testing.assert_close(grad_target[row].double(), true_grads[1][row], rtol=limit, atol=limit)
    assert grad[2].isnan().all()
    assert grad[3].isnan().all()


def test_the_minimum_of_special_rows(backend, device):
    inputs = special(device, torch.float32)
    rows = sk.prediction_energy(**inputs, reduction="none")
    assert rows[2].isnan()
    assert rows[3] == INF
    grad, _ = gradients(rows.sum(), inputs)
    winners = grad.flatten(2).ne(0).any(2)
    assert winners.sum(1).tolist() == [1, 1, 1, 1, 1]
    assert not winners[0, 1]
    assert not winners[1, 0]
    assert winners[2, 2]
    assert winners[3, 0]


def test_large_common_offset(backend, device):
    """The soft minimum loses no digits of energies near 1e6 that differ by little."""
    inputs = problem(device, batch=4, count=8, features=(16,), dtype=torch.float32)
    with torch.no_grad():
        inputs["prediction"].mul_(1e-3).add_(250)
        inputs["target"].zero_()
    leaves = exact(inputs)
    loss = sk.prediction_energy(**inputs, mode="soft", beta=0.1)
    truth = energy_oracle.prediction_energy(**leaves, mode="soft", beta=0.1)
    torch.testing.assert_close(loss.double(), truth, rtol=4e-7, atol=0)
    for got, true in zip(gradients(loss, inputs), gradients(truth, leaves), strict=True):
        assert oracle.error(got, true) < 0.1 * 1e6 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("features", [3, 5000])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_squared_and_summed_in_float32(backend, dtype, features, device):
    """Squares of differences of 200, and their sums, overflow float16."""
    inputs = problem(device, batch=2, count=3, features=(features,), dtype=dtype)
    with torch.no_grad():
        inputs["prediction"].mul_(200)
    leaves = exact(inputs)
    for mode in MODES:
        loss, truth = sk.prediction_energy(**inputs, mode=mode), energy_oracle.prediction_energy(**leaves, mode=mode)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss.double(), truth, rtol=1e-6, atol=0)
        for got, true in zip(gradients(loss, inputs), gradients(truth, leaves), strict=True):
            assert got.dtype == dtype
            assert oracle.error(got, true) < torch.finfo(dtype).eps


@pytest.mark.full_for(backend=("triton", "reference"))
@pytest.mark.parametrize("mode", MODES)
def test_half_precision_mean_over_many_rows(backend, mode, device):
    """1/B is below the smallest float16, and so is a row's gradient until the loss scale multiplies it."""
    if backend == "triton" and device == "cpu":
        pytest.skip("the interpreter takes minutes for 65536 rows")
    inputs = problem(device, batch=65536, count=3, features=(4,), dtype=torch.float16)
    leaves = exact(inputs)
    loss, truth = (f.prediction_energy(**x, mode=mode) for f, x in ((sk, inputs), (energy_oracle, leaves)))
    for got, true in zip(gradients(loss * 65536.0, inputs), gradients(truth * 65536.0, leaves), strict=True):
        assert oracle.error(got, true) < torch.finfo(torch.float16).eps


@pytest.mark.full_for(backend="triton")
@pytest.mark.parametrize("shape", [(300, 8, 16), (2, 3, 30000), (1, 2000, 8)], ids=str)
def test_bitwise_equal_from_run_to_run(backend, shape, device):
    if backend == "triton" and device == "cpu":
        shape = tuple(min(size, 12) for size in shape)
    inputs = problem(device, batch=shape[0], count=shape[1], features=shape[2:], dtype=torch.float32)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3, threads):
            torch.set_num_threads(count)
            rows = sk.prediction_energy(**inputs, mode="soft", beta=0.1, reduction="none")
            found.append((rows, *gradients(rows.sum(), inputs)))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("mode", MODES)
def test_memory(backend, mode, device):
    """No (B, K, D) tensor (64 MiB here) and no K copies of the target are materialised beyond the gradients."""
    if backend in ("reference", "triton"):
        pytest.skip("the reference materialises the differences; the interpreter copies tensors")
    inputs = problem(device, batch=256, count=16, features=(4096,), dtype=torch.float32)
    run = lambda: gradients(sk.prediction_energy(**inputs, mode=mode), inputs)  # noqa: E731
    run()
    peak, grads = memory.peak_extra(run, torch.device(device))
    if peak is None:
        pytest.skip("this system has no resettable peak resident set")
    assert peak - sum(grad.nbytes for grad in grads) < 8 << 20


@pytest.mark.full_for(dynamic=False)
@pytest.mark.costly("the compiler")
@pytest.mark.slow_for(backend=("triton", "reference"))
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_equals_eager(backend, dynamic, device, compiler):
    torch._dynamo.reset()

    def step(p, y):
        soft = sk.prediction_energy(2 * p, y, beta=0.1, mode="soft")
        return 3 * soft + sk.prediction_energy(p.transpose(0, 1).contiguous().transpose(0, 1), y, reduction="sum")

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend=compiler)
    for size in (5, 6):
        inputs = problem(device, batch=size, count=size + 1, features=(size, 4), dtype=torch.float32)
        got, expected = compiled(*inputs.values()), step(*inputs.values())
        torch.testing.assert_close(got, expected)
        for a, b in zip(gradients(got, inputs), gradients(expected, inputs), strict=True):
            torch.testing.assert_close(a, b)


def test_compile_with_one_tensor_for_both(compiler):
    torch._dynamo.reset()
    rows = torch.randn(5, 4, requires_grad=True)
    loss = lambda x: sk.prediction_energy(x.unsqueeze(1), x)  # noqa: E731
    got = torch.compile(loss, fullgraph=True, backend=compiler)(rows)
    assert got == 0
    assert not torch.autograd.grad(got, rows)[0].any()


@pytest.mark.full_for(backend="triton")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(backend, use_reentrant, device):
    inputs = problem(device)
    head = lambda p, y: sk.prediction_energy(p.tanh(), y, mode="soft")  # noqa: E731
    expected = gradients(head(*inputs.values()), inputs)
    checkpoint(head, *inputs.values(), use_reentrant=use_reentrant).backward()
    for tensor, true in zip(inputs.values(), expected, strict=True):
        torch.testing.assert_close(tensor.grad, true)


@pytest.mark.parametrize("mode", MODES)
def test_functional_transforms(mode, device):
    inputs = tuple(problem(device, requires_grad=()).values())
    ours, truth = (lambda p, y, f=f: f.prediction_energy(p, y, mode=mode, beta=0.2) for f in (sk, energy_oracle))
    for argnums in (0, 1, (0, 1)):
        torch.testing.assert_close(
            torch.func.grad(ours, argnums=argnums)(*inputs), torch.func.grad(truth, argnums=argnums)(*inputs)
        )
    batched = tuple(torch.stack([x, 2 * x, x - 1]) for x in inputs)
    torch.testing.assert_close(
        torch.func.vmap(torch.func.grad(ours, argnums=(0, 1)))(*batched),
        torch.func.vmap(torch.func.grad(truth, argnums=(0, 1)))(*batched),
    )


def test_autocast_takes_mixed_dtypes(device):
    inputs = problem(device, dtype=torch.float32)
    mixed = {**inputs, "prediction": inputs["prediction"].detach().bfloat16().requires_grad_()}
    with torch.autocast(device, torch.bfloat16):
        loss = sk.prediction_energy(**mixed)
        plain = sk.prediction_energy(**inputs)
    assert torch.equal(plain, sk.prediction_energy(**inputs))
    leaves = exact(mixed)
    truth = energy_oracle.prediction_energy(**leaves)
    torch.testing.assert_close(loss.double(), truth)
    for got, true, tensor in zip(gradients(loss, mixed), gradients(truth, leaves), mixed.values(), strict=True):
        assert got.dtype == tensor.dtype
        assert oracle.error(got, true) < 2 * torch.finfo(tensor.dtype).eps


@pytest.mark.full_for(backend="reference")
@pytest.mark.full_for(backend="triton")
@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=2)))
def test_opcheck(backend, wanted, device):
    inputs = problem(device, requires_grad=(), dtype=torch.float16)
    tensors = Inputs(**inputs)
    mask = torch.arange(4, device=device).expand(5, 4) < 3
    for mode, given in itertools.product(range(3), (None, mask)):
        arguments = (tensors, given, Reduction(0.5, mode), Kept(*wanted))
        torch.library.opcheck(prediction_energy_fwd.raw, tuple(prediction_energy_fwd.inputs.pack(arguments)))
    value, weights, _, _ = prediction_energy_fwd(tensors, None, Reduction(0.5, 0), Kept(True, False))
    arguments = (value, tensors, weights, Wanted(*wanted))
    torch.library.opcheck(prediction_energy_bwd.raw, tuple(prediction_energy_bwd.inputs.pack(arguments)))
    for grad, want, tensor in zip(prediction_energy_bwd(*arguments), wanted, tensors, strict=True):
        assert (grad.shape == tensor.shape) == want


@pytest.mark.full
@pytest.mark.parametrize("isa", ["default", "avx2"])
def test_every_compiled_instruction_set_agrees(isa):
    """The other tests run the best instruction set."""
    if native.extension is None:
        pytest.skip("no compiled extension")
    code = (
        "import torch, sslkernels as sk; torch.manual_seed(0)\n"
        "from sslkernels.core import native\n"
        "p, y = torch.randn(70, 5, 77, requires_grad=True), torch.randn(70, 77)\n"
        "e = torch.randn(3, 1500, 2, requires_grad=True)\n"
        "for d in (torch.float32, torch.bfloat16, torch.float16, torch.float64):\n"
        "  for mode in ('soft', 'min'):\n"
        "    for f, x in ((lambda x: sk.prediction_energy(x, y.to(x), mode=mode, beta=.1, reduction='none'), p),\n"
        "                 (lambda x: sk.free_energy(x, dim=1, mode=mode), e)):\n"
        "        z = x.detach().to(d).requires_grad_(); found = []\n"
        "        for b in ('cpu', 'reference'):\n"
        "            with sk.use_backend(b): v = f(z); found.append((v, torch.autograd.grad(v.sum(), z)[0]))\n"
        "        (v, g), (w, h) = found\n"
        "        assert (v - w).norm() <= 1e-6 * w.norm(), (d, mode)\n"
        "        assert (g - h).double().norm() <= (torch.finfo(d).eps + 1e-5) * h.double().norm(), (d, mode)\n"
        "print(native.extension.build_info()['cpu_isa'])\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"SSLKERNELS_CPU_ISA": isa}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in ("default", isa)


VALID = problem("cpu", dtype=torch.float32, requires_grad=())
ERRORS = [
    (dict(prediction=[1]), TypeError, "prediction must be a torch.Tensor; got list"),
    (dict(prediction=torch.ones(5, 4, 7).long()), TypeError, "prediction must have dtype .*; got torch.int64"),
    (dict(prediction=torch.ones(5)), ValueError, r"prediction must have shape \(B, K, ...\); got \(5,\)"),
    (dict(prediction=torch.ones(5, 0, 7)), ValueError, r"prediction must have at least one element along dim 1; got"),
    (dict(target=torch.ones(5, 4, 7)), ValueError, r"target must have shape \(B, ...\) = \(5, 7\); got \(5, 4, 7\)"),
    (dict(target=torch.ones(1, 7)), ValueError, r"target must have shape \(B, ...\) = \(5, 7\); got \(1, 7\)"),
    (dict(target=torch.ones(5, 7).bool()), TypeError, "target must have dtype .*; got torch.bool"),
    (
        dict(target=torch.ones(5, 7).half()),
        TypeError,
        "target must have the dtype of prediction, torch.float32, outside autocast; got torch.float16",
    ),
    (dict(target=torch.ones(5, 7, device="meta")), ValueError, "target must be on the device of prediction, cpu"),
    (dict(beta=0), ValueError, r"beta must be in \[1e-37, 1e\+37\]; got 0"),
    (dict(beta=None), TypeError, "beta must be a number; got NoneType"),
    (dict(mode="max"), ValueError, "mode must be 'soft', 'min' or 'mean'; got 'max'"),
    (dict(reduction="avg"), ValueError, "reduction must be 'none', 'mean' or 'sum'; got 'avg'"),
]


@pytest.mark.parametrize(
    ("change", "kind", "message"), ERRORS, ids=lambda v: next(iter(v)) if isinstance(v, dict) else ""
)
def test_errors(change, kind, message):
    with pytest.raises(kind, match=r"^prediction_energy: " + message):
        sk.prediction_energy(**{**VALID, **change})


@pytest.mark.parametrize("mode", ["soft", "min"])
@pytest.mark.parametrize("argument", [0, 1])
def test_vmap_inside_an_outer_gradient(backend, mode, argument, device):
    """Samples one at a time, as per-sample losses are written."""
    leaves = [torch.randn(4, 3, 5, device=device), torch.randn(4, 5, device=device)]

    def total(x):
        both = [x if i == argument else leaf for i, leaf in enumerate(leaves)]
        each = torch.func.vmap(lambda p, y: sk.prediction_energy(p[None], y[None], mode=mode))(*both)
        return each.square().sum()

    got = torch.func.grad(total)(leaves[argument])
    both = [leaf.clone().requires_grad_() for leaf in leaves]
    loss = sk.prediction_energy(*both, mode=mode, reduction="none").square().sum()
    torch.testing.assert_close(got, torch.autograd.grad(loss, both[argument])[0])


SHAPES = [(5, 4, 12), (3, 40, 7), (2, 3, 9000)]  # reduced by one block, over several, and from parts of the features


def masked(device, shape, dtype=torch.float32):
    """Predictions, targets and a mask with rows of none, of one, and of all hypotheses; junk outside the mask."""
    batch, count, dim = shape
    g = torch.Generator().manual_seed(7)
    prediction, target = torch.randn(batch, count, dim, generator=g), torch.randn(batch, dim, generator=g)
    mask = torch.rand(batch, count, generator=g) < 0.6
    mask[0, 1:], mask[0, 0], mask[1] = False, True, True
    mask[2:3] = False
    prediction = torch.where(mask.unsqueeze(2), prediction, math.nan)
    return (t.to(device, dtype) for t in (prediction, target)), mask.to(device)


def row_energy(energies, mode, beta):
    if mode == "min":
        return energies.amin()
    if mode == "mean":
        return energies.mean()
    return -(torch.logsumexp(-beta * energies, 0) - math.log(len(energies))) / beta


@pytest.mark.slow_for(backend="triton", shape=SHAPES[1:])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("mode", ["soft", "min", "mean"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_mask_leaves_hypotheses_out(backend, shape, mode, dtype, device):
    """Row by row against the definition in float64 on the hypotheses alone, whatever the others hold."""
    (prediction, target), mask = masked(device, shape, dtype)
    beta = 1 / shape[2]
    leaves = [t.clone().requires_grad_() for t in (prediction, target)]
    exact = [t.double().nan_to_num(0.0).requires_grad_() for t in (prediction, target)]
    got = sk.prediction_energy(*leaves, mask=mask, mode=mode, beta=beta, reduction="none")
    energies = (exact[0] - exact[1].unsqueeze(1)).square().sum(2)
    rows = [
        row_energy(e[m], mode, beta) if m.any() else e.new_tensor(math.nan) for e, m in zip(energies, mask, strict=True)
    ]
    expected = torch.stack(rows)
    torch.testing.assert_close(got.double(), expected.detach(), rtol=2e-5, atol=0, equal_nan=True)
    some = mask.any(1)
    upstream = torch.randn(shape[0], dtype=torch.float64, device=device)
    found = torch.autograd.grad(got[some], leaves, upstream[some].to(got.dtype))
    truth = torch.autograd.grad(expected[some], exact, upstream[some])
    tolerance = 8 * torch.finfo(dtype).eps if dtype != torch.float64 else 1e-10
    torch.testing.assert_close(found[1].double(), truth[1], rtol=tolerance, atol=16 * tolerance)
    torch.testing.assert_close(found[0].double(), truth[0], rtol=max(tolerance, 3e-5), atol=tolerance)
    assert not found[0][~mask].any()
    full = torch.ones_like(mask)
    options = {"mode": mode, "beta": beta, "reduction": "none"}
    prediction = prediction.nan_to_num(0.5)
    torch.testing.assert_close(
        sk.prediction_energy(prediction, target, mask=full, **options),
        sk.prediction_energy(prediction, target, **options),
    )


@pytest.mark.slow_for(backend="triton", shape=SHAPES[1:])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("mode", ["soft", "min", "mean"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("with_mask", [False, True])
def test_statistics(backend, with_mask, shape, mode, dtype, device):
    (prediction, target), mask = masked(device, shape, dtype)
    if not with_mask:
        prediction, mask = prediction.nan_to_num(0.25), None
    leaf = prediction.clone().requires_grad_()
    options = {"mode": mode, "beta": 0.01, "mask": mask}
    loss, stats = sk.prediction_energy(leaf, target, return_stats=True, **options)
    plain = sk.prediction_energy(leaf, target, **options)
    assert torch.equal(loss, plain) or (loss.isnan() and plain.isnan())
    assert not any(part.requires_grad for part in stats)
    valid = torch.ones(shape[:2], dtype=torch.bool, device=device) if mask is None else mask
    exact = prediction.double()
    energies = (exact - target.double().unsqueeze(1)).square().sum(2).masked_fill(~valid, math.inf)
    torch.testing.assert_close(stats.energies.double(), energies, rtol=2e-5, atol=0)
    winner = torch.where(valid.any(1), energies.argmin(1), -1)
    assert torch.equal(stats.winner, winner)
    assert torch.equal(stats.usage, torch.bincount(winner[winner >= 0], minlength=shape[1]))
    share = stats.usage[stats.usage > 0].double() / stats.usage.sum()
    torch.testing.assert_close(stats.perplexity.double(), (-(share * share.log()).sum()).exp())
    pairs = []
    for row, there in zip(exact, valid, strict=True):
        if there.sum() > 1:
            pairs.append(torch.pdist(row[there]).square().mean())
    torch.testing.assert_close(stats.diversity.double(), torch.stack(pairs).mean(), rtol=1e-5, atol=0)


def test_the_diversity_of_collapsed_predictions(backend, device):
    """Exactly 0 far from the origin and the target, and right for small differences there."""
    base = 1000 + torch.randn(6, 1, 50, device=device)
    target = torch.zeros(6, 50, device=device)
    _, stats = sk.prediction_energy(base.expand(6, 8, 50).contiguous(), target, return_stats=True)
    assert stats.diversity == 0
    assert torch.equal(stats.winner, torch.zeros(6, dtype=torch.int64, device=device))
    assert stats.perplexity == 1
    near = base + torch.randn(6, 8, 50, device=device)
    _, stats = sk.prediction_energy(near, target, return_stats=True)
    truth = torch.stack([torch.pdist(row).square().mean() for row in near.double()]).mean()
    torch.testing.assert_close(stats.diversity.double(), truth, rtol=1e-5, atol=0)
    _, alone = sk.prediction_energy(near[:, :1], target, return_stats=True)
    assert alone.diversity.isnan()
    bad = near.clone()
    bad[2, 3, 0] = math.nan
    _, stats = sk.prediction_energy(bad, target, return_stats=True)
    assert stats.usage.sum() == 5
    assert stats.diversity.isnan()


def test_statistics_and_masks_compile_and_vmap(device, compiler):
    (prediction, target), mask = masked(device, (5, 4, 6))
    torch._dynamo.reset()

    def loss(p, y, m):
        return sk.prediction_energy(p, y, mask=m, mode="mean", reduction="none", return_stats=True)

    for got in (torch.compile(loss, fullgraph=True, backend=compiler)(prediction, target, mask),):
        torch.testing.assert_close(got, loss(prediction, target, mask), equal_nan=True)
    each = torch.func.vmap(lambda p, y, m: loss(p[None], y[None], m[None])[0][0])(prediction, target, mask)
    torch.testing.assert_close(each, loss(prediction, target, mask)[0], equal_nan=True)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"mask": torch.ones(5, 4)}, TypeError, "mask must have dtype torch.bool; got torch.float32"),
        ({"mask": torch.ones(4, 5, dtype=torch.bool)}, ValueError, r"mask must have shape \(B, K\) = \(5, 4\)"),
        ({"return_stats": 1}, TypeError, "return_stats must be a bool; got int"),
    ],
)
def test_errors_of_masks_and_statistics(change, kind, message):
    with pytest.raises(kind, match="^prediction_energy: " + message):
        sk.prediction_energy(torch.zeros(5, 4, 3), torch.zeros(5, 3), **change)
