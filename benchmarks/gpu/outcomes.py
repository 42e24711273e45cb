"""A pytest plugin that writes a line for each test as soon as it ends, with the kernel files that the test runs.

The file is named by the variable OUTCOMES. Its lines are {"planned": {kernel file: number of tests}}, once, and
{"test", "outcome", "seconds", "kernels"}; a run that is ended leaves whole lines.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

FOLDERS = {"cuda": "csrc/", "triton": "sslkernels/"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--each", type=int, help="run only this many cases of each test and backend")


def kernels_of(item: pytest.Item) -> list[str]:
    """The files of the mark `kernels` that belong to the backend of the case; all if the case names no backend."""
    mark = item.get_closest_marker("kernels")
    if mark is None or not item.get_closest_marker("gpu"):
        return []
    folder = FOLDERS.get(backend_of(item) or "")
    if folder is None and backend_of(item) is not None:
        return []
    return [file for file in mark.args if folder is None or file.startswith(folder)]


def backend_of(item: pytest.Item) -> str | None:
    parameters = getattr(item, "callspec", None)
    named = parameters.params if parameters is not None else {}
    return next((named[name] for name in ("backend", "backend_name") if isinstance(named.get(name), str)), None)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    each = config.getoption("--each")
    if each is None:
        return
    chosen: Counter[tuple[str, str | None]] = Counter()
    kept = []
    for item in items:
        key = (item.nodeid.partition("[")[0], backend_of(item))
        chosen[key] += 1
        if chosen[key] <= each:
            kept.append(item)
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
    items[:] = kept


def pytest_collection_finish(session: pytest.Session) -> None:
    """The first process writes the plan, which is the same in all of them."""
    if os.environ.get("PYTEST_XDIST_WORKER", "gw0") == "gw0" and session.items:
        planned = Counter(file for item in session.items for file in kernels_of(item))
        write({"planned": dict(sorted(planned.items()))})


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    item.user_properties.append(("kernels", kernels_of(item)))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """In the main process, also for tests of the others."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        return
    if report.when == "call" or report.outcome != "passed":
        line: dict[str, Any] = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)}
        line["kernels"] = dict(report.user_properties).get("kernels", [])
        if report.failed:
            line["when"], line["error"] = report.when, report.longreprtext[-700:]
        write(line)


def write(line: dict[str, Any]) -> None:
    path = os.environ.get("OUTCOMES")
    if path:
        with Path(path).open("a") as file:
            file.write(json.dumps({"step": os.environ.get("STEP", ""), **line}) + "\n")
