"""Base classes of modules that hold options or a process group, a lock, and a module that a call leaves as it was."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor, nn

from sslkernels.core import checks


def options_of(parameters: dict[str, Any]) -> dict[str, Any]:
    """The options among the parameters of an `__init__`, given its `locals()`."""
    return {name: value for name, value in parameters.items() if name not in ("self", "__class__")}


class SharedGroup:
    """A process group that copies of a module share, since torch can neither copy nor pickle one. A pickled one is
    looked up by its name when it is first used, so that a module can be loaded where there are no ranks."""

    def __init__(self, group: Any) -> None:
        self.group = group
        self.name = getattr(group, "group_name", None)

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedGroup:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {"group": None, "name": self.name}

    def get(self) -> Any:
        if self.group is None:
            try:
                self.group = dist.distributed_c10d._resolve_process_group(self.name)  # type: ignore[attr-defined, arg-type]
            except Exception as error:
                raise RuntimeError(
                    f"process_group: there is no group {self.name!r} in this process, where the module was loaded; set "
                    "module.process_group"
                ) from error
        return self.group


class Lock:
    """A lock of a module: a copy or a pickle of the module has its own."""

    def __init__(self) -> None:
        self.held = threading.RLock()

    def __reduce__(self) -> tuple[type[Lock], tuple[()]]:
        return Lock, ()


class OverRanks(nn.Module):
    """Base class of modules with a `process_group`, which deep copies and pickles share."""

    _group: SharedGroup | None = None

    @property
    def process_group(self) -> Any:
        return None if self._group is None else self._group.get()

    @process_group.setter
    def process_group(self, group: Any) -> None:
        self._group = None if group is None else SharedGroup(group)


class Options(OverRanks):
    """Stores keyword options. Tensors become buffers, unless they are parameters, so that they move with the module."""

    tensors: tuple[str, ...] = ()  # options that are buffers from the start, also while they are None
    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...  # an option, whose type torch.nn.Module would not say

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self._names = tuple(options)
        for name, value in options.items():
            if isinstance(value, nn.Parameter):
                setattr(self, name, value)
            elif name in self.tensors or isinstance(value, Tensor):
                if value is not None and value.requires_grad:  # a buffer would never be given to an optimiser
                    must = "be a torch.nn.Parameter, or want no gradient"
                    checks.fail(TypeError, type(self).__name__, name, must, "a tensor that requires grad")
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._names}

    def extra_repr(self) -> str:
        shown = {k: tuple(v.shape) if isinstance(v, Tensor) else v for k, v in self.options().items()}
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())


@contextlib.contextmanager
def left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Restores the model's attributes, submodules and configuration: some models replace modules for a short input."""
    holders = [*model.modules(), *(vars(each)["config"] for each in model.modules() if "config" in vars(each))]
    dicts = [vars(holder) for holder in holders]
    dicts += [value for attributes in dicts for value in attributes.values() if type(value) is dict]
    before = [dict(each) for each in dicts]
    try:
        yield
    finally:
        for each, content in zip(dicts, before, strict=True):
            each.clear()
            each.update(content)
