"""The table of cases: every op, its sizes by regime, and its options. Every backend and dtype runs them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

TABLES = ("center_weight", "context_weight")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Case:
    """One call: tensors that may require grad by name, tensors that may not, and options."""

    op: str
    name: str
    rows: int
    vocab: int
    dim: int = 0
    ignored: float = 0.3
    spread: float = 1.0
    class_weight: bool = False
    bias: bool = False
    token_weight: bool = False
    batch: tuple[int, ...] = ()
    int32: bool = False
    negatives: int = 5
    options: dict = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.op}-{self.name}"

    def inputs(self, dtype: torch.dtype, device: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(differentiable, constant) arguments; float32 draws rounded to `dtype`, the same on every device."""
        g = torch.Generator().manual_seed(hash((self.rows, self.vocab, self.dim)) % 2**31)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (scale * torch.randn(shape, generator=g)).to(dtype).to(device)

        shape = self.batch or (self.rows,)
        if self.op == "negative_sampling_loss":
            index = torch.int32 if self.int32 else torch.int64
            sizes = {"center": shape, "context": shape, "negatives": (*shape, self.negatives)}
            tables = {name: normal(self.vocab, self.dim, scale=self.spread) for name in TABLES}
            draws = {name: torch.randint(0, self.vocab, size, generator=g) for name, size in sizes.items()}
            return tables, {name: draw.to(index).to(device) for name, draw in draws.items()}
        if self.op == "free_energy":
            return {"energy": normal(*(self.batch or (self.rows, self.vocab)), scale=self.spread)}, {}
        if self.op == "prediction_energy":  # K = vocab
            features = self.batch or (self.dim,)
            prediction = normal(self.rows, self.vocab, *features, scale=self.spread)
            return {"prediction": prediction, "target": normal(self.rows, *features)}, {}
        target = torch.randint(0, self.vocab, shape, generator=g)
        target[torch.rand(shape, generator=g) < self.ignored] = self.options.get("ignore_index", -100)
        constant = {"target": target.to(torch.int32 if self.int32 else torch.int64).to(device)}
        if self.class_weight:
            constant["weight"] = torch.rand(self.vocab, generator=g).to(dtype).to(device)
        if self.op == "cross_entropy":
            return {"input": normal(*shape, self.vocab, scale=self.spread)}, constant
        differentiable = {
            "input": normal(*shape, self.dim),
            "linear_weight": normal(self.vocab, self.dim, scale=self.spread * self.dim**-0.5),
        }
        if self.bias:
            differentiable["linear_bias"] = normal(self.vocab)
        if self.token_weight:
            differentiable["token_weight"] = torch.rand(shape, generator=g).to(dtype).to(device)
        return differentiable, constant


