"""cross_entropy against torch's, and regimes in which eager torch or other fused losses fail."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
from cases import Case, Tensors, error_is_at_most_that_of_eager, shapes_without_data

import sslkernels as sk
from benchmarks import memory

pytestmark = pytest.mark.pairwise

OP = "cross_entropy"


def make(
    g: torch.Generator,
    rows: int,
    vocab: int,
    *,
    ignore_index: int,
    ignored: float = 0.3,
    spread: float = 1.0,
    class_weight: bool = False,
    int32: bool = False,
) -> tuple[Tensors, Tensors]:
    target = torch.randint(0, vocab, (rows,), generator=g)
    target[torch.rand(rows, generator=g) < ignored] = ignore_index
    constant = {"target": target.to(torch.int32 if int32 else torch.int64)}
    if class_weight:
        constant["weight"] = torch.rand(vocab, generator=g)
    return {"input": spread * torch.randn(rows, vocab, generator=g)}, constant


def case(name: str, rows: int, vocab: int, *, options: dict | None = None, **tensors) -> Case:
    options = options or {}
    tensors["ignore_index"] = options.get("ignore_index", -100)
    return Case(OP, name, make, (rows, vocab), tensors, options)


def cases() -> Iterator[Case]:
    yield case("plain", 37, 53)
    yield case("no_rows_ignored", 16, 128, ignored=0.0)
    yield case("one_row", 1, 257, ignored=0.0)
    yield case("one_class", 5, 1)
    yield case("two_classes", 9, 2)
    yield case("several_blocks", 3, 5003, ignored=0.0)
    yield case("peaked", 33, 301, spread=12.0)
    yield case("sum", 21, 77, options={"reduction": "sum"})
    yield case("none", 21, 77, options={"reduction": "none"})
    yield case("weight", 21, 77, class_weight=True)
    yield case("smoothing", 21, 77, options={"label_smoothing": 0.1})
    yield case("smoothing_weight", 21, 77, class_weight=True, options={"label_smoothing": 0.3})
    yield case("smoothing_only", 21, 77, options={"label_smoothing": 1.0})
    yield case("z_loss", 21, 77, options={"z_loss": 1e-2})
    yield case("softcap", 21, 77, spread=10.0, options={"softcap": 5.0})
    yield case("int32_ignore_7", 40, 11, int32=True, options={"ignore_index": 7})
    everything = {"label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 8.0}
    yield case("everything", 29, 131, spread=4.0, class_weight=True, options=everything)
    yield case("everything_none", 29, 131, class_weight=True, options={**everything, "reduction": "none"})


CASES = list(cases())
test_error_is_at_most_that_of_eager = error_is_at_most_that_of_eager(CASES)
test_shapes_without_data = shapes_without_data(CASES)


@pytest.mark.parametrize(
    ("shape", "target_shape"),
    [((5,), ()), ((4, 5), (4,)), ((2, 5, 3), (2, 3)), ((2, 5, 3, 4), (2, 3, 4)), ((2, 5, 0), (2, 0))],
)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_shapes_of_torch(backend, shape, target_shape, reduction, device):
    x = torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True)
    target = torch.randint(0, 5, target_shape, device=device)
    weight = torch.rand(5, dtype=torch.float64, device=device)
    options = {"reduction": reduction, "label_smoothing": 0.2, "ignore_index": 3}
    got, want = sk.cross_entropy(x, target, weight, **options), F.cross_entropy(x, target, weight, **options)
    torch.testing.assert_close(got, want, equal_nan=True)
    grad_output = torch.randn_like(want)
    got_grad, want_grad = (torch.autograd.grad(loss, x, grad_output)[0] for loss in (got, want))
    torch.testing.assert_close(got_grad, want_grad, equal_nan=True)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 5, 3)])
def test_class_probabilities(shape, reduction, device):
    x = torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True)
    class_dim = 1 if len(shape) > 1 else 0
    target = torch.rand(shape, dtype=torch.float64, device=device).softmax(class_dim)
    weight = torch.rand(5, dtype=torch.float64, device=device)
    options = {"reduction": reduction, "label_smoothing": 0.2}
    got, want = sk.cross_entropy(x, target, weight, **options), F.cross_entropy(x, target, weight, **options)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(loss.sum(), x)[0] for loss in (got, want)))


def test_class_dimension_last(backend, device):
    logits, target = torch.randn(2, 3, 7, device=device), torch.randint(0, 7, (2, 3), device=device)
    got, stats = sk.cross_entropy(logits, target, reduction="none", return_stats=True)
    want = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").reshape(2, 3)
    torch.testing.assert_close(got, want)
    assert all(part.shape == target.shape for part in stats)


def test_one_hot_probabilities_equal_indices(backend, device):
    logits, target = torch.randn(6, 7, device=device), torch.randint(0, 7, (6,), device=device)
    one_hot = F.one_hot(target, 7).float()
    options = {"z_loss": 0.1, "softcap": 3.0, "label_smoothing": 0.1}
    torch.testing.assert_close(
        sk.cross_entropy(logits, one_hot, **options), sk.cross_entropy(logits, target, **options)
    )


def linear(logits: torch.Tensor) -> dict[str, torch.Tensor]:
    """Arguments of linear_cross_entropy that give these logits: the projection is the identity."""
    return {"input": logits, "linear_weight": torch.eye(logits.shape[1], dtype=logits.dtype, device=logits.device)}


def both(logits, target, **options):
    """Per-row losses and their gradient, from logits and through a projection in both modes."""
    results = []
    for function, leaf in (
        (lambda x: sk.cross_entropy(x, target, reduction="none", **options), logits),
        (lambda x: sk.linear_cross_entropy(**linear(x), target=target, reduction="none", **options), logits),
    ):
        leaf = leaf.detach().requires_grad_()
        loss = function(leaf)
        results.append((loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]))
    leaf = logits.detach().requires_grad_()
    loss = sk.linear_cross_entropy(**linear(leaf), target=target, reduction="sum", mode="fast", **options)
    results.append((loss.detach(), torch.autograd.grad(loss, leaf)[0]))
    return results


@pytest.mark.parametrize("lead", [10.0, 20.0, 30.0, 60.0])
def test_confident_target_keeps_loss_and_gradient(backend, lead, device):
    logits = torch.randn(4, 301, device=device)
    target = torch.randint(0, 301, (4,), device=device)
    logits[torch.arange(4), target] = logits.amax(1) + lead
    leaf = logits.double().requires_grad_()
    # Here even a float64 log-softmax loses the loss: sum the terms.
    others = (leaf - leaf.gather(1, target[:, None])).exp().scatter(1, target[:, None], 0).sum(1)
    truth = torch.log1p(others)
    (true_grad,) = torch.autograd.grad(truth.sum(), leaf)
    for loss, grad in both(logits, target):
        expected = truth if loss.dim() else truth.sum()
        assert ((loss.double() - expected) / expected).abs().max() < 1e-5
        at_target = grad.double().gather(1, target[:, None]).squeeze(1)
        true_at_target = true_grad.gather(1, target[:, None]).squeeze(1)
        assert ((at_target - true_at_target) / true_at_target).abs().max() < 1e-5
        assert ((grad.double() - true_grad).norm() / true_grad.norm()) < 1e-5


@pytest.mark.parametrize("offset", [-1e4, 1e4])
def test_a_common_offset_of_the_logits_changes_nothing(backend, offset, device):
    # Logits on a grid that float32 represents exactly after adding the offset.
    logits = (torch.randn(5, 77, device=device) * 64).round() / 64
    target = torch.randint(0, 77, (5,), device=device)
    for near, far in zip(both(logits, target), both(logits + offset, target), strict=True):
        for a, b in zip(near, far, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_minus_infinity_is_probability_zero(backend, device):
    logits = torch.randn(6, 33, device=device)
    logits[:, 5] = -torch.inf
    logits[2, 10:] = -torch.inf
    target = torch.tensor([0, 1, 2, 3, 4, 5], device=device)
    leaf = logits.clone().requires_grad_()
    loss, stats = sk.cross_entropy(leaf, target, reduction="none", return_stats=True)
    truth = F.cross_entropy(logits.double(), target, reduction="none")
    assert truth[5].isinf()
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-6)
    (grad,) = torch.autograd.grad(loss[:5].sum(), leaf)
    assert torch.equal(grad[:5, 5], torch.zeros(5, device=device))
    p = logits.double().softmax(1)
    torch.testing.assert_close(stats.entropy.double(), torch.special.entr(p).sum(1), rtol=1e-5, atol=1e-6)


@pytest.mark.slow_for(backend="triton")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_masked_by_the_lowest_number(backend, dtype, device):
    """Running sums before a larger logit underflow, and their moment with them."""
    logits = torch.randn(5, 10001, device=device).to(dtype)
    logits[:, :6000] = torch.finfo(dtype).min
    target = torch.arange(7000, 7005, device=device)
    loss, stats = sk.cross_entropy(logits, target, reduction="none", return_stats=True)
    expected = torch.distributions.Categorical(logits=logits[:, 6000:].double())
    torch.testing.assert_close(stats.entropy.double(), expected.entropy(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss.double(), -expected.log_prob(target - 6000), rtol=1e-5, atol=1e-5)
    weight = torch.ones(10001, 1, device=device)
    bias = torch.where(torch.arange(10001, device=device) < 6000, torch.finfo(torch.float32).min, 0.0)
    with torch.no_grad():
        _, stats = sk.linear_cross_entropy(
            torch.zeros(5, 1, device=device), weight, target, linear_bias=bias, return_stats=True
        )
    torch.testing.assert_close(stats.entropy, torch.full((5,), 4001.0, device=device).log())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_rows_do_not_affect_others(backend, value, device):
    logits = torch.randn(5, 33, device=device)
    logits[2, 7] = value
    target = torch.randint(8, 33, (5,), device=device)
    clean = logits.clone()
    clean[2, 7] = 0
    leaf = logits.clone().requires_grad_()
    loss = sk.cross_entropy(leaf, target, reduction="none")
    (grad,) = torch.autograd.grad(loss.sum(), leaf)
    others = torch.tensor([0, 1, 3, 4], device=device)
    assert loss[2].isnan()
    assert grad[2].isnan().any()
    clean_leaf = clean.clone().requires_grad_()
    clean_loss = sk.cross_entropy(clean_leaf, target, reduction="none")
    assert torch.equal(loss[others], clean_loss[others])
    assert torch.equal(grad[others], torch.autograd.grad(clean_loss.sum(), clean_leaf)[0][others])


def test_zero_softmax_mass_at_the_target(backend, device):
    """The target is 200 nats below the maximum: the loss is the distance, the gradient at the target -1."""
    logits = torch.zeros(2, 9, device=device)
    logits[:, 3] = 200.0
    target = torch.tensor([0, 3], device=device)
    for loss, grad in both(logits, target):
        if loss.dim():
            torch.testing.assert_close(loss, torch.tensor([200.0, 0.0], device=device))
        assert grad[0, 0] == -1
        assert grad[0, 3] == 1


def statistics_truth(logits, target):
    z = logits.double()
    p = z.softmax(1)
    prediction = z.argmax(1)
    logprob = z.log_softmax(1).gather(1, target.clamp_min(0)[:, None]).squeeze(1)
    return z.logsumexp(1), logprob, prediction, prediction == target, torch.special.entr(p).sum(1)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_statistics(backend, requires_grad, device):
    logits = 3 * torch.randn(11, 5003 if backend == "cpu" else 203, device=device)
    logits[0, 7] = logits[0, 9] = 50.0  # a tie: the lowest index
    logits[1, 7] = logits[1, -1] = 50.0  # the same between blocks of a row
    target = torch.randint(0, 203, (11,), device=device)
    target[:3] = logits.argmax(1)[:3]
    target[5] = -100
    valid = target != -100
    truth = statistics_truth(logits, target)
    weight = torch.randn_like(logits, requires_grad=requires_grad)
    calls = [sk.cross_entropy(logits.clone().requires_grad_(requires_grad), target, return_stats=True)[1]]
    x = torch.eye(11, device=device)
    for mode in ("fast", "compact"):
        weight = logits.t().contiguous().requires_grad_(requires_grad)
        calls.append(sk.linear_cross_entropy(x, weight, target, mode=mode, return_stats=True)[1])
    for stats in calls:
        assert stats.prediction[0] == 7
        assert stats.correct[valid].sum() == truth[3][valid].sum() >= 3
        for got, want in zip(stats, truth, strict=True):
            torch.testing.assert_close(got[valid].to(want.dtype), want[valid], rtol=1e-5, atol=1e-5)
        assert [float(part[5]) for part in stats] == [0.0, 0.0, -1.0, 0.0, 0.0]


def test_statistics_are_of_the_capped_and_scaled_logits(backend, device):
    x, w = torch.randn(6, 5, device=device), torch.randn(31, 5, device=device)
    b, target = torch.randn(31, device=device), torch.randint(0, 31, (6,), device=device)
    options = {"linear_bias": b, "logit_scale": 3.0, "softcap": 4.0, "return_stats": True}
    _, stats = sk.linear_cross_entropy(x, w, target, **options)
    z = 4.0 * torch.tanh((3.0 * (x.double() @ w.double().t()) + b) / 4.0)
    for got, want in zip(stats, statistics_truth(z, target), strict=True):
        torch.testing.assert_close(got.to(want.dtype), want, rtol=1e-5, atol=1e-5)


@pytest.mark.full_for(backend="reference")
@pytest.mark.slow_for(backend="triton")
@pytest.mark.parametrize("scale", [1.0, 65536.0])
def test_half_precision_gradients_at_a_large_batch(backend, scale, device):
    """1/N and the loss scale are not applied to the half-precision tile: it neither under- nor overflows."""
    rows, vocab, dim = (65536, 40, 8) if backend != "triton" or device == "cuda" else (512, 40, 8)
    x = torch.randn(rows, dim, device=device).half().requires_grad_()
    w = torch.randn(vocab, dim, device=device).half().requires_grad_()
    target = torch.randint(0, vocab, (rows,), device=device)
    leaves = [t.detach().double().requires_grad_() for t in (x, w)]
    truth = torch.autograd.grad(scale * oracle.linear_cross_entropy(*leaves, target), leaves)
    for mode in ("fast", "compact"):
        grads = torch.autograd.grad(scale * sk.linear_cross_entropy(x, w, target, mode=mode), (x, w))
        assert oracle.error(grads[1], truth[1]) < 2e-3
        if scale > 1:
            assert oracle.error(grads[0], truth[0]) < 2e-3
        else:  # the output itself is subnormal: accurate to its spacing, 2**-24
            assert ((grads[0].double() - truth[0]).abs() <= 2**-24 + 2**-9 * truth[0].abs()).all()


@pytest.mark.parametrize("mode", ["fast", "compact"])
def test_the_weight_of_an_ignored_token_does_not_set_the_float16_scale(backend, mode, device):
    x, w = (torch.randn(n, 4, device=device).half().requires_grad_() for n in (8, 9))
    target = torch.tensor([1, 2, 3, 4, 5, 6, 7, -100], device=device)
    tokens = torch.full((8,), 1e-6, device=device)
    plain = sk.linear_cross_entropy(x, w, target, token_weight=tokens, reduction="sum", mode=mode)
    expected = torch.autograd.grad(1e6 * plain, (x, w))
    tokens[-1] = 1e6
    loss = sk.linear_cross_entropy(x, w, target, token_weight=tokens, reduction="sum", mode=mode)
    got = torch.autograd.grad(1e6 * loss, (x, w))
    for one, other in zip(got, expected, strict=True):
        assert other.abs().max() > 0.1
        assert torch.equal(one, other)


@pytest.mark.slow_for(backend="triton")
def test_rows_are_independent_of_the_batch_and_of_the_chunks(backend, device):
    x = torch.randn(70, 9, device=device, requires_grad=True)
    w = torch.randn(67, 9, device=device, requires_grad=True)
    target = torch.randint(0, 67, (70,), device=device)
    target[::7] = -100

    def run(**options):
        loss, stats = sk.linear_cross_entropy(x, w, target, return_stats=True, **options)
        return [loss, *torch.autograd.grad(loss, (x, w)), *stats]

    for mode in ("fast", "compact"):
        for got, want in zip(run(mode=mode, workspace_bytes=1), run(mode=mode), strict=True):  # 16 rows per chunk
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.slow_for(backend="triton")
def test_bfloat16_weight_gradient_accumulates_in_float32(backend, device):
    """A bfloat16 sum over many chunks would lose small terms."""
    rows = 512 if backend == "triton" and device == "cpu" else 4096
    x = torch.randn(rows, 8, device=device).bfloat16()
    w = torch.randn(50, 8, device=device).bfloat16().requires_grad_()
    target = torch.randint(0, 50, (rows,), device=device)
    (grad,) = torch.autograd.grad(sk.linear_cross_entropy(x, w, target, workspace_bytes=1), w)
    leaf = w.detach().double().requires_grad_()
    (truth,) = torch.autograd.grad(oracle.linear_cross_entropy(x.double(), leaf, target), leaf)
    eager = w.detach().requires_grad_()
    (eager_grad,) = torch.autograd.grad(F.cross_entropy(x @ eager.t(), target), eager)
    assert oracle.error(grad, truth) <= oracle.error(eager_grad, truth) + 2**-9


def test_ignored_rows_may_hold_anything(backend, device):
    x = torch.randn(9, 5, device=device)
    x[4] = float("nan")
    x.requires_grad_()
    w = torch.randn(31, 5, device=device, requires_grad=True)
    target = torch.randint(0, 31, (9,), device=device)
    target[4] = -100
    for mode in ("fast", "compact"):
        loss = sk.linear_cross_entropy(x, w, target, mode=mode)
        grads = torch.autograd.grad(loss, (x, w))
        assert loss.isfinite()
        assert all(grad.isfinite().all() for grad in grads)
        assert torch.equal(grads[0][4], torch.zeros(5, device=device))


@pytest.mark.full_for(backend="triton")
def test_inputs_are_never_modified(backend, device):
    """In-place gradients of other packages corrupted logits that were still needed."""
    x, w = torch.randn(9, 5, device=device, requires_grad=True), torch.randn(31, 5, device=device, requires_grad=True)
    target, tokens = torch.randint(0, 31, (9,), device=device), torch.rand(9, device=device)
    logits = (x @ w.t()).detach().requires_grad_()
    before = [t.detach().clone() for t in (x, w, target, tokens, logits)]
    for mode in ("fast", "compact"):
        sk.linear_cross_entropy(x, w, target, token_weight=tokens, mode=mode).backward()
    sk.cross_entropy(logits, target).backward()
    for tensor, copy in zip((x, w, target, tokens, logits), before, strict=True):
        assert torch.equal(tensor, copy)
        assert tensor._version == 0


def test_more_than_2_31_elements(device):
    """Rows beyond 2**31 elements: offsets are 64-bit. The zero pages of the logits are never allocated."""
    if device == "cuda" or "cpu" not in sk.available_backends(OP, device):
        pytest.skip("tests/gpu/test_gpu.py has it for a GPU")
    rows, vocab = 66000, 32768
    logits = torch.from_numpy(np.zeros((rows, vocab), dtype=np.float16))
    assert logits.numel() > 2**31
    logits[-1, 5] = 8.0
    target = torch.full((rows,), -100)
    target[[0, -1]] = torch.tensor([7, 5])
    loss = sk.cross_entropy(logits, target, reduction="none")
    truth = torch.tensor([vocab, 1 + (vocab - 1) * math.exp(-8.0)]).log()
    torch.testing.assert_close(loss[[0, -1]], truth)


@pytest.mark.parametrize("train", [False, True])
def test_the_logits_are_never_materialised(train, device):
    """Peak memory of training and evaluation stays far below the N x V logits (512 MiB here)."""
    if device == "cuda" or "cpu" not in sk.available_backends("linear_cross_entropy", device):
        pytest.skip("tests/gpu/test_gpu.py has it for a GPU")
    x = torch.randn(4096, 16, requires_grad=train)
    w = torch.randn(32768, 16, requires_grad=train)
    target = torch.randint(0, 32768, (4096,))

    def step():
        loss = sk.linear_cross_entropy(x, w, target)
        if train:
            loss.backward()

    peak, _ = memory.peak_extra(step, torch.device(device))
    if peak is None:
        pytest.skip("this system does not report peak memory")
    assert peak < 128 << 20


def test_num_items_as_int_and_tensor(backend, device):
    x = torch.randn(9, 5, device=device, requires_grad=True)
    w = torch.randn(31, 5, device=device)
    target = torch.randint(0, 31, (9,), device=device)
    total = sk.linear_cross_entropy(x, w, target, reduction="sum")
    for items in (20, torch.tensor(20, device=device), torch.tensor([20.0], device=device)):
        torch.testing.assert_close(sk.linear_cross_entropy(x, w, target, num_items=items), total / 20)


def test_micro_batches_with_num_items_sum_to_the_whole(backend, device):
    """Gradient accumulation: unequal numbers of masked tokens must not be averaged."""
    x = torch.randn(12, 5, dtype=torch.float64, device=device)
    w = torch.randn(31, 5, dtype=torch.float64, device=device, requires_grad=True)
    target = torch.randint(0, 31, (12,), device=device)
    target[:5] = -100
    (whole,) = torch.autograd.grad(sk.linear_cross_entropy(x, w, target), w)
    items = (target != -100).sum()
    parts = [sk.linear_cross_entropy(x[s], w, target[s], num_items=items) for s in (slice(0, 6), slice(6, 12))]
    torch.testing.assert_close(torch.autograd.grad(sum(parts), w)[0], whole)


@pytest.mark.parametrize(("shape", "ignored"), list(itertools.product([(3,), (2, 3), (2, 1, 3)], [False, True])))
def test_modules_are_their_functions(shape, ignored, device):
    x, w = torch.randn(*shape, 5, device=device), torch.randn(31, 5, device=device)
    target = torch.randint(0, 31, shape, device=device)
    if ignored:
        target[..., 0] = -100
    weight = torch.rand(31, device=device)
    module = sk.nn.LinearCrossEntropyLoss(weight, label_smoothing=0.1, softcap=5.0)
    assert "softcap=5.0" in repr(module)
    assert "weight" in module.state_dict()
    want = sk.linear_cross_entropy(x, w, target, weight=weight, label_smoothing=0.1, softcap=5.0)
    torch.testing.assert_close(module(x, w, target), want)
    logits = (x @ w.t()).flatten(0, -2)
    criterion = sk.nn.CrossEntropyLoss(weight, label_smoothing=0.1)
    torch.testing.assert_close(
        criterion(logits, target.flatten()),
        torch.nn.CrossEntropyLoss(weight, label_smoothing=0.1)(logits, target.flatten()),
    )
