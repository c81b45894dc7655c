"""Principals inside `model.generate` of transformers: one logits processor, without hosts, slots or a run.

`generate` runs the base; the processor runs the principals' roles beside it, one forward pass per step and model, and
turns the base's scores into the log-probabilities of the policy over its candidates. Whatever `generate` does
afterwards, greedy or sampled, draws from that policy. For many prompts `cage relabel` is faster and resumable.

B rows, J principals, R roles of a model, K candidates, T tokens, V vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LogitsProcessor

import cage
from cage.rule_names import RuleName
from pipeline.config.files import parse_config
from pipeline.config.sections import Config
from pipeline.engine.prompts import ChatPrompter, HostText
from pipeline.errors import CageError, ConfigurationError
from pipeline.hub.embedded import default_cache_folder
from pipeline.hub.model_facts import as_ids, context_length, text_config
from pipeline.hub.sources import ModelSource, fetch_weights, resolve_model
from pipeline.hub.tokenizer_facts import facts_of_tokenizer, load_tokenizer
from pipeline.protocol.messages import Terms
from pipeline.protocol.topology import BASE
from pipeline.records import Message
from pipeline.runtime.prompt_templates import plan_templates
from pipeline.runtime.topology import build_topology
from pipeline.sampling.games import as_game, solve, token_rewards
from pipeline.sampling.proposals import propose_from
from pipeline.steered_answers import Account, SteeredAnswer, SteeredStep
from pipeline.worker.devices import pick_device, pick_dtype
from pipeline.worker.padded_passes import pad_left, role_passes
from pipeline.worker.quantised import quantised_options
from pipeline.worker.token_holes import without_holes
from pipeline.worker.weights import describe_faults, read_with_report

__all__ = ["CageLogitsProcessor", "SteeredAnswer", "SteeredStep"]
Conversation = str | Sequence[Message]


class CageLogitsProcessor(LogitsProcessor):  # type: ignore[misc]
    """Turns the base's scores into the policy that the principals' payments lead to.

    Pass to `generate` what `encode` returns, and what `generate` returns to `answers`, which gives the rewards,
    payments and KL of every answer. Batches are padded on the left; every call of `generate` starts from its
    prompts. Greedy decoding, sampling and `num_return_sequences` work; beam search and assisted decoding are refused.
    Put it last in the list of processors: what the others forbid stays forbidden. A `top_k` or `top_p` of `generate`
    cuts the policy afterwards.

    Args:
        model: the base, which generates: a loaded model, or a name as in a configuration file (`smollm2-135m`, a
            folder, a hub id), which is loaded.
        tokenizer: the base's, which the principals' models share; None: the one of the named model.
        principals: by name, each as in a configuration file, with loaded models in place of names, or with names.
        rule: how principals and base decide, as in a configuration file.
        agent_temperature: tau, in nats of weighted reward.
        candidates: how many of the base's likeliest tokens take part; "all": the whole vocabulary.
        min_p: candidates less likely than `min_p` times the likeliest one are left out.
        on_step: called with every step's numbers.

    Attributes:
        model: the base, loaded.
        tokenizer: the base's.

    Raises:
        ConfigurationError: a principal, a model or an option cannot be used.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        principals: Mapping[str, Mapping[str, Any]],
        *,
        rule: str = RuleName.EQUILIBRIUM,
        agent_temperature: float = 0.1,
        candidates: int | Literal["all"] = 50,
        min_p: float = 0.0,
        on_step: Callable[[SteeredStep], None] | None = None,
    ) -> None:
        if tokenizer is None and not isinstance(model, str):
            raise ConfigurationError("give the tokenizer of a model that is loaded already")
        named = _NamedModels()
        self.model = model = named.add(model, "model", BASE)
        self.tokenizer = tokenizer = tokenizer or load_tokenizer(named.sources[BASE])
        config = _config(
            named.replace(principals),
            {"rule": rule, "agent_temperature": agent_temperature, "candidates": candidates, "min_p": min_p},
        )
        self._options = config.decoding.sampling
        self._topology = build_topology(config)
        weights = tuple(self._topology.weights.values())
        self._terms = Terms(config.decoding.rule, config.decoding.agent_temperature, weights)
        models = {plan.name: named.models[plan.model.model] for plan in self._topology.hosts}
        self._pad_id = tokenizer.pad_token_id or 0
        self._device = next(model.parameters()).device
        sizes = [text_config(each.config).vocab_size for each in models.values()]
        facts = facts_of_tokenizer(tokenizer)
        self._vocab_size = min([max(facts.token_by_id) + 1, *sizes])
        self._holes = [each for each in range(self._vocab_size) if each not in facts.token_by_id]
        special = frozenset(facts.special_tokens)
        self._prompter = ChatPrompter(
            self._topology,
            {
                name: HostText(tokenizer, context_length(each.config), text_config(each.config).vocab_size, special)
                for name, each in models.items()
            },
            plan_templates(config, self._topology, dict.fromkeys(models, facts), datetime.now()),
            frozenset(),
            None,
            self._vocab_size,
        )
        self._passes = [
            role_passes(models[plan.name], names, vocab_size=self._vocab_size, pad_id=self._pad_id, holes=self._holes)
            for plan in self._topology.hosts
            if (names := [role.name for role in plan.roles if role.name != BASE])
        ]
        self._on_step = on_step
        self._names = tuple(principal.name for principal in self._topology.principals)
        self._ends = _end_ids(model, tokenizer)
        self._account = Account()
        self._prompts: list[dict[str, list[int]]] = []
        self._prompt_BT: Tensor | None = None
        self._seen_BT: Tensor | None = None

    def encode(self, conversations: Sequence[Conversation]) -> dict[str, Tensor]:
        """Render prompts for the base and every principal.

        Args:
            conversations: lists of messages in the OpenAI shape; a text stands for one message of the user.

        Returns:
            `input_ids` and `attention_mask` for `generate`.

        Raises:
            ConfigurationError: there are no conversations.
            RowError: a prompt cannot be rendered or is longer than a model's context.
        """
        if isinstance(conversations, str) or not conversations:
            raise ConfigurationError(f"encode takes a list of conversations; got {conversations!r}")
        messages = [
            ({"role": "user", "content": each},) if isinstance(each, str) else tuple(each) for each in conversations
        ]
        self._prompts = [self._prompter.encode(each, self._topology.weights) for each in messages]
        ids_BT, mask_BT = pad_left([prompts[BASE] for prompts in self._prompts], self._pad_id, self._device)
        self._prompt_BT, self._seen_BT = ids_BT, None
        return {"input_ids": ids_BT, "attention_mask": mask_BT}

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The policy's log-probabilities [B, V] of the next token; -inf for tokens that are no candidates.

        Raises:
            ConfigurationError: the rows are not those of `encode`, or not those of the last step with one more token.
            CageError: a reward is not finite, or a principal's context is full.
        """
        self._catch_up(input_ids)
        step = self._solve(scores)
        self._account.begin(step)
        if self._on_step is not None:
            self._on_step(step)
        steered_BV = torch.full_like(scores, -torch.inf)
        return steered_BV.scatter_(-1, step.ids_BK, step.log_policy_BK.to(scores.dtype))

    def answers(self, generated: Any, *, eos_token_id: int | Sequence[int] | None = None) -> list[SteeredAnswer]:
        """The rewards, payments and KL of the answers of the last `generate` call, row by row.

        Args:
            generated: what `generate` returned: token ids [B, T] with the prompts, or its output object.
            eos_token_id: the ids that end an answer, where `generate` was given others than the model's.

        Raises:
            ConfigurationError: it is not what the last `generate` call with this processor returned.
        """
        ids_BT = getattr(generated, "sequences", generated)
        seen_BT, account = self._seen_BT, self._account
        fits = (
            seen_BT is not None
            and isinstance(ids_BT, Tensor)
            and ids_BT.dim() == 2
            and ids_BT.shape[0] == seen_BT.shape[0]
            and ids_BT.shape[1] == seen_BT.shape[1] + 1
            and torch.equal(ids_BT[:, :-1].to(seen_BT.device), seen_BT)
        )
        if not fits or seen_BT is None or self._prompt_BT is None:
            raise ConfigurationError("answers takes what the last generate call with this processor returned")
        account.settle(ids_BT[:, -1])
        ends = self._ends if eos_token_id is None else as_ids(eos_token_id)
        return account.answers(ids_BT[:, self._prompt_BT.shape[1] :].cpu(), ends, self._names)

    def _catch_up(self, ids_BT: Tensor) -> None:
        """Have the roles read what `generate` has: new prompts, or one more token of each row."""
        if self._prompt_BT is None:
            raise ConfigurationError("call encode(conversations) first and give generate what it returns")
        seen_BT = self._seen_BT
        if ids_BT.shape[1] == self._prompt_BT.shape[1]:
            self._begin(ids_BT)
        elif seen_BT is not None and ids_BT.shape[1] == seen_BT.shape[1] + 1 and torch.equal(ids_BT[:, :-1], seen_BT):
            num_new = ids_BT.shape[1] - self._prompt_BT.shape[1]
            if num_new > self._context_left:
                raise CageError(
                    f"a principal's context holds {self._context_left} tokens after its prompt; got {num_new}"
                )
            self._account.settle(ids_BT[:, -1])
            for passes in self._passes:
                passes.append(ids_BT[:, -1])
        else:
            raise ConfigurationError(
                "the rows are not those of the last step with one token more: beam search, assisted decoding and "
                "prompts that encode did not return cannot be steered; use greedy or sampled decoding (num_beams=1)"
            )
        self._seen_BT = ids_BT.clone()

    def _begin(self, ids_BT: Tensor) -> None:
        """Start from the prompts; `generate` repeats each for its `num_return_sequences`."""
        assert self._prompt_BT is not None
        num_each, rest = divmod(len(ids_BT), len(self._prompts))
        if rest or not torch.equal(self._prompt_BT.to(ids_BT.device).repeat_interleave(num_each, 0), ids_BT):
            raise ConfigurationError("generate runs other prompts than the last encode(conversations) returned")
        prompts = [prompt for prompt in self._prompts for _ in range(num_each)]
        left = [left for prompt in self._prompts if (left := self._prompter.context_left(prompt)) is not None]
        self._context_left = min(left, default=2**62)
        self._account = Account()
        for passes in self._passes:
            passes.start(prompts)

    def _solve(self, scores: Tensor) -> SteeredStep:
        """Solve every row's game over the base's candidates."""
        options = self._options
        count = min(options.num_candidates or self._vocab_size, self._vocab_size)
        logits_B1V = without_holes(scores[:, None, : self._vocab_size].float(), self._holes)
        proposal = propose_from(logits_B1V, self._vocab_size, num_candidates=count, min_p=options.min_p)
        own_BK = proposal.role_logprobs_BRK[:, 0]
        ids_BK = proposal.ids_BK
        if ids_BK is None:
            ids_BK = torch.arange(count, device=scores.device).expand(len(scores), -1)
        outputs = {BASE: own_BK}
        for passes in self._passes:
            outputs |= {name: own.to(scores.device) for name, own in passes.logprobs_at(ids_BK).items()}
        # a token that another processor forbids has no policy either, and -inf minus -inf would be NaN
        is_allowed_BK = own_BK > -torch.inf
        rewards = [
            torch.where(is_allowed_BK, reward_BK, 0.0)
            for reward_BK in token_rewards(self._topology.principals, outputs)
        ]
        return self._decide(ids_BK, *as_game(proposal, rewards))

    def _decide(self, ids_BK: Tensor, base_BK: Tensor, rewards_BJK: Tensor) -> SteeredStep:
        solved = solve(base_BK, rewards_BJK, [self._terms] * len(ids_BK))
        decision = solved.decision
        if bool((decision.status == cage.Status.NOT_FINITE).any()):
            raise CageError("the principals' rewards or the base's scores are not finite")
        payments_BJK = None
        if decision.thresholds is not None:
            payments_BJK = (solved.game.values - decision.thresholds[..., None]).clamp(min=0)
        return SteeredStep(ids_BK, base_BK, decision.log_policy, rewards_BJK, payments_BJK)


def _end_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """The ids at which `generate` ends a row: those of the generation configuration, or else the tokenizer's."""
    stated = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return as_ids(stated) or as_ids(tokenizer.eos_token_id)


