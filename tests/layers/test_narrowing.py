"""Layers that are narrowed together: which ones are found, and that what comes out is what was meant."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import spectrim as st
from spectrim.layers import narrowing
from spectrim.layers.heads import HeadOutput, HeadValues
from spectrim.layers.replacement import narrowed_at, narrowed_layers, own_bias, replace
from spectrim.linalg import HeadLayout


class Mlp(nn.Module):
    """Up, perhaps a gate, something between, and down, with a residual sum around it."""

    def __init__(self, between: nn.Module, *, gated: bool = False) -> None:
        super().__init__()
        self.up, self.down, self.between = nn.Linear(12, 32), nn.Linear(32, 12, bias=False), between
        self.gate = nn.Linear(12, 32) if gated else None

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.between(self.up(x))
        return x + self.down(hidden if self.gate is None else hidden * self.gate(x))


class Reread(Mlp):
    """The hidden numbers are read once more."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.between(self.up(x))
        return x + self.down(hidden) + hidden.mean(dim=-1, keepdim=True)


class Sized(Mlp):
    """Its code knows the width."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.between(self.up(x)).reshape(*x.shape[:-1], 4, 8).flatten(-2)
        return x + self.down(hidden)


class Paired(Mlp):
    """Its code needs an even width."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.between(self.up(x)).unflatten(-1, (-1, 2)).flatten(-2))


class Stacked(nn.Module):
    """Its code needs two MLPs of the same width."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Mlp(nn.ReLU()), Mlp(nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first.up(x).relu()
        x = x + self.first.down(hidden)
        return x + self.second.down(torch.stack([hidden, self.second.up(x).relu()])[1])


class Largest(nn.Module):
    """Outputs are classes, which hardly tell what they are made of."""

    def forward(self, x: Tensor) -> Tensor:
        return x.argmax(dim=-1)


class Mixing(nn.Module):
    """Each place of a sequence sees the others."""

    def forward(self, x: Tensor) -> Tensor:
        return x + x.mean(dim=1, keepdim=True)


class Attention(nn.Module):
    """Heads of which several may read the same values; what lies between them may be more than an attention."""

    def __init__(self, *, groups: int = 4, mixed: bool = False, same: bool = False) -> None:
        super().__init__()
        self.num_heads, self.groups, self.mixed, self.same = 4, groups, mixed, same
        self.q, self.k, self.v = nn.Linear(12, 24), nn.Linear(12, 6 * groups), nn.Linear(12, 6 * groups, bias=False)
        self.o = nn.Linear(24, 12)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, 6)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        k, v = (each.repeat_interleave(4 // self.groups, dim=1) for each in (k, v))
        heads = nn.functional.scaled_dot_product_attention(q, v if self.same else k, v)
        heads = heads + heads.flip(1) if self.mixed else heads
        return x + self.o(heads.transpose(1, 2).flatten(-2))


class SharedValues(nn.Module):
    """The second attention reads the values of the first one as well."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Attention(), Attention()

    def forward(self, x: Tensor) -> Tensor:
        before: Tensor | float = 0.0
        for layer in (self.first, self.second):
            q, k, v = (each(x).unflatten(-1, (-1, 6)).transpose(1, 2) for each in (layer.q, layer.k, layer.v))
            before = v + before
            heads = nn.functional.scaled_dot_product_attention(q, k, before)
            x = x + layer.o(heads.transpose(1, 2).flatten(-2))
        return x


def network(*layers: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*layers, nn.LayerNorm(12)).eval()


DATA = list(torch.randn(64, 6, 12, generator=torch.Generator().manual_seed(3)).split(16))


def feeders(model: nn.Module) -> dict[str, list[str]]:
    """By layer, those that feed it."""
    return fed(st.analyze(model, DATA[0]))


def fed(analysis: st.Analysis) -> dict[str, list[str]]:
    fed = (layer for layer in analysis if layer.feeders and not layer.unit.scores)
    return {layer.name: [own.name for own in layer.feeders] for layer in fed}


@pytest.mark.parametrize("between", [nn.ReLU(), nn.GELU(), nn.Sequential(nn.SiLU(), nn.Dropout(0.5)), nn.Identity()])
def test_neurons_with_something_elementwise_between_are_found(between: nn.Module) -> None:
    assert feeders(network(Mlp(between))) == {"0.down": ["0.up"]}


