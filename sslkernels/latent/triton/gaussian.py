"""Gaussian samples and their divergence in Triton.

A program computes a tile of ROWS rows and COLS columns, and reads mean and logvar once for all samples. The noise stays
in registers; one thread generates the four columns of a group. A tile is a vector of ROWS * COLS elements in row-major
order; sums over rows and columns reshape it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sslkernels.core.triton.launch import next_power_of_2
from sslkernels.core.triton.numerics import exp_any, expm1_terms
from sslkernels.random.triton import transforms
from sslkernels.random.triton.philox import group_words

ROWS_OF_BLOCK = 64  # rows reduced to one partial sum a column


def _elements(dtype: torch.dtype) -> int:
    """Elements per tile."""
    return 512 if dtype == torch.float64 else 1024


def columns_of_tile(dtype: torch.dtype, columns: int) -> int:
    return min(max(next_power_of_2(columns), 4), _elements(dtype))


def config(dtype: torch.dtype, columns: int, sums: bool) -> dict[str, int]:
    """sums: a program reduces the columns of ROWS_OF_BLOCK rows, in STEPS tiles."""
    cols = columns_of_tile(dtype, columns)
    rows = _elements(dtype) // cols
    rows = min(rows, ROWS_OF_BLOCK) if sums else rows
    return {"STEPS": ROWS_OF_BLOCK // rows if sums else 1, "ROWS": rows, "COLS": cols}


@triton.jit
def _tile(rows, columns, tiles, step, STEPS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """First row and column of the program's tile; rows and columns of its elements within it, and which are valid."""
    program = tl.program_id(0).to(tl.int64)
    first = ((program // tiles) * STEPS + step) * ROWS
    column = (program % tiles) * COLS
    element = tl.arange(0, ROWS * COLS)
    row = (element // COLS).to(tl.int64)
    col = element % COLS
    return first, column, row, col, (row < rows - first) & (col < columns - column)


@triton.jit
def _load(pointer, stride, first, column, row, col, valid, ACC: tl.constexpr):
    return tl.load(pointer + first * stride + column + (row * stride + col), mask=valid, other=0.0).to(ACC)


@triton.jit
def _group_numbers(
    row_ids_ptr, first, column, rows, groups,
    HAS_ROW_IDS: tl.constexpr, PAIRS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Philox group numbers of the tile, int64; PAIRS: of every second group."""
    EACH: tl.constexpr = 8 if PAIRS else 4
    group = tl.arange(0, ROWS * COLS // EACH)
    row_id = first + group // (COLS // EACH)
    if HAS_ROW_IDS:
        row_id = tl.load(row_ids_ptr + row_id, mask=row_id < rows, other=0)
    return row_id * groups + column // 4 + group % (COLS // EACH) * (EACH // 4)


@triton.jit
def _normals(seed, number, sample, PAIRS: tl.constexpr):
    """The noise of the tile. PAIRS: one thread generates two adjacent groups, whose columns are 16 bytes of half
    precision, so that they are stored without an exchange between threads."""
    draw = tl.full((), 0, tl.int64) + sample
    if PAIRS:
        w0, w1, w2, w3 = group_words(seed, number, draw)
        a0, a1 = transforms.normal_pair(w0, w1)
        a2, a3 = transforms.normal_pair(w2, w3)
        w0, w1, w2, w3 = group_words(seed, number + 1, draw)
        b0, b1 = transforms.normal_pair(w0, w1)
        b2, b3 = transforms.normal_pair(w2, w3)
        even = tl.join(tl.join(a0, b0), tl.join(a2, b2))
        odd = tl.join(tl.join(a1, b1), tl.join(a3, b3))
        return tl.reshape(tl.join(even, odd), (8 * number.shape[0],))
    else:
        return transforms.normals(seed, number, draw)


@triton.jit
def _divergence(
    mean, logvar, scale, prior_mean_ptr, prior_logvar_ptr, prior_mean_stride, prior_logvar_stride,
    first, column, row, col, valid, PRIOR: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """t, exp(-prior_logvar / 2), expm1(d) and the divergence, with the names of `latent/gaussian_operators.py`."""
    if PRIOR:
        prior_mean = _load(prior_mean_ptr, prior_mean_stride, first, column, row, col, valid, ACC)
        prior_logvar = _load(prior_logvar_ptr, prior_logvar_stride, first, column, row, col, valid, ACC)
        d = logvar - prior_logvar
        inverse_scale = exp_any(-0.5 * prior_logvar)
        t = (mean - prior_mean) * inverse_scale
        expm1, excess = expm1_terms(d, exp_any(d))
    else:
        inverse_scale = tl.full(mean.shape, 1.0, ACC)
        t = mean
        expm1, excess = expm1_terms(logvar, scale * scale)
    return t, inverse_scale, expm1, 0.5 * (t * t + excess)


@triton.jit
def _clamped(logvar, low, high, BOUNDED: tl.constexpr):
    if BOUNDED:
        low = tl.full((), low, logvar.dtype)
        high = tl.full((), high, logvar.dtype)
        return tl.where(logvar < low, low, tl.where(logvar > high, high, logvar))  # NaN passes
    else:
        return logvar


@triton.jit(do_not_specialize=["groups", "samples", "tiles"])
def gaussian_fwd_kernel(
    mean_ptr, logvar_ptr, prior_mean_ptr, prior_logvar_ptr, row_ids_ptr, seed_ptr, z_ptr, kl_ptr, statistics_ptr,
    mean_stride, logvar_stride, prior_mean_stride, prior_logvar_stride, z_row_stride, z_sample_stride, rows, columns,
    groups, samples, tiles, free_bits: tl.float64, low: tl.float64, high: tl.float64,
    SAMPLE: tl.constexpr, KL: tl.constexpr, BY_ROW: tl.constexpr, STATISTICS: tl.constexpr, PRIOR: tl.constexpr,
    FREE: tl.constexpr, BOUNDED: tl.constexpr, HAS_ROW_IDS: tl.constexpr, PAIRS: tl.constexpr, ACC: tl.constexpr,
    STEPS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    kl_sum = tl.zeros((COLS,), ACC)
    # Running over the rows `seen` (Chan, Golub and LeVeque 1983): the average of `mean` minus row 0, and the sum of
    # squared deviations from it.
    average = tl.zeros((COLS,), ACC)
    squares = tl.zeros((COLS,), ACC)
    for step in range(STEPS):
        first, column, row, col, valid = _tile(rows, columns, tiles, step, STEPS, ROWS, COLS)
        mean = _load(mean_ptr, mean_stride, first, column, row, col, valid, ACC)
        logvar = _load(logvar_ptr, logvar_stride, first, column, row, col, valid, ACC)
        logvar = _clamped(logvar, low, high, BOUNDED)
        scale = exp_any(0.5 * logvar)
        if KL or STATISTICS:
            _, _, _, kl = _divergence(
                mean, logvar, scale, prior_mean_ptr, prior_logvar_ptr, prior_mean_stride, prior_logvar_stride,
                first, column, row, col, valid, PRIOR, ACC,
            )  # fmt: skip
        if STATISTICS:
            count = tl.maximum(tl.minimum(rows - first, ROWS), 0)
            inside = tl.reshape(valid, (ROWS, COLS))
            kl_sum += tl.sum(tl.where(inside, tl.reshape(kl, (ROWS, COLS)), 0.0), 0)
            pivot = tl.load(mean_ptr + column + col, mask=valid, other=0.0).to(ACC)
            moved = tl.where(inside, tl.reshape(mean - pivot, (ROWS, COLS)), 0.0)
            own = tl.sum(moved, 0) * (1.0 / tl.maximum(count, 1).to(ACC))
            distance = tl.where(inside, moved - own[None, :], 0.0)
            seen = tl.full((), step * ROWS, ACC)
            weight = count.to(ACC) / tl.maximum(seen + count.to(ACC), 1.0)
            squares += tl.sum(distance * distance, 0) + (own - average) * (own - average) * seen * weight
            average += (own - average) * weight
        if KL:
            if FREE:
                least = tl.full((), free_bits, ACC)
                kl = tl.where(kl < least, least, kl)
            if BY_ROW:
                total = tl.sum(tl.reshape(tl.where(valid, kl, 0.0), (ROWS, COLS)), 1)
                line = first + tl.arange(0, ROWS)
                tl.store(kl_ptr + line * tiles + column // COLS, total, mask=line < rows)
            else:
                tl.store(kl_ptr + first * columns + column + (row * columns + col), kl, mask=valid)
        if SAMPLE:
            number = _group_numbers(row_ids_ptr, first, column, rows, groups, HAS_ROW_IDS, PAIRS, ROWS, COLS)
            seed = tl.load(seed_ptr)
            z = z_ptr + first * z_row_stride + column + (row * z_row_stride + col)
            sample = tl.full((), 0, tl.int64)
            for k in range(samples):
                eps = _normals(seed, number, k, PAIRS)
                values = mean + scale * eps.to(ACC)
                tl.store(z + sample, values.to(z_ptr.dtype.element_ty), mask=valid)
                sample += z_sample_stride
    if STATISTICS:
        program = tl.program_id(0).to(tl.int64)
        at = (program % tiles) * COLS + tl.arange(0, COLS)
        out = statistics_ptr + (program // tiles) * 3 * columns + at
        tl.store(out, kl_sum, mask=at < columns)
        tl.store(out + columns, average, mask=at < columns)
        tl.store(out + 2 * columns, squares, mask=at < columns)


@triton.jit
def _store_prior_gradient(
    pointer, slopes, total, columns, first, column, row, col, valid,
    WANTED: tl.constexpr, SHARED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Stores the slopes of a tile, or adds their column sums to `total` (SHARED)."""
    if WANTED:
        if SHARED:
            total += tl.sum(tl.reshape(tl.where(valid, slopes, 0.0), (ROWS, COLS)), 0)
        else:
            out = pointer + first * columns + column + (row * columns + col)
            tl.store(out, slopes.to(pointer.dtype.element_ty), mask=valid)
    return total


@triton.jit(do_not_specialize=["groups", "samples", "tiles"])
def gaussian_bwd_kernel(
    grad_z_ptr, grad_kl_ptr, mean_ptr, logvar_ptr, prior_mean_ptr, prior_logvar_ptr, row_ids_ptr, seed_ptr,
    grad_mean_ptr, grad_logvar_ptr, grad_prior_mean_ptr, grad_prior_logvar_ptr, mean_stride, logvar_stride,
    prior_mean_stride, prior_logvar_stride, z_row_stride, z_sample_stride, rows, columns, groups, samples, tiles,
    free_bits: tl.float64, low: tl.float64, high: tl.float64, kl_stride,
    SAMPLE: tl.constexpr, KL: tl.constexpr, BY_ROW: tl.constexpr, PRIOR: tl.constexpr, FREE: tl.constexpr,
    BOUNDED: tl.constexpr, HAS_ROW_IDS: tl.constexpr, PAIRS: tl.constexpr, WANT_MEAN: tl.constexpr,
    WANT_LOGVAR: tl.constexpr, WANT_PRIOR_MEAN: tl.constexpr, WANT_PRIOR_LOGVAR: tl.constexpr,
    SHARED_PRIOR_MEAN: tl.constexpr, SHARED_PRIOR_LOGVAR: tl.constexpr, ACC: tl.constexpr, STEPS: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    prior_mean_sum = tl.zeros((COLS,), ACC)
    prior_logvar_sum = tl.zeros((COLS,), ACC)
    for step in range(STEPS):
        first, column, row, col, valid = _tile(rows, columns, tiles, step, STEPS, ROWS, COLS)
        given = _load(logvar_ptr, logvar_stride, first, column, row, col, valid, ACC)
        logvar = _clamped(given, low, high, BOUNDED)
        scale = exp_any(0.5 * logvar)
        in_mean = tl.zeros((ROWS * COLS,), ACC)
        in_logvar = tl.zeros((ROWS * COLS,), ACC)
        if SAMPLE:
            grad_z = grad_z_ptr + first * z_row_stride + column + (row * z_row_stride + col)
            if WANT_LOGVAR:
                number = _group_numbers(row_ids_ptr, first, column, rows, groups, HAS_ROW_IDS, PAIRS, ROWS, COLS)
                seed = tl.load(seed_ptr)
            sample = tl.full((), 0, tl.int64)
            for k in range(samples):
                grad = tl.load(grad_z + sample, mask=valid, other=0.0).to(ACC)
                in_mean += grad
                if WANT_LOGVAR:
                    eps = _normals(seed, number, k, PAIRS)
                    in_logvar += grad * eps.to(ACC)
                sample += z_sample_stride
            in_logvar *= scale
        if KL:
            mean = _load(mean_ptr, mean_stride, first, column, row, col, valid, ACC)
            t, inverse_scale, expm1, kl = _divergence(
                mean, logvar, scale, prior_mean_ptr, prior_logvar_ptr, prior_mean_stride, prior_logvar_stride,
                first, column, row, col, valid, PRIOR, ACC,
            )  # fmt: skip
            if BY_ROW:
                grad_kl = tl.load(grad_kl_ptr + (first + row) * kl_stride, mask=row < rows - first, other=0.0)
            else:
                grad_kl_at = grad_kl_ptr + first * kl_stride + column + (row * kl_stride + col)
                grad_kl = tl.load(grad_kl_at, mask=valid, other=0.0)
            if FREE:
                grad_kl = tl.where(kl < tl.full((), free_bits, ACC), 0.0, grad_kl)
            kl_in_mean = grad_kl * t * inverse_scale
            in_mean += kl_in_mean
            in_logvar += grad_kl * expm1
            prior_mean_sum = _store_prior_gradient(
                grad_prior_mean_ptr, -kl_in_mean, prior_mean_sum, columns, first, column, row, col, valid,
                WANT_PRIOR_MEAN, SHARED_PRIOR_MEAN, ROWS, COLS,
            )  # fmt: skip
            prior_logvar_sum = _store_prior_gradient(
                grad_prior_logvar_ptr, -0.5 * grad_kl * (t * t + expm1), prior_logvar_sum, columns, first, column, row,
                col, valid, WANT_PRIOR_LOGVAR, SHARED_PRIOR_LOGVAR, ROWS, COLS,
            )  # fmt: skip
        at = first * columns + column + (row * columns + col)
        if WANT_MEAN:
            tl.store(grad_mean_ptr + at, in_mean.to(grad_mean_ptr.dtype.element_ty), mask=valid)
        if WANT_LOGVAR:
            in_logvar *= 0.5
            if BOUNDED:
                outside = (given < tl.full((), low, ACC)) | (given > tl.full((), high, ACC))
                in_logvar = tl.where(outside, 0.0, in_logvar)
            tl.store(grad_logvar_ptr + at, in_logvar.to(grad_logvar_ptr.dtype.element_ty), mask=valid)
    program = tl.program_id(0).to(tl.int64)
    at = (program % tiles) * COLS + tl.arange(0, COLS)
    if WANT_PRIOR_MEAN and SHARED_PRIOR_MEAN:
        tl.store(grad_prior_mean_ptr + (program // tiles) * columns + at, prior_mean_sum, mask=at < columns)
    if WANT_PRIOR_LOGVAR and SHARED_PRIOR_LOGVAR:
        tl.store(grad_prior_logvar_ptr + (program // tiles) * columns + at, prior_logvar_sum, mask=at < columns)


def _row_stride(tensor: Tensor | None, rows: int) -> int:
    """0 for a row that all rows share, and for None."""
    return 0 if tensor is None or (tensor.shape[0] == 1 and rows != 1) else tensor.stride(0)


def _sizes(inputs: Any, z: Tensor | None) -> tuple[int, ...]:
    mean, logvar, prior_mean, prior_logvar, _, _ = inputs
    rows, columns = mean.shape
    strides = [_row_stride(tensor, rows) for tensor in (mean, logvar, prior_mean, prior_logvar)]
    strides += [0, 0] if z is None else [z.stride(0), z.stride(1)]
    tiles = triton.cdiv(columns, columns_of_tile(mean.dtype, columns))
    return *strides, rows, columns, (columns + 3) // 4, 0 if z is None else z.shape[1], tiles


def _grid(mean: Tensor, shape: dict[str, int]) -> tuple[int]:
    rows, columns = mean.shape
    return (triton.cdiv(rows, shape["ROWS"] * shape["STEPS"]) * triton.cdiv(columns, shape["COLS"]),)


def _acc(dtype: torch.dtype) -> Any:
    return tl.float64 if dtype == torch.float64 else tl.float32


def _pairs(dtype: torch.dtype, shape: dict[str, int]) -> bool:
    return dtype.itemsize == 2 and shape["COLS"] >= 8


def _flags(inputs: Any, options: Any, by_row: bool, shape: dict[str, int]) -> dict[str, Any]:
    """The constants that both kernels have."""
    return {
        "BY_ROW": by_row,
        "PRIOR": inputs.prior_mean is not None,
        "FREE": options.free_bits > 0,
        "BOUNDED": options.low != float("-inf") or options.high != float("inf"),
        "HAS_ROW_IDS": inputs.row_ids is not None,
        "PAIRS": _pairs(inputs.mean.dtype, shape),
        "ACC": _acc(inputs.mean.dtype),
        **shape,
    }


def gaussian_fwd(inputs: Any, options: Any, filled: Any, by_row: bool) -> None:
    """Fills the tensors of `filled`, the record `KernelOutputs`; kl is (rows, tiles) if by_row. `inputs` and `options`
    are the records `Inputs` and `Options`."""
    mean, z = inputs.mean, filled.z
    shape = config(mean.dtype, mean.shape[1], filled.statistics is not None)
    gaussian_fwd_kernel[_grid(mean, shape)](
        *inputs, *filled, *_sizes(inputs, z), options.free_bits, options.low, options.high,
        SAMPLE=z is not None, KL=filled.kl is not None, STATISTICS=filled.statistics is not None,
        **_flags(inputs, options, by_row, shape),
    )  # fmt: skip


def gaussian_bwd(inputs: Any, options: Any, grads: Any, filled: Any, by_row: bool) -> None:
    """Fills the tensors of `filled`, the record `Gradients`; a shared prior has partial sums over blocks of rows,
    (blocks, columns). `grads` is the record `OutputGrads`."""
    mean = inputs.mean
    shared = {
        "SHARED_PRIOR_MEAN": inputs.prior_mean is not None and inputs.prior_mean.shape[0] == 1,
        "SHARED_PRIOR_LOGVAR": inputs.prior_logvar is not None and inputs.prior_logvar.shape[0] == 1,
    }
    wanted = {f"WANT_{name.upper()}": gradient is not None for name, gradient in filled._asdict().items()}
    sums = any(shared[f"SHARED_{name}"] and wanted[f"WANT_{name}"] for name in ("PRIOR_MEAN", "PRIOR_LOGVAR"))
    shape = config(mean.dtype, mean.shape[1], sums)
    gaussian_bwd_kernel[_grid(mean, shape)](
        *grads, *inputs, *filled, *_sizes(inputs, grads.z), options.free_bits, options.low, options.high,
        0 if grads.kl is None else grads.kl.stride(0),
        SAMPLE=grads.z is not None, KL=grads.kl is not None, **wanted, **shared,
        **_flags(inputs, options, by_row, shape),
    )  # fmt: skip
