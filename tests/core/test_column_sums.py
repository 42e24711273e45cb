"""The compiled column sums on a CPU: the gradient of a bias."""

from __future__ import annotations

import pytest
import torch
from cases import DTYPES

from sslkernels.core import native

pytestmark = pytest.mark.pairwise


@pytest.mark.skipif(native.extension is None, reason="the extension is not built")
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (65, 1025), (200, 33), (3, 5000)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums(dtype, shape, add):
    wide = torch.randn(shape[0], shape[1] + 3, dtype=torch.float64).to(dtype)
    values = wide[:, 2:-1]
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    total = torch.randn(shape[1], dtype=acc) if add else torch.full((shape[1],), float("nan"), dtype=acc)
    expected = values.double().sum(0) + (total.double() if add else 0)
    torch.ops.sslkernels_native.column_sums(values, total, add)
    scale = values.double().abs().sum(0) + expected.abs()
    assert ((total.double() - expected).abs() <= 64 * torch.finfo(acc).eps * scale).all()


@pytest.mark.skipif(native.extension is None, reason="the extension is not built")
def test_a_long_column_keeps_its_digits():
    values = torch.full((1 << 20, 2), 0.1)
    total = torch.empty(2)
    torch.ops.sslkernels_native.column_sums(values, total, False)
    # 64 terms at a time are added in float32.
    torch.testing.assert_close(total.double(), values.double().sum(0), rtol=64 * 2.0**-24, atol=0)
