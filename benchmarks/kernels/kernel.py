"""Single kernels of the extension, each against its floor: what `csrc/cuda/floors.h` says it must read and write."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import harness, providers
from benchmarks.harness import Bar, Benchmark, Case, Provider, Run
from benchmarks.kernels import codes as code_kernels
from benchmarks.kernels import gumbel as gumbel_kernels
from benchmarks.kernels import latent as energy_kernels
from benchmarks.kernels import vocabulary as sample_kernels
from benchmarks.ops.cross_entropy import make_inputs as make_logits
from benchmarks.providers import OURS
from sslkernels import native, use_backend
from sslkernels.ops import gaussian_operators, negative_sampling, row_sums
from sslkernels.ops.own_negatives import SOFTMAX, own_negatives
from sslkernels.ops.rows import NativeRows, ReferenceRows, RowOptions, Rows, TritonRows, accumulation_dtype

OP = "kernels"
PLAIN = "plain torch"
COPY = "copy of the same bytes (floor)"
OPTIONS = RowOptions(-100, 0.0, 0.0, 0.0)
NEGATIVES = 5
ENTRIES_OF_ROW = 2
OWNED = ("grad", "total", "out", "loss", "slopes", "direction", "value", "grad_target", "logprob")
Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Kernel:
    """floor: its arguments for a case; call: one launch into memory that is there; results: what to check of it;
    oracle: the same in float64; eager: what torch does for it, where it is not a `Rows`; triton: it is there in Triton
    too; share: of the bandwidth of a copy, that its bar asks for."""

    floor: Callable[[Case], dict[str, int]]
    call: Callable[[Rows, Case, Inputs], object]
    results: Callable[[Case, Inputs], tuple[Tensor, ...]]
    oracle: Callable[[Case, Inputs], tuple[Tensor, ...]]
    eager: Callable[[Case, Inputs], object] | None = None
    triton: bool = False
    share: float = 0.9


def _sizes(case: Case) -> tuple[int, int, int]:
    rows = case.shape["N"]
    return rows - round(rows * case.ignored), rows, case.shape["V"]


def _rows_floor(case: Case) -> dict[str, int]:
    valid, rows, vocab = _sizes(case)
    return {"valid": valid, "rows": rows, "vocab": vocab, "element_bytes": case.dtype.itemsize}


def _forward(rows: Rows, case: Case, t: Inputs) -> None:
    outputs = rows.forward(
        t["logits"], t["target"], t.get("bias"), None, OPTIONS,
        stats=False, coefficient=t["coefficient"], grad=t["grad"] if case.backward else None,
    )  # fmt: skip
    t["loss"] = outputs.loss


def _backward(rows: Rows, case: Case, t: Inputs) -> None:
    state = t["state"]
    rows.backward(t["logits"], t["target"], t.get("bias"), None, OPTIONS, state, t["coefficient"], t["grad"])


def _row_oracle(case: Case, t: Inputs) -> tuple[Tensor, ...]:
    leaf = t["logits"].double()
    logits = (leaf + t["bias"].double() if "bias" in t else leaf).requires_grad_()
    loss = F.cross_entropy(logits, t["target"], reduction="none")
    (grad,) = torch.autograd.grad(loss, logits, t["coefficient"].double())
    return (loss.detach(), grad)


def _own(rows: Rows, case: Case, t: Inputs) -> None:
    coefficient = t["coefficient"] if case.backward else None
    with use_backend("triton" if isinstance(rows, TritonRows) else t["query"].device.type):
        outputs = own_negatives(
            t["query"], t["negatives"], None, None, t["scale"], None, SOFTMAX, t["reference"], coefficient, None,
            False, True, True, False,
        )  # fmt: skip
    t["value"], t["grad_query"], t["grad_negatives"] = outputs[1:4]


def _own_eager(case: Case, t: Inputs, dtype: torch.dtype | None = None) -> None:
    query, negatives = (t[name].detach().to(dtype).requires_grad_(case.backward) for name in ("query", "negatives"))
    scores = torch.einsum("nd,nkd->nk", query, negatives) * t["scale"].to(query.dtype)
    candidates = torch.cat([t["reference"].to(query.dtype).unsqueeze(1), scores], 1)
    value = candidates.logsumexp(1)
    t["value"] = value.detach()
    if case.backward:
        grads = torch.autograd.grad(value, (query, negatives), t["coefficient"].to(query.dtype))
        t["grad_query"], t["grad_negatives"] = grads


def _own_results(case: Case, t: Inputs) -> tuple[Tensor, ...]:
    return (t["value"], t["grad_negatives"]) if case.backward else (t["value"],)


def _own_oracle(case: Case, t: Inputs) -> tuple[Tensor, ...]:
    wide = dict(t)
    _own_eager(case, wide, torch.float64)
    return _own_results(case, wide)


def _pairs(fill: Callable[..., object], t: Inputs) -> None:
    tables = (t["logits"], t["logits"])
    fill(t["center"], t["context"], t["negatives"], *tables, t["loss"], t["slopes"], t["direction"], False)


def _pairs_oracle(case: Case, t: Inputs) -> tuple[Tensor, ...]:
    exact = {name: t[name].double() for name in ("logits", "loss", "slopes", "direction")}
    _pairs(negative_sampling._fill_reference, {**t, **exact})
    return exact["loss"], exact["direction"]


def _row_sums(t: Inputs) -> None:
    _native("weighted_row_sums")(t["starts"], t["order"], t["coefficient"], t["logits"], None, t["out"], 1)


def _row_sums_oracle(case: Case, t: Inputs) -> tuple[Tensor, ...]:
    terms = t["coefficient"].double()[:, None] * t["logits"].double()
    return (torch.zeros(t["out"].shape, dtype=torch.float64, device=terms.device).index_add_(0, t["keys"], terms),)


def _gaussian(case: Case, t: Inputs, backend: str, dtype: torch.dtype | None = None) -> None:
    """One sample of each of N rows of V columns and their divergence, or the gradients of both."""
    options = (1, False, gaussian_operators.ROWS, 0.0, -math.inf, math.inf)
    mean, logvar, grad_z = (t[name].to(dtype) for name in ("logits", "logvar", "wide"))
    inputs = (mean, logvar, None, None, None, t["seed"])
    with use_backend(backend):
        if case.op == "gaussian_fwd":
            t["first"], t["second"], *_ = gaussian_operators.gaussian_fwd(*inputs, *options, False)
        else:
            grads = (grad_z.unsqueeze(1), t["coefficient"].to(accumulation_dtype(mean.dtype)))
            wanted = (True, True, False, False)
            t["first"], t["second"], *_ = gaussian_operators.gaussian_bwd(*grads, *inputs, *options, *wanted)


def _gaussian_kernel(share: float) -> Kernel:
    def oracle(case: Case, t: Inputs) -> tuple[Tensor, ...]:
        exact = dict(t)
        _gaussian(case, exact, "reference", torch.float64)
        return exact["first"], exact["second"]

    def call(rows: Rows, case: Case, t: Inputs) -> None:
        _gaussian(case, t, "triton" if isinstance(rows, TritonRows) else t["logits"].device.type)

    return Kernel(
        lambda case: {
            "rows": case.shape["N"],
            "columns": case.shape["V"],
            "samples": 1,
            "element_bytes": case.dtype.itemsize,
        },
        call,
        lambda case, t: (t["first"], t["second"]),
        oracle,
        lambda case, t: _gaussian(case, t, "reference"),
        triton=True,
        share=share,
    )


def _native(name: str) -> Callable[..., object]:
    return getattr(torch.ops.sslkernels_native, name)


KERNELS = {
    "cross_entropy_rows_fwd": Kernel(
        lambda case: {**_rows_floor(case), "gradient": case.backward},
        _forward,
        lambda case, t: (t["loss"], t["grad"]) if case.backward else (t["loss"],),
        _row_oracle,
        triton=True,
    ),
    "cross_entropy_rows_bwd": Kernel(
        _rows_floor,
        _backward,
        lambda case, t: (t["grad"],),
        lambda case, t: _row_oracle(case, t)[1:],
        triton=True,
    ),
    "own_negatives": Kernel(
        lambda case: {
            "rows": case.shape["N"],
            "count": case.shape["K"],
            "dim": case.shape["D"],
            "element_bytes": case.dtype.itemsize,
            "normalise": False,
            "gradient": case.backward,
        },
        _own,
        _own_results,
        _own_oracle,
        _own_eager,
        triton=True,
    ),
    "column_sums": Kernel(
        lambda case: {"rows": case.shape["N"], "columns": case.shape["V"], "element_bytes": case.dtype.itemsize},
        lambda rows, case, t: _native("column_sums")(t["logits"], t["total"], False),
        lambda case, t: (t["total"],),
        lambda case, t: (t["logits"].double().sum(0),),
        lambda case, t: torch.sum(t["logits"], 0, dtype=t["total"].dtype, out=t["total"]),
    ),
    "scale_add": Kernel(
        lambda case: {
            "count": case.shape["N"] * case.shape["V"],
            "input_bytes": accumulation_dtype(case.dtype).itemsize,
            "out_bytes": case.dtype.itemsize,
            "add": False,
        },
        lambda rows, case, t: _native("scale_add")(t["wide"], t["scale"], t["grad"], False),
        lambda case, t: (t["grad"],),
        lambda case, t: (t["wide"].double() * t["scale"].double(),),
        lambda case, t: t["grad"].copy_(t["wide"] * t["scale"]),
    ),
    # N pairs and N words, V columns.
    "negative_sampling_fwd": Kernel(
        lambda case: {
            "pairs": case.shape["N"],
            "negatives": NEGATIVES,
            "center_rows": case.shape["N"],
            "context_rows": case.shape["N"],
            "dim": case.shape["V"],
            "element_bytes": case.dtype.itemsize,
            "index_bytes": 8,
            "gradient": True,
        },
        lambda rows, case, t: _pairs(_native("negative_sampling_fwd"), t),
        lambda case, t: (t["loss"], t["direction"]),
        _pairs_oracle,
        lambda case, t: _pairs(negative_sampling._fill_reference, t),
    ),
    "gaussian_fwd": _gaussian_kernel(0.75),
    "gaussian_bwd": _gaussian_kernel(0.85),
    # N entries of V columns, added up into N / 2 rows.
    "weighted_row_sums": Kernel(
        lambda case: {
            "entries": case.shape["N"],
            "rows": case.shape["N"] // ENTRIES_OF_ROW,
            "source_rows": case.shape["N"],
            "dim": case.shape["V"],
            "source_bytes": case.dtype.itemsize,
            "out_bytes": case.dtype.itemsize,
        },
        lambda rows, case, t: _row_sums(t),
        lambda case, t: (t["out"],),
        _row_sums_oracle,
        lambda case, t: row_sums.reference(t["keys"], t["coefficient"], t["logits"], None, t["out"]),
    ),
}

KERNELS |= {
    name: Kernel(
        energy_kernels.floor,
        lambda rows, case, t: energy_kernels.run(
            energy_kernels.TRITON if isinstance(rows, TritonRows) else energy_kernels.NATIVE, case, t
        ),
        energy_kernels.results,
        energy_kernels.oracle,
        lambda case, t: energy_kernels.run(energy_kernels.REFERENCE, case, t),
        triton=True,
    )
    for name in energy_kernels.NAMES
} | {
    name: Kernel(
        gumbel_kernels.floor,
        lambda rows, case, t: gumbel_kernels.run("triton" if isinstance(rows, TritonRows) else "native", case, t),
        gumbel_kernels.results,
        gumbel_kernels.oracle,
        lambda case, t: gumbel_kernels.run("reference", case, t),
        triton=True,
        share=share,
    )
    for name, share in gumbel_kernels.SHARES.items()
}
KERNELS |= {
    name: Kernel(
        code_kernels.floor,
        lambda rows, case, t: code_kernels.run(
            "triton" if isinstance(rows, TritonRows) else t["input"].device.type, case, t
        ),
        code_kernels.results,
        code_kernels.oracle,
        lambda case, t: code_kernels.run("reference", case, t),
        triton=True,
    )
    for name in code_kernels.NAMES
}
KERNELS[sample_kernels.NAME] = Kernel(
    sample_kernels.floor,
    lambda rows, case, t: sample_kernels.run(case, t),
    sample_kernels.results,
    sample_kernels.oracle,
    sample_kernels.eager,
    share=sample_kernels.SHARE,
)


def make_kernel_case(
    kernel: str,
    shape: dict[str, int],
    dtype: torch.dtype = torch.bfloat16,
    regime: str = "random",
    ignored: float = 0.0,
    backward: bool = True,
    bias: bool = False,
) -> Case:
    case = Case(kernel, shape, dtype, 0, 0, regime, ignored, backward, bias)
    if native.extension is None:
        return case  # nothing of it can run
    floor = getattr(native.extension.floors, kernel)(**KERNELS[kernel].floor(case))
    return dataclasses.replace(case, bytes=floor.bytes)


make_case = functools.partial(make_kernel_case, "cross_entropy_rows_fwd")


def cases(device: str) -> list[Case]:
    if device == "cpu":
        dtypes = (torch.float32, torch.bfloat16)
        own = [make_kernel_case("own_negatives", {"N": 4096, "K": 32, "D": 256}, dtype) for dtype in dtypes]
        return [make_case({"N": 1024, "V": 50257}, dtype) for dtype in dtypes] + own
    found = []
    for n, v in ((8192, 128256), (16384, 30522), (8192, 50265), (8192, 256000)):
        shape = {"N": n, "V": v}
        found += [make_case(shape), make_case(shape, bias=True), make_case(shape, backward=False)]
        found.append(make_kernel_case("cross_entropy_rows_bwd", shape))
    found.append(make_case({"N": 8192, "V": 50265}, torch.float32))
    for n, k, d in ((8192, 32, 1024), (65536, 8, 512)):
        found.append(make_kernel_case("own_negatives", {"N": n, "K": k, "D": d}))
    found.append(make_kernel_case("own_negatives", {"N": 8192, "K": 32, "D": 1024}, backward=False))
    found.append(make_kernel_case("own_negatives", {"N": 8192, "K": 32, "D": 512}, torch.float32))
    for kernel in ("column_sums", "scale_add"):
        found += [make_kernel_case(kernel, {"N": n, "V": v}) for n, v in ((16384, 30522), (8192, 50265))]
    for kernel in ("gaussian_fwd", "gaussian_bwd"):
        found += [make_kernel_case(kernel, {"N": 1 << 20, "V": 256}, d) for d in (torch.bfloat16, torch.float32)]
    for kernel in ("negative_sampling_fwd", "weighted_row_sums"):
        for v in (128, 300):
            found += [make_kernel_case(kernel, {"N": 1 << 20, "V": v}, d) for d in (torch.bfloat16, torch.float32)]
    for kernel, shape in energy_kernels.cases(device) + gumbel_kernels.cases(device) + code_kernels.cases(device):
        found += [make_kernel_case(kernel, shape, dtype) for dtype in (torch.bfloat16, torch.float32)]
    found += [make_kernel_case(sample_kernels.NAME, s, sample_kernels.DTYPE) for s in sample_kernels.cases(device)]
    return found


def smoke_cases(device: str) -> list[Case]:
    names = [name for name in KERNELS if device == "cuda" or name != "column_sums"]
    shapes = {name: {"N": 33, "V": 1003} for name in names} | {"own_negatives": {"N": 33, "K": 7, "D": 77}}
    shapes |= {name: energy_kernels.smoke_shape(name) for name in energy_kernels.NAMES}
    shapes |= {name: {"N": 33, "K": 9, "D": 77} for name in code_kernels.NAMES}
    dtypes = dict.fromkeys(names, torch.bfloat16) | {sample_kernels.NAME: sample_kernels.DTYPE}
    return [make_kernel_case(name, shapes[name], dtypes[name], bias=name.startswith("cross")) for name in names]


def make_own_inputs(case: Case, device: torch.device) -> Inputs:
    n, k, d = case.shape.values()
    generator = torch.Generator(device).manual_seed(0)
    query = torch.randn(n, d, generator=generator, device=device).mul_(d**-0.5).to(case.dtype)
    negatives = torch.empty(n, k, d, dtype=case.dtype, device=device).normal_(generator=generator)
    acc = accumulation_dtype(case.dtype)
    values = {"scale": torch.full((1,), 2.0, dtype=acc, device=device)}
    values["reference"] = torch.randn(n, generator=generator, device=device).to(acc)
    values["coefficient"] = torch.full((n,), 1 / n, dtype=acc, device=device)
    return {"query": query, "negatives": negatives, **values}


def make_inputs(case: Case, device: torch.device) -> Inputs:
    if case.op == "own_negatives":
        return make_own_inputs(case, device)
    if case.op in energy_kernels.NAMES:
        return energy_kernels.make_inputs(case, device)
    if case.op == sample_kernels.NAME:
        return sample_kernels.make_inputs(case, device)
    if case.op in gumbel_kernels.NAMES:
        return gumbel_kernels.make_inputs(case, device)
    if case.op in code_kernels.NAMES:
        return code_kernels.make_inputs(case, device)
    inputs = make_logits(case, device)
    logits = inputs["logits"]
    rows, vocab = logits.shape
    acc = accumulation_dtype(case.dtype)
    generator = torch.Generator(device).manual_seed(2)
    inputs["coefficient"] = torch.full((rows,), 1 / rows, dtype=acc, device=device)
    inputs["grad"] = torch.empty_like(logits)
    if case.bias:
        inputs["bias"] = torch.randn(vocab, generator=generator, device=device).mul_(0.1)
    if case.op == "column_sums":
        inputs["total"] = torch.empty(vocab, dtype=acc, device=device)
    if case.op == "scale_add":
        inputs["wide"] = logits.to(acc)
        inputs["scale"] = torch.full((1,), 0.5, dtype=acc, device=device)
    if case.op.startswith("gaussian"):
        inputs["seed"] = torch.zeros((), dtype=torch.int64, device=device)
        for name in ("logvar", "wide"):
            inputs[name] = torch.empty_like(logits).normal_(generator=generator).mul_(0.1)
    if case.op == "negative_sampling_fwd":
        logits.mul_(vocab**-0.25)
        for name, shape in (("center", (rows,)), ("context", (rows,)), ("negatives", (rows, NEGATIVES))):
            inputs[name] = torch.randint(rows, shape, generator=generator, device=device)
        for name, shape in (("loss", (rows,)), ("slopes", (rows, 1 + NEGATIVES)), ("direction", (rows, vocab))):
            inputs[name] = torch.empty(shape, dtype=acc, device=device)
    if case.op == "weighted_row_sums":
        inputs["keys"] = torch.randint(rows // ENTRIES_OF_ROW, (rows,), generator=generator, device=device)
        _, inputs["order"], inputs["starts"] = row_sums.sort_rows(inputs["keys"], rows // ENTRIES_OF_ROW)
        inputs["out"] = torch.empty(rows // ENTRIES_OF_ROW, vocab, dtype=case.dtype, device=device)
    return inputs


def _run(rows: Rows) -> Callable[[Case, Inputs], Run]:
    def build(case: Case, inputs: Inputs) -> Run:
        kernel, t = KERNELS[case.op], dict(inputs)
        if case.op == "cross_entropy_rows_bwd":
            t["state"] = rows.forward(t["logits"], t["target"], t.get("bias"), None, OPTIONS, stats=False)

        def call() -> tuple[Tensor, ...]:
            kernel.call(rows, case, t)
            return kernel.results(case, t)

        return Run(call, owned=tuple(t[name] for name in OWNED if name in t))

    return build


def _eager(case: Case, inputs: Inputs) -> Run:
    kernel = KERNELS[case.op]
    if math.prod(case.shape.values()) > 1 << 30:
        raise harness.Rejected("plain torch would hold the logits several times in float32")
    if kernel.eager is None:
        return _run(ReferenceRows())(case, inputs)

    def call() -> tuple[Tensor, ...]:
        kernel.eager(case, inputs)
        return kernel.results(case, inputs)

    return Run(call, owned=tuple(inputs[name] for name in OWNED if name in inputs))


def _copy(case: Case, inputs: Inputs) -> Run:
    source = torch.ones(case.bytes // 2, dtype=torch.uint8, device=inputs["coefficient"].device)
    target = torch.empty_like(source)

    def call() -> tuple[Tensor, ...]:
        return (target.copy_(source),)

    return Run(call, owned=(target,))


def case_providers(case: Case, device: torch.device) -> list[Provider]:
    missing = native.why_missing((case.op,), device.type.upper())
    found = [
        Provider(PLAIN, _eager, patience=providers.patience(device)),
        Provider(COPY, _copy, is_floor=True),
        Provider(f"{OURS} {device.type}", _run(NativeRows()), unavailable=missing),
    ]
    if KERNELS[case.op].triton:
        unavailable = providers.why_not("cross_entropy", "triton", device)
        found.append(Provider(f"{OURS} triton", _run(TritonRows()), unavailable=unavailable))
    return found


def twin(case: Case) -> Case:
    rows = min(case.shape["N"], round(256 / (1 - case.ignored)))
    return dataclasses.replace(case, shape={**case.shape, "N": rows})


def bars(device: str) -> list[Bar]:
    if device == "cpu":
        return []
    return [
        Bar("median / copy of the same bytes", c.name, providers.time_ratio(OURS, COPY), 1 / KERNELS[c.op].share)
        for c in cases(device)
    ]


BENCHMARK = Benchmark(
    op=OP,
    shape_keys=("N", "V"),
    baseline=PLAIN,
    make_case=make_case,
    cases=cases,
    smoke_cases=smoke_cases,
    inputs=make_inputs,
    providers=case_providers,
    twin=twin,
    oracle=lambda case, inputs: KERNELS[case.op].oracle(case, inputs),
    errors=harness.named_errors(["result", "gradient"]),
    bars=bars,
)


@pytest.mark.parametrize(("case", "provider"), providers.smoke_parameters(BENCHMARK))
def test_kernels(benchmark, case, provider):
    providers.smoke(benchmark, BENCHMARK, case, provider)
