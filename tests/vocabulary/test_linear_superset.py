"""linear_cross_entropy is a superset of torch's: torch's samples, class probabilities, a learned scale, shift."""

from __future__ import annotations

import importlib.util
import sys
import types
import unittest

import pytest
import torch
import torch.nn.functional as F

import sslkernels as sk
from benchmarks import memory

pytestmark = pytest.mark.pairwise

OP = "linear_cross_entropy"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
torchs = pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="this torch has no linear_cross_entropy")


def as_double(value):
    return value.detach().double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def agrees_with_torch(got, input, linear_weight, target, *, grads, **kwargs):
    """Loss and gradients against torch's formula in float64, within the roundings of the dtype of the call."""
    kwargs = {name: as_double(value) for name, value in kwargs.items()}
    bias = kwargs.pop("linear_bias", None)
    if kwargs.get("ignore_index") is None:
        kwargs["ignore_index"] = -100
    leaves = {"input": as_double(input).requires_grad_(), "linear_weight": as_double(linear_weight).requires_grad_()}
    if bias is not None:
        leaves["linear_bias"] = bias.requires_grad_()
    target = as_double(target)
    if "target" in grads:
        leaves["target"] = target.requires_grad_()
    logits = F.linear(leaves["input"], leaves["linear_weight"].flatten(0, -2))
    logits = logits.unflatten(-1, linear_weight.shape[:-1]) if linear_weight.dim() > 2 else logits
    logits = logits if bias is None else logits + bias
    want = F.cross_entropy(logits, target, **kwargs)
    dtype = input.dtype
    tolerance = (
        {"rtol": 0, "atol": 0}
        if want.numel() == 0
        else {
            "rtol": 64 * torch.finfo(dtype).eps,
            "atol": 16 * torch.finfo(dtype).eps * float(want.detach().abs().nan_to_num().max() + 1),
        }
    )
    torch.testing.assert_close(got.double(), want, equal_nan=True, **tolerance)
    assert got.shape == want.shape
    g = torch.Generator().manual_seed(0)
    grad_output = torch.randn(want.shape, generator=g, dtype=torch.float64)
    wanted = torch.autograd.grad(want, [leaves[name] for name in grads], grad_output)
    found = torch.autograd.grad(got, list(grads.values()), grad_output.to(got))
    for name, have, truth in zip(grads, found, wanted, strict=True):
        scale = float(truth.abs().nan_to_num().max() + 1e-3)
        torch.testing.assert_close(
            have.double(), truth, rtol=0, atol=64 * torch.finfo(dtype).eps * scale, equal_nan=True, msg=name
        )


@pytest.fixture
def torchs_samples(monkeypatch):
    """torch's sample inputs import expecttest, whose TestCase nothing here runs."""
    if importlib.util.find_spec("expecttest") is None:
        stub = types.ModuleType("expecttest")
        stub.TestCase = unittest.TestCase
        monkeypatch.setitem(sys.modules, "expecttest", stub)


@pytest.mark.full_for(backend="reference")
@pytest.mark.full_for(variant=("chunked", "chunked_none"))
@pytest.mark.full_for(dtype=DTYPES[1:])
@torchs
@pytest.mark.usefixtures("torchs_samples")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow_for(backend="triton")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", ["", "chunked", "chunked_none"])
def test_sample_inputs_of_torchs_operator(backend, variant, dtype):
    from torch.testing._internal.common_methods_invocations import op_db

    (info,) = [i for i in op_db if i.name == "nn.functional.linear_cross_entropy" and i.variant_test_name == variant]
    count = 0
    for sample in info.sample_inputs("cpu", dtype, requires_grad=True):
        linear_weight, target = sample.args
        bias = sample.kwargs.get("linear_bias")
        tensors = {"input": sample.input, "linear_weight": linear_weight, "linear_bias": bias, "target": target}
        grads = {name: t for name, t in tensors.items() if t is not None and t.requires_grad}
        kwargs = {name: value for name, value in sample.kwargs.items() if name != "options"}
        got = sk.linear_cross_entropy(sample.input, linear_weight, target, **sample.kwargs)
        agrees_with_torch(got, sample.input, linear_weight, target, grads=grads, **kwargs)
        if target.is_floating_point() and linear_weight.dim() == 2:  # and without materialising the logits
            got = sk.linear_cross_entropy(sample.input, linear_weight, target.detach(), **sample.kwargs)
            grads.pop("target", None)
            agrees_with_torch(got, sample.input, linear_weight, target, grads=grads, **kwargs)
        count += 1
    assert count > 20


