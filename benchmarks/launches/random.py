"""Random streams and draws from an alias table."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.launches.call import BF16, DTYPES, FP32, Call, binding, call, indices, when
from sslkernels.random.triton.alias_table import alias_draw
from sslkernels.random.triton.streams import random_stream


def calls() -> Iterator[Call]:
    streams = [("bits", torch.int32), ("uniform", FP32), ("exponential", FP32)]
    streams += [("gumbel", FP32), ("gumbel", BF16), *(("normal", dtype) for dtype in DTYPES)]
    for stream, dtype in streams:
        yield call(random, stream, dtype, (4099, 1000))
        if dtype in (torch.int32, FP32):  # the others differ from float32 in the last conversion
            yield call(random, stream, dtype, (4099, 77), row_ids=True)
    for row_ids in (False, True):
        yield binding(random, "normal", BF16, (1, 1), row_ids=row_ids)
        yield binding(random, "normal", BF16, (4096, 1024), row_ids=row_ids)
    for row_ids in (False, True):
        yield call(alias, (65536, 5), row_ids=row_ids)
        yield binding(alias, (4096, 1024), size=4096, row_ids=row_ids)
    yield binding(alias, (1, 1), size=1)


def random(stream: str, dtype: torch.dtype, shape: tuple[int, int], row_ids: bool = False) -> None:
    ids, sample = when(row_ids, indices(shape[0])), 2**40 if row_ids else 0
    random_stream(stream, indices(), ids, sample, torch.empty(shape, dtype=dtype))


def alias(shape: tuple[int, int], size: int = 200_001, row_ids: bool = False) -> None:
    ids, table = when(row_ids, indices(shape[0])), torch.empty(size, 2, dtype=torch.int32)
    alias_draw(indices(), ids, table, torch.empty(shape, dtype=torch.int64))
