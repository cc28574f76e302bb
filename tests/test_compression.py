"""The one-call path: what it keeps, what it rejects, and that it leaves its arguments alone."""

import copy
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Double, SharedModule, Tied, WordModel, full_ranks, inputs, same_state, small_cnn, small_mlp, state
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations

import spectrim as st
from spectrim import errors
from spectrim.benchmark.latencies import FormTimes, LatencyTable, LayerTimes
from spectrim.core.plans import LatencyNote
from spectrim.planning import pipeline


def answer(model: nn.Module, *args: Any) -> Tensor:
    with torch.no_grad():
        y: Tensor = model(*args)
    return y


X = inputs(24, 12)


class TestSelection:
    def test_all_but_the_last_layer_is_one_argument(self) -> None:
        compressed = st.compress(small_mlp(), st.Rank(3), example_inputs=X, keep_last=True)
        assert [layer.form for layer in compressed.plan] == ["linear", "linear", "dense"]
        assert compressed.plan["4"].reason == "the last layer, kept dense as asked"

    def test_patterns_choose_layers(self) -> None:
        compressed = st.compress(small_mlp(), st.Rank(3), example_inputs=X, include=["0", "2"], exclude="2")
        assert [layer.name for layer in compressed.plan.factored] == ["0"]
        assert compressed.plan["2"].reason == "not selected by include and exclude"

    def test_a_layer_that_would_grow_stays_dense_and_the_plan_names_the_break_even_rank(self) -> None:
        compressed = st.compress(small_mlp(), st.Ratio(0.9), example_inputs=X, keep_last=True)
        assert not compressed.plan.factored
        assert compressed.plan["2"].break_even == 7  # 7 * 32 < 256 <= 8 * 32
        assert "only up to rank 7 (break-even)" in compressed.plan["2"].reason
        assert torch.equal(answer(compressed.model, X), answer(small_mlp(), X))

    def test_at_the_break_even_rank_a_layer_shrinks_and_above_it_does_not(self) -> None:
        for rank, form in ((7, "linear"), (8, "dense")):
            compressed = st.compress(small_mlp(), st.Rank(rank), example_inputs=X, include="2")
            assert compressed.plan["2"].form == form
        assert st.compress(small_mlp(), st.Rank(7), example_inputs=X, include="2").measurement.params_ratio < 1

    def test_a_bias_that_the_mean_correction_adds_counts_against_the_layer(self) -> None:
        model = small_mlp(bias=False)
        plain = st.compress(model, st.Rank(7), example_inputs=X, include="2")
        active = st.compress(model, st.Rank(7), example_inputs=X, data=[X], include="2")
        assert plain.plan["2"].form == "linear"
        assert plain.model[2].bias is None
        assert active.plan["2"].break_even == 7  # 7 * 32 + 16 < 256
        assert active.model[2].bias is not None
        assert active.plan["2"].kept.params == 7 * 32 + 16

    @pytest.mark.parametrize(("rule", "rank"), [(st.Rank(2), 2), (st.Ratio(0.29), 4), (st.Ratio(0.01), 1)])
    def test_rules_give_ranks(self, rule: Any, rank: int) -> None:
        compressed = st.compress(small_mlp(), rule, example_inputs=X, include="2", allow_growth=True)
        assert compressed.plan["2"].rank == rank

    def test_the_plan_counts_what_the_model_then_has(self) -> None:
        for data in (None, [X]):
            for model in (small_mlp(), small_mlp(bias=False), Double(), Tied().double(), SharedModule().double()):
                model = model.double()
                x = inputs(5, next(model.parameters()).shape[1])
                compressed = st.compress(model, st.Rank(2), example_inputs=x, data=data and [x], keep_last=True)
                assert compressed.plan.factored
                assert compressed.plan.kept_cost.params == compressed.measurement.params
                assert compressed.plan.kept_cost.macs == compressed.measurement.macs
                assert compressed.plan.dense_cost.macs == st.measure(model, x, latency=False).macs


