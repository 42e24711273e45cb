"""The Triton kernels of pair scores: single tiles against the reference in float64, and whole energies."""

import pytest
import torch
from kernel_files import kernels

pytest.importorskip("triton")

from test_contrastive import DEFAULTS, cases, check, packed_cases

import sslkernels as sk
from sslkernels.contrastive.pair_rows import HINGE, SIGMOID, SOFTMAX, ColumnSums, SideGrad
from sslkernels.contrastive.score_tiles import GradientOutputs, Labels, Masks, ReferencePairs, RowSums, Thresholds, Tile
from sslkernels.contrastive.tile_backends import TritonPairs
from sslkernels.contrastive.triton import score_tiles as launcher
from sslkernels.contrastive.triton import tile_gradients, tile_sums, tile_weighted_sums

# The interpreter computes with NumPy, which warns where a device gives inf or NaN in silence.
pytestmark = [pytest.mark.pairwise, pytest.mark.filterwarnings("ignore::RuntimeWarning")]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPS = {torch.float32: 2**-24, torch.bfloat16: 2**-9, torch.float16: 2**-12}


@pytest.fixture
def small_supertiles(monkeypatch):
    """Small supertiles and one processor, so that few rows make several supertiles of several blocks each."""
    monkeypatch.setattr(tile_sums, "SUPERTILE", 128)
    for module in (tile_sums, tile_gradients, tile_weighted_sums):
        monkeypatch.setattr(module, "processors", lambda tensor: 1)


@pytest.fixture
def fixed_shift(monkeypatch):
    monkeypatch.setattr(tile_sums, "FIXED_SHIFT_PAIRS", 0)


