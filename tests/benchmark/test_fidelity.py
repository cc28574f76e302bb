"""What is looked at before a compressed network is given back."""

import warnings
from typing import Any

import pytest
import torch
from cases import inputs, small_mlp
from torch import Tensor, nn

import spectrim as st
from spectrim.benchmark.fidelity import (
    Fidelity,
    _warn_if_useless,
    _warn_if_worse_than_predicted,
    _warn_if_worse_with_data,
    fidelity,
    require_planned_cost,
    require_sound,
)
from spectrim.core.execution import as_inputs


def classifier() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 5)).eval()


def test_the_distance_is_that_worked_out_by_hand() -> None:
    model, x = classifier(), torch.randn(96, 12)
    result = st.compress(model, st.Budget(macs=0.4), example_inputs=x[:1], data=x.split(32))
    with torch.no_grad():
        dense, small = model(x), result.model(x)
    assert result.fidelity is not None
    error = float((dense - small).norm() / (dense - dense.mean(dim=0)).norm())
    assert result.fidelity.relative_error == pytest.approx(error, rel=1e-5)
    assert result.fidelity.agreement == pytest.approx(float((dense.argmax(1) == small.argmax(1)).float().mean()))
    assert result.fidelity.samples == 96
    assert result.fidelity.plain is not None
    assert result.fidelity.plain.relative_error > error


def test_batches_of_any_size_add_up() -> None:
    x, small, plain = torch.randn(600, 12), classifier(), classifier()
    with torch.no_grad():
        small[0].weight.add_(0.05)
        plain[4].bias.add_(torch.arange(5.0))
    results = [
        fidelity(classifier(), small, map(as_inputs, x.split(size)), plain=plain, predicted=0.01) for size in (600, 7)
    ]
    first, second = (result.model_dump() for result in results if result is not None)
    assert first.pop("plain") == pytest.approx(second.pop("plain"))
    assert first == pytest.approx(second)


def test_without_data_there_is_none() -> None:
    assert st.compress(classifier(), st.Rank(4), example_inputs=torch.randn(2, 12)).fidelity is None


