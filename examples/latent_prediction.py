"""Latent variables: the lower half of a digit from its upper half, where several answers are right.

    pip install sslkernels rich matplotlib scikit-learn
    python examples/latent_prediction.py

A predictor without a latent variable answers with the mean of all lower halves that fit: a blur. With z it gives K
answers, and a pair has the energy of the best one, so that they spread over what fits: `prediction_energy`, with
the minimum or the soft minimum over z. z is drawn from a Gaussian (`gaussian_rsample`) or is one of 16 learned codes.

How much may z know? In the second part z is inferred from both halves, and its divergence from a standard normal is
weighted from a lot to almost nothing. At one end z is ignored and the model is a plain predictor; at the other the
upper half is ignored and the model is a generator. The statistics of the same pass show which it is.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn

import sslkernels as sk

HALF, HIDDEN, LATENT, SAMPLES = 32, 256, 8, 16
KL_WEIGHT = 0.02  # of z drawn from the upper half alone
WEIGHTS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # of the divergence, where z is inferred from both halves
KINDS = ("no z", "best of z", "soft minimum", "codes")
console = Console()


class Halves(NamedTuple):
    """Upper and lower halves (N, 32) of digits, in [0, 1]."""

    upper: Tensor
    lower: Tensor

    def rows(self, index: Tensor | slice) -> Halves:
        return Halves(self.upper[index], self.lower[index])


class Point(NamedTuple):
    """Results for one weight of the divergence; errors are squared and summed over the 32 pixels."""

    weight: float
    divergence: float  # nats
    active: int  # of LATENT dimensions
    error: float  # with z inferred from this digit
    error_of_drawn: float  # with z drawn from the prior
    error_without_upper: float  # with z inferred from this digit, and the upper half of another one


def load(seed: int) -> tuple[Halves, Halves]:
    images = torch.tensor(load_digits().images, dtype=torch.float32).flatten(1) / 16
    images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))]
    data = Halves(images[:, :HALF], images[:, HALF:])
    return data.rows(slice(300, None)), data.rows(slice(0, 300))


def mlp(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(inputs, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, outputs)
    )


class Predictor(nn.Module):
    """K lower halves (B, K, 32) for an upper half, and the divergence of z."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.decoder = mlp(HALF + LATENT, HALF)
        self.to_latent = mlp(HALF, 2 * LATENT)
        self.codes = nn.Parameter(torch.randn(SAMPLES, LATENT))

    def forward(self, upper: Tensor) -> tuple[Tensor, Tensor]:
        kl = upper.new_zeros(())
        if self.kind == "no z":
            z = upper.new_zeros(len(upper), 1, LATENT)
        elif self.kind == "codes":
            z = self.codes.expand(len(upper), -1, -1)
        else:
            mean, logvar = self.to_latent(upper).chunk(2, -1)
            z, kl = sk.gaussian_rsample(mean, logvar, SAMPLES, kl="mean", logvar_bounds=(-8.0, 2.0))
        return self.decoder(torch.cat([upper.unsqueeze(1).expand(-1, z.shape[1], -1), z], -1)), kl

    def energy(self, predictions: Tensor, lower: Tensor) -> Tensor:
        if self.kind == "soft minimum":
            return sk.prediction_energy(predictions, lower, mode="soft", beta=4.0)
        return sk.prediction_energy(predictions, lower)


