"""mask_tokens: every backend against a sequential oracle, bit for bit; the distributions; the arguments."""

from __future__ import annotations

import math

import pytest
import torch
from philox_oracle import chi_square_limit, word

import sslkernels as sk
from sslkernels.vocabulary.mask_tokens import mask_tokens_fwd, special_ranges

pytestmark = pytest.mark.pairwise

OP = "mask_tokens"
IGNORE = -100
VOCAB, MASK, SPECIAL = 60, 4, (0, 1, 2, 10, 11, 59, 70, -1)


def oracle(
    input_ids,
    *,
    mask_id,
    vocab_size,
    seed,
    probability=0.15,
    replace=(0.8, 0.1),
    special_ids=(),
    special_mask=None,
    word_ids=None,
    mean_span=None,
    ignore_index=IGNORE,
    row_ids=None,
):
    """Sequential over rows and tokens, in Python integers."""
    special = {*special_ids, mask_id}
    allowed = [i for i in range(vocab_size) if i not in special]
    rows, columns = input_ids.shape
    new, labels = input_ids.tolist(), torch.full_like(input_ids, ignore_index).tolist()

    def below(value, p):
        return value < round(p * 2**32)

    for r in range(rows):
        row_id = r if row_ids is None else int(row_ids[r])
        state, was_eligible, last_word = False, False, -1
        for c in range(columns):
            token = int(input_ids[r, c])
            this_word = -1 if word_ids is None else int(word_ids[r, c])
            eligible = token not in special
            eligible &= special_mask is None or not bool(special_mask[r, c])
            eligible &= word_ids is None or this_word >= 0
            p = probability
            if mean_span is not None and was_eligible:
                p = 1 - 1 / mean_span if state else probability / (mean_span * (1 - probability))
            if this_word < 0 or this_word != last_word:
                state = below(word(seed, row_id, c, columns, 0), p)
            was_eligible, last_word = eligible, this_word
            if not (state and eligible):
                continue
            labels[r][c] = token
            action = word(seed, row_id, c, columns, 1)
            if below(action, replace[0]):
                new[r][c] = mask_id
            elif below(action, replace[0] + replace[1]):
                new[r][c] = allowed[word(seed, row_id, c, columns, 2) * len(allowed) >> 32]
    return (torch.tensor(x, dtype=input_ids.dtype).reshape(rows, columns) for x in (new, labels))


def example(rows, columns, dtype=torch.int64):
    g = torch.Generator().manual_seed(1000 * rows + columns)
    word_ids = torch.randint(0, 3, (rows, columns), generator=g).cumsum(1) // 2
    word_ids[torch.rand(rows, columns, generator=g) < 0.1] = -1
    return {
        "input_ids": torch.randint(-2, VOCAB + 3, (rows, columns), generator=g).to(dtype),
        "word_ids": word_ids,
        "special_mask": torch.rand(rows, columns, generator=g) < 0.15,
        "row_ids": torch.randint(-(2**40), 2**40, (rows,), generator=g),
    }


MODES = {
    "plain": {},
    "spans": {"mean_span": 3},
    "no_neighbours": {"mean_span": 1.0},
    "words": {"word_ids": True},
    "word_spans": {"word_ids": True, "mean_span": 2.5},
}
SHAPES = [(1, 1), (3, 4), (2, 7), (2, 130), (1, 1029)]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=["int64", "int32"])
@pytest.mark.parametrize("masked", [False, True], ids=["", "special_mask"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_backend_equals_the_oracle(backend, device, shape, mode, masked, dtype):
    data = example(*shape, dtype)
    arguments = {"mask_id": MASK, "vocab_size": VOCAB, "special_ids": SPECIAL, "seed": -(2**33) - 5}
    arguments |= {"probability": 0.4, "replace": (0.5, 0.3)} | MODES[mode]
    if "word_ids" in arguments:
        arguments["word_ids"] = data["word_ids"].to(dtype)
    if masked:
        arguments |= {"special_mask": data["special_mask"], "row_ids": data["row_ids"]}
    expected_ids, expected_labels = oracle(data["input_ids"], **arguments)
    on_device = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    before = data["input_ids"].clone()
    input_ids = data["input_ids"].to(device)
    got = sk.mask_tokens(input_ids, **on_device)
    assert torch.equal(input_ids.cpu(), before)
    assert got.labels.dtype == got.input_ids.dtype == dtype
    assert torch.equal(got.labels.cpu(), expected_labels)
    assert torch.equal(got.input_ids.cpu(), expected_ids)


@pytest.mark.full_for(backend="triton")
@pytest.mark.parametrize("mode", MODES)
def test_many_short_rows(backend, device, mode):
    """More rows than a block of a kernel covers, each shorter than a group of four."""
    rows = 6 if backend == "triton" and mode != "plain" else 700  # one program per row in the interpreter
    data = example(rows, 3)
    arguments = {"mask_id": MASK, "vocab_size": VOCAB, "special_ids": SPECIAL, "seed": 3, "probability": 0.4}
    arguments |= MODES[mode]
    if "word_ids" in arguments:
        arguments["word_ids"] = data["word_ids"].to(device)
    got = sk.mask_tokens(data["input_ids"].to(device), **arguments)
    if "word_ids" in arguments:
        arguments["word_ids"] = data["word_ids"]
    expected_ids, expected_labels = oracle(data["input_ids"], **arguments)
    assert torch.equal(got.labels.cpu(), expected_labels)
    assert torch.equal(got.input_ids.cpu(), expected_ids)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0,), (2, 0, 4)])
