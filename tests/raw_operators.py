"""Tests of single kernels on a GPU, for racecheck and initcheck of compute-sanitizer: they run kernels of this package
alone, on memory that the host wrote, because torch's own kernels read uninitialised memory and race by design."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import sslkernels as sk

# as_users_run: no kernel of torch fills uninitialised memory.
SINGLE_KERNELS = (pytest.mark.sanitize, pytest.mark.kernel_only, pytest.mark.usefixtures("as_users_run"))


def single_kernels(test: Callable[..., None]) -> Callable[..., None]:
    """Gives the test the marks of `SINGLE_KERNELS`."""
    for mark in SINGLE_KERNELS:
        test = mark(test)
    return test


def skip_without_kernel(backend: str) -> None:
    if backend not in ("cuda", "triton"):
        pytest.skip("has no GPU kernel")


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors of a result: a tensor, a record, or a tuple of them."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from tensors(part)


def on_gpu(value: Any) -> Any:
    """The argument of a raw operator, a value or a record, with its tensors on the GPU."""
    if isinstance(value, Tensor):
        return value.cuda()
    return type(value)(*map(on_gpu, value)) if hasattr(value, "_fields") else value


def assert_equal_to_reference(op: Any, arguments: tuple[Any, ...], dtype: torch.dtype) -> Any:
    """Runs `op` on the GPU and its reference on the host on host arguments; returns the results of the reference."""
    with sk.use_backend("reference"):
        expected = op(*arguments)
    for got, want in zip(tensors(op(*map(on_gpu, arguments))), tensors(expected), strict=True):
        limit = 4 * torch.finfo(dtype).eps if want.dtype == dtype else 1e-5
        torch.testing.assert_close(got.cpu(), want, rtol=limit, atol=limit)
    return expected
