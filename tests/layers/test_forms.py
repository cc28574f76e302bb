"""Every form of every kind of layer: each option that PyTorch allows, exact at full rank, never silently wrong."""

from pathlib import Path
from typing import Any

import pytest
import torch
from cases import IMAGE_FORMS, build, form_names, full_ranks, inputs, same_state, state, taken_at_their_word, unit_of
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

import spectrim as st
from spectrim.layers.factored import geometry_of
from spectrim.layers.forms import FORMS, form_named
from spectrim.layers.types import LAYER_TYPES, layer_type_of
from spectrim.layers.types.convolution import Convolution
from spectrim.models import resnet20

# torch's own remark on asymmetric padding, said once a process
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")

Case = tuple[type[nn.Module], dict[str, Any]]


class Inheriting(nn.Conv2d):
    """A subclass that overrides nothing of the forward pass."""


OPTIONS: dict[str, Case] = {
    "linear": (nn.Linear, {}),
    "linear, no bias": (nn.Linear, {"bias": False}),
    "linear, few outputs": (nn.Linear, {"into": 30, "out": 2}),
    "transposed weight": (Conv1D, {}),
    "transposed weight, few outputs": (Conv1D, {"into": 30, "out": 2}),
    "plain": (nn.Conv2d, {"kernel_size": 3}),
    "subclass": (Inheriting, {"kernel_size": 3, "stride": 2, "groups": 2}),
    # more inputs than outputs times places of the kernel
    "few outputs": (nn.Conv2d, {"kernel_size": 3, "into": 22, "out": 2}),
    "one output": (nn.Conv2d, {"kernel_size": (2, 3), "into": 10, "out": 1, "padding": 1}),
    "few outputs, groups": (nn.Conv2d, {"kernel_size": 2, "into": 24, "out": 4, "groups": 2}),
    "few outputs, a row": (nn.Conv2d, {"kernel_size": (1, 3), "into": 10, "out": 2}),
    "many outputs": (nn.Conv2d, {"kernel_size": 2, "into": 2, "out": 20}),
    "no bias": (nn.Conv2d, {"kernel_size": 3, "bias": False}),
    "1x1": (nn.Conv2d, {"kernel_size": 1}),
    "1x1, stride and groups": (nn.Conv2d, {"kernel_size": 1, "stride": 2, "groups": 2}),
    "a row": (nn.Conv2d, {"kernel_size": (1, 5), "padding": (0, 2)}),
    "unequal kernel": (nn.Conv2d, {"kernel_size": (3, 5), "padding": (0, 2)}),
    "even kernel": (nn.Conv2d, {"kernel_size": (2, 4), "stride": (1, 2)}),
    "even kernel, same": (nn.Conv2d, {"kernel_size": (4, 2), "padding": "same"}),
    "valid": (nn.Conv2d, {"kernel_size": 3, "padding": "valid"}),
    "unequal stride": (nn.Conv2d, {"kernel_size": 3, "stride": (2, 1), "padding": 1}),
    "stride and dilation": (nn.Conv2d, {"kernel_size": 3, "stride": 2, "dilation": (1, 2), "padding": (1, 2)}),
    "same and dilation": (nn.Conv2d, {"kernel_size": 3, "dilation": (2, 1), "padding": "same"}),
    "reflect": (nn.Conv2d, {"kernel_size": 3, "padding": (2, 1), "padding_mode": "reflect"}),
    "reflect, same": (nn.Conv2d, {"kernel_size": (2, 5), "padding": "same", "padding_mode": "reflect"}),
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
    "1d, kernel 1": (nn.Conv1d, {"kernel_size": 1}),
    "1d, few outputs": (nn.Conv1d, {"kernel_size": 3, "into": 20, "out": 4, "groups": 2}),
    "3d": (nn.Conv3d, {"kernel_size": (3, 1, 2)}),
    "3d, kernel 1": (nn.Conv3d, {"kernel_size": 1, "stride": (1, 2, 1)}),
    "3d, all options": (
        nn.Conv3d,
        {
            "kernel_size": (1, 3, 2),
            "stride": (2, 1, 1),
            "dilation": (1, 2, 1),
            "padding": (0, 2, 1),
            "groups": 2,
            "padding_mode": "circular",
            "bias": False,
        },
    ),
    "3d, same": (nn.Conv3d, {"kernel_size": 3, "padding": "same", "padding_mode": "replicate"}),
    "3d, few outputs": (nn.Conv3d, {"kernel_size": (1, 2, 2), "into": 20, "out": 2}),
    "transposed": (nn.ConvTranspose2d, {"kernel_size": 3}),
    "transposed, few outputs": (nn.ConvTranspose2d, {"kernel_size": 2, "stride": 2, "into": 20, "out": 4, "groups": 2}),
    "transposed, kernel 1": (nn.ConvTranspose2d, {"kernel_size": 1, "bias": False}),
    "transposed, stride": (nn.ConvTranspose2d, {"kernel_size": 4, "stride": 2, "padding": 1}),
    "transposed, wide padding": (nn.ConvTranspose2d, {"kernel_size": 2, "stride": 2, "padding": 3}),
    "transposed, output padding": (
        nn.ConvTranspose2d,
        {"kernel_size": 3, "stride": (3, 2), "padding": 1, "output_padding": (2, 1)},
    ),
    "transposed, all options": (
        nn.ConvTranspose2d,
        {
            "kernel_size": (2, 3),
            "stride": (2, 1),
            "dilation": (1, 2),
            "padding": (1, 0),
            "output_padding": (1, 0),
            "groups": 2,
            "bias": False,
        },
    ),
}
FITS = [
    pytest.param(fit, dtype, within, id=f"{fit}-{str(dtype).removeprefix('torch.')}")
    for fit, dtype, within in (
        ("plain", torch.float64, 1e-9),
        ("plain", torch.bfloat16, 6e-2),
        ("activation", torch.float64, 1e-9),
        ("activation", torch.float32, 1e-5),
        ("reconstructed", torch.float64, 1e-9),
    )
]


