"""The two commands for a machine with a GPU, without one: every step begins and ends, findings survive a cut, and
results are joined into the record."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import environment, peers
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import build, page, plan, record, runner
from benchmarks.gpu.plan import Step

ROOT = Path(__file__).parents[2]
FACTS = {"device": "some GPU", "date": "2026-01-01", "torch": "2", "triton": "3"}
MACHINE = {**FACTS, "architecture": "sm_90"}


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def report_of(out: Path, name: str = "first") -> dict:
    return json.loads((out / f"{name}.json").read_text())


@pytest.mark.parametrize("name", plan.COMMANDS)
def test_a_command_is_planned_to_fit(name):
    steps = plan.COMMANDS[name]()
    assert sum(step.planned for step in steps) <= plan.TOTAL == 360
    assert all(step.planned < step.limit for step in steps)
    assert len({step.name for step in steps}) == len(steps)


def test_a_failed_step_stops_no_other(tmp_path):
    steps = [
        Step("bad", python("print('why'); raise SystemExit(3)"), 1, 60),
        Step("absent", ["/nonexistent/program"], 1, 60),
        Step("good", python('print(\'FOUND {"machine": {"device": "x"}}\')'), 1, 60),
    ]
    assert runner.Command("first", steps, tmp_path, 300).run() == 1
    bad, absent, good = report_of(tmp_path)["steps"]
    assert (bad["status"], bad["code"], bad["tail"]) == ("failed", 3, "why\n")
    assert absent["status"] == "failed"
    assert good["status"] == "passed"
    assert report_of(tmp_path)["found"] == {"machine": {"device": "x"}}
    assert {path.name for path in tmp_path.iterdir()} == {"first.json", "first.log"}


def test_without_a_device_nothing_else_runs(tmp_path):
    steps = [Step("facts", python("raise SystemExit(1)"), 1, 60, needed=True), Step("tests", python(""), 1, 60)]
    assert runner.Command("first", steps, tmp_path, 300).run() == 1
    assert [step["status"] for step in report_of(tmp_path)["steps"]] == ["failed", "not begun"]


@pytest.mark.full
def test_a_step_beyond_its_limit_is_ended_with_its_children(tmp_path):
    child = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']).wait()"
    line = "import os; open(os.environ['OUTCOMES'], 'a').write('{\"test\": 1}\\n'); "
    steps = [Step("endless", python(line + child), 1, 3), Step("next", python(""), 1, 60)]
    assert runner.Command("first", steps, tmp_path, 300).run() == 1
    assert [step["status"] for step in report_of(tmp_path)["steps"]] == ["cut off", "passed"]
    assert list(record.lines(tmp_path / "first_tests.jsonl")) == [{"test": 1}]


@pytest.mark.full
def test_later_steps_keep_their_time(tmp_path):
    steps = [Step("first", python("import time; time.sleep(600)"), 1, 600), Step("last", python(""), 9, 60)]
    start = time.monotonic()
    assert runner.Command("first", steps, tmp_path, 12).run() == 1
    assert time.monotonic() - start < 60
    assert [step["limit"] for step in report_of(tmp_path)["steps"]] == [3, pytest.approx(9, abs=2)]


def test_a_killed_command_keeps_its_findings(tmp_path):
    code = (
        "import sys; from pathlib import Path; from benchmarks.gpu import plan, runner; Step = plan.Step\n"
        "steps = [Step('a', [sys.executable, '-c', ''], 1, 60), Step('b', ['sleep', '600'], 1, 600)]\n"
        f"runner.Command('first', steps, Path({str(tmp_path)!r}), 300).run()"
    )
    process = subprocess.Popen(python(code), cwd=ROOT, start_new_session=True)
    deadline = time.monotonic() + 120  # for a machine that is busy
    while time.monotonic() < deadline:
        if (tmp_path / "first.json").exists() and report_of(tmp_path)["steps"][1]["status"] == "running":
            break
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert [step["status"] for step in report_of(tmp_path)["steps"]] == ["passed", "running"]


@pytest.mark.full
def test_a_test_names_every_kernel_file(tmp_path):
    step = plan.rehearsed(Step("all", plan.tests("not slow"), 1, 600))
    lines = tmp_path / "tests.jsonl"
    variables = {**plan.environment(), **step.variables, "OUTCOMES": str(lines)}
    variables["PYTHONPATH"] = os.pathsep.join([str(ROOT), variables["PYTHONPATH"]])
    done = subprocess.run(step.command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (line,) = record.lines(lines)
    assert set(line["planned"]) == set(record.entries())
    assert min(line["planned"].values()) > 0


@pytest.mark.full
def test_backends_match_the_device_of_a_test():
    """On a machine with a GPU, tests marked `gpu` run on its backends, and tests of host tensors on the others."""
    files = ["tests/gpu/test_gpu_random.py", "tests/contrastive/test_negatives_by_index.py"]
    program = [sys.executable, "-m", "pytest", "-p", "simulated_gpu", "-p", "no:cacheprovider", "--setup-only", "-rs"]
    variables = {**plan.environment(), "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    done = subprocess.run([*program, *files], cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    shown = done.stdout
    gpu = [line for line in shown.splitlines() if "test_gpu_random.py" in line and "fixtures used" in line]
    names = ("cpu", "triton", "reference")
    assert [name for name in names if any(f"[{name}" in line or f"{name}-" in line for line in gpu)] == [*names[1:]]
    skipped = [line for line in shown.splitlines() if line.startswith("SKIPPED") and "test_gpu_random" in line]
    assert not [line for line in skipped if "runs on" in line]
    host = [line for line in shown.splitlines() if "test_negatives_by_index.py" in line and "fixtures used" in line]
    assert host
    assert not [line for line in host if "[triton" in line or "[cuda" in line]


@pytest.mark.full
@pytest.mark.costly("every step of a command")
@pytest.mark.parametrize("name", plan.COMMANDS)
def test_a_rehearsal_passes(name, tmp_path):
    out = tmp_path / "out"
    variables = {**os.environ, "OUT": str(out), "PYTHONPATH": str(ROOT)}
    program = [sys.executable, "-m", "benchmarks.gpu", name, "--rehearse", "--total", str(10 * plan.PATIENCE)]
    done = subprocess.run(program, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + (out / f"{name}.log").read_text()[-3000:]
    report = report_of(out, name)
    assert [step["step"] for step in report["steps"]] == [step.name for step in plan.COMMANDS[name]()]
    assert all(step["status"] == "passed" for step in report["steps"])
    ends = (".json", ".log", "_tests.jsonl", "_times.jsonl")
    assert {path.name for path in out.iterdir()} == {f"{name}{end}" for end in ends}
    planned = {line["step"]: line["planned"] for line in record.lines(out / f"{name}_tests.jsonl")}
    assert all(planned.values())
    assert set(planned) == ({"kernels", "tests"} if name == "first" else {"large", "memcheck", "racecheck"})
    assert [line for line in record.lines(out / f"{name}_times.jsonl") if line["status"] == "ok"]
    record.same_files(record.shards([out]), record.blobs())


def test_the_build_needs_neither_pip_nor_setuptools():
    configure, compile_ = build.commands("9.0a", Path("b"), Path("t"))
    assert "-DSSLKERNELS_CUDA=1" in configure
    assert "-DCMAKE_LIBRARY_OUTPUT_DIRECTORY=t" in configure
    assert compile_[1:3] == ["--build", "b"]
    source = (ROOT / "benchmarks/gpu/build.py").read_text().partition('"""\n')[2]
    assert "setup.py" not in source


