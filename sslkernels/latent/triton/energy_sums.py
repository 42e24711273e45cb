"""Sums over candidates in Triton, as in csrc/latent/free_energy.h: with d the distance to the lowest energy, the
exponentials exp(-beta d) and the deficits (1 - exp(-beta d)) / beta."""

import triton
import triton.language as tl

from sslkernels.core.triton.numerics import expm1, log1p


@triton.jit
def _term(d, beta, inverse):
    """The exponential and the deficit of d, which is >= 0, infinite or NaN."""
    x = beta * d
    exponential = tl.exp(-x)
    if d.dtype == tl.float64:
        near = tl.where(x == 0.0, d, -expm1(-x) * inverse)
    else:  # Taylor series of (1 - exp(-x)) / x, within 1.4e-8 for x < 1/2
        p = -2.4801587e-5 * x + 1.9841270e-4
        p = p * x - 1.3888889e-3
        p = p * x + 8.3333333e-3
        p = p * x - 4.1666667e-2
        p = p * x + 1.6666667e-1
        p = p * x - 0.5
        near = d + d * (x * p)
    return exponential, tl.where(x < 0.5, near, (1.0 - exponential) * inverse)


@triton.jit
def add_energies(energy, valid, seen, lowest, total, deficit, beta, inverse):
    """Adds the valid energies (R, K) to lowest, total and deficit (R,) of `seen` earlier candidates.

    A NaN energy makes the sums NaN, but never `lowest`.
    """
    energy = tl.where(valid, energy, float("inf"))
    least = tl.minimum(lowest, tl.min(tl.where(energy == energy, energy, float("inf")), 1))
    decay, moved = _term(tl.where(lowest == least, 0.0, lowest - least), beta, inverse)
    exponential, deficits = _term(tl.where(energy == least[:, None], 0.0, energy - least[:, None]), beta, inverse)
    total = total * decay + tl.sum(tl.where(valid, exponential, 0.0), 1)
    deficit = deficit * decay + seen * moved + tl.sum(tl.where(valid, deficits, 0.0), 1)
    return least, total, deficit


@triton.jit
def soft_value(count, lowest, total, deficit, beta, inverse):
    """The soft minimum of `count` candidates from their sums."""
    count = tl.full((), count, lowest.dtype)
    mean = deficit / count
    u = beta * mean
    inside = tl.where(u < 0.5, u, 0.0)
    EPSILON: tl.constexpr = 2.0**-52 if u.dtype == tl.float64 else 2.0**-23
    tiny = inside * inside < EPSILON
    ratio = tl.where(tiny, 1.0 + inside / 2.0, -log1p(-inside) / tl.where(tiny, 1.0, inside))
    return lowest + tl.where(u < 0.5, mean * ratio, -tl.log(total / count) * inverse)


@triton.jit
def soft_weights(energy, lowest, total, beta):
    """The derivatives of `soft_value` with respect to the energies; all arguments broadcast."""
    return tl.exp(-(beta * (energy - lowest))) / total


@triton.jit
def lower_energies(energy, valid, k, lowest, winner):
    """Updates the lowest energy (R,) and its candidate `winner` by the energies (R, K) of later candidates k (1, K).
    Ties go to the first candidate; NaN is below all numbers."""
    nan = valid & (energy != energy)
    has_nan = tl.max(nan.to(tl.int32), 1) > 0
    least = tl.min(tl.where(valid & ~nan, energy, float("inf")), 1)
    is_least = tl.where(has_nan[:, None], nan, valid & (energy == least[:, None]))
    first = tl.min(tl.where(is_least, k, 2147483647), 1)
    least = tl.where(has_nan, float("nan"), least)
    lower = (least < lowest) | (has_nan & (lowest == lowest))
    return tl.where(lower, least, lowest), tl.where(lower, first, winner)