def test_nothing_to_mask(backend, device, shape, mode):
    ids = torch.zeros(shape, dtype=torch.int64, device=device)
    options = dict(MODES[mode])
    if "word_ids" in options:
        options["word_ids"] = ids
    got = sk.mask_tokens(ids, mask_id=4, vocab_size=9, seed=0, **options)
    assert got.input_ids.shape == got.labels.shape == shape


@pytest.mark.full_for(backend="triton")
@pytest.mark.parametrize("mode", MODES)
def test_labels_do_not_depend_on_the_batch(backend, device, mode):
    rows, columns = 6, 37
    data = {k: v.to(device) for k, v in example(rows, columns).items()}

    def masked(order):
        options = dict(MODES[mode]) | {"row_ids": data["row_ids"][order]}
        if "word_ids" in options:
            options["word_ids"] = data["word_ids"][order]
        return sk.mask_tokens(
            data["input_ids"][order], mask_id=MASK, vocab_size=VOCAB, probability=0.4, seed=1, **options
        )

    whole = masked(torch.arange(rows))
    order = torch.tensor([4, 0, 5, 2, 3, 1])
    permuted = masked(order)
    split = [masked(order[:1]), masked(order[1:4]), masked(order[4:])]
    for i in range(2):
        assert torch.equal(permuted[i], whole[i][order])
        assert torch.equal(torch.cat([part[i] for part in split]), whole[i][order])
    assert not torch.equal(whole.labels, permuted.labels)


@pytest.mark.full_for(backend="triton")
def test_leading_dimensions_and_layout(backend, device):
    data = {k: v.to(device) for k, v in example(6, 18).items()}
    options = {"mask_id": MASK, "vocab_size": VOCAB, "probability": 0.4, "seed": 5}
    names = ("special_mask", "word_ids")
    flat = sk.mask_tokens(data["input_ids"], **{n: data[n] for n in names}, row_ids=data["row_ids"], **options)
    shaped = sk.mask_tokens(
        data["input_ids"].reshape(2, 3, 18),
        **{n: data[n].reshape(2, 3, 18) for n in names},
        row_ids=data["row_ids"].reshape(2, 3),
        **options,
    )
    transposed = sk.mask_tokens(
        data["input_ids"].t().contiguous().t(),
        **{n: data[n].t().contiguous().t() for n in names},
        row_ids=torch.stack([data["row_ids"]] * 2, dim=1)[:, 0],
        **options,
    )
    one_row = sk.mask_tokens(
        data["input_ids"][3], **{n: data[n][3] for n in names}, row_ids=data["row_ids"][3], **options
    )
    for i in range(2):
        assert torch.equal(shaped[i].reshape(6, 18), flat[i])
        assert torch.equal(transposed[i], flat[i])
        assert transposed[i].is_contiguous()
        assert torch.equal(one_row[i], flat[i][3])


def test_seed_and_generator(device):
    ids = torch.randint(5, VOCAB, (8, 64), device=device)

    def labels(**options):
        return sk.mask_tokens(ids, mask_id=MASK, vocab_size=VOCAB, **options).labels

    assert torch.equal(labels(seed=7), labels(seed=torch.tensor(7, device=device)))
    assert not torch.equal(labels(seed=7), labels(seed=8))
    generator = torch.Generator(device).manual_seed(3)
    first, second = labels(generator=generator), labels(generator=generator)
    assert not torch.equal(first, second)
    generator.manual_seed(3)
    assert torch.equal(labels(generator=generator), first)
    torch.manual_seed(3)
    first = labels()
    assert not torch.equal(labels(), first)
    torch.manual_seed(3)
    assert torch.equal(labels(), first)


