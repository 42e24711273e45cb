"""Cross-entropy of rows of logits: the launchers of the kernels in `softmax_row_kernels`."""

from typing import Any

import torch
from torch import Tensor

from sslkernels.core.triton.launch import VECTOR_BYTES, Config, accumulation_dtype, next_power_of_2, on_device_of
from sslkernels.vocabulary.triton.softmax_row_kernels import (
    cross_entropy_rows_bwd_kernel,
    cross_entropy_rows_fwd_kernel,
)

OPTIONS = ("HAS_BIAS", "HAS_WEIGHT", "HAS_SOFTCAP", "SMOOTHING")


def config(vocab: int, dtype: torch.dtype, *, plain: bool, write_grad: bool) -> Config:
    """The tile of the forward, and whether it keeps a whole row in one tile.

    plain: no option and no statistics, which leaves a thread registers for more logits. Keeping the row saves only the
    second read, for the gradient.
    """
    size = max(64, next_power_of_2(vocab))
    if dtype == torch.float64:
        whole_row, tile, warps = 512, 512, 8
    elif plain:
        whole_row, tile, warps = 4096, 8192, 16
        if write_grad:
            whole_row = 16384 if dtype == torch.float32 else 32768
    else:
        whole_row, tile, warps = 4096, 2048, 8
    if size <= whole_row:
        per_warp = 64 if dtype == torch.float64 else 512
        return Config({"ONE_TILE": True, "BLOCK": size}, {"num_warps": min(max(size // per_warp, 1), 32)})
    return Config({"ONE_TILE": False, "BLOCK": tile}, {"num_warps": warps})


def backward_config(vocab: int, dtype: torch.dtype) -> Config:
    wide = 4 if dtype == torch.float64 else 1
    block = min(max(64, next_power_of_2(vocab)), 8192 // wide)
    return Config({"BLOCK": block}, {"num_warps": min(max(block * wide // 512, 1), 16)})


def cross_entropy_rows_fwd(
    logits: Tensor,
    target: Tensor,
    bias: Tensor | None,
    weight: Tensor | None,
    coefficient: Tensor | None,
    outputs: Any,
    grad: Tensor | None,
    options: Any,
    stats: bool,
) -> None:
    """Fills the record `RowOutputs` from logits (N, V) and the record `RowOptions`. `grad` (N, V), if given, receives
    the gradient with respect to l times coefficient (N,), and may be `logits`. Last strides are 1."""
    count, vocab = logits.shape
    if count == 0:
        return
    flags = _flags(logits, bias, weight, options, grad)
    plain = not (stats or any(flags[name] for name in OPTIONS))
    chosen = config(vocab, logits.dtype, plain=plain, write_grad=grad is not None)
    with on_device_of(logits):
        cross_entropy_rows_fwd_kernel[(count,)](
            *_inputs(logits, target, bias, weight, options, coefficient),
            *outputs,
            grad,
            *_sizes(logits, grad, coefficient),
            *scalars(options),
            **flags,
            STATS=stats,
            WRITE_GRAD=grad is not None,
            **chosen.constexprs,
            **chosen.options,
        )


def cross_entropy_rows_bwd(
    logits: Tensor,
    target: Tensor,
    bias: Tensor | None,
    weight: Tensor | None,
    coefficient: Tensor,
    state: Any,
    grad: Tensor,
    options: Any,
) -> None:
    """Writes the gradient with respect to l times coefficient (N,) to `grad` (N, V), which may be `logits`, from the
    record `RowState`."""
    count, vocab = logits.shape
    if count == 0:
        return
    chosen = backward_config(vocab, logits.dtype)
    with on_device_of(logits):
        cross_entropy_rows_bwd_kernel[(count,)](
            *_inputs(logits, target, bias, weight, options, coefficient),
            *state,
            grad,
            *_sizes(logits, grad, coefficient),
            *scalars(options),
            **_flags(logits, bias, weight, options, grad),
            **chosen.constexprs,
            **chosen.options,
        )


def _inputs(logits, target, bias, weight, options, coefficient):
    smoothed = weight is not None and options.label_smoothing > 0
    weight_sum = weight.sum(dtype=accumulation_dtype(logits.dtype)) if smoothed else None
    return logits, target, bias, weight, weight_sum, coefficient


def _sizes(logits, grad, coefficient):
    return (
        logits.shape[1],
        logits.stride(0),
        grad.stride(0) if grad is not None else 0,
        coefficient.stride(0) if coefficient is not None else 0,
    )


def scalars(options: Any) -> tuple[Any, ...]:
    """All options, in the order of the record, as every kernel takes them, whether it needs them or not. As floats:
    Triton would specialise a Python int that is passed for a float."""
    return tuple(value if name == "ignore_index" else float(value) for name, value in options._asdict().items())


def _flags(logits, bias, weight, options, grad) -> dict[str, Any]:
    vector = VECTOR_BYTES // logits.element_size()
    rows_aligned = logits.stride(0) % vector == 0
    return {
        "HAS_BIAS": bias is not None,
        "HAS_WEIGHT": weight is not None,
        "HAS_SOFTCAP": options.softcap > 0,
        "SMOOTHING": options.label_smoothing > 0,
        "ROWS_ALIGNED": rows_aligned,
        "GRAD_ALIGNED": grad is not None and (logits.stride(0) - grad.stride(0)) % vector == 0,
        "VECTOR": vector,
    }
