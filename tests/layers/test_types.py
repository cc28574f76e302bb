"""Which layers count as which type: subclasses, overridden forward passes, and what a user says of them."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

import spectrim as st
from spectrim.core.execution import as_inputs
from spectrim.layers.tracing import trace
from spectrim.layers.types import LAYER_TYPES, find_layer_type


class Plain(nn.Conv2d):
    """Overrides nothing."""


class Wrapped(nn.Conv2d):
    """As detection frameworks have it: an ordinary convolution, and perhaps an activation."""

    activation: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if self.activation is None else self.activation(y)


class Standardised(nn.Conv2d):
    """Convolves with another weight than the one it holds."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: A002
        return super()._conv_forward(input, weight - weight.mean(), bias)


class DynamicSame(nn.Conv2d):
    """Pads by itself, as much as the input's size asks for."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(functional.pad(x, (1, 1, 1, 1)))


def network(first: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(first, nn.ReLU(), nn.Conv2d(32, 8, 3)).eval()


X = torch.randn(2, 16, 9, 9, generator=torch.Generator().manual_seed(0))


def decided(first: nn.Module, **options: object) -> st.LayerPlan:
    return st.compress(network(first), st.Ratio(0.25), example_inputs=X, **options).plan["0"]  # type: ignore[arg-type]


def test_a_subclass_that_overrides_nothing_counts_as_its_base_and_comes_back() -> None:
    model = network(Plain(16, 32, 3))
    small = st.compress(model, st.Ratio(0.25), example_inputs=X)
    assert (small.plan["0"].kind, small.plan["0"].form) == ("Plain", "channel")
    assert type(st.merge(small.model)[0]) is Plain


@pytest.mark.parametrize("first", [Wrapped(16, 32, 3), Standardised(16, 32, 3), DynamicSame(16, 32, 3)], ids=str)
def test_one_that_overrides_what_runs_stays_dense_and_the_plan_says_what_to_do(first: nn.Conv2d) -> None:
    layer = decided(first)
    assert layer.form == "dense"
    name = type(first).__name__
    assert f"{name} is a subclass of nn.Conv2d" in layer.reason
    assert f"treat_as={{{name}: nn.Conv2d}}" in layer.reason


def test_it_can_be_treated_as_its_base_where_it_gives_what_that_gives() -> None:
    model = network(Wrapped(16, 32, 3, padding=1, padding_mode="circular"))
    small = st.compress(model, st.Ratio(1.0), example_inputs=X, treat_as={Wrapped: nn.Conv2d}, allow_growth=True).model
    assert isinstance(small[0], st.LowRankConv2d)
    with torch.no_grad():
        torch.testing.assert_close(small(X), model(X), rtol=1e-4, atol=1e-5)
    assert type(st.merge(small)[0]) is Wrapped
    half = st.compress(model, st.Budget(macs=0.5), example_inputs=X, data=[X], treat_as={Wrapped: nn.Conv2d})
    assert half.measurement.macs_ratio is not None
    assert half.measurement.macs_ratio <= 0.5


def activated() -> Wrapped:
    layer = Wrapped(16, 32, 3)
    object.__setattr__(layer, "activation", torch.tanh)  # no child module, so that only its outputs tell
    return layer


@pytest.mark.parametrize("first", [activated(), Standardised(16, 32, 3), DynamicSame(16, 32, 3)], ids=str)
def test_where_it_gives_something_else_it_stays_dense_all_the_same(first: nn.Conv2d) -> None:
    layer = decided(first, treat_as={type(first): nn.Conv2d})
    assert layer.form == "dense"
    assert "its outputs are not those of that class" in layer.reason


def test_saved_models_of_treated_layers_load(tmp_path: object) -> None:
    model = network(Wrapped(16, 32, 3))
    small = st.compress(model, st.Ratio(0.25), example_inputs=X, treat_as={Wrapped: nn.Conv2d}).model
    loaded = st.load(st.save(small, f"{tmp_path}/model.safetensors"), model)
    with torch.no_grad():
        assert torch.equal(loaded(X), small(X))


@pytest.mark.parametrize(
    ("treat_as", "match"),
    [
        ({nn.Conv2d: Wrapped}, "the first a subclass of the second"),
        ({"Wrapped": nn.Conv2d}, "give classes"),
        ({Wrapped: nn.Module}, "no factored form"),
    ],
    ids=str,
)
def test_what_treat_as_cannot_mean_is_refused(treat_as: object, match: str) -> None:
    with pytest.raises(st.errors.ModelError, match=match):
        st.analyze(network(Wrapped(16, 32, 3)), X, treat_as=treat_as)  # type: ignore[arg-type]


def test_every_type_has_a_name_of_its_own_and_no_layer_two_types() -> None:
    assert len({kind.name for kind in LAYER_TYPES}) == len(LAYER_TYPES)
    layers = (nn.Linear(2, 2), Conv1D(2, 2), nn.Conv1d(2, 2, 1), nn.Conv2d(2, 2, 1), nn.Conv3d(2, 2, 1))
    for layer in (*layers, nn.ConvTranspose2d(2, 2, 1)):
        assert sum(kind.base_of(type(layer)) is not None for kind in LAYER_TYPES) == 1
    assert find_layer_type(nn.Bilinear(2, 2, 2)) is None


def test_a_hugging_face_model_is_compressed_and_comes_back() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=50, n_positions=16)
    model = GPT2LMHeadModel(config).eval()
    tokens = {"input_ids": torch.randint(0, 50, (2, 8)), "use_cache": False}
    small = st.compress(model, st.Ratio(1.0), example_inputs=tokens, exclude="lm_head", allow_growth=True)
    kinds = {layer.name: layer.form for layer in small.plan.factored}
    assert kinds == {
        f"transformer.h.0.{name}": "linear" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    with torch.no_grad():
        torch.testing.assert_close(small.model(**tokens).logits, model(**tokens).logits, rtol=1e-4, atol=1e-4)
    assert type(st.merge(small.model).transformer.h[0].mlp.c_fc) is Conv1D


def test_reading_a_layer_by_keyword_counts_too() -> None:
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.transposed = nn.Linear(4, 4), Conv1D(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.transposed(x=self.linear(input=x))

    assert trace(Keyword(), as_inputs(torch.ones(3, 4))).calls == {"linear": 1, "transposed": 1}
