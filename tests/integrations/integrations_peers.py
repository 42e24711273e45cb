"""What the tests of the integrations share: two gloo ranks, and a library without the rest of its package."""

from __future__ import annotations

import importlib
import os
import socket
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import peers
import torch


def ran_in_two_ranks(function: Callable[..., None], *args: Any) -> None:
    """Runs `function(rank, *args)` in two processes of one group; what one raises is raised here."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    torch.multiprocessing.spawn(_rank, (port, function, args), 2)


def _rank(rank: int, port: int, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    try:
        function(rank, *args)
    finally:
        torch.distributed.destroy_process_group()


def integration(name: str, module: str, stand_ins: dict[str, dict[str, Any]] | None = None) -> tuple[ModuleType, ...]:
    """(the integration, the module of the library): the `__init__` of a library that needs torchvision does not run."""
    key = f"sslkernels.integrations.{name}"
    if key not in sys.modules:
        with peers.without_package_init(module.split(".")[0], stand_ins):
            importlib.import_module(key)
    found = sys.modules[key]
    return found, found.library
