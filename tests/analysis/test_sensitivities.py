"""Sensitivities of layers, and the gradients' moments behind the loss metric."""

from typing import Any

import numpy as np
import pytest
import torch
from cases import inputs, same_state, state
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import spectrim as st
from spectrim.analysis.sensitivities import with_output_grads
from spectrim.core.execution import as_inputs
from spectrim.layers.replacement import mean_corrections, narrowed_at, product


class Weighted(nn.Module):
    """Two equal layers, one of which counts ten times as much, and one that does not count at all."""

    def __init__(self, *, frozen: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.single, self.ten, self.none = (nn.Linear(12, 8) for _ in range(3))
        self.ten.load_state_dict(self.single.state_dict())
        self.requires_grad_(not frozen)

    def forward(self, x: Tensor) -> Tensor:
        return self.single(x) + 10 * self.ten(x) + 0 * self.none(x)


@pytest.fixture(scope="module")
def batches() -> list[Tensor]:
    return list(torch.randn(96, 12, generator=torch.Generator().manual_seed(1)).split(16))


def test_the_sensitivity_is_quadratic_in_a_layers_weight_in_the_sum(batches: list[Tensor]) -> None:
    model = Weighted()
    before = state(model)
    analysis = st.analyze(model, batches[0], calibration=st.calibrate(model, batches))
    sensitivities = st.sensitivity(model, analysis, [as_inputs(batch) for batch in batches]).sensitivity
    assert sensitivities["ten"]["linear"] == pytest.approx(100 * sensitivities["single"]["linear"], rel=1e-3)
    assert sensitivities["none"]["linear"] == 0
    same_state(model, before)


def test_the_order_of_the_batches_does_not_matter(batches: list[Tensor]) -> None:
    model = Weighted()
    analysis = st.analyze(model, batches[0], calibration=st.calibrate(model, batches))
    data = [as_inputs(batch) for batch in batches * 4]
    weighed = [st.sensitivity(model, analysis, order) for order in (data, data[::-1])]
    forward, backward = ([own.sensitivity_of(layer.name, "linear") for layer in own] for own in weighed)
    assert forward == pytest.approx(backward, rel=1e-5)


def test_no_data_raises(batches: list[Tensor]) -> None:
    model = Weighted()
    analysis = st.analyze(model, batches[0], calibration=st.calibrate(model, batches))
    with pytest.raises(st.errors.DataError, match="no data to measure sensitivities on"):
        st.sensitivity(model, analysis, [])


def test_a_negative_cache_raises(batches: list[Tensor]) -> None:
    model = Weighted()
    analysis = st.analyze(model, batches[0], calibration=st.calibrate(model, batches))
    with pytest.raises(st.errors.PlanError, match="cache=-1: a number of bytes"):
        st.sensitivity(model, analysis, [as_inputs(batch) for batch in batches], cache=-1)


def test_no_more_samples_are_run_than_it_takes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 6))
    x = torch.randn(256, 12, generator=torch.Generator().manual_seed(1))
    analysis = st.analyze(model, x, calibration=st.calibrate(model, [x]))
    passes: list[int] = []
    model[1].register_forward_hook(lambda *_: passes.append(1))
    st.sensitivity(model, analysis, [as_inputs(batch) for batch in x.split(8)])
    # 32 samples at least: four batches for the dense outputs, and four for the other layer; all would be 32 of each
    assert 2 * 4 <= len(passes) <= 2 * 12


@pytest.mark.parametrize("frozen", [False, True])
def test_gradient_moments_scale_with_what_follows(frozen: bool, batches: list[Tensor]) -> None:
    model = Weighted(frozen=frozen)
    moments = st.calibrate(model, batches, gradients=True).moments
    single, ten, none = (moments[name].output_grad_covariance for name in ("single", "ten", "none"))
    assert single is not None
    assert ten is not None
    assert none is not None
    torch.testing.assert_close(ten, 100 * single)
    assert float(none.abs().max()) == 0
    assert float(single.diagonal(dim1=1, dim2=2).min()) > 0
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("size", [1, 3, 512])
def test_gradient_moments_are_those_of_all_outputs_whatever_the_batches(size: int) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 10)), torch.randn(512, 6)
    expected = (model[1].weight.T @ model[1].weight).detach().double()
    asked = st.calibrate(model, x.split(size), gradients=True)
    without = st.calibrate(model, x.split(size))
    for statistics in (asked, with_output_grads(model, without, [as_inputs(batch) for batch in x.split(size)])):
        moment = statistics.moments["0"].output_grad_covariance
        assert moment is not None
        assert float((moment[0] - expected).norm() / expected.norm()) < 0.3


class _Unequal(nn.Module):
    """One weight: a layer that is called four times, and another one that is called once."""

    def __init__(self) -> None:
        super().__init__()
        self.often, self.once, self.first, self.last = (nn.Linear(6, size, bias=False) for size in (6, 6, 8, 8))
        self.once.weight = self.often.weight

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([*(self.first(self.often(part * x)) for part in range(1, 5)), self.last(self.once(x))], dim=-1)


