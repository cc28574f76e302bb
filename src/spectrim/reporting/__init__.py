"""Reports: the values of a study as terminal tables, figures, and one self-contained HTML page."""

from spectrim.reporting.accuracy import plot_accuracy, plot_classes
from spectrim.reporting.figures import plot_curves, plot_history, plot_ranks, plot_spectra, save_figure
from spectrim.reporting.html import report
from spectrim.reporting.results import (
    Changes,
    ClassChange,
    Flipped,
    LayerSpectrum,
    Published,
    PublishedPoint,
    Results,
    Run,
    Variant,
    spectra_of,
)
from spectrim.reporting.tables import changes_table, published_table, runtimes_table, table, text

__all__ = [
    "Changes",
    "ClassChange",
    "Flipped",
    "LayerSpectrum",
    "Published",
    "PublishedPoint",
    "Results",
    "Run",
    "Variant",
    "changes_table",
    "plot_accuracy",
    "plot_classes",
    "plot_curves",
    "plot_history",
    "plot_ranks",
    "plot_spectra",
    "published_table",
    "report",
    "runtimes_table",
    "save_figure",
    "spectra_of",
    "table",
    "text",
]
