"""How much of the evidence is measured: the whole design, or a part of it that ends on two cores within hours."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Rules beside one another on held-out prompts.

    Args:
        principals: the name of their file in `configs/evidence`, which is a kind and a pair of objectives.
        rules: `grid.rules`.
        weights: `grid.weights`, of the first principal against the second.
        prompts: how many of the held-out ones, from the first on.
        unit: `decoding.unit`.
        agent_temperatures: `grid.agent_temperatures`, of which each rule has a curve over KL. Without any, rows have
            the scale's target of KL, which games over whole answers cannot have.
        begin: agent temperature at which rows with that target begin; None: the scale's.
    """

    principals: str
    rules: tuple[str, ...]
    weights: tuple[float, ...]
    prompts: int
    unit: str = "token"
    agent_temperatures: tuple[float, ...] = ()
    begin: float | None = None

    @property
    def at(self) -> str:
        """What is equal among its rules: kl, or temperature."""
        return "temperature" if self.agent_temperatures else "kl"

    @property
    def name(self) -> str:
        """Of its stage and folder."""
        return f"{self.principals}-{self.unit}-{self.at}"

    @property
    def kind(self) -> str:
        """Of its principals: trained (ARMs), prompted, value (value heads), small (ARMs on a smaller model), or aware
        (one preference-aware reward model)."""
        return self.principals.partition("_")[0]

    @property
    def pair(self) -> str:
        """Of its objectives, a key of `stages.PAIRS`."""
        return self.principals.partition("_")[2]


@dataclass(frozen=True, slots=True)
class Scale:
    """Sizes of all stages; everything else is in `configs/evidence`.

    Args:
        name: of the folder below `runs/evidence`.
        duration: on CPU cores, as measured or as computed from the measured speed.
        training: prompts for the pairs of both halves together.
        halves: of the training prompts that principals are trained on. The principals of the second half are the
            views of the first half's; without it no rewards are recorded and no what-if questions are asked.
        answers: of the base to each training prompt, which judges compare.
        pairs: by objective, the pairs of one prompt's answers that its principal is trained on, the widest first.
        epochs: passes of a training over its pairs.
        training_dtype: of the backbone while a principal is trained.
        advise: prompts on which token rewards are recorded.
        evaluations: of answers, by judges.
        target_kl: nats a token of the evaluations without agent temperatures.
        begin: agent temperature at which rows with a target of KL begin. Where it is far from what the target takes,
            24 tokens are too few to come close to the target.
        slots: rows that are decoded at once; more are faster, and change no byte.
        games: most recorded games on which what-if questions are asked; twice as many for the gains at equal KL.
        starts: of Jacobi in each game, to look for other equilibria.
        dtype: of the models that answer held-out prompts.
        again: objectives whose principals of the first half are trained a second time, from another seed: what two
            trainings on the same pairs do not share.
        others: scales whose published evaluations are of the same principals; what recorded rewards say is checked
            on them, too.
    """

    name: str
    duration: str
    training: int
    halves: tuple[str, ...]
    answers: int
    pairs: Mapping[str, int]
    epochs: float
    training_dtype: str
    advise: int
    evaluations: tuple[Evaluation, ...]
    target_kl: float
    begin: float
    slots: int
    games: int
    starts: int
    dtype: str = "float32"
    again: tuple[str, ...] = ()
    others: tuple[str, ...] = ()

    @property
    def objectives(self) -> tuple[str, ...]:
        """Which have trained principals."""
        return tuple(self.pairs)

    @property
    def has_views(self) -> bool:
        """Whether both halves have principals, so that token rewards can be judged by other ones."""
        return len(self.halves) == 2

    @property
    def has_arms(self) -> bool:
        """Whether each objective has a principal of its own, trained on its pairs."""
        return self.has_views or any(each.kind == "trained" for each in self.evaluations)

    @property
    def held_out(self) -> int:
        """Prompts whose answers are judged."""
        return max(each.prompts for each in self.evaluations)


TOKEN_RULES = ("base", "linear", "mixture", "maximin", "equilibrium", "soft_threshold")
ANSWER_RULES = ("base", "linear", "mixture", "maximin", "equilibrium")
TWO_RULES = ("base", "linear", "equilibrium")
QUICK_RULES = ("base", "linear", "mixture", "equilibrium")
FEW_RULES = ("base", "linear", "equilibrium", "soft_threshold")
ELEVEN = tuple(round(0.1 * at, 1) for at in range(11))
ASKED = (0.2, 0.5, 0.8)  # weights of the what-if questions
THREE = (0.25, 0.5, 0.75)
EQUAL = (0.5,)
# agent temperatures: a trained principal's rewards are larger than a prompted one's
OF_TRAINED, OF_PROMPTED, OF_ANSWERS = (0.5, 1.0, 2.0, 4.0), (0.2, 0.4, 0.8, 1.6), (1.0, 2.0, 4.0, 8.0)
BEGIN = {"trained": 1.6, "aware": 1.6, "prompted": 0.3}
SETS = ("trained_tone", "prompted_tone", "trained_words", "prompted_words", "aware_tone")


