"""Which files make up an input: a path, a folder or a pattern becomes a list of files; what is not read is named."""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple, NoReturn

from pipeline.errors import ConfigurationError, StorageError
from pipeline.inputs.encodings import SUFFIXES
from pipeline.inputs.files import Format, FoundFile, is_dataset_name, open_bytes
from pipeline.quoting import quote
from pipeline.stores.addresses import as_storage_error, file_system, split_address

FORMAT_BY_SUFFIX = {
    ".parquet": Format.PARQUET,
    ".pq": Format.PARQUET,
    ".jsonl": Format.JSONL,
    ".ndjson": Format.JSONL,
    ".json": Format.JSON,
    ".csv": Format.CSV,
    ".tsv": Format.TSV,
    ".arrow": Format.ARROW,
    ".feather": Format.ARROW,
    ".ipc": Format.ARROW,
}
ACCEPTED = f"{', '.join(FORMAT_BY_SUFFIX)}; text also with {', '.join(SUFFIXES)}"
OTHER_COMPRESSIONS = (".zip", ".tar", ".tgz", ".lz4", ".br", ".snappy", ".7z", ".z", ".lzma", ".lzo")
IS_PATTERN = re.compile(r"[*?\[]")
SHOWN = 5  # names in a message
HIDING = (".", "_")  # first characters of names that programs hide
DATASETS = "datasets:"  # before the name of a data set
# Of a data set that `save_to_disk` wrote
STATE, DATASET_INFO, DATASET_DICT = "state.json", "dataset_info.json", "dataset_dict.json"


@dataclass(frozen=True, slots=True)
class Found:
    """The files of an input.

    Args:
        files: in order of name, or as a saved data set orders them.
        not_read: names of other files and of folders beside them; a folder's name ends in `/`.
    """

    files: tuple[FoundFile, ...]
    not_read: tuple[str, ...] = ()


class Entry(NamedTuple):
    """A file or folder of a listing; `tag` is an object's, None for a local file."""

    name: str
    path: str
    size: int
    tag: str | None
    is_file: bool


def find_files(path: str, *, split: str = "train") -> Found | None:
    """List the input files under `path`; None when there is no such path.

    A path with `*`, `?` or `[` that does not exist as it is, is a pattern; `**` goes into subfolders. A folder that
    `save_to_disk` wrote has the files that it names, of `split` where it has several. Of another folder all files of
    known formats are read, but not those of its subfolders, nor names that begin with `.` or `_`; a pattern matches
    such names of files and folders where it spells these characters.

    Raises:
        ConfigurationError: a file of another kind, or no input file.
    """
    scheme, address = split_address(path)
    try:
        found = _list(scheme, address)
        if found is None and IS_PATTERN.search(address):
            return _match(path, scheme, address)
        if found is None:
            return None
        is_file, entries = found
        if is_file:
            return Found((_file(entries[0], path),))
        names = {entry.name for entry in entries}
        if DATASET_DICT in names:
            return _saved_split(path, entries, split)
        if {STATE, DATASET_INFO} <= names:
            return Found(_saved_files(path, entries))
        return _folder(path, entries)
    except (StorageError, OSError) as error:
        raise ConfigurationError(f"input.path: {error}") from None


def find_dataset(path: str, *, split: str, subset: str | None) -> str | None:
    """What `datasets.load_dataset` is to load; None where the input is files that are read as they are.

    That is a name after "datasets:", or a folder on this machine, laid out as a repository of the hub, of which a
    configuration (`subset`) or another split than train is asked.

    Raises:
        ConfigurationError: a split or configuration is asked of files, which have none.
    """
    if path.startswith(DATASETS):
        name = path.removeprefix(DATASETS)
        if not Path(name).is_dir() and not is_dataset_name(name):
            raise ConfigurationError(f"input.path: {quote(name)} is no name of a data set and no folder")
        return os.path.abspath(name) if Path(name).is_dir() else name  # noqa: PTH100
    key = "subset" if subset is not None else "split"
    if subset is None and split == "train":
        return None
    scheme, address = split_address(path)
    try:
        found = _list(scheme, address)
    except (StorageError, OSError) as error:
        raise ConfigurationError(f"input.path: {error}") from None
    names = set() if found is None or found[0] else {entry.name for entry in found[1]}
    if found is None and not IS_PATTERN.search(address):
        return None  # the name of a data set, or nothing at all
    if DATASET_DICT in names and subset is None:
        return None
    if found is None or found[0] or scheme is not None or {STATE, DATASET_INFO} <= names or DATASET_DICT in names:
        raise ConfigurationError(
            f"input.{key} has no effect on {path}: only data sets by name, and folders on this machine that are laid "
            "out as such, have it; leave it out"
        )
    return os.path.abspath(address)  # noqa: PTH100


