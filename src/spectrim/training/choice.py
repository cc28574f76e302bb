"""Which layers are trained at low rank, and at which rank each."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.utils import parametrize

from spectrim.core.errors import PatternError, RuleError, TrainingError
from spectrim.core.execution import Trace
from spectrim.core.plans import Energy, Rank, Ratio
from spectrim.layers.registry import LAYERS, forms_of, geometry, matrices
from spectrim.layers.replacement import factored_at, own_bias
from spectrim.layers.selection import Patterns, Target, find_targets, near
from spectrim.linalg import Factors, is_finite, spectrum
from spectrim.planning.rules import require_reachable

LayerRule = Rank | Ratio | Energy | Mapping[str, int]
"""A rule that gives each layer a rank by itself, or the ranks by the layers' names."""


@dataclass(kw_only=True)
class LayerFilter:
    """The layers to work on.

    Attributes:
        include: Name patterns of the layers.
        exclude: Name patterns of layers to leave out.
        keep_last: Leave out the layer registered last.
    """

    include: Patterns = ("*",)
    exclude: Patterns = ()
    keep_last: bool = False

    def choose(
        self, model: nn.Module, rule: LayerRule, *, trainable_rank: bool = False
    ) -> tuple[dict[Target, int], dict[str, str]]:
        """The layers that a rule truncates with their ranks, and by name why others stay; raises as `truncated_`."""
        if not isinstance(rule, Rank | Ratio | Energy | Mapping):
            raise RuleError(f"{rule!r} does not say a rank for each layer; give Rank(20), Ratio(0.25) or Energy(0.9)")
        named = model.named_modules(remove_duplicate=False)
        calls = Trace({}, {name: 1 for name, module in named if isinstance(module, LAYERS)})
        targets = find_targets(model, calls, include=self.include, exclude=self.exclude, keep_last=self.keep_last)
        for target in targets:
            if parametrize.is_parametrized(target.module) and "parametrised" in (target.refusal or ""):
                raise TrainingError(
                    f"{target.name} is parametrised already, perhaps truncated; call finish() or remove() of that "
                    "truncation, or torch's remove_parametrizations, or leave the layer out with exclude="
                )
        skipped = {target.name: target.refusal for target in targets if target.refusal is not None}
        full = {target: geometry(target.module).full_rank for target in targets if target.refusal is None}
        ranks = _ranks(rule, full)
        unnamed = {target.name: "it is not among the ranks given" for target in full if target not in ranks}
        whole = {target.name: f"rank {rank} is its full rank" for target, rank in ranks.items() if rank == full[target]}
        ignored = {**unnamed, **({} if trainable_rank else whole)}
        layers = {target: ranks[target] for target in full if target.name not in ignored}
        if not layers:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in [*whole.items(), *skipped.items()][:4])
            raise TrainingError(
                f"{rule} leaves no layer to truncate ({reasons}); choose a smaller rank or other layers"
            )
        return layers, {**skipped, **ignored}


def _ranks(rule: LayerRule, full: Mapping[Target, int]) -> dict[Target, int]:
    """The rank of every layer that the rule applies to, given the full ranks."""
    if isinstance(rule, Mapping):
        layers = {name: target for target in full for name in (target.name, *target.also)}
        require_ranks(rule, {name: full[target] for name, target in layers.items()})
        return {layers[name]: rank for name, rank in rule.items()}
    shapes = {target.name: (target.module.get_parameter("weight").shape, most) for target, most in full.items()}
    require_reachable(rule, shapes)
    match rule:
        case Rank(rank=rank):
            return dict.fromkeys(full, rank)
        case Ratio():
            return {target: rule.rank_of(most) for target, most in full.items()}
        case Energy(energy=energy):
            return {target: spectrum(matrices(target.module)).rank_for(energy) for target in full}


def require_ranks(ranks: Mapping[str, int], full: Mapping[str, int]) -> None:
    """Raise `PatternError` for a name of no layer, and `RuleError` for a rank that its layer cannot have."""
    for name, rank in ranks.items():
        if name not in full:
            raise PatternError(f"there is no layer {name!r} to give rank {rank} to{near(str(name), full)}")
        if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= full[name]:
            raise RuleError(f"rank {rank!r} for {name}: give a whole number from 1 to its full rank, {full[name]}")


def require_finite(name: str, weight: Tensor) -> None:
    """Raise `TrainingError` for a weight that became NaN or infinite."""
    if not is_finite(weight):
        raise TrainingError(f"the weight of {name} became NaN or infinite; lower the learning rate or check the data")


def factored(model: nn.Module, target: Target, factors: Factors) -> dict[str, nn.Module]:
    """The factored layers, with the biases of the dense ones, for every name of a target's weight in `model`."""
    form = forms_of(target.module)[0]
    return factored_at(model, (target.name, *target.also), form=form, factors=factors, bias=own_bias)
