"""Layers before an elementwise function, fitted together: never worse on data that they did not see."""

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import spectrim as st
from spectrim.core.execution import as_inputs
from spectrim.fitting import neurons as fitting
from spectrim.fitting.held_out import HeldOut, taken_apart
from spectrim.fitting.neurons import NeuronFit, Neurons
from spectrim.fitting.regression import InputRows
from spectrim.layers.elementwise import functions_between

INTO, WIDTH, OUT = 6, 24, 5


class Mlp(nn.Module):
    """Up, perhaps gate, down."""

    def __init__(self, function: Callable[..., Tensor], *, gated: bool = False, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(INTO, WIDTH, bias=bias), nn.Linear(WIDTH, OUT, bias=bias)
        self.gate = nn.Linear(INTO, WIDTH, bias=bias) if gated else None
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        each = [layer(x) for layer in (self.gate, self.up) if layer is not None]
        return self.down(self.function(*each))


FUNCTIONS: dict[str, Callable[[], Mlp]] = {
    "gelu": lambda: Mlp(functional.gelu),
    "tanh of its own making": lambda: Mlp(lambda z: 0.5 * z * (1 + torch.tanh(0.8 * (z + 0.04 * z**3)))),
    "in place": lambda: Mlp(lambda z: functional.relu_(z).mul_(2)),
    "dropout": lambda: Mlp(lambda z: functional.dropout(functional.silu(z), 0.5, training=False)),
    "gated": lambda: Mlp(lambda gate, up: functional.silu(gate) * up, gated=True),
    "gated, no bias": lambda: Mlp(lambda gate, up: functional.gelu(gate) * up, gated=True, bias=False),
}


def rows(number: int, *, seed: int = 1) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(INTO, INTO, generator=torch.Generator().manual_seed(7))
    return torch.randn(number, INTO, generator=draw) @ mix + 0.5


def feeders(model: Mlp) -> list[str]:
    return ["gate", "up"] if model.gate is not None else ["up"]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_lies_between_is_repeated_on_other_values(name: str) -> None:
    model, x = FUNCTIONS[name]().eval(), rows(9, seed=2)
    between = functions_between(model, as_inputs(rows(4)), {"down": feeders(model)})["down"]
    with torch.no_grad():
        hidden = between([model.get_submodule(feeder)(x) for feeder in feeders(model)])
        torch.testing.assert_close(model.down(hidden), model(x))


def test_what_depends_on_the_sizes_of_other_values_does_not_agree() -> None:
    model = Mlp(lambda z: (functional.gelu(z).reshape(4, 2, -1)).reshape(4, -1)).eval()
    between = functions_between(model, as_inputs(rows(4)), {"down": ["up"]})["down"]
    received = {"up": InputRows("up", [rows(9)[None]], [9])}
    hidden = InputRows("down", [functional.gelu(model.up(rows(9))).detach()[None]], [9])
    assert not Neurons(between, received, []).agree(model, hidden)


def test_what_depends_on_other_values_does_not_agree() -> None:
    model = Mlp(functional.gelu).eval()
    between = functions_between(model, as_inputs(rows(4)), {"down": ["up"]})["down"]
    received = {"up": InputRows("up", [rows(9)[None]], [9])}
    right = functional.gelu(model.up(rows(9))).detach()[None]
    assert Neurons(between, received, []).agree(model, InputRows("down", [right], [9]))
    assert not Neurons(between, received, []).agree(model, InputRows("down", [right.flip(1)], [9]))


def test_a_mask_of_the_batch_that_it_was_recorded_with_does_not_agree() -> None:
    x = rows(64)
    model = Mlp(lambda z: functional.gelu(z) * torch.ones(len(z), 1)).eval()
    between = functions_between(model, as_inputs(x), {"down": ["up"]})["down"]
    hidden = between([model.up(x).detach()])[None]
    received = {"up": InputRows("up", [x[None]], [9])}
    assert not Neurons(between, received, []).agree(model, InputRows("down", [hidden], [9]))


def narrow(model: Mlp, *, neurons: int) -> dict[str, nn.Module]:
    """The first neurons."""
    layers: dict[str, nn.Module] = {}
    with torch.no_grad():
        for name in feeders(model):
            layer = model.get_submodule(name)
            layers[name] = new = nn.Linear(INTO, neurons, bias=layer.bias is not None)
            new.weight.copy_(layer.weight[:neurons])
            if layer.bias is not None:
                new.bias.copy_(layer.bias[:neurons])
        layers["down"] = last = nn.Linear(neurons, OUT)
        last.weight.copy_(model.down.weight[:, :neurons])
        last.bias.copy_(model.down.bias if model.down.bias is not None else torch.zeros(OUT))
    return layers


def lost(model: Mlp, layers: dict[str, nn.Module], x: Tensor, *, metric: Tensor | None = None) -> float:
    with torch.no_grad():
        hidden = model.function(*(layers[name](x) for name in feeders(model)))
        error = model(x) - layers["down"](hidden)
        return float((error * (error if metric is None else error @ metric)).sum() / len(x))


def fit(model: Mlp, layers: dict[str, nn.Module], data: list[Tensor], *, G: Tensor | None = None) -> None:
    model.eval()
    between = functions_between(model, as_inputs(data[0][:4]), {"down": feeders(model)})["down"]
    received = {name: InputRows(name, [x[None] for x in data], [len(x) for x in data]) for name in feeders(model)}
    with torch.no_grad():
        targets = [model(x)[None] for x in data]
        Neurons(between, received, [0]).fit(layers, [len(x) for x in data], targets=targets, G=G)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_fit_comes_nearer_also_on_other_data(name: str) -> None:
    model, data = FUNCTIONS[name](), list(rows(2000).split(250))
    layers = narrow(model, neurons=10)
    before = lost(model, layers, rows(500, seed=3))
    fit(model, layers, data)
    assert lost(model, layers, rows(500, seed=3)) < 0.5 * before
    assert all((layers[own].bias is None) == (model.get_submodule(own).bias is None) for own in feeders(model))


def test_the_steps_do_more_than_the_layer_after_them_alone() -> None:
    model, data, x = FUNCTIONS["gelu"](), list(rows(2000).split(250)), rows(500, seed=3)
    after: dict[int, float] = {}
    for steps in (0, 1, 4):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fitting, "_STEPS", steps)
            layers = narrow(model, neurons=10)
            fit(model, layers, data)
            after[steps] = lost(model, layers, x)
    assert after[4] < after[1] < after[0]


