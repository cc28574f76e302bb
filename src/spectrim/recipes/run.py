"""A study from its data to its report."""

import time
from pathlib import Path

from spectrim.core.errors import DataError
from spectrim.core.files import require_writable_folder
from spectrim.recipes.changes import changes_of
from spectrim.recipes.folder import PARTS, RunFolder
from spectrim.recipes.images import Images, load_images
from spectrim.recipes.outcome import Timing, choose, pairs_of, provenance_of, summarise, variants_of
from spectrim.recipes.parts import Parts
from spectrim.recipes.progress import OnProgress, Teller, silent
from spectrim.recipes.study import SeedRun, Study
from spectrim.reporting import Results


def run_study(
    study: Study,
    out: Path,
    *,
    parts: Path | None = None,
    data_folder: Path | None = None,
    on_progress: OnProgress = silent,
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
    study.require()
    timing = Timing.of(study.runtimes, batch=study.latency_batch)
    folder = RunFolder(Path(out))
    folder.require_free(study)
    teller = Teller(on_progress, parts=1 + len(study.seeds) * (1 + study.steps) + 2)
    teller.begin(f"reading {study.dataset}")
    images = images_of(study, data_folder)
    study.require_possible(study.blank(images), images.train.example())
    folder.claim(study)
    parts = require_writable_folder(folder.path / PARTS if parts is None else parts)
    seeds = tuple(
        study.outcome(SeedRun(study, seed, images, Parts(parts / f"seed{seed}"), teller)) for seed in study.seeds
    )
    teller.begin("testing")
    dense, variants = variants_of(seeds, images, teller, timing=timing)
    chosen, because = choose(seeds, study.tolerance)
    results = Results(
        title=study.title,
        summary=summarise(
            dense,
            next(v for v in variants if v.name == chosen.name),
            remark=study.remark(images, seeds[0].dense, variants),
            quick=study.is_quick,
        ),
        dense=dense,
        variants=variants,
        chosen=chosen.name,
        chosen_because=because,
        spectra=seeds[0].spectra,
        published=tuple(one.shown() for one in study.published),
        changes=changes_of(chosen.name, pairs_of(seeds, chosen.name), images),
        command=study.command,
        provenance=provenance_of(
            images,
            dataset=study.dataset,
            seeds=study.seeds,
            settings=study.model_dump_json(exclude={"published", "title", "name", "command"}, exclude_none=True),
            timing=timing,
            seconds=time.perf_counter() - start,
        ),
    )
    teller.begin("writing")
    folder.keep(study, results, seeds=seeds, chosen=chosen, images=images)
    teller.end()
    return results


def images_of(study: Study, data_folder: Path | None = None) -> Images:
    """The data set of a study, split and normalised.

    Raises:
        DataError: it cannot be obtained; names the recipe that stands in, if there is one.
    """
    try:
        return load_images(
            study.dataset, held_out=study.held_out, limit=study.limit, size=study.pixels(), folder=data_folder
        )
    except DataError as error:
        if study.stand_in is None:
            raise
        raise DataError(
            f"{error}\nor with this recipe: --data-folder DIR. Without the data another recipe stands in for it: "
            f"spectrim recipe {study.stand_in}"
        ) from error
