"""A contrastive loss before its scores: features, the positives and who is a candidate, weights of rows and columns."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sslkernels.contrastive.pair_rows import HINGE, NO_POSITIVE, SIGMOID, SOFTMAX, PositivePairs, SideGrad, row_blocks
from sslkernels.contrastive.records import PairInputs, PairOptions
from sslkernels.contrastive.score_tiles import PairKernels, SideLabels
from sslkernels.core.dtypes import accumulation_dtype


class PairSetup:
    """The parts of a contrastive loss that are known before the first tile.

    query, key, bank: features in the dtype of the matmuls; query_norm, key_norm, bank_norm: their inverse norms where
    they are normalised; mutual: key is query; negatives: the per-query negatives as given; by_index: whether these are
    indices of rows; drawn_from: the keys and the bank that they index. keys: how many columns the keys have. partners:
    each row's query and positive; positive_u, score: u and s of these. pairs, pair_score: the positives that have a
    part in columns, here of all rows, and their scores; own: which of them are of these rows.
    row_threshold, column_threshold: for hinge, the score above which a negative costs. has_loss: rows that have a loss;
    half: the share of one direction in the loss. row, column: the part of each side in the gradient of
    sum(coefficient * loss) / scale, without the references of a softmax; pair_weight, weight: coefficient * half /
    scale of each pair and of each row.
    """

    def __init__(
        self,
        kernels: PairKernels,
        inputs: PairInputs,
        options: PairOptions,
        coefficient: Tensor | None,
        wants_gradients: bool,
        stats: bool = False,
    ) -> None:
        self.inputs = inputs
        self.options = options
        self.wants_gradients = coefficient is not None and wants_gradients
        self.mutual = inputs.key is None
        self.acc = accumulation_dtype(inputs.query.dtype)
        self.dtype = options.compute_dtype
        # On a CPU a float16 matmul is about a thousand times slower than a float32 one.
        cpu_half = inputs.query.device.type == "cpu" and self.dtype == torch.float16
        # Products that are rounded to 8 bits do not say which of two close scores is larger.
        if cpu_half or (stats and kernels.rounds_products and self.dtype.itemsize == 2):
            self.dtype = torch.float32
        self.count = inputs.query.shape[0]
        self.query = inputs.query.to(self.dtype)
        self.key = self.query if inputs.key is None else inputs.key.to(self.dtype)
        self.bank = None if inputs.bank is None or not options.rows else inputs.bank.to(self.dtype)
        self.drawn_from = (self.key, self.bank)
        self._set_positives()
        if inputs.key_mask is not None:
            self.key = _finite_where_unused(self.key, self._used_keys())
        if inputs.bank_mask is not None:
            self.bank = _finite_where_unused(self.bank, inputs.bank_mask)
        self.negatives = inputs.negatives if options.rows else None
        self.by_index = self.negatives is not None and not self.negatives.is_floating_point()

        self.query_norm = self.key_norm = self.bank_norm = None
        self.positive_u = self.query.new_empty(self.count, dtype=self.acc)
        self.score = torch.empty_like(self.positive_u)
        of_scores = inputs.logit_scale, inputs.logit_bias, self.positive_u, self.score
        at_once = options.normalize and inputs.positive is None and not self.mutual
        if at_once:
            self.query_norm, self.key_norm = kernels.norms_and_scores(self.query, self.key, *of_scores)
        elif options.normalize:
            self.query_norm = kernels.inverse_norm(self.query, self.acc)
            self.key_norm = self.query_norm if self.mutual else self.inverse_key_norm(kernels)
        if options.normalize and self.bank is not None:
            self.bank_norm = kernels.inverse_norm(self.bank, self.acc)
        self.partners = self._partners()
        if not at_once:
            kernels.positive_scores(self.partners, *of_scores)
        self.pair_score = self._pair_score()
        self._set_thresholds()
        self._set_weights(coefficient)

    def _set_positives(self) -> None:
        self.positives = self.pairs = Positives(self.inputs, self.options)
        self.own = slice(0, self.count)
        self.keys = self.key.shape[0]

    def _used_keys(self) -> Tensor:
        return self.inputs.key_mask | (self.positives.rows_of_key > 0)

    def inverse_key_norm(self, kernels: PairKernels) -> Tensor:
        return kernels.inverse_norm(self.key, self.acc)

    def _partners(self) -> PositivePairs:
        return PositivePairs(self.query, self.key, self.query_norm, self.key_norm, self.inputs.positive)

    def _pair_score(self) -> Tensor:
        return self.score

    def positives_as_negatives(self, rows: slice) -> Tensor | None:
        """The positives of the rows as per-query negatives (rows, 1, D), or by index (rows, 1); None without keys."""
        key, index = self.query if self.mutual else self.inputs.key, self.positives.index
        if key.shape[0] == 0:
            return None
        if not self.by_index:
            return key[index][rows].unsqueeze(1).to(self.negatives.dtype)
        index = torch.arange(self.count, device=key.device)[index] if self.positives.in_order else index
        return index[rows].unsqueeze(1)

    @functools.cached_property
    def row_candidates(self) -> Tensor:
        """How many scores each row has, the positive included."""
        candidates = self.positives.row_candidates
        if self.bank is not None:
            mask = self.inputs.bank_mask
            candidates = candidates + (self.bank.shape[0] if mask is None else mask.sum())
            if not self.options.ids_positive:
                candidates = candidates - self.positives.same_id_in_bank
        if self.negatives is not None:
            mask = self.inputs.negatives_mask
            if self.by_index:
                mask = self.negatives >= 0 if mask is None else (self.negatives >= 0) & mask
            candidates = candidates + (self.negatives.shape[1] if mask is None else mask.sum(1))
        return candidates

    @functools.cached_property
    def has_loss(self) -> Tensor:
        every = self.options.energy == SIGMOID
        return torch.ones_like(self.positives.has) if every else self.positives.counted

    def _set_thresholds(self) -> None:
        self.row_threshold = self.column_threshold = None
        if self.options.energy == HINGE:
            threshold = (self.pair_score - self.options.margin).masked_fill(~self.pairs.counted, float("inf"))
            self.row_threshold = threshold if self.pairs is self.positives else threshold[self.own]
            self.column_threshold = self._by_hinge_column(threshold, float("inf"))

    def hinge_columns(self) -> int:
        return self.keys if self.positives.in_order else self.count

    def _by_hinge_column(self, of_pairs: Tensor, otherwise: float) -> Tensor:
        # One column per pair, because a key that is the positive of several rows has several thresholds.
        return F.pad(of_pairs, (0, self.hinge_columns() - self.count), value=otherwise)

    def _set_weights(self, coefficient: Tensor | None) -> None:
        """Sets scale, weight, row and column."""
        options, positives, pairs = self.options, self.positives, self.pairs
        self.half = 0.5 if options.rows and options.columns else 1.0
        self.scale = torch.ones((), dtype=self.acc, device=self.query.device)
        self.row, self.column = SideGrad(), SideGrad()
        if not self.wants_gradients:
            return
        weight = coefficient.to(self.acc)
        if not pairs.in_order and options.energy != SIGMOID:
            weight = torch.where(pairs.counted, weight, 0)
        if torch.float16 in (self.inputs.query.dtype, self.dtype) and weight.numel():
            # float16 gradients are divided by the largest coefficient: 1 / N would vanish in float16's subnormals.
            largest = weight.abs().max() * self.inputs.logit_scale.abs().clamp(min=1).reshape(())
            self.scale = torch.where(torch.isfinite(largest) & (largest > 0), largest, 1.0)
            weight = weight / self.scale
        self.pair_weight = weight if self.half == 1 else self.half * weight
        self.weight = self.pair_weight if pairs is positives else self.pair_weight[self.own]
        e, softmax = options.label_smoothing, options.energy == SOFTMAX

        def side(weight: Tensor, columns: bool) -> SideGrad:
            share = smoothing = None
            if options.ids_positive and softmax:
                count = pairs.column_positives if columns else positives.row_positives
                share = (1 - e) * weight / count.clamp(min=1)
            if e > 0:
                count = pairs.column_candidates if columns else self.row_candidates
                smoothing = e * weight / count.clamp(min=1)
            return SideGrad(weight, None, share, smoothing)

        if options.rows:
            self.row = side(self.weight, columns=False)._replace(reference=self.row_threshold)
        if options.columns and options.energy == HINGE:
            self.column = SideGrad(self._by_hinge_column(self.pair_weight, 0.0), self.column_threshold)
        elif options.columns:
            weight = self.pair_weight
            if not (pairs.in_order and self.keys == self.count):
                weight = pairs.scatter_add(weight, weight.new_zeros(self.keys))
            self.column = side(weight, columns=True)


class _Counts(NamedTuple):
    """How many candidates rows and columns have without positives, and how many pairs of one id the masks keep."""

    row_candidates: Tensor
    column_candidates: Tensor
    row_same_id: Tensor
    column_same_id: Tensor


class PairIndex:
    """The key that is each row's positive; positive (rows,) as in `PairInputs`.

    has: rows with a positive; counted: rows with a positive or an invalid one, whose loss is NaN; rows_of_key: how many
    rows have a key as their positive. Each is computed at its first access.
    """

    def __init__(self, positive: Tensor | None, rows: int, keys: int, device: torch.device) -> None:
        self.positive, self.rows, self.keys, self.device = positive, rows, keys, device
        self.in_order = positive is None

    @functools.cached_property
    def index(self) -> slice | Tensor:
        if self.positive is None:
            return slice(0, self.rows)
        # Rows without a positive get distinct keys: sums by key process the rows of one key one after another.
        spread = torch.arange(self.rows, device=self.device) % max(self.keys, 1)
        return torch.where(self.positive < 0, spread, self.positive)

    @functools.cached_property
    def has(self) -> Tensor:
        if self.positive is None:
            return torch.ones(self.rows, dtype=torch.bool, device=self.device)
        return self.positive >= 0

    @functools.cached_property
    def counted(self) -> Tensor:
        return self.has if self.positive is None else self.positive != NO_POSITIVE

    @functools.cached_property
    def rows_of_key(self) -> Tensor:
        return self.scatter_add(self.has.long(), self.has.new_zeros(self.keys, dtype=torch.int64))

    def gather(self, values: Tensor) -> Tensor:
        """values (keys, ...) -> (rows, ...): the value of each row's positive, of an arbitrary key for a row without
        one."""
        if values.shape[0] == 0:
            return values.new_zeros(self.rows, *values.shape[1:])
        return values[self.index]

    def scatter_add(self, values: Tensor, total: Tensor, rows: slice | None = None) -> Tensor:
        """total (keys, ...) += values (rows, ...) of the rows with a positive, in a fixed order."""
        rows = slice(0, self.rows) if rows is None else rows
        if total.shape[0] == 0:
            return total
        if self.in_order:
            total[rows] += values
            return total
        index = self.index[rows]
        values = values.masked_fill(~self.has[rows].view(-1, *[1] * (values.dim() - 1)), 0)
        return _index_add(total, index, values)

    def log_sum_exp(self, others: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
        """(lse of each key's column, lse of each row's column without its own pair), from the log-sum-exp `others`
        (keys,) of columns without positives and the scores (rows,) of the positives; all float64. A key may be the
        positive of several rows, each of which is then a candidate of the others."""
        score = torch.where(self.has, score, float("-inf"))
        if others.shape[0] == 0:
            return others.clone(), self.gather(others)
        largest = others.scatter_reduce(0, self.index, score, "amax", include_self=True)
        shift = torch.where(largest == float("-inf"), 0, largest)
        part = (score - shift[self.index]).exp()
        positives = self.scatter_add(part, torch.zeros_like(shift))
        rest = (others - shift).exp()
        lse = shift + (rest + positives).log()
        shared = shift[self.index] + (rest[self.index] + (positives[self.index] - part).clamp(min=0)).log()
        return lse, torch.where(self.rows_of_key[self.index] > 1, shared, others[self.index])


class Positives(PairIndex):
    """The key that is each row's positive, and who else is a candidate.

    row_labels, key_labels, bank_labels: as in `score_tiles.Labels`; the bank has ids alone. row_candidates,
    column_candidates: how many scores a row and a column have, the positive included; row_positives, column_positives:
    how many of these are positives. Few losses need all of these: each is computed at its first access. keys: how many
    there are, where that is not the number of rows of inputs.key.
    """

    def __init__(self, inputs: PairInputs, options: PairOptions, keys: int | None = None) -> None:
        self.inputs, self.options = inputs, options
        positive, device, rows = inputs.positive, inputs.query.device, inputs.query.shape[0]
        if keys is None:
            keys = rows if inputs.key is None else inputs.key.shape[0]
        super().__init__(positive, rows, keys, device)

        key_index = torch.arange(self.keys, dtype=torch.int32, device=device)
        row_positive = key_index[:rows] if positive is None else positive.to(torch.int32)
        row_id = key_id = bank_id = None
        self.has_ids = inputs.key_ids is not None and options.in_batch
        has_bank_ids = inputs.bank_ids is not None and options.rows
        if self.has_ids or has_bank_ids:
            given = [inputs.key_ids] * self.has_ids + [inputs.bank_ids] * has_bank_ids
            row_id, *codes = _codes(inputs.query_ids.long(), [ids.long() for ids in given])
            if has_bank_ids:
                bank_id = codes.pop()
            if self.has_ids:
                key_id = codes.pop()
        row_self = None if inputs.self_index is None else inputs.self_index.to(torch.int32)
        self.row_labels = SideLabels(row_positive, row_self, row_id)
        self.key_labels = SideLabels(key_index, None if row_self is None else key_index, key_id)
        self.bank_labels = SideLabels(id=bank_id)

    @functools.cached_property
    def same_id_counts(self) -> tuple[Tensor, Tensor]:
        """How many keys other than the positive and itself share each row's id, and how many rows each key's."""
        inputs = self.inputs
        if self.masked_counts is not None:
            return self.masked_counts.row_same_id, self.masked_counts.column_same_id
        query_ids, key_ids = inputs.query_ids.long(), inputs.key_ids.long()
        row, column = _occurrences(query_ids, key_ids), _occurrences(key_ids, query_ids)
        if inputs.self_index is not None:
            itself = (query_ids == key_ids[inputs.self_index]).long()
            row, column = row - itself, _index_add(column, inputs.self_index, -itself)
        positive = (self.has & (query_ids == self.gather(key_ids))).long()
        return row - positive, column - self.scatter_add(positive, torch.zeros_like(column))

    @functools.cached_property
    def same_id_in_bank(self) -> Tensor | int:
        """How many rows of the bank share each row's id."""
        inputs = self.inputs
        if inputs.bank_ids is None or not self.options.rows:
            return 0
        return _occurrences(inputs.query_ids.long(), inputs.bank_ids.long(), inputs.bank_mask)

    @functools.cached_property
    def masked_counts(self) -> _Counts | None:
        """Candidates of each row and column that no mask leaves out, counted in blocks of rows; None without masks."""
        pair, column = self.inputs.candidate_mask, self.inputs.key_mask
        if pair is None and column is None:
            return None
        counts = _Counts(*(self.has.new_zeros(n, dtype=torch.int64) for n in (self.rows, self.keys) * 2))
        if self.rows == 0 or self.keys == 0:
            return counts
        masks = [mask for mask in (pair, None if column is None else column.expand(self.rows, -1)) if mask is not None]
        for rows in row_blocks(masks[0], share=8):  # the sums of a block are over int64
            candidate = masks[0][rows] if len(masks) == 1 else masks[0][rows] & masks[1][rows]
            positive, itself, same = (
                None if row is None or key is None else row[rows].unsqueeze(1) == key
                for row, key in zip(self.row_labels, self.key_labels, strict=True)
            )
            candidate = candidate & ~positive
            if itself is not None:
                candidate &= ~itself
            if same is not None:
                same &= candidate
                counts.row_same_id[rows] = same.sum(1)
                counts.column_same_id.add_(same.sum(0))
                if not self.options.ids_positive:
                    candidate &= ~same
            counts.row_candidates[rows] = candidate.sum(1)
            counts.column_candidates.add_(candidate.sum(0))
        return counts

    @functools.cached_property
    def row_positives(self) -> Tensor:
        row, _ = self.same_id_counts if self._ids_are(positive=True) else (0, 0)
        return self.has.long() + row + (self.same_id_in_bank if self.options.ids_positive else 0)

    @functools.cached_property
    def column_positives(self) -> Tensor:
        _, column = self.same_id_counts if self._ids_are(positive=True) else (0, 0)
        return self.rows_of_key + column

    @functools.cached_property
    def row_candidates(self) -> Tensor:
        if not self.options.in_batch:
            return self.has.long()
        if self.masked_counts is not None:
            return self.has.long() + self.masked_counts.row_candidates
        row, _ = self.same_id_counts if self._ids_are(positive=False) else (0, 0)
        itself = 0 if self.inputs.self_index is None else 1
        return torch.full_like(self.has, self.keys - itself, dtype=torch.int64) - row

    @functools.cached_property
    def column_candidates(self) -> Tensor:
        if self.masked_counts is not None:
            return self.rows_of_key + self.masked_counts.column_candidates
        _, column = self.same_id_counts if self._ids_are(positive=False) else (0, 0)
        candidates = torch.full_like(self.rows_of_key, self.rows) - column
        if self.inputs.self_index is None:
            return candidates
        return _index_add(candidates, self.inputs.self_index, -torch.ones_like(self.inputs.self_index))

    def _ids_are(self, positive: bool) -> bool:
        return self.has_ids and self.options.ids_positive == positive


