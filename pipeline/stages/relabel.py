"""The main job: prompts in, aligned answers out, resumable at every shard."""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TextIO

from pipeline.config.sections import Config, Reproducibility, Transport
from pipeline.errors import CageError, ConfigurationError, RunMismatch, StorageError
from pipeline.garbage import collection_paused
from pipeline.inputs.notes import describe_columns, describe_input
from pipeline.inputs.source import InputSource
from pipeline.monitoring.counts import Counts
from pipeline.monitoring.events import Notice, reason_without_values
from pipeline.monitoring.progress import Notices, ProgressLine
from pipeline.monitoring.reasons import Example
from pipeline.monitoring.stall import ended_when_stalled
from pipeline.monitoring.values import SilenceWatch
from pipeline.monitoring.waits import waiting_for, waits
from pipeline.quoting import one_line
from pipeline.runtime.replica_plan import ReplicaPlan, ResolvedModels, plan_replica, resolve_models
from pipeline.runtime.wiring import DIRECT, Wiring
from pipeline.stages.failures import FailureLimit
from pipeline.storage.extension import describe_extension, extend_plan, is_extension
from pipeline.storage.fingerprint import differing_fields
from pipeline.storage.plan import Plan, make_plan, open_planned_input, refuse_mismatch
from pipeline.storage.plan_files import has_plan
from pipeline.storage.run import Run

if TYPE_CHECKING:  # imports torch: seconds
    from pipeline.engine.shards import ShardOutcome
    from pipeline.evaluation.text_principals import JudgePrincipals

MAX_BESIDE = 100
SHOWN_FAILURES = 3  # kinds of reasons that are shown as soon as they occur
LONGEST_NOTICE = 300


class Stream(Protocol):
    """Something that decodes and commits shards."""

    def counts(self) -> Counts: ...

    def waits(self) -> Sequence[str]: ...

    def error(self) -> CageError | None: ...

    def decode(self, shards: Sequence[int]) -> Generator[ShardOutcome, None, None]: ...


class _Feed:
    """What the progress line shows: counts and waits of a stream, and before there is one of this process."""

    def __init__(self) -> None:
        self._stream: Stream | None = None
        self._last = Counts()
        self._is_over = False

    def counts(self) -> Counts:
        if (stream := self._stream) is not None:
            self._last = stream.counts()
        return self._last

    def waits(self) -> Sequence[str]:
        if (stream := self._stream) is not None:
            return stream.waits()
        return ["stopping"] if self._is_over else waits()

    @contextmanager
    def following(self, stream: Stream) -> Iterator[None]:
        """Show a stream for the block, and its last counts afterwards."""
        self._stream = stream
        try:
            yield
        finally:
            self.counts()
            self._stream, self._is_over = None, True


@dataclass(frozen=True, slots=True)
class Prepared:
    """A run before it starts: input read, models found, shards fixed; nothing loaded or written.

    `notes` say what of the input was recognised and what has no effect, `columns` which ones are read and for what.
    """

    models: ResolvedModels
    plan: Plan
    notes: tuple[str, ...] = ()
    columns: str = ""


def prepare(
    config: Config,
    cache_folder: Path,
    progress: Callable[[str], None] = lambda line: None,
    *,
    source: InputSource | None = None,
) -> Prepared:
    """Read the input's metadata, find the models and plan the shards.

    The input comes first: models may have to be fetched. It is opened here unless `source` is given.

    Raises:
        ConfigurationError: the input, a model or the output cannot be used.
    """
    source = source or open_planned_input(config)
    notes = describe_input(source, config)
    scorers = _scorers(config, cache_folder, progress)
    models = resolve_models(config, cache_folder, progress=progress)
    identities = {**models.identities, **({} if scorers is None else scorers.identities())}
    versions = {}
    if config.decoding.reproducibility is Reproducibility.STRICT:
        packages = {package for source in models.models.values() for package in source.packages}
        versions = {name: metadata.version(name) for name in ("torch", "transformers", *sorted(packages))}
    plan = make_plan(config, identities, versions=versions, source=source)
    return Prepared(models, plan, notes, describe_columns(source))


