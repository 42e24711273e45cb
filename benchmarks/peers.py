"""Fused losses of other packages, if they can be imported. Which shapes a peer supports is found by running it."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.harness import Case, Provider, Rejected, Run
from benchmarks.providers import Loss, loss_run

PACKAGES = {  # import name -> distribution name
    "liger_kernel": "liger-kernel",
    "cut_cross_entropy": "cut-cross-entropy",
    "quack": "quack-kernels",
    "flash_attn": "flash-attn",
    "inf_cl": "inf-cl",
    "memeff": "memeff",
    "siglip_kernel": "siglip-kernel",
}


def versions() -> dict[str, str]:
    """Version of each peer, or "not installed"."""
    found = {}
    for distribution in PACKAGES.values():
        try:
            found[distribution] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            found[distribution] = "not installed"
    return found


def cross_entropy(device: torch.device) -> list[Provider]:
    """Losses on logits."""

    def liger(case: Case, t: dict[str, Tensor]) -> Tensor:
        return _get("liger_kernel.transformers.functional", "liger_cross_entropy")(t["logits"], t["target"])

    def quack(case: Case, t: dict[str, Tensor]) -> Tensor:
        return _get("quack.cross_entropy", "cross_entropy")(t["logits"], t["target"], reduction="mean")

    def flash(case: Case, t: dict[str, Tensor]) -> Tensor:
        losses, _ = _get("flash_attn.ops.triton.cross_entropy", "cross_entropy_loss")(t["logits"], t["target"])
        return losses.sum() / (t["target"] != -100).sum()

    return [
        _peer("liger_kernel", "liger", liger, ["logits"], device, overwrites="logits"),
        _peer("quack", "quack", quack, ["logits"], device),
        _peer("flash_attn", "flash-attn", flash, ["logits"], device),
    ]


def linear_cross_entropy(device: torch.device) -> list[Provider]:
    """Losses on the input of the last linear layer."""
    leaves = ["input", "weight", "bias"]

    def liger(case: Case, t: dict[str, Tensor]) -> Tensor:
        function = _get("liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy")
        return function(t["input"], t["weight"], t["target"], bias=t.get("bias"))

    def cce(**options: object) -> Loss:
        def loss(case: Case, t: dict[str, Tensor]) -> Tensor:
            function = _get("cut_cross_entropy", "linear_cross_entropy")
            if case.bias and "bias" not in inspect.signature(function).parameters:
                raise Rejected("it takes no bias")
            bias = {"bias": t["bias"]} if case.bias else {}
            return function(t["input"], t["weight"], t["target"], impl="cce", **options, **bias)

        return loss

    def quack(case: Case, t: dict[str, Tensor]) -> Tensor:
        if case.bias:
            raise Rejected("it takes no bias")
        function = _get("quack.linear_cross_entropy", "chunked_linear_cross_entropy")
        return function(t["input"], t["weight"], t["target"])

    return [
        _peer("liger_kernel", "liger", liger, leaves, device),
        _peer("cut_cross_entropy", "cce", cce(), leaves, device),
        _peer("cut_cross_entropy", "cce_exact", cce(filter_eps=None), leaves, device),  # drops no small gradient
        _peer("quack", "quack", quack, leaves, device),
    ]


def contrastive(op: str, device: torch.device) -> list[Provider]:
    """Losses of pairs of normalised features."""

    def memeff(case: Case, t: dict[str, Tensor]) -> Tensor:
        # Its temperature is a number. By default its gradient is wrong for its loss; stable=False corrects that.
        function = _get("memeff.clip_loss", "MemoryEfficientCLIPLoss")
        return function(temperature=0.1, normalized_inputs=True, stable=False)(t["x"], t["y"])

    def inf_cl(case: Case, t: dict[str, Tensor]) -> Tensor:
        function = _get("inf_cl", "cal_inf_loss")
        return (function(t["x"], t["y"], scale=t["scale"]) + function(t["y"], t["x"], scale=t["scale"])) / 2

    def siglip(case: Case, t: dict[str, Tensor]) -> Tensor:
        return _get("siglip_kernel", "fused_siglip_loss")(t["x"], t["y"], t["scale"].log(), t["bias"])

    if op == "clip_loss":
        return [
            _peer("memeff", "memeff", memeff, ["x", "y"], device),
            _peer("inf_cl", "inf-cl", inf_cl, ["x", "y", "scale"], device),
        ]
    if op == "siglip_loss":
        return [_peer("siglip_kernel", "siglip-kernel", siglip, ["x", "y", "scale", "bias"], device)]
    return []


def _get(module: str, name: str):
    return getattr(importlib.import_module(module), name)


def _peer(
    module: str, name: str, loss: Loss, leaves: Sequence[str], device: torch.device, overwrites: str | None = None
) -> Provider:
    """overwrites: the input that the peer reuses as its gradient buffer; it is restored before each run, not timed."""
    unavailable = None
    if importlib.util.find_spec(module) is None:
        unavailable = f"{PACKAGES[module]} is not installed"
    elif device.type != "cuda":
        unavailable = "it needs a CUDA device"

    def build(case: Case, inputs: dict[str, Tensor]) -> Run:
        if overwrites is None:
            return loss_run(loss, leaves)(case, inputs)
        scratch = inputs[overwrites].clone()
        run = loss_run(loss, leaves)(case, {**inputs, overwrites: scratch})
        return run._replace(prepare=lambda: scratch.copy_(inputs[overwrites]), owned=(scratch,))

    return Provider(f"peer {name}", build, unavailable=unavailable, checked=False)
