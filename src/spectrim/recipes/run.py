"""A study from its data to its report."""

import time
from pathlib import Path

from spectrim.files import require_writable_folder
from spectrim.io import save
from spectrim.recipes.images import load_images
from spectrim.recipes.outcome import choose, provenance_of, summarise, variants_of
from spectrim.recipes.parts import Parts
from spectrim.recipes.progress import OnProgress, Teller, silent
from spectrim.recipes.study import SeedRun, Study
from spectrim.report import Results, report


def run_study(
    study: Study,
    out: Path,
    *,
    parts: Path | None = None,
    data_folder: Path | None = None,
    on_progress: OnProgress = silent,
) -> Results:
    """Train, compress and measure, and write everything to a folder.

    `out` then holds `report.html`, `results.json` and `model.safetensors` (the chosen network of the first seed),
    `plan.json` where the chosen network was made by a plan, and the trained parts, from which an interrupted run goes
    on when it is started again.

    Args:
        study: What to do.
        out: A folder; made if need be.
        parts: Where the trained parts lie, `out / "parts"` by default; studies that share it train the dense network
            once.
        data_folder: Where the data set's files lie, if not in the cache.
        on_progress: Called at every step.

    Raises:
        FileError: `out` or `parts` cannot be written to; nothing has been done then.
        DataError: the data set cannot be obtained.
    """
    start = time.perf_counter()
    out = require_writable_folder(out)
    parts = require_writable_folder(out / "parts" if parts is None else parts)
    teller = Teller(on_progress, parts=1 + len(study.seeds) * (1 + study.steps) + 2)
    teller.begin(f"reading {study.dataset}")
    images = load_images(study.dataset, held_out=study.held_out, limit=study.limit, folder=data_folder)
    seeds = tuple(
        study.outcome(SeedRun(study, seed, images, Parts(parts / f"seed{seed}"), teller)) for seed in study.seeds
    )
    teller.begin("testing")
    dense, variants = variants_of(seeds, images, teller)
    chosen, because = choose(seeds, study.tolerance)
    results = Results(
        title=study.title,
        summary=summarise(dense, next(v for v in variants if v.name == chosen.name)),
        dense=dense,
        variants=variants,
        chosen=chosen.name,
        chosen_because=because,
        spectra=seeds[0].spectra,
        published=study.published,
        command=study.command,
        provenance=provenance_of(
            images,
            dataset=study.dataset,
            seeds=study.seeds,
            settings=study.model_dump_json(exclude={"published", "title", "name", "command"}),
            seconds=time.perf_counter() - start,
        ),
    )
    teller.begin("writing")
    save(chosen.model, out / "model.safetensors")
    if chosen.plan is not None:
        chosen.plan.save(out / "plan.json")
    results.save(out / "results.json")
    report(results, out / "report.html")
    teller.end()
    return results
