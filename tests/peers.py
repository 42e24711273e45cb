"""Losses of other packages, each imported without the rest of its package and its dependencies."""

import contextlib
import importlib
import importlib.util
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


@contextlib.contextmanager
def package_alone(
    root: str, stand_ins: dict[str, dict[str, object]] | None = None, *, whole_package: bool = False
) -> Iterator[None]:
    """While it is entered, modules of the package `root` are imported without the `__init__` of its packages, unless
    `whole_package`; then all modules imported on the way are removed from `sys.modules`.

    stand_ins: attributes of the modules to replace because the loss does not use them. Skips the test if the package is
    not installed.
    """
    found = importlib.util.find_spec(root)
    if found is None:
        pytest.skip(f"{root} is not installed")
    before = dict(sys.modules)
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
        yield
    finally:
        for name in set(sys.modules) - set(before):
            del sys.modules[name]
        sys.modules.update(before)  # restores modules that a stand-in replaced


def import_alone(
    module: str, stand_ins: dict[str, dict[str, object]] | None = None, *, whole_package: bool = False
) -> types.ModuleType:
    """A module, imported in `package_alone`."""
    with package_alone(module.split(".")[0], stand_ins, whole_package=whole_package):
        return importlib.import_module(module)


def info_nce() -> types.ModuleType:
    return import_alone("info_nce", whole_package=True)


# torchvision, which needs the torch that it was built for, is in neither of these losses.
TORCHVISION = {"torchvision": {}, "torchvision.ops": {"StochasticDepth": torch.nn.Identity}}


def lightly_nt_xent(temperature: float) -> torch.nn.Module:
    return import_alone("lightly.loss.ntx_ent_loss", TORCHVISION).NTXentLoss(temperature=temperature)


def open_clip_losses() -> types.ModuleType:
    return import_alone("open_clip.loss")


def supervised_contrastive(temperature: float) -> torch.nn.Module:
    unused = {"scipy": {}, "scipy.stats": {}, "scipy.special": {}, "tqdm": {"tqdm": iter}}
    losses = import_alone("pytorch_metric_learning.losses.supcon_loss", unused, whole_package=True)
    return losses.SupConLoss(temperature=temperature)


def lightly_loss(name: str) -> types.ModuleType:
    """A module of lightly's losses that takes logits."""
    return import_alone(f"lightly.loss.{name}")
