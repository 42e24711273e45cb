"""negative_sampling_loss: its mathematics, its gradients, and how it composes with torch."""

from __future__ import annotations

import itertools
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
from sslkernels.contrastive.words import word2vec
from sslkernels.contrastive.words.word2vec import (
    Indices,
    Outputs,
    Tables,
    Wanted,
    negative_sampling_bwd,
    negative_sampling_fwd,
)
from sslkernels.core import segment_sum

pytestmark = pytest.mark.pairwise

OP = "negative_sampling_loss"
TABLES = ("center_weight", "context_weight")


def problem(device, *, pairs=23, negatives=4, words=11, dim=6, dtype=torch.float64, requires_grad=TABLES, zipf=False):
    """(indices, tables) by name."""
    g = torch.Generator().manual_seed(1)

    def draw(*shape):
        uniform = torch.rand(shape, generator=g, dtype=torch.float64)
        return ((words + 1) ** uniform - 1 if zipf else words * uniform).long().clamp_max(words - 1).to(device)

    indices = {"center": draw(pairs), "context": draw(pairs), "negatives": draw(pairs, negatives)}
    tables = {n: torch.randn(words, dim, generator=g, dtype=torch.float64).to(device, dtype) for n in TABLES}
    for name in requires_grad:
        tables[name].requires_grad_()
    return indices, tables


def exact(tables):
    return {name: table.detach().double().requires_grad_() for name, table in tables.items()}


def gradients(loss, tables, **options):
    return torch.autograd.grad(loss, list(tables.values()), **options)


def make_case(
    g: torch.Generator,
    rows: int,
    vocab: int,
    dim: int,
    *,
    batch: tuple[int, ...] = (),
    spread: float = 1.0,
    negatives: int = 5,
    int32: bool = False,
    lowest: int = 0,
) -> tuple[Tensors, Tensors]:
    shape = batch or (rows,)
    sizes = {"center": shape, "context": shape, "negatives": (*shape, negatives)}
    tables = {name: spread * torch.randn(vocab, dim, generator=g) for name in TABLES}
    lows = {"center": 0, "context": 0, "negatives": lowest}
    draws = {name: torch.randint(lows[name], vocab, size, generator=g) for name, size in sizes.items()}
    return tables, {name: draw.to(torch.int32 if int32 else torch.int64) for name, draw in draws.items()}


def case(name: str, rows: int, vocab: int, dim: int, *, options: dict | None = None, **tensors) -> Case:
    return Case(OP, name, make_case, (rows, vocab, dim), tensors, options or {})


def cases() -> Iterator[Case]:
    yield case("plain", 37, 53, 19)
    yield case("aligned", 40, 30, 32)
    yield case("several_tiles", 9, 12, 300, spread=0.2)
    yield case("one_pair", 1, 257, 8)
    yield case("two_words", 21, 2, 5)
    yield case("one_feature", 30, 12, 1)
    yield case("one_negative", 30, 17, 16, negatives=1)
    yield case("no_negatives", 30, 17, 16, negatives=0)
    yield case("many_negatives", 11, 90, 16, negatives=70)
    yield case("large_scores", 33, 41, 16, spread=4.0)
    yield case("few_pairs_of_many_words", 6, 500, 12)
    yield case("batch", 0, 67, 24, batch=(3, 1, 11))
    yield case("int32", 40, 11, 6, int32=True, lowest=-1)
    yield case("negatives_of_none", 33, 2, 16, lowest=-1)
    for reduction in ("sum", "none"):
        yield case(reduction, 35, 23, 16, options={"reduction": reduction})
    for reduction in ("mean", "none"):
        options = {"exclude_positive": True, "reduction": reduction}
        yield case(f"exclude_positive_{reduction}", 35, 7, 16, options=options)


CASES = list(cases())
test_error_is_at_most_that_of_eager = pytest.mark.slow_for(name="triton", dtype=REPEATED_DTYPES)(
    error_is_at_most_that_of_eager(CASES)
)
test_shapes_without_data = shapes_without_data(CASES)


