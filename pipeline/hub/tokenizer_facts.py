"""What a tokenizer's files say, read without importing transformers: its tokens by id, its end, its chat template.

As with `model_facts`: where transformers' own code could change the answer (a token that it would add, a class with
defaults, code of the model's own), `AutoTokenizer` is asked, so the answer is always the one that it gives.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigurationError
from pipeline.hub.model_facts import reason_of
from pipeline.hub.sources import ModelSource
from pipeline.hub.weight_files import CONFIG, LocalTree, read_json

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
TEMPLATE, TEMPLATES, OLD_TEMPLATE = "chat_template.jinja", "additional_chat_templates", "chat_template.json"
# how names of files end that a vocabulary is read from
VOCABULARIES = (TOKENIZER, "tekken.json", "vocab.json", "vocab.txt", ".model", ".tiktoken")
# read by transformers for tokenizers of older formats; where one is there, transformers decides
OTHER_FORMATS = ("added_tokens.json", "special_tokens_map.json", "tekken.json")
# classes that take the tokens from tokenizer.json, and the tokens that they add where these are not among them
DEFAULT_TOKENS: Mapping[str, tuple[str, ...]] = {
    "TokenizersBackend": (),
    "PreTrainedTokenizer": (),
    "LlamaTokenizer": ("<unk>", "<s>", "</s>"),
    "Qwen2Tokenizer": ("<|endoftext|>",),
    "GPT2Tokenizer": ("<|endoftext|>",),
    "GemmaTokenizer": ("<unk>", "<bos>", "<eos>", "<pad>", "<mask>"),
}
GENERAL = ("TokenizersBackend", "PreTrainedTokenizer")
CLASS_OF_MODEL = {"qwen2": "Qwen2Tokenizer"}  # transformers takes it by the model, whatever general class is stated
# what these classes name where the settings do not
DEFAULT_NAMES: Mapping[str, Mapping[str, str]] = {
    "LlamaTokenizer": {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
    "Qwen2Tokenizer": dict.fromkeys(("unk_token", "eos_token", "pad_token"), "<|endoftext|>"),
    "GPT2Tokenizer": dict.fromkeys(("unk_token", "bos_token", "eos_token"), "<|endoftext|>"),
    "GemmaTokenizer": {f"{name}_token": f"<{name}>" for name in ("unk", "bos", "eos", "pad", "mask")},
}


@dataclass(frozen=True, slots=True)
class TokenizerFacts:
    """A tokenizer, as far as a run is planned with it. Picklable.

    Attributes:
        token_by_id: every token, added and special ones included.
        eos_token_id: the id that ends a text; None where there is none.
        chat_template: renders conversations; None where there is none.
        special_tokens: tokens that are no text, by what they look like as text, with their ids.
        named_tokens: special tokens by the names that templates know, such as "bos_token".
        added_ids: of tokens that were added to the vocabulary, special or not.
        other_templates: names of its chat templates, where there are several and none is the default.
    """

    token_by_id: Mapping[int, str]
    eos_token_id: int | None
    chat_template: str | None
    special_tokens: Mapping[str, int]
    named_tokens: Mapping[str, str]
    added_ids: frozenset[int]
    other_templates: tuple[str, ...] = ()

    @property
    def has_chat_template(self) -> bool:
        """Whether it can render a conversation."""
        return self.chat_template is not None


def read_tokenizer_facts(source: ModelSource) -> TokenizerFacts:
    """The facts of a resolved model's tokenizer. Raises ConfigurationError where there is none that can be read."""
    try:
        stated = _stated_facts(source)
    except (ConfigurationError, ValueError, KeyError, TypeError, AttributeError):
        stated = None  # load_tokenizer says what is wrong with the files
    return stated if stated is not None else facts_of_tokenizer(load_tokenizer(source))


def facts_of_tokenizer(tokenizer: Any) -> TokenizerFacts:
    """The facts of a transformers tokenizer."""
    return TokenizerFacts(
        token_by_id={token_id: token for token, token_id in tokenizer.get_vocab().items()},
        eos_token_id=tokenizer.eos_token_id,
        chat_template=default_template(tokenizer.chat_template),
        special_tokens={
            token.content: token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special
        },
        named_tokens={name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        added_ids=frozenset(tokenizer.added_tokens_decoder),
        other_templates=other_templates(tokenizer.chat_template),
    )


def default_template(stated: Any) -> str | None:
    """The template of conversations, of one template or several named ones; None where there is none."""
    template = _named_templates(stated).get("default")
    return str(template) if template else None


def other_templates(stated: Any) -> tuple[str, ...]:
    """The names of several templates of which none is the default."""
    named = _named_templates(stated)
    return () if named.get("default") else tuple(sorted(str(name) for name in named if name != "default"))


def _named_templates(stated: Any) -> Mapping[str, Any]:
    if isinstance(stated, list):  # the form of tokenizer_config.json
        return {each["name"]: each["template"] for each in stated}
    return stated if isinstance(stated, Mapping) else {"default": stated}


def load_tokenizer(source: ModelSource) -> Any:
    """The transformers tokenizer of a resolved model.

    A chat template that only chat_template.json has, as processors of images wrote it, is the tokenizer's too.

    Raises:
        ConfigurationError: the model's folder has none that can be read.
    """
    from transformers import AutoTokenizer  # takes seconds

    tree = LocalTree(Path(source.path))
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source.path, trust_remote_code=source.trust_remote_code, local_files_only=True
        )
    except (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError) as error:
        raise ConfigurationError(_why_not_loaded(source.name, tree.sizes, reason_of(error))) from error
    if not tokenizer.chat_template and OLD_TEMPLATE in tree.sizes:
        tokenizer.chat_template = read_json(tree, OLD_TEMPLATE).get("chat_template")
    return tokenizer


