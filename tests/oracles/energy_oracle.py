"""Test inputs of prediction_energy, and their gradients."""

from __future__ import annotations

import torch

NAMES = ("prediction", "target")


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