@pytest.mark.slow_for(backend="triton")
@pytest.mark.full_for(backend="triton", dtype=REPEATED_DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("exclude_positive", [False, True])
def test_zipf_distributed_words(backend, exclude_positive, dtype, device):
    pairs = 60 if backend == "triton" and device == "cpu" else 5000
    indices, tables = problem(device, pairs=pairs, words=400, dim=36, dtype=dtype, zipf=True)
    assert pairs < 1000 or torch.bincount(indices["context"]).max() > 0.05 * pairs
    loss = sk.negative_sampling_loss(**indices, **tables, exclude_positive=exclude_positive)
    leaves = exact(tables)
    truth = oracle.negative_sampling_loss(**indices, **leaves, exclude_positive=exclude_positive)
    rounding = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    assert oracle.error(loss, truth) < 16 * rounding
    for got, true in zip(gradients(loss, tables), gradients(truth, leaves), strict=True):
        assert got.dtype == dtype
        assert oracle.error(got, true) < 16 * rounding + torch.finfo(dtype).eps


def test_excluded_negatives_equal_fewer_negatives(backend, device):
    indices, tables = problem(device, pairs=5, words=3)
    indices["negatives"][:, 1] = indices["context"]
    indices["negatives"][:, 3] = (indices["context"] + 1) % 3
    kept = {**indices, "negatives": indices["negatives"][:, [0, 2, 3]]}
    kept["negatives"][:, :2] = indices["negatives"][:, [3, 3]]
    indices["negatives"][:, [0, 2]] = indices["negatives"][:, [3, 3]]
    loss = sk.negative_sampling_loss(**indices, **tables, exclude_positive=True)
    expected = sk.negative_sampling_loss(**kept, **tables)
    torch.testing.assert_close(loss, expected)
    for got, true in zip(gradients(loss, tables), gradients(expected, tables), strict=True):
        torch.testing.assert_close(got, true)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_weights_of_pairs(backend, reduction, sparse, device):
    indices, tables = problem(device)
    weight = torch.rand_like(indices["center"], dtype=torch.float32).requires_grad_()
    rows = sk.negative_sampling_loss(**indices, **tables, reduction="none", sparse=sparse) * weight
    expected = rows if reduction == "none" else getattr(rows, reduction)()
    loss = sk.negative_sampling_loss(**indices, **tables, pair_weight=weight, reduction=reduction, sparse=sparse)
    torch.testing.assert_close(loss, expected)
    leaves = {**tables, "weight": weight}
    for got, true in zip(gradients(loss.sum(), leaves), gradients(expected.sum(), leaves), strict=True):
        torch.testing.assert_close(got.to_dense(), true.to_dense())
    with pytest.raises(
        ValueError, match=r"negative_sampling_loss: pair_weight must have shape \(\.\.\.\), as center ="
    ):
        sk.negative_sampling_loss(**indices, **tables, pair_weight=weight[:2])


@pytest.mark.slow_for(backend="triton")
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_every_subset_of_tables_gets_the_same_gradients(backend, reduction, device):
    indices, tables = problem(device)
    loss = sk.negative_sampling_loss(**indices, **tables, reduction=reduction)
    grad_output = torch.randn_like(loss)
    full = dict(zip(TABLES, gradients(loss, tables, grad_outputs=grad_output), strict=True))
    for name in TABLES:
        indices, tables = problem(device, requires_grad=(name,))
        sk.negative_sampling_loss(**indices, **tables, reduction=reduction).backward(grad_output)
        for other, table in tables.items():
            assert table.grad is None if other != name else torch.equal(table.grad, full[name])
    indices, tables = problem(device, requires_grad=())
    assert not sk.negative_sampling_loss(**indices, **tables).requires_grad


def test_only_wanted_gradients_are_computed(monkeypatch, device):
    computed = []

    def spy(name):
        original = getattr(word2vec, name)
        monkeypatch.setattr(word2vec, name, lambda *args: computed.append(args[-1]) or original(*args))

    spy("_empty_outputs")
    spy("_empty_gradients")
    for name in TABLES:
        computed.clear()
        indices, tables = problem(device, requires_grad=(name,))
        sk.negative_sampling_loss(**indices, **tables).backward()
        assert computed == [Wanted(name == "center_weight", name == "context_weight")] * 2
    computed.clear()
    with torch.no_grad():
        sk.negative_sampling_loss(**indices, **tables)
    assert computed == [Wanted(False, False)]


def test_one_table_for_both(backend, device):
    indices, tables = problem(device)
    table = tables["center_weight"]
    (got,) = torch.autograd.grad(sk.negative_sampling_loss(**indices, center_weight=table, context_weight=table), table)
    truth = oracle.negative_sampling_loss(**indices, center_weight=table, context_weight=table)
    torch.testing.assert_close(got, torch.autograd.grad(truth, table)[0])


def test_tables_of_different_lengths(backend, device):
    indices, tables = problem(device)
    tables["center_weight"] = torch.randn(40, 6, dtype=torch.float64, device=device, requires_grad=True)
    indices["center"][0] = 39
    loss = sk.negative_sampling_loss(**indices, **tables)
    truth = oracle.negative_sampling_loss(**indices, **tables)
    torch.testing.assert_close(loss, truth)
    for got, true in zip(gradients(loss, tables), gradients(truth, tables), strict=True):
        torch.testing.assert_close(got, true)


def test_grad_output_of_every_kind(backend, device):
    indices, tables = problem(device)
    rows = sk.negative_sampling_loss(**indices, **tables, reduction="none")
    expanded = gradients(rows.sum(), tables, retain_graph=True)
    dense = gradients(rows, tables, grad_outputs=torch.ones_like(rows), retain_graph=True)
    strided = gradients(rows, tables, grad_outputs=torch.ones(2 * len(rows), dtype=rows.dtype, device=device)[::2])
    for a, b, c in zip(expanded, dense, strided, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    loss, truth = (f.negative_sampling_loss(**indices, **tables) for f in (sk, oracle))
    for a, b in zip(gradients(loss.square(), tables), gradients(truth.square(), tables), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.full_for(backend="triton")
def test_second_backward_gives_the_same_gradients(backend, device):
    indices, tables = problem(device, dtype=torch.float32)
    loss = sk.negative_sampling_loss(**indices, **tables)
    first = gradients(loss, tables, retain_graph=True)
    kept = [grad.clone() for grad in first]
    for grad in first:
        grad.mul_(7)
    second = gradients(loss, tables, retain_graph=True)
    half = gradients(loss, tables, grad_outputs=loss.new_tensor(0.5))
    for one, two, three in zip(kept, second, half, strict=True):
        assert torch.equal(one, two)
        torch.testing.assert_close(one, 2 * three)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_double_backward_raises(device):
    indices, tables = problem(device)
    for name, other in (TABLES, TABLES[::-1]):
        loss = sk.negative_sampling_loss(**indices, **tables)
        (grad,) = torch.autograd.grad(loss, tables[name], create_graph=True)
        with pytest.raises(NotImplementedError, match=r"negative_sampling_loss: double backward"):
            (grad.square().sum() + tables[other].square().sum()).backward()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(backend, reduction, device):
    if backend == "triton":
        pytest.skip("the numerical Jacobian runs the interpreter hundreds of times; test_backends covers its gradients")
    indices, tables = problem(device, pairs=4, negatives=2, words=4, dim=3)

    def function(u, v):
        return sk.negative_sampling_loss(**indices, center_weight=u, context_weight=v, reduction=reduction)

    assert torch.autograd.gradcheck(function, tuple(tables.values()))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_pairs(backend, reduction, device):
    indices, tables = problem(device, pairs=0, dtype=torch.float32)
    loss = sk.negative_sampling_loss(**indices, **tables, reduction=reduction)
    assert loss.shape == ((0,) if reduction == "none" else ())
    assert reduction != "mean" or loss.isnan()
    if reduction == "mean":
        loss = sk.negative_sampling_loss(**indices, **tables, on_empty="zero")
        assert loss == 0
    loss.sum().backward()
    for table in tables.values():
        assert torch.equal(table.grad, torch.zeros_like(table))


def test_shapes_and_strides(backend, device):
    """Batches, a single pair, mixed widths of indices, tables and indices that are not contiguous."""
    indices, tables = problem(device, pairs=12)
    expected = sk.negative_sampling_loss(**indices, **tables, reduction="none")
    batched = {name: index.reshape(3, 1, 4, *index.shape[1:]) for name, index in indices.items()}
    assert torch.equal(sk.negative_sampling_loss(**batched, **tables, reduction="none"), expected.reshape(3, 1, 4))
    single = {name: index[3] for name, index in indices.items()}
    assert torch.equal(sk.negative_sampling_loss(**single, **tables), expected[3])
    mixed = {**indices, "center": indices["center"].int(), "negatives": indices["negatives"].int()}
    assert torch.equal(sk.negative_sampling_loss(**mixed, **tables, reduction="none"), expected)
    strided = {name: index.repeat_interleave(2, 0)[::2] for name, index in indices.items()}
    transposed = {name: table.detach().t().contiguous().t().requires_grad_() for name, table in tables.items()}
    loss = sk.negative_sampling_loss(**strided, **transposed, reduction="none")
    assert torch.equal(loss, expected)
    for got, true in zip(gradients(loss.sum(), transposed), gradients(expected.sum(), tables), strict=True):
        assert torch.equal(got, true)


@pytest.mark.parametrize("score", [30.0, 200.0, 1e4])
def test_scores_far_from_zero(backend, score, device):
    """The loss of a confident pair keeps its relative accuracy; the loss of a wrong one does not overflow."""
    u = torch.tensor([[1.0], [-1.0]], device=device, requires_grad=True)
    v = torch.tensor([[score], [-score]], device=device, requires_grad=True)
    center, context = torch.tensor([0, 1], device=device), torch.tensor([0, 0], device=device)
    negatives = torch.tensor([[1], [0]], device=device)
    loss = sk.negative_sampling_loss(center, context, negatives, u, v, reduction="none")
    leaves = {
        "center_weight": u.detach().double().requires_grad_(),
        "context_weight": v.detach().double().requires_grad_(),
    }
    truth = oracle.negative_sampling_loss(center, context, negatives, **leaves, reduction="none")
    smallest = torch.finfo(torch.float32).tiny
    torch.testing.assert_close(loss.double(), truth, rtol=1e-6, atol=smallest)
    for got, true in zip(torch.autograd.grad(loss.sum(), (u, v)), gradients(truth.sum(), leaves), strict=True):
        torch.testing.assert_close(got.double(), true, rtol=1e-6, atol=2 * score * smallest)


def test_nan_stays_in_its_rows(backend, device):
    indices, tables = problem(device, words=40, pairs=12)
    with torch.no_grad():
        tables["context_weight"][7] = float("nan")
    loss, truth = (f.negative_sampling_loss(**indices, **tables, reduction="none") for f in (sk, oracle))
    assert 0 < loss.isnan().sum() < len(loss)
    torch.testing.assert_close(loss, truth, equal_nan=True)
    for got, true in zip(gradients(loss.sum(), tables), gradients(truth.sum(), tables), strict=True):
        torch.testing.assert_close(got, true, equal_nan=True)


@pytest.mark.parametrize("words", [100, 65536])
def test_half_precision_mean_over_many_pairs(backend, words, device):
    """1/N underflows in float16, and so does the gradient of a pair until the loss scale multiplies it."""
    if backend == "triton" and device == "cpu":
        pytest.skip("the interpreter takes minutes for 65536 pairs")
    indices, tables = problem(device, pairs=65536, words=words, dim=8, dtype=torch.float16)
    loss = sk.negative_sampling_loss(**indices, **tables)
    leaves = exact(tables)
    truth = oracle.negative_sampling_loss(**indices, **leaves)
    scale = 65536.0
    for got, true in zip(gradients(loss * scale, tables), gradients(truth * scale, leaves), strict=True):
        assert oracle.error(got, true) < torch.finfo(torch.float16).eps


@pytest.mark.slow_for(backend="triton")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_bitwise_equal_from_run_to_run(backend, dtype, device):
    pairs = 40 if backend == "triton" and device == "cpu" else 20000
    indices, tables = problem(device, pairs=pairs, words=300, dim=33, dtype=dtype, zipf=True)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, threads):
            torch.set_num_threads(count)
            loss = sk.negative_sampling_loss(**indices, **tables, reduction="none")
            results.append((loss, *gradients(loss.sum(), tables)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_memory(backend, device):
    """Peak memory beyond the gradients stays below half an (N, K, D) tensor (64 MiB here)."""
    if backend in ("reference", "triton"):
        pytest.skip("the reference gathers all rows; the interpreter copies tensors")
    indices, tables = problem(device, pairs=16384, negatives=16, words=1000, dim=64, dtype=torch.float32)
    run = lambda: gradients(sk.negative_sampling_loss(**indices, **tables), tables)  # noqa: E731
    run()
    peak, grads = memory.peak_extra(run, torch.device(device))
    if peak is None:
        pytest.skip("this system has no resettable peak resident set")
    assert peak - sum(grad.nbytes for grad in grads) < 32 << 20


@pytest.mark.full_for(backend=("triton", "reference"))
@pytest.mark.full_for(dynamic=False)
@pytest.mark.costly("the compiler")
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_equals_eager(backend, dynamic, device, compiler):
    torch._dynamo.reset()

    def step(center, context, negatives, u, v):
        options = {"reduction": "mean", "exclude_positive": True}
        return 3 * sk.negative_sampling_loss(center, context, negatives, 2 * u, v, **options)

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend=compiler)
    for pairs in (13, 9):
        indices, tables = problem(device, pairs=pairs, negatives=pairs - 5, dtype=torch.float32)
        arguments = (*indices.values(), *tables.values())
        loss, expected = compiled(*arguments), step(*arguments)
        torch.testing.assert_close(loss, expected)
        for got, true in zip(gradients(loss, tables), gradients(expected, tables), strict=True):
            torch.testing.assert_close(got, true)


@pytest.mark.full_for(backend="triton")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(backend, use_reentrant, device):
    indices, tables = problem(device)

    def head(u, v):
        return sk.negative_sampling_loss(**indices, center_weight=u.tanh(), context_weight=v)

    expected = gradients(head(*tables.values()), tables)
    checkpoint(head, *tables.values(), use_reentrant=use_reentrant).backward()
    for table, true in zip(tables.values(), expected, strict=True):
        torch.testing.assert_close(table.grad, true)


def test_functional_transforms(device):
    indices, tables = problem(device, requires_grad=())

    def loss_of(function):
        def loss(u, v, center, context, negatives):
            return function(center, context, negatives, u, v)

        return loss

    arguments = (*tables.values(), *indices.values())
    ours, truth = loss_of(sk.negative_sampling_loss), loss_of(oracle.negative_sampling_loss)
    for argnums in (0, 1, (0, 1)):
        got = torch.func.grad(ours, argnums=argnums)(*arguments)
        torch.testing.assert_close(got, torch.func.grad(truth, argnums=argnums)(*arguments))
    in_dims = (None, None, 0, 0, 0)
    got = torch.func.vmap(torch.func.grad(ours, argnums=(0, 1)), in_dims=in_dims)(*arguments)
    torch.testing.assert_close(
        got, torch.func.vmap(torch.func.grad(truth, argnums=(0, 1)), in_dims=in_dims)(*arguments)
    )


def test_autocast_keeps_the_tables(device):
    indices, tables = problem(device, dtype=torch.float32)
    expected = sk.negative_sampling_loss(**indices, **tables)
    with torch.autocast(device, torch.bfloat16):
        assert torch.equal(sk.negative_sampling_loss(**indices, **tables), expected)
        mixed = {**tables, "context_weight": tables["context_weight"].detach().bfloat16().requires_grad_()}
        loss = sk.negative_sampling_loss(**indices, **mixed)
    assert loss.dtype == torch.float32
    leaves = exact(mixed)
    truth = oracle.negative_sampling_loss(**indices, **leaves)
    for got, true, table in zip(gradients(loss, mixed), gradients(truth, leaves), mixed.values(), strict=True):
        assert got.dtype == table.dtype
        assert oracle.error(got, true) < 2 * torch.finfo(table.dtype).eps


@pytest.mark.slow_for(backend="triton")
@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=2)))
def test_opcheck(backend, wanted, device):
    indices, tables = problem(device, requires_grad=(), dtype=torch.float16)
    indices, tables, wanted = Indices(**indices), Tables(**tables), Wanted(*wanted)
    forward = (tables, indices, True, wanted)
    torch.library.opcheck(negative_sampling_fwd.raw, tuple(negative_sampling_fwd.inputs.pack(forward)))
    outputs = negative_sampling_fwd(tables, indices, False, Wanted(True, True))
    backward = (outputs.loss, tables, indices, outputs, wanted)
    torch.library.opcheck(negative_sampling_bwd.raw, tuple(negative_sampling_bwd.inputs.pack(backward)))
    for grad, want, table in zip(negative_sampling_bwd(*backward), wanted, tables, strict=True):
        assert grad.shape == (table.shape if want else (0,))


