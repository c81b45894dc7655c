"""Models with recurrent state in slots: a row owns its states, whatever runs beside it, whoever read its prompt."""

from __future__ import annotations

import random
import warnings
from dataclasses import replace

import pytest
import torch
from support.decoding import ask, config_of, engine_of
from support.families import make_family
from support.language_models import ADAPTER_ROLES, spec_of

from jobs.commands.plan import run_plan
from pipeline.attention.cached_layers import bytes_per_row, cache_of_config
from pipeline.engine.engine import decode_rows
from pipeline.errors import ConfigurationError, StateLost
from pipeline.hub.descriptions import recurrent_config
from pipeline.hub.sources import resolve_model
from pipeline.protocol.messages import Admission, Position, Step
from pipeline.protocol.topology import HostRole
from pipeline.quoting import size
from pipeline.worker import recurrent_runner
from pipeline.worker.hosts import LanguageModelHost
from pipeline.worker.loading import load_language_model
from pipeline.worker.plain_runner import PlainRunner
from pipeline.worker.recurrent_passes import RunningBatch
from pipeline.worker.recurrent_runner import NUM_KEPT, RecurrentRunner

# a short convolution, a delta rule with experts, an SSM beside attention, the first Mamba, which reads prompts whole,
# and states that a model's modules keep
FAMILIES = ["lfm2", "qwen3_next", "falcon_h1", "mamba", "recurrent_gemma"]
ROLES = (HostRole("base"), HostRole("kind"))


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """The folder of a family's tiny model, made once."""
    made = {}

    def make(name):
        if name not in made:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                made[name] = make_family(tmp_path_factory.mktemp(name) / "model", name)
        return made[name]

    return make


@pytest.fixture(scope="module")
def runner_of(folder_of):
    """The runner of a family's tiny model, loaded once; it is emptied before it is given out."""
    loaded = {}

    def load(name, *, num_slots):
        if name not in loaded:
            runner = load_language_model(spec_of(folder_of(name), roles=ROLES)).runner
            assert isinstance(runner, RecurrentRunner)
            loaded[name] = runner
        loaded[name].resize(num_slots)
        return loaded[name]

    return load


def prompts_of(num_rows, *, longest=40):
    generator = random.Random(5)
    return [[generator.randrange(5, 250) for _ in range(generator.randrange(1, longest))] for _ in range(num_rows)]


def admission(slot, prompt, **options):
    """A row whose second role reads one token more."""
    return Admission(slot, {"base": prompt, "kind": [9, *prompt]}, **options)


def after_steps(runner, places, prompts, num_steps=3):
    """Log-probabilities [R, V] by row after a few given tokens; rows are in the slots that `places` says."""
    runner.advance(Step([admission(slot, prompts[row]) for row, slot in places.items()]))
    for step in range(num_steps):
        runner.advance(Step((), list(places.values()), [5 + (7 * row + step) % 200 for row in places]))
    found = runner.logprobs_at(list(places.values()), None)
    return {row: found[at].clone() for at, row in enumerate(places)}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_rows_bits_are_its_own_in_any_slot_order_and_company(runner_of, name):
    prompts = prompts_of(16)
    prompts[3] = [7]  # one token: there is no state to go on from
    wanted = {}
    for row in range(16):
        wanted |= after_steps(runner_of(name, num_slots=1), {row: 0}, prompts)
    generator = random.Random(3)
    for num_slots, rows in ((3, [3, 8]), (9, list(range(9))), (16, list(range(15, -1, -1))), (16, [4, 11, 0])):
        slots = generator.sample(range(num_slots), len(rows))
        found = after_steps(runner_of(name, num_slots=num_slots), dict(zip(rows, slots, strict=True)), prompts)
        assert all(torch.equal(found[row], wanted[row]) for row in rows), (num_slots, rows)


