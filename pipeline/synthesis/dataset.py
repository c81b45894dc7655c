"""Make a data set from a run's answers: count in a first pass, write in a second, describe last.

`RUN/_dataset/manifest.json` is written last and removed first, so a data set is complete exactly if the manifest
exists. The same run and settings give the same bytes, so an interrupted data set is made again over the files that
exist. Two passes, because the names of the files say how many there are.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

import pyarrow as pa

from pipeline.errors import ConfigurationError, StorageError
from pipeline.storage.commits import sha256
from pipeline.storage.fingerprint import code_version, explain_mismatch
from pipeline.storage.run import Run
from pipeline.stores.store import Store
from pipeline.synthesis.candidates import Candidate, by_prompt, data_files
from pipeline.synthesis.card import render_card
from pipeline.synthesis.files import FOLDER, DataFile, SplitFiles
from pipeline.synthesis.selection import Selection, Selector
from pipeline.synthesis.settings import DataKind, SynthesisConfig
from pipeline.synthesis.statistics import SPLITS, TRAIN, VALIDATION, DatasetStatistics
from pipeline.synthesis.tables import DatasetSchemas, dropped_row, pair_row, sft_row

MANIFEST, CARD = f"{FOLDER}manifest.json", f"{FOLDER}README.md"
DATA_NAME = re.compile(r"((sft|preferences)/(train|validation)|dropped)-\d+-of-\d+\.parquet")
FORMAT = 3  # raise it when the same answers and settings give other files

ReadCandidates = Callable[[str], Iterator[Candidate]]


@dataclass(frozen=True, slots=True)
class JudgeIdentities:
    """The judges behind the scores.

    Args:
        digest: names everything that decides the scores (`Panel.digest`).
        identities: of those judges that are models, by name.
    """

    digest: str
    identities: Mapping[str, str]


NO_JUDGES = JudgeIdentities("", {})


@dataclass(frozen=True, slots=True)
class Dataset:
    """A complete data set.

    Args:
        run: the run that it was made from.
        manifest: what its manifest.json holds.
        was_made: whether it was made now; False where it was there.
    """

    run: Run
    manifest: Mapping[str, Any]
    was_made: bool


def make_dataset(
    run: Run,
    settings: SynthesisConfig,
    read: ReadCandidates,
    *,
    judges: JudgeIdentities = NO_JUDGES,
    progress: Callable[[str], None] = lambda line: None,
) -> Dataset:
    """Make the data set of a complete run, unless it is there. A data set with other settings is replaced.

    Args:
        run: the run.
        settings: which answers to keep, and in which form.
        read: yields the judged answers of one data file, in order; it is called twice for each file.
        judges: what made the scores.
        progress: is called with a line when a data set is made again.

    Raises:
        ConfigurationError: no answer is left.
    """
    source = _source(run, settings, judges)
    standing = read_manifest(run.store)
    if standing is not None:
        difference = explain_mismatch(standing["source"], source)
        wanted = {FOLDER + file["name"] for file in standing["files"]}
        if not difference and wanted <= set(run.store.names(FOLDER)):
            return Dataset(run, standing, was_made=False)
        progress(f"making {run.store.path}/dataset again: " + (difference.replace("\n", "; ") or "files are missing"))
    statistics = DatasetStatistics(settings)
    for selection in _selections(run, settings, read):
        statistics.add(selection)
    _refuse_empty(statistics)
    run.store.remove(MANIFEST)
    digest = _digest(source)
    files = _write_files(run, statistics, _selections(run, settings, read), digest)
    manifest: dict[str, Any] = {
        "digest": digest,
        "source": source,
        "answers_failed_in_the_run": run.status().rows_failed,
        **statistics.to_json(),
        "files": [asdict(file) for file in files],
    }
    _remove_others(run.store, files)
    run.store.put(CARD, render_card(run.plan, statistics, manifest, judge_models=judges.identities))
    data = json.dumps(manifest, ensure_ascii=False, allow_nan=False, indent=1).encode() + b"\n"
    run.store.put(MANIFEST, data)
    return Dataset(run, json.loads(data), was_made=True)


def read_manifest(store: Store) -> dict[str, Any] | None:
    """The manifest of the existing data set; None where there is none or it is not complete."""
    data = store.read(MANIFEST)
    if data is None:
        return None
    try:
        manifest: dict[str, Any] = json.loads(data)
        manifest["source"].items(), [file["name"] for file in manifest["files"]]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise StorageError(f"{store.url(MANIFEST)} is not a manifest; remove it to make the data set again") from None
    return manifest


def _source(run: Run, settings: SynthesisConfig, judges: JudgeIdentities) -> dict[str, Any]:
    """Everything that decides the data set's bytes, as dotted fields: answers, settings, versions."""
    answers = hashlib.sha256()
    for record in run.committed().values():
        for name, digest in sorted(record.sha256_by_file.items()):
            answers.update(f"{name} {digest}\n".encode())
    versions = {"pyarrow": pa.__version__}
    if settings.filters.duplicates.near is not None:
        versions["datasketch"] = metadata.version("datasketch")
    return {
        "run": run.plan.digest,
        "answers": answers.hexdigest(),
        "format": f"{code_version()} {FORMAT}",
        **{f"versions.{name}": version for name, version in versions.items()},
        "judges": judges.digest,
        **settings.fields(),
    }


