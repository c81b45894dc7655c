"""On a GPU: the kernel for running rows, captured passes and captured games. Run with `pytest -m gpu`."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import partial

import pytest
import torch
from support.decoding import NOWHERE, config_of, decode
from support.language_models import (
    ADAPTER_ROLES,
    ADAPTER_SKIPS,
    CHANGING_BATCHES,
    CHANGING_PROMPTS,
    logits_after,
    runner_of,
)
from support.lora import make_lora
from support.row_kernels import check_following, check_kernel
from support.sampling_hosts import FOUR, MANY_ROWS, PAIR, watch_pools
from support.unreliable import FreePace

from pipeline.attention.plain import AttentionTerms
from pipeline.attention.visibility import Visibility
from pipeline.engine import drafting
from pipeline.engine.engine import decode_rows
from pipeline.engine.lead import Lead
from pipeline.engine.model_drafts import ModelDrafts
from pipeline.runtime.assembly import assemble
from pipeline.runtime.engines import make_engine
from pipeline.runtime.local_hosts import start_hosts

pytestmark = pytest.mark.gpu

adapted_runner_of = partial(runner_of, roles=ADAPTER_ROLES)
adapted_logits_after = partial(logits_after, skips=ADAPTER_SKIPS)

KINDS = ["llama", "gpt2", "qwen2", "qwen3", "mistral", "neox"]


@pytest.mark.parametrize("window", [None, 1, 30, 200])
@pytest.mark.parametrize("width", [16, 64, 80, 128])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (8, 2), (9, 3), (32, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_kernel_writes_and_attends_as_a_plain_softmax_does(dtype, num_heads, num_kv_heads, width, window):
    terms = AttentionTerms(visibility=Visibility(window))
    check_kernel("cuda", dtype, terms, num_heads=num_heads, num_kv_heads=num_kv_heads, width=width)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("extras", [{"softcap": 3.0}, {"sinks": True}, {"softcap": 3.0, "sinks": True}])
@pytest.mark.parametrize(
    "visibility", [Visibility(), Visibility(30), Visibility(chunk=48)], ids=["all", "window", "chunk"]
)
def test_the_kernel_knows_softcaps_sinks_and_chunks(dtype, extras, visibility):
    sinks = torch.linspace(-2, 4, 6, device="cuda") if extras.get("sinks") else None
    terms = AttentionTerms(visibility=visibility, softcap=extras.get("softcap"), sinks=sinks)
    check_kernel("cuda", dtype, terms, num_heads=6, num_kv_heads=2, width=16)


@pytest.mark.parametrize("terms", [AttentionTerms(), AttentionTerms(visibility=Visibility(3), softcap=3.0)])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "width"), [(4, 4, 64), (9, 3, 80), (32, 8, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_that_follow_one_another_in_a_pass_get_the_bits_of_passes_of_their_own(
    dtype, num_heads, num_kv_heads, width, terms
):
    check_following("cuda", dtype, terms, num_heads=num_heads, num_kv_heads=num_kv_heads, width=width)


@pytest.mark.parametrize("kind", KINDS)
def test_captured_and_compiled_passes_give_the_logits_of_the_cpu(tiny, kind, monkeypatch):
    """Rows come and go, and one outgrows its buffer."""
    pools = watch_pools(monkeypatch)
    of_cpu = runner_of(tiny(kind), strict=True, num_slots=5, dtype="float32", device="cpu")
    for strict in (True, False):
        runner = runner_of(tiny(kind), strict=strict, num_slots=5, dtype="float32", device="cuda")
        passes = pools[-1]  # those of the runner itself; a model is probed with others
        for places in CHANGING_BATCHES:
            expected = logits_after(of_cpu, places, CHANGING_PROMPTS, num_steps=9)
            found = logits_after(runner, places, CHANGING_PROMPTS, num_steps=9)
            assert found.keys() == expected.keys()
            for row in places:
                torch.testing.assert_close(found[row].cpu(), expected[row], atol=1e-3, rtol=0)
        assert "rows" in passes.captured


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_logits_of_a_row_are_the_same_to_the_bit_in_any_batch(tiny, kind, dtype):
    num_slots = 40
    generator = random.Random(1)
    prompts = [[generator.randrange(256) for _ in range(generator.randrange(3, 300))] for _ in range(num_slots)]
    runner = runner_of(tiny(kind), strict=True, num_slots=num_slots, dtype=dtype, device="cuda")
    together = logits_after(runner, {row: row for row in range(num_slots)}, prompts)
    for batch in ([0], [3, 1], list(range(7, 0, -1)), list(range(0, 34, 2)), list(range(33))):
        places = dict(zip(batch, generator.sample(range(num_slots), len(batch)), strict=True))
        for row, logits in logits_after(runner, places, prompts).items():
            torch.testing.assert_close(logits, together[row], atol=0, rtol=0)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize("reproducibility", ["strict", "relaxed"])
def test_answers_are_those_of_the_cpu(tiny, kind, reproducibility):
    decoding = {"max_new_tokens": 24, "trace": "tokens", "agent_temperature": 0.3, "reproducibility": reproducibility}
    texts = []
    for device in ("cpu", "cuda"):
        base = {"model": str(tiny(kind)), "dtype": "float32", "device": device}
        config = config_of(base, PAIR, decoding=decoding, cluster={"slots": 6})
        records = decode(config, MANY_ROWS)
        assert all(record.num_unsolved == 0 for record in records.values())
        texts.append({row_id: record.response for row_id, record in records.items()})
    same = sum(texts[0][row_id] == texts[1][row_id] for row_id in texts[0])
    assert same >= len(MANY_ROWS) - 1  # a draw may fall between the two by rounding


@pytest.mark.parametrize("candidates", [50, "all"])
def test_records_do_not_depend_on_order(tiny, candidates):
    decoding = {"max_new_tokens": 14, "candidates": candidates, "trace": "tokens", "agent_temperature": 0.05}
    base = {"model": str(tiny(seed=2)), "device": "cuda"}
    config = config_of(base, PAIR, decoding=decoding, cluster={"slots": 6})
    reference = decode(config, MANY_ROWS)
    assert len(reference) == len(MANY_ROWS)
    shuffled = random.Random(0).sample(MANY_ROWS, len(MANY_ROWS))
    for row_id, record in decode(config, shuffled).items():
        assert record.tokens == reference[row_id].tokens, row_id
        assert record == reference[row_id]
    few = decode(config, MANY_ROWS[1:3])
    assert few == {row_id: reference[row_id] for row_id in few}


@pytest.mark.parametrize("strict", [True, False])
def test_adapters_on_a_gpu_give_the_logits_of_the_cpu(tiny, tmp_path, strict, monkeypatch):
    pytest.importorskip("peft")
    adapters = {
        "one": make_lora(tmp_path / "one", tiny("llama"), "q_proj", "v_proj", "up_proj", seed=1),
        "two": make_lora(tmp_path / "two", tiny("llama"), "v_proj", "down_proj", seed=2, r=6),
    }
    pools = watch_pools(monkeypatch)
    prompts, places = [[3, 9, 4], list(range(40)), [7] * 30], {0: 2, 1: 0, 2: 3}
    options = {"adapters": adapters, "strict": strict, "dtype": "float32"}
    expected = adapted_logits_after(adapted_runner_of(tiny("llama"), **options), places, prompts, num_steps=4)
    runner = adapted_runner_of(tiny("llama"), device="cuda", **options)
    passes = pools[-1]
    found = adapted_logits_after(runner, places, prompts, num_steps=4)
    for row in range(3):
        torch.testing.assert_close(found[row].cpu(), expected[row], atol=1e-3, rtol=0)
    assert "rows" in passes.captured


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_logits_of_a_row_with_adapters_are_the_same_to_the_bit_in_any_batch(tiny, tmp_path, dtype):
    pytest.importorskip("peft")
    adapters = {
        "one": make_lora(tmp_path / "one", tiny("llama"), "q_proj", "v_proj", "up_proj", seed=1),
        "two": make_lora(tmp_path / "two", tiny("llama"), "v_proj", "down_proj", seed=2, r=1),
    }
    num_slots = 24
    generator = random.Random(1)
    prompts = [[generator.randrange(256) for _ in range(generator.randrange(3, 300))] for _ in range(num_slots)]
    options = {"device": "cuda", "dtype": dtype, "num_slots": num_slots}
    runner = adapted_runner_of(tiny("llama"), adapters=adapters, **options)
    together = adapted_logits_after(runner, {row: row for row in range(num_slots)}, prompts, num_steps=4)
    for batch in ([0], [3, 1], list(range(7, 0, -1)), list(range(0, 24, 2))):
        places = dict(zip(batch, generator.sample(range(num_slots), len(batch)), strict=True))
        for row, logits in adapted_logits_after(runner, places, prompts, num_steps=4).items():
            torch.testing.assert_close(logits, together[row], atol=0, rtol=0)


@pytest.mark.parametrize("num_principals", [3, 4])
def test_games_along_a_path_are_captured_and_give_the_answers_of_the_cpu(tiny, num_principals, monkeypatch):
    pools = watch_pools(monkeypatch)
    principals = dict(list(FOUR.items())[:num_principals])
    decoding = {"max_new_tokens": 16, "trace": "tokens", "agent_temperature": 0.1}
    texts = []
    for device in ("cpu", "cuda"):
        base = {"model": str(tiny()), "dtype": "float32", "device": device}
        records = decode(config_of(base, principals, decoding=decoding, cluster={"slots": 6}), MANY_ROWS)
        assert len(records) == len(MANY_ROWS)
        assert all(record.num_unsolved == 0 for record in records.values())
        texts.append({row_id: record.response for row_id, record in records.items()})
    assert any("games" in pool.captured and len(pool.captured) > 1 for pool in pools)  # and one that solves them
    same = sum(texts[0][row_id] == texts[1][row_id] for row_id in texts[0])
    assert same >= len(MANY_ROWS) - 1  # a draw may fall between the two by rounding


GRID = {"rules": ["equilibrium", "linear"], "weights": [{"kind": 1, "brief": 0}, {"kind": 0.5, "brief": 0.5}]}


@pytest.mark.parametrize(
    ("source", "dtype", "reproducibility", "slots"),
    [
        ("response", "bfloat16", "strict", 5),
        ("lookup", "float32", "relaxed", 21),  # with three roles a full batch leaves no room
        ("siblings", "float32", "strict", 2),  # and games that are not captured
        ("model", "bfloat16", "strict", 3),
        ("model", "float32", "relaxed", 4),
    ],
)
def test_drafts_change_no_record_and_save_passes(tiny, monkeypatch, source, dtype, reproducibility, slots):
    draws = {"model": {"temperature": 1.0, "agent_temperature": 50.0}}.get(source, {"temperature": 0.0})
    check_drafts(
        monkeypatch,
        {"model": str(tiny()), "dtype": dtype, "device": "cuda"},
        PAIR,
        source,
        slots,
        grid=GRID if source == "siblings" else {},
        decoding={"reproducibility": reproducibility, **draws},
    )


@pytest.mark.parametrize(
    ("dtype", "num_prompted", "rule"), [("bfloat16", 3, "linear"), ("float32", 1, "equilibrium")]
)
def test_drafts_of_prompted_principals_and_an_adapter(tiny, tmp_path, monkeypatch, dtype, num_prompted, rule):
    pytest.importorskip("peft")
    make_lora(tmp_path / "a", tiny(), "q_proj", "v_proj", "down_proj", seed=3)
    adapted = {"adapted": {"kind": "arm", "adapter": str(tmp_path / "a"), "weight": 0.3}}
    principals = {**dict(list(FOUR.items())[:num_prompted]), **adapted}
    base = {"model": str(tiny()), "dtype": dtype, "device": "cuda"}
    check_drafts(monkeypatch, base, principals, "siblings", 3, decoding={"temperature": 0.05, "n": 3, "rule": rule})


def check_drafts(monkeypatch, base, principals, source, slots, *, decoding, **sections):
    """Rows have the same records with drafts and without, from a host that has none and from one that has some, and
    take fewer passes; all of these are recorded. What is drafted is not left to what passes took."""
    monkeypatch.setattr(drafting, "Pace", FreePace)
    monkeypatch.setattr(Lead, "is_worth_waiting", lambda self, *_, **__: True)
    monkeypatch.setattr(ModelDrafts, "_how_many", lambda self, ranked, *_: len(ranked))
    pools = watch_pools(monkeypatch)

    def assembled(**draft):
        tree = {"max_new_tokens": 24, "trace": "tokens", "agent_temperature": 1.0, **decoding, **draft}
        existing = {"input": {"path": "x", "response": "r"}} if source == "response" else {}
        cluster = {"slots": slots, "transport": "local"}
        config = config_of(base, principals, decoding=tree, cluster=cluster, **existing, **sections)
        return assemble(config, NOWHERE)

    def decoded(assembly, hosts, rows):
        engine = make_engine(assembly, hosts)
        engine.resize()
        num_samples = assembly.config.decoding.n
        found = decode_rows(engine, rows, num_variants=len(assembly.variants), num_samples=num_samples)
        return {(each.row_id, each.variant, each.sample): each for each in found}

    plain = assembled(draft="off")
    hosts = start_hosts(plain)
    rows = MANY_ROWS[:4]
    expected = decoded(plain, hosts, rows)
    if source == "response":
        rows = [replace(row, response=expected[row.row_id, 0, 0].response) for row in rows]
        expected = decoded(plain, hosts, rows)
    model = {"draft_model": base["model"]} if source == "model" else {}
    with_drafts = assembled(draft=[source], **model)
    found = decoded(with_drafts, start_hosts(with_drafts), rows)
    assert found.keys() == expected.keys()
    for key, record in found.items():
        assert record.tokens == expected[key].tokens, key
        assert record == expected[key]
    num_tokens, num_passes = (
        sum(getattr(each, name) for each in found.values()) for name in ("num_tokens", "num_passes")
    )
    assert num_passes < (0.5 * num_tokens if source == "model" else num_tokens - 4)
    assert sum("rows" in pool.captured for pool in pools) >= (3 if source == "model" else 2)


@pytest.mark.parametrize("rule", ["linear", "maximin", "mixture"])
def test_other_rules_are_solved_too(tiny, rule):
    base = {"model": str(tiny()), "device": "cuda"}
    decoding = {"max_new_tokens": 8, "rule": rule, "agent_temperature": 0.3}
    records = decode(config_of(base, PAIR, decoding=decoding, cluster={"slots": 6}), MANY_ROWS[:5])
    assert len(records) == 5
    assert all(record.response is not None for record in records.values())
