"""Shared by the benchmarks: runs with gradients, the backends of this package, and the quantities of bars."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import sslkernels as sk
from benchmarks.harness import Bar, Build, Case, Inputs, Row, Run
from sslkernels.core import backends

OURS = "sslkernels"
EAGER = "eager torch"
COMPILED = "torch.compile"
BACKENDS = ("cpu", "cuda", "triton", "reference")

Loss = Callable[[Case, Inputs], Tensor]


def with_leaves(case: Case, inputs: Inputs, names: Sequence[str]) -> tuple[Inputs, list[Tensor]]:
    """The inputs, where those called `names` are leaves of a graph if the case has a backward; and these leaves."""
    leaves = {name: inputs[name].detach().requires_grad_(case.backward) for name in names if name in inputs}
    return {**inputs, **leaves}, list(leaves.values())


def gradient_run(
    compute: Callable[[], Any],
    leaves: list[Tensor],
    backward: bool,
    grad_outputs: Sequence[Tensor | None] | None = None,
) -> Run:
    """Results: what `compute` returns (without None) and, with `backward`, fresh gradients of `leaves`."""

    def forward() -> tuple[Tensor, ...]:
        found = compute()
        return (found,) if isinstance(found, Tensor) else tuple(part for part in found if part is not None)

    def call() -> tuple[Tensor, ...]:
        if not backward:
            with torch.no_grad():
                return forward()
        outputs = forward()
        grads = torch.autograd.grad(outputs, leaves, grad_outputs and grad_outputs[: len(outputs)])
        return (*(output.detach() for output in outputs), *grads)

    return Run(call)


def loss_run(loss: Loss, names: Sequence[str]) -> Build:
    """Builds a run of the loss and, if the case has a backward, the gradients of the inputs called `names`."""

    def build(case: Case, inputs: Inputs) -> Run:
        tensors, leaves = with_leaves(case, inputs, names)
        return gradient_run(lambda: loss(case, tensors), leaves, case.backward)

    return build


def patience(device: torch.device) -> float:
    """Seconds for a provider that no bar names: on a CPU, one that takes more than half a second is timed once."""
    return 0.5 if device.type == "cpu" else math.inf


def why_not(public: str, backend: str, device: torch.device) -> str | None:
    if backend == "triton" and device.type == "cpu":
        return "it runs on cuda tensors"
    return backends.why_not(public, backend, device)


def within(backend: str, build: Build) -> Build:
    """The run of `build` with `backend` chosen, backward included."""

    def built(case: Case, inputs: Inputs) -> Run:
        run = build(case, inputs)

        def call() -> Sequence[Tensor]:
            with sk.use_backend(backend):
                return run.call()

        return run._replace(call=call)

    return built


def fastest_ours(rows: dict[str, Row]) -> Row | None:
    """The fastest row of this package, without the reference."""
    ours = [r for r in rows.values() if r.provider.startswith(OURS) and "reference" not in r.provider]
    timed = [r for r in ours if r.median is not None]
    return min(timed, key=lambda r: r.median) if timed else None


def time_ratio(over: str, under: str) -> Callable[[dict[str, Row]], float | None]:
    """Median of `over` / median of `under`; `OURS` means the fastest row of this package."""

    def value(rows: dict[str, Row]) -> float | None:
        pair = [fastest_ours(rows) if name == OURS else rows.get(name) for name in (over, under)]
        if any(row is None or row.median is None for row in pair):
            return None
        return pair[0].median / pair[1].median

    return value


def memory_mb(rows: dict[str, Row]) -> float | None:
    """Peak extra memory beyond the gradients of the fastest row of this package, in MB."""
    row = fastest_ours(rows)
    return None if row is None or row.beyond_results is None else row.beyond_results / 1e6


def over_light(rows: dict[str, Row]) -> float | None:
    """Median of the fastest row of this package / its time at the speed of light."""
    row = fastest_ours(rows)
    return None if row is None else 1 / row.light


def over_fastest_peer(rows: dict[str, Row]) -> float | None:
    peers = [row for row in rows.values() if row.provider.startswith("peer") and row.median is not None]
    row = fastest_ours(rows)
    return None if row is None or not peers else row.median / min(peer.median for peer in peers)


def error_over_eager(rows: dict[str, Row]) -> float | None:
    """The largest excess of our errors over the errors of eager torch."""
    row, eager = fastest_ours(rows), rows.get(EAGER)
    if row is None or eager is None or not row.errors or not eager.errors:
        return None
    return max(row.errors[name] - eager.errors[name] for name in row.errors)


def error_bars(cases: list[Case]) -> list[Bar]:
    """Accuracy: at most the error of eager torch, plus four units in the last place of float32."""
    limit = 4 * torch.finfo(torch.float32).eps
    return [
        Bar("error against float64 minus eager torch's error", case.name, error_over_eager, limit) for case in cases
    ]
