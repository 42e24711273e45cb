"""The Triton row kernels and streamed linear cross-entropy against the reference in float64."""

import itertools

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton
import triton.language as tl

from sslkernels.ops.rows import ReferenceRows, RowOptions, RowOutputs
from sslkernels.triton_kernels import cross_entropy as row_launcher
from sslkernels.triton_kernels import linear_cross_entropy as stream_launcher
from sslkernels.triton_kernels import numerics
from sslkernels.triton_kernels.cross_entropy import TritonRows
from sslkernels.triton_kernels.linear_cross_entropy import config as stream_config
from sslkernels.triton_kernels.linear_cross_entropy import split_vocab, stream_forward

# The interpreter computes with NumPy, which warns where a device gives inf or NaN in silence.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PLAIN = RowOptions(-100, 0.0, 0.0, 0.0)
EVERY = RowOptions(-100, 0.125, 2.0**-10, 3.0, 0.75)
EPS32 = torch.finfo(torch.float32).eps


def make(device, count, vocab, dtype=torch.float32, *, seed=0, scale=2.0, pitch=None, index_dtype=torch.int64):
    """Logits, targets (one ignored where there are three or more), bias, class weights, coefficients."""
    generator = torch.Generator().manual_seed(seed)
    storage = torch.randn(count, pitch or vocab, generator=generator, dtype=torch.float64) * scale
    logits = storage.to(device, dtype)[:, :vocab]
    target = torch.randint(0, vocab, (count,), generator=generator).to(device, index_dtype)
    if count > 2:
        target[1] = -100
    bias = torch.randn(vocab, generator=generator).to(device)
    weight = torch.rand(vocab, generator=generator).to(device) + 0.1
    coefficient = torch.rand(count, generator=generator).to(device) + 0.5
    return logits, target, bias, weight, coefficient


def oracle(logits, target, bias, weight, options, coefficient=None, stats=True):
    """The reference in float64 and its gradient."""
    wide = [None if t is None else t.double() for t in (bias, weight)]
    grad = None if coefficient is None else torch.empty(logits.shape, dtype=torch.float64, device=logits.device)
    outputs = ReferenceRows().forward(
        logits.double(), target, *wide, options, stats=stats, coefficient=coefficient, grad=grad
    )
    return outputs, grad


def assert_near(got: Tensor, want: Tensor, tolerance: float, what: str, scale: Tensor | float = 1.0) -> None:
    """|got - want| <= tolerance * (|want| + scale), and the same NaNs and infinities."""
    got, want = got.double(), want.double()
    assert torch.equal(got.isnan(), want.isnan()), what
    assert torch.equal(got[got.isinf()], want[want.isinf()]), what
    finite = want.isfinite()
    error = (got - want).abs()[finite]
    bound = tolerance * (want.abs() + scale)[finite]
    assert bool((error <= bound).all()), f"{what}: {float((error / bound).max()):.3g} times the tolerance"


def assert_outputs(got, want: RowOutputs, tolerance: float, *, stats: bool) -> None:
    """lse is compared in place of row_max and sum_exp; the terms of a loss are of the size of its largest |z|."""
    assert type(got) is tuple
    scale = 1.0 + want.row_max.abs()
    assert_near(got[1] + got[2].log(), want.row_max + want.sum_exp.log(), tolerance, "lse")
    assert_near(got[3], want.logprob, tolerance, "logprob")
    assert_near(got[0], want.loss, tolerance, "loss", scale)
    if stats:
        assert got[4].dtype == torch.int64
        assert torch.equal(got[4].cpu(), want.prediction.cpu())
        assert_near(got[5], want.entropy, tolerance, "entropy", scale)
    else:
        assert got[4].numel() == got[5].numel() == 0


def tolerance_of(dtype: torch.dtype) -> float:
    """Of results: the accumulation dtype's rounding, some ulp for exp, log and sums in blocks."""
    return 1e-13 if dtype == torch.float64 else 16 * EPS32


