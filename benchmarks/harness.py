"""Cases, providers, and how a provider is timed, metered and checked.

A `Benchmark` has cases and, for each case, providers. A provider is built into a `Run` on the inputs of the case.
`measure` takes all providers of a case together: first the error of each against float64, then its peak memory, then
rounds in which every provider runs once, in random order, so that drift of the machine hits all alike.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import memory
from benchmarks.roofline import Roofs

if TYPE_CHECKING:
    from benchmarks.benchmark import Benchmark

MIN_SAMPLES = {"cpu": 5, "cuda": 30}
MAX_SAMPLES = 200
CAP = 60.0  # seconds of a case after which it gets only `ENOUGH` rounds, for slow and busy machines
ENOUGH = 3
# Quick providers get further rounds of their own, up to QUICK_SAMPLES calls or QUICK_SECONDS of calls at their fastest.
# Some calls take much longer than others, as when the host of a virtual machine has to supply the memory of the
# results; the median of a few calls is then arbitrary.
QUICK_SECONDS = 1.0
QUICK_SAMPLES = 15
DTYPE_NAMES = {
    dtype: str(dtype).removeprefix("torch.")
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32)
}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


Inputs = dict[str, Tensor]


class Rejected(Exception):
    """A provider does not support this case; the message says why."""


@dataclass(frozen=True)
class Case:
    """One group of rows of the table. bytes: each input read once, each output written once; flops: matmuls only."""

    op: str
    shape: dict[str, int]
    dtype: torch.dtype
    bytes: int
    flops: int = 0
    regime: str = "random"
    ignored: float = 0.0
    backward: bool = True
    bias: bool = False

    @property
    def name(self) -> str:
        words = [f"{key}={size}" for key, size in self.shape.items()] + [DTYPE_NAMES[self.dtype]]
        if self.dtype.is_floating_point:
            words.append("fwd+bwd" if self.backward else "fwd")
        if self.regime != "random":
            words.append(self.regime)
        if self.ignored:
            words.append(f"{self.ignored:.0%} ignored")
        if self.bias:
            words.append("bias")
        return f"{self.op} " + ", ".join([" ".join(words[: len(self.shape)]), *words[len(self.shape) :]])


class Run(NamedTuple):
    """call: computes and returns the results; prepare: restores what `call` overwrites, not timed; owned: results in
    preallocated memory."""

    call: Callable[[], Sequence[Tensor]]
    prepare: Callable[[], object] | None = None
    owned: tuple[Tensor, ...] = ()


Build = Callable[[Case, Inputs], Run]


@dataclass(frozen=True)
class Provider:
    """patience: if the first call whose memory is metered takes more seconds than this, it is also the only timed call;
    warmups: calls before that; unavailable: why it cannot run here; checked: the smoke tests compare it with float64;
    is_floor: it does part of the work, into preallocated memory, and has neither an error nor a peak memory."""

    name: str
    build: Build
    patience: float = math.inf
    warmups: int = 0
    unavailable: str | None = None
    checked: bool = True
    is_floor: bool = False


@dataclass
class Row:
    """One line of the table. Times in seconds, memory in bytes; None: not measured."""

    case: str
    provider: str
    status: str = "ok"
    n: int = 0
    median: float | None = None
    p20: float | None = None
    p80: float | None = None
    speedup: float | None = None
    light: float | None = None  # speed-of-light time / median
    peak_extra: int | None = None
    beyond_results: int | None = None
    errors: dict[str, float] = field(default_factory=dict)
    errors_on: str = ""

    @property
    def error(self) -> float | None:
        return max(self.errors.values()) if self.errors else None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Bar:
    """A limit on a case of the default run. `value` gets the rows of the case by provider name."""

    what: str
    case: str
    value: Callable[[dict[str, Row]], float | None]
    limit: float
    at_least: bool = False

    def met(self, value: float) -> bool:
        return value >= self.limit if self.at_least else value <= self.limit


def quantile(samples: Sequence[float], q: float) -> float:
    """Linear interpolation between order statistics."""
    ordered = sorted(samples)
    position = q * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


class Effort(NamedTuple):
    """budget: seconds of timing a case beyond the minimum of rounds; minimum: None for the default of the device; cap:
    seconds after which a case gets `ENOUGH` rounds; quick_samples: calls of a quick provider; memory_seconds: of calls
    whose memory is metered; slow: seconds of such a call from which its time counts as one of the samples;
    compiled_errors: whether a provider that compiles in its warm-up has an error, for which it compiles once more."""

    budget: float = 0.0
    minimum: int | None = None
    cap: float = CAP
    quick_samples: int = QUICK_SAMPLES
    memory_seconds: float = memory.SECONDS
    slow: float = math.inf
    compiled_errors: bool = True


class Timer:
    """Times single calls. On CUDA by events around the call: before it a buffer larger than the L2 cache is written and
    the device sleeps, so that the host runs ahead. `finish` synchronises and returns seconds."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        if self.cuda:
            size = max(256 << 20, 4 * torch.cuda.get_device_properties(device).L2_cache_size)
            self.flush = torch.empty(size, dtype=torch.int8, device=device)

    def time(self, run: Run) -> Any:
        if run.prepare is not None:
            run.prepare()
        if not self.cuda:
            start = time.perf_counter()
            results = run.call()
            seconds = time.perf_counter() - start
            del results
            return seconds
        self.flush.zero_()
        torch.cuda._sleep(500_000)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run.call()
        end.record()
        return start, end

    def finish(self, marks: list[Any]) -> list[float]:
        if not self.cuda:
            return marks
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in marks]


