"""nn.VectorQuantizer: averages, revival, initialisation, state, casts and compilation."""

from __future__ import annotations

import copy
import io

import code_oracle
import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import sslkernels as sk

OP = "vector_quantize"


def batches(device, count, rows=64, dim=5, dtype=torch.float32, centers=9):
    g = torch.Generator().manual_seed(2)
    middle = 4 * torch.randn(centers, dim, generator=g)
    for _ in range(count):
        which = torch.randint(0, centers, (rows,), generator=g)
        yield (middle[which] + 0.2 * torch.randn(rows, dim, generator=g)).to(device, dtype)


def quantizer(device, codes=12, dim=5, **options):
    return sk.nn.VectorQuantizer(codes, dim, **options).to(device)


def state(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow_for(backend="triton", metric=("cosine", "dot"))
@pytest.mark.parametrize("metric", ["l2", "cosine", "dot"])
def test_the_averages_of_van_den_oord(backend, metric, device):
    """Compared with the formulas in float64, written with a one-hot."""
    module = quantizer(device, init="normal", metric=metric, decay=0.8, eps=1e-3, revive_below=None)
    code, size, sums = module.codebook.double(), torch.ones(12).double(), module.codebook.double().cpu()
    for x in batches(device, 5):
        before = module.codebook.clone()
        got = module(x.requires_grad_())
        assert torch.equal(got.values, before[got.indices])
        assert torch.equal(got.indices, code_oracle.indices(x, before, metric))
        assert not any(buffer.requires_grad for buffer in module.buffers())  # no graph grows from step to step
        x = F.normalize(x.detach(), dim=1) if metric == "cosine" else x.detach()
        hot = F.one_hot(got.indices.cpu(), 12).double()
        size = 0.8 * size + 0.2 * hot.sum(0)
        sums = 0.8 * sums + 0.2 * hot.t() @ x.double().cpu()
        code = sums / ((size + 1e-3) / (size.sum() + 12e-3) * size.sum())[:, None]
        code = F.normalize(code, dim=1) if metric == "cosine" else code
        torch.testing.assert_close(module.codebook.double().cpu(), code, rtol=1e-5, atol=1e-5)


def test_a_codebook_follows_its_clusters(backend, device):
    if backend == "triton":
        pytest.skip("many steps of the interpreter; the kernels are those of vector_quantize")
    module = quantizer(device, codes=40, decay=0.7)
    data = list(batches(device, 50))
    losses = [module(x).commitment.item() for x in data]
    assert losses[-1] < 0.1 * module.eval()(data[0]).values.var()
    assert module(data[0]).perplexity > 9


def test_evaluation_changes_nothing(backend, device):
    module = quantizer(device).eval()
    before = state(module)
    x = next(batches(device, 1)).requires_grad_()
    got = module(x)
    assert equal(before, state(module))
    assert torch.equal(got.values, sk.vector_quantize(x, module.codebook).values)
    got.commitment.backward()
    module.train()(x)
    assert not equal(before, state(module))


def test_the_gradient_uses_the_codebook_that_quantised(backend, device):
    module = quantizer(device, init="normal", decay=0.1)
    x = next(batches(device, 1)).requires_grad_()
    before = module.codebook.clone()
    got = module(x)
    (grad,) = torch.autograd.grad(got.values.sum() + got.commitment, x)
    assert not torch.equal(before, module.codebook)
    values, commitment = code_oracle.quantized(x, before)
    torch.testing.assert_close(grad, torch.autograd.grad(values.sum() + commitment, x)[0])


@pytest.mark.slow_for(backend="triton")
@pytest.mark.parametrize("decay", [0.9, None])
def test_starts_from_distinct_rows_of_the_first_batch(backend, decay, device):
    module = quantizer(device, decay=decay, seed=3)
    first, second = batches(device, 2)
    assert not module.started
    start = copy.deepcopy(module)
    got = module(first)
    assert module.started
    chosen = (got.values[:, None] == first).all(2)  # every value is a row
    assert chosen.any(1).all()
    assert got.commitment > 0
    assert module.state_dict()["steps"] == 1
    taken = first[torch.cdist(first.double(), module.codebook.double()).argmin(0)] if decay is None else None
    if decay is None:
        assert torch.equal(module.codebook, taken)
        assert len(taken.unique(dim=0)) == 12
    again, other = copy.deepcopy(start), quantizer(device, decay=decay, seed=4)
    again(first), other(first)
    assert equal(state(again), state(module))
    assert not torch.equal(other.codebook, module.codebook)
    module(second)


def test_starts_with_fewer_rows_than_codes_and_with_none(backend, device):
    module = quantizer(device, codes=7, decay=None)
    before = module.codebook.detach().clone()
    module(torch.empty(0, 5, device=device))
    assert not module.started
    assert torch.equal(module.codebook, before)
    x = torch.randn(4, 5, device=device)
    x[1, 2] = float("nan")
    module(x)
    assert module.codebook.isfinite().all()
    assert len(module.codebook.detach().unique(dim=0)) == 3
    assert torch.equal(module.codebook[:3], module.codebook[3:6])
    nothing = quantizer(device, codes=7, decay=None)
    nothing(torch.full((4, 5), float("nan"), device=device))
    assert torch.equal(nothing.codebook, before)


@pytest.mark.slow_for(backend="triton")
def test_dead_codes_become_rows_that_the_next_step_keeps(backend, device):
    """espnet#6284: stale averages would move a revived code back at once."""
    rows = list(batches(device, 3))
    init = torch.cat([rows[0][:4], torch.full((8, 5), 1e4, device=device)])
    module = quantizer(device, init=init, decay=0.5, revive_below=0.1)
    for _ in range(20):
        module(rows[0])
        if (module.codebook.abs() < 100).all():
            break
    else:
        pytest.fail("dead codes stay dead")
    revived = module.codebook[4:].clone()
    assert (revived[:, None] == rows[0]).all(2).any(1).all()
    torch.testing.assert_close(module.sums[4:] / module.sizes[4:, None], revived)
    assert (module.sizes[4:] == module.sizes[4]).all()
    used = module(rows[1]).usage[4:]
    moved = module.codebook[4:]
    assert (moved - revived).abs().max() < 20  # not where it was
    unused = used == 0
    torch.testing.assert_close(moved[unused], revived[unused], rtol=1e-4, atol=1e-4)
    assert used.sum() > 0

    kept = quantizer(device, init=init, decay=0.5, revive_below=None)
    for _ in range(8):
        kept(rows[0])
    assert (kept.codebook[4:] > 100).all()


@pytest.mark.slow_for(backend="triton")
def test_revival_takes_distinct_rows_and_each_step_others(backend, device):
    rows = next(batches(device, 1, rows=40))
    far = torch.full((6, 5), 1e4, device=device)
    drawn = []
    for seed in (0, 1):
        module = quantizer(device, codes=6, init=far, seed=seed, decay=0.0, revive_below=0.1)
        for _ in range(2):
            module.codebook.copy_(far)
            module.sums.copy_(far)
            module.sizes.fill_(1)
            module(rows)
            dead = module.codebook[1:]  # the first took all rows
            assert (dead[:, None] == rows).all(2).any(1).all()
            assert len(dead.unique(dim=0)) == 5
            drawn.append(dead.clone())
    for i, one in enumerate(drawn):
        assert not any(torch.equal(one, other) for other in drawn[i + 1 :])


@pytest.mark.slow_for(backend="triton")
def test_no_state_of_torch_is_used(backend, device):
    """torch's generators are neither read nor advanced."""
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        module = quantizer(device, revive_below=0.3)
        before = torch.get_rng_state()
        for x in batches(device, 4):
            module(x)
        assert torch.equal(torch.get_rng_state(), before)
        results.append(state(module))
    assert equal(*results)


@pytest.mark.slow
def test_codes_follow_from_one_photograph_to_another():
    """A code that is never used again wakes in tens of steps, not in hundreds."""
    pytest.importorskip("sklearn", reason="its two photographs")
    pytest.importorskip("PIL", reason="reads them")
    from sklearn.datasets import load_sample_image

    def patches(name):  # 4 x 4 pixels
        image = torch.tensor(load_sample_image(name))[:424].float() / 255
        return image.reshape(106, 4, 160, 4, 3).permute(0, 2, 1, 3, 4).reshape(-1, 48)

    photographs = patches("china.jpg"), patches("flower.jpg")

    def trained(**options):
        """The squared error of the second photograph, and how many codes it uses."""
        vq, g = sk.nn.VectorQuantizer(512, 48, **options), torch.Generator().manual_seed(1)
        for rows in photographs:
            for _ in range(200):
                vq(rows[torch.randint(len(rows), (1024,), generator=g)])
        found = vq.eval()(photographs[1])
        return (found.values - photographs[1]).square().mean(), len(found.indices.unique())

    late, few = trained(revive_below=0.01)
    assert few < 200
    error, used = trained()
    assert used > 480
    assert error < 0.7 * late


def test_the_averages_keep_no_graph(device):
    """Buffers that held the graphs of past batches would grow without bound."""
    module = quantizer(device, revive_below=0.3)
    for x in batches(device, 3):
        module(x.requires_grad_())
    assert not any(buffer.requires_grad for buffer in module.buffers())


@pytest.mark.slow_for(backend="triton")
def test_a_saved_state_resumes_exactly(backend, device):
    whole, stopped = (quantizer(device, revive_below=0.5) for _ in range(2))
    data = list(batches(device, 6))
    for x in data[:3]:
        whole(x), stopped(x)
    file = io.BytesIO()
    torch.save(stopped.state_dict(), file)
    file.seek(0)
    resumed = quantizer(device, revive_below=0.5, seed=77)
    resumed.load_state_dict(torch.load(file))
    for x in data[3:]:
        a, b = whole(x), resumed(x)
        assert all(torch.equal(one, other) for one, other in zip(a, b, strict=True))
    assert equal(state(whole), state(resumed))
    fresh = quantizer(device)
    fresh.load_state_dict(quantizer(device, seed=5).state_dict())
    fresh(data[0])
    assert fresh.started  # a state from before the first batch starts there


@pytest.mark.slow_for(backend="triton")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_averages_stay_in_float32(backend, dtype, device):
    """In half precision an update of a hundredth would round to nothing."""
    module = torch.nn.Sequential(quantizer(device, init="normal")).to(dtype)[0]
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert module.codebook.dtype == module.sizes.dtype == module.sums.dtype == expected
    x = next(batches(device, 1, dtype=dtype)).requires_grad_()
    before = module.codebook.clone()
    got = module(x)
    assert got.values.dtype == dtype
    assert got.commitment.dtype == expected
    assert torch.equal(got.values, before[got.indices].to(dtype))
    got.commitment.backward()
    assert x.grad.dtype == dtype
    assert not torch.equal(before, module.codebook)
    twin = quantizer(device, init="normal", dtype=expected)
    twin(x.detach().to(expected))
    assert torch.equal(twin.codebook, module.codebook)


@pytest.mark.slow_for(backend="triton")
def test_autocast(backend, device):
    modules = [quantizer(device, revive_below=0.3) for _ in range(2)]
    for x in batches(device, 3):
        expected = modules[0](x)
        with torch.autocast(device, torch.bfloat16):
            got = modules[1](x)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert equal(*(state(module) for module in modules))


@pytest.mark.slow_for(backend="triton")
def test_rows_that_are_not_finite_move_nothing(backend, device):
    whole, part = (quantizer(device, revive_below=0.3) for _ in range(2))
    for x in batches(device, 3):
        bad = torch.cat([x, torch.full((2, 5), float("nan"), device=device), x[:1] * float("inf")])
        part(x)
        got = whole(bad)
        assert got.values[64:66].isnan().all()
        assert got.commitment.isnan()
    assert equal(state(whole), state(part))


@pytest.mark.slow_for(backend="triton")
@pytest.mark.parametrize("metric", ["l2", "cosine", "dot"])
def test_codes_stay_within_the_rows(backend, metric, device):
    """With the cosine they have norm 1, at the start and where a dead code was revived, too."""
    module = quantizer(device, metric=metric, decay=0.5)
    largest = torch.zeros((), device=device)
    for x in batches(device, 10):
        module(x)
        largest = torch.maximum(largest, x.norm(dim=1).max())
        assert module.codebook.norm(dim=1).max() <= largest * 1.001
        if metric == "cosine":
            torch.testing.assert_close(module.codebook.norm(dim=1), torch.ones(12, device=device))


@pytest.mark.slow_for(backend="triton")
def test_decay_zero_and_batches_without_rows(backend, device):
    module = quantizer(device, init="normal", decay=0.0, eps=0.0, revive_below=None)
    before = module.codebook.clone()
    x = next(batches(device, 1))
    got = module(x)
    used = got.usage > 0
    assert torch.equal(module.codebook[~used], before[~used])
    mean = torch.stack([x[got.indices == k].mean(0) for k in used.nonzero()[:, 0]])
    torch.testing.assert_close(module.codebook[used], mean)
    kept = module.codebook.clone()
    empty = module(torch.empty(0, 5, device=device))
    assert empty.commitment.isnan()
    assert torch.equal(module.codebook, kept)


def test_a_learned_codebook_gets_the_gradient_of_vq_vae(backend, device):
    module = quantizer(device, decay=None, init="normal")
    assert [name for name, _ in module.named_parameters()] == ["codebook"]
    x = next(batches(device, 1)).requires_grad_()
    got = module(x)
    (0.25 * got.commitment).backward()
    codes = F.embedding(got.indices, module.codebook)
    expected = F.mse_loss(codes, x.detach()) + 0.25 * F.mse_loss(x, codes.detach())
    for leaf, grad in zip((x, module.codebook), torch.autograd.grad(expected, (x, module.codebook)), strict=True):
        torch.testing.assert_close(leaf.grad, grad)
    optimizer = torch.optim.SGD(module.parameters(), 1.0)
    before = module(x.detach()).commitment
    optimizer.step()
    assert module(x.detach()).commitment < before
    half = quantizer(device, decay=None).to(torch.bfloat16)
    assert half(x.detach().bfloat16()).values.dtype == half.codebook.dtype == torch.bfloat16


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputation_is_refused(use_reentrant, device):
    """The codebook has moved: recomputation would give another result and move it once more."""
    module = quantizer(device)
    x = next(batches(device, 1)).requires_grad_()

    def head(x):
        got = module(x.tanh())
        return got.values.square().sum() + got.commitment

    loss = checkpoint(head, x, use_reentrant=use_reentrant)
    with pytest.raises(RuntimeError, match="VectorQuantizer: in training it cannot be computed again"):
        loss.backward()
    module.eval()
    (expected,) = torch.autograd.grad(head(x), x)
    checkpoint(head, x, use_reentrant=use_reentrant).backward()
    torch.testing.assert_close(x.grad, expected)


@pytest.mark.full_for(decay=None, init=("data", "kmeans"))
@pytest.mark.full_for(decay=0.9, init="normal")
@pytest.mark.costly("the compiler")
@pytest.mark.parametrize("init", ["data", "kmeans", "normal"])
@pytest.mark.parametrize("decay", [0.9, None])
def test_compile_equals_eager(decay, init, device, compiler):
    torch._dynamo.reset()
    eager, compiled = (quantizer(device, decay=decay, init=init) for _ in range(2))
    step = torch.compile(compiled, fullgraph=True, backend=compiler)
    for x in batches(device, 3):
        one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
        expected, got = eager(one), step(other)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)
        expected.commitment.backward()
        got.commitment.backward()
        torch.testing.assert_close(other.grad, one.grad)
    for name, value in state(eager).items():
        torch.testing.assert_close(state(compiled)[name], value)


