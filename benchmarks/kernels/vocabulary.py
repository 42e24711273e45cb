"""The row kernel of linear_sample, for bench_kernels: a tile of N rows of V products, the only one of its rows."""

from __future__ import annotations

import torch
from torch import Tensor

import sslkernels as sk
from benchmarks.harness import Case

NAME = "sample_rows"
DTYPE = torch.float32  # of products on a GPU
SHARE = 0.6  # of the bandwidth of a copy that a bar asks for: a number takes about 36 instructions
SEED = 1
Inputs = dict[str, Tensor]


def make_inputs(case: Case, device: torch.device) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)
    rows, columns = case.shape["N"], case.shape["V"]
    t = {"products": torch.randn(rows, columns, generator=generator, device=device).to(case.dtype)}
    t |= {name: torch.empty(rows, device=device) for name in ("row_max", "sum_exp", "best", "logprob")}
    t |= {"row_ids": torch.arange(rows, device=device), "index": torch.empty(rows, dtype=torch.int64, device=device)}
    t["seed"] = torch.tensor(SEED, device=device)
    t["coefficient"] = t["best"]  # of this device, for bench_kernels
    return t


def floor(case: Case) -> dict[str, int]:
    sizes = {"rows": case.shape["N"], "columns": case.shape["V"]}
    return {**sizes, "element_bytes": case.dtype.itemsize, "first": True}


def run(case: Case, t: Inputs) -> None:
    state = (t[name] for name in ("row_max", "sum_exp", "best", "logprob", "index"))
    torch.ops.sslkernels_native.sample_rows(
        t["products"], None, t["seed"], t["row_ids"], 0, case.shape["V"], 1.0, *state
    )


def eager(case: Case, t: Inputs, dtype: torch.dtype = torch.float32) -> None:
    """With the same noise, which is stored."""
    logits = t["products"].to(dtype)
    index = (logits + sk.random_gumbel(logits.shape, SEED, device=logits.device)).argmax(1)
    t["index"], t["logprob"] = index, logits.log_softmax(1).gather(1, index[:, None])[:, 0]


def results(case: Case, t: Inputs) -> tuple[Tensor, ...]:
    return (t["logprob"],)


def oracle(case: Case, t: Inputs) -> tuple[Tensor, ...]:
    exact = dict(t)
    eager(case, exact, torch.float64)
    return results(case, exact)


def cases(device: str) -> list[dict[str, int]]:
    """Shapes: 2**28 products, in rows of a tile and of a whole vocabulary."""
    return [] if device == "cpu" else [{"N": (1 << 28) // v, "V": v} for v in (4224, 50257)]
