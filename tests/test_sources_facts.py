"""What is read of a model without transformers is what transformers says."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import tiny_models
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, GPT2Tokenizer, LlamaTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from pipeline.errors import ConfigurationError
from pipeline.hub.model_facts import COMPOSITES, FAMILIES, facts_of_config, load_model_config, read_model_facts
from pipeline.hub.sources import Location, ModelSource
from pipeline.hub.tokenizer_facts import facts_of_tokenizer, read_tokenizer_facts

Tiny = Callable[..., Path]
ROOT = Path(__file__).parent.parent
SIZES: dict[str, Any] = {
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "num_key_value_heads": 3,
    "head_dim": 24,
    "hidden_size": 240,
    "vocab_size": 777,
    "max_position_embeddings": 333,
    "eos_token_id": 7,
    "pad_token_id": None,
    "bos_token_id": None,
}
# families that are left to transformers, of which some compute a size in their own way
OTHERS = [
    "bloom",
    "falcon",
    "mpt",
    "gpt_bigcode",
    "deepseek_v3",
    "lfm2",
    "qwen3_5",
    "mamba",
    "llama4",
    "glm",
    "gpt_neo",
]


def source_of(folder: Path, *, trust_remote_code: bool = False) -> ModelSource:
    return ModelSource("model", Location.FOLDER, str(folder), None, "sha256:0", {}, trust_remote_code)


def as_written(model_type: str, **more: Any) -> dict[str, Any]:
    """The whole configuration of a family, as a file of it states it."""
    kind = CONFIG_MAPPING[model_type]
    own = {kind.attribute_map.get(name, name): value for name, value in SIZES.items()}
    family = FAMILIES.get(f"{model_type}_text" if model_type in COMPOSITES else model_type)
    if family is not None:
        own |= {name: 24 + at for at, name in enumerate(family.mlp_sizes)}
    if model_type in COMPOSITES:
        own = {"text_config": {**own, "model_type": f"{model_type}_text"}}
    return {"architectures": ["OurForCausalLM"], "model_type": model_type, **own, **more}


def write(folder: Path, tree: dict[str, Any]) -> ModelSource:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(tree))
    return source_of(folder)


def both(source: ModelSource) -> tuple[object, object]:
    """The facts, by this program's reader and by transformers; an error as its text."""
    found: list[object] = []
    for read in (read_model_facts, lambda source: facts_of_config(load_model_config(source), source.name)):
        try:
            found.append(read(source))
        except ConfigurationError as error:
            found.append(str(error))
    return found[0], found[1]


@pytest.mark.parametrize("model_type", sorted({*FAMILIES, *COMPOSITES, *OTHERS}))
def test_facts_of_a_family_are_those_of_transformers_whatever_the_file_leaves_out(model_type, tmp_path):
    whole = as_written(model_type)
    own, theirs = both(write(tmp_path / "whole", whole))
    assert own == theirs
    inner = whole["text_config"] if model_type in COMPOSITES else whole
    for name in [each for each in inner if each != "model_type"]:
        for changed in ({}, {name: None}):
            tree = {key: value for key, value in inner.items() if key != name} | changed
            if model_type in COMPOSITES:
                tree = {**whole, "text_config": tree}
            own, theirs = both(write(tmp_path / name, tree))
            assert own == theirs, (name, changed)


@pytest.mark.parametrize(
    "more",
    [
        {"num_labels": 1},
        {"num_labels": 3},
        {"id2label": {"0": "bad", "1": "good", "2": "best"}, "label2id": {"bad": 0, "good": 1, "best": 2}},
        {"id2label": {"0": "only"}, "label2id": {"only": 0}},
        {"id2label": {"0": "only"}, "label2id": {"only": 0}, "num_labels": 4},
        {"architectures": None},
        {"architectures": []},
        {"eos_token_id": [5, 7]},
        {"eos_token_id": []},
        {"num_attention_heads": 7},
        {"num_attention_heads": "12"},
        {"hidden_size": 0},
        {"max_position_embeddings": -1},
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        {"text_config": {"model_type": "llama", "vocab_size": 5}},
        {"auto_map": {"AutoConfig": "nowhere.Config"}},
        {"model_type": "own", "auto_map": {"AutoConfig": "nowhere.Config"}},
        {"model_type": "no-such-family"},
        {"model_type": None},
    ],
    ids=json.dumps,
)
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen2"])
@pytest.mark.filterwarnings("ignore:`rope_scaling` is deprecated:FutureWarning")
def test_facts_of_an_odd_configuration_are_those_of_transformers(model_type, more, tmp_path):
    own, theirs = both(write(tmp_path, as_written(model_type) | more))
    assert own == theirs


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2", "qwen3", "mistral", "gemma2", "neox"])
def test_facts_of_a_saved_model_are_those_of_transformers(kind, tiny: Tiny):
    source = source_of(tiny(kind))
    own, theirs = both(source)
    assert own == theirs
    assert read_tokenizer_facts(source) == facts_of_tokenizer(AutoTokenizer.from_pretrained(source.path))


