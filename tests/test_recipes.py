"""Studies, run for real on the embedded digits: what they write, that they repeat, and that they resume."""

import json
from pathlib import Path

import pytest
import torch
from cases import same_state, state

import spectrim as st
from spectrim import errors, models, recipes
from spectrim.recipes import MlpStudy, Phase, Progress, run_study

TINY = MlpStudy(
    name="tiny",
    title="a tiny study",
    dataset="digits",
    width=48,
    hidden=2,
    ranks=(12, 4),
    held_out=237,
    calibration_images=400,
    dense=Phase(epochs=4, lr=5e-3, batch=32),
    tuning=Phase(epochs=2, lr=2e-3, batch=32),
    seeds=(0, 1),
    command="spectrim recipe tiny",
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, st.Results, list[Progress]]:
    out = tmp_path_factory.mktemp("study")
    events: list[Progress] = []
    return out, run_study(TINY, out, on_progress=events.append), events


def test_it_compares_every_rank_metric_and_stage(finished: tuple[Path, st.Results, list[Progress]]) -> None:
    _, results, _ = finished
    wanted = {
        (rank, metric, stage)
        for rank in (12, 4)
        for metric in ("plain", "activation")
        for stage in ("zero-shot", "fine-tuned")
    }
    assert {(one.rule.rank, one.metric, one.stage) for one in results.variants} == wanted
    assert all([run.seed for run in one.runs] == [0, 1] for one in results.variants)
    assert results.dense.accuracy > 0.85
    four = {one.name: one for one in results.variants}
    assert four["rank 4, plain, fine-tuned"].accuracy > four["rank 4, plain, zero-shot"].accuracy
    assert all(one.plan["head"].form == "dense" for one in results.variants)
    assert all(one.measurement.speedup is not None for one in results.variants)


def test_it_writes_what_it_promises(finished: tuple[Path, st.Results, list[Progress]]) -> None:
    out, results, _ = finished
    assert st.Results.load(out / "results.json") == results
    assert (out / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    model = st.load(out / "model.safetensors", models.mlp(64, width=48, hidden=2))
    chosen = results.variant(results.chosen)
    assert st.Plan.load(out / "plan.json") == chosen.plan
    assert model.fc1.rank == chosen.rule.rank
    data = recipes.mlp_study.load_images("digits", held_out=237)
    assert st.accuracy(model, data.test.batches()) == chosen.runs[0].test
    assert not list(out.rglob("*.part")) + list(out.rglob("*.unfinished*"))


def test_the_choice_is_made_on_held_out_training_images(finished: tuple[Path, st.Results, list[Progress]]) -> None:
    _, results, _ = finished

    def held_out(one: st.Variant) -> float:
        return sum(run.held_out.value for run in one.runs) / 2

    close = [one for one in results.variants if held_out(one) >= held_out(results.dense) - TINY.tolerance]
    if close:
        chosen = results.variant(results.chosen)
        assert chosen.measurement.params == min(one.measurement.params for one in close)
        assert chosen in close


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
    assert [one.runs for one in again.variants] == [one.runs for one in results.variants]
    assert {path: path.stat().st_mtime_ns for path in (out / "parts").rglob("*.safetensors")} == stamps


def test_a_run_elsewhere_gives_the_same_weights(
    finished: tuple[Path, st.Results, list[Progress]], tmp_path: Path
) -> None:
    out, results, _ = finished
    one = TINY.model_copy(update={"seeds": (0,), "ranks": (4,)})
    again = run_study(one, tmp_path)
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
    class InterruptedRunError(Exception):
        pass

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
    assert [[run.test for run in one.runs] for one in resumed.variants] == [
        [run.test for run in one.runs] for one in finished[1].variants
    ]


def test_other_settings_and_damaged_parts_are_done_again(
    finished: tuple[Path, st.Results, list[Progress]], tmp_path: Path
) -> None:
    one = TINY.model_copy(update={"seeds": (0,), "ranks": (4,)})
    run_study(one, tmp_path)
    dense = tmp_path / "parts/seed0/dense.safetensors"
    good = dense.read_bytes()
    dense.write_bytes(good[:500])
    run_study(one, tmp_path)
    assert dense.read_bytes() == good
    run_study(one.model_copy(update={"dense": Phase(epochs=1, lr=5e-3, batch=32)}), tmp_path)
    assert dense.read_bytes() != good


def test_an_output_folder_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(errors.FileError, match="cannot write to the folder"):
        run_study(TINY, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_studies_are_found_by_name() -> None:
    assert recipes.find_study("mnist-mlp").ranks == (200, 100, 50, 20, 10)
    with pytest.raises(errors.DataError, match="near names: mnist-mlp"):
        recipes.find_study("mnist-mpl")


def test_the_studies_are_what_the_documentation_says() -> None:
    mnist, model = recipes.MNIST_MLP, models.mlp()
    assert (mnist.width, mnist.hidden, mnist.dataset) == (1024, 5, "mnist")
    assert mnist.tuning.epochs <= 5
    assert [tuple(p.shape) for p in model.parameters() if p.ndim == 2] == [(1024, 784), *4 * [(1024, 1024)], (10, 1024)]
    assert json.loads(mnist.quick().model_dump_json())["limit"] == 2000
    assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
