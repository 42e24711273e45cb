"""The Triton row kernels of cross-entropy against the reference in float64."""

import itertools

import pytest
import torch
from kernel_files import kernels

pytest.importorskip("triton")

import triton
import triton.language as tl
from row_oracle import (
    DTYPES,
    EPS32,
    EVERY,
    PLAIN,
    assert_gradient,
    assert_near,
    assert_outputs,
    make,
    oracle,
    tolerance_of,
)

from sslkernels.core.triton import numerics
from sslkernels.vocabulary.softmax_rows import RowOutputs, TritonRows
from sslkernels.vocabulary.triton import softmax_rows as row_launcher

# The interpreter computes with NumPy, which warns where a device gives inf or NaN in silence.
pytestmark = [pytest.mark.pairwise, pytest.mark.filterwarnings("ignore::RuntimeWarning")]


def check(logits, target, bias, weight, options, coefficient, *, stats=True, gradient_tolerance=None):
    """Forward alone, forward with the gradient out of place and in place, and backward."""
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
    rows.backward(logits, *call, alone.state, coefficient, grad)
    assert_gradient(grad, want_grad, coefficient, gradient_tolerance)
    assert torch.equal(logits.nan_to_num(5.0), before.nan_to_num(5.0)), "the logits changed"

    in_place = torch.empty_strided(logits.shape, logits.stride(), dtype=logits.dtype, device=logits.device)
    in_place.copy_(logits)
    rows.forward(in_place, *call, stats=stats, coefficient=coefficient, grad=in_place)
    assert_gradient(in_place, want_grad, coefficient, gradient_tolerance)
    in_place.copy_(logits)
    rows.backward(in_place, *call, alone.state, coefficient, in_place)
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
    """A row pitch larger than the width: the padding between rows is not written."""
    logits, target, *_, coefficient = make(device, 4, vocab, dtype, pitch=pitch)
    check(logits, target, None, None, PLAIN, coefficient, stats=False)
    gap = logits.as_strided((4, pitch), (pitch, 1))[:-1, vocab:]
    before = gap.clone()
    TritonRows().forward(logits, target, None, None, PLAIN, stats=False, coefficient=coefficient, grad=logits)
    assert torch.equal(gap, before)


@pytest.mark.parametrize("offset", [1, 3])
def test_unaligned_logits(device, offset):
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
        TritonRows().backward(logits, target, bias, weight, options, outputs.state, coefficient, logits)


def test_one_row(device):
    logits, target, bias, weight, coefficient = make(device, 1, 257)
    check(logits, target, bias, weight, EVERY, coefficient)


def test_all_ignored(device):
    """Ignored rows are never read: all outputs are zero although the logits are NaN."""
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
    assert outputs.loss.isnan().tolist() == outputs.logprob.isnan().tolist() == [False, False, True, False]


@pytest.mark.parametrize("options", [PLAIN, PLAIN._replace(label_smoothing=0.1)], ids=["plain", "smoothing"])
def test_large_common_offset(device, options):
    """Adding 8192, exact for these float32 logits of few bits, changes only the lse."""
    logits, target, _, weight, coefficient = make(device, 4, 515)
    logits = (logits * 64).round() / 64
    near, far = torch.empty_like(logits), torch.empty_like(logits)
    call = (target, None, weight, options)
    want = TritonRows().forward(logits, *call, stats=True, coefficient=coefficient, grad=near)
    got = TritonRows().forward(logits + 8192, *call, stats=True, coefficient=coefficient, grad=far)
    for name in RowOutputs._fields:
        if name != "row_max":
            assert_near(getattr(got, name), getattr(want, name), 4 * EPS32, name)
    assert_gradient(far, near.double(), coefficient, 4 * EPS32)
    check(logits + 1e4, *call, coefficient, gradient_tolerance=tolerance_of(torch.float32))


@pytest.mark.parametrize("vocab", [2, 33, 5000])
@pytest.mark.parametrize("lead", [5.0, 17.0, 30.0, 60.0])
def test_confident_target(device, vocab, lead):
    """The loss keeps its digits if 1 - p is far below the rounding of p."""
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
            TritonRows().backward(logits, target, None, None, PLAIN, outputs.state, coefficient, grad)
        assert_near(outputs.loss, want.loss, 1e-5, "loss", 0.0)
        assert_near(grad, want_grad, 1e-5, "gradient", 0.0)


@pytest.mark.parametrize("vocab", [40, 4500])
@pytest.mark.parametrize(
    "options",
    [PLAIN, PLAIN._replace(label_smoothing=0.1), PLAIN._replace(softcap=5.0)],
    ids=["plain", "smoothing", "softcap"],
)
def test_minus_infinity(device, vocab, options):
    """Masked classes, a masked target, and a row whose first tile is masked."""
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
def test_non_finite_rows_do_not_affect_others(device, vocab, at, value):
    logits, target, bias, weight, coefficient = make(device, 4, vocab)
    logits[2, at] = value
    target[2] = 5
    options = EVERY._replace(softcap=0.0)
    check(logits, target, bias, weight, options, coefficient)
    outputs = TritonRows().forward(logits, target, bias, weight, options, stats=True)
    assert outputs.loss.isnan().tolist() == [False, False, True, False]


def test_ties_of_the_prediction_go_to_the_lowest_index(device):
    for vocab in (33, 9001):
        logits, target, *_ = make(device, 4, vocab)
        logits[0] = 0.0
        logits[2, 7::3] = 9.0
        logits[3, -2:] = 9.0
        outputs = TritonRows().forward(logits, target, None, None, PLAIN, stats=True)
        assert outputs.prediction.tolist() == [0, -1, 7, vocab - 2]


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


@kernels("cross_entropy")
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [30522, 50265, 128256, 250002])
@pytest.mark.parametrize("options", [PLAIN, EVERY], ids=["plain", "every"])
def test_real_rows(device, dtype, vocab, options):
    logits, target, bias, weight, coefficient = make(device, 300, vocab, dtype)
    bias, weight = (None, None) if options is PLAIN else (bias, weight)
    check(logits, target, bias, weight, options, coefficient, stats=options is EVERY)


@kernels("cross_entropy")
@pytest.mark.large
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
    assert_outputs((o[-2:] for o in got), want, tolerance_of(torch.float32), stats=True)
    assert_gradient(logits[-2:], want_grad, coefficient[-2:])
