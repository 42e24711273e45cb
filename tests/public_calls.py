"""A small call of every public op that has a gradient, for tests of properties that all ops share."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import sslkernels as sk

ROWS, DIM, CODES = 6, 8, 11


class PublicCall(NamedTuple):
    """run(*leaves) gives tensors, records or tuples of them; the leaves have the shapes `shapes`."""

    op: str
    run: Callable[..., Any]
    shapes: tuple[tuple[int, ...], ...]

    def leaves(self, device: str) -> list[Tensor]:
        return [torch.randn(shape, device=device, requires_grad=True) for shape in self.shapes]


def differentiable(results: Any) -> list[Tensor]:
    """The tensors with a gradient in a nested result."""
    if isinstance(results, Tensor):
        return [results] if results.requires_grad else []
    return [t for part in results or () for t in differentiable(part)] if isinstance(results, Sequence) else []


def left_over(step: Callable[[], Any]) -> int:
    """Objects that only Python's cycle collector frees, after a step whose caches are warm.

    What there was before stays frozen, so that the next collections look at little; `gc.unfreeze` ends that.
    """
    for _ in range(2):
        step()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        step()
        return gc.collect()
    finally:
        gc.enable()


def indices(like: Tensor, shape: int | tuple[int, ...], high: int) -> Tensor:
    """Indices that repeat and are in no order. No generator: torch 2.11 does not export one."""
    count = math.prod((shape,) if isinstance(shape, int) else shape)
    return (torch.arange(count, device=like.device) * 31 % 17 % high).reshape(shape)


def _targets(x: Tensor) -> Tensor:
    target = indices(x, ROWS, CODES)
    target[2] = -100
    return target


def _cross_entropy(**options: Any) -> PublicCall:
    return PublicCall("cross_entropy", lambda x: sk.cross_entropy(x, _targets(x), **options), ((ROWS, CODES),))


def _linear(**options: Any) -> PublicCall:
    def run(x: Tensor, w: Tensor, b: Tensor) -> Any:
        return sk.linear_cross_entropy(x, w, _targets(x), linear_bias=b, **options)

    return PublicCall("linear_cross_entropy", run, ((ROWS, DIM), (CODES, DIM), (CODES,)))


def _distillation(**options: Any) -> PublicCall:
    def run(x: Tensor, w: Tensor, b: Tensor, temperature: Tensor) -> Any:
        teacher, index = torch.ones(5, DIM, device=x.device).cumsum(1) / DIM, indices(x, (ROWS, 2), 6) - 1
        return sk.linear_distillation(
            x, w, teacher, w, student_bias=b, student_temperature=temperature.exp(), teacher_index=index, **options
        )

    return PublicCall("linear_distillation", run, ((ROWS, DIM), (CODES, DIM), (CODES,), ()))


def _pairs(function: str, *others: tuple[int, ...], **options: Any) -> PublicCall:
    def run(query: Tensor, key: Tensor, *rest: Tensor) -> Any:
        if function == "contrastive_energy" and rest:
            return sk.contrastive_energy(query, key, negatives=rest[0], **options)
        return getattr(sk, function)(query, key, *rest, **options)

    return PublicCall("contrastive_energy", run, (*((ROWS, DIM),) * 2, *others))


def _masked_pairs() -> PublicCall:
    """Masks of pairs, keys and bank, where each pair has a column of its own; and negatives by index."""

    def run(query: Tensor, key: Tensor, bank: Tensor) -> Any:
        pairs, positive = indices(query, (ROWS, ROWS), 2) > 0, indices(query, ROWS, ROWS)
        options = {"candidate_mask": pairs, "key_mask": pairs[0], "bank_mask": pairs[:2, 0], "positive": positive}
        drawn = indices(query, (ROWS, 3), ROWS + 2)
        return sk.contrastive_energy(
            query, key, bank=bank, negatives=drawn, energy="hinge", direction="symmetric", **options
        )

    return PublicCall("contrastive_energy", run, ((ROWS, DIM), (ROWS, DIM), (2, DIM)))


def _word2vec(**options: Any) -> PublicCall:
    def run(center: Tensor, context: Tensor) -> Any:
        pairs = (indices(center, ROWS, CODES), indices(center, ROWS, CODES), indices(center, (ROWS, 3), CODES))
        return sk.negative_sampling_loss(*pairs, center, context, **options)

    return PublicCall("negative_sampling_loss", run, ((CODES, DIM),) * 2)


def _glove(**options: Any) -> PublicCall:
    def run(u: Tensor, v: Tensor, b: Tensor, c: Tensor) -> Any:
        center, context = indices(u, ROWS, CODES), indices(u, (2, ROWS), CODES)[1]
        return sk.glove_loss(center, context, center + 1, u, v, b, c, **options)

    return PublicCall("glove_loss", run, (*((CODES, DIM),) * 2, *((CODES,),) * 2))


def _gaussian(*arguments: Any, **options: Any) -> PublicCall:
    def run(mean: Tensor, logvar: Tensor) -> Any:
        return sk.gaussian_rsample(mean, logvar, *arguments, seed=1, **options)

    return PublicCall("gaussian_rsample", run, ((ROWS, DIM),) * 2)


def _gumbel(function: str, *others: tuple[int, ...], **options: Any) -> PublicCall:
    return PublicCall(function, lambda *t: getattr(sk, function)(*t, seed=1, **options), ((ROWS, 2, CODES), *others))


def _latent(function: str, *shapes: tuple[int, ...], **options: Any) -> PublicCall:
    return PublicCall(function, lambda *t: getattr(sk, function)(*t, **options), shapes)


CALLS = {
    "cross_entropy": _cross_entropy(return_stats=True),
    "cross_entropy-none": _cross_entropy(reduction="none", return_stats=True),
    "linear_cross_entropy": _linear(return_stats=True),
    "linear_cross_entropy-compact": _linear(mode="compact"),
    "linear_cross_entropy-none": _linear(reduction="none", return_stats=True),
    "linear_distillation": _distillation(return_stats=True),
    "linear_distillation-compact": _distillation(mode="compact", divergence="kl"),
    "linear_distillation-none": _distillation(reduction="none", return_stats=True),
    "contrastive_energy": _pairs("contrastive_energy", return_stats=True),
    "contrastive_energy-none": _pairs("contrastive_energy", reduction="none", return_stats=True),
    "contrastive_energy-symmetric": _pairs("contrastive_energy", direction="symmetric", normalize=True),
    "contrastive_energy-hinge": _pairs("contrastive_energy", energy="hinge", reduction="none"),
    "contrastive_energy-masks": _masked_pairs(),
    "contrastive_energy-negatives": _pairs("contrastive_energy", (ROWS, 2, DIM)),
    "info_nce": _pairs("info_nce"),
    "info_nce-none": _pairs("info_nce", reduction="none"),
    "nt_xent": _pairs("nt_xent"),
    "clip_loss": _pairs("clip_loss", ()),
    "siglip_loss": _pairs("siglip_loss", (), ()),
    "negative_sampling_loss": _word2vec(),
    "negative_sampling_loss-none": _word2vec(reduction="none"),
    "negative_sampling_loss-sparse": _word2vec(reduction="none", sparse=True),
    "glove_loss": _glove(),
    "glove_loss-none": _glove(reduction="none"),
    "glove_loss-sparse": _glove(reduction="none", sparse=True),
    "gaussian_rsample": _gaussian(return_stats=True),
    "gaussian_rsample-samples": _gaussian(4),
    "gaussian_rsample-elements": _gaussian(kl="none"),
    "gaussian_rsample-elements-samples": _gaussian(2, kl="none", free_bits=0.1),
    "gaussian_kl": _latent("gaussian_kl", *((ROWS, DIM),) * 2, return_stats=True)._replace(op="gaussian_rsample"),
    "gaussian_kl-none": _latent("gaussian_kl", *((ROWS, DIM),) * 2, reduction="none")._replace(op="gaussian_rsample"),
    "gumbel_softmax": _gumbel("gumbel_softmax"),
    "gumbel_softmax-dim": _gumbel("gumbel_softmax", dim=0, hard=True),
    "gumbel_quantize": _gumbel("gumbel_quantize", (2, CODES, DIM), return_stats=True),
    "gumbel_quantize-soft": _gumbel("gumbel_quantize", (2, CODES, DIM), hard=False),
    "vector_quantize": _latent("vector_quantize", (ROWS, DIM), (CODES, DIM), codebook_weight=2.0),
    "vector_quantize-gather": _latent("vector_quantize", (ROWS, DIM), (CODES, DIM), straight_through=False),
    "free_energy": _latent("free_energy", (ROWS, CODES, 3), dim=1),
    "free_energy-min": _latent("free_energy", (ROWS, CODES), mode="min"),
    "prediction_energy": _latent("prediction_energy", (ROWS, 3, DIM), (ROWS, DIM), reduction="none"),
    "prediction_energy-soft": _latent("prediction_energy", (ROWS, 3, DIM), (ROWS, DIM), mode="soft"),
}