class TestSharing:
    def test_a_layer_called_twice_is_factored_once_and_counted_twice(self) -> None:
        model, x = Double().double(), inputs(10, 6)
        analysis = st.analyze(model, x)
        assert analysis["again"].positions.output == 20
        compressed = st.compress(model, st.Ratio(1.0), example_inputs=x, data=[x], allow_growth=True)
        torch.testing.assert_close(answer(compressed.model, x), answer(model, x))

    def test_tied_weights_stay_tied_and_each_place_keeps_its_own_mean(self) -> None:
        model, x = Tied().double(), inputs(40, 8)
        compressed = st.compress(model, st.Rank(2), example_inputs=x, data=[x], keep_last=True)
        first, second = compressed.model.first, compressed.model.second
        assert first.down.weight is second.down.weight
        assert first.up.weight is second.up.weight
        assert first.up.bias is not second.up.bias
        assert compressed.plan["second"] is compressed.plan["first"]
        seen = {}
        for name, net in (("dense", model), ("small", compressed.model)):
            net.first.register_forward_hook(lambda _m, _i, out, key=name: seen.update({key: out}))
            answer(net, x)
        torch.testing.assert_close(seen["small"].mean(dim=0), seen["dense"].mean(dim=0))

    def test_one_layer_under_two_names_becomes_one_layer_under_two_names(self) -> None:
        compressed = st.compress(SharedModule().double(), st.Rank(2), example_inputs=inputs(5, 8), keep_last=True)
        assert isinstance(compressed.model.one, st.LowRankLinear)
        assert compressed.model.one is compressed.model.other
        merged = st.merge(compressed.model)
        assert merged.one is merged.other

    def test_merging_keeps_ties(self) -> None:
        merged = st.merge(st.compress(Tied().double(), st.Rank(2), example_inputs=inputs(5, 8)).model)
        assert merged.first.weight is merged.second.weight

    def test_a_weight_shared_with_an_embedding_stays_dense(self) -> None:
        compressed = st.compress(WordModel(), st.Rank(2), example_inputs=torch.arange(5))
        assert compressed.plan["hidden"].form == "linear"
        assert compressed.plan["out"].form == "dense"
        assert "embed (Embedding)" in compressed.plan["out"].reason
        assert compressed.model.out.weight is compressed.model.embed.weight

    def test_a_tie_to_a_layer_that_is_left_out_keeps_both_dense(self) -> None:
        compressed = st.compress(Tied().double(), st.Rank(2), example_inputs=inputs(5, 8), exclude="second")
        assert compressed.plan["first"].form == "dense"
        assert "shares its weight with second" in compressed.plan["first"].reason


class TestLayersThatStayDense:
    def test_attention_that_is_left_out_and_feed_forward_layers_that_are_factored(self) -> None:
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(16, 4, 64, batch_first=True, dtype=torch.float64)
        model, x = nn.TransformerEncoder(layer, 2).eval(), inputs(3, 5, 16)
        chosen = {"exclude": "*self_attn*", "allow_growth": True}
        compressed = st.compress(model, st.Ratio(1.0), example_inputs=x, data=[x], **chosen)
        assert [layer.name for layer in compressed.plan.factored] == [
            f"layers.{number}.linear{half}" for number in (0, 1) for half in (1, 2)
        ]
        with torch.inference_mode():  # the fused kernel of torch must not go around the factors
            torch.testing.assert_close(compressed.model(x), model(x))
            compressed.model.layers[0].linear1.up.bias.fill_(torch.inf)
            assert not compressed.model(x).isfinite().all()
        assert st.merge(compressed.model).layers[0].activation_relu_or_gelu == 1

    @pytest.mark.filterwarnings("ignore:the compressed network multiplies")  # its forward is bound to the dense network
    def test_the_plan_gives_the_reason(self) -> None:
        class Own(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x)

        model = nn.Sequential(
            nn.Conv2d(1, 2, 3),
            nn.Flatten(),
            Own(8, 8),
            parametrizations.spectral_norm(nn.Linear(8, 8)),
            nn.Linear(8, 8),
            nn.Linear(8, 8),
        ).double()
        model[4].register_forward_hook(lambda *_: None)
        model.unused = nn.Linear(3, 3)
        model.forward = lambda x: nn.Sequential(*list(model)[:-1])(x)  # type: ignore[method-assign]
        compressed = st.compress(model, st.Rank(2), example_inputs=inputs(2, 1, 4, 4))
        reasons = [compressed.plan[name].reason for name in ("0", "2", "3", "4", "unused")]
        for reason, part in zip(
            reasons, ("would not be smaller", "subclass", "parametrised", "hooks", "not called"), strict=True
        ):
            assert part in reason

    def test_compressing_twice_leaves_the_factors_alone(self) -> None:
        once = st.compress(small_mlp(), st.Rank(2), example_inputs=X, include="0").model
        twice = st.compress(once, st.Rank(3), example_inputs=X)
        assert twice.plan["0.down"].reason == "already a low-rank factor; st.merge(model) undoes it"
        assert twice.plan["2"].form == "linear"


