"""Compare rules by a judge of your own: any Python function that scores answers.

    python examples/own_scorer.py

The run is in runs/own_scorer, with answers, scores, metrics and a report; the same command continues it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from pipeline.config.files import parse_as
from pipeline.evaluation.config import EvaluateConfig
from pipeline.evaluation.judges.interface import JudgedAnswer
from pipeline.hub.embedded import default_cache_folder
from pipeline.stages.evaluate import evaluate


def enthusiasm(answers: Sequence[JudgedAnswer]) -> list[float]:
    """Exclamation marks per word: one score per answer, a higher one is better."""
    return [answer.text.count("!") / max(1, len(answer.text.split())) for answer in answers]


def main(model: str = "smollm2-135m", output: str = "runs/own_scorer") -> None:
    config = parse_as(
        EvaluateConfig,
        {
            "input": {"path": "configs/data/prompts.jsonl", "prompt": "prompt", "id": "id", "limit": 6},
            "output": {"path": output},
            "base": model,
            "principals": {
                "cheerful": {"kind": "prompted", "principle": "You are warm, cheerful and encouraging."},
                "brief": {"kind": "prompted", "principle": "Answer in one short sentence and then stop."},
            },
            "decoding": {"agent_temperature": 0.2, "max_new_tokens": 24, "temperature": 0.0},
            "grid": {"rules": ["equilibrium", "linear"], "weights": {"step": 0.5}},
            "evaluation": {
                "judges": {"enthusiasm": enthusiasm, "brevity": {"kind": "brevity"}},
                "objectives": {"cheerful": "enthusiasm", "brief": "brevity"},
            },
            "cluster": {"transport": "local"},
        },
    )
    evaluation = evaluate(config, default_cache_folder(os.environ), sys.stderr)
    for sentence in evaluation.metrics["reading"]:
        print(sentence)


if __name__ == "__main__":
    main(*sys.argv[1:])
