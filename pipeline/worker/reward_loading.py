"""From a `HostSpec` to a `RewardModelRunner`, and a probe that its scores are those of the plain model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from pipeline.attention.branches import ATTENTION
from pipeline.errors import ConfigurationError
from pipeline.hub.model_facts import context_length, reason_of, text_config
from pipeline.hub.sources import fetch_weights
from pipeline.protocol.messages import Admission, Step
from pipeline.protocol.specs import HostSpec, RewardSpec
from pipeline.protocol.topology import HostRole
from pipeline.worker.cpu_kernels import choose_reproducible_kernels
from pipeline.worker.loading import pick_device, pick_dtype
from pipeline.worker.reward_model_runner import RewardModelRunner

PROBE_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.3, torch.float16: 0.05}  # of the scores' size


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
    probe = _probe_tokens(model)
    with torch.inference_mode():
        plain = [
            model(input_ids=ids[None], attention_mask=torch.ones_like(ids[None])).logits[0].float()
            for ids in (probe[:3], probe)
        ]
    backbone, head = model.base_model, head.float()  # differences of scores need more digits than a half type has
    probed = _checked(backbone, head, plain, probe.tolist(), spec, model)
    return RewardModelRunner(
        backbone,
        head,
        spec.roles,
        reward,
        num_slots=spec.num_slots,
        context_length=context_length(model.config),
        strict=spec.strict,
        bytes_per_token=probed.cache_bytes_per_token,
    )


def _load_classifier(spec: HostSpec) -> Any:
    try:
        model, report = AutoModelForSequenceClassification.from_pretrained(
            fetch_weights(spec.source, cache_folder=spec.cache_folder),
            dtype=pick_dtype(spec.dtype, pick_device(spec.device)),
            trust_remote_code=spec.source.trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ConfigurationError(f"{spec.title}: {reason_of(error)}") from error
    if missing := sorted(report["missing_keys"]):
        raise _refused(spec, model, f"its files lack {', '.join(missing[:5])}, which would be random")
    return model


def _probe_tokens(model: Any) -> Tensor:
    """Four tokens that are no padding, so that the plain model pools at the last one."""
    pad_id = text_config(model.config).pad_token_id
    ids = [token for token in range(1, 6) if token != pad_id][:4]
    return torch.tensor(ids, device=next(model.parameters()).device)


def _checked(
    backbone: Any, head: Any, plain: list[Tensor], ids: list[int], spec: HostSpec, model: Any
) -> RewardModelRunner:
    """Read two tokens, note a third, fork a fourth; compare with plain passes over three and over four."""
    tolerance = PROBE_TOLERANCE.get(model.dtype, 0.3) * (1 + max(score_L.abs().max().item() for score_L in plain))
    model.set_attn_implementation(ATTENTION)
    labels = tuple(range(len(plain[0])))
    roles = [HostRole(f"label {label}") for label in labels]
    host = RewardModelRunner(backbone, head, roles, RewardSpec(labels), num_slots=1)
    try:
        host.advance(Step([Admission(0, {role.name: ids[:2] for role in roles})]))
        host.advance(Step((), [0], [ids[2]]))
        found_L = host.rewards_at([0], torch.tensor([[ids[3]]]))[0, :, 0]
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
    return host


def _refused(spec: HostSpec, model: Any, reason: str) -> ConfigurationError:
    return ConfigurationError(f"{spec.title}, architecture {model.config.model_type}, cannot be used: {reason}")
