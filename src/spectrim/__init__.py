"""Spectrim makes trained neural networks smaller and faster by low-rank factorisation, and proves what was gained."""

import sys
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

from spectrim.core import errors
from spectrim.integrations.registration import register

if TYPE_CHECKING:
    from spectrim import training
    from spectrim.analysis.calibration import Calibration, calibrate
    from spectrim.analysis.sensitivities import sensitivity
    from spectrim.analysis.spectra import Analysis, LayerAnalysis, analyze
    from spectrim.benchmark.fidelity import Fidelity
    from spectrim.benchmark.latencies import LatencyTable
    from spectrim.benchmark.latency_table import latency_table
    from spectrim.benchmark.measurement import Accuracy, Epoch, Measurement, accuracy, measure, runtime_gain
    from spectrim.benchmark.scores import Score, evaluate
    from spectrim.compression import Compressed, compress
    from spectrim.core.plans import Budget, Cost, Energy, LatencyNote, LayerPlan, Plan, Rank, Ratio
    from spectrim.export import Exported, export_onnx, export_openvino, export_program
    from spectrim.integrations.checkpoints import CompressedCheckpoint, compress_checkpoint
    from spectrim.layers.forms import (
        InterpolativeLayer,
        LowRankConv1d,
        LowRankConv2d,
        LowRankConvTranspose2d,
        LowRankEmbedding,
        LowRankEmbeddingBag,
        LowRankLinear,
        SpatialConv2d,
        Tucker2Conv2d,
    )
    from spectrim.layers.replacement import merge
    from spectrim.layers.saving import load, save
    from spectrim.linalg import Spectrum
    from spectrim.planning.curve import Curve, pareto
    from spectrim.planning.memory import MemoryEstimate, estimate_memory
    from spectrim.planning.rules import plan
    from spectrim.quantization import (
        Quantized,
        QuantizedRow,
        QuantizedTable,
        compare_quantized,
        onnx_accuracy,
        quantize,
    )
    from spectrim.reporting import (
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
    from spectrim.reporting.cards import write_model_card
    from spectrim.runtimes.rank_grid import Grid, probe
    from spectrim.runtimes.timing import Comparison, Interval
    from spectrim.training import Distillation, Finetuned, History, distill, finetune

__version__ = "0.1.0"

_NAMES = {
    "analysis.calibration": "Calibration calibrate",
    "analysis.sensitivities": "sensitivity",
    "analysis.spectra": "Analysis LayerAnalysis analyze",
    "benchmark.fidelity": "Fidelity",
    "benchmark.latencies": "LatencyTable",
    "benchmark.latency_table": "latency_table",
    "benchmark.measurement": "Accuracy Epoch Measurement accuracy measure runtime_gain",
    "benchmark.scores": "Score evaluate",
    "compression": "Compressed compress",
    "core.plans": "Budget Cost Energy LatencyNote LayerPlan Plan Rank Ratio",
    "export": "Exported export_onnx export_openvino export_program",
    "reporting.cards": "write_model_card",
    "integrations.checkpoints": "CompressedCheckpoint compress_checkpoint",
    "layers.forms": "InterpolativeLayer LowRankConv1d LowRankConv2d LowRankConvTranspose2d LowRankEmbedding "
    "LowRankEmbeddingBag LowRankLinear SpatialConv2d Tucker2Conv2d",
    "layers.replacement": "merge",
    "layers.saving": "load save",
    "linalg": "Spectrum",
    "planning.curve": "Curve pareto",
    "planning.memory": "MemoryEstimate estimate_memory",
    "planning.rules": "plan",
    "quantization": "Quantized QuantizedRow QuantizedTable compare_quantized onnx_accuracy quantize",
    "reporting": "Changes LayerSpectrum Published PublishedPoint Results Run Variant "
    "plot_accuracy plot_classes plot_curves plot_history plot_ranks plot_spectra report save_figure table text",
    "runtimes.rank_grid": "Grid probe",
    "runtimes.timing": "Comparison Interval",
    "training": "Distillation Finetuned History distill finetune",
}
"""The public names by their modules, which are imported when the first of their names is asked for."""

_MODULES = {name: f"{__name__}.{module}" for module, names in _NAMES.items() for name in names.split()}

# fmt: off
__all__ = [
    "Accuracy", "Analysis", "Budget", "Calibration", "Changes", "Comparison", "Compressed", "CompressedCheckpoint",
    "Cost", "Curve", "Distillation",
    "Energy", "Epoch", "Exported", "Fidelity", "Finetuned", "Grid", "History", "InterpolativeLayer", "Interval",
    "LatencyNote",
    "LatencyTable", "LayerAnalysis", "LayerPlan", "LayerSpectrum", "LowRankConv1d", "LowRankConv2d",
    "LowRankConvTranspose2d", "LowRankEmbedding", "LowRankEmbeddingBag", "LowRankLinear", "Measurement",
    "MemoryEstimate", "Plan", "Published", "PublishedPoint", "Quantized", "QuantizedRow", "QuantizedTable", "Rank",
    "Ratio", "Results", "Run", "Score",
    "SpatialConv2d", "Spectrum", "Tucker2Conv2d", "Variant", "accuracy", "analyze", "calibrate",
    "compare_quantized", "compress", "compress_checkpoint", "distill", "errors", "estimate_memory", "evaluate",
    "export_onnx", "export_openvino", "export_program", "finetune", "latency_table", "load", "measure", "merge",
    "onnx_accuracy", "pareto", "plan", "plot_accuracy", "plot_classes", "plot_curves", "plot_history", "plot_ranks",
    "plot_spectra", "probe", "quantize", "report", "runtime_gain", "save", "save_figure", "sensitivity", "table",
    "text", "training", "write_model_card",
]
# fmt: on


def __getattr__(name: str) -> object:
    if name in _MODULES:
        value: object = getattr(import_module(_MODULES[name]), name)
    elif name.isidentifier() and not name.startswith("_") and find_spec(f"{__name__}.{name}"):
        value = import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value  # Python asks once for each name
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


sys.modules[f"{__name__}.errors"] = errors  # `from spectrim.errors import ModelError` works as well
register()
del register