def test_a_gate_is_found() -> None:
    assert feeders(network(Mlp(nn.SiLU(), gated=True), Mlp(nn.SiLU()))) == {
        "0.down": ["0.up", "0.gate"],
        "1.down": ["1.up"],
    }


@pytest.mark.parametrize(
    "layer",
    [
        Mlp(nn.LayerNorm(32)),
        Mlp(nn.Softmax(dim=-1)),
        Mlp(Mixing()),
        Reread(nn.ReLU()),
        Sized(nn.ReLU()),
        Paired(nn.ReLU()),
        Stacked(),
    ],
    ids=["norm", "softmax", "mixing", "read twice", "its code knows the width", "pairs", "equal widths"],
)
def test_what_is_not_elementwise_or_is_read_elsewhere_is_not_narrowed(layer: nn.Module) -> None:
    model = network(layer, Mlp(nn.ReLU()))
    assert feeders(model) == {"1.down": ["1.up"]}
    assert not narrowed_layers(model)


def test_layers_whose_outputs_are_read_elsewhere_are_not_narrowed_if_only_classes_come_out() -> None:
    model = nn.Sequential(Reread(nn.ReLU()), nn.Linear(12, 3), Largest()).eval()
    assert not any(layer.feeders for layer in st.analyze(model, DATA[0][:1, :2]))


@pytest.mark.parametrize("groups", [4, 2, 1])
def test_the_heads_of_attentions_are_found(groups: int) -> None:
    analysis = st.analyze(network(Attention(groups=groups), Mlp(nn.ReLU()), Attention(groups=groups)), DATA[0])
    assert fed(analysis) == {
        "0.o": ["0.v"],
        "1.down": ["1.up"],
        "2.o": ["2.v"],
    }
    assert analysis["0.o"].unit.heads == HeadLayout(4, groups, 6)


def test_heads_of_torchs_attention_are_found() -> None:
    model = nn.TransformerEncoderLayer(12, 3, 24, batch_first=True).eval()
    analysis = st.analyze(model, DATA[0])
    assert analysis["self_attn.out_proj"].unit.heads == HeadLayout(3, 3, 4)
    assert [own.name for own in analysis["linear2"].feeders] == ["linear1"]


def test_heads_that_are_mixed_are_not_narrowed() -> None:
    assert feeders(network(Attention(mixed=True))) == {}
    assert feeders(network(SharedValues())) == {}


@pytest.mark.parametrize("x", [DATA[0], DATA[0][:, :1], torch.ones(1, 6, 12)], ids=["many", "one token", "equal"])
def test_values_that_are_keys_as_well_are_not_narrowed(x: Tensor) -> None:
    assert {layer.name for layer in st.analyze(network(Attention(same=True)), x) if layer.feeders} == set()


def test_where_the_example_is_zero_nothing_is_narrowed() -> None:
    layer = Reread(nn.ReLU())
    layer.up.bias = None
    assert not any(own.feeders for own in st.analyze(network(layer), torch.zeros(1, 6, 12)))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("groups", [4, 2])