# Distributions, with fixed seeds: a random seed would fail each chi-square limit once in 1000.


def big(device, rows=512, columns=1024):
    return torch.randint(5, VOCAB, (rows, columns), generator=torch.Generator().manual_seed(0)).to(device)


def check_actions(ids, masked, replace):
    """The fractions of the actions, and that random ids are uniform over the ids that are not special."""
    chosen = masked.labels != IGNORE
    before, after = masked.labels[chosen], masked.input_ids[chosen]
    assert torch.equal(masked.input_ids[~chosen], ids[~chosen])
    assert torch.equal(before, ids[chosen])
    special = {*SPECIAL, MASK}
    allowed = [i for i in range(VOCAB) if i not in special]
    n = before.numel()
    # A random id may equal the token, which then counts as kept.
    same = replace[1] / len(allowed) + 1 - replace[0] - replace[1]
    parts = torch.tensor([replace[0], replace[1] * (1 - 1 / len(allowed)), same], dtype=torch.float64)
    is_mask, is_same = after == MASK, after == before
    counts = torch.stack([is_mask.sum(), (~is_mask & ~is_same).sum(), is_same.sum()]).double().cpu()
    assert torch.equal(counts > 0, parts > 0)
    counts, parts = counts[parts > 0], parts[parts > 0]
    assert float(((counts - n * parts) ** 2 / (n * parts)).sum()) < chi_square_limit(len(parts) - 1)
    drawn = torch.bincount(after[~is_mask & ~is_same], minlength=VOCAB).double().cpu()
    assert drawn[list(i for i in special if 0 <= i < VOCAB)].sum() == 0
    # Uniform over the ids, except that a draw equal to the token is not visible.
    tokens = torch.bincount(before, minlength=VOCAB).double().cpu()
    expected = replace[1] / len(allowed) * (n - tokens[allowed])
    assert float(((drawn[allowed] - expected) ** 2 / expected).sum()) < chi_square_limit(len(allowed))


@pytest.mark.parametrize("replace", [(0.8, 0.1), (0.0, 0.9), (0.3, 0.3)])
def test_fractions_of_the_actions(device, replace):
    ids = big(device)
    options = {"mask_id": MASK, "vocab_size": VOCAB, "special_ids": SPECIAL}
    masked = sk.mask_tokens(ids, replace=replace, seed=11, **options)
    eligible = ~torch.isin(ids, torch.tensor([*SPECIAL, MASK], device=device))
    n = int(eligible.sum())
    count = int((masked.labels != IGNORE).sum())
    assert (count - 0.15 * n) ** 2 / (n * 0.15 * 0.85) < chi_square_limit(1)
    assert not ((masked.labels != IGNORE) & ~eligible).any()
    check_actions(ids, masked, replace)


def test_actions_with_whole_words(device):
    """transformers' whole-word masking replaces every chosen token by the mask, and needs a (B, T, T) tensor."""
    ids = big(device)
    word_ids = torch.arange(ids.shape[1], device=device).mul(2).div(5, rounding_mode="floor").expand_as(ids)
    masked = sk.mask_tokens(ids, mask_id=MASK, vocab_size=VOCAB, special_ids=SPECIAL, word_ids=word_ids, seed=12)
    check_actions(ids, masked, (0.8, 0.1))


def test_long_rows_take_linear_memory(device):
    """A mask of token pairs would take 16 GiB here."""
    columns = 2**17
    ids = torch.randint(5, VOCAB, (1, columns), device=device)
    word_ids = torch.arange(columns, device=device)[None] // 3
    masked = sk.mask_tokens(ids, mask_id=MASK, vocab_size=VOCAB, word_ids=word_ids, mean_span=3.0, seed=0)
    rate = float((masked.labels != IGNORE).double().mean())
    assert abs(rate - 0.15) < 0.02  # more than 8 standard deviations for 43691 words in spans of 3


