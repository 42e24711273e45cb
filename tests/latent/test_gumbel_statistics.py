"""Frequencies and tails of the draws of gumbel_softmax and gumbel_quantize.

Seeds are fixed, so that no test fails by chance; for a random seed each has the false-alarm rate that it states.
Codes are drawn by gumbel_quantize from one broadcast row of logits.
"""

from __future__ import annotations

import math

import pytest
import torch
from philox_oracle import chi_square_limit

import sslkernels as sk

pytestmark = pytest.mark.pairwise

OP = "gumbel_quantize"


def drawn(logits: torch.Tensor, rows: int, seed: int, first: int = 0, **options) -> torch.Tensor:
    """Indices of `rows` draws from softmax(logits), logits (V,)."""
    codebook = torch.zeros(logits.shape[0], 1, device=logits.device)
    ids = torch.arange(first, first + rows, device=logits.device)
    with torch.no_grad():
        return sk.gumbel_quantize(logits.expand(rows, -1), codebook, seed=seed, row_ids=ids, **options).indices


def native(device: str) -> str:
    """The compiled backend: the reference takes minutes for this many draws."""
    names = [name for name in sk.available_backends(OP, device) if name not in ("reference", "triton")]
    if not names:
        pytest.skip("the reference takes minutes")
    return names[0]


def chi_square(counts: torch.Tensor, probability: torch.Tensor) -> tuple[float, int]:
    """(statistic, degrees) with the rarest categories pooled, so that at least 5 of each are expected."""
    expected = probability.double() * counts.sum()
    order = expected.argsort(descending=True)
    counts, expected = counts.double()[order], expected[order]
    large = int((expected >= 5).sum())
    counts = torch.cat([counts[:large], counts[large:].sum()[None]])
    expected = torch.cat([expected[:large], expected[large:].sum()[None]])
    if expected[-1] < 5:
        counts = torch.cat([counts[:-2], counts[-2:].sum()[None]])
        expected = torch.cat([expected[:-2], expected[-2:].sum()[None]])
    return float(((counts - expected) ** 2 / expected).sum()), len(counts) - 1


def assert_frequencies(logits: torch.Tensor, rows: int, device: str, block: int = 1 << 14, **options) -> None:
    """False alarms: 1 in 1000."""
    counts = torch.zeros(logits.shape[0], dtype=torch.int64, device=device)
    for first in range(0, rows, block):
        indices = drawn(logits, min(block, rows - first), 11, first, **options)
        counts += torch.bincount(indices, minlength=logits.shape[0])
    statistic, degrees = chi_square(counts.cpu(), logits.double().softmax(-1).cpu())
    assert statistic < chi_square_limit(degrees)


@pytest.mark.parametrize("tau", [0.1, 2.0])
@pytest.mark.parametrize("codes", [2, 17, 320])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frequencies(device, codes, tau, dtype):
    """Codes are drawn with the frequencies of softmax(logits), for any tau."""
    with sk.use_backend(native(device)):
        logits = (2 * torch.randn(codes, generator=torch.Generator().manual_seed(codes))).to(device, dtype)
        assert_frequencies(logits, 1 << 15, device, tau=tau)


@pytest.mark.slow
def test_frequencies_of_many_codes(device):
    with sk.use_backend(native(device)):
        logits = 3 * torch.randn(32768, generator=torch.Generator().manual_seed(0)).to(device)
        assert_frequencies(logits, 1 << 16, device, 1 << 12)


