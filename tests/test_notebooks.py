"""The notebooks of the examples are the scripts, and run."""

from __future__ import annotations

import ast
import json

import pytest

from scripts import notebooks


@pytest.mark.parametrize("name", notebooks.NAMES)
def test_a_notebook_has_all_of_its_script(name):
    script = ast.parse((notebooks.EXAMPLES / f"{name}.py").read_text())
    cells = ast.parse(notebooks.percent(name))

    def named(tree):
        return [each.name for each in tree.body if isinstance(each, (ast.FunctionDef, ast.ClassDef))]

    assert named(cells) == named(script)
    assert notebooks.percent(name).count("# %%") >= len(named(script)) + 4
    last = [ast.unparse(each) for each in cells.body if isinstance(each, ast.Assign)][-1]
    assert last == "results = main()"


def test_every_example_has_a_notebook():
    scripts = {path.stem for path in notebooks.EXAMPLES.glob("*.py")}
    assert {name for name in scripts if "def main" in (notebooks.EXAMPLES / f"{name}.py").read_text()} == set(
        notebooks.NAMES
    )


def run(name, folder, monkeypatch, *arguments):
    for module in ("jupytext", "nbclient", "ipykernel", "sklearn", "tokenizers"):
        pytest.importorskip(module)
    monkeypatch.setenv("PYTHONPATH", str(notebooks.ROOT))
    [path] = notebooks.write(folder, (name,), arguments)
    notebooks.execute(path)
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert "image/png" in cells[-1]["outputs"][0]["data"]


FEW_STEPS = {
    "code_search": ("--epochs", "1", "--standard-library"),
    "masked_lm": ("--steps", "2", "--standard-library"),
    "joint_embedding": ("--steps", "2", "--losses", "simclr"),
    "latent_prediction": ("--steps", "2"),
}


@pytest.mark.full
@pytest.mark.parametrize("name", notebooks.NAMES)
def test_a_notebook_runs_to_its_plot(name, tmp_path, monkeypatch):
    run(name, tmp_path, monkeypatch, *FEW_STEPS[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", notebooks.NAMES)
def test_a_whole_notebook_runs(name, tmp_path, monkeypatch):
    run(name, tmp_path, monkeypatch)
