"""The random streams of the package: Philox4x32-10, addressed by seed, row, column and sample."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sslkernels import checks
from sslkernels.dispatch import PREFERENCE, Op
from sslkernels.random import seed_tensor, wrap_int64

_LOW = 0xFFFFFFFF


def _round_products(factor: int, word: Tensor) -> tuple[Tensor, Tensor]:
    product = factor * word  # wraps modulo 2**64, which keeps every bit of the 64-bit product
    return (product >> 32) & _LOW, product & _LOW


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10 (Salmon et al. 2011) on 32-bit words held in int64 tensors, which broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _round_products(0xD2511F53, c0)
        high1, low1 = _round_products(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return c0, c1, c2, c3


def random_words(seed: Tensor, row_ids: Tensor | None, rows: int, columns: int, sample: int) -> Tensor:
    """The stream as int64 `(rows, columns)` with values in [0, 2**32): the definition that all backends share."""
    if row_ids is None:
        row_ids = torch.arange(rows, device=seed.device)
    groups = (columns + 3) // 4
    group = row_ids[:, None] * groups + torch.arange(groups, device=seed.device)
    draw = torch.full((), sample, dtype=torch.int64, device=seed.device)
    counter = (draw & _LOW, (draw >> 32) & _LOW, group & _LOW, (group >> 32) & _LOW)
    words = philox(counter, (seed & _LOW, (seed >> 32) & _LOW))
    return torch.stack(words, dim=-1).reshape(rows, 4 * groups)[:, :columns]


def _reference(seed: Tensor, row_ids: Tensor | None, rows: int, columns: int, sample: int) -> Tensor:
    words = random_words(seed, row_ids, rows, columns, sample)
    return ((words ^ 0x80000000) - 0x80000000).to(torch.int32)


def _native(seed: Tensor, row_ids: Tensor | None, rows: int, columns: int, sample: int) -> Tensor:
    out = seed.new_empty((rows, columns), dtype=torch.int32)
    torch.ops.sslkernels_native.random_bits(seed, row_ids, sample, out)
    return out


random_bits_op = Op(
    "random_bits",
    "random_bits(Tensor seed, Tensor? row_ids, SymInt rows, SymInt columns, int sample) -> Tensor",
    fake=lambda seed, row_ids, rows, columns, sample: seed.new_empty((rows, columns), dtype=torch.int32),
    implementations={
        "reference": _reference,
        "cpu": _native,
        "triton": "sslkernels.triton_kernels.random_bits:random_bits",
        "cuda": _native,
    },
    native_ops=("random_bits",),
    prefer=PREFERENCE,
)


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
    name = "random_bits"
    size = _sizes(name, shape)
    checks.tensor(name, "row_ids", row_ids, (torch.int64,), optional=True)
    checks.shape(name, "row_ids", row_ids, size[:-1], "shape[:-1]")
    if seed is None:
        checks.fail(TypeError, name, "seed", "be an int or a 0-d int64 tensor", "NoneType")
    checks.integer(name, "sample", sample, low=0)
    if sample >= 2**64:
        checks.fail(ValueError, name, "sample", "be less than 2**64", sample)
    source = next((t for t in (row_ids, seed) if isinstance(t, Tensor)), None)
    if device is not None:
        where = torch.empty(0, device=device).device  # "cuda" names the current CUDA device
    else:
        where = source.device if source is not None else torch.get_default_device()
    checks.same_device(name, "row_ids", row_ids, "the result", where)
    rows = math.prod(size[:-1])
    flat_ids = None if row_ids is None else row_ids.reshape(rows).contiguous()
    words = random_bits_op(seed_tensor(name, seed, None, where), flat_ids, rows, size[-1], wrap_int64(sample))
    return words.reshape(size)


def _sizes(name: str, shape: Sequence[int]) -> tuple[int, ...]:
    if not isinstance(shape, Sequence):
        checks.fail(TypeError, name, "shape", "be a sequence of ints", type(shape).__name__)
    if len(shape) == 0:
        checks.fail(ValueError, name, "shape", "have one dimension or more", tuple(shape))
    for size in shape:
        checks.integer(name, "shape", size, low=0)
    return tuple(shape)
