"""Fixtures. Without a GPU, Triton's interpreter runs the kernels; it must be selected before triton is imported."""

from __future__ import annotations

import importlib.util
import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import interpreter
import pytest

import sslkernels as sk
from sslkernels.core import backends

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None:
    interpreter.repair()

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


# The interpreter spends most of its time on these; float32 on other backends covers the same code: `make test-slow`.
SLOW = (
    ("test_word2vec_cases.py", "eager", "triton", ("bfloat16", "float16", "float64")),
    ("test_energy_cases.py", "eager", "triton", ("bfloat16", "float16", "float64")),
    ("test_gumbel.py", "test_values_and_gradients", "triton", ("dtype1", "dtype2", "dtype3")),
    ("test_gumbel.py", "test_a_row_longer_than_a_tile", "triton", ("dtype1", "dtype2", "dtype3")),
    ("test_gumbel.py", "test_compile_equals_eager", "", ("triton", "reference")),
    ("test_gumbel_quantize.py", "test_against_the_one_hot_product", "triton", ("dtype1", "dtype2", "dtype3")),
    ("test_gumbel_quantize.py", "test_mixed_dtypes", "triton", ("False",)),
    ("test_gumbel_quantize.py", "test_compile_equals_eager", "", ("triton", "reference")),
    ("test_contrastive_autograd.py", "test_compile_equals_eager", "", ("triton", "reference")),
    ("test_free_energy.py", "test_compile_equals_eager", "", ("triton", "reference")),
    ("test_prediction_energy.py", "test_compile_equals_eager", "", ("triton", "reference")),
    ("test_gaussian.py", "triton", "", ("long_rows-bfloat16", "long_rows-float16", "long_rows-float64")),
    ("test_gaussian_noise.py", "test_compile_equals_eager", "True", ("triton", "reference")),
    ("test_triton_score_tiles.py", "test_energies_against_dense_float64", "", ("",)),
    ("test_vector_quantize.py", "triton", "", ("float16", "float64", "different_dtypes", "1e+25", "1e-16", "1e-30")),
    ("test_vector_quantize_autograd.py", "triton", "", ("float16", "float64", "wanted0", "wanted1", "wanted2")),
    ("test_vector_quantize_autograd.py", "test_compile_equals_eager", "True", ("triton", "reference")),
    (
        "test_vector_quantizer.py",
        "triton",
        "",
        ("dead", "within", "saved", "no_state", "float", "autocast", "finite", "cosine", "dot", "distinct", "decay"),
    ),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for file, first, second, any_of in SLOW:
            name = item.name
            if item.path.name == file and first in name and second in name and any(word in name for word in any_of):
                item.add_marker(pytest.mark.slow)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def device() -> str:
    return DEVICE


@pytest.fixture(params=backends.BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Runs the test on every backend that can run the module's `OP` here."""
    op = getattr(request.module, "OP", None)
    if request.param not in sk.available_backends(op, DEVICE):
        pytest.skip(f"{request.param}: {backends.why_not(op or 'cross_entropy', request.param, torch.device(DEVICE))}")
    with sk.use_backend(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def _poisoned_memory_and_fixed_seed():
    """Fills uninitialised memory with NaN, which torch does under deterministic algorithms, and fixes the seed."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def as_users_run(_poisoned_memory_and_fixed_seed):
    """Without deterministic algorithms, under which torch's scatter and index_copy copy from the host."""
    torch.use_deterministic_algorithms(False)
