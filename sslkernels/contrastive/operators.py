"""The raw operators of the contrastive energies: their signatures, and the kernels of each backend.

A decorated function only allocates what the operator returns; `plan` and `rank_plan` compute it, with the `PairKernels`
of the backend.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from sslkernels.contrastive import plan, rank_plan
from sslkernels.contrastive.pair_rows import INVALID_POSITIVE
from sslkernels.contrastive.records import (
    PairGradients,
    PairInputs,
    PairOptions,
    PairState,
    PairStatistics,
    PairWanted,
    RankOptions,
    RankState,
    empty_gradients,
    empty_rank_state,
    empty_state,
    empty_statistics,
)
from sslkernels.contrastive.score_tiles import PairKernels, ReferencePairs
from sslkernels.contrastive.tile_backends import CudaPairs, NativePairs, TritonPairs
from sslkernels.core import checks
from sslkernels.core.dtypes import accumulation_dtype
from sslkernels.core.operator import operator

Results = tuple[Tensor, PairState, PairStatistics, PairGradients]
# CUDA has no kernels for tiles: it runs only what has none, which is per-query negatives without shared candidates.
WITH_TILES = {"reference": ReferencePairs(), "cpu": NativePairs(), "triton": TritonPairs()}
WITHOUT_TILES = {**WITH_TILES, "cuda": CudaPairs()}


def _fwd(
    kernels: PairKernels,
    inputs: PairInputs,
    coefficient: Tensor | None,
    options: PairOptions,
    wanted: PairWanted,
    stats: bool,
) -> Results:
    keys = inputs.query.shape[0] if inputs.key is None else inputs.key.shape[0]
    _check_indices(inputs, keys)
    return plan.forward(kernels, inputs, coefficient, options, wanted, stats)


def _ranks_fwd(
    kernels: PairKernels, inputs: PairInputs, options: PairOptions, over: RankOptions, stats: bool
) -> tuple[Tensor, RankState, PairStatistics]:
    _check_indices(inputs, 0 if inputs.key is None else inputs.key.shape[0])
    return rank_plan.forward(kernels, inputs, options, over, stats)


def _check_indices(inputs: PairInputs, keys: int) -> None:
    negatives, positive = inputs.negatives, inputs.positive
    if negatives is not None and not negatives.is_floating_point() and negatives.device.type == "cpu":
        _check_negatives(negatives, keys + (0 if inputs.bank is None else inputs.bank.shape[0]))
    if positive is not None and positive.device.type == "cpu" and bool((positive == INVALID_POSITIVE).any()):
        # The public function names the index, but cannot read it in a compiled graph or under vmap.
        raise ValueError(f"contrastive_energy: positive must be in [0, {keys}); got an index out of range")


def _check_negatives(negatives: Tensor, rows: int) -> None:
    for index in map(int, negatives.aminmax() if negatives.numel() else ()):
        if not -1 <= index < rows:
            must = f"be in [0, {rows}), or -1 for none"
            checks.fail(ValueError, "contrastive_energy", "negatives", must, index)


def _empty_results(
    inputs: PairInputs, coefficient: Tensor | None, options: PairOptions, wanted: PairWanted, stats: bool
) -> Results:
    query = inputs.query
    loss = query.new_empty(query.shape[0], dtype=accumulation_dtype(query.dtype))
    gradients = empty_gradients(inputs, PairWanted() if coefficient is None else wanted)
    return loss, empty_state(inputs, options), empty_statistics(query, stats), gradients


def _implementations(function: Callable[..., Any], kernels: dict[str, PairKernels]) -> dict[str, Callable[..., Any]]:
    return {backend: partial(function, k) for backend, k in kernels.items()}


def _flops(inputs: PairInputs, options: PairOptions, wanted: PairWanted, keys: int | None = None) -> int:
    """One matmul for the scores of each kind of candidate, and one for each wanted gradient that they have. keys: how
    many keys there are; None: as many as `inputs` has."""
    rows, dim = inputs.query.shape
    wants_key = wanted.query if inputs.key is None else wanted.key
    if keys is None:
        keys = (inputs.query if inputs.key is None else inputs.key).shape[0]
    matmuls = (keys if options.in_batch else 1) * (1 + wanted.query + wants_key)
    if inputs.bank is not None:
        matmuls += inputs.bank.shape[0] * (1 + wanted.query + wanted.bank)
    if inputs.negatives is not None:
        of_features = wanted.negatives or (not inputs.negatives.is_floating_point() and (wants_key or wanted.bank))
        matmuls += inputs.negatives.shape[1] * (1 + wanted.query + of_features)
    return 2 * rows * dim * matmuls


def _fwd_flops(
    inputs: PairInputs, coefficient: Tensor | None, options: PairOptions, wanted: PairWanted, stats: bool
) -> int:
    return _flops(inputs, options, wanted if coefficient is not None else PairWanted())


def _bwd_flops(
    grad_loss: Tensor, inputs: PairInputs, state: PairState, options: PairOptions, wanted: PairWanted
) -> int:
    return _flops(inputs, options, wanted)


@operator("contrastive_energy", _implementations(_fwd, WITH_TILES), native_ops=NativePairs.OPS, flops=_fwd_flops)
def contrastive_fwd(
    inputs: PairInputs, coefficient: Tensor | None, options: PairOptions, wanted: PairWanted, stats: bool
) -> tuple[Tensor, PairState, PairStatistics, PairGradients]:
    """Losses (N,), state and statistics, and the gradients of sum(coefficient * loss) that are wanted."""
    return _empty_results(inputs, coefficient, options, wanted, stats)


@operator(
    "contrastive_energy", _implementations(plan.backward, WITH_TILES), native_ops=NativePairs.OPS, flops=_bwd_flops
)
def contrastive_bwd(
    grad_loss: Tensor, inputs: PairInputs, state: PairState, options: PairOptions, wanted: PairWanted
) -> PairGradients:
    """The gradients of sum(grad_loss * loss), from scores computed again."""
    return empty_gradients(inputs, wanted)


@operator("info_nce", _implementations(_fwd, WITHOUT_TILES), native_ops=CudaPairs.OPS, flops=_fwd_flops)
def per_query_contrastive_fwd(
    inputs: PairInputs, coefficient: Tensor | None, options: PairOptions, wanted: PairWanted, stats: bool
) -> tuple[Tensor, PairState, PairStatistics, PairGradients]:
    """`contrastive_fwd` where queries have per-query negatives alone."""
    return _empty_results(inputs, coefficient, options, wanted, stats)


@operator("info_nce", _implementations(plan.backward, WITHOUT_TILES), native_ops=CudaPairs.OPS, flops=_bwd_flops)
def per_query_contrastive_bwd(
    grad_loss: Tensor, inputs: PairInputs, state: PairState, options: PairOptions, wanted: PairWanted
) -> PairGradients:
    """`contrastive_bwd` where queries have per-query negatives alone."""
    return empty_gradients(inputs, wanted)


def _ranks_fwd_flops(inputs: PairInputs, options: PairOptions, over: RankOptions, stats: bool) -> int:
    return _flops(inputs, options, PairWanted(), sum(over.keys))


def _ranks_bwd_flops(
    grad_loss: Tensor,
    inputs: PairInputs,
    state: RankState,
    options: PairOptions,
    over: RankOptions,
    wanted: PairWanted,
) -> int:
    return _flops(inputs, options, wanted, sum(over.keys))


@operator(
    "contrastive_energy",
    _implementations(_ranks_fwd, WITH_TILES),
    native_ops=NativePairs.OPS,
    flops=_ranks_fwd_flops,
)
def contrastive_ranks_fwd(
    inputs: PairInputs, options: PairOptions, over: RankOptions, stats: bool
) -> tuple[Tensor, RankState, PairStatistics]:
    """`contrastive_fwd` over the ranks of a process group, for losses (n,) of this rank's rows. query, key, bank,
    negatives by index and bank_mask are the rank's own; positive, self_index, key_ids, candidate_mask and key_mask are
    about the keys of all ranks."""
    query = inputs.query
    loss = query.new_empty(query.shape[0], dtype=accumulation_dtype(query.dtype))
    return loss, empty_rank_state(inputs, options, over), empty_statistics(query, stats)


@operator(
    "contrastive_energy",
    _implementations(rank_plan.backward, WITH_TILES),
    native_ops=NativePairs.OPS,
    flops=_ranks_bwd_flops,
)
def contrastive_ranks_bwd(
    grad_loss: Tensor,
    inputs: PairInputs,
    state: RankState,
    options: PairOptions,
    over: RankOptions,
    wanted: PairWanted,
) -> PairGradients:
    """The gradients of the sum over all ranks of sum(grad_loss * loss), from scores computed again. Those of the scale
    and the bias are parts, of which the ranks' sum is the gradient."""
    return empty_gradients(inputs, wanted)
