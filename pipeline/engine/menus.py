"""The menus of games over blocks and answers: what is proposed, and what each proposal is worth to each principal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import cage
from pipeline.config.sections import DecodingConfig
from pipeline.engine.calls import HostCalls
from pipeline.engine.engine import Ended
from pipeline.engine.prompter import Prompter
from pipeline.engine.reasoning import Turn
from pipeline.engine.row_state import RunningRow
from pipeline.errors import RowError
from pipeline.protocol.messages import TokenOutcome
from pipeline.protocol.topology import Topology
from pipeline.records import Candidate, Message, Proposal


class TextScorer(Protocol):
    """Scores texts as answers to a prompt, in nats; NaN where it has no score."""

    def __call__(self, prompt: Sequence[Message], texts: Sequence[str], num_tokens: Sequence[int]) -> list[float]: ...


class TextScorers(Protocol):
    """Loads what scores texts, by the name of the principal that it belongs to. Picklable."""

    def load(self) -> Mapping[str, TextScorer]: ...


@dataclass(slots=True)
class Path:
    """An answer on its way.

    Args:
        whole: its row, with the tokens that were taken so far.
        games: what the games so far were about.
    """

    whole: RunningRow
    games: list[Proposal] = field(default_factory=list)
    num_games: int = 0


@dataclass(frozen=True, slots=True)
class Choice:
    """Proposals with the same tokens.

    Args:
        tokens: of the proposal, the end token included.
        text: what an answer with it reads like.
        count: how often the base drew it, or the row brings it.
        weight: in the base policy, relative to the others.
        outcomes: of its tokens, as the base drew them.
        rewards: by principal, in nats.
        turn: what a whole answer says, of a base that reasons; None for blocks, and for answers that rows bring.
    """

    tokens: tuple[int, ...]
    text: str
    count: int
    weight: float
    outcomes: tuple[TokenOutcome, ...]
    rewards: tuple[float, ...]
    turn: Turn | None = None


@dataclass(slots=True)
class Menu:
    """The proposals of one game, and the answers that wait for them.

    Args:
        num_waiting: proposals that have not ended.
        prompts: token ids by role that all of them begin with.
        turn_prompts: those before the answer, without the tokens of it that were taken.
        ended: by number.
        given: answers that the row brings, in place of proposals.
        weights: of the row, for roles that take them.
        paths: answers that are to choose among them.
        choices: once they are known.
        left_out: proposals that a principal gives no score.
        prompt: the row's messages.
        taken: tokens of the answer so far.
        error: why there is no choice.
        num_failures: how often a host failed while the proposals were scored.
        original_rewards: of the row's existing answer, where it was scored.
    """

    num_waiting: int
    prompts: Mapping[str, Sequence[int]]
    turn_prompts: Mapping[str, Sequence[int]]
    prompt: Sequence[Message] = ()
    taken: tuple[int, ...] = ()
    given: Sequence[Candidate] = ()
    weights: tuple[float, ...] = ()
    ended: dict[int, Ended] = field(default_factory=dict)
    paths: list[Path] = field(default_factory=list)
    choices: tuple[Choice, ...] | None = None
    left_out: tuple[Choice, ...] = ()
    error: str | None = None
    num_failures: int = 0
    original_rewards: list[float] | None = None


class Valuer:
    """Says what proposals are worth.

    Args:
        calls: to the hosts, which score text for reward models.
        topology: roles and principals.
        prompter: tokens of answers that rows bring.
        decoding: whether reasoning counts.
        scorers: of principals that value text.
    """

    def __init__(
        self,
        calls: HostCalls,
        topology: Topology,
        prompter: Prompter,
        decoding: DecodingConfig,
        scorers: Mapping[str, TextScorer],
    ) -> None:
        self._calls = calls
        self._prompter = prompter
        self._decoding = decoding
        self._names = tuple(principal.name for principal in topology.principals)
        self._scorers = scorers
        self._scores_whole = any(plan.is_reward_model for plan in topology.hosts)

    def choices(self, menu: Menu) -> tuple[Choice, ...]:
        """The different proposals that ended well, in the order in which they were asked for. Raises HostError."""
        if menu.given:
            return self._with_scores(menu, self._given(menu))
        choices: dict[tuple[int, ...], Choice] = {}
        for _, ended in sorted(menu.ended.items()):
            running = ended.running
            if running.original_rewards is not None:
                scores = self.scores_of(menu.prompt, running.row.response or "")
                by_name = zip(self._names, running.original_rewards, strict=True)
                original = [scores.get(name, reward) for name, reward in by_name]
                # an answer that a judge gives no score cannot be compared
                menu.original_rewards = original if all(map(math.isfinite, original)) else None
            if ended.error is not None:
                menu.error = ended.error
                continue
            tokens = tuple(running.tokens)
            if tokens in choices:
                count = choices[tokens].count + 1
                choices[tokens] = replace(choices[tokens], count=count, weight=count)
                continue
            assert ended.turn is not None
            rewards = self._rewards(menu, running, ended.turn.num_reasoning_tokens)
            turn = None if running.reasoning is None else ended.turn
            choices[tokens] = Choice(tokens, ended.turn.text, 1, 1.0, tuple(running.outcomes), rewards, turn)
        menu.ended.clear()
        return self._with_scores(menu, list(choices.values()))

    def _given(self, menu: Menu) -> list[Choice]:
        """The different answers that a row brings; none where a model cannot read one, as the game is about all."""
        choices: dict[str, Choice] = {}
        left = self._prompter.context_left(menu.prompts)
        for candidate in menu.given:
            if (known := choices.get(candidate.text)) is not None:
                weight = known.weight + candidate.weight
                choices[candidate.text] = replace(known, count=known.count + 1, weight=weight)
                continue
            try:
                tokens = tuple(self._prompter.encode_answer(candidate.text))
            except RowError as error:
                menu.error = str(error)
                return []
            if left is not None and len(tokens) > left:
                menu.error = f"a candidate has {len(tokens)} tokens and the context holds {left} after the prompt"
                return []
            rewards: tuple[float, ...] = ()
            if self._names:
                rewards = tuple(self._calls.score(menu.prompts, tokens, menu.weights).result())
            outcomes = tuple(_unseen(token, len(self._names)) for token in tokens)
            choices[candidate.text] = Choice(tokens, candidate.text, 1, candidate.weight, outcomes, rewards)
        return [choice for choice in choices.values() if choice.weight > 0]

    def _with_scores(self, menu: Menu, choices: list[Choice]) -> tuple[Choice, ...]:
        """Choices with the rewards of principals that value text: what each adds to the score so far."""
        if not self._scorers or not choices:
            return tuple(choices)
        before, num_before = self._answer_of(menu, menu.taken)
        judged = [self._judged(menu, choice) for choice in choices]
        texts, num_tokens = [text for text, _ in judged], [count for _, count in judged]
        for name, scorer in self._scorers.items():
            at = self._names.index(name)
            so_far = scorer(menu.prompt, [before], [num_before])[0] if before else 0.0
            for index, score in enumerate(scorer(menu.prompt, texts, num_tokens)):
                rewards = list(choices[index].rewards)
                rewards[at] = score - so_far
                choices[index] = replace(choices[index], rewards=tuple(rewards))
        with_scores: list[Choice] = []
        left_out: list[Choice] = []
        is_final = True
        for choice in choices:
            by_name = zip(self._names, choice.rewards, strict=True)
            missing = {name: reward for name, reward in by_name if not math.isfinite(reward)}
            (left_out if missing else with_scores).append(choice)
            for name, reward in missing.items():
                if is_final:
                    menu.error = f"{name} gives no score: {getattr(reward, 'reason', f'it is {float(reward)}')}"
                # a game without proposals that may be scored later would depend on when it is played
                is_final = is_final and getattr(reward, "is_final", True)
        menu.left_out = tuple(left_out)
        return tuple(with_scores) if is_final else ()

    def _judged(self, menu: Menu, choice: Choice) -> tuple[str, int]:
        """What a user reads of the answer with a proposal, and how many tokens that is: without reasoning."""
        in_answers = self._decoding.thinking.in_answers
        if menu.given:
            text = choice.text if in_answers else self._prompter.without_reasoning(choice.text)
            return text, len(choice.tokens)
        if choice.turn is not None and not in_answers:
            turn = choice.turn
            return turn.answer if turn.is_closed else "", len(choice.tokens) - turn.num_reasoning_tokens
        if choice.turn is not None:
            return choice.text, len(choice.tokens)
        # all tokens are read together, as a character may begin before the block
        text, num_tokens = self._answer_of(menu, [*menu.taken, *choice.tokens])
        num_cut = max(0, len(self._prompter.decode(choice.tokens)) - len(choice.text))  # by a stop string
        return text[: max(0, len(text) - num_cut)], num_tokens

    def _answer_of(self, menu: Menu, tokens: Sequence[int]) -> tuple[str, int]:
        """What a user reads of these first tokens of an answer, and how many tokens that is."""
        in_answers = self._decoding.thinking.in_answers
        track = None if in_answers else self._prompter.begin_turn(menu.prompt, menu.turn_prompts)
        if track is None or not tokens:
            return self._prompter.decode(tokens), len(tokens)
        for count in range(1, len(tokens) + 1):
            track.advance(tokens[:count])
        is_ended = tokens[-1] in self._prompter.stop_ids and track.num_closed != len(tokens)
        turn = track.read(tokens[:-1] if is_ended else tokens)
        return turn.answer if turn.is_closed else "", len(tokens) - turn.num_reasoning_tokens

    def scores_of(self, prompt: Sequence[Message], text: str) -> dict[str, float]:
        """What principals that value text give for a whole answer, by name."""
        if not self._scorers:
            return {}
        text = text if self._decoding.thinking.in_answers else self._prompter.without_reasoning(text)
        num_tokens = len(self._prompter.encode_answer(text))
        return {name: scorer(prompt, [text], [num_tokens])[0] for name, scorer in self._scorers.items()}

    def _rewards(self, menu: Menu, running: RunningRow, num_reasoning: int) -> tuple[float, ...]:
        """What a proposal adds to each principal's reward, without its reasoning.

        Reward models are asked about the text as a whole: token by token they see the likeliest candidates alone.
        """
        first = 0 if self._decoding.thinking.in_answers else num_reasoning
        if self._scores_whole:
            weights = running.terms.weights
            return tuple(self._calls.score(menu.prompts, running.tokens, weights, first).result())
        return tuple(running.sums([outcome.rewards for outcome in running.outcomes[first:]]))


def _unseen(token_id: int, num_principals: int) -> TokenOutcome:
    """A token that no base drew: it has no log-probability, and what it is worth counts at the answer's end."""
    return TokenOutcome(
        token_id=token_id,
        rewards=[0.0] * num_principals,
        payments=None,
        thresholds=None,
        base_logprob=math.nan,
        logprob=math.nan,
        kl=0.0,
        covered_mass=math.nan,
        residual=0.0,
        status=int(cage.Status.CONVERGED),
        num_steps=0,
    )
