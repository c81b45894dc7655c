"""What the answers of a `generate` call were worth to the principals, what they paid, and how far the policy moved.

Only the drawn tokens count, and the token of a step is known one step later: a step's tensors over the candidates are
kept until then and no longer.

B rows, J principals, K candidates, T tokens, N tokens of one answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class SteeredStep:
    """One step of all rows.

    Args:
        ids_BK: the candidates' token ids.
        base_logprobs_BK: of the base over the candidates, in nats.
        log_policy_BK: of the policy over the candidates, in nats.
        rewards_BJK: q by principal, in nats, before weights.
        payments_BJK: what each principal pays for each candidate, in nats; None under a rule without payments.
    """

    ids_BK: Tensor
    base_logprobs_BK: Tensor
    log_policy_BK: Tensor
    rewards_BJK: Tensor
    payments_BJK: Tensor | None


@dataclass(frozen=True, slots=True)
class SteeredAnswer:
    """One answer of a `generate` call. The numbers are those of a run's columns of the same names.

    Args:
        token_ids: drawn, the end token included.
        rewards: by principal, the sum of q over the answer in nats, before weights.
        payments: by principal, nats paid for the drawn tokens; None under a rule without payments.
        kl_per_token: KL divergence of the policy to the base over the candidates, in nats per token; None where
            nothing was drawn.
    """

    token_ids: tuple[int, ...]
    rewards: Mapping[str, float]
    payments: Mapping[str, float | None]
    kl_per_token: float | None

    @property
    def num_tokens(self) -> int:
        """Tokens drawn, the end token included."""
        return len(self.token_ids)


class Account:
    """Collects the steps of one `generate` call."""

    def __init__(self) -> None:
        self._rewards: list[Tensor] = []
        self._payments: list[Tensor] = []
        self._kl: list[Tensor] = []
        self._was_candidate: list[Tensor] = []
        self._pending: SteeredStep | None = None

    @property
    def num_steps(self) -> int:
        """Steps whose policy was given."""
        return len(self._kl) + (self._pending is not None)

    def begin(self, step: SteeredStep) -> None:
        """Note a step whose tokens are not drawn yet."""
        assert self._pending is None
        self._pending = step

    def settle(self, tokens_B: Tensor) -> None:
        """Take the tokens that were drawn in the newest step."""
        step, self._pending = self._pending, None
        if step is None:
            return
        is_drawn_BK = step.ids_BK == tokens_B.to(step.ids_BK.device)[:, None]
        at_B1 = is_drawn_BK.int().argmax(-1, keepdim=True)
        at_BJ1 = at_B1[:, None].expand(-1, step.rewards_BJK.shape[1], 1)
        self._was_candidate.append(is_drawn_BK.any(-1).cpu())
        self._rewards.append(step.rewards_BJK.gather(-1, at_BJ1)[..., 0].double().cpu())
        if step.payments_BJK is not None:
            self._payments.append(step.payments_BJK.gather(-1, at_BJ1)[..., 0].double().cpu())
        policy_BK, moved_BK = step.log_policy_BK.exp(), step.log_policy_BK - step.base_logprobs_BK
        kl_B = torch.where(policy_BK > 0, policy_BK * moved_BK, 0.0).sum(-1).clamp(min=0)
        self._kl.append(kl_B.double().cpu())

    def answers(self, tokens_BT: Tensor, ends: frozenset[int], names: Sequence[str]) -> list[SteeredAnswer]:
        """The answers with these drawn tokens; all steps must be settled."""
        count = len(self._kl)
        pays = len(self._payments) == count
        answers = []
        for row, tokens in enumerate(tokens_BT[:, :count].tolist()):
            # a row that ended is filled with padding, which no policy has drawn
            num = next((at + 1 for at, token in enumerate(tokens) if token in ends), len(tokens))
            num = next((at for at in range(num) if not self._was_candidate[at][row]), num)
            rewards_J = sum(
                (self._rewards[at][row] for at in range(num)), torch.zeros(len(names), dtype=torch.float64)
            )
            paid: Mapping[str, float | None] = dict.fromkeys(names)
            if pays:
                paid_J = sum((self._payments[at][row] for at in range(num)), torch.zeros_like(rewards_J))
                paid = dict(zip(names, paid_J.tolist(), strict=True))
            kl = sum(float(self._kl[at][row]) for at in range(num))
            rewards = dict(zip(names, rewards_J.tolist(), strict=True))
            answers.append(SteeredAnswer(tuple(tokens[:num]), rewards, paid, kl / num if num else None))
        return answers
