"""Registers, spills and wide accesses of the compiled CUDA kernels, read from the extension without a GPU.

`python -m benchmarks.resources [FILE]` prints a table, and writes it as Markdown.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import itertools
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from sslkernels.core import native

REGISTERS = 65536  # per multiprocessor of sm_80, sm_90 and sm_100, as WARPS
WARPS = 64
WIDE_LOAD = re.compile(r"\bLDG\.\S*(128|256)\b")
WIDE_STORE = re.compile(r"\bSTG\.\S*(128|256)\b")
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+\S")


@dataclass
class Kernel:
    """One kernel for one architecture. spilled: bytes per thread on the stack and in local memory; wide_loads,
    wide_stores: instructions that access 16 bytes of global memory or more."""

    name: str
    architecture: int
    registers: int
    spilled: int
    instructions: int = 0
    wide_loads: int = 0
    wide_stores: int = 0

    @property
    def warps(self) -> int:
        """Warps per multiprocessor, as far as registers limit them."""
        return min(WARPS, REGISTERS // (32 * -(-self.registers // 8) * 8))


def cuobjdump() -> Path | None:
    """The CUDA tool that comes with triton, next to its disassembler."""
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return None
    tool = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return tool if tool.exists() else None


@functools.cache
def kernels() -> tuple[Kernel, ...]:
    """The kernels of the loaded extension for every architecture; none if it was built without CUDA."""
    if native.extension is None or not native.extension.build_info()["cuda"]:
        return ()
    tool = cuobjdump()
    if tool is None:
        raise RuntimeError("cuobjdump was not found; it comes with triton")
    path = native.extension.__file__
    found: dict[tuple[str, int], Kernel] = {}
    architecture, name = 0, ""
    usage = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    for line in usage.splitlines():
        if matched := re.search(r"arch = sm_(\d+)", line):
            architecture = int(matched[1])
        elif matched := re.search(r"Function (\S+):", line):
            name = matched[1]
        elif matched := re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", line):
            registers, stack, local = map(int, matched.groups())
            found[name, architecture] = Kernel(name, architecture, registers, stack + local)
    _count_instructions(tool, path, found)
    names = _demangled([kernel.name for kernel in found.values()])
    for kernel, readable in zip(found.values(), names, strict=True):
        kernel.name = readable
    return tuple(sorted(found.values(), key=lambda kernel: (kernel.name, kernel.architecture)))


def _count_instructions(tool: Path, path: str, found: dict[tuple[str, int], Kernel]) -> None:
    architecture, kernel = 0, None
    with subprocess.Popen([tool, "-sass", path], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if matched := re.search(r"arch = sm_(\d+)", line):
                architecture = int(matched[1])
            elif matched := re.search(r"Function : (\S+)", line):
                kernel = found[matched[1], architecture]
            elif kernel is not None and INSTRUCTION.match(line):
                kernel.instructions += 1
                kernel.wide_loads += WIDE_LOAD.search(line) is not None
                kernel.wide_stores += WIDE_STORE.search(line) is not None
    if process.returncode != 0:
        raise RuntimeError(f"{tool} -sass failed with exit code {process.returncode}")


def _demangled(names: list[str]) -> list[str]:
    tool = shutil.which("c++filt")
    if tool is None:
        return names
    text = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return [_shortened(name) for name in text.splitlines()]


def _shortened(name: str) -> str:
    name = name.removeprefix("void ").replace("sslkernels::", "").replace("(anonymous namespace)::", "")
    return name[: name.rindex("(")].replace("> >", ">>")


def table() -> str:
    """One line per kernel; one number per architecture where they differ."""
    architectures = sorted({kernel.architecture for kernel in kernels()})
    lines = [
        "| kernel | registers | spilled bytes | instructions | 16-byte loads | 16-byte stores | warps by registers |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, group in itertools.groupby(kernels(), key=lambda kernel: kernel.name):
        kinds = list(group)
        cells = [f"`{name}`"]
        for field in ("registers", "spilled", "instructions", "wide_loads", "wide_stores", "warps"):
            values = [getattr(kernel, field) for kernel in kinds]
            cells.append(str(values[0]) if len(set(values)) == 1 else " / ".join(map(str, values)))
        lines.append("| " + " | ".join(cells) + " |")
    shown = " / ".join(f"sm_{architecture}" for architecture in architectures)
    return f"Numbers for {shown}; a single number where they agree.\n\n" + "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.resources", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("file", nargs="?", type=Path, help="write the table there too")
    options = parser.parse_args()
    if not kernels():
        raise SystemExit("no CUDA kernels were compiled here")
    assert native.extension is not None
    text = f"# Machine code of the CUDA kernels\n\n{native.extension.build_info()['cuda']}\n\n{table()}\n"
    print(text)
    if options.file is not None:
        options.file.write_text(text)


if __name__ == "__main__":
    main()
