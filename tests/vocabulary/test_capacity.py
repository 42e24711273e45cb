"""Limits of linear_cross_entropy: capacity of valid rows, bytes of the workspace, rows per chunk."""

from __future__ import annotations

import itertools
import types

import oracle
import pytest
import torch

import sslkernels as sk
from benchmarks.gpu.page import H200, LINEAR, linear_plan
from sslkernels.core.chunks import Matmuls, equal_rows, matmul_time, wave_rows, workspace_of
from sslkernels.vocabulary import chunked_linear, linear_operators, softmax_rows

pytestmark = pytest.mark.pairwise

OP = "linear_cross_entropy"
MODES = ("fast", "compact")
REDUCTIONS = ("mean", "sum", "none")
NAMES = ("input", "linear_weight", "linear_bias", "token_weight")
ROWS, VALID = 23, 9


def problem(device, dtype=torch.float64, requires_grad=NAMES):
    """VALID of ROWS rows are valid; the first and the last row are ignored."""
    g = torch.Generator().manual_seed(1)
    shapes = {"input": (ROWS, 7), "linear_weight": (31, 7), "linear_bias": (31,), "token_weight": (ROWS,)}
    tensors = {n: torch.randn(s, generator=g, dtype=torch.float64).to(device, dtype) for n, s in shapes.items()}
    target = torch.full((ROWS,), -100)
    target[1:-1][torch.randperm(ROWS - 2, generator=g)[:VALID]] = torch.randint(0, 31, (VALID,), generator=g)
    for name in requires_grad:
        tensors[name].requires_grad_()
    return tensors, target.to(device)


