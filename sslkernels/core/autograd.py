"""Autograd functions over records.

`torch.autograd.Function` sees the tensors of its flat argument list alone, and `torch.compile` accepts no `*args` in a
`forward` that has a `setup_context`. `Function` closes the gap: its methods take and give records, NamedTuples of
tensors, and the flat methods of explicit arity that torch needs are made from the annotations of `forward`.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from sslkernels.core.operator import Layout, exported, grad_disabled, holds_tensor, is_record, result_types


class Function(torch.autograd.Function):
    """The methods of `torch.autograd.Function`, over records.

    forward(*parameters): annotated; a parameter may be a record. setup_context(ctx, inputs, outputs): tuples of the
    parameters and results of forward; only called if autograd tracks them. backward(ctx, *gradients): one gradient, or
    record of gradients, for each result, None where autograd has none; gives a tuple with one for each of the first
    parameters, or None for no gradient at all. Call the function by `run`; `wanted(ctx)` is ctx.needs_input_grad, a
    bool or a record of bools a parameter.
    """

    generate_vmap_rule = True
    differentiable: int | None = None  # how many of the flat results have a gradient, the first ones; None: all
    run: Callable[..., Any]
    wanted: Callable[[Any], tuple[Any, ...]]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        hints = typing.get_type_hints(cls.forward)
        results, single = result_types(hints.get("return", tuple[()]))
        types = [hints[name] for name in inspect.signature(cls.forward).parameters]
        # Only records that hold tensors are flattened: options pass through as they are.
        inputs = Layout(kind if holds_tensor(kind) or _has_tensors(kind) else None for kind in types)
        _flatten_methods(cls, inputs, Layout(results), single)


def _flatten_methods(cls: type[Function], inputs: Layout, outputs: Layout, single: bool) -> None:
    """Replaces the methods over records by the flat ones that torch needs. They are closures, because torch.compile
    does not trace methods that read attributes of the class."""
    forward, setup_context, backward, differentiable = (
        getattr(cls, name) for name in ("forward", "setup_context", "backward", "differentiable")
    )
    one_tensor = single and outputs.records == [None]
    tensors = [i for i, kind in enumerate(inputs.leaf_types) if holds_tensor(kind)]
    apply = super(torch.autograd.Function, cls).apply

    def run(*parameters: Any) -> Any:
        flat = inputs.pack(parameters)
        if torch.compiler.is_compiling():
            results = cls.apply(*distinct(flat))
            if torch.compiler._is_exporting_flag:  # is_exporting() of torch 2.11 is true for torch.compile, too
                results = refusing_backward(results, [flat[i] for i in tensors], differentiable)
        elif torch._C._are_functorch_transforms_active():
            results = cls.apply(*flat)
        else:
            # cls.apply would also bind the signature of forward with `inspect`, which takes longer than forward.
            alive = list(flat)
            for i in tensors:
                if alive[i] is not None:
                    alive[i] = torch._C._functorch.unwrap_if_dead(alive[i])
            if not is_tracked([alive[i] for i in tensors]):
                with grad_disabled():
                    return forward(*inputs.unpack(alive))
            results = apply(*alive)
        values = outputs.unpack(results if isinstance(results, tuple) else (results,))
        return values[0] if single else values

    def flat_forward(*flat: Any) -> Any:
        results = forward(*inputs.unpack(flat))
        return results if one_tensor else outputs.pack((results,) if single else results)

    def flat_setup_context(ctx: Any, flat: tuple, results: Any) -> None:
        results = results if isinstance(results, tuple) else (results,)
        ctx.set_materialize_grads(False)
        if differentiable is not None:
            ctx.mark_non_differentiable(*results[differentiable:])
        setup_context(ctx, inputs.unpack(flat), outputs.unpack(results))

    def flat_backward(ctx: Any, *grads: Any) -> Any:
        flat: list[Any] = []
        for value, at in zip(backward(ctx, *outputs.unpack(grads)) or (), inputs.slices, strict=False):
            flat.extend(value if isinstance(value, tuple) else (value,) * (at.stop - at.start))
        return (*flat, *(None,) * (len(inputs.leaf_types) - len(flat)))

    cls.run = staticmethod(run)
    cls.wanted = staticmethod(lambda ctx: inputs.unpack(ctx.needs_input_grad))
    cls.forward = staticmethod(_with_arity(flat_forward, len(inputs.leaf_types)))
    cls.setup_context = staticmethod(flat_setup_context)
    cls.backward = staticmethod(flat_backward)


def refusing_backward(results: Any, inputs: Iterable[Tensor | None], differentiable: int | None) -> Any:
    """The results of an exported function, through which a gradient raises. The exported graph holds the operations of
    forward, not the function: without this, gradients would be None, or whatever autograd derives for them."""
    inputs = [tensor for tensor in inputs if tensor is not None and tensor.requires_grad]
    if not (inputs and torch.is_grad_enabled()):
        return results
    if isinstance(results, Tensor):
        return exported(results, inputs)
    return tuple(
        exported(value, inputs) if i < (differentiable or len(results)) and value.is_floating_point() else value
        for i, value in enumerate(results)
    )


def is_tracked(tensors: Iterable[Tensor | None]) -> bool:
    """Whether autograd, of either mode, tracks what is computed from these tensors."""
    if forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def may_want_gradient(*tensors: Tensor | None) -> bool:
    """Whether forward should keep what backward needs of these tensors. Under vmap a tensor hides whether an outer
    transform, such as `torch.func.grad`, differentiates it: then this is true."""
    if not torch.is_grad_enabled():
        return False
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return True
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


def save(ctx: Any, *values: Any) -> None:
    """Saves tensors and records of tensors for backward."""
    ctx.layout = [type(value) if isinstance(value, tuple) else None for value in values]
    ctx.save_for_backward(*[leaf for v in values for leaf in (v if isinstance(v, tuple) else (v,))])


def saved(ctx: Any) -> list[Any]:
    """The values given to `save`. Call it once: activation checkpointing recomputes the tensors at every access."""
    leaves, begin, values = ctx.saved_tensors, 0, []
    for record in ctx.layout:
        end = begin + (1 if record is None else len(record._fields))
        values.append(leaves[begin] if record is None else record(*leaves[begin:end]))
        begin = end
    return values


def once_differentiable(name: str, hint: str = "") -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates the annotated function that computes gradients, so that differentiating it again raises.

    Unlike torch's decorator of that name it also raises where only saved tensors are differentiated, and never gives a
    gradient that is silently zero. name: the public function in the message, unless a parameter `function` names it;
    hint: what to do instead.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        parameters = list(inspect.signature(function).parameters)

        class Backward(Function):
            forward = staticmethod(function)

            @staticmethod
            def setup_context(ctx, inputs, outputs):
                ctx.function = inputs[parameters.index("function")] if "function" in parameters else name

            @staticmethod
            def backward(ctx, *_):
                instead = hint and f"; {hint}"
                raise NotImplementedError(f"{ctx.function}: double backward is not supported{instead}")

        Backward.__name__ = Backward.__qualname__ = function.__name__

        def call(*arguments: Any) -> Any:
            if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
                return Backward.run(*arguments)
            if forward_ad._current_level >= 0:  # a tangent of grad_output, which Backward refuses
                return Backward.run(*arguments)
            return function(*arguments)  # autograd tracks nothing here that could be differentiated again

        return call

    return decorate


def contiguous_rows(grad: Tensor) -> Tensor:
    """A grad_output whose last dimension is contiguous, for kernels that take any stride of the others.

    The gradient of a sum or a mean is one number in memory, expanded. It becomes one row, expanded over the rows, which
    stays in the cache: materialising all of it would take longer than many a kernel.
    """
    if grad.dim() == 0 or grad.stride(-1) == 1 or grad.shape[-1] <= 1 or grad.numel() == 0:
        return grad
    if 0 not in grad.stride()[:-1]:
        return grad.contiguous()  # a gradient of `is_grads_batched` has no views
    first = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in grad.stride()[:-1])
    return grad[first].contiguous().expand(grad.shape)


def empty_gradients(inputs: Iterable[Tensor | None], wanted: Iterable[bool]) -> list[Tensor]:
    """An uninitialised contiguous gradient for each wanted input, and a tensor without elements for each other one."""
    like = None
    gradients: list[Tensor] = []
    for tensor, want in zip(inputs, wanted, strict=True):
        like = tensor if tensor is not None else like
        gradients.append(tensor.new_empty(tensor.shape) if want else like.new_empty(0))
    return gradients


def wanted_only(record: Any, wanted: Iterable[bool]) -> Any:
    """The record with None in place of the fields that are not wanted."""
    return type(record)(*(value if want else None for value, want in zip(record, wanted, strict=True)))


def distinct(leaves: Sequence[Any]) -> list[Any]:
    """The leaves, with views in place of repeated tensors: torch.compile rejects a tensor that is passed twice."""
    result: list[Any] = []
    for leaf in leaves:
        seen = isinstance(leaf, Tensor) and any(leaf is other for other in result)
        result.append(leaf.view_as(leaf) if seen else leaf)
    return result


def _has_tensors(kind: Any) -> bool:
    """Whether `kind` is a record with a tensor, or optional tensor, among its fields."""
    if not is_record(kind):
        return False
    return any(map(holds_tensor, typing.get_type_hints(kind).values()))


def _with_arity(call: Callable[..., Any], count: int) -> Callable[..., Any]:
    """`call` as a function of `count` named parameters: torch.compile rejects `*args` in forward."""
    names = ", ".join(f"leaf{i}" for i in range(count))
    # Made inside a function of this module, so that torch.compile finds its globals.
    source = f"def make(call):\n    def forward({names}):\n        return call({names})\n    return forward"
    namespace: dict[str, Any] = {}
    exec(source, globals(), namespace)
    return namespace["make"](call)
