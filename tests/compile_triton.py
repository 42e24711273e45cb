"""Compiles every Triton kernel ahead of time, without a GPU, and prints what the machine code needs as JSON.

A program of its own, because the kernels of a process that has TRITON_INTERPRET set cannot be compiled.
"""

import importlib
import inspect
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sslkernels import triton_kernels

CUOBJDUMP = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")


def modules() -> Iterator[ModuleType]:
    for module in pkgutil.iter_modules(triton_kernels.__path__):
        yield importlib.import_module(f"{triton_kernels.__name__}.{module.name}")


def kernels() -> dict[str, Any]:
    """The entry points: what is named `..._kernel`; other jit functions are compiled as part of them."""
    return {
        name: value
        for module in modules()
        for name, value in inspect.getmembers(module)
        if name.endswith("_kernel") and hasattr(value, "arg_names")
    }


def entries() -> list[Any]:
    return [entry for module in modules() if hasattr(module, "aot_signatures") for entry in module.aot_signatures()]


def compiled(entry: Any, architecture: int) -> dict[str, Any]:
    names = entry.kernel.arg_names
    source = ASTSource(
        fn=entry.kernel,
        signature={name: entry.signature.get(name, "constexpr") for name in names},
        constexprs=entry.constexprs,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in entry.aligned},
    )
    binary = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=dict(entry.options))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = subprocess.run([CUOBJDUMP, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    (found,) = re.findall(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", usage)
    registers, stack, local = map(int, found)
    ptx = binary.asm["ptx"]
    return {
        "registers": registers,
        "stack": stack,
        "local": local,
        "shared": binary.metadata.shared,
        "vector_loads": len(re.findall(r"\bld\.global[.\w:]*\.v\d", ptx)),
        "vector_stores": len(re.findall(r"\bst\.global[.\w:]*\.v\d", ptx)),
        "matrix_instructions": len(re.findall(r"\b(?:mma|wgmma\.mma_async|tcgen05\.mma)\b", ptx)),
    }


def label(entry: Any, architecture: int) -> str:
    return f"{entry.name}-sm{architecture}"


if __name__ == "__main__":
    json.dump({label(e, a): compiled(e, a) for e in entries() for a in e.architectures}, sys.stdout)
