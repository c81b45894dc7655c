"""Model folders in object stores, read and fetched through fsspec."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from pipeline.errors import ConfigurationError
from pipeline.hub.weight_files import Span

LOCK_TIMEOUT_S = 6 * 3600  # another process of this machine may be fetching the same large model
NEEDS = {"gs": "gcsfs", "gcs": "gcsfs", "s3": "s3fs", "s3a": "s3fs"}


@dataclass(frozen=True, slots=True)
class RemoteTree:
    """A folder behind an address such as s3://bucket/model, as it was when it was listed."""

    address: str
    store: Any
    root: str
    sizes: Mapping[str, int]
    etags: Mapping[str, str]

    def read(self, spans: Sequence[Span]) -> list[bytes]:
        paths = [f"{self.root}/{name}" for name, _, _ in spans]
        starts, stops = [span[1] for span in spans], [span[2] for span in spans]
        try:
            return [bytes(block) for block in self.store.cat_ranges(paths, starts, stops, on_error="raise")]
        except Exception as error:  # every store has errors of its own
            raise ConfigurationError(f"{self.address} cannot be read: {_one_line(error)}") from error

    def cache_folder(self, cache: Path, names: Iterable[str]) -> Path:
        """Where the files are kept on a machine: a folder that other content never shares."""
        listing = "\n".join(f"{name} {self.sizes[name]} {self.etags[name]}" for name in sorted(names))
        key = hashlib.sha256(f"{self.address}\n{listing}".encode()).hexdigest()[:16]
        return cache / "remote" / f"{self.root.rsplit('/', 1)[-1]}-{key}"


def list_remote(address: str) -> RemoteTree:
    """List a remote folder.

    Raises:
        ConfigurationError: the store's package is missing, access is refused, or nothing is there.
    """
    import fsspec  # only a run with a remote model needs it

    address = address.rstrip("/")
    scheme = address.partition("://")[0]
    try:
        store, root = fsspec.core.url_to_fs(address)
        store.invalidate_cache()
        infos = [info for info in store.ls(root, detail=True) if info["type"] == "file"]
    except ImportError:
        package = NEEDS.get(scheme, f"an fsspec package for {scheme}")
        raise ConfigurationError(f"{address}: reading {scheme}:// needs {package}; install it") from None
    except FileNotFoundError:
        infos = []
    except Exception as error:  # every store has errors of its own
        raise ConfigurationError(f"{address} cannot be listed: {_one_line(error)}") from error
    if not infos:
        raise ConfigurationError(f"{address} holds no files")
    by_name = {info["name"].rsplit("/", 1)[-1]: info for info in infos}
    return RemoteTree(
        address=address,
        store=store,
        root=root.rstrip("/"),
        sizes={name: int(info["size"]) for name, info in by_name.items()},
        etags={name: _etag(info) for name, info in by_name.items()},
    )


def fetch(
    tree: RemoteTree, names: Sequence[str], folder: Path, *, progress: Callable[[str], None] = lambda line: None
) -> Path:
    """Bring the files into `folder`, each whole or not at all; those that are there are not fetched again.

    Raises:
        ConfigurationError: the disk is full, access is refused, or a file changed meanwhile.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_name(folder.name + ".lock"))
    try:
        with lock.acquire(timeout=LOCK_TIMEOUT_S):
            missing = [name for name in names if not _is_whole(folder / name, tree.sizes[name])]
            _check_free_space(folder, sum(tree.sizes[name] for name in missing))
            for name in missing:
                progress(f"{tree.address}: fetching {name} ({tree.sizes[name] / 1e6:,.1f} MB)")
                _fetch_file(tree, name, folder)
    except Timeout:
        raise ConfigurationError(f"{lock.lock_file} has been held for over {LOCK_TIMEOUT_S} s") from None
    return folder


def _fetch_file(tree: RemoteTree, name: str, folder: Path) -> None:
    partial = folder / f"{name}.partial"
    try:
        tree.store.get_file(f"{tree.root}/{name}", str(partial))
    except Exception as error:  # every store has errors of its own
        partial.unlink(missing_ok=True)
        raise ConfigurationError(f"{tree.address}/{name} cannot be fetched: {_one_line(error)}") from error
    if not _is_whole(partial, tree.sizes[name]):
        partial.unlink(missing_ok=True)
        raise ConfigurationError(f"{tree.address}/{name} changed while it was fetched; run again")
    partial.replace(folder / name)


def _is_whole(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _check_free_space(folder: Path, num_bytes: int) -> None:
    if (free := shutil.disk_usage(folder).free) < num_bytes:
        raise ConfigurationError(
            f"{folder} has {free / 1e9:.1f} GB left, the model takes {num_bytes / 1e9:.1f} GB; "
            f"CAGE_CACHE names another place"
        )


def _etag(info: Mapping[str, Any]) -> str:
    for key in ("ETag", "etag", "md5Hash", "mtime", "LastModified", "created"):
        if info.get(key):
            return str(info[key])
    return ""


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:400]
