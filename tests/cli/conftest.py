"""What the tests of the command line share: the whole command line in this process, and a trained network."""

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from cases import files

from spectrim.cli.app import main


@dataclass
class Ended:
    """A command that has ended, as its caller sees it."""

    code: int
    out: str
    err: str

    @property
    def said(self) -> str:
        """What it said besides its results, in one line without frames."""
        return " ".join(re.sub(r"[│╭╮╰╯─]", " ", self.err).split())


Run = Callable[..., Ended]


@pytest.fixture(autouse=True)
def _threads_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands leave the number of threads as it is, and what they set for OpenMP ends with the test."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The whole command line as `spectrim` runs it, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # so that "nothing was written" can be seen
    monkeypatch.setenv("SPECTRIM_DATA", str(tmp_path / "cache"))
    monkeypatch.setenv("SPECTRIM_LATENCY", str(tmp_path / "times"))

    def call(*arguments: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["spectrim", *map(str, arguments)])
        code: int | str | None = 0
        try:
            main()
        except SystemExit as ended:
            code = ended.code
        captured = capsys.readouterr()
        return Ended(int(code or 0), captured.out, captured.err)

    return call


@pytest.fixture
def refused(run: Run, tmp_path: Path) -> Run:
    """The command line for a mistake: it gives one message, with this text in it, and writes nothing."""

    def call(*arguments: object, message: str, code: int | None = None) -> None:
        before = files(tmp_path)
        ended = run(*arguments)
        assert ended.code == code or (code is None and ended.code), ended.said
        assert message in ended.said
        assert "Traceback" not in ended.out + ended.err
        assert files(tmp_path) == before

    return call
