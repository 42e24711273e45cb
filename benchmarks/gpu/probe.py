"""Reports the machine, and tries calls that its torch may refuse: `python -m benchmarks.gpu.probe facts`, `calls`.

The last lines of the output, `FOUND {...}`, are noted in the report of the command.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import environment


def facts(device: torch.device) -> dict[str, Any]:
    found: dict[str, Any] = {
        "device": environment.device_name(device),
        "architecture": "sm_{}{}".format(*torch.cuda.get_device_capability()) if device.type == "cuda" else "none",
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    for name in ("triton", "pytest", "pytest-xdist", "pybind11", "cmake", "ninja", "numpy", "setuptools"):
        found[name] = environment.version(name)
    found["nvcc"] = shutil.which("nvcc")
    found["compute-sanitizer"] = shutil.which("compute-sanitizer")
    if shutil.which("nvidia-smi") is not None:
        query = ["nvidia-smi", "--query-gpu=name,driver_version,clocks.max.sm,memory.total", "--format=csv,noheader"]
        found["nvidia-smi"] = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    return found


def doubtful() -> dict[str, Callable[[torch.device], object]]:
    """Name -> a call on which an op depends, and which a release of torch may refuse."""
    from sslkernels.core import products

    def operands(device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        return torch.randn(64, 48, device=device).to(dtype), torch.randn(48, 80, device=device).to(dtype)

    def product(device: torch.device) -> None:
        for dtype in (torch.bfloat16, torch.float16):
            a, b = operands(device, dtype)
            total = torch.ones(64, 80, device=device)
            products.add_product(total, a, b, first=False)
            torch.testing.assert_close(total, 1 + a.float() @ b.float(), rtol=1e-4, atol=1e-3)
            products.add_product(total, a, b, first=True)
            torch.testing.assert_close(total, a.float() @ b.float(), rtol=1e-4, atol=1e-3)

    def addmm(device: torch.device) -> None:
        a, b = operands(device, torch.bfloat16)
        total = torch.ones(64, 80, device=device)
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)

    def mm(device: torch.device) -> None:
        torch.mm(*operands(device, torch.bfloat16), out_dtype=torch.float32)

    def triton_add(device: torch.device) -> None:
        import sslkernels as sk

        with sk.use_backend("triton"):
            sk.random_normal((33, 77), 1, device=device)

    return {
        "products.add_product": product,
        "torch.addmm with out_dtype": addmm,
        "torch.mm with out_dtype": mm,
        "a Triton kernel": triton_add,
    }


def answers(device: torch.device) -> dict[str, str]:
    found = {}
    for name, call in doubtful().items():
        begin = time.perf_counter()
        try:
            call(device)
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        else:
            found[name] = "works"
        print(f"{name}: {found[name]} ({time.perf_counter() - begin:.1f} s)", flush=True)
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.probe", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("what", choices=["facts", "calls"])
    parser.add_argument("--rehearse", action="store_true", help="on the CPU")
    options = parser.parse_args(arguments)
    if not options.rehearse and not torch.cuda.is_available():
        print("torch sees no CUDA device")
        return 1
    device = torch.device("cpu" if options.rehearse else "cuda")
    if options.what == "facts":
        print("FOUND " + json.dumps({"machine": facts(device)}))
        return 0
    found = answers(device)
    print("FOUND " + json.dumps({"calls": found}))
    return 0 if options.rehearse or found["products.add_product"] == "works" else 1


if __name__ == "__main__":
    sys.exit(main())
