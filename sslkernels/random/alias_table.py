"""Indices from a fixed distribution in constant time each: the alias method on the random streams."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sslkernels.core import checks
from sslkernels.core.operator import operator
from sslkernels.random.philox import random_words
from sslkernels.random.seeds import seed_tensor
from sslkernels.random.streams import shape_of

NAME = "AliasTable"
_ONE = 2**32  # the mass of a bucket
_WEIGHT_DTYPES = (*checks.FLOAT_DTYPES, *checks.INDEX_DTYPES)


def masses(weights: Tensor) -> Tensor:
    """The integers, with a sum of 2**32 for each weight, that are proportional to the weights, each to within about 1.

    Rounded sums of the first weights, so that nothing is left over and a weight of 0 has mass 0.
    """
    total = (weights / weights.max()).cumsum(0)
    ends = (total / total[-1] * (weights.numel() * _ONE)).round().long()
    return ends.diff(prepend=ends.new_zeros(1))


def alias_table(mass: Tensor) -> Tensor:
    """Vose's table (V, 2) of these masses, exactly: thresholds, and the indices that take the rest of each bucket.

    Vose fills light buckets from a heavy index until this one becomes light itself, and is filled from the next heavy
    one. With the lights and the heavies in their order this is a walk along the sums of what the first ones lack and
    what the first ones have to spare, whose steps are binary searches in these sums.
    """
    index = torch.arange(mass.numel())
    light, heavy = index[mass < _ONE], index[mass >= _ONE]
    lack, spare = (_ONE - mass[light]).cumsum(0), (mass[heavy] - _ONE).cumsum(0)
    threshold, alias = mass.clone(), index.clone()
    alias[light] = heavy[torch.searchsorted(spare, lack - (_ONE - mass[light]))]
    step = torch.searchsorted(lack, spare, right=True)  # with it the heavy index becomes light
    short = step < lack.numel()
    threshold[heavy] = 0  # a full bucket: its alias is itself
    threshold[heavy[short]] = _ONE + spare[short] - lack[step[short]]
    alias[heavy[short]] = heavy[1:][short[:-1]]
    return torch.stack([(threshold ^ 0x80000000) - 0x80000000, alias], 1).to(torch.int32)


def _reference(seed: Tensor, row_ids: Tensor | None, table: Tensor, rows: int, columns: int) -> Tensor:
    high, low = (random_words(seed, row_ids, rows, columns, sample) for sample in (0, 1))
    product = high * table.shape[0] + ((low * table.shape[0]) >> 32)
    bucket, fraction = product >> 32, product & 0xFFFFFFFF
    threshold, alias = (table[bucket, k].long() for k in (0, 1))
    return torch.where(fraction < (threshold & 0xFFFFFFFF), bucket, alias)


def _fill_native(seed: Tensor, row_ids: Tensor | None, table: Tensor, out: Tensor) -> None:
    torch.ops.sslkernels_native.alias_draw(seed, row_ids, table, out)


def _fill_triton(seed: Tensor, row_ids: Tensor | None, table: Tensor, out: Tensor) -> None:
    from sslkernels.random.triton.alias_table import alias_draw as launch_alias_draw

    launch_alias_draw(seed, row_ids, table, out)


def _filled_by(
    fill: Callable[..., None], seed: Tensor, row_ids: Tensor | None, table: Tensor, rows: int, columns: int
) -> Tensor:
    out = seed.new_empty((rows, columns))
    fill(seed, row_ids, table, out)
    return out


_NATIVE = partial(_filled_by, _fill_native)


@operator(
    NAME,
    {"reference": _reference, "cpu": _NATIVE, "cuda": _NATIVE, "triton": partial(_filled_by, _fill_triton)},
    native_ops=("alias_draw",),
)
def alias_draw(seed: Tensor, row_ids: Tensor | None, table: Tensor, rows: int, columns: int) -> Tensor:
    return seed.new_empty((rows, columns))


class AliasTable(nn.Module):
    """Draws indices from a fixed distribution, in a time that does not depend on how many there are.

    Walker's alias method with Vose's table: a draw looks up one of V buckets, which holds at most two indices, and the
    threshold between them. The table is made once, on the host, in exact integers: index i has the probability
    `weights[i] / weights.sum()` to within 2**-31 / V; a weight of 0 is never drawn. It is the one buffer of a module,
    and so moves, is copied, pickled, saved and loaded with it.

    Args:
        weights: `(V,)`, a tensor of any float dtype, int64 or int32 or a sequence of numbers, finite, not negative and
            not all 0; they need no sum of 1. V is at most 2**31 - 1. The table is on the device of `weights`, which
            the construction reads on the host.

    Raises:
        TypeError, ValueError: for weights of the wrong type, dtype, shape or range.

    Source: Vose, "A linear algorithm for generating random numbers with a given distribution", IEEE Transactions on
    Software Engineering 17, 1991.

    >>> import sslkernels as sk
    >>> counts = torch.tensor([50.0, 20, 7, 0, 3])
    >>> negatives = sk.AliasTable(counts**0.75).draw((2, 8), seed=0)  # word2vec's distribution
    >>> bool((negatives != 3).all())
    True
    """

    table: Tensor

    def __init__(self, weights: Tensor | Sequence[float]) -> None:
        super().__init__()
        if not isinstance(weights, Tensor):
            try:
                weights = torch.as_tensor(weights, dtype=torch.float64)
            except (TypeError, ValueError, RuntimeError):
                must = "be a tensor or a sequence of numbers"
                checks.fail(TypeError, NAME, "weights", must, type(weights).__name__)
        checks.tensor(NAME, "weights", weights, _WEIGHT_DTYPES)
        checks.dims(NAME, "weights", weights, 1, "(V,)", high=1)
        if not 0 < weights.numel() < 2**31:
            checks.fail(ValueError, NAME, "weights", "have 1 to 2**31 - 1 elements", weights.numel())
        on_host = weights.detach().to("cpu", torch.float64)
        low, high = (bound.item() for bound in on_host.aminmax())
        if not (low >= 0 and 0 < high < math.inf):
            must = "be finite, not negative and not all 0"
            checks.fail(ValueError, NAME, "weights", must, f"values from {low:g} to {high:g}")
        self.register_buffer("table", alias_table(masses(on_host)).to(weights.device))

    def extra_repr(self) -> str:
        return str(self.table.shape[0])

    def forward(self, *arguments: Any, **options: Any) -> Tensor:
        """`draw`."""
        return self.draw(*arguments, **options)

    @checks.with_python_numbers
    def draw(
        self,
        shape: Sequence[int],
        *,
        row_ids: Tensor | None = None,
        seed: int | Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Independent indices from the distribution.

        An index depends on seed, row and column alone: it is decided by the words of `random_bits` at its row and
        column (samples 0 and 1), and equal on every backend and device, however the batch is split. Nothing
        else of this size is allocated, and nothing synchronises.

        Args:
            shape: shape of the result, one dimension or more; the last one is the column, all before it the row.
            row_ids: int64 of shape `shape[:-1]`, on the device of the table: the number of each row, in place of its
                flattened index.
            seed: an int in [-2**63, 2**64), or a 0-d int64 tensor on the device of the table.
            generator: draws the seed if `seed` is None; default: torch's default generator of the device.

        Returns:
            int64 tensor of shape `shape`, on the device of the table.

        Raises:
            TypeError, ValueError: for an argument of the wrong type, dtype, shape, device or range.
        """
        name = f"{NAME}.draw"
        size = shape_of(name, shape)
        checks.tensor(name, "row_ids", row_ids, (torch.int64,), optional=True)
        checks.shape(name, "row_ids", row_ids, size[:-1], "shape[:-1]")
        checks.same_device(name, "row_ids", row_ids, "the table", self.table.device)
        rows = math.prod(size[:-1])
        flat_ids = None if row_ids is None else row_ids.reshape(rows).contiguous()
        seed = seed_tensor(name, seed, generator, self.table.device)
        return alias_draw(seed, flat_ids, self.table, rows, size[-1]).reshape(size)
