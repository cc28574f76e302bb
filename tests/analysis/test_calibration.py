"""Streamed statistics against those of all inputs at once."""

import weakref
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from cases import Double, inputs, same_state, small_mlp, state
from torch import Tensor, nn

import spectrim as st
from spectrim import errors
from spectrim.core import memory


def seen_by(model: nn.Module, name: str, data: list[Tensor]) -> Tensor:
    rows: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda _, args: rows.append(args[0].detach().flatten(0, -2))
    )
    with torch.no_grad():
        for batch in data:
            model(batch)
    handle.remove()
    return torch.cat(rows)


@pytest.mark.parametrize("sizes", [[60], [1, 1, 58], [20, 20, 20], [0, 60]], ids=str)
@pytest.mark.parametrize(("build", "name", "width"), [(small_mlp, "2", 12), (Double, "again", 6)], ids=["mlp", "twice"])
def test_streamed_moments_are_those_of_all_inputs(build: Any, name: str, width: int, sizes: list[int]) -> None:
    torch.manual_seed(0)
    model = build().double()
    data = list((inputs(60, width) + 100).split(sizes))
    rows = seen_by(model, name, data)
    moments = st.calibrate(model, data).moments[name]
    assert moments.count == len(rows)
    torch.testing.assert_close(moments.mean[0], rows.mean(dim=0))
    torch.testing.assert_close(moments.covariance[0], torch.cov(rows.T, correction=0), rtol=1e-10, atol=1e-10)


def test_a_large_mean_does_not_swamp_a_small_variance() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Identity())
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 4, generator=generator) * 0.01 + 1000
    moments = st.calibrate(model, x.split(100)).moments["0"]
    torch.testing.assert_close(moments.covariance[0], torch.cov(x.double().T, correction=0), rtol=2e-2, atol=2e-6)


def test_leading_dimensions_are_positions() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Identity()).double()
    x = inputs(3, 5, 4)
    deep, flat = st.calibrate(model, [x]).moments["0"], st.calibrate(model, [x.flatten(0, 1)]).moments["0"]
    assert deep.count == 15
    torch.testing.assert_close(deep.covariance, flat.covariance)


def test_calibrating_leaves_no_trace() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2)).double()
    before, random = state(model), torch.get_rng_state()
    st.calibrate(model, [inputs(9, 4)])
    assert same_state(model, before)
    assert model.training
    assert model[2].training
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_flags_come_back_when_a_batch_fails() -> None:
    model = small_mlp().train()
    with pytest.raises(errors.DataError, match="batch 1"):
        st.calibrate(model, [inputs(3, 12), inputs(3, 7)])
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("data", [[], [inputs(3, 12)] * 0, iter(())], ids=["list", "empty list", "iterator"])
def test_empty_data_is_an_error(data: Any) -> None:
    with pytest.raises(errors.DataError, match="empty"):
        st.calibrate(small_mlp(), data)


def test_labels_need_pairs() -> None:
    with pytest.raises(errors.DataError, match="pairs"):
        st.calibrate(small_mlp(), [inputs(3, 12)], labels=True)


class InTransform(nn.Module):
    """A network that calls one of its layers inside of a transform of `torch.func`, which hides the values."""

    def __init__(self, transform: str) -> None:
        super().__init__()
        self.before, self.hidden, self.last = nn.Linear(24, 24), nn.Linear(24, 24), nn.Linear(24, 10)
        self.transform = transform

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        if self.transform == "vmap":
            return self.last(torch.func.vmap(self.hidden)(x))
        return self.last(torch.func.jvp(self.hidden, (x,), (torch.ones_like(x),))[1])


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
@pytest.mark.parametrize("transform", ["vmap", "jvp"])
def test_layers_that_are_called_inside_of_a_transform_have_no_statistics(transform: str) -> None:
    data = torch.randn(64, 24).split(8)
    model = InTransform(transform).eval()
    assert set(st.calibrate(model, data).moments) == {"before", "last"}
    compressed = st.compress(model, st.Energy(0.5), example_inputs=data[0], data=data)
    assert "torch.func" in compressed.plan["hidden"].reason
    assert compressed.plan["last"].is_factored


def test_statistics_that_do_not_fit_into_memory_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = nn.Linear(1300, 4), [torch.randn(8, 1300)]
    needed = 1300**2 * 12
    monkeypatch.setattr(memory, "free_bytes", lambda _: needed)
    assert set(st.calibrate(model, data).moments) == {""}
    monkeypatch.setattr(memory, "free_bytes", lambda _: needed - 1)
    with pytest.raises(errors.ResourceError, match=r"statistics of 1,300 inputs take 0\.02 GB"):
        st.calibrate(model, data)


@pytest.mark.parametrize("positions", [0, -1])
def test_too_few_positions_are_refused(positions: int) -> None:
    with pytest.raises(errors.DataError, match=f"positions={positions}: give at least 1 place, None for all"):
        st.calibrate(nn.Linear(2, 2), [torch.zeros(1, 2)], positions=positions)


