"""Queries and keys whose heads are narrowed together."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spectrim as st
from spectrim.layers.heads import HeadScores
from spectrim.layers.replacement import narrowed_at, own_bias, replace
from spectrim.linalg import HeadLayout

Step = Callable[[Tensor], Tensor]


def turned(x: Tensor) -> Tensor:
    """Rotary positions."""
    angles = torch.arange(x.shape[-2]).unsqueeze(1) * torch.tensor([1.0, 0.3, 0.1]).to(x)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * angles.cos() - second * angles.sin(), first * angles.sin() + second * angles.cos()], -1)


class Attention(nn.Module):
    """Heads of which several may read the same keys; something may be done to queries and keys."""

    def __init__(
        self, *, groups: int = 4, between: Step | None = None, softmax: bool = True, bias: bool = True
    ) -> None:
        super().__init__()
        self.num_heads, self.groups, self.between, self.softmax = 4, groups, between, softmax
        self.q, self.k = nn.Linear(12, 24, bias=bias), nn.Linear(12, 6 * groups, bias=bias)
        self.v, self.o = nn.Linear(12, 6 * groups), nn.Linear(24, 12)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, 6)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        if self.between is not None:
            q, k = self.between(q), self.between(k)
        k, v = (each.repeat_interleave(4 // self.groups, dim=1) for each in (k, v))
        scores = q @ k.mT / 6**0.5
        scores = scores.softmax(dim=-1) if self.softmax else scores / x.shape[1]
        return x + self.o((scores @ v).transpose(1, 2).flatten(-2))


class Reread(Attention):
    """The keys are read once more."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.k(x).mean(dim=-1, keepdim=True)


class KeysAreValues(Attention):
    def forward(self, x: Tensor) -> Tensor:
        q, k = (layer(x).unflatten(-1, (-1, 6)).transpose(1, 2) for layer in (self.q, self.k))
        return x + self.o(nn.functional.scaled_dot_product_attention(q, k, k).transpose(1, 2).flatten(-2))


def network(*layers: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*layers, nn.LayerNorm(12)).eval()


def redundant(groups: int = 4, kind: type[Attention] = Attention) -> nn.Module:
    """Half of the numbers in each head of queries and keys say nothing."""
    model = network(kind(groups=groups), kind(groups=groups))
    with torch.no_grad():
        for layer in model[:2]:
            for part, heads in ((layer.q, 4), (layer.k, groups)):
                part.weight *= 3
                part.weight.unflatten(0, (heads, 6))[:, 3:] = 0
                part.bias.unflatten(0, (heads, 6))[:, 3:] = 0
    return model


DATA = list(torch.randn(64, 6, 12, generator=torch.Generator().manual_seed(3)).split(16))
BUDGET = st.Budget(params=0.8)


def pairs(model: nn.Module, x: Any = DATA[0]) -> dict[str, str]:
    """By layer of keys, that of the queries."""
    analysis = st.analyze(model, x)
    return {layer.name: layer.feeders[0].name for layer in analysis if "head_qk" in layer.joint_forms}


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("bias", [True, False])
def test_queries_and_keys_are_found(groups: int, bias: bool) -> None:
    model = network(Attention(groups=groups, bias=bias), nn.ReLU(), Attention(groups=groups, bias=bias))
    assert pairs(model) == {"0.k": "0.q", "2.k": "2.q"}
    assert st.analyze(model, DATA[0])["0.k"].unit.scores == HeadLayout(4, groups, 6)


@pytest.mark.parametrize(
    "layer",
    [
        Attention(between=turned),
        Attention(between=nn.LayerNorm(6)),
        Attention(between=nn.functional.normalize),
        Attention(between=torch.tanh),
        Attention(softmax=False),
        Reread(),
        KeysAreValues(),
    ],
    ids=["rotary", "norm", "cosine", "elementwise", "no softmax", "read twice", "keys are values"],
)
def test_what_is_no_plain_product_or_is_read_elsewhere_is_left_alone(layer: nn.Module) -> None:
    assert pairs(network(layer, Attention())) == {"1.k": "1.q"}


