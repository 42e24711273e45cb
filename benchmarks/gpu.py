"""What `make gpu` runs on a machine with a CUDA device: build, tests, sanitizer, benchmark matrix, record.

Needs no network and no virtual environment: everything runs with the interpreter that runs this file. `record` writes
benchmarks/results/gpu_validated.json: for each kernel file the commit at which the GPU tests last passed, and on which
device. It refuses unless the tests passed on these very files and, in a git repository, the commit has the same files.
In a plain copy of the tree the commit comes from --commit or the variable COMMIT.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks import environment

ROOT = environment.ROOT
KERNEL_FILES = (
    "csrc/**/*.cu",
    "csrc/**/*.h",
    "sslkernels/**/triton/*.py",
)
NOT_KERNELS = re.compile(r"csrc/(.*/)?cpu/|csrc/[^/]*$|_cpu\.h$|_bind\.h$")  # headers without device code
REQUIREMENTS = ROOT / "requirements" / "gpu.txt"
PEERS = ROOT / "requirements" / "gpu_peers.txt"
WHEELS = ROOT / "wheels"  # of the peers; `make gpu-wheels` fills it
RESULTS = ROOT / "benchmarks" / "results"
RECORD = RESULTS / "gpu_validated.json"
PASSED = RESULTS / "scratch" / "gpu" / "tests_passed.json"
# Tool -> its options, and the marker of its tests. racecheck and initcheck skip kernels of torch and CUB, some of which
# race or read uninitialised memory by design. memcheck ignores failing API calls: libraries probe the driver with them.
SANITIZERS = {
    "memcheck": (["--report-api-errors", "no"], "sanitize"),
    "racecheck": ([], "kernel_only"),
    "initcheck": ([], "kernel_only"),
}


class Runner:
    """Runs commands in the repository, or prints them."""

    def __init__(self, dry_run: bool) -> None:
        self.dry_run = dry_run

    def __call__(self, command: list[str], **variables: str) -> int:
        shown = " ".join([*(f"{k}={shlex.quote(v)}" for k, v in variables.items()), shlex.join(command)])
        print(f"$ {shown}", flush=True)
        if self.dry_run:
            return 0
        paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        return subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": paths, **variables}).returncode


def setup(run: Runner, options: argparse.Namespace) -> int:
    """Installs the missing packages of requirements/gpu.txt, which needs a network only if there are any, and the peers
    from the folder of wheels if it exists."""
    pip = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "-q"]
    missing = missing_packages(REQUIREMENTS.read_text())
    code = run([*pip, *missing]) if missing else 0
    if code == 0 and WHEELS.is_dir():
        code = run([*pip, "--no-index", "--no-deps", "--find-links", str(WHEELS), "-r", str(PEERS)])
    return code


def missing_packages(requirements: str) -> list[str]:
    """The lines `name` or `name>=version` that this environment does not satisfy."""
    found = []
    for line in requirements.splitlines():
        wanted = line.split("#")[0].strip()
        if not wanted:
            continue
        name, _, least = wanted.partition(">=")
        have = environment.version(name)
        if have == environment.MISSING or _numbers(have) < _numbers(least):
            found.append(wanted)
    return found


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def build(run: Runner, options: argparse.Namespace) -> int:
    """The extension, in place, for the device's architecture unless TORCH_CUDA_ARCH_LIST says otherwise."""
    variables = {"SSLKERNELS_BUILD_EXT": "1", "SSLKERNELS_CUDA": "1"}
    architecture = _architecture()
    if architecture is not None and "TORCH_CUDA_ARCH_LIST" not in os.environ:
        variables["TORCH_CUDA_ARCH_LIST"] = architecture
    return run([sys.executable, "setup.py", "build_ext", "--inplace"], **variables)


def _architecture() -> str | None:
    import torch

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return f"{major}.{minor}" + ("a" if major >= 9 else "")


def test(run: Runner, options: argparse.Namespace) -> int:
    """All tests, also the ones that need a GPU; a pass is noted for `record`, with the files it is valid for."""
    if not run.dry_run:
        PASSED.unlink(missing_ok=True)
    before = blobs()
    command = [
        sys.executable,
        "-m",
        "pytest",
        "tests",
        "benchmarks",
        "-q",
        "-m",
        "gpu or not gpu",
        "--benchmark-disable",
    ]
    code = run([*command, *options.arguments])
    if code == 0 and not run.dry_run and not options.arguments:
        note_pass(before, device_facts())
    elif options.arguments:
        print("a selection of the tests was run: this pass is not noted for the record")
    return code


def note_pass(files: dict[str, str], facts: dict[str, Any]) -> None:
    _write_json(PASSED, {**facts, "files": files})


