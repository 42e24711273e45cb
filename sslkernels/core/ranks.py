"""Over the ranks of a process group: gathers of rows, rings, sums of gradients, and the group's name."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sslkernels.core import checks
from sslkernels.core.autograd import Function, once_differentiable
from sslkernels.core.operator import operator


def over_ranks(group: Any, *tensors: Tensor) -> tuple[Ranks, ...]:
    """The `Ranks` of each of `tensors` (rows, ...), which may differ between ranks only in their number of rows: one
    exchange, read on the host.

    Raises `ValueError` on every rank if the ranks disagree about which tensors require grad: backward would hang.
    """
    rows = [[t.shape[0], int(torch.is_grad_enabled() and t.requires_grad)] for t in tensors]
    local = torch.tensor(rows, dtype=torch.int64, device=tensors[0].device)
    numbers = exchange(local, group)
    if any(rank[i][1] != numbers[0][i][1] for rank in numbers for i in range(len(tensors))):
        wants = [[bool(flag) for _, flag in rank] for rank in numbers]
        raise ValueError(f"process_group: the ranks must agree on which features require grad; got {wants}")
    rank = dist.get_rank(group)
    return tuple(Ranks(group, rank, [row[i][0] for row in numbers]) for i in range(len(tensors)))


def exchange(local: Tensor, group: Any) -> list[Any]:
    """Gathers the numbers of all ranks and reads them on the host."""
    every = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, local, group=group)
    return torch.stack(every).tolist()


class Ranks:
    """How many rows each rank has; this rank has the rows [start, stop) of all `total` rows."""

    def __init__(self, group: Any, rank: int, counts: Sequence[int]) -> None:
        self.group = group
        self.rank = rank
        self.counts = list(counts)
        self.total = sum(counts)
        self.start, self.stop = self.rows_of(rank).start, self.rows_of(rank).stop

    def rows_of(self, rank: int) -> slice:
        start = sum(self.counts[:rank])
        return slice(start, start + self.counts[rank])

    def gather(self, values: Tensor, *, replicated: bool = False) -> Tensor:
        """(rows, ...) of this rank -> (all rows, ...), in the order of the ranks. The gradient of `values` is the sum
        of the gradients on all ranks, or the rank's own where they are all the same: `replicated`."""
        return _Gather.apply(values, self, replicated)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(values, ranks, replicated):
        return gathered(values, ranks)

    @staticmethod
    def setup_context(ctx, inputs, output):
        values, ctx.ranks, ctx.replicated = inputs
        ctx.dtype = values.dtype

    @staticmethod
    def backward(ctx, grad):
        ranks = ctx.ranks
        if ctx.replicated:
            return grad[ranks.start : ranks.stop], None, None
        return _scattered_sum(grad, ranks, ctx.dtype), None, None


@once_differentiable("process_group")
def _scattered_sum(grad: Tensor, ranks: Any, dtype: torch.dtype) -> Tensor:
    return scattered_sum(grad, ranks, dtype)


def gathered(values: Tensor, ranks: Ranks) -> Tensor:
    """(rows, ...) of this rank -> (all rows, ...), in the order of the ranks."""
    padded = _padded(values, ranks)
    parts = padded.new_empty(len(ranks.counts), *padded.shape)
    dist.all_gather(list(parts), padded, group=ranks.group)
    if len(set(ranks.counts)) == 1:
        return parts.flatten(0, 1)
    return torch.cat([part[:count] for part, count in zip(parts, ranks.counts, strict=True)])


def scattered_sum(values: Tensor, ranks: Ranks, dtype: torch.dtype) -> Tensor:
    """This rank's rows of the sum of the ranks' values (all rows, ...)."""
    # At least float32, because the ranks' values are summed. Padded, because every rank receives as many rows.
    sums = torch.promote_types(values.dtype, torch.float32)
    parts = [_padded(rows.to(sums), ranks) for rows in values.split(ranks.counts)]
    total = torch.zeros_like(parts[0])
    if total.numel():
        dist.reduce_scatter(total, parts, group=ranks.group)
    return total[: ranks.stop - ranks.start].to(dtype)


def _padded(values: Tensor, ranks: Ranks) -> Tensor:
    """values (rows, ...) with as many rows as the rank that has most, the further ones zeros."""
    most, rows = max(ranks.counts), values.shape[0]
    if rows == most:
        return values.contiguous()
    padded = values.new_zeros(most, *values.shape[1:])
    padded[:rows] = values
    return padded