class Gated(Attention):
    """The keys are read once more, late, and by their length alone."""

    def __init__(self) -> None:
        super().__init__(bias=False)
        self.up, self.down = nn.Linear(12, 24), nn.Linear(24, 12)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.k(x).norm(dim=-1, keepdim=True).sigmoid()
        x = super().forward(x)
        return gate * (x + self.down(self.up(x).relu()))


class Returning(nn.Module):
    """Something of the first keys is an output."""

    def __init__(self, of_keys: Step) -> None:
        super().__init__()
        self.first, self.second, self.of_keys = Attention(bias=False), Attention(bias=False), of_keys

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.second(self.first(x)), self.of_keys(self.first.k(x).unflatten(-1, (4, 6)))


@pytest.mark.parametrize("of_keys", [nn.Identity(), lambda k: k.norm(dim=-1), lambda k: k.amax(dim=-1)])
def test_keys_that_are_read_late_are_left_alone(of_keys: Step) -> None:
    assert pairs(network(Gated(), Attention(bias=False))) == {"1.k": "1.q"}
    torch.manual_seed(0)
    assert "first.k" not in pairs(Returning(of_keys).eval())


def test_without_a_softmax_they_are_left_alone_whatever_the_first_sample_is() -> None:
    x = DATA[0].clone()
    x[0, 0] = 0
    assert pairs(network(Attention(softmax=False, bias=False)), x) == {}


class Normalised(Attention):
    """So that its values cannot be narrowed."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, 6)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        heads = nn.functional.scaled_dot_product_attention(q, k, nn.functional.normalize(v, dim=-1))
        return x + self.o(heads.transpose(1, 2).flatten(-2))


@pytest.mark.parametrize("options", [{}, {"include": ["*.q", "*.k"]}, {"exclude": ["*.v"]}, {"exclude": ["*.o"]}])
def test_they_are_found_whatever_becomes_of_the_values(options: dict[str, Any]) -> None:
    analysis = st.analyze(network(Normalised(), Normalised(), Attention()), DATA[0], **options)
    assert [layer.name for layer in analysis if layer.unit.scores] == ["0.k", "1.k", "2.k"]


class Routed(nn.Module):
    """An expert without tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.expert = Attention(), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention(x)
        mine = x[..., 0] > 1e9
        return x.masked_scatter(mine.unsqueeze(-1), self.expert(x[mine]))


def test_a_layer_without_vectors_is_no_obstacle() -> None:
    assert pairs(network(Routed())) == {"0.attention.k": "0.attention.q"}
    analysis = st.analyze(network(Routed()), DATA[0])
    assert {layer.name: layer.joint_forms for layer in analysis if layer.joint_forms} == {
        "0.attention.k": ("head_qk",),
        "0.attention.o": ("head_vo",),
    }


@pytest.mark.parametrize("part", ["q", "k"])
@pytest.mark.parametrize("bias", [0.0, 1.0])
def test_a_head_that_was_pruned_is_no_obstacle(part: str, bias: float) -> None:
    model = redundant()
    with torch.no_grad():
        getattr(model[0], part).weight[:6] = 0
        getattr(model[0], part).bias[:6] = bias
    small = st.compress(model, BUDGET, example_inputs=DATA[0], data=DATA)
    assert {layer.form for layer in small.plan if layer.unit} == {"head_qk"}
    assert small.fidelity is not None
    assert small.fidelity.relative_error < 1e-2


def test_in_torchs_attention_they_are_found_unless_it_adds_a_key() -> None:
    layer = nn.TransformerEncoderLayer(12, 3, 24, batch_first=True).eval()
    assert pairs(layer) == {"self_attn.k_proj": "self_attn.q_proj"}
    layer.self_attn = nn.MultiheadAttention(12, 3, batch_first=True, add_bias_kv=True)
    assert pairs(layer.eval()) == {}


class KeysFirst(Attention):
    """The same, called in another order."""

    def forward(self, x: Tensor) -> Tensor:
        k, v, q = (layer(x).unflatten(-1, (-1, 6)).transpose(1, 2) for layer in (self.k, self.v, self.q))
        return x + self.o(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))


