"""Every planted mistake still applies, and every mutant that survived is judged. `run.py` runs the mistakes."""

from pathlib import Path

import pytest
from planted import mutate
from planted.mistakes import MISTAKES
from planted.run import planted

ROOT = Path(__file__).resolve().parents[2]
EVERY = [mistake for mistakes in MISTAKES.values() for mistake in mistakes]


@pytest.mark.parametrize("mistake", EVERY, ids=lambda mistake: mistake.name)
def test_it_applies(mistake):
    planted((ROOT / mistake.file).read_text(), mistake)
    assert all((ROOT / part).exists() for part in mistake.tests.split() if part.startswith("tests/"))


def test_every_layer_has_enough_mistakes():
    assert all(len(mistakes) >= 15 for mistakes in MISTAKES.values())
    assert len({mistake.name for mistake in EVERY}) == len(EVERY)


def test_the_mutants_that_survived_are_judged():
    rows = [row for row in mutate.rows() if row["verdict"] != "void"]
    for row in rows:
        verdict, _, why = row["verdict"].partition(": ")
        assert verdict == "found" or (verdict in ("equivalent", "fixed") and why), row
    assert (ROOT / "tests" / "planted" / "mutants.md").read_text() == mutate.table(mutate.rows())
