"""Counting, timing and scoring."""

from typing import Any

import pytest
import torch
from cases import Tied, inputs, same_state, small_mlp, state
from torch import Tensor, nn

import spectrim as st
from spectrim import errors
from spectrim.measure import _interleaved, _median_interval

X = inputs(6, 12)


def test_counts_of_a_known_network() -> None:
    found = st.measure(small_mlp(), X, latency=False)
    assert found.params == 12 * 16 + 16 + 16 * 16 + 16 + 16 * 4 + 4
    assert found.macs == 6 * (12 * 16 + 16 * 16 + 16 * 4)
    assert found.latency_ms is None


def test_shared_weights_count_once_and_work_twice() -> None:
    found = st.measure(Tied().double(), inputs(1, 8), latency=False)
    assert found.params == 64 + 8 + 8 + 27
    assert found.macs == 64 + 64 + 24


def test_convolutions_and_attention_are_counted() -> None:
    model = nn.Conv2d(3, 8, 3, groups=1, padding=1)
    assert st.measure(model, torch.zeros(2, 3, 5, 5), latency=False).macs == 2 * 25 * 8 * 27
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    tokens, width = 5, 16
    products = tokens * (3 * width**2 + width**2 + 2 * width * 32) + 2 * tokens**2 * width
    assert st.measure(layer, torch.zeros(1, tokens, width), latency=False).macs == products


def test_against_a_reference_the_ratios_are_kept_over_dense() -> None:
    model = small_mlp()
    small = st.compress(model, st.Rank(2), example_inputs=X).model
    found = st.measure(small, X, reference=model, rounds=5, threads=1)
    assert found.params_ratio == found.params / st.measure(model, X, latency=False).params
    assert found.macs_speedup == pytest.approx(1 / found.macs_ratio)
    assert found.speedup is not None
    assert 0 < found.speedup.low <= found.speedup.value <= found.speedup.high
    assert found.latency_ms > 0


def test_a_slower_model_is_reported_as_slower() -> None:
    """Arithmetic, not a race: a thousand times the work against next to none."""
    heavy = nn.Sequential(*[nn.Linear(512, 512) for _ in range(8)])
    light = nn.Sequential(nn.Linear(512, 1), nn.Linear(1, 1))
    found = st.measure(heavy, torch.zeros(64, 512), reference=light, rounds=5)
    assert found.speedup.high < 1


def test_measuring_leaves_models_threads_and_random_state_alone() -> None:
    model = nn.Sequential(nn.Linear(12, 12), nn.Dropout(), nn.BatchNorm1d(12)).double().train()
    before, random, threads = state(model), torch.get_rng_state(), torch.get_num_threads()
    st.measure(model, X, reference=model, threads=1, rounds=5, data=[(X, torch.zeros(6))])
    assert same_state(model, before)
    assert model[1].training
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.get_num_threads() == threads


def test_rounds_alternate_their_order() -> None:
    order: list[str] = []

    def run(name: str) -> Any:
        return lambda: order.append(name) or 0.0

    _interleaved([run("a"), run("b")], 3)
    assert "".join(order) == "abbaab"


def test_a_hopeless_wait_ends_after_five_rounds() -> None:
    assert len(_interleaved([lambda: 1.0], 100, patience=0.0)[0]) == 5


def test_the_interval_of_the_median_comes_from_order_statistics() -> None:
    found = _median_interval([float(number) for number in range(1, 32)])
    assert (found.value, found.low, found.high) == (16, 11, 22)  # binomial(31, 1/2): ranks 10..22 cover 95 %


def test_accuracy_and_its_wilson_interval() -> None:
    found = st.Accuracy(correct=95, total=100)
    assert found.value == 0.95
    assert found.interval.low == pytest.approx(0.8883, abs=1e-4)
    assert found.interval.high == pytest.approx(0.9785, abs=1e-4)
    assert st.Accuracy(correct=0, total=10).interval.low == 0
    assert st.Accuracy(correct=10, total=10).interval.high == 1


def test_accuracy_counts_over_batches() -> None:
    class Echo(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    x = torch.eye(4)
    assert st.accuracy(Echo(), [(x, torch.tensor([0, 1, 2, 0])), (x[:1], torch.tensor([0]))]) == st.Accuracy(
        correct=4, total=5
    )
    with pytest.raises(errors.DataError, match="empty"):
        st.accuracy(Echo(), [])
    with pytest.raises(errors.DataError, match=r"outputs \[4, 4\] and labels \[3\]"):
        st.accuracy(Echo(), [(x, torch.zeros(3))])
    with pytest.raises(errors.DataError, match="pairs"):
        st.accuracy(Echo(), [x])


@pytest.mark.parametrize(("rounds", "threads"), [(4, 1), (9, 0)])
def test_impossible_settings_are_refused(rounds: int, threads: int) -> None:
    with pytest.raises(errors.DataError, match="at least 5 rounds and 1 thread"):
        st.measure(small_mlp(), X, rounds=rounds, threads=threads)
