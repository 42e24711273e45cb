"""glove_loss: its mathematics, its gradients, and how it composes with torch."""

from __future__ import annotations

import itertools
import json
import random
import re
from collections import Counter
from collections.abc import Iterator

import oracle
import pytest
import torch
from cases import DTYPES, REPEATED_DTYPES, Case, Tensors, error_is_at_most_that_of_eager, shapes_without_data
from cuda_graphs import captured
from kernel_files import kernels
from torch.utils.checkpoint import checkpoint

import sslkernels as sk
from benchmarks import memory
from sslkernels.contrastive.words import glove
from sslkernels.contrastive.words.glove import (
    Outputs,
    Pairs,
    Parameters,
    Wanted,
    glove_bwd,
    glove_fwd,
    glove_sparse_bwd,
)
from sslkernels.core import segment_sum

pytestmark = pytest.mark.pairwise

OP = "glove_loss"
NAMES = Parameters._fields
TABLES, BIASES = NAMES[:2], NAMES[2:]


def problem(device, *, pairs=23, words=(11, 9), dim=6, dtype=torch.float64, requires_grad=NAMES):
    """(pairs, parameters) by name; a word occurs about as often as in a text."""
    g = torch.Generator().manual_seed(1)

    def zipf(high):
        uniform = torch.rand(pairs, generator=g, dtype=torch.float64)
        return ((high + 1) ** uniform - 1).long().clamp_max(high - 1).to(device)

    count = torch.rand(pairs, generator=g, dtype=torch.float64) ** 3 * 300 + 0.1
    data = {"center": zipf(words[0]), "context": zipf(words[1]), "count": count.to(device, dtype)}
    shapes = ((words[0], dim), (words[1], dim), words[:1], words[1:])
    parameters = {
        name: torch.randn(shape, generator=g, dtype=torch.float64).to(device, dtype)
        for name, shape in zip(NAMES, shapes, strict=True)
    }
    for name in requires_grad:
        parameters[name].requires_grad_()
    return data, parameters


def gradients(loss, parameters, **options):
    return torch.autograd.grad(loss, list(parameters.values()), **options)


def exact(tensors):
    return {name: t.detach().double().requires_grad_() for name, t in tensors.items()}


def make_case(
    g: torch.Generator,
    rows: int,
    vocab: int,
    dim: int,
    *,
    batch: tuple[int, ...] = (),
    int32: bool = False,
    count: torch.dtype | None = None,
) -> tuple[Tensors, Tensors]:
    shape = batch or (rows,)
    shapes = zip(NAMES, ((vocab, dim), (vocab + 3, dim), (vocab,), (vocab + 3,)), strict=True)
    parameters = {name: torch.randn(size, generator=g) for name, size in shapes}
    highs = {"center": vocab, "context": vocab + 3}
    index = {name: torch.randint(high, shape, generator=g) for name, high in highs.items()}
    if int32:
        index = {name: i.int() for name, i in index.items()}
    counts = torch.rand(shape, generator=g) * 200 + 0.5
    return parameters, {**index, "count": counts if count is None else counts.ceil().to(count)}


def case(name: str, rows: int, vocab: int, dim: int, *, options: dict | None = None, **tensors) -> Case:
    return Case(OP, name, make_case, (rows, vocab, dim), tensors, options or {})


def cases() -> Iterator[Case]:
    yield case("plain", 37, 53, 19)
    yield case("aligned", 40, 30, 32)
    yield case("several_tiles", 9, 12, 300)
    yield case("one_pair", 1, 257, 8)
    yield case("one_word", 21, 1, 5)
    yield case("one_feature", 30, 12, 1)
    yield case("few_pairs_of_many_words", 6, 500, 12)
    yield case("batch", 0, 67, 24, batch=(3, 1, 11))
    yield case("int32", 40, 11, 6, int32=True, count=torch.int32)
    yield case("int64_counts", 40, 11, 6, count=torch.int64, options={"x_max": 10.0, "alpha": 0.5})
    for reduction in ("sum", "none"):
        yield case(reduction, 35, 23, 16, options={"reduction": reduction, "alpha": 0.0})