def make_tile(
    device, rows, columns, dim, dtype, energy, *, scale=1.7, bias=None, normalize=False, labels=1, ids_positive=False,
    spread=1.0, products=True, masks=False,
):  # fmt: skip
    """labels: how many of the three pairs of labels exist; masks: of pairs and of columns."""
    g = torch.Generator().manual_seed(rows + 3 * columns + 7 * dim)
    queries, candidates = ((spread * torch.randn(n, dim, generator=g)).to(dtype).to(device) for n in (rows, columns))
    norms = (None, None)
    if normalize:
        norms = (1 / v.float().norm(dim=1).clamp(min=1e-12) for v in (queries, candidates))
    kinds = (columns, columns, 5)
    found = []
    for kind, present in zip(kinds, (labels >= 1, labels >= 2, labels >= 3), strict=True):
        for n in (rows, columns):
            label = torch.randint(0, kind, (n,), generator=g).to(torch.int32).to(device)
            found.append(label if present else None)
    memory = torch.full((rows, columns), float("nan"), dtype=dtype, device=device) if products else None
    numbers = (torch.full((1,), v, device=device) if v is not None else None for v in (scale, bias))
    kept = Masks()
    if masks:
        width = columns + 3 if rows > columns else columns  # a mask of more keys than the tile has
        index = torch.randint(width, (columns,), generator=g).to(device) if rows > columns else None
        pair = (torch.rand(width, 2 * rows, generator=g) < 0.7).to(device)[:, ::2].t()
        pair[rows // 2] = False
        kept = Masks(pair, index, (torch.rand(columns, generator=g) < 0.8).to(device))
    return Tile(queries, candidates, memory, *norms, *numbers, energy, Labels(*found), ids_positive, kept)


def widened(tile):
    wide = Tile(*(v.double() if isinstance(v, torch.Tensor) else v for v in tile))
    return wide._replace(products=wide.queries @ wide.candidates.T)


def copied(values, wide=False):
    if values is None:
        return None
    kept = (None if v is None else v.double().clone() if wide and v.is_floating_point() else v.clone() for v in values)
    return type(values)(*kept)


def make_sums(tile, energy, *, rows=True, columns=True, extra=True, statistics=False):
    def some(count, row):
        zeros = torch.zeros(count, dtype=torch.float64, device=tile.queries.device)
        largest = zeros.float() - float("inf") if energy == SOFTMAX else None
        active = zeros.clone() if energy == HINGE else None
        values = (largest, zeros.clone(), active, *(zeros.clone() if extra else None for _ in range(2)))
        if not row:
            return ColumnSums(*values)
        return RowSums(*values, *((zeros.clone(), zeros.long(), zeros.long()) if statistics else (None, None, None)))

    return (
        some(tile.queries.shape[0], True) if rows else None,
        some(tile.candidates.shape[0], False) if columns else None,
    )


def check_sums(tile, *, times=1, tolerance=3e-6, **options):
    """times: the tile is added to the running sums again."""
    rows, columns = make_sums(tile, tile.energy, **options)
    wide, device = widened(tile), tile.queries.device
    count, width = wide.products.shape
    thresholds = Thresholds(
        torch.randn(count, device=device), torch.randn(width, device=device), torch.randn(count, device=device)
    )
    norms = tuple(1 / v.float().norm(dim=1).clamp(min=1e-12) for v in (tile.queries, tile.candidates))
    want_rows, want_columns = copied(rows, True), copied(columns, True)
    for _ in range(times):
        TritonPairs().sums(tile, rows, columns, thresholds, norms)
        wide_thresholds = Thresholds(*(v.double() for v in thresholds))
        ReferencePairs().sums(wide, want_rows, want_columns, wide_thresholds, tuple(v.double() for v in norms))
    size = max(float(wide.products[wide.products.isfinite()].abs().max()) * float(tile.logit_scale.abs()), 1.0)
    if tile.row_norm is not None:
        size = max(float(tile.logit_scale.abs()), 1.0)
    for got, want in ((rows, want_rows), (columns, want_columns)):
        if got is None:
            continue
        terms = width if got is rows else count
        for name, value, wanted in zip(got._fields, got, want, strict=True):
            if value is None or name == "max":
                continue
            if name == "sum" and tile.energy == SOFTMAX:
                empty = want.sum == 0
                assert torch.equal(got.sum[empty], want.sum[empty])
                assert bool(got.max[empty].isneginf().all())
                value = (got.max + got.sum.log())[~empty]
                wanted = (want.max + want.sum.log())[~empty]
                torch.testing.assert_close(value, wanted, rtol=0, atol=tolerance * size + 1e-6, equal_nan=True)
            elif name in ("active", "num_above_positive", "num_equal_positive"):
                assert float((value - wanted).abs().max()) <= 1  # a score may be within a rounding of its threshold
            else:
                atol = tolerance * (times * terms * size if name != "uniformity_sum" else times * terms)
                torch.testing.assert_close(
                    value.double(),
                    wanted,
                    rtol=tolerance,
                    atol=atol,
                    equal_nan=True,
                    msg=lambda m, name=name: f"{name}: {m}",
                )


SHAPES = [(1, 1, 1), (16, 32, 19), (130, 200, 64), (256, 128, 16)]


@pytest.mark.parametrize("energy", [SOFTMAX, SIGMOID, HINGE])
@pytest.mark.parametrize(("rows", "columns", "dim"), SHAPES)
def test_sums(device, small_supertiles, rows, columns, dim, energy):
    plain = make_tile(device, rows, columns, dim, torch.float32, energy)
    check_sums(plain, times=2, extra=False)
    every = make_tile(
        device, rows, columns, dim, torch.float32, energy, scale=9.0, bias=-0.7, normalize=True, labels=3,
        ids_positive=energy != HINGE, masks=True,
    )  # fmt: skip
    check_sums(every, statistics=True)


@pytest.mark.parametrize("sides", ["rows", "columns"])
@pytest.mark.parametrize("energy", [SOFTMAX, SIGMOID, HINGE])
def test_sums_of_one_side(device, energy, sides):
    tile = make_tile(device, 70, 300, 24, torch.float32, energy, labels=3)
    check_sums(tile, rows=sides == "rows", columns=sides == "columns")
    check_sums(
        make_tile(device, 64, 64, 400, torch.float32, energy, labels=0),
        rows=sides == "rows",
        columns=sides == "columns",
    )


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("normalize", [False, True], ids=["", "normalize"])
def test_sums_of_half_precision(device, small_supertiles, fixed_shift, dtype, normalize):
    """Products are exact and accumulate in float32: the tolerance is float32's."""
    tile = make_tile(device, 100, 200, 64, dtype, SOFTMAX, normalize=normalize, scale=20.0)
    check_sums(tile, statistics=True)


@pytest.mark.parametrize("scale", [0.0, 1.0, -30.0, 100.0, 3000.0])
@pytest.mark.parametrize("bias", [None, 40.0], ids=["", "bias"])
def test_softmax_of_normalised_features(device, small_supertiles, fixed_shift, scale, bias):
    """Some rows and columns have a best cosine of -0.5, where exponentials with the fixed shift underflow."""
    tile = make_tile(device, 150, 140, 16, torch.float32, SOFTMAX, scale=scale, bias=bias, normalize=True, spread=0.2)
    direction = torch.zeros(16, device=device)
    direction[0] = 1.0
    away = torch.zeros(16, device=device)
    away[0], away[1] = -0.5, 0.75**0.5
    for lonely, others in ((tile.queries[3:5], tile.candidates), (tile.candidates[7:8], tile.queries)):
        others[:] = 0.01 * others + direction
        lonely[:] = away
        others += 0
    tile.candidates[20:] = direction + 0.001 * torch.randn(120, 16, device=device)
    tile.queries[5:] = direction + 0.001 * torch.randn(145, 16, device=device)
    tile.candidates[7], tile.queries[3] = away, away
    norms = (1 / v.norm(dim=1) for v in (tile.queries, tile.candidates))
    check_sums(tile._replace(row_norm=next(norms), column_norm=next(norms)), times=2)


def test_steps_of_a_mask_that_need_64_bits(device, monkeypatch):
    monkeypatch.setattr(launcher, "WIDE_STEP", 2)
    check_sums(make_tile(device, 40, 70, 19, torch.float32, SOFTMAX, masks=True))
    check_gradients(make_tile(device, 70, 40, 19, torch.float32, SOFTMAX, masks=True))


def test_far_scores(device, small_supertiles):
    """|s| of ten thousand, where exponentials without a maximum are inf or 0."""
    for scale in (300.0, -300.0):
        check_sums(make_tile(device, 90, 140, 64, torch.float32, SOFTMAX, scale=scale, spread=2.0))


@pytest.mark.parametrize("energy", [SOFTMAX, SIGMOID, HINGE])
@pytest.mark.parametrize("normalize", [False, True], ids=["", "normalize"])
def test_nan_stays_in_its_row(device, small_supertiles, fixed_shift, energy, normalize):
    tile = make_tile(device, 70, 140, 19, torch.float32, energy, normalize=normalize)
    tile.queries[5] = float("nan")
    rows, _ = make_sums(tile, energy, columns=False, extra=False)
    TritonPairs().sums(tile, rows, None, Thresholds(torch.zeros(70, device=device), None, None), None)
    assert bool(rows.sum[5].isnan())
    assert bool(rows.sum[torch.arange(70) != 5].isfinite().all())
    rows, columns = make_sums(tile, energy, extra=False)
    zeros = torch.zeros(140, device=device)
    TritonPairs().sums(tile, rows, columns, Thresholds(zeros[:70], zeros, None), None)
    paired = tile.labels.column_positive == tile.labels.row_positive[5]
    assert bool(columns.sum[~paired].isnan().all())
    assert bool(columns.sum[paired].isfinite().all())


@pytest.mark.parametrize("normalize", [False, True], ids=["", "normalize"])
def test_rows_without_candidates(device, small_supertiles, fixed_shift, normalize):
    tile = make_tile(device, 40, 70, 19, torch.float32, SOFTMAX, normalize=normalize, labels=3)
    tile.labels.column_id.fill_(3)
    check_sums(tile)
    for empty in (tile._replace(queries=tile.queries[:0]), tile._replace(candidates=tile.candidates[:0])):
        rows, columns = make_sums(empty, SOFTMAX)
        TritonPairs().sums(empty, rows, columns, Thresholds(None, None, None), None)
        assert bool((rows.sum == 0).all())
        assert bool((columns.sum == 0).all())


def make_side(tile, count, dim, *, every, wide):
    g = torch.Generator().manual_seed(count)
    device = tile.queries.device
    s = tile.logit_scale.double() * wide.products
    if tile.row_norm is not None:
        s = tile.logit_scale.double() * wide.products * wide.row_norm.unsqueeze(1) * wide.column_norm
    reference = torch.randn(count, generator=g).to(device)
    if tile.energy == SOFTMAX:
        reference = s.logsumexp(dim).float() + (0 if tile.logit_bias is None else tile.logit_bias)
        reference[:1] = float("inf")
    weight = torch.rand(count, generator=g).to(device)
    share, smoothing = (0.1 * torch.rand(count, generator=g).to(device) for _ in range(2))
    if tile.energy != SOFTMAX or not every:
        share = smoothing = None
    return SideGrad(weight, None if tile.energy == SIGMOID else reference, share, smoothing)


def check_gradients(tile, *, every=True, rows=True, columns=True, wanted=(True, True), start=1.0, fused=False):
    wide, device = widened(tile), tile.queries.device
    (count, dim), width = tile.queries.shape, tile.candidates.shape[0]
    row = make_side(tile, count, 1, every=every, wide=wide) if rows else SideGrad()
    column = make_side(tile, width, 0, every=every, wide=wide) if columns else SideGrad()
    ones = torch.ones(count, dtype=torch.float64, device=device)
    grads = (
        torch.full((n, dim), start, device=device) if want else None
        for n, want in zip((count, width), wanted, strict=True)
    )
    got_sums, want_sums = (make_sums(tile, SIGMOID, columns=False, extra=False)[0] if fused else None for _ in range(2))
    got = GradientOutputs(ones, ones.clone(), *grads, got_sums)
    want = copied(got._replace(row_sums=None), True)._replace(row_sums=want_sums)
    TritonPairs().add_gradients(tile, row, column, got)
    # The dense gradient, which gives the magnitude of each result's terms.
    dense = wide._replace(products=wide.products.clone())
    ReferencePairs().add_gradients(
        dense, *(SideGrad(*(None if v is None else v.double() for v in s)) for s in (row, column)), want
    )
    if fused:
        torch.testing.assert_close(got_sums.sum, want_sums.sum, rtol=1e-5, atol=1e-5)
    g, eps = dense.products.abs(), EPS[tile.queries.dtype]
    torch.testing.assert_close(got.dot, want.dot, rtol=3e-5, atol=3e-5)
    torch.testing.assert_close(got.total, want.total, rtol=3e-5, atol=3e-5)
    for value, expected, size in (
        (got.queries, want.queries, g @ wide.candidates.abs()),
        (got.candidates, want.candidates, g.T @ wide.queries.abs()),
    ):
        if value is not None:
            assert bool(((value - expected).abs() <= 4 * eps * size + 3e-5 * size.max()).all())


@pytest.fixture(params=["owner", "tile"])
def gradient_kernel(request, monkeypatch):
    """Either kernel computes any case; D and dtype decide which one runs."""
    for module in (launcher, tile_gradients):
        monkeypatch.setattr(module, "owns_rows", lambda dim, dtype: request.param == "owner" and dim <= 256)


@pytest.mark.parametrize("energy", [SOFTMAX, SIGMOID, HINGE])
@pytest.mark.parametrize(("rows", "columns", "dim"), SHAPES)
def test_gradients(device, small_supertiles, gradient_kernel, rows, columns, dim, energy):
    both = energy != SIGMOID
    fused = energy == SIGMOID
    plain = make_tile(device, rows, columns, dim, torch.float32, energy)
    check_gradients(plain, every=False, columns=both, fused=fused)
    every = make_tile(
        device, rows, columns, dim, torch.float32, energy, scale=9.0, bias=-0.7, normalize=True, labels=3,
        ids_positive=energy != HINGE, masks=True,
    )  # fmt: skip
    check_gradients(every, columns=both, fused=fused)


@pytest.mark.parametrize(
    "wanted", [(True, False), (False, True), (False, False)], ids=["queries", "candidates", "sums"]
)
def test_gradients_of_one_side(device, gradient_kernel, wanted):
    """With many processors the columns are split."""
    sigmoid = make_tile(device, 24, 300, 32, torch.float32, SIGMOID, labels=3, bias=-3.0)
    check_gradients(sigmoid, columns=False, wanted=wanted, fused=True)
    tile = make_tile(device, 24, 300, 32, torch.float32, SOFTMAX, labels=3, normalize=True)
    check_gradients(tile, wanted=wanted)
    check_gradients(tile, rows=False, wanted=wanted)
    check_gradients(tile, columns=False, wanted=wanted)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("normalize", [False, True], ids=["", "normalize"])
def test_gradients_of_half_precision(device, gradient_kernel, dtype, normalize):
    """Hundreds of candidates of about equal probability, and features of norm 40 or 1/40."""
    for spread in (1.0, 5.0, 5e-3):
        if normalize or spread < 1.0:
            tile = make_tile(device, 16, 512, 64, dtype, SOFTMAX, normalize=normalize, spread=spread)
            check_gradients(tile, every=False, columns=False, start=0.0)


def test_gradients_of_a_zero_vector_in_float16(device, gradient_kernel):
    """A key of zeros has the inverse norm 1e12, which must not make the other gradients underflow."""
    tile = make_tile(device, 64, 64, 64, torch.float16, SOFTMAX, normalize=True, labels=0)
    tile.candidates[3] = 0
    norm = tile.column_norm.clone()
    norm[3] = 1e12
    tile = tile._replace(column_norm=norm)
    wide = widened(tile)
    row = make_side(tile, 64, 1, every=False, wide=wide)
    got = torch.zeros(64, 64, device=device)
    dot, total = (torch.zeros(64, dtype=torch.float64, device=device) for _ in range(2))
    TritonPairs().add_gradients(tile, row, SideGrad(), GradientOutputs(dot, total, got, None))
    want = torch.zeros(64, 64, dtype=torch.float64, device=device)
    outputs = GradientOutputs(dot.clone(), total.clone(), want, None)
    ReferencePairs().add_gradients(wide, copied(row, True), SideGrad(), outputs)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=4e-3 * float(want.abs().max()))


