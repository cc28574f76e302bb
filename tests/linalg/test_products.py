"""Products of large matrices."""

import pytest
import torch
from torch import nn

import spectrim as st
from spectrim.layers.replacement import product
from spectrim.linalg import problem
from spectrim.linalg.products import gram, matmul, times_rounded

SHAPES = [(300, 400, 500), (64, 3000, 300), (700, 65, 1400), (1, 5, 3), (300, 0, 400)]


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64)


@pytest.mark.parametrize(("n", "k", "m"), SHAPES)
@pytest.mark.parametrize("groups", [None, 1, 2])
def test_large_products_are_those_of_matrices(n: int, k: int, m: int, groups: int | None) -> None:
    lead = () if groups is None else (groups,)
    A, B = numbers(*lead, n, k), numbers(*lead, k, m)
    for left, right in ((A, B), (A.mT.contiguous().mT, B.mT.contiguous().mT), (A, B[..., :1].expand_as(B))):
        now = matmul(left.float(), right.float())
        assert now.dtype == torch.float32
        torch.testing.assert_close(now.double(), left @ right, rtol=0, atol=5e-4)
        assert torch.equal(matmul(left, right), left @ right)


@pytest.mark.parametrize("width", [100, 1030, 2300])
@pytest.mark.parametrize("groups", [None, 1, 2])
def test_gram_is_symmetric_and_exact(width: int, groups: int | None) -> None:
    rows = numbers(*(() if groups is None else (groups,)), 90, width)
    whole = gram(rows.float())
    torch.testing.assert_close(whole.double(), rows.mT @ rows, rtol=0, atol=1e-4)
    torch.testing.assert_close(gram(rows), rows.mT @ rows)


@pytest.mark.parametrize("scales", [(1e-60, 1e30), (1e60, 1e-30), (1.0, 1e37), (1e-30, 1e-30), (1.0, 0.0)])
def test_rounded_products_hold_any_scale(scales: tuple[float, float]) -> None:
    M, C = numbers(7, 40) * scales[0], (numbers(40, 40) * scales[1]).float()
    expected = M @ C.double()
    before = M.clone()
    torch.testing.assert_close(times_rounded(M, C), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert torch.equal(M, before)


def test_what_is_not_finite_stays_so() -> None:
    M = numbers(7, 40)
    M[0, 0] = float("nan")
    assert times_rounded(M, numbers(40, 40).float())[0].isnan().all()


def test_autocast_around_everything_rounds_nothing() -> None:
    A, B = numbers(300, 400), numbers(400, 300)
    expected = [matmul(A.float(), B.float()), gram(A.float()), times_rounded(A, B.float())]
    with torch.autocast("cpu", torch.bfloat16):
        now = [matmul(A.float(), B.float()), gram(A.float()), times_rounded(A, B.float())]
    assert all(torch.equal(*pair) for pair in zip(now, expected, strict=True))


def test_autocast_around_everything_leaves_the_product_of_wide_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(problem, "_WIDE", 0)
    factors = (numbers(1, 5, 40), numbers(1, 30, 5))
    expected = product(nn.Linear(40, 30), form="linear", factors=factors)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(product(nn.Linear(40, 30), form="linear", factors=factors), expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated:FutureWarning")
def test_factored_weights_that_are_read_multiply_in_every_context() -> None:
    layer = st.LowRankLinear(nn.Linear(1024, 200, bias=False), nn.Linear(200, 768)).requires_grad_(requires_grad=False)
    expected = layer.up.weight @ layer.down.weight

    def read(x: torch.Tensor) -> torch.Tensor:
        return x @ layer.weight.mT

    x = numbers(4, 1024).float()
    torch.testing.assert_close(layer.weight, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.func.vmap(read)(x), x @ expected.mT, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(
        torch.compile(read, fullgraph=True, backend="eager")(x), x @ expected.mT, rtol=1e-3, atol=1e-4
    )
    torch.testing.assert_close(torch.jit.trace(read, x)(x), x @ expected.mT, rtol=1e-3, atol=1e-4)
    with torch.inference_mode():
        torch.testing.assert_close(read(x), x @ expected.mT, rtol=1e-3, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert (layer.weight * 1).dtype == torch.bfloat16
    layer.to("meta")
    assert (layer.weight.device.type, layer.weight.shape) == ("meta", expected.shape)
