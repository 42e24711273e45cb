"""Draws mutants of the sources by chance and says which of them the tests do not find.

    pip install --no-deps universalmutator coverage
    python tests/planted/mutate.py --count 100 --seed 1 [--layer plans] [--minutes 30] [--folder build/mutants]
    python tests/planted/mutate.py --again    the survivors of mutants.jsonl, before all tests of the tier
    python tests/planted/mutate.py --table    writes mutants.md from mutants.jsonl

A mutant changes one line by a rule of universalmutator (Groce et al., ICSE 2018). The layers take turns, and the order
depends on the seed and the lines alone: a run that ends early is a fair sample, and the next one goes on where it
ended, also when lines moved. `mutants.jsonl` keeps a line per mutant. One that does not compile, does not import, or
compiles to the same code is "void" and does not count.

The first run records which tests execute which lines (`executed.py`), which takes some twenty minutes. A mutant of
Python is run against the tests that execute its statement, a mutant of C++ against the tests of its op on the CPU; the
cheapest case of every test function comes first, for SECONDS at most. A mutant that they do not find has "survived":
--again runs all of `make test` in the files of those tests. Its verdict in mutants.jsonl is then written by hand:
"equivalent: why", or "fixed: the test that finds it".
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import difflib
import hashlib
import io
import itertools
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent))
from run import LEFT_OUT, ROOT, build

HERE = Path(__file__).parent
RESULTS = HERE / "mutants.jsonl"
SECONDS = 25.0  # of tests that a mutant meets, by their time without it
MEMORY = 16 << 30  # bytes of addresses for the tests: a size that is far too large fails
LIMIT = 10  # times their time: the mutant never ends, which finds it
FAMILIES = ("contrastive", "vocabulary", "latent", "random")
LAYERS = {
    "cpu": [f"csrc/{family}/*_cpu.cpp" for family in FAMILIES] + ["csrc/core/*_cpu.cpp", "csrc/*/cpu/*.h"],
    "common": [f"csrc/{family}/*.h" for family in (*FAMILIES, "core")],
    "plans": [f"sslkernels/{family}/{inner}*.py" for family in FAMILIES for inner in ("", "words/", "prototypes/")],
    "triton": [f"sslkernels/{family}/triton/*.py" for family in FAMILIES],
}
NOT_HOST = ("_cuda.h", "bind.h")  # no part of the extension for a CPU, or only its argument checks
Executed = dict[str, tuple[float, dict[str, list[int]]]]  # {test: (seconds, {source file: lines})}
TIER = ["-m", "not full and not slow"]


class Mutant(NamedTuple):
    layer: str
    file: str
    line: int
    before: str
    after: str

    @property
    def key(self) -> tuple[str, str, str]:
        return self.file, self.before.strip(), self.after.strip()

    def draw(self, seed: int) -> str:
        return hashlib.sha256(repr((seed, self.key)).encode()).hexdigest()

    def source(self, text: str) -> str:
        lines = text.splitlines(keepends=True)
        lines[self.line - 1] = self.after + "\n"
        return "".join(lines)


# Drawing mutants


def files_of(layer: str) -> list[Path]:
    found = sorted(path for pattern in LAYERS[layer] for path in ROOT.glob(pattern))
    return [path for path in found if not path.name.endswith(NOT_HOST) and path.name != "__init__.py"]


def mutants_of(layer: str) -> Iterator[Mutant]:
    from universalmutator.mutator import mutants_regexp

    for file in files_of(layer):
        rules = ["universal.rules", *(["python.rules"] if file.suffix == ".py" else ["c_like.rules", "cpp.rules"])]
        lines = file.read_text().splitlines(keepends=True)
        with contextlib.redirect_stdout(io.StringIO()):
            found = mutants_regexp(lines, ruleFiles=rules, ignorePatterns=[])
        for line, text, *_ in found:
            yield Mutant(layer, str(file.relative_to(ROOT)), line, lines[line - 1].rstrip("\n"), text.rstrip("\n"))


def drawn(layer: str, seed: int) -> Iterator[Mutant]:
    """The mutants of a layer in the order of the seed."""
    every = {mutant.key: mutant for mutant in mutants_of(layer)}
    return iter(sorted(every.values(), key=lambda mutant: mutant.draw(seed)))


def code_of(source: str) -> str | None:
    """Python code without texts and annotations; None for what is no Python."""
    try:
        compile(source, "", "exec")  # "break" outside of a loop is found here
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


def same_code(mutant: Mutant) -> bool:
    """Whether the mutant changes comments and texts alone, or is no Python."""
    text = (ROOT / mutant.file).read_text()
    if mutant.file.endswith(".py"):
        return code_of(mutant.source(text)) in (None, code_of(text))
    bare = [re.sub(r'"[^"]*"|//.*|\s', "", line) for line in (mutant.before, mutant.after)]
    return bare[0] == bare[1]


# Choosing tests


def executed(copy: Path, folder: Path) -> Executed:
    """What the tests of the families and the core execute, kept in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for name in ("core", *FAMILIES):
        for path in sorted((ROOT / "tests" / name).glob("test_*.py")):
            kept = folder / f"{name}.{path.stem}.json"
            if not kept.exists():
                kept.write_text("{}")  # stays where the tests take too long
                tests = ["-p", "executed", "-m", f"{TIER[1]} and not costly", str(path.relative_to(ROOT))]
                run_tests(copy, tests, kept.with_suffix(".log"), 300, SSLKERNELS_EXECUTED=str(kept))
            found.update(json.loads(kept.read_text()))
    return found


