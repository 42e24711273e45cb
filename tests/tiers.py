"""The tiers of the tests: what `make test` runs, what `make test-rest` adds, which CI runs too, and `make test-slow`.

Marks in the test files say it; `conftest.py` calls `assign` on what pytest collected:

    full, full_for(name=value)   the test, or its cases with these parameters, is left to `make test-rest`
    slow, slow_for(name=value)   to `make test-slow`: it takes long and shows little more
    pairwise                     of the other cases, `make test` runs a few that hold every pair of values of two
                                 parameters; the rest is full, and slow on Triton's interpreter
    costly(why)                  takes more than 5 s of CPU time in `make test`, and why it is worth that

Several parameters in one mark must all match, a tuple is any of its values, and a test may have several such marks. A
parameter that is a dict or a record counts as its fields.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import random
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import pytest
import torch

COSTLY_SECONDS = 5


def assign(items: Iterable[pytest.Item]) -> None:
    """Marks the cases that `make test` leaves out as `full` or `slow`, by the marks of their tests."""
    products: dict[str, list[pytest.Item]] = {}
    for item in items:
        tier = next((tier for tier in ("slow", "full") if _is(item, tier)), None)
        if tier is not None:
            item.add_marker(tier)
        elif item.get_closest_marker("pairwise") and parameters(item):
            products.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for cases in products.values():
        cases.sort(key=_interpreted)  # the slowest, where others hold as much
        chosen = set(covering([parameters(item) for item in cases]))
        for number, item in enumerate(cases):
            if number not in chosen:
                item.add_marker("slow" if _interpreted(item) else "full")


def _interpreted(item: pytest.Item) -> bool:
    return "triton" in parameters(item).values() and not torch.cuda.is_available()


def parameters(item: pytest.Item) -> dict[str, Any]:
    return item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}


def _is(item: pytest.Item, tier: str) -> bool:
    """Whether the marks of the test say that the case is in `tier`."""
    given = parameters(item)
    return item.get_closest_marker(tier) is not None or any(
        all(given[name] in (value if isinstance(value, tuple) else (value,)) for name, value in mark.kwargs.items())
        for mark in item.iter_markers(f"{tier}_for")
    )


def covering(cases: Sequence[Mapping[str, Any]]) -> list[int]:
    """The numbers of cases that together hold every pair of values of two features, and every value, that occurs.

    Greedy: the next case is the first of those that add most. Since what a case adds only shrinks, only the cases at
    the top of the heap are counted again.
    """
    sets = [_pairs(case) for case in cases]
    missing = set().union(*sets)
    heap = [(-len(pairs), number) for number, pairs in enumerate(sets)]
    heapq.heapify(heap)
    chosen = []
    while missing:
        _, number = heapq.heappop(heap)
        gain = len(sets[number] & missing)
        if heap and (-gain, number) > heap[0]:
            heapq.heappush(heap, (-gain, number))
            continue
        missing -= sets[number]
        chosen.append(number)
    return sorted(chosen)


def pairwise_cases(
    features: Mapping[str, Sequence[Any]], allowed: Callable[[dict[str, Any]], dict[str, Any] | None] = dict
) -> list[dict[str, Any]]:
    """Cases that hold every pair of values of two features; each is the best of several that are drawn.

    A value that is named more often is drawn more often. allowed: completes the features of a case, or returns None; a
    pair that it does not keep beside the first values of the other features is left out.
    """
    first = {name: values[0] for name, values in features.items()}
    missing: dict[Hashable, dict[str, Any]] = {}
    for one, two in itertools.combinations(features, 2):
        for a, b in itertools.product(features[one], features[two]):
            case = allowed({**first, one: a, two: b})
            if case is not None and case[one] is a and case[two] is b:
                missing.setdefault(_pair(case, one, two), case)
    draw, cases = random.Random(0), []
    while missing:
        (one, _), (two, _) = pair = next(iter(missing))
        drawn = [{name: draw.choice(values) for name, values in features.items()} for _ in range(30)]
        fixed = {name: missing[pair][name] for name in (one, two)}
        found = [case for case in (allowed(each | fixed) for each in drawn) if case is not None]
        new = [[p for p in _all_pairs(case) if p in missing] for case in (*found, missing[pair])]
        number, gone = max(((n, p) for n, p in enumerate(new) if pair in p), key=lambda each: len(each[1]))
        cases.append([*found, missing[pair]][number])
        for each in gone:
            del missing[each]
    return cases


def _pair(case: Mapping[str, Any], one: str, two: str) -> Hashable:
    return (one, repr(case[one])), (two, repr(case[two]))


def _all_pairs(case: Mapping[str, Any]) -> list[Hashable]:
    return [_pair(case, one, two) for one, two in itertools.combinations(case, 2)]


def _pairs(case: Mapping[str, Any]) -> set[Hashable]:
    values = [(name, repr(value)) for key, whole in case.items() for name, value in _fields(key, whole)]
    return {*values, *itertools.combinations(values, 2)}


def _fields(name: str, value: Any) -> list[tuple[str, Any]]:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    elif isinstance(value, tuple) and hasattr(value, "_asdict"):
        value = value._asdict()
    if not isinstance(value, dict):
        return [(name, value)]
    return [pair for key, part in value.items() for pair in _fields(f"{name}.{key}", part)]
