"""Tiny language models of every class of transformers, built from configurations alone."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import torch

# The sizes of a tiny model, by the names that configurations give them. A name that a configuration lacks is left out.
SIZES: dict[str, Any] = {
    "vocab_size": 67,
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embedding_size", "hidden_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "num_key_value_heads", "attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "n_inner", "decoder_ffn_dim", "encoder_ffn_dim"), 48),
    **dict.fromkeys(("head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "moe_intermediate_size", "expert_ffn_hidden_size"), 16),
    **dict.fromkeys(("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk"), 2),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    "max_position_embeddings": 64,
    "n_positions": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# What else a class needs, by the type of its configuration.
FURTHER: dict[str, dict[str, Any]] = {
    "reformer": {"axial_pos_embds_dim": (16, 16), "axial_pos_shape": (4, 4), "attention_head_size": 8},
    "neomme": {"head_dim": 32},
    "falcon_h1": {"mamba_chunk_size": 16, "mamba_d_ssm": 32, "mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 8},
    "luke": {"entity_vocab_size": 5},
    "perceiver": {"num_latents": 4, "d_latents": 16, "num_self_attends_per_block": 1},
    "xmod": {"default_language": "en_XX"},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granite": {"logits_scaling": 2.0},
    **{name: {"use_cache": False} for name in ("bailing_hybrid", "jamba", "lfm3", "qwen3_5_text", "recurrent_gemma")},
}
LARGEST = 20_000_000


def mapping(name: str) -> list[str]:
    """The classes of `MODEL_FOR_<name>_MAPPING`."""
    auto = importlib.import_module("transformers.models.auto.modeling_auto")
    return sorted({*getattr(auto, f"MODEL_FOR_{name}_MAPPING_NAMES").values()})


def tiny(name: str, **options: Any) -> torch.nn.Module:
    """A model of the class with random weights, the same at each call."""
    transformers = importlib.import_module("transformers")
    model_class = getattr(transformers, name)
    config_class = model_class.config_class
    config = config_class(**_sizes(config_class(), config_class.attribute_map), **options)
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in model_class(config).parameters())
    if count > LARGEST:
        raise ValueError(f"{name} has {count} parameters with the sizes of a tiny model")
    torch.manual_seed(0)
    model = model_class(config)
    with torch.no_grad():
        for parameter in model.parameters():  # a bias that is 0 would hide that it is left out
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def _sizes(default: Any, names: dict[str, str]) -> dict[str, Any]:
    known = default.to_dict()
    sizes = {key: value for key, value in SIZES.items() if key in known or key in names}
    for key, value in vars(default).items():
        if hasattr(value, "model_type"):
            sizes[key] = type(value)(**_sizes(value, type(value).attribute_map))
    return {**sizes, **FURTHER.get(default.model_type, {})}


def without_dropout(model: torch.nn.Module) -> torch.nn.Module:
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout", "attn_dropout", "dropout_prob", "activation_dropout"):
            if isinstance(vars(module).get(name), float):
                setattr(module, name, 0.0)
    return model


def copied(model: torch.nn.Module) -> torch.nn.Module:
    return copy.deepcopy(model)


def inputs(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Two sequences of 16 tokens, of which the second is padded for models that take an attention mask."""
    ids = torch.randint(5, SIZES["vocab_size"], (2, 16), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids}
