"""The trade-off between what a network costs and what it loses."""

from collections.abc import Iterator
from dataclasses import dataclass

from spectrim.core.plans import Limit, Plan


@dataclass(frozen=True, eq=False)
class Point:
    """One point of a trade-off curve.

    Attributes:
        kept: The share of the dense network's cost that is kept.
        lost: What all layers lose together: shares of their energies, times their sensitivities if these were measured.
        plan: The plan that does it.
    """

    kept: float
    lost: float
    plan: Plan


@dataclass(frozen=True, eq=False)
class Curve:
    """What every budget would lose, cheapest first. `cost` is what `kept` is a share of."""

    cost: Limit
    points: tuple[Point, ...]

    def __iter__(self) -> Iterator[Point]:
        return iter(self.points)

    def __len__(self) -> int:
        return len(self.points)
