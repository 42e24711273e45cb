"""The rules of the house that can be counted (CONTRIBUTING.md): small signatures, plain comments, small folders."""

from __future__ import annotations

import ast
import functools
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import sslkernels as sk

PACKAGE = Path(sk.__file__).parent
ROOT = PACKAGE.parent
SOURCES = [
    path
    for folder in ("sslkernels", "csrc", "tests", "benchmarks", "examples", "scripts")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in {".py", ".h", ".cpp", ".cu"} and path != Path(__file__)
]


def test_a_folder_can_be_read():
    for folder in {path.parent for path in SOURCES if PACKAGE in path.parents}:
        files = [path for path in folder.glob("*.py") if path.stem != "__init__"]
        assert len(files) <= 16, f"{folder} has {len(files)} files"


def host_functions(path: Path) -> Iterator[ast.FunctionDef]:
    """Functions that are neither public nor Triton kernels nor methods that keep torch's signature."""
    tree = ast.parse(path.read_text())
    public_classes = {
        method
        for node in tree.body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_") and inspect.isclass(public(node.name))
        for method in node.body
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef) or node in public_classes:
            continue
        if any("jit" in ast.unparse(decorator) for decorator in node.decorator_list):
            continue
        if node in tree.body and callable(public(node.name)):
            continue
        yield node


def public(name: str) -> object:
    for module in (sk, sk.nn, sk.distributions):
        if hasattr(module, name):
            return getattr(module, name)
    return None


def test_host_functions_take_records():
    wide = []
    for path in SOURCES:
        if path.suffix == ".py" and PACKAGE in path.parents:
            for function in host_functions(path):
                arguments = function.args
                count = len(arguments.posonlyargs + arguments.args + arguments.kwonlyargs)
                if count > 10:
                    wide.append(f"{path.relative_to(ROOT)}:{function.lineno} {function.name}: {count} parameters")
    assert wide == []


@functools.cache
def prose(path: Path) -> list[tuple[int, str]]:
    """(line number, text) of every comment line and docstring line."""
    return list(_prose(path))


def _prose(path: Path) -> Iterator[tuple[int, str]]:
    text = path.read_text()
    if path.suffix != ".py":
        for number, line in enumerate(text.splitlines(), 1):
            if (found := re.search(r"//\s?(.*)", line)) and "http" not in line:
                yield number, found[1]
        return
    for number, line in enumerate(text.splitlines(), 1):
        if found := re.match(r"[^\"']*#\s?(.*)", line):
            yield number, found[1]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and (
            doc := ast.get_docstring(node, clean=False)
        ):
            first = node.body[0].lineno
            for offset, line in enumerate(doc.splitlines()):
                yield first + offset, line.strip()


def starts(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of `prose` that begin a comment or docstring."""
    previous = -1
    for number, line in prose(path):
        if number != previous + 1:
            yield number, line
        previous = number


def test_a_comment_names_the_thing_first():
    riddles = [
        f"{path.relative_to(ROOT)}:{number} {line}"
        for path in SOURCES
        for number, line in starts(path)
        if re.match(r"(Of|That of|Those)\b", line)
    ]
    assert riddles == []


def test_comments_use_the_words_of_the_field():
    lines = [(path, number, line) for path in SOURCES for number, line in prose(path)]
    for pattern, most in ((r"\b(lie|lies|lay)\b", 3), (r"\b(that|those) of\b", 20)):
        found = [
            f"{path.relative_to(ROOT)}:{number} {line}" for path, number, line in lines if re.search(pattern, line)
        ]
        assert len(found) <= most, "\n".join(found)


def test_no_file_holds_a_merge_conflict():
    for path in [*SOURCES, *ROOT.glob("*.*"), *(ROOT / "docs").rglob("*.md")]:
        if path.is_file():
            assert not re.search(r"^(<<<<<<<|>>>>>>>) ", path.read_text(), re.MULTILINE), path