def assert_gradient(got: Tensor, want: Tensor, coefficient: Tensor, tolerance: float | None = None) -> None:
    """To the accumulation's error relative to the row's coefficient, and half an ulp of rounding."""
    accumulation = tolerance_of(got.dtype) if tolerance is None else tolerance
    info = torch.finfo(got.dtype)
    rounding = 0 if got.dtype in (torch.float32, torch.float64) else 0.5 * info.eps
    bound = accumulation * coefficient.double().abs().unsqueeze(1) + rounding * want.abs() + info.smallest_normal
    assert torch.equal(got.isnan().cpu(), want.isnan().cpu())
    finite = want.isfinite()
    error = (got.double() - want).abs()
    assert bool((error <= bound)[finite].all()), float((error / bound)[finite].max())


def check(logits, target, bias, weight, options, coefficient, *, stats=True, gradient_tolerance=None):
    """Forward alone, forward with gradient apart and in place, and backward."""
    want, want_grad = oracle(logits, target, bias, weight, options, coefficient, stats)
    tolerance = tolerance_of(logits.dtype)
    call = (target, bias, weight, options)
    before = logits.clone()
    rows = TritonRows()
    alone = rows.forward(logits, *call, stats=stats)
    assert_outputs(alone, want, tolerance, stats=stats)

    grad = torch.full_like(logits, 7.0)
    assert_outputs(
        rows.forward(logits, *call, stats=stats, coefficient=coefficient, grad=grad), want, tolerance, stats=stats
    )
    assert_gradient(grad, want_grad, coefficient, gradient_tolerance)
    grad.fill_(7.0)
    rows.backward(logits, *call, alone, coefficient, grad)
    assert_gradient(grad, want_grad, coefficient, gradient_tolerance)
    assert torch.equal(logits.nan_to_num(5.0), before.nan_to_num(5.0)), "the logits changed"

    in_place = torch.empty_strided(logits.shape, logits.stride(), dtype=logits.dtype, device=logits.device)
    in_place.copy_(logits)
    rows.forward(in_place, *call, stats=stats, coefficient=coefficient, grad=in_place)
    assert_gradient(in_place, want_grad, coefficient, gradient_tolerance)
    in_place.copy_(logits)
    rows.backward(in_place, *call, alone, coefficient, in_place)
    assert_gradient(in_place, want_grad, coefficient, gradient_tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [1, 2, 7, 33, 257, 1003, 9001])
@pytest.mark.parametrize("options", [PLAIN, EVERY], ids=["plain", "every"])
def test_widths(device, dtype, vocab, options):
    logits, target, bias, weight, coefficient = make(device, 4, vocab, dtype)
    bias, weight = (None, None) if options is PLAIN else (bias, weight)
    check(logits, target, bias, weight, options, coefficient, stats=options is EVERY)


@pytest.mark.parametrize(
    "options",
    [
        PLAIN._replace(label_smoothing=0.1),
        PLAIN._replace(label_smoothing=1.0),
        PLAIN._replace(z_loss=1e-3),
        PLAIN._replace(softcap=2.0),
        PLAIN._replace(softcap=30.0),
        PLAIN._replace(logit_scale=0.3),
        PLAIN._replace(logit_scale=-1.5),
    ],
    ids=["smoothing", "uniform", "z_loss", "softcap", "wide-softcap", "scale", "negative-scale"],
)
@pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("with_weight", [False, True], ids=["", "weight"])
def test_options(device, options, with_bias, with_weight):
    logits, target, bias, weight, coefficient = make(device, 3, 101)
    bias, weight = bias if with_bias else None, weight if with_weight else None
    check(logits, target, bias, weight, options, coefficient)


@pytest.mark.parametrize("stats", [False, True])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_targets_and_ignored_values(device, stats, index_dtype):
    logits, target, *_, coefficient = make(device, 5, 67, index_dtype=index_dtype)
    target[3] = 12
    check(logits, target, None, None, PLAIN._replace(ignore_index=12), coefficient, stats=stats)


