"""Small random models of thirty public families: their real classes, two or three layers, the tiny tokenizer."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer

from tests.models.tiny_models import TEXTS
from trainer.config import TinyConfig
from trainer.models.backbone.causal_lm import build_tiny

WINDOW = 16
SHAPE: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 512, "vocab_size": 320, "initializer_range": 0.2, "tie_word_embeddings": False,
}  # fmt: skip
OLD: dict[str, Any] = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512}
LATENT: dict[str, Any] = {
    "num_key_value_heads": 4, "kv_lora_rank": 64, "q_lora_rank": 64, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
    "first_k_dense_replace": 1, "n_routed_experts": 4, "moe_intermediate_size": 64, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
}  # fmt: skip
LONGROPE: dict[str, Any] = {
    "sliding_window": None, "original_max_position_embeddings": 64,
    "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8,
        "original_max_position_embeddings": 64,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """A family as the table of docs/backbones.md has it: where its rows end, and what is refused, by a part of the message."""

    kind: str
    changes: dict[str, Any] = field(default_factory=dict)
    refused: str | None = None  # at load time
    nf4: str | None = None  # refused with nf4
    positions: int | None = None
    places: int | None = None
    experts: bool = False


FUSED, CONV1D = "are in no linear layer", "store their weights transposed .Conv1D.: transformer.h.attn.c_attn"
MOE: dict[str, Any] = {"nf4": FUSED, "experts": True}
FAMILIES: dict[str, Family] = {
    "Llama 2, 3": Family("llama"),
    "Llama, dynamic NTK": Family("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}, "max_position_embeddings": 64}, positions=64),
    "Mistral": Family("mistral", {"sliding_window": WINDOW}),
    "Mixtral": Family("mixtral", {"sliding_window": WINDOW, "num_local_experts": 4}, **MOE),
    "Gemma": Family("gemma", {"head_dim": 16}),
    "Gemma 2": Family("gemma2", {"head_dim": 16, "sliding_window": WINDOW, "query_pre_attn_scalar": 16}),
    "Gemma 3": Family("gemma3_text", {"head_dim": 16, "sliding_window": WINDOW, "query_pre_attn_scalar": 16, "num_hidden_layers": 6}),
    "Qwen 2, 2.5": Family("qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
    "Qwen 3": Family("qwen3", {"head_dim": 16}),
    "Qwen 2 MoE": Family("qwen2_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64}, **MOE),
    "Qwen 3 MoE": Family("qwen3_moe", {"head_dim": 16, "num_experts": 4, "moe_intermediate_size": 64, "num_experts_per_tok": 2}, **MOE),
    "Phi 1, 2": Family("phi"),
    "Phi 3, 4": Family("phi3", {"sliding_window": WINDOW}),
    "Phi 3, 128k (LongRoPE)": Family("phi3", LONGROPE, positions=64),
    "Phi 3.5 MoE": Family("phimoe", {"num_local_experts": 4}, **MOE),
    "OPT": Family("opt", {"ffn_dim": 128, "word_embed_proj_dim": 64}),
    "GPT-2": Family("gpt2", OLD, nf4=CONV1D),
    "GPT-Neo": Family("gpt_neo", {"num_layers": 2, "num_heads": 4, "window_size": WINDOW, "attention_types": [[["global", "local"], 1]]}, places=WINDOW),
    "GPT-NeoX, Pythia": Family("gpt_neox"),
    "GPT-J": Family("gptj", {**OLD, "rotary_dim": 8}),
    "Falcon": Family("falcon", {"new_decoder_architecture": False, "multi_query": True, "alibi": False}, nf4=FUSED),
    "Falcon with ALiBi": Family("falcon", {"new_decoder_architecture": False, "alibi": True}, refused="type 'falcon' are not supported"),
    "BLOOM": Family("bloom", {"n_layer": 2, "n_head": 4}, refused="type 'bloom' are not supported"),
    "MPT": Family("mpt", {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 512}, refused="type 'mpt' are not supported"),
    "OLMo": Family("olmo"),
    "OLMo 2": Family("olmo2"),
    "OLMoE": Family("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}, **MOE),
    "Granite": Family("granite", {"logits_scaling": 2.0, "attention_multiplier": 0.3, "residual_multiplier": 0.5, "embedding_multiplier": 3.0}),
    "Granite MoE": Family("granitemoe", {"num_local_experts": 4, "num_experts_per_tok": 2}, **MOE),
    "DeepSeek V2": Family("deepseek_v2", LATENT, **MOE),
    "DeepSeek V3, R1": Family("deepseek_v3", LATENT, **MOE),
    "gpt-oss": Family("gpt_oss", {"head_dim": 16, "sliding_window": WINDOW, "num_local_experts": 4, "intermediate_size": 64}, **MOE),
    "GLM 4": Family("glm4", {"head_dim": 16}),
    "StableLM": Family("stablelm"),
    "StarCoder 2": Family("starcoder2", {"sliding_window": WINDOW}),
    "Command R": Family("cohere"),
    "SmolLM 3": Family("smollm3"),
    "Llama 4": Family("llama4_text", {"head_dim": 16, "attention_chunk_size": 32, "num_local_experts": 2, "intermediate_size_mlp": 128}, refused="chunked_attention cannot see answers as a tree"),
    "Mamba": Family("mamba", {"state_size": 8}, refused="cannot see answers as a tree"),
    "LFM 2": Family("lfm2", {"layer_types": ["conv", "full_attention"]}, refused="conv cannot see answers as a tree"),
}  # fmt: skip


def save_public(family: Family, folder: Path) -> Path:
    """A random model of the family, whose biases and norms differ from 0 and 1."""
    build_tiny(TinyConfig(vocab_size=320), TEXTS, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    config = CONFIG_MAPPING[family.kind](**{**SHAPE, **ids, **family.changes})
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.2)
    model.save_pretrained(folder)
    return folder
