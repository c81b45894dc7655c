"""Align inside a Ray Data pipeline of your own: one aligner in each actor.

    python examples/ray_data.py

`cage relabel` is the better choice for long runs: it resumes, commits exactly once and spreads models over devices.
"""

from __future__ import annotations

import sys

import ray

from pipeline import AlignBatch

PRINCIPALS = {"brief": {"kind": "prompted", "principle": "Answer in one short sentence and then stop."}}
PROMPTS = ["Why is the sky blue?", "What is a haiku?", "How do magnets work?", "Why do we yawn?"]


def main(model: str = "smollm2-135m") -> None:
    rows = ray.data.from_items([{"id": str(at), "prompt": prompt} for at, prompt in enumerate(PROMPTS)])
    answered = rows.map_batches(
        AlignBatch,
        fn_constructor_args=(model, PRINCIPALS),
        fn_constructor_kwargs={"agent_temperature": 0.3, "max_new_tokens": 24, "temperature": 0.0},
        batch_size=2,
        compute=ray.data.ActorPoolStrategy(size=1),  # one replica per actor; give each num_gpus=1 on a cluster
        num_cpus=1,
    )
    for row in sorted(answered.take_all(), key=lambda row: row["id"]):
        print(f"{row['prompt']}  ->  {row['response']}  ({row['finish_reason']}, {row['num_tokens']} tokens)")


if __name__ == "__main__":
    main(*sys.argv[1:])
