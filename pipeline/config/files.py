"""Configuration files: YAML and dotted overrides become one typed configuration, once, at the edge.

An unknown key is an error with a suggestion.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from pipeline.config.sections import Config
from pipeline.errors import ConfigurationError
from pipeline.sections import Section, shortened

C = TypeVar("C", bound=Section)
BEHIND_COMMENTS = (yaml.BlockEndToken, yaml.StreamEndToken)  # tokens that PyYAML places after a comment
MERGE_TAG = "tag:yaml.org,2002:merge"
NAMED_BY_MODEL = ("base", "model", "reference", "draft_model")  # sections that a model's name may stand for
MAX_FILE_BYTES = 2**20
MAX_VALUES = 100_000  # of a configuration, each counted as often as an alias repeats it
UNION_TAG = re.compile(
    r"(ReferenceConfig|ModelConfig|SimplexConfig|literal\[.*\]|constrained-.*|int|str|function-.*|tuple\[.*)"
)

# By the beginnings of pydantic's types of faults.
WORDS = {
    ("bool_",): "must be true or false",
    ("int_",): "must be a whole number",
    ("float_", "decimal_"): "must be a number",
    ("string_type", "string_sub_type", "string_unicode"): "must be text",
    ("tuple_type", "list_type", "set_type", "frozen_set_type"): "must be a list",
    ("dict_", "model_", "mapping_"): "must be a mapping, with one key: value per line",
    ("too_short",): "has too few entries",
    ("too_long",): "has too many entries",
    ("datetime_", "date_"): "must be a date and time, such as 2026-11-25T12:00:00",
}
PATTERNS = {r"^(auto|cpu|cuda(:\d+)?)$": "auto, cpu, cuda or cuda:N"}


class _UniqueKeysLoader(yaml.SafeLoader):
    """Refuses a mapping that states a key twice: PyYAML would take the last one without a word."""

    def compose_mapping_node(self, anchor: dict[Any, yaml.Node]) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        stated: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == MERGE_TAG:
                continue
            if (key.tag, key.value) in stated:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {shortened(key.value)} is there twice", problem_mark=key.start_mark
                )
            stated.add((key.tag, key.value))
        return node


def _parse_yaml(text: str) -> Any:
    return yaml.load(text, _UniqueKeysLoader)


def read_yaml(path: Path) -> Any:
    """The plain values of a YAML file. Raises ConfigurationError where it cannot be read or states a key twice."""
    try:
        if (size := path.stat().st_size) > MAX_FILE_BYTES:
            raise ConfigurationError(f"{path} has {size:,} bytes; a configuration has at most {MAX_FILE_BYTES:,}")
        return _parse_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigurationError(f"no configuration file at {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} cannot be read: {error}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:  # ValueError: such as a date with a 13th month
        raise ConfigurationError(f"{path} is not valid YAML: {_printable(' '.join(str(error).split()))}") from None


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read and validate a `Config`; see `load_as`."""
    return load_as(Config, path, overrides)


def parse_config(
    tree: dict[str, Any], overrides: list[str] | None = None, *, source: str = "configuration"
) -> Config:
    """Validate a plain tree as a `Config`; see `parse_as`."""
    return parse_as(Config, tree, overrides, source=source)


def load_as(kind: type[C], path: str | Path, overrides: list[str] | None = None) -> C:
    """Read a YAML file, apply dotted overrides such as `decoding.temperature=0.7`, and validate it as a `kind`.

    Raises:
        ConfigurationError: the file cannot be read, or a key or value is wrong; all of them, one a line.
    """
    tree = read_yaml(Path(path))
    if not isinstance(tree, dict):
        raise ConfigurationError(
            f"{path} must hold a mapping with the keys input, output, ...; it holds {_printable(shortened(tree))}"
        )
    return parse_as(kind, tree, overrides, source=str(path))


def parse_as(
    kind: type[C], tree: dict[str, Any], overrides: list[str] | None = None, *, source: str = "configuration"
) -> C:
    """Apply overrides to a plain tree of values and validate it. Raises ConfigurationError, a fault a line."""
    for override in overrides or []:
        _apply_override(tree, override)
    if _num_values(tree, {}, set()) > MAX_VALUES:
        raise ConfigurationError(f"{source} has more than {MAX_VALUES:,} values, with what its aliases repeat")
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        faults = [_printable(_describe(fault, kind)) for fault in error.errors()]
        raise ConfigurationError(f"{source}: " + "\n".join(dict.fromkeys(faults))) from None


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML, defaults included."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _apply_override(tree: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    keys = dotted.split(".")
    if not equals or not all(keys):
        raise ConfigurationError(f"an override has the form key.sub=value; got {override!r}")
    try:
        value, has_comment = _parse_yaml(text), _ends_in_comment(text)
    except (yaml.YAMLError, RecursionError, ValueError):
        raise ConfigurationError(f"the value of the override {override!r} is not valid YAML") from None
    if has_comment:
        raise ConfigurationError(
            f"the override {override!r} ends in a comment, which begins at #; leave it out, or put the value in "
            f"double quotes within the shell's single ones: '{dotted}=\"...\"'"
        )
    node = tree
    for key in keys[:-1]:
        child = node.get(key)
        if isinstance(child, str) and key in NAMED_BY_MODEL:
            child = {"model": child}
        if not isinstance(child, dict | None):
            raise ConfigurationError(f"override {override!r}: {key} is {child!r}, which has no keys below it")
        # a copy, because an alias may have the same mapping elsewhere in the tree
        child = node[key] = dict(child or {})
        node = child
    node[keys[-1]] = value


