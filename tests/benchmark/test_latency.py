"""Latency: tables of layer times, the plan they give, and what the clock decides about it."""

import json
from collections import Counter
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import (
    Double,
    SharedModule,
    Tied,
    build,
    form_names,
    full_ranks,
    inputs,
    same_state,
    small_cnn,
    small_mlp,
    state,
)
from hypothesis import given, settings, strategies as draw
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import spectrim as st
from spectrim import errors
from spectrim.benchmark.latencies import FormTimes, LatencyTable, LayerTimes
from spectrim.benchmark.latency_table import latency_table
from spectrim.benchmark.layer_calls import axes_of, layer_calls
from spectrim.benchmark.layer_graphs import layer_graph
from spectrim.benchmark.layer_timing import LayerBench
from spectrim.benchmark.timing_cache import cache_folder
from spectrim.core.execution import as_inputs
from spectrim.core.plans import LatencyNote
from spectrim.layers.forms import FORMS, form_named
from spectrim.planning.budgets import Candidates
from spectrim.planning.decisions import PlanOptions
from spectrim.planning.latency_budget import refined
from spectrim.planning.rules import candidates_of
from spectrim.runtimes.rank_grid import Grid
from spectrim.runtimes.timing import Interval

X = inputs(8, 3, 12, 12)
laws = settings(max_examples=60, deadline=None, derandomize=True)


def table_by(
    known: st.Analysis, ms: Callable[[st.LayerAnalysis, str, tuple[int, ...]], float], **more: Any
) -> LatencyTable:
    """A table of made-up times that are straight lines in each rank, so that its corners say it all."""
    layers = []
    for layer in known:
        if not layer.problems or layer.geometry is None:
            continue
        forms = []
        for form in layer.forms:
            step = more.get("rank_multiple", 1)
            axes = tuple(tuple(sorted({min(step, most), most})) for most in layer.full_ranks(form))
            forms.append(FormTimes(form=form, axes=axes, ms=tuple(ms(layer, form, at) for at in product(*axes))))
        layers.append(LayerTimes(name=layer.name, dense_ms=layer.dense.macs / 1e6, forms=tuple(forms)))
    options = {"runtime": "torch", "threads": 1, "fingerprint": "made up", "rank_multiple": 1}
    return LatencyTable.model_validate(
        {**options, "network_ms": known.whole.macs / 1e6, "layers": tuple(layers), **more}
    )


def by_macs(layer: st.LayerAnalysis, form: str, ranks: tuple[int, ...]) -> float:
    """A nanosecond for each multiply-accumulate."""
    return form_named(form).cost(layer.unit, ranks).macs / 1e6


def decisions(plan: st.Plan) -> list[tuple[str, str, tuple[int, ...]]]:
    return [(layer.name, layer.form, layer.ranks) for layer in plan]


@pytest.fixture(scope="module")
def known() -> st.Analysis:
    model = small_cnn()
    return st.analyze(model, X, calibration=st.calibrate(model, [X]))


