"""Raw operators: entries of torch's dispatcher in the namespace `sslkernels`, opaque to `torch.compile`.

An operator is written once, as one annotated function that allocates its outputs:

    @operator("free_energy", {"reference": ..., "cpu": ..., "triton": ...}, native_ops=(...))
    def free_energy_fwd(energy: Tensor, options: Options) -> Outputs:
        return empty_outputs(energy, options)

Parameters and results may be records, NamedTuples of tensors and scalars. The signature gives the flat schema that
torch's dispatcher needs and the packing into it; the function itself is the fake, which `torch.compile` traces. An
implementation takes the same records and computes the same results. Adding a field to a record therefore adds it to the
schema, to the fake and to every backend's arguments.
"""

from __future__ import annotations

import contextlib
import inspect
import typing
from collections.abc import Callable, Iterable, Sequence
from types import UnionType
from typing import Annotated, Any, Union

import torch
from torch import Tensor
from torch.autograd import forward_ad

from sslkernels.core.backends import Implementations
from sslkernels.core.flops import add_formula

Mutated = Annotated[Tensor, "mutated"]  # the annotation of a tensor that an operator writes into

_library = torch.library.Library("sslkernels", "DEF")
_SCHEMA_TYPES = {
    Tensor: "Tensor",
    int: "SymInt",
    float: "float",
    bool: "bool",
    str: "str",
    torch.dtype: "ScalarType",
    tuple[int, ...]: "int[]",  # the dispatcher turns it into a list
}


def operator(
    public: str,
    implementations: dict[str, Callable[..., Any]],
    *,
    native_ops: tuple[str, ...] = (),
    flops: Callable[..., int] | None = None,
) -> Callable[[Callable[..., Any]], Operator]:
    """Decorates the annotated function that allocates an operator's outputs.

    public: the public function that the operator belongs to; implementations: backend name -> function; native_ops: the
    operators of the compiled extension that the implementations "cpu" and "cuda" call; flops: computes the
    floating-point operations of the matmuls from the arguments, for torch's `FlopCounterMode`.
    """

    def decorate(allocate: Callable[..., Any]) -> Operator:
        made = Operator(allocate, Implementations(public, implementations, native_ops))
        if flops is not None:
            add_formula(made.name, lambda *flat: flops(*made.inputs.unpack(flat)))
        return made

    return decorate


class Layout:
    """How a sequence of values, each a leaf or a record of leaves, is laid out as a flat tuple of leaves.

    pack(values) gives the flat tuple, unpack(flat) the tuple of values. Both are compiled from one expression each: a
    small call packs and unpacks ten times, and a loop over the fields would take longer than its kernels.
    """

    pack: Callable[[Sequence[Any]], tuple[Any, ...]]
    unpack: Callable[[Sequence[Any]], tuple[Any, ...]]

    def __init__(self, types: Iterable[Any]) -> None:
        self.records: list[Any] = []
        self.slices: list[slice] = []
        self.leaf_types: list[Any] = []
        self.leaf_names: list[str] = []
        for kind in types:
            begin = len(self.leaf_types)
            record = kind if is_record(kind) else None
            fields = typing.get_type_hints(kind, include_extras=True) if record else {"": kind}
            self.leaf_types += fields.values()
            self.leaf_names += fields
            self.records.append(record)
            self.slices.append(slice(begin, len(self.leaf_types)))
        packed, unpacked = [], []
        for i, (record, at) in enumerate(zip(self.records, self.slices, strict=True)):
            leaves = ", ".join(f"flat[{j}]" for j in range(at.start, at.stop))
            packed.append(f"*values[{i}]," if record else f"values[{i}],")
            unpacked.append(f"records[{i}]({leaves})," if record else f"{leaves},")
        self.pack = eval(f"lambda values: ({''.join(packed)})")
        self.unpack = eval(f"lambda flat: ({''.join(unpacked)})", {"records": tuple(self.records)})


def is_record(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, tuple) and hasattr(kind, "_fields")


def result_types(annotation: Any) -> tuple[list[Any], bool]:
    """The types of a function's results, and whether it returns one result rather than a tuple of them."""
    if typing.get_origin(annotation) is tuple:
        return list(typing.get_args(annotation)), False
    return ([] if annotation in (None, type(None)) else [annotation]), True


