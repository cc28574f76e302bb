"""Which layers count as which type: subclasses, overridden forward passes, and what a user says of them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

import spectrim as st
from spectrim.core.execution import as_inputs
from spectrim.layers.tracing import ended_at, trace
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
        ([Wrapped], "give classes by class"),
        (5, "give classes by class"),
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


# ------------------------------------------------------------------ what a network uses of a layer besides its forward


class Doubled(nn.Linear):
    """Changes what a call gives, past `forward`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return 2 * super().__call__(*args, **kwargs)


class Scaled(nn.Linear):
    """Has a method and an attribute of the class, and inherits `forward`."""

    temperature = 2.0

    def scaled(self, x: Tensor) -> Tensor:
        return 2 * self(x)


class Marked(nn.Linear):
    """Says by its class that its outputs are to be doubled, and has attributes named as those of factored layers."""

    def __init__(self, into: int, out: int) -> None:
        super().__init__(into, out)
        self.factors, self.rank, self.down, self.gain = 7, "low", None, 3.0

    def extra_repr(self) -> str:
        return f"std={self.weight.std().item():.2f}"


class UsesMethod(nn.Module):
    def forward(self, layer: nn.Module, x: Tensor) -> Tensor:
        return layer.scaled(x) / layer.temperature


class AsksClass(nn.Module):
    def forward(self, layer: nn.Module, x: Tensor) -> Tensor:
        return 2 * layer(x) if isinstance(layer, Marked) else layer(x)


class AsksPlainClass(nn.Module):
    """The same of an ordinary layer; some networks skip what they do not know."""

    def forward(self, layer: nn.Module, x: Tensor) -> Tensor:
        return 2 * layer(x) if isinstance(layer, nn.Linear) else layer(x)


class AsksType(nn.Module):
    def forward(self, layer: nn.Module, x: Tensor) -> Tensor:
        return 2 * layer(x) if type(layer) in (nn.Linear, nn.Conv2d) else layer(x)


class ReadsAttribute(nn.Module):
    def forward(self, layer: nn.Module, x: Tensor) -> Tensor:
        return layer.gain * layer(x)


class Holder(nn.Module):
    """A layer that is used in some way, and an ordinary one."""

    def __init__(self, layer: nn.Module, use: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.other, self.use = layer, nn.Linear(24, 24), use

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.layer(x) if self.use is None else self.use(self.layer, x))


ROWS = torch.randn(5, 24, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (Holder(Doubled(24, 24)), "a __call__ of its own"),
        (Holder(Scaled(24, 24), UsesMethod()), "uses more of it than its outputs"),
        (Holder(Marked(24, 24), AsksClass()), "uses more of it than its outputs"),
        (Holder(nn.Linear(24, 24), AsksPlainClass()), "uses more of it than its outputs"),
        (Holder(nn.Linear(24, 24), AsksType()), "uses more of it than its outputs"),
        (Holder(Marked(24, 24), ReadsAttribute()), None),
        (Holder(Marked(24, 24)), None),
        (Holder(Scaled(24, 24)), None),
    ],
    ids=[
        "call",
        "method",
        "class",
        "class of torch",
        "type",
        "attribute",
        "nothing of names that are taken",
        "nothing",
    ],
)
@pytest.mark.parametrize("rule", [st.Ratio(1.0), st.Ratio(0.25)], ids=str)
def test_a_layer_whose_class_is_used_for_more_stays_dense(model: Holder, why: str | None, rule: st.Ratio) -> None:
    small = st.compress(model, rule, example_inputs=ROWS, allow_growth=True)
    assert small.plan["other"].is_factored
    assert small.plan["layer"].is_factored == (why is None)
    assert why is None or why in small.plan["layer"].reason
    assert "rank=" in repr(small.model)
    if rule.ratio == 1:
        with torch.no_grad():
            torch.testing.assert_close(small.model(ROWS), model(ROWS), rtol=1e-4, atol=1e-5)


def test_a_call_of_its_own_is_not_treated_as_its_base() -> None:
    small = st.compress(Holder(Doubled(24, 24)), st.Ratio(0.25), example_inputs=ROWS, treat_as={Doubled: nn.Linear})
    assert "a __call__ of its own" in small.plan["layer"].reason


class Loss(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).pow(2).mean()


class ConvLoss(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).pow(2).mean()