def _index_add(total: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """total[index] += values, in a fixed order even for an index that occurs several times."""
    if total.is_cuda:  # index_put_ sorts; index_add_ would be atomic
        return total.index_put_((index,), values, accumulate=True)
    return total.index_add_(0, index, values)


def next_of_same_id(ids: Tensor) -> Tensor:
    """For each row the next row of its id, cyclically; `NO_POSITIVE` for an id that occurs once."""
    count = ids.shape[0]
    if count == 0:
        return ids.long()
    ordered, order = ids.sort(stable=True)
    index = torch.arange(count, device=ids.device)
    starts = torch.ones_like(ordered, dtype=torch.bool)
    starts[1:] = ordered[1:] != ordered[:-1]
    first = torch.where(starts, index, 0).cummax(0).values
    last = ordered.roll(-1) != ordered
    last[-1] = True
    following = torch.where(last, first, index + 1)
    following = torch.where(following == index, NO_POSITIVE, order[following.clamp(max=count - 1)])
    return torch.empty_like(following).scatter_(0, order, following)


def _occurrences(values: Tensor, among: Tensor, counted: Tensor | None = None) -> Tensor:
    """How often each of `values` occurs in `among`, in its `counted` elements alone where these are given."""
    ordered, order = among.sort()
    begin, end = torch.searchsorted(ordered, values), torch.searchsorted(ordered, values, right=True)
    if counted is None:
        return end - begin
    before = F.pad(counted[order].cumsum(0), (1, 0))
    return before[end] - before[begin]


def _finite_where_unused(features: Tensor, used: Tensor) -> Tensor:
    """The features with zeros in place of inf and NaN in unused rows, which a matmul multiplies by gradients of 0."""
    return features.masked_fill(~(used.unsqueeze(1) | features.isfinite()), 0)


def _codes(query_ids: Tensor, others: list[Tensor]) -> list[Tensor]:
    """int32 codes of the queries and of each of `others`, equal where the ids are; -1 for an id that no other has."""
    ordered = (others[0] if len(others) == 1 else torch.cat(others)).sort().values
    if ordered.shape[0] == 0:
        return [torch.full_like(query_ids, -1, dtype=torch.int32), *(ids.to(torch.int32) for ids in others)]
    code = torch.searchsorted(ordered, query_ids).clamp(max=ordered.shape[0] - 1)
    found = ordered[code] == query_ids
    codes = (torch.searchsorted(ordered, ids).to(torch.int32) for ids in others)
    return [torch.where(found, code, -1).to(torch.int32), *codes]
