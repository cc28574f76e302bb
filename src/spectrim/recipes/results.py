"""The results of a study: its networks tested and timed, the one to keep, and the words of the report."""

import itertools
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version

import numpy as np
import torch
from torch import nn

from spectrim.benchmark.measurement import Measurement, accuracy, count, measure, measure_each
from spectrim.core.errors import DependencyError
from spectrim.core.execution import evaluating
from spectrim.recipes.changes import changes_of
from spectrim.recipes.images import Batch, Images
from spectrim.recipes.progress import ProgressReporter
from spectrim.recipes.seed import Network, SeedResult, file_name
from spectrim.recipes.study import Study
from spectrim.reporting import Results, Run, Variant, words
from spectrim.reporting.results import Agreement
from spectrim.runtimes.sessions import RuntimeName, require_runtime
from spectrim.training.checkpoint import fingerprint

_AS_SMALL = 1.05
"""Networks of at most so many times the parameters of the smallest count as no larger."""


def require_runtimes(names: Sequence[RuntimeName]) -> tuple[RuntimeName, ...]:
    """The runtimes asked for; for none, torch, and ONNX Runtime where it is installed.

    Raises:
        EngineError, DependencyError: one that was asked for cannot be had.
    """
    if names:
        return tuple(require_runtime(name) for name in names)
    try:
        return "torch", require_runtime("onnxruntime")
    except DependencyError:
        return ("torch",)


def results_of(
    study: Study,
    seeds: Sequence[SeedResult],
    images: Images,
    *,
    runtimes: Sequence[RuntimeName],
    progress: ProgressReporter,
    start: float,
) -> Results:
    """Test and time all networks, and choose one; `start` is the time when the run began."""
    first = seeds[0]
    dense, *variants = _variants(study, seeds, images, runtimes=runtimes, progress=progress)
    chosen, because = choose(seeds, study.tolerance)
    (variant,) = (each for each in variants if each.name == chosen.name)
    remark = study.remark(images, first.dense.model, variants)
    index = first.networks.index(chosen)
    pairs = {seed.seed: (seed.dense.model, seed.networks[index].model) for seed in seeds}
    return Results(
        title=study.title,
        summary=summarise(dense, variant, remark=remark, quick=study.is_quick),
        dense=dense,
        variants=tuple(variants),
        chosen=chosen.name,
        chosen_because=because,
        spectra=first.spectra,
        published=tuple(figures.for_report() for figures in study.published),
        changes=changes_of(chosen.name, pairs, images),
        command=study.command,
        provenance=_provenance(study, images, runtimes=runtimes, seconds=time.perf_counter() - start),
    )


def _variants(
    study: Study,
    seeds: Sequence[SeedResult],
    images: Images,
    *,
    runtimes: Sequence[RuntimeName],
    progress: ProgressReporter,
) -> list[Variant]:
    """Open the test set, once for every network, and time those of the first seed; the dense one comes first."""
    tests, networks = images.test.batches(), seeds[0].networks
    # networks of the same shapes take the same time
    shapes = {network.name: fingerprint(network.model)["network"] for network in networks}
    first_of = {shape: name for name, shape in reversed(shapes.items())}
    distinct = {network.name: network.model for network in networks if network.name in first_of.values()}
    done, of = itertools.count(), len(distinct) * len(runtimes) + len(networks)

    def note(text: str) -> None:
        progress.update(next(done), of=of, note=text)

    batch, dense = study.latency_batch, seeds[0].dense.model
    measured = measure_networks(dense, distinct, images, runtimes=runtimes, batch=batch, on_network=note)
    variants = []
    for row in zip(*((seed.dense, *seed.networks) for seed in seeds), strict=True):
        network = row[0]
        if network.stage == "dense":
            measurement, *others = measured[network.name]
        else:
            note(network.name)
            measurement, *others = measured[first_of[shapes[network.name]]]
        variants.append(
            Variant(
                name=network.name,
                stage=network.stage,
                measurement=measurement,
                rule=network.rule,
                metric=network.metric,
                plan=network.plan,
                runs=tuple(_run(seed.seed, each, tests) for seed, each in zip(seeds, row, strict=True)),
                in_runtimes=tuple(others),
            )
        )
    return variants


