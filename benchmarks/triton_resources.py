"""Registers, shared memory and instructions of every Triton kernel, compiled ahead of time without a GPU.

`python -m benchmarks.triton_resources` prints them as JSON; with a file name it writes a Markdown table there. What is
compiled is what `benchmarks.triton_launches` records. It is a program of its own because a process with
TRITON_INTERPRET set cannot compile its kernels.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import triton

from benchmarks.resources import REGISTERS, WARPS, cuobjdump
from benchmarks.triton_launches import Specialisation, each_branch_once, recorded

# Bytes of shared memory per multiprocessor; every block reserves 1 KiB of it.
SHARED = {80: 164 << 10, 90: 228 << 10, 100: 228 << 10}


def cuobjdump_text(cubin: bytes, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(cuobjdump()), option, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def resources(launch: Specialisation) -> dict[str, Any]:
    code = launch.compiled()
    usage = cuobjdump_text(code.asm["cubin"], "-res-usage")
    (found,) = re.findall(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", usage)
    registers, stack, local = map(int, found)
    ptx = code.asm["ptx"]
    return {
        "kernel": launch.kernel.__name__,
        "name": launch.name,
        "binds": launch.binds,
        "architecture": launch.architecture,
        "types": launch.signature,
        "constexprs": {name: str(value) for name, value in launch.constexprs.items()},
        "num_warps": code.metadata.num_warps,
        "registers": registers,
        "stack": stack,
        "local": local,
        "shared": code.metadata.shared,
        "vector_loads": len(re.findall(r"\bld\.global[.\w:]*\.v\d", ptx)),
        "vector_stores": len(re.findall(r"\bst\.global[.\w:]*\.v\d", ptx)),
        "matrix_instructions": len(re.findall(r"\b(?:mma|wgmma\.mma_async|tcgen05\.mma)\b", ptx)),
        "warpgroup_instructions": len(re.findall(r"\b(?:wgmma\.mma_async|tcgen05\.mma)\b", ptx)),
        "asynchronous_copies": len(re.findall(r"\bcp\.async\.(?:ca|cg|bulk)\b", ptx)),
        "warps": resident_warps(launch.architecture, registers, code.metadata.shared, code.metadata.num_warps),
    }


def resident_warps(architecture: int, registers: int, shared: int, num_warps: int) -> int:
    """Resident warps per multiprocessor, limited by its registers, shared memory and warp slots."""
    by_registers = REGISTERS // (32 * -(-registers // 8) * 8)
    by_shared = SHARED[architecture] // (shared + 1024)
    return min(by_registers // num_warps, by_shared, WARPS // num_warps) * num_warps


def results(found: list[Specialisation]) -> list[dict[str, Any]]:
    """A thread compiles while others wait for the assembler, which takes most of the time."""
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return list(threads.map(resources, found))


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


def table(found: list[dict[str, Any]]) -> str:
    """One line per kernel and call whose resources matter; one number per architecture where they differ."""
    found = [row for row in found if not row["binds"]]
    lines = [f"| kernel | {' | '.join(COLUMNS.values())} |", "|---" * (1 + len(COLUMNS)) + "|"]
    for name in dict.fromkeys(row["name"] for row in found):
        rows = [row for row in found if row["name"] == name]
        architectures = [row["architecture"] for row in rows]
        cells = [f"`{name}`" + ("" if architectures == list(SHARED) else f" ({shown(architectures)})")]
        for column in COLUMNS:
            values = [row["stack"] + row["local"] if column == "spilled" else row[column] for row in rows]
            cells.append(str(values[0]) if len(set(values)) == 1 else " / ".join(map(str, values)))
        lines.append(f"| {' | '.join(cells)} |")
    names = "A name is a kernel and a call in `benchmarks/launches`, with (2) for a second specialisation in one call."
    return f"Numbers for {shown(SHARED)}; a single number where they agree. {names}\n\n" + "\n".join(lines)


def shown(architectures: Iterable[int]) -> str:
    return " / ".join(f"sm_{architecture}" for architecture in architectures)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.triton_resources", description=__doc__.split("\n")[0])
    parser.add_argument("file", nargs="?", type=Path, help="write a table there instead")
    parser.add_argument("--few", type=int, metavar="ARCHITECTURE", help="each branch once, for one architecture")
    options = parser.parse_args()
    found = recorded() if options.few is None else each_branch_once(recorded(), options.few)
    if options.file is None:
        json.dump(results(found), sys.stdout)
    else:
        text = f"# Machine code of the Triton kernels\n\nTriton {triton.__version__}\n\n{table(results(found))}\n"
        options.file.write_text(text)


if __name__ == "__main__":
    main()
