"""A finished run, measured again from what lies in its folder."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from math import ceil, isclose
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from spectrim.benchmark.measurement import Measurement, accuracy, count, measure
from spectrim.benchmark.scores import evaluate
from spectrim.core.errors import FileError
from spectrim.core.files import sha256_of
from spectrim.layers.saving import load
from spectrim.models.folders import load_pretrained
from spectrim.recipes.files import read_recipe
from spectrim.recipes.images import Batch, Images
from spectrim.recipes.results import changes_of
from spectrim.recipes.run import RECIPE, RESULTS, Manifest, RunFolder, images_of
from spectrim.recipes.study import ProgressCallback, ProgressReporter, Study
from spectrim.recipes.text_run import TextResults
from spectrim.recipes.texts import TextStudy
from spectrim.reporting import Changes, Results, Run, Variant, words
from spectrim.runtimes.sessions import fingerprint

Verdict = Literal["ok", "differs", "missing", "altered", "not judged"]

ELSEWHERE = 0.0005
"""Share of the images that another processor or version may classify differently: it rounds differently."""
_DIGITS, _SCORE = 1e-4, 1e-4


@dataclass(frozen=True)
class Check:
    """What the folder says of one thing, and what came out now; `not judged` for times, which no two runs share.

    `what` it is reads like `rank 20, plain, zero-shot: test accuracy, seed 0`.
    """

    what: str
    stored: str
    measured: str
    verdict: Verdict

    @property
    def good(self) -> bool:
        """Whether nothing speaks against it."""
        return self.verdict in ("ok", "not judged")


def verify_run(
    folder: Path, *, data_folder: Path | None = None, latency: bool = True, on_progress: ProgressCallback | None = None
) -> tuple[Check, ...]:
    """Measure again what a finished run says of itself.

    Every file must have the checksum that the run noted, the data too. Every saved network is loaded and scored on the
    test set and the held-out training images: exactly as noted on the same kind of machine with the same versions of
    torch, elsewhere up to `ELSEWHERE` of the images (at least 2) may differ; so for what the chosen network predicts
    differently from the dense one. Parameters, bytes and MACs must be exactly as noted, singular values of the dense
    network's weights within 0.01 % of the largest. Latency is measured and shown, not judged, unless it is turned off.
    Training curves cannot be measured again. Of a study of texts, every compressed model is loaded and scored. The data
    set's files lie in `data_folder`, if not in the cache.

    Raises `FileError` for a folder that holds no finished run, or whose recipe or results cannot be read, and
    `DataError` where the data set cannot be obtained.
    """
    run_folder = RunFolder(Path(folder))
    manifest = run_folder.manifest()
    checks = []
    for name, digest in manifest.files.items():
        now = sha256_of(run_folder.path / name) if (run_folder.path / name).is_file() else None
        verdict: Verdict = "missing" if now is None else "ok" if now == digest else "altered"
        checks.append(Check(f"file {name}", digest[:16], now[:16] if now else words.NOTHING, verdict))
    if any(not check.good and check.what in (f"file {RECIPE}", f"file {RESULTS}") for check in checks):
        return tuple(checks)  # what it says cannot be trusted, and may not even be readable
    recipe = read_recipe(run_folder.path / RECIPE)
    if isinstance(recipe, TextStudy):
        data = Path(manifest.source) if data_folder is None else data_folder
        return (*checks, *_text_checks(recipe, run_folder, data, progress=ProgressReporter(on_progress)))
    assert isinstance(recipe, Study)  # there are no others
    study, results = recipe, Results.load(run_folder.path / RESULTS)
    images = images_of(study, data_folder)
    checks += _data_checks(manifest, images.checksums)
    # on the same kind of machine, no image may be classified differently
    tolerance = 0.0 if manifest.machine == fingerprint("torch") else ELSEWHERE
    verifier = _Verifier(run_folder.path, study, images, results, tolerance)
    networks = (results.dense, *results.variants)
    progress = ProgressReporter(on_progress, parts=len(networks) + 1)
    for variant in networks:
        progress.begin(variant.name)
        checks += verifier.variant(variant, latency=latency)
    progress.begin("changed answers and spectra")
    checks += verifier.changes()
    checks += verifier.spectra()
    progress.end()
    return tuple(checks)


def _data_checks(manifest: Manifest, checksums: tuple[str, str]) -> Iterator[Check]:
    for split, stored, now in zip(("training", "test"), manifest.data, checksums, strict=True):
        yield _compared(f"data, {split} split (sha256)", stored[:16], now[:16], same=stored == now)


def _text_checks(study: TextStudy, run: RunFolder, data: Path, *, progress: ProgressReporter) -> Iterator[Check]:
    """The data, and the scores of every compressed model, which hold its tokenizer."""
    results = TextResults.load(run.path / RESULTS)
    models = {model: run.path / model.folder for model in results.models if model.folder is not None}
    study.require_files(data)
    yield from _data_checks(run.manifest(), study.checksums(data))
    progress.parts = len(models)
    for model, folder in models.items():
        progress.begin(model.name)
        try:
            network = study.network(load_pretrained(folder), folder)
        except FileError as error:
            yield Check(f"{model.name}: network", str(model.folder), str(error), "missing")
            continue
        texts = study.texts(folder, data)
        splits = (("test", model.test, texts.test), ("held-out", model.held_out, texts.held_out))
        for what, stored, batches in splits:
            now = evaluate(network, batches, study.score)
            same = isclose(stored.value, now.value, rel_tol=_SCORE) and stored.examples == now.examples
            yield _compared(f"{model.name}: {what} {study.score}", f"{stored.value:.6g}", f"{now.value:.6g}", same=same)
    progress.end()


def _compared(what: str, stored: str, now: str, *, same: bool) -> Check:
    return Check(what, stored, now, "ok" if same else "differs")


@dataclass(frozen=True, eq=False)
class _Verifier:
    folder: Path
    study: Study
    images: Images
    results: Results
    tolerance: float

    @cached_property
    def batches(self) -> tuple[list[Batch], list[Batch]]:
        """Test images and held-out training images."""
        return self.images.test.batches(), self.images.held_out.batches()

    def load(self, run: Run) -> nn.Module:
        """The network of a run."""
        if run.model is None:
            raise FileError("the results do not say where this network lies")
        return load(self.folder / run.model, self.study.dense_network(self.images)).eval()

    def allowed(self, images: int) -> int:
        """How many of so many images may be classified differently."""
        return max(2, ceil(self.tolerance * images)) if self.tolerance else 0

    def variant(self, variant: Variant, *, latency: bool) -> Iterator[Check]:
        """Every seed's accuracy, and the first one's costs."""
        for run in variant.runs:
            try:
                model = self.load(run)
            except FileError as error:
                yield Check(f"{variant.name}: network, seed {run.seed}", run.model or "", str(error), "missing")
                continue
            for what, stored, batches in zip(("test", "held-out"), (run.test, run.held_out), self.batches, strict=True):
                if stored is not None:
                    now = accuracy(model, batches)
                    close = abs(stored.correct - now.correct) <= self.allowed(stored.total)
                    name = f"{variant.name}: {what} accuracy, seed {run.seed}"
                    shares = [f"{each.correct:,} of {each.total:,}" for each in (stored, now)]
                    yield _compared(name, *shares, same=close and stored.total == now.total)
            if run is variant.runs[0]:
                yield from self._costs(variant, model)
                yield from self._latency(variant, model) if latency else ()

    def _costs(self, variant: Variant, model: nn.Module) -> Iterator[Check]:
        counted = count(model, self.images.test.example())
        for name, what in (("params", "parameters"), ("bytes", "bytes"), ("macs", "MACs of one image")):
            stored, now = getattr(variant.measurement, name), getattr(counted, name)
            yield _compared(f"{variant.name}: {what}", f"{stored:,}", f"{now:,}", same=stored == now)

    def _latency(self, variant: Variant, model: nn.Module) -> Iterator[Check]:
        stored, dense = variant.measurement, self.results.dense
        example = self.images.test.example(self.study.latency_batch)
        with suppress(FileError):  # a missing dense network has its own line
            reference = None if variant is dense else self.load(dense.runs[0])
            now = measure(model, example, reference=reference, runtime=stored.runtime or "torch", rounds=11)
            yield Check(f"{variant.name}: latency ({stored.runtime})", _times(stored), _times(now), "not judged")

    def changes(self) -> Iterator[Check]:
        """What the chosen network predicts differently from the dense one, and which images show it."""
        stored = self.results.changes
        if stored is None:
            return
        small = {run.seed: run for run in self.results.variant(stored.variant).runs}
        with suppress(FileError):  # a missing network has its own line
            pairs = {run.seed: (self.load(run), self.load(small[run.seed])) for run in self.results.dense.runs}
            now = changes_of(stored.variant, pairs, self.images)
            name, same = f"{stored.variant}: answers changed", self._similar(stored, now)
            tallies = [
                f"{tally.broken:,} broken, {tally.corrected:,} mended, {tally.confused:,} confused"
                for tally in (stored.whole, now.whole)
            ]
            yield _compared(name, *tallies, same=same)

    def _similar(self, stored: Changes, now: Changes) -> bool:
        """Whether no count of any class is further off than it may be, and the same images are shown.

        Which images change the networks' confidence most is decided by its last digits: a few may be others.
        """
        if [tally.name for tally in stored.classes] != [tally.name for tally in now.classes]:
            return False
        (counts, images), (counts_now, images_now) = map(_counts_and_images, (stored, now))
        allowed = self.allowed(stored.whole.total)
        others = [image for image in images if image not in images_now]
        return bool(np.abs(counts - counts_now).max() <= allowed) and len(others) <= max(2, allowed)

    def spectra(self) -> Iterator[Check]:
        """The singular values of the weights themselves; those in a data metric need the calibration again."""
        with suppress(FileError):
            model = self.load(self.results.dense.runs[0])
            for spectrum in self.results.spectra:
                if spectrum.metric == "plain":
                    weight = model.get_submodule(spectrum.layer).get_parameter("weight").detach()
                    stored, now = np.array(spectrum.values), torch.linalg.svdvals(weight.flatten(1).double()).numpy()
                    same = len(now) == len(stored) and bool(np.abs(now - stored).max() <= _DIGITS * stored[0])
                    name = f"spectrum of {spectrum.layer}"
                    yield _compared(name, f"{stored[0]:.6g} ..", f"{now[0]:.6g} ..", same=same)


def _counts_and_images(changes: Changes) -> tuple[NDArray[np.int64], list[dict[str, object]]]:
    """The counts of every class, and the images to show without the networks' confidence."""
    counts = np.array([list(tally.model_dump(exclude={"name"}).values()) for tally in changes.classes])
    return counts, [image.model_dump(exclude={"sure_before", "sure_after"}) for image in changes.flipped]


def _times(measured: Measurement) -> str:
    speedup = "" if measured.speedup is None else f", {words.speedup(measured.speedup)}"
    return f"{words.milliseconds(measured.latency_ms)}{speedup}"
