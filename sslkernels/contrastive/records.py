"""What the raw operators of the contrastive energies take and give."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sslkernels.contrastive.score_tiles import SOFTMAX
from sslkernels.core.dtypes import accumulation_dtype


class PairInputs(NamedTuple):
    """key None: the queries, which designate each other (i designates j where j designates i). positive (N,) int64,
    None: i; `NO_POSITIVE`, `INVALID_POSITIVE` as in `designated`. self_index (N,) int64: the key that is the query
    itself, which is no candidate. logit_scale, logit_bias: (1,), accumulation dtype."""

    query: Tensor
    key: Tensor | None
    bank: Tensor | None
    negatives: Tensor | None
    negatives_mask: Tensor | None
    positive: Tensor | None
    self_index: Tensor | None
    query_ids: Tensor | None
    key_ids: Tensor | None
    logit_scale: Tensor
    logit_bias: Tensor | None


class PairOptions(NamedTuple):
    """rows, columns: the directions of the loss; in_batch: the keys of other queries are candidates."""

    energy: int
    rows: bool
    columns: bool
    in_batch: bool
    ids_positive: bool
    normalize: bool
    label_smoothing: float
    margin: float


class PairWanted(NamedTuple):
    """Which gradients are asked for."""

    query: bool
    key: bool
    bank: bool
    negatives: bool
    logit_scale: bool
    logit_bias: bool


class PairState(NamedTuple):
    """What a softmax's backward needs, else empty: the log-sum-exp of each row's other candidates, that of each key's
    column, and that of each row's column without its own pair."""

    row_others: Tensor
    column_lse: Tensor
    column_others: Tensor


class PairStatistics(NamedTuple):
    """Per row lse, positive, beaten (int64), and the scalars alignment and uniformity; empty without statistics."""

    lse: Tensor
    positive: Tensor
    beaten: Tensor
    alignment: Tensor
    uniformity: Tensor


class PairGradients(NamedTuple):
    """In the dtype of the tensor they belong to, but float16 query, key and bank in float32; logit_scale and logit_bias
    (1,) in the accumulation dtype; those of tensors that are not wanted are empty. The true gradients are these times
    `scale` (0-d)."""

    query: Tensor
    key: Tensor
    bank: Tensor
    negatives: Tensor
    logit_scale: Tensor
    logit_bias: Tensor
    scale: Tensor


def empty_state(inputs: PairInputs, options: PairOptions) -> PairState:
    query = inputs.query
    acc = accumulation_dtype(query.dtype)
    rows = query.shape[0] if options.energy == SOFTMAX else 0
    keys = inputs.key.shape[0] if inputs.key is not None and options.energy == SOFTMAX else 0
    return PairState(
        query.new_empty(rows if options.rows else 0, dtype=acc),
        query.new_empty(keys if options.columns else 0, dtype=acc),
        query.new_empty(rows if options.columns else 0, dtype=acc),
    )


def empty_statistics(query: Tensor, stats: bool) -> PairStatistics:
    acc = accumulation_dtype(query.dtype)
    count = query.shape[0] if stats else 0
    return PairStatistics(
        query.new_empty(count, dtype=acc),
        query.new_empty(count, dtype=acc),
        query.new_empty(count, dtype=torch.int64),
        query.new_empty(() if stats else 0, dtype=acc),
        query.new_empty(() if stats else 0, dtype=acc),
    )


def empty_gradients(inputs: PairInputs, wanted: PairWanted) -> PairGradients:
    query = inputs.query
    acc = accumulation_dtype(query.dtype)

    def like(tensor: Tensor | None, want: bool, keep_half: bool = False) -> Tensor:
        if tensor is None or not want:
            return query.new_empty(0)
        return torch.empty_like(tensor, dtype=tensor.dtype if keep_half else gradient_dtype(tensor))

    return PairGradients(
        like(inputs.query, wanted.query),
        like(inputs.key, wanted.key),
        like(inputs.bank, wanted.bank),
        like(inputs.negatives, wanted.negatives, keep_half=True),
        query.new_empty(1, dtype=acc),
        query.new_empty(1, dtype=acc),
        query.new_empty((), dtype=acc),
    )


def gradient_dtype(tensor: Tensor) -> torch.dtype:
    """Without `scale` the gradient of a float16 tensor may exceed float16."""
    return torch.float32 if tensor.dtype == torch.float16 else tensor.dtype
