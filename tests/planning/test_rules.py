"""Rules and plans: one budget for the whole network, kept in truth; the trade-off curve; plans edited by hand."""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from cases import Residual, Tied, full_ranks, inputs, small_cnn, small_mlp
from torch import Tensor, nn

import spectrim as st
from spectrim import errors
from spectrim.core.plans import CostName, Metric
from spectrim.models import resnet20

COSTS: tuple[CostName, ...] = get_args(CostName)
X = inputs(8, 3, 12, 12)


def budget(cost: CostName, share: float) -> st.Budget:
    return st.Budget(**{cost: share})


def ratio(compressed: st.Compressed | st.Measurement, cost: CostName) -> float:
    measurement = compressed.measurement if isinstance(compressed, st.Compressed) else compressed
    return float(getattr(measurement, f"{cost}_ratio"))


def squares(plan: st.Plan) -> float:
    """What a plan loses: the sum over layers of the share of the energy."""
    return sum((layer.predicted_error or 0.0) ** 2 for layer in plan)


def analysis(model: nn.Module, x: Tensor, *, calibrated: bool = True) -> st.Analysis:
    return st.analyze(model, x, calibration=st.calibrate(model, [x]) if calibrated else None)


NETWORKS: dict[str, tuple[Any, Tensor]] = {
    "cnn": (small_cnn, X),
    "cnn without biases": (lambda: small_cnn(bias=False), X),
    "residual": (Residual, inputs(8, 3, 10, 10)),
    "mlp": (small_mlp, inputs(8, 12)),
    "tied": (lambda: Tied().double(), inputs(8, 8)),
}


@pytest.mark.parametrize("build_and_x", NETWORKS.values(), ids=NETWORKS.keys())
@pytest.mark.parametrize("fit", ["plain", "activation", "reconstructed"])
@pytest.mark.parametrize("cost", COSTS)
def test_what_is_measured_is_never_above_the_budget(cost: CostName, fit: str, build_and_x: tuple[Any, Tensor]) -> None:
    build, x = build_and_x
    model = build()
    known = analysis(model, x, calibrated=fit == "activation") if fit != "reconstructed" else None
    tied = build is NETWORKS["tied"][0] and cost == "bytes"  # its file is mostly its header
    for share in (0.9, 0.95) if tied else (0.6, 0.8, 0.95) if known else (0.6, 0.9):
        data = None if known else [x]
        compressed = st.compress(model, budget(cost, share), example_inputs=x, analysis=known, data=data)
        assert ratio(compressed, cost) <= share
        assert compressed.measurement == st.measure(compressed.model, x, reference=model, latency=False)
        assert compressed.plan.kept_cost.macs == compressed.measurement.macs
        assert all(layer.reason for layer in compressed.plan)
        kinds = nn.Linear | nn.Conv2d | nn.ConvTranspose2d
        every = {name for name, module in model.named_modules() if isinstance(module, kinds)}
        assert {name for layer in compressed.plan for name in layer.names} == every


