"""Multiplies a tensor in place by a scalar on the device; if it is 1, the tensor is not even read."""

import triton
import triton.language as tl
from torch import Tensor

from sslkernels.core.triton.launch import on_device_of

BLOCK = 4096


@triton.jit
def scale_kernel(values_ptr, scale_ptr, count, BLOCK: tl.constexpr):
    scale = tl.load(scale_ptr)
    if scale != 1:
        offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        values = tl.load(values_ptr + offset, mask=offset < count)
        tl.store(values_ptr + offset, (values.to(scale.dtype) * scale).to(values.dtype), mask=offset < count)


def scale_(values: Tensor, scale: Tensor) -> None:
    """values *= scale, 0-d and at least as wide as the accumulation dtype of values; values are contiguous."""
    count = values.numel()
    if count == 0:
        return
    with on_device_of(values):
        scale_kernel[(triton.cdiv(count, BLOCK),)](values, scale, count, BLOCK=BLOCK, num_warps=8)
