"""What a family's tiny model shows: whether it is decoded as transformers' own `generate` does, and how.

Nothing is looked up: the model is loaded as a host loads it, decodes greedily beside other rows and alone, and is
given an adapter and a scoring head.
"""

from __future__ import annotations

import re
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForSequenceClassification, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from jobs.families.configurations import (
    FAMILIES,
    VOCAB_SIZE,
    is_installed,
    make_config,
    make_random_model,
    model_class,
)
from jobs.families.devices import why_not_spread
from jobs.families.ranks import RankPair
from pipeline.errors import ConfigurationError
from pipeline.hub.families import PLAIN, REFUSED, SLOTS, FamilyTable, ServedFamily, read_table
from pipeline.hub.sources import resolve_adapter, resolve_model
from pipeline.protocol.messages import Admission, Step
from pipeline.protocol.specs import HostSpec, RewardSpec
from pipeline.protocol.topology import HostRole
from pipeline.worker.adapters import without_peft_warnings
from pipeline.worker.cpu_kernels import choose_reproducible_kernels
from pipeline.worker.hosts import LanguageRunner
from pipeline.worker.language_model_runner import LanguageModelRunner
from pipeline.worker.loading import LoadedModel, load_language_model
from pipeline.worker.reward_loading import load_reward_model
from pipeline.worker.weights import is_composite, load_causal_lm

NUM_NEW = 24
LENGTHS = (56, 11, 37)  # of the prompts: beyond window and chunk, within both, and across the window in the answer
NUM_ON_DEVICES = 6  # tokens of each answer on simulated devices
ADAPTER = "adapter"
# operations whose result the host waits for
HOST_READS = frozenset({"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::item"})


class FamilyError(Exception):
    """A family's tiny model is decoded wrong, which must not be."""


def measure(name: str, ranks: RankPair | None = None) -> ServedFamily:
    """Make a tiny model of a family, and see.

    Args:
        name: of the family.
        ranks: where it is split over two; None: what the table says of ranks and devices is kept.

    Raises:
        FamilyError: it is decoded, and not as `generate` does.
    """
    if (reason := FAMILIES[name].why_not) is not None:
        return ServedFamily(REFUSED, reasons={"decoding": reason})
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(place) / "model"
        _save(make_random_model(name), folder)
        return _measure(name, folder, ranks)


def prompts() -> list[list[int]]:
    """Token ids of the prompts; none of them is special."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(5, VOCAB_SIZE, (length,), generator=generator).tolist() for length in LENGTHS]


@torch.inference_mode()
def generated(name: str, folder: Path, num_new: int = NUM_NEW) -> list[list[int]]:
    """What transformers' `generate` answers greedily, one prompt at a time."""
    model = model_class(name).from_pretrained(folder).eval()
    answers = []
    for prompt in prompts():
        ids = torch.tensor([prompt])
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_new, min_new_tokens=num_new,
            do_sample=False, eos_token_id=0, pad_token_id=0,
        )  # fmt: skip
        answers.append(out[0, ids.shape[1] :].tolist())
    return answers


def _save(model: Any, folder: Path) -> None:
    model.generation_config.eos_token_id = 0
    model.generation_config.pad_token_id = 0
    model.save_pretrained(folder)


def _measure(name: str, folder: Path, ranks: RankPair | None) -> ServedFamily:
    expected = generated(name, folder)
    spec = host_spec(folder)
    try:
        loaded = load_language_model(spec)
    except ConfigurationError as error:
        return ServedFamily(REFUSED, reasons={"decoding": _short(error)})
    reasons = {} if loaded.why_plain is None else {"decoding": loaded.why_plain}
    together, bits = greedy(loaded.runner, range(len(expected)))
    if together != expected:
        raise FamilyError(f"{name} is not decoded as transformers' generate does: {together} and not {expected}")
    lone, alone = load_language_model(replace(spec, num_slots=1)).runner, []
    for row in range(len(expected)):
        lone.resize(1)  # forgets the row before
        alone.append(greedy(lone, [row]))
    is_strict = all(torch.equal(one[1][0], bits[row]) for row, one in enumerate(alone))
    if not is_strict:
        raise FamilyError(f"the bits of {name} depend on the rows beside it")
    if reason := _why_no_adapters(spec, folder):
        reasons["lora"] = reason
    if reason := _why_no_reward_model(name, spec, folder):
        reasons["reward_model"] = reason
    reasons |= _why_not_split(name, spec, loaded, expected, ranks)
    return ServedFamily(
        decoding=loaded.decoding,
        is_strict=is_strict,
        takes_adapters="lora" not in reasons,
        is_reward_model="reward_model" not in reasons,
        has_fixed_passes=loaded.slot_runner is not None and _has_fixed_passes(loaded.slot_runner, spec),
        is_tensor_parallel="tensor_parallel" not in reasons,
        is_pipeline_parallel="pipeline_parallel" not in reasons,
        reasons=reasons,
    )


