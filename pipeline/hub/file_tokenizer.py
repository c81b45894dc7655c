"""A tokenizer of tokenizer.json alone: `cage plan` encodes prompts by it, without importing transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.hub.chat_templates import render
from pipeline.hub.sources import ModelSource
from pipeline.hub.tokenizer_facts import TOKENIZER, TokenizerFacts, load_tokenizer
from pipeline.records import Message


def open_tokenizer(source: ModelSource, facts: TokenizerFacts) -> Any:
    """The tokenizer of a resolved model: of its file, or of transformers where it has another format.

    Raises:
        ConfigurationError: the model's folder has none that can be read.
    """
    path = Path(source.path) / TOKENIZER
    return FileTokenizer(path, facts.named_tokens) if path.is_file() else load_tokenizer(source)


class FileTokenizer:
    """What a prompter asks of a tokenizer of transformers.

    Args:
        path: of tokenizer.json.
        named_tokens: special tokens by the names that templates know.
    """

    def __init__(self, path: Path, named_tokens: Mapping[str, str]) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(path))
        self._named_tokens = named_tokens

    def __call__(
        self, text: str, *, add_special_tokens: bool = True, split_special_tokens: bool = False
    ) -> dict[str, list[int]]:
        self._tokenizer.encode_special_tokens = split_special_tokens
        return {"input_ids": self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids}

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        *,
        chat_template: str,
        tokenize: bool,
        add_generation_prompt: bool,
        continue_final_message: bool = False,
        **values: Any,
    ) -> str:
        """The text of a conversation; with `continue_final_message`, to the end of the last message's own text."""
        assert not tokenize
        text = render(chat_template, messages, {**self._named_tokens, **values}, asks=add_generation_prompt)
        if not continue_final_message:
            return text
        final = str(messages[-1]["content"])
        at = text.rfind(final.strip())
        if at < 0:
            raise ValueError("the last message is not in what the template wrote, so it cannot be continued")
        whole = text[at : at + len(final.lstrip())]  # templates may cut blanks off its end
        return text[:at] + (whole if whole == final else final.strip())

    def convert_tokens_to_ids(self, token: str) -> int | None:
        """The id of a token; None where there is none."""
        found: int | None = self._tokenizer.token_to_id(token)
        return found

    def convert_ids_to_tokens(self, token_id: int) -> str | None:
        """The token of an id; None where there is none."""
        token: str | None = self._tokenizer.id_to_token(token_id)
        return token

    def decode(
        self, ids: Sequence[int], *, skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool = False
    ) -> str:
        """The text of tokens."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))
