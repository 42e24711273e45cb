"""Losses of other packages, each imported without the rest of its package and its dependencies."""

import importlib
import importlib.util
import sys
import types
from pathlib import Path

import pytest
import torch


def import_alone(
    module: str, stand_ins: dict[str, dict[str, object]] | None = None, *, whole_package: bool = False
) -> types.ModuleType:
    """Imports a module; the `__init__` of its packages does not run unless `whole_package`.

    stand_ins: attributes of the modules to replace because the loss does not use them. Skips the test if the package is
    not installed. Removes all modules imported on the way from `sys.modules`.
    """
    root = module.split(".")[0]
    found = importlib.util.find_spec(root)
    if found is None:
        pytest.skip(f"{root} is not installed")
    before = set(sys.modules)
    try:
        for name, attributes in (stand_ins or {}).items():
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].__dict__.update(attributes)
        folder = Path(found.submodule_search_locations[0])
        for package in (
            [] if whole_package else [folder, *(path for path in folder.rglob("*") if (path / "__init__.py").exists())]
        ):
            name = ".".join([root, *package.relative_to(folder).parts])
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].__path__ = [str(package)]
        return importlib.import_module(module)
    finally:
        for name in set(sys.modules) - before:
            del sys.modules[name]


def info_nce() -> types.ModuleType:
    return import_alone("info_nce", whole_package=True)


def lightly_nt_xent(temperature: float) -> torch.nn.Module:
    unused = {"torchvision": {}, "torchvision.ops": {"StochasticDepth": torch.nn.Identity}}
    return import_alone("lightly.loss.ntx_ent_loss", unused).NTXentLoss(temperature=temperature)


def open_clip_losses() -> types.ModuleType:
    return import_alone("open_clip.loss")


def supervised_contrastive(temperature: float) -> torch.nn.Module:
    unused = {"scipy": {}, "scipy.stats": {}, "scipy.special": {}, "tqdm": {"tqdm": iter}}
    losses = import_alone("pytorch_metric_learning.losses.supcon_loss", unused, whole_package=True)
    return losses.SupConLoss(temperature=temperature)


def lightly_loss(name: str) -> types.ModuleType:
    """A module of lightly's losses that takes logits."""
    return import_alone(f"lightly.loss.{name}")
