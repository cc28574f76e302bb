"""Spectrim makes trained neural networks smaller and faster by low-rank factorisation, and proves what was gained."""

import sys
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

from spectrim.core import errors
from spectrim.integrations.registration import register

if TYPE_CHECKING:
    from spectrim import training as training
    from spectrim.analysis.calibration import Calibration as Calibration, calibrate as calibrate
    from spectrim.analysis.sensitivities import sensitivity as sensitivity
    from spectrim.analysis.spectra import Analysis as Analysis, LayerAnalysis as LayerAnalysis, analyze as analyze
    from spectrim.benchmark.fidelity import Fidelity as Fidelity
    from spectrim.benchmark.latencies import LatencyTable as LatencyTable
    from spectrim.benchmark.latency_table import latency_table as latency_table
    from spectrim.benchmark.measurement import (
        Accuracy as Accuracy,
        Epoch as Epoch,
        Measurement as Measurement,
        accuracy as accuracy,
        measure as measure,
        runtime_gain as runtime_gain,
    )
    from spectrim.compression import Compressed as Compressed, compress as compress
    from spectrim.core.plans import (
        Budget as Budget,
        Cost as Cost,
        Energy as Energy,
        LatencyNote as LatencyNote,
        LayerPlan as LayerPlan,
        Plan as Plan,
        Rank as Rank,
        Ratio as Ratio,
    )
    from spectrim.export import (
        Exported as Exported,
        export_onnx as export_onnx,
        export_openvino as export_openvino,
        export_program as export_program,
    )
    from spectrim.layers.forms import (
        LowRankConv1d as LowRankConv1d,
        LowRankConv2d as LowRankConv2d,
        LowRankConvTranspose2d as LowRankConvTranspose2d,
        LowRankLinear as LowRankLinear,
        SpatialConv2d as SpatialConv2d,
        Tucker2Conv2d as Tucker2Conv2d,
    )
    from spectrim.layers.replacement import merge as merge
    from spectrim.layers.saving import load as load, save as save
    from spectrim.linalg import Spectrum as Spectrum
    from spectrim.planning.budgets import Curve as Curve, pareto as pareto
    from spectrim.planning.memory import MemoryEstimate as MemoryEstimate, estimate_memory as estimate_memory
    from spectrim.planning.rules import plan as plan
    from spectrim.quantization import (
        Quantized as Quantized,
        QuantizedRow as QuantizedRow,
        QuantizedTable as QuantizedTable,
        compare_quantized as compare_quantized,
        onnx_accuracy as onnx_accuracy,
        quantize as quantize,
    )
    from spectrim.reporting import (
        Changes as Changes,
        LayerSpectrum as LayerSpectrum,
        Published as Published,
        PublishedPoint as PublishedPoint,
        Results as Results,
        Run as Run,
        Variant as Variant,
        plot_accuracy as plot_accuracy,
        plot_classes as plot_classes,
        plot_curves as plot_curves,
        plot_history as plot_history,
        plot_ranks as plot_ranks,
        plot_spectra as plot_spectra,
        report as report,
        save_figure as save_figure,
        table as table,
        text as text,
    )
    from spectrim.runtimes.rank_grid import Grid as Grid, probe as probe
    from spectrim.runtimes.timing import Comparison as Comparison, Interval as Interval
    from spectrim.training import Finetuned as Finetuned, History as History, finetune as finetune

__version__ = "0.1.0"

_NAMES = {
    "analysis.calibration": "Calibration calibrate",
    "analysis.sensitivities": "sensitivity",
    "analysis.spectra": "Analysis LayerAnalysis analyze",
    "benchmark.fidelity": "Fidelity",
    "benchmark.latencies": "LatencyTable",
    "benchmark.latency_table": "latency_table",
    "benchmark.measurement": "Accuracy Epoch Measurement accuracy measure runtime_gain",
    "compression": "Compressed compress",
    "core.plans": "Budget Cost Energy LatencyNote LayerPlan Plan Rank Ratio",
    "export": "Exported export_onnx export_openvino export_program",
    "layers.forms": "LowRankConv1d LowRankConv2d LowRankConvTranspose2d LowRankLinear SpatialConv2d Tucker2Conv2d",
    "layers.replacement": "merge",
    "layers.saving": "load save",
    "linalg": "Spectrum",
    "planning.budgets": "Curve pareto",
    "planning.memory": "MemoryEstimate estimate_memory",
    "planning.rules": "plan",
    "quantization": "Quantized QuantizedRow QuantizedTable compare_quantized onnx_accuracy quantize",
    "reporting": "Changes LayerSpectrum Published PublishedPoint Results Run Variant "
    "plot_accuracy plot_classes plot_curves plot_history plot_ranks plot_spectra report save_figure table text",
    "runtimes.rank_grid": "Grid probe",
    "runtimes.timing": "Comparison Interval",
    "training": "Finetuned History finetune",
}
"""The public names by their modules, which are imported when the first of their names is asked for."""

_MODULES = {name: f"{__name__}.{module}" for module, names in _NAMES.items() for name in names.split()}

__all__ = sorted([*_MODULES, "errors", "training"])  # noqa: PLE0605  # type checkers go by the imports above


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
