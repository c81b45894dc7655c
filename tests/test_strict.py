"""Strict reproducibility: a row's numbers do not depend on the batch composition, its slot or where it runs."""

from __future__ import annotations

import gc
import random
import weakref

import pytest
import torch
from support.decoding import config_of, decode
from support.language_models import CHANGING_BATCHES, CHANGING_PROMPTS, logits_after, runner_of, watching_shapes
from support.sampling_hosts import MANY_ROWS, PAIR

from pipeline.attention.plain import attend_batch
from pipeline.attention.slots import SlotCache
from pipeline.protocol.messages import PASS_ROWS
from pipeline.worker import language_model_runner
from pipeline.worker.forward_passes import PROMPT_SHAPE


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3", "mistral", "neox"])
def test_logits_of_a_row_are_the_same_to_the_bit_in_any_batch(tiny, kind):
    num_slots = 40
    generator = random.Random(1)
    prompts = [[generator.randrange(256) for _ in range(generator.randrange(3, 60))] for _ in range(num_slots)]
    runner = runner_of(tiny(kind), strict=True, num_slots=num_slots)
    together = logits_after(runner, {row: row for row in range(num_slots)}, prompts)
    for batch in ([0], [3, 1], list(range(5)), list(range(7, 0, -1)), list(range(0, 34, 2)), list(range(33))):
        places = dict(zip(batch, generator.sample(range(num_slots), len(batch)), strict=True))
        for row, logits in logits_after(runner, places, prompts).items():
            assert torch.equal(logits, together[row])


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral"])
def test_passes_of_fixed_shapes_give_the_logits_of_exact_ones(tiny, kind):
    """As on a GPU, where they are captured; rows come and go, and one outgrows its buffer."""
    exact, fixed = (runner_of(tiny(kind), strict=False, num_slots=5, has_fixed_shapes=each) for each in (False, True))
    with watching_shapes() as shapes:
        found = [logits_after(fixed, places, CHANGING_PROMPTS, num_steps=9) for places in CHANGING_BATCHES]
    for places, of_fixed in zip(CHANGING_BATCHES, found, strict=True):
        of_exact = logits_after(exact, places, CHANGING_PROMPTS, num_steps=9)
        assert of_fixed.keys() == of_exact.keys() == places.keys()
        for row in places:
            torch.testing.assert_close(of_exact[row], of_fixed[row], atol=1e-4, rtol=0)
    assert fixed.cache_bytes_per_token == exact.cache_bytes_per_token
    assert fixed.cache_bytes_per_token.total() > 0
    # the pass that makes the buffers, rows of five slots and two roles in whole tiles, and prompts
    assert shapes == {(1, 1), (1, PASS_ROWS), (1, PROMPT_SHAPE)}


def test_prompts_in_passes_of_one_shape_give_the_same_bits_in_any_batch(tiny, monkeypatch):
    """As strict passes are on a GPU: a prompt is cut where it alone says, and packed with others."""
    monkeypatch.setattr("pipeline.worker.forward_passes.PROMPT_SHAPE", 32)
    generator = random.Random(2)
    prompts = [[generator.randrange(256) for _ in range(length)] for length in (3, 90, 32, 33, 17, 64, 2, 200)]
    runner = runner_of(tiny(), strict=True, num_slots=8, has_fixed_shapes=True)
    together = logits_after(runner, {row: row for row in range(8)}, prompts)
    exact = logits_after(runner_of(tiny(), strict=True, num_slots=8), {row: row for row in range(8)}, prompts)
    for row, logits in together.items():
        torch.testing.assert_close(logits, exact[row], atol=1e-4, rtol=0)
    for batch in ([1], [7, 0], [5, 3, 4, 1], list(range(7, -1, -1))):
        places = dict(zip(batch, generator.sample(range(8), len(batch)), strict=True))
        for row, logits in logits_after(runner, places, prompts).items():
            assert torch.equal(logits, together[row])


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3", "mistral", "neox"])
def test_relaxed_logits_are_close_to_strict_ones(tiny, monkeypatch, kind):
    """Also where one masked call attends for all rows, as on a GPU."""
    places = {0: 2, 1: 0, 2: 3}
    prompts = [[3, 9, 4], list(range(40)), [7] * 30]
    strict = logits_after(runner_of(tiny(kind), strict=True, num_slots=4), places, prompts, num_steps=8)
    relaxed = logits_after(runner_of(tiny(kind), strict=False, num_slots=4), places, prompts, num_steps=8)
    monkeypatch.setattr("pipeline.attention.slots.attend_each_row", attend_batch)
    at_once = logits_after(runner_of(tiny(kind), strict=False, num_slots=4), places, prompts, num_steps=8)
    for row in places:
        torch.testing.assert_close(strict[row], relaxed[row], atol=1e-4, rtol=0)
        torch.testing.assert_close(strict[row], at_once[row], atol=1e-4, rtol=0)


