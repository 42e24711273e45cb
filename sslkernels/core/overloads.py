"""Types of functions whose result depends on an option, for type checkers and editors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, ParamSpec, Protocol, TypeVar, overload

P = ParamSpec("P")
Result = TypeVar("Result", covariant=True)
Stats = TypeVar("Stats", covariant=True)


class ReturnsStats(Protocol[P, Result, Stats]):
    """A function whose `return_stats` decides its result; other calls are checked against its own parameters."""

    @overload
    def __call__(self, *args: Any, return_stats: Literal[True], **options: Any) -> tuple[Result, Stats]: ...
    @overload
    def __call__(self, *args: Any, return_stats: Literal[False], **options: Any) -> Result: ...
    @overload
    def __call__(self, *args: Any, return_stats: bool, **options: Any) -> Result | tuple[Result, Stats]: ...
    @overload
    def __call__(self, *args: P.args, **options: P.kwargs) -> Result: ...


def returns_stats(
    result: type[Result], stats: type[Stats]
) -> Callable[[Callable[P, Result | tuple[Result, Stats]]], ReturnsStats[P, Result, Stats]]:
    """Decorates a function that returns `result`, or a tuple of it and `stats` with `return_stats=True`."""

    def typed(function: Callable[P, Result | tuple[Result, Stats]]) -> ReturnsStats[P, Result, Stats]:
        return function  # type: ignore[return-value]

    return typed
