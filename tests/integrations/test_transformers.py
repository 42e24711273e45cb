"""`patch`: the loss of language models of transformers without their logits, in what people train them with."""

from __future__ import annotations

import copy
import importlib
import pickle
import threading
import warnings
from typing import Any

import pytest
import torch
from integrations_peers import needs, ran_in_two_ranks

pytest.importorskip("transformers")

import classes
import tiny_models
import transformers

import sslkernels as sk
from sslkernels.integrations.transformers import DataCollatorForMaskedLM, patch, unpatch

transformers.logging.set_verbosity_error()

EXACT = (
    "BertForMaskedLM",
    "RobertaForMaskedLM",
    "ModernBertForMaskedLM",
    "DistilBertForMaskedLM",
    "ElectraForMaskedLM",
    "GPT2LMHeadModel",
    "LlamaForCausalLM",
    "Gemma2ForCausalLM",  # a softcap
    "CohereForCausalLM",  # a scale of the model
    "GraniteForCausalLM",  # a scale of the configuration
)
MASKED = ("BertForMaskedLM", "DistilBertForMaskedLM", "ElectraForMaskedLM", "ModernBertForMaskedLM")
FAMILIES = (*MASKED, "LlamaForCausalLM", "Gemma2ForCausalLM")


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny models on two threads wait longer for each other than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def model_and_inputs(name: str, **options: Any) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    model = tiny_models.without_dropout(tiny_models.tiny(name, **options)).train()
    inputs = tiny_models.inputs(model)
    return model, {**inputs, "labels": classes.labels_for(inputs)}


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def stepped(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), gradients(model)


def assert_same_step(actual: Any, expected: Any, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual[0], expected[0], rtol=tolerance, atol=tolerance)
    assert actual[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(actual[1][name], gradient, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("name", EXACT)
def test_a_class_is_exact(name):
    assert classes.outcome(name) == classes.Outcome("exact")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("EsmForMaskedLM", "changes the output"),  # a bias, 0 in a new model, is added to the decoder's output
        ("MobileBertForMaskedLM", "0 times"),
        ("BartForConditionalGeneration", "depends on the labels"),
        ("BertForSequenceClassification", "output embeddings are NoneType"),
    ],
)
def test_a_class_that_does_not_fit_is_refused_by_name(name, why):
    model = tiny_models.tiny(name)
    before = {key: id(value) for key, value in vars(model).items()}
    with pytest.raises(ValueError, match=f"model must be .* got {name}, .*{why}"):
        patch(model)
    assert {key: id(value) for key, value in vars(model).items()} == before


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["MASKED_LM", "CAUSAL_LM"])
def test_every_class_is_exact_or_refused(kind):
    outcomes = classes.table(kind)
    kinds = [outcome.kind for outcome in outcomes.values()]
    assert all(outcome.reason for outcome in outcomes.values() if outcome.kind == "refused")
    assert kinds.count("exact") >= {"MASKED_LM": 45, "CAUSAL_LM": 150}[kind]


def test_a_zero_bias_of_the_model_is_not_overlooked():
    model = tiny_models.tiny("EsmForMaskedLM")
    torch.nn.init.zeros_(model.lm_head.bias)
    model.lm_head.bias.requires_grad_(False)
    with pytest.raises(ValueError, match="EsmForMaskedLM"):
        patch(model)


def test_patching_leaves_the_model_and_the_random_generator_as_they_were():
    model = tiny_models.tiny("BigBirdForMaskedLM", attention_type="block_sparse").train()
    attention = [type(layer.attention.self) for layer in model.bert.encoder.layer]
    torch.manual_seed(3)
    state, training = torch.get_rng_state(), [module.training for module in model.modules()]
    patch(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == training
    # A short input turns block-sparse attention off for good.
    assert [type(layer.attention.self) for layer in model.bert.encoder.layer] == attention
    assert model.config.attention_type == "block_sparse"


def rows_of(module: torch.nn.Module) -> list[int]:
    seen: list[int] = []
    module.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[:-1].numel()))
    return seen