@pytest.mark.full_for(backend="reference")
@torchs
@pytest.mark.usefixtures("torchs_samples")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow_for(backend="triton")
@pytest.mark.full_for(dtype=torch.float64)
@pytest.mark.costly("a thousand samples, those that torch tests its own module with")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sample_inputs_of_torchs_module(backend, dtype):
    from torch.testing._internal.common_modules import module_db

    (info,) = [i for i in module_db if i.module_cls is torch.nn.LinearCrossEntropyLoss]
    count = 0
    for sample in info.module_inputs_func(info, "cpu", dtype, requires_grad=True, training=True):
        made, called = sample.constructor_input, sample.forward_input
        m = torch.nn.LinearCrossEntropyLoss(*made.args, **made.kwargs)
        input, target = called.args
        weight = m.linear.weight.reshape(m.num_classes, *m.out_features, input.shape[-1])
        bias = m.linear.bias
        bias = None if bias is None else bias.reshape(weight.shape[:-1])
        tensors = {"input": input, "linear_weight": weight, "linear_bias": bias}
        grads = {name: t for name, t in tensors.items() if t is not None}
        options = {name: getattr(m, name) for name in ("weight", "reduction", "ignore_index", "label_smoothing")}
        got = sk.linear_cross_entropy(input, weight, target, linear_bias=bias, options=m.options, **options)
        agrees_with_torch(got, input, weight, target, grads=grads, linear_bias=bias, **options)
        count += 1
    assert count > 500


def problem(dtype, rows=37, vocab=53, dim=19, *, spread=1.0, device="cpu"):
    g = torch.Generator().manual_seed(3)
    x = torch.randn(rows, dim, generator=g)
    w = spread * dim**-0.5 * torch.randn(vocab, dim, generator=g)
    b, p = torch.randn(vocab, generator=g), torch.randn(rows, vocab, generator=g).mul(2).softmax(1)
    return tuple(t.to(device, dtype) for t in (x, w, b, p))


def formula(x, w, p, *, bias, weight=None, token_weight=None, options):
    """The loss of class probabilities, written again."""
    options = {"logit_scale": 1.0, "label_smoothing": 0.0, "z_loss": 0.0, "softcap": None, **options}
    z = options["logit_scale"] * (x @ w.t()) + bias
    if options["softcap"] is not None:
        z = options["softcap"] * torch.tanh(z / options["softcap"])
    q = (1 - options["label_smoothing"]) * p + options["label_smoothing"] / p.shape[1]
    q = q if weight is None else q * weight
    loss = -(q * z.log_softmax(1)).sum(1) + options["z_loss"] * z.logsumexp(1).square()
    loss = loss if token_weight is None else loss * token_weight
    reduction = options.get("reduction", "mean")
    if reduction == "none":
        return loss
    divisor = options.get("num_items") or loss.numel()
    return loss.sum() if reduction == "sum" else loss.sum() / divisor


EVERY = {"label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 8.0, "logit_scale": 1.7}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", ["fast", "compact"])
@pytest.mark.parametrize(
    "options",
    [{}, {"reduction": "none"}, {"reduction": "sum"}, {"workspace_bytes": 1}, {"num_items": 5}, EVERY],
    ids=["plain", "none", "sum", "chunks", "num_items", "every"],
)
def test_class_probabilities(backend, options, mode, dtype, device):
    x, w, b, p = problem(dtype, spread=3.0, device=device)
    g = torch.Generator().manual_seed(1)
    extra = {}
    if options is EVERY:
        extra = {"weight": torch.rand(53, generator=g), "token_weight": torch.rand(37, generator=g)}
        extra = {name: t.to(device, dtype) for name, t in extra.items()}
    leaves = [t.requires_grad_() for t in (x, w, b)]
    got = sk.linear_cross_entropy(x, w, p, linear_bias=b, mode=mode, **options, **extra)
    extra = {name: t.double() for name, t in extra.items()}
    truths = [t.detach().double().requires_grad_() for t in leaves]
    want = formula(truths[0], truths[1], p.double(), bias=truths[2], **extra, options=options)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), want, rtol=16 * eps, atol=0)
    grad_output = torch.randn(want.shape, generator=g, dtype=torch.float64).to(device)
    found = torch.autograd.grad(got, leaves, grad_output.to(got))
    for have, truth in zip(found, torch.autograd.grad(want, truths, grad_output), strict=True):
        assert (have.double() - truth).norm() <= 8 * eps * truth.norm()


