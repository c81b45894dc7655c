"""Fixtures that several test files share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hypothesis
import pytest
import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels on a CPU; settled when triton is imported
# the same examples at every run; look for new ones with --hypothesis-profile=default
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Make (once) a random tiny model: tiny("llama", seed=1) is its folder."""
    import tiny_models

    made: dict[tuple[str, int, int], Path] = {}

    def make(kind: str = "llama", *, seed: int = 0, context: int = 512) -> Path:
        key = (kind, seed, context)
        if key not in made:
            made[key] = tiny_models.make_model(
                tmp_path_factory.mktemp(f"{kind}{seed}"), kind, seed=seed, context=context
            )
        return made[key]

    return make


@pytest.fixture(scope="session")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Make (once) a random reward model: judge("llama", seed=5) is its folder; `pairs` gives it tokens of its own."""
    import tiny_models

    made: dict[tuple[object, ...], Path] = {}

    def make(kind: str = "llama", *, seed: int = 5, pairs: bool = False, **options: int | None) -> Path:
        key = (kind, seed, pairs, *sorted(options.items()))
        if key not in made:
            tokenizer = tiny_models.make_pair_tokenizer() if pairs else None
            folder = tmp_path_factory.mktemp("judge")
            made[key] = tiny_models.make_reward_model(folder, kind, seed=seed, tokenizer=tokenizer, **options)
        return made[key]

    return make


@pytest.fixture(scope="session")
def cache_folder() -> Path:
    """Where the embedded model is kept, as for a user."""
    from pipeline.models.embedded import default_cache_folder

    return default_cache_folder(os.environ)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One local cluster for all tests; its CPUs are book-keeping, so there may be more than the machine has."""
    import ray

    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where two processes share the tests, those of Ray stay in one of them, around one cluster. They come first,
    as they are the longest part, and mostly waiting."""
    for item in items:
        if item.get_closest_marker("ray"):
            item.add_marker(pytest.mark.xdist_group("ray"))
    items.sort(key=lambda item: item.get_closest_marker("ray") is None)
