"""From a `HostSpec` to the runner of a language model with tokens of its own, and a probe that it is exact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pipeline.attention.branches import ATTENTION, Branch, Reading, RowCache
from pipeline.attention.visibility import ROW_LENGTHS, LayerFacts, NotServed, learn_layers
from pipeline.errors import ConfigurationError
from pipeline.hub.families import why_layers_differ
from pipeline.hub.model_facts import as_mapping, context_length, text_config
from pipeline.hub.retokeniser import Retokeniser
from pipeline.hub.token_bytes import ByteIndex, token_bytes
from pipeline.protocol.specs import HostSpec
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
from pipeline.worker.probes import NUM_STEPS, plain_logprobs, probe_tokens, small_limits, tolerance_of
from pipeline.worker.quantised import why_bits_are_shared
from pipeline.worker.text_scorer import TextScorer
from pipeline.worker.weights import load_causal_lm, why_not_finite
from pipeline.worker.whole_vectors import detect_partial_vectors


def load_text_model(spec: HostSpec, retokeniser: Retokeniser) -> BranchRunner:
    """Load a causal LM and check that its logits in branches are those of a plain forward pass.

    Raises:
        ConfigurationError: it cannot be loaded, or not be read in branches, with the reason.
    """
    devices = pick_devices(spec)
    device = devices[0]
    if spec.strict and device.type == "cpu":
        choose_reproducible_kernels()
        torch.set_num_threads(1)  # with more, a row's bits depend on the work beside it
    loading = _Loading(spec, devices)
    with detect_partial_vectors() as detector:
        layers, bytes_per_token = loading.check()
    model = loading.model
    needs_whole = False
    if spec.strict and device.type == "cpu":
        needs_whole = pad_experts(model) or detector.found
        loading.check_strict(layers, needs_whole_vectors=needs_whole)
    contexts = [each for each in (context_length(model.config), exact_context(model.config)) if each is not None]
    vocab_size = int(text_config(model.config).vocab_size)
    index = ByteIndex.of(token_bytes(retokeniser.own, spec.source.name), vocab_size)
    return BranchRunner(
        model.base_model,
        TextScorer(loading.logits, index, device),
        spec.roles,
        num_slots=spec.num_slots,
        num_candidates=0 if spec.text is None else spec.text.num_candidates,
        vocab_size=vocab_size,
        retokeniser=retokeniser,
        adapters=loading.adapters,
        context_length=min(contexts, default=None),
        strict=spec.strict,
        bytes_per_token=bytes_per_token,
        layers=layers,
        needs_whole_vectors=needs_whole,
    )


class _Loading:
    """A causal LM with its adapters, on its device, and what plain passes give.

    Args:
        spec: of the host.
        devices: where the model goes.

    Attributes:
        model: with the adapters' layers in it.
        adapters: which tokens have which.
    """

    def __init__(self, spec: HostSpec, devices: Sequence[torch.device]) -> None:
        self._spec = spec
        device = devices[0]
        model = load_causal_lm(spec, dtype=pick_dtype(spec.dtype, device), device=device)
        self.model: Any = place_model(model, devices, spec.title).eval()
        self.model.requires_grad_(False)
        self.adapters: TokenAdapters | None = None
        if (reason := why_layers_differ(as_mapping(self.model.config))) is not None:
            raise self._refused(reason)
        if spec.strict and (reason := why_bits_are_shared(self.model.config)) is not None:
            raise self._refused(f"{reason}; choose decoding.reproducibility=relaxed")
        self._ids = probe_tokens(self.model, int(text_config(self.model.config).vocab_size))[0]
        self._expected: dict[bool, dict[str | None, Tensor]] = {True: {}, False: {}}
        self._tolerance = 0.0
        if reason := why_not_finite(self.model):
            raise self._refused(reason)
        try:
            self._expect(self.model, None)
        except MODEL_ERRORS as error:
            raise self._refused(f"its own forward pass over text fails: {reason_of_model(error)}") from error
        if spec.adapters:
            self._take_adapters()
        self._head = self.model.get_output_embeddings()
        if self._head is None:
            raise self._refused("it has no head that gives logits")

    def logits(self, states_PH: Tensor, adapter: int) -> Tensor:
        """Logits [P, V] in float32 of hidden states, as the model's family makes them."""
        if self.adapters is not None:
            self.adapters.of_tokens = torch.full((len(states_PH),), adapter, device=states_PH.device)
        text = text_config(self.model.config)
        logits_PV: Tensor = self._head(states_PH.to(self._head.weight.dtype)).float()
        if scale := getattr(text, "logit_scale", None):
            logits_PV = logits_PV * scale
        if divisor := getattr(text, "logits_scaling", None):
            logits_PV = logits_PV / divisor
        if cap := getattr(text, "final_logit_softcapping", None):
            logits_PV = cap * torch.tanh(logits_PV / cap)
        return logits_PV

    def check(self) -> tuple[tuple[LayerFacts, ...], Mapping[torch.device, int]]:
        """What each attention call asks for, and the bytes that a token takes in the cache, by device.

        Raises:
            ConfigurationError: logits in branches differ from those of plain passes.
        """
        for is_small in (True, False):
            with small_limits(self.model.config) if is_small else nullcontext():
                layers = self._learn()
                self.model.set_attn_implementation(ATTENTION)
                num_bytes = self._compare(self._expected[is_small], layers)
        return layers, num_bytes

    def check_strict(self, layers: Sequence[LayerFacts], *, needs_whole_vectors: bool) -> None:
        """Raise where a row's hidden states have other bits beside other rows than alone."""
        roles = [HostRole(str(adapter), adapter) for adapter in self._expected[False]]
        scorer = HeadScorer([RoleHead(_total, 0)] * len(roles))
        make_runner = partial(
            BranchRunner, self.model.base_model, scorer, roles,
            layers=layers, adapters=self.adapters, needs_whole_vectors=needs_whole_vectors,
        )  # fmt: skip
        try:
            is_own = bits_are_a_rows_own(make_runner, roles, self._ids)
        except MODEL_ERRORS as error:
            raise self._refused(reason_of_model(error)) from error
        if not is_own:
            raise self._refused(why_not_strict())

    def _expect(self, model: Any, adapter: str | None) -> None:
        vocab_size = int(text_config(self.model.config).vocab_size)
        for is_small in (True, False):
            with small_limits(self.model.config) if is_small else nullcontext():
                [self._expected[is_small][adapter]] = plain_logprobs(model, [self._ids], vocab_size)
        plain_TV = self._expected[False][adapter]
        self._tolerance = max(self._tolerance, tolerance_of(model, [self._ids], [plain_TV]))

    def _take_adapters(self) -> None:
        wrapped = add_adapters(self.model, self._spec)
        for name in self._spec.adapters:
            wrapped.set_adapter(name)
            if reason := why_not_finite(wrapped, f".{name}."):
                raise self._refused(f"adapter {name}: {reason}")
            try:
                self._expect(wrapped, name)
            except MODEL_ERRORS as error:
                raise self._refused(f"with adapter {name}: {reason_of_model(error)}") from error
        try:
            self.adapters = take_adapters(wrapped, list(self._spec.adapters))
        except NotImplementedError as error:
            raise ConfigurationError(f"{self._spec.title}: {error}") from error
        self.model = wrapped.get_base_model()

    def _learn(self) -> tuple[LayerFacts, ...]:
        if self.adapters is not None:
            self.adapters.of_tokens = torch.zeros(sum(ROW_LENGTHS), dtype=torch.long, device=self.model.device)
        try:
            return learn_layers(self.model)
        except NotServed as error:
            raise self._refused(str(error)) from error
        except MODEL_ERRORS as error:
            raise self._refused(reason_of_model(error)) from error

    @torch.inference_mode()
    def _compare(
        self, expected: Mapping[str | None, Tensor], layers: Sequence[LayerFacts]
    ) -> Mapping[torch.device, int]:
        """Read all but the last steps, then these as branches: their logits must be those of plain passes."""
        runner = BranchRunner(
            self.model.base_model, TextScorer(self.logits, ByteIndex((), (), ()), self.model.device), (),
            num_slots=1, layers=layers, adapters=self.adapters,
        )  # fmt: skip
        ids, fork = self._ids, len(self._ids) - NUM_STEPS
        for adapter, plain_TV in expected.items():
            number = 0 if self.adapters is None else self.adapters.number(adapter)
            cache = RowCache()
            try:
                runner.read([(Reading(cache, 0, ids[: fork - 2]), number)])
                branches = [Branch(fork, ids[fork:]), Branch(fork, ids[fork : fork + 1])]
                [states_TH] = runner.read([(Reading(cache, fork - 2, ids[fork - 2 : fork], branches), number)])
                found_TV = self.logits(states_TH[2 : 2 + NUM_STEPS], number).log_softmax(-1)
            except MODEL_ERRORS as error:
                raise self._refused(reason_of_model(error)) from error
            difference = (found_TV[:, : plain_TV.shape[1]] - plain_TV).abs().max().item()
            if not difference <= self._tolerance:
                raise self._refused(
                    f"its logits in branches differ from those of a plain forward pass by {difference:.2g} nats"
                )
        return cache.bytes_per_token()

    def _refused(self, reason: str) -> ConfigurationError:
        return ConfigurationError(
            f"{self._spec.title}, architecture {self.model.config.model_type}, cannot be read beside a base with "
            f"other tokens: {reason}"
        )


def _total(states_TH: Tensor) -> Tensor:
    """The sum of each hidden state, [T, 1]: a number in which a changed bit shows."""
    return states_TH.double().sum(-1, keepdim=True)
