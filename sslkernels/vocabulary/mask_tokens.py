"""Masked-token prediction: labels and corrupted input from the data (BERT, Devlin et al. 2018)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sslkernels.core import checks
from sslkernels.core.operator import operator
from sslkernels.random.philox import random_words
from sslkernels.random.seeds import seed_tensor

NAME = "mask_tokens"
ID_DTYPES = (*checks.INDEX_DTYPES, torch.int16, torch.uint16)
MASK_DTYPES = (torch.bool, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_MAX_VOCAB = 2**31 - 1  # so that word * vocab_size stays below 2**63


class MaskedTokens(NamedTuple):
    """The corrupted ids, and labels that hold the original id where a token was chosen, else `ignore_index`."""

    input_ids: Tensor
    labels: Tensor


class MaskInputs(NamedTuple):
    """The tensors of `mask_tokens`, `(rows, T)`, with a 0-d seed and row_ids `(rows,)`, contiguous."""

    input_ids: Tensor
    seed: Tensor
    special_mask: Tensor | None
    word_ids: Tensor | None
    row_ids: Tensor | None


class MaskOptions(NamedTuple):
    """The options of `mask_tokens`; mean_span 0: units are chosen independently.

    The special ids stay on the host: kernels take them as constants or parameters, which needs neither a copy to the
    device nor a synchronisation, also while a CUDA graph is captured.
    """

    special_ids: tuple[int, ...]
    mask_id: int
    vocab_size: int
    probability: float
    replace_mask: float
    replace_random: float
    mean_span: float
    ignore_index: int


class MaskRule(NamedTuple):
    """The options in integers. A draw is a 32-bit word; `word < threshold` has probability `threshold / 2**32`.

    select, stay, enter: thresholds of the state "chosen" of a unit: at a start, after a chosen unit, after another;
    to_mask, to_random: the action is mask_id below the first, a random id below the second, else keep;
    allowed: how many ids a random id may take; ranges: the special ids as `(start, end, start, end, ...)`, sorted,
    disjoint, none of them on both sides of 0.
    """

    select: int
    stay: int
    enter: int
    to_mask: int
    to_random: int
    mask_id: int
    allowed: int
    ignore_index: int
    ranges: tuple[int, ...]


@lru_cache(maxsize=64)
def special_ranges(special_ids: tuple[int, ...], mask_id: int, vocab_size: int) -> tuple[tuple[int, ...], int]:
    """The special ids (with `mask_id`) as `MaskRule.ranges`, and the number of other ids in [0, vocab_size)."""
    ids = sorted({*special_ids, mask_id})
    ranges: list[int] = []
    for i in ids:
        if ranges and ranges[-1] == i and i != 0:
            ranges[-1] = i + 1
        else:
            ranges += [i, i + 1]
    return tuple(ranges), vocab_size - sum(0 <= i < vocab_size for i in ids)


def mask_rule(options: MaskOptions) -> MaskRule:
    select = stay = enter = _threshold(options.probability)
    if options.mean_span > 0:
        stay = _threshold(1 - 1 / options.mean_span)
        enter = _threshold(span_start_probability(options.probability, options.mean_span))
    to_mask = _threshold(options.replace_mask)
    to_random = _threshold(options.replace_mask + options.replace_random)
    mask_id, ignore_index = options.mask_id, options.ignore_index
    ranges, allowed = special_ranges(tuple(options.special_ids), mask_id, options.vocab_size)
    return MaskRule(select, stay, enter, to_mask, to_random, mask_id, allowed, ignore_index, ranges)


def _threshold(probability: float) -> int:
    return round(probability * 2**32)


def span_start_probability(probability: float, mean_span: float) -> float:
    """Probability that a span starts after an unchosen unit, with which the chain stays at `probability`."""
    if probability == 0:
        return 0.0
    return float("inf") if probability == 1 else probability / (mean_span * (1 - probability))


def _reference(inputs: MaskInputs, options: MaskOptions) -> MaskedTokens:
    rule = mask_rule(options)
    ranges = list(zip(rule.ranges[::2], rule.ranges[1::2], strict=True))
    input_ids, seed, _, _, row_ids = inputs
    rows, columns = input_ids.shape

    eligible = _eligible(inputs, options)
    chosen = eligible & _states(inputs, options, eligible)
    action = random_words(seed, row_ids, rows, columns, 1)
    random_id = (random_words(seed, row_ids, rows, columns, 2) * rule.allowed) >> 32
    for start, end in ranges:
        if start >= 0:
            random_id = torch.where(random_id >= start, random_id + (end - start), random_id)

    replaced = torch.where(action < rule.to_random, random_id.to(input_ids.dtype), input_ids)
    replaced = torch.where(action < rule.to_mask, rule.mask_id, replaced)
    labels = torch.where(chosen, input_ids, rule.ignore_index)
    return MaskedTokens(torch.where(chosen, replaced, input_ids), labels)


def _eligible(inputs: MaskInputs, options: MaskOptions) -> Tensor:
    ids, ranges = inputs.input_ids, mask_rule(options).ranges
    eligible = torch.ones_like(ids, dtype=torch.bool)
    for start, end in zip(ranges[::2], ranges[1::2], strict=True):
        eligible &= (ids < start) | (ids >= end)
    if inputs.special_mask is not None:
        eligible &= ~inputs.special_mask
    return eligible if inputs.word_ids is None else eligible & (inputs.word_ids >= 0)


def _states(inputs: MaskInputs, options: MaskOptions, eligible: Tensor) -> Tensor:
    """Whether the unit of each token is chosen, for ineligible tokens too."""
    word, rule = random_words(inputs.seed, inputs.row_ids, *inputs.input_ids.shape, 0), mask_rule(options)
    if _chains_units(inputs, options):
        return _chain(word, eligible, inputs.word_ids, rule)
    return word < rule.select


def _at_least(inputs: MaskInputs, options: MaskOptions, least: int) -> tuple[MaskInputs, MaskOptions]:
    """Inputs and options that choose the same units and, in rows with fewer than `least` of them, also the units with
    the smallest draws among the others.

    The choice is made here, in plain torch, for every backend. It becomes the mask of special tokens: all other tokens
    are chosen with probability 1, and their actions and random ids, which have draws of their own, stay what they were.
    """
    rows, columns = inputs.input_ids.shape
    eligible = _eligible(inputs, options)
    chosen = eligible & _states(inputs, options, eligible)
    unit = torch.arange(columns, device=eligible.device).expand(rows, columns)
    if inputs.word_ids is not None:
        begins = torch.ones_like(eligible)
        begins[:, 1:] = (inputs.word_ids[:, 1:] != inputs.word_ids[:, :-1]) | (inputs.word_ids[:, 1:] < 0)
        unit = torch.where(begins, unit, 0).cummax(1).values  # the first column of the unit

    def of_units(tokens: Tensor) -> Tensor:
        """Whether any token of the unit is marked; a unit is addressed by its first column."""
        return torch.zeros_like(unit).scatter_reduce(1, unit, tokens.long(), "amax").bool()

    # Chosen units come first, then other eligible units by draw and column, then columns where no such unit begins.
    draw = random_words(inputs.seed, inputs.row_ids, rows, columns, 0)
    order = torch.where(of_units(chosen), -1, torch.where(of_units(eligible), draw, 2**32))
    first = order.sort(dim=1, stable=True).indices[:, :least]
    among_first = torch.zeros_like(eligible).scatter(1, first, True)
    chosen |= eligible & among_first.gather(1, unit)
    special = inputs._replace(special_mask=~chosen, word_ids=None)
    return special, options._replace(probability=1.0, mean_span=0.0)


def _chains_units(inputs: MaskInputs, options: MaskOptions) -> bool:
    """Whether the choice of a token depends on the token before it."""
    return inputs.word_ids is not None or options.mean_span > 0


def _chain(word: Tensor, eligible: Tensor, word_ids: Tensor | None, rule: MaskRule) -> Tensor:
    """The state of every token: `if_unchosen` and `if_chosen` map the state of the token before to it.

    Maps compose associatively, so doubling the distance they reach gives all states in log2(T) steps.
    """
    after_eligible = torch.zeros_like(eligible)
    after_eligible[:, 1:] = eligible[:, :-1]
    start = word < rule.select
    if_unchosen = torch.where(after_eligible, word < rule.enter, start)
    if_chosen = torch.where(after_eligible, word < rule.stay, start)
    if word_ids is not None:
        same_word = torch.zeros_like(eligible)
        same_word[:, 1:] = (word_ids[:, 1:] == word_ids[:, :-1]) & (word_ids[:, 1:] >= 0)
        if_unchosen, if_chosen = if_unchosen & ~same_word, if_chosen | same_word
    distance = 1
    while distance < word.shape[1]:
        u, c = if_unchosen[:, distance:], if_chosen[:, distance:]
        new_u = torch.where(if_unchosen[:, :-distance], c, u)
        new_c = torch.where(if_chosen[:, :-distance], c, u)
        if_unchosen = torch.cat([if_unchosen[:, :distance], new_u], dim=1)
        if_chosen = torch.cat([if_chosen[:, :distance], new_c], dim=1)
        distance *= 2
    return if_unchosen  # the first map of a row is constant, so all composed maps are


def _filled_by(fill: Callable[..., None], inputs: MaskInputs, options: MaskOptions) -> MaskedTokens:
    outputs = _empty_outputs(inputs)
    fill(inputs, outputs, mask_rule(options), _chains_units(inputs, options))
    return outputs


def _fill_native(inputs: MaskInputs, outputs: MaskedTokens, rule: MaskRule, chained: bool) -> None:
    ranges = torch.tensor(rule.ranges, dtype=torch.int64, device="cpu")  # the host reads them for every device
    *scalars, _ = rule
    torch.ops.sslkernels_native.mask_tokens(*inputs, ranges, *outputs, *scalars, chained)


def _fill_triton(inputs: MaskInputs, outputs: MaskedTokens, rule: MaskRule, chained: bool) -> None:
    from sslkernels.vocabulary.triton.mask_tokens import mask_tokens

    mask_tokens(inputs, outputs, rule, chained)


def _empty_outputs(inputs: MaskInputs) -> MaskedTokens:
    return MaskedTokens(torch.empty_like(inputs.input_ids), torch.empty_like(inputs.input_ids))


_NATIVE = partial(_filled_by, _fill_native)


@operator(
    NAME,
    {"reference": _reference, "cpu": _NATIVE, "cuda": _NATIVE, "triton": partial(_filled_by, _fill_triton)},
    native_ops=(NAME,),
)
def mask_tokens_fwd(inputs: MaskInputs, options: MaskOptions) -> MaskedTokens:
    return _empty_outputs(inputs)


@checks.with_python_numbers
def mask_tokens(
    input_ids: Tensor,
    *,
    mask_id: int,
    vocab_size: int,
    probability: float = 0.15,
    replace: tuple[float, float] = (0.8, 0.1),
    special_ids: Sequence[int] | Tensor = (),
    special_mask: Tensor | None = None,
    attention_mask: Tensor | None = None,
    word_ids: Tensor | Sequence[Any] | None = None,
    mean_span: float | None = None,
    min_per_row: int = 0,
    ignore_index: int = -100,
    row_ids: Tensor | None = None,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
) -> MaskedTokens:
    """Choose tokens at random, replace them by BERT's rule, and return the labels to predict them from the rest.

    A token is eligible unless its id is `mask_id` or in `special_ids`, `special_mask` is not 0 there, `attention_mask`
    is, or its word id is negative. Only eligible tokens are chosen or changed. All draws are words of `random_bits`
    (row, column; sample 0 chooses, 1 decides the action, 2 is the random id) compared with
    `round(probability * 2**32)`, so that every backend gives the same labels bit for bit, for any batch split.

    - Tokens form units. Without `word_ids` a unit is a token; with it, each run of consecutive tokens of a row with
      equal non-negative word ids is one unit, decided by the draw of its first token.
    - Without `mean_span` every unit is chosen with `probability`, independently.
    - With `mean_span` L the units of a row form a two-state Markov chain: after a chosen unit the next one is chosen
      with probability 1 - 1/L, after an unchosen one with `probability / (L (1 - probability))`. The chain restarts,
      with `probability`, at the start of a row and after an ineligible token, unless that token belongs to the same
      word. Hence every unit is chosen with `probability`, and uninterrupted spans have geometric length with mean L.
      (L = 1 / (1 - probability) is the independent choice; L = 1 never chooses two neighbours.)
    - With `min_per_row` m, rows in which fewer than m units were chosen get more, by the
      smallest draws of their other units, up to m units or all with an eligible token. Beside the fused pass this sorts
      each row, in plain torch.
    - A chosen token becomes `mask_id` with probability `replace[0]`, a uniform id of the vocabulary that is neither
      special nor `mask_id` with `replace[1]` (which may be the token itself), and stays as it is otherwise; each token
      of a word or span has its own draw.

    Time and memory are O(tokens) without `min_per_row`; beyond the two results the fused backends allocate nothing of
    the size of the input, but for a byte a token where a mask is not bool or `attention_mask` is given.
    A choice that chains units (`word_ids`, `mean_span`) runs the rows in parallel, each from left to right.

    Args:
        input_ids: token ids `(..., T)`, int64, int32, int16 or uint16; never modified. Ids outside [0, vocab_size) are
            ordinary ids.
        mask_id: id of the mask token, in [0, vocab_size).
        vocab_size: number of ids, at most 2**31 - 1.
        probability: probability that an eligible token is chosen.
        replace: fractions of the chosen tokens that become `mask_id` and a random id; the rest stay.
        special_ids: ids that are never chosen and never drawn: ints, or a 1-d int tensor or array on the CPU. Under
            `torch.compile` pass ints.
        special_mask: bool or int `(..., T)`; tokens where it is not 0 are never chosen.
        attention_mask: bool or int `(..., T)`; tokens where it is 0, the padding, are never chosen.
        word_ids: int64 or int32 `(..., T)`, the word of each token; negative: belongs to no word and is never chosen.
            Or (nested) sequences of ints and None, which is no word, as tokenizers give them; copied to the device.
        mean_span: mean length of a span, in units, 1 or more; at least `probability / (1 - probability)`.
        min_per_row: least number of chosen units (tokens, or words) of a row that has so many.
        ignore_index: label of the tokens that were not chosen.
        row_ids: int64 `(...)`, the number of each row for the random stream, in place of its flattened index: with a
            number per example, the labels of an example do not depend on its batch. They do depend on T, the row length
            after padding.
        seed: an int in [-2**63, 2**64), or a 0-d int64 tensor on the device of `input_ids`.
        generator: draws the seed if `seed` is None; default: torch's default generator of the device.

    Returns:
        `MaskedTokens(input_ids, labels)`, both of the shape and dtype of `input_ids`, contiguous; but the labels of
        uint16 ids are int32, which holds `ignore_index`.

    Raises:
        TypeError, ValueError: for an argument of the wrong type, dtype, shape, device or range; also if
            `replace[1] > 0` but all ids are special.

    Source: Devlin, Chang, Lee and Toutanova, "BERT", 2018, section 3.1; spans after Joshi et al., "SpanBERT", 2020.

    >>> import sslkernels as sk
    >>> ids = torch.randint(5, 30522, (2, 128))
    >>> masked = sk.mask_tokens(ids, mask_id=103, vocab_size=30522, special_ids=(0, 101, 102), seed=0)
    >>> bool(((masked.labels == -100) | (masked.labels == ids)).all())
    True
    """
    checks.tensor(NAME, "input_ids", input_ids, ID_DTYPES)
    checks.dims(NAME, "input_ids", input_ids, 1, "(..., T)")
    checks.tensor(NAME, "special_mask", special_mask, MASK_DTYPES, optional=True)
    checks.tensor(NAME, "attention_mask", attention_mask, MASK_DTYPES, optional=True)
    word_ids = _word_ids(word_ids, input_ids.device)
    checks.tensor(NAME, "word_ids", word_ids, checks.INDEX_DTYPES, optional=True)
    checks.tensor(NAME, "row_ids", row_ids, (torch.int64,), optional=True)
    checks.shape(NAME, "special_mask", special_mask, input_ids.shape, "input_ids.shape")
    checks.shape(NAME, "attention_mask", attention_mask, input_ids.shape, "input_ids.shape")
    checks.shape(NAME, "word_ids", word_ids, input_ids.shape, "input_ids.shape")
    checks.shape(NAME, "row_ids", row_ids, input_ids.shape[:-1], "input_ids.shape[:-1]")
    given = {"special_mask": special_mask, "attention_mask": attention_mask, "word_ids": word_ids, "row_ids": row_ids}
    for argument, value in given.items():
        checks.same_device(NAME, argument, value, "input_ids", input_ids.device)
    checks.integer(NAME, "min_per_row", min_per_row, low=0)
    ids = _special_ids(special_ids)
    _check_options(input_ids.dtype, ids, mask_id, vocab_size, probability, replace, mean_span, ignore_index)

    replace_mask, replace_random = map(float, replace)
    span = 0.0 if mean_span is None else float(mean_span)
    options = MaskOptions(
        ids, mask_id, vocab_size, float(probability), replace_mask, replace_random, span, ignore_index
    )
    columns = input_ids.shape[-1]
    rows = math.prod(input_ids.shape[:-1])

    def as_rows(tensor: Tensor | None, *shape: int) -> Any:
        return None if tensor is None else tensor.reshape(shape).contiguous()

    wide = input_ids.to(torch.int32) if input_ids.dtype in (torch.int16, torch.uint16) else input_ids
    if special_mask is not None and special_mask.dtype != torch.bool:
        special_mask = special_mask != 0
    if attention_mask is not None:
        padding = attention_mask == 0
        special_mask = padding if special_mask is None else padding | special_mask
    inputs = MaskInputs(
        as_rows(wide, rows, columns),
        seed_tensor(NAME, seed, generator, input_ids.device),
        as_rows(special_mask, rows, columns),
        as_rows(word_ids, rows, columns),
        as_rows(row_ids, rows),
    )
    if min_per_row > 0:
        inputs, options = _at_least(inputs, options, min_per_row)
    new_ids, labels = (result.reshape(input_ids.shape) for result in mask_tokens_fwd(inputs, options))
    return MaskedTokens(new_ids.to(input_ids.dtype), labels.to(_label_dtype(input_ids.dtype)))


def _label_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.int32 if dtype == torch.uint16 else dtype


def _word_ids(word_ids: Any, device: torch.device) -> Tensor | None:
    """A tensor as it is; (nested) sequences of ints and None as a tensor, -1 for None."""
    if word_ids is None or isinstance(word_ids, Tensor):
        return word_ids

    def numbers(words: Any) -> Any:
        if words is None:
            return -1
        if isinstance(words, Sequence) and not isinstance(words, str):
            return [numbers(word) for word in words]
        checks.integer(NAME, "word_ids", words)
        return words

    if not isinstance(word_ids, Sequence) or isinstance(word_ids, str):
        must = "be a tensor, or sequences of ints and None"
        checks.fail(TypeError, NAME, "word_ids", must, type(word_ids).__name__)
    try:
        return torch.tensor(numbers(word_ids), dtype=torch.int64, device=device)
    except (ValueError, TypeError) as error:
        if str(error).startswith(NAME):
            raise
        checks.fail(ValueError, NAME, "word_ids", "have rows of equal length", "ragged ones")


def _special_ids(special_ids: Sequence[int] | Tensor) -> tuple[int, ...]:
    if isinstance(special_ids, Tensor):
        checks.tensor(NAME, "special_ids", special_ids, checks.INDEX_DTYPES)
        checks.dims(NAME, "special_ids", special_ids, 1, "(number of special ids,)", high=1)
        if special_ids.device.type != "cpu":
            must = "be ints or a tensor on the CPU (reading it from a GPU would synchronise)"
            checks.fail(ValueError, NAME, "special_ids", must, special_ids.device)
        special_ids = special_ids.tolist()
    elif getattr(special_ids, "ndim", 0) == 1:  # a NumPy array
        special_ids = special_ids.tolist()
    if not isinstance(special_ids, Sequence) or isinstance(special_ids, str):
        checks.fail(TypeError, NAME, "special_ids", "be a sequence of ints", type(special_ids).__name__)
    return tuple(special_ids)


def _check_options(
    dtype: torch.dtype,
    special_ids: tuple[int, ...],
    mask_id: int,
    vocab_size: int,
    probability: float,
    replace: tuple[float, float],
    mean_span: float | None,
    ignore_index: int,
) -> None:
    for i in special_ids:
        checks.integer(NAME, "special_ids", i)
        if i == 2**63 - 1:  # the end of its range would not fit in 64 bits
            checks.fail(ValueError, NAME, "special_ids", "be less than 2**63 - 1", i)
    checks.integer(NAME, "vocab_size", vocab_size, low=1)
    if vocab_size > _MAX_VOCAB:
        checks.fail(ValueError, NAME, "vocab_size", f"be at most {_MAX_VOCAB}", vocab_size)
    checks.integer(NAME, "mask_id", mask_id, low=0)
    if mask_id >= vocab_size:
        checks.fail(ValueError, NAME, "mask_id", f"be less than vocab_size = {vocab_size}", mask_id)
    checks.integer(NAME, "ignore_index", ignore_index)
    if vocab_size - 1 > torch.iinfo(dtype).max:
        checks.fail(ValueError, NAME, "vocab_size", f"be at most {torch.iinfo(dtype).max + 1} for {dtype}", vocab_size)
    labels = torch.iinfo(_label_dtype(dtype))
    if not labels.min <= ignore_index <= labels.max:
        checks.fail(ValueError, NAME, "ignore_index", f"fit in torch.{labels.dtype}, the dtype of labels", ignore_index)
    checks.number(NAME, "probability", probability, low=0.0, high=1.0)
    if not isinstance(replace, (tuple, list)) or len(replace) != 2:
        checks.fail(TypeError, NAME, "replace", "be two numbers, the parts replaced by mask_id and at random", replace)
    for part in replace:
        checks.number(NAME, "replace", part, low=0.0, high=1.0)
    if replace[0] + replace[1] > 1:
        checks.fail(ValueError, NAME, "replace", "have a sum of at most 1", tuple(replace))
    others = {i for i in special_ids if 0 <= i < vocab_size}
    if replace[1] > 0 and len(others) + all([i != mask_id for i in others]) == vocab_size:
        must = "be 0 where all ids of the vocabulary are special"
        checks.fail(ValueError, NAME, "replace[1]", must, replace[1])
    if mean_span is not None:
        checks.number(NAME, "mean_span", mean_span, low=1.0)
        if span_start_probability(probability, mean_span) > 1:
            must = f"be at least probability / (1 - probability) with probability = {probability:g}"
            checks.fail(ValueError, NAME, "mean_span", must, mean_span)
