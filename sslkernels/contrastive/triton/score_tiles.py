"""What the kernels of tiles of pair scores share: products, scores and their masks, and the sizes of blocks.

Queries (rows, D) and candidates (columns, D) are row-major. A block of scores is s = (product * column_norm) *
(logit_scale * row_norm) + logit_bias in float32. The formulas are symmetric in rows and columns, so that the kernels
serve either by an exchange of arguments.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sslkernels.core.triton.launch import Config, next_power_of_2
from sslkernels.core.triton.numerics import exp_flushed, log1p_unit
from sslkernels.core.triton.products import feature_offsets, tile_products

ENERGY_SOFTMAX, ENERGY_SIGMOID, ENERGY_HINGE = 0, 1, 2
SOFTMAX = tl.constexpr(ENERGY_SOFTMAX)
SIGMOID = tl.constexpr(ENERGY_SIGMOID)

# Largest padded D whose block of output rows stays in registers.
OWNED_DIM = 256
# In float16, log2 of a gradient 1 of a score of a pair with average norms.
GAIN = 8
# The tensors of a tile, in the order in which every kernel takes them.
OPERANDS = (
    "queries", "candidates", "row_norm", "column_norm", "row_positive", "column_positive", "row_self", "column_self",
    "row_id", "column_id", "logit_scale", "logit_bias",
)  # fmt: skip


@triton.jit
def inside_of(lane, start, count, EVEN: tl.constexpr):
    """Which lanes of the block at `start` exist; None for all of every block."""
    if EVEN:
        return None
    else:
        return lane < count - start


@triton.jit
def load_block(pointer, start, lane, inside, other):
    """A vector, None where it is absent. The scalar start is added first: what is left are constants of a thread."""
    if pointer is None:
        return None
    else:
        if inside is None:
            return tl.load((pointer + start) + lane)
        else:
            return tl.load((pointer + start) + lane, inside, other=other)


@triton.jit
def row_scale(logit_scale, row_norm):
    scale = tl.load(logit_scale)
    if row_norm is None:
        return scale
    else:
        return (scale * row_norm)[:, None]


@triton.jit
def block_products(
    queries, candidates, query_offsets, candidate_offsets,
    DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    depth = tl.arange(0, BLOCK_D)
    query_at = queries + query_offsets[:, None] + depth[None, :]
    candidate_at = candidates + candidate_offsets[None, :] + depth[:, None]
    return tile_products(query_at, candidate_at, depth, DIM, BLOCK_D)


@triton.jit
def without(out, values, other: tl.constexpr):
    """`other` where a pair is left out; out None: nothing is."""
    if out is None:
        return values
    else:
        return tl.where(out, other, values)


@triton.jit
def _either(out, equal):
    if out is None:
        return equal
    else:
        return out | equal


@triton.jit
def left_out(
    row_inside, column_inside, row_positive, column_positive, row_self, column_self, row_id, column_id,
    IDS_POSITIVE: tl.constexpr,
):  # fmt: skip
    """Which pairs of a block are outside the tile, or no candidates of it; None for none."""
    out = None
    if row_inside is not None:
        out = ~(row_inside[:, None] & column_inside[None, :])
    if row_positive is not None:
        out = _either(out, row_positive[:, None] == column_positive[None, :])
    if row_self is not None:
        out = _either(out, row_self[:, None] == column_self[None, :])
    if row_id is not None and not IDS_POSITIVE:
        out = _either(out, row_id[:, None] == column_id[None, :])
    return out


@triton.jit
def further_positives(out, row_id, column_id, IDS_POSITIVE: tl.constexpr):
    if IDS_POSITIVE:
        same = row_id[:, None] == column_id[None, :]
        if out is not None:
            same = same & ~out
        return same
    else:
        return None


@triton.jit
def block_scores(u, scale, logit_bias, out):
    """Of products times the norms of columns; -inf where left out."""
    s = u * scale
    if logit_bias is not None:
        s += tl.load(logit_bias)
    return without(out, s, float("-inf"))


@triton.jit
def costs_of(s, further, threshold, ENERGY: tl.constexpr, IDS_POSITIVE: tl.constexpr):
    """Softplus or hinge of scores; what is left out has none."""
    if ENERGY == SIGMOID:
        if IDS_POSITIVE:
            s = tl.where(further, -s, s)
        return tl.maximum(s, 0.0) + log1p_unit(exp_flushed(-tl.abs(s)))
    else:
        over = s - threshold
        return tl.where(over <= 0.0, 0.0, over)  # of NaN NaN


@triton.jit
def narrowed(gradient, gain, dtype: tl.constexpr):
    if gain is not None:
        gradient *= tl.load(gain)
        gradient = tl.where(gradient > 65504.0, 65504.0, tl.where(gradient < -65504.0, -65504.0, gradient))
    return gradient.to(dtype)


@triton.jit
def features_of(pointer, start, lane, inside, depth, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """All features of the rows of a block; those that do not exist are replaced by the first of the block."""
    at = (pointer + start.to(tl.int64) * DIM) + feature_offsets(lane, inside, DIM)[:, None] + depth[None, :]
    if DIM == BLOCK_D:
        return tl.load(at)
    else:
        return tl.load(at, depth[None, :] < DIM, other=0.0)


@triton.jit
def shift_of_bound(logit_scale, logit_bias):
    """What scores of normalised features are moved by where their maximum is not known: exp(s - shift) is at most 2^64,
    and no more is taken off than that asks for."""
    shift = tl.maximum(tl.abs(tl.load(logit_scale)) - 44.3614195558365, 0.0)  # 64 log 2
    if logit_bias is not None:
        shift += tl.load(logit_bias)
    return shift


def operands(tile: Any, exchanged: bool = False) -> tuple[Tensor | None, ...]:
    """The tensors of `OPERANDS`, with rows and columns exchanged if asked for."""
    labels = zip(tile.labels[::2], tile.labels[1::2], strict=True)
    pairs = ((tile.queries, tile.candidates), (tile.row_norm, tile.column_norm), *labels)
    found = [value for pair in pairs for value in (reversed(pair) if exchanged else pair)]
    return found[0].contiguous(), found[1].contiguous(), *found[2:], tile.logit_scale, tile.logit_bias


def operand_types(dtype: str) -> dict[str, str]:
    features = dict.fromkeys(("queries", "candidates"), f"*{dtype}")
    labels = [f"{side}_{label}" for side in ("row", "column") for label in ("positive", "self", "id")]
    return dict.fromkeys(OPERANDS, "*fp32") | features | dict.fromkeys(labels, "*i32")


def absent_operands(present: tuple[str, ...]) -> dict[str, None]:
    """The operands that a case of ahead-of-time compilation lacks; designated pairs are always there."""
    names = {"norm": "norm", "self": "self", "further": "id"}
    absent = dict.fromkeys(
        f"{side}_{name}" for side in ("row", "column") for n, name in names.items() if n not in present
    )
    return absent if "bias" in present else {**absent, "logit_bias": None}


def gain_of(tile: Any, both_norms: bool, exchanged: bool = False) -> Tensor | None:
    """The power of two that a gradient 1 of a score, times the average norms, becomes 2^`GAIN` by; None for 1."""
    if tile.queries.dtype != torch.float16:
        return None
    exponent = torch.full((), float(GAIN), device=tile.queries.device)
    if tile.row_norm is not None:
        norms = (
            (tile.row_norm, tile.column_norm) if both_norms else ((tile.row_norm if exchanged else tile.column_norm),)
        )
        for norm in norms:
            exponent -= norm.log2().nan_to_num(0.0, 40.0, -40.0).mean()
    return torch.exp2(exponent.round().clamp(-60, 60))


def burden_of(labels: tuple[Tensor | None, ...], *more: Tensor | None) -> int:
    """How much a thread keeps beside its scores. 0: one pair of labels; 1: further pairs; 2: any of `more`, too."""
    if any(value is not None for value in more):
        return 2
    return int(sum(label is not None for label in labels) > 2)


def config(
    kernel: str,
    energy: int,
    rows: int,
    columns: int,
    dim: int,
    dtype: torch.dtype,
    capability: tuple[int, int],
    burden: int,
) -> Config:
    """Blocks of rows (M), columns (N) and features (D). kernel: "sums", "tile" (the gradient of a tile of scores),
    "owner" (the gradient of features, of which a program owns rows and holds all D) or "weighted" (sums of candidates,
    likewise).

    Large blocks read less from the cache. But a thread holds a value of each vector for every column of its own, so
    that more vectors ask for fewer columns.
    """
    if capability[0] == 12:  # 99 KB of shared memory, as sm_86 and sm_89
        capability = (8, 9)
    block_m, block_n = (min(max(16, next_power_of_2(n)), 128) for n in (rows, columns))
    whole = rows % 64 == 0 and columns % 64 == 0
    hopper = capability >= (9, 0)
    depth = max(16, next_power_of_2(dim))
    if kernel == "owner":
        small = depth <= 128 and burden < 2
        narrow = energy == ENERGY_SIGMOID and capability >= (10, 0)
        height = 128 if small and hopper and not narrow else 64 if hopper or burden < 2 else 32
        blocks = {"BLOCK_M": min(block_m, height), "BLOCK_N": min(block_n, 64 if small else 32), "BLOCK_D": depth}
        return Config(blocks, {"num_warps": 8 if blocks["BLOCK_M"] * depth >= 4096 else 4, "num_stages": 2})
    if kernel == "weighted":
        height = 32 if dtype == torch.float32 else 128 if capability[0] == 9 or (hopper and depth <= 128) else 64
        width = 32 if dtype == torch.float32 or (height == 128 and depth > 128 and burden > 0) else 64
        blocks = {"BLOCK_M": min(block_m, height), "BLOCK_N": min(block_n, width), "BLOCK_D": depth}
        held = blocks["BLOCK_M"] * max(depth, blocks["BLOCK_N"])
        return Config(blocks, {"num_warps": 8 if held >= 4096 else 4, "num_stages": 2})
    if dtype == torch.float32:
        blocks = {"BLOCK_M": min(block_m, 64), "BLOCK_N": min(block_n, 64), "BLOCK_D": min(depth, 32)}
        return Config(blocks, {"num_warps": 8, "num_stages": 3})
    sums = kernel == "sums"
    wide = burden == 0 and whole and (sums or (energy == ENERGY_SOFTMAX and capability[0] == 9))
    blocks = {
        "BLOCK_M": min(block_m, 128 if burden < 2 and (sums or whole) else 64),
        "BLOCK_N": min(block_n, 128 if wide else 64 if sums or whole or burden < 2 else 32),
        "BLOCK_D": min(depth, 64 if hopper else 32),
    }
    options = {"num_warps": 8, "num_stages": 3}
    if sums and capability >= (10, 0):
        options["maxnreg"] = 255  # ptxas holds to 128 there, and spills
    return Config(blocks, options)


def owns_rows(dim: int, dtype: torch.dtype) -> bool:
    """Whether `owner` is the kernel of the gradient. Not in float32, whose products have no matrix instructions: there
    the matmuls are better left to the library."""
    return dim <= OWNED_DIM and dtype != torch.float32


def weighs(dim: int, dtype: torch.dtype) -> bool:
    """Whether there are weighted sums, of which a program holds all D too."""
    return dim <= OWNED_DIM and dtype != torch.float64


def is_even(rows: int, columns: int, chosen: Config) -> bool:
    """Whether every block is whole, and kernels need not look."""
    return rows % chosen.constexprs["BLOCK_M"] == 0 and columns % chosen.constexprs["BLOCK_N"] == 0
