"""Quantised weights: slots, adapters and joined projections give what plain passes of the same model give."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import tiny_models
from support.language_models import ADAPTER_ROLES, ADAPTER_SKIPS, spec_of
from support.language_models import logits_after as logits_of
from support.lora import make_lora
from support.quantised_checkpoints import WRITTEN, write_pair
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GptOssConfig, QuantoConfig, TorchAoConfig

from pipeline.errors import ConfigurationError
from pipeline.hub.packages import is_installed
from pipeline.hub.quantisation import KINDS, METHODS
from pipeline.hub.sources import resolve_model
from pipeline.protocol.specs import HostSpec
from pipeline.worker.compiled_layers import can_be_compiled
from pipeline.worker.joined_projections import join_projections
from pipeline.worker.language_model_runner import LanguageModelRunner
from pipeline.worker.loading import load_language_model
from pipeline.worker.quantised import is_plain, why_bits_are_shared
from pipeline.worker.weights import load_causal_lm

Tiny = Callable[..., Path]
ON_CPU = [kind for kind, facts in KINDS.items() if facts.needs_gpu is None]
PROMPTS = ([3, 9, 4], [7] * 30, list(range(40, 49)))
logits_after = partial(logits_of, skips=ADAPTER_SKIPS)
pytestmark = pytest.mark.filterwarnings(
    # of the packages themselves
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*cast.*float16:UserWarning",
    "ignore:Exception ignored in. <finalize:pytest.PytestUnraisableExceptionWarning",  # a folder of gptqmodel's
)  # fmt: skip


def need(method: str) -> None:
    """Skip where a package of the method is not installed."""
    missing = [package for module, package in METHODS[method].packages.items() if not is_installed(module)]
    if missing:
        pytest.skip(f"{method} needs {', '.join(missing)}")


def oracle_config(kind: str) -> Any:
    """What users of transformers would give."""
    match kind:
        case "bnb-4bit":
            return BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=torch.float32,
            )  # fmt: skip
        case "bnb-8bit":
            return BitsAndBytesConfig(load_in_8bit=True)
        case "quanto-int8":
            return QuantoConfig(weights="int8")
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig() if kind == "torchao-int8" else Float8WeightOnlyConfig())


def spec_with(folder: Path, kind: str | None, **options: Any) -> HostSpec:
    """How to start a host that quantises its weights."""
    source = resolve_model(str(folder), cache_folder=folder, quantization=kind)  # type: ignore[arg-type]
    return replace(spec_of(folder, roles=ADAPTER_ROLES, **options), source=source)


@torch.inference_mode()
def plain_logprobs(folder: Path, adapter: Path | None, tokens: list[int], **options: Any) -> Tensor:
    """Log-probabilities [V] after the tokens by transformers and peft alone."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
    for module in model.modules():  # else bitsandbytes computes in bfloat16 on some CPUs
        module.support_avx512bf16_for_cpu = False
    if adapter is not None:
        import peft

        model = peft.PeftModel.from_pretrained(model, adapter).eval()
    return model(torch.tensor([tokens])).logits[0, -1].log_softmax(-1)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def adapters(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {
        "one": make_lora(folder / "one", tiny(), "q_proj", "v_proj", "o_proj", "up_proj", seed=1),
        "two": make_lora(folder / "two", tiny(), "k_proj", "down_proj", seed=2, r=6),
    }


def expected_of(folder: Path, adapters: Mapping[str, Path], **options: Any) -> list[Tensor]:
    """By role, what plain passes give after the second prompt and its six tokens."""
    tokens = [*PROMPTS[1], *((7 + step) % 256 for step in range(6))]
    return [plain_logprobs(folder, adapters.get(role.adapter or ""), tokens, **options) for role in ADAPTER_ROLES]


def check_exact_and_strict(make: Callable[[int], LanguageModelRunner], expected: list[Tensor]) -> None:
    """Rows of a quantised model have what plain passes give, and the same bits alone and beside others."""
    together = logits_after(make(4), {0: 2, 1: 0, 2: 3}, PROMPTS)
    for found, wanted in zip(together[1], expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=2e-3, rtol=0)
    alone = logits_after(make(1), {1: 0}, PROMPTS)
    assert torch.equal(alone[1], together[1])


@pytest.mark.parametrize("kind", ON_CPU)
def test_weights_quantised_at_load_give_what_plain_passes_give(
    tiny: Tiny, adapters: dict[str, Path], kind: str
) -> None:
    need(KINDS[kind].method)  # type: ignore[index]
    expected = expected_of(tiny(), adapters, quantization_config=oracle_config(kind))
    strict = load_language_model(spec_with(tiny(), kind, adapters=adapters))
    if kind == "bnb-8bit":
        assert strict.slot_runner is None
        assert "outlier (llm_int8_threshold 6)" in str(strict.why_plain)
        relaxed = load_language_model(spec_with(tiny(), kind, adapters=adapters, strict=False)).slot_runner
        assert relaxed is not None
        found = logits_after(relaxed, {0: 2, 1: 0, 2: 3}, PROMPTS)[1]
        for one, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(one, wanted, atol=0.05, rtol=0)  # inputs are rounded to 8 bits, too
        return

    def make(num_slots: int) -> LanguageModelRunner:
        runner = strict.slot_runner
        assert runner is not None, strict.why_plain
        runner.resize(num_slots)
        return runner

    check_exact_and_strict(make, expected)


@pytest.mark.parametrize("kind", ON_CPU)
def test_what_is_joined_and_compiled_leaves_quantised_projections_alone(tiny: Tiny, kind: str) -> None:
    need(KINDS[kind].method)  # type: ignore[index]
    model: Any = load_causal_lm(spec_with(tiny(), kind), dtype=torch.float32)
    projections = [module for name, module in model.named_modules() if name.endswith("_proj")]
    assert len(projections) == 14
    assert not any(type(each) is torch.nn.Linear and is_plain(each.weight) for each in projections)
    expected = model(torch.arange(30)[None]).logits
    assert join_projections(model) == 0
    assert not can_be_compiled(model)
    assert can_be_compiled(load_causal_lm(spec_of(tiny()), dtype=torch.float32))
    assert torch.equal(model(torch.arange(30)[None]).logits, expected)


def gpt_oss(folder: Path) -> Path:
    """A tiny model with experts, as MXFP4 is for."""
    tokenizer = tiny_models.make_tokenizer()
    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=256,
        eos_token_id=0, pad_token_id=0, sliding_window=24,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", list(WRITTEN))
def test_quantised_checkpoints_have_the_values_that_their_files_say(tiny: Tiny, tmp_path: Path, name: str) -> None:
    """Of a method that computes in 16 bits what is left is its rounding."""
    quantise, settings = WRITTEN[name]
    need(settings["quant_method"])
    source = gpt_oss(tmp_path / "source") if name == "mxfp4" else tiny()
    quantised, same = write_pair(source, tmp_path, quantise, settings)
    expected = expected_of(same, {})
    strict = load_language_model(replace(spec_of(quantised), roles=ADAPTER_ROLES[:1]))
    assert strict.slot_runner is not None, strict.why_plain
    for num_slots in (1, 4):
        strict.slot_runner.resize(num_slots)
        found = logits_of(strict.slot_runner, {1: num_slots - 1}, PROMPTS, skips={"a": 0})[1][0]
        torch.testing.assert_close(found, expected[0], atol=0.05, rtol=0)


@pytest.mark.parametrize(
    ("method", "options"), [("bitsandbytes", "bnb-4bit"), ("bitsandbytes", "bnb-8bit"), ("torchao", "torchao-int8")]
)
def test_checkpoints_that_transformers_has_saved_are_read_as_they_were(
    tiny: Tiny, tmp_path: Path, method: str, options: str
) -> None:
    need(method)
    made: Any = AutoModelForCausalLM.from_pretrained(
        tiny(), dtype=torch.float32, quantization_config=oracle_config(options)
    )
    made.save_pretrained(tmp_path / "model")
    tiny_models.make_tokenizer().save_pretrained(tmp_path / "model")
    spec = spec_of(tmp_path / "model")
    assert spec.source.quantisation == method
    loaded: Any = load_causal_lm(spec, dtype=torch.float32)
    ids = torch.arange(30)[None]
    assert torch.equal(loaded(ids).logits, made(ids).logits)


def test_weights_that_are_quantised_are_not_quantised_again(tiny: Tiny, tmp_path: Path) -> None:
    need("fp8")
    quantised, _ = write_pair(tiny(), tmp_path, *WRITTEN["fp8"])
    with pytest.raises(ConfigurationError, match=r"quantised with fp8 already; leave out quantization \(bnb-4bit\)"):
        resolve_model(str(quantised), cache_folder=tmp_path, quantization="bnb-4bit")


def test_what_needs_a_gpu_is_refused_on_a_cpu_before_weights_are_read(tiny: Tiny, tmp_path: Path) -> None:
    spec = spec_with(tiny(), "fp8")
    with pytest.raises(ConfigurationError, match=r"\(fp8\): that needs a GPU of compute capability 8.9 or more, and"):
        load_causal_lm(replace(spec, source=replace(spec.source, path="/nowhere")), dtype=torch.float32)


def test_one_scale_for_all_rows_of_a_pass_is_known_from_the_configuration() -> None:
    def reason(**settings: Any) -> str | None:
        return why_bits_are_shared(SimpleNamespace(quantization_config=settings or None))

    dynamic = {"dynamic": True, "strategy": "tensor", "num_bits": 8}
    assert "one scale" in str(reason(config_groups={"group_0": {"input_activations": dynamic}}))
    assert reason(config_groups={"group_0": {"input_activations": {**dynamic, "strategy": "token"}}}) is None
    assert reason(config_groups={"group_0": {"input_activations": {**dynamic, "dynamic": False}}}) is None
    assert "one scale" in str(reason(quant_type={"default": {"granularity": [{"_type": "PerTensor"}]}}))
    assert reason() is None
