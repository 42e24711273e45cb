"""Random words in plain torch: Philox4x32-10, addressed by seed, row, column and sample."""

from __future__ import annotations

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF


def _round_products(factor: int, word: Tensor) -> tuple[Tensor, Tensor]:
    product = factor * word  # wraps modulo 2**64, which keeps every bit of the 64-bit product
    return (product >> 32) & _LOW, product & _LOW


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10 (Salmon et al. 2011). Words of 32 bits are stored in int64 tensors, which broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _round_products(0xD2511F53, c0)
        high1, low1 = _round_products(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return c0, c1, c2, c3


def random_words(seed: Tensor, row_ids: Tensor | None, rows: int, columns: int, sample: int) -> Tensor:
    """The words of the stream, int64 `(rows, columns)` in [0, 2**32), as docs/random_numbers.md defines them."""
    if row_ids is None:
        row_ids = torch.arange(rows, device=seed.device)
    groups = (columns + 3) // 4
    group = row_ids[:, None] * groups + torch.arange(groups, device=seed.device)
    draw = torch.full((), sample, dtype=torch.int64, device=seed.device)
    counter = (draw & _LOW, (draw >> 32) & _LOW, group & _LOW, (group >> 32) & _LOW)
    words = philox(counter, (seed & _LOW, (seed >> 32) & _LOW))
    return torch.stack(words, dim=-1).reshape(rows, 4 * groups)[:, :columns]
