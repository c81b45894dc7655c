"""On a GPU: the kernel for running rows, recorded passes and recorded games. Run with `pytest -m gpu`."""

from __future__ import annotations

import random

import pytest
import torch
from support.decoding import config_of, decode, engine_of
from support.kernels import check_kernel
from support.lora import make_lora
from test_adapters import host_of as adapters_host_of
from test_adapters import logprobs_after
from test_recorded_games import FOUR
from test_strict import PAIR, ROWS, host_of, logits_after

from pipeline.engine.engine import decode_rows

pytestmark = pytest.mark.gpu

KINDS = ["llama", "gpt2", "qwen2", "qwen3", "mistral", "neox"]


@pytest.mark.parametrize("window", [None, 1, 30, 200])
@pytest.mark.parametrize("width", [16, 64, 80, 128])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (8, 2), (9, 3), (32, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_kernel_writes_and_attends_as_a_plain_softmax_does(dtype, num_heads, num_kv_heads, width, window):
    check_kernel("cuda", dtype, num_heads=num_heads, num_kv_heads=num_kv_heads, width=width, window=window)


@pytest.mark.parametrize("kind", KINDS)
def test_recorded_and_compiled_passes_give_the_logits_of_the_cpu(tiny, kind):
    """Rows come and go, and one outgrows its buffer."""
    prompts = [[3, 9, 4], list(range(250)), [7] * 30, [5, 6], [8] * 12]
    hosts = [
        host_of(tiny(kind), strict=strict, num_slots=5, dtype="float32", device=device)
        for device, strict in (("cpu", True), ("cuda", True), ("cuda", False))
    ]
    for places in ({0: 2, 1: 0, 2: 3}, {1: 1}, {0: 0, 1: 1, 2: 2, 3: 3, 4: 4}):
        expected, strict, relaxed = (logits_after(host, places, prompts, num_steps=9) for host in hosts)
        for row in places:
            torch.testing.assert_close(strict[row].cpu(), expected[row], atol=1e-3, rtol=0)
            torch.testing.assert_close(relaxed[row].cpu(), expected[row], atol=1e-3, rtol=0)
    for host in hosts[1:]:
        assert "rows" in host._passes._static_steps.recorder.recorded


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_logits_of_a_row_are_the_same_to_the_bit_in_any_company(tiny, kind, dtype):
    num_slots = 40
    generator = random.Random(1)
    prompts = [[generator.randrange(256) for _ in range(generator.randrange(3, 300))] for _ in range(num_slots)]
    host = host_of(tiny(kind), strict=True, num_slots=num_slots, dtype=dtype, device="cuda")
    together = logits_after(host, {row: row for row in range(num_slots)}, prompts)
    for company in ([0], [3, 1], list(range(7, 0, -1)), list(range(0, 34, 2)), list(range(33))):
        places = dict(zip(company, generator.sample(range(num_slots), len(company)), strict=True))
        for row, logits in logits_after(host, places, prompts).items():
            torch.testing.assert_close(logits, together[row], atol=0, rtol=0)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize("reproducibility", ["strict", "relaxed"])
def test_answers_are_those_of_the_cpu(tiny, kind, reproducibility):
    decoding = {"max_new_tokens": 24, "trace": "tokens", "agent_temperature": 0.3, "reproducibility": reproducibility}
    texts = []
    for device in ("cpu", "cuda"):
        base = {"model": str(tiny(kind)), "dtype": "float32", "device": device}
        config = config_of(base, PAIR, decoding=decoding, cluster={"slots": 6})
        records = decode(config, ROWS)
        assert all(record.num_unsolved == 0 for record in records.values())
        texts.append({row_id: record.response for row_id, record in records.items()})
    same = sum(texts[0][row_id] == texts[1][row_id] for row_id in texts[0])
    assert same >= len(ROWS) - 1  # a draw may fall between the two by rounding


@pytest.mark.parametrize("candidates", [50, "all"])
def test_records_do_not_depend_on_order(tiny, candidates):
    decoding = {"max_new_tokens": 14, "candidates": candidates, "trace": "tokens", "agent_temperature": 0.05}
    base = {"model": str(tiny(seed=2)), "device": "cuda"}
    config = config_of(base, PAIR, decoding=decoding, cluster={"slots": 6})
    reference = decode(config, ROWS)
    shuffled = random.Random(0).sample(ROWS, len(ROWS))
    for row_id, record in decode(config, shuffled).items():
        assert record.tokens == reference[row_id].tokens, row_id
        assert record == reference[row_id]
    few = decode(config, ROWS[1:3])
    assert few == {row_id: reference[row_id] for row_id in few}


@pytest.mark.parametrize("strict", [True, False])
def test_adapters_on_a_gpu_give_the_logits_of_the_cpu(tiny, tmp_path, strict):
    pytest.importorskip("peft")
    adapters = {
        "one": make_lora(tmp_path / "one", tiny("llama"), "q_proj", "v_proj", "up_proj", seed=1),
        "two": make_lora(tmp_path / "two", tiny("llama"), "v_proj", "down_proj", seed=2, r=6),
    }
    prompts = [[3, 9, 4], list(range(40)), [7] * 30]
    slots = {0: 2, 1: 0, 2: 3}
    options = {"strict": strict, "dtype": "float32"}
    expected = logprobs_after(adapters_host_of(tiny("llama"), adapters, **options), prompts, slots, num_steps=4)
    host = adapters_host_of(tiny("llama"), adapters, device="cuda", **options)
    found = logprobs_after(host, prompts, slots, num_steps=4)
    for row in range(3):
        torch.testing.assert_close(found[row].cpu(), expected[row], atol=1e-3, rtol=0)
    assert "rows" in host._passes._static_steps.recorder.recorded


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_logits_of_a_row_with_adapters_are_the_same_to_the_bit_in_any_company(tiny, tmp_path, dtype):
    pytest.importorskip("peft")
    adapters = {
        "one": make_lora(tmp_path / "one", tiny("llama"), "q_proj", "v_proj", "up_proj", seed=1),
        "two": make_lora(tmp_path / "two", tiny("llama"), "v_proj", "down_proj", seed=2, r=1),
    }
    num_slots = 24
    generator = random.Random(1)
    prompts = [[generator.randrange(256) for _ in range(generator.randrange(3, 300))] for _ in range(num_slots)]
    host = adapters_host_of(tiny("llama"), adapters, device="cuda", dtype=dtype, num_slots=num_slots)
    together = logprobs_after(host, prompts, {row: row for row in range(num_slots)}, num_steps=4)
    for company in ([0], [3, 1], list(range(7, 0, -1)), list(range(0, 24, 2))):
        places = dict(zip(company, generator.sample(range(num_slots), len(company)), strict=True))
        for row, logits in logprobs_after(host, prompts, places, num_steps=4).items():
            torch.testing.assert_close(logits, together[row], atol=0, rtol=0)


@pytest.mark.parametrize("num_principals", [3, 4])
def test_games_along_a_path_are_recorded_and_give_the_answers_of_the_cpu(tiny, num_principals):
    principals = dict(list(FOUR.items())[:num_principals])
    decoding = {"max_new_tokens": 16, "trace": "tokens", "agent_temperature": 0.1}
    texts = []
    for device in ("cpu", "cuda"):
        base = {"model": str(tiny()), "dtype": "float32", "device": device}
        engine, _ = engine_of(config_of(base, principals, decoding=decoding, cluster={"slots": 6}))
        records = {record.row_id: record for record in decode_rows(engine, ROWS)}
        assert all(record.num_unsolved == 0 for record in records.values())
        texts.append({row_id: record.response for row_id, record in records.items()})
    recorded = engine.calls.hosts["base"].host._recorded
    assert recorded is not None
    assert recorded._recorder.recorded
    same = sum(texts[0][row_id] == texts[1][row_id] for row_id in texts[0])
    assert same >= len(ROWS) - 1  # a draw may fall between the two by rounding


def test_other_rules_are_played_too(tiny):
    base = {"model": str(tiny()), "device": "cuda"}
    for rule in ("linear", "maximin", "mixture"):
        decoding = {"max_new_tokens": 8, "rule": rule, "agent_temperature": 0.3}
        config = config_of(base, PAIR, decoding=decoding, cluster={"slots": 6})
        records = decode(config, ROWS[:5])
        assert all(record.response is not None for record in records.values())
