"""Warm-started truncation: never more than 1e-4 above the least error, whatever the matrix does."""

import pytest
import torch
from cases import inputs
from torch import Tensor, nn
from torch.nn import functional

from spectrim.core.errors import ModelError
from spectrim.linalg import Truncated, truncate, truncate_exactly


def planted(values: Tensor, *, out: int = 160, into: int = 128, seed: int = 0) -> Tensor:
    """A float64 matrix (out, into) with these singular values."""
    generator = torch.Generator().manual_seed(seed)
    U = torch.linalg.qr(torch.randn(out, len(values), generator=generator, dtype=torch.float64))[0]
    V = torch.linalg.qr(torch.randn(into, len(values), generator=generator, dtype=torch.float64))[0]
    return (U * values) @ V.T


def excess(W: Tensor, truncated: Truncated, rank: int) -> float:
    """How far the error is above the least one, relative to that."""
    W = W.double()
    least = torch.linalg.svdvals(W)[rank:].square().sum().sqrt()
    return float((W - truncated.left_factor.double() @ truncated.right_factor.double().T).norm() / least - 1)


def nudged(W: Tensor, *, size: float, seed: int = 1) -> Tensor:
    change = torch.randn(W.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(W.dtype)
    return W + size * W.norm() * change / change.norm()


SPECTRA = {
    "no gap at the rank": torch.cat([torch.full((20,), 2.0), torch.linspace(1, 0.5, 108)]).double(),
    "flat": torch.ones(128, dtype=torch.float64),
    "slow decay": torch.arange(1, 129, dtype=torch.float64) ** -0.5,
    "fast decay": 0.8 ** torch.arange(128, dtype=torch.float64),
    "far apart": torch.cat([torch.tensor([1e3, 1e2, 10, 8, 7, 6, 5, 4, 3, 2.0]), 1e-2 * torch.ones(118)]).double(),
}


@pytest.mark.parametrize("size", [1e-6, 1e-3, 0.1, 1.0])
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", [(160, 128), (128, 160)])
def test_after_a_change_the_error_is_the_least_one(shape: tuple[int, int], spectrum: str, size: float) -> None:
    before = planted(SPECTRA[spectrum], out=shape[0], into=shape[1])
    basis = truncate(before, 10).basis
    assert basis.shape == (128, 20)
    for dtype in (torch.float64, torch.float32):
        W = nudged(before, size=size).to(dtype)
        truncated = truncate(W, 10, basis=basis.to(dtype))
        assert truncated.matrix.dtype == dtype
        assert excess(W, truncated, 10) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(160, 128), (128, 160), (12, 7), (1, 9)])
def test_a_cold_start_is_the_exact_truncation(shape: tuple[int, int], dtype: torch.dtype) -> None:
    W = inputs(*shape, dtype=dtype)
    rank = min(5, min(shape))
    cold, exact = truncate(W, rank), truncate_exactly(W, rank)
    assert cold.decomposed
    assert exact.decomposed
    near = 20 * torch.finfo(dtype).eps * float(W.norm())
    torch.testing.assert_close(cold.matrix, exact.matrix, atol=near, rtol=0)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    torch.testing.assert_close(exact.matrix, (U[:, :rank] * S[:rank]) @ Vh[:rank], atol=near, rtol=0)


def test_a_basis_without_any_part_of_the_best_subspace_is_noticed() -> None:
    values = torch.linspace(3, 1, 20).double()
    old, new = torch.zeros(128, 128).double(), torch.zeros(128, 128).double()
    old[range(20), range(20)] = values
    new[range(60, 80), range(60, 80)] = 10 * values
    W = old + new  # the old subspace is invariant, and far from the best
    assert excess(W, truncate(W, 10, basis=truncate(old, 10).basis), 10) < 1e-4


@pytest.mark.parametrize("rank", [3, 10])
def test_a_matrix_of_lower_rank_than_asked_is_kept_whole(rank: int) -> None:
    W = planted(torch.tensor([3.0, 2.0]).double())
    truncated = truncate(W, rank, basis=truncate(nudged(W, size=0.01), rank).basis)
    torch.testing.assert_close(truncated.matrix, W, atol=1e-7, rtol=0)
    zero = truncate(torch.zeros_like(W), rank, basis=truncated.basis)
    assert torch.equal(zero.matrix, torch.zeros_like(W))


def test_large_ranks_are_decomposed_each_time() -> None:
    W = inputs(40, 30)
    truncated = truncate(W, 20, basis=truncate(W, 20).basis)
    assert truncated.decomposed
    assert truncated.basis.shape == (30, 0)
    assert excess(W, truncated, 20) < 1e-4


def test_the_same_start_gives_the_same_bits_and_draws_nothing() -> None:
    W = planted(SPECTRA["slow decay"])
    basis = truncate(W, 10).basis
    random = torch.get_rng_state()
    first, second = (truncate(nudged(W, size=0.1), 10, basis=basis) for _ in range(2))
    assert torch.equal(first.matrix, second.matrix)
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_raise(value: float) -> None:
    W = torch.ones(4, 4)
    W[1, 2] = value
    for make in (truncate, truncate_exactly):
        with pytest.raises(ModelError, match="4 x 4 weight has NaN or infinite"):
            make(W, 2)


@pytest.mark.parametrize(("decay", "lr"), [(0.1, 1e-3), (0.0, 1e-3), (0.1, 1e-2)])
def test_it_stays_at_the_least_error_through_500_steps_of_adam(decay: float, lr: float) -> None:
    torch.manual_seed(0)
    first, last = nn.Linear(40, 128), nn.Linear(128, 10)
    weight = nn.Parameter(torch.randn(128, 128) / 8)
    x = torch.randn(512, 40)
    y = (x @ torch.randn(40, 10)).argmax(dim=1)
    optimiser = torch.optim.Adam([*first.parameters(), *last.parameters(), weight], lr=lr)
    truncated = truncate(weight.detach(), 10)
    decomposed, worst = 0, 0.0
    for step in range(500):
        truncated = truncate(weight.detach(), 10, basis=truncated.basis)
        decomposed += truncated.decomposed
        if step < 20 or step % 10 == 0:
            worst = max(worst, excess(weight.detach(), truncated, 10))
        with torch.no_grad():
            weight.lerp_(truncated.matrix, decay)
        through = weight + (truncated.matrix - weight).detach()
        part = torch.arange(step * 64, step * 64 + 64) % 512
        loss = functional.cross_entropy(last(functional.linear(first(x[part]).relu(), through).relu()), y[part])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert worst < 1e-4
    assert decomposed < 10