def _ends_in_comment(text: str) -> bool:
    ends = [token.end_mark.index for token in yaml.scan(text) if not isinstance(token, BEHIND_COMMENTS)]
    return "#" in text[max(ends) :]


def _num_values(value: Any, counted: dict[int, float], outer: set[int]) -> float:
    """How many values a tree has, those that are in it several times included; infinite where it contains itself.

    Args:
        value: the tree.
        counted: what is known of its mappings and lists, by id.
        outer: the ids of those around the value.
    """
    if not isinstance(value, (dict, list, tuple)):
        return 1
    key = id(value)
    if key in outer:
        return math.inf
    if key not in counted:
        children = value.values() if isinstance(value, dict) else value
        counted[key] = 1 + sum(_num_values(child, counted, outer | {key}) for child in children)
    return counted[key]


def _describe(fault: Any, kind: type[Section]) -> str:
    """One line: where, what was given, what would be right."""
    where, section = _locate(fault["loc"], kind)
    if fault["type"] == "extra_forbidden":
        known = sorted(section.model_fields) if section is not None else []
        close = difflib.get_close_matches(str(fault["loc"][-1]), known, n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]}?" if close else f"; known keys: {', '.join(known)}"
        return f"{where} is not a known key{hint}"
    if fault["type"] == "missing":
        return f"{where} is missing"
    if fault["type"] in ("union_tag_invalid", "union_tag_not_found"):
        kinds = ", ".join(_kinds(*_parent(fault["loc"], kind)))
        return f"{where}.kind must be one of {kinds}; got {shortened(_value_of(fault, 'kind'))}"
    message = _in_plain_words(fault)
    if fault["type"] == "value_error":
        return f"{where}: {message}" if where else message
    return f"{where} {message}; got {shortened(fault['input'])}"


def _in_plain_words(fault: Any) -> str:
    """What would be right, for people who know YAML and not pydantic."""
    if fault["type"] == "string_pattern_mismatch":
        return f"must be {PATTERNS[fault['ctx']['pattern']]}"
    for types, words in WORDS.items():
        if fault["type"].startswith(types):
            return words
    message: str = fault["msg"].removeprefix("Value error, ")
    return message.replace("Input should be", "must be").replace("String should", "must")


def _value_of(fault: Any, key: str) -> Any:
    return fault["input"].get(key) if isinstance(fault["input"], dict) else fault["input"]


def _printable(text: str) -> str:
    """The text on one line, control characters escaped."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def _locate(loc: tuple[int | str, ...], kind: type[Section]) -> tuple[str, type[BaseModel] | None]:
    """The dotted place of a fault, without the union tags that pydantic adds, and its section's class."""
    section: type[BaseModel] | None = kind
    names: list[str] = []
    kinds: dict[str, type[BaseModel]] = {}
    key_at = 0
    for index, part in enumerate(loc):
        if kinds and index == key_at + 1:  # pydantic's tag: which class stands under the key
            section, kinds = kinds.get(str(part), section), {}
            continue
        if isinstance(part, str) and UNION_TAG.fullmatch(part) and not kinds:
            continue
        names.append(str(part))
        if index < len(loc) - 1 and not kinds:
            kinds, key_at = _kinds(section, str(part)), index + 1
            section = _child_section(section, str(part)) or section
    return ".".join(names), section


def _parent(loc: tuple[int | str, ...], kind: type[Section]) -> tuple[type[BaseModel] | None, str]:
    """The section that holds a mapping of sections with a `kind` each, and the mapping's name there."""
    return _locate(loc[:-1], kind)[1], str(loc[-2])


def _kinds(section: type[BaseModel] | None, key: str) -> dict[str, type[BaseModel]]:
    """The classes by `kind` of a mapping of such sections; empty where `key` is anything else."""
    field = section.model_fields.get(key) if section is not None else None
    if field is None or get_origin(field.annotation) is not dict:
        return {}
    found = [each for each in _classes(get_args(field.annotation)[1]) if "kind" in each.model_fields]
    return {get_args(each.model_fields["kind"].annotation)[0]: each for each in found}


def _child_section(section: type[BaseModel] | None, key: str) -> type[BaseModel] | None:
    """The class of the section that stands under `key`, the first one where there is a choice."""
    field = section.model_fields.get(key) if section is not None else None
    return next(_classes(field.annotation), None) if field is not None else None


def _classes(annotation: Any) -> Iterator[type[BaseModel]]:
    """The sections that an annotation allows, in order."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
        return
    for argument in get_args(annotation):
        yield from _classes(argument)