def _why_not_split(
    name: str, spec: HostSpec, loaded: LoadedModel, expected: Sequence[Sequence[int]], ranks: RankPair | None
) -> dict[str, str]:
    """Why the model is not split over ranks or spread over devices, where it is not."""
    if ranks is None:
        known = read_table().families.get(name)
        said = {} if known is None else known.reasons
        return {way: said[way] for way in ("tensor_parallel", "pipeline_parallel") if way in said}
    found = {
        "tensor_parallel": ranks.why_not(
            name, spec, prompts(), lambda rows, num_new: greedy(loaded.runner, rows, num_new)
        ),
        "pipeline_parallel": why_not_spread(spec, greedy_on_devices, [each[:NUM_ON_DEVICES] for each in expected]),
    }
    return {way: reason for way, reason in found.items() if reason is not None}


def greedy_on_devices(runner: LanguageRunner) -> tuple[list[list[int]], list[Tensor]]:
    """The first tokens of greedy answers to all prompts, for `why_not_spread`."""
    return greedy(runner, range(len(LENGTHS)), NUM_ON_DEVICES)


def host_spec(folder: Path) -> HostSpec:
    """A host of the tiny model in a folder, in strict mode."""
    return HostSpec(
        name="base",
        serves=("base",),
        source=resolve_model(str(folder), cache_folder=folder),
        dtype="float32",
        device="cpu",
        roles=(HostRole("base"),),
        num_slots=len(LENGTHS),
        vocab_size=VOCAB_SIZE,
        strict=True,
        cache_folder=folder,
    )


def greedy(
    runner: LanguageRunner, rows: Sequence[int], num_new: int = NUM_NEW
) -> tuple[list[list[int]], list[Tensor]]:
    """Greedy answers of some of the prompts in one batch; and each row's log-probabilities of its last token."""
    slots, texts = list(range(len(rows))), [prompts()[row] for row in rows]
    role = HostRole("base").name
    runner.advance(Step([Admission(slot, {role: text}) for slot, text in zip(slots, texts, strict=True)]))
    answers: list[list[int]] = [[] for _ in rows]
    for step in range(num_new):
        if step:
            runner.advance(Step((), slots, [answer[-1] for answer in answers]))
        logprobs_BV = runner.logprobs_at(slots, None)[:, 0].cpu()
        logprobs_BV = logprobs_BV.index_fill(1, torch.tensor([0]), -torch.inf)  # no answer ends
        for answer, token in zip(answers, logprobs_BV.argmax(-1).tolist(), strict=True):
            answer.append(token)
    return answers, list(logprobs_BV.clone())


class _CountHostReads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations that a captured pass must not have, inside models' forward passes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0
        self.depth = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += bool(self.depth) and func._schema.name in HOST_READS
        return func(*args, **(kwargs or {}))


def _has_fixed_passes(runner: LanguageModelRunner, spec: HostSpec) -> bool:
    """Whether a step waits for nothing inside the model, with the experts that a GPU computes: the model's own."""
    if not _reads_of_host(runner):
        return True
    relaxed = load_language_model(replace(spec, strict=False)).slot_runner  # never has other experts than its own
    assert relaxed is not None
    greedy(relaxed, range(len(LENGTHS)), num_new=1)
    return not _reads_of_host(relaxed)


