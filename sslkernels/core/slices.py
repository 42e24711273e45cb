"""How the rows of a vocabulary are split over the ranks of a process group, and which of them a rank was given."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from sslkernels.core import checks
from sslkernels.core.ranks import exchange, group_name, group_named

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


class Slices(NamedTuple):
    """How the rows of a vocabulary are split over the ranks of a group: `sizes` rows each, in the order of the ranks.
    This rank has the rows [start, stop) of `total`."""

    group: Any
    rank: int
    sizes: tuple[int, ...]

    @property
    def start(self) -> int:
        return sum(self.sizes[: self.rank])

    @property
    def stop(self) -> int:
        return self.start + self.sizes[self.rank]

    @property
    def total(self) -> int:
        return sum(self.sizes)

    @property
    def largest(self) -> int:
        return max(self.sizes)

    def part(self, values: Tensor) -> Tensor:
        """This rank's rows of a tensor with a row for each class."""
        return values[self.start : self.stop]


# The slices that were exchanged for a weight. The key is the weight, not its size: two heads may have slices of equal
# size on one rank alone, and all ranks must exchange at the same calls.
_exchanged: WeakIdKeyDictionary = WeakIdKeyDictionary()


def slices_of(
    function: str, name: str, weight: Tensor, vocab_start: int | None = None, sizes: tuple[int, ...] = ()
) -> Slices:
    """The slices of a vocabulary of which this rank has the rows `weight`, in the group of this name.

    sizes: the sizes of all slices, if known; otherwise the ranks exchange them, read them on the host and cache them as
    long as the weight lives. vocab_start: the caller's claim where this rank's slice begins; every rank raises
    `ValueError` if the claim of any rank contradicts the sizes as they are exchanged, afterwards that rank alone.
    """
    group = group_named(name)
    rank = dist.get_rank(group)
    if not sizes:
        known = _exchanged.get(weight)
        if known is None or known.group is not group or known.sizes[rank] != weight.shape[0]:
            claim = [weight.shape[0], -1 if vocab_start is None else vocab_start]
            claims = exchange(torch.tensor(claim, dtype=torch.int64, device=weight.device), group)
            known = Slices(group, rank, tuple(size for size, _ in claims))
            begins = list(itertools.accumulate((0, *known.sizes)))
            for other, (_, begin) in enumerate(claims):
                if begin not in (-1, begins[other]):
                    must = f"be the number of rows of the ranks before, {begins[other]} on rank {other}"
                    checks.fail(ValueError, function, "vocab_start", must, begin)
            if known.total == 0:
                checks.fail(ValueError, function, "linear_weight", "have at least one row on a rank", "none")
            _exchanged[weight] = known
        sizes = known.sizes
    slices = Slices(group, rank, tuple(sizes))
    if vocab_start not in (None, slices.start):
        must = f"be the number of rows of the ranks before, {slices.start}"
        checks.fail(ValueError, function, "vocab_start", must, vocab_start)
    return slices


class OwnSlice(NamedTuple):
    """This rank's slice as plain tensors, the name of the group (None without one), and the sizes of all slices (empty
    if they are still to be exchanged)."""

    weight: Tensor
    bias: Tensor | None
    group: str | None
    sizes: tuple[int, ...]


def own_slice(
    function: str, weight: Tensor, bias: Tensor | None, process_group: Any, vocab_start: int | None
) -> OwnSlice:
    """The slice of a vocabulary that this rank passes to `function` as linear_weight and linear_bias: plain tensors
    with a process_group, or DTensors on a tensor-parallel mesh.

    While torch.compile traces, the sizes of plain tensors are left to the operators, which exchange them when they run.
    """
    checks.integer(function, "vocab_start", vocab_start, low=0, optional=True)
    name = None if process_group is None else group_name(function, process_group)
    if is_dtensor(weight):
        return _dtensor_slice(function, weight, bias, name, vocab_start)
    if name is None:
        if vocab_start not in (None, 0):
            checks.fail(ValueError, function, "vocab_start", "be 0 without a process_group", vocab_start)
        return OwnSlice(weight, bias, None, ())
    if torch.compiler.is_compiling() or not isinstance(weight, Tensor) or weight.dim() == 0:
        return OwnSlice(weight, bias, name, ())
    return OwnSlice(weight, bias, name, slices_of(function, name, weight, vocab_start).sizes)


def is_dtensor(value: Any) -> TypeGuard[DTensor]:
    if type(value) in (Tensor, torch.nn.Parameter):  # torch.compile traces no further than this
        return False
    return type(value).__module__.startswith("torch.distributed.tensor") and hasattr(value, "placements")


def _dtensor_slice(function: str, weight: Any, bias: Any, name: str | None, vocab_start: int | None) -> OwnSlice:
    mesh, placements = weight.device_mesh, weight.placements
    if mesh.ndim == 1 and type(placements[0]).__name__ == "Shard" and placements[0].dim == 0:
        over = mesh.get_group().group_name
        if name == over or (name is None and mesh.mesh_dim_names == ("tp",)):
            if vocab_start is not None:
                checks.fail(ValueError, function, "vocab_start", "be None with a DTensor", vocab_start)
            if is_dtensor(bias):
                if (bias.device_mesh, bias.placements) != (mesh, placements):
                    must = f"be sharded as linear_weight, {placements}"
                    checks.fail(ValueError, function, "linear_bias", must, bias.placements)
                bias = bias.to_local()
            most = -(-weight.shape[0] // mesh.size())
            sizes = tuple(max(min(weight.shape[0] - most * rank, most), 0) for rank in range(mesh.size()))
            return OwnSlice(weight.to_local(), bias, over, sizes)
    must = (
        "be a plain tensor or a DTensor Shard(0) over one mesh dimension that is named 'tp' or is the process_group "
        "(a parameter that is sharded otherwise, as by FSDP2, is whole in the module that owns it: compute the loss "
        "there, as sslkernels.nn.LinearHead does, or pass full_tensor(grad_placements=[Partial('avg')]), whose "
        "gradient is averaged over data-parallel ranks)"
    )
    names = f" of dimensions {mesh.mesh_dim_names}" if mesh.mesh_dim_names else ""
    checks.fail(TypeError, function, "linear_weight", must, f"DTensor {tuple(placements)} on a mesh{names}")
    raise AssertionError