def run(tensors, target, **options):
    """Loss, statistics, and gradients for a grad_output other than 1."""
    loss, stats = sk.linear_cross_entropy(**tensors, target=target, return_stats=True, **options)
    leaves = [tensor for tensor in tensors.values() if tensor.requires_grad]
    grad_output = torch.linspace(-1, 2, max(loss.numel(), 1), dtype=loss.dtype, device=loss.device).reshape(loss.shape)
    return [loss, *stats, *torch.autograd.grad(loss, leaves, grad_output)], grad_output


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("mode", MODES)
def test_any_capacity_gives_the_same_results(backend, mode, reduction, device):
    tensors, target = problem(device)
    expected, grad_output = run(tensors, target, mode=mode, reduction=reduction)
    truth = oracle.linear_cross_entropy(**tensors, target=target, reduction=reduction)
    true_grads = torch.autograd.grad(truth, list(tensors.values()), grad_output)
    for capacity in (VALID, VALID + 3, ROWS, 1000):
        got, _ = run(tensors, target, mode=mode, reduction=reduction, capacity=capacity)
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
        for one, other in zip((got[0], *got[-4:]), (truth, *true_grads), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", MODES)
def test_empty_slots_do_not_change_half_precision(backend, mode, dtype, device):
    tensors, target = problem(device, dtype)
    items = torch.tensor(5e4, device=device)
    expected, _ = run(tensors, target, mode=mode, num_items=items)
    got, _ = run(tensors, target, mode=mode, num_items=items, capacity=VALID + 5)
    for one, other in zip(got, expected, strict=True):
        assert oracle.error(one, other) <= (torch.finfo(dtype).eps if one.is_floating_point() else 0)


@pytest.mark.parametrize("capacity", [VALID, ROWS])
@pytest.mark.parametrize("mode", MODES)
def test_a_nan_in_an_ignored_row_reaches_no_gradient(backend, mode, capacity, device):
    tensors, target = problem(device, torch.float32)
    expected, _ = run(tensors, target, mode=mode, capacity=capacity)
    with torch.no_grad():
        tensors["input"][target == -100] = float("nan")
    got, _ = run(tensors, target, mode=mode, capacity=capacity)
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.full_for(backend="triton")
@pytest.mark.parametrize("mode", MODES)
def test_frozen_inputs(backend, mode, device):
    tensors, target = problem(device)
    full, _ = run(tensors, target, mode=mode, capacity=VALID + 1)
    for i, name in enumerate(NAMES):
        tensors, target = problem(device, requires_grad=(name,))
        *_, grad = run(tensors, target, mode=mode, capacity=VALID + 1)[0]
        torch.testing.assert_close(grad, full[i - 4], rtol=1e-12, atol=1e-14)
    tensors, target = problem(device, requires_grad=())
    loss = sk.linear_cross_entropy(**tensors, target=target, capacity=VALID + 1)
    torch.testing.assert_close(loss, full[0].detach())


def test_int32_targets_with_a_64_bit_ignore_index(backend, device):
    tensors, target = problem(device)
    target = target.clamp_min(0).to(torch.int32)
    got, expected = (run(tensors, target, ignore_index=2**40, capacity=capacity)[0] for capacity in (ROWS, None))
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


@pytest.mark.full_for(backend="triton")
@pytest.mark.parametrize("mode", MODES)
def test_a_retained_graph(backend, mode, device):
    tensors, target = problem(device)
    loss = sk.linear_cross_entropy(**tensors, target=target, mode=mode, capacity=VALID + 1)
    leaves = list(tensors.values())
    first, second = (torch.autograd.grad(loss, leaves, retain_graph=again) for again in (True, False))
    for one, two in zip(first, second, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("capacity", [0, 5])
@pytest.mark.parametrize("rows", [0, ROWS])
@pytest.mark.parametrize("mode", MODES)
def test_no_valid_rows(backend, mode, rows, capacity, device):
    tensors, target = problem(device, torch.float32, requires_grad=())
    tensors = {n: t[:rows] if n in ("input", "token_weight") else t for n, t in tensors.items()}
    target = torch.full_like(target[:rows], -100)
    for tensor in tensors.values():
        tensor.requires_grad_()
    for reduction in REDUCTIONS:
        loss, stats = sk.linear_cross_entropy(
            **tensors, target=target, mode=mode, reduction=reduction, capacity=capacity, return_stats=True
        )
        assert loss.isnan() if reduction == "mean" else torch.equal(loss, torch.zeros_like(loss))
        assert torch.equal(stats.prediction, torch.full_like(target, -1))
        for grad in torch.autograd.grad(loss.sum(), [tensors[n] for n in NAMES[:3]]):
            assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("mode", MODES)
def test_more_valid_rows_than_the_capacity_raise_on_a_cpu(backend, mode, device):
    if device != "cpu":
        pytest.skip("on a GPU the results are NaN: tests/gpu/test_gpu.py")
    tensors, target = problem(device)
    message = rf"^linear_cross_entropy: capacity must be at least the number of valid rows, {VALID}; got {VALID - 1}$"
    with pytest.raises(ValueError, match=message):
        sk.linear_cross_entropy(**tensors, target=target, mode=mode, capacity=VALID - 1)
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        sk.linear_cross_entropy(**tensors, target=target, mode=mode, capacity=VALID - 1)


@pytest.mark.parametrize("capacity", [0, 1, VALID - 1])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("mode", MODES)
def test_an_overflow_that_cannot_raise_is_nan(backend, mode, reduction, capacity, device, monkeypatch):
    """On a GPU the check would synchronise; results of an overflow must not look valid."""
    monkeypatch.setattr(linear_operators, "check_capacity", lambda *_: None)
    tensors, target = problem(device, torch.float32)
    loss, stats = sk.linear_cross_entropy(
        **tensors, target=target, mode=mode, reduction=reduction, capacity=capacity, return_stats=True
    )
    grads = torch.autograd.grad(loss.sum(), list(tensors.values()))
    for values in (loss, stats.lse, stats.logprob, stats.entropy, *grads):
        assert values.isnan().all()
    assert not stats.correct.any()
    with torch.no_grad():
        assert sk.linear_cross_entropy(**tensors, target=target, reduction="sum", capacity=capacity).isnan()


@pytest.mark.full_for(backend=("triton", "reference"))
@pytest.mark.full_for(mode="compact")
@pytest.mark.costly("the compiler")
@pytest.mark.parametrize("mode", MODES)
def test_compile_with_a_capacity_that_depends_on_a_shape(backend, mode, device, compiler):
    torch._dynamo.reset()

    def step(x, w, target):
        capacity = x.shape[0] // 2 + 1
        return sk.linear_cross_entropy(x.tanh(), w, target, mode=mode, capacity=capacity, workspace_bytes=1000)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=compiler)
    tensors, target = problem(device)
    w = tensors["linear_weight"]
    for rows in (ROWS, ROWS - 2):
        x = tensors["input"][:rows].detach().requires_grad_()
        got, expected = (torch.autograd.grad(f(x, w, target[:rows]), (x, w)) for f in (compiled, step))
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("mode", MODES)
def test_functional_transforms(mode, device):
    tensors, target = problem(device, requires_grad=())
    x, w, b, _ = tensors.values()

    def loss(x, w, target):
        return sk.linear_cross_entropy(x, w, target, linear_bias=b, mode=mode, reduction="sum", capacity=6)

    def truth(x, w, target):
        return oracle.linear_cross_entropy(x, w, target, linear_bias=b, reduction="sum")

    samples = (x[: ROWS - 2].reshape(7, 3, 7), w, target[: ROWS - 2].reshape(7, 3))
    got, expected = (
        torch.func.vmap(torch.func.grad(f, argnums=(0, 1)), in_dims=(0, None, 0))(*samples) for f in (loss, truth)
    )
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_the_module_passes_the_limits(device):
    tensors, target = problem(device)
    module = sk.nn.LinearCrossEntropyLoss(capacity=VALID, workspace_bytes=4096)
    assert "capacity=9, workspace_bytes=4096" in repr(module)
    expected = sk.linear_cross_entropy(**tensors, target=target)
    torch.testing.assert_close(module(**tensors, target=target), expected)
    if device == "cpu":
        with pytest.raises(ValueError, match="capacity"):
            sk.nn.LinearCrossEntropyLoss(capacity=VALID - 1)(**tensors, target=target)


@pytest.fixture
def buffers(monkeypatch):
    """The logits buffers of the calls, and the number of chunks that used each."""
    seen = []
    original = chunked_linear._Chunks.logits

    def logits(self, x):
        if not seen or seen[-1][0] is not self.buffer:
            seen.append([self.buffer, 0])
        seen[-1][1] += 1
        return original(self, x)

    monkeypatch.setattr(chunked_linear._Chunks, "logits", logits)
    return seen


@pytest.mark.slow_for(backend="triton")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_workspace_is_a_bound(backend, dtype, device, buffers):
    """Also if the weight's gradient accumulates in float32, which raises the default on a CPU."""
    if backend == "reference":
        pytest.skip("the reference materialises the logits")
    x = torch.randn(200, 6, device=device).to(dtype).requires_grad_()
    w = torch.randn(1001, 6, device=device).to(dtype).requires_grad_()
    target = torch.randint(0, 1001, (200,), device=device)
    sizes = (1, 40000, 131072, 200000, 300000, 10**7)
    for mode, size in itertools.product(MODES, sizes):
        sk.linear_cross_entropy(x, w, target, mode=mode, workspace_bytes=size).backward()
        buffer, chunks = buffers[-1]
        smallest = 16 * buffer.shape[1] * buffer.element_size()
        assert buffer.nbytes <= max(size, smallest)
        assert 2 * buffer.nbytes > size - smallest or chunks == 1
    assert chunks == 1


def test_the_default_cpu_workspace_is_at_least_the_accumulator(device, buffers, monkeypatch):
    if device != "cpu" or "cpu" not in sk.available_backends(OP, device):
        pytest.skip("a CPU's default")
    monkeypatch.setitem(chunked_linear.WORKSPACE_BYTES, "cpu", 1)
    x, w = (torch.randn(n, 256).bfloat16().requires_grad_() for n in (200, 500))
    target = torch.randint(0, 500, (200,))
    sk.linear_cross_entropy(x, w, target).backward()
    sk.linear_cross_entropy(x, w.detach(), target).backward()
    sk.linear_cross_entropy(x, w, target, workspace_bytes=1).backward()
    assert [chunks for _, chunks in buffers] == [1, 13, 13]


@pytest.mark.parametrize(("count", "dim", "vocab"), LINEAR)
def test_chunks_of_real_shapes_on_an_h200(monkeypatch, count, dim, vocab):
    h200 = types.SimpleNamespace(total_memory=H200.memory)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: h200)
    workspace = workspace_of(torch.device("cuda"), chunked_linear.WORKSPACE_BYTES)
    assert workspace == H200.memory // 64
    assert linear_plan(count, dim, vocab, workspace).share >= 0.8


