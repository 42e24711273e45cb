"""torch.compile, export, checkpointing, torch.func, autocast, and the registration of the raw operators."""

from __future__ import annotations

import os

import oracle
import pytest
import torch
from public_calls import CALLS, differentiable
from torch.utils.checkpoint import checkpoint

import sslkernels as sk
from sslkernels.core.scale import scale_gradient, scale_gradient_
from sslkernels.vocabulary.cross_entropy import cross_entropy_bwd, cross_entropy_fwd
from sslkernels.vocabulary.linear_operators import linear_cross_entropy_bwd, linear_cross_entropy_fwd
from sslkernels.vocabulary.linear_records import Operands, PlanOptions, Wanted
from sslkernels.vocabulary.softmax_rows import RowOptions

pytestmark = pytest.mark.pairwise

OP = "linear_cross_entropy"
MODES = ("fast", "compact")


@pytest.fixture
def tensors(device):
    x = torch.randn(13, 7, device=device, requires_grad=True)
    w = torch.randn(31, 7, device=device, requires_grad=True)
    b = torch.randn(31, device=device, requires_grad=True)
    target = torch.randint(0, 31, (13,), device=device)
    target[3] = -100
    return x, w, b, target


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()


@pytest.mark.full_for(backend=("triton", "reference"))
@pytest.mark.full_for(dynamic=False)
@pytest.mark.full_for(mode="compact")
@pytest.mark.costly("the compiler")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_equals_eager(backend, mode, dynamic, tensors, compiler):
    def step(x, w, b, target):
        options = {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 5.0, "mode": mode, "return_stats": True}
        loss, stats = sk.linear_cross_entropy(2 * x, w, target, linear_bias=b, **options)
        return 3 * loss + sk.cross_entropy(x @ w.t(), target), stats.lse

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend=compiler)
    for rows in (13, 9):
        x, w, b, target = tensors
        x, target = x[:rows].detach().requires_grad_(), target[:rows]
        loss, lse = compiled(x, w, b, target)
        expected_loss, expected_lse = step(x, w, b, target)
        torch.testing.assert_close(loss, expected_loss)
        torch.testing.assert_close(lse, expected_lse)
        got = torch.autograd.grad(loss, (x, w, b))
        for a, e in zip(got, torch.autograd.grad(expected_loss, (x, w, b)), strict=True):
            torch.testing.assert_close(a, e)


def test_a_first_call_may_be_compiled(monkeypatch, tensors):
    """How a backend is chosen is not traced, even before a call has chosen one."""
    x, w, _, target = tensors
    for operator in (cross_entropy_fwd, linear_cross_entropy_fwd):
        monkeypatch.setattr(operator.implementations, "_chosen", {})
    for function in (lambda: sk.cross_entropy(x @ w.t(), target), lambda: sk.linear_cross_entropy(x, w, target)):
        torch.compile(function, fullgraph=True, backend="eager")().backward()


def test_the_backend_of_a_compiled_graph_can_change(tensors, compiler):
    x, w, _, target = tensors
    compiled = torch.compile(sk.linear_cross_entropy, fullgraph=True, backend=compiler)
    losses = []
    for name in sk.available_backends(OP, x.device):
        with sk.use_backend(name):
            losses.append(compiled(x, w, target))
    for loss in losses[1:]:
        torch.testing.assert_close(loss, losses[0])


