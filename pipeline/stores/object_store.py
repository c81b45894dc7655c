"""An object store (S3, GCS) as a store, through fsspec."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

from pipeline.errors import StorageError
from pipeline.stores.addresses import NAME, check_name, file_system
from pipeline.stores.retries import http_status, retried

# Below twice this size an object is written by one request, which also checks the condition of `create`. In parts it
# would take several, and a killed writer would leave parts behind.
ONE_PUT_BYTES = 2 * 2**30


@dataclass(frozen=True, slots=True)
class ObjectStore:
    """A prefix in a bucket (see `Store` for what the methods promise).

    An object appears whole, by one PUT request, and is never renamed: a rename is a copy there. `create` is a PUT on
    the condition that there is no such object (If-None-Match). The client is made where it is used, so that a store
    can be sent to other processes.

    Args:
        scheme: of fsspec, "s3" or "gs".
        root: "bucket/folder".
    """

    scheme: str
    root: str

    @property
    def path(self) -> str:
        return f"{self.scheme}://{self.root}"

    def read(self, name: str) -> bytes | None:
        try:
            return retried(f"read {self.url(name)}", lambda: cast(bytes, self._files.cat_file(self._key(name))))
        except FileNotFoundError:
            return None

    def read_many(self, names: Sequence[str]) -> dict[str, bytes]:
        name_by_key = {self._key(name): name for name in names}
        if not name_by_key:
            return {}
        found = retried(f"read {len(names)} objects of {self.path}", lambda: self._cat(list(name_by_key)))
        return {name_by_key[key.strip("/")]: data for key, data in found.items()}

    def _cat(self, keys: Sequence[str]) -> dict[str, bytes]:
        """Return the bytes of those objects that exist. One that is missing must not cost the others."""
        found = self._files.cat(keys, on_error="return")
        for answer in found.values():
            if isinstance(answer, Exception) and not isinstance(answer, FileNotFoundError):
                raise answer
        return {str(key): answer for key, answer in found.items() if isinstance(answer, bytes)}

    def open(self, name: str) -> BinaryIO:
        try:
            return retried(f"read {self.url(name)}", lambda: cast(BinaryIO, self._files.open(self._key(name), "rb")))
        except FileNotFoundError:
            raise StorageError(f"{self.url(name)} does not exist") from None

    def create(self, name: str, data: bytes) -> bool:
        return retried(f"write {self.url(name)}", lambda: self._create_once(name, data))

    def _create_once(self, name: str, data: bytes) -> bool:
        try:
            self._files.pipe_file(self._key(name), data, mode="create", **self._one_put)
        except FileExistsError:
            return False
        except FileNotFoundError as error:
            raise StorageError(f"cannot write {self.url(name)}: {error}") from error
        except OSError as error:
            if 412 in (http_status(error), http_status(error.__cause__ or error)):  # a precondition: it exists
                return False
            raise
        return True

    def put(self, name: str, data: bytes) -> None:
        try:
            retried(f"write {self.url(name)}", lambda: self._files.pipe_file(self._key(name), data, **self._one_put))
        except FileNotFoundError as error:
            raise StorageError(f"cannot write {self.url(name)}: {error}") from error

    def remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            retried(f"remove {self.url(name)}", lambda: self._files.rm_file(self._key(name)))

    def sweep(self) -> None:
        """Nothing to do: an object appears whole or not at all."""

    def settle(self) -> None:
        """Nothing to do: what can be read stays."""

    def names(self, prefix: str = "") -> list[str]:
        folder, _, start = prefix.rpartition("/")
        under = f"{self.root}/{folder}".rstrip("/")
        prefixed = {"prefix": start} if start else {}
        try:
            keys = retried(f"list {self.scheme}://{under}", lambda: self._files.find(under, **prefixed))
        except FileNotFoundError:
            return []
        names = (str(key).strip("/").removeprefix(f"{self.root}/") for key in keys)
        return sorted(name for name in names if name.startswith(prefix) and NAME.fullmatch(name))

    def entries(self) -> list[str]:
        try:
            found = retried(f"list {self.path}", lambda: self._files.ls(self.root, detail=False))
        except FileNotFoundError:
            return []
        names = (str(key).strip("/").removeprefix(self.root).strip("/") for key in found)
        return sorted(name for name in names if name and not name.startswith("."))

    def url(self, name: str) -> str:
        return f"{self.path}/{check_name(name)}"

    def _key(self, name: str) -> str:
        return f"{self.root}/{check_name(name)}"

    @property
    def _files(self) -> Any:
        return file_system(self.scheme)

    @property
    def _one_put(self) -> dict[str, Any]:
        return {"chunksize": ONE_PUT_BYTES} if self.scheme in ("s3", "gs") else {}
