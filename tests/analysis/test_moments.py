"""Sums do not depend on how the vectors come in batches."""

import pytest
import torch
from torch import Tensor, nn

import spectrim as st
from spectrim.analysis.moments import Moments, RunningCovariance, RunningGradients, concatenated


def drawn(number: int, width: int, *, dtype: torch.dtype = torch.float64) -> Tensor:
    rows = torch.randn(2, number, width, generator=torch.Generator().manual_seed(number + width), dtype=dtype)
    return rows * torch.linspace(0.1, 3, width, dtype=dtype) + 5


def moments_of(rows: Tensor, size: int) -> Moments:
    running = RunningCovariance(centre=rows.mean(dim=1))
    for batch in rows.split(size, dim=1):
        running.add(batch, samples=batch.shape[1])
    return running.finish("layer")


@pytest.mark.parametrize(("number", "width"), [(1, 3), (511, 8), (513, 8), (1300, 20), (100, 2049), (2200, 2049)])
@pytest.mark.parametrize("size", [1, 100])
def test_moments_are_those_of_one_batch(number: int, width: int, size: int) -> None:
    rows = drawn(number, width)
    whole, parts = moments_of(rows, number), moments_of(rows, max(size, number // 50))
    assert (parts.count, parts.samples) == (number, number)
    assert type(parts.compact) is type(whole.compact)
    torch.testing.assert_close(parts.mean, rows.mean(dim=1), rtol=1e-12, atol=1e-12)
    centred = rows - rows.mean(dim=1, keepdim=True)
    torch.testing.assert_close(parts.covariance, centred.mT @ centred / number, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(parts.covariance, whole.covariance, rtol=1e-9, atol=1e-12)
    assert parts.shrinkage == pytest.approx(whole.shrinkage, rel=1e-6, abs=1e-12)


def test_batches_may_be_written_to_once_they_are_added() -> None:
    rows = drawn(40, 6)
    memory, running, gradients = torch.empty(2, 4, 6).double(), RunningCovariance(), RunningGradients()
    for batch in rows.split(4, dim=1):
        memory.copy_(batch)
        running.add(memory, samples=4)
        gradients.add(memory, samples=4, size=4)
    torch.testing.assert_close(running.finish("layer").mean, rows.mean(dim=1))
    torch.testing.assert_close(gradients.finish()[0], rows.mT @ rows / 40)


@pytest.mark.parametrize("sizes", [[1] * 700, [3, 3, 1, 1, 1, 600], [20]])
def test_gradients_of_each_sample_count_alike(sizes: list[int]) -> None:
    rows, running = drawn(sum(sizes), 30), RunningGradients()
    for batch in rows.split(sizes, dim=1):
        running.add(batch, samples=batch.shape[1], size=batch.shape[1])
    assert running.tells
    mean, share = running.finish()
    torch.testing.assert_close(mean, rows.mT @ rows / sum(sizes), rtol=1e-12, atol=1e-12)
    whole = RunningGradients()
    whole.add(rows, samples=sum(sizes), size=sum(sizes))
    assert share == pytest.approx(whole.finish()[1], rel=1e-6)


@pytest.mark.parametrize("size", [1, 3, 50])
@pytest.mark.parametrize("width", [8, 2100])
def test_shrinkage_is_about_that_of_one_batch(size: int, width: int) -> None:
    """Around the mean of 16 samples, these differ a little more than around that of all."""
    rows = drawn(400, width)[0]
    whole, parts = (st.calibrate(nn.Linear(width, 4).double(), data).moments[""] for data in ([rows], rows.split(size)))
    assert parts.shrinkage == pytest.approx(whole.shrinkage, rel=0.4)


def test_pools_have_all_vectors_in_their_order() -> None:
    rows = drawn(1500, 4)
    pooled = list(concatenated(rows.split(200, dim=1)))
    assert [part.shape[1] for part in pooled] == [600, 600, 300]
    assert torch.equal(torch.cat(pooled, dim=1), rows)
    assert not list(concatenated([]))


@pytest.mark.parametrize("width", [6, 2100])
@pytest.mark.parametrize("sizes", [[3, 5], [600, 600, 20]])
def test_networks_that_run_in_inference_mode(width: int, sizes: list[int]) -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(width, 4)

        @torch.inference_mode()
        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.clone())

    rows = drawn(sum(sizes), width)[0].float()
    seen = st.calibrate(Frozen(), rows.split(sizes)).moments["layer"]
    centred = rows.double() - rows.double().mean(dim=0)
    torch.testing.assert_close(seen.covariance[0], centred.mT @ centred / len(rows), rtol=1e-3, atol=1e-4)
    seen.covariance.add_(1)


@pytest.mark.parametrize("scale", [1e18, 1e-22])
def test_small_batches_of_any_scale(scale: float) -> None:
    rows = drawn(640, 8)[0].float() * scale
    seen = st.calibrate(nn.Linear(8, 4), rows.split(16)).moments[""]
    centred = (rows.double() - rows.double().mean(dim=0)) / scale
    torch.testing.assert_close(seen.covariance[0] / scale**2, centred.mT @ centred / 640, rtol=1e-3, atol=1e-4)
