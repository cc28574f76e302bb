"""Choosing one option for every layer under one budget: the multiple-choice knapsack problem."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from spectrim.core.errors import RuleError

_CELLS = 20_000


@dataclass(frozen=True, eq=False)
class KnapsackItem:
    """The options of one layer.

    Attributes:
        costs: Whole numbers (n,), at least 0.
        losses: What each option loses, (n,); finite, smaller is better.
    """

    costs: npt.NDArray[np.int64]
    losses: npt.NDArray[np.float64]

    def efficient(self) -> npt.NDArray[np.int64]:
        """Positions of the options that no other beats in both cost and loss, cheapest first."""
        order = np.lexsort((self.losses, self.costs))
        best = np.minimum.accumulate(self.losses[order])
        efficient: npt.NDArray[np.int64] = order[np.concatenate([[True], best[1:] < best[:-1]])]
        return efficient


@dataclass(frozen=True, eq=False)
class Allocation:
    """The best choice for every budget up to a limit, by dynamic programming over costs in whole units.

    Where the limit is at most 20 000 above the cheapest choice, the unit is 1 and every answer is exactly the best.
    Above that costs are rounded up to larger units, so that no budget is ever exceeded, and what the rounding leaves
    unused is then spent step by step.

    Attributes:
        items: The layers' options.
        unit: The size of a cell.
        cheapest: The smallest cost there is.
        chosen: For each layer and each cell, the position among the layer's options.
        spent: For each layer and each cell, the cells that the option takes.
    """

    items: tuple[KnapsackItem, ...]
    unit: int
    cheapest: int
    chosen: npt.NDArray[np.int32]
    spent: npt.NDArray[np.int32]

    @classmethod
    def of(cls, items: Sequence[KnapsackItem], *, limit: int) -> "Allocation":
        """Solve for every budget from the cheapest choice to `limit`."""
        cheapest = sum(int(item.costs.min()) for item in items)
        slack = max(0, min(limit, sum(int(item.costs.max()) for item in items)) - cheapest)
        unit = max(1, -(-slack // max(_CELLS, 400 * len(items))))
        size = slack // unit + 1
        best = np.zeros(size)
        chosen, spent = (np.zeros((len(items), size), dtype=np.int32) for _ in range(2))
        for row, item in enumerate(items):
            options = item.efficient()
            steps = -(-(item.costs[options] - item.costs.min()) // unit)
            last = np.concatenate([steps[1:] != steps[:-1], [True]]) & (steps < size)
            total = np.full(size, np.inf)
            for option, cost in zip(options[last], steps[last], strict=True):
                candidate = best[: size - cost] + item.losses[option]
                better = candidate < total[cost:]
                total[cost:][better] = candidate[better]
                chosen[row, cost:][better] = option
                spent[row, cost:][better] = cost
            best = total
        return cls(tuple(items), unit, cheapest, chosen, spent)

    def solve(self, budget: int) -> list[int]:
        """The option of each item that together lose least in all, for at most `budget`.

        Raises:
            RuleError: not even the cheapest choice fits.
        """
        if budget < self.cheapest:
            raise RuleError(f"a budget of {budget} is below the cheapest choice, {self.cheapest}")
        cell = min((budget - self.cheapest) // self.unit, self.chosen.shape[1] - 1)
        solution = [0] * len(self.items)
        for row in reversed(range(len(self.items))):
            solution[row] = int(self.chosen[row, cell])
            cell -= int(self.spent[row, cell])
        return self._spend(solution, budget)

    def _spend(self, solution: list[int], budget: int) -> list[int]:
        """Use what the rounding left over, each time on the step that gains most for it."""
        unspent = budget - sum(int(item.costs[option]) for item, option in zip(self.items, solution, strict=True))
        while True:
            best: tuple[float, int, int] | None = None
            for row, item in enumerate(self.items):
                steps, gains = item.costs - item.costs[solution[row]], item.losses[solution[row]] - item.losses
                fits = np.flatnonzero((steps <= unspent) & (gains > 0))
                if len(fits):
                    option = int(fits[np.argmax(gains[fits] / np.maximum(steps[fits], 1))])
                    rate = float(gains[option] / max(int(steps[option]), 1))
                    if best is None or rate > best[0]:
                        best = (rate, row, option)
            if best is None:
                return solution
            _, row, option = best
            unspent -= int(self.items[row].costs[option] - self.items[row].costs[solution[row]])
            solution[row] = option
