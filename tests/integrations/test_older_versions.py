"""The integrations with the version before the newest of each library, installed into a folder of its own."""

from __future__ import annotations

import os
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
    "stable-pretraining==0.1.7",  # whose losses over ranks are another
    "transformers==5.22.2",
)


def run(*command: str, **variables: str) -> str:
    result = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, cwd=ROOT,
        env={**os.environ, **variables},
    )  # fmt: skip
    assert result.returncode == 0, result.stdout
    return result.stdout


@pytest.mark.slow
def test_the_integrations_with_older_versions(tmp_path):
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(tmp_path), *OLDER)
    chosen = ("-q", "-p", "no:cacheprovider", "-m", "not slow", "-k", "not over_ranks and not compile")
    files = [f"tests/integrations/{name}.py" for name in ("test_losses", "test_transformers")]
    printed = run(sys.executable, "-m", "pytest", *chosen, *files, PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert " skipped" not in printed, printed