def test_heads_of_full_size_change_nothing(dtype: torch.dtype, tolerance: float, groups: int) -> None:
    model = network(Attention(groups=groups)).to(dtype)
    x = DATA[0].to(dtype)
    expected = model(x)
    layer = st.analyze(model, x, calibration=st.calibrate(model, [x]))["0.o"]
    factors = layer.decomposition("head_vo", "activation").factors((6,))
    replace(model, narrowed_at(model, "0.o", ["0.v"], form="head_vo", rank=6, factors=factors, bias=own_bias))
    torch.testing.assert_close(model(x), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("groups", [4, 2])
def test_heads_become_smaller_under_a_budget_and_go_through_a_file(groups: int, tmp_path: Path) -> None:
    model = network(Attention(groups=groups), Attention(groups=groups))
    with torch.no_grad():  # half of the numbers of each head say nothing
        for layer in model[:2]:
            layer.v.weight.unflatten(0, (groups, 6))[:, 3:] = 0
    forms = ("linear", "head_vo")
    small = st.compress(model, st.Budget(params=0.8), example_inputs=DATA[0], data=DATA, forms=forms)
    assert {layer.form for layer in small.plan if layer.unit} == {"head_vo"}
    assert small.fidelity is not None
    assert small.fidelity.plain is not None
    assert small.fidelity.relative_error < 0.5 * small.fidelity.plain.relative_error
    again = st.load(st.save(small.model, tmp_path / "small.safetensors"), model)
    assert torch.equal(again(DATA[0]), small.model(DATA[0]))


def test_heads_that_say_more_keep_more_and_go_through_a_file(tmp_path: Path) -> None:
    model = network(Attention(groups=4), Attention(groups=4))
    with torch.no_grad():  # so that one head needs all of its numbers, and the others one or two
        for layer in model[:2]:
            layer.v.weight.unflatten(0, (4, 6))[1:, 2:] = 0
    forms = ("linear", "head_vo")
    small = st.compress(model, st.Budget(params=0.8), example_inputs=DATA[0], data=DATA, forms=forms)
    (ranks, *_), by_mean = ([part.ranks for part in small.model.modules() if isinstance(part, HeadValues)], {})
    assert ranks[0] > max(ranks[1:])
    for name, layer in small.model.named_modules():
        if isinstance(layer, HeadValues | HeadOutput):
            by_mean[name] = sum(layer.ranks) // layer.heads
    assert by_mean == {layer.name: layer.ranks[0] for layer in small.plan if layer.unit}
    st.save(small.model, file := tmp_path / "small.safetensors")
    again = st.load(file, model)
    assert torch.equal(again(DATA[0]), small.model(DATA[0]))


class Apart(nn.Module):
    """An MLP whose first layer and last layer are in modules of their own, as BERT's are."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Sequential(nn.Linear(12, 32), nn.ReLU()), nn.Sequential(nn.Linear(32, 12))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.last(self.first(x))


@pytest.mark.parametrize("between", ["in a block", "a layer", "a block"])
def test_what_a_block_gave_before_it_was_narrowed_is_not_recalled(between: str) -> None:
    relu = nn.ReLU() if between == "a layer" else nn.Sequential(nn.ReLU(), nn.Identity())
    flat = (nn.Linear(12, 32), relu, nn.Linear(32, 12), nn.Tanh(), nn.Linear(12, 32), relu, nn.Linear(32, 12))
    model = network(*((Apart(), Apart()) if between == "in a block" else flat))
    cached, uncached = (
        st.compress(model, st.Budget(params=0.5), example_inputs=DATA[0], data=DATA, forms="width", cache=cache)
        for cache in (None, 0)
    )
    assert cached.plan == uncached.plan
    assert {layer.form for layer in cached.plan} == {"width"}
    torch.testing.assert_close(cached.model(DATA[0]), uncached.model(DATA[0]))


class Core(nn.Module):
    """The middle of an attention, with positions of its own, in a module that holds neither values nor output."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Embedding(6, 6)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        bias = self.positions(torch.arange(6))
        return nn.functional.scaled_dot_product_attention(q, k, v, bias)


class WithCore(Attention):
    """An attention whose middle is a block."""

    def __init__(self) -> None:
        super().__init__(groups=4)
        self.core = Core()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, 6)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return x + self.o(self.core(q, k, v).transpose(1, 2).flatten(-2))


def test_the_middle_of_an_attention_is_not_recalled_from_before_it_was_narrowed() -> None:
    model = network(WithCore(), WithCore())
    cached, uncached = (
        st.compress(model, st.Budget(params=0.6), example_inputs=DATA[0], data=DATA, forms="head_vo", cache=cache)
        for cache in (None, 0)
    )
    assert "head_vo" in {layer.form for layer in cached.plan}
    assert cached.plan == uncached.plan
    torch.testing.assert_close(cached.model(DATA[0]), uncached.model(DATA[0]))


def test_layers_in_a_row_are_taken_in_pairs() -> None:
    model = network(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12))
    assert feeders(model) == {"2": ["0"]}


@pytest.mark.parametrize("name", ["skipped", "hooked", "shared"])
def test_layers_that_must_stay_as_they_are_are_not_narrowed(name: str) -> None:
    model = network(Mlp(nn.ReLU()), Mlp(nn.ReLU()))
    if name == "hooked":
        model[0].up.register_forward_hook(lambda *_: None)
    if name == "shared":
        model[1].up.weight = model[0].up.weight
    analysis = st.analyze(model, DATA[0], exclude="0.up" if name == "skipped" else ())
    narrowable = {layer.name for layer in analysis if layer.feeders}
    assert narrowable == (set() if name == "shared" else {"1.down"})


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("gated", [False, True])
def test_at_full_width_nothing_changes(dtype: torch.dtype, tolerance: float, gated: bool) -> None:
    model = network(Mlp(nn.GELU(), gated=gated)).to(dtype)
    x = DATA[0].to(dtype)
    expected = model(x)
    layer = st.analyze(model, x, calibration=st.calibrate(model, [x]))["0.down"]
    factors = layer.decomposition("width", "activation").factors((32,))
    names = [own.name for own in layer.feeders]
    replace(model, narrowed_at(model, "0.down", names, form="width", rank=32, factors=factors, bias=own_bias))
    torch.testing.assert_close(model(x), expected, rtol=0, atol=tolerance)


