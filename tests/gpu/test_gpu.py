"""Tests that need a GPU: real sizes, streams, graphs, synchronisation and memory."""

from __future__ import annotations

import oracle
import pytest
import torch
from cuda_graphs import no_synchronisation
from kernel_files import kernels

import sslkernels as sk
from sslkernels.core.chunks import workspace_of
from sslkernels.vocabulary.chunked_linear import WORKSPACE_BYTES

pytestmark = [pytest.mark.gpu, kernels("linear_cross_entropy", "cross_entropy")]
OP = "linear_cross_entropy"


def problem(rows, dim, vocab, dtype=torch.bfloat16, ignored=0.5):
    x = torch.randn(rows, dim, device="cuda").to(dtype).requires_grad_()
    w = (torch.randn(vocab, dim, device="cuda") * dim**-0.5).to(dtype).requires_grad_()
    b = torch.randn(vocab, device="cuda").to(dtype).requires_grad_()
    target = torch.randint(0, vocab, (rows,), device="cuda")
    target[torch.rand(rows, device="cuda") < ignored] = -100
    return x, w, b, target


@pytest.mark.parametrize("vocab", [30522, 50265, 50368, 128256, 250002])
@pytest.mark.parametrize("mode", ["fast", "compact"])
def test_real_vocabularies(backend, mode, vocab):
    if backend == "reference":
        pytest.skip("the reference holds the logits several times")
    leaves = problem(515, 256, vocab)
    *leaves, target = leaves
    loss = sk.linear_cross_entropy(*leaves[:2], target, linear_bias=leaves[2], mode=mode)
    grads = torch.autograd.grad(loss, leaves)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    truth = oracle.linear_cross_entropy(*exact[:2], target, linear_bias=exact[2])
    eager = oracle.linear_cross_entropy(*leaves[:2], target, linear_bias=leaves[2])
    assert oracle.error(loss, truth) <= oracle.error(eager, truth) + 1e-6
    true_grads, eager_grads = torch.autograd.grad(truth, exact), torch.autograd.grad(eager, leaves)
    for got, rough, true in zip(grads, eager_grads, true_grads, strict=True):
        assert oracle.error(got, true) <= oracle.error(rough, true) + torch.finfo(torch.bfloat16).eps


@pytest.mark.large
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_more_than_2_31_elements(backend, reduction):
    """With "sum" the backend may compute the gradient in forward; with "none" backward recomputes it from the state."""
    if backend == "reference":
        pytest.skip("the reference holds the logits several times")
    rows, vocab = 66000, 32768
    logits = torch.zeros(rows, vocab, device="cuda", dtype=torch.bfloat16)
    logits[-1, 5] = 8.0
    logits.requires_grad_()
    target = torch.full((rows,), -100, device="cuda")
    target[[0, -1]] = torch.tensor([7, 5], device="cuda")
    loss = sk.cross_entropy(logits, target, reduction=reduction)
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    leaf = logits.detach()[[0, -1]].double().requires_grad_()
    truth = torch.nn.functional.cross_entropy(leaf, target[[0, -1]], reduction=reduction)
    got = loss if reduction == "sum" else loss[[0, -1]]
    torch.testing.assert_close(got.double(), truth, rtol=1e-5, atol=1e-6)
    (true_grad,) = torch.autograd.grad(truth.sum(), leaf)
    assert oracle.error(grad[[0, -1]], true_grad) < torch.finfo(torch.bfloat16).eps
    assert not grad[1:-1].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("vocab", [30522, 50265, 128256, 250002, 256000, 1000003])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_real_logits(backend, reduction, vocab, dtype):
    """Rows that fit a block, a cluster of up to 16 blocks, or neither; without and with every option."""
    if backend == "reference":
        pytest.skip("the reference is what this would be compared with")
    rows = 37
    logits = (3 * torch.randn(rows, vocab, device="cuda")).to(dtype).requires_grad_()
    target = torch.randint(0, vocab, (rows,), device="cuda")
    target[::5] = -100
    grad_output = torch.rand((rows,) if reduction == "none" else (), device="cuda")
    class_weight = torch.rand(vocab, device="cuda")
    every = {"weight": class_weight, "label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 20.0}
    for options in ({}, every):
        loss, stats = sk.cross_entropy(logits, target, reduction=reduction, return_stats=True, **options)
        (grad,) = torch.autograd.grad(loss, logits, grad_output.to(loss.dtype))
        exact = logits.detach().double().requires_grad_()
        truth = oracle.cross_entropy(exact, target, reduction=reduction, **options)
        (true_grad,) = torch.autograd.grad(truth, exact, grad_output.double())
        eager = oracle.cross_entropy(logits, target, reduction=reduction, **options)
        (eager_grad,) = torch.autograd.grad(eager, logits, grad_output.to(eager.dtype))
        rounding = 1e-13 if dtype == torch.float64 else 4 * torch.finfo(torch.float32).eps
        assert oracle.error(loss, truth) <= oracle.error(eager, truth) + rounding
        limit = oracle.error(eager_grad, true_grad) + max(torch.finfo(dtype).eps, rounding)
        assert oracle.error(grad, true_grad) <= limit
        z = exact.detach() if not options else 20 * torch.tanh(exact.detach() / 20)
        lse = torch.where(target == -100, 0, torch.logsumexp(z, 1))
        torch.testing.assert_close(stats.lse.double(), lse, rtol=1e-5, atol=1e-5)
        assert torch.equal(stats.correct, (z.argmax(1) == target) & (target != -100))


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("vocab", [1, 77, 1003, 40007])
def test_unaligned_rows(backend, vocab, dtype):
    """Rows of a view, whose gradient has other strides."""
    memory = torch.randn(5, vocab + 3, device="cuda").to(dtype)
    target = torch.randint(0, vocab, (5,), device="cuda")
    target[1] = -100
    for first in range(4):
        logits = memory[:, first : first + vocab].detach().requires_grad_()
        for reduction in ("mean", "none"):
            loss = sk.cross_entropy(logits, target, reduction=reduction)
            (grad,) = torch.autograd.grad(loss.sum(), logits)
            exact = logits.detach().double().requires_grad_()
            truth = torch.nn.functional.cross_entropy(exact, target, reduction=reduction)
            (true_grad,) = torch.autograd.grad(truth.sum(), exact)
            torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-5)
            assert oracle.error(grad, true_grad) <= torch.finfo(dtype).eps


