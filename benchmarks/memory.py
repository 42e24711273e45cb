"""Peak memory of calls, above the use before them."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

STEPS = 10  # a loop keeps what a single call does not show: reference cycles, caches that grow
SECONDS = 20.0  # of slow calls there are fewer


def peak_of_steps(
    call: Callable[[], Any], prepare: Callable[[], Any], device: torch.device, seconds: float = SECONDS
) -> tuple[int | None, Any]:
    """`peak_extra` over STEPS calls, each after `prepare` and without the results of the one before; fewer if they take
    more than `seconds`."""

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
    if not _reset_peak():
        return None, call()
    before = _status("VmRSS")
    result = call()
    return max(0, _status("VmHWM") - before), result


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
