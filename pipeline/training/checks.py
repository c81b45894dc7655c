"""What a trained principal is worth: accuracy, margins and calibration on pairs that it was not trained on.

N pairs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.training.data import EncodedPair

NUM_BINS = 5
NUM_EXAMPLES = 3
SHOWN = 300  # characters of a text


@dataclass(frozen=True, slots=True)
class PairScore:
    """The rewards of one pair, in nats.

    Args:
        better, worse: log-likelihoods of both answers under the trained model.
        better_before, worse_before: the same under the backbone.
        num_better, num_worse: tokens of both.
    """

    better: float
    worse: float
    better_before: float
    worse_before: float
    num_better: int
    num_worse: int

    @property
    def margin(self) -> float:
        """By which the better answer is likelier under the trained model."""
        return self.better - self.worse

    @property
    def margin_to_backbone(self) -> float:
        """By which training made the better answer likelier than the worse one."""
        return self.margin - (self.better_before - self.worse_before)

    def per_token(self) -> PairScore:
        """The same as means over tokens."""
        one, other = self.num_better, self.num_worse
        return PairScore(
            self.better / one, self.worse / other, self.better_before / one, self.worse_before / other, one, other
        )


def accuracy(margins: Sequence[float]) -> float:
    """The share of pairs whose better answer has the higher reward; an equal reward is half right."""
    return sum(1.0 if margin > 0 else 0.5 if margin == 0 else 0.0 for margin in margins) / len(margins)


def standard_error(share: float, count: int) -> float:
    """Of a share of independent pairs."""
    return math.sqrt(share * (1 - share) / count)


def calibrate(margins: Sequence[float], beta: float) -> dict[str, Any]:
    """How often the model is right where it says that it is so sure.

    Args:
        margins: reward margins.
        beta: a margin m means a probability of sigmoid(beta m) that the better answer is better.

    Returns:
        Bins of confidence from 0.5 to 1 with the mean confidence, the share of right pairs and the number in each;
        and the expected calibration error, the mean distance of the two.
    """
    bins: list[list[tuple[float, bool]]] = [[] for _ in range(NUM_BINS)]
    for margin in margins:
        confidence = 1 / (1 + math.exp(-min(beta * abs(margin), 700)))
        bins[min(int((confidence - 0.5) * 2 * NUM_BINS), NUM_BINS - 1)].append((confidence, margin > 0))
    rows = []
    for index, found in enumerate(bins):
        if found:
            mean = sum(confidence for confidence, _ in found) / len(found)
            right = sum(is_right for _, is_right in found) / len(found)
            low = 0.5 + index / (2 * NUM_BINS)
            rows.append({"from": low, "confidence": mean, "right": right, "pairs": len(found)})
    error = sum(abs(row["confidence"] - row["right"]) * row["pairs"] for row in rows) / len(margins)
    return {"bins": rows, "expected_error": error}


def summarise(scores: Sequence[PairScore], *, beta: float, is_policy: bool, per_token: bool) -> dict[str, Any]:
    """The measurements of a report.

    Args:
        scores: of held-out pairs.
        beta: of the loss.
        is_policy: whether the loss compares with the backbone, as DPO's does; an ARM's does not.
        per_token: whether the loss compares means over tokens.
    """
    used = [score.per_token() for score in scores] if per_token else list(scores)
    own = [score.margin for score in used]
    to_backbone = [score.margin_to_backbone for score in used]
    before = [score.better_before - score.worse_before for score in used]
    trained = to_backbone if is_policy else own
    losses = [math.log1p(math.exp(-min(max(beta * margin, -700), 700))) for margin in trained]
    return {
        "pairs": len(scores),
        "accuracy": {
            "none": accuracy(own),
            "backbone": accuracy(to_backbone),
            "untrained": accuracy(before),
            "shorter": accuracy([score.num_worse - score.num_better for score in scores]),
        },
        "standard_error": standard_error(accuracy(trained), len(scores)),
        "loss": sum(losses) / len(losses),
        "margin": {"none": sum(own) / len(own), "backbone": sum(to_backbone) / len(own)},
        "calibration": calibrate(trained, beta),
    }


def pick_examples(pairs: Sequence[EncodedPair], margins: Sequence[float], objective: str) -> list[dict[str, Any]]:
    """The pairs with the widest margins in both directions, one for each prompt."""
    ordered = sorted(range(len(pairs)), key=lambda at: margins[at])
    picked = [*_of_other_prompts(pairs, [at for at in reversed(ordered) if margins[at] > 0])]
    picked += _of_other_prompts(pairs, [at for at in ordered if margins[at] <= 0])
    examples = []
    for at in picked:
        comparison = pairs[at].comparison
        better = comparison.labels[objective]
        examples.append(
            {
                "margin": margins[at],
                "prompt": shorten(str(comparison.prompt[-1]["content"])),
                "better": shorten(comparison.answers[better].text),
                "worse": shorten(comparison.answers[1 - better].text),
            }
        )
    return examples


def _of_other_prompts(pairs: Sequence[EncodedPair], ordered: Sequence[int]) -> list[int]:
    """The first ones, each with a prompt of its own."""
    found: dict[str, int] = {}
    for at in ordered:
        found.setdefault(str(pairs[at].comparison.prompt), at)
    return list(found.values())[:NUM_EXAMPLES]


def shorten(text: str) -> str:
    """A text as a report shows it: on one line, cut."""
    line = " ".join(text.split())
    return line if len(line) <= SHOWN else line[: SHOWN - 3] + "..."
