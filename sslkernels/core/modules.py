"""Base class of the modules that hold options."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from sslkernels.core import checks


def options_of(parameters: dict[str, Any]) -> dict[str, Any]:
    """The options among the parameters of an `__init__`, given its `locals()`."""
    return {name: value for name, value in parameters.items() if name not in ("self", "__class__")}


class Options(nn.Module):
    """Stores keyword options. Tensors become buffers, unless they are parameters, so that they move with the module."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self._names = tuple(options)
        for name, value in options.items():
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                if value.requires_grad:  # a buffer would never be given to an optimiser
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
