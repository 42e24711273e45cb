"""Runs Triton code as on a GPU up to the launch itself, and prints the names of the compiled kernels as JSON.

Unlike the interpreter this specialises arguments: strides of 1, absent tensors, integers of 32 or 64 bits. The calls
are functions `triton_calls(size, every)` of the test modules, which are discovered: `size` is a dimension to use, and
`every` selects all optional arguments and int32 indices rather than no option and int64. Tensors are on the CPU, the
backend is "triton", and results stay uninitialised.

It is a separate program because kernels cannot be compiled in a process that has TRITON_INTERPRET set.
"""

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

import sslkernels as sk
from sslkernels.core import backends

TESTS = Path(__file__).parent
SIZES = (1, 16, 1003)  # Triton specialises integers that are 1 and integers that are divisible by 16


class NoDevice:
    """The part of a driver that the compiler uses."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def record_instead_of_launching() -> list[str]:
    compiled = []
    compile_and_launch = JITFunction.run

    def run(self, *args, grid, warmup, **options):
        kernel = compile_and_launch(self, *args, grid=grid, warmup=True, **options)
        compiled.append(kernel.name)
        return kernel

    JITFunction.run = run
    driver.set_active(NoDevice())
    return compiled


def calls() -> Iterator[Callable[[int, bool], None]]:
    for path in sorted(TESTS.rglob("test_*.py")):
        if "\ndef triton_calls(" in path.read_text():
            sys.path.insert(0, str(path.parent))
            yield importlib.import_module(path.stem).triton_calls


if __name__ == "__main__":
    sys.path.append(str(TESTS / "oracles"))
    compiled = record_instead_of_launching()
    backends._why_not_triton = lambda device: None
    with sk.use_backend("triton"):
        for call in calls():
            for every in (False, True):
                for size in SIZES:
                    call(size, every)
    json.dump(sorted(set(compiled)), sys.stdout)
