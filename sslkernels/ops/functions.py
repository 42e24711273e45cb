"""What the autograd functions of several ops share."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor


def distinct(tensors: Iterable[Tensor | None]) -> list[Tensor | None]:
    """A view of each tensor that occurs before: torch.compile takes no tensor twice in one autograd function."""
    result: list[Tensor | None] = []
    for tensor in tensors:
        seen = tensor is not None and any(tensor is other for other in result)
        result.append(tensor.view_as(tensor) if seen else tensor)
    return result