def test_costs_of_far_scores_and_nan(device, gradient_kernel):
    """|s| of hundreds, where exponentials are inf or 0; a NaN stays in its row."""
    check_gradients(make_tile(device, 40, 70, 19, torch.float32, SIGMOID, scale=90.0), columns=False, fused=True)
    tile = make_tile(device, 40, 70, 19, torch.float32, SIGMOID)
    tile.queries[5] = float("nan")
    rows, _ = make_sums(tile, SIGMOID, columns=False, extra=False)
    dot, total = (torch.zeros(40, dtype=torch.float64, device=device) for _ in range(2))
    grads = torch.zeros(40, 19, device=device)
    outputs = GradientOutputs(dot, total, grads, None, rows)
    TritonPairs().add_gradients(tile, SideGrad(torch.ones(40, device=device)), SideGrad(), outputs)
    for values in (rows.sum, dot, total, grads.sum(1)):
        assert bool(values[5].isnan())
        assert bool(values[torch.arange(40) != 5].isfinite().all())


def check_weighted(*tiles):
    """Adds tiles of the same rows one after another and compares with the reference in float64."""
    count, dim = tiles[0].queries.shape
    device, eps = tiles[0].queries.device, EPS[tiles[0].queries.dtype]
    sums, _ = make_sums(tiles[0], SOFTMAX, columns=False, extra=False)
    weighted, weighted_u = torch.zeros(count, dim, device=device), torch.zeros(count, device=device)
    want = [copied(sums, True), weighted.double(), weighted_u.double()]
    sizes = [copied(sums, True), weighted.double(), weighted_u.double()]
    size = 1.0
    for tile in tiles:
        TritonPairs().weighted_sums(tile, sums, weighted, weighted_u)
        wide = widened(tile)
        u = wide.products
        if tile.row_norm is not None:
            u = u * wide.row_norm.unsqueeze(1) * wide.column_norm
        size = max(size, float((u * wide.logit_scale).abs().max()))
        ReferencePairs().weighted_sums(wide, *want)
        ReferencePairs().weighted_sums(wide._replace(candidates=wide.candidates.abs()), *sizes)
    some = want[0].sum > 0
    assert bool(sums.max[~some].isneginf().all())
    for value in (sums.sum, weighted, weighted_u):
        assert bool((value[~some] == 0).all())
    moved, terms = (sums.max[some].double() - want[0].max[some]).exp(), want[0].sum[some]
    close = 3e-6 * size + 1e-6
    assert bool(((sums.sum[some] * moved - terms).abs() <= close * terms).all())
    largest_u = size / max(float(tiles[0].logit_scale.abs()), 1e-3)
    assert bool(((weighted_u[some] * moved - want[2][some]).abs() <= 2 * close * largest_u * terms).all())
    error = (weighted[some] * moved.unsqueeze(1) - want[1][some]).abs()
    assert bool((error <= (2 * eps + 2 * close) * sizes[1][some] + 1e-30).all())


