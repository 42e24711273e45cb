"""Contrastive energies over ranks (gloo), block by block: keys gathered and keys in a ring give the losses, statistics
and gradients of one process that has all rows, whatever gradients the ranks' losses get."""

from __future__ import annotations

import itertools
import os
import random
import socket
import time
from datetime import timedelta
from typing import Any, NamedTuple

import interpreter
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tiers import pairwise_cases
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

import sslkernels as sk
from sslkernels.contrastive.operators import contrastive_ranks_bwd, contrastive_ranks_fwd
from sslkernels.contrastive.pair_setup import next_of_same_id
from sslkernels.contrastive.score_tiles import PairKernels

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
    draw, cases, features = random.Random(1), [], FEATURES | {"backend": ["cpu", "reference", "triton"]}
    while len(cases) < count:
        case = allowed({name: draw.choice(values) for name, values in features.items()})
        cases += [] if case is None else [case]
    return cases


ELSEWHERE = {"ids": "positive", "exclude_self": True, "stats": True}  # positives on other ranks, and statistics of them
FIRST = {name: values[0] for name, values in FEATURES.items()}
CASES = {"pairwise": [*pairwise_cases(FEATURES, allowed), FIRST | ELSEWHERE], "random": random_cases(200)}


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
    """The arguments of a rank."""
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
    numbers = torch.linspace(0.5, 1.7, loss.numel(), dtype=loss.dtype, device=loss.device)
    return numbers.reshape(loss.shape) * (1 + rank)


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
        by_id = case["ids"] == "positive"
        following = next_of_same_id(made["key_ids"]) if by_id else torch.full_like(every, -1)
        positive = torch.where(positive == every, following, positive)
    squares = torch.cdist(query, key, compute_mode="donot_use_mm_for_euclid_dist").square()[rows]
    index, has = positive[rows], positive[rows] >= 0
    pairs = torch.ones_like(squares, dtype=torch.bool)
    pairs[has, index[has]] = False
    if case["exclude_self"]:
        pairs[every[: len(index)], every[rows]] = False
    return squares[has, index[has]].mean(), (-2 * squares[pairs]).exp().mean().log()


def cases_of(rank, world, cases, device="cpu"):
    found = []
    for number, case in enumerate(cases):
        if device != "cpu":
            case = case | {"backend": "triton"}
        for ring in (False, True):
            mine = {name: tensor.to(device) for name, tensor in own(*whole(number, case, world), rank).items()}
            if case["exclude_self"]:
                mine["key"] = mine["query"]
            over = {"process_group": dist.group.WORLD, "ring": ring}
            result = result_of(case, mine, rank, **over)
            for name in SUMMED:
                if name in result["grads"]:
                    dist.all_reduce(result["grads"][name])
            found.append(tree_map_only(torch.Tensor, torch.Tensor.cpu, result))
    return found


def worker(rank, world, port, folder, cases):
    interpreter.repair()
    join(rank, world, port)
    torch.save(cases_of(rank, world, CASES[cases]), f"{folder}/{rank}.pt")
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


def close(got, want, case, what, tolerances=(1e-6, 1e-12)):
    tolerance = tolerances[case["dtype"] == torch.float64]
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
        assert_one_process(number, case, [found[2 * number : 2 * number + 2] for found in results])


def assert_one_process(number, case, results, tolerances=(1e-6, 1e-12)):
    """results: of each rank, with keys gathered and in a ring."""

    def same(got, want, what):
        close(got, want, case, what, tolerances)

    for rank, want in enumerate(expected(number, case, len(results))):
        for ring, got in zip((False, True), results[rank], strict=True):
            where = f"on rank {rank} with ring={ring}"
            same(got["loss"], want["loss"], f"loss {where}")
            assert got["grads"].keys() == want["grads"].keys()
            for name, grad in want["grads"].items():
                same(got["grads"][name], grad, f"gradient of {name} {where}")
            names = ("lse", "positive", "rank", "top1", "alignment", "uniformity")
            for name, one, other in zip(names, got["stats"], want["stats"], strict=True) if case["stats"] else ():
                same(one, other, f"{name} {where}")


ROWS, WIDTH = 8, 64


def features_of(rank, dtype=torch.float32, grad=True):
    generator = torch.Generator().manual_seed(rank)
    made = [0.3 * torch.randn(ROWS, WIDTH, generator=generator) for _ in range(2)]
    return [tensor.to(dtype).requires_grad_(grad) for tensor in made]


