"""vector_quantize: the code is exact for every dtype, metric, backend and magnitude."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import warnings

import code_oracle
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, REPEATED_DTYPES

import sslkernels as sk
from benchmarks import memory
from sslkernels.latent import nearest_code

OP = "vector_quantize"
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy in the interpreter
METRICS = ("l2", "cosine", "dot")
BELOW_FLOAT64 = (torch.float32, torch.bfloat16, torch.float16)


def draw(device, rows, codes, dim, dtype=torch.float32, code_dtype=None, seed=1):
    g = torch.Generator().manual_seed(seed)
    x, c = (torch.randn(n, dim, generator=g, dtype=torch.float64) for n in (rows, codes))
    return x.to(device, dtype), c.to(device, code_dtype or dtype)


def interpreted(backend, device):
    return backend == "triton" and device == "cpu"


def check(x, c, metric, *, ties=False):
    """The index equals brute force in float64, except among scores that float64 cannot separate; ties: no exception,
    because the scores are exact."""
    quantized = sk.vector_quantize(x, c, metric=metric)
    same = torch.equal(quantized.indices, code_oracle.indices(x, c, metric))
    assert same or (not ties and code_oracle.tied(x, c, quantized.indices, metric))
    return quantized


@pytest.mark.slow_for(backend="triton", dtype=REPEATED_DTYPES)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (3, 2, 1), (37, 53, 19), (40, 64, 32), (7, 300, 65), (130, 17, 8), (5, 9, 300)], ids=str
)
def test_against_brute_force(backend, shape, dtype, metric, device):
    x, c = draw(device, *shape, dtype)
    got = check(x, c, metric)
    assert got.values.dtype == dtype
    assert got.indices.dtype == got.usage.dtype == torch.int64
    assert torch.equal(got.values, c[got.indices])
    assert torch.equal(got.usage, torch.bincount(got.indices, minlength=shape[1]))
    assert got.commitment.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    truth = F.mse_loss(x.double(), c[got.indices].double())
    torch.testing.assert_close(got.commitment.double(), truth, rtol=8 * torch.finfo(torch.float32).eps, atol=0)
    perplexity = torch.exp(-torch.special.xlogy(got.usage / shape[0], got.usage / shape[0]).sum())
    torch.testing.assert_close(got.perplexity, perplexity)


@pytest.mark.slow_for(backend="triton")
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("code_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_input_and_codebook_of_different_dtypes(backend, dtype, code_dtype, metric, device):
    x, c = draw(device, 21, 40, 12, dtype, code_dtype)
    got = check(x, c, metric)
    assert torch.equal(got.values, c[got.indices].to(dtype))
    assert got.commitment.dtype == (torch.float64 if torch.float64 in (dtype, code_dtype) else torch.float32)


@pytest.mark.slow_for(backend="triton", dtype=REPEATED_DTYPES)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", BELOW_FLOAT64, ids=str)
def test_exact_ties_take_the_lowest_index(backend, dtype, metric, device):
    """Duplicate codes, and different codes on a grid at the same distance from a row."""
    g = torch.Generator().manual_seed(0)
    sizes = (25, 60) if interpreted(backend, device) else (90, 200)
    x, grid = (torch.randint(-2, 3, (n, 3), generator=g).to(device, dtype) for n in sizes)
    check(x, grid, metric, ties=True)
    x, c = draw(device, sizes[0], 9, 20, dtype)
    repeated = torch.cat([c, c.flip(0), c])
    got = check(x, repeated, metric, ties=True)
    assert got.indices.max() < 9
    assert not check(x, c[:1].expand(130, 20), metric, ties=True).indices.any()


@pytest.mark.slow_for(backend="triton", dtype=REPEATED_DTYPES)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", BELOW_FLOAT64, ids=str)
def test_codes_that_differ_by_one_ulp(backend, dtype, metric, device):
    """float32 products cannot separate them, and bfloat16 products of matrix units even less."""
    x, c = draw(device, 30, 8, 24, dtype)
    c = c.repeat(12, 1)
    some = torch.arange(8, 96, device=device)
    column = (some * 7) % 24
    c[some, column] = torch.nextafter(c[some, column], torch.full_like(c[some, column], float("inf")))
    x = (c[torch.arange(30, device=device) * 3 % 96].double() + 0.02 * x.double()).to(dtype)
    check(x, c, metric)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("offset", [1e2, 1e4, 1e6])
def test_a_large_common_offset(backend, offset, metric, device):
    """The expanded square of a distance would have no digits left."""
    x, c = draw(device, *((10, 20) if interpreted(backend, device) else (50, 70)), 17)
    check(x + offset, c + offset, metric)


@pytest.mark.slow_for(backend="triton", scale=(1e-30, 1e-16, 1e25))
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e-16, 1e12, 1e25, 1e37])
def test_squares_that_overflow_or_underflow_float32(backend, scale, metric, device):
    x, c = draw(device, *((8, 12) if interpreted(backend, device) else (30, 40)), 9)
    for rows, codes in ((x * scale, c * scale), (x * scale, c), (x, c * scale)):
        check(rows, codes, metric)
    spread = torch.logspace(-30, 30, len(c), device=device)[:, None]
    check(x, c * spread, metric)
    check(x * spread[: len(x)], c, metric)


@pytest.mark.slow_for(backend="triton")
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("scale", [1e-300, 1e-160, 1e155, 1e300])
def test_squares_that_overflow_or_underflow_float64(backend, scale, metric, device):
    """The cosine is scale-invariant; distances and products that overflow are ties, which is not an error."""
    x, c = draw(device, 30, 40, 9, torch.float64)
    got = sk.vector_quantize(x, c * scale, metric=metric)
    if metric == "cosine":
        assert torch.equal(got.indices, code_oracle.indices(x, c, metric))
    assert got.indices.min() >= 0
    assert got.indices.max() < 40


@pytest.mark.parametrize("metric", METRICS)
def test_zero_rows_and_zero_codes(backend, metric, device):
    x, c = draw(device, 12, 20, 6)
    x[::3], c[4:9] = 0, 0
    got = check(x, c, metric)
    if metric == "l2":
        assert (got.indices[::3] == 4).all()
    else:
        assert not got.indices[::3].any()  # every score is 0
    check(-x.abs(), c.abs(), metric)  # all scores are negative except the scores of zero codes


@pytest.mark.slow_for(backend="triton", dtype=REPEATED_DTYPES)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_nonfinite_inputs(backend, dtype, metric, device):
    """A row with NaN has NaN values; every row finds a code with NaN; infinities follow the definition of the score.
    Nothing else changes."""
    x, c = draw(device, 20, 30, 7, dtype)
    expected = sk.vector_quantize(x, c, metric=metric)
    x[3, 2], x[11] = float("nan"), float("nan")
    got = sk.vector_quantize(x, c, metric=metric)
    touched = torch.zeros(20, dtype=torch.bool, device=device)
    touched[[3, 11]] = True
    assert torch.equal(got.indices, expected.indices.masked_fill(touched, 0))
    assert torch.equal(got.values.isnan(), touched[:, None].expand(20, 7))
    assert torch.equal(got.values[~touched], expected.values[~touched])
    assert got.commitment.isnan()
    for bad in (float("inf"), -float("inf"), float("nan")):
        for rows, codes in ((x.clone(), c), (x, c.clone()), (x.clone(), c.clone())):
            if rows is not x:
                rows[5, 1] = bad
            if codes is not c:
                codes[[13, 21], 1] = bad
            found = sk.vector_quantize(rows, codes, metric=metric)
            scores = torch.from_numpy(code_oracle.scores(rows, codes, metric)).to(device)
            assert torch.equal(found.indices, code_oracle.indices(rows, codes, metric))
            assert torch.equal(found.values[:, 0].isnan(), scores.isnan().any(1))


@pytest.mark.parametrize("metric", METRICS)
def test_codes_that_are_all_nan(backend, metric, device):
    x, c = draw(device, 9, 2300 if not interpreted(backend, device) else 40, 4)
    got = sk.vector_quantize(x, torch.full_like(c, float("nan")), metric=metric)
    assert not got.indices.any()
    assert got.values.isnan().all()


@pytest.mark.full_for(backend="cpu", metric=("cosine", "dot"))
@pytest.mark.full_for(backend="triton")
@pytest.mark.parametrize("metric", METRICS)
def test_one_code_and_many(backend, metric, device):
    x, c = draw(device, 25, 1, 16)
    assert not check(x, c, metric).indices.any()
    if interpreted(backend, device):
        return
    x, c = draw(device, 12 if backend == "reference" else 40, 65536, 16)
    c[60000:] = c[:5536]
    check(x, c, metric)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("workspace", [64, 4096])
def test_any_tiles_give_the_same_codes(backend, workspace, metric, monkeypatch, device):
    """Codes are compared across tiles; neither rows nor codes are multiples of a tile."""
    if backend != "cpu":
        pytest.skip("the tiles of the CPU")
    monkeypatch.setattr(nearest_code, "WORKSPACE_BYTES", workspace)
    monkeypatch.setattr(nearest_code, "LEAST_BYTES", workspace)
    monkeypatch.setattr(nearest_code, "TILE_CODES", 70)
    for dtype in DTYPES:
        x, c = draw(device, 101, 333, 13, dtype)
        c[200:] = c[:133]
        check(x, c, metric, ties=dtype != torch.float64)


@pytest.mark.full_for(backend=("triton", "reference"))
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dim", [2, 64, 127, 128, 129])
def test_every_panel_of_codes(backend, dim, metric, device):
    """More codes than a group of their summary, no multiple of a vector; half of them are duplicates of others, and
    each row is near a code."""
    if interpreted(backend, device):
        pytest.skip("the interpreter takes minutes")
    x, c = draw(device, 70, 2103, dim)
    c[1050:2100] = c[:1050]
    x += c[torch.arange(70, device=device) * 30]
    check(x, c, metric, ties=True)


@contextlib.contextmanager
def matmul_of_the_cpu(function):
    """torch.mm(a, b, out=out) computed by out.copy_(function(a, b)); counts its calls. It multiplies rows of more than
    kShortRow floats (csrc/latent/bind.cpp)."""
    if "cpu" not in sk.available_backends(OP, "cpu"):
        pytest.skip("the CPU's search")
    calls = []

    def replaced(a, b, *, out):
        calls.append(out.shape)
        return out.copy_(function(a, b))

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    library = torch.library.Library("aten", "IMPL")
    try:
        with warnings.catch_warnings(), sk.use_backend("cpu"):
            warnings.simplefilter("ignore")
            library.impl("mm.out", replaced, "CPU")
            yield
    finally:
        library._destroy()
        torch.set_num_threads(threads)
    assert calls


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products_with_the_largest_allowed_error(dtype, metric):
    """Each product off by the bound of a matmul's roundings, D u |x| |c|: the codes stay exact."""

    def rough(a, b):
        sign = torch.randint(0, 2, (a.shape[0], b.shape[1])) * 2.0 - 1
        error = sign * (a.shape[1] * 2.0**-24) * a.double().norm(dim=1)[:, None] * b.double().norm(dim=0)
        return a.double() @ b.double() + error

    x, c = draw("cpu", 200, 150, 160, dtype)
    c = torch.cat([c, c + (1e-6 if dtype == torch.float32 else 1e-2) * torch.randn(150, 160)]).to(dtype)
    with matmul_of_the_cpu(rough):
        check(x, c, metric)


