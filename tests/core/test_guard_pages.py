"""No Triton kernel accesses memory outside its tensors: the interpreter runs each beside unmapped pages."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mmap and mprotect of Linux")
TESTS = Path(__file__).resolve().parents[1]
PACKAGE = TESTS.parent / "sslkernels"


def kernels_that_ran(side: str, *file: str) -> list[str]:
    """The kernels in the order of their launches; an assertion names the one that ended the process."""
    command = [sys.executable, str(TESTS / "guard_pages.py"), side, *file]
    environment = {"PYTHONPATH": f"{TESTS.parent}:{TESTS}"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})
    names = re.findall(r"^\w+_kernel$", done.stdout, re.MULTILINE)
    assert done.returncode >= 0, f"{names[-1]} accesses memory {side} its tensors"
    assert done.returncode == 0, done.stderr[-3000:]
    return names


@pytest.mark.costly("runs every Triton kernel once")
@pytest.mark.parametrize("side", ["after", pytest.param("before", marks=pytest.mark.full)])
def test_no_kernel_accesses_memory_outside_its_tensors(side):
    named = {
        name
        for path in PACKAGE.glob("*/triton/*.py")
        for name in re.findall(r"^def (\w+_kernel)\b", path.read_text(), re.MULTILINE)
    }
    assert set(kernels_that_ran(side)) == named


PLANTED = """
import torch, triton, triton.language as tl


@triton.jit
def planted_kernel(values, first, count, WRITE: tl.constexpr, BLOCK: tl.constexpr):
    at = first + tl.arange(0, BLOCK)
    read = tl.load(values + at, at < count)
    if WRITE:
        tl.store(values + at, read, at < count)


values = torch.zeros(3, 8)[:2, :5]
for first, count in {ranges}:
    planted_kernel[(1,)](values, first, count, WRITE={write}, BLOCK=16)
"""


@pytest.mark.full_for(write=False)
@pytest.mark.full_for(side="before")
@pytest.mark.parametrize("write", [False, True], ids=["load", "store"])
@pytest.mark.parametrize(("side", "outside"), [("after", (8, 17)), ("before", (-1, 4))])
def test_a_planted_access_is_found(tmp_path, side, outside, write):
    """The last row of a matrix with padding may be accessed up to the end of its vector, element 15."""
    path = tmp_path / "planted.py"
    path.write_text(PLANTED.format(ranges=[(0, 13), (8, 16)], write=write))
    assert kernels_that_ran(side, str(path)) == ["planted_kernel"] * 2
    path.write_text(PLANTED.format(ranges=[(0, 13), outside], write=write))
    with pytest.raises(AssertionError, match=f"planted_kernel accesses memory {side} its tensors"):
        kernels_that_ran(side, str(path))
