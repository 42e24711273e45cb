"""`mask_tokens` as a collator: examples of a tokenizer in, a padded batch with labels out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sslkernels.core import checks
from sslkernels.vocabulary.modules import TokenMasker


class DataCollatorForMaskedLM:
    """Pads examples and masks them by `mask_tokens`: the labels of a masked language model.

    Args:
        tokenizer: a tokenizer with a mask token; it pads the examples.
        probability: see `mask_tokens`, as for `replace`, `mean_span` and `min_per_row`.
        replace: fractions of the chosen tokens that become the mask token and a random one.
        whole_words: choose words. An example then has "word_ids" (`encoding.word_ids()`), or "offset_mapping", in which
            a token that begins where the one before it ends belongs to the same word.
        mean_span: mean length of a span, in tokens or words.
        min_per_row: least number of chosen tokens (words) of an example.
        pad_to_multiple_of: pads to a multiple of this length.
        seed: of a generator of this collator's own, in each worker another; None: torch's default generator.

    Special tokens of the tokenizer are neither chosen nor drawn; tokens with "special_tokens_mask" 1 are not chosen.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        probability: float = 0.15,
        replace: tuple[float, float] = (0.8, 0.1),
        whole_words: bool = False,
        mean_span: float | None = None,
        min_per_row: int = 0,
        pad_to_multiple_of: int | None = None,
        seed: int | None = None,
    ) -> None:
        name = type(self).__name__
        if getattr(tokenizer, "mask_token_id", None) is None:
            checks.fail(ValueError, name, "tokenizer", "have a mask token", type(tokenizer).__name__)
        checks.boolean(name, "whole_words", whole_words)
        checks.integer(name, "pad_to_multiple_of", pad_to_multiple_of, low=1, optional=True)
        checks.integer(name, "seed", seed, optional=True)
        self.tokenizer = tokenizer
        self.whole_words = whole_words
        self.pad_to_multiple_of = pad_to_multiple_of
        self.seed = seed
        self.generator: torch.Generator | None = None
        self.masker = TokenMasker(
            mask_id=tokenizer.mask_token_id,
            vocab_size=len(tokenizer),
            probability=probability,
            replace=replace,
            special_ids=tokenizer.all_special_ids,
            mean_span=mean_span,
            min_per_row=min_per_row,
        )
        self.masker(torch.zeros(1, 0, dtype=torch.int64), seed=0)  # checks options here rather than in a worker

    def __call__(self, examples: Sequence[Any]) -> dict[str, Tensor]:
        examples = [dict(each) if isinstance(each, Mapping) else {"input_ids": each} for each in examples]
        word_ids = [_word_ids(each) for each in examples] if self.whole_words else None
        examples = [{k: v for k, v in each.items() if k not in ("offset_mapping", "word_ids")} for each in examples]
        batch = self.tokenizer.pad(examples, return_tensors="pt", pad_to_multiple_of=self.pad_to_multiple_of)
        ids = batch["input_ids"]
        options: dict[str, Any] = {"special_mask": batch.pop("special_tokens_mask", None)}
        if word_ids is not None:
            left = getattr(self.tokenizer, "padding_side", "right") == "left"
            padding = [[None] * (ids.shape[1] - len(words)) for words in word_ids]
            pairs = zip(padding, word_ids, strict=True)
            options["word_ids"] = [[*pad, *words] if left else [*words, *pad] for pad, words in pairs]
        if self.seed is not None and self.generator is None:
            worker = torch.utils.data.get_worker_info()
            self.generator = torch.Generator().manual_seed(self.seed + (0 if worker is None else worker.id))
        masked = self.masker(ids, attention_mask=batch.get("attention_mask"), generator=self.generator, **options)
        batch["input_ids"], batch["labels"] = masked.input_ids, masked.labels
        return batch


def _word_ids(example: Mapping[str, Any]) -> list[int | None]:
    if "word_ids" in example:
        return list(example["word_ids"])
    if "offset_mapping" not in example:
        raise ValueError(f"DataCollatorForMaskedLM: examples must have word_ids or offset_mapping; got {[*example]}")
    words: list[int | None] = []
    word, end = -1, None
    for start, stop in example["offset_mapping"]:
        special = start == stop
        word += not special and start != end
        words.append(None if special else word)
        end = None if special else stop
    return words
