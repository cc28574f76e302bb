"""Ranks that move during training: each rule's law, the record of it, and going on from a saved state."""

import copy
import json
from collections.abc import Callable

import pytest
import torch
from cases import SharedModule, inputs, same_state, small_cnn, small_mlp, state
from torch import nn
from torch.nn import functional

import spectrim as st
from spectrim import errors
from spectrim.training import (
    NuclearNorm,
    RankSchedule,
    Settings,
    TrainingRun,
    Truncation,
    train_in_place,
    truncated_,
)


def network(*, residual_decay: float = 0.1) -> tuple[nn.Module, Truncation]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 4))
    return model, truncated_(model, st.Ratio(1.0), trainable_rank=True, residual_decay=residual_decay, exclude="4")


def train(
    truncation: Truncation, optimiser: torch.optim.Optimizer, schedule: RankSchedule, *, steps: int, seed: int = 0
) -> None:
    generator = torch.Generator().manual_seed(seed)
    truncation.model.train()
    for _ in range(steps):
        x = torch.randn(32, 12, generator=generator)
        loss = functional.cross_entropy(truncation.model(x), x[:, :4].argmax(dim=1))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step(truncation, optimiser)


def share_kept(W: torch.Tensor, rank: int) -> float:
    squares = torch.linalg.svdvals(W.detach().double()).square()
    return float(squares[:rank].sum() / squares.sum())


def test_energy_takes_the_least_rank_that_keeps_the_share() -> None:
    model, truncation = network()
    schedule = RankSchedule(st.Energy(0.8), every=1)
    assert schedule.step(truncation)
    for name, rank in truncation.ranks.items():
        W = truncation.weights()[name]
        assert share_kept(W, rank) >= 0.8 > share_kept(W, rank - 1)
    first = dict(truncation.ranks)
    assert [dict(record.ranks) for record in schedule.history] == [{"0": 12, "2": 48}, first]
    # nothing was trained, so that asking again takes nothing more, though W outside W_D is shrunk away
    for _ in range(60):
        with torch.no_grad():
            truncation.weights()["2"].mul_(1.0)
        model.train()(torch.ones(2, 12))
    assert share_kept(truncation.weights()["2"], first["2"]) > 0.9999
    schedule.step(truncation)
    assert dict(truncation.ranks) == first


def test_energy_follows_a_weight_that_becomes_simpler_or_richer() -> None:
    _, truncation = network(residual_decay=0.0)
    schedule = RankSchedule(st.Energy(0.9), every=1)
    W = truncation.weights()["2"]
    U, S, Vh = (part.clone() for part in torch.linalg.svd(W.detach(), full_matrices=False))
    ranks = []
    for count in (20, 5, 30):
        values = torch.where(torch.arange(len(S)) < count, 1.0, 1e-4)
        with torch.no_grad():
            W.copy_((U * values) @ Vh)
        schedule.step(truncation)
        ranks.append(truncation.ranks["2"])
    assert ranks == [18, 5, 27]


@pytest.mark.parametrize("share", [0.5, 0.3, 0.17])
@pytest.mark.parametrize("every", [7, 10])
def test_a_budget_is_reached_from_below_and_never_exceeded(share: float, every: int) -> None:
    model, truncation = network()
    dense = sum(p.numel() for p in model.parameters())
    schedule = RankSchedule(st.Budget(params=share), every=every, begin=5, end=40)
    train(truncation, torch.optim.Adam(model.parameters(), lr=1e-3), schedule, steps=50)
    moves = schedule.history[1:]
    assert [record.step for record in moves] == [*(s for s in range(5, 40, every)), 40]
    for record in moves:
        ahead = 1 - (record.step - 5) / 35
        assert record.kept <= share + (1 - share) * ahead**3 + 1e-9
    small = truncation.finish()
    params = sum(p.numel() for p in small.parameters())
    assert params == round(moves[-1].kept * dense)
    # less is unused than a rank of one layer takes, the other being dense perhaps
    assert share * dense - (48 + 64) < params <= share * dense
    assert moves[0].kept > moves[-1].kept


def test_a_budget_chooses_the_ranks_of_all_layers_together() -> None:
    _, truncation = network()
    layers = truncation.weights()
    with torch.no_grad():
        for name, rank in {"0": 2, "2": 9}.items():
            U, S, Vh = torch.linalg.svd(layers[name], full_matrices=False)
            layers[name].copy_((U * torch.where(torch.arange(len(S)) < rank, 1.0, 0.01)) @ Vh)
    cost = 2 * (64 + 12) + 9 * (64 + 48) + 64 + 48 + 4 * 49
    dense = sum(p.numel() for p in truncation.model.parameters())
    schedule = RankSchedule(st.Budget(params=(cost + 20) / dense), every=1, end=1)
    schedule.step(truncation)
    assert dict(truncation.ranks) == {"0": 2, "2": 9}


