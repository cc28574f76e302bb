"""Spectra and bases, tested on prescribed facts."""

import numpy as np
import pytest
import torch
from torch import Tensor

from spectrim import linalg
from spectrim.linalg import Spectrum


def planted(values: list[float], out: int, into: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    left, _ = torch.linalg.qr(torch.randn(out, out, generator=generator, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(into, into, generator=generator, dtype=torch.float64))
    return left[:, : len(values)] * torch.tensor(values, dtype=torch.float64) @ right[: len(values)]


@pytest.mark.parametrize(("out", "into"), [(5, 9), (9, 5), (5, 5)])
def test_planted_singular_values_come_back(out: int, into: int) -> None:
    values = [7.0, 3.0, 1.0, 1e-3, 1e-9]
    weight = planted(values, out, into)
    for spectrum in (linalg.spectrum(weight[None]), linalg.plain_decomposition(weight[None]).spectrum):
        np.testing.assert_allclose(spectrum.values, values, atol=1e-12)


def test_the_error_of_groups_is_that_of_the_block_diagonal_matrix() -> None:
    blocks = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = linalg.plain_decomposition(blocks)
    np.testing.assert_allclose(linalg.spectrum(blocks).values, found.spectrum.values, atol=1e-12)
    whole = torch.block_diag(*blocks)
    for rank in (1, 2, 3, 4):
        down, up = linalg.factors(blocks, found, rank=rank)
        lost = torch.linalg.matrix_norm(whole - torch.block_diag(*(up @ down))) / torch.linalg.matrix_norm(whole)
        assert float(lost) == pytest.approx(found.spectrum.error_at(rank), abs=1e-12)


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
    given = np.array([2.0, 1.0])
    spectrum = Spectrum(given)
    given[0] = 9
    assert spectrum.values[0] == 2
    with pytest.raises(ValueError, match="read-only"):
        spectrum.values[0] = 1


def test_the_metric_basis_ignores_directions_that_the_data_do_not_use() -> None:
    weight = torch.diag(torch.tensor([100.0, 1.0], dtype=torch.float64))[None]
    covariance = torch.diag(torch.tensor([0.0, 1.0], dtype=torch.float64))[None]
    plain = linalg.plain_decomposition(weight)
    metric = linalg.metric_decomposition(weight, covariance, noise=1e-12)
    assert plain.basis[0, :, 0].abs().tolist() == [1, 0]
    assert metric.basis[0, :, 0].abs().tolist() == [0, 1]
    assert metric.spectrum.values.tolist() == [1, 0]


def test_unseen_directions_follow_in_the_order_of_the_plain_metric() -> None:
    weight = planted([5.0, 4.0, 3.0, 2.0], 4, 7)[None]
    metric = linalg.metric_decomposition(weight, torch.zeros(1, 7, 7), noise=1e-12)
    plain = linalg.plain_decomposition(weight)
    overlap = (metric.basis[0].T @ plain.basis[0]).abs()
    torch.testing.assert_close(overlap, torch.eye(4, dtype=torch.float64), atol=1e-10, rtol=0)


@pytest.mark.parametrize(("out", "into"), [(5, 9), (9, 5)])
def test_bases_are_orthonormal_and_factors_have_equal_norms(out: int, into: int) -> None:
    weight = planted([4.0, 2.0, 1.0, 0.5, 0.25], out, into)[None]
    mix = torch.randn(1, into, into, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for found in (
        linalg.plain_decomposition(weight),
        linalg.metric_decomposition(weight, mix @ mix.mT, noise=1e-12),
    ):
        identity = torch.eye(5, dtype=torch.float64)
        torch.testing.assert_close((found.basis.mT @ found.basis)[0], identity, atol=1e-12, rtol=0)
        down, up = linalg.factors(weight, found, rank=3)
        torch.testing.assert_close(down.norm(dim=2), up.norm(dim=1))
        torch.testing.assert_close(up @ down, found.basis[:, :, :3] @ found.basis[:, :, :3].mT @ weight)