class TestTimes:
    @laws
    @given(data=draw.data())
    def test_between_timed_ranks_times_are_on_straight_lines(self, data: draw.DataObject) -> None:
        ranks = draw.lists(draw.integers(1, 99), min_size=1, max_size=5, unique=True).map(
            lambda some: tuple(sorted(some))
        )
        axes = data.draw(draw.tuples(ranks, ranks) | draw.tuples(ranks))
        whole = [data.draw(draw.integers(-5, 9)) for _ in range(2 ** len(axes))]

        def bilinear(at: tuple[int, ...]) -> float:
            first, second = (*at, 0)[:2]
            terms = (1, first, second, first * second) if len(at) == 2 else (1, first)
            return float(sum(coefficient * term for coefficient, term in zip(whole, terms, strict=True)))

        form: str = "tucker2" if len(axes) == 2 else "spatial"
        times = FormTimes(form=form, axes=axes, ms=tuple(map(bilinear, product(*axes))))
        ranks_between = [tuple(data.draw(draw.integers(axis[0], axis[-1])) for axis in axes) for _ in range(4)]
        exact = np.array(list(map(bilinear, ranks_between)))
        np.testing.assert_allclose(times.at(np.array(ranks_between)), exact, rtol=1e-9, atol=1e-7)

    @pytest.mark.parametrize(
        ("axes", "ms"), [(((8, 16),), (1.0,)), (((16, 8),), (1.0, 2.0)), (((8, 8),), (1.0, 2.0)), ((), ())], ids=str
    )
    def test_times_that_do_not_fit_their_ranks_are_refused(self, axes: Any, ms: Any) -> None:
        with pytest.raises(ValueError, match=r"ascending|at least 1"):
            FormTimes(form="channel", axes=axes, ms=ms)

    def test_a_table_survives_json(self, known: st.Analysis) -> None:
        table = table_by(known, by_macs)
        assert LatencyTable.model_validate_json(table.model_dump_json()) == table

    def test_a_network_is_predicted_by_what_its_factors_change(self, known: st.Analysis) -> None:
        table = table_by(known, by_macs)
        plan = st.plan(known, st.Budget(macs=0.6))
        before, after = plan.dense_cost.macs, plan.kept_cost.macs
        assert table.predict(plan) == pytest.approx((known.whole.macs - before + after) / 1e6, rel=1e-9)
        assert table.predict(st.plan(known, st.Ratio(1.0))) == table.network_ms  # nothing would shrink

    def test_ranks_between_multiples_take_as_long_as_the_next_one(self, known: st.Analysis) -> None:
        steps = table_by(known, by_macs, rank_multiple=4)
        whole = table_by(known, by_macs)
        odd, even = (st.plan(known, st.Rank(rank), allow_growth=True, forms=("spatial",)) for rank in (6, 8))
        assert steps.predict(odd) == steps.predict(even) == pytest.approx(whole.predict(even), rel=1e-12)
        assert whole.predict(odd) < whole.predict(even)

    def test_what_was_not_timed_is_not_predicted(self, known: st.Analysis) -> None:
        plan, table = st.plan(known, st.Rank(6)), table_by(known, by_macs)
        with pytest.raises(errors.PlanError, match="no channel form of 0"):
            table.model_copy(update={"layers": table.layers[1:]}).predict(plan)
        small = FormTimes(form="channel", axes=((1, 5),), ms=(1.0, 2.0))
        short = table.layers[1].model_copy(update={"forms": (small,)})
        with pytest.raises(errors.PlanError, match=r"of 2 up to rank 5, .* wants 6"):
            table.model_copy(update={"layers": (table.layers[0], short, *table.layers[2:])}).predict(plan)


