"""A tile of products of rows of two matrices, in float32."""

import triton
import triton.language as tl


@triton.jit
def tile_products(a_at, b_at, depth, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """a (M, DIM) times b (DIM, N) from pointers to their first BLOCK_D columns and rows, `depth` being arange(BLOCK_D).

    Both are contiguous along DIM. Never in TF32.
    """
    products = tl.zeros((a_at.shape[0], b_at.shape[1]), tl.float32)
    for start in range(0, DIM, BLOCK_D):
        if DIM % BLOCK_D == 0:
            a = tl.load(a_at + start)
            b = tl.load(b_at + start)
        else:
            a = tl.load(a_at + start, depth[None, :] < DIM - start, other=0.0)
            b = tl.load(b_at + start, depth[:, None] < DIM - start, other=0.0)
        products = tl.dot(a, b, products, input_precision="ieee")
    return products
