"""Games over blocks and whole answers: against enumeration, by restarts and slots, and with what is refused."""

from __future__ import annotations

import inspect
import io
import json
from collections import Counter
from dataclasses import replace
from itertools import count, product
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from support.decoding import NOWHERE, ask, config_of

import cage
from pipeline import Aligner
from pipeline.config.files import load_config
from pipeline.engine.engine import decode_rows
from pipeline.errors import ConfigurationError, HostError, HostOutOfMemory
from pipeline.evaluation.judges.words import words
from pipeline.evaluation.text_principals import resolve_judge_principals
from pipeline.principals.judge import JudgePrincipal
from pipeline.records import Candidate, FinishReason
from pipeline.runtime.assembly import assemble
from pipeline.runtime.engines import make_decoding_engine
from pipeline.runtime.local_hosts import start_hosts
from pipeline.stages.relabel import relabel

PAIR = {
    "brief": {"kind": "prompted", "principle": "be brief", "weight": 0.7},
    "kind": {"kind": "prompted", "principle": "be kind", "weight": 0.4},
}
PROMPTS = ["hello", "what is ice made of?", "x"]
RULES = [
    "base",
    "linear",
    "mixture",
    "forward_kl",
    "jensen_shannon",
    "maximin",
    "equilibrium",
    "soft_threshold",
    "solo",
]


def answers(tiny, *, principals=PAIR, slots=4, n=1, prompts=PROMPTS, seed=0, **decoding):
    options = {"unit": "answer", "proposals": 6, "max_new_tokens": 6, "agent_temperature": 0.5, **decoding}
    with Aligner(str(tiny("llama", seed=seed)), principals, slots=slots, **options) as aligner:
        return aligner.generate(prompts, n=n)


def games_of(answer):
    """The proposals of an answer by game."""
    games = {}
    for proposal in answer.proposals:
        games.setdefault(proposal.game, []).append(proposal)
    return list(games.values())


def policy_of(game, *, rule="equilibrium", temperature=0.5):
    """What a rule makes of the proposals of a game, computed from what the record has."""
    counts = torch.tensor([[each.count for each in game]], dtype=torch.float64)
    rewards = torch.tensor([[[each.rewards[name] for each in game] for name in PAIR]], dtype=torch.float64)
    weights = torch.tensor([[PAIR[name]["weight"] for name in PAIR]], dtype=torch.float64)
    values = weights[..., None] * rewards
    return cage.rules.by_name[rule](cage.Game((counts / counts.sum()).log(), values, temperature), weights)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("unit", ["block", "answer"])
