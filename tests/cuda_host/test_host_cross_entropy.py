"""The CUDA kernels of cross-entropy, run on the host under sanitizers: every kernel, dtype and regime against float64.

A regime is chosen by the device that the launcher believes to be on: its shared memory and its clusters decide whether
a row is cached by one block, cached by a cluster, or read twice.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from cuda_host import run
from row_oracle import DTYPES, assert_gradient, assert_outputs, make, oracle, tolerance_of
from torch import Tensor

from sslkernels.vocabulary.softmax_rows import RowOptions, RowOutputs, empty_outputs

pytestmark = run.required

NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in DTYPES}
SCRATCH = 33 * 48  # bytes of a block's reduction, at most

# What the launcher is told of the device, and the kernel that this leads to for VOCAB columns.
VOCAB = 1003
REGIMES = {
    "block": ({}, {"cached": True}),
    "cluster": ({"shared_per_block": SCRATCH + 1100, "shared_per_processor": 3 * (SCRATCH + 2124)}, {"cached": True}),
    "two_reads": ({"major": 8, "shared_per_processor": 4096}, {"cached": False}),
}
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"bias": True, "softcap": 3.0, "logit_scale": 0.75},
    "stats": {"stats": True},
    "smoothing_scale": {"label_smoothing": 0.125, "logit_scale": -1.5},
    "everything": {
        "bias": True, "weight": True, "stats": True,
        "softcap": 3.0, "logit_scale": 0.75, "label_smoothing": 0.125, "z_loss": 2.0**-10,
    },
}  # fmt: skip
KERNEL_FEATURES = {
    "plain": (False, False),
    "bias": (True, False),
    "softcap": (True, False),
    "stats": (False, True),
    "smoothing_scale": (True, True),
    "everything": (True, True),
}


@dataclass(frozen=True)
class Layout:
    """Memory layout of logits and gradient: elements before the first row, and padding elements per row."""

    offset: int = 0
    pitch: int = 0
    grad_offset: int = 0
    grad_pitch: int = 0
    in_place: bool = False


LAYOUTS = {
    "contiguous": Layout(),
    "in_place": Layout(offset=3, in_place=True),
    "pitched": Layout(pitch=-VOCAB % 64, in_place=True),
    "apart": Layout(offset=1, pitch=5, grad_offset=4, grad_pitch=2),
}


@dataclass
class Case:
    dtype: torch.dtype
    features: str
    regime: str = "block"
    layout: str = "contiguous"
    rows: int = 4
    vocab: int = VOCAB
    gradient: bool = True
    backward: bool = False  # the backward kernel instead of the forward kernel
    device: dict[str, int] = field(default_factory=dict)
    scale: float = 2.0
    special: str = ""

    def __str__(self) -> str:
        parts = (
            NAMES[self.dtype], self.features, self.regime, self.layout, f"{self.rows}x{self.vocab}",
            "" if self.gradient else "loss", "backward" if self.backward else "", self.special,
        )  # fmt: skip
        return "-".join(filter(None, parts))


def cases() -> list[Case]:
    found = []
    layouts = itertools.cycle(LAYOUTS)
    low = (torch.float32, torch.bfloat16, torch.float16)
    for dtype, features, regime in itertools.product(low, FEATURES, REGIMES):
        found.append(Case(dtype, features, regime, next(layouts)))
    for dtype, features in itertools.product(low, ("plain", "bias", "everything")):
        found.append(Case(dtype, features, layout=next(layouts), backward=True))
    for dtype, layout in itertools.product(low, LAYOUTS):
        found.append(Case(dtype, "everything", "block", layout))
        found.append(Case(dtype, "everything", "cluster", layout, rows=2))
        found.append(Case(dtype, "plain", "two_reads", layout, rows=2))
        found.append(Case(dtype, "plain", layout=layout, backward=True, rows=2))
    for backward in (False, True):
        found.append(Case(torch.float64, "plain", layout="apart", backward=backward))
        found.append(Case(torch.float64, "everything", backward=backward))
    for vocab in (1, 2, 7, 8, 9, 16, 17, 65):
        found.append(Case(torch.bfloat16, "everything", vocab=vocab, layout="in_place", rows=9))
        found.append(Case(torch.float32, "stats", "cluster", vocab=vocab, rows=3, device={"shared_per_block": SCRATCH}))
    for dtype, regime in itertools.product(low, REGIMES):
        found.append(Case(dtype, "stats", regime, gradient=False, special="none"))
    wide = {"processors": 132}
    found.append(Case(torch.bfloat16, "bias", "block", vocab=16411, rows=2, device=wide, special="few_rows"))
    found.append(Case(torch.bfloat16, "bias", "block", vocab=40007, rows=1, backward=True, special="parts"))
    for dtype, regime in itertools.product(DTYPES, REGIMES):
        for features in ("plain", "stats", "everything"):
            found.append(Case(dtype, features, regime, rows=12, vocab=131, special="extreme"))
    # On this device only a cluster of 16 can cache a row; if only 8 blocks fit, it is read twice.
    # Code compiled from PTX of an older architecture does not support clusters.
    for place, regime in ((16, "cluster"), (8, "two_reads")):
        device = {**REGIMES["cluster"][0], "major": 9, "largest_cluster": place}
        found.append(Case(torch.float32, "stats", regime, rows=2, vocab=4003, device=device, special=f"place_{place}"))
    device = {**REGIMES["cluster"][0], "major": 9, "ptx": 80}
    found.append(Case(torch.float32, "stats", "two_reads", rows=2, vocab=4003, device=device, special="place_old"))
    found.append(Case(torch.bfloat16, "plain", rows=0, vocab=1000003))
    found.append(Case(torch.bfloat16, "plain", rows=0))
    found.append(Case(torch.bfloat16, "plain", rows=0, backward=True))
    return found


CASES = {str(case): case for case in cases()}


def options_of(case: Case) -> RowOptions:
    chosen = FEATURES[case.features]
    names = ("label_smoothing", "z_loss", "softcap")
    return RowOptions(-100, *(chosen.get(name, 0.0) for name in names), chosen.get("logit_scale", 1.0))


def inputs_of(case: Case) -> tuple[Tensor, ...]:
    """As row_oracle.make; if there are three or more rows, rows 0 and 1 are out of range and ignored."""
    index = torch.int32 if case.rows % 2 else torch.int64
    logits, target, bias, weight, coefficient = make(
        "cpu", case.rows, case.vocab, case.dtype, scale=case.scale, index_dtype=index
    )
    if case.rows > 2:
        target[0] = case.vocab
    if case.special == "extreme":
        infinity = float("inf")
        target[2:] = torch.arange(3, 3 + case.rows - 2)
        logits[2] += 1000
        logits[3, 10:20] = -infinity
        logits[4, target[4]] = -infinity
        logits[5] = -infinity
        logits[6, 60] = infinity
        logits[7, 70] = float("nan")
        logits[8, target[8]] = 40
        logits[9] = 0.5  # ties
        logits[10] -= 1000
        logits[11, :100] = torch.finfo(case.dtype).min  # a common way to mask
    chosen = FEATURES[case.features]
    if case.dtype == torch.float64:
        bias, weight, coefficient = bias.double(), weight.double(), coefficient.double()
    return logits, target, bias if chosen.get("bias") else None, weight if chosen.get("weight") else None, coefficient


def storage(values: Tensor, offset: int, pitch: int) -> tuple[Tensor, Tensor]:
    """Memory that starts `offset` elements before the rows and ends with the last one, and a view of the rows."""
    rows, columns = values.shape
    stride = columns + pitch
    memory = torch.full((offset + max((rows - 1) * stride + columns, 0) * (rows > 0),), 7.0, dtype=values.dtype)
    view = memory.as_strided((rows, columns), (stride, 1), offset) if rows else values
    view.copy_(values)
    return memory, view


def call_of(case: Case) -> run.Call:
    logits, target, bias, weight, coefficient = inputs_of(case)
    layout, options = LAYOUTS[case.layout], options_of(case)
    stats = FEATURES[case.features].get("stats", False) and not case.backward
    outputs = empty_outputs(logits, case.rows, stats)._asdict()
    for tensor in outputs.values():
        tensor.fill_(7)
    if case.backward:
        state, _ = oracle(logits, target, bias, weight, options, stats=False)
        outputs |= {name: getattr(state, name).to(coefficient.dtype) for name in ("row_max", "sum_exp", "logprob")}
    arrays: dict[str, Tensor | None] = {"target": target, "bias": bias, "weight": weight, **outputs}
    if not stats:
        arrays |= {"prediction": None, "entropy": None}
    if weight is not None:
        arrays["weight_sum"] = weight.sum().reshape(1)
    arrays["logits"], _ = storage(logits, layout.offset, layout.pitch)
    in_place = layout.in_place and case.gradient
    if case.gradient:
        arrays["coefficient"] = coefficient
        if not in_place:
            arrays["grad"], _ = storage(torch.full_like(logits, 7), layout.grad_offset, layout.grad_pitch)
    ints = {
        "element": run.ELEMENTS[case.dtype], "in_place": in_place, "count": case.rows, "vocab": case.vocab,
        "logits_stride": case.vocab + layout.pitch, "grad_stride": case.vocab + layout.grad_pitch,
        "wide_target": target.dtype == torch.int64, "ignore_index": options.ignore_index,
        **REGIMES[case.regime][0], **case.device,
    }  # fmt: skip
    reals = {name: getattr(options, name) for name in ("label_smoothing", "z_loss", "softcap", "logit_scale")}
    name = "cross_entropy_rows_bwd" if case.backward else "cross_entropy_rows_fwd"
    offsets = {"logits": layout.offset, "grad": layout.grad_offset}
    return run.Call(name, ints, reals, {key: value for key, value in arrays.items() if value is not None}, offsets)


results, test_no_kernel_races = run.results_and_races(lambda: {name: call_of(case) for name, case in CASES.items()})


@pytest.mark.parametrize("name", CASES)
def test_against_float64(name, results):
    case, result = CASES[name], results[name]
    assert result.error == ""
    logits, target, bias, weight, coefficient = inputs_of(case)
    stats = FEATURES[case.features].get("stats", False)
    want, want_grad = oracle(logits, target, bias, weight, options_of(case), coefficient)
    if not case.backward:
        names = ("loss", "row_max", "sum_exp", "logprob", "prediction", "entropy")
        got = tuple(result.arrays.get(key, torch.empty(0)) for key in names)
        if case.rows > 2:  # the target of row 0 is out of range: no statistics, and its loss is NaN
            assert got[0][0].isnan()
            got, want = (tuple(part[1:] for part in outputs) for outputs in (got, want))
            want = RowOutputs(*want)
        if case.special == "extreme" and stats:
            got[4][4:7] = want.prediction[4:7]  # the prediction of a NaN row is unspecified
        assert_outputs(got, want, tolerance_of(case.dtype), stats=stats)
    if case.gradient:
        assert_gradient(written_gradient(case, result), want_grad, coefficient)
    assert_untouched(case, result)


def written_gradient(case: Case, result: run.Result) -> Tensor:
    layout = LAYOUTS[case.layout]
    key, offset, pitch = ("logits", layout.offset, layout.pitch)
    if not layout.in_place:
        key, offset, pitch = ("grad", layout.grad_offset, layout.grad_pitch)
    if case.rows == 0:
        return torch.empty(0, case.vocab, dtype=case.dtype)
    return result.arrays[key].as_strided((case.rows, case.vocab), (case.vocab + pitch, 1), offset)


def assert_untouched(case: Case, result: run.Result) -> None:
    """Padding between the rows is unchanged, and so are the logits unless the gradient is written in place."""
    before = call_of(case).arrays
    layout = LAYOUTS[case.layout]
    for key, offset, pitch in (
        ("logits", layout.offset, layout.pitch),
        ("grad", layout.grad_offset, layout.grad_pitch),
    ):
        if key not in before:
            continue
        position = torch.arange(before[key].numel()) - offset
        outside = (position < 0) | (position % (case.vocab + pitch) >= case.vocab)
        if key == "logits" and not (layout.in_place and case.gradient):
            outside |= True
        same = before[key].eq(result.arrays[key]) | (before[key].isnan() & result.arrays[key].isnan())
        assert bool(same[outside].all()), key


def test_every_kernel_runs_in_its_regime(results, request):
    launched = {name for result in results.values() for name in result.launched}
    program = run.build(request.node.callspec.params["results"])
    compiled = {name for name in run.kernels(program).values() if name.startswith("cross_entropy")}
    assert len(compiled) == 3 * (2 * 2 * 2 + 2) + 2
    assert launched == compiled
    types = {torch.float32: "float", torch.bfloat16: "BFloat16", torch.float16: "Half"}
    for name, case in CASES.items():
        if case.dtype == torch.float64 or case.backward or case.rows == 0 or not case.gradient:
            continue
        flags = ", ".join(str(flag).lower() for flag in KERNEL_FEATURES[case.features])
        cached = str(REGIMES[case.regime][1]["cached"]).lower()
        expected = f"cross_entropy_rows_fwd_kernel<{types[case.dtype]}, RowFeatures<{flags}>, {cached}>"
        if case.vocab == VOCAB or case.special.startswith("place"):
            assert results[name].launched == [expected]


@pytest.mark.parametrize(
    ("sanitizer", "mistake", "report"),
    [
        ("thread", 1, "data race"),
        ("address", 2, "heap-buffer-overflow"),
        ("thread", 3, "data race"),
        ("thread", 4, "data race"),
        ("address", 5, "misaligned address"),
        ("thread", 6, "data race"),
    ],
    ids=[
        "missing_barrier",
        "out_of_bounds",
        "missing_cluster_barrier",
        "blocks_write_one_element",
        "misaligned",
        "block_ends_while_read",
    ],
)
def test_the_harness_finds_a_planted_mistake(sanitizer, mistake, report, tmp_path):
    program = run.build(sanitizer)
    threads, blocks = 32, 8

    def planted(number: int) -> run.Call:
        out = torch.zeros(threads * blocks, dtype=torch.int32)
        return run.Call("planted", {"mistake": number, "blocks": blocks}, {}, {"out": out})

    (right,) = run.run(program, [planted(0)], tmp_path)
    neighbour = torch.arange(threads).roll(-1) + 1
    assert torch.equal(right.arrays["out"], (neighbour + torch.arange(threads) + 1).repeat(blocks).int())
    with pytest.raises(RuntimeError, match=report):
        run.run(program, [planted(mistake)], tmp_path)


def test_a_launch_that_fails_names_the_kernel(tmp_path):
    out = torch.zeros(32, dtype=torch.int32)
    (result,) = run.run(
        run.build("address"), [run.Call("planted", {"mistake": 0, "blocks": 3}, {}, {"out": out})], tmp_path
    )
    assert result.error == "sslkernels: planted_kernel failed: invalid launch configuration"


A100 = {
    "processors": 108, "shared_per_block": 166912, "shared_per_processor": 167936, "cache": 40 << 20, "major": 8,
}  # fmt: skip
H100 = {
    "processors": 132, "shared_per_block": 232448, "shared_per_processor": 233472, "cache": 50 << 20, "major": 9,
}  # fmt: skip


@pytest.mark.parametrize(
    ("device", "vocab", "rows", "kind", "cached", "cluster", "threads"),
    [
        (H100, 1000, 4096, "plain", True, 1, 64),
        (H100, 18000, 4096, "plain", True, 1, 256),
        (H100, 30522, 16384, "plain", True, 1, 256),
        (H100, 50265, 8192, "plain", True, 2, 256),
        (H100, 128256, 8192, "plain", True, 4, 256),
        (H100, 256000, 8192, "plain", True, 8, 256),
        (H100, 1800000, 8192, "plain", True, 16, 256),  # a block uses all of the shared memory
        (H100, 2000003, 8192, "plain", False, 1, 1024),
        (H100, 30522, 16384, "capped", True, 2, 256),
        (H100, 128256, 8192, "capped", True, 8, 256),
        (H100, 256000, 8192, "capped", True, 16, 256),
        (H100, 128256, 8192, "loss", False, 1, 256),
        (H100, 128256, 16, "loss", False, 8, 256),  # few rows: more blocks per row
        (A100, 18000, 4096, "capped", True, 1, 256),
        (A100, 30522, 4096, "plain", True, 1, 256),
        (A100, 50265, 4096, "plain", False, 1, 1024),
        (A100, 128256, 4096, "plain", False, 1, 1024),
    ],
)
def test_plans_on_real_devices(device, vocab, rows, kind, cached, cluster, threads, tmp_path):
    """bfloat16 rows. A cached part leaves room for several blocks if clusters are large enough; rows that are read
    twice fit in half of the L2 cache, unless one row per multiprocessor is already too much."""
    ints = {"element": 2, "count": rows, "vocab": vocab, "gradient": kind != "loss", **device}
    reals = {"softcap": 30.0 if kind == "capped" else 0.0}
    call = run.Call("plan_rows", ints, reals, {"plan": torch.zeros(4, dtype=torch.int64)})
    (result,) = run.run(run.build("address"), [call], tmp_path)
    assert result.arrays["plan"].tolist()[:3] == [cached, cluster, threads]
    shared = int(result.arrays["plan"][3])
    assert shared <= device["shared_per_block"]
    if cached and vocab <= 512000:
        assert (2 if device is A100 else 3) * (shared + 1024) <= device["shared_per_processor"]
    if kind != "loss" and not cached and vocab <= 60000:
        at_once = 1024 // threads * device["processors"]
        assert at_once * vocab * 2 <= device["cache"] / 2
