"""Host time: how long a call takes when its tensors are so small that the kernels hardly count.

One thread. Forward and, if the op has one, backward, against the eager torch that a user would write. The two take
turns, in random order. On a CPU the clock is the CPU time of the process: other programs on the machine would lengthen
the longer of two calls more often. On a GPU it is the time until the call returns, not until the device is done.

The rows are then doubled until a call takes no longer than eager torch, on a GPU until the device is done.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass

import torch

from benchmarks.benchmark import Benchmark
from benchmarks.harness import Case, Run, quantile

ROUNDS = 600
QUICK_ROUNDS = 20
WARMUPS = 50
# The search for the size from which an op is not slower: most rounds per size, and the largest multiple of the rows.
SIZE_ROUNDS = 60
LARGEST_MULTIPLE = 256
Times = list[float]


@dataclass(frozen=True)
class HostTime:
    """ours, eager: seconds at p20, median and p80 of n calls each; limit: the bar on their ratio; level_from: the size
    from which the op is not slower, as in "N=256"."""

    case: str
    n: int
    ours: Times
    eager: Times
    limit: float | None
    level_from: str

    @property
    def ratio(self) -> float:
        return self.ours[1] / self.eager[1]

    @property
    def met(self) -> bool | None:
        return None if self.limit is None else self.ratio <= self.limit


def case_of(benchmark: Benchmark) -> Case:
    assert benchmark.host is not None
    return benchmark.case(benchmark.host.shape, benchmark.dtype, backward=benchmark.host.backward)


def name_of(benchmark: Benchmark) -> str:
    return f"{case_of(benchmark).name} (host time)"


def measure(benchmark: Benchmark, device: torch.device, rounds: int = ROUNDS) -> HostTime:
    case = case_of(benchmark)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        ours, eager = _alternate(benchmark, case, device, rounds)
        level_from = _level_from(benchmark, case, device, min(max(rounds // 5, 3), SIZE_ROUNDS))
    finally:
        torch.set_num_threads(threads)
    return HostTime(case.name, rounds, ours, eager, benchmark.host.limit, level_from)


def _alternate(
    benchmark: Benchmark, case: Case, device: torch.device, rounds: int, finish: bool = False
) -> tuple[Times, Times]:
    """p20, median and p80 of the fused call and of eager torch. finish: time ends when the device is done."""
    inputs = benchmark.inputs(case, device)
    eager = next(p for p in benchmark.providers(case, device) if p.name == benchmark.baseline)
    runs = [benchmark.run(benchmark.fused)(case, inputs), eager.build(case, inputs)]
    for _ in range(min(WARMUPS, rounds)):
        for run in runs:
            _time(run, device, finish)
    samples, order = ([], []), random.Random(0)
    for _ in range(rounds):
        for which in order.sample((0, 1), 2):
            samples[which].append(_time(runs[which], device, finish))
    ours, eager = ([quantile(times, q) for q in (0.2, 0.5, 0.8)] for times in samples)
    return ours, eager


def _level_from(benchmark: Benchmark, case: Case, device: torch.device, rounds: int) -> str:
    """The least number of rows, doubled from the rows of `case`, at which the fused call takes no longer."""
    rows, *_ = case.shape
    for doublings in range(LARGEST_MULTIPLE.bit_length()):
        shape = case.shape | {rows: case.shape[rows] << doublings}
        larger = benchmark.case(shape, benchmark.dtype, backward=benchmark.host.backward)
        ours, eager = _alternate(benchmark, larger, device, rounds, finish=True)
        if ours[1] <= eager[1]:
            return f"{rows}={shape[rows]}"
    return f"> {rows}={shape[rows]}"


def _time(run: Run, device: torch.device, finish: bool) -> float:
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    if run.prepare is not None:
        run.prepare()
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = clock()
    results = run.call()
    if finish and device.type == "cuda":
        torch.cuda.synchronize()
    seconds = clock() - start
    del results
    return seconds
