"""python -m benchmarks.gpu: first and second run on a machine with a GPU; join puts together what came back."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from benchmarks import environment
from benchmarks.gpu import page, plan, record, runner

NO_COMMIT = "these kernel files differ from the commit: {}"


def execute(options: argparse.Namespace) -> int:
    steps = plan.COMMANDS[options.what]()
    if options.list:
        for step in steps:
            print(f"{step.name:10} planned {step.planned:4} s, at most {step.limit:4} s")
        print(f"planned {sum(step.planned for step in steps)} s of {plan.TOTAL}")
        return 0
    if options.rehearse:
        steps = [plan.rehearsed(step) for step in steps]
    return runner.Command(options.what, steps, options.out, options.total).run()


def join(options: argparse.Namespace) -> int:
    found = record.shards(options.folders)
    commit = environment.git("rev-parse", "--verify", f"{options.commit}^{{commit}}")
    try:
        if commit is None:
            raise ValueError("there is no git repository here")
        now = record.blobs()
        foreign = [name for name, blob in now.items() if environment.git("rev-parse", f"{commit}:{name}") != blob]
        if foreign:
            raise ValueError(NO_COMMIT.format(", ".join(foreign)))
        entries = record.validated(found, commit)
    except ValueError as error:
        print(f"nothing was recorded: {error}", file=sys.stderr)
        return 1
    path = record.RESULTS / record.VALIDATED
    known = json.loads(path.read_text()) if path.exists() else {}
    # A failed test withdraws the older entry of its files; a run that did not test a file leaves its entry.
    failed = record.failed_files(found)
    kept = {
        name: entry
        for name, entry in known.items()
        if name in now and not (name in failed and entry["blob"] == now[name])
    }
    runner.write_json(path, dict(sorted({**kept, **entries}.items())))
    times: list[dict[str, Any]] = [line for shard in found for line in shard.times]
    if times:
        runner.write_json(record.RESULTS / record.TIMES, {"machine": found[0].machine, "times": times})
        faster = record.faster_backends(times)
        if faster:
            chosen = json.loads(record.PREFERENCE.read_text()) if record.PREFERENCE.exists() else {}
            chosen[found[0].machine["architecture"]] = faster
            runner.write_json(record.PREFERENCE, chosen)
    page.write()
    missing = sorted(now.keys() - entries.keys())
    print(f"{len(entries)} of {len(now)} kernel files are validated; not: {', '.join(missing) or 'none'}")
    for shard in found:
        for step in shard.content["steps"]:
            if step["status"] != "passed":
                print(f"{shard.command}: {step['step']}: {step['status']}")
        for line in shard.tests:
            if line.get("outcome") == "failed":
                print(f"{shard.command}: {line['test']}: {line.get('error', '')[-200:]}")
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="what", required=True)
    for name in plan.COMMANDS:
        command = commands.add_parser(name)
        command.add_argument("--rehearse", action="store_true", help="without a GPU: every step begins and ends")
        command.add_argument("--list", action="store_true", help="print the steps and their seconds")
        command.add_argument("--total", type=float, default=plan.TOTAL, help="seconds of the whole command")
        out = Path(os.environ.get("OUT") or plan.ROOT / "build" / "gpu")
        command.add_argument("--out", type=Path, default=out, help="default: the variable OUT, or build/gpu")
    commands.add_parser("page")
    joining = commands.add_parser("join")
    joining.add_argument("folders", nargs="+", type=Path)
    joining.add_argument("--commit", default="HEAD")
    options = parser.parse_args(arguments)
    if options.what == "page":
        page.write()
        return 0
    return join(options) if options.what == "join" else execute(options)


if __name__ == "__main__":
    sys.exit(main())
