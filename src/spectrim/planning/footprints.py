"""Bytes of every layer, and of every stage of a compression, from shapes and one pass over the example."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import nn

from spectrim.analysis.activation_cache import default_bytes
from spectrim.analysis.moments import covariance_bytes
from spectrim.analysis.sensitivities import DIFFERENTIATED
from spectrim.benchmark.fidelity import SAMPLES
from spectrim.core.execution import Inputs
from spectrim.core.memory import MAPPED_BYTES
from spectrim.core.nested import size_of
from spectrim.core.plans import Budget, Metric, Plan, Rank, Rule
from spectrim.layers.allocations import Allocations
from spectrim.layers.forms import Form, find_form, forms_of, joint_forms_of, selected_forms
from spectrim.layers.types.base import SampledPlaces
from spectrim.layers.units import SingleWeight, Unit
from spectrim.linalg import is_wide
from spectrim.planning.resources import DataSize, RunOptions


@dataclass(frozen=True)
class Work:
    """What is to be done: the arguments of `st.compress` that memory depends on; `data` is None without any."""

    rule_or_plan: Rule | Plan
    metric: Metric | None
    forms: Sequence[str] | str | None
    data: DataSize | None
    run: RunOptions

    @property
    def samples(self) -> int:
        """Of all batches."""
        return self.data.samples if self.data else 0

    @property
    def batch(self) -> int:
        """Samples of the largest batch; the example is run in any case."""
        return self.data.batch if self.data else 1

    @property
    def is_budget(self) -> bool:
        """Whether all layers are decided on together."""
        return isinstance(self.rule_or_plan, Budget)

    @property
    def is_fitted(self) -> bool:
        """Whether layers are fitted one after the other."""
        rule = self.rule_or_plan.rule if isinstance(self.rule_or_plan, Plan) else self.rule_or_plan
        asked = isinstance(rule, Budget) if self.run.reconstruct == "auto" else self.run.reconstruct
        return asked and self.uses_data

    @property
    def uses_data(self) -> bool:
        """Whether there are statistics."""
        return self.data is not None and self._metric != "plain"

    @property
    def has_gradients(self) -> bool:
        """Whether there are moments of gradients."""
        return self.uses_data and (self._metric == "loss" or (self.is_budget and self._metric is None))

    @property
    def rank(self) -> int | None:
        """The rank of every layer, if it is known."""
        return self.rule_or_plan.rank if isinstance(self.rule_or_plan, Rank) else None

    @property
    def _metric(self) -> Metric | None:
        plan = self.rule_or_plan
        return plan.metric if isinstance(plan, Plan) else self.metric

    def forms_of(self, unit: Unit) -> list[Form]:
        """The forms in which a unit is decomposed; none if it stays as it is."""
        if isinstance(self.rule_or_plan, Plan):
            return [find_form(layer.form) for layer in self.rule_or_plan.factored if layer.name == unit.name]
        joint = joint_forms_of(unit) if self.uses_data and self.is_budget else ()
        own: list[Form] = [] if unit.skip_reason else [*forms_of(unit), *joint]
        allowed = selected_forms(self.forms, closed_form=not self.is_budget)
        solved = [form for form in own if form.name in allowed and form.solved_as not in allowed]
        return solved[: None if self.is_budget else 1] or own[:1]


@dataclass(frozen=True)
class Layer:
    """Bytes of one layer.

    Attributes:
        unit: Its weight.
        work: What is to be done.
        example_samples: Samples of the pass that was traced.
    """

    unit: Unit
    work: Work
    example_samples: int

    @property
    def vectors(self) -> int:
        """Input vectors of all samples that one call site looks at."""
        return self._vectors_of(self.work.samples, SampledPlaces())

    def _vectors_of(self, samples: int, most: SampledPlaces) -> int:
        places = -(-self.unit.weights[0].positions.kernel // (max(1, self.example_samples) * len(self.unit.call_sites)))
        geometry = self.unit.weights[0].geometry
        return samples * min(places, (most.of_map if geometry and geometry.kernel else most.of_sequence) or places)

    @cached_property
    def size(self) -> tuple[int, int, int]:
        """Groups, outputs and columns of its matrices."""
        geometry = self.unit.weights[0].geometry
        return (geometry.groups, geometry.out, geometry.width) if geometry else (0, 0, 0)

    @property
    def entries(self) -> int:
        """Of the weight."""
        groups, out, n = self.size
        return groups * out * n

    @property
    def weight(self) -> int:
        """Its copy."""
        return self.entries * self.unit.weights[0].itemsize

    @property
    def itemsize(self) -> int:
        """Bytes of a number of its inputs, in which products are summed."""
        return max(4, self.unit.weights[0].itemsize)

    @cached_property
    def covariance(self) -> int:
        """Statistics of its inputs, at one call site."""
        groups, _, n = self.size
        if self.unit.weights[0].is_lookup:  # how often each row is looked up
            return 8 * n
        return groups * (covariance_bytes(n, vectors=self.vectors, itemsize=self.itemsize) + 8 * n)

    @cached_property
    def statistics(self) -> list[int]:
        """Each array of its statistics."""
        groups, out, _ = self.size
        gradients = [8 * groups * out * out] if self.work.has_gradients else []
        return [self.covariance, *gradients] * len(self.unit.call_sites) * (2 if self.unit.weights[0].stack else 1)

    @property
    def gathering(self) -> int:
        """While a batch is added: its vectors, around their mean, those again for the sampling error, and a product."""
        groups, _, n = self.size
        vectors = self._vectors_of(self.work.batch, SampledPlaces())
        return self.itemsize * groups * n * (4 * vectors + min(n, self.vectors))

    @cached_property
    def bases(self) -> int:
        """Decompositions that are kept once layers have been decided on."""
        each = [form.basis_bytes(self.unit, rank=self.work.rank) for form in self.work.forms_of(self.unit)]
        if not each:
            return 0
        # with gradients layers are weighed in another metric
        return sum(each) + (each[0] if self.work.is_budget and self.work.has_gradients else 0)

    @property
    def factors(self) -> int:
        """The factors: at a given rank, else at most as much as the weight."""
        forms, rank = self.work.forms_of(self.unit), self.work.rank
        if rank is None or not forms:
            return self.weight
        ranks = tuple(min(rank, full) for full in forms[0].full_ranks(self.unit))
        return min(self.weight, forms[0].cost(self.unit, ranks).params * self.unit.weights[0].itemsize)

    @property
    def compared(self) -> int:
        """What the network that is not fitted to data adds."""
        geometry = self.unit.weights[0].geometry
        if not self.work.uses_data or (geometry is not None and is_wide(geometry.shape)):
            return 0
        forms = self.work.forms_of(self.unit)
        return max((form.basis_bytes(self.unit, rank=self.work.rank) for form in forms), default=0) + 8 * self.entries

    @cached_property
    def working(self) -> int:
        """While it is decomposed, or its factors are made."""
        vectors, rank = (self.vectors if self.work.uses_data else None), self.work.rank
        forms = self.work.forms_of(self.unit)
        solving = [form.working_bytes(self.unit, vectors=vectors, rank=rank) for form in forms]
        # the matrices, with or without the metric of the outputs, and the product of factors
        building = 8 * self.entries * (1 + self.work.has_gradients)
        roots = 2 * 8 * self.size[0] * self.size[1] ** 2 * self.work.has_gradients
        return max([*solving, building]) + roots if forms else 0

    @property
    def weighing(self) -> int:
        """While it is factored by itself: also the product of its factors."""
        return max(self.working, 3 * 8 * self.entries)

    @property
    def fitting(self) -> int:
        """While it is fitted: its vectors in, outputs of both networks, covariance, metric and root, and weights."""
        if self.unit.weights[0].is_lookup:
            return self.working
        groups, out, n = self.size
        vectors = self._vectors_of(self.work.samples, SampledPlaces.held(self.work.samples))
        rows = self.itemsize * groups * vectors * (n + 3 * out)
        moments = 3 * groups * covariance_bytes(n, vectors=vectors, itemsize=8)
        roots = 2 * 8 * groups * out * out if self.work.has_gradients else 0
        return rows + self._neurons(vectors) + moments + roots + 5 * 8 * self.entries + self.working

    def _neurons(self, vectors: int) -> int:
        """While the layers before an elementwise function are fitted: what they receive, slopes, and what it gives."""
        unit = self.unit
        if not isinstance(unit, SingleWeight) or unit.heads or unit.scores or not self.work.forms_of(unit):
            return 0
        geometries = [feeder.geometry for feeder in unit.feeders if feeder.geometry is not None]
        return self.itemsize * vectors * sum(2 * own.into + 3 * own.outputs for own in geometries)


@dataclass(frozen=True)
class Stages:
    """What is alive at each stage.

    Attributes:
        model: The model.
        example: One call's inputs.
        layers: Its layers with a matrix.
        allocations: Those of one pass over the example.
        work: What is to be done.
    """

    model: nn.Module
    example: Inputs
    layers: Sequence[Layer]
    allocations: Allocations
    work: Work

    @classmethod
    def of(cls, model: nn.Module, example: Inputs, units: Sequence[Unit], work: Work) -> "Stages":
        """Of the units of a traced model, which is run once."""
        layers = [Layer(unit, work, example.samples) for unit in units if unit.weights[0].geometry is not None]
        return cls(model, example, layers, Allocations.of(model, example), work)

    @property
    def decomposed(self) -> list[Layer]:
        """The layers that are."""
        return [layer for layer in self.layers if self.work.forms_of(layer.unit)]

    @property
    def widest(self) -> Layer | None:
        """The layer that takes most."""
        return max(self.decomposed, key=lambda layer: sum(layer.statistics) + layer.working, default=None)

    @cached_property
    def weights(self) -> int:
        """Copies of the weights that are decomposed."""
        return sum(layer.weight for layer in self.layers)

    @cached_property
    def copy(self) -> int:
        """The compressed network before its layers are exchanged, and their factors."""
        whole = size_of([*self.model.parameters(), *self.model.buffers()])
        return whole + sum(layer.factors for layer in self.decomposed)

    @cached_property
    def copies(self) -> int:
        """That, and the network it is compared with."""
        return self.copy * (2 if any(layer.compared for layer in self.decomposed) else 1)

    @cached_property
    def statistics(self) -> int:
        """Those in memory."""
        arrays = [size for layer in self.decomposed for size in layer.statistics] if self.work.uses_data else []
        return sum(size for size in arrays if self.work.run.storage.folder is None or size < MAPPED_BYTES)

    @property
    def bases(self) -> int:
        """Those of all layers."""
        return sum(layer.bases for layer in self.decomposed)

    @property
    def batches(self) -> int:
        """Calibration inputs that are kept, if they are run several times."""
        work, data = self.work, self.work.data
        repeated = work.uses_data and (work.is_budget or work.is_fitted or work.has_gradients or work.run.distill)
        if data is None or data.resident or not repeated:
            return 0
        return self._of_samples(size_of(self.example.tensors()), data.samples)

    @property
    def forward(self) -> int:
        """One pass over a batch."""
        return self._of_samples(self.allocations.alive + self.allocations.operator, self.work.batch)

    @property
    def backward(self) -> int:
        """One pass over a part of a batch with gradients: what all functions give is kept, for training with copies."""
        work, whole = self.work, self.work.run.distill or not self.example.splits
        if not (work.has_gradients or work.run.distill):
            return 0
        size = self.allocations.total + (self.allocations.total if work.run.distill else self.allocations.alive)
        return self._of_samples(size, work.batch if whole else min(work.batch, DIFFERENTIATED))

    @property
    def cache(self) -> int:
        """Activations kept to save time: no more than there are."""
        work = self.work
        if work.data is None or not (work.is_fitted or (work.is_budget and work.uses_data)):
            return 0
        limit = max(default_bytes(), self.statistics) if work.run.cache is None else work.run.cache
        return min(limit, self._of_samples(self.allocations.total, work.data.samples))

    def _of_samples(self, size: int, samples: int) -> int:
        return -(-size * samples // max(1, self.example.samples))

    def most(self, attribute: str) -> int:
        """The largest value that a layer has of this."""
        return max((int(getattr(layer, attribute)) for layer in self.decomposed), default=0)

    def bytes(self) -> dict[str, int]:
        """By stage."""
        work = self.work
        start = self.weights + self.statistics + self.batches
        decided = start + self.bases
        outputs, of_batch = (
            self._of_samples(self.allocations.outputs, min(work.samples, most)) for most in (SAMPLES, work.batch)
        )
        compared = sum(layer.compared for layer in self.decomposed)
        stages = {"decide": decided + self.most("working"), "build": decided + self.copy + self.most("working")}
        if work.uses_data:
            stages["calibrate"] = start + self.forward + self.most("gathering")
            stages["compare"] = decided + compared + self.copies + self.forward + 4 * of_batch
        if work.has_gradients:
            stages["differentiate"] = start + self.backward
        if work.uses_data and work.is_budget:
            stages["weigh"] = decided + self.cache + self.forward + outputs + self.most("weighing")
        if work.is_fitted:
            stages["fit"] = decided + self.copy + self.cache + self.forward + self.most("fitting")
        if work.run.distill:  # two copies, gradients, two moments, and the best weights so far
            stages["distil"] = decided + self.copy + 5 * size_of(list(self.model.parameters())) + self.backward
        return stages
