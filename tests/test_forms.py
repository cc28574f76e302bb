"""The channel form of convolutions: every option that PyTorch allows, exact at full rank, never silently wrong."""

from pathlib import Path
from typing import Any

import pytest
import torch
from cases import inputs, same_state, state
from torch import Tensor, nn

import spectrim as st
from spectrim.calibrate import patches
from spectrim.models import resnet20

# torch's own remark on asymmetric padding, said once a process
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")

Case = tuple[type[nn.Module], dict[str, Any]]

OPTIONS: dict[str, Case] = {
    "plain": (nn.Conv2d, {"kernel_size": 3}),
    "no bias": (nn.Conv2d, {"kernel_size": 3, "bias": False}),
    "1x1": (nn.Conv2d, {"kernel_size": 1}),
    "unequal kernel": (nn.Conv2d, {"kernel_size": (1, 5), "padding": (0, 2)}),
    "even kernel, same": (nn.Conv2d, {"kernel_size": (4, 2), "padding": "same"}),
    "valid": (nn.Conv2d, {"kernel_size": 3, "padding": "valid"}),
    "unequal stride": (nn.Conv2d, {"kernel_size": 3, "stride": (2, 1), "padding": 1}),
    "stride and dilation": (nn.Conv2d, {"kernel_size": 3, "stride": 2, "dilation": (1, 2), "padding": (1, 2)}),
    "same and dilation": (nn.Conv2d, {"kernel_size": 3, "dilation": 2, "padding": "same"}),
    "reflect": (nn.Conv2d, {"kernel_size": 3, "padding": (2, 1), "padding_mode": "reflect"}),
    "replicate": (nn.Conv2d, {"kernel_size": 3, "padding": 2, "padding_mode": "replicate"}),
    "circular": (nn.Conv2d, {"kernel_size": 3, "padding": 1, "padding_mode": "circular", "stride": 2}),
    "circular, same": (nn.Conv2d, {"kernel_size": (2, 3), "padding": "same", "padding_mode": "circular"}),
    "groups": (nn.Conv2d, {"kernel_size": 3, "groups": 2, "padding": 1}),
    "groups, all options": (
        nn.Conv2d,
        {"kernel_size": (3, 2), "groups": 2, "stride": (1, 2), "dilation": (2, 1), "padding": 1, "bias": False},
    ),
    "1d": (nn.Conv1d, {"kernel_size": 3}),
    "1d, all options": (
        nn.Conv1d,
        {"kernel_size": 4, "stride": 2, "dilation": 2, "padding": 3, "groups": 2, "padding_mode": "reflect"},
    ),
    "1d, same": (nn.Conv1d, {"kernel_size": 4, "padding": "same", "bias": False}),
}
CASES = [pytest.param(case, id=name) for name, case in OPTIONS.items()]
DTYPES = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 6e-2}


