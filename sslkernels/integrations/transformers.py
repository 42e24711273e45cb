"""Masked and causal language models of Hugging Face transformers, whose loss is computed without their logits.

>>> import transformers
>>> import sslkernels as sk
>>> config = transformers.BertConfig(
...     vocab_size=1000, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
... )
>>> model = sk.integrations.transformers.patch(transformers.BertForMaskedLM(config))
>>> ids = torch.randint(5, 1000, (2, 16))
>>> masked = sk.mask_tokens(ids, mask_id=4, vocab_size=1000, seed=0)
>>> model(masked.input_ids, labels=masked.labels).loss.backward()

The model keeps its class, parameters and code. While it is called with `labels`, the `forward` of its output embeddings
returns the loss in place of the logits, and the `forward` of the model moves it from `logits` to `loss`.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sslkernels.core import checks
from sslkernels.vocabulary.cross_entropy import cross_entropy
from sslkernels.vocabulary.linear_cross_entropy import linear_cross_entropy
from sslkernels.vocabulary.mask_tokens import mask_tokens

# What a model does to the output of its embeddings before it is `logits`: the attribute, whether its config has it (or
# the model itself), the value that makes it do nothing, and what it is to the logits.
_TRANSFORMS = (
    ("final_logit_softcapping", True, None, "softcap"),
    ("logits_scaling", True, 1.0, "divisor"),
    ("logits_scaling", True, 1.0, "factor"),
    ("logit_scale", False, 1.0, "factor"),
)


class _Labels(NamedTuple):
    """What a call asked of the loss. target: class of each row of the output embeddings, already shifted."""

    target: Tensor
    ignore_index: int
    num_items: Any
    compact: bool


class _Decoder:
    """The `forward` of the output embeddings: the loss (1, 1, 1) while `labels` are pending, else the logits."""

    def __init__(self, linear: nn.Linear) -> None:
        self.linear = linear
        self.labels: _Labels | None = None
        self.loss_options: dict[str, Any] = {}

    def __call__(self, input: Tensor) -> Tensor:
        linear, labels = self.linear, self.labels
        if labels is None:
            return nn.Linear.forward(linear, input)
        self.labels = None
        bias, scale = linear.bias, self.loss_options.get("logit_scale", 1.0)
        if bias is not None and scale != 1.0:
            bias = bias * scale
        loss = linear_cross_entropy(
            input,
            linear.weight,
            labels.target.to(input.device),
            linear_bias=bias,
            ignore_index=labels.ignore_index,
            num_items=labels.num_items.to(input.device) if isinstance(labels.num_items, Tensor) else labels.num_items,
            **self.loss_options,
        )
        return loss.reshape(1, 1, 1)


class _Model:
    """The `forward` of the model: takes the labels away from it, and makes the loss of what comes back."""

    def __init__(self, model: nn.Module, decoder: _Decoder, compact: bool) -> None:
        self.model = model
        self.decoder = decoder
        self.compact = compact
        self.shift = 0
        self.transform: tuple[str, bool, Any, str] | None = None
        self.neutral_config: Any = None
        self.head: nn.Module | None = None
        self.handle: Any = None
        # The model's own signature is what generation and trainers inspect.
        self.__signature__ = inspect.signature(model.forward)
        self.labels_position = list(self.__signature__.parameters).index("labels")
        self.before = {module: vars(module).get("forward") for module in (model, decoder.linear)}

    def own_forward(self, *args: Any, **kwargs: Any) -> Any:
        before = self.before[self.model]
        return type(self.model).forward(self.model, *args, **kwargs) if before is None else before(*args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        skip_logits = kwargs.pop("skip_logits", None)
        if len(args) > self.labels_position:
            place = self.labels_position
            kwargs["labels"] = args[place]
            args = (*args[:place], None, *args[place + 1 :])
        labels, shifted = kwargs.pop("labels", None), kwargs.pop("shift_labels", None)
        if labels is None and shifted is None:
            return self.own_forward(*args, **kwargs)
        ignore_index, num_items = kwargs.pop("ignore_index", -100), kwargs.pop("num_items_in_batch", None)
        if shifted is None:
            shifted = labels
            if self.shift:
                shifted = nn.functional.pad(labels, (0, self.shift), value=ignore_index)[..., self.shift :]
        tuples = not kwargs.pop("return_dict", getattr(self.model.config, "return_dict", True))
        kwargs["return_dict"] = True
        skip = self.model.training if skip_logits is None else skip_logits
        # Under torch.compile the number of masked rows would be a shape that the graph does not know.
        compact = self.compact and not torch.compiler.is_compiling()
        asked = _Labels(shifted, ignore_index, num_items, compact)
        output = self._without_logits(asked, args, kwargs) if skip else self._with_logits(asked, args, kwargs)
        return output.to_tuple() if tuples else output

    def _without_logits(self, asked: _Labels, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.decoder.labels, self.decoder.loss_options = asked, self.loss_options()
        try:
            with self.untransformed():
                output = self.own_forward(*args, **kwargs)
        finally:
            self.decoder.labels = None
        loss = output["logits"]
        if loss.shape != (1, 1, 1):
            raise RuntimeError(
                f"patch: the logits of {type(self.model).__name__} must be the output of its output embeddings, as when "
                f"it was patched; got {tuple(loss.shape)} in place of the loss (unpatch it before adapters are added)"
            )
        return self._finished(output, loss.reshape(()), None)

    def _with_logits(self, asked: _Labels, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = self.own_forward(*args, **kwargs)
        logits = output["logits"]
        loss = cross_entropy(
            logits,
            asked.target.to(logits.device),
            ignore_index=asked.ignore_index,
            num_items=asked.num_items.to(logits.device) if isinstance(asked.num_items, Tensor) else asked.num_items,
            class_dim=-1,
        )
        return self._finished(output, loss, logits)

    def _finished(self, output: Any, loss: Tensor, logits: Tensor | None) -> Any:
        auxiliary = _auxiliary(self.model, output)
        loss = loss if auxiliary is None else loss + auxiliary.to(loss.device)
        return type(output)(**{**output, "loss": loss, "logits": logits})

    def loss_options(self) -> dict[str, Any]:
        if self.transform is None:
            return {}
        name, in_config, _, kind = self.transform
        value = getattr(self.model.config if in_config else self.model, name)
        if kind == "softcap":
            return {"softcap": value}
        return {"logit_scale": 1.0 / value if kind == "divisor" else value}

    @contextlib.contextmanager
    def untransformed(self) -> Iterator[None]:
        """The model leaves the output of its embeddings as it is: what it does to logits is done by the loss."""
        if self.transform is None:
            yield
            return
        name, in_config, neutral, _ = self.transform
        name, value = ("config", self.neutral_config) if in_config else (name, neutral)
        before = getattr(self.model, name)
        setattr(self.model, name, value)
        try:
            yield
        finally:
            setattr(self.model, name, before)

    def keep_masked_rows(self, head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """A forward pre-hook of the head: rows without a label do not go through its transform."""
        asked = self.decoder.labels
        if asked is None or not asked.compact:
            return None
        hidden = args[0]
        rows = (asked.target.reshape(-1) != asked.ignore_index).nonzero().squeeze(1)
        self.decoder.labels = asked._replace(target=asked.target.reshape(-1)[rows][None], compact=False)
        return (hidden.flatten(0, -2)[rows.to(hidden.device)][None], *args[1:])


def patch(model: nn.Module, *, compact: bool = True, example_inputs: Mapping[str, Any] | None = None) -> nn.Module:
    """Make a language model compute its loss without its logits. Nothing but this instance changes.

    In training mode, a call with `labels` returns the same loss and gradients, and None for the logits; in evaluation
    mode it returns logits, bit for bit as before, unless it is called with `skip_logits=True`. (`skip_logits=False`
    gives the logits in training too.) The loss leaves through the output of the model. `num_items_in_batch` divides the
    sum of the losses where it is given, in every model: gradients accumulated over micro-batches are those of the batch.

    The model is called on a few tokens to see that its loss is the cross-entropy of its output embeddings, of the same
    token or the next one, up to a softcap or scale in its configuration; it is left as it was, and so is the state of
    the random generators.
    With FSDP2, patch the model first and shard it then. An adapter on the output embeddings comes before `patch`, which
    then refuses, or fails at the next call with labels; adapters elsewhere may come before or after. `nn.DataParallel`
    replicas call the original. A deep copy of a patched model is a patched model.

    Args:
        model: any masked or causal language model of transformers 5, on its device, or a PEFT model around one.
        compact: let only the rows with a label into the transform before the output embeddings, where there is one.
            Reads their number on the host. Under `torch.compile` all rows go through the transform.
        example_inputs: the arguments of the trial call, without labels. Default: `input_ids` `(2, 8)`.

    Returns:
        `model`.

    Raises:
        TypeError, ValueError: naming the class of the model and what about it does not fit.
    """
    checks.boolean("patch", "compact", compact)
    model = _unwrapped(model)
    if isinstance(vars(model).get("forward"), _Model):
        unpatch(model)
    with _left_as_it_was(model), torch.enable_grad():
        seam = _fitted(model.eval(), compact, example_inputs)
    _install(seam)
    return model


def unpatch(model: nn.Module) -> nn.Module:
    """Give a model that was patched its own code back, and return it. One that was not patched is left alone."""
    model = _unwrapped(model)
    seam = vars(model).get("forward")
    if isinstance(seam, _Model):
        if seam.handle is not None:
            seam.handle.remove()
        for module, before in seam.before.items():
            del module.forward
            if before is not None:
                module.forward = before
    return model


def _unwrapped(model: Any) -> nn.Module:
    if not isinstance(model, nn.Module):
        checks.fail(TypeError, "patch", "model", "be a torch.nn.Module", type(model).__name__)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _install(seam: _Model) -> None:
    seam.model.forward = seam
    seam.decoder.linear.forward = seam.decoder
    if seam.head is not None:
        seam.handle = seam.head.register_forward_pre_hook(seam.keep_masked_rows)


def _auxiliary(model: nn.Module, output: Any) -> Tensor | None:
    """What a mixture of experts adds to its loss for the balance of its router."""
    auxiliary = output.get("aux_loss")
    return model.router_aux_loss_coef * auxiliary if isinstance(auxiliary, Tensor) else None


def _refuse(model: nn.Module, why: str) -> None:
    must = "be a language model whose loss is the cross-entropy of the output of its output embeddings"
    checks.fail(ValueError, "patch", "model", must, f"{type(model).__name__}, {why}")


# The trial of a model.


class _Recorder:
    """A `forward` of output embeddings that keeps its input and returns chosen logits."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits
        self.inputs: list[Tensor] = []

    def __call__(self, input: Tensor) -> Tensor:
        self.inputs.append(input)
        return self.logits


