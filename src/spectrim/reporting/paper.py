"""Figures as files for papers and slides."""

from importlib.util import find_spec
from pathlib import Path

import plotly.graph_objects as go

from spectrim.core.errors import DataError, DependencyError, EngineError
from spectrim.core.files import write_atomically

FORMATS = ("png", "svg", "pdf")


def save_figure(
    figure: go.Figure, path: str | Path, *, width: int = 700, height: int = 420, scale: float = 3.0
) -> Path:
    """Write a figure as `.png`, `.svg` or `.pdf`, whichever the path ends in.

    Args:
        figure: From one of the `plot_` functions, or any other of plotly.
        path: The file to write.
        width: In pixels; in a `.pdf`, 1/96 inch each.
        height: Likewise.
        scale: Pixels of a `.png` for each of these.

    Raises:
        DataError: another ending, or a value that is not a figure.
        DependencyError: kaleido, which draws plotly's figures into files, is not installed.
        EngineError: kaleido finds no Chrome or Chromium to draw with, or that fails.
        FileError: the file cannot be written.
    """
    path = Path(path)
    if not isinstance(figure, go.Figure):
        raise DataError(f"save_figure takes a plotly figure, and this is a {type(figure).__name__}")
    kind = path.suffix.removeprefix(".").lower()
    if kind not in FORMATS:
        raise DataError(f"{path} does not end in a format of figures; let it end in {', '.join(FORMATS)}")
    if find_spec("kaleido") is None:
        raise DependencyError(
            "figures are drawn into files by the package kaleido, which is not installed; "
            'pip install "spectrim[figures]"'
        )
    try:
        drawn = figure.to_image(format=kind, width=width, height=height, scale=scale if kind == "png" else 1)
    except RuntimeError as error:  # how plotly and kaleido say that there is no browser, or that it failed
        raise EngineError(
            f"kaleido could not draw the figure: {str(error).strip()}; install Chrome or Chromium, or name one in the "
            "environment variable BROWSER_PATH"
        ) from error
    return write_atomically(path, lambda part: part.write_bytes(drawn))
