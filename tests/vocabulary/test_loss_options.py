"""Options of the two cross-entropies: values from formulas, reductions, and arguments at the edge of their range."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import sslkernels as sk

OP = "cross_entropy"
LOSSES = ("cross_entropy", "linear_cross_entropy")


def loss_of(name: str, logits: torch.Tensor, target: torch.Tensor, **options):
    """The loss of these logits; the linear one projects them by the identity."""
    if name == "cross_entropy":
        return sk.cross_entropy(logits, target, **options)
    return sk.linear_cross_entropy(logits, torch.eye(logits.shape[-1]).to(logits), target, **options)


@pytest.mark.parametrize("name", LOSSES)
def test_z_loss_of_a_mean_is_not_class_weighted(backend, name, device):
    x = torch.zeros(1, 2, device=device)
    got = loss_of(name, x, torch.tensor([0], device=device), weight=torch.tensor([0.5, 0.5], device=device), z_loss=1.0)
    assert got.item() == pytest.approx(math.log(2) + math.log(2) ** 2, rel=1e-6)


@pytest.mark.parametrize("items", [None, 7])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("name", LOSSES)
def test_z_loss_with_class_weights(backend, name, smoothing, items, device):
    x = torch.randn(9, 5, dtype=torch.float64, device=device, requires_grad=True)
    target = torch.tensor([0, 1, -100, 4, 2, 2, -100, 3, 1], device=device)
    weight = torch.tensor([0.1, 3.0, 0.0, 0.7, 2.0], dtype=torch.float64, device=device)
    got = loss_of(name, x, target, weight=weight, z_loss=0.3, label_smoothing=smoothing, num_items=items)
    valid = target != -100
    plain = F.cross_entropy(x, target, weight, label_smoothing=smoothing, reduction="sum")
    divisor = weight[target[valid]].sum() if items is None else items
    z = x.logsumexp(1)[valid].square().sum() / (valid.sum() if items is None else items)
    want = plain / divisor + 0.3 * z
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(loss, x)[0] for loss in (got, want)))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", LOSSES)
def test_gradient_of_the_softcap_at_large_logits(backend, name, reduction, device):
    logits = torch.tensor([[124.0, -3.0, -124.0, 90.0, 118.0, 0.01]] * 2, device=device)
    logits = logits.repeat(1, 500)[:, :2999].contiguous()
    target = torch.tensor([3, 0], device=device)

    def gradient(loss, x):
        x = x.clone().requires_grad_()
        return torch.autograd.grad(loss(x).sum(), x)[0].double()

    got = gradient(lambda x: loss_of(name, x, target, softcap=30.0, reduction=reduction), logits)
    want = gradient(lambda x: F.cross_entropy(30 * torch.tanh(x / 30), target, reduction=reduction), logits.double())
    assert ((got - want).abs() / want.abs()).max() < 2e-5  # eager float32: 9e-5; one minus a rounded tanh: 4e-4


@pytest.mark.parametrize("name", LOSSES)
def test_an_infinite_softcap_is_none(backend, name, device):
    x, target = torch.randn(4, 6, device=device), torch.randint(0, 6, (4,), device=device)
    assert torch.equal(loss_of(name, x, target, softcap=math.inf), loss_of(name, x, target))
    for softcap in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="softcap must be in"):
            loss_of(name, x, target, softcap=softcap)


@pytest.mark.parametrize("index", [2**32, -(2**32), 2**32 + 2])
@pytest.mark.parametrize("name", LOSSES)
def test_an_ignore_index_beyond_the_dtype_of_the_target_ignores_nothing(backend, name, index, device):
    x = torch.randn(5, 4, device=device)
    target = torch.tensor([0, 1, 2, 3, 2], dtype=torch.int32, device=device)
    got = loss_of(name, x, target, ignore_index=index, return_stats=True)
    torch.testing.assert_close(got[0], F.cross_entropy(x, target.long()))
    assert torch.equal(got[1].correct, x.argmax(1) == target)
    with pytest.raises(ValueError, match="ignore_index must fit in 64 bits; got"):
        loss_of(name, x, target, ignore_index=2**70)


@pytest.mark.parametrize("argument", ["capacity", "workspace_bytes"])
def test_a_bound_beyond_64_bits_is_an_error(argument, device):
    x, target = torch.randn(5, 4, device=device), torch.zeros(5, dtype=torch.long, device=device)
    with pytest.raises(ValueError, match=f"linear_cross_entropy: {argument} must fit in 64 bits; got 11805916207"):
        sk.linear_cross_entropy(x, x, target, **{argument: 2**70})


def test_no_classes_is_an_error(backend, device):
    for target in (torch.zeros(3, dtype=torch.long, device=device), torch.zeros(3, 0, device=device)):
        with pytest.raises(ValueError, match=r"cross_entropy: input must have at least one class; got \(3, 0\)"):
            sk.cross_entropy(torch.zeros(3, 0, device=device), target)


def test_ours_in_place_of_torchs(monkeypatch):
    """Class probabilities go to torch's function, which must not be found under the name that a user replaced."""
    x, probabilities = torch.randn(4, 5), torch.rand(4, 5).softmax(1)
    want = torch.nn.CrossEntropyLoss()(x, probabilities)
    monkeypatch.setattr(F, "cross_entropy", lambda *a, **k: sk.cross_entropy(*a[:3], **_only(k)))
    torch.testing.assert_close(torch.nn.CrossEntropyLoss()(x, probabilities), want)


def _only(options: dict) -> dict:
    return {k: v for k, v in options.items() if k in ("ignore_index", "reduction", "label_smoothing")}


@pytest.mark.parametrize("module", [sk.nn.CrossEntropyLoss, sk.nn.LinearCrossEntropyLoss])
def test_class_weights_set_later_follow_the_module(module):
    loss = module()
    assert "weight" in loss._buffers
    assert not loss.state_dict()
    loss.weight = torch.ones(5)
    assert loss.double().weight.dtype == torch.float64
    assert list(loss.state_dict()) == ["weight"]
    loss.weight = None
    assert not loss.state_dict()
