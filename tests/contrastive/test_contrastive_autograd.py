"""The contrastive energies under autograd, compilation and the function transforms."""

import itertools

import pytest
import torch
from contrastive_oracle import contrastive_losses
from torch.utils.checkpoint import checkpoint

import sslkernels as sk
from sslkernels.contrastive import plan
from sslkernels.contrastive.operators import contrastive_bwd, contrastive_fwd
from sslkernels.contrastive.pair_rows import SOFTMAX
from sslkernels.contrastive.records import PairInputs, PairOptions, PairWanted

pytestmark = pytest.mark.pairwise

OP = "contrastive_energy"
NAMES = ("query", "key", "bank", "negatives", "logit_scale", "logit_bias", "row_weight")
OPTIONS = (
    {"direction": "symmetric", "label_smoothing": 0.1},
    {"energy": "sigmoid", "normalize": True},
    {"energy": "hinge", "direction": "symmetric", "margin": 1.0},
    {"reduction": "none", "direction": "symmetric"},
)
OPTION_NAMES = ("softmax", "sigmoid", "hinge", "none")


def problem(rows=11, keys=13, dim=7, dtype=torch.float64, requires_grad=NAMES):
    torch.manual_seed(1)
    shapes = {"query": (rows, dim), "key": (keys, dim), "bank": (5, dim), "negatives": (rows, 3, dim)}
    tensors = {name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}
    tensors["logit_scale"] = torch.tensor(1.5, dtype=dtype)
    tensors["logit_bias"] = torch.tensor(-0.5, dtype=dtype)
    tensors["row_weight"] = torch.rand(rows, dtype=dtype)
    for name in requires_grad:
        tensors[name].requires_grad_()
    return tensors


def call(tensors, **options):
    return sk.contrastive_energy(**tensors, **options)


@pytest.mark.full_for(backend="triton")
@pytest.mark.parametrize("options", OPTIONS, ids=OPTION_NAMES)
def test_every_subset_of_inputs_gets_the_same_gradients(backend, options):
    if backend == "triton":
        pytest.skip("the same autograd over slower kernels")
    tensors = problem()
    loss = call(tensors, **options)
    grad_output = torch.randn_like(loss)
    full = dict(zip(NAMES, torch.autograd.grad(loss, list(tensors.values()), grad_output), strict=True))
    for count in (1, 2, len(NAMES) - 1):
        for subset in itertools.combinations(NAMES, count):
            tensors = problem(requires_grad=subset)
            call(tensors, **options).backward(grad_output)
            for name, tensor in tensors.items():
                if name in subset:
                    torch.testing.assert_close(tensor.grad, full[name], rtol=1e-11, atol=1e-13)
                else:
                    assert tensor.grad is None


def test_only_wanted_gradients_are_computed(monkeypatch):
    """A frozen tower or bank costs no matmul and no accumulator."""
    computed = []
    original = plan.forward

    def spy(kernels, inputs, coefficient, options, wanted, stats):
        computed.append(wanted)
        return original(kernels, inputs, coefficient, options, wanted, stats)

    monkeypatch.setattr(plan, "forward", spy)
    tensors = problem(requires_grad=("query", "logit_scale"))
    call(tensors).backward()
    with torch.no_grad():
        call(tensors)
    assert computed == [PairWanted(query=True, logit_scale=True), PairWanted()]


@pytest.mark.full_for(backend="triton")
@pytest.mark.parametrize("options", OPTIONS, ids=OPTION_NAMES)
def test_a_retained_graph_gives_the_same_gradients(backend, options):
    tensors = problem(dtype=torch.float32)
    loss = call(tensors, **options).sum()
    leaves = list(tensors.values())
    half = torch.tensor(0.5)
    first = torch.autograd.grad(loss, leaves, half, retain_graph=True)
    kept = [grad.clone() for grad in first]
    for grad in first:
        grad.mul_(7)  # a user may write to a gradient without changing later ones
    second = torch.autograd.grad(loss, leaves, half, retain_graph=True)
    third = torch.autograd.grad(loss, leaves)
    for one, two, three in zip(kept, second, third, strict=True):
        assert torch.equal(one, two)
        torch.testing.assert_close(2 * one, three)


