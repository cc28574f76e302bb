"""`spectrim recipe` and what `spectrim demo` shares with it: a study with its progress and its table."""

import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from spectrim import recipes
from spectrim.cli.machine import SMALL_BATCH, find_device, set_threads
from spectrim.cli.options import CPU, Machine, Output
from spectrim.cli.signatures import Group, unfolded
from spectrim.cli.stages import interruptible, say, show
from spectrim.core.errors import DataError
from spectrim.reporting import Results, runtimes_table, table
from spectrim.reporting.listings import Column, Listing, listing

recipe = typer.Typer(no_args_is_help=True, help="Reproducible studies, one command each.")


@recipe.command("list")
@unfolded
def list_recipes(*, output: Output) -> None:
    """Show every study."""
    columns: dict[Column, Callable[[recipes.Recipe], str]] = {
        Column("Name", number=False): lambda study: study.name,
        Column("Kind", 1, number=False): lambda study: study.kind,
        Column("What it does", number=False, narrow=24): lambda study: study.title,
        Column("Data", number=False): lambda study: study.dataset,
    }
    show(listing("Recipes", recipes.STUDIES, columns), output=output)


@recipe.command("show")
def show_recipe(name: Annotated[str, typer.Argument(metavar="NAME", help="As `spectrim recipe list` has it.")]) -> None:
    """Print a recipe as a file to keep and edit: spectrim recipe show mnist-mlp > mine.toml."""
    typer.echo(recipes.recipe_file(name), nl=False)


DataFolder = Annotated[
    Path | None,
    typer.Option("--data-folder", "--data", metavar="DIR", help="Where the data set's files lie, if you have them."),
]


_KIND_OPTIONS: Mapping[str, tuple[type[recipes.Recipe], str]] = {
    "weights": (recipes.ClassifierStudy, "classifier"),
    "model": (recipes.TextStudy, "sentence-pairs or language-model"),
}
"""Options that only some kinds of recipes have."""


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Where a study is written, and what of it is changed."""

    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder for everything it makes; rerun to resume.  [default: spectrim-NAME]"),
    ] = None
    seeds: Annotated[
        str | None, typer.Option(metavar="0,1,2", help="Seeds, a whole run each.  [default: the recipe's]")
    ] = None
    data_folder: DataFolder = None
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="The trained network (.safetensors, .pt, ..); or `imagenet` to begin with torchvision's own weights.",
        ),
    ] = None
    model: Annotated[
        str | None, typer.Option(metavar="DIR", help="Folder of Hugging Face with the dense model, or one .gguf file.")
    ] = None
    quick: Annotated[bool, typer.Option("--quick", help="Little data, few epochs, one seed: to see it work.")] = False

    def run(self, study: recipes.Recipe, machine: Machine, *, output: Output) -> None:
        """Run the study with these options."""
        if self.quick:
            study = study.quick()
        if self.seeds is not None and (seeds := _seeds(self.seeds)) != study.seeds:
            study = study.model_copy(update={"seeds": seeds, "command": f"{study.command} --seeds {self.seeds}"})
        for name, (kind, kinds) in _KIND_OPTIONS.items():
            if (value := getattr(self, name)) is None:
                continue
            if not isinstance(study, kind):
                own = f"{study.name} is of the kind {study.kind}"
                raise DataError(f"--{name} is for recipes of the kind {kinds}; {own}")
            study = study.model_copy(update={name: value, "command": f"{study.command} --{name} {shlex.quote(value)}"})
        if isinstance(study, recipes.TextStudy) and self.data_folder is not None:
            study = study.model_copy(update={"command": f"{study.command} --data {shlex.quote(str(self.data_folder))}"})
        out = self.out or Path(f"spectrim-{study.name}")
        run(study, out=out, data_folder=self.data_folder, machine=machine, output=output)


@recipe.command("run")
@unfolded
def run_recipe(
    what: Annotated[str, typer.Argument(metavar="FILE|NAME", help="A recipe file, or the name of a study.")],
    *,
    options: RunOptions,
    machine: Annotated[Machine, CPU],
    output: Output,
) -> None:
    """Run a recipe: a file of yours, or a study by its name."""
    is_file = Path(what).exists() or what.endswith(".toml") or "/" in what or "\\" in what
    is_file = is_file and what not in recipes.NAMES
    options.run(recipes.read_recipe(Path(what)) if is_file else recipes.find_study(what), machine, output=output)


@recipe.command("verify")
@unfolded
def verify_recipe(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Of a finished run.")],
    *,
    data_folder: DataFolder = None,
    machine: Annotated[Machine, CPU],
    output: Output,
) -> None:
    """Measure again what a finished run says of itself; exit code 1 if something differs, is missing or altered."""
    with _bars() as update, ExitStack() as closing:
        set_threads(machine, SMALL_BATCH, closing=closing, say=say)
        checks = recipes.verify_run(folder, data_folder=data_folder, on_progress=update)
    columns: dict[Column, Callable[[recipes.Check], str]] = {
        Column("What", number=False): lambda check: check.what,
        Column("As noted", number=False): lambda check: check.stored,
        Column("Now", number=False): lambda check: check.measured,
        Column("Verdict", number=False): lambda check: check.verdict,
    }
    bad = sum(not check.good for check in checks)
    compared = sum(check.verdict != "not judged" for check in checks)
    summary = f"{bad} of {compared} do not hold" if bad else f"all {compared} hold"
    show(listing("Measured again", checks, columns, strong=lambda check: not check.good), summary, output=output)
    if bad:
        raise typer.Exit(1)


def _add_command(name: str) -> None:
    """Make a command of a study; its help is the remark that the recipe's file begins with."""
    study = recipes.find_study(name)
    without = tuple(option for option, (kind, _) in _KIND_OPTIONS.items() if not isinstance(study, kind))

    def command(
        *, options: Annotated[RunOptions, Group(without=without)], machine: Annotated[Machine, CPU], output: Output
    ) -> None:
        options.run(recipes.find_study(name), machine, output=output)

    remark = takewhile(lambda line: line.startswith("#"), recipes.recipe_file(name).splitlines())
    recipe.command(name, help=" ".join(line.removeprefix("#").strip() for line in remark))(unfolded(command))


