"""One row while it is decoded: its tokens, its sums, and the record that they become."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from cage import Status
from pipeline.engine.prompter import Prompter
from pipeline.engine.reasoning import ReasoningTrack, Turn
from pipeline.protocol.hosts import Reply
from pipeline.protocol.messages import CHUNK, DRAWN, Terms, TokenOutcome, num_parts
from pipeline.records import FinishReason, Record, Row, TokenTrace
from pipeline.sampling.draws import Uniforms
from pipeline.sampling.kl_control import steered_to

SENTENCE_ENDS = (".", "!", "?", "\u2026", "\u3002", "\uff01", "\uff1f", "\n")


@dataclass(slots=True)
class RunningRow:
    """A row in a slot, or waiting for one.

    Args:
        row: the input.
        sample: which of the row's samples this is.
        variant: which of the row's variants this is.
        principal_names: in the principals' order.
        terms: what its games are decided by; with a target for KL, what they begin with.
        target_kl: nats per token that its agent temperature aims at.
        unit: what its games are about.
        temperature: of its draws.
        uniforms: its draws.
        prompts: token ids by role.
        shared_prefixes: by role, the length of the prefix that other prompts may share.
        max_tokens: the answer's limit.
        num_pending: tokens that were requested and have not arrived.
        num_accepted: tokens of its draft in the last step that were drawn, until the next step is sent.
        num_passes: steps that gave it tokens.
        original_scores: the reply with the rewards of an existing answer, until it has arrived.
        tokens: drawn so far.
        outcomes: of the drawn tokens.
        original_rewards: of the existing answer, by principal, once they are known.
        reasoning: follows the row's turn; None where the base does not reason.
        before: of a block, the tokens of its answer before it: a stop string may begin there.
        ends_with_sentence: whether it also ends at the end of a sentence or a line.
        spent_kl: nats by which the policy of each steered token so far left the base.
    """

    row: Row
    sample: int
    variant: int
    principal_names: tuple[str, ...]
    terms: Terms
    uniforms: Uniforms
    target_kl: float | None = None
    unit: str = "token"
    temperature: float | None = None
    prompts: Mapping[str, Sequence[int]] = field(default_factory=dict)
    shared_prefixes: Mapping[str, int] = field(default_factory=dict)
    max_tokens: int = 0
    num_pending: int = 0
    num_accepted: int = 0
    num_passes: int = 0
    original_scores: Reply[list[float]] | None = None
    tokens: list[int] = field(default_factory=list)
    outcomes: list[TokenOutcome] = field(default_factory=list)
    original_rewards: list[float] | None = None
    reasoning: ReasoningTrack | None = None
    before: Sequence[int] = ()
    ends_with_sentence: bool = False
    spent_kl: list[float] = field(default_factory=list)

    @property
    def key(self) -> tuple[str, int, int]:
        """Identifies the answer in its run."""
        return self.row.row_id, self.variant, self.sample

    def uniform(self, ahead: int = 0) -> float:
        """The draw of the next token to request, or of one further `ahead`."""
        return self.uniforms.at(len(self.tokens) + self.num_pending + ahead)

    @property
    def newest_token(self) -> int:
        """The token that the next step appends; DRAWN while only the host knows it."""
        return DRAWN if self.num_pending else self.tokens[-1]

    @property
    def step_terms(self) -> Terms:
        """What the game of the next token is decided by. With weights of 0 the base alone draws it."""
        if self.reasoning is None or self.reasoning.is_steered:
            return self.terms if self.target_kl is None else steered_to(self.terms, self.target_kl, self.spent_kl)
        return replace(self.terms, weights=(0.0,) * len(self.terms.weights))

    @property
    def next_game_terms(self) -> Terms:
        """What the game over its next block, or over its answers, is decided by."""
        return self.terms if self.target_kl is None else steered_to(self.terms, self.target_kl, self.spent_kl)

    @property
    def must_wait(self) -> bool:
        """Whether its next step cannot be sent before the pending tokens are known."""
        if self.target_kl is not None and self.num_pending:
            return True
        return self.reasoning is not None and self.reasoning.must_wait(self.num_pending)

    @property
    def has_known_terms(self) -> bool:
        """Whether the terms of several next games are known before their tokens are."""
        return self.target_kl is None and (self.reasoning is None or self.reasoning.is_over)

    @property
    def is_at_its_end(self) -> bool:
        """Whether the answer reaches its limit with the pending tokens."""
        return len(self.tokens) + self.num_pending >= self.max_tokens

    @property
    def num_parts(self) -> int:
        """Steps in which the prompts are computed, tokens that the row kept included."""
        return num_parts(max(map(len, self.prompts.values())) + len(self.tokens))

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of one part of the prompts, over all roles."""
        return sum(min(len(prompt) + len(self.tokens), CHUNK) for prompt in self.prompts.values())

    def restart(self, *, keeps_tokens: bool) -> None:
        """Prepare to be admitted again. Draws are keyed by the step, so the same tokens come again."""
        self.original_scores = None
        self.num_pending = self.num_accepted = 0
        if not keeps_tokens:
            self.num_passes = 0
            self.tokens.clear()
            self.outcomes.clear()
            self.spent_kl.clear()
            if self.reasoning is not None:
                self.reasoning.reset()

    def requested(self) -> None:
        """Note that a step was sent: it said what was accepted, and asks for a token."""
        self.num_pending += 1
        self.num_accepted = 0

    def answered(self) -> None:
        """Note that the reply of a step has arrived."""
        self.num_pending -= 1
        self.num_passes += 1

    def append(self, outcome: TokenOutcome) -> None:
        """Take a token, or the one that closes reasoning which is too long in its place."""
        is_steered = self.reasoning is None or self.reasoning.is_steered
        forced = None if self.reasoning is None else self.reasoning.forced_token()
        if forced is not None:
            outcome = _forced(outcome, forced)
        elif is_steered:
            self.spent_kl.append(outcome.kl)
        self.tokens.append(outcome.token_id)
        self.outcomes.append(outcome)
        if self.reasoning is not None:
            self.reasoning.advance(self.tokens)

    def finish(self, prompter: Prompter, stop: Sequence[str]) -> tuple[FinishReason, Turn] | None:
        """The finish reason and what was written, if the newest token ends the row."""
        # a marker of the reasoning may be the token that ends a turn elsewhere
        if self.tokens[-1] in prompter.stop_ids and not self._has_just_closed:
            return self._ended(FinishReason.STOP, self._read(self.tokens[:-1], prompter))
        cut = self._text_before_stop(prompter, stop)
        if cut is not None:
            turn = self._read(self.tokens, prompter)
            text = turn.text.removesuffix(turn.answer[len(cut) :])
            return FinishReason.STOP, replace(turn, answer=cut, text=text)
        if len(self.tokens) >= self.max_tokens or (self.ends_with_sentence and _ends_sentence(self.tokens, prompter)):
            return self._ended(FinishReason.LENGTH, self._read(self.tokens, prompter))
        return None

    @property
    def _has_just_closed(self) -> bool:
        return self.reasoning is not None and self.reasoning.num_closed == len(self.tokens)

    def _ended(self, reason: FinishReason, turn: Turn) -> tuple[FinishReason, Turn]:
        return reason if turn.is_closed else FinishReason.REASONING, turn

    def _read(self, tokens: Sequence[int], prompter: Prompter) -> Turn:
        """What tokens without the one that ends the turn say."""
        if self.reasoning is not None:
            return self.reasoning.read(tokens)
        text = prompter.decode(tokens)
        return Turn(None, text, 0, True, text)

    def _text_before_stop(self, prompter: Prompter, stop: Sequence[str]) -> str | None:
        """The answer before a stop string; reasoning is not searched."""
        if not stop:
            return None
        tokens = self.tokens if self.reasoning is None else self.reasoning.answer_tokens(self.tokens)
        # a token is at least one byte, so a stop string that the newest token ends lies within this window
        window = max(len(text.encode()) for text in stop) + 8
        tail = prompter.decode([*self.before[-window:], *tokens[-window:]][-window:])
        if not any(text in tail for text in stop):
            return None
        whole = self._read(self.tokens, prompter).answer
        if self.before:
            return self._block_before_stop(whole, prompter, stop)
        found = [at for text in stop if (at := whole.find(text)) >= 0]
        return whole[: min(found)] if found else None

    def _block_before_stop(self, own: str, prompter: Prompter, stop: Sequence[str]) -> str | None:
        """What a block adds to its answer before a stop string that ends in it, and may begin before it."""
        num_before = len(prompter.decode(self.before))
        whole = prompter.decode([*self.before, *self.tokens])
        found = [at for text in stop if (at := whole.find(text, max(0, num_before - len(text) + 1))) >= 0]
        return own[: max(0, len(own) - (len(whole) - min(found)))] if found else None

    def record(
        self,
        reason: FinishReason,
        turn: Turn,
        prompter: Prompter,
        *,
        with_summary: bool,
        with_tokens: bool,
        in_answers: bool = False,
    ) -> Record:
        """The output row. An answer whose beginning the input gave has it, and the prompt then ends before it.

        Rewards and payments count the answer's tokens, and those of its reasoning where that is `in_answers`.
        """
        count = len(self.outcomes)
        prompt, begun = self.row.messages, ""
        if prompt and prompt[-1]["role"] == "assistant":
            prompt, begun = prompt[:-1], prompt[-1]["content"] + prompter.left_out(self.tokens)
        turn = turn if self.reasoning is None else self.reasoning.complete(turn, begun, in_answers=in_answers)
        answered = self.outcomes[0 if in_answers else turn.num_reasoning_tokens :]
        summary: dict[str, Any] = {}
        if with_summary:
            summary = {
                "kl_per_token": sum(outcome.kl for outcome in self.outcomes) / count,
                "covered_mass": sum(outcome.covered_mass for outcome in self.outcomes) / count,
                "max_residual": max(outcome.residual for outcome in self.outcomes),
                "solver_steps": sum(outcome.num_steps for outcome in self.outcomes) / count,
            }
        record = replace(
            self._blank(),
            prompt=prompt,
            original_response=self.row.response,
            response=begun + turn.answer if self.reasoning is None else turn.answer,
            reasoning=turn.reasoning,
            num_reasoning_tokens=turn.num_reasoning_tokens,
            finish_reason=reason,
            num_tokens=count,
            rewards=self._by_name(self.sums([outcome.rewards for outcome in answered])),
            payments=self._payments(answered),
            num_unsolved=sum(outcome.status != Status.CONVERGED for outcome in self.outcomes),
            num_passes=self.num_passes,
            tokens=tuple(self._trace(outcome, prompter) for outcome in self.outcomes) if with_tokens else (),
            values=self._values(),
            **summary,
        )
        return self._with_original(record, in_answers=in_answers)

    def _with_original(self, record: Record, *, in_answers: bool) -> Record:
        """Add the rewards of the existing answer, and which of the two has the higher weighted reward.

        There are no rewards where it was not scored (it does not fit into a context), and no pair without them,
        without a new answer, or where both answers are the same.
        """
        original_rewards = self.original_rewards
        if original_rewards is None:
            return record
        record = replace(record, original_rewards=self._by_name(original_rewards))
        original = self.row.response
        if self.reasoning is not None and original is not None and not in_answers:
            original = self.reasoning.control.form.split(original)[1]
        if record.response == original or record.finish_reason is FinishReason.REASONING:
            return record
        total = sum(w * float(r or 0.0) for w, r in zip(self.terms.weights, record.rewards.values(), strict=True))
        original_total = sum(w * r for w, r in zip(self.terms.weights, original_rewards, strict=True))
        is_better = total >= original_total
        return replace(
            record,
            chosen=record.response if is_better else original,
            rejected=original if is_better else record.response,
        )

    def failed(self, reason: str) -> Record:
        """The output row of one that cannot be aligned: with all that the input has of it."""
        blank, row = self._blank(), self.row
        weights = {**blank.weights, **(row.weights or {})} if row.error is not None else blank.weights
        return replace(
            blank,
            error=reason,
            weights=weights,
            original_response=row.response,
            file=row.file,
            number=row.number,
            given=row.given,
        )

    def _blank(self) -> Record:
        """The output row as far as it is known without an answer."""
        return Record(
            row_id=self.row.row_id,
            sample=self.sample,
            variant=self.variant,
            rule=str(self.terms.rule),
            agent_temperature=self.terms.agent_temperature,
            unit=self.unit,
            temperature=self.temperature,
            prompt=self.row.messages,
            tools=self.row.tools,
            response=None,
            finish_reason=FinishReason.ERROR,
            num_tokens=0,
            weights=dict(zip(self.principal_names, self.terms.weights, strict=True)),
            rewards=dict.fromkeys(self.principal_names),
            payments=dict.fromkeys(self.principal_names),
        )

    def _values(self) -> dict[str, tuple[float, float]]:
        """The lowest and the highest token reward of each principal."""
        by_principal = zip(*(outcome.rewards for outcome in self.outcomes), strict=True)
        return {
            name: (min(rewards), max(rewards))
            for name, rewards in zip(self.principal_names, by_principal, strict=True)
        }

    def _payments(self, answered: Sequence[TokenOutcome]) -> dict[str, float | None]:
        if not self.terms.rule.pays:
            return dict.fromkeys(self.principal_names)
        return self._by_name(self.sums([outcome.payments for outcome in answered if outcome.payments is not None]))

    def _trace(self, outcome: TokenOutcome, prompter: Prompter) -> TokenTrace:
        return TokenTrace(
            token_id=outcome.token_id,
            text=prompter.token_text(outcome.token_id),
            base_logprob=None if math.isnan(outcome.base_logprob) else outcome.base_logprob,
            logprob=None if math.isnan(outcome.logprob) else outcome.logprob,
            payments=self._by_name(outcome.payments),
            thresholds=self._by_name(outcome.thresholds),
        )

    def _by_name(self, numbers: Sequence[float] | None) -> dict[str, float | None]:
        if numbers is None:
            return dict.fromkeys(self.principal_names)
        return dict(zip(self.principal_names, numbers, strict=True))

    def sums(self, numbers_TJ: Sequence[Sequence[float]]) -> list[float]:
        """Sums over tokens, by principal."""
        if not numbers_TJ:
            return [0.0] * len(self.principal_names)
        return [sum(column) for column in zip(*numbers_TJ, strict=True)]


def _forced(outcome: TokenOutcome, token_id: int) -> TokenOutcome:
    """The outcome of a token that was not drawn: nobody values it, nobody pays for it, and no policy moved."""
    nothing = [0.0] * len(outcome.rewards)
    return replace(
        outcome,
        token_id=token_id,
        rewards=nothing,
        payments=None if outcome.payments is None else nothing,
        base_logprob=math.nan,
        logprob=math.nan,
        kl=0.0,
        residual=0.0,
        status=int(Status.CONVERGED),
    )


def _ends_sentence(tokens: Sequence[int], prompter: Prompter) -> bool:
    """Whether the text of these tokens ends with a sentence or a line."""
    text = prompter.decode(tokens)
    return bool(text.strip()) and text.endswith(SENTENCE_ENDS)
