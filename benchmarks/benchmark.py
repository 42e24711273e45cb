"""The benchmark of an op: a base class with defaults that fit a loss, so that a file states only what differs."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
import pkgutil
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from torch import Tensor

from benchmarks import kernels, ops, providers
from benchmarks.harness import Bar, Build, Case, Inputs, Provider, Run, relative_error
from benchmarks.providers import COMPILED, EAGER, OURS


class HostCase(NamedTuple):
    """A shape so small that the host takes longer than the kernels, and the largest allowed multiple of eager time."""

    shape: dict[str, int]
    limit: float | None = None
    backward: bool = True


class HandSum(NamedTuple):
    """The bytes and flops of a case, added up by hand; `Benchmark.cost` must give the same."""

    case: Case
    bytes: int
    flops: int


class Benchmark:
    """One op, or the kernels of one family.

    `plain` is the eager torch that a user would write, `fused` the call of this package; both take `arguments`. The
    results of a run are what they return, then the gradients of `leaves`.
    """

    op: str
    shape_keys: tuple[str, ...]  # the first one is the number of rows
    names: tuple[str, ...] = ()  # inputs that are the arguments, in order
    leaves: tuple[str, ...] = ()  # inputs that get a gradient
    results: tuple[str, ...] = ()  # what to call the results whose error is measured
    settings: frozenset[str] = frozenset({"backward"})  # of a case: regime, ignored, backward, bias
    differentiable = True
    dtype = torch.float32
    baseline = EAGER
    public: str | None = None  # the function whose backends run, if its name is not `op`
    compiles = True
    dynamic: ClassVar[dict[str, bool | None]] = {"cpu": True, "cuda": None}  # True: one compilation for all shapes
    bars_on_error = True
    twin_rows: int | None = 256  # rows of the case on which errors are measured; None: all
    host: HostCase | None = None
    plain: Callable[..., Any]
    fused: Callable[..., Any]

    def cost(self, case: Case) -> tuple[int, int]:
        """Bytes (each input read once, each output written once) and matmul flops."""
        raise NotImplementedError

    def hand_sums(self) -> list[HandSum]:
        raise NotImplementedError

    def cases(self, device: str) -> list[Case]:
        return []

    def default_cases(self, device: str) -> list[Case]:
        """One or two of `cases`, for the run that has minutes for all ops."""
        return self.cases(device)[:1]

    def smoke_cases(self, device: str) -> list[Case]:
        return []

    def inputs(self, case: Case, device: torch.device) -> Inputs:
        raise NotImplementedError

    def case(
        self,
        shape: dict[str, int],
        dtype: torch.dtype | None = None,
        regime: str = "random",
        ignored: float = 0.0,
        backward: bool = True,
        bias: bool = False,
    ) -> Case:
        """A case with its cost. Settings that the op does not have keep their defaults."""
        asked = {"regime": regime, "ignored": ignored, "backward": backward, "bias": bias}
        had = {name: value for name, value in asked.items() if name in self.settings}
        if not self.differentiable:
            had["backward"] = False
        case = Case(self.op, shape, dtype or self.dtype, 0, **had)
        bytes_, flops = self.cost(case)
        return dataclasses.replace(case, bytes=bytes_, flops=flops)

    def twin(self, case: Case) -> Case:
        """The case on which the error is measured: float64 of the whole case would take too long."""
        if self.twin_rows is None:
            return case
        rows = self.shape_keys[0]
        shape = {**case.shape, rows: min(case.shape[rows], round(self.twin_rows / (1 - case.ignored)))}
        return self.case(shape, case.dtype, case.regime, case.ignored, case.backward, case.bias)

    def custom_cases(self, sizes: dict[str, int], dtype: torch.dtype, **settings: Any) -> list[Case]:
        """The cases of sizes from the command line: one if the op takes these sizes."""
        if sizes.keys() != set(self.shape_keys):
            return []
        return [self.case({key: sizes[key] for key in self.shape_keys}, dtype, **settings)]

    def arguments(self, case: Case, t: Inputs) -> tuple[Any, ...]:
        return tuple(t.get(name) for name in self.names)

    def grad_outputs(self, case: Case, t: Inputs) -> tuple[Tensor | None, ...] | None:
        """Gradients of what `plain` and `fused` return; None: a loss."""
        return None

    def run(self, function: Callable[..., Any]) -> Build:
        def build(case: Case, inputs: Inputs) -> Run:
            tensors, leaves = providers.with_leaves(case, inputs, self.leaves)
            call = functools.partial(function, *self.arguments(case, tensors))
            return providers.gradient_run(call, leaves, case.backward, self.grad_outputs(case, inputs))

        return build

    def providers(self, case: Case, device: torch.device) -> list[Provider]:
        found = [Provider(EAGER, self.run(self.plain))]
        if self.compiles:
            call = functools.partial(compiled, self.plain, self.dynamic[device.type])
            patience = providers.patience(device)
            found.append(Provider(COMPILED, self.run(lambda *a: call()(*a)), warmups=1, patience=patience))
        return [*found, *self.others(case, device), *self.backends(case, device), *self.peers(case, device)]

    def others(self, case: Case, device: torch.device) -> list[Provider]:
        """Floors, and further ways to compute the same with torch."""
        return []

    def peers(self, case: Case, device: torch.device) -> list[Provider]:
        return []

    def backends(
        self, case: Case, device: torch.device, fused: Callable[..., Any] | None = None, label: str = ""
    ) -> list[Provider]:
        """One provider for each backend of the public function."""
        found = []
        for backend in providers.BACKENDS:
            if backend == "reference" and not self.has_reference(case):
                continue
            build = providers.within(backend, self.run(fused or self.fused))
            patience = providers.patience(device) if backend == "reference" else math.inf
            why_not = self.why_not(backend, case, device)
            found.append(Provider(f"{OURS} {backend}{label}", build, patience=patience, unavailable=why_not))
        return found

    def has_reference(self, case: Case) -> bool:
        """False where the reference is too slow to be timed, such as noise that emulates fused multiply-adds."""
        return True

    def why_not(self, backend: str, case: Case, device: torch.device) -> str | None:
        return providers.why_not(self.public or self.op, backend, device)

    def oracle(self, case: Case, inputs: Inputs) -> Any:
        """The results in float64."""
        wide = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}
        return self.run(self.plain)(case, wide).call()

    def errors(self, oracle: Any, results: Sequence[Tensor]) -> dict[str, float]:
        """Relative errors; of results that a provider does not return there is none."""
        named = zip(self.results, results, oracle, strict=False)
        return {name: relative_error(result, exact) for name, result, exact in named if exact is not None}

    def limits(self, case: Case, device: str) -> list[Bar]:
        """The bars of one default case, besides the error."""
        return []

    def bars(self, device: str) -> list[Bar]:
        cases = self.cases(device)
        found = [bar for case in cases for bar in self.limits(case, device)]
        return found + (providers.error_bars(cases) if self.bars_on_error else [])


@functools.cache
def compiled(function: Callable[..., Any], dynamic: bool | None) -> Callable[..., Any]:
    return torch.compile(function, dynamic=dynamic)


@functools.cache
def discover() -> tuple[Benchmark, ...]:
    """The `BENCHMARKS` of every file in ops/ and kernels/."""
    found: list[Benchmark] = []
    for package in (ops, kernels):
        for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            found += getattr(importlib.import_module(module.name), "BENCHMARKS", ())
    return tuple(found)


def test_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def smoke_test(benchmarks: Sequence[Benchmark]) -> Callable[..., None]:
    """A test that runs every provider of every smoke case; a provider that cannot run here is skipped. `make test-rest`
    has compiled torch, in the first case of a benchmark."""
    device = test_device()
    parameters = []
    for which in benchmarks:
        for number, case in enumerate(which.smoke_cases(device.type)):
            for provider in which.providers(case, device):
                marks = [pytest.mark.skip(reason=provider.unavailable)] if provider.unavailable is not None else []
                if "compile" in provider.name:
                    marks.append(pytest.mark.slow if number > 0 else pytest.mark.full)
                if device.type == "cuda" and provider.name.startswith(OURS):
                    marks += [pytest.mark.gpu, pytest.mark.sanitize]
                name = f"{case.name}-{provider.name}"
                parameters.append(pytest.param(which, case, provider, marks=marks, id=name))

    @pytest.mark.parametrize(("which", "case", "provider"), parameters)
    def test_smoke(benchmark, which, case, provider):
        smoke(benchmark, which, case, provider)

    return test_smoke


def smoke(fixture, benchmark: Benchmark, case: Case, provider: Provider) -> None:
    """Runs one provider under pytest-benchmark. Its error against float64 is at most twice the baseline's plus 16
    rounding units of float32. Peers only have to run: their errors are in the table."""
    device = test_device()
    inputs = benchmark.inputs(case, device)
    run = provider.build(case, inputs)
    fixture.group = case.name

    def prepare() -> None:
        if run.prepare is not None:
            run.prepare()

    def call() -> Sequence[Tensor]:
        results = run.call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return results

    results = fixture.pedantic(call, setup=prepare, rounds=5, warmup_rounds=1)
    if provider.checked and not provider.is_floor:
        oracle = benchmark.oracle(case, inputs)
        baseline = next(p for p in benchmark.providers(case, device) if p.name == benchmark.baseline)
        allowed = benchmark.errors(oracle, baseline.build(case, inputs).call())
        for name, error in benchmark.errors(oracle, results).items():
            assert error <= 2 * allowed[name] + 16 * torch.finfo(torch.float32).eps, name
