"""linear_cross_entropy: input (N, D) and weight (V, D) -> loss and the gradients of both (and of the bias)."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import sslkernels as sk
from benchmarks import harness, peers, providers
from benchmarks.harness import Bar, Benchmark, Case, Provider, Run
from benchmarks.ops.cross_entropy import make_targets
from benchmarks.providers import COMPILED, EAGER, OURS

OP = "linear_cross_entropy"
LEAVES = ["input", "weight", "bias"]
CHUNKED = "F.linear_cross_entropy(options)"
FLOOR = "three matmuls (floor)"
FLOOR_FORWARD = "one matmul (floor)"
BAR_SHAPE = {"N": 2048, "D": 768, "V": 50257}
MEBI = 1 << 20


def make_case(
    shape: dict[str, int],
    dtype: torch.dtype = torch.float32,
    regime: str = "random",
    ignored: float = 0.0,
    backward: bool = True,
    bias: bool = False,
) -> Case:
    """Input and weight are read, their gradients written; three matmuls of the rows that are not ignored (or one)."""
    rows, width, vocab = shape["N"], shape["D"], shape["V"]
    valid = rows - round(rows * ignored)
    touched = (rows * width + vocab * width) * dtype.itemsize
    matmul = 2 * valid * width * vocab
    passes = 2 if backward else 1
    return Case(OP, shape, dtype, passes * touched, matmul * (3 if backward else 1), regime, ignored, backward, bias)


def cases(device: str) -> list[Case]:
    if device == "cpu":
        sweep = [make_case({"N": 512, "D": 64, "V": v}) for v in (8192, 16384, 32768, 65536, 131072)]
        bar = [make_case(BAR_SHAPE), make_case(BAR_SHAPE, torch.bfloat16), make_case(BAR_SHAPE, ignored=0.85)]
        return bar + sweep
    half = torch.bfloat16
    shapes = [(8192, 2304, 256000), (8192, 4096, 128256), (19661, 768, 30522), (9830, 768, 50368), (9830, 1024, 50265)]
    found = []
    for n, d, v in shapes:
        shape = {"N": n, "D": d, "V": v}
        found.append(make_case(shape, half, bias=True))
        found.append(make_case(shape, half, "peaked", bias=True))
        found += [make_case(shape, half, ignored=part, bias=True) for part in (0.7, 0.85)]
    found.append(make_case({"N": 8192, "D": 4096, "V": 128256}, half))  # without bias, which some peers reject
    found.append(make_case({"N": 8192, "D": 2304, "V": 256000}, half, backward=False, bias=True))
    vocabularies = (30522, 50265, 50368, 128256, 250002, 256000)
    found += [make_case({"N": 8192, "D": 768, "V": v}, half, bias=True) for v in vocabularies]
    return found


def smoke_cases(device: str) -> list[Case]:
    shape = {"N": 67, "D": 64, "V": 1003}
    return [make_case(shape, bias=True), make_case(shape, torch.bfloat16, "peaked", 0.7, bias=True)]


def make_inputs(case: Case, device: torch.device) -> dict[str, Tensor]:
    """random: logits of unit variance. peaked: the input leans to the weight of its target, 4 to 20 above the rest."""
    generator = torch.Generator(device).manual_seed(1)
    rows, width, vocab = (case.shape[key] for key in ("N", "D", "V"))
    target = make_targets(case, device)
    weight = torch.randn(vocab, width, generator=generator, device=device).mul_(width**-0.5)
    hidden = torch.randn(rows, width, generator=generator, device=device)
    if case.regime == "peaked":
        lead = 4 + 16 * torch.rand(rows, 1, generator=generator, device=device)
        hidden += lead * weight[target.clamp_min(0)]
    inputs = {"input": hidden.to(case.dtype), "weight": weight.to(case.dtype), "target": target}
    if case.bias:
        inputs["bias"] = torch.randn(vocab, generator=generator, device=device).mul_(0.1).to(case.dtype)
    return inputs


def oracle(case: Case, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    valid = inputs["target"] != -100
    hidden, *parameters = (inputs[name].double().requires_grad_(case.backward) for name in LEAVES if name in inputs)
    loss = F.cross_entropy(F.linear(hidden[valid], *parameters), inputs["target"][valid])
    return (loss.detach(), *(torch.autograd.grad(loss, [hidden, *parameters]) if case.backward else ()))


def twin(case: Case) -> Case:
    return harness.rows_twin(make_case, case, 64)


def _linear_loss(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight, bias), target)


def eager(case: Case, t: dict[str, Tensor]) -> Tensor:
    return _linear_loss(t["input"], t["weight"], t.get("bias"), t["target"])


@functools.cache
def _compiled(device: str):
    return torch.compile(_linear_loss, dynamic=True if device == "cpu" else None)  # one compilation for all shapes


def compiled(case: Case, t: dict[str, Tensor]) -> Tensor:
    return _compiled(t["target"].device.type)(t["input"], t["weight"], t.get("bias"), t["target"])


def chunked(case: Case, t: dict[str, Tensor]) -> Tensor:
    from torch.nn.modules.linear_cross_entropy_options import LinearCrossEntropyOptions

    bias = {"linear_bias": t["bias"]} if case.bias else {}
    return F.linear_cross_entropy(t["input"], t["weight"], t["target"], options=LinearCrossEntropyOptions(), **bias)


def ours(mode: str):
    def loss(case: Case, t: dict[str, Tensor]) -> Tensor:
        return sk.linear_cross_entropy(t["input"], t["weight"], t["target"], linear_bias=t.get("bias"), mode=mode)

    return loss


def matmuls(case: Case, inputs: dict[str, Tensor]) -> Run:
    """The products alone, on the rows that are not ignored, into memory that is there: no fused loss does less."""
    hidden = inputs["input"][inputs["target"] != -100]
    weight = inputs["weight"]
    logits = torch.empty(len(hidden), len(weight), dtype=case.dtype, device=weight.device)
    if not case.backward:
        return Run(lambda: (torch.mm(hidden, weight.t(), out=logits),), owned=(logits,))
    grad_input, grad_weight = torch.empty_like(hidden), torch.empty_like(weight)

    def call() -> tuple[Tensor, ...]:
        torch.mm(hidden, weight.t(), out=logits)
        torch.mm(logits, weight, out=grad_input)
        torch.mm(logits.t(), hidden, out=grad_weight)
        return (grad_input, grad_weight)

    return Run(call, owned=(logits, grad_input, grad_weight))


def case_providers(case: Case, device: torch.device) -> list[Provider]:
    patience = providers.patience(device)
    chunked_missing = None
    if not hasattr(F, "linear_cross_entropy"):
        chunked_missing = f"torch {torch.__version__} has no F.linear_cross_entropy"
    found = [
        Provider(EAGER, providers.loss_run(eager, LEAVES)),
        Provider(COMPILED, providers.loss_run(compiled, LEAVES), warmups=1, patience=patience),
        Provider(
            CHUNKED,
            providers.loss_run(chunked, LEAVES),
            patience=patience,
            unavailable=chunked_missing,
        ),
        Provider(FLOOR if case.backward else FLOOR_FORWARD, matmuls, is_floor=True),
    ]
    backends = providers.backend_providers
    found += backends(OP, device, ours("auto"), LEAVES)
    if case.backward and (device.type == "cuda" or case.shape["N"] <= 1024):
        compact = backends(OP, device, ours("compact"), LEAVES, " compact")
        found += [p for p in compact if "reference" not in p.name]
    return found + peers.linear_cross_entropy(device)


def bars(device: str) -> list[Bar]:
    found = []
    if device == "cpu":
        single, half, sparse = (case.name for case in cases(device)[:3])
        found += [
            Bar("median / three matmuls", single, providers.time_ratio(OURS, FLOOR), 1.10),
            Bar("median / eager torch", single, providers.time_ratio(OURS, EAGER), 1.0),
            Bar("MB beyond the gradients", single, providers.memory_mb, 96),
            Bar("median / three matmuls", half, providers.time_ratio(OURS, FLOOR), 1.25),
            Bar("times faster than F.linear_cross_entropy", half, providers.time_ratio(CHUNKED, OURS), 5, True),
            Bar("times faster than eager torch", sparse, providers.time_ratio(EAGER, OURS), 4.5, True),
        ]
    else:
        for case in cases(device):
            floor = FLOOR if case.backward else FLOOR_FORWARD
            limit = 1.25 if case.shape["D"] > 1024 else 1.5
            found.append(Bar("median / the bare matmuls", case.name, providers.time_ratio(OURS, floor), limit))
            found.append(Bar("MB beyond the gradients", case.name, providers.memory_mb, 512 * MEBI / 1e6))
            found.append(Bar("median / fastest peer", case.name, providers.over_fastest_peer, 1.0))
    return found + providers.error_bars(cases(device))


BENCHMARK = Benchmark(
    op=OP,
    shape_keys=("N", "D", "V"),
    baseline=EAGER,
    make_case=make_case,
    cases=cases,
    smoke_cases=smoke_cases,
    inputs=make_inputs,
    providers=case_providers,
    twin=twin,
    oracle=oracle,
    errors=harness.named_errors(["loss", "grad input", "grad weight", "grad bias"]),
    bars=bars,
)


@pytest.mark.parametrize(("case", "provider"), providers.smoke_parameters(BENCHMARK))
def test_linear_cross_entropy(benchmark, case, provider):
    providers.smoke(benchmark, BENCHMARK, case, provider)
