"""Load what a run needs besides its plan and its weights: tokenizers, and what reads prompts and answers by them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.config.sections import Config
from pipeline.config.variants import Variant
from pipeline.engine.menus import TextScorers
from pipeline.engine.prompter import Prompter
from pipeline.engine.prompts import ChatPrompter, HostText
from pipeline.hub.answer_starts import answers_follow_directly
from pipeline.hub.descriptions import stored_bytes
from pipeline.hub.model_facts import facts_of_config, load_model_config
from pipeline.hub.retokeniser import Retokeniser
from pipeline.hub.token_bytes import token_bytes
from pipeline.hub.tokenizer_facts import default_template, load_tokenizer
from pipeline.protocol.specs import HostSpec, TextSpec
from pipeline.protocol.topology import BASE, Topology
from pipeline.quoting import size
from pipeline.runtime.prompt_templates import end_of_answer
from pipeline.runtime.replica_plan import ReplicaPlan, plan_replica, resolve_models


@dataclass(frozen=True, slots=True)
class Assembly:
    """Everything that a replica needs, without any weights. Picklable.

    Args:
        config: of the run.
        topology: roles and hosts.
        hosts: how to start each host, in the topology's order.
        identities: every model and adapter by content, by its dotted place in the configuration.
        prompter: encodes prompts and decodes answers.
        variants: the ways to answer a row.
        scorers: of principals that value text.
        draft: how to start the model that proposes tokens; None where none does.
    """

    config: Config
    topology: Topology
    hosts: tuple[HostSpec, ...]
    identities: Mapping[str, str]
    prompter: Prompter
    variants: tuple[Variant, ...]
    scorers: TextScorers | None = None
    draft: HostSpec | None = None

    @property
    def loads(self) -> tuple[str, ...]:
        """What is waited for while each host loads, with the size of its weights in the files."""
        return tuple(
            f"loading {plan.name} ({size(stored_bytes(spec.source.num_parameters_by_dtype))})"
            for plan, spec in zip(self.topology.hosts, self.hosts, strict=True)
        )


def assemble(config: Config, cache_folder: Path, *, progress: Callable[[str], None] = lambda line: None) -> Assembly:
    """Find models, plan a replica and load its tokenizers.

    Raises:
        ConfigurationError: a model is missing, or cannot be used.
    """
    resolved = resolve_models(config, cache_folder, progress=progress)
    return load_assembly(plan_replica(config, resolved, cache_folder))


def load_assembly(plan: ReplicaPlan) -> Assembly:
    """Load the tokenizers of a planned replica, and have transformers check its models' configurations.

    Raises:
        ConfigurationError: transformers refuses a configuration or a tokenizer.
    """
    for spec in plan.hosts:
        config = facts_of_config(load_model_config(spec.source), spec.source.name)
        assert config == plan.facts[spec.name], f"{spec.source.name} is not what it was planned as: {config}"
    tokenizers = {spec.name: load_tokenizer(spec.source) for spec in plan.hosts}
    for name, facts in plan.tokenizers.items():
        loaded = tokenizers[name]
        stated = (len(facts.token_by_id), facts.eos_token_id, facts.chat_template)
        loaded_as = (len(loaded), loaded.eos_token_id, default_template(loaded.chat_template))
        assert loaded_as == stated, f"the tokenizer of {name} is not what it was planned as: {loaded_as}"

    def complete(spec: HostSpec) -> HostSpec:
        if spec.reward is None and spec.text is None:
            return spec
        template = plan.templates[spec.roles[0].name]
        end_id = end_of_answer(template, plan.tokenizers[spec.name])
        base, own = tokenizers[BASE], tokenizers[spec.name]
        follows = answers_follow_directly(own, template, plan.topology.weights)
        if spec.reward is not None:
            retokeniser = None
            if spec.name in plan.read_text:
                retokeniser = Retokeniser(base, own, plan.stop_ids, end_id, follows=follows)
            reward = replace(spec.reward, end_id=end_id, stop_ids=plan.stop_ids, retokeniser=retokeniser)
            return replace(spec, reward=reward)
        token_bytes(own, spec.source.name)  # refused before its host loads any weights
        base_bytes = token_bytes(base, plan.hosts[0].source.name)
        retokeniser = Retokeniser(base, own, plan.stop_ids, end_id, base_bytes, follows)
        return replace(spec, text=replace(spec.text or TextSpec(), retokeniser=retokeniser))

    hosts = {
        name: HostText(
            tokenizers[name], facts.context_length, facts.vocab_size, frozenset(plan.tokenizers[name].special_tokens)
        )
        for name, facts in plan.facts.items()
    }
    return Assembly(
        config=plan.config,
        topology=plan.topology,
        hosts=tuple(map(complete, plan.hosts)),
        identities=plan.identities,
        prompter=ChatPrompter(
            plan.topology,
            hosts,
            plan.templates,
            plan.stop_ids,
            plan.end_id,
            plan.hosts[0].vocab_size,
            allow_special_tokens=plan.config.input.allow_special_tokens,
            reasoning=plan.reasoning,
            thinking=plan.config.decoding.thinking,
        ),
        variants=plan.variants,
        draft=plan.draft,
    )