class _NamedModels:
    """Gives loaded models names, by which a configuration can refer to them; loads models that are given by name."""

    def __init__(self) -> None:
        self.models: dict[str, torch.nn.Module] = {}
        self.sources: dict[str, ModelSource] = {}
        self._loaded: dict[str, torch.nn.Module] = {}

    def add(self, value: Any, place: str, name: str | None = None) -> torch.nn.Module:
        """A model, or the one of this name, as `name` or under a name of its own.

        Raises:
            ConfigurationError: there is no such model, or it is neither loaded nor a name.
        """
        if not isinstance(value, str | torch.nn.Module):
            raise ConfigurationError(f"{place} must be a loaded model or a model's name; got {value!r}")
        name = name or f"model{len(self.models)}"
        model = value if isinstance(value, torch.nn.Module) else self._load(value, place, name)
        self.models[name] = model
        return model

    def _load(self, value: str, place: str, name: str) -> torch.nn.Module:
        cache_folder = default_cache_folder(os.environ)
        try:
            source = resolve_model(value, cache_folder=cache_folder)
        except ConfigurationError as error:
            raise ConfigurationError(f"{place}: {error}") from error
        self.sources[name] = source
        if value not in self._loaded:
            device = pick_device("auto")
            dtype = pick_dtype("auto", device)
            options = quantised_options(source, device, dtype)
            model, report = read_with_report(
                place,
                AutoModelForCausalLM,
                fetch_weights(source, cache_folder=cache_folder),
                dtype=dtype,
                trust_remote_code=False,
                **options,
            )
            if fault := describe_faults(report, model):
                raise ConfigurationError(f"{place}: {fault}")
            self._loaded[value] = model.to(device).eval()
        return self._loaded[value]

    def replace(self, principals: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
        """The principals with names of its own in place of models. Raises ConfigurationError for no model."""
        return {
            name: {key: self._replace(value, f"principals.{name}.{key}") for key, value in fields.items()}
            for name, fields in principals.items()
        }

    def _replace(self, value: Any, place: str) -> Any:
        """A value, with names in place of its models where it is a mapping of terms."""
        if isinstance(value, Mapping) and ".terms" in place:
            return {key: self._replace(each, f"{place}.{key}") for key, each in value.items()}
        return self._name(value, place)

    def _name(self, value: Any, place: str) -> Any:
        if not place.endswith((".model", ".reference")) or value in (None, "none"):
            return value
        if isinstance(value, str) and value in self._loaded:
            value = self._loaded[value]
        known = next((name for name, model in self.models.items() if model is value), None)
        if known is None:
            known = f"model{len(self.models)}"
            self.add(value, place, known)
        return known


def _config(principals: Mapping[str, Mapping[str, Any]], decoding: Mapping[str, Any]) -> Config:
    """A run's configuration without input and output, so that the same checks apply here."""
    config = parse_config(
        {
            "input": {"path": "none"},
            "output": {"path": "none"},
            "base": BASE,
            "principals": dict(principals),
            "decoding": dict(decoding),
        }
    )
    for name, principal in config.principals.items():
        if principal.adapters:
            raise ConfigurationError(f"principals.{name}.adapter: load it and give it as model, with a reference")
        if any(request.scoring is not None for request in principal.roles().values()):
            raise ConfigurationError(
                f"principals.{name}.kind: a {principal.kind} cannot be used here; use cage relabel"
            )
    return config
