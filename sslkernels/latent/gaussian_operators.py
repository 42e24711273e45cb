"""The raw operators of `gaussian_rsample` and `gaussian_kl`, and their reference.

For mean (rows, columns) and logvar, in the accumulation dtype, with eps_k the normal stream of sample k:

    v = logvar, clamped to [low, high]          z_k = mean + exp(v / 2) eps_k
    d = v - prior_logvar                        t = (mean - prior_mean) exp(-prior_logvar / 2)
    kl = max((t^2 + expm1(d) - d) / 2, free_bits)

where an absent prior has mean and logvar 0. The derivatives of kl where it is at least free_bits, elsewhere 0:

    in mean: t exp(-prior_logvar / 2)           in logvar: expm1(d) / 2, and 0 outside of [low, high]
    in prior_mean: minus that in mean           in prior_logvar: -(t^2 + expm1(d)) / 2

expm1(d) - d is a series where d is small, so that kl keeps its digits there and is never negative. A prior is
(rows, columns), or (1, columns) where all rows share it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from sslkernels.core.dtypes import accumulation_dtype
from sslkernels.core.legacy import PREFERENCE, Op
from sslkernels.random.streams import stream_values

NO_KL, ELEMENTS, ROWS = range(3)  # what is given of kl: nothing, (rows, columns), or its sums (rows,)
ROWS_OF_BLOCK = 64  # that a kernel reduces to one partial sum of a column


class Inputs(NamedTuple):
    """Rows may lie anywhere. row_ids (rows,) and seed (0-d): of the noise."""

    mean: Tensor
    logvar: Tensor
    prior_mean: Tensor | None
    prior_logvar: Tensor | None
    row_ids: Tensor | None
    seed: Tensor | None


class Options(NamedTuple):
    """samples -1: none is drawn. samples_first: z is (samples, rows, columns), else (rows, samples, columns)."""

    samples: int
    samples_first: bool
    kl: int
    free_bits: float
    low: float
    high: float


class Outputs(NamedTuple):
    """z in the dtype of mean; in the accumulation dtype kl and, of each column, the mean of kl before free_bits and
    the variance of mean over the rows (divided by rows - 1). What is not asked for has no elements."""

    z: Tensor
    kl: Tensor
    kl_per_dim: Tensor
    mean_variance: Tensor


class Gradients(NamedTuple):
    """In the shape and dtype of the input; without elements where not asked for."""

    mean: Tensor
    logvar: Tensor
    prior_mean: Tensor
    prior_logvar: Tensor


def _empty_outputs(inputs: Inputs, options: Options, statistics: bool) -> Outputs:
    mean = inputs.mean
    rows, columns = mean.shape
    acc = accumulation_dtype(mean.dtype)
    z_shape = (options.samples, rows, columns) if options.samples_first else (rows, options.samples, columns)
    kl_shape = {NO_KL: (0,), ELEMENTS: (rows, columns), ROWS: (rows,)}[options.kl]
    return Outputs(
        mean.new_empty(z_shape if options.samples >= 0 else (0,)),
        mean.new_empty(kl_shape, dtype=acc),
        *(mean.new_empty(columns if statistics else 0, dtype=acc) for _ in range(2)),
    )


def _empty_gradients(inputs: Inputs, wanted: tuple[bool, ...]) -> Gradients:
    return Gradients(*(inputs.mean.new_empty(t.shape if w else (0,)) for t, w in zip(inputs, wanted, strict=False)))


def _row_first(z: Tensor | None, options: Options) -> Tensor | None:
    return z.transpose(0, 1) if z is not None and options.samples_first else z


# --- Reference ----------------------------------------------------------------------------------------------------


def expm1_excess(d: Tensor) -> Tensor:
    """expm1(d) - d, without the cancellation near 0."""
    series = torch.full_like(d, 1 / math.factorial(16))
    for n in range(15, 1, -1):
        series = series * d + 1 / math.factorial(n)
    far = torch.where(d == math.inf, d, torch.expm1(d) - d)
    return torch.where(d.abs() < 0.5, d * d * series, far)


class _Terms(NamedTuple):
    """scale: exp(v / 2); inverse_scale: of the prior; kl: before free_bits."""

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


def _reference_fwd(*arguments) -> Outputs:
    inputs, options, statistics = _split_fwd(arguments)
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


def _reference_bwd(*arguments) -> Gradients:
    grad_z, grad_kl, inputs, options, wanted = _split_bwd(arguments)
    terms = _terms(inputs, options)
    in_mean = in_logvar = in_prior_mean = in_prior_logvar = torch.zeros_like(terms.d)
    if grad_z is not None:
        by_row = _row_first(grad_z, options).to(terms.d.dtype)
        in_mean = by_row.sum(1)
        if wanted[1]:
            in_logvar = terms.scale * (by_row * _noise(inputs, options)).sum(1) / 2
    if grad_kl is not None:
        g = grad_kl if options.kl == ELEMENTS else grad_kl[:, None]
        g = torch.where(terms.kl < options.free_bits, 0, g)
        of_mean, expm1 = g * terms.t * terms.inverse_scale, torch.expm1(terms.d)
        in_mean, in_logvar = in_mean + of_mean, in_logvar + g * expm1 / 2
        in_prior_mean, in_prior_logvar = -of_mean, -g * (terms.t * terms.t + expm1) / 2
    logvar = inputs.logvar.to(terms.d.dtype)
    in_logvar = torch.where((logvar < options.low) | (logvar > options.high), 0, in_logvar)
    gradients = _empty_gradients(inputs, wanted)
    for gradient, value, want in zip(
        gradients, (in_mean, in_logvar, in_prior_mean, in_prior_logvar), wanted, strict=True
    ):
        if want:
            gradient.copy_(value.sum_to_size(gradient.shape))
    return gradients


# --- Kernels ------------------------------------------------------------------------------------------------------


def _with_unit_stride(inputs: Inputs) -> Inputs:
    """The kernels take rows that lie anywhere, whose columns lie behind one another."""

    def unit(t: Tensor | None) -> Tensor | None:
        return t if t is None or t.shape[1] <= 1 or t.stride(1) == 1 else t.contiguous()

    return inputs._replace(**{name: unit(getattr(inputs, name)) for name in Gradients._fields})


def _row_blocks(rows: int) -> int:
    return (rows + ROWS_OF_BLOCK - 1) // ROWS_OF_BLOCK


def _finish_statistics(partials: Tensor, rows: int, outputs: Outputs) -> None:
    """partials (blocks, 3, columns), of blocks of ROWS_OF_BLOCK rows: the sum of kl, the mean of `mean` less that of
    row 0, and its squared distances from the block's mean, added up (Chan, Golub and LeVeque 1983)."""
    sizes = rows - ROWS_OF_BLOCK * torch.arange(partials.shape[0], dtype=torch.float64, device=partials.device)
    sizes = sizes.clamp(max=ROWS_OF_BLOCK)[:, None]
    kl, mean, squares = partials.double().unbind(1)
    total = (sizes * mean).sum(0) / rows
    squares = squares.sum(0) + (sizes * (mean - total).square()).sum(0)
    outputs.kl_per_dim.copy_(kl.sum(0) / rows)
    outputs.mean_variance.copy_(squares / max(rows - 1, 0))


