"""Spectrim makes trained neural networks smaller and faster by low-rank factorisation, and proves what was gained."""

from spectrim import errors, training
from spectrim.analyze import Analysis, LayerAnalysis, analyze
from spectrim.budget import Curve, pareto
from spectrim.calibrate import Calibration, calibrate
from spectrim.compress import Compressed, compress
from spectrim.export import Exported, export_onnx, export_openvino, export_program
from spectrim.factorize import merge
from spectrim.io import load, save
from spectrim.latency import LatencyTable, latency_table
from spectrim.layers import (
    LowRankConv1d,
    LowRankConv2d,
    LowRankConvTranspose2d,
    LowRankLinear,
    SpatialConv2d,
    Tucker2Conv2d,
)
from spectrim.linalg import Spectrum
from spectrim.measure import Accuracy, Epoch, Interval, Measurement, accuracy, measure, runtime_gain
from spectrim.plan import Budget, Cost, Energy, LatencyNote, LayerPlan, Plan, Rank, Ratio
from spectrim.probe import Grid, probe
from spectrim.quantize import Quantized, QuantizedRow, QuantizedTable, compare_quantized, onnx_accuracy, quantize
from spectrim.ranks import plan
from spectrim.report import (
    Changes,
    LayerSpectrum,
    Published,
    PublishedPoint,
    Results,
    Run,
    Variant,
    plot_accuracy,
    plot_classes,
    plot_curves,
    plot_history,
    plot_ranks,
    plot_spectra,
    report,
    save_figure,
    table,
    text,
)
from spectrim.sensitivity import sensitivity
from spectrim.timing import Comparison
from spectrim.training import Finetuned, History, finetune

__version__ = "0.1.0"

__all__ = [
    "Accuracy",
    "Analysis",
    "Budget",
    "Calibration",
    "Changes",
    "Comparison",
    "Compressed",
    "Cost",
    "Curve",
    "Energy",
    "Epoch",
    "Exported",
    "Finetuned",
    "Grid",
    "History",
    "Interval",
    "LatencyNote",
    "LatencyTable",
    "LayerAnalysis",
    "LayerPlan",
    "LayerSpectrum",
    "LowRankConv1d",
    "LowRankConv2d",
    "LowRankConvTranspose2d",
    "LowRankLinear",
    "Measurement",
    "Plan",
    "Published",
    "PublishedPoint",
    "Quantized",
    "QuantizedRow",
    "QuantizedTable",
    "Rank",
    "Ratio",
    "Results",
    "Run",
    "SpatialConv2d",
    "Spectrum",
    "Tucker2Conv2d",
    "Variant",
    "accuracy",
    "analyze",
    "calibrate",
    "compare_quantized",
    "compress",
    "errors",
    "export_onnx",
    "export_openvino",
    "export_program",
    "finetune",
    "latency_table",
    "load",
    "measure",
    "merge",
    "onnx_accuracy",
    "pareto",
    "plan",
    "plot_accuracy",
    "plot_classes",
    "plot_curves",
    "plot_history",
    "plot_ranks",
    "plot_spectra",
    "probe",
    "quantize",
    "report",
    "runtime_gain",
    "save",
    "save_figure",
    "sensitivity",
    "table",
    "text",
    "training",
]