@pytest.mark.parametrize("compact", [True, False])
def test_the_transform_sees_the_masked_rows(compact):
    model, inputs = model_and_inputs("BertForMaskedLM")
    patch(model, compact=compact)
    seen = rows_of(model.cls.predictions.transform.dense), rows_of(model.cls.predictions.decoder)
    model(**inputs)
    rows = int((inputs["labels"] != -100).sum()) if compact else 32
    assert seen == ([rows], [rows])


def test_a_row_without_labels_and_a_batch_without_any():
    model, inputs = model_and_inputs("BertForMaskedLM")
    expected = stepped(model, {**inputs, "labels": torch.full_like(inputs["labels"], -100)})[0]
    patch(model)
    loss, grads = stepped(model, {**inputs, "labels": torch.full_like(inputs["labels"], -100)})
    assert expected.isnan()
    assert loss.isnan()
    assert "bert.embeddings.word_embeddings.weight" in grads


@pytest.mark.parametrize("name", FAMILIES)
def test_num_items_makes_accumulated_gradients_those_of_the_batch(name):
    model, _ = model_and_inputs(name)
    patch(model)
    ids = torch.randint(5, 67, (16, 12))
    labels = torch.where(torch.rand(16, 12) < 0.3, ids, -100)
    count = (labels != -100).sum()
    whole = stepped(model, {"input_ids": ids, "labels": labels, "num_items_in_batch": count})
    model.zero_grad()
    loss = torch.zeros(())
    for rows in torch.arange(16).chunk(4):
        part = model(input_ids=ids[rows], labels=labels[rows], num_items_in_batch=count).loss
        part.backward()
        loss += part.detach()
    assert_same_step((loss, gradients(model)), whole)


def test_labels_by_position_tuples_and_shifted_labels():
    model, inputs = model_and_inputs("LlamaForCausalLM")
    expected = stepped(model, inputs)
    patch(model)
    ids, labels = inputs["input_ids"], inputs["labels"]
    (loss,) = (part for part in model(ids, None, None, None, None, labels, return_dict=False) if torch.is_tensor(part))
    torch.testing.assert_close(loss, expected[0])
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    assert_same_step(stepped(model, {"input_ids": ids, "shift_labels": shifted}), expected)


def test_logits_are_what_the_caller_asks_for():
    model, inputs = model_and_inputs("BertForMaskedLM")
    patch(model)
    assert model(**inputs).logits is None
    assert model(**inputs, skip_logits=False).logits.shape == (2, 16, 67)
    model.eval()
    assert model(**inputs).logits.shape == (2, 16, 67)
    assert model(**inputs, skip_logits=True).logits is None
    assert model(input_ids=inputs["input_ids"]).loss is None


def test_a_failed_call_leaves_no_labels_behind():
    model, inputs = model_and_inputs("Gemma2ForCausalLM")
    patch(model)
    with pytest.raises(ValueError, match="target"):
        model(**{**inputs, "labels": torch.full_like(inputs["labels"], 1000)})
    config = model.config
    with pytest.raises(IndexError):
        model(**{**inputs, "input_ids": inputs["input_ids"] + 1000})
    assert model.config is config
    assert config.final_logit_softcapping is not None
    assert model(input_ids=inputs["input_ids"]).logits.shape == (2, 16, 67)


