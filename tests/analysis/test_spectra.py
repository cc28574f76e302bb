"""Spectra of real layers, convolutions included, and what an analysis tells of each."""

import numpy as np
import pytest
import torch
from cases import inputs, same_state, small_mlp, state
from torch import nn
from torch.nn.utils import parametrizations

import spectrim as st
from spectrim import errors
from spectrim.layers.types import Positions


def convolutional() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 12, (1, 3), groups=4, bias=False),
        nn.Flatten(),
        nn.Linear(12 * 4 * 2, 5),
    ).double()


X = inputs(2, 3, 8, 8)


def test_the_spectrum_of_a_convolution_is_that_of_its_matrix() -> None:
    model = convolutional()
    layer = st.analyze(model, X)["0"]
    expected = torch.linalg.svdvals(model[0].weight.detach().reshape(8, 27))
    np.testing.assert_allclose(layer.spectra["plain"].values, expected.numpy(), atol=1e-12)
    assert (layer.shape, layer.full_rank) == ((8, 3, 3, 3), 8)
    assert layer.positions == Positions(output=2 * 4 * 4, kernel=2 * 4 * 4, mixed=2 * 4 * 8, input=2 * 8 * 8)
    assert layer.dense == st.Cost(params=8 * 27 + 8, macs=8 * 27 * 32)
    assert layer.form == "channel"
    assert layer.forms == ("channel", "spatial", "tucker2")
    assert layer.skip_reason is None


def test_the_ranks_of_a_grouped_convolution_are_those_of_each_group() -> None:
    model = convolutional()
    layer = st.analyze(model, X)["2"]
    groups = torch.linalg.svdvals(model[2].weight.detach().reshape(4, 3, 6))
    np.testing.assert_allclose(layer.spectra["plain"].values, groups.square().sum(dim=0).sqrt().numpy(), atol=1e-12)
    assert (layer.full_rank, layer.dense.params) == (3, 12 * 6)
    assert [layer.cost("channel", (rank,), "plain").params for rank in (1, 2)] == [4 * (3 + 6), 8 * (3 + 6)]


def test_the_analysed_macs_are_those_that_torch_counts() -> None:
    model = convolutional()
    assert sum(layer.dense.macs for layer in st.analyze(model, X)) == st.measure(model, X, latency=False).macs


def test_layers_come_in_order_of_execution_and_the_model_is_left_alone() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(self.c(x)))

    model = Backwards()
    before = state(model)
    analysis = st.analyze(model, torch.zeros(1, 4), keep_last=True)
    assert [layer.name for layer in analysis] == ["c", "a", "b"]
    assert analysis["b"].skip_reason == "the last layer, kept dense as asked"
    assert same_state(model, before)
    with pytest.raises(KeyError, match="it has c, a, b"):
        analysis["d"]


def test_both_metrics_are_there_once_there_is_data() -> None:
    model, x = small_mlp(), inputs(50, 12)
    assert st.analyze(model, x).metrics == ("plain",)
    analysis = st.analyze(model, x, calibration=st.calibrate(model, [x]))
    assert analysis.metrics == ("plain", "activation")
    assert set(analysis["2"].spectra) == {"plain", "activation"}


def test_layers_of_other_kinds_are_listed_with_a_reason() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows = nn.Parameter(torch.randn(9, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.rows[x]

    model = nn.Sequential(Table(), nn.Linear(4, 4))
    layer = st.analyze(model, torch.arange(3))["0"]
    assert layer.skip_reason == "Table layers are not factored"
    assert not layer.spectra


def test_weights_that_cannot_be_exchanged_have_a_spectrum_all_the_same() -> None:
    class Own(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x)

    torch.manual_seed(0)
    model = nn.Sequential(Own(6, 4), parametrizations.weight_norm(nn.Linear(4, 5)), nn.Conv2d(1, 1, 1)).double()
    model.forward = lambda x: model[1](model[0](x))  # type: ignore[method-assign]
    analysis = st.analyze(model, inputs(2, 6))
    for name, reason in (("0", "subclass"), ("1", "parametrised"), ("2", "not called")):
        expected = torch.linalg.svdvals(model.get_submodule(name).weight.detach().flatten(1))
        np.testing.assert_allclose(analysis[name].spectra["plain"].values, expected.numpy(), atol=1e-12)
        assert reason in str(analysis[name].skip_reason)
    attention = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
    projection = st.analyze(attention, torch.zeros(1, 3, 8))["0.self_attn.out_proj"]
    assert len(projection.spectra["plain"]) == 8


def test_a_low_precision_weight_is_analysed_in_double() -> None:
    model = small_mlp()
    low = small_mlp().bfloat16()
    exact = st.analyze(model, inputs(2, 12))["2"].spectra["plain"].values
    rough = st.analyze(low, inputs(2, 12, dtype=torch.bfloat16))["2"].spectra["plain"].values
    np.testing.assert_allclose(rough, exact, atol=2e-2)


@pytest.mark.parametrize(("pattern", "near"), [("fc*", "there are: 0, 2, 4"), ("44", "near names: 4")])
def test_a_pattern_that_matches_nothing_lists_near_names(pattern: str, near: str) -> None:
    with pytest.raises(errors.PatternError, match=near):
        st.analyze(small_mlp(), inputs(2, 12), include=pattern)


def test_stacked_weights_of_experts_are_named() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up_proj = nn.Parameter(torch.randn(4, 8, 16))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.einsum("bi,eio->bo", x, self.up_proj)

    layer = st.analyze(nn.Sequential(nn.Linear(8, 8), Experts()).double(), inputs(5, 8))["1"]
    assert layer.skip_reason is not None
    assert "up_proj [4, 8, 16] hold one matrix for each expert" in layer.skip_reason
