"""Spectra, bases and factors of every form, tested on prescribed facts."""

import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from spectrim import linalg
from spectrim.layers.forms import form_named
from spectrim.linalg import ChannelDecomposition, Decomposition, Factors, Problem, Spectrum, balanced
from spectrim.linalg.problem import rooted
from spectrim.linalg.shared import better_projection, least_squares


def plain_decomposition(weight: Tensor) -> ChannelDecomposition:
    return ChannelDecomposition.of(Problem(weight))


def metric_decomposition(weight: Tensor, covariance: Tensor, *, rounding_tolerance: float) -> ChannelDecomposition:
    return ChannelDecomposition.of(Problem(weight, covariance, rounding_tolerance=rounding_tolerance))


def planted(values: list[float], out: int, into: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    U, _ = torch.linalg.qr(torch.randn(out, out, generator=generator, dtype=torch.float64))
    V, _ = torch.linalg.qr(torch.randn(into, into, generator=generator, dtype=torch.float64))
    return U[:, : len(values)] * torch.tensor(values, dtype=torch.float64) @ V[: len(values)]


@pytest.mark.parametrize(("out", "into"), [(5, 9), (9, 5), (5, 5)])
def test_planted_singular_values_come_back(out: int, into: int) -> None:
    values = [7.0, 3.0, 1.0, 1e-3, 1e-9]
    weight = planted(values, out, into)
    for spectrum in (linalg.spectrum(weight[None]), plain_decomposition(weight[None]).spectrum):
        np.testing.assert_allclose(spectrum.values, values, atol=1e-12)


def test_the_error_of_groups_is_that_of_the_block_diagonal_matrix() -> None:
    blocks = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    solved = plain_decomposition(blocks)
    np.testing.assert_allclose(linalg.spectrum(blocks).values, solved.spectrum.values, atol=1e-12)
    whole = torch.block_diag(*blocks)
    for rank in (1, 2, 3, 4):
        down, up = solved.factors((rank,))
        lost = torch.linalg.matrix_norm(whole - torch.block_diag(*(up @ down))) / torch.linalg.matrix_norm(whole)
        assert float(lost) == pytest.approx(solved.spectrum.error_at(rank), abs=1e-12)


def test_figures_of_a_known_spectrum() -> None:
    spectrum = Spectrum(np.array([2.0, 2.0, 1.0, 1.0, 0.0]))
    np.testing.assert_allclose(spectrum.cumulative_energy, [0.4, 0.8, 0.9, 1.0, 1.0])
    assert [spectrum.rank_for(energy) for energy in (0.01, 0.4, 0.41, 0.8, 0.9, 0.91, 1.0)] == [1, 1, 2, 2, 3, 4, 4]
    assert spectrum.stable_rank == pytest.approx(2.5)
    assert spectrum.effective_rank == pytest.approx(3 * 2 ** (1 / 3))
    assert spectrum.error_at(2) == pytest.approx(np.sqrt(0.2))


def test_equal_values_have_full_effective_and_stable_rank() -> None:
    spectrum = Spectrum(np.full(6, 0.3))
    assert spectrum.effective_rank == pytest.approx(6)
    assert spectrum.stable_rank == pytest.approx(6)


def test_a_zero_spectrum_has_no_rank_and_no_error() -> None:
    spectrum = Spectrum(np.zeros(4))
    assert (spectrum.effective_rank, spectrum.stable_rank, spectrum.rank_for(0.9), spectrum.error_at(1)) == (0, 0, 1, 0)
    assert spectrum.cumulative_energy.tolist() == [1, 1, 1, 1]


def test_a_spectrum_cannot_be_changed() -> None:
    values = np.array([2.0, 1.0])
    spectrum = Spectrum(values)
    values[0] = 9
    assert spectrum.values[0] == 2
    with pytest.raises(ValueError, match="read-only"):
        spectrum.values[0] = 1


def test_the_metric_basis_ignores_directions_that_the_data_do_not_use() -> None:
    weight = torch.diag(torch.tensor([100.0, 1.0], dtype=torch.float64))[None]
    covariance = torch.diag(torch.tensor([0.0, 1.0], dtype=torch.float64))[None]
    plain = plain_decomposition(weight)
    metric = metric_decomposition(weight, covariance, rounding_tolerance=1e-12)
    assert plain.basis[0, :, 0].abs().tolist() == [1, 0]
    assert metric.basis[0, :, 0].abs().tolist() == [0, 1]
    assert metric.spectrum.values.tolist() == [1, 0]


def test_unseen_directions_follow_in_the_order_of_the_plain_metric() -> None:
    weight = planted([5.0, 4.0, 3.0, 2.0], 4, 7)[None]
    metric = metric_decomposition(weight, torch.zeros(1, 7, 7), rounding_tolerance=1e-12)
    plain = plain_decomposition(weight)
    overlap = (metric.basis[0].T @ plain.basis[0]).abs()
    torch.testing.assert_close(overlap, torch.eye(4, dtype=torch.float64), atol=1e-10, rtol=0)


@pytest.mark.parametrize(("out", "into"), [(5, 9), (9, 5)])
def test_bases_are_orthonormal_and_factors_have_equal_norms(out: int, into: int) -> None:
    weight = planted([4.0, 2.0, 1.0, 0.5, 0.25], out, into)[None]
    mix = torch.randn(1, into, into, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for solved in (
        plain_decomposition(weight),
        metric_decomposition(weight, mix @ mix.mT, rounding_tolerance=1e-12),
    ):
        identity = torch.eye(5, dtype=torch.float64)
        torch.testing.assert_close((solved.basis.mT @ solved.basis)[0], identity, atol=1e-12, rtol=0)
        down, up = balanced(solved.factors((3,)))
        torch.testing.assert_close(down.norm(dim=2), up.norm(dim=1))
        torch.testing.assert_close(up @ down, solved.basis[:, :, :3] @ solved.basis[:, :, :3].mT @ weight)


def test_balancing_keeps_the_product_and_evens_the_norms_of_a_chain() -> None:
    first, core, last = numbers(2, 3, 4, 1, 1, seed=1), numbers(2, 5, 3, 3, 2, seed=2), numbers(2, 6, 5, seed=3)
    first[0, 1], last[1, :, 4] = 0, 0  # a component that is not there stays so
    uneven = (first * 1e4, core, last * 1e-3)
    even = balanced(uneven)
    torch.testing.assert_close(assembled("tucker2", even), assembled("tucker2", uneven))
    torch.testing.assert_close(even[1].flatten(2).norm(dim=2)[0], even[2][0].norm(dim=0))
    assert even[0].isfinite().all()


FORMS: tuple[str, ...] = ("channel", "spatial", "tucker2")
ITERATED: tuple[str, ...] = ("spatial", "tucker2")
METRICS = ("plain", "activation")
SHAPES = [(4, 3, 3, 3), (3, 5, 2, 3), (8, 2, 3, 2), (2, 9, 1, 3)]


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spread(groups: int, n: int, *, seed: int = 5) -> Tensor:
    """Covariances (groups, n, n) with variances over three orders of magnitude."""
    basis, _ = torch.linalg.qr(numbers(groups, n, n, seed=seed))
    return basis * torch.logspace(0, -3, n, dtype=torch.float64) @ basis.mT


def random_problem(shape: tuple[int, ...], metric: str, *, groups: int = 1, output: Tensor | None = None) -> Problem:
    weight = numbers(groups, *shape, seed=7)
    covariance = spread(groups, weight[0, 0].numel()) if metric == "activation" else None
    return Problem(weight, covariance, output)


def assembled(form: str, factors: Factors) -> Tensor:
    """The product of the factors, (groups, out, in, *kernel)."""
    equation = {
        "channel": "grihw,gor->goihw",
        "spatial": "grihx,gorxw->goihw",
        "tucker2": "grixy,gsrhw,gos->goihw",
    }[form]
    return torch.einsum(equation, *factors)


def lost(problem: Problem, form: str, factors: Factors, *, output: Tensor | None = None) -> float:
    """The energy of what the factors miss, in the metric of the problem, by its definition."""
    miss = (problem.weight - assembled(form, factors)).flatten(2)
    weighted = miss if output is None else output @ miss
    return float(((miss @ problem.metric) * weighted).sum())


def fitted(solved: Decomposition, ranks: tuple[int, ...], *, sweeps: int = 2) -> Factors:
    return solved.factors(ranks) if isinstance(solved, ChannelDecomposition) else solved.factors(ranks, sweeps=sweeps)


def every_rank(solved: Decomposition) -> list[tuple[tuple[int, ...], float]]:
    """Ranks and the energy that is said to be lost at them."""
    grid = solved.rank_grid(solved.problem.weight.shape)
    return [(tuple(int(rank) for rank in ranks), float(tail)) for ranks, tail in zip(grid, solved.tails, strict=True)]


def full(solved: Decomposition) -> tuple[int, ...]:
    return every_rank(solved)[-1][0]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("form", FORMS)
def test_the_tails_are_what_the_start_loses_and_no_sweep_loses_more(
    form: str, metric: str, groups: int, shape: tuple[int, ...]
) -> None:
    problem = random_problem(shape, metric, groups=groups)
    solved = form_named(form).decompose(problem)
    within = 1e-6 * problem.total
    for ranks, tail in every_rank(solved):
        assert lost(problem, form, fitted(solved, ranks, sweeps=0)) == pytest.approx(tail, abs=within)
        before = tail
        for sweeps in (1, 2, 4) if form in ITERATED else ():
            now = lost(problem, form, fitted(solved, ranks, sweeps=sweeps))
            assert now <= before + within
            before = now


@pytest.mark.parametrize("form", ITERATED)
def test_two_sweeps_lower_the_error_by_a_hundredth(form: str) -> None:
    problem = random_problem((8, 6, 3, 3), "activation")
    solved = form_named(form).decompose(problem)
    ranks = (5,) if form == "spatial" else (3, 4)
    start, better = (lost(problem, form, fitted(solved, ranks, sweeps=sweeps)) for sweeps in (0, 2))
    assert better < 0.99 * start


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("form", ITERATED)
def test_the_plain_metric_gives_what_the_identity_as_metric_gives(form: str, shape: tuple[int, ...]) -> None:
    plain = random_problem(shape, "plain", groups=2)
    _, _, n = plain.weight.flatten(2).shape
    identity = Problem(plain.weight, torch.eye(n, dtype=torch.float64).expand(2, n, n))
    closed, iterated = (form_named(form).decompose(problem) for problem in (plain, identity))
    for ranks, tail in every_rank(closed):
        without, within = (lost(plain, form, fitted(solved, ranks, sweeps=4)) for solved in (closed, iterated))
        assert without <= within + 1e-4 * plain.total  # neither has quite come to its end after four sweeps
        if form == "spatial":  # the singular value decomposition of the rearranged weight, Jaderberg's second scheme
            assert without == pytest.approx(tail, abs=1e-9 * plain.total)


def in_float32(problem: Problem) -> Problem:
    """With its statistics in float32, as those of wide layers are."""
    return replace(problem, covariance=None if problem.covariance is None else problem.covariance.float())


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("form", ITERATED)
def test_steps_in_float32_as_wide_layers_take_them_are_as_good(form: str, metric: str) -> None:
    problem = random_problem((7, 5, 3, 3), metric, groups=2)
    solved = form_named(form).decompose(problem)
    exact = {ranks: lost(problem, form, fitted(solved, ranks, sweeps=4)) for ranks, _ in every_rank(solved)}
    solved = form_named(form).decompose(in_float32(problem))
    for ranks, tail in every_rank(solved):
        now = lost(problem, form, fitted(solved, ranks, sweeps=4))
        assert now <= min(1.001 * tail, 1.001 * exact[ranks]) + 1e-9 * problem.total


@pytest.mark.parametrize("scale", [2.0**-100, 2.0**100])
@pytest.mark.parametrize("form", ITERATED)
def test_steps_in_float32_hold_any_scale(form: str, scale: float) -> None:
    problem = in_float32(random_problem((7, 5, 3, 3), "activation"))
    ranks = every_rank(form_named(form).decompose(problem))[1][0]
    scaled = Problem(problem.weight, problem.covariance * scale)
    own, other = (fitted(form_named(form).decompose(each), ranks, sweeps=1) for each in (problem, scaled))
    assert lost(problem, form, other) == pytest.approx(lost(problem, form, own), rel=1e-5)


@pytest.mark.parametrize("scale", [2.0**-131, 2.0**-100, 2.0**100])
def test_a_better_projection_is_the_same_for_any_multiple_of_the_metric(scale: float) -> None:
    M, rows = numbers(7, 5, 9, seed=1), numbers(90, 45, seed=2)
    A, V = (rows.T @ rows / 90).float(), torch.eye(5, dtype=torch.float64)[:3]
    H = least_squares(M, A.double(), V)[0]
    best = better_projection(M, A, H, V)
    torch.testing.assert_close(better_projection(M, A * scale, H, V), best, rtol=0, atol=1e-2 * float(best.abs().max()))


@pytest.mark.parametrize("form", ITERATED)
def test_wide_factors_are_not_large_where_no_input_was_seen(form: str) -> None:
    rows, weight = numbers(20, 54, seed=1), numbers(1, 8, 6, 3, 3, seed=2)
    problem, ranks = Problem(weight, (rows.T @ rows / 20)[None]), (6,) if form == "spatial" else (4, 4)
    away = []
    for each in (problem, in_float32(problem)):
        factors = fitted(form_named(form).decompose(each), ranks, sweeps=1)
        away.append(float((assembled(form, factors) - weight).norm() / weight.norm()))
    assert away[1] < 1.1 * away[0]


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("form", ITERATED)
def test_from_factors_of_nearly_the_same_problem_the_fit_ends_as_low(
    form: str, wide: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, ranks = random_problem((8, 6, 3, 3), "activation"), (5,) if form == "spatial" else (3, 4)
    near = form_named(form).decompose(before).factors(ranks)
    weight, noise = before.weight + 0.02 * numbers(*before.weight.shape, seed=1), numbers(54, 54, seed=2)
    problem = before.of_weight(weight, before.metric + 1e-3 * noise @ noise.T / 54)
    monkeypatch.setattr(linalg.shared, "WIDE", 0 if wide else 1024)
    anew, begun = form_named(form).decompose(problem), form_named(form).decompose(problem, near=near)
    start, better = (lost(problem, form, begun.factors(ranks, **sweeps)) for sweeps in ({"sweeps": 0}, {}))  # type: ignore[call-arg]
    assert better < start
    assert better <= 1.01 * lost(problem, form, anew.factors(ranks))


@pytest.mark.parametrize("form", FORMS)
def test_the_tails_fall_to_nothing_as_ranks_grow(form: str) -> None:
    problem = random_problem((7, 5, 3, 3), "activation")
    lost = dict(every_rank(form_named(form).decompose(problem)))
    for ranks, tail in lost.items():
        for axis in range(len(ranks)):
            smaller = tuple(rank - (place == axis) for place, rank in enumerate(ranks))
            assert tail <= lost.get(smaller, tail) + 1e-9 * problem.total
    assert lost[max(lost)] <= 1e-9 * problem.total
    assert lost[min(lost)] > 0.1 * problem.total


def test_a_coarse_grid_of_ranks_holds_both_ends() -> None:
    for size in (1, 5, 64, 65, 130, 512):
        ranks, others = linalg.Tucker2Decomposition.rank_grid((1, size, size, 3, 3)).T.reshape(2, -1)
        assert sorted({*ranks}) == sorted({*others})
        ranks = np.unique(ranks)
        assert 1 <= ranks[0] <= max(1, size // 32)
        assert (ranks[-1], len(ranks) <= 65) == (size, True)
        assert (np.diff(ranks) > 0).all()


def test_a_wide_spatial_form_has_the_ranks_that_are_smaller_than_the_weight_and_the_full_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    problem = random_problem((7, 5, 3, 3), "activation")
    every = dict(every_rank(form_named("spatial").decompose(problem)))
    monkeypatch.setattr(linalg.shared, "WIDE", 0)
    few = dict(every_rank(form_named("spatial").decompose(problem)))
    smaller = [(rank,) for rank in range(1, 16) if rank * (5 * 3 + 7 * 3) <= 7 * 5 * 9]
    assert list(few) == [*smaller, (15,)]
    for ranks in smaller:
        assert few[ranks] == pytest.approx(every[ranks], rel=1e-9)
    assert few[15,] == 0 <= every[15,] <= 1e-9 * problem.total
    for shape in ((1, 1, 8, 3, 3), (1, 64, 1, 3, 3), (2, 1, 1, 5, 1)):
        ranks, (full,) = (
            linalg.SpatialDecomposition.rank_grid(shape)[:, 0],
            linalg.SpatialDecomposition.full_ranks(shape),
        )
        assert (ranks[0] >= 1, ranks[-1]) == (True, full)


SINGULAR: dict[str, Any] = {
    "no variance": lambda n: torch.zeros(1, n, n),
    "one direction": lambda n: torch.outer(torch.arange(n), torch.arange(n))[None].double(),
    "a dead input": lambda n: torch.diag_embed((torch.arange(n) > n // 3).double())[None],
    "duplicated inputs": lambda n: spread(1, n // 2).repeat(1, 2, 2)[:, :n, :n],
    "twelve orders of magnitude": lambda n: torch.diag_embed(torch.logspace(-12, 12, n).double())[None],
    "few samples in float32": lambda n: (rows := numbers(1, n // 3, n).float() + 3).mT @ rows,
}


@pytest.mark.parametrize("covariance", SINGULAR.values(), ids=SINGULAR.keys())
@pytest.mark.parametrize("form", FORMS)
def test_singular_covariances_give_finite_factors_that_are_exact_at_full_rank(form: str, covariance: Any) -> None:
    weight = numbers(1, 5, 4, 3, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solved = form_named(form).decompose(Problem(weight, covariance(36).double(), rounding_tolerance=1e-7))
        assert np.isfinite(solved.tails).all()
        for ranks, _ in every_rank(solved):
            assert all(part.isfinite().all() for part in fitted(solved, ranks))
    torch.testing.assert_close(assembled(form, fitted(solved, full(solved))), weight, rtol=0, atol=1e-8)


@pytest.mark.parametrize("covariance", SINGULAR.values(), ids=SINGULAR.keys())
@pytest.mark.parametrize("form", ITERATED)
def test_steps_in_float32_survive_singular_covariances(form: str, covariance: Any) -> None:
    problem = Problem(numbers(1, 5, 4, 3, 3), covariance(36).float(), rounding_tolerance=1e-7)
    solved = form_named(form).decompose(problem)
    for ranks, tail in every_rank(solved):
        now = lost(problem, form, fitted(solved, ranks, sweeps=4))
        assert np.isfinite(now)
        assert now <= tail + 1e-6 * problem.total


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("form", FORMS)
def test_covariances_summed_in_single_precision_from_few_samples(form: str, seed: int) -> None:
    rows = numbers(40, 90, seed=seed).float() @ torch.logspace(0, -3, 90).diag()
    rows = rows @ torch.linalg.qr(numbers(90, 90, seed=9))[0].float()
    covariance = (rows.T @ rows / 40).double()[None]
    solved = form_named(form).decompose(Problem(numbers(1, 12, 10, 3, 3), covariance, rounding_tolerance=5e-7))
    assert np.isfinite(solved.tails).all()
    by_first = solved.tails.reshape(len({ranks[0] for ranks, _ in every_rank(solved)}), -1)
    assert (np.diff(by_first, axis=0) <= 1e-5 * solved.problem.total).all()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("form", FORMS)
def test_zero_weights_lose_nothing(form: str, metric: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        problem = random_problem((4, 3, 3, 3), metric)
        solved = form_named(form).decompose(Problem(torch.zeros_like(problem.weight), problem.covariance))
        assert not solved.tails.any()
        for ranks, _ in every_rank(solved):
            product = assembled(form, balanced(fitted(solved, ranks)))
            assert torch.equal(product, torch.zeros_like(product))


PLANTED: dict[str, tuple[tuple[int, ...], Factors]] = {
    "channel": ((3,), (numbers(1, 3, 5, 3, 3, seed=1), numbers(1, 8, 3, seed=2))),
    "spatial": ((3,), (numbers(1, 3, 5, 3, 1, seed=1), numbers(1, 8, 3, 1, 3, seed=2))),
    "tucker2": (
        (2, 3),
        (numbers(1, 2, 5, 1, 1, seed=1), numbers(1, 3, 2, 3, 3, seed=2), numbers(1, 8, 3, seed=3)),
    ),
}


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("form", FORMS)
def test_a_planted_product_comes_back_at_its_rank(form: str, metric: str) -> None:
    ranks, factors = PLANTED[form]
    weight = assembled(form, factors)
    problem = Problem(weight, spread(1, 45) if metric == "activation" else None)
    solved = form_named(form).decompose(problem)
    tails = dict(every_rank(solved))
    assert tails[ranks] <= 1e-9 * problem.total
    for smaller, tail in tails.items():
        if any(rank < planted for rank, planted in zip(smaller, ranks, strict=True)):
            assert tail > 1e-3 * problem.total
    for sweeps in (0, 2):
        torch.testing.assert_close(
            assembled(form, fitted(solved, ranks, sweeps=sweeps)), weight, rtol=0, atol=1e-6 * float(weight.abs().max())
        )


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("form", FORMS)
def test_each_group_is_fitted_by_itself(form: str, metric: str) -> None:
    problem = random_problem((4, 3, 3, 3), metric, groups=3, output=spread(3, 4))
    solved = form_named(form).decompose(problem)
    ranks = (2, 3)[-len(full(solved)) :]
    together, tails = assembled(form, fitted(solved, ranks)), np.zeros_like(solved.tails)
    for group in range(3):
        covariance = None if problem.covariance is None else problem.covariance[group : group + 1]
        assert problem.output is not None
        alone = form_named(form).decompose(
            Problem(problem.weight[group : group + 1], covariance, problem.output[group : group + 1])
        )
        torch.testing.assert_close(together[group], assembled(form, fitted(alone, ranks))[0], rtol=1e-7, atol=1e-7)
        tails = tails + alone.tails
    # entry j of a spectrum of groups is that of the same rank in every group
    np.testing.assert_allclose(solved.tails, tails, atol=1e-8 * problem.total)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("form", FORMS)
def test_a_multiple_of_the_identity_as_output_metric_changes_nothing(form: str, metric: str) -> None:
    plain = random_problem((5, 4, 3, 3), metric)
    scaled = Problem(plain.weight, plain.covariance, 7.0 * torch.eye(5, dtype=torch.float64)[None])
    first, second = form_named(form).decompose(plain), form_named(form).decompose(scaled)
    np.testing.assert_allclose(second.tails / scaled.total, first.tails / plain.total, atol=1e-9)
    ranks = (2, 3)[-len(full(first)) :]
    torch.testing.assert_close(
        assembled(form, fitted(second, ranks)), assembled(form, fitted(first, ranks)), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("form", FORMS)
def test_an_output_metric_lowers_the_error_that_it_measures(form: str, metric: str, seed: int) -> None:
    output = spread(1, 6, seed=20 + seed)
    plain = random_problem((6, 4, 3, 3), metric)
    weighted = Problem(plain.weight, plain.covariance, output)
    unaware, aware = form_named(form).decompose(plain), form_named(form).decompose(weighted)
    # directions without any effect count a thousandth of the strongest
    floored = output / torch.linalg.eigvalsh(output).max() + 1e-3 * torch.eye(6, dtype=torch.float64)
    sums = np.zeros(2)
    for ranks, tail in every_rank(aware):
        start = lost(plain, form, fitted(aware, ranks, sweeps=0), output=floored)
        assert start == pytest.approx(tail, abs=1e-6 * weighted.total)
        each = [lost(plain, form, fitted(solved, ranks), output=floored) for solved in (aware, unaware)]
        assert form in ITERATED or each[0] <= each[1] + 1e-6 * weighted.total
        sums += each
    # alternating steps may end in different local minima at single ranks
    assert sums[0] < sums[1]


@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (9, 9)])
@pytest.mark.parametrize("metric", ["plain", "activation"])
def test_the_values_alone_are_those_of_the_decomposition(shape: tuple[int, int], metric: str) -> None:
    weight, rows = numbers(2, *shape), numbers(2, 40, shape[1], seed=1)
    covariance = None if metric == "plain" else rows.mT @ rows / 40
    problem = Problem(weight, covariance, rounding_tolerance=1e-12)
    whole, alone = ChannelDecomposition.of(problem), ChannelDecomposition.of_values(problem)
    np.testing.assert_allclose(alone.spectrum.values, whole.spectrum.values, rtol=1e-6)
    again = ChannelDecomposition.of_values(problem, alone.spectrum)
    assert [again.tail_at((rank,)) for rank in (1, 3)] == pytest.approx([whole.tail_at((rank,)) for rank in (1, 3)])


@pytest.mark.parametrize("metric", [-1e30 * torch.eye(3), torch.full((3, 3), float("nan"))], ids=["negative", "nan"])
def test_a_metric_that_no_floor_helps_has_no_half_finished_factor(metric: Tensor) -> None:
    with pytest.raises(torch.linalg.LinAlgError):
        rooted(metric.double()[None])


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_roots_are_of_what_was_given_with_its_floor(kind: torch.dtype) -> None:
    rows = torch.randn(2, 9, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    rows[1, :, 2] = rows[1, :, 4]  # singular
    metric = (rows.mT @ rows).to(kind)
    before = metric.clone()
    floor, root = rooted(metric)
    assert torch.equal(metric, before)
    assert root.dtype == floor.dtype == torch.float64
    assert torch.equal(root, root.tril())
    torch.testing.assert_close(root @ root.mT, before.double() + torch.diag_embed(floor.unsqueeze(1).expand(2, 6)))