@pytest.fixture(scope="module")
def residual() -> tuple[nn.Module, st.Analysis]:
    torch.manual_seed(0)
    model = resnet20().eval()
    return model, st.analyze(model, torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize(
    ("cost", "share"),
    [("macs", 0.2), ("macs", 0.3), ("macs", 0.5), ("macs", 0.9), ("params", 0.3), ("params", 0.75), ("bytes", 0.4)],
)
def test_a_network_with_many_options_uses_its_budget_to_the_last_half_percent(
    residual: tuple[nn.Module, st.Analysis], cost: CostName, share: float
) -> None:
    model, known = residual
    compressed = st.compress(model, budget(cost, share), example_inputs=torch.zeros(1, 3, 32, 32), analysis=known)
    assert 0.995 * share <= ratio(compressed, cost) <= share


@pytest.mark.parametrize("cost", COSTS)
def test_a_larger_budget_never_predicts_a_larger_error(residual: tuple[nn.Module, st.Analysis], cost: CostName) -> None:
    _, known = residual
    losses = [squares(st.plan(known, budget(cost, share))) for share in (0.2, 0.6, 0.99)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.05 * losses[0]


def test_mixed_forms_lose_less_than_any_one_of_them(residual: tuple[nn.Module, st.Analysis]) -> None:
    _, known = residual
    loss = {
        forms: squares(st.plan(known, st.Budget(macs=0.5), forms=forms))
        for forms in (("channel",), ("spatial",), ("tucker2",), ("channel", "spatial", "tucker2"))
    }
    *single, mixed = loss.values()
    assert mixed <= min(single)


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("multiple", [None, 4])
def test_a_budget_out_of_reach_names_the_smallest_and_that_one_works(cost: CostName, multiple: int | None) -> None:
    model = small_cnn()
    known = analysis(model, X)
    with pytest.raises(errors.RuleError, match="cannot be reached") as caught:
        st.plan(known, budget(cost, 0.001), rank_multiple=multiple)
    match = re.search(rf"Budget\({cost}=([0-9.]+)\)", str(caught.value).partition("smallest")[2])
    assert match is not None
    least = float(match.group(1))
    compressed = st.compress(
        model, st.plan(known, budget(cost, least), rank_multiple=multiple), example_inputs=X, analysis=known
    )
    assert ratio(compressed, cost) <= least
    with pytest.raises(errors.RuleError, match="cannot be reached"):
        st.plan(known, budget(cost, least - 2e-4), rank_multiple=multiple)


@pytest.mark.parametrize("build_and_x", NETWORKS.values(), ids=NETWORKS.keys())
@pytest.mark.parametrize("metric", ["plain", "activation"])
def test_what_ranks_cost_is_known_from_shapes(metric: Metric, build_and_x: tuple[Any, Tensor]) -> None:
    build, x = build_and_x
    model = build()
    bare, known = analysis(model, x, calibrated=False), analysis(model, x)
    assert bare.call_sites == known.call_sites
    for layer, full in zip(bare, known, strict=True):
        for form in layer.forms if layer.problems else ():
            costs, losses = layer.rank_costs(form, metric), full.rank_errors(form, metric)
            for name in ("ranks", "params", "macs"):
                np.testing.assert_array_equal(getattr(costs, name), getattr(losses, name))
            assert losses.lost.shape == losses.params.shape


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("forms", [None, ("spatial",)])
def test_a_rule_that_no_data_can_make_possible_is_refused_before_they_are_run(
    forms: tuple[str, ...] | None, cost: CostName
) -> None:
    def untouched() -> Iterator[Tensor]:
        raise AssertionError("the calibration data were asked for")
        yield X

    model = small_cnn(bias=False)
    known = analysis(model, X)
    with pytest.raises(errors.RuleError, match="cannot be reached") as early:
        st.compress(model, budget(cost, 0.001), example_inputs=X, data=untouched(), forms=forms)
    with pytest.raises(errors.RuleError, match="cannot be reached") as late:
        st.plan(known, budget(cost, 0.001), forms=forms)
    assert str(early.value) == str(late.value)
    with pytest.raises(errors.RuleError, match="is above what some layers can have"):
        st.compress(model, st.Rank(1000), example_inputs=X, data=untouched(), forms=forms)
    with pytest.raises(errors.PlanError, match="give some of linear, channel, spatial, tucker2"):
        st.compress(model, budget(cost, 0.5), example_inputs=X, data=untouched(), forms=("tucker3",))


def test_a_layer_that_the_data_did_not_reach_has_no_rank_to_be_above() -> None:
    model, x = small_mlp(), inputs(8, 12)
    known = st.analyze(model, x, calibration=st.calibrate(model, [x], layers={"0", "2"}))
    compressed = st.compress(model, st.Rank(5), example_inputs=x, analysis=known)
    assert compressed.plan["4"].form == "dense"
    assert compressed.plan["4"].full_rank is not None
    assert compressed.plan["4"].full_rank < 5
    assert compressed.plan.layers == st.plan(known, st.Rank(5)).layers


@pytest.mark.parametrize("exclude", [(), ("one",)])
def test_a_budget_out_of_reach_says_how_much_cannot_shrink(exclude: tuple[str, ...]) -> None:
    model, x = Residual(), inputs(2, 3, 10, 10)
    fixed = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    fixed += [model.get_submodule(name) for name in exclude]
    share = sum(p.numel() for module in fixed for p in module.parameters()) / sum(p.numel() for p in model.parameters())
    with pytest.raises(errors.RuleError, match=f"; {share:.1%} of the params are in what cannot shrink"):
        st.compress(model, st.Budget(params=0.01), example_inputs=x, exclude=exclude)


class TestShareOfTheBody:
    @pytest.mark.parametrize("cost", ["params", "macs"])
    def test_it_is_that_of_the_layers_that_can_shrink(self, cost: CostName) -> None:
        model, x = small_mlp(), inputs(4, 12)
        rule = st.Budget(**{cost: 0.7}, of="body")
        small = st.compress(model, rule, example_inputs=x, exclude="0")
        body = [layer for layer in small.plan if layer.break_even and not layer.frozen]
        dense, after = (sum(getattr(getattr(layer, when), cost) for layer in body) for when in ("dense", "kept"))
        assert "0" not in [layer.name for layer in body]
        assert 0.5 * dense < after <= 0.7 * dense
        assert ratio(small, cost) > 0.7
        assert st.Plan.model_validate_json(small.plan.model_dump_json()).rule == rule
        assert "of what can shrink" in str(small.plan)

    def test_what_is_out_of_reach_names_the_smallest_share(self) -> None:
        model, x = small_mlp(), inputs(4, 12)
        with pytest.raises(errors.RuleError, match="cannot be reached") as caught:
            st.compress(model, st.Budget(params=0.01, of="body"), example_inputs=x, exclude="0")
        match = re.search(r"can be is Budget\(params=([0-9.]+), of='body'\)", str(caught.value))
        assert match is not None
        st.compress(model, st.Budget(params=float(match.group(1)), of="body"), example_inputs=x, exclude="0")

    @pytest.mark.parametrize(
        "options", [{"bytes": 0.5, "of": "body"}, {"latency": 0.5, "of": "body"}, {"params": 0.5, "of": "head"}]
    )
    def test_what_has_no_body(self, options: dict[str, Any]) -> None:
        with pytest.raises(errors.RuleError, match="of the layers that can shrink is"):
            st.Budget(**options)

    @pytest.mark.parametrize("analysed", [False, True])
    def test_embeddings_are_outside(self, analysed: bool) -> None:
        model = nn.Sequential(nn.Embedding(200, 16), nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16)).eval()
        tokens = torch.arange(12).reshape(3, 4)
        rule = st.Budget(params=0.7, of="body")
        if analysed:
            plan = st.plan(st.analyze(model, tokens), rule)
        else:
            plan = st.compress(model, rule, example_inputs=tokens).plan
        body = [layer for layer in plan if layer.name in ("1", "3")]
        assert "0" not in [layer.name for layer in plan.factored]
        assert sum(layer.kept.params for layer in body) <= 0.7 * sum(layer.dense.params for layer in body)
        assert "0" in [
            layer.name for layer in st.compress(model, st.Budget(params=0.5), example_inputs=tokens).plan.factored
        ]

    def test_training_follows_the_whole_network(self) -> None:
        with pytest.raises(errors.RuleError, match="whole network"):
            st.training.RankSchedule(st.Budget(params=0.5, of="body"), end=9)


@pytest.mark.parametrize("rule", [st.Budget(macs=0.7), st.Ratio(0.3), st.Energy(0.5)], ids=str)
def test_ranks_are_multiples(rule: Any) -> None:
    model = small_cnn()
    known = analysis(model, X)
    for multiple in (1, 2, 4):
        plan = st.plan(known, rule, rank_multiple=multiple)
        assert plan.factored
        for layer in plan.factored:
            full = full_ranks(model.get_submodule(layer.name), layer.form)
            assert all(rank % multiple == 0 or rank == most for rank, most in zip(layer.ranks, full, strict=True))


@pytest.mark.parametrize("wrong", [0, -1, 2.5, "auto"])
def test_a_rank_multiple_is_a_whole_number_of_at_least_one(wrong: Any) -> None:
    known = st.analyze(small_mlp(), inputs(2, 12))
    with pytest.raises(errors.RuleError, match="rank_multiple"):
        st.plan(known, st.Rank(2), rank_multiple=wrong)
    with pytest.raises(errors.RuleError, match="rank_multiple"):
        st.pareto(known, rank_multiple=wrong)


@pytest.mark.parametrize("forms", [("channel",), ("spatial",), ("tucker2",), ("spatial", "tucker2")], ids=str)
def test_only_the_allowed_forms_are_taken(forms: tuple[str, ...]) -> None:
    model = small_cnn()
    known = analysis(model, X)
    for rule in (st.Budget(macs=0.8), st.Ratio(0.3)):
        plan = st.plan(known, rule, forms=forms)
        assert plan.factored
        # a layer of one form only (linear, 1x1, transposed) is not asked
        single = {
            layer.name for layer in known if layer.forms in (("linear",), ("linear", "interpolative"), ("channel",))
        }
        assert {layer.form for layer in plan.factored if layer.name not in single} <= set(forms)
    named = st.plan(known, st.Ratio(0.3), forms=forms)["2"]
    assert named.form == forms[0]


def test_forms_that_do_not_exist_are_refused() -> None:
    known = st.analyze(small_mlp(), inputs(2, 12))
    for wrong in ((), ("conical",), "conical"):
        with pytest.raises(errors.PlanError, match="channel, spatial, tucker2"):
            st.plan(known, st.Budget(macs=0.5), forms=wrong)  # type: ignore[arg-type]


def test_a_sensitive_layer_keeps_more() -> None:
    known = analysis(small_cnn(), X)
    rule = st.Budget(macs=0.6)
    even = st.plan(known, rule)
    for name in ("2", "6"):
        sensitivity = {layer.name: {layer.forms[0]: 100.0 if layer.name == name else 1.0} for layer in known}
        careful = st.plan(replace(known, sensitivity=sensitivity), rule)
        assert careful[name].kept.macs > even[name].kept.macs
        assert (careful[name].predicted_error or 0.0) < (even[name].predicted_error or 0.0)


def test_a_layer_that_may_not_be_changed_stays_dense_under_a_budget() -> None:
    compressed = st.compress(small_cnn(), st.Budget(macs=0.8), example_inputs=X, exclude=["0", "12"])
    assert {layer.name for layer in compressed.plan if layer.reason == "not selected by include and exclude"} == {
        "0",
        "12",
    }
    assert ratio(compressed, "macs") <= 0.8


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"macs": 0.5, "params": 0.5},
        {"macs": 0},
        {"macs": 0.0},
        {"params": 1},
        {"bytes": 1.5},
        {"macs": -0.5},
        {"macs": float("nan")},
        {"macs": float("inf")},
        {"macs": True},
        {"params": "half"},
        {"latency": 0},
        {"latency": 1.0},
        {"latency": 0.5, "macs": 0.5},
        {"latency": 0.5, "threads": 0},
        {"latency": 0.5, "threads": 1.5},
        {"latency": 0.5, "batch": 0},
        {"latency": 0.5, "batch": True},
        {"latency": 0.5, "runtime": ""},
        {"latency": 0.5, "runtime": 3},
        {"macs": 0.5, "runtime": "torch"},
        {"params": 0.5, "threads": 1},
        {"bytes": 0.5, "batch": 8},
        {"runtime": "torch"},
    ],
    ids=str,
)
def test_budgets_that_mean_nothing_are_refused(wrong: Any) -> None:
    with pytest.raises(errors.RuleError, match="Budget"):
        st.Budget(**wrong)


