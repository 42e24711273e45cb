"""The order in which "auto" tries backends, by public op and architecture.

A prediction until it is measured: most ops are bound by memory and run on the CUDA kernels, which hold a row on the
chip and access 16 bytes at a time; the code search is bound by matmuls and runs on Triton, which uses the matrix units.
The file MEASURED, which `python -m benchmarks.gpu join` writes, replaces it for the architectures that it names.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import torch

MEASURED = Path(__file__).with_name("measured_backends.json")
CPU = ("cpu", "reference")  # Triton's interpreter is for tests: it runs only where it is asked for
GPU = ("cuda", "triton", "reference")
PREDICTED = {"vector_quantize": ("triton", "cuda", "reference")}


def order(public: str, device: torch.device) -> tuple[str, ...]:
    """The backends of the public op, best first."""
    if device.type != "cuda":
        return CPU
    major, minor = torch.cuda.get_device_capability(device)
    measured = measurements().get(f"sm_{major}{minor}", {}).get(public)
    return (*measured, "reference") if measured else PREDICTED.get(public, GPU)


@functools.cache
def measurements() -> dict[str, dict[str, list[str]]]:
    """Architecture -> public op -> "cuda" and "triton", the faster one first."""
    found: dict[str, dict[str, list[str]]] = json.loads(MEASURED.read_text()) if MEASURED.exists() else {}
    return found
