"""Times kernels and ops on the GPU, a line of JSON for each as soon as it is measured.

`python -m benchmarks.gpu.timing kernels`: each kernel of this package on both of its backends, beside a copy of the
same bytes. `ops`: each op on each backend, beside eager torch and the peers that are installed. The first case of
everything is measured before the second of anything, so that a run that is ended tells of all. Nothing is compared with
an oracle here: the tests do that.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.benchmark import Benchmark, discover
from benchmarks.harness import DTYPE_NAMES, Case, Provider, Timer, quantile, reason
from benchmarks.kernels.kernel import PLAIN as PLAIN_KERNEL
from benchmarks.kernels.kernel import KernelBenchmark
from benchmarks.providers import COMPILED
from benchmarks.roofline import measure_roofs

CASES = 2  # of a kernel or an op
SECONDS = 0.15  # of a provider's samples
LEAST, MOST = 5, 20  # samples
SLOW = 0.5  # seconds of a call that is the only one


def groups(kernels: bool, rehearse: bool) -> Iterator[list[tuple[Benchmark, Case]]]:
    """The first cases of everything, then the second ones."""
    found: dict[tuple[str, str], list[tuple[Benchmark, Case]]] = {}
    for benchmark in discover():
        if isinstance(benchmark, KernelBenchmark) == kernels:
            cases = benchmark.smoke_cases("cuda") if rehearse else benchmark.cases("cuda")
            for case in cases:
                found.setdefault((benchmark.op, case.op), []).append((benchmark, case))
    columns = itertools.zip_longest(*(spread(cases) for cases in found.values()))
    yield from ([pair for pair in column if pair is not None] for column in columns)


def spread(cases: list[Any]) -> list[Any]:
    """The first and the middle one."""
    return cases[:1] if len(cases) < 2 else [cases[0], cases[len(cases) // 2]]


def chosen(benchmark: Benchmark, case: Case, device: torch.device) -> list[Provider]:
    """Without what takes long and no bar names: compilations, plain torch of kernels, the reference."""
    without = {COMPILED, PLAIN_KERNEL}
    return [p for p in benchmark.providers(case, device) if p.name not in without and "reference" not in p.name]


def seconds_of(provider: Provider, case: Case, inputs: dict[str, torch.Tensor], timer: Timer) -> list[float]:
    run = provider.build(case, inputs)
    run.call()  # compiles
    (once,) = timer.finish([timer.time(run)])
    if once > SLOW:
        return [once]
    count = min(max(int(SECONDS / max(once, 1e-6)), LEAST), MOST)
    return timer.finish([timer.time(run) for _ in range(count)])


def measured(benchmark: Benchmark, case: Case, device: torch.device, timer: Timer) -> Iterator[dict[str, Any]]:
    known = {"family": benchmark.op, "op": case.op, "public": benchmark.public or benchmark.op, "case": case.name}
    known |= {"dtype": DTYPE_NAMES[case.dtype], "bytes": case.bytes, "flops": case.flops}
    try:
        inputs = benchmark.inputs(case, device)
    except Exception as error:
        yield {**known, "status": reason(error)}
        return
    for provider in chosen(benchmark, case, device):
        line = {**known, "provider": provider.name}
        if provider.unavailable is not None:
            continue
        try:
            times = seconds_of(provider, case, inputs, timer)
            line |= {"status": "ok", "seconds": quantile(times, 0.5), "p20": quantile(times, 0.2)}
            line |= {"p80": quantile(times, 0.8), "n": len(times)}
        except Exception as error:  # a peer's error is a finding
            line["status"] = reason(error)
        yield line


def write(line: dict[str, Any]) -> None:
    path = os.environ.get("TIMES")
    if path:
        with Path(path).open("a") as file:
            file.write(json.dumps(line) + "\n")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.timing", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("what", choices=["kernels", "ops"])
    parser.add_argument("--rehearse", action="store_true", help="small sizes on the CPU, a few of them")
    options = parser.parse_args(arguments)
    device = torch.device("cpu" if options.rehearse else "cuda")
    if not options.rehearse:
        roofs = measure_roofs(device, [torch.bfloat16, torch.float32])
        write({"roofs": {"copy": roofs.bandwidth, **roofs.peaks}})
    timer, failed = Timer(device), 0
    for group in itertools.islice(groups(options.what == "kernels", options.rehearse), CASES):
        for benchmark, case in group[:4] if options.rehearse else group:
            for line in measured(benchmark, case, device, timer):
                write(line)
                ours = "sslkernels" in line.get("provider", "sslkernels")
                failed += ours and line["status"] != "ok"
                shown = f"{line['seconds'] * 1e3:9.3f} ms" if "seconds" in line else line["status"]
                print(f"{case.name} | {line.get('provider', '')} | {shown}", flush=True)
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
