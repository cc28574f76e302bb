"""Caches of decoders with narrowed heads hold narrow values, and texts are those that are written without a cache."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import spectrim as st
from spectrim.layers.caches import NarrowCache, bytes_per_token
from spectrim.layers.replacement import narrowed_at, own_bias, replace

transformers = pytest.importorskip("transformers", reason="the extra 'hf' is not installed")

IS_NEW = int(transformers.__version__.partition(".")[0]) >= 5
IDS = torch.arange(14).reshape(2, 7) + 3
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TOKENS = {"vocab_size": 24, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 23}
GROUPED = {**SIZES, **TOKENS, "num_key_value_heads": 2, "head_dim": 8}
T5_SIZES = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
NETWORKS = {
    "Llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED)),
    "Gemma2": lambda: transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(**GROUPED, sliding_window=5, query_pre_attn_scalar=8)
    ),
    "BERT": lambda: transformers.BertLMHeadModel(transformers.BertConfig(**SIZES, **TOKENS, is_decoder=True)),
    "T5": lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**(TOKENS | T5_SIZES))),
}
RANK, SIZE = 3, 8
GROUPS = {"Llama": 2, "Gemma2": 2, "BERT": 4, "T5": 4}


def dense(name: str) -> Any:
    torch.manual_seed(0)
    model = NETWORKS[name]().eval()
    with torch.no_grad():  # so that tokens differ
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.ndim > 1 else 1)
    return model


def narrowed(name: str, *, even: bool = True) -> Any:
    """The first numbers of each head of every self-attention are left: as many in all, or more in some."""
    model = dense(name)
    each = {2: (5, 1), 4: (1, 6, 2, 3)}[GROUPS[name]]
    ranks = [RANK] * len(each) if even else each
    first = [torch.eye(SIZE, dtype=torch.float64)[:rank] for rank in ranks]
    ends = {".v_proj": ".o_proj", "SelfAttention.v": "SelfAttention.o", ".self.value": ".output.dense"}
    for values, layer in list(model.named_modules()):
        for end in (end for end in ends if values.endswith(end)):
            output = values.removesuffix(end) + ends[end]
            assert layer.out_features == len(ranks) * SIZE
            heads = [rows for rows in first for _ in range(4 // len(ranks))]
            into, reading = (torch.block_diag(*rows)[None] for rows in (first, heads))
            weight = model.get_submodule(output).weight.detach().double()[None] @ reading.mT
            factors = (into, reading, weight)
            new = narrowed_at(model, output, [values], form="head_vo", rank=RANK, factors=factors, bias=own_bias)
            replace(model, new)
    return model


def hooks(model: nn.Module) -> list[NarrowCache]:
    every = (hook for module in model.modules() for hook in module._forward_pre_hooks.values())
    return [hook for hook in every if isinstance(hook, NarrowCache)]


def written(model: Any, **options: Any) -> tuple[torch.Tensor, Any]:
    """The text, and the cache after it."""
    text = model.generate(IDS, max_new_tokens=6, do_sample=False, return_dict_in_generate=True, **options)
    caches = (value for value in text.values() if hasattr(value, "get_seq_length"))
    return text.sequences, next(caches, None)


def layers(cache: Any) -> Iterator[Any]:
    return iter(getattr(cache, "self_attention_cache", cache).layers)


EVEN = pytest.mark.parametrize("even", [True, False], ids=["even", "uneven"])


@pytest.fixture(scope="module", params=[(name, even) for name in NETWORKS for even in (True, False)], ids=str)
def network(request: pytest.FixtureRequest) -> Any:
    name, even = request.param
    return narrowed(name, even=even)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_texts_are_those_without_a_cache_and_values_are_kept_narrow(network: Any, options: dict[str, int]) -> None:
    text, cache = written(network, **options)
    assert torch.equal(text, written(network, use_cache=False, **options)[0])
    assert all((part.keys.shape[-1], part.values.shape[-1]) == (SIZE, RANK) for part in layers(cache))
    assert type(cache).__module__.startswith("transformers.")


@EVEN
@pytest.mark.parametrize("name", ["Llama", "Gemma2", "T5"])
def test_caches_of_a_fixed_length(name: str, even: bool) -> None:
    network = narrowed(name, even=even)
    text, cache = written(network, cache_implementation="static")
    assert torch.equal(text, written(network, use_cache=False)[0])
    assert {part.values.shape[-1] for part in layers(cache)} == {RANK if IS_NEW else SIZE}


@EVEN
def test_copies_and_files_keep_values_narrow(tmp_path: Path, even: bool) -> None:
    network = narrowed("Llama", even=even)
    network.save_pretrained(tmp_path / "folder")
    loaded = st.load(st.save(network, tmp_path / "network.safetensors"), dense("Llama"))
    folder = type(network).from_pretrained(tmp_path / "folder")
    text = written(network)[0]
    for model in (copy.deepcopy(network), loaded, folder, st.merge(network)):
        assert torch.equal(written(model)[0], text)
        assert {part.values.shape[-1] for part in layers(written(model)[1])} == {RANK}


def test_dense_models_and_attentions_without_a_cache_have_no_hook() -> None:
    model = dense("Llama")
    st.analyze(model, IDS)
    assert not hooks(model)
    network = narrowed("Llama")
    assert len(hooks(network)) == 2
    whole = {
        name: model.get_submodule(name) for name, _ in network.named_modules() if name.endswith(("v_proj", "o_proj"))
    }
    replace(network, whole)
    assert not hooks(network)
    assert len(hooks(narrowed("T5"))) == 4  # of the encoder as well, whose attention is the same


def equal_widths(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
    """An attention that takes keys and values of one width."""
    if key.shape != value.shape:
        raise ValueError
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(module, query, key, value, mask, **options)


@EVEN
def test_attentions_that_take_no_narrow_values_get_zeros(even: bool) -> None:
    transformers.AttentionInterface.register("equal_widths", equal_widths)
    transformers.AttentionMaskInterface.register("equal_widths", transformers.masking_utils.sdpa_mask)
    network = narrowed("Llama", even=even)
    text = written(network)[0]
    network.set_attn_implementation("equal_widths")
    again, cache = written(network)
    assert torch.equal(again, text)
    assert {part.values.shape[-1] for part in layers(cache)} == {RANK}
    assert hooks(network)[0].takes_narrow == {"sdpa": True, "equal_widths": False}
    network = narrowed("BERT", even=even)  # of transformers 4 it takes one width only
    written(network)
    assert hooks(network)[0].takes_narrow == ({"sdpa": True} if IS_NEW else {"None": False})


class Whole(transformers.cache_utils.QuantizedLayer):
    """As one that keeps fewer bits in groups of numbers."""

    def _quantize(self, tensor: Any, axis: int) -> Any:
        assert tensor.shape[-1] == SIZE
        return tensor

    def _dequantize(self, tensor: Any) -> Any:
        return tensor


@EVEN
def test_caches_that_cannot_keep_narrow_values_keep_zeros(even: bool) -> None:
    network, unhooked = (narrowed("Llama", even=even) for _ in range(2))
    for module in unhooked.modules():
        module._forward_pre_hooks.clear()
    name = next(key for key, value in network(IDS).items() if hasattr(value, "get_seq_length"))
    quantised = transformers.cache_utils.Cache(layers=[Whole(residual_length=2) for _ in range(2)])
    began, own = transformers.DynamicCache(), transformers.DynamicCache()
    with torch.no_grad():
        unhooked(IDS[:, :3], **{name: began})
        expected = network(IDS).logits
        for cache, first in ((quantised, 0), (began, 3), (own, 0)):
            steps = [network(IDS[:, place, None], **{name: cache}).logits for place in range(first, 7)]
            torch.testing.assert_close(torch.cat(steps, dim=1), expected[:, first:], rtol=1e-4, atol=1e-4)
    assert [cache.layers[0].values.shape[-1] for cache in (began, own)] == [SIZE, RANK]


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
@EVEN
def test_gradients_pass_through_the_cache_and_through_checkpoints(even: bool) -> None:
    network, gradients = narrowed("Llama", even=even), []
    for how in ("without", "with", "checkpoints"):
        network.train(how == "checkpoints")
        if how == "checkpoints":
            network.gradient_checkpointing_enable({"use_reentrant": False})
        network(IDS, labels=IDS, use_cache=how != "without").loss.backward()
        gradients.append(network.model.layers[0].self_attn.v_proj.linear.weight.grad.clone())
        network.zero_grad()
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0])


@EVEN
def test_steps_are_compiled(monkeypatch: pytest.MonkeyPatch, even: bool) -> None:
    network = narrowed("Llama", even=even)
    text, layer = written(network, use_cache=False)[0], network.model.layers[0]
    monkeypatch.setattr(layer, "forward", torch.compile(layer.forward, backend="eager", fullgraph=True))
    again, cache = written(network, cache_implementation="static")
    assert torch.equal(again, text)
    assert len({part.values.shape[-1] for part in layers(cache)}) == 1


@EVEN
def test_the_forward_pass_is_exported(even: bool) -> None:
    network = narrowed("Llama", even=even)
    program = torch.export.export(network, (IDS,), {"use_cache": False}, strict=False)
    torch.testing.assert_close(program.module()(IDS, use_cache=False).logits, network(IDS).logits)


@EVEN
@pytest.mark.parametrize("name", NETWORKS)
def test_bytes_of_a_token_are_those_that_a_cache_holds(name: str, even: bool) -> None:
    small, whole = narrowed(name, even=even), dense(name)
    example = {"input_ids": IDS} | ({"decoder_input_ids": IDS[:, :5]} if name == "T5" else {})
    measured = st.measure(small, example, reference=whole, latency=False)
    _, cache = written(small, min_new_tokens=2)
    held = [tensor for part in layers(cache) for tensor in (part.keys, part.values)]
    assert measured.cache_bytes == sum(tensor.numel() * 4 // (2 * tensor.shape[2]) for tensor in held)
    assert measured.cache_bytes_ratio == (SIZE + RANK) / (2 * SIZE)
    assert "Cache of a token" in str(measured)
    assert bytes_per_token(small(**example, use_cache=False)) is None


def test_steps_are_not_tried_while_they_are_watched() -> None:
    network, seen = narrowed("Llama"), list[str]()
    handle = network.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: seen.append("pass"))
    text = network.generate(IDS, max_new_tokens=3, do_sample=False)
    assert len(seen) == 3
    assert not hooks(network)[0].takes_narrow
    handle.remove()
    assert torch.equal(network.generate(IDS, max_new_tokens=3, do_sample=False), text)
    assert hooks(network)[0].takes_narrow


@EVEN
def test_values_that_are_repeated_for_the_queries_keep_zeros_where_heads_differ(even: bool) -> None:
    ranks, cache = (3, 3) if even else (5, 1), transformers.DynamicCache()
    hook = NarrowCache(SIZE, ranks)
    (seen,), _ = hook(nn.Identity(), (cache,), {})
    values = torch.randn(1, 4, 2, SIZE)  # two for each head
    for head in range(4):
        values[:, head, :, ranks[head // 2] :] = 0
    _, read = seen.update(values, values, 0)
    assert torch.equal(read, values)
    assert cache.layers[0].values.shape[-1] == (RANK if even else SIZE)
