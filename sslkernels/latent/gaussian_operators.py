"""The raw operators of `gaussian_rsample` and `gaussian_kl`, and their reference.

For mean (rows, columns) and logvar, in the accumulation dtype, with eps_k the normal stream of sample k:

    v = logvar, clamped to [low, high]          z_k = mean + exp(v / 2) eps_k
    d = v - prior_logvar                        t = (mean - prior_mean) exp(-prior_logvar / 2)
    kl = max((t^2 + expm1(d) - d) / 2, free_bits)

where an absent prior has mean and logvar 0. The derivatives of kl where it is at least free_bits, elsewhere 0:

    in mean: t exp(-prior_logvar / 2)           in logvar: expm1(d) / 2, and 0 outside of [low, high]
    in prior_mean: minus that in mean           in prior_logvar: -(t^2 + expm1(d)) / 2

expm1(d) - d is a series where d is small, so that kl keeps its digits there and is never negative. A prior is
(rows, columns), or (1, columns) if all rows share it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from sslkernels.core.autograd import empty_gradients, wanted_only
from sslkernels.core.dtypes import accumulation_dtype
from sslkernels.core.operator import operator
from sslkernels.random.streams import stream_values

NATIVE_OPS = ("gaussian_fwd", "gaussian_bwd")
NO_KL, ELEMENTS, ROWS = range(3)  # Options.kl: no divergence, one per element, or its sum over each row
ROWS_OF_BLOCK = 64  # rows that a kernel reduces to one partial sum a column


class Inputs(NamedTuple):
    """mean and logvar (rows, columns), prior (rows, columns) or (1, columns), with any row stride; row_ids (rows,) and
    seed (0-d) of the noise."""

    mean: Tensor
    logvar: Tensor
    prior_mean: Tensor | None
    prior_logvar: Tensor | None
    row_ids: Tensor | None
    seed: Tensor | None


class Options(NamedTuple):
    """samples: -1 draws none. samples_first: z is (samples, rows, columns), else (rows, samples, columns)."""

    samples: int
    samples_first: bool
    kl: int
    free_bits: float
    low: float
    high: float


class Outputs(NamedTuple):
    """z in the dtype of mean; in the accumulation dtype kl and, for each column, the mean of kl before free_bits and
    the variance of mean over the rows (divided by rows - 1). Without elements if not wanted."""

    z: Tensor
    kl: Tensor
    kl_per_dim: Tensor
    mean_variance: Tensor


class OutputGrads(NamedTuple):
    """The gradients with respect to z, of its shape, and kl; None if there is none."""

    z: Tensor | None
    kl: Tensor | None


class Wanted(NamedTuple):
    """Which gradients are wanted."""

    mean: bool
    logvar: bool
    prior_mean: bool
    prior_logvar: bool


class Gradients(NamedTuple):
    """In the shape and dtype of the input; without elements if not wanted."""

    mean: Tensor
    logvar: Tensor
    prior_mean: Tensor
    prior_logvar: Tensor


class KernelOutputs(NamedTuple):
    """What a forward kernel fills, None if not wanted: z (rows, samples, columns); kl (rows, columns), or its sums over
    parts of rows (rows, parts); partial sums of the statistics (blocks, 3, columns)."""

    z: Tensor | None
    kl: Tensor | None
    statistics: Tensor | None


def _empty_outputs(inputs: Inputs, options: Options, statistics: bool) -> Outputs:
    mean = inputs.mean
    rows, columns = mean.shape
    acc = accumulation_dtype(mean.dtype)
    z_shape = (options.samples, rows, columns) if options.samples_first else (rows, options.samples, columns)
    kl_shape = {NO_KL: 0, ELEMENTS: (rows, columns), ROWS: rows}[options.kl]
    per_column = columns if statistics else 0
    return Outputs(
        mean.new_empty(z_shape if options.samples >= 0 else 0),
        mean.new_empty(kl_shape, dtype=acc),
        mean.new_empty(per_column, dtype=acc),
        mean.new_empty(per_column, dtype=acc),
    )


def _empty_gradients(inputs: Inputs, wanted: Wanted) -> Gradients:
    mean, logvar, prior_mean, prior_logvar, _, _ = inputs
    return Gradients(*empty_gradients((mean, logvar, prior_mean, prior_logvar), wanted))


def _row_first(z: Tensor, options: Options) -> Tensor:
    return z.transpose(0, 1) if options.samples_first else z


def expm1_excess(d: Tensor) -> Tensor:
    """expm1(d) - d, without the cancellation near 0."""
    series = torch.full_like(d, 1 / math.factorial(16))
    for n in range(15, 1, -1):
        series = series * d + 1 / math.factorial(n)
    far = torch.where(d == math.inf, d, torch.expm1(d) - d)
    return torch.where(d.abs() < 0.5, d * d * series, far)


class _Terms(NamedTuple):
    """scale: exp(v / 2); inverse_scale: exp(-prior_logvar / 2); kl: before free_bits."""

    scale: Tensor
    d: Tensor
    t: Tensor
    inverse_scale: Tensor | float
    kl: Tensor


def _terms(inputs: Inputs, options: Options) -> _Terms:
    acc = accumulation_dtype(inputs.mean.dtype)
    v = inputs.logvar.to(acc).clamp(options.low, options.high)
    d, t, inverse_scale = v, inputs.mean.to(acc), 1.0
    if inputs.prior_mean is not None:
        prior_logvar = inputs.prior_logvar.to(acc)
        inverse_scale = (-prior_logvar / 2).exp()
        d, t = v - prior_logvar, (t - inputs.prior_mean.to(acc)) * inverse_scale
    return _Terms((v / 2).exp(), d, t, inverse_scale, (t * t + expm1_excess(d)) / 2)


def _noise(inputs: Inputs, options: Options) -> Tensor:
    """(rows, samples, columns)."""
    (rows, columns), acc = inputs.mean.shape, accumulation_dtype(inputs.mean.dtype)
    noise = inputs.mean.new_empty((rows, options.samples, columns), dtype=acc)
    for k in range(options.samples):
        noise[:, k] = stream_values("normal", inputs.seed, inputs.row_ids, rows, columns, k, acc)
    return noise


def _reference_fwd(inputs: Inputs, options: Options, statistics: bool) -> Outputs:
    outputs, terms = _empty_outputs(inputs, options, statistics), _terms(inputs, options)
    if options.samples >= 0:
        values = inputs.mean.to(terms.d.dtype)[:, None] + terms.scale[:, None] * _noise(inputs, options)
        _row_first(outputs.z, options).copy_(values)
    if options.kl != NO_KL:
        value = torch.where(terms.kl < options.free_bits, options.free_bits, terms.kl)
        outputs.kl.copy_(value.sum(1) if options.kl == ROWS else value)
    if statistics:
        mean = inputs.mean.double() - inputs.mean[:1].double()  # a common offset would cost digits of float64
        varies = mean.shape[0] > 1 and mean.shape[1] > 0  # else torch warns
        outputs.kl_per_dim.copy_(terms.kl.double().mean(0))
        outputs.mean_variance.copy_(mean.var(0) if varies else mean.new_full((1,), torch.nan))
    return outputs


def _reference_bwd(grads: OutputGrads, inputs: Inputs, options: Options, wanted: Wanted) -> Gradients:
    terms = _terms(inputs, options)
    in_mean = in_logvar = in_prior_mean = in_prior_logvar = torch.zeros_like(terms.d)
    if grads.z is not None:
        by_row = _row_first(grads.z, options).to(terms.d.dtype)
        in_mean = by_row.sum(1)
        if wanted.logvar:
            in_logvar = terms.scale * (by_row * _noise(inputs, options)).sum(1) / 2
    if grads.kl is not None:
        g = grads.kl if options.kl == ELEMENTS else grads.kl[:, None]
        g = torch.where(terms.kl < options.free_bits, 0, g)
        kl_in_mean, expm1 = g * terms.t * terms.inverse_scale, torch.expm1(terms.d)
        in_mean, in_logvar = in_mean + kl_in_mean, in_logvar + g * expm1 / 2
        in_prior_mean, in_prior_logvar = -kl_in_mean, -g * (terms.t * terms.t + expm1) / 2
    logvar = inputs.logvar.to(terms.d.dtype)
    in_logvar = torch.where((logvar < options.low) | (logvar > options.high), 0, in_logvar)
    gradients = _empty_gradients(inputs, wanted)
    values = Gradients(in_mean, in_logvar, in_prior_mean, in_prior_logvar)
    for gradient, value, want in zip(gradients, values, wanted, strict=True):
        if want:
            gradient.copy_(value.sum_to_size(gradient.shape))
    return gradients


def _with_contiguous_rows(inputs: Inputs) -> Inputs:
    """The kernels take any row stride, but the columns of a row must be contiguous."""
    mean, logvar, prior_mean, prior_logvar, row_ids, seed = inputs
    if all(t is None or t.stride(1) == 1 for t in (mean, logvar, prior_mean, prior_logvar)):
        return inputs

    def fixed(t: Tensor | None) -> Tensor | None:
        return t if t is None or t.shape[1] <= 1 or t.stride(1) == 1 else t.contiguous()

    return Inputs(fixed(mean), fixed(logvar), fixed(prior_mean), fixed(prior_logvar), row_ids, seed)


def _row_blocks(rows: int) -> int:
    return (rows + ROWS_OF_BLOCK - 1) // ROWS_OF_BLOCK


def _finish_statistics(partials: Tensor, rows: int, outputs: Outputs) -> None:
    """Reduces partials (blocks, 3, columns), for each block of ROWS_OF_BLOCK rows: the sum of kl, the mean of `mean`
    less that of row 0, and the sum of squared distances to the block's mean (Chan, Golub and LeVeque 1983)."""
    sizes = rows - ROWS_OF_BLOCK * torch.arange(partials.shape[0], dtype=torch.float64, device=partials.device)
    sizes = sizes.clamp(max=ROWS_OF_BLOCK)[:, None]
    kl, mean, squares = partials.double().unbind(1)
    total = (sizes * mean).sum(0) / rows
    squares = squares.sum(0) + (sizes * (mean - total).square()).sum(0)
    outputs.kl_per_dim.copy_(kl.sum(0) / rows)
    outputs.mean_variance.copy_(squares / max(rows - 1, 0))


