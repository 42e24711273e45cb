"""Energies as formulas in plain torch, differentiable in any dtype; inputs of the tests, and their gradients."""

from __future__ import annotations

import math

import torch
from torch import Tensor

NAMES = ("prediction", "target")


def free_energy(energy: Tensor, *, beta: float = 1.0, dim: int = -1, mode: str = "soft") -> Tensor:
    if mode == "min":
        return energy.min(dim).values
    return (math.log(energy.shape[dim]) - torch.logsumexp(-beta * energy, dim)) / beta


def prediction_energy(
    prediction: Tensor, target: Tensor, *, beta: float = 1.0, mode: str = "min", reduction: str = "mean"
) -> Tensor:
    """Predictions (B, K, ...), targets (B, ...)."""
    energies = (prediction - target.unsqueeze(1)).square()
    if energies.dim() > 2:
        energies = energies.flatten(2).sum(-1)
    rows = free_energy(energies, beta=beta, dim=1, mode=mode)
    return rows if reduction == "none" else rows.sum() if reduction == "sum" else rows.mean()


def problem(device, *, batch=5, count=4, features=(7,), dtype=torch.float64, requires_grad=NAMES):
    g = torch.Generator().manual_seed(1)
    shapes = {"prediction": (batch, count, *features), "target": (batch, *features)}
    inputs = {n: torch.randn(s, generator=g, dtype=torch.float64).to(device, dtype) for n, s in shapes.items()}
    for name in requires_grad:
        inputs[name].requires_grad_()
    return inputs


def exact(inputs):
    return {name: tensor.detach().double().requires_grad_() for name, tensor in inputs.items()}


def gradients(loss, inputs, **options):
    return torch.autograd.grad(loss, list(inputs.values()), **options)