@pytest.mark.sanitize
@pytest.mark.parametrize("mode", ["fast", "compact"])
def test_small_steps_for_the_sanitizer(backend, mode):
    """One step of every op with every option, small enough for compute-sanitizer."""
    x, w, b, target = problem(33, 64, 1003)
    tokens = torch.rand(33, device="cuda", requires_grad=True)
    for capacity in (None, 30):
        loss, stats = sk.linear_cross_entropy(
            x, w, target, linear_bias=b, token_weight=tokens, mode=mode, capacity=capacity, label_smoothing=0.1,
            z_loss=1e-3, softcap=20.0, logit_scale=0.5, weight=torch.rand(1003, device="cuda"), return_stats=True,
        )  # fmt: skip
        loss.backward(torch.tensor(0.5, device="cuda"))
    assert all(t.isfinite().all() for t in (loss, stats.lse, x.grad, w.grad, b.grad, tokens.grad))
    ids = torch.randint(0, 1003, (3, 77), device="cuda")
    words = torch.arange(77, device="cuda").expand(3, 77) // 3
    for options in ({}, {"word_ids": words}, {"mean_span": 3.0}):
        masked = sk.mask_tokens(ids, mask_id=1, vocab_size=1003, special_ids=(0, 2), seed=5, **options)
        assert masked.input_ids.shape == masked.labels.shape == ids.shape
    assert sk.random_bits((3, 77), 5, device="cuda").shape == (3, 77)


@pytest.mark.usefixtures("as_users_run")
@pytest.mark.parametrize("mode", ["fast", "compact"])
def test_cuda_graph_capture_and_replay(backend, mode):
    x, w, b, target = problem(129, 64, 1003)

    def step():
        x.grad = w.grad = b.grad = None
        loss = sk.linear_cross_entropy(x, w, target, linear_bias=b, mode=mode)
        (loss + sk.cross_entropy(x @ w.t(), target)).backward()
        return loss

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    captured = (x.grad, w.grad, b.grad)
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
        target.copy_(torch.randint_like(target, 0, 1003))
        target[::3] = -100
    graph.replay()
    replayed = [tensor.clone() for tensor in (loss, *captured)]
    expected = [step(), x.grad, w.grad, b.grad]
    for got, want in zip(replayed, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-2, atol=1e-3)


@pytest.mark.usefixtures("as_users_run")
def test_only_the_documented_synchronisation(backend):
    """cross_entropy never synchronises; linear_cross_entropy without a capacity reads the number of valid rows."""
    logits = torch.randn(33, 1003, device="cuda", requires_grad=True)
    target = torch.randint(0, 1003, (33,), device="cuda")
    ids = torch.randint(0, 1003, (4, 33), device="cuda")
    sk.cross_entropy(logits, target).backward()  # warm-up: compiles
    with no_synchronisation():
        loss, _ = sk.cross_entropy(logits, target, label_smoothing=0.1, return_stats=True)
        loss.backward()
        sk.mask_tokens(ids, mask_id=1, vocab_size=1003, special_ids=(0, 2))
        sk.mask_tokens(ids, mask_id=1, vocab_size=1003, special_ids=range(2, 212, 3), mean_span=2.0, seed=3)


