"""What a machine has and lacks for runs: processor, GPU, packages, memory, storage and cluster, each tried."""

from __future__ import annotations

import os
import platform
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from importlib import metadata
from pathlib import Path

from pipeline.quoting import one_line
from pipeline.stores.addresses import file_system, split_address
from pipeline.stores.store import open_store
from pipeline.worker.cpu_kernels import choose_reproducible_kernels, reproducible_mode

SUPPORTED_PYTHON = ((3, 11), (3, 12))
PACKAGES = ("torch", "transformers", "ray", "pyarrow", "datasets", "s3fs", "peft")
GIGABYTE = 1e9
COMPILERS = ("cc", "gcc", "clang")
CLOCK_S = 30.0  # stores refuse requests of a clock that is minutes off
SMALL_MEMORY, SMALL_SHARED_MEMORY = 6 * GIGABYTE, 2 * GIGABYTE


class Verdict(StrEnum):
    """How a check ended."""

    OK = "ok"
    SLOW = "slow"  # works, and takes longer or uses less than it could
    MISSING = "missing"  # runs will fail


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check found.

    Args:
        area: what was checked.
        verdict: how it ended.
        text: what was found, and what to do about it.
    """

    area: str
    verdict: Verdict
    text: str


def examine(*, storage: str | None, address: str | None) -> Iterator[Finding]:
    """Check this machine, and where they are named, a folder or bucket to write to and a cluster to join."""
    yield from _guarded("python", _python)
    yield from _guarded("packages", _packages)
    yield from _guarded("processor", _processor)
    yield from _guarded("memory", _memory)
    yield from _guarded("gpu", _gpu)
    yield from _guarded("compiler", _compiler)
    if storage is not None:
        yield from _guarded("storage", lambda: _storage(storage))
    if address is not None:
        yield from _guarded("cluster", lambda: _cluster(address))


def _guarded(area: str, check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """A check whose own failure is a finding."""
    try:
        yield from check()
    except Exception as error:  # whatever a library or the machine raises
        yield Finding(area, Verdict.MISSING, one_line(error))


def _python() -> Iterator[Finding]:
    version = sys.version_info[:2]
    text = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if SUPPORTED_PYTHON[0] <= version <= SUPPORTED_PYTHON[-1]:
        yield Finding("python", Verdict.OK, text)
    else:
        first, last = (".".join(map(str, each)) for each in (SUPPORTED_PYTHON[0], SUPPORTED_PYTHON[-1]))
        yield Finding("python", Verdict.MISSING, f"{text}; needed is {first} to {last}")
    if os.environ.get("PYTHONDONTWRITEBYTECODE"):
        yield Finding(
            "python",
            Verdict.SLOW,
            "PYTHONDONTWRITEBYTECODE is set: every process compiles thousands of modules anew, which takes about ten "
            "seconds; unset it",
        )


def _packages() -> Iterator[Finding]:
    versions = {name: _version(name) for name in PACKAGES}
    found = ", ".join(f"{name} {version}" for name, version in versions.items() if version is not None)
    lacking = [name for name, version in versions.items() if version is None]
    if lacking:
        yield Finding("packages", Verdict.MISSING, f"{', '.join(lacking)}: install cage-align again")
    yield Finding("packages", Verdict.OK, found)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> Iterator[Finding]:
    choose_reproducible_kernels()
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    mode = reproducible_mode()
    how = f"MKL in its mode {mode}" if mode else "products padded to four rows"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        is_strict = _bits_are_a_rows_own()
    finally:
        torch.set_num_threads(threads)
    if is_strict:
        yield Finding("processor", Verdict.OK, f"{cores} cores; strict bits hold ({how})")
    else:
        yield Finding(
            "processor",
            Verdict.SLOW,
            f"{cores} cores; the bits of a matrix product depend on its number of rows here: strict runs decode rows "
            "one at a time; decoding.reproducibility: relaxed does not",
        )


def _bits_are_a_rows_own() -> bool:
    """Whether a row of a product has the same bits in products of 4, 7 and 33 rows."""
    import torch

    generator = torch.Generator().manual_seed(0)
    rows, weights = (torch.randn(*shape, generator=generator) for shape in ((33, 576), (1536, 576)))
    alone = torch.nn.functional.linear(rows[:4], weights)[0]
    return all(torch.equal(torch.nn.functional.linear(rows[:count], weights)[0], alone) for count in (7, 33))


def _memory() -> Iterator[Finding]:
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    text = f"{available / GIGABYTE:.1f} GB free of {total / GIGABYTE:.1f} GB"
    if total < SMALL_MEMORY:
        yield Finding("memory", Verdict.SLOW, f"{text}; the quickstart needs 6 GB")
    else:
        yield Finding("memory", Verdict.OK, text)
    if Path("/dev/shm").is_dir():
        shared = os.statvfs("/dev/shm")
        size = shared.f_frsize * shared.f_blocks
        if size < SMALL_SHARED_MEMORY:
            yield Finding(
                "memory",
                Verdict.SLOW,
                f"/dev/shm has {size / GIGABYTE:.1f} GB: Ray keeps its objects on disk; give a container more "
                "(--shm-size=4g, say)",
            )


def _gpu() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        yield Finding("gpu", Verdict.OK, "none that torch sees; models run on the processor")
        return
    from pipeline.attention.rows import what_is_missing

    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        properties = torch.cuda.get_device_properties(device)
        text = f"{properties.name}, {properties.total_memory / GIGABYTE:.0f} GB"
        if missing := what_is_missing(device):
            yield Finding("gpu", Verdict.SLOW, f"{text}; steps take several times as long without {missing}")
        else:
            yield Finding("gpu", Verdict.OK, f"{text}; kernels can be built")


def _compiler() -> Iterator[Finding]:
    import torch

    found = next((path for name in COMPILERS if (path := shutil.which(name)) is not None), None)
    if found is not None:
        yield Finding("compiler", Verdict.OK, found)
    elif torch.cuda.is_available():
        yield Finding(
            "compiler", Verdict.SLOW, f"none of {', '.join(COMPILERS)}: kernels for the GPU cannot be built"
        )
    else:
        yield Finding("compiler", Verdict.OK, "none, and none is needed without a GPU")


def _storage(path: str) -> Iterator[Finding]:
    """Write, read and remove a file, and see that a second writer of the same name loses."""
    store = open_store(path)
    name = f"_doctor-{secrets.token_hex(8)}"
    try:
        first, second = store.create(name, b"first"), store.create(name, b"second")
        read = store.read(name)
        ahead_s = time.time() - _written_at(store.url(name))
    finally:
        store.remove(name)
    if abs(ahead_s) > CLOCK_S:
        yield Finding(
            "clock",
            Verdict.SLOW,
            f"this machine's clock is {abs(ahead_s):,.0f} s {'ahead of' if ahead_s > 0 else 'behind'} that of "
            f"{store.path}: signatures of requests may be refused, and times in records are wrong; set it by NTP",
        )
    else:
        yield Finding("clock", Verdict.OK, f"within {CLOCK_S:.0f} s of that of {store.path}")
    if (first, second, read) == (True, False, b"first"):
        yield Finding("storage", Verdict.OK, f"{store.path}: files are written once, read back and removed")
    else:
        yield Finding(
            "storage",
            Verdict.MISSING,
            f"{store.path}: a file that exists was written again, so two drivers could both commit a shard; use "
            "another place",
        )


def _written_at(url: str) -> float:
    """When a file was written, in Unix seconds, by the clock of the machine that has it."""
    scheme, address = split_address(url)
    if scheme is None:
        return Path(address).stat().st_mtime
    return float(file_system(scheme).modified(address).timestamp())


def _cluster(address: str) -> Iterator[Finding]:
    from pipeline.cluster.session import describe_cluster

    nodes, resources = describe_cluster(address)
    shown = ", ".join(f"{resources.get(kind, 0.0):g} {kind}" for kind in ("CPU", "GPU"))
    verdict = Verdict.OK if nodes else Verdict.MISSING
    yield Finding("cluster", verdict, f"{address}: {nodes} machines, {shown}, Ray {metadata.version('ray')}")
