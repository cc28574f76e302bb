"""How much memory a compression will take, told before it is taken."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from spectrim.analysis.sensitivities import require_cache_bytes
from spectrim.core.arguments import checked
from spectrim.core.batches import batches_of
from spectrim.core.display import Displayed
from spectrim.core.errors import DataError, ResourceError
from spectrim.core.execution import Inputs, as_inputs
from spectrim.core.files import Frozen
from spectrim.core.memory import Storage, free_bytes
from spectrim.core.plans import Metric, Plan, Rule
from spectrim.layers.narrowing import selected_units
from spectrim.layers.selection import LayerSelection, Patterns, TreatAs
from spectrim.layers.unfusing import unfused
from spectrim.layers.units import Unit
from spectrim.planning.decisions import limits_whole_size, takes_layers_together
from spectrim.planning.footprints import Stages, Work
from spectrim.planning.resources import DataSize, RunOptions

_MARGIN, _LIBRARIES = 1.2, 2**26
"""What `MemoryEstimate.peak` has beyond the tensors: for gaps between them, and for what libraries take."""


class MemoryEstimate(Displayed, Frozen):
    """Bytes that a compression takes besides the model, in its parts and at its highest.

    Attributes:
        networks: Copies of weights: those that are decomposed, the compressed network, one with the same ranks that
            it is compared with, and the factors.
        statistics: Covariances of the layers' inputs and moments of their gradients, of all layers; with `offload`
            those that are in memory.
        decompositions: The bases of all layers and metrics, and what the layer `widest` needs while it is decomposed
            and fitted.
        batches: Calibration inputs that are kept; 0 where they are streamed, or in memory already.
        activations: The cache, and the tensors of one pass over a batch: with gradients all of them, else those that
            are alive together.
        peak: The most that is alive together, with a margin for what the allocator and libraries take: while
            statistics are gathered, while gradients are, while layers are weighed, while they are fitted, while the
            network is distilled, or while the networks are compared.
        tensors: The same without the margin.
        widest: The layer whose statistics and decomposition take most; None where nothing is decomposed.
        available: Bytes that were free when this was estimated, on the device of the statistics.
    """

    PARTS: ClassVar = ("networks", "statistics", "decompositions", "batches", "activations")

    networks: int = Field(ge=0)
    statistics: int = Field(ge=0)
    decompositions: int = Field(ge=0)
    batches: int = Field(ge=0)
    activations: int = Field(ge=0)
    peak: int = Field(ge=0)
    tensors: int = Field(ge=0)
    widest: str | None
    available: int = Field(ge=0)

    def require(self) -> None:
        """Raise `ResourceError` if even without the margin this is more than is free."""
        if self.tensors <= self.available:
            return
        largest = max(self.PARTS, key=lambda name: int(getattr(self, name)))
        layer = f", most for the layer {self.widest!r}" if largest in ("statistics", "decompositions") else ""
        exclude = f"leave that layer dense (exclude=[{self.widest!r}]), " if self.widest else ""
        sizes = self.tensors, self.available, getattr(self, largest)
        needed, free, part = (f"{size / 1e6:,.0f} MB" for size in sizes)
        raise ResourceError(
            f"this needs about {needed} of memory, and {free} are free; the {largest} take {part}{layer}. "
            f"To need less: {exclude}give fewer calibration samples (max_batches=) or a smaller cache=, "
            "keep statistics on a disk (offload=), or use Rank instead of a Budget"
        )


@checked
def estimate_memory(
    model: nn.Module,
    rule_or_plan: Rule | Plan,
    *,
    example_inputs: Any,
    data: Iterable[Any] | None = None,
    samples: int | None = None,
    max_batches: int | None = None,
    metric: Metric | None = None,
    forms: Sequence[str] | None = None,
    include: Patterns = ("*",),
    exclude: Patterns = (),
    keep_last: bool = False,
    treat_as: TreatAs | None = None,
    reconstruct: Literal["auto"] | bool = "auto",
    distill: bool = False,
    cache: int | None = None,
    device: str | torch.device | None = None,
    offload: str | Path | None = None,
) -> MemoryEstimate:
    """How much memory `st.compress` with these arguments takes besides the model, from shapes and one traced pass.

    Nothing is decomposed and no data are read: of a list or tuple the sizes of its tensors are looked at, of a
    `DataLoader` its length and batch size. Of other iterables give `samples`; their batches are taken to be as large as
    the example. Layers that are called several times are taken to see different inputs each time, up to 64 places of
    each sample. Where the statistics are on another device than the model, `peak` is what that device holds.

    Args:
        model: The model; left as it is.
        rule_or_plan: As for `st.compress`, and so are the arguments that are not listed here.
        example_inputs: One call's inputs.
        data: The calibration batches; None for none.
        distill: Whether the network is distilled afterwards.
        samples: How many calibration samples there are, where `data` cannot tell, or is not there yet.

    Raises:
        DataError: data of unknown size, and no `samples`.
        ModelError: nothing to factor, or a model that cannot run `example_inputs`.
        PatternError: a pattern that matches no layer.
        EngineError: a device that this machine does not have.
        FileError: an offload folder that cannot be written to.
    """
    require_cache_bytes(cache)
    if samples is not None and samples < 1:
        raise DataError(f"samples={samples}: give at least 1, or None where the data tell it")
    batches_of([] if data is None else data, what="the calibration data", max_batches=max_batches)
    run = RunOptions(cache, Storage.of(device, offload), max_batches, reconstruct, distill)
    example = as_inputs(example_inputs)
    size: DataSize | None = None
    if data is not None or samples is not None:
        size = DataSize.of([] if data is None else data, example, max_batches=max_batches, samples=samples)
        if data is None and samples:
            size = DataSize(samples, min(example.samples, samples), resident=False)
        if size is not None and not size.samples:
            raise DataError("the calibration data is empty; give at least one batch")
        if size is None:
            raise DataError("how many samples the data have cannot be known without reading them; give samples=")
    treated = {} if treat_as is None else treat_as
    lookups, together = limits_whole_size(rule_or_plan), takes_layers_together(rule_or_plan)
    selection = LayerSelection(include, exclude, keep_last, treated, lookups=lookups, together=together)
    model = unfused(model, selection.unfuses)
    units = selected_units(model, example, selection)
    return estimated(model, example, units, Work(rule_or_plan, metric, forms, size, run))


def estimated(model: nn.Module, example: Inputs, units: Sequence[Unit], work: Work) -> MemoryEstimate:
    """As `estimate_memory`, of units that were found already."""
    stages = Stages.of(model, example, units, work)
    top, widest = max(stages.bytes().values()), stages.widest
    return MemoryEstimate(
        networks=stages.weights + stages.copies,
        statistics=stages.statistics,
        decompositions=stages.bases + stages.most("fitting" if work.is_fitted else "working"),
        batches=stages.batches,
        activations=stages.cache + max(stages.forward, stages.backward),
        peak=int(_MARGIN * top) + _LIBRARIES,
        tensors=top,
        widest=widest.unit.name if widest else None,
        available=free_bytes(work.run.storage.device_for(model)),
    )