@pytest.mark.full_for(splits="many", rows=(130, 256))
@pytest.mark.parametrize("splits", ["few", "many"])
@pytest.mark.parametrize(("rows", "columns", "dim"), [*SHAPES, (40, 300, 250)])
def test_weighted_sums(device, request, splits, rows, columns, dim):
    if splits == "few":
        request.getfixturevalue("small_supertiles")
    plain = make_tile(device, rows, columns, dim, torch.float32, SOFTMAX)
    check_weighted(plain)
    every = make_tile(
        device, rows, columns, dim, torch.float32, SOFTMAX, scale=9.0, bias=-0.7, normalize=True, labels=3, masks=True
    )
    bank = make_tile(device, rows, 37, dim, torch.float32, SOFTMAX, scale=9.0, bias=-0.7, normalize=True, labels=0)
    bank = bank._replace(queries=every.queries, row_norm=every.row_norm)
    check_weighted(every, bank)
    check_weighted(bank, every)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("normalize", [False, True], ids=["", "normalize"])
def test_weighted_sums_of_half_precision(device, dtype, normalize):
    """Features of norm 40 or 1/40, and one candidate that scores far above hundreds of others."""
    for spread in (1.0, 5.0, 5e-3):
        if normalize or spread <= 1.0:
            tile = make_tile(device, 40, 512, 64, dtype, SOFTMAX, normalize=normalize, spread=spread)
            check_weighted(tile)
    tile = make_tile(device, 16, 512, 64, dtype, SOFTMAX, scale=12.0, normalize=True, labels=0)
    tile.candidates[100] = tile.queries[0]
    tile.column_norm[100] = tile.row_norm[0]
    check_weighted(tile)


