"""Single kernels, each against its floor: the memory traffic and the arithmetic that no implementation avoids."""

from __future__ import annotations

import dataclasses
import importlib
import math
import pkgutil
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import harness, kernels, providers
from benchmarks.benchmark import Benchmark
from benchmarks.harness import Bar, Case, Inputs, Provider, Run
from benchmarks.providers import OURS
from sslkernels.core import native

PLAIN = "plain torch"
COPY = "copy of the same bytes (floor)"
NATIVE, TRITON, REFERENCE = "native", "triton", "reference"
BOTH = (torch.bfloat16, torch.float32)


class Floor(NamedTuple):
    """bytes of device memory: every input read once, every output written once; floating-point operations."""

    bytes: int
    flops: int


class FloorSum(NamedTuple):
    """The floor for these arguments, added up by hand; the floor function must give the same."""

    floor: Callable[..., Floor]
    arguments: tuple[int, ...]
    bytes: int
    flops: int


class Compiled(NamedTuple):
    """Kernels in the machine code whose names begin with `name`. One that is named as its operator and that loads and
    stores 16 bytes at a time needs no entry. loads, stores: why these kernels are narrower; instead_of: the operator
    that has no kernel of the same name."""

    name: str
    loads: str | None = None
    stores: str | None = None
    instead_of: str | None = None


ADJACENT = "adjacent threads access adjacent elements"
ONE_PER_ROW = "one number per row"


def grid(*shapes: dict[str, int], dtypes: tuple[torch.dtype, ...] = BOTH, **more: Any) -> list[dict[str, Any]]:
    return [{"shape": shape, "dtype": dtype, **more} for shape in shapes for dtype in dtypes]


@dataclasses.dataclass(frozen=True)
class Kernel:
    """call: one launch by a backend (NATIVE, TRITON or REFERENCE) that leaves its results in the inputs; results: their
    names; oracle: the same in float64; plain: what torch does instead, if not the reference; setup: prepares the inputs
    of a backend, not timed; cuda, cpu, smoke: the cases, as arguments of `KernelBenchmark.case`; share: part of a
    copy's bandwidth that the bar requires; instructions: of an element, where they take longer than its bytes;
    predicted: shares of a copy's bandwidth on an H200 that are expected of CUDA and of Triton."""

    floor: Callable[[Case], Floor]
    inputs: Callable[[Case, torch.device], Inputs]
    call: Callable[[str, Case, Inputs], object]
    results: Callable[[Case], tuple[str, ...]]
    oracle: Callable[[Case, Inputs], tuple[Tensor, ...]]
    cuda: list[dict[str, Any]]
    cpu: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    smoke: dict[str, Any] = dataclasses.field(default_factory=lambda: {"shape": {"N": 33, "V": 1003}})
    plain: Callable[[Case, Inputs], object] | None = None
    setup: Callable[[str, Case, Inputs], object] | None = None
    triton: bool = True
    runs_on_cpu: bool = True
    share: float | None = 0.9
    instructions: int = 0
    predicted: tuple[str, str] = ("", "")