class TestSolving:
    @pytest.mark.parametrize("share", [0.45, 0.7, 0.95])
    def test_where_time_is_arithmetic_the_plans_are_those_of_the_macs(self, known: st.Analysis, share: float) -> None:
        plan = st.plan(known, st.Budget(latency=share), latencies=table_by(known, by_macs))
        assert decisions(plan) == decisions(st.plan(known, st.Budget(macs=share)))
        assert plan.latency is not None
        assert not plan.latency.verified
        assert plan.rank_multiple is None

    @pytest.mark.parametrize("multiple", [1, 4])
    @pytest.mark.parametrize("share", [0.6, 0.9])
    def test_the_prediction_keeps_the_budget(self, known: st.Analysis, share: float, multiple: int) -> None:
        numbers = np.random.default_rng(0)
        table = table_by(known, lambda *at: by_macs(*at) * numbers.uniform(0.7, 1.2), rank_multiple=multiple)
        plan = st.plan(known, st.Budget(latency=share), latencies=table)
        assert plan.latency is not None
        assert plan.factored
        assert plan.latency.predicted <= share
        assert table.predict(plan) / table.network_ms == pytest.approx(plan.latency.predicted, abs=1e-6)
        for layer in plan.factored:
            full = known[layer.name].full_ranks(layer.form)
            assert all(rank % multiple == 0 or rank == most for rank, most in zip(layer.ranks, full, strict=True))
            assert layer.kept.params < layer.dense.params

    def test_options_slower_than_the_layer_are_left_out(self, known: st.Analysis) -> None:
        def slow(layer: st.LayerAnalysis, form: str, ranks: tuple[int, ...]) -> float:
            return (50.0 + ranks[-1] if layer.name == "2" else 0.0) + by_macs(layer, form, ranks)

        plan = st.plan(known, st.Budget(latency=0.9), latencies=table_by(known, slow))
        assert plan["2"].form == "dense"
        assert "do not pay" in plan["2"].reason
        assert "take 51" in plan["2"].reason
        dense = known["2"].dense.macs / 1e6
        assert plan["2"].reason.endswith(f"the layer itself {dense:.3g} ms")
        assert plan.factored
        assert all(" ms) loses least" in layer.reason for layer in plan.factored)

    def test_a_budget_out_of_reach_names_the_fastest_and_that_one_works(self, known: st.Analysis) -> None:
        table = table_by(known, by_macs)
        with pytest.raises(errors.RuleError, match="cannot be reached: the fastest") as caught:
            st.plan(known, st.Budget(latency=0.001), latencies=table)
        least = float(str(caught.value).partition("fastest")[2].partition("latency=")[2].partition(")")[0])
        st.plan(known, st.Budget(latency=least), latencies=table)
        with pytest.raises(errors.RuleError, match="cannot be reached"):
            st.plan(known, st.Budget(latency=least - 2e-4), latencies=table)

    def test_a_network_without_a_faster_layer_is_an_error(self, known: st.Analysis) -> None:
        table = table_by(known, lambda *_: 1e3)
        with pytest.raises(errors.RuleError, match="no layer would be faster in factors with the torch runtime"):
            st.plan(known, st.Budget(latency=0.9), latencies=table)

    def test_the_curve_of_times(self, known: st.Analysis) -> None:
        table = table_by(known, by_macs)
        curve, other = st.pareto(known, cost="latency", latencies=table, points=5), st.pareto(known, points=5)
        assert [decisions(point.plan) for point in curve] == [decisions(point.plan) for point in other]
        assert all(point.plan.rule == st.Budget(latency=point.plan.rule.share) for point in curve)  # type: ignore[union-attr]

    def test_tables_and_rules_that_do_not_go_together(self, known: st.Analysis) -> None:
        table, rule = table_by(known, by_macs, rank_multiple=4), st.Budget(latency=0.7)
        with pytest.raises(errors.RuleError, match=r"st\.latency_table"):
            st.plan(known, rule)
        with pytest.raises(errors.RuleError, match=r"st\.latency_table"):
            st.plan(known, st.Budget(macs=0.5), latencies=table)
        with pytest.raises(errors.RuleError, match="belongs to a budget of latency"):
            st.plan(known, st.Rank(3), latencies=table)
        with pytest.raises(errors.RuleError, match=r"latency table is for .*'torch'.* rule is .*'openvino'"):
            st.plan(known, st.Budget(latency=0.7, runtime="openvino"), latencies=table)
        with pytest.raises(errors.RuleError, match="holds multiples of 4"):
            st.plan(known, rule, latencies=table, rank_multiple=6)
        with pytest.raises(errors.PlanError, match="of another network"):
            st.plan(st.analyze(small_mlp(), inputs(2, 12)), rule, latencies=table)
        assert st.plan(known, rule, latencies=table, rank_multiple=8).rank_multiple == 8


class Clock:
    """What a plan takes in truth, as a share of the dense time, measured to a hundredth part."""

    def __init__(self, truth: Callable[[float], float], spread: float = 0.01) -> None:
        self.truth, self.spread, self.asked = truth, spread, list[float]()

    def __call__(self, plan: st.Plan) -> Interval:
        assert plan.latency is not None
        self.asked.append(plan.latency.predicted)
        value = self.truth(plan.latency.predicted)
        return Interval(value=value, low=value * (1 - self.spread), high=value * (1 + self.spread))


