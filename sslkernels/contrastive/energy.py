"""Contrastive energies: minus the dot product, low for pairs, high for negatives."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sslkernels.contrastive.autograd import CallConfig, pair_loss
from sslkernels.contrastive.pair_rows import HINGE, INVALID_POSITIVE, NO_POSITIVE, SIGMOID, SOFTMAX
from sslkernels.contrastive.pair_setup import next_of_same_id
from sslkernels.contrastive.records import PairInputs, PairOptions, PairStatistics, RankOptions
from sslkernels.contrastive.score_tiles import ENERGIES
from sslkernels.core import checks
from sslkernels.core.dtypes import accumulation_dtype
from sslkernels.core.operator import full
from sslkernels.core.overloads import returns_stats
from sslkernels.core.ranks import Ranks, check_ranks, over_ranks

NAME = "contrastive_energy"


class PairTensors(NamedTuple):
    """The tensor arguments of `contrastive_energy`. key None: the queries, whose positives must then be mutual."""

    query: Tensor
    key: Tensor | None
    positive: Tensor | None = None
    negatives: Tensor | None = None
    negatives_mask: Tensor | None = None
    bank: Tensor | None = None
    query_ids: Tensor | None = None
    key_ids: Tensor | None = None
    bank_ids: Tensor | None = None
    candidate_mask: Tensor | None = None
    key_mask: Tensor | None = None
    bank_mask: Tensor | None = None
    row_weight: Tensor | None = None


class EnergyOptions(NamedTuple):
    """The options of `contrastive_energy`. in_batch False: the keys of other queries are no candidates."""

    energy: str = "softmax"
    direction: str = "row"
    logit_scale: float | Tensor = 1.0
    logit_bias: float | Tensor | None = None
    normalize: bool = False
    same_id: str = "ignore"
    exclude_self: bool = False
    label_smoothing: float = 0.0
    margin: float | None = None
    in_batch: bool = True


class ContrastiveStats(NamedTuple):
    """Statistics of a contrastive energy, detached; they say whether the features collapse.

    Per query (N,), over its candidates (for the column direction the keys alone): lse, log-sum-exp of the scores;
    positive, the score of the positive (with extra positives the mean over all of them); rank (float), how many
    candidates that are no positives score higher than the positive, equal ones counted half; top1 (float), 1 /
    (1 + equal ones) if none scores higher, else 0. The scores that are compared are rounded alike: where all features
    have become the same, rank and top1 are at chance. A query without a positive has positive 0, rank -1, top1 0.
    Scalars, of the normalised features (Wang and Isola 2020), whatever ids say: alignment, the mean squared distance of
    a query and its positive; uniformity, log mean exp(-2 squared distance) over the other pairs of a query and a key, 0
    where all features have become the same. A feature of zeros stays at 0 when it is normalised.
    """

    lse: Tensor
    positive: Tensor
    rank: Tensor
    top1: Tensor
    alignment: Tensor
    uniformity: Tensor


@checks.with_python_numbers
@returns_stats(Tensor, ContrastiveStats)
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
    in_batch: bool = True,
    candidate_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    negatives: Tensor | None = None,
    negatives_mask: Tensor | None = None,
    bank: Tensor | None = None,
    bank_mask: Tensor | None = None,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    bank_ids: Tensor | None = None,
    same_id: str = "ignore",
    exclude_self: bool = False,
    label_smoothing: float = 0.0,
    margin: float | None = None,
    row_weight: Tensor | None = None,
    num_items: int | Tensor | None = None,
    reduction: str = "mean",
    on_empty: str = "nan",
    process_group: Any = None,
    ring: bool = False,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, ContrastiveStats]:
    """Loss of the energies `-(logit_scale * <query, key> + logit_bias)` of pairs against negatives.

    The scores s = logit_scale * <x, y> + logit_bias of all queries and keys go through a buffer of bounded size, a
    block of rows at a time. With s_p the score of a query's positive and sums over its candidates (the keys that are
    not left out, its per-query negatives, the bank):

        "softmax": -s_p + logsumexp(s), or with extra positives -mean_P(s) + logsumexp(s) over all positives P
        (InfoNCE, van den Oord et al. 2018; SupCon's L_out, Khosla et al. 2020)
        "sigmoid": softplus(-s_p) + sum softplus(s), with softplus(-s) for extra positives (SigLIP, Zhai et al. 2023)
        "hinge": sum max(0, margin + s - s_p), over candidates that are no positives

    Args:
        query: `(N, D)`; float32, bfloat16, float16 or float64. Under autocast the matmuls run in its dtype; otherwise
            key, bank and negatives have the dtype of query. float16 on a CPU computes in float32.
        key: `(M, D)`, the candidates that all queries share.
        positive: `(N,)` int64 or int32, the row of each query's key; -1 for a query without a positive, which counts
            neither in the sum nor in the mean; in the sigmoid energy it counts, and its pairs are negatives. Default:
            row i, which needs M >= N.
        energy: "softmax", "sigmoid" or "hinge".
        direction: "row", over the candidates of each query; "column", over the queries of each query's key;
            "symmetric", half of each. The sigmoid energy is the same in all. `negatives` and `bank` count in the row
            direction only, and are refused in "column".
        logit_scale: a number, or a tensor of one element, which gets its exact gradient; 1 / temperature, not its
            logarithm.
        logit_bias: a number, or a tensor of one element, which gets its exact gradient.
        normalize: divide every feature by max(norm, 1e-12); no normalised copy is made.
        in_batch: False: the keys of other queries are no candidates; `direction` is then "row", without ids.
        candidate_mask: `(N, M)` bool, True where key j is a candidate of query i, and in the column direction query i
            one of key j; the positive always is. It is read as it is, with any strides, and never copied.
        key_mask: `(M,)` bool, True where a key is a candidate of the queries whose positive it is not. A key that it
            leaves out and that is no positive may hold anything. (What candidate_mask leaves out has no part in a loss;
            features that are not finite still make NaN of the gradients that they are multiplied with, as in torch.)
        negatives: `(N, K, D)`, K negatives of each query, which no other query sees; or `(N, K)` int64 or int32, the
            rows of key, and after them of bank, that they are, and -1 for none. Rows are gathered as they are read and
            never stored as `(N, K, D)`; one that occurs twice counts twice; ids, `in_batch` and masks of keys and bank
            do not matter to them.
        negatives_mask: `(N, K)` bool, True where a negative counts. A masked negative may hold anything.
        bank: `(B, D)`, negatives that all queries share, whether or not `negatives` are drawn from it. It is read in
            forward alone, unless reduction is "none": a queue may be overwritten before backward.
        bank_mask: `(B,)` bool, True where a row of the bank counts. What it leaves out may hold anything.
        query_ids: `(N,)` integers. A key with the id of a query, other than its positive, is left out or, with
            `same_id="positive"`, is an extra positive (in "hinge": is no negative).
        key_ids: `(M,)` integers. Default: `query_ids`, where key is query.
        bank_ids: `(B,)` integers; they act as key_ids do, in the row direction.
        same_id: "ignore" or "positive".
        exclude_self: query is key, and the pairs (i, i) are left out. With `same_id="positive"` the positives are then
            by default all others of the id.
        label_smoothing: in "softmax", moves this share of the target to the mean over all candidates.
        margin: of "hinge"; default 0.2.
        row_weight: `(N,)`, multiplies the loss of each query; not part of the divisor of "mean". Differentiable.
        num_items: int or 0-d tensor, what "mean" divides by (for gradient accumulation).
        reduction: "mean", over the queries that have a positive (in "sigmoid" over all); "sum"; "none": `(N,)`. A query
            without any positive has loss 0. With `direction="column"` row i is the loss of its key's column.
        on_empty: the "mean" over no queries: "nan", or "zero" with gradients 0.
        process_group: every rank passes its own rows, not always equally many; the keys of all ranks are candidates of
            each query, and the queries of all ranks of each key. The loss is over the local rows; gradients averaged
            over the ranks, as DistributedDataParallel does, are the gradients of the mean of the ranks' losses.
            `positive`, `negatives` by index and `key_mask` are about the rank's own keys, the `bank` is its own;
            `candidate_mask` has a column for each key of all ranks, in their order. How many rows the ranks have is
            read on the host. With columns `logit_scale` and `logit_bias` must be the same on every rank, and all ranks
            must call backward: their gradients are parts, of which the ranks' mean is the gradient.
        ring: the keys of all ranks are not gathered, but travel round the ranks while their scores are computed, so
            that memory does not grow with their number. Needs a `process_group`. The loss and its gradients are the
            same.
        return_stats: also return `ContrastiveStats`, from the same pass.

    Returns:
        The loss, float32 (float64 for float64 features); with `return_stats` the pair (loss, statistics).

    "mean" and "sum" compute gradients in forward and keep them until backward; "none" computes the scores again, as do
    columns and a ring over a `process_group`, for which a copy of the bank is kept until then.
    On a CPU the energies take three matmuls, and two where the candidates are frozen; a softmax over columns takes up
    to four where the scores exceed 9 MiB. The Triton kernels take more of them where a matrix of probabilities would
    cost more than to compute scores again.

    Raises:
        TypeError, ValueError: for an argument of the wrong type, dtype, shape or range. A `positive` out of range
            raises `ValueError` on the CPU; on a GPU the loss of its row is NaN.

    >>> import sslkernels as sk
    >>> image, text = torch.randn(8, 16, requires_grad=True), torch.randn(8, 16, requires_grad=True)
    >>> scale = torch.tensor(10.0, requires_grad=True)
    >>> sk.contrastive_energy(image, text, direction="symmetric", logit_scale=scale, normalize=True).backward()
    """
    checks.tensor(NAME, "key", key, checks.FLOAT_DTYPES)
    ids, masks = (query_ids, key_ids, bank_ids), (candidate_mask, key_mask, bank_mask)
    tensors = PairTensors(query, key, positive, negatives, negatives_mask, bank, *ids, *masks, row_weight)
    options = EnergyOptions(
        energy, direction, logit_scale, logit_bias, normalize, same_id, exclude_self, label_smoothing, margin, in_batch
    )
    call = CallConfig(NAME, reduction, num_items, on_empty, process_group, ring, return_stats)
    return pair_energy(tensors, options, call)


def pair_energy(
    tensors: PairTensors, given: EnergyOptions, call: CallConfig
) -> Tensor | tuple[Tensor, ContrastiveStats]:
    """`contrastive_energy` with errors that name the public function that calls it: checks, then `pair_loss`."""
    own = given.in_batch and (tensors.key is None or tensors.key is tensors.query)
    if own and tensors.query_ids is not None and tensors.key_ids is None:
        tensors = tensors._replace(key_ids=tensors.query_ids)
    _check_choices(given, call)
    _check_tensors(call.function, tensors, given.exclude_self, call.process_group is not None)
    _check_numbers(tensors, given, call)
    _check_ignored(tensors, given, call.function)
    if tensors.negatives is not None and not tensors.negatives.is_floating_point() and tensors.negatives.shape[1] == 0:
        tensors = tensors._replace(negatives=None, negatives_mask=None)  # no column, and so no gradient
    query = tensors.query
    scale = _scalar(call.function, "logit_scale", given.logit_scale, query)
    bias = None if given.logit_bias is None else _scalar(call.function, "logit_bias", given.logit_bias, query)
    compute_dtype = _compute_dtype(call.function, tensors)

    kind = ENERGIES.index(given.energy)
    ids_positive = given.same_id == "positive"
    if given.exclude_self and tensors.positive is None and not ids_positive:
        must = 'be given with exclude_self (unless same_id="positive" makes positives)'
        checks.fail(ValueError, call.function, "positive", must, None)
    if given.exclude_self and ids_positive and tensors.query_ids is not None and tensors.key_ids is None:
        must = 'be given with exclude_self and same_id="positive", where key is not the tensor query'
        checks.fail(ValueError, call.function, "key_ids", must, None)
    options = PairOptions(
        kind,
        rows=given.direction != "column" or kind == SIGMOID,
        columns=given.direction != "row" and kind != SIGMOID,
        in_batch=given.in_batch,
        ids_positive=ids_positive and kind != HINGE,
        normalize=given.normalize,
        label_smoothing=float(given.label_smoothing),
        margin=0.2 if given.margin is None else float(given.margin),
        compute_dtype=compute_dtype,
    )
    if call.process_group is None:
        keys = (query if tensors.key is None else tensors.key).shape[0]
        positive = _positive_index(tensors, given, call.function, keys, 0)
        self_index = torch.arange(query.shape[0], device=query.device) if given.exclude_self else None
        inputs = _inputs(tensors, positive, self_index, scale, bias)
        loss, statistics = pair_loss(inputs, options, tensors.row_weight, call)
    else:
        if torch.compiler.is_compiling():  # collectives, and row counts that the host reads
            torch._dynamo.graph_break()
        loss, statistics = _over_ranks(tensors, given, call, options, scale, bias)
    if not call.return_stats:
        return loss
    return loss, _stats(statistics)


def _stats(found: PairStatistics) -> ContrastiveStats:
    above, equal = found.num_above_positive, found.num_equal_positive.to(found.lse.dtype)
    rank, top1 = above + equal / 2, torch.where(above == 0, 1 / (1 + equal), 0)
    return ContrastiveStats(found.lse, found.positive, rank, top1, found.alignment, found.uniformity)


def _inputs(
    tensors: PairTensors, positive: Tensor | None, self_index: Tensor | None, scale: Tensor, bias: Tensor | None
) -> PairInputs:
    query, key, _, negatives, negatives_mask, bank, query_ids, key_ids, bank_ids, *masks, _ = tensors
    candidates = (query, key, bank, negatives, negatives_mask)
    return PairInputs(*candidates, positive, self_index, query_ids, key_ids, bank_ids, *masks, scale, bias)


def _over_ranks(
    tensors: PairTensors,
    given: EnergyOptions,
    call: CallConfig,
    options: PairOptions,
    scale: Tensor,
    bias: Tensor | None,
) -> tuple[Tensor, PairStatistics]:
    """The loss of this rank's queries against the keys of all ranks, and over columns of its keys against all queries.

    A loss over rows with gathered keys computes its gradients in forward, as a single process does; any other loss
    computes them in backward.
    """
    query, function = tensors.query, call.function
    local_key = query if tensors.key is None else tensors.key
    group_options = given._asdict() | {"reduction": None, "ring": call.ring, "return_stats": call.return_stats}
    is_given = {f"{name} given": value is not None for name, value in tensors._asdict().items()}
    check_ranks(function, call.process_group.group_name, group_options | is_given | {"query": query, "key": local_key})
    # exclude_self makes positives of ids, which may be keys of another rank; two rows share a key only if the caller
    # gives `positive`.
    remote = given.exclude_self and given.same_id == "positive"
    if options.columns and options.energy == HINGE and tensors.positive is not None:
        must = "be None over columns of the hinge energy with a process_group"
        checks.fail(ValueError, function, "positive", must, tuple(tensors.positive.shape))
    numbers = [number.reshape(1) for number in (scale, bias) if number is not None]
    query_ranks, key_ranks, *_ = over_ranks(call.process_group, query, local_key, *numbers)
    by_blocks = options.columns or call.ring
    key_ids = None if tensors.key_ids is None else key_ranks.gather(tensors.key_ids)
    key_mask = None if tensors.key_mask is None else key_ranks.gather(tensors.key_mask)
    tensors = tensors._replace(key_ids=key_ids, key_mask=key_mask)
    shape = (query.shape[0], key_ranks.total)
    checks.shape(function, "candidate_mask", tensors.candidate_mask, shape, "(N, M) with the keys of all ranks")
    index = _positive_index(tensors, given, function, local_key.shape[0], key_ranks.start)
    local_rows = torch.arange(key_ranks.start, key_ranks.start + query.shape[0], device=query.device)
    index = local_rows if index is None else index
    itself = local_rows if given.exclude_self else None
    if not by_blocks:
        negatives = _indices_over_ranks(tensors, function, local_key.shape[0], key_ranks)
        tensors = tensors._replace(key=key_ranks.gather(local_key), negatives=negatives)
        return pair_loss(_inputs(tensors, index, itself, scale, bias), options, tensors.row_weight, call)
    over = RankOptions(
        call.process_group.group_name, tuple(query_ranks.counts), tuple(key_ranks.counts), call.ring, remote
    )
    inputs = _inputs(tensors._replace(key=local_key), index, itself, scale, bias)
    return pair_loss(inputs, options, tensors.row_weight, call, over)


def _indices_over_ranks(tensors: PairTensors, function: str, keys: int, ranks: Ranks) -> Tensor | None:
    """Negatives by index among the keys of all ranks and this rank's bank, from those among this rank's `keys`."""
    negatives = tensors.negatives
    if negatives is None or negatives.is_floating_point():
        return negatives
    index, rows = negatives.long(), keys + (0 if tensors.bank is None else tensors.bank.shape[0])
    wrong = (index < NO_POSITIVE) | (index >= rows)
    _check_visible(function, "negatives", index, wrong, rows)
    shifted = index + torch.where(index < keys, ranks.start, sum(ranks.counts) - keys)
    return torch.where(wrong, INVALID_POSITIVE, torch.where(index < 0, index, shifted))


def _check_visible(function: str, name: str, index: Tensor, wrong: Tensor, rows: int) -> None:
    """Raises for a wrong index that can be read here without a synchronisation."""
    visible = not (torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(index))
    if index.device.type == "cpu" and visible and bool(wrong.any()):
        checks.fail(ValueError, function, name, f"be in [0, {rows}), or -1 for none", index[wrong][0].item())


def _positive_index(tensors: PairTensors, given: EnergyOptions, function: str, keys: int, start: int) -> Tensor | None:
    """The positive of each row (int64) among the keys of all ranks; None for row i in a single process.

    keys: how many keys this rank has; start: the index of its first one; tensors.key_ids: the ids of all ranks.
    """
    query, positive, exclude_self = tensors.query, tensors.positive, given.exclude_self
    count = query.shape[0]
    next_key = None
    if exclude_self:
        next_key = NO_POSITIVE
        if given.same_id == "positive":
            next_key = next_of_same_id(tensors.key_ids)[start : start + count]
    if positive is None:
        if exclude_self:
            return next_key
        if keys < count:
            must = f"be given where key has fewer rows ({keys}) than query ({count})"
            checks.fail(ValueError, function, "positive", must, None)
        return None
    index = positive.long()
    none = index == NO_POSITIVE
    wrong = (index < NO_POSITIVE) | (index >= keys)
    _check_visible(function, "positive", index, wrong, keys)
    if exclude_self:
        itself = index == torch.arange(count, device=index.device)
    index = torch.where(wrong, INVALID_POSITIVE, torch.where(none, NO_POSITIVE, index + start))
    return torch.where(itself, next_key, index) if exclude_self else index


def _scalar(function: str, name: str, value: float | Tensor, query: Tensor) -> Tensor:
    if isinstance(value, Tensor):
        checks.tensor(function, name, value, checks.FLOAT_DTYPES)
        if value.numel() != 1:
            checks.fail(ValueError, function, name, "be a number or a tensor of one element", tuple(value.shape))
        checks.same_device(function, name, value, "query", query.device)
        return value
    checks.number(function, name, value)
    return full((), float(value), accumulation_dtype(query.dtype), query.device)


def _compute_dtype(function: str, tensors: PairTensors) -> torch.dtype:
    """The dtype of the matmuls: autocast's, else the dtype of the features."""
    query = tensors.query
    given = ("key", tensors.key), ("bank", tensors.bank), ("negatives", tensors.negatives)
    others = [(name, tensor) for name, tensor in given if tensor is not None and tensor.is_floating_point()]
    if checks.autocast(query.device) and torch.float64 not in (query.dtype, *[tensor.dtype for _, tensor in others]):
        return torch.get_autocast_dtype(query.device.type)
    for name, tensor in others:
        if tensor.dtype != query.dtype:
            must = f"have the dtype of query, {query.dtype}, outside autocast"
            checks.fail(TypeError, function, name, must, tensor.dtype)
    return query.dtype


def _check_choices(given: EnergyOptions, call: CallConfig) -> None:
    function = call.function
    checks.choice(function, "energy", given.energy, ENERGIES)
    checks.choice(function, "direction", given.direction, ("row", "column", "symmetric"))
    checks.choice(function, "same_id", given.same_id, ("ignore", "positive"))
    checks.choice(function, "reduction", call.reduction, ("none", "mean", "sum"))
    checks.boolean(function, "normalize", given.normalize)
    checks.boolean(function, "in_batch", given.in_batch)
    checks.boolean(function, "exclude_self", given.exclude_self)
    checks.boolean(function, "ring", call.ring)
    checks.boolean(function, "return_stats", call.return_stats)


def _check_numbers(tensors: PairTensors, given: EnergyOptions, call: CallConfig) -> None:
    function, group, margin = call.function, call.process_group, given.margin
    if group is not None and not isinstance(group, torch.distributed.ProcessGroup):
        must = "be a torch.distributed.ProcessGroup or None"
        checks.fail(TypeError, function, "process_group", must, type(group).__name__)
    if call.ring and group is None:
        checks.fail(ValueError, function, "ring", "be False without a process_group", True)
    if call.ring and not given.in_batch:
        must = "be False with in_batch=False (or given negative_keys), where queries meet no keys of other ranks"
        checks.fail(ValueError, function, "ring", must, True)
    if given.same_id == "positive" and tensors.query_ids is None:
        checks.fail(ValueError, function, "query_ids", 'be given with same_id="positive"', None)
    checks.mean_options(function, call.reduction, call.num_items, call.on_empty, "query", tensors.query.device)
    checks.number(function, "label_smoothing", given.label_smoothing, low=0.0, high=1.0)
    if given.label_smoothing > 0 and given.energy != ENERGIES[SOFTMAX]:
        checks.fail(ValueError, function, "label_smoothing", 'be 0 unless energy is "softmax"', given.label_smoothing)
    if margin is not None:
        checks.number(function, "margin", margin)
        if given.energy != ENERGIES[HINGE]:
            checks.fail(ValueError, function, "margin", 'be None unless energy is "hinge"', margin)


def _check_ignored(tensors: PairTensors, given: EnergyOptions, function: str) -> None:
    """Refuses arguments that the direction or `in_batch` would ignore."""
    by_rows = given.direction != "column" or given.energy == ENERGIES[SIGMOID]
    for name, value in (("negatives", tensors.negatives), ("bank", tensors.bank)):
        if value is not None and not by_rows:
            checks.fail(ValueError, function, name, 'be None with direction="column"', tuple(value.shape))
    if given.in_batch:
        return
    if given.direction != "row" and given.energy != ENERGIES[SIGMOID]:
        checks.fail(ValueError, function, "direction", 'be "row" with in_batch=False', repr(given.direction))
    if given.exclude_self:
        checks.fail(ValueError, function, "exclude_self", "be False with in_batch=False", True)
    for name in ("key_ids", "candidate_mask", "key_mask"):
        value = getattr(tensors, name)
        if value is not None:
            checks.fail(ValueError, function, name, "be None with in_batch=False", tuple(value.shape))


def _check_tensors(function: str, tensors: PairTensors, exclude_self: bool, over_ranks: bool) -> None:
    query, key, positive, negatives, negatives_mask, bank, query_ids, key_ids, bank_ids, *masks, row_weight = tensors
    checks.tensor(function, "query", query, checks.FLOAT_DTYPES)
    checks.dims(function, "query", query, 2, "(N, D)", high=2)
    count, dim = query.shape
    for name, value, meaning in (("key", key, "(M, D)"), ("bank", bank, "(B, D)")):
        if value is not None:
            checks.tensor(function, name, value, checks.FLOAT_DTYPES, optional=True)
            checks.dims(function, name, value, 2, meaning, high=2)
            checks.shape(function, name, value, (value.shape[0], dim), meaning)
    checks.tensor(function, "negatives", negatives, (*checks.FLOAT_DTYPES, *checks.INDEX_DTYPES), optional=True)
    if negatives is not None and negatives.is_floating_point():
        checks.dims(function, "negatives", negatives, 3, "(N, K, D)", high=3)
        checks.shape(function, "negatives", negatives, (count, negatives.shape[1], dim), "(N, K, D)")
    elif negatives is not None:
        checks.dims(function, "negatives", negatives, 2, "(N, K) with indices", high=2)
        checks.shape(function, "negatives", negatives, (count, negatives.shape[1]), "(N, K) with indices")
    checks.tensor(function, "negatives_mask", negatives_mask, (torch.bool,), optional=True)
    if negatives_mask is not None:
        if negatives is None:
            shape = tuple(negatives_mask.shape)
            checks.fail(ValueError, function, "negatives_mask", "be None without negatives", shape)
        checks.shape(function, "negatives_mask", negatives_mask, negatives.shape[:2], "(N, K)")
    keys = count if key is None else key.shape[0]
    banked = 0 if bank is None else bank.shape[0]
    for name, value, size, meaning in (
        ("query_ids", query_ids, count, "(N,)"), ("key_ids", key_ids, keys, "(M,)"),
        ("bank_ids", bank_ids, banked, "(B,)"),
    ):  # fmt: skip
        if value is not None:
            checks.tensor(function, name, value, checks.INDEX_DTYPES, optional=True)
            checks.shape(function, name, value, (size,), meaning)
    if (query_ids is None) != (key_ids is None and bank_ids is None):
        missing = "query_ids" if query_ids is None else "key_ids" if bank is None else "key_ids or bank_ids"
        checks.fail(ValueError, function, missing, "be given with the other ids", None)
    if bank_ids is not None and bank is None:
        checks.fail(ValueError, function, "bank_ids", "be None without bank", tuple(bank_ids.shape))
    shapes = ((count, keys), "(N, M)"), ((keys,), "(M,)"), ((banked,), "(B,)")
    for name, mask, (shape, meaning) in zip(("candidate_mask", "key_mask", "bank_mask"), masks, shapes, strict=True):
        if mask is None:
            continue
        checks.tensor(function, name, mask, (torch.bool,), optional=True)
        if name == "bank_mask" and bank is None:
            checks.fail(ValueError, function, name, "be None without bank", tuple(mask.shape))
        if name != "candidate_mask" or not over_ranks:  # over ranks it has a column for each key of all ranks
            checks.shape(function, name, mask, shape, meaning)
    checks.tensor(function, "positive", positive, checks.INDEX_DTYPES, optional=True)
    checks.shape(function, "positive", positive, (count,), "(N,)")
    checks.tensor(function, "row_weight", row_weight, checks.FLOAT_DTYPES, optional=True)
    checks.shape(function, "row_weight", row_weight, (count,), "(N,)")
    if exclude_self and keys != count:
        checks.fail(ValueError, function, "key", "be the queries with exclude_self", f"{keys} rows for {count} queries")
    for name, value in zip(PairTensors._fields, tensors, strict=True):
        if value is not None and value is not query:
            checks.same_device(function, name, value, "query", query.device)
