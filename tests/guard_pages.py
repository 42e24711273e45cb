"""Triton's interpreter with the tensors of each kernel beside unmapped pages: an access outside one ends the process.

    python tests/guard_pages.py after|before [FILE]

after: a tensor ends where the page begins; before: it begins where the page ends. Runs the public calls, and prints the
name of each kernel before it starts, so that the last line names the one that ended the process. FILE: a Python file
that is run instead of the public calls.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import runpy
import sys
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

os.environ["TRITON_INTERPRET"] = "1"
import interpreter
import public_calls
import torch
from torch import Tensor
from triton.runtime.interpreter import GridExecutor

import sslkernels as sk

LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.mmap.restype = ctypes.c_void_p
LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long]
LIBC.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
PAGE, NO_ACCESS = mmap.PAGESIZE, 0
VECTOR = 32  # bytes: rows of a matrix with padding are read in whole vectors


class Region(NamedTuple):
    """The bytes of a storage, from `begin` on, that overlapping tensors use, and their copy between unmapped pages."""

    begin: int
    original: Tensor
    copy: Tensor
    mapping: tuple[int, int]

    def moved(self, tensor: Tensor) -> Tensor:
        first, end = extent(tensor)
        part = self.copy[first - self.begin : end - self.begin].view(tensor.dtype)
        return part.as_strided(tensor.size(), tensor.stride())

    def close(self) -> None:
        self.original.copy_(self.copy)
        LIBC.munmap(*self.mapping)


def extent(tensor: Tensor) -> tuple[int, int]:
    """The bytes of its storage from the first element to behind the last one, or its whole vector if that is there."""
    strides = zip(tensor.size(), tensor.stride(), strict=True)
    first, count = tensor.storage_offset(), sum((size - 1) * stride for size, stride in strides) + 1
    end = -(-(first + count) * tensor.itemsize // VECTOR) * VECTOR
    return first * tensor.itemsize, min(end, tensor.untyped_storage().nbytes())


def region(storage: torch.UntypedStorage, begin: int, end: int, side: str) -> Region:
    size = end - begin
    pages = -(-size // PAGE) + 2
    base = LIBC.mmap(None, pages * PAGE, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    for unmapped in (base, base + (pages - 1) * PAGE):
        assert LIBC.mprotect(unmapped, PAGE, NO_ACCESS) == 0
    start = base + PAGE if side == "before" else base + (pages - 1) * PAGE - size
    copy = torch.frombuffer((ctypes.c_char * size).from_address(start), dtype=torch.uint8)
    original = torch.empty(0, dtype=torch.uint8).set_(storage, begin, (size,), (1,))
    return Region(begin, original, copy.copy_(original), (base, pages * PAGE))


def regions(tensors: Iterable[Tensor], side: str) -> dict[int, list[Region]]:
    """Storage -> the regions of tensors that overlap, in order."""
    storages: dict[int, torch.UntypedStorage] = {}
    extents: dict[int, list[tuple[int, int]]] = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage
        extents.setdefault(storage.data_ptr(), []).append(extent(tensor))
    return {
        key: [region(storages[key], *each, side) for each in joined(sorted(found))] for key, found in extents.items()
    }


def joined(extents: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    begin, end = extents[0]
    for first, last in extents[1:]:
        if first >= end:
            yield begin, end
            begin = first
        end = max(end, last)
    yield begin, end


def guard(side: str) -> None:
    launch = GridExecutor.__call__

    def guarded(self: GridExecutor, *args: Any, **kwargs: Any) -> None:
        print(self.fn.__name__, flush=True)
        given = [*args, *kwargs.values()]
        moved = regions([each for each in given if isinstance(each, Tensor) and each.numel()], side)

        def beside(value: Any) -> Any:
            if not isinstance(value, Tensor) or not value.numel():  # the pointer of an empty tensor is null
                return value
            first, _ = extent(value)
            found = [each for each in moved[value.untyped_storage().data_ptr()] if each.begin <= first]
            return found[-1].moved(value)

        launch(self, *map(beside, args), **{name: beside(value) for name, value in kwargs.items()})
        for each in moved.values():
            for one in each:
                one.close()

    GridExecutor.__call__ = guarded


def backward(results: Any) -> None:
    outputs = public_calls.differentiable(results)
    torch.autograd.backward(outputs, [torch.full_like(output, 0.5) for output in outputs])


def run_public_calls() -> None:
    """Every public op, and what reaches the kernels of plans that these do not take. No size is a power of 2, which a
    block of a kernel could fill."""
    torch.manual_seed(0)
    even, public_calls.DIM = public_calls.DIM, 7
    for call in public_calls.CALLS.values():
        shapes = [tuple(public_calls.DIM if size == even else size for size in shape) for shape in call.shapes]
        backward(call.run(*(torch.randn(shape, requires_grad=True) for shape in shapes)))
    ids = torch.randint(5, 50, (3, 13))
    for mean_span in (None, 3.0):
        sk.mask_tokens(ids, mask_id=3, vocab_size=50, mean_span=mean_span, seed=1)
    sk.corrupt_spans(ids, sentinel_ids=[1, 2, 3, 4], seed=1)
    sk.linear_sample(torch.randn(5, 7), torch.randn(11, 7), seed=1)
    head = [torch.randn(shape, requires_grad=True) for shape in ((5, 7), (11, 7), (11,))]
    for reduction in ("mean", "none"):
        probabilities = torch.rand(5, 11).softmax(1)
        backward(sk.linear_cross_entropy(*head[:2], probabilities, linear_bias=head[2], reduction=reduction))
    sk.AliasTable([1.0, 2.0, 4.0]).draw((3, 5), seed=1)
    sk.random_normal((3, 5), seed=1)
    for dtype, query_grad, key_grad in itertools.product((torch.float32, torch.bfloat16), (True, False), (True, False)):
        if query_grad or key_grad:
            query, key = torch.randn(9, 7, dtype=dtype), torch.randn(9, 7, dtype=dtype)
            leaves = query.requires_grad_(query_grad), key.requires_grad_(key_grad)
            backward(sk.contrastive_energy(*leaves))
            backward(sk.contrastive_energy(*leaves, energy="hinge", return_stats=True))
    backward(sk.prediction_energy(torch.randn(1, 3, 70_001, requires_grad=True), torch.randn(1, 70_001), mode="soft"))


if __name__ == "__main__":
    interpreter.repair()
    guard(sys.argv[1])
    if len(sys.argv) > 2:
        runpy.run_path(sys.argv[2], run_name="__main__")
    else:
        with sk.use_backend("triton"):
            run_public_calls()
