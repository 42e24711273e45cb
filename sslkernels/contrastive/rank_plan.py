"""The contrastive energies over the ranks of a process group, of which each computes its queries' scores with all keys.

A block is the scores of a rank's queries with the keys of some rank: each is computed once in the world, by the rank of
its queries, and a second time for the gradients. The keys of all ranks are gathered, and are then one block; or they
travel round the ranks in a ring, a block from each, and no rank has them all. What there is of numbers for each key or
pair (ids, masks, inverse norms, scores of positives, weights, sums of columns) is combined over all ranks in both.

The sums of rows are complete on their rank, the sums of columns are reduced. In backward every rank has the weights of
all losses, so that the gradient of its queries is complete, and the gradients of keys are summed over the ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from sslkernels.contrastive.gradients import FeatureGradients
from sslkernels.contrastive.pair_rows import (
    HINGE,
    INVALID_POSITIVE,
    NO_POSITIVE,
    SIGMOID,
    SOFTMAX,
    ColumnSums,
    FeatureGradient,
    LossRows,
    PositivePairs,
    SideGrad,
    row_blocks,
)
from sslkernels.contrastive.pair_setup import PairIndex, PairSetup, Positives
from sslkernels.contrastive.plan import Plan
from sslkernels.contrastive.records import (
    PairGradients,
    PairInputs,
    PairOptions,
    PairState,
    PairStatistics,
    PairWanted,
    RankOptions,
    RankState,
    empty_rank_state,
    empty_statistics,
)
from sslkernels.contrastive.score_tiles import Masks, PairKernels, SideLabels, Tile
from sslkernels.contrastive.statistics import running_sums
from sslkernels.contrastive.steps import Candidates, Steps, TileSpec, at, shared_bank
from sslkernels.core.ranks import Ranks, circulate, gathered, group_named, reduced_over, scattered_sum


def forward(
    kernels: PairKernels, inputs: PairInputs, options: PairOptions, over: RankOptions, stats: bool
) -> tuple[Tensor, RankState, PairStatistics]:
    """Losses of this rank's rows, what backward needs, and statistics. inputs: as in `contrastive_ranks_fwd`."""
    setup = RankSetup(kernels, inputs, options, over, stats=stats)
    plan = RankPlan(kernels, setup, PairWanted(), stats)
    plan.sum_up()
    statistics = empty_statistics(setup.query, False) if plan.statistics is None else plan.statistics.results()
    return plan.loss, plan.rank_state(), statistics


def backward(
    kernels: PairKernels,
    grad_loss: Tensor,
    inputs: PairInputs,
    state: RankState,
    options: PairOptions,
    over: RankOptions,
    wanted: PairWanted,
) -> PairGradients:
    """The gradients of the sum over all ranks of sum(grad_loss * loss), from scores computed again."""
    setup = RankSetup(kernels, inputs, options, over, grad_loss, any(wanted), state=state)
    plan = RankPlan(kernels, setup, wanted, False)
    plan.restore_ranks(state)
    plan.add_gradients()
    return plan.grads.results()


class _AllPairs(PairIndex):
    """The positives of the rows of all ranks, with the counts of `Positives` for columns that are needed."""

    def __init__(self, positive: Tensor, keys: int, column_positives: Tensor, column_candidates: Tensor) -> None:
        super().__init__(positive, positive.shape[0], keys, positive.device)
        self.column_positives, self.column_candidates = column_positives, column_candidates


