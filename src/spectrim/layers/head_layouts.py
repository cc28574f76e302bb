"""The heads of attentions, found by what the network does with the values that they are made of."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.core.execution import Inputs, call, temporary
from spectrim.layers.units import SingleWeight
from spectrim.linalg import HeadLayout

_NEAREST, _LEVELS, ROUNDS, _COMPARED, _CLOSE = 4, 2, 16, 16, 1e-3
_OF_HEADS = re.compile("head")
"""Attributes of an attention that may say how large a head is, or how many there are."""


ValuesCandidate = tuple[str, HeadLayout]
"""A layer that may give the values of heads, and how these may lie."""


@dataclass(frozen=True)
class Feeding:
    """What feeds a layer.

    Attributes:
        feeders: Names of the layers whose outputs it reads, and nothing else does.
        heads: How the heads of an attention lie in them; None for numbers that are independent of each other.
        is_multiplied: Whether it is not fed, but gives keys that the queries of its feeder are multiplied with.
        keys_first: Whether its feeder gives the keys then, and it the queries.
    """

    feeders: tuple[str, ...]
    heads: HeadLayout | None = None
    is_multiplied: bool = False
    keys_first: bool = False


def find_heads(
    model: nn.Module, inputs: Inputs, single: Mapping[str, SingleWeight], order: Sequence[str]
) -> dict[str, Feeding]:
    """By layer, the one before it that gives the values of the heads that it reads.

    Each head's values are multiplied by a matrix of their own. What the layer reads must become what it was, multiplied
    head by head by these matrices: so it does where heads mix values of different places, and not different numbers.
    """
    possible = {
        name: candidates for name in single if (candidates := candidates_before(model, name, single, order, reads=True))
    }
    if not possible:
        return {}
    received, _ = received_by(model, inputs, single)
    # what reads the same as another layer does not read what that gives
    pending = {
        name: [candidate for candidate in own if not _equal(received.get(name), received.get(candidate[0]))]
        for name, own in possible.items()
    }
    confirmed: dict[str, Feeding] = {}
    for _ in range(ROUNDS):
        now = undisturbed(pending, order)
        if not now:
            break
        confirmed |= _Multiplied(model, inputs, received, now).passed()
        pending = {name: own[name in now :] for name, own in pending.items() if name not in confirmed}
    return {name: confirmed[name] for name in possible if name in confirmed}


def undisturbed(
    candidates: Mapping[str, Sequence[ValuesCandidate]], order: Sequence[str], *, between: int = 0
) -> dict[str, ValuesCandidate]:
    """The next candidate of each layer, of those that do not disturb each other, since no layer is between both.

    So many places after the last layer of one the next may begin.
    """
    chosen, end = dict[str, ValuesCandidate](), -between
    for name in order:
        if name in candidates and candidates[name] and order.index(candidates[name][0][0]) >= end + between:
            chosen[name], end = candidates[name][0], order.index(name)
    return chosen


def _equal(first: Tensor | None, second: Tensor | None) -> bool:
    return first is not None and second is not None and first.shape == second.shape and torch.equal(first, second)


def received_by(model: nn.Module, inputs: Inputs, names: Iterable[str]) -> tuple[dict[str, Tensor], Any]:
    """What layers of these names receive in a pass, copied, and what the network gives."""
    received: dict[str, Tensor] = {}

    def record(name: str, _: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            received[name] = args[0].clone()

    with temporary(model.get_submodule(name).register_forward_pre_hook(partial(record, name)) for name in names):
        return received, call(model, inputs)


def candidates_before(
    model: nn.Module, name: str, single: Mapping[str, SingleWeight], order: Sequence[str], *, reads: bool
) -> list[ValuesCandidate]:
    """Layers that may give the values of the heads that this one `reads`, or the queries of those whose keys it gives.

    The nearest are first, with the layouts that sizes allow, large heads first.
    """
    place, geometry = order.index(name), single[name].geometry
    candidates = []
    for other in reversed(order[max(0, place - _NEAREST) : place]):
        if other not in single or not _is_near(name, other):
            continue
        theirs = single[other].geometry.outputs
        of_heads, of_groups = (geometry.into, theirs) if reads else (theirs, geometry.outputs)
        for size in sorted(_sizes(model, name, of_heads) | _sizes(model, other, of_heads), reverse=True):
            fits = size > 1 and of_heads % size == 0 and of_groups % size == 0
            if fits and (of_heads // size) % (of_groups // size) == 0:
                candidates.append((other, HeadLayout(of_heads // size, of_groups // size, size)))
    return candidates


def _is_near(name: str, other: str) -> bool:
    """Whether a module that holds both is at most two levels above each."""
    first, second = name.split("."), other.split(".")
    common = next((n for n, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), 0)
    return max(len(first), len(second)) - common <= _LEVELS


def _sizes(model: nn.Module, name: str, width: int) -> set[int]:
    """Numbers that the modules around a layer have, as sizes of heads, and as how many heads there are."""
    parts = name.split(".")
    around = [model.get_submodule(".".join(parts[: len(parts) - up])) for up in (1, 2) if up < len(parts)]
    numbers = {
        value
        for module in around
        for key, value in vars(module).items()
        if isinstance(value, int) and not isinstance(value, bool) and value > 0 and _OF_HEADS.search(key)
    }
    return numbers | {width // number for number in numbers}


@dataclass(eq=False)
class _Multiplied:
    """Runs a network with the values of heads multiplied, while all layers receive what they always do."""

    model: nn.Module
    inputs: Inputs
    received: Mapping[str, Tensor]
    candidates: Mapping[str, ValuesCandidate]
    agreeing: set[str] = field(default_factory=set)
    values: dict[str, Tensor] = field(default_factory=dict)

    def passed(self) -> dict[str, Feeding]:
        """Those whose layers would read heads that are multiplied as the values were."""
        at, candidates = self.model.get_submodule, self.candidates.items()
        hooks = [at(values).register_forward_hook(partial(self._multiply, name)) for name, (values, _) in candidates]
        hooks += [at(name).register_forward_pre_hook(partial(self._look, name)) for name in self.received]
        with temporary(hooks):
            call(self.model, self.inputs)
        return {name: Feeding((self.candidates[name][0],), self.candidates[name][1]) for name in self.agreeing}

    def _look(self, name: str, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        before = self.received[name]
        if args[0].shape != before.shape:
            return None
        if name in self.candidates and before.numel():
            layout = self.candidates[name][1]
            by = self._matrices(name).repeat_interleave(layout.heads // layout.groups, dim=0)
            expected, scale = times(before, by), float(before.abs().max())
            tolerance = scale * max(_CLOSE, 4 * torch.finfo(before.dtype).eps)
            moved, off = (float((expected - other).abs().max()) for other in (before, args[0]))
            if moved > 10 * tolerance and off <= tolerance and self._mixes(name, tolerance):
                self.agreeing.add(name)
        return (before, *args[1:])

    def _mixes(self, name: str, tolerance: float) -> bool:
        """Whether heads mix values of places that differ; else it cannot be told what the values do to the weights."""
        layout, heads = self.candidates[name][1], self.received[name]
        values = self.values[name].unflatten(-1, (layout.groups, layout.size))
        values = values.repeat_interleave(layout.heads // layout.groups, dim=-2).reshape(-1, heads.shape[-1])
        few = heads.reshape(-1, heads.shape[-1])[:: max(1, heads[..., 0].numel() // _COMPARED)]
        return bool((torch.cdist(few.float(), values.float(), p=torch.inf).amin(dim=1) > tolerance).any())

    def _multiply(self, name: str, _: nn.Module, __: Any, output: Tensor) -> Tensor:
        self.values[name] = output
        return times(output, self._matrices(name))

    def _matrices(self, name: str) -> Tensor:
        """(groups, size, size), others for each layer, since one may read what is meant for another."""
        layout, draw = self.candidates[name][1], torch.Generator().manual_seed(list(self.candidates).index(name))
        return torch.eye(layout.size) + 0.3 * torch.randn(layout.groups, layout.size, layout.size, generator=draw)


def times(numbers: Tensor, by: Tensor) -> Tensor:
    """Numbers (.., heads * size), each head times its matrix."""
    heads, size, _ = by.shape
    each = numbers.unflatten(-1, (heads, size)).unsqueeze(-2)
    product: Tensor = each @ by.to(numbers).mT
    return product.squeeze(-2).flatten(-2)