def assert_tail(device: str, behind: float, codes: int, rows: int, seed: int) -> None:
    """One code leads `codes - 1` others by `behind` nats. Noise that ends at 16.6, as -log(-log(u)) of a float32 u
    near 1 does, would draw them too rarely. Six standard deviations of a Poisson count: false
    alarms 1 in 10**8."""
    logits = torch.full((codes,), -behind, device=device)
    logits[codes // 3] = 0
    hits = sum(
        int((drawn(logits, min(512, rows - first), seed, first) != codes // 3).sum()) for first in range(0, rows, 512)
    )
    expected = rows / (1 + math.exp(behind) / (codes - 1))
    assert expected > 25
    assert abs(hits - expected) < 6 * math.sqrt(expected), (hits, expected)


def test_a_tail_of_16_nats(device):
    with sk.use_backend(native(device)):
        assert_tail(device, 16.0, 65536, 5000, 1)


@pytest.mark.slow
def test_a_tail_of_20_nats(device):
    with sk.use_backend(native(device)):
        assert_tail(device, 20.0, 262144, 60000, 1)


# Rows of four columns whose noise, under seed 3, is the largest of 2**30 numbers: row, column, word.
LARGEST = [(150424076, 0, 7), (200528147, 1, 2), (240393444, 3, 6), (265154181, 2, 10)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_end_of_the_tail(backend, device, dtype):
    """A code wins from as far behind as its noise allows, 20 nats and more, but no farther."""
    ids, columns, words = torch.tensor(LARGEST, device=device).unbind(1)
    noise = sk.random_gumbel((4, 4), 3, row_ids=ids, device=device)
    own = noise.gather(1, columns[:, None])[:, 0]
    torch.testing.assert_close(own, -torch.log((words.double() + 0.5) / 2.0**32).float())
    assert own.min() > 19
    others = noise.scatter(1, columns[:, None], -torch.inf).amax(1)
    for ahead, wins in ((0.25, True), (-0.25, False)):
        behind = (own - others - ahead).to(dtype)
        logits = torch.zeros(4, 4, dtype=dtype, device=device).scatter(1, columns[:, None], -behind[:, None])
        indices = sk.gumbel_quantize(logits, torch.zeros(4, 1, device=device), seed=3, row_ids=ids).indices
        assert torch.equal(indices == columns, torch.full((4,), wins, device=device))
        y = sk.gumbel_softmax(logits, hard=True, seed=3, row_ids=ids)
        assert torch.equal(y.argmax(1), indices)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_logit_ahead_of_4095(device, dtype):
    """Noise in bfloat16 makes its probability 1.000 instead of 0.421 (torch.distributions). Five standard
    deviations: false alarms 1 in 10**6."""
    rows = 8000
    with sk.use_backend(native(device)):
        logits = torch.zeros(4096, dtype=dtype, device=device)
        logits[1000] = 8
        rate = float((drawn(logits, rows, 5) == 1000).double().mean())
        y = sk.gumbel_softmax(logits.expand(rows, -1), hard=True, seed=5)
    expected = math.exp(8) / (math.exp(8) + 4095)
    assert abs(rate - expected) < 5 * math.sqrt(expected * (1 - expected) / rows)
    assert float(y[:, 1000].double().mean()) == rate


def test_a_code_without_probability_is_never_drawn(device):
    """-inf in a long row, before and after the finite logits."""
    with sk.use_backend(native(device)):
        logits = torch.full((2000,), -torch.inf, device=device)
        logits[700:900:3] = torch.linspace(-30, 0, 67, device=device)
        indices = drawn(logits, 20000, 1)
    assert (logits[indices] > -torch.inf).all()


def test_groups_and_rows_are_independent(device):
    """The joint counts of two groups, and of neighbouring rows, are the products of their frequencies. False alarms:
    1 in 1000 each."""
    with sk.use_backend(native(device)), torch.no_grad():
        logits = torch.linspace(-1, 1, 6, device=device).repeat(2, 1).expand(40000, 2, 6)
        indices = sk.gumbel_quantize(logits, torch.zeros(2, 6, 1, device=device), seed=2).indices.cpu()
    p = torch.linspace(-1, 1, 6).double().softmax(0)
    joint = (p[:, None] * p).flatten()
    for a, b in ((indices[:, 0], indices[:, 1]), (indices[:-1, 0], indices[1:, 0]), (indices[:-1, 1], indices[1:, 0])):
        statistic, degrees = chi_square(torch.bincount(6 * a + b, minlength=36), joint)
        assert statistic < chi_square_limit(degrees)
