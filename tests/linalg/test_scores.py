"""The products of queries and keys at lower ranks."""

import pytest
import torch
from torch import Tensor

from spectrim.linalg import HeadLayout, PartnerMoments, Problem, ScoreDecomposition

LAYOUTS = (HeadLayout(4, 4, 6), HeadLayout(6, 2, 4), HeadLayout(1, 1, 8))


def moment(n: int, *, seed: int) -> Tensor:
    rows = torch.randn(4 * n, n, generator=torch.Generator().manual_seed(seed)).double()
    rows = rows @ torch.randn(n, n, generator=torch.Generator().manual_seed(seed + 1)).double()
    return rows.T @ rows / len(rows)


def problem_of(layout: HeadLayout, *, with_gradients: bool = False) -> Problem:
    keys, queries = layout.groups * layout.size, layout.heads * layout.size
    weight = torch.randn(1, keys, 10, generator=torch.Generator().manual_seed(3))
    partner = PartnerMoments(moment(queries, seed=4), moment(queries, seed=6) if with_gradients else None)
    output = moment(keys, seed=8).unsqueeze(0) if with_gradients else None
    return Problem(weight, moment(10, seed=10).unsqueeze(0), output=output, partner=partner)


def blocks(matrix: Tensor, size: int) -> list[Tensor]:
    return [matrix[at : at + size, at : at + size] for at in range(0, len(matrix), size)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_share_that_is_lost_is_that_of_the_scores(layout: HeadLayout) -> None:
    problem = problem_of(layout)
    assert problem.partner is not None
    solved = ScoreDecomposition.of_heads(problem, layout)
    W, each = problem.weight[0].double(), layout.heads // layout.groups
    keys = blocks(W @ problem.metric[0] @ W.T, layout.size)
    queries = blocks(problem.partner.second, layout.size)
    for rank in range(1, layout.size + 1):
        _, back, weight, _ = solved.factors((rank,))
        torch.testing.assert_close(back @ weight, (back @ torch.linalg.pinv(back)) @ (back @ weight))
        lost, whole = 0.0, 0.0
        for head in range(layout.heads):
            group = head // each
            rows = slice(group * layout.size, (group + 1) * layout.size)
            # of the scores of all pairs: E[(q^T (k - k'))^2]
            off = W[rows] - (back @ weight)[0, rows]
            mean_query = sum(queries[group * each : (group + 1) * each]) / each
            lost += float((mean_query @ off @ problem.metric[0] @ off.T).trace())
            whole += float((mean_query @ keys[group]).trace())
        assert solved.tail_at((rank,)) / problem.total == pytest.approx(lost / whole, rel=1e-2, abs=1e-3)


@pytest.mark.parametrize("with_gradients", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_at_full_rank_every_score_is_what_it_was(layout: HeadLayout, with_gradients: bool) -> None:
    problem = problem_of(layout, with_gradients=with_gradients)
    feeding, _, weight, _ = ScoreDecomposition.of_heads(problem, layout).factors((layout.size,))
    draw = torch.Generator().manual_seed(0)
    q, x = (torch.randn(5, n, generator=draw).double() for n in (layout.heads * layout.size, 10))
    expected = scores(q, x @ problem.weight[0].double().T, layout)
    torch.testing.assert_close(scores(q @ feeding[0].T, x @ weight[0].T, layout), expected, rtol=1e-10, atol=1e-9)


def scores(q: Tensor, k: Tensor, layout: HeadLayout) -> Tensor:
    queries, keys = q.unflatten(1, (layout.heads, -1)), k.unflatten(1, (layout.groups, -1))
    return torch.einsum("ihd,jhd->hij", queries, keys.repeat_interleave(layout.heads // layout.groups, dim=1))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_queries_of_a_group_and_its_keys_keep_the_same_directions(layout: HeadLayout) -> None:
    feeding, back, weight, _ = ScoreDecomposition.of_heads(problem_of(layout), layout).factors((2,))
    assert feeding.shape == (1, 2 * layout.heads, layout.heads * layout.size)
    assert back.shape == (1, layout.groups * layout.size, 2 * layout.groups)
    assert weight.shape == (1, 2 * layout.groups, 10)
    ranks = back[0].unflatten(0, (layout.groups, -1)).any(dim=1).sum(dim=1)
    by_head = feeding[0].unflatten(1, (layout.heads, -1)).any(dim=2).sum(dim=0)
    assert by_head.tolist() == ranks.repeat_interleave(layout.heads // layout.groups).tolist()
    assert int(ranks.min()) >= 1


def test_queries_and_keys_stay_as_large_as_each_other() -> None:
    problem = problem_of(LAYOUTS[0])
    feeding, back, _, by_key = ScoreDecomposition.of_heads(problem, LAYOUTS[0]).factors((6,))
    torch.testing.assert_close(by_key[0], torch.linalg.inv(back[0]))
    torch.testing.assert_close(feeding[0].norm(dim=1), by_key[0].norm(dim=1))


def test_directions_that_the_softmax_never_looks_at_go_first() -> None:
    layout = HeadLayout(1, 1, 4)
    gradients = torch.diag(torch.tensor([1.0, 1.0, 1e-6, 1e-6]).double())
    weight = torch.randn(1, 4, 10, generator=torch.Generator().manual_seed(0))
    problem = Problem(
        weight,
        torch.eye(10).double().unsqueeze(0),
        output=gradients.unsqueeze(0),
        partner=PartnerMoments(gradients, gradients),
    )
    _, back, keys, _ = ScoreDecomposition.of_heads(problem, layout).factors((2,))
    off = ((back @ keys)[0] - weight[0].double()).norm(dim=1) / weight[0].norm(dim=1)
    assert float(off[:2].max()) < 1e-2


def test_without_what_the_queries_are_the_keys_count_alone() -> None:
    weight = torch.randn(1, 8, 10, generator=torch.Generator().manual_seed(0))
    solved = ScoreDecomposition.of(Problem(weight))
    energies = torch.linalg.svdvals(weight[0].double()).square()
    assert solved.tails.tolist() == pytest.approx(
        [float(energies[rank:].sum()) for rank in range(1, 9)], rel=1e-3, abs=1e-3 * float(energies.sum())
    )
