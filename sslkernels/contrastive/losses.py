"""The losses of contrastive learning by their usual names and arguments: options of `contrastive_energy`, run by
`pair_energy`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sslkernels.contrastive.autograd import CallConfig
from sslkernels.contrastive.energy import ContrastiveStats, EnergyOptions, PairTensors, pair_energy
from sslkernels.core import checks
from sslkernels.core.dtypes import accumulation_dtype
from sslkernels.core.operator import full
from sslkernels.core.overloads import returns_stats


@checks.with_python_numbers
@returns_stats(Tensor, ContrastiveStats)
def info_nce(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.1,
    negative_mode: str = "unpaired",
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
    on_empty: str = "nan",
    ids: Tensor | None = None,
    label_smoothing: float = 0.0,
    normalize: bool = True,
    process_group: Any = None,
    ring: bool = False,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, ContrastiveStats]:
    """InfoNCE of normalised features (van den Oord et al. 2018), as the package info-nce-pytorch computes it.

    Neither the scores of all queries and keys nor normalised copies of the features are ever materialised.

    Args:
        query: `(N, D)`; float32, bfloat16, float16 or float64, as all features.
        positive_key: `(N, D)`, the key of each query.
        negative_keys: None: the keys of the other queries; `(M, D)`: negatives that all queries share; `(N, K, D)`:
            negatives of each query, which no other query sees. With negatives given, the keys of other queries are no
            negatives.
        temperature: divides the scores; a number, or a tensor of one element, which gets its gradient.
        negative_mode: "unpaired" for negatives that all queries share, "paired" for per-query ones.
        reduction: "mean", "sum" or "none", which returns the losses `(N,)`.
        num_items: int or 0-d tensor, what "mean" divides by (for gradient accumulation).
        on_empty: the "mean" over no rows: "nan", or "zero" with gradients 0.
        ids: `(N,)` integers; other pairs of the same id are left out. None with negative_keys.
        label_smoothing: moves this share of the target to the mean over all candidates.
        normalize: divide every feature by its norm.
        process_group: as in `contrastive_energy`.
        ring: as in `contrastive_energy`.
        return_stats: also return `ContrastiveStats`, from the same pass.

    Raises `TypeError` and `ValueError` for an argument of the wrong type, dtype, shape or range.

    >>> import sslkernels as sk
    >>> query, key = torch.randn(8, 16, requires_grad=True), torch.randn(8, 16)
    >>> sk.info_nce(query, key, torch.randn(8, 5, 16), negative_mode="paired").backward()
    """
    name = "info_nce"
    checks.choice(name, "negative_mode", negative_mode, ("unpaired", "paired"))
    checks.tensor(name, "negative_keys", negative_keys, checks.FLOAT_DTYPES, optional=True)
    _check_pair(name, "query", query, "positive_key", positive_key)
    _check_ids(name, ids, query)
    paired = negative_mode == "paired"
    if negative_keys is not None:
        if ids is not None:
            checks.fail(ValueError, name, "ids", "be None with negative_keys", tuple(ids.shape))
        shape = "(N, K, D)" if paired else "(M, D)"
        dims = 3 if paired else 2
        checks.dims(name, "negative_keys", negative_keys, dims, f'{shape} in negative_mode="{negative_mode}"', dims)
        count, width = query.shape
        expected = (count, negative_keys.shape[1], width) if paired else (negative_keys.shape[0], width)
        checks.shape(name, "negative_keys", negative_keys, expected, shape)
        _check_like(name, "negative_keys", negative_keys, "query", query)
    negatives, bank = (negative_keys, None) if paired else (None, negative_keys)
    return pair_energy(
        PairTensors(query, positive_key, negatives=negatives, bank=bank, query_ids=ids, key_ids=ids),
        EnergyOptions(
            logit_scale=_inverse(name, temperature, query),
            normalize=normalize,
            label_smoothing=label_smoothing,
            in_batch=negative_keys is None,
        ),
        CallConfig(name, reduction, num_items, on_empty, process_group, ring, return_stats),
    )


@checks.with_python_numbers
@returns_stats(Tensor, ContrastiveStats)
def nt_xent(
    z0: Tensor,
    z1: Tensor,
    *,
    temperature: float | Tensor = 0.5,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
    on_empty: str = "nan",
    ids: Tensor | None = None,
    label_smoothing: float = 0.0,
    normalize: bool = True,
    process_group: Any = None,
    ring: bool = False,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, ContrastiveStats]:
    """NT-Xent of SimCLR (Chen et al. 2020): each of the 2 N views against its other view and all the rest.

    The rows are the views of z0, then the views of z1. The scores are symmetric: half of them are computed, a block of
    rows at a time, and each serves two rows; with `return_stats` all are computed.

    Args:
        z0: `(N, D)`, the first view of each sample; float32, bfloat16, float16 or float64.
        z1: `(N, D)`, the second view of each sample.
        temperature: divides the scores; a number, or a tensor of one element, which gets its gradient.
        reduction: "mean", "sum" or "none", which returns the losses `(2 N,)`.
        num_items: int or 0-d tensor, what "mean" divides by (for gradient accumulation).
        on_empty: the "mean" over no rows: "nan", or "zero" with gradients 0.
        ids: `(N,)` integers; views of other samples with the same id are left out.
        label_smoothing: moves this share of the target to the mean over all candidates.
        normalize: divide every view by its norm.
        process_group: as in `contrastive_energy`.
        ring: as in `contrastive_energy`.
        return_stats: also return `ContrastiveStats`, from the same pass.

    Raises `TypeError` and `ValueError` for an argument of the wrong type, dtype or shape.

    >>> import sslkernels as sk
    >>> views = torch.randn(8, 16, requires_grad=True), torch.randn(8, 16, requires_grad=True)
    >>> sk.nt_xent(*views, temperature=0.1).backward()
    """
    name = "nt_xent"
    _check_pair(name, "z0", z0, "z1", z1)
    count = z0.shape[0]
    partner = torch.arange(2 * count, device=z0.device).roll(count)
    _check_ids(name, ids, z0)
    views, view_ids = torch.cat([z0, z1]), None if ids is None else ids.repeat(2)
    # Without a key each symmetric score is computed once, for two rows. Statistics need all the scores of a row.
    key = views if return_stats else None
    return pair_energy(
        PairTensors(views, key, positive=partner, query_ids=view_ids),
        EnergyOptions(
            exclude_self=True,
            logit_scale=_inverse(name, temperature, z0),
            normalize=normalize,
            label_smoothing=label_smoothing,
        ),
        CallConfig(name, reduction, num_items, on_empty, process_group, ring, return_stats),
    )


@checks.with_python_numbers
@returns_stats(Tensor, ContrastiveStats)
def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None = None,
    *,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
    on_empty: str = "nan",
    ids: Tensor | None = None,
    label_smoothing: float = 0.0,
    normalize: bool = False,
    process_group: Any = None,
    ring: bool = False,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, ContrastiveStats]:
    """The loss of CLIP (Radford et al. 2021) on features that the caller normalised, as open_clip's `ClipLoss`.

    Half the cross-entropy of each image over all texts plus half the cross-entropy of each text over all images; the
    score matrix is never materialised.

    Args:
        image_features: `(N, D)`; float32, bfloat16, float16 or float64.
        text_features: `(N, D)`, row i belongs to row i of `image_features`.
        logit_scale: 1 / temperature, not clamped; a number, or a tensor of one element, which gets its exact gradient.
        logit_bias: a number, or a tensor of one element, whose gradient is 0.
        reduction: "mean", "sum" or "none", which returns the losses `(N,)`.
        num_items: int or 0-d tensor, what "mean" divides by (for gradient accumulation).
        on_empty: the "mean" over no rows: "nan", or "zero" with gradients 0.
        ids: `(N,)` integers; other pairs of the same id are left out.
        label_smoothing: moves this share of the target to the mean over all candidates.
        normalize: divide the features by their norms; False for features that the caller normalised.
        process_group: as in `contrastive_energy`.
        ring: as in `contrastive_energy`.
        return_stats: also return `ContrastiveStats`, from the same pass.

    Raises `TypeError` and `ValueError` for an argument of the wrong type, dtype or shape.

    >>> import sslkernels as sk
    >>> image, text = (torch.nn.functional.normalize(torch.randn(8, 16), dim=1) for _ in range(2))
    >>> loss = sk.clip_loss(image, text, logit_scale=1 / 0.07)
    """
    name = "clip_loss"
    _check_pair(name, "image_features", image_features, "text_features", text_features)
    _check_ids(name, ids, image_features)
    return pair_energy(
        PairTensors(image_features, text_features, query_ids=ids, key_ids=ids),
        EnergyOptions(
            direction="symmetric",
            logit_scale=logit_scale,
            logit_bias=logit_bias,
            normalize=normalize,
            label_smoothing=label_smoothing,
        ),
        CallConfig(name, reduction, num_items, on_empty, process_group, ring, return_stats),
    )


@checks.with_python_numbers
@returns_stats(Tensor, ContrastiveStats)
def siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor | None,
    *,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
    on_empty: str = "nan",
    ids: Tensor | None = None,
    label_smoothing: float = 0.0,
    normalize: bool = False,
    process_group: Any = None,
    ring: bool = False,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, ContrastiveStats]:
    """The loss of SigLIP (Zhai et al. 2023) on features that the caller normalised, as open_clip's `SigLipLoss`.

    The sum over all pairs of softplus(-+ score), over N, in three matmuls; the score matrix is never materialised.

    Args:
        image_features: `(N, D)`; float32, bfloat16, float16 or float64.
        text_features: `(N, D)`, row i belongs to row i of `image_features`.
        logit_scale: 1 / temperature; a number, or a tensor of one element, which gets its exact gradient.
        logit_bias: a number, or a tensor of one element, which gets its exact gradient.
        reduction: "mean", "sum" or "none", which returns the losses `(N,)`.
        num_items: int or 0-d tensor, what "mean" divides by (for gradient accumulation).
        on_empty: the "mean" over no rows: "nan", or "zero" with gradients 0.
        ids: `(N,)` integers; other pairs of the same id are left out.
        label_smoothing: must be 0: this loss has no distribution over candidates.
        normalize: divide the features by their norms; False for features that the caller normalised.
        process_group: as in `contrastive_energy`.
        ring: as in `contrastive_energy`.
        return_stats: also return `ContrastiveStats`, from the same pass.

    Raises `TypeError` and `ValueError` for an argument of the wrong type, dtype or shape.

    >>> import sslkernels as sk
    >>> image, text = (torch.nn.functional.normalize(torch.randn(8, 16), dim=1) for _ in range(2))
    >>> loss = sk.siglip_loss(image, text, logit_scale=10.0, logit_bias=-10.0)
    """
    name = "siglip_loss"
    _check_pair(name, "image_features", image_features, "text_features", text_features)
    _check_ids(name, ids, image_features)
    return pair_energy(
        PairTensors(image_features, text_features, query_ids=ids, key_ids=ids),
        EnergyOptions(
            energy="sigmoid",
            logit_scale=logit_scale,
            logit_bias=logit_bias,
            normalize=normalize,
            label_smoothing=label_smoothing,
        ),
        CallConfig(name, reduction, num_items, on_empty, process_group, ring, return_stats),
    )


def _check_pair(function: str, first_name: str, first: Tensor, second_name: str, second: Tensor) -> None:
    """Checks two tensors (N, D) of one shape, under the names of the public function's arguments."""
    for name, value in ((first_name, first), (second_name, second)):
        checks.tensor(function, name, value, checks.FLOAT_DTYPES)
        checks.dims(function, name, value, 2, "(N, D)", high=2)
    checks.shape(function, second_name, second, first.shape, f"{first_name}.shape")
    _check_like(function, second_name, second, first_name, first)


