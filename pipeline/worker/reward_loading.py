"""From a `HostSpec` to a `RewardModelRunner`, and a probe that its scores are those of the plain model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from pipeline.attention.branches import ATTENTION
from pipeline.attention.visibility import LayerFacts, NotServed, learn_layers
from pipeline.errors import ConfigurationError
from pipeline.hub.families import why_layers_differ
from pipeline.hub.model_facts import context_length, reason_of, text_config
from pipeline.hub.sources import fetch_weights
from pipeline.protocol.messages import Admission, Step
from pipeline.protocol.specs import HostSpec, RewardSpec
from pipeline.protocol.topology import HostRole
from pipeline.worker.cpu_kernels import choose_reproducible_kernels
from pipeline.worker.experts import pad_experts
from pipeline.worker.loading import as_mapping, exact_context, pick_device, pick_dtype, why_not_strict
from pipeline.worker.probes import NUM_OTHERS, SMALL, probe_tokens, small_limits
from pipeline.worker.reward_model_runner import RewardModelRunner
from pipeline.worker.weights import load_whole
from pipeline.worker.whole_vectors import watching

PROBE_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.3, torch.float16: 0.05}  # of the scores' size
NUM_CANDIDATES = 3  # of each row in the check that bits are a row's own


def load_reward_model(spec: HostSpec, reward: RewardSpec) -> RewardModelRunner:
    """Load the classifier onto the device and check that branches score as a plain forward pass does.

    Raises:
        ConfigurationError: it is no sequence classifier, or its backbone cannot be read in branches.
    """
    device = pick_device(spec.device)
    if spec.strict and device.type == "cpu":
        choose_reproducible_kernels()
        torch.set_num_threads(1)  # with more, a row's bits depend on the work beside it
    model = _load_classifier(spec).to(device).eval().requires_grad_(False)
    head = getattr(model, "score", None)
    if head is None:
        raise _refused(spec, model, "it has no head named score, as transformers' own sequence classifiers have")
    if (reason := why_layers_differ(as_mapping(model.config))) is not None:
        raise _refused(spec, model, reason)
    backbone, float_head = model.base_model, copy.deepcopy(head).float()
    with watching() as watch:
        probed = _check(model, backbone, float_head, spec)
    layers = _learn(model, spec)
    model.set_attn_implementation(ATTENTION)
    needs_whole = False
    if spec.strict and device.type == "cpu":
        needs_whole = pad_experts(model) or watch.found
        _check_strict(
            model,
            partial(RewardModelRunner, backbone, float_head, layers=layers, needs_whole_vectors=needs_whole),
            spec,
        )
    contexts = [each for each in (context_length(model.config), exact_context(model.config)) if each is not None]
    return RewardModelRunner(
        backbone,
        float_head,  # differences of scores need more digits than a half type has
        spec.roles,
        reward,
        num_slots=spec.num_slots,
        context_length=min(contexts, default=None),
        strict=spec.strict,
        bytes_per_token=probed.cache_bytes_per_token,
        layers=layers,
        needs_whole_vectors=needs_whole,
    )


def _load_classifier(spec: HostSpec) -> Any:
    folder = fetch_weights(spec.source, cache_folder=spec.cache_folder)
    dtype = pick_dtype(spec.dtype, pick_device(spec.device))
    model, fault = load_whole(spec, AutoModelForSequenceClassification, folder, dtype=dtype)
    if fault is not None:
        raise _refused(spec, model, fault)
    return model


def _check(model: Any, backbone: Any, head: Any, spec: HostSpec) -> RewardModelRunner:
    """Compare scores in branches with plain forward passes, beyond every window and chunk; the runner that gave them.

    Windows and chunks are made small for that, and the same is done with them as they are.
    """
    ids = _probe_tokens(model)
    own_attention = model.config._attn_implementation
    for limits in (small_limits(model.config), nullcontext()):
        with limits:
            model.set_attn_implementation(own_attention)
            with torch.inference_mode():
                plain = [_plain_scores(model, ids[:-1]), _plain_scores(model, ids)]
            layers = _learn(model, spec)
            model.set_attn_implementation(ATTENTION)
            runner = _compare(backbone, head, plain, ids, layers, spec, model)
    return runner


def _probe_tokens(model: Any) -> list[int]:
    """Tokens that are no padding, so that the plain model pools at the last one."""
    pad_id = text_config(model.config).pad_token_id
    vocab_size = int(text_config(model.config).vocab_size)
    first, _ = probe_tokens(model, vocab_size)
    return [token if token != pad_id else (token + 1) % vocab_size for token in first]


def _plain_scores(model: Any, ids: Sequence[int]) -> Tensor:
    """The model's own scores [L] of a text."""
    ids_1T = torch.tensor([list(ids)], device=next(model.parameters()).device)
    scores: Tensor = model(input_ids=ids_1T, attention_mask=torch.ones_like(ids_1T)).logits[0].float()
    return scores


