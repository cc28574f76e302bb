"""A new layer type and a new form are one file and one entry in a registry: here both are made and used at once."""

from pathlib import Path
from typing import Any

import pytest
import torch
from cases import form_names, inputs
from torch import Tensor, nn

import spectrim as st
from spectrim.benchmark.latency_table import latency_table
from spectrim.layers import forms, types
from spectrim.layers.factored import FactoredLayer
from spectrim.layers.forms.channel import LowRankConv, TwoFactorForm
from spectrim.layers.padding import padded
from spectrim.layers.types import Geometry, LayerType
from spectrim.layers.types.transposed_convolution import TransposedConvolution
from spectrim.linalg import Factors, Ranks


class ConvTranspose1d(TransposedConvolution):
    """What a file of a new layer type holds."""

    name = "ConvTranspose1d"
    base = nn.ConvTranspose1d
    plain = nn.Conv1d
    dims = 1


class SkippedLinear(FactoredLayer):
    """y = up(middle(down(x))): three factors where two would do, as a new form's layer."""

    def __init__(self, down: nn.Linear, middle: nn.Linear, up: nn.Linear, *, dense: nn.Module | None = None) -> None:
        super().__init__((down, middle, up), dense)
        self.down, self.middle, self.up = down, middle, up

    @staticmethod
    def _assembled(*chain: nn.Module) -> nn.Module:
        down, _, up = chain
        return nn.Linear(down.in_features, up.out_features, bias=up.bias is not None, device="meta")

    @property
    def form(self) -> str:
        return "three"

    @property
    def rank(self) -> int:
        return self.ranks[0]

    @property
    def ranks(self) -> Ranks:
        return super().ranks[:1]

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        y: Tensor = self.up(self.middle(self.down(input)))
        return y

    @staticmethod
    def composed(factors: Factors) -> Tensor:
        down, middle, up = factors
        return up @ middle @ down


class ThreeFactors(TwoFactorForm):
    """What a file of a new form holds, besides its layer."""

    name = "three"

    def fits_shape(self, geometry: Geometry) -> bool:
        return not geometry.kernel

    def factor_shapes(self, geometry: Geometry, ranks: Any) -> tuple[tuple[Any, ...], ...]:
        (rank,) = ranks
        return (rank, geometry.into), (rank, rank), (geometry.out, rank)

    def factor_positions(self, positions: types.Positions) -> tuple[int, ...]:
        return (positions.output,) * 3

    def decompose(self, problem: Any, *, near: Factors = ()) -> Any:
        return WithMiddle.of(problem)

    def chain(self, layer: nn.Module, layer_type: LayerType, ranks: Ranks, *, bias: bool) -> FactoredLayer:
        parts = [
            layer_type.resized(layer, out=ranks[0], bias=False),
            layer_type.resized(layer, into=ranks[0], out=ranks[0], bias=False),
            layer_type.resized(layer, into=ranks[0], bias=bias),
        ]
        return SkippedLinear(*parts, dense=layer)  # type: ignore[arg-type]


class WithMiddle(TwoFactorForm.decomposition):  # type: ignore[misc]
    """The two factors of the closed solution, and an identity between them."""

    def factors(self, ranks: Ranks) -> Factors:
        down, up = super().factors(ranks)
        return down, torch.eye(ranks[0], dtype=down.dtype).expand(len(down), -1, -1), up


