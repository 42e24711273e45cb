"""Joint embedding: two views of a digit shall have one representation, and no label says which digit it is.

    pip install sslkernels rich matplotlib scikit-learn
    python examples/joint_embedding.py                         # collapse, SimCLR and DINO side by side
    python examples/joint_embedding.py --losses siglip queue

Attraction alone has a trivial solution: all representations equal. Negatives, or prototypes that must all be used,
prevent it. The data are scikit-learn's 1,797 digits of 8 x 8 pixels; a view is shifted, turned, scaled and noisy. The
statistics show a collapse: `alignment`, the mean squared distance of pairs, and `uniformity`, 0 where all are equal.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn

import sslkernels as sk

LOSSES = ("attraction", "simclr", "siglip", "queue", "dino")
FEATURES, PROTOTYPES, QUEUE = 64, 1024, 4096
HELD_OUT, NEIGHBOURS = 360, 5
console = Console()


class Digits(NamedTuple):
    images: Tensor  # (N, 1, 8, 8) in [0, 1]
    labels: Tensor  # for the evaluation alone


class Statistics(NamedTuple):
    """energy: minus the mean cosine, of pairs and of all other pairs of a batch."""

    step: int
    pairs: float
    others: float
    alignment: float
    uniformity: float


def load() -> tuple[Digits, Digits]:
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    held_out, rest = order[:HELD_OUT], order[HELD_OUT:]
    return Digits(images[rest], labels[rest]), Digits(images[held_out], labels[held_out])


def view(images: Tensor) -> Tensor:
    """Each image turned by up to 20 degrees, scaled by up to 15 %, shifted by up to a pixel, with noise."""
    count, device = len(images), images.device

    def uniform(most: float, *shape: int) -> Tensor:
        return (2 * torch.rand(count, *shape, device=device) - 1) * most

    angle, scale, shift = uniform(0.35), 1 + uniform(0.15), uniform(0.25, 2)
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(-1, 2, 2)
    transform = torch.cat([turn / scale[:, None, None], shift.unsqueeze(2)], 2)
    grid = nn.functional.affine_grid(transform, list(images.shape), align_corners=False)
    moved = nn.functional.grid_sample(images, grid, align_corners=False)
    return (moved * (1 + uniform(0.3, 1, 1, 1)) + 0.1 * torch.randn_like(moved)).clamp(0, 1)


class Encoder(nn.Module):
    """backbone: the representation, which is evaluated; projector: the features that the loss compares."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1, stride=2), nn.BatchNorm2d(64), nn.ReLU(),
            nn.Conv2d(64, 128, 3, padding=1, stride=2), nn.BatchNorm2d(128), nn.ReLU(), nn.Flatten(),
        )  # fmt: skip
        self.projector = nn.Sequential(nn.Linear(512, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, FEATURES))

    def forward(self, images: Tensor) -> Tensor:
        return self.projector(self.backbone(images))