def measure_networks(
    dense: nn.Module,
    networks: Mapping[str, nn.Module],
    images: Images,
    *,
    runtimes: Sequence[RuntimeName],
    batch: int,
    on_network: Callable[[str], object],
) -> dict[str, list[Measurement]]:
    """By name, in every runtime: `dense` by itself, and the others compared with it; MACs are those of one image.

    Args:
        dense: The dense network.
        networks: The others by their names.
        images: The data set.
        runtimes: To time them in.
        batch: Images of one timed pass.
        on_network: Called with a note before one of the others is timed.
    """
    example, models, names = images.test.example(batch), {"dense": dense, **networks}, list(networks)
    macs = {name: count(model, images.test.example()).macs for name, model in models.items()}
    measured: dict[str, list[Measurement]] = {name: [] for name in models}
    for runtime in runtimes:

        def on_model(position: int, runtime: str = runtime) -> None:
            on_network(f"timing {names[position]} in {runtime}")

        timings = measure_each(list(networks.values()), example, reference=dense, runtime=runtime, on_model=on_model)
        for name, timing in zip(models, (measure(dense, example, runtime=runtime), *timings), strict=True):
            measured[name].append(timing.model_copy(update={"macs": macs[name], "batch": batch}))
    return measured


def model_file(name: str, seed: int) -> str:
    """Where in a run's folder a network lies."""
    return f"models/seed{seed}/{file_name(name)}.safetensors"


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
        logits, expected = (torch.cat([each(images) for images, _ in tests]) for each in (model, reference))
    return Agreement(
        largest_difference=float((logits - expected).abs().max()),
        largest_logit=float(expected.abs().max()),
        equal=int((logits.argmax(dim=1) == expected.argmax(dim=1)).sum()),
        of=len(logits),
    )


def choose(seeds: Sequence[SeedResult], tolerance: float) -> tuple[Network, str]:
    """The first seed's smallest network within the tolerance of dense on held-out images; the best one if none is.

    Of networks of about the same size the more accurate one is taken. The second value says why.
    """
    by_network = zip(*(seed.networks for seed in seeds), strict=True)
    candidates = [
        (networks[0], statistics.fmean(network.held_out.value for network in networks), _size(networks[0].model))
        for networks in by_network
    ]
    dense = statistics.fmean(seed.dense.held_out.value for seed in seeds)
    close = [candidate for candidate in candidates if candidate[1] >= dense - tolerance]
    if not close:
        best = max(candidates, key=lambda candidate: candidate[1])[0]
        return best, "the most accurate on held-out training images; none came within the tolerance of dense"
    smallest = min(size for _, _, size in close)
    as_small = [candidate for candidate in close if candidate[2] <= _AS_SMALL * smallest]
    chosen = max(as_small, key=lambda candidate: (candidate[1], -candidate[2]))[0]
    because = f"the smallest within {100 * tolerance:g} points of dense on held-out training images"
    if any(size > smallest for _, _, size in as_small):
        because += f"; of those at most {100 * (_AS_SMALL - 1):.0f} % larger than it, the most accurate there"
    return chosen, because


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def summarise(dense: Variant, chosen: Variant, *, remark: str = "", quick: bool = False) -> str:
    """What was compressed and what came out, for somebody who has not read the code."""
    before, after = dense.measurement, chosen.measurement
    at_once = "one image at a time" if after.batch in (None, 1) else f"{after.batch} images at a time"
    gain = after.speedup.value if after.speedup else 1.0
    speeds = {
        "faster": f", {gain:.{1 if gain > 1.1 else 2}f}x faster {at_once}",
        "slower": f", {gain:.2f}x as fast {at_once}",
        "no difference": f", as fast as before {at_once}",
        "too noisy to tell": f", {gain:.1f}x as fast {at_once} on a machine too restless to tell more",
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


def _provenance(study: Study, images: Images, *, runtimes: Sequence[RuntimeName], seconds: float) -> dict[str, str]:
    """Versions, machine, data and settings, for the foot of the report."""
    threads, batch = torch.get_num_threads(), study.latency_batch
    at_once = "one image at a time" if batch == 1 else f"batches of {batch} images"
    how = "one thread, median of interleaved pairs with its 95 % interval"
    return {
        **versions(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, "
        f"{torch.backends.cpu.get_cpu_capability()}, {threads} thread{'s' if threads != 1 else ''}",
        "seeds": ", ".join(map(str, study.seeds)),
        "data": f"{study.dataset} from {images.source}; {len(images.train)} training, {len(images.held_out)} held-out "
        f"and {len(images.test)} test images",
        "data checksum (sha256)": images.checksum,
        "settings": study.model_dump_json(exclude={"published", "title", "name", "command"}, exclude_none=True),
        "timing": f"{at_once}, {how}, in {', '.join(runtimes)}",
        "finished": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "took": f"{seconds:.0f} s (parts found on disk not counted)",
    }