class Operator:
    """A raw operator; calling it takes and gives the records of its signature."""

    def __init__(self, allocate: Callable[..., Any], implementations: Implementations) -> None:
        self.name = allocate.__name__
        self.__doc__ = allocate.__doc__
        self.allocate = allocate
        self.implementations = implementations
        hints = typing.get_type_hints(allocate, include_extras=True)
        results, self.single = result_types(hints.pop("return"))
        self._names = list(inspect.signature(allocate).parameters)
        self.inputs = Layout(hints[name] for name in self._names)
        self.outputs = Layout(results)
        self._tensors = [i for i, kind in enumerate(self.inputs.leaf_types) if holds_tensor(kind)]
        # The device of the operator is the device of this tensor, which is never None.
        self._device_leaf = next(i for i in self._tensors if self.inputs.leaf_types[i] in (Tensor, Mutated))
        self._floats = [i for i, kind in enumerate(self.inputs.leaf_types) if kind is float]
        self.raw = self._register_overload("default", self.inputs.leaf_types, self._from_dispatcher, self._fake)
        if self._floats:
            types = [Tensor if kind is float else kind for kind in self.inputs.leaf_types]
            self._raw_float_tensors = self._register_overload(
                "float_tensors", types, self._from_dispatcher_float_tensors, self._fake_float_tensors
            )

    def _register_overload(
        self, overload: str, types: Sequence[Any], implementation: Callable[..., Any], fake: Callable[..., Any]
    ) -> Any:
        """Registers an overload in torch's dispatcher whose arguments have these types."""
        name = self.name if overload == "default" else f"{self.name}.{overload}"
        _library.define(name + _schema(self._names, self.inputs, types, self.outputs))
        _library.impl(name, implementation, "CompositeExplicitAutograd")
        torch.library.register_fake(f"sslkernels::{name}", fake, lib=_library)
        if Mutated not in types:
            torch.library.register_autograd(f"sslkernels::{name}", self._refuse_backward, lib=_library)
        return getattr(getattr(torch.ops.sslkernels, self.name), overload)

    def __call__(self, *args: Any) -> Any:
        flat = self.inputs.pack(args)
        raw = self.raw
        if torch.compiler.is_compiling():
            if any([varies(flat[i]) for i in self._floats]):
                raw = self._raw_float_tensors
                flat = [float_tensor(leaf) if i in self._floats else leaf for i, leaf in enumerate(flat)]
        elif plain([flat[i] for i in self._tensors]):
            return self._run(flat, args)  # the dispatcher would only call it back, 15 us later
        results = raw(*flat)
        return self._results(results if isinstance(results, (tuple, list)) else () if results is None else (results,))

    def choose(self, device: torch.device) -> str:
        """The backend that would run the operator on `device` now."""
        return self.implementations.choose(device)

    def _results(self, flat: Sequence[Any]) -> Any:
        values = self.outputs.unpack(flat)
        if not self.single:
            return values
        return values[0] if values else None

    def _flat(self, results: Any) -> Any:
        """The results as the dispatcher takes them: None, a tensor, or a tuple of tensors."""
        flat = self.outputs.pack((results,) if self.single else results) if self.outputs.records else ()
        if self.single and self.outputs.records[:1] in ([], [None]):
            return flat[0] if flat else None
        return flat

    def _fake(self, *flat: Any) -> Any:
        return self._flat(self.allocate(*self.inputs.unpack(flat)))

    def _from_dispatcher(self, *flat: Any) -> Any:
        return self._flat(self._run(flat, self.inputs.unpack(flat)))

    def _fake_float_tensors(self, *flat: Any) -> Any:
        return self._fake(*[_Unread() if i in self._floats else leaf for i, leaf in enumerate(flat)])

    def _from_dispatcher_float_tensors(self, *flat: Any) -> Any:
        return self._from_dispatcher(*[leaf.item() if i in self._floats else leaf for i, leaf in enumerate(flat)])

    def _refuse_backward(self, ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            f"{self.implementations.public}: the graph holds the raw operator {self.name}, which has no gradient, as "
            "torch.export and make_fx leave it; trace forward and backward together, or train with torch.compile"
        )

    def _run(self, flat: Sequence[Any], args: Sequence[Any]) -> Any:
        device = flat[self._device_leaf].device
        implementation = self.implementations.functions[self.implementations.choose(device)]
        with grad_disabled():
            if device.type == "cpu" and not torch.is_autocast_enabled("cpu"):
                return implementation(*args)
            return self._run_elsewhere(implementation, args, device)

    def _run_elsewhere(self, implementation: Callable[..., Any], args: Sequence[Any], device: torch.device) -> Any:
        """Runs it with autocast disabled and `device` as the current device."""
        with contextlib.ExitStack() as stack:
            if device.type != "meta" and torch.is_autocast_enabled(device.type):
                stack.enter_context(torch.autocast(device.type, enabled=False))
            if device.type == "cuda":
                stack.enter_context(torch.cuda.device(device))
            return implementation(*args)