def _fitted(model: nn.Module, compact: bool, example_inputs: Mapping[str, Any] | None) -> _Model:
    """The seam of a model, found and checked by calls on a few tokens."""
    linear = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if not isinstance(linear, nn.Linear) or type(linear).forward is not nn.Linear.forward:
        _refuse(model, f"whose output embeddings are {type(linear).__name__}")
    if "labels" not in inspect.signature(model.forward).parameters:
        _refuse(model, "whose forward takes no labels")
    vocab, device = linear.out_features, linear.weight.device
    special = [getattr(model.config, f"{name}_token_id", None) for name in ("pad", "bos", "eos")]
    ids = [token for token in range(min(vocab, 20)) if token not in special] or [0]
    inputs = {"input_ids": torch.tensor(16 * ids, device=device)[:16].reshape(2, 8)}
    inputs = dict(inputs if example_inputs is None else example_inputs)
    shape = next(iter(inputs.values())).shape[:2]
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(vocab, shape, generator=draw).to(device)
    labels[0, 1] = -100
    logits = (4 * torch.randn(*shape, vocab, generator=draw)).to(linear.weight).requires_grad_()

    seam = _Model(model, _Decoder(linear), compact)
    own, without = (_trial(seam, logits, given) for given in ({**inputs, "labels": labels}, inputs))
    if not torch.equal(own.input, without.input):
        _refuse(model, "in which more than the loss depends on the labels")
    if own.input.shape[:-1] != shape:
        _refuse(model, f"whose output embeddings see {tuple(own.input.shape)} for tokens {tuple(shape)}")
    seam.transform = _found_transform(seam, logits, without.logits, inputs)
    seam.shift = _found_shift(seam, logits, labels, own.loss)
    if compact:
        seam.head = _found_head(seam, inputs)
    _check_loss(seam, inputs, labels)
    return seam