def _why_not_loaded(name: str, files: Iterable[str], reason: str) -> str:
    if not any(file.endswith(VOCABULARIES) for file in files):
        return (
            f"{name} has no tokenizer, as checkpoints of a training run often have none: copy {TOKENIZER}, "
            f"{TOKENIZER_CONFIG} and {TEMPLATE} of the model that it was trained from into it"
        )
    return f"the tokenizer of {name} cannot be loaded: {reason}"


def _stated_facts(source: ModelSource) -> TokenizerFacts | None:
    """The facts, where the files state everything that they depend on; None where transformers would decide."""
    folder = Path(source.path)
    tree = LocalTree(folder)
    names = tree.sizes
    if not {TOKENIZER, TOKENIZER_CONFIG} <= names.keys() or any(name in names for name in OTHER_FORMATS):
        return None
    settings = read_json(tree, TOKENIZER_CONFIG)
    kind = str(settings.get("tokenizer_class")).removesuffix("Fast")
    if kind in GENERAL and CONFIG in names:
        kind = CLASS_OF_MODEL.get(str(read_json(tree, CONFIG).get("model_type")), kind)
    if "auto_map" in settings or kind not in DEFAULT_TOKENS or any((folder / TEMPLATES).glob("*.jinja")):
        return None
    if kind not in GENERAL and not settings.get("eos_token"):
        return None  # the class has an end of its own
    tokenizer = read_json(tree, TOKENIZER)
    id_by_token = _id_by_token(tokenizer)
    stated = {token: id_by_token.get(token) for token in (*DEFAULT_TOKENS[kind], *_special_tokens(settings))}
    if None in stated.values():  # transformers would add it
        return None
    if len(set(id_by_token.values())) != max(id_by_token.values()) + 1:  # it would number added tokens anew
        return None
    marked = [token["content"] for token in tokenizer["added_tokens"] if token["special"]]
    for token_id, token in settings.get("added_tokens_decoder", {}).items():
        if id_by_token.get(token["content"]) != int(token_id):
            return None
        if bool(token.get("special")) != (token["content"] in marked):
            return None
    end = settings.get("eos_token")
    named = {key: token for key, token in DEFAULT_NAMES.get(kind, {}).items() if key not in settings}
    named |= {key: _text(value) for key, value in settings.items() if _names_token(key, value)}
    if isinstance(more := settings.get("extra_special_tokens"), Mapping):
        named |= {key: _text(token) for key, token in more.items()}
    template = (folder / TEMPLATE).read_text("utf-8") if TEMPLATE in names else settings.get("chat_template")
    if not template and OLD_TEMPLATE in names:
        template = read_json(tree, OLD_TEMPLATE).get("chat_template")
    return TokenizerFacts(
        token_by_id={token_id: token for token, token_id in id_by_token.items()},
        eos_token_id=None if end is None else id_by_token[_text(end)],
        chat_template=default_template(template),
        special_tokens={token: id_by_token[token] for token in (*marked, *_special_tokens(settings))},
        named_tokens=named,
        added_ids=frozenset(
            id_by_token[token]
            for token in (*(each["content"] for each in tokenizer["added_tokens"]), *_special_tokens(settings))
        ),
        other_templates=other_templates(template),
    )


def _id_by_token(tokenizer: Mapping[str, Any]) -> dict[str, int]:
    """The vocabulary of a tokenizer.json with its added tokens."""
    vocabulary = tokenizer["model"]["vocab"]
    if isinstance(vocabulary, list):  # Unigram: [token, score] in the order of the ids
        vocabulary = {entry[0]: token_id for token_id, entry in enumerate(vocabulary)}
    return {**vocabulary, **{token["content"]: int(token["id"]) for token in tokenizer["added_tokens"]}}


def _special_tokens(settings: Mapping[str, Any]) -> Iterator[str]:
    """Every token that tokenizer_config.json names, in whatever form."""
    for key, value in settings.items():
        if _names_token(key, value):
            yield _text(value)
    for key in ("additional_special_tokens", "extra_special_tokens"):
        named = settings.get(key) or []
        yield from map(_text, named.values() if isinstance(named, Mapping) else named)


def _names_token(key: str, value: Any) -> bool:
    """Whether an entry of tokenizer_config.json names a token, as `bos_token` does and `add_bos_token` does not."""
    return key.endswith("_token") and not isinstance(value, bool | None)


def _text(token: Any) -> str:
    """A token as text, of its plain or its detailed form."""
    return token["content"] if isinstance(token, Mapping) else str(token)