def test_deep_copies_and_devices(device):
    module = quantizer("cpu", revive_below=0.3)
    twin = copy.deepcopy(module)
    for x in batches("cpu", 2):
        module(x), twin(x)
    assert equal(state(module), state(twin))
    assert "12, 5, metric='l2', decay=0.99, revive_below=0.3" in repr(module)


ERRORS = [
    (dict(num_codes=0), ValueError, "num_codes must be at least 1; got 0"),
    (dict(dim=2.0), TypeError, "dim must be an int; got float"),
    (dict(metric="l1"), ValueError, "metric must be 'l2', 'cosine' or 'dot'; got 'l1'"),
    (dict(decay=1.0), ValueError, "decay must be less than 1; got 1.0"),
    (dict(decay=-0.1), ValueError, r"decay must be in \[0, 1\]; got -0.1"),
    (dict(eps=-1.0), ValueError, "eps must be in"),
    (dict(eps=float("inf")), ValueError, "eps must be in"),  # which would leave the codebook as it is
    (dict(revive_below=1.0), ValueError, "revive_below must be less than 1, or None; got 1.0"),
    (dict(codebook_weight=-1.0), ValueError, "codebook_weight must be in"),
    (dict(init="pca"), ValueError, "init must be 'data', 'kmeans' or 'normal'; got 'pca'"),
    (dict(init=torch.zeros(2, 2)), ValueError, r"init must have shape \(num_codes, dim\) = \(4, 3\); got \(2, 2\)"),
    (dict(seed=1.0), TypeError, "seed must be an int, .*; got float"),
    (dict(decay=None, revive_below=0.1), ValueError, "revive_below must be None or 'auto' with decay=None"),
    (dict(decay=None, eps=1e-3), ValueError, "eps must be None with decay=None"),
    (dict(codebook_weight=1.0), ValueError, "codebook_weight must be None with averages"),
    (dict(init=torch.zeros(4, 3, requires_grad=True)), TypeError, "init must not require grad"),
    (dict(dtype=torch.float16), TypeError, "dtype must be torch.float32 or torch.float64; got torch.float16"),
]


@pytest.mark.parametrize(
    ("change", "kind", "message"), ERRORS, ids=lambda v: next(iter(v)) if isinstance(v, dict) else ""
)
def test_errors(change, kind, message):
    with pytest.raises(kind, match="^VectorQuantizer: " + message):
        sk.nn.VectorQuantizer(**{"num_codes": 4, "dim": 3, **change})


def test_errors_of_the_input():
    module = sk.nn.VectorQuantizer(4, 3)
    for bad, kind in ((torch.zeros(2, 4), ValueError), (torch.zeros(2, 3).int(), TypeError), ([1.0], TypeError)):
        with pytest.raises(kind, match=r"^VectorQuantizer: input must"):
            module(bad)
