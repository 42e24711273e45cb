"""negative_sampling_loss(sparse=True): the rows of the dense gradients, as nn.Embedding(sparse=True) gives them."""

from __future__ import annotations

import itertools

import pytest
import torch
from cases import DTYPES, REPEATED_DTYPES
from test_word2vec import TABLES, gradients, problem

import sslkernels as sk
from sslkernels.contrastive.words.word2vec import (
    Indices,
    Tables,
    Wanted,
    negative_sampling_fwd,
    negative_sampling_sparse_bwd,
)
from sslkernels.core import segment_sum
from sslkernels.core.segment_sum import SparseRows

pytestmark = pytest.mark.pairwise

OP = "negative_sampling_loss"


def check(got, dense):
    assert got.layout == torch.sparse_coo
    assert got.is_coalesced()
    assert got.shape == dense.shape
    assert got.dtype == dense.dtype
    index = got.indices()[0]
    assert (index.diff() > 0).all()
    assert torch.equal(got.to_dense(), dense)


@pytest.mark.slow_for(backend="triton", dtype=REPEATED_DTYPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("words", [3, 11, 400])
def test_rows_of_the_dense_gradient(backend, words, dtype, device):
    indices, tables = problem(device, words=words, dtype=dtype, zipf=words == 11)
    loss = sk.negative_sampling_loss(**indices, **tables)
    same = sk.negative_sampling_loss(**indices, **tables, sparse=True)
    assert torch.equal(loss, same)
    found = gradients(same, tables)
    for got, dense in zip(found, gradients(loss, tables), strict=True):
        check(got, dense)
    center, context = (grad.indices()[0] for grad in found)
    assert torch.equal(center, indices["center"].unique())
    assert torch.equal(context, torch.cat([indices["context"], indices["negatives"].flatten()]).unique())


@pytest.mark.full_for(backend="triton")
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("wanted", [TABLES, *((name,) for name in TABLES)], ids=str)
def test_every_subset_of_tables(backend, wanted, reduction, device):
    indices, tables = problem(device, requires_grad=wanted)
    indices = {name: index.int() for name, index in indices.items()}
    rows = [
        sk.negative_sampling_loss(**indices, **tables, reduction=reduction, sparse=is_sparse, exclude_positive=True)
        for is_sparse in (False, True)
    ]
    leaves = [tables[name] for name in wanted]
    dense, found = (torch.autograd.grad(r.sum(), leaves, retain_graph=True) for r in rows)
    for got, true in zip(found, dense, strict=True):
        check(got, true)
    for got, again in zip(found, torch.autograd.grad(rows[1].sum(), leaves), strict=True):
        assert torch.equal(got.to_dense(), again.to_dense())


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda tables: torch.optim.SGD(tables, lr=0.5),
        lambda tables: torch.optim.SparseAdam(tables, lr=0.1),
        lambda tables: torch.optim.Adagrad(tables, lr=0.1),
    ],
)
def test_optimizers_step_as_with_embeddings(backend, optimizer, device):
    """Three steps beside those with the gradients that nn.Embedding(sparse=True) gives."""
    indices, ours = problem(device, words=40)
    center, context, negatives = indices.values()
    layers = [torch.nn.Embedding.from_pretrained(t.detach().clone(), freeze=False, sparse=True) for t in ours.values()]
    optimizers = [optimizer(list(ours.values())), optimizer([layer.weight for layer in layers])]
    for _ in range(3):
        rows, positive, negative = layers[0](center), layers[1](context), layers[1](negatives)
        signs = (rows * positive).sum(1), -(negative @ rows[:, :, None]).squeeze(2)
        theirs = -sum(torch.nn.functional.logsigmoid(score).sum() for score in signs) / len(center)
        loss = sk.negative_sampling_loss(**indices, **ours, sparse=True)
        torch.testing.assert_close(loss, theirs)
        for value, steps in zip((loss, theirs), optimizers, strict=True):
            steps.zero_grad()
            value.backward()
            steps.step()
    for table, layer in zip(ours.values(), layers, strict=True):
        torch.testing.assert_close(table, layer.weight)


