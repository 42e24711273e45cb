"""Instructions per normal number on a GPU, counted in the machine code, which needs no GPU to compile."""

from __future__ import annotations

import re

INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]+)\*/\s+(.+?)\s*;?\s*(?:/\*.*)?$")


def straight_line(sass: str) -> int:
    """Instructions of the path that most threads take: up to the last EXIT, without code for rare operands (a branch
    over it, a call, and a branch back), such as the square root of a subnormal."""
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
    """Architecture -> instructions per number of the Triton kernel that writes float32 normals, address arithmetic and
    stores included. Only in a process where kernels are compiled, not interpreted."""
    from benchmarks import triton_launches, triton_resources  # they import triton, which is optional

    found = {}
    for launch in triton_launches.recorded():
        if launch.name == "random_stream normal fp32 4099x1000":
            numbers = 4 * launch.constexprs["BLOCK"] / (32 * launch.options["num_warps"])
            sass = triton_resources.cuobjdump_text(launch.compiled().asm["cubin"], "-sass")
            found[f"sm_{launch.architecture}"] = straight_line(sass) / numbers
    return found


if __name__ == "__main__":
    for architecture, count in counts().items():
        print(f"{architecture}: {count:.1f} instructions a normal number")
