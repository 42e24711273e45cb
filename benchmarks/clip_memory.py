"""Peak memory of a CLIP step against the batch size, eager torch beside `clip_loss`: the figure of the front page.

    python -m benchmarks.clip_memory [--largest 65536]

Writes benchmarks/results/clip_memory.json and docs/images/clip_memory.png.
"""

from __future__ import annotations

import argparse
import datetime
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import sslkernels as sk
from benchmarks.memory import peak_extra

ROOT = Path(__file__).parents[1]
DIM, SMALLEST = 64, 1024
EAGER_BYTES = 24  # of an N x N element: scores, two log-softmaxes, and their gradients
BYTES_FOR_EAGER = 8 << 30


def eager(image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """As open_clip computes it."""
    scores = scale * image @ text.t()
    target = torch.arange(len(image), device=image.device)
    return (F.cross_entropy(scores, target) + F.cross_entropy(scores.t(), target)) / 2


def measured(function, count: int, device: torch.device) -> tuple[int, float]:
    """(bytes beyond the gradients, seconds) of a forward and backward."""
    generator = torch.Generator().manual_seed(0)
    image, text = (
        F.normalize(torch.randn(count, DIM, generator=generator), dim=1).to(device).requires_grad_() for _ in range(2)
    )
    scale = torch.tensor(20.0, device=device, requires_grad=True)
    for leaf in (image, text, scale):
        leaf.grad = torch.zeros_like(leaf)
    start = time.perf_counter()
    peak, _ = peak_extra(lambda: function(image, text, scale).backward(), device)
    return peak, time.perf_counter() - start


def plot(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name, color in (("eager torch", "C3"), ("sk.clip_loss", "C0")):
        points = [(row["N"], row["bytes"] / 1e6) for row in rows if row["provider"] == name]
        axes.loglog(*zip(*points, strict=True), marker="o", color=color, label=name)
        for count, size in points[-1:]:
            shown = f"{size:,.0f} MB" if size < 1000 else f"{size / 1000:.1f} GB"
            axes.annotate(shown, (count, size), xytext=(6, 6), textcoords="offset points", color=color)
    axes.set(xlabel="batch size N", ylabel="peak memory beyond the gradients (MB)")
    axes.set_title(f"One step of CLIP's loss, {DIM} features, float32")
    axes.set_xticks([row["N"] for row in rows if row["provider"] == "sk.clip_loss"])
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    axes.set_xlim(right=2.4 * max(row["N"] for row in rows))
    axes.set_ylim(top=3e-6 * max(row["bytes"] for row in rows))
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--largest", type=int, default=65536)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows, count = [], SMALLEST
    for name, function in (("eager torch", eager), ("sk.clip_loss", sk.clip_loss)):
        measured(function, SMALLEST, device)  # warms up
        count = SMALLEST
        while count <= options.largest and (name != "eager torch" or EAGER_BYTES * count**2 < BYTES_FOR_EAGER):
            peak, seconds = measured(function, count, device)
            rows.append({"provider": name, "N": count, "D": DIM, "bytes": peak, "seconds": round(seconds, 3)})
            print(f"{name:14s} N={count:6d}  {peak / 1e6:9.1f} MB  {seconds:7.2f} s", flush=True)
            count *= 2
    result = {
        "date": datetime.date.today().isoformat(),
        "device": device.type,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "rows": rows,
    }
    path = ROOT / "benchmarks/results/clip_memory.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    plot(rows, ROOT / "docs/images/clip_memory.png")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
