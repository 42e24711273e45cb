"""corrupt_spans: its distribution is T5's, its results hold the whole sequence, and all backends give the same bits."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest
import torch
from philox_oracle import chi_square_limit, word

import sslkernels as sk
from sslkernels.vocabulary.corrupt_spans import SpanInputs, SpanOptions, corrupt_spans_fwd

pytestmark = pytest.mark.pairwise

OP = "corrupt_spans"
SENTINELS = range(32099, 31999, -1)
DTYPES = (torch.int64, torch.int32, torch.int16, torch.uint16)


def tokens(*shape, dtype=torch.int64, device="cpu"):
    """No two tokens of a row are equal, and none is a sentinel or the end."""
    columns = torch.arange(shape[-1]) * 7 % 31_000 + 10
    return columns.expand(shape).to(device, dtype)


def sizes(columns, density=0.15, mean_span=3.0):
    noise = min(max(round(density * columns), 1), columns - 1)
    return noise, min(max(round(noise / mean_span), 1), columns - noise)


def by_hand(ids, seed, row_id, noise, spans, sentinels, eos):
    """One row, in Python's integers, from the definition."""
    left, cuts, kind = [len(ids) - noise, noise], [spans - 1] * 2, 0
    results, span = ([], []), 0
    for column, token in enumerate(ids):
        results[kind].append(token)
        left[kind] -= 1
        cut = word(seed, row_id, column, len(ids), 0) * left[kind] >> 32 < cuts[kind]
        cuts[kind] -= cut
        if cut or left[kind] == 0:
            if kind == 0:
                for result in results:
                    result.append(sentinels[span])
                span += 1
            kind = 1 - kind
    return tuple(result + ([] if eos is None else [eos]) for result in results)


def restored(inputs, labels, sentinels, eos):
    """The sequence: the spans of the labels in place of the sentinels of the input."""
    spans, order = {}, []
    for token in labels:
        if token in sentinels:
            order.append(token)
            spans[token] = []
        elif token != eos:
            spans[order[-1]].append(token)
    assert order == list(sentinels[: len(order)])
    assert all(spans.values())
    found = [[token] if token not in sentinels else spans.pop(token) for token in inputs if token != eos]
    assert not spans
    return list(itertools.chain(*found))


@pytest.mark.parametrize("seed", range(16))
def test_random_calls(backend, seed, device):
    """Whatever sizes, dtypes and options: each row as the definition says, in Python's integers."""
    r = random.Random(seed)
    columns = r.choice([2, 3, 4, 5, 9, 16, 61])
    rows, dtype = r.choice([1, 3, 40]), r.choice(DTYPES)
    density, mean_span = r.choice([0.01, 0.15, 0.5, 0.9, 1]), r.choice([1, 1.7, 3.0, 20])
    eos = r.choice([None, 1])
    noise, spans = sizes(columns, density, mean_span)
    sentinels = [r.randrange(31_000, 32_000) for _ in range(spans + r.randrange(3))]
    row_ids = [r.randrange(-(2**63), 2**63) for _ in range(rows)] if r.random() < 0.5 else None
    ids = tokens(rows, columns, dtype=torch.int64, device=device)
    got = sk.corrupt_spans(
        ids.to(dtype),
        sentinel_ids=sentinels if r.random() < 0.5 else torch.tensor(sentinels, device=device),
        density=density,
        mean_span=mean_span,
        eos_id=eos,
        row_ids=row_ids and torch.tensor(row_ids, device=device),
        seed=seed - 5,
    )
    inputs, labels = (part.to(torch.int64).tolist() for part in got)
    assert got.input_ids.dtype == got.labels.dtype == dtype
    for i in range(rows):
        row_id = row_ids[i] if row_ids else i
        expected = by_hand(ids[i].tolist(), seed - 5, row_id, noise, spans, sentinels, eos)
        assert (inputs[i], labels[i]) == expected


