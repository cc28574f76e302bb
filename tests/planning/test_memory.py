"""Memory estimated before it is taken, and work refused that does not fit."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import inputs
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import spectrim as st
from spectrim.planning import memory

X, BUDGET = inputs(64, 24), st.Budget(params=0.6)


def network(width: int = 32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, width), nn.ReLU(), nn.Linear(width, 10)).double()


def estimate(rule: Any = BUDGET, model: nn.Module | None = None, **options: Any) -> st.MemoryEstimate:
    return st.estimate_memory(network() if model is None else model, rule, example_inputs=X[:1], **options)


def test_the_parts_are_what_they_are_in_the_end() -> None:
    data = X.split(16)
    result = estimate(data=data)
    calibration = st.calibrate(network(), data, gradients=True)
    assert result.statistics == calibration.bytes
    assert result.batches == 0  # in memory already
    assert result.widest in ("0", "2")
    parts = sum(getattr(result, name) for name in st.MemoryEstimate.PARTS)
    assert 0 < result.tensors < result.peak
    assert result.tensors <= parts
    assert result.available > 0


def test_held_vectors_are_counted_of_a_wide_layer() -> None:
    model = nn.Sequential(nn.Linear(2100, 4), nn.Linear(4, 4))
    x = torch.randn(50, 2100)
    options: dict[str, Any] = {"example_inputs": x[:1], "data": [x]}
    statistics = st.calibrate(model, [x]).bytes
    assert st.estimate_memory(model, st.Rank(1), **options).statistics == pytest.approx(statistics, abs=16)


def test_data_are_sized_and_not_read() -> None:
    class Unread(TensorDataset):
        def __getitem__(self, _: object) -> tuple[Tensor, ...]:
            raise AssertionError

    def generator() -> Iterator[Tensor]:
        raise AssertionError
        yield X

    loader = DataLoader(Unread(X, torch.zeros(64)), batch_size=16)
    streamed = estimate(data=loader)
    assert streamed.batches == 64 * 24 * 8  # a budget keeps them
    assert streamed.statistics == estimate(data=X.split(16)).statistics
    assert estimate(st.Rank(2), data=loader).batches == 0
    assert estimate(data=loader, max_batches=2).batches == 32 * 24 * 8
    assert estimate(data=generator(), samples=64).batches == estimate(samples=64).batches == 64 * 24 * 8
    with pytest.raises(st.errors.DataError, match="samples="):
        estimate(data=generator())


def test_it_grows_with_what_is_asked_for() -> None:
    plain, ranked, budgeted = estimate(st.Rank(2)), estimate(st.Rank(2), data=[X]), estimate(data=[X])
    assert plain.statistics == plain.batches == 0
    assert 0 < plain.peak < ranked.peak < budgeted.peak
    assert estimate(data=[X], cache=0).activations < budgeted.activations
    assert estimate(data=[X], exclude="0").statistics < budgeted.statistics
    assert estimate(data=[X], metric="activation").statistics < budgeted.statistics
    assert estimate(st.Rank(2), data=[X], reconstruct=True).peak > ranked.peak
    conv = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 4))
    image = torch.randn(2, 8, 8, 8)
    few, many = (
        st.estimate_memory(conv, st.Budget(macs=0.5), example_inputs=image, samples=64, forms=forms)
        for forms in (["channel"], None)
    )
    assert few.decompositions < many.decompositions


def test_a_plan_takes_what_its_layers_do() -> None:
    plan = st.compress(network(), st.Rank(4), example_inputs=X[:1], data=[X], exclude="2").plan
    result = estimate(plan, data=[X])
    assert result.widest == "0"
    assert result.statistics == st.calibrate(network(), [X], layers=["0"]).bytes


def test_large_statistics_are_not_in_memory_with_a_folder(tmp_path: Any) -> None:
    model = nn.Sequential(nn.Linear(2000, 4), nn.Linear(4, 4))
    options: dict[str, Any] = {"example_inputs": torch.randn(1, 2000), "samples": 10}
    usual = st.estimate_memory(model, st.Rank(1), **options)
    stored = st.estimate_memory(model, st.Rank(1), **options, offload=tmp_path)
    assert usual.statistics - stored.statistics == 8 * 2000**2 + 8 * 2000


@pytest.mark.parametrize("data", [None, [X]], ids=["plain", "data"])
def test_what_does_not_fit_is_refused_before_data_are_run(
    data: list[Tensor] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = network()
    whole = estimate(data=data, cache=0)

    def compress() -> st.Compressed:
        return st.compress(model, st.Budget(params=0.6), example_inputs=X[:1], data=data)

    monkeypatch.setattr(memory, "free_bytes", lambda _: whole.tensors - 1)
    steps: list[str] = []
    with pytest.raises(st.errors.ResourceError, match=r"exclude=\['.'\].*offload="):
        st.compress(
            model,
            st.Budget(params=0.6),
            example_inputs=X[:1],
            data=data,
            on_progress=lambda step, *_: steps.append(step),
        )
    assert steps == ["analyse"]
    monkeypatch.setattr(memory, "free_bytes", lambda _: whole.tensors)
    assert compress().measurement.params_ratio is not None


def test_it_is_shown() -> None:
    result = estimate(data=[X])
    assert "Decompositions" in str(result)
    shown_text = st.text(result)
    assert "At the highest" in shown_text
    assert f"is {result.widest}." in shown_text
    assert st.MemoryEstimate.model_validate_json(result.model_dump_json()) == result


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(st.errors.PlanError, match="cache"):
        estimate(cache=-1)
    wrong = [{"samples": -1}, {"samples": 0}, {"data": [X], "max_batches": -1}, {"data": [X], "max_batches": 0}]
    for options in (*wrong, {"data": []}, {"data": X}):
        with pytest.raises(st.errors.DataError, match=r"at least 1|empty|sample by sample"):
            estimate(**options)
    with pytest.raises(st.errors.PatternError):
        estimate(exclude="nothing")
    with pytest.raises(st.errors.ModelError):
        st.estimate_memory(network(), st.Rank(2), example_inputs=X[:, :3])


def test_a_loader_of_one_batch_is_no_larger_than_its_data() -> None:
    data = TensorDataset(torch.zeros(96, 24))
    result = estimate(st.Budget(params=0.6), data=DataLoader(data, batch_size=10**9))
    assert result == estimate(st.Budget(params=0.6), data=DataLoader(data, batch_size=96)).model_copy(
        update={"available": result.available}
    )


def test_the_fit_of_many_texts_holds_no_more_of_them() -> None:
    """Of 16,384 tokens in all, or 64 of each text."""
    model, example = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8)), torch.randn(1, 512, 64)
    some, many = (
        st.estimate_memory(model, st.Budget(macs=0.5), example_inputs=example, samples=number) for number in (32, 256)
    )
    assert many.decompositions == some.decompositions