@pytest.mark.slow_for(dtype=torch.bfloat16)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_triton_products_with_the_largest_allowed_error(dtype, metric, monkeypatch, device):
    """The same for the Triton search: half precision is off by 2^-22 a term, half of its bound."""
    if device != "cpu" or "triton" not in sk.available_backends(OP, device):
        pytest.skip("the interpreter's products can be replaced")
    from triton.runtime.interpreter import InterpreterBuilder

    exact_dot, rounding = InterpreterBuilder.create_dot, 2.0 ** (-24 if dtype == torch.float32 else -22)

    def rough_dot(self, a, b, d, *options):
        result = exact_dot(self, a, b, d, *options)
        rows, columns = (np.nan_to_num(part.data.astype(np.float32)) for part in (a, b))
        if a.dtype.scalar.name == "bf16":
            rows, columns = ((part.data.astype(np.uint32) << 16).view(np.float32) for part in (a, b))
        norms = np.linalg.norm(rows, axis=1)[:, None] * np.linalg.norm(columns, axis=0)
        sign = np.where(np.random.default_rng(0).random(norms.shape) < 0.5, -1.0, 1.0)
        result.data = (result.data + sign * rows.shape[1] * rounding * norms).astype(np.float32)
        return result

    x, c = draw(device, 20, 30, 32, dtype)
    c = torch.cat([c, c + (1e-6 if dtype == torch.float32 else 1e-2) * torch.randn(30, 32)]).to(dtype)
    monkeypatch.setattr(InterpreterBuilder, "create_dot", rough_dot)
    with sk.use_backend("triton"):
        check(x, c, metric)