@pytest.fixture(scope="module")
def dense() -> nn.Module:
    """Half of its neurons say little."""
    model = network(Mlp(nn.GELU(), gated=True), Mlp(nn.ReLU()))
    with torch.no_grad():
        for layer in (model[0], model[1]):
            layer.down.weight[:, ::2] *= 0.02
    return model


@pytest.fixture(scope="module")
def small(dense: nn.Module) -> st.Compressed:
    return st.compress(dense, st.Budget(params=0.6), example_inputs=DATA[0], data=DATA)


def test_a_budget_narrows_where_that_loses_least(dense: nn.Module, small: st.Compressed) -> None:
    assert {layer.form for layer in small.plan} == {"width"}
    assert small.measurement.params_ratio is not None
    assert small.measurement.params_ratio <= 0.6
    assert all(type(layer) is nn.Linear for layer in narrowed_layers(small.model).values())
    alone = st.compress(dense, st.Budget(params=0.6), example_inputs=DATA[0], data=DATA, forms="linear")
    assert small.fidelity is not None
    assert alone.fidelity is not None
    assert small.fidelity.relative_error < 0.3 * alone.fidelity.relative_error


def test_narrowed_networks_go_through_a_file(dense: nn.Module, small: st.Compressed, tmp_path: Path) -> None:
    again = st.load(st.save(small.model, tmp_path / "small.safetensors"), dense)
    assert torch.equal(again(DATA[0]), small.model(DATA[0]))
    assert narrowed_layers(again).keys() == narrowed_layers(small.model).keys()
    other = network(Mlp(nn.ReLU()), Mlp(nn.ReLU()))
    with pytest.raises(st.errors.FileError, match="for another network"):
        st.load(tmp_path / "small.safetensors", other)
    assert not narrowed_layers(other)


def test_narrowed_networks_are_compressed_again(dense: nn.Module, small: st.Compressed, tmp_path: Path) -> None:
    twice = st.compress(small.model, st.Budget(params=0.7), example_inputs=DATA[0], data=DATA, forms="linear")
    assert any(layer.form == "linear" for layer in twice.plan)
    again = st.load(st.save(twice.model, tmp_path / "twice.safetensors"), dense)
    assert torch.equal(again(DATA[0]), twice.model(DATA[0]))


def test_heads_are_narrowed_once(tmp_path: Path) -> None:
    model = network(Attention(), Attention())
    small = st.compress(model, st.Budget(params=0.9), example_inputs=DATA[0], data=DATA, forms="head_vo").model
    assert narrowed_layers(small)
    twice = st.compress(small, st.Budget(params=0.8), example_inputs=DATA[0], data=DATA).model
    for saved in (twice, st.merge(twice)):
        again = st.load(st.save(saved, tmp_path / "twice.safetensors"), model)
        assert torch.equal(again(DATA[0]), saved(DATA[0]))


def test_the_plan_is_carried_out_again_and_can_be_edited(dense: nn.Module, small: st.Compressed) -> None:
    again = st.compress(dense, small.plan, example_inputs=DATA[0], data=DATA)
    assert torch.equal(again.model(DATA[0]), small.model(DATA[0]))
    edited = small.plan.model_copy(
        update={"layers": tuple(layer.model_copy(update={"rank": 8}) for layer in small.plan)}
    )
    narrower = st.compress(dense, edited, example_inputs=DATA[0], data=DATA)
    assert narrower.model[0].up.out_features == 8
    assert narrower.plan["0.down"].reason == "rank 8 set by hand in the plan"


