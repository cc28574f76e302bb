"""The commands, and what happens when one fails."""

import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from spectrim.cli import data, networks
from spectrim.cli.bench import bench_network
from spectrim.cli.export import export_network
from spectrim.cli.finetune import finetune_network
from spectrim.cli.options import CPU, Machine, unfolded
from spectrim.cli.quantize import quantize_network
from spectrim.cli.studies import recipe, run
from spectrim.core.errors import SpectrimError
from spectrim.recipes import DEMO

app = typer.Typer(
    name="spectrim",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Make trained neural networks smaller and faster by low-rank factorisation.",
)
app.command("analyze")(networks.analyze_network)
app.command("plan")(networks.plan_network)
app.command("compress")(networks.compress_network)
app.command("finetune")(finetune_network)
app.command("export")(export_network)
app.command("bench")(bench_network)
app.command("quantize")(quantize_network)
app.add_typer(data.app, name="data")
app.add_typer(recipe, name="recipe")


def _show_version(version_asked: bool) -> None:  # noqa: FBT001  # typer calls it so
    if version_asked:
        typer.echo(version("spectrim"))
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
) -> None:
    """Train a network on embedded data, compress it, and show what was gained; half a minute, no network needed."""
    run(DEMO.quick() if quick else DEMO, out=out, data_folder=None, machine=machine)


def main() -> None:
    """Run the command line; an error a user can cause becomes one message and a non-zero exit code."""
    # Threads that wait busily for each other take up to 100 times as long where they have fewer cores: they sleep
    # instead. OpenMP reads this when torch is loaded. `bench` times a pass as other programs run it.
    if "bench" not in sys.argv[1:2]:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    errors = Console(stderr=True, highlight=False)
    try:
        app()
    except SpectrimError as error:
        errors.print("[bold red]error:[/]", end=" ")
        errors.print(str(error), markup=False, soft_wrap=True)
        sys.exit(1)
