"""The results of a study: its networks tested and timed, the one to keep, what changed, and the words of the report."""

import itertools
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version

import numpy as np
import torch
from torch import Tensor, nn

from spectrim.benchmark.measurement import Measurement, accuracy, count, measure, measure_each
from spectrim.core.errors import DependencyError
from spectrim.recipes.images import Batch, Images, Split
from spectrim.recipes.seed import Network, SeedResult, file_name
from spectrim.recipes.study import ProgressReporter, Study
from spectrim.reporting import Results, Run, Variant, words
from spectrim.reporting.pixels import png_text
from spectrim.reporting.results import Agreement, Changes, ClassChange, Flipped, Kind
from spectrim.runtimes.sessions import RuntimeName, require_runtime
from spectrim.training.checkpoint import fingerprint

_AS_SMALL = 1.05
"""Networks of at most so many times the parameters of the smallest count as no larger."""


def require_runtimes(names: Sequence[RuntimeName]) -> tuple[RuntimeName, ...]:
    """The runtimes asked for; for none, torch, and ONNX Runtime where it is installed.

    Raises `EngineError` or `DependencyError` for one that was asked for and cannot be had.
    """
    if names:
        return tuple(require_runtime(name).name for name in names)
    try:
        return "torch", require_runtime("onnxruntime").name
    except DependencyError:
        return ("torch",)


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The networks of a study on the test set, and their times in every runtime, the first one for the table."""

    study: Study
    images: Images
    runtimes: tuple[RuntimeName, ...]
    progress: ProgressReporter

    def results(self, seeds: Sequence[SeedResult], *, start: float) -> Results:
        """Test and time all networks, and choose one; `start` is the time when the run began."""
        study, first = self.study, seeds[0]
        dense, *variants = self.variants(seeds)
        chosen, because = choose(dense, variants, tolerance=study.tolerance)
        remark = study.remark(self.images, first.dense.model, variants)
        index = variants.index(chosen)
        pairs = {seed.seed: (seed.dense.model, seed.networks[index].model) for seed in seeds}
        return Results(
            title=study.title,
            summary=summarise(dense, chosen, remark=remark, quick=study.is_quick),
            dense=dense,
            variants=tuple(variants),
            chosen=chosen.name,
            chosen_because=because,
            spectra=first.spectra,
            published=tuple(figures.for_report() for figures in study.published),
            changes=changes_of(chosen.name, pairs, self.images),
            command=study.command,
            provenance=self._provenance(time.perf_counter() - start),
        )

    def variants(self, seeds: Sequence[SeedResult]) -> list[Variant]:
        """Open the test set, once for every network, and time those of the first seed; the dense one comes first."""
        tests, dense, networks = self.images.test.batches(), seeds[0].dense, seeds[0].networks
        # networks of the same shapes take the same time
        shapes = {network.name: fingerprint(network.model)["network"] for network in networks}
        first_of = {shape: name for name, shape in reversed(shapes.items())}
        distinct = {network.name: network.model for network in networks if network.name in first_of.values()}
        timed_as = {dense.name: dense.name, **{name: first_of[shape] for name, shape in shapes.items()}}
        done, of = itertools.count(), len(distinct) * len(self.runtimes) + len(timed_as)

        def note(text: str) -> None:
            self.progress.update(text, next(done), of)

        measured = {dense.name: self.measure(dense.model), **self.measure_against(dense.model, distinct, note=note)}
        variants = []
        for row in zip(*((seed.dense, *seed.networks) for seed in seeds), strict=True):
            network = row[0]
            note(network.name)
            measurement, *others = measured[timed_as[network.name]]
            variants.append(
                Variant(
                    name=network.name,
                    stage=network.stage,
                    measurement=measurement,
                    rule=network.rule,
                    metric=network.metric,
                    plan=network.plan,
                    runs=tuple(self._run(seed.seed, each, tests) for seed, each in zip(seeds, row, strict=True)),
                    in_runtimes=tuple(others),
                )
            )
        return variants

    def _run(self, seed: int, network: Network, tests: Sequence[Batch]) -> Run:
        model, reference = network.model, network.reference
        return Run(
            seed=seed,
            test=accuracy(model, tests),
            held_out=network.held_out,
            curve=network.curve,
            agreement=None if reference is None else _agreement(model, reference, self.images.test),
            model=model_file(network.name, seed),
        )

    def measure(self, model: nn.Module) -> list[Measurement]:
        """The model by itself in every runtime; its MACs are those of one image."""
        example = self.images.test.example(self.study.latency_batch)
        return self._per_image(model, [measure(model, example, runtime=runtime) for runtime in self.runtimes])

    def measure_against(
        self, dense: nn.Module, networks: Mapping[str, nn.Module], *, note: Callable[[str], object]
    ) -> dict[str, list[Measurement]]:
        """By name the networks in every runtime, compared with `dense`; `note` is called before each is timed."""
        names, models = list(networks), list(networks.values())
        example, timings = self.images.test.example(self.study.latency_batch), []
        for runtime in self.runtimes:

            def on_model(position: int, runtime: str = runtime) -> None:
                note(f"timing {names[position]} in {runtime}")

            timings.append(measure_each(models, example, reference=dense, runtime=runtime, on_model=on_model))
        by_network = zip(networks.items(), zip(*timings, strict=True), strict=True)
        return {name: self._per_image(model, measured) for (name, model), measured in by_network}

    def _per_image(self, model: nn.Module, measured: Iterable[Measurement]) -> list[Measurement]:
        update = {"macs": count(model, self.images.test.example()).macs, "batch": self.study.latency_batch}
        return [measurement.model_copy(update=update) for measurement in measured]

    def _provenance(self, seconds: float) -> dict[str, str]:
        """Versions, machine, data and settings, for the foot of the report."""
        study, images, batch = self.study, self.images, self.study.latency_batch
        at_once = "one image at a time" if batch == 1 else f"batches of {batch} images"
        how = "one thread, median of interleaved pairs with its 95 % interval"
        return {
            **versions(),
            "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, "
            f"{torch.backends.cpu.get_cpu_capability()}, {words.threads(torch.get_num_threads())}",
            "seeds": ", ".join(map(str, study.seeds)),
            "data": f"{study.dataset} from {images.source}; {len(images.train)} training, {len(images.held_out)} "
            f"held-out and {len(images.test)} test images",
            "data checksum (sha256)": images.checksum,
            "settings": study.model_dump_json(exclude={"published", "title", "name", "command"}, exclude_none=True),
            "timing": f"{at_once}, {how}, in {', '.join(self.runtimes)}",
            "finished": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "took": f"{seconds:.0f} s (parts found on disk not counted)",
        }


def _agreement(model: nn.Module, reference: nn.Module, test: Split) -> Agreement:
    logits, expected = test.logits(model), test.logits(reference)
    return Agreement(
        largest_difference=float((logits - expected).abs().max()),
        largest_logit=float(expected.abs().max()),
        equal=int((logits.argmax(dim=1) == expected.argmax(dim=1)).sum()),
        of=len(logits),
    )


def model_file(name: str, seed: int) -> str:
    """Where in a run's folder a network lies."""
    return f"models/seed{seed}/{file_name(name)}.safetensors"


