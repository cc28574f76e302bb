"""`spectrim bench` on a compressed network."""

import multiprocessing
import os
import shlex
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

import spectrim as st
from spectrim import models
from spectrim.cli import bench
from spectrim.cli.app import app
from spectrim.cli.bench import Benched, Timing
from spectrim.cli.options import Source
from spectrim.cli.stages import show
from spectrim.core.errors import DependencyError, FileError, SpectrimError
from spectrim.core.names import RUNTIMES, RuntimeName

MLP = ("--model", "spectrim:mlp", "--option", "inputs=64", "--option", "width=48", "--option", "hidden=2")
COMMAND = (*MLP, "--input", "64", "--weights", "small", "--rounds", "5")


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that holds a compressed network, as `spectrim compress` leaves it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        dense = models.mlp(64, width=48, hidden=2)
    small = st.compress(dense, st.Rank(4), example_inputs=torch.zeros(1, 64), exclude="head")
    Path("small").mkdir()
    st.save(small.model, "small/model.safetensors")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["bench", *arguments])


def failure(*arguments: str) -> SpectrimError:
    error = run(*arguments).exception
    assert isinstance(error, SpectrimError), error
    return error


def timed_here(source: Source, timing: Timing, *, runtime: RuntimeName) -> list[bench.Row]:
    return [bench._time(source, timing, runtime=runtime, batch=batch) for batch in timing.batches]


def noisy_row(*, spread: float, gain: float = 1.0) -> bench.Row:
    def interval(value: float) -> st.Interval:
        return st.Interval(value=value, low=value * (1 - spread), high=value * (1 + spread))

    measured = st.Measurement(
        params=1, bytes=4, macs=1, latency_ms=1.0, reference_ms=1.9, macs_ratio=0.5, speedup=interval(1.9), drift=1.0
    )
    gained = bench.Comparison(ratio=interval(gain), drift=1.0)
    return bench.Row(runtime="openvino", batch=8, measured=measured, gain=gained)


def test_each_runtime_and_batch_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_in_process", timed_here)  # saves seconds
    former = Benched(command="", threads=1, rows=(noisy_row(spread=0.01),))
    Path("speed.json").write_text(former.model_dump_json())  # one of ours, so it is replaced
    result = run(*COMMAND, "--runtime", "channels_last", "--batch", "1,3,3", "--out", "speed.json")
    assert result.exit_code == 0, result.output
    record = Benched.load(Path("speed.json"))
    assert [(row.runtime, row.batch) for row in record.rows] == [("channels_last", 1), ("channels_last", 3)]
    for row in record.rows:
        measured = row.measured
        assert (measured.runtime, measured.batch, measured.threads) == (row.runtime, row.batch, 1)
        assert measured.efficiency.value == pytest.approx(measured.speedup.value * measured.macs_ratio)
        assert row.gain.ratio.value > 0
        assert bench.words.factor(measured.speedup.value) in result.output
    assert record.rows[1].measured.macs == 3 * record.rows[0].measured.macs
    command = ["spectrim", "bench", *COMMAND, "--runtime", "channels_last", "--batch", "1,3,3", "--out", "speed.json"]
    assert sorted(shlex.split(record.command)) == sorted(command)
    assert "time in channels_last" in result.output


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for one process")
def test_an_interrupt_ends_it_and_its_process_and_writes_nothing() -> None:
    children: list[multiprocessing.process.BaseProcess] = []

    def interrupt() -> None:
        """As a terminal does: the command, and the process that it started."""
        for _ in range(1200):
            children.extend(multiprocessing.active_children())
            if children:
                time.sleep(1)  # it has been handed its work by then, and still imports torch
                for process in (children[0].pid, os.getpid()):
                    os.kill(process, signal.SIGINT)
                return
            time.sleep(0.1)

    many = ("--runtime", "torch", "--batch", ",".join(map(str, range(1, 400))), "--out", "speed.json")
    thread = threading.Thread(target=interrupt)
    thread.start()
    result = run(*COMMAND, *many)
    thread.join()
    assert result.exit_code == 130, result.output
    assert "interrupted; nothing was written" in result.output
    assert not Path("speed.json").exists()
    (child,) = children
    child.join(60)
    assert not child.is_alive(), "its process times on"


def test_a_noisy_machine_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    show(*bench._results(Benched(command="", threads=1, rows=(noisy_row(spread=0.3),))))
    result = capsys.readouterr().out
    assert "The machine was too noisy to tell: openvino at batch 8." in result
    show(*bench._results(Benched(command="", threads=1, rows=(noisy_row(spread=0.01, gain=1.7),))))
    result = capsys.readouterr().out
    assert "noisy" not in result
    assert "0.95" in result  # 1.9 of the 2 that the MACs promise
    assert "1.70" in result
    assert "faster" in result


def test_runtimes_that_nobody_named_are_left_out_where_they_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    known = bench.require_runtime

    def require(name: str, *, threads: int) -> RuntimeName:
        if name != "channels_last":
            raise DependencyError(f'{name} needs something; pip install "spectrim[onnx]"')
        return known(name, threads=threads)

    monkeypatch.setattr(bench, "require_runtime", require)
    monkeypatch.setattr(bench, "_in_process", timed_here)  # saves seconds
    result = run(*COMMAND, "--out", "speed.json")
    assert result.exit_code == 0, result.output
    assert 'Left out is openvino: openvino needs something; pip install "spectrim[onnx]".' in result.output
    record = Benched.load(Path("speed.json"))
    assert [row.runtime for row in record.rows] == ["channels_last"]
    assert set(record.left_out) == set(RUNTIMES) - {"channels_last"}
    assert "pip install" in str(failure(*COMMAND, "--runtime", "channels_last,openvino"))


def test_another_process_gives_rows_and_failures() -> None:
    source = Source(
        model="spectrim:mlp", option=["inputs=64", "width=48", "hidden=2"], weights=Path("small"), input="64"
    )
    rows = bench._in_process(source, Timing(batch="2,3", rounds=5), runtime="torch")
    first = next(rows)
    assert (first.runtime, first.batch, first.measured.batch) == ("torch", 2, 2)
    assert first.measured.speedup.value > 0
    Path("small").rename("elsewhere")
    with pytest.raises(FileError, match="small"):
        next(rows)
    assert not multiprocessing.active_children()


def test_mistakes_are_reported_before_anything_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_in_process", lambda *_, **__: pytest.fail("timed"))
    assert "there are torch, channels_last" in run(*COMMAND, "--runtime", "onyx").output.replace("\n", " ")
    assert run(*COMMAND, "--batch", "0").exit_code == 2
    assert run(*COMMAND, "--rounds", "4").exit_code == 2
    assert "threads=4096" in str(failure(*COMMAND, "--threads", "4096"))
    assert isinstance(failure(*COMMAND[:-4], "--weights", "nowhere"), FileError)
    Path("notes.json").write_text("{}")
    assert "stays as it is" in str(failure(*COMMAND, "--out", "notes.json"))
    assert Path("notes.json").read_text() == "{}"
