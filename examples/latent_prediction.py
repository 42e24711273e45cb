"""A predictor with a latent variable: one input, several equally valid futures.

    python examples/latent_prediction.py [--steps 400]

The data: a point is rotated by one of four angles, and the input does not tell which. A predictor without a latent
variable predicts the mean of the futures, which is none of them. Here z is drawn K times from a Gaussian given the
input, and the energy of a pair is the error of the best prediction, so that the K predictions spread over the futures.
The information in z is limited: it never sees the future, the minimum over K selects at most log K nats, and its
divergence from a standard normal is penalised. Neither the noise nor the K differences are saved for backward.

Prints the energy with the best of K z and with a single z (predicting the mean of the futures gives 1), the fraction of
the futures that some prediction comes close to, and the divergence of z in nats.
"""

from __future__ import annotations

import argparse
import math

import torch
from torch import Tensor, nn

import sslkernels as sk

FUTURES, POINT, HIDDEN, LATENT, SAMPLES, BATCH = 4, 2, 64, 4, 16, 256
KL_WEIGHT = 0.02


class Predictor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(POINT, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, HIDDEN), nn.GELU())
        self.to_latent = nn.Linear(HIDDEN, 2 * LATENT)
        self.latent = sk.nn.GaussianLatent(SAMPLES, kl="mean", logvar_bounds=(-8.0, 2.0))
        self.decoder = nn.Sequential(
            nn.Linear(HIDDEN + LATENT, HIDDEN),
            nn.GELU(),
            nn.Linear(HIDDEN, HIDDEN),
            nn.GELU(),
            nn.Linear(HIDDEN, POINT),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Predictions (B, K, POINT) and the divergence of z."""
        hidden = self.encoder(x)
        z, kl = self.latent(*self.to_latent(hidden).chunk(2, -1))
        return self.decoder(torch.cat([hidden.unsqueeze(1).expand(-1, SAMPLES, -1), z], -1)), kl


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    steps = parser.parse_args().steps

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    angles = torch.arange(FUTURES, device=device) * (2 * math.pi / FUTURES)
    turns = torch.stack([angles.cos(), -angles.sin(), angles.sin(), angles.cos()], 1).view(FUTURES, 2, 2)
    model = Predictor().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    for step in range(1, steps + 1):
        x = torch.nn.functional.normalize(torch.randn(BATCH, POINT, device=device), dim=-1)
        futures = torch.einsum("fij,bj->bfi", turns, x)
        y = futures[torch.arange(BATCH, device=device), torch.randint(FUTURES, (BATCH,), device=device)]
        y = y + 0.05 * torch.randn_like(y)

        predictions, kl = model(x)
        energy = sk.prediction_energy(predictions, y)
        optimizer.zero_grad()
        (energy + KL_WEIGHT * kl).backward()
        optimizer.step()
        if step == 1 or step % 100 == 0:
            with torch.no_grad():
                one = sk.prediction_energy(predictions[:, :1], y)
                near = (predictions.unsqueeze(1) - futures.unsqueeze(2)).norm(dim=-1).amin(2) < 0.25
            print(
                f"step {step:4d}  energy {energy.item():.3f}, with one z {one.item():.3f}"
                f"  futures reached {near.float().mean().item():.2f}  KL {kl.item():.2f}"
            )


if __name__ == "__main__":
    main()
