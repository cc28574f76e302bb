"""Layers that a budget decides on together, since a form may take all of them at once."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from spectrim.analysis.spectra import LayerAnalysis
from spectrim.linalg import FloatArray, Ranks
from spectrim.planning.knapsack import KnapsackItem

_MOST = 256

FormRanks = tuple[str, Ranks]


@dataclass(frozen=True, eq=False)
class Group:
    """Some layers and their options: each layer by itself first, then all of them in one form.

    Attributes:
        layers: In order of execution.
        item: Costs and losses of all options; the first one is that all layers stay dense.
        options: Of the options that take each layer by itself, the option of each, (n, layers).
        joint: Form and ranks of the others.
    """

    layers: tuple[LayerAnalysis, ...]
    item: KnapsackItem
    options: npt.NDArray[np.int64]
    joint: list[FormRanks] = field(default_factory=list)

    @classmethod
    def of_each(
        cls, layers: Sequence[LayerAnalysis], alone: Mapping[str, tuple[KnapsackItem, list[FormRanks]]]
    ) -> "Group":
        """The options of the layers one by one, and where there are several, the best of their combinations."""
        items = [alone[layer.name][0] for layer in layers]
        whole, options = items[0], np.arange(len(items[0].costs), dtype=np.int64)[:, None]
        for item in items[1:]:
            first, second = _thinned(whole), _thinned(item)
            costs = (whole.costs[first][:, None] + item.costs[second]).ravel()
            losses = (whole.losses[first][:, None] + item.losses[second]).ravel()
            before, own = np.repeat(options[first], len(second), axis=0), np.tile(second, len(first))[:, None]
            pairs = np.concatenate([before, own], axis=1)
            best = _thinned(KnapsackItem(costs, losses))
            dense = int(np.flatnonzero((pairs == 0).all(axis=1))[0])
            best = np.concatenate([[dense], best[best != dense]])
            whole, options = KnapsackItem(costs[best], losses[best]), pairs[best]
        return cls(tuple(layers), whole, options)

    def with_options(self, costs: npt.NDArray[np.int64], losses: FloatArray, joint: Sequence[FormRanks]) -> "Group":
        """With options that take all layers at once."""
        item = KnapsackItem(np.append(self.item.costs, costs), np.append(self.item.losses, losses))
        return Group(self.layers, item, self.options, [*self.joint, *joint])

    def together(self, option: int) -> FormRanks | None:
        """Form and ranks of an option that takes all layers at once."""
        return self.joint[option - len(self.options)] if option >= len(self.options) else None


def grouped(
    layers: Iterable[LayerAnalysis], together: Mapping[str, Sequence[LayerAnalysis]]
) -> list[tuple[LayerAnalysis, ...]]:
    """Layers in order, those that are narrowed together in one place; by the last one's name, the others."""
    feeders = {layer.name for others in together.values() for layer in others}
    return [(*together.get(layer.name, ()), layer) for layer in layers if layer.name not in feeders]


def _thinned(item: KnapsackItem) -> npt.NDArray[np.int64]:
    """Efficient options, the dense one among them, and no more of them than can be combined."""
    efficient = item.efficient()
    efficient = np.concatenate([[0], efficient[efficient != 0]])
    if len(efficient) <= _MOST:
        return efficient
    places = np.unique(np.linspace(0, len(efficient) - 1, _MOST).round().astype(np.int64))
    return efficient[places]