def test_words_are_chosen_as_a_whole(device):
    """Words of 1 to 5 tokens, distinguished only by their ids, some adjacent, some with ineligible tokens."""
    g = torch.Generator().manual_seed(0)
    rows, columns = 64, 2048
    begins = torch.rand(rows, columns, generator=g) < 0.4
    begins[:, 0] = True
    word_ids = (begins.cumsum(1) % 97).to(device)
    run = (begins.flatten().cumsum(0) - 1).to(device)
    words = int(run[-1]) + 1
    ids = big(device, rows, columns)
    special_mask = (torch.rand(rows, columns, generator=g) < 0.2).to(device)
    masked = sk.mask_tokens(
        ids, mask_id=MASK, vocab_size=VOCAB, word_ids=word_ids, special_mask=special_mask, probability=0.3, seed=4
    )
    chosen = (masked.labels != IGNORE).flatten()
    eligible = (~special_mask & (ids != MASK)).flatten()
    assert not (chosen & ~eligible).any()
    in_word = torch.zeros(2, words, device=device).index_add_(1, run, torch.stack([chosen.float(), eligible.float()]))
    n = in_word[0] > 0
    assert torch.equal(in_word[0][n], in_word[1][n])
    considered = in_word[1] > 0
    count, total = int(n.sum()), int(considered.sum())
    assert (count - 0.3 * total) ** 2 / (total * 0.3 * 0.7) < chi_square_limit(1)


def test_a_negative_word_id_is_never_chosen(backend, device):
    data = {k: v.to(device) for k, v in example(4, 60).items()}
    masked = sk.mask_tokens(
        data["input_ids"], mask_id=MASK, vocab_size=VOCAB, word_ids=data["word_ids"], probability=1.0, seed=0
    )
    eligible = (data["word_ids"] >= 0) & (data["input_ids"] != MASK)
    assert torch.equal(masked.labels, torch.where(eligible, data["input_ids"], IGNORE))


@pytest.mark.parametrize(("probability", "mean_span"), [(0.15, 4.0), (0.3, 10.0), (0.15, 1.0)])
def test_spans_are_geometric_and_keep_the_rate(device, probability, mean_span):
    ids = big(device)
    rows, columns = ids.shape
    masked = sk.mask_tokens(ids, mask_id=MASK, vocab_size=VOCAB, probability=probability, mean_span=mean_span, seed=21)
    chosen = masked.labels != IGNORE
    assert not (ids == MASK).logical_and(chosen).any()

    ids = torch.where(ids == MASK, 5, ids)  # so that no ineligible token interrupts a span
    chosen = (
        sk.mask_tokens(ids, mask_id=MASK, vocab_size=VOCAB, probability=probability, mean_span=mean_span, seed=21)
        .labels.ne(IGNORE)
        .cpu()
    )
    correlation = 1 - 1 / mean_span - probability / (mean_span * (1 - probability))
    variance = probability * (1 - probability) / (rows * columns) * (1 + correlation) / (1 - correlation)
    assert (chosen.double().mean() - probability) ** 2 / variance < chi_square_limit(1)
    first = chosen[:, 0].double().mean()  # the chain starts in its stationary distribution
    assert (first - probability) ** 2 / (probability * (1 - probability) / rows) < chi_square_limit(1)

    # Lengths of the spans that begin far enough from the end of the row.
    reach = columns - math.ceil(20 * mean_span)
    starts = chosen[:, 1:reach] & ~chosen[:, : reach - 1]
    row, column = starts.nonzero().unbind(1)
    gap = torch.where(chosen, columns, torch.arange(columns)).flip(1).cummin(1).values.flip(1)  # next unchosen
    lengths = gap[row, column + 1] - (column + 1)
    n, top = lengths.numel(), max(2, math.ceil(3 * mean_span))
    assert abs(float(lengths.double().mean()) - mean_span) < 5 * mean_span / n**0.5
    stay = 1 - 1 / mean_span
    expected = n * torch.tensor([(1 - stay) * stay**i for i in range(top)] + [stay**top], dtype=torch.float64)
    counts = torch.bincount(lengths.clamp(max=top + 1) - 1, minlength=top + 1).double()
    if mean_span == 1:
        assert counts.tolist() == [n] + [0] * top
    else:
        assert float(((counts - expected) ** 2 / expected).sum()) < chi_square_limit(top)


