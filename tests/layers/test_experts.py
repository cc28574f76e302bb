"""Stacked experts: taken apart into layers, factored each with its own tokens, and put together again."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spectrim as st
from spectrim.analysis.experts import with_experts
from spectrim.layers.cost import count
from spectrim.layers.experts import UnfusedExperts
from spectrim.layers.unfusing import fused, unfused
from spectrim.linalg import matrix_of

EXPERTS, SIZE, INNER, PLACES, WORDS = 6, 16, 24, 2, 400


class Stacked(nn.Module):
    """Experts as transformers has them: with or without gate and biases, stored as (out, in) or (in, out)."""

    def __init__(self, *, gate: bool, bias: bool, transposed: bool) -> None:
        super().__init__()
        self.num_experts, self.act_fn = EXPERTS, nn.SiLU()
        self.has_gate, self.has_bias, self.has_post_expert_norm, self.is_transposed = gate, bias, False, transposed
        self.first = "gate_up_proj" if gate else "up_proj"
        for name, out, into in ((self.first, INNER * (1 + gate), SIZE), ("down_proj", SIZE, INNER)):
            shape = (into, out) if transposed else (out, into)
            self.register_parameter(name, nn.Parameter(0.3 * torch.randn(EXPERTS, *shape)))
            if bias:
                self.register_parameter(f"{name}_bias", nn.Parameter(torch.randn(EXPERTS, out)))

    def _apply_gate(self, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return self.act_fn(gate) * up

    def _multiplied(self, x: Tensor, name: str, expert: int) -> Tensor:
        weight, bias = self.get_parameter(name)[expert], self._parameters.get(f"{name}_bias")
        y = x @ (weight if self.is_transposed else weight.T)
        return y if bias is None else y + bias[expert]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        total = torch.zeros_like(hidden_states)
        for expert in range(EXPERTS):
            token, place = torch.where(top_k_index == expert)
            inner = self._multiplied(hidden_states[token], self.first, expert)
            inner = self._apply_gate(inner) if self.has_gate else self.act_fn(inner)
            y = self._multiplied(inner, "down_proj", expert)
            total.index_add_(0, token, y * top_k_weights[token, place, None])
        return total


class Other(Stacked):
    """One whose outputs are not those of its weights."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return 2 * super().forward(hidden_states, top_k_index, top_k_weights)


class Mixture(nn.Module):
    """Words, experts that a router chooses, and a head."""

    def __init__(self, kind: type[Stacked] = Stacked, **options: bool) -> None:
        super().__init__()
        self.words, self.router = nn.Embedding(WORDS, SIZE), nn.Linear(SIZE, EXPERTS)
        self.experts = kind(**({"gate": True, "bias": False, "transposed": False} | options))
        self.head = nn.Linear(SIZE, 9)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.words(input_ids)
        flat = x.flatten(0, 1)
        weights, index = self.router(flat).softmax(dim=-1).topk(PLACES)
        return self.head(x + self.experts(flat, index, weights).view(x.shape))


def build(kind: type[Stacked] = Stacked, **options: bool) -> Any:
    torch.manual_seed(0)
    return Mixture(kind, **options).eval()


def texts(batch: int = 8, length: int = 10) -> Tensor:
    return torch.randint(1, WORDS, (batch, length))


