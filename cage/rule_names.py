"""The names of the rules, and the facts about each that callers need before any game exists.

Importable without torch: checking a configuration, planning a run and writing a report need no tensors.
The functions are in `cage.rules`, which also says how to add a rule.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


@dataclass(frozen=True, slots=True, kw_only=True)
class _Facts:
    summary: str
    pays: bool = False
    uses_principals: bool = True
    uses_temperature: bool = True
    at_weights: bool = False
    serves_tokens: bool = True
    serves_texts: bool = True
    has_fixed_step_solver: bool = False
    takes_k: bool = False


class RuleName(StrEnum):
    """Name a rule and carry the facts about it.

    Code elsewhere asks for a fact (`rule.pays`) instead of comparing names, so that a new rule works everywhere.
    """

    _facts: _Facts

    def __new__(cls, name: str, facts: _Facts | None = None) -> RuleName:
        # members always have facts; type checkers think that looking up RuleName("base") comes here as well
        assert facts is not None, f"rule {name} must have facts"
        rule = str.__new__(cls, name)
        rule._value_ = name
        rule._facts = facts
        return rule

    EQUILIBRIUM = (
        "equilibrium",
        _Facts(
            summary="principals pay for tokens until none gains by changing its offers",
            pays=True,
            has_fixed_step_solver=True,
        ),
    )
    LINEAR = "linear", _Facts(summary="tilt the base policy by the weighted sum of all rewards")
    MIXTURE = "mixture", _Facts(summary="average one tilted policy per principal, by weight")
    FORWARD_KL = (
        "forward_kl",
        _Facts(summary="weighted harmonic mean of one tilted policy per principal, as MOD does for the forward KL"),
    )
    JENSEN_SHANNON = (
        "jensen_shannon",
        _Facts(summary="mean of one tilted policy per principal, as MOD does for the Jensen-Shannon divergence"),
    )
    MAXIMIN = "maximin", _Facts(summary="tilt the base policy towards the principal that is worst off")
    SOFT_THRESHOLD = (
        "soft_threshold",
        _Facts(
            summary="tilt the base policy by what rewards exceed a threshold of their own by; no game is solved",
            pays=True,
            takes_k=True,
        ),
    )
    SOLO = "solo", _Facts(summary="each principal pays as if it were alone; the payments are summed", pays=True)
    PARM = (
        "parm",
        _Facts(
            summary="tilt the base policy by one reward model that is used at the weights",
            at_weights=True,
            serves_texts=False,
        ),
    )
    BEST_OF_N = (
        "best_of_n",
        _Facts(
            summary="take the proposal with the highest weighted reward", uses_temperature=False, serves_tokens=False
        ),
    )
    BASE = "base", _Facts(summary="keep the base policy as it is", uses_principals=False, uses_temperature=False)

    @property
    def summary(self) -> str:
        """Say in one line what the rule does."""
        return self._facts.summary

    @property
    def pays(self) -> bool:
        """Whether principals pay for tokens: then decisions have thresholds, and tokens have payments."""
        return self._facts.pays

    @property
    def uses_principals(self) -> bool:
        """Whether values and weights change the rule's answers."""
        return self._facts.uses_principals

    @property
    def uses_temperature(self) -> bool:
        """Whether the agent temperature changes the rule's answers."""
        return self._facts.uses_temperature

    @property
    def at_weights(self) -> bool:
        """Whether its values are those of one reward model at the game's weights, instead of each principal's own."""
        return self._facts.at_weights

    @property
    def serves_tokens(self) -> bool:
        """Whether it decides games over the next token."""
        return self._facts.serves_tokens

    @property
    def serves_texts(self) -> bool:
        """Whether it decides games over blocks or whole answers."""
        return self._facts.serves_texts

    @property
    def takes_k(self) -> bool:
        """Whether the rule has the option k: how many agent temperatures above its mean a value must be to count."""
        return self._facts.takes_k

    @property
    def has_fixed_step_solver(self) -> bool:
        """Whether a solver exists that takes a fixed number of steps and reads nothing back from the device.

        Only such a solver can be captured in a CUDA graph.
        """
        return self._facts.has_fixed_step_solver