def reduced_over(values: Tensor, ranks: Ranks, op: Any = dist.ReduceOp.SUM) -> Tensor:
    """Replaces values, equally many on every rank, by their sum over the ranks, or by the result of another `op`."""
    if values.numel():
        dist.all_reduce(values, op, group=ranks.group)
    return values


def circulate(
    own: Tensor, ranks: Ranks, use: Callable[[int, Tensor, Tensor | None], None], sums: torch.dtype | None = None
) -> Tensor | None:
    """Calls use(rank, block, total) with the rows (n, D) of every rank, this one's first, which travel round the ranks:
    the next block arrives while the one in hand is used, and no rank ever has more than two of others.

    sums: the dtype of the totals (n, D), which `use` adds to, and whose sum over the ranks comes home at last, where it
    is the result; None: total is None.
    """
    world, rank, rows = len(ranks.counts), ranks.rank, own.shape[0]
    before, after = (dist.get_global_rank(ranks.group, (rank + step) % world) for step in (-1, 1))
    block = _padded(own, ranks)

    def started(send: Tensor, receive: Tensor) -> list[dist.P2POp]:
        if not send.numel():
            return []
        ends = (dist.isend, send, after), (dist.irecv, receive, before)
        return [dist.P2POp(op, tensor, peer, ranks.group) for op, tensor, peer in ends]

    home = travelling = None
    for step in range(world):
        owner = (rank - step) % world
        transfers, following, arrived = [], None, None
        if step + 1 < world:
            following = torch.empty_like(block)
            transfers += started(block, following)
        if travelling is not None:  # the sums of the block in hand, as the rank before left them
            arrived = torch.empty_like(travelling)
            transfers += started(travelling, arrived)
        works = dist.batch_isend_irecv(transfers) if transfers else []
        total = None if sums is None else torch.zeros_like(block, dtype=sums)
        use(owner, block[: ranks.counts[owner]], None if total is None else total[: ranks.counts[owner]])
        for work in works:
            work.wait()
        if step == 0:
            home = total
        elif total is not None:
            travelling = total if arrived is None else total.add_(arrived)
        block = following
    if travelling is not None:
        arrived = torch.empty_like(travelling)
        transfers = started(travelling, arrived)
        for work in dist.batch_isend_irecv(transfers) if transfers else []:
            work.wait()
        home.add_(arrived)
    return None if home is None else home[:rows]


def group_name(function: str, process_group: Any) -> str:
    """The name by which a raw operator finds the group; `process_group` may be a DeviceMesh of one dimension."""
    if isinstance(process_group, dist.ProcessGroup):
        return process_group.group_name
    if getattr(process_group, "ndim", None) != 1 or not hasattr(process_group, "get_group"):
        must = "be a torch.distributed.ProcessGroup (of this rank), a DeviceMesh of one dimension or None"
        checks.fail(TypeError, function, "process_group", must, type(process_group).__name__)
    return process_group.get_group().group_name


def group_named(name: str) -> Any:
    return dist.distributed_c10d._resolve_process_group(name)


def _sum_over_ranks(values: Tensor, group: str) -> Tensor:
    # At least float32, because the parts of the ranks were rounded already.
    total = values.to(torch.promote_types(values.dtype, torch.float32), copy=True).contiguous()
    dist.all_reduce(total, group=group_named(group))
    return total.to(values.dtype)


@operator("linear_cross_entropy", dict.fromkeys(("reference", "cpu", "cuda", "triton"), _sum_over_ranks))
def sum_over_ranks(values: Tensor, group: str) -> Tensor:
    """The sum of the ranks' values, rounded once."""
    return torch.empty_like(values, memory_format=torch.contiguous_format)


class _SummedGradient(Function):
    """The values themselves; their gradient is the sum of the gradients on all ranks."""

    @staticmethod
    def forward(values: Tensor, group: str) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        _, ctx.group = inputs

    @staticmethod
    def backward(ctx, grad):
        return None if grad is None else (_summed(grad, ctx.group),)


@once_differentiable("process_group")
def _summed(grad: Tensor, group: str) -> Tensor:
    return sum_over_ranks(grad, group)


def summed_gradient(values: Tensor, group: str) -> Tensor:
    """The values, equal on all ranks, of which each uses a part; their gradient is summed over the ranks."""
    return _SummedGradient.run(values, group)


