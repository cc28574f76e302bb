"""A finished run, measured again from what lies in its folder."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import nn

from spectrim.benchmark.measurement import Accuracy, Measurement, accuracy, count, measure
from spectrim.core.errors import FileError
from spectrim.core.files import sha256_of
from spectrim.layers.saving import load
from spectrim.recipes.changes import changes_of
from spectrim.recipes.files import read_recipe
from spectrim.recipes.folder import RECIPE, RESULTS, Manifest, RunFolder
from spectrim.recipes.images import Batch, Images
from spectrim.recipes.progress import OnProgress, Teller, silent
from spectrim.recipes.run import images_of
from spectrim.recipes.study import Study
from spectrim.reporting import Changes, Flipped, LayerSpectrum, Results, Run, Variant, words
from spectrim.reporting.results import Tally
from spectrim.runtimes.sessions import fingerprint

Verdict = Literal["ok", "differs", "missing", "altered", "not judged"]

ELSEWHERE = 0.0005
"""Share of the images that another processor or version may classify differently: it rounds differently."""
_DIGITS = 1e-4


@dataclass(frozen=True)
class Check:
    """One thing that was looked at again.

    Attributes:
        what: Such as `rank 20, plain, zero-shot: test accuracy, seed 0`.
        stored: What the folder says.
        found: What came out now.
        verdict: `not judged` for times, which no two runs share.
    """

    what: str
    stored: str
    found: str
    verdict: Verdict

    @property
    def good(self) -> bool:
        """Whether nothing speaks against it."""
        return self.verdict in ("ok", "not judged")


def verify_run(
    folder: Path, *, data_folder: Path | None = None, latency: bool = True, on_progress: OnProgress = silent
) -> tuple[Check, ...]:
    """Measure again what a finished run says of itself.

    Every file must have the checksum that the run noted, the data too. Every saved network is loaded and scored on the
    test set and the held-out training images: exactly as noted on the same kind of machine with the same versions of
    torch, elsewhere up to `ELSEWHERE` of the images (at least 2) may differ; so for what the chosen network answers
    differently from the dense one. Parameters, bytes and MACs must be exactly
    as noted, singular values of the dense network's weights within 0.01 % of the largest. Latency is measured and
    shown, not judged. Training curves cannot be measured again.

    Args:
        folder: Of the run.
        data_folder: Where the data set's files lie, if not in the cache.
        latency: Time the networks as well.
        on_progress: Called after every network.

    Raises:
        FileError: the folder holds no finished run, or its recipe or results cannot be read.
        DataError: the data set cannot be obtained.
    """
    opened = RunFolder(Path(folder))
    manifest = opened.manifest()
    checks = [_file_check(opened.path, name, digest) for name, digest in manifest.files.items()]
    if any(not check.good and check.what in (f"file {RECIPE}", f"file {RESULTS}") for check in checks):
        # what it says cannot be trusted, and may not even be readable
        return tuple(checks)
    study, results = read_recipe(opened.path / RECIPE), Results.load(opened.path / RESULTS)
    images = images_of(study, data_folder)
    checks += [
        _same(f"data, {split} split (sha256)", stored[:16], found[:16], same=stored == found)
        for split, stored, found in zip(("training", "test"), manifest.data, images.checksums, strict=True)
    ]
    again = _Again(
        opened.path, study, images, images.test.batches(), images.held_out.batches(), _slack(manifest), latency
    )
    networks = (results.dense, *results.variants)
    teller = Teller(on_progress, parts=len(networks) + 1)
    for variant in networks:
        teller.begin(variant.name)
        checks += again.variant(variant, results.dense)
    teller.begin("changed answers and spectra")
    checks += again.changes(results)
    checks += again.spectra(results)
    teller.end()
    return tuple(checks)


def _file_check(folder: Path, name: str, digest: str) -> Check:
    if not (folder / name).is_file():
        return Check(f"file {name}", digest[:16], words.NOTHING, "missing")
    found = sha256_of(folder / name)
    return Check(f"file {name}", digest[:16], found[:16], "ok" if found == digest else "altered")


def _slack(manifest: Manifest) -> float | None:
    """The share of images that may differ; None where the run was made on such a machine, so that none may."""
    return None if manifest.machine == fingerprint("torch") else ELSEWHERE


def _same(what: str, stored: str, found: str, *, same: bool) -> Check:
    return Check(what, stored, found, "ok" if same else "differs")


@dataclass(frozen=True, eq=False)
class _Again:
    folder: Path
    study: Study
    images: Images
    tests: list[Batch]
    held_out: list[Batch]
    slack: float | None
    latency: bool

    def variant(self, variant: Variant, dense: Variant) -> Iterator[Check]:
        """Every seed's accuracy, and the first one's costs."""
        for position, run in enumerate(variant.runs):
            try:
                model = self.load(run)
            except FileError as error:
                yield Check(f"{variant.name}: network, seed {run.seed}", run.model or "", str(error), "missing")
                continue
            yield from self._scores(variant, run, model)
            if position == 0:
                yield from self._costs(variant, model)
                yield from self._times(variant, model, dense) if self.latency else ()

    def load(self, run: Run) -> nn.Module:
        """The network of a run."""
        if run.model is None:
            raise FileError("the results do not say where this network lies")
        return load(self.folder / run.model, self.study.network(self.images)).eval()

    def _scores(self, variant: Variant, run: Run, model: nn.Module) -> Iterator[Check]:
        for what, stored, batches in (
            ("test accuracy", run.test, self.tests),
            ("held-out accuracy", run.held_out, self.held_out),
        ):
            if stored is not None:
                found = accuracy(model, batches)
                told = f"{variant.name}: {what}, seed {run.seed}"
                yield _same(told, _shown(stored), _shown(found), same=self._close(stored, found))

    def _close(self, stored: Accuracy, found: Accuracy) -> bool:
        return stored.total == found.total and abs(stored.correct - found.correct) <= self._allowed(stored.total)

    def _allowed(self, images: int) -> int:
        """How many of so many images may be classified differently."""
        return 0 if self.slack is None else max(2, ceil(self.slack * images))

    def _costs(self, variant: Variant, model: nn.Module) -> Iterator[Check]:
        found = count(model, self.images.test.example())
        for name, what in (("params", "parameters"), ("bytes", "bytes"), ("macs", "MACs of one image")):
            stored, now = getattr(variant.measurement, name), getattr(found, name)
            yield _same(f"{variant.name}: {what}", f"{stored:,}", f"{now:,}", same=stored == now)

    def _times(self, variant: Variant, model: nn.Module, dense: Variant) -> Iterator[Check]:
        try:
            reference = None if variant is dense else self.load(dense.runs[0])
        except FileError:
            return  # the dense network has its own line
        stored = variant.measurement
        found = measure(
            model,
            self.images.test.example(self.study.latency_batch),
            reference=reference,
            runtime=stored.runtime or "torch",
            rounds=11,
        )
        yield Check(f"{variant.name}: latency ({stored.runtime})", _time(stored), _time(found), "not judged")

    def changes(self, results: Results) -> Iterator[Check]:
        """What the chosen network answers differently from the dense one, and which images show it."""
        stored = results.changes
        if stored is None:
            return
        small = {run.seed: run for run in results.variant(stored.variant).runs}
        try:
            pairs = {one.seed: (self.load(one), self.load(small[one.seed])) for one in results.dense.runs}
        except FileError:
            return  # the missing network has its own line
        found = changes_of(stored.variant, pairs, self.images)
        yield _same(
            f"{stored.variant}: answers changed",
            _flips(stored.whole),
            _flips(found.whole),
            same=self._alike(stored, found),
        )

    def _alike(self, stored: Changes, found: Changes) -> bool:
        """Whether no count of any class is further off than it may be, and the images shown are those of now.

        Which images move the networks' confidence most is decided by its last digits: a few may be others.
        """
        if [one.name for one in stored.classes] != [one.name for one in found.classes]:
            return False
        counts, again = (
            np.array([(one.total, one.before, one.broken, one.corrected, one.confused) for one in each.classes])
            for each in (stored, found)
        )
        allowed = self._allowed(stored.whole.total)
        shown = {one.index: _shown_answers(one) for one in found.flipped}
        others = [one for one in stored.flipped if shown.get(one.index) != _shown_answers(one)]
        return bool(np.abs(counts - again).max() <= allowed) and len(others) <= max(2, allowed)

    def spectra(self, results: Results) -> Iterator[Check]:
        """The singular values of the weights themselves; those in a data metric need the calibration again."""
        try:
            model = self.load(results.dense.runs[0])
        except FileError:
            return
        for one in results.spectra:
            if one.metric == "plain":
                yield self._spectrum(one, model)

    def _spectrum(self, one: LayerSpectrum, model: nn.Module) -> Check:
        weight = model.get_submodule(one.layer).get_parameter("weight").detach()
        values = torch.linalg.svdvals(weight.flatten(1).double()).numpy()
        stored = np.array(one.values)
        same = len(values) == len(stored) and np.abs(values - stored).max() <= _DIGITS * stored[0]
        return _same(f"spectrum of {one.layer}", f"{stored[0]:.6g} ..", f"{values[0]:.6g} ..", same=bool(same))


def _shown(one: Accuracy) -> str:
    return f"{one.correct:,} of {one.total:,}"


def _shown_answers(one: Flipped) -> tuple[int, int, int, str]:
    return one.truth, one.before, one.after, one.image


def _flips(one: Tally) -> str:
    return f"{one.broken:,} broken, {one.corrected:,} mended, {one.confused:,} confused"


def _time(one: Measurement) -> str:
    speedup = "" if one.speedup is None else f", {words.speedup(one.speedup)}"
    return f"{words.milliseconds(one.latency_ms)}{speedup}"
