"""From a `HostSpec` to a `LanguageModelRunner`: weights, adapters, and a probe that the model can be served."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from pipeline.attention.rows import what_is_missing
from pipeline.attention.slots import ATTENTION
from pipeline.attention.transfers import on_device
from pipeline.errors import ConfigurationError
from pipeline.hub.model_facts import reason_of
from pipeline.hub.sources import fetch_weights
from pipeline.protocol.messages import Admission, Step
from pipeline.protocol.specs import HostSpec
from pipeline.worker.adapters import TokenAdapters, take_adapters, without_peft_warnings
from pipeline.worker.cpu_kernels import choose_reproducible_kernels
from pipeline.worker.language_model_runner import LanguageModelRunner

PROBES = ([1, 2, 3, 4], [5, 6, 7])  # token ids
PROBE_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.5, torch.float16: 0.1}


def load_language_model(spec: HostSpec) -> LanguageModelRunner:
    """Load the weights onto the device and check that the slot decoder reproduces a plain forward pass.

    Raises:
        ConfigurationError: the model cannot be loaded or cannot be served, with the reason.
    """
    device = pick_device(spec.device)
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
        model = _load_model(spec, device)
        # nothing is padded, and some models look at every input whether it is: a GPU would be waited for
        model.config.pad_token_id = None
        expected: dict[str | None, Tensor] = {}
        expected[None] = _plain_logprobs(model, spec)  # before adapters or a host change the model
        adapters = None
        if spec.adapters:
            wrapped = _add_adapters(model, spec)
            for name in spec.adapters:
                wrapped.set_adapter(name)
                expected[name] = _plain_logprobs(wrapped, spec)
            adapters = _take_adapters(wrapped, spec)
            model = wrapped.get_base_model()
        make_runner = partial(
            LanguageModelRunner, model, spec.roles, vocab_size=spec.vocab_size, adapters=adapters, strict=spec.strict
        )
        probed = make_runner(num_slots=len(PROBES))
        _probe(probed, model, spec, torch.stack([expected[role.adapter] for role in spec.roles], 1))
        return make_runner(num_slots=spec.num_slots, bytes_per_token=probed.cache_bytes_per_token)


def pick_device(device: str) -> torch.device:
    """ "auto" is the first GPU where there is one, else the CPU."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigurationError(f"device {device} is not available: torch finds no GPU; use auto or cpu")
    return torch.device(device)


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """ "auto" is float32 on a CPU, where bfloat16 is slower, and bfloat16 on a GPU."""
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]


def _load_model(spec: HostSpec, device: torch.device) -> Any:
    try:
        model = AutoModelForCausalLM.from_pretrained(
            fetch_weights(spec.source, cache_folder=spec.cache_folder),
            dtype=pick_dtype(spec.dtype, device),
            trust_remote_code=spec.source.trust_remote_code,
            use_safetensors=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ConfigurationError(f"{spec.title}: {reason_of(error)}") from error
    return model.to(device).eval().requires_grad_(False)


def _add_adapters(model: Any, spec: HostSpec) -> Any:
    """The model with its adapters, as peft's."""
    from peft import PeftModel  # seven seconds of import, for those who use adapters

    device = model.device
    try:
        with without_peft_warnings():
            for name, adapter in spec.adapters.items():
                folder = fetch_weights(adapter, cache_folder=spec.cache_folder)
                if isinstance(model, PeftModel):
                    model.load_adapter(folder, adapter_name=name)
                else:
                    model = PeftModel.from_pretrained(model, folder, adapter_name=name)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise ConfigurationError(f"{spec.title}: {reason_of(error)}") from error
    return model.to(device).eval()


def _take_adapters(model: Any, spec: HostSpec) -> TokenAdapters:
    try:
        return take_adapters(model, list(spec.adapters))
    except NotImplementedError as error:
        raise ConfigurationError(f"{spec.title}: {error}") from error


@torch.inference_mode()
def _plain_logprobs(model: Any, spec: HostSpec) -> Tensor:
    """Log-probabilities [probes, V] after each probe, by plain passes with the model's own attention."""
    device = next(model.parameters()).device
    logits = [
        model(input_ids=torch.tensor([probe], device=device), use_cache=False).logits[0, -1] for probe in PROBES
    ]
    return torch.stack(logits)[:, : spec.vocab_size].float().log_softmax(-1)


@torch.inference_mode()
def _probe(runner: LanguageModelRunner, model: Any, spec: HostSpec, expected_PRV: Tensor) -> None:
    """Compare prefill and one decode step of the slot decoder with plain passes."""
    slots = list(range(len(PROBES)))
    try:
        model.set_attn_implementation(ATTENTION)
        prompts = [{role.name: probe[:-1] for role in spec.roles} for probe in PROBES]
        runner.advance(Step([Admission(slot, prompts[slot]) for slot in slots]))
        runner.advance(Step((), slots, [probe[-1] for probe in PROBES]))
        found_PRV = runner.logprobs_at(slots, None)
    except Exception as error:
        raise _refused(spec, model.config, reason_of(error)) from error
    difference = (found_PRV - expected_PRV).abs().max().item()
    tolerance = PROBE_TOLERANCE.get(model.dtype, 0.5)
    if not difference <= tolerance:
        raise _refused(
            spec,
            model.config,
            f"its logits differ from a plain forward pass by {difference:.2g} nats, more than {tolerance:g}",
        )


def _refused(spec: HostSpec, config: Any, reason: str) -> ConfigurationError:
    return ConfigurationError(
        f"{spec.title}, architecture {config.model_type}, cannot be decoded in slots: {reason}. "
        f"Slower, pipeline.logits_processor.CageLogitsProcessor steers it inside model.generate"
    )