class Fails(nn.Module):
    """A layer after which nothing can be computed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.first.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        raise ValueError(f"no more than {self.first(x).shape}")


@pytest.mark.parametrize("build", [Fails, Double])
def test_gradients_leave_weights_as_trained_or_frozen_as_they_were(build: Any) -> None:
    model = build().double().eval()
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with pytest.raises(errors.DataError, match="no more than") if build is Fails else nullcontext():
        st.calibrate(model, [inputs(8, 6)], gradients=True)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    assert all(parameter.grad is None for parameter in model.parameters())


def test_gradients_are_those_of_all_weights_frozen_or_not() -> None:
    torch.manual_seed(0)
    model, data = small_mlp().eval(), [inputs(60, 12)]
    trained = st.calibrate(model, data, gradients=True).moments
    frozen = st.calibrate(model.requires_grad_(False), data, gradients=True).moments
    assert len(trained) > 1
    for name, moments in trained.items():
        assert moments.output_grad_covariance is not None
        assert torch.equal(moments.output_grad_covariance, frozen[name].output_grad_covariance)


@pytest.mark.parametrize("mark", ["output", "scale"])
def test_gradients_of_what_is_made_to_require_them_elsewhere(mark: str) -> None:
    """As transformers does with the outputs of embeddings, for checkpointed training of adapters."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 4)
            self.scale = torch.ones(6)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.second(self.first(x * self.scale))
            return y

    torch.manual_seed(0)
    model, data = Scaled().double().eval(), [inputs(60, 6)]
    expected = st.calibrate(model, data, gradients=True).moments
    if mark == "output":
        model.requires_grad_(False)
        model.first.register_forward_hook(lambda _, __, output: output.requires_grad_())
    else:
        model.scale.requires_grad_()
    for name, moments in st.calibrate(model, data, gradients=True).moments.items():
        assert moments.output_grad_covariance is not None
        torch.testing.assert_close(moments.output_grad_covariance, expected[name].output_grad_covariance)


def test_gradients_need_less_than_two_copies_of_all_outputs() -> None:
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(8))
            self.outputs: list[weakref.ref[Tensor]] = []
            self.alive = 0

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                y = layer(x)
                self.outputs.append(weakref.ref(y))
                x = y * 2  # needs none of its inputs for the gradient
            self.alive = sum(output() is not None for output in self.outputs)
            return x

    model = Chain().double().eval()
    moments = st.calibrate(model, [inputs(8, 6)], gradients=True).moments
    assert all(seen.output_grad_covariance is not None for seen in moments.values())
    assert model.alive <= 2  # where differentiating begins, and the last one


def of_gradients(model: nn.Module, data: list[Tensor]) -> dict[str, Tensor | None]:
    moments = st.calibrate(model.double().eval(), data, gradients=True).moments
    return {name: seen.output_grad_covariance for name, seen in moments.items()}


class Changed(nn.Module):
    """What its layers give is changed in place, if so asked; of sequences a linear layer gives a view."""

    def __init__(self, *, inplace: bool) -> None:
        super().__init__()
        self.layers, self.inplace = nn.ModuleList(nn.Linear(6, 6) for _ in range(3)), inplace

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = nn.functional.silu(layer(x), inplace=self.inplace)
        return x


def test_gradients_of_outputs_that_are_changed_in_place() -> None:
    torch.manual_seed(0)
    model, data = Changed(inplace=False), [inputs(24, 6).reshape(8, 3, 6)]
    expected = of_gradients(model, data)
    model.inplace = True
    for name, moment in of_gradients(model, data).items():
        assert torch.equal(moment, expected[name])  # type: ignore[arg-type]


class Differentiates(nn.Module):
    """Takes a gradient in its forward pass, with respect to the input or to a weight, which is not one that counts."""

    def __init__(self, wrt: str) -> None:
        super().__init__()
        self.first, self.second, self.wrt = nn.Linear(6, 6), nn.Linear(6, 4), wrt

    def forward(self, x: Tensor) -> Tensor:
        if self.wrt:
            x = x.requires_grad_() if self.wrt == "input" else x
            y = self.second(torch.tanh(self.first(x))).square().sum()
            inner = x if self.wrt == "input" else self.second.weight
            (gradient,) = torch.autograd.grad(y, inner, retain_graph=True) if torch.is_grad_enabled() else (inner,)
            assert gradient.shape == inner.shape
        return self.second(torch.tanh(self.first(x)))


@pytest.mark.parametrize("wrt", ["input", "weight"])
def test_gradients_that_a_network_takes_itself_do_not_count(wrt: str) -> None:
    torch.manual_seed(0)
    model, data = Differentiates(""), list(inputs(24, 6).split(8))
    expected = of_gradients(model, data)
    counts = {name: seen.count for name, seen in st.calibrate(model, data, gradients=True).moments.items()}
    model.wrt = wrt
    for name, moment in of_gradients(model, data).items():
        torch.testing.assert_close(moment, expected[name])
    # every layer is called twice now, and no batch counts twice
    assert {name: seen.count for name, seen in st.calibrate(model, data, gradients=True).moments.items()} == {
        name: 2 * count for name, count in counts.items()
    }


def test_gradients_of_batches_that_were_computed_from_others() -> None:
    torch.manual_seed(0)
    model, encoder = Changed(inplace=False), nn.Linear(6, 6).double()
    data = list(encoder(inputs(24, 6)).chunk(3))
    for name, moment in of_gradients(model, data).items():
        assert torch.equal(moment, of_gradients(model, [x.detach() for x in data])[name])  # type: ignore[arg-type]
    torch.stack(data).sum().backward()  # whose graph is still there


class Scaling(torch.autograd.Function):
    """Has an attribute with the name that a leaf of the graph has."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.variable = "no tensor"
        return 2 * x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return 2 * gradients[0]


def test_gradients_through_functions_of_ones_own() -> None:
    class Scaled(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = super().forward(Scaling.apply(self[0](x)))
            return y

    moments = of_gradients(Scaled(nn.Linear(6, 6)), [inputs(24, 6)])
    assert moments["0"] is not None
