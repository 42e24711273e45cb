"""Operators that are not yet written over records; to be deleted."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor
from torch.autograd import Function

from sslkernels.core.backends import PREFERENCE, Implementations  # noqa: F401
from sslkernels.core.operator import _library
from sslkernels.core.scale import scaled

LEAVES = 7


class Op:
    def __init__(self, public, schema, fake, implementations, *, native_ops=(), prefer=()):
        self.name = schema.split("(", 1)[0]
        self.implementations = Implementations(public, implementations, native_ops)
        _library.define(schema)
        _library.impl(self.name, self._run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"sslkernels::{self.name}", fake, lib=_library)
        self._call = getattr(torch.ops.sslkernels, self.name).default

    def __call__(self, *args):
        return self._call(*args)

    def choose(self, device):
        return self.implementations.choose(device)

    def _run(self, *args):
        device = next(a.device for a in args if isinstance(a, Tensor))
        implementation = self.implementations.functions[self.choose(device)]
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            if torch.is_autocast_enabled(device.type):
                stack.enter_context(torch.autocast(device.type, enabled=False))
            if device.type == "cuda":
                stack.enter_context(torch.cuda.device(device))
            return implementation(*args)


def kept(function, gradient, scale, dtype, *leaves):
    return _KeptGradient.apply(function, gradient, scale, dtype, *leaves, *[None] * (LEAVES - len(leaves)))


class _KeptGradient(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(function, gradient, scale, dtype, leaf0, leaf1, leaf2, leaf3, leaf4, leaf5, leaf6):
        return scaled(gradient, scale, dtype, saved=True)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.function = inputs[0]

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError(f"{ctx.function}: double backward is not supported")