@pytest.mark.parametrize("precision", ["bf16", "tf32"])
def test_matmuls_of_reduced_precision(precision):
    """The bound is wider if torch may round the operands of a float32 matmul."""
    x, c = draw("cpu", 100, 200, 160)
    c[100:] = c[:100] + 1e-4
    before = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = precision
    try:
        with matmul_of_the_cpu(lambda a, b: a.bfloat16().double() @ b.bfloat16().double()):
            for metric in METRICS:
                check(x, c, metric)
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before


def test_flushed_subnormals(device):
    if device != "cpu" or not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush them")
    try:
        x, c = draw(device, 20, 30, 5)
        with sk.use_backend("cpu"):
            for scale in (1e-19, 1e-30, 1e-37):
                check(x * scale, c, "dot")
                check(x * scale, c, "cosine")
                check(x * scale, c * scale, "l2")
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 0, 2)], ids=str)
def test_no_rows(backend, shape, device):
    x = torch.randn(*shape, 4, device=device, requires_grad=True)
    c = torch.randn(5, 4, device=device, requires_grad=True)
    got = sk.vector_quantize(x, c, straight_through=False, codebook_weight=1.0)
    assert got.values.shape == x.shape
    assert got.indices.shape == shape
    assert got.commitment.isnan()
    assert not got.usage.any()
    grads = torch.autograd.grad(got.values.sum() + 0 * got.commitment, (x, c), allow_unused=True)
    assert grads[0].shape == x.shape
    assert torch.equal(grads[1], torch.zeros_like(c))


