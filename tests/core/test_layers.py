"""Import rules: families import `core` and `random`, and Triton kernels import only Triton kernels."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import sslkernels as sk

PACKAGE = Path(sk.__file__).parent
FAMILIES = ("vocabulary", "contrastive", "latent")
ROOMS = ("core", "random", *FAMILIES)
# The parts of the package that a file of a folder, or a module at the top of the package, may import.
ALLOWED = {
    "core": {"core"},
    "random": {"core", "random"},
    **{family: {"core", "random", family} for family in FAMILIES},
    "nn": set(FAMILIES),
    "distributions": set(FAMILIES),
    "integrations": {*ROOMS, "integrations"},
    "version": set(),
    "__init__": {*ROOMS, "nn", "distributions", "integrations", "version"},
    "__main__": {"core"},
}


def package_imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(module, whether the import is at module level) for every import of the file."""
    tree = ast.parse(path.read_text())
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            is_package = (PACKAGE.parent / node.module.replace(".", "/")).is_dir()
            names = [f"{node.module}.{alias.name}" for alias in node.names] if is_package else [node.module]
            yield from ((name, id(node) in top) for name in names)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    room = path.relative_to(PACKAGE).with_suffix("").parts[0]
    kernels = path.parent.name == "triton"
    for module, at_top in package_imports(path):
        root, _, name = module.partition(".")
        if root != "sslkernels":
            known = root in {"torch", "triton", "numpy", *sys.stdlib_module_names}
            assert known if kernels else root != "triton", f"{path} imports {module}"
            continue
        parts = name.split(".") if name else []
        assert not parts or parts[0] in ALLOWED[room], f"{path} imports {module}"
        if kernels:
            assert "triton" in parts[:2], f"{path}: Triton kernels import Triton kernels alone, not {module}"
        elif "triton" in parts[:2]:
            assert not at_top, f"{path} imports {module} at module level, which would import triton"
