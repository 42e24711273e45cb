"""The raw operators of the contrastive energies: schemas, shapes, and the kernels of each backend."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from sslkernels.contrastive import plan
from sslkernels.contrastive.positives import INVALID_POSITIVE
from sslkernels.contrastive.records import (
    PairInputs,
    PairOptions,
    PairState,
    PairWanted,
    empty_gradients,
    empty_state,
    empty_statistics,
)
from sslkernels.contrastive.score_tiles import NativePairs, PairKernels, ReferencePairs, TritonPairs
from sslkernels.core.dtypes import accumulation_dtype
from sslkernels.core.legacy import PREFERENCE, Op

_INPUTS = len(PairInputs._fields)
_OPTIONS = len(PairOptions._fields)
_WANTED = len(PairWanted._fields)


def _fwd(kernels: PairKernels, *args):
    inputs, rest = PairInputs(*args[:_INPUTS]), args[_INPUTS:]
    coefficient, compute_dtype, *flags, stats = rest
    options, wanted = PairOptions(*flags[:_OPTIONS]), PairWanted(*flags[_OPTIONS:])
    positive = inputs.positive
    if positive is not None and positive.device.type == "cpu" and bool((positive == INVALID_POSITIVE).any()):
        # Seen here by a compiled graph and by vmap; the public function has looked before and knows the index.
        keys = inputs.query.shape[0] if inputs.key is None else inputs.key.shape[0]
        raise ValueError(f"contrastive_energy: positive must be in [0, {keys}); got an index out of range")
    loss, *groups = plan.forward(kernels, inputs, options, coefficient, compute_dtype, wanted, stats)
    return (loss, *(tensor for group in groups for tensor in group))


def _fwd_fake(*args):
    inputs, rest = PairInputs(*args[:_INPUTS]), args[_INPUTS:]
    coefficient, _, *flags, stats = rest
    options, wanted = PairOptions(*flags[:_OPTIONS]), PairWanted(*flags[_OPTIONS:])
    if coefficient is None:
        wanted = PairWanted(*[False] * _WANTED)
    query = inputs.query
    loss = query.new_empty(query.shape[0], dtype=accumulation_dtype(query.dtype))
    groups = empty_state(inputs, options), empty_statistics(query, stats), empty_gradients(inputs, wanted)
    return (loss, *(tensor for group in groups for tensor in group))


def _bwd(kernels: PairKernels, grad_loss: Tensor, *args):
    inputs, rest = PairInputs(*args[:_INPUTS]), args[_INPUTS:]
    state, (compute_dtype, *flags) = PairState(*rest[:3]), rest[3:]
    options, wanted = PairOptions(*flags[:_OPTIONS]), PairWanted(*flags[_OPTIONS:])
    return tuple(plan.backward(kernels, inputs, options, grad_loss, state, compute_dtype, wanted))


def _bwd_fake(grad_loss, *args):
    return tuple(empty_gradients(PairInputs(*args[:_INPUTS]), PairWanted(*args[-_WANTED:])))


_TENSORS = (
    "Tensor query, Tensor? key, Tensor? bank, Tensor? negatives, Tensor? negatives_mask, Tensor? positive, "
    "Tensor? self_index, Tensor? query_ids, Tensor? key_ids, Tensor logit_scale, Tensor? logit_bias"
)
_FLAGS = (
    "ScalarType compute_dtype, int energy, bool rows, bool columns, bool in_batch, "
    "bool ids_positive, bool normalize, float label_smoothing, float margin, bool want_query, bool want_key, "
    "bool want_bank, bool want_negatives, bool want_logit_scale, bool want_logit_bias"
)


def _pair(public: str, prefix: str, kernels: dict[str, PairKernels], native_ops: tuple[str, ...]) -> tuple[Op, Op]:
    fwd = Op(
        public,
        f"{prefix}_fwd({_TENSORS}, Tensor? coefficient, {_FLAGS}, bool stats) -> ({', '.join(['Tensor'] * 16)})",
        fake=_fwd_fake,
        implementations={name: partial(_fwd, k) for name, k in kernels.items()},
        native_ops=native_ops,
        prefer=PREFERENCE,
    )
    bwd = Op(
        public,
        f"{prefix}_bwd(Tensor grad_loss, {_TENSORS}, Tensor row_others, Tensor column_lse, Tensor column_others, "
        f"{_FLAGS}) -> ({', '.join(['Tensor'] * 7)})",
        fake=_bwd_fake,
        implementations={name: partial(_bwd, k) for name, k in kernels.items()},
        native_ops=native_ops,
        prefer=PREFERENCE,
    )
    return fwd, bwd


contrastive_fwd, contrastive_bwd = _pair(
    "contrastive_energy",
    "contrastive",
    {"reference": ReferencePairs(), "cpu": NativePairs(), "triton": TritonPairs()},
    NativePairs.OPS,
)
# Without shared candidates there is no tile: the plan around `own_negatives`, which has a kernel of every backend.
own_contrastive_fwd, own_contrastive_bwd = _pair(
    "info_nce",
    "own_contrastive",
    {name: PairKernels() for name in ("reference", "cpu", "triton", "cuda")},
    ("own_negatives",),
)
