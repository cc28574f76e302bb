"""`spectrim recipe` with files: list, show, run and verify, as a user types them."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import spectrim as st
from spectrim import errors, recipes
from spectrim.cli.app import app

MINE = """
kind = "mlp"
name = "mine"
title = "a recipe of mine"
dataset = "digits"
width = 16
hidden = 1
ranks = [4]
held_out = 237
calibration_images = 100
runtimes = ["torch", "channels_last"]
dense = { epochs = 2, lr = 1e-2, batch = 64 }

[[tunings]]
metric = "activation"
temperature = 4.0
phase = { epochs = 1, lr = 1e-2, batch = 64 }
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    path = tmp_path / "mine.toml"
    path.write_text(MINE)
    return path


def test_every_recipe_is_listed_and_shown() -> None:
    listed = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["recipe", "list"])
    assert listed.exit_code == 0
    for name in recipes.NAMES:
        assert name in listed.stdout
        recipe = CliRunner().invoke(app, ["recipe", "show", name])
        assert recipe.stdout == recipes.recipe_file(name)
    refused = CliRunner().invoke(app, ["recipe", "show", "mnist-mpl"])
    assert isinstance(refused.exception, errors.DataError)
    assert "mnist-mlp" in str(refused.exception)


def test_a_quick_look_takes_the_seeds_it_is_given(mine: Path) -> None:
    done = CliRunner().invoke(app, ["recipe", "run", "mine.toml", "--quick", "--seeds", "3,1"])
    assert done.exit_code == 0, done.output
    results = st.Results.load(mine.parent / "spectrim-mine" / "results.json")
    assert [run.seed for run in results.dense.runs] == [3, 1]
    assert results.command == "spectrim recipe run mine.toml --quick --seeds 3,1"
    assert "quick look" in results.title


def test_a_shown_recipe_can_be_edited_and_run_and_verified(mine: Path) -> None:
    done = CliRunner().invoke(app, ["recipe", "run", "mine.toml", "--seeds", "0,1"])
    assert done.exit_code == 0, done.output
    folder = mine.parent / "spectrim-mine"
    assert "a recipe of mine" in done.stdout
    results = st.Results.load(folder / "results.json")
    runtimes = [[measurement.runtime for measurement in variant.in_runtimes] for variant in results.variants]
    assert runtimes == [["channels_last"]] * len(results.variants)
    (second,) = results.variants[-1].in_runtimes
    assert f"{second.speedup.value:.2f}" in done.stdout.partition("channels_last")[2]
    assert results.command == "spectrim recipe run mine.toml --seeds 0,1"
    assert {variant.name for variant in results.variants} == {
        f"rank 4, activation, {stage}" for stage in ("zero-shot", "fine-tuned")
    }
    as_run = recipes.read_recipe(folder / "recipe.toml")
    assert as_run.seeds == (0, 1)
    assert as_run.identity == recipes.read_recipe(mine).identity
    for variant in (results.dense, *results.variants):
        assert [run.seed for run in variant.runs] == [0, 1]
        assert all((folder / run.model).is_file() for run in variant.runs)
    manifest = json.loads((folder / "run.json").read_text())
    assert manifest["seeds"] == [0, 1]
    assert {"spectrim", "torch", "numpy", "python"} == set(manifest["versions"])
    assert all(len(digest) == 64 for digest in (*manifest["data"], *manifest["files"].values()))

    held = CliRunner().invoke(app, ["recipe", "verify", "spectrim-mine"])
    assert held.exit_code == 0, held.output
    assert "all " in held.stdout
    assert " hold" in held.stdout
    (folder / "report.html").write_text("mine")
    broken = CliRunner().invoke(app, ["recipe", "verify", "spectrim-mine"])
    assert broken.exit_code == 1
    assert "1 of " in broken.stdout
    assert "altered" in broken.stdout

    # the recipe as it was run repeats it, with its own seeds, and finds every part
    again = CliRunner().invoke(app, ["recipe", "run", "spectrim-mine/recipe.toml", "--out", "spectrim-mine"])
    assert again.exit_code == 0, again.output
    assert [variant.runs for variant in st.Results.load(folder / "results.json").variants] == [
        variant.runs for variant in results.variants
    ]
    mine.write_text(MINE.replace("epochs = 2", "epochs = 3"))
    refused = CliRunner().invoke(app, ["recipe", "run", "mine.toml"])
    assert isinstance(refused.exception, errors.FileError)
    assert "other settings (dense); give another folder with --out" in str(refused.exception)


@pytest.mark.usefixtures("mine")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "other.toml"), "cannot read other.toml"),
        (("run", "mnist-mpl"), "there is no recipe 'mnist-mpl'; near names: mnist-mlp"),
        (("run", "mine.toml", "--seeds", "0,0"), "not a list of different whole numbers"),
        (("run", "mine.toml", "--weights", "x.safetensors"), "--weights is for recipes of the kind classifier"),
        (("resnet18-cifar10", "--weights", "x.pt"), "cannot read x.pt"),
        (("resnet18-cifar10", "--weights", "x.safetensors"), "cannot read x.safetensors"),
        (("verify", "nowhere"), "holds no finished run"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_mistake_is_one_error(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["recipe", *arguments])
    assert isinstance(done.exception, errors.SpectrimError)
    assert message in str(done.exception)
    assert not list(tmp_path.glob("spectrim-*"))


def test_the_first_remark_of_a_recipe_is_its_help() -> None:
    help_page = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["recipe", "miniresnet-mnist", "--help"])
    assert "every Linear and convolution at 50, 75 and 90 % of its energy" in " ".join(help_page.stdout.split())
    assert "--weights" in CliRunner().invoke(app, ["recipe", "resnet18-cifar10", "--help"]).stdout
    assert "--weights" not in help_page.stdout
