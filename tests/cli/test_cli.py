"""The command line as a person meets it: real processes, real exit codes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

import spectrim as st
from spectrim import models
from spectrim.cli.app import app


def spectrim(*arguments: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", "from spectrim.cli import main; main()", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "120", "OMP_NUM_THREADS": "1", **environment},
    )


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    folder = tmp_path_factory.mktemp("demo")
    return folder, spectrim("demo", "--quick", folder=folder)


def test_the_demo_ends_with_a_table_and_where_to_look(demo: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, done = demo
    assert done.returncode == 0, done.stderr
    assert "dense" in done.stdout
    assert "rank 20, activation, fine-tuned" in done.stdout
    assert "spectrim-demo/report.html" in done.stdout
    assert {path.name for path in (folder / "spectrim-demo").iterdir()} == {
        "report.html",
        "results.json",
        "plan.json",
        "model.safetensors",
        "recipe.toml",
        "run.json",
        "models",
        "parts",
    }
    results = st.Results.load(folder / "spectrim-demo" / "results.json")
    assert results.command == "spectrim demo --quick"
    st.load(folder / "spectrim-demo", models.mlp(64))


def test_the_package_runs_as_the_command_does(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "spectrim", "recipe", "show", "mnist-mlp"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == spectrim("recipe", "show", "mnist-mlp", folder=tmp_path).stdout


def test_a_second_demo_takes_up_what_is_there(demo: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, first = demo
    again = spectrim("demo", "--quick", folder=folder)
    assert again.returncode == 0
    assert [line.split()[:2] for line in again.stdout.splitlines() if "dense" in line] == [
        line.split()[:2] for line in first.stdout.splitlines() if "dense" in line
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("demo", "--out", "file"), "cannot write to the folder file"),
        (("recipe", "mnist-mlp", "--seeds", "one"), "list of different whole numbers"),
        (("recipe", "mnist-mlp", "--seeds", "1,1"), "list of different whole numbers"),
        (("recipe", "mnist-mlp", "--data-folder", "nowhere"), "nowhere"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_mistake_is_one_message_and_a_non_zero_exit_code(
    arguments: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    done = spectrim(*arguments, folder=tmp_path, SPECTRIM_DATA=str(tmp_path / "cache"))
    assert done.returncode == 1
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for one process")
def test_an_interrupt_is_one_line_and_the_same_command_goes_on(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from spectrim.cli import main; main()", "demo", "--quick"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    running = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    dense = tmp_path / "spectrim-demo" / "parts" / "seed0" / "dense.json"
    while not dense.exists() and running.poll() is None:
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    _, told = running.communicate()
    assert running.returncode == 130
    assert "interrupted; what is finished lies in spectrim-demo" in told
    assert "Traceback" not in told
    stamp = dense.stat().st_mtime_ns
    assert spectrim("demo", "--quick", folder=tmp_path).returncode == 0
    assert dense.stat().st_mtime_ns == stamp


def test_help_version_and_unknown_commands(tmp_path: Path) -> None:
    assert spectrim("--version", folder=tmp_path).stdout.strip() == st.__version__
    assert spectrim("demmo", folder=tmp_path).returncode == 2
    inside = CliRunner()
    for arguments in (["--help"], ["demo", "--help"], ["recipe", "--help"], ["recipe", "mnist-mlp", "--help"]):
        assert inside.invoke(app, arguments).exit_code == 0
    assert "mnist-mlp" in inside.invoke(app, ["recipe", "list"]).stdout
