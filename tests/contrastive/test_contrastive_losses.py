"""The named losses against the packages that they replace, and the modules."""

import itertools

import peers
import pytest
import torch
import torch.nn.functional as F

import sslkernels as sk

OP = "contrastive_energy"


@pytest.fixture(autouse=True)
def _every_backend(backend):
    """Runs each test on every backend."""


def features(*shape, dtype=torch.float64, normalised=False):
    values = torch.randn(shape, dtype=dtype)
    return (F.normalize(values, dim=-1) if normalised else values).requires_grad_()


def same_gradients(got, want, leaves, rtol=1e-9):
    torch.testing.assert_close(got, want, rtol=rtol, atol=rtol)
    grad_output = torch.linspace(0.5, 1.5, got.numel(), dtype=got.dtype).reshape(got.shape)
    for one, two in zip(
        torch.autograd.grad(got, leaves, grad_output),
        torch.autograd.grad(want, leaves, grad_output, allow_unused=True, materialize_grads=True),
        strict=True,
    ):
        torch.testing.assert_close(one, two, rtol=rtol, atol=rtol)


@pytest.mark.full_for(backend="triton")
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("negatives", [None, "unpaired", "paired"])
def test_info_nce_equals_its_namesake(negatives, reduction):
    theirs = peers.info_nce().info_nce
    query, key = features(9, 17), features(9, 17)
    leaves = [query, key]
    options = {"temperature": 0.07, "reduction": reduction}
    if negatives is not None:
        leaves.append(features(5, 17) if negatives == "unpaired" else features(9, 5, 17))
        options["negative_mode"] = negatives
    same_gradients(sk.info_nce(*leaves, **options), theirs(*leaves, **options), leaves)


def test_info_nce_learns_its_temperature():
    query, key, temperature = features(9, 17), features(9, 17), torch.tensor(0.2, dtype=torch.float64).requires_grad_()
    scores = F.normalize(query, dim=1) @ F.normalize(key, dim=1).T / temperature
    want = F.cross_entropy(scores, torch.arange(9))
    same_gradients(sk.info_nce(query, key, temperature=temperature), want, [query, key, temperature])


@pytest.mark.parametrize(("count", "dim", "temperature"), [(1, 4, 0.5), (2, 1, 0.1), (7, 16, 10.0), (12, 5, -0.5)])
def test_nt_xent_equals_lightly(count, dim, temperature):
    z0, z1 = features(count, dim), features(count, dim)
    want = peers.lightly_nt_xent(abs(temperature))
    want.temperature = temperature
    same_gradients(sk.nt_xent(z0, z1, temperature=temperature), want(z0, z1), [z0, z1])


def nt_xent(z0, z1, temperature):
    """Equation 1 of Chen et al. 2020."""
    z = F.normalize(torch.cat([z0, z1]), dim=1)
    scores = (z @ z.T / temperature).masked_fill(torch.eye(len(z), dtype=torch.bool), float("-inf"))
    return F.cross_entropy(scores, torch.arange(len(z)).roll(len(z0)))


@pytest.mark.parametrize("frozen", [(), (0,), (1,), (0, 1)])
def test_nt_xent_equals_its_paper(frozen):
    leaves = [features(11, 6), features(11, 6), torch.tensor(0.3, dtype=torch.float64).requires_grad_()]
    for i in frozen:
        leaves[i].requires_grad_(False)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    z0, z1, temperature = leaves
    same_gradients(sk.nt_xent(z0, z1, temperature=temperature), nt_xent(z0, z1, temperature), wanted)


@pytest.mark.parametrize("bias", [None, -1.5])
@pytest.mark.parametrize("loss", ["clip", "siglip"])
def test_clip_and_siglip_equal_open_clip(loss, bias):
    image, text = features(10, 12, normalised=True), features(10, 12, normalised=True)
    scale = torch.tensor(20.0, dtype=torch.float64, requires_grad=True)
    leaves = [image, text, scale]
    if bias is not None:
        bias = torch.tensor(bias, dtype=torch.float64, requires_grad=True)
        leaves.append(bias)
    theirs = peers.open_clip_losses()
    if loss == "clip":
        want = theirs.ClipLoss()(image, text, scale, bias)
        same_gradients(sk.clip_loss(image, text, scale, bias), want, leaves)
    else:
        want = theirs.SigLipLoss()(image, text, scale, bias)
        same_gradients(sk.siglip_loss(image, text, scale, bias), want, leaves)