def interleave(
    runs: dict[str, Run],
    timer: Timer,
    minimum: int,
    budget: float,
    tick: Callable[[str], object] = lambda name: None,
    cap: float = CAP,
    quick_samples: int = 0,
    first: dict[str, float] | None = None,
) -> dict[str, list[float]]:
    """Rounds in which every run is called once, in random order (fixed seed): at least `minimum` rounds and as many as
    fit in `budget` seconds, but only `ENOUGH` once they have taken `cap` seconds. Then rounds over the quick runs, up
    to `quick_samples` calls of each. A run with a known time of a call, in `first`, leaves out a round."""
    order = random.Random(0)
    samples: dict[str, list[float]] = {name: [first[name]] if first and name in first else [] for name in runs}

    def round_over(names: list[str]) -> None:
        turn = order.sample(names, len(names))
        marks = []
        for name in turn:
            tick(name)
            marks.append(timer.time(runs[name]))
        for name, seconds in zip(turn, timer.finish(marks), strict=True):
            samples[name].append(seconds)

    start = time.perf_counter()
    for number in range(MAX_SAMPLES):
        spent = time.perf_counter() - start
        if number >= minimum and spent * (number + 1) / number > budget:
            break
        if number >= ENOUGH and spent > cap:
            break
        round_over([name for name, times in samples.items() if len(times) <= number])

    def goes_on(times: list[float]) -> bool:
        return len(times) < quick_samples and len(times) * min(times) < QUICK_SECONDS

    while quick := [name for name, times in samples.items() if goes_on(times)]:
        round_over(quick)
    return samples


def relative_error(result: Tensor, oracle: Tensor) -> float:
    """Frobenius norm of the difference over the norm of the oracle."""
    difference = (result.detach().to(oracle.device, torch.float64) - oracle).norm()
    return float(difference / oracle.norm().clamp_min(torch.finfo(torch.float64).tiny))


def result_bytes(run: Run, results: Iterable[Tensor], inputs: Inputs) -> int:
    """Bytes of the results that the call allocated."""
    known = {t.untyped_storage().data_ptr() for t in (*inputs.values(), *run.owned)}
    return sum(t.nbytes for t in results if t.untyped_storage().data_ptr() not in known)


def reason(error: Exception) -> str:
    text = str(error).strip().splitlines()
    first = text[0] if text else type(error).__name__
    return first if isinstance(error, Rejected) else f"{type(error).__name__}: {first}"[:160]