def _learn(model: Any, spec: HostSpec) -> tuple[LayerFacts, ...]:
    try:
        return learn_layers(model)
    except Exception as error:
        reason = str(error) if isinstance(error, NotServed) else reason_of(error)
        raise _refused(spec, model, reason) from error


def _compare(
    backbone: Any,
    head: Any,
    plain: Sequence[Tensor],
    ids: Sequence[int],
    layers: Sequence[LayerFacts],
    spec: HostSpec,
    model: Any,
) -> RewardModelRunner:
    """Read all but two tokens, append one, fork the last; compare with plain passes over all but one and over all."""
    tolerance = PROBE_TOLERANCE.get(model.dtype, 0.3) * (1 + max(score_L.abs().max().item() for score_L in plain))
    labels = tuple(range(len(plain[0])))
    roles = [HostRole(f"label {label}") for label in labels]
    runner = RewardModelRunner(backbone, head, roles, RewardSpec(labels), num_slots=1, layers=layers)
    try:
        runner.advance(Step([Admission(0, {role.name: ids[:-2] for role in roles})]))
        runner.advance(Step((), [0], [ids[-2]]))
        found_L = runner.rewards_at([0], torch.tensor([[ids[-1]]]))[0, :, 0]
    except Exception as error:
        raise _refused(spec, model, reason_of(error)) from error
    difference = (found_L - (plain[1] - plain[0])).abs().max().item()
    if not difference <= tolerance:
        raise _refused(
            spec,
            model,
            f"its scores in branches differ from those of a plain forward pass by {difference:.2g}; only models "
            f"that read from left to right can be scored so",
        )
    return runner


def _check_strict(model: Any, make_runner: Callable[..., RewardModelRunner], spec: HostSpec) -> None:
    """Raise where a row's rewards have other bits beside other rows than alone."""
    ids = _probe_tokens(model)
    probes = [ids[: SMALL + 5], *(ids[at : at + 2 + at % 5] for at in range(NUM_OTHERS))]
    role = HostRole("label 0")

    @torch.inference_mode()
    def rewards(texts: Sequence[Sequence[int]]) -> Tensor:
        """Of the first text, [K]: its candidates are scored with those of the others."""
        runner, slots = make_runner([role], RewardSpec((0,)), num_slots=len(texts)), list(range(len(texts)))
        runner.advance(Step([Admission(slot, {role.name: text[:-1]}) for slot, text in enumerate(texts)]))
        runner.advance(Step((), slots, [text[-1] for text in texts]))
        return runner.rewards_at(slots, torch.tensor([ids[-NUM_CANDIDATES:]] * len(texts)))[0, 0]

    try:
        alone, *beside = [rewards(texts) for texts in (probes[:1], probes[:3], probes)]
    except Exception as error:
        raise _refused(spec, model, reason_of(error)) from error
    if not all(torch.equal(each, alone) for each in beside):
        raise _refused(spec, model, why_not_strict())


def _refused(spec: HostSpec, model: Any, reason: str) -> ConfigurationError:
    return ConfigurationError(f"{spec.title}, architecture {model.config.model_type}, cannot be used: {reason}")
