"""python -m benchmarks: measures every op on this machine's device and writes a table, JSON and plots."""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import environment, harness, host_time, report
from benchmarks.benchmark import Benchmark, discover
from benchmarks.harness import DTYPES, Case
from benchmarks.roofline import Roofs, measure_roofs

BENCHMARKS = discover()
RESULTS = environment.ROOT / "benchmarks" / "results"
BUDGET = {"cpu": 4.0, "cuda": 8.0}
HURRY_AFTER = 180.0  # seconds on a CPU after which every case gets three rounds


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    add = parser.add_argument
    add("--op", action="append", choices=[b.op for b in BENCHMARKS], help="only this op (repeatable)")
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
    where = "benchmarks/results/<device>; for a selection of cases benchmarks/results/scratch/<device>"
    add("--output", type=Path, metavar="DIR", help=f"default: {where}")
    add(
        "--combine", nargs="+", type=Path, metavar="DIR", help="measure nothing: join the results.json of these folders"
    )
    return parser.parse_args(arguments)


def select(options: argparse.Namespace) -> list[tuple[Benchmark, Case]]:
    chosen = []
    for benchmark in BENCHMARKS:
        if options.op and benchmark.op not in options.op:
            continue
        if options.shape:
            cases = _custom_cases(benchmark, options)
        else:
            cases = benchmark.smoke_cases(options.device) if options.quick else benchmark.cases(options.device)
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
            hurried = device.type == "cpu" and time.perf_counter() - begin > HURRY_AFTER
            minimum, cap = 2 if options.quick else None, 0.0 if hurried else harness.CAP
            rows = harness.measure(benchmark, case, device, result.roofs, budget, providers, tick, minimum, cap)
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
            rounds = host_time.QUICK_ROUNDS if options.quick else host_time.ROUNDS
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
        default = RESULTS / environment.slug_of(result.environment["device"])
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
        narrowed = (
            options.op,
            options.case,
            options.dtype,
            options.provider,
            options.shape,
            options.part,
            options.quick,
            options.host_time,
        )
        folder = RESULTS / "scratch" if any(narrowed) else RESULTS
        default = folder / environment.slug_of(result.environment["device"])
    report.print_report(result, console, options.verbose)
    directory = options.output or default
    for path in report.write(result, directory, options.verbose):
        console.print(f"wrote {path}", highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
