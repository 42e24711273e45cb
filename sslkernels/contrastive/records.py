"""Records that the raw operators of the contrastive energies take and return."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sslkernels.contrastive.pair_rows import SIGMOID, SOFTMAX
from sslkernels.core.dtypes import accumulation_dtype


class PairInputs(NamedTuple):
    """Features and numbers of a contrastive energy, shaped as in `contrastive_energy`.

    key: None stands for the queries, whose positives must then be mutual: if j is the positive of i, i is the positive
    of j. negatives: (N, K, D), or (N, K) int64 or int32, rows of the keys followed by the bank. positive (N,) int64:
    the row of each query's key, `NO_POSITIVE` or `INVALID_POSITIVE`; None: row i. self_index (N,) int64: the key that
    is the query itself, which is not a candidate. candidate_mask: with any strides. logit_scale, logit_bias: one
    element each; the raw operators take them as (1,) in the accumulation dtype.
    """

    query: Tensor
    key: Tensor | None
    bank: Tensor | None
    negatives: Tensor | None
    negatives_mask: Tensor | None
    positive: Tensor | None
    self_index: Tensor | None
    query_ids: Tensor | None
    key_ids: Tensor | None
    bank_ids: Tensor | None
    candidate_mask: Tensor | None
    key_mask: Tensor | None
    bank_mask: Tensor | None
    logit_scale: Tensor
    logit_bias: Tensor | None


class PairOptions(NamedTuple):
    """rows, columns: the directions of the loss; in_batch: whether the keys of other queries are candidates;
    ids_positive: whether equal ids make extra positives; compute_dtype: the dtype of the matmuls."""

    energy: int
    rows: bool
    columns: bool
    in_batch: bool
    ids_positive: bool
    normalize: bool
    label_smoothing: float
    margin: float
    compute_dtype: torch.dtype


class PairWanted(NamedTuple):
    """Which gradients to compute."""

    query: bool = False
    key: bool = False
    bank: bool = False
    negatives: bool = False
    logit_scale: bool = False
    logit_bias: bool = False


class PairState(NamedTuple):
    """Saved for the backward of a softmax, empty for other energies; float64: the log-sum-exp of each row without its
    positive, of each key's column where keys may be the positives of several rows, and of each row's column without its
    own pair."""

    row_others: Tensor
    column_lse: Tensor
    column_others: Tensor


class RankOptions(NamedTuple):
    """group: the name of the process group; queries, keys: how many of them each rank has; ring: whether the blocks of
    keys travel round the ranks, instead of being gathered; remote: whether the positive of a row may be the key of
    another rank."""

    group: str
    queries: tuple[int, ...]
    keys: tuple[int, ...]
    ring: bool
    remote: bool


class RankState(NamedTuple):
    """A loss over ranks saves this for backward. This rank has n rows; all ranks have N rows and M keys.

    row_others (n,), column_lse (M,), column_others (N,): as in `PairState`; for hinge, row_others and column_others
    (n,) count the negatives with a cost, in the row and in the column of its key. pair_positive, pair_score (N,): the
    positive of each of the N rows, and its score. column_positives, column_candidates (M,) int64: as in
    `pair_setup.Positives`, over the N rows. key_norm (M,): the inverse norms of the keys. keys: the keys (M, D); in a
    ring the positives (n, D) of this rank's rows, if they may be keys of another rank. A field is empty if the loss
    does not need it.
    """

    row_others: Tensor
    column_lse: Tensor
    column_others: Tensor
    pair_positive: Tensor
    pair_score: Tensor
    column_positives: Tensor
    column_candidates: Tensor
    key_norm: Tensor
    keys: Tensor


class PairStatistics(NamedTuple):
    """Per row: lse, positive, num_above_positive and num_equal_positive (int64); the scalars alignment and uniformity.
    All are empty unless statistics are wanted."""

    lse: Tensor
    positive: Tensor
    num_above_positive: Tensor
    num_equal_positive: Tensor
    alignment: Tensor
    uniformity: Tensor


class PairGradients(NamedTuple):
    """Gradients divided by `scale` (0-d), empty where not wanted.

    Each has the dtype of its tensor, with two exceptions: the gradients of a float16 query, key or bank are float32,
    and the gradients of logit_scale and logit_bias are (1,) in the accumulation dtype.
    """

    query: Tensor
    key: Tensor
    bank: Tensor
    negatives: Tensor
    logit_scale: Tensor
    logit_bias: Tensor
    scale: Tensor


def empty_state(inputs: PairInputs, options: PairOptions) -> PairState:
    query = inputs.query
    rows = query.shape[0] if options.energy == SOFTMAX else 0
    shared = inputs.key is not None and inputs.positive is not None and options.energy == SOFTMAX
    keys = inputs.key.shape[0] if shared else 0
    return PairState(
        query.new_empty(rows if options.rows else 0, dtype=torch.float64),
        query.new_empty(keys if options.columns else 0, dtype=torch.float64),
        query.new_empty(rows if options.columns else 0, dtype=torch.float64),
    )


def empty_rank_state(inputs: PairInputs, options: PairOptions, over: RankOptions) -> RankState:
    query, acc = inputs.query, accumulation_dtype(inputs.query.dtype)
    (rows, dim), pairs, keys = query.shape, sum(over.queries), sum(over.keys)
    softmax, counts = options.energy == SOFTMAX, keys if options.columns else 0
    column_others = pairs if softmax else rows
    features = keys if not over.ring else rows if over.remote else 0
    return RankState(
        query.new_empty(rows if options.rows and options.energy != SIGMOID else 0, dtype=torch.float64),
        query.new_empty(keys if options.columns and softmax else 0, dtype=torch.float64),
        query.new_empty(column_others if options.columns else 0, dtype=torch.float64),
        query.new_empty(pairs, dtype=torch.int64),
        query.new_empty(pairs, dtype=acc),
        query.new_empty(counts if options.ids_positive else 0, dtype=torch.int64),
        query.new_empty(counts if options.label_smoothing > 0 else 0, dtype=torch.int64),
        query.new_empty(keys if options.normalize else 0, dtype=acc),
        query.new_empty(features, dim, dtype=options.compute_dtype),
    )


def empty_statistics(query: Tensor, stats: bool) -> PairStatistics:
    acc = accumulation_dtype(query.dtype)
    count = query.shape[0] if stats else 0
    return PairStatistics(
        query.new_empty(count, dtype=acc),
        query.new_empty(count, dtype=acc),
        query.new_empty(count, dtype=torch.int64),
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
    """Before `PairGradients.scale` is applied, the gradient of a float16 tensor may overflow float16."""
    return torch.float32 if tensor.dtype == torch.float16 else tensor.dtype
