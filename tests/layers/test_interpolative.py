"""Which budgets take the interpolative form, and what a network in it is afterwards."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import inputs
from torch import nn

import spectrim as st
from spectrim.layers.padding import padded


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 30), nn.Tanh(), nn.Linear(30, 20, bias=False)).eval()


def forms_under(rule: Any, **options: Any) -> set[str]:
    return {layer.form for layer in st.compress(network(), rule, example_inputs=inputs(4, 24).float(), **options).plan}


@pytest.mark.parametrize("limit", ["params", "bytes"])
def test_budgets_of_numbers_take_it_and_others_do_not(limit: str) -> None:
    assert "interpolative" in forms_under(st.Budget(**{limit: 0.6}))
    assert "interpolative" not in forms_under(st.Budget(**{limit: 0.6}), forms=("linear",))
    assert "interpolative" not in forms_under(st.Budget(macs=0.6))
    assert "interpolative" not in forms_under(st.Budget(params=0.6, of="body"))
    assert "interpolative" not in forms_under(st.Ratio(0.3))
    assert forms_under(st.Budget(macs=0.6), forms=("interpolative",)) <= {"interpolative", "dense"}
    assert forms_under(st.Rank(5), forms=("interpolative",)) == {"interpolative"}


@pytest.mark.parametrize("limit", ["params", "bytes", "macs"])
@pytest.mark.parametrize("share", [0.5, 0.7, 0.9])
def test_a_budget_is_kept_and_its_plan_is_what_is_measured(limit: str, share: float) -> None:
    x = inputs(4, 24).float()
    small = st.compress(network(), st.Budget(**{limit: share}), example_inputs=x, forms=("interpolative",))
    assert getattr(small.measurement, f"{limit}_ratio") <= share
    assert small.plan.kept_cost.params == small.measurement.params
    assert small.plan.kept_cost.macs == small.measurement.macs


def test_it_has_a_lower_error_than_the_linear_form_of_as_many_numbers() -> None:
    known = st.analyze(network(), inputs(4, 24).float())
    for layer in known:
        linear, own = (layer.rank_errors(form, "plain") for form in ("linear", "interpolative"))
        for params, lost in zip(linear.params[:-1], linear.lost[:-1], strict=True):
            if params < layer.dense.params:
                assert own.lost[own.params <= params].min() <= lost


def test_its_layers_are_part_of_a_model_like_any_other(tmp_path: Path) -> None:
    x = inputs(8, 24).float()
    small = st.compress(network(), st.Budget(params=0.6), example_inputs=x, forms=("interpolative",)).model
    assert isinstance(small[0], st.InterpolativeLayer)
    again = st.load(st.save(small, tmp_path), network())
    with torch.no_grad():
        before = small(x)
        assert torch.equal(again(x), before)
        torch.testing.assert_close(st.merge(small)(x), before)
        assert torch.equal(padded(small, 16)(x), before)
        torch.testing.assert_close(small.double()(x.double()).float(), before)
    tuned = st.finetune(again, [(x, torch.randn(8, 20))], loss="mse", epochs=1, lr=1e-2).model
    assert not torch.equal(tuned[0].up.weight, again[0].up.weight)
    assert torch.equal(tuned[0].up.order, again[0].up.order)
    exported = st.export_program(again, tmp_path / "small.pt2", x, pad=16)
    assert exported.check is not None
    assert exported.padded is None  # no rank is


def test_a_network_in_it_is_compressed_no_further() -> None:
    x = inputs(8, 24).float()
    small = st.compress(network(), st.Budget(params=0.6), example_inputs=x, forms=("interpolative",)).model
    known = st.analyze(small, x)
    assert all(layer.skip_reason for layer in known)
    assert known.outside("macs") == known.outside("params") == 0
    with pytest.raises(st.errors.RuleError):
        st.compress(small, st.Budget(params=0.5), example_inputs=x)


def test_under_autocast_it_gives_the_type_that_dense_layers_give() -> None:
    x = inputs(4, 24).float()
    small = st.compress(network(), st.Rank(5), example_inputs=x, forms=("interpolative",)).model
    with torch.autocast("cpu", torch.bfloat16):
        assert small[0](x).dtype == network()[0](x).dtype == torch.bfloat16


def test_convolutions_in_it_go_through_the_older_exporter_of_torch(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Conv1d(12, 10, 1)), inputs(2, 12, 5).float()
    small = st.compress(model, st.Rank(4), example_inputs=x, forms=("interpolative",)).model
    path = tmp_path / "small.onnx"
    with warnings.catch_warnings(action="ignore"):
        torch.onnx.export(small, (x,), path, dynamo=False)
    session = pytest.importorskip("onnxruntime").InferenceSession(path)
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), small(x))


def test_openvino_gives_the_same_for_convolutions_behind_each_other(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv1d(8, 32, 1), nn.ReLU(), nn.Conv1d(32, 16, 1)), torch.randn(2, 8, 6)
    small = st.compress(model, st.Rank(5), example_inputs=x, forms=("interpolative",)).model
    assert st.export_openvino(small, tmp_path / "small.xml", x).check is not None
