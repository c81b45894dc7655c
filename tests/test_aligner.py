"""The Python interface: it gives what `cage relabel` gives, and says what is wrong with its arguments."""

from __future__ import annotations

import io
import json
import re

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from pipeline import AlignBatch, Aligner
from pipeline.config.files import load_config
from pipeline.errors import ConfigurationError, HostError
from pipeline.stages.relabel import relabel

PRINCIPALS = {
    "brief": {"kind": "prompted", "principle": "be brief", "weight": 0.7},
    "kind": {"kind": "prompted", "principle": "be kind", "weight": 0.4},
}
DECODING = {"max_new_tokens": 8, "agent_temperature": 0.5, "trace": "tokens"}
PROMPTS = ["hello", "what is ice made of?", "x"]


@pytest.fixture(scope="module")
def aligner(tiny):
    with Aligner(str(tiny("llama")), PRINCIPALS, slots=4, **DECODING) as made:
        yield made


def job(tiny, folder, **decoding):
    rows = [{"id": f"r{at}", "prompt": prompt} for at, prompt in enumerate(PROMPTS)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = {
        "input": {"path": str(folder / "prompts.jsonl"), "id": "id"},
        "output": {"path": str(folder / "run")},
        "base": str(tiny("llama")),
        "principals": PRINCIPALS,
        "decoding": {**DECODING, **decoding},
        "cluster": {"transport": "local", "slots": 3},
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(tree))
    return folder / "job.yaml"


def test_answers_equal_those_of_relabel_to_the_bit(tiny, tmp_path):
    file = job(tiny, tmp_path, n=2)
    run, _ = relabel(load_config(file), tmp_path / "cache", io.StringIO())
    rows = [row for part in tmp_path.glob("run/part-*.parquet") for row in pq.read_table(part).to_pylist()]
    stored = {(row["row_id"], row["sample"]): row for row in rows}
    assert len(stored) == 6
    assert run.is_complete
    with Aligner.from_config(file) as configured:
        answers = configured.generate(PROMPTS, ids=["r0", "r1", "r2"])  # as many as decoding.n says
        [one] = configured.generate(PROMPTS[:1], ids=["r0"], n=1)
    assert one == answers[0][0]
    for at, samples in enumerate(answers):
        for sample, answer in enumerate(samples):
            row = stored[f"r{at}", sample]
            assert answer.text == row["response"]
            assert answer.finish_reason == row["finish_reason"]
            assert answer.rewards == row["rewards"]
            assert answer.payments == row["payments"]
            assert answer.kl_per_token == row["kl_per_token"]
            assert [token.logprob for token in answer.tokens] == [token["logprob"] for token in row["tokens"]]


def test_a_batch_of_one_gives_the_same_answer_as_a_batch_of_many(aligner):
    together = aligner.generate(PROMPTS)
    assert [aligner.generate([prompt], ids=[str(at)])[0] for at, prompt in enumerate(PROMPTS)] == together


def test_conversations_and_texts_are_answered_alike(aligner):
    (text,) = aligner.generate(["hello"])
    (conversation,) = aligner.generate([[{"role": "user", "content": "hello"}]])
    assert conversation == text


def test_a_prompt_that_fails_has_an_error_and_its_neighbours_go_on(aligner):
    alone = aligner.generate(["hello"], ids=["0"])
    good, empty, bad = aligner.generate(["hello", "", [{"role": "nobody", "content": "x"}]])
    assert [good] == alone
    assert (empty.text, empty.finish_reason) == (None, "error")
    assert "is empty" in empty.error
    assert "role must be one of" in bad.error


@pytest.mark.parametrize("prompt", [None, 5, float("nan"), {"role": "user", "content": "x"}])
def test_what_is_no_prompt_costs_its_own_row_alone(aligner, prompt):
    good, bad = aligner.generate(["hello", prompt])
    assert [good] == aligner.generate(["hello"])
    assert re.search(r"prompt 1: prompt (is null|must be text or a list of messages; got )", bad.error)


def test_prompts_ids_weights_and_paths_may_be_what_python_programs_hold(tiny, aligner):
    expected = aligner.generate(PROMPTS, ids=["1", "2", "3"], weights={"brief": 1.0, "kind": 2.0})
    weights = {"brief": np.float32(1), "kind": np.int64(2)}
    assert aligner.generate((each for each in PROMPTS), ids=np.array([1, 2, 3]), weights=weights) == expected
    with Aligner(tiny("llama"), PRINCIPALS, slots=4, **DECODING) as of_path:
        assert of_path.generate(np.array(PROMPTS), ids=[1, 2, 3], weights=weights) == expected
    with pytest.raises(ConfigurationError, match="principals must be a mapping of sections by name; got \\["):
        Aligner("/nowhere", [PRINCIPALS["brief"]])


def test_weights_are_for_all_prompts_or_for_each(aligner):
    each = aligner.generate(["hello", "hello"], ids=["a", "b"], weights=[{"brief": 0.0, "kind": 0.0}, None])
    assert each[0].kl_per_token == pytest.approx(0, abs=1e-12)  # nobody is listened to
    assert each[1] == aligner.generate(["hello"], ids=["b"], weights={})[0]
    assert "unknown principal" in aligner.generate(["hello"], weights={"nobody": 1.0})[0].error


def test_score_gives_the_rewards_that_relabel_gives_an_existing_answer(tiny, aligner, tmp_path):
    file = job(tiny, tmp_path)
    rows = [{"id": f"r{at}", "prompt": prompt, "old": f"answer {at}"} for at, prompt in enumerate(PROMPTS)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    relabel(load_config(file, ["input.response=old"]), tmp_path / "cache", io.StringIO())
    stored = [row for part in tmp_path.glob("run/part-*.parquet") for row in pq.read_table(part).to_pylist()]
    scored = aligner.score(PROMPTS, [row["old"] for row in rows])
    assert len(stored) == len(PROMPTS)
    assert scored == [row["original_rewards"] for row in sorted(stored, key=lambda row: row["row_id"])]
    with pytest.raises(ConfigurationError, match="one answer per prompt"):
        aligner.score(PROMPTS, ["one"])
    with pytest.raises(ConfigurationError, match=r"prompt 1 and its answer cannot be scored: .*context"):
        aligner.score(["a", "b"], ["short", "x" * 1000])


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("hello",), {}, "must be a list"),
        (({"role": "user", "content": "x"},), {}, "prompts must be a list of texts or conversations; got {'role'"),
        ((["a"],), {"ids": [None]}, "ids must be text or whole numbers; got None"),
        ((["a"],), {"ids": [1.0]}, "ids must be text or whole numbers; got 1.0"),
        ((["a", "b"],), {"ids": ["1", "1"]}, "all different"),
        ((["a", "b"],), {"ids": ["1"]}, "one per prompt"),
        ((["a"],), {"weights": [{}, {}]}, "one per prompt"),
        ((["a"],), {"n": 0}, "at least 1"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(aligner, arguments, options, message):
    with pytest.raises(ConfigurationError, match=message):
        aligner.generate(*arguments, **options)


def test_wrong_keys_are_refused_before_a_model_is_loaded():
    with pytest.raises(ConfigurationError, match=r"decoding\.agent_temprature is not a known key; did you mean"):
        Aligner("/nowhere", agent_temprature=1.0)
    with pytest.raises(ConfigurationError, match="no model folder"):
        Aligner("/nowhere")
    with pytest.raises(ConfigurationError, match=r"kind must be one of prompted, arm"):
        Aligner("/nowhere", {"a": {"kind": "jury"}})


def test_an_aligner_can_be_used_again_after_a_call_that_failed(tiny):
    with Aligner(str(tiny("llama")), PRINCIPALS, slots=2, **DECODING) as made:
        expected = made.generate(PROMPTS)

        def fail(*_):
            raise RuntimeError("device lost")

        client = made._hosts.sampler
        host, client.host = client.host, type("Broken", (), {"advance_and_sample": fail})()
        with pytest.raises(HostError, match="device lost"):
            made.generate(PROMPTS)
        client.host = host
        assert made.generate(PROMPTS) == expected
    with pytest.raises(ConfigurationError, match="closed"):
        made.generate(PROMPTS)


def test_batches_of_ray_data_get_the_same_answers(tiny, aligner):
    align = AlignBatch(str(tiny("llama")), PRINCIPALS, slots=4, **DECODING)
    batch = align({"prompt": PROMPTS, "id": ["0", "1", "2"], "other": [1, 2, 3]})
    answers = aligner.generate(PROMPTS)
    assert batch["response"] == [answer.text for answer in answers]
    assert batch["rewards"] == [answer.rewards for answer in answers]
    assert batch["other"] == [1, 2, 3]
    with pytest.raises(ConfigurationError, match="needs a column prompt or messages"):
        align({"text": PROMPTS, "id": ["0", "1", "2"]})


def test_rows_of_a_batch_are_read_as_rows_of_a_file_are(tiny, aligner):
    align = AlignBatch(str(tiny("llama")), PRINCIPALS, slots=4, **DECODING)
    ids = np.array(["0", "1"], dtype=object)
    conversation = [{"role": "user", "content": np.array([{"type": "text", "text": "hello"}], dtype=object)}]
    held = np.empty(2, dtype=object)  # as batches of Ray Data hold lists
    held[0], held[1] = np.array(conversation, dtype=object), None
    expected = aligner.generate(["hello"])[0].text
    for name in ("prompt", "messages"):
        batch = align({name: held, "id": ids})
        assert batch["response"] == [expected, None]
        assert "is null" in batch["error"][1]
    with pytest.raises(ConfigurationError, match="the column messages must hold lists of messages; got the text 'x'"):
        align({"messages": ["x"], "id": ["0"]})
    with pytest.raises(ConfigurationError, match="ids must be text or whole numbers; got None"):
        align({"prompt": ["x"], "id": [None]})


def test_tools_and_values_for_templates_of_a_batch_are_read(tiny):
    template = (
        "{% for m in messages %}{{ m.content }}{{ mood }}{% for t in tools or [] %}{{ t.function.name }}{% endfor %}"
    )
    align = AlignBatch({"model": str(tiny("llama")), "chat_template": template + "{% endfor %}"}, slots=2, **DECODING)
    tool = {"type": "function", "function": {"name": "weather", "parameters": None}}
    messages = [[{"role": "user", "content": "hello"}]] * 4
    kwargs = [None, {"mood": "!", "other": None}, {"moot": 1}, None]
    batch = align(
        {
            "messages": messages,
            "id": range(4),
            "chat_template_kwargs": kwargs,
            "tools": [None, np.array([tool]), [], [1]],
        }
    )
    plain, steered, *_ = batch["response"]
    assert plain != steered
    assert plain == align({"messages": messages[:1], "id": [0]})["response"][0]
    assert batch["error"][:2] == [None, None]
    assert "chat_template_kwargs.moot has no effect" in batch["error"][2]
    assert "tools[0] must be a function with a name" in batch["error"][3]
    with pytest.raises(ConfigurationError, match="a batch has the column response, and answers would take its place"):
        align({"messages": messages, "id": range(4), "response": ["old"] * 4})


def test_a_batch_of_ray_data_has_one_answer_for_a_row():
    with pytest.raises(ConfigurationError, match="a row of a batch gets one answer, so n must be 1; got 2"):
        AlignBatch("/nowhere", n=2)


def test_a_batch_of_ray_data_without_ids_is_refused(tiny):
    align = AlignBatch(str(tiny("llama")), PRINCIPALS, slots=4, **DECODING)
    with pytest.raises(ConfigurationError, match=r"needs a column id: .* it has prompt, other"):
        align({"prompt": PROMPTS, "other": [1, 2, 3]})
