"""What `patch` does with a class of transformers: exact, or refused with a reason. As a program: the table of the docs.

python tests/integrations/classes.py docs/integrations_classes.md
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import NamedTuple

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]

import tiny_models  # noqa: E402
import torch  # noqa: E402

import sslkernels as sk  # noqa: E402


class Outcome(NamedTuple):
    """kind: "exact", "refused" or "not built" (no tiny configuration was found)."""

    kind: str
    reason: str = ""


def outcome(name: str) -> Outcome:
    """The outcome for one class; asserts that a class which is not refused is exact."""
    try:
        model = tiny_models.without_dropout(tiny_models.tiny(name))
        inputs = tiny_models.inputs(model)
        with torch.no_grad():
            model.eval()(**inputs)
            model.train()(**inputs)
    except Exception as error:
        return Outcome("not built", f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:80]}")
    try:
        sk.integrations.transformers.patch(model)
    except ValueError as refusal:
        message = str(refusal)
        assert type(model).__name__ in message
        return Outcome("refused", message.partition(f"got {type(model).__name__}, ")[2])
    sk.integrations.transformers.unpatch(model)
    check_exact(model, inputs)
    return Outcome("exact")


def check_exact(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    """Loss, gradients and evaluation of the patched model are those of the model, which unpatching restores."""
    labels = labels_for(inputs)
    own, own_gradients = _step(model, inputs, labels)
    with torch.no_grad():
        own_evaluated = model.eval()(**inputs, labels=labels)
    model.train()
    attributes = {key: id(value) for key, value in vars(model).items()}

    sk.integrations.transformers.patch(model)
    loss, gradients = _step(model, inputs, labels, logits=False)
    torch.testing.assert_close(loss, own, rtol=1e-6, atol=1e-6)
    assert gradients.keys() == own_gradients.keys()
    for key, gradient in gradients.items():
        scale = max(float(own_gradients[key].abs().max()), 1.0)
        torch.testing.assert_close(gradient, own_gradients[key], rtol=1e-5, atol=1e-5 * scale, msg=key)
    model.eval()
    with torch.no_grad():
        evaluated = model(**inputs, labels=labels)
        assert torch.equal(evaluated.logits, own_evaluated.logits)
        assert torch.equal(model(**inputs).logits, own_evaluated.logits)
        unseen = model(**inputs, labels=labels, skip_logits=True)
    assert unseen.logits is None
    for loss in (evaluated.loss, unseen.loss):
        torch.testing.assert_close(loss, own_evaluated.loss, rtol=1e-6, atol=1e-6)

    sk.integrations.transformers.unpatch(model)
    assert {key: id(value) for key, value in vars(model.train()).items()} == attributes
    restored, restored_gradients = _step(model, inputs, labels)
    assert torch.equal(restored, own)
    assert all(torch.equal(restored_gradients[key], own_gradients[key]) for key in own_gradients)


def labels_for(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    ids = next(iter(inputs.values()))
    return torch.where(torch.rand(ids.shape, generator=torch.Generator().manual_seed(1)) < 0.4, ids, -100)


def _step(
    model: torch.nn.Module, inputs: dict[str, torch.Tensor], labels: torch.Tensor, *, logits: bool = True
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.train().zero_grad(set_to_none=True)
    torch.manual_seed(0)
    output = model(**inputs, labels=labels)
    assert (output.logits is not None) == logits
    output.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return output.loss.detach(), gradients


def table(kind: str) -> dict[str, Outcome]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {name: outcome(name) for name in tiny_models.mapping(kind)}