@pytest.mark.usefixtures("as_users_run")
@pytest.mark.parametrize("reduction", ["mean", "mean of num_items", "sum", "none"])
@pytest.mark.parametrize("mode", ["fast", "compact"])
def test_no_synchronisation_with_a_capacity(backend, mode, reduction):
    x, w, b, target = problem(515, 64, 5003)
    tokens = torch.rand(515, device="cuda", requires_grad=True)
    grad_output = torch.rand((515,) if reduction == "none" else (), device="cuda")
    options = {"mode": mode, "reduction": reduction.split()[0], "capacity": 400, "workspace_bytes": 1 << 20}
    options |= {
        "linear_bias": b,
        "label_smoothing": 0.1,
        "weight": torch.rand(5003, device="cuda"),
        "return_stats": True,
    }
    if reduction == "mean of num_items":
        options["num_items"] = torch.tensor(300, device="cuda")

    def step():
        loss, _ = sk.linear_cross_entropy(x, w, target, token_weight=tokens, **options)
        loss.backward(grad_output)
        with torch.no_grad():
            sk.linear_cross_entropy(x, w, target, **options)

    step()  # warm-up: compiles
    with no_synchronisation():
        step()
    assert all(leaf.grad.isfinite().all() for leaf in (x, w, b, tokens))


@pytest.mark.usefixtures("as_users_run")
@pytest.mark.parametrize("capacity", [None, 100])
@pytest.mark.parametrize("mode", ["fast", "compact"])
def test_a_captured_graph_follows_its_targets(backend, mode, capacity):
    """The valid rows and their number may change between replays; values of ignored rows reach no gradient."""
    x, w, b, target = problem(129, 64, 1003)

    def step(capacity):
        x.grad = w.grad = b.grad = None
        loss = sk.linear_cross_entropy(x, w, target, linear_bias=b, mode=mode, capacity=capacity)
        loss.backward()
        return loss

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(capacity)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step(capacity)
    results = (loss, x.grad, w.grad, b.grad)
    for every in (3, 2, 129):
        with torch.no_grad():
            x.copy_(torch.randn_like(x))
            target.copy_(torch.randint_like(target, 0, 1003))
            target[::every] = -100
            x[0] = float("nan")
        graph.replay()
        replayed = [tensor.clone() for tensor in results]
        if capacity is not None and every == 129:  # 128 valid rows
            assert all(tensor.isnan().all() for tensor in replayed)
            continue
        expected = [step(None), x.grad, w.grad, b.grad]
        for got, want in zip(replayed, expected, strict=True):
            assert got.isfinite().all()
            torch.testing.assert_close(got, want, rtol=2e-2, atol=1e-3)
        assert not replayed[1][target == -100].any()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("mode", ["fast", "compact"])
def test_more_valid_rows_than_the_capacity_are_nan(backend, mode, reduction):
    x, w, b, target = problem(129, 64, 1003)
    capacity = int((target != -100).sum()) - 1
    options = {"linear_bias": b, "mode": mode, "reduction": reduction, "capacity": capacity}
    loss = sk.linear_cross_entropy(x, w, target, **options)
    for values in (loss, *torch.autograd.grad(loss.sum(), (x, w, b))):
        assert values.isnan().all()
    with torch.no_grad():
        assert sk.linear_cross_entropy(x, w, target, **options).isnan().all()


@pytest.mark.parametrize("mode", ["fast", "compact"])
def test_a_capacity_changes_no_result(backend, mode):
    if backend == "reference":
        pytest.skip("the reference holds the logits several times")
    x, w, b, target = problem(4096, 256, 50265, ignored=0.85)
    valid = int((target != -100).sum())

    def run(capacity):
        loss, stats = sk.linear_cross_entropy(
            x, w, target, linear_bias=b, mode=mode, capacity=capacity, return_stats=True
        )
        return [loss, stats.lse, stats.entropy, *torch.autograd.grad(loss, (x, w, b))]

    expected = run(None)
    for capacity in (valid, 800, 4096):
        for got, want in zip(run(capacity), expected, strict=True):
            assert oracle.error(got, want) <= torch.finfo(torch.bfloat16).eps


def test_another_stream(backend):
    x, w, b, target = problem(257, 64, 5003)
    expected = torch.autograd.grad(sk.linear_cross_entropy(x, w, target, linear_bias=b), (x, w, b))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = torch.autograd.grad(sk.linear_cross_entropy(x, w, target, linear_bias=b), (x, w, b))
    torch.cuda.current_stream().wait_stream(stream)
    for a, e in zip(got, expected, strict=True):
        assert torch.equal(a, e)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_another_device(backend):
    logits, target = torch.randn(9, 1003, device="cuda:1"), torch.randint(0, 1003, (9,), device="cuda:1")
    expected = torch.nn.functional.cross_entropy(logits, target)
    torch.testing.assert_close(sk.cross_entropy(logits, target), expected)


