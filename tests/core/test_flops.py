"""FlopCounterMode counts the matmuls of the fused ops."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import sslkernels as sk

N, M, D, V, K, B = 37, 29, 19, 53, 5, 11
SCORE = 2 * N * D  # of each row with one other vector


def _features(rows: int, device: str) -> torch.Tensor:
    return torch.randn(rows, D, device=device, requires_grad=True)


def _linear(mode: str):
    def run(device):
        target = torch.randint(0, V, (N,), device=device)
        return sk.linear_cross_entropy(_features(N, device), _features(V, device), target, mode=mode)

    return run


def _word2vec(device):
    center, context = (torch.randint(0, V, (N,), device=device) for _ in range(2))
    negatives = torch.randint(0, V, (N, K), device=device)
    return sk.negative_sampling_loss(center, context, negatives, _features(V, device), _features(V, device))


def _glove(device):
    index, bias = (torch.randint(0, V, (N,), device=device) for _ in range(2)), torch.randn(V, device=device)
    return sk.glove_loss(*index, torch.ones(N, device=device), _features(V, device), _features(V, device), bias, bias)


def _bank(device):
    positive = torch.randint(0, M, (N,), device=device)
    bank = torch.randn(B, D, device=device)
    return sk.contrastive_energy(_features(N, device), _features(M, device), positive=positive, bank=bank)


def _drawn(device):
    index = torch.randint(0, M, (N, K), device=device)
    options = {"positive": index[:, 0], "negatives": index, "in_batch": False}
    return sk.contrastive_energy(_features(N, device), _features(M, device), **options)


def _distillation(mode):
    def run(device):
        teacher, prototypes = _features(N, device).detach(), _features(V, device)
        return sk.linear_distillation(_features(N, device), prototypes, teacher, prototypes, mode=mode)

    return run


def _paired(device):
    negatives = torch.randn(N, K, D, device=device, requires_grad=True)
    return sk.info_nce(_features(N, device), _features(N, device), negatives, negative_mode="paired")


CALLS = {
    "linear_cross_entropy-fast": (_linear("fast"), 3 * V * SCORE),
    "linear_cross_entropy-compact": (_linear("compact"), 4 * V * SCORE),
    "linear_distillation-fast": (_distillation("fast"), 4 * V * SCORE),
    "linear_distillation-compact": (_distillation("compact"), 6 * V * SCORE),
    "sinkhorn_center": (
        lambda device: sk.sinkhorn_center(_features(N, device), _features(V, device)),
        3 * V * SCORE,
    ),
    "clip_loss": (lambda device: sk.clip_loss(_features(N, device), _features(N, device), 2.0), 3 * N * SCORE),
    "contrastive_energy-bank": (_bank, (3 * M + 2 * B) * SCORE),
    "contrastive_energy-drawn": (_drawn, (3 + 3 * K) * SCORE),
    "nt_xent": (lambda device: sk.nt_xent(_features(N, device), _features(N, device)), 3 * 2 * N * 2 * SCORE),
    "info_nce-paired": (_paired, (3 + 3 * K) * SCORE),
    "vector_quantize": (lambda device: sk.vector_quantize(_features(N, device), _features(V, device))[0], V * SCORE),
    "linear_sample": (
        lambda device: sk.linear_sample(_features(N, device).detach(), _features(V, device).detach()).logprob,
        V * SCORE,
    ),
    "glove_loss": (_glove, 3 * SCORE),
    "negative_sampling_loss": (_word2vec, 3 * (1 + K) * SCORE),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.filterwarnings("ignore:vector_quantize. codebook requires")
def test_matmuls_are_counted(name, device):
    run, flops = CALLS[name]
    with FlopCounterMode(display=False) as counter:
        result = run(device)
        if result.requires_grad:
            result.sum().backward()
    assert counter.get_total_flops() == flops


@pytest.mark.full
@pytest.mark.parametrize("first", ["sslkernels", "torch.utils.flop_counter"])
def test_the_order_of_imports_does_not_matter(first):
    """The counter imports Triton, and so `import sslkernels` does not import the counter."""
    code = f"""
import torch, {first}
import sslkernels as sk
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    sk.clip_loss(torch.randn(4, 2), torch.randn(4, 2), 1.0)
assert counter.get_total_flops() == 2 * 4 * 4 * 2, counter.get_total_flops()
"""
    subprocess.run([sys.executable, "-c", code], check=True)