class _Trial(NamedTuple):
    input: Tensor
    logits: Tensor
    loss: Tensor | None


def _trial(seam: _Model, logits: Tensor, inputs: dict[str, Any]) -> _Trial:
    """A call of the model's own code, in which `logits` are the output of its output embeddings."""
    recorder, model = _Recorder(logits), seam.model
    with _forward_of(seam.decoder.linear, recorder), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        output = _own_call(model, inputs)
    if len(recorder.inputs) != 1:
        _refuse(model, f"which calls its output embeddings {len(recorder.inputs)} times")
    if output.get("logits") is None:
        _refuse(model, "whose output has no logits")
    loss, auxiliary = output.get("loss"), _auxiliary(model, output)
    if loss is not None and auxiliary is not None:
        loss = loss - auxiliary
    return _Trial(recorder.inputs[0].detach(), output["logits"], loss)


def _own_call(model: nn.Module, inputs: dict[str, Any]) -> Any:
    try:
        return model(**inputs, return_dict=True)
    except Exception as error:
        message = (str(error).splitlines() or [""])[0]
        _refuse(model, f"on which a trial with {sorted(inputs)} fails ({type(error).__name__}: {message})")


def _found_transform(
    seam: _Model, logits: Tensor, seen: Tensor, inputs: dict[str, Any]
) -> tuple[str, bool, Any, str] | None:
    """What the model does to the output of its output embeddings, of `_TRANSFORMS`; None: it is the logits."""
    model = seam.model
    if _is_same(seen, logits):
        return None
    for transform in _TRANSFORMS:
        name, in_config, neutral, kind = transform
        value = getattr(model.config if in_config else model, name, None)
        if not isinstance(value, (int, float)):
            continue
        expected = {
            "softcap": lambda x, by: by * torch.tanh(x / by),
            "factor": lambda x, by: x * by,
            "divisor": lambda x, by: x / by,
        }[kind](logits.detach(), value)
        if not torch.allclose(seen.detach().to(expected), expected, rtol=1e-2 if logits.dtype.itemsize < 4 else 1e-5):
            continue
        seam.transform = transform
        if in_config:
            seam.neutral_config = copy.copy(model.config)
            vars(seam.neutral_config)[name] = neutral
        with seam.untransformed():
            if _is_same(_trial(seam, logits, inputs).logits, logits):
                return transform
    seam.transform = None
    _refuse(model, "which changes the output of its output embeddings before it is the logits")


