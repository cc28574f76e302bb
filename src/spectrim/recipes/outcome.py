"""What came out of a study: its networks, the one to keep, and the results to show."""

import itertools
import os
import platform
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version

import numpy as np
import torch
from torch import nn

from spectrim.benchmark.measurement import Accuracy, Epoch, Measurement, accuracy, count, measure, measure_each
from spectrim.core.errors import DependencyError
from spectrim.core.execution import evaluating
from spectrim.core.plans import Metric, Plan, Rule
from spectrim.recipes.images import Batch, Images
from spectrim.recipes.progress import Teller
from spectrim.reporting import LayerSpectrum, Run, Variant, words
from spectrim.reporting.results import Agreement, Stage
from spectrim.runtimes.sessions import RuntimeName, require_runtime
from spectrim.training.checkpoint import fingerprint

_AS_SMALL = 1.05
"""Networks of at most so many times the parameters of the smallest count as no larger."""


@dataclass(frozen=True, eq=False)
class Network:
    """One compressed network of one seed.

    Attributes:
        name: Unique within a study.
        stage: What has been done to it.
        model: Ready to be saved.
        held_out: Accuracy on held-out training images.
        curve: Of its training, if any.
        rule: What was asked of every layer.
        metric: Of the factorisation, if there was one before training.
        plan: Of the same.
        reference: The network as it was trained, if `model` has been made from it and should answer the same.
    """

    name: str
    stage: Stage
    model: nn.Module
    held_out: Accuracy
    curve: tuple[Epoch, ...] = ()
    rule: Rule | None = None
    metric: Metric | None = None
    plan: Plan | None = None
    reference: nn.Module | None = None


@dataclass(frozen=True, eq=False)
class SeedOutcome:
    """Everything one seed produced before the test set is opened."""

    seed: int
    dense: nn.Module
    held_out: Accuracy
    curve: tuple[Epoch, ...]
    networks: tuple[Network, ...]
    spectra: tuple[LayerSpectrum, ...] = ()


@dataclass(frozen=True)
class Timing:
    """How the networks of a study are timed: in which runtimes, the first one for the table, and how many at a time."""

    runtimes: tuple[RuntimeName, ...]
    batch: int

    @classmethod
    def of(cls, runtimes: Sequence[RuntimeName], *, batch: int) -> "Timing":
        """The runtimes asked for; for none, torch, and ONNX Runtime where it is installed.

        Raises:
            EngineError, DependencyError: one that was asked for cannot be had.
        """
        if runtimes:
            return cls(tuple(require_runtime(name) for name in runtimes), batch)
        try:
            return cls(("torch", require_runtime("onnxruntime")), batch)
        except DependencyError:
            return cls(("torch",), batch)

    @property
    def words(self) -> str:
        """For the foot of a report."""
        images = "one image at a time" if self.batch == 1 else f"batches of {self.batch} images"
        return (
            f"{images}, one thread, median of interleaved pairs with its 95 % interval, in {', '.join(self.runtimes)}"
        )

    def measure(self, model: nn.Module, images: Images) -> list[Measurement]:
        """The model by itself in every runtime; its MACs are those of one image."""
        example, counted = images.test.example(self.batch), count(model, images.test.example())
        found = (measure(model, example, runtime=runtime) for runtime in self.runtimes)
        return [self._of_one_image(one, counted) for one in found]

    def against(
        self, reference: nn.Module, models: Mapping[str, nn.Module], images: Images, *, told: Callable[[str], object]
    ) -> dict[str, list[Measurement]]:
        """Every model in every runtime, compared with the reference; `told` is called with the name of each."""
        names, networks = list(models), list(models.values())
        counted = [count(model, images.test.example()) for model in networks]
        found: dict[str, list[Measurement]] = {name: [] for name in names}
        for runtime in self.runtimes:

            def tell(position: int, runtime: str = runtime) -> None:
                told(f"timing {names[position]} in {runtime}")

            timed = measure_each(
                networks,
                images.test.example(self.batch),
                reference=reference,
                runtime=runtime,
                on_model=tell,
            )
            for name, one, own in zip(names, timed, counted, strict=True):
                found[name].append(self._of_one_image(one, own))
        return found

    def _of_one_image(self, measured: Measurement, counted: Measurement) -> Measurement:
        return measured.model_copy(update={"macs": counted.macs, "batch": self.batch})


