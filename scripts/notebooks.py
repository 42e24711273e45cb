"""Notebooks of the examples, made from the scripts by jupytext, and executed on request.

    python -m scripts.notebooks FOLDER [--execute NAME ...]

A notebook has the docstring of the script as text, its definitions cell by cell, and the call of `main` at the end. Its
plot is shown below that.
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
NAMES = ("code_search", "masked_lm", "joint_embedding", "latent_prediction")
FIRST = """from __future__ import annotations

import sys

sys.path.insert(0, "{folder}")  # the modules that examples share"""
CALL = """import sys
from pathlib import Path

sys.argv = {arguments}
results = main()"""
SHOW = """from IPython.display import Image

Image(str(Path("{name}_output") / "{name}.png"))"""


def percent(name: str, arguments: Sequence[str] = ()) -> str:
    """The script in jupytext's percent format, called with these arguments of the command line."""
    source = (EXAMPLES / f"{name}.py").read_text()
    tree = ast.parse(source)
    lines = source.splitlines()
    docstring = (ast.get_docstring(tree) or "").splitlines()
    cells = ["# %% [markdown]\n" + "\n".join(f"# {line}".rstrip() for line in (f"# {name}", "", *docstring))]
    cells.append("# %%\n" + FIRST.format(folder=EXAMPLES))
    part: list[str] = []
    body = [node for node in tree.body[1:] if not isinstance(node, ast.If)]  # without the docstring and the call
    for node, following in zip(body, [*body[1:], None], strict=True):
        first = min([node.lineno, *(each.lineno for each in getattr(node, "decorator_list", []))])
        text = "\n".join(lines[first - 1 : node.end_lineno])
        if "from __future__" not in text:
            part.append(text)
        definition = isinstance(node, (ast.FunctionDef, ast.ClassDef))
        if definition or following is None or isinstance(following, (ast.FunctionDef, ast.ClassDef)):
            if part:
                cells.append("# %%\n" + "\n".join(part))
            part = []
    cells.append("# %%\n" + CALL.format(arguments=json.dumps([name, "--output", f"{name}_output", *arguments])))
    cells.append("# %%\n" + SHOW.format(name=name))
    return "\n\n".join(cells) + "\n"


def write(folder: Path, names: Sequence[str] = NAMES, arguments: Sequence[str] = ()) -> list[Path]:
    import jupytext

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name in names:
        path = folder / f"{name}.ipynb"
        jupytext.write(jupytext.reads(percent(name, arguments), fmt="py:percent"), path)
        written.append(path)
    return written


def execute(path: Path) -> None:
    """Runs the cells in order, in a kernel of this interpreter, and keeps their outputs."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook, timeout=None, kernel_name="python3", resources={"metadata": {"path": path.parent}}
    ).execute()
    nbformat.write(notebook, path)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.notebooks", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--execute", nargs="*", choices=NAMES, default=[], help="run these; needs nbclient and ipykernel"
    )
    options = parser.parse_args(arguments)
    for path in write(options.folder):
        if path.stem in options.execute:
            execute(path)
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