def cross_entropy_cases() -> Iterator[Case]:
    op = "cross_entropy"
    yield Case(op, "plain", 37, 53)
    yield Case(op, "no_rows_ignored", 16, 128, ignored=0.0)
    yield Case(op, "one_row", 1, 257, ignored=0.0)
    yield Case(op, "one_class", 5, 1)
    yield Case(op, "two_classes", 9, 2)
    yield Case(op, "several_blocks", 3, 5003, ignored=0.0)
    yield Case(op, "peaked", 33, 301, spread=12.0)
    yield Case(op, "sum", 21, 77, options={"reduction": "sum"})
    yield Case(op, "none", 21, 77, options={"reduction": "none"})
    yield Case(op, "weight", 21, 77, class_weight=True)
    yield Case(op, "smoothing", 21, 77, options={"label_smoothing": 0.1})
    yield Case(op, "smoothing_weight", 21, 77, class_weight=True, options={"label_smoothing": 0.3})
    yield Case(op, "smoothing_only", 21, 77, options={"label_smoothing": 1.0})
    yield Case(op, "z_loss", 21, 77, options={"z_loss": 1e-2})
    yield Case(op, "softcap", 21, 77, spread=10.0, options={"softcap": 5.0})
    yield Case(op, "int32_ignore_7", 40, 11, int32=True, options={"ignore_index": 7})
    everything = {"label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 8.0}
    yield Case(op, "everything", 29, 131, spread=4.0, class_weight=True, options=everything)
    yield Case(op, "everything_none", 29, 131, class_weight=True, options={**everything, "reduction": "none"})


def linear_cross_entropy_cases() -> Iterator[Case]:
    op = "linear_cross_entropy"
    yield Case(op, "plain", 37, 53, 19)
    yield Case(op, "no_rows_ignored", 16, 128, 32, ignored=0.0)
    yield Case(op, "mostly_ignored", 100, 61, 16, ignored=0.85)
    yield Case(op, "one_row", 1, 257, 8, ignored=0.0)
    yield Case(op, "one_class", 5, 1, 3)
    yield Case(op, "one_feature", 12, 30, 1)
    yield Case(op, "several_blocks", 5, 5003, 8, ignored=0.0)
    yield Case(op, "batch", 0, 67, 24, batch=(3, 1, 11), bias=True)
    for mode in ("fast", "compact"):
        for reduction in ("mean", "sum", "none"):
            yield Case(
                op, f"bias_{mode}_{reduction}", 35, 71, 16, bias=True, options={"reduction": reduction, "mode": mode}
            )
        everything = {"label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 8.0, "logit_scale": 1.7, "mode": mode}
        tensors = {"bias": True, "class_weight": True, "token_weight": True}
        yield Case(op, f"everything_{mode}", 41, 87, 12, spread=3.0, **tensors, options=everything)
        limits = {"capacity": 30, "workspace_bytes": 1}
        yield Case(op, f"limits_{mode}", 41, 87, 12, ignored=0.6, **tensors, options={**everything, **limits})
        yield Case(op, f"num_items_{mode}", 35, 71, 16, options={"num_items": 123, "mode": mode})
    yield Case(op, "weight", 35, 71, 16, class_weight=True)
    yield Case(op, "smoothing_weight", 35, 71, 16, class_weight=True, options={"label_smoothing": 0.3})
    yield Case(op, "z_loss", 35, 71, 16, options={"z_loss": 1e-2})
    yield Case(op, "softcap", 35, 71, 16, spread=8.0, options={"softcap": 5.0})
    yield Case(op, "logit_scale", 35, 71, 16, bias=True, options={"logit_scale": 0.25})
    yield Case(op, "token_weight", 35, 71, 16, token_weight=True)
    yield Case(op, "token_weight_none", 35, 71, 16, token_weight=True, options={"reduction": "none"})
    yield Case(op, "int32_ignore_7", 40, 11, 6, int32=True, options={"ignore_index": 7})
    yield Case(op, "peaked", 33, 301, 16, spread=12.0)


def negative_sampling_cases() -> Iterator[Case]:
    op = "negative_sampling_loss"
    yield Case(op, "plain", 37, 53, 19)
    yield Case(op, "aligned", 40, 30, 32)
    yield Case(op, "several_tiles", 9, 12, 300, spread=0.2)
    yield Case(op, "one_pair", 1, 257, 8)
    yield Case(op, "two_words", 21, 2, 5)
    yield Case(op, "one_feature", 30, 12, 1)
    yield Case(op, "one_negative", 30, 17, 16, negatives=1)
    yield Case(op, "no_negatives", 30, 17, 16, negatives=0)
    yield Case(op, "many_negatives", 11, 90, 16, negatives=70)
    yield Case(op, "large_scores", 33, 41, 16, spread=4.0)
    yield Case(op, "few_pairs_of_many_words", 6, 500, 12)
    yield Case(op, "batch", 0, 67, 24, batch=(3, 1, 11))
    yield Case(op, "int32", 40, 11, 6, int32=True)
    for reduction in ("sum", "none"):
        yield Case(op, reduction, 35, 23, 16, options={"reduction": reduction})
    for reduction in ("mean", "none"):
        options = {"exclude_positive": True, "reduction": reduction}
        yield Case(op, f"exclude_positive_{reduction}", 35, 7, 16, options=options)


def free_energy_cases() -> Iterator[Case]:
    op = "free_energy"
    for mode in ("soft", "min"):
        yield Case(op, f"{mode}_plain", 37, 53, options={"mode": mode})
        yield Case(op, f"{mode}_few_candidates", 70, 5, spread=3.0, options={"mode": mode, "beta": 2.0})
        yield Case(op, f"{mode}_one_candidate", 9, 1, options={"mode": mode})
        yield Case(op, f"{mode}_many_candidates", 2, 2051, spread=2.0, options={"mode": mode})
        yield Case(op, f"{mode}_first_dim", 53, 37, options={"mode": mode, "dim": 0})
        yield Case(op, f"{mode}_middle_dim", 0, 0, batch=(3, 11, 2, 9), options={"mode": mode, "dim": 1})
        yield Case(op, f"{mode}_one_row", 0, 0, batch=(77,), options={"mode": mode})
    yield Case(op, "soft_cold", 37, 53, spread=4.0, options={"beta": 30.0})


def prediction_energy_cases() -> Iterator[Case]:
    op = "prediction_energy"
    for mode in ("soft", "min"):
        cold = {"mode": mode, "beta": 0.1}
        yield Case(op, f"{mode}_plain", 37, 8, 32, options=cold)
        yield Case(op, f"{mode}_odd", 13, 5, 77, options=cold)
        yield Case(op, f"{mode}_one_feature", 40, 3, 1, options={"mode": mode})
        yield Case(op, f"{mode}_one_prediction", 11, 1, 24, options=cold)
        yield Case(op, f"{mode}_one_row", 1, 7, 16, options=cold)
        yield Case(op, f"{mode}_many_predictions", 3, 300, 6, options=cold)
        yield Case(op, f"{mode}_many_features", 2, 3, batch=(3, 41, 50), options={"mode": mode, "beta": 1e-3})
        yield Case(op, f"{mode}_sum", 21, 4, 16, options={**cold, "reduction": "sum"})
        yield Case(op, f"{mode}_none", 21, 4, 16, options={**cold, "reduction": "none"})


CASES = [
    *cross_entropy_cases(),
    *linear_cross_entropy_cases(),
    *negative_sampling_cases(),
    *free_energy_cases(),
    *prediction_energy_cases(),
]
