"""The plan of a run as files: the first one, and a new one beside it whenever the run is extended."""

from __future__ import annotations

from itertools import count

from pipeline.errors import ConfigurationError
from pipeline.quoting import quote
from pipeline.storage.names import EARLIER_PLAN, OWN_INPUT, PLAN
from pipeline.storage.plan import Plan
from pipeline.stores.store import Store

SHOWN = 5  # names of other files in a message


def has_plan(store: Store) -> bool:
    """Whether the store holds a run."""
    return any(store.read(name) is not None for name in (PLAN, EARLIER_PLAN))


def plan_name(revision: int) -> str:
    """The file of a plan that was extended so many times."""
    return f"_plan.{revision}.json" if revision else PLAN


def read_plan(store: Store) -> Plan:
    """The newest revision of the plan. Revisions are created one after the other, so the first gap is the end."""
    found = next(((name, data) for name in (PLAN, EARLIER_PLAN) if (data := store.read(name)) is not None), None)
    if found is None:
        raise ConfigurationError(f"there is no run in {store.path}: it has no {PLAN}")
    name, data = found
    for revision in count(1):
        later = store.read(plan_name(revision))
        if later is None:
            break
        name, data = plan_name(revision), later
    return Plan.from_json(data, source=store.url(name))


def refuse_other_files(store: Store) -> None:
    """Refuse a directory with other files, which a run could overwrite or mix with its own.

    The plan is the first file of a run. Where another driver has just created it, there are files and a plan by now.
    """
    others = [name for name in store.entries() if name != OWN_INPUT]
    if others and not has_plan(store):
        shown = ", ".join(quote(name) for name in others[:SHOWN]) + (", ..." if len(others) > SHOWN else "")
        raise ConfigurationError(
            f"output.path: {store.path} holds other files and no run: {shown}; choose an empty or a new folder"
        )


def check_exclusive(store: Store) -> None:
    """Refuse a store that lets a second writer win: some S3-compatible ones ignore If-None-Match.

    The plan is there, so creating it again must fail. Every command that decodes looks: one that was refused leaves
    its plan.
    """
    data = store.read(PLAN)
    if data is not None and store.create(PLAN, data):
        raise ConfigurationError(
            f"{store.path} is in a store without create-only writes (hard links in a folder, If-None-Match in an "
            "object store), so that two commands would overwrite each other; choose another output.path"
        )