def statement(text: str, line: int) -> range:
    """The lines of the innermost statement; the body of a function for its head, all lines outside of functions."""
    best, inside = range(1, 10**6), False
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.stmt) or not node.lineno <= line <= (node.end_lineno or line):
            continue
        body = getattr(node, "body", None)
        if isinstance(node, ast.FunctionDef):
            inside = True
            best = range(node.body[0].lineno, (node.end_lineno or line) + 1)
        elif inside:
            end = body[0].lineno if body and line < body[0].lineno else (node.end_lineno or line) + 1
            best = range(node.lineno, end)
    return best


def candidates(mutant: Mutant, tests: Executed) -> list[str]:
    folder, op = mutant.file.split("/")[1], Path(mutant.file).stem.removesuffix("_cpu")
    family = [test for test in tests if test.startswith(f"tests/{folder}/")]
    if mutant.file.endswith(".py"):
        lines = statement((ROOT / mutant.file).read_text(), mutant.line)
        found = [test for test, (_, files) in tests.items() if any(n in lines for n in files.get(mutant.file, ()))]
        return found or [test for test in family if "ranks" in test]  # what spawned ranks execute is not recorded
    package = [path for path in (ROOT / "sslkernels" / folder).rglob("*.py") if path.parent.name != "triton"]
    users = {str(path.relative_to(ROOT)) for path in package if op in path.read_text()}
    using = [test for test, (_, files) in tests.items() if not users.isdisjoint(files)]
    found = using or (family if folder not in ("core", "random") else [*tests])
    return [test for test in found if "triton" not in test and "reference" not in test]


def unlike(test: str, mutant: Mutant) -> float:
    """How little the name of the test's file is like the mutant's."""
    name = Path(test.partition("::")[0]).stem
    return -difflib.SequenceMatcher(None, name, f"test_{Path(mutant.file).stem}").ratio()


