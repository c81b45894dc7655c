"""The plan of a run as files: the first one, and a new one beside it whenever the run is extended."""

from __future__ import annotations

from itertools import count

from pipeline.errors import ConfigurationError
from pipeline.quoting import quote
from pipeline.storage.names import EARLIER_PLAN, OWN_INPUT, PLAN
from pipeline.storage.plan import Plan
from pipeline.stores.addresses import split_address
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


def check_exclusive(store: Store, plan: Plan) -> None:
    """Refuse a store that lets a second writer win: some S3-compatible ones ignore If-None-Match.

    The plan was just created, so creating it again must fail.
    """
    is_object_store = split_address(store.path)[0] is not None
    if is_object_store and store.create(PLAN, plan.to_json()):
        raise ConfigurationError(f"{store.path} is in a store without create-only writes (If-None-Match)")
