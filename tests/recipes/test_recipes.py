"""Studies, run for real on the embedded digits: what they write, that they repeat, and that they resume."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import same_state, state
from typer.testing import CliRunner

import spectrim as st
from spectrim import errors, models, recipes
from spectrim.cli.app import app
from spectrim.cli.options import Machine, Output
from spectrim.cli.studies import run
from spectrim.data import load
from spectrim.recipes import (
    DynamicStudy,
    MlpStudy,
    Moving,
    Phase,
    Progress,
    ProjectedStudy,
    Study,
    Truncating,
    Tuning,
    run_study,
    verify_run,
)
from spectrim.recipes.images import Minibatches, load_images
from spectrim.recipes.results import summarise
from spectrim.reporting import words
from spectrim.reporting.pixels import png_text
from spectrim.reporting.results import Agreement

TINY = MlpStudy(
    name="tiny",
    title="a tiny study",
    dataset="digits",
    width=48,
    hidden=2,
    ranks=(12, 4),
    held_out=237,
    calibration_images=400,
    dense=Phase(epochs=4, lr=1e-2, batch=64),
    tunings=tuple(
        Tuning(metric=metric, phase=Phase(epochs=2, lr=4e-3, batch=64), temperature=4.0)
        for metric in ("plain", "activation")
    ),
    seeds=(0, 1),
    command="spectrim recipe tiny",
)


COMMON = {"dataset": "digits", "width": 48, "hidden": 2, "held_out": 237, "dense": TINY.dense, "rank": 4}
DYNAMIC = DynamicStudy(
    name="tiny-dynamic",
    title="truncated",
    ways=(
        Truncating(name="as published", phase=Phase(epochs=4, lr=1e-2, batch=64), shrink=0.0, keep="best"),
        Truncating(
            name="stabilised", phase=Phase(epochs=3, lr=1e-2, batch=64), shrink=0.1, keep="last", temperature=2.0
        ),
    ),
    command="spectrim recipe tiny-dynamic",
    **COMMON,
)
PROJECTED = ProjectedStudy(
    name="tiny-projected",
    title="projected",
    projected=Phase(epochs=6, lr=1e-2, batch=64),
    command="spectrim recipe tiny-projected",
    **COMMON,
)
INSIDE = [pytest.param(DYNAMIC, id="dynamic"), pytest.param(PROJECTED, id="projected")]


class InterruptedRunError(Exception):
    """Stands for Ctrl-C."""


@pytest.fixture(scope="module")
def shared(finished: tuple[Path, st.Results, list[Progress]]) -> Path:
    """The folder of trained parts of the first study."""
    return finished[0] / "parts"


@pytest.fixture(scope="module")
def trained(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, st.Results]]:
    """Both studies that train at low rank, of one seed, by name."""
    done = {}
    for study in (DYNAMIC, PROJECTED):
        out = tmp_path_factory.mktemp(study.name)
        done[study.name] = out, run_study(study, out, parts=shared)
    return done


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights of the layers at rank 4, multiplied out."""
    whole = st.merge(model)
    return {name: whole.get_submodule(name).weight.detach() for name in ("fc1", "fc2")}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, st.Results, list[Progress]]:
    out = tmp_path_factory.mktemp("study")
    events: list[Progress] = []
    return out, run_study(TINY, out, on_progress=events.append), events


def test_it_compares_every_rank_metric_and_stage(finished: tuple[Path, st.Results, list[Progress]]) -> None:
    _, results, _ = finished
    expected = {
        (rank, metric, stage)
        for rank in (12, 4)
        for metric in ("plain", "activation")
        for stage in ("zero-shot", "fine-tuned")
    }
    assert {(variant.rule.rank, variant.metric, variant.stage) for variant in results.variants} == expected
    assert all([run.seed for run in variant.runs] == [0, 1] for variant in results.variants)
    assert results.dense.accuracy > 0.85
    four = {variant.name: variant for variant in results.variants}
    assert four["rank 4, plain, fine-tuned"].accuracy > four["rank 4, plain, zero-shot"].accuracy
    assert all(variant.plan["head"].form == "dense" for variant in results.variants)
    assert all(variant.measurement.speedup is not None for variant in results.variants)


