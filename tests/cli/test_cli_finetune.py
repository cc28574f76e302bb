"""`spectrim finetune` on a compressed network and the embedded digits."""

import json
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

import spectrim as st
from spectrim import data, models
from spectrim.cli import finetune as command
from spectrim.cli.app import app, main
from spectrim.cli.finetune import Tuned
from spectrim.training import History, Step

MLP = ("--model", "spectrim:mlp", "--option", "inputs=64", "--option", "width=48", "--option", "hidden=2")
DIGITS = (*MLP, "--data", "digits")
SMALL = ("finetune", *DIGITS, "--weights", "small")
TAUGHT = (*SMALL, "--teacher-weights", "mlp.safetensors", "--train", "factors", "--lr", "0.01")


@dataclass
class Said:
    code: int
    out: str
    err: str


Run = Callable[..., Said]


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
    given = ["compress", *DIGITS, "--weights", str(place / "mlp.safetensors"), "--rank", "4", "--metric", "plain"]
    said = CliRunner().invoke(app, [*given, "--no-test", "--exclude", "head", "--out", str(place / "small")])
    assert said.exit_code == 0, said.output
    return place


@pytest.fixture
def run(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The whole command line, in a folder with the dense and the compressed network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("SPECTRIM_DATA", str(tmp_path / "cache"))
    for path in folder.rglob("*.*"):
        copied = tmp_path / path.relative_to(folder)
        copied.parent.mkdir(exist_ok=True)
        copied.write_bytes(path.read_bytes())

    def call(*arguments: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["spectrim", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        return Said(int(ended.value.code or 0), said.out, said.err)

    return call


def files(folder: Path) -> dict[str, bytes | None]:
    return {str(one): one.read_bytes() if one.is_file() else None for one in folder.rglob("*")}


def percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def test_it_regains_accuracy_and_writes_what_it_measured(run: Run, tmp_path: Path) -> None:
    said = run(*TAUGHT, "--epochs", 4, "--out", "deep/tuned")
    assert said.code == 0, said.err
    out = tmp_path / "deep" / "tuned"
    assert {one.name for one in out.iterdir()} == {
        "model.safetensors",
        "history.json",
        "history.html",
        "measurement.json",
    }
    found, history = Tuned.load(out / "measurement.json"), History.load(out / "history.json")
    assert found.after.accuracy.value > found.before.accuracy.value + 0.05
    assert found.teacher.accuracy.value > 0.9
    assert [one.total for one in found.held_out] == [144, 144]
    assert history.best.held_out == found.held_out[1].value > found.held_out[0].value
    assert len(history) == 4
    made = st.load(out, network()).eval()
    images = data.load("digits", split="test")
    assert st.accuracy(made, [(images.images / 255, images.labels)]) == found.after.accuracy
    before = st.load("small", network())
    changed = {name for name, one in made.state_dict().items() if not torch.equal(one, before.state_dict()[name])}
    assert changed
    assert not any(name.startswith("head") for name in changed)
    for row, held_out, test in (
        ("before", percent(found.held_out[0].value), percent(found.before.accuracy.value)),
        ("after", percent(found.held_out[1].value), percent(found.after.accuracy.value)),
        ("teacher", ".", percent(found.teacher.accuracy.value)),
    ):
        assert re.search(rf"{row} .* {held_out} +{test}", said.out), said.out
    assert "144 held-out training images of digits; 360 test images." in " ".join(said.out.split())
    page = (out / "history.html").read_text(encoding="utf-8")
    assert "held-out accuracy" in page
    assert not re.search(r"<script[^>]+src=", page)


def test_the_command_that_is_noted_gives_the_same_network(run: Run, tmp_path: Path) -> None:
    more = ("--optimizer", "sgd", "--momentum", 0.8, "--train", "fc1", "--train", "*.up.bias", "--unfreeze-norms")
    assert run(*SMALL, *more, "--epochs", 2, "--held-out", 200, "--no-test", "--out", "tuned").code == 0
    one = files(tmp_path / "tuned")
    found = Tuned.load(tmp_path / "tuned" / "measurement.json")
    assert found.after.accuracy is None
    assert found.held_out[0].total == 200
    assert run(*shlex.split(found.command)[1:]).code == 0
    other = files(tmp_path / "tuned")
    model = str(tmp_path / "tuned" / "model.safetensors")
    assert one[model] == other[model]
    assert one.keys() == other.keys()
    assert Tuned.load(tmp_path / "tuned" / "measurement.json") == found


def test_stages_and_epochs_are_lines_where_there_is_no_terminal(run: Run) -> None:
    said = run(*TAUGHT, "--epochs", 2, "--out", "tuned")
    lines = said.out.splitlines()
    assert lines[:3] == ["load digits", "load spectrim:mlp", "train"]
    assert all(re.fullmatch(rf"epoch {n}/2, loss \d+\.\d+, accuracy \d+\.\d+ %", lines[n + 2]) for n in (1, 2))
    assert lines[5:9] == ["test the network before", "test the network after", "test the teacher", "write"]
    assert "untrained" not in said.out


class Interrupted(command._StepReport):
    """Sends this process Ctrl-C in the second epoch."""

    def __call__(self, step: Step) -> None:
        super().__call__(step)
        if (step.epoch, step.step) == (1, 3):
            os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_says_how_to_go_on_and_the_same_command_does(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = (*TAUGHT, "--epochs", 3)
    whole = run(*given, "--out", "whole")
    assert whole.code == 0, whole.err
    with monkeypatch.context() as patch:
        patch.setattr(command, "_StepReport", Interrupted)
        said = run(*given, "--out", "new/tuned")
    state = Path("new", "tuned", "unfinished.safetensors")
    assert (said.code, said.err) == (
        130,
        f"interrupted; {state} holds what is done, and the same command goes on from there\n",
    )
    assert [one.name for one in (tmp_path / "new" / "tuned").iterdir()] == [state.name]
    other = run(*given, "--batch", 64, "--seed", 1, "--out", "new/tuned")
    assert other.code == 1
    assert "is of another run" in other.err
    assert "batch was 128 and is 64" in other.err
    assert "seed was 0 and is 1" in other.err
    again = run(*given, "--save-every", 7, "--out", "new/tuned")
    assert again.code == 0, again.err
    assert "going on from epoch 2, step 5" in again.out
    one, other = (tmp_path / name / "model.safetensors" for name in ("new/tuned", "whole"))
    assert one.read_bytes() == other.read_bytes()
    assert not state.exists()


def test_an_interrupt_before_training_leaves_nothing(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "load_network", stop)
    before = files(tmp_path)
    said = run(*TAUGHT, "--out", "deep/tuned")
    assert (said.code, said.err) == (130, "interrupted; nothing was written\n")
    assert files(tmp_path) == before


def test_a_file_and_a_plain_state_are_weights_too(run: Run, tmp_path: Path) -> None:
    folder, file = tmp_path / "a", tmp_path / "b"
    assert run(*SMALL, "--epochs", 1, "--no-test", "--out", folder).code == 0
    given = ("finetune", *DIGITS, "--weights", "small/model.safetensors", "--epochs", 1, "--no-test", "--out", file)
    assert run(*given).code == 0
    assert (folder / "model.safetensors").read_bytes() == (file / "model.safetensors").read_bytes()
    dense = run("finetune", *DIGITS, "--weights", "mlp.safetensors", "--train", "head", "--epochs", 1, "--out", "dense")
    assert dense.code == 0, dense.err
    before, after = load_file("mlp.safetensors"), load_file("dense/model.safetensors")
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"head.weight", "head.bias"}


def test_patience_ends_a_run_and_the_best_epoch_is_saved(run: Run, tmp_path: Path) -> None:
    given = (*TAUGHT[:-1], "0.2", "--epochs", 30, "--patience", 1, "--precision", "bf16", "--clip", 0, "--no-test")
    said = run(*given, "--out", "tuned")
    assert said.code == 0, said.err
    history = History.load(tmp_path / "tuned" / "history.json")
    assert history.stopped_early
    assert history.kept == len(history) - 2
    assert f"Stopped after {len(history)} epochs" in said.out
    assert f"Saved is epoch {len(history) - 1}, the best" in said.out


def test_a_loss_that_is_not_finite_names_what_is_kept(run: Run, tmp_path: Path) -> None:
    said = run(*SMALL, "--lr", "1e30", "--save-every", 1, "--out", "tuned")
    assert said.code == 1
    assert re.search(r"became (nan|inf) in epoch 0, step \d+; lower the learning rate", said.err)
    assert "unfinished.safetensors holds the weights of an earlier step" in said.err
    assert [one.name for one in (tmp_path / "tuned").iterdir()] == ["unfinished.safetensors"]


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
        (("finetune", *DIGITS, "--weights", "nowhere"), 1, "nowhere is not a .safetensors file"),
        (("finetune", *DIGITS, "--weights", "nowhere.safetensors"), 1, "cannot read nowhere.safetensors"),
        ((*SMALL, "--teacher-weights", "mlp.pt"), 1, "mlp.pt is a pickle"),
        (("finetune", *DIGITS, "--weights", "mlp.safetensors", "--train", "factors"), 1, "no factored layer"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_mistake_is_one_message_and_nothing_is_written(
    run: Run, tmp_path: Path, arguments: tuple[str, ...], code: int, message: str
) -> None:
    before = files(tmp_path)
    said = run(*arguments, "--out", "new/tuned")
    told = " ".join(re.sub(r"[│╭╮╰╯─]", " ", said.err).split())
    assert said.code == code, told
    assert message in told
    assert "Traceback" not in said.out + said.err
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    "name", ["model.safetensors", "history.json", "history.html", "measurement.json", "unfinished.safetensors"]
)
def test_a_file_that_is_not_of_an_earlier_run_is_never_replaced(run: Run, tmp_path: Path, name: str) -> None:
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned" / name).write_text("mine")
    before = files(tmp_path)
    said = run(*SMALL, "--epochs", 1, "--out", "tuned")
    assert said.code == 1
    assert name in said.err
    assert files(tmp_path) == before


def test_the_compressed_network_is_not_written_over(run: Run, tmp_path: Path) -> None:
    before = files(tmp_path)
    said = run(*SMALL, "--epochs", 1, "--out", "small")
    assert said.code == 1
    assert "is there already" in said.err
    assert files(tmp_path) == before


def test_classes_that_do_not_fit_are_told(run: Run, tmp_path: Path) -> None:
    seven = models.mlp(64, 7, width=48, hidden=2)
    st.save(seven, tmp_path / "seven.safetensors")
    given = ("finetune", *DIGITS, "--option", "outputs=7", "--weights", "seven.safetensors")
    said = run(*given, "--out", "tuned")
    assert said.code == 1
    assert "the labels cannot be learnt: digits has 10 classes, and for one image the network gives" in said.err


def test_the_measurement_is_json(run: Run, tmp_path: Path) -> None:
    assert run(*SMALL, "--epochs", 1, "--out", "tuned").code == 0
    found = json.loads((tmp_path / "tuned" / "measurement.json").read_text())
    assert set(found) == {"version", "command", "before", "after", "held_out", "model_sha256"}
    assert found["before"]["params"] == found["after"]["params"]


def test_help_says_that_a_factory_runs_code() -> None:
    said = CliRunner().invoke(app, ["finetune", "--help"], env={"COLUMNS": "200"})
    assert said.exit_code == 0
    assert "RUNS THE CODE" in said.output
    assert "--teacher-weights" in said.output
