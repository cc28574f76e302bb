"""Laws that hold for every weight and every data, in float64, and for every number type within its precision."""

import copy
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from cases import (
    Double,
    SharedModule,
    Tied,
    form_names,
    full_ranks,
    inputs,
    same_state,
    small_mlp,
    state,
    taken_at_their_word,
)
from hypothesis import given, settings, strategies as draw
from torch import Tensor, nn

import spectrim as st
from spectrim.core.plans import Metric

sizes = draw.integers(1, 14)
seeds = draw.integers(0, 2**32 - 1)
laws = settings(max_examples=60, deadline=None, derandomize=True)


def network(out: int, into: int, *, seed: int, bias: bool, decay: float) -> nn.Sequential:
    """One layer whose singular values fall off by `decay`, then the identity, so that its output is seen."""
    generator = torch.Generator().manual_seed(seed)
    left, _ = torch.linalg.qr(torch.randn(out, out, generator=generator, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(into, into, generator=generator, dtype=torch.float64))
    values = decay ** torch.arange(min(out, into), dtype=torch.float64)
    layer = nn.Linear(into, out, bias=bias, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(left[:, : len(values)] * values @ right[: len(values)])
    return nn.Sequential(layer, nn.Identity())


def weights_of(model: nn.Module) -> Tensor:
    return model[0].weight.detach()


def answer(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        y: Tensor = model(x)
    return y


def mean_square(x: Tensor) -> float:
    return float(x.square().sum(dim=1).mean())


@laws
@given(out=sizes, into=sizes, seed=seeds, bias=draw.booleans(), decay=draw.floats(0.2, 1.0), calibrated=draw.booleans())
def test_full_rank_equals_dense(out: int, into: int, seed: int, bias: bool, decay: float, calibrated: bool) -> None:
    model = network(out, into, seed=seed, bias=bias, decay=decay)
    x = inputs(40, into, seed=seed % 1000)
    full = st.compress(model, st.Ratio(1.0), example_inputs=x, data=[x] if calibrated else None, allow_growth=True)
    assert isinstance(full.model[0], st.LowRankLinear)
    scale = float(answer(model, x).abs().max()) + 1e-30
    assert float((answer(full.model, x) - answer(model, x)).abs().max()) <= 1e-10 * scale


@laws
@given(out=sizes, into=sizes, seed=seeds, decay=draw.floats(0.2, 1.0), cut=draw.floats(0, 1))
def test_the_weight_error_is_the_discarded_tail(out: int, into: int, seed: int, decay: float, cut: float) -> None:
    model = network(out, into, seed=seed, bias=True, decay=decay)
    rank = 1 + int(cut * (min(out, into) - 1))
    small = st.compress(model, st.Rank(rank), example_inputs=torch.zeros(1, into).double(), allow_growth=True)
    tail = decay ** torch.arange(rank, min(out, into), dtype=torch.float64)
    error = torch.linalg.matrix_norm(weights_of(model) - weights_of(small.model))
    whole = torch.linalg.matrix_norm(weights_of(model))
    assert float(error) == pytest.approx(float(tail.norm()), abs=1e-10)
    assert small.plan["0"].predicted_error == pytest.approx(float(error / whole), abs=1e-10)


@laws
@given(out=sizes, into=sizes, seed=seeds, decay=draw.floats(0.2, 1.0), cut=draw.floats(0, 1), bias=draw.booleans())
def test_the_calibration_error_is_the_predicted_tail_and_never_above_plain(
    out: int, into: int, seed: int, decay: float, cut: float, bias: bool
) -> None:
    model = network(out, into, seed=seed, bias=bias, decay=decay)
    x = inputs(50, into, seed=seed % 1000)
    rank = 1 + int(cut * (min(out, into) - 1))
    analysis = st.analyze(model, x, calibration=taken_at_their_word(st.calibrate(model, x.split(7))))
    error = {}
    for metric in ("plain", "activation"):
        decided = st.plan(analysis, st.Rank(rank), metric=metric, allow_growth=True)
        small = st.compress(model, decided, example_inputs=x, analysis=analysis).model
        lost = answer(model, x) - answer(small, x)
        error[metric] = mean_square(lost - lost.mean(dim=0)), float(lost.mean(dim=0).norm())
    total = mean_square(answer(model, x) - answer(model, x).mean(dim=0))
    spectrum = analysis["0"].spectra["activation"]
    assert float((spectrum.values**2).sum()) == pytest.approx(total, rel=1e-8)
    assert error["activation"][0] == pytest.approx(spectrum.tail_energy[rank - 1], abs=1e-8 * total)
    assert error["activation"][0] <= error["plain"][0] + 1e-8 * total
    # the mean correction is exact
    assert error["activation"][1] <= 1e-10 * (1 + float(answer(model, x).abs().max()))


@laws
@given(seed=seeds, ranks=draw.integers(1, 12), calibrated=draw.booleans())
def test_merging_gives_the_product_of_the_factors(seed: int, ranks: int, calibrated: bool) -> None:
    model = network(12, 14, seed=seed, bias=True, decay=0.8)
    x = inputs(30, 14, seed=seed % 1000)
    small = st.compress(
        model, st.Rank(ranks), example_inputs=x, data=[x] if calibrated else None, allow_growth=True
    ).model
    dense = st.merge(small)
    assert type(dense[0]) is nn.Linear
    torch.testing.assert_close(answer(dense, x), answer(small, x), rtol=1e-10, atol=1e-10)


@laws
@given(out=sizes, into=sizes, seed=seeds, bias=draw.booleans(), decay=draw.floats(0.2, 1.0), calibrated=draw.booleans())
def test_merging_inverts_compressing_at_full_rank(
    out: int, into: int, seed: int, bias: bool, decay: float, calibrated: bool
) -> None:
    model = network(out, into, seed=seed, bias=bias, decay=decay)
    x = inputs(40, into, seed=seed % 1000)
    full = st.compress(model, st.Ratio(1.0), example_inputs=x, data=[x] if calibrated else None, allow_growth=True)
    back = st.merge(full.model)
    torch.testing.assert_close(weights_of(back), weights_of(model), rtol=0, atol=1e-10)
    assert type(back[0]) is nn.Linear


@laws
@given(seed=seeds, rank=draw.integers(1, 4), calibrated=draw.booleans(), bias=draw.booleans())
def test_saving_and_loading_gives_bit_equal_outputs(
    tmp_path_factory: pytest.TempPathFactory, seed: int, rank: int, calibrated: bool, bias: bool
) -> None:
    model, x = small_mlp(bias=bias), inputs(9, 12, seed=seed % 1000)
    small = st.compress(model, st.Rank(rank), example_inputs=x, data=[x] if calibrated else None, keep_last=True).model
    path = st.save(small, tmp_path_factory.mktemp("saved"))
    loaded = st.load(path, small_mlp(bias=bias))
    assert torch.equal(answer(loaded, x), answer(small, x))
    assert loaded.state_dict().keys() == small.state_dict().keys()


@laws
@given(seed=seeds, order=draw.permutations(range(6)))
def test_the_order_of_calibration_batches_changes_nothing_beyond_rounding(seed: int, order: list[int]) -> None:
    model, x = small_mlp(), inputs(60, 12, seed=seed % 1000)
    chunks = list(x.split(10))
    batched = st.calibrate(model, chunks).moments
    other = st.calibrate(model, [chunks[place] for place in order]).moments
    for name, moments in batched.items():
        torch.testing.assert_close(other[name].covariance, moments.covariance, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(other[name].mean, moments.mean, rtol=1e-12, atol=1e-12)


@laws
@given(seed=seeds, energy=draw.floats(0.01, 1.0))
def test_the_rank_for_an_energy_is_the_smallest_that_holds_it(seed: int, energy: float) -> None:
    values = torch.rand(11, generator=torch.Generator().manual_seed(seed)).sort(descending=True).values.numpy()
    spectrum = st.Spectrum(values)
    rank = spectrum.rank_for(energy)
    shares = spectrum.cumulative_energy
    assert shares[rank - 1] >= energy - 1e-12
    assert rank == 1 or shares[rank - 2] < energy


TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 5e-3}


@pytest.mark.parametrize("calibrated", [False, True], ids=["plain", "activation"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("build", [small_mlp, Double, Tied, SharedModule], ids=lambda build: build.__name__)
@pytest.mark.parametrize("leading", [(5,), (2, 3), (2, 1, 3)], ids=str)
def test_full_rank_equals_dense_for_every_network_and_type(
    build: type[nn.Module], dtype: torch.dtype, leading: tuple[int, ...], calibrated: bool
) -> None:
    torch.manual_seed(0)
    model = build().to(dtype)
    width = next(model.parameters()).shape[1]
    x = inputs(*leading, width, dtype=dtype) / 4
    before = copy.deepcopy(model)
    full = st.compress(model, st.Ratio(1.0), example_inputs=x, data=[x] if calibrated else None, allow_growth=True)
    assert all(layer.form == "linear" for layer in full.plan)
    assert all(parameter.dtype == dtype for parameter in full.model.parameters())
    assert answer(full.model, x).shape == answer(model, x).shape
    scale = float(answer(model, x).abs().max())
    assert float((answer(full.model, x) - answer(before, x)).abs().max()) <= TOLERANCE[dtype] * scale


KINDS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(12, 10), (40, 12)),
    "conv1d": (lambda: nn.Conv1d(6, 10, 3, stride=2, padding=1, bias=False), (20, 6, 11)),
    "conv2d": (lambda: nn.Conv2d(6, 10, (3, 2), stride=(1, 2), padding="valid"), (20, 6, 7, 8)),
    "grouped": (lambda: nn.Conv2d(8, 12, 3, groups=2, padding=2, padding_mode="circular", bias=False), (20, 8, 6, 6)),
    "transposed": (lambda: nn.ConvTranspose2d(6, 10, 3, stride=2, output_padding=1), (20, 6, 5, 4)),
}
CROSSED = [
    pytest.param(build, shape, form, metric, dtype, id=f"{kind}-{form}-{metric}-{str(dtype).removeprefix('torch.')}")
    for kind, (build, shape) in KINDS.items()
    for form in form_names(build())
    for metric in get_args(Metric)
    for dtype in TOLERANCE
]


@pytest.mark.parametrize(("build", "shape", "form", "metric", "dtype"), CROSSED)
def test_every_kind_form_metric_and_type_keeps_its_word(
    build: Any, shape: tuple[int, ...], form: str, metric: Metric, dtype: torch.dtype, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(build(), nn.Identity()).to(dtype)
    x = inputs(*shape, dtype=dtype) / 4
    calibration = st.calibrate(model, x.split(7), positions=None, gradients=metric == "loss")
    analysis = st.analyze(model, x, calibration=taken_at_their_word(calibration))
    for share in (0.4, 1.0):
        plan = st.plan(analysis, st.Ratio(share), metric=metric, forms=(form,), allow_growth=True)
        compressed = st.compress(model, plan, example_inputs=x, analysis=analysis)
        layer, decided = compressed.model[0], compressed.plan["0"]
        full = full_ranks(model[0], form)
        assert (layer.form, decided.metric, layer.ranks) == (form, metric, decided.ranks)
        assert all(1 <= rank <= most for rank, most in zip(layer.ranks, full, strict=True))
        assert (layer.ranks == full) == (share == 1.0)
        # the cost that is planned is the cost that is measured
        assert decided.kept == st.Cost(params=compressed.measurement.params, macs=compressed.measurement.macs)
        # the error that is predicted is not exceeded
        assert decided.predicted_error is not None
        # (in the loss metric that is seen from outside at full rank only)
        if metric != "loss" or share == 1.0:
            assert error(model, compressed.model, x, metric) <= decided.predicted_error + TOLERANCE[dtype] + 1e-6
        # merged and loaded models give the same answers
        merged = st.merge(compressed.model)
        assert type(merged[0]) is type(model[0])
        scale = float(answer(compressed.model, x).abs().max())
        assert float((answer(merged, x) - answer(compressed.model, x)).abs().max()) <= TOLERANCE[dtype] * scale
        loaded = st.load(st.save(compressed.model, tmp_path), model)
        assert same_state(loaded, state(compressed.model))
        assert torch.equal(answer(loaded, x), answer(compressed.model, x))


def error(model: nn.Module, small: nn.Module, x: Tensor, metric: Metric) -> float:
    """The relative error of the weight (plain), or of the varying output."""
    if metric == "plain":
        lost, whole = (weights_of(model) - weights_of(small)).double(), weights_of(model).double()
        return float(lost.norm() / whole.norm())
    dense, answered = answer(model, x).double(), answer(small, x).double()
    axes = 0 if isinstance(model[0], nn.Linear) else (0, *range(2, dense.ndim))
    centred = dense - dense.mean(dim=axes, keepdim=True)
    return float((dense - answered - (dense - answered).mean(dim=axes, keepdim=True)).norm() / centred.norm())


SINGLE = [
    pytest.param(build, (*shape[:2], *(min(size, most) for size in shape[2:])), form, id=f"{kind}-{form}")
    for kind, (build, shape) in KINDS.items()
    # at most 64 output positions, so that all of them are looked at
    for most in (3 if kind == "transposed" else 8,)
    for form in form_names(build())
]


@pytest.mark.parametrize("share", [0.2, 0.6, 1.0])
@pytest.mark.parametrize(("build", "shape", "form"), SINGLE)
def test_reconstruction_never_raises_the_calibration_error_of_a_layer(
    build: Any, shape: tuple[int, ...], form: str, share: float
) -> None:
    planned, fitted = errors_behind_a_lossy_layer(build(), shape, form, share)
    assert fitted <= planned * (1 + 1e-9) + 1e-20


@pytest.mark.parametrize("form", ["spatial", "tucker2"])
@pytest.mark.parametrize("samples", [12, 80])
def test_reconstruction_hardly_raises_that_of_a_wide_kernel(form: str, samples: int) -> None:
    """Whose statistics are in float32, so that it is held against factors in the metric of the fit."""
    torch.manual_seed(0)
    planned, fitted = errors_behind_a_lossy_layer(nn.Conv2d(240, 12, 3, padding=1), (samples, 240, 6, 6), form, 0.4)
    assert fitted <= 1.001 * planned


def errors_behind_a_lossy_layer(
    layer: nn.Module, shape: tuple[int, ...], form: str, share: float
) -> tuple[float, float]:
    """Of a layer behind one that has lost most of its input: with the planned factors and the best bias, and fitted."""
    torch.manual_seed(0)
    channels = shape[1]
    before: nn.Module = nn.Linear(channels, channels) if len(shape) == 2 else nn.Conv2d(channels, channels, 1)
    if len(shape) == 3:
        before = nn.Conv1d(channels, channels, 1)
    model, x = nn.Sequential(before, nn.ReLU(), layer, nn.Identity()).double(), inputs(*shape)
    analysis = st.analyze(model, x, calibration=st.calibrate(model, x.split(7)))
    harsh = st.plan(analysis, st.Ratio(0.2), metric="activation", forms=(form,), allow_growth=True)
    asked = st.plan(analysis, st.Ratio(share), metric="activation", forms=(form,), allow_growth=True)
    layers = tuple(asked[layer.name] if layer.name == "2" else layer for layer in harsh)
    plan = harsh.model_copy(update={"layers": layers})
    planned, fitted = (
        st.compress(model, plan, example_inputs=x, data=x.split(7), analysis=analysis, reconstruct=again).model
        for again in (False, True)
    )
    expected, received = answer(model, x), answer(fitted[:2], x)
    axes = 0 if expected.ndim == 2 else (0, *range(2, expected.ndim))
    lost = [expected - answer(network[2], received) for network in (planned, fitted)]
    means = [difference.mean(dim=axes, keepdim=True) for difference in lost]
    assert float(means[1].abs().max()) <= 1e-9 * float(expected.abs().max())
    before_fit, after = (float((own - mean).square().mean()) for own, mean in zip(lost, means, strict=True))
    return before_fit, after
