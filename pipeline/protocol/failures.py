"""How a host's failure reaches the coordinator: one line that names the host, its model and what it serves."""

from __future__ import annotations

from pipeline.errors import CageError, HostError, HostOutOfMemory, StateLost
from pipeline.protocol.topology import HostPlan


def describe_failure(plan: HostPlan, message: str, error: BaseException) -> HostError:
    """A HostError that names the host, its model and the principals that it serves.

    It is of the error's own class where that says what to do (StateLost, HostOutOfMemory).

    Args:
        plan: of the host that failed.
        message: what it was asked, such as "advance".
        error: what it raised.
    """
    named = str(error) if isinstance(error, CageError) else f"{type(error).__name__}: {error}"
    what = " ".join(named.split())[:1000]
    kept = next((each for each in (StateLost, HostOutOfMemory) if isinstance(error, each)), HostError)
    failure = kept(
        f"host {plan.name} ({plan.model.model}, serving {', '.join(plan.serves)}) failed in {message}: {what}"
    )
    failure.__cause__ = error
    return failure
