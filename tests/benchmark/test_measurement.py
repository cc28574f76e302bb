"""Counting, timing and scoring."""

import pytest
import torch
from cases import Tied, inputs, same_state, small_mlp, state
from torch import Tensor, nn

import spectrim as st
from spectrim import errors, models
from spectrim.benchmark.measurement import measure_each, resized, runtime_gain
from spectrim.core.execution import as_inputs

X = inputs(6, 12)


def test_counts_of_a_known_network() -> None:
    measured = st.measure(small_mlp(), X, latency=False)
    assert measured.params == 12 * 16 + 16 + 16 * 16 + 16 + 16 * 4 + 4
    assert measured.macs == 6 * (12 * 16 + 16 * 16 + 16 * 4)
    assert measured.latency_ms is None


def test_shared_weights_count_once_and_work_twice() -> None:
    measured = st.measure(Tied().double(), inputs(1, 8), latency=False)
    assert measured.params == 64 + 8 + 8 + 27
    assert measured.macs == 64 + 64 + 24


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
    measured = st.measure(small, X, reference=model, rounds=5, threads=1)
    assert measured.params_ratio == measured.params / st.measure(model, X, latency=False).params
    assert measured.macs_speedup == pytest.approx(1 / measured.macs_ratio)
    assert measured.speedup is not None
    assert 0 < measured.speedup.low <= measured.speedup.value <= measured.speedup.high
    assert measured.latency_ms > 0


def test_a_slower_model_is_reported_as_slower() -> None:
    """Arithmetic, not a race: a thousand times the work against next to none."""
    heavy = nn.Sequential(*[nn.Linear(512, 512) for _ in range(8)])
    light = nn.Sequential(nn.Linear(512, 1), nn.Linear(1, 1))
    measured = st.measure(heavy, torch.zeros(64, 512), reference=light, rounds=5)
    assert measured.speedup.high < 1


def test_measuring_leaves_models_threads_and_random_state_alone() -> None:
    model = nn.Sequential(nn.Linear(12, 12), nn.Dropout(), nn.BatchNorm1d(12)).double().train()
    before, random, threads = state(model), torch.get_rng_state(), torch.get_num_threads()
    st.measure(model, X, reference=model, threads=1, rounds=5, data=[(X, torch.zeros(6))])
    assert same_state(model, before)
    assert model[1].training
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.get_num_threads() == threads


def test_accuracy_and_its_wilson_interval() -> None:
    measured = st.Accuracy(correct=95, total=100)
    assert measured.value == 0.95
    assert measured.interval.low == pytest.approx(0.8883, abs=1e-4)
    assert measured.interval.high == pytest.approx(0.9785, abs=1e-4)
    assert st.Accuracy(correct=0, total=10).interval.low == 0
    assert st.Accuracy(correct=10, total=10).interval.high == 1


def test_labels_that_no_output_stands_for_are_refused() -> None:
    with pytest.raises(errors.DataError, match="label 3, and the outputs are of 3 classes, 0 to 2"):
        st.accuracy(nn.Identity(), [(torch.eye(3), torch.tensor([1, 2, 3]))])


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
    with pytest.raises(errors.DataError, match=r"outputs float\d+ \[4, 4\] and labels float32 \[3\]"):
        st.accuracy(Echo(), [(x, torch.zeros(3))])
    with pytest.raises(errors.DataError, match="pairs"):
        st.accuracy(Echo(), [x])


@pytest.mark.parametrize(("rounds", "threads"), [(4, 1), (9, 0)])
def test_impossible_settings_are_refused(rounds: int, threads: int) -> None:
    with pytest.raises(errors.DataError, match="at least 5 rounds and 1 thread"):
        st.measure(small_mlp(), X, rounds=rounds, threads=threads)


@pytest.mark.parametrize("runtime", ["torch", "torch-bf16", "onnxruntime"])
def test_measuring_in_a_runtime(runtime: str) -> None:
    model, x = small_mlp(dtype=torch.float32), X.float()
    small = st.compress(model, st.Rank(2), example_inputs=x).model
    measured = st.measure(small, x, reference=model, rounds=5, runtime=runtime)
    assert (measured.runtime, measured.threads, measured.batch) == (runtime, 1, None)
    assert measured.latency_ms > 0
    assert measured.reference_ms > 0
    assert measured.cpu_ms > 0
    assert measured.efficiency.value == pytest.approx(measured.speedup.value / measured.macs_speedup)
    assert measured.efficiency.low <= measured.efficiency.value <= measured.efficiency.high
    assert measured.verdict in ("faster", "slower", "no difference", "too noisy to tell")
    assert st.Measurement.model_validate_json(measured.model_dump_json()) == measured


