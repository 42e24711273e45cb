"""What the drop-in classes share: a warning where the library's own code runs in place of the fused one."""

from __future__ import annotations

import warnings


def warn_once(instance: object, why: str) -> None:
    """Says that this instance runs the code of the class that it stands in for, once for each instance."""
    if vars(instance).get("_warned"):
        return
    instance._warned = True  # type: ignore[attr-defined]
    own = type(instance).__mro__[1]
    message = f"{type(instance).__name__}: {why} is not covered; the code of {own.__module__} computes the loss"
    warnings.warn(message, stacklevel=3)