def test_gradients_of_a_shared_weight_count_at_every_call() -> None:
    torch.manual_seed(0)
    model, x = _Unequal(), torch.randn(1024, 6)
    analysis = st.analyze(model, x[:1], calibration=st.calibrate(model, x.split(64), gradients=True))
    first, last = (layer.weight.detach().double() for layer in (model.first, model.last))
    expected = 4 * first.T @ first + last.T @ last
    moment = analysis["often"].problems["loss"].output[0]
    moment = moment * (expected * moment).sum() / moment.square().sum()
    assert float((moment - expected).norm() / expected.norm()) < 0.12


class _ReadsItsWeight(torch.autograd.Function):
    """A linear layer whose backward pass differentiates with respect to its weight, as reversible layers do."""

    @staticmethod
    def forward(context: Any, x: Tensor, weight: Tensor) -> Tensor:
        context.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, weight = context.saved_tensors
        with torch.enable_grad():
            own = x.detach().requires_grad_()
            x_gradient, weight_gradient = torch.autograd.grad(own @ weight.T, (own, weight), gradient)
        return x_gradient, weight_gradient


def test_a_pass_that_is_repeated_with_free_weights_draws_the_same_signs() -> None:
    class Reversible(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.last = nn.Linear(6, 8), nn.Linear(8, 10, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return _ReadsItsWeight.apply(self.layer(x), self.last.weight)

    torch.manual_seed(0)
    model, x = Reversible(), torch.randn(40, 6)
    plain = nn.Sequential(model.layer, model.last)
    repeated, once = (st.calibrate(network, x.split(8), gradients=True).moments for network in (model, plain))
    torch.testing.assert_close(repeated["layer"].output_grad_covariance, once["0"].output_grad_covariance)


class _Corner(nn.Module):
    """Reads one place of a map."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())[:, :, 0, 0]


def test_gradients_are_taken_at_all_places() -> None:
    torch.manual_seed(0)
    model, data = _Corner(), torch.randn(32, 3, 24, 24, generator=torch.Generator().manual_seed(1)).split(16)
    some, every = (st.calibrate(model, data, gradients=True, positions=places).moments for places in ("auto", None))
    for name in ("first", "second"):
        assert every[name].output_grad_covariance is not None
        torch.testing.assert_close(some[name].output_grad_covariance, every[name].output_grad_covariance)


def test_without_being_asked_no_gradients_are_taken(batches: list[Tensor]) -> None:
    moments = st.calibrate(Weighted(), batches).moments.values()
    assert all(layer.output_grad_covariance is None for layer in moments)


def test_the_loss_metric_prefers_outputs_with_an_effect(batches: list[Tensor]) -> None:
    """Half of the outputs are thrown away: in the loss metric, a rank of half the outputs loses nothing of the rest."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 6, bias=False))
    with torch.no_grad():
        model[1].weight[:, 4:] = 0
    dense = torch.cat([model(batch) for batch in batches])
    error = {}
    for metric in ("activation", "loss"):
        small = st.compress(
            model, st.Rank(4), example_inputs=batches[0], data=batches, metric=metric, include="0", allow_growth=True
        )
        assert small.plan["0"].metric == metric
        error[metric] = float((torch.cat([small.model(batch) for batch in batches]) - dense).square().mean().detach())
    assert error["loss"] < 0.05 * error["activation"]


def test_an_inplace_relu_after_the_layer_does_not_spoil_its_gradient(batches: list[Tensor]) -> None:
    moments = []
    for inplace in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 8), nn.ReLU(inplace=inplace), nn.Linear(8, 5))
        moments.append(st.calibrate(model, batches, gradients=True).moments["0"].output_grad_covariance)
    torch.testing.assert_close(moments[0], moments[1])


def test_a_negative_cache_raises_before_the_model_runs(batches: list[Tensor]) -> None:
    model = Weighted()
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(st.errors.PlanError, match="cache=-1: a number of bytes"):
        st.compress(model, st.Budget(macs=0.5), example_inputs=batches[0], data=batches, cache=-1)
    assert not calls


@pytest.mark.parametrize("outputs", [1, 2, 3])
def test_a_narrow_last_layer_is_not_free(outputs: int) -> None:
    """The rank that loses nearest to a tenth may be the full one, which loses nothing."""
    torch.manual_seed(0)
    hidden = nn.Linear(12, 16)
    head = nn.Linear(16, outputs)
    model, x = nn.Sequential(hidden, nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), head).double(), inputs(96, 12)
    with torch.no_grad():
        head.weight.copy_(torch.linalg.qr(torch.randn(16, outputs, dtype=torch.float64))[0].T)  # equal singular values
    analysis = st.analyze(model, x[:1], calibration=st.calibrate(model, x.split(16)))
    measured = st.sensitivity(model, analysis, x.split(16)).sensitivity["4"]["linear"]
    assert (measured > 0) == (outputs > 1)


