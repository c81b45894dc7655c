"""Chat models as judges: of this machine against their own probabilities, and behind a small HTTP server."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from support import tiny_models
from transformers import AutoModelForCausalLM

from pipeline.errors import CageError, ConfigurationError
from pipeline.evaluation.judges.interface import JudgedAnswer
from pipeline.evaluation.judges.llm import conversation
from pipeline.evaluation.judges.table import AnyJudge
from pipeline.evaluation.panel import resolve_panel

JUDGES = TypeAdapter(AnyJudge)
QUESTION = ({"role": "user", "content": "Is it so?"},)
ANSWERS = [JudgedAnswer(QUESTION, text) for text in ("Yes.", "No, and here is why.", "")]
Reply = Callable[[dict[str, Any]], "tuple[int, str] | tuple[int, str, dict[str, str]]"]


@pytest.mark.parametrize("arguments", [{"of": "né"}, '{"of": "né"}'])  # in a replica, and as the output stores them
def test_calls_of_tools_are_part_of_the_conversation(arguments):
    call = {"type": "function", "function": {"name": "look_up", "arguments": arguments}}
    said = (
        *QUESTION,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "8", "tool_calls": None},
    )
    assert conversation(said) == 'user: Is it so?\n\nassistant: look_up({"of": "né"})\n\ntool: 8'


def completion(content: str) -> tuple[int, str]:
    return 200, json.dumps({"choices": [{"message": {"role": "assistant", "content": content}}]})


@contextmanager
def server(reply: Reply) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """An endpoint on this machine; its address up to /v1, and the requests that it gets."""
    asked: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append({"path": self.path, "key": self.headers.get("Authorization"), **body})
            status, text, *headers = reply(body)
            self.send_response(status)
            for key, value in (headers[0] if headers else {}).items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            for at in range(50 if "drips" in self.path else 0):  # blanks, as gateways send them while a model thinks
                with suppress(OSError):
                    self.wfile.write(b" ")
                time.sleep(0.1 if at else 0)
            with suppress(OSError):
                self.wfile.write(text.encode())

        def log_message(self, *args: object) -> None:
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running.daemon_threads = True
    threading.Thread(target=running.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{running.server_port}/v1", asked
    finally:
        running.shutdown()
        running.server_close()


def section(url: str, endpoint: dict[str, Any] | None = None, **fields: Any) -> Any:
    return JUDGES.validate_python(
        {
            "kind": "llm",
            "rubric": "Is it kind?",
            "endpoint": {"url": url, "model": "m", "attempts": 2, **(endpoint or {})},
            **fields,
        }
    )


def seat(tmp_path, config):
    seated = resolve_panel({"kind": config}, tmp_path).load()["kind"]
    seated._first_wait_s = 0.01
    return seated


def by_length(body: dict[str, Any]) -> tuple[int, str]:
    answer = body["messages"][-1]["content"].partition("The answer to judge:\n")[2]
    return completion(json.dumps({"score": 5 if answer.startswith("Yes") else 2}))


def test_an_endpoint_is_asked_with_a_schema_and_its_replies_are_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("A_KEY", "secret")
    with server(by_length) as (url, asked):
        config = section(url, {"api_key_env": "A_KEY"}, scale=0.5, sign="lower")
        assert seat(tmp_path, config).score(ANSWERS) == [-2.5, -1.0, -1.0]
        assert len(asked) == 3
        first = asked[0]
        assert (first["path"], first["key"], first["model"], first["temperature"]) == (
            "/v1/chat/completions", "Bearer secret", "m", 0,
        )  # fmt: skip
        schema = first["response_format"]["json_schema"]["schema"]
        assert schema["properties"]["score"]["enum"] == [1, 2, 3, 4, 5]
        assert "Is it kind?" in first["messages"][1]["content"]
        assert "user: Is it so?" in first["messages"][1]["content"]
        # the same answers again, by a judge that was loaded anew: nothing is asked
        assert seat(tmp_path, config).score(ANSWERS[::-1]) == [-1.0, -1.0, -2.5]
        assert len(asked) == 3
        seat(tmp_path, section(url, rubric="Is it rude?")).score(ANSWERS[:1])
        assert len(asked) == 4
    assert b"secret" not in (tmp_path / "judgements.sqlite").read_bytes()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"score": 4}', 4.0),
        ("3", 3.0),
        ("Score: 2.", 2.0),
        ('{"score": 4.5}', None),
        ('{"score": true}', None),
        ('{"score": 9}', None),
        ('{"other": 4}', None),
        ("4 or 5", None),
        ("four", None),
        ("4.5", None),
        ("", None),
        ("[1]", None),
        pytest.param("9" * 5000, None, id="more digits than Python reads"),
        pytest.param("[" * 20_000, None, id="deep"),
    ],
)
def test_a_reply_without_one_allowed_number_is_no_score(tmp_path, content, expected):
    with server(lambda body: completion(content)) as (url, _):
        [found] = seat(tmp_path, section(url)).score(ANSWERS[:1])
    if expected is None:
        assert math.isnan(found)
        assert found.reason == "the reply has no whole number from 1 to 5"
    else:
        assert found == expected


def test_what_fails_for_now_is_asked_again_and_what_is_declined_is_not(tmp_path):
    statuses = iter([503, 429, 200])

    def flaky(body):
        status = next(statuses)
        return (status, "busy", {"Retry-After": "0"}) if status != 200 else completion("3")

    with server(flaky) as (url, asked):
        assert seat(tmp_path, section(url, {"attempts": 3})).score(ANSWERS[:1]) == [3.0]
        assert len(asked) == 3
    with server(lambda body: (500, "broken")) as (url, asked):
        [found] = seat(tmp_path, section(url)).score(ANSWERS[:1])
        assert (found.reason, found.is_final) == ("the endpoint answered with status 500, 2 times", False)
        assert len(asked) == 2
    with server(lambda body: (400, "too long")) as (url, asked):
        [found] = seat(tmp_path, section(url)).score(ANSWERS[:1])
        assert (found.reason, found.is_final) == ("the endpoint declined with status 400: too long", True)
        assert len(asked) == 1
    with server(lambda body: (200, "{}")) as (url, _):
        [found] = seat(tmp_path, section(url)).score(ANSWERS[:1])
        assert found.reason.startswith("the endpoint's answer is no chat completion")
    with (
        server(lambda body: (401, "no such key")) as (url, asked),
        pytest.raises(CageError, match=r"status 401.*no such"),
    ):
        seat(tmp_path, section(url)).score(ANSWERS[:1])
    [found] = seat(tmp_path, section("http://127.0.0.1:9/v1")).score(ANSWERS[:1])
    assert found.reason.startswith("the endpoint cannot be reached")


@pytest.mark.parametrize("status", [401, 400])
def test_a_key_that_an_endpoint_repeats_is_in_no_message(tmp_path, monkeypatch, status):
    monkeypatch.setenv("A_KEY", "sk-hush-hush")
    with server(lambda body: (status, "bad key sk-hush-hush, sorry")) as (url, _):
        judge = seat(tmp_path, section(url, {"api_key_env": "A_KEY"}))
        try:
            said = judge.score(ANSWERS[:1])[0].reason
        except CageError as error:
            said = str(error)
    assert "bad key (the key), sorry" in said
    assert "hush" not in said


def test_a_slow_endpoint_and_a_spent_budget_cost_their_own_answers(tmp_path):
    def slow(body):
        if "Yes." in body["messages"][-1]["content"]:
            time.sleep(0.6)
        return completion("3")

    with server(slow) as (url, _):
        found = seat(tmp_path, section(url, {"timeout_s": 0.2})).score(ANSWERS)
    assert found[0].reason == "the endpoint did not answer within 0.2 s, 2 times"
    assert found[1:] == [3.0, 3.0]
    with server(lambda body: completion("5" if "Yes." in body["messages"][-1]["content"] else "3")) as (url, _):
        dripping = section(url.replace("/v1", "/drips/v1"), {"timeout_s": 0.2})
        found = seat(tmp_path, dripping).score(ANSWERS[:1])
    assert found[0].reason == "the endpoint did not answer within 0.2 s, 2 times"
    with server(by_length) as (url, asked):
        found = seat(tmp_path, section(url, {"max_requests": 2, "concurrency": 1})).score(ANSWERS)
        assert len(asked) == 2
        assert "the budget of 2 requests" in found[2].reason
        again = seat(tmp_path, section(url, {"max_requests": 2, "concurrency": 1})).score(ANSWERS)
        assert again == [5.0, 2.0, 2.0]
        assert len(asked) == 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rubric": "r"}, "needs a model or an endpoint"),
        ({"rubric": "r", "model": "m", "endpoint": {"url": "http://x", "model": "m"}}, "and not both"),
        ({"rubric": "r", "model": "m", "low": 5, "high": 5}, "low must be below high"),
        ({"rubric": "r", "endpoint": {"url": "ftp://x", "model": "m"}}, "url"),
        ({"rubric": "r", "endpoint": {"url": "http://x", "model": "m"}, "reads": "likeliest"}, "has no effect"),
        ({"rubric": "", "model": "m"}, "rubric"),
    ],
)
def test_what_cannot_work_is_refused(fields, message):
    with pytest.raises(ValidationError, match=message):
        JUDGES.validate_python({"kind": "llm", **fields})


def test_a_key_that_is_not_there_is_refused_before_anything_is_decoded(tmp_path, monkeypatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(ConfigurationError, match="the environment has no NO_SUCH_KEY"):
        resolve_panel({"kind": section("http://x/v1", {"api_key_env": "NO_SUCH_KEY"})}, tmp_path)


def test_how_an_endpoint_is_asked_changes_no_identity(tmp_path):
    digests = {
        resolve_panel({"kind": section("http://x/v1", endpoint, **fields)}, tmp_path).digest
        for endpoint, fields in [
            ({}, {}),
            ({"timeout_s": 3, "attempts": 9, "concurrency": 2, "max_requests": 7}, {}),
            ({}, {"high": 7}),
        ]
    }
    assert len(digests) == 2


@pytest.mark.parametrize("high", [5, 12])
@pytest.mark.parametrize("reads", ["mean", "likeliest"])
def test_a_model_of_this_machine_scores_by_its_probabilities_of_the_numbers(tmp_path, high, reads):
    folder = tiny_models.make_model(tmp_path / "chat", seed=4, scale=3.0)
    config = JUDGES.validate_python(
        {"kind": "llm", "rubric": "r", "model": str(folder), "high": high, "reads": reads, "scale": 2.0}
    )
    seated = resolve_panel({"kind": config}, tmp_path).load()["kind"]
    model = AutoModelForCausalLM.from_pretrained(folder).eval()

    @torch.no_grad()
    def following(ids):
        return model(torch.tensor([ids])).logits[0, -1].double().softmax(-1)

    for answer in ANSWERS:
        text = seated.tokenizer.apply_chat_template(
            config.messages(answer), tokenize=False, add_generation_prompt=True
        )
        ids = seated.tokenizer(text, add_special_tokens=False)["input_ids"]
        digit = {str(d): seated.tokenizer(str(d), add_special_tokens=False)["input_ids"][0] for d in range(10)}
        weights = []
        for number in range(1, high + 1):
            first, *rest = str(number)
            weight = following(ids)[digit[first]]
            if rest:
                weight = weight * following([*ids, digit[first]])[digit[rest[0]]]
            elif number == 1 and high >= 10:  # 1 is not the beginning of 10, 11 or 12
                longer = [digit[str(each)[1]] for each in range(10, high + 1)]
                weight = weight * (1 - following([*ids, digit[first]])[longer].sum())
            weights.append(float(weight))
        mean = sum(weight * number for number, weight in enumerate(weights, 1)) / sum(weights)
        likeliest = 1 + max(range(high), key=weights.__getitem__)
        expected = 2 * (mean if reads == "mean" else likeliest)
        assert seated.score([answer]) == pytest.approx([expected], abs=1e-4)


def test_special_tokens_that_an_answer_spells_end_no_turn_of_what_a_model_of_this_machine_judges(tmp_path):
    folder = tiny_models.make_model(tmp_path / "chat", seed=4)
    config = JUDGES.validate_python({"kind": "llm", "rubric": "r", "model": str(folder)})
    seated = resolve_panel({"kind": config}, tmp_path).load()["kind"]
    read = []
    seated.model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["input_ids"][0].tolist()), with_kwargs=True
    )
    special = seated.tokenizer.all_special_tokens[0]
    scores = seated.score([JudgedAnswer(QUESTION, text) for text in (f"No.{special}", "No.")])
    spelled, plain = (sum(ids.count(each) for each in seated.tokenizer.all_special_ids) for ids in read)
    assert spelled == plain
    assert len(read[0]) > len(read[1])
    assert all(1 <= score <= 5 for score in scores)


def test_a_model_without_a_chat_template_is_no_judge_and_a_long_text_no_score(tmp_path):
    silent = tiny_models.make_tokenizer(chat_template=None)
    folder = tiny_models.make_model(tmp_path / "silent", tokenizer=silent)
    config = JUDGES.validate_python({"kind": "llm", "rubric": "r", "model": str(folder)})
    with pytest.raises(ConfigurationError, match="has no chat template; it is no chat model"):
        resolve_panel({"kind": config}, tmp_path).load()
    folder = tiny_models.make_model(tmp_path / "short", context=300)
    config = JUDGES.validate_python({"kind": "llm", "rubric": "r", "model": str(folder)})
    seated = resolve_panel({"kind": config}, tmp_path).load()["kind"]
    [found] = seated.score([JudgedAnswer(QUESTION, "x" * 300)])
    assert "too many" in found.reason
