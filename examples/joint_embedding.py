"""Joint embedding end to end: two encoders learn which views belong together, and do not collapse.

    python examples/joint_embedding.py [--steps 300]

Both views come from the data: a hidden point, seen through two random projections with noise. The loss is CLIP's with a
learned temperature; the N x N scores are never materialised. In the same pass its statistics measure how often the
matching pair wins (top-1), the distance of pairs (alignment, smaller is better) and of the rest (uniformity, 0 is
collapse).
"""

from __future__ import annotations

import argparse

import torch
from torch import nn

import sslkernels as sk

POINT, VIEW, FEATURES, BATCH = 8, 32, 32, 512


def encoder() -> nn.Module:
    return nn.Sequential(nn.Linear(VIEW, 128), nn.GELU(), nn.Linear(128, FEATURES))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    steps = parser.parse_args().steps

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    projections = torch.randn(2, POINT, VIEW, device=device)
    towers = nn.ModuleList([encoder(), encoder()]).to(device)
    scale = nn.Parameter(torch.tensor(10.0, device=device).log())
    optimizer = torch.optim.AdamW([*towers.parameters(), scale], lr=3e-3)

    for step in range(1, steps + 1):
        points = torch.randn(BATCH, POINT, device=device)
        views = points @ projections + 0.3 * torch.randn(2, BATCH, VIEW, device=device)
        first, second = (tower(view) for tower, view in zip(towers, views, strict=True))
        loss, stats = sk.contrastive_energy(
            first, second, direction="symmetric", logit_scale=scale.exp(), normalize=True, return_stats=True
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            scale.clamp_(max=torch.tensor(100.0).log())
        if step == 1 or step % 50 == 0:
            print(
                f"step {step:4d}  loss {loss.item():.3f}  top-1 {stats.top1.float().mean().item():.2f}"
                f"  alignment {stats.alignment.item():.2f}  uniformity {stats.uniformity.item():.2f}"
            )


if __name__ == "__main__":
    main()