@pytest.mark.full_for(backend="triton")
@pytest.mark.parametrize("options", OPTIONS, ids=OPTION_NAMES)
def test_backward_after_release_and_double_backward_raise(backend, options):
    tensors = problem(dtype=torch.float32)
    loss = call(tensors, **options).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
    loss = call(tensors, **options).sum()
    (grad,) = torch.autograd.grad(loss, tensors["query"], create_graph=True)
    with pytest.raises(NotImplementedError, match="contrastive_energy: double backward is not supported"):
        (grad.square().sum() + tensors["key"].square().sum()).backward()


def test_double_backward_names_the_function_that_was_called():
    x = torch.randn(4, 3, requires_grad=True)
    (grad,) = torch.autograd.grad(sk.nt_xent(x, x.roll(1, 0)), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="nt_xent: double backward"):
        grad.sum().backward()


@pytest.mark.full_for(backend="reference")
@pytest.mark.parametrize("options", OPTIONS, ids=OPTION_NAMES)
def test_gradcheck(backend, options):
    if backend == "triton":
        pytest.skip("the numerical Jacobian runs the interpreter hundreds of times")
    tensors = problem(rows=3, keys=4, dim=2)

    def function(*leaves):
        return call(dict(zip(NAMES, leaves, strict=True)), positive=torch.tensor([3, 0, 3]), **options)

    assert torch.autograd.gradcheck(function, tuple(tensors.values()))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("energy", ["softmax", "sigmoid", "hinge"])
def test_zero_rows(backend, energy, reduction):
    tensors = problem(rows=0, dtype=torch.float32)
    loss, stats = call(tensors, energy=energy, direction="symmetric", reduction=reduction, return_stats=True)
    assert loss.shape == ((0,) if reduction == "none" else ())
    if reduction == "mean":
        assert loss.isnan()
    if reduction == "sum":
        assert loss == 0
    assert stats.lse.shape == stats.top1.shape == (0,)
    loss.sum().backward()
    for name in ("key", "bank"):
        assert torch.equal(tensors[name].grad, torch.zeros_like(tensors[name]))
    assert tensors["negatives"].grad.shape == (0, 3, 7)


def test_zero_features_and_no_per_query_negatives(backend):
    x = torch.zeros(5, 0, requires_grad=True)
    torch.testing.assert_close(sk.contrastive_energy(x, x), torch.tensor(5.0).log())
    query, negatives = torch.randn(5, 3, requires_grad=True), torch.randn(5, 0, 3, requires_grad=True)
    loss = sk.contrastive_energy(query, query, negatives=negatives)
    torch.testing.assert_close(loss, sk.contrastive_energy(query, query))
    loss.backward()
    assert negatives.grad.shape == (5, 0, 3)


def test_inputs_that_are_not_contiguous_and_shared(backend):
    base = torch.randn(7, 22, dtype=torch.float64)
    query = base.t()[::2].detach().requires_grad_()
    options = {"direction": "symmetric", "positive": torch.randint(0, 11, (22,))[::2], "bank": query}
    loss = sk.contrastive_energy(query, query, **options)
    want, has = contrastive_losses(query, query, **options)
    torch.testing.assert_close(loss, want.sum() / has.sum())
    (grad,), (want_grad,) = torch.autograd.grad(loss, query), torch.autograd.grad(want.sum() / has.sum(), query)
    torch.testing.assert_close(grad, want_grad)


@pytest.fixture
def _fresh_dynamo():
    torch._dynamo.reset()


