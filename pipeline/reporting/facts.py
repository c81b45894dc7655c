"""Facts about a run: the head of the report, its principals, its settings, and the health of its solver."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from pipeline.reporting.columns import UNANSWERED
from pipeline.reporting.tally import Summary, Tally
from pipeline.reporting.text import NOTHING, decimal, number, plain, visible
from pipeline.storage.run import Run

MANY_CUT = 0.05  # the share of answers cut at their limit from which the report warns


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
        ("Reasoning", _reasoning(list(tally.by_rule.values()))),
        ("Shards", f"{status.shards_done:,} of {status.num_shards:,} committed"),
        ("Last commit", NOTHING if last is None else f"{datetime.fromtimestamp(last, UTC):%Y-%m-%d %H:%M} UTC"),
        ("Program", f"version {plain(print_.get('code.version'))}"),
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
        "warnings": [*(visible(line) for line in status.silent.values()), *_cut_warnings(run, tally)],
        "fingerprint": plan.digest,
    }


def describe_principals(run: Run, tally: Tally) -> list[dict[str, str]]:
    """Each principal's kind, its weights, and its principle or models."""
    configured = run.plan.config.get("principals", {})
    return [
        {
            "name": name,
            "kind": plain(section.get("kind")),
            "weight": _weights(run, tally, name, plain(section.get("weight"))),
            "asks": visible(section.get("principle") or _models(run.plan.models, name)),
        }
        for name, section in ((name, configured.get(name, {})) for name in run.plan.principal_names)
    ]


def has_row_weights(run: Run) -> bool:
    """Whether rows bring their own weights, which a grid of weights replaces."""
    return bool(run.plan.config.get("input", {}).get("weights")) and not _has_weight_grid(run)


def _has_weight_grid(run: Run) -> bool:
    return bool(run.plan.config.get("grid", {}).get("weights"))


def _weights(run: Run, tally: Tally, name: str, configured: str) -> str:
    if _has_weight_grid(run):
        return "weights of the grid"
    if not has_row_weights(run) or not tally.rows:
        return f"weight {configured}"
    column, summaries = f"weights.{name}", tally.by_rule.values()
    low, high = min(each.lows[column] for each in summaries), max(each.highs[column] for each in summaries)
    mean = sum(each.sums[column] for each in summaries) / sum(each.counts[column] for each in summaries)
    if low == high:
        return f"weight {plain(low)} in every row"
    span = f"{decimal(low, 2)} to {decimal(high, 2)}, mean {decimal(mean, 2)}"
    return f"weights of the rows: {span}; {configured} where a row has none"


def describe_endings(tally: Tally) -> list[dict[str, Any]]:
    """One entry per rule: how many answers were cut at their length limit."""
    return [
        {
            "rule": visible(rule),
            "answers": summary.rows,
            "cut": int(summary.sums.get("is_cut", 0)),
            "share": summary.mean("is_cut") or 0.0,
            "tokens": summary.mean("num_tokens"),
            "longest": None if "num_tokens" not in summary.highs else int(summary.highs["num_tokens"]),
        }
        for rule, summary in tally.by_rule.items()
    ]


def _cut_warnings(run: Run, tally: Tally) -> list[str]:
    """A line where so many answers were cut that the numbers of the run are those of parts of answers."""
    cut = int(sum(summary.sums.get("is_cut", 0) for summary in tally.by_rule.values()))
    if cut <= MANY_CUT * tally.rows:
        return []
    limit = plain(run.plan.config.get("decoding", {}).get("max_new_tokens"))
    return [
        f"{cut:,} of {tally.rows:,} answers ({100 * cut / tally.rows:.0f} %) were cut at max_new_tokens ({limit}, "
        "less where a row or the context allows less). They end in the middle, and their rewards are those of a "
        'part. Raise decoding.max_new_tokens, or leave out rows whose finish_reason is "length".'
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


def _reasoning(summaries: Sequence[Summary]) -> str:
    """How long answers reasoned and how many ended within their reasoning; empty where the base does not reason."""
    rows = sum(summary.counts.get(UNANSWERED, 0) for summary in summaries)
    if not rows:
        return ""
    tokens = sum(summary.sums.get("num_reasoning_tokens", 0.0) for summary in summaries)
    unanswered = int(sum(summary.sums.get(UNANSWERED, 0.0) for summary in summaries))
    share = f"; {unanswered:,} of {rows:,} answers ended within it and have no text" if unanswered else ""
    return f"{number(tokens / rows, 1)} tokens per answer{share}"


def _span(summaries: Sequence[Summary], name: str) -> str:
    lows = [summary.lows[name] for summary in summaries if name in summary.lows]
    highs = [summary.highs[name] for summary in summaries if name in summary.highs]
    if not lows:
        return ""
    low, high = min(lows), max(highs)
    return f"{low:g} nats" if low == high else f"{low:g} to {high:g} nats"


def _speed(tokens: int, seconds: float) -> str:
    return f", {number(tokens / seconds, 1)} per second and replica" if seconds > 0 and tokens else ""
