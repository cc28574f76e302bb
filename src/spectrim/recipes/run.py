"""A study from its data to its report, and the folder that everything goes to."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from spectrim.core.errors import DataError, FileError
from spectrim.core.files import FrozenFile, require_writable_folder, sha256_of, write_text
from spectrim.layers.cost import count_macs
from spectrim.layers.saving import save
from spectrim.recipes.files import read_recipe, recipe_text
from spectrim.recipes.images import Images, load_images
from spectrim.recipes.results import Evaluation, model_file, require_runtimes, versions
from spectrim.recipes.seed import SeedResult, SeedRun
from spectrim.recipes.study import ProgressCallback, ProgressReporter, Recipe, Study
from spectrim.reporting import Results, report
from spectrim.runtimes.sessions import fingerprint

RECIPE, MANIFEST, RESULTS, REPORT = "recipe.toml", "run.json", "results.json", "report.html"
MODEL, PLAN, PARTS = "model.safetensors", "plan.json", "parts"


class Manifest(FrozenFile):
    """What a finished run was made from, and what it wrote.

    `identity` is a hash of the recipe's settings, see `Recipe.identity`. `machine` names the processor, its
    instructions and versions: where these are the same, accuracies repeat exactly. `data` has the SHA-256 of the
    training and the test split, whose files came from `source`; `files` has that of every file of the run, by its path
    in the folder.
    """

    version: Literal[1] = 1
    recipe: str
    identity: str
    seeds: tuple[int, ...]
    versions: dict[str, str]
    machine: str
    dataset: str
    source: str
    data: tuple[str, str]
    files: dict[str, str]


@dataclass(frozen=True)
class RunFolder:
    """A folder that holds one run of one recipe, finished or not."""

    path: Path

    def require_free(self, study: Recipe) -> None:
        """Check that a run of `study` may be written here, and leave everything as it is.

        Raises `FileError` for a folder that cannot be written to, or that holds the run of another recipe.
        """
        if self._is_begun:
            _require_same(self.path, study)
        require_writable_folder(next(path for path in (self.path, *self.path.parents) if path.exists()))

    def claim(self, study: Recipe) -> None:
        """Take the folder for a run of `study`, and note the recipe in it; raises as `require_free` does."""
        self.require_free(study)
        require_writable_folder(self.path)
        if not self._is_begun:
            write_text(self.path / RECIPE, recipe_text(study))

    @property
    def _is_begun(self) -> bool:
        """Whether a run has begun here: a recipe beside empty folders is left over from a run that stopped early."""
        recipe, parts = self.path / RECIPE, self.path / PARTS
        is_trace = parts.is_dir() and all(path in (recipe, parts) or path.is_dir() for path in self.path.rglob("*"))
        return recipe.exists() and not is_trace

    def save(self, study: Study, results: Results, *, seeds: Sequence[SeedResult], images: Images) -> None:
        """Write everything."""
        write_text(self.path / RECIPE, recipe_text(study))
        files = [RECIPE, RESULTS, REPORT, MODEL]
        for seed in seeds:
            for network in (seed.dense, *seed.networks):
                files.append(model_file(network.name, seed.seed))
                save(network.model, self.path / files[-1])
        chosen = next(network for network in seeds[0].networks if network.name == results.chosen)
        save(chosen.model, self.path / MODEL)
        if chosen.plan is not None:
            chosen.plan.save(self.path / PLAN)
            files.append(PLAN)
        results.save(self.path / RESULTS)
        report(results, self.path / REPORT)
        self.note(study, files, source=images.source, data=images.checksums)

    def note(self, study: Recipe, files: Iterable[str], *, source: str, data: tuple[str, str]) -> None:
        """Write the manifest; it comes last, so that it is there only for a whole run."""
        Manifest(
            recipe=study.name,
            identity=study.identity,
            seeds=study.seeds,
            versions=versions(),
            machine=fingerprint("torch"),
            dataset=study.dataset,
            source=source,
            data=data,
            files={name: sha256_of(self.path / name) for name in sorted(files)},
        ).save(self.path / MANIFEST)

    def manifest(self) -> Manifest:
        """What the run wrote. Raises `FileError` where no finished run lies."""
        if not (self.path / MANIFEST).exists():
            raise FileError(
                f"{self.path} holds no finished run: there is no {MANIFEST} in it; "
                "name the folder that a recipe was run into, or finish the run with the command that began it"
            )
        return Manifest.load(self.path / MANIFEST)


def _require_same(path: Path, study: Recipe) -> None:
    """FileError unless the folder's recipe is this one, other seeds allowed."""
    advice = "give another folder with --out, or delete this one"
    try:
        there = read_recipe(path / RECIPE)
    except FileError as error:
        raise FileError(f"cannot tell whose run {path} holds: {error}; {advice}") from error
    if there.identity == study.identity:
        return
    if there.name != study.name:
        raise FileError(f"{path} holds a run of another recipe, {there.name}; {advice}")
    old, new = (each.model_dump(mode="json") for each in (there, study))
    trained = any(part.is_file() for part in (path / PARTS).rglob("*"))
    names = [name for name in new if old.get(name) != new[name] and name not in ("seeds", "title", "command")]
    raise FileError(
        f"{path} holds a run of {study.name} with other settings ({', '.join(names)}"
        f"{', it was a quick look' if there.is_quick else ''}); {advice}"
        f"{'. What both have in common is not trained again if you copy its parts into the other' if trained else ''}"
    )


