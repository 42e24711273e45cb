"""free_energy and prediction_energy over their cases: all options and regimes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from cases import Case, Tensors, error_is_at_most_that_of_eager, shapes_without_data


def make_energy(
    g: torch.Generator, rows: int, candidates: int, _: int, *, shape: tuple[int, ...] = (), spread: float = 1.0
) -> tuple[Tensors, Tensors]:
    return {"energy": spread * torch.randn(shape or (rows, candidates), generator=g)}, {}


def make_prediction(
    g: torch.Generator, rows: int, count: int, dim: int, *, features: tuple[int, ...] = ()
) -> tuple[Tensors, Tensors]:
    features = features or (dim,)
    prediction = torch.randn(rows, count, *features, generator=g)
    return {"prediction": prediction, "target": torch.randn(rows, *features, generator=g)}, {}


def energy(name: str, rows: int, candidates: int, *, options: dict, **tensors) -> Case:
    return Case("free_energy", name, make_energy, (rows, candidates, 0), tensors, options)


def prediction(name: str, rows: int, count: int, dim: int = 0, *, options: dict, **tensors) -> Case:
    return Case("prediction_energy", name, make_prediction, (rows, count, dim), tensors, options)


def free_energy_cases() -> Iterator[Case]:
    for mode in ("soft", "min"):
        yield energy(f"{mode}_plain", 37, 53, options={"mode": mode})
        yield energy(f"{mode}_few_candidates", 70, 5, spread=3.0, options={"mode": mode, "beta": 2.0})
        yield energy(f"{mode}_one_candidate", 9, 1, options={"mode": mode})
        yield energy(f"{mode}_many_candidates", 2, 2051, spread=2.0, options={"mode": mode})
        yield energy(f"{mode}_first_dim", 53, 37, options={"mode": mode, "dim": 0})
        yield energy(f"{mode}_middle_dim", 0, 0, shape=(3, 11, 2, 9), options={"mode": mode, "dim": 1})
        yield energy(f"{mode}_one_row", 0, 0, shape=(77,), options={"mode": mode})
    yield energy("soft_cold", 37, 53, spread=4.0, options={"beta": 30.0})


def prediction_energy_cases() -> Iterator[Case]:
    for mode in ("soft", "min"):
        cold = {"mode": mode, "beta": 0.1}
        yield prediction(f"{mode}_plain", 37, 8, 32, options=cold)
        yield prediction(f"{mode}_odd", 13, 5, 77, options=cold)
        yield prediction(f"{mode}_one_feature", 40, 3, 1, options={"mode": mode})
        yield prediction(f"{mode}_one_prediction", 11, 1, 24, options=cold)
        yield prediction(f"{mode}_one_row", 1, 7, 16, options=cold)
        yield prediction(f"{mode}_many_predictions", 3, 300, 6, options=cold)
        yield prediction(f"{mode}_many_features", 2, 3, features=(3, 41, 50), options={"mode": mode, "beta": 1e-3})
        yield prediction(f"{mode}_sum", 21, 4, 16, options={**cold, "reduction": "sum"})
        yield prediction(f"{mode}_none", 21, 4, 16, options={**cold, "reduction": "none"})


CASES = [*free_energy_cases(), *prediction_energy_cases()]
test_error_is_at_most_that_of_eager = error_is_at_most_that_of_eager(CASES)
test_shapes_without_data = shapes_without_data(CASES)
