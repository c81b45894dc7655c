"""The error tree. What a user can fix is reported in one line; the class decides the exit code."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of every command."""

    DONE = 0
    FAILED = 1
    CONFIGURATION = 2
    ERROR_BUDGET = 3
    INTERRUPTED = 75


class CageError(Exception):
    """An error that is reported to the user in one line. Picklable: the message is its only argument."""

    exit_code = ExitCode.FAILED


class ConfigurationError(CageError):
    """The configuration, the input or a model cannot be used; nothing was decoded."""

    exit_code = ExitCode.CONFIGURATION


class RunMismatch(ConfigurationError):
    """The run directory belongs to another configuration."""


class InputChanged(ConfigurationError):
    """Rows that a run has are not in its input any more as they were."""


class ErrorBudgetExceeded(CageError):
    """More rows failed than `errors.budget` allows; everything done so far is kept."""

    exit_code = ExitCode.ERROR_BUDGET


class Interrupted(BaseException):
    """The run was stopped from outside and can be resumed by the same command.

    Like KeyboardInterrupt it is no Exception, so that code that handles errors does not catch it.
    """

    exit_code = ExitCode.INTERRUPTED


class HostError(CageError):
    """A model host failed. The message names the host and the principals that it serves."""


class StateLost(HostError):
    """A host does not hold the step that a call expects; its rows are decoded again."""


class HostOutOfMemory(HostError):
    """A host has no memory for a call; fewer rows at once may fit."""


class ReplicaReleased(CageError):
    """A replica has lost its place on the cluster and gives its shards up; others decode them."""


class RunStalled(CageError):
    """No row was finished and no token drawn for `cluster.stall_timeout_s`."""


class NondeterminismError(CageError):
    """A shard was computed twice with different bytes."""


class RowError(CageError):
    """One row cannot be aligned; its neighbours go on."""


class StorageError(CageError):
    """A folder or an object store cannot be read or written. What is committed stays; the run can be resumed."""
