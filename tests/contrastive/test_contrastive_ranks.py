"""Contrastive energies over process groups (gloo): the gradients equal those of one process that has all rows."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import sslkernels as sk

pytestmark = pytest.mark.costly("processes start")
OPTIONS = {
    "row": {},
    "column": {"direction": "column"},
    "symmetric": {"direction": "symmetric", "label_smoothing": 0.1},
    "sigmoid": {"energy": "sigmoid", "logit_bias": -1.0},
    "hinge": {"energy": "hinge", "direction": "symmetric"},
    "ids": {"direction": "symmetric", "ids": True},
    "supervised": {"ids": True, "same_id": "positive", "exclude_self": True, "direction": "symmetric"},
    "ragged": {"direction": "symmetric", "ragged": True},
    "keys masked": {"direction": "symmetric", "ragged": True, "mask": "key_mask"},
    "pairs masked": {"energy": "sigmoid", "ragged": True, "mask": "candidate_mask"},
    "drawn": {"direction": "symmetric", "ragged": True, "mask": "negatives"},
}


def data(world: int, ragged: bool):
    generator = torch.Generator().manual_seed(0)
    counts = [3 + (2 * rank if ragged else 0) for rank in range(world)]
    x = [torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in counts]
    y = [torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in counts]
    ids = [torch.randint(0, 4, (n,), generator=generator) for n in counts]
    return x, y, ids


def masks_of(counts: list[int], rank: int | None = None):
    """The masks of all rows and negatives by index, or what a rank passes: of its keys, or its rows and all keys."""
    generator = torch.Generator().manual_seed(1)
    pairs, keys = (torch.rand(size, generator=generator) < 0.6 for size in ((sum(counts),) * 2, (sum(counts),)))
    drawn = [torch.randint(-1, n, (n, 4), generator=generator) for n in counts]  # from the rank's own keys
    if rank is None:
        starts = [sum(counts[:i]) for i in range(len(counts))]
        shifted = [torch.where(i < 0, i, i + start) for i, start in zip(drawn, starts, strict=True)]
        return {"candidate_mask": pairs, "key_mask": keys, "negatives": torch.cat(shifted)}
    masks = {"candidate_mask": pairs.split(counts)[rank], "key_mask": keys.split(counts)[rank]}
    return masks | {"negatives": drawn[rank]}


def encoders():
    """Two towers and a scale, the parameters whose gradients DDP averages."""
    torch.manual_seed(1)
    towers = [torch.nn.Linear(6, 5, dtype=torch.float64) for _ in range(2)]
    return towers, torch.tensor(2.0, dtype=torch.float64, requires_grad=True)


def loss_of(name, towers, scale, x, y, ids, masks, group):
    options = dict(OPTIONS[name])
    options.pop("ragged", None)
    mask = options.pop("mask", None)
    if mask:
        options[mask] = masks[mask]
    with_ids = options.pop("ids", False)
    query = towers[0](x)
    key = query if options.get("exclude_self") else towers[1](y)
    if with_ids:
        options.update(query_ids=ids, key_ids=ids)
    return sk.contrastive_energy(
        query, key, logit_scale=scale, normalize=True, process_group=group, return_stats=True, **options
    )


def worker(rank: int, world: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    found = {}
    for name, options in OPTIONS.items():
        x, y, ids = data(world, options.get("ragged", False))
        towers, scale = encoders()
        masks = masks_of([len(part) for part in x], rank)
        loss, stats = loss_of(name, towers, scale, x[rank], y[rank], ids[rank], masks, dist.group.WORLD)
        loss.backward()
        parameters = [*towers[0].parameters(), *towers[1].parameters(), scale]
        averaged = []
        for parameter in parameters:
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            dist.all_reduce(grad)
            averaged.append(grad / world)
        found[name] = (loss.detach(), averaged, stats.rank)
    x, y, _ = data(world, False)
    towers, _ = encoders()
    features = [tower(part[rank]) for tower, part in zip(towers, (x, y), strict=True)]
    for name, loss in (
        ("nt_xent", sk.nt_xent(*features, process_group=dist.group.WORLD)),
        ("clip_loss", sk.clip_loss(*features, 2.0, process_group=dist.group.WORLD)),
        ("siglip_loss", sk.siglip_loss(*features, 2.0, -1.0, process_group=dist.group.WORLD)),
        *((name, module(*features)) for name, module in in_a_ring().items()),
    ):
        grads = torch.autograd.grad(loss, towers[0].weight, retain_graph=True)[0]
        dist.all_reduce(grads)
        found[name] = (loss.detach(), grads / world)
    if world == 2:
        found["disagreement"] = disagree(rank)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def in_a_ring() -> dict[str, torch.nn.Module]:
    options = {"process_group": dist.group.WORLD, "ring": True}
    clip = sk.nn.ClipLoss(2.0, learnable=False, **options)
    siglip = sk.nn.SigLipLoss(2.0, -1.0, learnable=False, **options)
    energy = sk.nn.ContrastiveLoss(direction="symmetric", logit_scale=2.0, **options)
    return {
        "nt_xent in a ring": sk.nn.NTXentLoss(**options),
        "info_nce in a ring": sk.nn.InfoNCELoss(**options),
        "clip_loss in a ring": clip.double(),
        "siglip_loss in a ring": siglip.double(),
        "contrastive_energy in a ring": energy,
    }


def disagree(rank: int) -> str:
    x, y = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4, requires_grad=rank == 0)
    try:
        sk.clip_loss(x, y, 3.0, process_group=dist.group.WORLD)
    except ValueError as error:
        return str(error)
    return ""


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module", params=[2, *(pytest.param(world, marks=pytest.mark.full) for world in (1, 4))])
def ranks(request, tmp_path_factory):
    world, folder = request.param, tmp_path_factory.mktemp("ranks")
    mp.spawn(worker, (world, free_port(), str(folder)), world)
    return world, [torch.load(folder / f"{rank}.pt") for rank in range(world)]


def single_losses(name, world):
    """Each rank's loss, ranks of its rows and the parameters, computed by one process with all rows."""
    x, y, ids = data(world, OPTIONS[name].get("ragged", False))
    towers, scale = encoders()
    options = {k: v for k, v in OPTIONS[name].items() if k not in ("ids", "ragged", "mask")}
    query = towers[0](torch.cat(x))
    key = query if options.get("exclude_self") else towers[1](torch.cat(y))
    if OPTIONS[name].get("ids"):
        options.update(query_ids=torch.cat(ids), key_ids=torch.cat(ids))
    counts = [len(part) for part in x]
    if "mask" in OPTIONS[name]:
        options[OPTIONS[name]["mask"]] = masks_of(counts)[OPTIONS[name]["mask"]]
    rows, stats = sk.contrastive_energy(
        query, key, logit_scale=scale, normalize=True, reduction="none", return_stats=True, **options
    )
    losses = [
        part.sum() / (rank >= 0).sum() for part, rank in zip(rows.split(counts), stats.rank.split(counts), strict=True)
    ]
    return losses, stats.rank.split(counts), [*towers[0].parameters(), *towers[1].parameters(), scale]


