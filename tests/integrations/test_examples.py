"""The examples of the docstrings of the integrations run."""

from __future__ import annotations

import doctest
import importlib

import pytest
from integrations_peers import integration, needs

NAMES = ("diffusers", "lightly", "open_clip", "sentence_transformers", "transformers")


@pytest.mark.parametrize("name", NAMES)
def test_example(name):
    if name in ("lightly", "open_clip"):
        module = integration(name)
    else:
        needs(name)
        module = importlib.import_module(f"sslkernels.integrations.{name}")
    finder = doctest.DocTestFinder(recurse=False)
    (example,) = finder.find(module, name)
    assert example.examples
    runner = doctest.DocTestRunner(optionflags=doctest.IGNORE_EXCEPTION_DETAIL)
    assert runner.run(example).failed == 0