def _digest(source: Mapping[str, Any]) -> str:
    return sha256(json.dumps(source, sort_keys=True, allow_nan=False).encode())


def _selections(run: Run, settings: SynthesisConfig, read: ReadCandidates) -> Iterator[Selection]:
    selector = Selector(settings)
    for name in data_files(run):
        yield from (selector.select(answers) for answers in by_prompt(read(name)))


def _refuse_empty(statistics: DatasetStatistics) -> None:
    kinds = statistics.settings.write
    if any(statistics.num_rows(kind) for kind in kinds):
        return
    reasons = statistics.dropped[kinds[0]].most_common(5)
    counts = ", ".join(f"{count:,} by {reason}" for reason, count in reasons) or "the run has none"
    raise ConfigurationError(
        f"none of {statistics.num_answers:,} answers is left for the data set: {counts}; relax synthesis.filters or "
        "synthesis.pairs (the answers stay, and the same command then makes the data set of them)"
    )


def _write_files(
    run: Run, statistics: DatasetStatistics, selections: Iterator[Selection], digest: str
) -> list[DataFile]:
    settings, models = statistics.settings, run.plan.models
    metadata = {"cage.dataset": digest, **{f"cage.models.{place}": models[place] for place in models}}
    schemas = DatasetSchemas(run.plan.principal_names, tuple(settings.judges), metadata, has_tools=run.plan.has_tools)
    splits = {
        (kind, split): SplitFiles(
            run.store,
            f"{kind}/{split}",
            schemas.schema(kind),
            num_rows=statistics.rows[kind, split],
            rows_per_file=settings.rows_per_file,
        )
        for kind in settings.write
        for split in SPLITS
    }
    num_dropped = sum(sum(counts.values()) for counts in statistics.dropped.values())
    dropped = SplitFiles(
        run.store, "dropped", schemas.schema(None), num_rows=num_dropped, rows_per_file=settings.rows_per_file
    )
    for selection in selections:
        split = VALIDATION if selection.is_validation else TRAIN
        for answer in selection.sft:
            score = answer.score(settings.score) if settings.is_ranked else None
            splits[DataKind.SFT, split].add(sft_row(answer, score))
        for pair in selection.pairs:
            splits[DataKind.PREFERENCES, split].add(pair_row(pair))
        for each in selection.dropped:
            dropped.add(dropped_row(each))
    return [file for each in (*splits.values(), dropped) for file in each.end()]


def _remove_others(store: Store, files: Sequence[DataFile]) -> None:
    """Remove the data files of an earlier data set; other files stay."""
    kept = {file.name for file in files}
    for name in store.names(FOLDER):
        relative = name.removeprefix(FOLDER)
        if DATA_NAME.fullmatch(relative) and relative not in kept:
            store.remove(name)
