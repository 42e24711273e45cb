"""How many rows a chunk has: bounded by the bytes of a buffer, and on a GPU chosen for whole waves of matmul tiles."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

# Rows of a chunk are padded to a multiple of this where they are the inner dimension of a matmul: for some smaller
# numbers of rows MKL sums a large vocabulary with four times the error.
ROW_MULTIPLE = 16
# The row pitch of a reused buffer is a multiple of this many elements, so that rows of any width are aligned.
PITCH = 64
# A pitch that is a multiple of this many elements maps all rows to few sets of a CPU's caches: float32 matmuls of a
# buffer of 640 x 32768 take 1.2 times longer.
CONFLICT = 1024
MATMUL_DEPTH = 32  # elements of a 16-bit row that a tile of a CPU's matrix unit takes
# Rows and columns of a matmul that one multiprocessor of a GPU computes at a time.
TILE = (128, 256)
# Operations that a GPU computes in the time that it moves a byte (H200: 790 TFLOP/s in bfloat16, 4.3 TB/s).
FLOPS_A_BYTE = 184


def equal_rows(count: int, fit: int) -> int:
    """Rows per chunk when `count` rows are split into as few, about equal chunks as possible of at most `fit` rows, a
    multiple of ROW_MULTIPLE."""
    chunks = max(-(-count // fit), 1)
    return min(round_up(-(-count // chunks), ROW_MULTIPLE), count)


class Matmuls(NamedTuple):
    """The matmuls of a chunk of rows with a weight (columns, dim): the logits, and the gradients that are wanted."""

    columns: int
    dim: int
    input: bool
    weight: bool


@functools.lru_cache(maxsize=256)
def wave_rows(count: int, matmuls: Matmuls, fit: int, processors: int) -> int:
    """Rows per chunk on a GPU with so many multiprocessors: all of them if they fit, else the most whose matmuls take
    at most a hundredth longer than with the best number, since every chunk adds to the accumulator.

    A matmul computes one wave of tiles at a time, one tile on each multiprocessor, and in the last wave some of them
    idle. The gradient of the input has so few tiles that it decides where dim is small; the accumulator of the weight's
    gradient is read and written by every chunk.
    """
    most = fit // TILE[0] * TILE[0]
    if count <= fit or most == 0:
        return equal_rows(count, fit)
    costs = {rows: matmul_time(count, matmuls, rows, processors) for rows in range(TILE[0], most + 1, TILE[0])}
    enough = 1.01 * min(costs.values())
    return max(rows for rows, cost in costs.items() if cost <= enough)


def matmul_time(count: int, matmuls: Matmuls, rows: int, processors: int) -> float:
    """The time of `count` rows in chunks of `rows`, in steps of the inner dimension of a tile."""
    accumulator = 8 * matmuls.columns * matmuls.dim * FLOPS_A_BYTE / (2 * TILE[0] * TILE[1] * processors)

    def in_chunk(rows: int) -> float:
        time: float = product_waves(rows, matmuls.columns, processors) * matmuls.dim
        if matmuls.input:
            time += product_waves(rows, matmuls.dim, processors) * matmuls.columns
        if matmuls.weight:
            # Other tiles compute while one adds to the accumulator.
            adds = accumulator if rows < count else 0
            time += max(product_waves(matmuls.columns, matmuls.dim, processors) * rows, adds)
        return time

    chunks, rest = divmod(count, rows)
    return chunks * in_chunk(rows) + (in_chunk(rest) if rest else 0)


def workspace_of(device: torch.device, default: Mapping[str, int]) -> int:
    """Bytes of a buffer that a caller does not bound: on a GPU at least a 64th of its memory, since larger chunks have
    fuller waves."""
    least = default.get(device.type, default["cuda"])
    if device.type != "cuda":
        return least
    return max(least, torch.cuda.get_device_properties(device).total_memory // 64)


def product_waves(rows: int, columns: int, processors: int) -> int:
    """Waves of tiles in a product of `rows` rows and `columns` columns."""
    return -(-(-(-rows // TILE[0]) * -(-columns // TILE[1])) // processors)


def chunked_waves(count: int, columns: int, rows: int, processors: int) -> int:
    """Waves of tiles in a product of `count` rows and `columns` columns that is computed in chunks of `rows`."""
    chunks, rest = divmod(count, rows)
    return chunks * product_waves(rows, columns, processors) + product_waves(rest, columns, processors)


def row_pitch(columns: int) -> int:
    """Elements from one row of a buffer to the next: `columns` or a few more."""
    pitch = round_up(columns, PITCH)
    return pitch if pitch % CONFLICT else pitch + PITCH


def padded_rows(like: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Uninitialised memory (rows, columns) for a reused buffer, whose rows are `row_pitch(columns)` elements apart."""
    buffer = like.new_empty((rows, row_pitch(columns)), dtype=dtype)[:, :columns]
    clear_padding(buffer)
    return buffer


def clear_padding(rows: Tensor) -> None:
    """Zeros what a matmul reads behind the rows of its left operand.

    oneDNN (v3.12) reads 16-bit rows up to a multiple of MATMUL_DEPTH elements on CPUs with AMX and multiplies the rest
    by 0: a NaN or an infinity there would make the whole row of the product NaN.
    """
    count, columns = rows.shape
    rest = -columns % MATMUL_DEPTH
    if rest and rows.dtype.itemsize == 2 and rows.device.type == "cpu" and rows.stride(0) >= columns + rest:
        rows.as_strided((count, rest), (rows.stride(0), 1), rows.storage_offset() + columns).zero_()


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
