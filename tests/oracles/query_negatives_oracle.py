"""`query_negatives_` by autograd in float64, row by row on the valid negatives, and bounds of its errors."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sslkernels.contrastive.query_negatives import (
    HINGE,
    SIGMOID,
    SOFTMAX,
    NegativeInputs,
    NegativeOutputs,
    RowMerge,
    empty_outputs,
    query_negatives_,
)

NAMES = NegativeOutputs._fields


@dataclass(frozen=True)
class OwnCase:
    """reference: "near" the scores, "above" or "below" all of them, "none" (no tensor), "empty" (-inf), or "final",
    where it already includes the negatives; mask: "some" negatives, "all" of every second row, or "" for none. query,
    negatives, scores: which outputs are wanted."""

    dtype: torch.dtype = torch.float32
    energy: int = SOFTMAX
    shape: tuple[int, int, int] = (5, 7, 17)
    normalise: bool = False
    mask: str = ""
    reference: str = "near"
    smoothing: bool = False
    bias: bool = False
    scale: float = 1.5
    gradient: bool = True
    query: bool = True
    negatives: bool = True
    scores: bool = True

    def __str__(self) -> str:
        energy = ("softmax", "sigmoid", "hinge")[self.energy]
        parts = [str(self.dtype).removeprefix("torch."), energy, "x".join(map(str, self.shape)), self.reference]
        parts += [f"scale{self.scale:g}", "mask_" + (self.mask or "none")]
        parts += [flag for flag in ("normalise", "smoothing", "bias") if getattr(self, flag)]
        parts += [f"no_{flag}" for flag in ("gradient", "query", "negatives", "scores") if not getattr(self, flag)]
        return "-".join(parts)


FEATURES: dict[str, tuple[Any, ...]] = {
    "dtype": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
    "energy": (SOFTMAX, SIGMOID, HINGE),
    "shape": ((5, 1, 128), (3, 5, 1), (4, 33, 3), (5, 7, 17), (3, 4, 300), (2, 9, 64)),
    "normalise": (False, True),
    "mask": ("", "some", "all"),
    "reference": ("near", "above", "below", "none", "empty", "final"),
    "smoothing": (False, True),
    "bias": (False, True),
    "scale": (1.5, -0.3, 20.0),
    "gradient": (True, True, True, False),
    "query": (True, False),
    "negatives": (True, False),
    "scores": (True, False),
}


def pairs(values: dict[str, Any]) -> set[tuple[Any, ...]]:
    return {(a, values[a], b, values[b]) for a, b in itertools.combinations(FEATURES, 2)}


def pairwise_cases(**fixed: Any) -> Iterator[OwnCase]:
    """Cases that cover every pair of values of two features; each is the best of several random candidates."""
    choices = {name: (fixed[name],) if name in fixed else tuple(dict.fromkeys(of)) for name, of in FEATURES.items()}
    missing = {
        (a, x, b, y) for a, b in itertools.combinations(choices, 2) for x in choices[a] for y in choices[b]
    }  # fmt: skip
    draw = random.Random(0)
    while missing:
        a, x, b, y = min(missing, key=repr)
        candidates = [{name: draw.choice(of) for name, of in choices.items()} | {a: x, b: y} for _ in range(30)]
        best = max(candidates, key=lambda values: len(pairs(values) & missing))
        missing -= pairs(best)
        yield OwnCase(**best)


@dataclass
class Inputs:
    query: Tensor
    negatives: Tensor
    mask: Tensor | None
    query_inverse_norm: Tensor | None
    logit_scale: Tensor
    logit_bias: Tensor | None
    energy: int
    reference: Tensor | None
    coefficient: Tensor | None
    smoothing: Tensor | None
    final: bool
    want_query: bool = True
    want_negatives: bool = True
    want_scores: bool = True
    index: Tensor | None = None
    bank: Tensor | None = None

    def records(self, device: str = "cpu") -> tuple[NegativeInputs, RowMerge]:
        def filled(record: Any) -> Any:
            values = (getattr(self, name) for name in record._fields)
            return record(*(value.to(device) if isinstance(value, Tensor) else value for value in values))

        return filled(NegativeInputs), filled(RowMerge)


def compute(inputs: Inputs, device: str = "cpu") -> NegativeOutputs:
    """The outputs of `query_negatives_`."""
    operands, merge = inputs.records(device)
    gradients = inputs.coefficient is not None
    wanted = (inputs.want_query, inputs.want_negatives, inputs.want_scores)
    outputs = empty_outputs(operands, gradients, *wanted)
    query_negatives_(operands, merge, outputs)
    return outputs


def make(case: OwnCase, seed: int = 0) -> Inputs:
    """Masked negatives hold NaN or infinity."""
    rows, count, dim = case.shape
    g = torch.Generator().manual_seed(seed)
    acc = torch.float64 if case.dtype == torch.float64 else torch.float32

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    query = normal(rows, dim).to(case.dtype)
    negatives = (normal(rows, count, dim) * (1 if case.normalise else dim**-0.5)).to(case.dtype)
    mask = None
    if case.mask:
        mask = torch.rand(rows, count, generator=g) > (0.4 if case.mask == "some" else 0.2)
        if case.mask == "all":
            mask[::2] = False
        hidden = torch.where(torch.rand(rows, count, 1, generator=g) > 0.5, float("nan"), float("inf"))
        negatives = torch.where(mask.unsqueeze(2), negatives, hidden.to(case.dtype))
    inverse_norm = (1 / query.double().norm(dim=1)).to(acc) if case.normalise else None
    scale = torch.tensor([case.scale], dtype=acc)
    bias = torch.tensor([-0.75], dtype=acc) if case.bias else None
    coefficient = (torch.rand(rows, generator=g, dtype=torch.float64) + 0.25).to(acc) if case.gradient else None
    smoothing = (torch.rand(rows, generator=g, dtype=torch.float64) * 0.1).to(acc) if case.smoothing else None
    inputs = Inputs(
        query, negatives, mask, inverse_norm, scale, bias, case.energy, None, coefficient, smoothing, False,
        case.query, case.negatives, case.scores,
    )  # fmt: skip
    scores = [similarities(inputs, i)[1] for i in range(rows)]
    ends = torch.tensor([[float(s.max()), float(s.min())] if s.numel() else [0.0, 0.0] for s in scores]).view(-1, 2)
    largest, smallest = ends.double().unbind(1)
    middle = (largest + smallest) / 2 + 0.137 * (largest - smallest) + (largest == smallest) * 0.3
    kinds = {"near": middle, "above": largest + 20, "below": smallest - 20}
    if case.energy != HINGE:
        kinds["empty"] = torch.full_like(middle, -torch.inf)
    if case.energy == SOFTMAX:
        counted = [torch.cat([other.view(1), s]).logsumexp(0) for other, s in zip(middle, scores, strict=True)]
        kinds["final"] = torch.tensor(counted, dtype=torch.float64)
        inputs.final = case.reference == "final"
    if case.reference in kinds:
        inputs.reference = kinds[case.reference]
    return inputs


def by_index(inputs: Inputs, int_dtype: torch.dtype = torch.int64, bank: bool = True) -> Inputs:
    """The same negatives as rows of a table and, after it, of a bank. Every second of those that the mask leaves out
    has the index -1 in its place."""
    rows, count, dim = inputs.negatives.shape
    total = rows * count
    at = torch.randperm(total, generator=torch.Generator().manual_seed(total)).view(rows, count)
    stored = torch.empty_like(inputs.negatives).view(total, dim)
    stored[at.flatten()] = inputs.negatives.reshape(total, dim)
    mask = None
    if inputs.mask is not None:
        by_minus_one = ~inputs.mask & (at % 2 == 0)
        at, mask = at.masked_fill(by_minus_one, -1), inputs.mask | by_minus_one
    split = total // 3 if bank else total
    return dataclasses.replace(
        inputs, negatives=stored[:split].clone(), bank=stored[split:].clone() if bank else None,
        index=at.to(int_dtype), mask=mask,
    )  # fmt: skip


def gradient_by_index(inputs: Inputs, of_query: Tensor) -> Tensor:
    """The gradient (N, K, D) of the negatives, from its multiples (N, K) of the query; inputs: without an index."""
    query, negatives, *_ = leaves_of(inputs)
    n = negatives if inputs.mask is None else negatives.masked_fill(~inputs.mask.unsqueeze(2), 0)
    direction = query.unsqueeze(1).expand_as(n)
    if inputs.query_inverse_norm is not None:
        unit = torch.nn.functional.normalize(n, dim=2)
        direction = direction - (direction * unit).sum(2, keepdim=True) * unit
    return (of_query.double().cpu().unsqueeze(2) * direction).detach()


def similarities(inputs: Inputs, i: int, leaves: tuple[Tensor, ...] | None = None) -> tuple[Tensor, Tensor]:
    """(similarities, scores) of row i with its valid negatives, in float64."""
    query, negatives, scale, bias = leaves or leaves_of(inputs)
    x, n = query[i], negatives[i]
    if inputs.mask is not None:
        n = n[inputs.mask[i]]
    if inputs.query_inverse_norm is not None:
        x = x * inputs.query_inverse_norm[i].double()
        n = n / n.norm(dim=1, keepdim=True).clamp_min(1e-12)
    similarity = n @ x
    return similarity, scale * similarity + bias


def leaves_of(inputs: Inputs) -> tuple[Tensor, ...]:
    bias = torch.zeros(1) if inputs.logit_bias is None else inputs.logit_bias
    return tuple(t.detach().double() for t in (inputs.query, inputs.negatives, inputs.logit_scale, bias))


def oracle(inputs: Inputs) -> dict[str, Tensor]:
    """All results by name, wanted or not; gradients only with a coefficient."""
    leaves = tuple(leaf.requires_grad_() for leaf in leaves_of(inputs))
    rows, count, dim = inputs.negatives.shape
    valid = torch.ones(rows, count, dtype=torch.bool) if inputs.mask is None else inputs.mask
    results = {
        "scores": torch.full((rows, count), -torch.inf, dtype=torch.float64),
        "value": torch.zeros(rows, dtype=torch.float64),
        "grad_query": torch.zeros(rows, dim, dtype=torch.float64),
        "grad_negatives": torch.zeros(rows, count, dim, dtype=torch.float64),
        "grad_scale": torch.zeros(rows, dtype=torch.float64),
        "grad_bias": torch.zeros(rows, dtype=torch.float64),
    }
    for i in range(rows):
        _, s = similarities(inputs, i, leaves)
        results["scores"][i, valid[i]] = s.detach()
        reference = None if inputs.reference is None else inputs.reference[i].double()
        if inputs.energy == SIGMOID:
            value = -torch.nn.functional.logsigmoid(-s).sum()
        elif inputs.energy == HINGE:
            value = torch.relu(s - (0 if reference is None else reference)).sum()
        else:
            others = [] if reference is None or reference == -torch.inf else [reference.view(1)]
            candidates = torch.cat([*others, s])
            value = candidates.logsumexp(0) if candidates.numel() else torch.tensor(-torch.inf, dtype=torch.float64)
        objective = value
        if inputs.final:
            value = reference
            objective = ((s - reference).exp().detach() * s).sum()
        results["value"][i] = value.detach()
        if inputs.coefficient is None or s.numel() == 0:
            continue
        objective = inputs.coefficient[i].double() * objective
        if inputs.smoothing is not None and inputs.energy == SOFTMAX:
            objective = objective - inputs.smoothing[i].double() * s.sum()
        grads = torch.autograd.grad(objective, leaves)
        results["grad_query"][i] = grads[0][i]
        results["grad_negatives"][i, valid[i]] = grads[1][i, valid[i]]
        results["grad_scale"][i] = grads[2]
        results["grad_bias"][i] = grads[3]
    return results


def bounds(inputs: Inputs, want: dict[str, Tensor]) -> dict[str, Tensor]:
    """Bounds of the errors: the roundings of each result, to first order, with all its terms taken by magnitude. Sums
    over columns have at least four partial sums."""
    rows, count, dim = inputs.negatives.shape
    query, negatives, scale, bias = leaves_of(inputs)
    acc = torch.float64 if inputs.query.dtype == torch.float64 else torch.float32
    eps, tiny = torch.finfo(acc).eps, torch.finfo(acc).tiny
    valid = torch.ones(rows, count, dtype=torch.bool) if inputs.mask is None else inputs.mask
    n = negatives.masked_fill(~valid.unsqueeze(2), 0).abs()
    x, r, rho = query.abs(), query.new_ones(rows), n.new_ones(rows, count)
    if inputs.query_inverse_norm is not None:
        r, rho = inputs.query_inverse_norm.double(), 1 / n.norm(dim=2).clamp_min(1e-12)
    columns_rounding, negatives_rounding = (dim / 4 + 16) * eps, (count + 16) * eps
    size = r.unsqueeze(1) * rho * torch.einsum("nd,nkd->nk", x, n)  # magnitude of a similarity
    similarity_error = 2 * columns_rounding * size
    similarity = torch.where(valid, (want["scores"] - bias) / scale, 0)
    score = want["scores"].masked_fill(~valid, 0).abs()
    score_error = scale.abs() * similarity_error + 4 * eps * (score + (scale * similarity).abs() + bias.abs())
    score_error = score_error.masked_fill(~valid, 0)
    reference = 0 if inputs.reference is None else inputs.reference.double().unsqueeze(1).nan_to_num(neginf=0)
    largest_error = score_error.amax(1) if count else score_error.new_zeros(rows)

    coefficient = query.new_zeros(rows) if inputs.coefficient is None else inputs.coefficient.double()
    coefficient = coefficient.unsqueeze(1)
    value = want["value"].nan_to_num(neginf=0)
    if inputs.energy == SOFTMAX:
        value_error = largest_error + negatives_rounding + 4 * eps * value.abs() if not inputs.final else 0 * value
        weight = coefficient * (want["scores"] - value.unsqueeze(1)).exp()
        relative = torch.expm1(score_error + value_error.unsqueeze(1) + 2 * eps * (score + value.abs().unsqueeze(1)))
        weight_error = weight * (relative + 8 * eps)
        if inputs.smoothing is not None:
            smoothing = inputs.smoothing.double().unsqueeze(1).abs() * valid
            weight_error, weight = weight_error + 2 * eps * (weight + smoothing), weight + smoothing
    else:
        if inputs.energy == SIGMOID:
            terms = torch.nn.functional.softplus(want["scores"])
            weight = coefficient * want["scores"].sigmoid()
            weight_error = weight * (torch.expm1(score_error) + 8 * eps)
        else:
            terms = (want["scores"] - reference).clamp_min(0) + (score + abs(reference)) * valid
            distance = (want["scores"] - reference).abs()
            assert bool((distance > score_error + eps * (score + abs(reference))).all()), "a score at the threshold"
            weight = coefficient * (want["scores"] > reference)
            weight_error = 0 * weight
        value_error = score_error.sum(1) + negatives_rounding * terms.sum(1)
    weight_error = weight_error + tiny

    direction = (r.unsqueeze(1) * x).unsqueeze(1)
    if inputs.query_inverse_norm is not None:
        direction = direction + (size * rho).unsqueeze(2) * n
    whole = scale.abs() * rho
    with_weight = (whole * (weight_error + 2 * columns_rounding * weight)).unsqueeze(2)
    grad_negatives = with_weight * direction + (whole * weight * similarity_error * rho).unsqueeze(2) * n
    out = torch.finfo(inputs.negatives.dtype)
    grad_negatives = grad_negatives + 0.51 * out.eps * want["grad_negatives"].abs() + out.smallest_normal * out.eps
    summed = weight_error + weight * (negatives_rounding + 2 * columns_rounding)
    return {
        "scores": score_error + tiny,
        "value": value_error + tiny,
        "grad_query": scale.abs() * r.unsqueeze(1) * torch.einsum("nk,nkd->nd", summed * rho, n) + tiny,
        "grad_negatives": grad_negatives,
        "grad_scale": (summed * size + weight * similarity_error).sum(1) + tiny,
        "grad_bias": (weight_error + weight * negatives_rounding).sum(1) + tiny,
    }


def assert_results(inputs: Inputs, got: dict[str, Tensor], want: dict[str, Tensor] | None = None) -> None:
    """got: the wanted outputs, by name."""
    want = oracle(inputs) if want is None else want
    allowed = bounds(inputs, want)
    for name, values in got.items():
        expected, bound = want[name], allowed[name]
        values = values.detach().cpu().double()
        assert values.shape == expected.shape, name
        assert torch.equal(values.isnan(), expected.isnan()), name
        assert torch.equal(values[values.isinf()], expected[values.isinf()]), name
        assert torch.equal(values.isinf(), expected.isinf()), name
        finite = expected.isfinite()
        error = (values - expected).abs()[finite]
        ratio = float((error / bound[finite]).max()) if error.numel() else 0.0
        assert ratio <= 1, f"{name}: {ratio:.3g} times the bound"
    if inputs.mask is not None and "grad_negatives" in got:
        assert bool((got["grad_negatives"].cpu()[~inputs.mask] == 0).all())


def wanted_outputs(inputs: Inputs, outputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """The wanted outputs, by name; the others have no elements."""
    gradient = inputs.coefficient is not None
    wanted = dict.fromkeys(NAMES, gradient) | {"scores": inputs.want_scores, "value": True}
    wanted["grad_query"] &= inputs.want_query
    wanted["grad_negatives"] &= inputs.want_negatives
    by_name = dict(zip(NAMES, outputs, strict=True))
    assert all(by_name[name].numel() == 0 for name in NAMES if not wanted[name])
    return {name: output for name, output in by_name.items() if wanted[name]}
