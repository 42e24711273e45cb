"""The random streams, addressed by seed, row, column and sample: docs/random_numbers.md is the contract.

All five public functions are one mechanism, `_draw`: they differ in the function of `transforms` that the words of
`random_bits` go through.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sslkernels.core import checks
from sslkernels.core.operator import Operator, operator
from sslkernels.random import transforms
from sslkernels.random.philox import random_words
from sslkernels.random.seeds import seed_tensor, wrap_int64

STREAMS = ("bits", "uniform", "exponential", "gumbel", "normal")  # in the order of the native operator's codes

_WORDS_PER_BLOCK = 1 << 16  # words of the reference at a time, which then stay in the cache


def _bits(words: Tensor) -> Tensor:
    return (words ^ 0x80000000) - 0x80000000


_VALUES: dict[str, Callable[[Tensor], Tensor]] = {
    "bits": _bits,
    "uniform": transforms.uniform,
    "exponential": transforms.exponential,
    "gumbel": transforms.gumbel,
    "normal": transforms.normal,
}


def stream_values(
    stream: str, seed: Tensor, row_ids: Tensor | None, rows: int, columns: int, sample: int, dtype: torch.dtype
) -> Tensor:
    """A stream in plain torch, `(rows, columns)`: the definition that all backends share."""
    out = torch.empty((rows, columns), dtype=dtype, device=seed.device)
    if row_ids is None:
        row_ids = torch.arange(rows, device=seed.device)
    padded = (columns + 3) // 4 * 4
    step = max(_WORDS_PER_BLOCK // max(padded, 1), 1)
    for first in range(0, rows, step):
        part = row_ids[first : first + step]
        words = random_words(seed, part, len(part), padded, sample)
        out[first : first + step] = _VALUES[stream](words)[:, :columns]
    return out


def _fill_native(stream: str, seed: Tensor, row_ids: Tensor | None, sample: int, out: Tensor) -> None:
    torch.ops.sslkernels_native.random_stream(seed, row_ids, sample, STREAMS.index(stream), out)


def _fill_triton(stream: str, seed: Tensor, row_ids: Tensor | None, sample: int, out: Tensor) -> None:
    from sslkernels.random.triton.streams import random_stream

    random_stream(stream, seed, row_ids, sample, out)


def _stream_operator(stream: str) -> Operator:
    def allocate(
        seed: Tensor, row_ids: Tensor | None, rows: int, columns: int, sample: int, dtype: torch.dtype
    ) -> Tensor:
        return seed.new_empty((rows, columns), dtype=dtype)

    def filled_by(fill: Callable[..., None]) -> Callable[..., Tensor]:
        def values(
            seed: Tensor, row_ids: Tensor | None, rows: int, columns: int, sample: int, dtype: torch.dtype
        ) -> Tensor:
            out = allocate(seed, row_ids, rows, columns, sample, dtype)
            fill(stream, seed, row_ids, sample, out)
            return out

        return values

    allocate.__name__ = f"random_{stream}"
    native = filled_by(_fill_native)
    implementations: dict[str, Callable[..., Any]] = {
        "reference": functools.partial(stream_values, stream),
        "cpu": native,
        "cuda": native,
        "triton": filled_by(_fill_triton),
    }
    return operator(allocate.__name__, implementations, native_ops=("random_stream",))(allocate)


_OPERATORS = {stream: _stream_operator(stream) for stream in STREAMS}


@checks.with_python_numbers
def random_bits(
    shape: Sequence[int],
    seed: int | Tensor,
    *,
    row_ids: Tensor | None = None,
    sample: int = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """Independent uniform 32-bit words that depend only on seed, row, column and sample.

    The last dimension of `shape`, of size D, is the column; all before it, flattened, the row. Word (row, column) is
    word `column % 4` of Philox4x32-10 with the 64-bit seed as key and the 64-bit numbers `sample` and
    `group = row_id * ceil(D / 4) + column // 4` as counter (low word first): the same on every backend and device,
    however the batch is split. No state is kept and no other tensor of this size is allocated.

    Args:
        shape: shape of the result, one dimension or more.
        seed: an int in [-2**63, 2**64), or a 0-d int64 tensor on the device, which the host never reads.
        row_ids: int64 of shape `shape[:-1]`: the number of each row, in place of its flattened index.
        sample: index of the sample, an int in [0, 2**64): samples of one seed are independent.
        device: default: the device of `row_ids` or of `seed` if they are tensors, else torch's default device.

    Returns:
        int32 tensor of shape `shape`; all 2**32 bit patterns are equally likely.

    Raises:
        TypeError, ValueError: for an argument of the wrong type, dtype, shape, device or range.

    Source: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.

    >>> import sslkernels as sk
    >>> words = sk.random_bits((2, 8), seed=0)
    >>> second = sk.random_bits((1, 8), seed=0, row_ids=torch.tensor([1]))
    >>> torch.equal(words[1:], second)
    True
    """
    return _draw("bits", shape, seed, row_ids, sample, torch.int32, device)


@checks.with_python_numbers
def random_normal(
    shape: Sequence[int],
    seed: int | Tensor,
    *,
    row_ids: Tensor | None = None,
    sample: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Independent standard normal numbers that depend only on seed, row, column and sample.

    Box and Muller's transform of the words of `random_bits` at the same rows and columns: words 0 and 1 of a group of
    four columns give columns 0 and 1, words 2 and 3 the other two. It uses only additions, multiplications, fused
    multiply-adds, square roots and integer arithmetic, so that every backend and device gives the same bits. The
    largest magnitude is 6.76; up to 6.5 the tails follow the normal distribution. The float32 number is rounded once to
    `dtype`.

    Args:
        shape: shape of the result, one dimension or more.
        seed: an int in [-2**63, 2**64), or a 0-d int64 tensor on the device, which the host never reads.
        row_ids: int64 of shape `shape[:-1]`: the number of each row, in place of its flattened index.
        sample: index of the sample, an int in [0, 2**64): samples of one seed are independent.
        dtype: float32, bfloat16, float16 or float64 (which holds the float32 number).
        device: default: the device of `row_ids` or of `seed` if they are tensors, else torch's default device.

    Returns:
        Tensor of shape `shape` and of `dtype`.

    Raises:
        TypeError, ValueError: for an argument of the wrong type, dtype, shape, device or range.

    Source: Box and Muller, "A note on the generation of random normal deviates", Ann. Math. Statist. 29, 1958.

    >>> import sslkernels as sk
    >>> first = sk.random_normal((2, 8), seed=0)
    >>> torch.equal(first[1:], sk.random_normal((1, 8), seed=0, row_ids=torch.tensor([1])))
    True
    """
    return _draw("normal", shape, seed, row_ids, sample, dtype, device)


@checks.with_python_numbers
def random_uniform(
    shape: Sequence[int],
    seed: int | Tensor,
    *,
    row_ids: Tensor | None = None,
    sample: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Independent uniform numbers in (0, 1] that depend only on seed, row, column and sample.

    `(word + 1/2) / 2**32` of the (unsigned) word of `random_bits` at the same row and column: never 0 in
    float32, and 1 for the 128 largest words. The float32 number is rounded once to `dtype`.

    Args:
        shape: shape of the result, one dimension or more.
        seed: an int in [-2**63, 2**64), or a 0-d int64 tensor on the device, which the host never reads.
        row_ids: int64 of shape `shape[:-1]`: the number of each row, in place of its flattened index.
        sample: index of the sample, an int in [0, 2**64): samples of one seed are independent.
        dtype: float32, bfloat16, float16 or float64 (which holds the float32 number).
        device: default: the device of `row_ids` or of `seed` if they are tensors, else torch's default device.

    Returns:
        Tensor of shape `shape` and of `dtype`.

    Raises:
        TypeError, ValueError: for an argument of the wrong type, dtype, shape, device or range.

    >>> import sslkernels as sk
    >>> bool((sk.random_uniform((2, 8), seed=0) <= 1).all())
    True
    """
    return _draw("uniform", shape, seed, row_ids, sample, dtype, device)


@checks.with_python_numbers
def random_exponential(
    shape: Sequence[int],
    seed: int | Tensor,
    *,
    row_ids: Tensor | None = None,
    sample: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Independent exponential numbers of mean 1 that depend only on seed, row, column and sample.

    `-ln(1 - u)` with `u = (word + 1/2) / 2**32` of the word of `random_bits` at the same row and column: between 2**-33
    and 22.9, with the full resolution of the words towards 0. The float32 number is rounded once to `dtype`.

    Args:
        shape: shape of the result, one dimension or more.
        seed: an int in [-2**63, 2**64), or a 0-d int64 tensor on the device, which the host never reads.
        row_ids: int64 of shape `shape[:-1]`: the number of each row, in place of its flattened index.
        sample: index of the sample, an int in [0, 2**64): samples of one seed are independent.
        dtype: float32, bfloat16, float16 or float64 (which holds the float32 number).
        device: default: the device of `row_ids` or of `seed` if they are tensors, else torch's default device.

    Returns:
        Tensor of shape `shape` and of `dtype`.

    Raises:
        TypeError, ValueError: for an argument of the wrong type, dtype, shape, device or range.

    >>> import sslkernels as sk
    >>> bool((sk.random_exponential((2, 8), seed=0) > 0).all())
    True
    """
    return _draw("exponential", shape, seed, row_ids, sample, dtype, device)


@checks.with_python_numbers
def random_gumbel(
    shape: Sequence[int],
    seed: int | Tensor,
    *,
    row_ids: Tensor | None = None,
    sample: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Independent standard Gumbel numbers that depend only on seed, row, column and sample.

    `-ln(-ln(1 - u))` with `u = (word + 1/2) / 2**32` of the word of `random_bits` at the same row and column: between
    -3.2 and 22.9. The upper tail, which decides which candidate wins, comes from the words near 0 and has their full
    resolution: a candidate 20 nats behind wins at its rate to 0.1 %. The float32 number is rounded once to `dtype`.

    Args:
        shape: shape of the result, one dimension or more.
        seed: an int in [-2**63, 2**64), or a 0-d int64 tensor on the device, which the host never reads.
        row_ids: int64 of shape `shape[:-1]`: the number of each row, in place of its flattened index.
        sample: index of the sample, an int in [0, 2**64): samples of one seed are independent.
        dtype: float32, bfloat16, float16 or float64 (which holds the float32 number).
        device: default: the device of `row_ids` or of `seed` if they are tensors, else torch's default device.

    Returns:
        Tensor of shape `shape` and of `dtype`.

    Raises:
        TypeError, ValueError: for an argument of the wrong type, dtype, shape, device or range.

    >>> import sslkernels as sk
    >>> logits = torch.zeros(2, 8)
    >>> index = (logits + sk.random_gumbel((2, 8), seed=0)).argmax(-1)  # drawn from softmax(logits)
    """
    return _draw("gumbel", shape, seed, row_ids, sample, dtype, device)


def _draw(
    stream: str,
    shape: Sequence[int],
    seed: int | Tensor,
    row_ids: Tensor | None,
    sample: int,
    dtype: torch.dtype,
    device: torch.device | str | None,
) -> Tensor:
    name = f"random_{stream}"
    size = shape_of(name, shape)
    checks.tensor(name, "row_ids", row_ids, (torch.int64,), optional=True)
    checks.shape(name, "row_ids", row_ids, size[:-1], "shape[:-1]")
    if seed is None:
        checks.fail(TypeError, name, "seed", "be an int or a 0-d int64 tensor", "NoneType")
    checks.integer(name, "sample", sample, low=0, unsigned=True)
    if sample >= 2**64:
        checks.fail(ValueError, name, "sample", "be less than 2**64", sample)
    if stream != "bits" and dtype not in checks.FLOAT_DTYPES:
        checks.fail(TypeError, name, "dtype", "be float32, bfloat16, float16 or float64", dtype)
    source = next((t for t in (row_ids, seed) if isinstance(t, Tensor)), None)
    if device is not None or source is None:
        # "cuda" names the current CUDA device, and None torch's default one.
        source = torch.empty(0, device=device)
    where = source.device
    checks.same_device(name, "row_ids", row_ids, "the result", where)
    rows = math.prod(size[:-1])
    flat_ids = None if row_ids is None else row_ids.reshape(rows).contiguous()
    seed = seed_tensor(name, seed, None, where)
    return _OPERATORS[stream](seed, flat_ids, rows, size[-1], wrap_int64(sample), dtype).reshape(size)


def shape_of(name: str, shape: Sequence[int]) -> tuple[int, ...]:
    if not isinstance(shape, Sequence):
        checks.fail(TypeError, name, "shape", "be a sequence of ints", type(shape).__name__)
    if len(shape) == 0:
        checks.fail(ValueError, name, "shape", "have one dimension or more", tuple(shape))
    for size in shape:
        checks.integer(name, "shape", size, low=0)
    return tuple(shape)
