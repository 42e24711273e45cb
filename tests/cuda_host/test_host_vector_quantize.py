"""The CUDA kernels of vector_quantize, run on the host under sanitizers: the search over tiles, with products that
have the largest admissible error, against brute force in float64."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import code_oracle
import pytest
import torch
from cases import DTYPES
from cuda_host import run
from cuda_host.run import ELEMENTS, Call
from torch import Tensor

from sslkernels.core.dtypes import accumulation_dtype
from sslkernels.latent import nearest_code
from sslkernels.latent.nearest_code import COSINE, METRICS

pytestmark = [run.required, pytest.mark.filterwarnings("ignore::RuntimeWarning")]  # from NumPy, in the oracle
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
OF_WARP = 1024  # kCodesOfWarp in csrc/latent/best_codes.cu: with more codes in a tile a team is a block


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Search:
    """One search. kind: what is special about rows and codes; as_given: half precision is multiplied as given; tf32:
    operands are truncated before the products."""

    metric: int = 0
    dtype: torch.dtype = F32
    code_dtype: torch.dtype | None = None
    rows: int = 21
    codes: int = 40
    dim: int = 12
    tile_rows: int = 64
    tile_codes: int = 4096
    kind: str = "random"
    as_given: bool = False
    tf32: bool = False

    def dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        return self.dtype, self.code_dtype or self.dtype

    def products(self) -> torch.dtype:
        return F64 if F64 in self.dtypes() else F32

    def inputs(self) -> tuple[Tensor, Tensor]:
        g = torch.Generator().manual_seed(self.rows + 100 * self.dim + self.codes)
        dtype, code_dtype = self.dtypes()
        x, c = (torch.randn(n, self.dim, generator=g, dtype=torch.float64) for n in (self.rows, self.codes))
        x, c = x.to(dtype), c.to(code_dtype)
        some = torch.arange(self.codes // 2, self.codes)
        if self.kind == "grid":
            return tuple(torch.randint(-2, 3, t.shape, generator=g).to(t.dtype) for t in (x, c))
        if self.kind == "twins":
            c[some] = c[: len(some)].flip(0)
        if self.kind == "one":
            c = c[:1].expand(c.shape).contiguous()
        if self.kind == "ulp":
            c[some] = c[: len(some)].clone()
            c[some, some % self.dim] = torch.nextafter(c[some, some % self.dim], torch.tensor(9e4, dtype=code_dtype))
            x = (c[torch.randint(self.codes, (self.rows,), generator=g)].double() + 0.02 * x.double()).to(dtype)
        if self.kind == "offset":
            x, c = x + 1000, c + 1000
        if self.kind == "zeros":
            x[::3], c[4:9] = 0, 0
        if self.kind == "nan":
            x[3, 2], x[-1], c[self.codes - 2, 1] = torch.nan, torch.nan, torch.nan
        if self.kind == "nan_rows":
            x[3, 2], x[-1] = torch.nan, torch.nan
        if self.kind == "nan_codes":
            c[:] = torch.nan
        if self.kind == "inf":
            x[3, 2], x[-1, 0], c[7, 1], c[self.codes - 1, 1] = torch.inf, -torch.inf, torch.inf, -torch.inf
        if self.kind == "spread":
            c = c * torch.logspace(-30, 30, self.codes, dtype=code_dtype)[:, None]
        if self.kind.startswith("scale"):
            scale = float(self.kind.removeprefix("scale"))
            x, c = (x if self.metric == COSINE else x * scale), c * scale
        return x, c

    def call(self) -> Call:
        x, c = self.inputs()
        products = self.products()
        arrays = {"input": x, "codebook": c}
        arrays |= {"index": torch.full((self.rows,), -7), "score": torch.full((self.rows,), -7.0, dtype=F64)}
        if METRICS[self.metric] == "l2" and not self.as_given:
            arrays["center"] = c.mean(0, dtype=F64).to(products).nan_to_num(0.0, 0.0, 0.0)
        of_sums = nearest_code.MATRIX_UNIT_ROUNDING * (self.dim + 8)
        rounding, error = 0.0, self.dim * torch.finfo(products).eps / 2
        if self.as_given:
            rounding, error = of_sums, of_sums / 2
        if self.tf32:
            rounding, error = of_sums + nearest_code.TF32_ROUNDING, 2.0**-9
        dtype, code_dtype = self.dtypes()
        ints = {
            "input_element": ELEMENTS[dtype], "codebook_element": ELEMENTS[code_dtype], "input_rows": self.rows,
            "codebook_rows": self.codes, "dim": self.dim, "metric": self.metric, "as_given": self.as_given,
            "tile_rows": self.tile_rows, "tile_codes": self.tile_codes, "is_double": products == F64,
        }  # fmt: skip
        return Call("search_codes", ints, {"matmul_rounding": rounding, "error": error}, arrays)


@dataclass(frozen=True)
class Gather:
    """One call of gather_codes and one of code_difference. nothing: rows without a code."""

    dtype: torch.dtype = F32
    code_dtype: torch.dtype = F32
    dim: int = 64
    rows: int = 37
    wide: bool = False  # the difference is in the accumulation dtype
    nothing: bool = False

    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """input, codebook, index, score."""
        g = torch.Generator().manual_seed(self.rows + self.dim)
        x, c = (torch.randn(n, self.dim, generator=g, dtype=F64) for n in (self.rows, 11))
        score = torch.full((self.rows,), torch.inf, dtype=F64)
        if self.nothing:
            score[::5] = torch.nan
        return x.to(self.dtype), c.to(self.code_dtype), torch.randint(11, (self.rows,), generator=g), score

    def sums(self) -> torch.dtype:
        return accumulation_dtype(torch.promote_types(self.dtype, self.code_dtype))

    def calls(self) -> tuple[Call, Call]:
        x, c, index, score = self.inputs()
        ints = {
            "input_element": ELEMENTS[self.dtype], "codebook_element": ELEMENTS[self.code_dtype],
            "input_rows": self.rows, "codebook_rows": 11, "dim": self.dim, "is_double": self.sums() == F64,
        }  # fmt: skip
        arrays = {"input": x, "codebook": c, "index": index}
        values = {"values": torch.full_like(x, 7.0), "distance": torch.full((self.rows,), 7.0, dtype=self.sums())}
        out = torch.full_like(x, 7.0, dtype=self.sums() if self.wide else self.dtype)
        coefficient = torch.full((), 0.3, dtype=self.sums())
        return (
            Call("gather_codes", ints, {}, arrays | {"score": score} | values),
            Call(
                "code_difference",
                ints | {"out_element": ELEMENTS[out.dtype]},
                {},
                arrays | {"coefficient": coefficient, "out": out},
            ),
        )


def search_cases() -> dict[str, Search]:
    """A launch takes hundreds of threads: few rows, and few tiles unless tiles are tested."""
    found = []
    for dtype, metric in itertools.product(DTYPES, range(3)):
        tiles = 17 if metric == 0 and dtype in (F32, BF16) else 4096
        found.append(Search(metric, dtype, rows=5, codes=30, dim=67, tile_codes=tiles))
        if dtype.itemsize == 2:
            found.append(Search(metric, dtype, rows=5, as_given=True, kind="ulp"))
    for dtype, code_dtype in ((BF16, F32), (F32, F16), (F16, BF16), (F64, BF16)):
        found.append(Search(dtype.itemsize % 3, dtype, code_dtype, rows=5))
    for kind, metric in itertools.product(("twins", "offset", "zeros", "spread"), range(3)):
        found.append(Search(metric, kind=kind, rows=5, codes=26))
    for i, kind in enumerate(("grid", "ulp", "nan", "nan_rows", "nan_codes", "inf")):
        found.append(Search(i % 3, kind=kind, rows=5, codes=26, tile_codes=15))
    found.append(Search(rows=7, dim=5, kind="twins", tile_rows=4, tile_codes=14))
    for kind in ("twins", "nan_rows", "random"):  # a team is a block
        found.append(Search(kind=kind, rows=4, codes=2 * OF_WARP + 77, dim=5, tile_codes=OF_WARP + 43))
    found.append(Search(1, BF16, kind="twins", rows=3, codes=OF_WARP + 6, dim=8, as_given=True))
    found.append(Search(2, F64, kind="grid", rows=2, codes=OF_WARP + 6, dim=3))
    for metric, scale in (
        (0, "1e-42"),
        (1, "1e-42"),
        (2, "1e-42"),
        (0, "1e-16"),
        (1, "1e12"),
        (0, "1e37"),
        (2, "1e37"),
    ):
        found.append(Search(metric, kind=f"scale{scale}", rows=3, codes=12))
    found += [Search(COSINE, F64, kind=f"scale{scale}", rows=3, codes=12) for scale in ("1e-300", "1e155")]
    found += [Search(metric, tf32=True, kind="twins", rows=5) for metric in range(3)]
    found += [Search(rows=1, codes=1, dim=1), Search(rows=5, codes=1), Search(rows=0), Search(dim=300, rows=5)]
    return {name_of(case): case for case in found}


def name_of(case: Search) -> str:
    flags = ("given" if case.as_given else "") + ("tf32" if case.tf32 else "")
    dtypes = "-".join(dict.fromkeys(map(short, case.dtypes())))
    return f"{METRICS[case.metric]}-{case.kind}{flags}-{dtypes}-{case.rows}x{case.codes}x{case.dim}-{case.tile_codes}"


def gather_cases() -> dict[str, Gather]:
    found = {}
    for dtype, code_dtype in itertools.product(DTYPES, DTYPES):
        dim = 64 if dtype == code_dtype else 21
        found[f"{short(dtype)}-{short(code_dtype)}-{dim}"] = Gather(dtype, code_dtype, dim)
    for dtype, dim in zip(DTYPES, (1, 3, 300, 77), strict=True):
        found[f"{short(dtype)}-wide-{dim}"] = Gather(dtype, dtype, dim, 9, wide=True, nothing=True)
    return found | {"no_rows": Gather(rows=0), "nothing": Gather(BF16, nothing=True)}


SEARCHES, GATHERS = search_cases(), gather_cases()
results, test_no_kernel_races = run.results_and_races(
    lambda: {
        **{f"search-{name}": case.call() for name, case in SEARCHES.items()},
        **{f"gather-{name}": case.calls()[0] for name, case in GATHERS.items()},
        **{f"difference-{name}": case.calls()[1] for name, case in GATHERS.items()},
    }
)


@pytest.mark.parametrize("name", SEARCHES)
def test_search(name, results):
    case, result = SEARCHES[name], results[f"search-{name}"]
    assert result.error == ""
    x, c = case.inputs()
    metric, index = METRICS[case.metric], result.arrays["index"]
    scores = torch.from_numpy(code_oracle.scores(x, c, metric))
    unscaled = case.products() == F64 and case.kind.startswith("scale")  # squares beyond float64
    expected = code_oracle.indices(x, case.inputs()[1] / float(case.kind[5:]) if unscaled else c, metric)
    # Ties go to the lowest index; the order of codes that float64 cannot separate is unspecified.
    exact = case.kind in ("grid", "twins", "one")
    assert torch.equal(index, expected) or (not exact and code_oracle.tied(x, c, index, metric))
    if not unscaled:
        assert torch.equal(result.arrays["score"].isnan(), scores.isnan().any(1))
    assert torch.equal(result.arrays["input"].nan_to_num(), x.nan_to_num())


@pytest.mark.parametrize("name", GATHERS)
def test_gather(name, results):
    case, result = GATHERS[name], results[f"gather-{name}"]
    assert result.error == ""
    x, c, index, score = case.inputs()
    nothing = score.isnan()
    values = c[index].to(case.dtype).masked_fill(nothing[:, None], torch.nan)
    assert torch.equal(result.arrays["values"].isnan(), values.isnan())
    assert torch.equal(result.arrays["values"].nan_to_num(), values.nan_to_num())
    squares = (x.double() - c[index].double()).square().sum(1).masked_fill(nothing, torch.nan)
    bound = (case.dim + 4) * torch.finfo(case.sums()).eps
    torch.testing.assert_close(result.arrays["distance"].double(), squares, rtol=bound, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", GATHERS)
def test_difference(name, results):
    case, result = GATHERS[name], results[f"difference-{name}"]
    assert result.error == ""
    x, c, index, _ = case.inputs()
    coefficient = torch.full((), 0.3, dtype=case.sums())
    truth = coefficient * (x.to(case.sums()) - c[index].to(case.sums()))
    assert torch.equal(result.arrays["out"], truth.to(result.arrays["out"].dtype))


def test_every_kernel_runs(results, request):
    program = run.build(request.node.callspec.params["results"])
    names = ("code_tile", "best_codes", "gather_codes", "code_difference")
    compiled = {name for name in run.kernels(program).values() if name.startswith(names)}
    assert len(compiled) == 11
    assert {name for result in results.values() for name in result.launched} == compiled


def test_rows_too_long_are_an_error(tmp_path):
    calls = [Search(rows=1).call(), *Gather(rows=1).calls()]
    for call in calls[1:]:
        call.ints["dim"] = 2**30 + 1
    results = run.run(run.build("address"), calls[1:], tmp_path)
    assert all("2^30" in result.error for result in results)
