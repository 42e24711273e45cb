"""Losses and distributions of this package behind the names and calls of other libraries.

Each module imports its library, and is itself imported when it is first used: `import sslkernels` imports none of them.
"""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["diffusers", "lightly", "open_clip", "sentence_transformers", "transformers"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"{__name__}.{name}")
