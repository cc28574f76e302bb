"""Weights of layers that are read outside of their layer's own call, before and after factoring."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

import spectrim as st


class AsksForTheType(nn.Module):
    """As T5 does: the layer's weight is asked for its type, not for its values."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.up(x))
        if isinstance(self.down.weight, Tensor) and self.down.weight.dtype != torch.int8:
            hidden = hidden.to(self.down.weight.device, self.down.weight.dtype)
        return self.down(hidden) / self.down.weight.shape[0]


class UsesTheWeight(nn.Module):
    """An autoencoder whose decoder is the encoder's weight, transposed."""

    def __init__(self, use: str) -> None:
        super().__init__()
        self.encoder, self.inner, self.use = nn.Linear(48, 32), nn.Linear(32, 32), use

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(torch.relu(self.encoder(x)))
        weight = self.encoder.weight
        uses = {
            "transposed": lambda: functional.linear(h, weight.t()),
            "data": lambda: h @ weight.data,
            "view": lambda: h @ weight.view(2, 16, 48).flatten(0, 1),
            "norm": lambda: h * weight.norm(),
            "written": lambda: h * weight.clamp_(-1, 1).numel(),
        }
        return uses[self.use]()


@pytest.mark.parametrize("with_data", [False, True])
def test_asking_for_a_type_costs_nothing(with_data: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 32)
    data = {"data": [x]} if with_data else {}
    result = st.compress(AsksForTheType().eval(), st.Budget(macs=0.5), example_inputs=x, **data)
    assert result.measurement.macs_ratio is not None
    assert result.measurement.macs_ratio <= 0.5
    assert {layer.is_factored for layer in result.plan} == {True}


@pytest.mark.parametrize("use", ["transposed", "data", "view", "norm", "written"])
def test_a_layer_whose_weight_is_used_elsewhere_stays_dense(use: str) -> None:
    torch.manual_seed(0)
    result = st.compress(UsesTheWeight(use).eval(), st.Rank(4), example_inputs=torch.randn(8, 48))
    plans = {layer.name: layer for layer in result.plan}
    assert plans["inner"].is_factored
    assert not plans["encoder"].is_factored
    assert "outside of its own call" in plans["encoder"].reason


def factored() -> nn.Module:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 8))
    return st.compress(network, st.Rank(3), example_inputs=torch.randn(2, 12)).model[0]


def test_the_weight_of_a_factored_layer_is_its_product() -> None:
    layer = factored()
    product = layer.up.weight @ layer.down.weight
    assert layer.weight.shape == product.shape
    assert layer.weight.dtype == product.dtype
    assert torch.equal(layer.weight.t().clone().t(), product)
    assert torch.equal(layer.weight.data, product)
    assert not layer.weight.detach().requires_grad
    layer.weight.square().sum().backward()
    assert layer.down.weight.grad is not None
    assert layer.up.weight.grad.abs().sum() > 0


def test_sizes_of_the_weight_are_answered_without_multiplying() -> None:
    layer = factored()
    with FlopCounterMode(display=False) as counter:
        weight = layer.weight
        answers = (weight.shape, weight.size(0), weight.dtype, weight.device, weight.ndim, weight.data.dtype)
        assert isinstance(weight, Tensor)
        assert weight.is_floating_point()
        assert len(weight) == 16
    assert counter.get_total_flops() == 0
    assert answers[1] == 16


WRITES = {
    "add": lambda layer: layer.weight.add_(1),
    "data": lambda layer: layer.weight.data.mul_(2),
    "+=": lambda layer: setattr(layer.weight, "data", layer.weight.data + 1),
    "entry": lambda layer: layer.weight.__setitem__(0, 1.0),
    "init": lambda layer: nn.init.zeros_(layer.weight),
    "copy": lambda layer: layer.weight.copy_(torch.ones(16, 12)),
    "out": lambda layer: torch.mul(layer.up.weight, 2, out=layer.weight),
    "gradient": lambda layer: layer.weight.requires_grad_(False),
    "parameter": lambda layer: setattr(layer, "weight", nn.Parameter(torch.ones(16, 12))),
    "bias": lambda layer: setattr(layer, "bias", None),
}


@pytest.mark.parametrize("write", WRITES)
def test_writing_to_it_is_refused(write: str) -> None:
    layer = factored()
    before = layer.up.weight.clone()
    with torch.no_grad(), pytest.raises(st.errors.ModelError, match=r"layer\.chain"):
        WRITES[write](layer)
    assert torch.equal(layer.up.weight, before)


def test_an_exported_network_that_asks_for_the_type_has_no_product() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 32)
    small = st.compress(AsksForTheType().eval(), st.Budget(macs=0.5), example_inputs=x).model
    program = torch.export.export(small, (x,))
    assert not [node for node in program.graph.nodes if "mul" in str(node.target) or "mm" in str(node.target)]
    torch.testing.assert_close(program.module()(x), small(x))


def test_a_compiled_network_that_asks_for_the_type() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 32)
    small = st.compress(AsksForTheType().eval(), st.Budget(macs=0.5), example_inputs=x).model
    compiled = torch.compile(small, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), small(x))


class SharesOneStorage(nn.Module):
    """All of its parameters are views of one vector, as after `vector_to_parameters`."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.inner, self.head = nn.Embedding(20, 24), nn.Linear(24, 24), nn.Linear(24, 20)
        nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(self.parameters()).detach(), self.parameters())

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.inner(self.words(x))))


def test_a_neighbour_in_the_same_storage_is_not_the_weight() -> None:
    result = st.compress(SharesOneStorage().eval(), st.Rank(4), example_inputs=torch.randint(0, 20, (3, 7)))
    assert [layer.name for layer in result.plan if layer.is_factored] == ["inner", "head"]


LOOKS = {
    "to": lambda x, weight: x.to(weight),
    "type_as": lambda x, weight: x.type_as(weight),
    "new": lambda x, weight: x + weight.new_zeros(1),
    "like": lambda x, weight: x + torch.zeros_like(weight)[0, 0],
    "detached": lambda x, weight: x.to(weight.detach().dtype),
}


class Looks(nn.Module):
    """Makes tensors that are like a weight, without using its values."""

    def __init__(self, look: str) -> None:
        super().__init__()
        self.up, self.down, self.look = nn.Linear(32, 64), nn.Linear(64, 32), look

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(LOOKS[self.look](x, self.up.weight))))


@pytest.mark.parametrize("look", LOOKS)
def test_tensors_like_the_weight_cost_no_product(look: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 32)
    result = st.compress(Looks(look).eval(), st.Rank(8), example_inputs=x)
    assert all(layer.is_factored for layer in result.plan)
    assert result.measurement.macs_ratio == pytest.approx(0.375)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*torch.jit.trace:FutureWarning")
def test_a_traced_network_that_asks_for_the_type() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 32)
    small = st.compress(AsksForTheType().eval(), st.Budget(macs=0.5), example_inputs=x).model
    torch.testing.assert_close(torch.jit.trace(small, x)(x), small(x))


def test_the_weight_asks_for_gradients_if_one_factor_does() -> None:
    layer = factored()
    layer.up.weight.requires_grad_(False)
    assert layer.weight.requires_grad
