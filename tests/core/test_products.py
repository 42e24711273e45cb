"""Products that add to a float32 total: with the one call that some releases of torch refuse, and without it. What a
matmul reads behind the rows of its left operand."""

from __future__ import annotations

import pytest
import torch
from torch.overrides import TorchFunctionMode

import sslkernels as sk
from sslkernels.core import products
from sslkernels.core.chunks import MATMUL_DEPTH


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


class WholeTiles(TorchFunctionMode):
    """Notes 16-bit left operands of matmuls behind whose rows, up to a multiple of MATMUL_DEPTH, something is not
    finite: oneDNN on a CPU with AMX multiplies it by 0."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0
        self.faults: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.mm, torch.addmm):
            left = args[1] if func is torch.addmm else args[0]
            if left.dtype.itemsize == 2 and left.stride(1) == 1:
                self.seen += 1
                (count, columns), pitch = left.shape, left.stride(0)
                wide = -(-columns // MATMUL_DEPTH) * MATMUL_DEPTH
                rows = left.as_strided((count - 1, wide), (pitch, 1), left.storage_offset())
                if not rows[:, columns:].isfinite().all():
                    self.faults.append(f"{tuple(left.shape)} with strides {left.stride()}")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", ["reference", "cpu"], indirect=True)
@pytest.mark.parametrize("columns", [1, 53, 64, 97])
def test_nothing_behind_the_rows_of_a_product_counts(backend, columns):
    def features(*shape):
        return torch.randn(shape).bfloat16().requires_grad_()

    x, w, z = features(37, 19), features(columns, 19), features(37, 19)
    target, bank = torch.arange(37) % columns, features(53, 19)
    teacher = torch.randn(37, columns)
    with WholeTiles() as tiles:
        for workspace_bytes in (None, 1):
            sk.linear_cross_entropy(x, w, target, workspace_bytes=workspace_bytes).backward()
            sk.linear_cross_entropy(x, w, teacher.softmax(1), workspace_bytes=workspace_bytes).backward()
            sk.linear_distillation(x, w, z.detach(), w.detach(), workspace_bytes=workspace_bytes).backward()
        for energy in ("softmax", "sigmoid", "hinge"):
            sk.contrastive_energy(x, w, bank=bank, positive=target, energy=energy).backward()
        sk.nt_xent(x, z).backward()
        sk.clip_loss(x, z, 2.0).backward()
        sk.contrastive_energy(x, w, positive=target, return_stats=True)[0].backward()
        sk.linear_sample(x, w, seed=0)
    assert tiles.seen > 10
    assert tiles.faults == []
    for leaf in (x, w, z, bank):
        assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("energy", ["softmax", "sigmoid", "hinge"])
def test_nothing_behind_the_rows_of_a_reused_buffer_counts(monkeypatch, energy):
    """Tiles of other widths leave NaN in a buffer that is too small to keep all."""
    monkeypatch.setitem(sk.contrastive.score_tiles.WORKSPACE_BYTES, "cpu", 8192)
    monkeypatch.setattr(sk.contrastive.score_tiles, "TILE_COLUMNS", 48)
    x, y = (torch.randn(70, 19).bfloat16().requires_grad_() for _ in range(2))
    with WholeTiles() as tiles:
        sk.contrastive_energy(x, y, energy=energy, direction="symmetric").backward()
    assert tiles.seen > 4
    assert tiles.faults == []
