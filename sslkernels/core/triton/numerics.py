"""Elementary functions, accurate to a few ulp, built from `exp` and `log`: Triton's interpreter cannot call the device
libraries that provide them."""

import triton
import triton.language as tl


@triton.jit
def log1p(x):
    """log(1 + x) for x >= 0 (Kahan: the rounding of 1 + x cancels in the quotient)."""
    u = 1.0 + x
    exact = u == 1.0
    return tl.where(exact, x, tl.log(u) * (x / tl.where(exact, 1.0, u - 1.0)))


@triton.jit
def exp_flushed(x):
    """exp(x) of float32, flushed to 0 instead of a subnormal: half the instructions of `tl.exp`."""
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def exp_any(x):
    """exp(x) of any x: float32 within 2 ulp and 0 below 2^-125; float64 is `tl.exp`. In float32 `tl.exp` loses as many
    bits as the integer part of x / ln 2 has."""
    if x.dtype == tl.float64:
        return tl.exp(x)
    inside = tl.where(x > 89.0, 89.0, tl.where(x < -104.0, -104.0, x))  # keeps NaN; beyond these exp(x) is inf or 0
    n = tl.floor(tl.fma(inside, 1.4426950408889634, 0.5))
    f = tl.fma(inside, 1.925963033500885e-08, tl.fma(inside, 1.4426950216293335, -n))
    return tl.exp2(f) * 2.0 * tl.exp2(n - 1.0)


@triton.jit
def _excess_series(d):
    """(exp(d) - 1 - d) / d^2 for |d| <= 1: 1/2! + d/3! + d^2/4! + ..., truncated below a rounding."""
    if d.dtype == tl.float64:
        p = 8.22063524662433e-18 * d + 1.5619206968586225e-16
        p = p * d + 2.8114572543455206e-15
        p = p * d + 4.779477332387385e-14
        p = p * d + 7.647163731819816e-13
        p = p * d + 1.1470745597729725e-11
        p = p * d + 1.6059043836821613e-10
        p = p * d + 2.08767569878681e-09
        p = p * d + 2.505210838544172e-08
    else:
        p = d * 0.0 + 2.505210838544172e-08
    p = p * d + 2.755731922398589e-07
    p = p * d + 2.7557319223985893e-06
    p = p * d + 2.48015873015873e-05
    p = p * d + 0.0001984126984126984
    p = p * d + 0.001388888888888889
    p = p * d + 0.008333333333333333
    p = p * d + 0.041666666666666664
    p = p * d + 0.16666666666666666
    return p * d + 0.5


@triton.jit
def expm1_terms(d, e):
    """exp(d) - 1 and exp(d) - 1 - d, from e = exp(d)."""
    near = d * d * _excess_series(d)
    is_near = tl.abs(d) <= 1.0
    finite = tl.where(d > 1e30, 1e30, d)  # avoids inf - inf
    return tl.where(is_near, d + near, e - 1.0), tl.where(is_near, near, e - 1.0 - finite)


@triton.jit
def expm1(x):
    """exp(x) - 1 for x <= 0 (Kahan: the rounding of exp(x) cancels in the quotient)."""
    u = tl.exp(x)
    um1 = u - 1.0
    direct = (u == 1.0) | (um1 == -1.0)
    return tl.where(u == 1.0, x, tl.where(direct, um1, um1 * (x / tl.where(direct, 1.0, tl.log(u)))))


@triton.jit
def tanh(x):
    """Hyperbolic tangent, without the cancellation of formulas in exp(2 x) near zero."""
    magnitude = tl.abs(x)
    if x.dtype == tl.float64:
        e = expm1(-2.0 * magnitude)
        positive = -e / (2.0 + e)
        return tl.where(x < 0, -positive, positive)
    # x + x^3 P(x^2), P fitted to tanh on [0, 0.55] by minimax relative error (1e-9).
    z = x * x
    p = -6.274229381e-3 * z + 2.107167058e-2
    p = p * z - 5.385230854e-2
    p = p * z + 1.333258599e-1
    p = p * z - 3.333331645e-1
    large = 1.0 - 2.0 / (tl.exp(2.0 * magnitude) + 1.0)
    return tl.where(magnitude < 0.55, x + x * z * p, tl.where(x < 0, -large, large))


@triton.jit
def shifted_moment(moment, others, shift, decay):
    """moment = sum(e * (z - m)) with others = sum(e), after m changes to m - shift and e to e * decay, with
    decay = exp(shift). Terms that underflow to 0 stay 0, also for shift = -inf."""
    return tl.where(decay > 0.0, decay * (moment + others * shift), decay * others)


@triton.jit
def log1p_unit(x):
    """log(1 + x) of float32 x in [0, 1], without a logarithm or a division."""
    # x P(x), P fitted to log(1 + x) / x on [0, 1] by minimax relative error (5e-9).
    p = -3.244023537e-3 * x + 1.98514536e-2
    p = p * x - 5.695951733e-2
    p = p * x + 1.060365464e-1
    p = p * x - 1.530559212e-1
    p = p * x + 1.967593879e-1
    p = p * x - 2.495413423e-1
    p = p * x + 3.332996368e-1
    p = p * x - 4.999990165e-1
    return x + x * (x * p)
