"""Training flows around the contrastive losses: what may change between forward and backward, learned scales, options
of the named losses, means over nothing."""

import copy

import pytest
import torch

import sslkernels as sk

pytestmark = pytest.mark.pairwise

OP = "contrastive_energy"
NAMED = {
    "info_nce": (lambda x, y, **o: sk.info_nce(x, y, temperature=0.2, **o), sk.nn.InfoNCELoss(0.2)),
    "nt_xent": (lambda x, y, **o: sk.nt_xent(x, y, temperature=0.2, **o), sk.nn.NTXentLoss(0.2)),
    "clip_loss": (lambda x, y, **o: sk.clip_loss(x, y, 5.0, **o), sk.nn.ClipLoss(5.0)),
    "siglip_loss": (lambda x, y, **o: sk.siglip_loss(x, y, 5.0, -2.0, **o), sk.nn.SigLipLoss(5.0, -2.0)),
}


def pairs(count: int = 6, dim: int = 5):
    torch.manual_seed(0)
    return [torch.randn(count, dim, dtype=torch.float64, requires_grad=True) for _ in range(2)]


def test_a_bank_may_be_overwritten_before_backward(backend):
    x, y = pairs()
    bank = torch.randn(7, 5, dtype=torch.float64)
    arguments = {"normalize": True, "logit_scale": 3.0}
    want = torch.autograd.grad(sk.contrastive_energy(x, y, bank=bank.clone(), **arguments), (x, y))
    loss = sk.contrastive_energy(x, y, bank=bank, **arguments)
    bank[:6] = y.detach()
    torch.testing.assert_close(torch.autograd.grad(loss, (x, y)), want)


@pytest.mark.parametrize("on_empty", ["nan", "zero"])
@pytest.mark.parametrize("energy", ["softmax", "sigmoid", "hinge"])
def test_a_mean_over_no_query(backend, energy, on_empty):
    x, y = pairs()
    queries = x[:0] if energy == "sigmoid" else x  # in the sigmoid energy a query without a positive counts
    positive = torch.full((queries.shape[0],), -1)
    loss = sk.contrastive_energy(queries, y, positive=positive, energy=energy, on_empty=on_empty)
    grads = torch.autograd.grad(loss, (x, y))
    if on_empty == "zero":
        assert loss == 0
        assert all((g == 0).all() for g in grads)
    else:
        assert loss.isnan()


@pytest.mark.full_for(backend="triton")
def test_num_items_is_the_divisor_of_accumulated_micro_batches(backend):
    x, y = pairs(8)
    whole = sk.contrastive_energy(x, y, positive=torch.arange(8), reduction="sum") / 8
    parts = [
        sk.contrastive_energy(x[i : i + 4], y, positive=torch.arange(i, i + 4), num_items=count)
        for i, count in ((0, 8), (4, torch.tensor(8)))
    ]
    torch.testing.assert_close(sum(parts), whole)
    torch.testing.assert_close(torch.autograd.grad(sum(parts), (x, y)), torch.autograd.grad(whole, (x, y)))


