"""Raw operators and autograd functions over records: schema, packing, dispatch, and gradients of gradients."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from cases import BACKENDS
from public_calls import CALLS, differentiable
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

import sslkernels as sk
from sslkernels.core import backends
from sslkernels.core.autograd import Function, once_differentiable, save, saved
from sslkernels.core.operator import Layout, Mutated, Operator, operator


class Pair(NamedTuple):
    left: Tensor
    right: Tensor | None


class Options(NamedTuple):
    scale: float
    flip: bool
    count: int | None


class Sums(NamedTuple):
    product: Tensor
    total: Tensor


def unlisted(function, implementation):
    """An operator of this test alone: the public lists of ops and backends do not show it."""
    op = operator("test_operator", {"reference": implementation})(function)
    backends._registry.remove(op.implementations)
    return op


def _combine(extra: Tensor | None, pair: Pair, options: Options) -> tuple[Sums, Tensor]:
    right = torch.ones_like(pair.left) if pair.right is None else pair.right
    product = options.scale * pair.left * right * (-1 if options.flip else 1)
    return Sums(product, product.sum(0)), product.new_full((options.count or 0,), 0 if extra is None else 1)


def records_of_test(extra: Tensor | None, pair: Pair, options: Options) -> tuple[Sums, Tensor]:
    left = pair.left
    return Sums(torch.empty_like(left), left.new_empty(left.shape[1:])), left.new_empty(options.count or 0)


records_of_test = unlisted(records_of_test, _combine)


def _double(values: Tensor, out: Tensor) -> None:
    out.copy_(2 * values)


def mutation_of_test(values: Tensor, out: Mutated) -> None:
    pass


mutation_of_test = unlisted(mutation_of_test, _double)


class Logged(TorchDispatchMode):
    """The names of the operators that reach the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def arguments() -> tuple:
    return None, Pair(torch.arange(6.0).view(2, 3), torch.full((2, 3), 2.0)), Options(0.5, True, 4)


def test_a_record_is_flattened_into_the_schema():
    assert str(records_of_test.raw._schema) == (
        "sslkernels::records_of_test(Tensor? extra, Tensor pair_left, Tensor? pair_right, float options_scale, "
        "bool options_flip, SymInt? options_count) -> (Tensor, Tensor, Tensor)"
    )
    assert str(mutation_of_test.raw._schema) == "sslkernels::mutation_of_test(Tensor values, Tensor(m1!) out) -> ()"


def test_packing_is_undone_by_unpacking():
    layout = Layout([Pair, int, Options])
    values = (Pair(1, None), 7, Options(0.5, True, None))
    assert layout.pack(values) == (1, None, 7, 0.5, True, None)
    unpacked = layout.unpack(layout.pack(values))
    assert unpacked == values
    assert [type(value) for value in unpacked] == [Pair, int, Options]


def test_calls_with_and_without_the_dispatcher_agree():
    with sk.use_backend("reference"):
        direct = records_of_test(*arguments())
        with Logged() as log:
            dispatched = records_of_test(*arguments())
        flat = records_of_test.raw(*records_of_test.inputs.pack(arguments()))
    assert "sslkernels::records_of_test" in log.names
    for results in (direct, dispatched):
        assert isinstance(results[0], Sums)
        for got, want in zip((*results[0], results[1]), flat, strict=True):
            assert torch.equal(got, want)


def test_the_body_is_the_fake():
    with FakeTensorMode() as mode:
        extra, pair, options = arguments()
        pair = Pair(*(mode.from_tensor(t) for t in pair))
        sums, counted = records_of_test(extra, pair, options)
    assert [tuple(t.shape) for t in (*sums, counted)] == [(2, 3), (3,), (4,)]


def test_a_mutated_argument_is_filled():
    out = torch.zeros(3)
    with sk.use_backend("reference"):
        assert mutation_of_test(torch.ones(3), out) is None
    assert out.tolist() == [2.0, 2.0, 2.0]


