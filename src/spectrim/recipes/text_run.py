"""A study of texts from its folders to its report: every compressed model is a folder that loads, and a part."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import nn

from spectrim.benchmark.fidelity import Fidelity
from spectrim.benchmark.measurement import Measurement, count
from spectrim.benchmark.scores import Score, evaluate
from spectrim.compression import compress
from spectrim.core.errors import FileError
from spectrim.core.files import FrozenFile, write_text
from spectrim.core.memory import peak_gb
from spectrim.export.folders import save_folder
from spectrim.layers.cost import count_macs
from spectrim.models.folders import CONFIG, load_pretrained, require_length
from spectrim.recipes.results import versions
from spectrim.recipes.run import PARTS, PLAN, RECIPE, RESULTS, RunFolder
from spectrim.recipes.study import ProgressCallback, ProgressReporter, key_of
from spectrim.recipes.texts import Texts, TextStudy
from spectrim.reporting import words
from spectrim.reporting.cards import write_model_card
from spectrim.reporting.listings import Column, Listing, listing
from spectrim.runtimes.timing import Interval
from spectrim.training.checkpoint import fingerprint

REPORT = "report.md"


class ScoredModel(FrozenFile):
    """One model of a study: the dense one, or a compressed one.

    Attributes:
        name: As in tables.
        key: A hash of everything that decides it.
        share: Of the budget; None for the dense one.
        seed: Of the choice of calibration samples.
        folder: Where it lies in the run's folder.
        measurement: Counted costs; MACs are those of one batch.
        fidelity: How near its outputs are to the dense model's, on calibration samples.
        held_out: Its score on held-out data, `test` on test data.
        held_out_difference: Less the dense model's score, on the same examples; `test_difference` likewise.
        seconds: That compressing took, on the wall; `cpu_seconds` in processor time.
        peak_gb: The most memory (2^30 bytes) that the process had held by then.
    """

    name: str
    key: str
    share: float | None = None
    seed: int | None = None
    folder: str | None = None
    measurement: Measurement
    fidelity: Fidelity | None = None
    held_out: Score
    test: Score
    held_out_difference: Interval | None = None
    test_difference: Interval | None = None
    seconds: float | None = None
    cpu_seconds: float | None = None
    peak_gb: float | None = None


class TextResults(FrozenFile):
    """Every number of a study of texts; the dense model comes first."""

    version: Literal[1] = 1
    title: str
    dataset: str
    command: str
    models: tuple[ScoredModel, ...]
    provenance: dict[str, str]

    def table(self) -> Listing:
        """A row for each model, with 95 % intervals over the choice of examples."""
        score = self.models[0].test.metric

        def interval(value: Interval | None) -> str:
            text = "" if value is None else f"{value.value:.4g} [{value.low:.4g}, {value.high:.4g}]"
            return words.Cell(text, value.value if value else None)

        columns: dict[Column, Callable[[ScoredModel], str]] = {
            Column("Model", number=False): lambda model: model.name,
            Column("MACs\nkept", 1): lambda model: words.share(model.measurement.macs_ratio),
            Column("Params\nkept", 1): lambda model: words.share(model.measurement.params_ratio),
            Column(f"{score.capitalize()}\ntest"): lambda model: interval(model.test.interval),
            Column("Less dense\ntest"): lambda model: interval(model.test_difference),
            Column(f"{score.capitalize()}\nheld out", 2): lambda model: interval(model.held_out.interval),
            Column("Less dense\nheld out", 2): lambda model: interval(model.held_out_difference),
            Column("CPU s", 3): lambda model: "" if model.cpu_seconds is None else f"{model.cpu_seconds:.0f}",
            Column("Peak\nGB", 3): lambda model: "" if model.peak_gb is None else f"{model.peak_gb:.2f}",
        }
        note = f"In brackets: 95 % intervals over the choice of {self.models[0].test.examples:,} test examples."
        return listing(self.title, self.models, columns, note=note)


@dataclass(frozen=True, eq=False)
class _Run:
    """A run under way: `source` is the folder of the dense model, which `network` holds."""

    study: TextStudy
    out: Path
    source: Path
    network: nn.Module
    texts: Texts
    key: str
    progress: ProgressReporter

    def part(self, name: str, make: Callable[[str], ScoredModel], **settings: object) -> ScoredModel:
        """The model as it lies on disk, if everything that decides it is the same; otherwise made and noted."""
        path, key = self.out / PARTS / f"{name}.json", key_of(key=self.key, **settings)
        self.progress.begin(name)
        with suppress(FileError):  # absent or damaged: it is made again
            stored = ScoredModel.load(path)
            if stored.key == key and (stored.folder is None or (self.out / stored.folder / CONFIG).is_file()):
                return stored
        model = make(key)
        model.save(path)
        return model

    def scores(self, network: nn.Module) -> tuple[Score, Score]:
        """On held-out and on test data."""
        held_out, test = (self._each(batches) for batches in (self.texts.held_out, self.texts.test))
        return evaluate(network, held_out, self.study.score), evaluate(network, test, self.study.score)

    def _each(self, batches: Sequence[Any]) -> Iterator[Any]:
        for done, batch in enumerate(batches):
            self.progress.update("score", done, len(batches))
            yield batch

    def dense(self, key: str) -> ScoredModel:
        """The model that the folder holds."""
        cost = count(self.network, self.calibration(0)[0])
        held_out, test = self.scores(self.network)
        return ScoredModel(name="dense", key=key, measurement=cost.against(cost), held_out=held_out, test=test)

    def calibration(self, seed: int) -> list[Any]:
        """The batches that the seed chooses."""
        return self.texts.calibration(self.study.samples, batch=self.study.batch, seed=seed)

    def compressed(self, key: str, *, name: str, share: float, seed: int, dense: ScoredModel) -> ScoredModel:
        """A folder with the model at a share of the budget, scored."""
        study, data, folder = self.study, self.calibration(seed), f"models/{name}"
        wall, cpu = time.perf_counter(), time.process_time()
        small = compress(
            self.network,
            study.rule(share),
            example_inputs=data[0],
            data=data,
            metric=study.metric,
            on_progress=self.progress.update,
        )
        seconds, cpu_seconds, peak = time.perf_counter() - wall, time.process_time() - cpu, peak_gb()
        held_out, test = self.scores(small.model)
        model = getattr(small.model, "encoder", small.model)
        save_folder(model, self.out / folder, source=self.source)
        small.plan.save(self.out / folder / PLAN)
        titles = {f"{study.dataset}, test": test, "dense": dense.test, f"{study.dataset}, held out": held_out}
        write_model_card(model, self.out / folder, fidelity=small.fidelity, scores=titles)
        return ScoredModel(
            name=name,
            key=key,
            share=share,
            seed=seed,
            folder=folder,
            measurement=small.measurement,
            fidelity=small.fidelity,
            held_out=held_out,
            test=test,
            held_out_difference=held_out.against(dense.held_out),
            test_difference=test.against(dense.test),
            seconds=seconds,
            cpu_seconds=cpu_seconds,
            peak_gb=peak,
        )

    def models(self) -> Iterator[ScoredModel]:
        """The dense model, and one for every seed and share."""
        study = self.study
        dense = self.part("dense", self.dense)
        yield dense
        for seed in study.seeds:
            for share in study.shares:
                name = f"{100 * share:g}-percent-seed{seed}"
                make = partial(self.compressed, name=name, share=share, seed=seed, dense=dense)
                yield self.part(name, make, share=share, seed=seed)


def run_text_study(
    study: TextStudy,
    out: Path,
    *,
    data_folder: Path | None = None,
    on_progress: ProgressCallback | None = None,
    on_network: Callable[[int], object] | None = None,
) -> TextResults:
    """Compress the model to every share with every seed, score all of them, and write everything to a folder.

    `out` then holds `models/..`, each a folder that `from_pretrained` reads once spectrim is imported, with its plan
    and a model card; `recipe.toml`, `results.json`, `report.md`, and `run.json` with the checksum of every file. The
    same call resumes an interrupted run after the last model that was finished. Progress is reported as by
    `run_study`, and `on_network` called with the MACs of a batch.

    Raises, before anything is compressed, `ModelError`, `DataError` or `FileError` for folders that are missing or do
    not have what the study needs, and `FileError` where `out` holds the run of another recipe.
    """
    source, data = study.require_folders(data_folder)
    folder = RunFolder(Path(out))
    folder.require_free(study)
    progress = ProgressReporter(on_progress, parts=3 + len(study.seeds) * len(study.shares))
    progress.begin(f"reading {source}")
    model = load_pretrained(source)
    require_length(model, study.length, option="length =")
    texts = study.texts(source, data)
    network = study.network(model, source).eval()
    macs = count_macs(network, texts.calibration(study.samples, batch=study.batch, seed=study.seeds[0])[0])
    folder.claim(study)
    if on_network is not None:
        on_network(macs)
    settings = study.model_dump(mode="json", include={"files", "budget", "of", "metric", "samples", "length", "batch"})
    key = key_of(weights=fingerprint(model), data=study.checksums(data), scored=study.scored, **settings)
    models = tuple(_Run(study, folder.path, source, network, texts, key, progress).models())
    progress.begin("writing")
    results = TextResults(
        title=study.title,
        dataset=study.dataset,
        command=study.command,
        models=models,
        provenance={
            **versions(),
            "model": str(source),
            "data checksums (sha256)": ", ".join(study.checksums(data)),
            "settings": study.model_dump_json(exclude={"title", "name", "command"}, exclude_none=True),
            "finished": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        },
    )
    folder.note(study, _write(results, folder.path), source=str(data), data=study.checksums(data))
    progress.end()
    return results


def _write(results: TextResults, out: Path) -> list[str]:
    """The numbers, and a page of them; the names of all files of the run."""
    results.save(out / RESULTS)
    table = "\n".join(f"    {line}".rstrip() for line in results.table().text(width=200).splitlines())
    notes = "\n".join(f"- {name}: {value}" for name, value in results.provenance.items())
    fidelity = "\n".join(f"- {model.name}: {model.fidelity}" for model in results.models if model.fidelity)
    parts = (f"# {results.title}", table, "## Outputs", fidelity, "## Made from", f"`{results.command}`", notes)
    write_text(out / REPORT, "\n\n".join(parts) + "\n")
    models = (out / str(model.folder) for model in results.models if model.folder)
    files = [file for folder in models for file in folder.rglob("*") if file.is_file()]
    return [RECIPE, RESULTS, REPORT, *(str(file.relative_to(out)) for file in files)]
