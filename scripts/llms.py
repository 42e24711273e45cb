"""docs/llms.txt: an index of the documentation for language models (llmstxt.org), from the navigation and pages."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import sslkernels as sk

ROOT = Path(__file__).parents[1]


def navigation() -> list[tuple[str, str]]:
    """(title, page) of mkdocs.yml, in order."""
    nav = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    return re.findall(r"- ([^:\n]+): (\S+\.md)$", nav, re.MULTILINE)


def first_sentence(text: str) -> str:
    """The first prose of a page, up to its first full stop."""
    for block in re.split(r"\n\s*\n", text):
        line = " ".join(block.split())
        if line and line[0] not in "#|!<-:$[\\" and not line.startswith("```"):
            return re.split(r"(?<=[a-z0-9)*`])\. ", line)[0].rstrip(".:").replace("**", "")
    return ""


def functions() -> list[str]:
    """Public functions and classes with the first line of their docstrings."""
    found = []
    for name in sorted(sk.__all__):
        thing = getattr(sk, name)
        if callable(thing) and thing.__doc__:
            called = f"{name}(...)" if inspect.isfunction(thing) else name
            found.append(f"- `sk.{called}`: {thing.__doc__.strip().splitlines()[0]}")
    return found


def text() -> str:
    lines = ["# sslkernels", ""]
    summary = first_sentence((ROOT / "README.md").read_text())
    lines += [f"> {summary}", "", "Import: `import sslkernels as sk`.", "", "## Pages", ""]
    for title, page in navigation():
        said = first_sentence((ROOT / "docs" / page).read_text())
        lines.append(f"- [{title}]({page})" + (f": {said}" if said else ""))
    lines += ["", "## Functions", "", *functions(), "", "## Modules", ""]
    for name in sorted(sk.nn.__all__):
        lines.append(f"- `sk.nn.{name}`: {getattr(sk.nn, name).__doc__.strip().splitlines()[0]}")
    return "\n".join(lines) + "\n"