def fills():
    """Implementations without the range check, which raises for CPU tensors."""
    return {"reference": word2vec._fill_reference, "triton": word2vec._fill_triton}


def test_index_out_of_range_makes_its_pair_nan(backend, device):
    """As on a GPU: no memory outside the tables is read, and only rows of the pair have NaN gradients."""
    if backend not in fills():
        pytest.skip("tests/cuda_host/test_host_negative_sampling.py")
    indices, tables = problem(device, pairs=9, words=40, requires_grad=())
    indices["center"][0], indices["context"][2] = 40, -1
    indices["negatives"][4, 3], indices["negatives"][5, 0] = 2**40, -7
    wrong = torch.zeros(9, dtype=torch.bool, device=device)
    wrong[[0, 2, 4, 5]] = True
    outputs = Outputs(*(torch.empty(s, dtype=torch.float64, device=device) for s in ((9,), (9, 5), (9, 6))))
    fills()[backend](Tables(**tables), Indices(**indices), False, outputs)
    valid = {name: index[~wrong] for name, index in indices.items()}
    truth = oracle.negative_sampling_loss(**valid, **tables, reduction="none")
    torch.testing.assert_close(outputs.loss[~wrong], truth)
    for part in (outputs.loss[:, None], outputs.slopes, outputs.direction):
        assert torch.equal(part.isnan(), wrong[:, None].expand_as(part))