@pytest.mark.parametrize(("bias_dtype", "weight_dtype"), list(itertools.product(DTYPES[:3], repeat=2)), ids=str)
def test_dtypes_of_bias_and_weight(device, bias_dtype, weight_dtype):
    logits, target, bias, weight, coefficient = make(device, 3, 45, torch.bfloat16)
    check(logits, target, bias.to(bias_dtype), weight.to(weight_dtype), EVERY, coefficient)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("vocab", "pitch"), [(100, 128), (101, 128), (101, 107), (9001, 9024)])
def test_pitch(device, dtype, vocab, pitch):
    """Rows further apart than they are wide: what lies between is left alone."""
    logits, target, *_, coefficient = make(device, 4, vocab, dtype, pitch=pitch)
    check(logits, target, None, None, PLAIN, coefficient, stats=False)
    gap = logits.as_strided((4, pitch), (pitch, 1))[:-1, vocab:]
    before = gap.clone()
    TritonRows().forward(logits, target, None, None, PLAIN, stats=False, coefficient=coefficient, grad=logits)
    assert torch.equal(gap, before)


@pytest.mark.parametrize("offset", [1, 3])
def test_logits_that_start_at_no_multiple_of_16_bytes(device, offset):
    storage, target, *_, coefficient = make(device, 4, 104, torch.bfloat16)
    logits = storage.reshape(-1)[offset:].as_strided((3, 101), (101, 1))
    check(logits, target[:3], None, None, PLAIN, coefficient[:3])


def test_no_rows(device):
    for options in (PLAIN, EVERY):
        logits, target, bias, weight, coefficient = make(device, 0, 33)
        outputs = TritonRows().forward(
            logits, target, bias, weight, options, stats=True, coefficient=coefficient, grad=logits
        )
        assert [tuple(o.shape) for o in outputs] == [(0,)] * 6
        TritonRows().backward(logits, target, bias, weight, options, outputs, coefficient, logits)


def test_one_row(device):
    logits, target, bias, weight, coefficient = make(device, 1, 257)
    check(logits, target, bias, weight, EVERY, coefficient)


def test_all_ignored(device):
    """Rows of NaN that are ignored are never read: everything is zero."""
    logits, target, bias, weight, coefficient = make(device, 3, 131)
    target.fill_(-100)
    logits.fill_(float("nan"))
    outputs = TritonRows().forward(
        logits, target, bias, weight, EVERY, stats=True, coefficient=coefficient, grad=logits
    )
    for output, value in zip(outputs, (0, 0, 1, 0, -1, 0), strict=True):
        assert bool((output == value).all())
    assert bool((logits == 0).all())


@pytest.mark.parametrize("wrong", [-1, 33, 2**31 - 1, -(2**31), 2**40, -(2**62)])
@pytest.mark.parametrize("options", [PLAIN, EVERY], ids=["plain", "every"])
def test_target_out_of_range(device, wrong, options):
    logits, target, bias, weight, coefficient = make(device, 4, 33)
    target[2] = wrong
    check(logits, target, bias, weight, options, coefficient)
    outputs = TritonRows().forward(logits, target, bias, weight, options, stats=False)
    assert outputs[0].isnan().tolist() == outputs[3].isnan().tolist() == [False, False, True, False]


@pytest.mark.parametrize("options", [PLAIN, PLAIN._replace(label_smoothing=0.1)], ids=["plain", "smoothing"])
def test_large_common_offset(device, options):
    """A shift by 8192, which float32 logits of few bits take without rounding, changes nothing but the lse."""
    logits, target, _, weight, coefficient = make(device, 4, 515)
    logits = (logits * 64).round() / 64
    near, far = torch.empty_like(logits), torch.empty_like(logits)
    call = (target, None, weight, options)
    want = TritonRows().forward(logits, *call, stats=True, coefficient=coefficient, grad=near)
    got = TritonRows().forward(logits + 8192, *call, stats=True, coefficient=coefficient, grad=far)
    for i in (0, 2, 3, 4, 5):
        assert_near(got[i], want[i], 4 * EPS32, RowOutputs._fields[i])
    assert_gradient(far, near.double(), coefficient, 4 * EPS32)
    check(logits + 1e4, *call, coefficient, gradient_tolerance=tolerance_of(torch.float32))