def sanitize(run: Runner, options: argparse.Namespace) -> int:
    """compute-sanitizer on small tests, one tool after the other."""
    if shutil.which("compute-sanitizer") is None:
        print("compute-sanitizer is not installed: nothing was checked")
        if not run.dry_run:
            return 0
    worst = 0
    for tool, (flags, marker) in SANITIZERS.items():
        command = ["compute-sanitizer", "--tool", tool, *flags, "--error-exitcode", "97", "--target-processes", "all"]
        tests = [sys.executable, "-m", "pytest", "tests", "benchmarks", "-q", "-m", marker, "--benchmark-disable"]
        code = run([*command, *tests, *options.arguments], PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        if code == 5:
            print(f"{tool}: no test is marked {marker}")
        worst = max(worst, 0 if code == 5 else code)
    return worst


def parts() -> dict[str, list[str]]:
    """Part of the benchmark matrix -> arguments of `python -m benchmarks`; each part takes less than 8 minutes."""
    from benchmarks.benchmark import discover  # needs the packages that `setup` installs

    found = {}
    for benchmark in (b for b in discover() if b.cases("cuda")):
        op, count = benchmark.op, benchmark.gpu_parts
        for i in range(1, count + 1):
            found[op if count == 1 else f"{op}-{i}"] = ["--op", op, "--part", f"{i}/{count}"]
    return {**found, "host-time": ["--host-time"]}


def bench(run: Runner, options: argparse.Namespace) -> int:
    """The benchmark matrix: the named parts (default: all), joined into one result once all are measured."""
    matrix = parts()
    unknown = [name for name in options.arguments if name not in matrix]
    if unknown:
        print(f"unknown part {', '.join(unknown)}; the parts are: {', '.join(matrix)}", file=sys.stderr)
        return 2
    folder = RESULTS / "scratch" / "gpu"
    for name in options.arguments or matrix:
        command = [
            sys.executable,
            "-m",
            "benchmarks",
            "--device",
            "cuda",
            *matrix[name],
            "--output",
            str(folder / name),
        ]
        code = run(command)
        if code != 0:
            return code
    measured = [folder / name for name in matrix if run.dry_run or (folder / name / "results.json").exists()]
    if len(measured) < len(matrix):
        print(f"{len(measured)} of {len(matrix)} parts are measured; the results are joined when all are")
        return 0
    return run([sys.executable, "-m", "benchmarks", "--combine", *map(str, measured)])


def record(run: Runner, options: argparse.Namespace) -> int:
    """Writes gpu_validated.json."""
    if run.dry_run:
        print(f"would write {RECORD.relative_to(ROOT)} for: {', '.join(blobs()) or 'no kernel files'}")
        return 0
    try:
        entries = validated(options.commit)
    except ValueError as error:
        print(f"nothing recorded: {error}", file=sys.stderr)
        return 1
    known = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    present = {name: entry for name, entry in known.items() if (ROOT / name).exists()}
    _write_json(RECORD, dict(sorted({**present, **entries}.items())))
    print(f"recorded {len(entries)} kernel files in {RECORD.relative_to(ROOT)}")
    return 0


def validated(commit: str | None) -> dict[str, dict[str, str]]:
    """The entries of the record. ValueError: the tests did not pass on these files, or the commit has other files."""
    if not PASSED.exists():
        raise ValueError("the GPU tests did not pass here; run `make gpu-test`")
    passed = json.loads(PASSED.read_text())
    files = passed.pop("files")
    now = blobs()
    changed = sorted(name for name in files.keys() | now.keys() if files.get(name) != now.get(name))
    if changed:
        raise ValueError(f"changed since the GPU tests passed: {', '.join(changed)}")
    head = environment.git("rev-parse", "--verify", f"{commit or 'HEAD'}^{{commit}}")
    if head is not None:
        foreign = [name for name, blob in now.items() if environment.git("rev-parse", f"{head}:{name}") != blob]
        if foreign:
            raise ValueError(f"not as in commit {head[:12]}: {', '.join(foreign)}")
    elif commit is None:
        raise ValueError("there is no git repository here; give the commit with COMMIT=...")
    return {name: {"commit": head or commit, "blob": blob, **passed} for name, blob in now.items()}


def blobs() -> dict[str, str]:
    """Kernel file -> its git blob hash."""
    paths = sorted({path.relative_to(ROOT).as_posix() for pattern in KERNEL_FILES for path in ROOT.glob(pattern)})
    return {path: blob_hash((ROOT / path).read_bytes()) for path in paths if not NOT_KERNELS.search(path)}


def blob_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def device_facts() -> dict[str, str]:
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device: a pass without one is not noted")
    now = datetime.datetime.now(datetime.timezone.utc)
    return {
        "device": torch.cuda.get_device_name(),
        "date": now.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "triton": environment.version("triton"),
    }


def _write_json(path: Path, data: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(json.dumps(data, indent=1) + "\n")
    temporary.replace(path)


def copy_out(target: Path) -> None:
    """Copies the results to the folder that the variable OUT names."""
    if RESULTS.exists():
        shutil.copytree(RESULTS, target / "results", dirs_exist_ok=True)


STEPS = {"setup": setup, "build": build, "test": test, "sanitize": sanitize, "bench": bench, "record": record}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("step", choices=[*STEPS, "all"])
    parser.add_argument("--dry-run", action="store_true", help="print the commands and run none")
    parser.add_argument("--commit", default=os.environ.get("COMMIT") or None, help="commit of this tree without git")
    parser.add_argument("arguments", nargs="*", help="test, sanitize: for pytest, after --; bench: names of parts")
    options = parser.parse_args(arguments)
    code = 0
    for name in STEPS if options.step == "all" else [options.step]:
        code = STEPS[name](Runner(options.dry_run), options)
        if code != 0:
            print(f"{name} failed with exit code {code}", file=sys.stderr)
            break
    if os.environ.get("OUT") and not options.dry_run:
        copy_out(Path(os.environ["OUT"]))
    return code


if __name__ == "__main__":
    sys.exit(main())