def _folder(path: str, entries: Sequence[Entry]) -> Found:
    names = {entry.name for entry in entries}
    is_run = bool(names & {"_plan.json", "plan.json"}) and any(name.startswith("part-") for name in names)
    if is_run and "_SUCCESS" not in names:
        raise ConfigurationError(f"input.path: {path} is a run that is not finished; finish it first")
    read = [entry for entry in entries if _is_input(entry) and (not is_run or entry.name.startswith("part-"))]
    left = [entry for entry in entries if entry not in read and not is_run and not _is_expected(entry)]
    not_read = tuple(entry.name if entry.is_file else f"{entry.name}/" for entry in left)
    if not read:
        _refuse_empty(path, not_read)
    return Found(tuple(_file(entry, path) for entry in read), not_read)


def _refuse_empty(path: str, not_read: Sequence[str]) -> NoReturn:
    there = _shown(not_read)
    folders = any(name.endswith("/") for name in not_read)
    raise ConfigurationError(
        f"input.path: no input file in the folder {path} ({ACCEPTED})"
        + (f"; it holds {there}" if not_read else "")
        + (f"; a pattern such as {path.rstrip('/')}/**/*.jsonl reads subfolders" if folders else "")
    )


def _shown(names: Sequence[str]) -> str:
    return ", ".join(quote(name) for name in names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def _match(path: str, scheme: str | None, address: str) -> Found:
    """The files that match a pattern; their names are relative to the folder before its first wildcard."""
    root = address[: IS_PATTERN.search(address).start()].rpartition("/")[0]  # type: ignore[union-attr]
    parts = address.removeprefix(root).split("/")
    entries: list[Entry] = []
    if scheme is None:
        base = Path(os.path.abspath(root or ("/" if address.startswith("/") else ".")))  # noqa: PTH100
        for each in glob.glob(address, recursive=True):  # noqa: PTH207 - a pattern may be absolute
            file = Path(os.path.abspath(each))  # noqa: PTH100
            if file.is_file():
                name = file.relative_to(base).as_posix()
                entries.append(Entry(name, str(file), file.stat().st_size, None, is_file=True))
    else:
        with as_storage_error(f"list {path}"):
            matched = file_system(scheme).glob(address, detail=True)
        objects = (_object(scheme, info) for info in matched.values())
        entries = [each._replace(name=_key(each.path).removeprefix(f"{root}/")) for each in objects if each.is_file]
    entries = sorted(set(entries))  # a pattern with several ** finds a file on several ways
    read = [entry for entry in entries if not _is_hidden(entry.name, parts)]
    left = tuple(entry.name for entry in entries if entry not in read and _format(entry.name) is not None)
    if not read:
        raise ConfigurationError(f"input.path: no file matches {path}" + (_but_hidden(left) if left else ""))
    return Found(tuple(_file(entry, path) for entry in read), left)


def _is_hidden(name: str, parts: Sequence[str]) -> bool:
    """Whether a file, or a folder that it is in, is hidden by its first character, and no part of the pattern has it.

    So are the folders of a run beside its answers: its failed rows, its pairs, and files that others have replaced.
    """
    spelled = [part for part in parts if part.startswith(HIDING)]
    return any(
        part.startswith(HIDING) and not any(fnmatchcase(part, each) for each in spelled) for part in name.split("/")
    )


def _but_hidden(names: Sequence[str]) -> str:
    return f" but names that begin with . or _, which a pattern must spell: {_shown(names)}"


def _saved_split(path: str, entries: Sequence[Entry], split: str) -> Found:
    splits = sorted(entry.name for entry in entries if not entry.is_file)
    if split not in splits:
        raise ConfigurationError(
            f"input.split: the data set {path} has no split {quote(split)}; splits: {', '.join(splits) or 'none'}"
        )
    found = find_files(f"{path.rstrip('/')}/{split}")
    assert found is not None
    others = tuple(f"{name}/" for name in splits if name != split)
    return replace(
        found,
        files=tuple(replace(file, name=f"{split}/{file.name}") for file in found.files),
        not_read=(*found.not_read, *others),
    )


def _saved_files(path: str, entries: Sequence[Entry]) -> tuple[FoundFile, ...]:
    """The files of a data set that `save_to_disk` wrote, as its state names them."""
    by_name = {entry.name: entry for entry in entries}
    try:
        with open_bytes(by_name[STATE].path) as handle:
            names = [each["filename"] for each in json.load(handle)["_data_files"]]
        return tuple(_file(by_name[name], path) for name in names)
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigurationError(
            f"input.path: {path} is not a whole data set of save_to_disk: {STATE} or a file that it names is missing "
            f"or damaged ({quote(str(error))})"
        ) from None


def _file(entry: Entry, path: str) -> FoundFile:
    if not entry.name.isprintable():  # it becomes part of row ids and messages
        raise ConfigurationError(
            f"the file name {quote(entry.name)} has characters that cannot be shown; rename the file"
        )
    kind = _format(entry.name)
    if kind is None:
        raise ConfigurationError(f"input.path: {_reason(entry.name, path)}")
    return FoundFile(path=entry.path, name=entry.name, format=kind, size=entry.size, tag=entry.tag)


def _reason(name: str, path: str) -> str:
    suffixes = [suffix.lower() for suffix in Path(name).suffixes]
    if suffixes and suffixes[-1] in (*SUFFIXES, *OTHER_COMPRESSIONS):
        return f"{path} must be decompressed first: {quote(name)}; accepted: {ACCEPTED}"
    return f"{path} must end in one of {ACCEPTED}" + (f"; got {quote(name)}" if IS_PATTERN.search(path) else "")


def _format(name: str) -> Format | None:
    """The format that a file's name says; only text may be compressed."""
    plain = Path(name.lower())
    is_compressed = plain.suffix in SUFFIXES
    found = FORMAT_BY_SUFFIX.get(plain.with_suffix("").suffix if is_compressed else plain.suffix)
    return None if found is None or (is_compressed and not found.is_text) else found


def _is_input(entry: Entry) -> bool:
    return entry.is_file and not entry.name.startswith(HIDING) and _format(entry.name) is not None


def _is_expected(entry: Entry) -> bool:
    """Whether a name is one that programs hide, unless it is an input by its format: that could be a mistake."""
    return entry.name.startswith(HIDING) and not (entry.is_file and _format(entry.name) is not None)


def _list(scheme: str | None, address: str) -> tuple[bool, list[Entry]] | None:
    """Whether `address` is a file, and it or what the folder holds, by name; None when it does not exist."""
    return _list_local(Path(address)) if scheme is None else _list_objects(scheme, address)


def _list_local(path: Path) -> tuple[bool, list[Entry]] | None:
    path = Path(os.path.abspath(path))  # noqa: PTH100 - resolve() would follow links, whose names users know
    if path.is_file():
        return True, [Entry(path.name, str(path), path.stat().st_size, None, is_file=True)]
    if not path.is_dir():
        return None
    with os.scandir(path) as entries:
        found = [
            Entry(each.name, each.path, each.stat().st_size if each.is_file() else 0, None, is_file=each.is_file())
            for each in entries
        ]
    return False, sorted(found)


def _list_objects(scheme: str, address: str) -> tuple[bool, list[Entry]] | None:
    files = file_system(scheme)
    with as_storage_error(f"list {scheme}://{address}"):
        try:
            info = files.info(address)
            is_file = info["type"] == "file"
            listing = [info] if is_file else files.ls(address, detail=True)
        except FileNotFoundError:
            return None
    entries = [_object(scheme, entry) for entry in listing if is_file or not str(entry["name"]).endswith("/")]
    return is_file, sorted(entry for entry in entries if is_file or _key(entry.path) != address.strip("/"))


def _object(scheme: str, info: dict[str, object]) -> Entry:
    key = str(info["name"]).strip("/")
    tag = info.get("ETag") or info.get("etag") or info.get("md5Hash")
    size = int(str(info.get("size") or 0))
    name, is_file = key.rpartition("/")[2], info["type"] == "file"
    return Entry(name, f"{scheme}://{key}", size, None if tag is None else str(tag), is_file=is_file)


def _key(path: str) -> str:
    return path.partition("://")[2]
