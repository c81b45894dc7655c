"""Models of the Hugging Face hub, in huggingface_hub's own cache, at a fixed commit."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from pipeline.errors import ConfigurationError
from pipeline.hub.weight_files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CONFIG,
    INDEX,
    SMALL,
    VALUE_HEAD,
    WEIGHTS,
    LocalTree,
    find_model_files,
    index_parts,
    refuse_adapter_beside,
    take_inventory,
)


def resolve_on_hub(name: str, revision: str | None, *, with_code: bool) -> tuple[Path, str, Mapping[str, int]]:
    """Fetch configuration and tokenizer; give their folder, the commit, and the parameters by stored dtype.

    Works offline for a model whose files are in the hub's cache.

    Raises:
        ConfigurationError: the hub does not answer, refuses, or has no such model with safetensors weights.
    """
    folder = _snapshot(name, revision, _small_patterns(with_code))
    if not (folder / CONFIG).is_file():
        raise ConfigurationError(f"hub model {name} has no {CONFIG}, so it is no model; is it an adapter?")
    tree = LocalTree(folder)
    refuse_adapter_beside(f"hub model {name}", tree.sizes)
    names = _weight_names(folder)
    if all(name in tree.sizes for name in names):
        files = find_model_files(tree, with_code=with_code)
        return folder, folder.name, take_inventory(tree, files).num_parameters_by_dtype
    return folder, folder.name, _count_on_hub(name, folder.name)


def fetch_hub_model(name: str, commit: str | None, *, with_code: bool) -> Path:
    """Fetch all of a model whose small files are there already."""
    small = _snapshot(name, commit, _small_patterns(with_code))
    return _snapshot(name, commit, [*_small_patterns(with_code), *_weight_names(small), VALUE_HEAD])


def fetch_hub_adapter(name: str, revision: str | None) -> tuple[Path, str]:
    """Fetch a PEFT adapter; give its folder and commit."""
    folder = _snapshot(name, revision, [ADAPTER_CONFIG, ADAPTER_WEIGHTS, VALUE_HEAD])
    return folder, folder.name


def _small_patterns(with_code: bool) -> list[str]:
    return [f"*{suffix}" for suffix in ((*SMALL, ".py") if with_code else SMALL)]


def _weight_names(folder: Path) -> tuple[str, ...]:
    if not (folder / INDEX).is_file():
        return (WEIGHTS,)
    return index_parts(json.loads((folder / INDEX).read_text(encoding="utf-8")), INDEX)


def _snapshot(name: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    with _as_configuration_error(name, revision), _no_bars():
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))


def _count_on_hub(name: str, commit: str) -> Mapping[str, int]:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import NotASafetensorsRepoError

    try:
        with _as_configuration_error(name, commit):
            counts = HfApi().get_safetensors_metadata(name, revision=commit).parameter_count
    except NotASafetensorsRepoError:
        raise ConfigurationError(
            f"hub model {name} has no safetensors weights; pickled ones are refused, as they can run code when read. "
            f"Download it (`hf download {name} --local-dir FOLDER`), run `cage convert FOLDER` and name that folder"
        ) from None
    return {str(dtype): count for dtype, count in counts.items()}


@contextmanager
def _as_configuration_error(name: str, revision: str | None) -> Iterator[None]:
    from huggingface_hub.errors import GatedRepoError, NotASafetensorsRepoError, RevisionNotFoundError

    try:
        yield
    except NotASafetensorsRepoError:
        raise
    except RevisionNotFoundError:
        raise ConfigurationError(f"hub model {name} has no revision {revision}") from None
    except GatedRepoError:
        raise ConfigurationError(
            f"hub model {name} asks for its terms to be accepted: do so on its page, then set HF_TOKEN"
        ) from None
    except (OSError, ValueError) as error:  # not found, no network, no access: all of the hub's errors
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ConfigurationError(
            f"{name} is neither a folder here ({Path(name).absolute()}) nor can it be had as a hub model ({reason}). "
            f"Without a network, give a local folder"
        ) from error


@contextmanager
def _no_bars() -> Iterator[None]:
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()