def test_nvcc_is_found_where_cuda_is_installed(monkeypatch):
    monkeypatch.setenv("PATH", "/usr/bin")
    assert plan.environment()["PATH"] == "/usr/bin:/usr/local/cuda/bin"


def test_peers_are_installed_from_their_wheels():
    assert {"--no-index", "--no-deps", str(plan.WHEELS)} <= set(plan.install_peers())
    pinned = [line.split("==")[0] for line in plan.PEERS.read_text().splitlines() if "==" in line and line[0] != "#"]
    assert set(pinned) <= set(peers.PACKAGES.values())


def test_blob_hash_equals_git():
    assert record.blob_hash(b"hello\n") == "ce013625030ba8dba906f756967f9e9ca394464a"


def test_kernels_that_use_a_header():
    users = record.kernel_files()
    assert users["csrc/latent/gumbel_rows_cuda.h"] == {"csrc/latent/gumbel.cu"}
    assert {"csrc/latent/gaussian.cu", "csrc/random/alias_table.cu"} <= users["csrc/random/philox.h"]
    assert users["csrc/core/cuda/launch.cu"] == users["csrc/core/cuda/launch.h"]
    assert "sslkernels/latent/triton/gumbel_rows.py" in users["sslkernels/random/triton/transforms.py"]
    assert not [name for name in users if "_cpu" in name or "/cpu/" in name]


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """Two kernels, one of which includes a header, and the file of the record; in git all are as they are here."""
    root = tmp_path / "tree"
    for name, text in {
        "csrc/f/a.cu": '#include "f/shared.h"\n',
        "csrc/f/b.cu": '#include "f/shared.h"\n',
        "csrc/f/shared.h": "",
        "sslkernels/f/triton/c.py": "def c_kernel(): ...",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    monkeypatch.setattr(record, "ROOT", root)
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(record, "PREFERENCE", tmp_path / "preference.json")
    monkeypatch.setattr(page, "PAGE", tmp_path / "gpu.md")

    def git(*arguments: str) -> str:
        if "--verify" in arguments:
            return "c0ffee"
        return record.blob_hash((root / arguments[1].partition(":")[2]).read_bytes())

    monkeypatch.setattr(environment, "git", git)
    return root


A, B, C, SHARED = "csrc/f/a.cu", "csrc/f/b.cu", "sslkernels/f/triton/c.py", "csrc/f/shared.h"


def shard(folder: Path, name: str, outcomes: list[tuple[str, str]], cut: bool = False) -> Path:
    """What a command would have written: outcomes (kernel file, outcome)."""
    folder.mkdir(exist_ok=True)
    steps = [{"step": "tests", "status": "cut off" if cut else "passed"}]
    content = {"command": name, "files": record.blobs(), "steps": steps, "found": {"machine": MACHINE}}
    (folder / f"{name}.json").write_text(json.dumps(content))
    planned = {file: sum(file == other for other, _ in outcomes) + cut for file, _ in outcomes}
    lines = [{"planned": planned}, *({"test": "t", "outcome": o, "kernels": [f]} for f, o in outcomes)]
    text = "\n".join(map(json.dumps, lines))
    (folder / f"{name}_tests.jsonl").write_text(text + ('\n{"test": "t", "outc' if cut else "\n"))
    times = [
        {"family": "op", "public": "op", "case": case, "provider": f"sslkernels {b}", "status": "ok", "seconds": s}
        for case, b, s in (("a", "cuda", 1.0), ("a", "triton", 3.0), ("b", "cuda", 2.0), ("b", "triton", 1.0))
    ]
    times += [
        {**times[0], "case": "c"},
        {**times[1], "status": "OutOfMemoryError"},
        {**times[0], "family": "x_kernels"},
    ]
    (folder / f"{name}_times.jsonl").write_text("\n".join(map(json.dumps, times)) + "\n")
    return folder


def recorded(tmp_path: Path) -> dict:
    return json.loads((tmp_path / record.VALIDATED).read_text())


def test_shards_are_joined_by_kernel_file(tree, tmp_path, capsys):
    """A header is validated with all that include it; a test that fails takes back what passed elsewhere."""
    one = shard(tmp_path / "1", "first", [(A, "passed"), (A, "passed"), (C, "passed"), (C, "skipped")])
    assert command.main(["join", str(one)]) == 0
    assert set(recorded(tmp_path)) == {A, C}
    entry = {"commit": "c0ffee", "blob": record.blobs()[A], **FACTS, "passed": 2, "planned": 2}
    assert recorded(tmp_path)[A] == entry
    assert recorded(tmp_path)[C]["passed"] == 1
    two = shard(tmp_path / "2", "second", [(B, "passed"), (C, "failed")])
    assert command.main(["join", str(one), str(two)]) == 0
    assert set(recorded(tmp_path)) == {A, B, SHARED}
    assert recorded(tmp_path)[SHARED]["passed"] == 3
    assert C in capsys.readouterr().out
    assert len(json.loads((tmp_path / record.TIMES).read_text())["times"]) == 14
    assert json.loads(record.PREFERENCE.read_text()) == {"sm_90": {"op": ["cuda", "triton"]}}


def test_a_cut_off_run_is_joined(tree, tmp_path, capsys):
    folder = shard(tmp_path / "1", "first", [(A, "passed")], cut=True)
    assert command.main(["join", str(folder)]) == 0
    assert (recorded(tmp_path)[A]["passed"], recorded(tmp_path)[A]["planned"]) == (1, 2)
    assert "first: tests: cut off" in capsys.readouterr().out


def test_nothing_is_recorded_of_other_files(tree, tmp_path, monkeypatch, capsys):
    folder = shard(tmp_path / "1", "first", [(A, "passed")])
    (tree / A).write_text("another kernel")
    assert command.main(["join", str(folder)]) == 1
    assert A in capsys.readouterr().err
    monkeypatch.setattr(environment, "git", lambda *arguments: "c0ffee")
    folder = shard(tmp_path / "1", "first", [(A, "passed")])
    assert command.main(["join", str(folder)]) == 1
    assert command.main(["join", str(tmp_path / "none")]) == 1
    assert not (tmp_path / record.VALIDATED).exists()


def test_an_older_entry_of_another_version_is_kept(tree, tmp_path):
    """The record says at which commit a file last passed; a file that failed as it is now loses its entry, and one that
    the run did not test keeps it."""
    old = {
        B: {"commit": "old", "blob": "older"},
        C: {"commit": "old", "blob": record.blobs()[C]},
        SHARED: {"commit": "old", "blob": record.blobs()[SHARED]},
        "gone.cu": {"blob": "x"},
    }
    (tmp_path / record.VALIDATED).write_text(json.dumps(old))
    folder = shard(tmp_path / "1", "first", [(A, "passed"), (C, "failed")])
    assert command.main(["join", str(folder)]) == 0
    assert {name: entry["commit"] for name, entry in recorded(tmp_path).items()} == {
        A: "c0ffee",
        B: "old",
        SHARED: "old",
    }


def test_the_page_is_current():
    """`python -m benchmarks.gpu page` after a change of kernels, floors or results."""
    assert page.PAGE.read_text() == page.page()


def test_the_page_shows_the_measurements(tree, tmp_path):
    folder = shard(tmp_path / "1", "first", [(A, "passed")], cut=True)
    _, case = next(page.kernels())
    lines = [
        {"case": case.name, "provider": provider, "status": "ok", "seconds": seconds, "family": "x_kernels"}
        for provider, seconds in ((page.COPY, 1.0), ("sslkernels cuda", 1.25), ("sslkernels triton", 2.0))
    ]
    (folder / "first_times.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert command.main(["join", str(folder)]) == 0
    written = (tmp_path / "gpu.md").read_text()
    assert f"| `{A}` | 1 of 2 passed | c0ffee | some GPU | 2026-01-01 |" in written
    assert f"| `{B}` | not validated |" in written
    (row,) = [line for line in written.splitlines() if line.startswith(f"| {case.name} |")]
    assert [cell.strip() for cell in row.split("|")][5:8:2] == ["0.80", "0.50"]
    assert "Measured on: some GPU." in written
