"""How many rows a chunk has: bounded by the bytes of a buffer, and on a GPU chosen for whole waves of matmul tiles."""

from __future__ import annotations

# Rows of a chunk are padded to a multiple of this where they are the inner dimension of a matmul: for some smaller
# numbers of rows MKL sums a large vocabulary with four times the error.
ROW_MULTIPLE = 16
# Elements that the row pitch of a reused buffer is a multiple of, so that rows of any width are aligned.
PITCH = 64
# A pitch that is a multiple of this many elements maps all rows to few sets of a CPU's caches: float32 matmuls of a
# buffer of 640 x 32768 take 1.2 times longer.
CONFLICT = 1024
# Rows and columns of a matmul that one multiprocessor of a GPU computes at a time.
TILE = (128, 256)


def equal_rows(count: int, fit: int) -> int:
    """Rows per chunk when `count` rows are split into as few, about equal chunks as possible of at most `fit` rows, a
    multiple of ROW_MULTIPLE."""
    chunks = max(-(-count // fit), 1)
    return min(round_up(-(-count // chunks), ROW_MULTIPLE), count)


def wave_rows(count: int, columns: int, fit: int, processors: int) -> int:
    """Rows per chunk on a GPU with so many multiprocessors: as few chunks as possible, then as few waves of tiles.

    A matmul computes one wave of tiles at a time, one tile on each multiprocessor; in the last wave of a chunk some
    multiprocessors may idle. That costs less than another chunk, which reads and writes the accumulator of the weight's
    gradient.
    """
    most = fit // TILE[0] * TILE[0]
    if count <= fit or most == 0:
        return equal_rows(count, fit)
    chunks = -(-count // most)
    # Among any `processors` successive multiples of a tile's rows, one fills whole waves.
    candidates = range(round_up(-(-count // chunks), TILE[0]), most + 1, TILE[0])[:processors]
    return min(candidates, key=lambda rows: waves(count, columns, rows, processors))


def waves(count: int, columns: int, rows: int, processors: int) -> int:
    """Waves of tiles in the product of `count` rows and `columns` columns, computed in chunks of `rows`."""

    def in_chunk(rows: int) -> int:
        return -(-(-(-rows // TILE[0]) * -(-columns // TILE[1])) // processors)

    chunks, rest = divmod(count, rows)
    return chunks * in_chunk(rows) + in_chunk(rest)


def row_pitch(columns: int) -> int:
    """Elements from one row of a buffer to the next: `columns` or a few more."""
    pitch = round_up(columns, PITCH)
    return pitch if pitch % CONFLICT else pitch + PITCH


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
