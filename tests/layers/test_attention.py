"""`nn.MultiheadAttention`: its projections as layers, factored, put back, saved, and inside of torch's encoders."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spectrim as st
from spectrim.layers.attention import UnfusedMultiheadAttention
from spectrim.layers.unfusing import fused, unfused

E, HEADS, LENGTH, BATCH = 16, 4, 5, 3
OPTIONS: dict[str, dict[str, Any]] = {
    "usual": {},
    "batch first": {"batch_first": True},
    "no bias": {"bias": False},
    "more keys": {"add_bias_kv": True, "add_zero_attn": True},
    "other sizes": {"kdim": 6, "vdim": 7, "batch_first": True},
    "odd heads, double": {"num_heads": 1, "dtype": torch.float64},
}
CAUSAL = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
PADDING = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
PADDING[1, 3:] = True
CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "each head": {"average_attn_weights": False},
    "without weights": {"need_weights": False},
    "causal": {"attn_mask": CAUSAL},
    "causal hint": {"attn_mask": CAUSAL, "is_causal": True, "need_weights": False},
    "causal hint and padding": {"attn_mask": CAUSAL, "is_causal": True, "key_padding_mask": PADDING},
    "padding": {"key_padding_mask": PADDING, "need_weights": False},
    "by head": {"attn_mask": torch.randn(BATCH * HEADS, LENGTH, LENGTH, generator=torch.Generator().manual_seed(0))},
}


class Holder(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(E, options.pop("num_heads", HEADS), **options)
        if self.attention.in_proj_bias is not None:
            nn.init.normal_(self.attention.in_proj_bias)

    def forward(self, *inputs: Tensor, **options: Any) -> Any:
        return self.attention(*inputs, **options)


def inputs_of(attention: nn.MultiheadAttention, *, batched: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    sizes = (BATCH, LENGTH) if attention.batch_first else (LENGTH, BATCH)
    kind, generator = attention.out_proj.weight.dtype, torch.Generator().manual_seed(1)
    shape = sizes if batched else (LENGTH,)
    query, key, value = (
        torch.randn(*shape, size, generator=generator, dtype=kind) for size in (E, attention.kdim, attention.vdim)
    )
    return query, key, value


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("options", "call"), list(product(OPTIONS, CALLS)))
def test_the_same_as_of_torch(options: str, call: str, training: bool) -> None:
    model = Holder(**OPTIONS[options]).train(training)
    if call == "by head" and model.attention.num_heads != HEADS:
        return
    other, inputs = unfused(model), inputs_of(model.attention)
    assert isinstance(other.attention, UnfusedMultiheadAttention)
    with torch.no_grad():
        torch.testing.assert_close(other(*inputs, **CALLS[call]), model(*inputs, **CALLS[call]))


def test_one_sequence_without_a_batch() -> None:
    model = Holder(batch_first=True)
    inputs, mask = inputs_of(model.attention, batched=False), PADDING[1]
    for options in ({}, {"need_weights": False, "key_padding_mask": mask}, {"average_attn_weights": False}):
        torch.testing.assert_close(unfused(model)(*inputs, **options), model(*inputs, **options))


@pytest.mark.parametrize("options", OPTIONS)
def test_it_answers_what_torch_answers_and_becomes_torch_again(options: str) -> None:
    model = Holder(**OPTIONS[options]).eval()
    other = unfused(model).attention
    for name in ("embed_dim", "kdim", "num_heads", "head_dim", "dropout", "batch_first", "add_zero_attn"):
        assert getattr(other, name) == getattr(model.attention, name)
    for name in ("in_proj_weight", "in_proj_bias", "bias_k"):
        torch.testing.assert_close(getattr(other, name), getattr(model.attention, name), rtol=0, atol=0)
    again = fused(unfused(model))
    assert type(again.attention) is nn.MultiheadAttention
    before, after = model.state_dict(), again.state_dict()
    assert list(before) == list(after)
    assert all(map(torch.equal, before.values(), after.values()))
    assert again.attention._qkv_same_embed_dim == model.attention._qkv_same_embed_dim


def test_dropout_and_gradients() -> None:
    model = Holder(dropout=0.5).train()
    other, inputs = unfused(model), inputs_of(model.attention)
    _, weights = other(*inputs)
    assert (weights == 0).any()
    other(*inputs)[0].sum().backward()
    assert other.attention.q_proj.weight.grad is not None


class Own(nn.MultiheadAttention):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


def with_hook(attention: nn.MultiheadAttention) -> nn.MultiheadAttention:
    attention.register_forward_hook(lambda *_: None)
    return attention


@pytest.mark.parametrize("make", [lambda: Own(E, HEADS), lambda: with_hook(nn.MultiheadAttention(E, HEADS))])
def test_what_is_not_torchs_own_stays_as_it_is(make: Any) -> None:
    model = Holder()
    model.attention = make()
    assert unfused(model) is model
    with pytest.warns(UserWarning, match="no layer of this network can be factored"):
        plan = st.compress(model, st.Rank(2), example_inputs=inputs_of(model.attention)).plan
    assert all("nn.MultiheadAttention" in layer.reason for layer in plan)


def test_shared_weights_stay_as_they_are() -> None:
    model = nn.ModuleList([Holder(), Holder()])
    model[1].attention.in_proj_weight = model[0].attention.in_proj_weight
    assert unfused(model) is model


def encoder(**options: Any) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(E, HEADS, 32, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 3).eval()


SEQUENCES = torch.randn(8, LENGTH, E, generator=torch.Generator().manual_seed(2))


class TestCompressed:
    @pytest.mark.parametrize("training", [False, True])
    def test_an_encoder_at_full_rank(self, training: bool, tmp_path: Path) -> None:
        model = encoder(dropout=0.0).train(training)
        small = st.compress(model, st.Ratio(1.0), example_inputs=SEQUENCES, data=[SEQUENCES], allow_growth=True)
        assert len(small.plan.factored) == 3 * 6
        torch.testing.assert_close(small.model(SEQUENCES), model(SEQUENCES), rtol=1e-4, atol=1e-5)
        again = st.load(st.save(small.model, tmp_path / "small"), encoder(dropout=0.0)).train(training)
        assert torch.equal(again(SEQUENCES), small.model(SEQUENCES))
        merged = st.merge(small.model)
        assert set(merged.state_dict()) == set(model.state_dict())
        torch.testing.assert_close(merged(SEQUENCES), model(SEQUENCES), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("rule", [st.Budget(macs=0.7), st.Budget(params=0.7)])
    def test_a_budget_is_met_by_what_is_counted(self, rule: st.Budget, tmp_path: Path) -> None:
        model = encoder()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        small = st.compress(model, rule, example_inputs=SEQUENCES, data=[SEQUENCES, SEQUENCES.flip(0)])
        whole = st.measure(model, SEQUENCES, latency=False)
        assert small.plan.dense_cost.macs - small.plan.kept_cost.macs == whole.macs - small.measurement.macs
        assert small.plan.dense_cost.params - small.plan.kept_cost.params == whole.params - small.measurement.params
        assert any("self_attn" in layer.name for layer in small.plan.factored)
        assert all(map(torch.equal, before.values(), model.state_dict().values()))
        small.plan.save(tmp_path / "plan.json")
        again = st.compress(model, st.Plan.load(tmp_path / "plan.json"), example_inputs=SEQUENCES, data=[SEQUENCES])
        assert [layer.ranks for layer in again.plan] == [layer.ranks for layer in small.plan]

    def test_stages_one_by_one_and_in_place(self) -> None:
        model = encoder()
        analysis = st.analyze(model, SEQUENCES, calibration=st.calibrate(model, [SEQUENCES]))
        assert "activation" in analysis["layers.0.self_attn.q_proj"].problems
        weighed = st.sensitivity(model, analysis, [SEQUENCES])
        assert weighed.sensitivity["layers.1.self_attn.out_proj"]["linear"] > 0
        assert type(model.layers[0].self_attn) is nn.MultiheadAttention
        small = st.compress(model, st.Rank(3), example_inputs=SEQUENCES, analysis=analysis, inplace=True)
        assert small.model is model
        assert isinstance(model.layers[0].self_attn.q_proj, st.LowRankLinear)

    def test_attentions_without_factors_are_torchs_own(self) -> None:
        model = encoder()
        small = st.compress(model, st.Rank(3), example_inputs=SEQUENCES, include="layers.1.self_attn.[vo]*")
        assert [layer.name for layer in small.plan.factored] == [
            "layers.1.self_attn.v_proj",
            "layers.1.self_attn.out_proj",
        ]
        kinds = [type(layer.self_attn) for layer in small.model.layers]
        assert kinds == [nn.MultiheadAttention, UnfusedMultiheadAttention, nn.MultiheadAttention]

    def test_left_out_by_the_name_of_the_attention(self) -> None:
        small = st.compress(encoder(), st.Rank(3), example_inputs=SEQUENCES, exclude="*.self_attn")
        assert {layer.name.rpartition(".")[2] for layer in small.plan.factored} == {"linear1", "linear2"}
        again = st.compress(encoder(), small.plan, example_inputs=SEQUENCES)
        assert again.plan.factored == small.plan.factored

    @pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
    @pytest.mark.parametrize("include", ["layers.1.linear1", "layers.1.self_attn.q_proj", "layers.0.self_attn.k_proj"])
    def test_padding_in_an_encoder_with_some_layers_factored(self, include: str) -> None:
        model, padding = encoder(), torch.zeros(8, LENGTH, dtype=torch.bool)
        padding[2, 3:] = True
        assert model.use_nested_tensor
        small = st.compress(model, st.Ratio(1.0), example_inputs=SEQUENCES, include=include, allow_growth=True).model
        with torch.inference_mode():
            y, expected = (net(SEQUENCES, src_key_padding_mask=padding) for net in (small, model))
        torch.testing.assert_close(y[~padding], expected[~padding], rtol=1e-4, atol=1e-5)
        assert st.merge(small).use_nested_tensor

    def test_a_decoder_with_masks_of_its_memory(self) -> None:
        torch.manual_seed(0)
        model = nn.TransformerDecoder(nn.TransformerDecoderLayer(E, HEADS, 32, batch_first=True), 2).eval()
        padding = torch.zeros(8, LENGTH, dtype=torch.bool)
        padding[2, 3:] = True
        inputs = {"tgt": SEQUENCES[:, :4], "memory": SEQUENCES, "memory_key_padding_mask": padding}
        small = st.compress(model, st.Ratio(1.0), example_inputs=inputs, data=[inputs], allow_growth=True)
        assert len(small.plan.factored) == 2 * 10
        torch.testing.assert_close(small.model(**inputs), model(**inputs), rtol=1e-4, atol=1e-4)

    def test_it_exports_for_any_batch(self) -> None:
        small = st.compress(encoder(), st.Rank(3), example_inputs=SEQUENCES).model
        batch = torch.export.Dim("batch", min=2, max=64)
        exported = torch.export.export(small, (SEQUENCES,), dynamic_shapes=({0: batch},)).module()
        torch.testing.assert_close(exported(SEQUENCES[:3]), small(SEQUENCES[:3]))


@pytest.mark.parametrize("options", [each for each in OPTIONS.values() if "kdim" not in each], ids=str)
def test_every_kind_is_compressed(options: dict[str, Any]) -> None:
    attention = nn.MultiheadAttention(**{"embed_dim": E, "num_heads": HEADS, **options})

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.head = attention, nn.Linear(E, E, dtype=options.get("dtype"))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x + self.attention(x, x, x)[0])

    x = torch.randn(8, LENGTH, E, dtype=options.get("dtype"))
    model = Net().eval()
    whole = st.compress(model, st.Rank(E), example_inputs=x, allow_growth=True)
    assert {f"attention.{name}_proj" for name in ("q", "k", "v", "out")} <= {
        layer.name for layer in whole.plan.factored
    }
    with torch.no_grad():
        torch.testing.assert_close(whole.model(x), model(x), rtol=1e-4, atol=1e-5)