@pytest.mark.slow_for(backend="triton", columns=(568, 1100))
@pytest.mark.parametrize("columns", [2, 7, 64, 568, 1100])
def test_input_and_labels_hold_the_sequence(backend, columns, device):
    ids = tokens(20, columns, device=device)
    noise, spans = sizes(columns)
    got = sk.corrupt_spans(ids, sentinel_ids=SENTINELS, eos_id=1, seed=0)
    assert got.input_ids.shape == (20, columns - noise + spans + 1)
    assert got.labels.shape == (20, noise + spans + 1)
    assert (got.input_ids[:, -1] == 1).all()
    assert (got.labels[:, -1] == 1).all()
    assert (got.input_ids[:, 0] == ids[:, 0]).all()  # a row begins with what stays
    assert (got.labels[:, 0] == SENTINELS[0]).all()
    for inputs, labels, row in zip(*(t.tolist() for t in (*got, ids)), strict=True):
        assert restored(inputs, labels, SENTINELS, 1) == row


def compositions(total, parts):
    """All ways to write `total` as a sum of `parts` positive numbers."""
    for cuts in itertools.combinations(range(1, total), parts - 1):
        yield tuple(b - a for a, b in itertools.pairwise((0, *cuts, total)))


def lengths(ids, sentinels):
    """The lengths of the parts between sentinels; there is none before the first one of labels."""
    found = [0]
    for token in ids:
        if token in sentinels:
            found.append(0)
        else:
            found[-1] += 1
    return tuple(filter(None, found))


@pytest.mark.full_for(backend="triton")
def test_lengths_are_uniform_among_the_compositions(backend, device):
    """Chi-square over all pairs of compositions: of T=12 tokens 6 are taken out in 3 spans, in 10 x 10 ways."""
    rows = 1000 if backend == "triton" and device == "cpu" else 40_000
    ids = tokens(rows, 12, device=device)
    got = sk.corrupt_spans(ids, sentinel_ids=SENTINELS, density=0.5, mean_span=2.0, seed=4)
    observed = Counter()
    for inputs, labels in zip(got.input_ids.tolist(), got.labels.tolist(), strict=True):
        observed[lengths(inputs, SENTINELS), lengths(labels, SENTINELS)] += 1
    ways = list(itertools.product(compositions(6, 3), repeat=2))
    assert set(observed) <= set(ways)
    expected = rows / len(ways)
    statistic = sum((observed[way] - expected) ** 2 / expected for way in ways)
    assert statistic < chi_square_limit(len(ways) - 1)


def t5_masks(generator, rows, columns, noise, spans):
    """T5's random_spans_noise_mask, from its description: two shuffled rows of marks say where a segment begins."""

    def segments(count):
        shuffled = torch.rand(rows, count - 1, generator=generator).argsort(1) < spans - 1
        number = torch.cat([torch.zeros(rows, 1, dtype=torch.int64), shuffled.long().cumsum(1)], 1)
        return torch.zeros(rows, spans, dtype=torch.int64).scatter_add(1, number, torch.ones_like(number))

    both = torch.stack([segments(columns - noise), segments(noise)], 2).flatten()
    return torch.repeat_interleave(torch.arange(2).repeat(rows * spans), both).reshape(rows, columns).bool()


def test_masks_are_distributed_as_in_t5(device):
    """Two samples: how often each token is taken out, and the histogram of the lengths of the spans."""
    rows, columns = 20_000, 40
    noise, spans = sizes(columns, 0.3)
    g = torch.Generator().manual_seed(0)
    theirs = t5_masks(g, rows, columns, noise, spans)
    ids = torch.arange(columns, device=device).expand(rows, columns)
    got = sk.corrupt_spans(ids, sentinel_ids=range(-1, -50, -1), density=0.3, seed=8)
    ours = torch.zeros(rows, columns + 1, dtype=torch.bool)
    ours.scatter_(1, torch.where(got.labels >= 0, got.labels, columns).cpu(), True)

    def histogram(mask):
        begins = mask.clone()
        begins[:, 1:] &= ~mask[:, :-1]
        number = (begins.long().cumsum(1) + spans * torch.arange(rows)[:, None])[mask]
        return torch.bincount(torch.bincount(number)[1:], minlength=noise)

    for ours_, theirs_ in (
        (ours[:, :columns].sum(0), theirs.sum(0)),
        (histogram(ours[:, :columns]), histogram(theirs)),
    ):
        one, other = ours_.double(), theirs_.double()
        used = one + other > 20
        # The counts of a row are not independent, but negatively correlated: the statistic is no larger.
        statistic = ((one - other) ** 2 / (one + other))[used].sum().item()
        assert statistic < chi_square_limit(int(used.sum()) - 1)


