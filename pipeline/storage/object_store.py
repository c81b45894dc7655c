"""An object store (S3, GCS) as a store, through fsspec."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

from pipeline.errors import StorageError
from pipeline.storage.addresses import NAME, check_name, file_system, told_as_storage_error

ONE_PUT_BYTES = 2 * 2**30  # below twice this an object is written by one request


@dataclass(frozen=True, slots=True)
class ObjectStore:
    """A prefix in a bucket. An object appears whole, by one PUT; nothing is ever renamed.

    `root` is "bucket/folder". The client is made where it is used, so that a store travels to other processes.
    """

    scheme: str
    root: str

    @property
    def path(self) -> str:
        return f"{self.scheme}://{self.root}"

    def read(self, name: str) -> bytes | None:
        with told_as_storage_error(f"read {self.url(name)}"):
            try:
                return cast(bytes, self._files.cat_file(self._key(name)))
            except FileNotFoundError:
                return None

    def read_many(self, names: Sequence[str]) -> dict[str, bytes]:
        name_by_key = {self._key(name): name for name in names}
        if not name_by_key:
            return {}
        with told_as_storage_error(f"read {len(names)} objects of {self.path}"):
            found = self._files.cat(list(name_by_key), on_error="return")
            for answer in found.values():
                if isinstance(answer, Exception) and not isinstance(answer, FileNotFoundError):
                    raise answer
        return {name_by_key[str(key).strip("/")]: data for key, data in found.items() if isinstance(data, bytes)}

    def open(self, name: str) -> BinaryIO:
        with told_as_storage_error(f"read {self.url(name)}"):
            try:
                return cast(BinaryIO, self._files.open(self._key(name), "rb"))
            except FileNotFoundError:
                raise StorageError(f"{self.url(name)} does not exist") from None

    def create(self, name: str, data: bytes) -> bool:
        for wait_s in (0.1, 0.5, 2.0, None):
            try:
                return self._create_once(name, data)
            except _Conflict:
                if wait_s is None:
                    raise StorageError(f"cannot write {self.url(name)}: it is being written elsewhere") from None
                time.sleep(wait_s * random.uniform(0.5, 1.5))
        raise AssertionError("unreachable")

    def _create_once(self, name: str, data: bytes) -> bool:
        with told_as_storage_error(f"write {self.url(name)}"):
            try:
                self._files.pipe_file(self._key(name), data, mode="create", **self._one_put)
            except FileExistsError:
                return False
            except FileNotFoundError as error:
                raise StorageError(f"cannot write {self.url(name)}: {error}") from error
            except OSError as error:
                status = _http_status(error)
                if status == 412:
                    return False
                if status == 409:
                    raise _Conflict(str(error)) from error
                raise
            return True

    def put(self, name: str, data: bytes) -> None:
        with told_as_storage_error(f"write {self.url(name)}"):
            try:
                self._files.pipe_file(self._key(name), data, **self._one_put)
            except FileNotFoundError as error:
                raise StorageError(f"cannot write {self.url(name)}: {error}") from error

    def remove(self, name: str) -> None:
        with told_as_storage_error(f"remove {self.url(name)}"), contextlib.suppress(FileNotFoundError):
            self._files.rm_file(self._key(name))

    def sweep(self) -> None:
        """Nothing to do: an object appears whole or not at all."""

    def names(self, prefix: str = "") -> list[str]:
        folder, _, start = prefix.rpartition("/")
        under = f"{self.root}/{folder}".rstrip("/")
        with told_as_storage_error(f"list {self.scheme}://{under}"):
            try:
                keys = self._files.find(under, prefix=start) if start else self._files.find(under)
            except FileNotFoundError:
                return []
        names = (str(key).strip("/").removeprefix(f"{self.root}/") for key in keys)
        return sorted(name for name in names if name.startswith(prefix) and NAME.fullmatch(name))

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


class _Conflict(StorageError):
    """Another conditional write of the same name is in flight."""


def _http_status(error: OSError) -> int | None:
    response = getattr(error.__cause__, "response", None) or {}
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return int(status) if status is not None else None
