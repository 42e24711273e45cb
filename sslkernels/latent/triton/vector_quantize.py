"""Codes looked up by index in Triton: a program computes a block of rows, and reads and writes each row once."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sslkernels.core.triton.launch import Config, next_power_of_2, on_device_of

ELEMENTS = 1024  # elements per block of rows


@triton.jit
def _rounded_to(values, dtype: tl.constexpr):
    """Converts float64 by way of float32, as torch does."""
    if dtype != tl.float64:
        values = values.to(tl.float32)
    return values.to(dtype)


@triton.jit
def _load_rows(input, codebook, code, valid, row, column, dim, acc: tl.constexpr):
    """Elements of rows and of their codes, which of them are valid, and their offsets in the rows. The caller loads
    `code`: in the loop over columns the load would cost registers that spill."""
    inside = valid[:, None] & (column < dim)[None, :]
    at = row[:, None] * dim + column[None, :]
    x = tl.load(input + at, inside, other=0.0).to(acc)
    c = tl.load(codebook + code[:, None] * dim + column[None, :], inside, other=0.0).to(acc)
    return x, c, inside, at


@triton.jit(do_not_specialize=["rows"])
def gather_codes_kernel(
    input, codebook, index, score, values, distance, rows, dim, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr
):
    acc: tl.constexpr = distance.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    valid = row < rows
    code = tl.load(index + row, valid, other=0)
    is_nan = tl.load(score + row, valid, other=0.0)
    is_nan = is_nan != is_nan
    total = tl.zeros((BLOCK_R,), acc)
    for start in range(0, dim, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        x, c, inside, at = _load_rows(input, codebook, code, valid, row, column, dim, acc)
        difference = x - c
        total += tl.sum(difference * difference, 1)
        c = tl.where(is_nan[:, None], float("nan"), c)
        tl.store(values + at, _rounded_to(c, values.dtype.element_ty), inside)
    tl.store(distance + row, tl.where(is_nan, float("nan"), total), valid)


@triton.jit(do_not_specialize=["rows"])
def code_difference_kernel(
    coefficient, input, codebook, index, out, rows, dim, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr
):
    acc: tl.constexpr = coefficient.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    valid = row < rows
    code = tl.load(index + row, valid, other=0)
    scale = tl.load(coefficient)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    x, c, inside, at = _load_rows(input, codebook, code, valid, row, column, dim, acc)
    tl.store(out + at, _rounded_to(scale * (x - c), out.dtype.element_ty), inside)


def config(dim: int) -> Config:
    block_d = min(256, next_power_of_2(dim))
    return Config({"BLOCK_R": ELEMENTS // block_d, "BLOCK_D": block_d}, {"num_warps": 4})


def gather_codes(
    input: Tensor, codebook: Tensor, index: Tensor, score: Tensor, values: Tensor, distance: Tensor
) -> None:
    """Fills values (N, D), NaN in rows whose score is NaN, and distance (N,), the squared distance of row and code."""
    rows, dim = input.shape
    if rows == 0:
        return
    chosen = config(dim)
    with on_device_of(input):
        gather_codes_kernel[(triton.cdiv(rows, chosen.constexprs["BLOCK_R"]),)](
            input, codebook, index, score, values, distance, rows, dim, **chosen.constexprs, **chosen.options
        )


def code_difference(coefficient: Tensor, input: Tensor, codebook: Tensor, index: Tensor, out: Tensor) -> None:
    """Fills out (N, D) with coefficient (0-d) times (input - code)."""
    rows, dim = input.shape
    if rows == 0:
        return
    chosen = config(dim)
    grid = tuple(triton.cdiv(n, chosen.constexprs[block]) for n, block in ((rows, "BLOCK_R"), (dim, "BLOCK_D")))
    with on_device_of(input):
        code_difference_kernel[grid](
            coefficient, input, codebook, index, out, rows, dim, **chosen.constexprs, **chosen.options
        )
