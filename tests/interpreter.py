"""Repairs of Triton's interpreter, which handles bfloat16 unlike any device in two places.

Stores truncate float32 to bfloat16 where hardware rounds to nearest even, and `tl.dot` multiplies the bit patterns.
"""

import numpy as np
import torch


def repair() -> None:
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast, convert, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_fp_to_fp, InterpreterBuilder.create_dot

    def narrows(value, dtype) -> bool:
        return value.dtype.scalar == tl.float32 and dtype.scalar == tl.bfloat16

    def rounded(value):
        data = torch.from_numpy(np.array(value.data, dtype=np.float32)).to(torch.bfloat16)
        return TensorHandle(data.view(torch.int16).numpy().view(np.uint16), tl.bfloat16)

    def widened(value):
        return cast(None, value, tl.float32) if value.dtype.scalar == tl.bfloat16 else value

    def repaired_cast(self, value, dtype):
        return rounded(value) if narrows(value, dtype) else cast(self, value, dtype)

    def repaired_convert(self, value, dtype, mode):
        return rounded(value) if narrows(value, dtype) else convert(self, value, dtype, mode)

    def repaired_dot(self, a, b, d, *options):
        return dot(self, widened(a), widened(b), d, *options)

    InterpreterBuilder.cast_impl = repaired_cast
    InterpreterBuilder.create_fp_to_fp = repaired_convert
    InterpreterBuilder.create_dot = repaired_dot
