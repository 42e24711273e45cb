"""Vector quantisation: the nearest code of each row, straight-through values and the commitment (van den Oord et al.
2017).

The index is exact: the best score in float64 of the input and the codebook as given, the lowest index among ties. A
backend finds it from rounded products with a bound of their error, and rescores in float64 the codes that the bound
cannot separate (`nearest_code`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from sslkernels.core import checks, segment_sum
from sslkernels.core.autograd import (
    Function,
    contiguous_rows,
    empty_gradients,
    once_differentiable,
    save,
    saved,
    wanted_only,
)
from sslkernels.core.dtypes import accumulation_dtype
from sslkernels.core.operator import full, operator
from sslkernels.latent import nearest_code
from sslkernels.latent.nearest_code import METRICS

NAME = "vector_quantize"
NATIVE_OPS = ("search_codes", "gather_codes", "code_difference", "weighted_row_sums")


class Quantized(NamedTuple):
    """The codes of the rows of an input `(..., D)`.

    values: rows of the codebook, in the shape and dtype of the input.
    indices: `(...)`, int64, the index of each row's code.
    commitment: 0-d, the mean squared difference of input and code over the rows that count.
    usage: `(K,)`, int64, the number of those rows with each code.
    """

    values: Tensor
    indices: Tensor
    commitment: Tensor
    usage: Tensor

    @property
    def perplexity(self) -> Tensor:
        """exp of the entropy of `usage`, 0-d float32: how many codes are in use, from 1 (collapse) to K."""
        frequency = self.usage.float() / self.usage.sum()
        return torch.special.entr(frequency).sum().exp()


class Operands(NamedTuple):
    """input (N, D) and codebook (K, D), contiguous."""

    input: Tensor
    codebook: Tensor


class Outputs(NamedTuple):
    """values (N, D), indices (N,), the mean squared difference of valid rows and codes (0-d), usage (K,)."""

    values: Tensor
    indices: Tensor
    commitment: Tensor
    usage: Tensor


class Wanted(NamedTuple):
    """Which gradients are wanted."""

    input: bool
    codebook: bool


class Gradients(NamedTuple):
    """In the shape and dtype of the operand; without elements if not wanted."""

    input: Tensor
    codebook: Tensor


def _empty_outputs(operands: Operands) -> Outputs:
    input, codebook = operands
    rows = input.shape[0]
    return Outputs(
        torch.empty_like(input),
        input.new_empty(rows, dtype=torch.int64),
        input.new_empty((), dtype=_distance_dtype(operands)),
        input.new_empty(codebook.shape[0], dtype=torch.int64),
    )


def _distance_dtype(operands: Operands) -> torch.dtype:
    return accumulation_dtype(torch.promote_types(operands.input.dtype, operands.codebook.dtype))


def _empty_gradients(operands: Operands, wanted: Wanted) -> Gradients:
    return Gradients(*empty_gradients(operands, wanted))


class Kernels(NamedTuple):
    """The kernels of one backend. search fills each row's index and its float64 score, NaN if the row has no code;
    gather fills values and the squared distance of each row to its code; difference fills coefficient * (input - code)
    for a 0-d coefficient; sum_rows: see `segment_sum`; quantize fills all outputs at once."""

    search: Callable[..., None]
    gather: Callable[..., None]
    difference: Callable[..., None]
    sum_rows: Callable[..., None]
    quantize: Callable[..., None] | None = None

    def forward(self, operands: Operands, valid: Tensor | None, metric: int) -> Outputs:
        outputs = _empty_outputs(operands)
        if self.quantize is not None and valid is None:
            self.quantize(operands, metric, outputs)
            return outputs
        values, indices, commitment, usage = outputs
        score, distance = (
            values.new_empty(indices.shape, dtype=dtype) for dtype in (torch.float64, _distance_dtype(operands))
        )
        self.search(*operands, metric, indices, score)
        self.gather(*operands, indices, score, values, distance)
        counted = score.isnan().logical_not_()
        rows = values.shape[0]
        if valid is not None:
            distance.masked_fill_(~valid, 0)
            counted &= valid
            rows = valid.sum()
        commitment.copy_(distance.sum(dtype=torch.float64) / (rows * values.shape[1]))
        usage.zero_().scatter_add_(0, indices, counted.long())
        return outputs

    def backward(
        self,
        coefficient: Tensor,
        operands: Operands,
        valid: Tensor | None,
        indices: Tensor,
        codebook_weight: float,
        wanted: Wanted,
    ) -> Gradients:
        input, codebook = operands
        gradients = _empty_gradients(operands, wanted)
        if not wanted.codebook:
            if wanted.input:
                self.difference(coefficient, input, codebook, indices, gradients.input)
                _clear_invalid(gradients.input, valid)
            return gradients
        rows = input.new_empty(input.shape, dtype=coefficient.dtype)
        self.difference(coefficient, input, codebook, indices, rows)
        _clear_invalid(rows, valid)
        weight = full(indices.shape, -codebook_weight, accumulation_dtype(codebook.dtype), rows.device)
        self.sum_rows(indices, weight, rows.to(weight.dtype), None, gradients.codebook)
        return gradients._replace(input=rows.to(input.dtype)) if wanted.input else gradients

    def sums(self, source: Tensor, indices: Tensor, codes: int, dtype: torch.dtype) -> Tensor:
        out = source.new_empty((codes, source.shape[1]), dtype=dtype)
        acc = accumulation_dtype(dtype)
        ones = torch.ones(indices.shape, dtype=acc, device=source.device)
        self.sum_rows(indices, ones, source if source.dtype == dtype else source.to(acc), None, out)
        return out


def _clear_invalid(rows: Tensor, valid: Tensor | None) -> None:
    if valid is not None:
        rows.masked_fill_(~valid[:, None], 0)


def _gather_reference(
    input: Tensor, codebook: Tensor, indices: Tensor, score: Tensor, values: Tensor, distance: Tensor
) -> None:
    no_code = score.isnan()
    codes = codebook[indices]
    values.copy_(codes.masked_fill(no_code[:, None], float("nan")))
    squares = (input.double() - codes.double()).square().sum(1)
    distance.copy_(squares.masked_fill(no_code, float("nan")))


def _difference_reference(coefficient: Tensor, input: Tensor, codebook: Tensor, indices: Tensor, out: Tensor) -> None:
    out.copy_(coefficient * (input.to(coefficient.dtype) - codebook[indices].to(coefficient.dtype)))


def _quantize_cpu(operands: Operands, metric: int, outputs: Outputs) -> None:
    torch.ops.sslkernels_native.quantize_rows(*operands, metric, *nearest_code.cpu_plan(*operands), *outputs)


def _gather_native(*arguments) -> None:
    torch.ops.sslkernels_native.gather_codes(*arguments)


def _difference_native(*arguments) -> None:
    torch.ops.sslkernels_native.code_difference(*arguments)


def _gather_triton(*arguments) -> None:
    from sslkernels.latent.triton.vector_quantize import gather_codes

    gather_codes(*arguments)


def _difference_triton(*arguments) -> None:
    from sslkernels.latent.triton.vector_quantize import code_difference

    code_difference(*arguments)


KERNELS = {
    "reference": Kernels(nearest_code.reference, _gather_reference, _difference_reference, segment_sum.reference),
    "cpu": Kernels(nearest_code.cpu, _gather_native, _difference_native, segment_sum.native, _quantize_cpu),
    "cuda": Kernels(nearest_code.cuda, _gather_native, _difference_native, segment_sum.native),
    "triton": Kernels(nearest_code.triton, _gather_triton, _difference_triton, segment_sum.triton),
}


@operator(
    NAME,
    {name: kernels.forward for name, kernels in KERNELS.items()},
    native_ops=NATIVE_OPS,
    flops=lambda operands, valid, metric: 2 * operands.input.numel() * operands.codebook.shape[0],
)
def vector_quantize_fwd(operands: Operands, valid: Tensor | None, metric: int) -> Outputs:
    return _empty_outputs(operands)


@operator(NAME, {name: kernels.backward for name, kernels in KERNELS.items()}, native_ops=NATIVE_OPS)
def vector_quantize_bwd(
    coefficient: Tensor,
    operands: Operands,
    valid: Tensor | None,
    indices: Tensor,
    codebook_weight: float,
    wanted: Wanted,
) -> Gradients:
    """The gradients of coefficient / 2 times the sum of distances of valid rows; the codebook's is multiplied by
    codebook_weight."""
    return _empty_gradients(operands, wanted)


@operator(NAME, {name: kernels.sums for name, kernels in KERNELS.items()}, native_ops=NATIVE_OPS)
def code_sums(source: Tensor, indices: Tensor, codes: int, dtype: torch.dtype) -> Tensor:
    """The sum of the rows of source with each index, (codes, D)."""
    return source.new_empty((codes, source.shape[1]), dtype=dtype)


class _Values(Function):
    """The codes. Their gradient goes to the input (straight-through) or to the codebook (a gather), of which the caller
    detaches the other."""

    differentiable = 1

    @staticmethod
    def forward(operands: Operands, valid: Tensor | None, metric: int, straight_through: bool) -> Outputs:
        return vector_quantize_fwd(operands, valid, metric)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        operands, _, _, ctx.straight_through = inputs
        (found,) = outputs
        ctx.codes, ctx.dtype = operands.codebook.shape[0], operands.codebook.dtype
        save(ctx, None if ctx.straight_through else found.indices)

    @staticmethod
    def backward(ctx, grads):
        if grads.values is None:
            return None
        if ctx.straight_through:
            return (Operands(grads.values, None),)
        (indices,) = saved(ctx)
        return (Operands(None, _sum_rows_of_codes(contiguous_rows(grads.values), indices, ctx.codes, ctx.dtype)),)


@once_differentiable(NAME)
def _sum_rows_of_codes(source: Tensor, indices: Tensor, codes: int, dtype: torch.dtype) -> Tensor:
    return code_sums(source, indices, codes, dtype)


class _Commitment(Function):
    """Gives the mean squared difference of rows and codes, which the search computed, its gradient. The gradient of the
    input takes the codes as constants; the gradient of the codebook is multiplied by `codebook_weight`."""

    @staticmethod
    def forward(
        operands: Operands, valid: Tensor | None, indices: Tensor, commitment: Tensor, codebook_weight: float
    ) -> Tensor:
        return commitment.clone()

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        operands, valid, indices, commitment, ctx.codebook_weight = inputs
        ctx.dtype = commitment.dtype
        save(ctx, operands, valid, indices)

    @staticmethod
    def backward(ctx, grad):
        if grad is None:
            return None
        operands, valid, indices = saved(ctx)
        needs, *_ = _Commitment.wanted(ctx)
        wanted = Wanted(*needs)
        # Twice the gradient of each row's distance.
        if valid is None:
            coefficient = grad.to(ctx.dtype) * (2 / max(operands.input.numel(), 1))
        else:
            coefficient = grad.to(ctx.dtype) * 2 / (valid.sum() * operands.input.shape[1]).clamp(min=1)
        return (wanted_only(_gradients(coefficient, operands, valid, indices, ctx.codebook_weight, wanted), wanted),)


@once_differentiable(NAME)
def _gradients(
    coefficient: Tensor,
    operands: Operands,
    valid: Tensor | None,
    indices: Tensor,
    codebook_weight: float,
    wanted: Wanted,
) -> Gradients:
    return vector_quantize_bwd(coefficient, operands, valid, indices, codebook_weight, wanted)


@checks.with_python_numbers
def vector_quantize(
    input: Tensor,
    codebook: Tensor,
    *,
    metric: str = "l2",
    straight_through: bool = True,
    codebook_weight: float | None = None,
    mask: Tensor | None = None,
) -> Quantized:
    """The nearest of K codes to each row, with a straight-through gradient and the commitment of VQ-VAE.

    The `(..., K)` distances are never materialised. The index is exact in every dtype: the one that a search in float64
    of the tensors as given finds, the lowest among ties.

    Args:
        input: rows `(..., D)`; float32, bfloat16, float16 or float64.
        codebook: codes `(K, D)`, in any of these dtypes.
        metric: "l2" takes the code at the least Euclidean distance, "cosine" the code with the largest `<x, c> / |c|`
            (0 for a code of zeros), "dot" the code with the largest `<x, c>`. It affects nothing but this choice:
            values are codes as stored, commitment is a squared distance.
        straight_through: the gradient of `values` goes to `input` as through the identity, and none to `codebook`.
            False: it goes to the codes that were taken, and none to `input`.
        codebook_weight: how strongly `commitment` draws codes to the rows that took them, relative to rows to codes.
            0: codes are constants in it. None: 0, with a warning if the codebook requires a gradient and gets none.
        mask: `(...)` bool, True for the rows that count in `commitment` and `usage`. The others also get a value and an
            index, and no gradient from `commitment`. None: all count.

    A codebook that is trained by gradient needs `straight_through=False` or a `codebook_weight`: otherwise it gets no
    gradient, as in `nn.VectorQuantizer`, which moves it by averages. The loss of VQ-VAE,
    `|sg(x) - c|^2 + beta |x - sg(c)|^2`, has the gradients of `beta * commitment` with `codebook_weight=1 / beta`.

    Returns:
        `Quantized(values, indices, commitment, usage)`, see there. `commitment` is float32 (float64 if input or
        codebook is) and NaN if no row counts; its gradient and the codebook's are summed in this dtype in a fixed
        order. `Quantized.perplexity` tells how many codes are in use.

    A row whose score with some code is NaN takes the first such code (index 0 if the row itself holds NaN), has NaN
    values and a NaN commitment, and is no use of that code.

    Raises:
        TypeError, ValueError: for an argument of the wrong type, dtype, shape, device or range.

    Source: van den Oord, Vinyals and Kavukcuoglu, "Neural discrete representation learning", NeurIPS 2017.

    >>> import sslkernels as sk
    >>> x, codebook = torch.randn(2, 5, 16, requires_grad=True), torch.randn(100, 16, requires_grad=True)
    >>> quantized = sk.vector_quantize(x, codebook, codebook_weight=4.0)
    >>> (quantized.values.square().mean() + 0.25 * quantized.commitment).backward()
    """
    if codebook_weight is None:
        codebook_weight = 0.0
        if straight_through is True:
            _warn_of_no_gradient(codebook)
    _check(input, codebook, metric, straight_through, codebook_weight)
    check_mask(NAME, mask, input)
    valid = None if mask is None else mask.reshape(-1).contiguous()
    rows = input if input.dim() == 2 else input.reshape(input.shape[:-1].numel(), input.shape[-1])
    rows, codes = rows.contiguous(), codebook.contiguous()
    # An operand without a gradient is detached: a loss that would learn nothing then raises in backward.
    operands = Operands(rows, codes.detach()) if straight_through else Operands(rows.detach(), codes)
    values, indices, commitment, usage = _Values.run(operands, valid, METRICS.index(metric), straight_through)
    operands = Operands(rows, codes if codebook_weight else codes.detach())
    commitment = _Commitment.run(operands, valid, indices, commitment, float(codebook_weight))
    if input.dim() != 2:
        values, indices = values.reshape(input.shape), indices.reshape(input.shape[:-1])
    return Quantized(values, indices, commitment, usage)


def _check(input: Tensor, codebook: Tensor, metric: str, straight_through: bool, codebook_weight: float) -> None:
    checks.tensor(NAME, "input", input, checks.FLOAT_DTYPES)
    checks.dims(NAME, "input", input, 1, "(..., D)")
    checks.tensor(NAME, "codebook", codebook, checks.FLOAT_DTYPES)
    checks.dims(NAME, "codebook", codebook, 2, "(K, D)", high=2)
    if codebook.shape[0] == 0 or codebook.shape[1] == 0:
        checks.fail(ValueError, NAME, "codebook", "have at least one code and one column", tuple(codebook.shape))
    if input.shape[-1] != codebook.shape[1]:
        checks.fail(ValueError, NAME, "input", f"have shape (..., D) with D = {codebook.shape[1]}", tuple(input.shape))
    checks.same_device(NAME, "codebook", codebook, "input", input.device)
    checks.choice(NAME, "metric", metric, METRICS)
    checks.boolean(NAME, "straight_through", straight_through)
    checks.number(NAME, "codebook_weight", codebook_weight, low=0.0, high=checks.LARGEST)


def check_mask(name: str, mask: Tensor | None, input: Tensor) -> None:
    checks.tensor(name, "mask", mask, (torch.bool,), optional=True)
    checks.shape(name, "mask", mask, input.shape[:-1], "(...)")
    checks.same_device(name, "mask", mask, "input", input.device)


def _warn_of_no_gradient(codebook: Tensor) -> None:
    if torch.compiler.is_compiling() or not (isinstance(codebook, Tensor) and codebook.requires_grad):
        return
    if torch.is_grad_enabled():
        warnings.warn(
            f"{NAME}: codebook requires a gradient and gets none; pass codebook_weight (4.0 in nn.VectorQuantizer) or "
            "straight_through=False to train it, codebook_weight=0.0 not to",
            stacklevel=4,
        )