def chosen(mutant: Mutant, tests: Executed) -> list[str]:
    """The cheapest case of every test function, then the next; the functions of files with a similar name first."""
    functions: dict[str, list[str]] = {}
    for test in sorted(candidates(mutant, tests), key=lambda test: tests[test][0]):
        functions.setdefault(test.partition("[")[0], []).append(test)
    order = sorted(functions, key=lambda name: (unlike(name, mutant), tests[functions[name][0]][0]))
    found, seconds = [], 0.0
    for turn in itertools.zip_longest(*(functions[name] for name in order)):
        for test in filter(None, turn):
            if seconds + tests[test][0] <= SECONDS:
                found.append(test)
                seconds += tests[test][0]
    return found


def tier(mutant: Mutant, tests: Executed) -> list[str]:
    """`make test` of the files whose tests could find it, similar names first, and of the ranks of the family."""
    ranks = (ROOT / "tests" / mutant.file.split("/")[1]).glob("test_*ranks.py")
    files = {test.partition("::")[0] for test in candidates(mutant, tests)}
    host = [] if mutant.file.endswith(".py") else ["-k", "not triton and not reference"]
    found = sorted(files | {str(path.relative_to(ROOT)) for path in ranks}, key=lambda file: unlike(file, mutant))
    return [*TIER, *host, *found]


# Judging mutants


def run_tests(copy: Path, tests: list[str], log: Path, limit: float, **variables: str) -> int | None:
    """The exit code of pytest, None at the time limit."""
    arguments = log.with_suffix(".arguments")
    arguments.write_text("\n".join(tests))
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"@{arguments}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", **variables}
    paths = [str(copy), str(copy / "tests" / "planted"), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    with open(log, "w") as out:
        process = subprocess.Popen(
            command,
            cwd=copy,
            env=environment,
            stdout=out,
            stderr=out,
            start_new_session=True,
            preexec_fn=None if tests[:2] == TIER else little_memory,
        )
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # the ranks that a test spawned too
            process.wait()


def little_memory() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def imports(copy: Path, file: str) -> bool:
    module = file.removesuffix(".py").replace("/", ".")
    command = [sys.executable, "-c", f"import sslkernels, importlib; importlib.import_module({module!r})"]
    environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, cwd=copy, env=environment, capture_output=True, check=False).returncode == 0


def digest(copy: Path) -> str:
    (extension,) = (copy / "sslkernels").glob("_C*.so")
    return hashlib.sha256(extension.read_bytes()).hexdigest()


def verdict(mutant: Mutant, copy: Path, tests: list[str], log: Path, limit: float) -> tuple[str, str]:
    """(void, found or survived; by what) of the mutant that was written into `copy`."""
    compiled = not mutant.file.endswith(".py")
    if compiled:
        before = digest(copy)
        if not build(copy) or digest(copy) == before:
            return "void", ""
    if not tests:
        return "survived", "no test executes it"
    code = run_tests(copy, tests, log, limit)
    if code == 0 or code == 5:  # 5: nothing was selected
        return "survived", ""
    if not compiled and code not in (None, 1) and not imports(copy, mutant.file):
        return "void", ""
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", log.read_text(errors="replace"), re.MULTILINE)
    return "found", "time limit" if code is None else failed[1] if failed else f"exit code {code}"


def pristine(folder: Path) -> Path:
    """A copy of the repository, built for one instruction set, that no mutant has touched.

    It is built in the folder "copy", whose path CMake keeps, and moved to "clean".
    """
    copy, clean = folder / "copy", folder / "clean"
    if clean.exists():
        shutil.rmtree(copy, ignore_errors=True)
        clean.rename(copy)
    for path in copy.iterdir() if copy.exists() else ():
        if path.name != "build":  # objects of what did not change
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def left_out(directory: str, names: list[str]) -> set[str]:
        return {*LEFT_OUT(directory, names), *(name for name in names if name.endswith(".so"))}

    shutil.copytree(ROOT, copy, ignore=left_out, dirs_exist_ok=True)
    if not build(copy):
        raise RuntimeError(f"{copy}: it does not build")
    copy.rename(clean)
    return clean


# Results


