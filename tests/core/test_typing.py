"""The types that a user's checker and editor see: `make lint` checks this file with mypy, and here it runs."""

from __future__ import annotations

import inspect
import typing
from typing import Any

import pytest
import torch
from torch import Tensor
from typing_extensions import assert_type

import sslkernels as sk


def test_a_loss_is_a_tensor_unless_statistics_are_asked_for() -> None:
    x, weight, target = torch.randn(4, 8), torch.randn(10, 8), torch.tensor([1, 2, 3, -100])
    assert_type(sk.cross_entropy(x, target), Tensor)
    assert_type(sk.linear_cross_entropy(x, weight, target, reduction="none", return_stats=False), Tensor)
    loss, stats = sk.linear_cross_entropy(x, weight, target, return_stats=True)
    assert_type(loss, Tensor)
    assert_type(stats, sk.CrossEntropyStats)
    assert stats.lse.shape == (4,)
    assert_type(sk.info_nce(x, x + 1, temperature=0.1), Tensor)
    assert_type(sk.nt_xent(x, x + 1), Tensor)
    assert_type(sk.clip_loss(x, x + 1, 10.0, return_stats=True), tuple[Tensor, sk.ContrastiveStats])
    assert_type(sk.siglip_loss(x, x + 1, 10.0, -1.0), Tensor)
    assert_type(sk.contrastive_energy(x, x + 1), Tensor)
    assert_type(sk.prediction_energy(x, torch.randn(4)), Tensor)
    assert_type(sk.gaussian_kl(x, x), Tensor)
    assert_type(sk.gaussian_rsample(x, x, return_stats=True), tuple[sk.GaussianSample, sk.LatentStats])
    assert_type(sk.gaussian_rsample(x, x, kl=None).z, Tensor)
    options: dict[str, Any] = {"student_temperature": 0.1}
    assert_type(sk.linear_distillation(x, weight, x, weight), Tensor)
    assert torch.is_tensor(sk.linear_distillation(x, weight, x, weight, **options))
    for flag in (False, True):
        either = sk.cross_entropy(x, target, return_stats=flag)
        assert_type(either, Tensor | tuple[Tensor, sk.CrossEntropyStats])
        assert isinstance(either, tuple) == flag


def test_records_and_modules() -> None:
    ids, x = torch.randint(5, 50, (2, 12)), torch.randn(6, 4)
    masked = sk.mask_tokens(ids, mask_id=4, vocab_size=50, seed=0)
    assert_type(masked, sk.MaskedTokens)
    assert_type(masked.labels, Tensor)
    assert_type(sk.vector_quantize(x, torch.randn(8, 4)), sk.Quantized)
    assert_type(sk.linear_sample(x, torch.randn(8, 4)), sk.LinearSample)
    assert_type(sk.free_energy(x), Tensor)
    assert_type(sk.random_normal((3,), seed=1), Tensor)
    loss = sk.nn.ClipLoss()
    assert_type(loss, sk.nn.ClipLoss)
    assert loss(x, x + 1).isfinite()
    with sk.use_backend("reference"):
        assert_type(sk.available_backends("cross_entropy", "cpu"), tuple[str, ...])


def test_a_type_checker_rejects_wrong_calls() -> None:
    """mypy fails on an unused `type: ignore`: each line is rejected by it, as it is when it runs."""
    x = torch.randn(4, 8)
    with pytest.raises(TypeError):
        sk.info_nce(x, x, temprature=0.1)  # type: ignore[call-overload]
    with pytest.raises((TypeError, ValueError)):
        sk.cross_entropy(x, torch.tensor([1, 2, 3, 4]), reduction=3)  # type: ignore[call-overload]
    with pytest.raises(TypeError):
        sk.nn.VectorQuantizer("8", 4)  # type: ignore[arg-type]


def public() -> dict[str, Any]:
    found = {name: getattr(sk, name) for name in sk.__all__}
    found |= {
        f"{face.__name__}.{name}": getattr(face, name) for face in (sk.nn, sk.distributions) for name in face.__all__
    }
    return {name: value for name, value in found.items() if callable(value)}


@pytest.mark.parametrize("name", public())
def test_every_public_signature_has_all_its_types(name: str) -> None:
    value = public()[name]
    functions = [value]
    if inspect.isclass(value):
        functions = [
            f for key, f in vars(value).items() if inspect.isfunction(f) and (key == "__init__" or key[0] != "_")
        ]
        assert typing.get_type_hints(value) is not None
    for function in functions:
        for parameter in list(inspect.signature(function).parameters.values())[inspect.isclass(value) :]:
            assert parameter.annotation is not parameter.empty, (function.__qualname__, parameter.name)
        assert "return" in typing.get_type_hints(function), function.__qualname__