def test_a_game_is_what_its_rule_makes_of_the_proposals(tiny, rule, unit):
    options = {"block_tokens": 3} if unit == "block" else {}
    for answer in answers(tiny, rule=rule, unit=unit, **options):
        for game in games_of(answer):
            assert sum(each.count for each in game) == 6
            assert sum(each.is_chosen for each in game) == 1
            expected = policy_of(game, rule=rule).log_policy.exp()[0].tolist()
            assert [each.probability for each in game] == pytest.approx(expected, abs=1e-12)
        chosen = [each for each in answer.proposals if each.is_chosen]
        assert answer.rewards == pytest.approx({name: sum(each.rewards[name] for each in chosen) for name in PAIR})
        assert len(games_of(answer)) == (1 if unit == "answer" else -(-answer.num_tokens // 3))


def test_the_rewards_of_an_answer_are_those_that_scoring_it_gives(tiny):
    options = {"unit": "answer", "proposals": 4, "max_new_tokens": 8, "agent_temperature": 0.5}
    with Aligner(str(tiny("llama")), PAIR, slots=4, **options) as aligner:
        (answer,) = aligner.generate(["hello"])
        ended = [each for each in answer.proposals if answer.finish_reason == "stop" and each.is_chosen]
        for each in ended:
            (scored,) = aligner.score(["hello"], [each.text])
            assert scored == pytest.approx(each.rewards, abs=1e-3)
    assert answer.payments is not None


@pytest.mark.parametrize("unit", ["block", "answer"])
def test_no_bit_depends_on_the_slots_and_samples_have_games_of_their_own(tiny, unit):
    options = {"block_tokens": 2} if unit == "block" else {}
    many = answers(tiny, unit=unit, slots=7, n=2, **options)
    assert many == answers(tiny, unit=unit, slots=1, n=2, **options)
    assert many[0][0].proposals != many[0][1].proposals
    alone = answers(tiny, unit=unit, slots=7, n=1, **options)
    assert [first for first, _ in many] == alone


def test_greedy_takes_the_likeliest_proposal(tiny):
    for answer in answers(tiny, temperature=0.0, agent_temperature=0.05):
        chosen = next(each for each in answer.proposals if each.is_chosen)
        assert chosen.probability == max(each.probability for each in answer.proposals)
        assert chosen.text == answer.text


def test_many_proposals_come_to_the_game_over_all_answers(tiny):
    """Two tokens of two candidates each: the model's own probabilities give the base policy over all answers."""
    from transformers import AutoModelForCausalLM

    folder = str(tiny("llama", seed=1))  # one whose answers of two tokens read differently
    options = {"max_new_tokens": 2, "candidates": 2, "prompts": ["hello"], "slots": 32, "seed": 1}
    (few,), (many,) = (answers(tiny, proposals=count, **options) for count in (16, 1024))
    config = config_of(folder, PAIR, decoding={"candidates": 2, "max_new_tokens": 2})
    assembly = assemble(config, tiny("llama"))
    prompt = assembly.prompter.encode(({"role": "user", "content": "hello"},), dict.fromkeys(PAIR, 1.0))["base"]
    model = AutoModelForCausalLM.from_pretrained(folder)

    @torch.no_grad()
    def step(tokens):
        logits = model(torch.tensor([[*prompt, *tokens]])).logits[0, -1].double().log_softmax(-1)
        best = logits.topk(2)
        return dict(zip(best.indices.tolist(), best.values.softmax(-1).tolist(), strict=True))

    exact = Counter()
    for (first, p), at in product(step([]).items(), range(2)):
        if first in assembly.prompter.stop_ids:
            exact[assembly.prompter.decode([])] += p / 2
            continue
        second, q = list(step([first]).items())[at]
        exact[assembly.prompter.decode([first, second])] += p * q
    shares = {each.text: each.count / 1024 for each in many.proposals}
    assert len(exact) == 4
    assert set(shares) <= set(exact)
    assert all(abs(shares.get(text, 0.0) - p) < 4 * (p / 1024) ** 0.5 + 1e-9 for text, p in exact.items())
    whole = [each for each in many.proposals if each.text in exact]
    base = torch.tensor([[exact[each.text] for each in whole]], dtype=torch.float64).log()
    rewards = torch.tensor([[[each.rewards[name] for each in whole] for name in PAIR]], dtype=torch.float64)
    weights = torch.tensor([PAIR[name]["weight"] for name in PAIR], dtype=torch.float64)
    policy = cage.solve(cage.Game(base, weights[:, None] * rewards, 0.5)).policy[0].tolist()
    limit = dict(zip([each.text for each in whole], policy, strict=True))

    def distance(answer):
        found = {each.text: each.probability for each in answer.proposals}
        return sum(abs(found.get(text, 0.0) - p) for text, p in limit.items()) / 2

    assert distance(many) < 0.06
    assert distance(many) < distance(few)


def test_a_reward_model_judges_whole_answers(tiny, judge):
    principals = {"liked": {"kind": "reward_model", "model": str(judge("llama")), "candidates": 2, "scale": 3.0}}
    options = {"unit": "answer", "proposals": 4, "max_new_tokens": 5, "agent_temperature": 0.5}
    with Aligner(str(tiny("llama")), principals, slots=3, **options) as aligner:
        for prompt, answer in zip(PROMPTS, aligner.generate(PROMPTS), strict=True):
            assert answer.error is None
            chosen = next(each for each in answer.proposals if each.is_chosen)
            assert answer.rewards == chosen.rewards
            if answer.finish_reason == "stop":
                (scored,) = aligner.score([prompt], [chosen.text])
                assert scored == pytest.approx(dict(chosen.rewards), abs=1e-4)
            assert len({each.rewards["liked"] for each in answer.proposals}) > 1


@pytest.mark.parametrize("unit", ["block", "answer"])
def test_a_lost_host_costs_no_answer_and_changes_none(tiny, unit):
    blocks = {"block_tokens": 2} if unit == "block" else {}
    decoding = {"unit": unit, "proposals": 4, "max_new_tokens": 6, **blocks}
    config = config_of(str(tiny("llama")), PAIR, decoding=decoding)
    assembly = assemble(config, tiny("llama"))
    rows = [ask(f"r{at}", text) for at, text in enumerate(PROMPTS)]
    calm = {each.row_id: each for each in decode_rows(make_decoding_engine(assembly, start_hosts(assembly)), rows)}
    engine = make_decoding_engine(assembly, start_hosts(assembly))
    for row in rows:
        engine.admit(row)
    found, steps = {}, 0
    while not engine.is_idle:
        found |= {each.row_id: each for each in engine.step()}
        steps += 1
        if steps in (3, 9):
            engine.recover(start_hosts(assembly), HostError("gone"))
    assert found == calm


def test_variants_choose_among_the_same_answers_and_files_have_them(tiny, tmp_path):
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"id": p, "prompt": p}) + "\n" for p in PROMPTS))
    tree = {
        "input": {"path": str(tmp_path / "in.jsonl"), "id": "id"},
        "output": {"path": str(tmp_path / "run")},
        "base": str(tiny("llama")),
        "principals": PAIR,
        "decoding": {"unit": "answer", "proposals": 5, "max_new_tokens": 5},
        "grid": {"rules": ["base", "linear", "equilibrium"], "weights": {"step": 0.5}},
        "cluster": {"transport": "local", "slots": 3},
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(tree))
    relabel(load_config(tmp_path / "job.yaml"), tmp_path / "cache", io.StringIO())
    rows = [row for part in tmp_path.glob("run/part-*.parquet") for row in pq.read_table(part).to_pylist()]
    assert len(rows) == 3 * (2 * 3 + 1)
    for prompt in PROMPTS:
        menus = {
            json.dumps([(p["text"], p["count"]) for p in row["proposals"]]) for row in rows if row["row_id"] == prompt
        }
        assert len(menus) == 1