def test_spans_of_words_are_counted_in_words(device):
    ids = torch.full((256, 3000), 7, device=device)
    word_ids = (torch.arange(3000, device=device) // 3).expand(256, 3000)
    masked = sk.mask_tokens(ids, mask_id=MASK, vocab_size=VOCAB, word_ids=word_ids, mean_span=4.0, seed=2)
    chosen = (masked.labels != IGNORE).reshape(256, 1000, 3)
    assert torch.equal(chosen.any(2), chosen.all(2))
    words = chosen[..., 0]
    spans = int(words[:, 0].sum() + (words[:, 1:] & ~words[:, :-1]).sum())
    assert (
        abs(float(words.sum()) / spans - 4.0) < 0.1
    )  # 9600 spans: more than 2.8 standard deviations, and truncated spans
    assert abs(float(words.double().mean()) - 0.15) < 0.0068  # 8 standard deviations


def test_the_mean_span_of_independent_tokens_gives_the_independent_choice(device):
    ids = big(device, 8, 300)
    plain = sk.mask_tokens(ids, mask_id=MASK, vocab_size=VOCAB, probability=0.5, seed=1)
    spans = sk.mask_tokens(ids, mask_id=MASK, vocab_size=VOCAB, probability=0.5, mean_span=2.0, seed=1)
    assert torch.equal(plain.labels, spans.labels)


@pytest.mark.parametrize("mode", MODES)
def test_probability_zero(backend, device, mode):
    data = {k: v.to(device) for k, v in example(3, 30).items()}
    options = dict(MODES[mode]) | ({"word_ids": data["word_ids"]} if "word_ids" in MODES[mode] else {})
    got = sk.mask_tokens(data["input_ids"], mask_id=MASK, vocab_size=VOCAB, probability=0, seed=0, **options)
    assert torch.equal(got.input_ids, data["input_ids"])
    assert (got.labels == IGNORE).all()


@pytest.mark.parametrize("replace", [(1, 0), (0, 1), (0, 0)])
def test_probability_one(backend, device, replace):
    ids = example(20, 31)["input_ids"].to(device)
    special = torch.isin(ids, torch.tensor([*SPECIAL, MASK], device=device))
    options = {"mask_id": MASK, "vocab_size": VOCAB, "special_ids": SPECIAL, "seed": 0}
    got = sk.mask_tokens(ids, probability=1, replace=replace, ignore_index=-7, **options)
    assert torch.equal(got.labels, torch.where(special, -7, ids))
    assert torch.equal(got.input_ids[special], ids[special])
    after = got.input_ids[~special]
    if replace == (1, 0):
        assert (after == MASK).all()
    elif replace == (0, 0):
        assert torch.equal(after, ids[~special])
    else:
        assert ((after >= 0) & (after < VOCAB)).all()
        assert not torch.isin(after, torch.tensor([*SPECIAL, MASK], device=device)).any()


def test_one_id_is_left_to_draw(backend, device):
    ids = torch.arange(8, device=device).repeat(4, 1)
    got = sk.mask_tokens(
        ids, mask_id=7, vocab_size=8, special_ids=(0, 1, 2, 4, 5, 6), probability=1.0, replace=(0, 1), seed=0
    )
    assert torch.equal(got.input_ids, ids)
    assert torch.equal(got.labels, torch.where(ids == 3, ids, IGNORE))


def test_special_ids_as_tensor_array_list_and_with_repeats(backend, device):
    ids = example(4, 40)["input_ids"].to(device)
    options = {"mask_id": MASK, "vocab_size": VOCAB, "probability": 0.5, "seed": 0}
    expected = sk.mask_tokens(ids, special_ids=SPECIAL, **options)
    array = torch.tensor(SPECIAL).numpy()
    for given in (torch.tensor(SPECIAL), torch.tensor(SPECIAL, dtype=torch.int32), array, [*SPECIAL, *SPECIAL, MASK]):
        got = sk.mask_tokens(ids, special_ids=given, **options)
        assert torch.equal(got.labels, expected.labels)
        assert torch.equal(got.input_ids, expected.input_ids)


@pytest.mark.parametrize(
    ("special_ids", "ranges", "allowed"),
    [
        ((), (4, 5), 9),
        ((5, 3), (3, 6), 7),
        ((-1, 0, 1), (-1, 0, 0, 2, 4, 5), 7),
        ((9, 10, 11), (4, 5, 9, 12), 8),
        ((-5, 12), (-5, -4, 4, 5, 12, 13), 9),
    ],
)
def test_special_ranges(special_ids, ranges, allowed):
    assert special_ranges(special_ids, 4, 10) == (ranges, allowed)


@pytest.mark.full_for(dynamic=False)
@pytest.mark.full_for(backend=("triton", "reference"))
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(backend, device, dynamic):
    def f(ids, word_ids, seed, span):
        masked = sk.mask_tokens(
            ids, mask_id=MASK, vocab_size=VOCAB, special_ids=SPECIAL, word_ids=word_ids, mean_span=span, seed=seed
        )
        return masked.input_ids * 2, masked.labels

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for columns in (9, 14):
        data = {k: v.to(device) for k, v in example(3, columns).items()}
        for word_ids, span in ((None, None), (data["word_ids"], 2.0)):
            arguments = (data["input_ids"], word_ids, torch.tensor(3, device=device), span)
            for got, expected in zip(compiled(*arguments), f(*arguments), strict=True):
                assert torch.equal(got, expected)


def test_compile_draws_anew_on_each_call(device):
    ids = big(device, 4, 256)

    @torch.compile(fullgraph=True)
    def f(ids):
        return sk.mask_tokens(ids, mask_id=MASK, vocab_size=VOCAB).labels

    torch.manual_seed(0)
    first, second = f(ids), f(ids)
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(f(ids), first)


@pytest.mark.full_for(backend="triton")
def test_opcheck(backend, device):
    data = {k: v.to(device) for k, v in example(3, 10).items()}
    seed = torch.tensor(3, device=device)
    arguments = (data["input_ids"], seed, None, data["word_ids"], None, [0, 1], MASK, VOCAB, 0.3, 0.8, 0.1, 2.0, -100)
    torch.library.opcheck(mask_tokens_fwd.raw, arguments)
    assert [t.shape for t in mask_tokens_fwd.raw(*arguments)] == [(3, 10)] * 2


IDS = torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"input_ids": [[1]]}, TypeError, "input_ids must be a torch.Tensor; got list"),
        ({"input_ids": IDS.float()}, TypeError, "input_ids must have dtype torch.int64, torch.int32, torch.int16 or"),
        ({"input_ids": IDS[0, 0]}, ValueError, r"input_ids must have shape \(..., T\)"),
        ({"mask_id": 4.0}, TypeError, "mask_id must be an int; got float"),
        ({"mask_id": -1}, ValueError, "mask_id must be at least 0"),
        ({"mask_id": 10}, ValueError, "mask_id must be less than vocab_size = 10; got 10"),
        ({"vocab_size": 0}, ValueError, "vocab_size must be at least 1"),
        ({"vocab_size": 2**31}, ValueError, "vocab_size must be at most 2147483647"),
        ({"vocab_size": None}, TypeError, "vocab_size must be an int; got NoneType"),
        ({"probability": 1.01}, ValueError, r"probability must be in \[0, 1\]"),
        ({"probability": -0.1}, ValueError, r"probability must be in \[0, 1\]"),
        ({"probability": float("nan")}, ValueError, r"probability must be in \[0, 1\]"),
        ({"probability": "0.15"}, TypeError, "probability must be a number; got str"),
        ({"replace": 0.8}, TypeError, "replace must be two numbers"),
        ({"replace": (0.8, 0.1, 0.1)}, TypeError, "replace must be two numbers"),
        ({"replace": (-0.1, 0.5)}, ValueError, r"replace must be in \[0, 1\]"),
        ({"replace": (0.8, 0.3)}, ValueError, "replace must have a sum of at most 1"),
        ({"replace": (0.8, "x")}, TypeError, "replace must be a number; got str"),
        ({"special_ids": 3}, TypeError, "special_ids must be a sequence of ints; got int"),
        ({"special_ids": "abc"}, TypeError, "special_ids must be a sequence of ints; got str"),
        ({"special_ids": (1, 2.5)}, TypeError, "special_ids must be an int; got float"),
        ({"special_ids": IDS}, ValueError, "special_ids must have shape"),
        ({"special_ids": torch.ones(2)}, TypeError, "special_ids must have dtype"),
        ({"special_ids": torch.ones(2, dtype=torch.int64, device="meta")}, ValueError, "special_ids must be ints or"),
        ({"special_ids": range(10)}, ValueError, r"replace\[1\] must be 0 where all ids of the vocabulary are special"),
        ({"special_mask": IDS.float()}, TypeError, "special_mask must have dtype torch.bool, torch.int64"),
        ({"attention_mask": IDS.float()}, TypeError, "attention_mask must have dtype torch.bool, torch.int64"),
        ({"special_mask": IDS[0].bool()}, ValueError, "special_mask must have shape input_ids.shape"),
        ({"special_mask": IDS.bool().to("meta")}, ValueError, "special_mask must be on the device of input_ids"),
        ({"word_ids": IDS.float()}, TypeError, "word_ids must have dtype torch.int64 or torch.int32"),
        ({"word_ids": IDS[:1]}, ValueError, "word_ids must have shape input_ids.shape"),
        ({"mean_span": 0.5}, ValueError, r"mean_span must be in \[1, inf\]"),
        ({"mean_span": float("nan")}, ValueError, r"mean_span must be in \[1, inf\]"),
        ({"mean_span": "3"}, TypeError, "mean_span must be a number"),
        ({"mean_span": 3.0, "probability": 0.8}, ValueError, "mean_span must be at least probability .* 0.8; got 3.0"),
        ({"mean_span": 3.0, "probability": 1}, ValueError, "mean_span must be at least probability"),
        ({"ignore_index": 1.0}, TypeError, "ignore_index must be an int"),
        ({"ignore_index": 2**31, "input_ids": IDS.int()}, ValueError, "ignore_index must fit in torch.int32"),
        ({"row_ids": torch.arange(3)}, ValueError, r"row_ids must have shape input_ids.shape\[:-1\]"),
        ({"row_ids": torch.arange(2).int()}, TypeError, "row_ids must have dtype torch.int64"),
        ({"seed": torch.zeros(2, dtype=torch.int64)}, ValueError, "seed must have shape"),
        ({"seed": 1, "generator": torch.Generator()}, ValueError, "generator must be None where seed is given"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_errors(options, error, message):
    arguments = {"input_ids": IDS, "mask_id": 4, "vocab_size": 10} | options
    with pytest.raises(error, match=message) as info:
        sk.mask_tokens(arguments.pop("input_ids"), **arguments)
    assert str(info.value).startswith("mask_tokens: ")


def test_all_ids_special_is_fine_without_random_ids(backend, device):
    ids = torch.full((2, 5), 30, device=device)
    got = sk.mask_tokens(ids, mask_id=4, vocab_size=10, special_ids=range(10), probability=1, replace=(0.5, 0), seed=0)
    assert (got.labels == 30).all()


def test_special_ids_at_the_edge_of_64_bits(backend, device):
    ids = torch.tensor([[2**63 - 2, 5, -(2**63), 6]], device=device)
    masked = sk.mask_tokens(ids, mask_id=1, vocab_size=9, probability=1.0, special_ids=[2**63 - 2, -(2**63)], seed=0)
    assert masked.labels.tolist() == [[-100, 5, -100, 6]]
    for special, must in ((2**63 - 1, r"be less than 2\*\*63 - 1"), (2**70, "fit in 64 bits")):
        with pytest.raises(ValueError, match=f"mask_tokens: special_ids must {must}; got {special}"):
            sk.mask_tokens(ids, mask_id=1, vocab_size=9, special_ids=[special])


@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_masker_takes_any_batch(strict):
    class Mask(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.masker = sk.nn.TokenMasker(mask_id=4, vocab_size=60, special_ids=(0, 1))

        def forward(self, ids, seed):
            return self.masker(ids, seed=seed)

    ids, seed = torch.randint(0, 60, (3, 16)), torch.tensor(5)
    batch, length = torch.export.Dim("batch", min=2), torch.export.Dim("length", min=2)
    shapes = {"ids": {0: batch, 1: length}, "seed": None}
    module = torch.export.export(Mask(), (ids, seed), dynamic_shapes=shapes, strict=strict).module()
    for shape in ((3, 16), (7, 13)):
        ids = torch.randint(0, 60, shape)
        for got, want in zip(module(ids, seed), Mask()(ids, seed), strict=True):
            assert torch.equal(got, want)


def few(device):
    """Rows of 0, 1, 2, 5 and 40 eligible tokens."""
    ids = torch.randint(12, 50, (5, 40), generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor([0, 1, 2, 5, 40])
    attention = (torch.arange(40) < lengths[:, None]).long()
    return ids.to(device), attention.to(device), lengths


@pytest.mark.parametrize("span", [None, 3.0])
@pytest.mark.parametrize("least", [0, 1, 3, 60])
def test_min_per_row_of_tokens(backend, device, least, span):
    ids, attention, lengths = few(device)
    options = {"mask_id": MASK, "vocab_size": VOCAB, "special_ids": SPECIAL, "seed": 5, "attention_mask": attention}
    masked = sk.mask_tokens(ids, min_per_row=least, mean_span=span, **options)
    plain = sk.mask_tokens(ids, mean_span=span, **options)
    chosen, before = (m.labels.cpu() != IGNORE for m in (masked, plain))
    assert not (before & ~chosen).any()
    assert torch.equal(chosen.sum(1), torch.maximum(before.sum(1), lengths.clamp(max=least)))
    both = before.to(device)
    assert torch.equal(masked.input_ids[both], plain.input_ids[both])
    draws = [[word(5, r, c, 40, 0) for c in range(40)] for r in range(5)]
    for r in range(5):  # the further ones have the smallest draws
        added = (chosen & ~before)[r].nonzero()[:, 0].tolist()
        left = (~chosen[r] & (attention[r].cpu() == 1)).nonzero()[:, 0].tolist()
        assert not added or not left or max(draws[r][c] for c in added) < min(draws[r][c] for c in left)


def test_min_per_row_of_words(backend, device):
    ids, _, _ = few(device)
    words = torch.arange(40, device=device).div(3, rounding_mode="floor").repeat(5, 1)
    words[1], words[2, 6:] = -1, -1
    options = {"mask_id": MASK, "vocab_size": VOCAB, "probability": 0.05, "seed": 3, "word_ids": words}
    masked = sk.mask_tokens(ids, min_per_row=4, **options)
    before = sk.mask_tokens(ids, **options).labels != IGNORE
    chosen = masked.labels != IGNORE
    assert not (before & ~chosen).any()
    for r, most in enumerate((14, 0, 2, 14, 14)):
        found = {int(w) for w in words[r][chosen[r]]}
        assert len(found) == min(most, max(4, len({int(w) for w in words[r][before[r]]})))
        assert all(bool(chosen[r][words[r] == w].all()) for w in found)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.int32, torch.uint8], ids=str)
def test_masks_of_ints(backend, device, dtype):
    ids, attention, _ = few(device)
    special = torch.rand(5, 40, generator=torch.Generator().manual_seed(0)).to(device) < 0.3
    options = {"mask_id": MASK, "vocab_size": VOCAB, "probability": 0.7, "seed": 2}
    got = sk.mask_tokens(ids, special_mask=special.to(dtype), attention_mask=attention.to(dtype), **options)
    want = sk.mask_tokens(ids, special_mask=special | (attention == 0), **options)
    assert torch.equal(got.labels, want.labels)
    assert torch.equal(got.input_ids, want.input_ids)
    module = sk.nn.TokenMasker(mask_id=MASK, vocab_size=VOCAB, probability=0.7, min_per_row=1)
    again = module(ids, special_mask=special, attention_mask=attention, seed=2)
    assert ((again.labels == got.labels) | (got.labels == IGNORE)).all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint16], ids=str)
