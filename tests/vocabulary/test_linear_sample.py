"""linear_sample: the index and its log-probability against float64 with the same noise, and their distribution."""

from __future__ import annotations

import math

import pytest
import torch
from philox_oracle import chi_square_limit
from torch import Tensor
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

import sslkernels as sk
from benchmarks import memory
from sslkernels.vocabulary import linear_sample as module

pytestmark = pytest.mark.pairwise

OP = "linear_sample"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHAPES = [(1, 1, 1), (5, 3, 2), (19, 517, 19), (3, 130, 64), (70, 66, 33), (1, 1100, 8), (0, 7, 3), (4, 5, 0)]


def inputs(device, rows, vocab, dim, dtype=torch.float32, spread=2.0):
    g = torch.Generator().manual_seed(rows + 1000 * vocab)
    x = torch.randn(rows, dim, generator=g)
    w = spread * max(dim, 1) ** -0.5 * torch.randn(vocab, dim, generator=g)
    return x.to(dtype).to(device), w.to(dtype).to(device), torch.randn(vocab, generator=g).to(device)


def exact_logits(x: Tensor, w: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    logits = x.double() @ w.double().t()
    return (logits if bias is None else logits + bias.double()) / temperature


def assert_drawn(drawn, logits: Tensor, seed, dtype, backend, row_ids=None) -> None:
    """Index: the winner, or a class whose sum is as large up to rounding. Log-probability: accurate to rounding."""
    noise = sk.random_gumbel(logits.shape, seed, row_ids=row_ids, device=logits.device).double()
    perturbed = logits + noise
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    margin = 64 * eps * (1 + logits.abs().amax(1))
    if dtype == torch.float64:
        margin = margin + 8 * torch.finfo(torch.float32).eps * 25  # the noise is float32
    at = drawn.index[:, None]
    assert (perturbed.gather(1, at)[:, 0] >= perturbed.amax(1) - margin).all()
    error = (drawn.logprob.double() - logits.log_softmax(1).gather(1, at)[:, 0]).abs()
    assert (error <= margin / 4).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_draws_the_winner(backend, device, dtype, shape):
    x, w, bias = inputs(device, *shape, dtype)
    for b, temperature in ((None, 1.0), (bias, 0.6)):
        drawn = sk.linear_sample(x, w, linear_bias=b, temperature=temperature, seed=7)
        assert drawn.index.dtype == torch.int64
        assert drawn.logprob.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert drawn.index.shape == drawn.logprob.shape == x.shape[:1]
        if len(x):
            assert_drawn(drawn, exact_logits(x, w, b, temperature), 7, dtype, backend)


def test_tiles_of_any_size_give_the_same(device, monkeypatch):
    x, w, bias = inputs(device, 37, 2600, 16)
    with sk.use_backend("cpu"):
        expected = sk.linear_sample(x, w, linear_bias=bias, seed=1)
        monkeypatch.setitem(module.WORKSPACE_BYTES, "cpu", 1)
        monkeypatch.setattr(module, "ROWS_AT_ONCE", 5)
        got = sk.linear_sample(x, w, linear_bias=bias, seed=1)
    assert torch.equal(got.index, expected.index)
    torch.testing.assert_close(got.logprob, expected.logprob)


@pytest.mark.parametrize("processors", [108, 132, 148])
@pytest.mark.parametrize(("rows", "vocab"), [(1024, 50_265), (1024, 128_256), (560, 250_002), (64, 128_256)])
def test_tiles_of_a_gpu_fill_whole_waves(processors, rows, vocab):
    fit = max(module.WORKSPACE_BYTES["cuda"] // (4 * rows) // 1024, 1) * 1024
    columns = module.wave_columns(rows, vocab, fit, processors)
    assert columns % 128 == 0
    assert columns <= fit
    of_tile = columns // 128 * -(-rows // 256) / processors
    assert of_tile > 0.82 * math.ceil(of_tile)


def test_a_draw_depends_only_on_its_row(backend, device):
    x, w, _ = inputs(device, 12, 257, 9)
    whole = sk.linear_sample(x.reshape(3, 4, 9), w, seed=5)
    assert whole.index.shape == (3, 4)
    ids = torch.tensor([7, 2, 11], device=device)
    part = sk.linear_sample(x[ids], w, row_ids=ids, seed=5)
    assert torch.equal(part.index, whole.index.reshape(-1)[ids])
    assert not torch.equal(whole.index, sk.linear_sample(x.reshape(3, 4, 9), w, seed=6).index)


def test_layouts(backend, device):
    x, w, bias = inputs(device, 6, 40, 8)
    expected = sk.linear_sample(x, w, linear_bias=bias, seed=2)
    apart = torch.stack([x, x], -1)[..., 0], w.t().contiguous().t(), torch.stack([bias, bias], 1)[:, 0]
    got = sk.linear_sample(apart[0], apart[1], linear_bias=apart[2], seed=2)
    assert torch.equal(got.index, expected.index)
    single = sk.linear_sample(x[2], w, linear_bias=bias, seed=2, row_ids=torch.tensor(2, device=device))
    assert single.index.shape == ()
    assert int(single.index) == int(expected.index[2])


@pytest.mark.full_for(backend=("triton", "reference"))
@pytest.mark.parametrize("vocab", [2, 17, 320])
def test_frequencies_are_the_softmax(backend, device, vocab):
    """Chi-square over classes expected at least 5 times; a random seed would fail once in 1000."""
    rows = 1000 if backend == "triton" else 10_000
    logits = 1.5 * torch.randn(vocab, generator=torch.Generator().manual_seed(vocab))
    x, w = torch.ones(rows, 1, device=device), logits[:, None].to(device)
    drawn = sk.linear_sample(x, w, temperature=0.8, seed=11)
    p = (logits.double() / 0.8).softmax(0)
    counts = torch.bincount(drawn.index.cpu(), minlength=vocab).double()
    expected = rows * p
    often = expected >= 5
    pooled_counts = torch.cat([counts[often], counts[~often].sum()[None]])
    pooled = torch.cat([expected[often], expected[~often].sum()[None]])
    pooled_counts, pooled = pooled_counts[pooled > 0], pooled[pooled > 0]
    assert float(((pooled_counts - pooled) ** 2 / pooled).sum()) < chi_square_limit(len(pooled) - 1)
    torch.testing.assert_close(drawn.logprob.cpu().double(), p.log()[drawn.index.cpu()], rtol=0, atol=1e-5)


def test_the_tail_is_drawn_at_its_rate(device):
    """4095 classes 16 nats behind: 30.2 of 65536 draws are expected, fewer than 8 or more than 64 once in a million."""
    assert_tail(device, rows=1 << 16, vocab=4096, gap=16.0, low=8, high=64)


@pytest.mark.slow
def test_the_tail_20_nats_behind_is_drawn_at_its_rate(device):
    """32767 classes 20 nats behind: 35.4 of 2^19 draws are expected, below 11 or above 71 once in a million."""
    assert_tail(device, rows=1 << 19, vocab=32768, gap=20.0, low=11, high=71)


def assert_tail(device, rows, vocab, gap, low, high):
    w = torch.zeros(vocab, 1, device=device)
    w[vocab // 3] = gap
    drawn = sk.linear_sample(torch.ones(rows, 1, device=device), w, seed=3)
    tail = drawn.index[drawn.index != vocab // 3]
    assert low <= len(tail) <= high
    assert len(torch.unique(tail)) > 0.9 * len(tail)
    rate = (vocab - 1) * math.exp(-gap)
    expected = torch.where(drawn.index == vocab // 3, -math.log1p(rate), -gap - math.log1p(rate))
    torch.testing.assert_close(drawn.logprob, expected.float(), rtol=0, atol=2e-6)


def test_masked_classes_and_rows_with_nan(backend, device):
    x, w, bias = inputs(device, 50, 30, 4)
    bias[::2] = -math.inf
    drawn = sk.linear_sample(x, w, linear_bias=bias, seed=0)
    assert (drawn.index % 2 == 1).all()
    assert drawn.logprob.isfinite().all()
    x[3], x[7, 0] = math.nan, math.inf
    drawn = sk.linear_sample(x, w, seed=0)
    others = torch.arange(50, device=device) % 50
    others = others[(others != 3) & (others != 7)]
    assert drawn.logprob[[3, 7]].isnan().all()
    assert ((drawn.index >= 0) & (drawn.index < 30)).all()
    x[3], x[7, 0] = 0.0, 0.0
    expected = sk.linear_sample(x, w, seed=0)
    assert torch.equal(drawn.index[others], expected.index[others])
    nothing = sk.linear_sample(x, w, linear_bias=torch.full_like(bias, -math.inf), seed=0)
    assert nothing.logprob.isnan().all()
    assert (nothing.index == 0).all()


def test_ties_large_offsets_and_extreme_temperatures(backend, device):
    x, w, bias = inputs(device, 40, 21, 4)
    far = sk.linear_sample(x, w, linear_bias=bias.double().add(1000).float() - bias, seed=0)
    assert far.logprob.isfinite().all()
    hot = sk.linear_sample(x, w, temperature=math.inf, seed=0)
    noise = sk.random_gumbel((40, 21), 0, device=device)
    assert torch.equal(hot.index, noise.argmax(1))
    torch.testing.assert_close(hot.logprob, torch.full((40,), -math.log(21), device=device))
    cold = sk.linear_sample(x, w, temperature=1e-4, seed=0)
    assert (cold.index == (x @ w.t()).argmax(1)).float().mean() > 0.97


@pytest.mark.parametrize("frozen", [(), (0,), (1,), (2,), (0, 1), (1, 2)])
def test_gradient_of_the_log_probability(backend, device, frozen):
    tensors = inputs(device, 23, 61, 7)
    leaves = [t.detach().requires_grad_(i not in frozen) for i, t in enumerate(tensors)]
    x, w, bias = leaves
    index, logprob = sk.linear_sample(x, w, linear_bias=bias, temperature=0.7, seed=4)
    assert torch.equal(index, sk.linear_sample(*tensors[:2], linear_bias=tensors[2], temperature=0.7, seed=4).index)
    weights = torch.randn(23, device=device)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    got = torch.autograd.grad(logprob, wanted, weights, retain_graph=True)
    again = torch.autograd.grad(logprob, wanted, weights)
    exact = [t.detach().double().requires_grad_(t.requires_grad) for t in leaves]
    logits = exact_logits(*exact[:2], exact[2], 0.7)
    loss = logits.log_softmax(1).gather(1, index[:, None])[:, 0]
    torch.testing.assert_close(logprob.double(), loss, rtol=0, atol=1e-5)
    expected = torch.autograd.grad(loss, [t for t in exact if t.requires_grad], weights.double())
    for a, b, e in zip(got, again, expected, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a.double(), e, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("dtype", "bias_dtype"), [(torch.float32, torch.bfloat16), (torch.float64, torch.float32)])
def test_the_bias_is_divided_by_the_temperature_in_the_accumulation_dtype(backend, device, dtype, bias_dtype):
    """Division in the dtype of the bias would round, and change the log-probability if a gradient is wanted."""
    x, w, bias = inputs(device, 6, 9, 4, dtype)
    bias = (8 * bias).to(bias_dtype).requires_grad_()
    index, logprob = sk.linear_sample(x, w, linear_bias=bias, temperature=0.7, seed=3)
    expected = exact_logits(x, w, bias, 0.7).log_softmax(1).gather(1, index[:, None])[:, 0]
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(logprob.double(), expected, rtol=tolerance, atol=tolerance)


def test_no_features(backend, device):
    x, w, bias = (t.requires_grad_() for t in inputs(device, 4, 5, 0))
    logprob = sk.linear_sample(x, w, linear_bias=bias, seed=3).logprob
    grads = torch.autograd.grad(logprob.sum(), (x, w, bias))
    assert [g.shape for g in grads] == [x.shape, w.shape, bias.shape]


@pytest.mark.parametrize("at", range(3))
def test_forward_mode_raises(device, at):
    """A tangent of 0 would be wrong."""
    tensors = inputs(device, 5, 7, 3)

    def logprob(leaf):
        x, w, bias = (*tensors[:at], leaf, *tensors[at + 1 :])
        return sk.linear_sample(x, w, linear_bias=bias, seed=0).logprob

    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(logprob, (tensors[at],), (tensors[at],))


def test_policy_gradient_is_unbiased(device):
    """E[r(i) d log p(i)] = d E[r(i)]: 2^16 draws, within 6 standard errors."""
    rows, vocab = 1 << 16, 5
    logits = torch.tensor([0.3, -1.0, 0.8, 0.0, -0.4], device=device).requires_grad_()
    reward = torch.tensor([1.0, -2.0, 0.5, 3.0, 0.0], device=device)
    index, logprob = sk.linear_sample(torch.ones(rows, 1, device=device), logits[:, None], seed=9)
    (got,) = torch.autograd.grad((reward[index] * logprob).mean(), logits)
    p = logits.detach().softmax(0)
    expected = p * (reward - (p * reward).sum())
    score = torch.eye(vocab, device=device)[None] - p  # d log p(i) / d logits
    variance = (p[:, None] * (reward[:, None] * score[0]) ** 2).sum(0) - expected**2
    assert ((got - expected).abs() < 6 * (variance / rows).sqrt()).all()


def test_row_numbers_do_not_wrap(backend, device):
    """Row numbers whose groups exceed 2^32."""
    x, w, _ = inputs(device, 5, 33, 3)
    ids = torch.tensor([2**33 + 1, 1, 2**62 + 5, 2**31, -1], device=device)
    drawn = sk.linear_sample(x, w, row_ids=ids, seed=7)
    assert_drawn(drawn, exact_logits(x, w, None, 1.0), 7, torch.float32, backend, ids)


def test_seeds(backend, device):
    x, w, _ = inputs(device, 9, 33, 4)
    expected = sk.linear_sample(x, w, seed=-3).index
    assert torch.equal(sk.linear_sample(x, w, seed=torch.tensor(-3, device=device)).index, expected)
    generator = torch.Generator(device).manual_seed(1)
    first = sk.linear_sample(x, w, generator=generator).index
    assert not torch.equal(sk.linear_sample(x, w, generator=generator).index, first)
    assert torch.equal(sk.linear_sample(x, w, generator=generator.manual_seed(1)).index, first)
    torch.manual_seed(1)
    default = sk.linear_sample(x, w).index
    torch.manual_seed(1)
    assert torch.equal(sk.linear_sample(x, w).index, default)


@pytest.mark.full_for(dynamic=False)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(device, dynamic, compiler):
    torch._dynamo.reset()

    def step(x, w, bias, seed):
        index, logprob = sk.linear_sample(2 * x, w, linear_bias=bias, seed=seed)
        return index, 3 * logprob.sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend=compiler)
    for rows in (13, 9):
        tensors = [t.requires_grad_() for t in inputs(device, rows, 31, 7)]
        seed = torch.tensor(rows, device=device)
        (index, loss), (expected_index, expected) = compiled(*tensors, seed), step(*tensors, seed)
        assert torch.equal(index, expected_index)
        torch.testing.assert_close(loss, expected)
        for a, e in zip(torch.autograd.grad(loss, tensors), torch.autograd.grad(expected, tensors), strict=True):
            torch.testing.assert_close(a, e)


def test_compile_where_no_gradient_is_wanted(device):
    """Also with the same tensor as both arguments."""
    x = inputs(device, 5, 7, 3)[0]
    compiled = torch.compile(lambda x: sk.linear_sample(x, x, seed=0), fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(compiled(x), sk.linear_sample(x, x, seed=0), strict=True))


def test_export(device):
    """A head that samples inside the exported model, for any number of rows."""

    class Head(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(inputs(device, 4, 11, 6)[1])

        def forward(self, x, seed):
            return sk.linear_sample(x, self.weight, temperature=0.7, seed=seed)

    head, rows = Head(), torch.export.Dim("rows")
    arguments = (inputs(device, 4, 11, 6)[0], torch.tensor(1, device=device))
    exported = torch.export.export(head, arguments, dynamic_shapes={"x": {0: rows}, "seed": None}).module()
    arguments = (inputs(device, 9, 11, 6)[0], torch.tensor(5, device=device))
    assert all(torch.equal(a, b) for a, b in zip(exported(*arguments), head(*arguments), strict=True))


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a weight of 64 MiB on the CPU")
def test_more_than_2_24_classes():
    """The limit of torch.multinomial on a GPU, beyond which a float32 index would skip odd classes."""
    classes = 2**24 + 5
    weight = torch.full((classes, 1), -30.0)
    weight[classes - 2] = 30.0
    with sk.use_backend("cpu"):
        index, logprob = sk.linear_sample(torch.ones(2, 1), weight, seed=0)
    assert (index == classes - 2).all()
    torch.testing.assert_close(logprob, torch.zeros(2), atol=1e-6, rtol=0)


def test_autocast_and_mixed_dtypes(device):
    x, w, bias = inputs(device, 20, 65, 16)
    with torch.autocast(device, torch.bfloat16):
        mixed = sk.linear_sample(x, w.bfloat16(), linear_bias=bias, seed=1)
    expected = sk.linear_sample(x.bfloat16(), w.bfloat16(), linear_bias=bias, seed=1)
    assert torch.equal(mixed.index, expected.index)
    with pytest.raises(TypeError, match=r"^linear_sample: linear_weight must have the dtype of input, torch\.float32"):
        sk.linear_sample(x, w.bfloat16(), seed=1)


def test_checkpoint_draws_the_same(device):
    x, w, _ = inputs(device, 11, 40, 5)
    x.requires_grad_()
    seen = []

    def step(x, seed=None):
        index, logprob = sk.linear_sample(x, w, seed=seed)
        seen.append(index)
        return logprob.sum()

    with set_checkpoint_early_stop(False):  # so that all of `step` is recomputed
        checkpoint(step, x, use_reentrant=False).backward()
        checkpoint(step, x, 5, use_reentrant=False, preserve_rng_state=False).backward()
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[2], seen[3])


@pytest.mark.skipif(torch.cuda.is_available(), reason="measures the memory of the host")
def test_no_logits(device):
    """4096 rows of 50000 classes would be 819 MB of logits."""
    x, w = torch.randn(4096, 4), torch.randn(50_000, 4)
    sk.linear_sample(x[:8], w, seed=0)
    with sk.use_backend("cpu"):
        peak, _ = memory.peak_extra(lambda: sk.linear_sample(x, w, seed=0), torch.device("cpu"))
    assert peak is None or peak < 20e6


@pytest.mark.full_for(backend="triton")
def test_opcheck(backend, device):
    x, w, bias = inputs(device, 5, 13, 4)
    ids, seed = torch.arange(5, device=device), torch.tensor(1, device=device)
    scale = torch.tensor([2.0, 1.0, 0.0, torch.inf, 0.5], device=device)
    arguments = (x, w, bias, seed, ids, scale, torch.float32, 2)
    torch.library.opcheck(module.linear_sample_fwd.raw, arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"input": [1.0]}, TypeError, "input must be a torch.Tensor; got list"),
        ({"input": torch.tensor(1.0)}, ValueError, "input must have shape"),
        ({"linear_weight": torch.randn(5, 3)}, ValueError, "linear_weight must have shape"),
        ({"linear_weight": torch.randn(0, 4)}, ValueError, "linear_weight must have at least one row"),
        ({"linear_bias": torch.randn(4)}, ValueError, "linear_bias must have shape"),
        ({"linear_bias": torch.arange(5)}, TypeError, "linear_bias must have dtype"),
        ({"temperature": -0.1}, ValueError, r"temperature must be in \[0, inf\]; got -0.1"),
        ({"temperature": math.nan}, ValueError, "temperature must be in"),
        ({"temperature": torch.tensor(1.0)}, ValueError, "temperature must have shape"),
        ({"temperature": "1"}, TypeError, "temperature must be a number; got str"),
        ({"row_ids": torch.arange(2)}, ValueError, "row_ids must have shape"),
        ({"row_ids": torch.arange(3).int()}, TypeError, "row_ids must have dtype"),
        ({"seed": 1.5}, TypeError, "seed must be an int"),
        ({"seed": 1, "generator": torch.Generator()}, ValueError, "generator must be None where seed is given"),
    ],
)
def test_errors(change, error, message):
    arguments = {"input": torch.randn(3, 4), "linear_weight": torch.randn(5, 4)} | change
    with pytest.raises(error, match=f"^linear_sample: {message}"):
        sk.linear_sample(arguments.pop("input"), arguments.pop("linear_weight"), **arguments)


@pytest.mark.parametrize("temperature", [0.0, 0.5, math.inf, "rows"])
def test_masked_classes_are_never_drawn_at_any_temperature(backend, device, temperature):
    x, w = torch.zeros(64, 1, device=device), torch.zeros(3, 1, device=device)
    bias = torch.tensor([0.0, 0.0, -math.inf], device=device).requires_grad_()
    if temperature == "rows":
        temperature = torch.tensor([0.0, 1e-40, 0.5, math.inf], device=device).repeat(16)
    index, logprob = sk.linear_sample(x, w, linear_bias=bias.detach(), temperature=temperature, seed=1)
    assert (index < 2).all()
    cold = torch.as_tensor(temperature, device=device).expand(64) < 0.1
    want = torch.where(cold, 0, -math.log(2))
    torch.testing.assert_close(logprob, want, rtol=0, atol=1e-6)
    again, learned = sk.linear_sample(x, w, linear_bias=bias, temperature=temperature, seed=1)
    assert torch.equal(again, index)
    torch.testing.assert_close(learned, want, rtol=0, atol=1e-6)
    (grad,) = torch.autograd.grad(learned.sum(), bias)
    assert grad.isfinite().all()
    assert grad[2] == 0


@pytest.mark.full_for(backend=("triton", "reference"))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_draws_from_float32_products(backend, device, dtype):
    """Chi-square; products rounded to bfloat16 would merge classes: chi2(7) = 4659 at 200,000 draws."""
    rows = 4000 if backend == "triton" else 20_000
    x = torch.tensor([[64.0, 0.125]], dtype=dtype, device=device).expand(rows, 2)
    w = torch.stack([torch.ones(8), torch.arange(8.0)], 1).to(device, dtype)
    drawn = sk.linear_sample(x, w, seed=9)
    p = (torch.arange(8.0).double() / 8).softmax(0)
    counts = torch.bincount(drawn.index.cpu(), minlength=8).double()
    assert float(((counts - rows * p) ** 2 / (rows * p)).sum()) < chi_square_limit(7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [1, 5, 66, 2600])
def test_temperature_zero_is_the_argmax(backend, device, vocab, dtype):
    g = torch.Generator().manual_seed(vocab)
    x, w = torch.ones(9, 1), torch.randint(-3, 4, (vocab, 1), generator=g).float()  # many ties
    x[4] = -1.0
    x, w = x.to(device, dtype), w.to(device, dtype)
    bias = torch.zeros(vocab, device=device)
    bias[0] = -math.inf if vocab > 1 else 0.0
    index, logprob = sk.linear_sample(x, w, linear_bias=bias, temperature=0, seed=3)
    assert torch.equal(index, (x.double() @ w.double().t() + bias).argmax(1))
    assert not logprob.any()
    x[2] = math.nan
    assert sk.linear_sample(x, w, temperature=0.0, seed=3).logprob.isnan().nonzero().tolist() == [[2]]
    nothing = sk.linear_sample(x, w, linear_bias=bias - math.inf, temperature=0.0, seed=3)
    assert nothing.logprob.isnan().all()
    assert (nothing.index == 0).all()


def test_a_temperature_for_each_row(backend, device):
    x, w, bias = inputs(device, 12, 70, 8)
    temperatures = [0.0, 0.3, 1.0, math.inf]
    given = torch.tensor(temperatures, device=device).repeat(3)
    index, logprob = sk.linear_sample(
        x.view(3, 4, 8), w, linear_bias=bias, temperature=given.view(3, 4).double(), seed=5
    )
    for i, temperature in enumerate(temperatures):
        want = sk.linear_sample(x, w, linear_bias=bias, temperature=temperature, seed=5)
        assert torch.equal(index[:, i], want.index.view(3, 4)[:, i])
        torch.testing.assert_close(logprob[:, i], want.logprob.view(3, 4)[:, i])


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("rows", [True, False])
def test_gradient_with_temperatures_and_samples(backend, device, rows, with_bias):
    tensors = inputs(device, 10, 31, 7)
    leaves = [t.detach().requires_grad_() for t in tensors[: 2 + with_bias]]
    x, w, *bias = leaves
    temperature = torch.tensor([0.0, 0.4, 1.0, 2.0, math.inf], device=device).repeat(2) if rows else 0.6
    index, logprob = sk.linear_sample(
        x, w, linear_bias=bias[0] if bias else None, temperature=temperature, num_samples=3, seed=4
    )
    assert index.shape == logprob.shape == (10, 3)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    logits = exact[0] @ exact[1].t() + (exact[2] if bias else 0)
    inverse = 1 / torch.as_tensor(temperature, device=device).double().expand(10)
    greedy = inverse.isinf()[:, None]
    want = (logits * torch.where(greedy[:, 0], 1, inverse)[:, None]).log_softmax(1).gather(1, index)
    want = torch.where(greedy, 0, want)
    torch.testing.assert_close(logprob.double(), want, rtol=0, atol=1e-5)
    weights = torch.randn(10, 3, device=device)
    expected = torch.autograd.grad(want, exact, weights.double())
    for got, e in zip(torch.autograd.grad(logprob, leaves, weights), expected, strict=True):
        torch.testing.assert_close(got.double(), e, rtol=1e-4, atol=1e-5)


def test_draws_use_the_noise_of_the_stream(backend, device):
    x, w, bias = inputs(device, 6, 300, 9)
    ids = torch.tensor([4, 9, 2, 0, 7, 5], device=device)
    drawn = sk.linear_sample(x.view(2, 3, 9), w, linear_bias=bias, num_samples=4, row_ids=ids.view(2, 3), seed=8)
    assert drawn.index.shape == drawn.logprob.shape == (2, 3, 4)
    logits = exact_logits(x, w, bias, 1.0)
    for k in range(4):
        noise = sk.random_gumbel(logits.shape, 8, row_ids=ids, sample=k, device=device).double()
        assert torch.equal(drawn.index.view(6, 4)[:, k], (logits + noise).argmax(1))
        want = logits.log_softmax(1).gather(1, drawn.index.view(6, 4)[:, k, None])[:, 0]
        torch.testing.assert_close(drawn.logprob.view(6, 4)[:, k].double(), want, rtol=0, atol=1e-5)
    single = sk.linear_sample(x, w, linear_bias=bias, num_samples=1, row_ids=ids, seed=8)
    assert torch.equal(single.index[:, 0], drawn.index.view(6, 4)[:, 0])


def test_wrong_temperatures_and_numbers_of_samples(backend, device):
    x, w, _ = inputs(device, 4, 5, 2)
    for temperature, kind, message in (
        (-1.0, ValueError, r"temperature must be in \[0, inf\]; got -1"),
        (math.nan, ValueError, r"temperature must be in \[0, inf\]; got nan"),
        (torch.ones(3, device=device), ValueError, "temperature must have shape"),
        (torch.ones(4, device=device).requires_grad_(), ValueError, "temperature must not require grad"),
        (torch.ones(4, device=device, dtype=torch.int64), TypeError, "temperature must have dtype"),
    ):
        with pytest.raises(kind, match="linear_sample: " + message):
            sk.linear_sample(x, w, temperature=temperature)
    wrong = torch.tensor([1.0, 1.0, -0.5, math.nan], device=device)
    if device == "cpu":
        with pytest.raises(
            ValueError, match=r"temperature must be in \[0, inf\] in every row; got another value in row 2"
        ):
            sk.linear_sample(x, w, temperature=wrong)
    else:
        assert sk.linear_sample(x, w, temperature=wrong).logprob.isnan().tolist() == [False, False, True, True]
    with pytest.raises(ValueError, match="num_samples must be at least 1; got 0"):
        sk.linear_sample(x, w, num_samples=0)