@pytest.mark.parametrize("name", NAMED)
def test_options_of_the_named_losses(name, backend):
    function, module = NAMED[name]
    x, y = pairs()
    rows = function(x, y, reduction="none")
    views = torch.cat([x, y])
    normalize = name in ("info_nce", "nt_xent")
    general = {"normalize": normalize, "logit_scale": 5.0, "reduction": "none"}
    queries, keys, ids = x, y, torch.tensor([0, 1, 0, 2, 1, 3])
    if name == "nt_xent":
        queries = keys = views
        general |= {"positive": torch.arange(12).roll(6), "exclude_self": True}
    if name == "clip_loss":
        general |= {"direction": "symmetric"}
    if name == "siglip_loss":
        general |= {"energy": "sigmoid", "logit_bias": -2.0}
    torch.testing.assert_close(rows, sk.contrastive_energy(queries, keys, **general))
    torch.testing.assert_close(function(x, y, reduction="sum"), rows.sum())
    torch.testing.assert_close(function(x, y), rows.mean())
    torch.testing.assert_close(function(x, y, num_items=3), rows.sum() / 3)
    torch.testing.assert_close(module(x, y), rows.mean(), check_dtype=False, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(module(x, y, num_items=3), rows.sum() / 3, check_dtype=False, rtol=1e-6, atol=1e-6)
    of_pairs = ids.repeat(2) if name == "nt_xent" else ids
    by_id = sk.contrastive_energy(queries, keys, **general, query_ids=of_pairs, key_ids=of_pairs)
    assert not torch.allclose(by_id, rows)
    torch.testing.assert_close(function(x, y, reduction="none", ids=ids), by_id)
    torch.testing.assert_close(module(x, y, ids=ids), by_id.mean(), check_dtype=False, rtol=1e-6, atol=1e-6)
    loss, stats = function(x, y, return_stats=True)
    _, want = sk.contrastive_energy(queries, keys, **general, return_stats=True)
    torch.testing.assert_close(loss, rows.mean())
    torch.testing.assert_close(tuple(stats), tuple(want))
    if name == "siglip_loss":
        with pytest.raises(ValueError, match="siglip_loss: label_smoothing must be 0"):
            function(x, y, label_smoothing=0.1)
    else:
        smooth = sk.contrastive_energy(queries, keys, **general, label_smoothing=0.1)
        torch.testing.assert_close(function(x, y, reduction="none", label_smoothing=0.1), smooth)
    other = sk.contrastive_energy(queries, keys, **{**general, "normalize": not normalize})
    torch.testing.assert_close(function(x, y, reduction="none", normalize=not normalize), other)
    assert function(x[:0], y[:0], on_empty="zero") == 0


@pytest.mark.parametrize("name", NAMED)
def test_modules_hold_the_options_of_the_named_losses(name):
    function, module = NAMED[name]
    smoothing = 0.0 if name == "siglip_loss" else 0.1
    options = {"reduction": "sum", "label_smoothing": smoothing, "normalize": name in ("clip_loss", "siglip_loss")}
    options |= {"on_empty": "zero", "return_stats": True, "process_group": None}
    arguments = {"clip_loss": (5.0,), "siglip_loss": (5.0, -2.0)}.get(name, (0.2,))
    holder = type(module)(*arguments, **options)
    assert holder.options().keys() >= options.keys()
    x, y = pairs()
    (loss, stats), (want, want_stats) = holder(x, y), function(x, y, **options)
    torch.testing.assert_close((loss, *stats), (want, *want_stats), check_dtype=False, rtol=1e-6, atol=1e-6)


def test_symmetric_scores_take_ids_and_smoothing(backend):
    """nt_xent computes each score once for two rows."""
    x, y = pairs(9)
    ids = torch.tensor([0, 1, 0, 2, 1, 3, 4, 0, 5])
    views = torch.cat([x, y])
    want = sk.contrastive_energy(
        views, views.clone(), positive=torch.arange(18).roll(9), exclude_self=True, normalize=True, logit_scale=2.0,
        query_ids=ids.repeat(2), key_ids=ids.repeat(2), label_smoothing=0.2,
    )  # fmt: skip
    loss = sk.nt_xent(x, y, ids=ids, label_smoothing=0.2)
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(torch.autograd.grad(loss, (x, y)), torch.autograd.grad(want, (x, y)))


LEARNED = {
    "ClipLoss": lambda: sk.nn.ClipLoss(90.0, normalize=True),
    "SigLipLoss": lambda: sk.nn.SigLipLoss(90.0, max_logit_scale=100.0, normalize=True),
    "ContrastiveLoss": lambda: sk.nn.ContrastiveLoss(
        logit_scale=90.0, learnable=True, max_logit_scale=100.0, normalize=True
    ),
}


@pytest.mark.parametrize("name", LEARNED)
@pytest.mark.parametrize("value", [4.0, 7.0])
def test_no_parameter_is_written_in_forward(name, value):
    module = LEARNED[name]()
    x, y = (t.detach().float().requires_grad_() for t in pairs())
    with torch.no_grad():
        module.log_scale.fill_(value)
    regulariser = (module.log_scale.exp() - 14) ** 2  # backward needs log_scale unchanged
    (module(x, y) + module(y, x) + regulariser.sum()).backward()
    assert module.log_scale.item() == value
    torch.func.grad(lambda x: module(x, y))(x.detach())
    parameters = dict(module.named_parameters())
    torch.func.grad(lambda p: torch.func.functional_call(module, p, (x.detach(), y.detach())))(parameters)
    assert all(parameter.dim() > 0 for parameter in module.parameters())  # as fully_shard wants them


@pytest.mark.parametrize("name", LEARNED)
def test_a_learned_scale_stays_at_its_limit_and_comes_back(name):
    module = LEARNED[name]()
    x = torch.eye(5)
    with torch.no_grad():
        module.log_scale.fill_(7.0)
    module(x, x).backward()  # a larger scale is better
    assert module.log_scale.grad == 0
    module.log_scale.grad = None
    module(x, -x).backward()
    assert module.log_scale.grad > 0
    assert module.log_scale.item() == 7.0


def test_a_scale_beyond_the_limit_is_refused():
    with pytest.raises(ValueError, match=r"ClipLoss: init_logit_scale must be at most max_logit_scale, 100.0; got 120"):
        sk.nn.ClipLoss(120.0)
    with pytest.raises(ValueError, match="ContrastiveLoss: max_logit_scale must be None unless learnable"):
        sk.nn.ContrastiveLoss(max_logit_scale=10.0)


def test_a_learned_scale_is_not_set_beside_its_logarithm():
    module = sk.nn.ContrastiveLoss(logit_scale=20.0, learnable=True)
    with pytest.raises(AttributeError, match="ContrastiveLoss: logit_scale must be set through log_scale"):
        module.logit_scale = 5.0
    fixed = sk.nn.ContrastiveLoss(logit_scale=20.0)
    fixed.logit_scale = 5.0
    x, y = torch.randn(4, 8), torch.randn(4, 8)
    torch.testing.assert_close(fixed(x, y), sk.contrastive_energy(x, y, logit_scale=5.0))


def test_a_tensor_that_wants_a_gradient_is_a_parameter_or_refused():
    with pytest.raises(TypeError, match=r"NTXentLoss: temperature must be a torch.nn.Parameter, or want no gradient"):
        sk.nn.NTXentLoss(torch.tensor(0.1, requires_grad=True))
    module = sk.nn.NTXentLoss(torch.nn.Parameter(torch.tensor(0.1)))
    assert [name for name, _ in module.named_parameters()] == ["temperature"]
    module(*pairs()).backward()
    assert module.temperature.grad is not None
    assert copy.deepcopy(module).temperature.requires_grad