@pytest.mark.parametrize(
    ("name", "update", "message"),
    [
        ("0.up", {"rank": 3}, "give all the same form and rank"),
        ("0.up", {"unit": None, "form": "dense", "rank": None, "metric": None}, "together with 0.gate; in this model"),
        ("0.down", {"form": "head_vo"}, "it can be narrowed in the width form together with 0.up, 0.gate"),
        ("0.down", {"metric": "plain"}, "0.down in the plain metric; pass data=, and plan activation or loss"),
        ("0.down", {"unit": None, "form": "dense", "rank": None, "metric": None}, "0.down, which it does not narrow"),
    ],
)
def test_plans_that_narrow_only_a_part_are_refused(
    dense: nn.Module, small: st.Compressed, name: str, update: dict[str, object], message: str
) -> None:
    layers = tuple(layer.model_copy(update=update if layer.name == name else {}) for layer in small.plan)
    with pytest.raises(st.errors.PlanError, match=message):
        st.compress(dense, small.plan.model_copy(update={"layers": layers}), example_inputs=DATA[0], data=DATA)


def test_without_data_and_under_other_rules_nothing_is_narrowed(dense: nn.Module) -> None:
    for rule, data in ((st.Budget(params=0.6), None), (st.Ratio(0.5), DATA)):
        plan = st.compress(dense, rule, example_inputs=DATA[0], data=data).plan
        assert not any(layer.unit for layer in plan)


def test_narrowed_heads_are_found_in_bfloat16_too() -> None:
    model = network(Attention(groups=2), Mlp(nn.GELU())).bfloat16()
    analysis = st.analyze(model, DATA[0].bfloat16())
    assert analysis["0.o"].unit.heads == HeadLayout(4, 2, 6)
    assert [own.name for own in analysis["1.down"].feeders] == ["1.up"]


@pytest.mark.filterwarnings(r"ignore:.*torch\.jit.*:FutureWarning", r"ignore:.*torch\.jit.*:DeprecationWarning")
@pytest.mark.parametrize("how", [copy.deepcopy, torch.jit.script, lambda model: torch.jit.trace(model, DATA[0])])
@pytest.mark.parametrize("ranks", [(2, 2, 2), (4, 1, 2), (1, 3, 3)])
def test_layers_around_narrowed_heads_are_copied_scripted_and_traced(
    ranks: tuple[int, ...], how: Callable[[nn.Module], nn.Module]
) -> None:
    values, output = nn.Linear(12, sum(ranks)), nn.Linear(sum(ranks), 12)
    model = nn.Sequential(
        HeadValues(values, size=4, ranks=ranks, narrowed_from=(12, 12)),
        HeadOutput(output, size=4, ranks=ranks, narrowed_from=(12, 12)),
    )
    expected = output(values(DATA[0]))
    torch.testing.assert_close(how(model)(DATA[0]), expected)
    heads = model[0](DATA[0]).unflatten(-1, (3, 4))
    for head, (rank, own) in enumerate(zip(ranks, values(DATA[0]).split(ranks, dim=-1), strict=True)):
        torch.testing.assert_close(heads[..., head, :rank], own)
        assert not heads[..., head, rank:].any()
    narrow = heads[..., : max(ranks)].flatten(-2)  # as an attention gives that has read a narrow cache
    torch.testing.assert_close(model[1](narrow), expected)


def test_only_budgets_look_for_layers_to_narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    model, looked = network(Mlp(nn.ReLU())), list[str]()
    monkeypatch.setattr(narrowing, "with_feeders", lambda *args: looked.append("looked") or args[-1])
    st.compress(model, st.Ratio(0.5), example_inputs=DATA[0], data=DATA)
    assert not looked
    st.compress(model, st.Budget(params=0.7), example_inputs=DATA[0], data=DATA)
    assert looked


class TwoPaths(nn.Module):
    """What is read by the last layer depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other, self.last = nn.Linear(12, 32), nn.Linear(12, 32), nn.Linear(32, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu((self.one if float(x.detach().mean()) > 0 else self.other)(x)))


def test_layers_are_not_narrowed_together_where_others_take_their_turn() -> None:
    torch.manual_seed(0)
    model, data = TwoPaths(), [torch.randn(16, 12) + sign for sign in (1, -1, 1, -1)]
    assert st.plan(st.analyze(model, data[0]), st.Rank(4))["last"].form == "linear"
    small = st.compress(model, st.Budget(macs=0.7), example_inputs=data[0], data=data)
    assert all(layer.unit is None for layer in small.plan)
    assert all(torch.isfinite(small.model(batch)).all() for batch in data)
