"""Truncation in every forward pass: the outputs are those of W_D, the gradients those of W, and it ends cleanly."""

import copy
from collections.abc import Callable

import pytest
import torch
from cases import Double, SharedModule, Tied, inputs, same_state, small_cnn, small_mlp, state
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize

import spectrim as st
from spectrim import errors
from spectrim.training import truncated_


def best(W: Tensor, rank: int, *, groups: int = 1) -> Tensor:
    """The best approximation of each group's (out, in * kernel) matrix, by torch's SVD."""
    flat = W.detach().reshape(groups, len(W) // groups, -1)
    U, S, Vh = torch.linalg.svd(flat, full_matrices=False)
    return ((U[..., :rank] * S[:, None, :rank]) @ Vh[:, :rank]).reshape(W.shape)


def full(layer: nn.Module) -> nn.Parameter:
    return layer.get_parameter("parametrizations.weight.original")


def train(model: nn.Module, optimiser: torch.optim.Optimizer, *, steps: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    kind = next(model.parameters()).dtype
    model.train()
    for _ in range(steps):
        x = torch.randn(32, 12, generator=generator, dtype=kind)
        loss = functional.cross_entropy(model(x), x[:, :4].argmax(dim=1))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


@pytest.mark.parametrize("exact", [False, True])
def test_a_linear_layer_computes_w_d_and_gives_w_the_gradient_of_the_identity(exact: bool) -> None:
    model = nn.Sequential(nn.Linear(12, 9)).double()
    x, W, b = inputs(5, 12), model[0].weight, model[0].bias
    before, truncation = W.detach().clone(), truncated_(model, st.Rank(3), exact=exact)
    assert full(model[0]) is W
    assert dict(truncation.ranks) == {"0": 3}
    y = model(x)
    torch.testing.assert_close(y, x @ best(before, 3).T + b)
    y.square().sum().backward()
    torch.testing.assert_close(W.grad, 2 * y.detach().T @ x)
    assert torch.equal(W, before)


OPTIONS = [
    {"stride": 2, "padding": 1},
    {"dilation": 2, "padding": 2, "padding_mode": "reflect"},
    {"groups": 2, "stride": (1, 2)},
    {"bias": False},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_convolution_keeps_its_options_and_gets_the_gradient_of_the_identity(options: dict[str, object]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3, **options)).double()
    groups = model[0].groups
    dense = copy.deepcopy(model)
    with torch.no_grad():
        dense[0].weight.copy_(best(model[0].weight, 2, groups=groups))
    truncation = truncated_(model, st.Rank(2))
    x = inputs(3, 4, 10, 10)
    torch.testing.assert_close(model(x), dense(x))
    for net in (model, dense):
        net(x).square().sum().backward()
    # the gradient of the dense layer of weight W_D is passed to W unchanged
    torch.testing.assert_close(full(model[0]).grad, dense[0].weight.grad)
    small = truncation.finish()
    assert isinstance(small[0], st.LowRankConv2d)
    torch.testing.assert_close(small(x), dense(x), atol=1e-9, rtol=1e-9)


def test_finite_differences_where_the_loss_is_a_function_of_w_d() -> None:
    model = nn.Sequential(nn.Linear(6, 5, bias=False)).double()
    W, x = model[0].weight, inputs(7, 6)
    truncated_(model, st.Rank(4), exact=True)
    model(x).sin().sum().backward()
    start, step = best(W, 4), 1e-6
    for i, j in [(0, 0), (2, 3), (4, 5)]:
        ends = []
        for sign in (1, -1):
            moved = start.clone()
            moved[i, j] += sign * step
            ends.append(float((x @ moved.T).sin().sum()))
        assert float(W.grad[i, j]) == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("rule", [st.Rank(3), st.Ratio(0.3), st.Energy(0.6)], ids=str)
@pytest.mark.parametrize("make", [small_mlp, small_cnn])
def test_finish_gives_factors_with_the_same_outputs(make: Callable[..., nn.Module], rule: st.Rank) -> None:
    model = make()
    x = inputs(6, 12) if make is small_mlp else inputs(2, 3, 12, 12)
    truncation = truncated_(model, rule)
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    for _ in range(5):
        optimiser.zero_grad()
        model(x).square().mean().backward()
        optimiser.step()
    expected = model.eval()(x)
    small = truncation.finish()
    assert small is model
    assert not any(parametrize.is_parametrized(module) for module in small.modules())
    assert all(hasattr(small.get_submodule(name), "chain") for name in truncation.ranks)
    torch.testing.assert_close(small(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("end", ["finish", "remove"])
def test_a_copy_made_before_the_end_outlives_it(end: str) -> None:
    model = small_mlp()
    truncation = truncated_(model, st.Rank(3), exact=True)
    train(model, torch.optim.Adam(model.parameters(), lr=1e-2), steps=3)
    copied = copy.deepcopy(model).eval()
    x = inputs(5, 12)
    before = copied(x).detach()
    getattr(truncation, end)()
    torch.testing.assert_close(copied(x), before)
    torch.testing.assert_close(model.eval()(x), before, rtol=1e-4, atol=1e-5)
    plain = copy.deepcopy(copied)
    for layer in plain.modules():
        if parametrize.is_parametrized(layer):
            parametrize.remove_parametrizations(layer, "weight")
    torch.testing.assert_close(plain(x), before)


def test_remove_gives_back_the_plain_layers_with_the_same_outputs() -> None:
    model = small_mlp()
    weight, x = model[0].weight, inputs(6, 12)
    truncation = truncated_(model, st.Rank(3))
    train(model, torch.optim.Adam(model.parameters()), steps=3)
    expected = model.eval()(x)
    truncation.remove()
    assert type(model[0]) is nn.Linear
    assert model[0].weight is weight
    assert torch.linalg.matrix_rank(weight) == 3
    torch.testing.assert_close(model(x), expected)
    for end in (truncation.remove, truncation.finish):
        with pytest.raises(errors.TrainingError, match="ended already"):
            end()


def test_factors_that_do_not_fit_the_number_type_leave_plain_layers_with_the_same_outputs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, x = small_mlp(dtype=torch.float32), inputs(6, 12, dtype=torch.float32)
    truncation = truncated_(model, st.Rank(3))
    expected = model.eval()(x)
    monkeypatch.setattr("spectrim.layers.replacement._MOST_ROUNDED", -1.0)  # no rounding is allowed at all
    with pytest.raises(errors.ModelError, match="does not survive"):
        truncation.finish()
    assert [type(model[place]) for place in (0, 2, 4)] == [nn.Linear] * 3
    torch.testing.assert_close(model(x), expected)


def test_it_learns_and_the_decayed_residual_is_smaller_than_that_of_the_published_method() -> None:
    outside = {}
    for decay in (0.0, 0.1):
        model = small_mlp(dtype=torch.float32)
        start = state(model)
        truncation = truncated_(model, st.Rank(3), residual_decay=decay)
        x = inputs(256, 12, dtype=torch.float32)
        train(model, torch.optim.Adam(model.parameters(), lr=1e-2), steps=60)
        weights = {name: full(model.get_submodule(name)).detach() for name in truncation.ranks}
        outside[decay] = sum(float((W - best(W, 3)).norm()) for W in weights.values())
        untrained = sum(float((W - best(W, 3)).norm()) for W in (start["0.weight"], start["2.weight"]))
        assert outside[decay] < untrained or decay == 0
        truncation.finish()
        assert model(x).isfinite().all()
    assert outside[0.1] < 0.5 * outside[0.0]


def test_the_residual_decays_once_a_step_and_only_in_training() -> None:
    model = small_mlp()
    x, layer = inputs(6, 12), model[0]
    truncated_(model, st.Rank(3))
    W = full(layer)
    model(x)
    with torch.no_grad():
        W += 0.01 * inputs(*W.shape)
    changed = W.detach().clone()
    model.eval()(x)
    assert torch.equal(W, changed)
    model.train()
    model(x)
    decayed = best(changed, 3) + 0.9 * (changed - best(changed, 3))
    torch.testing.assert_close(W.detach(), decayed, atol=1e-6, rtol=1e-6)
    after = W.detach().clone()
    for mode in (True, False, True):
        model.train(mode)(x)
    assert torch.equal(W, after)


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("exact", [False, True])
def test_fused_optimisers_are_noticed_though_they_do_not_count(kind: type[torch.optim.Optimizer], exact: bool) -> None:
    model, x = small_mlp(), inputs(6, 12)
    truncated_(model, st.Rank(3), exact=exact)
    optimiser, W = kind(model.parameters(), lr=1e-2, fused=True), full(model[0])
    for _ in range(3):
        model(x).square().sum().backward()
        before = W.detach().clone()
        # two more passes without a step change nothing
        model(x).square().sum().backward()
        model.eval()(x)
        assert torch.equal(model.train()[0].weight, model[0].weight)
        assert torch.equal(W, before)
        optimiser.step()
        optimiser.zero_grad()
        stepped = W.detach().clone()
        assert not torch.equal(stepped, before)
        torch.testing.assert_close(model.eval()[0].weight.detach(), best(stepped, 3), atol=1e-4, rtol=1e-4)
        model.train()(x)
        torch.testing.assert_close(W.detach(), best(stepped, 3) + 0.9 * (stepped - best(stepped, 3)), atol=1e-4, rtol=0)


def test_published_training_never_changes_the_weight_itself() -> None:
    model = small_mlp()
    truncated_(model, st.Rank(3), residual_decay=0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        full(model[0]).add_(0.1)
    before["0.parametrizations.weight.original"] += 0.1
    model(inputs(6, 12))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("make", [Double, SharedModule, Tied])
def test_a_shared_weight_is_truncated_and_decays_once(make: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = make().double()
    x = inputs(5, 6 if make is Double else 8)
    truncation = truncated_(model, st.Rank(2))
    calls = []
    real = st.training.low_rank_parametrization.truncate
    monkeypatch.setattr(
        st.training.low_rank_parametrization, "truncate", lambda *a, **k: calls.append(1) or real(*a, **k)
    )
    model(x).sum().backward()
    assert not calls
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01)
    optimiser.step()
    W = full(model.get_submodule(next(iter(truncation.ranks))))
    stepped = W.detach().clone()
    expected = model(x)
    assert len(calls) == len(truncation.ranks)
    torch.testing.assert_close(W.detach(), best(stepped, 2) + 0.9 * (stepped - best(stepped, 2)))
    torch.testing.assert_close(truncation.finish()(x), expected)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("exact", [False, True])
def test_training_goes_on_bit_for_bit_from_a_state_dict(exact: bool, fused: bool) -> None:
    def fresh() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 80), nn.ReLU(), nn.Linear(80, 80), nn.ReLU(), nn.Linear(80, 4))
        truncated_(model, st.Rank(4), exact=exact, exclude="4")
        return model, torch.optim.Adam(model.parameters(), lr=1e-2, fused=fused)

    whole, optimiser = fresh()
    train(whole, optimiser, steps=10)
    whole.eval()(torch.ones(1, 12))  # evaluating in between changes nothing
    saved = copy.deepcopy((whole.state_dict(), optimiser.state_dict()))
    train(whole, optimiser, steps=10, seed=1)
    again, other = fresh()
    again.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    train(again, other, steps=10, seed=1)
    assert same_state(again, state(whole))


def test_a_copy_trains_by_itself_and_fine_tuning_works() -> None:
    model = small_mlp(dtype=torch.float32)
    truncated_(model, st.Rank(3))
    before = state(model)
    x = inputs(64, 12, dtype=torch.float32)
    tuned = st.finetune(model, [(x, torch.arange(64) % 4)], epochs=2, lr=1e-2)
    assert same_state(model, before)
    assert not torch.equal(full(tuned.model[0]), full(model[0]))


def test_autocast_and_inference_mode_leave_no_trace() -> None:
    model = small_mlp(dtype=torch.float32)
    x = inputs(6, 12, dtype=torch.float32)
    truncated_(model, st.Rank(3))
    with torch.no_grad():
        full(model[0]).mul_(1.01)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        model.eval()(x)
    model(x).sum().backward()
    torch.testing.assert_close(model[0].weight.detach(), best(full(model[0]), 3))


def test_what_is_left_out_says_why() -> None:
    truncation = truncated_(small_mlp(), st.Rank(4), exclude="0")
    assert dict(truncation.ranks) == {"2": 4}
    assert "not selected" in truncation.skipped["0"]
    assert "full rank" in truncation.skipped["4"]
    assert "last layer" in truncated_(small_mlp(), st.Rank(5), keep_last=True).skipped["4"]


def normed() -> nn.Module:
    model = small_mlp()
    parametrizations.weight_norm(model[0])
    return model


def already() -> nn.Module:
    model = small_mlp()
    truncated_(model, st.Rank(2), exclude="4")
    return model


def broken() -> nn.Module:
    model = small_mlp()
    with torch.no_grad():
        model[2].weight[0, 0] = float("nan")
    return model


@pytest.mark.parametrize(
    ("make", "options", "kind", "message"),
    [
        (normed, {}, errors.TrainingError, "0 is parametrised already"),
        (already, {}, errors.TrainingError, "0 is parametrised already, perhaps truncated; call finish"),
        (broken, {}, errors.TrainingError, "2: the 16 x 16 weight has NaN"),
        (small_mlp, {"rule": st.Rank(5)}, errors.RuleError, r"4 \[4, 16\] has full rank 4"),
        (small_mlp, {"rule": st.Ratio(1.0)}, errors.TrainingError, "leaves no layer to truncate"),
        (small_mlp, {"rule": st.Budget(macs=0.5)}, errors.RuleError, "does not say a rank for each layer"),
        (small_mlp, {"include": "fc*"}, errors.PatternError, "matches no layer"),
        (small_mlp, {"residual_decay": 1.5}, errors.TrainingError, "not a share"),
        (lambda: nn.Sequential(nn.ReLU()), {}, errors.ModelError, "no Linear or convolution layer"),
    ],
)
def test_errors_come_before_any_change(
    make: Callable[[], nn.Module], options: dict[str, object], kind: type[Exception], message: str
) -> None:
    model = make()
    before = state(model)
    with pytest.raises(kind, match=message):
        truncated_(model, **{"rule": st.Rank(2), **options})
    assert all(
        torch.equal(a, b) or bool(a.isnan().any())
        for a, b in zip(model.state_dict().values(), before.values(), strict=True)
    )
    assert list(model.state_dict()) == list(before)


def test_a_weight_that_becomes_nan_in_training_is_named() -> None:
    model = small_mlp()
    truncated_(model, st.Rank(2))
    with torch.no_grad():
        full(model[2]).fill_(float("nan"))
    with pytest.raises(errors.TrainingError, match="2: the 16 x 16 weight has NaN"):
        model(inputs(2, 12))


def with_trainable_ranks(*, exact: bool = False) -> tuple[nn.Module, st.training.Truncation]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 80), nn.ReLU(), nn.Linear(80, 80), nn.ReLU(), nn.Linear(80, 4))
    return model, truncated_(model, st.Ratio(1.0), trainable_rank=True, exact=exact)


def test_at_full_rank_nothing_changes_and_finish_gives_the_plain_layers_back() -> None:
    model, x = small_cnn(), inputs(2, 3, 12, 12)
    plain = copy.deepcopy(model)
    truncation = truncated_(model, st.Ratio(1.0), trainable_rank=True)
    assert dict(truncation.ranks) == truncation.full_ranks
    ranks = dict.fromkeys(truncation.ranks, 2)
    truncation.set_ranks(ranks)
    assert dict(truncation.ranks) == ranks
    assert not torch.allclose(model.eval()(x), plain(x))
    truncation.set_ranks(truncation.full_ranks)
    assert torch.equal(model(x), plain(x))
    model(x).square().sum().backward()
    plain(x).square().sum().backward()
    for name, weight in truncation.weights().items():
        assert torch.equal(weight.grad, plain.get_submodule(name).weight.grad)
    assert truncation.finish() is model
    assert same_state(model, state(plain))


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(("before", "after"), [(8, 3), (3, 8), (80, 5), (30, 4), (4, 30), (4, 80)])
def test_ranks_move_down_and_up(before: int, after: int, exact: bool) -> None:
    model, truncation = with_trainable_ranks(exact=exact)
    truncation.set_ranks({"2": before})
    train(model, torch.optim.Adam(model.parameters(), lr=1e-3), steps=2)
    truncation.set_ranks({"2": after})
    W = truncation.weights()["2"].detach().clone()
    model.eval()
    low_rank = model[2].weight.detach()
    assert float((W - low_rank).norm()) <= (1 + 1e-4) * float((W - best(W, after)).norm()) + 1e-5
    assert torch.linalg.matrix_rank(low_rank, rtol=1e-5) == after
    assert torch.equal(truncation.weights()["2"], W)
    assert truncation.ranks["2"] == after
    small = truncation.finish()
    assert after == 80 or small[2].rank == after
    assert type(small[0]) is nn.Linear


@pytest.mark.parametrize("rank", [39, 40, 79])
def test_a_layer_of_trainable_rank_stays_dense_where_factors_would_not_be_smaller(rank: int) -> None:
    model, truncation = with_trainable_ranks()
    x = inputs(5, 12, dtype=torch.float32)
    truncation.set_ranks({"2": rank})
    assert truncation.stays_dense("2", rank) == (rank >= 40)
    expected, before = model.eval()(x), sum(p.numel() for p in model.parameters())
    small = truncation.finish()
    torch.testing.assert_close(small(x), expected, atol=1e-5, rtol=1e-5)
    assert type(small[2]) is (nn.Linear if rank >= 40 else st.LowRankLinear)
    assert sum(p.numel() for p in small.parameters()) <= before
    assert torch.linalg.matrix_rank(small[2].weight) == rank


@pytest.mark.parametrize("exact", [False, True])
def test_training_goes_on_bit_for_bit_after_the_ranks_have_moved(exact: bool) -> None:
    def fresh() -> tuple[nn.Module, st.training.Truncation, torch.optim.Optimizer]:
        model, truncation = with_trainable_ranks(exact=exact)
        return model, truncation, torch.optim.Adam(model.parameters(), lr=1e-2)

    whole, truncation, optimiser = fresh()
    for seed, ranks in enumerate([{"2": 9}, {"2": 5, "0": 2}, {"2": 7}]):
        truncation.set_ranks(ranks)
        train(whole, optimiser, steps=3, seed=seed)
    truncation.set_ranks({"2": 4})
    saved = copy.deepcopy((whole.state_dict(), optimiser.state_dict()))
    train(whole, optimiser, steps=10, seed=7)
    again, other_truncation, other = fresh()
    again.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    assert dict(other_truncation.ranks) == {"0": 2, "2": 4, "4": 4}
    train(again, other, steps=10, seed=7)
    assert same_state(again, state(whole))


@pytest.mark.parametrize("rank", [12, 5])
@pytest.mark.parametrize("groups", [1, 2])
def test_soft_threshold_is_the_proximal_operator(rank: int, groups: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4 * groups, 12 * groups, 3, groups=groups)).double()
    truncation = truncated_(model, st.Rank(rank), trainable_rank=True)
    W = truncation.weights()["0"]
    U, S, Vh = torch.linalg.svd(W.detach().reshape(groups, 12, -1), full_matrices=False)
    S[:, rank:] = 0
    amount = float(S[:, 3:5].mean())
    lowered = (S - amount).clamp(min=0)
    ranks = truncation.soft_threshold({"0": amount})
    expected = (U * lowered.unsqueeze(1)) @ Vh
    torch.testing.assert_close(W.detach().reshape(expected.shape), expected)
    assert ranks["0"] == truncation.ranks["0"] == int((lowered > 0).sum(dim=1).max())
    # no other matrix of that rank makes t |X|_* + |X - W|^2 / 2 smaller
    start = (U * S.unsqueeze(1)) @ Vh

    def value(X: Tensor) -> float:
        return float(amount * torch.linalg.svdvals(X).sum() + 0.5 * (X - start).square().sum())

    least = value(expected)
    for seed in range(5):
        moved = expected + 1e-3 * inputs(*expected.shape, seed=seed)
        assert value(torch.stack([best(matrix, rank) for matrix in moved])) > least
    torch.testing.assert_close(model[0].weight.detach(), W.detach())


