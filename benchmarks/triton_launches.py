"""The specialisations of every Triton kernel that the launchers ask for, recorded from their calls without a GPU.

The calls are `calls()` of the modules in `benchmarks.launches`. Triton binds and specialises their arguments as it does
before a launch (integers that are 1, of 64 bits or divisible by 16, absent and aligned tensors), and its hook before
the compiler notes the result instead of compiling it. Launchers that choose tiles by architecture are recorded once for
each. It needs a process without TRITON_INTERPRET, in which kernels are not interpreted.
"""

from __future__ import annotations

import importlib
import inspect
import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.driver import driver

import sslkernels
from benchmarks import launches
from benchmarks.launches.call import Call
from sslkernels.core.triton import launch

# Architecture -> multiprocessors, of A100, H100 and B200.
PROCESSORS = {80: 108, 90: 132, 100: 148}
# The architecture for which calls are recorded that are there for their integers.
BINDING = 90
# The options that launchers set.
OPTIONS = ("num_warps", "num_stages", "maxnreg")


class Specialisation(NamedTuple):
    """The compiler's inputs for a launch. name: the kernel and the first call that launches it so; binds: as in that
    call."""

    name: str
    binds: bool
    architecture: int
    kernel: Any
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]

    @property
    def constexprs(self) -> dict[str, Any]:
        """Name -> value of the constexpr parameters."""
        names = [self.kernel.params[i] for i in self.kernel.constexprs]
        return {parameter.name: self.constants[(parameter.num,)] for parameter in names}

    def compiled(self) -> Any:
        source = ASTSource(self.kernel, self.signature, self.constants, self.attributes)
        return triton.compile(source, target=GPUTarget("cuda", self.architecture, 32), options=self.options)


def kernels() -> dict[str, Any]:
    """The entry points, named `..._kernel`; other jit functions are inlined into them."""
    return {
        name: value
        for module in _modules(Path(sslkernels.__path__[0]), "*/triton/*.py")
        for name, value in inspect.getmembers(module)
        if name.endswith("_kernel") and hasattr(value, "arg_names")
    }


def calls() -> Iterator[Call]:
    for module in _modules(Path(launches.__path__[0]), "*.py"):
        if hasattr(module, "calls"):
            yield from module.calls()


def _modules(folder: Path, pattern: str) -> Iterator[ModuleType]:
    root = Path(sslkernels.__path__[0]).parent
    for path in sorted(folder.glob(pattern)):
        if path.stem != "__init__":
            yield importlib.import_module(".".join(path.relative_to(root).with_suffix("").parts))


def recorded() -> list[Specialisation]:
    """The specialisations of all calls. The process cannot launch kernels afterwards."""
    recorder = _Recorder()
    knobs.runtime.jit_cache_hook = recorder.note
    driver.set_active(recorder)
    with torch.device("meta"):
        for architecture in PROCESSORS:
            for call in sorted(calls(), key=lambda call: call.binds):
                if architecture == BINDING or not call.binds:
                    recorder.run(call, architecture)
    return list(recorder.found.values())


def each_branch_once(found: list[Specialisation], architecture: int) -> list[Specialisation]:
    """Few specialisations for one architecture that together have, for each kernel, every value of every constexpr
    parameter that it branches on, and float32, 16-bit types and float64. Ties go to the smallest tile, which compiles
    fastest."""
    chosen, seen = [], set()
    rest = {id(each): each for each in found if each.architecture == architecture and not each.binds}
    branches = {number: _branches(each) for number, each in rest.items()}

    def worth(number: int) -> tuple[int, int]:
        sizes = [value for value in rest[number].constexprs.values() if isinstance(value, int)]
        return len(branches[number] - seen), -math.prod(max(size, 1) for size in sizes)

    while rest:
        best = max(rest, key=worth)
        seen |= branches[best]
        chosen.append(rest[best])
        rest = {number: each for number, each in rest.items() if branches[number] - seen}
    return chosen


def _branches(launch: Specialisation) -> set[tuple[str, str, str]]:
    """(kernel, parameter, value) of flags and modes, which are numbers up to 2; and the type of the first tensor."""
    kernel = launch.kernel.__name__
    types = (kind for kind in launch.signature.values() if kind.startswith("*"))
    first = next(types, "").replace("bf16", "fp16")
    values = {(name, value) for name, value in launch.constexprs.items() if not isinstance(value, int) or value <= 2}
    return {(kernel, "type", first), *((kernel, name, str(value)) for name, value in values)}


class _Recorder:
    """Stands in for Triton's active driver up to a launch, and for the hook before its compiler. The number of the
    current device is the architecture."""

    def __init__(self) -> None:
        self.found: dict[tuple[int, str, str], Specialisation] = {}
        self.uses: Counter[tuple[int, str]] = Counter()
        self.call: Call
        self.architecture: int

    def run(self, call: Call, architecture: int) -> None:
        self.call, self.architecture = call, architecture
        launch.DEFAULT_CAPABILITY = divmod(architecture, 10)
        launch.DEFAULT_PROCESSORS = PROCESSORS[architecture]
        call.launch()

    def note(self, *, key: str, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        """Returns True: Triton then neither compiles nor launches."""
        kernel = fn.jit_function
        at = (self.architecture, kernel.__name__, key)
        if at not in self.found:
            options = json.loads(compile["specialization_data"])["options"]
            (attributes,) = compile["configs"]
            self.found[at] = Specialisation(
                self._name(kernel.__name__.removesuffix("_kernel")), self.call.binds, self.architecture, kernel,
                compile["signature"], compile["constants"], attributes, {name: options[name] for name in OPTIONS},
            )  # fmt: skip
        return True

    def _name(self, kernel: str) -> str:
        """A call may launch several specialisations of a kernel."""
        name = f"{kernel} {self.call.name}"
        self.uses[self.architecture, name] += 1
        uses = self.uses[self.architecture, name]
        return name if uses == 1 else f"{name} ({uses})"

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return self.architecture

    def get_current_stream(self, device: int) -> int:
        return 0