def test_an_answer_that_was_there_is_compared_with_the_chosen_one(tiny, tmp_path):
    config = config_of(str(tiny("llama")), PAIR, decoding={"unit": "answer", "proposals": 3, "max_new_tokens": 4})
    assembly = assemble(config, tiny("llama"))
    engine = make_decoding_engine(assembly, start_hosts(assembly))
    row = ask("r", "hello", response="yes")
    (record,) = decode_rows(engine, [row])
    assert record.original_response == "yes"
    assert record.original_rewards == pytest.approx(engine.score(row))
    assert {record.chosen, record.rejected} == {"yes", record.response}


def test_a_row_that_cannot_be_read_fails_alone(tiny):
    good, bad = answers(tiny, prompts=["hello", "x" * 5000])
    assert good.error is None
    assert bad.finish_reason == FinishReason.ERROR
    assert "context" in str(bad.error)


@pytest.mark.parametrize(
    ("decoding", "said"),
    [
        ({"proposals": 4}, "no effect with unit: token"),
        ({"block_tokens": 4}, "no effect with unit: token"),
        ({"unit": "answer", "block_tokens": 4}, "no effect with unit: answer"),
        ({"unit": "sentence"}, "unit"),
        ({"unit": "answer", "proposals": 1}, "proposals"),
        ({"unit": "block", "thinking": {"max_tokens": 3}}, "need unit: token"),
    ],
)
def test_options_without_effect_are_refused(tiny, decoding, said):
    with pytest.raises(ConfigurationError, match=said):
        Aligner(str(tiny("llama")), PAIR, **decoding)


LONG = {"long": {"kind": "judge", "judge": {"kind": "length"}, "scale": 0.5, "weight": 1.0}}


