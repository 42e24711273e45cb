"""The examples reach what they promise, on real data."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

pytestmark = [pytest.mark.slow, pytest.mark.parametrize("seed", [0, 1, 2])]
EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs the main function of an example with arguments; its plot must be there afterwards."""
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def run(name: str, *arguments: object):
        module = pytest.importorskip(name)
        monkeypatch.setattr(sys, "argv", [name, "--output", str(tmp_path), *map(str, arguments)])
        threads = torch.get_num_threads()
        try:
            return module.main()
        finally:
            torch.set_num_threads(threads)
            assert (tmp_path / f"{name}.png").stat().st_size > 10_000

    return run


def test_code_is_found_by_its_docstring(run, seed):
    assert run("code_search", "--seed", seed, "--query", "shortest path") >= 0.75


def test_a_small_bert_learns_from_context(run, seed):
    loss, entropy, peaks = run("masked_lm", "--seed", seed)
    assert loss < entropy - 0.5
    without, with_it = peaks.values()
    assert without is None or with_it < without / 4


def test_negatives_and_prototypes_prevent_a_collapse(run, seed):
    results = run("joint_embedding", "--seed", seed)
    _, collapsed = results["attraction"]
    assert collapsed.others < -0.95
    assert collapsed.uniformity > -0.2
    for name in ("simclr", "dino"):
        accuracy, last = results[name]
        assert accuracy >= 0.95
        assert last.others > -0.5
        assert last.uniformity < -1


def test_latent_variables_give_several_answers(run, seed):
    best, sweep = run("latent_prediction", "--seed", seed)
    assert max(best["best of z"], best["codes"]) < 0.75 * best["no z"]
    least, most = sweep[0], sweep[-1]
    assert most.active == 0
    assert most.error_without_upper > 1.5 * most.error
    assert least.active > 0
    assert least.divergence > 10 * max(most.divergence, 0.01)