class TestNothingIsTouched:
    def test_the_input_model_is_bit_identical_and_so_are_its_modes(self) -> None:
        model = small_mlp().train()
        model[1].eval()
        before, flags = state(model), [module.training for module in model.modules()]
        random = torch.get_rng_state()
        compressed = st.compress(model, st.Rank(2), example_inputs=X, data=[X])
        st.measure(compressed.model, X, reference=model, rounds=5)
        assert same_state(model, before)
        assert [module.training for module in model.modules()] == flags
        assert torch.equal(torch.get_rng_state(), random)
        assert torch.is_grad_enabled()
        assert compressed.model.training
        assert compressed.model[0].training
        assert compressed.model[0].down.training

    def test_the_copy_shares_no_memory_with_the_input(self) -> None:
        model = small_mlp()
        compressed = st.compress(model, st.Rank(2), example_inputs=X, include="0")
        mine = {tensor.data_ptr() for tensor in model.state_dict().values()}
        assert not mine & {tensor.data_ptr() for tensor in compressed.model.state_dict().values()}

    def test_inplace_changes_and_returns_the_model_itself(self) -> None:
        model = small_mlp()
        compressed = st.compress(model, st.Rank(2), example_inputs=X, inplace=True)
        assert compressed.model is model
        assert isinstance(model[0], st.LowRankLinear)

    def test_a_frozen_weight_gives_frozen_factors(self) -> None:
        model = small_mlp()
        model[0].weight.requires_grad_(False)
        compressed = st.compress(model, st.Rank(2), example_inputs=X)
        assert not compressed.model[0].down.weight.requires_grad
        assert compressed.model[2].down.weight.requires_grad


def broken(value: float) -> nn.Sequential:
    model = small_mlp()
    with torch.no_grad():
        model[2].weight[1, 1] = value
    return model


BAD: dict[str, tuple[Callable[[nn.Module], object], type[errors.SpectrimError], str]] = {
    "rank 0": (lambda m: st.compress(m, st.Rank(0), example_inputs=X), errors.RuleError, r"Rank\(0\)"),
    "negative rank": (lambda m: st.compress(m, st.Rank(-3), example_inputs=X), errors.RuleError, r"Rank\(-3\)"),
    "half a rank": (lambda m: st.compress(m, st.Rank(2.5), example_inputs=X), errors.RuleError, "whole number"),
    "rank above full": (
        lambda m: st.compress(m, st.Rank(5), example_inputs=X),
        errors.RuleError,
        r"4 \[4, 16\] has full rank 4.*keep_last",
    ),
    "energy 0": (lambda m: st.compress(m, st.Energy(0.0), example_inputs=X), errors.RuleError, "above 0"),
    "energy above 1": (lambda m: st.compress(m, st.Energy(1.1), example_inputs=X), errors.RuleError, "at most 1"),
    "ratio NaN": (lambda m: st.compress(m, st.Ratio(float("nan")), example_inputs=X), errors.RuleError, "Ratio"),
    "not a rule": (lambda m: st.compress(m, 20, example_inputs=X), errors.RuleError, r"Rank\(20\)"),
    "wrong input shape": (
        lambda m: st.compress(m, st.Rank(2), example_inputs=torch.zeros(2, 5).double()),
        errors.ModelError,
        r"float64 \[2, 5\]",
    ),
    "empty data": (lambda m: st.compress(m, st.Rank(2), example_inputs=X, data=[]), errors.DataError, "empty"),
    "wrong batch shape": (
        lambda m: st.compress(m, st.Rank(2), example_inputs=X, data=[X, torch.zeros(2, 5).double()]),
        errors.DataError,
        r"batch 1 \(float64 \[2, 5\]\)",
    ),
    "NaN in the data": (
        lambda m: st.compress(m, st.Rank(2), example_inputs=X, data=[X * torch.nan]),
        errors.DataError,
        "inputs of layer '0'",
    ),
    "pattern that matches nothing": (
        lambda m: st.compress(m, st.Rank(2), example_inputs=X, exclude="44"),
        errors.PatternError,
        "near names: 4",
    ),
    "a plan and a selection": (
        lambda m: st.compress(m, st.plan(st.analyze(m, X), st.Rank(2)), example_inputs=X, keep_last=True),
        errors.PlanError,
        "already says which layers",
    ),
    "activation metric without data": (
        lambda m: st.plan(st.analyze(m, X), st.Ratio(0.5), metric="activation"),
        errors.PlanError,
        "calibration=",
    ),
}


