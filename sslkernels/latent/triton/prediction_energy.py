"""Squared errors of K predictions, their free energy, and its gradients in Triton.

A program loops over the features of a tile of targets by predictions. If the tile holds all predictions of its targets,
the program reduces their energies too. Otherwise, and if the features are split over programs, partial energies go to a
second kernel.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sslkernels.core.triton.launch import next_power_of_2, on_device_of, processors
from sslkernels.latent.triton.energy_sums import add_energies, lower_energies, soft_value, soft_weights

MOST_COLUMNS = 1 << 16  # features a program sums: few enough for float32
FINISH_BLOCK = {torch.float32: 512, torch.float64: 256}  # candidates a finishing program reads at a time


class Plan(NamedTuple):
    """parts: programs that share the features of a tile (forward) or its candidates (backward)."""

    constexprs: dict[str, int]
    parts: int
    options: dict[str, int]


def _tile(dtype: torch.dtype, batch: int, count: int, dim: int, programs: int, most_k: int) -> dict[str, int]:
    """16 elements a thread, 8 of float64, with few enough targets for at least `programs` programs."""
    elements = 1024 if dtype == torch.float64 else 4096
    block_k = min(next_power_of_2(count), most_k)
    block_d = min(next_power_of_2(dim), max(elements // block_k, 16))
    block_b = 1
    while 2 * block_b * block_k * block_d <= elements and batch >= 2 * block_b * programs:
        block_b *= 2
    return {"BLOCK_B": block_b, "BLOCK_K": block_k, "BLOCK_D": block_d}


def _warps(tile: dict[str, int], dtype: torch.dtype) -> dict[str, int]:
    elements = 256 if dtype == torch.float64 else 512  # a warp's; twice as many in float64 spill registers
    return {"num_warps": min(max(tile["BLOCK_B"] * tile["BLOCK_K"] * tile["BLOCK_D"] // elements, 1), 8)}


def plan_fwd(dtype: torch.dtype, batch: int, count: int, dim: int, programs: int) -> Plan:
    """FUSED: a program holds all candidates and features of its targets, and reduces their energies."""
    tile = _tile(dtype, batch, count, dim, programs, 32)
    blocks = triton.cdiv(batch, tile["BLOCK_B"]) * triton.cdiv(count, tile["BLOCK_K"])
    parts = max(min(triton.cdiv(programs, max(blocks, 1)), triton.cdiv(dim, 4 * tile["BLOCK_D"])), 1)
    columns = triton.cdiv(max(dim, 1), max(parts, triton.cdiv(dim, MOST_COLUMNS)))
    columns = triton.cdiv(columns, tile["BLOCK_D"]) * tile["BLOCK_D"]
    parts = max(triton.cdiv(dim, columns), 1)
    fused = parts == 1 and count <= tile["BLOCK_K"] and dtype != torch.float64  # its exponentials spill registers
    return Plan({**tile, "COLUMNS": columns, "FUSED": fused}, parts, _warps(tile, dtype))


def plan_bwd(dtype: torch.dtype, batch: int, count: int, dim: int, programs: int) -> Plan:
    tile = _tile(dtype, batch, count, dim, programs, 8)
    blocks = triton.cdiv(batch, tile["BLOCK_B"]) * triton.cdiv(dim, tile["BLOCK_D"])
    parts = max(min(triton.cdiv(programs, max(blocks, 1)), triton.cdiv(count, 4 * tile["BLOCK_K"])), 1)
    candidates = triton.cdiv(triton.cdiv(count, parts), tile["BLOCK_K"]) * tile["BLOCK_K"]
    return Plan(tile | {"CANDIDATES": candidates}, triton.cdiv(count, candidates), _warps(tile, dtype))


@triton.jit
def prediction_energy_fwd_kernel(
    prediction_ptr, target_ptr, value_ptr, weights_ptr, energies_ptr, parts_ptr,
    batch, count, dim, parts, batch_stride, count_stride, target_stride, beta: tl.float64, inverse: tl.float64,
    MINIMUM: tl.constexpr, WEIGHTS: tl.constexpr, ENERGIES: tl.constexpr, FUSED: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Energies of a tile summed over the features of a part, and reduced if FUSED."""
    ACC: tl.constexpr = value_ptr.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    blocks = (count + BLOCK_K - 1) // BLOCK_K
    k = program % blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    part = program // blocks % parts
    b = program // blocks // parts * BLOCK_B + tl.arange(0, BLOCK_B)
    in_batch = b < batch
    valid = in_batch[:, None] & (k < count)[None, :]
    row = b[:, None] * batch_stride + k[None, :] * count_stride
    begin = part * COLUMNS
    end = tl.minimum(begin + COLUMNS, dim)
    squares = tl.zeros((BLOCK_B, BLOCK_K, BLOCK_D), ACC)
    for start in range(begin, end, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        inside = column < end
        at = b[:, None] * target_stride + column[None, :]
        y = tl.load(target_ptr + at, mask=in_batch[:, None] & inside[None, :], other=0.0).to(ACC)
        at = row[:, :, None] + column[None, None, :]
        p = tl.load(prediction_ptr + at, mask=valid[:, :, None] & inside[None, None, :], other=0.0).to(ACC)
        difference = tl.where(valid[:, :, None], p - y[:, None, :], 0.0)
        squares += difference * difference
    energy = tl.sum(squares, 2)
    if FUSED:
        beta = tl.full((), beta, ACC)
        inverse = tl.full((), inverse, ACC)
        lowest = tl.full((BLOCK_B,), float("inf"), ACC)
        at = b[:, None] * count + k[None, :]
        if ENERGIES:
            tl.store(energies_ptr + at, energy, mask=valid)
        if MINIMUM:
            winner = tl.zeros((BLOCK_B,), tl.int64)
            lowest, winner = lower_energies(energy, valid, k[None, :], lowest, winner)
            tl.store(value_ptr + b, lowest, mask=in_batch)
            if WEIGHTS:
                tl.store(weights_ptr + at, tl.where(k[None, :] == winner[:, None], 1.0, 0.0), mask=valid)
        else:
            zero = tl.zeros((BLOCK_B,), ACC)
            lowest, total, deficit = add_energies(energy, valid, 0, lowest, zero, zero, beta, inverse)
            value = soft_value(count, lowest, total, deficit, beta, inverse)
            tl.store(value_ptr + b, value, mask=in_batch)
            if WEIGHTS:
                tl.store(weights_ptr + at, soft_weights(energy, lowest[:, None], total[:, None], beta), mask=valid)
    else:
        tl.store(parts_ptr + (b[:, None] * parts + part) * count + k[None, :], energy, mask=valid)


@triton.jit
def _energies(parts_ptr, k, valid, parts, count):
    energy = tl.zeros(k.shape, parts_ptr.dtype.element_ty)
    for part in range(0, parts):
        energy += tl.load(parts_ptr + part * count + k, mask=valid, other=0.0)
    return energy


@triton.jit
def prediction_energy_finish_kernel(
    parts_ptr, value_ptr, weights_ptr, energies_ptr, count, parts, beta: tl.float64, inverse: tl.float64,
    MINIMUM: tl.constexpr, WEIGHTS: tl.constexpr, ENERGIES: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Reduces the energies of one target per program, summed over `parts` parts."""
    ACC: tl.constexpr = value_ptr.dtype.element_ty
    beta = tl.full((), beta, ACC)
    inverse = tl.full((), inverse, ACC)
    b = tl.program_id(0).to(tl.int64)
    parts_ptr += b * parts * count
    lane = tl.arange(0, BLOCK_K)
    lowest = tl.full((1,), float("inf"), ACC)
    total = tl.zeros((1,), ACC)
    deficit = tl.zeros((1,), ACC)
    winner = tl.zeros((1,), tl.int32)
    for start in range(0, count, BLOCK_K):
        k = start + lane
        valid = k < count
        energy = _energies(parts_ptr, k, valid, parts, count)
        if ENERGIES:
            tl.store(energies_ptr + b * count + k, energy, mask=valid)
        energy = energy[None, :]
        if MINIMUM:
            lowest, winner = lower_energies(energy, valid[None, :], k[None, :], lowest, winner)
        else:
            lowest, total, deficit = add_energies(energy, valid[None, :], start, lowest, total, deficit, beta, inverse)
    if MINIMUM:
        tl.store(value_ptr + b + tl.arange(0, 1), lowest)
    else:
        value = soft_value(count, lowest, total, deficit, beta, inverse)
        tl.store(value_ptr + b + tl.arange(0, 1), value)
    if WEIGHTS:
        weights_ptr += b * count
        for start in range(0, count, BLOCK_K):
            k = start + lane
            valid = k < count
            if MINIMUM:
                weights = tl.where(k == winner, 1.0, 0.0)
            else:
                weights = soft_weights(_energies(parts_ptr, k, valid, parts, count), lowest, total, beta)
            tl.store(weights_ptr + k, weights, mask=valid)


@triton.jit
def prediction_energy_bwd_kernel(
    grad_value_ptr, prediction_ptr, target_ptr, weights_ptr, grad_prediction_ptr, grad_target_ptr,
    batch, count, dim, batch_stride, count_stride, target_stride, grad_batch_stride, grad_count_stride,
    WANT_PREDICTION: tl.constexpr, WANT_TARGET: tl.constexpr, CANDIDATES: tl.constexpr, BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The gradients of a tile; grad_target_ptr gets a partial sum for each part of the candidates."""
    ACC: tl.constexpr = grad_value_ptr.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    blocks = (dim + BLOCK_D - 1) // BLOCK_D
    rows = (batch + BLOCK_B - 1) // BLOCK_B
    column = program % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    b = program // blocks % rows * BLOCK_B + tl.arange(0, BLOCK_B)
    part = program // blocks // rows
    in_batch = b < batch
    inside = in_batch[:, None] & (column < dim)[None, :]
    y = tl.load(target_ptr + b[:, None] * target_stride + column[None, :], mask=inside, other=0.0).to(ACC)
    upstream = 2.0 * tl.load(grad_value_ptr + b, mask=in_batch, other=0.0)
    target_sum = tl.zeros((BLOCK_B, BLOCK_D), ACC)
    begin = part * CANDIDATES
    for start in range(begin, tl.minimum(begin + CANDIDATES, count), BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        valid = in_batch[:, None] & (k < count)[None, :]
        weight = tl.load(weights_ptr + b[:, None] * count + k[None, :], mask=valid, other=0.0)
        factor = upstream[:, None] * weight
        used = factor != 0.0
        at = (b[:, None] * batch_stride + k[None, :] * count_stride)[:, :, None] + column[None, None, :]
        p = tl.load(prediction_ptr + at, mask=used[:, :, None] & inside[:, None, :], other=0.0).to(ACC)
        grad = tl.where(used[:, :, None], factor[:, :, None] * (p - y[:, None, :]), 0.0)
        if WANT_TARGET:
            target_sum -= tl.sum(grad, 1)
        if WANT_PREDICTION:
            at = (b[:, None] * grad_batch_stride + k[None, :] * grad_count_stride)[:, :, None] + column[None, None, :]
            out = grad.to(grad_prediction_ptr.dtype.element_ty)
            tl.store(grad_prediction_ptr + at, out, mask=valid[:, :, None] & inside[:, None, :])
    if WANT_TARGET:
        at = (part * batch + b)[:, None] * dim + column[None, :]
        tl.store(grad_target_ptr + at, target_sum.to(grad_target_ptr.dtype.element_ty), mask=inside)


def prediction_energy_fwd(inputs: Any, filled: Any, options: Any) -> None:
    """Fills value (B,), weights and energies (B, K, or None) from prediction (B, K, D) and target (B, D). The arguments
    are the records `Inputs`, `Filled` and `Options`."""
    prediction, target = inputs
    value, weights, energies = filled
    beta, minimum = float(options.beta), options.minimum
    batch, count, dim = prediction.shape
    if batch == 0:
        return
    plan = plan_fwd(prediction.dtype, batch, count, dim, 4 * processors(prediction))
    blocks = triton.cdiv(batch, plan.constexprs["BLOCK_B"]) * triton.cdiv(count, plan.constexprs["BLOCK_K"])
    parts = None if plan.constexprs["FUSED"] else value.new_empty((batch, plan.parts, count))
    flags = {"MINIMUM": minimum, "WEIGHTS": weights is not None, "ENERGIES": energies is not None}
    with on_device_of(prediction):
        prediction_energy_fwd_kernel[(blocks * plan.parts,)](
            prediction, target, value, weights, energies, parts, batch, count, dim, plan.parts,
            *prediction.stride()[:2], target.stride(0), beta, 1 / beta, **flags, **plan.constexprs,
            **plan.options,
        )  # fmt: skip
        if parts is not None:
            block_k = min(next_power_of_2(count), FINISH_BLOCK[value.dtype])
            prediction_energy_finish_kernel[(batch,)](
                parts,
                value,
                weights,
                energies,
                count,
                plan.parts,
                beta,
                1 / beta,
                **flags,
                BLOCK_K=block_k,
                num_warps=4,
            )


def prediction_energy_bwd(grad_value: Tensor, inputs: Any, weights: Tensor, gradients: Any) -> None:
    """Fills the record `Gradients`, whose fields may be None."""
    prediction, target = inputs
    grad_prediction, grad_target = gradients
    batch, count, dim = prediction.shape
    if batch == 0 or dim == 0:
        return
    plan = plan_bwd(prediction.dtype, batch, count, dim, 4 * processors(prediction))
    blocks = triton.cdiv(batch, plan.constexprs["BLOCK_B"]) * triton.cdiv(dim, plan.constexprs["BLOCK_D"])
    target_parts = grad_target
    if grad_target is not None and plan.parts > 1:
        target_parts = grad_value.new_empty((plan.parts, batch, dim))
    strides = (0, 0) if grad_prediction is None else grad_prediction.stride()[:2]
    with on_device_of(prediction):
        prediction_energy_bwd_kernel[(blocks * plan.parts,)](
            grad_value, prediction, target, weights, grad_prediction, target_parts, batch, count, dim,
            *prediction.stride()[:2], target.stride(0), *strides, WANT_PREDICTION=grad_prediction is not None,
            WANT_TARGET=grad_target is not None, **plan.constexprs, **plan.options,
        )  # fmt: skip
    if grad_target is not None and plan.parts > 1:
        grad_target.copy_(target_parts.sum(0))
