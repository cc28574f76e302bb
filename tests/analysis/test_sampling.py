"""What few calibration samples know, and what is put in the place of the rest."""

import pytest
import torch
from torch import Tensor, nn

import spectrim as st
from spectrim.analysis.sampling import SampleCount, SamplingError, shrinkage
from spectrim.core.execution import as_inputs
from spectrim.linalg import LowRankCovariance, matrix_of, shrunk, square_of

WIDTH = 24


def drawn(number: int, *, seed: int) -> Tensor:
    """Vectors with falling variances."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(number, WIDTH, generator=generator).double() * 0.7 ** torch.arange(WIDTH).double()


def estimated(rows: Tensor, *, samples: int) -> float:
    error = SamplingError()
    error.add(rows.unsqueeze(0), samples=samples)
    moment = (rows.mT @ rows / len(rows)).unsqueeze(0)
    return shrinkage(moment, samples=samples, variation=error.variation(square_of(moment)))


def test_the_share_is_the_one_with_the_least_mean_squared_error() -> None:
    # of inputs with like variances, since the diagonal is exchanged for less
    turn = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(0)).double())[0]
    truth = turn.T @ torch.diag(0.7 ** (2 * torch.arange(WIDTH).double())) @ turn
    shares, errors = torch.linspace(0, 1, 51), torch.zeros(51, dtype=torch.float64)
    estimates = []
    for seed in range(60):
        rows = drawn(20, seed=seed) @ turn
        moment = (rows.mT @ rows / len(rows)).unsqueeze(0)
        errors += torch.stack([(matrix_of(shrunk(moment, float(share)))[0] - truth).square().sum() for share in shares])
        estimates.append(estimated(rows, samples=20))
    assert sum(estimates) / len(estimates) == pytest.approx(float(shares[errors.argmin()]), abs=0.06)


def test_a_sample_counts_once_however_many_vectors_it_has() -> None:
    rows = drawn(16, seed=0)
    repeated = rows.repeat_interleave(32, dim=0)
    assert estimated(repeated, samples=16) == pytest.approx(estimated(rows, samples=16), rel=1e-6)
    assert estimated(repeated, samples=512) < estimated(rows, samples=16) / 10


@pytest.mark.parametrize("rows", [drawn(1, seed=0), drawn(1, seed=0).expand(9, -1)], ids=["one", "the same"])
def test_samples_that_do_not_differ_know_nothing(rows: Tensor) -> None:
    assert estimated(rows, samples=len(rows)) == 1


def test_many_samples_know_nearly_all() -> None:
    assert estimated(drawn(5000, seed=0), samples=5000) < 0.01


def test_an_input_of_large_variance_does_not_hide_the_others() -> None:
    variances = torch.ones(WIDTH).double()
    variances[0] = 1e6
    C = torch.diag(variances).unsqueeze(0)
    assert float(matrix_of(shrunk(C, 0.01))[0, 1:, 1:].diagonal().max()) < 1.2
    assert torch.equal(matrix_of(shrunk(0 * C, 0.5))[0], 0.25 * torch.eye(WIDTH).double())


def test_vectors_shrink_as_their_matrix_does() -> None:
    C = LowRankCovariance(drawn(5, seed=0).unsqueeze(0), torch.full((1, 1), 0.01).double())
    torch.testing.assert_close(matrix_of(shrunk(C, 0.3)), matrix_of(shrunk(C.matrix, 0.3)))
    assert square_of(C) == pytest.approx(square_of(C.matrix))


class Narrow(nn.Module):
    """A network whose inputs and layers have falling spectra."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.Sequential(nn.Linear(WIDTH, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 6))
        for layer in self.layers[::2]:
            u, s, v = torch.linalg.svd(layer.weight.data, full_matrices=False)
            layer.weight.data = 3 * u @ torch.diag(s.max() * 0.85 ** torch.arange(len(s))) @ v

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@pytest.mark.parametrize("number", [1, 2, 4, 8, 32])
@pytest.mark.filterwarnings("ignore:on the calibration data")
def test_few_samples_are_hardly_worse_than_none(number: int) -> None:
    model, fresh = Narrow().eval(), drawn(500, seed=99).float()

    def error(small: nn.Module) -> float:
        with torch.no_grad():
            dense, other = model(fresh), small(fresh)
        return float((dense - other).norm() / (dense - dense.mean(dim=0)).norm())

    budget, example = st.Budget(macs=0.5), fresh[:1]
    without = error(st.compress(model, budget, example_inputs=example).model)
    errors = [
        error(st.compress(model, budget, example_inputs=example, data=[drawn(number, seed=seed).float()]).model)
        for seed in range(3)
    ]
    assert sum(errors) / len(errors) <= 1.1 * without


COPIES = {
    "rows": (torch.ones(4, 6),),
    "a mask and texts": (torch.eye(9), torch.ones(4, 9)),
    "missing values": (torch.full((4, 6), torch.nan),),
}


@pytest.mark.parametrize("name", COPIES)
def test_copies_of_one_sample_do_not_differ(name: str) -> None:
    samples = SampleCount()
    for _ in range(3):
        samples.add(as_inputs(COPIES[name]))
    assert str(samples) == "12 times the same sample"
    samples.add(as_inputs((*COPIES[name][:-1], torch.zeros_like(COPIES[name][-1]))))
    assert str(samples) == "16 samples"


@pytest.mark.parametrize("scale", [1e-36, 1e-20, 1e20, 1e25, 1e36])
def test_the_unit_of_the_outputs_does_not_matter(scale: float) -> None:
    model, data = Narrow().eval(), [drawn(64, seed=seed).float() for seed in range(4)]
    budget = st.Budget(macs=0.5)
    expected = st.compress(model, budget, example_inputs=data[0], data=data)
    assert expected.plan.metric == "loss"
    for parameter in model.layers[-1].parameters():
        parameter.data *= scale
    scaled = st.compress(model, budget, example_inputs=data[0], data=data)
    assert [(layer.ranks, layer.metric) for layer in scaled.plan] == [
        (layer.ranks, layer.metric) for layer in expected.plan
    ]
    assert scaled.fidelity
    assert expected.fidelity
    assert scaled.fidelity.relative_error == pytest.approx(expected.fidelity.relative_error, rel=0.02)