def choose(dense: Variant, variants: Sequence[Variant], *, tolerance: float) -> tuple[Variant, str]:
    """The smallest network within the tolerance of dense on held-out images, or the best one if none is, and why.

    Of networks of about the same size the more accurate one is taken.
    """

    def held_out(variant: Variant) -> float:
        return statistics.fmean(run.held_out.value for run in variant.runs if run.held_out)

    close = [variant for variant in variants if held_out(variant) >= held_out(dense) - tolerance]
    if not close:
        because = "the most accurate on held-out training images; none came within the tolerance of dense"
        return max(variants, key=held_out), because
    smallest = min(variant.measurement.params for variant in close)
    as_small = [variant for variant in close if variant.measurement.params <= _AS_SMALL * smallest]
    chosen = max(as_small, key=lambda variant: (held_out(variant), -variant.measurement.params))
    because = f"the smallest within {100 * tolerance:g} points of dense on held-out training images"
    if any(variant.measurement.params > smallest for variant in as_small):
        because += f"; of those at most {100 * (_AS_SMALL - 1):.0f} % larger than it, the most accurate there"
    return chosen, because


def summarise(dense: Variant, chosen: Variant, *, remark: str = "", quick: bool = False) -> str:
    """What was compressed and what came out, for somebody who has not read the code."""
    before, after = dense.measurement, chosen.measurement
    at_once = "one image at a time" if after.batch in (None, 1) else f"{after.batch} images at a time"
    gain = after.speedup.value if after.speedup else 1.0
    speeds = {
        "faster": f", {gain:.{1 if gain > 1.1 else 2}f}x faster {at_once}",
        "slower": f", {gain:.2f}x as fast {at_once}",
        "no difference": f", as fast as before {at_once}",
        "too noisy to tell": f", {gain:.1f}x as fast {at_once} (the machine is too noisy to say more)",
    }
    speed = speeds[after.verdict] if after.verdict else ""
    times = before.params / after.params
    size = f"{times:.1f}x smaller" if times >= 1.05 else "hardly smaller" if times > 1 else "no smaller"
    agreement = chosen.runs[0].agreement
    sentences = (
        "A quick look with little data and few epochs: these are not the figures of the study." if quick else "",
        f"A network of {before.params:,} parameters that is right on {100 * (dense.accuracy or 0):.2f} % of the test "
        f"images became one of {after.params:,} that is right on {100 * (chosen.accuracy or 0):.2f} %: "
        f"{size}{speed}.",
        words.agreement(agreement) if agreement else "",
        remark,
    )
    return " ".join(filter(None, sentences))


