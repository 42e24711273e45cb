"""Triton's streaming linear cross-entropy, which materialises no logits, against the reference in float64."""

import itertools

import pytest
import torch
from kernel_files import kernels

pytest.importorskip("triton")

from row_oracle import DTYPES, EPS32, EVERY, PLAIN, assert_near, assert_outputs, make, oracle

from sslkernels.core.triton.products import splits
from sslkernels.vocabulary.softmax_rows import empty_outputs
from sslkernels.vocabulary.triton import linear_cross_entropy as stream_launcher
from sslkernels.vocabulary.triton.linear_cross_entropy import config as stream_config
from sslkernels.vocabulary.triton.linear_cross_entropy import stream_forward

# The interpreter computes with NumPy, which warns where a device gives inf or NaN in silence.
pytestmark = [pytest.mark.pairwise, pytest.mark.filterwarnings("ignore::RuntimeWarning")]


def linear_case(device, count, vocab, dim, dtype=torch.float32):
    generator = torch.Generator().manual_seed(count + vocab)
    input = torch.randn(count, dim, generator=generator).to(device, dtype)
    linear_weight = (torch.randn(vocab, dim, generator=generator) * 2 / dim**0.5).to(device, dtype)
    _, target, bias, weight, _ = make(device, count, vocab)
    return input, linear_weight, target, bias, weight


@pytest.fixture(params=["one", "many"])
def tiles_per_split(request, monkeypatch):
    """Few rows on many multiprocessors: one tile per split. On one multiprocessor: several tiles per split."""
    if request.param == "many":
        monkeypatch.setattr(stream_launcher, "processors", lambda tensor: 1)


def stream(input, linear_weight, target, bias, weight, options, *, stats, row_index=None):
    row_index = torch.arange(target.shape[0], device=target.device) if row_index is None else row_index
    outputs = empty_outputs(input, row_index.shape[0], stats)
    stream_forward(input, linear_weight, target, bias, weight, outputs, options, stats, row_index=row_index)
    return outputs


def check_linear(input, linear_weight, target, bias, weight, options, *, stats=True):
    logits = input.double() @ linear_weight.double().T
    want, _ = oracle(logits, target, bias, weight, options, stats=stats)
    got = stream(input, linear_weight, target, bias, weight, options, stats=stats)
    assert_outputs(got, want, 32 * EPS32, stats=stats)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize(
    ("count", "vocab", "dim"), [(1, 1, 1), (3, 7, 16), (33, 129, 50), (150, 300, 64), (5, 2003, 8)]
)
def test_stream_shapes(device, dtype, count, vocab, dim, tiles_per_split):
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


def test_stream_special_rows(device, tiles_per_split):
    """Ignored and out-of-range targets, NaN, masked classes, a masked target, a fully masked tile, no rows."""
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
    outputs = stream(input[:0], linear_weight, target[:0], bias, weight, EVERY, stats=True)
    assert [tuple(o.shape) for o in outputs] == [(0,)] * 6


def test_stream_confident_target(device):
    input, linear_weight, target, *_ = linear_case(device, 6, 301, 24)
    linear_weight *= 0.1
    target.copy_(torch.tensor([0, 1, 100, 200, 299, 300]))
    bias = torch.zeros(301, device=device)
    for row in range(6):
        bias.zero_()[target[row]] = 30.0
        want, _ = oracle(input.double() @ linear_weight.double().T, target, bias, None, PLAIN)
        got = stream(input, linear_weight, target, bias, None, PLAIN, stats=False)
        assert_near(got.loss[row], want.loss[row], 1e-5, "loss", 0.0)


def test_stream_row_index(device):
    input, linear_weight, target, bias, weight = linear_case(device, 40, 150, 24)
    index = torch.tensor([5, 0, 39, -1, 1, 17], device=device)
    for index_dtype in (torch.int32, torch.int64):
        got = stream(input, linear_weight, target, bias, weight, EVERY, stats=True, row_index=index.to(index_dtype))
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
        stream(*case, PLAIN, stats=False)


def test_splits_cover_the_vocabulary():
    for count, vocab, processors in itertools.product((1, 100, 8192, 10**6), (1, 129, 30522, 256000), (1, 108, 132)):
        chosen = stream_config(count, 768, torch.bfloat16, (9, 0), plain=True)
        parts, per_split = splits(count, vocab, chosen, processors)
        tiles = -(-vocab // chosen.constexprs["BLOCK_N"])
        assert (parts - 1) * per_split < tiles <= parts * per_split


@kernels("linear_cross_entropy")
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize(("count", "vocab", "dim"), [(2048, 30522, 768), (513, 50265, 1024), (64, 250002, 770)])
@pytest.mark.parametrize("options", [PLAIN, EVERY], ids=["plain", "every"])
def test_real_stream(device, dtype, count, vocab, dim, options):
    input, linear_weight, target, bias, weight = linear_case(device, count, vocab, dim, dtype)
    check_linear(input, linear_weight, target, bias, weight, options, stats=False)