def _refuse_exported(ctx: Any, *_: Any) -> Any:
    raise RuntimeError(
        "sslkernels: the graph was exported, and has no gradient of what the package computed; train with torch.compile"
    )


_library.define("exported(Tensor value, Tensor[] inputs) -> Tensor")
_library.impl("exported", lambda value, inputs: value.clone(), "CompositeExplicitAutograd")
torch.library.register_fake("sslkernels::exported", lambda value, inputs: torch.empty_like(value), lib=_library)
torch.library.register_autograd("sslkernels::exported", _refuse_exported, lib=_library)
exported = torch.ops.sslkernels.exported.default  # a copy of value, through which a gradient of the inputs raises


class grad_disabled:
    """`torch.no_grad()`, which takes ten times as long to enter and leave."""

    def __enter__(self) -> None:
        self.before = torch.is_grad_enabled()
        if self.before:
            torch._C._set_grad_enabled(False)

    def __exit__(self, *_: Any) -> None:
        if self.before:
            torch._C._set_grad_enabled(True)


class _Unread:
    """Stands for a float whose value `allocate` cannot know. It has no operators: any use of the value raises."""


def varies(value: float) -> bool:
    """Whether the number is an input of the graph that torch.compile traces, and may change from call to call."""
    from torch.fx.experimental.symbolic_shapes import has_static_value

    return not has_static_value(value)


def float_tensor(value: float) -> Tensor:
    """A number that is an input of a traced graph, as a tensor in the host's memory.

    As a `float` of the schema it would be a constant, and torch.compile would trace a graph for each value. The tensor
    is made by a product, since torch.compile makes a constant of the argument of `torch.full`.
    """
    return torch.ones((), dtype=torch.float64, device="cpu") * value


def full(
    shape: tuple[int, ...], value: float, dtype: torch.dtype, device: torch.device, *, reciprocal: bool = False
) -> Tensor:
    """`torch.full` of the value, or of its reciprocal; the value may be an input of a traced graph.

    `torch.full` would make it a constant of that graph; so would torch 2.11 with a reciprocal computed in Python.
    """
    if torch.compiler.is_compiling() and varies(value):
        ones = torch.ones(shape, dtype=dtype, device=device)
        return ones / value if reciprocal else ones * value
    return torch.full(shape, 1.0 / value if reciprocal else value, dtype=dtype, device=device)


def _schema(names: Sequence[str], inputs: Layout, types: Sequence[Any], outputs: Layout) -> str:
    """The schema, as in `(Tensor x, SymInt? count) -> (Tensor, Tensor)`; a record's fields are `parameter_field`."""
    arguments: list[str] = []
    for parameter, at in zip(names, inputs.slices, strict=True):
        for kind, field in zip(types[at], inputs.leaf_names[at], strict=True):
            name = f"{parameter}_{field}" if field else parameter
            arguments.append(f"{_schema_type(kind, len(arguments))} {name}")
    results = ", ".join(_schema_type(kind, 0) for kind in outputs.leaf_types)
    single = len(outputs.records) == 1 and outputs.records[0] is None
    return f"({', '.join(arguments)}) -> {results if single else f'({results})'}"


def _schema_type(kind: Any, position: int) -> str:
    if kind is Mutated:
        return f"Tensor(m{position}!)"
    options = typing.get_args(kind) if typing.get_origin(kind) in (Union, UnionType) else (kind,)
    (kind,) = [option for option in options if option is not type(None)]
    return _SCHEMA_TYPES[kind] + "?" * (len(options) > 1)


def holds_tensor(kind: Any) -> bool:
    return kind is Tensor or kind is Mutated or Tensor in typing.get_args(kind)


def plain(tensors: Iterable[Tensor | None]) -> bool:
    """Whether the dispatcher has nothing to add: no mode traces, no transform or forward-mode derivative is active, and
    every tensor is plain memory: not a subclass, not batched, not lazily negated, not a lazy zero."""
    if torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active():
        return False
    if forward_ad._current_level >= 0:
        return False
    for tensor in tensors:
        kind = type(tensor)
        if kind is Tensor or kind is torch.nn.Parameter:
            if tensor.is_meta or tensor.is_neg() or tensor._is_zerotensor():
                return False
            if torch._C._functorch.is_legacy_batchedtensor(tensor):
                return False
        elif tensor is not None:
            return False
    return True