CASES = list(cases())
test_error_is_at_most_that_of_eager = pytest.mark.slow_for(name="triton", dtype=REPEATED_DTYPES)(
    error_is_at_most_that_of_eager(CASES)
)
test_shapes_without_data = shapes_without_data(CASES)


def by_hand(data, parameters, x_max, alpha):
    """(loss of each pair, the gradients of their sum), one pair after another in Python's floats."""
    u, v, b, c = (parameters[name].detach().double().cpu().tolist() for name in NAMES)
    grads = [torch.zeros(parameters[name].shape, dtype=torch.float64).tolist() for name in NAMES]
    losses = []
    for i, j, x in zip(*(data[name].cpu().flatten().tolist() for name in ("center", "context", "count")), strict=True):
        log = float(torch.tensor(x, dtype=torch.float64).log())
        weight = min((x / x_max) ** alpha, 1.0)
        error = sum(p * q for p, q in zip(u[i], v[j], strict=True)) + b[i] + c[j] - log
        losses.append(weight * error**2)
        slope = 2 * weight * error
        for k in range(len(u[i])):
            grads[0][i][k] += slope * v[j][k]
            grads[1][j][k] += slope * u[i][k]
        grads[2][i] += slope
        grads[3][j] += slope
    return torch.tensor(losses, dtype=torch.float64), [torch.tensor(g, dtype=torch.float64) for g in grads]


@pytest.mark.parametrize("seed", range(12))
def test_random_calls(backend, seed, device):
    """Whatever sizes, dtypes, options and frozen parameters: pair by pair in Python's floats."""
    r = random.Random(seed)
    dtype = r.choice(DTYPES)
    sizes = {"pairs": r.randint(1, 40), "words": (r.randint(1, 30), r.randint(1, 30)), "dim": r.choice([1, 3, 16, 70])}
    wanted = [name for name in NAMES if r.random() < 0.7] or ["context_bias"]
    data, parameters = problem(device, **sizes, dtype=dtype, requires_grad=wanted)
    if r.random() < 0.5:
        data["count"] = data["count"].float().ceil().to(r.choice([torch.int32, torch.int64]))
    if r.random() < 0.5:
        data["center"] = data["center"].int()
    options = {"x_max": r.choice([1, 30.0, 1000]), "alpha": r.choice([0, 0.75, 1.5, 2])}
    losses, true = by_hand(data, parameters, **options)
    leaves = {name: parameters[name] for name in wanted}
    sparse = r.random() < 0.5
    got = sk.glove_loss(**data, **parameters, **options, reduction="none", sparse=sparse)
    rounding = 100 * torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    assert oracle.error(got.cpu(), losses) < rounding
    got = sk.glove_loss(**data, **parameters, **options, reduction="sum", sparse=sparse)
    for name, grad in zip(wanted, gradients(3 * got, leaves), strict=True):
        assert grad.is_sparse == (sparse and name in TABLES)
        grad = grad.to_dense() if grad.is_sparse else grad
        assert grad.dtype == dtype
        assert oracle.error(grad.cpu(), 3 * true[NAMES.index(name)]) < rounding + 2 * torch.finfo(dtype).eps