@pytest.mark.parametrize("vocab", [2, 33, 5000])
@pytest.mark.parametrize("lead", [5.0, 17.0, 30.0, 60.0])
def test_confident_target(device, vocab, lead):
    """The loss keeps its digits where 1 - p is far below the rounding of p."""
    logits, target, *_, coefficient = make(device, 3, vocab, scale=0.25)
    target[1] = 1
    logits.scatter_(1, target.unsqueeze(1), lead)
    want, want_grad = oracle(logits, target, None, None, PLAIN, coefficient)
    for write in (False, True):
        grad = torch.empty_like(logits)
        outputs = TritonRows().forward(
            logits,
            target,
            None,
            None,
            PLAIN,
            stats=False,
            **({"coefficient": coefficient, "grad": grad} if write else {}),
        )
        if not write:
            TritonRows().backward(logits, target, None, None, PLAIN, outputs, coefficient, grad)
        assert_near(outputs[0], want.loss, 1e-5, "loss", 0.0)
        assert_near(grad, want_grad, 1e-5, "gradient", 0.0)


@pytest.mark.parametrize("vocab", [40, 4500])
@pytest.mark.parametrize(
    "options",
    [PLAIN, PLAIN._replace(label_smoothing=0.1), PLAIN._replace(softcap=5.0)],
    ids=["plain", "smoothing", "softcap"],
)
def test_minus_infinity(device, vocab, options):
    """Masked classes; a masked target; a row whose first tile is masked."""
    logits, target, _, weight, coefficient = make(device, 5, vocab)
    target.copy_(torch.tensor([vocab - 1, 3, vocab - 1, 2, 1]))
    logits[0, ::3] = float("-inf")
    logits[0, vocab - 1] = 1.0
    logits[1, 3] = float("-inf")
    logits[2, : vocab - 10] = float("-inf")
    logits[4] = float("-inf")
    masked = weight.masked_fill(logits[2].isneginf(), 0.0)
    for class_weight in (None, weight, masked):
        check(logits, target, None, class_weight, options, coefficient)


@pytest.mark.parametrize("vocab", [40, 4500])
@pytest.mark.parametrize("at", [0, 5, 39])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_rows_stay_apart(device, vocab, at, value):
    logits, target, bias, weight, coefficient = make(device, 4, vocab)
    logits[2, at] = value
    target[2] = 5
    options = EVERY._replace(softcap=0.0)
    check(logits, target, bias, weight, options, coefficient)
    outputs = TritonRows().forward(logits, target, bias, weight, options, stats=True)
    assert outputs[0].isnan().tolist() == [False, False, True, False]


def test_prediction_is_the_lowest_of_equals(device):
    for vocab in (33, 9001):
        logits, target, *_ = make(device, 4, vocab)
        logits[0] = 0.0
        logits[2, 7::3] = 9.0
        logits[3, -2:] = 9.0
        outputs = TritonRows().forward(logits, target, None, None, PLAIN, stats=True)
        assert outputs[4].tolist() == [0, -1, 7, vocab - 2]


def test_bitwise_repeatable(device):
    logits, target, bias, weight, coefficient = make(device, 4, 9001, torch.bfloat16)
    runs = []
    for _ in range(2):
        grad = torch.empty_like(logits)
        outputs = TritonRows().forward(
            logits, target, bias, weight, EVERY, stats=True, coefficient=coefficient, grad=grad
        )
        runs.append((*outputs, grad))
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_configuration_covers_every_row(dtype):
    for vocab, plain, write in itertools.product(
        (1, 63, 64, 65, 4096, 4097, 50265, 2**20), (True, False), (True, False)
    ):
        chosen = row_launcher.config(vocab, dtype, plain=plain, write_grad=write)
        assert chosen.constexprs["BLOCK"] >= (vocab if chosen.constexprs["ONE_TILE"] else 1)
        assert 32 * chosen.options["num_warps"] <= 1024