@pytest.mark.slow_for(backend=("triton", "reference"))
@pytest.mark.full_for(dynamic=False)
@pytest.mark.costly("the compiler")
@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize(("dynamic", "reduction"), [(False, "mean"), (True, "none")])
def test_compile_equals_eager(backend, dynamic, reduction, compiler):
    ids = torch.randint(0, 5, (13,))

    def step(x, y, scale, negatives, ids):
        options = {"direction": "symmetric", "normalize": True, "label_smoothing": 0.1, "reduction": reduction}
        loss, stats = sk.contrastive_energy(
            2 * x, y, logit_scale=scale, negatives=negatives, query_ids=ids, key_ids=ids, return_stats=True, **options
        )
        return loss.sum() + sk.nt_xent(x, y) + sk.siglip_loss(x, x, scale, -1.0) + sk.info_nce(x, y), stats

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend=compiler)
    for rows in (13, 9):
        x, y = (torch.randn(rows, 7, requires_grad=True) for _ in range(2))
        negatives, scale = torch.randn(rows, 2, 7, requires_grad=True), torch.tensor(2.0, requires_grad=True)
        leaves = (x, y, scale, negatives)
        loss, stats = compiled(*leaves, ids[:rows])
        want, want_stats = step(*leaves, ids[:rows])
        torch.testing.assert_close(loss, want)
        torch.testing.assert_close(tuple(stats), tuple(want_stats))
        for got, expected in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(want, leaves), strict=True):
            torch.testing.assert_close(got, expected)


@pytest.mark.usefixtures("_fresh_dynamo")
def test_a_compiled_graph_sees_an_index_out_of_range(compiler):
    query = torch.randn(3, 4)
    compiled = torch.compile(sk.contrastive_energy, fullgraph=True, backend=compiler)
    with pytest.raises(ValueError, match=r"positive must be in \[0, 3\); got an index out of range"):
        compiled(query, query, positive=torch.tensor([0, 1, 3]))


@pytest.mark.full_for(backend="triton")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(backend, use_reentrant):
    x, y = (torch.randn(9, 5, requires_grad=True) for _ in range(2))

    def head(x, y):
        return sk.contrastive_energy(x.tanh(), y, direction="symmetric", logit_scale=3.0)

    want = torch.autograd.grad(head(x, y), (x, y))
    checkpoint(head, x, y, use_reentrant=use_reentrant).backward()
    for leaf, grad in zip((x, y), want, strict=True):
        torch.testing.assert_close(leaf.grad, grad)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_function_transforms(reduction):
    """vmap gives batches of separate problems."""
    x, y = torch.randn(4, 9, 5, dtype=torch.float64), torch.randn(4, 9, 5, dtype=torch.float64)

    def loss(x, y):
        return sk.contrastive_energy(x, y, direction="symmetric", logit_scale=3.0, reduction=reduction).sum()

    def truth(x, y):
        losses, _ = contrastive_losses(x, y, direction="symmetric", logit_scale=3.0)
        return losses.mean() if reduction == "mean" else losses.sum()

    got = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)))(x, y)
    for i in range(4):
        want = torch.func.grad(truth, argnums=(0, 1))(x[i], y[i])
        for one, two in zip(got, want, strict=True):
            torch.testing.assert_close(one[i], two)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_takes_any_mix_of_dtypes(dtype):
    for x_dtype, y_dtype in itertools.product((torch.float32, dtype), repeat=2):
        x = torch.randn(13, 7).to(x_dtype).requires_grad_()
        y = torch.randn(13, 7).to(y_dtype).requires_grad_()
        negatives = torch.randn(13, 3, 7).to(y_dtype).requires_grad_()
        scale = torch.tensor(2.0, requires_grad=True)
        with torch.autocast("cpu", dtype):
            loss = sk.contrastive_energy(x, y, direction="symmetric", logit_scale=scale, negatives=negatives)
        assert loss.dtype == torch.float32
        leaves = (x, y, negatives, scale)
        grads = torch.autograd.grad(loss, leaves)
        assert [grad.dtype for grad in grads] == [leaf.dtype for leaf in leaves]
        exact = [leaf.detach().to(dtype).double().requires_grad_() for leaf in leaves]
        want, _ = contrastive_losses(
            exact[0], exact[1], direction="symmetric", logit_scale=exact[3], negatives=exact[2]
        )
        torch.testing.assert_close(loss.double(), want.mean(), rtol=2 * torch.finfo(dtype).eps, atol=0)
        for grad, want_grad in zip(grads, torch.autograd.grad(want.mean(), exact), strict=True):
            assert (grad.double() - want_grad).norm() <= 2 * torch.finfo(dtype).eps * want_grad.norm()