def test_words_of_a_text(backend, device):
    """Ten steps on co-occurrences counted in the standard library's own text, as Pennington et al. count them: a pair
    that is d words apart adds 1 / d. The loss falls as the formula does in float64."""
    if backend == "triton" and device == "cpu":
        pytest.skip("the interpreter takes minutes for the pairs of a text")
    words = re.findall(r"[a-z]+", (json.__doc__ + json.decoder.__doc__ + json.JSONDecoder.__doc__).lower())
    number = {word: i for i, word in enumerate(sorted(set(words)))}
    table: Counter[tuple[int, int]] = Counter()
    for at, word in enumerate(words):
        for distance in range(1, 6):
            if at >= distance:
                pair = number[word], number[words[at - distance]]
                table[pair] += 1 / distance
                table[pair[::-1]] += 1 / distance
    center, context = (torch.tensor(index, device=device) for index in zip(*table, strict=True))
    count = torch.tensor(list(table.values()), device=device)
    size = len(number)
    assert len(table) > 500
    assert count.max() > 5 * count.median()
    g = torch.Generator().manual_seed(0)
    start = [torch.rand(s, generator=g) - 0.5 for s in ((size, 8), (size, 8), (size,), (size,))]
    runs = []
    for function, dtype in ((sk.glove_loss, torch.float32), (oracle.glove_loss, torch.float64)):
        leaves = [t.to(device, dtype, copy=True).requires_grad_() for t in start]
        optimizer = torch.optim.Adagrad(leaves, lr=0.1)
        losses = []
        for _ in range(10):
            optimizer.zero_grad()
            loss = function(center, context, count.to(dtype), *leaves, x_max=10.0)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        runs.append(losses)
    assert runs[0][-1] < 0.5 * runs[0][0]
    assert runs[0] == pytest.approx(runs[1], rel=1e-4)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("wanted", [c for n in range(5) for c in itertools.combinations(NAMES, n)], ids=str)
def test_every_subset_gets_the_same_gradients(wanted, reduction, sparse, device):
    data, parameters = problem(device)
    loss = sk.glove_loss(**data, **parameters, reduction=reduction)
    grad_output = torch.randn_like(loss)
    full = dict(zip(NAMES, gradients(loss, parameters, grad_outputs=grad_output), strict=True))
    data, parameters = problem(device, requires_grad=wanted)
    loss = sk.glove_loss(**data, **parameters, reduction=reduction, sparse=sparse)
    assert loss.requires_grad == bool(wanted)
    if wanted:
        loss.backward(grad_output)
    for name, parameter in parameters.items():
        grad = parameter.grad
        assert (grad is None) == (name not in wanted)
        if grad is not None:
            assert torch.equal(grad.to_dense() if grad.is_sparse else grad, full[name])


def test_only_wanted_gradients_are_computed(monkeypatch, device):
    computed = []
    original = glove._empty_gradients
    monkeypatch.setattr(glove, "_empty_gradients", lambda *args: computed.append(args[-1]) or original(*args))
    for name in NAMES:
        computed.clear()
        data, parameters = problem(device, requires_grad=(name,))
        sk.glove_loss(**data, **parameters).backward()
        assert computed == [Wanted(*(name == other for other in NAMES))]


@pytest.mark.slow_for(backend="triton", dtype=REPEATED_DTYPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("words", [(3, 4), (400, 300)])
def test_sparse_rows_equal_the_dense_gradient(backend, words, dtype, device):
    data, parameters = problem(device, words=words, dtype=dtype)
    dense = gradients(sk.glove_loss(**data, **parameters), parameters)
    found = gradients(sk.glove_loss(**data, **parameters, sparse=True), parameters)
    for got, true, index in zip(found[:2], dense[:2], (data["center"], data["context"]), strict=True):
        assert got.layout == torch.sparse_coo
        assert got.is_coalesced()
        assert torch.equal(got.indices()[0], index.unique())
        assert torch.equal(got.to_dense(), true)
    for got, true in zip(found[2:], dense[2:], strict=True):
        assert torch.equal(got, true)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.SparseAdam, torch.optim.Adagrad])