class RankSetup(PairSetup):
    """The rows are this rank's; key are its keys, key_norm the inverse norms of the keys of all ranks. features: as
    `RankState.keys`."""

    def __init__(
        self,
        kernels: PairKernels,
        inputs: PairInputs,
        options: PairOptions,
        over: RankOptions,
        grad_loss: Tensor | None = None,
        wants_gradients: bool = False,
        stats: bool = False,
        state: RankState | None = None,
    ) -> None:
        self.over, self.state = over, state
        group = group_named(over.group)
        rank = dist.get_rank(group)
        self.queries_of, self.keys_of = Ranks(group, rank, over.queries), Ranks(group, rank, over.keys)
        self.own, self.own_keys = self.queries_of.rows_of(rank), self.keys_of.rows_of(rank)
        coefficient = None if grad_loss is None else gathered(grad_loss, self.queries_of)
        super().__init__(kernels, inputs, options, coefficient, wants_gradients, stats)

    def _set_positives(self) -> None:
        inputs, options, state = self.inputs, self.options, self.state
        self.keys = self.keys_of.total
        self.positives = Positives(inputs, options, self.keys)
        if state is not None:
            every = (state.pair_positive, self.keys, state.column_positives, state.column_candidates)
        else:
            nothing = inputs.positive.new_empty(0)
            counts = [nothing, nothing]
            if options.columns and options.ids_positive:
                counts[0] = reduced_over(self.positives.column_positives.clone(), self.keys_of)
            if options.columns and options.label_smoothing > 0:
                counts[1] = reduced_over(self.positives.column_candidates.clone(), self.keys_of)
            every = (gathered(inputs.positive, self.queries_of), self.keys, *counts)
        self.pairs = _AllPairs(*every)

    def _used_keys(self) -> Tensor:
        return (self.inputs.key_mask | (self.pairs.rows_of_key > 0))[self.own_keys]

    def inverse_key_norm(self, kernels: PairKernels) -> Tensor:
        if self.state is not None:
            return self.state.key_norm
        return gathered(super().inverse_key_norm(kernels), self.keys_of)

    def wire(self) -> Tensor:
        """This rank's keys as they are sent: in the dtype of the matmuls, or as they were given if that is smaller."""
        smaller = self.inputs.key.dtype.itemsize < self.dtype.itemsize
        return self.key.to(self.inputs.key.dtype) if smaller else self.key

    def _partners(self) -> PositivePairs:
        positive, has, over = self.inputs.positive, self.positives.has, self.over
        if over.ring and not over.remote:
            self.features = self.key.new_empty(0, self.key.shape[1])
            norm = None if self.key_norm is None else self.key_norm[self.own_keys]
            return PositivePairs(
                self.query, self.key, self.query_norm, norm, torch.where(has, positive - self.own_keys.start, positive)
            )
        if self.state is not None:
            self.features = self.state.keys
        else:
            self.features = self._positives_round_the_ring() if over.ring else gathered(self.wire(), self.keys_of)
        key, norm = self.features.to(self.dtype), self.key_norm
        if over.ring:
            norm = None if norm is None else self.positives.gather(norm)
            positive = torch.where(has, torch.arange(self.count, device=positive.device), positive)
        return PositivePairs(self.query, key, self.query_norm, norm, positive)

    def _positives_round_the_ring(self) -> Tensor:
        """The positives (n, D) of the rows, wherever they are."""
        own, positive = self.wire(), self.inputs.positive
        found = own.new_zeros(self.count, own.shape[1])

        def use(rank: int, block: Tensor, _: Tensor | None) -> None:
            rows = self.keys_of.rows_of(rank)
            if block.shape[0]:
                here = (positive >= rows.start) & (positive < rows.stop)
                of_block = block[(positive - rows.start).clamp(0, block.shape[0] - 1)]
                torch.where(here.unsqueeze(1), of_block, found, out=found)

        circulate(own, self.keys_of, use)
        return found

    def _pair_score(self) -> Tensor:
        return gathered(self.score, self.queries_of) if self.state is None else self.state.pair_score

    def positives_as_negatives(self, rows: slice) -> Tensor | None:
        dtype = self.dtype if self.by_index else self.negatives.dtype
        index, own = self.inputs.positive[rows], self.inputs.key
        key = self.partners.key
        if not self.over.remote:
            index = index - self.own_keys.start
            key = key if self.over.ring else key[self.own_keys]
            key = key if self.by_index else own
        elif self.over.ring:
            index = self.partners.positive[rows]
        if key.shape[0] == 0:
            return None
        return key[index.clamp(0, key.shape[0] - 1)].unsqueeze(1).to(dtype)

    def hinge_columns(self) -> int:
        return self.keys

    def _by_hinge_column(self, of_pairs: Tensor, otherwise: float) -> Tensor:
        # A key is the positive of one row at most.
        column = torch.where(self.pairs.has, self.pairs.index, self.keys)
        return of_pairs.new_full((self.keys + 1,), otherwise).scatter(0, column, of_pairs)[: self.keys]

    def block(self, columns: slice, features: Tensor, gradient: Tensor | None) -> Candidates:
        """The candidates that `columns` selects from the keys of all ranks."""
        options, inputs = self.options, self.inputs
        labels = SideLabels(*(at(label, columns) for label in self.positives.key_labels))
        mask = inputs.candidate_mask
        masks = Masks(None if mask is None else mask[:, columns], None, at(inputs.key_mask, columns))
        norm = at(self.key_norm, columns)
        return Candidates(
            features, norm, labels, options.rows, options.columns, keys=True, gradient=gradient, masks=masks,
            first=columns.start,
        )  # fmt: skip