def test_supervised_contrastive_equals_pytorch_metric_learning():
    labels = torch.tensor([0, 1, 0, 2, 2, 0, 1, 3, 2])  # 3 is alone: no positive, left out of the mean
    z = features(9, 7)
    got = sk.contrastive_energy(
        z, z, query_ids=labels, same_id="positive", exclude_self=True, normalize=True, logit_scale=1 / 0.1
    )
    same_gradients(got, peers.supervised_contrastive(0.1)(z, labels), [z], rtol=1e-7)


def test_supervised_contrastive_equals_its_paper():
    """L_out of Khosla et al. 2020."""
    labels = torch.tensor([0, 1, 0, 2, 2, 0, 1, 2])
    z = features(8, 7)
    unit = F.normalize(z, dim=1)
    scores = (unit @ unit.T / 0.3).masked_fill(torch.eye(8, dtype=torch.bool), float("-inf"))
    logprob = scores.log_softmax(1)
    rows = []
    for i, p in itertools.product(range(8), range(8)):
        if i != p and labels[i] == labels[p]:
            rows.append(-logprob[i, p] / ((labels == labels[i]).sum() - 1))
    got = sk.contrastive_energy(
        z, z, query_ids=labels, same_id="positive", exclude_self=True, normalize=True, logit_scale=1 / 0.3
    )
    same_gradients(got, torch.stack(rows).sum() / 8, [z])


def test_modules_call_their_functions():
    x, y, negatives = features(6, 5), features(6, 5), features(6, 3, 5)
    options = {"energy": "sigmoid", "logit_scale": 3.0, "logit_bias": -1.0, "normalize": True, "reduction": "none"}
    torch.testing.assert_close(
        sk.nn.ContrastiveLoss(**options)(x, y, negatives=negatives),
        sk.contrastive_energy(x, y, negatives=negatives, **options),
    )
    torch.testing.assert_close(
        sk.nn.InfoNCELoss(0.2, negative_mode="paired")(x, y, negatives),
        sk.info_nce(x, y, negatives, temperature=0.2, negative_mode="paired"),
    )
    torch.testing.assert_close(sk.nn.NTXentLoss(0.2)(x, y), sk.nt_xent(x, y, temperature=0.2))
    torch.testing.assert_close(
        sk.nn.ClipLoss(5.0, normalize=True)(x, y),
        sk.contrastive_energy(x, y, direction="symmetric", logit_scale=5.0, normalize=True),
    )
    torch.testing.assert_close(sk.nn.SigLipLoss(4.0, -3.0)(x, y), sk.siglip_loss(x, y, 4.0, -3.0))
    torch.testing.assert_close(sk.nn.ClipLoss()(x, y, 3.0), sk.clip_loss(x, y, 3.0))
    torch.testing.assert_close(sk.nn.SigLipLoss()(x, y, 3.0, 1.0), sk.siglip_loss(x, y, 3.0, 1.0))


def test_a_learned_scale_of_the_general_module_is_a_parameter():
    scale = torch.nn.Parameter(torch.tensor(3.0, dtype=torch.float64))
    module = sk.nn.ContrastiveLoss(logit_scale=scale)
    assert list(module.parameters()) == [scale]
    module(features(6, 5), features(6, 5)).backward()
    assert scale.grad != 0


def test_a_clamped_scale_still_gets_a_gradient():
    x = features(6, 5, dtype=torch.float32, normalised=True)
    module = sk.nn.ClipLoss(1 / 0.07, max_logit_scale=100.0)
    with torch.no_grad():
        module.log_scale.fill_(7.0)
    module(x, -x).backward()  # the worst pairs possible: a smaller scale is better
    torch.testing.assert_close(module.logit_scale(), torch.tensor(100.0))
    assert module.log_scale.grad > 0
    module.eval()
    with torch.no_grad():
        module.log_scale.fill_(7.0)
    torch.testing.assert_close(module.logit_scale(), torch.tensor(100.0))
    assert module.log_scale == 7.0
    # The function does not clamp.
    want = F.cross_entropy(1000.0 * x @ x.T, torch.arange(6))
    torch.testing.assert_close(sk.clip_loss(x, x, 1000.0), want)
