"""The pages of docs/: their code runs, their links lead somewhere, and the reference has every public name."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch

import sslkernels as sk

DOCS = Path(__file__).parents[2] / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
ELSEWHERE = {"distributed.md", "integrations.md"}  # whose code has tests of its own, with ranks and libraries


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p) and p.name not in ELSEWHERE], ids=lambda p: p.stem)
def test_the_code_of_a_page_runs(page):
    torch.manual_seed(0)
    namespace: dict[str, object] = {}
    for block in blocks(page):
        exec(compile(block, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_every_page_is_in_the_navigation():
    navigation = (DOCS.parent / "mkdocs.yml").read_text()
    assert [str(p.relative_to(DOCS)) for p in PAGES if str(p.relative_to(DOCS)) not in navigation] == []


def test_the_reference_has_every_public_name():
    public = {f"sslkernels.{name}" for name in sk.__all__ if name[0] != "_" and not inspect.ismodule(getattr(sk, name))}
    public |= {f"sslkernels.nn.{name}" for name in sk.nn.__all__}
    listed = re.findall(r"^::: (\S+)", (DOCS / "api.md").read_text(), re.MULTILINE)
    assert len(listed) == len(set(listed))
    assert public - set(listed) == set()
    for name in listed:
        found = sk
        for part in name.split(".")[1:]:
            found = getattr(found, part)
        assert found.__doc__, name
