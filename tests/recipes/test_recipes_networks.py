"""The studies of convolutional networks, run for real on the embedded digits, and what `verify` finds of them."""

import json
import math
import shutil
from functools import partial
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import spectrim as st
from spectrim import errors, models, recipes
from spectrim.models.weights import fill_imagenet_
from spectrim.recipes import Augment, ClassifierStudy, MiniResNetStudy, Phase, Progress, Tuned, run_study, verify_run
from spectrim.recipes.classifier import Features
from spectrim.recipes.convolutional import effective_rank, gap_rank, hard_rank, held_out_plan, spectral_plan
from spectrim.recipes.images import Minibatches, Split, load_images
from spectrim.recipes.results import Evaluation, choose, require_runtimes
from spectrim.recipes.run import images_of
from spectrim.recipes.seed import SeedRun
from spectrim.recipes.study import ProgressReporter
from spectrim.runtimes.sessions import Runtime, RuntimeName

SHORT = Phase(epochs=1, lr=2e-3, batch=64)
TUNED = Tuned(phase=SHORT, temperature=4.0)
MINI = MiniResNetStudy(
    name="tiny-resnet",
    title="a tiny mini-ResNet",
    dataset="digits",
    held_out=237,
    width=8,
    hidden=32,
    augmentation=Augment(shift=1),
    dense=Phase(epochs=4, lr=4e-3, batch=64),
    energies=(0.75,),
    energy_tuning=TUNED.model_copy(update={"frozen_norms": False}),
    budgets=(0.3,),
    calibration_images=64,
    thresholds=("held-out",),
    threshold_images=50,
    tuning=TUNED,
    runtimes=("torch",),
    command="spectrim recipe tiny-resnet",
)
FACTORY = """
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.layer1 = nn.Sequential(nn.Conv2d(1, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU())
        self.layer2 = nn.Sequential(nn.Conv2d(12, 24, 3, stride=2, bias=False), nn.BatchNorm2d(24), nn.ReLU())
        self.fc = nn.Linear(24, num_classes)

    def forward(self, x):
        return self.fc(self.layer2(self.layer1(x)).mean((2, 3)))

def net(num_classes):
    return Net(num_classes)
"""
SMALL = ClassifierStudy(
    name="tiny-classifier",
    title="a tiny classifier study",
    dataset="digits",
    held_out=237,
    model="tiny_network_of_a_test:net",
    size=12,
    convolution="layer2.0",
    dense=Phase(epochs=4, lr=1e-2, batch=64),
    head=Tuned(phase=SHORT, temperature=1.0),
    head_images=300,
    macs=0.5,
    calibration_images=64,
    tuning=TUNED,
    runtimes=("torch",),
    latency_batch=4,
    command="spectrim recipe tiny-classifier",
)


class InterruptedRunError(Exception):
    """Stands for Ctrl-C."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, st.Results]:
    out = tmp_path_factory.mktemp("mini")
    return out, run_study(MINI, out)


@pytest.fixture
def network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny_network_of_a_test.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)


def test_three_ways_stand_side_by_side_before_and_after(finished: tuple[Path, st.Results]) -> None:
    _, results = finished
    titles = {"75 % energy", "budget, 30 % of the parameters", "per-layer energy, held-out"}
    assert {variant.name.rpartition(", ")[0] for variant in results.variants} == titles
    assert len(results.variants) == 2 * len(titles)
    by_name = {variant.name: variant for variant in results.variants}
    for title in titles:
        before, after = (by_name[f"{title}, {stage}"] for stage in ("zero-shot", "fine-tuned"))
        assert before.plan == after.plan
        assert (before.stage, after.stage) == ("zero-shot", "fine-tuned")
        assert before.measurement == after.measurement
        assert before.measurement.macs_speedup > 1
        assert before.measurement.speedup is not None
        assert (len(before.runs[0].curve), len(after.runs[0].curve)) == (0, 1)
    assert results.dense.accuracy > 0.6
    energy = by_name["75 % energy, zero-shot"]
    assert energy.rule == st.Energy(0.75)
    left_dense = len(energy.plan) - len(energy.plan.factored)
    assert f"would be larger: {left_dense} of {len(energy.plan)} at 75 %" in results.summary
    limited = by_name["budget, 30 % of the parameters, fine-tuned"]
    assert limited.measurement.params_ratio <= 0.3
    assert limited.plan.metric == "activation"
    scanned = by_name["per-layer energy, held-out, fine-tuned"]
    assert scanned.measurement.params_ratio <= 0.3
    assert "held-out cross-entropy" in scanned.plan.factored[0].reason


def test_a_layer_that_would_grow_stays_dense_unless_it_is_allowed_to(
    finished: tuple[Path, st.Results], tmp_path: Path
) -> None:
    # its dense network is found there
    shutil.copytree(finished[0] / "parts/seed0", tmp_path / "seed0")
    plans = []
    for growth in (False, True):
        study = MINI.model_copy(update={"energies": (0.95,), "allow_growth": growth})
        run = SeedRun(study, 0, images_of(study), tmp_path / "seed0", ProgressReporter())
        zero_shot = next(iter(study.tasks()[0](run)))
        assert {layer.form for layer in zero_shot.plan} <= {"dense", "linear", "channel"}
        plans.append(zero_shot.plan)
    shrunk, grown = plans
    assert all(layer.kept.params < layer.dense.params for layer in shrunk.factored)
    assert any(layer.kept.params > layer.dense.params for layer in grown.factored)
    assert len(grown.factored) > len(shrunk.factored)
    assert any("(break-even)" in layer.reason for layer in shrunk)


def test_an_interrupted_run_finds_what_was_compressed_and_ends_the_same(
    finished: tuple[Path, st.Results], tmp_path: Path
) -> None:
    def stop(event: Progress) -> None:
        if "budget" in event.part and event.note.startswith("epoch 1/1") and event.done > 3:
            raise InterruptedRunError

    shutil.copytree(finished[0] / "parts/seed0", tmp_path / "parts/seed0", ignore=shutil.ignore_patterns("budget*"))
    with pytest.raises(InterruptedRunError):
        run_study(MINI, tmp_path, on_progress=stop)
    compressed = tmp_path / "parts/seed0/budget-30-of-the-parameters-compressed.safetensors"
    stamp = compressed.stat().st_mtime_ns
    notes: list[str] = []
    again = run_study(MINI, tmp_path, on_progress=lambda event: notes.append(event.note))
    assert compressed.stat().st_mtime_ns == stamp
    assert not any(note.startswith(("weigh", "fit", "scanning")) for note in notes)
    # curves hold seconds
    assert [each.runs[0].test for each in again.variants] == [each.runs[0].test for each in finished[1].variants]
    for name in ("model", "models/seed0/budget-30-of-the-parameters-fine-tuned"):
        resumed, expected = ((folder / f"{name}.safetensors").read_bytes() for folder in (tmp_path, finished[0]))
        assert resumed == expected


def test_a_run_holds_and_what_was_changed_is_found(finished: tuple[Path, st.Results], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    checks = verify_run(folder)
    assert all(check.good for check in checks)
    said = {check.what for check in checks}
    assert {"file models/seed0/dense.safetensors", "data, training split (sha256)", "dense: parameters"} <= said
    assert {"75 % energy, zero-shot: test accuracy, seed 0", "dense: held-out accuracy, seed 0"} <= said
    assert "spectrum of head" in said
    assert sum(check.verdict == "not judged" for check in checks) == 1 + len(finished[1].variants)

    # another network under the same name, noted as if it belonged there
    manifest = json.loads((folder / "run.json").read_text())
    name = "models/seed0/75-energy-fine-tuned.safetensors"
    shutil.copy(folder / "models/seed0/75-energy-zero-shot.safetensors", folder / name)
    altered = {check.what: check for check in verify_run(folder, latency=False) if not check.good}
    assert altered[f"file {name}"].verdict == "altered"
    manifest["files"][name] = manifest["files"]["models/seed0/75-energy-zero-shot.safetensors"]
    (folder / "run.json").write_text(json.dumps(manifest))
    differs = [check for check in verify_run(folder, latency=False) if not check.good]
    assert {check.verdict for check in differs} == {"differs"}
    assert "75 % energy, fine-tuned: test accuracy, seed 0" in {check.what for check in differs}

    (folder / name).unlink()
    missing = {check.what: check.verdict for check in verify_run(folder, latency=False) if not check.good}
    assert missing == {f"file {name}": "missing", "75 % energy, fine-tuned: network, seed 0": "missing"}


def test_results_edited_by_hand_are_found(finished: tuple[Path, st.Results], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    written = json.loads((folder / "results.json").read_text())
    written["variants"][0]["runs"][0]["test"]["correct"] += 1
    written["dense"]["measurement"]["macs"] -= 1
    (folder / "results.json").write_text(json.dumps(written))
    assert {check.what for check in verify_run(folder, latency=False) if not check.good} == {"file results.json"}
    manifest = json.loads((folder / "run.json").read_text())
    manifest["files"].pop("results.json")
    manifest["data"][1] = "0" * 64
    (folder / "run.json").write_text(json.dumps(manifest))
    assert {check.what for check in verify_run(folder, latency=False) if not check.good} == {
        "75 % energy, zero-shot: test accuracy, seed 0",
        "dense: MACs of one image",
        "data, test split (sha256)",
    }
    # on another kind of machine a few images may differ, a count may not
    (folder / "run.json").write_text(json.dumps({**manifest, "machine": "another"}))
    assert "75 % energy, zero-shot: test accuracy, seed 0" not in {
        check.what for check in verify_run(folder, latency=False) if not check.good
    }


def test_an_unfinished_run_cannot_be_verified(tmp_path: Path) -> None:
    with pytest.raises(errors.FileError, match="holds no finished run"):
        verify_run(tmp_path)


@pytest.mark.usefixtures("network")
def test_the_classifier_beside_the_whole_network(tmp_path: Path) -> None:
    out = tmp_path / "run"
    results = run_study(SMALL, out)
    names = [variant.name for variant in results.variants]
    assert names == [
        "classifier dense (-0 %), head tuned",
        "classifier at rank 5 (-50 %), zero-shot",
        "classifier at rank 5 (-50 %), head tuned",
        "classifier at rank 2 (-80 %), zero-shot",
        "classifier at rank 2 (-80 %), head tuned",
        "whole network, 50 % of the MACs, zero-shot",
        "whole network, 50 % of the MACs, fine-tuned",
    ]
    by_name = {variant.name: variant for variant in results.variants}
    blank = models.resolve(SMALL.model, options={"num_classes": 10})
    dense = st.load(out / "models/seed0/dense.safetensors", blank).state_dict()
    for rank in (5, 2):
        share = {5: 50, 2: 80}[rank]
        tuned = st.load(out / f"models/seed0/classifier-at-rank-{rank}-{share}-head-tuned.safetensors", blank)
        assert tuned.fc.rank == rank
        backbone = {name: value for name, value in tuned.state_dict().items() if not name.startswith("fc.")}
        assert all(torch.equal(value, dense[name]) for name, value in backbone.items())
        before, after = (
            by_name[f"classifier at rank {rank} (-{share} %), {stage}"] for stage in ("zero-shot", "head tuned")
        )
        assert after.runs[0].curve[0].loss > 0
        assert before.measurement == after.measurement
    control = st.load(out / "models/seed0/classifier-dense-0-head-tuned.safetensors", blank).state_dict()
    assert not torch.equal(control["fc.weight"], dense["fc.weight"])
    assert by_name[names[-1]].measurement.macs_ratio <= 0.5
    assert by_name[names[-1]].measurement.batch == 4
    spectra = {(spectrum.layer, spectrum.metric): spectrum for spectrum in results.spectra}
    assert set(spectra) == {(layer, metric) for layer in ("layer2.0", "fc") for metric in ("plain", "activation")}
    for spectrum in spectra.values():
        squares = np.array(spectrum.values) ** 2
        assert spectrum.cumulative == pytest.approx(np.cumsum(squares) / squares.sum(), abs=1e-9)
    assert f"holds 250 of the {results.dense.measurement.params:,} parameters" in results.summary
    # the images are seen at 12 pixels, and MACs are those of one
    assert results.dense.measurement.macs == 12 * 12 * 12 * 9 + 25 * 24 * 12 * 9 + 240
    assert results.provenance["timing"].startswith("batches of 4 images, one thread, ")
    assert all(check.good for check in verify_run(out, latency=False))

    # its dense network as a file: it is not trained, and its accuracy is the same
    save_file(dense, tmp_path / "given.safetensors")
    from_file = SMALL.model_copy(update={"weights": str(tmp_path / "given.safetensors"), "compressions": ()})
    notes: list[str] = []
    again = run_study(from_file, tmp_path / "given", on_progress=lambda event: notes.append(event.part))
    assert "taking the given weights" in notes
    assert again.dense.runs[0].test == results.dense.runs[0].test
    assert again.dense.runs[0].curve == ()
    with pytest.raises(errors.FileError, match="holds a run of tiny-classifier with other settings"):
        run_study(from_file, out)


def test_a_head_tuned_on_features_is_the_network_tuned_with_its_backbone_frozen() -> None:
    images = load_images("digits", held_out=237, limit=200)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 10)).eval()
    features = Features.of(model, "3", train=images.train, held_out=images.held_out)
    assert torch.equal(model[3](features.train), model(images.train.images))
    tuned = Tuned(phase=Phase(epochs=3, lr=1e-2, batch=50))
    options = {"epochs": 3, "lr": 1e-2}
    head_tuned = features.finetuned(model, "3", tuned=tuned, targets=features.labels, seed=0, **options)
    batches = partial(Minibatches, images.train.images, images.train.labels, 50, 0)
    expected = st.finetune(model, batches, train=["3"], held_out=images.held_out.batches(), **options)
    for name, value in expected.model.state_dict().items():
        torch.testing.assert_close(head_tuned.model.state_dict()[name], value, rtol=1e-4, atol=1e-5)
    assert head_tuned.curve[-1].held_out == expected.history[-1].held_out
    assert not torch.equal(head_tuned.model[3].weight, model[3].weight)


def test_a_head_may_learn_what_the_dense_one_answers_to_an_image_and_its_mirror_image() -> None:
    images = load_images("digits", held_out=237, limit=30)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 10)).eval()
    splits = {"train": images.train, "held_out": images.held_out}
    plain, both = Features.of(model, "3", **splits), Features.of(model, "3", **splits, mirrored=True)
    assert (plain.views, both.views) == (1, 2)
    torch.testing.assert_close(plain.soft_targets(model[3]), model(images.train.images))
    mirrored = Split(images.train.images.flip(3), images.train.labels)
    assert torch.equal(both.train, torch.cat([plain.train, model[:3](mirrored.images)]))
    assert torch.equal(both.labels, torch.cat([images.train.labels] * 2))
    assert all(
        torch.equal(*tensors)
        for batches in zip(plain.held_out, both.held_out, strict=True)
        for tensors in zip(*batches, strict=True)
    )
    mean = (model(images.train.images) + model(mirrored.images)) / 2
    torch.testing.assert_close(both.soft_targets(model[3]), torch.cat([mean, mean]))
    shared = both.soft_targets(model[3], label_share=0.2).softmax(1)
    expected = 0.8 * mean.softmax(1) + 0.2 * nn.functional.one_hot(images.train.labels, 10)
    torch.testing.assert_close(shared, torch.cat([expected, expected]))
    tuned = Tuned(phase=Phase(epochs=1, lr=1e-3, batch=10), temperature=1.0)
    options = {"seed": 0, "epochs": 1, "lr": 1e-5}
    # the dense layer itself has nothing to learn from its own answers, and something from their mean
    losses = [
        each.finetuned(model, "3", tuned=tuned, targets=each.soft_targets(model[3]), **options).curve[-1].loss
        for each in (plain, both)
    ]
    assert losses[0] < 1e-5
    assert losses[1] > 100 * losses[0]


def test_a_layer_that_is_not_the_last_is_no_head() -> None:
    images = load_images("digits", held_out=237, limit=20)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Softmax(dim=1))
    with pytest.raises(errors.ModelError, match="does not end with '1'"):
        Features.of(model, "1", train=images.train, held_out=images.held_out)


@pytest.mark.usefixtures("network")
@pytest.mark.parametrize(
    ("changed", "kind", "message"),
    [
        ({"classifier": "head"}, errors.ModelError, "has no layer 'head'; .* name one in the recipe"),
        ({"classifier": "layer2.0"}, errors.ModelError, "classifier = 'layer2.0' in the recipe is a Conv2d, not a li"),
        ({"convolution": "layer2"}, errors.ModelError, "convolution = 'layer2' in the recipe is a Sequential, not a c"),
        ({"size": 1}, errors.ModelError, r"cannot run example_inputs \(float32 \[1, 1, 1, 1\]\)"),
        ({"macs": 0.001}, errors.RuleError, r"Budget\(macs=0.001\) cannot be reached"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_the_network_raise_before_training(
    changed: dict[str, Any], kind: type[Exception], message: str, tmp_path: Path
) -> None:
    parts: list[str] = []
    with pytest.raises(kind, match=message):
        run_study(
            SMALL.model_copy(update=changed), tmp_path / "run", on_progress=lambda event: parts.append(event.part)
        )
    assert set(parts) == {"reading digits"}
    assert not (tmp_path / "run").exists()


def test_a_budget_out_of_reach_raises_before_training(tmp_path: Path) -> None:
    with pytest.raises(errors.RuleError, match=r"Budget\(params=0.001\) cannot be reached"):
        run_study(MINI.model_copy(update={"budgets": (0.3, 0.001)}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_resnet18_is_torchvisions_own_and_imagenet_is_an_honest_option(monkeypatch: pytest.MonkeyPatch) -> None:
    torchvision = pytest.importorskip("torchvision.models")
    study = recipes.find_study("resnet18-cifar10")
    images = load_images("digits", held_out=237)
    model = study.dense_network(images)
    assert isinstance(model, torchvision.ResNet)
    assert tuple(model.fc.weight.shape) == (10, 512)
    assert {study.convolution, study.classifier} <= set(dict(model.named_modules()))
    assert not study.load_weights(model)

    whole = torchvision.resnet18().state_dict()
    weights = type(torchvision.ResNet18_Weights.DEFAULT)
    monkeypatch.setattr(weights, "get_state_dict", lambda *_, **__: whole)
    own = model.fc.weight.detach().clone()
    assert not study.model_copy(update={"weights": "imagenet"}).load_weights(model)
    assert torch.equal(model.layer2[1].conv2.weight, whole["layer2.1.conv2.weight"])
    assert torch.equal(model.fc.weight, own)

    def offline(*_: object, **__: object) -> None:
        raise URLError("no route")

    monkeypatch.setattr(weights, "get_state_dict", offline)
    with pytest.raises(errors.ModelError, match=r"could not fetch .* resnet18 .*no route.*--weights FILE"):
        study.model_copy(update={"weights": "imagenet"}).load_weights(model)
    with pytest.raises(errors.ModelError, match="networks of torchvision"):
        fill_imagenet_(model, "timm:resnet18", head="fc")
    with pytest.raises(errors.FileError, match="missing"):
        study.model_copy(update={"weights": "nowhere.safetensors"}).load_weights(model)


def test_emnist_that_cannot_be_had_names_its_stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, **_: object) -> None:
        raise errors.DataError(f"data set {name!r} could not be obtained")

    monkeypatch.setattr("spectrim.recipes.images.load", refuse)
    with pytest.raises(errors.DataError) as caught:
        run_study(recipes.find_study("miniresnet-emnist"), tmp_path / "run")
    assert "'emnist-balanced' could not be obtained" in str(caught.value)
    assert "--data-folder DIR" in str(caught.value)
    assert "spectrim recipe miniresnet-fashion" in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_spectral_thresholds_find_planted_ranks() -> None:
    values = np.array([9.0, 8.0, 7.5, 0.5, 0.4, 0.3, 0.2, 0.0])
    assert gap_rank(st.Spectrum(values)) == 3
    # a larger ratio at the end is noise, or zeros
    assert gap_rank(st.Spectrum(np.array([1.0]))) == 1
    generator = np.random.default_rng(0)
    background = generator.normal(size=(200, 100)) / math.sqrt(200)
    columns, _ = np.linalg.qr(generator.normal(size=(200, 4)))
    rows, _ = np.linalg.qr(generator.normal(size=(100, 4)))
    spectrum = st.Spectrum(np.linalg.svd(background + (columns * 8.0) @ rows.T, compute_uv=False))
    assert hard_rank(spectrum, outputs=200, inputs=100) == 4
    assert gap_rank(spectrum) == 4
    assert effective_rank(st.Spectrum(np.ones(6))) == 6
    assert effective_rank(st.Spectrum(np.array([1.0, 0.0]))) == 1


def test_a_scan_keeps_what_the_network_needs() -> None:
    torch.manual_seed(0)
    first, second = nn.Linear(20, 20), nn.Linear(20, 4)
    model = nn.Sequential(nn.Flatten(), first, nn.ReLU(), second).eval()
    with torch.no_grad():  # rank 2 is all there is of the first layer
        first.weight.copy_(torch.randn(20, 2) @ torch.randn(2, 20))
    inputs = torch.randn(200, 1, 4, 5)
    part = Split(inputs, model(inputs).argmax(dim=1))
    analysis = st.analyze(model, inputs[:1])
    scored: list[int] = []
    plan = held_out_plan(model, analysis, part, share=0.5, on_progress=lambda _, done, __: scored.append(done))
    assert plan["1"].rank == 2
    assert plan.kept_cost.params <= 0.5 * plan.dense_cost.params
    assert scored == list(range(len(scored)))
    assert plan.rule == st.Budget(params=0.5)
    spectral = spectral_plan(analysis, "gap")
    assert spectral["1"].rank == 2
    assert spectral.rule == st.Energy(min(1.0, spectral.rule.energy))
    held = [analysis[each.name].spectra["plain"].cumulative_energy[each.rank - 1] for each in spectral.factored]
    assert spectral.rule.energy == pytest.approx(min(held))
    # no threshold is small enough: as small as it goes
    smallest = held_out_plan(model, analysis, part, share=0.01)
    assert {layer.rank for layer in smallest.factored} == {1}


def test_images_vary_by_seed_and_epoch_alone() -> None:
    images = torch.arange(2 * 3 * 6 * 6, dtype=torch.float32).reshape(2, 3, 6, 6)
    generator = torch.Generator().manual_seed(0)
    moved = Augment(shift=2).apply(images.repeat(50, 1, 1, 1), generator)
    assert moved.shape == (100, 3, 6, 6)
    padded = torch.nn.functional.pad(images, [2] * 4, mode="replicate")
    shifts = {(down, right) for down in range(5) for right in range(5)}
    seen = set()
    for index, image in enumerate(moved):
        fits = [
            (down, right)
            for down, right in shifts
            if torch.equal(image, padded[index % 2, :, down : down + 6, right : right + 6])
        ]
        assert len(fits) == 1
        seen |= set(fits)
    assert len(seen) > 20
    mirrored = Augment(flips=True).apply(images.repeat(50, 1, 1, 1), generator)
    flipped = [torch.equal(image, images[index % 2].flip(2)) for index, image in enumerate(mirrored)]
    same = [torch.equal(image, images[index % 2]) for index, image in enumerate(mirrored)]
    assert all(is_flipped != is_same for is_flipped, is_same in zip(flipped, same, strict=True))
    assert 30 < sum(flipped) < 70

    def epoch(number: int, seed: int = 0) -> torch.Tensor:
        batches = Minibatches(
            images.repeat(8, 1, 1, 1), torch.arange(16), 4, seed, number, Augment(flips=True, shift=1), pixels=9
        )
        return torch.cat([inputs for inputs, _ in batches])

    assert epoch(0).shape == (16, 3, 9, 9)
    assert torch.equal(epoch(1), epoch(1))
    assert not torch.equal(epoch(0), epoch(1))
    assert not torch.equal(epoch(0), epoch(0, seed=1))


def test_runtimes_are_those_asked_for_or_those_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    assert require_runtimes(("torch",)) == ("torch",)

    def absent(name: RuntimeName, **_: object) -> Runtime:
        if name == "onnxruntime":
            raise errors.DependencyError("not installed")
        return Runtime(name, 1)

    monkeypatch.setattr("spectrim.recipes.results.require_runtime", absent)
    assert require_runtimes(()) == ("torch",)
    with pytest.raises(errors.DependencyError):
        require_runtimes(("torch", "onnxruntime"))


def test_a_further_runtime_has_its_own_figures() -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    runtimes = require_runtimes(())
    assert runtimes == ("torch", "onnxruntime")
    images = load_images("digits", held_out=237)
    model = models.mlp(64, width=32, hidden=1)
    small = st.compress(model, st.Rank(2), example_inputs=torch.zeros(1, 64), keep_last=True).model
    notes: list[str] = []
    evaluation = Evaluation(MINI.model_copy(update={"latency_batch": 2}), images, runtimes, ProgressReporter())
    first, second = evaluation.measure_against(model, {"small": small}, note=notes.append)["small"]
    assert notes == ["timing small in torch", "timing small in onnxruntime"]
    assert (first.runtime, second.runtime) == runtimes
    assert (first.batch, second.batch) == (2, 2)
    assert first.macs == second.macs == st.measure(small, images.test.example(), latency=False).macs
    assert first.macs_ratio == second.macs_ratio < 1
    assert second.speedup is not None


@pytest.mark.parametrize(
    ("candidates", "chosen_size"),
    [
        ([(40, 91), (41, 94), (60, 99)], 41),  # 2.5 % more parameters and three points better
        ([(40, 91), (44, 94), (60, 99)], 40),  # 10 % more are another size
        ([(40, 94), (41, 94)], 40),
        ([(10, 80), (40, 91)], 40),  # the first is outside the tolerance
        ([(10, 80), (20, 85)], 20),  # and here none is inside: the best
    ],
)
def test_the_smallest_is_chosen_or_a_better_one_of_its_size(
    candidates: list[tuple[int, int]], chosen_size: int
) -> None:
    def variant(name: str, size: int, correct: int) -> st.Variant:
        run = st.Run(seed=0, test=st.Accuracy(correct=0, total=1), held_out=st.Accuracy(correct=correct, total=100))
        measurement = st.Measurement(params=size, bytes=4 * size, macs=size)
        return st.Variant(name=name, stage="zero-shot", measurement=measurement, runs=(run,))

    variants = [variant(str(size), size, correct) for size, correct in candidates]
    chosen, because = choose(variant("dense", 100, 95), variants, tolerance=0.05)
    assert chosen.name == str(chosen_size)
    assert ("larger than it" in because) == ((41, 94) in candidates)
