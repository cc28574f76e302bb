"""Projection between epochs: the weights become their best approximations, and the momentum follows."""

import pytest
import torch
from cases import Tied, inputs, same_state, small_cnn, small_mlp, state
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations

import spectrim as st
from spectrim import errors
from spectrim.training import ProjectEachEpoch

OPTIMISERS = {
    "adam": (lambda p: torch.optim.Adam(p, lr=1e-2), "exp_avg"),
    "sgd": (lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9), "momentum_buffer"),
    "plain sgd": (lambda p: torch.optim.SGD(p, lr=1e-2), None),
}


def train(model: nn.Module, optimiser: torch.optim.Optimizer, *, steps: int = 3) -> None:
    for seed in range(steps):
        x = inputs(32, 12, seed=seed + 2)
        loss = functional.cross_entropy(model(x), x[:, :4].argmax(dim=1))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


@pytest.mark.parametrize("groups", [1, 2])
def test_it_is_the_truncated_svd_of_each_group(groups: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=groups)).double()
    weight = model[0].weight
    flat = weight.detach().reshape(groups, 8 // groups, -1).clone()
    lost = ProjectEachEpoch(st.Rank(2))(model)
    U, S, Vh = torch.linalg.svd(flat, full_matrices=False)
    torch.testing.assert_close(weight.detach().reshape(flat.shape), (U[..., :2] * S[:, None, :2]) @ Vh[:, :2])
    assert model[0].weight is weight
    assert lost["0"] == pytest.approx(float(S[:, 2:].norm() / S.norm()))
    assert ProjectEachEpoch(st.Rank(2))(model)["0"] < 1e-12


@pytest.mark.parametrize("kind", OPTIMISERS)
def test_the_momentum_stays_in_the_tangent_space(kind: str) -> None:
    make, key = OPTIMISERS[kind]
    model = small_mlp()
    optimiser = make(model.parameters())
    train(model, optimiser)
    weight = model[2].weight
    before = {
        name: torch.as_tensor(value).clone() for name, value in optimiser.state[weight].items() if value is not None
    }
    bias = state(model)["2.bias"]
    ProjectEachEpoch(st.Rank(3))(model, optimiser)
    U, _, Vh = torch.linalg.svd(weight.detach())
    for name, value in before.items():
        now = torch.as_tensor(optimiser.state[weight][name])
        if name != key:
            assert torch.equal(now, value)
            continue
        normal = U[:, 3:].T @ now @ Vh[3:].T
        assert float(normal.norm()) < 1e-10 * float(value.norm())
        # only the part normal to the matrices of rank 3 has gone
        torch.testing.assert_close(now, value - U[:, 3:] @ (U[:, 3:].T @ value @ Vh[3:].T) @ Vh[3:])
    assert torch.equal(model[2].bias, bias)
    train(model, optimiser)


def test_it_counts_steps() -> None:
    model = small_mlp()
    project = ProjectEachEpoch(st.Rank(2), every_steps=3)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    ranks = []
    for _ in range(6):
        train(model, optimiser, steps=1)
        due = project.step(model, optimiser)
        ranks.append((due, int(torch.linalg.matrix_rank(model[0].weight))))
    assert ranks == 2 * [(False, 12), (False, 12), (True, 2)]
    assert project == ProjectEachEpoch(st.Rank(2), every_steps=3)


@pytest.mark.parametrize("rule", [st.Rank(3), st.Ratio(0.3), st.Energy(0.6)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_finish_factors_a_copy_with_the_same_outputs(rule: st.Rank, dtype: torch.dtype) -> None:
    model, x = small_cnn(dtype=dtype), inputs(2, 3, 12, 12, dtype=dtype)
    project = ProjectEachEpoch(rule)
    lost = project(model)
    before, ranks = (
        state(model),
        {n: int(torch.linalg.matrix_rank(model.get_submodule(n).weight.flatten(1))) for n in "08"},
    )
    small = project.finish(model)
    assert same_state(model, before)
    torch.testing.assert_close(small(x), model(x), atol=1e-5, rtol=1e-5)
    assert all(hasattr(small.get_submodule(name), "chain") for name in lost)
    assert {n: small.get_submodule(n).chain[0].weight.shape[0] for n in "08"} == ranks


def test_a_trained_weight_is_projected_in_the_copy_alone() -> None:
    model = small_mlp()
    before = state(model)
    small = ProjectEachEpoch(st.Rank(3)).finish(model)
    assert same_state(model, before)
    compressed = st.compress(model, st.Rank(3), example_inputs=inputs(4, 12)).model
    torch.testing.assert_close(small(inputs(4, 12)), compressed(inputs(4, 12)))


def test_tied_layers_stay_tied() -> None:
    torch.manual_seed(0)
    model = Tied().double()
    project = ProjectEachEpoch(st.Rank(2))
    assert set(project(model)) == {"first", "last"}
    assert model.first.weight is model.second.weight
    small = project.finish(model)
    assert small.first.chain[0].weight is small.second.chain[0].weight
    torch.testing.assert_close(small(inputs(4, 8)), model(inputs(4, 8)))


def test_errors_come_before_any_change() -> None:
    for every in (0, 1.5, True):
        with pytest.raises(errors.TrainingError, match="every_steps"):
            ProjectEachEpoch(st.Rank(2), every_steps=every)
    model = small_mlp()
    with pytest.raises(errors.TrainingError, match="every_steps, which is None"):
        ProjectEachEpoch(st.Rank(2)).step(model)
    with torch.no_grad():
        model[4].weight[0, 0] = float("nan")
    before = state(model)
    with pytest.raises(errors.TrainingError, match="weight of 4 became NaN"):
        ProjectEachEpoch(st.Rank(2))(model)
    assert torch.equal(model[0].weight, before["0.weight"])
    with pytest.raises(errors.RuleError, match="above what some layers can have"):
        ProjectEachEpoch(st.Rank(5))(model)
    with pytest.raises(errors.PatternError, match="matches no layer"):
        ProjectEachEpoch(st.Rank(2), include="fc*")(model)
    parametrizations.weight_norm(model[0])
    with pytest.raises(errors.TrainingError, match="0 is parametrised already"):
        ProjectEachEpoch(st.Rank(2))(model)