def test_facts_of_a_saved_classifier_are_those_of_transformers(judge: Tiny):
    own, theirs = both(source_of(judge("llama", num_labels=3)))
    assert own == theirs
    assert own.num_labels == 3


def test_a_model_with_several_language_models_is_refused_in_a_line(tmp_path):
    tree = CONFIG_MAPPING["musicgen"](
        text_encoder={"model_type": "t5"}, audio_encoder={"model_type": "encodec"}, decoder={}
    ).to_dict()
    with pytest.raises(ConfigurationError, match=r"model \(musicgen\) cannot be used: ValueError: Multiple"):
        read_model_facts(write(tmp_path, tree))


def test_the_code_of_a_model_answers_where_it_is_trusted(tmp_path):
    tree = as_written("llama", auto_map={"AutoConfig": "code.Own"})
    (tmp_path / "code.py").write_text(
        "from transformers import LlamaConfig\nclass Own(LlamaConfig):\n    def __post_init__(self, **kwargs):\n"
        "        super().__post_init__(**kwargs)\n        self.vocab_size = 5\n"
    )
    write(tmp_path, tree)
    assert read_model_facts(source_of(tmp_path)).vocab_size == 777
    assert read_model_facts(source_of(tmp_path, trust_remote_code=True)).vocab_size == 5


def bpe(special: tuple[str, ...]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")]))
    tokenizer.add_special_tokens(list(special))
    return tokenizer


def save_generic(folder: Path, backend: Tokenizer, **settings: Any) -> None:
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, **settings)
    fast.save_pretrained(folder)


def change_settings(folder: Path, **changes: Any) -> None:
    """Change tokenizer_config.json; None takes a key away."""
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in settings.items() if value is not None}))


def write_unigram(folder: Path) -> None:
    pieces = [("<unk>", 0.0), ("a", -1.0), ("b", -2.0), ("ab", -1.5)]
    save_generic(folder, Tokenizer(models.Unigram(pieces, unk_id=0)), unk_token="<unk>")


def write_word_pieces(folder: Path) -> None:
    save_generic(
        folder, Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]")), unk_token="[UNK]"
    )


def write_older_class_name(folder: Path) -> None:
    save_generic(folder, bpe(("<e>",)), eos_token="<e>")
    change_settings(folder, tokenizer_class="PreTrainedTokenizerFast", backend=None)


def write_token_that_is_added(folder: Path) -> None:
    save_generic(folder, bpe(("<e>",)), eos_token="<e>")
    change_settings(folder, pad_token="<new>")


def write_detailed_tokens(folder: Path) -> None:
    save_generic(folder, bpe(("<e>", "<x>")), eos_token="<e>")
    detailed = {"__type": "AddedToken", "content": "<e>", "special": True}
    change_settings(folder, eos_token=detailed, extra_special_tokens=["<x>"])


def write_decoder_of_added_tokens(folder: Path) -> None:
    save_generic(folder, bpe(("<e>",)), eos_token="<e>")
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    change_settings(folder, added_tokens_decoder={"3": {"content": "<e>", **plain}, "4": {"content": "<f>", **plain}})


def write_special_tokens_map(folder: Path) -> None:
    save_generic(folder, bpe(("<e>",)), eos_token=None)
    (folder / "special_tokens_map.json").write_text('{"eos_token": "<e>"}')


def write_no_settings(folder: Path) -> None:
    save_generic(folder, bpe(("<e>",)), eos_token="<e>")
    (folder / "tokenizer_config.json").unlink()


def write_template_in_settings(folder: Path) -> None:
    save_generic(folder, bpe(("<e>",)), eos_token="<e>")
    change_settings(folder, chat_template="{{ messages }}")