def test_one_table_for_both(backend, device):
    indices, tables = problem(device)
    table = tables["center_weight"]
    grads = [
        torch.autograd.grad(
            sk.negative_sampling_loss(**indices, center_weight=table, context_weight=table, sparse=is_sparse), table
        )[0]
        for is_sparse in (True, False)
    ]
    assert grads[0].is_sparse
    torch.testing.assert_close(grads[0].to_dense(), grads[1])


def test_no_pairs(backend, device):
    indices, tables = problem(device, pairs=0)
    sk.negative_sampling_loss(**indices, **tables, reduction="sum", sparse=True).backward()
    for table in tables.values():
        check(table.grad, torch.zeros_like(table))
        assert table.grad._nnz() == 0


def test_no_tensor_has_the_size_of_a_table(backend, device, monkeypatch):
    """A gradient of tables with a million rows has the rows of its entries."""
    sizes = []
    original = SparseRows.empty.__func__
    monkeypatch.setattr(
        SparseRows,
        "empty",
        classmethod(lambda cls, *args: sizes.append(original(cls, *args)) or sizes[-1]),
    )
    indices, tables = problem(device, words=1_000_000, pairs=5, negatives=2, dim=2)
    grads = gradients(sk.negative_sampling_loss(**indices, **tables, sparse=True), tables)
    assert [len(rows.index) for rows in sizes] == [5, 15]
    assert all(grad._nnz() <= 15 for grad in grads)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_keys_out_of_range_are_ignored(backend, dtype, device):
    """As on a GPU, where an index is not checked."""
    keys = torch.tensor([7, 2, -1, 9, 2, 5, 2**31 - 1, 7], dtype=dtype, device=device)
    source = torch.randn(8, 3, device=device)
    for rows, expected in ((8, [2, 5, 7]), (3, [2]), (2, [])):
        out = SparseRows.empty(torch.empty(rows, 3, device=device), len(keys))
        coefficient = torch.arange(8.0, device=device)
        segment_sum.SPARSE_SUMS[backend](keys, coefficient, source, None, rows, out)
        got = out.tensor(rows)
        dense = torch.zeros(rows, 3, device=device)
        valid = (keys >= 0) & (keys < rows)
        dense.index_add_(0, keys[valid].long(), (coefficient[:, None] * source)[valid])
        assert got.indices()[0].tolist() == expected
        torch.testing.assert_close(got.to_dense(), dense)


def test_compiled_calls_and_wrong_arguments_are_refused(device, compiler):
    indices, tables = problem(device)
    with pytest.raises(TypeError, match=r"negative_sampling_loss: sparse must be a bool; got int"):
        sk.negative_sampling_loss(**indices, **tables, sparse=1)
    compiled = torch.compile(
        lambda: sk.negative_sampling_loss(**indices, **tables, sparse=True), fullgraph=True, backend=compiler
    )
    with pytest.raises(Exception, match=r"sparse=True is not supported inside torch.compile"):
        compiled()


def test_double_backward_raises(device):
    indices, tables = problem(device)
    loss = sk.negative_sampling_loss(**indices, **tables, sparse=True)
    grad, _ = torch.autograd.grad(loss, list(tables.values()), create_graph=True)
    with pytest.raises(NotImplementedError, match=r"negative_sampling_loss: double backward"):
        grad.to_dense().square().sum().backward()


@pytest.mark.full_for(backend="triton")
@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=2)))
def test_opcheck(backend, wanted, device):
    indices, tables = problem(device, requires_grad=(), dtype=torch.float32)
    indices, tables = Indices(**indices), Tables(**tables)
    outputs = negative_sampling_fwd(tables, indices, False, Wanted(True, True))
    arguments = (outputs.loss, tables, indices, outputs, Wanted(*wanted))
    flat = tuple(negative_sampling_sparse_bwd.inputs.pack(arguments))
    tests = ("test_schema", "test_faketensor") if all(wanted) else ("test_faketensor",)
    torch.library.opcheck(negative_sampling_sparse_bwd.raw, flat, test_utils=tests)
