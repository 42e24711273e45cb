"""A call of Triton launchers, and the helpers that the calls of all families share."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
NAMES = {FP32: "fp32", BF16: "bf16", FP16: "fp16", FP64: "fp64", torch.int32: "int32", torch.int64: "int64"}
DTYPES = (FP32, BF16, FP16, FP64)


class Call(NamedTuple):
    """A call of launchers; `name` tells the launches of a kernel apart, and is unique among the calls of a function.
    binds: the call is there for the types and integers of its arguments (Triton makes a constant of an integer that is
    1), which all architectures bind alike. It is recorded for one of them, and its resources do not matter."""

    name: str
    launch: partial[None]
    binds: bool = False


def call(function: Callable[..., None], *arguments: Any, **options: Any) -> Call:
    """The call of `function` with these arguments, named after them: an option that is True by its own name, and one
    that is None or False not at all."""
    parts = [named(value) for value in arguments]
    for option, value in options.items():
        parts.append(option if value is True else "" if value is None or value is False else named(value))
    return Call(" ".join(part for part in parts if part), partial(function, *arguments, **options))


def binding(function: Callable[..., None], *arguments: Any, **options: Any) -> Call:
    return call(function, *arguments, **options)._replace(binds=True)


def named(value: Any) -> str:
    if isinstance(value, tuple):
        return "x".join(map(named, value))
    return NAMES[value] if isinstance(value, torch.dtype) else str(value)


def indices(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def when(condition: bool, tensor: Tensor) -> Tensor | None:
    return tensor if condition else None