class Experts(nn.Linear):
    """Holds a stack of matrices where its base holds one."""

    def __init__(self, into: int, out: int) -> None:
        super().__init__(into, out)
        self.weight = nn.Parameter(torch.randn(3, out, into))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weight.mT).sum(dim=0) + self.bias


@pytest.mark.parametrize("options", [{}, {"exclude": "1"}, {"data": [ROWS]}], ids=str)
@pytest.mark.parametrize("last", [Loss(24, 4), Experts(24, 4)], ids=["a loss", "experts"])
def test_layers_of_unusual_outputs_or_weights_stay_dense_and_do_no_harm(last: nn.Module, options: Any) -> None:
    small = st.compress(nn.Sequential(nn.Linear(24, 24), last), st.Rank(3), example_inputs=ROWS, **options)
    assert [layer.is_factored for layer in small.plan] == [True, False]


def test_a_convolution_that_gives_a_loss_stays_dense() -> None:
    small = st.compress(nn.Sequential(nn.Conv2d(16, 32, 3), ConvLoss(32, 4, 3)), st.Rank(2), example_inputs=X)
    assert [layer.is_factored for layer in small.plan] == [True, False]


class ByKeyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Conv1D(24, 24), nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(input=self.first(x=x))


def test_keywords_that_factored_layers_do_not_take_keep_a_layer_dense() -> None:
    small = st.compress(ByKeyword(), st.Rank(3), example_inputs=ROWS, data=[ROWS])
    assert "keyword arguments" in small.plan["first"].reason
    assert small.plan["second"].is_factored


class Halves(nn.Linear):
    """The same as its base, in another order of operations."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.mT + self.bias


def test_rounding_in_half_precision_is_no_difference() -> None:
    model = nn.Sequential(Halves(24, 24), nn.ReLU(), nn.Linear(24, 24)).bfloat16()
    small = st.compress(model, st.Rank(4), example_inputs=ROWS.bfloat16(), treat_as={Halves: nn.Linear})
    assert small.plan["0"].is_factored


def test_a_plan_of_treated_layers_is_applied() -> None:
    model, treat_as = nn.Sequential(Halves(24, 24), nn.ReLU(), nn.Linear(24, 24)), {Halves: nn.Linear}
    small = st.compress(model, st.Rank(4), example_inputs=ROWS, treat_as=treat_as)
    again = st.compress(model, small.plan, example_inputs=ROWS, treat_as=treat_as)
    assert again.plan["0"].is_factored
    with torch.no_grad():
        assert torch.equal(again.model(ROWS), small.model(ROWS))


class TiedPair(nn.Module):
    """Two layers of different types or sizes that share one weight."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (TiedPair(nn.Linear(24, 24), Conv1D(24, 24)), ROWS),
        (TiedPair(nn.Conv2d(16, 16, 3), nn.ConvTranspose2d(16, 16, 3)), X),
        (TiedPair(nn.Conv2d(16, 32, 3), nn.ConvTranspose2d(32, 16, 3)), X),
        (TiedPair(nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3)), X),
        (TiedPair(nn.Conv2d(16, 32, 3), nn.Conv2d(32, 32, 3, groups=2)), X),
    ],
    ids=["linear and transposed", "square autoencoder", "autoencoder", "the same", "grouped"],
)
def test_weights_that_layers_use_in_different_ways_stay_whole(model: TiedPair, x: Tensor) -> None:
    small = st.compress(model.eval(), st.Ratio(1.0), example_inputs=x, allow_growth=True)
    alike = type(model.first) is type(model.second) and model.first.groups == model.second.groups
    assert [layer.is_factored for layer in small.plan] == ([True] if alike else [False, False])
    assert alike or all("shares its weight with" in layer.reason for layer in small.plan)
    with torch.no_grad():
        torch.testing.assert_close(small.model(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "other",
    [Halves(24, 24), Conv1D(24, 24), nn.Identity(), torch.nn.utils.parametrizations.weight_norm(nn.Linear(24, 24))],
    ids=["a forward of its own", "another type", "none", "parametrised"],
)
def test_files_are_not_loaded_into_other_layers(other: nn.Module, tmp_path: Path) -> None:
    small = st.compress(nn.Sequential(nn.Linear(24, 24), nn.ReLU()), st.Rank(4), example_inputs=ROWS)
    path = st.save(small.model, tmp_path)
    with pytest.raises(st.errors.FileError, match="is for another network"):
        st.load(path, nn.Sequential(other, nn.ReLU()))


class Counts(nn.Module):
    """Gives something else at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.calls = nn.Linear(24, 24), nn.Linear(24, 24), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.second(self.first(x)) + self.calls


def test_a_network_that_is_not_repeatable_says_nothing_of_its_layers() -> None:
    small = st.compress(Counts(), st.Rank(3), example_inputs=ROWS)
    assert [layer.is_factored for layer in small.plan] == [True, True]


class HeldTwice(nn.Module):
    """Runs its layers from a list that no exchange reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(24, 24), nn.Linear(24, 24)
        self.stack = [self.first]

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.stack[0](x))