def test_a_budget_says_what_it_limits() -> None:
    rule = st.Budget(bytes=0.25)
    assert (rule.limits, rule.share, str(rule)) == ("bytes", 0.25, "Budget(bytes=0.25)")


def test_a_budget_of_latency_says_in_what_it_is_taken() -> None:
    rule = st.Budget(latency=0.6)
    assert (rule.limits, rule.share, rule.runtime, rule.batch, rule.threads) == ("latency", 0.6, "torch", None, 1)
    assert str(rule) == "Budget(latency=0.6, runtime='torch', threads=1)"
    full = st.Budget(latency=0.6, runtime="onnxruntime", batch=8, threads=2)
    assert eval(str(full), {"Budget": st.Budget}) == full
    with pytest.raises(errors.RuleError, match=r"threads=2 belongs to a latency.*Budget\(latency=.., threads=2\)"):
        st.Budget(macs=0.5, threads=2)


@pytest.mark.parametrize("rule", [st.Budget(macs=0.5), st.Ratio(0.3)], ids=str)
def test_a_plan_notes_what_divides_its_ranks_until_they_are_edited(rule: Any) -> None:
    model = small_cnn()
    known = analysis(model, X)
    plan = st.plan(known, rule, rank_multiple=4)
    assert (plan.rank_multiple, st.plan(known, rule).rank_multiple) == (4, None)
    assert st.compress(model, plan, example_inputs=X, analysis=known).plan.rank_multiple == 4
    first = plan.factored[0]
    changed = edited(plan, first.name, {"rank": first.rank - 1})  # type: ignore[operator]
    assert st.compress(model, changed, example_inputs=X, analysis=known).plan.rank_multiple is None