@triton.jit
def _numerics_kernel(x, out, FUNCTION: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    value = tl.load(x + at)
    if FUNCTION == "tanh":
        tl.store(out + at, numerics.tanh(value))
    elif FUNCTION == "log1p":
        tl.store(out + at, numerics.log1p(value))
    else:
        tl.store(out + at, numerics.expm1(value))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("function", "sign"), [("tanh", 1), ("tanh", -1), ("log1p", 1), ("expm1", -1)])
def test_numerics(device, dtype, function, sign):
    x = sign * torch.logspace(-30, 2, 4096, dtype=torch.float64, device=device).to(dtype)
    x[0] = 0.0
    x[-1] = sign * (50.0 if function == "log1p" else float("inf"))
    out = torch.empty_like(x)
    _numerics_kernel[(1,)](x, out, FUNCTION=function, BLOCK=4096)
    assert_near(out, getattr(torch, function)(x.double()), 8 * torch.finfo(dtype).eps, function, 0.0)


def linear_case(device, count, vocab, dim, dtype=torch.float32):
    generator = torch.Generator().manual_seed(count + vocab)
    input = torch.randn(count, dim, generator=generator).to(device, dtype)
    linear_weight = (torch.randn(vocab, dim, generator=generator) * 2 / dim**0.5).to(device, dtype)
    _, target, bias, weight, _ = make(device, count, vocab)
    return input, linear_weight, target, bias, weight


@pytest.fixture(params=["one", "many"])
def tiles_of_a_split(request, monkeypatch):
    """Few rows on many processors make a split of every tile; on one, they make splits of several tiles."""
    if request.param == "many":
        monkeypatch.setattr(stream_launcher, "processors", lambda tensor: 1)


def check_linear(input, linear_weight, target, bias, weight, options, *, stats=True):
    logits = input.double() @ linear_weight.double().T
    want, _ = oracle(logits, target, bias, weight, options, stats=stats)
    got = stream_forward(input, linear_weight, target, bias, weight, options, stats=stats)
    assert_outputs(got, want, 32 * EPS32, stats=stats)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize(
    ("count", "vocab", "dim"), [(1, 1, 1), (3, 7, 16), (33, 129, 50), (150, 300, 64), (5, 2003, 8)]
)
def test_stream_shapes(device, dtype, count, vocab, dim, tiles_of_a_split):
    case = linear_case(device, count, vocab, dim, dtype)
    check_linear(*case, EVERY)
    check_linear(*case[:3], None, None, PLAIN, stats=False)


@pytest.mark.parametrize(
    "options",
    [
        PLAIN._replace(label_smoothing=0.1),
        PLAIN._replace(z_loss=1e-3),
        PLAIN._replace(softcap=2.0),
        PLAIN._replace(logit_scale=-1.5),
    ],
    ids=["smoothing", "z_loss", "softcap", "negative-scale"],
)
@pytest.mark.parametrize("with_weight", [False, True], ids=["", "weight"])
def test_stream_options(device, options, with_weight):
    input, linear_weight, target, bias, weight = linear_case(device, 9, 301, 24)
    for bias_or_none in (None, bias):
        check_linear(input, linear_weight, target, bias_or_none, weight if with_weight else None, options)


def test_stream_special_rows(device, tiles_of_a_split):
    """Ignored, out of range, NaN, a masked class, a masked target, a whole tile masked, no rows."""
    input, linear_weight, target, bias, weight = linear_case(device, 20, 301, 24)
    target[3], target[4], target[5], target[6] = 301, -1, 2**40, 250
    input[7] = float("nan")
    bias[:192] = float("-inf")
    bias[250] = float("-inf")
    for options in (PLAIN, PLAIN._replace(label_smoothing=0.1), PLAIN._replace(softcap=4.0)):
        check_linear(input, linear_weight, target, bias, None, options)
        check_linear(input, linear_weight, target, bias, weight.masked_fill(bias.isneginf(), 0.0), options)
    target.fill_(-100)
    check_linear(input, linear_weight, target, bias, weight, EVERY)
    outputs = stream_forward(input[:0], linear_weight, target[:0], bias, weight, EVERY, stats=True)
    assert [tuple(o.shape) for o in outputs] == [(0,)] * 6


