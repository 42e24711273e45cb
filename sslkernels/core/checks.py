"""Argument checks of the public functions, with one message style.

Every message reads ``"<function>: <argument> must <what>; got <what it was>"``.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

try:
    from numpy import generic as numpy_scalar
    from numpy import ndarray
except ImportError:  # torch runs without it
    numpy_scalar = ndarray = ()

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INDEX_DTYPES = (torch.int64, torch.int32)
LARGEST = torch.finfo(torch.float32).max


_Callable = TypeVar("_Callable", bound=Callable[..., Any])


def with_python_numbers(function: _Callable) -> _Callable:
    """Decorates a public function: NumPy scalars in its arguments, their tuples and lists, become Python's."""
    names, title = list(inspect.signature(function).parameters), function.__qualname__

    def number(argument: str, value: Any) -> Any:
        if type(value) in (tuple, list) and any([_is_numpy_scalar(item) for item in value]):
            return type(value)([number(argument, item) for item in value])
        if not _is_numpy_scalar(value):
            return value
        return _traced(title, argument, value) if torch.compiler.is_compiling() else value.item()

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        scalar = (numpy_scalar, ndarray) if torch.compiler.is_compiling() else numpy_scalar
        for value in (*args, *kwargs.values()):
            if isinstance(value, scalar) or type(value) in (tuple, list):
                args = tuple([number(names[min(i, len(names) - 1)], given) for i, given in enumerate(args)])
                kwargs = {name: number(name, given) for name, given in kwargs.items()}
                break
        return function(*args, **kwargs)

    return call


def _is_numpy_scalar(value: Any) -> bool:
    """torch.compile traces a NumPy scalar as an array without dimensions."""
    if isinstance(value, numpy_scalar):
        return True
    return torch.compiler.is_compiling() and isinstance(value, ndarray) and value.ndim == 0


def _traced(function: str, argument: str, value: Any) -> Any:
    """The number of a NumPy scalar while torch.compile traces, which knows the value of a scalar of 64 bits that enters
    the graph, and of any that is made in it."""
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    number = torch.as_tensor(value).item()
    if not (guard_or_false(number > 0) or guard_or_false(number <= 0)):
        must = "be a Python number, or a NumPy scalar of 64 bits, where it enters a compiled function"
        fail(TypeError, function, argument, must, "a NumPy scalar of fewer bits")
    return number


def fail(kind: type[Exception], function: str, argument: str, must: str, got: object) -> None:
    raise kind(f"{function}: {argument} must {must}; got {got}")


def tensor(function: str, argument: str, value: Any, dtypes: Sequence[torch.dtype], *, optional: bool = False) -> None:
    """`value` is a plain strided tensor of one of `dtypes`, or None if `optional`."""
    if value is None and optional:
        return
    if not isinstance(value, Tensor):
        fail(
            TypeError, function, argument, "be a torch.Tensor" + (" or None" if optional else ""), type(value).__name__
        )
    plain = type(value) in (Tensor, torch.nn.Parameter)  # torch.compile traces no further than this
    if not plain and type(value).__module__.startswith("torch.distributed") and not _is_awaited(value):
        must = (
            "be a plain tensor (of activations pass to_local(); use a sharded parameter in the module that owns it, or "
            "pass full_tensor(grad_placements=[Partial('avg')]), whose gradient is averaged over data-parallel ranks)"
        )
        fail(TypeError, function, argument, must, type(value).__name__)
    if value.is_nested:
        fail(TypeError, function, argument, "be a plain tensor", "a nested one")
    if value.layout != torch.strided:
        fail(TypeError, function, argument, "have a strided layout", value.layout)
    if value.dtype not in dtypes:
        fail(TypeError, function, argument, f"have dtype {_either(dtypes)}", value.dtype)


def _is_awaited(value: Tensor) -> bool:
    """Whether `value` is the result of an asynchronous collective, which torch waits for when an operator reads it."""
    from torch.distributed._functional_collectives import AsyncCollectiveTensor

    return isinstance(value, AsyncCollectiveTensor)


