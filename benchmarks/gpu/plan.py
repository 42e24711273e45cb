"""The steps of the two commands: what runs, how long it takes, and how long it may.

A machine is there for 15 minutes, and a command for 10; each is planned to take at most TOTAL seconds, after which
it is ended. The planned seconds are estimates until they were measured.
"""

from __future__ import annotations

import functools
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PEERS = ROOT / "requirements" / "gpu_peers.txt"
WHEELS = ROOT / "wheels"  # of the peers; `make gpu-wheels` fills it
SITE = ROOT / "build" / "gpu_peers"
TOTAL = 360  # seconds of a command
PATIENCE = 3600  # seconds of a step in a rehearsal
PROCESSES = 8  # for tests: each has its own allocator, and at most 4 GB


@dataclass(frozen=True)
class Step:
    """planned: seconds that it takes; limit: seconds after which it is ended; needed: without it nothing else runs."""

    name: str
    command: Sequence[str]
    planned: int
    limit: int
    variables: dict[str, str] = field(default_factory=dict)
    needed: bool = False


def module(name: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", f"benchmarks.gpu.{name}", *arguments]


@functools.cache
def test_files() -> tuple[str, ...]:
    """The tests that need a GPU: the folder, and files with some. Collecting all others would take longer than many
    tests, in each process."""
    folder = ROOT / "tests" / "gpu"
    others = sorted(p for p in (ROOT / "tests").glob("*/test_*.py") if "pytest.mark.gpu\n" in p.read_text())
    return (*(str(p.relative_to(ROOT)) for p in (folder, *(p for p in others if folder not in p.parents))),)


def tests(marks: str, *options: str) -> list[str]:
    plugin = ["-p", "benchmarks.gpu.outcomes", "-p", "no:cacheprovider"]
    return [sys.executable, "-m", "pytest", *test_files(), "-q", "-m", f"gpu and {marks}", *plugin, *options]


def parallel(marks: str, *options: str) -> list[str]:
    return tests(marks, "-n", str(PROCESSES), "--dist", "worksteal", "--maxfail", "150", *options)


def sanitized(tool: str, each: int, backends: str, *flags: str) -> list[str]:
    """A few cases of each test of single kernels. racecheck and initcheck would find what kernels of torch do by
    design; memcheck ignores failing API calls, with which libraries probe the driver."""
    sanitizer = ["compute-sanitizer", "--tool", tool, *flags, "--error-exitcode", "97"]
    return [*sanitizer, *tests("kernel_only", "--each", str(each), "-k", backends)]


def install_peers() -> list[str]:
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile", "--upgrade"]
    return [*pip, "--target", str(SITE), "--find-links", str(WHEELS), "-r", str(PEERS)]


NO_CACHING = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


def first() -> list[Step]:
    """The most informative steps: whether it builds, whether it is right, and which backend is faster."""
    return [
        Step("facts", module("probe", "facts"), 8, 25, needed=True),
        Step("calls", module("probe", "calls"), 15, 40),
        Step("build", module("build"), 30, 90),
        Step("kernels", parallel("kernel_only and not large"), 75, 100),
        Step("tests", parallel("not kernel_only and not large and not slow"), 130, 160),
        Step("times", module("timing", "kernels"), 60, 80),
    ]


def second() -> list[Step]:
    """The tests that take much memory, the sanitizers, and the ops beside their peers."""
    peers = [Step("peers", install_peers(), 5, 20)] if WHEELS.is_dir() else []
    return [
        Step("facts", module("probe", "facts"), 8, 25, needed=True),
        Step("build", module("build"), 30, 90),
        *peers,
        Step("large", tests("large"), 90, 110),
        Step("memcheck", sanitized("memcheck", 2, "cuda", "--report-api-errors", "no"), 70, 90, NO_CACHING),
        Step("racecheck", sanitized("racecheck", 1, "cuda"), 50, 70, NO_CACHING),
        Step("times", module("timing", "ops"), 85, 110, {"PYTHONPATH": str(SITE)}),
    ]


COMMANDS = {"first": first, "second": second}


def rehearsed(step: Step) -> Step:
    """The step without a GPU: tests are collected as on a machine with one, nothing is compiled, and small sizes are
    timed on the CPU. Its time limit allows for a busy machine."""
    command, variables = list(step.command), {}
    if "pytest" in command:
        command = command[command.index(sys.executable) :]
        parts = [part for part in command if part not in ("-n", str(PROCESSES), "--dist", "worksteal")]
        command = [*parts, "-p", "simulated_gpu", "--collect-only", "-qq"]
        variables = {"PYTHONPATH": str(ROOT / "tests")}
    elif step.name in ("build", "peers"):
        command = [sys.executable, "-c", "print('not run in a rehearsal')"]
    else:
        command.append("--rehearse")
    return Step(step.name, command, step.planned, PATIENCE, variables, step.needed)


def environment() -> dict[str, str]:
    """The variables of a step: nvcc need not be on PATH there, and Triton must compile."""
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"])
    unwanted = ("TRITON_INTERPRET", "PYTEST_")  # of the tests, which rehearse the commands
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(unwanted)}
    found = {**inherited, "PATH": path, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "2"}
    nvcc = shutil.which("nvcc", path=path)
    if nvcc is not None:
        found.setdefault("CUDACXX", nvcc)
    return found
