"""Errors that a model's own code raises for what it was not made for, as distinct from faults of this project."""

from __future__ import annotations

import traceback
from pathlib import Path

import torch

from pipeline.errors import ConfigurationError
from pipeline.hub.model_facts import reason_of

MODEL_ERRORS = (
    ArithmeticError,
    AttributeError,
    ImportError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
OWN_CODE = Path(__file__).parents[1]
# no fault of the model: no memory, a broken device (older torch has no class for that)
OF_THE_MACHINE = (torch.OutOfMemoryError, getattr(torch, "AcceleratorError", torch.OutOfMemoryError))


def reason_of_model(error: Exception) -> str:
    """Why a model's code failed, in one line. A fault of this project is called one.

    Raises:
        Exception: the error itself, where it is about memory or the device, or says all that there is to say.
    """
    if isinstance(error, (ConfigurationError, *OF_THE_MACHINE)):
        raise error
    reason = reason_of(error)
    frames = traceback.extract_tb(error.__traceback__)
    if not frames or OWN_CODE not in Path(frames[-1].filename).parents:
        return reason
    place = Path(frames[-1].filename).relative_to(OWN_CODE.parent)
    return f"a fault of CAGE itself at {place}:{frames[-1].lineno}, please report it: {reason}"