def test_implementations_run_without_autograd_and_autocast():
    seen = []

    def run(values: Tensor) -> Tensor:
        seen.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        return values.clone()

    def modes_of_test(values: Tensor) -> Tensor:
        return torch.empty_like(values)

    modes_of_test = unlisted(modes_of_test, run)
    with sk.use_backend("reference"), torch.autocast("cpu", torch.bfloat16):
        assert not modes_of_test(torch.ones(2, requires_grad=True)).requires_grad
        with Logged():
            modes_of_test(torch.ones(2, requires_grad=True))
    assert seen == [(False, False)] * 2


class Scaled(Function):
    """scale * left * right, whose backward is differentiable once."""

    differentiable = 1

    @staticmethod
    def forward(pair: Pair, scale: float) -> tuple[Tensor, Tensor]:
        return scale * pair.left * pair.right, pair.left.detach().clone()

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        pair, ctx.scale = inputs
        save(ctx, pair)

    @staticmethod
    def backward(ctx, grad, _):
        wanted, _ = Scaled.wanted(ctx)
        (pair,) = saved(ctx)
        found = _scaled_gradients(grad, pair, ctx.scale)
        return (Pair(*(g if want else None for g, want in zip(found, wanted, strict=True))),)


@once_differentiable("scaled")
def _scaled_gradients(grad: Tensor, pair: Pair, scale: float) -> Pair:
    return Pair(grad * scale * pair.right, grad * scale * pair.left)


def features() -> Pair:
    return Pair(torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor([3.0, 5.0], requires_grad=True))


def test_gradients_of_a_record():
    pair = features()
    value, copy = Scaled.run(pair, 2.0)
    assert not copy.requires_grad
    left, right = torch.autograd.grad(value.sum(), pair)
    assert left.tolist() == [6.0, 10.0]
    assert right.tolist() == [2.0, 4.0]
    frozen = Pair(pair.left, pair.right.detach())
    (only,) = torch.autograd.grad(Scaled.run(frozen, 2.0)[0].sum(), pair.left)
    assert torch.equal(only, left)


def test_nothing_is_recorded_without_a_gradient():
    recorded = []

    class Recorded(Function):
        @staticmethod
        def forward(pair: Pair) -> Tensor:
            return pair.left * pair.right

        @staticmethod
        def setup_context(ctx, inputs, outputs):
            recorded.append(inputs)

    pair = features()
    Recorded.run(Pair(*(t.detach() for t in pair)))
    with torch.no_grad():
        Recorded.run(pair)
    assert not recorded
    Recorded.run(pair)
    assert len(recorded) == 1


@pytest.mark.parametrize("name", Pair._fields)
def test_a_second_differentiation_raises_for_every_leaf(name):
    """Also for a leaf that only the saved tensors connect to the gradient; never None or zero."""
    pair = features()
    (left,) = torch.autograd.grad(Scaled.run(pair, 2.0)[0].sum(), pair.left, create_graph=True)
    with pytest.raises(NotImplementedError, match="scaled: double backward is not supported"):
        torch.autograd.grad(left.sum(), getattr(pair, name), allow_unused=True)


def test_transforms_of_torch_func():
    pair = Pair(*(t.detach() for t in features()))

    def loss(left):
        return Scaled.run(Pair(left, pair.right), 2.0)[0].sum()

    assert torch.func.grad(loss)(pair.left).tolist() == [6.0, 10.0]
    with pytest.raises(NotImplementedError, match="double backward"):
        torch.func.grad(lambda left: torch.func.grad(loss)(left).sum())(pair.left)
    batched = torch.func.vmap(torch.func.grad(loss))(torch.stack([pair.left, 2 * pair.left]))
    assert batched.tolist() == [[6.0, 10.0]] * 2


@pytest.mark.full_for(dynamic=False)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_functions_give_the_gradients_of_eager(dynamic, compiler):
    compiled = torch.compile(
        lambda left, right: Scaled.run(Pair(left, right), 2.0)[0], fullgraph=True, dynamic=dynamic, backend=compiler
    )
    pair = features()
    got = torch.autograd.grad(compiled(*pair).sum(), pair)
    assert [g.tolist() for g in got] == [[6.0, 10.0], [2.0, 4.0]]
    same = torch.tensor([1.0, 2.0], requires_grad=True)  # torch.compile takes no tensor twice
    assert torch.autograd.grad(compiled(same, same).sum(), same)[0].tolist() == [4.0, 8.0]


