"""Tiny models with random weights of every causal architecture of transformers that a few config values can make small."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

#: Names of sizes in configs, and their values here. A config gets the sizes that it has.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "embed_dim", "emb_dim", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("lru_width", "rnn_hidden_size", "moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    "expert_ffn_hidden_size": 32,
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "ffn_hidden_size", "n_inner"), 64
    ),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "linear_num_key_heads", "index_n_heads", "expansion_ratio"), 2),
    **dict.fromkeys(("head_dim", "global_head_dim", "v_head_dim", "qk_rope_head_dim", "qk_nope_head_dim"), 8),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "linear_key_head_dim", "linear_value_head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("state_size", "mamba_d_state", "mamba_n_heads", "mamba_d_head", "index_head_dim"), 8),
    "hidden_size_per_layer_input": 8,
    "qk_head_dim": 16,
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 128),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "num_shared_experts", "n_shared_experts"), 1),
    "mamba_n_groups": 1,
    **dict.fromkeys(("sliding_window", "attention_window_size"), 16),
    **dict.fromkeys(("time_step_rank", "conv_kernel"), 4),
    "index_topk": 64,
    "bottleneck_size": 16,
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "num_kv_shared_layers"), 0),
}
_LATENT = {"num_key_value_heads": 4, "head_dim": 8}
_LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
#: Further values for configs in which SIZES would be contradictory.
OWN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "minicpm3", "youtu"), _LATENT),
    **dict.fromkeys(("glm4_moe_lite", "glm_moe_dsa", "longcat_flash", "sarvam_mla"), _LATENT),
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 16},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 16},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_chunk_size": 16},
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"), _LINEAR),
    "bamba": {"attn_layer_indices": [1], "mamba_chunk_size": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "mamba_chunk_size": 16},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "zamba2": {"layer_types": ["mamba", "hybrid"], "num_mem_blocks": 1},
}


def names() -> list[str]:
    """The model types for which transformers has a causal language model.

    ProphetNet is left out: its logits depend, by 1e-4, on the number of following tokens, so padding changes them.
    """
    return sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - {"prophetnet"})


def tiny(model_type: str, vocab: int, **changed: Any) -> Any:
    """A model of two layers and at most 8 million parameters, in evaluation mode.

    Raises:
        ValueError: the sizes do not make the model that small.
    """
    config_class: Any = CONFIG_MAPPING[model_type]
    known = {field.name for field in dataclasses.fields(config_class)} | set(config_class.attribute_map)
    sizes = {**SIZES, **OWN.get(model_type, {}), "vocab_size": vocab, "vocab_size_per_layer_input": vocab}
    config = config_class(**{name: value for name, value in sizes.items() if name in known}, **changed)
    with torch.device("meta"):
        size = sum(value.numel() for value in AutoModelForCausalLM.from_config(config).parameters())
    if size > 8e6:
        raise ValueError(f"{model_type}: {size:,} parameters")
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()
