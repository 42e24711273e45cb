"""Python numbers and NumPy scalars as arguments: one compiled graph for all values, and the same results."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

import sslkernels as sk

X, Y, W = torch.randn(6, 4), torch.randn(6, 4), torch.randn(9, 4)
TARGET = torch.randint(0, 9, (6,))
IDS = torch.randint(5, 20, (6, 8))
PAIRS, COUNTS = torch.arange(6), torch.rand(6) + 0.1
TABLE = sk.AliasTable([1.0, 2, 3])
CODES = torch.randn(2, 4, 3)

# Each takes one number that a schedule might change, in [0.05, 0.4] or, by name, an int.
FLOATS = {
    "cross_entropy-label_smoothing": lambda x, v: sk.cross_entropy(x @ W.t(), TARGET, label_smoothing=v),
    "cross_entropy-z_loss": lambda x, v: sk.cross_entropy(x @ W.t(), TARGET, z_loss=v),
    "cross_entropy-softcap": lambda x, v: sk.cross_entropy(x @ W.t(), TARGET, softcap=v),
    "cross_entropy-logit_scale": lambda x, v: sk.cross_entropy(x @ W.t(), TARGET, logit_scale=v),
    "linear_cross_entropy-z_loss": lambda x, v: sk.linear_cross_entropy(x, W, TARGET, z_loss=v),
    "linear_cross_entropy-logit_scale": lambda x, v: sk.linear_cross_entropy(x, W, TARGET, logit_scale=v),
    "linear_distillation-student_temperature": lambda x, v: sk.linear_distillation(x, W, X, W, student_temperature=v),
    "linear_distillation-teacher_temperature": lambda x, v: sk.linear_distillation(x, W, X, W, teacher_temperature=v),
    "sinkhorn_center-temperature": lambda x, v: sk.sinkhorn_center(x, W, temperature=v),
    "contrastive_energy-logit_bias": lambda x, v: sk.contrastive_energy(x, Y, logit_bias=v),
    "contrastive_energy-label_smoothing": lambda x, v: sk.contrastive_energy(x, Y, label_smoothing=v),
    "contrastive_energy-margin": lambda x, v: sk.contrastive_energy(x, Y, energy="hinge", margin=v),
    "nt_xent-temperature": lambda x, v: sk.nt_xent(x, Y, temperature=v),
    "siglip_loss": lambda x, v: sk.siglip_loss(x, Y, v, -v),
    "gumbel_softmax-tau": lambda x, v: sk.gumbel_softmax(x, v, seed=1),
    "gumbel_quantize-tau": lambda x, v: sk.gumbel_quantize(x.view(3, 2, 4), CODES, tau=v, hard=False, seed=1).values,
    "gaussian_rsample-free_bits": lambda x, v: sk.gaussian_rsample(x, Y, free_bits=v, seed=1).kl,
    "vector_quantize-codebook_weight": lambda x, v: sk.vector_quantize(x, W, codebook_weight=v).commitment,
    "free_energy-beta": lambda x, v: sk.free_energy(x, beta=v),
    "prediction_energy-beta": lambda x, v: sk.prediction_energy(x.view(2, 3, 4), Y[:2], beta=v, mode="soft"),
    "linear_sample-temperature": lambda x, v: sk.linear_sample(x, W, temperature=v, seed=1).logprob,
    "glove_loss-x_max": lambda x, v: sk.glove_loss(PAIRS, PAIRS, COUNTS, x, Y, Y[:, 0], Y[:, 1], x_max=v),
    "glove_loss-alpha": lambda x, v: sk.glove_loss(PAIRS, PAIRS, COUNTS, x, Y, Y[:, 0], Y[:, 1], alpha=v),
    "mask_tokens-probability": lambda x, v: sk.mask_tokens(IDS, mask_id=3, vocab_size=30, probability=v, seed=1).labels,
}
INTS = {
    "cross_entropy-num_items": lambda x, v: sk.cross_entropy(x @ W.t(), TARGET, num_items=v),
    "cross_entropy-ignore_index": lambda x, v: sk.cross_entropy(x @ W.t(), TARGET, ignore_index=v),
    "linear_cross_entropy-num_items": lambda x, v: sk.linear_cross_entropy(x, W, TARGET, num_items=v),
    "linear_distillation-num_items": lambda x, v: sk.linear_distillation(x, W, X, W, num_items=v),
    "contrastive_energy-num_items": lambda x, v: sk.contrastive_energy(x, Y, num_items=v),
    "gaussian_rsample-seed": lambda x, v: sk.gaussian_rsample(x, Y, seed=v).z,
    "mask_tokens-mask_id": lambda x, v: sk.mask_tokens(IDS, mask_id=v, vocab_size=30, seed=1).labels,
    "mask_tokens-seed": lambda x, v: sk.mask_tokens(IDS, mask_id=3, vocab_size=30, seed=v).labels,
    "corrupt_spans-eos_id": lambda x, v: sk.corrupt_spans(IDS, sentinel_ids=[1, 2], eos_id=v, seed=1).labels,
    "corrupt_spans-seed": lambda x, v: sk.corrupt_spans(IDS, sentinel_ids=[1, 2], seed=v).labels,
    "AliasTable-seed": lambda x, v: TABLE.draw((3, 4), seed=v),
    "random_normal-sample": lambda x, v: sk.random_normal((3, 4), 1, sample=v),
}
NUMBERS = {**dict.fromkeys(FLOATS, (0.05, 0.2, 0.4, 0.3)), **dict.fromkeys(INTS, (2, 5, 9, 7))}
CALLS = {**FLOATS, **INTS}
OPS = [name.partition("-")[0] for name in CALLS]
# `make test` compiles the first case of each op.
COMPILED = [
    pytest.param(name, marks=[pytest.mark.full] if op in OPS[:i] else [])
    for i, (name, op) in enumerate(zip(CALLS, OPS, strict=True))
]


def _value_and_gradient(call, x, number):
    result = call(x, number)
    gradient = torch.autograd.grad(result.sum(), x)[0] if result.requires_grad else None
    return result.detach(), gradient


@pytest.mark.parametrize("name", COMPILED)
def test_a_changing_number_compiles_once(name):
    call = CALLS[name]
    if name == "linear_sample-temperature" and torch.__version__ < "2.12":
        pytest.skip("torch 2.11 makes a constant of what Python computes from a number, as one over the temperature")
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(call, backend="aot_eager", dynamic=True, fullgraph=True)
    x = X.clone().requires_grad_()
    for number in NUMBERS[name]:
        torch.testing.assert_close(_value_and_gradient(compiled, x, number), _value_and_gradient(call, x, number))
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("name", CALLS)
def test_numpy_scalars_are_numbers(name):
    call, numbers = CALLS[name], NUMBERS[name]
    x = X.clone().requires_grad_()
    for number in numbers:
        numpy = (np.float32, np.float64) if isinstance(number, float) else (np.int64, np.uint8)
        for kind in numpy:
            value = kind(number)
            expected = _value_and_gradient(call, x, value.item())
            torch.testing.assert_close(_value_and_gradient(call, x, value), expected, rtol=0, atol=0)


needs_scalars_in_graphs = pytest.mark.skipif(
    torch.__version__ < "2.12", reason="torch 2.11 breaks the graph where a number is read from a tensor"
)
# Some of them in `make test`.
IN_GRAPHS = ("cross_entropy-z_loss", "free_energy-beta", "mask_tokens-mask_id")


@needs_scalars_in_graphs
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in IN_GRAPHS else pytest.mark.slow) for name in CALLS]
)
def test_numpy_scalars_in_a_compiled_function(name):
    """As an argument, whose values share a graph, and made inside."""
    call, numbers = CALLS[name], NUMBERS[name][:2]
    kind, narrow = (np.float64, np.float32) if name in FLOATS else (np.int64, np.uint8)
    made_inside = [lambda x, v: call(x, kind(v)), lambda x, v: call(x, narrow(v))]
    for i, function in enumerate([call, *made_inside]):
        if i == 0 and name == "siglip_loss":
            continue  # which computes a further number from it
        torch._dynamo.reset()
        counters.clear()
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
        x = X.clone().requires_grad_()
        for number in numbers:
            got = _value_and_gradient(compiled, x, kind(number) if i == 0 else number)
            torch.testing.assert_close(got, _value_and_gradient(call, x, narrow(number).item() if i == 2 else number))
        assert i > 0 or counters["stats"]["unique_graphs"] == 1


@needs_scalars_in_graphs
@pytest.mark.parametrize("value", [np.float32(0.5), np.float16(0.5), np.uint8(1)], ids=lambda value: value.dtype.name)
def test_a_numpy_scalar_that_a_graph_cannot_read_is_named(value):
    """torch.compile passes it as a tensor, and knows its number only if it has 64 bits."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, v: sk.free_energy(x, beta=v), backend="aot_eager", fullgraph=True)
    with pytest.raises(
        torch._dynamo.exc.Unsupported, match="free_energy: beta must be a Python number, or a NumPy scalar of 64 bits"
    ):
        compiled(X, value)


def test_numpy_scalars_in_tuples_and_constructors():
    masker = sk.nn.TokenMasker(
        mask_id=np.int64(3),
        vocab_size=np.int32(30),
        replace=(np.float32(0.5), np.float32(0.5)),
        special_ids=[np.int64(7)],
    )
    plain = sk.nn.TokenMasker(mask_id=3, vocab_size=30, replace=(0.5, 0.5), special_ids=[7])
    assert torch.equal(masker(IDS, seed=np.int64(2)).input_ids, plain(IDS, seed=2).input_ids)
    quantizer = sk.nn.VectorQuantizer(np.int64(8), np.int64(4), decay=np.float32(0.5))
    quantizer(X)
    assert quantizer.decay == 0.5
    bits = sk.random_bits((np.int64(2), np.int32(3)), np.uint64(2**63))
    assert torch.equal(bits, sk.random_bits((2, 3), 2**63))


def test_a_numpy_bool_is_no_number():
    with pytest.raises(TypeError, match=r"gaussian_rsample: num_samples must be an int or None; got bool"):
        sk.gaussian_rsample(X, Y, np.bool_(True))
