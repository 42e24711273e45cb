"""The `forward` of a patched language model and of its output embeddings, and the trial call that fits them to it."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from sslkernels.core.modules import Lock
from sslkernels.vocabulary.cross_entropy import cross_entropy
from sslkernels.vocabulary.linear_cross_entropy import linear_cross_entropy


class Labels(NamedTuple):
    """Arguments of the loss of one call. target: class of each row of the output embeddings, already shifted."""

    target: Tensor
    ignore_index: int
    num_items: Any
    compact: bool

    def on(self, device: torch.device) -> dict[str, Any]:
        """Arguments of a loss on the device."""
        count = self.num_items.to(device) if isinstance(self.num_items, Tensor) else self.num_items
        return {"target": self.target.to(device), "ignore_index": self.ignore_index, "num_items": count}


class Transform(NamedTuple):
    """What a model does to the output of its output embeddings before it is `logits`."""

    attribute: str
    in_config: bool  # whether the configuration has the attribute, or the model
    neutral: Any  # the value with which nothing is done
    kind: str  # "softcap", "factor" or "divisor"

    def value(self, model: nn.Module) -> Any:
        return getattr(model.config if self.in_config else model, self.attribute, None)

    def loss_options(self, model: nn.Module) -> dict[str, Any]:
        value = self.value(model)
        if self.kind == "softcap":
            return {"softcap": value}
        return {"logit_scale": 1.0 / value if self.kind == "divisor" else value}


TRANSFORMS = (
    Transform("final_logit_softcapping", True, None, "softcap"),
    Transform("logits_scaling", True, 1.0, "divisor"),
    Transform("logits_scaling", True, 1.0, "factor"),
    Transform("logit_scale", False, 1.0, "factor"),
)


class Decoder:
    """The `forward` of the output embeddings: the loss (1, 1, 1) while `labels` are pending, else the logits."""

    def __init__(self, linear: nn.Linear) -> None:
        self.linear: Any = linear
        self.labels: Labels | None = None
        self.loss_options: dict[str, Any] = {}

    def __call__(self, input: Tensor) -> Tensor:
        labels, weight, bias = self.labels, self.linear.weight, self.linear.bias
        if labels is None:
            return nn.functional.linear(input, weight, bias)
        self.labels = None
        if bias is not None and "logit_scale" in self.loss_options:
            bias = bias * self.loss_options["logit_scale"]
        options = {**labels.on(input.device), **self.loss_options}
        return linear_cross_entropy(input, weight, linear_bias=bias, **options).repeat(1, 1, 1)  # FSDP2 wants no view


class PatchedForward:
    """The `forward` of the model: takes the labels away from it, and makes the loss of what comes back.

    `shift`, `transform` and `head`, which the rows with a label go through alone, are found in a trial.
    """

    def __init__(self, model: nn.Module, linear: nn.Linear, compact: bool) -> None:
        self.model: Any = model
        self.decoder = Decoder(linear)
        self.compact = compact
        self.shift = 0
        self.transform: Transform | None = None
        self.neutral: tuple[str, Any] | None = None
        self.head: nn.Module | None = None
        self.handle: Any = None
        self.lock = Lock()
        # Generation and trainers inspect the signature of the model.
        self.__signature__ = inspect.signature(model.forward)
        self.labels_position = list(self.__signature__.parameters).index("labels")
        self.before = {module: vars(module).get("forward") for module in (model, linear)}

    def install(self) -> None:
        self.model.forward = self
        self.model._replicate_for_data_parallel = refuse_replicas
        self.decoder.linear.forward = self.decoder
        if self.head is not None:
            self.handle = self.head.register_forward_pre_hook(self.keep_masked_rows)

    def remove(self) -> None:
        if self.handle is not None:
            self.handle.remove()
        vars(self.model).pop("_replicate_for_data_parallel", None)
        for module, before in self.before.items():
            restore_forward(module, before)

    def follow_output_embeddings(self) -> None:
        """The model may have been resized, and has other output embeddings then."""
        embeddings = self.model.get_output_embeddings()
        if embeddings is not self.decoder.linear and type(embeddings) is nn.Linear:
            restore_forward(self.decoder.linear, self.before.pop(self.decoder.linear))
            self.before[embeddings] = vars(embeddings).get("forward")
            self.decoder.linear = embeddings
            self.decoder.linear.forward = self.decoder

    def own_forward(self, *args: Any, **kwargs: Any) -> Any:
        before = self.before[self.model]
        return type(self.model).forward(self.model, *args, **kwargs) if before is None else before(*args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # The labels are pending, and the model is untransformed, for one call. torch.compile traces no lock.
        with contextlib.nullcontext() if torch.compiler.is_compiling() else self.lock.held:
            return self._called(*args, **kwargs)

    def _called(self, *args: Any, **kwargs: Any) -> Any:
        args = args[1:] if args and args[0] is self.model else args  # accelerate binds what it has unwrapped
        skip_logits, place = kwargs.pop("skip_logits", None), self.labels_position
        if len(args) > place:
            kwargs["labels"], args = args[place], (*args[:place], None, *args[place + 1 :])
        labels, shifted = kwargs.pop("labels", None), kwargs.pop("shift_labels", None)
        if labels is None and shifted is None:
            return self.own_forward(*args, **kwargs)
        ignore_index, num_items = kwargs.pop("ignore_index", -100), kwargs.pop("num_items_in_batch", None)
        if shifted is None:
            shifted = nn.functional.pad(labels, (0, self.shift), value=ignore_index)[..., self.shift :]
        tuples = not kwargs.pop("return_dict", getattr(self.model.config, "return_dict", True))
        # Under torch.compile the number of rows with a label would be a shape that the graph does not know.
        compact = self.compact and not torch.compiler.is_compiling()
        asked = Labels(shifted, ignore_index, num_items, compact)
        skip = self.model.training if skip_logits is None else skip_logits
        output = (self._without_logits if skip else self._with_logits)(asked, args, {**kwargs, "return_dict": True})
        return output.to_tuple() if tuples else output

    def _without_logits(self, asked: Labels, args: Any, kwargs: dict[str, Any]) -> Any:
        self.follow_output_embeddings()
        self.decoder.labels, self.decoder.loss_options = asked, self.loss_options()
        try:
            with self.untransformed():
                output = self.own_forward(*args, **kwargs)
        finally:
            self.decoder.labels = None
        loss = output["logits"]
        if loss.shape != (1, 1, 1):
            must = f"logits of {type(self.model).__name__} must be the output of its output embeddings, as when patched"
            raise RuntimeError(f"patch: the {must}; got {tuple(loss.shape)} for a loss (an adapter on them?)")
        return self._finished(output, loss.sum(), None)  # no view, either

    def _with_logits(self, asked: Labels, args: Any, kwargs: dict[str, Any]) -> Any:
        output = self.own_forward(*args, **kwargs)
        logits = output["logits"]
        return self._finished(output, cross_entropy(logits, class_dim=-1, **asked.on(logits.device)), logits)

    def _finished(self, output: Any, loss: Tensor, logits: Tensor | None) -> Any:
        balance = balance_loss(self.model, output)
        loss = loss if balance is None else loss + balance.to(loss.device)
        return type(output)(**{**output, "loss": loss, "logits": logits})

    def loss_options(self) -> dict[str, Any]:
        return {} if self.transform is None else self.transform.loss_options(self.model)

    @contextlib.contextmanager
    def untransformed(self) -> Iterator[None]:
        """The model leaves the output of its embeddings as it is: what it does to logits is done by the loss."""
        if self.neutral is None:
            yield
            return
        name, value = self.neutral
        before = getattr(self.model, name)
        setattr(self.model, name, value)
        try:
            yield
        finally:
            setattr(self.model, name, before)

    def set_transform(self, transform: Transform) -> None:
        self.transform, self.neutral = transform, (transform.attribute, transform.neutral)
        if transform.in_config:
            config = copy.copy(self.model.config)
            vars(config)[transform.attribute] = transform.neutral  # a strict field may refuse None
            self.neutral = "config", config

    def keep_masked_rows(self, head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """A forward pre-hook of the head: rows without a label do not go through its transform."""
        asked = self.decoder.labels
        if asked is None or not asked.compact or asked.target.numel() != args[0].shape[:-1].numel():
            return None
        target = asked.target.reshape(-1)
        rows = (target != asked.ignore_index).nonzero().squeeze(1)
        self.decoder.labels = asked._replace(target=target[rows][None], compact=False)
        return (args[0].flatten(0, -2)[rows.to(args[0].device)][None], *args[1:])


def refuse_replicas() -> NoReturn:
    """A replica would run the original's `forward`, on the original's parameters."""
    raise RuntimeError("patch: torch.nn.DataParallel cannot replicate a patched model; use DistributedDataParallel")


def balance_loss(model: Any, output: Any) -> Tensor | None:
    """What a mixture of experts adds to its loss for the balance of its router."""
    auxiliary = output.get("aux_loss")
    return model.router_aux_loss_coef * auxiliary if isinstance(auxiliary, Tensor) else None


def restore_forward(module: nn.Module, before: Callable[..., Any] | None) -> None:
    """`before`: the instance's own `forward`, or None if it has only its class's."""
    del module.forward
    if before is not None:
        module.forward = before


def fitted(model: nn.Module, compact: bool, example_inputs: Mapping[str, Any] | None) -> PatchedForward:
    """The `forward` that fits the model, which is in evaluation mode; refuses a model that none fits."""
    embeddings: Any = getattr(model, "get_output_embeddings", lambda: None)
    linear = embeddings()
    if not isinstance(linear, nn.Linear) or type(linear).forward is not nn.Linear.forward:
        _refuse(model, f"whose output embeddings are {type(linear).__name__}")
    if "labels" not in inspect.signature(model.forward).parameters:
        _refuse(model, "whose forward takes no labels")
    if linear.weight.is_meta:
        _refuse(model, "whose parameters are on the meta device: load them first")
    sharded = [hasattr(module, "unshard") for module in model.modules()]
    sharded += [type(parameter.data).__module__.startswith("torch.distributed") for parameter in model.parameters()]
    if any(sharded):
        _refuse(model, "which is sharded already: patch it first")
    vocab, device = linear.out_features, linear.weight.device
    special = [getattr(model.config, f"{name}_token_id", None) for name in ("pad", "bos", "eos")]
    ids = [token for token in range(min(vocab, 20)) if token not in special] or [0]
    inputs = dict(example_inputs or {"input_ids": torch.tensor(16 * ids, device=device)[:16].reshape(2, 8)})
    shape = next(iter(inputs.values())).shape[:2]
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(vocab, shape, generator=draw).to(device)
    labels[0, 1] = -100
    logits = (4 * torch.randn(*shape, vocab, generator=draw)).to(linear.weight).requires_grad_()

    forward = PatchedForward(model, linear, compact)
    own, without = (_trial(forward, logits, given) for given in ({**inputs, "labels": labels}, inputs))
    if not torch.equal(own.input, without.input):
        _refuse(model, "in which more than the loss depends on the labels")
    if own.input.shape[:-1] != shape:
        _refuse(model, f"whose output embeddings see {tuple(own.input.shape)} for tokens {tuple(shape)}")
    _find_transform(forward, logits, without.logits, inputs)
    _find_shift(forward, logits, labels, own.loss)
    if compact:
        forward.head = _found_head(forward, inputs)
    _check_loss(forward, {**inputs, "labels": labels})
    return forward


def _refuse(model: nn.Module, why: str) -> NoReturn:
    must = "be a language model whose loss is the cross-entropy of the output of its output embeddings"
    raise ValueError(f"patch: model must {must}; got {type(model).__name__}, {why}")


class _Trial(NamedTuple):
    input: Tensor
    logits: Tensor
    loss: Tensor | None


def _trial(forward: PatchedForward, logits: Tensor, inputs: dict[str, Any]) -> _Trial:
    """A call of the model's own code, in which `logits` are the output of its output embeddings."""
    model, seen = forward.model, []

    def chosen(input: Tensor) -> Tensor:
        seen.append(input)
        return logits

    linear = forward.decoder.linear
    linear.forward = chosen
    try:
        output = _called(model, inputs)
    finally:
        restore_forward(linear, forward.before[linear])
    if len(seen) != 1:
        _refuse(model, f"which calls its output embeddings {len(seen)} times")
    if output.get("logits") is None:
        _refuse(model, "whose output has no logits")
    loss, balance = output.get("loss"), balance_loss(model, output)
    return _Trial(seen[0].detach(), output["logits"], loss if loss is None or balance is None else loss - balance)