class _RankGradients(FeatureGradients):
    """key: the sum of the ranks' gradients of this rank's keys, once all have added theirs."""

    setup: RankSetup

    def __init__(self, kernels: PairKernels, setup: RankSetup, wanted: PairWanted) -> None:
        super().__init__(kernels, setup, wanted._replace(key=False))
        self.wanted = wanted
        if setup.by_index and setup.wants_gradients and wanted.key:
            self.negatives = setup.query.new_empty(setup.negatives.shape, dtype=setup.acc)

    def add_positives(self, total: Tensor, columns: slice) -> None:
        """Adds the gradients of the scores of positives among the keys `columns` to the gradient of these keys."""
        setup, index, factor = self.setup, self.setup.inputs.positive, self.positive_score
        here = (index >= columns.start) & (index < columns.stop)
        among = PairIndex(
            torch.where(here, index - columns.start, NO_POSITIVE), setup.count, total.shape[0], index.device
        )
        if setup.query_norm is not None:
            pair_norm = setup.query_norm * setup.positives.gather(setup.key_norm)
            factor = torch.where(factor != 0, factor * pair_norm, 0)
        for rows in row_blocks(setup.query):
            part = factor[rows].unsqueeze(1)
            among.scatter_add(torch.where(part != 0, part * setup.query[rows], 0), total, rows)

    def _key_gradient(self) -> Tensor:
        setup = self.setup
        norm = None if setup.key_norm is None else setup.key_norm[setup.own_keys]
        gradient = FeatureGradient(self.key, setup.key, norm, extra=self._gathered_gradient(0, self.key))
        return self._finish(gradient, setup.inputs.key)