@pytest.fixture
def extended(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one line of each: an entry in the registry."""
    monkeypatch.setattr(types, "LAYER_TYPES", (*types.LAYER_TYPES, ConvTranspose1d()))
    monkeypatch.setattr(forms, "FORMS", (*forms.FORMS, ThreeFactors()))


@pytest.mark.usefixtures("extended")
def test_a_new_layer_type_goes_all_the_way(tmp_path: Path) -> None:
    torch.manual_seed(0)
    options = {"stride": 3, "padding": 1, "output_padding": 2, "dilation": 2, "groups": 2}
    model, x = nn.Sequential(nn.ConvTranspose1d(6, 8, 3, **options), nn.Identity()).double(), inputs(9, 6, 7)  # type: ignore[arg-type]
    assert form_names(model[0]) == ("channel",)
    for reconstruct in (False, True):
        full = st.compress(model, st.Ratio(1.0), example_inputs=x, data=[x], reconstruct=reconstruct, allow_growth=True)
        with torch.no_grad():
            torch.testing.assert_close(full.model(x), model(x), rtol=1e-9, atol=1e-9)
        assert full.plan.kept_cost.macs == full.measurement.macs
    small = st.compress(model, st.Rank(2), example_inputs=x, data=[x], allow_growth=True)
    assert isinstance(small.model[0], LowRankConv)
    assert small.model[0].stride == (3,)
    loaded = st.load(st.save(small.model, tmp_path), model)
    with torch.no_grad():
        assert torch.equal(loaded(x), small.model(x))
        torch.testing.assert_close(st.merge(small.model)(x), small.model(x))
        torch.testing.assert_close(padded(small.model, 4)(x), small.model(x))


class Resized(nn.Module):
    """Says how large the output of a transposed convolution is to be."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose1d(6, 8, 4, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x, output_size=[17])


@pytest.mark.usefixtures("extended")
@pytest.mark.parametrize("data", [None, [inputs(4, 6, 7)]], ids=["plain", "with data"])
def test_a_new_layer_type_takes_the_arguments_of_its_like(data: Any) -> None:
    model, x = Resized().double(), inputs(4, 6, 7)
    full = st.compress(model, st.Ratio(1.0), example_inputs=x, data=data, allow_growth=True)
    assert full.plan["up"].form == "channel"
    with torch.no_grad():
        torch.testing.assert_close(full.model(x), model(x), rtol=1e-9, atol=1e-9)


def test_the_order_of_the_registry_means_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.Sequential(nn.Conv2d(6, 8, 3), nn.Conv2d(8, 9, 1)).double(), inputs(4, 6, 7, 7)
    before = st.analyze(model, x)
    monkeypatch.setattr(forms, "FORMS", tuple(reversed(forms.FORMS)))
    after = st.analyze(model, x)
    for first, second in zip(before, after, strict=True):
        assert set(first.forms) == set(second.forms)
        assert first.forms[0] == second.forms[0]
        assert first.spectra["plain"].values.tolist() == second.spectra["plain"].values.tolist()


@pytest.mark.usefixtures("extended")
def test_a_new_form_goes_all_the_way(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(48, 40), nn.ReLU(), nn.Linear(40, 48)).double(), inputs(64, 48)
    assert {"linear", "three"} < set(form_names(model[0]))
    full = st.compress(model, st.Ratio(1.0), example_inputs=x, data=[x], forms=("three",), allow_growth=True)
    assert {layer.form for layer in full.plan} == {"three"}
    with torch.no_grad():
        torch.testing.assert_close(full.model(x), model(x), rtol=1e-9, atol=1e-9)
    small = st.compress(model, st.Budget(macs=0.5), example_inputs=x[:1], data=x.split(16), forms=("three",))
    assert {layer.form for layer in small.plan.factored} == {"three"}
    assert small.plan.kept_cost.macs == small.measurement.macs
    assert small.plan.kept_cost.params == small.measurement.params
    loaded = st.load(st.save(small.model, tmp_path / "model.safetensors"), model)
    with torch.no_grad():
        assert torch.equal(loaded(x), small.model(x))
        torch.testing.assert_close(st.merge(small.model)(x), small.model(x))
    small.plan.save(tmp_path / "plan.json")
    again = st.compress(model, st.Plan.load(tmp_path / "plan.json"), example_inputs=x[:1], data=x.split(16))
    assert [layer.ranks for layer in again.plan] == [layer.ranks for layer in small.plan]
    analysis = st.analyze(model, x[:1])
    table = latency_table(model, x[:1], analysis=analysis, rank_multiple=8, folder=tmp_path / "times")
    assert {times.form for times in table.layers[0].forms} == {"linear", "three"}
    assert st.training.frobenius_decay(small.model).ndim == 0