def test_where_the_keys_come_before_the_queries_the_result_is_the_same() -> None:
    results = {}
    for kind, names in ((Attention, {"0.k": "0.q", "1.k": "1.q"}), (KeysFirst, {"0.q": "0.k", "1.q": "1.k"})):
        model = network(kind(), kind())
        assert pairs(model) == names
        for metric in ("activation", "loss"):
            analysis = st.analyze(model, DATA[0], calibration=st.calibrate(model, DATA, gradients=True))
            small = network(kind(), kind())
            for last, first in names.items():
                factors = analysis[last].decomposition("head_qk", metric).factors((3,))
                replace(
                    small, narrowed_at(small, last, [first], form="head_qk", rank=3, factors=factors, bias=own_bias)
                )
            results[kind, metric] = small(DATA[0]).detach()
    for metric in ("activation", "loss"):
        difference = results[Attention, metric] - network(Attention(), Attention())(DATA[0]).detach()
        assert float(difference.abs().max()) > 1e-3
        torch.testing.assert_close(results[KeysFirst, metric], results[Attention, metric], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("metric", ["activation", "loss"])
def test_where_the_keys_come_first_full_size_changes_nothing(metric: str) -> None:
    model, x = network(KeysFirst(), KeysFirst()), DATA[0]
    expected = model(x)
    assert narrow_fully(model, x, metric) == 2
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-5)
    small = st.compress(redundant(kind=KeysFirst), BUDGET, example_inputs=x, data=DATA)
    assert {layer.form for layer in small.plan if layer.unit} == {"head_qk"}
    assert small.fidelity is not None
    assert small.fidelity.relative_error < 1e-3


def narrow_fully(model: nn.Module, x: Any, metric: Any = "activation") -> int:
    """Every pair of queries and keys in the form at full size, in the model itself; how many there are."""
    batches = [x]
    calibration = st.calibrate(model, batches, gradients=metric == "loss")
    analysis = st.analyze(model, x, calibration=calibration)
    chosen = [layer for layer in analysis if "head_qk" in layer.joint_forms]
    for layer in chosen:
        (size,), feeder = layer.full_ranks("head_qk"), layer.feeders[0].name
        factors = layer.decomposition("head_qk", metric).factors((size,))
        replace(
            model, narrowed_at(model, layer.name, [feeder], form="head_qk", rank=size, factors=factors, bias=own_bias)
        )
    return len(chosen)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("metric", ["activation", "loss"])
