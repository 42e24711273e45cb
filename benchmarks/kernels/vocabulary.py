"""Row kernels over a vocabulary: the cross-entropy of N rows of V logits, and the sampler of linear_sample."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import sslkernels as sk
from benchmarks.benchmark import smoke_test
from benchmarks.harness import Case, Inputs
from benchmarks.kernels.kernel import (
    ADJACENT,
    NATIVE,
    ONE_PER_ROW,
    REFERENCE,
    TRITON,
    Compiled,
    Floor,
    FloorSum,
    Kernel,
    KernelBenchmark,
    accumulation_dtype,
    grid,
    native_op,
    normal,
    rows_and_columns,
)
from benchmarks.ops.cross_entropy import make_logits
from sslkernels.vocabulary.softmax_rows import NativeRows, ReferenceRows, RowOptions, TritonRows

ROWS = {NATIVE: NativeRows, TRITON: TritonRows, REFERENCE: ReferenceRows}
OPTIONS = RowOptions(-100, 0.0, 0.0, 0.0)
ROW_STATE = 8 + 4 * 4  # bytes a row: the target and four results
SEED = 1


def cross_entropy_rows_fwd_floor(valid: int, rows: int, vocab: int, element_bytes: int, gradient: bool) -> Floor:
    """Reads the logits of valid rows; writes the gradient of all rows, zero in ignored ones. A logit takes a
    comparison, a subtraction, an exponential (2) and an addition; its gradient the exponential again and two more."""
    written = rows if gradient else 0
    moved = (valid + written) * vocab * element_bytes + rows * ROW_STATE
    return Floor(moved, valid * vocab * (10 if gradient else 5))


def cross_entropy_rows_bwd_floor(valid: int, rows: int, vocab: int, element_bytes: int) -> Floor:
    return Floor((valid + rows) * vocab * element_bytes + rows * ROW_STATE, valid * vocab * 5)


def sample_rows_floor(rows: int, columns: int, element_bytes: int, first: bool) -> Floor:
    """Reads the products and a row id. A row's state, four numbers and an index, is written and, except in the first
    tile, read. Turning a product into a logit takes 2 operations, then a comparison, a difference, an exponential (2)
    and a sum; the noise is mostly a Philox call, plus two operations."""
    return Floor(rows * (columns * element_bytes + 8 + 24 * (1 if first else 2)), rows * columns * 9)


def mask_tokens_floor(tokens: int, id_bytes: int) -> Floor:
    """Reads the ids, writes new ids and labels. Measured as an op, in ops/."""
    return Floor(tokens * id_bytes * 3, 0)


def teacher_rows_floor(rows: int, vocab: int, element_bytes: int) -> Floor:
    """Exponentials take the place of the logits. A comparison, a difference, an exponential (2) and a sum, and again
    a difference and an exponential. Measured with the matmuls, in ops/."""
    return Floor(rows * (2 * vocab * element_bytes + element_bytes + 8), rows * vocab * 8)


def distillation_rows_floor(rows: int, teachers: int, vocab: int, element_bytes: int, grad_bytes: int) -> Floor:
    """Reads logits and each teacher row once, writes the gradient. A comparison, a difference, an exponential (2) and
    three sums, two of them of products; the gradient takes the exponential again, a factor and a difference. Measured
    with the matmuls, in ops/."""
    moved = (rows + teachers) * vocab * element_bytes + rows * vocab * grad_bytes
    return Floor(moved + (3 * rows + teachers) * element_bytes + 8 * teachers, rows * vocab * 15)


FLOOR_SUMS = (
    # 12 of 16 rows are valid. Their logits are read once, the gradient of all rows is written once; a row has a target
    # and four results.
    FloorSum(cross_entropy_rows_fwd_floor, (12, 16, 100, 2, True), (12 + 16) * 100 * 2 + 16 * 24, 12 * 100 * 10),
    FloorSum(cross_entropy_rows_bwd_floor, (12, 16, 100, 2), (12 + 16) * 100 * 2 + 16 * 24, 12 * 100 * 5),
    # Products and a row id read; a state of 24 bytes written, and also read by a later tile.
    FloorSum(sample_rows_floor, (7, 9, 4, True), 7 * (9 * 4 + 8 + 24), 7 * 9 * 9),
    FloorSum(sample_rows_floor, (7, 9, 4, False), 7 * (9 * 4 + 8 + 48), 7 * 9 * 9),
    FloorSum(mask_tokens_floor, (7, 8), 3 * 7 * 8, 0),
    # 7 rows of 9 logits are read and written; a sum and a column each.
    FloorSum(teacher_rows_floor, (7, 9, 4), 7 * (9 * 8 + 12), 7 * 9 * 8),
    # 7 rows and 3 teacher rows of 9 numbers are read, with a coefficient, a sum and a column; a gradient in 16 bits, a
    # loss and a gap are written.
    FloorSum(distillation_rows_floor, (7, 3, 9, 4, 2), 10 * 9 * 4 + 7 * 9 * 2 + 7 * 12 + 3 * 12, 7 * 9 * 15),
)
COMPILED = (
    Compiled("mask_tokens_chain"),
    Compiled("store_ranges", loads=ADJACENT, stores=ADJACENT),
    Compiled("sample_rows", stores=ONE_PER_ROW),
)


def sizes(case: Case) -> tuple[int, int, int, int]:
    rows = case.shape["N"]
    return rows - round(rows * case.ignored), rows, case.shape["V"], case.dtype.itemsize


def row_inputs(case: Case, device: torch.device) -> Inputs:
    inputs = make_logits(case, device)
    rows, vocab = inputs["logits"].shape
    inputs["coefficient"] = torch.full((rows,), 1 / rows, dtype=accumulation_dtype(case.dtype), device=device)
    inputs["grad"] = torch.empty_like(inputs["logits"])
    if case.bias:
        generator = torch.Generator(device).manual_seed(2)
        inputs["bias"] = torch.randn(vocab, generator=generator, device=device).mul_(0.1)
    return inputs


def forward(backend: str, case: Case, t: Inputs) -> None:
    outputs = ROWS[backend]().forward(
        t["logits"], t["target"], t.get("bias"), None, OPTIONS,
        stats=False, coefficient=t["coefficient"], grad=t["grad"] if case.backward else None,
    )  # fmt: skip
    t["loss"] = outputs.loss


def prepare_backward(backend: str, case: Case, t: Inputs) -> None:
    t["state"] = ROWS[backend]().forward(t["logits"], t["target"], t.get("bias"), None, OPTIONS, stats=False).state


def backward(backend: str, case: Case, t: Inputs) -> None:
    ROWS[backend]().backward(
        t["logits"], t["target"], t.get("bias"), None, OPTIONS, t["state"], t["coefficient"], t["grad"]
    )


def row_oracle(case: Case, t: Inputs) -> tuple[Tensor, ...]:
    leaf = t["logits"].double()
    logits = (leaf + t["bias"].double() if "bias" in t else leaf).requires_grad_()
    loss = F.cross_entropy(logits, t["target"], reduction="none")
    (grad,) = torch.autograd.grad(loss, logits, t["coefficient"].double())
    return (loss.detach(), grad)


def sample_inputs(case: Case, device: torch.device) -> Inputs:
    """A tile of N rows of V products, the only tile of its rows."""
    rows = case.shape["N"]
    t = {"products": normal(case, device)}
    t |= {name: torch.empty(rows, device=device) for name in ("row_max", "sum_exp", "best", "logprob")}
    t |= {"row_ids": torch.arange(rows, device=device), "index": torch.empty(rows, dtype=torch.int64, device=device)}
    return {**t, "seed": torch.tensor(SEED, device=device), "scale": torch.ones(rows, device=device)}


def sample(backend: str, case: Case, t: Inputs) -> None:
    state = (t[name] for name in ("row_max", "sum_exp", "best", "logprob", "index"))
    native_op("sample_rows")(t["products"], None, t["seed"], t["row_ids"], 0, case.shape["V"], t["scale"], 0, *state)


def sample_plain(case: Case, t: Inputs, dtype: torch.dtype = torch.float32) -> None:
    """The same noise, materialised."""
    logits = t["products"].to(dtype)
    index = (logits + sk.random_gumbel(logits.shape, SEED, device=logits.device)).argmax(1)
    t["index"], t["logprob"] = index, logits.log_softmax(1).gather(1, index[:, None])[:, 0]


def sample_oracle(case: Case, t: Inputs) -> tuple[Tensor, ...]:
    exact = dict(t)
    sample_plain(case, exact, torch.float64)
    return (exact["logprob"],)


LOGITS = [{"N": n, "V": v} for n, v in ((8192, 128256), (16384, 30522), (8192, 50265), (8192, 256000))]
SMOKE = {"shape": {"N": 33, "V": 1003}, "bias": True}
PRODUCTS = (torch.float32,)  # dtype of the products on a GPU
KERNELS = {
    "cross_entropy_rows_fwd": Kernel(
        lambda case: cross_entropy_rows_fwd_floor(*sizes(case), case.backward),
        row_inputs,
        forward,
        lambda case: ("loss", "grad") if case.backward else ("loss",),
        row_oracle,
        [{"shape": shape, **more} for shape in LOGITS for more in ({}, {"bias": True}, {"backward": False})]
        + grid(LOGITS[2], dtypes=(torch.float32,)),
        cpu=grid({"N": 1024, "V": 50257}),
        smoke=SMOKE,
        predicted=("0.75-0.85", "0.5-0.6"),
    ),
    "cross_entropy_rows_bwd": Kernel(
        lambda case: cross_entropy_rows_bwd_floor(*sizes(case)),
        row_inputs,
        backward,
        lambda case: ("grad",),
        lambda case, t: row_oracle(case, t)[1:],
        [{"shape": shape} for shape in LOGITS],
        smoke=SMOKE,
        setup=prepare_backward,
        predicted=("0.75-0.85", "0.5-0.6"),
    ),
    "sample_rows": Kernel(
        rows_and_columns(sample_rows_floor, first=True),
        sample_inputs,
        sample,
        lambda case: ("logprob",),
        sample_oracle,
        # 2**28 products, in rows of a tile and of a whole vocabulary.
        grid(*({"N": (1 << 28) // v, "V": v} for v in (4224, 50257)), dtypes=PRODUCTS),
        smoke={"shape": {"N": 33, "V": 1003}, "dtype": torch.float32},
        plain=sample_plain,
        triton=False,
        share=0.6,
        instructions=36,
    ),
}
BENCHMARKS = (KernelBenchmark("vocabulary", KERNELS),)
test_vocabulary_kernels = smoke_test(BENCHMARKS)
