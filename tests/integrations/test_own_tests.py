"""Test files that the libraries ship, with the classes of this package in place of theirs."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from integrations_peers import needs

ROOT = Path(__file__).resolve().parents[2]
# Read by pytest before the test file, which then imports these modules: without what trains models.
CONFTEST = """
import sys, types
import integrations_peers
ours = integrations_peers.integration("stable_pretraining")
for name in ("stable_pretraining", "stable_pretraining.losses"):
    sys.modules[name] = types.ModuleType(name)
vars(sys.modules["stable_pretraining.losses"]).update({name: getattr(ours, name) for name in ours.__all__})
"""


@pytest.mark.full
def test_the_tests_of_stable_pretraining(tmp_path):
    """It alone ships tests of these losses in its wheel; the source distributions of the others have none."""
    needs("stable_pretraining")
    (folder,) = importlib.util.find_spec("stable_pretraining").submodule_search_locations
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_clip_loss.py").write_text((Path(folder) / "tests/unit/test_clip_loss.py").read_text())
    paths = ":".join(str(ROOT / path) for path in ("", "tests", "tests/integrations"))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--rootdir={tmp_path}", str(tmp_path)]
    variables = {**os.environ, "PYTHONPATH": paths}
    result = subprocess.run(command, env=variables, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout
