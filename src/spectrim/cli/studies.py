"""`spectrim recipe` and what `spectrim demo` shares with it: a study with its progress and its table."""

from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from spectrim.errors import DataError
from spectrim.recipes import MNIST_DYNAMIC, MNIST_FACTORS, MNIST_MLP, MNIST_PROJECTED, STUDIES, Study, run_study
from spectrim.recipes import Progress as Event
from spectrim.report import table

recipe = typer.Typer(no_args_is_help=True, help="Reproducible studies, one command each.")


@recipe.command("list")
def list_recipes() -> None:
    """Show every study."""
    rows = Table("name", "what it does", "data", box=box.SIMPLE_HEAD)
    for study in STUDIES:
        rows.add_row(study.name, study.title, study.dataset)
    Console(highlight=False).print(rows)


Seeds = Annotated[str, typer.Option(metavar="0,1,2", help="Seeds, a whole run each.")]
Out = Annotated[Path, typer.Option(metavar="DIR", help="Folder for everything it makes; rerun to resume.")]
DataFolder = Annotated[
    Path | None, typer.Option("--data-folder", metavar="DIR", help="Where the MNIST files lie, if you have them.")
]
Quick = Annotated[bool, typer.Option("--quick", help="Little data, few epochs: to see it work.")]


def _offer(study: Study, what: str) -> None:
    """Make a command of a study."""

    def command(
        *,
        out: Out = Path(f"spectrim-{study.name}"),
        seeds: Seeds = "0",
        data_folder: DataFolder = None,
        quick: Quick = False,
    ) -> None:
        run(_asked(study, seeds=seeds, quick=quick), out=out, data_folder=data_folder)

    recipe.command(study.name, help=what)(command)


_offer(MNIST_MLP, "The classic study on MNIST: 784-1024x5-10, every layer but the last at rank 200, 100, 50, 20, 10.")
_offer(
    MNIST_FACTORS, "The same network factored at rank 20, and its factors fine-tuned: with labels, and with a teacher."
)
_offer(
    MNIST_DYNAMIC,
    "The same network truncated to rank 20 in every forward pass: as published, stabilised, and with ranks chosen in "
    "training.",
)
_offer(MNIST_PROJECTED, "The same network trained from scratch, its weights projected to rank 20 at every epoch.")


def _asked(study: Study, *, seeds: str, quick: bool) -> Study:
    """The study with the options of the command line."""
    chosen = _seeds(seeds)
    if chosen != (0,):
        study = study.model_copy(update={"seeds": chosen, "command": f"{study.command} --seeds {seeds}"})
    return study.quick() if quick else study


def run(study: Study, *, out: Path, data_folder: Path | None) -> None:
    """Run a study with a progress bar, then show its table and where the report is."""
    console = Console(highlight=False)
    console.print(study.title, style="bold", markup=False)
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

        try:
            results = run_study(study, out, data_folder=data_folder, on_progress=show)
        except KeyboardInterrupt:
            bars.stop()
            stop = f"interrupted; what is finished lies in {out}, and the same command goes on from there"
            Console(stderr=True, highlight=False).print(stop, markup=False, soft_wrap=True)
            raise typer.Exit(130) from None
    console.print(table(results))
    console.print(results.summary, markup=False)
    console.print(f"Saved is {results.chosen}: {results.chosen_because}.", markup=False)
    for name, what in (
        ("report.html", "open this in a browser"),
        ("model.safetensors", "the network: spectrim.load(path, network)"),
        ("plan.json", "what was done to each layer"),
        ("results.json", "every number"),
    ):
        if name != "plan.json" or results.variant(results.chosen or "dense").plan is not None:
            console.print(f"  {out / name}  ({what})", markup=False, soft_wrap=True)


def _seeds(text: str) -> tuple[int, ...]:
    try:
        seeds = tuple(int(part) for part in text.split(","))
    except ValueError:
        seeds = ()
    if not seeds or len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise DataError(f"--seeds {text!r} is not a list of different whole numbers such as 0,1,2")
    return seeds
