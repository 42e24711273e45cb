"""The layers of csrc: core includes only core; a family includes itself, core and random; kernels include no torch."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"
FILES = sorted(path.relative_to(CSRC) for path in CSRC.rglob("*") if path.suffix in {".h", ".cpp", ".cu"})
FAMILIES = ("vocabulary", "contrastive", "latent")
ALLOWED = {"core": {"core"}, "random": {"core", "random"}} | {name: {name, "core", "random"} for name in FAMILIES}
HOST_TWIN = "device_host.h"  # in tests/cuda_host


def includes(path: Path) -> tuple[list[str], list[str]]:
    """The names in quotes, and those in angle brackets."""
    text = (CSRC / path).read_text()
    return re.findall(r'^\s*#include "(.*)"', text, re.M), re.findall(r"^\s*#include <(.*)>", text, re.M)


def test_every_folder_has_rules():
    assert {path.parts[0] for path in FILES if len(path.parts) > 1} == set(ALLOWED)
    assert [str(path) for path in FILES if len(path.parts) == 1] == ["module.cpp"]


@pytest.mark.parametrize("path", FILES, ids=str)
def test_includes_go_one_way(path):
    own, system = includes(path)
    for name in own:
        if name == HOST_TWIN:
            assert path == Path("core/cuda/device.h")
            continue
        assert (CSRC / name).exists(), f"{name} must be a path from csrc"
        assert path.parts[0] == "module.cpp" or name.split("/")[0] in ALLOWED[path.parts[0]]
        if path.name.endswith(("_cpu.cpp", "_cpu.h")) or path.parts[1:2] == ("cpu",):
            assert "cuda" not in name
    if not path.stem.endswith("bind"):
        assert not any(name.endswith("bind.h") for name in own)
        assert not any(name.startswith("torch/") for name in system)


def test_cuda_kernels_and_cpu_kernels_do_not_include_each_other():
    for path in FILES:
        if path.suffix == ".cu":
            own, _ = includes(path)
            assert not any(name.endswith("_cpu.h") or "/cpu/" in name for name in own), path
