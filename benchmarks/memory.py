"""Peak memory of calls, above the use before them."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

STEPS = 10  # calls: reference cycles and growing caches show only in a loop
SECONDS = 20.0  # slow calls are repeated fewer times
# On a CPU memory is measured by the resident set, and glibc keeps freed memory in holes of its heap. While memory is
# measured, tensors of LEAST_MAPPED bytes or more are mapped, so that freeing returns them to the system, and the holes
# are occupied, so that no tensor fills one. Afterwards the thresholds get the values that glibc adapts to once it has
# freed large tensors.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LEAST_MAPPED = 1 << 18
MOST_MAPPED = 32 << 20


def peak_of_steps(
    call: Callable[[], Any], prepare: Callable[[], Any], device: torch.device, seconds: float = SECONDS
) -> tuple[int | None, Any]:
    """`peak_extra` over STEPS calls, each after `prepare` and without the results of the previous call; fewer if they
    take more than `seconds`."""

    def steps() -> Any:
        start = time.perf_counter()
        for _ in range(STEPS):
            result = None
            prepare()
            result = call()
            if time.perf_counter() - start > seconds:
                break
        return result

    return peak_extra(steps, device)


def peak_extra(call: Callable[[], Any], device: torch.device) -> tuple[int | None, Any]:
    """(bytes, result of the call). CUDA: torch's allocator. Linux: resident set of the process. Elsewhere None."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated(device) - before, result
    with _large_tensors_mapped():
        if not _reset_peak():
            return None, call()
        before = _status("VmRSS")
        result = call()
        return max(0, _status("VmHWM") - before), result


class _HeapInfo(ctypes.Structure):
    """glibc's `struct mallinfo2`; the fourth field counts mapped blocks."""

    _fields_ = [(name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", *"abcdef")]


@contextlib.contextmanager
def _large_tensors_mapped() -> Iterator[None]:
    libc = ctypes.CDLL(None)
    if not (sys.platform.startswith("linux") and hasattr(libc, "mallopt") and hasattr(libc, "mallinfo2")):
        yield
        return
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.restype, libc.free.argtypes = None, [ctypes.c_void_p]
    libc.mallinfo2.restype = _HeapInfo
    libc.mallopt(M_MMAP_THRESHOLD, LEAST_MAPPED)
    occupied = []
    size = MOST_MAPPED
    while size >= LEAST_MAPPED:
        mapped = libc.mallinfo2().hblks
        block = libc.malloc(size)
        if libc.mallinfo2().hblks == mapped:
            occupied.append(block)
        else:
            libc.free(block)
            size //= 2
    try:
        yield
    finally:
        for block in occupied:
            libc.free(block)
        libc.mallopt(M_MMAP_THRESHOLD, MOST_MAPPED)
        libc.mallopt(M_TRIM_THRESHOLD, 2 * MOST_MAPPED)


def _reset_peak() -> bool:
    """Returns free heap pages to the system and resets the peak resident set to the current one."""
    if not sys.platform.startswith("linux"):
        return False
    with contextlib.suppress(AttributeError, OSError):  # glibc alone has it
        ctypes.CDLL(None).malloc_trim(0)
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        return _status("VmHWM") - _status("VmRSS") < 16 << 20  # some sandboxes accept the write and ignore it
    except (OSError, ValueError):
        return False


def _status(key: str) -> int:
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {key}")
