"""Draws mutants of the sources by chance and says which of them the tests of their family do not find.

    pip install --no-deps universalmutator
    python tests/planted/mutate.py --count 100 --seed 1 [--layer plans] [--folder /tmp/mutants]

A mutant changes one line by a rule of universalmutator (Groce et al., ICSE 2018). One that does not compile, or that
compiles to the same code, is drawn again. The tests are those of `make test` for the family and the core. What they do
not find is printed as a diff: it is equivalent to the original, or a test is missing.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import difflib
import hashlib
import io
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

from run import LEFT_OUT, ROOT, build, finds
from universalmutator.mutator import mutants_regexp

FAMILIES = ("contrastive", "vocabulary", "latent", "random")
LAYERS = {
    "cpu": [f"csrc/{family}/*_cpu.cpp" for family in FAMILIES] + ["csrc/core/cpu/*.h"],
    "common": [f"csrc/{family}/*.h" for family in FAMILIES],
    "plans": [f"sslkernels/{family}/*.py" for family in FAMILIES] + ["sslkernels/vocabulary/prototypes/*.py"],
    "triton": [f"sslkernels/{family}/triton/*.py" for family in FAMILIES],
}
NOT_HOST = ("_cuda.h", "_bind.h")  # no part of the extension for a CPU, or only its argument checks


class Mutant:
    def __init__(self, file: Path, line: int, text: str) -> None:
        self.file, self.line, self.text = file, line, text

    def __str__(self) -> str:
        before = self.file.read_text().splitlines()[self.line - 1]
        return f"{self.file.relative_to(ROOT)}:{self.line}\n    - {before.strip()}\n    + {self.text.strip()}"

    def source(self) -> str:
        lines = self.file.read_text().splitlines(keepends=True)
        lines[self.line - 1] = self.text.rstrip("\n") + "\n"
        return "".join(lines)


def files_of(layer: str) -> list[Path]:
    found = sorted(path for pattern in LAYERS[layer] for path in ROOT.glob(pattern))
    return [path for path in found if not path.name.endswith(NOT_HOST) and path.name != "__init__.py"]


def mutants_of(file: Path) -> list[Mutant]:
    rules = ["universal.rules", *(["python.rules"] if file.suffix == ".py" else ["c_like.rules", "cpp.rules"])]
    with contextlib.redirect_stdout(io.StringIO()):
        found = mutants_regexp(file.read_text().splitlines(keepends=True), ruleFiles=rules, ignorePatterns=[])
    return [Mutant(file, line, text) for line, text, *_ in found]


def code_of(source: str) -> str | None:
    """Python code without texts and annotations; None for what is no Python."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return None
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            node.value = ""
        elif isinstance(node, ast.FunctionDef):
            node.returns = None
        elif isinstance(node, ast.arg):
            node.annotation = None
    return ast.dump(tree)


def digest(copy: Path) -> str:
    (extension,) = (copy / "sslkernels").glob("_C*.so")
    return hashlib.sha256(extension.read_bytes()).hexdigest()


def imports(copy: Path, file: Path) -> bool:
    """Whether the package and the module can be imported."""
    module = ".".join(file.relative_to(ROOT).with_suffix("").parts)
    code = f"import sslkernels, importlib; importlib.import_module({module!r})"
    environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    return (
        subprocess.run(
            [sys.executable, "-c", code], cwd=copy, env=environment, capture_output=True, check=False
        ).returncode
        == 0
    )


def tests_of(file: Path) -> list[str]:
    """The test files of the family, then those of the core; those first whose names are most like the file's."""
    found: list[str] = []
    for folder in dict.fromkeys((file.relative_to(ROOT).parts[1], "core")):
        names = [str(path.relative_to(ROOT)) for path in (ROOT / "tests" / folder).glob("test_*.py")]
        wanted = f"test_{file.stem}"
        found += sorted(names, key=lambda name: -difflib.SequenceMatcher(None, Path(name).stem, wanted).ratio())
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--layer", choices=LAYERS)
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "mutants")
    options = parser.parse_args()
    layers = [options.layer] if options.layer else list(LAYERS)
    pool = [mutant for layer in layers for file in files_of(layer) for mutant in mutants_of(file)]
    random.Random(options.seed).shuffle(pool)
    copy = options.folder / "copy"
    if copy.exists():
        shutil.rmtree(copy)
    shutil.copytree(ROOT, copy, ignore=LEFT_OUT)
    original = None
    if any(layer in ("cpu", "common") for layer in layers):
        build(copy)
        original = digest(copy)
    drawn, survivors = 0, []
    for mutant in pool:
        if drawn == options.count:
            break
        path, text, begin = copy / mutant.file.relative_to(ROOT), mutant.file.read_text(), time.time()
        compiled = mutant.file.suffix != ".py"
        if not compiled and code_of(mutant.source()) in (None, code_of(text)):
            continue
        path.write_text(mutant.source())
        try:
            if not (build(copy) and digest(copy) != original if compiled else imports(copy, mutant.file)):
                continue
            drawn += 1
            found = finds(copy, tests_of(mutant.file), options.folder / "log")
        finally:
            path.write_text(text)
        survivors += [] if found else [mutant]
        print(f"{drawn:4} {time.time() - begin:5.0f} s  {'found' if found else 'NOT FOUND'}  {mutant}", flush=True)
    print(f"\n{drawn - len(survivors)} of {drawn} found; not found:\n")
    print("\n".join(map(str, survivors)))
    return len(survivors)


if __name__ == "__main__":
    sys.exit(main())
