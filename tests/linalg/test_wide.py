"""Wide weights, few vectors: the shortcuts against the full decomposition, forced by shape on small sizes."""

import pytest
import torch
from cases import inputs
from torch import Tensor, nn

import spectrim as st
from spectrim.analysis import moments
from spectrim.linalg import ChannelDecomposition, LowRankCovariance, Problem, problem
from spectrim.linalg.covariance import add_outer, inner, mean_variance, solver, times
from spectrim.linalg.products import gram, times_rounded
from spectrim.linalg.subspace import leading_vectors

SHAPES = {"wide": (1, 100, 160), "tall": (1, 160, 100), "square": (1, 120, 120), "kernel": (2, 90, 20, 3, 3)}
FEW, MANY = 70, 300


@pytest.fixture
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(problem, "_WIDE", 0)
    monkeypatch.setattr(moments, "MOST_DOUBLE_INPUTS", 0)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weight_of(shape: tuple[int, ...]) -> Tensor:
    """Singular values that fall off by 0.9."""
    U, S, Vh = torch.linalg.svd(numbers(*shape).flatten(2), full_matrices=False)
    return ((U * 0.9 ** torch.arange(S.shape[1])) @ Vh).reshape(shape)


def low_rank(groups: int, number: int, width: int, *, ridge: float = 0.0) -> LowRankCovariance:
    rows = numbers(groups, number, width, seed=1) / number**0.5
    return LowRankCovariance(rows, torch.full((groups, 1), ridge, dtype=torch.float64))


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
@pytest.mark.parametrize(("out", "into"), [(150, 400), (400, 150)])
def test_leading_vectors_lose_next_to_nothing_above_the_least(out: int, into: int, kind: torch.dtype) -> None:
    for W in (weight_of((1, out, into))[0], numbers(out, 3) @ numbers(3, into), torch.zeros(out, into).double()):
        U = leading_vectors(W.to(kind), 5)
        assert U is not None
        torch.testing.assert_close(U.mT @ U, torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-12)
        lost = (W - U @ (U.mT @ W)).square().sum()
        assert float(lost) <= (1 + 1e-4) * float(torch.linalg.svdvals(W)[5:].square().sum()) + 1e-6 * float(
            W.square().sum()
        )