def clip(x, y, ring, **options):
    options = {"direction": "symmetric", "logit_scale": 2.0, "normalize": True} | options
    return sk.contrastive_energy(x, y, process_group=dist.group.WORLD, ring=ring, **options)


def products(rank, world):
    """How many scores are computed in a forward, in its backward, and with statistics; the FLOPs of both."""
    found = {}
    for ring in (False, True):
        counts = []
        with pytest.MonkeyPatch.context() as patch:
            begin = PairKernels.begin

            def counted(self, tile, counts=counts, begin=begin):
                counts[-1] += len(tile.queries) * len(tile.candidates)
                begin(self, tile)

            patch.setattr(PairKernels, "begin", counted)
            for options in ({}, {"return_stats": True}, {"energy": "hinge"}, {"same_id": "positive", "ids": True}):
                if options.pop("ids", False):
                    options |= {"query_ids": torch.arange(ROWS) % 3, "key_ids": torch.arange(ROWS) % 3}
                counts.append(0)
                loss = clip(*features_of(rank), ring, **options)
                counts.append(0)
                (loss[0] if isinstance(loss, tuple) else loss).backward()
        with FlopCounterMode(display=False) as flops:
            clip(*features_of(rank), ring).backward()
        found[ring] = (counts, flops.get_total_flops())
    return found


def traffic(rank, world):
    """Bytes of features and of numbers that a rank sends in forward and in backward. Collectives count as rings: a
    gather or reduce-scatter of S bytes sends S (W - 1) / W, an all-reduce twice as many."""
    found = {}
    for ring in (False, True):
        sent = {"features": [], "numbers": []}

        def add(tensor, times, sent=sent):
            sent["features" if tensor.dim() == 2 and tensor.shape[1] == WIDTH else "numbers"][-1] += (
                times * tensor.numel() * tensor.element_size()
            )

        with pytest.MonkeyPatch.context() as patch:
            share = {"all_gather": (1, world - 1), "all_reduce": (0, 2 * (world - 1) / world)}
            for name, (position, times) in (share | {"reduce_scatter": (0, world - 1)}).items():
                call = getattr(dist, name)

                def counted(*args, call=call, position=position, times=times, **kwargs):
                    add(args[position], times)
                    return call(*args, **kwargs)

                patch.setattr(dist, name, counted)

            def transferred(transfers, call=dist.batch_isend_irecv):
                for transfer in transfers:
                    if transfer.op is dist.isend:
                        add(transfer.tensor, 1)
                return call(transfers)

            patch.setattr(dist, "batch_isend_irecv", transferred)
            for values in sent.values():
                values.append(0)
            loss = clip(*features_of(rank), ring)
            for values in sent.values():
                values.append(0)
            loss.backward()
        found[ring] = sent
    return found