@pytest.mark.parametrize(("call", "kind", "message"), BAD.values(), ids=BAD.keys())
@pytest.mark.parametrize("inplace", [False], ids=[""])
def test_bad_input_is_one_clear_error_and_leaves_the_model_bit_identical(
    call: Callable[[nn.Module], object], kind: type[errors.SpectrimError], message: str, inplace: bool
) -> None:
    model = small_mlp()
    before = state(model)
    with pytest.raises(kind, match=f"(?s){message}") as caught:
        call(model)
    assert "\n" not in str(caught.value)
    assert same_state(model, before)
    assert all(type(module) in (nn.Sequential, nn.Linear, nn.ReLU) for module in model.modules())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_infinite_weights_are_named(value: float) -> None:
    with pytest.raises(errors.ModelError, match=r"2\.weight holds NaN or infinite"):
        st.compress(broken(value), st.Rank(2), example_inputs=X)
    with pytest.raises(errors.ModelError, match=r"2\.weight"):
        st.analyze(broken(value), X)


def test_a_model_without_layers_or_of_one_layer_is_refused() -> None:
    with pytest.raises(errors.ModelError, match="no Linear or convolution"):
        st.compress(nn.Sequential(nn.ReLU()), st.Rank(1), example_inputs=X)
    with pytest.raises(errors.ModelError, match=r"nn\.Sequential\(layer\)"):
        st.compress(nn.Linear(12, 4).double(), st.Rank(1), example_inputs=X)


def test_a_model_that_cannot_be_copied_says_so() -> None:
    model = small_mlp()
    model.result = answer(model, X).requires_grad_() * 2
    with pytest.raises(errors.ModelError, match="inplace=True"):
        st.compress(model, st.Rank(2), example_inputs=X)


def test_factors_that_overflow_half_precision_are_refused_before_anything_changes() -> None:
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Identity()).half()
    with torch.no_grad():
        model[0].weight.fill_(60000.0)
    before = state(model)
    compressed = st.compress(model, st.Rank(1), example_inputs=torch.zeros(1, 64).half())
    assert all(tensor.isfinite().all() for tensor in compressed.model.state_dict().values())
    assert same_state(model, before)


class TestDegenerate:
    """Singular covariances and the like: finite results, no warning but that of few samples."""

    @pytest.mark.parametrize(
        "x",
        {
            "one sample": inputs(1, 12),
            "constant inputs": torch.ones(30, 12).double(),
            "all zero inputs": torch.zeros(30, 12).double(),
            "duplicated features": inputs(30, 6).repeat(1, 2),
            "fewer samples than features": inputs(4, 12),
            "huge and tiny features": inputs(30, 12) * torch.logspace(-12, 12, 12).double(),
        }.items(),
        ids=lambda case: case[0],
    )
    @pytest.mark.parametrize("rule", [st.Rank(3), st.Energy(0.9), st.Ratio(0.3)], ids=str)
    def test_degenerate_inputs(self, x: tuple[str, Tensor], rule: Any) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", message="the calibration data")
            model = small_mlp()
            compressed = st.compress(model, rule, example_inputs=x[1], data=[x[1]], keep_last=True, allow_growth=True)
            assert answer(compressed.model, x[1]).isfinite().all()
            assert answer(compressed.model, X).isfinite().all()

    @pytest.mark.parametrize("x", [inputs(1, 12), torch.ones(30, 12).double()], ids=["one", "the same"])
    def test_samples_that_do_not_differ_are_as_no_data(self, x: Tensor) -> None:
        model = small_mlp()
        with pytest.warns(UserWarning, match="says nothing of others"):
            with_data = st.compress(model, st.Budget(macs=0.8), example_inputs=x, data=[x])
        assert with_data.plan == st.compress(model, st.Budget(macs=0.8), example_inputs=x).plan
        with pytest.raises(st.errors.DataError, match="metric='activation' cannot be taken from"):
            st.compress(model, st.Rank(3), example_inputs=x, data=[x], metric="activation")

    def test_few_samples_are_said(self) -> None:
        x = inputs(5, 12)
        with pytest.warns(UserWarning, match="are 5 samples.* 128 samples or more"):
            st.compress(small_mlp(), st.Budget(macs=0.8), example_inputs=x, data=[x])

    @pytest.mark.parametrize("data", [None, [X]], ids=["plain", "activation"])
    @pytest.mark.parametrize("rule", [st.Rank(3), st.Energy(0.9), st.Ratio(0.3)], ids=str)
    def test_all_zero_weights(self, data: Any, rule: Any) -> None:
        model = small_mlp()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        compressed = st.compress(model, rule, example_inputs=X, data=data, keep_last=True)
        assert torch.equal(answer(compressed.model, X), answer(model, X))
        assert compressed.plan["0"].predicted_error == 0


