"""The gradient that reaches an op: in any layout it gives the same bits, and if it is expanded it is never stored."""

from __future__ import annotations

import pytest
import torch
from cases import BACKENDS
from public_calls import CALLS, differentiable
from torch.utils._python_dispatch import TorchDispatchMode

import sslkernels as sk
from sslkernels.core import backends
from sslkernels.core.scale import scaled

COPIES = ("aten::clone", "aten::contiguous", "aten::_to_copy", "aten::copy_")


def layouts(shape):
    """Gradients that are not contiguous, by name."""
    yield "expanded", torch.randn(()).expand(shape)
    if len(shape) > 1:
        yield "one row", torch.randn(shape[-1]).expand(shape)
        yield "one column", torch.randn(*shape[:-1], 1).expand(shape)
        yield "transposed", torch.randn(shape[::-1]).permute(*range(len(shape))[::-1])
    if len(shape) > 0:
        yield "every other", torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2]


@pytest.mark.full_for(backend_name="triton")
@pytest.mark.parametrize("name", [name for name in CALLS if name != "gumbel_quantize-soft"])  # torch's matmuls
@pytest.mark.parametrize("backend_name", BACKENDS)
def test_layouts_agree(backend_name, name, device):
    call = CALLS[name]
    if backend_name not in sk.available_backends(call.op, device):
        pytest.skip(str(backends.why_not(call.op, backend_name, torch.device(device))))
    leaves = call.leaves(device)
    with sk.use_backend(backend_name):
        outputs = differentiable(call.run(*leaves))
        assert outputs
        for output in outputs:
            for layout, grad in layouts(output.shape):
                grad = grad.to(output)
                got, want = (
                    torch.autograd.grad(output, leaves, g, retain_graph=True, allow_unused=True)
                    for g in (grad, grad.clone(memory_format=torch.contiguous_format))
                )
                for a, e in zip(got, want, strict=True):
                    a, e = (g.to_dense() if g is not None and g.is_sparse else g for g in (a, e))
                    assert (a is None and e is None) or torch.equal(a, e), layout


class Copies(TorchDispatchMode):
    """Records the largest tensor that is copied."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function._schema.name in COPIES:
            self.largest = max(self.largest, result.numel())
        return result


@pytest.mark.parametrize(
    "name", ["gaussian_rsample", "gaussian_rsample-samples", "gaussian_rsample-elements", "gumbel_softmax",
             "vector_quantize-gather"]
)  # fmt: skip
def test_an_expanded_gradient_is_not_stored(name):
    call = CALLS[name]
    if "cpu" not in sk.available_backends(call.op, "cpu"):
        pytest.skip("the extension is not built")
    leaves = call.leaves("cpu")
    with sk.use_backend("cpu"):
        for output in differentiable(call.run(*leaves)):
            grad = torch.ones(()).expand(output.shape)
            with Copies() as copies:
                torch.autograd.grad(output, leaves, grad, retain_graph=True, allow_unused=True)
            assert copies.largest < output.numel() or output.dim() < 2


@pytest.mark.parametrize("name", CALLS)
def test_a_batch_of_gradients_is_the_gradients_one_by_one(name, device):
    """Also at the last use of the graph, where a gradient that a forward keeps may be scaled in place."""
    call = CALLS[name]
    leaves = call.leaves(device)
    outputs = [output for output in differentiable(call.run(*leaves)) if output.numel()]
    for i, output in enumerate(outputs):
        batch = torch.randn(3, *output.shape).to(output)
        want = [torch.autograd.grad(output, leaves, g, retain_graph=True, allow_unused=True) for g in batch]
        if any(g is not None and g.is_sparse for g in want[0]):
            pytest.skip("vmap has no sparse tensors")
        last = i == len(outputs) - 1
        got = torch.autograd.grad(
            output, leaves, batch, is_grads_batched=True, retain_graph=not last, allow_unused=True
        )
        for a, *e in zip(got, *want, strict=True):
            assert (a is None and e[0] is None) or torch.allclose(a, torch.stack(e), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_a_kept_gradient_of_another_dtype_is_converted_once(dtype, factor, device):
    gradient = torch.randn(3, 5, device=device)
    kept, scale = gradient.clone(), torch.tensor(factor, device=device)
    result = scaled(gradient, scale, dtype)
    assert result.dtype == dtype
    assert torch.equal(result, (kept * scale).to(dtype))
    assert torch.equal(gradient, kept) == (dtype != torch.float32 or factor == 1)
