"""Games over blocks of text or whole answers: the base proposes several, one game decides which one is taken.

Answers of variants whose games are over tokens are decoded beside them.

The proposals of a game are samples of the base, so its base policy is their empirical measure: equal ones are merged
by count. A principal's value of a proposal is what it adds to the answer's reward. With more proposals the game over
whole answers converges to the game over all answers.

A block is answered like a prompt of its own: the tokens that were taken so far belong to the prompts of its
proposals. Proposals, values, game and draw depend on the row alone, so the same answers come again after a restart.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

import cage
from pipeline.config.sections import DecodingConfig
from pipeline.config.units import Unit
from pipeline.config.variants import Variant
from pipeline.engine.engine import Ended, Engine
from pipeline.engine.menus import Choice, Menu, Path, TextScorer, Valuer
from pipeline.engine.prompter import Prompter
from pipeline.engine.row_state import RunningRow
from pipeline.errors import HostError, HostOutOfMemory, RowError
from pipeline.monitoring.counts import Recoveries, Work
from pipeline.monitoring.metrics import Load
from pipeline.protocol.hosts import Hosts
from pipeline.protocol.topology import Topology
from pipeline.records import Proposal, Record, Row
from pipeline.sampling.draws import Uniforms, draw
from pipeline.sampling.games import SolvedStep, kl_to_base, solve

CHOICE = 2**40  # added to the number of a game: the step of its draw, beyond those of any token
SAMPLES = 2**20  # of one row in one round, so that the proposals of different rounds have draws of their own
MOST_FAILURES = 3  # of hosts while one menu is scored, before its rows fail
KEPT_MENUS = 256  # games that are over and may be played again, by other rules, temperatures or weights

MenuKey = tuple[str, Unit, int, int, tuple[int, ...]]


class ChoiceEngine:
    """Decodes rows as `Engine` does, with one game per block or per answer where the row's variant says so.

    Args:
        engine: draws the proposals, and answers rows whose games are over tokens.
        topology: roles and principals.
        prompter: text of answers.
        decoding: the number of proposals, and how one of them is drawn.
        variants: the ways to answer a row, with the unit of each.
        scorers: of principals that value text.
    """

    def __init__(
        self,
        engine: Engine,
        topology: Topology,
        prompter: Prompter,
        decoding: DecodingConfig,
        variants: Sequence[Variant],
        scorers: Mapping[str, TextScorer],
    ) -> None:
        self._engine = engine
        self._prompter = prompter
        self._decoding = decoding
        self._variants = variants
        self._valuer = Valuer(engine.calls, topology, prompter, decoding, scorers)
        # proposals of the base are the same whatever the rule, the temperature and the weights of the game
        own = {role for principal in topology.principals for role in principal.roles.values()}
        takes_weights = any(topology.roles[name].takes_weights for name in own)
        self._shares_menus = not (takes_weights or decoding.proposals_by.uses_principals)
        self._menus: OrderedDict[MenuKey, Menu] = OrderedDict()
        self._menu_of: dict[tuple[str, int, int], tuple[MenuKey, int]] = {}
        self._ready: deque[Menu] = deque()
        self._records: list[Record] = []

    @property
    def num_slots(self) -> int:
        """Proposals at once."""
        return self._engine.num_slots

    @property
    def num_steps(self) -> int:
        """Steps so far, over all groups."""
        return self._engine.num_steps

    @property
    def recoveries(self) -> Recoveries:
        """Faults that were overcome so far."""
        return self._engine.recoveries

    @property
    def work(self) -> Work:
        """Games and seconds so far, those of the proposals included."""
        return self._engine.work

    @property
    def load(self) -> Load:
        """How full the slots of the proposals are."""
        return self._engine.load

    @property
    def wants_row(self) -> bool:
        """Whether a free slot waits for a row."""
        return self._engine.wants_row and not self._ready

    @property
    def is_idle(self) -> bool:
        """Whether no row waits or runs and no record waits to be returned."""
        return self._engine.is_idle and not self._menu_of and not self._ready and not self._records

    def resize(self) -> None:
        """Have the hosts forget their rows."""
        self._engine.resize()

    def admit(self, row: Row, variant: int = 0, sample: int = 0) -> None:
        """Queue one answer to a row, as `Engine.admit` does."""
        if self._variants[variant].unit is Unit.TOKEN:
            self._engine.admit(row, variant, sample)
            return
        try:
            whole = self._engine.begin(row, variant, sample)
        except RowError as error:
            self._records.append(self._engine.failed(row, variant, sample, str(error)))
        else:
            self._propose(Path(whole))

    def score(self, row: Row) -> dict[str, float]:
        """The rewards of a row's existing answer by principal, as `Engine.score` has them."""
        rewards = self._engine.score(row)
        return rewards | self._valuer.scores_of(row.messages, row.response or "")

    def step(self) -> list[Record]:
        """Advance the proposals by one token and play the games that have theirs; return the answers that ended.

        Raises:
            HostError: a host cannot be used any more. No row is lost: call `recover` with other hosts.
        """
        for ended in self._engine.step_rows():
            if ended.running.key in self._menu_of:
                self._file(ended)
            else:  # a whole answer, not a proposal
                self._records.append(self._engine.record(ended))
        while self._ready:
            menu, lack = self._ready[0], None
            if menu.num_failures == MOST_FAILURES:
                self._give_up(menu, "its host failed whenever its proposals were scored")
                self._ready.popleft()
                continue
            try:
                self._play(menu)  # stays in the queue where a host fails
            except HostOutOfMemory as error:
                lack = str(error)
            except HostError:
                menu.num_failures += 1
                raise
            # after the except block: the error's frames hold tensors that have to be freed first
            if lack is not None:
                if self._engine.make_room():
                    continue
                self._give_up(menu, f"its proposals cannot be scored beside a single row: {lack}")
            self._ready.popleft()
        records, self._records = self._records, []
        return records

    def recover(self, hosts: Hosts, error: HostError) -> None:
        """Go on with other hosts after a failure, as `Engine.recover` does."""
        self._engine.recover(hosts, error)

    def _propose(self, path: Path) -> None:
        """Have the base draw the proposals of an answer's next game, unless another answer's are the same."""
        whole = path.whole
        taken, row_id = tuple(whole.tokens), whole.row.row_id
        unit = self._variants[whole.variant].unit
        key = (row_id, unit, 0 if self._shares_menus else whole.variant, whole.sample, taken)
        menu = self._menus.get(key)
        if menu is None and whole.row.candidates:
            menu = self._menus[key] = Menu(
                0,
                whole.prompts,
                whole.prompts,
                whole.row.messages,
                given=whole.row.candidates,
                weights=whole.terms.weights,
            )
        elif menu is None:
            count = self._decoding.proposals
            prompts = {role: [*prompt, *taken] for role, prompt in whole.prompts.items()} if taken else whole.prompts
            menu = self._menus[key] = Menu(count, prompts, whole.prompts, whole.row.messages, taken)
            for number in range(count):
                inner = self._proposal(whole, prompts, number, first=path.num_games * SAMPLES)
                self._menu_of[inner.key] = key, number
                self._engine.enqueue(inner)
        menu.paths.append(path)
        self._menus.move_to_end(key)
        if menu.num_waiting == 0:
            self._ready.append(menu)

    def _proposal(
        self, whole: RunningRow, prompts: Mapping[str, Sequence[int]], number: int, *, first: int
    ) -> RunningRow:
        """A row that the base answers as far as the game's unit reaches."""
        row, sample = whole.row, whole.sample * self._decoding.proposals + number + first
        if number or whole.tokens:
            row = replace(row, response=None)  # the existing answer is scored once
        left = whole.max_tokens - len(whole.tokens)
        is_answer = self._variants[whole.variant].unit is Unit.ANSWER
        seed = self._decoding.seed if row.seed is None else row.seed
        return RunningRow(
            row=row,
            sample=sample,
            variant=whole.variant,
            principal_names=whole.principal_names,
            terms=self._engine.proposal_terms(self._decoding.proposals_by, whole.terms),
            uniforms=Uniforms(seed, row.row_id, sample),
            prompts=prompts,
            shared_prefixes=whole.shared_prefixes,
            max_tokens=left if is_answer else min(left, self._decoding.block_tokens),
            reasoning=self._prompter.begin_turn(row.messages, prompts) if is_answer else None,
            before=tuple(whole.tokens),
            ends_with_sentence=not is_answer and self._decoding.block_end == "sentence",
        )

    def _file(self, ended: Ended) -> None:
        key, number = self._menu_of.pop(ended.running.key)
        menu = self._menus[key]
        menu.ended[number] = ended
        menu.num_waiting -= 1
        if menu.num_waiting == 0:
            self._ready.append(menu)

    def _play(self, menu: Menu) -> None:
        """Decide what each waiting answer takes. Raises HostError before anything is decided."""
        if menu.choices is None:
            menu.choices = self._valuer.choices(menu)
        paths, menu.paths = menu.paths, []
        for path in paths:
            if record := self._take(path, menu):
                self._records.append(record)
            else:
                self._propose(path)
        while len(self._menus) > KEPT_MENUS and next(iter(self._menus.values())).num_waiting == 0:
            self._menus.popitem(last=False)

    def _give_up(self, menu: Menu, reason: str) -> None:
        """Fail the answers that wait for a menu."""
        self._records += [path.whole.failed(reason) for path in menu.paths]
        menu.paths = []

    def _take(self, path: Path, menu: Menu) -> Record | None:
        """Solve an answer's game and append what it takes; return the record if that ended it."""
        whole, choices = path.whole, menu.choices
        if not choices:
            what = "its candidates cannot be used" if menu.given else "no proposal of the base could be used"
            return whole.failed(f"{what}: {menu.error}")
        if menu.original_rewards is not None:
            whole.original_rewards = menu.original_rewards
        solved = _solve(whole, choices)
        if int(solved.decision.status) == cage.Status.NOT_FINITE:
            return whole.failed(f"after {len(whole.tokens)} tokens: the rewards are not finite")
        uniform = torch.tensor([whole.uniforms.at(CHOICE + path.num_games)], dtype=torch.float64)
        log_policy = solved.decision.log_policy
        temperature, top_p = self._variants[whole.variant].draw(self._decoding)
        at = int(draw(log_policy, uniform, temperature=temperature, top_p=top_p))
        probabilities = log_policy.exp()[0].tolist() + [0.0] * len(menu.left_out)
        path.games += _proposals(path, [*choices, *menu.left_out], probabilities, at)
        path.num_games += 1
        if menu.given:
            whole.max_tokens = len(choices[at].tokens)
        self._append(whole, choices[at], solved.game, solved.decision, at)
        record = self._ended(path)
        if record is None or not menu.given:
            return record
        return replace(record, response=choices[at].text, covered_mass=None)  # as it was given, and not drawn

    def _append(
        self, whole: RunningRow, choice: Choice, game: cage.Game, decision: cage.rules.Decision, at: int
    ) -> None:
        """Append a proposal's tokens; what its game was worth counts at the last of them."""
        nothing = (0.0,) * len(choice.rewards)
        thresholds_J = None if decision.thresholds is None else decision.thresholds[0]
        paid_J = None if thresholds_J is None else (game.values[0, :, at] - thresholds_J).clamp(min=0)
        kl = float(kl_to_base(decision.log_policy, game.base_logprobs))
        for outcome in choice.outcomes[:-1]:
            whole.append(replace(outcome, rewards=nothing, payments=None if paid_J is None else nothing))
        last = replace(
            choice.outcomes[-1],
            rewards=choice.rewards,
            payments=None if paid_J is None else paid_J.tolist(),
            thresholds=None if thresholds_J is None else thresholds_J.tolist(),
            kl=choice.outcomes[-1].kl + kl,
            residual=float(decision.residual),
            status=int(decision.status),
            num_steps=int(decision.num_steps),
        )
        self._engine.count_games([last])
        whole.append(last)

    def _ended(self, path: Path) -> Record | None:
        """The record of an answer that has ended."""
        whole = path.whole
        stop = self._decoding.stop if whole.row.stop is None else whole.row.stop
        finished = whole.finish(self._prompter, stop)
        if finished is None:
            return None
        record = self._engine.record(Ended(whole, *finished))
        values = {}
        for name in whole.principal_names:
            rewards = [reward for each in path.games if (reward := each.rewards[name]) is not None]
            values[name] = min(rewards), max(rewards)
        return replace(record, proposals=tuple(path.games), values=values)


def _solve(whole: RunningRow, choices: Sequence[Choice]) -> SolvedStep:
    """The game over the choices, by the row's rule."""
    total = sum(choice.weight for choice in choices)
    base_1C = torch.tensor([[choice.weight / total for choice in choices]], dtype=torch.float64).log()
    rewards_1JC = torch.tensor([choice.rewards for choice in choices], dtype=torch.float64).T[None]
    rewards_1JC = rewards_1JC.reshape(1, len(whole.principal_names), len(choices))
    return solve(base_1C, rewards_1JC, [whole.next_game_terms])


def _proposals(path: Path, choices: Sequence[Choice], probabilities: Sequence[float], at: int) -> list[Proposal]:
    """What the record says of a game."""
    return [
        Proposal(
            game=path.num_games,
            text=choice.text,
            count=choice.count,
            probability=probability,
            is_chosen=index == at,
            rewards={
                name: reward if math.isfinite(reward) else None
                for name, reward in zip(path.whole.principal_names, choice.rewards, strict=True)
            },
        )
        for index, (choice, probability) in enumerate(zip(choices, probabilities, strict=True))
    ]
