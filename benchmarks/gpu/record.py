"""Joins the results of GPU runs into the record: `python -m benchmarks.gpu join FOLDER...`

A folder holds the output of one command. benchmarks/results/gpu_validated.json gets, for each kernel file, the commit,
the device and the versions of a run in which at least one test of the file passed and none failed, and how many of the
planned ones passed. A header, or a module that others import, is validated with every kernel file that uses it. The
files must be the same in the commit and in every folder; `gpu_times.json` gets the times.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.gpu.outcomes import FOLDERS
from benchmarks.gpu.plan import ROOT

RESULTS = ROOT / "benchmarks" / "results"
VALIDATED = "gpu_validated.json"
TIMES = "gpu_times.json"
PREFERENCE = ROOT / "sslkernels" / "core" / "measured_backends.json"
INCLUDE = re.compile(r'^#include "([^"]+)"', re.M)
IMPORT = re.compile(r"^\s*from sslkernels\.(\w+)\.triton(?:\.(\w+))? import ([\w, (]+)", re.M)


def entries() -> list[str]:
    """The kernel files that tests name: CUDA files, and modules that define or launch Triton kernels."""
    found = [path for path in (ROOT / "csrc").glob("*/*.cu")]
    for path in (ROOT / "sslkernels").glob("*/triton/*.py"):
        if re.search(r"\w_kernel\b", path.read_text()):
            found.append(path)
    return sorted(path.relative_to(ROOT).as_posix() for path in found)


def used_by(file: str) -> set[str]:
    """The file and all kernel sources that it includes or imports, except sources for the CPU."""
    found, todo = set(), [file]
    while todo:
        name = todo.pop()
        path = ROOT / name
        if name in found or not path.exists() or "/cpu/" in name:
            continue
        found.add(name)
        text = path.read_text()
        if name.endswith(".py"):
            for family, stem, names in IMPORT.findall(text):
                stems = [stem] if stem else re.findall(r"\w+", names)
                todo += [f"sslkernels/{family}/triton/{each}.py" for each in stems]
        else:
            todo += [f"csrc/{each}" for each in INCLUDE.findall(text)]
            if name.endswith("cuda/launch.h"):
                todo.append(name.replace(".h", ".cu"))
    return found


def kernel_files() -> dict[str, set[str]]:
    """Kernel file -> the entries that use it."""
    found = defaultdict(set)
    for entry in entries():
        for file in used_by(entry):
            found[file].add(entry)
    return dict(sorted(found.items()))


def blobs() -> dict[str, str]:
    """Kernel file -> its git blob hash."""
    return {file: blob_hash((ROOT / file).read_bytes()) for file in kernel_files()}


def blob_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def faster_backends(times: Iterable[dict[str, Any]]) -> dict[str, list[str]]:
    """Public op -> "cuda" and "triton", the one first whose geometric mean over the cases that both ran is less."""
    seconds: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
    for line in times:
        backend = line.get("provider", "").removeprefix("sslkernels ")
        if backend in FOLDERS and line.get("status") == "ok" and not line["family"].endswith("_kernels"):
            seconds[line["public"], line["case"]][backend] = line["seconds"]
    ratios = defaultdict(list)
    for (public, _), both in seconds.items():
        if len(both) == len(FOLDERS):
            ratios[public].append(math.log(both["cuda"] / both["triton"]))
    return {
        public: ["cuda", "triton"] if sum(logs) <= 0 else ["triton", "cuda"] for public, logs in sorted(ratios.items())
    }


class Shard:
    """The files that one command wrote: its report, outcomes of tests, and times."""

    def __init__(self, report: Path) -> None:
        self.content = json.loads(report.read_text())
        self.command = self.content["command"]
        self.tests = list(lines(report.with_name(f"{self.command}_tests.jsonl")))
        self.times = list(lines(report.with_name(f"{self.command}_times.jsonl")))

    @property
    def machine(self) -> dict[str, str]:
        return self.content.get("found", {}).get("machine", {})


def lines(path: Path) -> Iterable[dict[str, Any]]:
    """The whole lines of a file, which after a cut may end in the middle of one."""
    for text in path.read_text().splitlines() if path.exists() else ():
        try:
            yield json.loads(text)
        except ValueError:
            continue


def shards(folders: Iterable[Path]) -> list[Shard]:
    found = [path for folder in folders for path in sorted(folder.glob("*.json")) if is_report(path)]
    return [Shard(path) for path in found]


def is_report(path: Path) -> bool:
    content = json.loads(path.read_text())
    return isinstance(content, dict) and "command" in content and "steps" in content


def same_files(found: list[Shard], now: dict[str, str]) -> None:
    """ValueError unless all ran the kernel files that are here."""
    for shard in found:
        files = shard.content["files"]
        changed = sorted(name for name in files.keys() | now.keys() if files.get(name) != now.get(name))
        if changed:
            raise ValueError(f"{shard.command} ran other kernel files than these: {', '.join(changed)}")
        if "device" not in shard.machine:
            raise ValueError(f"{shard.command} does not say on which device it ran")


def counts(found: list[Shard]) -> tuple[Counter[str], Counter[str], Counter[str]]:
    """Kernel file that tests name -> tests that were planned, that passed, that failed or did not end."""
    planned: Counter[str] = Counter()
    passed: Counter[str] = Counter()
    failed: Counter[str] = Counter()
    for shard in found:
        for line in shard.tests:
            planned.update(line.get("planned", {}))
            outcome = line.get("outcome")
            if outcome in ("passed", "failed"):
                (passed if outcome == "passed" else failed).update(line["kernels"])
    return planned, passed, failed


def failed_files(found: list[Shard]) -> set[str]:
    """Kernel files that a failed test runs."""
    _, _, failed = counts(found)
    return {file for file, users in kernel_files().items() if any(failed[user] for user in users)}


def validated(found: list[Shard], commit: str) -> dict[str, dict[str, Any]]:
    """The entries of the record."""
    if not found:
        raise ValueError("there is no report of a command")
    now = blobs()
    same_files(found, now)
    planned, passed, failed = counts(found)
    good = {entry for entry in entries() if passed[entry] and not failed[entry]}
    machine = found[0].machine
    facts = {name: machine.get(name, "unknown") for name in ("device", "date", "torch", "triton")}
    result = {}
    for file, users in kernel_files().items():
        if users <= good:
            ran = sum(passed[user] for user in users)
            tests = {"passed": ran, "planned": sum(planned[user] for user in users)}
            result[file] = {"commit": commit, "blob": now[file], **facts, **tests}
    return result