@pytest.mark.parametrize("metric", ["plain", "few", "few and ridge", "many"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_a_wide_weight_loses_what_it_says(shape: tuple[int, ...], metric: str, monkeypatch: pytest.MonkeyPatch) -> None:
    W = weight_of(shape)
    groups, out, n = W.flatten(2).shape
    C = {
        "plain": None,
        "few": low_rank(groups, FEW, n),
        "few and ridge": low_rank(groups, FEW, n, ridge=0.1),
        "many": low_rank(groups, MANY, n).matrix,
    }[metric]
    reference = ChannelDecomposition(Problem(W, C if C is None or metric == "many" else C.matrix))
    least, total = reference.tails, reference.problem.total
    monkeypatch.setattr(problem, "_WIDE", 0)
    for rank in (3, min(out, n) - 1, min(out, n)):
        solved = ChannelDecomposition(Problem(W, C))
        down, up = solved.factors((rank,))
        miss = W.flatten(2) - up @ down.flatten(2)
        lost = float((miss * times(miss, C) if C is not None else miss.square()).sum())
        assert solved.tail_at((rank,)) == pytest.approx(lost, abs=1e-12 * total)
        assert lost == pytest.approx(least[rank - 1], rel=1e-4, abs=1e-12 * total)
    assert float(miss.abs().max()) < 1e-12  # full rank equals dense, whatever the data
    assert solved.problem.total == pytest.approx(total)


def test_few_ranks_are_found_without_a_full_decomposition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(problem, "_WIDE", 0)
    solved = ChannelDecomposition(Problem(weight_of((1, 200, 300))))
    solved.factors((5,)), solved.tail_at((5,))
    assert "_solved" not in vars(solved)
    assert len(solved.spectrum) == 200  # all of them, when asked for
    assert solved.tail_at((5,)) == solved.tails[4]


def test_a_low_rank_covariance_computes_as_its_matrix_does() -> None:
    C, M = low_rank(2, 7, 12, ridge=0.3), numbers(2, 5, 12, seed=2)
    torch.testing.assert_close(times(M, C), M @ C.matrix)
    torch.testing.assert_close(inner(M, C), M @ C.matrix @ M.mT)
    torch.testing.assert_close(solver(C)(M), M @ torch.linalg.inv(C.matrix))
    torch.testing.assert_close(mean_variance(C), C.matrix.diagonal(dim1=1, dim2=2).mean(dim=1))
    v = numbers(2, 12, seed=3)
    plus = add_outer(C, v)
    assert isinstance(plus, LowRankCovariance)
    torch.testing.assert_close(plus.matrix, add_outer(C.matrix, v))


@pytest.mark.parametrize("shape", [(2, 30, 1030), (20, 1025), (0, 1024), (3, 9, 20)])
def test_the_second_moments_of_wide_rows_are_those_of_their_blocks(shape: tuple[int, ...]) -> None:
    rows = numbers(*shape, seed=1)
    torch.testing.assert_close(gram(rows), rows.mT @ rows)


@pytest.mark.usefixtures("_wide")
@pytest.mark.parametrize("number", [20, 80])
def test_few_vectors_are_held_until_they_are_as_many_as_the_inputs(number: int) -> None:
    x = inputs(number, 40) + 100
    model = nn.Sequential(nn.Linear(40, 30), nn.Identity()).double()
    moments = st.calibrate(model, x.split(7)).moments["0"]
    assert isinstance(moments.compact, LowRankCovariance) is (number < 40)
    torch.testing.assert_close(moments.mean[0], x.mean(dim=0))
    torch.testing.assert_close(moments.covariance[0], torch.cov(x.T, correction=0), rtol=1e-10, atol=1e-10)


def test_a_wide_covariance_in_float32_loses_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(96, 64)
    x = inputs(4000, 96) * torch.logspace(0, -3, 96) + 2
    exact = torch.cov(x.float().double().T, correction=0)
    W, lost = layer.weight.detach().double(), []
    for wide in (2**30, 0):
        monkeypatch.setattr(moments, "MOST_DOUBLE_INPUTS", wide)
        seen = st.calibrate(layer, x.float().split(20)).moments[""]
        assert seen.compact.dtype is (torch.float32 if wide == 0 else torch.float64)
        solved = ChannelDecomposition(
            Problem(layer.weight[None], seen.compact, rounding_tolerance=seen.rounding_tolerance)
        )
        misses = [W - (up @ down)[0] for down, up in map(solved.factors, [(4,), (16,), (40,), (60,)])]
        lost.append([float(((miss @ exact) * miss).sum()) for miss in misses])
    assert lost[1] == pytest.approx(lost[0], rel=1e-4)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rule", [st.Rank(6), st.Ratio(1.0), st.Budget(params=0.6)], ids=str)
def test_a_network_comes_out_as_without_the_shortcuts(
    rule: st.Rank | st.Ratio | st.Budget, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(60, 64, bias=bias), nn.ReLU(), nn.Linear(64, 10)).double()
    x = inputs(40, 60)
    networks = []
    for wide in (2**30, 0):
        monkeypatch.setattr(problem, "_WIDE", wide)
        monkeypatch.setattr(moments, "MOST_DOUBLE_INPUTS", wide)
        small = st.compress(model, rule, example_inputs=x, data=x.split(16), allow_growth=isinstance(rule, st.Ratio))
        networks.append(small)
    usual, short = networks
    assert [layer.ranks for layer in short.plan] == [layer.ranks for layer in usual.plan]
    for first, second in zip(usual.plan.factored, short.plan.factored, strict=True):
        assert second.predicted_error == pytest.approx(first.predicted_error, rel=1e-4, abs=1e-7)
    with torch.no_grad():
        torch.testing.assert_close(short.model(x), usual.model(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("size", [1e-42, 1e-38, 1e-20, 1.0, 1e20, 1e35])
@pytest.mark.parametrize("other", [1e-60, 1e-10, 1.0, 1e30])
def test_products_rounded_to_float32_keep_to_its_range(size: float, other: float) -> None:
    M, C = other * numbers(1, 5, 40), (size * numbers(1, 40, 30)).float()
    exact = M @ C.double()
    torch.testing.assert_close(times_rounded(M, C) / exact.norm(), exact / exact.norm(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("ridge", [0.0, 0.1])
@pytest.mark.parametrize("in_outputs", [False, True])
def test_the_energy_lost_on_few_vectors_is_that_of_their_covariance(ridge: float, in_outputs: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    weight, low = torch.randn(2, 1, 6, 20, generator=draw, dtype=torch.float64)
    rows, root = (
        torch.randn(1, 4, 20, generator=draw, dtype=torch.float64),
        torch.randn(1, 6, 6, generator=draw).double(),
    )
    C = LowRankCovariance(rows, torch.full((1, 1), ridge, dtype=torch.float64))
    output = root @ root.mT if in_outputs else None
    few, whole = (Problem(weight, covariance, output=output) for covariance in (C, C.matrix))
    for product in (low, 0):
        assert few.seen_error(product) == pytest.approx(whole.seen_error(product), rel=1e-9)