@pytest.mark.parametrize("rule", [st.Budget(macs=0.5), st.Budget(params=0.6), st.Ratio(0.4)], ids=str)
@pytest.mark.parametrize("forms", [("tucker2",), ("spatial",), ("channel", "spatial", "tucker2")], ids=str)
def test_a_plan_of_every_form_survives_its_file(tmp_path: Path, rule: Any, forms: tuple[str, ...]) -> None:
    model, x = Residual(), inputs(8, 3, 10, 10)
    known = analysis(model, x)
    plan = st.plan(known, rule, forms=forms)
    again = st.Plan.load(plan.save(tmp_path / "plan.json"))
    assert again == plan
    assert all((layer.rank_in is not None) == (layer.form == "tucker2") for layer in again)
    first, second = (st.compress(model, each, example_inputs=x, analysis=known) for each in (plan, again))
    assert first.plan == second.plan == plan
    assert all(
        torch.equal(own, other) for own, other in zip(first.model.parameters(), second.model.parameters(), strict=True)
    )


def edited(plan: st.Plan, which: str, changes: dict[str, Any]) -> st.Plan:
    """The plan as a person changes it in its file: validated, with all its other numbers as they were."""
    layers = [layer.model_dump() | (changes if layer.name == which else {}) for layer in plan]
    return st.Plan.model_validate(plan.model_dump() | {"layers": layers})


