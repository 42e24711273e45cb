"""Results as a table on the screen, Markdown, JSON and plots."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.harness import DTYPE_NAMES, Bar, Case, Row
from benchmarks.host_time import HostTime
from benchmarks.roofline import Roofs

COLUMNS = (
    "provider",
    "median",
    "p20 - p80",
    "n",
    "speed-up",
    "rate",
    "of light",
    "peak extra",
    "beyond",
    "error",
)
FULL_WIDTH = 132  # a narrower screen gets the table without the columns of WIDE_ONLY
WIDE_ONLY = ("p20 - p80", "rate")
OVERVIEW = "overview.png"
BAR_COLUMNS = ("case", "what", "limit", "measured", "")
HOST_COLUMNS = ("case", "sslkernels", "p20 - p80", "eager torch", "p20 - p80", "n", "ratio", "limit", "", "level from")
NOT_MET = "not met"
MET = {None: "", True: "met", False: NOT_MET}
HOST_NOTE = (
    "CPU time of one thread (on a GPU: time until the call returns), for shapes so small that the host takes longer "
    "than the kernels; n calls each, in turn. ratio: the median of this package over the median of eager torch. "
    "level from: the rows, doubled, from which this package takes no longer (on a GPU until the device is done)."
)
NOTES = (
    "median, p20 - p80: n single calls; the providers of a case take turns in random order.",
    "speed-up: over the first row of the case.",
    "rate: bytes or flops of the case (each input read once, each output written once; matmul flops) over the median.",
    "of light: max(bytes / copy bandwidth, flops / matmul rate), both measured on this machine, over the median.",
    "peak extra: peak memory of 10 calls in a loop (fewer if slow) above the use before; "
    "beyond: without the loss and gradients it returns.",
    "error: relative Frobenius norm against float64, the largest among loss and gradients, on fewer rows if so noted; "
    "for mask_tokens the number of tokens that break the masking rule.",
)


@dataclass
class Report:
    """All cases of a run; an entry of `cases` holds the data of the table and the plots."""

    environment: dict[str, Any]
    roofs: Roofs
    cases: list[dict[str, Any]] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    bars: list[dict[str, Any]] = field(default_factory=list)
    host_time: list[HostTime] = field(default_factory=list)

    def add(self, case: Case, rows: list[Row], bars: list[Bar]) -> None:
        self.cases.append(
            {
                "name": case.name,
                "op": case.op,
                "shape": case.shape,
                "dtype": DTYPE_NAMES[case.dtype],
                "setting": case.name.split(", ", 1)[-1],
                "bytes": case.bytes,
                "flops": case.flops,
                "date": self.environment["date"],
                "commit": self.environment["commit"],
                "light": self.roofs.light(case.bytes, case.flops, DTYPE_NAMES[case.dtype]),
            }
        )
        self.rows += rows
        by_name = {row.provider: row for row in rows}
        for bar in bars:
            if bar.case == case.name:
                value = bar.value(by_name)
                met = None if value is None else bar.met(value)
                limit = f"{'>=' if bar.at_least else '<='} {bar.limit:.3g}"
                self.bars.append({"case": bar.case, "what": bar.what, "limit": limit, "value": value, "met": met})

    def to_json(self) -> dict[str, Any]:
        return {
            "environment": self.environment,
            "roofs": {"bandwidth": self.roofs.bandwidth, "peaks": self.roofs.peaks},
            "cases": self.cases,
            "rows": [row.to_json() for row in self.rows],
            "bars": self.bars,
            "host_time": [asdict(row) for row in self.host_time],
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Report:
        rows = [Row(**row) for row in data["rows"]]
        host_time = [HostTime(**row) for row in data.get("host_time", [])]
        when = {key: data["environment"][key] for key in ("date", "commit")}
        cases = [when | case for case in data["cases"]]
        return cls(data["environment"], Roofs(**data["roofs"]), cases, rows, data["bars"], host_time)


def combine(reports: list[Report]) -> Report:
    """One report of several runs on one device; the last measurement of a case counts."""
    devices = {report.environment["device"] for report in reports}
    if len(devices) != 1:
        raise ValueError(f"results of different devices cannot be combined: {', '.join(sorted(devices))}")
    roofs = [report.roofs for report in reports if report.cases]
    peaks = {dtype: peak for each in roofs for dtype, peak in each.peaks.items()}
    merged = Report(dict(reports[-1].environment), Roofs(roofs[-1].bandwidth, peaks))
    merged.environment["commit"] = ", ".join(dict.fromkeys(report.environment["commit"] for report in reports))
    last = {case["name"]: report for report in reports for case in report.cases}
    for report in reports:
        own = {case["name"] for case in report.cases if last[case["name"]] is report}
        merged.cases += [case for case in report.cases if case["name"] in own]
        merged.rows += [row for row in report.rows if row.case in own]
        merged.bars += [bar for bar in report.bars if bar["case"] in own]
    merged.host_time = list({row.case: row for report in reports for row in report.host_time}.values())
    return merged


def shown_rows(report: Report, case: dict[str, Any], verbose: bool) -> list[Row]:
    """Rows of a case, in the order of the providers; with `verbose` also the providers that cannot run here."""
    rows = [row for row in report.rows if row.case == case["name"]]
    return [row for row in rows if verbose or not row.status.startswith("not run")]


def facts(rows: list[Row], case: dict[str, Any]) -> str:
    """The case's time at the speed of light, and the rows on which errors were measured."""
    errors_on = next((row.errors_on for row in rows if row.errors_on not in ("", "all rows")), None)
    said = f"{case['date'][:10]}, commit {case['commit'][:10]}; speed of light {seconds(case['light'])}"
    return said + (f"; errors measured on {errors_on}" if errors_on else "")


