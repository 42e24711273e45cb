"""The free energy of K candidates in Triton.

A program reduces a tile of results by candidates, of any strides, and reads each energy once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sslkernels.core.triton.launch import next_power_of_2, on_device_of, processors
from sslkernels.latent.triton.energy_sums import add_energies, lower_energies, soft_value, soft_weights

LINE = 32  # at least this many adjacent results a tile, if the results are contiguous


def config(dtype: torch.dtype, shape: tuple[int, int, int], inner_stride: int, programs: int) -> dict[str, int | bool]:
    """A tile of 8 or 16 elements a thread (4 of float64), with few enough results for at least `programs` programs."""
    outer, count, inner = shape
    elements = 512 if dtype == torch.float64 else 2048
    wide = inner > 1 and inner_stride == 1
    block_r = min(next_power_of_2(inner), LINE) if wide else 1
    block_k = min(next_power_of_2(count), elements // block_r)
    results = inner if wide else outer * inner
    while block_r * block_k < elements and block_r < results and outer * inner > programs * block_r:
        block_r *= 2
    wide = wide and inner >= block_r
    return {"WIDE": wide, "BLOCK_R": block_r, "BLOCK_K": block_k}


def launch_options(dtype: torch.dtype, constexprs: dict[str, int | bool]) -> dict[str, int]:
    per_warp = 128 if dtype == torch.float64 else 512 if constexprs["WIDE"] else 256  # more spills registers
    return {"num_warps": min(max(constexprs["BLOCK_R"] * constexprs["BLOCK_K"] // per_warp, 1), 8)}


@triton.jit
def _results(block, outer, inner, outer_stride, inner_stride, WIDE: tl.constexpr, BLOCK_R: tl.constexpr):
    """Indices of a block's results in (outer, inner), which of them are valid, and the offsets of their energies."""
    lane = tl.arange(0, BLOCK_R)
    if WIDE:  # a block of one outer index
        blocks = (inner + BLOCK_R - 1) // BLOCK_R
        o = block // blocks
        i = block % blocks * BLOCK_R + lane
        valid = i < inner
    else:
        r = block * BLOCK_R + lane
        o = r // inner
        i = r % inner
        valid = o < outer
    return o * inner + i, valid, o * outer_stride + i * inner_stride


