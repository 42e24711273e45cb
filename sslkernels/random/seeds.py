"""Seeds of the random streams.

The streams themselves are defined in `sslkernels.random.streams`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._functorch import config as functorch

from sslkernels.core import checks

_INT64_MIN = -(2**63)
_INT64_MAX = 2**63 - 1


def wrap_int64(value: int) -> int:
    """The int64 with the same low 64 bits as `value`."""
    return value - 2**64 if value > _INT64_MAX else value


def in_backward() -> bool:
    """Whether this thread runs a backward pass, where activation checkpointing recomputes forwards."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _is_default(generator: torch.Generator) -> bool:
    defaults = (torch.default_generator, *(torch.cuda.default_generators if generator.device.type == "cuda" else ()))
    return any(generator is default for default in defaults)


def seed_tensor(
    function: str, seed: int | Tensor | None, generator: torch.Generator | None, device: torch.device
) -> Tensor:
    """The seed as a 0-d int64 tensor on `device`, without a host-device synchronisation.

    function: the public function, for messages; seed: an int in [-2**63, 2**64), taken modulo 2**64, or a 0-d int64
    tensor on `device`, which is returned unchanged; generator: draws the seed if `seed` is None; default: torch's
    default generator of the device. Both given: `ValueError`. Raises `RuntimeError` if backward could see other noise
    than forward: a custom generator in a forward that activation checkpointing recomputes, or a seed drawn in a graph
    whose operations torch.compile may recompute.

    Kernels read the seed from memory when they run, so that a captured CUDA graph draws a new one on each replay.
    """
    if seed is not None and generator is not None:
        checks.fail(ValueError, function, "generator", "be None where seed is given", "both")
    if isinstance(seed, Tensor):
        checks.tensor(function, "seed", seed, (torch.int64,))
        checks.shape(function, "seed", seed, (), "()")
        checks.same_device(function, "seed", seed, "the other tensors", device)
        return seed
    if seed is not None:
        if isinstance(seed, bool) or not isinstance(seed, (int, torch.SymInt)):
            checks.fail(TypeError, function, "seed", "be an int, a 0-d int64 tensor or None", type(seed).__name__)
        if not _INT64_MIN <= seed < 2**64:
            checks.fail(ValueError, function, "seed", "be in [-2**63, 2**64)", seed)
        return torch.full((), wrap_int64(seed), dtype=torch.int64, device=device)
    if generator is not None:
        if not isinstance(generator, torch.Generator):
            checks.fail(TypeError, function, "generator", "be a torch.Generator or None", type(generator).__name__)
        if generator.device.type != device.type:
            checks.fail(ValueError, function, "generator", f"be on {device}", generator.device)
        if in_backward() and not _is_default(generator):
            raise RuntimeError(
                f"{function}: a generator of one's own cannot draw in backward: activation checkpointing, which "
                "computes a forward again there, does not restore it, and the noise would be another; pass seed"
            )
    if torch.compiler.is_compiling() and torch.is_grad_enabled() and functorch.activation_memory_budget < 1:
        raise RuntimeError(
            f"{function}: with torch._functorch.config.activation_memory_budget < 1 torch.compile may draw another "
            "seed in backward (pytorch issue 190758); pass seed, as a tensor that is drawn outside"
        )
    return torch.randint(_INT64_MIN, _INT64_MAX, (), dtype=torch.int64, device=device, generator=generator)
