"""Losses over slices of a vocabulary (gloo): every rank gets the loss, statistics and gradients of one process."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from datetime import timedelta

import interpreter
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tiers import pairwise_cases

import sslkernels as sk

pytestmark = pytest.mark.costly("processes start")
ROWS, DIM, VOCAB = 24, 5, 21
FEATURES = {
    "backend": ["cpu", "reference", "triton"],
    "dtype": [torch.float32, torch.float64],
    "slices": ["uneven", "even", "one empty"],
    "target": ["indices", "indices", "probabilities"],
    "ignored": ["some", "none", "all"],
    "reduction": ["mean", "sum", "none"],
    "mode": ["auto", "compact", "no gradient"],
    "bias": [False, True, "masked"],
    "weight": [False, True],
    "label_smoothing": [0.0, 0.1],
    "z_loss": [0.0, 0.01],
    "softcap": [None, 2.0],
    "logit_scale": [1.0, 0.7, "learned"],
    "token_weight": [False, True],
    "num_items": [None, 7],
    "shift": [0, 1],
    "stats": [False, True],
    "input": ["reduce", "partial", "sequence_parallel"],
    "capacity": [None, ROWS],
    "workspace_bytes": [None, 1],
    "ignore_index": [-100, 2],
}


def allowed(case):
    case = dict(case)
    if case["target"] == "probabilities":
        case |= {"ignored": "none", "shift": 0, "stats": False, "capacity": None, "ignore_index": -100}
        case["input"] = "partial" if case["input"] == "partial" else "reduce"
    if case["reduction"] != "mean":
        case["num_items"] = None
    if case["bias"] == "masked" and case["label_smoothing"]:
        case["weight"] = True  # a masked class would make every loss infinite
    return case


CASES = pairwise_cases(FEATURES, allowed)


def sizes_of(case, world):
    if case["slices"] == "even":
        return [VOCAB // world] * (world - 1) + [VOCAB - VOCAB // world * (world - 1)]
    sizes = [3, 2, 1, 4][: world - 1]
    if case["slices"] == "one empty" and world > 1:
        sizes[0] = 0
    return [*sizes, VOCAB - sum(sizes)]


def problem(number, case):
    """The tensors of all ranks."""
    generator = torch.Generator().manual_seed(number)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(case["dtype"])

    made = {"input": draw(4, ROWS // 4, DIM), "linear_weight": draw(VOCAB, DIM)}
    if case["target"] == "probabilities":
        made["target"] = draw(4, ROWS // 4, VOCAB).softmax(-1)
    else:
        made["target"] = torch.randint(0, VOCAB, (4, ROWS // 4), generator=generator)
        made["target"][made["target"] == case["ignore_index"]] = 5
        ignored = {"some": torch.rand(4, ROWS // 4, generator=generator) < 0.4, "none": False, "all": True}
        made["target"] = made["target"].masked_fill(torch.as_tensor(ignored[case["ignored"]]), case["ignore_index"])
    if case["bias"]:
        made["linear_bias"] = draw(VOCAB)
        if case["bias"] == "masked":  # the whole of a first slice, and a class of the last
            made["linear_bias"][:3] = made["linear_bias"][-1] = -torch.inf
            if case["target"] == "probabilities":
                made["target"][..., :3] = made["target"][..., -1] = 0
            else:
                allowed_class = (made["target"] < 3) & (made["target"] >= 0) & (made["target"] != case["ignore_index"])
                made["target"][allowed_class] = 4
                made["target"][made["target"] == VOCAB - 1] = 4
    if case["weight"]:
        made["weight"] = draw(VOCAB).abs()
        if case["bias"] == "masked":
            made["weight"][:3] = made["weight"][-1] = 0
    if case["token_weight"]:
        made["token_weight"] = draw(4, ROWS // 4).abs()
    if case["logit_scale"] == "learned":
        made["logit_scale"] = torch.tensor(0.8, dtype=case["dtype"])
    return made


def own(made, case, world, rank):
    """What a rank passes."""
    sizes, mine = sizes_of(case, world), dict(made)
    columns = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    for name in ("linear_weight", "linear_bias"):
        if name in made:
            mine[name] = made[name][columns]
    if case["target"] == "probabilities":
        mine["target"] = made["target"][..., columns]
    if case["input"] == "sequence_parallel":
        for name in ("input", "target", "token_weight"):
            if name in made:
                mine[name] = mine[name][own_rows(world, rank)]
    return {name: tensor.clone() for name, tensor in mine.items()}


def own_rows(world, rank):
    """4 sequences: with 2 ranks 1 and 3 of them, with 4 ranks a rank has none."""
    counts = {1: [4], 2: [1, 3], 4: [1, 0, 2, 1]}[world]
    return slice(sum(counts[:rank]), sum(counts[: rank + 1]))


LEAVES = ("input", "linear_weight", "linear_bias", "token_weight", "logit_scale")


def result_of(case, tensors, **over):
    tensors = dict(tensors)
    for name in LEAVES:
        if name in tensors and case["mode"] != "no gradient":
            tensors[name].requires_grad_()
    options = {name: case[name] for name in ("label_smoothing", "z_loss", "softcap", "reduction", "num_items", "shift")}
    options |= {name: case[name] for name in ("capacity", "workspace_bytes", "ignore_index")}
    if "logit_scale" not in tensors:
        options["logit_scale"] = case["logit_scale"]
    mode = "compact" if case["mode"] == "compact" else "auto"
    with sk.use_backend(case["backend"]):
        loss = sk.linear_cross_entropy(**tensors, **options, mode=mode, return_stats=case["stats"], **over)
        loss, stats = loss if case["stats"] else (loss, ())
        if case["mode"] != "no gradient":
            factors = torch.linspace(0.5, 1.7, loss.numel(), dtype=loss.dtype).reshape(loss.shape)
            (loss * factors).sum().backward()
    grads = {name: tensors[name].grad for name in LEAVES if name in tensors}
    return {"loss": loss.detach(), "stats": tuple(stats), **grads}


def over_ranks(case):
    if case["input"] == "sequence_parallel":
        return {"sequence_parallel": True}
    return {"input_grad": case["input"]}


def worker(rank: int, world: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    interpreter.repair()
    dist.init_process_group("gloo", rank=rank, world_size=world, timeout=timedelta(seconds=60))
    found = []
    for number, case in enumerate(CASES):
        if os.environ.get("SHOW_CASES") and rank == 0:
            print(number, case, file=sys.stderr, flush=True)
        mine = own(problem(number, case), case, world, rank)
        found.append(result_of(case, mine, process_group=dist.group.WORLD, **over_ranks(case)))
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def spawned(function, world, folder):
    mp.spawn(function, (world, free_port(), str(folder)), world)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


@pytest.fixture(scope="module", params=[2, *(pytest.param(world, marks=pytest.mark.full) for world in (1, 4))])
def ranks(request, tmp_path_factory):
    return request.param, spawned(worker, request.param, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("number", range(len(CASES)))
def test_slices_give_the_results_of_one_process(ranks, number):
    _, results = ranks
    case, every = CASES[number], [result[number] for result in results]
    want = result_of(case, problem(number, case))
    limit = {torch.float32: 1e-6, torch.float64: 1e-12}[case["dtype"]]

    def same(got, expected, name):
        torch.testing.assert_close(
            got, expected, rtol=4 * limit, atol=limit, equal_nan=True, msg=lambda text: f"{name}: {text}\n{case}"
        )

    for got in every:
        same(got["loss"], want["loss"], "loss")
        for one, other, name in zip(got["stats"], want["stats"], sk.CrossEntropyStats._fields, strict=False):
            same(one, other, name)
        if "logit_scale" in want and case["mode"] != "no gradient":
            same(got["logit_scale"], want["logit_scale"], "logit_scale")
    if case["mode"] == "no gradient":
        return
    for name in ("linear_weight", "linear_bias"):
        if name in want:
            same(torch.cat([got[name] for got in every]), want[name], name)
    if case["input"] == "sequence_parallel":
        for name in ("input", "token_weight"):
            if name in want:
                same(torch.cat([got[name] for got in every]), want[name], name)
        return
    if case["input"] == "partial":
        same(torch.stack([got["input"] for got in every]).sum(0), want["input"], "input")
    for got in every:
        if case["input"] == "reduce":
            same(got["input"], want["input"], "input")
        if "token_weight" in want:
            same(got["token_weight"], want["token_weight"], "token_weight")


@pytest.fixture
def alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with contextlib.ExitStack() as stack:
        stack.callback(dist.destroy_process_group)
        yield dist.group.WORLD