@pytest.fixture
def loss_and_leaf():
    x = torch.randn(5, 4, requires_grad=True)
    return sk.linear_cross_entropy(x, torch.randn(7, 4), torch.zeros(5, dtype=torch.long)), x


def test_a_tangent_of_grad_output_is_refused(loss_and_leaf):
    """Backward without create_graph calls no autograd node that could refuse it; it must never be lost in silence."""
    loss, x = loss_and_leaf
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(torch.tensor(1.0), torch.tensor(1.0))
        with pytest.raises(NotImplementedError, match="jvp"):
            torch.autograd.grad(loss, x, dual)


def test_a_pending_negation_reaches_the_kernels_as_memory():
    """`imag` of a conjugate has its sign in a bit that kernels do not read."""
    values = torch.randn(3, dtype=torch.complex64).conj().imag
    assert values.is_neg()

    def read_memory(values: Tensor) -> Tensor:
        assert not values.is_neg()
        return values.clone()

    def memory_of_test(values: Tensor) -> Tensor:
        return torch.empty_like(values)

    memory_of_test = unlisted(memory_of_test, read_memory)
    with sk.use_backend("reference"):
        assert torch.equal(memory_of_test(values), values.resolve_neg())


def test_a_kept_gradient_is_traced_without_reading_its_scale():
    w, target = torch.randn(7, 4), torch.zeros(5, dtype=torch.long)

    def gradient(x, scale):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(sk.linear_cross_entropy(x, w, target), x, scale)[0]

    x = torch.randn(5, 4)
    traced = make_fx(gradient)(x, torch.tensor(1.0))
    for scale in (1.0, 2.0, -3.0):
        torch.testing.assert_close(traced(x, torch.tensor(scale)), gradient(x, torch.tensor(scale)))


def test_a_kept_gradient_of_a_subclass_is_scaled_part_by_part():
    first = torch.randn(5, 4)
    both = TwoTensor(first, first.clone()).requires_grad_()
    loss = sk.linear_cross_entropy(both, torch.randn(7, 4), torch.zeros(5, dtype=torch.long))
    (grad,) = torch.autograd.grad(loss, both, TwoTensor(torch.tensor(1.0), torch.tensor(2.0)))
    torch.testing.assert_close(grad.b, 2 * grad.a)


def test_batched_gradients_of_a_kept_one(loss_and_leaf):
    loss, x = loss_and_leaf
    (grads,) = torch.autograd.grad(loss, x, torch.tensor([1.0, 2.0]), is_grads_batched=True)
    torch.testing.assert_close(grads[1], 2 * grads[0])


