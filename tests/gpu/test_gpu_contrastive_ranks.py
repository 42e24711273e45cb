"""Contrastive energies over GPUs (NCCL): the cases of tests/contrastive/test_contrastive_blocks.py."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from kernel_files import kernels

sys.path.insert(0, str(Path(__file__).parents[1] / "contrastive"))

from test_contrastive_blocks import CASES, assert_one_process, cases_of, spawned

pytestmark = [
    pytest.mark.gpu,
    kernels("contrastive_energy"),
    pytest.mark.costly("processes start"),
]


def worker(rank: int, world: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", rank=rank, world_size=world)
    torch.save(cases_of(rank, world, CASES["pairwise"], f"cuda:{rank}"), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    count = torch.cuda.device_count()
    return spawned(tmp_path_factory.mktemp("ranks"), 4 if count >= 4 else min(count, 2), worker)


@pytest.mark.parametrize("number", range(len(CASES["pairwise"])))
def test_ranks_give_the_results_of_one_process(results, number):
    case = CASES["pairwise"][number]
    assert_one_process(number, case, [found[2 * number : 2 * number + 2] for found in results], (1e-5, 1e-11))
