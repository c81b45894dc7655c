"""`cage advise`: record the games of a few prompts, compare rules on them, and suggest one."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from jobs.commands.text import indented, number, printable, table
from pipeline.advice.settings import AdviseConfig
from pipeline.config.files import dump_config, load_as
from pipeline.errors import ConfigurationError

if TYPE_CHECKING:
    from pipeline.advice.advice import Advice
    from pipeline.advice.recording import RecordedGames


def run_advise(
    config_file: Path, overrides: list[str], *, print_config: bool = False, games_file: Path | None
) -> None:
    """Read the configuration, record or load the games, and print what they say."""
    config = load_as(AdviseConfig, config_file, overrides)
    if print_config:
        sys.stdout.write(dump_config(config))
        return
    from pipeline.advice.advice import advise

    print(describe_advice(advise(config, _games(config, games_file)), config))


def _games(config: AdviseConfig, file: Path | None) -> RecordedGames:
    """The games of `file`, which is written first where it is not there."""
    from pipeline.advice.recording import RecordedGames
    from pipeline.hub.embedded import default_cache_folder
    from pipeline.stages.advise import record_games

    if file is None or not file.exists():
        games = record_games(config, default_cache_folder(os.environ), sys.stderr)
        if file is not None:
            games.save(file)
        return games
    games = RecordedGames.load(file)
    missing = [name for name in config.recording.principals if name not in games.rewards]
    if missing:
        raise ConfigurationError(
            f"{file} holds no games of {', '.join(missing)}; it holds {', '.join(games.rewards)}. Remove it, or name "
            "another file"
        )
    stored, given = games.settings, config.recorded
    if stored and (other := [name for name in given if stored.get(name) != given[name]]):
        raise ConfigurationError(
            f"{file} holds games of a job with another {', '.join(other)}. Remove it, or name another file"
        )
    return games


def describe_advice(advice: Advice, config: AdviseConfig) -> str:
    """What was measured, what every rule gains, and the suggestion with its lines for the configuration."""
    lines = [
        f"{advice.num_prompts:,} prompts, {advice.num_tokens:,} tokens of the base's own answers",
        "",
        _measures(advice),
        *(indented(line) for line in _notes(advice)),
        "",
        _rules(advice),
        indented(
            f"at {advice.target_kl:.3g} nats per token from the base; gain: weighted, in nats per token, in the "
            "views of the objectives; share: of the gain of linear; interval: of the lead over linear, by prompt, "
            "for all rules at once"
        ),
        *(indented(line) for line in _not_reached(advice)),
        "",
        *(indented(line) for line in _suggestion(advice)),
        "",
        *_configuration(advice, config),
    ]
    return "\n".join(lines)


def _measures(advice: Advice) -> str:
    head = ["principal", "spread", "noise", "agreement", "tokens", "steps"]
    rows = [
        [
            printable(name),
            number(each.spread, 2),
            number(each.noise, 2),
            number(each.agreement, 2),
            f"{each.token_share:.0%}",
            f"{each.step_share:.0%}",
        ]
        for name, each in advice.measures.items()
    ]
    return table(head, rows)


def _notes(advice: Advice) -> list[str]:
    found = [
        "spread and noise: of token rewards under the base, in nats, noise being what a second view of the objective "
        "does not share; tokens, steps: the share of the base's mass, and of the steps, that carries the reward"
    ]
    for (one, other), value in advice.correlations.items():
        found.append(f"{one} and {other}: correlation {value:.2f}")
    if advice.unseen:
        found.append(
            f"without a view: {', '.join(advice.unseen)}. Their rewards are taken as free of noise, and then linear "
            "gains most by construction; give advise.views a paraphrase, or a training of another seed"
        )
    return found


def _rules(advice: Advice) -> str:
    names = list(advice.suggested.gains)
    head = ["rule", "temperature", "KL", "gain", "share", "lead over linear", *map(printable, names)]
    rows = []
    for each in advice.rules:
        low, high = each.difference_interval
        is_linear = each is advice.rules[0]
        rows.append(
            [
                str(each.choice),
                f"{each.agent_temperature:.3g}",
                number(each.kl),
                number(each.gain),
                number(each.share, 2),
                "-" if is_linear else f"{each.difference:+.3f} ({low:+.3f} to {high:+.3f})",
                *(number(each.gains[name]) for name in names),
            ]
        )
    return table(head, rows)


def _not_reached(advice: Advice) -> list[str]:
    short = [f"{each.choice} ({each.kl:.3g})" for each in advice.rules if not each.reaches(advice.target_kl)]
    return [f"no agent temperature takes these as far from the base: {', '.join(short)}"] if short else []


def _suggestion(advice: Advice) -> list[str]:
    chosen = advice.suggested
    if advice.is_ahead:
        lead = f"{chosen.share:.2f} times as much as linear"
        if advice.rules[0].gain <= 0:  # a share of a loss says nothing
            lead = f"{chosen.gain:.3g} nats per token where linear gains {advice.rules[0].gain:.3g}"
        return [
            f"suggested: {chosen.choice}, which gains {lead} at the same distance from the base; ahead in "
            f"{advice.confidence:.0%} of the bootstrap samples"
        ]
    return [
        "suggested: linear. No other rule gains more at the same distance from the base beyond what chance explains; "
        f"linear is ahead of the best of them in {advice.confidence:.0%} of the bootstrap samples"
    ]


def _configuration(advice: Advice, config: AdviseConfig) -> list[str]:
    chosen = advice.suggested
    decoding = {
        "rule": str(chosen.choice.rule),
        "agent_temperature": float(f"{chosen.agent_temperature:.3g}"),
        "target_kl": float(f"{advice.target_kl:.3g}"),
    }
    if chosen.choice.k is not None:
        decoding["soft_threshold"] = chosen.choice.k
    return ["in a configuration:", "", yaml.safe_dump({"decoding": decoding}, sort_keys=False).rstrip()]