def cells(row: Row, case: dict[str, Any]) -> list[str]:
    """The text of a row under COLUMNS."""
    if row.median is None:
        return [row.provider, row.status]
    if case["flops"]:
        rate = f"{case['flops'] / row.median / 1e12:.3g} TFLOP/s"
    else:
        rate = f"{case['bytes'] / row.median / 1e9:.3g} GB/s"
    return [
        row.provider,
        seconds(row.median),
        _spread(row.p20, row.p80),
        str(row.n),
        "" if row.speedup is None else f"{row.speedup:.2f} x",
        rate,
        f"{row.light:.0%}",
        megabytes(row.peak_extra),
        megabytes(row.beyond_results),
        "" if row.error is None else f"{row.error:.1e}",
    ]


def seconds(value: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}" if value / scale < 1000 else f"{value / scale:.0f} {unit}"
    return f"{value * 1e9:.0f} ns"


def megabytes(value: int | None) -> str:
    return "" if value is None else f"{value / 1e6:.{0 if value >= 1e7 else 1}f} MB"


def bar_rows(report: Report) -> list[list[str]]:
    shown = [(bar, "not measured" if bar["value"] is None else f"{bar['value']:.3g}") for bar in report.bars]
    return [[bar["case"], bar["what"], bar["limit"], value, MET[bar["met"]]] for bar, value in shown]


def host_rows(report: Report) -> list[list[str]]:
    found = []
    for row in report.host_time:
        limit = "" if row.limit is None else f"<= {row.limit:.3g}"
        times = [text for times in (row.ours, row.eager) for text in (seconds(times[1]), _spread(times[0], times[2]))]
        found.append([row.case, *times, str(row.n), f"{row.ratio:.2f}", limit, MET[row.met], row.level_from])
    return found


def _spread(p20: float, p80: float) -> str:
    return f"{seconds(p20)} - {seconds(p80)}"


