"""gumbel_quantize: logits (N, G, V) and a codebook (G, V, D) -> values (N, G * D) and their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import sslkernels as sk
from benchmarks import providers
from benchmarks.benchmark import Benchmark, HandSum, HostCase, smoke_test
from benchmarks.harness import Bar, Case, Inputs, Provider
from benchmarks.providers import EAGER, OURS

MATMUL = "eager torch, one-hot @ codebook"
STATS = "with perplexities"  # regime
TAU = 2.0


def one_hot_of(logits: Tensor) -> Tensor:
    return F.gumbel_softmax(logits.float(), TAU, True).type_as(logits)


def perplexity(logits: Tensor) -> Tensor:
    p = logits.float().softmax(-1).mean(0)
    return (-(p * (p + 1e-7).log()).sum(-1)).exp().sum()


def fairseq(logits: Tensor, codebook: Tensor, stats: bool) -> tuple[Tensor, Tensor | None]:
    """fairseq and Hugging Face multiply one-hot and codebook elementwise."""
    n = logits.shape[0]
    product = one_hot_of(logits).reshape(n, -1, 1) * codebook.reshape(1, -1, codebook.shape[2])
    return product.view(n, *codebook.shape).sum(2).flatten(1), perplexity(logits) if stats else None


class GumbelQuantize(Benchmark):
    op = "gumbel_quantize"
    shape_keys = ("N", "G", "V", "D")
    names = leaves = ("logits", "codebook")
    settings = frozenset({"regime", "backward"})
    baseline = MATMUL
    bars_on_error = False
    host = HostCase({"N": 32, "G": 2, "V": 64, "D": 16})

    def cost(self, case: Case) -> tuple[int, int]:
        """Forward reads logits and codes and writes values. Backward reads logits, codes and the gradient of the
        values, and writes the gradients of logits and codes, with one matmul."""
        n, g, v, d = (case.shape[key] for key in "NGVD")
        logits, values, codes = n * g * v, n * g * d, g * v * d
        elements = 3 * logits + 2 * values + 3 * codes if case.backward else logits + values + codes
        return elements * case.dtype.itemsize, 2 * n * g * v * d if case.backward else 0

    def hand_sums(self) -> list[HandSum]:
        case = self.case({"N": 10, "G": 2, "V": 8, "D": 3})
        return [HandSum(case, 4 * (3 * 160 + 2 * 60 + 3 * 48), 2 * 10 * 2 * 8 * 3)]

    def cases(self, device: str) -> list[Case]:
        """wav2vec 2.0: two groups of 320 codes, for 87 seconds of speech; one codebook of 8192 codes."""
        speech = {"N": 4375, "G": 2, "V": 320, "D": 128}
        found = [self.case(speech), self.case(speech, regime=STATS), self.case({"N": 8192, "G": 1, "V": 8192, "D": 64})]
        if device == "cpu":
            return found
        batch = {"N": 70000, "G": 2, "V": 320, "D": 128}
        return [*found, *(self.case(batch, torch.bfloat16, regime) for regime in ("random", STATS))]

    def smoke_cases(self, device: str) -> list[Case]:
        shape = {"N": 33, "G": 2, "V": 20, "D": 12}
        return [self.case(shape, regime=STATS), self.case(shape, torch.bfloat16)]

    def inputs(self, case: Case, device: torch.device) -> Inputs:
        generator = torch.Generator(device).manual_seed(0)
        n, g, v, d = (case.shape[key] for key in "NGVD")
        shapes = {"logits": (n, g, v), "codebook": (g, v, d), "grad": (n, g * d)}
        return {k: torch.randn(s, generator=generator, device=device).to(case.dtype) for k, s in shapes.items()}

    def arguments(self, case: Case, t: Inputs) -> tuple[Any, ...]:
        return (*super().arguments(case, t), case.regime == STATS)

    def grad_outputs(self, case: Case, t: Inputs) -> tuple[Tensor | None, ...]:
        return (t["grad"], None)

    @staticmethod
    def plain(logits: Tensor, codebook: Tensor, stats: bool) -> tuple[Tensor, Tensor | None]:
        values = (one_hot_of(logits).transpose(0, 1) @ codebook).transpose(0, 1).flatten(1)
        return values, perplexity(logits) if stats else None

    @staticmethod
    def fused(logits: Tensor, codebook: Tensor, stats: bool) -> tuple[Tensor, Tensor | None]:
        quantized = sk.gumbel_quantize(logits, codebook, tau=TAU, seed=1, return_stats=stats)
        return quantized.values, quantized.prob_perplexity

    def providers(self, case: Case, device: torch.device) -> list[Provider]:
        """fairseq's product of one-hot and codebook only where it fits."""
        found = [Provider(MATMUL, self.run(self.plain))]
        n, g, v, d = (case.shape[key] for key in "NGVD")
        if n * g * v * d * 4 < (2 << 30 if device.type == "cpu" else 16 << 30):
            found.append(Provider(f"{EAGER}, as fairseq", self.run(fairseq), patience=providers.patience(device)))
        return found + self.backends(case, device)

    def has_reference(self, case: Case) -> bool:
        return False

    def oracle(self, case: Case, inputs: Inputs) -> Inputs:
        return inputs

    def errors(self, inputs: Inputs, results: Sequence[Tensor]) -> dict[str, float]:
        """For any noise values are codes, the gradients of a row of logits sum to 0, the gradients of a
        group's codes sum to the gradients of its values. Relative to the dtype's rounding."""
        values, *_, grad_logits, grad_codebook = (result.double() for result in results)
        codebook, grad = inputs["codebook"].double(), inputs["grad"].double()
        rounding = torch.finfo(inputs["logits"].dtype).eps / torch.finfo(torch.float32).eps
        rows = values.view(len(values), codebook.shape[0], -1).transpose(0, 1)
        total = grad.view(len(grad), *codebook.shape[::2]).sum(0)
        return {
            "values": float(torch.cdist(rows, codebook).amin(2).max()) / rounding,
            "sum of a gradient": float(grad_logits.sum(2).norm() / grad_logits.norm()) / rounding,
            "sum of the codes' gradients": float((grad_codebook.sum(1) - total).norm() / grad.norm()) / rounding,
        }

    def limits(self, case: Case, device: str) -> list[Bar]:
        n, g, v, _ = (case.shape[key] for key in "NGVD")
        what = "MB beyond values and gradients, against the one-hot"
        found = [Bar(what, case.name, providers.memory_mb, n * g * v * case.dtype.itemsize / 1e6)]
        if device == "cpu":
            ratio = providers.time_ratio(MATMUL, OURS)
            found.append(Bar("times faster than the one-hot in a matmul", case.name, ratio, 2, True))
        return found


BENCHMARKS = (GumbelQuantize(),)
test_gumbel_quantize = smoke_test(BENCHMARKS)
