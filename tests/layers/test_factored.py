"""The factored layer as a module among others: it answers, prints, copies, scripts and traces as the dense one."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import build, form_names, inputs
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import spectrim as st
from spectrim import errors
from spectrim.layers.factored import FactoredLayer
from spectrim.layers.replacement import factored_at, own_bias


def layer(*, bias: bool = True) -> st.LowRankLinear:
    torch.manual_seed(0)
    return st.LowRankLinear(nn.Linear(6, 2, bias=False), nn.Linear(2, 5, bias=bias))


@pytest.mark.parametrize("bias", [True, False])
def test_it_is_the_product_of_its_factors(bias: bool) -> None:
    factored, x = layer(bias=bias), inputs(3, 4, 6, dtype=torch.float32)
    expected = nn.functional.linear(x, factored.weight, factored.bias)
    torch.testing.assert_close(factored(x), expected, rtol=1e-5, atol=1e-5)
    assert (factored.in_features, factored.out_features, factored.rank) == (6, 5, 2)
    assert (factored.bias is not None) == bias
    assert f"in_features=6, out_features=5, bias={bias}, rank=2" in repr(factored)


def test_factors_that_do_not_fit_are_refused() -> None:
    with pytest.raises(errors.ModelError, match="no bias"):
        st.LowRankLinear(nn.Linear(6, 2), nn.Linear(2, 5))
    with pytest.raises(errors.ModelError, match="as many outputs"):
        st.LowRankLinear(nn.Linear(6, 2, bias=False), nn.Linear(3, 5))


def test_an_unset_one_draws_no_random_numbers_and_takes_after_its_model() -> None:
    dense = nn.Linear(6, 5, dtype=torch.float16).eval().requires_grad_(False)
    random = torch.get_rng_state()
    factored = build(dense, form="linear", ranks=(2,), bias=True)
    assert torch.equal(torch.get_rng_state(), random)
    assert factored.weight.dtype == torch.float16
    assert not factored.training
    assert not any(parameter.requires_grad for parameter in factored.parameters())


def test_gradients_reach_both_factors() -> None:
    factored = layer()
    factored(torch.ones(2, 6)).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in factored.parameters())


def test_copies_state_and_exported_programs_just_work() -> None:
    model, x = nn.Sequential(layer(), nn.ReLU()), torch.randn(3, 6)
    assert list(model.state_dict()) == ["0.down.weight", "0.up.weight", "0.up.bias"]
    twin = copy.deepcopy(model)
    twin.load_state_dict(model.state_dict())
    exported = torch.export.export(model, (x,)).module()
    with torch.no_grad():
        assert torch.equal(twin(x), model(x))
        torch.testing.assert_close(exported(x), model(x))


def test_a_factored_layer_without_its_parts_cannot_be_made() -> None:
    class Unfinished(FactoredLayer):
        pass

    with pytest.raises(TypeError, match="abstract"):
        Unfinished((), None)


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(12, 10), (5, 12)),
    "transposed weight": (lambda: Conv1D(10, 12), (5, 12)),
    "conv1d": (lambda: nn.Conv1d(6, 10, 3, stride=2, padding=1), (2, 6, 11)),
    "conv2d": (lambda: nn.Conv2d(6, 10, (3, 2), stride=(1, 2), padding="valid", bias=False), (2, 6, 7, 8)),
    "grouped": (lambda: nn.Conv2d(8, 12, 3, groups=2, padding=2, padding_mode="circular"), (2, 8, 6, 6)),
    "conv3d": (lambda: nn.Conv3d(4, 6, 2, dilation=(1, 2, 1)), (2, 4, 5, 5, 5)),
    "transposed": (lambda: nn.ConvTranspose2d(6, 10, 3, stride=2, output_padding=1), (2, 6, 5, 4)),
}
CROSSED = [
    pytest.param(dense, shape, form, id=f"{name}-{form}")
    for name, (dense, shape) in LAYERS.items()
    for form in form_names(dense())
]


def factored_network(dense: Callable[[], nn.Module], shape: tuple[int, ...], form: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model, x = nn.Sequential(dense(), nn.Identity()), torch.randn(shape)
    small = st.compress(model, st.Ratio(0.5), example_inputs=x, forms=(form,), allow_growth=True).model
    assert small[0].form == form
    return small, x


@pytest.mark.parametrize(("dense", "shape", "form"), CROSSED)
def test_it_answers_and_prints_what_the_dense_layer_answered(
    dense: Callable[[], nn.Module], shape: tuple[int, ...], form: str
) -> None:
    original = dense()
    small, _ = factored_network(dense, shape, form)
    public = [name for name in vars(original) if not name.startswith("_")]
    assert {"in_features", "in_channels", "nx"} & set(public)
    for name in public:
        assert getattr(small[0], name) == getattr(original, name)
    assert small[0].weight.shape == original.weight.shape
    assert original.extra_repr() in repr(small[0]).replace("bias=True", "bias=False") or (
        original.extra_repr() in repr(small[0])
    )
    rebuilt = type(small[0])(*small[0].chain)
    for name in public:
        assert type(original) is Conv1D or getattr(rebuilt, name) == getattr(original, name)


@pytest.mark.parametrize(("dense", "shape", "form"), CROSSED)
def test_it_is_copied_scripted_traced_and_captured(
    dense: Callable[[], nn.Module], shape: tuple[int, ...], form: str
) -> None:
    small, x = factored_network(dense, shape, form)
    ways: dict[str, Callable[[], Any]] = {
        "deepcopy": lambda: copy.deepcopy(small),
        "script": lambda: torch.jit.script(small),
        "trace": lambda: torch.jit.trace(small, x),
        "fx": lambda: torch.fx.symbolic_trace(small),
        "export": lambda: torch.export.export(small, (x,)).module(),
    }
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*torch\.jit.*", category=FutureWarning)
        warnings.filterwarnings("ignore", message=r".*torch\.jit.*", category=DeprecationWarning)
        for way, make in ways.items():
            torch.testing.assert_close(make()(x), small(x), msg=way)


def test_hooks_of_the_dense_layer_stay_its_own() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(3, 8)
    small = st.compress(model, st.Rank(2), example_inputs=x, keep_last=True).model
    merged = st.merge(small)
    model[0].register_forward_hook(lambda *_: pytest.fail("the hook of the dense network was called"))
    for network in (small, merged, st.merge(small)):
        network(x)


@pytest.mark.parametrize("scale", [1e3, 1e-4], ids=["overflow", "vanish"])
def test_a_product_that_half_precision_cannot_hold_is_not_merged(scale: float) -> None:
    down, up = nn.Linear(6, 2, bias=False), nn.Linear(2, 5)
    factored = st.LowRankLinear(*(part.half() for part in (down, up)))
    with torch.no_grad():
        for part in (down, up):
            part.weight.fill_(scale)
    with pytest.raises(errors.ModelError, match=r"does not survive torch\.float16"):
        st.merge(nn.Sequential(factored))


def test_factors_that_cancel_each_other_are_not_stored_in_half_precision() -> None:
    """Their product is a thousandth of what they are made of."""
    down = torch.eye(6).double()[None, :2].repeat_interleave(2, dim=1)
    up = torch.tensor([[1.0, -1.0, 1.0, -1.0]]).double().expand(5, 4)[None] * torch.tensor([1.0, 1.0001, 1.0, 1.0001])
    dense = nn.Sequential(nn.Linear(6, 5))
    factored_at(dense, ["0"], form="linear", factors=(down, up), bias=own_bias)
    with pytest.raises(errors.ModelError, match=r"0 does not survive torch\.float16"):
        factored_at(dense.half(), ["0"], form="linear", factors=(down, up), bias=own_bias)


@pytest.mark.parametrize("scale", [0.0, 1e-6])
def test_outputs_of_nearly_nothing_are_stored_in_half_precision(scale: float) -> None:
    first = nn.Linear(64, 64)
    with torch.no_grad():
        first.weight[:32] *= scale
    model = nn.Sequential(first, nn.ReLU(), nn.Linear(64, 8)).half()
    small = st.compress(model, st.Rank(8), example_inputs=torch.randn(4, 64).half(), include=["0"])
    assert small.plan["0"].is_factored
