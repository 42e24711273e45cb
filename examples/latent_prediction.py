"""A latent-variable predictive architecture from start to end: predict what x does not tell by means of a latent z.

    python examples/latent_prediction.py [--steps 400]

The target is one of four futures of x, and x does not say which. A predictor without z can only average them. Here an
encoder looks at x and y, proposes a Gaussian z, of which K samples are drawn; the predictor makes a prediction of each;
the energy of the pair is the soft minimum of their squared errors. The divergence of z from a standard normal limits
what z may tell: without it z would carry the target itself, and the predictor would ignore x. Printed are the energy
with the z of the encoder, with z from the prior, and with z = 0, in units of the error that the average of the futures
makes; and how many dimensions of z are in use.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

import sslkernels as sk

WIDTH, LATENT, FUTURES, BATCH, SAMPLES = 16, 8, 4, 256, 8


def layers(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, outputs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    steps = parser.parse_args().steps

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ways = torch.randn(FUTURES, WIDTH, WIDTH, device=device) / WIDTH**0.5
    spread = 0.0  # of the futures of an x about their mean
    for way in ways - ways.mean(0):
        spread += float(way.square().sum()) / FUTURES
    encoder, predictor = layers(2 * WIDTH, 2 * LATENT).to(device), layers(WIDTH + LATENT, WIDTH).to(device)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *predictor.parameters()], lr=2e-3)

    def predict(x: Tensor, z: Tensor) -> Tensor:
        """(B, K, WIDTH) of z (B, K, LATENT)."""
        return predictor(torch.cat([x.unsqueeze(1).expand(-1, z.shape[1], -1), z], -1))

    for step in range(1, steps + 1):
        x = torch.randn(BATCH, WIDTH, device=device)
        which = torch.randint(FUTURES, (BATCH,), device=device)
        y = torch.einsum("bi,bij->bj", x, ways[which])
        mean, logvar = encoder(torch.cat([x, y], -1)).chunk(2, -1)
        (z, kl), stats = sk.gaussian_rsample(
            mean, logvar, SAMPLES, kl="mean", free_bits=0.02, logvar_bounds=(-8.0, 4.0), return_stats=True
        )
        energy = sk.prediction_energy(predict(x, z), y, beta=1.0, mode="soft")
        loss = energy + 0.3 * kl
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step == 1 or step % 50 == 0:
            with torch.no_grad():
                prior = sk.prediction_energy(predict(x, torch.randn_like(z)), y, mode="min")
                zero = sk.prediction_energy(predict(x, torch.zeros_like(z[:, :1])), y)
            print(
                f"step {step:4d}  energy {energy.item() / spread:.2f}  from the prior {prior.item() / spread:.2f}"
                f"  without z {zero.item() / spread:.2f}  kl {kl.item():.1f}  active {int(stats.active_units)}"
            )


if __name__ == "__main__":
    main()
