"""Tiny configurations of checkpoints that see or hear beside reading, whose text part is a causal language model.

They are made from what their configuration classes say: every part gets small sizes under the names that its class
knows, and the text part those of its own family.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

# sizes of a tower that sees or hears, under all names that classes have for them
_TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "embed_dim": 32,
    "d_model": 32,
    "intermediate_size": 48,
    "ffn_dim": 48,
    "mlp_dim": 48,
    "encoder_ffn_dim": 48,
    "num_hidden_layers": 1,
    "num_layers": 1,
    "encoder_layers": 1,
    "depth": 1,
    "num_attention_heads": 2,
    "encoder_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_heads": 2,
    "head_dim": 16,
    "image_size": 28,
    "patch_size": 14,
    "out_hidden_size": 64,
    "output_dim": 64,
    "output_hidden_size": 64,
    "text_hidden_size": 64,
    "vision_hidden_size": 32,
    "encoder_hidden_size": 32,
    "num_mel_bins": 16,
    "max_source_positions": 32,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [],
    "fullatt_block_indexes": [0],
    "global_attn_indexes": [0],
    "projection_dim": 32,
}


def names_in(config_class: Any) -> frozenset[str]:
    """The settings that a configuration class knows."""
    return frozenset(item.name for item in dataclasses.fields(config_class)) | set(config_class.attribute_map)


def tiny_tower(config_class: Any) -> dict[str, Any]:
    """Small sizes for a part that sees or hears."""
    known = names_in(config_class)
    return {name: value for name, value in _TOWER.items() if name in known}


def parts_of(model_type: str) -> Mapping[str, Any]:
    """The configurations inside a composite one, as its class makes them, by field."""
    config: Any = CONFIG_MAPPING[model_type]()
    parts = {name: getattr(config, name, None) for name in config.sub_configs}
    return {name: part for name, part in parts.items() if part is not None}


_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}}
_TOWER_SIZES = {
    name: _TOWER[name]
    for name in (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "image_size",
        "patch_size",
    )
}
_OCR_TOWERS = {
    "sam_config": {**_TOWER_SIZES, "downsample_channels": [16, 32], "output_channels": 16, "mlp_dim": 48},
    "encoder_config": _TOWER_SIZES,
}
_VQ = {
    "base_channels": 32,
    "channel_multiplier": [1],
    "num_res_blocks": 1,
    "latent_channels": 32,
    "num_embeddings": 8,
    "resolution": 32,
    "embed_dim": 8,
}
_NEEDS_IMAGE = "reads no text without an image"
_NEEDS_PACKAGES = "its vision tower needs the packages timm and pillow"

# by model type: settings beside those that are made from the classes, by part ("" is the whole), or why there is none
COMPOSITES: dict[str, Mapping[str, Mapping[str, Any]] | str] = {
    "aria": {},
    "aya_vision": {},
    "blip": _NEEDS_IMAGE,
    "blip-2": _NEEDS_IMAGE,
    "chameleon": {"": {"vocabulary_map": {"<image>": 260}}, "vq_config": _VQ},
    "cohere2_vision": {},
    "cohere_compass": {},
    "cosmos3_edge": {"text_config": _MROPE},
    "cosmos3_omni": {},
    "deepseek_ocr2": {
        "text_config": {"mlp_layer_types": ["dense", "sparse"]},
        "vision_config": {
            **_OCR_TOWERS,
            "encoder_config": {**_TOWER_SIZES, "head_dim": 16, "num_key_value_heads": 2},
        },
    },
    "deepseek_vl": {},
    "deepseek_vl_hybrid": {},
    "diffusion_gemma": "denoises blocks of tokens at once instead of decoding them from left to right",
    "ernie4_5_vl_moe": {
        "text_config": {
            "rope_parameters": {**_MROPE["rope_parameters"], "mrope_section": [3, 3, 2]},
            "moe_intermediate_size": [32, 32],
        }
    },
    "evolla": "reads proteins beside text",
    "exaone4_5": {},
    "fast_vlm": _NEEDS_PACKAGES,
    "florence2": "encodes the text before it decodes: an encoder-decoder",
    "glm46v": {"text_config": _MROPE},
    "glm4v": {"text_config": _MROPE},
    # of which half a head is rotated
    "glm4v_moe": {"text_config": {"rope_parameters": {**_MROPE["rope_parameters"], "mrope_section": [1, 1, 2]}}},
    "glm5_next": {
        "text_config": {
            "num_key_value_heads": 4,
            "qk_rope_head_dim": 0,
            "linear_head_dim": 16,
            "linear_num_heads": 4,
            "layer_types": ["linear_attention", "indexed_attention"],
            "mlp_layer_types": ["dense", "sparse"],
            "index_kpool": 2,
        }
    },
    "glm_ocr": {"text_config": _MROPE},
    "glmga": {"text_config": _MROPE},
    "granite4_vision": {
        "": {"deepstack_layer_map": [[-1, 0]], "spatial_target_layers": [1], "downsample_rate": "1/2"},
        "vision_config": {"hidden_size": 64},
    },
    "granite_docling": {},
    "hunyuan_vl": {"text_config": _MROPE},
    "hyperclovax_vision_v2": {},
    "idefics": _NEEDS_IMAGE,
    "idefics2": {},
    "idefics3": {},
    "inkling2": {},
    "inkling_mm_model": {},
    "instructblip": _NEEDS_IMAGE,
    "instructblipvideo": _NEEDS_IMAGE,
    "internvl": {},
    "janus": {"vq_config": _VQ},
    "kimi_k25": {},
    "kosmos-2": _NEEDS_IMAGE,
    "kosmos-2.5": {},
    "lfm2_vl": {},
    "lfm3_vl": {},
    "lighton_ocr": {},
    "llava": {},
    "llava_next": {},
    "llava_next_video": {},
    "llava_onevision": {},
    "minicpm_ocr": {},
    "minicpmv4_6": {},
    "minicpmv4_7": {},
    "minimax_m3_vl": {},
    "mistral4": {},
    "mistral_large4": {"text_config": {"num_key_value_heads": 4}},
    "molmo2": {"vision_config": {"image_size": [28, 28]}, "adapter_config": {"vision_feature_layer": [0]}},
    "muse_glimmer": {"": {"out_hidden_size": 64, "projector_hidden_size": 64}},
    "muse_spark": {
        "": {"out_hidden_size": 64, "projector_hidden_size": 64},
        "audio_config": {"patch_sizes": [4], "hidden_sizes": [16], "depths": [1], "out_hidden_size": 64},
    },
    "nemotron_h_omni": {
        "": {"projector_hidden_size": 64, "vision_hidden_size": 32},
        "vision_config": {"video_temporal_patch_size": 2},
    },
    "ovis2": {},
    "paddleocr_vl": {"text_config": _MROPE},
    "paligemma": {},
    "perception_lm": _NEEDS_PACKAGES,
    "pi0": "moves robots: it decodes actions, not text",
    "pix2struct": _NEEDS_IMAGE,
    "pp_chart2table": {},
    "pp_formulanet": _NEEDS_IMAGE,
    "qianfan_ocr": {},
    "qwen2_5_omni_thinker": {"": {"vision_start_token_id": 3}, "text_config": _MROPE},
    "qwen2_5_vl": {"text_config": _MROPE},
    "qwen2_vl": {"text_config": _MROPE},
    "qwen3_omni_moe_thinker": {
        "": {"vision_start_token_id": 3},
        # it has masks without a window and a cache with one
        "text_config": {"sliding_window": None},
    },
    "qwen3_vl": {},
    "qwen3_vl_moe": {},
    "shieldgemma2": "classifies images",
    "smolvlm": {},
    "step3p7": {},
    "t5gemma2": "encodes the text before it decodes: an encoder-decoder",
    "udop": "encodes the text and its places on a page before it decodes",
    "unlimited_ocr": {"vision_config": _OCR_TOWERS},
    "video_llama_3": {},
    "video_llava": {},
    "vipllava": {},
    "vision-encoder-decoder": _NEEDS_IMAGE,
}
