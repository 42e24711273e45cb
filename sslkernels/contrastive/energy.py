"""Contrastive energies: minus the dot product, low for pairs, high for negatives."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sslkernels.contrastive.autograd import Call, pair_loss
from sslkernels.contrastive.positives import INVALID_POSITIVE, NO_POSITIVE, next_of_same_id
from sslkernels.contrastive.records import PairInputs, PairOptions, PairStatistics, empty_statistics
from sslkernels.contrastive.score_tiles import ENERGIES, HINGE, SIGMOID, SOFTMAX
from sslkernels.core import checks
from sslkernels.core.dtypes import accumulation_dtype
from sslkernels.core.ranks import over_ranks

NAME = "contrastive_energy"


class ContrastiveStats(NamedTuple):
    """Statistics of a contrastive energy, detached; they say whether the features collapse.

    Per query (N,), over its candidates (where the loss is that of columns, the keys alone): lse, log-sum-exp of the
    scores; positive, the score of the designated pair (with further positives the mean over all positives); rank
    (int64), how many candidates that are no positives beat the designated pair, by more than the rounding of a score;
    top1: rank is 0. A query without a positive has positive
    0, rank -1, top1 False. Scalars, of the normalised features (Wang and Isola 2020): alignment, the mean squared
    distance of designated pairs; uniformity, log mean exp(-2 squared distance) over the other pairs of a query and a
    key that are candidates, 0 where all features have become the same.
    """

    lse: Tensor
    positive: Tensor
    rank: Tensor
    top1: Tensor
    alignment: Tensor
    uniformity: Tensor


def contrastive_energy(
    query: Tensor,
    key: Tensor,
    *,
    positive: Tensor | None = None,
    energy: str = "softmax",
    direction: str = "row",
    logit_scale: float | Tensor = 1.0,
    logit_bias: float | Tensor | None = None,
    normalize: bool = False,
    negatives: Tensor | None = None,
    negatives_mask: Tensor | None = None,
    bank: Tensor | None = None,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    same_id: str = "ignore",
    exclude_self: bool = False,
    label_smoothing: float = 0.0,
    margin: float | None = None,
    row_weight: Tensor | None = None,
    reduction: str = "mean",
    process_group: Any = None,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, ContrastiveStats]:
    """Loss of the energies `-(logit_scale * <query, key> + logit_bias)` of pairs against those of negatives.

    The scores s = logit_scale * <x, y> + logit_bias of all queries and keys never exist as a whole: strips of them go
    through a buffer. With s_p the score of a query's designated key and sums over its candidates (the keys that are not
    left out, its own negatives, the bank):

        "softmax": -s_p + logsumexp(s), or with further positives P, which hold the designated one, -mean_P(s) +
        logsumexp(s)     (InfoNCE, van den Oord et al. 2018; SupCon's L_out, Khosla et al. 2020)
        "sigmoid": softplus(-s_p) + sum softplus(s), with softplus(-s) for further positives (SigLIP, Zhai et al. 2023)
        "hinge": sum max(0, margin + s - s_p), over candidates that are no positives

    Args:
        query: `(N, D)`; float32, bfloat16, float16 or float64. Under autocast the matmuls run in its dtype; otherwise
            key, bank and negatives have the dtype of query. float16 on a CPU computes in float32.
        key: `(M, D)`, the candidates that all queries share.
        positive: `(N,)` int64 or int32, the row of each query's key. Default: row i, which needs M >= N.
        energy: "softmax", "sigmoid" or "hinge".
        direction: "row", over the candidates of each query; "column", over the queries of each query's key;
            "symmetric", half of each. The sigmoid energy is the same in all. Own negatives and bank take part in the
            row direction.
        logit_scale, logit_bias: numbers, or tensors of one element, which get exact gradients. The scale is 1 /
            temperature, not its logarithm.
        normalize: divide every feature by max(norm, 1e-12); no normalised copy is made.
        negatives: `(N, K, D)`, negatives of each query alone.
        negatives_mask: `(N, K)` bool, True where a negative is used. What is masked may hold anything.
        bank: `(B, D)`, negatives that all queries share. A queue that may hold positives belongs behind the rows of key
            instead, with ids.
        query_ids, key_ids: `(N,)` and `(M,)` integers. A query and a key of one id that are not the designated pair are
            left out or, with `same_id="positive"`, are further positives (in "hinge": are no negatives).
        same_id: "ignore" or "positive".
        exclude_self: query is key, and the pairs (i, i) are left out. With `same_id="positive"` the positives are then
            by default all others of the id.
        label_smoothing: in "softmax", moves this share of the target to the mean over all candidates.
        margin: of "hinge"; default 0.2.
        row_weight: `(N,)`, multiplies the loss of each query; not part of the divisor of "mean". Differentiable.
        reduction: "mean", over the queries that have a positive (in "sigmoid" over all); "sum"; "none": `(N,)`. A query
            without any positive has loss 0. With `direction="column"` row i is the loss of its key's column.
        process_group: every rank passes its own rows, not always equally many; the keys of all ranks are candidates of
            each query, and the queries of all of each key. The loss is that of the local rows; gradients averaged over
            the ranks, as DistributedDataParallel does, are those of the mean of the ranks' losses. `bank` is that of
            each rank. How many rows the ranks have is read on the host.
        return_stats: also return `ContrastiveStats`, from the same pass.

    Returns:
        The loss, float32 (float64 for float64 features); with `return_stats` the pair (loss, statistics).

    "mean" and "sum" compute gradients in forward and keep them until backward; "none" computes the products again.
    On a CPU a softmax over columns takes four matmuls, over rows alone and the other energies three, and two where the
    candidates are frozen. The Triton kernels take more of them where a matrix of probabilities would cost more than to
    compute scores again.

    Raises:
        TypeError, ValueError: for an argument of the wrong type, dtype, shape or range. A `positive` out of range
            raises `ValueError` on the CPU; on a GPU the loss of its row is NaN.

    >>> import sslkernels as sk
    >>> image, text = torch.randn(8, 16, requires_grad=True), torch.randn(8, 16, requires_grad=True)
    >>> scale = torch.tensor(10.0, requires_grad=True)
    >>> sk.contrastive_energy(image, text, direction="symmetric", logit_scale=scale, normalize=True).backward()
    """
    checks.tensor(NAME, "key", key, checks.FLOAT_DTYPES)
    return pair_energy(
        NAME, query, key, positive=positive, energy=energy, direction=direction, logit_scale=logit_scale,
        logit_bias=logit_bias, normalize=normalize, negatives=negatives, negatives_mask=negatives_mask, bank=bank,
        query_ids=query_ids, key_ids=key_ids, same_id=same_id, exclude_self=exclude_self,
        label_smoothing=label_smoothing, margin=margin, row_weight=row_weight, reduction=reduction,
        process_group=process_group, return_stats=return_stats,
    )  # fmt: skip


def pair_energy(
    function: str,
    query: Tensor,
    key: Tensor | None,
    *,
    positive: Tensor | None = None,
    energy: str = "softmax",
    direction: str = "row",
    logit_scale: float | Tensor = 1.0,
    logit_bias: float | Tensor | None = None,
    normalize: bool = False,
    negatives: Tensor | None = None,
    negatives_mask: Tensor | None = None,
    bank: Tensor | None = None,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    same_id: str = "ignore",
    exclude_self: bool = False,
    label_smoothing: float = 0.0,
    margin: float | None = None,
    row_weight: Tensor | None = None,
    reduction: str = "mean",
    process_group: Any = None,
    return_stats: bool = False,
    in_batch: bool = True,
) -> Tensor | tuple[Tensor, ContrastiveStats]:
    """`contrastive_energy` under the name of the public `function` that calls it. key None: the queries, where
    `positive` is known to be mutual. in_batch False: the keys of other queries are no candidates."""
    if key is query and query_ids is not None and key_ids is None:
        key_ids = query_ids
    checks.choice(function, "energy", energy, ENERGIES)
    checks.choice(function, "direction", direction, ("row", "column", "symmetric"))
    checks.choice(function, "same_id", same_id, ("ignore", "positive"))
    checks.choice(function, "reduction", reduction, ("none", "mean", "sum"))
    checks.boolean(function, "normalize", normalize)
    checks.boolean(function, "exclude_self", exclude_self)
    _check_tensors(
        function, query, key, positive, negatives, negatives_mask, bank, query_ids, key_ids, row_weight, exclude_self
    )
    if process_group is not None and not isinstance(process_group, torch.distributed.ProcessGroup):
        must = "be a torch.distributed.ProcessGroup or None"
        checks.fail(TypeError, function, "process_group", must, type(process_group).__name__)
    if same_id == "positive" and query_ids is None:
        checks.fail(ValueError, function, "query_ids", 'be given with same_id="positive"', None)
    checks.number(function, "label_smoothing", label_smoothing, low=0.0, high=1.0)
    kind = ENERGIES.index(energy)
    if label_smoothing > 0 and kind != SOFTMAX:
        checks.fail(ValueError, function, "label_smoothing", 'be 0 unless energy is "softmax"', label_smoothing)
    if margin is not None:
        checks.number(function, "margin", margin)
        if kind != HINGE:
            checks.fail(ValueError, function, "margin", 'be None unless energy is "hinge"', margin)
    acc = accumulation_dtype(query.dtype)
    scale = _scalar(function, "logit_scale", logit_scale, query, acc)
    bias = None if logit_bias is None else _scalar(function, "logit_bias", logit_bias, query, acc)
    compute_dtype = _compute_dtype(function, query, key, bank, negatives)

    further = same_id == "positive" and query_ids is not None
    if exclude_self and positive is None and not further:
        must = 'be given with exclude_self (unless same_id="positive" makes positives)'
        checks.fail(ValueError, function, "positive", must, None)
    options = PairOptions(
        kind,
        rows=direction != "column" or kind == SIGMOID,
        columns=direction != "row" and kind != SIGMOID,
        in_batch=in_batch,
        ids_positive=further and kind != HINGE,
        normalize=normalize,
        label_smoothing=float(label_smoothing),
        margin=0.2 if margin is None else float(margin),
    )
    call = Call(function, compute_dtype, options, return_stats)
    pairs = (query, key, positive, query_ids, key_ids, exclude_self, further)
    rest = (bank, negatives, negatives_mask, scale, bias)
    if process_group is None:
        loss, statistics = pair_loss(_inputs(function, *pairs, *rest), call, row_weight, reduction)
    else:
        if torch.compiler.is_compiling():  # collectives, and row counts that the host reads
            torch._dynamo.graph_break()
        loss, statistics = _over_ranks(process_group, pairs, rest, call, row_weight, reduction)
    if not return_stats:
        return loss
    rank = statistics.beaten
    stats = ContrastiveStats(
        statistics.lse, statistics.positive, rank, rank == 0, statistics.alignment, statistics.uniformity
    )
    return loss, stats


def _inputs(
    function: str,
    query: Tensor,
    key: Tensor | None,
    positive: Tensor | None,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    exclude_self: bool,
    further: bool,
    bank: Tensor | None,
    negatives: Tensor | None,
    negatives_mask: Tensor | None,
    scale: Tensor,
    bias: Tensor | None,
) -> PairInputs:
    """Of a single process. further: ids make positives."""
    keys = (query if key is None else key).shape[0]
    index = _resolved(function, positive, query, keys, 0, key_ids if further else None, exclude_self)
    itself = torch.arange(query.shape[0], device=query.device) if exclude_self else None
    return PairInputs(query, key, bank, negatives, negatives_mask, index, itself, query_ids, key_ids, scale, bias)


def _over_ranks(
    group: Any, pairs: tuple, rest: tuple, call: Call, row_weight: Tensor | None, reduction: str
) -> tuple[Tensor, PairStatistics]:
    """The keys of all ranks are candidates of this rank's queries. The column direction is that of rows, with the keys
    of this rank's pairs against the queries of all ranks."""
    query, key, positive, query_ids, key_ids, exclude_self, further = pairs
    bank, negatives, negatives_mask, scale, bias = rest
    options = call.options
    if positive is not None and key is not None and options.columns:
        checks.fail(ValueError, call.function, "positive", "be None with a process_group over columns", "a tensor")
    local_key = query if key is None else key
    query_ranks, key_ranks = over_ranks(group, query, local_key)
    key = key_ranks.gather(local_key)
    key_ids = None if key_ids is None else key_ranks.gather(key_ids)
    rows, start = query.shape[0], key_ranks.start
    ids = key_ids if further else None
    index = _resolved(call.function, positive, query, local_key.shape[0], start, ids, exclude_self)
    own = torch.arange(start, start + rows, device=query.device)
    index = own if index is None else index
    itself = own if exclude_self else None
    inputs = PairInputs(query, key, bank, negatives, negatives_mask, index, itself, query_ids, key_ids, scale, bias)
    if not options.columns:
        return pair_loss(inputs, call, row_weight, reduction)
    by_row = call._replace(options=options._replace(rows=True, columns=False))
    row_loss, statistics = None, empty_statistics(query, False)
    if options.rows:
        row_loss, statistics = pair_loss(inputs, by_row, row_weight, reduction)
    elif call.stats:
        with torch.no_grad():
            alone = inputs._replace(bank=None, negatives=None, negatives_mask=None)
            _, statistics = pair_loss(alone, by_row, row_weight, reduction)
    at = index.clamp(min=0)
    turned = inputs._replace(
        query=key[at],
        key=query_ranks.gather(query),
        bank=None,
        negatives=None,
        negatives_mask=None,
        positive=torch.where(index < 0, index, torch.arange(rows, device=index.device) + query_ranks.start),
        self_index=at if exclude_self else None,
        query_ids=None if key_ids is None else key_ids[at],
        key_ids=None if query_ids is None else query_ranks.gather(query_ids),
    )
    column_loss, _ = pair_loss(turned, by_row._replace(stats=False), row_weight, reduction)
    return column_loss if row_loss is None else 0.5 * row_loss + 0.5 * column_loss, statistics


def _resolved(
    function: str,
    positive: Tensor | None,
    query: Tensor,
    keys: int,
    start: int,
    ids: Tensor | None,
    exclude_self: bool,
) -> Tensor | None:
    """The designated key of each row (int64) among those of all ranks, None for row i of a single one. keys, start: how
    many keys are this rank's and where they begin; ids: of all keys, where they make positives."""
    count = query.shape[0]
    following = None
    if exclude_self:
        following = NO_POSITIVE if ids is None else next_of_same_id(ids)[start : start + count]
    if positive is None:
        if exclude_self:
            return following
        if keys < count:
            must = f"be given where key has fewer rows ({keys}) than query ({count})"
            checks.fail(ValueError, function, "positive", must, None)
        return None
    index = positive.long()
    wrong = (index < 0) | (index >= keys)
    visible = not (torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(index))
    if index.device.type == "cpu" and visible and bool(wrong.any()):
        checks.fail(ValueError, function, "positive", f"be in [0, {keys})", index[wrong][0].item())
    if exclude_self:
        itself = index == torch.arange(count, device=index.device)
    index = torch.where(wrong, INVALID_POSITIVE, index + start)
    return torch.where(itself, following, index) if exclude_self else index


def _scalar(function: str, name: str, value: float | Tensor, query: Tensor, acc: torch.dtype) -> Tensor:
    if isinstance(value, Tensor):
        checks.tensor(function, name, value, checks.FLOAT_DTYPES)
        if value.numel() != 1:
            checks.fail(ValueError, function, name, "be a number or a tensor of one element", tuple(value.shape))
        checks.same_device(function, name, value, "query", query.device)
        return value
    checks.number(function, name, value)
    return torch.full((), float(value), dtype=acc, device=query.device)


def _compute_dtype(function: str, query: Tensor, *others: Tensor | None) -> torch.dtype:
    """The dtype of the matmuls: autocast's, else that of the tensors."""
    dtypes = [query.dtype, *(t.dtype for t in others if t is not None)]
    if checks.autocast(query.device) and torch.float64 not in dtypes:
        return torch.get_autocast_dtype(query.device.type)
    for name, tensor in zip(("key", "bank", "negatives"), others, strict=True):
        if tensor is not None and tensor.dtype != query.dtype:
            must = f"have the dtype of query, {query.dtype}, outside autocast"
            checks.fail(TypeError, function, name, must, tensor.dtype)
    return query.dtype


def _check_tensors(
    function: str,
    query: Tensor,
    key: Tensor | None,
    positive: Tensor | None,
    negatives: Tensor | None,
    negatives_mask: Tensor | None,
    bank: Tensor | None,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    row_weight: Tensor | None,
    exclude_self: bool,
) -> None:
    checks.tensor(function, "query", query, checks.FLOAT_DTYPES)
    checks.dims(function, "query", query, 2, "(N, D)", high=2)
    count, dim = query.shape
    for name, value, dims, meaning in (("key", key, 2, "(M, D)"), ("bank", bank, 2, "(B, D)")):
        checks.tensor(function, name, value, checks.FLOAT_DTYPES, optional=name == "bank" or value is None)
        if value is not None:
            checks.dims(function, name, value, dims, meaning, high=dims)
            checks.shape(function, name, value, (value.shape[0], dim), meaning)
    checks.tensor(function, "negatives", negatives, checks.FLOAT_DTYPES, optional=True)
    if negatives is not None:
        checks.dims(function, "negatives", negatives, 3, "(N, K, D)", high=3)
        checks.shape(function, "negatives", negatives, (count, negatives.shape[1], dim), "(N, K, D)")
    checks.tensor(function, "negatives_mask", negatives_mask, (torch.bool,), optional=True)
    if negatives_mask is not None:
        if negatives is None:
            checks.fail(
                ValueError, function, "negatives_mask", "be None without negatives", tuple(negatives_mask.shape)
            )
        checks.shape(function, "negatives_mask", negatives_mask, negatives.shape[:2], "(N, K)")
    keys = count if key is None else key.shape[0]
    for name, value, size, meaning in (("query_ids", query_ids, count, "(N,)"), ("key_ids", key_ids, keys, "(M,)")):
        checks.tensor(function, name, value, checks.INDEX_DTYPES, optional=True)
        checks.shape(function, name, value, (size,), meaning)
    if (query_ids is None) != (key_ids is None):
        missing = "key_ids" if key_ids is None else "query_ids"
        checks.fail(ValueError, function, missing, "be given with the other ids", None)
    checks.tensor(function, "positive", positive, checks.INDEX_DTYPES, optional=True)
    checks.shape(function, "positive", positive, (count,), "(N,)")
    checks.tensor(function, "row_weight", row_weight, checks.FLOAT_DTYPES, optional=True)
    checks.shape(function, "row_weight", row_weight, (count,), "(N,)")
    if exclude_self and keys != count:
        checks.fail(ValueError, function, "key", "be the queries with exclude_self", f"{keys} rows for {count} queries")
    for name, value in (
        ("key", key), ("bank", bank), ("negatives", negatives), ("negatives_mask", negatives_mask),
        ("positive", positive), ("query_ids", query_ids), ("key_ids", key_ids), ("row_weight", row_weight),
    ):  # fmt: skip
        checks.same_device(function, name, value, "query", query.device)