def network(case: Case, *, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    kind, options = case
    options = dict(options)
    into, out = options.pop("into", 6), options.pop("out", 8)
    layer = Conv1D(out, into) if kind is Conv1D else kind(into, out, **options)  # type: ignore[call-arg]
    return nn.Sequential(layer, nn.Identity()).to(dtype)


CASES = [pytest.param(case, id=name) for name, case in OPTIONS.items()]
CASES_AND_FORMS = [
    pytest.param(case, form, id=f"{name}-{form}")
    for name, case in OPTIONS.items()
    for form in form_names(network(case)[0])
]


def images(case: Case, *, number: int = 5, dtype: torch.dtype = torch.float64) -> Tensor:
    into = case[1].get("into", 6)
    kind = next(kind for kind in LAYER_TYPES if kind.base_of(case[0]))
    shapes = ((number, 3, into), (number, into, 13), (number, into, 9, 10), (number, into, 4, 6, 5))
    shape = shapes[kind.dims if isinstance(kind, Convolution) else 0]
    return inputs(*shape, dtype=dtype)


def answer(model: nn.Module, *x: Any) -> Tensor:
    with torch.no_grad():
        y: Tensor = model(*x)
    return y


def columns(model: nn.Module, x: Tensor) -> Tensor:
    """The answer with one row a channel."""
    y = answer(model, x)
    return (y.transpose(0, 1) if hasattr(model[0], "kernel_size") else y.flatten(0, -2).mT).flatten(1)


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(("case", "form"), CASES_AND_FORMS)
@pytest.mark.parametrize(("fit", "dtype", "within"), FITS)
def test_full_rank_equals_dense(case: Case, form: str, fit: str, dtype: torch.dtype, within: float) -> None:
    model, x = network(case, dtype=dtype), images(case, dtype=dtype)
    full = st.compress(
        model,
        st.Ratio(1.0),
        example_inputs=x,
        data=None if fit == "plain" else [x],
        forms=(form,),
        reconstruct=fit == "reconstructed",
        allow_growth=True,
    )
    layer = full.model[0]
    assert (layer.form, full.plan["0"].form, full.plan["0"].ranks) == (form, form, layer.ranks)
    assert layer.ranks == full_ranks(model[0], form)
    assert {part.weight.dtype for part in layer.chain} == {dtype}
    assert relative(answer(full.model, x), answer(model, x)) <= within
    assert answer(full.model, x[0]).shape == answer(model, x[0]).shape


@pytest.mark.parametrize("case", CASES)
def test_the_patches_times_the_weight_are_the_output(case: Case) -> None:
    model, x = network(case), images(case)
    layer = model[0]
    kind, y = layer_type_of(layer), answer(model, x)
    product = kind.input_rows(layer, x, output=y, positions=None) @ kind.kernels(layer).detach().flatten(2).mT
    rows = kind.output_rows(layer, y, positions=None)
    if layer.bias is not None:
        product = product + layer.bias.detach().reshape(len(product), 1, -1)
    torch.testing.assert_close(product, rows)
    features = y.movedim(kind.feature_dim(layer), 0)
    torch.testing.assert_close(
        rows.permute(0, 2, 1).reshape(len(features), len(x), -1), features.reshape(len(features), len(x), -1)
    )


@pytest.mark.parametrize("case", CASES)
def test_a_weight_comes_back_from_its_kernels(case: Case) -> None:
    layer = network(case)[0]
    kind = layer_type_of(layer)
    assert torch.equal(kind.to_weight(kind.kernels(layer), kind.geometry(layer)), layer.weight)


class Sized(nn.Module):
    """A transposed convolution that is told the size of its output."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.ConvTranspose2d(6, 8, 3, stride=(3, 2), padding=1, groups=2).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x, [3 * x.shape[2], 2 * x.shape[3]])


def test_the_size_that_a_transposed_convolution_is_given_counts() -> None:
    model, x = Sized(), inputs(4, 6, 5, 7)
    y = answer(model, x)
    assert y.shape[2:] == (15, 14)
    kind = layer_type_of(model.up)
    product = kind.input_rows(model.up, x, output=y, positions=None) @ kind.kernels(model.up).detach().flatten(2).mT
    product = product + model.up.bias.detach().reshape(2, 1, 4)
    torch.testing.assert_close(product, kind.output_rows(model.up, y, positions=None))
    for again in (False, True):
        full = st.compress(model, st.Ratio(1.0), example_inputs=x, data=[x], reconstruct=again, allow_growth=True)
        assert relative(answer(full.model, x), y) <= 1e-9
        assert full.plan.kept_cost.macs == full.measurement.macs


@pytest.mark.parametrize(("case", "form"), CASES_AND_FORMS)
def test_no_error_is_above_the_predicted_one_and_that_of_a_closed_form_meets_it(case: Case, form: str) -> None:
    model, x = network(case), images(case, number=20)
    statistics = taken_at_their_word(st.calibrate(model, x.split(6), positions=None))
    analysis = st.analyze(model, x, calibration=statistics)
    dense = columns(model, x)
    closed = form_named(form).closed_form
    total = float((dense - dense.mean(dim=1, keepdim=True)).square().sum())
    whole = torch.linalg.vector_norm(model[0].weight.detach())
    for rank in range(1, 1 + min(3, *full_ranks(model[0], form))):
        lost = {}
        for metric in ("plain", "activation"):
            plan = st.plan(analysis, st.Rank(rank), metric=metric, forms=(form,), allow_growth=True)
            small = st.compress(model, plan, example_inputs=x, analysis=analysis).model
            error = dense - columns(small, x)
            lost[metric] = float((error - error.mean(dim=1, keepdim=True)).square().sum())
            if metric == "activation":
                assert float(error.mean(dim=1).abs().max()) <= 1e-10 * float(dense.abs().max())
                measured = (lost[metric] / total) ** 0.5
            else:
                measured = float(torch.linalg.vector_norm((model[0].weight - small[0].weight).detach()) / whole)
            predicted = plan["0"].predicted_error
            assert predicted is not None
            assert measured <= predicted + 1e-6
            assert not closed or measured == pytest.approx(predicted, abs=1e-7)
        # alternating steps may end in different local minima
        assert lost["activation"] <= lost["plain"] + (1e-9 if closed else 0.1) * total


@pytest.mark.parametrize(("case", "form"), CASES_AND_FORMS)
@pytest.mark.parametrize("metric", ["plain", "activation", "loss"])
def test_grid_costs_and_losses_have_one_owner(case: Case, form: str, metric: Any) -> None:
    model, x = network(case), images(case)
    analysis = st.analyze(model, x, calibration=st.calibrate(model, [x], gradients=True))
    layer, chosen = analysis["0"], form_named(form)
    errors = layer.rank_errors(form, metric)
    assert errors.ranks.shape == (len(errors.lost), chosen.rank_count)
    assert len(errors.params) == len(errors.macs) == len(errors.lost)
    assert tuple(errors.ranks.max(axis=0)) == full_ranks(model[0], form)
    for place in (0, len(errors.lost) // 2, -1):
        ranks = tuple(int(rank) for rank in errors.ranks[place])
        cost = layer.cost(form, ranks, metric)
        assert (cost.params, cost.macs) == (errors.params[place], errors.macs[place])
        factors = layer.decomposition(form, metric).factors(ranks)
        shapes = [geometry_of(part).shape for part in build(model[0], form=form, ranks=ranks, bias=False).chain]
        assert [factor.numel() for factor in factors] == [torch.Size(shape).numel() for shape in shapes]


def test_every_form_has_a_name_of_its_own_and_random_factors_of_its_shapes() -> None:
    assert len({form.name for form in FORMS}) == len(FORMS)
    for case in OPTIONS.values():
        layer = network(case)[0]
        for form in form_names(layer):
            ranks = full_ranks(layer, form)
            factors = form_named(form).random_factors(unit_of(layer), ranks, generator=torch.Generator())
            blank = build(layer, form=form, ranks=ranks, bias=False)
            assert blank.product(blank.stored(factors)).shape == layer.weight.shape


@pytest.mark.parametrize(("case", "form"), CASES_AND_FORMS)
@pytest.mark.parametrize("fit", ["plain", "reconstructed"])
def test_the_plan_counts_what_the_model_then_has(case: Case, form: str, fit: str) -> None:
    model, x = network(case), images(case)
    compressed = st.compress(
        model,
        st.Rank(min(2, *full_ranks(model[0], form))),
        example_inputs=x,
        data=None if fit == "plain" else [x],
        forms=(form,),
        allow_growth=True,
    )
    assert [layer.form for layer in compressed.plan] == [form]
    assert compressed.plan.kept_cost.params == compressed.measurement.params
    counter = FlopCounterMode(display=False)
    with counter:
        answer(compressed.model, x)
    assert compressed.plan.kept_cost.macs == compressed.measurement.macs == counter.get_total_flops() // 2


@pytest.mark.parametrize(("case", "form"), CASES_AND_FORMS)
def test_a_layer_shrinks_up_to_its_break_even_rank_and_no_further(case: Case, form: str) -> None:
    model, x = network(case), images(case)
    layer = st.analyze(model, x)["0"]
    limit = layer.break_even(form, "plain")
    most = min(full_ranks(model[0], form))
    ranks = [rank for rank in (limit, limit + 1) if 1 <= rank <= most]
    assert ranks or limit > most
    for rank in ranks:
        rule = st.Rank(rank) if rank <= layer.full_rank else st.Ratio(rank / most)
        compressed = st.compress(model, rule, example_inputs=x, forms=(form,))
        shrunk = compressed.measurement.params_ratio < 1 and compressed.measurement.macs_ratio <= 1
        assert shrunk == (compressed.plan["0"].form == form) == (rank <= limit)


@pytest.mark.parametrize(("case", "form"), CASES_AND_FORMS)
def test_merging_and_saving_keep_every_option(case: Case, form: str, tmp_path: Path) -> None:
    model, x = network(case), images(case)
    rule = st.Rank(min(2, *full_ranks(model[0], form)))
    small = st.compress(model, rule, example_inputs=x, data=[x], forms=(form,), allow_growth=True).model
    assert small[0].form == form
    merged = st.merge(small)
    assert type(merged[0]) is case[0]
    assert options_of(merged[0]) == options_of(model[0])
    torch.testing.assert_close(answer(merged, x), answer(small, x))
    loaded = st.load(st.save(small, tmp_path), network(case))
    assert type(loaded[0]) is type(small[0])
    assert loaded[0].ranks == small[0].ranks
    assert same_state(loaded, state(small))
    assert torch.equal(answer(loaded, x), answer(small, x))


def options_of(layer: nn.Module) -> str:
    """All but the bias, which the mean correction may add."""
    return layer.extra_repr().replace(", bias=False", "").replace(", bias=True", "")


EXPORTED = ("plain", "circular, same", "groups, all options", "1d, all options", "transposed, all options")


@pytest.mark.parametrize(
    ("case", "form"), [case for case in CASES_AND_FORMS if str(case.id).rpartition("-")[0] in EXPORTED]
)
def test_the_factored_layer_exports(case: Case, form: str) -> None:
    model, x = network(case, dtype=torch.float32), images(case, dtype=torch.float32)
    small = st.compress(model, st.Rank(2), example_inputs=x, forms=(form,), allow_growth=True).model.eval()
    exported = torch.export.export(small, (x,)).module()
    torch.testing.assert_close(answer(exported, x), answer(small, x))


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
@pytest.mark.parametrize("rule", [st.Rank(1), st.Budget(params=0.9)], ids=str)
def test_depthwise_is_refused_with_its_reason(kind: type[nn.Module], rule: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(kind(6, 6, 3, groups=6), nn.Conv2d(6, 12, 1)).double()  # type: ignore[call-arg]
    compressed = st.compress(model, rule, example_inputs=inputs(2, 6, 5, 5))
    assert "depthwise" in compressed.plan["0"].reason
    assert compressed.plan["1"].form == ("linear" if isinstance(rule, st.Rank) else "interpolative")


def test_a_form_that_a_layer_does_not_have_is_refused() -> None:
    for case, form in (("1d", "spatial"), ("1x1", "tucker2"), ("a row", "spatial"), ("transposed", "tucker2")):
        layer = network(OPTIONS[case])[0]
        assert form not in form_names(layer)
        with pytest.raises(st.errors.ModelError, match=f"no {form} form"):
            build(layer, form=form, ranks=(1, 1), bias=True)


def test_a_rank_is_that_of_each_group() -> None:
    model, x = network((nn.Conv2d, {"kernel_size": 3, "groups": 2})), inputs(3, 6, 9, 9)
    layer = st.compress(model, st.Rank(2), example_inputs=x).model[0]
    assert (layer.rank, layer.down.out_channels, layer.up.groups) == (2, 4, 2)
    core = st.compress(model, st.Rank(2), example_inputs=x, forms=("tucker2",)).model[0]
    assert (core.ranks, core.core.in_channels, core.core.groups) == ((2, 2), 4, 2)
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


def conv(into: int, out: int, kernel: Any, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(into, out, kernel, **({"bias": False} | options))


MISFITS: dict[str, tuple[Any, tuple[nn.Module, ...], tuple[int, nn.Module]]] = {
    "channel, bias": (st.LowRankConv2d, (conv(3, 2, 3), conv(2, 5, 1)), (0, conv(3, 2, 3, bias=True))),
    "channel, sizes": (st.LowRankConv2d, (conv(3, 2, 3), conv(2, 5, 1)), (1, conv(4, 5, 1))),
    "channel, kernel": (st.LowRankConv2d, (conv(3, 2, 3), conv(2, 5, 1)), (1, conv(2, 5, 3))),
    "channel, groups": (st.LowRankConv2d, (conv(3, 2, 3), conv(2, 4, 1)), (1, conv(2, 4, 1, groups=2))),
    "transposed, sizes": (
        st.LowRankConvTranspose2d,
        (nn.ConvTranspose2d(3, 2, 3, bias=False), conv(2, 5, 1)),
        (1, conv(3, 5, 1)),
    ),
    "spatial, column": (st.SpatialConv2d, (conv(3, 2, (3, 1)), conv(2, 5, (1, 3))), (0, conv(3, 2, 3))),
    "spatial, row": (st.SpatialConv2d, (conv(3, 2, (3, 1)), conv(2, 5, (1, 3))), (1, conv(2, 5, (2, 3)))),
    "spatial, stride": (st.SpatialConv2d, (conv(3, 2, (3, 1)), conv(2, 5, (1, 3))), (1, conv(2, 5, (1, 3), stride=2))),
    "tucker2, down": (st.Tucker2Conv2d, (conv(3, 2, 1), conv(2, 4, 3), conv(4, 5, 1)), (0, conv(3, 2, 3))),
    "tucker2, core": (st.Tucker2Conv2d, (conv(3, 2, 1), conv(2, 4, 3), conv(4, 5, 1)), (1, conv(2, 4, 3, bias=True))),
    "tucker2, up": (st.Tucker2Conv2d, (conv(3, 2, 1), conv(2, 4, 3), conv(4, 5, 1)), (2, conv(4, 5, 1, stride=2))),
}


@pytest.mark.parametrize(("kind", "parts", "wrong"), MISFITS.values(), ids=MISFITS.keys())
def test_factors_of_convolutions_that_do_not_fit_are_refused(
    kind: Any, parts: tuple[nn.Module, ...], wrong: tuple[int, nn.Module]
) -> None:
    kind(*parts)
    place, other = wrong
    with pytest.raises(st.errors.ModelError):
        kind(*parts[:place], other, *parts[place + 1 :])


def test_a_residual_network_keeps_its_answers_at_full_rank() -> None:
    torch.manual_seed(0)
    model, x = resnet20().eval(), torch.randn(4, 3, 32, 32)
    for form in IMAGE_FORMS:
        full = st.compress(
            model, st.Ratio(1.0), example_inputs=x[:1], data=[x], forms=(form,), reconstruct=False, allow_growth=True
        )
        assert {layer.form for layer in full.plan} == {form, "linear"}
        torch.testing.assert_close(answer(full.model, x), answer(model, x), rtol=1e-3, atol=1e-4)
