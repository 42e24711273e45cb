"""Which backend runs a raw operator: what was chosen, what can run here, and why the others cannot.

The choice is made each time an operator runs, so `use_backend` also acts on a graph that was compiled before.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

from sslkernels.core import native, preference

BACKENDS = ("cuda", "triton", "cpu", "reference")
CHOICES = ("auto", *BACKENDS)

_registry: list[Implementations] = []


def _checked_choice(name: str, source: str) -> str:
    if name not in CHOICES:
        raise ValueError(f"{source} must be one of {', '.join(CHOICES)}; got {name!r}")
    return name


_choice = _checked_choice(os.environ.get("SSLKERNELS_BACKEND") or "auto", "SSLKERNELS_BACKEND")
_warned = False


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op inside the block on one backend.

    `name`: "auto", "reference", "cpu", "triton" or "cuda". "auto" takes the preferred backend that can run; any other
    choice raises `RuntimeError`, with the reason, where it cannot run. The choice holds for the whole process, so that
    backward passes, which autograd runs in threads of its own, see it too. The environment variable
    `SSLKERNELS_BACKEND` sets the choice outside any block.

    >>> import sslkernels as sk
    >>> with sk.use_backend("reference"):
    ...     loss = sk.cross_entropy(torch.randn(4, 10), torch.tensor([1, 2, 3, 4]))
    """
    global _choice
    previous = _choice
    _choice = _checked_choice(name, "use_backend: name")
    try:
        yield
    finally:
        _choice = previous


class Implementations:
    """The implementations of one raw operator, by backend, and the choice between them.

    public: the public function that the operator belongs to; native_ops: operators of the compiled extension that the
    implementations "cpu" and "cuda" call.
    """

    def __init__(self, public: str, functions: dict[str, Callable[..., Any]], native_ops: tuple[str, ...]) -> None:
        self.public = public
        self.functions = functions
        self.native_ops = native_ops
        # The answers of `_choose`: what can run does not change while the process lives, and asking takes longer than
        # a small kernel.
        self._chosen: dict[tuple[str, torch.device], str] = {}
        _registry.append(self)

    def choose(self, device: torch.device) -> str:
        """The backend that would run the operator on `device` now; `RuntimeError` where none can."""
        key = (_choice, device)
        backend = self._chosen.get(key)
        if backend is None:
            backend = self._chosen[key] = self._choose(device)
        return backend

    def _choose(self, device: torch.device) -> str:
        if _choice != "auto":
            reason = self.why_not(_choice, device)
            if reason is not None:
                raise RuntimeError(f"{self.public}: backend {_choice!r} cannot run on {device}: {reason}")
            return _choice
        for name in preference.order(self.public, device):
            if self.why_not(name, device) is None:
                if name == "reference":
                    self._warn_of_reference(device)
                return name
        raise RuntimeError(f"{self.public}: no backend can run on {device}")

    def _warn_of_reference(self, device: torch.device) -> None:
        """Says once why the kernels that this device should have cannot run."""
        global _warned
        kernels = {"cpu": "cpu", "cuda": "triton"}.get(device.type)  # what needs no compiler on a GPU
        if _warned or kernels not in self.functions:
            return
        _warned = True
        reason = self.why_not(kernels, device)
        warnings.warn(
            f"sslkernels: {self.public} runs in plain torch on {device}, which takes more time and memory: {reason}",
            stacklevel=2,
        )

    def why_not(self, name: str, device: torch.device) -> str | None:
        """None if backend `name` can run the operator on `device`, else the reason."""
        if name not in self.functions:
            return f"{self.public} has no {name} implementation"
        if name == "reference":
            return None
        if name == "triton":
            return _why_not_triton(device)
        if device.type != name:
            return f"it runs on {name} tensors"
        return native.why_missing(self.native_ops, name.upper()) or _why_not_architecture(device)


def _why_not_triton(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type == "cuda":
        return None
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return "it runs on cuda tensors (and on cpu tensors under TRITON_INTERPRET=1)"


def _why_not_architecture(device: torch.device) -> str | None:
    """The extension carries machine code of some architectures and PTX for those that come after."""
    if device.type != "cuda":
        return None
    assert native.extension is not None
    info = native.extension.build_info()
    major, minor = torch.cuda.get_device_capability(device)
    current = 10 * major + minor
    if any(_runs_on(built, current) for built in info["cuda_architectures"]):
        return None
    if any(built.isdigit() and int(built) <= current for built in info["cuda_ptx"]):
        return None
    built = ", ".join(f"sm_{architecture}" for architecture in info["cuda_architectures"])
    return (
        f'it was compiled for {built}, this device is sm_{current}; rebuild with TORCH_CUDA_ARCH_LIST="{major}.{minor}"'
    )


def _runs_on(built: str, device: int) -> bool:
    """Whether machine code for "90" or "90a" runs on a device of capability 90: on the same and, without a letter, on
    later ones of its generation."""
    if not built.isdigit():
        return int(built[:-1]) == device
    return int(built) // 10 == device // 10 and int(built) <= device


def current_choice() -> str:
    """What `use_backend` or `SSLKERNELS_BACKEND` chose."""
    return _choice


def chosen(public: str, device: torch.device) -> str:
    """The backend that the public function would use on `device` now, or why none can run."""
    try:
        return next(op.choose(device) for op in _registry if op.public == public)
    except RuntimeError as error:
        return f"nothing: {error}"


def public_ops() -> list[str]:
    """The public functions that have raw operators."""
    return list(dict.fromkeys(op.public for op in _registry))


def why_not(public: str, backend: str, device: torch.device) -> str | None:
    """None if `backend` can run every raw operator of the public function `public` on `device`, else the reason."""
    reasons = [op.why_not(backend, device) for op in _registry if op.public == public]
    return next((reason for reason in reasons if reason is not None), None)


def available_backends(op: str | None = None, device: torch.device | str | None = None) -> tuple[str, ...]:
    """The backends that can run here, best first.

    op: a public function's name, as "cross_entropy"; None: those that can run every op. device: default the current
    CUDA device where there is one, else the CPU. Raises `ValueError` for an unknown `op`.

    >>> import sslkernels as sk
    >>> "reference" in sk.available_backends("cross_entropy", "cpu")
    True
    """
    if op is not None and op not in public_ops():
        raise ValueError(f"available_backends: op must be one of {', '.join(public_ops())}; got {op!r}")
    where = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    names = [op] if op is not None else public_ops()
    return tuple(b for b in BACKENDS if all(why_not(name, b, where) is None for name in names))