def test_a_threshold_above_every_value_leaves_zero_and_rank_1() -> None:
    model, truncation = with_trainable_ranks()
    assert dict(truncation.soft_threshold({"2": 1e6})) == {"2": 1}
    assert float(truncation.weights()["2"].detach().abs().max()) == 0
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), steps=2)
    assert all(p.isfinite().all() for p in model.parameters())


def test_ranks_by_name_leave_every_other_layer_alone() -> None:
    model = small_mlp()
    truncation = truncated_(model, {"2": 3})
    assert dict(truncation.ranks) == {"2": 3}
    assert "not among the ranks" in truncation.skipped["0"]
    for ranks, kind, message in [
        ({"fc": 3}, errors.PatternError, "no layer 'fc'"),
        ({"0": 13}, errors.RuleError, "full rank, 12"),
        ({"0": True}, errors.RuleError, "whole number"),
        ({}, errors.TrainingError, "no layer to truncate"),
    ]:
        with pytest.raises(kind, match=message):
            truncated_(small_mlp(), ranks)


def test_moving_ranks_is_checked_wholly_before_anything_changes() -> None:
    model, truncation = with_trainable_ranks()
    truncation.set_ranks({"0": 3, "2": 9})
    before = state(model)
    for ranks, kind, message in [
        ({"0": 2, "fc2": 3}, errors.PatternError, "no layer 'fc2'"),
        ({"0": 2, "2": 0}, errors.RuleError, "rank 0 for 2"),
        ({"0": 2, "2": 81}, errors.RuleError, "full rank, 80"),
        ({"0": 2, "2": 2.0}, errors.RuleError, "whole number"),
    ]:
        with pytest.raises(kind, match=message):
            truncation.set_ranks(ranks)
    for amounts, kind, message in [
        ({"0": 0.1, "2": -1.0}, errors.RuleError, "threshold -1.0 for 2"),
        ({"0": 0.1, "2": float("nan")}, errors.RuleError, "threshold nan for 2"),
        ({"0": 0.1, "1": 0.1}, errors.PatternError, "no truncated layer '1'"),
    ]:
        with pytest.raises(kind, match=message):
            truncation.soft_threshold(amounts)
    with torch.no_grad():
        truncation.weights()["2"][0, 0] = float("nan")
    for call in (
        lambda: truncation.set_ranks({"0": 2, "2": 4}),
        lambda: truncation.set_ranks({"0": 2, "2": 40}),
        lambda: truncation.soft_threshold({"0": 0.1, "2": 0.1}),
        truncation.spectra,
    ):
        with pytest.raises(errors.TrainingError, match="NaN"):
            call()
    with torch.no_grad():
        truncation.weights()["2"].copy_(before["2.parametrizations.weight.original"])
    assert same_state(model, before)
    truncation.remove()
    with pytest.raises(errors.TrainingError, match="ended already"):
        truncation.set_ranks({"0": 2})
    assert dict(truncation.ranks) == {"0": 3, "2": 9, "4": 4}