@pytest.mark.parametrize(("workspace", "share"), [(512 << 20, 0.37), (1 << 30, 0.57), (2 << 30, 0.77)])
def test_a_small_dim_wants_long_chunks(workspace, share):
    """With 1024 rows the gradient of the input has 24 tiles for 132 multiprocessors."""
    assert linear_plan(8192, 768, 256000, workspace).share == pytest.approx(share, abs=0.01)


def test_a_small_gpu_keeps_the_default(monkeypatch):
    small = types.SimpleNamespace(total_memory=8 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: small)
    assert workspace_of(torch.device("cuda"), {"cuda": 512 << 20}) == 512 << 20
    assert workspace_of(torch.device("cpu"), {"cpu": 3, "cuda": 5}) == 3


@pytest.mark.parametrize("processors", [1, 7, 108, 132, 148])
@pytest.mark.parametrize("vocab", [1, 300, 5003, 30522, 128256])
def test_chunk_rows_fit_and_waste_no_more_than_equal_chunks(vocab, processors):
    """Whatever gradients are wanted; a larger number of rows takes more than a hundredth longer."""
    for count, fit in itertools.product((0, 1, 127, 1000, 4097, 65536), (16, 112, 128, 1024, 1488, 8704)):
        for wanted in itertools.product((False, True), repeat=2):
            matmuls = Matmuls(vocab, 768, *wanted)
            rows = wave_rows(count, matmuls, fit, processors)
            assert rows == count or 0 < rows <= fit
            if count <= fit or fit < 128:
                assert rows == equal_rows(count, fit)
                continue
            assert rows % 128 == 0
            times = {r: matmul_time(count, matmuls, r, processors) for r in range(128, fit + 1, 128)}
            assert times[rows] <= 1.01 * min(times.values())
            assert all(time > 1.01 * min(times.values()) for r, time in times.items() if r > rows)


