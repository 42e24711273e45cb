"""AliasTable: its table is exact, its draws follow the contract, on every backend, and it is a module."""

from __future__ import annotations

import copy
import io
import pickle
import random

import pytest
import torch
from philox_oracle import chi_square_limit, word

import sslkernels as sk
from sslkernels.random.alias_table import alias_draw, alias_table, masses

pytestmark = pytest.mark.pairwise

OP = "AliasTable"

WEIGHTS = {
    "one": [3.0],
    "one_of_two": [0.0, 5.0],
    "equal": [2.0] * 7,
    "powers": [2.0**-k for k in range(40)],
    "zeros_between": [0.0, 1.0, 0.0, 0.0, 2.0, 0.5, 0.0],
    "one_heavy": [1.0] * 50 + [1e6],
    "wide": [1e-300, 1e300, 1e299, 0.0],
    "counts": [50, 20, 7, 0, 3],
}


def mass_of(table: torch.Tensor) -> torch.Tensor:
    """How much of 2**32 for each bucket the indices of a table have."""
    threshold, alias = table[:, 0].long() % 2**32, table[:, 1].long()
    return torch.zeros(len(table), dtype=torch.int64).index_add_(0, alias, 2**32 - threshold) + threshold


@pytest.mark.parametrize("name", WEIGHTS)
def test_the_table_is_exact(name):
    weights = torch.tensor(WEIGHTS[name], dtype=torch.float64)
    mass = masses(weights)
    assert mass.sum() == len(weights) * 2**32
    true = weights / weights.max() / (weights / weights.max()).sum() * (len(weights) * 2**32)
    assert (mass - true).abs().max() <= 2
    assert torch.equal(mass == 0, true < 0.5) or name == "wide"
    assert torch.equal(mass_of(alias_table(mass)), mass)
    assert torch.equal(sk.AliasTable(weights).table, alias_table(mass))


