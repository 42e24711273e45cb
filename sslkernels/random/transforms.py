"""Transforms of random words in plain torch: uniform, exponential, Gumbel and normal numbers.

They use integers and the operations whose result IEEE 754 defines to the bit: addition, multiplication, fused
multiply-add, square root, conversion of integers.

`noise.h` in csrc and `sslkernels/random/triton/transforms.py` compute the same bits; docs/random_numbers.md is the
contract. Words are int64 tensors with values in [0, 2**32).
"""

from __future__ import annotations

import torch
from torch import Tensor

# Coefficients, lowest power first: `python -m benchmarks.random_numbers.derive` derives and checks them.
LOG = (
    -0.5,
    0.33333972096443176,
    -0.250009685754776,
    0.19960610568523407,
    -0.16587978601455688,
    0.14950884878635406,
    -0.14197224378585815,
    0.08506875485181808,
)  # log1p(f) = f + f^2 LOG(f), f in [sqrt(1/2) - 1, sqrt(2) - 1]
SINE = (
    -0.16666655242443085,
    0.008332191966474056,
    -0.00019518790941219777,
)  # sin(y) = y + y y^2 SINE(y^2), y in [-pi/4, pi/4]
COSINE = (
    -0.49999892711639404,
    0.04165619611740112,
    -0.001359674148261547,
)  # cos(y) = 1 + y^2 COSINE(y^2)

LN2 = 0.6931471824645996  # float32
ANGLE = 3.65729529994141e-10  # pi/4 / 2^31 as float32
HALF_ROOT = 0xB504F334  # the smallest word whose uniform number is at least sqrt(1/2)
_HALF_ROOT_BITS = 0x3F3504F3  # sqrt(1/2) as float32
_ONE_BITS = 0x3F800000
_MASK = 0xFFFFFFFF


def fma(a: Tensor, b: Tensor | float, c: Tensor | float) -> Tensor:
    """a * b + c of float32, rounded once. Constants must be exact in float32."""
    product = a.double() * b  # exact in float64, like c
    c = torch.as_tensor(c, dtype=torch.float64, device=a.device)
    total = product + c
    # Rounding the float64 sum to odd first avoids double rounding.
    added = total - product
    error = (product - (total - added)) + (c - added)
    bits = total.view(torch.int64)
    away = torch.where((error > 0) == (total > 0), 1, -1)
    odd = torch.where((error != 0) & (bits & 1 == 0), bits + away, bits)
    return odd.view(torch.float64).float()


def _polynomial(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    value = fma(x, coefficients[-1], coefficients[-2])
    for coefficient in reversed(coefficients[:-2]):
        value = fma(value, x, coefficient)
    return value


def _negative_log1p(f: Tensor) -> Tensor:
    return fma(-(f * f), _polynomial(LOG, f), -f)


def _fraction_and_exponent(x: Tensor) -> tuple[Tensor, Tensor]:
    """x = (1 + fraction) * 2^exponent with 1 + fraction in [sqrt(1/2), sqrt(2)), both float32."""
    bits = x.view(torch.int32) + (_ONE_BITS - _HALF_ROOT_BITS)
    fraction = ((bits & 0x7FFFFF) + _HALF_ROOT_BITS).view(torch.float32) - 1.0
    return fraction, ((bits >> 23) - 127).float()


def negative_log(word: Tensor) -> Tensor:
    """-ln((word + 1/2) / 2^32), in [2^-33, 22.9], accurate towards both ends."""
    complement = word >= HALF_ROOT
    near = fma(torch.where(complement, word ^ _MASK, word).float(), 2.0**-32, 2.0**-33)
    fraction, exponent = _fraction_and_exponent(near)
    fraction = torch.where(complement, -near, fraction)
    exponent = torch.where(complement, 0.0, exponent)
    return fma(-exponent, LN2, _negative_log1p(fraction))


def log(x: Tensor) -> Tensor:
    """ln x of a normal positive float32."""
    fraction, exponent = _fraction_and_exponent(x)
    return fma(exponent, LN2, -_negative_log1p(fraction))


def sine_cosine(z: Tensor) -> tuple[Tensor, Tensor]:
    """Sine and cosine of (z + 2) * (pi/4) / 2^31, for int64 z in [-2^31, 2^31)."""
    y = fma(z.float(), ANGLE, 2 * ANGLE)
    square = y * y
    sine = fma(y * square, _polynomial(SINE, square), y)
    cosine = fma(square, _polynomial(COSINE, square), 1.0)
    return sine, cosine


def uniform(word: Tensor) -> Tensor:
    """(word + 1/2) / 2^32 in (0, 1], float32."""
    return fma(word.float(), 2.0**-32, 2.0**-33)


def exponential(word: Tensor) -> Tensor:
    """-ln(1 - u) with u = (word + 1/2) / 2^32: in [2^-33, 22.9], float32."""
    return negative_log(word ^ _MASK)


def gumbel(word: Tensor) -> Tensor:
    """-ln(-ln(1 - u)) with u = (word + 1/2) / 2^32: in [-3.2, 22.9], float32."""
    return -log(exponential(word))


def normal_pair(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Box and Muller (1958): r cos(a) and r sin(a) with r = sqrt(-2 ln((first + 1/2) / 2^32)) and
    a = 2 pi (second + 1/2) / 2^32, float32."""
    length = negative_log(first)
    radius = (length + length).double().sqrt().float()  # torch's float32 square root may be off by an ulp on a CPU
    # The nearest quarter turn, and the rest of the angle, times 4, as a signed 32-bit integer.
    quarter = (second + (1 << 29) & _MASK) >> 30
    rest = ((second << 2 & _MASK) ^ 0x80000000) - 0x80000000
    sine, cosine = sine_cosine(rest)
    swapped = quarter & 1 == 1
    x, y = torch.where(swapped, sine, cosine), torch.where(swapped, cosine, sine)
    x = torch.where((quarter == 1) | (quarter == 2), -x, x)
    y = torch.where(quarter >= 2, -y, y)
    return radius * x, radius * y


def normal(words: Tensor) -> Tensor:
    """Normals of words `(..., 4 n)`: words 2k and 2k + 1 give numbers 2k and 2k + 1."""
    pairs = words.reshape(*words.shape[:-1], words.shape[-1] // 2, 2)
    return torch.stack(normal_pair(pairs[..., 0], pairs[..., 1]), -1).reshape(words.shape)