class TestDecision:
    """What follows from a prediction and a measurement, with exact made-up times."""

    TARGET = 0.7

    @pytest.fixture
    def options(self, known: st.Analysis) -> Candidates:
        rule = st.Budget(latency=self.TARGET)
        return candidates_of(known, rule, PlanOptions(latencies=table_by(known, by_macs)))

    def decide(self, options: Candidates, clock: Clock) -> tuple[st.Plan, LatencyNote]:
        plan = refined(options, st.Budget(latency=self.TARGET), verify=clock)
        assert plan.latency is not None
        return plan, plan.latency

    @pytest.mark.parametrize("factor", [1.0, 0.96, 1.015])
    def test_a_prediction_that_holds_is_taken(self, options: Candidates, factor: float) -> None:
        clock = Clock(lambda share: factor * share)
        plan, note = self.decide(options, clock)
        assert len(clock.asked) == 1
        assert plan.factored
        assert (note.measured, note.solved) == (pytest.approx(factor * note.predicted), 1)
        assert note.missed is note.refused is None

    @pytest.mark.parametrize("saved", [0.6, 0.85])
    def test_smaller_real_savings_are_corrected_once(self, options: Candidates, saved: float) -> None:
        clock = Clock(lambda share: 1 - saved * (1 - share))
        plan, note = self.decide(options, clock)
        assert len(clock.asked) == 2
        assert clock.asked[1] < clock.asked[0]
        assert note.measured == pytest.approx(self.TARGET, rel=0.02)
        assert (note.solved, note.missed, note.predicted) == (2, None, clock.asked[1])
        assert plan.factored

    def test_larger_real_savings_allow_a_better_plan(self, options: Candidates) -> None:
        clock = Clock(lambda share: 1 - 1.4 * (1 - share))
        plan, note = self.decide(options, clock)
        assert clock.asked[0] < clock.asked[1]
        assert note.measured == pytest.approx(self.TARGET, rel=0.02)
        hasty = refined(options, st.Budget(latency=self.TARGET), verify=Clock(lambda share: share))
        assert sum((layer.predicted_error or 0) ** 2 for layer in plan) < sum(
            (layer.predicted_error or 0) ** 2 for layer in hasty
        )

    def test_the_gentler_plan_is_taken_only_if_it_meets_the_target(self, options: Candidates) -> None:
        times = iter([0.6, 0.9])
        _, note = self.decide(options, Clock(lambda _: next(times)))
        assert (note.measured, note.solved, note.missed) == (0.6, 2, None)

    def test_of_two_that_miss_the_faster_one_is_taken_and_the_plan_says_so(self, options: Candidates) -> None:
        for both in ([0.9, 0.85], [0.85, 0.9]):
            times = iter(both)
            plan, note = self.decide(options, Clock(lambda _, times=times: next(times)))  # type: ignore[misc]
            assert note.measured == 0.85
            assert note.missed is not None
            assert "the target is 0.7" in note.missed
            assert "0.850 of the dense time in torch" in note.missed
            assert plan.factored

    @pytest.mark.parametrize(("share", "spread"), [(1.2, 0.01), (1.0, 0.0), (0.95, 0.1)])
    def test_what_is_not_surely_faster_is_left_as_it_was(
        self, options: Candidates, share: float, spread: float
    ) -> None:
        clock = Clock(lambda _: share, spread)
        plan, note = self.decide(options, clock)
        assert len(clock.asked) == 2
        assert not plan.factored
        assert plan.kept_cost == plan.dense_cost
        assert note.refused is not None
        assert note.refused.startswith(f"not surely faster: measured {share:.3f} of the dense time in torch")
        assert note.refused in {layer.reason for layer in plan}
        assert st.Plan.model_validate_json(plan.model_dump_json(exclude_none=True)) == plan

    def test_a_budget_below_the_table_is_decided_by_measurement(self, known: st.Analysis) -> None:
        table = table_by(known, by_macs)
        with pytest.raises(errors.RuleError) as caught:
            st.plan(known, st.Budget(latency=1e-3), latencies=table)
        least = float(str(caught.value).partition("latency=0.001")[2].partition("latency=")[2].partition(")")[0])

        def decide(target: float, clock: Clock) -> st.Plan:
            rule = st.Budget(latency=target)
            candidates = candidates_of(known, rule, PlanOptions(latencies=table))
            return refined(candidates, rule, verify=clock)

        plan = decide(0.9 * least, Clock(lambda share: 0.89 * share))
        assert plan.latency is not None
        assert plan.latency.measured == pytest.approx(0.89 * plan.latency.predicted)
        assert plan.latency.measured <= 0.9 * least
        assert plan.latency.missed is None
        seen = Clock(lambda share: 0.98 * share)
        with pytest.raises(errors.RuleError, match=r"fastest this model can be .* \(measured\)") as caught:
            decide(0.9 * least, seen)
        named = str(caught.value).partition("can be is")[2].partition("latency=")[2].partition(")")[0]
        assert float(named) == pytest.approx(0.98 * least, rel=0.02)
        assert seen.asked
        far = Clock(lambda share: 0.1 * share)
        plan = decide(0.7 * least, far)
        assert plan.latency is not None
        assert plan.latency.measured <= 0.7 * least
        assert plan.latency.missed is None

    @laws
    @given(shares=draw.lists(draw.floats(0.05, 3), min_size=2, max_size=2), spread=draw.floats(0, 0.3))
    def test_every_pair_of_measurements(self, shares: list[float], spread: float) -> None:
        known = KNOWN[0]
        rule = st.Budget(latency=self.TARGET)
        options = candidates_of(known, rule, PlanOptions(latencies=table_by(known, by_macs)))
        times = iter(shares)
        clock = Clock(lambda _: next(times), spread)
        plan, note = self.decide(options, clock)
        assert note.solved == len(clock.asked) <= 2
        seen = shares[: len(clock.asked)]
        assert note.measured in seen
        meeting = [share for share in seen if share <= 1.02 * self.TARGET]
        assert note.measured in (meeting or [min(seen)])
        assert (note.missed is None) or not meeting
        assert bool(plan.factored) == (note.refused is None) == (note.measured * (1 + spread) < 1)