KINDS = [{"gate": gate, "bias": bias, "transposed": turned} for gate in (1, 0) for bias in (0, 1) for turned in (0, 1)]


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_every_kind_is_compressed(options: Any, tmp_path: Path) -> None:
    options = {name: bool(value) for name, value in options.items()}
    model, data = build(**options), [texts() for _ in range(3)]
    x = data[0]
    whole = st.compress(model, st.Rank(SIZE), example_inputs=x, allow_growth=True, include=["experts.*"])
    torch.testing.assert_close(whole.model(x), model(x), rtol=1e-4, atol=1e-4)
    small = st.compress(model, st.Budget(params=0.8), example_inputs=x, data=data)
    plan, measured = small.plan, small.measurement
    assert {"gate_up" if options["gate"] else "up", "down"} == {layer.name.split(".")[1] for layer in _experts(plan)}
    assert measured.params_ratio <= 0.8
    for cost in ("params", "macs"):
        dense = getattr(count(model, x), cost)
        assert dense - getattr(measured, cost) == getattr(plan.dense_cost, cost) - getattr(plan.kept_cost, cost)
    again = st.load(st.save(small.model, tmp_path / "small"), build(**options))
    assert torch.equal(again(x), small.model(x))
    merged = st.merge(small.model)
    assert type(merged.experts) is Stacked
    torch.testing.assert_close(merged(x), small.model(x), rtol=1e-4, atol=1e-4)


