"""The compiled sums of rows and columns at once, against the two sums one after the other."""

from __future__ import annotations

import pytest
import torch

import sslkernels as sk
from sslkernels.contrastive.pair_rows import SOFTMAX, ColumnSums
from sslkernels.contrastive.score_tiles import Labels, Masks, PairKernels, RowSums, Thresholds, Tile
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
    # What is there already is added to.
    before = found[0]
    assert_equal(sums_of(products + 1, 2.0, None, labels, before=before), tolerance)
    assert_equal(sums_of(products - 5, 2.0, None, labels, before=before), tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("far", [40.0, 61.0, 100.0, 1000.0])
def test_columns_far_below_the_largest_score(dtype, far):
    """Their exponentials would underflow beside those of the other columns, and of the other rows."""
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
