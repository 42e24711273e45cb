"""Updates the generated parts of README.md and docs/.

    python -m scripts.pages [--check]

Tables of benchmarks/results, the diagrams of the code and docs/llms.txt. --check: only says which are not current.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

from scripts import diagrams, llms, measured

ROOT = Path(__file__).parents[1]


def with_section(text: str, name: str, content: str) -> str:
    """The text with what stands between <!-- name --> and <!-- end of name --> replaced."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    found = re.subn(f"{begin}.*?{end}", lambda _: f"{begin}\n\n{content}\n\n{end}", text, flags=re.DOTALL)
    if found[1] != 1:
        raise ValueError(f"{begin} ... {end} must be there once; got {found[1]}")
    return found[0]


def readme() -> str:
    text = (ROOT / "README.md").read_text()
    return with_section(text, "measured", f"{measured.sentence()}\n\n{measured.front_table()}")


# A figure is drawn again when a page is not current: its bytes depend on the version of matplotlib.
FIGURES: dict[str, Callable[[Path], None]] = {"docs/images/overview.png": measured.figure}
PAGES: dict[str, Callable[[], str]] = {
    "README.md": readme,
    "docs/performance/cpu.md": measured.performance_page,
    "docs/llms.txt": llms.text,
    "docs/images/house.svg": diagrams.house,
    "docs/images/step.svg": diagrams.step,
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.pages", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fails if a page is not current")
    options = parser.parse_args(arguments)
    stale = []
    for name, make in PAGES.items():
        path, text = ROOT / name, make()
        if not path.exists() or path.read_text() != text:
            stale.append(name)
            if not options.check:
                path.write_text(text)
    for name, draw in FIGURES.items():
        if not options.check and (stale or not (ROOT / name).exists()):
            draw(ROOT / name)
            stale.append(name)
    said = "is not current" if options.check else "written"
    print("\n".join(f"{name}: {said}" for name in stale) or "all pages are current")
    return int(options.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