def _called(model: nn.Module, inputs: dict[str, Any]) -> Any:
    # Each call begins with the same states of the generators, which it leaves as they were.
    cuda = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    with torch.random.fork_rng(devices=cuda):
        try:
            return model(**inputs, return_dict=True)
        except Exception as error:
            message = (str(error).splitlines() or [""])[0]
            _refuse(model, f"on which a trial with {sorted(inputs)} fails ({type(error).__name__}: {message})")


def _find_transform(forward: PatchedForward, logits: Tensor, seen: Tensor, inputs: dict[str, Any]) -> None:
    """Finds what the model does to the output of its output embeddings; nothing, where it is the logits."""
    if _is_same(seen, logits):
        return
    for transform in TRANSFORMS:
        if not isinstance(transform.value(forward.model), (int, float)):
            continue
        options = transform.loss_options(forward.model)
        cap = options.get("softcap")
        expected = logits.detach() * options.get("logit_scale", 1.0)
        expected = expected if cap is None else cap * torch.tanh(expected / cap)
        if torch.allclose(seen.detach().to(expected), expected, rtol=_tolerance(logits)):
            forward.set_transform(transform)
            with forward.untransformed():
                if _is_same(_trial(forward, logits, inputs).logits, logits):
                    return
    _refuse(forward.model, "which changes the output of its output embeddings before it is the logits")


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


