"""Transforms of random words: equal bits on every backend, accuracy, and distribution.

Seeds are fixed, so that a failure is a change of the code. If a limit is statistical, its comment or name says how
often it would fail for a random seed.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
from philox_oracle import chi_square_limit
from torch import Tensor

import sslkernels as sk
from sslkernels.core import native
from sslkernels.random import transforms
from sslkernels.random.philox import random_words

pytestmark = pytest.mark.pairwise

OP = "random_normal"
STREAMS = ("uniform", "exponential", "gumbel", "normal")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ONES = 2**32 - 1
# The ends, powers of two, and the words around which the logarithm switches to the complement.
SPECIAL = sorted(
    {w for k in range(33) for w in (2**k - 1, 2**k, 2**k + 1, ONES - 2**k) if 0 <= w <= ONES}
    | {transforms.HALF_ROOT + d for d in (-129, -128, -1, 0, 1, 128)}
    | {ONES - transforms.HALF_ROOT + d for d in (-1, 0, 1)}
)


def stream(name: str, shape, seed, **options) -> Tensor:
    return getattr(sk, f"random_{name}")(shape, seed, **options)


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (7,), (3, 2, 5), (130, 2), (1, 1301), (9, 64), (0, 4), (3, 0), (0,)])
def test_bits_equal_the_definition(backend, device, name, dtype, shape):
    got = stream(name, shape, -(2**40), sample=2**35 + 2, dtype=dtype, device=device)
    assert got.dtype == dtype
    assert got.shape == shape
    with sk.use_backend("reference"):
        expected = stream(name, shape, -(2**40), sample=2**35 + 2, dtype=dtype, device=device)
        wide = stream(name, shape, -(2**40), sample=2**35 + 2, device=device)
    assert torch.equal(got, expected)
    assert torch.equal(got, wide.to(dtype))


@pytest.mark.parametrize("name", STREAMS)
def test_a_row_depends_only_on_its_id(backend, device, name):
    """In any batch, order or split, and with 64-bit row ids."""
    ids = torch.tensor([3, 0, 2**33 + 1, -5, 2**63 - 1, 17], device=device)
    whole = stream(name, (6, 13), 5, row_ids=ids, sample=1)
    order = torch.tensor([4, 1, 0, 5], device=device)
    assert torch.equal(stream(name, (4, 13), 5, row_ids=ids[order], sample=1), whole[order])
    assert torch.equal(stream(name, (2, 3, 13), 5, row_ids=ids.reshape(2, 3), sample=1), whole.reshape(2, 3, 13))
    numbered = stream(name, (20, 13), 5, device=device)
    parts = [stream(name, (5, 13), 5, row_ids=torch.arange(5 * r, 5 * r + 5, device=device)) for r in range(4)]
    assert torch.equal(torch.cat(parts), numbered)
    assert not torch.equal(numbered, stream(name, (20, 13), 5, sample=1, device=device))
    assert not torch.equal(numbered, stream(name, (20, 13), 6, device=device))


def test_the_address_does_not_wrap(backend, device):
    """Group numbers beyond 2^32, like in a tensor of more than 2^34 elements."""
    columns = 4096
    row = 2**32 * 4 // columns
    far = torch.tensor([row + 3], device=device)
    words = random_words(torch.tensor(9, device=device), far, 1, columns, 0)
    assert torch.equal(sk.random_normal((1, columns), 9, row_ids=far), transforms.normal(words))
    assert not torch.equal(
        sk.random_normal((1, columns), 9, row_ids=far), sk.random_normal((1, columns), 9, row_ids=far - row)
    )


def _negative_log(word: Tensor) -> Tensor:
    """-ln((word + 1/2) / 2^32) in float64, accurate towards both ends."""
    w = word.double()
    return torch.where(w < 2.0**31, -((w + 0.5) / 2**32).log(), -torch.log1p(-(ONES - w + 0.5) / 2**32))


@pytest.mark.full
def test_accuracy():
    """The largest errors that `benchmarks.random_numbers.derive` finds over all words, checked on a sample."""
    g = torch.Generator().manual_seed(1)
    words = torch.cat([torch.tensor(SPECIAL), torch.randint(0, 2**32, (200_000,), generator=g)])
    other = torch.cat([torch.tensor(SPECIAL[::-1]), torch.randint(0, 2**32, (200_000,), generator=g)])
    length = _negative_log(words)
    assert ((transforms.negative_log(words).double() / length - 1).abs() <= 2.1e-7).all()
    exponential = _negative_log(ONES - words)
    assert ((transforms.exponential(words).double() / exponential - 1).abs() <= 2.1e-7).all()
    assert ((transforms.gumbel(words).double() + exponential.log()).abs() <= 1.1e-6).all()
    x, y = (v.double() for v in transforms.normal_pair(words, other))
    radius, angle = (2 * length).sqrt(), 2 * math.pi * ((other.double() + 0.5) / 2**32)
    assert ((x - radius * angle.cos()).abs() <= 1e-6).all()
    assert ((y - radius * angle.sin()).abs() <= 1e-6).all()
    unit = transforms.uniform(words)
    assert ((unit.double() / ((words.double() + 0.5) / 2**32) - 1).abs() <= 2**-23).all()
    assert (unit > 0).all()


def test_ranges():
    ends = torch.tensor([0, ONES])
    assert transforms.exponential(ends).tolist() == [2.0**-33, pytest.approx(33 * math.log(2), abs=2e-6)]
    assert transforms.gumbel(ends).tolist() == pytest.approx([33 * math.log(2), -math.log(33 * math.log(2))], abs=2e-6)
    assert float(transforms.normal_pair(torch.tensor(0), torch.tensor(0))[0]) == pytest.approx(6.7637, abs=1e-4)


def test_fma_rounds_once():
    """Against exact rational arithmetic, also for sums that float64 would round twice."""
    from fractions import Fraction

    g = torch.Generator().manual_seed(3)
    a, b, c = (torch.randn(300, generator=g) * 2.0 ** torch.randint(-30, 30, (300,), generator=g) for _ in range(3))
    a[:3], b[:3] = 1 + 2.0**-12, 1 + 2.0**-12  # exact product 1 + 2^-11 + 2^-24: half an ulp above a float32
    c[:3] = torch.tensor([2.0**-60, -(2.0**-60), 0.0])
    for x, y, z, got in zip(a.tolist(), b.tolist(), c.tolist(), transforms.fma(a, b, c).tolist(), strict=True):
        exact = Fraction(x) * Fraction(y) + Fraction(z)
        near = torch.tensor(got)
        for neighbour in (
            torch.nextafter(near, torch.tensor(math.inf)),
            torch.nextafter(near, torch.tensor(-math.inf)),
        ):
            assert abs(Fraction(got) - exact) <= abs(Fraction(float(neighbour)) - exact)
    assert transforms.fma(a[:3], b[:3], c[:3]).tolist() == [1 + 2.0**-11 + 2.0**-23, 1 + 2.0**-11, 1 + 2.0**-11]


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="of Triton's interpreter")
@pytest.mark.parametrize("scale", [1.0, -1.0, 2.0**-4, -(2.0**-4), 2.0**4])
def test_fma_of_the_interpreter_rounds_once(scale):
    import numpy as np

    triton = pytest.importorskip("triton")
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    import sslkernels.random.triton.transforms  # noqa: F401  (repairs the interpreter)

    # The exact product is half an ulp above a float32, and float64 loses the addend.
    factors = (
        np.full(3, 1 + 2.0**-12),
        np.full(3, scale * (1 + 2.0**-12)),
        scale * np.array([2.0**-60, -(2.0**-60), 0]),
    )
    handles = (TensorHandle(values.astype(np.float32), triton.language.float32) for values in factors)
    rounded = InterpreterBuilder().create_fma(*handles).data / scale
    assert rounded.tolist() == [1 + 2.0**-11 + 2.0**-23, 1 + 2.0**-11, 1 + 2.0**-11]


NORMAL_QUARTER_BINS = 256


def _counts(values: Tensor, edges: Tensor) -> Tensor:
    return torch.bincount(torch.bucketize(values.double().flatten(), edges), minlength=len(edges) + 1).double()


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1])
def test_normals_have_the_moments_and_histogram_of_the_normal_distribution(device, seed):
    """2^20 draws; a random seed would fail a z-score limit once in 1.7 million, the chi-square limit once in 1000."""
    z = sk.random_normal((1024, 1024), seed, device=device).double()
    n = z.numel()
    for value, mean, variance in (
        (z.mean(), 0, 1), ((z**2).mean(), 1, 2), ((z**3).mean(), 0, 15), ((z**4).mean(), 3, 96),
    ):  # fmt: skip
        assert abs(float(value) - mean) < 5 * math.sqrt(variance / n)
    bins = NORMAL_QUARTER_BINS
    edges = torch.special.ndtri(torch.arange(1, bins, dtype=torch.float64, device=device) / bins)
    counts = _counts(z, edges)
    assert float(((counts - n / bins) ** 2 / (n / bins)).sum()) < chi_square_limit(bins - 1)


@pytest.mark.parametrize("name", STREAMS)
def test_streams_have_their_distribution(device, name):
    """256 bins of equal probability, 2^20 draws; a random seed would fail once in 1000."""
    values = stream(name, (2048, 512), 77, device=device).double()
    p = {
        "uniform": lambda v: v,
        "exponential": lambda v: -torch.expm1(-v),
        "gumbel": lambda v: torch.exp(-torch.exp(-v)),
        "normal": torch.special.ndtr,
    }[name](values)
    counts = torch.bincount((p * 256).long().clamp_max(255).flatten(), minlength=256).double()
    expected = values.numel() / 256
    assert float(((counts - expected) ** 2 / expected).sum()) < chi_square_limit(255)


def test_neighbours_are_independent(device):
    """Correlations of values and squares between neighbouring columns, rows, samples and seeds: |z| > 5 once in 1.7
    million. The 64 x 64 contingency table of a pair: a random seed would fail once in 1000."""
    z = sk.random_normal((512, 512), 3, device=device).double()
    others = {
        "the other of a pair": (z[:, 0::2], z[:, 1::2]),
        "column": (z[:, :-1], z[:, 1:]),
        "group": (z[:, :-4], z[:, 4:]),
        "row": (z[:-1], z[1:]),
        "sample": (z, sk.random_normal((512, 512), 3, sample=1, device=device).double()),
        "seed": (z, sk.random_normal((512, 512), 4, device=device).double()),
        "high half of the seed": (z, sk.random_normal((512, 512), 3 + 2**32, device=device).double()),
    }
    for what, (a, b) in others.items():
        n = a.numel()
        assert abs(float((a * b).mean())) < 5 / math.sqrt(n), what
        assert abs(float(((a**2 - 1) * (b**2 - 1)).mean())) < 5 * 2 / math.sqrt(n), what
        cells = [(torch.special.ndtr(v) * 64).long().clamp_max(63) for v in (a, b)]
        counts = torch.bincount((64 * cells[0] + cells[1]).flatten(), minlength=4096).double()
        assert float(((counts - n / 4096) ** 2 / (n / 4096)).sum()) < chi_square_limit(4095), what


def test_no_group_of_words_occurs_twice(device):
    """128-bit groups of neighbouring seeds, rows and samples: a repetition would mean that streams overlap."""
    words = [
        sk.random_bits((64, 256), seed, sample=sample, device=device).reshape(-1, 4)
        for seed in (0, 1, 2, 2**32, 2**32 + 1, -1)
        for sample in (0, 1, 2)
    ]
    every = torch.cat(words).long()
    joined = torch.stack([every[:, 0] << 32 | every[:, 1] & ONES, every[:, 2] << 32 | every[:, 3] & ONES], 1)
    assert len(torch.unique(joined, dim=0)) == len(joined)


def test_compiled_bits_equal_eager(device):
    def f(seed, row_ids):
        return [stream(name, (row_ids.shape[0], 10), seed, row_ids=row_ids) + 0 for name in STREAMS]

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (4, 7):
        arguments = (torch.tensor(5, device=device), torch.arange(rows, device=device))
        assert all(map(torch.equal, compiled(*arguments), f(*arguments)))


@pytest.mark.parametrize("name", STREAMS)
def test_errors(name):
    with pytest.raises(TypeError, match=f"^random_{name}: dtype must be float32, bfloat16, float16 or float64"):
        stream(name, (2, 3), 0, dtype=torch.int32)
    with pytest.raises(TypeError, match=f"^random_{name}: seed must be an int or a 0-d int64 tensor"):
        stream(name, (2, 3), None)
    with pytest.raises(ValueError, match=f"^random_{name}: sample must be at least 0"):
        stream(name, (2, 3), 0, sample=-1)


ISA_PROGRAM = """
import torch, sslkernels as sk
from sslkernels.core import native

