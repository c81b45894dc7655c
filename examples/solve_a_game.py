"""One decoding step as a game, solved with torch alone: two opposed principals, equilibrium beside weighted sum.

python examples/solve_a_game.py
"""

from __future__ import annotations

import torch

import cage

TOKENS = ["yes", "no", "maybe"]


def main() -> None:
    base_logprobs = torch.tensor([[0.4, 0.4, 0.2]]).log()  # [rows, tokens]
    values = torch.tensor([[[5.0, 0.0, 1.0], [0.0, 3.0, 1.0]]])  # [rows, principals, tokens], in nats
    game = cage.Game(base_logprobs, values, agent_temperature=1.0)

    solution = cage.solve(game)
    weighted_sum = cage.rules.linear(game).log_policy.exp()
    print("token    base  weighted sum  equilibrium  paid by 1  paid by 2")
    for at, token in enumerate(TOKENS):
        paid = solution.incentives[0, :, at]
        print(
            f"{token:<7} {base_logprobs[0, at].exp():5.3f}  {weighted_sum[0, at]:12.3f}  "
            f"{solution.policy[0, at]:11.3f}  {paid[0]:9.2f}  {paid[1]:9.2f}"
        )
    gains = cage.deviation_gain(game, solution)[0]
    print(f"residual {solution.residual[0]:.1e}; each could still gain {gains.abs().max():.1e} by deviating alone")


if __name__ == "__main__":
    main()
