"""The compiled kernels of tiles that share exponentials between rows and columns, against those that do not: the sums
of both at once, and the gradient of both."""

from __future__ import annotations

import pytest
import torch

import sslkernels as sk
from sslkernels.contrastive.pair_rows import SOFTMAX, ColumnSums, SideGrad
from sslkernels.contrastive.score_tiles import Labels, Masks, PairKernels, ReferencePairs, RowSums, Thresholds, Tile
from sslkernels.contrastive.tile_backends import NativePairs

pytestmark = pytest.mark.skipif(
    "cpu" not in sk.available_backends("contrastive_energy", "cpu"), reason="no compiled extension"
)
INF = float("inf")


def sums_of(products, scale=1.0, bias=None, labels=None, masks=None, before=None):
    """(rows, columns) of both ways, after running sums `before`."""
    count, columns = products.shape
    acc = torch.float64 if products.dtype == torch.float64 else torch.float32
    tile = Tile(
        products, products.t(), products, torch.linspace(0.5, 1, count, dtype=acc),
        torch.linspace(1, 2, columns, dtype=acc), torch.tensor([scale], dtype=acc),
        None if bias is None else torch.tensor([bias], dtype=acc), SOFTMAX, labels or Labels(), False, masks or Masks(),
    )  # fmt: skip

    def running(length):
        return torch.full((length,), -INF, dtype=acc), torch.zeros(length, dtype=torch.float64)

    found = []
    for way in (NativePairs.sums, PairKernels.sums):
        (row_max, row_sum), (column_max, column_sum) = before or (running(count), running(columns))
        rows = RowSums(row_max.clone(), row_sum.clone(), *[None] * 6)
        cols = ColumnSums(column_max.clone(), column_sum.clone(), None, None, None)
        way(NativePairs(), tile, rows, cols, Thresholds(None, None, None), None)
        found.append(((rows.max, rows.sum), (cols.max, cols.sum)))
    return found


def assert_equal(found, tolerance):
    for (max, sum), (want_max, want_sum) in zip(*found, strict=True):
        torch.testing.assert_close(max, want_max, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(sum, want_sum, rtol=tolerance, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (33, 7), (31, 513), (70, 1100)])
def test_both_directions(dtype, shape):
    products = torch.randn(shape).to(dtype)
    tolerance = 1e-13 if dtype == torch.float64 else 2e-6
    index = torch.arange(max(shape), dtype=torch.int32)
    labels = Labels(index[: shape[0]], index[: shape[1]], None, None, index[: shape[0]] % 3, index[: shape[1]] % 5)
    found = sums_of(products, 3.0, -1.0, labels)
    assert_equal(found, tolerance)
    # A second tile adds to the sums of the first.
    before = found[0]
    assert_equal(sums_of(products + 1, 2.0, None, labels, before=before), tolerance)
    assert_equal(sums_of(products - 5, 2.0, None, labels, before=before), tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("far", [40.0, 61.0, 100.0, 1000.0])
def test_columns_far_below_the_largest_score(dtype, far):
    """Shifted by the largest score of all columns, the exponentials of such a column would underflow."""
    products = torch.randn(70, 600, dtype=dtype)
    products[:, ::7] -= far
    products[40] += far
    products[5, 3] = 4 * far
    assert_equal(sums_of(products), 1e-13 if dtype == torch.float64 else 3e-6)


def test_left_out_rows_and_columns():
    products = torch.randn(40, 530)
    mask = torch.rand(40, 530) > 0.2
    mask[3], mask[:, 11] = False, False
    found = sums_of(products, masks=Masks(pair=mask))
    assert_equal(found, 2e-6)
    (row_max, row_sum), (column_max, column_sum) = found[0]
    assert row_max[3] == column_max[11] == -INF
    assert row_sum[3] == column_sum[11] == 0


@pytest.mark.parametrize("value", [float("nan"), INF, -INF])
def test_scores_that_are_not_finite(value):
    products = torch.randn(40, 530)
    products[7, 500] = value
    got, want = sums_of(products)
    for (_, sum), (_, want_sum) in zip(got, want, strict=True):
        assert (sum.isfinite() == want_sum.isfinite()).all()
        finite = want_sum.isfinite()
        torch.testing.assert_close(sum[finite], want_sum[finite], rtol=2e-6, atol=0)


def test_threads_do_not_change_the_sums():
    products = torch.randn(257, 1030)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(sums_of(products)[0])
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        for pair, first in zip(other, found[0], strict=True):
            assert all(torch.equal(*values) for values in zip(pair, first, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("apart", [0.0, 20.0, 59.0, 61.0, 90.0, 1000.0])
def test_gradient_of_rows_and_columns(dtype, apart):
    """References of rows and columns that are near each other or not, infinite where there is no positive."""
    count, columns = 37, 530
    products = torch.randn(count, columns, dtype=dtype)
    products[:, ::3] -= apart
    products[::4] += apart / 2
    rows = SideGrad(torch.rand(count, dtype=dtype), products.logsumexp(1) + 0.1)
    cols = SideGrad(torch.rand(columns, dtype=dtype), products.logsumexp(0) + 0.1)
    for side in (rows, cols):
        side.reference[5], side.weight[5] = INF, 0
    scale = torch.ones(1, dtype=dtype)
    found = []
    for kernels in (NativePairs(), ReferencePairs()):
        tile = Tile(
            products, products, products.clone(), None, None, scale, None, SOFTMAX, Labels(), ids_positive=False
        )
        dot, total = torch.zeros(2, count, dtype=torch.float64)
        kernels.gradient(tile, rows, cols, dot, total, None)
        found.append((tile.products, dot, total))
    eps = torch.finfo(dtype).eps
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=60 * eps, atol=8 * eps * float(want.abs().max()))
    if apart == 0:  # a column keeps its part where the row has no positive, and the row where the column has none
        assert (found[0][0][5, :5] > 0).all()
        assert (found[0][0][:5, 5] > 0).all()


@pytest.mark.parametrize("side", [0, 1])
def test_gradient_of_a_reference_that_is_nan(side):
    products = torch.randn(40, 530)
    rows = SideGrad(torch.rand(40), products.logsumexp(1))
    cols = SideGrad(torch.rand(530), products.logsumexp(0))
    (rows, cols)[side].reference[7] = float("nan")
    tile = Tile(products, products, products.clone(), None, None, torch.ones(1), None, SOFTMAX, Labels(), False)
    dot, total = torch.zeros(2, 40, dtype=torch.float64)
    NativePairs().gradient(tile, rows, cols, dot, total, None)
    wrong = tile.products.isnan()
    assert wrong.select(side, 7).all()
    assert wrong.sum() == wrong.select(side, 7).numel()
