"""Writes docs/performance/gpu.md: the kernels that were validated on a GPU, with floor, prediction and measurement.

`python -m benchmarks.gpu page` writes it, and `join` does.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from benchmarks.benchmark import discover
from benchmarks.gpu import record
from benchmarks.gpu.plan import ROOT
from benchmarks.gpu.timing import spread
from benchmarks.harness import Case
from benchmarks.kernels.kernel import COPY, Kernel, KernelBenchmark
from sslkernels.core import preference
from sslkernels.core.chunks import TILE, Matmuls, matmul_time, row_pitch, wave_rows
from sslkernels.vocabulary.chunked_linear import WORKSPACE_BYTES

PAGE = ROOT / "docs" / "performance" / "gpu.md"


class Device(NamedTuple):
    """Rates a second: bytes of a copy, operations of a bfloat16 matmul, and instructions of all threads."""

    name: str
    memory: int
    processors: int
    copy: float
    matmul: float
    instructions: float


H200 = Device("H200", 150_754_820_096, 132, 4.3e12, 790e12, 132 * 128 * 1.755e9)
# (N, D, V) of masked prediction and of language models.
LINEAR = ((8192, 2304, 256000), (8192, 4096, 128256), (19661, 768, 30522), (9830, 768, 50368), (9830, 1024, 50265))


class LinearPlan(NamedTuple):
    """Rows of a chunk, and the share of the floor, the time of the three matmuls at their peak."""

    rows: int
    share: float


def linear_plan(count: int, dim: int, vocab: int, workspace: int, device: Device = H200) -> LinearPlan:
    """The model of linear cross-entropy, forward and backward, in bfloat16: whole waves of tiles, and the pass over the
    logits at the rate of a copy."""
    matmuls = Matmuls(vocab, dim, True, True)
    rows = wave_rows(count, matmuls, workspace // (row_pitch(vocab) * 2) // 16 * 16, device.processors)
    steps = matmul_time(count, matmuls, rows, device.processors)
    seconds = steps * 2 * TILE[0] * TILE[1] * device.processors / device.matmul + 4 * count * vocab / device.copy
    return LinearPlan(rows, 6 * count * dim * vocab / device.matmul / seconds)


def kernels() -> Iterator[tuple[Kernel, Case]]:
    for benchmark in discover():
        if isinstance(benchmark, KernelBenchmark):
            for name, kernel in benchmark.kernels.items():
                for case in spread([case for case in benchmark.cases("cuda") if case.op == name]):
                    yield kernel, case


def floors(kernel: Kernel, case: Case, device: Device = H200) -> tuple[float, float]:
    """Seconds that the bytes take, and that the instructions take."""
    return case.bytes / device.copy, kernel.instructions * math.prod(case.shape.values()) / device.instructions


def read(name: str) -> dict[str, Any]:
    path = record.RESULTS / name
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


NOTHING = "**Nothing here has been measured on a GPU yet**: those columns are empty."
FLOORS = """The floor of a kernel on an {name} is the larger of two times: its bytes at the {copy:.1f} TB/s of a copy,
and, where it draws random numbers, its instructions at {instructions:.3g} a second. Predicted and measured is the
share of the first: time of a copy of the same bytes / time of the kernel."""
MODEL = """The model of forward and backward in bfloat16, with a workspace of {workspace} MiB: whole waves of tiles of
128 x 256 on 132 multiprocessors for all three matmuls, the accumulator of the weight's gradient, and one pass over the
logits. The floor is the time of the matmuls at their peak."""


def page() -> str:
    validated, times = read(record.VALIDATED), read(record.TIMES)
    device = times.get("machine", {}).get("device")
    first = f"Measured on: {device}." if device else NOTHING
    return "\n".join(
        [
            "# Kernels on a GPU",
            "",
            f"{first}\n`make gpu-first` and `make gpu-second` measure, `make gpu-join` writes this page.",
            "",
            *validated_lines(validated),
            *kernel_lines(times.get("times", [])),
            *linear_lines(),
            *preference_lines(),
        ]
    )


def validated_lines(validated: dict[str, Any]) -> list[str]:
    found = ["## Validated", "", "| kernel file | tests | commit | device | date |", "|---|---|---|---|---|"]
    now = record.blobs()
    for file in record.entries():
        entry = validated.get(file)
        if entry is None or entry["blob"] != now[file]:
            found.append(f"| `{file}` | not validated | | | |")
        else:
            tests = f"{entry['passed']} of {entry['planned']} passed"
            found.append(f"| `{file}` | {tests} | {entry['commit'][:12]} | {entry['device']} | {entry['date']} |")
    return [*found, ""]


def kernel_lines(times: list[dict[str, Any]]) -> list[str]:
    seconds = {(t["case"], t["provider"]): t["seconds"] for t in times if t.get("status") == "ok" and "provider" in t}
    found = [
        "## Floors and predictions",
        "",
        FLOORS.format(name=H200.name, copy=H200.copy / 1e12, instructions=H200.instructions),
        "",
        "| kernel | bytes | instructions | CUDA: predicted | measured | Triton: predicted | measured |",
        "|---|---|---|---|---|---|---|",
    ]
    for kernel, case in kernels():
        memory, instructions = floors(kernel, case)
        copy, cells = seconds.get((case.name, COPY)), []
        for backend, guess in zip(("cuda", "triton"), kernel.predicted, strict=True):
            own = seconds.get((case.name, f"sslkernels {backend}"))
            cells += [guess, f"{copy / own:.2f}" if copy and own else ""]
        counted = f"{instructions * 1e3:.3f} ms" if kernel.instructions else ""
        found.append(f"| {case.name} | {memory * 1e3:.3f} ms | {counted} | {' | '.join(cells)} |")
    return [*found, ""]


def linear_lines() -> list[str]:
    workspace = max(WORKSPACE_BYTES["cuda"], H200.memory // 64)
    found = [
        "## Linear cross-entropy",
        "",
        MODEL.format(workspace=workspace >> 20),
        "",
        "| N, D, V | rows a chunk | share of the floor |",
        "|---|---|---|",
    ]
    for count, dim, vocab in LINEAR:
        plan = linear_plan(count, dim, vocab, workspace)
        found.append(f"| {count}, {dim}, {vocab} | {plan.rows} | {plan.share:.2f} |")
    return [*found, ""]


def preference_lines() -> list[str]:
    def shown(ops: dict[str, Any]) -> str:
        return "; ".join(f"{op}: {order[0]} before {order[1]}" for op, order in ops.items())

    first, second = preference.GPU[:2]
    found = ["## Preferred backends", "", f"Predicted: {first} before {second}; {shown(preference.PREDICTED)}."]
    found += [f"Measured on {architecture}: {shown(ops)}." for architecture, ops in preference.measurements().items()]
    return [*found, ""]


def write() -> None:
    PAGE.write_text(page())
