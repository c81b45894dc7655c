"""Fixtures that several test files share."""

from __future__ import annotations

import functools
import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# as long as a busy machine takes
os.environ.setdefault("RAY_raylet_start_wait_time_s", "300")
os.environ.setdefault("RAY_agent_register_timeout_ms", "300000")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hypothesis
import pytest
import torch

from pipeline.worker.cpu_kernels import choose_reproducible_kernels

choose_reproducible_kernels()
torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels on a CPU; settled when triton is imported
# the same examples at every run; look for new ones with --hypothesis-profile=default
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Nothing of what the imports make can be let go meanwhile."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


def pytest_collection_finish() -> None:
    """What the imports made lives on: the garbage collector need not visit it during every test."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Make (once) a random tiny model: tiny("llama", seed=1) is its folder."""
    from support import tiny_models

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
    from support import tiny_models

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
    from pipeline.hub.embedded import default_cache_folder

    return default_cache_folder(os.environ)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One local cluster for all tests; its CPUs are book-keeping, so there may be more than the machine has."""
    import ray

    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with tests of Ray come first: where two processes share the tests they are the longest part."""
    items.sort(key=lambda item: not _uses_ray(item.path))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Where two processes share the tests, a file's stay together, and all of Ray's, around one cluster."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "ray" if _uses_ray(config.rootpath / file) else file

    return ByFile(config, log)


@functools.cache
def _uses_ray(path: Path) -> bool:
    return "pytest.mark.ray" in path.read_text(encoding="utf-8")
