"""What came out of a study: its networks, the one to keep, and the results to show."""

import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version

import numpy as np
import torch
from torch import nn

from spectrim.analyze import Analysis
from spectrim.execution import evaluating
from spectrim.measure import Accuracy, Epoch, accuracy, measure
from spectrim.plan import Metric, Plan, Rank
from spectrim.recipes.images import Batch, Images
from spectrim.recipes.progress import Teller
from spectrim.report import LayerSpectrum, Run, Variant, words
from spectrim.report.results import Agreement, Stage


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
    rule: Rank | None = None
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


def variants_of(seeds: Sequence[SeedOutcome], images: Images, teller: Teller) -> tuple[Variant, tuple[Variant, ...]]:
    """Open the test set, once for every network, and time the first seed's networks against its dense one."""
    tests, example, first = images.test.batches(), images.test.images[:1], seeds[0]
    runs = tuple(
        Run(seed=one.seed, test=accuracy(one.dense, tests), held_out=one.held_out, curve=one.curve) for one in seeds
    )
    dense = Variant(name="dense", stage="dense", measurement=measure(first.dense, example), runs=runs)
    variants = []
    for index, network in enumerate(first.networks):
        teller.tell(index, of=len(first.networks), note=network.name)
        same = [one.networks[index] for one in seeds]
        runs = tuple(_run(one.seed, each, tests) for one, each in zip(seeds, same, strict=True))
        variants.append(
            Variant(
                name=network.name,
                stage=network.stage,
                measurement=measure(network.model, example, reference=first.dense),
                rule=network.rule,
                metric=network.metric,
                plan=network.plan,
                runs=runs,
            )
        )
    return dense, tuple(variants)


def _run(seed: int, network: Network, tests: Sequence[Batch]) -> Run:
    return Run(
        seed=seed,
        test=accuracy(network.model, tests),
        held_out=network.held_out,
        curve=network.curve,
        agreement=None if network.reference is None else _agreement(network.model, network.reference, tests),
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
    """The smallest network within the tolerance of dense on held-out training images; the best one if none is."""
    means = [
        statistics.fmean(one.networks[index].held_out.value for one in seeds) for index in range(len(seeds[0].networks))
    ]
    dense = statistics.fmean(one.held_out.value for one in seeds)
    networks = list(zip(seeds[0].networks, means, strict=True))
    close = [(network, mean) for network, mean in networks if mean >= dense - tolerance]
    if not close:
        best = max(networks, key=lambda pair: pair[1])[0]
        return best, "the most accurate on held-out training images; none came within the tolerance of dense"
    smallest = min(close, key=lambda pair: (_size(pair[0].model), -pair[1]))[0]
    return smallest, f"the smallest within {100 * tolerance:g} points of dense on held-out training images"


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def summarise(dense: Variant, chosen: Variant) -> str:
    """What was compressed and what came out, for somebody who has not read the code."""
    before, after = dense.measurement, chosen.measurement
    speed = f", {after.speedup.value:.1f}x faster one image at a time" if after.speedup else ""
    agreement = chosen.runs[0].agreement
    return (
        f"A network of {before.params:,} parameters that is right on {100 * (dense.accuracy or 0):.2f} % of the test "
        f"images became one of {after.params:,} that is right on {100 * (chosen.accuracy or 0):.2f} %: "
        f"{before.params / after.params:.1f}x smaller{speed}." + (f" {words.agreement(agreement)}" if agreement else "")
    )


def spectra_of(analysis: Analysis) -> tuple[LayerSpectrum, ...]:
    """Every singular value of the analysis."""
    return tuple(
        LayerSpectrum(
            layer=layer.name, kind=layer.kind, shape=layer.shape, metric=metric, values=tuple(spectrum.values.tolist())
        )
        for layer in analysis
        for metric, spectrum in layer.spectra.items()
    )


def provenance_of(
    images: Images, *, dataset: str, seeds: Sequence[int], settings: str, seconds: float
) -> dict[str, str]:
    """Versions, machine, data and settings, for the foot of the report."""
    return {
        "spectrim": version("spectrim"),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, "
        f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
        "seeds": ", ".join(map(str, seeds)),
        "data": f"{dataset} from {images.source}; {len(images.train)} training, {len(images.held_out)} held-out "
        f"and {len(images.test)} test images",
        "data checksum (sha256)": images.checksum,
        "settings": settings,
        "timing": "one image at a time, one thread, median of interleaved pairs with its 95 % interval",
        "finished": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "took": f"{seconds:.0f} s (parts found on disk not counted)",
    }
