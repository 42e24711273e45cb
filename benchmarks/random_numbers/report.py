"""The quality of the random streams over 2^29 draws each: python -m benchmarks.random_numbers.report

Every row is a statistic whose distribution is known for correct numbers, and the probability of a value as extreme. A
row fails below ALPHA: with fresh seeds, a report of about 300 rows raises a false alarm once in three million.
`python -m benchmarks.random_numbers.report --seed N` draws other numbers.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import sslkernels as sk
from benchmarks import resources
from benchmarks.random_numbers import machine_code

ALPHA = 1e-9
COLUMNS = 4096
ROWS = 4096  # per part
BINS = 4096
FOLDER = Path(__file__).parents[1] / "results" / "random_numbers"
TAILS = {
    "normal": (4.0, 4.5, 5.0, 5.5, 6.0, 6.5),
    "gumbel": (10.0, 14.0, 17.0, 19.0),
    "exponential": (10.0, 15.0, 18.0),
}
LAGS = (*range(1, 65), COLUMNS - 1)


def two_sided(z: float) -> float:
    return math.erfc(abs(z) / math.sqrt(2))


def chi_square(statistic: float, degrees: int) -> float:
    value = torch.tensor([degrees / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(value[0], value[1]))


def poisson(count: int, mean: float) -> float:
    """Two-sided: twice the smaller tail."""
    k, m = torch.tensor([count, mean], dtype=torch.float64)
    below = float(torch.special.gammaincc(k + 1, m))
    above = float(torch.special.gammainc(k, m)) if count > 0 else 1.0
    return min(1.0, 2 * min(below, above))


@dataclass
class Result:
    stream: str
    what: str
    expected: str
    found: str
    probability: float


class Law:
    """survival: P(X > t); quantile: its inverse, from a probability; moments: order 1 to 8, about 0."""

    def __init__(
        self, survival: Callable[[float], float], quantile: Callable[[Tensor], Tensor], moments: tuple
    ) -> None:
        self.survival = survival
        self.edges = quantile(torch.arange(1, BINS, dtype=torch.float64) / BINS)
        self.moments = moments


def _factorial(k: int) -> float:
    return float(math.factorial(k))


LAWS = {
    "uniform": Law(lambda t: 1 - t, lambda p: p, tuple(1 / (k + 1) for k in range(1, 9))),
    "exponential": Law(lambda t: math.exp(-t), lambda p: -torch.log1p(-p), tuple(_factorial(k) for k in range(1, 9))),
    "gumbel": Law(lambda t: -math.expm1(-math.exp(-t)), lambda p: -torch.log(-torch.log(p)), ()),
    "normal": Law(
        lambda t: 0.5 * math.erfc(t / math.sqrt(2)),
        torch.special.ndtri,
        tuple(0.0 if k % 2 else _factorial(k) / (2 ** (k // 2) * _factorial(k // 2)) for k in range(1, 9)),
    ),
}


def draw(stream: str, seed: int, part: int, sample: int = 0) -> Tensor:
    rows = torch.arange(part * ROWS, (part + 1) * ROWS)
    return getattr(sk, f"random_{stream}")((ROWS, COLUMNS), seed, row_ids=rows, sample=sample)


def marginals(stream: str, seed: int, parts: int) -> tuple[list[Result], Tensor]:
    """Moments, bins of equal probability, the largest distance of the distribution functions, and tails."""
    law, n = LAWS[stream], parts * ROWS * COLUMNS
    counts = torch.zeros(BINS, dtype=torch.float64)
    powers = torch.zeros(4, dtype=torch.float64)
    tails = dict.fromkeys(TAILS.get(stream, ()), 0)
    edges = law.edges.float()
    largest = 0.0
    for part in track(range(parts), f"{stream}: marginals"):
        values = draw(stream, seed, part).flatten()
        counts += torch.bincount(torch.bucketize(values, edges), minlength=BINS)
        magnitude = values.abs() if stream == "normal" else values
        largest = max(largest, float(magnitude.max()))
        for threshold in tails:
            tails[threshold] += int((magnitude > threshold).sum())
        if law.moments:
            wide = values.double()
            power = torch.ones_like(wide)
            for k in range(4):
                power *= wide
                powers[k] += power.sum()
    results = []
    for k, total in enumerate(powers.tolist(), 1):
        if law.moments:
            mean, variance = law.moments[k - 1], law.moments[2 * k - 1] - law.moments[k - 1] ** 2
            z = (total / n - mean) / math.sqrt(variance / n)
            results.append(
                Result(stream, f"moment {k}", f"{mean:.6g}", f"{total / n:.6g} (z = {z:+.2f})", two_sided(z))
            )
    expected = n / BINS
    statistic = float(((counts - expected) ** 2 / expected).sum())
    results.append(
        Result(stream, f"chi-square, {BINS} bins", f"{BINS - 1}", f"{statistic:.0f}", chi_square(statistic, BINS - 1))
    )
    distance = float((counts.cumsum(0) / n - torch.arange(1, BINS + 1) / BINS).abs().max())
    # Dvoretzky, Kiefer and Wolfowitz, with Massart's constant: the probability is at most this.
    bound = min(1.0, 2 * math.exp(-2 * n * distance**2))
    results.append(Result(stream, "distance of distribution functions", f"< {dkw(n):.2g}", f"{distance:.2g}", bound))
    for threshold, count in tails.items():
        mean = n * law.survival(threshold) * (2 if stream == "normal" else 1)
        what = f"beyond {threshold:g}" if stream != "normal" else f"magnitude beyond {threshold:g}"
        results.append(Result(stream, what, f"{mean:.1f}", f"{count}", poisson(count, mean)))
    name = "largest magnitude" if stream == "normal" else "largest"
    results.append(Result(stream, name, "", f"{largest:.3f}", 1.0))
    return results, counts


def dkw(n: int) -> float:
    """The distance that n draws exceed with probability at most ALPHA."""
    return math.sqrt(math.log(2 / ALPHA) / (2 * n))


def pairs(seed: int, part: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    z = draw("normal", seed, part)
    flat = z.flatten()
    for lag in LAGS:
        yield f"{lag} columns on", flat[:-lag], flat[lag:]
    for lag in (1, 2, 3, 4, 64):
        yield f"{lag} rows on", z[:-lag], z[lag:]
    for sample in (1, 2, 2**32):
        yield f"sample {sample}", z, draw("normal", seed, part, sample)
    for step in (1, 2, 2**32):
        yield f"seed + {step}", z, draw("normal", seed + step, part)
    yield "part of 2^24 on", z, draw("normal", seed, part + 1)


def independence(seed: int, parts: int) -> list[Result]:
    """Correlations of the numbers and of their squares, and for some pairs a table of 64 x 64 cells."""
    found: dict[str, list[float]] = {}
    cells: dict[str, Tensor] = {}
    edges = torch.special.ndtri(torch.arange(1, 64, dtype=torch.float64) / 64).float()
    tables = {"1 columns on", "2 columns on", "4 columns on", "1 rows on", "sample 1", "seed + 1", f"seed + {2**32}"}
    for part in track(range(parts), "normal: independence"):
        for what, a, b in pairs(seed, part):
            a, b = a.flatten(), b.flatten()
            sums = found.setdefault(what, [0.0, 0.0, 0.0])
            product = (a * b).double()
            sums[0] += a.numel()
            sums[1] += float(product.sum())
            sums[2] += float((product**2 - a.double() ** 2 - b.double() ** 2 + 1).sum())
            if what in tables:
                cell = 64 * torch.bucketize(a, edges) + torch.bucketize(b, edges)
                cells[what] = cells.get(what, 0) + torch.bincount(cell, minlength=4096).double()
    results = []
    for what, (n, first, second) in found.items():
        for order, total, deviation in (("", first, 1.0), (" of squares", second, 2.0)):
            z = total / (deviation * math.sqrt(n))
            results.append(Result("normal", f"correlation{order}, {what}", "0", f"z = {z:+.2f}", two_sided(z)))
    for what, counts in cells.items():
        expected = float(counts.sum()) / 4096
        statistic = float(((counts - expected) ** 2 / expected).sum())
        name = f"chi-square of 64 x 64 cells, {what}"
        results.append(Result("normal", name, "4095", f"{statistic:.0f}", chi_square(statistic, 4095)))
    return results


def plot(counts: Tensor, results: list[Result], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    n = float(counts.sum())
    coarse = counts.reshape(256, -1).sum(1) / (n / 256) - 1
    centre = torch.special.ndtri((torch.arange(256, dtype=torch.float64) + 0.5) / 256)
    band = 3 * math.sqrt(256 / n)
    left.fill_between([-3, 3], -band, band, color="0.85", label="3 standard deviations")
    left.plot(centre, coarse, ".", markersize=3, label="found / expected - 1")
    title = f"256 bins of equal probability, 2^{math.log2(n):g} draws"
    left.set(xlabel="normal number", ylabel="relative excess", title=title)
    left.legend()
    tails = [r for r in results if r.stream == "normal" and r.what.startswith("magnitude beyond")]
    thresholds = [float(r.what.split()[-1]) for r in tails]
    right.plot(thresholds, [float(r.expected) for r in tails], "k_", markersize=14, label="expected")
    right.plot(thresholds, [float(r.found) for r in tails], "o", label="found")
    right.set(xlabel="magnitude beyond", ylabel="draws", title="tails of the normal numbers")
    right.set_yscale("symlog", linthresh=1)
    right.legend()
    figure.savefig(path, dpi=110)


def markdown(results: list[Result], seed: int, parts: int) -> str:
    n = parts * ROWS * COLUMNS
    smallest = min(r.probability for r in results)
    drawn, paired = (math.log2(p * ROWS * COLUMNS) for p in (parts, max(parts // 8, 1)))
    lines = [
        "# Quality of the random streams",
        "",
        f"2^{drawn:g} draws of each stream, seed {seed}; 2^{paired:g} of them for independence (`make rng-report`).",
        "The probability is the chance of a value as extreme from correct numbers; a row fails below",
        f"{ALPHA:g}. There are {len(results)} rows, and the smallest probability is {smallest:.2g}. The distance of",
        f"distribution functions detects an error of {dkw(n):.2g} in the probability of any interval from below.",
        "",
        "![](normal.png)",
        "",
        "| stream | statistic | expected | found | probability |",
        "| --- | --- | --- | --- | --- |",
    ]
    lines += [f"| {r.stream} | {r.what} | {r.expected} | {r.found} | {r.probability:.3g} |" for r in results]
    return "\n".join([*lines, *instructions()]) + "\n"


def instructions() -> list[str]:
    """Instructions per normal number on a GPU; nothing if Triton cannot compile for one."""
    if resources.cuobjdump() is None or os.environ.get("TRITON_INTERPRET"):
        return []
    found = ", ".join(f"{count:.1f} on {architecture}" for architecture, count in machine_code.counts().items())
    return ["", f"Instructions a normal number in the Triton kernel, addresses and stores included: {found}."]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parts", type=int, default=32, help="each of 2^24 draws")
    parser.add_argument("--output", type=Path, default=FOLDER)
    arguments = parser.parse_args()
    results, normal_counts = [], torch.zeros(BINS)
    for stream in LAWS:
        found, counts = marginals(stream, arguments.seed, arguments.parts)
        results += found
        if stream == "normal":
            normal_counts = counts
    results += independence(arguments.seed, max(arguments.parts // 8, 1))
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "report.md").write_text(markdown(results, arguments.seed, arguments.parts))
    plot(normal_counts, results, arguments.output / "normal.png")

    failed = [r for r in results if r.probability < ALPHA]
    table = Table("stream", "statistic", "expected", "found", "probability")
    for r in failed or sorted(results, key=lambda r: r.probability)[:10]:
        table.add_row(r.stream, r.what, r.expected, r.found, f"{r.probability:.3g}")
    console = Console()
    console.print("FAILED" if failed else f"all {len(results)} rows hold; the least probable:", table)
    console.print(f"wrote {arguments.output / 'report.md'} and normal.png")
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
