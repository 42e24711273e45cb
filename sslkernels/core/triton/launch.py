"""Shared by the launchers: devices, dtypes and configurations."""

import contextlib
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

VECTOR_BYTES = 16
DEFAULT_CAPABILITY = (9, 0)
DEFAULT_PROCESSORS = 132


class Config(NamedTuple):
    """The constexpr arguments of a kernel and its launch options."""

    constexprs: dict[str, Any]
    options: dict[str, int]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which may differ from the device of the tensor."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def capability(tensor: Tensor) -> tuple[int, int]:
    return torch.cuda.get_device_capability(tensor.device) if tensor.is_cuda else DEFAULT_CAPABILITY


def processors(tensor: Tensor) -> int:
    if not tensor.is_cuda:
        return DEFAULT_PROCESSORS
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count


def next_power_of_2(value: int) -> int:
    return triton.next_power_of_2(max(value, 1))
