"""Scores of texts by a head on the hidden state of their last token: reward models and value heads.

T tokens of a reading, H the width of the hidden states, L outputs of a head, N texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.attention.branches import Reading
from pipeline.worker.branch_rows import BranchRow, Text, lay_out
from pipeline.worker.whole_vectors import WholeVectors


@dataclass(frozen=True, slots=True)
class RoleHead:
    """What scores for one role.

    Args:
        head: from hidden states to outputs, in float32: differences of scores need more digits than a half type has.
        label: the index of the output that counts.
        end_id: the token that is read after every text that has not ended, so that it is scored as a finished
            answer; None: a text is scored at its own last token.
    """

    head: Any
    label: int
    end_id: int | None = None


class HeadScorer:
    """Scores texts by the heads of their roles (`Scorer`).

    Args:
        heads: by the index of the role.
    """

    def __init__(self, heads: Sequence[RoleHead]) -> None:
        self._heads = tuple(heads)

    def request(self, row: BranchRow, prefix: Text, texts: Sequence[Text]) -> HeadRequest:
        """What has to be read; the row keeps the tokens of `prefix`."""
        role = self._heads[row.role]
        sequences = [self._ended(each, role.end_id) for each in texts]
        reading, places = lay_out(row.cache, prefix.tokens, sequences)
        return HeadRequest(row, role, reading, places)

    @staticmethod
    def _ended(text: Text, end_id: int | None) -> list[int]:
        return text.tokens if end_id is None or text.is_ended else [*text.tokens, end_id]


@dataclass(frozen=True, slots=True)
class HeadRequest:
    """Texts of a row that are scored at a token (`ScoringRequest`).

    Args:
        row: the row; it knows the score of the newest token in its cache.
        role: its head.
        reading: what is read.
        places: of each text's last token in the reading; None where that is the row's last cached token.
    """

    row: BranchRow
    role: RoleHead
    reading: Reading
    places: Sequence[int | None]

    def finish(self, states_TH: Tensor) -> Tensor:
        """The score [N] of each text."""
        if self.reading.tokens:
            # a row that goes on after a kill reads all of its answer at once: the bits of a product with few columns
            # would depend on that
            with WholeVectors():
                scores_T: Tensor = self.role.head(states_TH)[:, self.role.label]
        else:
            scores_T = torch.zeros(0, device=states_TH.device)
        if self.reading.trunk:
            self.row.known = scores_T[len(self.reading.trunk) - 1]
        return torch.stack([self.row.known if place is None else scores_T[place] for place in self.places])
