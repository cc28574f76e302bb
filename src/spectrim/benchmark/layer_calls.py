"""All that a layer's time depends on, where the layers of a network are called, and which ranks are worth timing."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from spectrim.analysis.spectra import Analysis, LayerAnalysis
from spectrim.core.execution import Inputs, call, evaluating
from spectrim.core.files import Frozen
from spectrim.layers.forms import joint_form_named
from spectrim.layers.tracing import watching
from spectrim.linalg import Ranks


class LayerSignature(Frozen):
    """What two layers must share to take the same time.

    Attributes:
        kind: The layer's class.
        weight: Shape of the weight, as it is stored.
        options: Stride, padding and all others of a convolution, as text.
        bias: Whether it adds one.
        input: Shape of the input, batch included.
        dtype: Type of the numbers.
        device: What they are on; of a GPU, its name.
    """

    kind: str
    weight: tuple[int, ...]
    options: str
    bias: bool
    input: tuple[int, ...]
    dtype: str
    device: str


_OPTIONS = ("stride", "padding", "padding_mode", "dilation", "groups", "output_padding")


def signature_of(layer: nn.Module, x: Tensor) -> LayerSignature:
    """The signature of a layer with this input."""
    weight = layer.get_parameter("weight")
    return LayerSignature(
        kind=type(layer).__name__,
        weight=tuple(weight.shape),
        options=", ".join(f"{name}={getattr(layer, name)}" for name in _OPTIONS if hasattr(layer, name)),
        bias=layer._parameters.get("bias") is not None,
        input=tuple(x.shape),
        dtype=str(weight.dtype).removeprefix("torch."),
        device=torch.cuda.get_device_name(weight.device) if weight.is_cuda else weight.device.type,
    )


@dataclass(frozen=True, eq=False)
class LayerCalls:
    """A unit of the analysis: the signatures with which it is called, and how often with each."""

    layer: LayerAnalysis
    signatures: Counter[LayerSignature]


def layer_calls(
    model: nn.Module, inputs: Inputs, analysis: Analysis
) -> tuple[list[LayerCalls], dict[LayerSignature, nn.Module]]:
    """Where the layers that can be factored are called in one pass, and one layer for each distinct signature."""
    owner = {name: layer.name for layer in analysis for name in layer.unit.names}
    called: dict[str, Counter[LayerSignature]] = {}
    examples: dict[LayerSignature, nn.Module] = {}

    def count(name: str, layer: nn.Module, x: Tensor, _: Any) -> None:
        signature = signature_of(layer, x)
        called.setdefault(owner.get(name, name), Counter())[signature] += 1
        examples.setdefault(signature, layer)

    with evaluating(model), watching(model, count):
        call(model, inputs)
    timed = (layer for layer in analysis if layer.problems and layer.forms and not layer.is_lookup)
    candidates = [layer for layer in timed if layer.name in called]
    return [LayerCalls(layer, called[layer.name]) for layer in candidates], examples


class Variant(NamedTuple):
    """A form at some ranks; of a layer that is narrowed together with others, its inputs, outputs and heads (or 0)."""

    form: str
    ranks: Ranks
    sizes: tuple[int, ...] = ()


Axes = tuple[tuple[int, ...], ...]
"""The ranks of one form to time, ascending: one axis, or those of rank_in and of rank in the tucker2 form."""

FormAxes = tuple[tuple[str, Axes], ...]
"""The axes of every form."""


def axes_of(layer: LayerAnalysis, form: str, *, multiple: int, points: int, below: Sequence[int] = ()) -> Axes | None:
    """The ranks to time: up to `points` of those on the grid that shrink the layer, or None where none does.

    On the grid are multiples, and full ranks. Small layers, of at most four multiples, get those `below` the first
    multiple as well.
    """
    full = layer.full_ranks(form)
    more = below if layer.full_rank <= _SMALL * multiple else ()
    grids = [sorted({*(rank for rank in more if rank < most), *range(multiple, most, multiple), most}) for most in full]
    least = [grid[0] for grid in grids]
    axes = []
    for place, grid in enumerate(grids):
        costs = (layer.cost(form, (*least[:place], rank, *least[place + 1 :]), "plain") for rank in grid)
        fits = [rank for rank, cost in zip(grid, costs, strict=True) if layer.shrinks(cost)]
        if not fits:
            return None
        axes.append(_spread(fits, points=points, multiple=multiple))
    return tuple(axes)


_SMALL = 4
"""Multiples that the full rank of a small layer holds."""


def joint_axis(last: LayerAnalysis, form: str, *, multiple: int, points: int, below: Sequence[int] = ()) -> list[int]:
    """The ranks to time of layers that are narrowed together: up to `points` of the grid below the full rank."""
    (full,) = last.full_ranks(form)
    more = [rank for rank in below if rank < full] if full <= _SMALL * multiple else []
    return sorted({*more, *_spread(range(multiple, full, multiple), points=points, multiple=multiple)})


def narrowed_variants(last: LayerAnalysis, form: str, rank: int) -> dict[str, Variant]:
    """By name of the layers that are narrowed together, what becomes of each."""
    joint, geometry = joint_form_named(form), last.geometry
    assert geometry is not None
    (fed,), (own,) = (numbers.tolist() for numbers in joint.sizes(last.unit, np.array([[rank]], dtype=np.int64)))
    heads, own_heads = (fed // rank, own // rank) if joint.by_head else (0, 0)
    sizes = (geometry.into, own, own_heads) if joint.narrows_outputs else (own, geometry.outputs, own_heads)
    feeders = {feeder.name: (feeder.geometry.into, fed, heads) for feeder in last.feeders if feeder.geometry}
    return {name: Variant(form, (rank,), each) for name, each in (feeders | {last.name: sizes}).items()}


def _spread(grid: Sequence[int], *, points: int, multiple: int) -> tuple[int, ...]:
    """Some of the grid, its ends among them; a rank that is no multiple costs what it costs, and is not mixed in."""
    whole = [rank for rank in grid if rank % multiple == 0]
    places = np.linspace(0, len(whole) - 1, min(points, len(whole))).round().astype(int)
    return tuple(sorted({*(whole[place] for place in places), *(rank for rank in grid if rank % multiple)}))
