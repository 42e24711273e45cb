"""The machine and the versions behind a measurement."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from benchmarks import peers
from sslkernels.core import native
from sslkernels.version import __version__

ROOT = Path(__file__).resolve().parent.parent
MISSING = "not installed"


def describe(device: torch.device) -> dict[str, Any]:
    """The environment, as written to results.json."""
    return {
        "device": device_name(device),
        "cpu": cpu_model(),
        "threads": torch.get_num_threads(),
        "sslkernels": __version__,
        "extension": native.extension.build_info() if native.extension is not None else "not built",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": version("triton"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "peers": peers.versions(),
    }


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model()


def slug_of(name: str) -> str:
    """The folder of a device under benchmarks/results."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("model name", "Hardware")):
                return f"{line.split(':', 1)[1].strip()}, {os.cpu_count()} cores"
    except OSError:
        pass
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return MISSING


def git(*arguments: str) -> str | None:
    """Output of a git command in the repository, or None without git or a repository."""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def commit() -> str:
    """The commit, from git or the variable COMMIT; "+changes" if tracked files differ from it."""
    head = git("rev-parse", "HEAD")
    if head is None:
        return os.environ.get("COMMIT", "unknown")
    return head + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
