"""negative_sampling_loss over its cases: all options and regimes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from cases import Case, Tensors, error_is_at_most_that_of_eager, shapes_without_data

OP = "negative_sampling_loss"
TABLES = ("center_weight", "context_weight")


def make(
    g: torch.Generator,
    rows: int,
    vocab: int,
    dim: int,
    *,
    batch: tuple[int, ...] = (),
    spread: float = 1.0,
    negatives: int = 5,
    int32: bool = False,
) -> tuple[Tensors, Tensors]:
    shape = batch or (rows,)
    sizes = {"center": shape, "context": shape, "negatives": (*shape, negatives)}
    tables = {name: spread * torch.randn(vocab, dim, generator=g) for name in TABLES}
    draws = {name: torch.randint(0, vocab, size, generator=g) for name, size in sizes.items()}
    return tables, {name: draw.to(torch.int32 if int32 else torch.int64) for name, draw in draws.items()}


def case(name: str, rows: int, vocab: int, dim: int, *, options: dict | None = None, **tensors) -> Case:
    return Case(OP, name, make, (rows, vocab, dim), tensors, options or {})


def cases() -> Iterator[Case]:
    yield case("plain", 37, 53, 19)
    yield case("aligned", 40, 30, 32)
    yield case("several_tiles", 9, 12, 300, spread=0.2)
    yield case("one_pair", 1, 257, 8)
    yield case("two_words", 21, 2, 5)
    yield case("one_feature", 30, 12, 1)
    yield case("one_negative", 30, 17, 16, negatives=1)
    yield case("no_negatives", 30, 17, 16, negatives=0)
    yield case("many_negatives", 11, 90, 16, negatives=70)
    yield case("large_scores", 33, 41, 16, spread=4.0)
    yield case("few_pairs_of_many_words", 6, 500, 12)
    yield case("batch", 0, 67, 24, batch=(3, 1, 11))
    yield case("int32", 40, 11, 6, int32=True)
    for reduction in ("sum", "none"):
        yield case(reduction, 35, 23, 16, options={"reduction": reduction})
    for reduction in ("mean", "none"):
        options = {"exclude_positive": True, "reduction": reduction}
        yield case(f"exclude_positive_{reduction}", 35, 7, 16, options=options)


CASES = list(cases())
test_error_is_at_most_that_of_eager = error_is_at_most_that_of_eager(CASES)
test_shapes_without_data = shapes_without_data(CASES)
