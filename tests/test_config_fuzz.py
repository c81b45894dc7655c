"""Whatever a configuration holds, it is a configuration or one refusal: never another error, never a raw control
character."""

from __future__ import annotations

import copy

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.config_values import GOOD, PLACES, VALUES, with_value

from pipeline.config.files import dump_config, load_config, parse_config
from pipeline.config.sections import Config
from pipeline.errors import ConfigurationError

FAST = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def is_read_or_refused(read) -> None:
    try:
        config = read()
    except ConfigurationError as refusal:
        text = str(refusal)
        assert text
        assert "Traceback" not in text
        assert all(char.isprintable() or char == "\n" for char in text), repr(text)
        assert all(len(line) < 1000 for line in text.splitlines())
    else:
        assert isinstance(config, Config)
        assert parse_config(yaml.safe_load(dump_config(config))) == config


@FAST
@given(place=st.sampled_from(PLACES), value=VALUES)
def test_any_value_at_any_place_is_read_or_refused(place, value):
    is_read_or_refused(lambda: parse_config(with_value(place, value)))


@FAST
@given(data=st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_any_bytes_are_read_or_refused(tmp_path, data):
    path = tmp_path / "job.yaml"
    path.write_bytes(data)
    is_read_or_refused(lambda: load_config(path))


@FAST
@given(
    overrides=st.lists(
        st.tuples(
            st.sampled_from([".".join(place) for place in PLACES]) | st.text(max_size=10), st.text(max_size=15)
        ).map("=".join),
        max_size=3,
    )
)
def test_any_override_is_applied_or_refused(overrides):
    is_read_or_refused(lambda: parse_config(copy.deepcopy(GOOD), overrides))


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system ['true']",
        "input: !!python/name:os.system",
        "[" * 5000,
        "a: &a [*a]",
        "&a {input: *a}",
        "? {a: 1}\n: 2",
        "2024-01-01: 1",
        "input: {path: x}\noutput: {path: y}\n1: 2",
        "\x00",
        "key: \x1b[31m",
        "input: {path: x}\noutput: {path: y}\nerrors: {budget: null}",
        "input: {path: x}\noutput: {path: y}\nerrors: {budget: .inf}",
        f"input: {{path: x}}\noutput: {{path: y}}\nerrors: {{budget: {10**400}}}",
    ],
)
def test_hostile_yaml_is_refused(tmp_path, text):
    path = tmp_path / "job.yaml"
    path.write_text(text)
    with pytest.raises(ConfigurationError):
        load_config(path)
    is_read_or_refused(lambda: load_config(path))


@pytest.mark.parametrize("data", [b"*\xed\x9e\xa4", b"2001-13-45", b"a: 2001-13-45", b"x\x1b[31m", b"[1, 2"])
def test_bytes_that_were_once_mishandled(tmp_path, data):
    path = tmp_path / "job.yaml"
    path.write_bytes(data)
    is_read_or_refused(lambda: load_config(path))
