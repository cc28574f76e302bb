"""Layers that are narrowed together, under a budget of latency."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import spectrim as st
from spectrim.benchmark.latencies import FormTimes, LatencyTable, LayerTimes
from spectrim.benchmark.latency_table import latency_table
from spectrim.benchmark.layer_timing import LayerBench
from spectrim.core.plans import LatencyNote
from spectrim.planning.decisions import PlanOptions
from spectrim.planning.latency_budget import refined
from spectrim.planning.rules import candidates_of
from spectrim.runtimes.timing import Interval


class Block(nn.Module):
    """An attention and an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 4
        self.q, self.k, self.v, self.o = (nn.Linear(64, 64) for _ in range(4))
        self.up, self.down = nn.Linear(64, 256), nn.Linear(256, 64)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (4, 16)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        heads = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.o(heads.transpose(1, 2).flatten(-2))
        return x + self.down(self.up(x).relu())


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Block(), nn.LayerNorm(64)).eval()


DATA = list(torch.randn(32, 5, 64, generator=torch.Generator().manual_seed(1)).split(8))
UNITS = {"0.k": ("head_qk", ("0.q",)), "0.o": ("head_vo", ("0.v",)), "0.down": ("width", ("0.up",))}


def analysis() -> st.Analysis:
    model = network()
    return st.analyze(model, DATA[0], calibration=st.calibrate(model, DATA, gradients=True))


def table(
    known: st.Analysis, *, of_unit: float = 0.4, alone: float = 0.9, units: Sequence[str] = tuple(UNITS)
) -> LatencyTable:
    """Every layer takes a millisecond; factors a little less, and narrowed together a share of the rank, and more."""
    layers = []
    for layer in known:
        forms = [FormTimes(form="linear", axes=((8, 16),), ms=(alone, alone))]
        if layer.name in units:
            form, feeders = UNITS[layer.name]
            full = layer.full_ranks(form)[0]
            ranks = tuple(range(8, full, 8))
            times = (of_unit + (1 + len(feeders)) * rank / full * abs(1 - of_unit) for rank in ranks)
            forms.append(FormTimes(form=form, axes=(ranks,), ms=tuple(times)))
        layers.append(LayerTimes(name=layer.name, dense_ms=1.0, forms=tuple(forms)))
    return LatencyTable(
        runtime="torch", threads=1, fingerprint="here", rank_multiple=8, network_ms=10.0, layers=tuple(layers)
    )


def solved(known: st.Analysis, times: LatencyTable, share: float) -> st.Plan:
    return st.plan(known, st.Budget(latency=share, runtime="torch", threads=1), latencies=times)


def test_the_table_has_the_times_of_layers_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed = []
    measure = LayerBench.measure

    def counted(bench: LayerBench, signature: object, variants: Sequence[tuple[object, ...]]) -> tuple[float, ...]:
        timed.extend(variant for variant in variants if variant[2])
        return measure(bench, signature, variants)  # type: ignore[arg-type]

    monkeypatch.setattr(LayerBench, "measure", counted)
    known = analysis()
    times = latency_table(network(), DATA[0], analysis=known, rank_multiple=8, folder=tmp_path)
    for name, (form, feeders) in UNITS.items():
        layer = times.of(name)
        assert layer is not None
        together = layer.of(form)
        assert together is not None
        (axis,) = together.axes
        assert set(axis) <= set(range(8, known[name].full_ranks(form)[0], 8))
        assert min(together.ms) > 0
        assert all(times.of(feeder) is not None for feeder in feeders)
    sizes = {(form, *each) for form, _, each in timed}
    assert {("head_qk", 64, 32, 4), ("head_vo", 64, 32, 4), ("head_vo", 32, 64, 4)} <= sizes
    assert {("width", 64, 128, 0), ("width", 128, 64, 0)} <= sizes


def test_a_plan_takes_what_is_fastest_together_at_the_predicted_time() -> None:
    known = analysis()
    times = table(known)
    plan = solved(known, times, 0.75)
    assert {layer.form for layer in plan if layer.unit} >= {"width"}
    assert plan.latency is not None
    assert plan.latency.predicted == pytest.approx(times.predict(plan) / times.network_ms)
    assert plan.latency.predicted <= 0.75