def _is_same(seen: Tensor, logits: Tensor) -> bool:
    """Whether `seen` are `logits` by their memory, or by casts and multiplications that change no value. (Equal values
    are not enough: a bias that is added is 0 when a model is made.)"""
    if seen.shape != logits.shape:
        return False
    if seen.data_ptr() == logits.data_ptr():
        return True
    node = seen.grad_fn
    while node is not None and node.name() in ("ToCopyBackward0", "MulBackward0", "DivBackward0"):
        node = node.next_functions[0][0]
    return getattr(node, "variable", None) is logits and torch.equal(seen.to(logits.dtype), logits)


def _found_shift(seam: _Model, logits: Tensor, labels: Tensor, own: Tensor | None) -> int:
    if own is None:
        _refuse(seam.model, "which computes no loss")
    losses = []
    for shift in (0, 1):
        target = nn.functional.pad(labels, (0, shift), value=-100)[..., shift:]
        losses.append(cross_entropy(logits.detach().float(), target, class_dim=-1, **seam.loss_options()))
    own = own.detach().float().reshape(())
    shift = min((0, 1), key=lambda shift: float((losses[shift] - own).abs()))
    if not torch.allclose(own, losses[shift], rtol=_tolerance(logits)):
        _refuse(seam.model, f"whose loss is {own:.6g} where the cross-entropy is {losses[shift]:.6g}")
    return shift


