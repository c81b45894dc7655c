"""A good configuration, the places in it, and values of any kind to put there."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

GOOD: dict[str, Any] = {
    "input": {"path": "prompts.jsonl", "prompt": "question"},
    "output": {"path": "runs/one", "rows_per_shard": 8},
    "base": {"model": "smollm2-135m", "resources": {"num_cpus": 1}},
    "principals": {
        "brief": {"kind": "prompted", "principle": "be brief"},
        "arm": {"kind": "arm", "model": "folder", "reference": "none"},
        "pair": {"kind": "tuned_pair", "model": "tuned", "reference": "reference"},
        "judge": {"kind": "reward_model", "model": "judge", "interval": 4, "sign": -1},
    },
    "decoding": {"candidates": "all", "stop": ["\n"]},
    "cluster": {"replicas": 2},
    "errors": {"budget": "5%"},
}
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.dates()
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8) | st.integers(), inner, max_size=3)
    ),
    max_leaves=6,
)
PLACES: list[tuple[str, ...]] = (
    [(key,) for key in GOOD]
    + [(key, child) for key, section in GOOD.items() for child in [*section, "unknown"]]
    + [
        ("principals", name, key)
        for name in GOOD["principals"]
        for key in ("kind", "weight", "model", "template", "x")
    ]
)


def with_value(place: Sequence[str], value: Any) -> dict[str, Any]:
    """The good configuration with another value at a place."""
    tree = copy.deepcopy(GOOD)
    node = tree
    for key in place[:-1]:
        node = node[key]
    node[place[-1]] = value
    return tree