def relabel(
    config: Config,
    cache_folder: Path,
    out: TextIO,
    *,
    is_verbose: bool = False,
    may_begin_beside: bool = False,
    may_extend: bool = False,
    wiring: Wiring = DIRECT,
) -> tuple[Run, bool]:
    """Start or continue a run and bring it to its end; the run, and whether there was anything to do.

    Where `output.path` holds a run of other settings, this one `may_begin_beside` it, in PATH-2, PATH-3 and so on.
    Where it holds one whose input has grown, this one `may_extend` it by the new rows; a larger `input.limit` does.
    `wiring` says how stores are opened and hosts are started, in whichever process does so.

    Raises:
        RunMismatch: `output.path` holds a run of other settings.
        ConfigurationError: nothing was decoded.
        ErrorBudgetExceeded: more rows failed than `errors.budget` allows, or all for one reason.
        CageError: a shard failed for good; everything committed is kept.
    """
    prepared = prepare(config, cache_folder, lambda line: print(line, file=out, flush=True))
    places = _places(config.output.path, may_begin_beside=may_begin_beside)
    with bounded(config, f"the run in {config.output.path}"):
        existing = open_run(prepared.plan, places, wiring, may_create=False, may_extend=may_extend)
        extended = None if existing is None else _extended(existing, prepared.plan, config)
        if existing is not None and extended is None and existing.is_complete:
            return existing, False
    for note in prepared.notes:
        print(note, file=out, flush=True)
    # refuses what cannot work before a run is created
    begun = None if existing is None else existing.plan.template_time
    replica = plan_replica(config, prepared.models, cache_folder, now=begun)
    for line in replica.foreign_adapters:
        print(f"warning   {line}", file=out, flush=True)
    markers = None if replica.reasoning is None else replica.reasoning.describe()
    plan = prepared.plan.with_template_time(replica.template_time).with_reasoning(markers)
    if existing is not None:
        begun_with = existing.plan.fingerprint
        refuse_mismatch(existing.store.path, begun_with, existing.plan.with_reasoning(markers).fingerprint)
    with bounded(config, f"the plan of the run in {config.output.path}"):
        run = existing or open_run(plan, places, wiring, may_create=True)
        assert run is not None
        if extended is not None:
            run = run.extend(extended)
            print(describe_extension(run.plan), file=out, flush=True)
        run.begin()
    if run.plan.template_time != replica.template_time:  # another driver was faster
        replica = plan_replica(config, prepared.models, cache_folder, now=run.plan.template_time)
    work(config, run, replica, out, is_first=existing is None, is_verbose=is_verbose, wiring=wiring)
    with bounded(config, f"the end of the run in {run.store.path}"):
        run.finish()
        if run.is_superseded:
            print("another command has extended the run meanwhile, and goes on with it", file=out, flush=True)
    return run, True


@contextmanager
def bounded(config: Config, what: str) -> Iterator[None]:
    """End the command where its store does not answer: the block, in which it waits for `what`, may not take long.

    Raises:
        RunStalled: it took longer than `cluster.stall_timeout_s`.
    """
    with waiting_for(what), ended_when_stalled(config.cluster.stall_timeout_s, lambda: None, waits):
        yield


def work(
    config: Config,
    run: Run,
    replica: ReplicaPlan,
    out: TextIO,
    *,
    is_first: bool,
    is_verbose: bool,
    wiring: Wiring,
) -> None:
    """Decode the shards that are not committed."""
    with bounded(config, f"the commit records of the run in {run.store.path}"):
        committed = run.committed()
    todo = [shard.index for shard in run.plan.shards if shard.index not in committed]
    if not is_first:  # another driver may be at work: begin elsewhere than it did
        start = random.randrange(len(todo) or 1)
        todo = todo[start:] + todo[:start]
    limit = FailureLimit(config, run, committed.values())
    line = ProgressLine(
        out,
        num_rows=run.plan.num_answers,
        num_shards=len(run.plan.shards),
        rows_before=sum(commit.rows + commit.failed for commit in committed.values()),
        tokens_before=sum(commit.tokens for commit in committed.values()),
        shards_before=len(committed),
        notices=_notices(run),
    )
    if todo:
        feed = _Feed()
        with (
            line.running(feed.counts, feed.waits),
            _stream(replica, run, is_verbose=is_verbose, wiring=wiring) as stream,
            feed.following(stream),
            _watched(config, stream, line, limit),
        ):
            _decode(stream, todo, line, limit)


def _places(path: str, *, may_begin_beside: bool) -> list[str]:
    """Where the run may be: at `path`, or beside it where that is allowed."""
    beside = [f"{path.rstrip('/')}-{number}" for number in range(2, MAX_BESIDE + 1)]
    return [path, *beside] if may_begin_beside else [path]


def open_run(
    plan: Plan, places: Sequence[str], wiring: Wiring, *, may_create: bool, may_extend: bool = False
) -> Run | None:
    """The run of the plan at the first place that is free or its own; None where it would have to be created.

    A run whose input is a part of the plan's is its own, too, where the plan `may_extend` it.
    """
    for place in places:
        store = wiring.open_store(place)
        if not may_create and not has_plan(store):
            return None
        placed = plan
        if place != plan.config["output"]["path"]:
            placed = replace(plan, config={**plan.config, "output": {**plan.config["output"], "path": place}})
        try:
            return Run.create_or_resume(store, placed)
        except RunMismatch as mismatch:
            begun = Run.open(place, open_store=wiring.open_store)
            if not differing_fields(begun.plan.fingerprint, plan.as_begun(begun.plan).fingerprint):
                return Run.create_or_resume(store, placed)  # another command has just extended it to the same rows
            if is_extension(begun.plan, plan, with_new_rows=may_extend, with_limit=len(places) == 1 or may_extend):
                return begun
            if len(places) == 1:
                raise _with_way_out(begun, plan, mismatch) from None
    raise ConfigurationError(f"{places[0]} and {len(places) - 1} places beside it hold runs of other settings")


