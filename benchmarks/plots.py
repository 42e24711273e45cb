"""Time and peak memory against the vocabulary size, one line a provider."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from benchmarks.report import Report

MIN_POINTS = 3


def figures(report: Report) -> dict[str, Callable[[Path], object]]:
    """File name -> function that saves the figure, for every group of cases that differ only in the vocabulary."""
    groups = defaultdict(list)
    for case in report.cases:
        fixed = tuple((key, size) for key, size in case["shape"].items() if key != "V")
        if len(fixed) < len(case["shape"]):
            groups[case["op"], fixed, case["setting"]].append(case)
    found: dict[str, Callable[[Path], object]] = {}
    for (op, fixed, setting), cases in groups.items():
        if len(cases) < MIN_POINTS:
            continue
        shape = " ".join(f"{key}={size}" for key, size in fixed)
        stem = f"{op} {shape} {setting}".replace("%", "").replace("+", "-")
        stem = "_".join(stem.replace(",", "").replace("=", "").split()).lower()
        title = f"{op}, {shape}, {setting}\n{report.environment['device']}"
        series = _series(report, cases)
        found[f"{stem}_time.png"] = _figure(series, "median", 1e3, "median time (ms)", title)
        found[f"{stem}_memory.png"] = _figure(series, "peak_extra", 1e-6, "peak extra memory (MB)", title)
    return found


def _series(report: Report, cases: list[dict]) -> dict[str, list]:
    """Provider -> (vocabulary, row) for its measured cases, by vocabulary."""
    vocabulary = {case["name"]: case["shape"]["V"] for case in cases}
    series = defaultdict(list)
    for row in report.rows:
        if row.case in vocabulary and row.median is not None:
            series[row.provider].append((vocabulary[row.case], row))
    return {name: sorted(points, key=lambda point: point[0]) for name, points in series.items()}


def _figure(series: dict[str, list], attribute: str, scale: float, label: str, title: str) -> Callable[[Path], object]:
    def save(path: Path) -> None:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot, ticker

        figure, axes = pyplot.subplots(figsize=(11, 5.5), layout="constrained")
        for number, (name, points) in enumerate(series.items()):
            shown = [(v, getattr(row, attribute) * scale) for v, row in points if getattr(row, attribute)]
            if shown:
                floor = "(floor)" in name
                axes.plot(
                    *zip(*shown, strict=True),
                    label=name,
                    color="black" if floor else f"C{number % 10}",
                    linestyle="--" if floor else "-",
                    marker="os^Dv<>P*X"[number % 10],
                    linewidth=2.2 if name.startswith("sslkernels") else 1.4,
                )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        ticks = sorted({v for points in series.values() for v, _ in points})
        axes.set_xticks(ticks, [f"{v:,}" for v in ticks], rotation=30)
        axes.minorticks_off()
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(
            ticker.FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}")
        )
        axes.set_xlabel("vocabulary size")
        axes.set_ylabel(label)
        axes.set_title(title, fontsize=11)
        axes.grid(alpha=0.3)
        figure.legend(fontsize=9, loc="outside right upper")
        figure.savefig(path, dpi=130)
        pyplot.close(figure)

    return save