def test_leading_dimensions_and_strides(backend, device):
    x, c = draw(device, 24, 10, 6)
    expected = sk.vector_quantize(x, c)
    for view in (x.reshape(2, 3, 4, 6), x.t().contiguous().t().reshape(4, 6, 6), torch.cat([x, x], 1)[:, :6]):
        got = sk.vector_quantize(view, torch.cat([c, c], 1)[:, :6])
        assert torch.equal(got.indices, expected.indices.reshape(view.shape[:-1]))
        assert torch.equal(got.values, expected.values.reshape(view.shape))
    one = sk.vector_quantize(x[5], c)
    assert one.indices.shape == ()
    assert one.indices == expected.indices[5]
    same = sk.vector_quantize(c, c)
    assert torch.equal(same.indices, torch.arange(10, device=device))
    assert same.commitment == 0


def test_memory(backend, device):
    """No (N, K) tensor (512 MiB here): the workspace, per-row and per-code buffers, and the results."""
    if backend == "reference" or interpreted(backend, device):
        pytest.skip("the reference materialises the scores of a thousand rows; the interpreter copies tensors")
    x, c = draw(device, 16384, 8192, 8)
    run = lambda: sk.vector_quantize(x, c)  # noqa: E731
    run()
    peak, _ = memory.peak_extra(run, torch.device(device))
    if peak is None:
        pytest.skip("this system has no resettable peak resident set")
    assert peak < 32 << 20


