"""Contrastive losses: features (N, D) -> loss and the gradients of features (and of scale and bias)."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import sslkernels as sk
from benchmarks import harness, peers, providers
from benchmarks.harness import Bar, Benchmark, Case, Provider, Run
from benchmarks.providers import COMPILED, EAGER, OURS

BAR_SHAPE = {"N": 4096, "D": 256}
LARGE_SHAPE = {"N": 16384, "D": 256}
WORDS = ("no", "one", "two", "three", "four")
ERROR_ROWS = 512
MEBI = 1 << 20


def floor_name(matmuls: int) -> str:
    return f"{WORDS[matmuls]} matmuls (floor)"


def clip(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    scores = scale * (x @ y.t())
    target = torch.arange(len(x), device=x.device)
    return (F.cross_entropy(scores, target) + F.cross_entropy(scores.t(), target)) / 2


def siglip(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    scores = scale * (x @ y.t()) + bias
    sign = 2 * torch.eye(len(x), device=x.device, dtype=x.dtype) - 1
    return -F.logsigmoid(sign * scores).sum() / len(x)


def nt_xent(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    z = F.normalize(torch.cat([x, y]), dim=1)
    scores = scale * (z @ z.t())
    scores = scores.masked_fill(torch.eye(len(z), dtype=torch.bool, device=z.device), float("-inf"))
    return F.cross_entropy(scores, torch.arange(len(z), device=z.device).roll(len(x)))


def frozen_keys(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return F.cross_entropy(scale * (x @ y.t()), torch.arange(len(x), device=x.device))


class Loss:
    """A loss of pairs of features. matmuls: of the score matrix's size that its forward and backward need; learned:
    which arguments get gradients."""

    def __init__(self, op: str, matmuls: int, learned: list[str], eager: Callable, ours: Callable) -> None:
        self.op = op
        self.matmuls = matmuls
        self.learned = learned
        self.eager = eager
        self.ours = ours

    def __call__(self, function: Callable) -> Callable[[Case, dict[str, Tensor]], Tensor]:
        return lambda case, t: function(t["x"], t["y"], t["scale"], t["bias"])


FEATURES = ["x", "y"]
LOSSES = (
    Loss("clip_loss", 4, [*FEATURES, "scale"], clip, lambda x, y, s, b: sk.clip_loss(x, y, s)),
    Loss("siglip_loss", 3, [*FEATURES, "scale", "bias"], siglip, sk.siglip_loss),
    Loss("nt_xent", 2, FEATURES, nt_xent, lambda x, y, s, b: sk.nt_xent(x, y, temperature=1 / s)),
    Loss(
        "contrastive_energy",
        2,
        ["x", "scale"],
        frozen_keys,
        lambda x, y, s, b: sk.contrastive_energy(x, y, logit_scale=s),
    ),
)


def make_inputs(case: Case, device: torch.device) -> dict[str, Tensor]:
    """Normalised pairs of cosine 0.5 or so, at the temperature and the bias that training starts from."""
    generator = torch.Generator(device).manual_seed(1)
    rows, width = case.shape["N"], case.shape["D"]
    x, noise = (torch.randn(rows, width, generator=generator, device=device) for _ in range(2))
    return {
        "x": F.normalize(x, dim=1).to(case.dtype),
        "y": F.normalize(x + noise, dim=1).to(case.dtype),
        "scale": torch.tensor(10.0, device=device),
        "bias": torch.tensor(-10.0, device=device),
    }


def benchmark_of(loss: Loss) -> Benchmark:
    op = loss.op
    views = 2 if op == "nt_xent" else 1

    def make_case(
        shape: dict[str, int],
        dtype: torch.dtype = torch.float32,
        regime: str = "random",
        ignored: float = 0.0,
        backward: bool = True,
        bias: bool = False,
    ) -> Case:
        """Features are read, their gradients written; the matmuls of the whole score matrix."""
        rows, width = shape["N"], shape["D"]
        touched = 2 * rows * width * dtype.itemsize
        matmul = 2 * (views * rows) ** 2 * width
        return Case(op, shape, dtype, 2 * touched, matmul * loss.matmuls, regime, 0.0, True, False)

    def cases(device: str) -> list[Case]:
        if device == "cpu":
            found = [make_case(BAR_SHAPE), make_case(BAR_SHAPE, torch.bfloat16)]
            if op == "nt_xent":
                return [make_case({"N": 2048, "D": 256})]
            return [*found, make_case(LARGE_SHAPE)] if op == "clip_loss" else found[:1]
        sizes = [(n, d) for d in (128, 256, 512, 768, 1024) for n in (4096, 16384, 65536)]
        return [make_case({"N": n, "D": d}, torch.bfloat16) for n, d in sizes]

    def smoke_cases(device: str) -> list[Case]:
        shape = {"N": 67, "D": 24}
        return [make_case(shape), make_case(shape, torch.bfloat16)]

    def oracle(case: Case, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        tensors = {k: v.double().requires_grad_(k in loss.learned) for k, v in inputs.items()}
        value = loss(loss.eager)(case, tensors)
        return (value.detach(), *torch.autograd.grad(value, [tensors[k] for k in loss.learned]))

    @functools.cache
    def compiled(device: str) -> Callable:
        return torch.compile(loss.eager, dynamic=True if device == "cpu" else None)

    def matmuls(case: Case, inputs: dict[str, Tensor]) -> Run:
        """The products alone, of the whole matrix at once, into memory that is there."""
        x, y = inputs["x"], inputs["y"]
        if views == 2:
            x = y = torch.cat([x, y])
        scores = torch.empty(len(x), len(y), dtype=case.dtype, device=x.device)
        outputs = [torch.empty_like(x), torch.empty_like(y)]
        # The scores, as often as they are computed; of NT-Xent one half of them twice, and one gradient.
        forwards = {4: 2, 3: 1, 2: 1}[loss.matmuls]

        def call() -> tuple[Tensor, ...]:
            for _ in range(forwards):
                torch.mm(x, y.t(), out=scores)
            torch.mm(scores, y, out=outputs[0])
            if loss.matmuls > 2:
                torch.mm(scores.t(), x, out=outputs[1])
            return tuple(outputs)

        return Run(call, owned=(scores, *outputs))

    def case_providers(case: Case, device: torch.device) -> list[Provider]:
        patience = providers.patience(device)
        large = case.shape["N"] > BAR_SHAPE["N"]
        run = functools.partial(providers.loss_run, leaves=loss.learned)
        found = [
            Provider(EAGER, run(loss(loss.eager)), patience=patience if large else math.inf),
            Provider(
                COMPILED,
                run(lambda case, t: compiled(t["x"].device.type)(t["x"], t["y"], t["scale"], t["bias"])),
                warmups=1,
                patience=patience,
            ),
            Provider(floor_name(loss.matmuls), matmuls, is_floor=True),
        ]
        found += providers.backend_providers("contrastive_energy", device, loss(loss.ours), loss.learned)
        return found + peers.contrastive(op, device)

    def bars(device: str) -> list[Bar]:
        found = []
        floor = providers.time_ratio(OURS, floor_name(loss.matmuls))
        faster = providers.time_ratio(EAGER, OURS)
        floor_text = f"median / {floor_name(loss.matmuls).removesuffix(' (floor)')}"
        default = cases(device)
        if device == "cpu":
            first = default[0].name
            floor_limit, eager_limit = {
                "clip_loss": (1.25, 1.5),
                "siglip_loss": (1.3, 1.7),
                "nt_xent": (1.4, 1.5),
                "contrastive_energy": (1.3, 1.5),
            }[op]
            found.append(Bar(floor_text, first, floor, floor_limit))
            found.append(Bar("times faster than eager torch", first, faster, eager_limit, True))
            if op == "clip_loss":
                found.append(Bar("times faster than eager torch", default[1].name, faster, 2, True))
                limit = 0.1 * 4 * LARGE_SHAPE["N"] ** 2 / 1e6
                found.append(Bar("MB beyond the gradients", default[2].name, providers.memory_mb, limit))
        else:
            for case in default:
                found.append(Bar(floor_text, case.name, floor, 1.5))
                found.append(Bar("MB beyond the gradients", case.name, providers.memory_mb, 1100 * MEBI / 1e6))
                found.append(Bar("median / fastest peer", case.name, providers.over_fastest_peer, 1.0))
        return found + providers.error_bars(default)

    return Benchmark(
        op=op,
        shape_keys=("N", "D"),
        baseline=EAGER,
        make_case=make_case,
        cases=cases,
        smoke_cases=smoke_cases,
        inputs=make_inputs,
        providers=case_providers,
        twin=lambda case: make_case({**case.shape, "N": min(case.shape["N"], ERROR_ROWS)}, case.dtype),
        oracle=oracle,
        errors=harness.named_errors(["loss", *(f"grad {name}" for name in loss.learned)]),
        bars=bars,
    )


BENCHMARKS = tuple(benchmark_of(loss) for loss in LOSSES)


@pytest.mark.parametrize(
    ("benchmark_", "case", "provider"),
    [
        pytest.param(benchmark_, *parameter.values, marks=parameter.marks, id=parameter.id)
        for benchmark_ in BENCHMARKS
        for parameter in providers.smoke_parameters(benchmark_)
    ],
)
def test_contrastive(benchmark, benchmark_, case, provider):
    providers.smoke(benchmark, benchmark_, case, provider)
