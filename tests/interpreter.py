"""Repairs of Triton's interpreter, which handles bfloat16 unlike any device in two places, and what makes it quicker.

Stores truncate float32 to bfloat16 where hardware rounds to nearest even, and `tl.dot` multiplies the bit patterns.
"""

import inspect

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
    _quicken()


def _quicken() -> None:
    """Half of the interpreter's time goes to two things that are done once here. It replaces the functions of
    triton.language for a launch, and again for each jit function that is called in it; and it makes a table of all
    dtypes to look one up."""
    import triton.runtime.interpreter as interpreter

    tl, replace, numpy_dtype = interpreter.tl, interpreter._patch_lang, interpreter._get_np_dtype
    modules: dict[int, set[object]] = {}  # those that the globals of a function have
    replaced: set[object] = set()  # the modules of the launch that runs
    scopes = []
    dtypes: dict[str, np.dtype] = {}

    class Launch:
        def restore(self) -> None:
            while scopes:
                scopes.pop().restore()
            replaced.clear()

    def replace_once(function):
        names = function.__globals__
        if id(names) not in modules:
            modules[id(names)] = {m for m in names.values() if inspect.ismodule(m) and m in (tl, tl.core)}
        if not modules[id(names)] or not modules[id(names)] <= replaced:
            scopes.append(replace(function))
            replaced.update(modules[id(names)])
        return Launch()

    def known_dtype(dtype):
        scalar = dtype.element_ty if isinstance(dtype, tl.block_type) else dtype
        name = "pointer" if isinstance(scalar, tl.pointer_type) else scalar.name
        if name not in dtypes:
            dtypes[name] = numpy_dtype(dtype)
        return dtypes[name]

    interpreter._patch_lang, interpreter._get_np_dtype = replace_once, known_dtype