@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32])
def test_row_sums_of_keys_out_of_range(backend, index_dtype, device):
    """Keys out of range are ignored; an entry whose source row does not exist makes only its own row NaN."""
    sum_rows = {"reference": segment_sum.reference, "triton": segment_sum.triton}.get(backend, segment_sum.native)
    keys = torch.tensor([3, -1, 0, 3, 7, 5, 2**31 - 1, 0], dtype=index_dtype, device=device)
    source_index = torch.tensor([1, 4, 0, -2], dtype=index_dtype, device=device)  # two entries each
    coefficient = torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8], device=device)
    coefficient[[2, 3, 6, 7]] = torch.nan
    source, out = torch.randn(3, 5, device=device), torch.empty(7, 5, device=device)
    sum_rows(keys, coefficient, source, source_index, out)
    expected = torch.zeros(7, 5, device=device)
    expected[0], expected[3], expected[5] = torch.nan, torch.nan, 6 * source[0]
    torch.testing.assert_close(out, expected, equal_nan=True)


def test_a_row_of_many_entries_keeps_its_digits(backend, device):
    """Adding positive terms one after another in float32 would lose about 1e-5 of their sum."""
    if backend == "reference" or (backend == "triton" and device == "cpu"):
        pytest.skip("the reference does so; the interpreter takes minutes")
    keys = torch.ones(300_001, dtype=torch.int64, device=device)
    coefficient, source = torch.rand(300_001, device=device), torch.rand(300_001, 3, device=device)
    out = torch.empty(3, 3, device=device)
    (segment_sum.triton if backend == "triton" else segment_sum.native)(keys, coefficient, source, None, out)
    truth = torch.zeros(3, 3, dtype=torch.float64, device=device)
    truth[1] = coefficient.double() @ source.double()
    assert oracle.error(out, truth) < 8 * torch.finfo(torch.float32).eps


