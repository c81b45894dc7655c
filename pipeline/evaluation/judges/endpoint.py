"""Ask an OpenAI-compatible endpoint for scores: constrained, cached, within a budget, with bounded retries."""

from __future__ import annotations

import hashlib
import json
import re
import sqlite3
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import requests
from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_attempt

from pipeline.errors import CageError
from pipeline.evaluation.judges.interface import JudgedAnswer, NoScore

if TYPE_CHECKING:
    from pipeline.evaluation.judges.llm import EndpointConfig, LlmJudge

FILE = "judgements.sqlite"
REFUSED = (401, 403, 404)  # whatever is asked: the key, the address or the model's name is wrong
FOR_NOW = (408, 409, 425, 429)
LONGEST_WAIT_S = 30.0
MOST_BYTES = 1_000_000  # of a response
MAX_TOKENS = 32  # of a reply
MOST_DIGITS = 9  # of a number in a reply; Python reads no longer one than 4,300
NUMBER = re.compile(r"(?<![\d.])-?\d+(?![\d.]*\d)")


class EndpointJudge:
    """Scores answers by a chat model behind an endpoint.

    Args:
        name: of the judge, for messages.
        judge: its section.
        endpoint: where it asks.
        cache_folder: where replies are kept.
        key: the endpoint's key; None: none is sent.
        first_wait_s: before the second attempt; later ones wait twice as long each.
    """

    def __init__(
        self,
        name: str,
        judge: LlmJudge,
        endpoint: EndpointConfig,
        cache_folder: Path,
        key: str | None,
        *,
        first_wait_s: float = 0.5,
    ) -> None:
        self._name = name
        self._judge = judge
        self._endpoint = endpoint
        self._first_wait_s = first_wait_s
        self._left = endpoint.max_requests
        self._lock = threading.Lock()
        self._local = threading.local()
        self._key = key
        self._headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        self._replies = _Replies(cache_folder / FILE)

    def score(self, answers: Sequence[JudgedAnswer]) -> list[float]:
        """One score per answer; none where the endpoint gives no number, does not answer, or the budget is spent."""
        with ThreadPoolExecutor(self._endpoint.concurrency, thread_name_prefix=f"judge {self._name}") as pool:
            return list(pool.map(self._score, answers))

    def _score(self, answer: JudgedAnswer) -> float:
        body = self._body(answer)
        key = hashlib.sha256(json.dumps([self._endpoint.url, body], sort_keys=True).encode()).hexdigest()
        reply = self._replies.get(key)
        if reply is None:
            asked = self._ask(body)
            if isinstance(asked, NoScore):
                return asked
            self._replies.put(key, reply := asked)
        number = self._number(reply)
        return number if isinstance(number, NoScore) else number * self._judge.factor

    def _body(self, answer: JudgedAnswer) -> dict[str, Any]:
        scores = list(range(self._judge.low, self._judge.high + 1))
        schema = {
            "type": "object",
            "properties": {"score": {"type": "integer", "enum": scores}},
            "required": ["score"],
            "additionalProperties": False,
        }
        return {
            "model": self._endpoint.model,
            "messages": self._judge.messages(answer),
            "temperature": 0,
            "max_tokens": MAX_TOKENS,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "score", "schema": schema, "strict": True},
            },
        }

    def _ask(self, body: Mapping[str, Any]) -> str | NoScore:
        """The reply's text. Raises CageError where the endpoint refuses whatever is asked."""
        retrying = Retrying(
            stop=stop_after_attempt(self._endpoint.attempts),
            retry=retry_if_exception_type(_ForNow),
            wait=self._wait,
            reraise=True,
        )
        try:
            return retrying(self._ask_once, body)
        except _ForNow as error:
            return NoScore(f"{error}, {self._endpoint.attempts} times", is_final=False)
        except _BudgetSpent:
            return NoScore(
                f"the budget of {self._endpoint.max_requests:,} requests (max_requests) is spent", is_final=False
            )
        except _Declined as error:
            return NoScore(str(error))

    def _ask_once(self, body: Mapping[str, Any]) -> str:
        with self._lock:
            if self._left == 0:
                raise _BudgetSpent
            self._left = None if self._left is None else self._left - 1
        url = f"{self._endpoint.url.rstrip('/')}/chat/completions"
        try:
            response, text = self._post(url, body)
        except requests.Timeout:
            raise _ForNow(f"the endpoint did not answer within {self._endpoint.timeout_s:g} s") from None
        except requests.RequestException as error:
            raise _ForNow(f"the endpoint cannot be reached ({type(error).__name__})") from None
        status = response.status_code
        if status in REFUSED:
            raise CageError(
                f"judge {self._name}: {url} refuses with status {status}; check endpoint.url, endpoint.model and "
                f"endpoint.api_key_env: {self._line(text)}"
            )
        if status in FOR_NOW or status >= 500:
            raise _ForNow(
                f"the endpoint answered with status {status}", _seconds(response.headers.get("Retry-After"))
            )
        if status != 200:
            raise _Declined(f"the endpoint declined with status {status}: {self._line(text)}")
        try:
            content = json.loads(text)["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError, RecursionError):
            raise _Declined(f"the endpoint's answer is no chat completion: {self._line(text)}") from None
        return content if isinstance(content, str) else ""

    def _post(self, url: str, body: Mapping[str, Any]) -> tuple[requests.Response, str]:
        """The response and all of its text. Raises requests.Timeout where they are late, or never end."""
        timeout_s = self._endpoint.timeout_s
        ends_at = time.monotonic() + timeout_s
        with self._session.post(url, json=body, headers=self._headers, timeout=timeout_s, stream=True) as response:
            content = bytearray()
            # byte by byte: gateways send blanks while a model thinks, and a larger part would wait for many of them
            for part in response.iter_content(1):
                content += part
                if time.monotonic() > ends_at or len(content) > MOST_BYTES:
                    raise requests.Timeout
        return response, content.decode(errors="replace")

    def _number(self, reply: str) -> float:
        """The score in a reply: of a JSON object, or the only whole number in it."""
        found: Any
        try:
            value = json.loads(reply)
            found = value.get("score") if isinstance(value, dict) else value
        except (ValueError, RecursionError):
            numbers = NUMBER.findall(reply)
            found = int(numbers[0]) if len(numbers) == 1 and len(numbers[0]) <= MOST_DIGITS else None
        is_number = isinstance(found, int) and not isinstance(found, bool)
        if is_number and self._judge.low <= found <= self._judge.high:
            return float(found)
        return NoScore(f"the reply has no whole number from {self._judge.low} to {self._judge.high}")

    def _wait(self, state: RetryCallState) -> float:
        """Seconds before the next attempt: what the endpoint asks for, or twice as long each time."""
        error = state.outcome.exception() if state.outcome is not None else None
        asked = error.wait_s if isinstance(error, _ForNow) else None
        own = self._first_wait_s * 2 ** (state.attempt_number - 1)
        return min(LONGEST_WAIT_S, own if asked is None else asked)

    def _line(self, text: str) -> str:
        """The beginning of a response for messages, without the key: some servers repeat one that they refuse."""
        if self._key:
            text = text.replace(self._key, "(the key)")
        return " ".join(text.split())[:200] or "(nothing)"

    @property
    def _session(self) -> requests.Session:
        """The connections of this thread."""
        if not hasattr(self._local, "session"):
            self._local.session = requests.Session()
        session: requests.Session = self._local.session
        return session


class _ForNow(Exception):
    """The endpoint may answer later."""

    def __init__(self, reason: str, wait_s: float | None = None) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


class _Declined(Exception):
    """The endpoint gives no answer to this request."""


class _BudgetSpent(Exception):
    """No request may be sent any more."""


class _Replies:
    """Replies by the hash of what was asked, in a file that several threads and processes may share."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._lock = threading.Lock()
        with self._connected() as database:
            database.execute("CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, reply TEXT NOT NULL)")

    def get(self, key: str) -> str | None:
        """The reply to a request; None where it was never asked."""
        with self._lock, self._connected() as database:
            row = database.execute("SELECT reply FROM replies WHERE key = ?", (key,)).fetchone()
        return None if row is None else str(row[0])

    def put(self, key: str, reply: str) -> None:
        """Keep a reply; the first one stays."""
        with self._lock, self._connected() as database:
            database.execute("INSERT OR IGNORE INTO replies VALUES (?, ?)", (key, reply))

    def _connected(self) -> _Connection:
        return _Connection(self._path)


class _Connection:
    """One transaction, on a connection of its own: connections belong to threads."""

    def __init__(self, path: Path) -> None:
        self._database = sqlite3.connect(path, timeout=60)

    def __enter__(self) -> sqlite3.Connection:
        return self._database.__enter__()

    def __exit__(self, *error: Any) -> None:
        try:
            self._database.__exit__(*error)
        finally:
            self._database.close()


def _seconds(stated: str | None) -> float | None:
    """The number of a Retry-After header."""
    try:
        return None if stated is None else max(0.0, float(stated))
    except ValueError:
        return None
