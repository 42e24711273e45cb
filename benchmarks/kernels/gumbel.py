"""The kernels of gumbel_softmax and gumbel_quantize, for bench_kernels: N rows of V logits; the forward writes one-hot
samples, the gradient is that of samples, in the dtype of the logits. Making the noise takes longer than the memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Case
from sslkernels import native
from sslkernels.ops.gumbel_rows import (
    HARD,
    GumbelRows,
    NativeGumbelRows,
    ReferenceGumbelRows,
    State,
    Stream,
    perturbed,
    triton_rows,
)
from sslkernels.ops.rows import accumulation_dtype

Inputs = dict[str, Tensor]
# The part of the bandwidth of a copy that a bar asks for: a number takes about 50 instructions.
SHARES = {"gumbel_rows_fwd": 0.3, "gumbel_rows_bwd": 0.3, "probability_sums": 0.8}
NAMES = tuple(SHARES)
KERNELS: dict[str, Any] = {"native": NativeGumbelRows, "triton": triton_rows, "reference": ReferenceGumbelRows}


def make_inputs(case: Case, device: torch.device) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)
    rows, columns = case.shape["N"], case.shape["V"]
    acc = accumulation_dtype(case.dtype)
    t = {
        name: torch.empty(rows, columns, dtype=case.dtype, device=device).normal_(generator=generator)
        for name in ("logits", "weight")
    }
    t |= {"grad": torch.empty_like(t["logits"]), "out": torch.empty_like(t["logits"])}
    t |= {name: torch.empty(rows, dtype=acc, device=device) for name in ("max", "sum", "plain_max", "plain_sum")}
    t["seed"] = torch.tensor(1, device=device)
    t["inverse_tau"] = torch.ones((), dtype=torch.float64, device=device)
    t["coefficient"] = t["max"]  # of this device, for bench_kernels
    plain = State(t["plain_max"], t["plain_sum"])
    largest = t["logits"].amax(1, keepdim=True).to(acc)
    plain.max.copy_(largest[:, 0])
    plain.sum.copy_(torch.logsumexp(t["logits"].to(acc) - largest, 1).exp())
    kernels = ReferenceGumbelRows() if native.extension is None else NativeGumbelRows()
    kernels.forward(t["logits"], _stream(t), t["inverse_tau"], 0, None, None, State(t["max"], t["sum"]))
    return t


def _stream(t: Inputs) -> Stream:
    return Stream(t["seed"], None)


def floor(case: Case) -> dict[str, int]:
    sizes = {"rows": case.shape["N"], "columns": case.shape["V"], "element_bytes": case.dtype.itemsize}
    if case.op == "gumbel_rows_fwd":
        return {**sizes, "output": True, "stats": False}
    if case.op == "gumbel_rows_bwd":
        return {**sizes, "grad_bytes": case.dtype.itemsize, "probabilities": False}
    return sizes


def run(kernels: str, case: Case, t: Inputs) -> None:
    rows: GumbelRows = KERNELS[kernels]()
    state = State(t["max"], t["sum"])
    if case.op == "gumbel_rows_fwd":
        rows.forward(t["logits"], _stream(t), t["inverse_tau"], HARD, t["out"], None, state)
    elif case.op == "gumbel_rows_bwd":
        rows.backward(t["weight"], None, None, t["logits"], _stream(t), t["inverse_tau"], state, None, t["grad"])
    else:
        t["total"] = rows.probability_sums(t["logits"], State(t["plain_max"], t["plain_sum"]), None, 1)


def results(case: Case, t: Inputs) -> tuple[Tensor, ...]:
    names = {"gumbel_rows_fwd": ("sum", "out"), "gumbel_rows_bwd": ("grad",), "probability_sums": ("total",)}
    return tuple(t[name] for name in names[case.op])


def oracle(case: Case, t: Inputs) -> tuple[Tensor, ...]:
    if case.op == "probability_sums":
        return (t["logits"].double().softmax(1).sum(0, keepdim=True),)
    s = perturbed(t["logits"], _stream(t)).double()
    if case.op == "gumbel_rows_fwd":
        one_hot = torch.zeros_like(s).scatter_(1, s.argmax(1, keepdim=True), 1)
        return (s - s.amax(1, keepdim=True)).exp().sum(1), one_hot
    y = s.softmax(1)
    weight = t["weight"].double()
    return (y * (weight - (weight * y).sum(1, keepdim=True)),)


def cases(device: str) -> list[tuple[str, dict[str, int]]]:
    """(kernel, shape): 2**28 logits in short and long rows."""
    if device == "cpu":
        return []
    return [(name, {"N": (1 << 28) // v, "V": v}) for name in NAMES for v in (320, 8192, 50257)]
