"""Builds the CUDA kernels for the host under a sanitizer and runs their launchers; protocol.h is the other end."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
COMPILER = os.environ.get("CXX", "g++")
SANITIZERS = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-fsanitize=thread"],
}
FLAGS = [
    "-std=c++20",
    "-O1",
    "-ffp-contract=off",
    "-DSSLKERNELS_EXACT",
    "-g1",
    "-fno-strict-aliasing",
    "-fno-omit-frame-pointer",
    "-pthread",
    "-Wall",
]
IGNORED = ["-Wno-unknown-pragmas", "-Wno-maybe-uninitialized", "-Wno-unused-function"]
ENVIRONMENT = {
    "ASAN_OPTIONS": "detect_leaks=1:exitcode=97",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1:exitcode=97",
}


TYPES = ("float16", "float32", "float64", "bfloat16", "dtype", "float", "double", "Half", "BFloat16")
ELEMENTS = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}  # enum class Element


@dataclass
class Call:
    """One launch. Arrays are passed as they are in memory and come back as the launch left them; the launcher gets a
    pointer `offsets[name]` elements after the start of the array, 0 by default."""

    name: str
    ints: Mapping[str, int] = field(default_factory=dict)
    reals: Mapping[str, float] = field(default_factory=dict)
    arrays: Mapping[str, Tensor] = field(default_factory=dict)
    offsets: Mapping[str, int] = field(default_factory=dict)


@dataclass
class Result:
    """error: message of the exception, else empty; launched: kernels, in order; arrays: as in the call."""

    error: str
    launched: list[str]
    arrays: dict[str, Tensor]


def label(case: Any) -> str:
    """The fields of a dataclass that differ from their defaults, as the name of a case."""
    changed = [f"{f.name}={getattr(case, f.name)}" for f in fields(case) if getattr(case, f.name) != f.default]
    return "-".join(changed).replace("torch.", "")


def missing() -> str | None:
    """Why the host run is impossible here; None if it is possible."""
    if shutil.which(COMPILER) is None:
        return f"no C++ compiler ({COMPILER})"
    probe = "#include <linux/futex.h>\nint main() { return FUTEX_WAIT_PRIVATE == 0; }"
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "probe"
        command = [COMPILER, "-std=c++20", "-fsanitize=thread", "-pthread", "-x", "c++", "-", "-o", str(program)]
        done = subprocess.run(command, input=probe, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            return f"{COMPILER} has no ThreadSanitizer, or this is not Linux"
        # Older TSan runtimes abort under high-entropy ASLR.
        done = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else f"ThreadSanitizer does not run here: {done.stderr.strip()[:200]}"


_missing = missing()
required = pytest.mark.skipif(_missing is not None, reason=str(_missing))


def results_and_races(calls: Callable[[], dict[str, Call]]) -> tuple[Any, Callable[..., None]]:
    """A fixture: the results of all calls by name, of one process under each sanitizer in turn. And the
    test that the kernels do not race, for a few of the calls.

    ThreadSanitizer takes most of the time, so that only `make test-slow` runs all calls under it.
    """

    @pytest.fixture(scope="module", params=["address", pytest.param("thread", marks=pytest.mark.slow)], name="results")
    def results(request, tmp_path_factory) -> dict[str, Result]:
        wanted = calls()
        done = run(build(request.param), list(wanted.values()), tmp_path_factory.mktemp("cuda_host"))
        return dict(zip(wanted, done, strict=True))

    @pytest.mark.costly("ThreadSanitizer alone sees a barrier that is missing")
    @pytest.mark.parametrize("results", ["address"], indirect=True)
    def races(results, tmp_path):
        wanted = calls()
        few = few_of(wanted, results)
        for name, result in zip(few, run(build("thread"), [wanted[name] for name in few], tmp_path), strict=True):
            assert result.launched == results[name].launched
            for key, values in result.arrays.items():
                assert _bytes(values) == _bytes(results[name].arrays[key]), (name, key)

    return results, races


def few_of(calls: Mapping[str, Call], results: Mapping[str, Result]) -> list[str]:
    """Names of the smallest calls that launch every kernel, of any type."""

    def kinds(name: str) -> set[str]:
        return {re.sub("|".join(TYPES), "", kernel) for kernel in results[name].launched}

    chosen, seen = [], set()
    for name in sorted(calls, key=lambda name: sum(a.numel() for a in calls[name].arrays.values())):
        if kinds(name) - seen:
            chosen.append(name)
            seen |= kinds(name)
    return chosen


def build(sanitizer: str) -> Path:
    """The program. A source is compiled again if it or a header has changed."""
    sources = sorted([*CSRC.rglob("*.cu"), *HERE.glob("*.cu"), *HERE.glob("*.cpp")])
    headers = sorted([*CSRC.rglob("*.h"), *HERE.glob("*.h")])
    flags = [*FLAGS, *IGNORED, *SANITIZERS[sanitizer], "-Icsrc", "-Itests/cuda_host"]
    common = _digest(repr([COMPILER, flags]).encode(), *(path.read_bytes() for path in headers))
    folder = ROOT / "build" / "cuda_host" / f"{sanitizer}-{common}"
    folder.mkdir(parents=True, exist_ok=True)

    def compiled(source: Path) -> Path:
        target = folder / f"{source.name}-{_digest(source.read_bytes())}.o"
        if not target.exists():
            _produce([COMPILER, *flags, "-x", "c++", "-c", str(source.relative_to(ROOT))], target)
        return target

    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other test processes need the same program
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compiled, sources))
        program = folder / f"cuda_host-{_digest(*(path.name.encode() for path in objects))}"
        if not program.exists():
            _produce([COMPILER, *flags, *map(str, objects)], program)
    return program


def _digest(*parts: bytes) -> str:
    state = hashlib.sha256()
    for part in parts:
        state.update(part)
    return state.hexdigest()[:16]


def _produce(command: list[str], target: Path) -> None:
    """Runs a compiler, whose output is there only once it is whole."""
    partial = target.with_suffix(".partial")
    _run([*command, "-o", str(partial)])
    partial.replace(target)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-4000:]}")


NEVER_ENDS = 1200  # seconds for threads that wait for each other; other runs take a hundredth of it


def run(program: Path, calls: Sequence[Call], folder: Path) -> list[Result]:
    """Raises RuntimeError with the sanitizer's report if it found something."""
    paths = folder / "calls", folder / "results"
    paths[0].write_bytes(struct.pack("<I", len(calls)) + b"".join(map(_packed, calls)))
    done = subprocess.run(
        [str(program), *map(str, paths)],
        capture_output=True, text=True, check=False, timeout=NEVER_ENDS, env={**os.environ, **ENVIRONMENT},
    )  # fmt: skip
    if done.returncode != 0:
        raise RuntimeError(f"exit code {done.returncode}\n{done.stderr[:6000]}")
    names = kernels(program)
    data = memoryview(paths[1].read_bytes())
    results = []
    for call in calls:
        result, data = _unpacked(call, data, names)
        results.append(result)
    assert len(data) == 0
    return results


