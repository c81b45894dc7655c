"""From a `HostSpec` to the runner of a reward model, and a probe that its scores are those of the plain model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.attention.branches import ATTENTION
from pipeline.attention.visibility import ROW_LENGTHS, LayerFacts, NotServed, learn_layers
from pipeline.errors import ConfigurationError
from pipeline.hub.families import why_layers_differ
from pipeline.hub.model_facts import as_mapping, context_length, text_config
from pipeline.hub.reward_heads import choose_output, output_names
from pipeline.hub.sources import fetch_weights
from pipeline.protocol.messages import Admission, Step
from pipeline.protocol.specs import HostSpec, RewardSpec
from pipeline.protocol.topology import HostRole
from pipeline.worker.adapter_files import add_adapters
from pipeline.worker.adapters import TokenAdapters, take_adapters
from pipeline.worker.branch_probes import bits_are_a_rows_own
from pipeline.worker.branch_runner import BranchRunner
from pipeline.worker.cpu_kernels import choose_reproducible_kernels
from pipeline.worker.devices import pick_devices, pick_dtype
from pipeline.worker.experts import pad_experts
from pipeline.worker.head_scorer import HeadScorer, RoleHead
from pipeline.worker.layer_devices import place_model
from pipeline.worker.loading import exact_context, why_not_strict
from pipeline.worker.model_errors import MODEL_ERRORS, reason_of_model
from pipeline.worker.probes import probe_tokens, small_limits
from pipeline.worker.quantised import quantised_options, why_bits_are_shared
from pipeline.worker.scoring_models import ScoringModel, load_scoring_model, load_value_head
from pipeline.worker.weights import sharding_of, why_not_finite
from pipeline.worker.whole_vectors import detect_partial_vectors

PROBE_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.3, torch.float16: 0.05}  # of the scores' size


@dataclass(frozen=True, slots=True)
class _Loaded:
    """A model on its device, with all of its heads.

    Args:
        model: with the adapters' layers in it.
        found: as it was loaded: the backbone, and what its own head's outputs are called.
        heads: in float32, by the name of the adapter; None is the model's own.
        adapters: which tokens have which.
        ids: of the probe.
        expected: by adapter, scores [L] of the probe without its last token and with it, from plain passes.
        expected_small: the same with small windows and chunks.
    """

    model: Any
    found: ScoringModel
    heads: Mapping[str | None, Any]
    adapters: TokenAdapters | None
    ids: Sequence[int]
    expected: Mapping[str | None, list[Tensor]]
    expected_small: Mapping[str | None, list[Tensor]]


def load_reward_model(spec: HostSpec, reward: RewardSpec) -> BranchRunner:
    """Load a model with a head onto the device and check that branches score as a plain forward pass does.

    Raises:
        ConfigurationError: it has no head, or one that does not fit, or its backbone cannot be read in branches.
    """
    devices = pick_devices(spec)
    device = devices[0]
    if spec.strict and device.type == "cpu":
        choose_reproducible_kernels()
        torch.set_num_threads(1)  # with more, a row's bits depend on the work beside it
    loaded = _load(spec, devices)
    model = loaded.model
    if (reason := why_layers_differ(as_mapping(model.config))) is not None:
        raise _refused(spec, model, reason)
    if spec.strict and (reason := why_bits_are_shared(model.config)) is not None:
        raise _refused(spec, model, f"{reason}; choose decoding.reproducibility=relaxed")
    role_heads = [_role_head(loaded, role, at, reward) for at, role in enumerate(spec.roles)]
    with detect_partial_vectors() as detector:
        probed = _check(loaded, spec)
    layers = _learn(loaded, spec)
    model.set_attn_implementation(ATTENTION)
    needs_whole = False
    if spec.strict and device.type == "cpu":
        needs_whole = pad_experts(model) or detector.found
        _check_strict(loaded, layers, spec, needs_whole_vectors=needs_whole)
    contexts = [each for each in (context_length(model.config), exact_context(model.config)) if each is not None]
    return BranchRunner(
        loaded.found.backbone,
        HeadScorer(role_heads),
        spec.roles,
        num_slots=spec.num_slots,
        retokeniser=reward.retokeniser,
        stop_ids=reward.stop_ids,
        adapters=loaded.adapters,
        context_length=min(contexts, default=None),
        strict=spec.strict,
        bytes_per_token=probed.cache_bytes_per_token,
        layers=layers,
        needs_whole_vectors=needs_whole,
    )


def _load(spec: HostSpec, devices: Sequence[torch.device]) -> _Loaded:
    device = devices[0]
    dtype = pick_dtype(spec.dtype, device)
    options = quantised_options(spec.source, device, dtype)
    folder = fetch_weights(spec.source, cache_folder=spec.cache_folder)
    found = load_scoring_model(
        spec.title,
        folder,
        dtype=dtype,
        trust_remote_code=spec.source.trust_remote_code,
        takes_adapters=bool(spec.adapters),
        options={**options, **sharding_of(spec, folder)},
    )
    model = place_model(found.model, devices, spec.title).eval().requires_grad_(False)
    if reason := why_not_finite(model):
        raise _refused(spec, model, reason)
    if found.head is None and not spec.adapters:
        raise _refused(
            spec, model, "it has no head that scores each token from left to right, as score.weight is for instance"
        )
    heads: dict[str | None, nn.Module] = {} if found.head is None else {None: found.float_head()}
    ids = _probe_tokens(model)
    expected: dict[str | None, list[Tensor]] = {}
    small: dict[str | None, list[Tensor]] = {}

    def expect(name: str | None) -> None:
        for scores, limits in ((expected, nullcontext()), (small, small_limits(model.config))):
            with limits:
                scores[name] = [
                    _plain_scores(found, heads[name], part, is_own=name is None) for part in (ids[:-1], ids)
                ]

    if None in heads:
        try:
            expect(None)
        except MODEL_ERRORS as error:
            reason = f"its own forward pass over text fails: {reason_of_model(error)}"
            raise _refused(spec, model, reason) from error
    if not spec.adapters:
        return _Loaded(model, found, heads, None, ids, expected, small)
    wrapped = add_adapters(model, spec)
    for name, adapter in spec.adapters.items():
        title = f"{spec.title}: adapter {adapter.name}"
        heads[name] = load_value_head(fetch_weights(adapter, cache_folder=spec.cache_folder), title).to(device)
        wrapped.set_adapter(name)
        if reason := why_not_finite(wrapped, f".{name}."):
            raise ConfigurationError(f"{title}: {reason}")
        try:
            expect(name)
        except MODEL_ERRORS as error:
            raise _refused(spec, model, f"with adapter {adapter.name}: {reason_of_model(error)}") from error
    try:
        adapters = take_adapters(wrapped, list(spec.adapters))
    except NotImplementedError as error:
        raise ConfigurationError(f"{spec.title}: {error}") from error
    return _Loaded(wrapped.get_base_model(), found, heads, adapters, ids, expected, small)


def _role_head(loaded: _Loaded, role: HostRole, at: int, reward: RewardSpec) -> RoleHead:
    """The head and the output of a role. Raises ConfigurationError where there is no such."""
    place = f"principals.{role.name}"
    if role.adapter not in loaded.heads:
        raise ConfigurationError(f"{place}: the model has no head of its own, only its adapters have")
    names = loaded.found.names if role.adapter is None else output_names(loaded.heads[role.adapter][-1].out_features)
    ends = reward.ends[at] if at < len(reward.ends) else None
    is_at_end = loaded.found.ends and role.adapter is None if ends is None else ends
    if is_at_end and reward.end_id is None:
        raise ConfigurationError(f"{place}: its tokenizer has no end of text, at which it would be scored")
    return RoleHead(
        loaded.heads[role.adapter],
        choose_output(reward.labels[at], names, place),
        reward.end_id if is_at_end else None,
    )


def _check(loaded: _Loaded, spec: HostSpec) -> BranchRunner:
    """Compare scores in branches with plain forward passes, beyond every window and chunk; the runner that gave them.

    Windows and chunks are made small for that, and the same is done with them as they are.
    """
    for expected, limits in (
        (loaded.expected_small, small_limits(loaded.model.config)),
        (loaded.expected, nullcontext()),
    ):
        with limits:
            layers = _learn(loaded, spec)
            loaded.model.set_attn_implementation(ATTENTION)
            runner = _compare(loaded, expected, layers, spec)
    return runner


def _probe_tokens(model: Any) -> list[int]:
    """Tokens that are no padding, so that the plain model pools at the last one."""
    pad_id = text_config(model.config).pad_token_id
    vocab_size = int(text_config(model.config).vocab_size)
    first, _ = probe_tokens(model, vocab_size)
    return [token if token != pad_id else (token + 1) % vocab_size for token in first]


@torch.inference_mode()
def _plain_scores(found: ScoringModel, head: Any, ids: Sequence[int], *, is_own: bool) -> Tensor:
    """Scores [L] of a text by a plain pass: the model's own where it gives them, or else its head's at the end."""
    device = next(found.backbone.parameters()).device
    ids_1T = torch.tensor([list(ids)], device=device)
    mask_1T = torch.ones_like(ids_1T)
    if is_own and found.gives_scores:
        scores: Tensor = found.model(input_ids=ids_1T, attention_mask=mask_1T).logits[0].float()
        return scores
    states_TH = found.backbone(input_ids=ids_1T, attention_mask=mask_1T, use_cache=False).last_hidden_state[0].float()
    by_head: Tensor = head.to(device)(states_TH[-1:])[0]
    return by_head


def _learn(loaded: _Loaded, spec: HostSpec) -> tuple[LayerFacts, ...]:
    if loaded.adapters is not None:
        loaded.adapters.of_tokens = torch.zeros(sum(ROW_LENGTHS), dtype=torch.long, device=loaded.model.device)
    try:
        return learn_layers(loaded.model)
    except NotServed as error:
        raise _refused(spec, loaded.model, str(error)) from error
    except MODEL_ERRORS as error:
        raise _refused(spec, loaded.model, reason_of_model(error)) from error


def _compare(
    loaded: _Loaded, expected: Mapping[str | None, list[Tensor]], layers: Sequence[LayerFacts], spec: HostSpec
) -> BranchRunner:
    """Read all but two tokens, append one, fork the last; compare with plain passes over all but one and over all."""
    model, ids = loaded.model, loaded.ids
    outputs = [(name, label) for name, plain in expected.items() for label in range(len(plain[0]))]
    roles = [HostRole(f"{name} {label}", name) for name, label in outputs]
    scorer = HeadScorer([RoleHead(loaded.heads[name], label) for name, label in outputs])
    runner = BranchRunner(loaded.found.backbone, scorer, roles, num_slots=1, layers=layers, adapters=loaded.adapters)
    try:
        runner.advance(Step([Admission(0, {role.name: ids[:-2] for role in roles})]))
        runner.advance(Step((), [0], [ids[-2]]))
        found_R = runner.rewards_at([0], torch.tensor([[ids[-1]]]))[0, :, 0]
    except MODEL_ERRORS as error:
        raise _refused(spec, model, reason_of_model(error)) from error
    for (name, label), found in zip(outputs, found_R, strict=True):
        before, after = expected[name]
        size = 1 + max(score_L.abs().max().item() for score_L in (before, after))
        difference = abs((found - (after[label] - before[label])).item())
        if not difference <= PROBE_TOLERANCE.get(model.dtype, 0.3) * size:
            raise _refused(
                spec,
                model,
                f"its scores in branches differ from those of a plain forward pass by {difference:.2g}; only models "
                f"that read from left to right can be scored so",
            )
    return runner


def _check_strict(
    loaded: _Loaded, layers: Sequence[LayerFacts], spec: HostSpec, *, needs_whole_vectors: bool
) -> None:
    """Raise where a row's rewards have other bits beside other rows than alone."""
    roles = [HostRole(str(name), name) for name in loaded.heads]
    scorer = HeadScorer([RoleHead(head, 0) for head in loaded.heads.values()])
    make_runner = partial(
        BranchRunner,
        loaded.found.backbone,
        scorer,
        roles,
        layers=layers,
        adapters=loaded.adapters,
        needs_whole_vectors=needs_whole_vectors,
    )
    try:
        is_own = bits_are_a_rows_own(make_runner, roles, loaded.ids)
    except MODEL_ERRORS as error:
        raise _refused(spec, loaded.model, reason_of_model(error)) from error
    if not is_own:
        raise _refused(spec, loaded.model, why_not_strict())


def _refused(spec: HostSpec, model: Any, reason: str) -> ConfigurationError:
    return ConfigurationError(f"{spec.title}, architecture {model.config.model_type}, cannot be used: {reason}")
