"""A plugin of pytest that writes which lines of the package each test executes, and its seconds, for `mutate.py`.

The environment variable SSLKERNELS_EXECUTED names the file: {test: [seconds, {source file: [lines]}]}. It needs
coverage.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import coverage
import pytest

COVERAGE = coverage.Coverage(data_file=None, include=["*/sslkernels/*"], config_file=False)
SECONDS: dict[str, float] = {}


def pytest_sessionstart() -> None:
    COVERAGE.start()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    COVERAGE.switch_context(item.nodeid)
    begin = time.time()
    done = yield
    SECONDS[item.nodeid] = round(time.time() - begin, 3)
    COVERAGE.switch_context("")
    return done


def pytest_sessionfinish(session: pytest.Session) -> None:
    COVERAGE.stop()
    data = COVERAGE.get_data()
    lines: dict[str, dict[str, list[int]]] = {test: {} for test in SECONDS}
    for file in data.measured_files():
        name = str(Path(file).relative_to(session.config.rootpath))
        for line, tests in data.contexts_by_lineno(file).items():
            for test in tests:
                if test in lines:
                    lines[test].setdefault(name, []).append(line)
    written = {test: [seconds, lines[test]] for test, seconds in SECONDS.items()}
    Path(os.environ["SSLKERNELS_EXECUTED"]).write_text(json.dumps(written))