def _reads_of_host(runner: LanguageModelRunner) -> int:
    """How often a step of running rows waits for a value inside the model."""
    with _CountHostReads() as count:

        def enter(module: nn.Module, *_: Any) -> None:
            count.depth += isinstance(module, PreTrainedModel)

        def leave(module: nn.Module, *_: Any) -> None:
            count.depth -= isinstance(module, PreTrainedModel)

        hooks = register_module_forward_pre_hook(enter), register_module_forward_hook(leave)
        try:
            runner.advance(Step((), [0, 1], [7, 8]))
        finally:
            for hook in hooks:
                hook.remove()
    return int(count.count)


def _why_no_adapters(spec: HostSpec, folder: Path) -> str | None:
    """Why LoRA of all linear layers but the head cannot be served beside the model; None: it can."""
    import peft

    place = folder.parent / ADAPTER
    try:
        with without_peft_warnings():
            model: Any = type(load_causal_lm(spec, dtype=torch.float32)).from_pretrained(folder)
            head = model.get_output_embeddings()
            of_text = set(model.get_decoder().modules()) if is_composite(model.config) else set(model.modules())
            targets = [
                at
                for at, each in model.named_modules()
                if isinstance(each, nn.Linear | Conv1D) and each is not head and each in of_text
            ]
            config = peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False)
            peft.get_peft_model(model, config).save_pretrained(place)
    except (ValueError, TypeError, RuntimeError, AttributeError, KeyError) as error:
        return f"peft makes none: {_short(error)}"
    roles = (*spec.roles, HostRole("adapted", ADAPTER))
    try:
        source = resolve_adapter(str(place), cache_folder=place)
        adapted = load_language_model(replace(spec, roles=roles, adapters={ADAPTER: source}))
    except ConfigurationError as error:
        return _short(error)
    if adapted.decoding == PLAIN and load_language_model(spec).decoding == SLOTS:
        return f"one row at a time: {adapted.why_plain}"
    return None


def _why_no_reward_model(name: str, spec: HostSpec, folder: Path) -> str | None:
    """Why a sequence classifier of the family cannot be a reward model; None: it can."""
    place = folder.parent / "classifier"
    torch.manual_seed(0)
    try:
        config = make_config(name)
        config.num_labels = 1
        classifier = AutoModelForSequenceClassification.from_config(config)
        classifier.eval().save_pretrained(place)
    except Exception as error:  # whatever a class raises that was made for something else
        has_none = "Unrecognized configuration class" in str(error)
        return "transformers has no sequence classifier of it" + ("" if has_none else f": {_short(error)}")
    source = resolve_model(str(place), cache_folder=place)
    reward_spec = replace(spec, source=source, reward=RewardSpec((0,)))
    try:
        load_reward_model(reward_spec, RewardSpec((0,)))
    except ConfigurationError as error:
        return _short(error)
    return None


def _short(error: Exception) -> str:
    """The reason itself, without the model that it is about."""
    text = re.sub(r"/\S*/(model|adapter|classifier)\b", "it", " ".join(str(error).split()))
    return text.rsplit("cannot be decoded: ", 1)[-1].rsplit("cannot be used: ", 1)[-1][:200]


def measure_families(names: Sequence[str] = ()) -> FamilyTable:
    """Measure families, each with a line of progress on stderr.

    Args:
        names: which; none: all that the installed transformers ships.

    Raises:
        ConfigurationError: there is no such family.
        FamilyError: one is decoded wrong.
    """
    if unknown := [name for name in names if name not in FAMILIES]:
        raise ConfigurationError(f"no tiny model is known of {', '.join(unknown)}")
    chosen = list(names) or [name for name in sorted(FAMILIES) if is_installed(name)]
    choose_reproducible_kernels()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    found = {}
    with RankPair() as ranks:
        for at, name in enumerate(chosen, 1):
            found[name] = measure(name, ranks)
            print(f"{at}/{len(chosen)} {name}: {found[name].decoding}", file=sys.stderr, flush=True)
    return FamilyTable(str(transformers.__version__), found)
