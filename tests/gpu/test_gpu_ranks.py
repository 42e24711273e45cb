"""Slices of a vocabulary over GPUs (NCCL): the cases of tests/vocabulary/test_vocabulary_ranks.py."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from kernel_files import kernels

sys.path.insert(0, str(Path(__file__).parents[1] / "vocabulary"))

from test_vocabulary_ranks import CASES, assert_one_process, cases_of, spawned

pytestmark = [
    pytest.mark.gpu,
    kernels("linear_cross_entropy", "cross_entropy"),
    pytest.mark.costly("processes start"),
]


def worker(rank: int, world: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", rank=rank, world_size=world)
    torch.save(cases_of(rank, world, f"cuda:{rank}"), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    count = torch.cuda.device_count()
    return spawned(worker, 4 if count >= 4 else min(count, 2), tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("number", range(len(CASES)))
def test_slices_give_the_results_of_one_process(results, number):
    assert_one_process(number, [cases[number] for cases in results], (1e-5, 1e-11))
