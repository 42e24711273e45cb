"""Vector quantisation: the code of each row, straight-through values and the commitment (van den Oord et al. 2017).

The index is exact: that of the best score in float64 of the input and the codebook as they are given, of equals the
lowest. A backend finds it from products that round, with a bound of their error, and scores again in float64 what the
bound cannot tell apart (`code_search`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from sslkernels.core import checks, segment_sum
from sslkernels.core.autograd import distinct
from sslkernels.core.dtypes import accumulation_dtype
from sslkernels.core.legacy import PREFERENCE, Op
from sslkernels.latent import nearest_code
from sslkernels.latent.nearest_code import METRICS

NAME = "vector_quantize"


class Quantized(NamedTuple):
    """values: rows of the codebook, of the shape and dtype of the input; indices (int64): which, of the input's shape
    without the last dimension; commitment: mean squared difference of input and code, 0-d; usage (K,), int64: how many
    rows took each code."""

    values: Tensor
    indices: Tensor
    commitment: Tensor
    usage: Tensor

    @property
    def perplexity(self) -> Tensor:
        """exp of the entropy of `usage`, 0-d float32: how many codes are in use, from 1 (collapse) to K."""
        frequency = self.usage.float() / self.usage.sum()
        return torch.special.entr(frequency).sum().exp()


def _sum_dtype(input: Tensor, codebook: Tensor) -> torch.dtype:
    return accumulation_dtype(torch.promote_types(input.dtype, codebook.dtype))


def _empty_outputs(input: Tensor, codebook: Tensor, metric: int) -> tuple[Tensor, ...]:
    """values, indices, squared distance of each row to its code, usage."""
    rows = input.shape[0]
    return (
        torch.empty_like(input),
        input.new_empty(rows, dtype=torch.int64),
        input.new_empty(rows, dtype=_sum_dtype(input, codebook)),
        input.new_empty(codebook.shape[0], dtype=torch.int64),
    )


def _empty_gradients(input: Tensor, codebook: Tensor, *wanted: bool) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape if want else 0) for t, want in zip((input, codebook), wanted, strict=True))


class Kernels(NamedTuple):
    """Of one backend. search: fills the index of each row and the float64 score that is NaN where the row has no code;
    gather: fills values and distance; difference: fills coefficient * (input - code); sum_rows: as in `row_sums`."""

    search: Callable[..., None]
    gather: Callable[..., None]
    difference: Callable[..., None]
    sum_rows: Callable[..., None]

    def forward(self, input: Tensor, codebook: Tensor, metric: int) -> tuple[Tensor, ...]:
        values, indices, distance, usage = _empty_outputs(input, codebook, metric)
        score = input.new_empty(input.shape[0], dtype=torch.float64)
        self.search(input, codebook, metric, indices, score)
        self.gather(input, codebook, indices, score, values, distance)
        usage.zero_().scatter_add_(0, indices, torch.ones_like(indices))
        return values, indices, distance, usage

    def backward(
        self,
        coefficient: Tensor,
        input: Tensor,
        codebook: Tensor,
        indices: Tensor,
        codebook_weight: float,
        want_input: bool,
        want_codebook: bool,
    ) -> tuple[Tensor, ...]:
        """Of the distances, whose gradient is half of `coefficient`. A code gets codebook_weight times its own."""
        grad_input, grad_codebook = _empty_gradients(input, codebook, want_input, want_codebook)
        if not want_codebook:
            if want_input:
                self.difference(coefficient, input, codebook, indices, grad_input)
            return grad_input, grad_codebook
        rows = input.new_empty(input.shape, dtype=coefficient.dtype)
        self.difference(coefficient, input, codebook, indices, rows)
        weight = rows.new_full(indices.shape, -codebook_weight, dtype=accumulation_dtype(codebook.dtype))
        self.sum_rows(indices, weight, rows.to(weight.dtype), None, grad_codebook)
        return rows.to(input.dtype) if want_input else grad_input, grad_codebook

    def sums(self, source: Tensor, indices: Tensor, codes: int, dtype: torch.dtype) -> Tensor:
        out = source.new_empty((codes, source.shape[1]), dtype=dtype)
        acc = accumulation_dtype(dtype)
        ones = torch.ones(indices.shape, dtype=acc, device=source.device)
        self.sum_rows(indices, ones, source if source.dtype == dtype else source.to(acc), None, out)
        return out


def _gather_reference(
    input: Tensor, codebook: Tensor, indices: Tensor, score: Tensor, values: Tensor, distance: Tensor
) -> None:
    nothing = score.isnan()
    codes = codebook[indices]
    values.copy_(codes.masked_fill(nothing[:, None], float("nan")))
    squares = (input.double() - codes.double()).square().sum(1)
    distance.copy_(squares.masked_fill(nothing, float("nan")))


def _difference_reference(coefficient: Tensor, input: Tensor, codebook: Tensor, indices: Tensor, out: Tensor) -> None:
    difference = input.to(coefficient.dtype) - codebook[indices].to(coefficient.dtype)
    out.copy_(coefficient[:, None] * difference)


def _native(name: str) -> Callable[..., None]:
    return lambda *arguments: getattr(torch.ops.sslkernels_native, name)(*arguments)


def _triton(name: str) -> Callable[..., None]:
    def launch(*arguments: object) -> None:
        from sslkernels.latent.triton import vector_quantize

        getattr(vector_quantize, name)(*arguments)

    return launch


KERNELS = {
    "reference": Kernels(nearest_code.reference, _gather_reference, _difference_reference, segment_sum.reference),
    "cpu": Kernels(nearest_code.native, _native("gather_codes"), _native("code_difference"), segment_sum.native),
    "cuda": Kernels(nearest_code.cuda, _native("gather_codes"), _native("code_difference"), segment_sum.native),
    "triton": Kernels(nearest_code.triton, _triton("gather_codes"), _triton("code_difference"), segment_sum.triton),
}
NATIVE_OPS = ("search_codes", "gather_codes", "code_difference", "weighted_row_sums")

_op = partial(Op, NAME, native_ops=NATIVE_OPS, prefer=PREFERENCE)
vector_quantize_fwd = _op(
    "vector_quantize_fwd(Tensor input, Tensor codebook, int metric) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_empty_outputs,
    implementations={name: kernels.forward for name, kernels in KERNELS.items()},
)
vector_quantize_bwd = _op(
    "vector_quantize_bwd(Tensor coefficient, Tensor input, Tensor codebook, Tensor indices, float codebook_weight, "
    "bool want_input, bool want_codebook) -> (Tensor, Tensor)",
    fake=lambda coefficient, input, codebook, indices, codebook_weight, *wanted: _empty_gradients(
        input, codebook, *wanted
    ),
    implementations={name: kernels.backward for name, kernels in KERNELS.items()},
)
code_sums = _op(
    "code_sums(Tensor source, Tensor indices, SymInt codes, ScalarType dtype) -> Tensor",
    fake=lambda source, indices, codes, dtype: source.new_empty((codes, source.shape[1]), dtype=dtype),
    implementations={name: kernels.sums for name, kernels in KERNELS.items()},
)


class _Values(Function):
    """The codes. Their gradient is that of the input (straight-through) or of the codebook (a gather); the caller
    detaches the other one."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input, codebook, metric, straight_through):
        return vector_quantize_fwd(input, codebook, metric)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, codebook, _, ctx.straight_through = inputs
        _, indices, distance, usage = output
        ctx.mark_non_differentiable(indices, distance, usage)
        ctx.codes, ctx.dtype = codebook.shape[0], codebook.dtype
        if not ctx.straight_through:
            ctx.save_for_backward(indices)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad_values, *_):
        if grad_values is None:
            return (None,) * 4
        if ctx.straight_through:
            return grad_values, None, None, None
        return None, _CodeSums.apply(grad_values.contiguous(), *ctx.saved_tensors, ctx.codes, ctx.dtype), None, None


