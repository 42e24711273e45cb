"""Masked and causal language models of Hugging Face transformers, whose loss is computed without their logits.

>>> import torch
>>> import transformers
>>> import sslkernels as sk
>>> config = transformers.BertConfig(
...     vocab_size=1000, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
... )
>>> model = sk.integrations.transformers.patch(transformers.BertForMaskedLM(config).train())
>>> masked = sk.mask_tokens(torch.randint(5, 1000, (2, 16)), mask_id=4, vocab_size=1000, seed=0)
>>> model(input_ids=masked.input_ids, labels=masked.labels).loss.backward()

The model keeps its class, parameters and code. While it is called with `labels`, the `forward` of its output embeddings
returns the loss in place of the logits, and the `forward` of the model moves it from `logits` to `loss`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sslkernels.core import checks
from sslkernels.integrations.language_model import PatchedForward, fitted, left_as_it_was
from sslkernels.vocabulary.modules import TokenMasker

__all__ = ["DataCollatorForMaskedLM", "patch", "unpatch"]


def patch(model: nn.Module, *, compact: bool = True, example_inputs: Mapping[str, Any] | None = None) -> nn.Module:
    """Make a language model compute its loss without its logits. Nothing but this instance changes.

    In training mode, a call with `labels` returns the same loss and gradients, and None for the logits; in evaluation
    mode it returns logits, bit for bit as before, unless it is called with `skip_logits=True`. (`skip_logits=False`
    gives the logits in training too.) The loss leaves through the output of the model. `num_items_in_batch` divides the
    sum of the losses in every model: gradients accumulated over micro-batches are those of the batch.

    The model is called on a few tokens to see that its loss is the cross-entropy of its output embeddings, of the same
    token or the next one, up to a softcap or scale in its configuration; it is left as it was, and so is the state of
    the random generators.

    With FSDP2, patch the model first and shard it then. Adapters on the output embeddings are refused: by `patch`, or
    at the next call with labels where they come later. Adapters elsewhere may come before or after. A deep copy of a
    patched model is a patched model. `nn.DataParallel` over several devices raises: use DistributedDataParallel.

    Args:
        model: any masked or causal language model of transformers 5, on its device, or a PEFT model around one.
        compact: let only the rows with a label into the transform before the output embeddings, where there is one.
            Reads their number on the host. Under `torch.compile` all rows go through the transform.
        example_inputs: the arguments of the trial call, without labels. Default: `input_ids` `(2, 8)`.

    Returns `model`. Raises `TypeError` or `ValueError`, naming the class of the model and what does not fit.
    """
    checks.boolean("patch", "compact", compact)
    inner = _unwrapped("patch", model)
    unpatch(inner)
    with left_as_it_was(inner), torch.enable_grad():
        forward = fitted(inner.eval(), compact, example_inputs)
    forward.install()
    return model


def unpatch(model: nn.Module) -> nn.Module:
    """Give a model that was patched its own code back, and return it. One that was not patched is left alone.

    Args:
        model: what `patch` took.
    """
    attributes = vars(_unwrapped("unpatch", model))
    if isinstance(attributes.get("_original_forward"), PatchedForward):
        must = "be unwrapped first, by accelerator.unwrap_model(model, keep_fp32_wrapper=False)"
        checks.fail(ValueError, "unpatch", "model", must, "what accelerate wrapped")
    forward = getattr(attributes.get("forward"), "__func__", attributes.get("forward"))
    if isinstance(forward, PatchedForward):
        forward.remove()
    return model


def _unwrapped(function: str, model: Any) -> nn.Module:
    if not isinstance(model, nn.Module):
        checks.fail(TypeError, function, "model", "be a torch.nn.Module", type(model).__name__)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


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