def test_optimizers_step_as_with_embeddings_of_glove(optimizer, device):
    data, parameters = problem(device, words=(40, 40))
    layers = [
        torch.nn.Embedding.from_pretrained(parameters[n].detach().clone(), freeze=False, sparse=True) for n in TABLES
    ]
    steps = [optimizer([parameters[n] for n in TABLES], lr=0.1), optimizer([m.weight for m in layers], lr=0.1)]
    biases = {name: parameters[name].detach() for name in BIASES}
    for _ in range(3):
        ours = sk.glove_loss(**data, **{n: parameters[n] for n in TABLES}, **biases, sparse=True)
        u, v = layers[0](data["center"]), layers[1](data["context"])
        b, c = biases["center_bias"][data["center"]], biases["context_bias"][data["context"]]
        error = (u * v).sum(1) + b + c - data["count"].log()
        theirs = ((data["count"] / 100).pow(0.75).clamp(max=1) * error.square()).mean()
        torch.testing.assert_close(ours, theirs)
        for loss, step in zip((ours, theirs), steps, strict=True):
            step.zero_grad()
            loss.backward()
            step.step()
    for name, layer in zip(TABLES, layers, strict=True):
        torch.testing.assert_close(parameters[name], layer.weight)


def test_one_table_for_both(backend, device):
    data, parameters = problem(device, words=(11, 11))
    table, bias = (parameters[name] for name in ("center_weight", "center_bias"))
    arguments = (*data.values(), table, table, bias, bias)
    got = torch.autograd.grad(sk.glove_loss(*arguments), (table, bias))
    truth = torch.autograd.grad(oracle.glove_loss(*arguments), (table, bias))
    for one, other in zip(got, truth, strict=True):
        torch.testing.assert_close(one, other)