def test_a_budget_of_macs_counts_as_the_measurement_does() -> None:
    model, x = small_cnn(dtype=torch.float32), inputs(2, 3, 12, 12, dtype=torch.float32)
    dense = st.measure(model, x, latency=False).macs
    truncation = truncated_(model, st.Ratio(1.0), trainable_rank=True)
    before = state(model)
    schedule = RankSchedule(st.Budget(macs=0.4), every=5, end=5, example_inputs=x)
    schedule.step(truncation)
    assert same_state(model, before)
    for _ in range(4):
        schedule.step(truncation)
    macs = st.measure(truncation.finish(), x, latency=False).macs
    assert macs == round(schedule.history[-1].kept * dense)
    assert 0.35 * dense < macs <= 0.4 * dense


def test_a_shared_weight_counts_once() -> None:
    torch.manual_seed(0)
    model = SharedModule()
    dense = sum(p.numel() for p in model.parameters())
    truncation = truncated_(model, st.Ratio(1.0), trainable_rank=True)
    schedule = RankSchedule(st.Budget(params=0.8), every=1, end=1)
    schedule.step(truncation)
    small = truncation.finish()
    assert sum(p.numel() for p in small.parameters()) == round(schedule.history[-1].kept * dense) <= 0.8 * dense


def test_the_penalty_lowers_every_value_by_the_learning_rates_times_its_strength() -> None:
    model, truncation = network()
    optimiser = torch.optim.SGD(
        [{"params": model[0].parameters(), "lr": 0.0}, {"params": model[2].parameters(), "lr": 0.0}]
    )
    schedule = RankSchedule(NuclearNorm(0.5), every=3, begin=1)
    values = {name: torch.linalg.svdvals(weight.detach()) for name, weight in truncation.weights().items()}
    for rates in ((0.1, 0.2), (0.3, 0.0), (0.2, 0.4), (0.1, 0.1)):
        for group, rate in zip(optimiser.param_groups, rates, strict=True):
            group["lr"] = rate
        schedule.step(truncation, optimiser)
    for name, total in {"0": 0.7, "2": 0.7}.items():
        lowered = (values[name] - 0.5 * total).clamp(min=0)
        torch.testing.assert_close(
            torch.linalg.svdvals(truncation.weights()[name].detach()), lowered, atol=1e-5, rtol=1e-5
        )
        assert truncation.ranks[name] == int((lowered > 0).sum())
    assert [record.step for record in schedule.history] == [0, 1, 4]


def test_the_penalty_finds_low_ranks_in_training() -> None:
    ranks = []
    for strength in (0.3, 3.0):
        model, truncation = network()
        schedule = RankSchedule(NuclearNorm(strength), every=10)
        train(truncation, torch.optim.Adam(model.parameters(), lr=1e-2), schedule, steps=60)
        history = [record.ranks["2"] for record in schedule.history]
        assert history == sorted(history, reverse=True)
        ranks.append(history[-1])
        dense = sum(p.numel() for p in model.parameters())
        small = truncation.finish()
        assert sum(p.numel() for p in small.parameters()) == round(schedule.history[-1].kept * dense)
        assert schedule.history[-1].kept <= 1
    assert 1 <= ranks[1] < ranks[0] < 48


def test_it_works_from_the_loop_of_this_library() -> None:
    model, truncation = network()
    x = inputs(64, 12, dtype=torch.float32)
    schedule = RankSchedule(st.Budget(params=0.4), every=4, end=12)
    train_in_place(
        TrainingRun(
            model,
            [(part, part[:, :4].argmax(dim=1)) for part in x.split(16)],
            settings=Settings(epochs=4, lr=1e-2, clip=None),
            on_step=lambda _: schedule.step(truncation) and None,
        )
    )
    assert [record.step for record in schedule.history] == [0, 4, 8, 12]
    weights = truncation.weights()
    truncation.model.eval()(x)
    for name, rank in truncation.ranks.items():
        W, low_rank = weights[name].detach(), model.get_submodule(name).weight.detach()
        values = torch.linalg.svdvals(W)
        assert float((W - low_rank).norm()) == pytest.approx(float(values[rank:].norm()), rel=1e-3, abs=1e-5)


RULES: list[Callable[[], RankSchedule]] = [
    lambda: RankSchedule(st.Energy(0.7), every=4),
    lambda: RankSchedule(st.Budget(params=0.3), every=4, end=18),
    lambda: RankSchedule(NuclearNorm(0.5), every=4),
]


