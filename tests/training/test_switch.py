"""The switch to low rank: stable ranks as defined, the rule when they are stable, and one real training run."""

import json
import math
from itertools import pairwise

import pytest
import torch
from cases import same_state, small_cnn, small_mlp, state
from torch import nn

import spectrim as st
from spectrim import errors
from spectrim.models import mlp
from spectrim.recipes.images import Images, Minibatches, load_images
from spectrim.training import ProjectEachEpoch, Settings, Switch, TrainingRun, train_in_place, truncated_


def with_values(model: nn.Module, values: dict[str, list[float]]) -> None:
    """Give the named weights these singular values, then zeros."""
    for name, nonzero in values.items():
        weight = model.get_submodule(name).weight
        U, S, Vh = torch.linalg.svd(weight.detach(), full_matrices=False)
        S = torch.zeros_like(S)
        S[: len(nonzero)] = torch.tensor(nonzero, dtype=S.dtype)
        with torch.no_grad():
            weight.copy_((U * S) @ Vh)


def test_stable_ranks_are_those_of_the_definition_scaled_to_start_from_full_rank() -> None:
    model = small_mlp()
    before = state(model)
    switch = Switch()
    assert switch.step(model) is None
    assert same_state(model, before)
    look = switch.history[0]
    for name, full in {"0": 12, "2": 16, "4": 4}.items():
        W = model.get_submodule(name).weight.detach()
        expected = float(W.norm() ** 2 / torch.linalg.matrix_norm(W, 2) ** 2)
        assert look.stable[name] == pytest.approx(expected)
        assert look.scaled[name] == pytest.approx(full)
    with_values(model, {"2": [3.0, 3.0, 3.0]})
    switch.step(model)
    assert switch.history[1].stable["2"] == pytest.approx(3.0)
    assert switch.history[1].scaled["2"] == pytest.approx(3.0 * 16 / look.stable["2"])


def test_it_waits_until_every_layer_has_been_stable_for_long_enough() -> None:
    model = small_mlp()
    switch = Switch(epsilon=0.05, patience=2, exclude="4")
    # stable ranks 1 + value^2 of the second one
    course = [(1.0, 1.0), (0.5, 0.5), (0.5, 0.49), (0.5, 0.9), (0.49, 0.9), (0.48, 0.88)]
    results = []
    for first, second in course:
        with_values(model, {"0": [1.0, first], "2": [1.0, second]})
        results.append(switch.step(model))
    assert [ranks is None for ranks in results] == [True, True, True, True, True, False]
    scaled = {"0": 12 * (1 + 0.48**2) / 2, "2": 16 * (1 + 0.88**2) / 2}
    for name, rank in scaled.items():
        assert switch.history[-1].scaled[name] == pytest.approx(rank)
    # 8 x 28 factors would not be smaller than 12 x 16, nor 15 x 32 than 16 x 16
    assert dict(results[-1]) == {}
    with_values(model, {"0": [1.0], "2": [1.0]})
    assert switch.step(model) is None
    assert switch.step(model) is None
    assert dict(switch.step(model)) == {"0": 6}


def test_a_saved_watch_goes_on_the_same() -> None:
    model, other = small_cnn(), Switch(patience=1, epsilon=0.5)
    switch = Switch(patience=1, epsilon=0.5)
    switch.step(model)
    other.load_state_dict(json.loads(json.dumps(switch.state_dict())))
    assert other.step(model) == switch.step(model)
    assert other.history == switch.history
    with pytest.raises(errors.TrainingError, match="not the state of a Switch"):
        other.load_state_dict({"history": []})


@pytest.fixture(scope="module")
def digits() -> Images:
    return load_images("digits", held_out=297)


def test_a_real_run_becomes_stable_and_trains_on_in_low_rank(digits: Images) -> None:
    torch.manual_seed(0)
    model = mlp(64, 10, width=96, hidden=2)
    switch = Switch(epsilon=0.05, patience=2, keep_last=True)
    switch.step(model)
    ranks = None
    for epoch in range(15):
        settings = Settings(epochs=1, lr=2e-3, warm_up=0.0, clip=None)
        batches = Minibatches(digits.train.images, digits.train.labels, 64, 0, epoch)
        train_in_place(TrainingRun(model, batches, settings=settings))
        ranks = switch.step(model)
        if ranks is not None:
            break
    assert ranks
    assert 3 <= len(switch.history) <= 15
    looks = switch.history
    assert any(
        abs(b.stable[name] - a.stable[name]) > 0.05 * a.stable[name] for a, b in pairwise(looks) for name in a.stable
    ), "training changed the stable ranks before they became stable"
    full = {"fc1": 64, "fc2": 96}
    assert all(rank == math.ceil(looks[-1].scaled[name]) < full[name] for name, rank in ranks.items())
    dense = st.accuracy(model, digits.held_out.batches()).value
    factored = ProjectEachEpoch(ranks).finish(model)
    assert {name: factored.get_submodule(name).rank for name in ranks} == dict(ranks)
    truncation = truncated_(model, ranks)
    train_in_place(
        TrainingRun(
            model,
            lambda epoch: Minibatches(digits.train.images, digits.train.labels, 64, 1, epoch),
            settings=Settings(epochs=2, lr=1e-3, clip=None),
        )
    )
    small = truncation.finish()
    assert sum(p.numel() for p in small.parameters()) < sum(
        p.numel() for p in mlp(64, 10, width=96, hidden=2).parameters()
    )
    assert dense > 0.9
    assert st.accuracy(small, digits.held_out.batches()).value > dense - 0.02


def test_errors() -> None:
    for options, message in [
        ({"epsilon": 0.0}, "epsilon"),
        ({"epsilon": float("nan")}, "epsilon"),
        ({"patience": 0}, "patience"),
        ({"patience": True}, "patience"),
    ]:
        with pytest.raises(errors.TrainingError, match=message):
            Switch(**options)
    switch, model = Switch(), small_mlp()
    switch.step(model)
    with pytest.raises(errors.TrainingError, match="at the first look"):
        switch.step(small_cnn())
    with torch.no_grad():
        model[2].weight[0, 0] = float("nan")
    with pytest.raises(errors.TrainingError, match="weight of 2 became NaN"):
        switch.step(model)
    assert len(switch.history) == 1
    with pytest.raises(errors.PatternError, match="matches no layer"):
        Switch(include="fc*").step(model)
    zero = nn.Sequential(nn.Linear(8, 8))
    nn.init.zeros_(zero[0].weight)
    switch = Switch(patience=1)
    switch.step(zero)
    with_values(zero.double(), {"0": [1.0, 1.0]})
    switch.step(zero)
    assert switch.history[1].scaled["0"] == pytest.approx(2.0)
