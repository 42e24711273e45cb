"""Contrastive energies over ranks (gloo), block by block: keys gathered and keys in a ring give the losses, statistics
and gradients of one process that has all rows, whatever gradients the ranks' losses get."""

from __future__ import annotations

import os
import random
import socket
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tiers import pairwise_cases

import sslkernels as sk
from sslkernels.contrastive.pair_setup import next_of_same_id

pytestmark = pytest.mark.costly("processes start")
DIM = 6
SIZES = {
    "equal": {1: [4], 2: [3, 3], 4: [3, 3, 3, 3]},
    "ragged": {1: [5], 2: [3, 5], 4: [3, 1, 4, 2]},
    "a rank without rows": {1: [4], 2: [0, 5], 4: [3, 0, 3, 2]},
}
FEATURES = {
    "backend": ["cpu", "reference"],
    "dtype": [torch.float64, torch.float32],
    "energy": ["softmax", "sigmoid", "hinge"],
    "direction": ["symmetric", "row", "column"],
    "ids": [None, "ignore", "positive"],
    "exclude_self": [False, True],
    "positive": [None, "given"],
    "bank": [None, "plain", "masked", "ids"],
    "negatives": [None, "features", "index"],
    "mask": [None, "candidate_mask", "key_mask"],
    "label_smoothing": [0.0, 0.1],
    "row_weight": [False, True],
    "reduction": ["mean", "sum", "none", "num_items"],
    "normalize": [False, True],
    "bias": [False, True],
    "stats": [False, True],
    "sizes": ["equal", "ragged", "a rank without rows"],
    "frozen": [None, "query", "key", "bank"],
}
LEAVES = ("query", "key", "bank", "negatives", "row_weight", "logit_scale", "logit_bias")
SUMMED = ("bank", "logit_scale", "logit_bias")  # over the ranks


def allowed(case):
    case = dict(case)
    if case["energy"] != "softmax":
        case["label_smoothing"] = 0.0
    if case["energy"] == "sigmoid":
        case["direction"] = "row"
    if case["direction"] == "column":
        case |= {"bank": None, "negatives": None}
    if case["bank"] == "ids" and case["ids"] is None:
        case["bank"] = "plain"
    if case["exclude_self"] and case["ids"] != "positive" and case["positive"] is None:
        case["positive"] = "given"
    if case["energy"] == "hinge" and case["direction"] != "row":
        case["positive"] = None
        if case["exclude_self"] and case["ids"] != "positive":
            return None
    if case["exclude_self"]:
        case["frozen"] = "bank" if case["frozen"] else None  # key is query
    return case


def random_cases(count):
    draw, cases = random.Random(1), []
    while len(cases) < count:
        case = allowed({name: draw.choice(values) for name, values in FEATURES.items()})
        cases += [] if case is None else [case]
    return cases


CASES = {"pairwise": pairwise_cases(FEATURES, allowed), "random": random_cases(200)}


def remote(case):
    """Whether positives may be on other ranks, of which a ring has no statistics."""
    return case["exclude_self"] and case["ids"] == "positive"