def write_named_templates(folder: Path) -> None:
    save_generic(folder, bpe(("<e>",)), eos_token="<e>", chat_template={"default": "{{ messages }}", "tool": "x"})


def write_empty_template(folder: Path) -> None:
    save_generic(folder, bpe(("<e>",)), eos_token="<e>")
    (folder / "chat_template.jinja").write_text("")


def write_empty_template_beside_one_in_settings(folder: Path) -> None:
    write_template_in_settings(folder)
    (folder / "chat_template.jinja").write_text("")


def write_named_extra_tokens(folder: Path) -> None:
    save_generic(folder, bpe(("<e>", "<image>")), eos_token="<e>")
    change_settings(folder, extra_special_tokens={"image_token": "<image>"})


def write_settings_that_say_otherwise_what_is_special(folder: Path) -> None:
    save_generic(folder, bpe(("<e>", "<x>")), eos_token="<e>")
    token_id = Tokenizer.from_file(str(folder / "tokenizer.json")).token_to_id("<x>")
    plain = {"content": "<x>", "special": False, "lstrip": False, "rstrip": False, "normalized": False}
    change_settings(folder, added_tokens_decoder={str(token_id): {**plain, "single_word": False}})


def write_an_added_token_behind_a_gap(folder: Path) -> None:
    save_generic(folder, bpe(("<e>",)), eos_token="<e>")
    tree = json.loads((folder / "tokenizer.json").read_text())
    tree["added_tokens"].append({**tree["added_tokens"][0], "id": 500, "content": "<far>"})
    (folder / "tokenizer.json").write_text(json.dumps(tree))


def write_llama_class(folder: Path) -> None:
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4, "ab": 5}
    LlamaTokenizer(vocab=vocabulary, merges=[("a", "b")]).save_pretrained(folder)


def write_qwen_class(folder: Path) -> None:
    Qwen2Tokenizer(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")]).save_pretrained(folder)


def write_gpt2_class_without_its_end(folder: Path) -> None:
    GPT2Tokenizer(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")]).save_pretrained(folder)
    change_settings(folder, eos_token=None)


TOKENIZERS = [each for name, each in list(globals().items()) if name.startswith("write_")]


@pytest.mark.parametrize("make", TOKENIZERS, ids=lambda each: each.__name__)
def test_facts_of_a_tokenizer_are_those_of_transformers(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path)
    write(tmp_path, as_written("llama"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    facts = read_tokenizer_facts(source_of(tmp_path))
    assert facts == facts_of_tokenizer(tokenizer)
    assert len(facts.token_by_id) == len(tokenizer)


def test_reading_facts_of_common_models_imports_no_model_library(tiny: Tiny, judge: Tiny, tmp_path: Path) -> None:
    folders = [tiny(kind) for kind in ("llama", "gpt2", "qwen2", "qwen3", "mistral", "neox")]
    folders += [judge("llama"), judge("qwen2", num_labels=3)]
    for model_type in sorted({*FAMILIES, *COMPOSITES}):
        folder = Path(shutil.copytree(tiny(), tmp_path / model_type))
        write(folder, as_written(model_type))
        folders.append(folder)
    script = """
import sys
from pathlib import Path
from pipeline.hub.descriptions import describe_model
from pipeline.hub.model_facts import read_model_facts
from pipeline.hub.sources import resolve_model
from pipeline.hub.tokenizer_facts import read_tokenizer_facts
from pipeline.hub.tokenizers import compare_tokenizers, stop_token_ids
for folder in sys.argv[1:]:
    source = resolve_model(folder, cache_folder=Path(folder))
    tokenizer = read_tokenizer_facts(source)
    compare_tokenizers(tokenizer, tokenizer, "one", "other")
    stop_token_ids(source, tokenizer, read_model_facts(source))
    describe_model(source)
    heavy = {"torch", "transformers", "tokenizers", "huggingface_hub", "fsspec", "ray", "datasets"} & set(sys.modules)
    assert not heavy, (folder, heavy)
"""
    subprocess.run([sys.executable, "-c", script, *map(str, folders)], check=True, cwd=ROOT, timeout=120)


def test_tokens_are_compared_without_a_tokenizer_of_transformers(tiny: Tiny) -> None:
    facts = read_tokenizer_facts(source_of(tiny()))
    assert facts == facts_of_tokenizer(tiny_models.make_tokenizer())
    assert facts.eos_token_id == 0
    assert facts.has_chat_template
