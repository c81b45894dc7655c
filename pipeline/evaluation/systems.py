"""Answers of several systems to the same prompts: runs, variants of a run, and files of answers from elsewhere."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from pipeline.config.variants import Variant, names_of
from pipeline.errors import ConfigurationError, RowError
from pipeline.evaluation.judges.interface import JudgedAnswer
from pipeline.inputs.conversations import read_conversation
from pipeline.quoting import quote
from pipeline.records import FinishReason, Message
from pipeline.storage.run import Run
from pipeline.storage.shard_files import as_damaged_file

MOST_SAMPLES = 1024  # of one prompt, as decoding.n
ID_NAMES = ("row_id", "id", "prompt_id")
ANSWER_NAMES = ("response", "answer", "output", "completion", "text")
# how other systems call the end of an answer
CUT = (str(FinishReason.LENGTH), str(FinishReason.REASONING), "max_tokens", "max_new_tokens", "max_output_tokens")
ENDED = (
    str(FinishReason.STOP), "eos", "eos_token", "end_turn", "stop_sequence", "content_filter", "safety", "recitation",
    "refusal", "tool_calls", "tool_use", "function_call",
)  # fmt: skip
HALF = re.compile("[\ud800-\udfff]")
COLUMNS = (
    "row_id",
    "variant",
    "sample",
    "prompt",
    "response",
    "finish_reason",
    "num_tokens",
    "num_reasoning_tokens",
    "kl_per_token",
    "rewards",
)


@dataclass(frozen=True, slots=True)
class SystemAnswer:
    """One answer.

    Args:
        row_id: of the prompt; answers of different systems with one id are compared.
        sample: which of the system's answers to the prompt it is.
        judged: what judges see.
        kl_per_token: nats per token to the base; None where the system did not record it.
        was_cut: whether it ended at its length limit; None where the system did not say.
    """

    row_id: str
    sample: int
    judged: JudgedAnswer
    kl_per_token: float | None = None
    was_cut: bool | None = None


@dataclass(frozen=True, slots=True)
class System:
    """A named set of answers. Each (row_id, sample) is there once."""

    name: str
    answers: tuple[SystemAnswer, ...]


def read_systems(paths: Sequence[str]) -> list[System]:
    """The systems at these places, in order: a finished run has one for each of its variants, a file is one.

    Raises:
        ConfigurationError: a place holds neither a run nor a JSONL file of answers, or two have the same name.
    """
    last = [_last_name(path) for path in dict.fromkeys(paths)]
    titles = [path if last.count(_last_name(path)) > 1 else _last_name(path) for path in paths]
    systems = [system for path, title in zip(paths, titles, strict=True) for system in _read(path, title)]
    names = [system.name for system in systems]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise ConfigurationError(f"two systems have the name {quote(repeated)}; give each place once")
    return systems


def _last_name(path: str) -> str:
    name = path.rstrip("/").rpartition("/")[2]
    return Path(path).resolve().name if name in ("", ".", "..") else name


def _read(path: str, title: str) -> list[System]:
    if path.endswith((".jsonl", ".ndjson")):
        return [_read_file(Path(path), title)]
    return _read_run(Run.open(path), title)


def _read_run(run: Run, title: str) -> list[System]:
    if not run.is_complete:
        raise ConfigurationError(f"{run.store.path} is not finished; its command continues it")
    by_variant: dict[int, list[SystemAnswer]] = {at: [] for at in range(len(run.plan.variants))}
    for row in _rows(run):
        # the length of what is judged: with the reasoning where that is part of the answer
        reasoning = 0 if run.plan.reasons_in_answers else row.get("num_reasoning_tokens") or 0
        judged = JudgedAnswer(
            row["prompt"],
            row["response"],
            row["num_tokens"] - reasoning,
            row.get("rewards") or {},
        )
        was_cut = row["finish_reason"] in (FinishReason.LENGTH, FinishReason.REASONING)
        answer = SystemAnswer(row["row_id"], row["sample"], judged, row["kl_per_token"], was_cut)
        by_variant[row.get("variant") or 0].append(answer)
    if len(by_variant) == 1:
        return [System(title, tuple(by_variant[0]))]
    return [
        System(f"{title}: {_describe(method, variant)}", tuple(by_variant[at]))
        for at, (method, variant) in enumerate(zip(names_of(run.plan.variants), run.plan.variants, strict=True))
    ]


def _rows(run: Run) -> Iterator[Mapping[str, Any]]:
    for record in run.committed().values():
        [name] = [name for name in record.sha256_by_file if name.startswith("part-")]
        with as_damaged_file(run.store.url(name)), run.store.open(name) as handle, pq.ParquetFile(handle) as file:
            yield from file.read(columns=[each for each in COLUMNS if each in file.schema_arrow.names]).to_pylist()


def _describe(method: str, variant: Variant) -> str:
    if not variant.rule.uses_principals:
        return method
    weights = ", ".join(f"{name} {weight:g}" for name, weight in (variant.weights or {}).items())
    temperature = f" {variant.agent_temperature:g}" if variant.rule.uses_temperature else ""
    return method + temperature + (f" ({weights})" if weights else "")


def _read_file(path: Path, title: str) -> System:
    """Answers of any system: one JSON object per line, with an id and an answer.

    The prompt, for judges that read it, is a text or a list of messages.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # texts in JSON may have other ends of lines
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ConfigurationError(f"cannot read {path}: {reason}") from None
    answers = [_answer(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not answers:
        raise ConfigurationError(f"{path} has no answers")
    keys = [(answer.row_id, answer.sample) for answer in answers]
    if len(set(keys)) < len(keys):
        row_id, sample = next(key for key in keys if keys.count(key) > 1)
        raise ConfigurationError(
            f"{path} has two answers to {quote(row_id)} with sample {sample}; number them by a field sample"
        )
    return System(title, tuple(answers))


def _answer(line: str, place: str) -> SystemAnswer:
    try:
        row = json.loads(line)
    except ValueError:
        raise ConfigurationError(f"{place}: this is not JSON: {quote(line)}") from None
    if HALF.search(json.dumps(row, ensure_ascii=False)):
        raise ConfigurationError(f"{place}: a text has half of a character (a lone surrogate), which is no text")
    if not isinstance(row, dict):
        raise ConfigurationError(f"{place}: each line must be an object with an id and an answer; got {quote(row)}")
    row_id = row["row_id"] if "row_id" in row else _only(row, ID_NAMES, place, lambda value: value)
    text = _only(row, ANSWER_NAMES, place, _text_of)
    if isinstance(text, list):
        raise ConfigurationError(
            f"{place}: the answer must be a text, or messages that end with the assistant's; got {quote(text)}. "
            "Several answers to a prompt take a line each, with a field sample"
        )
    if not isinstance(text, str):
        raise ConfigurationError(f"{place}: the answer must be a text; got {quote(text)}")
    if isinstance(row_id, bool) or not isinstance(row_id, str | int):
        raise ConfigurationError(f"{place}: the id must be a text or a number; got {quote(row_id)}")
    sample = row.get("sample", 0)
    if isinstance(sample, bool) or not isinstance(sample, int) or not 0 <= sample < MOST_SAMPLES:
        raise ConfigurationError(
            f"{place}: sample must be a number from 0 to {MOST_SAMPLES - 1}; got {quote(sample)}"
        )
    messages = _prompt(row.get("prompt"), place)
    num_tokens = row.get("num_tokens")
    if num_tokens is not None and (type(num_tokens) is not int or num_tokens < 0):
        raise ConfigurationError(f"{place}: num_tokens must be a whole number; got {quote(num_tokens)}")
    judged = JudgedAnswer(messages, text, num_tokens or 0)
    return SystemAnswer(str(row_id), sample, judged, was_cut=_was_cut(row.get("finish_reason"), place))


def _prompt(prompt: Any, place: str) -> tuple[Message, ...]:
    """A prompt as runs store it: a text is the user's, and the parts of a message are one text; nothing for none."""
    if prompt is None or prompt == []:
        return ()
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not isinstance(messages, list) or not all(isinstance(each, dict) for each in messages):
        raise ConfigurationError(f"{place}: the prompt must be a text or a list of messages; got {quote(prompt)}")
    try:
        return read_conversation(messages, "prompt")
    except RowError as error:
        raise ConfigurationError(f"{place}: {error}") from None


def _only(row: Mapping[str, Any], names: Sequence[str], place: str, read: Callable[[Any], Any]) -> Any:
    """What the fields of these names hold. Raises ConfigurationError for none, and for several that differ."""
    found = {name: read(row[name]) for name in names if name in row}
    if not found:
        raise ConfigurationError(
            f"{place}: there is none of the fields {', '.join(names)}; fields: {quote(list(row))}"
        )
    first, *others = found.values()
    if any(other != first for other in others):
        raise ConfigurationError(f"{place}: the fields {', '.join(found)} differ; keep the one that is meant")
    return first


def _text_of(answer: Any) -> Any:
    """The text of an answer that is a list of messages and ends with the assistant's; others as they are."""
    last = answer[-1] if isinstance(answer, list) and answer else None
    if not isinstance(last, dict) or last.get("role") != "assistant":
        return answer
    content = last.get("content")
    try:
        return read_conversation([last], "answer")[0]["content"] if isinstance(content, list) else content
    except RowError:  # parts that are no text
        return answer


def _was_cut(reason: Any, place: str) -> bool | None:
    if reason is None:
        return None
    name = reason.lower() if isinstance(reason, str) else reason
    if name not in (*CUT, *ENDED):
        accepted = ", ".join((*ENDED, *CUT))
        raise ConfigurationError(f"{place}: finish_reason must be one of {accepted}; got {quote(reason)}")
    return name in CUT
