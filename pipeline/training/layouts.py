"""Which columns of preference data are read, and what they mean: named in the configuration, or recognised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

from pipeline.errors import ConfigurationError
from pipeline.quoting import quote
from pipeline.training.settings import PairsInputConfig


class Shape(StrEnum):
    """How a record says which answer is better."""

    PAIRS = "pairs"  # it names the better answer and the worse one
    NAMED = "named"  # it has two answers, and for each objective a column that names the better one
    SCORED = "scored"  # it has one answer, or a list of them, with scores


@dataclass(frozen=True, slots=True)
class Layout:
    """The columns of preference data.

    Args:
        shape: how they say which answer is better.
        prompt: the column of the prompt; None where the sides of a pair hold it.
        sides: the columns of the two answers; of pairs the better one comes first.
        preferred: by objective, the column that names the better of `sides`.
        objectives: the column that names the objective of each pair.
        answers: the column of a list of answers; None where a row has one answer.
        response: the column of the answer's text, or its key in `answers`; None: the text is under a usual key.
        scores: by objective, the dotted path to its score, with a leading - where lower is better.
        side_scores: the columns of the scores of both sides of a pair, where there are some.
        system: the column of the system message before the prompt; None where there is none.
    """

    shape: Shape
    prompt: str | None = "prompt"
    sides: tuple[str, str] = ("chosen", "rejected")
    preferred: Mapping[str, str] = field(default_factory=dict)
    objectives: str | None = None
    answers: str | None = None
    response: str | None = None
    scores: Mapping[str, str] = field(default_factory=dict)
    side_scores: tuple[str, str] | None = None
    system: str | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        """Every column to read, each once."""
        names: list[str | None] = [self.prompt, self.system, self.objectives]
        if self.shape is Shape.SCORED:
            in_row = [] if self.answers else [self.response, *(path_of(path)[0][0] for path in self.scores.values())]
            names += [self.answers, *in_row]
        else:
            names += [*self.sides, *self.preferred.values(), *(self.side_scores or ())]
        return tuple(dict.fromkeys(name for name in names if name is not None))


HELPSTEER = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
ASPECTS = ("instruction_following", "honesty", "truthfulness", "helpfulness")
SYSTEM = "system"  # the usual column of a system message, read where it is there
# of both sides of a pair, as `cage synthesize`, UltraFeedback and others name them
SIDE_SCORES = (("score_chosen", "score_rejected"), ("chosen-rating", "rejected-rating"))
RECOGNISED = {
    "pku-saferlhf": (
        {"prompt", "response_0", "response_1", "better_response_id"},
        Layout(
            Shape.NAMED,
            sides=("response_0", "response_1"),
            preferred={"better": "better_response_id", "safer": "safer_response_id"},
        ),
    ),
    "helpsteer2": (
        {"prompt", "response", *HELPSTEER},
        Layout(Shape.SCORED, response="response", scores={name: name for name in HELPSTEER}),
    ),
    "ultrafeedback": (
        {"instruction", "completions"},
        Layout(
            Shape.SCORED,
            prompt="instruction",
            answers="completions",
            response="response",
            scores={**{name: f"annotations.{name}.Rating" for name in ASPECTS}, "overall": "overall_score"},
        ),
    ),
    "pairs": ({"chosen", "rejected"}, Layout(Shape.PAIRS)),
}


def path_of(path: str) -> tuple[tuple[str, ...], int]:
    """The parts of a score's dotted path, and 1, or -1 where lower is better."""
    sign = -1 if path.startswith("-") else 1
    return tuple(path.removeprefix("-").split(".")), sign


def choose_layout(config: PairsInputConfig, names: Sequence[str]) -> Layout:
    """The columns that are read: those of the configuration, the rest from the format that the columns show.

    Args:
        config: names a format, columns, or neither.
        names: the columns that are there.

    Raises:
        ConfigurationError: a column is missing, nothing says which answer is better, or a setting has no effect.
    """
    there = f"columns: {', '.join(map(quote, names)) or 'none'}"
    layout = _named(config, _recognise(config, names, there))
    if layout.shape is Shape.PAIRS and config.prompt is None and layout.prompt not in names:
        layout = replace(layout, prompt=None)
    if layout.shape is Shape.PAIRS:
        there_are = [columns for columns in SIDE_SCORES if set(columns) <= set(names)]
        layout = replace(layout, side_scores=there_are[0] if there_are else None)
    if layout.shape is Shape.NAMED and not config.preferred:  # older versions of the data lack some labels
        known = {name: column for name, column in layout.preferred.items() if column in names}
        layout = replace(layout, preferred=known)
    if layout.shape is not Shape.SCORED:
        for key in ("min_margin", "max_pairs"):
            if getattr(config, key) != type(config).model_fields[key].default:
                raise ConfigurationError(
                    f"input.{key} has no effect: it is for scored answers, and a row of these data is a pair already"
                )
    layout = replace(layout, system=config.system or (SYSTEM if SYSTEM in names else None))
    if missing := [column for column in layout.columns if column not in names]:
        raise ConfigurationError(f"input: there is no column {', '.join(map(quote, missing))}; {there}")
    return layout


def _recognise(config: PairsInputConfig, names: Sequence[str], there: str) -> Layout | None:
    if config.format != "auto":
        return RECOGNISED[config.format][1]
    found = next((layout for columns, layout in RECOGNISED.values() if columns <= set(names)), None)
    if found is None and not (config.chosen or config.responses or config.scores):
        raise ConfigurationError(
            "input: nothing says which answer is better; name chosen and rejected, responses and preferred, or "
            f"scores; {there}"
        )
    return found


def _named(config: PairsInputConfig, found: Layout | None) -> Layout:
    """The configured columns; where they leave something open, that of the recognised format."""
    if config.chosen is not None and config.rejected is not None:
        layout = Layout(Shape.PAIRS, sides=(config.chosen, config.rejected))
    elif config.responses or config.preferred:
        like = found if found is not None and found.shape is Shape.NAMED else Layout(Shape.NAMED, sides=("", ""))
        layout = replace(like, sides=config.responses or like.sides, preferred=config.preferred or like.preferred)
        if not all(layout.sides) or not layout.preferred:
            raise ConfigurationError("input: responses need preferred, and preferred needs responses")
    elif config.scores or config.answers or config.response:
        like = found if found is not None and found.shape is Shape.SCORED else Layout(Shape.SCORED)
        layout = replace(
            like,
            answers=config.answers or like.answers,
            response=config.response or like.response or (None if config.answers else "response"),
            scores=config.scores or like.scores,
        )
        if not layout.scores:
            raise ConfigurationError("input.scores must name a score for at least one objective")
    else:
        assert found is not None
        layout = found
    if config.objectives is not None and layout.shape is not Shape.PAIRS:
        raise ConfigurationError("input.objectives is for pairs; other shapes name objectives by their labels")
    if config.objective is not None and layout.shape is not Shape.PAIRS:
        raise ConfigurationError("input.objective is for pairs; other shapes name objectives by their labels")
    return replace(layout, prompt=config.prompt or layout.prompt, objectives=config.objectives)
