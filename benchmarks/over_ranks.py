"""Losses over ranks, forward and backward. A rank is a process with one thread that talks by gloo.

    python -m benchmarks.over_ranks [--loss clip | vocabulary] [--world 2] [--rounds 30]

clip: the keys gathered, the keys in a ring, open_clip's `ClipLoss`, all logits on every rank. vocabulary: linear
cross-entropy with the vocabulary in slices, the logits in slices as Megatron has them, the logits gathered.

Prints, per provider, the least time of a round in which the slowest rank counts, and the peak memory of a rank beyond
leaves and gradients.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor

import sslkernels as sk
from benchmarks.memory import peak_extra

Loss = Callable[..., Tensor]
# Rows and width of the leaves of a rank; of the vocabulary, all classes.
SIZES = {"clip": (1024, 256, 0), "vocabulary": (1024, 256, 32768)}


def gathered(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    return sk.clip_loss(image, text, scale, process_group=dist.group.WORLD)


def ring(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    return sk.clip_loss(image, text, scale, process_group=dist.group.WORLD, ring=True)


def all_logits(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """Every rank has the logits of all images and texts, and the loss of all."""
    images, texts = (torch.cat(dist.nn.functional.all_gather(part)) for part in (image, text))
    logits = scale * images @ texts.t()
    target = torch.arange(len(logits))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.t(), target)) / 2


class _FromEachRank(torch.autograd.Function):
    """The values themselves, which each rank uses for a part; their gradient is the sum of the ranks' gradients."""

    @staticmethod
    def forward(ctx, values):
        return values.view_as(values)

    @staticmethod
    def backward(ctx, grad):
        dist.all_reduce(grad)
        return grad


class _LogitsInSlices(torch.autograd.Function):
    """Megatron's cross-entropy of logits (N, V / W): maximum, target's logit and sum of exponentials are reduced."""

    @staticmethod
    def forward(ctx, logits, target):
        begin = dist.get_rank() * logits.shape[1]
        largest = logits.amax(1)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        logits = logits - largest.unsqueeze(1)
        own = (target >= begin) & (target < begin + logits.shape[1])
        index = torch.where(own, target - begin, 0).unsqueeze(1)
        at_target = torch.where(own, logits.gather(1, index).squeeze(1), 0)
        dist.all_reduce(at_target)
        exponentials = logits.exp_()
        sums = exponentials.sum(1)
        dist.all_reduce(sums)
        ctx.save_for_backward(exponentials.div_(sums.unsqueeze(1)), index, own)
        return (sums.log() - at_target).mean()

    @staticmethod
    def backward(ctx, grad):
        probability, index, own = ctx.saved_tensors
        probability.scatter_add_(1, index, -own.to(probability.dtype).unsqueeze(1))
        return probability.mul_(grad / len(own)), None


def in_slices(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return sk.linear_cross_entropy(hidden, weight, target, process_group=dist.group.WORLD)


def logits_in_slices(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return _LogitsInSlices.apply(F.linear(_FromEachRank.apply(hidden), weight), target)


def logits_gathered(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    logits = dist.nn.functional.all_gather(F.linear(_FromEachRank.apply(hidden), weight))
    # Divided, because every rank sends the gradient of the same loss.
    return F.cross_entropy(torch.cat(logits, dim=1), target) / dist.get_world_size()


def providers(loss: str, rank: int, world: int) -> dict[str, Loss]:
    import torch.distributed.nn  # noqa: F401

    if loss == "vocabulary":
        return {
            "linear_cross_entropy": in_slices,
            "logits in slices (Megatron's loss)": logits_in_slices,
            "logits gathered": logits_gathered,
        }
    found: dict[str, Loss] = {"clip_loss": gathered, "clip_loss(ring=True)": ring, "all logits everywhere": all_logits}
    package = importlib.util.find_spec("open_clip")
    if package is not None:  # its losses alone, without the models and what these import
        path = Path(package.origin).parent / "loss.py"
        spec = importlib.util.spec_from_file_location("open_clip_loss", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        peer = module.ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world)
        found["open_clip ClipLoss(local_loss=True, gather_with_grad=True)"] = peer
    return found


def tensors(loss: str, rank: int, world: int) -> tuple[list[Tensor], list[Tensor]]:
    """The leaves of a rank, which get gradients, and the other arguments."""
    rows, dim, vocab = SIZES[loss]

    def normal(rows: int, seed: int) -> Tensor:
        return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed))

    if loss == "clip":
        features = [F.normalize(normal(rows, 2 * rank + i), dim=1) for i in range(2)]
        return [*features, torch.tensor(20.0)], []
    target = torch.randint(0, vocab, (rows,), generator=torch.Generator().manual_seed(0))
    return [normal(rows, 0), 0.05 * normal(vocab // world, 1 + rank)], [target]


def worker(rank: int, world: int, port: int, options: argparse.Namespace) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    leaves, others = tensors(options.loss, rank, world)
    for leaf in leaves:
        leaf.requires_grad_().grad = torch.zeros_like(leaf)
    losses = providers(options.loss, rank, world)
    least = dict.fromkeys(losses, float("inf"))
    for _ in range(options.rounds):
        for name, loss in losses.items():
            dist.barrier()
            start = time.perf_counter()
            loss(*leaves, *others).backward()
            seconds = torch.tensor(time.perf_counter() - start)
            dist.all_reduce(seconds, dist.ReduceOp.MAX)
            least[name] = min(least[name], seconds.item())
    for name, loss in losses.items():
        dist.barrier()
        peak, _ = peak_extra(lambda loss=loss: loss(*leaves, *others).backward(), torch.device("cpu"))
        if rank == 0:
            print(f"{name:58} {1e3 * least[name]:8.1f} ms {(peak or 0) / 1e6:8.1f} MB", flush=True)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.over_ranks", description=__doc__)
    parser.add_argument("--loss", choices=SIZES, default="clip")
    for name, default in (("world", 2), ("rounds", 30)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(worker, (options.world, port, options), options.world)


if __name__ == "__main__":
    main()