@pytest.mark.parametrize("name", FAMILIES)
def test_slots_give_what_rows_give_one_by_one(runner_of, folder_of, name):
    """Rows come and go, and all roles have prompts of their own."""
    spec = replace(spec_of(folder_of(name), roles=ROLES, num_slots=4), attention="plain")
    plain = load_language_model(spec).runner
    assert isinstance(plain, PlainRunner)
    runner, prompts = runner_of(name, num_slots=4), prompts_of(6)
    for places in ({0: 2, 1: 0, 2: 3}, {3: 1, 4: 2}, {5: 0, 1: 1, 3: 2, 4: 3}):
        of_slots, one_by_one = (after_steps(each, places, prompts) for each in (runner, plain))
        for row in places:
            torch.testing.assert_close(of_slots[row], one_by_one[row], atol=1e-3, rtol=0)
    answer = prompts[2][:9]
    scores = [each.score({"base": prompts[0], "kind": prompts[1]}, answer) for each in (runner, plain)]
    torch.testing.assert_close(*scores, atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", ["lfm2", "qwen3_next", "mamba"])
@pytest.mark.parametrize("length", [12, 37])  # of the prompt, in one part or in three
def test_answers_to_one_prompt_read_it_once_and_have_the_same_bits(runner_of, monkeypatch, name, length):
    monkeypatch.setattr(recurrent_runner, "CHUNK", 16)
    prompt = prompts_of(1, longest=2)[0] + list(range(20, 19 + length))
    last_part = (length - 2) // 16

    def read(slots):
        for part in range(last_part + 1):
            parts = [Admission(slot, {"base": prompt, "kind": prompt}, part=part, is_last=part == last_part)
                     for slot in slots]  # fmt: skip
            runner.advance(Step(parts))
        return runner.logprobs_at(slots, None)

    runner = runner_of(name, num_slots=6)
    before = runner.work[1]
    together = read([4, 1, 2])
    read_once = runner.work[1] - before
    runner.advance(Step((), [4, 1, 2], [11, 12, 13]))
    later = read([0, 4])  # another answer in its turn, and one in the slot of an answer that ended
    # all tokens but the last are read once for both roles; then every row reads the last, in passes of four or more
    assert read_once == length - 1 + 6
    assert runner.work[1] - before - read_once == 6 + 4
    alone = runner_of(name, num_slots=1)
    runner = alone
    wanted = read([0])
    assert torch.equal(together, wanted.expand(3, -1, -1))
    assert torch.equal(later, wanted.expand(2, -1, -1))


@pytest.mark.parametrize("name", ["lfm2", "qwen3_next"])
def test_a_shared_prefix_is_read_once_and_leaves_no_trace_in_bits(runner_of, name):
    prefix, ends = list(range(30, 50)), [[5, 6, 7], [8, 9], [60] * 9]

    def read(slot, end):
        prompts = {"base": prefix + end, "kind": prefix + end}
        runner.advance(Step([Admission(slot, prompts, dict.fromkeys(prompts, len(prefix)))]))
        return runner.logprobs_at([slot], None)

    wanted = []
    for end in ends:
        runner = runner_of(name, num_slots=1)
        wanted.append(read(0, end))
    runner = runner_of(name, num_slots=3)
    before = runner.work[1]
    found = [read(slot, end) for slot, end in enumerate(ends)]
    assert all(map(torch.equal, found, wanted))
    # the prefix and all ends but for their last tokens, once for both roles; and passes of at least four rows
    assert runner.work[1] - before == len(prefix) + sum(len(end) - 1 for end in ends) + 4 * len(ends)


def test_a_state_that_goes_on_is_never_taken_for_the_prompt_that_it_began_with(runner_of):
    """What keys allow: a row that has decoded since is cut back to its prompt. States are kept apart instead."""
    prompt = list(range(40, 60))
    runner = runner_of("lfm2", num_slots=2)
    runner.advance(Step([admission(0, prompt)]))
    wanted = runner.logprobs_at([0], None)
    runner.advance(Step((), [0], [7]))
    runner.advance(Step([admission(1, [8, 9, 10])]))  # another prompt is the newest one now
    runner.advance(Step([admission(1, prompt)]))
    assert torch.equal(runner.logprobs_at([1], None), wanted)


def test_a_failed_pass_leaves_nothing_that_later_prompts_could_take_over(runner_of, monkeypatch):
    prompt = list(range(40, 60))
    runner = runner_of("lfm2", num_slots=2)
    runner.advance(Step([admission(0, prompt)]))
    wanted = runner.logprobs_at([0], None)
    with monkeypatch.context() as patch:
        patch.setattr(runner._passes, "append", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            runner.advance(Step([admission(1, prompt)]))
    before = runner.work[1]
    runner.advance(Step([admission(1, prompt)]))
    assert runner.work[1] - before > 2 * (len(prompt) - 1)  # read again, not copied
    assert torch.equal(runner.logprobs_at([1], None), wanted)


def test_a_step_that_is_repeated_or_lost_never_moves_a_state_twice(runner_of):
    runner = runner_of("lfm2", num_slots=1)
    host = LanguageModelHost(runner)
    begun = Position(0, 77, 0)
    host.advance(begun, Step([admission(0, [5, 6, 7, 8])]))
    step = Step((), [0], [9])
    host.advance(begun.after, step)
    once = host.values_at(begun.after, [0], [1], None)
    host.advance(begun.after, step)  # its reply was lost
    assert torch.equal(host.values_at(begun.after, [0], [1], None), once)
    with pytest.raises(StateLost):
        host.advance(begun.after.after.after, step)


@pytest.mark.parametrize("name", ["qwen3_next", "falcon_h1"])
def test_memory_of_a_slot_counts_states_and_what_is_kept_beside_slots(runner_of, name):
    runner = runner_of(name, num_slots=3)
    runner.advance(Step([admission(0, [5, 6, 7])]))
    passes = runner._passes
    buffers = [each for layer in passes._states._buffers for each in layer]
    num_rows = len(ROLES) * (3 + NUM_KEPT) + 1
    assert sum(each.nbytes for each in buffers) == num_rows * bytes_per_row(passes._cached).total()
    keys = sum(each.nbytes for each in (*passes._cache.keys, *passes._cache.values))
    logits = 4 * 4 * 261
    of_row = (keys + sum(each.nbytes for each in buffers)) // num_rows
    budget, of_token = runner.memory_budget(200), passes.sizes.token_bytes
    assert budget.slot_bytes == len(ROLES) * (of_row + logits + of_token)
    assert budget.reserved_bytes == len(ROLES) * NUM_KEPT * of_row + 4096 * of_token


def test_adapters_of_running_rows_are_their_own(folder_of, tmp_path):
    """Three roles in one pass: without an adapter, and with two that change the convolution's projections."""
    import peft
    from transformers import AutoModelForCausalLM

    for at, name in enumerate(("one", "two")):
        torch.manual_seed(at)
        config = peft.LoraConfig(
            r=4, target_modules=["in_proj", "out_proj", "q_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
        )
        model = AutoModelForCausalLM.from_pretrained(folder_of("lfm2"))
        peft.get_peft_model(model, config).save_pretrained(tmp_path / name)
    adapters = {name: tmp_path / name for name in ("one", "two")}
    spec = spec_of(folder_of("lfm2"), roles=ADAPTER_ROLES, adapters=adapters, num_slots=3)
    found = []
    for attention in ("slots", "plain"):
        runner = load_language_model(replace(spec, attention=attention)).runner
        runner.advance(
            Step([Admission(slot, {role.name: [5 + slot, 6, 7, 8] for role in ADAPTER_ROLES}) for slot in range(3)])
        )
        runner.advance(Step((), [2, 0, 1], [9, 10, 11]))
        found.append(runner.logprobs_at([0, 1, 2], None))
    assert not torch.allclose(found[0][:, 0], found[0][:, 1], atol=0.1)
    torch.testing.assert_close(*found, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("name", "attention", "kind"),
    [("lfm2", "auto", RecurrentRunner), ("lfm2", "slots", RecurrentRunner), ("lfm2", "plain", PlainRunner),
     ("minimax", "auto", PlainRunner), ("recurrent_gemma", "slots", RecurrentRunner)],
)  # fmt: skip
def test_attention_chooses_slots_or_rows_one_by_one(folder_of, name, attention, kind):
    loaded = load_language_model(replace(spec_of(folder_of(name)), attention=attention))
    assert type(loaded.runner) is kind
    assert (loaded.why_plain is not None) == (attention == "auto" and kind is PlainRunner)


def test_states_that_are_kept_elsewhere_are_refused_by_name_where_slots_are_asked_for(folder_of):
    spec = replace(spec_of(folder_of("minimax")), attention="slots")
    with pytest.raises(ConfigurationError, match="keeps its states in a cache of its own class"):
        load_language_model(spec)


def test_a_run_writes_the_same_records_with_any_number_of_slots(folder_of):
    rows = [ask(f"row {at}", "Why? " * (at % 4) + "Say more.") for at in range(7)]
    principals = {"kind": {"kind": "prompted", "principle": "Be kind.", "weight": 0.5}}

    def decode(slots):
        options = {"decoding": {"max_new_tokens": 6, "trace": "tokens"}, "cluster": {"slots": slots}}
        engine, _ = engine_of(config_of(folder_of("qwen3_next"), principals, **options))
        return {record.row_id: record for record in decode_rows(engine, rows)}

    alone = decode(1)
    assert all(record.error is None for record in alone.values())
    assert decode(3) == alone == decode(7)


def test_rows_of_a_fixed_pass_stand_in_places_of_their_own():
    """As on a GPU in strict mode: which rows run changes nothing about the places of those that do."""
    batch = RunningBatch([4, 1], [9, 5], [70, 80], [2, 1])
    batch.place(6, spare_row=12)
    assert batch.rows == [12, 1, 12, 12, 4, 12]
    assert batch.lengths == [1, 5, 1, 1, 9, 1]
    assert batch.tokens == [0, 80, 0, 0, 70, 0]
    assert batch.slots == [0, 1, 0, 0, 2, 0]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_plan_knows_what_a_models_cache_will_hold_without_its_weights(runner_of, folder_of, name):
    config = recurrent_config(resolve_model(str(folder_of(name)), cache_folder=folder_of(name)))
    assert cache_of_config(config, "float32") == runner_of(name, num_slots=1)._passes._cached


def test_a_plan_shows_states_of_all_rows_and_of_what_is_kept(folder_of, tmp_path, capsys):
    (tmp_path / "in.jsonl").write_text('{"id": "a", "prompt": "hi"}\n')
    (tmp_path / "job.yaml").write_text(
        f"input: {{path: {tmp_path}/in.jsonl}}\noutput: {{path: {tmp_path}/out}}\n"
        f"base: {{model: {folder_of('mamba')}}}\ncluster: {{slots: 4, transport: local}}\n"
        "principals: {kind: {kind: prompted, principle: Be kind., weight: 0.5}}\n"
    )
    run_plan(tmp_path / "job.yaml", [])
    shown = capsys.readouterr().out
    # a state of 128 x (4 + 8) numbers in each of two layers, and no keys at all
    states = 2 * 128 * (4 + 8) * 4
    assert size(states) in shown.partition("states of a row")[2].splitlines()[1]
    assert "(2 rows of" in shown