EDITS: dict[str, dict[str, Any]] = {
    "another rank": {"form": "channel", "rank": 3, "rank_in": None},
    "spatial": {"form": "spatial", "rank": 5, "rank_in": None},
    "tucker2": {"form": "tucker2", "rank": 4, "rank_in": 6},
    "dense": {"form": "dense", "rank": None, "rank_in": None, "metric": None},
}


@pytest.mark.parametrize("change", EDITS.values(), ids=EDITS.keys())
def test_a_plan_edited_by_hand_is_followed_and_its_numbers_are_made_anew(change: dict[str, Any]) -> None:
    model = small_cnn()
    known = analysis(model, X)
    plan = edited(st.plan(known, st.Rank(4)), "2", change)
    compressed = st.compress(model, plan, example_inputs=X, analysis=known)
    layer = compressed.plan["2"]
    assert (layer.form, layer.rank, layer.rank_in) == (change["form"], change["rank"], change["rank_in"])
    assert compressed.plan.kept_cost.macs == compressed.measurement.macs
    assert compressed.plan.kept_cost.params == compressed.measurement.params
    if layer.form != "dense":
        assert layer.reason.endswith("set by hand in the plan")
        assert (model[2].weight.shape, compressed.model[2].form) == (compressed.model[2].weight.shape, layer.form)


WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "form": ("6", {"form": "spatial"}, "channel"),
    "linear as channel": ("12", {"form": "channel"}, "linear"),
    "rank": ("2", {"form": "channel", "rank": 25, "full_rank": 30}, "above its full rank 24"),
    "spatial rank": ("2", {"form": "spatial", "rank": 49, "full_rank": 99}, "above its full rank 48"),
    "input rank": ("2", {"form": "tucker2", "rank": 4, "rank_in": 17}, "rank 17 and 4"),
    "metric": ("2", {"metric": "loss"}, "loss metric"),
    "shape": ("2", {"shape": (24, 16, 3, 5)}, "another model"),
    "name": ("2", {"name": "22"}, "no layer '22'"),
}


@pytest.mark.parametrize(("name", "change", "message"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_edit_is_one_clear_error(name: str, change: dict[str, Any], message: str) -> None:
    model = small_cnn()
    known = analysis(model, X)
    plan = edited(st.plan(known, st.Rank(4)), name, change)
    with pytest.raises(errors.PlanError, match=message):
        st.compress(model, plan, example_inputs=X, analysis=known)


@pytest.mark.parametrize("cost", COSTS)
def test_the_curve_goes_from_the_smallest_network_to_nearly_the_dense_one(cost: CostName) -> None:
    model = small_cnn()
    known = analysis(model, X)
    curve = st.pareto(known, cost=cost, points=12)
    assert (curve.cost, len(curve)) == (cost, 12)
    shares, lost = ([getattr(point, name) for point in curve] for name in ("kept", "lost"))
    assert shares == sorted(shares)
    assert lost == sorted(lost, reverse=True)
    assert shares[0] < 0.5 * shares[-1]
    assert shares[-1] <= 1
    for point in list(curve)[::3]:
        compressed = st.compress(model, point.plan, example_inputs=X, analysis=known)
        if cost == "bytes":  # of a file's header only a bound is known
            assert 0.95 * point.kept <= ratio(compressed, cost) <= point.kept
        else:
            assert ratio(compressed, cost) == pytest.approx(point.kept, rel=1e-12)
        assert point.lost == pytest.approx(squares(point.plan), abs=1e-9)
        assert point.plan.rule.limits == cost  # type: ignore[union-attr]


def test_the_curve_and_the_budgets_agree() -> None:
    known = analysis(small_cnn(), X)
    for point in list(st.pareto(known, points=5))[1:]:
        rule = point.plan.rule
        assert isinstance(rule, st.Budget)
        again = st.plan(known, rule)
        assert squares(again) == pytest.approx(point.lost, rel=1e-2)


def test_a_curve_of_nothing_is_refused() -> None:
    known = st.analyze(small_mlp(), inputs(2, 12))
    with pytest.raises(errors.PlanError, match="macs, params and bytes"):
        st.pareto(known, cost="time")  # type: ignore[arg-type]
    with pytest.raises(errors.RuleError, match="at least 2"):
        st.pareto(known, points=1)


def test_the_full_rank_is_that_of_the_form() -> None:
    model = nn.Sequential(nn.Conv2d(6, 8, 3, padding=1), nn.Flatten(), nn.Linear(8 * 16, 3))
    x = torch.randn(2, 6, 4, 4)
    small = st.compress(model, st.Rank(9), example_inputs=x, forms=("spatial",), include="0", allow_growth=True)
    assert (small.plan["0"].form, small.plan["0"].rank) == ("spatial", 9)
    with pytest.raises(st.errors.RuleError, match="has full rank 8"):
        st.compress(model, st.Rank(9), example_inputs=x, include="0")


def test_a_budget_out_of_reach_says_what_stays_dense_and_why() -> None:
    model, x = small_mlp(), inputs(4, 12)
    model[0].register_forward_hook(lambda *_: None)
    with pytest.raises(errors.RuleError, match=r"cannot be reached: .*; 1 layers stay dense, .* 0: it carries hooks"):
        st.compress(model, st.Budget(macs=0.05), example_inputs=x)


def test_a_share_of_nothing_is_refused() -> None:
    model, x = small_mlp(), inputs(4, 12)
    with pytest.raises(errors.RuleError, match=r"of='body'.* cannot be reached.*not selected by include and exclude"):
        st.compress(model, st.Budget(macs=0.5, of="body"), example_inputs=x, exclude="*")
