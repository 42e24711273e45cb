"""The positives of a contrastive energy: which key each query is to be close to, and who is a candidate."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sslkernels.contrastive.records import PairInputs, PairOptions

# Rows without a positive, and rows whose index was out of range.
NO_POSITIVE, INVALID_POSITIVE = -1, -2
# Elements of a block of rows: small enough for its temporaries in the accumulation dtype, large on a GPU, where each
# block costs launches.
BLOCK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 24}


class Positives:
    """The key that is each row's positive.

    has: rows with a positive; counted: those and the invalid rows, whose loss is NaN; rows_of_key: how many rows have
    a key as their positive. row_labels, key_labels: int32 labels of the pair, of the sample itself and of its id, as in
    `score_tiles.Labels`. row_candidates, column_candidates: how many scores a row and a column have, the positive
    included; row_positives, column_positives: how many of these are positives.
    """

    def __init__(self, inputs: PairInputs, options: PairOptions) -> None:
        positive, self_index = inputs.positive, inputs.self_index
        device = inputs.query.device
        rows = inputs.query.shape[0]
        keys = rows if inputs.key is None else inputs.key.shape[0]
        self.rows = rows
        self.in_order = positive is None
        if positive is None:
            self.index: slice | Tensor = slice(0, rows)
            self.has = torch.ones(rows, dtype=torch.bool, device=device)
            self.counted = self.has
        else:
            # Rows without a positive get distinct keys: sums by key process the rows of one key one after another.
            self.index = torch.where(positive < 0, torch.arange(rows, device=device) % max(keys, 1), positive)
            self.has = positive >= 0
            self.counted = positive != NO_POSITIVE
        self.invalid = self.counted & ~self.has

        key_index = torch.arange(keys, dtype=torch.int32, device=device)
        row_positive = key_index[:rows] if positive is None else positive.to(torch.int32)
        self.row_labels: list[Tensor | None] = [row_positive, None, None]
        self.key_labels: list[Tensor | None] = [key_index, None, None]
        row_out = torch.zeros(rows, dtype=torch.int64, device=device)
        column_out = torch.zeros(keys, dtype=torch.int64, device=device)
        if self_index is not None:
            self.row_labels[1], self.key_labels[1] = self_index.to(torch.int32), key_index
            row_out = row_out + 1
            column_out = _index_add(column_out, self_index, torch.ones_like(row_out))
        self.row_positives = self.has.long()
        self.rows_of_key = self.scatter_add(self.has.long(), torch.zeros_like(column_out))
        self.column_positives = self.rows_of_key
        if inputs.query_ids is not None and options.in_batch:
            query_ids, key_ids = inputs.query_ids.long(), inputs.key_ids.long()
            self.row_labels[2], self.key_labels[2] = _codes(query_ids, key_ids)
            same_row, same_column = _occurrences(query_ids, key_ids), _occurrences(key_ids, query_ids)
            if self_index is not None:
                itself = (query_ids == key_ids[self_index]).long()
                same_row, same_column = same_row - itself, _index_add(same_column, self_index, -itself)
            with_same_id = (self.has & (query_ids == self.gather(key_ids))).long()
            same_row = same_row - with_same_id
            same_column = same_column - self.scatter_add(with_same_id, torch.zeros_like(same_column))
            if options.ids_positive:
                self.row_positives = self.row_positives + same_row
                self.column_positives = self.column_positives + same_column
            else:
                row_out, column_out = row_out + same_row, column_out + same_column
        self.row_candidates = keys - row_out if options.in_batch else self.has.long()
        self.column_candidates = rows - column_out

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
        (keys,) of columns without positives and the scores (rows,) of the positives."""
        score = torch.where(self.has, score, float("-inf"))
        if self.in_order or others.shape[0] == 0:
            lse = others.clone()
            lse[: self.rows] = torch.logaddexp(others[: self.rows], score)
            return lse, self.gather(others)
        # A key may be the positive of several rows, each of which is then a candidate of the others.
        largest = others.scatter_reduce(0, self.index, score, "amax", include_self=True)
        shift = torch.where(largest == float("-inf"), 0, largest)
        part = (score - shift[self.index]).exp()
        positives = self.scatter_add(part, torch.zeros_like(shift))
        rest = (others - shift).exp()
        lse = shift + (rest + positives).log()
        shared = shift[self.index] + (rest[self.index] + (positives[self.index] - part).clamp(min=0)).log()
        return lse, torch.where(self.rows_of_key[self.index] > 1, shared, others[self.index])


def _index_add(total: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """total[index] += values, in a fixed order even for an index that occurs several times."""
    if total.is_cuda:  # index_put_ sorts; index_add_ would be atomic
        return total.index_put_((index,), values, accumulate=True)
    return total.index_add_(0, index, values)


def row_blocks(values: Tensor) -> Iterator[slice]:
    """Slices of the rows of `values` (rows, width) whose temporaries are small."""
    count, width = values.shape
    rows = max(BLOCK_ELEMENTS.get(values.device.type, BLOCK_ELEMENTS["cuda"]) // max(width, 1), 1)
    for begin in range(0, count, rows):
        yield slice(begin, min(begin + rows, count))


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


def _occurrences(values: Tensor, among: Tensor) -> Tensor:
    """How often each of `values` occurs in `among`."""
    ordered = among.sort().values
    return torch.searchsorted(ordered, values, right=True) - torch.searchsorted(ordered, values)


def _codes(query_ids: Tensor, key_ids: Tensor) -> tuple[Tensor, Tensor]:
    """int32 codes, equal where the ids are; -1 for an id that no key has."""
    ordered = key_ids.sort().values
    if ordered.shape[0] == 0:
        return torch.full_like(query_ids, -1, dtype=torch.int32), key_ids.to(torch.int32)
    code = torch.searchsorted(ordered, query_ids).clamp(max=ordered.shape[0] - 1)
    found = ordered[code] == query_ids
    return torch.where(found, code, -1).to(torch.int32), torch.searchsorted(ordered, key_ids).to(torch.int32)
