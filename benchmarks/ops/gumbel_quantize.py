"""gumbel_quantize: logits (N, G, V) and a codebook (G, V, D) -> values (N, G * D) and their gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import sslkernels as sk
from benchmarks import providers
from benchmarks.harness import Bar, Benchmark, Case, Provider, Run
from benchmarks.providers import EAGER, OURS

OP = "gumbel_quantize"
MATMUL = "eager torch, one-hot @ codebook"
STATS = "with perplexities"  # regime
TAU = 2.0


def make_case(
    shape: dict[str, int],
    dtype: torch.dtype = torch.float32,
    regime: str = "random",
    ignored: float = 0.0,
    backward: bool = True,
    bias: bool = False,
) -> Case:
    """Logits and codes read, values written; for the gradients logits, codes and that of the values read, and those of
    logits and codes written, with one matmul."""
    n, g, v, d = (shape[key] for key in "NGVD")
    logits, values, codes = n * g * v, n * g * d, g * v * d
    elements = 3 * logits + 2 * values + 3 * codes if backward else logits + values + codes
    flops = 2 * n * g * v * d if backward else 0
    return Case(OP, shape, dtype, elements * dtype.itemsize, flops, regime, 0.0, backward)


def cases(device: str) -> list[Case]:
    """wav2vec 2.0: two groups of 320 codes, here of 87 seconds of speech; one codebook of 8192 codes."""
    speech = {"N": 4375, "G": 2, "V": 320, "D": 128}
    found = [make_case(speech), make_case(speech, regime=STATS), make_case({"N": 8192, "G": 1, "V": 8192, "D": 64})]
    if device == "cpu":
        return found
    batch = {"N": 70000, "G": 2, "V": 320, "D": 128}
    return [*found, *(make_case(batch, torch.bfloat16, regime) for regime in ("random", STATS))]


def smoke_cases(device: str) -> list[Case]:
    shape = {"N": 33, "G": 2, "V": 20, "D": 12}
    return [make_case(shape, regime=STATS), make_case(shape, torch.bfloat16)]


def make_inputs(case: Case, device: torch.device) -> dict[str, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    n, g, v, d = (case.shape[key] for key in "NGVD")
    shapes = {"logits": (n, g, v), "codebook": (g, v, d), "grad": (n, g * d)}
    return {k: torch.randn(s, generator=generator, device=device).to(case.dtype) for k, s in shapes.items()}


Quantize = Callable[[Tensor, Tensor], Tensor]


def perplexity(logits: Tensor) -> Tensor:
    p = logits.float().softmax(-1).mean(0)
    return (-(p * (p + 1e-7).log()).sum(-1)).exp().sum()


def fairseq(logits: Tensor, codebook: Tensor) -> Tensor:
    """As fairseq and Hugging Face multiply: one-hot and codebook element by element."""
    one_hot = F.gumbel_softmax(logits.float(), TAU, True).type_as(logits)
    n = logits.shape[0]
    product = one_hot.reshape(n, -1, 1) * codebook.reshape(1, -1, codebook.shape[2])
    return product.view(n, *codebook.shape).sum(2).flatten(1)


def matmul(logits: Tensor, codebook: Tensor) -> Tensor:
    one_hot = F.gumbel_softmax(logits.float(), TAU, True).type_as(logits)
    return (one_hot.transpose(0, 1) @ codebook).transpose(0, 1).flatten(1)


def quantize_run(quantize: Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor | None]]):
    def build(case: Case, inputs: dict[str, Tensor]) -> Run:
        leaves = [inputs[name].detach().requires_grad_(case.backward) for name in ("logits", "codebook")]

        def call() -> tuple[Tensor, ...]:
            values, diversity = quantize(*leaves, case.regime == STATS)
            if not case.backward:
                return (values,)
            outputs = (values,) if diversity is None else (values, diversity)
            grads = (inputs["grad"], None)[: len(outputs)]
            return (values.detach(), *torch.autograd.grad(outputs, leaves, grads))

        return Run(call)

    return build


def plain(quantize: Quantize):
    return quantize_run(
        lambda logits, codebook, stats: (quantize(logits, codebook), perplexity(logits) if stats else None)
    )


def ours(logits: Tensor, codebook: Tensor, stats: bool) -> tuple[Tensor, Tensor | None]:
    quantized = sk.gumbel_quantize(logits, codebook, tau=TAU, seed=1, return_stats=stats)
    return quantized.values, quantized.prob_perplexity


def case_providers(case: Case, device: torch.device) -> list[Provider]:
    """Without the reference, which emulates fused operations in float64; element by element only where it fits."""
    n, g, v, d = (case.shape[key] for key in "NGVD")
    found = [Provider(MATMUL, plain(matmul))]
    limit = 2 << 30 if device.type == "cpu" else 16 << 30
    if n * g * v * d * 4 < limit:
        found.append(Provider(f"{EAGER}, as fairseq", plain(fairseq), patience=providers.patience(device)))
    for backend in providers.BACKENDS:
        if backend != "reference":
            build, reason = providers.within(backend, quantize_run(ours)), providers.why_not(OP, backend, device)
            found.append(Provider(f"{OURS} {backend}", build, unavailable=reason))
    return found


def twin(case: Case) -> Case:
    return make_case({**case.shape, "N": min(case.shape["N"], 256)}, case.dtype, case.regime, backward=case.backward)


def errors(inputs: dict[str, Tensor], results: Sequence[Tensor]) -> dict[str, float]:
    """Of what must be so whatever noise a provider draws: values are codes, the gradients of a row of logits add up to
    0, those of a group's codes to that of its values; relative to the dtype's rounding."""
    values, grad_logits, grad_codebook = (result.double() for result in results)
    codebook, grad = inputs["codebook"].double(), inputs["grad"].double()
    rounding = torch.finfo(inputs["logits"].dtype).eps / torch.finfo(torch.float32).eps
    rows = values.view(len(values), codebook.shape[0], -1).transpose(0, 1)
    total = grad.view(len(grad), *codebook.shape[::2]).sum(0)
    return {
        "values": float(torch.cdist(rows, codebook).amin(2).max()) / rounding,
        "sum of a gradient": float(grad_logits.sum(2).norm() / grad_logits.norm()) / rounding,
        "sum of the codes' gradients": float((grad_codebook.sum(1) - total).norm() / grad.norm()) / rounding,
    }


def bars(device: str) -> list[Bar]:
    found = []
    for case in cases(device):
        n, g, v, _ = (case.shape[key] for key in "NGVD")
        if device == "cpu":
            ratio = providers.time_ratio(MATMUL, OURS)
            found.append(Bar("times faster than the one-hot in a matmul", case.name, ratio, 2, True))
        what = "MB beyond values and gradients, against the one-hot"
        found.append(Bar(what, case.name, providers.memory_mb, n * g * v * case.dtype.itemsize / 1e6))
    return found


BENCHMARK = Benchmark(
    op=OP,
    shape_keys=("N", "G", "V", "D"),
    baseline=MATMUL,
    make_case=make_case,
    cases=cases,
    smoke_cases=smoke_cases,
    inputs=make_inputs,
    providers=case_providers,
    twin=twin,
    oracle=lambda case, inputs: inputs,
    errors=errors,
    bars=bars,
)


@pytest.mark.parametrize(("case", "provider"), providers.smoke_parameters(BENCHMARK))
def test_gumbel_quantize(benchmark, case, provider):
    providers.smoke(benchmark, BENCHMARK, case, provider)
