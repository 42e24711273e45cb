"""What scripts write of README.md and docs/ is current, and the front page says nothing that was not measured."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from benchmarks import __main__ as command
from benchmarks import environment
from scripts import diagrams, llms, measured, pages

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PYPROJECT = (ROOT / "pyproject.toml").read_text()
STALE = "run `make pages`"


@pytest.mark.parametrize("name", [name for name in pages.PAGES if not name.endswith(".svg")])
def test_written_pages_are_current(name):
    assert (ROOT / name).read_text() == pages.PAGES[name](), STALE


def test_a_section_is_replaced_once():
    text = "a\n<!-- x -->\nold\n<!-- end of x -->\nb <!-- y --><!-- end of y -->"
    assert pages.with_section(text, "x", r"new \1") == text.replace("\nold\n", "\n\nnew \\1\n\n")
    with pytest.raises(ValueError, match="must be there once"):
        pages.with_section(text, "z", "new")


def drawn(text: str) -> tuple[dict[str, list[str]], list[str]]:
    """Boxes with their lines, and arrows, of an SVG."""
    space = "{http://www.w3.org/2000/svg}"
    tree = ElementTree.fromstring(text)
    boxes = {
        group.get("data-node"): [line.text for line in group.iter(f"{space}text")]
        for group in tree.iter(f"{space}g")
        if group.get("data-node")
    }
    return boxes, sorted(path.get("data-edge") for path in tree.iter(f"{space}path") if path.get("data-edge"))


@pytest.mark.parametrize("name", ["house", "step"])
def test_diagrams_match_the_code(name):
    graph = getattr(diagrams, f"{name}_graph")()
    boxes, arrows = drawn((ROOT / f"docs/images/{name}.svg").read_text())
    assert boxes == {node.name: list(node.lines) for node in graph.nodes}, STALE
    assert arrows == sorted(f"{edge.source} -> {edge.target}" for edge in graph.edges), STALE


def test_the_diagram_has_the_folders_and_their_imports():
    graph = diagrams.house_graph()
    folders = {path.name for path in (ROOT / "sslkernels").iterdir() if (path / "__init__.py").exists()}
    assert folders <= {node.name for node in graph.nodes}
    assert diagrams.Edge("vocabulary", "random") in graph.edges
    assert diagrams.Edge("random", "core") in graph.edges
    assert not any(edge.source == "core" for edge in graph.edges)


def test_no_tensor_of_the_step_is_tokens_by_vocabulary():
    b, t, _, v = diagrams.SHAPES.values()
    lines = [line for node in diagrams.step_graph().nodes for line in node.lines]
    assert any(f"{v:,} x" in line for line in lines)
    for line in lines:
        sizes = [int(size.replace(",", "")) for size in re.findall(r"[\d,]*\d", line)]
        assert not (v in sizes and (b * t in sizes or t in sizes)), line


def test_transitive_edges_are_left_out():
    a, b, c = (diagrams.Edge(*ends) for ends in ("xy", "yz", "xz"))
    assert diagrams.reduced([a, b, c]) == [a, b]
    assert diagrams.reduced([a, c]) == [a, c]


def test_the_index_has_every_page_and_every_function():
    text = llms.text()
    for page in (ROOT / "docs").rglob("*.md"):
        assert f"({page.relative_to(ROOT / 'docs')})" in text
    assert re.search(r"- \[Beside others\]\(comparison.md\): \w", text)
    assert "`sk.linear_cross_entropy(...)`: " in text
    assert "`sk.nn.LinearHead`: " in text


def test_rows_of_the_front_page_are_in_the_default_run():
    cases = [case.name for _, case in command.select(command.parse(["--device", "cpu"]))]
    for op, wanted, unwanted in measured.FRONT:
        found = [name for name in cases if name.startswith(f"{op} ") and wanted in name]
        assert [name for name in found if not unwanted or unwanted not in name], (op, wanted)


def test_rows_of_the_front_page_are_rows_of_the_results():
    results = json.loads((measured.RESULTS / measured.FOLDER / "results.json").read_text())
    names = [case["name"] for case in results["cases"]]
    assert len(measured.front()) >= 9
    for line, case in measured.front():
        assert case["name"] in names
        times = {row["median"] for row in results["rows"] if row["case"] == case["name"]}
        assert {line.eager, line.ours} <= times
        assert measured.row(line) in README


def test_numbers_of_the_front_page():
    """Beside the generated table and the code, README has the versions of pyproject.toml and the architectures."""
    prose = re.sub(r"<!-- measured -->.*?<!-- end of measured -->|```.*?```|`[^`\n]*`", "", README, flags=re.DOTALL)
    prose = re.sub(r"\]\([^)]*\)", "]", prose)
    python = re.search(r'requires-python = ">=([\d.]+)"', PYPROJECT).group(1)
    torch = re.search(r'"torch>=([\d.]+)"', PYPROJECT).group(1)
    assert set(re.findall(r"\d[\d.,]*\d|\d", prose)) <= {python, torch, "80", "90", "100"}
    assert len(README.splitlines()) < 120
    assert "images/clip_memory.png" in "\n".join(README.splitlines()[:12])


def test_the_plot_is_of_the_recorded_numbers():
    rows = json.loads((ROOT / "benchmarks/results/clip_memory.json").read_text())["rows"]
    ours = {row["N"]: row["bytes"] for row in rows if row["provider"] == "sk.clip_loss"}
    eager = {row["N"]: row["bytes"] for row in rows if row["provider"] == "eager torch"}
    assert max(ours) == 65536
    assert all(ours[n] < size for n, size in eager.items())


def test_claims_about_gpus_match_the_record():
    validated = json.loads((ROOT / "benchmarks/results/gpu_validated.json").read_text())
    said = "None has run on a GPU yet" in README
    assert said == (not validated)
    if not validated:
        assert "| **measured on a GPU** |" in (ROOT / "docs/comparison.md").read_text()
        assert not any(environment.slug_of("nvidia") in path.name for path in measured.RESULTS.iterdir())
