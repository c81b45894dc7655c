"""Games over tokens as a run meets them, kept whole: the base and every principal's q at all candidates.

A run keeps numbers of the drawn tokens alone. Here the games themselves are kept, so that any rule can be solved on
them later, at any agent temperature and weights, without a model.

N games, K candidates, B rows of a step.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.engine.row_state import RunningRow
from pipeline.errors import ConfigurationError
from pipeline.protocol.messages import Candidates
from pipeline.sampling.games import as_game


@dataclass(frozen=True, slots=True, eq=False)
class RecordedGames:
    """The games of some answers, in no particular order.

    Args:
        base_NK: log-probabilities of the base in nats, normalised over the candidates.
        rewards: q [N, K] in nats by principal, before weights.
        row_N: which of `row_ids` each game belongs to.
        row_ids: the prompts.
        settings: what they were recorded with (`AdviseConfig.recorded`); empty where that is not known.
    """

    base_NK: Tensor
    rewards: Mapping[str, Tensor]
    row_N: Tensor
    row_ids: tuple[str, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def num_games(self) -> int:
        """N."""
        return len(self.base_NK)

    def rewards_of(self, names: Sequence[str]) -> Tensor:
        """q of these principals, in this order."""
        return torch.stack([self.rewards[name] for name in names], 1)

    def save(self, path: Path) -> None:
        """Write all of it to a file of numpy's format `.npz`, in float32."""
        path.parent.mkdir(parents=True, exist_ok=True)
        facts = json.dumps({"names": list(self.rewards), "row_ids": self.row_ids, "settings": self.settings})
        arrays: dict[str, Any] = {
            f"q{at}": reward_NK.float().numpy() for at, reward_NK in enumerate(self.rewards.values())
        }
        aside = path.with_name(f".{path.name}.npz")
        np.savez_compressed(
            aside, facts=np.array(facts), base=self.base_NK.float().numpy(), row=self.row_N.numpy(), **arrays
        )
        aside.replace(path)

    @classmethod
    def load(cls, path: Path) -> RecordedGames:
        """Read what `save` wrote. Raises ConfigurationError where the file is something else."""
        try:
            with np.load(path, allow_pickle=False) as file:
                facts = json.loads(str(file["facts"]))
                rewards = {name: _doubles(file[f"q{at}"]) for at, name in enumerate(facts["names"])}
                base_NK = _doubles(file["base"]).log_softmax(-1)
                row_N, row_ids = torch.from_numpy(file["row"]), tuple(facts["row_ids"])
                return cls(base_NK, rewards, row_N, row_ids, facts.get("settings", {}))
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise ConfigurationError(f"{path} does not hold recorded games: {error}") from None


def _doubles(array: Any) -> Tensor:
    return torch.from_numpy(array).double()


class Recorder:
    """Keeps the games that an engine solves and principals take part in; give it to `HostCalls.observer`.

    Args:
        names: the principals, in the topology's order.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._games: list[tuple[Tensor, Tensor]] = []
        self._rows: list[str] = []

    def __call__(self, rows: Sequence[RunningRow], candidates: Candidates, rewards: Sequence[Tensor]) -> None:
        base_BK, rewards_BJK = as_game(candidates.cpu(), [reward.cpu() for reward in rewards])
        # of reasoning that is left alone, no rule changes a token
        kept = [at for at, row in enumerate(rows) if row.reasoning is None or row.reasoning.is_steered]
        self._games.append((base_BK[kept], rewards_BJK[kept]))
        self._rows += [rows[at].row.row_id for at in kept]

    def games(self, failed: frozenset[str] = frozenset()) -> RecordedGames:
        """Everything so far, without the rows that failed.

        Raises:
            ConfigurationError: nothing is left.
        """
        kept = torch.tensor([row_id not in failed for row_id in self._rows], dtype=torch.bool)
        if not kept.any():
            raise ConfigurationError("no prompt could be answered, so there are no games to look at")
        base_NK, rewards_NJK = (torch.cat(parts)[kept] for parts in zip(*self._games, strict=True))
        rows = [row_id for row_id in self._rows if row_id not in failed]
        row_ids = tuple(dict.fromkeys(rows))
        index = {row_id: at for at, row_id in enumerate(row_ids)}
        by_name = dict(zip(self._names, rewards_NJK.unbind(1), strict=True))
        return RecordedGames(base_NK, by_name, torch.tensor([index[row_id] for row_id in rows]), row_ids)