def variants_of(
    seeds: Sequence[SeedOutcome], images: Images, teller: Teller, *, timing: Timing
) -> tuple[Variant, tuple[Variant, ...]]:
    """Open the test set, once for every network, and time the first seed's networks against its dense one."""
    tests, first = images.test.batches(), seeds[0]
    runs = tuple(
        Run(
            seed=one.seed,
            test=accuracy(one.dense, tests),
            held_out=one.held_out,
            curve=one.curve,
            model=model_file("dense", one.seed),
        )
        for one in seeds
    )
    measured, *others = timing.measure(first.dense, images)
    dense = Variant(name="dense", stage="dense", measurement=measured, runs=runs, in_runtimes=tuple(others))
    # networks of the same shapes take the same time
    shapes = {one.name: fingerprint(one.model)["network"] for one in first.networks}
    first_of = {shape: name for name, shape in reversed(shapes.items())}
    distinct = {one.name: one.model for one in first.networks if one.name in first_of.values()}
    done, of = itertools.count(), len(distinct) * len(timing.runtimes) + len(first.networks)
    timed = timing.against(first.dense, distinct, images, told=lambda note: teller.tell(next(done), of=of, note=note))
    variants = []
    for index, network in enumerate(first.networks):
        teller.tell(next(done), of=of, note=network.name)
        same = [one.networks[index] for one in seeds]
        measured, *others = timed[first_of[shapes[network.name]]]
        variants.append(
            Variant(
                name=network.name,
                stage=network.stage,
                measurement=measured,
                rule=network.rule,
                metric=network.metric,
                plan=network.plan,
                runs=tuple(_run(one.seed, each, tests) for one, each in zip(seeds, same, strict=True)),
                in_runtimes=tuple(others),
            )
        )
    return dense, tuple(variants)


def model_file(name: str, seed: int) -> str:
    """Where in a run's folder a network lies."""
    return f"models/seed{seed}/{file_name(name)}.safetensors"


def file_name(name: str) -> str:
    """A network's name as the beginning of a file's."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


def _run(seed: int, network: Network, tests: Sequence[Batch]) -> Run:
    return Run(
        seed=seed,
        test=accuracy(network.model, tests),
        held_out=network.held_out,
        curve=network.curve,
        agreement=None if network.reference is None else _agreement(network.model, network.reference, tests),
        model=model_file(network.name, seed),
    )


def _agreement(model: nn.Module, reference: nn.Module, tests: Sequence[Batch]) -> Agreement:
    with evaluating(model), evaluating(reference):
        ours, theirs = (torch.cat([one(images) for images, _ in tests]) for one in (model, reference))
    return Agreement(
        largest_difference=float((ours - theirs).abs().max()),
        largest_logit=float(theirs.abs().max()),
        equal=int((ours.argmax(dim=1) == theirs.argmax(dim=1)).sum()),
        of=len(ours),
    )


def choose(seeds: Sequence[SeedOutcome], tolerance: float) -> tuple[Network, str]:
    """The smallest network within the tolerance of dense on held-out training images; the best one if none is.

    Of networks of about the same size the more accurate one is kept.
    """
    means = [
        statistics.fmean(one.networks[index].held_out.value for one in seeds) for index in range(len(seeds[0].networks))
    ]
    dense = statistics.fmean(one.held_out.value for one in seeds)
    networks = [(one, mean, _size(one.model)) for one, mean in zip(seeds[0].networks, means, strict=True)]
    close = [each for each in networks if each[1] >= dense - tolerance]
    if not close:
        best = max(networks, key=lambda each: each[1])[0]
        return best, "the most accurate on held-out training images; none came within the tolerance of dense"
    smallest = min(size for _, _, size in close)
    as_small = [each for each in close if each[2] <= _AS_SMALL * smallest]
    kept = max(as_small, key=lambda each: (each[1], -each[2]))[0]
    because = f"the smallest within {100 * tolerance:g} points of dense on held-out training images"
    if any(size > smallest for _, _, size in as_small):
        because += f"; of those at most {100 * (_AS_SMALL - 1):.0f} % larger than it, the most accurate there"
    return kept, because


def pairs_of(seeds: Sequence[SeedOutcome], name: str) -> dict[int, tuple[nn.Module, nn.Module]]:
    """By seed, the dense network and the compressed one of this name."""
    return {one.seed: (one.dense, next(net.model for net in one.networks if net.name == name)) for one in seeds}


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def summarise(dense: Variant, chosen: Variant, *, remark: str = "", quick: bool = False) -> str:
    """What was compressed and what came out, for somebody who has not read the code."""
    before, after = dense.measurement, chosen.measurement
    at_once = "one image at a time" if after.batch in (None, 1) else f"{after.batch} images at a time"
    gain = after.speedup.value if after.speedup else 1.0
    said = {
        "faster": f", {gain:.{1 if gain > 1.1 else 2}f}x faster {at_once}",
        "slower": f", {gain:.2f}x as fast {at_once}",
        "no difference": f", as fast as before {at_once}",
        "too noisy to tell": f", {gain:.1f}x as fast {at_once} on a machine too restless to tell more",
    }
    speed = said[after.verdict] if after.verdict else ""
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


def provenance_of(
    images: Images, *, dataset: str, seeds: Sequence[int], settings: str, timing: Timing, seconds: float
) -> dict[str, str]:
    """Versions, machine, data and settings, for the foot of the report."""
    threads = torch.get_num_threads()
    return {
        **versions(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, "
        f"{torch.backends.cpu.get_cpu_capability()}, {threads} thread{'s' if threads != 1 else ''}",
        "seeds": ", ".join(map(str, seeds)),
        "data": f"{dataset} from {images.source}; {len(images.train)} training, {len(images.held_out)} held-out "
        f"and {len(images.test)} test images",
        "data checksum (sha256)": images.checksum,
        "settings": settings,
        "timing": timing.words,
        "finished": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "took": f"{seconds:.0f} s (parts found on disk not counted)",
    }