def _whole() -> Iterator[Evaluation]:
    """Each set of principals in games over tokens and over whole answers, and at a target of KL."""
    for name in SETS:
        kind = name.partition("_")[0]
        rules = (*TOKEN_RULES, *(("parm",) if kind == "aware" else ()))
        yield Evaluation(
            name, rules, ELEVEN, 200, agent_temperatures=OF_PROMPTED if kind == "prompted" else OF_TRAINED
        )
        yield Evaluation(name, (*ANSWER_RULES, "best_of_n"), ELEVEN, 200, "answer", OF_ANSWERS)
        yield Evaluation(name, (*rules, "solo"), ASKED, 200, begin=BEGIN[kind])
    for name in ("value_tone", "small_tone"):
        yield Evaluation(name, TOKEN_RULES, EQUAL, 200, agent_temperatures=OF_TRAINED)


FULL = Scale(
    name="full",
    duration="for games over tokens half an hour of a GPU or about 25 core-hours, as computed",
    training=1000,
    halves=("a", "b"),
    answers=8,
    pairs={"cheerful": 2, "formal": 2, "simple": 2},
    epochs=1.0,
    training_dtype="float32",
    advise=100,
    evaluations=tuple(_whole()),
    target_kl=0.5,
    begin=0.3,
    slots=256,
    games=2000,
    starts=20,
    again=("cheerful", "formal", "simple"),
)
GPU = replace(
    FULL,
    name="gpu",
    duration="about three and a half minutes of a GPU, for which both evaluations ran side by side",
    halves=(),
    again=(),
    evaluations=(
        Evaluation("prompted_tone", QUICK_RULES, ELEVEN, 200, agent_temperatures=OF_PROMPTED),
        Evaluation("prompted_words", TWO_RULES, ELEVEN, 200, agent_temperatures=OF_PROMPTED),
    ),
    slots=128,
)
MEDIUM = Scale(
    name="medium",
    duration="about half an hour of one idle core",
    training=480,
    halves=("a",),
    answers=8,
    pairs={"cheerful": 2, "formal": 1},
    epochs=1.0,
    training_dtype="bfloat16",
    advise=50,
    evaluations=(
        Evaluation("trained_tone", ("base", "linear", "mixture", "equilibrium", "soft_threshold"), THREE, 120),
        Evaluation("trained_tone", TWO_RULES, EQUAL, 100, agent_temperatures=(1.0, 2.0, 4.0)),
    ),
    target_kl=0.5,
    begin=1.6,
    slots=64,
    games=200,
    starts=4,
)
OTHER = replace(
    MEDIUM,
    name="other",
    duration="about an hour and a half of one idle core",
    pairs={"cheerful": 1, "formal": 1},
    training_dtype="float32",
    evaluations=(
        Evaluation("aware_tone", (*TWO_RULES, "parm"), EQUAL, 100, agent_temperatures=(1.0, 2.0, 4.0)),
        Evaluation("aware_tone", (*ANSWER_RULES, "best_of_n"), ELEVEN, 200, "answer", (1.0, 2.0, 4.0, 8.0)),
    ),
)
TRAINED = replace(
    MEDIUM,
    name="trained",
    duration="about three hours of one core that computes with bfloat16",
    training=1000,
    pairs={"cheerful": 2, "formal": 1, "simple": 1},
    advise=100,
    evaluations=(
        Evaluation("trained_tone", QUICK_RULES, ELEVEN, 200, agent_temperatures=OF_TRAINED),
        Evaluation("trained_words", TWO_RULES, ELEVEN, 200, agent_temperatures=OF_TRAINED),
        Evaluation("trained_tone", (*ANSWER_RULES, "best_of_n"), ELEVEN, 200, "answer", (2.0, 8.0, 16.0, 32.0)),
        Evaluation("small_tone", TWO_RULES, EQUAL, 200, agent_temperatures=OF_TRAINED),
        Evaluation("value_tone", TWO_RULES, EQUAL, 120, agent_temperatures=(0.05, 0.1, 0.2)),
    ),
    dtype="bfloat16",
)
SECOND = replace(
    TRAINED,
    name="second",
    duration="about four hours of one core that computes with bfloat16",
    halves=("a", "b"),
    evaluations=(
        Evaluation("aware_tone", (*TWO_RULES, "parm"), ELEVEN, 200, agent_temperatures=OF_TRAINED),
        Evaluation("trained_tone", ("base", "linear", "maximin"), ELEVEN, 200, agent_temperatures=OF_TRAINED),
        Evaluation("prompted_tone", (*ANSWER_RULES, "best_of_n"), ELEVEN, 200, "answer", (0.5, 2.0, 4.0, 8.0)),
    ),
    games=400,
    again=("cheerful", "formal"),
    others=("trained", "gpu"),
)
SMALL = Scale(
    name="small",
    duration="about an hour on two idle cores",
    training=100,
    halves=("a", "b"),
    answers=6,
    pairs={"cheerful": 4, "formal": 4},
    epochs=0.5,
    training_dtype="float32",
    advise=50,
    evaluations=tuple(Evaluation(each, FEW_RULES, (0.5,), 40) for each in ("trained_tone", "prompted_tone")),
    target_kl=0.5,
    begin=0.3,
    slots=16,
    games=200,
    starts=4,
)
SCALES = {scale.name: scale for scale in (FULL, GPU, SECOND, TRAINED, MEDIUM, OTHER, SMALL)}