def rows() -> list[dict]:
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def table(every: list[dict]) -> str:
    """The counts of each layer and the list of what was not found, as Markdown."""
    counted = [row for row in every if row["verdict"] != "void"]
    kinds = ("found", "equivalent", "fixed", "survived")
    seeds = ", ".join(map(str, sorted({row["seed"] for row in counted})))
    lines = [
        f"# Mutants drawn by `mutate.py`, seed {seeds}",
        "",
        f"| layer | drawn | {' | '.join(kinds)} | found of those not equivalent |",
    ]
    lines.append("|---|---|---|---|---|---|---|")
    for layer in (*LAYERS, "all"):
        own = [row["verdict"].partition(":")[0] for row in counted if layer in (row["layer"], "all")]
        count = {kind: own.count(kind) for kind in kinds}
        share = f"{count['found'] / max(1, len(own) - count['equivalent']):.0%}"
        lines.append(f"| {layer} | {len(own)} | {' | '.join(str(count[kind]) for kind in kinds)} | {share} |")
    lines += ["", '"found": by the tests as they were. "fixed": by a test that was written for it.', ""]
    for row in counted:
        if row["verdict"] != "found":
            before, after = (" ".join(row[name].split()) for name in ("before", "after"))
            lines += [f"- `{row['file']}`: `{before}` -> `{after}`  ", f"  {row['verdict']}"]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=100, help="of all that mutants.jsonl then holds")
    parser.add_argument("--minutes", type=float, default=1e9)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--layer", choices=LAYERS)
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "mutants")
    options = parser.parse_args()
    if options.table:
        (HERE / "mutants.md").write_text(table(rows()))
        return 0
    os.environ.update(CMAKE_ARGS="-DSSLKERNELS_ONE_ISA=1", OMP_WAIT_POLICY="passive")
    begin, copy = time.time(), options.folder / "copy"
    clean = pristine(options.folder)
    if not copy.exists():
        shutil.copytree(clean, copy)
    tests = executed(copy, options.folder / "executed")
    layers = [options.layer] if options.layer else [*LAYERS]
    orders = {layer: drawn(layer, options.seed) for layer in layers}
    done = {(row["file"], row["before"].strip(), row["after"].strip()): row for row in rows()}
    while orders and time.time() - begin < 60 * options.minutes:
        counted = [row["layer"] for row in done.values() if row["verdict"] != "void"]
        layer = min(orders, key=counted.count)  # the layers take turns
        mutant = next(orders[layer], None)
        if mutant is None or (len(counted) >= options.count and not options.again):
            del orders[layer]
            continue
        if options.again == (mutant.key not in done) or same_code(mutant):
            continue
        if options.again and done[mutant.key]["verdict"] != "survived":
            continue
        shutil.rmtree(copy)
        shutil.copytree(clean, copy)  # with the times of the files: one object is compiled
        path, start = copy / mutant.file, time.time()
        path.write_text(mutant.source(path.read_text()))
        selected = tier(mutant, tests) if options.again else chosen(mutant, tests)
        limit = 1800 if options.again else 60 + LIMIT * sum(tests[test][0] for test in selected)
        kind, by = verdict(mutant, copy, selected, options.folder / "log", limit)
        seconds = round(time.time() - start)
        row = {**mutant._asdict(), "seed": options.seed, "verdict": kind, "by": by, "seconds": seconds}
        latest = {(each["file"], each["before"].strip(), each["after"].strip()): each for each in rows()}
        done = {**latest, mutant.key: row}  # verdicts may have been written by hand since
        RESULTS.write_text("".join(json.dumps(each) + "\n" for each in done.values()))
        print(f"{row['seconds']:5} s  {kind:8} {by}\n    {mutant.file}:{mutant.line}", flush=True)
        print(f"    - {mutant.before.strip()}\n    + {mutant.after.strip()}", flush=True)
    return sum(row["verdict"] == "survived" for row in rows())


if __name__ == "__main__":
    sys.exit(main())