def whole(number, case, world):
    """The arguments of one process, and how many rows each rank has."""
    sizes = SIZES[case["sizes"]][world]
    total, dtype = sum(sizes), case["dtype"]
    generator = torch.Generator().manual_seed(number)

    def features(*shape):
        return 0.6 * torch.randn(*shape, DIM, generator=generator, dtype=torch.float64).to(dtype)

    def drawn(low, high, *shape):
        """Indices of the rank's own keys, as indices among all."""
        parts = [torch.randint(low, max(n, low + 1), (n, *shape), generator=generator) for n in sizes]
        starts = [sum(sizes[:i]) for i in range(world)]
        return torch.cat([torch.where(p < 0, p, p + start) for p, start in zip(parts, starts, strict=True)])

    made = {"query": features(total), "logit_scale": torch.tensor(1.7, dtype=dtype)}
    made["key"] = made["query"] if case["exclude_self"] else features(total)
    if case["positive"]:
        made["positive"] = drawn(-1, 0)
    if case["bias"]:
        made["logit_bias"] = torch.tensor([-0.4], dtype=dtype)
    if case["ids"]:
        made["query_ids"] = torch.randint(0, 4, (total,), generator=generator)
        same = case["exclude_self"] or case["positive"] is None
        made["key_ids"] = made["query_ids"] if same else torch.randint(0, 4, (total,), generator=generator)
    if case["bank"]:
        made["bank"] = features(4)
    if case["bank"] == "masked":
        made["bank_mask"] = torch.tensor([True, False, True, True])
    if case["bank"] == "ids":
        made["bank_ids"] = torch.randint(0, 5, (4,), generator=generator)
    if case["negatives"]:
        made["negatives"] = features(total, 3) if case["negatives"] == "features" else drawn(-1, 0, 3)
        made["negatives_mask"] = torch.rand(total, 3, generator=generator) < 0.7
    if case["mask"]:
        shape = (total, total) if case["mask"] == "candidate_mask" else (total,)
        made[case["mask"]] = torch.rand(shape, generator=generator) < 0.7
    if case["row_weight"]:
        made["row_weight"] = torch.rand(total, generator=generator).to(dtype)
    return made, sizes


def own(made, sizes, rank):
    """What a rank passes."""
    rows = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    mine = {}
    for name, tensor in made.items():
        mine[name] = tensor if name.startswith(("bank", "logit")) else tensor[rows]
        indices = name == "positive" or (name == "negatives" and not tensor.is_floating_point())
        mine[name] = torch.where(mine[name] < 0, mine[name], mine[name] - rows.start) if indices else mine[name].clone()
    if made["key"] is made["query"]:
        mine["key"] = mine["query"]
    return mine


def options_of(case):
    options = {name: case[name] for name in ("energy", "direction", "exclude_self", "label_smoothing", "normalize")}
    options |= {"same_id": "positive" if case["ids"] == "positive" else "ignore", "on_empty": "zero"}
    num_items = {"num_items": 7, "reduction": "mean"} if case["reduction"] == "num_items" else {}
    return options | {"reduction": case["reduction"]} | num_items


def leaves_of(case, tensors):
    names = [n for n in LEAVES if n in tensors and n != case["frozen"] and tensors[n].is_floating_point()]
    return [n for n in names if not (n == "key" and tensors["key"] is tensors["query"])]


def grad_output(loss, rank):
    return torch.linspace(0.5, 1.7, loss.numel(), dtype=loss.dtype).reshape(loss.shape) * (1 + rank)


def result_of(case, tensors, rank, **over):
    tensors = dict(tensors)
    leaves = leaves_of(case, tensors)
    for name in leaves:
        tensors[name].requires_grad_()
    with sk.use_backend(case["backend"]):
        loss = sk.contrastive_energy(**tensors, **options_of(case), return_stats=case["stats"], **over)
        loss, stats = loss if case["stats"] else (loss, ())
        if case["reduction"] != "none" and case["frozen"] == "bank" and "bank" in tensors:
            with torch.no_grad():  # a queue is overwritten before backward
                tensors["bank"].zero_()
        (loss * grad_output(loss, rank)).sum().backward()
    grads = {name: tensors[name].grad for name in leaves}
    return {"loss": loss.detach(), "stats": tuple(stats), "grads": grads}


def expected(number, case, world):
    """The results of every rank, from one process."""
    made, sizes = whole(number, case, world)
    leaves = leaves_of(case, made)
    for name in leaves:
        made[name].requires_grad_()
    weight = made.get("row_weight")
    options = options_of(case) | {"reduction": "none", "num_items": None}
    with sk.use_backend(case["backend"]):
        rows, stats = sk.contrastive_energy(**made, **options, return_stats=True)
    total, losses = 0, []
    counted = torch.ones_like(rows, dtype=torch.bool) if case["energy"] == "sigmoid" else stats.rank >= 0
    for rank, (part, counts) in enumerate(zip(rows.split(sizes), counted.split(sizes), strict=True)):
        loss = part if case["reduction"] == "none" else part.sum()
        if case["reduction"] == "mean":
            loss = loss / counts.sum().clamp(min=1)
        loss = loss / 7 if case["reduction"] == "num_items" else loss
        losses.append(loss.detach())
        total = total + (loss * grad_output(loss, rank)).sum()
    found = torch.autograd.grad(total, [made[name] for name in leaves], materialize_grads=True, allow_unused=True)
    assert weight is None or "row_weight" in leaves
    grads = dict(zip(leaves, found, strict=True))
    for rank, loss in enumerate(losses):
        part = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        of_rank = {name: grad if name in SUMMED else grad[part] for name, grad in grads.items()}
        per_row = tuple(value[part] for value in stats[:4])
        yield {"loss": loss, "stats": (*per_row, *distances(case, made, part)), "grads": of_rank}


