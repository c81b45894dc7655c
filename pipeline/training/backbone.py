"""The backbone of a training: a model that was found, and what encodes text for it just as a run would."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from pipeline.config.sections import Config, InputConfig, OutputConfig
from pipeline.engine.prompter import Prompter
from pipeline.errors import ConfigurationError, RowError
from pipeline.hub.sources import ModelSource
from pipeline.hub.tokenizer_facts import load_tokenizer
from pipeline.protocol.specs import HostSpec
from pipeline.protocol.topology import BASE
from pipeline.records import Message, Row
from pipeline.runtime.assembly import load_assembly
from pipeline.runtime.replica_plan import plan_replica, resolve_models
from pipeline.training.settings import TrainConfig
from pipeline.worker.devices import pick_device, pick_dtype
from pipeline.worker.weights import load_causal_lm


@dataclass(frozen=True, slots=True)
class Backbone:
    """A model to train adapters on. Picklable; no weights are loaded.

    Args:
        source: its files.
        spec: how a run would load it.
        prompter: encodes prompts and answers as a run does.
        template_time: the time that its chat template is given; None where it asks for none.
    """

    source: ModelSource
    spec: HostSpec
    prompter: Prompter
    template_time: datetime | None

    def encode(self, prompt: Sequence[Message], answers: Sequence[str]) -> tuple[list[int], list[list[int]]]:
        """Token ids of a prompt, and of answers to it with the end of a turn.

        What a reasoning model writes before an answer without reasoning counts to the prompt.

        Raises:
            RowError: the model cannot read them or its context is too short, or the answers come after different
                reasoning.
        """
        prompts = self.prompter.encode(prompt, {})
        rows = [Row("", tuple(prompt), response=text) for text in answers]
        encoded = [self.prompter.encode_existing(row, prompts) for row in rows]
        longest, left = max(len(ids) for ids, _ in encoded), self.prompter.context_left(prompts)
        if left is not None and longest > left:
            raise RowError(
                f"an answer has {longest:,} tokens and the model's context holds {left:,} after the prompt"
            )
        before = [list(ids[:count]) for ids, count in encoded]
        if any(each != before[0] for each in before):
            raise RowError("its answers come after different reasoning")
        return [*prompts[BASE], *before[0]], [list(ids[count:]) for ids, count in encoded]

    @property
    def device(self) -> torch.device:
        """Where it is trained."""
        return pick_device(self.spec.device)

    def load_model(self) -> Any:
        """The model, on the CPU. Raises ConfigurationError."""
        return load_causal_lm(self.spec, dtype=pick_dtype(self.spec.dtype, self.device), device=self.device)

    def load_tokenizer(self) -> Any:
        """Its tokenizer, of transformers."""
        return load_tokenizer(self.source)


def find_backbone(
    config: TrainConfig,
    cache_folder: Path,
    *,
    now: datetime | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Backbone:
    """Find the model and load its tokenizer.

    Args:
        config: names it.
        cache_folder: where files are kept that are fetched.
        now: the time that its chat template is given, of a training that goes on.
        progress: called with a line for every file that is fetched or made.

    Raises:
        ConfigurationError: there is no such model, or its chat template cannot be used.
    """
    if config.base.quantization is not None:
        raise ConfigurationError("base.quantization: adapters are trained on ordinary weights; leave it out")
    run = Config(
        input=InputConfig(path=config.input.path, allow_special_tokens=config.input.allow_special_tokens),
        output=OutputConfig(path=config.output.path),
        base=config.base,
    )
    resolved = resolve_models(run, cache_folder, progress=progress)
    plan = plan_replica(run, resolved, cache_folder, now=now)
    assembly = load_assembly(plan)
    if config.base.device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigurationError(f"base.device: {config.base.device}, and torch finds no GPU; use auto or cpu")
    return Backbone(resolved.models[BASE], assembly.hosts[0], assembly.prompter, plan.template_time)