def _experts(plan: st.Plan) -> list[Any]:
    return [layer for layer in plan.factored if layer.name.startswith("experts.")]


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_taken_apart_and_put_together(options: Any) -> None:
    model, x = build(**{name: bool(value) for name, value in options.items()}), texts()
    taken = unfused(model)
    assert isinstance(taken.experts, UnfusedExperts)
    assert not isinstance(model.experts, UnfusedExperts)
    torch.testing.assert_close(taken(x), model(x))
    storages = {tensor.untyped_storage().data_ptr() for tensor in model.parameters()}
    assert {tensor.untyped_storage().data_ptr() for tensor in taken.parameters()} == storages
    whole = fused(taken)
    assert list(whole.state_dict()) == list(model.state_dict())
    assert all(torch.equal(whole.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    assert count(taken, x).macs == count(model, x).macs


def test_where_all_stay_dense_the_model_is_of_its_own_class() -> None:
    small = st.compress(build(), st.Ratio(0.3), example_inputs=texts(), exclude=["experts.*"])
    assert type(small.model.experts) is Stacked
    assert small.plan["experts.down.0"].reason == "not selected by include and exclude"
    left_whole = st.compress(build(), st.Ratio(0.3), example_inputs=texts(), exclude=["experts"])
    assert type(left_whole.model.experts) is Stacked
    model = build()
    assert st.compress(model, st.Ratio(0.3), example_inputs=texts(), inplace=True).model is model
    assert isinstance(model.experts, UnfusedExperts)


def test_experts_that_do_something_else_stay_dense() -> None:
    model, hooked = build(Other), build()
    hooked.experts.register_forward_hook(lambda *_: None)
    for other in (model, hooked):
        plan = st.compress(other, st.Ratio(0.3), example_inputs=texts()).plan
        assert "hold one matrix for each expert" in plan["experts"].reason
        assert "use_experts_implementation" in plan["experts"].reason


def test_the_router_stays_dense() -> None:
    plan = st.compress(build(), st.Rank(2), example_inputs=texts()).plan
    assert "chooses the experts" in plan["router"].reason


def test_macs_do_not_depend_on_the_data() -> None:
    model = build()
    small = st.compress(model, st.Ratio(0.3), example_inputs=texts()).model
    costs = {count(small, texts()).macs for _ in range(4)}
    assert len(costs) == 1
    assert {count(model, texts()).macs for _ in range(4)} == {count(unfused(model), texts()).macs}
    tokens = [layer.positions.output for layer in st.analyze(model, texts(1, 5)) if layer.stack == "experts.down"]
    assert sum(tokens) == 5 * PLACES
    assert max(tokens) - min(tokens) <= 1


def test_experts_that_no_token_reaches_have_the_statistics_of_the_others() -> None:
    model, x = build(), [texts() for _ in range(3)]
    model.router.bias.data[:2] = torch.tensor([-1e4, 3.0])
    calibration = st.calibrate(model, x)
    assert "experts.gate_up.0" not in calibration.moments
    analysis = st.analyze(model, x[0], calibration=calibration)
    names = [f"experts.gate_up.{expert}" for expert in range(EXPERTS)]
    statistics = with_experts(calibration, {"experts.gate_up": names}).moments
    seen = {name: calibration.moments[name] for name in names[1:]}
    total = sum(own.count for own in seen.values())
    mean = sum(own.count / total * (own.covariance + own.mean.mT @ own.mean) for own in seen.values())
    torch.testing.assert_close(matrix_of(statistics[names[0]].compact), mean)
    torch.testing.assert_close(matrix_of(analysis[names[0]].problems["activation"].covariance), mean)
    small = st.compress(model, st.Budget(params=0.8), example_inputs=x[0], data=x)
    sensitivity = st.sensitivity(model, analysis, x).sensitivity
    assert 0 < sensitivity[names[0]]["linear"] < sensitivity[names[1]]["linear"]
    assert small.plan[names[0]].kept.params > 0


def test_an_expert_of_many_tokens_goes_its_own_way() -> None:
    """The more tokens, the less comes from the others."""
    distances = []
    for batches in (1, 40):
        torch.manual_seed(1)
        calibration = st.calibrate(build(), [texts() for _ in range(batches)])
        names = [f"experts.down.{expert}" for expert in range(EXPERTS)]
        own = calibration.moments[names[0]]
        around_zero = own.covariance + own.mean.mT @ own.mean
        blended = matrix_of(with_experts(calibration, {"experts.down": names}).moments[names[0]].compact)
        distances.append(float((blended - around_zero).norm() / around_zero.norm()))
    assert 0 < distances[1] < distances[0] / 3


def test_padding_reaches_no_statistic() -> None:
    model, words = build(), texts()
    mask = torch.ones_like(words)
    mask[:, 6:] = 0
    padded = st.calibrate(model, [{"input_ids": words, "attention_mask": mask}]).moments
    alone = st.calibrate(model, [{"input_ids": words[:, :6]}]).moments
    for name in (name for name in alone if name.startswith("experts.")):
        assert padded[name].count == alone[name].count
        torch.testing.assert_close(padded[name].covariance, alone[name].covariance)


def test_a_stack_is_weighed_in_one_pass() -> None:
    model, data = build(), [texts() for _ in range(3)]
    analysis = st.analyze(model, data[0], calibration=st.calibrate(model, data))
    names: list[str] = []
    weighed = st.sensitivity(model, analysis, data, on_progress=lambda name, *_: names.append(name))
    assert names.count("experts.gate_up") == names.count("experts.down") == 1
    assert not any(name.startswith("experts.down.") for name in names)
    assert all(weighed.sensitivity[f"experts.down.{expert}"]["linear"] > 0 for expert in range(EXPERTS))


def test_a_stack_is_weighed_without_statistics() -> None:
    model, data = build(), [texts() for _ in range(3)]
    weighed = st.sensitivity(model, st.analyze(model, data[0]), data, metric="plain").sensitivity
    assert all(weighed[f"experts.down.{expert}"]["linear"] > 0 for expert in range(EXPERTS))


def test_the_predicted_error_is_that_of_the_network() -> None:
    """What is shared out among the experts adds up to what all of them together do."""
    model, data = build(), [texts(32) for _ in range(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small = st.compress(model, st.Budget(params=0.9), example_inputs=data[0], data=data, reconstruct=False)
    assert 0.5 < small.fidelity.predicted / small.fidelity.relative_error < 2


def test_a_stack_is_one_row_of_a_plan() -> None:
    plan = st.compress(build(), st.Ratio(0.3), example_inputs=texts()).plan
    table = st.text(plan, width=240)
    assert "experts.gate_up.*" in table
    assert "experts.gate_up.0" not in table
    assert "6 experts: ranks 4 to 4 of 16" in " ".join(table.split())
    assert plan["experts.gate_up.3"].stack == "experts.gate_up"