def header(report: Report) -> list[str]:
    env = report.environment
    extension = env["extension"] if isinstance(env["extension"], str) else "built"
    installed = [f"{name} {v}" for name, v in env["peers"].items() if v != "not installed"]
    return [
        f"{env['device']}, {env['threads']} CPU threads, {env['date']}, commit {env['commit']}",
        f"torch {env['torch']}, triton {env['triton']}, Python {env['python']}, extension {extension}",
        f"peers: {', '.join(installed) or 'none installed'}",
        *(["measured roofs: " + "; ".join(report.roofs.lines())] if report.cases else []),
    ]


def print_report(report: Report, console: Console, verbose: bool) -> None:
    for line in header(report):
        console.print(line, highlight=False)
    for case in report.cases:
        shown = shown_rows(report, case, verbose)
        title = f"{case['name']}  ({facts(shown, case)})"
        table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
        kept = [number for number, name in enumerate(COLUMNS) if console.width >= FULL_WIDTH or name not in WIDE_ONLY]
        for number in kept:
            table.add_column(COLUMNS[number], justify="left" if number == 0 else "right", no_wrap=number > 0)
        said = []
        for row in shown:
            if row.median is None:
                said.append(f"  {row.provider}: {row.status}")
            else:
                text = cells(row, case)
                table.add_row(*[text[number] for number in kept])
        console.print(table)
        for line in said:
            console.print(line, highlight=False, markup=False)
    tables = (("Host time", HOST_COLUMNS, host_rows(report)), ("Bars", BAR_COLUMNS, bar_rows(report)))
    for title, columns, lines in tables:
        if lines:
            table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
            for name in columns:
                table.add_column(name)
            for line in lines:
                table.add_row(*line, style="red" if line[-1] == NOT_MET else None)
            console.print(table)


def markdown(report: Report, verbose: bool, plots: list[str]) -> str:
    from benchmarks import overview

    lines = [f"# Benchmarks on {report.environment['device']}", ""]
    lines += [f"- {line}" for line in header(report)] + [""]
    table = overview.markdown(report)
    if table:
        said, _ = overview.unmet(report)
        lines += ["## At a glance", "", f"![One line an op]({OVERVIEW})", "", *table]
        lines += [*overview.NOTES, "", f"{said}: see Bars below.", ""]
    for case in report.cases:
        shown = shown_rows(report, case, verbose)
        lines += [f"## {case['name']}", "", f"({facts(shown, case)})", ""]
        lines += _table(COLUMNS, [cells(row, case) for row in shown])
    if report.host_time:
        lines += ["## Host time", "", HOST_NOTE, "", *_table(HOST_COLUMNS, host_rows(report))]
    if report.bars:
        lines += ["## Bars", "", *_table(BAR_COLUMNS, bar_rows(report))]
    if plots:
        lines += ["## Plots", "", *[f"![{name}]({name})" for name in plots], ""]
    lines += ["## Columns", "", *[f"- {note}" for note in NOTES], ""]
    return "\n".join(lines)


def _table(columns: tuple[str, ...], rows: list[list[str]]) -> list[str]:
    padded = [row + [""] * (len(columns) - len(row)) for row in rows]
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    return [*lines, *["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in padded], ""]


def write(report: Report, directory: Path, verbose: bool = False) -> list[Path]:
    """Writes results.json, results.md and the plots; every file appears whole or not at all."""
    from benchmarks import overview, plots

    directory.mkdir(parents=True, exist_ok=True)
    figures = plots.figures(report)
    written = [write_atomically(directory / name, save) for name, save in figures.items()]
    if overview.lines(report):
        written.append(write_atomically(directory / OVERVIEW, lambda path: overview.figure(report, path)))
    text = markdown(report, verbose, list(figures))
    written.append(write_atomically(directory / "results.md", lambda path: path.write_text(text)))
    data = json.dumps(report.to_json(), indent=1)
    written.append(write_atomically(directory / "results.json", lambda path: path.write_text(data + "\n")))
    return written


def write_atomically(path: Path, save: Callable[[Path], object]) -> Path:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        save(temporary)
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
