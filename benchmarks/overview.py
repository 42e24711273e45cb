"""The whole of a run at a glance: one line an op, and one figure of these lines."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.benchmark import discover
from benchmarks.harness import Row
from benchmarks.providers import OURS
from benchmarks.report import NOT_MET, Report, bar_rows, megabytes, seconds

COLUMNS = ("op", "case", "eager torch", "next best", "sslkernels", "speed-up", "of the floor", "memory", "smallest")
NARROW = ("op", "eager torch", "sslkernels", "speed-up", "of the floor", "memory")
SHORT = {"eager torch": "eager", "sslkernels": "ours", "of the floor": "floor"}
FULL_WIDTH = 150
NOTES = (
    "A line is the case in float32 in which eager torch takes longest, forward and backward where there is one. "
    "next best: the fastest of what else computes the same, such as torch.compile.",
    "of the floor: the time of the bare matmuls, or of the memory traffic, over the time of sslkernels. "
    "memory: peak beyond the results, of eager torch and of sslkernels.",
    "smallest: the speed-up at the smallest size that was measured, below 1 where eager torch is faster.",
)
MOST_UNMET = 12
LEAST_SEEN = 1e5  # bytes in the figure; less cannot be told from nothing in the resident set


class Line(NamedTuple):
    """One op in its largest case. eager, ours, best_other, floor: seconds; memory in bytes. smallest: size and
    speed-up of its smallest case, which may be a host-time case."""

    op: str
    case: str
    eager: float
    ours: float
    floor: float
    best_other: float | None
    eager_memory: int | None
    memory: int | None
    smallest: tuple[str, float] | None

    @property
    def speedup(self) -> float:
        return self.eager / self.ours


def measured(report: Report, case: dict) -> Line | None:
    """The line of a case, None where eager torch or this package was not measured."""
    rows = [row for row in report.rows if row.case == case["name"] and row.median is not None]
    ours = min((r for r in rows if is_ours(r)), key=lambda row: row.median, default=None)
    # The first row is the baseline, whatever its name; a speed-up is over it.
    eager = next((row for row in rows if row.speedup == 1.0), None)
    if ours is None or eager is None:
        return None
    floors = [row.median for row in rows if is_floor(row)]
    others = [
        row.median for row in rows if row is not eager and not is_floor(row) and not row.provider.startswith(OURS)
    ]
    return Line(
        case["op"],
        setting(case["name"]),
        eager.median,
        ours.median,
        min(floors, default=case["light"]),
        min(others, default=None),
        eager.beyond_results,
        ours.beyond_results,
        None,
    )


def setting(name: str) -> str:
    """The part of a case's name that differs between the cases of its op."""
    words = name.partition(" ")[2]
    for usual in (", fwd+bwd", ", float32", ", int64", ", int32"):
        words = words.replace(usual, "")
    return words


@functools.cache
def kernels() -> set[str]:
    """Single kernels, which have no line: they are parts of ops."""
    benchmarks = [each for each in discover() if type(each).__module__.startswith("benchmarks.kernels")]
    return {case.op for each in benchmarks for device in ("cpu", "cuda") for case in each.cases(device)}


def is_ours(row: Row) -> bool:
    return row.provider.startswith(OURS) and "reference" not in row.provider


def is_floor(row: Row) -> bool:
    return "(floor)" in row.provider


def lines(report: Report) -> list[Line]:
    """One for each op, in the order of the report."""
    found: dict[str, list[Line]] = {}
    for case in report.cases:
        line = measured(report, case)
        if line is not None and line.op not in kernels():
            found.setdefault(case["op"], []).append(line)
    small = {row.case.split()[0]: row for row in report.host_time}
    result = []
    for op, of_op in found.items():
        wide = [line for line in of_op if "float16" not in line.case] or of_op
        largest, least = (pick(wide, key=lambda line: line.eager) for pick in (max, min))
        smallest = (least.case, least.speedup) if least is not largest else None
        if op in small:
            smallest = (setting(small[op].case).removesuffix(", fwd"), 1 / small[op].ratio)
        result.append(largest._replace(smallest=smallest))
    return result


def cells(line: Line) -> dict[str, str]:
    memory = ""
    if line.memory is not None and line.eager_memory is not None:
        memory = f"{megabytes(line.eager_memory).removesuffix(' MB')} -> {megabytes(line.memory)}"
    smallest = "" if line.smallest is None else f"{line.smallest[1]:.1f} x at {line.smallest[0]}"
    texts = (
        line.op,
        line.case,
        seconds(line.eager),
        "" if line.best_other is None else seconds(line.best_other),
        seconds(line.ours),
        f"{line.speedup:.1f} x",
        f"{line.floor / line.ours:.0%}",
        memory,
        smallest,
    )
    return dict(zip(COLUMNS, texts, strict=True))


