"""Tiny random configurations of every causal language model that transformers ships, or the reason why there is none.

Weights are wide enough that attention matters: a layer that sees too much or too little changes the logits by whole
nats. Windows are of 24 tokens, chunks of 32 and sparse indexes of 16, so that short prompts reach beyond them.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from jobs.families.composites import COMPOSITES, names_in, parts_of, tiny_tower

VOCAB_SIZE = 261  # a byte's worth, and a few special ones
CONTEXT = 512
WINDOW = 24
CHUNK = 32
SLIDING_FULL = ["sliding_attention", "full_attention"]
LINEAR_FULL = ["linear_attention", "full_attention"]
DENSE_SPARSE = ["dense", "sparse"]

# Settings that a configuration class takes where it has a field of the name.
_SHARED: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.12,
    "init_std": 0.12,
    "tie_word_embeddings": False,  # the head is scaled, the embedding is not
    # windows, chunks and sparse indexes
    "sliding_window": WINDOW,
    "use_sliding_window": True,
    "max_window_layers": 1,
    "attention_chunk_size": CHUNK,
    "index_topk": 16,
    "index_head_dim": 16,
    "index_n_heads": 8,
    # experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "n_group": 1,
    "topk_group": 1,
    # latent attention
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    # recurrent state
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_chunk_size": 16,
    "state_size": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_heads": 4,
    "linear_head_dim": 16,
    # encoders that can be decoders
    "is_decoder": True,
    "type_vocab_size": 1,
}


@dataclass(frozen=True, slots=True)
class Family:
    """A model type of transformers and a tiny configuration of it.

    Args:
        settings: beside the shared ones; they win.
        parts: settings of configurations inside this one, by field. A part that has a family of its own starts from
            that family's settings.
        why_not: the reason why no tiny causal model can be made; None where one can.
        architecture: the class that wrote its checkpoints, where it is not the one that AutoModelForCausalLM picks.
        is_composite: whether its parts are made from what its class says; see `composites`.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    parts: Mapping[str, Mapping[str, Any] | str] = field(default_factory=dict)
    why_not: str | None = None
    architecture: str | None = None
    is_composite: bool = False


def _decoder(**settings: Any) -> Family:
    """The decoder of an encoder-decoder."""
    sizes = {
        "d_model": 64,
        "decoder_layers": 2,
        "decoder_attention_heads": 4,
        "decoder_ffn_dim": 96,
        "encoder_layers": 2,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 96,
        "forced_eos_token_id": None,
        "num_hidden_layers": 2,
    }
    return Family({**sizes, **settings})


def _impossible(reason: str) -> Family:
    return Family(why_not=reason)


_BERT = Family()
_QWEN_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "depth": 1,
    "num_heads": 2,
    "patch_size": 14,
    "out_hidden_size": 64,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [],
}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}

_TEXT = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.12,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 0,
}

