"""mask_tokens: token ids (B, T) -> corrupted ids and labels."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

import sslkernels as sk
from benchmarks import providers
from benchmarks.harness import Bar, Benchmark, Case, Provider, Run
from benchmarks.providers import OURS

OP = "mask_tokens"
COLLATOR = "Hugging Face rule"
WHERE = "torch.where rule"
COMPILED_WHERE = "torch.compile of torch.where rule"
PROBABILITY, MASKED, RANDOM = 0.15, 0.8, 0.1
MASK_ID, VOCAB, IGNORE = 103, 30522, -100


def make_case(
    shape: dict[str, int],
    dtype: torch.dtype = torch.int64,
    regime: str = "random",
    ignored: float = 0.0,
    backward: bool = False,
    bias: bool = False,
) -> Case:
    """A token: 8 bytes of id and 1 of the mask of special tokens read, 16 of id and label written."""
    return Case(OP, shape, torch.int64, 25 * shape["B"] * shape["T"], backward=False)


def cases(device: str) -> list[Case]:
    sizes = [(8192, 512)] if device == "cpu" else [(256, 512), (8192, 512)]
    return [make_case({"B": b, "T": t}) for b, t in sizes]


def smoke_cases(device: str) -> list[Case]:
    return [make_case({"B": 257, "T": 131})]


def make_inputs(case: Case, device: torch.device) -> dict[str, Tensor]:
    """Ids of a BERT vocabulary; the first and the last of each row are special."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (case.shape["B"], case.shape["T"])
    ids = torch.randint(1000, VOCAB, shape, generator=generator, device=device)
    special = torch.zeros(shape, dtype=torch.bool, device=device)
    special[:, 0] = special[:, -1] = True
    return {"ids": ids, "special": special}


def collator(case: Case, inputs: dict[str, Tensor]) -> Run:
    """The steps of transformers' DataCollatorForLanguageModeling.torch_mask_tokens, which overwrites its batch."""
    ids = inputs["ids"].clone()
    special = inputs["special"]

    def bernoulli(probability: float) -> Tensor:
        return torch.bernoulli(torch.full(ids.shape, probability, device=ids.device)).bool()

    def call() -> tuple[Tensor, ...]:
        labels = ids.clone()
        rates = torch.full(ids.shape, PROBABILITY, device=ids.device).masked_fill_(special, value=0.0)
        chosen = torch.bernoulli(rates).bool()
        labels[~chosen] = IGNORE
        masked = bernoulli(MASKED) & chosen
        ids[masked] = MASK_ID
        randomised = bernoulli(RANDOM / (1 - MASKED)) & chosen & ~masked
        words = torch.randint(VOCAB, ids.shape, dtype=torch.long, device=ids.device)
        ids[randomised] = words[randomised]
        return ids, labels

    return Run(call, prepare=lambda: ids.copy_(inputs["ids"]), owned=(ids,))


def _where(ids: Tensor, special: Tensor) -> tuple[Tensor, Tensor]:
    """One uniform a token decides all; no boolean indexing."""
    draw = torch.rand(ids.shape, device=ids.device).masked_fill(special, 1.0)
    words = torch.randint_like(ids, VOCAB)
    labels = torch.where(draw < PROBABILITY, ids, IGNORE)
    out = torch.where(draw < PROBABILITY * (MASKED + RANDOM), words, ids)
    return torch.where(draw < PROBABILITY * MASKED, MASK_ID, out), labels


@functools.cache
def _compiled():
    return torch.compile(_where)


def where(case: Case, inputs: dict[str, Tensor]) -> Run:
    return Run(lambda: _where(inputs["ids"], inputs["special"]))


def compiled(case: Case, inputs: dict[str, Tensor]) -> Run:
    return Run(lambda: _compiled()(inputs["ids"], inputs["special"]))


def ours(case: Case, inputs: dict[str, Tensor]) -> Run:
    def call() -> tuple[Tensor, ...]:
        return tuple(
            sk.mask_tokens(
                inputs["ids"],
                mask_id=MASK_ID,
                vocab_size=VOCAB,
                probability=PROBABILITY,
                replace=(MASKED, RANDOM),
                special_mask=inputs["special"],
                seed=0,
            )
        )

    return Run(call)


def case_providers(case: Case, device: torch.device) -> list[Provider]:
    found = [
        Provider(COLLATOR, collator),
        Provider(WHERE, where),
        Provider(COMPILED_WHERE, compiled, warmups=1),
    ]
    for backend in providers.BACKENDS:
        reason = providers.why_not(OP, backend, device)
        patience = providers.patience(device) if backend == "reference" else math.inf
        build = providers.within(backend, ours)
        found.append(Provider(f"{OURS} {backend}", build, patience=patience, unavailable=reason))
    return found


def oracle(case: Case, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return inputs


def errors(inputs: dict[str, Tensor], results: Sequence[Tensor]) -> dict[str, float]:
    """Tokens that break the rule, and excess of the drawn counts over six standard deviations of the binomial."""
    ids, labels = results
    chosen = labels != IGNORE
    wrong = (chosen & (labels != inputs["ids"])) | (~chosen & (ids != inputs["ids"])) | (chosen & inputs["special"])
    total, eligible = chosen.sum().item(), (~inputs["special"]).sum().item()
    masked, kept = (chosen & (ids == MASK_ID)).sum().item(), (chosen & (ids == inputs["ids"])).sum().item()
    drawn = [
        (total, eligible, PROBABILITY),
        (masked, total, MASKED + RANDOM / VOCAB),
        (kept, total, 1 - MASKED - RANDOM + RANDOM / VOCAB),
    ]
    excess = [max(0.0, abs(k - n * p) - 6 * math.sqrt(n * p * (1 - p))) for k, n, p in drawn]
    return {"tokens against the rule": float(wrong.sum()), "counts": max(excess)}


def bars(device: str) -> list[Bar]:
    found = []
    for case in cases(device):
        ratio = providers.time_ratio(COLLATOR, OURS)
        found.append(Bar("times faster than the Hugging Face rule", case.name, ratio, 10, True))
    return found


BENCHMARK = Benchmark(
    op=OP,
    shape_keys=("B", "T"),
    baseline=COLLATOR,
    make_case=make_case,
    cases=cases,
    smoke_cases=smoke_cases,
    inputs=make_inputs,
    providers=case_providers,
    twin=lambda case: case,
    oracle=oracle,
    errors=errors,
    bars=bars,
)


@pytest.mark.parametrize(("case", "provider"), providers.smoke_parameters(BENCHMARK))
def test_mask_tokens(benchmark, case, provider):
    providers.smoke(benchmark, BENCHMARK, case, provider)
