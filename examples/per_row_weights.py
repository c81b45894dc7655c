"""Every prompt has its own preference weights; rows of all weights share one batch.

python examples/per_row_weights.py
"""

from __future__ import annotations

import sys

from pipeline import Aligner

PRINCIPALS = {
    "cheerful": {"kind": "prompted", "principle": "You are warm, cheerful and encouraging."},
    "brief": {"kind": "prompted", "principle": "Answer in one short sentence and then stop."},
}
WEIGHTS = [{"cheerful": share, "brief": 1 - share} for share in (0.0, 0.25, 0.5, 0.75, 1.0)]


def main(model: str = "smollm2-135m") -> None:
    with Aligner(model, PRINCIPALS, agent_temperature=0.2, max_new_tokens=32, temperature=0.0) as aligner:
        prompt = "How do I start to learn the guitar?"
        answers = aligner.generate([prompt] * len(WEIGHTS), weights=WEIGHTS)
        for weights, answer in zip(WEIGHTS, answers, strict=True):
            print(f"cheerful {weights['cheerful']:.2f}, {answer.num_tokens} tokens: {answer.text}")


if __name__ == "__main__":
    main(*sys.argv[1:])