def kernels(program: Path) -> dict[int, str]:
    """The kernels of the program: offset from main -> name with template arguments."""
    symbols = subprocess.run(["nm", "-C", str(program)], capture_output=True, text=True, check=True).stdout
    found, main = {}, 0
    for line in symbols.splitlines():
        matched = re.match(r"([0-9a-f]+) [tTwWV] (.*)", line)
        if matched is None:
            continue
        if matched[2] == "main":
            main = int(matched[1], 16)
        elif name := re.match(r"(?:void )?((?:[\w:]|\(anonymous namespace\))*\w+_kernel(?:<.*>)?)\(", matched[2]):
            found[int(matched[1], 16)] = name[1].replace("sslkernels::", "").replace("(anonymous namespace)::", "")
    return {address - main: name for address, name in found.items()}


def _packed(call: Call) -> bytes:
    parts = [_text(call.name)]
    for kind, values in (("q", call.ints), ("d", call.reals)):
        parts.append(struct.pack("<I", len(values)))
        parts += [_text(key) + struct.pack(f"<{kind}", value) for key, value in values.items()]
    parts.append(struct.pack("<I", len(call.arrays)))
    for key, tensor in call.arrays.items():
        data = _bytes(tensor)
        offset = call.offsets.get(key, 0) * tensor.itemsize
        parts.append(_text(key) + struct.pack("<QQ", len(data), offset) + data)
    return b"".join(parts)


def _text(text: str) -> bytes:
    return struct.pack("<I", len(text)) + text.encode()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _unpacked(call: Call, data: memoryview, names: dict[int, str]) -> tuple[Result, memoryview]:
    def take(size: int) -> memoryview:
        nonlocal data
        part, data = data[:size], data[size:]
        return part

    error = bytes(take(struct.unpack("<I", take(4))[0])).decode()
    (count,) = struct.unpack("<I", take(4))
    launched = [names[distance] for distance in struct.unpack(f"<{count}q", take(8 * count))]
    arrays = {}
    for key, tensor in call.arrays.items():
        part = bytearray(take(tensor.numel() * tensor.element_size()))
        values = torch.frombuffer(part, dtype=tensor.dtype) if part else tensor.new_empty(0)
        arrays[key] = values.reshape(tensor.shape)
    return Result(error, launched, arrays), data


if __name__ == "__main__" and _missing is None:
    for sanitizer in SANITIZERS:
        build(sanitizer)
