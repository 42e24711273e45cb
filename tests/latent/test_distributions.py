"""FusedNormal: what torch.distributions.Normal gives, with samples and divergences of the package."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch.distributions import Independent, MixtureSameFamily, Normal, kl_divergence

import sslkernels as sk
from sslkernels.latent.distributions import FusedNormal

pytestmark = pytest.mark.pairwise

OP = "gaussian_rsample"


@pytest.fixture
def pair(device):
    """A FusedNormal and the Normal that it stands for, float64, of batch shape (4, 3)."""
    loc, logvar = (torch.randn(4, 3, dtype=torch.float64, device=device, requires_grad=True) for _ in range(2))
    return FusedNormal(loc, logvar), Normal(loc, (logvar / 2).exp())


def test_it_is_a_normal(pair, device):
    fused, normal = pair
    assert isinstance(fused, Normal)
    assert fused.batch_shape == (4, 3)
    assert fused.event_shape == ()
    assert fused.has_rsample
    assert fused.support is normal.support
    value = torch.randn(5, 4, 3, dtype=torch.float64, device=device)
    share = torch.rand(5, 4, 3, dtype=torch.float64, device=device)
    for name in ("mean", "mode", "stddev", "variance", "loc", "scale"):
        torch.testing.assert_close(getattr(fused, name), getattr(normal, name))
    torch.testing.assert_close(fused.entropy(), normal.entropy())
    torch.testing.assert_close(fused.log_prob(value), normal.log_prob(value))
    torch.testing.assert_close(fused.cdf(value), normal.cdf(value))
    torch.testing.assert_close(fused.icdf(share), normal.icdf(share))
    for a, b in zip(
        *(torch.autograd.grad(p.log_prob(value).sum() + p.entropy().sum(), fused.logvar) for p in pair), strict=True
    ):
        torch.testing.assert_close(a, b)
    assert "FusedNormal(loc: " in repr(fused)


@pytest.mark.parametrize("shape", [(), (2,), (3, 2), (0,), (1, 1)])
def test_samples_equal_gaussian_rsample(backend, pair, shape):
    fused, _ = pair
    z = fused.rsample(torch.Size(shape), seed=3)
    assert z.shape == (*shape, 4, 3)
    assert z.is_contiguous()
    count = math.prod(shape)
    expected = sk.gaussian_rsample(fused.loc, fused.logvar, count, seed=3, kl=None).z.movedim(-2, 0).reshape(z.shape)
    assert torch.equal(z, expected)
    weight = torch.randn_like(z)
    leaves = (fused.loc, fused.logvar)
    for a, b in zip(*(torch.autograd.grad(s, leaves, weight) for s in (z, expected)), strict=True):
        torch.testing.assert_close(a, b)
    plain = fused.sample(shape, seed=3)
    assert torch.equal(plain, z)
    assert not plain.requires_grad


def test_generators(pair, device):
    fused, _ = pair
    generator = torch.Generator(device).manual_seed(2)
    first = fused.rsample((2,), generator=generator)
    assert not torch.equal(first, fused.rsample((2,), generator=generator))
    assert torch.equal(first, fused.rsample((2,), generator=generator.manual_seed(2)))
    torch.manual_seed(1)
    first = fused.sample()
    torch.manual_seed(1)
    assert torch.equal(first, fused.sample())


def test_divergences_are_registered(backend, pair, device):
    fused, normal = pair
    loc, scale = (torch.rand(3, dtype=torch.float64, device=device, requires_grad=True) for _ in range(2))
    other, fused_other = Normal(loc, scale), FusedNormal(loc, scale=scale)
    for p, q in ((fused, other), (fused, fused_other), (normal, fused_other)):
        got, expected = kl_divergence(p, q), kl_divergence(normal, other)
        torch.testing.assert_close(got, expected)
        leaves = (fused.loc, fused.logvar, loc, scale)
        grads = [torch.autograd.grad(kl.sum(), leaves, retain_graph=True) for kl in (got, expected)]
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b)
    torch.testing.assert_close(kl_divergence(other, fused), kl_divergence(other, normal))
    assert not kl_divergence(fused, fused).any()


def test_within_independent_and_mixtures(pair, device):
    fused, normal = pair
    joint, plain = Independent(fused, 1), Independent(normal, 1)
    value = torch.randn(4, 3, dtype=torch.float64, device=device)
    torch.testing.assert_close(joint.log_prob(value), plain.log_prob(value))
    torch.testing.assert_close(joint.entropy(), plain.entropy())
    assert joint.rsample((5,)).shape == (5, 4, 3)
    other = Independent(Normal(torch.zeros_like(value), torch.ones_like(value)), 1)
    torch.testing.assert_close(kl_divergence(joint, other), kl_divergence(plain, other))
    weights = torch.distributions.Categorical(torch.ones(4, 3, device=device))
    assert MixtureSameFamily(weights, fused).sample((2,)).shape == (2, 4)


def test_expand_numbers_and_scalars(pair, device):
    fused, _ = pair
    wide = fused.expand((2, 4, 3))
    assert wide.batch_shape == wide.rsample().shape == (2, 4, 3)
    assert Independent(fused, 1).expand((2, 4)).rsample().shape == (2, 4, 3)
    assert FusedNormal(0.0, 0.0).rsample((7,)).shape == (7,)
    assert FusedNormal(torch.zeros(3, 1, device=device), torch.zeros(2, device=device)).sample().shape == (3, 2)
    torch.testing.assert_close(kl_divergence(FusedNormal(1.0, scale=1.0), Normal(0.0, 1.0)), torch.tensor(0.5))
    again = copy.deepcopy(FusedNormal(torch.zeros(3), torch.ones(3)))
    assert torch.equal(again.sample(seed=1), FusedNormal(torch.zeros(3), torch.ones(3)).sample(seed=1))


def test_half_precision(device):
    loc = torch.randn(4, 3, device=device, dtype=torch.bfloat16)
    fused = FusedNormal(loc, torch.zeros_like(loc))
    assert fused.rsample((2,)).dtype == torch.bfloat16
    assert kl_divergence(fused, Normal(torch.zeros_like(loc), torch.ones_like(loc))).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(), (3,)], ids=str)
def test_the_divergence_to_a_normal_of_another_dtype(backend, dtype, shape, device):
    """As the prior `Normal(0.0, 1.0)`, which is float32."""
    fused = FusedNormal(*(torch.randn(4, 3, device=device).to(dtype) for _ in range(2)))
    other = Normal(torch.full(shape, 0.3, device=device), torch.full(shape, 1.7, device=device))
    exact = (
        Normal(fused.loc.double(), (fused.logvar.double() / 2).exp()),
        Normal(other.loc.double(), other.scale.double()),
    )
    for got, expected in (
        (kl_divergence(fused, other), kl_divergence(*exact)),
        (kl_divergence(other, fused), kl_divergence(*exact[::-1])),
    ):
        assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        tolerance = 1e-12 if dtype == torch.float64 else 1e-5
        torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)


def test_values_far_from_the_mean_of_a_narrow_distribution_keep_their_density():
    """Where the variance itself is below float32."""
    fused = FusedNormal(torch.zeros(1), torch.full((1,), -110.0))
    truth = Normal(torch.zeros(1, dtype=torch.float64), torch.full((1,), math.exp(-55), dtype=torch.float64))
    value = torch.tensor([3e-24])
    torch.testing.assert_close(fused.log_prob(value).double(), truth.log_prob(value.double()), rtol=1e-5, atol=0)


def test_errors():
    with pytest.raises(ValueError, match=r"^FusedNormal: logvar must be given, or else scale; got neither"):
        FusedNormal(0.0)
    with pytest.raises(ValueError, match=r"^FusedNormal: logvar must be given, or else scale; got both"):
        FusedNormal(0.0, 0.0, scale=1.0)
    with pytest.raises(ValueError, match="Expected parameter loc"):
        FusedNormal(torch.tensor([math.nan]), 0.0, validate_args=True)
    with pytest.raises(ValueError, match="Expected value argument"):
        FusedNormal(0.0, 0.0, validate_args=True).log_prob(torch.tensor(math.nan))
    with pytest.raises(TypeError, match=r"^FusedNormal: mean must have dtype"):
        FusedNormal(torch.tensor([1]), torch.tensor([0])).rsample()
    with pytest.raises(ValueError, match=r"^FusedNormal: generator must be None where seed is given"):
        FusedNormal(0.0, 0.0).rsample(seed=1, generator=torch.Generator())
