"""vector_quantize by brute force: every score in float64, and autograd of plain torch."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F


def scores(input, codebook, metric):
    """(N, K) in float64, of the tensors as given."""
    x = input.detach().double().cpu().numpy()[:, None]
    c = codebook.detach().double().cpu().numpy()
    with np.errstate(invalid="ignore", over="ignore"):
        if metric == "l2":
            return -np.square(x - c).sum(-1)
        if metric == "dot":
            return (x * c).sum(-1)
        norm = np.sqrt(np.square(c).sum(-1))
        return (x * c).sum(-1) / np.where(norm == 0, 1, norm)


def indices(input, codebook, metric="l2"):
    """NaN ranks first, then the largest score; ties go to the lowest index."""
    flat = input.detach().reshape(-1, codebook.shape[1])
    best = torch.from_numpy(scores(flat, codebook, metric).argmax(-1))
    return best.reshape(input.shape[:-1]).to(input.device)


def quantized(input, codebook, straight_through=True, codebook_weight=0.0, metric="l2"):
    """(values, commitment) with their documented gradients, in the precision of the arguments."""
    codes = F.embedding(indices(input, codebook, metric), codebook)
    values = input + (codes.to(input.dtype) - input).detach() if straight_through else codes.to(input.dtype)
    to_codes, to_rows = F.mse_loss(codes, input.detach()), F.mse_loss(input, codes.detach())
    return values, to_rows + codebook_weight * (to_codes - to_codes.detach())


def tied(input, codebook, got, metric):
    """Whether the codes `got` score as well as the best, to within the rounding of float64."""
    every = scores(input, codebook, metric)
    best = every.max(-1)
    x, c = input.detach().double().cpu(), codebook.detach().double().cpu()
    scale = {"l2": -best, "dot": (x.norm(dim=1) * c.norm(dim=1).amax()).numpy(), "cosine": x.norm(dim=1).numpy()}
    got = np.take_along_axis(every, got.cpu().numpy()[:, None], -1)[:, 0]
    return bool((got >= best - scale[metric] * 4 * (x.shape[1] + 8) * np.finfo(np.float64).eps / 2).all())
