"""Registers, shared memory and instructions of every Triton kernel, compiled ahead of time without a GPU.

`python -m benchmarks.triton_resources` prints them as JSON; with a file name it writes a Markdown table there. It is a
program of its own because a process with TRITON_INTERPRET set cannot compile its kernels.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import sslkernels
from benchmarks.resources import REGISTERS, WARPS, cuobjdump

# Bytes of shared memory per multiprocessor; every block reserves 1 KiB of it.
SHARED = {80: 164 << 10, 90: 228 << 10, 100: 228 << 10}


def modules() -> Iterator[ModuleType]:
    root = Path(sslkernels.__path__[0])
    for path in sorted(root.glob("*/triton/*.py")):
        if path.stem != "__init__":
            yield importlib.import_module(".".join((root.name, *path.relative_to(root).with_suffix("").parts)))


def kernels() -> dict[str, Any]:
    """The entry points, called `..._kernel`; other jit functions are compiled as part of them."""
    return {
        name: value
        for module in modules()
        for name, value in inspect.getmembers(module)
        if name.endswith("_kernel") and hasattr(value, "arg_names")
    }


def entries() -> list[Any]:
    return [entry for module in modules() if hasattr(module, "aot_signatures") for entry in module.aot_signatures()]


def binary(entry: Any, architecture: int) -> Any:
    names = entry.kernel.arg_names
    source = ASTSource(
        fn=entry.kernel,
        signature={name: entry.signature.get(name, "constexpr") for name in names},
        constexprs=entry.constexprs,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in entry.aligned},
    )
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=dict(entry.options))


def cuobjdump_text(cubin: bytes, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(cuobjdump()), option, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def compiled(entry: Any, architecture: int) -> dict[str, Any]:
    code = binary(entry, architecture)
    usage = cuobjdump_text(code.asm["cubin"], "-res-usage")
    (found,) = re.findall(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", usage)
    registers, stack, local = map(int, found)
    ptx = code.asm["ptx"]
    return {
        "registers": registers,
        "stack": stack,
        "local": local,
        "shared": code.metadata.shared,
        "vector_loads": len(re.findall(r"\bld\.global[.\w:]*\.v\d", ptx)),
        "vector_stores": len(re.findall(r"\bst\.global[.\w:]*\.v\d", ptx)),
        "matrix_instructions": len(re.findall(r"\b(?:mma|wgmma\.mma_async|tcgen05\.mma)\b", ptx)),
        "warpgroup_instructions": len(re.findall(r"\b(?:wgmma\.mma_async|tcgen05\.mma)\b", ptx)),
        "asynchronous_copies": len(re.findall(r"\bcp\.async\.(?:ca|cg|bulk)\b", ptx)),
        "warps": resident_warps(architecture, registers, code.metadata.shared, code.metadata.num_warps),
    }


def resident_warps(architecture: int, registers: int, shared: int, num_warps: int) -> int:
    """Resident warps per multiprocessor, limited by its registers, shared memory and warp slots."""
    by_registers = REGISTERS // (32 * -(-registers // 8) * 8)
    by_shared = SHARED[architecture] // (shared + 1024)
    return min(by_registers // num_warps, by_shared, WARPS // num_warps) * num_warps


def label(entry: Any, architecture: int) -> str:
    return f"{entry.name}-sm{architecture}"


def results() -> dict[str, dict[str, Any]]:
    return {label(e, a): compiled(e, a) for e in entries() for a in e.architectures}


COLUMNS = {
    "registers": "registers",
    "spilled": "spilled bytes",
    "shared": "shared bytes",
    "warps": "warps at once",
    "vector_loads": "vector loads",
    "vector_stores": "vector stores",
    "matrix_instructions": "matrix instructions",
    "warpgroup_instructions": "of a warpgroup",
    "asynchronous_copies": "asynchronous copies",
}


def table(found: dict[str, dict[str, Any]]) -> str:
    """One line per kernel and signature; one number per architecture where they differ."""
    lines = [f"| kernel | {' | '.join(COLUMNS.values())} |", "|---" * (1 + len(COLUMNS)) + "|"]
    for entry in entries():
        rows = [found[label(entry, architecture)] for architecture in entry.architectures]
        cells = [f"`{entry.name}`" + ("" if len(rows) > 1 else f" (sm_{entry.architectures[0]})")]
        for column in COLUMNS:
            values = [row["stack"] + row["local"] if column == "spilled" else row[column] for row in rows]
            cells.append(str(values[0]) if len(set(values)) == 1 else " / ".join(map(str, values)))
        lines.append(f"| {' | '.join(cells)} |")
    shown = " / ".join(f"sm_{architecture}" for architecture in SHARED)
    return f"Numbers for {shown}; a single number where they agree.\n\n" + "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.triton_resources", description=__doc__.split("\n")[0])
    parser.add_argument("file", nargs="?", type=Path, help="write a table there instead")
    options = parser.parse_args()
    if options.file is None:
        json.dump(results(), sys.stdout)
    else:
        text = f"# Machine code of the Triton kernels\n\nTriton {triton.__version__}\n\n{table(results())}\n"
        options.file.write_text(text)


if __name__ == "__main__":
    main()
