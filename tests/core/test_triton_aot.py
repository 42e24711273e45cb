"""Every Triton kernel compiles for every architecture, within its registers and shared memory."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from benchmarks import triton_resources

ARCHITECTURES = (80, 90, 100)
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
CASES = {triton_resources.label(e, a): (e, a) for e in triton_resources.entries() for a in e.architectures}


def run_program(*program: str) -> Any:
    """The JSON output of a program, run in a process where kernels are compiled, not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(__file__).parents[2]
    environment["PYTHONPATH"] = os.pathsep.join([str(root), environment.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, *program], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def results() -> dict[str, dict[str, int]]:
    return run_program("-m", "benchmarks.triton_resources")


@pytest.mark.parametrize("case", CASES)
def test_resources(case, results):
    _, architecture = CASES[case]
    used = results[case]
    assert 0 < used["registers"] <= 255
    assert used["stack"] == used["local"] == 0, "registers spilled to memory"
    assert used["shared"] <= SHARED_LIMIT[architecture]


@pytest.mark.parametrize("case", [case for case, (entry, _) in CASES.items() if "VECTOR" in entry.constexprs])
def test_rows_are_read_and_written_in_vectors(case, results):
    """Also rows that are not aligned to 16 bytes, like those of an odd vocabulary."""
    entry, _ = CASES[case]
    assert results[case]["vector_loads"] > 0
    if entry.constexprs.get("WRITE_GRAD", True):
        assert results[case]["vector_stores"] > 0


MATMULS = re.compile(r"(stream|code-search|pair-sums|pair-weighted-sums|pair-gradient-\w+)-(bf16|fp16)-")


@pytest.mark.parametrize("case", [case for case in CASES if MATMULS.match(case)])
def test_matmuls_use_tensor_cores(case, results):
    assert results[case]["matrix_instructions"] > 0


def test_every_kernel_is_covered():
    kernels = triton_resources.kernels()
    covered = {(entry.kernel.__name__, architecture) for entry, architecture in CASES.values()}
    assert kernels
    assert {(name, a) for name in kernels for a in ARCHITECTURES} == covered


def test_launchers_bind_their_arguments():
    assert run_program(str(Path(__file__).parents[1] / "bind_triton.py")) == sorted(triton_resources.kernels())


def test_names_are_unique():
    assert len(CASES) == sum(len(entry.architectures) for entry in triton_resources.entries())
