"""nn.VectorQuantizer over process groups (gloo): every rank gets the codebook of one process with all rows."""

from __future__ import annotations

import copy
import io
import os
import socket
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim.swa_utils import AveragedModel

import sslkernels as sk
from sslkernels.core.modules import SharedGroup

pytestmark = pytest.mark.costly("processes start")
STEPS = 5
OPTIONS = {
    "averages": {"revive_below": None},
    "revived": {"revive_below": 0.6, "decay": 0.5},
    "half": {"revive_below": 0.6, "decay": 0.5, "half": True},
    "learned": {"decay": None},
    "more_codes_than_rows": {"revive_below": 0.6, "decay": 0.5, "codes": 60},
    "kmeans": {"revive_below": 0.6, "decay": 0.5, "init": "kmeans"},
    "cosine": {"revive_below": 0.6, "decay": 0.5, "metric": "cosine"},
    "residual": {"revive_below": 0.6, "decay": 0.5, "levels": 3},
}


def data(world: int, half: bool):
    """Rows of each rank at each step: different numbers of rows, once none, once with a row that is not finite."""
    generator = torch.Generator().manual_seed(0)
    steps = []
    for step in range(STEPS):
        parts = [torch.randn(9 + 4 * rank, 3, generator=generator) for rank in range(world)]
        if step == 2 and world > 1:
            parts[1] = parts[1][:0]
        if step == 3:
            parts[-1][2, 1] = float("inf")
        steps.append([part.half() if half else part for part in parts])
    return steps


def module_of(name: str, group) -> sk.nn.VectorQuantizer:
    options = {"codes": 8, **OPTIONS[name]}
    options.pop("half", None)
    if "levels" in options:
        levels, codes = options.pop("levels"), options.pop("codes")
        return sk.nn.ResidualVectorQuantizer(levels, codes, 3, seed=5, process_group=group, **options)
    return sk.nn.VectorQuantizer(options.pop("codes"), 3, seed=5, process_group=group, **options)


def train(name: str, group, batches):
    module, found = module_of(name, group), []
    for rows in batches:
        quantized = module(rows)
        found.append((quantized.indices, quantized.values))
    return found, module.state_dict()


def train_ddp(rank: int, steps, group):
    """A quantizer between the layers of a DDP model, which broadcasts buffers; every rank has its own seeds."""
    torch.manual_seed(rank)
    quantizer = sk.nn.VectorQuantizer(8, 4, decay=0.5, revive_below=0.6, process_group=group)
    model = torch.nn.ModuleList([torch.nn.Linear(3, 4), quantizer, torch.nn.Linear(4, 3)])

    class Autoencoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = model

        def forward(self, x):
            quantized = self.layers[1](self.layers[0](x))
            return (self.layers[2](quantized.values) - x).square().mean() + quantized.commitment

    ddp = torch.nn.parallel.DistributedDataParallel(Autoencoder(), process_group=group)
    optimizer = torch.optim.SGD(ddp.parameters(), 0.1)
    for parts in (steps[0], steps[1], steps[4]):
        optimizer.zero_grad()
        ddp(parts[rank]).backward()
        optimizer.step()
    return ddp.state_dict()


def outcome(call) -> str:
    """The error or the first warning of a call, as text."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            call()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return next((str(warning.message) for warning in caught if "VectorQuantizer" in str(warning.message)), "")


def sharded(rows, group, init):
    """A learned quantizer under FSDP2: on a CPU, in a root that holds it."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = torch.nn.Sequential(sk.nn.VectorQuantizer(8, 3, decay=None, init=init, process_group=group))
    fully_shard(model, mesh=mesh)
    model(rows)


def copies(rows, group):
    """Deep copies and pickles train with the group of the module."""
    module = sk.nn.VectorQuantizer(8, 3, decay=0.5, process_group=group)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    twins = [copy.deepcopy(module), AveragedModel(module).module, torch.load(file, weights_only=False)]
    assert all(twin.process_group is group for twin in twins)
    module(rows)
    for twin in twins:
        twin(rows)
        assert all(torch.equal(value, twin.state_dict()[name]) for name, value in module.state_dict().items())


