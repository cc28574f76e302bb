"""Layers that give the queries and the keys of an attention, found by what the network does with both."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.core.execution import Inputs, call, temporary
from spectrim.core.nested import tensors
from spectrim.layers.head_layouts import (
    ROUNDS,
    Feeding,
    ValuesCandidate,
    candidates_before,
    received_by,
    times,
    undisturbed,
)
from spectrim.layers.tracing import leaves_of
from spectrim.layers.units import SingleWeight
from spectrim.linalg import HeadLayout

_CLOSE = 1e-4
_OUTPUTS = [f"output {number}" for number in range(64)]


def find_scores(
    model: nn.Module,
    inputs: Inputs,
    single: Mapping[str, SingleWeight],
    order: Sequence[str],
    *,
    watched: Iterable[str],
) -> dict[str, Feeding]:
    """By layer, the one before it with whose outputs its own are multiplied, head by head, and for nothing else.

    Each head's keys are multiplied by a matrix, after the same was added to all, and its queries by the inverse. No
    watched layer may receive anything else then, as one does with rotary positions, with norms in between, or without
    a softmax; with the keys alone multiplied one has to. Where the keys come before the queries, it is the feeder that
    gives them.
    """
    possible = {name: own for name in single if (own := candidates_before(model, name, single, order, reads=False))}
    confirmed: dict[str, Feeding] = {}
    if not possible:
        return confirmed
    pending = _independent(model, inputs, possible)
    received, _ = received_by(model, inputs, watched)
    for _ in range(ROUNDS):
        now = undisturbed(pending, order, between=2)
        if not now:
            break
        confirmed |= _Multiplied(model, inputs, received, now, order).passed()
        members = {member for name, feeding in confirmed.items() for member in (name, *feeding.feeders)}
        pending = {
            name: [candidate for candidate in own[name in now :] if candidate[0] not in members]
            for name, own in pending.items()
            if name not in members
        }
    return confirmed


def _independent(
    model: nn.Module, inputs: Inputs, candidates: Mapping[str, Sequence[ValuesCandidate]]
) -> dict[str, list[ValuesCandidate]]:
    """The candidates whose second layer does not depend on the outputs of the first, by the graph of the gradients.

    Of which no gradient is worked out, so that nothing need be kept for it.
    """
    marks, read = dict[str, Tensor](), dict[str, Tensor]()

    def mark(name: str, _: nn.Module, __: Any, output: Tensor) -> Tensor:
        marks[name] = output.new_zeros(()).requires_grad_()
        return output + marks[name]

    def note(name: str, _: nn.Module, args: tuple[Any, ...]) -> None:
        read[name] = args[0]

    def independent(name: str, own: Sequence[ValuesCandidate]) -> list[ValuesCandidate]:
        upstream = leaves_of(read[name]) if name in read else set()
        return [candidate for candidate in own if marks.get(candidate[0]) not in upstream]

    first = {candidate[0] for own in candidates.values() for candidate in own}
    marking = (model.get_submodule(name).register_forward_hook(partial(mark, name)) for name in first)
    noting = (model.get_submodule(name).register_forward_pre_hook(partial(note, name)) for name in candidates)
    nothing: Any = lambda _: None  # noqa: E731
    keeps_nothing = torch.autograd.graph.saved_tensors_hooks(nothing, nothing)
    with torch.enable_grad(), keeps_nothing, temporary(chain(marking, noting)):
        call(model, inputs)
        return {name: independent(name, own) for name, own in candidates.items()}


@dataclass(eq=False)
class _Multiplied:
    """Runs a network with queries and keys multiplied, while all layers receive what they always do.

    Both are made as large as those of a trained network first, or else their scores may not matter.
    """

    model: nn.Module
    inputs: Inputs
    received: Mapping[str, Tensor]
    candidates: Mapping[str, ValuesCandidate]
    order: Sequence[str]
    now: dict[str, Tensor] = field(default_factory=dict)

    def passed(self) -> dict[str, Feeding]:
        """Those of which no layer tells that both are multiplied, and one tells that the keys are."""
        before = self._pass()
        passes = ((1, None), (2, "last"), (2, "first"))
        alone, *orders = (_changed(before, self._pass(multiplied=number, shifted=at)) for number, at in passes)
        both = orders[0] & orders[1]
        if len(self.candidates) > 1 and not both.isdisjoint(_OUTPUTS):  # by one of them, or several
            each = (replace(self, candidates={name: own}).passed() for name, own in self.candidates.items())
            return {name: feeding for passed in each for name, feeding in passed.items()}
        passed = {}
        for name, after in self._after().items():
            first, layout = self.candidates[name]
            unchanged = [changed.isdisjoint(after) for changed in orders]
            keys_first = not unchanged[0] and layout.heads == layout.groups
            if not alone.isdisjoint(after) and unchanged[keys_first]:
                passed[name] = Feeding((first,), layout, is_multiplied=True, keys_first=keys_first)
        return passed

    def _after(self) -> dict[str, list[str]]:
        """By candidate the layers from it to the first one of the next, or to the outputs."""
        begins = [*(self.order.index(queries) for queries, _ in self.candidates.values()), len(self.order)]
        places = zip(self.candidates, begins[1:], strict=True)
        after = {name: list(self.order[self.order.index(name) + 1 : end + 1]) for name, end in places}
        after[next(reversed(after))] += _OUTPUTS
        return after

    def _pass(self, *, multiplied: int = 0, shifted: str | None = None) -> dict[str, Tensor]:
        """What layers would receive, and the outputs, with the last or both of each candidate's layers multiplied."""
        at, self.now, hooks = self.model.get_submodule, {}, []
        for number, (name, (first, layout)) in enumerate(self.candidates.items()):
            by, inverse = _matrices(layout, seed=number)
            by_head = inverse.mT.repeat_interleave(layout.heads // layout.groups, dim=0)
            of_last = partial(_with, by if multiplied else None, shifts=shifted == "last")
            of_first = partial(_with, by_head if multiplied > 1 else None, shifts=shifted == "first")
            hooks += [at(name).register_forward_hook(of_last), at(first).register_forward_hook(of_first)]
        hooks += [at(name).register_forward_pre_hook(partial(self._look, name)) for name in self.received]
        with temporary(hooks):
            outputs = call(self.model, self.inputs)
        return self.now | dict(zip(_OUTPUTS, tensors(outputs, floats=True), strict=False))

    def _look(self, name: str, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        self.now[name] = args[0].clone()
        return (self.received[name], *args[1:]) if args[0].shape == self.received[name].shape else None


def _changed(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> set[str]:
    """Layers that would receive something else."""
    changed = before.keys() ^ after.keys()
    for name in before.keys() & after.keys():
        first, second = before[name], after[name]
        if first.shape != second.shape:
            changed.add(name)
        elif first.numel() and first.is_floating_point():
            tolerance = float(first.abs().max()) * max(_CLOSE, 4 * torch.finfo(first.dtype).eps)
            changed |= set() if float((first - second).abs().max()) <= tolerance else {name}
    return changed


def _with(by: Tensor | None, _: nn.Module, __: Any, output: Tensor, *, shifts: bool = False) -> Tensor:
    """Outputs with a mean square of 2, times matrices if there are any, and first the same added to all."""
    output = output * (2 / output.square().mean().clamp(min=torch.finfo(output.dtype).tiny)).sqrt()
    if shifts:
        output = output + torch.randn(output.shape[-1], generator=torch.Generator().manual_seed(0)).to(output)
    return output if by is None else times(output, by)


def _matrices(layout: HeadLayout, *, seed: int) -> tuple[Tensor, Tensor]:
    """Matrices (groups, size, size) and their inverses: they turn, and lengthen by up to 2, as a norm would undo."""
    draw = torch.Generator().manual_seed(seed)
    first, last = torch.linalg.qr(torch.randn(2, layout.groups, layout.size, layout.size, generator=draw))[0]
    lengths = 2 ** (2 * torch.rand(layout.groups, layout.size, 1, generator=draw) - 1)
    return first @ (lengths * last), last.mT @ (first.mT / lengths)
