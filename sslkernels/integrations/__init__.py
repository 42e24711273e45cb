"""Losses and distributions of this package behind the names and calls of other libraries.

Each module imports its library, and is itself imported when it is first used: `import sslkernels` imports none of them.
"""

from __future__ import annotations

import importlib
import warnings
from typing import Any

__all__ = ["diffusers", "lightly", "open_clip", "sentence_transformers", "stable_pretraining", "transformers"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"{__name__}.{name}")


def warn_once(instance: object, why: str) -> None:
    """Says that this instance runs the code of the class that it stands in for, once for each instance."""
    if vars(instance).get("_warned"):
        return
    instance._warned = True  # type: ignore[attr-defined]
    library = type(instance).__mro__[1].__module__
    message = f"{type(instance).__name__}: {why} is not covered; the code of {library} computes it"
    warnings.warn(message, stacklevel=3)
