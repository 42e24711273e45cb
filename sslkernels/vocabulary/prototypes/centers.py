"""Centers of a teacher's logits over a large head: their mean, and the potentials of Sinkhorn-Knopp.

Sinkhorn-Knopp on exp(u / temperature), rows times prototypes, alternately divides the columns and the rows by their
sums. After any number of iterations a row is softmax(u / temperature - g) for some potentials g (V,), of which
temperature * g is a center. With p the rows under the potentials so far, an iteration is g += log(sum of p over rows).
The first one starts from unnormalised rows and sums in the log domain. From then on each column has an element of at
least 1 / (rows * V), so that plain sums never underflow.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from sslkernels.core import checks
from sslkernels.core.chunks import ROW_MULTIPLE, equal_rows, row_pitch
from sslkernels.core.dtypes import accumulation_dtype, compute_dtype_of
from sslkernels.core.operator import operator
from sslkernels.vocabulary.prototypes.chunked_distillation import WORKSPACE_BYTES, Projection
from sslkernels.vocabulary.prototypes.distillation_records import centered, inverse_of
from sslkernels.vocabulary.prototypes.distillation_rows import DistillationRows, NativeRows, TritonRows
from sslkernels.vocabulary.prototypes.heads import check_head, temperature_tensor

NAME = "sinkhorn_center"
COLUMNS_AT_ONCE = 4096  # on a CPU a block of columns stays in the cache through the passes over it


class ColumnInputs(NamedTuple):
    """teacher (N, Dt), weight (V, Dt), offset (V,), float64, what is added to the logits; temperature (), float64;
    mask (N,), bool, the rows that count."""

    teacher: Tensor
    weight: Tensor
    offset: Tensor | None
    temperature: Tensor
    mask: Tensor | None


class ColumnSums(NamedTuple):
    """Sums over the rows (V,), in the accumulation dtype, of exp(z - largest), z = (logits + offset) / temperature; or,
    normalised, of softmax(z), with largest 0."""

    largest: Tensor
    sums: Tensor


def _empty_sums(inputs: ColumnInputs) -> ColumnSums:
    acc = accumulation_dtype(inputs.teacher.dtype)
    return ColumnSums(*(inputs.weight.new_empty(inputs.weight.shape[0], dtype=acc) for _ in ColumnSums._fields))


def _reference(inputs: ColumnInputs, compute_dtype: torch.dtype, normalised: bool) -> ColumnSums:
    acc = accumulation_dtype(inputs.teacher.dtype)
    teacher, weight = (t.to(compute_dtype).to(acc) for t in (inputs.teacher, inputs.weight))
    z = teacher @ weight.t()
    if inputs.offset is not None:
        z = z + centered(inputs.offset).to(acc)
    z = z * inverse_of(inputs.temperature).to(acc)
    counts = torch.ones_like(z[:, 0], dtype=torch.bool) if inputs.mask is None else inputs.mask
    if normalised:
        sums = z.softmax(1).masked_fill(~counts[:, None], 0).sum(0)
        return ColumnSums(torch.zeros_like(sums), sums)
    z = z.masked_fill(~counts[:, None], -math.inf)
    largest = torch.cat([z, z.new_full((1, z.shape[1]), -math.inf)]).amax(0)
    return ColumnSums(largest, (z - _finite(largest)).exp().sum(0))


def _finite(largest: Tensor) -> Tensor:
    """0 in place of -inf, of a column without a finite logit."""
    return largest.masked_fill(largest == -math.inf, 0)


def _chunked(rows: DistillationRows, inputs: ColumnInputs, compute_dtype: torch.dtype, normalised: bool) -> ColumnSums:
    projection = Projection(inputs.teacher, inputs.weight, inputs.offset, inputs.temperature, compute_dtype)
    found = _empty_sums(inputs)
    found.largest.fill_(0 if normalised else -math.inf)
    found.sums.zero_()
    for chunk in _row_chunks(inputs):
        part = inputs.teacher[chunk]
        mask = None if inputs.mask is None else inputs.mask[chunk]
        if mask is not None:  # a row that does not count may hold anything
            part = part.masked_fill(~mask[:, None], 0)
        products = projection.products(part)
        if normalised:
            state = rows.teacher(products, projection.head)
            share = 1 / (1 + state.others)
            share = share if mask is None else share.masked_fill(~mask, 0)
            found.sums.add_(torch.mv(state.exponentials.t(), share))
        else:
            _add_columns(products, projection, mask, found)
    return found


def _row_chunks(inputs: ColumnInputs) -> Iterator[slice]:
    count, device = inputs.teacher.shape[0], inputs.teacher.device
    acc = accumulation_dtype(inputs.teacher.dtype)
    workspace_bytes = WORKSPACE_BYTES.get(device.type, WORKSPACE_BYTES["cuda"])
    fit = workspace_bytes // (row_pitch(inputs.weight.shape[0]) * acc.itemsize)
    step = equal_rows(count, max(fit // ROW_MULTIPLE, 1) * ROW_MULTIPLE)
    for begin in range(0, count, max(step, 1)):
        yield slice(begin, begin + step)


def _add_columns(products: Tensor, projection: Projection, mask: Tensor | None, found: ColumnSums) -> None:
    """Adds the rows of a chunk to the sums in the log domain, and overwrites the products."""
    vocab, offset = products.shape[1], projection.head.offset
    step = COLUMNS_AT_ONCE if products.device.type == "cpu" else vocab
    for begin in range(0, vocab, step):
        block = slice(begin, begin + step)
        z = products[:, block].mul_(projection.head.scale)
        if offset is not None:
            z.add_(offset[block])
        if mask is not None:
            z.masked_fill_(~mask[:, None], -math.inf)
        before = found.largest[block]
        largest = torch.maximum(before, z.amax(0))
        anchor = _finite(largest)
        sums = z.sub_(anchor).exp_().sum(0)
        found.sums[block] = found.sums[block] * (_finite(before) - anchor).exp() + sums
        found.largest[block] = largest


def _checked(function: Callable[..., ColumnSums], inputs: ColumnInputs, *rest: Any) -> ColumnSums:
    if inputs.temperature.device.type == "cpu" and not inputs.temperature > 0:
        checks.fail(ValueError, NAME, "temperature", "be positive", inputs.temperature.item())
    return function(inputs, *rest)


_NATIVE = partial(_checked, partial(_chunked, NativeRows()))


@operator(
    NAME,
    {
        "reference": partial(_checked, _reference),
        "cpu": _NATIVE,
        "triton": partial(_checked, partial(_chunked, TritonRows())),
        "cuda": _NATIVE,
    },
    native_ops=("teacher_rows",),
    flops=lambda inputs, compute_dtype, normalised: 2 * inputs.teacher.numel() * inputs.weight.shape[0],
)
def sinkhorn_columns(inputs: ColumnInputs, compute_dtype: torch.dtype, normalised: bool) -> ColumnSums:
    return _empty_sums(inputs)


@checks.with_python_numbers
def sinkhorn_center(
    teacher: Tensor,
    teacher_weight: Tensor,
    *,
    teacher_bias: Tensor | None = None,
    temperature: float | Tensor = 0.07,
    iterations: int = 3,
    row_mask: Tensor | None = None,
    process_group: Any = None,
) -> Tensor:
    """The center with which a teacher's softmax is its Sinkhorn-Knopp assignment (SwAV, DINOv2, DINOv3).

    `softmax((teacher @ teacher_weight.T + teacher_bias - center) / temperature)` is what `iterations` of Sinkhorn-Knopp
    make of the exponentials of the logits over `temperature`: every prototype gets the same mass, up to the last
    normalisation of the rows, which then sum to 1. Pass the result to `linear_distillation` with this temperature. The
    logits are recomputed chunk by chunk in each iteration and never materialised as a whole. No gradient.

    Args:
        teacher: features `(..., Dt)`; float32, bfloat16, float16 or float64, with autocast as in `linear_distillation`.
        teacher_weight: `(V, Dt)`.
        teacher_bias: `(V,)`, any float dtype.
        temperature: positive; a float, or a float tensor of one element.
        iterations: at least 1; each computes all logits once.
        row_mask: `(...)`, bool, rows that count; None: all. The others may hold anything.
        process_group: ranks, each with its rows, whose columns are summed over all: one exchange of V numbers an
            iteration, two in the first. Ranks may have different numbers of rows.

    Returns:
        `(V,)`, float32 (float64 for a float64 teacher), with mean 0: a center is determined up to a constant. It is
        finite also where no row can choose a prototype, for logits of -inf; 0 if there are no rows.

    Raises:
        TypeError, ValueError: for an argument of the wrong type, dtype, shape or range. A temperature tensor that is
            not positive raises `ValueError` on the CPU; on a GPU the result is NaN.

    Sources: Caron et al., "Unsupervised learning of visual features by contrasting cluster assignments", 2020; Cuturi,
    "Sinkhorn distances", 2013.

    >>> import sslkernels as sk
    >>> features, prototypes = torch.randn(64, 16), torch.randn(1000, 16)
    >>> center = sk.sinkhorn_center(features, prototypes, temperature=0.5)
    """
    check_head(NAME, "teacher", teacher, teacher_weight, teacher_bias)
    checks.integer(NAME, "iterations", iterations, low=1)
    shape = teacher.shape[:-1]
    checks.tensor(NAME, "row_mask", row_mask, (torch.bool,), optional=True)
    checks.shape(NAME, "row_mask", row_mask, shape, "teacher.shape[:-1]")
    checks.same_device(NAME, "row_mask", row_mask, "teacher", teacher.device)
    compute_dtype = compute_dtype_of(NAME, teacher, teacher_weight, ("teacher", "teacher_weight"))
    with torch.no_grad():
        rows = teacher.reshape(math.prod(shape), teacher.shape[-1]).contiguous()
        mask = None if row_mask is None else row_mask.reshape(-1).contiguous()
        if mask is not None and rows.device.type == "cpu" and not torch.compiler.is_compiling():
            rows, mask = rows[mask], None
        bias = None if teacher_bias is None else teacher_bias.double()
        temperature = temperature_tensor(
            NAME, "temperature", temperature, "teacher", teacher.device, high=checks.LARGEST
        )
        inputs = ColumnInputs(rows, teacher_weight.contiguous(), bias, temperature, mask)
        potential = _potential(sinkhorn_columns(inputs, compute_dtype, False), process_group)
        for _ in range(iterations - 1):
            center = inputs.temperature * potential
            moved = inputs._replace(offset=-center if bias is None else bias - center)
            sums = sinkhorn_columns(moved, compute_dtype, True).sums
            if process_group is not None:
                dist.all_reduce(sums, group=process_group)
            potential = potential + torch.where(sums > 0, sums, 1).double().log()
            potential = potential - potential.mean()
        return (inputs.temperature * potential).to(accumulation_dtype(teacher.dtype))


def _potential(columns: ColumnSums, process_group: Any) -> Tensor:
    """The logarithm of the sums of exp(z), float64, minus its mean; 0 in a column without a finite logit."""
    largest, sums = columns
    if process_group is not None:
        own = largest.clone()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=process_group)
        sums = sums * (_finite(own) - _finite(largest)).exp()
        dist.all_reduce(sums, group=process_group)
    found = _finite(largest).double() + torch.where(sums > 0, sums, 1).double().log()
    chosen = largest != -math.inf
    mean = torch.where(chosen, found, 0).sum() / chosen.sum().clamp_min(1)
    return torch.where(chosen, found - mean, 0)


@checks.with_python_numbers
def teacher_center(
    teacher: Tensor, teacher_weight: Tensor, *, teacher_bias: Tensor | None = None, process_group: Any = None
) -> Tensor:
    """The mean logit of each prototype over the rows, by linearity: of the mean row. DINO's center is its average.

    Args:
        teacher: features `(..., Dt)`; float32, bfloat16, float16 or float64.
        teacher_weight: `(V, Dt)`, any float dtype.
        teacher_bias: `(V,)`, any float dtype.
        process_group: ranks, each with its rows, over all of which the mean is.

    Returns:
        `(V,)`, float32 (float64 for a float64 teacher), without a gradient; NaN for no rows.

    >>> import sslkernels as sk
    >>> center = sk.teacher_center(torch.randn(64, 16), torch.randn(1000, 16))
    """
    check_head("teacher_center", "teacher", teacher, teacher_weight, teacher_bias)
    acc = accumulation_dtype(teacher.dtype)
    with torch.no_grad(), _without_autocast(teacher.device):
        rows = teacher.reshape(math.prod(teacher.shape[:-1]), teacher.shape[-1])
        total = rows.sum(0, dtype=torch.float64)
        total = torch.cat([total, torch.full_like(total[:1], rows.shape[0])])
        if process_group is not None:
            dist.all_reduce(total, group=process_group)
        mean = (total[:-1] / total[-1]).to(acc)
        center = torch.mv(teacher_weight.to(acc), mean)
        return center if teacher_bias is None else center + teacher_bias.to(acc)


def _without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast(device.type, enabled=False) if checks.autocast(device) else contextlib.nullcontext()