def test_export(tensors):
    class Head(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(tensors[1].detach().clone())

        def forward(self, x, target):
            return sk.linear_cross_entropy(x, self.weight, target, reduction="none")

    head = Head()
    x, target = tensors[0].detach(), tensors[3]
    exported = torch.export.export(head, (x, target)).module()
    torch.testing.assert_close(exported(x, target), head(x, target))


EXPORTED = [(name, False) for name in CALLS if "-" not in name] + [("clip_loss", True), ("gumbel_quantize", True)]


@pytest.mark.parametrize(("name", "strict"), EXPORTED)
def test_training_an_exported_graph_raises(name, strict, device):
    """An exported graph holds raw operators and what surrounds them, whose gradients would be None or in part."""

    class Module(torch.nn.Module):
        def forward(self, *leaves):
            return CALLS[name].run(*leaves)

    leaves = CALLS[name].leaves(device)
    exported = torch.export.export(Module(), tuple(leaves), strict=strict)
    results = exported.module()(*leaves)
    for got, expected in zip(differentiable(results), differentiable(CALLS[name].run(*leaves)), strict=False):
        torch.testing.assert_close(got, expected)
    for result in differentiable(results):
        if result.grad_fn is not None:
            with pytest.raises(RuntimeError, match=r"the graph was exported|the graph holds the raw operator"):
                (result.sum() + sum(leaf.square().sum() for leaf in leaves)).backward(retain_graph=True)


def test_training_an_exported_residual_quantizer_raises():
    """Its values pass through no raw operator."""
    quantizer = sk.nn.ResidualVectorQuantizer(2, 8, 4)
    x = torch.randn(16, 4, requires_grad=True)
    quantizer(x)
    exported = torch.export.export(quantizer.eval(), (x,)).module()
    with pytest.raises(RuntimeError, match="the graph was exported"):
        exported(x).values.sum().backward()


@pytest.mark.full_for(backend="triton")
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_checkpoint(backend, mode, use_reentrant, tensors):
    x, w, b, target = tensors

    def head(x, w, b):
        return sk.linear_cross_entropy(x.tanh(), w, target, linear_bias=b, mode=mode)

    got = torch.autograd.grad(head(x, w, b), (x, w, b))
    for leaf in (x, w, b):
        leaf.grad = None
    checkpoint(head, x, w, b, use_reentrant=use_reentrant).backward()
    for leaf, grad in zip((x, w, b), got, strict=True):
        torch.testing.assert_close(leaf.grad, grad)


@pytest.mark.parametrize("mode", MODES)
def test_functional_transforms(mode, tensors):
    x, w, b, target = (t.detach() for t in tensors)

    def loss(x, w, target):
        return sk.linear_cross_entropy(x, w, target, linear_bias=b, mode=mode)

    def truth(x, w, target):
        return oracle.linear_cross_entropy(x, w, target, linear_bias=b)

    grads = torch.func.grad(loss, argnums=(0, 1))(x, w, target)
    for a, e in zip(grads, torch.func.grad(truth, argnums=(0, 1))(x, w, target), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-6)
    valid = target != -100
    per_sample = torch.func.vmap(torch.func.grad(loss, argnums=1), in_dims=(0, None, 0))
    per_sample_truth = torch.func.vmap(torch.func.grad(truth, argnums=1), in_dims=(0, None, 0))
    args = (x[valid].unsqueeze(1), w, target[valid].unsqueeze(1))
    torch.testing.assert_close(per_sample(*args), per_sample_truth(*args), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", MODES)
def test_autocast_takes_any_mix_of_dtypes(mode, dtype, device):
    if torch.float16 == dtype and device == "cpu" and not torch.amp.autocast_mode.is_autocast_available("cpu"):
        pytest.skip("no float16 autocast on this CPU")
    torch.manual_seed(0)
    target = torch.randint(0, 31, (13,), device=device)
    for x_dtype in (torch.float32, dtype):
        for w_dtype in (torch.float32, dtype):
            x = torch.randn(13, 7, device=device).to(x_dtype).requires_grad_()
            w = torch.randn(31, 7, device=device).to(w_dtype).requires_grad_()
            b = torch.randn(31, device=device, requires_grad=True)
            with torch.autocast(device, dtype):
                loss = sk.linear_cross_entropy(x, w, target, linear_bias=b, mode=mode)
                row_loss = sk.cross_entropy(torch.nn.functional.linear(x, w, b.to(w_dtype)), target)
            assert loss.dtype == row_loss.dtype == torch.float32
            grads = torch.autograd.grad(loss, (x, w, b))
            assert [g.dtype for g in grads] == [x_dtype, w_dtype, torch.float32]
            leaves = [t.detach().to(dtype).double().requires_grad_() for t in (x, w)]
            truth = oracle.linear_cross_entropy(*leaves, target, linear_bias=b.double())
            assert oracle.error(loss, truth) < torch.finfo(dtype).eps
            for got, true in zip(grads, torch.autograd.grad(truth, leaves), strict=False):
                assert oracle.error(got, true) < 2 * torch.finfo(dtype).eps


def test_compile_under_autocast(tensors, compiler):
    x, w, b, target = tensors

    def step(x, w, b):
        with torch.autocast(x.device.type, torch.bfloat16):
            return sk.linear_cross_entropy(x, w, target, linear_bias=b)

    got = torch.autograd.grad(torch.compile(step, fullgraph=True, backend=compiler)(x, w, b), (x, w, b))
    for a, e in zip(got, torch.autograd.grad(step(x, w, b), (x, w, b)), strict=True):
        torch.testing.assert_close(a, e)


def raw_calls(tensors):
    x, w, b, target = (t.detach() for t in tensors)
    logits = (x @ w.t()).contiguous()
    class_weight = torch.rand(31, device=x.device)
    options = RowOptions(-100, 0.1, 1e-3, 5.0, 1.5)
    outputs, _ = cross_entropy_fwd(logits, target, class_weight, None, options, True)
    state = outputs.state
    scale = state.row_max.sum()
    grad = torch.randn(13, device=x.device)
    operands = Operands(x, w, b, target, class_weight)
    plan = PlanOptions(torch.float32, 12, 4096)
    wanted = Wanted(True, True, True)
    return {
        "cross_entropy_fwd": (cross_entropy_fwd, (logits, target, class_weight, None, options, True)),
        "cross_entropy_bwd": (cross_entropy_bwd, (grad, logits, target, class_weight, state, options)),
        "linear_cross_entropy_fwd": (
            linear_cross_entropy_fwd,
            (operands, grad, options, plan, wanted, True),
        ),
        "linear_cross_entropy_bwd": (
            linear_cross_entropy_bwd,
            (grad, operands, state, options, plan, wanted),
        ),
        "cross_entropy_fwd with a gradient": (cross_entropy_fwd, (logits, target, class_weight, grad, options, True)),
        "scale_gradient": (scale_gradient, (w, scale, torch.bfloat16)),
        "scale_gradient_": (scale_gradient_, (w.clone(), scale)),
    }


@pytest.mark.full_for(backend="triton")
@pytest.mark.parametrize(
    "name",
    [
        "cross_entropy_fwd",
        "cross_entropy_bwd",
        "linear_cross_entropy_fwd",
        "linear_cross_entropy_bwd",
        "cross_entropy_fwd with a gradient",
        "scale_gradient",
        "scale_gradient_",
    ],
)
def test_opcheck(backend, name, tensors):
    operator, args = raw_calls(tensors)[name]
    torch.library.opcheck(operator.raw, tuple(operator.inputs.pack(args)))


@pytest.mark.full_for(backend="triton")
@pytest.mark.parametrize("mode", MODES)
def test_bitwise_equal_from_run_to_run(backend, mode, device):
    rows = 9 if os.environ.get("TRITON_INTERPRET") == "1" and backend == "triton" else 301
    x = torch.randn(rows, 33, device=device, requires_grad=True)
    w = torch.randn(1001, 33, device=device, requires_grad=True)
    target = torch.randint(0, 1001, (rows,), device=device)
    first = torch.autograd.grad(sk.linear_cross_entropy(x, w, target, mode=mode), (x, w))
    for _ in range(3):
        again = torch.autograd.grad(sk.linear_cross_entropy(x, w, target, mode=mode), (x, w))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
