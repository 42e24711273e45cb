"""The order in which a plan processes its tiles: which candidates, which steps, and the memory of their products."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from sslkernels.contrastive.gradients import FeatureGradients
from sslkernels.contrastive.pair_rows import HINGE
from sslkernels.contrastive.pair_setup import PairSetup
from sslkernels.contrastive.score_tiles import Labels, Masks, PairKernels, SideLabels, Tile, workspace_bytes
from sslkernels.core.chunks import round_up

# Row blocks of a symmetric score matrix: each product serves two rows, except in the blocks on the diagonal. Fewer of
# them where they would have few rows: each costs about 0.1 ms on a CPU.
MUTUAL_ROW_BLOCKS = 16
MUTUAL_ROWS = 512


class Candidates(NamedTuple):
    """Candidates that all queries share: their features, inverse norms and labels.

    rows, columns: whether sums over each row's candidates and over each column's queries are part of the loss; keys:
    whether they are the keys, over which uniformity is summed; pairs: whether they have a column per pair. gradient:
    where their gradient accumulates. masks: of all rows and these candidates. first: where they begin among the
    columns that are summed.
    """

    values: Tensor
    norm: Tensor | None
    labels: SideLabels
    rows: bool = False
    columns: bool = False
    keys: bool = False
    pairs: bool = False
    gradient: Tensor | None = None
    masks: Masks = Masks()
    first: int = 0

    @property
    def in_loss(self) -> bool:
        return self.rows or self.columns


class TileSpec(NamedTuple):
    """A tile of a row block: which columns of the candidates, and what is summed over it. twice: the tile is on the
    diagonal and contains each pair of its rows in both orders."""

    candidates: Candidates
    rows: slice
    columns: slice
    rows_summed: bool
    columns_summed: bool
    twice: bool = False

    @property
    def among_all(self) -> slice:
        """The columns among those that are summed."""
        first = self.candidates.first
        return slice(self.columns.start + first, self.columns.stop + first) if first else self.columns


class Step(NamedTuple):
    """Tiles of one row block that are processed together. ends_rows: whether they are the last ones of their rows."""

    number: int
    rows: slice
    tiles: list[tuple[TileSpec, Tile]]
    ends_rows: bool


_Order = list[tuple[slice, list[TileSpec], bool]]


class Steps:
    """The steps of a plan. `lay_out` gives them; `begin` computes the products of one, unless they are in memory."""

    def __init__(
        self, kernels: PairKernels, setup: PairSetup, candidates: list[Candidates], one_tile: bool = False
    ) -> None:
        """one_tile: as `is_one_tile` says."""
        self.kernels = kernels
        self.setup = setup
        self.candidates = candidates
        self.one_tile = one_tile
        self.steps: list[Step] = []
        self.keeps_all = False  # whether each step has memory of its own
        self.computed: set[int] = set()  # the numbers of the steps whose products are in memory

    def lay_out(self, gradient: bool, whole_rows: bool) -> list[Step]:
        """The steps over all tiles. Kernels that keep products have the same ones in every pass.

        gradient: as in `PairKernels.tile_shape`; whole_rows: a step has all tiles of its rows.
        """
        if self.one_tile:
            self.steps = self.steps or [self._one_step()]
        elif not self.steps or not self.kernels.keeps_products(self.setup.query):
            self.steps = self._with_memory(self._order(gradient, whole_rows))
        return self.steps

    def begin(self, step: Step) -> None:
        if step.number in self.computed:
            return
        for _, tile in step.tiles:
            self.kernels.begin(tile)
        if self.one_tile or self.kernels.keeps_products(self.setup.query):
            self.computed = {*self.computed, step.number} if self.keeps_all else {step.number}

    def _one_step(self) -> Step:
        (candidates,), rows, columns = self.candidates, slice(0, self.setup.count), slice(0, self.setup.keys)
        spec = TileSpec(candidates, rows, columns, candidates.rows, candidates.columns)
        pitch = self.kernels.pitch(columns.stop, self.setup.query)
        products = self.setup.query.new_empty((rows.stop, pitch))
        if pitch != columns.stop:
            products = products[:, : columns.stop]
        return Step(0, rows, [(spec, self._tile(spec, products))], ends_rows=True)

    def _order(self, gradient: bool, whole_rows: bool) -> _Order:
        """(rows, tiles, whether the rows end) of each step."""
        setup, query = self.setup, self.setup.query
        columns = sum(candidates.values.shape[0] for candidates in self.candidates)
        shape, self.needs_products = self.kernels.tile_shape((setup.count, columns), query, gradient, whole_rows)
        height, width = shape
        if setup.mutual:
            rows = round_up(-(-setup.count // MUTUAL_ROW_BLOCKS), MUTUAL_ROWS // 2)
            height = min(height, max(rows, MUTUAL_ROWS))
        order: _Order = []
        for begin in range(0, setup.count, height):
            rows = slice(begin, min(begin + height, setup.count))
            specs = self._tile_specs(rows, columns if whole_rows else width)
            parts = [specs] if whole_rows or not specs else [[spec] for spec in specs]
            order += [(rows, part, i == len(parts) - 1) for i, part in enumerate(parts)]
        return order

    def _with_memory(self, order: _Order) -> list[Step]:
        """The steps, with memory of their own for the products if all fit the workspace, else in one buffer."""
        query, pitch = self.setup.query, self.kernels.pitch

        def size(spec: TileSpec) -> int:
            return length(spec.rows) * pitch(length(spec.columns), query)

        sizes = [sum(map(size, specs)) for _, specs, _ in order]
        fits = sum(sizes) * query.element_size() <= workspace_bytes(query)
        self.keeps_all = fits and self.kernels.keeps_products(query)
        buffer = None
        if self.needs_products:
            buffer = query.new_empty(sum(sizes) if self.keeps_all else max(sizes, default=0))
        steps, begin = [], 0
        for rows, specs, ends_rows in order:
            begin = begin if self.keeps_all else 0
            tiles = []
            for spec in specs:
                products = None
                if buffer is not None:
                    products = at(buffer, slice(begin, begin + size(spec))).view(length(spec.rows), -1)
                    if products.shape[1] != length(spec.columns):
                        products = products[:, : length(spec.columns)]
                    begin += size(spec)
                tiles.append((spec, self._tile(spec, products)))
            steps.append(Step(len(steps), rows, tiles, ends_rows))
        return steps

    def _tile_specs(self, rows: slice, width: int) -> list[TileSpec]:
        """The tiles of a row block, at most `width` columns wide."""
        specs = []
        for candidates in self.candidates:
            count, first = candidates.values.shape[0], 0
            if self.setup.mutual:
                specs.append(TileSpec(candidates, rows, rows, rows_summed=True, columns_summed=False, twice=True))
                first = rows.stop
            for begin in range(first, count, max(width, 1)):
                columns = slice(begin, min(begin + width, count))
                specs.append(
                    TileSpec(candidates, rows, columns, candidates.rows, candidates.columns or self.setup.mutual)
                )
        return specs

    def _tile(self, spec: TileSpec, products: Tensor | None) -> Tile:
        setup, candidates, rows, columns = self.setup, spec.candidates, spec.rows, spec.columns
        labels: list[Tensor | None] = []
        for row, column in zip(setup.positives.row_labels, candidates.labels, strict=True):
            paired = row is not None and column is not None
            labels += [at(row, rows), at(column, columns)] if paired else [None, None]
        return Tile(
            at(setup.query, rows),
            at(candidates.values, columns),
            products,
            at(setup.query_norm, rows),
            at(candidates.norm, columns),
            setup.inputs.logit_scale,
            setup.inputs.logit_bias,
            setup.options.energy,
            Labels(*labels),
            setup.options.ids_positive,
            _part_of(candidates.masks, rows, columns),
        )


def is_one_tile(kernels: PairKernels, setup: PairSetup, whole_rows: bool) -> bool:
    """Whether one tile of keys, each the positive of at most the row of its number, holds all scores."""
    only_keys = setup.options.in_batch and setup.bank is None and setup.negatives is None
    scores, in_order = (setup.count, setup.keys), setup.positives.in_order and not setup.mutual
    keeps = kernels.keeps_products(setup.query) and not kernels.has_weighted_sums(setup.query)
    if not (only_keys and in_order and keeps):
        return False
    return 0 not in scores and kernels.tile_shape(scores, setup.query, True, whole_rows)[0] == scores


def shared_candidates(setup: PairSetup, grads: FeatureGradients, stats: bool) -> Iterator[Candidates]:
    """stats: whether the keys are read for statistics, where they are no candidates."""
    options, positives, inputs = setup.options, setup.positives, setup.inputs
    if options.in_batch:
        by_pair = options.energy == HINGE and options.columns and not positives.in_order and setup.key.shape[0] > 0
        columns = options.columns and not by_pair
        yield Candidates(
            setup.key, setup.key_norm, positives.key_labels, options.rows, columns, keys=True,
            gradient=grads.key, masks=Masks(inputs.candidate_mask, None, inputs.key_mask),
        )  # fmt: skip
        if by_pair:
            index = positives.index
            labels = positives.key_labels
            yield Candidates(
                setup.key[index],
                None if setup.key_norm is None else setup.key_norm[index],
                SideLabels(
                    positives.row_labels.positive,
                    None if labels.itself is None else labels.itself[index],
                    None if labels.id is None else labels.id[index],
                ),
                columns=True,
                pairs=True,
                gradient=grads.pair_key,
                masks=Masks(
                    inputs.candidate_mask,
                    None if inputs.candidate_mask is None else index,
                    None if inputs.key_mask is None else inputs.key_mask[index],
                ),
            )
    elif stats:
        yield Candidates(setup.key, setup.key_norm, positives.key_labels, keys=True)
    yield from shared_bank(setup, grads)


def shared_bank(setup: PairSetup, grads: FeatureGradients) -> Iterator[Candidates]:
    positives, inputs = setup.positives, setup.inputs
    if setup.bank is not None:
        masks = Masks(column=inputs.bank_mask)
        yield Candidates(
            setup.bank, setup.bank_norm, positives.bank_labels, rows=True, gradient=grads.bank, masks=masks
        )


def _part_of(masks: Masks, rows: slice, columns: slice) -> Masks:
    pair, index, column = masks
    if pair is not None:
        pair = at(pair, rows)
        if index is None and length(columns) != pair.shape[1]:
            pair = pair[:, columns]
    return Masks(pair, at(index, columns), at(column, columns))


def length(part: slice) -> int:
    return part.stop - part.start


def at(values: Tensor | None, part: slice) -> Tensor | None:
    """values[part]; all of them without the microsecond that a view takes."""
    return values if values is None or part.stop - part.start == values.shape[0] else values[part]