class Detector(nn.Module):
    """Gives as many boxes as have a high score."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.scores, self.boxes = nn.Linear(12, 48), nn.Linear(48, 48), nn.Linear(48, 48)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.body(x))
        return self.boxes(y)[self.scores(y) > 0.3]


def test_outputs_whose_number_depends_on_their_values_are_reported_and_layers_count_alike() -> None:
    model, x = Detector().eval(), torch.randn(96, 12, generator=torch.Generator().manual_seed(1))
    with pytest.warns(UserWarning, match="shapes of Detector's outputs depend on their values.*count alike"):
        small = st.compress(model, st.Budget(macs=0.6), example_inputs=x[:1], data=x.split(16))
    assert small.plan.factored


class Recomputed(nn.Module):
    """Blocks whose activations are computed again for the gradient."""

    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(12, 48), nn.ReLU(), nn.Linear(48, 12)) for _ in range(2))
        self.head, self.reentrant = nn.Linear(12, 10), reentrant

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x)


@pytest.mark.parametrize(("reentrant", "metric"), [(False, "loss"), (True, "activation")])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
def test_checkpointed_blocks_are_compressed(reentrant: bool, metric: str) -> None:
    model, x = Recomputed(reentrant=reentrant).eval(), torch.randn(96, 12, generator=torch.Generator().manual_seed(1))
    small = st.compress(model, st.Budget(macs=0.5), example_inputs=x[:1], data=x.split(16))
    assert small.plan.metric == metric
    assert small.measurement.macs_ratio is not None
    assert small.measurement.macs_ratio <= 0.5


class Experts(nn.Module):
    """A layer that only some rows are sent to."""

    def __init__(self) -> None:
        super().__init__()
        self.expert, self.out = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        chosen = x[:, 0] > 0
        y = torch.zeros_like(x)
        y[chosen] = torch.relu(self.expert(x[chosen]))
        return self.out(y)


def test_a_layer_that_a_batch_reaches_with_no_rows() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 16)
    none, all_of_them = x.clone(), x.clone()
    none[:, 0], all_of_them[:, 0] = -1, 1
    result = st.compress(Experts(), st.Budget(macs=0.8), example_inputs=all_of_them, data=[none, all_of_them])
    assert torch.isfinite(result.model(x)).all()


class Spectral(nn.Module):
    """Complex outputs, conjugated without being computed."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(torch.relu(self.up(x)))
        return torch.complex(y, -y).conj()


def test_complex_outputs_are_differentiated_and_compared() -> None:
    torch.manual_seed(0)
    data = [torch.randn(32, 16) for _ in range(8)]
    plan = st.compress(Spectral(), st.Budget(macs=0.5), example_inputs=data[0], data=data).plan
    assert plan.metric == "loss"


def test_each_form_is_measured_in_the_metric_of_a_budget() -> None:
    """The share that a width loses, times its sensitivity, is what the outputs change by."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 4)).double()
    x = inputs(256, 16)
    statistics = st.calibrate(model, x.split(32), gradients=True)
    weighed = st.sensitivity(model, st.analyze(model, x[:1], calibration=statistics), x.split(32))
    assert set(weighed.sensitivity["2"]) == {"linear", "width"}
    layer = weighed["2"]
    errors = layer.rank_errors("width", "loss")
    place = int(np.abs(errors.lost - 0.1).argmin())
    factors = layer.decomposition("width", "loss").factors(tuple(errors.ranks[place]))
    bias, rank = mean_corrections(weighed.means), int(errors.ranks[place, 0])
    narrowed = narrowed_at(model, "2", ["0"], form="width", rank=rank, factors=factors, bias=bias)
    small = nn.Sequential(narrowed["0"], model[1], narrowed["2"], *model[3:])
    change = float((small(x) - model(x)).detach().square().mean())
    problem = layer.problems["loss"]
    lost = problem.seen_error(product(model[2], form="width", factors=factors)) / problem.total
    assert weighed.sensitivity["2"]["width"] * lost == pytest.approx(change, rel=0.3)


class OfManyKinds(nn.Module):
    """Takes sparse matrices, and sequences of several lengths."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(12, 24), nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(torch.relu(self.up(x if x.is_nested else x.to_dense())))
        return torch.stack([part.mean(dim=0) for part in y.unbind()]) if x.is_nested else y


@pytest.mark.parametrize("kind", [torch.sparse_csr, torch.sparse_coo, torch.jagged])
@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
def test_samples_are_chosen_of_sparse_and_ragged_batches(kind: torch.layout) -> None:
    torch.manual_seed(0)
    if kind == torch.jagged:
        data = [torch.nested.nested_tensor([torch.randn(n, 12) for n in (3, 5, 4)], layout=kind) for _ in range(16)]
    else:
        data = [torch.relu(torch.randn(40, 12)).to_sparse(layout=kind) for _ in range(8)]  # more than run at a time
    small = st.compress(OfManyKinds(), st.Budget(macs=0.7), example_inputs=data[0], data=data)
    assert small.measurement.macs_ratio is not None
    assert small.measurement.macs_ratio <= 0.7
