"""Measures ops on this machine's device, in one or two cases each, and writes a figure, tables and JSON."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import time
import warnings
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import environment, harness, host_time, memory, overview, report
from benchmarks.benchmark import Benchmark, discover
from benchmarks.harness import DTYPES, Case
from benchmarks.roofline import Roofs, measure_roofs

BENCHMARKS = discover()
RESULTS = environment.ROOT / "benchmarks" / "results"
BUDGET = {"cpu": 4.0, "cuda": 8.0}
HURRY_AFTER = 180.0  # seconds on a CPU after which every case gets three rounds
# The default run has minutes for all ops: a case gets the least rounds and the memory of few calls is metered. Compiled
# torch, for whose error it would be compiled once more, has none.
DEFAULT_ROUNDS = {"cpu": 2, "cuda": 10}
DEFAULT_MEMORY_SECONDS = 0.3
DEFAULT_QUICK_SAMPLES = 7
DEFAULT_SLOW = 0.5
DEFAULT_HOST_ROUNDS = 100


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    add = parser.add_argument
    add("--all", action="store_true", help="the whole matrix, in more rounds; the default is one or two cases an op")
    add("--op", action="append", choices=[b.op for b in BENCHMARKS], help="only this op, in all its cases (repeatable)")
    add("--case", action="append", metavar="TEXT", help="only cases whose name contains TEXT (repeatable: all of them)")
    add("--dtype", action="append", choices=list(DTYPES), help="only this dtype; with --shape, the dtype to use")
    add("--provider", action="append", metavar="TEXT", help="only providers whose name contains TEXT (repeatable)")
    add("--shape", action="append", metavar="N=..,D=..,V=..", help="these sizes instead of the default cases")
    add("--ignored", type=float, default=0.0, help="with --shape: fraction of ignored targets")
    add("--regime", choices=["random", "peaked"], default="random", help="with --shape: kind of logits")
    add("--bias", action="store_true", help="with --shape: a bias in the linear layer")
    add("--forward", action="store_true", help="with --shape: no gradients")
    add("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    add("--part", metavar="I/K", help="every K-th of the cases, starting at the I-th (1-based)")
    add(
        "--budget",
        type=float,
        help="seconds of timing per case, beyond the minimum of 5 rounds on CPU (3 if they are slow) and 30 on CUDA",
    )
    add("--host-time", action="store_true", help="only the host time of small calls, on one thread")
    add("--quick", action="store_true", help="small shapes and few rounds, as a check that everything runs")
    add("--verbose", action="store_true", help="also list the providers that cannot run here, and why")
    add("--list", action="store_true", help="print the cases and stop")
    add("--output", type=Path, metavar="DIR", help="default: benchmarks/results/scratch/<device>, which git ignores")
    add("--publish", action="store_true", help="record in benchmarks/results/<device>, beside the cases that are there")
    join = "measure nothing: join the results.json of these folders into benchmarks/results/<device>"
    add("--combine", nargs="+", type=Path, metavar="DIR", help=join)
    options = parser.parse_args(arguments)
    if options.publish and (options.output or options.quick or options.shape):
        parser.error("--publish records the cases of the matrix: it goes with neither --output, --quick nor --shape")
    return options


def is_narrowed(options: argparse.Namespace) -> bool:
    """Whether the command line selects cases."""
    return any((options.op, options.case, options.dtype, options.provider, options.shape, options.part))


def is_default(options: argparse.Namespace) -> bool:
    """Whether it is the run of minutes, one or two cases an op."""
    return not (options.all or options.quick or options.host_time or is_narrowed(options))


def select(options: argparse.Namespace) -> list[tuple[Benchmark, Case]]:
    chosen = []
    for benchmark in BENCHMARKS:
        if options.op and benchmark.op not in options.op:
            continue
        if options.shape:
            cases = _custom_cases(benchmark, options)
        else:
            which = "smoke_cases" if options.quick else "default_cases" if is_default(options) else "cases"
            cases = getattr(benchmark, which)(options.device)
            if options.dtype:
                cases = [case for case in cases if harness.DTYPE_NAMES[case.dtype] in options.dtype]
        chosen += [(benchmark, case) for case in cases if all(text in case.name for text in options.case or ())]
    if options.part:
        index, count = (int(number) for number in options.part.split("/"))
        chosen = chosen[index - 1 :: count]
    return chosen


def _custom_cases(benchmark: Benchmark, options: argparse.Namespace) -> list[Case]:
    settings = {"regime": options.regime, "ignored": options.ignored, "bias": options.bias}
    cases = []
    for text in options.shape:
        sizes = {key.strip(): int(size) for key, size in (part.split("=") for part in text.split(","))}
        for name in options.dtype or ["float32"]:
            cases += benchmark.custom_cases(sizes, DTYPES[name], backward=not options.forward, **settings)
    return cases


def host_cases(options: argparse.Namespace) -> list[Benchmark]:
    """The benchmarks whose host time belongs to this run; of several parts the first one has it."""
    if (
        options.case
        or options.dtype
        or options.provider
        or options.shape
        or not (options.part or "1/").startswith("1/")
    ):
        return []
    return [b for b in BENCHMARKS if b.host is not None and (not options.op or b.op in options.op)]


def run(
    options: argparse.Namespace, chosen: list[tuple[Benchmark, Case]], hosts: list[Benchmark], console: Console
) -> report.Report:
    device = torch.device(options.device)
    budget = options.budget if options.budget is not None else 0.0 if options.quick else BUDGET[device.type]
    columns = (TextColumn("{task.description}"), BarColumn(30), MofNCompleteColumn(), TimeElapsedColumn())
    default = is_default(options)
    minimum = 2 if options.quick else DEFAULT_ROUNDS[device.type] if default else None
    if default and options.budget is None:
        budget = 0.0
    quick_samples = 0 if options.quick else DEFAULT_QUICK_SAMPLES if default else harness.QUICK_SAMPLES
    memory_seconds = DEFAULT_MEMORY_SECONDS if default else memory.SECONDS
    begin = time.perf_counter()
    with Progress(*columns, console=console, auto_refresh=False) as progress:
        task = progress.add_task("measuring the roofs", total=len(chosen) + len(hosts))
        progress.refresh()
        dtypes = dict.fromkeys(case.dtype for _, case in chosen if case.flops)
        roofs = measure_roofs(device, list(dtypes)) if chosen else Roofs(0.0)
        result = report.Report(environment.describe(device), roofs)
        for benchmark, case in chosen:

            def tick(text: str, case: Case = case) -> None:
                progress.update(task, description=f"{case.name} | {text}")
                progress.refresh()

            start = time.perf_counter()
            if device.type == "cuda":
                torch.compiler.reset()
            providers = [
                provider
                for provider in benchmark.providers(case, device)
                if not options.provider or any(text in provider.name for text in options.provider)
            ]
            if default:
                providers = [provider for provider in providers if "reference" not in provider.name]
            hurried = device.type == "cpu" and time.perf_counter() - begin > HURRY_AFTER
            cap = 0.0 if hurried else harness.CAP
            slow = DEFAULT_SLOW if default and device.type == "cpu" else math.inf
            effort = harness.Effort(budget, minimum, cap, quick_samples, memory_seconds, slow, not default)
            rows = harness.measure(benchmark, case, device, result.roofs, providers, effort, tick)
            result.add(case, rows, benchmark.bars(device.type))
            if device.type == "cuda":
                torch.cuda.empty_cache()
            progress.advance(task)
            if not console.is_terminal:
                spent = time.perf_counter() - start
                print(f"[{len(result.cases)}/{len(chosen)}] {spent:.0f} s: {case.name}", flush=True)
        for benchmark in hosts:
            progress.update(task, description=f"{benchmark.op} | host time", advance=1)
            progress.refresh()
            rounds = DEFAULT_HOST_ROUNDS if default else host_time.QUICK_ROUNDS if options.quick else host_time.ROUNDS
            result.host_time.append(host_time.measure(benchmark, device, rounds))
        progress.update(task, description="done")
        progress.refresh()
    return result


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    console = Console()
    if not console.is_terminal:
        console = Console(width=max(160, console.width))
    if options.combine:
        parts = [json.loads((directory / "results.json").read_text()) for directory in options.combine]
        result = report.combine([report.Report.from_json(part) for part in parts])
        directory = options.output or RESULTS / environment.slug_of(result.environment["device"])
    else:
        chosen, hosts = [] if options.host_time else select(options), host_cases(options)
        if not chosen and not hosts:
            print("no case matches; see --list", file=sys.stderr)
            return 2
        if options.list:
            print("\n".join([case.name for _, case in chosen] + [host_time.name_of(b) for b in hosts]))
            return 0
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        try:
            result = run(options, chosen, hosts, console)
        except KeyboardInterrupt:
            print("interrupted: nothing was written", file=sys.stderr)
            return 130
        folder = RESULTS if options.publish else RESULTS / "scratch"
        directory = options.output or folder / environment.slug_of(result.environment["device"])
        if options.publish:
            result = beside_the_published(result, directory, options.device)
    if is_narrowed(options) or options.host_time:
        report.print_report(result, console, options.verbose)
    overview.show(result, console)
    for path in report.write(result, directory, options.verbose):
        if path.suffix == ".md" or path.name == report.OVERVIEW:
            console.print(f"wrote {path}", highlight=False, soft_wrap=True)
    return 0


def beside_the_published(result: report.Report, directory: Path, device: str) -> report.Report:
    """The result with the cases of the matrix that were published before and not measured now, each with its date."""
    path = directory / "results.json"
    if not path.exists():
        return result
    before = report.Report.from_json(json.loads(path.read_text()))
    matrix = {case.name for benchmark in BENCHMARKS for case in benchmark.cases(device)}
    before.cases = [case for case in before.cases if case["name"] in matrix]
    environment_now = dict(result.environment)
    merged = report.combine([before, result])
    return dataclasses.replace(merged, environment=environment_now)


if __name__ == "__main__":
    sys.exit(main())
