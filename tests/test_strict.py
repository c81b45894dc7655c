"""Strict reproducibility: a row's numbers do not depend on its company, its place or where it runs."""

from __future__ import annotations

import gc
import random
import weakref

import pytest
import torch
from support.decoding import ask, config_of, decode

from pipeline.attention.plain import attend_batch
from pipeline.hub.sources import resolve_model
from pipeline.protocol.messages import Admission, HostRole, HostSpec
from pipeline.worker.language_model_runner import Host
from pipeline.worker.loading import load_host

PAIR = {
    "kind": {"kind": "prompted", "principle": "be kind", "weight": 0.7},
    "brief": {"kind": "prompted", "principle": "be brief", "weight": 0.4},
}
ROWS = [ask(f"r{at}", "tell me " * (at % 5) + "x" * (7 * at % 11 + 1)) for at in range(20)]
ROLES = (HostRole("a"), HostRole("b"))


def host_of(folder, *, strict, num_slots, has_static_steps=None, dtype="auto", device="cpu"):
    source = resolve_model(str(folder), cache_folder=folder)
    spec = HostSpec(
        name="base", serves=("base",), source=source, dtype=dtype, device=device, roles=ROLES, num_slots=num_slots,
        vocab_size=261, strict=strict, cache_folder=folder,
    )  # fmt: skip
    host = load_host(spec)
    if has_static_steps is None:
        return host
    return Host(
        host._passes._model, ROLES, num_slots=num_slots, vocab_size=261, strict=strict,
        has_static_steps=has_static_steps,
    )  # fmt: skip


def logits_after(host: Host, places: dict[int, int], prompts, num_steps=6):
    """Logits of the rows named in `places` (row to slot) after a few given tokens."""
    host.advance(
        [Admission(slot, {"a": prompts[row], "b": prompts[row][1:]}) for row, slot in places.items()], [], []
    )
    for step in range(num_steps):
        host.advance([], list(places.values()), [(7 * row + step) % 256 for row in places])
    logits = host.logprobs_at(list(places.values()), None)
    return {row: logits[at].clone() for at, row in enumerate(places)}


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3", "mistral", "neox"])
def test_logits_of_a_row_are_the_same_to_the_bit_in_any_company(tiny, kind):
    num_slots = 40
    generator = random.Random(1)
    prompts = [[generator.randrange(256) for _ in range(generator.randrange(3, 60))] for _ in range(num_slots)]
    host = host_of(tiny(kind), strict=True, num_slots=num_slots)
    together = logits_after(host, {row: row for row in range(num_slots)}, prompts)
    for company in ([0], [3, 1], list(range(5)), list(range(7, 0, -1)), list(range(0, 34, 2)), list(range(33))):
        places = dict(zip(company, generator.sample(range(num_slots), len(company)), strict=True))
        for row, logits in logits_after(host, places, prompts).items():
            assert torch.equal(logits, together[row])


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral"])
def test_passes_of_fixed_shapes_give_the_logits_of_exact_ones(tiny, kind):
    """As on a GPU, where they are recorded; rows come and go, and one outgrows its buffer."""
    folder = tiny(kind)
    prompts = [[3, 9, 4], list(range(250)), [7] * 30, [5, 6], [8] * 12]
    hosts = [host_of(folder, strict=False, num_slots=5, has_static_steps=static) for static in (False, True)]
    for places in ({0: 2, 1: 0, 2: 3}, {1: 1}, {0: 0, 1: 1, 2: 2, 3: 3, 4: 4}):
        exact, fixed = (logits_after(host, places, prompts, num_steps=9) for host in hosts)
        for row in places:
            torch.testing.assert_close(exact[row], fixed[row], atol=1e-4, rtol=0)
    assert hosts[1].cache_bytes_per_token == hosts[0].cache_bytes_per_token > 0
    assert hosts[1]._passes._static_steps._num_rows == 10  # of five slots and two roles


