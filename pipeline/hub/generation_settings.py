"""What a model's generation_config.json says about drawing tokens, and that a run does not do.

A run obeys the ids that end an answer (`pipeline.hub.tokenizers`). How tokens are drawn is said by its own
configuration, so other settings of the file are named in the plan: `generate` would draw other answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.hub.sources import ModelSource
from pipeline.hub.tokenizers import GENERATION_CONFIG
from pipeline.hub.weight_files import CONFIG, LocalTree, read_json

# settings that change which tokens are drawn, with the values at which they change nothing
DRAWING: Mapping[str, tuple[Any, ...]] = {
    "bad_words_ids": (), "begin_suppress_tokens": (), "constraints": (), "diversity_penalty": (0,),
    "do_sample": (True,), "dola_layers": (), "early_stopping": (False,), "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,), "epsilon_cutoff": (0,), "eta_cutoff": (0,),
    "exponential_decay_length_penalty": (), "force_words_ids": (), "forced_bos_token_id": (),
    "forced_eos_token_id": (), "guidance_scale": (1,), "length_penalty": (1,), "max_length": (20,),
    "max_new_tokens": (), "max_time": (), "min_length": (0,), "min_new_tokens": (0,), "min_p": (0,),
    "no_repeat_ngram_size": (0,), "num_beam_groups": (1,), "num_beams": (1,), "num_return_sequences": (1,),
    "penalty_alpha": (0,), "remove_invalid_values": (False,), "renormalize_logits": (False, True),
    "repetition_penalty": (1,), "sequence_bias": (), "stop_strings": (), "suppress_tokens": (), "temperature": (1,),
    "token_healing": (False,), "top_h": (), "top_k": (0,), "top_p": (1,), "typical_p": (1,),
    "watermarking_config": (),
}  # fmt: skip
# settings that name tokens, or say how a library computes and what it gives back
OTHER = frozenset({
    "_from_model_config", "assistant_confidence_threshold", "assistant_early_exit", "assistant_ensemble_weight",
    "assistant_lookbehind", "bos_token_id", "cache_config", "cache_implementation", "compile_config",
    "continuous_batching_config", "decoder_start_token_id", "disable_compile", "eos_token_id", "is_assistant",
    "low_memory", "max_cache_len", "max_matching_ngram_size", "num_assistant_tokens", "num_assistant_tokens_schedule",
    "output_attentions", "output_hidden_states", "output_logits", "output_scores", "pad_token_id",
    "prefill_chunk_size", "prompt_lookup_num_tokens", "return_dict_in_generate", "speculation_type",
    "target_lookbehind", "transformers_version", "use_cache", "use_mtp",
})  # fmt: skip


def unobeyed_settings(source: ModelSource) -> dict[str, Any]:
    """The settings of a resolved model that would change which tokens its `generate` draws, and are not obeyed.

    They are those of generation_config.json; where there is no such file, transformers takes them from config.json.
    """
    tree = LocalTree(Path(source.path))
    stated = read_json(tree, GENERATION_CONFIG if GENERATION_CONFIG in tree.sizes else CONFIG)
    return {
        key: stated[key]
        for key, neutral in sorted(DRAWING.items())
        if stated.get(key) not in (None, [], {}, *neutral)
    }
