"""Batches that fits leave out, on which the networks' outputs are compared."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from spectrim.analysis.activation_cache import ActivationCache
from spectrim.analysis.output_distance import NoDistanceError, outputs_of, outputs_with, squared_distances
from spectrim.core.execution import Inputs

_BATCHES, _PLACES = 8, 1024

Pairs = Sequence[tuple[Inputs, Inputs]]
"""Batch by batch what the dense network is run on, and the compressed one."""


def taken_apart(pairs: Pairs) -> Pairs:
    """At least eight batches, where they can be split into so many."""
    if len(pairs) >= _BATCHES:
        return pairs
    size = max(1, sum(batch.samples for batch, _ in pairs) // _BATCHES)
    parts: list[tuple[Inputs, Inputs]] = []
    for pair in pairs:
        each = [batch.split(size) for batch in pair]
        parts += zip(*each, strict=True) if len(each[0]) == len(each[1]) else [pair]
    return parts


Layers = Mapping[str, nn.Module]
"""By the name of the place that they take."""


@dataclass(eq=False)
class HeldOut:
    """Every eighth batch, or fewer with some thousand places.

    Attributes:
        dense: The dense network.
        pairs: All batches.
        outputs: Of the dense network, by position in `pairs`.
    """

    dense: nn.Module
    pairs: Pairs
    outputs: dict[int, list[Tensor]] = field(default_factory=dict)

    @property
    def positions(self) -> list[int]:
        """Of its batches; none where nothing would be left to fit to."""
        chosen, places = list[int](), 0
        for position in range(0, len(self.pairs) if len(self.pairs) > 1 else 0, _BATCHES):
            if places >= _PLACES:
                break
            chosen.append(position)
            places += self.pairs[position][0].places
        return chosen

    def nearest(self, cache: ActivationCache, candidates: Sequence[Layers]) -> Layers:
        """The layers with which the compressed network comes nearest to the dense one.

        Later ones have to be better than the first by more than chance may do; where that cannot be told, the first.
        """
        first, *others = candidates
        best, most = first, 0.0
        if others:
            with suppress(NoDistanceError):
                before = self._squares(cache, first)
                for layers in others:
                    gained = before - self._squares(cache, layers)
                    least = float(gained.std()) / len(gained) ** 0.5 if len(gained) > 1 else 0.0
                    if float(gained.mean()) > max(most, least):
                        best, most = layers, float(gained.mean())
        return best

    def _squares(self, cache: ActivationCache, layers: Layers) -> Tensor:
        """The squared distances with these layers, by sample; infinite where an output is not finite any more."""
        squares = []
        for position in self.positions:
            dense_batch, batch = self.pairs[position]
            if position not in self.outputs:
                self.outputs[position] = outputs_of(self.dense, dense_batch, position)
            outputs = outputs_with(cache, layers, batch=batch, position=position)
            lost = squared_distances(self.outputs[position], outputs, batch)
            each = zip(self.outputs[position], outputs, strict=True)
            if any((a.isfinite() > b.isfinite()).any() for a, b in each):  # a distance takes these for equal
                lost = lost + float("inf")
            squares.append(lost)
        return torch.cat(squares)
