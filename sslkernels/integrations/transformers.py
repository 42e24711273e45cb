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

The model keeps its class, parameters and code; while labels are pending, its output embeddings return the loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from sslkernels.core import checks
from sslkernels.core.modules import left_as_it_was
from sslkernels.integrations.language_model import PatchedForward, fitted
from sslkernels.vocabulary.collator import DataCollatorForMaskedLM

__all__ = ["DataCollatorForMaskedLM", "patch", "unpatch"]


def patch(model: nn.Module, *, compact: bool = True, example_inputs: Mapping[str, Any] | None = None) -> nn.Module:
    """Make a language model compute its loss without its logits. Nothing but this instance changes.

    In training mode, a call with `labels` returns the same loss and gradients, and None for the logits; in evaluation
    mode it returns logits, bit for bit as before, unless it is called with `skip_logits=True`. (`skip_logits=False`
    gives the logits in training too.) The loss leaves through the output of the model. `num_items_in_batch` divides the
    sum of the losses in every model: gradients accumulated over micro-batches are those of the batch.

    The model is called on a few tokens to see that its loss is the cross-entropy of its output embeddings, of the same
    token or the next one, up to a softcap or scale in its configuration; it is left as it was, and so are generators.

    With FSDP2, patch the model first and shard it then. Adapters on the output embeddings are refused: by `patch`, or
    at the next call with labels where they come later. Adapters elsewhere may come before or after. A deep copy of a
    patched model is a patched model. Calls from several threads wait for each other. `nn.DataParallel` raises.

    Args:
        model: any masked or causal language model of transformers 5, on its device, or PEFT's or compile's of one.
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
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    return model.get_base_model() if hasattr(model, "get_base_model") else model
