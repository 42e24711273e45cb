"""Runs the steps of a command, each in its own process with a time limit, and writes their findings as they come.

At most four files in the folder OUT, no subfolders: `<command>.json` (steps, machine, hashes of the
kernel files), written before and after each step; `<command>_tests.jsonl` and `<command>_times.jsonl`, a line for each
test and each time; and `<command>.log`.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.plan import ROOT, Step, environment
from benchmarks.gpu.record import blobs

LOG_BYTES = 4 << 20  # of a step: the files that a run returns are limited
TAIL = 1500  # characters of a step's output in its entry


class Command:
    """A run of `first` or `second`."""

    def __init__(self, name: str, steps: Sequence[Step], out: Path, total: float) -> None:
        self.name, self.steps, self.out, self.total = name, steps, out, total
        out.mkdir(parents=True, exist_ok=True)
        self.report = out / f"{name}.json"
        self.log = out / f"{name}.log"
        self.tests = out / f"{name}_tests.jsonl"
        self.times = out / f"{name}_times.jsonl"
        for path in (self.report, self.log, self.tests, self.times):
            path.unlink(missing_ok=True)
        self.start = time.monotonic()
        planned = [{"step": s.name, "status": "not begun", "planned": s.planned, "limit": s.limit} for s in steps]
        self.content: dict[str, Any] = {"command": name, "files": blobs(), "steps": planned}

    def run(self) -> int:
        """0 if every step ended with 0."""
        for number, step in enumerate(self.steps):
            entry = self.content["steps"][number]
            later = sum(other.planned for other in self.steps[number + 1 :])
            left = self.total - (time.monotonic() - self.start)
            # A step that takes long costs the last ones their extra time first, and never their planned time.
            limit = min(step.limit, max(left - later, step.planned if left >= step.planned else left))
            if limit < 1:
                entry["status"] = "no time was left"
                continue
            self.run_step(step, entry, limit)
            if step.needed and entry["status"] != "passed":
                break
        self.write()
        print(self.table(), flush=True)
        return 0 if all(entry["status"] == "passed" for entry in self.content["steps"]) else 1

    def run_step(self, step: Step, entry: dict[str, Any], limit: float) -> None:
        entry |= {"status": "running", "limit": round(limit), "command": list(step.command)}
        self.write()
        print(f"== {step.name}: at most {limit:.0f} s", flush=True)
        begin = time.monotonic()
        variables = {**environment(), **step.variables, "OUTCOMES": str(self.tests), "TIMES": str(self.times)}
        variables["STEP"] = step.name
        paths = (str(ROOT), step.variables.get("PYTHONPATH"), os.environ.get("PYTHONPATH"))
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        output = self.log.with_suffix(".step")
        status = "passed"
        with output.open("wb") as file:
            try:
                process = subprocess.Popen(
                    step.command, cwd=ROOT, env=variables, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
                )
            except OSError as error:
                file.write(f"{error}\n".encode())
                status = "failed"
            else:
                try:
                    code = process.wait(limit)
                    status = "passed" if code == 0 else "failed"
                    entry["code"] = code
                except subprocess.TimeoutExpired:
                    status = "cut off"
                finally:
                    end(process)
        entry |= {"status": status, "seconds": round(time.monotonic() - begin, 1)}
        text = output.read_bytes()[-LOG_BYTES:]
        output.unlink()
        with self.log.open("ab") as log:
            log.write(f"== {step.name}: {status}\n".encode() + text + b"\n")
        entry["tail"] = text.decode(errors="replace")[-TAIL:]
        self.note_findings(text.decode(errors="replace"))
        self.write()

    def note_findings(self, text: str) -> None:
        """Adds the findings that the step printed as `FOUND {...}` to the report."""
        for line in text.splitlines():
            if line.startswith("FOUND "):
                with contextlib.suppress(ValueError):
                    self.content.setdefault("found", {}).update(json.loads(line[6:]))

    def write(self) -> None:
        write_json(self.report, self.content)

    def table(self) -> str:
        rows = [f"{e['step']:12} {e['status']:16} {e.get('seconds', '-'):>8} s" for e in self.content["steps"]]
        return "\n".join([f"{self.name}: {time.monotonic() - self.start:.0f} s of {self.total:.0f}", *rows])


def end(process: subprocess.Popen[bytes]) -> None:
    """Ends the process and its children, first by SIGTERM, so that findings are written."""
    for kind, patience in ((signal.SIGTERM, 3.0), (signal.SIGKILL, 10.0)):
        try:
            os.killpg(process.pid, kind)
        except ProcessLookupError:
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)


def write_json(path: Path, data: Any) -> None:
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(json.dumps(data, indent=1) + "\n")
    temporary.replace(path)