class _CodeSums(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(source, indices, codes, dtype):
        return code_sums(source, indices, codes, dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError(f"{NAME}: double backward is not supported")


class _Distances(Function):
    """The squared distance of each row to its code, which the search has left: here it gets its gradients. In that of
    the input the codes are constants; a code gets `codebook_weight` times its own."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input, codebook, indices, distance, codebook_weight):
        return distance.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, codebook, indices, _, ctx.codebook_weight = inputs
        ctx.save_for_backward(input, codebook, indices)

    @staticmethod
    def backward(ctx, grad):
        wanted = ctx.needs_input_grad[:2]
        coefficient = (2 * grad).contiguous()
        grads = _DistancesBackward.apply(coefficient, *ctx.saved_tensors, ctx.codebook_weight, *wanted)
        return *(grad if want else None for grad, want in zip(grads, wanted, strict=True)), None, None, None


class _DistancesBackward(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(coefficient, input, codebook, indices, codebook_weight, want_input, want_codebook):
        return vector_quantize_bwd(coefficient, input, codebook, indices, codebook_weight, want_input, want_codebook)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError(f"{NAME}: double backward is not supported")


def vector_quantize(
    input: Tensor,
    codebook: Tensor,
    *,
    metric: str = "l2",
    straight_through: bool = True,
    codebook_weight: float = 0.0,
) -> Quantized:
    """The nearest of K codes to each row, with a straight-through gradient and the commitment of VQ-VAE.

    The `(..., K)` distances never exist together. The index is exact: the one that a search in float64 of the tensors
    as they are given finds, in every dtype; of equals it is the lowest.

    Args:
        input: rows `(..., D)`; float32, bfloat16, float16 or float64.
        codebook: codes `(K, D)`, of any of these dtypes.
        metric: "l2" takes the code of the least Euclidean distance, "cosine" that of the largest `<x, c> / |c|` (0 for
            a code of zeros), "dot" that of the largest `<x, c>`. It says which code is taken and nothing else: values
            are codes as they are stored, commitment is a squared distance.
        straight_through: the gradient of `values` goes to `input` as if it were the identity, and none to `codebook`.
            False: it goes to the codes that were taken, and none to `input`.
        codebook_weight: how strongly `commitment` draws codes to the rows that took them, relative to rows to codes.
            0: codes are constants in it.

    A codebook that is trained by gradient needs one of the last two: with `straight_through=True` and
    `codebook_weight=0` it gets none, as that of `nn.VectorQuantizer`, which moves by averages. The loss of VQ-VAE,
    `|sg(x) - c|^2 + beta |x - sg(c)|^2`, has the gradients of `beta * commitment` with `codebook_weight=1 / beta`.

    Returns:
        `Quantized(values, indices, commitment, usage)`, see there. `commitment` is float32 (float64 where input or
        codebook are) and NaN for an empty input; its gradient, and that of the codebook, is summed in this dtype in a
        fixed order. `Quantized.perplexity` says how many codes are in use.

    A row that holds NaN, or meets NaN in a code or in its score, takes the first code with such a score (0 for a row
    that holds it), and has NaN values and a NaN commitment.

    Raises:
        TypeError, ValueError: for an argument of the wrong type, dtype, shape, device or range.

    Source: van den Oord, Vinyals and Kavukcuoglu, "Neural discrete representation learning", NeurIPS 2017.

    >>> import sslkernels as sk
    >>> x, codebook = torch.randn(2, 5, 16, requires_grad=True), torch.randn(100, 16, requires_grad=True)
    >>> quantized = sk.vector_quantize(x, codebook, codebook_weight=4.0)
    >>> (quantized.values.square().mean() + 0.25 * quantized.commitment).backward()
    """
    _check(input, codebook, metric, straight_through, codebook_weight)
    rows = input.reshape(1, -1) if input.dim() == 1 else input.flatten(0, -2)
    rows, codes = distinct((rows.contiguous(), codebook.contiguous()))
    # What gets no gradient is detached, so that a loss of it alone raises where nothing would be learned.
    carrier = (rows, codes.detach()) if straight_through else (rows.detach(), codes)
    values, indices, distance, usage = _Values.apply(*carrier, METRICS.index(metric), straight_through)
    held = codes if codebook_weight else codes.detach()
    distance = _Distances.apply(rows, held, indices, distance, float(codebook_weight))
    commitment = (distance.sum(dtype=torch.float64) / rows.numel()).to(distance.dtype)
    return Quantized(values.reshape(input.shape), indices.reshape(input.shape[:-1]), commitment, usage)


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