class Largest(TorchDispatchMode):
    """The elements of the largest tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


def memory(rank, world):
    """The largest tensor of a step."""
    found = {}
    for ring in (False, True):
        mode = Largest()
        with pytest.MonkeyPatch.context() as patch:
            for operator in (contrastive_ranks_fwd, contrastive_ranks_bwd):
                functions = operator.implementations.functions

                def watched(*args, call=functions["cpu"], mode=mode):
                    with mode:
                        return call(*args)

                patch.setitem(functions, "cpu", watched)
            clip(*features_of(rank), ring, label_smoothing=0.1).backward()
        found[ring] = mode.elements
    return found


def order(rank, world):
    """What a step in a ring does, one after another: transfers that start, products, transfers that are waited for."""
    events = []
    with pytest.MonkeyPatch.context() as patch:
        begin, transfer = PairKernels.begin, dist.batch_isend_irecv

        def begun(self, tile):
            events.append("products")
            begin(self, tile)

        class Work(NamedTuple):
            work: Any

            def wait(self):
                events.append("wait")
                self.work.wait()

        def transferred(transfers):
            events.append("start")
            return [Work(work) for work in transfer(transfers)]

        patch.setattr(PairKernels, "begin", begun)
        patch.setattr(dist, "batch_isend_irecv", transferred)
        loss = clip(*features_of(rank), True)
        events.append("backward")
        loss.backward()
    return [event for event, _ in itertools.groupby(events)]


def half(rank, world):
    """Loss and gradients in half precision, the losses of the ranks multiplied by different numbers."""
    found = []
    for ring in (False, True):
        for dtype, autocast in (("bfloat16", True), ("bfloat16", False), ("float16", False)):
            dtype = getattr(torch, dtype)
            x, y = features_of(rank, torch.float32 if autocast else dtype)
            with torch.autocast("cpu", dtype, enabled=autocast):
                loss = clip(x, y, ring)
            (loss * 10.0 ** (-3 * rank)).backward()
            found.append((loss.detach(), x.grad, y.grad))
    return found


def collapsed(rank, world):
    """Statistics of features that are all the same."""
    found = []
    for ring in (False, True):
        x = torch.linspace(-1, 1.3, 33).expand(64 + 64 * (rank % 2), 33).contiguous()
        for autocast in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                found.append(clip(x, x.clone(), ring, return_stats=True)[1])
    return [tuple(stats) for stats in found]


def on_triton(rank, world):
    with sk.use_backend("triton"):
        found = []
        for energy in ("softmax", "sigmoid"):
            for ring in (False, True):
                x, y = features_of(rank)
                loss = clip(x[:4], y[:4], ring, energy=energy, query_ids=torch.arange(4), key_ids=torch.arange(4) % 3)
                loss.backward()
                found.append((loss.detach(), x.grad[:4], y.grad[:4]))
        return found


def raised(rank, world):
    x, y = features_of(rank)
    messages = []

    def message_of(function):
        try:
            function()
        except ValueError as error:
            return str(error)
        return "nothing was raised"

    messages.append(message_of(lambda: clip(x, y, True, logit_scale=torch.tensor(2.0, requires_grad=rank == 0))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSLKERNELS_CHECK_RANKS", "1")
        messages.append(message_of(lambda: clip(x, y, rank == 0)))
        messages.append(message_of(lambda: clip(x, y, True, label_smoothing=0.1 * rank)))
        messages.append(message_of(lambda: clip(x, y, True, query_ids=torch.arange(8), key_ids=torch.arange(8))))
    return messages


SPECIAL = [products, traffic, memory, order, half, collapsed, on_triton, raised]


def special_worker(rank, world, port, folder):
    interpreter.repair()
    join(rank, world, port)
    torch.save({find.__name__: find(rank, world) for find in SPECIAL}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.full)])
def special(request, tmp_path_factory):
    world = request.param
    return world, spawned(tmp_path_factory.mktemp("special"), world, special_worker)


def test_each_score_is_computed_once_in_the_world(special):
    world, results = special
    block = ROWS * ROWS * world
    for result in results:
        for counts, flops in result["products"].values():
            assert counts == [block] * 8  # forward, and again in backward
            assert flops == 2 * block * WIDTH * 4


def test_bytes_on_the_wire(special):
    world, results = special
    block = (world - 1) * ROWS * WIDTH * 4
    for result in results:
        gathered, ring = result["traffic"][False], result["traffic"][True]
        assert gathered["features"] == [block, block]
        assert ring["features"] == [block, 2 * block]  # in backward the keys travel with their gradients
        # A pair's positive and its score, a key's norm, and the maximum and the sum of its column.
        floats = (world - 1) * ROWS * (8 + 4 + 4) + 2 * (world - 1) * ROWS * (4 + 8)
        counts = (world - 1) * 4 * 8  # how many queries and keys, the scale, and which of them want gradients
        for sent in (gathered, ring):
            assert sent["numbers"] == [floats + counts + (world - 1) * 2 * 8, (world - 1) * ROWS * 4]


def test_a_ring_has_no_tensor_of_the_keys_of_all_ranks(special):
    world, results = special
    for result in results:
        assert result["memory"][False] == world * ROWS * WIDTH
        assert result["memory"][True] == ROWS * WIDTH


def test_a_transfer_runs_beside_the_products(special):
    world, results = special
    step = ["start", "products", "wait"]
    for result in results:
        forward = [*step * (world - 1), "products"]  # the last block goes nowhere
        # The gradients of a block follow it from its second rank on, and home after the last products.
        backward = [*step * (world - 1), *(step if world > 2 else ["products"]), "start", "wait"]
        assert result["order"] == [*forward, "backward", *backward]


def test_half_precision_over_ranks(special):
    world, results = special
    parts = [features_of(rank) for rank in range(world)]
    x, y = (torch.cat(side).detach().requires_grad_() for side in zip(*parts, strict=True))
    rows = sk.contrastive_energy(x, y, direction="symmetric", logit_scale=2.0, normalize=True, reduction="none")
    losses = torch.stack([part.mean() for part in rows.split(ROWS)])
    (losses * 10.0 ** (-3 * torch.arange(world))).sum().backward()
    for rank, result in enumerate(results):
        for loss, *grads in result["half"]:
            torch.testing.assert_close(loss, losses[rank].detach(), rtol=0, atol=1e-2)
            for grad, want in zip(grads, (x.grad, y.grad), strict=True):
                want = want.split(ROWS)[rank]
                torch.testing.assert_close(grad.float(), want, rtol=0, atol=2e-2 * want.abs().max().item())


def test_statistics_at_collapse(special):
    world, results = special
    keys = 96 * world
    for result in results:
        for _, _, rank, top1, alignment, uniformity in result["collapsed"]:
            torch.testing.assert_close(rank, torch.full_like(rank, (keys - 1) / 2), rtol=0, atol=0)
            torch.testing.assert_close(top1, torch.full_like(top1, 1 / keys))
            assert alignment.abs() < 1e-5
            assert uniformity.abs() < 1e-5


def test_the_triton_kernels_over_ranks(special):
    world, results = special
    parts = [features_of(rank) for rank in range(world)]
    x, y = (torch.cat([t[:4] for t in side]).detach().requires_grad_() for side in zip(*parts, strict=True))
    ids = torch.arange(4).repeat(world)
    for number, energy in enumerate(("softmax", "softmax", "sigmoid", "sigmoid")):
        options = {"direction": "symmetric", "logit_scale": 2.0, "normalize": True, "energy": energy}
        loss = sk.contrastive_energy(x, y, query_ids=ids, key_ids=ids % 3, **options, reduction="none")
        losses = [part.mean() for part in loss.split(4)]
        grads = torch.autograd.grad(sum(losses), (x, y))
        for rank, result in enumerate(results):
            got_loss, *got = result["on_triton"][number]
            torch.testing.assert_close(got_loss, losses[rank].detach())
            for one, other in zip(got, grads, strict=True):
                torch.testing.assert_close(one, other.split(4)[rank], rtol=1e-5, atol=1e-6)


def test_ranks_that_call_differently_raise(special):
    _, results = special
    for result in results:
        scale, ring, smoothing, nothing = result["raised"]
        assert "the ranks must agree on which features require grad" in scale
        assert "ring must be the same on every rank; got True on rank 0, False on rank 1" in ring
        assert "label_smoothing must be the same on every rank; got 0.0 on rank 0, 0.1 on rank 1" in smoothing
        assert nothing == "nothing was raised"


def dying(rank, world, port, folder):
    """Rank 1 dies in the ring, in forward or in backward."""
    join(rank, world, port, seconds=5)
    x, y = features_of(rank)
    dies_in = "forward" if folder.endswith("forward") else "backward"
    try:
        loss = clip(x, y, True) if dies_in == "backward" else None
        if rank == 1:
            dist.batch_isend_irecv = lambda transfers: os._exit(0)
        (clip(x, y, True) if loss is None else loss).backward()
    except RuntimeError as error:
        torch.save(str(error), f"{folder}/{rank}.pt")
    os._exit(0)  # the group cannot be destroyed without the other rank


@pytest.mark.parametrize(
    ("dies_in", "world"),
    [
        pytest.param("forward", 2, marks=pytest.mark.full),
        ("backward", 2),
        *(pytest.param(where, 4, marks=pytest.mark.full) for where in ("forward", "backward")),
    ],
)
def test_a_rank_that_dies_in_the_ring_raises_on_the_others(dies_in, world, tmp_path):
    folder = tmp_path / dies_in
    folder.mkdir()
    start = time.monotonic()
    mp.spawn(dying, (world, free_port(), str(folder)), world)
    assert time.monotonic() - start < 60
    assert {path.stem for path in folder.iterdir()} == {str(rank) for rank in range(world) if rank != 1}


@pytest.fixture
def alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_what_a_ring_refuses(alone):
    x, ids = torch.randn(3, 4), torch.arange(3)
    in_ring = {"process_group": alone, "ring": True}
    with pytest.raises(ValueError, match="clip_loss: ring must be False without a process_group; got True"):
        sk.clip_loss(x, x, 1.0, ring=True)
    with pytest.raises(TypeError, match="ring must be a bool; got int"):
        sk.contrastive_energy(x, x, process_group=alone, ring=1)
    with pytest.raises(ValueError, match=r"info_nce: ring must be False with in_batch=False \(or given negative_keys"):
        sk.info_nce(x, x, x, **in_ring)
    with pytest.raises(ValueError, match="positive must be None over columns of the hinge energy with a process_group"):
        sk.contrastive_energy(x, x, positive=ids, energy="hinge", direction="column", process_group=alone)
