"""Descriptions of a finished run: the manifest for programs, the data set card for people."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import yaml

from pipeline.inputs.kept import from_text
from pipeline.monitoring.counts import Recoveries
from pipeline.storage.commits import CommitRecord
from pipeline.storage.names import PAIRS
from pipeline.storage.pairs import has_pairs
from pipeline.storage.plan import Plan
from pipeline.storage.tables import output_schema

COLUMN_NOTES = {
    "row_id": "the input row",
    "sample": "which of the row's samples, from 0",
    "variant": "which of the run's ways to answer a row, from 0",
    "rule": "how base and rewards became a policy",
    "agent_temperature": "of the rule, in nats of weighted reward",
    "game_unit": "what its games were about: token, block or answer",
    "draw_temperature": "of the draw from the policy",
    "prompt": "the conversation that was answered",
    "completion": "the answer, as one assistant message",
    "reasoning": "what the model wrote before the answer; null where it wrote none",
    "num_reasoning_tokens": "tokens drawn before the answer, markers included",
    "messages": "prompt and answer",
    "response": "the answer's text",
    "finish_reason": "stop, length (cut at max_new_tokens) or reasoning (ended in its reasoning, without an answer)",
    "num_tokens": "tokens drawn, reasoning and end token included",
    "weights": "weight of each principal",
    "rewards": "by principal: sum of the token reward q over the answer, in nats, before weights",
    "payments": "by principal: what it paid for the answer's tokens, in nats",
    "kl_per_token": "divergence of the policy from the base, nats per token",
    "covered_mass": "mean probability of the base on the candidates",
    "max_residual": "largest certificate residual of the solved games",
    "num_unsolved": "tokens whose game was not solved to tolerance",
    "solver_steps": "mean number of the solver's steps per token",
    "error": "null here; failed rows have the reason",
    "tools": "the tools that the model could call, as JSON text",
    "original_response": "the input's answer",
    "original_rewards": "rewards of the input's answer",
    "chosen": "the answer with the higher weighted reward",
    "rejected": "the other answer",
    "proposals": "the blocks or answers that games were about: text, how often the base drew it, its final "
    "probability, its rewards (null where a principal gives no score), and whether it was chosen",
    "tokens": "the drawn tokens with log-probabilities, payments and thresholds",
}


LOADING_PAIRS = (
    'pairs = load_dataset("RUN", "pairs", split="train")\n```\n\n'
    "Trainers of preferences, such as TRL's DPOTrainer, are given `pairs`: every row of it has `chosen` and "
    "`rejected`. In the rows above both are null where there was no existing answer, which such trainers refuse; "
    "SFTTrainer reads them."
)


def render_loading(plan: Plan) -> bytes:
    """.huggingface.yaml: names the data files to `datasets`."""
    return yaml.safe_dump(_data_files(plan), sort_keys=False).encode()


def render_manifest(
    plan: Plan,
    records: Mapping[int, CommitRecord],
    errors: Mapping[str, int],
    recoveries: Recoveries,
    extra: Mapping[str, Any],
) -> bytes:
    """_manifest.json: every file that counts, with its hash, and what the run was."""
    ordered = [records[index] for index in sorted(records)]
    tree = {
        "fingerprint_digest": plan.digest,
        "fingerprint": dict(plan.fingerprint),
        "num_input_rows": plan.num_rows,
        "rows_aligned": sum(record.rows for record in ordered),
        "rows_failed": sum(record.failed for record in ordered),
        "tokens": sum(record.tokens for record in ordered),
        "errors": dict(errors),
        "recoveries": asdict(recoveries),
        "files": [
            {"name": name, "sha256": digest, "shard": record.shard}
            for record in ordered
            for name, digest in record.sha256_by_file.items()
        ],
        "extra": dict(extra),
    }
    return json.dumps(tree, ensure_ascii=False, allow_nan=False, indent=1).encode() + b"\n"


def render_card(plan: Plan, records: Mapping[int, CommitRecord], errors: Mapping[str, int]) -> bytes:
    """_README.md: a data set card, README.md once it is on the hub. Values from outside are escaped."""
    names = _column_names(plan)
    kept_names = getattr(from_text(plan.kept), "names", [])
    kept = [(name, "of the input, as it was") for name in kept_names]
    front = {**_data_files(plan), "tags": ["alignment", "common-agency", "synthetic"]}
    rows = sum(record.rows for record in records.values())
    failed = sum(record.failed for record in records.values())
    tokens = sum(record.tokens for record in records.values())
    shown = {key: value for key, value in plan.fingerprint.items() if not key.startswith("input.files.")}
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n",
        "# Answers aligned at decoding time",
        f"{rows:,} answers of {tokens:,} tokens to {plan.num_rows:,} prompts, in {len(plan.shards):,} files; "
        f"{failed:,} failed, with their reasons, in `_failed/`.",
        "## How to load it\n\n```python\nfrom datasets import load_dataset\n\n"
        'rows = load_dataset("RUN", split="train")  # this folder, or its name on the hub\n'
        + (LOADING_PAIRS if has_pairs(names) else "```"),
        "## Columns\n\n" + _table(("column", "what"), [(name, COLUMN_NOTES[name]) for name in names] + kept),
        "## Models\n\n" + _table(("place", "identity"), list(plan.models.items())),
        "## Input\n\n" + _table(("file", "rows"), [(file.name, f"{file.num_rows:,}") for file in plan.files[:100]]),
        "## Settings\n\n" + _table(("setting", "value"), [(key, _plain(value)) for key, value in shown.items()]),
    ]
    if errors:
        counts = [(reason, f"{count:,}") for reason, count in errors.items()]
        parts.append("## Failed rows\n\n" + _table(("reason", "rows"), counts))
    parts.append(f"Fingerprint `{plan.digest}`; every file's SHA-256 is in `_manifest.json`.")
    return ("\n\n".join(parts) + "\n").encode("utf-8", errors="backslashreplace")


def _data_files(plan: Plan) -> dict[str, Any]:
    """The configurations that `load_dataset` knows, with their files."""
    patterns = {"default": "part-*.parquet"}
    if has_pairs(_column_names(plan)):
        patterns["pairs"] = f"{PAIRS}part-*.parquet"
    return {
        "configs": [
            {"config_name": name, "data_files": [{"split": "train", "path": pattern}]}
            for name, pattern in patterns.items()
        ]
    }


def _column_names(plan: Plan) -> list[str]:
    schema = output_schema(
        plan.principal_names,
        trace=plan.trace,
        has_response=plan.has_response,
        has_variants=plan.has_variants,
        has_units=plan.has_units,
        has_temperatures=plan.has_temperatures,
        has_tools=plan.has_tools,
        has_reasoning=plan.reasoning is not None,
        has_proposals=plan.has_proposals,
    )
    return list(schema.names)


def _table(head: tuple[str, str], rows: list[tuple[str, str]]) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "|---|---|"]
    lines += [f"| {escape_markdown(left)} | {escape_markdown(right)} |" for left, right in rows]
    return "\n".join(lines)


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def escape_markdown(text: str) -> str:
    """Text that shows as itself in Markdown and HTML, on one line, without control characters."""
    text = "".join(char if char.isprintable() else f"\\u{ord(char):04x}" for char in text)
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|#!~$])", r"\\\1", text)
