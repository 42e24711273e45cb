"""Fixtures. Without a GPU, Triton's interpreter runs the kernels; it must be selected before triton is imported."""

from __future__ import annotations

import importlib.util
import os

# OpenMP reads it when torch is loaded: threads that wait in a loop would take the cores from the other test processes.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import interpreter
import pytest
import tiers
from cases import BACKENDS

import sslkernels as sk
from sslkernels.core import backends

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None:
    interpreter.repair()

STARTED = pytest.StashKey[float]()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Outputs of an operator that share memory are only warned of, unless the environment variable CI is set.
torch._functorch.config.error_on_custom_op_aliasing = True


if not torch.cuda.is_available():
    collect_ignore = ["gpu"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    # Tests on a GPU have no cases of "cpu", which could only be skipped.
    items[:] = [i for i in items if not (i.get_closest_marker("gpu") and tiers.parameters(i).get("backend") == "cpu")]
    tiers.assign(items)


def cpu_seconds() -> float:
    """The CPU time of this process and of its children that have ended."""
    return sum(os.times()[:4])


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    item.stash[STARTED] = cpu_seconds()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    item.user_properties.append(("cpu_seconds", cpu_seconds() - item.stash[STARTED]))


def pytest_terminal_summary(terminalreporter) -> None:
    """Names the tests that cost much and do not say why. They pass: a busy machine counts more seconds."""
    for report in terminalreporter.stats.get("", []):
        seconds = dict(report.user_properties).get("cpu_seconds", 0.0)
        if (
            report.when == "teardown"
            and seconds > tiers.COSTLY_SECONDS
            and not {"costly", "full", "slow"} & {*report.keywords}
        ):
            terminalreporter.write_line(f"COSTLY, without a reason: {seconds:.1f} s of CPU time, {report.nodeid}")


@pytest.fixture
def device() -> str:
    return DEVICE


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Runs the test on every backend that can run the module's `OP` on the test's tensors, which are on the
    GPU where there is one if the test is marked `gpu` or asks for the fixture `device`, and on the host otherwise."""
    op = getattr(request.module, "OP", None)
    there = "device" in request.fixturenames or request.node.get_closest_marker("gpu") is not None
    where = DEVICE if there else "cpu"
    if request.param not in sk.available_backends(op, where):
        pytest.skip(f"{request.param}: {backends.why_not(op or 'cross_entropy', request.param, torch.device(where))}")
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


@pytest.fixture(params=["aot_eager", pytest.param("inductor", marks=pytest.mark.full)])
def compiler(request):
    """The backend of torch.compile: tracing and autograd alone, or with the compiler, which takes most of the time."""
    return request.param