def _fwd(
    fill: Callable[..., None],
    part_columns: Callable[[torch.dtype, int], int],
    inputs: Inputs,
    options: Options,
    statistics: bool,
) -> Outputs:
    """part_columns: how many columns of a row the kernel sums to one number."""
    outputs = _empty_outputs(inputs, options, statistics)
    rows, columns = inputs.mean.shape
    kl = outputs.kl if options.kl == ELEMENTS else None
    if options.kl == ROWS:
        parts = -(-columns // part_columns(inputs.mean.dtype, columns))
        kl = outputs.kl.unsqueeze(1) if parts == 1 else outputs.kl.new_empty(rows, parts)
    z = _row_first(outputs.z, options) if options.samples >= 0 else None
    partials = outputs.kl.new_empty((_row_blocks(rows), 3, columns)) if statistics else None
    if inputs.mean.numel() > 0:
        fill(_with_contiguous_rows(inputs), options, KernelOutputs(z, kl, partials))
    if options.kl == ROWS and kl.shape[1] != 1:
        torch.sum(kl, 1, out=outputs.kl)
    if statistics:
        _finish_statistics(partials, rows, outputs)
    return outputs


def _bwd(fill: Callable[..., None], grads: OutputGrads, inputs: Inputs, options: Options, wanted: Wanted) -> Gradients:
    gradients = _empty_gradients(inputs, wanted)
    filled = wanted_only(gradients, wanted)
    for name in ("prior_mean", "prior_logvar"):
        gradient = getattr(filled, name)
        if gradient is not None and gradient.shape[0] == 1:  # all rows share it: the kernel fills partial sums
            shape = (_row_blocks(inputs.mean.shape[0]), inputs.mean.shape[1])
            parts = gradient.new_empty(shape, dtype=accumulation_dtype(gradient.dtype))
            filled = filled._replace(**{name: parts})
    if inputs.mean.numel() > 0:
        grad_z = _row_first(grads.z, options) if options.samples > 0 and grads.z is not None else None
        fill(_with_contiguous_rows(inputs), options, OutputGrads(grad_z, grads.kl), filled)
    for gradient, parts in zip(gradients, filled, strict=True):
        if parts is not None and parts is not gradient:
            gradient.copy_(parts.sum(0, keepdim=True))
    return gradients


def _native_fwd(inputs: Inputs, options: Options, filled: KernelOutputs) -> None:
    limits = (options.free_bits, options.low, options.high)
    torch.ops.sslkernels_native.gaussian_fwd(
        *inputs, *limits, filled.z, filled.kl, options.kl == ROWS, filled.statistics
    )


def _native_bwd(inputs: Inputs, options: Options, grads: OutputGrads, filled: Gradients) -> None:
    limits = (options.free_bits, options.low, options.high)
    torch.ops.sslkernels_native.gaussian_bwd(*inputs, *limits, *grads, options.kl == ROWS, *filled)


def _triton_fwd(inputs: Inputs, options: Options, filled: KernelOutputs) -> None:
    from sslkernels.latent.triton.gaussian import gaussian_fwd

    gaussian_fwd(inputs, options, filled, options.kl == ROWS)


def _triton_bwd(inputs: Inputs, options: Options, grads: OutputGrads, filled: Gradients) -> None:
    from sslkernels.latent.triton.gaussian import gaussian_bwd

    gaussian_bwd(inputs, options, grads, filled, options.kl == ROWS)


def _triton_columns(dtype: torch.dtype, columns: int) -> int:
    from sslkernels.latent.triton.gaussian import columns_of_tile

    return columns_of_tile(dtype, columns)


def _cpu_columns(dtype: torch.dtype, columns: int) -> int:
    return 1024  # kChunk in csrc/latent/gaussian_cpu.cpp


def _cuda_columns(dtype: torch.dtype, columns: int) -> int:
    return 32 * (8 if dtype.itemsize == 2 else 4)  # the columns of a warp: kTile in csrc/latent/gaussian.cu


@operator(
    "gaussian_rsample",
    {
        "reference": _reference_fwd,
        "cpu": partial(_fwd, _native_fwd, _cpu_columns),
        "triton": partial(_fwd, _triton_fwd, _triton_columns),
        "cuda": partial(_fwd, _native_fwd, _cuda_columns),
    },
    native_ops=NATIVE_OPS,
)
def gaussian_fwd(inputs: Inputs, options: Options, statistics: bool) -> Outputs:
    return _empty_outputs(inputs, options, statistics)


@operator(
    "gaussian_rsample",
    {
        "reference": _reference_bwd,
        "cpu": partial(_bwd, _native_bwd),
        "triton": partial(_bwd, _triton_bwd),
        "cuda": partial(_bwd, _native_bwd),
    },
    native_ops=NATIVE_OPS,
)
def gaussian_bwd(grads: OutputGrads, inputs: Inputs, options: Options, wanted: Wanted) -> Gradients:
    return _empty_gradients(inputs, wanted)