def test_grad_output_of_every_kind(backend, device):
    data, parameters = problem(device)
    rows = sk.glove_loss(**data, **parameters, reduction="none")
    expanded = gradients(rows.sum(), parameters, retain_graph=True)
    dense = gradients(rows, parameters, grad_outputs=torch.ones_like(rows), retain_graph=True)
    strided = gradients(rows, parameters, grad_outputs=torch.ones(2 * len(rows), dtype=rows.dtype, device=device)[::2])
    for a, b, c in zip(expanded, dense, strided, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_second_backward_and_double_backward(backend, device):
    data, parameters = problem(device, dtype=torch.float32)
    loss = sk.glove_loss(**data, **parameters)
    first = gradients(loss, parameters, retain_graph=True)
    kept = [grad.clone() for grad in first]
    for grad in first:
        grad.mul_(7)
    for one, two in zip(kept, gradients(loss, parameters, retain_graph=True), strict=True):
        assert torch.equal(one, two)
    for name, sparse in itertools.product(NAMES, (False, True)):
        loss = sk.glove_loss(**data, **parameters, sparse=sparse)
        (grad,) = torch.autograd.grad(loss, parameters[name], create_graph=True)
        with pytest.raises(NotImplementedError, match=r"glove_loss: double backward"):
            (grad.to_dense() if grad.is_sparse else grad).sum().backward()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(reduction, device):
    data, parameters = problem(device, pairs=4, words=(4, 3), dim=3)

    def function(*leaves):
        return sk.glove_loss(**data, **dict(zip(NAMES, leaves, strict=True)), reduction=reduction)

    assert torch.autograd.gradcheck(function, tuple(parameters.values()))


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_pairs(backend, reduction, sparse, device):
    data, parameters = problem(device, pairs=0, dtype=torch.float32)
    loss = sk.glove_loss(**data, **parameters, reduction=reduction, sparse=sparse)
    assert loss.shape == ((0,) if reduction == "none" else ())
    assert reduction != "mean" or loss.isnan()
    if reduction == "mean":
        loss = sk.glove_loss(**data, **parameters, on_empty="zero", sparse=sparse)
        assert loss == 0
    loss.sum().backward()
    for parameter in parameters.values():
        assert torch.equal(parameter.grad.to_dense(), torch.zeros_like(parameter))


def test_shapes_and_strides(backend, device):
    """Batches, a single pair, mixed widths of indices, tensors that are not contiguous."""
    data, parameters = problem(device, pairs=12)
    expected = sk.glove_loss(**data, **parameters, reduction="none")
    batched = {name: t.reshape(3, 1, 4) for name, t in data.items()}
    assert torch.equal(sk.glove_loss(**batched, **parameters, reduction="none"), expected.reshape(3, 1, 4))
    assert torch.equal(sk.glove_loss(**{name: t[3] for name, t in data.items()}, **parameters), expected[3])
    mixed = {**data, "center": data["center"].int()}
    assert torch.equal(sk.glove_loss(**mixed, **parameters, reduction="none"), expected)
    strided = {name: t.repeat_interleave(2, 0)[::2] for name, t in data.items()}
    leaves = {name: p.detach().repeat_interleave(2, -1)[..., ::2].requires_grad_() for name, p in parameters.items()}
    loss = sk.glove_loss(**strided, **leaves, reduction="none")
    assert torch.equal(loss, expected)
    for got, true in zip(gradients(loss.sum(), leaves), gradients(expected.sum(), parameters), strict=True):
        assert torch.equal(got, true)


def test_counts_at_the_ends(backend, device):
    """0 adds nothing, from x_max on the weight is 1, negative counts and NaN give NaN, and infinity infinity."""
    data, parameters = problem(device, pairs=6)
    data["count"] = torch.tensor([0.0, 100, 1e30, -1, torch.nan, torch.inf], dtype=torch.float64, device=device)
    rows = sk.glove_loss(**data, **parameters, reduction="none")
    assert rows[0] == 0
    torch.testing.assert_close(rows[1:3], oracle.glove_loss(**data, **parameters, reduction="none")[1:3])
    assert rows[3:5].isnan().all()
    assert rows[5] == torch.inf
    finite = sk.glove_loss(**{name: t[:3] for name, t in data.items()}, **parameters)
    assert all(grad.isfinite().all() for grad in gradients(finite, parameters))
    heavy = sk.glove_loss(**data, **parameters, alpha=0.0, reduction="none")
    assert heavy[0] == torch.inf
    parameters["center_bias"].data[data["center"][0]] = torch.nan
    assert sk.glove_loss(**data, **parameters, reduction="none")[0].isnan()


def test_counts_keep_their_digits(device):
    """Counts of float64 are not rounded to half precision, or to float32, before the logarithm."""
    data, parameters = problem(device, dtype=torch.float16, requires_grad=())
    data["count"] = data["count"].double() * 1e30
    parameters = {name: torch.zeros_like(p) for name, p in parameters.items()}
    rows = sk.glove_loss(**data, **parameters, reduction="none")
    torch.testing.assert_close(rows.double(), data["count"].log().square(), rtol=1e-6, atol=0)


def test_nan_stays_in_its_pairs(backend, device):
    data, parameters = problem(device, words=(40, 40), pairs=12)
    parameters["context_weight"].data[data["context"][3], 2] = torch.nan
    loss, truth = (f.glove_loss(**data, **parameters, reduction="none") for f in (sk, oracle))
    assert 0 < loss.isnan().sum() < len(loss)
    torch.testing.assert_close(loss, truth, equal_nan=True)
    for got, true in zip(gradients(loss.sum(), parameters), gradients(truth.sum(), parameters), strict=True):
        torch.testing.assert_close(got, true, equal_nan=True)


@pytest.mark.full_for(backend="reference")
def test_half_precision_mean_over_many_pairs(backend, device):
    """1/N underflows in float16, and so does the gradient of a pair until the loss scale multiplies it."""
    if backend == "triton" and device == "cpu":
        pytest.skip("the interpreter takes minutes for 65536 pairs")
    data, parameters = problem(device, pairs=65536, words=(100, 65536), dim=8, dtype=torch.float16)
    leaves = exact(parameters)
    loss, truth = sk.glove_loss(**data, **parameters), oracle.glove_loss(**exact_data(data), **leaves)
    grads = gradients(loss * 65536.0, parameters), gradients(truth * 65536.0, leaves)
    for got, true in zip(*grads, strict=True):
        assert oracle.error(got, true) < torch.finfo(torch.float16).eps


def exact_data(data):
    return {name: t.double() if t.is_floating_point() else t for name, t in data.items()}


@pytest.mark.slow_for(backend="triton")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_bitwise_equal_from_run_to_run(backend, dtype, device):
    pairs = 40 if backend == "triton" and device == "cpu" else 20000
    data, parameters = problem(device, pairs=pairs, words=(300, 300), dim=33, dtype=dtype)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, threads):
            torch.set_num_threads(count)
            loss = sk.glove_loss(**data, **parameters, reduction="none")
            results.append((loss, *gradients(loss.sum(), parameters)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_memory(backend, device):
    """Peak memory beyond the gradients is a few numbers per pair, a tenth of an (N, D) tensor (64 MiB here)."""
    if backend in ("reference", "triton"):
        pytest.skip("the reference gathers all rows; the interpreter copies tensors")
    data, parameters = problem(device, pairs=65536, words=(1000, 1000), dim=256, dtype=torch.float32)
    run = lambda: gradients(sk.glove_loss(**data, **parameters), parameters)  # noqa: E731
    run()
    peak, grads = memory.peak_extra(run, torch.device(device))
    if peak is None:
        pytest.skip("this system has no resettable peak resident set")
    assert peak - sum(grad.nbytes for grad in grads) < 7 << 20


@pytest.mark.slow_for(backend=("triton", "reference"))
@pytest.mark.full
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_equals_eager(backend, dynamic, device, compiler):
    torch._dynamo.reset()

    def step(center, context, count, u, v, b, c, x_max):
        return 3 * sk.glove_loss(center, context, count, 2 * u, v, b, c, x_max=x_max)

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend=compiler)
    for pairs, x_max in ((13, 50.0), (9, 30.0), (17, 31.5)):
        data, parameters = problem(device, pairs=pairs, dtype=torch.float32)
        arguments = (*data.values(), *parameters.values(), x_max)
        loss, expected = compiled(*arguments), step(*arguments)
        torch.testing.assert_close(loss, expected)
        for got, true in zip(gradients(loss, parameters), gradients(expected, parameters), strict=True):
            torch.testing.assert_close(got, true)


@pytest.mark.full_for(backend="triton")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(backend, use_reentrant, device):
    data, parameters = problem(device)

    def head(u, v, b, c):
        return sk.glove_loss(*data.values(), u.tanh(), v, b, c)

    expected = gradients(head(*parameters.values()), parameters)
    checkpoint(head, *parameters.values(), use_reentrant=use_reentrant).backward()
    for parameter, true in zip(parameters.values(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, true)


def test_functional_transforms(device):
    data, parameters = problem(device, requires_grad=())

    def loss_of(function):
        return lambda *arguments: function(*arguments[4:], *arguments[:4])

    arguments = (*parameters.values(), *data.values())
    ours, truth = loss_of(sk.glove_loss), loss_of(oracle.glove_loss)
    for argnums in (0, (2, 3), (0, 1, 2, 3)):
        got = torch.func.grad(ours, argnums=argnums)(*arguments)
        torch.testing.assert_close(got, torch.func.grad(truth, argnums=argnums)(*arguments))
    options = {"in_dims": (None,) * 4 + (0,) * 3}
    got = torch.func.vmap(torch.func.grad(ours, argnums=(0, 3)), **options)(*arguments)
    torch.testing.assert_close(got, torch.func.vmap(torch.func.grad(truth, argnums=(0, 3)), **options)(*arguments))


def test_no_transform_differentiates_the_count(device):
    data, parameters = problem(device, requires_grad=())

    def loss(count):
        return sk.glove_loss(data["center"], data["context"], count, **parameters)

    counts = data["count"].expand(2, -1)
    for function in (loss, lambda count: torch.func.vmap(loss)(counts * count).sum()):
        with pytest.raises(ValueError, match=r"glove_loss: count must be data, without a gradient"):
            torch.func.grad(function)(data["count"])


def test_autocast_keeps_the_tables(device):
    data, parameters = problem(device, dtype=torch.float32)
    expected = sk.glove_loss(**data, **parameters)
    with torch.autocast(device, torch.bfloat16):
        assert torch.equal(sk.glove_loss(**data, **parameters), expected)
        mixed = {**parameters, "context_weight": parameters["context_weight"].detach().bfloat16().requires_grad_()}
        loss = sk.glove_loss(**data, **mixed)
    assert loss.dtype == torch.float32
    leaves = exact(mixed)
    truth = oracle.glove_loss(**exact_data(data), **leaves)
    for got, true, leaf in zip(gradients(loss, mixed), gradients(truth, leaves), mixed.values(), strict=True):
        assert got.dtype == leaf.dtype
        assert oracle.error(got, true) < 8 * torch.finfo(torch.float32).eps + torch.finfo(leaf.dtype).eps


def raw_arguments(device, dtype=torch.float16):
    data, parameters = problem(device, requires_grad=(), dtype=dtype)
    target, weight = glove._targets(data.pop("count"), 100.0, 0.75, torch.float32)
    return Parameters(**parameters), Pairs(**data, target=target, weight=weight)


@pytest.mark.full_for(backend="triton")
@pytest.mark.parametrize("wanted", [(True,) * 4, (False, True, True, False), (False,) * 4])
def test_opcheck(backend, wanted, device):
    parameters, pairs = raw_arguments(device)
    wanted = Wanted(*wanted)
    torch.library.opcheck(glove_fwd.raw, tuple(glove_fwd.inputs.pack((parameters, pairs, wanted))))
    outputs = glove_fwd(parameters, pairs, Wanted(*(True,) * 4))
    backward = (outputs.loss, parameters, pairs, outputs.slope, wanted)
    torch.library.opcheck(glove_bwd.raw, tuple(glove_bwd.inputs.pack(backward)))
    tests = ("test_schema", "test_autograd_registration")  # the fake's rows are as many as can differ
    torch.library.opcheck(glove_sparse_bwd.raw, tuple(glove_sparse_bwd.inputs.pack(backward)), test_utils=tests)
    for grad, want, leaf in zip(glove_bwd(*backward), wanted, parameters, strict=True):
        assert grad.shape == (leaf.shape if want else (0,))


def test_index_out_of_range_makes_its_pair_nan(backend, device):
    """As on a GPU: no memory outside the tables is read, and only rows of the pair have NaN gradients."""
    fills = {"reference": glove._fill_reference, "triton": glove._fill_triton}
    if backend not in fills:
        pytest.skip("tests/cuda_host/test_host_glove.py")
    parameters, pairs = raw_arguments(device, torch.float32)
    pairs.center[0], pairs.context[2], pairs.context[5] = 2**40, -1, 9
    wrong = torch.zeros(23, dtype=torch.bool, device=device)
    wrong[[0, 2, 5]] = True
    outputs = Outputs(*(torch.empty(23, device=device) for _ in range(2)))
    fills[backend](parameters, pairs, outputs)
    for part in outputs:
        assert torch.equal(part.isnan(), wrong)
    gradients = segment_sum.SUMS[backend], outputs.slope, parameters, pairs, outputs.slope, Wanted(*(True,) * 4)
    for grad, index in zip(glove._bwd(*gradients), (pairs.center, pairs.context) * 2, strict=True):
        rows = index[wrong]
        touched = torch.zeros(grad.shape[0], dtype=torch.bool, device=device)
        touched[rows[(rows >= 0) & (rows < grad.shape[0])]] = True
        assert torch.equal(grad.reshape(grad.shape[0], -1).isnan().all(1), touched)


DATA, LEAVES = problem("cpu", pairs=4, words=(5, 5), dim=3, dtype=torch.float32, requires_grad=())
VALID = DATA | LEAVES
ERRORS = [
    (dict(center=[1]), TypeError, r"center must be a torch.Tensor; got list"),
    (dict(center=torch.rand(4)), TypeError, r"center must have dtype torch.int64 or torch.int32; got torch.float32"),
    (dict(context=torch.zeros(3, dtype=torch.int64)), ValueError, r"context must have shape .* = \(4,\); got \(3,\)"),
    (dict(count=torch.ones(3)), ValueError, r"count must have shape center.shape = \(4,\); got \(3,\)"),
    (dict(count=torch.ones(4).bool()), TypeError, r"count must have dtype"),
    (
        dict(count=torch.ones(4, requires_grad=True)),
        ValueError,
        r"count must be data, without a gradient; got a tensor that requires grad",
    ),
    (dict(center_weight=torch.randn(5)), ValueError, r"center_weight must have shape \(V, D\); got \(5,\)"),
    (dict(center_weight=torch.ones(5, 3).long()), TypeError, r"center_weight must have dtype"),
    (dict(context_weight=torch.randn(5, 4)), ValueError, r"context_weight must have shape .*= \(5, 3\); got \(5, 4\)"),
    (
        dict(context_weight=torch.randn(0, 3), context_bias=torch.randn(0)),
        ValueError,
        r"context_weight must have at least one row; got \(0, 3\)",
    ),
    (dict(center_bias=torch.randn(5, 1)), ValueError, r"center_bias must have shape \(V,\) = \(5,\); got \(5, 1\)"),
    (dict(context_bias=torch.randn(4)), ValueError, r"context_bias must have shape \(V2,\) = \(5,\); got \(4,\)"),
    (
        dict(context_bias=torch.randn(5).half()),
        TypeError,
        r"context_bias must have the dtype of center_weight, torch.float32, outside autocast; got torch.float16",
    ),
    (
        dict(center_weight=torch.randn(5, 3, device="meta")),
        ValueError,
        r"center_weight must be on the device of center, cpu",
    ),
    (dict(center=torch.tensor([0, 1, 5, 2])), ValueError, r"center must be in \[0, 5\); got 5"),
    (dict(context=torch.tensor([0, 1, -1, 2])), ValueError, r"context must be in \[0, 5\); got -1"),
    (dict(x_max=0), ValueError, r"x_max must be in \(0, 3.40282e\+38\]; got 0"),
    (dict(alpha=-0.5), ValueError, r"alpha must be in \[0, 3.40282e\+38\]; got -0.5"),
    (dict(reduction="avg"), ValueError, r"reduction must be 'none', 'mean' or 'sum'; got 'avg'"),
    (dict(on_empty="one"), ValueError, r"on_empty must be 'nan' or 'zero'; got 'one'"),
    (dict(sparse=1), TypeError, r"sparse must be a bool; got int"),
]


@pytest.mark.parametrize(
    ("change", "kind", "message"), ERRORS, ids=lambda v: next(iter(v)) if isinstance(v, dict) else ""
)
def test_errors(backend, change, kind, message):
    with pytest.raises(kind, match=r"^glove_loss: " + message):
        sk.glove_loss(**{**VALID, **change})


def test_sparse_gradients_are_refused_inside_compile():
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"sparse=True is not supported inside torch.compile"):
        torch.compile(lambda: sk.glove_loss(**VALID, sparse=True), fullgraph=True, backend="eager")()


@kernels("glove_loss")
@pytest.mark.gpu
def test_nothing_synchronises_and_a_graph_replays(backend):
    if backend == "reference":
        pytest.skip("the reference may synchronise")
    torch.use_deterministic_algorithms(False)
    data, parameters = problem("cuda", pairs=1000, words=(300, 300), dim=64, dtype=torch.float32)

    def step():
        return gradients(sk.glove_loss(**data, **parameters), parameters)

    expected = step()
    graph, got = captured(step)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
