"""Plants each of the mistakes in a copy of the repository and says which of them `make test` does not find.

    python tests/planted/run.py [--only TEXT] [--layer python] [--whole] [--folder /tmp/planted]

The tests of the mistake are run first; with --whole the whole tier follows where they find nothing. It takes about 20
seconds a mistake, more for those in C++. The exit status is the number of mistakes that were not found.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from mistakes import MISTAKES, Mistake

ROOT = Path(__file__).resolve().parents[2]
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "build", "__pycache__", "*.egg-info", "wheels")
NEVER_ENDS = 1800  # seconds for a mistake that lets a test wait for ever, which finds it too


def planted(text: str, mistake: Mistake) -> str:
    if text.count(mistake.old) != 1:
        raise ValueError(f"{mistake.name}: its text occurs {text.count(mistake.old)} times in {mistake.file}")
    if mistake.old == mistake.new:
        raise ValueError(f"{mistake.name}: it changes nothing")
    return text.replace(mistake.old, mistake.new)


def build(copy: Path) -> bool:
    environment = {**os.environ, "SSLKERNELS_BUILD_EXT": "1", "SSLKERNELS_CUDA": "0"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
    return done.returncode == 0


def finds(copy: Path, tests: list[str], log: Path) -> bool:
    """Whether the tests fail. Nothing selected is no failure."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-m",
        "not full and not slow",
        *tests,
    ]
    environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    with open(log, "w") as out:
        try:
            done = subprocess.run(
                command, cwd=copy, env=environment, stdout=out, stderr=out, check=False, timeout=NEVER_ENDS
            )
        except subprocess.TimeoutExpired:
            return True
    if done.returncode > 1:
        tail = log.read_text()[-2000:]
        if done.returncode == 2:  # an error of collection: the mistake breaks an import
            return True
        raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}\n{tail}")
    return done.returncode == 1 or done.returncode < 0  # a signal: memory that is not there


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="a part of the name")
    parser.add_argument("--layer", choices=MISTAKES)
    parser.add_argument("--whole", action="store_true", help="run the whole tier where its own tests find nothing")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "planted")
    options = parser.parse_args()
    copy = options.folder / "copy"
    if copy.exists():
        shutil.rmtree(copy)
    shutil.copytree(ROOT, copy, ignore=LEFT_OUT)
    if (ROOT / "build" / "cuda_host").exists():  # what a mistake does not touch is not compiled again
        shutil.copytree(ROOT / "build" / "cuda_host", copy / "build" / "cuda_host")
    missed, extension_built = 0, False
    for layer, mistakes in MISTAKES.items():
        for mistake in mistakes:
            if options.only not in mistake.name or options.layer not in (None, layer):
                continue
            path, begin = copy / mistake.file, time.time()
            text = path.read_text()
            path.write_text(planted(text, mistake))
            compiled = layer == "cpu"
            found = "tests"
            try:
                if compiled and not build(copy):
                    found = "the compiler"
                elif not finds(copy, shlex.split(mistake.tests), options.folder / "log"):
                    whole = ["tests", "benchmarks", "--benchmark-disable", "-n", "2", "--dist", "loadfile"]
                    found = "whole tier" if options.whole and finds(copy, whole, options.folder / "log") else ""
            finally:
                path.write_text(text)
                extension_built |= compiled
            missed += not found
            verdict = f"found by {found}" if found else "NOT FOUND"
            print(f"{layer:7} {time.time() - begin:5.0f} s  {verdict:22} {mistake.name}", flush=True)
        if extension_built and layer == "cpu":
            build(copy)  # without a mistake, for the layers that follow
    return missed


if __name__ == "__main__":
    sys.exit(main())