@pytest.mark.parametrize("make", RULES)
def test_a_saved_run_goes_on_the_same(make: Callable[[], RankSchedule]) -> None:
    def fresh() -> tuple[Truncation, torch.optim.Optimizer, RankSchedule]:
        model, truncation = network()
        return truncation, torch.optim.Adam(model.parameters(), lr=1e-2), make()

    whole = fresh()
    train(*whole, steps=10)
    saved = copy.deepcopy((whole[0].model.state_dict(), whole[1].state_dict())), json.dumps(whole[2].state_dict())
    train(*whole, steps=12, seed=1)
    again = fresh()
    again[0].model.load_state_dict(saved[0][0])
    again[1].load_state_dict(saved[0][1])
    again[2].load_state_dict(json.loads(saved[1]))
    train(*again, steps=12, seed=1)
    assert same_state(again[0].model, state(whole[0].model))
    assert again[2].history == whole[2].history
    assert len({tuple(record.ranks.values()) for record in whole[2].history}) > 1
    assert json.loads(whole[2].history[-1].model_dump_json())["ranks"] == dict(whole[0].ranks)


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: RankSchedule(st.Rank(3)), errors.RuleError, "does not move ranks"),
        (lambda: RankSchedule(st.Budget(bytes=0.3), end=9), errors.RuleError, "params= or macs="),
        (lambda: RankSchedule(st.Budget(params=0.3)), errors.TrainingError, "end=None"),
        (lambda: RankSchedule(st.Budget(params=0.3), begin=9, end=9), errors.TrainingError, "at least 10"),
        (lambda: RankSchedule(st.Budget(macs=0.3), end=9), errors.TrainingError, "example_inputs"),
        (lambda: RankSchedule(st.Energy(0.3), every=0), errors.TrainingError, "every=0"),
        (lambda: RankSchedule(st.Energy(0.3), every=None), errors.TrainingError, "every=None"),
        (lambda: RankSchedule(st.Energy(0.3), begin=-1), errors.TrainingError, "begin=-1"),
        (lambda: NuclearNorm(0.0), errors.RuleError, "above 0"),
        (lambda: NuclearNorm(float("inf")), errors.RuleError, "above 0"),
    ],
)
def test_what_cannot_be_meant(make: Callable[[], object], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        make()


def test_a_step_that_fails_changes_neither_ranks_nor_count() -> None:
    model, truncation = network()
    truncation.set_ranks({"2": 9})
    before = state(model)
    other = torch.optim.SGD(small_mlp().parameters(), lr=0.1)
    for schedule, optimiser, kind, message in [
        (RankSchedule(st.Budget(params=0.05), end=9), None, errors.RuleError, "cannot be reached"),
        (RankSchedule(st.Budget(params=0.95), end=9), None, errors.RuleError, "costs already"),
        (RankSchedule(NuclearNorm(0.1)), None, errors.TrainingError, "learning rate"),
        (RankSchedule(NuclearNorm(0.1)), other, errors.TrainingError, "weight of 0 is not among"),
    ]:
        with pytest.raises(kind, match=message):
            schedule.step(truncation, optimiser)
        assert schedule.history == ()
        assert schedule.state_dict()["step"] == 0
    assert same_state(model, before)
    schedule = RankSchedule(st.Energy(0.5), every=1)
    with torch.no_grad():
        truncation.weights()["2"][0, 0] = float("nan")
    with pytest.raises(errors.TrainingError, match="weight of 2 became NaN"):
        schedule.step(truncation)
    assert dict(truncation.ranks) == {"0": 12, "2": 9}
    with pytest.raises(errors.TrainingError, match=r"state of RankSchedule\(Energy"):
        RankSchedule(st.Energy(0.4)).load_state_dict(schedule.state_dict())
    for damaged in ({"step": 3}, {"schedule": 1}, {**schedule.state_dict(), "step": -1}):
        with pytest.raises(errors.TrainingError, match="not the state"):
            schedule.load_state_dict(damaged)


def test_the_ranks_over_time_are_a_figure() -> None:
    _, truncation = network()
    schedule = RankSchedule(st.Budget(params=0.5), every=2, end=8)
    train(truncation, torch.optim.Adam(truncation.weights().values()), schedule, steps=10)
    figure = st.plot_ranks(schedule.history)
    first, second, cost = figure.data
    assert [trace.name for trace in (first, second, cost)] == ["0", "2", "cost"]
    assert list(first.x) == list(cost.x) == [record.step for record in schedule.history]
    assert list(second.y) == [record.ranks["2"] for record in schedule.history]
    assert list(cost.y) == pytest.approx([100 * record.kept for record in schedule.history])
    with pytest.raises(errors.DataError, match="history is empty"):
        st.plot_ranks(())