class KernelBenchmark(Benchmark):
    """The kernels of a family. The op of a case is the name of its kernel."""

    shape_keys = ()
    dtype = torch.bfloat16
    baseline = PLAIN
    results = ("result", "gradient")
    bars_on_error = False

    def __init__(self, family: str, family_kernels: dict[str, Kernel]) -> None:
        self.op = f"{family}_kernels"
        self.kernels = family_kernels

    def case(self, kernel: str, shape: dict[str, int], dtype: torch.dtype | None = None, **settings: Any) -> Case:
        case = Case(kernel, shape, dtype or self.dtype, 0, **settings)
        return dataclasses.replace(case, bytes=self.kernels[kernel].floor(case).bytes)

    def custom_cases(self, sizes: dict[str, int], dtype: torch.dtype, **settings: Any) -> list[Case]:
        """One case for each kernel with these sizes."""
        keys = {name: kernel.smoke["shape"].keys() for name, kernel in self.kernels.items()}
        found = {name: {key: sizes[key] for key in keys[name]} for name in keys if keys[name] == sizes.keys()}
        return [self.case(name, shape, dtype, **settings) for name, shape in found.items()]

    def cases(self, device: str) -> list[Case]:
        return [self.case(name, **how) for name, kernel in self.kernels.items() for how in getattr(kernel, device)]

    def default_cases(self, device: str) -> list[Case]:
        return []

    def smoke_cases(self, device: str) -> list[Case]:
        found = [(name, kernel) for name, kernel in self.kernels.items() if device == "cuda" or kernel.runs_on_cpu]
        return [self.case(name, **kernel.smoke) for name, kernel in found]

    def inputs(self, case: Case, device: torch.device) -> Inputs:
        return self.kernels[case.op].inputs(case, device)

    def run(self, backend: str) -> harness.Build:
        def build(case: Case, inputs: Inputs) -> Run:
            kernel, t = self.kernels[case.op], dict(inputs)
            if kernel.setup is not None:
                kernel.setup(backend, case, t)

            def call() -> tuple[Tensor, ...]:
                kernel.call(backend, case, t)
                return tuple(t[name] for name in kernel.results(case))

            return Run(call)

        return build

    def plain(self, case: Case, inputs: Inputs) -> Run:
        kernel, t = self.kernels[case.op], dict(inputs)
        if math.prod(case.shape.values()) > 1 << 30:
            raise harness.Rejected("plain torch would hold the logits several times in float32")
        if kernel.plain is None:
            return self.run(REFERENCE)(case, inputs)

        def call() -> tuple[Tensor, ...]:
            kernel.plain(case, t)
            return tuple(t[name] for name in kernel.results(case))

        return Run(call)

    def providers(self, case: Case, device: torch.device) -> list[Provider]:
        missing = native.why_missing((case.op,), device.type.upper())
        found = [
            Provider(PLAIN, self.plain, patience=providers.patience(device)),
            Provider(COPY, copy, is_floor=True),
            Provider(f"{OURS} {device.type}", self.run(NATIVE), unavailable=missing),
        ]
        if self.kernels[case.op].triton:
            unavailable = providers.why_not("cross_entropy", "triton", device)
            found.append(Provider(f"{OURS} triton", self.run(TRITON), unavailable=unavailable))
        return found

    def twin(self, case: Case) -> Case:
        rows = min(case.shape["N"], round(256 / (1 - case.ignored)))
        return dataclasses.replace(case, shape={**case.shape, "N": rows})

    def oracle(self, case: Case, inputs: Inputs) -> tuple[Tensor, ...]:
        return self.kernels[case.op].oracle(case, inputs)

    def limits(self, case: Case, device: str) -> list[Bar]:
        share = self.kernels[case.op].share
        if device == "cpu" or share is None:
            return []
        return [Bar("median / copy of the same bytes", case.name, providers.time_ratio(OURS, COPY), 1 / share)]


def copy(case: Case, inputs: Inputs) -> Run:
    device = next(iter(inputs.values())).device
    source = torch.ones(case.bytes // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Run(lambda: (target.copy_(source),), owned=(target,))


def rows_and_columns(floor: Callable[..., Floor], **more: Any) -> Callable[[Case], Floor]:
    """The floor of a kernel over N rows of V columns."""
    return lambda case: floor(case.shape["N"], case.shape["V"], element_bytes=case.dtype.itemsize, **more)


def normal(case: Case, device: torch.device, seed: int = 0) -> Tensor:
    """(N, V) normal numbers."""
    generator = torch.Generator(device).manual_seed(seed)
    shape = (case.shape["N"], case.shape["V"])
    return torch.empty(shape, dtype=case.dtype, device=device).normal_(generator=generator)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and statistics."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def chosen(backend: str, device: torch.device) -> str:
    """The argument of `use_backend`."""
    return device.type if backend == NATIVE else backend


def native_op(name: str) -> Callable[..., object]:
    return getattr(torch.ops.sslkernels_native, name)


def families() -> list[ModuleType]:
    """The files of this folder."""
    return [importlib.import_module(m.name) for m in pkgutil.iter_modules(kernels.__path__, f"{kernels.__name__}.")]


def floors() -> dict[str, Callable[..., Floor]]:
    """Operator -> its floor: the functions called `<operator>_floor` in the files of this folder."""
    named = [(name, value) for module in families() for name, value in vars(module).items()]
    return {name.removesuffix("_floor"): value for name, value in named if name.endswith("_floor")}


def floor_sums() -> list[FloorSum]:
    """The `FLOOR_SUMS` of the files of this folder."""
    return [found for module in families() for found in getattr(module, "FLOOR_SUMS", ())]


def compiled() -> list[Compiled]:
    """The `COMPILED` of the files of this folder."""
    return [found for module in families() for found in getattr(module, "COMPILED", ())]
