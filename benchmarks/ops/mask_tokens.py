"""mask_tokens: token ids (B, T) -> corrupted ids and labels."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

import sslkernels as sk
from benchmarks import providers
from benchmarks.benchmark import Benchmark, HandSum, HostCase, compiled, smoke_test
from benchmarks.harness import Bar, Case, Inputs, Provider, Run
from benchmarks.providers import OURS

COLLATOR = "Hugging Face rule"
WHERE = "torch.where rule"
COMPILED_WHERE = "torch.compile of torch.where rule"
PROBABILITY, MASKED, RANDOM = 0.15, 0.8, 0.1
MASK_ID, VOCAB, IGNORE = 103, 30522, -100


def collator(case: Case, inputs: Inputs) -> Run:
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


def where(ids: Tensor, special: Tensor) -> tuple[Tensor, Tensor]:
    """One uniform number a token decides everything; no boolean indexing."""
    draw = torch.rand(ids.shape, device=ids.device).masked_fill(special, 1.0)
    words = torch.randint_like(ids, VOCAB)
    labels = torch.where(draw < PROBABILITY, ids, IGNORE)
    out = torch.where(draw < PROBABILITY * (MASKED + RANDOM), words, ids)
    return torch.where(draw < PROBABILITY * MASKED, MASK_ID, out), labels


class MaskTokens(Benchmark):
    op = "mask_tokens"
    shape_keys = ("B", "T")
    names = ("ids", "special")
    settings = frozenset()
    differentiable = False
    dtype = torch.int64
    baseline = COLLATOR
    bars_on_error = False
    twin_rows = None
    host = HostCase({"B": 4, "T": 64})

    def case(self, shape: dict[str, int], *settings, **named) -> Case:
        """Always int64, whatever dtype the command line asks for."""
        return super().case(shape)

    def cost(self, case: Case) -> tuple[int, int]:
        """A token reads 8 bytes of id and 1 of the mask of special tokens; it writes 16 of id and label."""
        return 25 * case.shape["B"] * case.shape["T"], 0

    def hand_sums(self) -> list[HandSum]:
        return [HandSum(self.case({"B": 4, "T": 8}), 25 * 32, 0)]

    def cases(self, device: str) -> list[Case]:
        sizes = [(8192, 512)] if device == "cpu" else [(256, 512), (8192, 512)]
        return [self.case({"B": b, "T": t}) for b, t in sizes]

    def smoke_cases(self, device: str) -> list[Case]:
        return [self.case({"B": 257, "T": 131})]

    def inputs(self, case: Case, device: torch.device) -> Inputs:
        """Ids of a BERT vocabulary; the first and the last token of each row are special."""
        generator = torch.Generator(device).manual_seed(0)
        shape = (case.shape["B"], case.shape["T"])
        ids = torch.randint(1000, VOCAB, shape, generator=generator, device=device)
        special = torch.zeros(shape, dtype=torch.bool, device=device)
        special[:, 0] = special[:, -1] = True
        return {"ids": ids, "special": special}

    @staticmethod
    def fused(ids: Tensor, special: Tensor) -> tuple[Tensor, Tensor]:
        return sk.mask_tokens(
            ids,
            mask_id=MASK_ID,
            vocab_size=VOCAB,
            probability=PROBABILITY,
            replace=(MASKED, RANDOM),
            special_mask=special,
            seed=0,
        )

    def providers(self, case: Case, device: torch.device) -> list[Provider]:
        compiled_where = functools.partial(compiled, where, None)
        return [
            Provider(COLLATOR, collator),
            Provider(WHERE, self.run(where)),
            Provider(COMPILED_WHERE, self.run(lambda *tensors: compiled_where()(*tensors)), warmups=1),
            *self.backends(case, device),
        ]

    def oracle(self, case: Case, inputs: Inputs) -> Inputs:
        return inputs

    def errors(self, inputs: Inputs, results: Sequence[Tensor]) -> dict[str, float]:
        """Tokens that break the rule, and how far the counts are beyond six standard deviations of the binomial."""
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

    def limits(self, case: Case, device: str) -> list[Bar]:
        ratio = providers.time_ratio(COLLATOR, OURS)
        return [Bar("times faster than the Hugging Face rule", case.name, ratio, 10, True)]


BENCHMARKS = (MaskTokens(),)
test_mask_tokens = smoke_test(BENCHMARKS)
