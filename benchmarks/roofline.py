"""The roofs of the machine, measured: copy bandwidth and the rate of torch.mm."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch


@dataclass
class Roofs:
    """bandwidth: bytes read plus bytes written a second by a copy; peaks: flops a second of torch.mm by dtype name."""

    bandwidth: float
    peaks: dict[str, float] = field(default_factory=dict)

    def light(self, bytes_: int, flops: int, dtype: str) -> float:
        """Seconds that no implementation on this machine can beat: max(bytes / bandwidth, flops / peak)."""
        return max(bytes_ / self.bandwidth, flops / self.peaks[dtype] if flops else 0.0)

    def lines(self) -> list[str]:
        peaks = [f"matmul {dtype} {peak / 1e12:.3g} TFLOP/s" for dtype, peak in self.peaks.items()]
        return [f"copy {self.bandwidth / 1e9:.1f} GB/s (read + write)", *peaks]


def measure_roofs(device: torch.device, dtypes: list[torch.dtype]) -> Roofs:
    size = (2 << 30 if device.type == "cuda" else 256 << 20) // 4
    source = torch.rand(size, device=device)
    copy = torch.empty_like(source)
    roofs = Roofs(2 * source.nbytes / _best(functools.partial(copy.copy_, source), device))
    del source, copy
    sides = (4096, 8192, 16384) if device.type == "cuda" else (1024, 2048)
    for dtype in dtypes:
        rates = []
        for side in sides:
            a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
            out = torch.empty_like(a)
            rates.append(2 * side**3 / _best(functools.partial(torch.mm, a, b, out=out), device))
        roofs.peaks[str(dtype).removeprefix("torch.")] = max(rates)
    return roofs


def _best(call: Callable[[], object], device: torch.device, least: int = 7, seconds: float = 0.5) -> float:
    """Seconds of the fastest of at least `least` calls and as many as fit: a roof is the best the machine can do."""
    call()
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < least or time.perf_counter() - begin < seconds:
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        else:
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
    return min(times)
