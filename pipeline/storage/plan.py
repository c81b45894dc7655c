"""The plan of a run: its shards and its fingerprint, fixed before anything is decoded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from typing import Any

from pipeline.config.sections import Config, Trace
from pipeline.config.units import Unit
from pipeline.config.variants import Variant, lay_out
from pipeline.errors import ConfigurationError
from pipeline.inputs.files import Format, InputFile
from pipeline.inputs.kept import from_text, to_text
from pipeline.inputs.rows import InputColumns
from pipeline.inputs.source import InputSource, open_input
from pipeline.quoting import quote
from pipeline.records import Row
from pipeline.storage.fingerprint import explain_mismatch, refuse_mismatch, take_fingerprint
from pipeline.stores.addresses import normal_address

__all__ = ["Plan", "Shard", "explain_mismatch", "make_plan", "refuse_mismatch"]

PLAN_VERSION = 2
TEMPLATE_TIME = "chat_templates.time"
REASONING = "reasoning.markers"


@dataclass(frozen=True, slots=True)
class Shard:
    """Rows [start, stop) of one input file: the unit of work and of commit.

    Args:
        index: the shard's number in the plan, from 0; its files are named by it.
        file: the index of the input file.
        start: the first row, counted in the rows of the file that are used.
        stop: the row after the last one.
        offset: the byte at which the first row begins, for JSONL; 0 otherwise.
        line: the number of lines before the first row, for JSONL; 0 otherwise.
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
class Extent:
    """What a plan comprised before it was extended: its first shards, which keep their names and their digest.

    Args:
        num_shards: how many these are.
        num_rows: of the input.
        digest: of the plan's fingerprint at that time.
        repeated_ids: those that several rows had at that time.
    """

    num_shards: int
    num_rows: int
    digest: str
    repeated_ids: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run computes, fixed before it begins. Two plans of one digest answer the same rows in the same way.

    A plan is plain data: it is stored as _plan.json and sent to the processes that compute. One that was extended is
    stored as _plan.1.json, then _plan.2.json and so on, beside the earlier ones.

    Args:
        fingerprint: everything that changes results, as dotted fields with plain values.
        files: the input, file by file.
        shards: every row of the input once, in order.
        principal_names: in the order of the columns and of the game.
        num_samples: answers per row and variant.
        variants: the ways in which each row is answered: one, or those of the grid.
        rows_per_shard: every shard of a file but its last one has so many rows.
        trace: whether the output has a column with the single tokens.
        has_response: whether the input has answers to compare with, for which the output has columns.
        models: the identity of each model by its place in the configuration ("base").
        config: the whole configuration as plain values. Parts of it (cluster, errors, paths) are not in the
            fingerprint, because they do not change results.
        version: of the format of _plan.json.
        kept: the columns of the input that the output has too, as `kept.to_text` writes them.
        earlier: what the plan was before each extension, in order.
        only: ids of the rows that are answered, of those in the shards; None for all.
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
    kept: str | None = None
    earlier: tuple[Extent, ...] = ()
    only: frozenset[str] | None = None

    @property
    def revision(self) -> int:
        """How often the plan was extended."""
        return len(self.earlier)

    @property
    def extent(self) -> Extent:
        """What the plan comprises now."""
        return Extent(len(self.shards), self.num_rows, self.digest, self.files[0].columns.repeated_ids)

    def num_shards_at(self, shard: int) -> int:
        """How many shards the plan had when it got this one."""
        return next((each.num_shards for each in self.earlier if shard < each.num_shards), len(self.shards))

    def extent_of(self, shard: int) -> Extent:
        """What the plan comprised when it got the shard."""
        return next((each for each in self.earlier if shard < each.num_shards), self.extent)

    @property
    def num_rows(self) -> int:
        """Input rows, over all files."""
        return sum(file.num_rows for file in self.files) if self.only is None else len(self.only)

    @property
    def has_variants(self) -> bool:
        """Whether the run was given a grid, so that its files name each answer's variant."""
        return any(self.config["grid"].values())

    @property
    def has_units(self) -> bool:
        """Whether the grid has several units, so that its files name each answer's."""
        return bool(self.config["grid"].get("units"))

    @property
    def has_temperatures(self) -> bool:
        """Whether the grid has temperatures of the draw, so that its files name each answer's."""
        return bool(self.config["grid"].get("draw_temperatures"))

    @property
    def has_proposals(self) -> bool:
        """Whether games are over blocks or answers, for which the output has a column."""
        return any(variant.unit is not Unit.TOKEN for variant in self.variants)

    @property
    def has_tools(self) -> bool:
        """Whether rows may have tools or calls of them, for which the output has columns."""
        return self.files[0].columns.has_tools

    @property
    def num_answers(self) -> int:
        """Records of the whole run: one per row, variant and sample."""
        return self.num_rows * len(self.variants) * self.num_samples

    @property
    def template_time(self) -> datetime | None:
        """The time that chat templates are given in every prompt of the run; None where none asks for it."""
        stated = self.fingerprint.get(TEMPLATE_TIME)
        return None if stated is None else datetime.fromisoformat(stated)

    def with_template_time(self, time: datetime | None) -> Plan:
        """The same plan with another time in chat templates."""
        if time == self.template_time:
            return self
        fields = {name: value for name, value in self.fingerprint.items() if name != TEMPLATE_TIME}
        return replace(self, fingerprint=fields if time is None else {**fields, TEMPLATE_TIME: time.isoformat()})

    def moved_to(self, other: Plan) -> Plan:
        """This plan with what `other`, which computes the same, says of places: paths, cluster, limits of errors."""
        path_by_name = {file.name: file.path for file in other.files}
        files = tuple(replace(file, path=path_by_name[file.name]) for file in self.files)
        return replace(self, files=files, models=other.models, config=other.config)

    @property
    def reasoning(self) -> str | None:
        """The markers of the base's reasoning, for which the output has columns; None where it does not reason."""
        return self.fingerprint.get(REASONING)

    @property
    def reasons_in_answers(self) -> bool:
        """Whether answers contain the reasoning, so that their numbers count it."""
        return bool(self.config["decoding"].get("thinking", {}).get("in_answers", False))

    def as_begun(self, stored: Plan) -> Plan:
        """The same plan with what a run that has begun found out then: its time, and how its base reasons."""
        return self.with_template_time(stored.template_time).with_reasoning(stored.reasoning)

    def with_reasoning(self, markers: str | None) -> Plan:
        """The same plan for a base that marks its reasoning so."""
        if markers == self.reasoning:
            return self
        fields = {name: value for name, value in self.fingerprint.items() if name != REASONING}
        return replace(self, fingerprint=fields if markers is None else {**fields, REASONING: markers})

    @property
    def digest(self) -> str:
        """Hexadecimal SHA-256 of the fingerprint."""
        text = json.dumps(self.fingerprint, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def open_input(self) -> InputSource:
        """The planned input, without looking at it again."""
        return InputSource(self.files, self.principal_names, kept=from_text(self.kept))

    def read_shard(self, shard: Shard | int) -> Iterator[Row]:
        """Yield the rows of one shard, given itself or by its index, in input order.

        Raises:
            ConfigurationError: the input is gone, damaged or shorter than when the run was planned.
        """
        shard = self.shards[shard] if isinstance(shard, int) else shard
        source = self.open_input()
        if self.earlier:  # a row that came later must not make an earlier one fail
            source = source.reading(repeated_ids=self.extent_of(shard.index).repeated_ids)
        rows = source.read_rows(shard.file, shard.start, shard.stop)
        return rows if self.only is None else (row for row in rows if row.row_id in self.only)

    def read_kept(self, shard: Shard) -> Iterator[dict[str, Any]]:
        """Yield the values of the kept columns of one shard, in the order of `read_shard`; empty without any."""
        kept = self.open_input().read_kept(shard.file, shard.start, shard.stop)
        if self.only is None:
            return kept
        rows = self.open_input().read_rows(shard.file, shard.start, shard.stop)
        return (each for row, each in zip(rows, kept, strict=True) if row.row_id in self.only)

    def to_json(self) -> bytes:
        """The plan as stored in _plan.json."""
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
            "kept": self.kept,
            "earlier": [[e.num_shards, e.num_rows, e.digest, sorted(e.repeated_ids)] for e in self.earlier],
            "only": None if self.only is None else sorted(self.only),
            "files": [_file_to_json(file) for file in self.files],
            "shard_fields": ["file", "start", "stop", "offset", "line"],
            "shards": [[s.file, s.start, s.stop, s.offset, s.line] for s in self.shards],
        }
        return json.dumps(tree, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode() + b"\n"

    @classmethod
    def from_json(cls, data: bytes, *, source: str = "_plan.json") -> Plan:
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
        marks: dict[int, list[tuple[int, int, int]]] = {}
        for shard in shards:
            marks.setdefault(shard.file, []).append((shard.start, shard.offset, shard.line))
        return cls(
            fingerprint=tree["fingerprint"],
            files=tuple(_file_from_json(each, marks.get(index, [])) for index, each in enumerate(tree["files"])),
            shards=shards,
            principal_names=tuple(tree["principal_names"]),
            num_samples=tree["num_samples"],
            variants=tuple(
                Variant.from_json(each, unit=tree["config"]["decoding"].get("unit", Unit.TOKEN))
                for each in tree["variants"]
            ),
            rows_per_shard=tree["rows_per_shard"],
            trace=Trace(tree["trace"]),
            has_response=tree["has_response"],
            models=tree["models"],
            config=tree["config"],
            kept=tree.get("kept"),
            only=None if tree.get("only") is None else frozenset(tree["only"]),
            earlier=tuple(
                Extent(shards, rows, digest, frozenset(ids)) for shards, rows, digest, ids in tree.get("earlier", ())
            ),
        )


def open_planned_input(config: Config) -> InputSource:
    """Read a run's input once, as far as counting, hashing and ids need.

    Raises:
        ConfigurationError: the input cannot be used, or the run directory is the input folder.
    """
    if normal_address(config.output.path) == normal_address(config.input.path):
        raise ConfigurationError("output.path and input.path must differ")
    return open_input(config.input, tuple(config.principals), stride=config.output.rows_per_shard)


def make_plan(
    config: Config,
    models: Mapping[str, str] | None = None,
    *,
    versions: Mapping[str, str] | None = None,
    source: InputSource | None = None,
) -> Plan:
    """Fix shards and fingerprint.

    Args:
        config: of the run.
        models: identity by place: "base", "principals.kind.model", "principals.kind.adapter",
            "principals.kind.reference". In the fingerprint an identity replaces the configured name and revision,
            so that a model folder that was moved is still the same model. It should include whatever else changes
            numbers, such as the dtype that "auto" became.
        versions: versions of libraries that must not change within the run, by name ("torch").
        source: the input as `open_planned_input` gives it; None: it is opened here.

    Raises:
        ConfigurationError: the input cannot be used, or the run directory is the input folder.
    """
    models = dict(models or {})
    source = open_planned_input(config) if source is None else source
    return Plan(
        fingerprint=take_fingerprint(config, models, dict(versions or {}), source.files),
        files=source.files,
        shards=tuple(cut(source.files, config.output.rows_per_shard)),
        principal_names=tuple(config.principals),
        num_samples=config.decoding.n,
        variants=lay_out(config),
        rows_per_shard=config.output.rows_per_shard,
        trace=config.decoding.trace,
        has_response=source.columns.has_response,
        models=models,
        config=config.model_dump(mode="json"),
        kept=to_text(source.kept),
    )


def cut(files: Sequence[InputFile], rows_per_shard: int) -> Iterator[Shard]:
    """Cut all files into shards, in order."""
    index = 0
    for number in range(len(files)):
        for shard in cut_file(files, number, 0, rows_per_shard, index=index):
            yield shard
            index += 1


def cut_file(
    files: Sequence[InputFile], number: int, first_row: int, rows_per_shard: int, *, index: int
) -> Iterator[Shard]:
    """Cut the rows of one file from `first_row` on into shards, which are numbered from `index`."""
    file = files[number]
    place_by_row = {row: (offset, line) for row, offset, line in file.marks}
    for start in range(first_row, file.num_rows, rows_per_shard):
        offset, line = place_by_row[start] if file.marks else (0, 0)
        yield Shard(index, number, start, min(start + rows_per_shard, file.num_rows), offset, line)
        index += 1


def _file_to_json(file: InputFile) -> dict[str, Any]:
    tree = asdict(file)
    del tree["marks"]
    if not file.kept:
        del tree["kept"]
    tree["columns"]["repeated_ids"] = sorted(file.columns.repeated_ids)
    return tree


def _file_from_json(tree: Mapping[str, Any], marks: list[tuple[int, int, int]]) -> InputFile:
    format_ = Format(tree["format"])
    return InputFile(
        path=tree["path"],
        name=tree["name"],
        format=format_,
        columns=InputColumns(**tree["columns"]),
        num_rows=tree["num_rows"],
        identity=tree["identity"],
        marks=tuple(marks) if format_.is_text else (),
        subset=tree["subset"],
        split=tree["split"],
        layers=tuple(tree.get("layers", ())),
        header=tuple(tree.get("header", ())),
        kept=tuple(tree.get("kept", ())),
    )
