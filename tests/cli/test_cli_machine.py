"""`--threads` and `--device`: what a command computes with."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from spectrim.cli import loading, machine
from spectrim.cli.machine import SMALL_BATCH, choose_threads, find_device
from spectrim.cli.options import Machine
from spectrim.core.errors import EngineError

MLP = ("--model", "spectrim:mlp", "--option", "inputs=64", "--option", "width=48", "--option", "hidden=2")
ANALYZE = ("analyze", *MLP, "--input", "64")

Run = Callable[..., Any]


@pytest.fixture
def _two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with two cores, of which others take one, and an environment that says nothing of threads."""
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(machine, "_cores", lambda: 2)
    monkeypatch.setattr(machine, "_busy", lambda: 0.9)


@pytest.fixture
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.mark.parametrize(
    ("macs", "cores", "busy", "expected"),
    [
        (SMALL_BATCH - 1, 64, 0.0, (1, "small network")),
        (SMALL_BATCH, 64, 0.0, (64, "64 of 64 cores free")),
        (SMALL_BATCH, 2, 0.4, (2, "2 of 2 cores free")),
        (SMALL_BATCH, 2, 0.6, (1, "1 of 2 cores free")),
        (10**12, 8, 2.5, (5, "5 of 8 cores free")),
        (10**12, 2, 2.0, (1, "0 of 2 cores free")),
        (10**12, 2, 40.0, (1, "0 of 2 cores free")),  # the container has 2 of the cores that others keep busy
        (10**12, 1, 0.0, (1, "1 of 1 cores free")),
    ],
)
def test_threads_follow_from_the_network_and_the_machine(
    macs: int, cores: int, busy: float, expected: tuple[int, str]
) -> None:
    assert choose_threads(macs, cores=cores, busy=busy) == expected


def test_a_container_has_fewer_cores_than_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "own_cores", lambda: set(range(8)))
    limit = tmp_path / "cpu.max"
    for text, cores in (("250000 100000", 2), ("50000 100000", 1), ("max 100000", 8), ("1600000 100000", 8), ("", 8)):
        limit.write_text(text + "\n")
        assert machine._cores(limit) == cores
    assert machine._cores(tmp_path / "none") == 8


def test_what_others_take_is_of_the_cores_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.psutil, "cpu_percent", lambda _, *, percpu: [100.0, 0.0, 50.0, 100.0])
    monkeypatch.setattr(machine, "own_cores", lambda: {1, 2})
    assert machine._busy() == 0.5


@pytest.mark.usefixtures("_two_cores")
def test_a_command_says_what_it_computes_with_and_puts_the_threads_back(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = torch.get_num_threads()
    result = run(*ANALYZE)
    assert result.code == 0, result.err
    assert "cpu, " in result.err
    assert " free; small network: 1 thread\n" in result.err
    monkeypatch.setattr(machine, "SMALL_BATCH", 0)
    assert "free; 1 of 2 cores free: 1 thread\n" in run(*ANALYZE).err
    monkeypatch.setattr(machine, "_busy", lambda: 0.0)
    assert "free; 2 of 2 cores free: 2 threads\n" in run(*ANALYZE).err
    assert "free; --threads: 1 thread\n" in run(*ANALYZE, "--threads", 1).err
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert f"free; OMP_NUM_THREADS: {before} thread" in run(*ANALYZE).err
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("command", [("demo", "--quick"), ("recipe", "run", "mnist-mlp"), (*ANALYZE,)], ids=" ".join)
def test_more_threads_than_cores_are_refused_before_anything_is_loaded(
    command: tuple[str, ...], run: Run, tmp_path: Path
) -> None:
    result = run(*command, "--out", "new", "--threads", 4096)
    assert (result.code, result.out) == (1, "")
    assert "threads=4096: this process may use" in result.err
    assert not list(tmp_path.glob("new*"))


@pytest.mark.usefixtures("_no_gpu")
def test_a_device_that_is_not_there_is_refused_before_anything_is_loaded(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("load_data", "load_network"):
        monkeypatch.setattr(loading, name, lambda *_: pytest.fail("it was loaded"))
    compress = ("compress", *MLP, "--data", "digits", "--rank", 4, "--out", "small")
    for device, message in (("mps", "mps: this machine has cpu"), ("gpu", "'gpu' is not one of 'cpu', 'cuda', 'mps'")):
        result = run(*compress, "--device", device)
        assert result.code == 2
        assert message in " ".join(result.err.split()).replace(" │ │ ", " ")
    assert not list(tmp_path.glob("small*"))


def test_auto_takes_a_gpu_before_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    auto = Machine(device="auto")
    for cuda, mps, expected in ((True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda mps=mps: mps)
        assert find_device(auto) == torch.device(expected)
        assert find_device(Machine()) == torch.device("cpu")
    with pytest.raises(typer.BadParameter, match="this machine has cpu and no other"):
        find_device(Machine(device="cuda"))
    with pytest.raises(EngineError, match="threads=4096"):
        find_device(Machine(threads=4096))


@pytest.mark.gpu
def test_a_network_is_compressed_on_a_gpu(run: Run) -> None:
    result = run("compress", *MLP, "--data", "digits", "--macs", 0.5, "--device", "cuda", "--out", "small")
    assert result.code == 0, result.err
    assert torch.cuda.get_device_name() in result.err
    tuned = ("finetune", *MLP, "--data", "digits", "--weights", "small", "--epochs", 1, "--out", "tuned")
    assert run(*tuned, "--device", "cuda").code == 0


def test_threads_sleep_while_they_wait_unless_passes_are_timed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY")
    run("bench", "--help")
    assert "OMP_WAIT_POLICY" not in os.environ
    run("compress", "--help")
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    run("compress", "--help")
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"