class RankPlan(Plan):
    setup: RankSetup
    grads: _RankGradients

    def _is_one_tile(self, stats: bool) -> bool:
        return False  # a block of keys after the other

    def _gradients(self, wanted: PairWanted, one_product: bool) -> _RankGradients:
        return _RankGradients(self.kernels, self.setup, wanted)

    def _candidates(self, stats: bool) -> Iterator[Candidates]:
        return shared_bank(self.setup, self.grads)

    def _empty_state(self) -> PairState:
        state = empty_rank_state(self.setup.inputs, self.setup.options, self.setup.over)
        return PairState(state.row_others, state.column_lse, state.column_others)

    def sum_up(self) -> None:
        setup, softmax = self.setup, self.setup.options.energy == SOFTMAX
        if self.statistics is not None and setup.over.ring and setup.over.remote:
            # Ranks compare the scores of all blocks with the positive's, which may be in the last one.
            self._visit(lambda columns, keys, _: self._walk([setup.block(columns, keys, None)], self._score_positives))
        self._visit(lambda columns, keys, _: self._walk([setup.block(columns, keys, None)], self._add_sums))
        self._walk(self.steps.candidates, self._add_sums)
        self._finish_rows(slice(0, setup.count))
        if setup.options.rows and setup.options.energy == HINGE:
            self.state.row_others.copy_(self.row_sums.active)
        if not setup.options.columns:
            return
        self._reduce_columns()
        if softmax:
            self._add_shared_columns()
            return
        own = setup.positives
        columns = ColumnSums(*(None if v is None else own.gather(v) for v in self.column_sums))
        self.state.column_others.copy_(columns.active)
        self._add_hinge_columns(columns, self.loss)

    def _walk(
        self, candidates: list[Candidates], use: Callable[[TileSpec, Tile], None], gradient: bool = False
    ) -> None:
        """Calls use(spec, tile) with the tiles of the candidates, whose products are computed. gradient: as in
        `PairKernels.tile_shape`."""
        if not candidates:
            return
        steps = Steps(self.kernels, self.setup, candidates)
        for step in steps.lay_out(gradient, whole_rows=self.statistics is not None):
            steps.begin(step)
            for spec, tile in step.tiles:
                use(spec, tile)

    def _score_positives(self, spec: TileSpec, tile: Tile) -> None:
        """The scores of positives as their tiles compute them."""
        index = at(self.statistics.positive_index, spec.rows) - spec.among_all.start
        self.kernels.positives_in_tile(tile, index, at(self.statistics.positive_score, spec.rows))

    def _visit(self, use: Callable[[slice, Tensor, Tensor | None], None], sums: bool = False) -> Tensor | None:
        """Calls use(columns, keys, total) with all keys, block by block. sums: this rank's rows of the sum of the
        ranks' totals, to which `use` adds, are the result."""
        setup, ranks = self.setup, self.setup.keys_of
        if setup.over.ring:
            return circulate(
                setup.wire(),
                ranks,
                lambda rank, keys, total: use(ranks.rows_of(rank), keys.to(setup.dtype), total),
                setup.acc if sums else None,
            )
        keys = setup.partners.key
        total = torch.zeros_like(keys, dtype=setup.acc) if sums else None
        use(slice(0, ranks.total), keys, total)
        return None if total is None else scattered_sum(total, ranks, setup.acc)

    def _reduce_columns(self) -> None:
        """The sums of columns over the queries of all ranks."""
        sums, ranks = self.column_sums, self.setup.keys_of
        if sums.max is not None:
            largest = reduced_over(sums.max.clone(), ranks, dist.ReduceOp.MAX)
            sums.sum.mul_(torch.where(largest == sums.max, 0, sums.max - largest).double().exp())
            sums.max.copy_(largest)
        for values in sums[1:]:
            if values is not None:
                reduced_over(values, ranks)

    def _add_hinge_columns(self, sums: ColumnSums, loss: Tensor) -> None:
        """sums: of the column of each row's key."""
        setup = self.setup
        positive = setup.inputs.positive
        sums.sum.masked_fill_(positive == INVALID_POSITIVE, float("nan"))
        side = SideGrad(weight=setup.weight) if setup.wants_gradients else SideGrad()
        columns = LossRows(sums, setup.score, setup.positive_u, positive, None, None, side)
        self._add_losses(columns, slice(0, setup.count), None, SideGrad(), loss)

    def rank_state(self) -> RankState:
        setup = self.setup
        pairs, features = setup.pairs, setup.features
        norm = setup.score.new_empty(0) if setup.key_norm is None else setup.key_norm
        counts = (pairs.column_positives, pairs.column_candidates)
        return RankState(*self.state, pairs.positive, setup.pair_score, *(n.clone() for n in counts), norm, features)

    def restore_ranks(self, state: RankState) -> None:
        """Uses the state of a forward in place of sums."""
        setup, options = self.setup, self.setup.options
        if options.energy == SOFTMAX:
            self.restore(PairState(state.row_others, state.column_lse, state.column_others))
            return
        every, unused = slice(0, setup.count), torch.zeros_like(self.loss)

        def sums_with(active: Tensor) -> ColumnSums:
            sums = running_sums(setup, setup.count, False)
            return sums if options.energy == SIGMOID else sums._replace(active=active)

        if options.rows:
            if setup.negatives is not None:
                threshold = setup.row_threshold
                self._add_negatives(every, None if threshold is None else threshold.double())
            self._add_row_losses(every, sums_with(state.row_others), None, unused)
        if options.columns:
            self._add_hinge_columns(sums_with(state.column_others), unused)

    def add_gradients(self) -> None:
        setup, grads = self.setup, self.grads
        if not setup.wants_gradients:
            return

        def use(columns: slice, keys: Tensor, total: Tensor | None) -> None:
            self._walk([setup.block(columns, keys, total)], self._add_gradient, gradient=True)
            its_own = columns.start <= setup.own_keys.start and setup.own_keys.stop <= columns.stop
            if total is not None and (setup.over.remote or its_own):
                grads.add_positives(total, columns)

        grads.key = self._visit(use, sums=grads.wanted.key)
        self._walk(self.steps.candidates, self._add_gradient, gradient=True)
