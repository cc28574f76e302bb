"""A study from its data to its report."""

import time
from pathlib import Path

from spectrim.core.errors import DataError
from spectrim.core.files import require_writable_folder
from spectrim.recipes.folder import PARTS, RunFolder
from spectrim.recipes.images import Images, load_images
from spectrim.recipes.progress import ProgressCallback, ProgressReporter
from spectrim.recipes.results import require_runtimes, results_of
from spectrim.recipes.seed import SeedRun
from spectrim.recipes.study import Study
from spectrim.reporting import Results


def run_study(
    study: Study,
    out: Path,
    *,
    parts: Path | None = None,
    data_folder: Path | None = None,
    on_progress: ProgressCallback | None = None,
) -> Results:
    """Train, compress and measure, and write everything to a folder.

    `out` then holds the recipe as it was run (`recipe.toml`), `results.json`, `report.html`, every network of every
    seed (`models`), the chosen one of the first seed (`model.safetensors`) with its `plan.json` where it was made by a
    plan, what all of it was made from, with the checksum of every file (`run.json`), and the trained parts, from which
    an interrupted run goes on when it is started again.

    Args:
        study: What to do.
        out: A folder; made if need be.
        parts: Where the trained parts lie, `out / "parts"` by default; studies that share it train the dense network
            once.
        data_folder: Where the data set's files lie, if not in the cache.
        on_progress: Called at every step.

    Raises:
        FileError: `out` or `parts` cannot be written to, or `out` holds the run of another recipe; nothing has been
            done then.
        DataError: the data set cannot be obtained; names the recipe that stands in, if there is one.
        EngineError, DependencyError: a runtime or a package that the recipe needs cannot be had.
        ModelError, RuleError: the network cannot take the images, or what the recipe asks of it cannot be; told before
            anything is trained or written.
    """
    start = time.perf_counter()
    study.require_available()
    runtimes = require_runtimes(study.runtimes)
    folder = RunFolder(Path(out))
    folder.require_free(study)
    progress = ProgressReporter(on_progress, parts=1 + len(study.seeds) * (1 + len(study.tasks())) + 2)
    progress.begin(f"reading {study.dataset}")
    images = images_of(study, data_folder)
    study.require_possible(study.initial_network(images), images.train.example())
    folder.claim(study)
    parts = require_writable_folder(folder.path / PARTS if parts is None else parts)
    seeds = tuple(SeedRun(study, seed, images, parts / f"seed{seed}", progress).result() for seed in study.seeds)
    progress.begin("testing")
    results = results_of(study, seeds, images, runtimes=runtimes, progress=progress, start=start)
    progress.begin("writing")
    folder.save(study, results, seeds=seeds, images=images)
    progress.end()
    return results


def images_of(study: Study, data_folder: Path | None = None) -> Images:
    """The data set of a study, split and normalised.

    Raises:
        DataError: it cannot be obtained; names the recipe that stands in, if there is one.
    """
    try:
        return load_images(
            study.dataset, held_out=study.held_out, limit=study.limit, size=study.view()[1], folder=data_folder
        )
    except DataError as error:
        if study.stand_in is None:
            raise
        raise DataError(
            f"{error}\nor with this recipe: --data-folder DIR. Without the data another recipe stands in for it: "
            f"spectrim recipe {study.stand_in}"
        ) from error
