"""Facts about a run: the head of the report, its principals, its settings, and the health of its solver."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from pipeline.reporting.tally import Summary, Tally
from pipeline.reporting.text import NOTHING, number, plain, visible
from pipeline.storage.run import Run


def describe_facts(run: Run, tally: Tally) -> dict[str, Any]:
    """Title, counts, and pairs of label and value.

    The only time is that of the last commit, so that the same files give the same report.
    """
    status, plan, print_ = run.status(), run.plan, run.plan.fingerprint
    last = status.last_commit_at
    base = plan.config.get("base", {})
    temperatures = _span(list(tally.by_rule.values()), "agent_temperature")
    facts = [
        ("Base model", f"{plain(base.get('model'))} ({plain(plan.models.get('base', 'not resolved'))})"),
        ("Rule", ", ".join(tally.by_rule) or plain(print_.get("decoding.rule"))),
        ("Agent temperature", temperatures or f"{plain(print_.get('decoding.agent_temperature'))} nats"),
        (
            "Draw",
            f"temperature {plain(print_.get('decoding.temperature'))}, top-p {plain(print_.get('decoding.top_p'))}, "
            f"seed {plain(print_.get('decoding.seed'))}, candidates {plain(print_.get('decoding.candidates'))}",
        ),
        ("Input", ", ".join(f"{visible(file.name)} ({file.num_rows:,} rows)" for file in plan.files[:5])),
        ("Tokens", f"{status.tokens:,}" + _speed(status.tokens, status.seconds)),
        ("Shards", f"{status.shards_done:,} of {status.num_shards:,} committed"),
        ("Last commit", NOTHING if last is None else f"{datetime.fromtimestamp(last, UTC):%Y-%m-%d %H:%M} UTC"),
        ("Program", f"version {plain(print_.get('code.version'))}"),
        *(("Warning", visible(line)) for line in status.silent.values()),
    ]
    return {
        "title": visible(status.path.rstrip("/").rpartition("/")[2]),
        "is_complete": status.is_complete,
        "counts": [
            ("prompts", plan.num_rows),
            ("answers", status.rows_aligned),
            ("failed", status.rows_failed),
            ("tokens", status.tokens),
        ],
        "pairs": [(label, value) for label, value in facts if value],
        "fingerprint": plan.digest,
    }


def describe_principals(run: Run) -> list[dict[str, str]]:
    """Each principal's kind, configured weight, and its principle or models."""
    configured = run.plan.config.get("principals", {})
    is_grid = bool(run.plan.config.get("grid", {}).get("weights"))
    return [
        {
            "name": name,
            "kind": plain(section.get("kind")),
            "weight": "weights of the grid" if is_grid else f"weight {plain(section.get('weight'))}",
            "asks": visible(section.get("principle") or _models(run.plan.models, name)),
        }
        for name, section in ((name, configured.get(name, {})) for name in run.plan.principal_names)
    ]


def describe_settings(run: Run) -> list[tuple[str, str]]:
    """The fields of the fingerprint that are not null."""
    fields = sorted(run.plan.fingerprint.items())
    return [(visible(key), plain(value)) for key, value in fields if value is not None]


def describe_health(tally: Tally, principal_names: Sequence[str]) -> list[dict[str, Any]]:
    """One entry per rule: how well its games were solved, and what each principal paid."""
    return [
        {
            "rule": visible(rule),
            "answers": summary.rows,
            "tokens": int(summary.sums.get("num_tokens", 0)),
            "unsolved": int(summary.sums.get("num_unsolved", 0)),
            "residual": summary.highs.get("max_residual"),
            "steps": summary.mean("solver_steps"),
            "covered": summary.mean("covered_mass"),
            "covered_low": summary.lows.get("covered_mass"),
            "kl": summary.mean("kl_per_token"),
            "principals": _paid(summary, principal_names),
        }
        for rule, summary in tally.by_rule.items()
    ]


def _paid(summary: Summary, principal_names: Sequence[str]) -> list[dict[str, Any]]:
    """By principal: mean reward and payment per answer, payment per token, share of all payments."""
    total = sum(summary.sums.get(f"payments.{name}", 0.0) for name in principal_names)
    tokens = summary.sums.get("num_tokens", 0.0)
    entries = []
    for name in principal_names:
        paid = summary.sums.get(f"payments.{name}")
        entries.append(
            {
                "name": name,
                "reward": summary.mean(f"rewards.{name}"),
                "paid": summary.mean(f"payments.{name}"),
                "per_token": None if paid is None or not tokens else paid / tokens,
                "share": None if paid is None or not total else paid / total,
            }
        )
    return entries


def _models(models: Mapping[str, str], name: str) -> str:
    place = f"principals.{name}."
    return "; ".join(f"{key.removeprefix(place)} {value}" for key, value in models.items() if key.startswith(place))


def _span(summaries: Sequence[Summary], name: str) -> str:
    lows = [summary.lows[name] for summary in summaries if name in summary.lows]
    highs = [summary.highs[name] for summary in summaries if name in summary.highs]
    if not lows:
        return ""
    low, high = min(lows), max(highs)
    return f"{low:g} nats" if low == high else f"{low:g} to {high:g} nats"


def _speed(tokens: int, seconds: float) -> str:
    return f", {number(tokens / seconds, 1)} per second and replica" if seconds > 0 and tokens else ""
