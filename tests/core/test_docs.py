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


OPS = {
    name
    for name in sk.__all__
    if inspect.isfunction(getattr(sk, name)) and name not in {"use_backend", "available_backends", "row_ids_of_rank"}
} - {"random_bits", "random_uniform", "random_normal", "random_exponential", "random_gumbel"}


@pytest.mark.parametrize("name", sorted(OPS | {"AliasTable"}))
def test_every_op_has_its_section(name):
    """Shapes, what is never materialised, the cost, and when not to use the op."""
    sections = [
        (heading, body)
        for page in ("vocabulary", "contrastive", "latent")
        for heading, body in re.findall(
            r"^## ([^\n]*)\n(.*?)(?=^## |\Z)", (DOCS / f"{page}.md").read_text(), re.MULTILINE | re.DOTALL
        )
    ]
    bodies = [body for heading, body in sections if f"`{name}`" in heading]
    assert len(bodies) == 1
    for fact in ("Shapes", "Never held", "Cost", "Not when"):
        assert len(re.findall(rf"^- \*\*{fact}\*\*: \S", bodies[0], re.MULTILINE)) == 1, fact


def test_formulas_are_closed():
    for page in PAGES:
        prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        assert prose.count("\\[") == prose.count("\\]"), page
        assert prose.count("\\(") == prose.count("\\)"), page
    assert (DOCS / "javascripts/mathjax.js").stat().st_size > 1_000_000  # formulas need no network


def test_every_guarantee_names_its_test():
    rows = [line for line in (DOCS / "numerics.md").read_text().splitlines() if line.startswith("| ")][1:]
    files = {path.name: path.read_text() for path in (DOCS.parent / "tests").rglob("test_*.py")}
    assert len(rows) >= 10
    for row in rows:
        named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", row.split("|")[-2])
        assert named, row
        for file, test in named:
            assert re.search(rf"^def {test}\(", files[file], re.MULTILINE), (file, test)


def test_the_code_of_the_front_page_runs():
    ids = torch.randint(1000, 30522, (2, 16))
    namespace = {"input_ids": ids, "encoder": torch.nn.Embedding(30522, 8), "bias": torch.zeros(30522)}
    namespace["embedding"] = namespace["encoder"].weight
    pairs = {name: torch.randn(6, 8) for name in ("image", "text", "query", "key")}
    namespace |= pairs | {"log_scale": torch.tensor(2.0), "hard": torch.randn(6, 2, 8), "queue": torch.randn(5, 8)}
    namespace["ids"] = torch.tensor([0, 0, 1, 2, 3, 4])
    for block in blocks(DOCS.parent / "README.md"):
        exec(compile(block, "README.md", "exec"), namespace)
    assert namespace["encoder"].weight.grad is not None
    assert namespace["stats"].rank.shape == (6,)


def test_links_of_the_front_page_lead_somewhere():
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", (DOCS.parent / "README.md").read_text()):
        assert target.startswith("http") or (DOCS.parent / target).exists(), target


def test_pages_are_two_clicks_from_the_front_page():
    """Install, the op that replaces theirs, its cost and its limits."""

    def links(path: Path) -> set[Path]:
        found = re.findall(r"\]\(([^)#\s]+\.md)[^)]*\)", path.read_text())
        return {(path.parent / target).resolve() for target in found if not target.startswith("http")}

    first = links(DOCS.parent / "README.md")
    second = set().union(*(links(page) for page in first if page.exists()))
    wanted = (
        "install",
        "you_have",
        "vocabulary",
        "contrastive",
        "latent",
        "performance/cpu",
        "comparison",
        "faq",
    )
    assert {(DOCS / f"{name}.md").resolve() for name in wanted} <= first | second