FAMILIES: dict[str, Family] = {
    # one kind of attention in every layer
    "apertus": Family(),
    "arcee": Family(),
    "biogpt": Family(),
    "bitnet": Family(),
    "bloom": Family({"n_layer": 2, "n_head": 4}),
    "codegen": Family({"rotary_dim": 8}),
    "cohere": Family({"logit_scale": 1.0}),
    "cpmant": Family(
        {"dim_head": 16, "dim_ff": 96, "position_bias_num_buckets": 32, "prompt_length": 4, "init_std": 0.12}
    ),
    "ctrl": Family({"dff": 96}),
    "diffllama": Family(),
    "ernie4_5": Family(),
    "falcon": Family(),
    "falcon-alibi": Family({"alibi": True}),
    "falcon-new": Family({"new_decoder_architecture": True, "num_kv_heads": 2}),
    "gemma": Family(),
    "glm": Family(),
    "glm4": Family(),
    "gpt-sw3": Family(),
    "gpt2": Family(),
    "gpt_bigcode": Family(),
    "gpt_neox": Family(),
    "gpt_neox_japanese": Family(),
    "gptj": Family({"rotary_dim": 8}),
    "granite": Family(),
    "helium": Family(),
    "hrm_text": Family(),
    "hunyuan_v1_dense": Family(),
    "hyperclovax": Family(),
    "internlm3": Family(),
    "iquestcoder": Family(),
    "jais2": Family(),
    "llama": Family(),
    "minicpm3": Family({"num_key_value_heads": 4}),
    "mpt": Family({"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": CONTEXT}),
    "nanochat": Family(),
    "nemotron": Family(),
    "olmo": Family(),
    "olmo2": Family(),
    "openai-gpt": Family(),
    "opt": Family({"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "persimmon": Family(),
    "phi": Family(),
    "phi3": Family({"sliding_window": None}),
    "phi3-longrope": Family(
        {
            "sliding_window": None,
            "original_max_position_embeddings": 64,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0] * 8,
                "long_factor": [1.0 + at for at in range(8)],
            },
        }
    ),
    "phi4_multimodal": Family(
        {"original_max_position_embeddings": CONTEXT},
        {
            "vision_config": {**_VISION, "crop_size": 28, "feature_layer": -1},
            "audio_config": {
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_blocks": 1,
                "num_attention_heads": 2,
                "ext_pw_out_channel": 32,
                "depthwise_separable_out_channel": 32,
                "nemo_conv_channels": 32,
                "input_size": 16,
            },
        },
    ),
    "qwen2": Family(),
    "qwen3": Family(),
    "seed_oss": Family(),
    "stablelm": Family(),
    "starcoder2": Family(),
    "xglm": Family({"num_layers": 2, "d_model": 64, "attention_heads": 4, "ffn_dim": 96}),
    "youtu": Family({"num_key_value_heads": 4}),
    # windows and chunks
    "cohere2": Family({"logit_scale": 1.0, "layer_types": SLIDING_FULL}),
    "cohere_compass_text": Family(
        {
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]},
                "full_attention": None,
            },
            "layer_types": SLIDING_FULL,
        }
    ),
    "cwm": Family({"bos_token_id": 1, "layer_types": SLIDING_FULL}),
    "doge": Family(),
    "doge-keep": Family({"keep_window_size": 16}),
    "exaone4": Family({"layer_types": SLIDING_FULL}),
    "gemma2": Family({"layer_types": SLIDING_FULL, "query_pre_attn_scalar": 16}),
    "gemma3_text": Family({"layer_types": SLIDING_FULL, "query_pre_attn_scalar": 16}),
    "gemma3n_text": Family(
        {
            "num_hidden_layers": 4,
            "layer_types": SLIDING_FULL * 2,
            "num_kv_shared_layers": 2,
            "vocab_size_per_layer_input": 261,
            "hidden_size_per_layer_input": 16,
            "altup_num_inputs": 2,
            "laurel_rank": 8,
            "activation_sparsity_pattern": [0.0] * 4,
        }
    ),
    "gemma4_text": Family(
        {
            "num_hidden_layers": 4,
            "layer_types": SLIDING_FULL * 2,
            "num_kv_shared_layers": 2,
            "vocab_size_per_layer_input": 261,
            "hidden_size_per_layer_input": 16,
            "global_head_dim": 32,
        }
    ),
    "gemma4_unified_text": Family({"layer_types": SLIDING_FULL, "global_head_dim": 32}),
    "gpt_neo": Family(
        {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": WINDOW}
    ),
    "granite_swa": Family({"layer_types": SLIDING_FULL}),
    "ministral": Family({"layer_types": SLIDING_FULL}),
    "ministral3": Family(),
    "mistral": Family(),
    "modernbert-decoder": Family({"bos_token_id": 1, "layer_types": SLIDING_FULL, "local_attention": 2 * WINDOW}),
    "olmo3": Family({"layer_types": SLIDING_FULL}),
    "phi3-window": Family(),
    "smollm3": Family({"no_rope_layers": [1, 0], "layer_types": SLIDING_FULL}),
    "vaultgemma": Family({"layer_types": SLIDING_FULL, "query_pre_attn_scalar": 16}),
    # mixtures of experts
    "afmoe": Family({"layer_types": SLIDING_FULL}),
    "aria_text": Family(),
    "axk1": Family({"num_key_value_heads": 4, "mlp_layer_types": DENSE_SPARSE}),
    "beam": Family({"layer_types": SLIDING_FULL, "mlp_layer_types": DENSE_SPARSE}),
    "cohere2_moe": Family({"logit_scale": 1.0, "layer_types": SLIDING_FULL, "mlp_layer_types": DENSE_SPARSE}),
    "dbrx": Family(
        {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": CONTEXT},
        {
            "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
            "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
        },
    ),
    "deepseek_v2": Family({"n_group": None, "topk_group": None}),
    "deepseek_v3": Family({"num_key_value_heads": 4}),
    "dots1": Family({"layer_types": SLIDING_FULL}),
    "ernie4_5_moe": Family(),
    "exaone_moe": Family({"layer_types": SLIDING_FULL, "mlp_layer_types": DENSE_SPARSE}),
    "flex_olmo": Family(),
    "flint": Family({"layer_types": SLIDING_FULL, "mlp_only_layers": [0]}),
    "glm4_moe": Family(),
    "glm4_moe_lite": Family({"num_key_value_heads": 4, "mlp_layer_types": DENSE_SPARSE}),
    "gpt_oss": Family({"layer_types": SLIDING_FULL}),
    "granitemoe": Family(),
    "granitemoe_swa": Family({"layer_types": SLIDING_FULL}),
    "granitemoeshared": Family(),
    "hunyuan_v1_moe": Family(),
    "hy_v3": Family({"mlp_layer_types": DENSE_SPARSE}),
    "jetmoe": Family({"kv_channels": 16}),
    "kolibri1": Family({"layer_types": SLIDING_FULL}),
    "laguna": Family({"layer_types": SLIDING_FULL}),
    "llama4_text": Family(
        {
            "layer_types": ["chunked_attention", "full_attention"],
            "no_rope_layers": [1, 0],
            "moe_layers": [1],
            "intermediate_size_mlp": 96,
            "floor_scale": 16,
            "intermediate_size": 32,
        }
    ),
    "longcat_flash": Family(
        {"num_layers": 2, "ffn_hidden_size": 96, "expert_ffn_hidden_size": 32, "zero_expert_num": 2, "head_dim": 8}
    ),
    "mellum": Family({"layer_types": SLIDING_FULL}),
    "mimo_v2_flash": Family({"layer_types": SLIDING_FULL, "mlp_layer_types": DENSE_SPARSE}),
    "minimax_m2": Family(),
    "mixtral": Family({"sliding_window": None}),
    "mixtral-window": Family(),
    "olmoe": Family(),
    "phimoe": Family(),
    "qwen2_moe": Family(),
    "qwen3_moe": Family(),
    "solar_open": Family(),
    # recurrent state
    "bailing_hybrid": Family({"layer_types": LINEAR_FULL, "mlp_layer_types": DENSE_SPARSE}),
    "bamba": Family({"attn_layer_indices": [1]}),
    "falcon_h1": Family({"mamba_d_ssm": 128}),
    "falcon_mamba": Family(),
    "granitemoehybrid": Family({"layer_types": LINEAR_FULL}),
    "inkling2_text": Family({"layer_types": ["hybrid_sliding", "hybrid"]}),
    "inkling_text": Family({"layer_types": ["hybrid_sliding", "hybrid"]}),
    "jamba": Family({"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False}),
    "kimi_linear": Family(
        {"layer_types": LINEAR_FULL, "mlp_layer_types": DENSE_SPARSE, "linear_num_heads": 4, "linear_head_dim": 16}
    ),
    "lfm2": Family({"layer_types": ["conv", "full_attention"]}),
    "lfm2_moe": Family({"layer_types": ["conv", "full_attention"]}),
    "lfm3": Family({"num_hidden_layers": 3, "layer_types": ["conv", "sliding_attention", "full_attention"]}),
    "mamba": Family(),
    "mamba2": Family({"num_heads": 8, "head_dim": 16, "n_groups": 2, "chunk_size": 16}),
    "minimax": Family({"layer_types": LINEAR_FULL, "block_size": 16, "sliding_window": None}),
    "minimax-window": Family({"layer_types": LINEAR_FULL, "block_size": 16}),
    "nemotron_h": Family(
        {
            "layers_block_type": ["linear_attention", "full_attention", "moe", "mlp"],
            "num_hidden_layers": 4,
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "n_groups": 2,
            "ssm_state_size": 8,
            "chunk_size": 16,
            "moe_shared_expert_intermediate_size": 32,
            "use_mamba_kernels": False,
        }
    ),
    "olmo_hybrid": Family({"layer_types": LINEAR_FULL}),
    "qwen3_5_moe_text": Family({"layer_types": LINEAR_FULL}),
    "qwen3_5_text": Family({"layer_types": LINEAR_FULL}),
    "qwen3_next": Family({"layer_types": LINEAR_FULL}),
    "recurrent_gemma": Family(
        {"block_types": ["recurrent", "attention"], "lru_width": 64, "attention_window_size": WINDOW}
    ),
    "rwkv": Family({"context_length": CONTEXT, "attention_hidden_size": 64}),
    "xlstm": Family({"num_heads": 4, "chunk_size": 16, "qk_dim_factor": 1.0}),
    "zamba": Family(
        {
            "num_hidden_layers": 3,
            "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
            "use_mamba_kernels": False,
            "attention_head_dim": 32,
            "mamba_d_state": 8,
        }
    ),
    "zamba2": Family(
        {
            "num_hidden_layers": 3,
            "layers_block_type": ["linear_attention", "linear_attention", "hybrid"],
            "use_mamba_kernels": False,
            "adapter_rank": 8,
            "chunk_size": 16,
            "n_mamba_heads": 8,
            "mamba_d_state": 8,
        }
    ),
    "zaya": Family({"num_experts_per_tok": 1, "layer_types": ["hybrid_sliding", "hybrid"], "router_hidden_size": 16}),
    # sparse indexes
    "axk2": Family({"num_key_value_heads": 4, "mlp_layer_types": DENSE_SPARSE, "gated_norm_rank": 8}),
    "deepseek_v32": Family({"num_key_value_heads": 4, "mlp_layer_types": DENSE_SPARSE}),
    "deepseek_v4": Family({"num_key_value_heads": 1, "o_groups": 2, "o_lora_rank": 16, "layer_types": None}),
    "dots3_note_text": Family({"num_key_value_heads": 4, "mlp_layer_types": DENSE_SPARSE}),
    "glm_moe_dsa": Family({"num_key_value_heads": 4, "mlp_layer_types": DENSE_SPARSE}),
    "hy_v4": Family({"num_key_value_heads": 4, "mlp_layer_types": DENSE_SPARSE, "hc_mult": 2}),
    "minimax_m3_vl_text": Family(
        {
            "index_n_heads": 2,
            "layer_types": ["minimax_m3_sparse", "full_attention"],
            "index_block_size": 8,
            "index_topk_blocks": 2,
            "dense_intermediate_size": 96,
            "rotary_dim": 8,
            "mlp_layer_types": DENSE_SPARSE,
        }
    ),
    "qwen4_exp_text": Family(
        {
            "layer_types": ["linear_attention", "indexed_attention"],
            "hc_count": 2,
            "hc_lowrank": 8,
            "ngram_vocab_size_base": 100,
            "indexer_n_heads": 8,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 16,
            "indexer_budget": 16,
            "indexer_compress_ratio": 2,
        }
    ),
    # decoders of another make
    "bert": _BERT,
    "bert-generation": _BERT,
    "big_bird": Family({"attention_type": "original_full"}),
    "camembert": _BERT,
    "data2vec-text": _BERT,
    "electra": Family({"embedding_size": 64}),
    "ernie": _BERT,
    "megatron-bert": _BERT,
    "rembert": Family({"input_embedding_size": 32, "output_embedding_size": 32}),
    "roberta": _BERT,
    "roberta-prelayernorm": _BERT,
    "roc_bert": Family(
        {
            "pronunciation_embed_dim": 16,
            "pronunciation_vocab_size": 261,
            "shape_embed_dim": 16,
            "shape_vocab_size": 261,
        }
    ),
    "roformer": Family({"embedding_size": 64}),
    "xlm-roberta": _BERT,
    "xlm-roberta-xl": _BERT,
    "xmod": Family({"default_language": "en_XX"}),
    "bart": _decoder(),
    "bigbird_pegasus": _decoder(),
    "blenderbot": _decoder(),
    "blenderbot-small": _decoder(),
    "marian": _decoder(decoder_start_token_id=0),
    "mbart": _decoder(),
    "mvp": _decoder(),
    "pegasus": _decoder(),
    "plbart": _decoder(),
    "prophetnet": Family(
        {
            "num_encoder_layers": 2,
            "num_encoder_attention_heads": 4,
            "encoder_ffn_dim": 96,
            "num_decoder_layers": 2,
            "num_decoder_attention_heads": 4,
            "decoder_ffn_dim": 96,
            "add_cross_attention": False,
        }
    ),
    "trocr": _decoder(),
    "whisper": _decoder(
        begin_suppress_tokens=None, max_target_positions=CONTEXT, max_source_positions=64, num_mel_bins=16
    ),
    "reformer": Family(
        {
            "attn_layers": ["local", "local"],
            "axial_pos_embds": False,
            "feed_forward_size": 96,
            "attention_head_size": 16,
            "local_attn_chunk_length": 32,
        }
    ),
    "xlm": Family({"emb_dim": 64, "n_heads": 4, "n_layers": 2, "causal": True}),
    "xlnet": Family({"d_model": 64, "n_layer": 2, "n_head": 4, "d_inner": 96, "attn_type": "uni"}),
    # checkpoints whose text part is a causal language model
    "emu3": Family(
        {"vocabulary_map": {"<image>": 260}},
        parts={
            "text_config": _TEXT,
            "vq_config": {
                "base_channels": 32,
                "channel_multiplier": [1],
                "codebook_size": 8,
                "hidden_size": 32,
                "num_attention_heads": 1,
                "num_res_blocks": 1,
                "attn_resolutions": [],
            },
        },
        architecture="Emu3ForConditionalGeneration",
    ),
    "fuyu": Family(parts={"text_config": "persimmon"}),
    "gemma3": Family(parts={"text_config": "gemma3_text", "vision_config": _VISION}),
    "gemma3n": _impossible("its vision tower needs the packages timm and pillow; the text part is gemma3n_text"),
    "gemma4": Family(parts={"text_config": "gemma4_text", "vision_config": _VISION}),
    "gemma4_unified": Family(parts={"text_config": "gemma4_unified_text", "vision_config": _VISION}),
    "git": Family(parts={"vision_config": _VISION}),
    "got_ocr2": Family(
        parts={
            "text_config": "qwen2",
            "vision_config": {**_VISION, "output_channels": 16, "mlp_dim": 32, "global_attn_indexes": [0]},
        }
    ),
    "llama4": Family(
        parts={
            "text_config": "llama4_text",
            "vision_config": {
                **_VISION,
                "vision_output_dim": 32,
                "projector_input_dim": 32,
                "projector_output_dim": 32,
                "intermediate_size": 128,
            },
        },
        architecture="Llama4ForConditionalGeneration",
    ),
    "mistral3": Family(
        parts={"text_config": "ministral3", "vision_config": {**_VISION, "model_type": "pixtral"}},
        architecture="Mistral3ForConditionalGeneration",
    ),
    "mllama": Family(
        parts={
            "text_config": {**_TEXT, "cross_attention_layers": [1], "num_hidden_layers": 3},
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 1,
                "num_global_layers": 1,
                "attention_heads": 2,
                "image_size": 28,
                "patch_size": 14,
                "vision_output_dim": 64,
                "intermediate_layers_indices": [0],
            },
        },
        architecture="MllamaForConditionalGeneration",
    ),
    "qwen3_5": Family(
        parts={
            "text_config": "qwen3_5_text",
            "vision_config": _QWEN_VISION,
        },
        architecture="Qwen3_5ForConditionalGeneration",
    ),
    "qwen3_5_moe": Family(
        parts={
            "text_config": "qwen3_5_moe_text",
            "vision_config": _QWEN_VISION,
        },
        architecture="Qwen3_5MoeForConditionalGeneration",
    ),
    "qwen4_exp": Family(
        parts={
            "text_config": "qwen4_exp_text",
            "vision_config": _QWEN_VISION,
        },
        architecture="Qwen4ExpForConditionalGeneration",
    ),
    "dots3_note": _impossible("its vision part wants its full size; the text part is dots3_note_text"),
    "moss_transcribe_diarize": Family(
        parts={
            "text_config": "qwen3",
            "audio_config": {
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_mel_bins": 16,
                "max_source_positions": 32,
            },
        }
    ),
    # none
    "blt": _impossible("the model makes patches of bytes with a second model: a token's logits need the whole text"),
    "gemma4_assistant": _impossible("drafts for another model and needs that model's hidden states"),
    "gemma4_unified_assistant": _impossible("drafts for another model and needs that model's hidden states"),
    "moshi": _impossible("decodes audio codes beside text"),
    "musicgen": _impossible("decodes audio codes, not text"),
    "musicgen_melody": _impossible("decodes audio codes, not text"),
}


FAMILIES |= {
    name: _impossible(made) if isinstance(made, str) else Family(made.get("", {}), made, is_composite=True)
    for name, made in COMPOSITES.items()
}


def _model_type(name: str) -> str:
    """Of a family or of a variant of it, as in phi3-longrope."""
    while name not in CONFIG_MAPPING:
        name = name.rpartition("-")[0]
        if not name:
            raise KeyError(name)
    return name


def is_installed(name: str) -> bool:
    """Whether the installed transformers ships this family."""
    try:
        _model_type(name)
    except KeyError:
        return False
    return True


def _settings(name: str) -> dict[str, Any]:
    family, model_type = FAMILIES[name], _model_type(name)
    settings = _shared_settings(CONFIG_MAPPING[model_type])
    if family.is_composite:
        return {**settings, **_composite_parts(model_type, family.parts), **family.settings}
    for part, contents in family.parts.items():
        if isinstance(contents, str):
            settings[part] = {"model_type": _model_type(contents), **_settings(contents)}
        else:
            settings[part] = dict(contents)
    return settings | dict(family.settings)


def _shared_settings(config_class: Any) -> dict[str, Any]:
    known = names_in(config_class)
    settings = {key: value for key, value in _SHARED.items() if key in known}
    return settings | {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}


def _composite_parts(model_type: str, more: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Settings of every part of a composite configuration: of the text's own family, and of small towers."""
    made: dict[str, dict[str, Any]] = {}
    for part, config in parts_of(model_type).items():
        own_type = config.model_type
        settings = _text_settings(type(config)) if "text" in part else tiny_tower(type(config))
        made[part] = {"model_type": own_type, **settings, **more.get(part, {})}
    return made


def _text_settings(config_class: Any) -> dict[str, Any]:
    own_type = config_class.model_type
    for name in (own_type, f"{own_type}_text"):
        if name in FAMILIES and FAMILIES[name].why_not is None and name in CONFIG_MAPPING:
            return _settings(name)
    return _shared_settings(config_class)


def make_config(name: str) -> PreTrainedConfig:
    """The tiny configuration of a family."""
    # a copy: classes write what they derive into the mappings that they are given, which families share
    return CONFIG_MAPPING[_model_type(name)](**copy.deepcopy(_settings(name)))


def model_class(name: str) -> Any:
    """The class of transformers that reads and writes the family's checkpoints."""
    family = FAMILIES[name]
    if family.is_composite:
        return AutoModelForImageTextToText
    architecture = family.architecture
    return AutoModelForCausalLM if architecture is None else getattr(transformers, architecture)


@torch.no_grad()  # not in inference mode: longrope writes into a buffer that it makes here
def make_random_model(name: str, *, seed: int = 0, scale: float = 6.0) -> Any:
    """A model in eval mode; `scale` is about the deviation of its logits, so that its choices are clear-cut."""
    torch.manual_seed(seed)
    config, own_class = make_config(name), model_class(name)
    is_auto = own_class in (AutoModelForCausalLM, AutoModelForImageTextToText)
    model = (own_class.from_config(config) if is_auto else own_class(config)).eval()
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.ndim == 1 and tensor.is_floating_point() and not tensor.any():
            tensor.normal_(std=0.1)  # biases, of routers too: zeros would hide that one is left out
    if (head := model.get_output_embeddings()) is not None:
        probe = torch.arange(5, 5 + WINDOW)[None]
        head.weight.mul_(scale / model(input_ids=probe).logits.float().std())
    return model
