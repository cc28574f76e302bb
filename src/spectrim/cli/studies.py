"""`spectrim recipe` and what `spectrim demo` shares with it: a study with its progress and its table."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from spectrim.core.errors import DataError
from spectrim.recipes import (
    DEMO,
    NAMES,
    STUDIES,
    ClassifierStudy,
    Study,
    find_study,
    read_recipe,
    recipe_file,
    run_study,
    verify_run,
)
from spectrim.recipes import Progress as Event
from spectrim.reporting import Results, table, words

recipe = typer.Typer(no_args_is_help=True, help="Reproducible studies, one command each.")


@recipe.command("list")
def list_recipes() -> None:
    """Show every study."""
    rows = Table("name", "kind", "what it does", "data", box=box.SIMPLE_HEAD)
    for study in STUDIES:
        rows.add_row(study.name, study.kind, study.title, study.dataset)
    Console(highlight=False).print(rows)


@recipe.command("show")
def show_recipe(name: Annotated[str, typer.Argument(metavar="NAME", help="As `spectrim recipe list` has it.")]) -> None:
    """Print a recipe as a file to keep and edit: spectrim recipe show mnist-mlp > mine.toml."""
    typer.echo(recipe_file(name), nl=False)


Seeds = Annotated[str | None, typer.Option(metavar="0,1,2", help="Seeds, a whole run each.  [default: the recipe's]")]
Out = Annotated[Path, typer.Option(metavar="DIR", help="Folder for everything it makes; rerun to resume.")]
DataFolder = Annotated[
    Path | None, typer.Option("--data-folder", metavar="DIR", help="Where the data set's files lie, if you have them.")
]
Quick = Annotated[bool, typer.Option("--quick", help="Little data, few epochs, one seed: to see it work.")]
Weights = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="The trained network as a .safetensors file; or `imagenet` to begin with torchvision's own weights.",
    ),
]


@recipe.command("run")
def run_recipe(
    what: Annotated[str, typer.Argument(metavar="FILE|NAME", help="A recipe file, or the name of a study.")],
    *,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder for everything it makes; rerun to resume.  [default: spectrim-NAME]"),
    ] = None,
    seeds: Seeds = None,
    data_folder: DataFolder = None,
    weights: Weights = None,
    quick: Quick = False,
) -> None:
    """Run a recipe: a file of yours, or a study by its name."""
    study = find_study(what) if what in NAMES or not _is_file(what) else read_recipe(Path(what))
    study = _asked(study, seeds=seeds, quick=quick, weights=weights)
    run(study, out=out or Path(f"spectrim-{study.name}"), data_folder=data_folder)


@recipe.command("verify")
def verify_recipe(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Of a finished run.")],
    *,
    data_folder: DataFolder = None,
) -> None:
    """Measure again what a finished run says of itself; exit code 1 if something differs, is missing or altered."""
    console = Console(highlight=False)
    with _bars(console) as show:
        checks = verify_run(folder, data_folder=data_folder, on_progress=show)
    rows = Table("what", "as noted", "now", "", box=box.SIMPLE_HEAD)
    for check in checks:
        rows.add_row(check.what, check.stored, check.found, check.verdict, style=None if check.good else "bold red")
    console.print(rows)
    bad = sum(not check.good for check in checks)
    judged = sum(check.verdict != "not judged" for check in checks)
    console.print(f"{bad} of {judged} do not hold" if bad else f"all {judged} hold")
    if bad:
        raise typer.Exit(1)


def _is_file(what: str) -> bool:
    """Whether it is meant as a path: one that exists, or looks like one."""
    return Path(what).exists() or what.endswith(".toml") or "/" in what or "\\" in what


def _offer(name: str) -> None:
    """Make a command of a study."""
    default = Path(f"spectrim-{name}")

    def plain(*, out: Out = default, seeds: Seeds = None, data_folder: DataFolder = None, quick: Quick = False) -> None:
        run(_asked(find_study(name), seeds=seeds, quick=quick), out=out, data_folder=data_folder)

    def weighted(
        *,
        out: Out = default,
        seeds: Seeds = None,
        data_folder: DataFolder = None,
        weights: Weights = None,
        quick: Quick = False,
    ) -> None:
        run(_asked(find_study(name), seeds=seeds, quick=quick, weights=weights), out=out, data_folder=data_folder)

    command: Callable[..., None] = weighted if isinstance(find_study(name), ClassifierStudy) else plain
    recipe.command(name, help=_about(name))(command)


def _about(name: str) -> str:
    """The remark that a recipe's file begins with."""
    lines = recipe_file(name).splitlines()
    end = next(at for at, line in enumerate(lines) if not line.startswith("#"))
    return " ".join(line.removeprefix("#").strip() for line in lines[:end])


