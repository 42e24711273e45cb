"""LinearHead and prototypes over GPUs (NCCL): the cases of tests/vocabulary/test_linear_head.py and
test_prototype_ranks.py."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from kernel_files import kernels

sys.path.insert(0, str(Path(__file__).parents[1] / "vocabulary"))

import test_linear_head as linear_head
import test_prototype_ranks as prototypes
from test_vocabulary_ranks import spawned

pytestmark = [
    pytest.mark.gpu,
    kernels("linear_cross_entropy", "linear_distillation"),
    pytest.mark.costly("processes start"),
]
DATA_PARALLEL = [
    ("ddp", False),
    ("ddp", True),
    ("root", False),
    ("root", True),
    ("own group", False),
    ("tied group", True),
]
NUMBERS = range(len(list(prototypes.cases())))


def worker(rank: int, world: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", rank=rank, world_size=world)
    device = f"cuda:{rank}"
    found = linear_head.heads(rank, world, device), prototypes.results_of(rank, world, device)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    count = torch.cuda.device_count()
    return spawned(worker, 4 if count >= 4 else min(count, 2), tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("number", NUMBERS)
def test_slices_of_prototypes_are_the_whole(results, number):
    prototypes.assert_whole(number, [found for _, found in results], "reference", (1e-4, 1e-11))


@pytest.mark.parametrize(("name", "tied"), DATA_PARALLEL)
def test_data_parallel_gradients(results, name, tied):
    heads, _ = results[0]
    _, want = linear_head.expected(tied)
    for got, grad in zip(heads[name, tied], want, strict=True):
        torch.testing.assert_close(got, grad, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", ["plan", "replicated", "kept"])
def test_a_tensor_parallel_plan(results, name, reduction):
    heads, _ = results[0]
    linear_head.compare(heads[name, reduction], linear_head.expected(False, reduction=reduction))


@pytest.mark.parametrize("name", ["tp mesh", "given group"])
def test_a_sharded_weight_is_the_slice(results, name):
    heads, _ = results[0]
    linear_head.compare(heads[name], linear_head.expected(False))
