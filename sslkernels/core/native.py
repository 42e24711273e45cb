"""Loads the compiled extension `sslkernels._C` if it was built, and reports which kernels it has.

Importing `_C` registers the operators of the namespace `sslkernels_native`; no tensors pass through the module itself.
"""

from __future__ import annotations

import importlib
import os
import warnings
from pathlib import Path
from types import ModuleType

import torch

CPU_ISAS = ("default", "avx2", "avx512")
_isa = os.environ.get("SSLKERNELS_CPU_ISA")
if _isa and _isa not in CPU_ISAS:
    raise ValueError(f"SSLKERNELS_CPU_ISA must be one of {', '.join(CPU_ISAS)}; got {_isa!r}")

PACKAGE = Path(__file__).parents[1]
BUILD_COMMAND = "SSLKERNELS_BUILD_EXT=1 pip install --force-reinstall --no-deps " + (
    "-e ." if (PACKAGE.parent / "setup.py").exists() else "."
)

extension: ModuleType | None = None
load_error: str | None = None
try:
    extension = importlib.import_module("sslkernels._C")
except ImportError as error:
    load_error = str(error)
    # pip hides the output of a build that succeeds, and a build succeeds without the extension unless it is required.
    if (PACKAGE / "BUILD_FAILED").exists():
        load_error = f"its build failed: {(PACKAGE / 'BUILD_FAILED').read_text().strip()}"
        message = f"sslkernels has no compiled kernels ({load_error}); build them with: {BUILD_COMMAND}"
        warnings.warn(message, stacklevel=2)


def newer_source() -> Path | None:
    """A source of the package that was changed after the extension was built, None if there is none."""
    if extension is None or extension.__file__ is None:
        return None
    root, built = PACKAGE.parent, Path(extension.__file__).stat().st_mtime
    sources = [path for path in [*PACKAGE.rglob("*.py"), *root.glob("csrc/**/*.*")] if path.stat().st_mtime > built]
    newest = max(sources, key=lambda path: path.stat().st_mtime, default=None)
    return None if newest is None else newest.relative_to(root)


def why_missing(ops: tuple[str, ...], dispatch_key: str) -> str | None:
    """None if every native operator of `ops` has a kernel for "CPU" or "CUDA", else the reason."""
    if extension is None:
        return f"the compiled extension did not load ({load_error}); build it with: {BUILD_COMMAND}"
    for op in ops:
        if not _has_kernel(op, dispatch_key):
            if dispatch_key == "CUDA" and not extension.build_info()["cuda"]:
                return "the extension was built without CUDA kernels (nvcc was not found, or SSLKERNELS_CUDA=0)"
            return f"the extension has no {dispatch_key} kernel for {op}"
    return None


def _has_kernel(op: str, dispatch_key: str) -> bool:
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(f"sslkernels_native::{op}", dispatch_key))