def test_prompts_in_passes_of_one_shape_give_the_same_bits_in_any_company(tiny, monkeypatch):
    """As strict passes are on a GPU: a prompt is cut where it alone says, and packed with others."""
    monkeypatch.setattr("pipeline.worker.forward_passes.PROMPT_SHAPE", 32)
    generator = random.Random(2)
    prompts = [[generator.randrange(256) for _ in range(length)] for length in (3, 90, 32, 33, 17, 64, 2, 200)]
    host = host_of(tiny(), strict=True, num_slots=8, has_static_steps=True)
    together = logits_after(host, {row: row for row in range(8)}, prompts)
    exact = logits_after(host_of(tiny(), strict=True, num_slots=8), {row: row for row in range(8)}, prompts)
    for row, logits in together.items():
        torch.testing.assert_close(logits, exact[row], atol=1e-4, rtol=0)
    for company in ([1], [7, 0], [5, 3, 4, 1], list(range(7, -1, -1))):
        places = dict(zip(company, generator.sample(range(8), len(company)), strict=True))
        for row, logits in logits_after(host, places, prompts).items():
            assert torch.equal(logits, together[row])


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3", "mistral", "neox"])
def test_relaxed_logits_are_close_to_strict_ones(tiny, monkeypatch, kind):
    """Also where one masked call attends for all rows, as on a GPU."""
    places = {0: 2, 1: 0, 2: 3}
    prompts = [[3, 9, 4], list(range(40)), [7] * 30]
    strict = logits_after(host_of(tiny(kind), strict=True, num_slots=4), places, prompts, num_steps=8)
    relaxed = logits_after(host_of(tiny(kind), strict=False, num_slots=4), places, prompts, num_steps=8)
    monkeypatch.setattr("pipeline.attention.slots.attend_each_row", attend_batch)
    at_once = logits_after(host_of(tiny(kind), strict=False, num_slots=4), places, prompts, num_steps=8)
    for row in places:
        torch.testing.assert_close(strict[row], relaxed[row], atol=1e-4, rtol=0)
        torch.testing.assert_close(strict[row], at_once[row], atol=1e-4, rtol=0)


def test_a_cache_that_grows_keeps_what_it_holds(tiny):
    folder = tiny("llama", context=512)
    long, short = list(range(200)) + list(range(50)), [1, 2, 3]
    host = host_of(folder, strict=True, num_slots=2)
    grown = logits_after(host, {0: 0, 1: 1}, [short, long], num_steps=20)  # passes 256 on the way
    alone = logits_after(host_of(folder, strict=True, num_slots=2), {0: 1}, [short, long], num_steps=20)
    assert torch.equal(grown[0], alone[0])


def test_a_host_that_is_resized_lets_go_of_its_buffers_before_it_makes_others(tiny, monkeypatch):
    """It is resized when memory is short."""
    host = host_of(tiny(), strict=True, num_slots=4)
    logits_after(host, {0: 0}, [[1, 2, 3]])
    buffers = [host._logits_RV, *host._cache.keys, *host._cache.values]
    storages = [weakref.ref(buffer if buffer._base is None else buffer._base) for buffer in buffers]
    del buffers
    held: list[bool] = []
    lay_out = Host._lay_out

    def watched(self, num_slots):
        gc.collect()
        held.extend(storage() is not None for storage in storages)
        lay_out(self, num_slots)

    monkeypatch.setattr(Host, "_lay_out", watched)
    host.resize(2)
    assert len(held) == 5
    assert not any(held)


@pytest.mark.parametrize("candidates", [50, "all"])
def test_records_do_not_depend_on_slots_or_order(tiny, candidates):
    decoding = {"max_new_tokens": 14, "candidates": candidates, "trace": "tokens", "agent_temperature": 0.5}
    folder = tiny(seed=2)
    shuffled = random.Random(0).sample(ROWS, len(ROWS))
    reference = decode(config_of(folder, PAIR, decoding=decoding, cluster={"slots": 16}), ROWS)
    assert len(reference) == len(ROWS)
    for slots, rows in ((1, ROWS[:6]), (4, shuffled), (16, shuffled), (5, ROWS)):
        records = decode(config_of(folder, PAIR, decoding=decoding, cluster={"slots": slots}), rows)
        for row_id, record in records.items():
            assert record == reference[row_id]


def test_samples_of_a_row_differ_and_repeat_with_the_seed(tiny):
    decoding = {"max_new_tokens": 20, "n": 4, "temperature": 1.3, "agent_temperature": 5.0}

    def samples(seed, rows):
        config = config_of(tiny(), PAIR, decoding={**decoding, "seed": seed}, cluster={"slots": 3})
        return {key: record.response for key, record in decode(config, rows).items()}

    first = samples(1, ROWS[:3])
    assert len(set(first.values())) > 6
    assert samples(1, [ROWS[2]]) == {f"r2/{at}": first[f"r2/{at}"] for at in range(4)}
    assert samples(2, ROWS[:3]) != first
