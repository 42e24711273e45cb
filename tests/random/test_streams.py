"""The random streams: known answers, the address of a word, and uniformity."""

from __future__ import annotations

import pytest
import torch
from philox_oracle import KNOWN, as_int64, chi_square_limit, philox, word
from torch.utils.checkpoint import checkpoint

import sslkernels as sk
from sslkernels.random.seeds import seed_tensor
from sslkernels.random.streams import _OPERATORS

pytestmark = pytest.mark.pairwise

OP = "random_bits"

SEEDS = [0, 12345, 2**32 + 7, 2**63 + 5, -1, -(2**40)]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_known_answers(backend, device, counter, key, words):
    assert philox(counter, key) == words  # checks the oracle of these tests
    row_ids = torch.tensor([as_int64(*counter[2:])], device=device)
    sample = counter[0] | counter[1] << 32
    got = sk.random_bits((1, 4), as_int64(*key), row_ids=row_ids, sample=sample)
    assert got.dtype == torch.int32
    assert tuple(w % 2**32 for w in got[0].tolist()) == words


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("columns", [1, 2, 5, 64])
def test_words_are_addressed_by_seed_row_column_and_sample(backend, device, seed, columns):
    row_ids = [3, 0, 2**33 + 1, -5, 2**63 - 1]
    sample = 2**35 + 2
    got = sk.random_bits((5, columns), seed, row_ids=torch.tensor(row_ids, device=device), sample=sample)
    expected = [[word(seed, r, c, columns, sample) for c in range(columns)] for r in row_ids]
    assert (got.long() % 2**32).tolist() == expected


@pytest.mark.parametrize("shape", [(1,), (7,), (2, 3, 5), (1100, 2), (1, 1301), (0, 4), (3, 0), (0,), (2, 0, 3)])
def test_rows_are_all_leading_dimensions(backend, device, shape):
    got = sk.random_bits(shape, 9, sample=1, device=device)
    assert got.shape == shape
    with sk.use_backend("reference"):
        torch.testing.assert_close(got, sk.random_bits(shape, 9, sample=1, device=device), rtol=0, atol=0)
    flat = sk.random_bits((got[..., 0].numel() if shape[-1] else 1, shape[-1]), 9, sample=1, device=device)
    assert torch.equal(got.reshape(-1), flat[: got.numel()].reshape(-1)[: got.numel()])


def test_row_ids_of_any_layout(backend, device):
    row_ids = torch.arange(24, device=device).reshape(4, 6)[:, ::2]
    got = sk.random_bits((4, 3, 9), 1, row_ids=row_ids)
    for i in range(4):
        for j in range(3):
            assert torch.equal(got[i, j], sk.random_bits((1, 9), 1, row_ids=row_ids[i, j : j + 1])[0])


def test_signed_unsigned_and_tensor_seeds(backend, device):
    by_int = sk.random_bits((3, 5), -3, device=device)
    assert torch.equal(by_int, sk.random_bits((3, 5), 2**64 - 3, device=device))
    assert torch.equal(by_int, sk.random_bits((3, 5), torch.tensor(-3, device=device)))
    assert not torch.equal(by_int, sk.random_bits((3, 5), 2**32 - 3, device=device))


def test_bits_are_uniform_and_samples_independent(device):
    """Single bits and bytes over 2**18 words; a random seed would fail each chi-square limit once in 1000."""
    words = sk.random_bits((512, 512), 2024, device=device).flatten().long() % 2**32
    other = sk.random_bits((512, 512), 2024, sample=1, device=device).flatten().long() % 2**32
    n = words.numel()
    for values in (words, other, words ^ other):
        ones = torch.stack([(values >> b) & 1 for b in range(32)]).sum(1).double()
        assert float(((ones - n / 2) ** 2 / (n / 4)).sum()) < chi_square_limit(32)
        for shift in (0, 24):
            counts = torch.bincount((values >> shift) & 255, minlength=256).double()
            assert float(((counts - n / 256) ** 2 / (n / 256)).sum()) < chi_square_limit(255)


def test_compile(device):
    def f(seed, row_ids):
        return sk.random_bits((row_ids.shape[0], 10), seed, row_ids=row_ids, sample=3) + 1

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (4, 7):
        arguments = (torch.tensor(5, device=device), torch.arange(rows, device=device))
        assert torch.equal(compiled(*arguments), f(*arguments))