def unmet(report: Report) -> tuple[str, list[list[str]]]:
    """How many limits are met, and the unmet ones."""
    rows = [row for row in bar_rows(report) if row[-1]]
    missed = [row for row in rows if row[-1] == NOT_MET]
    return f"{len(rows) - len(missed)} of {len(rows)} limits are met", missed


def show(report: Report, console: Console) -> None:
    names = COLUMNS if console.width >= FULL_WIDTH else NARROW
    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for name in names:
        words = name in ("case", "smallest")
        head = name if names is COLUMNS else SHORT.get(name, name)
        table.add_column(head, justify="left" if words or name == "op" else "right", no_wrap=not words)
    for line in lines(report):
        text = cells(line)
        table.add_row(*[text[name] for name in names], style="yellow" if line.speedup < 1 else None)
    if table.row_count:
        console.print(table)
        for note in NOTES if names is COLUMNS else NOTES[:2]:
            console.print(note, highlight=False, style="dim")
    said, missed = unmet(report)
    if report.bars:
        console.print(said + ("; not met:" if missed else ""), highlight=False)
        for case, what, limit, value, _ in missed[:MOST_UNMET]:
            console.print(f"  {case}: {what} {value}, limit {limit}", highlight=False, markup=False)
        if len(missed) > MOST_UNMET:
            console.print(f"  and {len(missed) - MOST_UNMET} more in results.md", highlight=False)


def markdown(report: Report, columns: Sequence[str] = COLUMNS) -> list[str]:
    """The lines as a table."""
    rows = [[cells(line)[name] for name in columns] for line in lines(report)]
    if not rows:
        return []
    return [
        "| " + " | ".join(columns) + " |",
        "|" + " --- |" * len(columns),
        *["| " + " | ".join(r) + " |" for r in rows],
        "",
    ]


def figure(report: Report, path: Path) -> None:
    """Speed-up, share of the floor and memory, one row of bars an op."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = lines(report)[::-1]
    size = (13, 1.6 + 0.42 * len(shown))
    shape = {"figsize": size, "sharey": True, "layout": "constrained", "width_ratios": (3, 2, 3)}
    drawn, panels = pyplot.subplots(1, 3, **shape)
    for axes, draw in zip(panels, (_draw_speed, _draw_floor, _draw_memory), strict=True):
        draw(axes, shown)
        axes.grid(axis="x", alpha=0.3)
        axes.set_axisbelow(True)
    panels[0].set_ylim(-0.6, len(shown) - 0.4)
    panels[0].set_yticks(range(len(shown)), [f"{line.op}\n{line.case}" for line in shown], fontsize=8)
    handles = {name: each for axes in panels for each, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    drawn.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize=9)
    env = report.environment
    drawn.suptitle(f"sslkernels on {env['device']}, torch {env['torch']}, {env['date'][:10]}", fontsize=11)
    drawn.savefig(path, dpi=120)
    pyplot.close(drawn)


def _draw_speed(axes: Any, shown: Sequence[Line]) -> None:
    from matplotlib import ticker

    colors = ["C0" if line.speedup >= 1 else "C1" for line in shown]
    axes.barh(range(len(shown)), [line.speedup for line in shown], color=colors)
    others = [(line.eager / line.best_other, place) for place, line in enumerate(shown) if line.best_other is not None]
    if others:
        axes.scatter(*zip(*others, strict=True), marker="D", color="black", label="next best, such as torch.compile")
    ends = [line.speedup for line in shown]
    for other, place in others:
        ends[place] = max(ends[place], other)
    for place, (line, end) in enumerate(zip(shown, ends, strict=True)):
        axes.annotate(f"  {line.speedup:.1f} x", (end, place), va="center", fontsize=9)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.set_xlim(right=2 * max(ends))
    axes.set_title("times faster than eager torch")


def _draw_floor(axes: Any, shown: Sequence[Line]) -> None:
    shares = [100 * line.floor / line.ours for line in shown]
    axes.barh(range(len(shown)), shares, color="C2")
    for place, share in enumerate(shares):
        axes.annotate(f" {share:.0f} %", (share, place), va="center", fontsize=9)
    axes.axvline(100, color="black", linewidth=1)
    axes.set_xlim(0, 1.2 * max(100.0, *shares))
    axes.set_title("share of the floor (%)")


def _draw_memory(axes: Any, shown: Sequence[Line]) -> None:
    from matplotlib import ticker

    for place, line in enumerate(shown):
        if line.memory is None or line.eager_memory is None:
            continue
        ours, eager = (max(LEAST_SEEN, size) / 1e6 for size in (line.memory, line.eager_memory))
        axes.plot([ours, eager], [place, place], color="0.7", linewidth=2, zorder=1)
        axes.scatter(eager, place, color="C3", zorder=2, label="eager torch")
        axes.scatter(ours, place, color="C0", zorder=2, label="sslkernels")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.set_title("peak memory beyond the results (MB)")