def _check_ids(function: str, ids: Tensor | None, features: Tensor) -> None:
    checks.tensor(function, "ids", ids, checks.INDEX_DTYPES, optional=True)
    checks.shape(function, "ids", ids, features.shape[:1], "(N,)")
    checks.same_device(function, "ids", ids, "the features", features.device)


def _check_like(function: str, name: str, value: Tensor, of: str, reference: Tensor) -> None:
    """`value` has the device of another argument and, outside autocast, its dtype."""
    checks.same_device(function, name, value, of, reference.device)
    if value.dtype != reference.dtype and not checks.autocast(reference.device):
        must = f"have the dtype of {of}, {reference.dtype}, outside autocast"
        checks.fail(TypeError, function, name, must, value.dtype)


def _inverse(function: str, temperature: float | Tensor, query: Tensor) -> Tensor:
    """1 / temperature as a tensor: torch 2.11 compiles a graph for each value of a quotient of Python numbers."""
    if isinstance(temperature, Tensor):
        checks.tensor(function, "temperature", temperature, checks.FLOAT_DTYPES)
        return temperature.reciprocal()
    checks.number(function, "temperature", temperature)
    if temperature == 0:
        checks.fail(ValueError, function, "temperature", "not be 0", temperature)
    return full((), temperature, accumulation_dtype(query.dtype), query.device, reciprocal=True)