def test_what_is_slower_together_is_never_taken() -> None:
    known = analysis()
    plan = solved(known, table(known, of_unit=3.0), 0.95)
    assert {layer.form for layer in plan} == {"linear", "dense"}


def test_a_table_without_times_together_plans_each_layer_by_itself() -> None:
    known = analysis()
    assert {layer.unit for layer in solved(known, table(known, units=()), 0.95)} == {None}


def test_what_is_out_of_reach_says_what_layers_together_can_reach() -> None:
    known = analysis()
    alone, together = (table(known, alone=0.99, units=units) for units in ((), tuple(UNITS)))
    budget = st.Budget(latency=0.05, runtime="torch", threads=1)
    shares = [candidates_of(known, budget, PlanOptions(latencies=times)) for times in (alone, together)]
    least = [candidates.least / candidates.whole for candidates in shares]
    assert least[0] > 0.9
    # by hand: of each unit the fastest, and 4 of 10 milliseconds outside
    fastest = [0.4 + 2 * 8 / full * 0.6 for full in (16, 16, 256)]
    assert least[1] == pytest.approx((4 + sum(fastest)) / 10, rel=1e-3)
    with pytest.raises(st.errors.RuleError, match=r"Budget\(latency=0.64"):
        st.plan(known, budget, latencies=together)


def test_where_only_layers_together_are_faster_the_message_says_what_they_reach() -> None:
    known = analysis()
    times = table(known, alone=1.5, units=["0.down"])
    message = r"Budget\(latency=0.8438\), with all 2 layers .* 80.0% of the time"
    with pytest.raises(st.errors.RuleError, match=message):
        solved(known, times, 0.5)
    plan = solved(known, times, 0.8438)
    assert plan.latency is not None
    assert plan.latency.predicted <= 0.8438


def test_a_coarser_grid_than_that_of_the_table_has_no_other_ranks() -> None:
    known, budget = analysis(), st.Budget(latency=0.7, runtime="torch", threads=1)
    for multiple in (16, 32):
        options = PlanOptions(latencies=table(known), rank_multiple=multiple)
        ranks = [rank for group in candidates_of(known, budget, options).groups for _, (rank,) in group.joint]
        assert ranks
        assert all(rank % multiple == 0 for rank in ranks)


def test_a_mild_target_missed_by_chance_does_not_end_in_the_fastest_network() -> None:
    known = analysis()
    budget = st.Budget(latency=0.97, runtime="torch", threads=1)
    candidates = candidates_of(known, budget, PlanOptions(latencies=table(known)))
    measured = iter([1.005, 0.96])

    def verify(_: st.Plan) -> Interval:
        value = next(measured)
        return Interval(value=value, low=value - 0.01, high=value + 0.01)

    plan = refined(candidates, budget, verify=verify)
    assert plan.latency is not None
    assert plan.latency.predicted > 0.85


def test_where_it_is_not_surely_faster_nothing_stays_narrowed() -> None:
    known = analysis()
    budget = st.Budget(latency=0.75, runtime="torch", threads=1)
    candidates = candidates_of(known, budget, PlanOptions(latencies=table(known)))
    plan = refined(candidates, budget, verify=lambda _: Interval(value=1.1, low=1.0, high=1.2))
    assert isinstance(plan.latency, LatencyNote)
    assert plan.latency.refused
    assert {(layer.form, layer.unit) for layer in plan} == {("dense", None)}


@pytest.mark.parametrize("runtime", ["torch", "onnxruntime"])
def test_under_a_budget_of_latency_the_network_is_timed_narrowed(
    runtime: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPECTRIM_LATENCY", str(tmp_path))
    forms = ("width", "head_vo", "head_qk")
    model = network()
    try:
        small = st.compress(
            model, st.Budget(latency=0.9, runtime=runtime), example_inputs=DATA[0], data=DATA, forms=forms
        )
    except st.errors.RuleError:
        return  # so small a network may be no faster here
    note = small.plan.latency
    assert note is not None
    assert note.measured is not None
    assert {layer.form for layer in small.plan} <= {*forms, "linear", "dense"}
    assert small.model(DATA[0]).shape == model(DATA[0]).shape