def measure(
    benchmark: Benchmark,
    case: Case,
    device: torch.device,
    roofs: Roofs,
    providers: list[Provider],
    effort: Effort,
    tick: Callable[[str], object] = lambda text: None,
) -> list[Row]:
    """All providers of one case. A provider that raises keeps its row, with the reason as its status."""
    rows = {p.name: Row(case.name, p.name) for p in providers}
    live = []
    for provider in providers:
        if provider.unavailable is not None:
            rows[provider.name].status = f"not run: {provider.unavailable}"
        else:
            live.append(provider)

    unmeasured = [provider for provider in live if provider.warmups and not effort.compiled_errors]
    checked = _measure_errors(benchmark, case, device, [p for p in live if p not in unmeasured], rows, tick)
    live = [provider for provider in live if provider in checked or provider in unmeasured]
    inputs = benchmark.inputs(case, device)
    runs: dict[str, Run] = {}
    once: dict[str, list[float]] = {}
    first: dict[str, float] = {}
    for provider in live:
        tick(f"{provider.name}: memory")
        try:
            run = provider.build(case, inputs)
            for _ in range(provider.warmups if device.type == "cpu" else 3):
                if run.prepare is not None:
                    run.prepare()
                run.call()
            spent: list[float] = []
            call, prepare = _timed(run.call, device, spent), run.prepare or (lambda: None)
            seconds = min(effort.memory_seconds, provider.patience)
            peak, results = memory.peak_of_steps(call, prepare, device, seconds)
        except Exception as error:
            rows[provider.name].status = f"rejects: {reason(error)}"
            continue
        row = rows[provider.name]
        if peak is not None and not provider.is_floor:
            row.peak_extra = peak
            row.beyond_results = max(0, peak - result_bytes(run, results, inputs))
        del results
        if spent[0] > provider.patience:
            once[provider.name] = spent
        else:
            runs[provider.name] = run
            if spent[0] > effort.slow:
                first[provider.name] = spent[0]

    timer = Timer(device)
    minimum = effort.minimum or MIN_SAMPLES[device.type]
    samples = interleave(runs, timer, minimum, effort.budget, tick, effort.cap, effort.quick_samples, first)
    for name, times in (once | samples).items():
        row = rows[name]
        row.n = len(times)
        row.median, row.p20, row.p80 = (quantile(times, q) for q in (0.5, 0.2, 0.8))
        row.light = roofs.light(case.bytes, case.flops, DTYPE_NAMES[case.dtype]) / row.median
    baseline = rows.get(benchmark.baseline)
    if baseline is not None and baseline.median is not None:
        for row in rows.values():
            row.speedup = None if row.median is None else baseline.median / row.median
    return list(rows.values())


def _timed(call: Callable[[], Any], device: torch.device, seconds: list[float]) -> Callable[[], Any]:
    """The call, which appends its seconds to a list."""

    def run() -> Any:
        start = time.perf_counter()
        results = call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        return results

    return run


def _measure_errors(
    benchmark: Benchmark,
    case: Case,
    device: torch.device,
    providers: list[Provider],
    rows: dict[str, Row],
    tick: Callable[[str], object],
) -> list[Provider]:
    """Fills in the errors; returns the providers that support the case."""
    twin = benchmark.twin(case)
    inputs = benchmark.inputs(twin, device)
    tick("float64 oracle")
    oracle = benchmark.oracle(twin, inputs)
    changed = [f"{key}={twin.shape[key]}" for key in case.shape if twin.shape[key] != case.shape[key]]
    live = []
    for provider in providers:
        tick(f"{provider.name}: error")
        row = rows[provider.name]
        try:
            run = provider.build(twin, inputs)
            if run.prepare is not None:
                run.prepare()
            results = run.call()
            if not provider.is_floor:
                row.errors = benchmark.errors(oracle, results)
                row.errors_on = " ".join(changed) or "all rows"
        except Exception as error:
            row.status = f"rejects: {reason(error)}"
            continue
        live.append(provider)
    return live