def test_compile_without_a_tensor():
    """The result is then on torch's default device."""
    compiled = torch.compile(lambda n: sk.random_normal((n, 5), -3), fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (4, 7):
        assert torch.equal(compiled(rows), sk.random_normal((rows, 5), -3))
    with torch.device("meta"):
        assert sk.random_normal((2, 5), 0).is_meta


@pytest.mark.full_for(backend="triton")
def test_opcheck(backend, device):
    seed = torch.tensor(3, device=device)
    torch.library.opcheck(_OPERATORS["bits"].raw, (seed, None, 3, 6, 1, torch.int32))
    torch.library.opcheck(_OPERATORS["normal"].raw, (seed, None, 3, 6, 1, torch.bfloat16))


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((5, 0), {}, TypeError, "shape must be a sequence of ints; got int"),
        (((), 0), {}, ValueError, "shape must have one dimension or more"),
        (((2, -1), 0), {}, ValueError, "shape must be at least 0; got -1"),
        (((2, 2.0), 0), {}, TypeError, "shape must be an int; got float"),
        (((2, 3), None), {}, TypeError, "seed must be an int or a 0-d int64 tensor"),
        (((2, 3), 1.5), {}, TypeError, "seed must be an int, a 0-d int64 tensor or None; got float"),
        (((2, 3), True), {}, TypeError, "seed must be an int"),
        (((2, 3), 2**64), {}, ValueError, "seed must be in"),
        (((2, 3), -(2**63) - 1), {}, ValueError, "seed must be in"),
        (((2, 3), torch.tensor([1])), {}, ValueError, "seed must have shape"),
        (((2, 3), torch.tensor(1, dtype=torch.int32)), {}, TypeError, "seed must have dtype"),
        (((2, 3), torch.tensor(1, device="meta")), {"device": "cpu"}, ValueError, "seed must be on the device"),
        (((2, 3), 0), {"row_ids": torch.arange(3)}, ValueError, "row_ids must have shape"),
        (((2, 3), 0), {"row_ids": torch.arange(2).int()}, TypeError, "row_ids must have dtype"),
        (((2, 3), 0), {"row_ids": [0, 1]}, TypeError, "row_ids must be a torch.Tensor or None"),
        (((2, 3), 0), {"row_ids": torch.arange(2), "device": "meta"}, ValueError, "row_ids must be on the device"),
        (((2, 3), 0), {"sample": -1}, ValueError, "sample must be at least 0"),
        (((2, 3), 0), {"sample": 2**64}, ValueError, "sample must be less than"),
        (((2, 3), 0), {"sample": 0.5}, TypeError, "sample must be an int"),
    ],
)
def test_errors(arguments, options, error, message):
    with pytest.raises(error, match=f"^random_bits: {message}"):
        sk.random_bits(*arguments, **options)


def test_seed_tensor(device):
    where = torch.device(device)
    given = torch.tensor(4, device=device)
    assert seed_tensor("f", given, None, where) is given
    for seed, value in [(0, 0), (2**63, -(2**63)), (2**64 - 1, -1), (-(2**63), -(2**63)), (2**63 - 1, 2**63 - 1)]:
        assert seed_tensor("f", seed, None, where).item() == value

    def draws(generator):
        return [seed_tensor("f", None, generator, where).item() for _ in range(3)]

    generator = torch.Generator(device).manual_seed(1)
    first = draws(generator)
    assert draws(generator.manual_seed(1)) == first
    assert len(set(first)) == 3
    torch.manual_seed(1)
    default = draws(None)
    torch.manual_seed(1)
    assert draws(None) == default

    with pytest.raises(ValueError, match=r"^f: seed must have shape \(\) = \(\); got \(2,\)"):  # one seed for all rows
        seed_tensor("f", torch.zeros(2, dtype=torch.int64, device=device), None, where)
    with pytest.raises(ValueError, match=r"^f: generator must be None where seed is given; got both"):
        seed_tensor("f", 1, generator, where)
    with pytest.raises(TypeError, match=r"^f: generator must be a torch.Generator or None; got int"):
        seed_tensor("f", None, 3, where)
    with pytest.raises(ValueError, match=r"^f: generator must be on meta; got"):
        seed_tensor("f", None, generator, torch.device("meta"))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_custom_generator_is_refused_in_a_recomputed_forward(use_reentrant, device):
    """Activation checkpointing does not restore its state: the gradient would belong to other noise."""
    table, default = torch.randn(6, 6, device=device), torch.default_generator
    calls = [
        lambda x, g: sk.gaussian_rsample(x, x, generator=g).z,
        lambda x, g: sk.gumbel_softmax(x, generator=g),
        lambda x, g: sk.gumbel_quantize(x, table, generator=g).values,
        lambda x, g: sk.linear_sample(x, table, generator=g).logprob,
    ]
    for call in calls:
        x = torch.randn(3, 6, device=device, requires_grad=True)
        loss = checkpoint(call, x, torch.Generator(device), use_reentrant=use_reentrant).sum()
        with pytest.raises(RuntimeError, match="a generator of one's own cannot draw in backward"):
            loss.backward()
        if device == "cpu":
            checkpoint(call, x, default, use_reentrant=use_reentrant).sum().backward()