@pytest.mark.parametrize("name", OPTIONS)
def test_averaged_gradients_equal_those_of_the_mean_over_ranks(ranks, name):
    world, results = ranks
    losses, rank_statistics, parameters = single_losses(name, world)
    for rank in range(world):
        torch.testing.assert_close(results[rank][name][0], losses[rank].detach())
        assert torch.equal(results[rank][name][2], rank_statistics[rank])
    want = torch.autograd.grad(torch.stack(losses).mean(), parameters, allow_unused=True, materialize_grads=True)
    for rank in range(world):
        for got, grad in zip(results[rank][name][1], want, strict=True):
            torch.testing.assert_close(got, grad)


RINGS = [f"{name} in a ring" for name in ("nt_xent", "info_nce", "clip_loss", "siglip_loss", "contrastive_energy")]


@pytest.mark.parametrize("name", ["nt_xent", "clip_loss", "siglip_loss", *RINGS])
def test_named_losses(ranks, name):
    world, results = ranks
    x, y, _ = data(world, False)
    towers, _ = encoders()
    features = [tower(torch.cat(part)) for tower, part in zip(towers, (x, y), strict=True)]
    loss = {
        "nt_xent": lambda a, b: sk.nt_xent(a, b),
        "clip_loss": lambda a, b: sk.clip_loss(a, b, 2.0),
        "siglip_loss": lambda a, b: sk.siglip_loss(a, b, 2.0, -1.0),
        "info_nce": lambda a, b: sk.info_nce(a, b),
        "contrastive_energy": lambda a, b: sk.clip_loss(a, b, 2.0),
    }[name.removesuffix(" in a ring")](*features)
    torch.testing.assert_close(torch.stack([results[rank][name][0] for rank in range(world)]).mean(), loss.detach())
    (want,) = torch.autograd.grad(loss, towers[0].weight)
    for rank in range(world):
        torch.testing.assert_close(results[rank][name][1], want)


@pytest.fixture
def alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_ids_of_the_bank_alone_over_ranks(alone):
    query, key, bank = torch.randn(4, 3), torch.randn(4, 3), torch.randn(2, 3)
    options = {"bank": bank, "query_ids": torch.arange(4), "bank_ids": torch.tensor([1, 9]), "direction": "symmetric"}
    expected = sk.contrastive_energy(query, key, **options)
    torch.testing.assert_close(sk.contrastive_energy(query, key, process_group=alone, **options), expected)


def test_masks_over_ranks_have_the_keys_of_all(alone):
    x, mask = torch.randn(3, 4), torch.ones(3, 3, dtype=torch.bool)
    with pytest.raises(
        ValueError, match=r"candidate_mask must have shape .* keys of all ranks = \(3, 3\); got \(3, 2\)"
    ):
        sk.contrastive_energy(x, x, candidate_mask=mask[:, :2], process_group=alone)


@pytest.mark.full
def test_a_compiled_function_breaks_at_the_process_group(alone):
    x = torch.randn(3, 4, requires_grad=True)

    def loss(x):
        return 2 * sk.clip_loss(x, x.roll(1, 0), 3.0, process_group=alone)

    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(loss)(x), loss(x))
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="graph_break"):
        torch.compile(loss, fullgraph=True)(x)


def test_ranks_that_disagree_about_gradients_raise(ranks):
    """Instead of waiting for each other."""
    world, results = ranks
    if world == 2:
        for result in results:
            assert "the ranks must agree on which features require grad" in result["disagreement"]