@pytest.mark.parametrize("unit", ["block", "answer"])
def test_any_judge_is_a_principal_of_blocks_and_answers(tiny, unit):
    options = {"unit": unit, "proposals": 6, "max_new_tokens": 6, "agent_temperature": 0.1, "temperature": 0.0}
    options |= {"block_tokens": 3} if unit == "block" else {}
    principals = {**PAIR, **LONG}
    with Aligner(str(tiny("llama")), principals, slots=4, **options) as aligner:
        for answer in aligner.generate(PROMPTS):
            num_words = len(words(answer.text))
            assert answer.error is None
            if unit == "answer":
                assert {each.rewards["long"] for each in answer.proposals} != {0.0}
            judged = sum(each.rewards["long"] for each in answer.proposals if each.is_chosen)
            assert answer.rewards["long"] == pytest.approx(judged)
            assert judged == pytest.approx(0.5 * num_words)
        (scored,) = aligner.score(["hello"], ["a b c d"])
        assert scored["long"] > 0


def num_vowels(answers):
    return [sum(each.text.count(vowel) for vowel in "aeiou") for each in answers]


def test_a_python_function_is_a_principal_as_one_that_a_file_holds(tiny, tmp_path):
    (tmp_path / "judges.py").write_text(inspect.getsource(num_vowels))
    options = {"unit": "answer", "proposals": 4, "max_new_tokens": 6, "agent_temperature": 0.1}
    found = []
    for function in (num_vowels, f"{tmp_path / 'judges.py'}:num_vowels"):
        of_function = {
            "vowels": {"kind": "judge", "judge": {"kind": "function", "function": function}, "weight": 1.0}
        }
        with Aligner(str(tiny("llama")), {**PAIR, **of_function}, slots=4, **options) as aligner:
            found.append([(each.text, each.rewards["vowels"], each.error) for each in aligner.generate(PROMPTS)])
    assert found[0] == found[1]
    assert all(reward == num_vowels([SimpleNamespace(text=text)])[0] for text, reward, _ in found[0])
    section = JudgePrincipal(kind="judge", judge={"kind": "function", "function": num_vowels})
    assert section.model_dump(mode="json")["judge"]["function"] == f"{__name__}:num_vowels"
    with pytest.raises(ConfigurationError, match=r"principals\.p\.judge.* not a valid JSON value"):
        Aligner("m", {"p": {"kind": "judge", "judge": {"kind": "function", "function": object()}}}, **options)


def test_a_judge_alone_makes_best_of_n(tiny):
    """With a small agent temperature and a greedy draw, the linear rule takes the proposal with the best score."""
    options = {"unit": "answer", "proposals": 8, "max_new_tokens": 8, "agent_temperature": 1e-4, "rule": "linear"}
    with Aligner(str(tiny("llama")), LONG, slots=8, temperature=0.0, **options) as aligner:
        for answer in aligner.generate(PROMPTS):
            best = max(each.rewards["long"] for each in answer.proposals)
            assert next(each.rewards["long"] for each in answer.proposals if each.is_chosen) == best


def test_a_judge_without_a_score_costs_the_proposal_and_not_the_run(tiny, monkeypatch):
    from pipeline.evaluation.judges import words

    monkeypatch.setattr(words.LengthJudge, "load", lambda self, context: words.PerAnswerJudge(_nan_for_some, 1.0))
    options = {"unit": "answer", "proposals": 8, "max_new_tokens": 5, "agent_temperature": 0.5}
    with Aligner(str(tiny("llama")), LONG, slots=4, **options) as aligner:
        found = aligner.generate(PROMPTS)
    assert all(
        each.error is None or "gives no score: its score is nan" in each.error or "gives no score: it" in each.error
        for each in found
    )
    seen = [proposal for each in found for proposal in each.proposals]
    kept = [proposal for proposal in seen if len(proposal.text) % 2]
    assert kept
    assert all(proposal.rewards["long"] is not None for proposal in kept)
    for proposal in seen:  # the others are there to see, and were no part of the game
        if proposal not in kept:
            assert (proposal.rewards["long"], proposal.probability, proposal.is_chosen) == (None, 0.0, False)


