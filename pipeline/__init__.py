"""The distributed batch pipeline: one run over many machines, and `Aligner` for one process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.aligner import AlignBatch, AlignedAnswer, Aligner

__all__ = ["AlignBatch", "AlignedAnswer", "Aligner"]


def __getattr__(name: str) -> Any:
    """The public names, imported at their first use: the command line needs none of them."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from pipeline import aligner

    return getattr(aligner, name)