def test_what_a_runtime_gains_by_itself() -> None:
    """Arithmetic again: a network is not a thousand times itself."""
    measured = runtime_gain(small_mlp(dtype=torch.float32), X.float(), runtime="channels_last", rounds=5)
    assert 1e-3 < measured.ratio.low <= measured.ratio.value <= measured.ratio.high < 1e3
    assert measured.drift > 0
    light, heavy = nn.Linear(512, 1), nn.Sequential(*[nn.Linear(512, 512) for _ in range(8)])
    both = runtime_gain(light, torch.zeros(64, 512), reference=heavy, runtime="channels_last", rounds=5)
    assert both.ratio.low > 1


def test_a_batch_of_another_size() -> None:
    measured = st.measure(small_mlp(), X, batch=64, rounds=5)
    assert measured.batch == 64
    assert measured.macs == 64 * (12 * 16 + 16 * 16 + 16 * 4)
    assert st.measure(small_mlp(), X, batch=2, latency=False).macs == 2 * (12 * 16 + 16 * 16 + 16 * 4)


def test_samples_are_repeated_in_turn_in_every_tensor_that_has_them() -> None:
    x, mask, scale = torch.arange(3), torch.arange(6).view(3, 2), torch.arange(5)
    batch_of_4 = resized(as_inputs({"x": x, "more": [mask, scale, True]}), 4).kwargs
    assert batch_of_4["x"].tolist() == [0, 1, 2, 0]
    assert batch_of_4["more"][0].tolist() == [[0, 1], [2, 3], [4, 5], [0, 1]]
    assert batch_of_4["more"][1] is scale
    assert batch_of_4["more"][2] is True
    assert resized(as_inputs(x), 2).args[0].tolist() == [0, 1]


@pytest.mark.parametrize(("example", "batch"), [(X, 0), (torch.tensor(1.0), 2), (torch.zeros(0, 12), 2)])
def test_batches_that_cannot_be_made(example: Tensor, batch: int) -> None:
    with pytest.raises(errors.DataError, match=f"batch={batch}"):
        st.measure(small_mlp(), example, batch=batch)


def test_a_model_that_changes_its_output_is_not_timed() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.calls = nn.Linear(12, 4), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.fc(x) * self.calls

    with pytest.raises(errors.ModelError, match="not repeatable"):
        st.measure(Counting(), X.float(), rounds=5)
    with pytest.raises(errors.ModelError, match="not repeatable"):
        st.measure(small_mlp(dtype=torch.float32), X.float(), reference=Counting(), rounds=5)


def test_runtimes_that_cannot_be_had_are_refused_before_anything_is_run() -> None:
    for model in (small_mlp(), nn.Linear(1, 1)):  # the second one could not run X
        with pytest.raises(errors.EngineError, match="did you mean 'openvino'"):
            st.measure(model, X, runtime="openvion")
        with pytest.raises(errors.EngineError, match="threads=4096"):
            st.measure(model, X, threads=4096)


def test_measurements_of_former_versions_are_read() -> None:
    """Written before there were runtimes, with the noise unknown."""
    text = '{"params": 3, "bytes": 12, "macs": 2, "latency_ms": 1.0, "threads": 1, "macs_ratio": 0.5, '
    measured = st.Measurement.model_validate_json(text + '"speedup": {"value": 1.8, "low": 1.75, "high": 1.85}}')
    assert (measured.runtime, measured.batch, measured.cpu_ms) == (None, None, None)
    assert measured.verdict == "faster"
    assert measured.efficiency.value == pytest.approx(0.9)
    assert st.Measurement(params=3, bytes=12, macs=2).verdict is None
    assert st.Measurement(params=3, bytes=12, macs=2).efficiency is None


class TestSeveralAgainstOne:
    def test_each_is_measured_as_by_itself(self) -> None:
        dense, example = models.mlp(20, width=16, hidden=1), torch.randn(2, 20)
        smaller = [st.compress(dense, st.Rank(rank), example_inputs=example, keep_last=True).model for rank in (2, 4)]
        seen: list[int] = []
        each = measure_each(smaller, example, reference=dense, batch=3, rounds=5, on_model=seen.append)
        assert seen == [0, 1]
        for measured, model in zip(each, smaller, strict=True):
            alone = st.measure(model, example, reference=dense, batch=3, rounds=5)
            untimed = {"latency_ms", "cpu_ms", "reference_ms", "speedup", "drift"}
            assert measured.model_dump(exclude=untimed) == alone.model_dump(exclude=untimed)
            assert measured.speedup is not None

    def test_nothing_is_left_changed(self) -> None:
        dense, example = models.mlp(20, width=16, hidden=1).train(), torch.randn(2, 20)
        threads = torch.get_num_threads()
        with pytest.raises(errors.ModelError):
            measure_each([dense, nn.Linear(3, 3)], example, reference=dense, rounds=5)
        assert dense.training
        assert torch.get_num_threads() == threads
        with pytest.raises(errors.DataError, match="at least 5 rounds"):
            measure_each([dense], example, reference=dense, rounds=2)