def test_proposals_without_a_score_are_null_in_the_files_and_counted(tiny, tmp_path):
    (tmp_path / "in.jsonl").write_text(
        json.dumps({"id": "a", "prompt": "hello", "c": ["good", "odd", "better"]}) + "\n"
    )
    code = tmp_path / "judges.py"
    code.write_text("def score(answers):\n    return [float('nan') if a.text == 'odd' else 1.0 for a in answers]\n")
    tree = {
        "input": {"path": str(tmp_path / "in.jsonl"), "id": "id", "candidates": "c"},
        "output": {"path": str(tmp_path / "run")},
        "base": str(tiny("llama")),
        "principals": {"it": {"kind": "judge", "judge": {"kind": "function", "function": f"{code}:score"}}},
        "decoding": {"unit": "answer"},
        "cluster": {"transport": "local", "slots": 2},
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(tree))
    out = io.StringIO()
    run, _ = relabel(load_config(tmp_path / "job.yaml"), tmp_path / "cache", out)
    (row,) = pq.read_table(next(iter(tmp_path.glob("run/part-*.parquet")))).to_pylist()
    assert {each["text"]: each["rewards"]["it"] for each in row["proposals"]} == {"good": 1, "better": 1, "odd": None}
    line = "principal it gave no score to 1 proposal: the games were without them"
    assert line in run.status().silent["it"]
    assert line in out.getvalue()


def _nan_for_some(answer):
    return 1.0 if len(answer.text) % 2 else float("nan")


@pytest.mark.parametrize(
    ("principal", "decoding", "said"),
    [
        (LONG["long"], {}, r"principals\.long: a judge values text and no tokens; choose decoding\.unit"),
        ({"kind": "judge", "judge": {"kind": "lenght"}}, {"unit": "answer"}, r"principals\.long\.judge"),
        ({"kind": "judge", "judge": {"kind": "length", "unit": "x"}}, {"unit": "answer"}, r"principals\.long\.judge"),
        (
            {"kind": "judge", "judge": {"kind": "principal", "principal": "brief"}},
            {"unit": "answer"},
            "a judge of kind principal cannot be a principal",
        ),
    ],
)
def test_judges_that_cannot_be_principals_are_refused(tiny, principal, decoding, said):
    with pytest.raises(ConfigurationError, match=said):
        Aligner(str(tiny("llama")), {**PAIR, "long": principal}, **decoding)


def test_a_run_with_a_judge_names_its_scores_in_the_fingerprint(tiny, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"id": "a", "prompt": "hello"}\n')
    tree = {
        "input": {"path": str(tmp_path / "in.jsonl"), "id": "id"},
        "output": {"path": str(tmp_path / "run")},
        "base": str(tiny("llama")),
        "principals": LONG,
        "decoding": {"unit": "answer", "proposals": 3, "max_new_tokens": 5},
        "cluster": {"transport": "local", "slots": 3},
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(tree))
    run, _ = relabel(load_config(tmp_path / "job.yaml"), tmp_path / "cache", io.StringIO())
    assert run.is_complete
    assert "models.principals.long.judge" in run.plan.fingerprint
    (row,) = pq.read_table(next(iter(tmp_path.glob("run/part-*.parquet")))).to_pylist()
    assert row["rewards"]["long"] == next(each["rewards"]["long"] for each in row["proposals"] if each["is_chosen"])


GIVEN = ["yes", "no", "it depends", "no"]


