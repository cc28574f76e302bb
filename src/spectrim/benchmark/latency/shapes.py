"""All that a layer's time depends on, where the layers of a network are called, and which ranks are worth timing."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from spectrim.analysis.spectra import Analysis, LayerAnalysis
from spectrim.core.execution import Inputs, call, evaluating, watching
from spectrim.core.files import Frozen
from spectrim.core.plans import FormName
from spectrim.linalg import Ranks


class Shape(Frozen):
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


def shape_of(layer: nn.Module, given: Tensor) -> Shape:
    """The shape of a layer that is given this input."""
    weight = layer.get_parameter("weight")
    return Shape(
        kind=type(layer).__name__,
        weight=tuple(weight.shape),
        options=", ".join(f"{name}={getattr(layer, name)}" for name in _OPTIONS if hasattr(layer, name)),
        bias=layer._parameters.get("bias") is not None,
        input=tuple(given.shape),
        dtype=str(weight.dtype).removeprefix("torch."),
        device=torch.cuda.get_device_name(weight.device) if weight.is_cuda else weight.device.type,
    )


@dataclass(frozen=True, eq=False)
class Use:
    """A weight of the analysis: the shapes in which it is called, and how often each; with a layer of that shape."""

    layer: LayerAnalysis
    shapes: Counter[Shape]


def uses(model: nn.Module, inputs: Inputs, analysis: Analysis) -> tuple[list[Use], dict[Shape, nn.Module]]:
    """Where the layers that can be factored are called in one pass, and one layer for each distinct shape."""
    owner = {name: one.name for one in analysis for name in (one.name, *one.also)}
    called: dict[str, Counter[Shape]] = {}
    examples: dict[Shape, nn.Module] = {}

    def watch(name: str, layer: nn.Module, given: Tensor, _: Any) -> None:
        shape = shape_of(layer, given)
        called.setdefault(owner.get(name, name), Counter())[shape] += 1
        examples.setdefault(shape, layer)

    with evaluating(model), watching(model, watch):
        call(model, inputs)
    found = [Use(one, called[one.name]) for one in analysis if one.problems and one.forms and one.name in called]
    needed = {shape for use in found for shape in use.shapes}
    return found, {shape: layer for shape, layer in examples.items() if shape in needed}


@dataclass(frozen=True)
class Variant:
    """A form at some ranks."""

    form: FormName
    ranks: Ranks


Axes = tuple[tuple[int, ...], ...]
"""The ranks of one form to time, ascending: one axis, or those of rank_in and of rank in the tucker2 form."""

FormAxes = tuple[tuple[FormName, Axes], ...]
"""The axes of every form."""


def axes_of(
    layer: LayerAnalysis, form: FormName, *, multiple: int, points: int, below: Sequence[int] = ()
) -> Axes | None:
    """The ranks to time: up to `points` of those on the grid that shrink the layer, or None where none does.

    On the grid are multiples, and full ranks. Small layers, of at most four multiples, get those `below` the first
    multiple as well.
    """
    assert layer.sizes is not None
    full = layer.sizes.full_ranks(form)
    more = below if layer.full_rank <= _SMALL * multiple else ()
    grids = [sorted({*(rank for rank in more if rank < most), *range(multiple, most, multiple), most}) for most in full]
    least = [grid[0] for grid in grids]
    found = []
    for place, grid in enumerate(grids):
        fits = [rank for rank in grid if _shrinks(layer, form, (*least[:place], rank, *least[place + 1 :]))]
        if not fits:
            return None
        found.append(_spread(fits, points=points, multiple=multiple))
    return tuple(found)


_SMALL = 4
"""Multiples that the full rank of a small layer holds."""


def _shrinks(layer: LayerAnalysis, form: FormName, ranks: Ranks) -> bool:
    return layer.shrinks(layer.cost(form, ranks, "plain"))


def _spread(grid: Sequence[int], *, points: int, multiple: int) -> tuple[int, ...]:
    """Some of the grid, its ends among them; a rank that is no multiple costs what it costs, and is not mixed in."""
    whole = [rank for rank in grid if rank % multiple == 0]
    places = np.unique(np.linspace(0, len(whole) - 1, min(points, len(whole))).round().astype(int))
    return tuple(sorted({*(whole[place] for place in places), *(rank for rank in grid if rank % multiple)}))
