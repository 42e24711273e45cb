"""Masked-token prediction end to end: a small BERT learns to fill in the hidden letters of a text.

    python examples/masked_lm.py [--steps 500]

The labels come from the data (`mask_tokens`), the loss never materialises the logits (`linear_cross_entropy`, with the
tied embedding and a bias), and its statistics give the accuracy in the same pass.
"""

from __future__ import annotations

import argparse

import torch
from torch import nn

import sslkernels as sk

TEXT = (
    "the encoder predicts the hidden part of its input from the part that it can see, "
    "and so it makes its labels from the data. "
)
MASK, VOCAB, LENGTH, BATCH = 0, 128, 64, 32


class Encoder(nn.Module):
    def __init__(self, dim: int = 64) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCAB, dim)
        nn.init.normal_(self.tokens.weight, std=0.05)
        self.positions = nn.Parameter(0.02 * torch.randn(LENGTH, dim))
        layer = nn.TransformerEncoderLayer(
            dim, 4, dim_feedforward=4 * dim, dropout=0.0, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, num_layers=2, norm=nn.LayerNorm(dim), enable_nested_tensor=False)
        self.bias = nn.Parameter(torch.zeros(VOCAB))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.layers(self.tokens(ids) + self.positions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    steps = parser.parse_args().steps

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    corpus = torch.tensor([ord(c) for c in TEXT * 8], device=device)
    model = Encoder().to(device)
    masker = sk.nn.TokenMasker(mask_id=MASK, vocab_size=VOCAB, probability=0.15)
    criterion = sk.nn.LinearCrossEntropyLoss(return_stats=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    for step in range(1, steps + 1):
        starts = torch.randint(0, len(corpus) - LENGTH, (BATCH, 1), device=device)
        masked = masker(corpus[starts + torch.arange(LENGTH, device=device)])
        hidden = model(masked.input_ids)
        loss, stats = criterion(hidden, model.tokens.weight, masked.labels, linear_bias=model.bias)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step == 1 or step % 50 == 0:
            chosen = (masked.labels != -100).sum()
            print(f"step {step:4d}  loss {loss.item():.3f}  accuracy {(stats.correct.sum() / chosen).item():.2f}")


if __name__ == "__main__":
    main()