def _tolerance(logits: Tensor) -> float:
    return 2e-2 if logits.dtype.itemsize < 4 else 1e-5


def _found_head(seam: _Model, inputs: dict[str, Any]) -> nn.Module | None:
    """The child of the model that takes hidden states to the output embeddings row by row, if there is one."""
    model, calls = seam.model, []
    base = getattr(model, "base_model", None)
    children = [child for child in model.children() if child is not base and child is not seam.decoder.linear]

    def record(module: nn.Module, args: tuple[Any, ...]) -> None:
        calls.append((module, args))

    with contextlib.ExitStack() as stack, torch.no_grad():
        for child in children:
            stack.callback(child.register_forward_pre_hook(record).remove)
        _own_call(model, inputs)
    for module, args in calls:
        rows = next(iter(inputs.values())).shape[:2]
        if not args or not isinstance(args[0], Tensor) or args[0].dim() != 3 or args[0].shape[:2] != rows:
            return None
        return module if _works_by_row(seam, module, inputs) else None
    return None


def _works_by_row(seam: _Model, head: nn.Module, inputs: dict[str, Any]) -> bool:
    """Whether the output embeddings see the same rows if the head is given some of them."""
    linear, kept = seam.decoder.linear, torch.tensor([6, 1, 3], device=seam.decoder.linear.weight.device)
    seen = []

    def some(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0].flatten(0, 1)[kept][None], *args[1:])

    def keep(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(args[0])

    with contextlib.ExitStack() as stack, torch.no_grad(), torch.random.fork_rng(devices=[]):
        stack.callback(linear.register_forward_pre_hook(keep).remove)
        for hooks in ((), (some,)):
            torch.manual_seed(0)
            for hook in hooks:
                stack.callback(head.register_forward_pre_hook(hook).remove)
            try:
                seam.model(**inputs, return_dict=True)
            except Exception:
                return False
    whole, part = (input.flatten(0, -2) for input in seen)
    tolerance = _tolerance(whole)
    return part.shape[0] == len(kept) and torch.allclose(part, whole[kept], rtol=tolerance, atol=tolerance)


def _check_loss(seam: _Model, inputs: dict[str, Any], labels: Tensor) -> None:
    """The patched model's loss is its own, from its own weights."""
    model, losses = seam.model, []
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for patched in (False, True):
            torch.manual_seed(0)
            given = {"skip_logits": True} if patched else {}
            if patched:
                _install(seam)
            try:
                losses.append(_own_call(model, {**inputs, "labels": labels, **given})["loss"].float().reshape(()))
            finally:
                unpatch(model)
    if not torch.allclose(losses[0], losses[1], rtol=_tolerance(seam.decoder.linear.weight)):
        _refuse(model, f"whose loss is {losses[0]:.6g}, and {losses[1]:.6g} when it is patched")


@contextlib.contextmanager
def _forward_of(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


@contextlib.contextmanager
def _left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Attributes, submodules and configuration of a model are restored: some replace modules at a short input."""
    holders = [*model.modules()]
    holders += [vars(module)["config"] for module in holders if "config" in vars(module)]
    dicts = [vars(holder) for holder in holders]
    dicts += [value for attributes in dicts for value in attributes.values() if type(value) is dict]
    before = [dict(each) for each in dicts]
    try:
        yield
    finally:
        for each, content in zip(dicts, before, strict=True):
            each.clear()
            each.update(content)


class DataCollatorForMaskedLM:
    """Pads examples and masks them by `mask_tokens`: the labels of a masked language model.

    Args:
        tokenizer: a tokenizer with a mask token; it pads the examples.
        probability: see `mask_tokens`, as for `replace`, `mean_span` and `min_per_row`.
        replace: fractions of the chosen tokens that become the mask token and a random one.
        whole_words: choose words. An example then has "word_ids" (`encoding.word_ids()`), or "offset_mapping", in which
            a token that begins where the one before it ends belongs to the same word.
        mean_span: mean length of a span, in tokens or words.
        min_per_row: least number of chosen tokens (words) of an example.
        pad_to_multiple_of: pads to a multiple of this length.
        seed: of a generator of this collator's own, in each worker another; None: torch's default generator.

    Special tokens of the tokenizer are neither chosen nor drawn; tokens with "special_tokens_mask" 1 are not chosen.

    >>> collate = sk.integrations.transformers.DataCollatorForMaskedLM(tokenizer, probability=0.3)  # doctest: +SKIP
    >>> Trainer(model, data_collator=collate, train_dataset=tokenized)  # doctest: +SKIP
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        probability: float = 0.15,
        replace: tuple[float, float] = (0.8, 0.1),
        whole_words: bool = False,
        mean_span: float | None = None,
        min_per_row: int = 0,
        pad_to_multiple_of: int | None = None,
        seed: int | None = None,
    ) -> None:
        name = type(self).__name__
        if getattr(tokenizer, "mask_token_id", None) is None:
            checks.fail(ValueError, name, "tokenizer", "have a mask token", type(tokenizer).__name__)
        checks.boolean(name, "whole_words", whole_words)
        checks.integer(name, "pad_to_multiple_of", pad_to_multiple_of, low=1, optional=True)
        checks.integer(name, "seed", seed, optional=True)
        self.tokenizer = tokenizer
        self.whole_words = whole_words
        self.pad_to_multiple_of = pad_to_multiple_of
        self.seed = seed
        self.generator: torch.Generator | None = None
        self.options: dict[str, Any] = {
            "probability": probability,
            "replace": replace,
            "mean_span": mean_span,
            "min_per_row": min_per_row,
        }
        # Options are checked here rather than at the first batch, in a worker.
        self._masked(torch.zeros(1, 0, dtype=torch.int64), seed=0)

    def __call__(self, examples: Sequence[Any]) -> dict[str, Tensor]:
        examples = [dict(each) if isinstance(each, Mapping) else {"input_ids": each} for each in examples]
        word_ids = [_word_ids(each) for each in examples] if self.whole_words else None
        for each in examples:
            each.pop("offset_mapping", None)
            each.pop("word_ids", None)
        batch = self.tokenizer.pad(examples, return_tensors="pt", pad_to_multiple_of=self.pad_to_multiple_of)
        ids = batch["input_ids"]
        options = {"special_mask": batch.pop("special_tokens_mask", None), "attention_mask": batch.get("attention_mask")}
        if word_ids is not None:
            left = getattr(self.tokenizer, "padding_side", "right") == "left"
            padding = [[None] * (ids.shape[1] - len(words)) for words in word_ids]
            pairs = zip(padding, word_ids, strict=True)
            options["word_ids"] = [[*pad, *words] if left else [*words, *pad] for pad, words in pairs]
        if self.seed is not None and self.generator is None:
            worker = torch.utils.data.get_worker_info()
            self.generator = torch.Generator().manual_seed(self.seed + (0 if worker is None else worker.id))
        masked = self._masked(ids, generator=self.generator, **options)
        batch["input_ids"], batch["labels"] = masked.input_ids, masked.labels
        return batch

    def _masked(self, ids: Tensor, **options: Any) -> Any:
        return mask_tokens(
            ids,
            mask_id=self.tokenizer.mask_token_id,
            vocab_size=len(self.tokenizer),
            special_ids=self.tokenizer.all_special_ids,
            **self.options,
            **options,
        )


def _word_ids(example: Mapping[str, Any]) -> list[int | None]:
    if "word_ids" in example:
        return list(example["word_ids"])
    if "offset_mapping" not in example:
        must = "have 'word_ids' or 'offset_mapping' for whole words"
        checks.fail(ValueError, "DataCollatorForMaskedLM", "examples", must, sorted(example))
    words: list[int | None] = []
    word, end = -1, None
    for start, stop in example["offset_mapping"]:
        if start == stop:  # a special token
            words.append(None)
            end = None
            continue
        word += start != end
        words.append(word)
        end = stop
    return words
