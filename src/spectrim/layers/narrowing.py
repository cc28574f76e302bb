"""Layers with a space between them that can be narrowed, found by what the network does with it."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace as with_changes
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.core.errors import ModelError
from spectrim.core.execution import Inputs, call, evaluating, temporary
from spectrim.core.nested import alike
from spectrim.layers.forms.base import JointForm
from spectrim.layers.forms.head_qk import HeadQueryKeyForm
from spectrim.layers.forms.head_vo import HeadValueOutputForm
from spectrim.layers.forms.width import WidthForm
from spectrim.layers.head_layouts import Feeding, find_heads, received_by
from spectrim.layers.heads import AroundHeads
from spectrim.layers.replacement import narrowed_at, own_bias, refitted_at, replace
from spectrim.layers.scores import find_scores
from spectrim.layers.selection import LayerSelection
from spectrim.layers.tracing import Trace, trace
from spectrim.layers.types import layer_type_of
from spectrim.layers.units import SingleWeight, Unit, find_units
from spectrim.linalg import Factors, HeadLayout, to_float64

_PLACES, _MOST_FEEDERS = 64, 2


def selected_units(model: nn.Module, inputs: Inputs, selection: LayerSelection) -> tuple[Unit, ...]:
    """Those of one pass over the inputs."""
    seen = trace(model, inputs, treat_as=selection.treat_as)
    units = find_units(model, seen, selection)
    return with_feeders(model, inputs, seen, units) if selection.together else units


def with_feeders(model: nn.Module, inputs: Inputs, trace: Trace, units: Sequence[Unit]) -> tuple[Unit, ...]:
    """The units, with the layers that feed them where what lies between can be narrowed.

    What lies between is tried, see `find_neurons`, `find_heads` and `find_scores`. Then all such places are narrowed to
    about half of their width, and the network, with all layers in it, must give what it gives with the others zero.
    """
    in_heads = {f"{name}.linear" for name, module in model.named_modules() if isinstance(module, AroundHeads)}
    likely = (unit for unit in units if isinstance(unit, SingleWeight) and unit.name not in in_heads)
    single = {unit.name: unit for unit in likely if _can_be_narrowed(unit, trace)}
    inputs = inputs.parts(places=_PLACES)[0]
    feedings = dict[str, Feeding]()
    for find in (find_neurons, find_heads, partial(find_scores, watched=trace.calls)):
        free = {name: unit for name, unit in single.items() if name not in _members(feedings)}
        with suppress(ModelError), evaluating(model), torch.no_grad():
            feedings |= _checked(model, inputs, find(model, inputs, free, list(trace.calls)), single)
    return tuple(_with(unit, feedings.get(unit.name), single) for unit in units)


def _with(unit: Unit, feeding: Feeding | None, single: Mapping[str, SingleWeight]) -> Unit:
    if feeding is None or not isinstance(unit, SingleWeight):
        return unit
    feeders = tuple(single[name].weight for name in feeding.feeders)
    if feeding.is_multiplied:
        return with_changes(unit, feeders=feeders, scores=feeding.heads, gives_queries=feeding.keys_first)
    return with_changes(unit, feeders=feeders, heads=feeding.heads)


def _members(feedings: Mapping[str, Feeding]) -> set[str]:
    return {member for name, feeding in feedings.items() for member in (name, *feeding.feeders)}


def _checked(
    model: nn.Module, inputs: Inputs, tried: Mapping[str, Feeding], watched: Iterable[str]
) -> dict[str, Feeding]:
    """Those that can be narrowed, none of which shares a layer with another."""
    disjoint = _disjoint(tried)
    if not disjoint or _narrows(model, inputs, disjoint, watched):
        return disjoint
    return _disjoint({name: own for name, own in tried.items() if _narrows(model, inputs, {name: own}, watched)})


def _can_be_narrowed(unit: SingleWeight, trace: Trace) -> bool:
    """Whether it is an ordinary linear layer that is called once."""
    weight = unit.weight
    if unit.skip_reason is not None or weight.is_lookup or weight.geometry is None or weight.layer_type is None:
        return False
    is_linear = not weight.geometry.kernel and weight.geometry.groups == 1
    return is_linear and len(weight.names) == 1 and trace.calls.get(weight.name) == 1


def find_neurons(
    model: nn.Module, inputs: Inputs, single: Mapping[str, SingleWeight], order: Sequence[str]
) -> dict[str, Feeding]:
    """By layer, those before it of whose outputs its inputs are elementwise functions.

    Half of these outputs are changed, and no other inputs may change.
    """
    possible = _possible(single, order)
    feeders = _PerturbedPass(model, inputs, possible).feeders() if possible else {}
    return {name: Feeding(own) for name, own in feeders.items()}


def _possible(single: Mapping[str, SingleWeight], order: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """By layer, those called right before it that have as many outputs as it has inputs, the nearest one first."""
    possible = {}
    for place, name in enumerate(order):
        before: list[str] = []
        for earlier in reversed(order[max(0, place - _MOST_FEEDERS) : place]):
            if name not in single or earlier not in single:
                break
            if single[earlier].geometry.outputs != single[name].geometry.into:
                break
            before.append(earlier)
        if before:
            possible[name] = tuple(before)
    return possible


@dataclass(eq=False)
class _PerturbedPass:
    """Runs a network with half of the outputs of layers changed, while all these layers receive what they always do."""

    model: nn.Module
    inputs: Inputs
    possible: Mapping[str, Sequence[str]]
    changed: dict[str, Tensor] = field(default_factory=dict)
    masks: dict[str, Tensor] = field(default_factory=dict)

    def feeders(self) -> dict[str, tuple[str, ...]]:
        """By layer, those that feed it, if what lies between is elementwise; others may read them as well."""
        feeders = list(dict.fromkeys(feeder for own in self.possible.values() for feeder in own))
        received, _ = received_by(self.model, self.inputs, dict.fromkeys((*self.possible, *feeders)))
        at = self.model.get_submodule
        hooks = [at(name).register_forward_pre_hook(partial(self._restore, name, x)) for name, x in received.items()]
        hooks += [at(name).register_forward_hook(partial(self._change, name, i)) for i, name in enumerate(feeders)]
        with temporary(hooks):
            call(self.model, self.inputs)
        return {name: own for name in self.possible if name in self.changed and (own := self._of(name))}

    def _restore(self, name: str, before: Tensor, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if before.shape != args[0].shape:
            return None
        if before.any():  # of zeros it cannot be told what becomes of them
            self.changed[name] = args[0] != before
        return (before, *args[1:])

    def _change(self, feeder: str, number: int, _: nn.Module, __: Any, output: Tensor) -> Tensor:
        drawn = torch.rand(output.shape, generator=torch.Generator().manual_seed(number)) < 0.5
        self.masks[feeder] = drawn.to(output.device)
        return torch.where(self.masks[feeder], 1.0 - output, output)

    def _of(self, name: str) -> tuple[str, ...]:
        changed, own = self.changed[name], [feeder for feeder in self.possible[name] if feeder in self.masks]
        masks = [self.masks[feeder] for feeder in own]
        if not masks or any(mask.shape != changed.shape for mask in masks):
            return ()
        if bool((changed & ~torch.stack(masks).any(dim=0)).any()):
            return ()
        first = masks[0] & ~masks[1] if len(masks) > 1 else masks[0]
        others = [feeder for feeder, mask in zip(own[1:], masks[1:], strict=True) if (changed & mask & ~masks[0]).any()]
        return (own[0], *others)[::-1] if bool((changed & first).any()) else ()


def _disjoint(tried: Mapping[str, Feeding]) -> dict[str, Feeding]:
    """Without those that share a layer with an earlier one."""
    disjoint = dict[str, Feeding]()
    for name, feeding in tried.items():
        if _members(disjoint).isdisjoint({name, *feeding.feeders}):
            disjoint[name] = feeding
    return disjoint


def _narrows(model: nn.Module, inputs: Inputs, places: Mapping[str, Feeding], watched: Iterable[str]) -> bool:
    """Whether outputs and watched layers' inputs at half of the width here are those with half of the columns zero."""
    narrowed: dict[str, nn.Module] = {}
    zeroed: dict[str, nn.Module] = {}
    for number, (name, feeding) in enumerate(places.items()):
        layer = model.get_submodule(name)
        kernels = to_float64(layer_type_of(layer).kernels(layer))
        *each, rank = _half(feeding.heads or HeadLayout(1, 1, kernels.shape[2]), seed=number)
        of_groups, of_heads = (part.to(kernels) for part in each)
        form: JointForm
        factors: Factors
        if feeding.is_multiplied:
            form, factors = HeadQueryKeyForm(), (of_heads, of_groups.mT, of_groups @ kernels, of_groups)
        else:
            form = WidthForm() if feeding.heads is None else HeadValueOutputForm()
            factors = (of_groups, of_heads, kernels @ of_heads.mT)
        narrowed |= narrowed_at(model, name, feeding.feeders, form=form.name, rank=rank, factors=factors, bias=own_bias)
        kept_bias = partial(_projected_bias, of_groups[0]) if feeding.is_multiplied else own_bias
        zeroed |= refitted_at(model, [name], weight=form.product(factors), bias=kept_bias)
    watched = [name for name in watched if name not in places]
    try:
        return alike(_outputs(model, inputs, zeroed, watched), _outputs(model, inputs, narrowed, watched))
    except ModelError:  # its code looks at the sizes
        return False


def _projected_bias(rows: Tensor, name: str, module: nn.Module, whole: Tensor) -> Tensor | None:
    """The bias that the layer has, of which the numbers stay that some orthonormal rows choose."""
    own = own_bias(name, module, whole)
    return None if own is None else rows.mT @ (rows @ to_float64(own).to(rows))


def _half(layout: HeadLayout, *, seed: int) -> tuple[Tensor, Tensor, int]:
    """What becomes of values and of heads if about half stay: an odd number, and others by seed, as code may forbid."""
    number = max(1, (layout.size // 2 - 1 | 1) - 2 * (seed % 4))
    half = torch.randperm(layout.size, generator=torch.Generator().manual_seed(seed))[:number]
    selection = torch.eye(layout.size, dtype=torch.float64)[half.sort().values]
    each = (torch.block_diag(*[selection] * number).unsqueeze(0) for number in (layout.groups, layout.heads))
    return *each, len(half)


def _outputs(model: nn.Module, inputs: Inputs, replacements: Mapping[str, nn.Module], watched: Iterable[str]) -> Any:
    before = {name: model.get_submodule(name) for name in replacements}
    replace(model, replacements)
    try:
        return received_by(model, inputs, watched)
    finally:
        replace(model, before)
