"""Two principals steer a small chat model; look at who paid for which token.

python examples/quickstart.py
"""

from __future__ import annotations

import sys

from pipeline import Aligner

PRINCIPALS = {
    "cheerful": {
        "kind": "prompted",
        "principle": "You are a warm, cheerful and encouraging assistant. You are always positive.",
        "weight": 0.6,
    },
    "brief": {
        "kind": "prompted",
        "principle": "You are a terse assistant. Answer in one short sentence and then stop.",
        "weight": 0.4,
    },
}


def main(model: str = "smollm2-135m") -> None:
    with Aligner(
        model, PRINCIPALS, agent_temperature=0.3, max_new_tokens=32, temperature=0.0, trace="tokens"
    ) as aligner:
        (answer,) = aligner.generate(["Why does ice float on water?"])
        print(answer.text)
        for name, reward in answer.rewards.items():
            print(f"{name}: reward {reward:.2f} nats, paid {answer.payments[name]:.2f}")
        for token in answer.tokens:
            paid = ", ".join(f"{name} {nats:.2f}" for name, nats in token.payments.items() if nats)
            print(f"{token.text!r:>14}  base {token.base_logprob:6.2f}  policy {token.logprob:6.2f}  {paid}")


if __name__ == "__main__":
    main(*sys.argv[1:])