@pytest.mark.parametrize("seed", range(20))
def test_random_tables_are_exact(seed):
    r = random.Random(seed)
    size = r.choice([1, 2, 3, 17, 1000, 20000])
    weights = torch.rand(size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    weights = weights ** r.choice([0, 1, 5, 40]) * (weights > r.choice([0, 0.5]))
    weights[r.randrange(size)] = 1
    mass = masses(weights)
    assert mass.sum() == size * 2**32
    assert (mass.double() / 2**32 - weights / weights.sum() * size).abs().max() < 2**-31 + size * 2**-50
    assert (mass[weights == 0] == 0).all()
    assert torch.equal(mass_of(alias_table(mass)), mass)


def drawn(table, seed, row, column, columns):
    """One draw, in Python's integers, from the definition in docs/random_numbers.md."""
    at = (word(seed, row, column, columns, 0) << 32 | word(seed, row, column, columns, 1)) * len(table)
    bucket, fraction = at >> 64, at >> 32 & 0xFFFFFFFF
    threshold, alias = table[bucket].tolist()
    return bucket if fraction < threshold % 2**32 else alias


@pytest.mark.parametrize("columns", [1, 4, 5, 11])
@pytest.mark.parametrize("name", WEIGHTS)
def test_draws_equal_the_definition(backend, name, columns, device):
    table = sk.AliasTable(torch.tensor(WEIGHTS[name])).to(device) if name == "counts" else None
    table = table or sk.AliasTable(WEIGHTS[name]).to(device)
    row_ids = [3, 0, 2**33 + 1, -5, 2**63 - 1]
    got = table.draw((5, columns), row_ids=torch.tensor(row_ids, device=device), seed=-(2**40))
    assert got.dtype == torch.int64
    rows = table.table.cpu()
    assert got.tolist() == [[drawn(rows, -(2**40), r, c, columns) for c in range(columns)] for r in row_ids]


@pytest.mark.parametrize("shape", [(1,), (7,), (2, 3, 5), (600, 3), (1, 1301), (0, 4), (3, 0), (0,), (2, 0, 3)])
def test_shapes_and_splits(backend, shape, device):
    table = sk.AliasTable(torch.rand(1000, device=device))
    got = table.draw(shape, seed=9)
    assert got.shape == shape
    with sk.use_backend("reference"):
        assert torch.equal(got, table.draw(shape, seed=9))
    rows = got.reshape(-1, shape[-1]) if shape[-1] else got.reshape(0, 1)
    ids = torch.arange(len(rows), device=device)
    for part in ids.split(250):
        assert torch.equal(table.draw((len(part), max(shape[-1], 1)), row_ids=part, seed=9), rows[part])


def test_indices_have_the_weights_frequencies(backend, device):
    """Chi-square over the indices of a Zipf distribution, and none of weight 0."""
    count = 2000 if backend == "triton" and device == "cpu" else 400_000
    weights = torch.arange(1, 51, dtype=torch.float64).reciprocal() ** 0.75
    weights[::7] = 0
    got = sk.AliasTable(weights).to(device).draw((count // 5, 5), seed=3)
    observed = torch.bincount(got.flatten().cpu(), minlength=50).double()
    expected = weights / weights.sum() * count
    assert observed[weights == 0].sum() == 0
    kept = weights > 0
    statistic = ((observed - expected) ** 2 / expected)[kept].sum().item()
    assert statistic < chi_square_limit(int(kept.sum()) - 1)


def test_columns_rows_and_seeds_are_independent(device):
    """Chi-square of pairs of draws: neighbours in a row, in a column, and of two seeds."""
    table = sk.AliasTable(torch.tensor([4.0, 1, 2, 2], device=device))
    one, two = table.draw((50_000, 4), seed=1), table.draw((50_000, 4), seed=2)
    share = torch.tensor([4.0, 1, 2, 2], dtype=torch.float64) / 9
    expected = (share[:, None] * share).flatten()
    for a, b in ((one[:, 0], one[:, 1]), (one[:-1, 3], one[1:, 3]), (one[:, 2], two[:, 2])):
        observed = torch.bincount((4 * a + b).cpu(), minlength=16).double()
        statistic = ((observed - expected * len(a)) ** 2 / (expected * len(a))).sum().item()
        assert statistic < chi_square_limit(15)


def test_seeds_and_generators(device):
    table = sk.AliasTable([1.0, 2, 3]).to(device)
    expected = table.draw((4, 3), seed=5)
    assert torch.equal(table(torch.Size((4, 3)), seed=torch.tensor(5, device=device)), expected)
    draws = [table.draw((40, 3), generator=torch.Generator(device).manual_seed(1)) for _ in range(2)]
    assert torch.equal(*draws)
    torch.manual_seed(0)
    first = table.draw((40, 3))
    assert not torch.equal(first, table.draw((40, 3)))
    torch.manual_seed(0)
    assert torch.equal(table.draw((40, 3)), first)


def test_it_is_a_module(device):
    model = torch.nn.Sequential()
    model.table = sk.AliasTable([1.0, 2, 3, 0])
    expected = model.table.draw((5, 3), seed=1)
    assert model.half().table.table.dtype == torch.int32
    model.to(device)
    assert model.table.table.device.type == device
    assert not list(model.parameters())
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    loaded = sk.AliasTable([1.0] * 4)
    loaded.load_state_dict({"table": torch.load(buffer)["table.table"]})
    copies = (copy.deepcopy(model).table, pickle.loads(pickle.dumps(model)).table, loaded.to(device))
    for table in copies:
        assert torch.equal(table.draw((5, 3), seed=1).cpu(), expected)
    assert repr(model.table) == "AliasTable(4)"


def test_negatives_of_word2vec(device):
    """The draws go into the loss as they are."""
    counts = torch.tensor([50.0, 20, 7, 5, 3], device=device)
    negatives = sk.AliasTable(counts**0.75).draw((6, 4), seed=0)
    u, v = torch.randn(2, 5, 8, device=device)
    index = torch.arange(6, device=device) % 5
    assert sk.negative_sampling_loss(index, index.flip(0), negatives, u, v).isfinite()


@pytest.mark.full
def test_compile_equals_eager(device, compiler):
    torch._dynamo.reset()
    table = sk.AliasTable(torch.rand(30)).to(device)
    compiled = torch.compile(
        lambda rows, seed: table.draw((rows.shape[0], 3), seed=seed), fullgraph=True, dynamic=True, backend=compiler
    )
    for rows in (4, 9):
        seed = torch.tensor(rows, device=device)
        assert torch.equal(compiled(torch.zeros(rows), seed), table.draw((rows, 3), seed=seed))


@pytest.mark.full_for(backend="triton")
@pytest.mark.parametrize("ids", [None, [4, 1]])
def test_opcheck(backend, ids, device):
    table = sk.AliasTable(torch.rand(30)).to(device).table
    row_ids = ids and torch.tensor(ids, device=device)
    torch.library.opcheck(alias_draw.raw, (torch.tensor(3, device=device), row_ids, table, 2, 5))


@pytest.mark.parametrize(
    ("weights", "kind", "message"),
    [
        ("abc", TypeError, r"AliasTable: weights must be a tensor or a sequence of numbers; got str"),
        (torch.ones(2, 2), ValueError, r"AliasTable: weights must have shape \(V,\); got \(2, 2\)"),
        (torch.ones(2).bool(), TypeError, r"AliasTable: weights must have dtype"),
        (torch.ones(0), ValueError, r"AliasTable: weights must have 1 to 2\*\*31 - 1 elements; got 0"),
        ([1.0, -1], ValueError, r"AliasTable: weights must be finite, not negative and not all 0; got values from -1"),
        (
            [0.0, 0],
            ValueError,
            r"AliasTable: weights must be finite, not negative and not all 0; got values from 0 to 0",
        ),
        ([1.0, float("nan")], ValueError, r"AliasTable: weights must be finite"),
        ([1.0, float("inf")], ValueError, r"AliasTable: weights must be finite"),
    ],
)
def test_errors_of_weights(weights, kind, message):
    with pytest.raises(kind, match="^" + message):
        sk.AliasTable(weights)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        (dict(shape=3), TypeError, r"shape must be a sequence of ints; got int"),
        (dict(shape=()), ValueError, r"shape must have one dimension or more; got \(\)"),
        (dict(shape=(-1,)), ValueError, r"shape must be at least 0; got -1"),
        (dict(row_ids=torch.zeros(3, dtype=torch.int64)), ValueError, r"row_ids must have shape shape\[:-1\] = \(2,\)"),
        (dict(row_ids=torch.zeros(2)), TypeError, r"row_ids must have dtype torch.int64; got torch.float32"),
        (dict(seed=0.5), TypeError, r"seed must be an int, a 0-d int64 tensor or None; got float"),
        (
            dict(seed=1, generator=torch.Generator()),
            ValueError,
            r"generator must be None where seed is given; got both",
        ),
    ],
)
def test_errors_of_draws(options, kind, message):
    with pytest.raises(kind, match=r"^AliasTable\.draw: " + message):
        sk.AliasTable([1.0, 2]).draw(**{"shape": (2, 3), **options})
