"""The designated pairs of a contrastive energy: which key each query is to be close to, and who is a candidate."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Rows that have no designated key, and rows whose index was out of range.
NO_POSITIVE, INVALID_POSITIVE = -1, -2
# Elements of a block of rows, whose temporaries in the accumulation dtype are small; on a GPU each costs launches.
BLOCK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 24}


class Designated:
    """positive (rows,) int64, or None: row i designates key i. self_index (rows,) int64, or None: the key that is the
    row itself, which is no candidate.

    has: rows that designate a key; counted: those and the invalid ones, whose loss is NaN.
    row_labels, key_labels: int32 labels of the designated pair, of the sample itself and of its id (`pair_scores`).
    row_candidates, column_candidates: how many scores a row and a column have, the designated among them;
    row_positives, column_positives: how many of these are positives; designations: rows that designate a key.
    """

    def __init__(
        self,
        positive: Tensor | None,
        self_index: Tensor | None,
        rows: int,
        keys: int,
        device: torch.device,
        query_ids: Tensor | None,
        key_ids: Tensor | None,
        *,
        in_batch: bool,
        ids_positive: bool,
    ) -> None:
        self.rows = rows
        self.in_order = positive is None
        if positive is None:
            self.index: slice | Tensor = slice(0, rows)
            self.has = torch.ones(rows, dtype=torch.bool, device=device)
            self.counted = self.has
        else:
            # Rows that designate nothing share no key, for sums by key take the rows of one key in turn.
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
            column_out = _added(column_out, self_index, torch.ones_like(row_out))
        self.row_positives = self.has.long()
        self.designations = self.scatter(self.has.long(), torch.zeros_like(column_out))
        self.column_positives = self.designations
        if query_ids is not None and in_batch:
            query_ids, key_ids = query_ids.long(), key_ids.long()
            self.row_labels[2], self.key_labels[2] = _codes(query_ids, key_ids)
            same_row, same_column = _occurrences(query_ids, key_ids), _occurrences(key_ids, query_ids)
            if self_index is not None:
                itself = (query_ids == key_ids[self_index]).long()
                same_row, same_column = same_row - itself, _added(same_column, self_index, -itself)
            designated = (self.has & (query_ids == self.of_columns(key_ids))).long()
            same_row = same_row - designated
            same_column = same_column - self.scatter(designated, torch.zeros_like(same_column))
            if ids_positive:
                self.row_positives = self.row_positives + same_row
                self.column_positives = self.column_positives + same_column
            else:
                row_out, column_out = row_out + same_row, column_out + same_column
        self.row_candidates = keys - row_out if in_batch else self.has.long()
        self.column_candidates = rows - column_out

    def of_columns(self, values: Tensor) -> Tensor:
        """values (keys, ...) -> (rows, ...): those of the key that each row designates; of some key where none."""
        if values.shape[0] == 0:
            return values.new_zeros(self.rows, *values.shape[1:])
        return values[self.index]

    def scatter(self, values: Tensor, total: Tensor, rows: slice | None = None) -> Tensor:
        """total (keys, ...) += values (rows, ...) of the rows that designate a key; in a fixed order."""
        rows = slice(0, self.rows) if rows is None else rows
        if total.shape[0] == 0:
            return total
        if self.in_order:
            total[rows] += values
            return total
        index = self.index[rows]
        values = values.masked_fill(~self.has[rows].view(-1, *[1] * (values.dim() - 1)), 0)
        return _added(total, index, values)

    def log_sum_exp(self, others: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
        """(lse of each key's column, lse of each row's column without its own pair), from `others` (keys,), the
        log-sum-exp without designated pairs, and the scores (rows,) of these."""
        score = torch.where(self.has, score, float("-inf"))
        if self.in_order or others.shape[0] == 0:
            lse = others.clone()
            lse[: self.rows] = torch.logaddexp(others[: self.rows], score)
            return lse, self.of_columns(others)
        # Several rows may designate a key: each is a candidate of the others.
        largest = others.scatter_reduce(0, self.index, score, "amax", include_self=True)
        shift = torch.where(largest == float("-inf"), 0, largest)
        part = (score - shift[self.index]).exp()
        designated = self.scatter(part, torch.zeros_like(shift))
        rest = (others - shift).exp()
        lse = shift + (rest + designated).log()
        shared = shift[self.index] + (rest[self.index] + (designated[self.index] - part).clamp(min=0)).log()
        return lse, torch.where(self.designations[self.index] > 1, shared, others[self.index])


def _added(total: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """total[index] += values, in a fixed order also where an index occurs several times."""
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
    """For each row the next row of its id, in a circle; `NO_POSITIVE` for an id that occurs once."""
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
    place = torch.searchsorted(ordered, query_ids).clamp(max=ordered.shape[0] - 1)
    found = ordered[place] == query_ids
    return torch.where(found, place, -1).to(torch.int32), torch.searchsorted(ordered, key_ids).to(torch.int32)