def network(case: Case, *, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    kind, options = case
    layer = kind(6, 8, **options)  # type: ignore[call-arg]
    return nn.Sequential(layer, nn.Identity()).to(dtype)


def images(case: Case, *, number: int = 5, dtype: torch.dtype = torch.float64) -> Tensor:
    shape = (number, 6, 13) if case[0] is nn.Conv1d else (number, 6, 9, 10)
    return inputs(*shape, dtype=dtype)


def answer(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        y: Tensor = model(x)
    return y


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("calibrated", [False, True], ids=["plain", "activation"])
def test_full_rank_equals_dense(case: Case, dtype: torch.dtype, calibrated: bool) -> None:
    model, x = network(case, dtype=dtype), images(case, dtype=dtype)
    data = [x] if calibrated else None
    full = st.compress(model, st.Ratio(1.0), example_inputs=x, data=data, allow_growth=True)
    assert isinstance(full.model[0], st.LowRankConv1d | st.LowRankConv2d)
    dense = answer(model, x)
    assert float((answer(full.model, x) - dense).abs().max()) <= DTYPES[dtype] * float(dense.abs().max())
    assert answer(full.model, x[0]).shape == answer(model, x[0]).shape


@pytest.mark.parametrize("case", CASES)
def test_the_patches_times_the_weight_are_the_output(case: Case) -> None:
    model, x = network(case), images(case)
    layer = model[0]
    rows = patches(layer, x, positions=None)
    weight = layer.weight.detach().reshape(layer.groups, 8 // layer.groups, -1)
    made = (rows @ weight.mT).permute(1, 0, 2).reshape(len(x), -1, 8).mT.reshape(answer(model, x).shape)
    bias = 0 if layer.bias is None else layer.bias.detach().reshape(-1, *[1] * (made.ndim - 2))
    torch.testing.assert_close(made + bias, answer(model, x))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_the_predicted_error_is_the_measured_one_and_never_above_plain(case: Case, rank: int) -> None:
    model, x = network(case), images(case, number=20)
    analysis = st.analyze(model, x, calibration=st.calibrate(model, x.split(6), positions=None))
    dense = answer(model, x).transpose(0, 1).flatten(1)
    total = float((dense - dense.mean(dim=1, keepdim=True)).square().sum())
    lost = {}
    for metric in ("plain", "activation"):
        plan = st.plan(analysis, st.Rank(rank), metric=metric, allow_growth=True)
        small = st.compress(model, plan, example_inputs=x, analysis=analysis).model
        error = dense - answer(small, x).transpose(0, 1).flatten(1)
        lost[metric] = float((error - error.mean(dim=1, keepdim=True)).square().sum())
        if metric == "activation":
            assert float(error.mean(dim=1).abs().max()) <= 1e-10 * float(dense.abs().max())
            assert (lost[metric] / total) ** 0.5 == pytest.approx(plan["0"].predicted_error, abs=1e-7)
        else:
            whole = torch.linalg.vector_norm(model[0].weight.detach())
            gone = torch.linalg.vector_norm((model[0].weight - small[0].weight).detach())
            assert float(gone / whole) == pytest.approx(plan["0"].predicted_error, abs=1e-10)
    assert lost["activation"] <= lost["plain"] + 1e-9 * total


@pytest.mark.parametrize("case", CASES)
def test_the_plan_counts_what_the_model_then_has(case: Case) -> None:
    model, x = network(case), images(case)
    for data in (None, [x]):
        made = st.compress(model, st.Rank(1), example_inputs=x, data=data)
        assert made.plan.factored
        assert made.plan.kept_cost.params == made.measurement.params
        assert made.plan.kept_cost.macs == made.measurement.macs
        assert made.measurement.params_ratio < 1


@pytest.mark.parametrize("case", CASES)
def test_merging_and_saving_keep_every_option(case: Case, tmp_path: Path) -> None:
    model, x = network(case), images(case)
    small = st.compress(model, st.Rank(2), example_inputs=x, data=[x], allow_growth=True).model
    merged = st.merge(small)
    assert type(merged[0]) is case[0]
    assert repr(merged[0]).replace(", bias=False", "") == repr(model[0]).replace(", bias=False", "")
    torch.testing.assert_close(answer(merged, x), answer(small, x))
    loaded = st.load(st.save(small, tmp_path), network(case))
    assert same_state(loaded, state(small))
    assert torch.equal(answer(loaded, x), answer(small, x))


@pytest.mark.parametrize("case", CASES)
def test_the_factored_layer_exports(case: Case) -> None:
    model, x = network(case, dtype=torch.float32), images(case, dtype=torch.float32)
    small = st.compress(model, st.Rank(2), example_inputs=x, allow_growth=True).model.eval()
    exported = torch.export.export(small, (x,)).module()
    torch.testing.assert_close(answer(exported, x), answer(small, x))


def test_depthwise_is_refused_with_its_reason() -> None:
    model = nn.Sequential(nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 12, 1)).double()
    made = st.compress(model, st.Rank(1), example_inputs=inputs(2, 6, 5, 5))
    assert "depthwise" in made.plan["0"].reason
    assert made.plan["1"].form == "channel"


def test_a_rank_is_that_of_each_group() -> None:
    model, x = network((nn.Conv2d, {"kernel_size": 3, "groups": 2})), inputs(3, 6, 9, 9)
    layer = st.compress(model, st.Rank(2), example_inputs=x).model[0]
    assert (layer.rank, layer.down.out_channels, layer.up.groups) == (2, 4, 2)
    with pytest.raises(st.errors.RuleError, match="full rank 4"):
        st.compress(model, st.Rank(5), example_inputs=x)


def test_sampled_positions_estimate_all_of_them_whatever_the_batches() -> None:
    model, x = network((nn.Conv2d, {"kernel_size": 3, "padding": 1})), inputs(64, 6, 12, 12)
    some, other = (st.calibrate(model, x.split(size), positions=72).moments["0"] for size in (64, 10))
    torch.testing.assert_close(some.covariance, other.covariance)
    assert some.count == 64 * 72
    whole = st.calibrate(model, [x], positions=None).moments["0"]
    gap = torch.linalg.matrix_norm(some.covariance - whole.covariance) / torch.linalg.matrix_norm(whole.covariance)
    assert float(gap) < 0.2


def test_factors_of_convolutions_that_do_not_fit_are_refused() -> None:
    down, up = nn.Conv2d(3, 2, 3, bias=False), nn.Conv2d(2, 5, 1)
    st.LowRankConv2d(down, up)
    for first, second in (
        (nn.Conv2d(3, 2, 3), up),
        (down, nn.Conv2d(4, 5, 1)),
        (down, nn.Conv2d(2, 5, 3)),
        (down, nn.Conv2d(2, 4, 1, groups=2)),
    ):
        with pytest.raises(st.errors.ModelError):
            st.LowRankConv2d(first, second)


def test_a_residual_network_keeps_its_answers_at_full_rank() -> None:
    torch.manual_seed(0)
    model, x = resnet20().eval(), torch.randn(4, 3, 32, 32)
    full = st.compress(model, st.Ratio(1.0), example_inputs=x[:1], data=[x], allow_growth=True)
    assert all(layer.form != "dense" for layer in full.plan)
    torch.testing.assert_close(answer(full.model, x), answer(model, x), rtol=1e-3, atol=1e-4)
