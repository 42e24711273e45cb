"""Host time: how long a call takes when its tensors are so small that the kernels hardly count.

One thread. Forward and, if the op has one, backward, against the eager torch that a user would write. The two take
turns, in random order. On a CPU the clock is the CPU time of the process: other programs on the machine would lengthen
the longer of two calls more often. On a GPU it is the time until the call returns, not until the device is done.
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
Times = list[float]


@dataclass(frozen=True)
class HostTime:
    """ours, eager: seconds at p20, median and p80 of n calls each; limit: the bar on their ratio."""

    case: str
    n: int
    ours: Times
    eager: Times
    limit: float | None

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
    inputs = benchmark.inputs(case, device)
    eager = next(p for p in benchmark.providers(case, device) if p.name == benchmark.baseline)
    runs = [benchmark.run(benchmark.fused)(case, inputs), eager.build(case, inputs)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(min(WARMUPS, rounds)):
            for run in runs:
                _time(run, device)
        samples, order = ([], []), random.Random(0)
        for _ in range(rounds):
            for which in order.sample((0, 1), 2):
                samples[which].append(_time(runs[which], device))
    finally:
        torch.set_num_threads(threads)
    ours, eager = ([quantile(times, q) for q in (0.2, 0.5, 0.8)] for times in samples)
    return HostTime(case.name, rounds, ours, eager, benchmark.host.limit)


def _time(run: Run, device: torch.device) -> float:
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    if run.prepare is not None:
        run.prepare()
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = clock()
    results = run.call()
    seconds = clock() - start
    del results
    return seconds