def _fwd(fill: Callable[..., None], columns_of_sum: Callable[[torch.dtype, int], int], *arguments) -> Outputs:
    """columns_of_sum: how many columns of a row the kernel adds up to one number."""
    inputs, options, statistics = _split_fwd(arguments)
    outputs = _empty_outputs(inputs, options, statistics)
    rows, columns = inputs.mean.shape
    kl = outputs.kl if options.kl == ELEMENTS else None
    if options.kl == ROWS:
        parts = -(-columns // columns_of_sum(inputs.mean.dtype, columns))
        kl = outputs.kl[:, None] if parts == 1 else outputs.kl.new_empty(rows, parts)
    z = _row_first(outputs.z, options) if options.samples >= 0 else None
    partials = outputs.kl.new_empty((_row_blocks(rows), 3, columns)) if statistics else None
    if inputs.mean.numel() > 0:
        limits = (options.free_bits, options.low, options.high)
        fill(*_with_unit_stride(inputs), *limits, z, kl, options.kl == ROWS, partials)
    if options.kl == ROWS and kl.shape[1] != 1:
        torch.sum(kl, 1, out=outputs.kl)
    if statistics:
        _finish_statistics(partials, rows, outputs)
    return outputs


def _bwd(fill: Callable[..., None], *arguments) -> Gradients:
    grad_z, grad_kl, inputs, options, wanted = _split_bwd(arguments)
    gradients = _empty_gradients(inputs, wanted)
    rows, columns = inputs.mean.shape
    filled = [gradient if want else None for gradient, want in zip(gradients, wanted, strict=True)]
    for i, prior in enumerate((inputs.prior_mean, inputs.prior_logvar), 2):
        if wanted[i] and prior.shape[0] == 1:  # of all rows, in parts
            filled[i] = gradients[i].new_empty(
                (_row_blocks(rows), columns), dtype=accumulation_dtype(gradients[i].dtype)
            )
    if inputs.mean.numel() > 0:
        limits = (options.free_bits, options.low, options.high)
        by_row = _row_first(grad_z, options) if options.samples > 0 else None
        fill(*_with_unit_stride(inputs), *limits, by_row, grad_kl, options.kl == ROWS, *filled)
    for gradient, part in zip(gradients[2:], filled[2:], strict=True):
        if part is not None and part is not gradient:
            gradient.copy_(part.sum(0, keepdim=True))
    return gradients


def _native_fwd(*arguments) -> None:
    torch.ops.sslkernels_native.gaussian_fwd(*arguments)


def _native_bwd(*arguments) -> None:
    torch.ops.sslkernels_native.gaussian_bwd(*arguments)


def _triton_fwd(*arguments) -> None:
    from sslkernels.latent.triton.gaussian import gaussian_fwd

    gaussian_fwd(*arguments)


def _triton_bwd(*arguments) -> None:
    from sslkernels.latent.triton.gaussian import gaussian_bwd

    gaussian_bwd(*arguments)


def _triton_columns(dtype: torch.dtype, columns: int) -> int:
    from sslkernels.latent.triton.gaussian import columns_of_tile

    return columns_of_tile(dtype, columns)


def _cpu_columns(dtype: torch.dtype, columns: int) -> int:
    return 1024  # kChunk in csrc/cpu/gaussian.cpp


def _cuda_columns(dtype: torch.dtype, columns: int) -> int:
    return 32 * (8 if dtype.itemsize == 2 else 4)  # a warp's: kTile in csrc/cuda/gaussian.cu


# --- Operators ----------------------------------------------------------------------------------------------------


def _split_fwd(arguments: tuple) -> tuple[Inputs, Options, bool]:
    return Inputs(*arguments[:6]), Options(*arguments[6:12]), arguments[12]


def _split_bwd(arguments: tuple) -> tuple[Tensor | None, Tensor | None, Inputs, Options, tuple[bool, ...]]:
    return *arguments[:2], Inputs(*arguments[2:8]), Options(*arguments[8:14]), arguments[14:]


_INPUTS = "Tensor mean, Tensor logvar, Tensor? prior_mean, Tensor? prior_logvar, Tensor? row_ids, Tensor? seed"
_OPTIONS = "SymInt samples, bool samples_first, int kl, float free_bits, float low, float high"
_WANTED = "bool want_mean, bool want_logvar, bool want_prior_mean, bool want_prior_logvar"
_TENSORS = "(Tensor, Tensor, Tensor, Tensor)"
NATIVE_OPS = ("gaussian_fwd", "gaussian_bwd")

gaussian_fwd = Op(
    "gaussian_rsample",
    f"gaussian_fwd({_INPUTS}, {_OPTIONS}, bool statistics) -> {_TENSORS}",
    fake=lambda *arguments: _empty_outputs(*_split_fwd(arguments)),
    implementations={
        "reference": _reference_fwd,
        "cpu": partial(_fwd, _native_fwd, _cpu_columns),
        "triton": partial(_fwd, _triton_fwd, _triton_columns),
        "cuda": partial(_fwd, _native_fwd, _cuda_columns),
    },
    native_ops=NATIVE_OPS,
    prefer=PREFERENCE,
)
gaussian_bwd = Op(
    "gaussian_rsample",
    f"gaussian_bwd(Tensor? grad_z, Tensor? grad_kl, {_INPUTS}, {_OPTIONS}, {_WANTED}) -> {_TENSORS}",
    fake=lambda *arguments: _empty_gradients(_split_bwd(arguments)[2], arguments[14:]),
    implementations={
        "reference": _reference_bwd,
        "cpu": partial(_bwd, _native_bwd),
        "triton": partial(_bwd, _triton_bwd),
        "cuda": partial(_bwd, _native_bwd),
    },
    native_ops=NATIVE_OPS,
    prefer=PREFERENCE,
)