for _name in NAMES:
    if _name != DEMO.name:
        _offer(_name)


def _asked(study: Study, *, seeds: str | None, quick: bool, weights: str | None = None) -> Study:
    """The study with the options of the command line."""
    if quick:
        study = study.quick()
    if seeds is not None and (chosen := _seeds(seeds)) != study.seeds:
        study = study.model_copy(update={"seeds": chosen, "command": f"{study.command} --seeds {seeds}"})
    if weights is not None:
        if not isinstance(study, ClassifierStudy):
            raise DataError(
                f"--weights is for recipes of the kind classifier; {study.name} is of the kind {study.kind}"
            )
        study = study.model_copy(update={"weights": weights, "command": f"{study.command} --weights {weights}"})
    return study


@contextmanager
def _bars(console: Console) -> Iterator[Callable[[Event], None]]:
    """A listener that shows where a study stands."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bars:
        whole, part = bars.add_task("all", total=None), bars.add_task("", total=1)
        told = ""

        def show(event: Event) -> None:
            nonlocal told
            if not console.is_terminal and event.part != told and event.parts_done < event.parts:
                console.print(f"{event.parts_done + 1}/{event.parts} {event.part}", markup=False)
            told = event.part
            done = event.done / event.of if event.of else 0.0
            bars.update(whole, completed=event.parts_done + done * (event.parts_done < event.parts), total=event.parts)
            bars.update(part, description=event.part, completed=event.done, total=event.of)

        yield show


def run(study: Study, *, out: Path, data_folder: Path | None) -> None:
    """Run a study with a progress bar, then show its table and where the report is."""
    console = Console(highlight=False)
    console.print(study.title, style="bold", markup=False)
    try:
        with _bars(console) as show:
            results = run_study(study, out, data_folder=data_folder, on_progress=show)
    except KeyboardInterrupt:
        stop = f"interrupted; what is finished lies in {out}, and the same command goes on from there"
        Console(stderr=True, highlight=False).print(stop, markup=False, soft_wrap=True)
        raise typer.Exit(130) from None
    console.print(table(results))
    if results.dense.in_runtimes:
        console.print(_speedups(results))
    console.print(results.summary, markup=False)
    console.print(f"Saved is {results.chosen}: {results.chosen_because}.", markup=False)
    for name, what in (
        ("report.html", "open this in a browser"),
        ("model.safetensors", "the network: spectrim.load(path, network)"),
        ("plan.json", "what was done to each layer"),
        ("results.json", "every number"),
        ("recipe.toml", "the recipe as it was run"),
        ("models", "every network of every seed"),
    ):
        if name != "plan.json" or results.variant(results.chosen or "dense").plan is not None:
            console.print(f"  {out / name}  ({what})", markup=False, soft_wrap=True)
    console.print(f"  spectrim recipe verify {out}  (measure all of it again)", markup=False, soft_wrap=True)


def _speedups(results: Results) -> Table:
    """What each runtime makes of each network: the table of the study has the first one only."""
    networks = (results.dense, *results.variants)
    measured = [(one.measurement, *one.in_runtimes) for one in networks]
    shown = Table("network", *(f"{one.runtime}" for one in measured[0]), box=box.SIMPLE_HEAD, title="speed-up")
    for network, row in zip(networks, measured, strict=True):
        cells = (
            words.milliseconds(one.latency_ms)
            if one.speedup is None
            else f"{words.speedup(one.speedup)} ({words.bounds(one.speedup)})"
            for one in row
        )
        shown.add_row(network.name, *cells)
    return shown


def _seeds(text: str) -> tuple[int, ...]:
    try:
        seeds = tuple(int(part) for part in text.split(","))
    except ValueError:
        seeds = ()
    if not seeds or len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise DataError(f"--seeds {text!r} is not a list of different whole numbers such as 0,1,2")
    return seeds