for _name in recipes.NAMES:
    if _name != recipes.DEMO.name:
        _add_command(_name)


@contextmanager
def _bars() -> Iterator[Callable[[recipes.Progress], None]]:
    """A listener that shows where a study stands."""
    console = Console(stderr=True, highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        whole, part = bars.add_task("all", total=None), bars.add_task("", total=1)
        last = ""

        def update(event: recipes.Progress) -> None:
            nonlocal last
            if not console.is_terminal and event.part != last and event.parts_done < event.parts:
                console.print(f"{event.parts_done + 1}/{event.parts} {event.part}", markup=False)
            last = event.part
            done = event.done / event.of if event.of else 0.0
            bars.update(whole, completed=event.parts_done + done * (event.parts_done < event.parts), total=event.parts)
            bars.update(part, description=event.part, completed=event.done, total=event.of)

        yield update


def run(study: recipes.Recipe, *, out: Path, data_folder: Path | None, machine: Machine, output: Output) -> None:
    """Run a study with a progress bar, then show its table and where the report is."""
    find_device(machine)  # which is checked before anything is loaded
    show(study.title, output=output)
    state = f"what is finished lies in {out}, and the same command goes on from there"
    with interruptible(lambda: state), _bars() as update, ExitStack() as closing:
        choose = partial(set_threads, machine, closing=closing, say=say)
        options: dict[str, Any] = {"data_folder": data_folder, "on_progress": update, "on_network": choose}
        if isinstance(study, recipes.TextStudy):
            findings = _of_texts(recipes.run_text_study(study, out, **options), out)
        elif isinstance(study, recipes.Study):
            findings = _of_images(recipes.run_study(study, out, **options), out)
    show(*findings, f"  spectrim recipe verify {out}  (measure all of it again)", output=output)


def _of_texts(results: recipes.TextResults, out: Path) -> list[Listing | str | None]:
    """The scores, and where the models are."""
    folders = [out / model.folder for model in results.models if model.folder is not None]
    files = [f"  {path}  (a folder of Hugging Face)" for path in folders]
    files += [f"  {out / name}  ({content})" for name, content in _TEXT_FILES]
    loading = "  import spectrim", "  from transformers import AutoModel  # or the class that config.json names"
    python = "In Python:", *loading, f"  model = AutoModel.from_pretrained({str(folders[0])!r})"
    return [results.table(), *files, *python]


def _of_images(results: Results, out: Path) -> list[Listing | str | None]:
    """The networks, and where everything is."""
    times = runtimes_table(results) if results.dense.in_runtimes else None
    saved = f"Saved is {results.chosen}: {results.chosen_because}."
    has_plan = results.variant(results.chosen or "dense").plan is not None
    files = [f"  {out / name}  ({content})" for name, content in _IMAGE_FILES if name != "plan.json" or has_plan]
    return [table(results), times, results.summary, saved, *files]


_TEXT_FILES = (
    ("report.md", "the table, and what it was made from"),
    ("results.json", "every number"),
    ("recipe.toml", "the recipe as it was run"),
)
_IMAGE_FILES = (
    ("report.html", "open this in a browser"),
    ("model.safetensors", "the network: spectrim.load(path, network)"),
    ("plan.json", "what was done to each layer"),
    ("results.json", "every number"),
    ("recipe.toml", "the recipe as it was run"),
    ("models", "every network of every seed"),
)


def _seeds(text: str) -> tuple[int, ...]:
    try:
        seeds = tuple(int(part) for part in text.split(","))
    except ValueError:
        seeds = ()
    if not seeds or len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise DataError(f"--seeds {text!r} is not a list of different whole numbers such as 0,1,2")
    return seeds
