"""Weights that read only some of their inputs."""

import pytest
import torch
from torch import Tensor

from spectrim.linalg import Problem, SubsetDecomposition


def covariance(n: int, *, seed: int = 0) -> Tensor:
    """Of rectified random mixtures, (1, n, n)."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.relu(torch.randn(4 * n, n, generator=generator) @ torch.randn(n, n, generator=generator)).double()
    return (rows.T @ rows / len(rows)).unsqueeze(0)


def weight(out: int, n: int) -> Tensor:
    return torch.randn(1, out, n, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("n", [24, 300])
@pytest.mark.parametrize("with_output", [False, True])
def test_the_predicted_error_is_that_of_the_factors(n: int, with_output: bool) -> None:
    root = torch.randn(1, 9, 9, generator=torch.Generator().manual_seed(2)).double()
    problem = Problem(weight(9, n), covariance(n), output=root @ root.mT if with_output else None)
    solved = SubsetDecomposition.of(problem)
    for place, (rank,) in enumerate(SubsetDecomposition.rank_grid(problem.weight.shape)[::5].tolist()):
        _, into, last = solved.factors((rank,))
        assert into.shape == (1, rank, n)
        assert bool((into.sum(dim=2) == 1).all())
        lost = problem.weight.double() - last @ into
        if problem.output is not None:
            lost = problem.weighted(lost)
        error = float(((lost @ problem.metric) * lost).sum())
        assert error == pytest.approx(float(solved.tails[5 * place]), rel=1e-3, abs=1e-5 * problem.total)


def test_at_full_width_nothing_is_lost_and_losses_only_fall() -> None:
    problem = Problem(weight(7, 40), covariance(40))
    solved = SubsetDecomposition.of(problem)
    assert sorted(solved.order.tolist()) == list(range(40))
    assert solved.tails[-1] == 0
    assert bool((solved.tails[1:] <= solved.tails[:-1]).all())
    _, into, last = solved.factors((40,))
    torch.testing.assert_close(last @ into, problem.weight.double(), rtol=0, atol=1e-5)


def test_the_inputs_that_matter_come_first() -> None:
    planted = torch.zeros(1, 6, 32)
    needed = [3, 8, 21, 30]
    planted[..., needed] = weight(6, 4)
    solved = SubsetDecomposition.of(Problem(planted, torch.eye(32, dtype=torch.float64).unsqueeze(0)))
    assert sorted(solved.order[:4].tolist()) == needed
    assert float(solved.tails[3]) == pytest.approx(0, abs=1e-5)


def test_of_inputs_that_are_copies_of_each_other_one_is_enough() -> None:
    half = covariance(16)
    problem = Problem(weight(5, 32), half.repeat(1, 2, 2))
    solved = SubsetDecomposition.of(problem)
    assert float(solved.tails[15]) < 1e-4 * problem.total
    assert len({place % 16 for place in solved.order[:16].tolist()}) == 16


def test_without_data_the_largest_columns_are_read() -> None:
    problem = Problem(weight(8, 20))
    solved = SubsetDecomposition.of(problem)
    norms = problem.weight[0].double().square().sum(dim=0)
    for rank in (3, 20):
        _, into, last = solved.factors((rank,))
        assert float((problem.weight - last @ into).square().sum()) == pytest.approx(solved.tails[rank - 1], abs=1e-9)
        assert float(solved.tails[rank - 1]) == pytest.approx(float(norms.sort().values[: 20 - rank].sum()))


def test_what_other_factors_read_is_taken_over() -> None:
    problem = Problem(weight(8, 20), covariance(20))
    near = SubsetDecomposition.of(problem).factors((6,))
    other = SubsetDecomposition.of(Problem(weight(8, 20) + 1, covariance(20, seed=5)), near=near).factors((6,))
    assert torch.equal(near[1], other[1])
    assert not torch.equal(near[2], other[2])


def test_it_is_better_than_drawing_lots() -> None:
    problem = Problem(weight(8, 64), covariance(64))
    C, W = problem.metric[0], problem.weight[0].double()
    lost = []
    for seed in range(20):
        drawn = torch.randperm(64, generator=torch.Generator().manual_seed(seed))[:16]
        fitted = torch.zeros_like(W)
        fitted[:, drawn] = torch.linalg.solve(C[drawn][:, drawn], C[drawn] @ W.T).T
        lost.append(problem.seen_error(fitted.unsqueeze(0)))
    solved = SubsetDecomposition.of(problem)
    assert float(solved.tail_at((16,))) < 0.8 * min(lost)
