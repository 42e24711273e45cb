"""Base class of the modules that hold options."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def options_of(parameters: dict[str, Any]) -> dict[str, Any]:
    """The options among the parameters of an `__init__`, given its `locals()`."""
    return {name: value for name, value in parameters.items() if name not in ("self", "__class__")}


class Options(nn.Module):
    """Stores keyword options. Tensors become buffers, unless they are parameters, so that they move with the module."""

    tensors: tuple[str, ...] = ()  # options that are buffers from the start, also while they are None

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self._names = tuple(options)
        for name, value in options.items():
            if isinstance(value, nn.Parameter):
                setattr(self, name, value)
            elif name in self.tensors or isinstance(value, Tensor):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._names}

    def extra_repr(self) -> str:
        shown = {k: tuple(v.shape) if isinstance(v, Tensor) else v for k, v in self.options().items()}
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())
