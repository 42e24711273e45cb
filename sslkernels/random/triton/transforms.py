"""Transforms of random words in Triton, bit for bit equal to `sslkernels/random/transforms.py`.

Kernels need no compiler option to keep these bits: no product feeds an addition that the compiler could contract, and
`tl.fma` marks every place with a single rounding.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

from sslkernels.random.triton.philox import group_words, in_columns

_HALF_ROOT = tl.constexpr(0xB504F334)
_HALF_ROOT_BITS = tl.constexpr(0x3F3504F3)
_EXPONENT_OFFSET = tl.constexpr(0x3F800000 - 0x3F3504F3)
_ALL = tl.constexpr(0xFFFFFFFF)
_TOP = tl.constexpr(0x80000000)


@triton.jit
def uniform(word):
    return tl.fma(word.to(tl.float32), 2.0**-32, 2.0**-33)


@triton.jit
def _negative_log(fraction, exponent):
    p = tl.fma(fraction, 0.08506875485181808, -0.14197224378585815)
    p = tl.fma(p, fraction, 0.14950884878635406)
    p = tl.fma(p, fraction, -0.16587978601455688)
    p = tl.fma(p, fraction, 0.19960610568523407)
    p = tl.fma(p, fraction, -0.250009685754776)
    p = tl.fma(p, fraction, 0.33333972096443176)
    p = tl.fma(p, fraction, -0.5)
    log1p = tl.fma(-(fraction * fraction), p, -fraction)
    return tl.fma(-exponent, 0.6931471824645996, log1p)


@triton.jit
def _fraction_and_exponent(x):
    bits = x.to(tl.uint32, bitcast=True) + _EXPONENT_OFFSET
    fraction = ((bits & 0x7FFFFF) + _HALF_ROOT_BITS).to(tl.float32, bitcast=True) - 1.0
    return fraction, ((bits >> 23).to(tl.int32) - 127).to(tl.float32)


@triton.jit
def negative_log_of_word(word):
    complement = word >= _HALF_ROOT
    near = uniform(tl.where(complement, word ^ _ALL, word))
    fraction, exponent = _fraction_and_exponent(near)
    return _negative_log(tl.where(complement, -near, fraction), tl.where(complement, 0.0, exponent))


@triton.jit
def exponential(word):
    return negative_log_of_word(word ^ _ALL)


@triton.jit
def gumbel(word):
    fraction, exponent = _fraction_and_exponent(exponential(word))
    return _negative_log(fraction, exponent)


@triton.jit
def _flip_sign(x, top_bit):
    return (x.to(tl.uint32, bitcast=True) ^ (top_bit & _TOP)).to(tl.float32, bitcast=True)


@triton.jit
def normal_pair(first, second):
    length = negative_log_of_word(first)
    radius = tl.sqrt_rn(length + length)
    quarter = second + (1 << 29)
    y = tl.fma((second << 2).to(tl.int32, bitcast=True).to(tl.float32), 3.65729529994141e-10, 7.31459059988282e-10)
    square = y * y
    s = tl.fma(square, -0.00019518790941219777, 0.008332191966474056)
    s = tl.fma(s, square, -0.16666655242443085)
    sine = tl.fma(y * square, s, y)
    c = tl.fma(square, -0.001359674148261547, 0.04165619611740112)
    c = tl.fma(c, square, -0.49999892711639404)
    cosine = tl.fma(square, c, 1.0)
    swapped = (quarter & (1 << 30)) != 0
    x0 = _flip_sign(tl.where(swapped, sine, cosine), quarter + (1 << 30))
    x1 = _flip_sign(tl.where(swapped, cosine, sine), quarter)
    return radius * x0, radius * x1


@triton.jit
def normals(seed, group, draw):
    """The normals of the groups in the order of the columns: shape (4 * BLOCK,) from int64 groups (BLOCK,)."""
    w0, w1, w2, w3 = group_words(seed, group, draw)
    n0, n1 = normal_pair(w0, w1)
    n2, n3 = normal_pair(w2, w3)
    return in_columns(n0, n1, n2, n3)


def _round_once() -> None:
    """Patches Triton's interpreter, which computes `tl.fma` with two roundings, to round once like hardware."""
    import numpy as np  # the interpreter computes with NumPy
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    original = InterpreterBuilder.create_fma

    def create_fma(self, x, y, z):
        if x.dtype.scalar != tl.float32:
            return original(self, x, y, z)
        with np.errstate(all="ignore"):
            product = x.data.astype(np.float64) * y.data  # exact
            addend = z.data.astype(np.float64)
            total = product + addend
            # Rounding the float64 sum to odd first avoids double rounding.
            added = total - product
            error = (product - (total - added)) + (addend - added)
            bits = total.view(np.int64)
            inexact = np.isfinite(total) & (error != 0) & (bits & 1 == 0)
            odd = np.where(inexact, bits + np.where((error > 0) == (total > 0), 1, -1), bits)
            return TensorHandle(odd.view(np.float64).astype(np.float32), z.dtype.scalar)

    InterpreterBuilder.create_fma = create_fma


if os.environ.get("TRITON_INTERPRET") == "1":
    _round_once()