def versions() -> dict[str, str]:
    """Of what decides the figures."""
    return {
        "spectrim": version("spectrim"),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


_MOST_LISTED: Mapping[Kind, int] = {"broken": 24, "mended": 12, "confused": 12}
"""Images of each kind that a report holds, broken ones first. In colour, 32 pixels wide, they come to 150 kB."""


class _Predictions:
    """Of two networks for the test images: the probabilities (N, classes) and classes (N,) of both."""

    def __init__(self, dense: nn.Module, small: nn.Module, images: Images) -> None:
        self.labels = images.test.labels
        self.dense, self.small = (images.test.logits(model).softmax(dim=1) for model in (dense, small))
        self.before, self.after = self.dense.argmax(dim=1), self.small.argmax(dim=1)
        right, right_after = self.before == self.labels, self.after == self.labels
        # which images count where, bool (N,) by the fields of a `Tally`
        self.masks = {
            "total": self.labels >= 0,
            "before": right,
            "broken": right & ~right_after,
            "mended": ~right & right_after,
            "confused": ~right & ~right_after & (self.before != self.after),
        }

    def counts(self, classes: int) -> Tensor:
        """Of every class, int64 (masks, classes)."""
        return torch.stack([torch.bincount(self.labels[mask], minlength=classes) for mask in self.masks.values()])

    def flipped(self, images: Images) -> Iterator[Flipped]:
        """The images to show: of each kind the largest changes of probability first, of equal ones the first image."""
        change = self.small - self.dense
        # how much more the second network believes in the new class, and how much less in the old one
        moved = (change.gather(1, self.after[:, None]) - change.gather(1, self.before[:, None]))[:, 0]
        for kind, most in _MOST_LISTED.items():
            indices = self.masks[kind].nonzero()[:, 0]
            for index in indices[moved[indices].argsort(descending=True, stable=True)][:most].tolist():
                pixels = images.test.images[index] * images.deviation + images.mean
                yield Flipped(
                    index=index,
                    truth=int(self.labels[index]),
                    before=int(self.before[index]),
                    after=int(self.after[index]),
                    sure_before=round(min(1.0, float(self.dense[index].max())), 4),
                    sure_after=round(min(1.0, float(self.small[index].max())), 4),
                    image=png_text(pixels.round().clamp(0, 255).byte().numpy()),
                )


def changes_of(variant: str, pairs: Mapping[int, tuple[nn.Module, nn.Module]], images: Images) -> Changes:
    """Compare two networks on the test images: by seed, the dense one and the compressed one, named `variant`.

    Counts are summed over the seeds; images are shown of the first.
    """
    predictions = [_Predictions(dense, small, images) for dense, small in pairs.values()]
    columns = torch.stack([each.counts(len(images.names)) for each in predictions]).sum(dim=0).T.tolist()
    classes = tuple(
        ClassChange(name=name, **dict(zip(predictions[0].masks, column, strict=True)))
        for name, column in zip(images.names, columns, strict=True)
    )
    return Changes(variant=variant, seeds=tuple(pairs), classes=classes, flipped=tuple(predictions[0].flipped(images)))