@triton.jit
def free_energy_fwd_kernel(
    energy_ptr, value_ptr, lowest_ptr, total_ptr, winner_ptr,
    outer, count, inner, outer_stride, count_stride, inner_stride, beta: tl.float64, inverse: tl.float64,
    MINIMUM: tl.constexpr, STATE: tl.constexpr, WIDE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = value_ptr.dtype.element_ty
    beta = tl.full((), beta, ACC)
    inverse = tl.full((), inverse, ACC)
    block = tl.program_id(0).to(tl.int64)
    r, in_range, offset = _results(block, outer, inner, outer_stride, inner_stride, WIDE, BLOCK_R)
    lane = tl.arange(0, BLOCK_K)
    lowest = tl.full((BLOCK_R,), float("inf"), ACC)
    total = tl.zeros((BLOCK_R,), ACC)
    deficit = tl.zeros((BLOCK_R,), ACC)
    winner = tl.zeros((BLOCK_R,), tl.int32)
    for start in range(0, count, BLOCK_K):
        k = start + lane
        valid = in_range[:, None] & (k < count)[None, :]
        at = offset[:, None] + k.to(tl.int64)[None, :] * count_stride
        energy = tl.load(energy_ptr + at, mask=valid, other=0.0).to(ACC)
        if MINIMUM:
            lowest, winner = lower_energies(energy, valid, k[None, :], lowest, winner)
        else:
            lowest, total, deficit = add_energies(energy, valid, start, lowest, total, deficit, beta, inverse)
    if MINIMUM:
        tl.store(value_ptr + r, lowest, mask=in_range)
        if STATE:
            tl.store(winner_ptr + r, winner.to(tl.int64), mask=in_range)
    else:
        tl.store(value_ptr + r, soft_value(count, lowest, total, deficit, beta, inverse), mask=in_range)
        if STATE:
            tl.store(lowest_ptr + r, lowest, mask=in_range)
            tl.store(total_ptr + r, total, mask=in_range)


@triton.jit
def free_energy_bwd_kernel(
    grad_value_ptr, energy_ptr, lowest_ptr, total_ptr, winner_ptr, grad_ptr,
    outer, count, inner, outer_stride, count_stride, inner_stride, grad_outer_stride, grad_count_stride,
    grad_inner_stride, beta: tl.float64,
    MINIMUM: tl.constexpr, WIDE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = grad_value_ptr.dtype.element_ty
    beta = tl.full((), beta, ACC)
    blocks = (count + BLOCK_K - 1) // BLOCK_K
    program = tl.program_id(0).to(tl.int64)
    r, in_range, grad_offset = _results(
        program // blocks, outer, inner, grad_outer_stride, grad_inner_stride, WIDE, BLOCK_R
    )
    k = program % blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    valid = in_range[:, None] & (k < count)[None, :]
    grad_value = tl.load(grad_value_ptr + r, mask=in_range, other=0.0)
    if MINIMUM:
        winner = tl.load(winner_ptr + r, mask=in_range, other=0)
        grad = tl.where(k[None, :] == winner[:, None], grad_value[:, None], 0.0)
    else:
        _, _, offset = _results(program // blocks, outer, inner, outer_stride, inner_stride, WIDE, BLOCK_R)
        lowest = tl.load(lowest_ptr + r, mask=in_range, other=0.0)
        scale = grad_value / tl.load(total_ptr + r, mask=in_range, other=1.0)
        at = offset[:, None] + k[None, :] * count_stride
        energy = tl.load(energy_ptr + at, mask=valid, other=0.0).to(ACC)
        grad = soft_weights(energy, lowest[:, None], 1.0, beta) * scale[:, None]
    at = grad_offset[:, None] + k[None, :] * grad_count_stride
    tl.store(grad_ptr + at, grad.to(grad_ptr.dtype.element_ty), mask=valid)


def _blocks(shape: tuple[int, int, int], constexprs: dict[str, int | bool]) -> int:
    outer, _, inner = shape
    block_r = constexprs["BLOCK_R"]
    return outer * triton.cdiv(inner, block_r) if constexprs["WIDE"] else triton.cdiv(outer * inner, block_r)


def free_energy_fwd(energy: Tensor, outputs: Any, options: Any) -> None:
    """Fills the tensors of `outputs`, the record `Outputs` whose state may be None, from energies (outer, K, inner);
    `options` is the record `Options`."""
    if outputs.value.numel() == 0:
        return
    shape = tuple(energy.shape)
    constexprs = config(energy.dtype, shape, energy.stride(2), 2 * processors(energy))
    state = outputs.winner is not None or outputs.total is not None
    with on_device_of(energy):
        free_energy_fwd_kernel[(_blocks(shape, constexprs),)](
            energy, *outputs, *shape, *energy.stride(), float(options.beta), 1 / options.beta,
            MINIMUM=options.minimum, STATE=state, **constexprs, **launch_options(energy.dtype, constexprs),
        )  # fmt: skip


def free_energy_bwd(grad_value: Tensor, energy: Tensor | None, state: Any, grad: Tensor, options: Any) -> None:
    """Fills grad (outer, K, inner); the minimum takes no energies. `state` and `options`: the records of these names,
    without the tensors that the mode does not need."""
    if grad.numel() == 0:
        return
    shape = tuple(grad.shape)
    strides = grad.stride() if energy is None else energy.stride()
    constexprs = config(grad.dtype, shape, grad.stride(2), 2 * processors(grad))
    programs = _blocks(shape, constexprs) * triton.cdiv(shape[1], constexprs["BLOCK_K"])
    with on_device_of(grad):
        free_energy_bwd_kernel[(programs,)](
            grad_value, energy, *state, grad, *shape, *strides, *grad.stride(), float(options.beta),
            MINIMUM=energy is None, **constexprs, **launch_options(grad.dtype, constexprs),
        )  # fmt: skip
