"""CLIP's loss over ranks, forward and backward: keys gathered, keys in a ring, open_clip's `ClipLoss`, all logits on
every rank. A rank is a process with one thread that talks by gloo.

    python -m benchmarks.over_ranks [--world 2] [--rows 1024] [--dim 256] [--rounds 30]

Prints, per provider, the least time of a round in which the slowest rank counts, and the peak memory of a rank beyond
features and gradients.
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

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


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


def providers(rank: int, world: int) -> dict[str, Loss]:
    import torch.distributed.nn  # noqa: F401

    found: dict[str, Loss] = {"clip_loss": gathered, "clip_loss(ring=True)": ring, "all logits everywhere": all_logits}
    package = importlib.util.find_spec("open_clip")
    if package is not None:  # its losses alone, without the models and what these import
        path = Path(package.origin).parent / "loss.py"
        spec = importlib.util.spec_from_file_location("open_clip_loss", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        loss = module.ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world)
        found["open_clip ClipLoss(local_loss=True, gather_with_grad=True)"] = loss
    return found


def worker(rank: int, world: int, port: int, options: argparse.Namespace) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    generator = torch.Generator().manual_seed(rank)
    leaves = [
        F.normalize(torch.randn(options.rows, options.dim, generator=generator), dim=1).requires_grad_()
        for _ in range(2)
    ] + [torch.tensor(20.0, requires_grad=True)]
    for leaf in leaves:
        leaf.grad = torch.zeros_like(leaf)
    losses = providers(rank, world)
    least = dict.fromkeys(losses, float("inf"))
    for _ in range(options.rounds):
        for name, loss in losses.items():
            dist.barrier()
            start = time.perf_counter()
            loss(*leaves).backward()
            seconds = torch.tensor(time.perf_counter() - start)
            dist.all_reduce(seconds, dist.ReduceOp.MAX)
            least[name] = min(least[name], seconds.item())
    for name, loss in losses.items():
        dist.barrier()
        peak, _ = peak_extra(lambda loss=loss: loss(*leaves).backward(), torch.device("cpu"))
        if rank == 0:
            print(f"{name:58} {1e3 * least[name]:8.1f} ms {(peak or 0) / 1e6:8.1f} MB", flush=True)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.over_ranks", description=__doc__)
    for name, default in (("world", 2), ("rows", 1024), ("dim", 256), ("rounds", 30)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(worker, (options.world, port, options), options.world)


if __name__ == "__main__":
    main()