def flows(rows, group):
    alone = sk.nn.VectorQuantizer
    copies(rows, group)
    return {
        "averages": outcome(lambda: alone(8, 3)(rows)),
        "averages in eval": outcome(lambda: alone(8, 3).eval()(rows)),
        "averages of a group": outcome(lambda: alone(8, 3, process_group=group)(rows)),
        "learned": outcome(lambda: alone(8, 3, decay=None)(rows)),
        "learned, normal": outcome(lambda: alone(8, 3, decay=None, init="normal")(rows)),
        "sharded": outcome(lambda: sharded(rows, group, "data")),
        "sharded, normal": outcome(lambda: sharded(rows, group, "normal")),
    }


def worker(rank: int, world: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    results = {}
    for name, options in OPTIONS.items():
        batches = [parts[rank] for parts in data(world, options.get("half", False))]
        results[name] = train(name, dist.group.WORLD, batches)
    results["ddp"] = train_ddp(rank, data(world, False), dist.group.WORLD)
    results["flows"] = flows(data(world, False)[0][rank], dist.group.WORLD)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module", params=[2, *(pytest.param(world, marks=pytest.mark.full) for world in (1, 4))])
def ranks(request, tmp_path_factory):
    world, folder = request.param, tmp_path_factory.mktemp("ranks")
    mp.spawn(worker, (world, free_port(), str(folder)), world)
    return world, [torch.load(folder / f"{rank}.pt") for rank in range(world)]


@pytest.mark.parametrize("name", OPTIONS)
def test_ranks_are_equal_to_each_other_and_to_one_process(ranks, name):
    world, results = ranks
    states = [result[name][1] for result in results]
    for state in states[1:]:
        assert all(torch.equal(state[key], states[0][key]) for key in states[0])
    batches = data(world, OPTIONS[name].get("half", False))
    found, single = train(name, None, [torch.cat(parts) for parts in batches])
    for step, (indices, values) in enumerate(found):
        for part, got in zip(("indices", "values"), (0, 1), strict=True):
            every = torch.cat([result[name][0][step][got] for result in results])
            torch.testing.assert_close(every, indices if part == "indices" else values, equal_nan=True)
    for key, value in single.items():
        torch.testing.assert_close(states[0][key], value)


def test_under_ddp(ranks):
    _, results = ranks
    first = results[0]["ddp"]
    assert first["module.layers.1.steps"] == 3
    for result in results[1:]:
        assert all(torch.equal(result["ddp"][key], value) for key, value in first.items())


@pytest.mark.parametrize("name", ["revived", "learned"])
def test_codes_are_drawn_from_the_rows_of_all_ranks(ranks, name):
    world, results = ranks
    first = data(world, False)[0]
    values = torch.cat([result[name][0][0][1] for result in results]).unique(dim=0)
    owners = [int((values[:, None] == part).all(2).any().item()) for part in first]
    assert (values[:, None] == torch.cat(first)).all(2).any(1).all()
    assert sum(owners) > 1 or world == 1


def test_settings_that_make_ranks_differ_raise_or_warn(ranks):
    world, results = ranks
    for result in results:
        found = result["flows"]
        several = world > 1
        assert ("no process_group" in found["averages"]) == several
        assert found["learned"].startswith("RuntimeError: VectorQuantizer: there are") == several
        assert found["sharded"].startswith("RuntimeError: VectorQuantizer: fully_shard would lose the start")
        quiet = ("averages in eval", "averages of a group", "learned, normal", "sharded, normal")
        assert not any(found[name] for name in quiet)


def test_a_module_is_loaded_where_there_are_no_ranks():
    """Its group is missed in training alone, where it is used."""
    module = sk.nn.VectorQuantizer(8, 3)
    module._group = SharedGroup(None)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    rows = torch.randn(20, 3)
    assert torch.equal(loaded.eval()(rows).values, module.eval()(rows).values)
    with pytest.raises(RuntimeError, match=r"^process_group: there is no group .*; set module\.process_group"):
        loaded.train()(rows)
    loaded.process_group = None
    loaded(rows)
