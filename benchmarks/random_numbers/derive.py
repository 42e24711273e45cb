"""Derives the polynomials of the noise and checks them: python -m benchmarks.random_numbers.derive

Three functions, each fitted on Chebyshev nodes weighted for relative error (within a few per cent of the minimax
polynomial). The coefficients are rounded to float32 one by one, from the lowest, and the others fitted again:

- log:  log1p(f) = f + f^2 Q(f) for f in [sqrt(1/2) - 1, sqrt(2) - 1]
- sine: sin(y) = y + y y^2 S(y^2), cosine: cos(y) = 1 + y^2 C(y^2) for y in [-pi/4, pi/4]

Then the functions of the package's reference, whose coefficients must be these, are evaluated on every float32 that a
word can lead to and compared with float64 of the words. This takes some minutes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from sslkernels.random import transforms

LOG_TERMS, SINE_TERMS, COSINE_TERMS = len(transforms.LOG), len(transforms.SINE), len(transforms.COSINE)
NODES = 2000


def fit(target: Callable, weight: Callable, low: float, high: float, terms: int) -> tuple[float, ...]:
    """Coefficients, lowest first, exact in float32: weighted least squares on Chebyshev nodes of [low, high]."""
    nodes = np.cos(np.pi * (np.arange(NODES) + 0.5) / NODES)
    x = (low + high) / 2 + (high - low) / 2 * nodes
    scale = max(abs(low), abs(high))
    powers = (x / scale)[:, None] ** np.arange(terms)
    rest, w = target(x), weight(x)
    chosen: list[float] = []
    for term in range(terms):
        basis = powers[:, term:] * w[:, None]
        solution = np.linalg.lstsq(basis, rest * w, rcond=None)[0]
        coefficient = float(np.float32(solution[0] / scale**term))
        chosen.append(coefficient)
        rest = rest - coefficient * x**term
    return tuple(chosen)


def log_quotient(f: np.ndarray) -> np.ndarray:
    """(log1p(f) - f) / f^2, by its series near 0."""
    series = sum((-1) ** (k + 1) * f ** (k - 2) / k for k in range(2, 40))
    return np.where(np.abs(f) < 0.2, series, (np.log1p(f) - f) / f**2)


def sine_quotient(t: np.ndarray) -> np.ndarray:
    """(sin(y) / y - 1) / y^2 with t = y^2, by its series."""
    return _alternating(t, 3)


def cosine_quotient(t: np.ndarray) -> np.ndarray:
    """(cos(y) - 1) / y^2 with t = y^2, by its series."""
    return _alternating(t, 2)


def _alternating(t: np.ndarray, first: int) -> np.ndarray:
    term, total = -np.ones_like(t) / (6.0 if first == 3 else 2.0), np.zeros_like(t)
    for k in range(first, 30, 2):
        total = total + term
        term = -term * t / ((k + 1) * (k + 2))
    return total


def derived() -> dict[str, tuple[float, ...]]:
    low, high = np.sqrt(0.5) - 1, np.sqrt(2.0) - 1
    square = (np.pi / 4) ** 2
    return {
        "LOG": fit(log_quotient, lambda f: f**2 / np.abs(np.log1p(f)), low, high, LOG_TERMS),
        "SINE": fit(sine_quotient, lambda t: t, 0.0, square, SINE_TERMS),
        "COSINE": fit(cosine_quotient, lambda t: t, 0.0, square, COSINE_TERMS),
    }


def telling_words(last: int) -> Iterator[Tensor]:
    """Words up to `last` that show the largest errors, in parts (int64): all words that float32 represents exactly, and
    among the words that round to the same float32 the middle one and the two ends."""
    step = 1 << 17  # a part stays in the cache
    for start in range(0, min(1 << 24, last + 1), step):
        yield torch.arange(start, min(start + step, last + 1))
    exponent = 24
    while 1 << exponent <= last:
        stride = 1 << (exponent - 23)
        for start in range(1 << exponent, min(1 << (exponent + 1), last + 1), step * stride):
            middle = torch.arange(start, min(start + step * stride, 1 << (exponent + 1), last + 1), stride)
            for off in (0, -(stride // 2), stride // 2):
                yield (middle + off).clamp_max(last)
        exponent += 1


class Largest:
    """The largest error shown so far, by name."""

    def __init__(self) -> None:
        self.value: dict[str, float] = {}

    def show(self, name: str, errors: Tensor) -> None:
        self.value[name] = max(self.value.get(name, 0.0), float(errors.max()))


def largest_errors() -> dict[str, float]:
    """Over all words."""
    largest = Largest()
    every = 1 << 32
    for small in (True, False):  # words themselves, and the words that the logarithm replaces by their complement
        for words in telling_words((transforms.HALF_ROOT if small else every - transforms.HALF_ROOT) - 1):
            word = words if small else every - 1 - words
            exact = (
                -torch.log((words.double() + 0.5) / every) if small else -torch.log1p(-(words.double() + 0.5) / every)
            )
            found = transforms.negative_log(word)
            radius, gumbel = (2 * found.double()).sqrt().float(), -transforms.log(found)
            largest.show("-ln u, relative", (found.double() / exact - 1).abs())
            largest.show("radius, absolute", (radius.double() - (2 * exact).sqrt()).abs())
            largest.show("Gumbel, absolute", (gumbel.double() + exact.log()).abs())
    for words in telling_words((1 << 31) - 1):
        for z in (words, -words):  # four times the angle within its quadrant
            sine, cosine = transforms.sine_cosine(z)
            angle = (z.double() + 2) * (np.pi / 4) / 2**31
            largest.show("sine, absolute", (sine.double() - angle.sin()).abs())
            largest.show("cosine, absolute", (cosine.double() - angle.cos()).abs())
    return largest.value


def main() -> None:
    for name, coefficients in derived().items():
        state = "the same as in" if coefficients == getattr(transforms, name) else "different from"
        print(f"{name}: {state} {transforms.__name__}")
        for value in coefficients:
            print(f"    {value!r},  # {value.hex()}")
    for name, error in largest_errors().items():
        print(f"{name}: {error:.3g}")


if __name__ == "__main__":
    main()
