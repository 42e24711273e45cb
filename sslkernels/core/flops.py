"""FLOPs of the raw operators, for `torch.utils.flop_counter.FlopCounterMode`."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from types import ModuleType
from typing import Any

import torch

MODULE = "torch.utils.flop_counter"

_formulas: dict[str, Callable[..., int]] = {}


def add_formula(operator: str, formula: Callable[..., int]) -> None:
    """formula: computes FLOPs from the dispatcher's arguments; a multiplication and its addition count as two."""
    _formulas[operator] = formula
    if MODULE in sys.modules:
        _register(sys.modules[MODULE], operator)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register(flop_counter: ModuleType, operator: str) -> None:
    formula = _formulas[operator]
    counted = flop_counter.register_flop_formula(getattr(torch.ops.sslkernels, operator), get_raw=True)
    counted(lambda *arguments, out_val=None: formula(*arguments))


class _Finder(MetaPathFinder):
    """Registers the formulas when torch's counter is imported, which imports Triton: `import sslkernels` must not."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: Any) -> Any:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        for operator in _formulas:
            _register(module, operator)