@kernels("mask_tokens")
def test_masking_is_the_same_on_every_device(backend):
    ids = torch.randint(0, 30522, (64, 509))
    options = {"mask_id": 103, "vocab_size": 30522, "special_ids": (0, 101, 102), "seed": 2**40 + 7}
    for extra in ({}, {"mean_span": 3.0}, {"word_ids": torch.arange(509).expand(64, 509) // 3}):
        on_cpu = {k: v for k, v in extra.items()}
        on_gpu = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in extra.items()}
        with sk.use_backend("reference"):
            expected = sk.mask_tokens(ids, **options, **on_cpu)
        got = sk.mask_tokens(ids.cuda(), **options, **on_gpu)
        for a, e in zip(got, expected, strict=True):
            assert torch.equal(a.cpu(), e)


@kernels("mask_tokens")
@pytest.mark.large
@pytest.mark.parametrize("mean_span", [None, 3.0])
def test_masking_of_more_than_2_31_tokens(backend, mean_span):
    if backend == "reference":
        pytest.skip("the reference holds its draws as int64")
    rows, columns = 33000, 65535
    ids = torch.arange(rows * columns, device="cuda", dtype=torch.int32).remainder_(30522).reshape(rows, columns)
    options = {"mask_id": 103, "vocab_size": 30522, "special_ids": (0, 101, 102), "mean_span": mean_span, "seed": 11}
    got = sk.mask_tokens(ids, **options)
    some = torch.tensor([0, 1, rows // 2, 32768, 32769, rows - 1])
    with sk.use_backend("reference"):
        expected = sk.mask_tokens(ids[some.cuda()].cpu(), **options, row_ids=some)
    for a, e in zip(got, expected, strict=True):
        assert torch.equal(a[some.cuda()].cpu(), e)
    assert int((got.labels[-1] != -100).sum()) > 0


@kernels("mask_tokens")
@pytest.mark.usefixtures("as_users_run")
@pytest.mark.parametrize("count", [4, 70])
def test_masking_in_a_cuda_graph_draws_anew_on_each_replay(backend, count):
    """count: number of special ids, each a separate range; the graph must keep their list alive."""
    if backend == "reference":
        pytest.skip("the reference copies constants to the device")
    ids = torch.randint(0, 1003, (8, 129), device="cuda")
    seed = torch.zeros((), dtype=torch.int64, device="cuda")
    options = {"mask_id": 1, "vocab_size": 1003, "mean_span": 2.0}
    special = list(range(3, 3 + 3 * count, 3))
    sk.mask_tokens(ids, **options, special_ids=special, seed=seed)  # warm-up: compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = sk.mask_tokens(ids, **options, special_ids=special, seed=seed)
    for value in (5, 6):
        seed.fill_(value)
        graph.replay()
        with sk.use_backend("reference"):
            expected = sk.mask_tokens(ids, **options, special_ids=special, seed=seed)
        for a, e in zip(got, expected, strict=True):
            assert torch.equal(a, e)


@pytest.mark.large
@pytest.mark.parametrize("train", [False, True])
def test_the_logits_are_never_materialised(backend, train):
    if backend == "reference":
        pytest.skip("the reference holds the logits")
    x, w, b, target = problem(16384, 128, 128256, ignored=0.0)  # 4.2 GB of logits
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.set_grad_enabled(train):
        loss = sk.linear_cross_entropy(x, w, target, linear_bias=b)
    if train:
        loss.backward()
    workspace = workspace_of(torch.device("cuda"), WORKSPACE_BYTES)
    assert torch.cuda.max_memory_allocated() - before < workspace + (388 << 20)


@pytest.mark.large
@pytest.mark.parametrize("mode", ["fast", "compact"])
def test_memory_beyond_the_gradients_is_the_workspace_and_the_accumulator(backend, mode):
    if backend == "reference":
        pytest.skip("the reference holds the logits")
    rows, dim, vocab, workspace = 8192, 2048, 128256, 256 << 20  # 2.1 GB of logits
    x, w, b, target = problem(rows, dim, vocab, ignored=0.5)
    options = {"linear_bias": b, "mode": mode, "capacity": 5000, "workspace_bytes": workspace}

    def step():
        x.grad = w.grad = b.grad = None
        sk.linear_cross_entropy(x, w, target, **options).backward()

    step()  # cuBLAS allocates its own workspaces
    x.grad = w.grad = b.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    gradients = x.nbytes + w.nbytes
    compacted = 2 * 5000 * dim * 2  # input and its gradient
    accumulator = 4 * w.numel()
    assert torch.cuda.max_memory_allocated() - before < gradients + compacted + workspace + accumulator + (16 << 20)
