"""The kernels of free_energy and prediction_energy, for bench_kernels: N results of K candidates, or N targets with K
predictions of D features each. Their minimum is the soft one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Case
from sslkernels.ops import free_energy, prediction_energy
from sslkernels.ops.rows import accumulation_dtype

BETA = 1.0
Inputs = dict[str, Tensor]
NAMES = ("free_energy_fwd", "free_energy_bwd", "prediction_energy_fwd", "prediction_energy_bwd")


def make_inputs(case: Case, device: torch.device) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)
    acc = accumulation_dtype(case.dtype)
    rows, count, *features = case.shape.values()

    def normal(*shape: int, dtype: torch.dtype = case.dtype) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    if not features:
        t = {"energy": normal(rows, count, 1), "value": normal(rows, 1, dtype=acc)}
        t["lowest"] = t["energy"].to(acc).amin(1)
        t["total"] = torch.exp(-BETA * (t["energy"].to(acc) - t["lowest"].unsqueeze(1))).sum(1)
        t["grad"] = torch.empty_like(t["energy"])
    else:
        t = {"prediction": normal(rows, count, *features), "target": normal(rows, *features)}
        t["value"] = normal(rows, dtype=acc)
        t["weights"] = torch.softmax(normal(rows, count, dtype=acc), 1)
        t["grad"], t["grad_target"] = torch.empty_like(t["prediction"]), torch.empty_like(t["target"])
    t["coefficient"] = t["value"]  # of this device, for bench_kernels
    return t


def floor(case: Case) -> dict[str, int]:
    rows, count, *features = case.shape.values()
    sizes = {"element_bytes": case.dtype.itemsize, "count": count}
    if case.op == "free_energy_fwd":
        return {**sizes, "results": rows, "gradient": case.backward}
    if case.op == "free_energy_bwd":
        return {**sizes, "results": rows, "minimum": False}
    sizes |= {"batch": rows, "dim": features[0]}
    if case.op == "prediction_energy_fwd":
        return {**sizes, "gradient": case.backward}
    return {**sizes, "read": rows * count, "target": True}


def run(fills: dict[str, Any], case: Case, t: Inputs) -> None:
    """Calls the fill of the kernel, of a backend or of the reference."""
    state = (t.get("lowest"), t.get("total")) if case.backward else (None, None)
    arguments = {
        "free_energy_fwd": lambda: (t["energy"], t["value"], *state, None, BETA, False),
        "free_energy_bwd": lambda: (t["value"], t["energy"], t["lowest"], t["total"], None, t["grad"], BETA),
        "prediction_energy_fwd": lambda: (
            *(t["prediction"], t["target"], t["value"]), t["weights"] if case.backward else None, BETA, False
        ),
        "prediction_energy_bwd": lambda: (
            *(t["value"], t["prediction"], t["target"], t["weights"], t["grad"], t["grad_target"]),
        ),
    }  # fmt: skip
    fills[case.op](*arguments[case.op]())


def results(case: Case, t: Inputs) -> tuple[Tensor, ...]:
    if case.op.endswith("fwd"):
        return (t["value"],)
    return (t["grad"],) if case.op == "free_energy_bwd" else (t["grad"], t["grad_target"])


def _fills(ending: str) -> dict[str, Any]:
    names = ("fill", "fill_gradient", "fill", "fill_gradients")
    modules = (free_energy, free_energy, prediction_energy, prediction_energy)
    return {
        kernel: getattr(module, f"_{name}_{ending}") for kernel, module, name in zip(NAMES, modules, names, strict=True)
    }


REFERENCE, NATIVE, TRITON = (_fills(ending) for ending in ("reference", "native", "triton"))


def oracle(case: Case, t: Inputs) -> tuple[Tensor, ...]:
    wide = {name: tensor.double() for name, tensor in t.items()}
    run(REFERENCE, case, wide)
    return results(case, wide)


def cases(device: str) -> list[tuple[str, dict[str, int]]]:
    """(kernel, shape)."""
    if device == "cpu":
        return []
    shapes = {
        "free_energy": [{"N": 1 << 22, "K": 8}, {"N": 65536, "K": 1024}],
        "prediction_energy": [
            {"N": 65536, "K": 8, "D": 512}, {"N": 1 << 20, "K": 8, "D": 16}, {"N": 4, "K": 8, "D": 1 << 22}
        ],
    }  # fmt: skip
    return [(name, shape) for name in NAMES for shape in shapes[name[:-4]]]


def smoke_shape(name: str) -> dict[str, int]:
    return {"N": 33, "K": 9} if name.startswith("free") else {"N": 33, "K": 7, "D": 77}
