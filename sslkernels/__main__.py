"""`python -m sslkernels`: versions, what was compiled, and which backend each op would use here."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

import sslkernels
from sslkernels.core import backends, native


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> list[torch.device]:
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices.append(torch.device("cuda", torch.cuda.current_device()))
    return devices


def report() -> str:
    lines = [
        f"sslkernels {sslkernels.__version__}",
        f"python     {platform.python_version()} on {platform.system()} {platform.machine()}",
        f"torch      {torch.__version__}, {torch.get_num_threads()} CPU threads",
        f"triton     {_version('triton')}",
    ]
    if native.extension is None:
        lines.append(f"extension  not loaded: {native.load_error}")
        lines.append(f"           build it with: {native.BUILD_COMMAND}")
    else:
        info = native.extension.build_info()
        architectures = ", ".join(f"sm_{arch}" for arch in info["cuda_architectures"])
        cuda = f"{info['cuda']}, {architectures}" if info["cuda"] else "none (nvcc was not found, or SSLKERNELS_CUDA=0)"
        lines.append(
            f"extension  {info['compiler']}, against torch {info['torch']}; CPU kernels in use: {info['cpu_isa']}"
        )
        lines.append(f"           CUDA kernels: {cuda}")
        newer = native.newer_source()
        if newer is not None:
            lines.append(f"           OLDER than {newer}: if it no longer fits, {native.BUILD_COMMAND}")
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        lines.append(f"gpu        {torch.cuda.get_device_name()}, sm_{major}{minor}, CUDA {torch.version.cuda}")
    else:
        reason = "this torch was built without CUDA" if torch.version.cuda is None else "no device was found"
        lines.append(f"gpu        none: {reason}")
    lines.append(f"backend    {backends.current_choice()} (SSLKERNELS_BACKEND or use_backend)")

    for device in _devices():
        lines.append(f"\nOn {device}:")
        for op in backends.public_ops():
            lines.append(f"  {op:22} uses {backends.chosen(op, device)}")
        for backend in backends.BACKENDS:
            reasons: dict[str, list[str]] = {}
            for op in backends.public_ops():
                reason = backends.why_not(op, backend, device)
                if reason is not None:
                    reasons.setdefault(reason, []).append(op)
            for reason, ops in reasons.items():
                which = "" if len(ops) == len(backends.public_ops()) else f" ({', '.join(ops)})"
                lines.append(f"  {backend} cannot run{which}: {reason}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
