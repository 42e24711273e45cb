"""Checks that a step does not synchronise with the host, and captures steps in CUDA graphs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

T = TypeVar("T")


@contextlib.contextmanager
def no_synchronisation() -> Iterator[None]:
    """Raises RuntimeError if the body waits for the GPU."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def captured(step: Callable[[], T]) -> tuple[torch.cuda.CUDAGraph, T]:
    """A graph of `step`, which must not synchronise, and the results that each replay overwrites."""
    with no_synchronisation():
        step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return graph, results
