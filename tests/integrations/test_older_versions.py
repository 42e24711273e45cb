"""The integrations with an older version of each library, installed into a folder of its own.

CI runs the losses of every library and some classes of models of each kind; `make test-slow` the ranks, torch.compile
and every class.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OLDER = (
    "diffusers==0.41.0",
    "lightly==1.5.26",
    "open_clip_torch==3.2.0",
    "sentence-transformers==6.1.0",
    "stable-pretraining==0.1.7",
    "transformers==5.23.0",
)
BETWEEN_RANKS_OR_COMPILED = "over_ranks or compile"


def run(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, cwd=ROOT,
        env={**os.environ, **variables},
    )  # fmt: skip


def installed(folder: Path, *arguments: str, **variables: str) -> None:
    """Installs into the folder; skips the test if the package index cannot be reached, and for no other reason."""
    command = (sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-compile", "--target", str(folder))
    result = run(*command, *arguments, **variables)
    if result.returncode and re.search(r"Retry\(total=0\b.* after connection broken by", result.stdout):
        pytest.skip("the package index cannot be reached")
    assert result.returncode == 0, result.stdout


@pytest.fixture(scope="module")
def older(tmp_path_factory):
    folder = tmp_path_factory.mktemp("older")
    installed(folder, *OLDER)
    yield folder
    shutil.rmtree(folder)  # pytest keeps the folders of three runs, 200 MB each


def assert_tests_pass(older: Path, *chosen: str) -> None:
    for requirement in OLDER:  # what the tests import is what was installed
        name, version = requirement.replace("-", "_").split("==")
        assert (older / f"{name}-{version}.dist-info").is_dir()
    files = [f"tests/integrations/{name}.py" for name in ("test_losses", "test_transformers")]
    command = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen, *files)
    result = run(*command, PYTHONPATH=f"{older}:{ROOT}", TRANSFORMERS_VERBOSITY="error")
    assert result.returncode == 0, result.stdout
    assert re.search(r"\d+ passed", result.stdout), result.stdout
    assert " skipped" not in result.stdout, result.stdout


@pytest.mark.full
def test_losses_and_models_of_older_versions(older):
    assert_tests_pass(older, "-m", "not slow", "-k", f"not ({BETWEEN_RANKS_OR_COMPILED})")


@pytest.mark.slow
def test_ranks_and_compiled_models_and_all_classes_of_older_versions(older):
    assert_tests_pass(older, "-m", "not slow", "-k", BETWEEN_RANKS_OR_COMPILED)
    assert_tests_pass(older, "-m", "slow")


def test_what_fails_without_a_package_index_is_skipped_and_nothing_else(tmp_path):
    closed = {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "1"}
    with pytest.raises(pytest.skip.Exception, match="cannot be reached"):
        installed(tmp_path, *OLDER, **closed)
    with pytest.raises(AssertionError, match="No matching distribution"):
        installed(tmp_path, *OLDER, PIP_NO_INDEX="1", PIP_FIND_LINKS=str(tmp_path))
