"""The random streams, addressed by seed, row, column and sample: docs/random_numbers.md is the contract."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sslkernels.core import checks
from sslkernels.core.legacy import PREFERENCE, Op
from sslkernels.random import transforms
from sslkernels.random.philox import random_words
from sslkernels.random.seeds import seed_tensor, wrap_int64

STREAMS = ("bits", "uniform", "exponential", "gumbel", "normal")  # in the order of csrc/common/random_stream.h

_AT_ONCE = 1 << 16  # words of the reference, which then stay in a cache


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
    step = max(_AT_ONCE // max(padded, 1), 1)
    for first in range(0, rows, step):
        part = row_ids[first : first + step]
        words = random_words(seed, part, len(part), padded, sample)
        out[first : first + step] = _VALUES[stream](words)[:, :columns]
    return out


def _native(
    stream: str, seed: Tensor, row_ids: Tensor | None, rows: int, columns: int, sample: int, dtype: torch.dtype
) -> Tensor:
    out = seed.new_empty((rows, columns), dtype=dtype)
    torch.ops.sslkernels_native.random_stream(seed, row_ids, sample, STREAMS.index(stream), out)
    return out


def _triton(*arguments) -> Tensor:
    from sslkernels.random.triton.streams import random_stream

    return random_stream(*arguments)


def _stream_op(stream: str) -> Op:
    native = functools.partial(_native, stream)
    return Op(
        f"random_{stream}",
        f"random_{stream}(Tensor seed, Tensor? row_ids, SymInt rows, SymInt columns, int sample, ScalarType dtype)"
        " -> Tensor",
        fake=lambda seed, row_ids, rows, columns, sample, dtype: seed.new_empty((rows, columns), dtype=dtype),
        implementations={
            "reference": functools.partial(stream_values, stream),
            "cpu": native,
            "triton": functools.partial(_triton, stream),
            "cuda": native,
        },
        native_ops=("random_stream",),
        prefer=PREFERENCE,
    )


_OPS = {stream: _stream_op(stream) for stream in STREAMS}


def random_bits(
    shape: Sequence[int],
    seed: int | Tensor,
    *,
    row_ids: Tensor | None = None,
    sample: int = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """Independent uniform 32-bit words that depend on seed, row, column and sample alone.

    The last dimension of `shape`, of size D, is the column; all before it, flattened, the row. Word (row, column) is
    word `column % 4` of Philox4x32-10 with the 64-bit seed as key and the 64-bit numbers `sample` and
    `group = row_id * ceil(D / 4) + column // 4` as counter (low word first): the same on every backend and device,
    whatever the batch is split into. No state is kept and no other tensor of this size is made.

    Args:
        shape: shape of the result, one dimension or more.
        seed: an int in [-2**63, 2**64), or a 0-d int64 tensor on the device, which is never read by the host.
        row_ids: int64 of shape `shape[:-1]`: the number of each row, in place of its flattened index.
        sample: index of the sample, an int in [0, 2**64): samples of one seed are independent.
        device: default that of `row_ids` or of `seed` where they are tensors, else torch's default device.

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
    return _stream("bits", shape, seed, row_ids, sample, torch.int32, device)


