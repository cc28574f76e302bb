"""Reports: the values of a study as terminal tables, figures, and one self-contained HTML page."""

from spectrim.measure import Epoch
from spectrim.report.figures import plot_accuracy, plot_curves, plot_history, plot_ranks, plot_spectra
from spectrim.report.html import report
from spectrim.report.results import LayerSpectrum, Published, Results, Run, Variant
from spectrim.report.tables import table, text

__all__ = [
    "Epoch",
    "LayerSpectrum",
    "Published",
    "Results",
    "Run",
    "Variant",
    "plot_accuracy",
    "plot_curves",
    "plot_history",
    "plot_ranks",
    "plot_spectra",
    "report",
    "table",
    "text",
]
