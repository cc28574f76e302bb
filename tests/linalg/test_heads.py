"""Weights that read the heads of an attention."""

import pytest
import torch
from torch import Tensor

from spectrim.linalg import HeadDecomposition, HeadLayout, Problem

LAYOUTS = (HeadLayout(4, 4, 6), HeadLayout(6, 2, 4), HeadLayout(1, 1, 10))


def covariance(n: int) -> Tensor:
    rows = torch.randn(4 * n, n, generator=torch.Generator().manual_seed(0)).double()
    rows = rows @ torch.randn(n, n, generator=torch.Generator().manual_seed(1)).double()
    return (rows.T @ rows / len(rows)).unsqueeze(0)


def problem_of(layout: HeadLayout, *, with_output: bool = False) -> Problem:
    n = layout.heads * layout.size
    root = torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(2)).double()
    weight = torch.randn(1, 8, n, generator=torch.Generator().manual_seed(3))
    return Problem(weight, covariance(n), output=root @ root.mT if with_output else None)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("with_output", [False, True])
def test_the_predicted_error_is_that_of_the_factors(layout: HeadLayout, with_output: bool) -> None:
    problem = problem_of(layout, with_output=with_output)
    solved = HeadDecomposition.of_heads(problem, layout)
    for rank in range(1, layout.size + 1):
        feeding, reading, weight = solved.factors((rank,))
        assert feeding.shape == (1, layout.groups * rank, layout.groups * layout.size)
        lost = problem.weight.double() - weight @ reading
        if problem.output is not None:
            lost = problem.weighted(lost)
        error = float(((lost @ problem.metric) * lost).sum())
        assert error == pytest.approx(solved.tail_at((rank,)), rel=1e-5, abs=1e-6 * problem.total)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_numbers_stay_as_large_as_they_were(layout: HeadLayout, scale: float) -> None:
    problem = problem_of(layout)
    problem = Problem(problem.weight, scale * problem.covariance)
    _, reading, _ = HeadDecomposition.of_heads(problem, layout).factors((layout.size,))
    after = (reading @ problem.metric @ reading.mT)[0].trace()
    assert float(after) == pytest.approx(float(problem.metric[0].trace()), rel=1e-4)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_head_of_a_group_reads_the_same_numbers(layout: HeadLayout, rank: int) -> None:
    feeding, reading, _ = HeadDecomposition.of_heads(problem_of(layout), layout).factors((rank,))
    values, read = blocks(feeding, layout.groups), blocks(reading, layout.heads)
    assert sum(map(len, values)) == rank * layout.groups
    assert min(map(len, values)) >= 1
    for head, rows in enumerate(read):
        assert torch.equal(rows, values[head // (layout.heads // layout.groups)])


def blocks(rows: Tensor, heads: int) -> list[Tensor]:
    """What lies on the diagonal; nothing else does, and heads are one after the other."""
    places = rows[0].unflatten(1, (heads, -1)).any(dim=2)
    assert bool((places.sum(dim=1) == 1).all())
    owners = places.to(torch.int8).argmax(dim=1)
    assert torch.equal(owners, owners.sort().values)
    return [rows[0, owners == head].unflatten(1, (heads, -1))[:, head] for head in range(heads)]


def test_numbers_go_to_the_heads_that_lose_most() -> None:
    layout = HeadLayout(4, 4, 6)
    problem = problem_of(layout)
    problem.weight.unflatten(2, (4, 6))[:, :, 1:] *= 0.03
    solved = HeadDecomposition.of_heads(problem, layout)
    for rank, expected in ((1, [1, 1, 1, 1]), (2, [5, 1, 1, 1])):
        feeding, reading, weight = solved.factors((rank,))
        assert [len(rows) for rows in blocks(feeding, 4)] == expected
    even = torch.block_diag(*solved.directions[:, :2]).unsqueeze(0)
    metric, W = problem.metric, problem.weight.double()
    fitted = W @ metric @ even.mT @ torch.linalg.inv(even @ metric @ even.mT) @ even
    lost = [float((((W - product) @ metric) * (W - product)).sum()) for product in (weight @ reading, fitted)]
    assert lost[0] < 0.5 * lost[1]


def test_of_one_head_it_is_the_truncated_decomposition() -> None:
    problem = problem_of(LAYOUTS[2])
    solved = HeadDecomposition.of_heads(problem, LAYOUTS[2])
    energies = torch.linalg.svdvals(problem.weight[0].double() @ torch.linalg.cholesky(problem.metric[0])).square()
    after = [float(energies[rank:].sum()) for rank in range(1, 8)]
    assert solved.tails[:7].tolist() == pytest.approx(after, rel=1e-4)
