"""linear_cross_entropy: input (N, D) and weight (V, D) -> loss and the gradients of both (and of the bias)."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

import sslkernels as sk
from benchmarks import peers, providers
from benchmarks.benchmark import Benchmark, HandSum, HostCase, compiled, smoke_test
from benchmarks.harness import Bar, Case, Inputs, Provider, Run
from benchmarks.ops.cross_entropy import make_targets
from benchmarks.providers import EAGER, OURS

CHUNKED = "F.linear_cross_entropy(options)"
MASKED, COMPILED_MASKED = "eager on valid rows", "compiled on valid rows"
FLOOR = "three matmuls (floor)"
FLOOR_FORWARD = "one matmul (floor)"
BAR_SHAPE = {"N": 2048, "D": 768, "V": 50257}
MASKED_SHAPE = {"N": 4096, "D": 256, "V": 30000}
QUICK_MASKED_SHAPE = {**MASKED_SHAPE, "N": 2048}
SMALL_SHAPE = {"N": 512, "D": 64, "V": 8192}
BERT_SHAPE = {"N": 512, "D": 768, "V": 30522}
MEBI = 1 << 20


def chunked(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> Tensor:
    from torch.nn.modules.linear_cross_entropy_options import LinearCrossEntropyOptions

    with_bias = {} if bias is None else {"linear_bias": bias}
    return F.linear_cross_entropy(hidden, weight, target, options=LinearCrossEntropyOptions(), **with_bias)


def on_valid_rows(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> Tensor:
    """The two lines that people write where most targets are ignored."""
    valid = target != -100
    return F.cross_entropy(F.linear(hidden[valid], weight, bias), target[valid])


def matmuls(case: Case, inputs: Inputs) -> Run:
    """Only the products of the rows that are not ignored, into preallocated memory: no fused loss does less."""
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


class LinearCrossEntropy(Benchmark):
    op = "linear_cross_entropy"
    shape_keys = ("N", "D", "V")
    names = ("input", "weight", "bias", "target")
    leaves = ("input", "weight", "bias")
    results = ("loss", "grad input", "grad weight", "grad bias")
    settings = frozenset({"regime", "ignored", "backward", "bias"})
    twin_rows = 64
    host = HostCase({"N": 32, "D": 64, "V": 1000}, 1.8)

    def cost(self, case: Case) -> tuple[int, int]:
        """Input and weight are read, their gradients written; one or three matmuls of the rows that are not ignored."""
        rows, width, vocab = case.shape["N"], case.shape["D"], case.shape["V"]
        valid = rows - round(rows * case.ignored)
        touched = (rows * width + vocab * width) * case.dtype.itemsize
        matmul = 2 * valid * width * vocab
        return (2 * touched, 3 * matmul) if case.backward else (touched, matmul)

    def hand_sums(self) -> list[HandSum]:
        shape = {"N": 100, "D": 8, "V": 1000}
        elements, valid = 100 * 8 + 1000 * 8, 15
        forward = self.case(shape, torch.bfloat16, backward=False)
        return [
            HandSum(self.case(shape, ignored=0.85), 2 * 4 * elements, 6 * valid * 8 * 1000),
            HandSum(forward, 2 * elements, 2 * 100 * 8 * 1000),
        ]

    def cases(self, device: str) -> list[Case]:
        if device == "cpu":
            sweep = [self.case({"N": 512, "D": 64, "V": v}) for v in (SMALL_SHAPE["V"], 16384, 32768, 65536, 131072)]
            bar = [self.case(BAR_SHAPE), self.case(BAR_SHAPE, torch.bfloat16), self.case(BAR_SHAPE, ignored=0.85)]
            masked = [self.case(MASKED_SHAPE, dtype, ignored=0.85) for dtype in (torch.float32, torch.bfloat16)]
            return [self.case(BERT_SHAPE), *bar, self.case(QUICK_MASKED_SHAPE, ignored=0.85), *masked, *sweep]
        make = functools.partial(self.case, dtype=torch.bfloat16)
        found = []
        shapes = [(8192, 2304, 256000), (8192, 4096, 128256)]
        shapes += [(19661, 768, 30522), (9830, 768, 50368), (9830, 1024, 50265)]
        for n, d, v in shapes:
            shape = {"N": n, "D": d, "V": v}
            found += [make(shape, bias=True), make(shape, regime="peaked", bias=True)]
            found += [make(shape, ignored=part, bias=True) for part in (0.7, 0.85)]
        found.append(make({"N": 8192, "D": 4096, "V": 128256}))  # without bias, which some peers reject
        found.append(make({"N": 8192, "D": 2304, "V": 256000}, backward=False, bias=True))
        vocabularies = (30522, 50265, 50368, 128256, 250002, 256000)
        return found + [make({"N": 8192, "D": 768, "V": v}, bias=True) for v in vocabularies]

    def default_cases(self, device: str) -> list[Case]:
        if device == "cuda":
            return self.cases(device)[:1]
        return [self.case(BERT_SHAPE), self.case(QUICK_MASKED_SHAPE, ignored=0.85), self.case(SMALL_SHAPE)]

    def smoke_cases(self, device: str) -> list[Case]:
        shape = {"N": 67, "D": 64, "V": 1003}
        return [self.case(shape, bias=True), self.case(shape, torch.bfloat16, "peaked", 0.7, bias=True)]

    def inputs(self, case: Case, device: torch.device) -> Inputs:
        """random: logits of unit variance. peaked: each input points to its target's weight, 4 to 20 above the rest."""
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

    @staticmethod
    def plain(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight, bias), target)

    @staticmethod
    def fused(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, mode: str = "auto") -> Tensor:
        return sk.linear_cross_entropy(hidden, weight, target, linear_bias=bias, mode=mode)

    def others(self, case: Case, device: torch.device) -> list[Provider]:
        missing = None
        if not hasattr(F, "linear_cross_entropy"):
            missing = f"torch {torch.__version__} has no F.linear_cross_entropy"
        patience = providers.patience(device)
        masked = []
        if case.ignored:
            call = functools.partial(compiled, on_valid_rows, self.dynamic[device.type])
            masked.append(Provider(MASKED, self.run(on_valid_rows)))
            masked.append(Provider(COMPILED_MASKED, self.run(lambda *a: call()(*a)), warmups=1))
        return [
            *masked,
            Provider(CHUNKED, self.run(chunked), patience=patience, unavailable=missing),
            Provider(FLOOR if case.backward else FLOOR_FORWARD, matmuls, is_floor=True),
        ]

    def peers(self, case: Case, device: torch.device) -> list[Provider]:
        found = []
        if case.backward and (device.type == "cuda" or case.shape["N"] <= 1024):
            compact = self.backends(case, device, functools.partial(self.fused, mode="compact"), " compact")
            found = [p for p in compact if "reference" not in p.name]
        return found + peers.linear_cross_entropy(device)

    def limits(self, case: Case, device: str) -> list[Bar]:
        if device == "cuda":
            floor = FLOOR if case.backward else FLOOR_FORWARD
            limit = 1.25 if case.shape["D"] > 1024 else 1.5
            return [
                Bar("median / the bare matmuls", case.name, providers.time_ratio(OURS, floor), limit),
                Bar("MB beyond the gradients", case.name, providers.memory_mb, 512 * MEBI / 1e6),
                Bar("median / fastest peer", case.name, providers.over_fastest_peer, 1.0),
            ]
        if case.shape in (MASKED_SHAPE, QUICK_MASKED_SHAPE):
            return [
                Bar(f"median / {other}", case.name, providers.time_ratio(OURS, other), 1.0)
                for other in (MASKED, COMPILED_MASKED)
            ]
        if case.shape != BAR_SHAPE:
            return []
        if case.ignored:
            return [Bar("times faster than eager torch", case.name, providers.time_ratio(EAGER, OURS), 4.5, True)]
        over_floor = providers.time_ratio(OURS, FLOOR)
        if case.dtype == torch.bfloat16:
            faster = providers.time_ratio(CHUNKED, OURS)
            return [
                Bar("median / three matmuls", case.name, over_floor, 1.25),
                Bar("times faster than F.linear_cross_entropy", case.name, faster, 5, True),
            ]
        return [
            Bar("median / three matmuls", case.name, over_floor, 1.10),
            Bar("median / eager torch", case.name, providers.time_ratio(OURS, EAGER), 1.0),
            Bar("MB beyond the gradients", case.name, providers.memory_mb, 96),
        ]


BENCHMARKS = (LinearCrossEntropy(),)
test_linear_cross_entropy = smoke_test(BENCHMARKS)
