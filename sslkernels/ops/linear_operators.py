"""The raw operators of `linear_cross_entropy`: schemas, shapes, and the plan of each backend."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sslkernels.dispatch import PREFERENCE, Op
from sslkernels.ops import chunked_linear, linear_reference
from sslkernels.ops.chunked_linear import Gradients, Limits, Wanted, empty_gradients
from sslkernels.ops.rows import (
    NativeRows,
    RowOptions,
    RowOutputs,
    TritonRows,
    check_target_range,
    empty_outputs,
)
from sslkernels.ops.selection import check_capacity, void_overflow

NAME = "linear_cross_entropy"


def _fwd(
    forward: Callable[..., tuple[RowOutputs, Gradients]],
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    coefficient: Tensor | None,
    compute_dtype: torch.dtype,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    logit_scale: float,
    capacity: int | None,
    workspace_bytes: int | None,
    want_input: bool,
    want_weight: bool,
    want_bias: bool,
    stats: bool,
) -> tuple[Tensor, ...]:
    check_target_range(NAME, target, linear_weight.shape[0], ignore_index)
    check_capacity(NAME, target, ignore_index, capacity)
    options = RowOptions(ignore_index, label_smoothing, z_loss, softcap, logit_scale)
    limits = Limits(capacity, workspace_bytes)
    wanted = Wanted(want_input, want_weight, want_bias)
    outputs, gradients = forward(
        input, linear_weight, target, linear_bias, weight, coefficient, compute_dtype, options, limits, wanted, stats
    )
    void_overflow(target, ignore_index, capacity, gradients.scale, outputs)
    return (*outputs, *gradients)


def _fwd_fake(input, linear_weight, *rest):
    want_input, want_weight, want_bias, stats = rest[-4:]
    outputs = empty_outputs(input, input.shape[0], stats)
    return (*outputs, *empty_gradients(input, linear_weight, Wanted(want_input, want_weight, want_bias)))


def _bwd(
    backward: Callable[..., Gradients],
    grad_loss: Tensor,
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    row_max: Tensor,
    sum_exp: Tensor,
    logprob: Tensor,
    compute_dtype: torch.dtype,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    logit_scale: float,
    capacity: int | None,
    workspace_bytes: int | None,
    want_input: bool,
    want_weight: bool,
    want_bias: bool,
) -> tuple[Tensor, ...]:
    options = RowOptions(ignore_index, label_smoothing, z_loss, softcap, logit_scale)
    limits = Limits(capacity, workspace_bytes)
    wanted = Wanted(want_input, want_weight, want_bias)
    empty = empty_outputs(input, 0, False)
    state = RowOutputs(empty.loss, row_max, sum_exp, logprob, empty.prediction, empty.entropy)
    gradients = backward(
        grad_loss, input, linear_weight, target, linear_bias, weight, state, compute_dtype, options, limits, wanted
    )
    void_overflow(target, ignore_index, capacity, gradients.scale)
    return gradients


def _bwd_fake(grad_loss, input, linear_weight, *rest):
    return tuple(empty_gradients(input, linear_weight, Wanted(*rest[-3:])))


def _chunked(name: str) -> dict[str, Callable[..., Any]]:
    native = partial(getattr(chunked_linear, name), NativeRows())
    return {"cpu": native, "cuda": native, "triton": partial(getattr(chunked_linear, name), TritonRows())}


_COMMON_SCHEMA = (
    "ScalarType compute_dtype, int ignore_index, float label_smoothing, float z_loss, float softcap, "
    "float logit_scale, SymInt? capacity, SymInt? workspace_bytes, bool want_input, bool want_weight, bool want_bias"
)
linear_cross_entropy_fwd = Op(
    NAME,
    "linear_cross_entropy_fwd(Tensor input, Tensor linear_weight, Tensor target, Tensor? linear_bias, Tensor? weight, "
    f"Tensor? coefficient, {_COMMON_SCHEMA}, bool stats) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_fwd_fake,
    implementations={
        "reference": partial(_fwd, linear_reference.forward),
        **{backend: partial(_fwd, forward) for backend, forward in _chunked("forward").items()},
    },
    native_ops=NativeRows.OPS,
    prefer=PREFERENCE,
)
linear_cross_entropy_bwd = Op(
    NAME,
    "linear_cross_entropy_bwd(Tensor grad_loss, Tensor input, Tensor linear_weight, Tensor target, "
    "Tensor? linear_bias, Tensor? weight, Tensor row_max, Tensor sum_exp, Tensor logprob, "
    f"{_COMMON_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_bwd_fake,
    implementations={
        "reference": partial(_bwd, linear_reference.backward),
        **{backend: partial(_bwd, backward) for backend, backward in _chunked("backward").items()},
    },
    native_ops=NativeRows.OPS,
    prefer=PREFERENCE,
)
