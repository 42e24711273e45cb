"""Matmuls of 16-bit numbers that add to a float32 total, as a GPU computes them."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

# Rows of the total that are added at a time where one call cannot: the product of all rows would take as much memory as
# the total.
BLOCK = 16384


def add_product(total: Tensor, left: Tensor, right: Tensor, first: bool) -> None:
    """total = (0 if first else total) + left @ right, in the dtype of `total`; the first product may be written over
    uninitialised memory."""
    if total.dtype == left.dtype:
        torch.addmm(total, left, right, beta=0 if first else 1, out=total)
    elif first:
        torch.mm(left, right, out_dtype=total.dtype, out=total)
    elif _adds_to(total.dtype, left.dtype, total.device):
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        for begin in range(0, total.shape[0], BLOCK):
            rows = slice(begin, begin + BLOCK)
            total[rows] += torch.mm(left[rows], right, out_dtype=total.dtype)


@functools.cache
def _adds_to(total: torch.dtype, operands: torch.dtype, device: torch.device) -> bool:
    """Whether `addmm` takes a total of one dtype and operands of another: some releases of torch that have `out_dtype`
    want them to be equal."""
    values = torch.zeros(16, 16, dtype=operands, device=device)
    sums = torch.zeros(16, 16, dtype=total, device=device)
    try:
        torch.addmm(sums, values, values, out_dtype=total, out=sums)
    except (RuntimeError, TypeError):
        return False
    return True
