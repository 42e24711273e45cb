"""Where the time of an op goes on a GPU: one call under Nsight Compute, a row for each kernel.

python -m benchmarks.profile --op linear_cross_entropy --case "N=8192 D=2304" --provider triton

Takes the options of `python -m benchmarks` and profiles every selected case and provider in turn. The clocks are not
locked. The tables and ncu's own output go to benchmarks/results/scratch/profile.
"""

from __future__ import annotations

import argparse
import csv
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import __main__ as command
from benchmarks.benchmark import Benchmark
from benchmarks.harness import Case, Provider
from benchmarks.providers import OURS

FOLDER = command.RESULTS / "scratch" / "profile"
METRICS = {
    "gpu__time_duration.sum": "time",
    "dram__bytes.sum": "bytes",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "% of memory",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "% of processors",
    "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active": "% of tensor cores",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "% of warps",
    "launch__registers_per_thread": "registers",
    "launch__waves_per_multiprocessor": "waves",
}


class KernelRow(NamedTuple):
    """One launch; metrics by their names in METRICS, in base units (ns, bytes, per cent), None if ncu has none."""

    kernel: str
    metrics: dict[str, float | None]


def parse_rows(text: str) -> list[KernelRow]:
    """Parses `ncu --csv --page raw --print-units base`: other lines, a header, a line of units, one line a launch."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    if not lines:
        return []
    rows = list(csv.DictReader(lines))
    return [KernelRow(row["Kernel Name"], {m: _number(row.get(m)) for m in METRICS}) for row in rows[1:]]


def _number(text: str | None) -> float | None:
    try:
        return float((text or "").replace(",", ""))
    except ValueError:
        return None


def table(title: str, rows: list[KernelRow]) -> list[list[str]]:
    """Header, one line a launch in order, and the sum."""
    total = sum(row.metrics["gpu__time_duration.sum"] or 0.0 for row in rows)
    moved = sum(row.metrics["dram__bytes.sum"] or 0.0 for row in rows)
    found = [["kernel", "time", "of total", "GB/s", *list(METRICS.values())[2:]]]
    for name, values in [(row.kernel, row.metrics) for row in rows] + [("all", {})]:
        time = total if name == "all" else values["gpu__time_duration.sum"] or 0.0
        size = moved if name == "all" else values["dram__bytes.sum"] or 0.0
        shares = [f"{time / 1e3:.1f} us", f"{time / total:.0%}" if total else "", f"{size / time:.0f}" if time else ""]
        rest = [values.get(metric) for metric in list(METRICS)[2:]]
        found.append([_short(name), *shares, *("" if value is None else f"{value:.1f}" for value in rest)])
    return found


def _short(kernel: str) -> str:
    return re.sub(r"\(anonymous namespace\)::|sslkernels::|void |\(.*", "", kernel)[:60]


def chosen(options: argparse.Namespace) -> list[tuple[Benchmark, Case, Provider]]:
    device = torch.device(options.device)
    found = []
    for benchmark, case in command.select(options):
        for provider in benchmark.providers(case, device):
            wanted = options.provider or [OURS]
            if provider.unavailable is None and all(text in provider.name for text in wanted):
                found.append((benchmark, case, provider))
    return found


def run_one(options: argparse.Namespace, number: int) -> None:
    """The call that ncu watches: the third, between the profiler's start and stop."""
    benchmark, case, provider = chosen(options)[number]
    run = provider.build(case, benchmark.inputs(case, torch.device(options.device)))
    for last in (False, False, True):
        if run.prepare is not None:
            run.prepare()
        if options.device == "cuda":
            torch.cuda.synchronize()
            if last:
                torch.cuda.profiler.start()
        run.call()
        if options.device == "cuda":
            torch.cuda.synchronize()
    if options.device == "cuda":
        torch.cuda.profiler.stop()


def ncu_command(arguments: list[str], number: int, log: Path) -> list[str]:
    return [
        "ncu", "--profile-from-start", "off", "--clock-control", "none", "--target-processes", "all",
        "--csv", "--page", "raw", "--print-units", "base", "--metrics", ",".join(METRICS), "--log-file", str(log),
        sys.executable, "-m", "benchmarks.profile", "--number", str(number), *arguments,
    ]  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    own = argparse.ArgumentParser(add_help=False)
    own.add_argument("--number", type=int)
    own.add_argument("--dry-run", action="store_true", help="print the commands, and run each call without ncu")
    ours, rest = own.parse_known_args(arguments)
    options = command.parse(rest)
    if ours.number is not None:
        run_one(options, ours.number)
        return 0
    if shutil.which("ncu") is None and not ours.dry_run:
        print("ncu (Nsight Compute) is not installed", file=sys.stderr)
        return 1
    console = Console()
    FOLDER.mkdir(parents=True, exist_ok=True)
    for number, (_, case, provider) in enumerate(chosen(options)):
        title = f"{case.name}: {provider.name}"
        stem = re.sub(r"[^\w=+-]+", "_", title).lower()
        line = ncu_command(rest, number, FOLDER / f"{stem}.csv")
        if ours.dry_run:
            console.print(" ".join(line), soft_wrap=True)
            run_one(options, number)
            continue
        done = subprocess.run(line, check=False)
        if done.returncode != 0:
            return done.returncode
        header, *lines = table(title, parse_rows((FOLDER / f"{stem}.csv").read_text()))
        shown = Table(*header, title=title)
        for cells in lines:
            shown.add_row(*cells)
        console.print(shown)
        text = [
            f"# {title}",
            "",
            *("| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *lines]),
        ]
        (FOLDER / f"{stem}.md").write_text("\n".join(text) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
