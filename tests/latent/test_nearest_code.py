"""The plan of the search on a GPU: the arguments of its kernel for each dtype, metric and setting of torch."""

from __future__ import annotations

import contextlib

import code_oracle
import pytest
import torch
from cases import DTYPES

from sslkernels.core import native
from sslkernels.latent import nearest_code
from sslkernels.latent.nearest_code import METRICS

pytestmark = pytest.mark.pairwise

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
NAMES = ("input", "codebook", "metric", "rounding", "center", "as_given", "rows", "codes", "index", "score")


def draw(rows, codes, dim, dtype=F32, code_dtype=None):
    g = torch.Generator().manual_seed(1)
    x, c = (torch.randn(n, dim, generator=g, dtype=F64) for n in (rows, codes))
    return x.to(dtype), c.to(code_dtype or dtype)


@pytest.fixture
def asked(monkeypatch):
    """The arguments of the last search, which is not run."""
    found = {}

    def search_codes(*arguments):
        found.clear()
        found.update(zip(NAMES, arguments, strict=True))

    monkeypatch.setattr(torch.ops.sslkernels_native, "search_codes", search_codes, raising=False)
    return found


def search(x, c, metric=0):
    index, score = torch.empty(len(x), dtype=torch.int64), torch.empty(len(x), dtype=F64)
    nearest_code.cuda(x, c, metric, index, score)
    return index


@pytest.mark.parametrize("code_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("metric", range(3))
def test_operands_of_the_matmul(asked, metric, dtype, code_dtype):
    """Half precision is multiplied as given if both have the same; other vectors are centred."""
    search(*draw(5, 7, 3, dtype, code_dtype), metric)
    as_given = dtype == code_dtype and dtype.itemsize == 2
    assert asked["as_given"] == as_given
    assert (asked["center"] is not None) == (METRICS[metric] == "l2" and not as_given)
    if asked["center"] is not None:
        assert asked["center"].dtype == (F64 if F64 in (dtype, code_dtype) else F32)
    assert asked["rounding"] == (nearest_code.MATRIX_UNIT_ROUNDING * 11 if as_given else 0)


def test_no_rows(asked):
    search(*draw(0, 7, 3))
    assert asked["rows"] > 0


@contextlib.contextmanager
def matmuls(name, value):
    settings = torch.backends.cuda.matmul
    before = getattr(settings, name)
    setattr(settings, name, value)
    try:
        yield
    finally:
        setattr(settings, name, before)


def test_settings_of_torch_matmuls(asked):
    half, single, double = (draw(5, 7, 3, dtype) for dtype in (F16, F32, F64))
    with matmuls("fp32_precision", "tf32"):
        search(*single)
        assert asked["rounding"] > nearest_code.TF32_ROUNDING
        search(*double)
        assert asked["rounding"] == 0
        search(*half)
        assert asked["as_given"]
        assert asked["rounding"] < 1e-4
    with matmuls("allow_fp16_accumulation", True):
        search(*half)
        assert not asked["as_given"]
        assert asked["center"].dtype == F32
        search(*draw(5, 7, 3, BF16))
        assert asked["as_given"]


@pytest.mark.parametrize("dim", [1, 64, 300, 4096, 65536])
@pytest.mark.parametrize("codes", [1, 1001, 8192, 65536])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("metric", range(2))
def test_workspace(asked, monkeypatch, metric, dtype, codes, dim):
    """At most 64 MB beyond the per-row and per-code buffers, and enough rows per tile to fill a GPU."""
    x, c = (torch.empty(1, dtype=dtype).expand(n, dim) for n in (1 << 20, codes))
    monkeypatch.setattr(nearest_code, "_center", lambda codebook, acc: torch.empty(dim, dtype=acc))
    nearest_code.cuda(x, c, metric, None, None)
    product_dtype = F64 if dtype == F64 else F32
    copied = not asked["as_given"] and (asked["center"] is not None or dtype != product_dtype)
    copies = (asked["rows"] + asked["codes"]) * dim if copied else 0
    assert (asked["rows"] * (asked["codes"] + 3) + copies) * product_dtype.itemsize <= 64 << 20
    assert min(asked["rows"], asked["codes"]) >= 1
    if not copied or dim <= 300:
        assert asked["rows"] >= 512


@pytest.mark.skipif(native.extension is None, reason="the search of the CPU runs it")
@pytest.mark.parametrize("metric", range(3))
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_tiled_search_on_a_cpu(monkeypatch, dtype, metric):
    monkeypatch.setattr(nearest_code, "CUDA_TILE_CODES", 13)
    monkeypatch.setattr(nearest_code, "CUDA_PRODUCT_BYTES", 16 * 9 * dtype.itemsize)
    x, c = draw(40, 50, 6, dtype)
    c[30:] = c[:20]
    assert torch.equal(search(x, c, metric), code_oracle.indices(x, c, METRICS[metric]))


def in_tf32(values):
    """Truncated to the 10 bits of the mantissa that TF32 has, the worst that a conversion does."""
    return (values.view(torch.int32) & -(1 << 13)).view(torch.float32)


@pytest.mark.parametrize("dim", [1, 16, 64, 770])
@pytest.mark.parametrize("signs", ["any", "equal"])
def test_three_products_of_tf32_are_within_the_bound(dim, signs):
    """A float32 product of Triton's kernel: of two parts each, without the product of the smaller ones."""
    triton = pytest.importorskip("sslkernels.latent.triton.nearest_code")
    x, c = draw(200, 300, dim)
    if signs == "equal":
        x, c = x.abs(), c.abs()
    parts = []
    for values in (x, c):
        large = in_tf32(values)
        parts.append((large.double(), in_tf32(values - large).double()))
    (x0, x1), (c0, c1) = parts
    found = x0 @ c0.t() + x0 @ c1.t() + x1 @ c0.t()
    error = (found - x.double() @ c.double().t()).abs() / (x.double().norm(dim=1)[:, None] * c.double().norm(dim=1))
    of_sums = (3 * dim + 24) * triton.MATRIX_ROUNDING  # what the sums may lose, which are exact here
    assert error.max() <= triton.product_error(dim, F32) - of_sums
    assert error.max() > 0
