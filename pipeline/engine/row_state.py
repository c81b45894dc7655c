"""One row while it is decoded: its tokens, its sums, and the record that they become."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from cage import Status
from pipeline.engine.prompts import Prompter
from pipeline.protocol.hosts import Reply
from pipeline.protocol.messages import CHUNK, DRAWN, Terms, TokenOutcome, num_parts
from pipeline.records import FinishReason, Record, Row, TokenTrace
from pipeline.sampling.draws import Uniforms


@dataclass(slots=True)
class RunningRow:
    """A row in a slot, or waiting for one.

    Args:
        row: the input.
        sample: which of the row's samples this is.
        variant: which of the row's variants this is.
        principal_names: in the principals' order.
        terms: what its games are decided by.
        uniforms: its draws.
        prompts: token ids by role.
        shared_prefixes: by role, the length of the prefix that other prompts may share.
        max_tokens: the answer's limit.
        num_pending: tokens that were requested and have not arrived.
        original_scores: the reply with the rewards of an existing answer, until it has arrived.
        tokens: drawn so far.
        outcomes: of the drawn tokens.
        original_rewards: of the existing answer, by principal, once they are known.
    """

    row: Row
    sample: int
    variant: int
    principal_names: tuple[str, ...]
    terms: Terms
    uniforms: Uniforms
    prompts: Mapping[str, Sequence[int]] = field(default_factory=dict)
    shared_prefixes: Mapping[str, int] = field(default_factory=dict)
    max_tokens: int = 0
    num_pending: int = 0
    original_scores: Reply[list[float]] | None = None
    tokens: list[int] = field(default_factory=list)
    outcomes: list[TokenOutcome] = field(default_factory=list)
    original_rewards: list[float] | None = None

    @property
    def key(self) -> tuple[str, int, int]:
        """Identifies the answer in its run."""
        return self.row.row_id, self.variant, self.sample

    @property
    def uniform(self) -> float:
        """The draw of the next token to request."""
        return self.uniforms.at(len(self.tokens) + self.num_pending)

    @property
    def newest_token(self) -> int:
        """The token that the next step appends; DRAWN while only the host knows it."""
        return DRAWN if self.num_pending else self.tokens[-1]

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
        self.num_pending = 0
        if not keeps_tokens:
            self.tokens.clear()
            self.outcomes.clear()

    def append(self, outcome: TokenOutcome) -> None:
        """Take a token that was requested."""
        self.num_pending -= 1
        self.tokens.append(outcome.token_id)
        self.outcomes.append(outcome)

    def finish(self, prompter: Prompter, stop: Sequence[str]) -> tuple[FinishReason, str] | None:
        """The finish reason and the text, if the newest token ends the row."""
        if self.tokens[-1] in prompter.stop_ids:
            return FinishReason.STOP, prompter.decode(self.tokens[:-1])
        cut = self._text_before_stop(prompter, stop)
        if cut is not None:
            return FinishReason.STOP, cut
        if len(self.tokens) >= self.max_tokens:
            return FinishReason.LENGTH, prompter.decode(self.tokens)
        return None

    def _text_before_stop(self, prompter: Prompter, stop: Sequence[str]) -> str | None:
        if not stop:
            return None
        # a token is at least one byte, so a stop string that the newest token ends lies within this window
        window = max(len(text.encode()) for text in stop) + 8
        tail = prompter.decode(self.tokens[-window:])
        if not any(text in tail for text in stop):
            return None
        whole = prompter.decode(self.tokens)
        found = [at for text in stop if (at := whole.find(text)) >= 0]
        return whole[: min(found)] if found else None

    def record(
        self,
        reason: FinishReason,
        text: str,
        prompter: Prompter,
        *,
        with_summary: bool,
        with_tokens: bool,
    ) -> Record:
        """The output row. An answer whose beginning the input gave has it, and the prompt then ends before it."""
        count = len(self.outcomes)
        prompt, begun = self.row.messages, ""
        if prompt and prompt[-1]["role"] == "assistant":
            prompt, begun = prompt[:-1], prompt[-1]["content"]
        record = replace(
            self._blank(),
            prompt=prompt,
            response=begun + text,
            finish_reason=reason,
            num_tokens=count,
            rewards=self._by_name(_sums([outcome.rewards for outcome in self.outcomes])),
            payments=self._payments(),
            num_unsolved=sum(outcome.status != Status.CONVERGED for outcome in self.outcomes),
            tokens=tuple(self._trace(outcome, prompter) for outcome in self.outcomes) if with_tokens else (),
            values=self._values(),
        )
        if with_summary:
            record = replace(
                record,
                kl_per_token=sum(outcome.kl for outcome in self.outcomes) / count,
                covered_mass=sum(outcome.covered_mass for outcome in self.outcomes) / count,
                max_residual=max(outcome.residual for outcome in self.outcomes),
                solver_steps=sum(outcome.num_steps for outcome in self.outcomes) / count,
            )
        return self._with_original(record)

    def _with_original(self, record: Record) -> Record:
        """Add the existing answer, its rewards, and which of the two has the higher weighted reward.

        There are no rewards where it was not scored (it does not fit into a context), and no pair without them or
        where both answers are the same.
        """
        record = replace(record, original_response=self.row.response)
        original_rewards = self.original_rewards
        if original_rewards is None:
            return record
        record = replace(record, original_rewards=self._by_name(original_rewards))
        if record.response == self.row.response:
            return record
        total = sum(w * float(r or 0.0) for w, r in zip(self.terms.weights, record.rewards.values(), strict=True))
        original_total = sum(w * r for w, r in zip(self.terms.weights, original_rewards, strict=True))
        is_better = total >= original_total
        original = self.row.response
        return replace(
            record,
            chosen=record.response if is_better else original,
            rejected=original if is_better else record.response,
        )

    def failed(self, reason: str) -> Record:
        """The output row of one that cannot be aligned."""
        return replace(self._blank(), error=reason, original_response=self.row.response)

    def _blank(self) -> Record:
        """The output row as far as it is known without an answer."""
        return Record(
            row_id=self.row.row_id,
            sample=self.sample,
            variant=self.variant,
            rule=str(self.terms.rule),
            agent_temperature=self.terms.agent_temperature,
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

    def _payments(self) -> dict[str, float | None]:
        paid = [outcome.payments for outcome in self.outcomes if outcome.payments is not None]
        if len(paid) < len(self.outcomes):
            return dict.fromkeys(self.principal_names)
        return self._by_name(_sums(paid))

    def _trace(self, outcome: TokenOutcome, prompter: Prompter) -> TokenTrace:
        return TokenTrace(
            token_id=outcome.token_id,
            text=prompter.token_text(outcome.token_id),
            base_logprob=outcome.base_logprob,
            logprob=outcome.logprob,
            payments=self._by_name(outcome.payments),
            thresholds=self._by_name(outcome.thresholds),
        )

    def _by_name(self, numbers: Sequence[float] | None) -> dict[str, float | None]:
        if numbers is None:
            return dict.fromkeys(self.principal_names)
        return dict(zip(self.principal_names, numbers, strict=True))


def _sums(numbers_TJ: Sequence[Sequence[float]]) -> list[float]:
    return [sum(column) for column in zip(*numbers_TJ, strict=True)]
