"""Instructions a normal number takes on a GPU, counted in the machine code, which is compiled without one."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from typing import Any

from benchmarks import resources

INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]+)\*/\s+(.+?)\s*;?\s*(?:/\*.*)?$")
ARCHITECTURES = (80, 90, 100)


def straight_line(sass: str) -> int:
    """Instructions of the path that most threads take: up to the last EXIT, less what is only there for rare operands
    (a branch over it, a call, and a branch back, as the square root has for subnormals)."""
    lines = [match[2] for match in map(INSTRUCTION.match, sass.splitlines()) if match]
    code = lines[: max(i for i, line in enumerate(lines) if "EXIT" in line) + 1]
    kept, i = [], 0
    while i < len(code):
        ahead = next((j for j in range(i + 1, min(i + 8, len(code))) if "CALL" in code[j]), None)
        if re.match(r"@!?U?P\d BRA", code[i]) and ahead is not None:
            back = next((j for j in range(ahead, min(ahead + 4, len(code))) if code[j].startswith("BRA")), ahead)
            kept.append(code[i])
            i = back + 1
        else:
            kept.append(code[i])
            i += 1
    return sum(not line.startswith("NOP") for line in kept)


def counts() -> dict[str, float]:
    """Of the Triton kernel that writes float32 normals, by architecture: instructions for each number, address
    arithmetic and stores included. In a process where kernels are compiled, not interpreted."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from sslkernels.random.triton import streams

    (entry,) = (e for e in streams.aot_signatures() if e.name == "random-normal-fp32")
    names = entry.kernel.arg_names
    found = {}
    for architecture in ARCHITECTURES:
        source = ASTSource(
            fn=entry.kernel,
            signature={name: entry.signature.get(name, "constexpr") for name in names},
            constexprs=entry.constexprs,
            attrs={(names.index(name),): [["tt.divisibility", 16]] for name in entry.aligned},
        )
        binary = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=dict(entry.options))
        numbers = 4 * streams.BLOCK / (32 * entry.options["num_warps"])
        found[f"sm_{architecture}"] = straight_line(_disassembled(binary.asm["cubin"])) / numbers
    return found


def _disassembled(cubin: bytes) -> str:
    tool: Any = resources.cuobjdump()
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, "-sass", file.name], check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    for architecture, count in counts().items():
        print(f"{architecture}: {count:.1f} instructions a normal number", file=sys.stdout)