@pytest.mark.full_for(backend="triton")
def test_splits_and_row_ids(backend, device):
    ids = tokens(2, 3, 30, device=device)
    options = {"sentinel_ids": SENTINELS, "seed": torch.tensor(5, device=device)}
    whole = sk.corrupt_spans(ids, **options)
    for i, j in itertools.product(range(2), range(3)):
        part = sk.corrupt_spans(ids[i, j], row_ids=torch.tensor(3 * i + j, device=device), **options)
        for one, other in zip(part, whole, strict=True):
            assert torch.equal(one, other[i, j])
    row_ids = torch.arange(12, device=device).reshape(3, 4).t()[:2, :]  # not contiguous
    strided = tokens(2, 3, 60, device=device)[..., ::2]
    again = sk.corrupt_spans(strided, row_ids=row_ids, **options)
    assert torch.equal(again.labels[1, 2], sk.corrupt_spans(strided[1, 2], row_ids=row_ids[1, 2], **options).labels)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_and_empty_batches(backend, dtype, device):
    ids = tokens(4, 17, device=device)
    expected = sk.corrupt_spans(ids, sentinel_ids=SENTINELS, eos_id=1, seed=1)
    got = sk.corrupt_spans(ids.to(dtype), sentinel_ids=SENTINELS, eos_id=1, seed=1)
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == dtype
        assert torch.equal(one.long(), other)
    none = sk.corrupt_spans(ids[:0].to(dtype), sentinel_ids=SENTINELS, seed=1)
    assert [tuple(part.shape) for part in none] == [(0, 15), (0, 4)]


@pytest.mark.full_for(backend="triton")
def test_sentinels(backend, device):
    """In order of use; the same from ints that are evenly spaced, ints that are not, a range and a tensor."""
    ids = tokens(3, 40, device=device)
    noise, spans = sizes(40)
    for given in ([9, 7, 5], [9, 7, 6, 1], range(9, 0, -2), [4, 4, 4]):
        assert len(given) >= spans > 1
        got = sk.corrupt_spans(ids, sentinel_ids=given, seed=0)
        used = got.labels[got.labels < 10].reshape(3, spans)
        assert used.tolist() == [list(given)[:spans]] * 3
        for other in (tuple(given), torch.tensor(list(given), device=device, dtype=torch.int32)):
            assert torch.equal(sk.corrupt_spans(ids, sentinel_ids=other, seed=0).labels, got.labels)
    assert got.labels.shape[1] == noise + spans


def test_inputs_stay_and_the_generator_counts(device):
    ids = tokens(30, 40, device=device)
    before = ids.clone()
    draws = [
        sk.corrupt_spans(ids, sentinel_ids=SENTINELS, generator=torch.Generator(device).manual_seed(1))
        for _ in range(2)
    ]
    assert torch.equal(draws[0].labels, draws[1].labels)
    assert torch.equal(ids, before)
    torch.manual_seed(0)
    first = sk.corrupt_spans(ids, sentinel_ids=SENTINELS)
    assert not torch.equal(first.labels, sk.corrupt_spans(ids, sentinel_ids=SENTINELS).labels)


def test_the_length_that_fits():
    """As the docstring says, 568 tokens become 512 and 114; the numbers of T5's own script."""
    meta = torch.empty(0, 568, dtype=torch.int64, device="meta")
    got = sk.corrupt_spans(meta, sentinel_ids=SENTINELS, eos_id=1, seed=0)
    assert [part.shape[1] for part in got] == [512, 114]

    def input_length(columns):
        noise, spans = sizes(columns)
        return columns - noise + spans + 1

    assert max(columns for columns in range(2, 1024) if input_length(columns) <= 512) == 568
    assert "input_length(T) <= 512" in sk.corrupt_spans.__doc__


@pytest.mark.full
def test_compile_equals_eager(device, compiler):
    torch._dynamo.reset()

    def call(ids, seed):
        return sk.corrupt_spans(ids, sentinel_ids=SENTINELS, eos_id=1, seed=seed)

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=compiler)
    for rows, columns in ((3, 30), (5, 30), (4, 41)):
        ids, seed = tokens(rows, columns, device=device).clone(), torch.tensor(rows, device=device)
        for one, other in zip(compiled(ids, seed), call(ids, seed), strict=True):
            assert torch.equal(one, other)