def test_a_cache_that_grows_keeps_what_it_holds(tiny):
    folder = tiny("llama", context=512)
    long, short = list(range(200)) + list(range(50)), [1, 2, 3]
    runner = runner_of(folder, strict=True, num_slots=2)
    grown = logits_after(runner, {0: 0, 1: 1}, [short, long], num_steps=20)  # passes 256 on the way
    alone = logits_after(runner_of(folder, strict=True, num_slots=2), {0: 1}, [short, long], num_steps=20)
    assert torch.equal(grown[0], alone[0])


def test_a_runner_that_is_resized_frees_its_buffers_before_it_makes_others(tiny, monkeypatch):
    """It is resized when memory is short."""
    caches, held = [], []

    class WatchedCache(SlotCache):
        """Notes whether buffers are still held while the next cache is made."""

        def __init__(self, num_rows):
            gc.collect()
            held.extend(buffer() is not None for buffer in buffers)
            super().__init__(num_rows)
            caches.append(self)

    buffers = []
    monkeypatch.setattr(language_model_runner, "SlotCache", WatchedCache)
    runner = runner_of(tiny(), strict=True, num_slots=4)
    logits_after(runner, {0: 0}, [[1, 2, 3]])
    cache = caches.pop()
    tensors = [runner.newest_S, runner.slot_logits, *cache.keys, *cache.values]
    buffers += [weakref.ref(tensor if tensor._base is None else tensor._base) for tensor in tensors]
    del tensors, cache
    caches.clear()
    assert not held
    runner.resize(2)
    assert held == [False] * 6  # two vectors of the slots, and keys and values of two layers


@pytest.mark.parametrize("candidates", [50, "all"])
def test_records_do_not_depend_on_slots_or_order(tiny, candidates):
    decoding = {"max_new_tokens": 14, "candidates": candidates, "trace": "tokens", "agent_temperature": 0.5}
    folder = tiny(seed=2)
    shuffled = random.Random(0).sample(MANY_ROWS, len(MANY_ROWS))
    reference = decode(config_of(folder, PAIR, decoding=decoding, cluster={"slots": 16}), MANY_ROWS)
    assert len(reference) == len(MANY_ROWS)
    for slots, rows in ((1, MANY_ROWS[:6]), (4, shuffled), (16, shuffled), (5, MANY_ROWS)):
        records = decode(config_of(folder, PAIR, decoding=decoding, cluster={"slots": slots}), rows)
        for row_id, record in records.items():
            assert record == reference[row_id]


def test_samples_of_a_row_differ_and_repeat_with_the_seed(tiny):
    decoding = {"max_new_tokens": 20, "n": 4, "temperature": 1.3, "agent_temperature": 5.0}

    def samples(seed, rows):
        config = config_of(tiny(), PAIR, decoding={**decoding, "seed": seed}, cluster={"slots": 3})
        return {key: record.response for key, record in decode(config, rows).items()}

    first = samples(1, MANY_ROWS[:3])
    assert len(set(first.values())) > 6
    assert samples(1, [MANY_ROWS[2]]) == {f"r2/{at}": first[f"r2/{at}"] for at in range(4)}
    assert samples(2, MANY_ROWS[:3]) != first
