"""What the tests of the integrations share: two gloo ranks, and libraries without torchvision."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
import socket
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import peers
import pytest
import torch

import sslkernels  # noqa: F401  outside of `package_alone`, which forgets what is imported in it

# What stable_pretraining.utils.distributed imports and its collectives do not use.
TRAINING: dict[str, dict[str, object]] = {"loguru": {"logger": logging.getLogger("loguru")}}


def needs(library: str) -> None:
    """Skips the test if the library is not installed. One that is installed and cannot be imported is a failure."""
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed", allow_module_level=True)


def ran_in_two_ranks(function: Callable[..., None], *args: Any) -> None:
    """Runs `function(rank, *args)` in two processes of one group; what one raises is raised here."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    torch.multiprocessing.spawn(_rank, (port, function, args), 2)


def _rank(rank: int, port: int, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    os.environ.update(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE="2")
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    try:
        function(rank, *args)
    finally:
        torch.distributed.destroy_process_group()


@functools.cache
def integration(name: str) -> ModuleType:
    """`sslkernels.integrations.<name>`, whose library is imported without what needs torchvision or trains models."""
    unused = {**peers.TORCHVISION, **TRAINING} if name == "stable_pretraining" else peers.TORCHVISION
    with peers.package_alone(name, unused):
        if name == "stable_pretraining":
            utils = sys.modules["stable_pretraining.utils"]
            utils.__dict__.update(vars(importlib.import_module("stable_pretraining.utils.distributed")))
        return importlib.import_module(f"sslkernels.integrations.{name}")