def test_a_confident_row_keeps_its_loss(backend, device):
    """As with class indices: the sum leaves the largest logit out."""
    w = torch.tensor([[30.0], [0.0], [5.0]], device=device)
    x, p = torch.ones(1, 1, device=device), torch.tensor([[1.0, 0.0, 0.0]], device=device)
    want = sk.linear_cross_entropy(x.double(), w.double(), torch.tensor([0], device=device)).item()
    assert sk.linear_cross_entropy(x, w, p).item() == pytest.approx(want, rel=1e-5)


def test_a_class_of_bias_minus_infinity_and_probability_zero(backend, device):
    x, w, b, p = problem(torch.float32, device=device)
    b[7], p[:, 7] = -torch.inf, 0
    kept = torch.arange(53, device=device) != 7
    leaves = [t.requires_grad_() for t in (x, w)]
    got = sk.linear_cross_entropy(x, w, p, linear_bias=b)
    want = F.cross_entropy(F.linear(x, w[kept], b[kept]), p[:, kept])
    torch.testing.assert_close(got, want)
    for have, truth in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), strict=True):
        torch.testing.assert_close(have, truth)
    p[0, 7] = 0.5
    assert sk.linear_cross_entropy(x, w, p, linear_bias=b).item() == torch.inf


def test_no_rows_of_class_probabilities(backend, device):
    x, w, _, p = problem(torch.float32, device=device)
    x, p = x[:0], p[:0]
    w.requires_grad_()
    assert sk.linear_cross_entropy(x, w, p).isnan()
    loss = sk.linear_cross_entropy(x, w, p, on_empty="zero")
    assert loss.item() == 0
    assert not torch.autograd.grad(loss, w)[0].any()


def test_leading_dimensions_and_half_probabilities(backend, device):
    x, w, _, p = problem(torch.float32, 24, device=device)
    got = sk.linear_cross_entropy(x.view(2, 3, 4, -1), w, p.view(2, 3, 4, -1).half(), reduction="none")
    want = F.cross_entropy(x @ w.t(), p.half().float(), reduction="none")
    torch.testing.assert_close(got, want.view(2, 3, 4))


@pytest.mark.parametrize("mode", ["fast", "compact"])
def test_class_probabilities_are_the_only_matrix_of_their_size(mode):
    rows, vocab, dim = 256, 16384, 64
    x, w, _, p = problem(torch.float32, rows, vocab, dim)
    x.requires_grad_(), w.requires_grad_()

    def step():
        loss = sk.linear_cross_entropy(x, w, p, mode=mode, workspace_bytes=1 << 20)
        return torch.autograd.grad(loss, (x, w))

    with sk.use_backend("cpu"):
        step()
        gradients = 4 * (x.numel() + w.numel())
        peak, _ = memory.peak_extra(step, torch.device("cpu"))
        assert peak is not None
        assert peak <= gradients + (8 << 20) < p.numel() * 4