def test_it_writes_what_it_promises(finished: tuple[Path, st.Results, list[Progress]]) -> None:
    out, results, _ = finished
    assert st.Results.load(out / "results.json") == results
    assert (out / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    model = st.load(out / "model.safetensors", models.mlp(64, width=48, hidden=2))
    chosen = results.variant(results.chosen)
    assert st.Plan.load(out / "plan.json") == chosen.plan
    assert model.fc1.rank == chosen.rule.rank
    data = load_images("digits", held_out=237)
    assert st.accuracy(model, data.test.batches()) == chosen.runs[0].test
    assert not list(out.rglob("*.part")) + list(out.rglob("*.unfinished*"))


def test_the_choice_is_made_on_held_out_training_images(finished: tuple[Path, st.Results, list[Progress]]) -> None:
    _, results, _ = finished

    def held_out(variant: st.Variant) -> float:
        return sum(run.held_out.value for run in variant.runs) / 2

    close = [variant for variant in results.variants if held_out(variant) >= held_out(results.dense) - TINY.tolerance]
    if close:
        chosen = results.variant(results.chosen)
        assert chosen.measurement.params <= 1.05 * min(variant.measurement.params for variant in close)
        assert chosen in close


def test_the_changed_answers_are_those_of_the_saved_networks(
    finished: tuple[Path, st.Results, list[Progress]],
) -> None:
    out, results, _ = finished
    changes, data = results.changes, load_images("digits", held_out=237)
    assert (changes.variant, changes.seeds) == (results.chosen, (0, 1))
    truth, counts = data.test.labels, torch.zeros(10, 5, dtype=torch.int64)
    blank, (pictures, _) = models.mlp(64, width=48, hidden=2), data.test.batches(len(data.test))[0]
    for dense, small in zip(results.dense.runs, results.variant(results.chosen).runs, strict=True):
        with torch.no_grad():
            shares = [st.load(out / run.model, blank).eval()(pictures).softmax(dim=1) for run in (dense, small)]
        before, after = (each.argmax(dim=1) for each in shares)
        for label, was, now in zip(truth.tolist(), before.tolist(), after.tolist(), strict=True):
            counts[label, 0] += 1
            counts[label, 1] += was == label
            counts[label, 2] += was == label != now
            counts[label, 3] += was != label == now
            counts[label, 4] += label not in (was, now) and was != now
        if dense.seed == 0:
            flipped, sure = (before, after), shares
    assert [tally.name for tally in changes.classes] == list("0123456789")
    counted = [[tally.total, tally.before, tally.broken, tally.corrected, tally.confused] for tally in changes.classes]
    assert counted == counts.tolist()
    assert changes.whole.after == sum(run.test.correct for run in results.variant(results.chosen).runs)
    assert changes.whole.broken > 0

    original = load("digits", split="test").images
    assert {image.kind for image in changes.flipped} >= {"broken"}
    for image in changes.flipped:
        classes = [int(each[image.index]) for each in (truth, *flipped)]
        assert [image.truth, image.before, image.after] == classes
        assert image.sure_before == pytest.approx(float(sure[0][image.index].max()), abs=1e-3)
        assert image.sure_after == pytest.approx(float(sure[1][image.index].max()), abs=1e-3)
        assert image.image == png_text(original[image.index].numpy())
    difference = sure[1] - sure[0]
    moved = {at: float(difference[at, flipped[1][at]] - difference[at, flipped[0][at]]) for at in range(len(truth))}
    for kind, most in (("broken", 24), ("mended", 12), ("confused", 12)):
        of_kind = [moved[image.index] for image in changes.flipped if image.kind == kind]
        assert len(of_kind) <= most
        assert of_kind == sorted(of_kind, reverse=True)


def test_changed_answers_that_were_edited_are_found(
    finished: tuple[Path, st.Results, list[Progress]], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    what = f"{finished[1].chosen}: answers changed"
    manifest = json.loads((folder / "run.json").read_text())
    manifest["files"].pop("results.json")
    (folder / "run.json").write_text(json.dumps(manifest))
    whole = json.loads((folder / "results.json").read_text())
    checks = verify_run(folder, latency=False)
    assert what in {check.what for check in checks}
    assert all(check.good for check in checks)
    edited = json.loads(json.dumps(whole))
    edited["changes"]["classes"][3]["confused"] += 1
    (folder / "results.json").write_text(json.dumps(edited))
    assert {check.what for check in verify_run(folder, latency=False) if not check.good} == {what}


def test_a_summary_says_no_more_than_the_clock_does(finished: tuple[Path, st.Results, list[Progress]]) -> None:
    _, results, _ = finished
    chosen, calm = results.variant(results.chosen), {"drift": 1.0, "batch": None}

    def said(gain: float, width: float = 0.01, **more: object) -> str:
        speedup = st.Interval(value=gain, low=gain - width, high=gain + width)
        measured = chosen.measurement.model_copy(update={**calm, "speedup": speedup, **more})
        return summarise(results.dense, chosen.model_copy(update={"measurement": measured}))

    assert "x smaller, 2.0x faster one image at a time." in said(2.0)
    assert ", 1.05x faster one image" in said(1.05)
    assert ", 0.80x as fast 16 images at a time." in said(0.8, batch=16)
    assert ", as fast as before one image at a time." in said(1.005)
    assert "too noisy to say more" in said(2.0, width=0.5)
    assert ": no smaller, " in said(2.0, params=results.dense.measurement.params)


def test_progress_only_goes_forward_to_the_end(finished: tuple[Path, st.Results, list[Progress]]) -> None:
    events = finished[2]
    places = [event.parts_done + event.done / event.of for event in events if event.parts_done < event.parts]
    assert places == sorted(places)
    assert events[-1].parts_done == events[-1].parts
    assert {event.parts for event in events} == {15}
    assert any(event.part == "seed 1: training the dense network" for event in events)


def test_a_second_run_reuses_the_parts_and_repeats_every_accuracy(
    finished: tuple[Path, st.Results, list[Progress]],
) -> None:
    out, results, _ = finished
    stamps = {path: path.stat().st_mtime_ns for path in (out / "parts").rglob("*.safetensors")}
    again = run_study(TINY, out)
    assert [variant.runs for variant in again.variants] == [variant.runs for variant in results.variants]
    assert {path: path.stat().st_mtime_ns for path in (out / "parts").rglob("*.safetensors")} == stamps


def test_a_run_elsewhere_gives_the_same_weights(
    finished: tuple[Path, st.Results, list[Progress]], tmp_path: Path
) -> None:
    out, results, _ = finished
    small = TINY.model_copy(update={"seeds": (0,), "ranks": (4,)})
    again = run_study(small, tmp_path)
    for variant in again.variants:
        assert variant.runs[0] == results.variant(variant.name).runs[0].model_copy(
            update={"curve": variant.runs[0].curve}
        )
    blank = models.mlp(64, width=48, hidden=2)
    first, second = (st.load(folder / "parts/seed0/dense.safetensors", blank) for folder in (out, tmp_path))
    assert same_state(first, state(second))


def test_an_interrupted_run_resumes_and_ends_the_same(
    finished: tuple[Path, st.Results, list[Progress]], tmp_path: Path
) -> None:
    def stop(event: Progress) -> None:
        if "rank 4, plain" in event.part and event.done > event.of / 2:
            raise InterruptedRunError

    with pytest.raises(InterruptedRunError):
        run_study(TINY, tmp_path, on_progress=stop)
    assert not (tmp_path / "results.json").exists()
    assert list(tmp_path.rglob("*.unfinished.safetensors"))
    seen: list[str] = []
    resumed = run_study(TINY, tmp_path, on_progress=lambda event: seen.append(f"{event.part} {event.note}"))
    assert not any(text.startswith("seed 0: training the dense network epoch") for text in seen)
    assert not any("seed 0: rank 4, plain" in text and "epoch 1/2" in text for text in seen)
    assert [[run.test for run in variant.runs] for variant in resumed.variants] == [
        [run.test for run in variant.runs] for variant in finished[1].variants
    ]


def test_other_settings_and_damaged_parts_are_done_again(
    finished: tuple[Path, st.Results, list[Progress]], tmp_path: Path
) -> None:
    small = TINY.model_copy(update={"seeds": (0,), "ranks": (4,)})
    run_study(small, tmp_path)
    dense = tmp_path / "parts/seed0/dense.safetensors"
    good = dense.read_bytes()
    dense.write_bytes(good[:500])
    run_study(small, tmp_path)
    assert dense.read_bytes() == good
    other = small.model_copy(update={"dense": Phase(epochs=1, lr=5e-3, batch=64)})
    run_study(other, tmp_path / "other", parts=tmp_path / "parts")
    assert dense.read_bytes() != good


def test_an_output_folder_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(errors.FileError, match="cannot write to the folder"):
        run_study(TINY, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    "study",
    [
        pytest.param(TINY.model_copy(update={"ranks": (4, 4000)}), id="mlp"),
        pytest.param(DYNAMIC.model_copy(update={"rank": 4000}), id="dynamic"),
        pytest.param(PROJECTED.model_copy(update={"rank": 4000}), id="projected"),
    ],
)
def test_a_rank_that_no_layer_can_have_raises_before_training(study: Study, tmp_path: Path) -> None:
    parts: list[str] = []
    with pytest.raises(errors.RuleError, match=r"Rank\(4000\) is above what some layers can have"):
        run_study(study, tmp_path / "run", on_progress=lambda event: parts.append(event.part))
    assert set(parts) == {"reading digits"}
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("study", INSIDE)
def test_what_was_trained_at_low_rank_is_finished_and_answers_the_same(
    study: DynamicStudy | ProjectedStudy, trained: dict[str, tuple[Path, st.Results]]
) -> None:
    out, results = trained[study.name]
    assert st.Results.load(out / "results.json") == results
    assert not (out / "plan.json").exists()
    blank = models.mlp(64, width=48, hidden=2)
    model = st.load(out / "model.safetensors", blank)
    assert (model.fc1.rank, model.fc2.rank, type(model.head)) == (4, 4, torch.nn.Linear)
    data = load_images("digits", held_out=237)
    chosen = results.variant(results.chosen)
    assert st.accuracy(model, data.test.batches()) == chosen.runs[0].test
    assert st.accuracy(model, data.held_out.batches()) == chosen.runs[0].held_out
    for variant in results.variants:
        agreement = variant.runs[0].agreement
        assert 0 < agreement.largest_difference < 1e-5 * agreement.largest_logit
        assert agreement.equal == agreement.of == len(data.test)
        assert variant.measurement.params == chosen.measurement.params < results.dense.measurement.params
        assert (variant.stage, variant.rule) == ("trained", st.Rank(4))
    assert "images are classified alike" in results.summary
    page = (out / "report.html").read_text(encoding="utf-8")
    assert all(variant.name in page for variant in results.variants)


def test_a_disagreement_is_said() -> None:
    agreement = Agreement(largest_difference=0.25, largest_logit=12.34, equal=9998, of=10_000)
    assert "differ by at most 0.2 (the largest is 12.3), and 9,998 of 10,000 test images" in words.agreement(agreement)
    assert "all 10,000 test images" in words.agreement(agreement.model_copy(update={"equal": 10_000}))


def test_truncation_inside_trains_the_part_that_is_seen(
    trained: dict[str, tuple[Path, st.Results]], shared: Path
) -> None:
    out, results = trained["tiny-dynamic"]
    blank = models.mlp(64, width=48, hidden=2)
    dense = st.load(shared / "seed0/dense.safetensors", blank)
    start = st.compress(dense, st.Rank(4), example_inputs=torch.zeros(1, 64), keep_last=True).model
    end = st.load(out / "model.safetensors", blank)
    before, after = weights(start), weights(end)
    assert all((after[name] - before[name]).norm() > 0.1 * before[name].norm() for name in before)
    published, stabilised = (results.variant(f"rank 4, {name}").runs[0] for name in ("as published", "stabilised"))
    assert [len(published.curve), len(stabilised.curve)] == [4, 3]
    assert published.held_out.value == max(epoch.held_out for epoch in published.curve)
    assert stabilised.held_out.value == stabilised.curve[-1].held_out
    data = load_images("digits", held_out=237)
    assert stabilised.held_out.value > st.accuracy(start, data.held_out.batches()).value


def test_ranks_chosen_in_training_cost_no_more_than_the_rank_of_the_study(
    trained: dict[str, tuple[Path, st.Results]], shared: Path, tmp_path: Path
) -> None:
    shutil.copytree(shared / "seed0", tmp_path / "parts/seed0", ignore=shutil.ignore_patterns("rank*"))
    moving = Moving(
        name="moving",
        phase=Phase(epochs=3, lr=1e-2, batch=64),
        shrink=0.1,
        keep="last",
        start=0.6,
        every=5,
        settled=0.5,
    )
    study = DYNAMIC.model_copy(update={"ways": (moving,)})
    results = run_study(study, tmp_path)
    (variant,) = results.variants
    params = trained["tiny-dynamic"][1].variants[0].measurement.params
    assert 0.8 * params < variant.measurement.params <= params
    assert (variant.name, variant.rule) == ("moving", None)
    agreement = variant.runs[0].agreement
    assert agreement.equal == agreement.of
    model = st.load(tmp_path / "model.safetensors", models.mlp(64, width=48, hidden=2))
    assert len({model.fc1.rank, model.fc2.rank, 4}) > 1
    first = (tmp_path / "model.safetensors").read_bytes()
    # found on disk, the part is finished with the ranks that it ended with
    assert run_study(study, tmp_path).variants[0].runs == variant.runs
    assert (tmp_path / "model.safetensors").read_bytes() == first


def test_projection_ends_with_a_projection(trained: dict[str, tuple[Path, st.Results]], shared: Path) -> None:
    whole = st.load(shared / "seed0/rank0004-projected.safetensors", models.mlp(64, width=48, hidden=2))
    for layer in (whole.fc1, whole.fc2):
        values = torch.linalg.svdvals(layer.weight.detach().double())
        assert values[4] < 1e-6 * values[0] < values[3]
    assert torch.linalg.matrix_rank(whole.head.weight) == 10
    results = trained["tiny-projected"][1]
    assert results.variants[0].accuracy > 0.8


@pytest.mark.parametrize("study", INSIDE)
def test_training_at_low_rank_resumes_and_ends_the_same(
    study: DynamicStudy | ProjectedStudy,
    trained: dict[str, tuple[Path, st.Results]],
    shared: Path,
    tmp_path: Path,
) -> None:
    shutil.copytree(shared / "seed0", tmp_path / "parts/seed0", ignore=shutil.ignore_patterns("rank*"))

    def stop(event: Progress) -> None:
        if "rank 4" in event.part and event.done > event.of / 2:
            raise InterruptedRunError

    with pytest.raises(InterruptedRunError):
        run_study(study, tmp_path, on_progress=stop)
    assert list(tmp_path.rglob("*.unfinished.safetensors"))
    assert not (tmp_path / "results.json").exists()
    notes: list[str] = []
    run_study(study, tmp_path, on_progress=lambda event: notes.append(event.note))
    assert not any(note.startswith("epoch 1/4") for note in notes)
    out = trained[study.name][0]
    assert (tmp_path / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    assert not list(tmp_path.rglob("*.unfinished*"))


def test_an_interrupt_within_the_projection_does_not_skip_it(
    trained: dict[str, tuple[Path, st.Results]], shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(shared / "seed0", tmp_path / "parts/seed0", ignore=shutil.ignore_patterns("rank*"))
    decompose = torch.linalg.svd
    calls = 0

    def interrupted(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:  # the second layer, at the end of the second epoch
            raise KeyboardInterrupt
        return decompose(*args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(torch.linalg, "svd", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_study(PROJECTED, tmp_path)
    notes: list[str] = []
    run_study(PROJECTED, tmp_path, on_progress=lambda event: notes.append(event.note))
    assert not any(note.startswith(("epoch 1/", "epoch 2/")) for note in notes)
    out = trained["tiny-projected"][0]
    assert (tmp_path / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_studies_that_share_their_parts_train_the_dense_network_once(
    trained: dict[str, tuple[Path, st.Results]], shared: Path, tmp_path: Path
) -> None:
    stamp = (shared / "seed0/dense.safetensors").stat().st_mtime_ns
    notes: list[str] = []
    again = run_study(DYNAMIC, tmp_path, parts=shared, on_progress=lambda event: notes.append(event.note))
    assert not any(note.startswith("epoch") for note in notes)
    assert (shared / "seed0/dense.safetensors").stat().st_mtime_ns == stamp
    first = trained["tiny-dynamic"]
    assert [variant.runs for variant in again.variants] == [variant.runs for variant in first[1].variants]
    assert (tmp_path / "model.safetensors").read_bytes() == (first[0] / "model.safetensors").read_bytes()


def test_factors_can_be_tuned_with_labels_or_with_a_teacher(shared: Path, tmp_path: Path) -> None:
    phase = Phase(epochs=1, lr=2e-3, batch=32)
    tunings = (Tuning(metric="plain", phase=phase), Tuning(metric="activation", phase=phase, temperature=2.0))
    parts = tmp_path / "parts"
    shutil.copytree(shared / "seed0", parts / "seed0", ignore=shutil.ignore_patterns("rank*"))
    study = TINY.model_copy(update={"seeds": (0,), "ranks": (4,), "tunings": tunings})
    results = run_study(study, tmp_path)
    by_name = {variant.name: variant for variant in results.variants}
    labels, teacher = (by_name[f"rank 4, {metric}, fine-tuned"].runs[0] for metric in ("plain", "activation"))
    # cross-entropy against labels, and a divergence from the teacher's answers times the squared temperature
    blank = models.mlp(64, width=48, hidden=2)
    dense = st.load(parts / "seed0/dense.safetensors", blank)
    small = st.compress(dense, by_name["rank 4, plain, zero-shot"].plan, example_inputs=torch.zeros(1, 64)).model
    train = load_images("digits", held_out=237).train
    again = st.finetune(
        small,
        lambda epoch: Minibatches(train.images, train.labels, 32, 0, epoch),
        train="factors",
        epochs=1,
        lr=2e-3,
        seed=0,
    )
    assert again.history[0].loss == pytest.approx(labels.curve[0].loss, rel=1e-6)
    assert labels.curve[0].loss != pytest.approx(teacher.curve[0].loss, rel=0.01)


@pytest.mark.parametrize("name", [name for name in recipes.NAMES if name != "demo"])
def test_every_study_has_its_command(name: str, tmp_path: Path) -> None:
    text = CliRunner().invoke(app, ["recipe", name, "--help"])
    assert text.exit_code == 0
    assert all(option in text.stdout for option in ("--seeds", "--quick", "--out", "--data-folder"))
    assert name in CliRunner().invoke(app, ["recipe", "list"]).stdout
    study = recipes.find_study(name)
    assert study.command == f"spectrim recipe {name}"
    refused = CliRunner().invoke(app, ["recipe", name, "--seeds", "0,0", "--out", str(tmp_path)])
    assert isinstance(refused.exception, errors.DataError)


def test_the_command_line_says_what_lies_where(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(shared / "seed0", tmp_path / "parts/seed0")
    run(PROJECTED, out=tmp_path, data_folder=None, machine=Machine(), output=Output())
    printed, progress = capsys.readouterr()
    assert "rank 4, projected at every epoch" in printed
    assert "model.safetensors" in printed
    assert "plan.json" not in printed
    assert "5/5 writing" in progress
    assert "6/5" not in progress


@pytest.mark.parametrize(
    "study", [study for study in recipes.STUDIES if isinstance(study, Study)], ids=lambda study: study.name
)
def test_a_quick_look_is_a_small_part_of_the_study(study: Study) -> None:
    quick = study.quick()
    assert type(quick) is type(study)
    assert quick.limit <= 2000
    assert quick.seeds == study.seeds[:1]
    assert "quick look" in quick.title
    assert quick.quick() == quick
    assert quick.dense.epochs <= 4
    assert quick.command == f"{study.command} --quick"
    tuned = [getattr(quick, name) for name in ("tuning", "energy_tuning") if hasattr(quick, name)]
    phases = [each.phase for each in (*getattr(quick, "tunings", getattr(quick, "ways", ())), *tuned)]
    assert all(phase.epochs <= 2 for phase in phases)


def test_studies_are_found_by_name() -> None:
    assert recipes.find_study("mnist-mlp").ranks == (200, 100, 50, 20, 10)
    with pytest.raises(errors.DataError, match="near names: mnist-mlp"):
        recipes.find_study("mnist-mpl")


def test_the_studies_are_what_the_documentation_says() -> None:
    mnist, model = recipes.find_study("mnist-mlp"), models.mlp()
    assert (mnist.width, mnist.hidden, mnist.dataset) == (1024, 5, "mnist")
    factors, dynamic, projected = (recipes.find_study(f"mnist-{name}") for name in ("factors", "dynamic", "projected"))
    for study in (factors, dynamic, projected):
        assert (study.width, study.hidden, study.dataset) == (1024, 5, "mnist")
        assert (study.dense, study.held_out) == (mnist.dense, mnist.held_out)
    assert (factors.ranks, dynamic.rank, projected.rank) == ((20,), 20, 20)
    assert {(training.name, training.residual_decay, training.keep) for training in dynamic.ways} == {
        ("as published", 0.0, "best"),
        ("stabilised", 0.1, "last"),
        ("ranks chosen in training", 0.1, "last"),
        ("not shrunk", 0.0, "last"),
    }
    _, stabilised, moving, unshrunk = dynamic.ways
    assert (moving.phase, moving.temperature) == (stabilised.phase, stabilised.temperature)
    assert unshrunk == stabilised.model_copy(update={"name": "not shrunk", "residual_decay": 0.0})
    assert all(tuning.phase.epochs <= 5 for tuning in factors.tunings)
    assert all(training.phase.epochs <= 6 for training in dynamic.ways)
    assert projected.projected.epochs <= 12
    assert all(tuning.phase.epochs <= 5 for tuning in mnist.tunings)
    assert [tuple(p.shape) for p in model.parameters() if p.ndim == 2] == [(1024, 784), *4 * [(1024, 1024)], (10, 1024)]
    assert json.loads(mnist.quick().model_dump_json())["limit"] == 2000
    assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
