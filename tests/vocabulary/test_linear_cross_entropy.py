"""linear_cross_entropy over its cases: all options and regimes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from cases import Case, Tensors, error_is_at_most_that_of_eager, shapes_without_data

pytestmark = pytest.mark.pairwise

OP = "linear_cross_entropy"


def make(
    g: torch.Generator,
    rows: int,
    vocab: int,
    dim: int,
    *,
    ignore_index: int,
    batch: tuple[int, ...] = (),
    ignored: float = 0.3,
    spread: float = 1.0,
    class_weight: bool = False,
    bias: bool = False,
    token_weight: bool = False,
    int32: bool = False,
) -> tuple[Tensors, Tensors]:
    """spread: standard deviation of the logits."""
    shape = batch or (rows,)
    target = torch.randint(0, vocab, shape, generator=g)
    target[torch.rand(shape, generator=g) < ignored] = ignore_index
    constant = {"target": target.to(torch.int32 if int32 else torch.int64)}
    if class_weight:
        constant["weight"] = torch.rand(vocab, generator=g)
    differentiable = {
        "input": torch.randn(*shape, dim, generator=g),
        "linear_weight": spread * dim**-0.5 * torch.randn(vocab, dim, generator=g),
    }
    if bias:
        differentiable["linear_bias"] = torch.randn(vocab, generator=g)
    if token_weight:
        differentiable["token_weight"] = torch.rand(shape, generator=g)
    return differentiable, constant


def case(name: str, rows: int, vocab: int, dim: int, *, options: dict | None = None, **tensors) -> Case:
    options = options or {}
    tensors["ignore_index"] = options.get("ignore_index", -100)
    return Case(OP, name, make, (rows, vocab, dim), tensors, options)


def cases() -> Iterator[Case]:
    yield case("plain", 37, 53, 19)
    yield case("no_rows_ignored", 16, 128, 32, ignored=0.0)
    yield case("mostly_ignored", 100, 61, 16, ignored=0.85)
    yield case("one_row", 1, 257, 8, ignored=0.0)
    yield case("one_class", 5, 1, 3)
    yield case("one_feature", 12, 30, 1)
    yield case("several_blocks", 5, 5003, 8, ignored=0.0)
    yield case("batch", 0, 67, 24, batch=(3, 1, 11), bias=True)
    for mode in ("fast", "compact"):
        for reduction in ("mean", "sum", "none"):
            yield case(
                f"bias_{mode}_{reduction}", 35, 71, 16, bias=True, options={"reduction": reduction, "mode": mode}
            )
        everything = {"label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 8.0, "logit_scale": 1.7, "mode": mode}
        tensors = {"bias": True, "class_weight": True, "token_weight": True}
        yield case(f"everything_{mode}", 41, 87, 12, spread=3.0, **tensors, options=everything)
        limits = {"capacity": 30, "workspace_bytes": 1}
        yield case(f"limits_{mode}", 41, 87, 12, ignored=0.6, **tensors, options={**everything, **limits})
        yield case(f"num_items_{mode}", 35, 71, 16, options={"num_items": 123, "mode": mode})
    yield case("weight", 35, 71, 16, class_weight=True)
    yield case("smoothing_weight", 35, 71, 16, class_weight=True, options={"label_smoothing": 0.3})
    yield case("z_loss", 35, 71, 16, options={"z_loss": 1e-2})
    yield case("softcap", 35, 71, 16, spread=8.0, options={"softcap": 5.0})
    yield case("logit_scale", 35, 71, 16, bias=True, options={"logit_scale": 0.25})
    yield case("token_weight", 35, 71, 16, token_weight=True)
    yield case("token_weight_none", 35, 71, 16, token_weight=True, options={"reduction": "none"})
    yield case("int32_ignore_7", 40, 11, 6, int32=True, options={"ignore_index": 7})
    yield case("peaked", 33, 301, 16, spread=12.0)


CASES = list(cases())
test_error_is_at_most_that_of_eager = error_is_at_most_that_of_eager(CASES)
test_shapes_without_data = shapes_without_data(CASES)
