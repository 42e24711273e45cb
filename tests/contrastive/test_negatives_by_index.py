"""Negatives by index, rows of keys and bank, against gathered copies of them in float64."""

import pytest
import torch
from contrastive_oracle import contrastive_losses
from oracle import error

import sslkernels as sk
from benchmarks import memory
from sslkernels.contrastive import operators

OP = "contrastive_energy"
CASES = {
    "distractors": {"in_batch": False, "scale": 5.0},
    "normalised": {"in_batch": False, "normalize": True, "bank": True, "mask": True, "scale": 5.0},
    "symmetric": {"direction": "symmetric", "label_smoothing": 0.2, "positive": True},
    "sigmoid": {"energy": "sigmoid", "logit_bias": -1.0, "bank": True, "reduction": "none", "masks": True},
    "hinge": {"energy": "hinge", "positive": True, "mask": True, "normalize": True, "reduction": "none"},
}


def problem(case: dict, dtype: torch.dtype, rows: int = 9, keys: int = 11, dim: int = 19):
    """(leaves, index with duplicates and some of -1, other options)."""
    g = torch.Generator().manual_seed(3)
    case = dict(case)
    count = keys + (5 if case.get("bank") else 0)
    leaves = {name: torch.randn(n, dim, generator=g) for name, n in (("query", rows), ("key", keys))}
    if case.pop("bank", False):
        leaves["bank"] = torch.randn(5, dim, generator=g)
    leaves["logit_scale"] = torch.tensor(case.pop("scale", 0.7))
    index = torch.randint(-1, count, (rows, 7), generator=g).to(torch.int32 if rows % 2 else torch.int64)
    index[:, 3] = index[:, 2]
    index[1] = -1
    if case.pop("positive", False):
        case["positive"] = torch.randint(-1, keys, (rows,), generator=g)
    if case.pop("mask", False):
        case["negatives_mask"] = torch.rand(rows, 7, generator=g) < 0.7
    if case.pop("masks", False):
        case["key_mask"] = torch.rand(keys, generator=g) < 0.5
        case["bank_mask"] = torch.zeros(5, dtype=torch.bool)
    return {name: leaf.to(dtype).requires_grad_() for name, leaf in leaves.items()}, index, case


def expected(leaves, index, options):
    exact = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}
    options = dict(options)
    reduction = options.pop("reduction", "mean")
    rows = torch.cat([exact["key"], exact["bank"]]) if "bank" in exact else exact["key"]
    there = index >= 0
    options["negatives_mask"] = there & options.get("negatives_mask", there)
    losses, has = contrastive_losses(**exact, negatives=rows[index.clamp(min=0).long()], **options)
    return exact, losses if reduction == "none" else losses.sum() / has.sum()


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float32) for name in CASES), ("normalised", torch.bfloat16), ("distractors", torch.float64)],
    ids=str,
)
def test_against_gathered_rows(backend, name, dtype):
    leaves, index, options = problem(CASES[name], dtype)
    loss = sk.contrastive_energy(negatives=index, **leaves, **options)
    exact, want = expected(leaves, index, options)
    weight = torch.linspace(0.5, 2.0, loss.numel(), dtype=torch.float64).reshape(loss.shape)
    grads = torch.autograd.grad(loss, list(leaves.values()), weight.to(loss.dtype))
    want_grads = torch.autograd.grad(want, list(exact.values()), weight)
    bound = 1e-12 if dtype == torch.float64 else 2e-5 if dtype == torch.float32 else 0.02
    assert error(loss, want) <= bound
    for key, got, grad in zip(leaves, grads, want_grads, strict=True):
        assert got.dtype == leaves[key].dtype
        assert error(got, grad) <= bound, key


@pytest.mark.parametrize("energy", ["softmax", "sigmoid", "hinge"])
def test_the_plan_of_cuda_kernels(monkeypatch, energy):
    """On a CPU, whose kernels are called alike: without shared candidates it runs `query_negatives` alone."""
    for op in (operators.per_query_contrastive_fwd, operators.per_query_contrastive_bwd):
        functions = op.implementations.functions
        monkeypatch.setitem(functions, "cpu", functions["cuda"])
    for op in (operators.contrastive_fwd, operators.contrastive_bwd):
        monkeypatch.delitem(op.implementations.functions, "cpu")  # which are tiles
    case = {"in_batch": False, "normalize": True, "positive": True, "mask": True, "scale": 5.0, "energy": energy}
    for reduction in ("mean", "none"):
        leaves, index, options = problem(case | {"reduction": reduction}, torch.float32)
        with sk.use_backend("cpu"):
            loss = sk.contrastive_energy(negatives=index, **leaves, **options)
            grads = torch.autograd.grad(loss.sum(), list(leaves.values()))
        exact, want = expected(leaves, index, options)
        assert error(loss, want) <= 2e-5
        want_grads = torch.autograd.grad(want.sum(), list(exact.values()))
        for key, got, grad in zip(leaves, grads, want_grads, strict=True):
            assert error(got, grad) <= 2e-5, key