class BlockedGradient(nn.Module):
    """A head on features through which no gradient passes, although they matter."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how = how
        self.features = nn.Sequential(nn.Linear(12, 48), nn.ReLU(), nn.Linear(48, 48))
        self.head = nn.Sequential(nn.Linear(48, 24), nn.ReLU(), nn.Linear(24, 4))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad() if self.how == "no_grad" else nullcontext():
            features = self.features(x).detach() if self.how == "detach" else self.features(x)
        return self.head(features.sign() * features.round(decimals=2) if self.how == "rounded" else features.relu())


@pytest.mark.parametrize(
    ("how", "metric"),
    [("plain", "loss"), ("no_grad", "activation"), ("detach", "activation"), ("rounded", "activation")],
)
def test_layers_that_no_gradient_reaches_are_weighed_by_their_outputs(how: str, metric: str) -> None:
    small = st.compress(BlockedGradient(how), st.Budget(macs=0.5), example_inputs=X[:1], data=X.split(10))
    assert small.plan.metric == metric
    assert small.plan["features.2"].is_factored
    with pytest.raises(errors.RuleError) if how != "plain" else nullcontext():
        st.compress(BlockedGradient(how), st.Budget(macs=0.5), example_inputs=X[:1], data=X.split(10), metric="loss")


@pytest.mark.parametrize("outputs", [1, 2, 3])
def test_a_regressor_is_better_with_data_than_without(outputs: int) -> None:
    """Its outputs have no common shift that does not matter, and its narrow head is not free."""
    torch.manual_seed(0)
    x = torch.randn(1500, 24)
    directions = torch.randn(24, 2 * outputs) / 5
    y = torch.sin(x @ directions[:, ::2]) + x @ directions[:, 1::2]
    model = nn.Sequential(nn.Linear(24, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, outputs))
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(15):
        for inputs_, targets in zip(x[:1000].split(50), y[:1000].split(50), strict=True):
            optimiser.zero_grad()
            functional.mse_loss(model(inputs_), targets).backward()
            optimiser.step()

    def error(network: nn.Module) -> float:
        return float(functional.mse_loss(answer(network, x[1000:]), y[1000:]))

    options: dict[str, Any] = {"example_inputs": x[:1]}
    with_data = st.compress(model.eval(), st.Budget(macs=0.5), data=x[:512].split(128), **options).model
    without = st.compress(model, st.Budget(macs=0.5), **options).model
    assert error(with_data) <= min(error(without), 2 * error(model))


class TestPlanAndData:
    def test_a_plan_goes_through_a_file_and_gives_the_same_model(self, tmp_path: Path) -> None:
        model = small_mlp()
        first = st.compress(model, st.Energy(0.8), example_inputs=X, data=[X], keep_last=True)
        plan = st.Plan.load(first.plan.save(tmp_path / "plan.json"))
        assert plan == first.plan
        again = st.compress(model, plan, example_inputs=X, data=[X])
        assert same_state(again.model, state(first.model))
        assert again.plan == first.plan

    def test_an_edited_rank_is_taken_and_its_numbers_are_made_anew(self, tmp_path: Path) -> None:
        model = small_mlp()
        path = st.plan(st.analyze(model, X), st.Rank(3)).save(tmp_path / "plan.json")
        path.write_text(
            path.read_text().replace('"rank": 3,\n      "full_rank": 12', '"rank": 5,\n      "full_rank": 12')
        )
        compressed = st.compress(model, st.Plan.load(path), example_inputs=X)
        assert compressed.model[0].rank == 5
        assert compressed.plan["0"].kept.params == 5 * 28 + 16
        assert compressed.plan["0"].reason == "rank 5 set by hand in the plan"
        assert compressed.plan["2"].rank == 3

    def test_a_plan_for_another_model_is_refused(self) -> None:
        plan = st.plan(st.analyze(small_mlp(), X), st.Rank(2))
        other = nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 4)).double()
        before = state(other)
        with pytest.raises(errors.PlanError, match="for another model"):
            st.compress(other, plan, example_inputs=X)
        assert same_state(other, before)

    def test_a_plan_in_the_activation_metric_needs_data(self) -> None:
        model = small_mlp()
        plan = st.compress(model, st.Rank(2), example_inputs=X, data=[X]).plan
        with pytest.raises(errors.PlanError, match="data="):
            st.compress(model, plan, example_inputs=X)

    def test_labels_in_the_batches_are_set_aside(self) -> None:
        model, labels = small_mlp(), torch.zeros(24)
        unlabelled = st.compress(model, st.Rank(2), example_inputs=X, data=[X])
        for example, batch in ((X, (X, labels)), ((X,), [X, labels]), ({"input": X}, ({"input": X}, labels))):
            labelled = st.compress(model, st.Rank(2), example_inputs=example, data=[batch])
            assert same_state(labelled.model, state(unlabelled.model))

    @pytest.mark.parametrize(
        "wrong", [{"rule_or_plan": st.Rank(13)}, {"rule_or_plan": st.Rank(2), "exclude": "x"}], ids=["rank", "pattern"]
    )
    def test_mistakes_are_seen_before_any_data_is_read(self, wrong: Any) -> None:
        data = iter([X])
        with pytest.raises(errors.SpectrimError):
            st.compress(small_mlp(), **wrong, example_inputs=X, data=data)
        assert next(data) is X

    def test_an_analysis_and_a_selection_together_raise(self) -> None:
        model = small_mlp()
        analysis = st.analyze(model, X)
        for more in ({"keep_last": True}, {"exclude": "4"}, {"include": "2"}):
            with pytest.raises(errors.PlanError, match=r"to st\.analyze"):
                st.compress(model, st.Rank(2), example_inputs=X, analysis=analysis, **more)

    def test_layers_that_stay_dense_cost_no_statistics(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[st.Calibration] = []
        real = pipeline.calibrate
        monkeypatch.setattr(pipeline, "calibrate", lambda *a, **k: seen.append(real(*a, **k)) or seen[-1])
        st.compress(small_mlp(), st.Rank(2), example_inputs=X, data=[X], exclude="2", keep_last=True)
        assert set(seen[0].moments) == {"0"}

    def test_max_batches_stops_an_endless_stream(self) -> None:
        def endless() -> Any:
            while True:
                yield X

        st.compress(small_mlp(), st.Rank(2), example_inputs=X, data=endless(), max_batches=2)

    def test_one_analysis_serves_many_plans(self) -> None:
        model = small_mlp()
        analysis = st.analyze(model, X, calibration=st.calibrate(model, [X]), keep_last=True)
        for rank in (1, 4):
            direct = st.compress(model, st.Rank(rank), example_inputs=X, data=[X], keep_last=True, reconstruct=False)
            reused = st.compress(model, st.plan(analysis, st.Rank(rank)), example_inputs=X, analysis=analysis)
            assert same_state(direct.model, state(reused.model))

    def test_calibrate_needs_to_know_of_labels(self) -> None:
        with pytest.raises(errors.DataError, match="labels=True"):
            st.calibrate(small_mlp(), [(X, torch.zeros(24))])
        assert st.calibrate(small_mlp(), [(X, torch.zeros(24))], labels=True).batches == 1

    def test_a_calibration_of_another_model_is_refused(self) -> None:
        other = nn.Sequential(nn.Linear(7, 16), nn.ReLU()).double()
        with pytest.raises(errors.DataError, match="another model"):
            st.analyze(small_mlp(), X, calibration=st.calibrate(other, [inputs(5, 7)]))


@pytest.mark.gpu
def test_a_model_on_a_gpu_stays_there() -> None:
    model = copy.deepcopy(small_mlp(dtype=torch.float32)).cuda()
    compressed = st.compress(model, st.Rank(2), example_inputs=X.float(), data=[X.float()], keep_last=True)
    assert all(parameter.is_cuda for parameter in compressed.model.parameters())
    assert st.measure(compressed.model, X.float(), reference=model, rounds=5).speedup is not None
    again = st.compress(
        small_mlp(dtype=torch.float32), st.Rank(2), example_inputs=X.float(), data=[X.float()], keep_last=True
    )
    torch.testing.assert_close(
        answer(compressed.model, X.float().cuda()).cpu(), answer(again.model, X.float()), rtol=1e-3, atol=1e-3
    )


def feed_forward() -> nn.Sequential:
    """Layers whose factors are ten times less work, on a batch that is large enough for that to be seen."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))