def test_dtypes_of_ids(backend, device, dtype):
    ids = torch.randint(0, 30000, (4, 33), device=device)
    options = {"mask_id": 29999, "vocab_size": 30000, "probability": 0.5, "seed": 1}
    want, got = sk.mask_tokens(ids, **options), sk.mask_tokens(ids.to(dtype), **options)
    assert got.input_ids.dtype == dtype
    assert got.labels.dtype == (torch.int32 if dtype == torch.uint16 else dtype)
    assert torch.equal(got.input_ids.long(), want.input_ids)
    assert torch.equal(got.labels.long(), want.labels)
    if dtype == torch.int16:
        with pytest.raises(ValueError, match=r"vocab_size must be at most 32768 for torch.int16; got 40000"):
            sk.mask_tokens(ids.to(dtype), mask_id=1, vocab_size=40000)


def test_word_ids_as_tokenizers_give_them(backend, device):
    lists = [[None, 0, 0, 1, 2, None], [None, 0, 1, 1, 1, None]]
    tensor = torch.tensor([[-1, 0, 0, 1, 2, -1], [-1, 0, 1, 1, 1, -1]], device=device)
    ids = torch.arange(12, 24, device=device).view(2, 6)
    options = {"mask_id": MASK, "vocab_size": VOCAB, "probability": 0.5, "seed": 4}
    want = sk.mask_tokens(ids, word_ids=tensor, **options)
    assert torch.equal(sk.mask_tokens(ids, word_ids=lists, **options).labels, want.labels)
    row = sk.mask_tokens(ids[0], word_ids=tuple(lists[0]), **options)
    assert torch.equal(row.labels, want.labels[0])
    for words, kind, message in (
        ([[0, 1], [0]], ValueError, "word_ids must have rows of equal length; got ragged ones"),
        ([[0.5] * 6] * 2, TypeError, "word_ids must be an int; got float"),
        ("words", TypeError, "word_ids must be a tensor, or sequences of ints and None; got str"),
        ([[0] * 6], ValueError, "word_ids must have shape input_ids.shape"),
    ):
        with pytest.raises(kind, match=message):
            sk.mask_tokens(ids, word_ids=words, **options)
    for change in ({"min_per_row": -1}, {"attention_mask": torch.ones(2, 5, device=device).long()}):
        with pytest.raises(ValueError, match=f"mask_tokens: {next(iter(change))} must"):
            sk.mask_tokens(ids, **options, **change)
