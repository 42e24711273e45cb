"""Sums over the rows and the columns of a tile of pair scores: launchers of the kernels in `tile_sum_kernels`."""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from sslkernels.contrastive.triton.score_tiles import ENERGY_HINGE, burden_of, config, is_even, operands
from sslkernels.contrastive.triton.tile_sum_kernels import pair_merge_kernel, pair_sums_kernel
from sslkernels.core.triton.launch import Config, capability, on_device_of, processors
from sslkernels.core.triton.products import splits

# Rows and columns of the largest supertile.
SUPERTILE = 1024
# Bytes of the partials of a row or a column of a supertile: at most twelve float32.
PARTIAL_BYTES = 48
# Number of pairs from which a fixed shift pays for its launches.
FIXED_SHIFT_PAIRS = 1 << 24
# Subnormal float32 terms are lost: a sum of n terms is complete to 2^-24 if it is at least n times this.
COMPLETE = 2.0**-102
MERGE_BLOCK = 256


class _Sums(NamedTuple):
    """Running sums of rows or columns, or partials of supertiles, in the order of the kernels' parameters."""

    max: Tensor | None = None
    sum: Tensor | None = None
    active: Tensor | None = None
    score_sum: Tensor | None = None
    positive_sum: Tensor | None = None
    uniformity_sum: Tensor | None = None
    num_above_positive: Tensor | None = None
    num_equal_positive: Tensor | None = None

    def partials(self, count: int) -> "_Sums":
        return _Sums(*(None if v is None else v.new_empty(count, v.shape[0], dtype=torch.float32) for v in self))

    @property
    def softmax(self) -> "_Sums":
        return _Sums(self.max, self.sum)

    @property
    def without_statistics(self) -> tuple[Tensor | None, ...]:
        return tuple(getattr(self, name) for name in COLUMN_SUMS)


COLUMN_SUMS = ("max", "sum", "active", "score_sum", "positive_sum")


class _Side(NamedTuple):
    """The running sums of the rows, or of the columns, of a tile: `size` of them, each over `terms` scores, from
    `parts` partials."""

    running: _Sums
    parts: int
    size: int
    terms: int