def optimistic_table(model: nn.Module, x: Tensor) -> tuple[st.Analysis, LatencyTable]:
    """A table that takes factors for no work at all, and the analysis for it."""
    known = st.analyze(model, x)
    layers = []
    for layer in known:
        assert layer.geometry is not None
        top = layer.break_even(layer.forms[0], "plain")
        forms = (FormTimes(form=layer.forms[0], axes=((1, top),), ms=(1e-4, 1e-3)),) if top > 1 else ()
        layers.append(LayerTimes(name=layer.name, dense_ms=1.0, forms=forms))
    table = LatencyTable(
        runtime="torch", threads=1, fingerprint="", rank_multiple=1, network_ms=len(layers), layers=tuple(layers)
    )
    return known, table


class TestLatency:
    @pytest.mark.parametrize(("runtime", "multiple"), [("torch", None), ("onnxruntime", 16)])
    def test_a_network_is_measured_before_it_is_given_out(
        self, runtime: str, multiple: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if runtime == "onnxruntime":
            pytest.importorskip("onnxruntime")
        monkeypatch.setenv("SPECTRIM_LATENCY", str(tmp_path))
        model, x = feed_forward(), torch.randn(32, 64)
        before, random = state(model), torch.get_rng_state()
        stages: list[str] = []
        compressed = st.compress(
            model,
            st.Budget(latency=0.8, runtime=runtime, batch=64),
            example_inputs=x,
            data=[x],
            rank_multiple=multiple,
            on_progress=lambda what, *_: stages.append(what),
        )
        note = compressed.plan.latency
        assert note is not None
        assert note.verified
        assert (note.runtime, note.threads, note.batch) == (runtime, 1, 64)
        assert note.low <= note.measured <= note.high  # type: ignore[operator]
        assert same_state(model, before)
        assert torch.equal(random, torch.get_rng_state())
        assert {"time 0", f"verify in {runtime}"} < set(stages)
        if compressed.refused is None:  # what the clock says is not for a test to say: either way something must hold
            assert note.high < 1  # type: ignore[operator]
            assert compressed.plan.factored
            assert 0 < (compressed.measurement.params_ratio or 0) < 1
            assert "fit 2" in stages
            assert (note.measured <= 0.8 * 1.02) == (note.missed is None)  # type: ignore[operator]
        else:
            assert torch.equal(compressed.model(x), model(x))
            assert not compressed.plan.factored

    @pytest.mark.parametrize("inplace", [False, True])
    def test_where_nothing_is_faster_the_model_comes_back_as_it_was(self, inplace: bool) -> None:
        model, x = small_mlp(), X[:1]  # so small that a second call takes longer than all the arithmetic
        known, table = optimistic_table(model, x)
        before, modules = state(model), list(model)
        compressed = st.compress(
            model,
            st.Budget(latency=0.6),
            example_inputs=x,
            data=[X],
            analysis=known,
            latencies=table,
            inplace=inplace,
        )
        assert compressed.refused is not None
        assert compressed.refused.startswith("not surely faster: measured")
        assert not compressed.plan.factored
        assert any(layer.reason == compressed.refused for layer in compressed.plan)
        assert (compressed.model is model) == inplace
        assert same_state(compressed.model, before)
        assert list(model) == modules
        measured = compressed.measurement
        assert measured.params_ratio == measured.bytes_ratio == measured.macs_ratio == 1
        again = st.compress(model, compressed.plan, example_inputs=x, data=[X])
        assert again.refused == compressed.refused
        assert same_state(again.model, before)

    def test_a_network_whose_file_would_grow_is_left_as_it_was(self) -> None:
        model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        x = torch.randn(3, 8)
        note = LatencyNote(runtime="torch", threads=1, fingerprint="", dense_ms=1.0, predicted=0.5, measured=0.5)
        known = st.analyze(model, x)
        plan = st.plan(known, st.Rank(3))
        plain = st.compress(model, plan, example_inputs=x, analysis=known)
        assert plan.factored
        assert (plain.measurement.bytes_ratio or 0) > 1
        assert (plain.measurement.params_ratio or 1) < 1
        compressed = st.compress(model, plan.model_copy(update={"latency": note}), example_inputs=x, analysis=known)
        assert compressed.refused is not None
        assert "the file would grow from" in compressed.refused
        assert same_state(compressed.model, state(model))

    def test_a_budget_out_of_reach_is_refused(self) -> None:
        model = small_mlp()
        known, table = optimistic_table(model, X)
        with pytest.raises(errors.RuleError, match=r"cannot be reached: (the fastest this|with all its layers)"):
            st.compress(model, st.Budget(latency=1e-6), example_inputs=X, analysis=known, latencies=table)

    def test_bad_input_raises_before_long_work(self) -> None:
        def data() -> Any:
            raise AssertionError("the data were read")
            yield

        model = small_mlp()
        plan = st.plan(st.analyze(model, X), st.Rank(2))
        with pytest.raises(errors.EngineError, match="runtime 'onyx' is unknown"):
            st.compress(model, st.Budget(latency=0.5, runtime="onyx"), example_inputs=X, data=data())
        with pytest.raises(errors.EngineError, match="threads=100000"):
            st.compress(model, st.Budget(latency=0.5, threads=100_000), example_inputs=X, data=data())
        with pytest.raises(errors.PlanError, match="already says which layers"):
            st.compress(model, plan, example_inputs=X, latencies=optimistic_table(model, X)[1])
        with pytest.raises(errors.RuleError, match=r"st\.probe"):
            st.plan(st.analyze(model, X), st.Rank(2), rank_multiple="auto")  # type: ignore[arg-type]

    def test_the_step_of_the_hardware_is_probed_and_stands_in_the_plan(self) -> None:
        model, x = small_cnn(), inputs(2, 3, 12, 12)
        compressed = st.compress(model, st.Ratio(0.3), example_inputs=x, rank_multiple="auto", allow_growth=True)
        step = compressed.plan.rank_multiple or 1
        assert step in (1, 8, 16, 32)
        for layer in compressed.plan.factored:
            full = full_ranks(model.get_submodule(layer.name), layer.form)
            assert all(rank % step == 0 or rank == most for rank, most in zip(layer.ranks, full, strict=True))


@pytest.mark.parametrize(("rule", "in_memory"), [(st.Rank(4), 5), (st.Budget(params=0.7), 6)], ids=str)
def test_batches_are_kept_only_where_they_are_run_again(rule: st.Rank | st.Budget, in_memory: int) -> None:
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most = 0

    def batches() -> Iterator[Tensor]:
        nonlocal most
        for seed in range(6):
            batch = inputs(5, 12, seed=seed)
            alive.add(batch)
            most = max(most, len(alive))
            yield batch
            del batch

    small = st.compress(small_mlp(), rule, example_inputs=inputs(1, 12), data=batches())
    assert most <= in_memory
    whole = [inputs(5, 12, seed=seed) for seed in range(6)]
    assert small.plan == st.compress(small_mlp(), rule, example_inputs=inputs(1, 12), data=whole).plan


class Ends(nn.Module):
    """An MLP with something done to its outputs."""

    def __init__(self, end: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.core, self.end = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)), end

    def forward(self, x: Tensor) -> Any:
        return self.end(self.core(x.to_dense() if x.layout == torch.sparse_coo else x))