def run_study(
    study: Study,
    out: Path,
    *,
    parts: Path | None = None,
    data_folder: Path | None = None,
    on_progress: ProgressCallback | None = None,
    on_network: Callable[[int], object] | None = None,
) -> Results:
    """Train, compress and measure, and write everything to a folder.

    `out` then holds the recipe as it was run (`recipe.toml`), `results.json`, `report.html`, every network of every
    seed (`models`), and the chosen one of the first seed (`model.safetensors`) with its `plan.json` if a plan made it.
    `run.json` says what all of it was made from, with the checksum of every file. The same call resumes an interrupted
    run from the trained parts, which lie in `parts`, by default `out / "parts"`; studies that share it train the dense
    network once. The data set's files lie in `data_folder`, if not in the cache. `on_progress` is called at every step,
    and `on_network` before any training, with the MACs of the dense network for one batch of it.

    Raises, before anything is trained or written, `FileError` where `out` or `parts` cannot be written to or `out`
    holds the run of another recipe, `DataError` where the data set cannot be obtained (it names the recipe that stands
    in, if there is one), `EngineError` or `DependencyError` for a runtime or a package that cannot be had, and
    `ModelError` or `RuleError` where the network cannot take the images or cannot do what the recipe asks.
    """
    start = time.perf_counter()
    study.require_available()
    runtimes = require_runtimes(study.runtimes)
    folder = RunFolder(Path(out))
    folder.require_free(study)
    progress = ProgressReporter(on_progress, parts=1 + len(study.seeds) * (1 + len(study.tasks())) + 2)
    progress.begin(f"reading {study.dataset}")
    images = images_of(study, data_folder)
    network, example = study.initial_network(images), images.train.example()
    study.require_possible(network, example)
    folder.claim(study)
    if on_network is not None:
        on_network(study.dense.batch * count_macs(network, example))
    parts = require_writable_folder(folder.path / PARTS if parts is None else parts)
    seeds = tuple(SeedRun(study, seed, images, parts / f"seed{seed}", progress).result() for seed in study.seeds)
    progress.begin("testing")
    results = Evaluation(study, images, runtimes, progress).results(seeds, start=start)
    progress.begin("writing")
    folder.save(study, results, seeds=seeds, images=images)
    progress.end()
    return results


def images_of(study: Study, data_folder: Path | None = None) -> Images:
    """The data set of a study, split and normalised.

    Raises `DataError`, which names the recipe that stands in, if there is one, where it cannot be obtained.
    """
    try:
        return load_images(
            study.dataset, held_out=study.held_out, limit=study.limit, size=study.view()[1], folder=data_folder
        )
    except DataError as error:
        if study.substitute is None:
            raise
        raise DataError(
            f"{error}\nor with this recipe: --data-folder DIR. Without the data another recipe stands in for it: "
            f"spectrim recipe {study.substitute}"
        ) from error