def test_the_auxiliary_loss_of_experts_is_kept():
    model, inputs = model_and_inputs("MixtralForCausalLM", output_router_logits=True)
    expected = stepped(model, inputs)
    patch(model)
    assert_same_step(stepped(model, inputs), expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_patched_and_its_own(copied):
    model, inputs = model_and_inputs("BertForMaskedLM")
    expected = stepped(model, inputs)
    patch(model)
    other = copied(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert_same_step(stepped(other, inputs), expected)
    assert other(**inputs).logits is None
    unpatch(other)
    assert other(**inputs).logits is not None
    assert model(**inputs).logits is None


@pytest.mark.parametrize("name", ["BertForMaskedLM", "LlamaForCausalLM", "GraniteForCausalLM"])
def test_output_embeddings_that_are_replaced(name):
    """Resized, which makes new ones of a model whose weights are not tied, and set."""
    model, inputs = model_and_inputs(name)
    first = patch(model).get_output_embeddings()
    model.resize_token_embeddings(80)
    inputs["labels"][0, 3] = 75
    for changed in (lambda: None, lambda: model.set_output_embeddings(torch.nn.Linear(32, 80))):
        changed()
        expected = stepped(unpatch(copy.deepcopy(model)), inputs)
        assert_same_step(stepped(model, inputs), expected)
        assert model(**inputs).logits is None
        assert model(**inputs, skip_logits=False).logits.shape == (2, 16, 80)
    assert "forward" not in vars(first)
    unpatch(model)
    assert "forward" not in vars(model.get_output_embeddings())


def test_a_model_that_torch_compiled_and_one_without_memory():
    model, inputs = model_and_inputs("BertForMaskedLM")
    expected = stepped(model, inputs)
    compiled = torch.compile(model, backend="eager")
    assert patch(compiled) is compiled
    assert_same_step(stepped(compiled, inputs), (expected[0], {f"_orig_mod.{n}": g for n, g in expected[1].items()}))
    assert unpatch(compiled)(**inputs).logits is not None
    with torch.device("meta"), pytest.raises(ValueError, match="BertForMaskedLM, whose parameters are on the meta"):
        patch(transformers.BertForMaskedLM(model.config))


@pytest.mark.parametrize("name", ["BertForMaskedLM", "LlamaForCausalLM"])
def test_labels_that_do_not_fit_are_refused_and_leave_the_model_in_order(name):
    model, inputs = model_and_inputs(name)
    expected = stepped(model, inputs)
    patch(model)
    for labels, error, why in (
        (inputs["labels"][:, :-1], ValueError, r"target must have shape .* = \(2, 16\); got \(2, 15\)"),
        (inputs["labels"].clamp(min=200), ValueError, "got 200"),
        (inputs["labels"].float(), TypeError, "target must have dtype"),
    ):
        with pytest.raises(error, match=why):
            model(**{**inputs, "labels": labels})
    with pytest.raises(IndexError):
        model(**{**inputs, "input_ids": inputs["input_ids"] + 1000})
    assert model(inputs["input_ids"]).logits.shape == (2, 16, 67)
    assert_same_step(stepped(model, {**inputs, "labels": inputs["labels"].int()}), expected)
    unpatch(model)
    assert_same_step(stepped(model, inputs), expected, tolerance=0)


@pytest.mark.parametrize("name", ["BertForMaskedLM", "Gemma2ForCausalLM"])
def test_calls_from_several_threads_wait_for_each_other(name):
    """While one thread is inside the model, another calls it without labels, and a third with other labels."""
    model, inputs = model_and_inputs(name)
    other = {**inputs, "labels": inputs["labels"].roll(1, 0)}
    calls = (inputs, {"input_ids": inputs["input_ids"]}, other)
    patch(model)
    expected = [model(**each, return_dict=False)[0] for each in calls]
    results, threads = {}, []

    def call(number: int) -> None:
        results[number] = model(**calls[number], return_dict=False)[0]

    def meanwhile(*_: Any) -> None:
        if not threads:
            threads.extend(threading.Thread(target=call, args=(number,)) for number in (1, 2))
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(0.2)  # they end now, or wait for this call

    model.base_model.register_forward_pre_hook(meanwhile)
    call(0)
    for thread in threads:
        thread.join()
    for number, result in enumerate(expected):
        assert torch.equal(results[number], result)
    assert unpatch(copy.deepcopy(model))(**inputs).logits is not None


def test_data_parallel_is_refused_where_it_makes_replicas(monkeypatch):
    model, inputs = model_and_inputs("BertForMaskedLM")
    expected = stepped(model, inputs)
    patch(model)
    assert_same_step(stepped(torch.nn.DataParallel(model).module, inputs), expected)
    # As on two GPUs: without them, parameters are not copied.
    module = importlib.import_module("torch.nn.parallel.replicate")
    monkeypatch.setattr(module, "_get_device_index", lambda device, _: device)
    monkeypatch.setattr(module, "_broadcast_coalesced_reshape", lambda tensors, *_, **__: [tensors] * 2)
    with pytest.raises(RuntimeError, match="DataParallel cannot replicate a patched model"):
        torch.nn.parallel.replicate(model, [0, 1])
    unpatch(model)
    replicas = torch.nn.parallel.replicate(model, [0, 1])
    assert [replica(**inputs).logits.shape for replica in replicas] == [(2, 16, 67)] * 2


def test_other_instances_and_generation_are_untouched():
    model, inputs = model_and_inputs("GPT2LMHeadModel")
    twin = copy.deepcopy(model)
    generated = model.generate(inputs["input_ids"][:, :4], max_new_tokens=4, do_sample=False)
    patch(model)
    assert twin(**inputs).logits is not None
    assert torch.equal(model.generate(inputs["input_ids"][:, :4], max_new_tokens=4, do_sample=False), generated)
    patch(model)  # again
    assert model(**inputs).logits is None
    unpatch(unpatch(model))
    assert "forward" not in vars(model)


@pytest.mark.parametrize("name", ["BertForMaskedLM", "LlamaForCausalLM"])
def test_gradient_checkpointing_and_autocast(name):
    model, inputs = model_and_inputs(name)
    model.gradient_checkpointing_enable()
    expected = stepped(model, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        expected_16 = stepped(model, inputs)
    patch(model)
    assert_same_step(stepped(model, inputs), expected)
    with torch.autocast("cpu", torch.bfloat16):
        actual = stepped(model, inputs)
    assert actual[0].dtype == torch.float32
    assert_same_step(actual, expected_16, tolerance=3e-2)


def test_a_model_in_bfloat16():
    model, inputs = model_and_inputs("BertForMaskedLM")
    expected = stepped(model, inputs)
    actual = stepped(patch(model.bfloat16()), inputs)
    torch.testing.assert_close(actual[0].float(), expected[0], rtol=1e-2, atol=0)


@pytest.mark.costly("compiles a model")
@pytest.mark.full_for(name="Gemma2ForCausalLM")
@pytest.mark.parametrize("name", ["BertForMaskedLM", "Gemma2ForCausalLM"])
def test_compiles_as_one_graph(name):
    model, inputs = model_and_inputs(name)
    expected = stepped(model, inputs)
    patch(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    model.zero_grad()
    loss = compiled(**inputs).loss
    loss.backward()
    assert_same_step((loss.detach(), gradients(model)), expected)
    model.zero_grad()
    assert_same_step(stepped(model, inputs), expected)  # eager again


def test_a_model_that_accelerate_wrapped_is_unwrapped_first():
    accelerate = pytest.importorskip("accelerate")
    model, inputs = model_and_inputs("BertForMaskedLM")
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    prepared = accelerator.prepare(patch(model))
    loss, _ = stepped(prepared, inputs)
    assert loss.isfinite()
    assert prepared(**inputs).logits is None
    with pytest.raises(ValueError, match="unpatch: model must be unwrapped first"):
        unpatch(model)
    assert accelerator.unwrap_model(prepared, keep_fp32_wrapper=False) is model
    assert model(**inputs).logits is None
    assert model(inputs["input_ids"]).logits is not None
    unpatch(model)
    assert "forward" not in vars(model)
    assert model(**inputs).logits is not None


class Tokens(torch.utils.data.Dataset):
    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(0)
        self.ids = torch.randint(5, 67, (16, 12), generator=draw)
        self.labels = torch.where(torch.rand(16, 12, generator=draw) < 0.3, self.ids, -100)

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.labels[index]}


def trained(model: torch.nn.Module, folder: Any, rows: int, accumulated: int) -> tuple[float, float, float]:
    """Loss, norm of the gradient, and evaluation loss of one step of Trainer."""
    ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=rows,
        per_device_eval_batch_size=16 // ranks,  # one step: Trainer averages the means of steps
        gradient_accumulation_steps=accumulated,
        max_steps=1,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    data = Tokens()
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data)
    trainer.train()
    logs = {key: value for entry in trainer.state.log_history for key, value in entry.items()}
    predictions = trainer.predict(data)
    assert predictions.predictions.shape == (16, 12, 67)
    return logs["loss"], logs["grad_norm"], float(predictions.metrics["test_loss"])


@pytest.mark.parametrize("name", ["BertForMaskedLM"])
def test_trainer_accumulates_gradients(name, tmp_path):
    """Unpatched, transformers 5 multiplies loss and gradients of this class by the number of micro-batches."""
    results = []
    for rows, accumulated in ((16, 1), (4, 4)):
        model, _ = model_and_inputs(name)
        results.append(trained(patch(model), tmp_path, rows, accumulated))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("first", ["patch", "peft"])
def test_lora_on_the_encoder(first):
    needs("peft")
    import peft

    config = peft.LoraConfig(target_modules=["query", "value"], r=4, init_lora_weights=False)
    reference, inputs = model_and_inputs("BertForMaskedLM")
    torch.manual_seed(0)
    expected = stepped(peft.get_peft_model(copy.deepcopy(reference), config), inputs)
    torch.manual_seed(0)
    if first == "patch":
        model = peft.get_peft_model(patch(reference), config)
    else:
        model = peft.get_peft_model(reference, config)
        patch(model)
    assert model(**inputs).logits is None
    assert expected[1]
    assert_same_step(stepped(model, inputs), expected)


def test_an_adapter_on_the_output_embeddings_is_refused():
    needs("peft")
    import peft

    config = peft.LoraConfig(target_modules=["lm_head"], r=4)
    model, inputs = model_and_inputs("LlamaForCausalLM")
    with pytest.raises(ValueError, match="LlamaForCausalLM"):
        patch(peft.get_peft_model(copy.deepcopy(model), config))
    later = peft.get_peft_model(patch(model), config)
    with pytest.raises(RuntimeError, match="LlamaForCausalLM must be the output"):
        later(**inputs)


def trained_over_ranks(folder: str) -> None:
    """Trainer with two ranks of 8 rows has the numbers of one process with 16."""
    model, _ = model_and_inputs("BertForMaskedLM")
    expected = torch.load(f"{folder}/expected")
    torch.testing.assert_close(trained(patch(model), folder, 8, 1), expected, rtol=1e-4, atol=1e-4)


def sharded_steps(rank: int, folder: str) -> None:
    """FSDP2 over two ranks in three layouts, and Trainer, against one process."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    data = Tokens()
    count = (data.labels != -100).sum()
    reference, _ = model_and_inputs("BertForMaskedLM")
    expected = stepped(
        patch(reference), {"input_ids": data.ids, "labels": data.labels, "num_items_in_batch": count / 2}
    )
    mine = {"input_ids": data.ids[rank::2], "labels": data.labels[rank::2], "num_items_in_batch": count / 2}
    for layout in ("root", "layers", "tied group"):
        model, _ = model_and_inputs("BertForMaskedLM")
        patch(model)
        if layout != "root":
            for layer in model.bert.encoder.layer:
                fully_shard(layer, mesh=mesh)
        if layout == "tied group":
            fully_shard([model.bert.embeddings.word_embeddings, model.cls.predictions], mesh=mesh)
        fully_shard(model, mesh=mesh)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="FSDP2-wrapped module .* returned a view")
            loss = model(**mine).loss
        loss.backward()
        grads = {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.grad is not None}
        total = loss.detach().clone()
        torch.distributed.all_reduce(total)
        # Gradients are averaged over the ranks: each counted half of the items.
        assert_same_step((total / 2, grads), (expected[0] / 2, {n: g / 2 for n, g in expected[1].items()}))
        with torch.no_grad():
            assert model.eval()(input_ids=mine["input_ids"]).logits.shape == (8, 12, 67)
        with pytest.raises(ValueError, match="sharded already"):
            patch(model)
    trained_over_ranks(folder)


@pytest.mark.full
@pytest.mark.costly("two ranks import transformers")
def test_trainer_and_fsdp_over_ranks(tmp_path):
    model, _ = model_and_inputs("BertForMaskedLM")
    torch.save(trained(patch(model), tmp_path, 16, 1), tmp_path / "expected")
    ran_in_two_ranks(sharded_steps, str(tmp_path))


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "un", "##break", "##able", "glass", "of", "water", "the", "##s"]


def tokenizer(**options: Any) -> Any:
    return transformers.BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)}, **options)


def test_the_collator_masks_what_mask_tokens_masks():
    tokens = tokenizer()
    encoded = [tokens(text) for text in ("unbreakable glass", "the glass of waters of the water")]
    collate = DataCollatorForMaskedLM(tokens, probability=0.5, seed=3, pad_to_multiple_of=8)
    batch, again = collate(encoded), DataCollatorForMaskedLM(tokens, probability=0.5, seed=3)(encoded)
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape == (2, 16)
    assert batch["input_ids"].dtype == torch.int64
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(each["input_ids"]) for each in encoded], batch_first=True)
    expected = sk.mask_tokens(
        torch.nn.functional.pad(ids, (0, 16 - ids.shape[1])),
        mask_id=4,
        vocab_size=len(WORDS),
        probability=0.5,
        special_ids=(0, 1, 2, 3, 4),
        generator=torch.Generator().manual_seed(3),
    )
    assert torch.equal(batch["labels"], expected.labels)
    assert torch.equal(batch["input_ids"], expected.input_ids)
    assert (batch["labels"] != -100).any()
    assert not torch.equal(collate(encoded)["labels"], batch["labels"])
    assert again["labels"].shape[1] < 16
    assert "labels" not in encoded[0]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("feature", ["word_ids", "offset_mapping"])
def test_the_collator_masks_whole_words(side, feature):
    tokens = tokenizer(padding_side=side)
    examples = []
    for text in ("unbreakable glass of water", "the glass", "waters of the unbreakable waters"):
        encoded = tokens(text, return_offsets_mapping=feature == "offset_mapping")
        words = encoded.word_ids()
        examples.append({**encoded, "word_ids": words} if feature == "word_ids" else dict(encoded))
    collate = DataCollatorForMaskedLM(tokens, probability=0.5, whole_words=True, min_per_row=1, seed=0)
    for _ in range(10):
        batch = collate(examples)
        assert set(batch) >= {"input_ids", "labels", "attention_mask"}
        assert "word_ids" not in batch
        chosen = (batch["labels"] != -100) & batch["attention_mask"].bool()
        assert (chosen == (batch["labels"] != -100)).all()
        assert chosen.any(1).all()
        row = chosen[0][batch["attention_mask"][0].bool()].tolist()
        assert len({*row[1:4]}) == 1, "un ##break ##able"
    assert not batch["labels"].eq(2).any()


def test_the_collator_says_what_is_missing():
    with pytest.raises(ValueError, match="DataCollatorForMaskedLM: tokenizer must have a mask token"):
        DataCollatorForMaskedLM(object())
    with pytest.raises(ValueError, match="probability"):
        DataCollatorForMaskedLM(tokenizer(), probability=2.0)
    with pytest.raises(ValueError, match="have word_ids or offset_mapping"):
        DataCollatorForMaskedLM(tokenizer(), whole_words=True)([{"input_ids": [2, 8, 3]}])