@pytest.mark.full_for(backend="triton")
@pytest.mark.parametrize("eos", [False, True])
def test_opcheck(backend, eos, device):
    inputs = SpanInputs(
        tokens(3, 20, device=device).contiguous(),
        torch.tensor(1, device=device),
        torch.tensor([5, 6], device=device),
        torch.tensor([2, 1, 0], device=device) if eos else None,
    )
    arguments = corrupt_spans_fwd.inputs.pack((inputs, SpanOptions(6, 2, eos, 1)))
    torch.library.opcheck(corrupt_spans_fwd.raw, tuple(arguments))


def test_more_spans_than_tokens_end_no_process():
    inputs = SpanInputs(tokens(3, 20).contiguous(), torch.tensor(1), torch.arange(5), None)
    for noise, spans in ((4, 5), (18, 5), (-1, 5), (25, 5), (6, 0)):
        with sk.use_backend("cpu"), pytest.raises(RuntimeError):
            corrupt_spans_fwd(inputs, SpanOptions(noise, spans, False, 0))


IDS = tokens(2, 40)
ERRORS = [
    (dict(input_ids=[1, 2]), TypeError, r"input_ids must be a torch.Tensor; got list"),
    (dict(input_ids=IDS.float()), TypeError, r"input_ids must have dtype"),
    (dict(input_ids=IDS[:, :1]), ValueError, r"input_ids must have rows of 2 to 2\*\*31 - 2 tokens; got \(2, 1\)"),
    (dict(input_ids=IDS[0, 0]), ValueError, r"input_ids must have shape \(\.\.\., T\); got \(\)"),
    (dict(sentinel_ids=[1]), ValueError, r"sentinel_ids must be at least as many as the spans of a row, 2; got 1"),
    (dict(sentinel_ids=[]), ValueError, r"sentinel_ids must be at least as many as the spans of a row, 2; got 0"),
    (dict(sentinel_ids=torch.ones(1).long()), ValueError, r"sentinel_ids must be at least as many .*, 2; got 1"),
    (dict(sentinel_ids=torch.ones(3)), TypeError, r"sentinel_ids must have dtype torch.int64 or torch.int32"),
    (dict(sentinel_ids=torch.ones(3, 3).long()), ValueError, r"sentinel_ids must have shape \(S,\); got \(3, 3\)"),
    (dict(sentinel_ids=3), TypeError, r"sentinel_ids must be a sequence of ints; got int"),
    (dict(sentinel_ids="abc"), TypeError, r"sentinel_ids must be a sequence of ints; got str"),
    (dict(sentinel_ids=[1, 2.5]), TypeError, r"sentinel_ids must be an int; got float"),
    (
        dict(input_ids=IDS.short(), sentinel_ids=[1, 2**15]),
        ValueError,
        r"sentinel_ids must fit in torch.int16, the dtype of input_ids; got 32768",
    ),
    (
        dict(input_ids=IDS.short(), sentinel_ids=torch.tensor([1, 2**15])),
        ValueError,
        r"sentinel_ids must fit in torch.int16, the dtype of input_ids; got 32768",
    ),
    (
        dict(input_ids=IDS.to(torch.uint16), eos_id=-1),
        ValueError,
        r"eos_id must fit in torch.uint16, the dtype of input_ids; got -1",
    ),
    (dict(eos_id=1.0), TypeError, r"eos_id must be an int or None; got float"),
    (dict(density=0), ValueError, r"density must be in \(0, 1\]; got 0"),
    (dict(density=1.5), ValueError, r"density must be in \(0, 1\]; got 1.5"),
    (dict(mean_span=0.5), ValueError, r"mean_span must be in \[1, inf\]; got 0.5"),
    (dict(row_ids=torch.zeros(3).long()), ValueError, r"row_ids must have shape input_ids.shape\[:-1\] = \(2,\)"),
    (dict(row_ids=torch.zeros(2)), TypeError, r"row_ids must have dtype torch.int64; got torch.float32"),
    (dict(seed=1, generator=torch.Generator()), ValueError, r"generator must be None where seed is given; got both"),
]


@pytest.mark.parametrize(
    ("change", "kind", "message"), ERRORS, ids=lambda v: next(iter(v)) if isinstance(v, dict) else ""
)
def test_errors(change, kind, message):
    with pytest.raises(kind, match=r"^corrupt_spans: " + message):
        sk.corrupt_spans(**{"input_ids": IDS, "sentinel_ids": SENTINELS, **change})
