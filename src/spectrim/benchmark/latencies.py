"""Times of layers as a value: by form and ranks, straight lines in between; what a whole plan would take."""

import math
from collections.abc import Sequence
from typing import Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from spectrim.core.errors import PlanError
from spectrim.core.files import Frozen
from spectrim.core.plans import Plan
from spectrim.linalg import FloatArray


class FormTimes(Frozen):
    """Times of one layer in one form.

    Attributes:
        form: The form.
        axes: The ranks that were timed, ascending: one axis, or those of rank_in and of rank in the tucker2 form.
        ms: Milliseconds of one pass at every combination of the axes, the last axis running fastest.
    """

    form: str
    axes: tuple[tuple[int, ...], ...] = Field(min_length=1)
    ms: tuple[float, ...]

    @model_validator(mode="after")
    def _complete(self) -> Self:
        ascending = all(axis and list(axis) == sorted({*axis}) for axis in self.axes)
        if not ascending or len(self.ms) != math.prod(map(len, self.axes)):
            raise ValueError(f"the times of the {self.form} form need ascending ranks, and a time for each of them")
        return self

    def covers(self, ranks: npt.NDArray[np.int64], *, step: int, below: int) -> npt.NDArray[np.bool_]:
        """Which of the ranks (n, number of axes) have a known time; see `covered`."""
        grids = (covered(axis, step=step, below=below) for axis in self.axes)
        on = [np.isin(values, grid) for grid, values in zip(grids, ranks.T, strict=True)]
        return np.asarray(np.stack(on, axis=1).all(axis=1))

    def at(self, ranks: npt.NDArray[np.int64]) -> FloatArray:
        """Milliseconds at ranks (n, number of axes) that are covered, (n,); between timed ranks on straight lines."""
        times = np.array(self.ms).reshape([len(axis) for axis in self.axes])[None]
        for axis, values in zip(self.axes, ranks.T, strict=True):
            # the weight of each timed rank: 1 there, 0 at the next ones
            weights = np.stack([np.interp(values, axis, unit) for unit in np.eye(len(axis))], axis=1)
            times = (times * weights.reshape(*weights.shape, *[1] * (times.ndim - 2))).sum(axis=1)
        return times


def covered(axis: Sequence[int], *, step: int, below: int) -> npt.NDArray[np.int64]:
    """The ranks whose time follows from those of an axis, ascending: multiples of `step`, the last one, those `below`.

    What lies between the timed ranks is known for multiples only: time climbs in steps.
    """
    return np.unique([*range(step, axis[-1] + 1, step), axis[-1], *(rank for rank in axis if rank < below)])


class LayerTimes(Frozen):
    """Times of one weight's layers, all their calls together.

    Attributes:
        name: The layer's name in the model.
        dense_ms: Milliseconds of a pass as it is.
        forms: Its forms; one without ranks that shrink the layer is not among them. The times of one in which it is
            narrowed together with layers that feed it are those of all of these.
    """

    name: str
    dense_ms: float
    forms: tuple[FormTimes, ...]

    def of(self, form: str) -> FormTimes | None:
        """The times of one form."""
        return next((times for times in self.forms if times.form == form), None)


class LatencyTable(Frozen):
    """What every layer of a network takes in every form, timed by itself on one machine and runtime.

    A network with factors is predicted to take `network_ms` + sum over its factored layers of (factored - dense).

    Attributes:
        runtime: What ran the layers.
        threads: With so many threads.
        batch: Inputs of a pass; absent where the example inputs were taken as they are.
        fingerprint: Machine, runtime and versions.
        rank_multiple: The ranks that are covered are multiples of it, full ranks, and those below it that were timed.
        network_ms: Milliseconds of one pass of the whole dense network.
        layers: The layers that can be factored.
    """

    version: Literal[1] = 1
    runtime: str
    threads: int = Field(ge=1)
    batch: int | None = Field(default=None, ge=1)
    fingerprint: str
    rank_multiple: int = Field(ge=1)
    network_ms: float = Field(gt=0)
    layers: tuple[LayerTimes, ...]

    def of(self, name: str) -> LayerTimes | None:
        """The times of one layer, None for one that was not timed."""
        return next((layer for layer in self.layers if layer.name == name), None)

    def predict(self, plan: Plan) -> float:
        """Milliseconds of one pass of the network that a plan makes. Ranks between multiples count as the next one.

        Raises:
            PlanError: the plan has a layer, a form or a rank that was not timed.
        """
        chosen = (layer for layer in plan.factored if layer.unit in (None, layer.name))
        changes = (self._change(layer.name, layer.form, layer.ranks, plan.feeders(layer.name)) for layer in chosen)
        return self.network_ms + math.fsum(changes)

    def _change(self, name: str, form: str, ranks: Sequence[int], feeders: Sequence[str]) -> float:
        layer = self.of(name)
        times = layer.of(form) if layer else None
        if layer is None or times is None:
            raise PlanError(f"the latency table has no {form} form of {name}; make one with st.latency_table")
        if any(rank > axis[-1] for rank, axis in zip(ranks, times.axes, strict=True)):
            largest = " and ".join(str(axis[-1]) for axis in times.axes)
            raise PlanError(
                f"the latency table holds the {form} form of {name} up to rank {largest}, and no times above; the plan "
                f"wants {' and '.join(map(str, ranks))}"
            )
        grids = (covered(axis, step=self.rank_multiple, below=self.rank_multiple) for axis in times.axes)
        whole = [grid[np.searchsorted(grid, rank)] for rank, grid in zip(ranks, grids, strict=True)]
        dense = [known.dense_ms for each in feeders if (known := self.of(each))]
        return float(times.at(np.array([whole]))[0]) - math.fsum([layer.dense_ms, *dense])
