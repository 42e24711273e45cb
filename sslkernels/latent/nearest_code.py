"""The best code of each row: the exact search of `vector_quantize`, for each backend.

Each function fills `indices` (N,), int64, and `score` (N,), float64, from contiguous input (N, D) and codebook (K, D).
The score of a code is minus the squared distance ("l2"), <x, c> / |c|, or <x, c> for a code of zeros ("cosine"), or
<x, c> ("dot"), of both as given, in float64. NaN ranks above everything, and ties go to the lowest index. `score` is
only a NaN flag: it is NaN if the score of the best code is, and otherwise undefined.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

METRICS = ("l2", "cosine", "dot")
L2, COSINE, DOT = range(3)

# On a CPU: codes per tile of products, and bytes of its largest buffer, for all threads together and at least for each.
# The matmul reaches its full speed at about these sizes, and the rows and codes of a tile stay in the L2 cache.
TILE_CODES = 2048
WORKSPACE_BYTES = 8 << 20
LEAST_BYTES = 1 << 18
MULTIPLE = 16
# On a GPU: codes per tile of products, and bytes of the products, which fit in L2 and have enough rows for all
# multiprocessors. A tile also copies its rows and codes if they are centred or converted.
CUDA_TILE_CODES = 8192
CUDA_PRODUCT_BYTES = 32 << 20
CUDA_VECTOR_BYTES = 12 << 20
CUDA_PITCH = 4  # the row pitch of the products is a multiple of this
# Elements that the reference broadcasts at a time.
REFERENCE_ELEMENTS = 1 << 22
# The error of a matmul beyond the roundings of its sums, relative to the norms of both factors. torch may allow a
# float32 matmul to round its operands to bfloat16, by 2^-9 each, or to truncate them to TensorFloat-32, by 2^-10 each:
REDUCED_ROUNDING = 2**-7
TF32_ROUNDING = 2**-8
# The error of a GPU's matrix units for each term: see `MATRIX_ROUNDING` in triton/nearest_code.py.
MATRIX_UNIT_ROUNDING = 2**-21


def exact_scores(input: Tensor, codebook: Tensor, metric: int) -> Tensor:
    """(N, K), float64."""
    x, c = input.double().unsqueeze(1), codebook.double()
    if metric == L2:
        return -(x - c).square().sum(2)
    if metric == DOT:
        return (x * c).sum(2)
    # A power of two scales codes so that their squares neither overflow nor underflow.
    largest = c.abs().amax(1, keepdim=True)
    exponent = torch.where(largest.isfinite(), torch.frexp(largest).exponent, 0).double()
    unit = c * torch.exp2(-exponent.clamp(-1000, 1000))
    norm = unit.square().sum(1).sqrt()
    return (x * unit).sum(2) / torch.where(norm == 0, 1, norm)


def reference(input: Tensor, codebook: Tensor, metric: int, indices: Tensor, score: Tensor) -> None:
    rows = max(REFERENCE_ELEMENTS // codebook.numel(), 1)
    for start in range(0, input.shape[0], rows):
        part = slice(start, start + rows)
        scores = exact_scores(input[part], codebook, metric)
        indices[part] = scores.argmax(1)
        score[part] = scores.gather(1, indices[part, None]).squeeze(1)


def _center(codebook: Tensor, acc: torch.dtype) -> Tensor:
    """The mean of the codes. It is subtracted from rows and codes, so that a common offset costs neither accuracy nor
    rescoring."""
    return codebook.mean(0, dtype=torch.float64).to(acc).nan_to_num(0.0, 0.0, 0.0)


class CpuPlan(NamedTuple):
    """The error of a matmul beyond its roundings, and the rows and codes of a tile."""

    rounding: float
    rows: int
    codes: int


def cpu_plan(input: Tensor, codebook: Tensor) -> CpuPlan:
    """Each thread takes a share of the rows and loops over tiles: a matmul of torch, then the best codes of its
    products."""
    count, dim = input.shape
    acc = _product_dtype(input, codebook)
    rounding = 0.0
    if acc == torch.float32 and torch.backends.mkldnn.matmul.fp32_precision not in ("none", "ieee"):
        rounding = REDUCED_ROUNDING
    threads = torch.get_num_threads()
    fit = max(WORKSPACE_BYTES // threads, LEAST_BYTES) // acc.itemsize
    codes = min(codebook.shape[0], TILE_CODES, max(fit // dim, MULTIPLE))
    rows = min(max(fit // max(codes, dim), MULTIPLE), max(-(-count // threads), MULTIPLE))
    return CpuPlan(rounding, rows, codes)


def cpu(input: Tensor, codebook: Tensor, metric: int, indices: Tensor, score: Tensor) -> None:
    rounding, rows, codes = cpu_plan(input, codebook)
    arguments = (input, codebook, metric, rounding, None, False, rows, codes, indices, score)
    torch.ops.sslkernels_native.search_codes(*arguments)


def cuda(input: Tensor, codebook: Tensor, metric: int, indices: Tensor, score: Tensor) -> None:
    """Tile by tile a matmul of torch, then the best codes of its products. Matrix units multiply half precision as
    given, into float32 and without a center."""
    count, dim = input.shape
    acc = _product_dtype(input, codebook)
    as_given = input.dtype == codebook.dtype and input.itemsize == 2 and not _sums_in_half(input)
    center = None if as_given or metric != L2 else _center(codebook, acc)
    rounding, unit_rounding = 0.0, MATRIX_UNIT_ROUNDING * (dim + 8)
    if as_given:
        rounding = unit_rounding
    elif acc == torch.float32 and torch.backends.cuda.matmul.fp32_precision not in ("none", "ieee"):
        rounding = TF32_ROUNDING + unit_rounding
    copied = center is not None or (not as_given and (input.dtype, codebook.dtype) != (acc, acc))
    fit = max(CUDA_VECTOR_BYTES // (acc.itemsize * dim), MULTIPLE) if copied else CUDA_TILE_CODES
    codes = min(codebook.shape[0], CUDA_TILE_CODES, fit)
    rows = CUDA_PRODUCT_BYTES // (acc.itemsize * (-(-codes // CUDA_PITCH) * CUDA_PITCH))
    rows = max(min(count, rows, fit) if copied else min(count, rows), 1)
    arguments = (input, codebook, metric, rounding, center, as_given, rows, codes, indices, score)
    torch.ops.sslkernels_native.search_codes(*arguments)


def _product_dtype(input: Tensor, codebook: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (input.dtype, codebook.dtype) else torch.float32


def _sums_in_half(input: Tensor) -> bool:
    """Whether torch may accumulate products of this dtype in half precision."""
    return input.dtype == torch.float16 and torch.backends.cuda.matmul.allow_fp16_accumulation


def triton(input: Tensor, codebook: Tensor, metric: int, indices: Tensor, score: Tensor) -> None:
    from sslkernels.latent.triton.nearest_code import best_codes

    if torch.float64 in (input.dtype, codebook.dtype):
        return reference(input, codebook, metric, indices, score)
    best_codes(input, codebook, metric, indices, score)
