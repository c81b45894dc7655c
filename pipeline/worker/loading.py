"""From a `HostSpec` to a `LanguageModelRunner`: weights, adapters, and a probe that the model can be served."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from pipeline.attention.cached_layers import CachedLayer, bytes_per_row, learn_states
from pipeline.attention.rows import what_is_missing
from pipeline.attention.slots import ATTENTION
from pipeline.attention.transfers import on_device
from pipeline.attention.visibility import ROW_LENGTHS, LayerFacts, NotServed, learn_layers
from pipeline.errors import ConfigurationError
from pipeline.hub.families import PLAIN, SLOTS, keeps_states, rope_settings, why_not_in_slots
from pipeline.hub.model_facts import as_mapping
from pipeline.protocol.specs import HostSpec
from pipeline.protocol.topology import HostRole
from pipeline.worker.adapter_files import add_adapters, at_own_preference
from pipeline.worker.adapters import TokenAdapters, take_adapters
from pipeline.worker.cpu_kernels import (
    MKL_MODE,
    choose_reproducible_kernels,
    reproducible_mode,
)
from pipeline.worker.devices import pick_devices, pick_dtype
from pipeline.worker.experts import pad_experts
from pipeline.worker.hosts import LanguageRunner
from pipeline.worker.language_model_runner import LanguageModelRunner
from pipeline.worker.layer_devices import place_model
from pipeline.worker.model_errors import MODEL_ERRORS, reason_of_model
from pipeline.worker.plain_runner import PlainPasses, PlainRunner
from pipeline.worker.probes import (
    TOLERANCE,
    bits_are_a_rows_own,
    has_large_limits,
    largest_difference,
    plain_logprobs,
    probe_tokens,
    reads_parts,
    small_limits,
    tolerance_of,
)
from pipeline.worker.quantised import why_bits_are_shared
from pipeline.worker.ranks import agree
from pipeline.worker.recurrent_passes import RecurrentPasses
from pipeline.worker.recurrent_runner import RecurrentRunner, RowBytes
from pipeline.worker.token_holes import close_holes
from pipeline.worker.weights import load_causal_lm, why_not_finite
from pipeline.worker.whole_vectors import detect_partial_vectors

SlotRunner = LanguageModelRunner | RecurrentRunner


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A language model that was checked and can be run.

    Args:
        runner: runs it.
        why_plain: why it is decoded the plain way, where nobody asked for that.
    """

    runner: LanguageRunner
    why_plain: str | None = None

    @property
    def slot_runner(self) -> LanguageModelRunner | None:
        """The runner where passes over slots are packed, which can be captured in CUDA graphs."""
        return self.runner if isinstance(self.runner, LanguageModelRunner) else None

    @property
    def decoding(self) -> str:
        """SLOTS or PLAIN: as the table of families calls it."""
        return PLAIN if isinstance(self.runner, PlainRunner) else SLOTS


def load_language_model(spec: HostSpec) -> LoadedModel:
    """Load the weights onto the device and check that they are decoded exactly: in slots where that can be done.

    Raises:
        ConfigurationError: the model cannot be loaded or cannot be served, with the reason.
    """
    devices = pick_devices(spec)
    device = devices[0]
    if spec.strict and device.type == "cpu":
        choose_reproducible_kernels()
        torch.set_num_threads(1)  # with more, a row's bits depend on the number of rows
    if device.type == "cuda" and (missing := what_is_missing(device)):
        warnings.warn(
            f"{spec.title} will take several times as long: kernels for this GPU cannot be built without {missing}",
            RuntimeWarning,
            stacklevel=2,
        )
    with on_device(device):
        return _Loading(spec, devices).run()