def supertile(rows: int, columns: int, chosen: Config, processors: int) -> tuple[int, int]:
    """(blocks of rows, blocks of columns) of a supertile: at most `SUPERTILE` rows and columns, less if there would be
    too few programs."""
    blocks = [chosen.constexprs["BLOCK_M"], chosen.constexprs["BLOCK_N"]]
    counts = [triton.cdiv(rows, blocks[0]), triton.cdiv(columns, blocks[1])]
    tiles = [max(1, min(SUPERTILE // block, count)) for block, count in zip(blocks, counts, strict=True)]

    def programs() -> int:
        return triton.cdiv(counts[0], tiles[0]) * triton.cdiv(counts[1], tiles[1])

    while programs() < 4 * processors and max(tiles) > 1:
        longer = int(tiles[1] > tiles[0])
        tiles[longer] = triton.cdiv(tiles[longer], 2)
    return tiles[0], tiles[1]


def row_block(count: int, columns: int, workspace: int) -> int:
    """Rows of a row block whose partials, and the partials of its columns, fit `workspace` bytes."""
    fit = workspace * SUPERTILE // (PARTIAL_BYTES * max(columns, 1))
    return min(max(count, 1), max(fit // SUPERTILE, 1) * SUPERTILE)


class _Launch(NamedTuple):
    """The arguments that all launches for a tile share. inputs: the first parameters of `pair_sums_kernel`, up to the
    cosine norms."""

    tile: Any
    inputs: tuple[Any, ...]
    ids_positive: bool
    chosen: Config
    sizes: tuple[int, int]
    tiles: tuple[int, int]
    grid: tuple[int, int]
    staged: Tensor | None

    def sums(self, rows: _Sums, columns: _Sums, flag: Tensor | None, fixed: bool) -> None:
        pair_sums_kernel[self.grid](
            *(*self.inputs, flag, self.staged, *rows, *columns.without_statistics, *self.sizes, *self.tiles),
            DIM=self.tile.queries.shape[1],
            ENERGY=self.tile.energy,
            IDS_POSITIVE=self.ids_positive,
            FIXED=fixed,
            EVEN=is_even(*self.sizes, self.chosen),
            **self.chosen.constexprs,
            **self.chosen.options,
        )

    def merge(
        self, side: _Side, partials: _Sums, incomplete: Tensor | None = None, flag: Tensor | None = None,
        fixed: bool = False,
    ) -> None:  # fmt: skip
        if side.running.sum is None:
            return
        pair_merge_kernel[(triton.cdiv(side.size, MERGE_BLOCK),)](
            *(*side.running, *partials, self.tile.logit_scale, self.tile.logit_bias, incomplete, flag),
            *(side.size, side.parts, side.terms * COMPLETE),
            FIXED=fixed,
            BLOCK=MERGE_BLOCK,
            num_warps=4,
        )


def add_sums(tile: Any, rows: Any, columns: Any, thresholds: Any, cosine_norms: tuple[Tensor, Tensor] | None) -> None:
    """Adds a tile to the running sums of its rows and columns, either of which may be None; the arguments are the
    records of `score_tiles`."""
    if tile.queries.shape[0] == 0 or tile.candidates.shape[0] == 0:
        return
    transposed = rows is None
    by_row, by_column = (_Sums() if sums is None else _Sums(*sums) for sums in (rows, columns))
    ids_positive = tile.ids_positive and tile.labels.row_id is not None
    if not ids_positive:
        by_row, by_column = by_row._replace(positive_sum=None), by_column._replace(positive_sum=None)
    if transposed:
        by_row, by_column = by_column, by_row
    limits: tuple[Tensor | None, ...] = (None, None)
    if tile.energy == ENERGY_HINGE:
        limits = (thresholds.column, None) if transposed else (thresholds.row, thresholds.column)
    positive_score = None if by_row.num_above_positive is None else thresholds.positive_score
    cosine_norms = (None, None) if by_row.uniformity_sum is None else cosine_norms
    inputs = (*operands(tile, transposed), *limits, positive_score, *cosine_norms)
    with on_device_of(tile.queries):
        launch, sides = _plan(tile, inputs, by_row, by_column, ids_positive)
        _run(launch, sides)


def _plan(
    tile: Any, inputs: tuple[Any, ...], by_row: _Sums, by_column: _Sums, ids_positive: bool
) -> tuple[_Launch, tuple[_Side, _Side]]:
    queries, candidates, *_ = inputs
    (count, dim), width = queries.shape, candidates.shape[0]
    statistics = (by_row.score_sum, by_row.positive_sum, by_row.uniformity_sum, by_row.num_above_positive)
    burden = burden_of(tile, *statistics)
    chosen = config("sums", tile.energy, count, width, dim, queries.dtype, capability(queries), burden)
    staged = None
    if by_column.sum is None:
        row_tiles, (row_parts, column_tiles) = 1, splits(count, width, chosen, processors(queries))
        column_parts = triton.cdiv(count, chosen.constexprs["BLOCK_M"])
    else:
        block_n = chosen.constexprs["BLOCK_N"]
        row_tiles, column_tiles = supertile(count, width, chosen, processors(queries))
        column_parts = triton.cdiv(count, row_tiles * chosen.constexprs["BLOCK_M"])
        row_parts = triton.cdiv(width, column_tiles * block_n)
        staged = queries.new_empty(column_parts * row_parts, 5, block_n, dtype=torch.float32)
    sizes, tiles, grid = (count, width), (row_tiles, column_tiles), (column_parts, row_parts)
    launch = _Launch(tile, inputs, ids_positive, chosen, sizes, tiles, grid, staged)
    return launch, (_Side(by_row, row_parts, count, width), _Side(by_column, column_parts, width, count))


def _run(launch: _Launch, sides: tuple[_Side, _Side]) -> None:
    partials = [side.running.partials(side.parts) for side in sides]
    by_row, _ = sides
    if by_row.running.max is None or launch.tile.row_norm is None or by_row.size * by_row.terms < FIXED_SHIFT_PAIRS:
        launch.sums(*partials, flag=None, fixed=False)
        for side, part in zip(sides, partials, strict=True):
            launch.merge(side, part)
        return
    flag = torch.zeros(1, dtype=torch.int32, device=launch.tile.queries.device)
    without_max = [part._replace(max=None) for part in partials]
    launch.sums(*without_max, flag=None, fixed=True)
    incomplete = [flag.new_empty(side.size, dtype=torch.int8) for side in sides]
    for side, part, low in zip(sides, without_max, incomplete, strict=True):
        launch.merge(side, part, low, flag, fixed=True)
    softmax = [part.softmax for part in partials]
    launch.sums(*softmax, flag=flag, fixed=False)
    for side, part, low in zip(sides, softmax, incomplete, strict=True):
        launch.merge(side._replace(running=side.running.softmax), part, low)