def test_heads_of_full_size_change_nothing(dtype: torch.dtype, tolerance: float, groups: int, metric: str) -> None:
    model, x = network(Attention(groups=groups), Attention(groups=groups)).to(dtype), DATA[0].to(dtype)
    expected = model(x)
    assert narrow_fully(model, x, metric) == 2
    torch.testing.assert_close(model(x), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("groups", [4, 2])
def test_under_a_budget_they_become_smaller_and_go_through_a_file(groups: int, tmp_path: Path) -> None:
    model = redundant(groups)
    small = st.compress(model, BUDGET, example_inputs=DATA[0], data=DATA)
    assert {layer.form for layer in small.plan if layer.unit} == {"head_qk"}
    assert small.fidelity is not None
    assert small.fidelity.relative_error < 1e-3
    scores = [module for module in small.model.modules() if isinstance(module, HeadScores)]
    assert len(scores) == 4
    again = st.load(st.save(small.model, tmp_path / "small.safetensors"), model)
    assert torch.equal(again(DATA[0]), small.model(DATA[0]))
    assert [type(module) for module in again.modules()] == [type(module) for module in small.model.modules()]


def test_they_cost_what_was_planned() -> None:
    model = redundant()
    small = st.compress(model, BUDGET, example_inputs=DATA[0], data=DATA, forms="head_qk")
    chosen = [layer for layer in small.plan if layer.unit]
    assert chosen
    for layer in chosen:
        module = small.model.get_submodule(layer.name)
        assert sum(parameter.numel() for parameter in module.parameters()) == layer.kept.params
    rest = sum(parameter.numel() for parameter in model.parameters()) - sum(layer.dense.params for layer in small.plan)
    planned = sum(layer.kept.params for layer in small.plan)
    assert rest + planned == sum(parameter.numel() for parameter in small.model.parameters())


def test_with_and_without_a_cache_of_activations_they_are_the_same() -> None:
    model = network(Attention(), Attention())
    cached, uncached = (
        st.compress(model, st.Budget(params=0.7), example_inputs=DATA[0], data=DATA, forms="head_qk", cache=cache)
        for cache in (None, 0)
    )
    assert "head_qk" in {layer.form for layer in cached.plan}
    assert cached.plan == uncached.plan
    torch.testing.assert_close(cached.model(DATA[0]), uncached.model(DATA[0]))


def test_a_plan_of_them_is_carried_out_again_and_one_with_one_side_alone_is_refused() -> None:
    model = redundant()
    plan = st.compress(model, BUDGET, example_inputs=DATA[0], data=DATA).plan
    again = st.compress(model, plan, example_inputs=DATA[0], data=DATA)
    assert again.plan == plan
    layers = [
        layer.model_copy(update={"form": "dense", "rank": None, "unit": None, "metric": None, "kept": layer.dense})
        if layer.name == "0.q"
        else layer
        for layer in plan
    ]
    with pytest.raises(st.errors.PlanError, match=r"in the head_qk form together with nothing; .* together with 0.q"):
        st.compress(model, plan.model_copy(update={"layers": tuple(layers)}), example_inputs=DATA[0], data=DATA)


transformers = pytest.importorskip("transformers", reason="the extra 'hf' is not installed")

IDS = torch.randint(3, 60, (4, 9), generator=torch.Generator().manual_seed(0))
MASK = (torch.arange(9) < torch.tensor([[9], [7], [5], [9]])).long()
TEXT = {"input_ids": IDS, "attention_mask": MASK}
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
OPT = {"vocab_size": 64, "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "num_hidden_layers": 2}
T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
NETWORKS: dict[str, tuple[str, dict[str, Any], dict[str, Tensor], int]] = {
    "BertModel": ("BertConfig", SIZES, TEXT, 2),
    "ViTModel": (
        "ViTConfig",
        SIZES | {"image_size": 16, "patch_size": 4},
        {"pixel_values": torch.randn(3, 3, 16, 16)},
        2,
    ),
    # relative positions are added to the scores, and the decoder has cross-attentions
    "T5ForConditionalGeneration": ("T5Config", T5, TEXT | {"decoder_input_ids": IDS[:, :5]}, 6),
    "OPTForCausalLM": ("OPTConfig", OPT | SPECIAL | {"num_attention_heads": 4}, TEXT, 2),
    "LlamaForCausalLM": ("LlamaConfig", SIZES | SPECIAL, TEXT, 0),
    "Qwen3ForCausalLM": ("Qwen3Config", SIZES | SPECIAL | {"num_key_value_heads": 2, "head_dim": 8}, TEXT, 0),
    "DebertaV2Model": (
        "DebertaV2Config",
        SIZES | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
        TEXT,
        0,
    ),
}


def of_transformers(name: str) -> nn.Module:
    torch.manual_seed(0)
    config, options, _, _ = NETWORKS[name]
    network: nn.Module = getattr(transformers, name)(getattr(transformers, config)(**options)).eval()
    with torch.no_grad():  # so that the softmax is not the same everywhere
        for module_name, module in network.named_modules():
            if isinstance(module, nn.Linear) and module_name.endswith(("q", "k", "q_proj", "k_proj", "query", "key")):
                module.weight *= 10
    return network


@pytest.mark.parametrize("name", NETWORKS)
def test_in_networks_of_transformers_they_are_exact_at_full_size_or_left_alone(name: str) -> None:
    model, (_, _, x, number) = of_transformers(name), NETWORKS[name]
    with torch.no_grad():
        expected = model(**x)[0]
        assert narrow_fully(model, x) == number
        torch.testing.assert_close(model(**x)[0], expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_a_decoder_writes_the_same_with_a_cache() -> None:
    model = of_transformers("OPTForCausalLM")
    small = st.compress(model, st.Budget(params=0.75, of="body"), example_inputs=TEXT, data=[TEXT] * 2).model
    assert any(isinstance(module, HeadScores) for module in small.modules())
    texts = [
        small.generate(**TEXT, max_new_tokens=6, do_sample=False, use_cache=use_cache) for use_cache in (True, False)
    ]
    assert torch.equal(*texts)
