"""What Ray's errors mean, in a few words: their own texts are pages with ids, addresses and guesses."""

from __future__ import annotations

import re

from ray.exceptions import (
    ActorUnavailableError,
    NodeDiedError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
)

LONGEST = 300
LOGS = "the logs are in /tmp/ray/session_latest/logs on its machine"


def lost_actor(error: RayError) -> str:
    """Why an actor does not answer: its process, its machine, or Ray itself.

    Args:
        error: of a call of the actor.
    """
    text = " ".join(str(error).split())
    if isinstance(error, OutOfMemoryError) or "OutOfMemory" in text or "node running low on memory" in text:
        return "Ray ended the process, as the memory of its machine was nearly used up"
    if isinstance(error, NodeDiedError) or re.search(r"node has died|node was (terminated|lost)", text):
        return "the machine was lost"
    if isinstance(error, ActorUnavailableError):
        return "the process does not answer"
    if isinstance(error, RayActorError) and error.actor_init_failed:
        return f"the process failed as it started: {str(error).strip().splitlines()[-1].strip()[:LONGEST]}"
    if isinstance(error, RayActorError):
        return f"the process died: it was killed (often for lack of memory) or crashed; {LOGS}"
    return first_reason(error)


def first_reason(error: BaseException) -> str:
    """The class of an error and the beginning of its text, on one line; where a task raised it, of that error."""
    if isinstance(error, RayTaskError) and isinstance(error.cause, BaseException):
        return first_reason(error.cause)
    if isinstance(error, RayActorError):
        return lost_actor(error)
    text = " ".join(str(error).split())
    name = type(error).__name__
    whole = text if text.startswith(name) else f"{name}: {text}"
    return whole if len(whole) <= LONGEST else whole[: LONGEST - 3] + "..."
