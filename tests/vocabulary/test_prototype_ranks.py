"""Prototypes over ranks (gloo): centers of the rows of all, and distillation over slices of the prototypes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

import interpreter
import pytest
import torch
import torch.distributed as dist
from test_vocabulary_ranks import spawned
from torch import Tensor
from torch.utils._pytree import tree_map_only

import sslkernels as sk

pytestmark = pytest.mark.costly("processes start")
N, M, V, D = 18, 5, 23, 6
WORLDS = [2, pytest.param(4, marks=pytest.mark.full)]


def sizes_of(world: int, total: int, empty: bool) -> list[int]:
    """Uneven parts, the first of them empty."""
    sizes = [3, 1, 2][: world - 1]
    sizes[:1] = [size * (not empty) for size in sizes[:1]]
    return [*sizes, total - sum(sizes)]


class Case(NamedTuple):
    backend: str = "cpu"
    dtype: torch.dtype = torch.float64
    empty: bool = False
    index: bool = True
    every: bool = True
    masked: bool = False
    options: dict[str, Any] = {}  # noqa: RUF012


def cases() -> Iterator[Case]:
    yield Case(options={"workspace_bytes": 1})
    yield Case("reference", index=False, options={"divergence": "kl", "mode": "compact"})
    yield Case("cpu", torch.float32, True, options={"reduction": "none", "divergence": "kl"})
    yield Case("cpu", torch.float32, every=False, index=False, options={"reduction": "sum"})
    yield Case("cpu", masked=True, options={"num_items": 7, "workspace_bytes": 1, "mode": "compact"})
    yield Case("triton", torch.float32, True, options={"divergence": "kl", "on_empty": "zero"})


def problem(number: int, case: Case) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(tensors that want a gradient, other tensors) of all ranks."""
    g = torch.Generator().manual_seed(number)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64).to(case.dtype)

    leaves = {"student": draw(N, D), "student_weight": draw(V, D)}
    fixed = {"teacher": draw(M if case.index else N, D), "teacher_weight": 0.3 * draw(V, D)}
    if case.every:
        leaves |= {"student_bias": draw(V), "row_weight": draw(N), "student_temperature": draw(1).abs() + 0.3}
        fixed |= {"teacher_bias": draw(V), "center": draw(V) + 1000}
        if case.masked:  # the whole of a first slice, and a prototype of the last
            leaves["student_bias"][[0, 1, 2, 20]] = -torch.inf
            fixed["teacher_bias"][[0, 1, 2, 20]] = -torch.inf
    if case.index:
        fixed["teacher_index"] = torch.randint(-1, M, (N, 2), generator=g)
    return leaves, fixed


SLICED = ("student_weight", "student_bias", "teacher_weight", "teacher_bias", "center")


def step(leaves: dict[str, Tensor], fixed: dict[str, Tensor], case: Case, group: Any) -> dict[str, Any]:
    for leaf in leaves.values():
        leaf.requires_grad_()
    with sk.use_backend(case.backend):
        loss, stats = sk.linear_distillation(**leaves, **fixed, process_group=group, return_stats=True, **case.options)
        grads = torch.autograd.grad(
            loss, list(leaves.values()), torch.linspace(-1, 2, loss.numel()).view_as(loss).to(loss)
        )
    return {"loss": loss.detach(), "stats": stats, "grads": dict(zip(leaves, grads, strict=True))}


def centers(rows: Tensor, head: Tensor, group: Any) -> dict[str, Tensor]:
    """rows: of this rank, or of all."""
    module = sk.nn.PrototypeLoss(V, process_group=group).double().to(rows.device)
    module(rows, head, rows, head)
    half = rows[: rows.shape[0] // 2]
    mask = torch.arange(rows.shape[0], device=rows.device) % 2 == 0
    return {
        "sinkhorn": sk.sinkhorn_center(rows, head, temperature=0.5, process_group=group),
        "one": sk.sinkhorn_center(half.float(), head.float(), temperature=0.05, iterations=1, process_group=group),
        "masked": sk.sinkhorn_center(rows, head, temperature=0.5, row_mask=mask, process_group=group),
        "mean": sk.teacher_center(rows, head, process_group=group),
        "module": module.center,
    }


def rows_of_centers() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(40, D, generator=g, dtype=torch.float64), torch.randn(V, D, generator=g, dtype=torch.float64)


def parts_of_rows(world: int) -> list[Tensor]:
    """Rows of each rank, one of which has none, and all others an even number of them."""
    rows, _ = rows_of_centers()
    return list(rows.split([0, 14, 40 - 14] if world == 2 else [14, 0, 6, 2, 18]))[-world:]


def results_of(rank: int, world: int, device: str) -> list[Any]:
    """The results of each case, and the centers."""
    group = dist.group.WORLD
    found: list[Any] = []
    for number, case in enumerate(cases()):
        if device != "cpu" and case.backend == "cpu":
            case = case._replace(backend="cuda")
        leaves, fixed = problem(number, case)
        sizes = sizes_of(world, V, case.empty)
        own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        leaves, fixed = (
            {k: (t[own].clone() if k in SLICED else t).to(device) for k, t in given.items()}
            for given in (leaves, fixed)
        )
        found.append(step(leaves, fixed, case, group))
    found.append(centers(parts_of_rows(world)[rank].to(device), rows_of_centers()[1].to(device), group))
    return tree_map_only(Tensor, Tensor.cpu, found)


def _on_rank(rank: int, world: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    interpreter.repair()
    dist.init_process_group("gloo", init_method=f"tcp://localhost:{port}", rank=rank, world_size=world)
    torch.save(results_of(rank, world, "cpu"), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=WORLDS)
def ranks(request, tmp_path_factory) -> list[Any]:
    return spawned(_on_rank, request.param, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("number", range(len(list(cases()))))
def test_slices_are_the_whole(number, ranks):
    assert_whole(number, ranks)


def assert_whole(number: int, ranks: list[Any], backend: str | None = None, limits: tuple = (2e-5, 1e-12)) -> None:
    """Loss, statistics and gradients are those of one process that has all prototypes. limits: in float32, float64."""
    case = list(cases())[number]
    expected = step(*problem(number, case), case._replace(backend=backend or case.backend), None)
    limit = limits[case.dtype == torch.float64]
    close = {"rtol": limit, "atol": limit}
    sizes = sizes_of(len(ranks), V, case.empty)
    for rank, found in enumerate(ranks):
        own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        got, stats = found[number], expected["stats"]
        torch.testing.assert_close(got["loss"], expected["loss"], **close)
        assert torch.equal(got["loss"], ranks[0][number]["loss"])
        torch.testing.assert_close(got["stats"], stats._replace(usage=stats.usage[own]), **close)
        for name, grad in expected["grads"].items():
            torch.testing.assert_close(got["grads"][name], grad[own] if name in SLICED else grad, **close)


def test_centers_use_the_rows_of_all_ranks(ranks):
    """Ranks with different numbers of rows, one without any."""
    parts = parts_of_rows(len(ranks))
    rows, head = torch.cat(parts), rows_of_centers()[1]
    expected = centers(rows, head, None)
    half = torch.cat([part[: part.shape[0] // 2] for part in parts])
    expected["one"] = sk.sinkhorn_center(half.float(), head.float(), temperature=0.05, iterations=1)
    for found in ranks:
        got = copy.copy(found[-1])
        torch.testing.assert_close(got.pop("one"), expected["one"], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(got, {k: v for k, v in expected.items() if k != "one"}, rtol=1e-10, atol=1e-12)