def test_weighted_sums_of_far_scores(device, small_supertiles):
    for scale in (300.0, -300.0, 0.0):
        check_weighted(make_tile(device, 40, 140, 64, torch.float32, SOFTMAX, scale=scale, spread=2.0))


def test_weighted_sums_without_candidates(device):
    """Rows all of whose candidates are excluded, then some; and tiles without rows or columns."""
    tile = make_tile(device, 40, 70, 19, torch.float32, SOFTMAX, labels=3)
    tile.labels.column_id.fill_(3)
    bank = make_tile(device, 40, 30, 19, torch.float32, SOFTMAX, labels=0)._replace(queries=tile.queries)
    for tiles in ((tile,), (tile, bank), (bank, tile), (tile._replace(candidates=tile.candidates[:0]), bank)[1:]):
        check_weighted(*tiles)
    for empty in (tile._replace(queries=tile.queries[:0]), tile._replace(candidates=tile.candidates[:0])):
        sums, _ = make_sums(empty, SOFTMAX, columns=False, extra=False)
        weighted = torch.zeros_like(empty.queries)
        TritonPairs().weighted_sums(empty, sums, weighted, weighted[:, 0].clone())
        assert bool((sums.sum == 0).all())
        assert bool((weighted == 0).all())


@pytest.mark.parametrize("normalize", [False, True], ids=["", "normalize"])
def test_nan_stays_in_its_row_of_weighted_sums(device, normalize):
    tile = make_tile(device, 70, 140, 19, torch.float32, SOFTMAX, normalize=normalize)
    tile.queries[5] = float("nan")
    sums, _ = make_sums(tile, SOFTMAX, columns=False, extra=False)
    weighted, weighted_u = torch.zeros(70, 19, device=device), torch.zeros(70, device=device)
    TritonPairs().weighted_sums(tile, sums, weighted, weighted_u)
    for values in (sums.sum, weighted_u, weighted.sum(1)):
        assert bool(values[5].isnan())
        assert bool(values[torch.arange(70) != 5].isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bank", [0, 30])
def test_energy_of_frozen_candidates(device, monkeypatch, dtype, bank):
    """Scores of keys and a bank without a gradient are computed once."""
    calls = []
    weighted_sums = TritonPairs.weighted_sums
    monkeypatch.setattr(TritonPairs, "weighted_sums", lambda *args: (calls.append(1), weighted_sums(*args)))
    generator = torch.Generator().manual_seed(1)
    query, key, shared = (torch.randn(n, 24, generator=generator).to(device, dtype) for n in (50, 60, bank))
    found = []
    for backend, wide in (("triton", dtype), ("reference", torch.float64)):
        leaf = query.to(wide).requires_grad_()
        scale = torch.tensor(5.0, device=device, dtype=torch.promote_types(wide, torch.float32), requires_grad=True)
        with sk.use_backend(backend):
            loss = sk.contrastive_energy(
                leaf, key.to(wide), bank=shared.to(wide) if bank else None, logit_scale=scale, normalize=True
            )
        found.append([loss.detach(), *torch.autograd.grad(loss, [leaf, scale])])
    assert len(calls) == (2 if bank else 1)
    rtol = 1e-5 if dtype == torch.float32 else 1e-2
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=rtol, atol=rtol * float(want.abs().max()))


