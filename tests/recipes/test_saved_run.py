"""A run folder of before the rebuild (`tests/files/saved/run`, without its report) is read, verified and resumed."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, load_file

import spectrim as st
from spectrim.recipes import MlpStudy, Progress, read_recipe, run_study, verify_run
from spectrim.recipes.run import RunFolder

SAVED = Path(__file__).parents[1] / "files" / "saved" / "run"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copytree(SAVED, tmp_path / "run")
    return tmp_path / "run"


def test_its_files_are_read() -> None:
    study, manifest = read_recipe(SAVED / "recipe.toml"), RunFolder(SAVED).manifest()
    assert isinstance(study, MlpStudy)
    assert (study.name, study.ranks, [tuning.metric for tuning in study.tunings]) == (
        "small",
        (8, 4),
        ["plain", "activation"],
    )
    assert study.identity == manifest.identity
    assert (manifest.recipe, manifest.seeds) == ("small", (0,))
    results = st.Results.load(SAVED / "results.json")
    assert json.loads(results.model_dump_json(exclude_none=True)) == json.loads((SAVED / "results.json").read_text())
    assert st.Plan.load(SAVED / "plan.json") == results.variant(results.chosen).plan


def test_everything_but_the_report_verifies(folder: Path) -> None:
    checks = verify_run(folder, latency=False)
    assert {check.what for check in checks if not check.good} == {"file report.html"}
    assert {check.what for check in checks} >= {
        "file models/seed0/dense.safetensors",
        "data, training split (sha256)",
        "dense: held-out accuracy, seed 0",
        "rank 4, plain, fine-tuned: test accuracy, seed 0",
        "rank 8, activation, zero-shot: MACs of one image",
        "spectrum of fc1",
    }
    assert any(check.what.endswith(": answers changed") for check in checks)


def test_it_is_resumed_with_nothing_left_to_train(folder: Path) -> None:
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    parts = {path: path.stat().st_mtime_ns for path in (folder / "parts").rglob("*") if path.is_file()}
    old = st.Results.load(folder / "results.json")
    steps: list[Progress] = []
    new = run_study(read_recipe(folder / "recipe.toml"), folder, on_progress=steps.append)
    assert not any(step.note.startswith("epoch") for step in steps)
    assert {path: path.stat().st_mtime_ns for path in (folder / "parts").rglob("*") if path.is_file()} == parts
    assert [variant.name for variant in new.variants] == [variant.name for variant in old.variants]
    assert [run.curve for run in new.dense.runs] == [run.curve for run in old.dense.runs]
    # networks trained before are taken as they are; those that are only compressed are worked out anew
    trained = [path for path in before if path.name.endswith(("dense.safetensors", "fine-tuned.safetensors"))]
    assert len(trained) == 6  # the dense one as a part and as a network
    # not byte by byte: the header also says the type of each layer now
    for path in trained:
        old_tensors, new_tensors = load(before[path]), load_file(path)
        assert old_tensors.keys() == new_tensors.keys()
        assert all(torch.equal(tensor, new_tensors[name]) for name, tensor in old_tensors.items())
    for variant, earlier in zip(new.variants, old.variants, strict=True):
        (run,), (run_before,) = variant.runs, earlier.runs
        # another kind of processor may round differently, and answer differently to an image or two
        assert abs(run.test.correct - run_before.test.correct) <= 2
        assert abs(run.held_out.correct - run_before.held_out.correct) <= 2
    assert all(check.good for check in verify_run(folder, latency=False))
