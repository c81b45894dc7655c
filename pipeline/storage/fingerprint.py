"""The fingerprint of a run: everything that changes its results, field by field."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from importlib import metadata
from typing import Any

from pipeline.config.sections import Config
from pipeline.errors import RunMismatch
from pipeline.inputs.files import InputFile
from pipeline.quoting import quote

DISTRIBUTION = "cage-align"
# These say where a model runs, or what it takes, not what it computes.
PLACEMENT_KEYS = ("resources", "device", "sizes")
# Places, as patterns, whose keys a user chooses: a principal may be named device.
OPEN_PLACES = (
    "principals",
    "*.terms",
    "*.chat_template_kwargs",
    "*.chat_template_kwargs.*",
    "decoding.soft_threshold",
)
# These change how long a run takes, and nothing that it computes.
PACE_KEYS = ("decoding.draft", "decoding.draft_model")
# Where the caller gives the identity of a model, it replaces these.
IDENTITY_KEYS = ("model", "revision", "adapter", "reference", "reference_adapter")
# Keys that came later, as patterns: at their defaults nothing changes, so a run that began without them goes on.
LATER_KEYS: Mapping[str, Any] = {
    "decoding.target_kl": None,
    "input.candidates": None,
    "decoding.unit": "token",
    "decoding.proposals": 8,
    "decoding.block_tokens": 16,
    "decoding.block_end": "tokens",
    "decoding.proposals_by": "base",
    "decoding.soft_threshold": 1.0,
    "grid.units": [],
    "grid.draw_temperatures": [],
    "input.format": "auto",
    "input.last_assistant": None,
    "input.tools": None,
    "input.keep": [],
    "input.allow_special_tokens": False,
    "base.chat_template_time": None,
    "base.attention": "auto",
    "base.quantization": None,
    "principals.*.quantization": None,
    "principals.*.attention": "auto",
    "base.tensor_parallel": 1,
    "principals.*.tensor_parallel": 1,
    "base.pipeline_parallel": 1,
    "principals.*.pipeline_parallel": 1,
    "principals.*.placement": "auto",
    "principals.*.negative_principle": None,
    "principals.*.adapter": None,
    "principals.*.reference_adapter": None,
    "input.chat_template_kwargs": None,
    "decoding.thinking.markers": "auto",
    "decoding.thinking.steer": True,
    "decoding.thinking.max_tokens": None,
    "decoding.thinking.in_answers": False,
}


def take_fingerprint(
    config: Config, models: Mapping[str, str], versions: Mapping[str, str], files: Sequence[InputFile]
) -> dict[str, Any]:
    """Everything that changes results, as dotted fields with plain values (see `make_plan`)."""
    tree = config.model_dump(mode="json")
    fields: dict[str, Any] = {"code.version": code_version()}
    fields.update({f"versions.{name}": version for name, version in versions.items()})
    fields.update({f"models.{place}": identity for place, identity in models.items()})
    chosen = {key: value for key, value in tree["input"].items() if key not in ("path", "split", "subset")}
    fields.update({f"input.{key}": value for key, value in chosen.items()})
    fields.update(describe_files(files))
    fields["output.rows_per_shard"] = config.output.rows_per_shard
    for section in ("base", "principals", "decoding", "grid"):
        fields.update(_flatten(section, tree[section], models))
    fields["principals"] = list(config.principals)  # their order is the order of columns and of the game
    return without_later_keys(fields)


def describe_files(files: Sequence[InputFile]) -> dict[str, str]:
    """The fields of the input's files."""
    return {f"input.files.{file.name}": f"{file.format} {file.num_rows} rows {file.identity}" for file in files}


def without_later_keys(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A fingerprint without the keys of `LATER_KEYS` that have their defaults: what any version compares."""
    return {key: value for key, value in fields.items() if not _is_later_default(key, value)}


def _is_later_default(key: str, value: Any) -> bool:
    return any(value == default and fnmatchcase(key, pattern) for pattern, default in LATER_KEYS.items())


def _flatten(place: str, value: Any, models: Mapping[str, str]) -> Iterator[tuple[str, Any]]:
    """Dotted fields below `place`, without placement and without what an identity in `models` replaces."""
    if not isinstance(value, dict):
        yield place, value
        return
    for key, child in value.items():
        where = f"{place}.{key}"
        is_replaced = (place in models and key in ("model", "revision")) or (
            where in models and key in IDENTITY_KEYS and not isinstance(child, dict)
        )
        is_placement = key in PLACEMENT_KEYS and not any(fnmatchcase(place, each) for each in OPEN_PLACES)
        if not (is_placement or where in PACE_KEYS or is_replaced):
            yield from _flatten(where, child, models)


def code_version() -> str:
    """Of this package; "not installed" where it runs from its sources."""
    try:
        return metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return "not installed"


def differing_fields(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """The fields in which two fingerprints differ, but for keys that came later and have no effect."""
    if first == second:
        return []
    left, right = without_later_keys(first), without_later_keys(second)
    return sorted(key for key in {*left, *right} if key not in left or key not in right or left[key] != right[key])


def explain_mismatch(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Say field by field how two fingerprints differ, one line each; empty when they do not."""
    lines = []
    for field in sorted({*old, *new}):
        before, after = (quote(side[field]) if field in side else "absent" for side in (old, new))
        if field not in old or field not in new or old[field] != new[field]:
            lines.append(f"{field}: {before} -> {after}")
    return "\n".join(lines)


def refuse_mismatch(path: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Raise RunMismatch unless the fingerprints are the same, but for keys that came later and have no effect."""
    if old == new:
        return
    difference = explain_mismatch(without_later_keys(old), without_later_keys(new))
    if difference:
        raise RunMismatch(
            f"{path} holds a run with other settings (stored -> given):\n{difference}\n"
            "Restore these settings to continue it, choose another output.path, or add --new-run to write beside it."
        )
