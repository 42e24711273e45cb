"""Products of rows of two matrices, tile by tile, and how a grid splits their columns."""

import triton
import triton.language as tl

from sslkernels.core.triton.launch import Config


@triton.jit
def tile_products(a_at, b_at, depth, DIM: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr):
    """a (M, DIM) times b (DIM, N), from pointers to their first BLOCK_D columns and rows; `depth` is arange(BLOCK_D).

    Both are contiguous along DIM. PRECISION of float32: "ieee" never uses TF32, "tf32x3" multiplies its parts.
    """
    products = tl.zeros((a_at.shape[0], b_at.shape[1]), tl.float32)
    for start in range(0, DIM, BLOCK_D):
        if DIM % BLOCK_D == 0:
            a = tl.load(a_at + start)
            b = tl.load(b_at + start)
        else:
            a = tl.load(a_at + start, depth[None, :] < DIM - start, other=0.0)
            b = tl.load(b_at + start, depth[:, None] < DIM - start, other=0.0)
        products = tl.dot(a, b, products, input_precision=PRECISION)
    return products


@triton.jit
def feature_offsets(lane, inside, DIM: tl.constexpr):
    """Element offsets of the rows `lane` of a block; rows outside the mask `inside` read the first row instead."""
    if inside is not None:
        lane = tl.where(inside, lane, 0)
    return lane * DIM


def splits(rows: int, columns: int, chosen: Config, processors: int) -> tuple[int, int]:
    """(splits of the columns, tiles per split): about two programs per multiprocessor, each with at least one tile."""
    blocks = triton.cdiv(rows, chosen.constexprs["BLOCK_M"])
    tiles = triton.cdiv(columns, chosen.constexprs["BLOCK_N"])
    per_split = triton.cdiv(tiles, min(max(1, triton.cdiv(2 * processors, blocks)), tiles))
    return triton.cdiv(tiles, per_split), per_split