def test_values_have_no_agreement_and_outputs_of_varying_shapes_no_distance() -> None:
    class Chosen(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[x[:, 0] > 0]

    x = torch.randn(8, 3)
    same = fidelity(nn.Flatten(0), nn.Flatten(0), [as_inputs(x)])
    assert same is not None
    assert (same.relative_error, same.agreement) == (0, None)
    embeddings = fidelity(nn.Identity(), nn.Identity(), [as_inputs(nn.functional.normalize(x))])
    assert embeddings is not None
    assert embeddings.agreement is None
    sure = fidelity(nn.Identity(), nn.Identity(), [as_inputs(torch.eye(3))])
    assert sure is not None
    assert sure.agreement == 1
    assert fidelity(Chosen(), nn.Identity(), [as_inputs(x), as_inputs(-x)]) is None
    assert fidelity(nn.Identity(), nn.Unflatten(1, (3, 1)), [as_inputs(x)]) is None


BROKEN: dict[str, tuple[Any, Any]] = {
    "not finite": (torch.ones(2), torch.tensor([1.0, torch.inf])),
    "not a number": (torch.tensor([1.0, -torch.inf]), torch.tensor([torch.nan, -torch.inf])),
    "not finite in another entry": (
        (torch.tensor([-torch.inf]), torch.ones(1)),
        (torch.zeros(1), torch.tensor([torch.inf])),
    ),
    "other whole numbers": (torch.ones(2).long(), torch.ones(2).int()),
    "not finite, complex": (torch.ones(2) * 1j, torch.tensor([1.0, torch.inf]) * 1j),
    "another type": (torch.ones(2), torch.ones(2).half()),
    "another structure": ((torch.ones(2),), [torch.ones(2)]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_outputs_that_are_not_sound_are_refused(name: str) -> None:
    with pytest.raises(st.errors.ModelError, match="the compressed network"):
        require_sound(*BROKEN[name])


def test_outputs_that_were_not_finite_before_may_stay_so() -> None:
    require_sound(torch.tensor([torch.nan]), torch.tensor([torch.nan]))


@pytest.mark.parametrize("rule", [st.Budget(macs=0.4), st.Rank(4)], ids=str)
@pytest.mark.parametrize("streamed", [False, True])
def test_every_sixteenth_batch_is_kept_aside(rule: st.Rank | st.Budget, streamed: bool) -> None:
    x = torch.randn(264, 12, generator=torch.Generator().manual_seed(1))
    batches = x.split(8)
    aside = torch.cat([batches[15], batches[31]])
    used = [batch for place, batch in enumerate(batches) if place not in (15, 31)]
    model = classifier()

    def compressed(data: Any) -> st.Compressed:
        return st.compress(model, rule, example_inputs=x[:1], data=iter(data) if streamed else data)

    result = compressed(batches)
    expected = fidelity(model, result.model, [as_inputs(aside)])
    assert result.fidelity is not None
    assert expected is not None
    assert (result.fidelity.samples, result.fidelity.held_out) == (16, True)
    assert result.fidelity.relative_error == pytest.approx(expected.relative_error, rel=1e-5)
    changed = [batch if place not in (15, 31) else -batch for place, batch in enumerate(batches)]
    for other in (used[:15], changed):
        again = compressed(other)
        assert again.fidelity is not None
        assert again.fidelity.held_out == (other is changed)
        same = all(torch.equal(a, b) for a, b in zip(again.model.parameters(), result.model.parameters(), strict=True))
        assert same == (other is changed)


def test_nothing_is_kept_aside_of_an_analysis_that_has_statistics() -> None:
    """They may be of these very batches."""
    model, data = classifier(), torch.randn(264, 12, generator=torch.Generator().manual_seed(1)).split(8)
    analysis = st.analyze(model, data[0], calibration=st.calibrate(model, data))
    result = st.compress(model, st.Budget(macs=0.4), example_inputs=data[0], data=data, analysis=analysis)
    assert result.fidelity is not None
    assert (result.fidelity.samples, result.fidelity.held_out) == (128, False)
    bare = st.analyze(model, data[0])
    held_out = st.compress(model, st.Rank(4), example_inputs=data[0], data=data, analysis=bare, metric="plain").fidelity
    assert held_out is None


def test_fewer_than_eight_samples_are_not_kept_aside() -> None:
    x = torch.randn(40, 12)
    single = st.compress(classifier(), st.Rank(4), example_inputs=x[:1], data=iter(x.split(1)))
    assert single.fidelity is not None
    assert (single.fidelity.samples, single.fidelity.held_out) == (8, False)
    assert st.compress(classifier(), st.Rank(4), example_inputs=x[:1], data=x.split(1)).fidelity is not None


@pytest.mark.parametrize("share", [0.8, 0.5])
def test_the_plan_predicts_the_distance(share: float) -> None:
    model, x = classifier(), torch.randn(512, 12)
    result = st.compress(model, st.Budget(macs=share), example_inputs=x[:1], data=x.split(32), reconstruct=False)
    measured = result.fidelity
    assert measured is not None
    assert measured.predicted is not None
    assert 1 / 3 < measured.predicted / measured.relative_error < 2
    per_layer = st.compress(model, st.Rank(4), example_inputs=x[:1], data=x.split(32)).fidelity
    assert per_layer is not None
    assert per_layer.predicted is None


def test_a_network_much_further_away_than_predicted_is_said() -> None:
    with pytest.warns(UserWarning, match=r"0.9 off .* where its plan promises 0.2"):
        _warn_if_worse_than_predicted(Fidelity(relative_error=0.9, predicted=0.2, samples=4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _warn_if_worse_than_predicted(Fidelity(relative_error=0.5, predicted=0.2, samples=4))
        _warn_if_worse_than_predicted(Fidelity(relative_error=0.2, predicted=0.01, samples=4))


@pytest.mark.parametrize("cost", ["macs", "params", "bytes"])
def test_more_than_planned_is_an_error_over_the_budget(cost: str) -> None:
    x = inputs(4, 12)
    result = st.compress(small_mlp(), st.Budget(**{cost: 0.8}), example_inputs=x)
    dense = st.measure(small_mlp(), x, latency=False)
    require_planned_cost(result.plan, dense, result.measurement)
    with pytest.raises(st.errors.ModelError, match=r"the compressed network .* were planned"):
        require_planned_cost(
            result.plan, dense, result.measurement.model_copy(update={cost: round(getattr(dense, cost) * 0.806)})
        )


@pytest.mark.parametrize("cost", ["macs", "params"])
def test_more_than_planned_is_a_warning_without_a_budget(cost: str) -> None:
    x = inputs(4, 12)
    result = st.compress(small_mlp(), st.Rank(3), example_inputs=x)
    dense = st.measure(small_mlp(), x, latency=False)
    with pytest.warns(UserWarning, match="were planned"):
        require_planned_cost(result.plan, dense, result.measurement.model_copy(update={cost: getattr(dense, cost)}))


def test_a_bias_of_two_layers_is_not_shared_by_their_factors() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    network[2].bias = network[0].bias
    result = st.compress(network, st.Rank(4), example_inputs=torch.zeros(1, 32), data=[torch.randn(64, 32)])
    assert result.measurement.params == result.plan.kept_cost.params == 576
    half = st.compress(network, st.Budget(params=0.3), example_inputs=torch.zeros(1, 32), data=[torch.randn(64, 32)])
    assert half.measurement.params_ratio is not None
    assert half.measurement.params_ratio <= 0.3


def test_data_that_make_it_worse_are_said() -> None:
    plain = Fidelity(relative_error=0.1, samples=4)
    with pytest.warns(UserWarning, match=r"0.3 off .* and 0.1 without these data"):
        _warn_if_worse_with_data(Fidelity(relative_error=0.3, samples=4, plain=plain), near=0.02)
    _warn_if_worse_with_data(Fidelity(relative_error=0.3, samples=4, plain=plain), near=0.4)


def test_a_network_in_which_nothing_can_be_factored_is_said() -> None:
    model = classifier()
    for layer in (model[0], model[2], model[4]):
        layer.register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match=r"no layer of this network can be factored.* 0: it carries hooks"):
        st.compress(model, st.Rank(2), example_inputs=torch.randn(2, 12))


@pytest.mark.parametrize(("error", "agreement"), [(0.95, 1.0), (0.95, None), (0.2, 0.4)])
def test_a_network_of_which_little_is_left_is_said(error: float, agreement: float | None) -> None:
    with pytest.warns(UserWarning, match=r"little is left of the network: .* fine-tune it"):
        _warn_if_useless(Fidelity(relative_error=error, agreement=agreement, samples=4))


def test_it_prints_what_a_reader_needs() -> None:
    plain = Fidelity(relative_error=0.4, samples=64)
    measured = Fidelity(relative_error=0.1834, agreement=0.984, samples=64, held_out=True, predicted=0.239, plain=plain)
    assert str(measured) == (
        "Outputs on 64 calibration samples kept aside: 18.3% off the dense ones, 23.9% predicted; the largest output "
        "is the same for 98.4%. Without data: 40.0% off."
    )
    assert "samples that the network was fitted to, so that others are further off: 40.0% off" in str(plain)
