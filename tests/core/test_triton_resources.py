"""Every Triton kernel compiles for every architecture as its launchers call it, within its registers and memory.

`make test` compiles each branch of each kernel once, for sm_90; `make test-rest` for the other architectures.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from benchmarks import triton_launches

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
MATMULS = {
    "best_codes_kernel",
    "linear_cross_entropy_stream_kernel",
    "linear_sample_kernel",
    "pair_gradient_owner_kernel",
    "pair_gradient_tile_kernel",
    "pair_sums_kernel",
    "pair_weighted_sums_kernel",
}


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(
            ("--few=90",), id="sm_90", marks=pytest.mark.costly("a compiler sees what the interpreter lets pass")
        ),
        pytest.param(("--few=80",), id="sm_80", marks=pytest.mark.full),
        pytest.param(("--few=100",), id="sm_100", marks=pytest.mark.full),
        pytest.param((), id="all", marks=pytest.mark.slow),
    ],
)
def compiled(request) -> list[dict[str, Any]]:
    """The program's output, from a process where kernels are compiled, not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(__file__).parents[2]
    environment["PYTHONPATH"] = os.pathsep.join([str(root), environment.get("PYTHONPATH", "")])
    program = [sys.executable, "-m", "benchmarks.triton_resources", *request.param]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def named(rows: list[dict[str, Any]]) -> list[str]:
    return [f"{row['name']} sm_{row['architecture']}" for row in rows]


def test_every_kernel_is_launched_and_compiles(compiled, request):
    kernels = triton_launches.kernels()
    assert kernels
    covered = {(row["kernel"], row["architecture"]) for row in compiled}
    architectures = {"sm_80": [80], "sm_90": [90], "sm_100": [100], "all": SHARED_LIMIT}[request.node.callspec.id]
    assert covered == {(kernel, architecture) for kernel in kernels for architecture in architectures}


def test_names_are_unique():
    names = [(call.launch.func.__name__, call.name) for call in triton_launches.calls()]
    assert sorted(set(names)) == sorted(names)


def test_registers_do_not_spill(compiled):
    assert named([row for row in compiled if not 0 < row["registers"] <= 255]) == []
    assert named([row for row in compiled if row["stack"] + row["local"] and not row["binds"]]) == []


def test_shared_memory_fits(compiled):
    assert named([row for row in compiled if row["shared"] > SHARED_LIMIT[row["architecture"]]]) == []


def test_rows_are_read_and_written_in_vectors(compiled):
    """Rows that are not aligned to 16 bytes, as with an odd vocabulary, are included."""
    rows = [row for row in compiled if "VECTOR" in row["constexprs"] and not row["binds"]]
    assert rows
    assert named([row for row in rows if not row["vector_loads"]]) == []
    written = [row for row in rows if row["constexprs"].get("WRITE_GRAD", "True") == "True"]
    assert named([row for row in written if not row["vector_stores"]]) == []


def test_matmuls_use_tensor_cores(compiled):
    rows = [row for row in compiled if row["kernel"] in MATMULS and next(iter(row["types"].values())) != "*fp32"]
    assert {row["kernel"] for row in rows} == MATMULS
    assert named([row for row in rows if not row["matrix_instructions"]]) == []
