"""The CUDA kernels of mask_tokens, run on the host under sanitizers: bit-identical to the reference."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from cuda_host import run
from torch import Tensor

import sslkernels as sk
from sslkernels.vocabulary.mask_tokens import MaskOptions, mask_rule

pytestmark = run.required

INLINE_RANGES = 64  # kInlineRanges in csrc/vocabulary/mask_tokens.h
VOCAB, MASK, SPECIAL = 60, 4, (0, 1, 2, 10, 11, 59, 70, -1)
LONG_VOCAB = 1000
LONG_SPECIAL = {  # number of ranges -> special ids; 0 and 1 are two ranges, and a range touches each end of a launch
    n: (-5, 0, 1, *range(7, 7 + 3 * (n - 4), 3)) for n in (INLINE_RANGES, INLINE_RANGES + 1, 3 * INLINE_RANGES + 7)
}

MODES = {
    "tokens": {},
    "spans": {"mean_span": 3.0},
    "words": {"words": "runs"},
    "word_spans": {"words": "runs", "mean_span": 2.5},
}
SHAPES = [(1, 1), (5, 1), (3, 3), (2, 4), (7, 5), (2, 127), (3, 128), (2, 130), (2, 1025)]
VARIANTS: list[dict[str, Any]] = [
    {},
    {"offset": 1, "special_mask": True, "word_dtype": torch.int32},
    {"output_offset": 1, "row_ids": True},
    {"offset": 2, "output_offset": 4, "special_mask": True, "row_ids": True},
    {"offset": 4, "output_offset": 3, "word_dtype": torch.int32},
]


@dataclass
class Mask:
    """One call of mask_tokens. offset, output_offset: elements before the first row of the inputs and the outputs."""

    rows: int
    columns: int
    dtype: torch.dtype = torch.int64
    offset: int = 0
    output_offset: int = 0
    special_mask: bool = False
    row_ids: bool = False
    words: str = ""
    word_dtype: torch.dtype = torch.int64
    mean_span: float | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def inputs(self) -> tuple[Tensor, dict[str, Any]]:
        """The ids, and the arguments of `sk.mask_tokens`."""
        rows, columns = self.rows, self.columns
        g = torch.Generator().manual_seed(1000 * rows + columns)
        options: dict[str, Any] = {"mask_id": MASK, "vocab_size": VOCAB, "special_ids": SPECIAL, "seed": -(2**33) - 5}
        options |= {"probability": 0.4, "replace": (0.5, 0.3), "mean_span": self.mean_span} | self.options
        ids = torch.randint(-2, options["vocab_size"] + 3, (rows, columns), generator=g).to(self.dtype)
        if self.special_mask:
            options["special_mask"] = torch.rand(rows, columns, generator=g) < 0.15
        if self.row_ids:
            options["row_ids"] = torch.randint(-(2**40), 2**40, (rows,), generator=g)
        if self.words == "runs":
            words = torch.randint(0, 3, (rows, columns), generator=g).cumsum(1) // 4
            words[torch.rand(rows, columns, generator=g) < 0.1] = -1
            options["word_ids"] = words.to(self.word_dtype)
        elif self.words == "one":  # one word per row, interrupted by some ineligible tokens
            options["word_ids"] = torch.zeros(rows, columns, dtype=self.word_dtype)
        elif self.words == "wide":  # word ids that differ only beyond 32 bits
            words = torch.randint(0, 2, (rows, columns), generator=g) << 32
            options["word_ids"] = words + 5
        return ids, options

    def call(self) -> run.Call:
        ids, options = self.inputs()
        replace = options["replace"]
        rule = mask_rule(MaskOptions(
            options["special_ids"], options["mask_id"], options["vocab_size"], options["probability"], *replace,
            options["mean_span"] or 0.0, options.get("ignore_index", -100),
        ))  # fmt: skip
        words = options.get("word_ids")
        arrays: dict[str, Tensor] = {
            "input_ids": stored(ids, self.offset),
            "seed": torch.tensor([options["seed"]]),
            "ranges": torch.tensor(rule.ranges),
            "output_ids": stored(torch.full_like(ids, 7), self.output_offset),
            "labels": stored(torch.full_like(ids, 7), self.output_offset),
        }
        if len(rule.ranges) > 2 * INLINE_RANGES:
            arrays["device_ranges"] = torch.full((len(rule.ranges),), 7)
        if words is not None:
            arrays["word_ids"] = stored(words, self.offset)
        if self.special_mask:
            arrays["special_mask"] = stored(options["special_mask"], self.offset)
        if self.row_ids:
            arrays["row_ids"] = options["row_ids"]
        ints = rule._asdict() | {
            "rows": self.rows, "columns": self.columns, "wide_ids": ids.dtype == torch.int64,
            "wide_words": self.word_dtype == torch.int64,
            "chained": words is not None or self.mean_span is not None,
            "range_count": len(rule.ranges) // 2,
        }  # fmt: skip
        del ints["ranges"]
        offsets = dict.fromkeys(("input_ids", "special_mask", "word_ids"), self.offset)
        offsets |= dict.fromkeys(("output_ids", "labels"), self.output_offset)
        return run.Call("mask_tokens", ints, {}, arrays, offsets)

    def expected(self) -> dict[str, Tensor]:
        ids, options = self.inputs()
        with sk.use_backend("reference"):
            masked = sk.mask_tokens(ids, **options)
        arrays = dict(self.call().arrays)
        arrays["output_ids"] = stored(masked.input_ids, self.output_offset)
        arrays["labels"] = stored(masked.labels, self.output_offset)
        if "device_ranges" in arrays:
            arrays["device_ranges"] = arrays["ranges"]
        return arrays


def stored(values: Tensor, offset: int) -> Tensor:
    """Memory that starts `offset` elements before the values and ends with the last one."""
    return torch.cat([torch.ones(offset, dtype=values.dtype), values.flatten()])


def cases() -> dict[str, Mask]:
    found: dict[str, Mask] = {}
    variants = itertools.cycle(enumerate(VARIANTS))
    for (mode, extra), dtype, shape in itertools.product(MODES.items(), (torch.int64, torch.int32), SHAPES):
        number, variant = next(variants)
        name = f"{mode}-{shape[0]}x{shape[1]}-{str(dtype).removeprefix('torch.')}-{number}"
        found[name] = Mask(*shape, dtype, **variant, **extra)
    for mode, extra in MODES.items():
        for shape in ((0, 5), (3, 0)):
            found[f"{mode}-{shape[0]}x{shape[1]}"] = Mask(*shape, **extra)
        for probability in (0.0, 1.0):
            if probability < 1 or "mean_span" not in extra:
                options = {"probability": probability, "ignore_index": 12345}
                found[f"{mode}-probability-{probability}"] = Mask(3, 33, **extra, options=options)
        for replace in ((0.0, 1.0), (1.0, 0.0), (0.0, 0.0)):
            found[f"{mode}-replace-{replace}"] = Mask(3, 33, **extra, options={"replace": replace})
        for count, special_ids in LONG_SPECIAL.items():
            options = {"special_ids": special_ids, "vocab_size": LONG_VOCAB, "replace": (0.1, 0.8)}
            for dtype in (torch.int64, torch.int32):
                name = f"{mode}-ranges-{count}-{str(dtype).removeprefix('torch.')}"
                found[name] = Mask(2, 65, dtype, **extra, options=options)
    for mean_span in (1.0, 200.0, None):
        name = f"one_word-{mean_span}"
        found[name] = Mask(3, 1025, words="one", mean_span=mean_span)
    found["wide_words"] = Mask(2, 130, words="wide")
    found["many_steps"] = Mask(2, 2100, words="runs", mean_span=40.0)  # three steps per row
    found["one_span"] = Mask(1, 2100, mean_span=1e6, options={"probability": 0.5})
    return found


CASES = cases()


results, test_no_kernel_races = run.results_and_races(lambda: {name: case.call() for name, case in CASES.items()})


@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(name, results):
    result, expected = results[name], CASES[name].expected()
    assert result.error == ""
    assert result.arrays.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(result.arrays[key], value), key


def test_every_kernel_runs(results, request):
    launched = {name for result in results.values() for name in result.launched}
    program = run.build(request.node.callspec.params["results"])
    names = ("mask_tokens", "store_ranges")
    compiled = {name for name in run.kernels(program).values() if name.startswith(names)}
    assert len(compiled) == 9
    assert launched == compiled
    assert results["spans-ranges-199-int32"].launched == [
        *4 * ["store_ranges_kernel"],
        "mask_tokens_chain_kernel<int, false>",
    ]
    assert results["tokens-ranges-64-int64"].launched == ["mask_tokens_kernel<long, true>"]
