"""What the first pass over a model learns of each block, as a file: its layers, what their ranks lose, and cost."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from spectrim.analysis.spectra import Analysis, LayerAnalysis
from spectrim.core.files import write_atomically
from spectrim.core.names import Metric
from spectrim.integrations.shards import open_shard
from spectrim.integrations.work_folders import BEGIN_ANEW
from spectrim.layers.cost import NetworkCost
from spectrim.layers.forms import find_form
from spectrim.layers.types import LAYER_TYPES, Geometry, Positions
from spectrim.layers.units import SingleWeight
from spectrim.layers.units.base import Weight
from spectrim.linalg import ChannelDecomposition, Problem, Spectrum

_KEY = "spectrim"


def write_spectra(path: Path, analysis: Analysis, *, metric: Metric) -> None:
    """Write an analysis of a block, in one metric."""
    values, layers = {}, []
    for layer in analysis:
        totals: dict[Metric, float] = {}
        if layer.problems:
            own: Metric = metric if metric in layer.problems else "plain"
            totals[own] = layer.problems[own].total
            decomposition = ChannelDecomposition.of_values(layer.problems[own])
            values[f"{layer.name}:{own}"] = torch.from_numpy(decomposition.spectrum.values.copy())
        layer_type = layer.weight.layer_type.name if layer.weight.layer_type else None
        entry = {
            "weight": asdict(replace(layer.weight, layer_type=None)) | {"layer_type": layer_type},
            "skip_reason": layer.skip_reason,
            "forms": [form for form in layer.forms if (find_form(form).solved_as or form) == layer.forms[0]],
            "totals": totals,
        }
        layers.append(entry)
    described = {
        "layers": layers,
        "macs": analysis.whole.macs,
        "sensitivity": {name: dict(own) for name, own in analysis.sensitivity.items()},
        "metrics": analysis.metrics,
    }
    write_atomically(path, lambda part: save_file(values, part, metadata={_KEY: json.dumps(described)}))


def read_units(path: Path) -> tuple[SingleWeight, ...]:
    """The layers of a block as they were traced."""
    with open_shard(path, hint=BEGIN_ANEW) as opened:
        return tuple(_unit(entry) for entry in json.loads(opened.metadata()[_KEY])["layers"])


def read_spectra(paths: Iterable[Path], *, whole: NetworkCost) -> Analysis:
    """The analysis of all blocks together, of a model that costs `whole`: enough for a plan, and without factors."""
    layers: list[LayerAnalysis] = []
    metrics: tuple[Metric, ...] = ("plain",)
    sensitivity: dict[str, dict[str, float]] = {}
    macs = 0
    for path in paths:
        with open_shard(path, hint=BEGIN_ANEW) as opened:
            described = json.loads(opened.metadata()[_KEY])
            values = {key: Spectrum(opened.get_tensor(key).numpy().copy()) for key in opened.keys()}  # noqa: SIM118
        layers += [_layer(entry, values) for entry in described["layers"]]
        metrics = max(metrics, tuple(described["metrics"]), key=len)
        sensitivity |= described["sensitivity"]
        macs += described["macs"]
    return Analysis(tuple(layers), metrics, whole.model_copy(update={"macs": macs}), sensitivity=sensitivity)


def _layer(entry: Mapping[str, Any], values: Mapping[str, Spectrum]) -> LayerAnalysis:
    unit, forms = _unit(entry), tuple(entry["forms"])
    problems, decompositions = {}, {}
    for metric, total in entry["totals"].items():
        problem = Problem(torch.empty(unit.geometry.shape, device="meta"))
        problem.__dict__["total"] = total
        problems[metric] = problem
        decompositions[forms[0], metric] = ChannelDecomposition.of_values(problem, values[f"{unit.name}:{metric}"])
    return LayerAnalysis(unit, forms, problems, _decompositions=dict(decompositions))


def _unit(entry: Mapping[str, Any]) -> SingleWeight:
    fields = dict(entry["weight"])
    kinds = {kind.name: kind for kind in LAYER_TYPES}
    geometry = fields["geometry"]
    fields |= {
        "layer_type": None if fields["layer_type"] is None else kinds[fields["layer_type"]],
        "geometry": geometry and Geometry(**geometry | {"kernel": tuple(geometry["kernel"])}),
        "positions": Positions(**fields["positions"]),
        **{name: tuple(fields[name]) for name in ("tied_names", "call_sites", "shape")},
    }
    return SingleWeight((Weight(**fields),), entry["skip_reason"])
