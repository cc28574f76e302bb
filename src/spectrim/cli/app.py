"""The commands, and what happens when one fails."""

import os
import sys
import warnings
from collections.abc import MutableMapping
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from spectrim import __version__
from spectrim.cli import data
from spectrim.cli.commands import Analyze, Compress, Evaluate, Finetune, Plan, Quantize
from spectrim.cli.deployment import Bench, Export
from spectrim.cli.options import CPU, Machine, Output
from spectrim.cli.signatures import unfolded
from spectrim.core.errors import SpectrimError

_COMMANDS: dict[type, str] = {
    Analyze: "networks",
    Plan: "networks",
    Compress: "networks",
    Evaluate: "evaluation",
    Finetune: "finetune",
    Export: "export",
    Bench: "bench",
    Quantize: "quantize",
}
"""The module with the function that does what the command says. Imports take seconds, and the shell shall not wait."""

app = typer.Typer(
    name="spectrim",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Make trained neural networks smaller and faster by low-rank factorisation.",
)


def _perform(command: object) -> None:
    name = type(command).__name__.lower()
    getattr(import_module(f"spectrim.cli.{_COMMANDS[type(command)]}"), f"{name}_network")(command)


for _kind in _COMMANDS:
    app.command(_kind.__name__.lower())(unfolded(_kind, perform=_perform))


class _Recipes(TyperGroup):
    """The commands of `spectrim recipe`, which are imported when one of them is asked for."""

    @property
    def commands(self) -> MutableMapping[str, Any]:
        """By their names."""
        from spectrim.cli.studies import recipe

        return typer.main.get_group(recipe).commands

    @commands.setter
    def commands(self, commands: MutableMapping[str, Any]) -> None:
        """Typer has none to begin with."""


app.add_typer(data.app, name="data")
app.add_typer(
    typer.Typer(cls=_Recipes, no_args_is_help=True, help="Reproducible studies, one command each."), name="recipe"
)


def _show_version(version_asked: bool) -> None:  # noqa: FBT001  # typer calls it so
    if version_asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    *,
    _: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None: ...


@app.command()
@unfolded
def demo(
    *,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the report and the model.")] = Path(
        "spectrim-demo"
    ),
    quick: Annotated[bool, typer.Option("--quick", help="Few epochs: to see it work.")] = False,
    machine: Annotated[Machine, CPU],
    output: Output,
) -> None:
    """Train a network on embedded data, compress it, and show what was gained; half a minute, no network needed."""
    from spectrim.cli.studies import run
    from spectrim.recipes import DEMO

    run(DEMO.quick() if quick else DEMO, out=out, data_folder=None, machine=machine, output=output)


def main() -> None:
    """Run the command line; an error a user can cause becomes one message and a non-zero exit code."""
    # Threads that wait busily for each other take up to 100 times as long where they have fewer cores: they sleep
    # instead. OpenMP reads this when torch is loaded. `bench` times a pass as other programs run it.
    if "bench" not in sys.argv[1:2]:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    errors, plain = Console(stderr=True, highlight=False), warnings.formatwarning
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"  # without a line of our source
    try:
        app()
    except SpectrimError as error:
        errors.print("[bold red]error:[/]", end=" ")
        errors.print(str(error), markup=False, soft_wrap=True)
        sys.exit(1)
    finally:
        warnings.formatwarning = plain