def test_row_blocks():
    features = torch.zeros(10, 768, dtype=torch.bfloat16)
    kernels = TritonPairs()
    assert kernels.tile_shape((70000, 1024), features, False, True) == ((70000, 1024), False)
    assert kernels.tile_shape((70000, 65536), features, False, True) == ((3072, 65536), False)  # 9 MiB on a CPU
    assert kernels.tile_shape((0, 65536), features, True, True)[0] == (1, 65536)
    assert kernels.has_weighted_sums(features[:, :256])
    assert not kernels.has_weighted_sums(features)
    assert not kernels.has_weighted_sums(features[:, :256].double())
    rows, written = tile_gradients.row_block(65536, 4096, features, 512 << 20)
    assert written
    assert rows == 65536 // 5632 * 5632
    assert tile_gradients.row_block(65536, 65536, features, 512 << 20) == (4096, True)
    assert tile_gradients.row_block(65536, 65536, features[:, :256], 512 << 20) == (65536, False)


def test_partials_fit_the_workspace():
    """For 262144 x 262144 scores the partials of all supertiles would take 3 GB: row blocks limit them."""
    rows = tile_sums.row_block(262144, 262144, 512 << 20)
    assert rows % 1024 == 0
    assert rows * 262144 // 1024 * tile_sums.PARTIAL_BYTES <= 512 << 20
    assert tile_sums.row_block(8192, 8192, 512 << 20) == 8192
    assert tile_sums.row_block(5000, 10**9, 512 << 20) == 1024
    assert tile_sums.row_block(0, 5, 512 << 20) == 1