INDICES, WEIGHTS = problem("cpu", pairs=4, words=5, dim=3, dtype=torch.float32, requires_grad=())
VALID = INDICES | WEIGHTS
ERRORS = [
    (dict(center=[1]), TypeError, r"center must be a torch.Tensor; got list"),
    (dict(center=torch.rand(4)), TypeError, r"center must have dtype torch.int64 or torch.int32; got torch.float32"),
    (dict(context=torch.zeros(3, dtype=torch.int64)), ValueError, r"context must have shape .* = \(4,\); got \(3,\)"),
    (
        dict(negatives=torch.zeros(4, dtype=torch.int64)),
        ValueError,
        r"negatives must have the shape of center and K; got \(4,\)",
    ),
    (
        dict(negatives=torch.zeros(3, 2, dtype=torch.int64)),
        ValueError,
        r"negatives must have the shape .*; got \(3, 2\)",
    ),
    (dict(center_weight=torch.randn(5)), ValueError, r"center_weight must have shape \(V, D\); got \(5,\)"),
    (dict(center_weight=torch.ones(5, 3).long()), TypeError, r"center_weight must have dtype"),
    (dict(context_weight=torch.randn(5, 4)), ValueError, r"context_weight must have shape .*= \(5, 3\); got \(5, 4\)"),
    (dict(context_weight=torch.randn(0, 3)), ValueError, r"context_weight must have at least one row; got \(0, 3\)"),
    (
        dict(context_weight=torch.randn(5, 3).half()),
        TypeError,
        r"context_weight must have the dtype of center_weight, torch.float32, outside autocast; got torch.float16",
    ),
    (
        dict(center_weight=torch.randn(5, 3, device="meta")),
        ValueError,
        r"center_weight must be on the device of center, cpu",
    ),
    (dict(center=torch.tensor([0, 1, 5, 2])), ValueError, r"center must be in \[0, 5\); got 5"),
    (dict(context=torch.tensor([0, 1, -1, 2])), ValueError, r"context must be in \[0, 5\); got -1"),
    (dict(negatives=torch.full((4, 2), 9)), ValueError, r"negatives must be in \[0, 5\), or -1 for none; got 9"),
    (dict(negatives=torch.full((4, 2), -2)), ValueError, r"negatives must be in \[0, 5\), or -1 for none; got -2"),
    (dict(reduction="avg"), ValueError, r"reduction must be 'none', 'mean' or 'sum'; got 'avg'"),
    (dict(exclude_positive=1), TypeError, r"exclude_positive must be a bool; got int"),
]


