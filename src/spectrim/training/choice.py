"""Which layers are trained at low rank, and at which rank each."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from spectrim.core.errors import PatternError, RuleError, TrainingError, near
from spectrim.core.plans import Energy, Rank, Ratio
from spectrim.layers.forms import forms_of
from spectrim.layers.replacement import factored_at, own_bias
from spectrim.layers.selection import LayerSelection, Patterns
from spectrim.layers.tracing import Trace
from spectrim.layers.types import find_layer_type
from spectrim.layers.units import SingleWeight
from spectrim.layers.units.single_weight import find_single_weights
from spectrim.linalg import Factors, Spectrum, spectrum
from spectrim.planning.rules import require_reachable

LayerRule = Rank | Ratio | Energy | Mapping[str, int]
"""A rule that gives each layer a rank by itself, or the ranks by the layers' names."""


@dataclass(kw_only=True)
class LayerFilter:
    """The layers to work on: name patterns to `include` and to `exclude`; `keep_last` leaves the one registered last
    out.
    """

    include: Patterns = ("*",)
    exclude: Patterns = ()
    keep_last: bool = False

    def choose(
        self, model: nn.Module, rule: LayerRule, *, trainable_rank: bool = False
    ) -> tuple[dict[SingleWeight, int], dict[str, str]]:
        """The layers that a rule truncates with their ranks, and by name why others stay; raises as `truncated_`."""
        if not isinstance(rule, Rank | Ratio | Energy | Mapping):
            raise RuleError(f"{rule!r} does not say a rank for each layer; give Rank(20), Ratio(0.25) or Energy(0.9)")
        named = model.named_modules(remove_duplicate=False)
        calls = Trace({}, {name: 1 for name, module in named if find_layer_type(module)})
        selection = LayerSelection(self.include, self.exclude, self.keep_last, lookups=False)
        units = find_single_weights(model, calls, selection)
        for unit in units:
            if parametrize.is_parametrized(unit.layer(model)) and "parametrised" in (unit.skip_reason or ""):
                raise TrainingError(
                    f"{unit.name} is parametrised already, perhaps truncated; call finish() or remove() of that "
                    "truncation, or torch's remove_parametrizations, or leave the layer out with exclude="
                )
        skipped = {unit.name: unit.skip_reason for unit in units if unit.skip_reason is not None}
        full = {unit: unit.geometry.full_rank for unit in units if unit.skip_reason is None}
        ranks = _ranks(model, rule, full)
        unnamed = {unit.name: "it is not among the ranks given" for unit in full if unit not in ranks}
        whole = {unit.name: f"rank {rank} is its full rank" for unit, rank in ranks.items() if rank == full[unit]}
        ignored = {**unnamed, **({} if trainable_rank else whole)}
        layers = {unit: ranks[unit] for unit in full if unit.name not in ignored}
        if not layers:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in [*whole.items(), *skipped.items()][:4])
            advice = "choose a smaller rank or other layers"
            raise TrainingError(f"{rule} leaves no layer to truncate ({reasons}); {advice}")
        return layers, {**skipped, **ignored}


def _ranks(model: nn.Module, rule: LayerRule, full: Mapping[SingleWeight, int]) -> dict[SingleWeight, int]:
    """The rank of every layer that the rule applies to, given the full ranks."""
    if isinstance(rule, Mapping):
        layers = {name: unit for unit in full for name in unit.names}
        require_ranks(rule, {name: full[unit] for name, unit in layers.items()})
        return {layers[name]: rank for name, rank in rule.items()}
    require_reachable(rule, {unit.name: (unit.weight.shape, most) for unit, most in full.items()})
    match rule:
        case Rank(rank=rank):
            return dict.fromkeys(full, rank)
        case Ratio():
            return {unit: rule.rank_of(most) for unit, most in full.items()}
        case Energy(energy=energy):
            return {unit: weight_spectrum(unit, weight_of(unit, model)).rank_for(energy) for unit in full}


def require_ranks(ranks: Mapping[str, int], full: Mapping[str, int]) -> None:
    """Raise `PatternError` for a name of no layer, and `RuleError` for a rank that its layer cannot have."""
    for name, rank in ranks.items():
        if name not in full:
            raise PatternError(f"there is no layer {name!r} to give rank {rank} to{near(str(name), full)}")
        if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= full[name]:
            raise RuleError(f"rank {rank!r} for {name}: give a whole number from 1 to its full rank, {full[name]}")


def weight_of(unit: SingleWeight, model: nn.Module) -> nn.Parameter:
    """A unit's weight in `model`."""
    return unit.layer(model).get_parameter("weight")


def require_finite(name: str, weight: Tensor) -> None:
    """Raise `TrainingError` for a weight that became NaN or infinite."""
    if not torch.isfinite(weight).all():
        raise TrainingError(f"the weight of {name} became NaN or infinite; lower the learning rate or check the data")


def weight_spectrum(unit: SingleWeight, weight: Tensor) -> Spectrum:
    """The singular values of a unit's weight; raises as `require_finite`."""
    require_finite(unit.name, weight)
    return spectrum(unit.matrices(weight.detach()))


def shrinks(unit: SingleWeight, rank: int) -> bool:
    """Whether factors of this rank have fewer parameters than the weight."""
    return forms_of(unit)[0].cost(unit, (rank,)).params < unit.geometry.dense_cost(unit.weight.positions).params


def factored(model: nn.Module, unit: SingleWeight, factors: Factors) -> dict[str, nn.Module]:
    """The factored layers, with the biases of the dense ones, for every name of a unit's weight in `model`."""
    return factored_at(model, unit.names, form=forms_of(unit)[0].name, factors=factors, bias=own_bias)
