"""corrupt_spans: token ids (B, T) -> T5's input and labels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

import sslkernels as sk
from benchmarks import providers
from benchmarks.benchmark import Benchmark, HandSum, HostCase, smoke_test
from benchmarks.harness import Bar, Case, Inputs, Provider, Run
from benchmarks.providers import OURS

COLLATOR = "Hugging Face example in numpy"
SENTINEL, END, VOCAB = 32099, 1, 32000
DENSITY, MEAN_SPAN = 0.15, 3.0


def counts(columns: int) -> tuple[int, int]:
    """Tokens that are taken out of a row, and their spans."""
    noise = min(max(round(columns * DENSITY), 1), columns - 1)
    return noise, min(max(round(noise / MEAN_SPAN), 1), columns - noise)


def numpy_mask(columns: int) -> np.ndarray:
    """Which tokens of a row are taken out, by the steps of the example's random_spans_noise_mask."""
    noise, spans = counts(columns)

    def segments(total: int) -> np.ndarray:
        begins = np.arange(total - 1) < spans - 1
        np.random.shuffle(begins)
        number = np.cumsum(np.pad(begins, [[1, 0]]))
        return np.unique(number, return_counts=True)[1]

    both = np.stack([segments(columns - noise), segments(noise)], axis=1).reshape(-1)
    starts = np.zeros(columns, dtype=np.int8)
    starts[np.cumsum(both)[:-1]] = True
    return np.cumsum(starts) % 2 == 1


def numpy_filtered(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The ids with a sentinel in place of each run of the mask, and an end."""
    starts = mask - np.roll(mask, 1, axis=-1) * mask
    starts[:, 0] = mask[:, 0]
    sentinels = np.where(starts != 0, SENTINEL + 1 - np.cumsum(starts, axis=-1), starts)
    sentinels -= mask - starts
    merged = np.where(sentinels != 0, sentinels, ids)
    kept = merged[merged >= 0].reshape(len(ids), -1)
    return np.concatenate([kept, np.full((len(ids), 1), END)], axis=-1)


def collator(case: Case, inputs: Inputs) -> Run:
    """The steps of FlaxDataCollatorForT5MLM of transformers' run_t5_mlm_flax.py."""
    ids = inputs["ids"].cpu().numpy()

    def call() -> tuple[Tensor, ...]:
        mask = np.asarray([numpy_mask(ids.shape[1]) for _ in range(len(ids))])
        results = numpy_filtered(ids, mask.astype(np.int8)), numpy_filtered(ids, (~mask).astype(np.int8))
        return tuple(torch.from_numpy(result).to(inputs["ids"].device) for result in results)

    return Run(call)


class CorruptSpans(Benchmark):
    op = "corrupt_spans"
    shape_keys = ("B", "T")
    names = ("ids",)
    settings = frozenset()
    differentiable = False
    compiles = False
    dtype = torch.int64
    baseline = COLLATOR
    bars_on_error = False
    twin_rows = None
    host = HostCase({"B": 4, "T": 64})

    def case(self, shape: dict[str, int], *settings, **named) -> Case:
        """Always int64, whatever dtype the command line asks for."""
        return super().case(shape)

    def cost(self, case: Case) -> tuple[int, int]:
        """Each token is read and written once; sentinels and ends are written to both results."""
        _, spans = counts(case.shape["T"])
        return 8 * case.shape["B"] * (2 * case.shape["T"] + 2 * spans + 2), 0

    def hand_sums(self) -> list[HandSum]:
        return [HandSum(self.case({"B": 4, "T": 40}), 8 * 4 * (80 + 4 + 2), 0)]

    def cases(self, device: str) -> list[Case]:
        return [self.case({"B": 7392, "T": 568})]

    def smoke_cases(self, device: str) -> list[Case]:
        return [self.case({"B": 57, "T": 131})]

    def inputs(self, case: Case, device: torch.device) -> Inputs:
        generator = torch.Generator(device).manual_seed(0)
        shape = (case.shape["B"], case.shape["T"])
        return {"ids": torch.randint(1000, VOCAB, shape, generator=generator, device=device)}

    @staticmethod
    def plain(ids: Tensor) -> tuple[Tensor, ...]:
        return collator(None, {"ids": ids}).call()

    @staticmethod
    def fused(ids: Tensor) -> tuple[Tensor, Tensor]:
        return sk.corrupt_spans(ids, sentinel_ids=range(SENTINEL, VOCAB - 1, -1), eos_id=END, seed=0)

    def providers(self, case: Case, device: torch.device) -> list[Provider]:
        return [Provider(COLLATOR, collator), *self.backends(case, device)]

    def oracle(self, case: Case, inputs: Inputs) -> Inputs:
        return inputs

    def errors(self, inputs: Inputs, results: Sequence[Tensor]) -> dict[str, float]:
        """Tokens of the input and of the labels that are out of order or that neither has, and missing sentinels."""
        ids, (corrupted, labels) = inputs["ids"], results
        noise, spans = counts(ids.shape[1])
        kept, taken = (t[(t < VOCAB) & (t != END)].reshape(len(ids), -1) for t in (corrupted, labels))
        both = torch.cat([kept, taken], 1).sort(1).values
        sentinels = torch.arange(SENTINEL, SENTINEL - spans, -1, device=ids.device)
        wrong = sum(int((t[t >= VOCAB].reshape(len(ids), -1) != sentinels).sum()) for t in results)
        return {
            "tokens that are lost": float((both != ids.sort(1).values).sum()) + abs(taken.shape[1] - noise),
            "sentinels out of order": float(wrong),
        }

    def limits(self, case: Case, device: str) -> list[Bar]:
        ratio = providers.time_ratio(COLLATOR, OURS)
        return [Bar("times faster than the Hugging Face example", case.name, ratio, 10, True)]


BENCHMARKS = (CorruptSpans(),)
test_corrupt_spans = smoke_test(BENCHMARKS)
