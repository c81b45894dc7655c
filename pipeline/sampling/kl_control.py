"""The agent temperature of a row that is to leave the base by so many nats per token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from pipeline.protocol.messages import Terms

GAIN = 0.1  # by how much the logarithm of the agent temperature follows a lead of one token's worth of KL
FARTHEST = 50.0  # tokens' worth of KL; an agent temperature is at most e^5 times, or e^-5 of, the one at the start


def steered_to(terms: Terms, target: float, spent: Sequence[float]) -> Terms:
    """The terms of the next step: integral control of the KL divergence to the base.

    log tau = log tau_0 + GAIN (sum of the KL so far / target - number of tokens so far).

    A row that has left the base by more than its share is steered less, one that has left it by less is steered
    more. The temperature moves slowly, so KL is spent at the tokens where values differ, and not evenly: a target
    for every single step would steer where there is nothing to choose. As long as the temperature stays within its
    bounds, so does the lead, and the mean KL of an answer of T tokens is the target up to a constant over T.

    Args:
        terms: at the row's first token.
        target: nats per token, above 0.
        spent: KL(policy || base) of each of its tokens so far, in nats.
    """
    lead = sum(spent) / target - len(spent)
    lead = min(max(lead, -FARTHEST), FARTHEST)
    return replace(terms, agent_temperature=terms.agent_temperature * math.exp(GAIN * lead))
