"""Builds the extension in place with CMake, for the device's architecture alone. It needs nvcc, a C++ compiler, CMake,
Ninja and pybind11, and neither pip nor setuptools."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from benchmarks.gpu.plan import ROOT


def tool(name: str) -> str:
    """A program beside this interpreter, on PATH, or in the package of its name."""
    beside = Path(sys.executable).with_name(name)
    if beside.exists():
        return str(beside)
    found = shutil.which(name)
    if found is not None:
        return found
    spec = importlib.util.find_spec(name)
    for folder in spec.submodule_search_locations or () if spec is not None else ():
        inside = sorted(Path(folder).rglob(f"bin/{name}"))
        if inside:
            return str(inside[0])
    raise SystemExit(f"{name} was not found")


def commands(architecture: str, build: Path, target: Path) -> list[list[str]]:
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.submodule_search_locations
    configure = [
        tool("cmake"),
        *("-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
        f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-DSSLKERNELS_TORCH={spec.submodule_search_locations[0]}",
        f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
        "-DSSLKERNELS_CUDA=1",
    ]
    return [configure, [configure[0], "--build", str(build), "--parallel", str(os.cpu_count() or 1)]]


def architecture() -> str:
    """As in TORCH_CUDA_ARCH_LIST, from the driver: importing torch takes seconds."""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    major, minor = subprocess.run(query, check=True, capture_output=True, text=True).stdout.split()[0].split(".")
    return f"{major}.{minor}" + ("a" if int(major) >= 9 else "")


def main() -> None:
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST") or architecture()
    build = ROOT / "build" / f"gpu-{sysconfig.get_config_var('SOABI')}"
    build.mkdir(parents=True, exist_ok=True)
    for command in commands(wanted, build, ROOT / "sslkernels"):
        subprocess.run(command, check=True, env={**os.environ, "TORCH_CUDA_ARCH_LIST": wanted})


if __name__ == "__main__":
    main()
