"""The interpolative form: the same product, whatever its factors are, with small coefficients."""

import pytest
import torch
from torch import Tensor

from spectrim.linalg import interpolated

SIZES = [(9, 4, 7), (40, 39, 40), (6, 6, 8), (12, 3, 3), (5, 1, 2), (200, 60, 90)]


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def assembled(order: Tensor, first: Tensor, rest: Tensor) -> Tensor:
    return torch.cat([first, rest @ first])[order]


@pytest.mark.parametrize(("out", "rank", "into"), SIZES)
@pytest.mark.parametrize("scale", [1.0, 1e-150, 1e150])
def test_it_is_the_same_product_with_small_coefficients(out: int, rank: int, into: int, scale: float) -> None:
    down, up = drawn(rank, into), drawn(out, rank)
    up = up * torch.logspace(-6, 6, rank, dtype=torch.float64) * scale  # columns of very unequal size
    order, first, rest = interpolated(down, up)
    assert order[order].tolist() == list(range(out))  # as runtimes take it that move it elsewhere
    assert (first.shape, rest.shape) == ((rank, into), (out - rank, rank))
    assert all(abs(coefficient) <= 1.5 + 1e-9 for coefficient in rest.flatten().tolist())
    exact = up @ down
    assert float((assembled(order, first, rest) - exact).abs().max()) <= 1e-12 * float(exact.abs().max())


@pytest.mark.parametrize("true_rank", [0, 1, 3])
def test_factors_that_are_not_of_full_rank_lose_nothing(true_rank: int) -> None:
    up = drawn(10, true_rank) @ drawn(true_rank, 5)
    order, first, rest = interpolated(drawn(5, 8), up)
    assert torch.isfinite(rest).all()
    torch.testing.assert_close(assembled(order, first, rest), up @ drawn(5, 8), rtol=1e-12, atol=1e-12)
