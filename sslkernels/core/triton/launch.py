"""Shared by the launchers: devices, dtypes, and the entries for ahead-of-time compilation."""

import contextlib
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
VECTOR_BYTES = 16
DEFAULT_CAPABILITY = (9, 0)
DEFAULT_PROCESSORS = 132


class Config(NamedTuple):
    """The constexpr arguments of a kernel and its launch options."""

    constexprs: dict[str, Any]
    options: dict[str, int]


class AotEntry(NamedTuple):
    """One specialisation of a kernel, for `triton.compile` without a GPU.

    signature: name -> Triton type of the arguments that are not constexpr, in order; aligned: names of the arguments
    that a launcher would find divisible by 16; architectures: the architectures that use this configuration.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    options: dict[str, int]
    aligned: tuple[str, ...]
    architectures: tuple[int, ...] = (80, 90, 100)


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


def float_types(kernel: Any) -> dict[str, str]:
    """Argument name -> Triton type of the arguments that the kernel annotates as floats."""
    names = {tl.float32: "fp32", tl.float64: "fp64"}
    annotated = kernel.fn.__annotations__.items()
    return {argument: names[kind] for argument, kind in annotated if kind in (tl.float32, tl.float64)}


def signature(kernel: Any, types: dict[str, str], constexprs: dict[str, Any]) -> dict[str, str]:
    """`types` in the order of the kernel's arguments; raises if one is missing or unknown."""
    names = [name for name in kernel.arg_names if name not in constexprs]
    unknown = (set(types) | set(constexprs)) - set(kernel.arg_names)
    if unknown or set(names) - set(types):
        raise ValueError(f"{kernel.__name__}: unknown {sorted(unknown)}, missing {sorted(set(names) - set(types))}")
    return {name: types[name] for name in names}


def pointers_aligned(
    name: str, kernel: Any, types: dict[str, str], constexprs: dict[str, Any], options: dict[str, int]
) -> AotEntry:
    """An entry whose tensors start at multiples of 16 bytes. Types and constants that the kernel lacks are dropped."""
    own = {n: value for n, value in constexprs.items() if n in kernel.arg_names}
    kinds = {n: kind for n, kind in types.items() if n in kernel.arg_names and n not in own}
    aligned = tuple(n for n, kind in kinds.items() if kind.startswith("*"))
    return AotEntry(name, kernel, signature(kernel, kinds, own), own, options, aligned)


def dim_aligned(entry: AotEntry) -> AotEntry:
    """The specialisation for rows whose length `dim` is a multiple of 16."""
    return entry._replace(name=f"{entry.name}-aligned", aligned=(*entry.aligned, "dim"))


def next_power_of_2(value: int) -> int:
    return triton.next_power_of_2(max(value, 1))
