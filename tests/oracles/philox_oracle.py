"""Philox4x32-10 and the address of a word in Python integers, which every backend must match bit for bit."""

from __future__ import annotations

_LOW = 2**32 - 1

# Random123's known answers: counter, key, words.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def philox(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & _LOW, (p0 >> 32) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return c0, c1, c2, c3


def word(seed: int, row_id: int, column: int, columns: int, sample: int) -> int:
    seed, sample = seed % 2**64, sample % 2**64
    group = (row_id * ((columns + 3) // 4) + column // 4) % 2**64
    counter = (sample & _LOW, sample >> 32, group & _LOW, group >> 32)
    return philox(counter, (seed & _LOW, seed >> 32))[column % 4]


def as_int64(low: int, high: int) -> int:
    value = low | high << 32
    return value - 2**64 if value >= 2**63 else value


def chi_square_limit(degrees: int) -> float:
    """The value that a chi-square variable exceeds with probability 1e-3 (Wilson-Hilferty)."""
    return degrees * (1 - 2 / (9 * degrees) + 3.09 * (2 / (9 * degrees)) ** 0.5) ** 3