def test_answers_that_a_row_brings_are_what_its_game_is_about(tiny, tmp_path):
    weighted = [{"text": "yes", "weight": 3.0}, {"text": "no", "weight": 1.0}, {"text": "never", "weight": 0}]
    rows = [{"id": "a", "prompt": "hello", "c": GIVEN}, {"id": "b", "prompt": "hello", "c": json.dumps(weighted)}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = {
        "input": {"path": str(tmp_path / "in.jsonl"), "id": "id", "candidates": "c"},
        "output": {"path": str(tmp_path / "run")},
        "base": str(tiny("llama")),
        "principals": {**PAIR, **LONG},
        "decoding": {"unit": "answer", "max_new_tokens": 5, "agent_temperature": 0.5},
        "cluster": {"transport": "local", "slots": 3},
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(tree))
    relabel(load_config(tmp_path / "job.yaml"), tmp_path / "cache", io.StringIO())
    found = {row["row_id"]: row for row in pq.read_table(next(iter(tmp_path.glob("run/part-*.parquet")))).to_pylist()}
    menus = {row_id: {each["text"]: each for each in row["proposals"]} for row_id, row in found.items()}
    assert {text: each["count"] for text, each in menus["a"].items()} == {"yes": 1, "no": 2, "it depends": 1}
    assert set(menus["b"]) == {"yes", "no"}
    assert all(row["response"] in menus[row_id] for row_id, row in found.items())
    assert found["a"]["covered_mass"] is None
    with Aligner(str(tiny("llama")), PAIR, slots=2) as aligner:
        (scored,) = aligner.score(["hello"], ["it depends"])
    assert {name: menus["a"]["it depends"]["rewards"][name] for name in PAIR} == pytest.approx(scored)
    # three principals over a base of 3 to 1
    rewards = torch.tensor(
        [[[menus["b"][text]["rewards"][name] for text in ("yes", "no")] for name in (*PAIR, "long")]],
        dtype=torch.float64,
    )
    weights = torch.tensor([0.7, 0.4, 1.0], dtype=torch.float64)
    base = torch.tensor([[0.75, 0.25]], dtype=torch.float64).log()
    expected = cage.solve(cage.Game(base, weights[:, None] * rewards, 0.5)).policy[0].tolist()
    assert [menus["b"][text]["probability"] for text in ("yes", "no")] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("yes", "must be a list of answers; got the text 'yes'"),
        (None, "must be a list of answers; got None"),
        (["yes"], "from 2 to 1,024 different answers; got 1"),
        (["yes", "yes"], "from 2 to 1,024 different answers; got 2"),
        (["yes", ""], "a text that is not empty; got ''"),
        ([{"text": "a"}, {"answer": "b"}], "has text and weight; got"),
        ([{"text": "a", "weight": -1}, {"text": "b"}], "a weight must be a number from 0; got -1"),
        ([{"text": "a", "weight": 0}, {"text": "b", "weight": 0}], "all weights are 0"),
        ([{"text": "a", "weight": 1e308}, {"text": "b", "weight": 1e308}], "the weights have no finite sum"),
    ],
)
def test_candidates_that_cannot_be_read_cost_their_row_alone(value, said):
    from pipeline.errors import RowError
    from pipeline.inputs.answer_lists import read_candidates

    with pytest.raises(RowError, match=said):
        read_candidates(value, "c")


def test_a_candidate_that_does_not_fit_fails_its_row_and_makes_no_smaller_game(tiny):
    assembly = assemble(config_of(str(tiny("llama")), PAIR, decoding={"unit": "answer"}), NOWHERE)
    long = ask("long", "hello", candidates=(Candidate("yes", 1.0), Candidate("no" * 400, 1.0)))
    good = ask("good", "hello", candidates=(Candidate("yes", 1.0), Candidate("no", 1.0)))
    engine = make_decoding_engine(assembly, start_hosts(assembly))
    found = {each.row_id: each for each in decode_rows(engine, [long, good])}
    assert "its candidates cannot be used: a candidate has 801 tokens and the context holds" in found["long"].error
    assert found["good"].response in ("yes", "no")


def test_candidates_need_games_over_answers(tiny):
    with pytest.raises(ConfigurationError, match=r"input\.candidates needs unit: answer; got unit: token"):
        config_of(str(tiny("llama")), PAIR, input={"path": "x.jsonl", "candidates": "c"})
    with pytest.raises(ConfigurationError, match=r"decoding\.proposals: no effect with input\.candidates"):
        config_of(
            str(tiny("llama")), PAIR, input={"path": "x.jsonl", "candidates": "c"},
            decoding={"unit": "answer", "proposals": 3},
        )  # fmt: skip


def test_blocks_end_with_sentences(tiny, monkeypatch):
    """A tiny model writes no sentences: whatever its likeliest token ends with is made an end of one."""
    from pipeline.engine import row_state

    options = {"unit": "block", "proposals": 4, "max_new_tokens": 9, "block_tokens": 6, "agent_temperature": 0.5}
    free = answers(tiny, **options)
    char = next(each.text[0] for each in free if each.text)
    monkeypatch.setattr(row_state, "SENTENCE_ENDS", (char,))
    found = answers(tiny, block_end="sentence", **options)
    blocks = [each.text for answer in found for each in answer.proposals]
    assert any(block.endswith(char) for block in blocks)
    assert all(char not in block[:-1] or block.index(char) == len(block) - 1 for block in blocks if char in block)
    assert found == answers(tiny, block_end="sentence", slots=1, **options)


