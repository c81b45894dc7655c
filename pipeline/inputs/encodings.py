"""Compressed and UTF-16 text files, read as plain UTF-8 bytes."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO, cast

import pyarrow as pa

from pipeline.errors import ConfigurationError
from pipeline.inputs.files import open_bytes
from pipeline.quoting import one_line

CHUNK_BYTES = 2**20
SUFFIXES = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".xz": "xz"}
# By their first bytes, whatever the name says: downloads are often decompressed on the way and keep their name.
COMPRESSIONS = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bz2", b"\xfd7zXZ\x00": "xz"}
# The mark of UTF-32 begins with that of UTF-16, so it comes first.
ENCODINGS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def find_encoding(path: str) -> tuple[str, ...]:
    """The layers around a file's UTF-8 text, outermost first: a compression, an encoding, both, or none."""
    with open_bytes(path) as handle:
        start = handle.read(8)
    compression = next((name for magic, name in COMPRESSIONS.items() if start.startswith(magic)), None)
    layers = () if compression is None else (compression,)
    with open_text(path, layers) as handle:
        start = handle.read(4)
    encoding = next((name for mark, name in ENCODINGS.items() if start.startswith(mark)), None)
    return layers if encoding is None else (*layers, encoding)


def open_text(path: str, layers: tuple[str, ...], offset: int = 0) -> BinaryIO:
    """Open a file as UTF-8 bytes, from `offset` of these on.

    A file with layers is read from its beginning to get there.
    """
    handle = open_bytes(path)
    for layer in layers:
        handle = _OPENERS[layer](handle)
    if not layers:
        handle.seek(offset)
        return handle
    while offset:
        skipped = handle.read(min(offset, CHUNK_BYTES))
        if not skipped:
            handle.close()
            raise ConfigurationError(f"{path} is shorter than when the run was planned")
        offset -= len(skipped)
    return handle


class _Layer(io.RawIOBase):
    """Bytes that `read_some` gives, up to b"". Closing it closes `inner`."""

    def __init__(self, read_some: Callable[[], bytes], inner: Any) -> None:
        self._read_some, self._inner, self._rest = read_some, inner, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._rest:
            self._rest = self._read_some()
        size = min(len(buffer), len(self._rest))
        buffer[:size], self._rest = self._rest[:size], self._rest[size:]
        return size

    def close(self) -> None:
        if not self.closed:
            self._inner.close()
        super().close()


def _buffered(read_some: Callable[[], bytes], inner: Any) -> BinaryIO:
    return cast(BinaryIO, io.BufferedReader(_Layer(read_some, inner), CHUNK_BYTES))


def _open_by(module: Any) -> Callable[[BinaryIO], BinaryIO]:
    def opened(handle: BinaryIO) -> BinaryIO:
        plain = module.open(handle, "rb")

        def read_some() -> bytes:
            try:
                return cast(bytes, plain.read(CHUNK_BYTES))
            except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
                raise ValueError(f"its compressed data is damaged: {one_line(error)}") from None

        return _buffered(read_some, handle)

    return opened


def _open_zstd(handle: BinaryIO) -> BinaryIO:
    plain = pa.CompressedInputStream(pa.PythonFile(handle, mode="r"), "zstd")
    return _buffered(lambda: cast(bytes, plain.read(CHUNK_BYTES)), handle)


def _open_transcoded(encoding: str) -> Callable[[BinaryIO], BinaryIO]:
    def opened(handle: BinaryIO) -> BinaryIO:
        # A lone surrogate passes, as bytes that are no valid UTF-8: an error of its row, not of the file.
        text = io.TextIOWrapper(handle, encoding=encoding, errors="surrogatepass", newline="")
        return _buffered(lambda: text.read(CHUNK_BYTES).encode("utf-8", errors="surrogatepass"), text)

    return opened


_OPENERS: dict[str, Callable[[BinaryIO], BinaryIO]] = {
    "gzip": _open_by(gzip),
    "bz2": _open_by(bz2),
    "xz": _open_by(lzma),
    "zstd": _open_zstd,
    "utf-16": _open_transcoded("utf-16"),
    "utf-32": _open_transcoded("utf-32"),
}