def test_a_layer_that_would_go_on_running_stays_dense() -> None:
    small = st.compress(HeldTwice(), st.Rank(3), example_inputs=ROWS)
    assert "would not run another layer" in small.plan["first"].reason
    assert small.plan["second"].is_factored
    assert small.plan.kept_cost.macs == small.measurement.macs


def of_kind(kind: str) -> nn.Sequential:
    """A network one of whose weights is not an ordinary floating-point tensor."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8))
    weight = network[2].weight.detach()
    if kind == "sparse":
        network[2].weight = nn.Parameter(weight.relu().to_sparse_csr(), requires_grad=False)
    else:
        network[2] = Float8(weight)
    return network


class Float8(nn.Linear):
    """Holds its weight in eight bits."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(*weight.shape[::-1], bias=False)
        self.weight = nn.Parameter(weight.to(torch.float8_e4m3fn), requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return input @ self.weight.to(input.dtype).mT


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
def test_a_sparse_weight_is_looked_at_and_not_copied() -> None:
    network = of_kind("sparse")
    plan = st.plan(st.analyze(network, ROWS[:2]), st.Rank(3))
    assert [layer.name for layer in plan if layer.is_factored] == ["0", "4"]
    assert "Parameter sparse_csr float32" in plan["2"].reason
    with pytest.raises(st.errors.ModelError, match=r"2\.weight is sparse_csr, .*to_dense"):
        st.compress(network, st.Rank(3), example_inputs=ROWS[:2], exclude="2")


@pytest.mark.parametrize("options", [{}, {"exclude": "2"}, {"data": ROWS.split(8)}], ids=["all", "excluded", "data"])
def test_weights_in_eight_bits_stay_as_they_are(options: dict[str, Any]) -> None:
    network = of_kind("float8")
    small = st.compress(network, st.Rank(3), example_inputs=ROWS[:2], **options)
    assert [layer.name for layer in small.plan if layer.is_factored] == ["0", "4"]
    assert "2" not in {layer.name for layer in small.plan} or not small.plan["2"].is_factored
    assert small.model(ROWS).isfinite().all()


ENDED: dict[str, tuple[nn.Module, Tensor]] = {
    "linear": (nn.Linear(6, 4), torch.randn(3, 5, 6)),
    "transformers": (Conv1D(4, 6), torch.randn(3, 5, 6)),
    "one dimension": (nn.Conv1d(6, 4, 3, stride=2, groups=2), torch.randn(3, 6, 9)),
    "reflected": (nn.Conv2d(6, 4, 3, padding=1, padding_mode="reflect"), torch.randn(3, 6, 9, 8)),
    "same": (nn.Conv2d(6, 4, (2, 4), padding="same", dilation=2), torch.randn(3, 6, 9, 8)),
    "three dimensions": (nn.Conv3d(6, 4, 2), torch.randn(3, 6, 4, 5, 6)),
    "transposed": (nn.ConvTranspose2d(6, 4, 3, stride=2, output_padding=1), torch.randn(3, 6, 4, 5)),
    "embedding": (nn.Embedding(7, 4), torch.randint(7, (3, 5))),
}


@pytest.mark.parametrize(("layer", "x"), ENDED.values(), ids=ENDED.keys())
def test_a_pass_ends_at_a_layer_before_it_computes_anything(layer: nn.Module, x: Tensor) -> None:
    class EndedError(Exception):
        pass

    def on_call(name: str, own: nn.Module, received: Tensor, output: Tensor) -> None:
        assert (name, own, received, output.shape) == ("0", layer, x, expected.shape)
        assert output.untyped_storage().nbytes() == x.element_size()
        raise EndedError

    model, expected = nn.Sequential(layer, nn.Identity()), layer(x)
    with ended_at(model, "0", on_call=on_call), pytest.raises(EndedError):
        model(x)
    assert torch.equal(model(x), expected)
    assert "forward" not in layer.__dict__
