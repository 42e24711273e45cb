"""Requests of autograd: subsets of inputs, any grad_output, retained graphs, double backward, accumulation."""

from __future__ import annotations

import itertools

import oracle
import pytest
import torch

import sslkernels as sk
from sslkernels.vocabulary import chunked_linear

pytestmark = pytest.mark.pairwise

OP = "linear_cross_entropy"
MODES = ("fast", "compact")
NAMES = ("input", "linear_weight", "linear_bias", "token_weight")


def problem(device, dtype=torch.float64, rows=13, vocab=31, dim=7, requires_grad=NAMES):
    g = torch.Generator().manual_seed(1)
    shapes = {"input": (rows, dim), "linear_weight": (vocab, dim), "linear_bias": (vocab,), "token_weight": (rows,)}
    tensors = {n: torch.randn(s, generator=g, dtype=torch.float64).to(device, dtype) for n, s in shapes.items()}
    target = torch.randint(0, vocab, (rows,), generator=g)
    target[::4] = -100
    for name in requires_grad:
        tensors[name].requires_grad_()
    return tensors, target.to(device)


def call(tensors, target, **options):
    return sk.linear_cross_entropy(**tensors, target=target, **options)


@pytest.mark.full_for(backend="triton")
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("mode", MODES)
def test_every_subset_of_inputs_gets_the_same_gradients(backend, mode, reduction, device):
    tensors, target = problem(device)
    loss = call(tensors, target, mode=mode, reduction=reduction)
    grad_output = torch.randn_like(loss)
    full = dict(zip(NAMES, torch.autograd.grad(loss, list(tensors.values()), grad_output), strict=True))
    for count in range(1, len(NAMES)):
        for subset in itertools.combinations(NAMES, count):
            tensors, target = problem(device, requires_grad=subset)
            call(tensors, target, mode=mode, reduction=reduction).backward(grad_output)
            for name, tensor in tensors.items():
                if name in subset:
                    torch.testing.assert_close(tensor.grad, full[name], rtol=1e-12, atol=1e-14)
                else:
                    assert tensor.grad is None


def test_nothing_requires_grad(backend, device):
    tensors, target = problem(device, requires_grad=())
    assert not call(tensors, target).requires_grad
    tensors, target = problem(device)
    with torch.no_grad():
        loss = call(tensors, target)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, call(tensors, target).detach())


def test_only_wanted_gradients_are_computed(monkeypatch, device):
    requests = []
    original = chunked_linear.empty_gradients
    monkeypatch.setattr(
        chunked_linear,
        "empty_gradients",
        lambda operands, wanted: requests.append(wanted) or original(operands, wanted),
    )
    tensors, target = problem(device, dtype=torch.float32, requires_grad=("input",))
    with sk.use_backend("cpu" if "cpu" in sk.available_backends(OP, device) else "triton"):
        call(tensors, target).backward()
    assert requests == [(True, False, False)]


@pytest.mark.full_for(backend="triton")
@pytest.mark.parametrize("mode", MODES)
def test_second_backward_gives_the_same_gradients(backend, mode, device):
    tensors, target = problem(device)
    loss = call(tensors, target, mode=mode)
    leaves = list(tensors.values())
    first = torch.autograd.grad(loss, leaves, torch.tensor(0.5, dtype=loss.dtype, device=device), retain_graph=True)
    second = torch.autograd.grad(loss, leaves, torch.tensor(0.5, dtype=loss.dtype, device=device), retain_graph=True)
    third = torch.autograd.grad(loss, leaves, torch.tensor(1.0, dtype=loss.dtype, device=device))
    for one, two, three in zip(first, second, third, strict=True):
        assert torch.equal(one, two)
        torch.testing.assert_close(2 * one, three, rtol=1e-12, atol=1e-14)


@pytest.mark.full_for(backend="triton")
@pytest.mark.parametrize("mode", MODES)
def test_gradients_accumulate_over_a_retained_graph(backend, mode, device):
    tensors, target = problem(device, dtype=torch.float32)
    loss = call(tensors, target, mode=mode)
    loss.backward(retain_graph=True)
    once = {name: tensor.grad.clone() for name, tensor in tensors.items()}
    loss.backward(retain_graph=True)
    loss.backward()
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor.grad, 3 * once[name])


def test_a_gradient_changed_in_place_changes_no_later_one(backend, device):
    tensors, target = problem(device, dtype=torch.float32)
    loss = call(tensors, target, mode="fast")
    leaves = list(tensors.values())
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    kept = [grad.clone() for grad in first]
    for grad in first:
        grad.mul_(7)
    for one, two in zip(kept, torch.autograd.grad(loss, leaves), strict=True):
        assert torch.equal(one, two)