ODD: dict[str, Callable[..., Tensor]] = {
    "no derivative": lambda gate, up: torch.sign(gate) * up,
    "no derivative at all": lambda gate, up: torch.round(gate + up),
    "not a number below zero": lambda gate, up: torch.sqrt(gate * (gate > 0)) * up,
    "too large for float32": lambda gate, up: torch.exp(60 * gate) + 0 * up,
}


@pytest.mark.parametrize("name", ODD)
def test_functions_with_odd_derivatives_leave_numbers_behind(name: str) -> None:
    model = Mlp(ODD[name], gated=True).eval()
    x = rows(300) / rows(300).norm(dim=1, keepdim=True)
    layers = narrow(model, neurons=8)
    with contextlib.suppress(st.errors.DataError, st.errors.ModelError):
        fit(model, layers, list(x.split(100)))
    assert all(parameter.isfinite().all() for layer in layers.values() for parameter in layer.parameters())


def test_the_metric_says_which_outputs_count() -> None:
    model, data, x = FUNCTIONS["gelu"](), list(rows(2000).split(250)), rows(500, seed=3)
    metric = torch.diag(torch.tensor([1.0, 1e-4, 1e-4, 1e-4, 1e-4])).double()
    plain, weighted = narrow(model, neurons=6), narrow(model, neurons=6)
    fit(model, plain, data)
    fit(model, weighted, data, G=metric[None])
    assert lost(model, weighted, x, metric=metric.float()) < lost(model, plain, x, metric=metric.float())


def test_one_step_is_exact_where_nothing_bends() -> None:
    """Of a linear function with one neuron a step without ridge is least squares in the neuron's weight."""
    model = Mlp(lambda z: 1.0 * z)
    layers = narrow(model, neurons=1)
    data = [rows(400)]
    with torch.no_grad():
        targets = [model(data[0])[None]]
        between = functions_between(model, as_inputs(data[0][:4]), {"down": ["up"]})["down"]
    received = {"up": InputRows("up", [data[0][None]], [400])}
    step = NeuronFit.of(layers, Neurons(between, received, []), targets=targets, metric=None)
    fit_of_inputs = step.feeders[0].fit
    covariance = fit_of_inputs.metric - fit_of_inputs.ridge.unsqueeze(-1) * torch.eye(fit_of_inputs.metric.shape[-1])
    object.__setattr__(fit_of_inputs, "metric", covariance)
    object.__setattr__(fit_of_inputs, "ridge", torch.zeros_like(fit_of_inputs.ridge))
    object.__setattr__(step.feeders[0], "solve", lambda M: M @ torch.linalg.inv(covariance[0]))
    (change,) = step._step([])
    step.feeders[0].weight = step.feeders[0].weight + change
    v = layers["down"].weight.detach().double()[:, 0]
    y = (targets[0][0] - layers["down"].bias.detach()).double() @ v / v.dot(v)
    best = torch.linalg.lstsq(functional.pad(data[0].double(), (0, 1), value=1.0), y).solution
    torch.testing.assert_close(step.feeders[0].kernels[0, 0], best[:-1], rtol=2e-3, atol=1e-4)
    torch.testing.assert_close(step.feeders[0].bias, best[-1:], rtol=2e-3, atol=1e-3)


class Blocks(nn.Module):
    """Two residual MLPs and a classifier."""

    def __init__(self, *, gated: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(INTO, 16)
        self.first, self.second = (Inner(gated=gated) for _ in range(2))
        self.head = nn.Linear(16, 7)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        h = h + self.first(h)
        return self.head(h + self.second(h))


class Inner(nn.Module):
    def __init__(self, *, gated: bool) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 64), nn.Linear(64, 16)
        self.gate = nn.Linear(16, 64) if gated else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        if self.gate is None:
            return self.down(functional.gelu(self.up(h)))
        return self.down(functional.silu(self.gate(h)) * self.up(h))


