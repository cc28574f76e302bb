"""`spectrim finetune` on a compressed network and the embedded digits."""

import json
import os
import re
import shlex
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import files
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

import spectrim as st
from spectrim import data, models
from spectrim.cli import finetune
from spectrim.cli.app import app
from spectrim.cli.commands import Training
from spectrim.cli.finetune import Tuned
from spectrim.training import History, Settings, Step

MLP = ("--model", "spectrim:mlp", "--option", "inputs=64", "--option", "width=48", "--option", "hidden=2")
DIGITS = (*MLP, "--data", "digits")
SMALL = ("finetune", *DIGITS, "--weights", "small")
TAUGHT = (*SMALL, "--teacher-weights", "mlp.safetensors", "--train", "factors", "--lr", "0.01")


Run = Callable[..., Any]


def network() -> nn.Module:
    return models.mlp(64, width=48, hidden=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained network, and what `spectrim compress` made of it."""
    place = tmp_path_factory.mktemp("compressed")
    images = data.load("digits", split="train")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        dense = network()
    batches = list(zip((images.images / 255).split(64), images.labels.split(64), strict=True))
    save_file(st.finetune(dense, batches, epochs=10, lr=5e-3).model.state_dict(), place / "mlp.safetensors")
    arguments = ["compress", *DIGITS, "--weights", str(place / "mlp.safetensors"), "--rank", "4", "--metric", "plain"]
    result = CliRunner().invoke(app, [*arguments, "--no-test", "--exclude", "head", "--out", str(place / "small")])
    assert result.exit_code == 0, result.output
    return place


@pytest.fixture
def run(run: Run, tmp_path: Path, folder: Path) -> Run:
    """The whole command line, in a folder with the dense and the compressed network."""
    for path in folder.rglob("*.*"):
        copied = tmp_path / path.relative_to(folder)
        copied.parent.mkdir(exist_ok=True)
        copied.write_bytes(path.read_bytes())
    return run


def percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def test_it_regains_accuracy_and_writes_what_it_measured(run: Run, tmp_path: Path) -> None:
    result = run(*TAUGHT, "--epochs", 4, "--out", "deep/tuned")
    assert result.code == 0, result.err
    out = tmp_path / "deep" / "tuned"
    assert {path.name for path in out.iterdir()} == {
        "model.safetensors",
        "history.json",
        "history.html",
        "measurement.json",
    }
    record, history = Tuned.load(out / "measurement.json"), History.load(out / "history.json")
    assert record.after.accuracy.value > record.before.accuracy.value + 0.05
    assert record.teacher.accuracy.value > 0.9
    assert [accuracy.total for accuracy in record.held_out] == [144, 144]
    assert history.best.held_out == record.held_out[1].value > record.held_out[0].value
    assert len(history) == 4
    tuned = st.load(out, network()).eval()
    images = data.load("digits", split="test")
    assert st.accuracy(tuned, [(images.images / 255, images.labels)]) == record.after.accuracy
    before = st.load("small", network()).state_dict()
    changed = {name for name, tensor in tuned.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed
    assert not any(name.startswith("head") for name in changed)
    for row, held_out, test in (
        ("before", percent(record.held_out[0].value), percent(record.before.accuracy.value)),
        ("after", percent(record.held_out[1].value), percent(record.after.accuracy.value)),
        ("teacher", ".", percent(record.teacher.accuracy.value)),
    ):
        assert re.search(rf"{row} .* {held_out} +{test}", result.out), result.out
    assert "144 held-out training images of digits; 360 test images." in " ".join(result.out.split())
    page = (out / "history.html").read_text(encoding="utf-8")
    assert "held-out accuracy" in page
    assert not re.search(r"<script[^>]+src=", page)


def test_the_command_that_is_recorded_gives_the_same_network(run: Run, tmp_path: Path) -> None:
    more = ("--optimizer", "sgd", "--momentum", 0.8, "--train", "fc1", "--train", "*.up.bias", "--unfreeze-norms")
    assert run(*SMALL, *more, "--epochs", 2, "--held-out", 200, "--no-test", "--out", "tuned").code == 0
    first = files(tmp_path / "tuned")
    record = Tuned.load(tmp_path / "tuned" / "measurement.json")
    assert record.after.accuracy is None
    assert record.held_out[0].total == 200
    assert run(*shlex.split(record.command)[1:]).code == 0
    second = files(tmp_path / "tuned")
    model = str(tmp_path / "tuned" / "model.safetensors")
    assert first[model] == second[model]
    assert first.keys() == second.keys()
    assert Tuned.load(tmp_path / "tuned" / "measurement.json") == record


def test_stages_and_epochs_are_lines_where_there_is_no_terminal(run: Run) -> None:
    result = run(*TAUGHT, "--epochs", 2, "--out", "tuned")
    lines = result.err.splitlines()
    assert lines[:2] == ["load spectrim:mlp", "load digits"]
    assert lines[2].endswith("OMP_NUM_THREADS: 1 thread")
    assert lines[3:5] == ["check the network", "train"]
    assert all(re.fullmatch(rf"epoch {n}/2, loss \d+\.\d+, training accuracy \d+\.\d+ %", lines[n + 4]) for n in (1, 2))
    assert lines[7:11] == ["test the network before", "test the network after", "test the teacher", "write"]
    assert "untrained" not in result.err


def test_the_options_have_the_defaults_of_the_library() -> None:
    expected = {**Settings().model_dump(exclude={"clip", "seed", "axis"}), "keep": "best"}
    assert vars(Training()) == expected


class Interrupted(finetune._StepReport):
    """Sends this process Ctrl-C in the second epoch."""

    def __call__(self, step: Step) -> None:
        super().__call__(step)
        if (step.epoch, step.step) == (1, 3):
            os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_says_how_to_go_on_and_the_same_command_does(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = (*TAUGHT, "--epochs", 3)
    whole = run(*command, "--out", "whole")
    assert whole.code == 0, whole.err
    with monkeypatch.context() as patch:
        patch.setattr(finetune, "_StepReport", Interrupted)
        result = run(*command, "--out", "new/tuned")
    state = Path("new", "tuned", "unfinished.safetensors")
    assert (result.code, result.err.splitlines()[-1]) == (
        130,
        f"interrupted; {state} holds what is done, and the same command goes on from there",
    )
    assert [path.name for path in (tmp_path / "new" / "tuned").iterdir()] == [state.name]
    other = run(*command, "--batch", 64, "--seed", 1, "--out", "new/tuned")
    assert other.code == 1
    assert "is of another run" in other.err
    assert "batch was 128 and is 64" in other.err
    assert "seed was 0 and is 1" in other.err
    again = run(*command, "--save-every", 7, "--out", "new/tuned")
    assert again.code == 0, again.err
    assert "going on from epoch 2, step 5" in again.err
    resumed, uninterrupted = (tmp_path / name / "model.safetensors" for name in ("new/tuned", "whole"))
    assert resumed.read_bytes() == uninterrupted.read_bytes()
    assert not state.exists()


def test_an_interrupt_before_training_leaves_nothing(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(finetune, "load_network", stop)
    before = files(tmp_path)
    result = run(*TAUGHT, "--out", "deep/tuned")
    assert (result.code, result.err.splitlines()[-1]) == (130, "interrupted; nothing was written")
    assert files(tmp_path) == before


@pytest.mark.parametrize("loss", ["mse", "bce"])
def test_the_outputs_of_the_teacher_are_followed_by_the_loss_that_is_named(run: Run, tmp_path: Path, loss: str) -> None:
    result = run(*TAUGHT, "--loss", loss, "--epochs", 2, "--no-test", "--out", "tuned")
    assert result.code == 0, result.err
    history = History.load(tmp_path / "tuned" / "history.json")
    assert history.measured_by == "loss"
    assert history[1].held_out_loss < history[0].held_out_loss
    assert "held-out loss" in (tmp_path / "tuned" / "history.html").read_text(encoding="utf-8")
    record = Tuned.load(tmp_path / "tuned" / "measurement.json")
    assert record.held_out[1].value > record.held_out[0].value
    for more in (("--label-weight", 0.5), ()):
        wrong = run(*(TAUGHT if more else SMALL), "--loss", loss, *more, "--out", "other")
        assert wrong.code == 2
        assert f"--loss {loss}" in wrong.err
        assert not (tmp_path / "other").exists()


def test_a_file_and_a_plain_state_are_weights_too(run: Run, tmp_path: Path) -> None:
    folder, file = tmp_path / "a", tmp_path / "b"
    assert run(*SMALL, "--epochs", 1, "--no-test", "--out", folder).code == 0
    command = ("finetune", *DIGITS, "--weights", "small/model.safetensors", "--epochs", 1, "--no-test", "--out", file)
    assert run(*command).code == 0
    assert (folder / "model.safetensors").read_bytes() == (file / "model.safetensors").read_bytes()
    dense = run("finetune", *DIGITS, "--weights", "mlp.safetensors", "--train", "head", "--epochs", 1, "--out", "dense")
    assert dense.code == 0, dense.err
    before, after = load_file("mlp.safetensors"), load_file("dense/model.safetensors")
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"head.weight", "head.bias"}


def test_patience_ends_a_run_and_the_best_epoch_is_saved(run: Run, tmp_path: Path) -> None:
    command = (*TAUGHT[:-1], "0.2", "--epochs", 30, "--patience", 1, "--precision", "bf16", "--clip", 0, "--no-test")
    result = run(*command, "--out", "tuned")
    assert result.code == 0, result.err
    history = History.load(tmp_path / "tuned" / "history.json")
    assert history.stopped_early
    assert history.weights_of == len(history) - 2
    assert f"Stopped after {len(history)} epochs" in result.out
    assert f"Saved is epoch {len(history) - 1}, the best" in result.out


def test_a_loss_that_is_not_finite_names_what_is_kept(run: Run, tmp_path: Path) -> None:
    result = run(*SMALL, "--lr", "1e30", "--save-every", 1, "--out", "tuned")
    assert result.code == 1
    assert re.search(r"became (nan|inf) in epoch 0, step \d+; lower the learning rate", result.err)
    assert "unfinished.safetensors holds the weights of an earlier step" in result.err
    assert [path.name for path in (tmp_path / "tuned").iterdir()] == ["unfinished.safetensors"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("finetune", *DIGITS), 2, "--weights"),
        (("finetune", *MLP, "--weights", "small"), 2, "--data"),
        ((*SMALL, "--epochs", "0"), 1, "epochs=0: give at least one epoch"),
        ((*SMALL, "--lr", "0"), 1, "lr=0.0: give a learning rate above 0"),
        ((*SMALL, "--optimizer", "adam"), 2, "'adam' is not one of 'adamw', 'sgd'"),
        ((*SMALL, "--precision", "fp16"), 2, "'fp16' is not one of 'float32', 'bf16'"),
        ((*SMALL, "--keep", "first"), 2, "'first' is not one of"),
        ((*SMALL, "--patience", "0"), 1, "patience=0"),
        ((*SMALL, "--label-weight", "0.5"), 2, "give --teacher-weights"),
        ((*TAUGHT, "--label-weight", "1.5"), 1, "label_weight=1.5"),
        ((*TAUGHT, "--train", "fc1"), 2, "--train factors fc1: give one of all, factors, head, or patterns only"),
        ((*SMALL, "--train", "fc9"), 1, "'fc9' matches no parameter"),
        ((*SMALL, "--held-out", "1437"), 1, "--held-out 1437 leaves none to train on"),
        ((*SMALL, "--option", "width"), 2, "--option width: write each name once"),
        ((*SMALL, "--option", "outputs=7"), 1, "is for another network"),
        ((*SMALL, "--mean", "0.3"), 2, "both --mean and --std"),
        (("finetune", *MLP, "--data", "digit", "--weights", "small"), 1, "did you mean 'digits'"),
        (("finetune", *DIGITS, "--weights", "nowhere"), 1, "cannot read nowhere: there is no such file or folder"),
        (("finetune", *DIGITS, "--weights", "nowhere.safetensors"), 1, "cannot read nowhere.safetensors"),
        ((*SMALL, "--teacher-weights", "mlp.pt"), 1, "cannot read mlp.pt"),
        (("finetune", *DIGITS, "--weights", "mlp.safetensors", "--train", "factors"), 1, "no factored layer"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_mistake_is_one_message(refused: Run, arguments: tuple[str, ...], code: int, message: str) -> None:
    refused(*arguments, "--out", "new/tuned", code=code, message=message)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "history.json", "history.html", "measurement.json", "unfinished.safetensors"]
)
def test_a_file_that_is_not_of_an_earlier_run_is_never_replaced(refused: Run, tmp_path: Path, name: str) -> None:
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned" / name).write_text("mine")
    refused(*SMALL, "--epochs", 1, "--out", "tuned", message=name)


def test_the_compressed_network_is_not_written_over(run: Run, tmp_path: Path) -> None:
    before = files(tmp_path)
    result = run(*SMALL, "--epochs", 1, "--out", "small")
    assert result.code == 1
    assert "is there already" in result.err
    assert files(tmp_path) == before


def test_classes_that_do_not_fit_are_refused(run: Run, tmp_path: Path) -> None:
    seven = models.mlp(64, 7, width=48, hidden=2)
    st.save(seven, tmp_path / "seven.safetensors")
    command = ("finetune", *DIGITS, "--option", "outputs=7", "--weights", "seven.safetensors")
    result = run(*command, "--out", "tuned")
    assert result.code == 1
    assert (
        "the labels cannot be learnt: digits has 10 classes (labels 0 to 9), and for one image the network gives"
        in result.err
    )


def test_the_measurement_is_json(run: Run, tmp_path: Path) -> None:
    assert run(*SMALL, "--epochs", 1, "--out", "tuned").code == 0
    record = json.loads((tmp_path / "tuned" / "measurement.json").read_text())
    assert set(record) == {"version", "command", "before", "after", "held_out", "model_sha256"}
    assert record["before"]["params"] == record["after"]["params"]


def test_help_says_that_a_factory_runs_code() -> None:
    result = CliRunner().invoke(app, ["finetune", "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    assert "RUNS THE CODE" in result.output
    assert "--teacher-weights" in result.output