@pytest.mark.parametrize(
    "case",
    packed_cases()[::4] + [pytest.param(*case.values, id=case.id, marks=pytest.mark.slow) for case in cases()[::3]],
)
def test_energies_against_dense_float64(case):
    with sk.use_backend("triton"):
        check(case, torch.float32, 2e-5)


@pytest.mark.full_for(dim=400, energy=("sigmoid", "hinge"))
@pytest.mark.parametrize("dim", [1, 64, 400])
@pytest.mark.parametrize("energy", ["softmax", "sigmoid", "hinge"])
def test_energies_of_many_rows(small_supertiles, fixed_shift, energy, dim):
    case = {**DEFAULTS, "shape": "square", "energy": energy, "direction": "symmetric", "normalize": dim > 1, "bank": 30}
    with sk.use_backend("triton"):
        check(case, torch.float32, 2e-5, n=150, dim=dim)


def test_float64_is_the_reference():
    case = {**DEFAULTS, "shape": "square", "direction": "symmetric", "bank": 3}
    with sk.use_backend("triton"):
        check(case, torch.float64, 1e-9)


@kernels("contrastive_energy")
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("energy", [SOFTMAX, SIGMOID, HINGE])
@pytest.mark.parametrize(
    ("rows", "columns", "dim"), [(2048, 4096, 64), (1000, 3001, 200), (2048, 2048, 768), (256, 65536, 128)]
)
def test_real_tiles(device, fixed_shift, dtype, energy, rows, columns, dim):
    both = energy != SIGMOID
    for labels in (1, 3):
        tile = make_tile(
            device, rows, columns, dim, dtype, energy, scale=20.0, normalize=True, labels=labels,
            ids_positive=labels == 3 and energy != HINGE,
        )  # fmt: skip
        check_sums(tile, extra=labels == 3, statistics=labels == 3)
        check_gradients(tile, every=labels == 3, columns=both, start=0.0, fused=not both)
        if energy == SOFTMAX and dim <= 256:
            check_weighted(tile._replace(ids_positive=False))