class _Loading:
    """The steps from a spec to a model that can be run.

    Plain passes come before anything that changes the model, and the base's before any adapter is loaded: what
    differs from them afterwards names its cause.
    """

    def __init__(self, spec: HostSpec, devices: Sequence[torch.device]) -> None:
        self._spec = spec
        device = devices[0]
        model = load_causal_lm(spec, dtype=pick_dtype(spec.dtype, device), device=device)
        self._model = place_model(model, devices, spec.title).eval().requires_grad_(False)
        if reason := why_not_finite(self._model):
            raise ConfigurationError(f"{spec.title}: {reason}")
        close_holes(self._model, spec.holes)
        self._pad_id = self._model.config.pad_token_id
        self._can_forget_padding = _can_be_none(self._model.config, "pad_token_id")
        self._own_attention = self._model.config._attn_implementation
        self._probes = probe_tokens(self._model, spec.vocab_size)
        # one role of each adapter: others with the same weights compute the same
        self._probed_roles = tuple({role.adapter: role for role in reversed(spec.roles)}.values())
        self._adapters: TokenAdapters | None = None
        self._expected: dict[str | None, list[Tensor]] = {}
        self._expected_small: dict[str | None, list[Tensor]] = {}
        # what the cache of a model with recurrent layers holds
        self._cached: tuple[CachedLayer, ...] | None = None
        self._reads_parts = True
        self._tolerance = TOLERANCE.get(self._model.dtype, 0.5)

    def run(self) -> LoadedModel:
        spec = self._spec
        try:
            self._expect(self._model, None)
        except MODEL_ERRORS as error:
            why = f"its own forward pass over text fails: {reason_of_model(error)}"
            raise _refused(spec, self._model.config, why) from error
        if spec.adapters:
            self._take_adapters()
        if spec.attention == "plain":
            return LoadedModel(self._plain_runner())
        runner: SlotRunner | None = None
        reason: str | None = None
        try:
            runner = self._slot_runner()
        except NotServed as error:
            reason = str(error)
        reason = agree(reason)
        if runner is not None and reason is None:
            return LoadedModel(runner)
        assert reason is not None
        if spec.attention == "slots":
            raise _refused(spec, self._model.config, reason)
        self._model.set_attn_implementation(self._own_attention)
        if self._can_forget_padding:
            self._model.config.pad_token_id = self._pad_id
        return LoadedModel(self._plain_runner(), why_plain=reason)

    def _expect(self, model: Any, adapter: str | None) -> None:
        """Note what plain passes give, with windows as they are and with small ones."""
        self._expected[adapter] = plain_logprobs(model, self._probes, self._spec.vocab_size)
        if any(bool(logprobs.isnan().any()) for logprobs in self._expected[adapter]):
            dtype = str(self._model.dtype).removeprefix("torch.")
            raise _refused(self._spec, model.config, f"its own forward pass over text gives NaN in {dtype}")
        self._tolerance = max(self._tolerance, tolerance_of(model, self._probes, self._expected[adapter]))
        if not has_large_limits(model.config):
            return
        with small_limits(model.config):
            self._expected_small[adapter] = plain_logprobs(model, self._probes, self._spec.vocab_size)

    def _take_adapters(self) -> None:
        spec = self._spec
        wrapped = add_adapters(self._model, spec)
        for name in spec.adapters:
            wrapped.set_adapter(name)
            if reason := why_not_finite(wrapped, f".{name}."):
                raise ConfigurationError(f"{spec.title}: adapter {name}: {reason}")
            try:
                self._expect(wrapped, name)
            except MODEL_ERRORS as error:
                raise _refused(spec, self._model.config, f"with adapter {name}: {reason_of_model(error)}") from error
        self._adapters = _take_adapters(wrapped, spec)
        self._model = wrapped.get_base_model()

    def _slot_runner(self) -> SlotRunner:
        """The model in slots. Raises NotServed where its attention, or what it gives, is not what slots compute."""
        spec, model = self._spec, self._model
        if self._can_forget_padding:
            # nothing is padded, and some models look at every input whether it is: a GPU would be waited for
            model.config.pad_token_id = None
        if reason := why_not_in_slots(as_mapping(model.config)):
            raise NotServed(reason)
        if spec.strict and (reason := why_bits_are_shared(model.config)):
            raise NotServed(f"in strict mode no bit of a row may depend on the rows beside it, and {reason}")
        try:
            if keeps_states(as_mapping(model.config)):
                if self._adapters is not None and self._adapters.num_preferences:
                    raise NotServed("an adapter at each row's own weights is not mixed with recurrent layers")
                self._cached = self._learn_states()
                self._reads_parts = reads_parts(self._make_passes(self._learn_layers()), self._probes[0])
            if has_large_limits(model.config):
                with small_limits(model.config):
                    layers = self._learn_layers()
                    self._check(self._make_probed_runner(layers), self._expected_small)
            layers = self._learn_layers()
            if reason := _why_cache_differs(model.config, layers):
                raise NotServed(reason)
            probed = self._make_probed_runner(layers)
            with detect_partial_vectors() as detector:
                self._check(probed, self._expected)
            needs_whole = spec.strict and probed.device.type == "cpu" and detector.found
        except MODEL_ERRORS as error:
            raise NotServed(reason_of_model(error)) from error
        if spec.strict and probed.device.type == "cpu":
            needs_whole = pad_experts(self._model) or needs_whole
            if reason := self._why_not_strict(layers, needs_whole):
                raise NotServed(reason)
        return self._make_slot_runner(
            layers,
            spec.roles,
            num_slots=spec.num_slots,
            bytes_per_token=probed.cache_bytes_per_token,
            needs_whole_vectors=needs_whole,
            drafts=spec.drafts.are_on(probed.device.type),
        )

    def _learn_states(self) -> tuple[CachedLayer, ...]:
        """What the model's cache holds; adapters change nothing of that."""
        self._use_no_adapters()
        return learn_states(self._model)

    def _learn_layers(self) -> tuple[LayerFacts, ...]:
        """What each attention call asks for; adapters change nothing of that."""
        self._use_no_adapters()
        if self._cached is None:
            return learn_layers(self._model)
        num_attending = sum(layer.attends for layer in self._cached)
        layers = learn_layers(self._model) if num_attending else ()
        if len(layers) != num_attending:
            raise NotServed(
                f"its cache has keys of {num_attending} layers, and {len(layers)} attend by transformers' interface"
            )
        return layers

    def _use_no_adapters(self) -> None:
        if self._adapters is not None:
            self._adapters.of_tokens = torch.zeros(sum(ROW_LENGTHS), dtype=torch.long, device=self._model.device)
            self._adapters.preferences = None

    def _make_probed_runner(self, layers: Sequence[LayerFacts]) -> SlotRunner:
        return self._make_slot_runner(layers, self._probed_roles, num_slots=len(self._probes) + 1)

    def _make_slot_runner(
        self,
        layers: Sequence[LayerFacts],
        roles: Sequence[HostRole],
        *,
        num_slots: int,
        bytes_per_token: Mapping[torch.device, int] = MappingProxyType({}),
        needs_whole_vectors: bool = False,
        drafts: bool = False,
    ) -> SlotRunner:
        if self._cached is not None:
            return RecurrentRunner(
                self._make_passes(layers, needs_whole_vectors),
                roles,
                num_slots=num_slots,
                vocab_size=self._spec.vocab_size,
                row_bytes=RowBytes(bytes_per_token, bytes_per_row(self._cached)),
                reads_parts=self._reads_parts,
            )
        self._model.set_attn_implementation(ATTENTION)
        return LanguageModelRunner(
            self._model,
            roles,
            num_slots=num_slots,
            vocab_size=self._spec.vocab_size,
            adapters=self._adapters,
            strict=self._spec.strict,
            bytes_per_token=bytes_per_token,
            layers=layers,
            needs_whole_vectors=needs_whole_vectors,
            drafts=drafts,
        )

    def _make_passes(self, layers: Sequence[LayerFacts], needs_whole_vectors: bool = False) -> RecurrentPasses:
        assert self._cached is not None
        self._model.set_attn_implementation(ATTENTION)
        return RecurrentPasses(
            self._model,
            vocab_size=self._spec.vocab_size,
            adapters=self._adapters,
            strict=self._spec.strict,
            layers=layers,
            cached=self._cached,
            needs_whole_vectors=needs_whole_vectors,
        )

    def _why_not_strict(self, layers: Sequence[LayerFacts], needs_whole: bool) -> str | None:
        """Why a row's bits would depend on the batch composition, if they would."""

        def make_runner(num_slots: int) -> SlotRunner:
            return self._make_slot_runner(
                layers, self._probed_roles, num_slots=num_slots, needs_whole_vectors=needs_whole
            )

        if not bits_are_a_rows_own(make_runner, self._probed_roles, self._probes):
            return why_not_strict()
        return None

    def _plain_runner(self) -> PlainRunner:
        """The model one row at a time. Raises ConfigurationError where even that is not what the model says."""
        spec, model = self._spec, self._model
        passes = PlainPasses(model, self._adapters)
        probed = PlainRunner(passes, self._probed_roles, num_slots=len(self._probes) + 1, vocab_size=spec.vocab_size)
        try:
            row, _ = passes.begin(self._probes[0], None)
            difference = largest_difference(probed, self._probed_roles, self._probes, self._expected)
        except MODEL_ERRORS as error:
            raise _refused(spec, model.config, reason_of_model(error)) from error
        return PlainRunner(
            passes,
            spec.roles,
            num_slots=spec.num_slots,
            vocab_size=spec.vocab_size,
            # some models' plain forward pass is not what their generate computes: then answers are read step by step
            reads_whole=difference <= self._tolerance,
            exact_context=exact_context(model.config),
            bytes_per_token={at: -(-held // len(self._probes[0])) for at, held in row.num_bytes.items()},
        )

    def _check(self, runner: SlotRunner, expected: Mapping[str | None, Sequence[Tensor]]) -> None:
        """Raise NotServed where the runner does not give what plain passes gave."""
        difference = largest_difference(runner, self._probed_roles, self._probes, expected)
        if not difference <= self._tolerance:
            raise NotServed(
                f"its logits differ from a plain forward pass by {difference:.2g} nats, more than "
                f"{self._tolerance:.2g}"
            )


def _why_cache_differs(config: Any, layers: Sequence[LayerFacts]) -> str | None:
    """Why `generate` does not see the keys that a forward pass sees: where its cache drops some that masks show."""
    kept = DynamicCache(config=config.get_text_config(decoder=True)).layers
    if len(kept) != len(layers):  # keys are shared, or some layers have none
        return None
    if any(
        getattr(each, "is_sliding", False) and facts.visibility.is_unlimited
        for each, facts in zip(kept, layers, strict=True)
    ):
        return "its configuration names a window that its masks do not have: generate and a forward pass differ"
    return None


def why_not_strict() -> str:
    """What to say where bits depend on the batch composition, and what helps."""
    remedy = f"set {MKL_MODE}={mode} before the process starts, " if (mode := reproducible_mode()) else ""
    return (
        "in strict mode no bit of a row may depend on the rows beside it, and here some do; "
        f"{remedy}or choose decoding.reproducibility=relaxed"
    )


def _can_be_none(config: Any, name: str) -> bool:
    """Whether a configuration lets a value be None; some check the types of what is set."""
    value = getattr(config, name)
    try:
        setattr(config, name, None)
    except Exception:  # an error of the library that checks
        return False
    setattr(config, name, value)
    return True


def exact_context(config: Any) -> int | None:
    """Tokens up to which rows of one pass do not change each other's rotary positions; None: any number."""
    text = as_mapping(config)
    settings = rope_settings(text)
    kinds = {str(each.get("rope_type", each.get("type"))) for each in settings}
    stated_by = [text.get("max_position_embeddings")]
    if "longrope" in kinds:
        stated_by = [each.get("original_max_position_embeddings") for each in (*settings, text)] + stated_by
    elif "dynamic" not in kinds:
        return None
    return next((int(each) for each in stated_by if isinstance(each, int)), None)


def _take_adapters(model: Any, spec: HostSpec) -> TokenAdapters:
    try:
        return take_adapters(model, list(spec.adapters), at_own_preference(spec))
    except NotImplementedError as error:
        raise ConfigurationError(f"{spec.title}: {error}") from error


def _refused(spec: HostSpec, config: Any, reason: str) -> ConfigurationError:
    return ConfigurationError(f"{spec.title}, architecture {config.model_type}, cannot be decoded: {reason}")
