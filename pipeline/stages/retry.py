"""Rows of a run that are run again: those that failed, or those of a mended input.

They are decoded as a run of their own in `RUN/_retries/`. When that is finished, its rows take the place of those
before in new revisions of the shards that have them. With settings that change results they stay a run of their own,
beside RUN.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
from pydantic import BaseModel

from pipeline.config.files import parse_config
from pipeline.config.sections import Config, ErrorsConfig
from pipeline.errors import ConfigurationError
from pipeline.inputs.files import Format
from pipeline.inputs.source import is_unchanged, open_input
from pipeline.runtime.replica_plan import plan_replica
from pipeline.runtime.wiring import DIRECT, Wiring
from pipeline.stages.relabel import MAX_BESIDE, Prepared, bounded, open_run, prepare, work
from pipeline.storage.commits import CommitRecord, count_tokens
from pipeline.storage.extension import adopt, fit_source
from pipeline.storage.failed_rows import CONVERSATION, ID, RESPONSE, TOOLS, WEIGHTS, read_stored, write_failed_rows
from pipeline.storage.fingerprint import differing_fields
from pipeline.storage.names import RETRIES, is_of_failed_rows
from pipeline.storage.plan import Plan, cut
from pipeline.storage.reruns import Choice, choose_failed, choose_mended, plan_of
from pipeline.storage.revisions import Rerun
from pipeline.storage.run import Run

UNLIMITED = {"budget": "100%", "stop_when_all_fail": None}  # rows that fail again were counted when they failed first


@dataclass(frozen=True, slots=True)
class Retry:
    """What is run again, and how.

    Args:
        path: of the run.
        overrides: of its settings.
        only: ids of rows; empty for all that failed, or that the mended input has.
        mended: the address of a mended input; None tries failed rows again as they are.
    """

    path: str
    overrides: Sequence[str] = ()
    only: Collection[str] = ()
    mended: str | None = None


def retry(
    asked: Retry, cache_folder: Path, out: TextIO, *, is_verbose: bool = False, wiring: Wiring = DIRECT
) -> tuple[Run, bool]:
    """Run rows of a run again; the run that has them then, and whether there was anything to do.

    Raises:
        ConfigurationError: there is no such row, or the mended input does not fit the run. Nothing was decoded.
        CageError: decoding failed; the same command goes on.
    """

    def say(line: str) -> None:
        print(line, file=out, flush=True)

    run = Run.open(asked.path, open_store=wiring.open_store)
    _finish(run, run.committed(), say)  # where a command was killed after it had replaced rows
    committed = run.committed()
    choice, config = _choose(run, _config(run, asked), asked, wiring)
    for note in choice.notes:
        say(note)
    if not choice.ids:
        say(f"no row of {asked.mended} failed in the run or differs from what it has answered")
        return _with_mended_input(run, choice, asked, say), False
    prepared = prepare(config, cache_folder, say, source=choice.source)
    prepared = replace(prepared, plan=_plan(run, prepared.plan, choice))
    command = _Command(config, cache_folder, out, is_verbose, wiring)
    changed = differing_fields(_settings(run.plan), _settings(prepared.plan))
    if changed and asked.mended is not None:
        raise ConfigurationError(
            f"a mended input is answered with the settings of {asked.path}, which would differ in "
            f"{', '.join(changed)}; leave out these overrides, or answer it in a new run with cage relabel"
        )
    if changed:
        say(f"the rows become a run of their own, because settings differ: {', '.join(changed)}")
        return command.decode(run, prepared, _beside(run, asked.only)), True
    again = command.decode(run, prepared, [f"{run.store.path}/{RETRIES}{_key(run, choice)}"])
    is_accepted = run.is_complete
    with bounded(config, f"the new revisions in {run.store.path}"):
        run.reopen()
        for shard, rerun in _reruns(again, choice):
            run.revise(committed[shard], rerun)
    num_rows = sum(len(ids) for ids in choice.new_id_by_old.values())
    say(f"{num_rows:,} rows were run again, in new revisions of {len(choice.new_id_by_old):,} shards")
    _finish(run, run.committed(), say, is_accepted=is_accepted)
    return _with_mended_input(run, choice, asked, say), True


def _finish(
    run: Run, records: Mapping[int, CommitRecord], say: Callable[[str], None], *, is_accepted: bool = False
) -> None:
    """Finish a run that has all its shards, unless more rows failed than it allows; `is_accepted`: however many."""
    if run.pending() or run.is_complete:
        return  # the command that began it goes on, or nothing is to do
    num_failed = sum(record.failed for record in records.values())
    allowed = ErrorsConfig(**run.plan.config["errors"]).allowed(run.plan.num_answers)
    if num_failed <= allowed or is_accepted:
        run.finish()
        return
    say(
        f"{num_failed:,} answers have failed and errors.budget allows {allowed:,}: mend more of them, or go on "
        f"without them by the command that began the run, with errors.budget={num_failed} or more"
    )


def _with_mended_input(run: Run, choice: Choice, asked: Retry, say: Callable[[str], None]) -> Run:
    """The run with its own input as it is mended: what the run has answered, for the command that began it."""
    plan = adopt(run.plan, choice.source) if asked.mended is not None and not asked.only else run.plan
    if plan == run.plan:
        return run
    is_accepted = run.is_complete
    run = run.extend(plan)
    _finish(run, run.committed(), say, is_accepted=is_accepted)
    return run


def _config(run: Run, asked: Retry) -> Config:
    """The settings of the run, with overrides."""
    tree: dict[str, Any] = json.loads(json.dumps({name: run.plan.config[name] for name in Config.model_fields}))
    for name, given in tree.items():  # a default that is written out may be refused as one without effect
        default = Config.model_fields[name].default
        if isinstance(default, BaseModel):
            usual = default.model_dump(mode="json")
            tree[name] = {key: value for key, value in given.items() if key not in usual or value != usual[key]}
    tree["errors"] |= UNLIMITED
    if asked.mended is not None:
        tree["input"] |= {"path": asked.mended, "limit": None}
    return parse_config(tree, list(asked.overrides), source=f"the settings of {asked.path}")


def _choose(run: Run, config: Config, asked: Retry, wiring: Wiring) -> tuple[Choice, Config]:
    """The rows, and the settings by which their input is read."""
    if asked.mended is not None:
        source = open_input(config.input, run.plan.principal_names, stride=run.plan.rows_per_shard)
        source = replace(fit_source(asked.path, run.plan, source), kept=run.plan.open_input().kept)
        return choose_mended(run, source, tuple(cut(source.files, run.plan.rows_per_shard)), asked.only), config
    choice = choose_failed(run, asked.only)
    files = {shard.file for shard in choice.shards}
    if all(is_unchanged(choice.source.files[file]) for file in files):
        return choice, config
    return _choose_stored(run, config, choice, wiring)


def _choose_stored(run: Run, config: Config, choice: Choice, wiring: Wiring) -> tuple[Choice, Config]:
    """The same rows as the run has stored them, because its input is gone or has changed.

    Raises:
        ConfigurationError: the rows have parameters of their own, which only the input has.
    """
    names = ", ".join(file.name for file in run.plan.files[:3])
    if any(
        file.format is Format.BATCH or file.columns.template_kwargs is not None or file.columns.candidates is not None
        for file in run.plan.files
    ):
        raise ConfigurationError(
            f"{names}: the input is gone or has changed, and only it has the parameters of the rows; restore it, or "
            "name the mended one with --input"
        )
    store = wiring.open_store(f"{run.store.path}/{RETRIES}{_key(run, choice)}")
    kept = run.plan.open_input().kept
    columns = {
        "path": write_failed_rows(run, choice.ids, store),
        "prompt": None,
        "messages": CONVERSATION,
        "id": ID,
        "format": "auto",
        "weights": WEIGHTS if run.plan.principal_names and not run.plan.config["grid"]["weights"] else None,
        "response": RESPONSE if run.plan.has_response else None,
        "chat_template_kwargs": None,
        "tools": TOOLS if run.plan.has_tools else None,
        "keep": () if kept is None else tuple(kept.names),
        "limit": None,
    }
    config = config.model_copy(update={"input": config.input.model_copy(update=columns)})
    source = open_input(config.input, run.plan.principal_names, stride=run.plan.rows_per_shard)
    first = run.plan.files[0].columns
    source = source.reading(
        has_response=first.has_response, has_tools=first.has_tools, last_assistant=first.last_assistant
    )
    note = f"{names}: the input is gone or has changed, so the rows are run again as the run has stored them"
    shards = tuple(cut(source.files, run.plan.rows_per_shard))
    return replace(choice, source=source, shards=shards, notes=(note,)), config


def _beside(run: Run, only: Collection[str]) -> list[str]:
    """Where a run of these rows may be."""
    suffix = f"-{_digest(sorted(only))[:8]}" if only else ""
    first = f"{run.store.path.rstrip('/')}-retry{suffix}"
    return [first, *(f"{first}-{number}" for number in range(2, MAX_BESIDE + 1))]


def _settings(plan: Plan) -> dict[str, Any]:
    return {key: value for key, value in plan.fingerprint.items() if not key.startswith(("input.", "retry."))}


def _plan(run: Run, fresh: Plan, choice: Choice) -> Plan:
    """The plan of the chosen rows, with the columns of the run."""
    fresh = fresh.as_begun(run.plan)
    fields = {**fresh.fingerprint, "retry.rows": _digest(sorted(choice.ids))}
    stored = run.plan
    fresh = replace(fresh, fingerprint=fields, kept=stored.kept, has_response=stored.has_response)
    return plan_of(choice, fresh)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _key(run: Run, choice: Choice) -> str:
    """Names a retry: the same rows of the same revisions."""
    revisions = run.revisions()
    rows = [(shard, revisions[shard], sorted(ids.items())) for shard, ids in sorted(choice.new_id_by_old.items())]
    return _digest([rows, [file.identity for file in choice.source.files]])[:16]


@dataclass(frozen=True, slots=True)
class _Command:
    """How rows are decoded by this command."""

    config: Config
    cache_folder: Path
    out: TextIO
    is_verbose: bool
    wiring: Wiring

    def decode(self, run: Run, prepared: Prepared, places: Sequence[str]) -> Run:
        """Decode the planned rows as a run at the first place that is free or its own."""
        replica = plan_replica(self.config, prepared.models, self.cache_folder, now=run.plan.template_time)
        markers = None if replica.reasoning is None else replica.reasoning.describe()
        plan = prepared.plan.with_template_time(replica.template_time).with_reasoning(markers)
        with bounded(self.config, f"the run in {places[0]}"):
            again = open_run(plan, places, self.wiring, may_create=True)
            assert again is not None
            is_complete = again.is_complete
        if not is_complete:
            work(
                self.config,
                again,
                replica,
                self.out,
                is_first=not again.committed(),
                is_verbose=self.is_verbose,
                wiring=self.wiring,
            )
            with bounded(self.config, f"the end of the run in {again.store.path}"):
                again.finish()
        return again


def _reruns(again: Run, choice: Choice) -> list[tuple[int, Rerun]]:
    """The rows that were run again, by the shard of the run that has them."""
    answers: list[pa.Table] = []
    failed: list[pa.Table] = []
    records = again.committed().values()
    for record in records:
        for name in record.sha256_by_file:
            (failed if is_of_failed_rows(name) else answers).append(read_stored(again.store, name))
    seconds = sum(record.seconds for record in records) / max(1, len(choice.new_id_by_old))
    of_proposals = sum(record.accepted for record in records)
    num_counted = of_proposals + sum(record.passes for record in records)  # 0 where passes are not counted
    reruns: list[tuple[int, Rerun]] = []
    before = 0
    for shard, ids in sorted(choice.new_id_by_old.items()):
        of_shard = _rows_of(answers, ids.values())
        rerun = Rerun(of_shard, _rows_of(failed, ids.values()), ids, seconds)
        if num_counted and of_shard is not None:  # a share by tokens; all together have the retry's
            after = before + count_tokens(of_shard)
            accepted = of_proposals * after // num_counted - of_proposals * before // num_counted
            rerun = replace(rerun, passes=after - before - accepted, accepted=accepted)
            before = after
        reruns.append((shard, rerun))
    return reruns


def _rows_of(tables: Sequence[pa.Table], ids: Collection[str]) -> pa.Table | None:
    """The rows with these ids."""
    wanted = set(ids)
    pieces = []
    for table in tables:
        places = [at for at, row_id in enumerate(table.column("row_id").to_pylist()) if row_id in wanted]
        pieces += [table.take(pa.array(places, pa.int64()))] if places else []
    return pa.concat_tables(pieces) if pieces else None