@pytest.mark.parametrize(
    ("change", "kind", "message"), ERRORS, ids=lambda v: next(iter(v)) if isinstance(v, dict) else ""
)
def test_errors(backend, change, kind, message):
    with pytest.raises(kind, match=r"^negative_sampling_loss: " + message):
        sk.negative_sampling_loss(**{**VALID, **change})


@kernels("negative_sampling_loss")
@pytest.mark.gpu
def test_nothing_synchronises_and_a_graph_replays(backend):
    if backend == "reference":
        pytest.skip("the reference may synchronise")
    torch.use_deterministic_algorithms(False)
    indices, tables = problem("cuda", pairs=1000, words=300, dim=64, dtype=torch.float32, zipf=True)

    def step():
        return gradients(sk.negative_sampling_loss(**indices, **tables), tables)

    expected = step()
    graph, got = captured(step)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_compile_with_one_table_and_one_index_twice(compiler):
    torch._dynamo.reset()
    table, index = torch.randn(9, 4, requires_grad=True), torch.randint(0, 9, (5,))
    negatives = torch.randint(0, 9, (5, 2))

    def loss(table, index):
        return sk.negative_sampling_loss(index, index, negatives, table, table)

    got, want = torch.compile(loss, fullgraph=True, backend=compiler)(table, index), loss(table, index)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, table), torch.autograd.grad(want, table))


def test_vmap_inside_an_outer_gradient():
    center, context, negatives = torch.tensor([0, 1, 2]), torch.tensor([1, 2, 3]), torch.randint(0, 4, (3, 2))
    tables, other = torch.randn(5, 4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)

    def loss(table):
        return sk.negative_sampling_loss(center, context, negatives, table, other)

    got = torch.func.grad(lambda tables: torch.func.vmap(loss)(tables).sum())(tables)
    torch.testing.assert_close(got, torch.func.grad(lambda tables: sum(map(loss, tables)))(tables))