def check_rank_options(
    function: str, group: str | None, input: Tensor, target: Tensor, input_grad: str, sequence_parallel: bool
) -> None:
    """The options of a loss over slices of a vocabulary."""
    checks.choice(function, "input_grad", input_grad, ("reduce", "partial"))
    checks.boolean(function, "sequence_parallel", sequence_parallel)
    if group is None:
        if sequence_parallel:
            checks.fail(ValueError, function, "sequence_parallel", "be False without a process_group", True)
        if input_grad != "reduce":
            checks.fail(ValueError, function, "input_grad", "be 'reduce' without a process_group", repr(input_grad))
        return
    if sequence_parallel:
        if target.is_floating_point():
            must = "be False with class probabilities, of which a rank has its columns of all rows"
            checks.fail(ValueError, function, "sequence_parallel", must, True)
        checks.dims(function, "input (with sequence_parallel)", input, 2, "(rows, ..., D)")
        if input_grad != "reduce":
            must = "be 'reduce' with sequence_parallel, which reduces it to each rank's rows"
            checks.fail(ValueError, function, "input_grad", must, repr(input_grad))


def on_every_rank(
    group: str,
    input: Tensor,
    target: Tensor,
    token_weight: Tensor | None,
    input_grad: str,
    sequence_parallel: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Input, target and token_weight of all rows, with the gradient of the input that the caller wants, where each rank
    computes what its slice contributes."""
    if not sequence_parallel:
        return input if input_grad == "partial" else summed_gradient(input, group), target, token_weight
    if torch.compiler.is_compiling():
        torch._dynamo.graph_break(msg="sequence_parallel exchanges the numbers of rows on the host")
    (rows,) = over_ranks(group_named(group), input)
    if token_weight is not None:
        token_weight = rows.gather(token_weight, replicated=True)
    return rows.gather(input), rows.gather(target), token_weight


def check_ranks(function: str, name: str, options: dict[str, Any]) -> None:
    """With SSLKERNELS_CHECK_RANKS=1: raises `ValueError` on every rank if their options differ, with which they would
    hang or compute nonsense. Tensors are compared by dtype, number of dimensions and requires_grad."""
    if os.environ.get("SSLKERNELS_CHECK_RANKS") != "1" or torch.compiler.is_compiling():
        return
    own = {"function": function} | {key: _described(value) for key, value in options.items()}
    group = group_named(name)
    every: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(every, own, group=group)
    for rank, other in enumerate(every):
        for key in every[0].keys() | other.keys():
            if other.get(key) != every[0].get(key):
                got = f"{every[0].get(key)} on rank 0, {other.get(key)} on rank {rank}"
                checks.fail(ValueError, function, key, "be the same on every rank", got)


def _described(value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    grad = ", which requires grad" if value.requires_grad and torch.is_grad_enabled() else ""
    return f"a {value.dim()}-dimensional tensor of {value.dtype}{grad}"


@checks.with_python_numbers
def row_ids_of_rank(rows: int, process_group: Any, *, device: torch.device | str | None = None) -> Tensor:
    """Numbers of this rank's rows among the rows of all ranks, in the order of the ranks: with them as `row_ids`, noise
    and masks equal one process's that has all rows, whatever the number of ranks.

    Args:
        rows: how many this rank has, an int of at least 0; may differ between ranks. Every rank must call.
        process_group: a `torch.distributed.ProcessGroup` or a DeviceMesh of one dimension; None: this rank is alone.
        device: of the result; default: where the group exchanges numbers, the current CUDA device with NCCL.

    Returns:
        int64 `(rows,)`. One exchange of an integer, read on the host.

    Raises:
        TypeError, ValueError: for `rows` or a group that is none.

    >>> import sslkernels as sk
    >>> ids = sk.row_ids_of_rank(8, torch.distributed.group.WORLD)  # doctest: +SKIP
    >>> z = sk.gaussian_rsample(mean, logvar, row_ids=ids, seed=0).z  # doctest: +SKIP
    """
    checks.integer("row_ids_of_rank", "rows", rows, low=0)
    if process_group is None:
        return torch.arange(rows, device=device)
    group = group_named(group_name("row_ids_of_rank", process_group))
    exchange_on = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
    over = torch.device(exchange_on if device is None else device)
    counts = exchange(torch.tensor([rows], dtype=torch.int64, device=over), group)
    start = sum(count for (count,) in counts[: dist.get_rank(group)])
    return torch.arange(start, start + rows, device=over)