def distances(case, made, rows):
    """Alignment and uniformity of the rows against all keys."""
    query, key = (torch.nn.functional.normalize(made[n].detach().double(), dim=1) for n in ("query", "key"))
    every = torch.arange(len(query))
    positive = made.get("positive", every)
    if case["exclude_self"]:
        following = next_of_same_id(made["key_ids"]) if remote(case) else torch.full_like(every, -1)
        positive = torch.where(positive == every, following, positive)
    squares = torch.cdist(query, key, compute_mode="donot_use_mm_for_euclid_dist").square()[rows]
    index, has = positive[rows], positive[rows] >= 0
    pairs = torch.ones_like(squares, dtype=torch.bool)
    pairs[has, index[has]] = False
    if case["exclude_self"]:
        pairs[every[: len(index)], every[rows]] = False
    return squares[has, index[has]].mean(), (-2 * squares[pairs]).exp().mean().log()


def worker(rank, world, port, folder, cases):
    join(rank, world, port)
    found = []
    for number, case in enumerate(CASES[cases]):
        for ring in (False, True):
            mine = own(*whole(number, case, world), rank)
            over = {"process_group": dist.group.WORLD, "ring": ring}
            result = result_of(case | {"stats": case["stats"] and not (ring and remote(case))}, mine, rank, **over)
            for name in SUMMED:
                if name in result["grads"]:
                    dist.all_reduce(result["grads"][name])
            found.append(result)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def join(rank, world, port, seconds=60):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world, timeout=timedelta(seconds=seconds))


def spawned(folder, world, target, *arguments):
    mp.spawn(target, (world, free_port(), str(folder), *arguments), world)
    return [torch.load(f"{folder}/{rank}.pt") for rank in range(world)]


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def close(got, want, case, what):
    tolerance = 1e-12 if case["dtype"] == torch.float64 else 1e-6
    size = max(1.0, want.abs().max().item()) if want.numel() and want.isfinite().all() else 1.0
    torch.testing.assert_close(
        got,
        want.to(got.dtype),
        rtol=tolerance,
        atol=tolerance * size,
        equal_nan=True,
        msg=lambda text: f"{what} of {case}: {text}",
    )


@pytest.mark.parametrize(
    ("cases", "world"),
    [
        ("pairwise", 2),
        *(pytest.param("pairwise", world, marks=pytest.mark.full) for world in (1, 4)),
        *(pytest.param("random", world, marks=pytest.mark.slow) for world in (2, 4)),
    ],
)
def test_every_rank_gets_the_result_of_one_process(cases, world, tmp_path):
    results = spawned(tmp_path, world, worker, cases)
    for number, case in enumerate(CASES[cases]):
        for rank, want in enumerate(expected(number, case, world)):
            for ring in (False, True):
                got, where = results[rank][2 * number + ring], f"on rank {rank} with ring={ring}"
                close(got["loss"], want["loss"], case, f"loss {where}")
                assert got["grads"].keys() == want["grads"].keys()
                for name, grad in want["grads"].items():
                    close(got["grads"][name], grad, case, f"gradient of {name} {where}")
                names = ("lse", "positive", "rank", "top1", "alignment", "uniformity")
                assert len(got["stats"]) == len(names) * (case["stats"] and not (ring and remote(case)))
                for name, one, other in zip(names, got["stats"], want["stats"], strict=False):
                    close(one, other, case, f"{name} {where}")
