"""Options of the two cross-entropies: values from formulas, reductions, and arguments at the edge of their range."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
import torch.nn.functional as F

import sslkernels as sk

pytestmark = pytest.mark.pairwise

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


GRID = [
    (rows, vocab, reduction, smoothing, z_loss, softcap)
    for rows, vocab in ((1, 2), (7, 41), (33, 257), (130, 1000))
    for reduction in ("mean", "sum", "none")
    for smoothing in (0.0, 0.1)
    for z_loss in (0.0, 1e-2)
    for softcap in (None, 30.0)
]


@pytest.mark.slow_for(backend="triton")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_grid_of_options(backend, name, dtype, device):
    """The options that Liger's and cut-cross-entropy's tests combine: bias, class weights, smoothing, z-loss, softcap,
    reductions, scale, ignored rows and ragged sizes, each against float64 beside eager torch."""
    g = torch.Generator().manual_seed(0)
    for case, (rows, vocab, reduction, smoothing, z_loss, softcap) in enumerate(GRID):
        bits = torch.randint(0, 2, (5,), generator=g).bool().tolist()
        with_bias, with_weight, with_tokens, with_items, ignored = bits
        options = {"reduction": reduction, "label_smoothing": smoothing, "z_loss": z_loss, "softcap": softcap}
        options["logit_scale"] = (1.0, 0.3)[case % 2]
        options["ignore_index"] = (-100, 1)[case // 2 % 2]
        tensors = {"input": 5 * torch.randn(rows, vocab if name == "cross_entropy" else 24, generator=g)}
        if name != "cross_entropy":
            tensors["linear_weight"] = torch.randn(vocab, 24, generator=g) / 5
        if name != "cross_entropy" and with_bias:
            tensors["linear_bias"] = torch.randn(vocab, generator=g)
        constants = {}
        if with_weight:
            constants["weight"] = torch.rand(vocab, generator=g) + 0.1
        if with_tokens:
            tensors["token_weight"] = torch.rand(rows, generator=g)
        if with_items and reduction == "mean":
            options["num_items"] = 11
        target = torch.randint(0, vocab, (rows,), generator=g)
        target[0] = 0
        if ignored:
            target[1::3] = options["ignore_index"]

        def run(function, convert, options=options, tensors=tensors, constants=constants, target=target):
            leaves = {name: convert(t).to(device).requires_grad_() for name, t in tensors.items()}
            fixed = {name: convert(t).to(device) for name, t in constants.items()}
            loss = function(**leaves, **fixed, target=target.to(device), **options)
            weights = torch.linspace(-1, 2, loss.numel() or 1, device=device).to(loss).reshape(loss.shape)
            return [loss.double(), *(g.double() for g in torch.autograd.grad(loss, list(leaves.values()), weights))]

        got = run(getattr(sk, name), lambda t: t.to(dtype))
        eager = run(getattr(oracle, name), lambda t: t.to(dtype))
        truth = run(getattr(oracle, name), lambda t: t.to(dtype).double())
        for have, plain, want in zip(got, eager, truth, strict=True):
            # A tanh within 2 ulp moves the exponent of a probability by 2 ulp of z, which is several here.
            limit = oracle.error(plain, want) + (2 if softcap is None else 8) * torch.finfo(dtype).eps
            assert oracle.error(have, want) <= limit, (case, options, bits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("tokens", [True, False])
def test_scale_and_token_weights_of_cross_entropy(backend, tokens, reduction, dtype, device):
    x = (3 * torch.randn(11, 37, device=device)).to(dtype).requires_grad_()
    target = torch.randint(0, 37, (11,), device=device)
    target[4] = -100
    weight = torch.rand(11, device=device).requires_grad_() if tokens else None
    leaves = [x, weight] if tokens else [x]
    got = sk.cross_entropy(x, target, logit_scale=0.4, softcap=5.0, token_weight=weight, reduction=reduction)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    want = oracle.cross_entropy(
        exact[0], target, logit_scale=0.4, softcap=5.0, reduction=reduction, token_weight=exact[1] if tokens else None
    )
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(
        got.double(), want, rtol=8 * max(eps, 1e-7) if dtype != torch.float64 else eps * 64, atol=1e-9
    )
    for have, truth in zip(torch.autograd.grad(got.sum(), leaves), torch.autograd.grad(want.sum(), exact), strict=True):
        assert oracle.error(have, truth) <= 4 * max(eps, 1e-7)


@pytest.mark.parametrize("items", [13, 13.0, torch.tensor(13)])
@pytest.mark.parametrize("probabilities", [False, True])
def test_num_items_of_cross_entropy(backend, probabilities, items, device):
    x = torch.randn(6, 9, device=device, requires_grad=True)
    target = torch.rand(6, 9, device=device).softmax(1) if probabilities else torch.arange(6, device=device)
    items = items.to(device) if isinstance(items, torch.Tensor) else items
    got = sk.cross_entropy(x, target, num_items=items)
    torch.testing.assert_close(got, F.cross_entropy(x, target, reduction="sum") / 13)
    with pytest.raises(ValueError, match='num_items must be None unless reduction is "mean"'):
        sk.cross_entropy(x, target, num_items=items, reduction="sum")


@pytest.mark.parametrize("class_dim", [0, 1, 2, -1, -3])
@pytest.mark.parametrize("probabilities", [False, True])
def test_class_dim(backend, probabilities, class_dim, device):
    """A cube, so that every reading of the shapes fits."""
    x = torch.randn(4, 4, 4, device=device, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, 4, (4, 4), device=device)
    moved = x.movedim(class_dim, 1)
    if probabilities:
        target = torch.rand(4, 4, 4, device=device, dtype=torch.float64).softmax(class_dim)
    want = F.cross_entropy(moved, target.movedim(class_dim, 1) if probabilities else target, reduction="none")
    got = sk.cross_entropy(x, target, class_dim=class_dim, reduction="none")
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(loss.sum(), x)[0] for loss in (got, want)))
    for wrong in (3, -4):
        with pytest.raises(ValueError, match=f"class_dim must be in .*; got {wrong}"):
            sk.cross_entropy(x, target, class_dim=wrong)
    matrix = torch.randn(3, 5, device=device)
    index = torch.randint(0, 3, (5,), device=device)
    torch.testing.assert_close(sk.cross_entropy(matrix, index, class_dim=0), F.cross_entropy(matrix.t(), index))


@pytest.mark.parametrize("mode", ["fast", "compact"])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("rows", [0, 5])
def test_mean_over_no_valid_rows(backend, rows, name, mode, device):
    x = torch.randn(rows, 4, device=device, requires_grad=True)
    target = torch.full((rows,), -100, device=device)
    weight = torch.rand(4, device=device)
    every = [
        {},
        {"weight": weight},
        {"weight": weight, "z_loss": 0.1},
        {"token_weight": torch.ones(rows, device=device)},
    ]
    for options in [*every, {"num_items": 0}]:
        options = options if name == "cross_entropy" else {**options, "mode": mode}
        assert loss_of(name, x, target, **options).isnan()
        loss = loss_of(name, x, target, on_empty="zero", **options)
        assert loss.item() == 0
        assert not torch.autograd.grad(loss, x)[0].any()
    valid = torch.zeros_like(target)
    if rows:
        options = {"weight": weight, "z_loss": 0.1, "label_smoothing": 0.1}
        assert torch.equal(loss_of(name, x, valid, on_empty="zero", **options), loss_of(name, x, valid, **options))
    with pytest.raises(ValueError, match="on_empty must be 'nan' or 'zero'; got 'one'"):
        loss_of(name, x, target, on_empty="one")


def test_modules_take_the_options(device):
    x, target = torch.randn(5, 4, device=device), torch.tensor([0, 1, -100, 3, 2], device=device)
    tokens = torch.rand(5, device=device)
    loss = sk.nn.CrossEntropyLoss(logit_scale=2.0, class_dim=-1, on_empty="zero")
    want = sk.cross_entropy(x, target, logit_scale=2.0, token_weight=tokens, num_items=3)
    assert torch.equal(loss(x, target, token_weight=tokens, num_items=3), want)
    scale = torch.nn.Parameter(torch.tensor(2.0, device=device))
    linear = sk.nn.LinearCrossEntropyLoss(logit_scale=scale, shift=1, on_empty="zero", ignore_index=None)
    assert list(dict(linear.named_parameters())) == ["logit_scale"]
    got = linear(x, torch.eye(4, device=device), target)
    torch.testing.assert_close(got, F.cross_entropy(2 * x[:-1], target[1:]))
    got.backward()
    assert scale.grad is not None
