"""The CPU kernels under AddressSanitizer and UBSan, driven by the tests of the ops."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from sslkernels.core import native

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "sanitized"
COMPILER = os.environ.get("CXX", "g++")
SANITIZE = "-fsanitize=address,undefined"
# Not: what compiles, starts processes or meters memory, and bounds on rounding that hold for vectorised sums.
CHOSEN = "cpu and not compile and not ranks and not memory and not grid_of_options"
FAMILIES = [str(ROOT / "tests" / name) for name in ("random", "latent", "vocabulary", "contrastive")]

# The first import finds the package in the working directory, before pytest looks into its own folders.
PYTEST = """
import sys
import pytest
from sslkernels.core import native

assert native.extension.__file__.startswith(sys.argv[1]), native.extension.__file__
sys.exit(pytest.main(sys.argv[2:]))
"""


def runtime(name: str) -> str:
    found = subprocess.run([COMPILER, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return found.stdout.strip()


def run(*command: str, folder: Path = ROOT, **variables: str) -> str:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        command, cwd=folder, env={**inherited, **variables},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


def build() -> Path:
    """A folder to import sslkernels from: the extension with sanitizers beside the Python files of this one."""
    run(
        sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(FOLDER / "lib"),
        SSLKERNELS_BUILD_EXT="1", SSLKERNELS_CUDA="0", SSLKERNELS_BUILD_DIR=str(FOLDER / "objects"),
        CXXFLAGS=f"{SANITIZE} -fno-sanitize=float-divide-by-zero,float-cast-overflow -fno-omit-frame-pointer -g1",
        LDFLAGS=SANITIZE, PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    )  # fmt: skip
    package = FOLDER / "lib" / "sslkernels"
    for path in (ROOT / "sslkernels").iterdir():
        link = package / path.name
        if not path.name.startswith("_C.") and not link.is_symlink():
            link.symlink_to(path)
    (extension,) = package.glob("_C.*")
    assert b"__asan_report_load" in extension.read_bytes()
    return FOLDER / "lib"


@pytest.mark.full
@pytest.mark.skipif(platform.system() != "Linux" or native.extension is None, reason="needs the extension, on Linux")
def test_cpu_kernels_access_no_memory_that_is_not_theirs():
    preload = [runtime(name) for name in ("libasan.so", "libubsan.so")]
    if not all(map(os.path.isabs, preload)):
        pytest.skip(f"{COMPILER} has no sanitizers")
    folder = build()
    chosen = [
        "-q",
        "-p",
        "no:cacheprovider",
        "-c",
        str(ROOT / "pyproject.toml"),
        "-m",
        "not full and not slow",
        "-k",
        CHOSEN,
    ]
    printed = run(
        *(sys.executable, "-c", PYTEST, str(folder), *chosen, *FAMILIES), folder=folder,
        PYTHONPATH=str(ROOT), OMP_WAIT_POLICY="passive", LD_PRELOAD=" ".join(preload),
        ASAN_OPTIONS="detect_leaks=0", UBSAN_OPTIONS="print_stacktrace=1:halt_on_error=1",
    )  # fmt: skip
    assert " passed" in printed