def _with_way_out(run: Run, plan: Plan, mismatch: RunMismatch) -> RunMismatch:
    if not is_extension(run.plan, plan, with_new_rows=True):
        return mismatch
    return RunMismatch(f"{mismatch}\nIf the input has only grown, add --extend to answer its new rows in this run.")


def _extended(run: Run, plan: Plan, config: Config) -> Plan | None:
    """The run's plan with what is new in the input; None where it has all of that."""
    if not is_extension(run.plan, plan, with_new_rows=True):
        return None
    plan = replace(plan, config={**plan.config, "output": run.plan.config["output"]})
    return extend_plan(run.store.path, run.plan, plan, config)


def _decode(stream: Stream, todo: Sequence[int], line: ProgressLine, limit: FailureLimit) -> None:
    """Decode shards until none is left. A shard that failed for good does not keep others from being committed."""
    failures: list[CageError] = []
    with closing(stream.decode(todo)) as outcomes:
        for outcome in outcomes:
            if isinstance(outcome.error, (StorageError, ConfigurationError)):  # the others would fail as well
                raise outcome.error
            if outcome.error is not None:
                failures.append(outcome.error)
                continue
            line.shard_done(
                num_rows_found=outcome.rows + outcome.failed if outcome.was_committed else 0,
                shard=outcome.index,
                rows=outcome.rows,
                failed=outcome.failed,
            )
            if error := limit.one_reason(stream.counts()):
                raise error
            limit.add(outcome.failed)
    if failures:
        raise failures[0]


def _notices(run: Run) -> Notices:
    """Says once what the first failed rows failed for, and which principals value no token."""
    watch = SilenceWatch(run.plan.config["principals"])
    kinds: set[str] = set()

    def lines(counts: Counts, *, is_last: bool) -> Sequence[Notice]:
        new = [kind for kind in counts.failures if kind not in kinds][: SHOWN_FAILURES - len(kinds)]
        kinds.update(new)
        examples = [example for kind in new for example in counts.failures[kind].examples[:1]]
        silent = [Notice(line) for line in watch.lines(counts.values, is_last=is_last)]
        return [*map(_failed_row, examples), *silent]

    return lines


def _failed_row(example: Example) -> Notice:
    text = one_line(f"row {example.row_id} failed: {example.reason}", limit=LONGEST_NOTICE)
    fields = {"row_id": example.row_id, "reason": reason_without_values(example.reason)}
    return Notice(text, "row_failed", fields)


def _watched(config: Config, stream: Stream, line: ProgressLine, limit: FailureLimit) -> AbstractContextManager[None]:
    """Ends a run that makes no progress, or whose rows all fail for one reason before a shard is done."""

    def progress() -> tuple[int, int, int]:
        counts = stream.counts()
        return counts.rows, counts.steps, line.shards_done

    def error() -> CageError | None:
        return stream.error() or limit.one_reason(stream.counts())

    return ended_when_stalled(config.cluster.stall_timeout_s, progress, stream.waits, find_error=error)


def _scorers(
    config: Config, cache_folder: Path, progress: Callable[[str], None] = lambda line: None
) -> JudgePrincipals | None:
    """The judges among the principals. Most runs have none, and importing judges takes time."""
    if all(principal.judged_by is None for principal in config.principals.values()):
        return None
    from pipeline.evaluation.text_principals import resolve_judge_principals

    return resolve_judge_principals(config, cache_folder, progress=progress)


@contextmanager
def _stream(replica: ReplicaPlan, run: Run, *, is_verbose: bool, wiring: Wiring) -> Iterator[Stream]:
    with waiting_for("loading tokenizers"), collection_paused(is_for_good=True):
        from pipeline.runtime.assembly import load_assembly  # a run really starts: what follows imports models or ray

        scorers = _scorers(replica.config, replica.hosts[0].cache_folder)
        assembly = replace(load_assembly(replica), scorers=scorers)
    if assembly.config.cluster.transport is Transport.LOCAL:
        with waiting_for("loading torch"), collection_paused(is_for_good=True):
            from pipeline.runtime.local import LocalStream

        yield LocalStream(assembly, run, wiring=wiring)
        return
    with waiting_for("starting Ray"):
        from pipeline.cluster.stream import ShardStream, cluster

    with cluster(assembly, is_verbose=is_verbose):
        yield ShardStream(assembly, run.store.path, is_verbose=is_verbose, wiring=wiring)
