"""The plan of a run: its shards and its fingerprint, fixed before anything is decoded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.config.sections import Config, Trace
from pipeline.config.variants import Variant, lay_out
from pipeline.errors import ConfigurationError
from pipeline.records import Row
from pipeline.storage.fingerprint import explain_mismatch, refuse_mismatch, take_fingerprint
from pipeline.storage.input_files import Format, InputFile
from pipeline.storage.inputs import InputSource, open_input
from pipeline.storage.quoting import quote
from pipeline.storage.rows import InputColumns
from pipeline.storage.stores import open_store

__all__ = ["Plan", "Shard", "explain_mismatch", "make_plan", "refuse_mismatch"]

PLAN_VERSION = 2


@dataclass(frozen=True, slots=True)
class Shard:
    """Rows [start, stop) of one input file: the unit of work and of commit.

    `offset` is the byte and `line` the number of lines before the first row, for JSONL; both 0 otherwise.
    """

    index: int
    file: int
    start: int
    stop: int
    offset: int = 0
    line: int = 0

    @property
    def num_rows(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run is. Two plans with the same digest give the same output files.

    `fingerprint` maps dotted fields to plain values; `models` maps places ("base") to identities; `config` is the
    whole configuration as plain values, of which parts (cluster, errors, paths) are not in the fingerprint.
    """

    fingerprint: Mapping[str, Any]
    files: tuple[InputFile, ...]
    shards: tuple[Shard, ...]
    principal_names: tuple[str, ...]
    num_samples: int
    variants: tuple[Variant, ...]
    rows_per_shard: int
    trace: Trace
    has_response: bool
    models: Mapping[str, str]
    config: Mapping[str, Any]
    version: int = PLAN_VERSION

    @property
    def num_rows(self) -> int:
        return sum(file.num_rows for file in self.files)

    @property
    def has_variants(self) -> bool:
        """Whether the run was given a grid, so that its files name each answer's variant."""
        return any(self.config["grid"].values())

    @property
    def num_answers(self) -> int:
        return self.num_rows * len(self.variants) * self.num_samples

    @property
    def digest(self) -> str:
        """Hexadecimal SHA-256 of the fingerprint."""
        text = json.dumps(self.fingerprint, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def open_input(self) -> InputSource:
        """The planned input, without looking at it again."""
        return InputSource(self.files, self.rows_per_shard, self.principal_names)

    def read_shard(self, shard: Shard | int) -> Iterator[Row]:
        """Yield the rows of one shard in input order."""
        shard = self.shards[shard] if isinstance(shard, int) else shard
        return self.open_input().read_rows(shard.file, shard.start, shard.stop)

    def to_json(self) -> bytes:
        """The plan as stored in plan.json."""
        tree = {
            "version": self.version,
            "digest": self.digest,
            "fingerprint": dict(self.fingerprint),
            "num_rows": self.num_rows,
            "principal_names": self.principal_names,
            "num_samples": self.num_samples,
            "variants": [variant.to_json() for variant in self.variants],
            "rows_per_shard": self.rows_per_shard,
            "trace": self.trace,
            "has_response": self.has_response,
            "models": dict(self.models),
            "config": dict(self.config),
            "files": [_file_to_json(file) for file in self.files],
            "shard_fields": ["file", "start", "stop", "offset", "line"],
            "shards": [[s.file, s.start, s.stop, s.offset, s.line] for s in self.shards],
        }
        return json.dumps(tree, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode() + b"\n"

    @classmethod
    def from_json(cls, data: bytes, *, source: str = "plan.json") -> Plan:
        """Read a stored plan.

        Raises:
            ConfigurationError: it is not a plan, is of another version, or its digest does not fit.
        """
        try:
            tree = json.loads(data)
            if tree["version"] != PLAN_VERSION:
                raise ConfigurationError(
                    f"{source} has version {quote(tree['version'])}; this program reads version {PLAN_VERSION}"
                )
            plan = cls._from_tree(tree)
        except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
            raise ConfigurationError(f"{source} is not a plan of this program: {quote(str(error))}") from None
        if plan.digest != tree["digest"]:
            raise ConfigurationError(f"{source} is damaged: its digest does not fit its fingerprint")
        return plan

    @classmethod
    def _from_tree(cls, tree: Mapping[str, Any]) -> Plan:
        shards = tuple(Shard(index, *fields) for index, fields in enumerate(tree["shards"]))
        marks: dict[int, list[tuple[int, int]]] = {}
        for shard in shards:
            marks.setdefault(shard.file, []).append((shard.offset, shard.line))
        return cls(
            fingerprint=tree["fingerprint"],
            files=tuple(_file_from_json(each, marks[index]) for index, each in enumerate(tree["files"])),
            shards=shards,
            principal_names=tuple(tree["principal_names"]),
            num_samples=tree["num_samples"],
            variants=tuple(Variant.from_json(each) for each in tree["variants"]),
            rows_per_shard=tree["rows_per_shard"],
            trace=Trace(tree["trace"]),
            has_response=tree["has_response"],
            models=tree["models"],
            config=tree["config"],
        )


def make_plan(
    config: Config, models: Mapping[str, str] | None = None, *, versions: Mapping[str, str] | None = None
) -> Plan:
    """Read the input's metadata once and fix shards and fingerprint.

    Args:
        config: the run.
        models: identity by place: "base", "principals.kind.model", "principals.kind.adapter",
            "principals.kind.reference". An identity stands in the fingerprint for the configured name and revision,
            so that a moved model folder is the same model; include whatever else decides numbers (resolved dtype).
        versions: further versions to hold a run to, by name ("torch").

    Raises:
        ConfigurationError: the input cannot be used, or the run directory is the input folder.
    """
    models = dict(models or {})
    if open_store_path(config.output.path) == open_store_path(config.input.path):
        raise ConfigurationError("output.path and input.path must differ")
    source = open_input(config.input, tuple(config.principals), stride=config.output.rows_per_shard)
    return Plan(
        fingerprint=take_fingerprint(config, models, dict(versions or {}), source.files),
        files=source.files,
        shards=tuple(_cut(source.files, config.output.rows_per_shard)),
        principal_names=tuple(config.principals),
        num_samples=config.decoding.n,
        variants=lay_out(config),
        rows_per_shard=config.output.rows_per_shard,
        trace=config.decoding.trace,
        has_response=config.input.response is not None,
        models=models,
        config=config.model_dump(mode="json"),
    )


def open_store_path(path: str) -> str:
    """The normal form of a directory's address. Raises ConfigurationError for an unknown scheme."""
    try:
        return open_store(path).path
    except ConfigurationError as error:
        if "is a file" in str(error):
            return path
        raise


def _cut(files: Sequence[InputFile], rows_per_shard: int) -> Iterator[Shard]:
    index = 0
    for number, file in enumerate(files):
        for position, start in enumerate(range(0, file.num_rows, rows_per_shard)):
            offset, line = file.marks[position] if file.marks else (0, 0)
            yield Shard(index, number, start, min(start + rows_per_shard, file.num_rows), offset, line)
            index += 1


def _file_to_json(file: InputFile) -> dict[str, Any]:
    tree = asdict(file)
    del tree["marks"]
    return tree


def _file_from_json(tree: Mapping[str, Any], marks: list[tuple[int, int]]) -> InputFile:
    format_ = Format(tree["format"])
    has_marks = format_ in (Format.JSONL, Format.BATCH)
    return InputFile(
        path=tree["path"],
        name=tree["name"],
        format=format_,
        columns=InputColumns(**tree["columns"]),
        num_rows=tree["num_rows"],
        identity=tree["identity"],
        marks=tuple(marks) if has_marks else (),
        subset=tree["subset"],
        split=tree["split"],
    )