def test_arguments_without_a_meaning_are_errors(device):
    x, w, _, p = problem(torch.float32, device=device)
    index = p.argmax(1)
    cube = w.reshape(53, 1, 19)
    for target, weight, options, message in (
        (p, w, {"ignore_index": 3}, "ignore_index must be negative with class probabilities; got 3"),
        (p, w, {"return_stats": True}, "return_stats must be False with class probabilities"),
        (p, w, {"capacity": 3}, "capacity must be None with class probabilities"),
        (p, w, {"shift": 1}, "shift must be 0 with class probabilities"),
        (index[:, None], cube, {"shift": 1}, "shift must be 0 with class probabilities, K-dimensional"),
        (index[:, None], cube, {"mode": "compact"}, "mode must not be given for K-dimensional weights"),
        (index[:, None], cube, {"workspace_bytes": 9}, "workspace_bytes must not be given for K-dimensional"),
        (index, w, {"shift": -1}, "shift must be at least 0; got -1"),
        (index, w, {"logit_scale": torch.ones(2, device=device)}, "logit_scale must be a number or a tensor of one"),
        (index, w, {"on_empty": "one"}, "on_empty must be 'nan' or 'zero'"),
        (index[:5], w, {}, r"target must have shape input.shape\[:-1\] = "),
        (p[:5], w, {}, r"target \(class probabilities\) must have shape"),
    ):
        with pytest.raises(ValueError, match=f"linear_cross_entropy: {message}"):
            sk.linear_cross_entropy(x, weight, target, **options)
    with pytest.raises(TypeError, match=r"options must be a torch\.nn\.LinearCrossEntropyOptions or None; got int"):
        sk.linear_cross_entropy(x, w, index, options=3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("scale", [1.7, 0.0])
def test_a_learned_scale(backend, scale, shape, dtype, device):
    x, w, b, p = problem(dtype, device=device)
    x[3] = torch.nan  # an ignored row may hold anything
    target = p.argmax(1)
    target[3] = -100
    s = torch.full(shape, scale, device=device)
    kept = target != -100
    leaves = [t.requires_grad_() for t in (x, w, s)]
    got = sk.linear_cross_entropy(x, w, target, linear_bias=b, logit_scale=s, softcap=9.0)
    truths = [t.detach().double().requires_grad_() for t in (x[kept], w, s)]
    z = truths[2] * (truths[0] @ truths[1].t()) + b.double()
    want = F.cross_entropy(9 * torch.tanh(z / 9), target[kept])
    eps = max(torch.finfo(dtype).eps, 1e-6) if dtype != torch.float64 else 1e-6  # the scale is float32
    torch.testing.assert_close(got.double(), want, rtol=4 * eps, atol=0)
    found = torch.autograd.grad(got, leaves)
    assert found[2].dtype == s.dtype
    found = (found[0][kept], *found[1:])
    for have, truth in zip(found, torch.autograd.grad(want, truths), strict=True):
        assert (have.double() - truth).norm() <= 8 * eps * truth.norm()


@pytest.mark.parametrize("shift", [1, 3, 9])
def test_shift(backend, shift, device):
    x, w, _, p = problem(torch.float64, 24, device=device)
    x = x.view(4, 6, -1).requires_grad_()
    target = p.argmax(1).view(4, 6)
    target[1, 4] = -100
    tokens = torch.rand(4, 6, dtype=torch.float64, device=device)
    later = torch.full_like(target, -100)
    later[:, : max(6 - shift, 0)] = target[:, shift:]
    for options in ({"reduction": "none"}, {"on_empty": "zero"}, {"token_weight": tokens, "reduction": "sum"}):
        got, stats = sk.linear_cross_entropy(x, w, target, shift=shift, return_stats=True, **options)
        want, want_stats = sk.linear_cross_entropy(x, w, later, return_stats=True, **options)
        assert torch.equal(got, want)
        assert all(torch.equal(a, b) for a, b in zip(stats, want_stats, strict=True))
        assert torch.equal(*(torch.autograd.grad(loss.sum(), x)[0] for loss in (got, want)))


@pytest.mark.parametrize("vocab_first", [True, False])
def test_k_dimensional_with_every_option(backend, vocab_first, device):
    x, w, b, p = problem(torch.float64, 6, 30, 5, device=device)
    w, b = w.reshape(10, 3, 5), b.reshape(10, 3)
    target = torch.randint(0, 10, (6, 3), device=device)
    if vocab_first:
        target = p.reshape(6, 10, 3)
    tokens = torch.rand(6, 3, dtype=torch.float64, device=device)
    leaves = [t.requires_grad_() for t in (x, w, b)]
    got = sk.linear_cross_entropy(x, w, target, linear_bias=b, token_weight=tokens, num_items=7, **EVERY)
    parts = []
    for k in range(3):
        y = target[..., k]
        rows = {"linear_bias": b[:, k], "token_weight": tokens[:, k], "num_items": 7, **EVERY}
        parts.append(sk.linear_cross_entropy(x, w[:, k], y, **rows))
    want = torch.stack(parts).sum()
    torch.testing.assert_close(got, want)
    for have, truth in zip(*(torch.autograd.grad(loss, leaves) for loss in (got, want)), strict=True):
        torch.testing.assert_close(have, truth)


def test_compile(device):
    x, w, b, p = problem(torch.float32, device=device)
    s = torch.tensor(1.3, device=device)
    leaves = [t.requires_grad_() for t in (x, w, b, s)]

    def loss(x, w, b, s):
        first = sk.linear_cross_entropy(x, w, p, linear_bias=b)
        return first + sk.linear_cross_entropy(x, w, p.argmax(1), logit_scale=s, shift=1, on_empty="zero")

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got, want = compiled(*leaves), loss(*leaves)
    torch.testing.assert_close(got, want)
    for have, truth in zip(*(torch.autograd.grad(part, leaves) for part in (got, want)), strict=True):
        torch.testing.assert_close(have, truth)