def compressed(data: list[Tensor], *, gated: bool = False, **options: Any) -> tuple[nn.Module, st.Compressed]:
    model = Blocks(gated=gated).to(data[0].dtype).eval()
    options = {"rule": st.Budget(macs=0.5), **options}
    return model, st.compress(model, options.pop("rule"), example_inputs=data[0][:1], data=data, **options)


def distance(model: nn.Module, small: st.Compressed, x: Tensor) -> float:
    with torch.no_grad():
        return float((small.model(x) - model(x)).float().square().mean())


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("batches", [1, 3, 20])
def test_networks_come_nearer_to_the_dense_one(gated: bool, batches: int) -> None:
    data, x = list(rows(1600).split(1600 // batches)), rows(500, seed=3)
    model, small = compressed(data, gated=gated)
    assert any(layer.form == "width" for layer in small.plan)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Neurons, "agree", lambda *_: False)
        _, without = compressed(data, gated=gated)
    assert without.plan == small.plan
    assert distance(model, small, x) < 0.97 * distance(model, without, x)


@pytest.mark.parametrize("is_named", [True, False])
def test_of_models_that_write_text_no_neurons_are_fitted(is_named: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []
    monkeypatch.setattr(Neurons, "agree", lambda *_: bool(tried.append("")))
    data, model = list(rows(600).reshape(60, 10, INTO).split(6)), Writer(is_named=is_named).eval()
    small = st.compress(model, st.Budget(macs=0.5), example_inputs=data[0][:1], data=data)
    assert any(layer.form == "width" for layer in small.plan)
    assert bool(tried) != is_named


class Writer(nn.Module):
    """Logits of 7 classes for every place, by their name or not."""

    def __init__(self, *, is_named: bool) -> None:
        super().__init__()
        self.inner, self.is_named = Blocks(gated=False), is_named

    def forward(self, x: Tensor) -> Any:
        logits = self.inner(x)
        return {"logits": logits, "other": logits.mean()} if self.is_named else logits


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_any_number_type_does(dtype: torch.dtype) -> None:
    data, x = [part.to(dtype) for part in rows(1600).split(100)], rows(500, seed=3).to(dtype)
    model, small = compressed(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Neurons, "agree", lambda *_: False)
        _, without = compressed(data)
    assert all(parameter.dtype == dtype for parameter in small.model.parameters())
    assert distance(model, small, x) < (1.0 if dtype == torch.float64 else 1.1) * distance(model, without, x)


def test_functions_that_take_one_number_type_only_do() -> None:
    model, x = Mlp(nn.PReLU().bfloat16()).bfloat16().eval(), rows(400).bfloat16()
    small = st.compress(model, st.Budget(macs=0.7), example_inputs=x[:1], data=list(x.split(50)))
    assert any(layer.form == "width" for layer in small.plan)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_fit_that_makes_the_outputs_worse_is_not_taken(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    data, x = list(rows(1600).split(100)), rows(500, seed=3)

    def spoil(_: Neurons, layers: dict[str, nn.Module], *__: Any, **___: Any) -> None:
        with torch.no_grad():
            last = list(layers.values())[-1]
            last.weight = nn.Parameter(torch.full_like(last.weight, value))

    monkeypatch.setattr(Neurons, "agree", lambda *_: False)
    model, without = compressed(data)
    monkeypatch.undo()
    monkeypatch.setattr(Neurons, "fit", spoil)
    _, small = compressed(data)
    assert distance(model, small, x) == distance(model, without, x)


@pytest.mark.filterwarnings("ignore")
def test_a_function_that_grows_beyond_all_numbers_is_compressed() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(INTO, 64), Steep(), nn.Linear(64, 16), nn.LayerNorm(16), nn.Linear(16, 7)).eval()
    data = list((3 * rows(800)).split(100))
    small = st.compress(model, st.Budget(macs=0.5), example_inputs=data[0][:1], data=data)
    assert all(parameter.isfinite().all() for parameter in small.model.parameters())


class Steep(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.exp(x)


def test_a_sample_that_cannot_be_split_is_fitted_to_as_before() -> None:
    (few,) = (rows(1),)
    _, small = compressed([few])
    assert all(parameter.isfinite().all() for parameter in small.model.parameters())


@pytest.mark.parametrize(("sizes", "least"), [((1000,), 8), ((7, 9), 8), ((3,), 3), ((64,) * 9, 9)])
def test_batches_are_taken_apart_but_not_changed(sizes: tuple[int, ...], least: int) -> None:
    batches = [as_inputs(rows(size, seed=size)) for size in sizes]
    parts = taken_apart([(batch, batch) for batch in batches])
    assert len(parts) >= least
    whole, again = (torch.cat([batch.args[0] for batch in each]) for each in (batches, [first for first, _ in parts]))
    assert torch.equal(whole, again)
    held_out = HeldOut(nn.Identity(), parts).positions
    assert held_out
    assert len(held_out) < len(parts)