def shape(function: str, argument: str, value: Tensor | None, expected: Sequence[int], meaning: str) -> None:
    """`value` (if given) has the shape `expected`; `meaning` is its name in the message, as in "(vocab,)"."""
    if value is not None and value.shape != tuple(expected):
        fail(ValueError, function, argument, f"have shape {meaning} = {tuple(expected)}", tuple(value.shape))


def dims(function: str, argument: str, value: Tensor, low: int, meaning: str, high: int | None = None) -> None:
    """`value` has at least `low` (and at most `high`) dimensions."""
    if value.dim() < low or (high is not None and value.dim() > high):
        fail(ValueError, function, argument, f"have shape {meaning}", tuple(value.shape))


def same_device(function: str, argument: str, value: Tensor | None, other: str, device: torch.device) -> None:
    if value is not None and value.device != device:
        fail(ValueError, function, argument, f"be on the device of {other}, {device}", value.device)


def autocast(device: torch.device) -> bool:
    """Whether autocast is enabled for tensors on `device`; the device "meta" has no autocast."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def choice(function: str, argument: str, value: object, choices: Sequence[str]) -> None:
    if not (value is None or isinstance(value, str)) or value not in choices:
        fail(ValueError, function, argument, f"be {_either([repr(c) for c in choices])}", repr(value))


def number(
    function: str,
    argument: str,
    value: Any,
    *,
    low: float = float("-inf"),
    high: float = float("inf"),
    low_open: bool = False,
) -> None:
    """`value` is a real number in [low, high], or in (low, high] if `low_open`."""
    if isinstance(value, (bool, Tensor)) or not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        fail(TypeError, function, argument, "be a number", type(value).__name__)
    if not (low <= value <= high) or (low_open and value == low):
        bracket = "(" if low_open else "["
        fail(ValueError, function, argument, f"be in {bracket}{low:g}, {high:g}]", value)


def mean_options(
    function: str, reduction: str, num_items: Any, on_empty: Any, other: str, device: torch.device
) -> None:
    """`num_items` is None, a number or a tensor of one element, and given only for a mean; `on_empty` is a choice."""
    choice(function, "on_empty", on_empty, ("nan", "zero"))
    if num_items is None:
        return
    if reduction != "mean":
        fail(ValueError, function, "num_items", 'be None unless reduction is "mean"', f"reduction={reduction!r}")
    if isinstance(num_items, Tensor):
        if num_items.numel() != 1:
            fail(ValueError, function, "num_items", "be an int or a 0-d tensor", tuple(num_items.shape))
        same_device(function, "num_items", num_items, other, device)
    else:
        number(function, "num_items", num_items, low=0)


def boolean(function: str, argument: str, value: Any) -> None:
    if not isinstance(value, bool):
        fail(TypeError, function, argument, "be a bool", type(value).__name__)


def integer(
    function: str, argument: str, value: Any, *, low: int | None = None, optional: bool = False, unsigned: bool = False
) -> None:
    """`value` is an int of 64 bits, or None if `optional`; unsigned: the caller checks the upper bound."""
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        fail(TypeError, function, argument, "be an int" + (" or None" if optional else ""), type(value).__name__)
    if not unsigned and isinstance(value, int) and not -(2**63) <= value < 2**63:
        fail(ValueError, function, argument, "fit in 64 bits", value)
    if low is not None and value < low:
        fail(ValueError, function, argument, f"be at least {low}", value)


def indices(function: str, argument: str, index: Tensor, rows: int, *, none: bool = False) -> None:
    """The elements of a CPU tensor are in [0, rows), or -1 if `none`. On a GPU asking would synchronise."""
    if index.device.type != "cpu" or index.numel() == 0:
        return
    for got in map(int, index.aminmax()):
        if not -none <= got < rows:
            fail(ValueError, function, argument, f"be in [0, {rows})" + (", or -1 for none" if none else ""), got)


def _either(names: Sequence[object]) -> str:
    words = [str(name) for name in names]
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " or " + words[-1]
