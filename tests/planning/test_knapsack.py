"""One option for every layer under one budget: as good as trying all of them, and never above the budget."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings, strategies as draw

from spectrim import errors
from spectrim.planning.knapsack import Allocation, KnapsackItem

laws = settings(max_examples=150, deadline=None, derandomize=True)
options = draw.lists(draw.tuples(draw.integers(0, 60), draw.integers(0, 1000)), min_size=1, max_size=5)
problems = draw.lists(options, min_size=1, max_size=4)


def items_of(problem: list[list[tuple[int, int]]]) -> list[KnapsackItem]:
    return [
        KnapsackItem(np.array([cost for cost, _ in item]), np.array([loss / 7 for _, loss in item], dtype=np.float64))
        for item in problem
    ]


def spent(items: list[KnapsackItem], solution: list[int]) -> int:
    return sum(int(item.costs[option]) for item, option in zip(items, solution, strict=True))


def lost(items: list[KnapsackItem], solution: list[int]) -> float:
    return sum(float(item.losses[option]) for item, option in zip(items, solution, strict=True))


def by_trying(items: list[KnapsackItem], budget: int) -> float | None:
    """The smallest loss of all choices that fit, None where none does."""
    every = (list(solution) for solution in product(*(range(len(item.costs)) for item in items)))
    return min((lost(items, solution) for solution in every if spent(items, solution) <= budget), default=None)


@laws
@given(problem=problems, budget=draw.integers(0, 250), limit=draw.integers(0, 250))
def test_it_is_as_good_as_trying_every_choice(problem: list[list[tuple[int, int]]], budget: int, limit: int) -> None:
    items = items_of(problem)
    solved, best = Allocation.of(items, limit=max(budget, limit)), by_trying(items, budget)
    if best is None:
        assert budget < solved.cheapest
        with pytest.raises(errors.RuleError, match=f"below the cheapest choice, {solved.cheapest}"):
            solved.solve(budget)
    else:
        solution = solved.solve(budget)
        assert spent(items, solution) <= budget
        assert lost(items, solution) == pytest.approx(best, abs=1e-9)


@laws
@given(problem=problems)
def test_more_budget_never_loses_more(problem: list[list[tuple[int, int]]]) -> None:
    items = items_of(problem)
    solved = Allocation.of(items, limit=300)
    losses = [lost(items, solved.solve(budget)) for budget in range(solved.cheapest, 301)]
    assert (np.diff(losses) <= 1e-9).all()
    assert losses[-1] == pytest.approx(sum(item.losses.min() for item in items))


@laws
@given(problem=problems)
def test_the_efficient_options_are_those_that_no_other_beats(problem: list[list[tuple[int, int]]]) -> None:
    for item in items_of(problem):
        efficient = item.efficient()
        assert (np.diff(item.costs[efficient]) > 0).all()
        assert (np.diff(item.losses[efficient]) < 0).all()
        for cost, loss in zip(item.costs, item.losses, strict=True):
            assert ((item.costs[efficient] <= cost) & (item.losses[efficient] <= loss)).any()


def large(seed: int, *, layers: int = 30, ranks: int = 60) -> list[KnapsackItem]:
    """Options like those of a network: costs in the millions, losses that fall off with the rank."""
    numbers = np.random.default_rng(seed)
    items = []
    for _ in range(layers):
        costs = np.arange(1, ranks + 1) * int(numbers.integers(10_000, 900_000)) + int(numbers.integers(0, 5000))
        decay = numbers.uniform(0.02, 0.2)
        items.append(KnapsackItem(costs, numbers.uniform(0.1, 1) * np.exp(-decay * np.arange(1, ranks + 1))))
    return items


@pytest.mark.parametrize("seed", range(3))
def test_large_costs_are_rounded_and_the_budget_is_used_to_the_last_half_percent(seed: int) -> None:
    items = large(seed)
    whole = sum(int(item.costs.max()) for item in items)
    solved = Allocation.of(items, limit=whole)
    assert solved.unit > 1
    losses = []
    for share in (0.05, 0.1, 0.3, 0.5, 0.8, 0.99):
        budget = int(share * whole)
        solution = solved.solve(budget)
        assert 0.995 * budget <= spent(items, solution) <= budget
        losses.append(lost(items, solution))
    assert losses == sorted(losses, reverse=True)
    assert solved.solve(whole) == [len(item.costs) - 1 for item in items]
    assert solved.solve(solved.cheapest) == [0] * len(items)


def test_rounded_costs_lose_next_to_nothing_against_the_relaxed_bound() -> None:
    items = large(7)
    budget = sum(int(item.costs.max()) for item in items) // 3
    reached = lost(items, Allocation.of(items, limit=budget).solve(budget))
    # Lagrange: for every price, the cheapest sum of loss and priced cost, less the priced budget, bounds every choice
    bounds = [
        sum(float((item.losses + price * item.costs).min()) for item in items) - price * budget
        for price in np.logspace(-12, -6, 200)
    ]
    assert max(bounds) <= reached <= 1.01 * max(bounds)


def test_equal_options_and_free_ones_are_no_trouble() -> None:
    items = [
        KnapsackItem(np.array([0, 0, 5, 5]), np.array([3.0, 2.0, 1.0, 1.0])),
        KnapsackItem(np.array([4]), np.array([9.0])),
    ]
    solved = Allocation.of(items, limit=9)
    assert [lost(items, solved.solve(budget)) for budget in (4, 8, 9, 1000)] == [11, 11, 10, 10]
    with pytest.raises(errors.RuleError, match="below the cheapest choice, 4"):
        solved.solve(3)