KNOWN = [st.analyze(small_mlp(), inputs(4, 12))]


class TwoShapes(nn.Module):
    """Five layers of two shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.same = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))
        self.down = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.small = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.same:
            x = layer(x)
        return self.small(self.down(x))


class TestShapes:
    def test_layers_of_one_shape_are_one(self) -> None:
        model, x = TwoShapes(), torch.randn(2, 8, 6, 6)
        calls, examples = layer_calls(model, as_inputs(x), st.analyze(model, x))
        assert len(calls) == 5
        assert sorted(Counter(signature for each in calls for signature in each.signatures.elements()).values()) == [
            1,
            1,
            3,
        ]
        assert len(examples) == 3
        assert {shape.input for shape in examples} == {(2, 8, 6, 6), (2, 8, 3, 3)}

    @pytest.mark.parametrize(
        ("model", "x", "called"),
        [
            (Double(), torch.randn(2, 6), {"first": 1, "again": 2, "last": 1}),
            (Tied(), torch.randn(2, 8), {"first": 2, "last": 1}),
            (SharedModule(), torch.randn(2, 8), {"one": 2, "last": 1}),
        ],
        ids=["called twice", "two layers, one weight", "one layer, two names"],
    )
    def test_every_call_counts(self, model: nn.Module, x: Tensor, called: dict[str, int]) -> None:
        calls, _ = layer_calls(model, as_inputs(x), st.analyze(model, x))
        assert {each.layer.name: each.signatures.total() for each in calls} == called

    def test_small_layers_are_timed_below_the_first_step_too(self) -> None:
        wide, narrow = st.analyze(nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 24)), torch.randn(2, 256))
        wide_axes, narrow_axes = (
            axes_of(layer, "linear", multiple=16, points=4, below=(4, 8)) for layer in (wide, narrow)
        )
        assert wide_axes is not None
        assert wide_axes[0][0] == 16
        assert narrow_axes == ((4, 8, 16),)
        assert axes_of(narrow, "linear", multiple=16, points=4) == ((16,),)

    def test_ranks_below_the_first_step_are_options_only_where_they_were_timed(self) -> None:
        times = FormTimes(form="spatial", axes=((4, 8, 16, 48, 50),), ms=(1.0, 2.0, 3.0, 4.0, 5.0))
        every = np.arange(1, 60)[:, None]

        def covered(step: int, below: int) -> list[int]:
            return [int(rank) for (rank,) in every[times.covers(every, step=step, below=below)]]

        assert covered(16, 16) == [4, 8, 16, 32, 48, 50]
        assert covered(16, 0) == [16, 32, 48, 50]
        assert covered(32, 0) == [32, 50]
        pair = FormTimes(form="tucker2", axes=((8, 16), (16, 20)), ms=(1.0, 2.0, 3.0, 4.0))
        both = np.array([(8, 16), (16, 20), (8, 8), (12, 16), (16, 24), (32, 16)])
        assert pair.covers(both, step=16, below=16).tolist() == [True, True, False, False, False, False]

    @pytest.mark.parametrize("multiple", [1, 4, 16])
    def test_ranks_that_are_timed_are_on_the_grid_and_shrink_the_layer(self, multiple: int) -> None:
        for layer in st.analyze(small_cnn(), X):
            for form in layer.forms:
                axes = axes_of(layer, form, multiple=multiple, points=4)
                if axes is None:
                    continue
                for axis, most in zip(axes, layer.full_ranks(form), strict=True):
                    assert 1 <= len(axis) <= 5
                    assert all(rank % multiple == 0 or rank == most for rank in axis)
                assert layer.shrinks(layer.cost(form, tuple(axis[0] for axis in axes), "plain"))

    def test_no_rank_that_shrinks_is_left_out(self) -> None:
        for layer in st.analyze(small_cnn(), X):
            for form in layer.forms:
                axes = axes_of(layer, form, multiple=1, points=3)
                ranks = layer.rank_errors(form, "plain")
                small = (ranks.params < layer.dense.params) & (ranks.macs <= layer.dense.macs)
                assert (axes is not None) == bool(small.any())
                if axes is not None:
                    assert (ranks.ranks[small] <= [axis[-1] for axis in axes]).all()
                    assert all(axis[0] == 1 for axis in axes)


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 5), (3, 6)),
    "linear without bias on sequences": (lambda: nn.Linear(6, 5, bias=False), (2, 3, 6)),
    "linear on sequences": (lambda: nn.Linear(6, 5), (2, 3, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, bias=False), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), (2, 4, 9, 8)),
    "conv3d": (lambda: nn.Conv3d(4, 6, (3, 2, 1), stride=(1, 2, 1), padding=(1, 0, 0)), (2, 4, 5, 6, 3)),
    "transposed linear": (lambda: Conv1D(5, 6), (2, 3, 6)),
    "grouped": (lambda: nn.Conv2d(4, 8, 3, groups=2), (1, 4, 7, 7)),
    "same": (lambda: nn.Conv2d(4, 6, (4, 3), padding="same", dilation=(1, 2)), (1, 4, 9, 8)),
    "valid": (lambda: nn.Conv2d(4, 6, 3, padding="valid"), (1, 4, 9, 8)),
    "reflect": (lambda: nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode="reflect"), (1, 4, 9, 8)),
    "replicate": (lambda: nn.Conv1d(4, 6, 3, padding=2, padding_mode="replicate"), (1, 4, 9)),
    "circular": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (1, 4, 9, 8)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1), (1, 4, 5, 6)),
    "transposed in groups": (lambda: nn.ConvTranspose2d(4, 6, (3, 2), groups=2, dilation=2), (1, 4, 5, 6)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS.keys())
def test_a_graph_of_a_layer_does_what_the_layer_does(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    layer, x = make(), torch.randn(shape)
    factored = [
        build(layer, form=form, ranks=tuple(min(3, most) for most in full_ranks(layer, form)), bias=True)
        for form in form_names(layer)
    ]
    for part in factored:
        for parameter in part.parameters():
            nn.init.normal_(parameter)
    for part in (layer, *factored):
        session = onnxruntime.InferenceSession(layer_graph(part, shape).SerializeToString())
        (got,) = session.run(None, {"input": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(got), part(x).detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", [form.name for form in FORMS])
def test_factors_to_time_have_the_shapes_of_real_ones(form: str) -> None:
    for layer in st.analyze(small_cnn(), X):
        if form in layer.forms:
            ranks = tuple(min(2, most) for most in layer.full_ranks(form))
            factors = form_named(form).random_factors(layer.unit, ranks, generator=torch.Generator().manual_seed(0))
            real = layer.decomposition(form, "plain").factors(ranks)
            assert [factor.numel() for factor in factors] == [factor.numel() for factor in real]
            assert [factor.shape[:2] for factor in factors] == [factor.shape[:2] for factor in real]


def wide(width: int = 256) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))


class TestTable:
    @pytest.mark.parametrize("runtime", ["torch", "onnxruntime"])
    def test_every_layer_is_timed_in_every_form(self, tmp_path: Path, runtime: str) -> None:
        if runtime == "onnxruntime":
            pytest.importorskip("onnxruntime")
        model, x = small_cnn(dtype=torch.float32), X.float()
        known, before, random = st.analyze(model, x), state(model), torch.get_rng_state()
        progress: list[tuple[str, int, int]] = []
        table = latency_table(
            model,
            x,
            analysis=known,
            runtime=runtime,
            batch=2,
            rank_multiple=4,
            folder=tmp_path,
            on_progress=lambda *what: progress.append(what),
        )
        assert (table.runtime, table.threads, table.batch, table.rank_multiple) == (runtime, 1, 2, 4)
        assert [layer.name for layer in table.layers] == [layer.name for layer in known]
        for layer in table.layers:
            assert [form.form for form in layer.forms] == [
                form
                for form in known[layer.name].forms
                if form_named(form).saves_time and axes_of(known[layer.name], form, multiple=4, points=4)
            ]
            assert all(ms > 0 for form in layer.forms for ms in (*form.ms, layer.dense_ms))
        assert table.network_ms > 0
        assert [(done, of) for _, done, of in progress] == [(at, len(progress)) for at in range(len(known))]
        assert len(list(tmp_path.iterdir())) == len(progress)
        assert same_state(model, before)
        assert torch.equal(random, torch.get_rng_state())

    def test_only_the_forms_asked_for(self, tmp_path: Path) -> None:
        model, x = small_cnn(dtype=torch.float32), X.float()
        table = latency_table(
            model, x, analysis=st.analyze(model, x), forms=("channel",), rank_multiple=8, folder=tmp_path
        )
        assert {form.form for layer in table.layers for form in layer.forms} == {"channel", "linear"}

    def test_what_was_timed_is_not_timed_again(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        model, x = wide(64), torch.randn(4, 64)
        known, measure = st.analyze(model, x), LayerBench.measure
        calls: list[str] = []

        def counted(bench: LayerBench, *args: Any) -> tuple[float, ...]:
            calls.append(str(args))
            return measure(bench, *args)

        monkeypatch.setattr(LayerBench, "measure", counted)

        def table(**options: Any) -> LatencyTable:
            return latency_table(model, x, analysis=known, rank_multiple=16, **{"folder": tmp_path, **options})

        def proportions(latencies: LatencyTable) -> list[float]:
            """Each time over the dense layer's, as on disk; the times themselves are scaled to the present."""
            return [ms / layer.dense_ms for layer in latencies.layers for form in layer.forms for ms in form.ms]

        first = table()
        assert len(calls) == 2  # of three layers two have one shape
        assert proportions(table()) == pytest.approx(proportions(first))
        assert len(calls) == 2
        files = sorted(tmp_path.iterdir(), key=lambda path: len(json.loads(path.read_text())["ms"]), reverse=True)
        written = [path.read_text() for path in files]
        damages = {
            "cut": lambda text: text[: len(text) // 2],
            "empty": lambda text: "",
            "not text": lambda text: "\udcff",
            "short": lambda text: json.dumps({**json.loads(text), "ms": [1.0]}),
            "zero": lambda text: json.dumps({**json.loads(text), "ms": [0.0] * len(json.loads(text)["ms"])}),
            "another machine": lambda text: text.replace('"fingerprint": "', '"fingerprint": "another '),
        }
        for name, damage in damages.items():
            calls.clear()
            files[0].write_text(damage(written[0]), errors="surrogateescape")
            again = table()
            assert len(calls) == 1, name
            assert proportions(table()) == pytest.approx(proportions(again))
            assert len(calls) == 1, name
            assert set(tmp_path.iterdir()) == set(files)
        table(batch=8)
        assert len(calls) == 3
        table(folder=tmp_path / "other")
        assert len(calls) == 5

    def test_a_folder_that_cannot_be_written(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        model, x = wide(32), torch.randn(2, 64)
        file = tmp_path / "file"
        file.touch()
        known = st.analyze(model, x)
        with pytest.raises(errors.FileError, match="cannot write"):
            latency_table(model, x, analysis=known, rank_multiple=8, folder=file / "inside")
        monkeypatch.setenv("SPECTRIM_LATENCY", str(file / "inside"))  # not asked for by name: done without
        assert cache_folder() == file / "inside"
        assert latency_table(model, x, analysis=known, rank_multiple=8).layers

    def test_the_folder_of_the_cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("SPECTRIM_LATENCY", raising=False)
        assert cache_folder().name == "latency"
        assert cache_folder("~/here") == Path.home() / "here"
        monkeypatch.setenv("SPECTRIM_LATENCY", str(tmp_path))
        assert cache_folder() == tmp_path

    def test_bad_input_is_one_clear_error(self, tmp_path: Path) -> None:
        model, x = wide(16), torch.randn(2, 64)
        known = st.analyze(model, x)

        def table(**options: Any) -> object:
            return latency_table(model, x, **{"analysis": known, "folder": tmp_path, **options})

        for wrong in (0, 2.5, True, "eight"):
            with pytest.raises(errors.RuleError, match="rank_multiple"):
                table(rank_multiple=wrong)
        with pytest.raises(errors.EngineError, match="runtime 'onnx' is unknown"):
            table(runtime="onnx")
        with pytest.raises(errors.EngineError, match="threads=100000"):
            table(threads=100_000)
        with pytest.raises(errors.PlanError, match="forms="):
            table(forms=("conical",))
        with pytest.raises(errors.PlanError, match="the analysis is of another model"):
            table(analysis=st.analyze(small_cnn(), X, include="8"))
        assert not list(tmp_path.iterdir())


def test_a_grid_is_a_multiple(known: st.Analysis) -> None:
    grid = Grid(multiple=4, times={}, runtime="torch", threads=1, batch=1, fingerprint="made up")
    plan = st.plan(known, st.Ratio(0.3), rank_multiple=grid)
    assert plan == st.plan(known, st.Ratio(0.3), rank_multiple=4)
    assert plan.rank_multiple == 4
