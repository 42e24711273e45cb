"""Real data without a download: the docstrings and the code of the Python on this disk, and a vocabulary for them."""

from __future__ import annotations

import ast
import multiprocessing
import os
import sysconfig
import textwrap
import warnings
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

from rich.progress import track
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

FROM_EACH_PACKAGE = 1000  # pairs: no package is most of the data
LARGEST_FILE = 400_000  # bytes; larger ones are tables, not code
SKIPPED = {"test", "tests", "testing", "idle_test", "_vendor", "_vendored_packages"}


class Pair(NamedTuple):
    """A function or class: where it is, its whole docstring, and its code without the docstring."""

    name: str
    docstring: str
    code: str

    @property
    def summary(self) -> str:
        """The first paragraph of the docstring."""
        return " ".join(self.docstring.split("\n\n")[0].split())


def collect_pairs(installed_packages: bool = True) -> list[Pair]:
    """The pairs of the standard library and of all installed packages, in an order that only the disk decides."""
    standard, installed = (Path(sysconfig.get_paths()[name]) for name in ("stdlib", "purelib"))
    packages = [path for path in sorted(standard.iterdir()) if path.name != "site-packages"]
    if installed_packages:
        packages += [path for folder in _site_folders(installed) for path in sorted(folder.iterdir())]
    context = multiprocessing.get_context("spawn")  # a fork of a notebook's kernel inherits the threads of its sockets
    with ProcessPoolExecutor(min(os.cpu_count() or 1, 8), context) as pool:
        found = track(pool.map(_pairs_of_package, packages), "reading the Python on this disk", len(packages))
        return [pair for pairs in found for pair in pairs]


def _site_folders(installed: Path) -> list[Path]:
    """The folder of the installed packages, and those that its .pth files name."""
    folders = [installed]
    for path in sorted(installed.glob("*.pth")):
        lines = path.read_text().splitlines()
        folders += [Path(line) for line in lines if line.startswith("/") and Path(line).is_dir()]
    return folders


def _pairs_of_package(package: Path) -> list[Pair]:
    files = [package] if package.suffix == ".py" else sorted(package.rglob("*.py")) if package.is_dir() else []
    pairs: list[Pair] = []
    for path in files:
        parts = path.relative_to(package.parent).with_suffix("").parts
        if len(pairs) >= FROM_EACH_PACKAGE:
            break
        if not SKIPPED & set(parts) and path.stat().st_size < LARGEST_FILE:
            pairs += _pairs_of_file(path, ".".join(parts))
    return pairs[:FROM_EACH_PACKAGE]


def _pairs_of_file(path: Path, module: str) -> list[Pair]:
    try:
        source = path.read_text()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old escapes in other people's code
            tree = ast.parse(source)
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return []
    lines = source.splitlines()
    pairs = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        docstring = ast.get_docstring(node)
        if docstring is None or len(docstring.split()) < 4 or len(node.body) < 2:
            continue
        first = node.body[0]
        code = "\n".join([*lines[node.lineno - 1 : first.lineno - 1], *lines[first.end_lineno : node.end_lineno]])
        pairs.append(Pair(f"{module}.{node.name}", docstring, textwrap.dedent(code)))
    return pairs


def train_tokenizer(texts: Iterable[str], vocab_size: int = 30_000) -> Tokenizer:
    """Lower-case subwords in which `readFile` and `read_file` are the same two words. Ids 0 to 3: padding, an unknown
    character, the mask and a separator."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    apart = normalizers.Replace(Regex("(?<=[a-z])(?=[A-Z])|_"), " ")
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), apart, normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[MASK]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