def raw_arguments():
    tensors = {name: value.detach() for name, value in problem(dtype=torch.float32).items()}
    ids = torch.randint(0, 3, (13,))
    inputs = PairInputs(
        tensors["query"], tensors["key"], tensors["bank"], None, None,
        torch.tensor([0, 3, 2, 12, -1, 4, 5, 6, 7, 8, 9]), None, ids[:11].contiguous(), ids,
        torch.randint(0, 3, tensors["bank"].shape[:1]), torch.rand(13, 11).t() > 0.4, torch.rand(13) > 0.3,
        torch.rand(tensors["bank"].shape[0]) > 0.3, tensors["logit_scale"].reshape(1),
        tensors["logit_bias"].reshape(1),
    )  # fmt: skip
    options = PairOptions(SOFTMAX, True, True, True, True, True, 0.1, 0.0, torch.float32)
    return inputs, options, PairWanted(*[True] * len(PairWanted._fields))


@pytest.mark.full_for(backend="triton")
def test_opcheck(backend):
    inputs, options, wanted = raw_arguments()
    forward = (inputs, torch.rand(11), options, wanted, True)
    _, state, _, gradients = contrastive_fwd(*forward)
    torch.library.opcheck(contrastive_fwd.raw, tuple(contrastive_fwd.inputs.pack(forward)))
    backward = (torch.rand(11), inputs, state, options, wanted)
    torch.library.opcheck(contrastive_bwd.raw, tuple(contrastive_bwd.inputs.pack(backward)))
    for gradient, other in zip(contrastive_bwd(*backward), gradients, strict=True):
        assert gradient.shape == other.shape


@pytest.mark.full_for(backend="triton")
def test_bitwise_equal_from_run_to_run(backend):
    rows = 9 if backend == "triton" else 301
    x, y = (torch.randn(rows, 33, requires_grad=True) for _ in range(2))
    scale = torch.tensor(3.0, requires_grad=True)
    positive = torch.randint(0, rows, (rows,))  # keys that are the positive of several rows

    def gradients():
        loss = sk.contrastive_energy(x, y, positive=positive, direction="symmetric", logit_scale=scale)
        return torch.autograd.grad(loss + sk.nt_xent(x, y), (x, y, scale))

    first = gradients()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, gradients(), strict=True))


@pytest.mark.usefixtures("_fresh_dynamo")
def test_parameters_compile(compiler):
    """Modules with parameters of their own, and an embedding's weight."""
    x, y = torch.randn(6, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    scale = torch.nn.Parameter(torch.tensor(2.0))
    for module in (sk.nn.SigLipLoss(), sk.nn.ClipLoss(), sk.nn.ContrastiveLoss(logit_scale=scale)):
        leaves = (x, y, *module.parameters())
        got = torch.autograd.grad(torch.compile(module, fullgraph=True, backend=compiler)(x, y), leaves)
        torch.testing.assert_close(got, torch.autograd.grad(module(x, y), leaves))


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_batched_gradients(reduction):
    x, y = torch.randn(6, 4, requires_grad=True), torch.randn(6, 4)
    loss = sk.contrastive_energy(x, y, reduction=reduction)
    grad_outputs = torch.eye(6) if reduction == "none" else torch.arange(1.0, 4.0)
    (batched,) = torch.autograd.grad(loss, x, grad_outputs, is_grads_batched=True, retain_graph=True)
    for i, grad_output in enumerate(grad_outputs):
        (grad,) = torch.autograd.grad(loss, x, grad_output, retain_graph=True)
        torch.testing.assert_close(batched[i], grad)
