"""The command line as a person meets it: messages, exit codes, and a process that is interrupted."""

import csv
import json
import os
import runpy
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import spectrim as st
from spectrim import models
from spectrim.recipes import DEMO, recipe_file

Run = Callable[..., Any]
RECIPE = """
kind = "mlp"
name = "mine"
title = "a recipe of mine"
dataset = "digits"
width = 48
hidden = 1
ranks = [8]
held_out = 237
calibration_images = 100
dense = { epochs = 1, lr = 1e-2, batch = 64 }

[[tunings]]
metric = "activation"
temperature = 4.0
phase = { epochs = 20, lr = 1e-3, batch = 64 }
"""


def test_the_demo_ends_with_a_table_and_goes_on_from_what_is_there(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = DEMO.model_copy(update={"width": 128, "hidden": 2, "ranks": (20,)})  # the demo, but for its size
    monkeypatch.setattr("spectrim.recipes.DEMO", small)
    first = run("demo", "--quick")
    assert first.code == 0, first.err
    assert "dense" in first.out
    assert "rank 20, activation, fine-tuned" in first.out
    assert "spectrim-demo/report.html" in first.out
    assert " free; OMP_NUM_THREADS: 1 thread\n" in first.err
    folder = tmp_path / "spectrim-demo"
    assert {path.name for path in folder.iterdir()} == {
        "report.html",
        "results.json",
        "plan.json",
        "model.safetensors",
        "recipe.toml",
        "run.json",
        "models",
        "parts",
    }
    results = st.Results.load(folder / "results.json")
    assert results.command == "spectrim demo --quick"
    st.load(folder, models.mlp(64, width=128, hidden=2))
    parts = {path: path.stat().st_mtime_ns for path in (folder / "parts").rglob("*.safetensors")}
    assert parts
    again = run("demo", "--quick")
    assert again.code == 0, again.err
    assert accuracies(again.out) == accuracies(first.out)
    assert {path: path.stat().st_mtime_ns for path in (folder / "parts").rglob("*.safetensors")} == parts


def accuracies(output: str) -> list[list[str]]:
    return [line.split()[:2] for line in output.splitlines() if "dense" in line]


def test_the_package_runs_as_the_command_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["spectrim", "recipe", "show", "mnist-mlp"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("spectrim", run_name="__main__")
    assert (ended.value.code, capsys.readouterr().out) == (0, recipe_file("mnist-mlp"))


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
    run: Run, arguments: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    ended = run(*arguments)
    assert ended.code == 1
    assert message in ended.err
    assert ended.err.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in ended.err
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for one process")
def test_an_interrupt_is_one_line_and_the_same_command_goes_on(run: Run, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(RECIPE)
    command = ("recipe", "run", "mine.toml")
    running = subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "spectrim", *command],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "COLUMNS": "120", "OMP_NUM_THREADS": "1"},
    )
    dense = tmp_path / "spectrim-mine" / "parts" / "seed0" / "dense.json"
    while not dense.exists() and running.poll() is None:
        time.sleep(0.01)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate()
    assert running.returncode == 130, err
    assert "interrupted; what is finished lies in spectrim-mine" in err
    assert "Traceback" not in err
    stamp = dense.stat().st_mtime_ns
    ended = run(*command)
    assert ended.code == 0, ended.err
    assert dense.stat().st_mtime_ns == stamp


def test_the_shell_answers_before_anything_heavy_is_imported() -> None:
    code = """
import sys
from spectrim.cli import main
for words in ("--version", "--help", "compres", "compress --modl x", "compress --help", "data lst", "recipes",
              "compress --model m --out d --macs 50", "compress --model m --out d --latency 0.5 --runtime onyx"):
    sys.argv = ["spectrim", *words.split()]
    try:
        main()
    except SystemExit:
        pass
    assert not {"torch", "numpy", "plotly"} & set(sys.modules), words
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "No such command 'compres'. Did you mean 'compress'?" in done.stderr
    assert "No such option: --modl" in done.stderr


def test_tables_for_programs(run: Run) -> None:
    ended = run("data", "list", "--json")
    (table,) = json.loads(ended.out)
    assert table["rows"][0]["Name"] == "digits"
    assert table["rows"][0]["Training images"] == 1437
    assert "cache: " in ended.err
    first, *_ = csv.DictReader(run("data", "list", "--csv").out.splitlines())
    assert {name: str(value) for name, value in table["rows"][0].items()} == first
    both = run("recipe", "list", "--json", "--csv")
    assert (both.code, both.out) == (2, "")
    assert "not both" in both.err


def test_help_version_and_unknown_commands(run: Run) -> None:
    assert run("--version").out.strip() == st.__version__
    assert run("demmo").code == 2
    for arguments in (["--help"], ["demo", "--help"], ["recipe", "--help"], ["recipe", "mnist-mlp", "--help"]):
        assert run(*arguments).code == 0
    assert "mnist-mlp" in run("recipe", "list").out


def test_a_warning_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def warn() -> None:
        warnings.warn("mind this", stacklevel=1)

    monkeypatch.setattr("spectrim.cli.app.app", warn)
    formatter = warnings.formatwarning
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(
            warnings, "showwarning", lambda *args: print(warnings.formatwarning(*args), file=sys.stderr)
        )
        assert run().err == "warning: mind this\n\n"
    assert warnings.formatwarning is formatter
