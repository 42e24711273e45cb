"""Tables and sentences of README.md and docs/ from benchmarks/results."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks import overview
from benchmarks.overview import Line
from benchmarks.report import HOST_NOTE, MET, Report, megabytes, seconds

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
FOLDER = "amd-epyc-2-cores"  # of the machine that the front page speaks of
# The rows of the front page: op, and the words that the name of its case must contain and must not.
FRONT: tuple[tuple[str, str, str], ...] = (
    ("mask_tokens", "", ""),
    ("linear_cross_entropy", "", "ignored"),
    ("linear_cross_entropy", "85% ignored", ""),
    ("linear_distillation", "", ""),
    ("clip_loss", "", ""),
    ("nt_xent", "", ""),
    ("negative_sampling_loss", "", "peaked"),
    ("glove_loss", "", "peaked"),
    ("gaussian_rsample", "", ""),
    ("vector_quantize", "", ""),
    ("prediction_energy", "soft", ""),
)
HEAD = ["| | eager torch | sslkernels | floor |", "|---|---|---|---|"]
FEWER = 1e5  # bytes: less cannot be told from nothing in the resident set


@functools.cache
def report() -> Report:
    return Report.from_json(json.loads((RESULTS / FOLDER / "results.json").read_text()))


def machine() -> str:
    """ "AMD EPYC, 2 cores, torch 2.13.0"."""
    env = report().environment
    return f"{env['device']}, torch {env['torch'].partition('+')[0]}"


def days() -> str:
    """The days on which the cases of the front page were measured."""
    return ", ".join(sorted({case["date"][:10] for _, case in front()}))


def front() -> list[tuple[Line, dict]]:
    """The case of each row of FRONT that was measured last; the one in which eager torch is slowest if several were."""
    found = []
    for op, wanted, unwanted in FRONT:
        cases = [case for case in report().cases if case["op"] == op and case["dtype"] not in ("bfloat16", "float16")]
        cases = [case for case in cases if wanted in case["name"] and not (unwanted and unwanted in case["name"])]
        lines = [(line, case) for case in cases if (line := overview.measured(report(), case)) is not None]
        if lines:
            found.append(max(lines, key=lambda pair: (pair[1]["date"][:10], pair[0].eager)))
    return found


def memory(size: int | None) -> str:
    if size is None:
        return ""
    return ", < 0.1 MB" if size < FEWER else f", {megabytes(size)}"


def row(line: Line) -> str:
    eager = f"{seconds(line.eager)}{memory(line.eager_memory)}"
    ours = f"{seconds(line.ours)}{memory(line.memory)}"
    return f"| `{line.op}` {line.case.replace(', fwd', ', forward')} | {eager} | {ours} | {seconds(line.floor)} |"


def front_table() -> str:
    return "\n".join([*HEAD, *(row(line) for line, _ in front())])


def performance_page() -> str:
    """docs/performance/cpu.md."""
    said, missed = overview.unmet(report())
    text = [
        "# Measured on a CPU",
        "",
        f"{machine()}. Written by `python -m scripts.pages` from `benchmarks/results/{FOLDER}/results.json`, which "
        "`make bench ARGS=--publish` records; its `results.md` beside it has every provider, spread, error and peer.",
        "Forward and backward, where there is one; memory is the peak beyond the results; the floor is the matmuls "
        "alone, or the memory traffic at the bandwidth of a copy.",
        "",
        "## At a glance",
        "",
        "![Speed-up, share of the floor and memory, a row an op](../images/overview.png)",
        "",
        *overview.NOTES,
        "",
        "## Every case",
        "",
        "| case | eager torch | next best | sslkernels | speed-up | floor | measured |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in report().cases:
        line = overview.measured(report(), case)
        if line is not None and line.op not in overview.kernels():
            other = "" if line.best_other is None else seconds(line.best_other)
            eager = f"{seconds(line.eager)}{memory(line.eager_memory)}"
            ours = f"{seconds(line.ours)}{memory(line.memory)}"
            name = f"`{line.op}` {line.case}"
            numbers = f"{eager} | {other} | {ours} | {line.speedup:.1f} x | {seconds(line.floor)} | {case['date'][:10]}"
            text.append(f"| {name} | {numbers} |")
    text += ["", "The next best is the fastest of what else computes the same, such as torch.compile.", ""]
    if report().host_time:
        text += [
            "## Small calls",
            "",
            f"{HOST_NOTE}",
            "",
            "| case | ratio | limit | | level from |",
            "|---|---|---|---|---|",
        ]
        for each in report().host_time:
            limit = "" if each.limit is None else f"{each.limit:.3g}"
            text.append(f"| `{each.case}` | {each.ratio:.2f} | {limit} | {MET[each.met]} | {each.level_from} |")
        text.append("")
    text += ["## Limits", "", f"{said}." + (" Not met:" if missed else ""), ""]
    text += [f"- {case}: {what} {value}, limit {limit}" for case, what, limit, value, _ in missed]
    text += ["", *REMARKS]
    return "\n".join(text).rstrip() + "\n"


def figure(path: Path) -> None:
    overview.figure(report(), path)


REMARKS: Sequence[str] = (
    "Where a result is much larger than the caches, fresh memory dominates: the host of a virtual machine reclaims "
    "free memory, and the first touch of a new result then costs more than computing it.",
    "",
    "No GPU has been measured yet.",
)


def sentence() -> str:
    """The line above the table of the front page."""
    return f"{machine()}, {days()} (`make bench`; [every case](docs/performance/cpu.md))."