@pytest.mark.parametrize(
    ("capability", "chunks"), [((8, 0), False), ((8, 9), False), ((9, 0), True), ((10, 0), True)], ids=str
)
def test_which_gpus_evaluate_in_chunks(monkeypatch, capability, chunks):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert softmax_rows.prefers_library_matmuls(torch.device("cuda")) == chunks
    assert not softmax_rows.prefers_library_matmuls(torch.device("cpu"))


def test_an_evaluation_in_chunks_equals_the_stream(monkeypatch):
    """Losses and statistics without gradients, of several chunks and of one kernel; some rows are ignored."""
    if "triton" not in sk.available_backends(OP, "cpu"):
        pytest.skip("without Triton's interpreter")
    torch.manual_seed(0)
    x, w, b = torch.randn(70, 24), torch.randn(133, 24), torch.randn(133)
    target = torch.randint(0, 133, (70,))
    target[::3] = -100
    found = []
    for chunks in (False, True):
        monkeypatch.setattr(softmax_rows, "prefers_library_matmuls", lambda device, chunks=chunks: chunks)
        with sk.use_backend("triton"), torch.no_grad():
            loss, stats = sk.linear_cross_entropy(
                x, w, target, linear_bias=b, reduction="none", return_stats=True, workspace_bytes=16 * 192 * 4
            )
        found.append((loss, *stats))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
