"""Products that add to a float32 total: with the one call that some releases of torch refuse, and without it."""

from __future__ import annotations

import pytest
import torch

from sslkernels.core import products


def emulated(monkeypatch, refuses: bool) -> list[str]:
    """torch.mm and torch.addmm with `out_dtype`, which are there on a GPU alone. Returns the names of the calls."""
    calls: list[str] = []
    mm, addmm = torch.mm, torch.addmm

    def matmul(left, right, *, out_dtype, out=None):
        calls.append("mm")
        found = mm(left.to(out_dtype), right.to(out_dtype))
        return found if out is None else out.copy_(found)

    def add(total, left, right, *, out_dtype=None, out, beta=1):
        calls.append("addmm")
        if out_dtype is not None and refuses:
            raise RuntimeError("self and mat2 must have the same dtype")
        kind = out_dtype or total.dtype
        return addmm(total, left.to(kind), right.to(kind), beta=beta, out=out)

    monkeypatch.setattr(torch, "mm", matmul)
    monkeypatch.setattr(torch, "addmm", add)
    monkeypatch.setattr(products, "BLOCK", 3)
    products._adds_to.cache_clear()
    return calls


@pytest.mark.parametrize("refuses", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_product_is_added(monkeypatch, dtype, refuses):
    left, right = torch.randn(8, 5).to(dtype), torch.randn(5, 7).to(dtype)
    expected = left.float() @ right.float()
    calls = emulated(monkeypatch, refuses)
    total = torch.full((8, 7), torch.nan)
    products.add_product(total, left, right, first=True)
    torch.testing.assert_close(total, expected)
    products.add_product(total, left, right, first=False)
    torch.testing.assert_close(total, 2 * expected)
    if dtype != torch.float32:
        assert calls == ["mm", "addmm", *(["mm"] * 3 if refuses else ["addmm"])]
    products._adds_to.cache_clear()