class Inference(nn.Module):
    """A predictor whose z is inferred from both halves."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder, self.to_latent = mlp(HALF + LATENT, HALF), mlp(2 * HALF, 2 * LATENT)

    def forward(self, data: Halves) -> tuple[Tensor, Tensor, sk.LatentStats]:
        mean, logvar = self.to_latent(torch.cat(data, -1)).chunk(2, -1)
        (z, kl), stats = sk.gaussian_rsample(mean, logvar, kl="mean", logvar_bounds=(-8.0, 2.0), return_stats=True)
        return z, kl, stats

    def predict(self, upper: Tensor, z: Tensor) -> Tensor:
        return self.decoder(torch.cat([upper, z], -1))


def squared_error(prediction: Tensor, lower: Tensor) -> Tensor:
    return sk.prediction_energy(prediction.unsqueeze(1), lower)


def minimise(model: nn.Module, loss_of, data: Halves, steps: int, name: str) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in track(range(steps), f"{name:14s}", console=console):
        loss = loss_of(data.rows(torch.randint(len(data.upper), (256,), device=data.upper.device)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def train_predictor(kind: str, data: Halves, steps: int) -> Predictor:
    model = Predictor(kind).to(data.upper.device)

    def loss_of(batch: Halves) -> Tensor:
        predictions, kl = model(batch.upper)
        return model.energy(predictions, batch.lower) + KL_WEIGHT * kl

    minimise(model, loss_of, data, steps, kind)
    return model


def train_inference(weight: float, data: Halves, held_out: Halves, steps: int) -> Point:
    model = Inference().to(data.upper.device)

    def loss_of(batch: Halves) -> Tensor:
        z, kl, _ = model(batch)
        return squared_error(model.predict(batch.upper, z), batch.lower) + weight * kl

    minimise(model, loss_of, data, steps, f"weight {weight:g}")
    with torch.no_grad():
        z, kl, stats = model(held_out)
        errors = [
            squared_error(model.predict(upper, latent), held_out.lower).item()
            for upper, latent in (
                (held_out.upper, z),
                (held_out.upper, torch.randn_like(z)),
                (held_out.upper.roll(1, 0), z),
            )
        ]
    return Point(weight, kl.item(), int(stats.active_units), *errors)


@torch.no_grad()
def plot(models: dict[str, Predictor], sweep: list[Point], held_out: Halves, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=(12, 8), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1.3, 1))
    digits = 6
    shown = held_out.rows(slice(digits))
    columns = [("the digit", shown.lower), ("no z", models["no z"](shown.upper)[0][:, 0])]
    for kind in ("best of z", "codes"):
        predictions, _ = models[kind](shown.upper)
        order = (predictions - shown.lower.unsqueeze(1)).square().sum(2).argsort(1)
        columns.append((f"{kind}: best", predictions[torch.arange(digits), order[:, 0]]))
        columns += [(f"{kind}: other", predictions[torch.arange(digits), order[:, k]]) for k in (5, 10, 15)]
    axes = above.subplots(digits, len(columns))
    for column, (title, lower) in enumerate(columns):
        for row in range(digits):
            image = torch.cat([shown.upper[row], lower[row]]).view(8, 8).cpu()
            axes[row, column].imshow(image, cmap="gray_r", vmin=0, vmax=1)
            axes[row, column].axhline(3.5, color="C3", linewidth=1)
            axes[row, column].set(xticks=[], yticks=[])
        axes[0, column].set_title(title, fontsize=8)
    above.suptitle("The upper half is given, the lower half (below the line) predicted")

    left, right = below.subplots(1, 2)
    weights = [point.weight for point in sweep]
    left.semilogx(weights, [point.divergence for point in sweep], marker="o", label="divergence of z (nats)")
    left.semilogx(weights, [point.active for point in sweep], marker="s", label=f"active dimensions of {LATENT}")
    left.set(xlabel="weight of the divergence", title="How much z knows")
    for name, label in (
        ("error", "z of this digit"),
        ("error_of_drawn", "z from the prior"),
        ("error_without_upper", "z of this digit, the upper half of another"),
    ):
        right.semilogx(weights, [getattr(point, name) for point in sweep], marker="o", label=label)
    right.set(
        xlabel="weight of the divergence", ylabel="squared error", title="Left: the upper half is ignored. Right: z is"
    )
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend(loc="upper center", fontsize=9)
    right.set_ylim(0, 1.5 * max(point.error_without_upper for point in sweep))  # room for the legend
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    console.print(f"plot: {path}")


def main() -> tuple[dict[str, float], list[Point]]:
    """(squared error of the best answer, per kind of z, the points of the sweep), on held-out digits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("build/examples"), help="folder of the plot")
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data, held_out = (Halves(*(values.to(device) for values in part)) for part in load(options.seed))
    models = {kind: train_predictor(kind, data, options.steps) for kind in KINDS}
    table = Table("z", "error of the best", "error of one", "diversity", "answers in use", title="held-out digits")
    best = {}
    for kind, model in models.items():
        with torch.no_grad():
            predictions, _ = model(held_out.upper)
            energy, stats = sk.prediction_energy(predictions, held_out.lower, return_stats=True)
            one = squared_error(predictions[:, 0], held_out.lower)
        best[kind] = energy.item()
        used = f"{stats.perplexity.item():.1f} of {predictions.shape[1]}"
        table.add_row(kind, f"{energy.item():.2f}", f"{one.item():.2f}", f"{stats.diversity.item():.2f}", used)
    console.print(table)

    sweep = [train_inference(weight, data, held_out, options.steps) for weight in WEIGHTS]
    table = Table("weight", "divergence (nats)", "active", "error", "z drawn", "upper half of another")
    for point in sweep:
        errors = (point.error, point.error_of_drawn, point.error_without_upper)
        table.add_row(f"{point.weight:g}", f"{point.divergence:.1f}", str(point.active), *(f"{e:.2f}" for e in errors))
    console.print(table)
    plot(models, sweep, held_out, options.output / "latent_prediction.png")
    return best, sweep


if __name__ == "__main__":
    main()