def random_normal(
    shape: Sequence[int],
    seed: int | Tensor,
    *,
    row_ids: Tensor | None = None,
    sample: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Independent standard normal numbers that depend on seed, row, column and sample alone.

    Box and Muller's transform of the words of `random_bits` at the same places: words 0 and 1 of a group of four
    columns give columns 0 and 1, words 2 and 3 the others. It is made of additions, multiplications, fused
    multiply-adds, square roots and integers alone, so that every backend and device gives the same bits. The largest
    magnitude is 6.76; below 6.5 the tails are those of the normal distribution. The float32 number is rounded once to
    `dtype`.

    Args:
        shape, seed, row_ids, sample, device: as for `random_bits`.
        dtype: float32, bfloat16, float16 or float64 (which holds the float32 number).

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
    return _stream("normal", shape, seed, row_ids, sample, dtype, device)


def random_uniform(
    shape: Sequence[int],
    seed: int | Tensor,
    *,
    row_ids: Tensor | None = None,
    sample: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Independent uniform numbers in (0, 1] that depend on seed, row, column and sample alone.

    `(word + 1/2) / 2**32` of the (unsigned) word of `random_bits` at the same place: never 0 in float32, and
    1 for the 128 largest words. The float32 number is rounded once to `dtype`.

    Args:
        shape, seed, row_ids, sample, device: as for `random_bits`.
        dtype: float32, bfloat16, float16 or float64 (which holds the float32 number).

    Returns:
        Tensor of shape `shape` and of `dtype`.

    Raises:
        TypeError, ValueError: for an argument of the wrong type, dtype, shape, device or range.

    >>> import sslkernels as sk
    >>> bool((sk.random_uniform((2, 8), seed=0) <= 1).all())
    True
    """
    return _stream("uniform", shape, seed, row_ids, sample, dtype, device)


def random_exponential(
    shape: Sequence[int],
    seed: int | Tensor,
    *,
    row_ids: Tensor | None = None,
    sample: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Independent exponential numbers of mean 1 that depend on seed, row, column and sample alone.

    `-ln(1 - u)` with `u = (word + 1/2) / 2**32` of the word of `random_bits` at the same place: between 2**-33 and
    22.9, with the full resolution of the words towards 0. The float32 number is rounded once to `dtype`.

    Args:
        shape, seed, row_ids, sample, device: as for `random_bits`.
        dtype: float32, bfloat16, float16 or float64 (which holds the float32 number).

    Returns:
        Tensor of shape `shape` and of `dtype`.

    Raises:
        TypeError, ValueError: for an argument of the wrong type, dtype, shape, device or range.

    >>> import sslkernels as sk
    >>> bool((sk.random_exponential((2, 8), seed=0) > 0).all())
    True
    """
    return _stream("exponential", shape, seed, row_ids, sample, dtype, device)


def random_gumbel(
    shape: Sequence[int],
    seed: int | Tensor,
    *,
    row_ids: Tensor | None = None,
    sample: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Independent standard Gumbel numbers that depend on seed, row, column and sample alone.

    `-ln(-ln(1 - u))` with `u = (word + 1/2) / 2**32` of the word of `random_bits` at the same place: between -3.2 and
    22.9. The upper tail, which decides who wins, comes from the words near 0 and has their full resolution: a candidate
    20 nats behind wins at its rate to 0.1 %. The float32 number is rounded once to `dtype`.

    Args:
        shape, seed, row_ids, sample, device: as for `random_bits`.
        dtype: float32, bfloat16, float16 or float64 (which holds the float32 number).

    Returns:
        Tensor of shape `shape` and of `dtype`.

    Raises:
        TypeError, ValueError: for an argument of the wrong type, dtype, shape, device or range.

    >>> import sslkernels as sk
    >>> logits = torch.zeros(2, 8)
    >>> index = (logits + sk.random_gumbel((2, 8), seed=0)).argmax(-1)  # drawn from softmax(logits)
    """
    return _stream("gumbel", shape, seed, row_ids, sample, dtype, device)


def _stream(
    stream: str,
    shape: Sequence[int],
    seed: int | Tensor,
    row_ids: Tensor | None,
    sample: int,
    dtype: torch.dtype,
    device: torch.device | str | None,
) -> Tensor:
    name = f"random_{stream}"
    size = _sizes(name, shape)
    checks.tensor(name, "row_ids", row_ids, (torch.int64,), optional=True)
    checks.shape(name, "row_ids", row_ids, size[:-1], "shape[:-1]")
    if seed is None:
        checks.fail(TypeError, name, "seed", "be an int or a 0-d int64 tensor", "NoneType")
    checks.integer(name, "sample", sample, low=0)
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
    return _OPS[stream](seed, flat_ids, rows, size[-1], wrap_int64(sample), dtype).reshape(size)


def _sizes(name: str, shape: Sequence[int]) -> tuple[int, ...]:
    if not isinstance(shape, Sequence):
        checks.fail(TypeError, name, "shape", "be a sequence of ints", type(shape).__name__)
    if len(shape) == 0:
        checks.fail(ValueError, name, "shape", "have one dimension or more", tuple(shape))
    for size in shape:
        checks.integer(name, "shape", size, low=0)
    return tuple(shape)
