"""Choosing one option for every layer under one budget: the multiple-choice knapsack problem."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from spectrim.core.errors import RuleError

_CELLS = 20_000


@dataclass(frozen=True, eq=False)
class Menu:
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
        kept: npt.NDArray[np.int64] = order[np.concatenate([[True], best[1:] < best[:-1]])]
        return kept


@dataclass(frozen=True, eq=False)
class Allocation:
    """The best choice for every budget up to a limit, by dynamic programming over costs in whole units.

    Where the limit is at most 20 000 above the cheapest choice, the unit is 1 and every answer is exactly the best.
    Above that costs are rounded up to larger units, so that no budget is ever exceeded, and what the rounding leaves
    unused is then spent step by step.

    Attributes:
        menus: The layers' options.
        unit: The size of a cell.
        cheapest: The smallest cost there is.
        chosen: For each layer and each cell, the position in the layer's menu.
        spent: For each layer and each cell, the cells that the option takes.
    """

    menus: tuple[Menu, ...]
    unit: int
    cheapest: int
    chosen: npt.NDArray[np.int32]
    spent: npt.NDArray[np.int32]

    @classmethod
    def of(cls, menus: Sequence[Menu], *, limit: int) -> "Allocation":
        """Solve for every budget from the cheapest choice to `limit`."""
        cheapest = sum(int(menu.costs.min()) for menu in menus)
        slack = max(0, min(limit, sum(int(menu.costs.max()) for menu in menus)) - cheapest)
        cells = max(_CELLS, 400 * len(menus))
        unit = max(1, -(-slack // cells))
        size = slack // unit + 1
        best = np.zeros(size)
        chosen, spent = (np.zeros((len(menus), size), dtype=np.int32) for _ in range(2))
        for row, menu in enumerate(menus):
            options = menu.efficient()
            taken = -(-(menu.costs[options] - menu.costs.min()) // unit)
            last = np.concatenate([taken[1:] != taken[:-1], [True]]) & (taken < size)
            total = np.full(size, np.inf)
            for option, cost in zip(options[last], taken[last], strict=True):
                candidate = best[: size - cost] + menu.losses[option]
                better = candidate < total[cost:]
                total[cost:][better] = candidate[better]
                chosen[row, cost:][better] = option
                spent[row, cost:][better] = cost
            best = total
        return cls(tuple(menus), unit, cheapest, chosen, spent)

    def pick(self, budget: int) -> list[int]:
        """The position in each menu that loses least in all, for at most `budget`.

        Raises:
            RuleError: not even the cheapest choice fits.
        """
        if budget < self.cheapest:
            raise RuleError(f"a budget of {budget} is below the cheapest choice, {self.cheapest}")
        cell = min((budget - self.cheapest) // self.unit, self.chosen.shape[1] - 1)
        picked = [0] * len(self.menus)
        for row in reversed(range(len(self.menus))):
            picked[row] = int(self.chosen[row, cell])
            cell -= int(self.spent[row, cell])
        return self._spend(picked, budget)

    def _spend(self, picked: list[int], budget: int) -> list[int]:
        """Use what the rounding left over, each time on the step that gains most for it."""
        left = budget - sum(int(menu.costs[one]) for menu, one in zip(self.menus, picked, strict=True))
        while True:
            best: tuple[float, int, int] | None = None
            for row, menu in enumerate(self.menus):
                steps, gains = menu.costs - menu.costs[picked[row]], menu.losses[picked[row]] - menu.losses
                fits = np.flatnonzero((steps <= left) & (gains > 0))
                if len(fits):
                    option = int(fits[np.argmax(gains[fits] / np.maximum(steps[fits], 1))])
                    rate = float(gains[option] / max(int(steps[option]), 1))
                    if best is None or rate > best[0]:
                        best = (rate, row, option)
            if best is None:
                return picked
            _, row, option = best
            left -= int(self.menus[row].costs[option] - self.menus[row].costs[picked[row]])
            picked[row] = option