@pytest.mark.parametrize("unit", ["block", "answer"])
def test_proposals_can_be_drawn_by_games_over_tokens(tiny, unit):
    blocks = {"block_tokens": 3} if unit == "block" else {}
    by_base = answers(tiny, unit=unit, **blocks)
    by_game = answers(tiny, unit=unit, proposals_by="linear", **blocks)
    assert [each.proposals for each in by_base] != [each.proposals for each in by_game]
    for answer in by_game:
        for game in games_of(answer):
            expected = policy_of(game).log_policy.exp()[0].tolist()
            assert [each.probability for each in game] == pytest.approx(expected, abs=1e-12)
    # what steers the proposals leaves the base, too
    alone = answers(tiny, unit=unit, proposals_by="linear", rule="base", **blocks)
    assert all(each.kl_per_token > 0 for each in alone)
    assert by_game == answers(tiny, unit=unit, proposals_by="linear", slots=1, **blocks)


MINE = """
def judge(answers):
    if any("ice" in answer.prompt[-1]["content"] for answer in answers):
        raise ValueError("no ice")
    return [float(len(answer.text)) for answer in answers]
"""


def test_a_judge_that_fails_for_a_row_costs_that_row_alone(tiny, tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    section = {"kind": "function", "function": f"{tmp_path}/mine.py:judge"}
    good, bad, other = answers(tiny, principals={"mine": {"kind": "judge", "judge": section, "weight": 1.0}})
    assert good.error is None
    assert other.error is None
    assert "no ice" in str(bad.error)


def judged_by(monkeypatch, measure):
    """Have the judge `length` measure something else."""
    from pipeline.evaluation.judges import words

    monkeypatch.setattr(words.LengthJudge, "load", lambda self, context: words.PerAnswerJudge(measure, 1.0))


def test_an_existing_answer_without_a_score_makes_no_pair(tiny, monkeypatch):
    judged_by(monkeypatch, lambda answer: float("nan") if answer.text == "yes" else 1.0)
    principals = {**PAIR, **LONG}
    decoding = {"unit": "answer", "proposals": 3, "max_new_tokens": 4}
    config = config_of(str(tiny("llama")), principals, decoding=decoding)
    scorers = resolve_judge_principals(config, tiny("llama"))
    assembly = replace(assemble(config, tiny("llama")), scorers=scorers)
    engine = make_decoding_engine(assembly, start_hosts(assembly))
    (record,) = decode_rows(engine, [ask("r", "hello", response="yes")])
    assert (record.error, record.original_response) == (None, "yes")
    assert (record.chosen, record.rejected, record.original_rewards) == (None, None, None)


def test_judges_are_told_the_length_of_all_that_they_read(tiny, monkeypatch):
    seen = []

    def measure(answer):
        seen.append((answer.text, answer.num_tokens))
        return float(answer.num_tokens)

    judged_by(monkeypatch, measure)
    options = {"unit": "block", "block_tokens": 2, "proposals": 3, "max_new_tokens": 6, "agent_temperature": 0.5}
    with Aligner(str(tiny("llama")), LONG, slots=4, **options) as aligner:
        (answer,) = aligner.generate(["hello"])
        assert answer.rewards["long"] == pytest.approx(0.5 * answer.num_tokens)
        assert (answer.text, answer.num_tokens) in seen
        (scored,) = aligner.score(["hello"], ["a b c d"])
        assert scored["long"] > 1


def test_judges_read_the_tokens_of_several_blocks_together(tiny, monkeypatch):
    """Most tokenizers decode a token otherwise where it is the first: here tokens are numbers between bars."""
    from pipeline.engine import prompts

    monkeypatch.setattr(prompts.ChatPrompter, "decode", lambda self, ids: "|".join(str(each) for each in ids))
    seen = []

    def measure(answer):
        seen.append(answer.text)
        return 0.0

    judged_by(monkeypatch, measure)
    answers(tiny, unit="block", principals=LONG, prompts=["hello"], block_tokens=2, proposals=3)
    vocabulary = {part for text in seen if text.count("|") < 2 for part in text.split("|")}
    assert max(text.count("|") for text in seen) == 5
    assert all(len(part) <= 3 for text in seen for part in text.split("|")), vocabulary


def test_a_stop_string_may_span_blocks(tiny):
    options = {"unit": "block", "block_tokens": 16, "proposals": 2, "max_new_tokens": 40, "prompts": ["hello"]}
    (free,) = answers(tiny, **options)
    first = next(each.text for each in free.proposals if each.is_chosen)
    assert len(free.text) > len(first) > 0
    stop = free.text[len(first) - 1 : len(first) + 1]
    at = free.text.find(stop)
    assert at == len(first) - 1
    (found,) = answers(tiny, stop=[stop], **options)
    assert stop not in found.text
    assert found.finish_reason == FinishReason.STOP


def test_a_score_that_may_be_had_later_costs_the_row_and_not_a_proposal(tiny, monkeypatch):
    """Otherwise an answer would depend on whether an endpoint was busy when it was made."""
    from pipeline.evaluation.judges.interface import NoScore

    asked = count()
    judged_by(monkeypatch, lambda answer: NoScore("it is busy", is_final=False) if next(asked) % 2 else 1.0)
    found = answers(tiny, principals=LONG, proposals=8)
    assert all("it is busy" in str(each.error) for each in found)


def engine_that_lacks_memory(tiny, monkeypatch, *, times):
    """An engine whose hosts have no memory for scores so many times."""
    config = config_of(str(tiny("llama")), PAIR, decoding={"unit": "answer", "max_new_tokens": 4})
    assembly = assemble(config, tiny("llama"))
    engine = make_decoding_engine(assembly, start_hosts(assembly))
    calls, score, left = engine._engine.calls, engine._engine.calls.score, [times]

    def lacking(*args):
        left[0] -= 1
        if left[0] >= 0:
            raise HostOutOfMemory("no memory")
        return score(*args)

    monkeypatch.setattr(calls, "score", lacking)
    return engine


def test_scores_that_lack_memory_have_fewer_rows_beside_them(tiny, monkeypatch):
    rows = [ask(name, "hello", candidates=(Candidate("a", 1.0), Candidate("b", 1.0))) for name in "rs"]
    whole = list(decode_rows(engine_that_lacks_memory(tiny, monkeypatch, times=0), rows))
    engine = engine_that_lacks_memory(tiny, monkeypatch, times=1)
    before = engine.num_slots
    assert list(decode_rows(engine, rows)) == whole
    assert (engine.num_slots, engine.recoveries.memory_halved) == (before // 2, 1)
    found = list(decode_rows(engine_that_lacks_memory(tiny, monkeypatch, times=1 + before.bit_length() - 1), rows))
    assert ["no memory" in str(each.error) for each in found] == [True, False]
    assert found[1] == whole[1]


def test_proposals_that_kill_their_host_fail_their_row_and_no_other(tiny):
    config = config_of(str(tiny("llama")), PAIR, decoding={"unit": "answer", "proposals": 3, "max_new_tokens": 4})
    assembly = assemble(config, tiny("llama"))
    rows = [ask(f"r{at}", text) for at, text in enumerate(PROMPTS)]
    calm = {each.row_id: each for each in decode_rows(make_decoding_engine(assembly, start_hosts(assembly)), rows)}
    engine = make_decoding_engine(assembly, start_hosts(assembly))
    choices = engine._valuer.choices

    def fail(menu):
        if menu.prompt == rows[1].messages:
            raise HostError("gone")
        return choices(menu)

    engine._valuer.choices = fail
    for row in rows:
        engine.admit(row)
    found, failures = {}, 0
    while not engine.is_idle:
        try:
            found |= {each.row_id: each for each in engine.step()}
        except HostError as error:
            failures += 1
            engine.recover(start_hosts(assembly), error)
    assert failures == 3
    assert "its host failed whenever its proposals were scored" in str(found["r1"].error)
    assert {row_id: found[row_id] for row_id in ("r0", "r2")} == {row_id: calm[row_id] for row_id in ("r0", "r2")}