def test_stream_confident_target(device):
    input, linear_weight, target, *_ = linear_case(device, 6, 301, 24)
    linear_weight *= 0.1
    target.copy_(torch.tensor([0, 1, 100, 200, 299, 300]))
    bias = torch.zeros(301, device=device)
    for row in range(6):
        bias.zero_()[target[row]] = 30.0
        want, _ = oracle(input.double() @ linear_weight.double().T, target, bias, None, PLAIN)
        got = stream_forward(input, linear_weight, target, bias, None, PLAIN, stats=False)
        assert_near(got[0][row], want.loss[row], 1e-5, "loss", 0.0)


def test_stream_row_index(device):
    input, linear_weight, target, bias, weight = linear_case(device, 40, 150, 24)
    index = torch.tensor([5, 0, 39, -1, 1, 17], device=device)
    for index_dtype in (torch.int32, torch.int64):
        got = stream_forward(
            input, linear_weight, target, bias, weight, EVERY, stats=True, row_index=index.to(index_dtype)
        )
        rows = index.clamp(min=0)
        wanted = torch.where(index < 0, -100, target[rows])
        want, _ = oracle(input[rows].double() @ linear_weight.double().T, wanted, bias, weight, EVERY)
        assert_outputs(got, want, 32 * EPS32, stats=True)


def test_stream_strided_operands(device):
    input, linear_weight, target, bias, weight = linear_case(device, 9, 150, 48)
    check_linear(input[:, :31], linear_weight[:, :31], target, bias, weight, EVERY)


def test_stream_rejects_float64(device):
    case = linear_case(device, 3, 7, 4, torch.float64)
    with pytest.raises(TypeError, match="float64"):
        stream_forward(*case, PLAIN, stats=False)


def test_splits_cover_the_vocabulary():
    for count, vocab, processors in itertools.product((1, 100, 8192, 10**6), (1, 129, 30522, 256000), (1, 108, 132)):
        chosen = stream_config(count, 768, torch.bfloat16, (9, 0), plain=True)
        splits, per_split = split_vocab(count, vocab, chosen, processors)
        tiles = -(-vocab // chosen.constexprs["BLOCK_V"])
        assert (splits - 1) * per_split < tiles <= splits * per_split


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [30522, 50265, 128256, 250002])
@pytest.mark.parametrize("options", [PLAIN, EVERY], ids=["plain", "every"])
def test_real_rows(device, dtype, vocab, options):
    logits, target, bias, weight, coefficient = make(device, 300, vocab, dtype)
    bias, weight = (None, None) if options is PLAIN else (bias, weight)
    check(logits, target, bias, weight, options, coefficient, stats=options is EVERY)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize(("count", "vocab", "dim"), [(2048, 30522, 768), (513, 50265, 1024), (64, 250002, 770)])
@pytest.mark.parametrize("options", [PLAIN, EVERY], ids=["plain", "every"])
def test_real_stream(device, dtype, count, vocab, dim, options):
    input, linear_weight, target, bias, weight = linear_case(device, count, vocab, dim, dtype)
    check_linear(input, linear_weight, target, bias, weight, options, stats=False)


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements(device):
    vocab = 50265
    count = 2**31 // vocab + 3
    logits = torch.zeros(count, vocab, dtype=torch.bfloat16, device=device)
    logits[-2:] = torch.randn(2, vocab, device=device)
    target = torch.full((count,), -100, device=device)
    target[-2:] = 77
    coefficient = torch.ones(count, device=device)
    want, want_grad = oracle(logits[-2:], target[-2:], None, None, PLAIN, coefficient[-2:])
    got = TritonRows().forward(logits, target, None, None, PLAIN, stats=True, coefficient=coefficient, grad=logits)
    assert_outputs(tuple(o[-2:] for o in got), want, tolerance_of(torch.float32), stats=True)
    assert_gradient(logits[-2:], want_grad, coefficient[-2:])