torch.manual_seed(0)
for columns in (1, 3, 4, 13, 1023, 1024, 1029):
    ids = torch.arange(7) * (2**50 + 1) - 3
    x = torch.randn(7, 2 * columns, requires_grad=True)
    mean, logvar = x.chunk(2, 1)
    found = []
    for backend in ("cpu", "reference"):
        with sk.use_backend(backend):
            streams = ("bits", "normal", "uniform", "exponential", "gumbel")
            exact = [getattr(sk, "random_" + s)((7, columns), -7, row_ids=ids, sample=2**40 + 1) for s in streams]
            exact += [sk.random_normal((7, columns), 1, dtype=torch.bfloat16)]
            results = []
            for samples in (1, 3):
                z, kl = sk.gaussian_rsample(mean, logvar, samples, prior=(mean[0], mean[:1]), row_ids=ids, seed=5)
                results += [z, kl, *torch.autograd.grad(z.sin().sum() + kl.sum(), x)]
            y = sk.gumbel_softmax(mean, tau=0.7, row_ids=ids, seed=5)
            results += [y, *torch.autograd.grad(y.square().sum(), x)]
            found.append((exact, results))
    assert all(torch.equal(a, b) for a, b in zip(found[0][0], found[1][0])), columns
    for a, b in zip(found[0][1], found[1][1]):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
print(native.extension.build_info()["cpu_isa"])
"""


@pytest.mark.full
@pytest.mark.parametrize("isa", ["default", "avx2"])
def test_every_compiled_instruction_set_gives_the_same_bits(isa):
    """The other tests run only the best one."""
    if native.extension is None:
        pytest.skip("no compiled extension")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"SSLKERNELS_CPU_ISA": isa}
    command = [sys.executable, "-c", ISA_PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in ("default", isa)