def _find_shift(forward: PatchedForward, logits: Tensor, labels: Tensor, own: Tensor | None) -> None:
    if own is None:
        _refuse(forward.model, "which computes no loss")
    targets = (labels, nn.functional.pad(labels, (0, 1), value=-100)[..., 1:])
    losses = [cross_entropy(logits.detach().float(), each, class_dim=-1, **forward.loss_options()) for each in targets]
    own = own.detach().float().reshape(())
    forward.shift = min((0, 1), key=lambda shift: float((losses[shift] - own).abs()))
    if not torch.allclose(own, losses[forward.shift], rtol=_tolerance(logits)):
        _refuse(forward.model, f"whose loss is {own:.6g} where the cross-entropy is {losses[forward.shift]:.6g}")


def _tolerance(tensor: Tensor) -> float:
    return 2e-2 if tensor.dtype.itemsize < 4 else 1e-5


def _found_head(forward: PatchedForward, inputs: dict[str, Any]) -> nn.Module | None:
    """The child of the model that takes hidden states to the output embeddings row by row, if there is one."""
    model, linear, calls = forward.model, forward.decoder.linear, []
    shape = next(iter(inputs.values())).shape[:2]
    kept, seen = torch.tensor([6, 1, 3], device=linear.weight.device), []

    def some(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0].flatten(0, 1)[kept][None], *args[1:])

    with contextlib.ExitStack() as stack, torch.no_grad():

        def before(module: nn.Module, hook: Callable[..., Any]) -> None:
            stack.callback(module.register_forward_pre_hook(hook).remove)

        for child in model.children():
            if child is not getattr(model, "base_model", None) and child is not linear:
                before(child, lambda module, args: calls.append((module, args)))
        before(linear, lambda module, args: seen.append(args[0]))
        _called(model, inputs)
        head, args = calls[0] if calls else (model, ())
        if not args or not isinstance(args[0], Tensor) or args[0].dim() != 3 or args[0].shape[:2] != shape:
            return None
        # The output embeddings must see the same rows where the head is given some of them.
        before(head, some)
        try:
            _called(model, inputs)
        except ValueError:
            return None
    whole, part = (input.flatten(0, -2) for input in seen)
    tolerance = _tolerance(whole)
    fits = part.shape[0] == len(kept) and torch.allclose(part, whole[kept], rtol=tolerance, atol=tolerance)
    return head if fits else None


def _check_loss(forward: PatchedForward, inputs: dict[str, Any]) -> None:
    """The patched model's loss is its own, from its own weights."""
    with torch.no_grad():
        own = _called(forward.model, inputs)["loss"].float().reshape(())
        forward.install()
        try:
            loss = _called(forward.model, {**inputs, "skip_logits": True})["loss"].float()
        finally:
            forward.remove()
    if not torch.allclose(loss, own, rtol=_tolerance(forward.decoder.linear.weight)):
        _refuse(forward.model, f"whose loss is {own:.6g}, and {loss:.6g} when it is patched")