X, C = torch.randn(4, 3), torch.randn(5, 3)
ERRORS = [
    (dict(input=[1.0]), TypeError, r"input must be a torch.Tensor; got list"),
    (dict(input=X.long()), TypeError, r"input must have dtype .*; got torch.int64"),
    (dict(input=torch.tensor(1.0)), ValueError, r"input must have shape \(..., D\); got \(\)"),
    (dict(input=X[:, :2]), ValueError, r"input must have shape \(..., D\) with D = 3; got \(4, 2\)"),
    (dict(codebook=C.int()), TypeError, r"codebook must have dtype .*; got torch.int32"),
    (dict(codebook=C[0]), ValueError, r"codebook must have shape \(K, D\); got \(3,\)"),
    (dict(codebook=C[:0]), ValueError, r"codebook must have at least one code and one column; got \(0, 3\)"),
    (dict(codebook=C.to("meta")), ValueError, r"codebook must be on the device of input, cpu; got meta"),
    (dict(metric="l1"), ValueError, r"metric must be 'l2', 'cosine' or 'dot'; got 'l1'"),
    (dict(straight_through=1), TypeError, r"straight_through must be a bool; got int"),
    (dict(codebook_weight=-1.0), ValueError, r"codebook_weight must be in \[0, 3.40282e\+38\]; got -1.0"),
    (dict(codebook_weight=float("inf")), ValueError, r"codebook_weight must be in"),
    (dict(codebook_weight="1"), TypeError, r"codebook_weight must be a number; got str"),
]


@pytest.mark.parametrize(
    ("change", "kind", "message"), ERRORS, ids=lambda v: next(iter(v)) if isinstance(v, dict) else ""
)
def test_errors(change, kind, message):
    with pytest.raises(kind, match=r"^vector_quantize: " + message):
        sk.vector_quantize(**{"input": X, "codebook": C, **change})


ISA_PROGRAM = """
import torch, sslkernels as sk
from sslkernels.core import native
torch.manual_seed(0)
x, c = torch.randn(300, 33), torch.randn(1500, 33)
c[700:1400] = torch.nextafter(c[:700], torch.full((), float("inf")))
codes = [sk.vector_quantize(x.to(d), c.to(d), metric=m).indices.sum() for d in (torch.float32, torch.float16)
         for m in ("l2", "cosine", "dot")]
print(native.extension.build_info()["cpu_isa"] if native.extension else "none", *map(int, codes))
"""


@pytest.mark.slow
def test_every_instruction_set_gives_the_same_codes():
    printed = {}
    for isa in ("default", "avx2", "avx512"):
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"SSLKERNELS_CPU_ISA": isa}
        command = [sys.executable, "-c", ISA_PROGRAM]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
        _, *printed[isa] = done.stdout.split()
    assert printed["default"] == printed["avx2"] == printed["avx512"]


def test_a_row_that_is_not_a_number_is_no_use_of_a_code(backend, device):
    x, c = draw(device, 20, 5, 4)
    x[::4, 1] = float("nan")
    got = sk.vector_quantize(x, c)
    assert torch.equal(got.usage, sk.vector_quantize(x[x.isfinite().all(1)], c).usage)
    assert got.values[::4].isnan().all()