@pytest.mark.parametrize("frozen", ["query", "key"])
def test_only_what_is_wanted(backend, frozen):
    leaves, index, options = problem(CASES["normalised"], torch.float64)
    leaves[frozen].requires_grad_(False)
    loss = sk.contrastive_energy(negatives=index, **leaves, **options)
    exact, want = expected(leaves, index, options)
    wanted = [name for name in leaves if name != frozen]
    grads = torch.autograd.grad(loss, [leaves[name] for name in wanted])
    for got, grad in zip(grads, torch.autograd.grad(want, [exact[name] for name in wanted]), strict=True):
        torch.testing.assert_close(got, grad)


def test_statistics_count_negatives_by_index(backend):
    leaves, index, options = problem(CASES["distractors"], torch.float32)
    _, stats = sk.contrastive_energy(negatives=index, **leaves, **options, return_stats=True)
    with torch.no_grad():
        scores = leaves["logit_scale"] * torch.einsum("nd,nkd->nk", leaves["query"], leaves["key"][index.long()])
        positive = leaves["logit_scale"] * (leaves["query"] * leaves["key"][:9]).sum(1)
        own = (index == torch.arange(9)[:, None]) & (index >= 0)
        above = ((scores > positive[:, None]) & (index >= 0) & ~own).sum(1)
    assert torch.equal(stats.rank, above + own.sum(1) / 2)
    both = torch.cat([positive[:, None], scores.masked_fill(index < 0, float("-inf"))], 1)
    torch.testing.assert_close(stats.lse, both.logsumexp(1))


def test_nothing_to_draw(backend):
    """No row at all; K = 0; and tables without a row."""
    x = torch.randn(3, 5, requires_grad=True)
    none = torch.full((3, 4), -1)
    positive = torch.full((3,), -1)
    for key, index, where in ((x[:0], none, positive), (x.detach(), none[:, :0], None), (x.detach(), none, None)):
        loss = sk.contrastive_energy(x, key, negatives=index, in_batch=False, positive=where, on_empty="zero")
        assert loss == 0
        assert (torch.autograd.grad(loss, x)[0] == 0).all()
    loss = sk.contrastive_energy(x[:0], x.detach(), negatives=none[:0], in_batch=False, reduction="sum")
    assert loss == 0


@pytest.mark.parametrize("in_batch", [True, False])
def test_no_index_at_all(backend, in_batch):
    query, key = (torch.randn(4, 3, requires_grad=True) for _ in range(2))
    index = torch.zeros(4, 0, dtype=torch.int64)
    losses = [sk.contrastive_energy(query, key, negatives=negatives, in_batch=in_batch) for negatives in (index, None)]
    for got, expected in zip(*(torch.autograd.grad(loss, (query, key)) for loss in losses), strict=True):
        assert torch.equal(got, expected)


def test_an_index_out_of_range(backend, monkeypatch):
    x, key, bank = torch.randn(2, 3), torch.randn(4, 3), torch.randn(3, 3)
    for wrong in (7, -2):
        index = torch.tensor([[0, 6], [-1, wrong]])
        with pytest.raises(ValueError, match=rf"negatives must be in \[0, 7\), or -1 for none; got {wrong}"):
            sk.contrastive_energy(x, key, negatives=index, bank=bank, in_batch=False)
    if backend == "cpu":
        return  # its kernels refuse it, too
    monkeypatch.setattr(operators, "_check_negatives", lambda *_: None)  # as on a GPU
    x.requires_grad_()
    rows = sk.contrastive_energy(x, key, negatives=index, bank=bank, in_batch=False, reduction="none")
    assert rows.isnan().tolist() == [False, True]
    assert torch.autograd.grad(rows.sum(), x)[0].isnan().any(1).tolist() == [False, True]


def test_negatives_by_index_in_a_compiled_graph():
    leaves, index, options = problem(CASES["normalised"], torch.float32)

    def loss(index, **leaves):
        return sk.contrastive_energy(negatives=index, **leaves, **options)

    want = loss(index, **leaves)
    torch._dynamo.reset()
    got = torch.compile(loss, fullgraph=True, backend="aot_eager")(index, **leaves)
    torch.testing.assert_close(got, want)
    grads = (torch.autograd.grad(value, list(leaves.values())) for value in (got, want))
    torch.testing.assert_close(next(grads), next(grads))


def test_memory():
    """Peak memory beyond gradients stays below a twentieth of an (N, K, D) tensor (160 MiB)."""
    rows, count, dim = 2048, 80, 256
    query, key = (torch.randn(rows, dim, requires_grad=True) for _ in range(2))
    index = torch.randint(rows, (rows, count))

    def run():
        loss = sk.contrastive_energy(query, key, negatives=index, in_batch=False)
        return torch.autograd.grad(loss, (query, key))

    with sk.use_backend("cpu"):
        peak, grads = memory.peak_extra(run, torch.device("cpu"))
    if peak is None:
        pytest.skip("this system has no resettable peak resident set")
    assert peak - sum(grad.nbytes for grad in grads) < 4 * rows * count * dim / 20
