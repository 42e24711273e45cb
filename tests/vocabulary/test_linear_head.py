"""nn.LinearHead under DDP, FSDP2 and tensor parallelism (gloo): parameter gradients of one process with all rows."""

from __future__ import annotations

import copy
import os
import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from test_vocabulary_ranks import alone, spawned  # noqa: F401
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.utils._pytree import tree_map_only

import sslkernels as sk

pytestmark = pytest.mark.costly("processes start")
VOCAB, DIM, ROWS = 13, 6, 8


class Model(nn.Module):
    """An encoder of two layers and a head, whose weight may be the embedding's."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, DIM)
        self.encoder = nn.Linear(DIM, DIM)
        self.head = sk.nn.LinearHead(DIM, VOCAB)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids, labels, **options):
        return self.head(self.encoder(self.embedding(ids)).tanh(), labels, **options)


def model_of(tied: bool, device: str = "cpu") -> Model:
    torch.manual_seed(0)
    return Model(tied).double().to(device)


def data(device: str | torch.device = "cpu"):
    generator = torch.Generator().manual_seed(1)
    ids, labels = (torch.randint(0, VOCAB, (ROWS,), generator=generator) for _ in range(2))
    labels[:3] = labels[5] = -100
    return ids.to(device), labels.to(device)


def expected(tied: bool, **options):
    model, (ids, labels) = model_of(tied), data()
    loss = model(ids, labels, **options)
    loss.sum().backward()
    return loss.detach(), [parameter.grad for parameter in model.parameters()]


def gradients(model: nn.Module) -> list[torch.Tensor]:
    grads = [parameter.grad for parameter in model.parameters()]
    return [grad.full_tensor() if isinstance(grad, DTensor) else grad for grad in grads]


def data_parallel(model: nn.Module, rank: int, world: int, **options):
    """Two accumulated steps of this rank's rows; the loss of each is a part of the global mean, times the ranks that
    gradients are averaged over."""
    ids, labels = (part.chunk(world)[rank] for part in data(next(model.parameters()).device))
    count = int((data()[1] != -100).sum())
    for rows in (slice(0, 1), slice(1, None)):
        (world * model(ids[rows], labels[rows], num_items=count, **options)).backward()
    return gradients(model)


def fsdp(tied: bool, layout: str, device: str = "cpu", **policy) -> nn.Module:
    model = model_of(tied, device)
    if layout == "own group":
        fully_shard(model.head, **policy)
    if layout == "tied group":
        fully_shard([model.embedding, model.head], **policy)
    return fully_shard(model, **policy)


def heads(rank: int, world: int, device: str) -> dict:
    """Gradients under DDP, FSDP2 and tensor parallelism."""
    found, mesh_device = {}, device.partition(":")[0]
    for tied in (False, True):
        model = nn.parallel.DistributedDataParallel(model_of(tied, device))
        found["ddp", tied] = data_parallel(model, rank, world)
        found["root", tied] = data_parallel(fsdp(tied, "root", device), rank, world, mode="compact")
    found["own group", False] = data_parallel(fsdp(False, "own group", device), rank, world)
    found["tied group", True] = data_parallel(fsdp(True, "tied group", device), rank, world)
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    found["half"] = data_parallel(fsdp(True, "tied group", device, mp_policy=half), rank, world)

    for name, plan in {
        "plan": ColwiseParallel(),
        "replicated": ColwiseParallel(output_layouts=Replicate()),
        "kept": ColwiseParallel(use_local_output=False),
    }.items():
        for reduction in ("mean", "none"):
            model = model_of(False, device)
            parallelize_module(model.head, init_device_mesh(mesh_device, (world,)), plan)
            loss = model(*data(device), reduction=reduction)
            loss.sum().backward()
            found[name, reduction] = (loss.detach(), gradients(model))

    mesh = init_device_mesh(mesh_device, (world,), mesh_dim_names=("tp",))
    found["tp mesh"] = of_dtensor(mesh, device)
    found["given group"] = of_dtensor(init_device_mesh(mesh_device, (world,)), device, process_group=True)
    return tree_map_only(torch.Tensor, torch.Tensor.cpu, found)


def worker(rank: int, world: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    found = heads(rank, world, "cpu") | {"recipes": recipes(rank, world)}
    if rank == 0:
        torch.save(found, f"{folder}/0.pt")
    else:
        torch.save(None, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def documented() -> dict:
    """What the Python blocks of docs/distributed.md define."""
    text = (Path(__file__).parents[2] / "docs/distributed.md").read_text()
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(block, names)
    return names


class VocabParallelOptions(NamedTuple):
    start: int
    stop: int
    group: object
    reduce_e_grad: bool


def recipe_problem():
    generator = torch.Generator().manual_seed(3)
    hidden, weight = (torch.randn(n, DIM, generator=generator, dtype=torch.float64) for n in (ROWS, VOCAB))
    return hidden.requires_grad_(), weight, data()[1]


def recipes(rank, world):
    names, group = documented(), dist.group.WORLD
    hidden, weight, labels = recipe_problem()
    start, stop = 5 * rank, 5 * rank + 5 if rank < world - 1 else VOCAB
    own = weight[start:stop].clone().requires_grad_()
    rows = slice(3 * rank, 3 * rank + 3 if rank < world - 1 else ROWS)
    parallel = VocabParallelOptions(start, stop, group, True)
    logprobs, entropy = names["liger_selected_logprobs"](hidden, own, labels, group, 0.5, -100, True)
    losses = {
        "slice": names["loss_of_slice"](hidden, own, labels, group),
        "megatron": names["megatron_linear_cross_entropy"](hidden, own, labels, group, "mean", -100, False),
        "megatron sp": names["megatron_linear_cross_entropy"](
            hidden[rows], own, labels[rows], group, "mean", -100, True
        ),
        "liger": logprobs.sum(),
        "cce": names["cce_linear_cross_entropy"](hidden, own, labels, softcap=3.0, vocab_parallel_options=parallel),
    }
    found = {"entropy": entropy}
    for name, loss in losses.items():
        grads = torch.autograd.grad(loss, (hidden, own))
        if name == "megatron sp":
            dist.all_reduce(grads[0])  # each rank has its rows
        every = [torch.empty(5 if i < world - 1 else VOCAB - 5 * i, DIM, dtype=torch.float64) for i in range(world)]
        every[rank] = grads[1]
        for i, part in enumerate(every):
            dist.broadcast(part, i)
        found[name] = loss.detach(), [grads[0], torch.cat(every)]

    torch.manual_seed(0)
    model = names["sharded"](names["MaskedLanguageModel"](VOCAB, DIM).double())
    found["fsdp"] = data_parallel(model, rank, world)
    torch.manual_seed(0)
    model = names["MaskedLanguageModel"](VOCAB, DIM).double()
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    model = names["tensor_parallel"](model, init_device_mesh("cpu", (world,)))
    loss = model(*data())
    loss.backward()
    found["plan"] = loss.detach(), gradients(model)
    model = fsdp(False, "own group")
    model.head, head = nn.Identity(), model.head
    model.forward = lambda ids: model.encoder(model.embedding(ids)).tanh()
    titan = names["TitanLoss"]()
    titan.set_lm_head(head)
    ids, labels = (part.chunk(world)[rank] for part in data())
    loss, metrics = titan(model(ids), labels, torch.tensor(4))
    assert metrics == {}
    (world * loss).backward()
    found["titan"] = [p.grad.full_tensor() for p in (*model.parameters(), *head.parameters())]
    return found


def of_dtensor(mesh, device: str, process_group: bool = False):
    model, (ids, labels) = model_of(False, device), data(device)
    weight, bias = (distribute_tensor(p.detach(), mesh, [Shard(0)]).requires_grad_() for p in model.head.parameters())
    hidden = model.encoder(model.embedding(ids)).tanh()
    group = {"process_group": mesh.get_group()} if process_group else {}
    loss = sk.linear_cross_entropy(hidden, weight, labels, linear_bias=bias, **group)
    loss.backward()
    grads = [*model.embedding.parameters(), *model.encoder.parameters()]
    return loss.detach(), [*(p.grad for p in grads), weight.grad.full_tensor(), bias.grad.full_tensor()]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return spawned(worker, 2, tmp_path_factory.mktemp("head"))[0]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ["ddp", "root", "own group", "tied group"])
def test_data_parallel_gradients(found, name, tied):
    if (name, tied) not in found:
        pytest.skip("torch refuses a weight in two groups, and needs none for two weights")
    _, want = expected(tied)
    for got, grad in zip(found[name, tied], want, strict=True):
        torch.testing.assert_close(got, grad, rtol=1e-12, atol=1e-12)


def test_mixed_precision(found):
    _, want = expected(True)
    for got, grad in zip(found["half"], want, strict=True):
        assert (got - grad).norm() < 0.02 * grad.norm()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", ["plan", "replicated", "kept"])
def test_a_tensor_parallel_plan(found, name, reduction):
    compare(found[name, reduction], expected(False, reduction=reduction))


@pytest.mark.parametrize("name", ["tp mesh", "given group"])
def test_a_sharded_weight_is_the_slice(found, name):
    compare(found[name], expected(False))


@pytest.mark.parametrize("name", ["slice", "megatron", "megatron sp", "liger", "cce"])
def test_recipes_of_slices(found, name):
    hidden, weight, labels = recipe_problem()
    weight.requires_grad_()
    options = {
        "liger": {"logit_scale": 2.0, "reduction": "sum"},
        "cce": {"softcap": 3.0},
    }.get(name, {})
    loss, stats = sk.linear_cross_entropy(hidden, weight, labels, return_stats=True, **options)
    sign = -1 if name == "liger" else 1
    compare(found["recipes"][name], (sign * loss.detach(), [*torch.autograd.grad(sign * loss, (hidden, weight))]))
    if name == "liger":
        torch.testing.assert_close(found["recipes"]["entropy"], stats.entropy)


def test_recipes_of_models(found):
    tied, (ids, labels) = documented(), data()
    torch.manual_seed(0)
    model = tied["MaskedLanguageModel"](VOCAB, DIM).double()
    assert model(ids).shape == (ROWS, VOCAB)
    loss = model(ids, labels)
    loss.backward()
    for got, parameter in zip(found["recipes"]["fsdp"], model.parameters(), strict=True):
        torch.testing.assert_close(got, parameter.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found["recipes"]["plan"][0], loss.detach())
    _, want = expected(False)
    for got, grad in zip(found["recipes"]["titan"], want, strict=True):
        torch.testing.assert_close(got, grad, rtol=1e-12, atol=1e-12)


def compare(got, want):
    torch.testing.assert_close(got[0], want[0], rtol=1e-12, atol=1e-12)
    for one, other in zip(got[1], want[1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_logits_and_shared_parameters():
    linear = nn.Linear(DIM, VOCAB).eval()
    head, x = sk.nn.LinearHead.from_linear(linear), torch.randn(4, DIM)
    assert head.weight is linear.weight
    assert head.bias is linear.bias
    assert not head.training
    assert torch.equal(head(x), linear(x))
    assert torch.equal(head(input=x), linear(x))
    y = torch.tensor([1, -100, 3, 4])
    loss, stats = head(x, y, label_smoothing=0.1, num_items=7, return_stats=True)
    want = nn.functional.cross_entropy(linear(x), y, label_smoothing=0.1, reduction="sum") / 7
    torch.testing.assert_close(loss, want)
    assert stats.lse.shape == y.shape
    assert copy.deepcopy(head).weight is not head.weight
    assert sk.nn.LinearHead.from_linear(nn.Linear(DIM, VOCAB, bias=False)).bias is None
    with pytest.raises(TypeError, match=r"^LinearHead.from_linear: linear must be a torch.nn.Linear; got Embedding"):
        sk.nn.LinearHead.from_linear(nn.Embedding(3, 4))
    with pytest.raises(ValueError, match=r"^LinearHead: num_items must not be given without labels; got a value"):
        head(x, num_items=3)
    with pytest.raises(ValueError, match=r"^LinearHead: shift must not be given without labels; got a value"):
        head(x, shift=1)


def test_a_weight_on_a_data_parallel_mesh_is_refused(alone):  # noqa: F811
    x, y, w = torch.randn(4, DIM), torch.tensor([1, 2, 3, 4]), torch.randn(VOCAB, DIM)
    for names, placement in (((), Shard(0)), (("dp",), Shard(0)), (("tp",), Shard(1)), (("tp",), Replicate())):
        mesh = init_device_mesh("cpu", (1,), mesh_dim_names=names or None)
        with pytest.raises(TypeError, match=r"linear_weight must be a plain tensor or .*sslkernels.nn.LinearHead does"):
            sk.linear_cross_entropy(x, distribute_tensor(w, mesh, [placement]), y)
    sharded = distribute_tensor(w, init_device_mesh("cpu", (1,), mesh_dim_names=("tp",)), [Shard(0)])
    torch.testing.assert_close(sk.linear_cross_entropy(x, sharded, y), sk.linear_cross_entropy(x, w, y))
    with pytest.raises(ValueError, match=r"vocab_start must be None with a DTensor; got 0"):
        sk.linear_cross_entropy(x, sharded, y, vocab_start=0)
