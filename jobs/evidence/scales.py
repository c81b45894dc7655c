"""How much of the evidence is measured: the whole design, or a part of it that ends on two cores within hours."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Scale:
    """Sizes of all stages; everything else is in `configs/evidence`.

    Args:
        name: of the folder below `runs/evidence`.
        duration: on CPU cores, as measured or as computed from the measured speed.
        training: prompts for the pairs of both halves together.
        epochs: passes of a training over its pairs.
        advise: prompts on which token rewards are recorded.
        held_out: prompts whose answers are judged.
        rules: `grid.rules` of the evaluations; over answers, `best_of_n` as well.
        weights: `grid.weights` of the evaluations, of the first principal against the second.
        agent_temperatures: `grid.agent_temperatures` of the evaluations at equal agent temperature; may be none.
        target_kl: nats a token of the evaluations at equal KL.
        units: `decoding.unit` of the evaluations.
        objectives: which of them have trained principals.
        sets: principals that are evaluated, by the names of their files.
        games: most recorded games on which what-if questions are asked; twice as many for the gains at equal KL.
        starts: of Jacobi in each game, to look for other equilibria.
    """

    name: str
    duration: str
    training: int
    epochs: float
    advise: int
    held_out: int
    rules: tuple[str, ...]
    weights: tuple[float, ...]
    agent_temperatures: tuple[float, ...]
    target_kl: float
    units: tuple[str, ...]
    objectives: tuple[str, ...]
    sets: tuple[str, ...]
    games: int
    starts: int


FULL = Scale(
    name="full",
    duration="about 90 core-hours for games over tokens, and several hundred more for those over answers",
    training=1000,
    epochs=1.0,
    advise=100,
    held_out=200,
    rules=("base", "linear", "mixture", "maximin", "equilibrium", "solo", "soft_threshold"),
    weights=tuple(round(0.1 * at, 1) for at in range(11)),
    agent_temperatures=(0.1, 0.2, 0.4, 0.8),
    target_kl=0.5,
    units=("token", "answer"),
    objectives=("cheerful", "formal", "simple"),
    sets=("trained_tone", "prompted_tone", "trained_words", "prompted_words"),
    games=2000,
    starts=20,
)
SMALL = Scale(
    name="small",
    duration="about an hour on two idle cores",
    training=100,
    epochs=0.5,
    advise=50,
    held_out=40,
    rules=("base", "linear", "equilibrium", "soft_threshold"),
    weights=(0.5,),
    agent_temperatures=(),
    target_kl=0.5,
    units=("token",),
    objectives=("cheerful", "formal"),
    sets=("trained_tone", "prompted_tone"),
    games=200,
    starts=4,
)
SCALES = {scale.name: scale for scale in (FULL, SMALL)}
