"""`cage inspect`: one row of a run, for people, from its files alone."""

from __future__ import annotations

from typing import Any

from jobs.commands.text import indented, number, printable, table
from pipeline.errors import ConfigurationError
from pipeline.records import FinishReason
from pipeline.storage.run import Run

SHOWN_TOKENS = 400
SHOWN_GIVEN = 2000  # characters


def run_inspect(path: str, row_id: str) -> None:
    run = Run.open(path)
    rows = run.find(row_id)
    if not rows:
        committed = len(run.committed())
        raise ConfigurationError(
            f"no row {row_id!r} in {run.store.path} ({committed} of {len(run.plan.shards)} shards are committed)"
        )
    print("\n\n".join(describe_row(row) for row in rows))


def describe_row(row: dict[str, Any]) -> str:
    """The conversation, the answer, a table by principal, the numbers, and traced tokens if there are any."""
    parts = [f"row {printable(row['row_id'])}, sample {row['sample']}{_variant(row)}"]
    parts += [f"{printable(message['role'])}:\n{indented(message['content'])}" for message in row["prompt"] or []]
    if row["error"] is not None:
        return "\n".join([*parts, f"failed: {printable(row['error'])}", *_origin(row)])
    if row.get("reasoning") is not None:
        parts.append(f"reasoning ({row['num_reasoning_tokens']} tokens):\n{indented(row['reasoning'])}")
    ending = FinishReason(row["finish_reason"]).words
    parts.append(f"answer ({ending}, {row['num_tokens']} tokens):\n{indented(row['response'])}")
    if row.get("original_response") is not None:
        parts.append(f"original answer:\n{indented(row['original_response'])}")
    if row.get("weights"):
        parts.append(_principals(row))
    parts.append(
        f"KL to the base {number(row['kl_per_token'])} nats per token, candidates cover "
        f"{number(row['covered_mass'])} of the base, largest residual {_scientific(row['max_residual'])}, "
        f"{row['num_unsolved']} unsolved steps"
    )
    if row.get("tokens"):
        parts.append(_tokens(row["tokens"]))
    return "\n".join(parts)


def _origin(row: dict[str, Any]) -> list[str]:
    """Where a failed row stands in the input, and what it was given where it could not be read."""
    lines = []
    if row.get("input_file") is not None:
        lines.append(f"input: {printable(row['input_file'])}, row {row['input_row']}")
    if row.get("given") is not None:
        given = row["given"] if len(row["given"]) <= SHOWN_GIVEN else row["given"][:SHOWN_GIVEN] + " ..."
        lines.append(f"given:\n{indented(given)}")
    return lines


def _variant(row: dict[str, Any]) -> str:
    if row.get("variant") is None:
        return ""
    return f", variant {row['variant']} ({row['rule']}, agent temperature {row['agent_temperature']:g})"


def _principals(row: dict[str, Any]) -> str:
    original = row.get("original_rewards") or {}
    head = ["principal", "weight", "reward", "paid"] + (["original reward"] if original else [])
    lines = [
        [printable(name), f"{weight:g}", number(row["rewards"][name]), number(row["payments"][name])]
        + ([number(original[name])] if original else [])
        for name, weight in row["weights"].items()
    ]
    return table(head, lines) + "\n(rewards and payments in nats, summed over the answer)"


def _tokens(tokens: list[dict[str, Any]]) -> str:
    names = list((tokens[0].get("payments") or {}).keys())
    lines = [
        [repr(printable(token["text"])), number(token["base_logprob"], 2), number(token["logprob"], 2)]
        + [number(token["payments"][name], 2) for name in names]
        for token in tokens[:SHOWN_TOKENS]
    ]
    text = table(["token", "base", "final", *(f"paid by {printable(name)}" for name in names)], lines)
    left = len(tokens) - SHOWN_TOKENS
    return text + (f"\n... and {left} more tokens" if left > 0 else "")


def _scientific(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"
