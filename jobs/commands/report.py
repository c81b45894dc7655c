"""`cage report`: one page about a run, from its files alone."""

from __future__ import annotations

from pathlib import Path

from jobs.commands.text import shown_path
from pipeline.errors import ConfigurationError, StorageError
from pipeline.reporting.page import render_report, write_report
from pipeline.storage.run import Run
from pipeline.stores.addresses import split_address
from pipeline.stores.store import open_store


def run_report(path: str, output: str | None = None) -> None:
    """Write the report into the run, or to `output`, a local file or one in an object store."""
    if output is not None:
        _check_target(output)
    run = Run.open(path)
    written = write_report(run) if output is None else _write(output, render_report(run))
    print(f"report: {shown_path(written)}")


def _check_target(output: str) -> None:
    """Raise ConfigurationError where no file can be written, before anything is read."""
    scheme, address = split_address(output)
    if scheme is not None:
        if address.count("/") < 1:
            raise ConfigurationError(f"--output must name a file in the bucket; got {output}")
    elif Path(address).is_dir():
        raise ConfigurationError(f"--output must be a file, such as report.html; {output} is a folder")
    elif not Path(address).parent.is_dir():
        raise ConfigurationError(f"--output must be in a folder that exists; {Path(address).parent} does not")


def _write(output: str, page: bytes) -> str:
    """Write the page; return the file's address."""
    scheme, address = split_address(output)
    if scheme is None:
        try:
            Path(address).write_bytes(page)
        except OSError as error:
            raise StorageError(f"cannot write {output}: {error.strerror}") from None
        return address
    folder, _, name = output.rpartition("/")
    store = open_store(folder)
    store.put(name, page)
    return store.url(name)