def test_compiled_quantiser_without_statistics():
    logits, codebook = torch.randn(5, 2, 4, requires_grad=True), torch.randn(2, 4, 3, requires_grad=True)

    def values(logits, codebook):
        return sk.gumbel_quantize(logits, codebook, seed=0).values

    expected = torch.autograd.grad(values(logits, codebook).sum(), (logits, codebook))
    compiled = torch.compile(values, backend="aot_eager", fullgraph=True)(logits, codebook)
    for got, want in zip(torch.autograd.grad(compiled.sum(), (logits, codebook)), expected, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("value", ["x", 1, torch.tensor(True)], ids=str)
def test_return_stats_must_be_a_bool(value):
    x, target = torch.randn(3, 4), torch.tensor([0, 1, 2])
    for call in (
        lambda: sk.cross_entropy(x, target, return_stats=value),
        lambda: sk.linear_cross_entropy(x, torch.randn(5, 4), target, return_stats=value),
        lambda: sk.contrastive_energy(x, x, return_stats=value),
    ):
        with pytest.raises(TypeError, match="return_stats must be a bool"):
            call()


@pytest.mark.slow_for(backend_name="triton")
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("backend_name", BACKENDS)
def test_every_output_has_memory_of_its_own(backend_name, name, device, monkeypatch):
    """torch.compile reuses the memory of tensors that nothing reads any more."""
    call = CALLS[name]
    if backend_name not in sk.available_backends(call.op, device):
        pytest.skip(str(backends.why_not(call.op, backend_name, torch.device(device))))
    shared = []
    run = Operator._run

    def checked(op, flat, args):
        results = run(op, flat, args)
        outputs = op._flat(results)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        before = {value.untyped_storage()._cdata for value in flat if isinstance(value, Tensor)}
        for field, value in zip(op.outputs.leaf_names, outputs, strict=False):
            if isinstance(value, Tensor):
                memory = value.untyped_storage()._cdata
                if memory in before:
                    shared.append(f"{op.name}.{field}")
                before.add(memory)
        return results

    monkeypatch.setattr(Operator, "_run", checked)
    with sk.use_backend(backend_name):
        outputs = differentiable(call.run(*call.leaves(device)))
        torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
    assert not shared


@pytest.mark.skipif(sys.platform != "linux", reason="it forks")
@pytest.mark.skipif("cpu" not in sk.available_backends("cross_entropy", "cpu"), reason="it needs the extension")
@pytest.mark.costly("each wrong index may end a process of its own")
def test_no_index_ends_the_process():
    """Raw operators may be called by anybody, with anything."""
    tests = Path(__file__).parent.parent
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent)])}
    command = [sys.executable, str(tests / "raw_indices.py")]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""


@pytest.mark.full
@pytest.mark.skipif(sys.platform != "linux", reason="it limits the address space")
@pytest.mark.skipif("cpu" not in sk.available_backends("vector_quantize", "cpu"), reason="it needs the extension")
def test_scratch_that_does_not_fit_says_so():
    """In the calling thread and in torch's threads alike."""
    code = """
import resource, torch
import sslkernels as sk
torch.set_num_threads(2)
rows, codes, keys = torch.randn(4096, 200), torch.randn(2048, 200), torch.arange(1 << 22)
order, index, starts, count = (torch.empty(n, dtype=torch.int64) for n in (1 << 22, 1 << 22, (1 << 22) + 1, 1))
sk.vector_quantize(rows[:1], codes[:1])
in_use = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (in_use + (4 << 20), resource.RLIM_INFINITY))
for call in (
    lambda: torch.ops.sslkernels_native.compact_rows(keys, 1 << 22, order, index, starts, count.reshape(())),
    lambda: sk.vector_quantize(rows, codes),
):
    try:
        call()
    except RuntimeError as error:
        print(error)
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent.parent)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("memory ran out") == 2, result.stdout
    assert result.stdout.count("bytes of scratch were asked for") == 2


@pytest.mark.parametrize("name", CALLS)
def test_results_of_asynchronous_collectives_are_inputs(name, device):
    leaves = CALLS[name].leaves(device)
    awaited = [AsyncCollectiveTensor(leaf.detach()).requires_grad_() for leaf in leaves]
    results = [differentiable(CALLS[name].run(*inputs)) for inputs in (leaves, awaited)]
    for got, expected in zip(*reversed(results), strict=True):
        assert type(got) is torch.Tensor
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
    for inputs, outputs in zip((leaves, awaited), results, strict=True):
        torch.autograd.backward(sum(tensor.sum() for tensor in outputs), inputs=inputs)
    for got, expected in zip(awaited, leaves, strict=True):
        assert (got.grad is None) == (expected.grad is None)
        if expected.grad is not None:
            torch.testing.assert_close(got.grad.to_dense() + 0, expected.grad.to_dense())


def test_targets_from_an_asynchronous_collective(device):
    logits, target = torch.randn(6, 4, device=device), torch.tensor([1, 0, 2, 1, 3, 3], device=device)
    expected = torch.nn.functional.cross_entropy(logits, target)
    torch.testing.assert_close(sk.cross_entropy(logits, AsyncCollectiveTensor(target)), expected)