def test_backward_after_release_raises(backend, device):
    tensors, target = problem(device)
    loss = call(tensors, target)
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("mode", MODES)
def test_grad_output_of_every_kind(backend, mode, device):
    tensors, target = problem(device)
    leaves = list(tensors.values())
    rows = call(tensors, target, mode=mode, reduction="none")
    expanded = torch.autograd.grad(rows.sum(), leaves, retain_graph=True)
    dense = torch.autograd.grad(rows, leaves, torch.ones_like(rows), retain_graph=True)
    strided = torch.autograd.grad(rows, leaves, torch.ones(2 * len(rows), dtype=rows.dtype, device=device)[::2])
    for a, b, c in zip(expanded, dense, strided, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    # For the squared loss, grad_output is the loss itself.
    loss = call(tensors, target, mode=mode)
    squared = torch.autograd.grad(loss.square(), leaves)
    truth = oracle.linear_cross_entropy(**tensors, target=target)
    true_squared = torch.autograd.grad(truth.square(), leaves)
    for a, b in zip(squared, true_squared, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(backend, mode, reduction, device):
    if backend == "triton":
        pytest.skip("the numerical Jacobian runs the interpreter hundreds of times; its cases cover the gradients")
    tensors, target = problem(device, rows=5, vocab=6, dim=3)

    def function(*leaves):
        options = {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 3.0, "logit_scale": 1.3}
        return call(dict(zip(NAMES, leaves, strict=True)), target, mode=mode, reduction=reduction, **options)

    assert torch.autograd.gradcheck(function, tuple(tensors.values()))
    logits = torch.randn(5, 6, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: sk.cross_entropy(z, target, reduction=reduction, z_loss=0.01), logits)


@pytest.mark.full_for(backend="triton")
@pytest.mark.parametrize("mode", MODES)
def test_double_backward_raises(backend, mode, device):
    tensors, target = problem(device)
    (grad,) = torch.autograd.grad(call(tensors, target, mode=mode), tensors["input"], create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward"):
        grad.sum().backward()
    logits = torch.randn(13, 31, dtype=torch.float64, device=device, requires_grad=True)
    (grad,) = torch.autograd.grad(sk.cross_entropy(logits, target), logits, create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward"):
        grad.sum().backward()


@pytest.mark.parametrize("mode", MODES)
def test_double_backward_raises_among_differentiable_terms(mode, device):
    """A gradient penalty whose path is cut would be silently wrong."""
    tensors, target = problem(device)
    x, w = tensors["input"], tensors["linear_weight"]
    (grad,) = torch.autograd.grad(sk.linear_cross_entropy(x, w, target, mode=mode), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward"):
        (grad.square().sum() + w.square().sum()).backward()

    def first(x):
        return torch.func.grad(lambda x: sk.linear_cross_entropy(x, w.detach(), target, mode=mode))(x).square().sum()

    with pytest.raises(NotImplementedError, match="double backward"):
        torch.func.grad(first)(x.detach())


def test_forward_mode_raises(device):
    tensors, target = problem(device)
    x, w = tensors["input"].detach(), tensors["linear_weight"].detach()
    with pytest.raises((NotImplementedError, RuntimeError), match=r"jvp|forward"):
        torch.func.jvp(lambda x: sk.linear_cross_entropy(x, w, target), (x,), (x,))


def test_statistics_carry_no_gradient(backend, device):
    tensors, target = problem(device)
    loss, stats = call(tensors, target, return_stats=True)
    assert loss.requires_grad
    assert not any(part.requires_grad for part in stats)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_all_rows_ignored(backend, reduction, device):
    for mode in MODES:
        tensors, target = problem(device, dtype=torch.float32)
        loss = call(tensors, torch.full_like(target, -100), mode=mode, reduction=reduction)
        assert loss.isnan() if reduction == "mean" else loss == 0
        loss.backward()
        for name in ("input", "linear_weight", "linear_bias"):
            assert torch.equal(tensors[name].grad, torch.zeros_like(tensors[name]))
    logits = torch.randn(3, 5, device=device, requires_grad=True)
    loss = sk.cross_entropy(logits, torch.full((3,), -100, device=device), reduction=reduction)
    assert loss.isnan() if reduction == "mean" else loss == 0
    loss.backward()
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_zero_rows(backend, reduction, device):
    for mode in MODES:
        tensors, target = problem(device, dtype=torch.float32, rows=0)
        loss = call(tensors, target, mode=mode, reduction=reduction)
        assert loss.shape == ((0,) if reduction == "none" else ())
        if reduction == "mean":
            assert loss.isnan()
        loss.sum().backward()
        assert torch.equal(tensors["linear_weight"].grad, torch.zeros_like(tensors["linear_weight"]))
        assert tensors["input"].grad.shape == (0, 7)


def test_tied_weight_gets_both_gradients(backend, device):
    """The embedding that produces the input is also the projection."""
    embedding = torch.randn(31, 7, dtype=torch.float64, device=device, requires_grad=True)
    ids = torch.randint(0, 31, (13,), device=device)
    target = torch.randint(0, 31, (13,), device=device)
    (got,) = torch.autograd.grad(sk.linear_cross_entropy(embedding[ids].tanh(), embedding, target), embedding)
    truth = oracle.linear_cross_entropy(embedding[ids].tanh(), embedding, target)
    torch.testing.assert_close(got, torch.autograd.grad(truth, embedding)[0], rtol=1e-10, atol=1e-12)


def test_non_contiguous_inputs(backend, device):
    x = torch.randn(7, 13, dtype=torch.float64, device=device).t().requires_grad_()
    w = torch.randn(7, 31, dtype=torch.float64, device=device).t().requires_grad_()
    target = torch.randint(0, 31, (26,), device=device)[::2]
    got = torch.autograd.grad(sk.linear_cross_entropy(x, w, target), (x, w))
    truth = torch.autograd.grad(oracle.linear_cross_entropy(x, w, target), (x, w))
    for a, b in zip(got, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    for logits in (
        torch.randn(31, 13, device=device).t(),
        torch.randn(13, 62, device=device)[:, ::2],
        torch.randn(13, 40, device=device)[:, :31],
    ):
        leaf = logits.double().detach().requires_grad_()
        view = logits.detach().requires_grad_()
        sk.cross_entropy(view, target).backward()
        oracle.cross_entropy(leaf, target).backward()
        torch.testing.assert_close(view.grad.double(), leaf.grad, rtol=1e-5, atol=1e-7)
