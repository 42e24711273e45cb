"""python -m benchmarks: measures every op on the device that is there and writes a table, JSON and plots."""

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

from benchmarks import environment, harness, report
from benchmarks.harness import DTYPES, Benchmark, Case
from benchmarks.kernels import contrastive as bench_pair_kernels
from benchmarks.kernels import kernel as bench_kernels
from benchmarks.ops import contrastive_losses as bench_contrastive
from benchmarks.ops import cross_entropy as bench_cross_entropy
from benchmarks.ops import gaussian as bench_gaussian
from benchmarks.ops import gumbel_quantize as bench_gumbel_quantize
from benchmarks.ops import gumbel_softmax as bench_gumbel
from benchmarks.ops import info_nce as bench_own_negatives
from benchmarks.ops import linear_cross_entropy as bench_linear_cross_entropy
from benchmarks.ops import linear_sample as bench_linear_sample
from benchmarks.ops import mask_tokens as bench_mask_tokens
from benchmarks.ops import negative_sampling_loss as bench_negative_sampling
from benchmarks.ops import prediction_energy as bench_prediction_energy
from benchmarks.ops import random_streams as bench_random_normal
from benchmarks.ops import vector_quantize as bench_vector_quantize
from benchmarks.roofline import measure_roofs

BENCHMARKS = (
    bench_mask_tokens.BENCHMARK,
    bench_cross_entropy.BENCHMARK,
    bench_linear_cross_entropy.BENCHMARK,
    *bench_contrastive.BENCHMARKS,
    bench_own_negatives.BENCHMARK,
    bench_negative_sampling.BENCHMARK,
    bench_vector_quantize.BENCHMARK,
    bench_prediction_energy.BENCHMARK,
    bench_gumbel.BENCHMARK,
    bench_gumbel_quantize.BENCHMARK,
    bench_random_normal.BENCHMARK,
    bench_gaussian.BENCHMARK,
    bench_linear_sample.BENCHMARK,
    bench_kernels.BENCHMARK,
    bench_pair_kernels.BENCHMARK,
)
RESULTS = environment.ROOT / "benchmarks" / "results"
BUDGET = {"cpu": 4.0, "cuda": 8.0}
HURRY_AFTER = 180.0  # seconds on a CPU; from then on a case gets three rounds


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    add = parser.add_argument
    add("--op", action="append", choices=[b.op for b in BENCHMARKS], help="only this op (repeatable)")
    add("--case", action="append", metavar="TEXT", help="only cases whose name contains TEXT (repeatable: all of them)")
    add("--dtype", action="append", choices=list(DTYPES), help="only this dtype; with --shape, the dtype to use")
    add("--provider", action="append", metavar="TEXT", help="only providers whose name contains TEXT (repeatable)")
    add("--shape", action="append", metavar="N=..,D=..,V=..", help="these sizes instead of the default cases")
    add("--ignored", type=float, default=0.0, help="with --shape: part of the targets that is ignored")
    add("--regime", choices=["random", "peaked"], default="random", help="with --shape: kind of logits")
    add("--bias", action="store_true", help="with --shape: a bias in the linear layer")
    add("--forward", action="store_true", help="with --shape: no gradients")
    add("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    add("--part", metavar="I/K", help="every K-th of the cases, starting at the I-th (1-based)")
    add(
        "--budget",
        type=float,
        help="seconds of timing a case, beyond the minimum of 5 rounds on CPU (3 where they are slow) and 30 on CUDA",
    )
    add("--quick", action="store_true", help="small shapes and few rounds, to see that everything runs")
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
    cases = []
    for text in options.shape:
        sizes = {key.strip(): int(size) for key, size in (part.split("=") for part in text.split(","))}
        if set(sizes) != set(benchmark.shape_keys):
            continue
        shape = {key: sizes[key] for key in benchmark.shape_keys}
        for name in options.dtype or ["float32"]:
            setting = (options.regime, options.ignored, not options.forward, options.bias)
            cases.append(benchmark.make_case(shape, DTYPES[name], *setting))
    return cases


def run(options: argparse.Namespace, chosen: list[tuple[Benchmark, Case]], console: Console) -> report.Report:
    device = torch.device(options.device)
    budget = options.budget if options.budget is not None else 0.0 if options.quick else BUDGET[device.type]
    columns = (TextColumn("{task.description}"), BarColumn(30), MofNCompleteColumn(), TimeElapsedColumn())
    begin = time.perf_counter()
    with Progress(*columns, console=console, auto_refresh=False) as progress:
        task = progress.add_task("measuring the roofs", total=len(chosen))
        progress.refresh()
        dtypes = dict.fromkeys(case.dtype for _, case in chosen if case.flops)
        result = report.Report(environment.describe(device), measure_roofs(device, list(dtypes)))
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
        chosen = select(options)
        if not chosen:
            print("no case matches; see --list", file=sys.stderr)
            return 2
        if options.list:
            print("\n".join(case.name for _, case in chosen))
            return 0
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        try:
            result = run(options, chosen, console)
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