class Method(nn.Module):
    """An encoder with one of the losses."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.encoder = Encoder()
        if name in ("queue", "dino"):  # a slow copy of the encoder gives the keys, or the teacher
            self.teacher = copy.deepcopy(self.encoder).requires_grad_(False)
        if name == "queue":
            self.register_buffer("bank", nn.functional.normalize(torch.randn(QUEUE, FEATURES), dim=1))
        if name == "siglip":
            self.loss = sk.nn.SigLipLoss(normalize=True)
        if name == "dino":
            self.prototypes = nn.Parameter(torch.randn(PROTOTYPES, FEATURES))
            self.register_buffer("teacher_prototypes", self.prototypes.detach().clone())
            self.loss = sk.nn.PrototypeLoss.dino(PROTOTYPES, teacher_temperature=0.05, student_temperature=0.1)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        if self.name == "dino":
            views = torch.cat([first, second])
            student = unit(self.encoder(views)).chunk(2)
            with torch.no_grad():
                teacher = unit(self.teacher(views)).chunk(2)
            return self.loss(student, unit(self.prototypes), teacher, unit(self.teacher_prototypes))
        query = self.encoder(first)
        if self.name == "queue":
            with torch.no_grad():
                key = unit(self.teacher(second))
            loss = sk.contrastive_energy(query, key, bank=self.bank, in_batch=False, logit_scale=10.0, normalize=True)
            self.bank.copy_(torch.cat([key, self.bank])[:QUEUE])  # the loss has read it
            return loss
        key = self.encoder(second)
        if self.name == "simclr":
            return sk.nt_xent(query, key, temperature=0.2)
        if self.name == "siglip":
            return self.loss(query, key)
        return (unit(query) - unit(key)).square().sum(1).mean()

    @torch.no_grad()
    def follow(self, momentum: float) -> None:
        """Moves the slow copies after a step of the optimiser."""
        if not hasattr(self, "teacher"):
            return
        pairs = list(zip(self.teacher.parameters(), self.encoder.parameters(), strict=True))
        pairs += list(zip(self.teacher.buffers(), self.encoder.buffers(), strict=True))
        if self.name == "dino":
            pairs.append((self.teacher_prototypes, self.prototypes))
        for slow, fast in pairs:
            slow.lerp_(fast, 1 - momentum) if slow.is_floating_point() else slow.copy_(fast)


def unit(values: Tensor) -> Tensor:
    return nn.functional.normalize(values, dim=-1)


@torch.no_grad()
def statistics(method: Method, images: Tensor, step: int) -> Statistics:
    method.eval()
    first, second = unit(method.encoder(view(images))), unit(method.encoder(view(images)))
    _, stats = sk.contrastive_energy(first, second, normalize=True, return_stats=True)
    energies = -(first @ second.t())  # a small batch, for the plot
    pairs, count = energies.diagonal(), len(images)
    others = (energies.sum() - pairs.sum()) / (count * (count - 1))
    method.train()
    return Statistics(step, pairs.mean().item(), others.item(), stats.alignment.item(), stats.uniformity.item())


@torch.no_grad()
def neighbour_accuracy(method: Method, known: Digits, held_out: Digits) -> float:
    """Share of held-out digits whose nearest neighbours have their label, by cosine of the representation."""
    method.eval()
    known_features, features = (unit(method.encoder.backbone(part.images)) for part in (known, held_out))
    nearest = (features @ known_features.t()).topk(NEIGHBOURS, dim=1).indices
    method.train()
    return (known.labels[nearest].mode(1).values == held_out.labels).float().mean().item()


def train(name: str, images: Tensor, steps: int, batch: int) -> tuple[Method, list[Statistics]]:
    method = Method(name).to(images.device)
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=2e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    history = [statistics(method, images[:512], 0)]
    for step in track(range(1, steps + 1), f"{name:10s}", console=console):
        part = images[torch.randperm(len(images), device=images.device)[:batch]]
        loss = method(view(part), view(part))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        method.follow(0.98)
        if step % 25 == 0 or step == steps:
            history.append(statistics(method, images[:512], step))
    return method, history


@torch.no_grad()
def plot(trained: dict[str, tuple[Method, list[Statistics]]], held_out: Digits, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        2, len(trained), figsize=(3.6 * len(trained), 6.4), layout="constrained", squeeze=False
    )
    for (name, (method, history)), (top, bottom) in zip(trained.items(), axes.T, strict=True):
        steps = [entry.step for entry in history]
        top.plot(steps, [entry.others for entry in history], label="other pairs", color="C1")
        top.plot(steps, [entry.pairs for entry in history], label="views of one digit", color="C0")
        top.set(title="attraction alone" if name == "attraction" else name, xlabel="step", ylim=(-1.05, 0.4))
        method.eval()
        features = unit(method.encoder(held_out.images))
        centred = features - features.mean(0)
        _, _, directions = torch.linalg.svd(centred, full_matrices=False)
        points = (features @ directions[:2].t()).cpu()
        labels = held_out.labels.cpu()
        bottom.scatter(*points.t(), c=labels, cmap="tab10", s=8)
        if points.std(0).max() > 0.05:  # else the names of the digits would lie on each other
            for digit in range(10):
                bottom.annotate(
                    str(digit), points[labels == digit].median(0).values.tolist(), weight="bold", fontsize=13
                )
        bottom.set(xlim=(-1.1, 1.1), ylim=(-1.1, 1.1), aspect="equal", xticks=[], yticks=[])
    axes[0, 0].set_ylabel("energy = - cosine")
    axes[0, 0].legend()
    axes[1, 0].set_ylabel("features of held-out digits,\ntwo main directions")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    console.print(f"plot: {path}")


def main() -> dict[str, tuple[float, Statistics]]:
    """Per loss the accuracy of nearest neighbours and the last statistics."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=["attraction", "simclr", "dino"])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("build/examples"), help="folder of the plot")
    options = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    known, held_out = (Digits(*(values.to(device) for values in part)) for part in load())
    trained, results = {}, {}
    table = Table("loss", "energy of pairs", "of others", "alignment", "uniformity", "accuracy of 5 neighbours")
    for name in options.losses:
        torch.manual_seed(options.seed)
        trained[name] = method, history = train(name, known.images, options.steps, options.batch)
        accuracy, last = neighbour_accuracy(method, known, held_out), history[-1]
        results[name] = (accuracy, last)
        numbers = (last.pairs, last.others, last.alignment, last.uniformity)
        table.add_row(name, *(f"{value:.2f}" for value in numbers), f"{accuracy:.1%}")
    console.print(table)
    plot(trained, held_out, options.output / "joint_embedding.png")
    return results


if __name__ == "__main__":
    main()