DRAWN = torch.randn(128, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "end",
    [
        lambda y: y.masked_fill(torch.arange(32) < 3, -float("inf")),
        lambda y: y.relu().log(),
        lambda y: (y, (y - y) / 0),
        lambda y: torch.fft.fft(y),
    ],
    ids=["masked", "logarithm", "not a number besides", "complex"],
)
def test_a_budget_is_met_whatever_is_not_finite_among_the_outputs(end: Any) -> None:
    result = st.compress(Ends(end), st.Budget(params=0.5), example_inputs=DRAWN[:4], data=DRAWN.split(32))
    assert result.measurement.params_ratio is not None
    assert result.measurement.params_ratio <= 0.5


@pytest.mark.parametrize("end", [lambda y: y.argmax(dim=1), lambda y: y > 0, lambda y: y[:, :0]])
def test_outputs_that_cannot_be_compared_are_said(end: Any) -> None:
    with pytest.warns(UserWarning, match=r"Ends's outputs hold no numbers with fractions"):
        result = st.compress(Ends(end), st.Budget(params=0.5), example_inputs=DRAWN[:4], data=DRAWN.split(32))
    assert result.measurement.params_ratio is not None
    assert result.measurement.params_ratio <= 0.5


def test_a_half_precision_network_with_large_activations() -> None:
    data = [(100 * batch).half() for batch in DRAWN.split(32)]
    result = st.compress(Ends(lambda y: y).half(), st.Budget(macs=0.5), example_inputs=data[0][:4], data=data)
    assert result.fidelity is not None
    assert result.fidelity.plain is not None
    assert result.fidelity.relative_error <= result.fidelity.plain.relative_error


def test_empty_and_sparse_batches() -> None:
    model, rule, example = Ends(lambda y: y), st.Rank(8), DRAWN[:4]
    first_empty = st.compress(model, rule, example_inputs=example, data=[DRAWN[:0], *DRAWN.split(32)])
    sparse = st.compress(model, rule, example_inputs=example, data=[batch.to_sparse() for batch in DRAWN.split(32)])
    torch.testing.assert_close(first_empty.model(DRAWN), sparse.model(DRAWN))
    with pytest.raises(st.errors.DataError, match="no samples"):
        st.compress(model, rule, example_inputs=example, data=[DRAWN[:0]])


def test_data_for_a_plan_that_was_made_without_are_said_to_change_nothing() -> None:
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)), [torch.randn(16, 32)] * 4
    plan = st.plan(st.analyze(model, data[0]), st.Budget(macs=0.5))
    with pytest.warns(UserWarning, match="this plan was made without data: data= changes nothing"):
        st.compress(model, plan, example_inputs=data[0], data=data)
    st.compress(model, st.plan(st.analyze(model, data[0]), st.Rank(4)), example_inputs=data[0], data=data)
