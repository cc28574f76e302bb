"""Folders of `save_pretrained` hold factored layers, come back bit-equal, and are refused by whoever lacks Spectrim."""

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import same_state, state
from safetensors.torch import load_file, save_file
from tiny_gguf import write_gguf
from torch import Tensor

import spectrim as st
from spectrim import errors
from spectrim.integrations import registration
from spectrim.layers.factored import is_low_rank, low_rank_layers

transformers = pytest.importorskip("transformers", reason="the extra 'hf' is not installed")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),  # PEFT calls it
    pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules:UserWarning"),
]

IDS = torch.arange(24).reshape(2, 12) % 19
SEQ2SEQ = {"input_ids": IDS, "decoder_input_ids": IDS[:, :5]}
PIXELS = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)}


def llama_config(**options: Any) -> Any:
    return transformers.LlamaConfig(
        vocab_size=24,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **options,
    )


def llama() -> Any:
    return transformers.LlamaForCausalLM(llama_config())


def bert() -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=24, num_labels=9, **sizes))


def t5() -> Any:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "tie_word_embeddings": True}
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=24, decoder_start_token_id=0, **sizes)
    )


def gpt2() -> Any:
    sizes = {"n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=24, **sizes))


def vit() -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(image_size=16, patch_size=4, num_labels=9, **sizes)
    )


NETWORKS: dict[str, tuple[Callable[[], Any], dict[str, Tensor]]] = {
    "llama": (llama, {"input_ids": IDS}),
    "bert": (bert, {"input_ids": IDS}),
    "t5": (t5, SEQ2SEQ),
    "gpt2": (gpt2, {"input_ids": IDS}),
    "vit": (vit, PIXELS),
}


@cache
def _compressed(name: str) -> Any:
    torch.manual_seed(0)
    build, example = NETWORKS[name]
    return st.compress(build().eval(), st.Rank(4), example_inputs=example).model


def compressed(name: str) -> Any:
    return copy.deepcopy(_compressed(name))


def logits(model: Any, name: str) -> Tensor:
    with torch.no_grad():
        return model.eval()(**NETWORKS[name][1]).logits


def saved_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def loaded(cls: Any, folder: Path, **options: Any) -> Any:
    """A model of whose weights none was missing, left over, or of the wrong size."""
    model, info = cls.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info.values()), info
    return model


@pytest.mark.parametrize("name", NETWORKS)
def test_a_folder_comes_back_bit_equal(tmp_path: Path, name: str) -> None:
    small = compressed(name)
    small.save_pretrained(tmp_path)
    again = loaded(type(small), tmp_path)
    described = saved_config(tmp_path)["quantization_config"]
    assert described["quant_method"] == "spectrim"
    markers = {f"{layer}.weight" for layer in described["structure"]["low_rank"]}
    assert markers <= set(load_file(tmp_path / "model.safetensors"))  # named as in the file
    assert list(low_rank_layers(again)) == list(low_rank_layers(small))
    assert same_state(again, state(small))
    assert torch.equal(logits(again, name), logits(small, name))
    again.save_pretrained(tmp_path / "again")
    assert saved_config(tmp_path / "again")["quantization_config"] == described
    assert torch.equal(logits(loaded(type(small), tmp_path / "again"), name), logits(small, name))


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_shards(tmp_path: Path, name: str) -> None:
    small = compressed(name)
    small.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert torch.equal(logits(loaded(type(small), tmp_path), name), logits(small, name))


def test_a_variant(tmp_path: Path) -> None:
    small = compressed("llama")
    small.save_pretrained(tmp_path, variant="fp32")
    assert torch.equal(logits(loaded(type(small), tmp_path, variant="fp32"), "llama"), logits(small, "llama"))


def test_an_attention_of_torch_inside(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    dense = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(image_size=16, patch_size=8, **sizes)).eval()
    small = st.compress(dense, st.Rank(4), example_inputs=PIXELS)
    assert any(layer.name.endswith("head.attention.q_proj") for layer in small.plan.factored)
    small.model.save_pretrained(tmp_path)
    again = loaded(transformers.SiglipVisionModel, tmp_path)
    with torch.no_grad():
        assert torch.equal(again(**PIXELS).pooler_output, small.model(**PIXELS).pooler_output)


def test_a_state_is_saved_in_place_of_the_weights(tmp_path: Path) -> None:
    """As with weights averaged over training."""
    small = compressed("llama")
    halved = {name: tensor / 2 for name, tensor in small.state_dict().items()}
    small.save_pretrained(tmp_path, state_dict=halved)
    again = loaded(type(small), tmp_path)
    assert all(torch.equal(tensor, halved[name]) for name, tensor in again.state_dict().items())
    small.save_pretrained(tmp_path)
    assert same_state(loaded(type(small), tmp_path), state(small))


def test_tied_embeddings_are_tied_again(tmp_path: Path) -> None:
    compressed("t5").save_pretrained(tmp_path)
    again = loaded(transformers.T5ForConditionalGeneration, tmp_path)
    assert again.lm_head.weight is again.shared.weight
    assert again.encoder.embed_tokens.weight is again.shared.weight


def test_half_precision(tmp_path: Path) -> None:
    # made in this type, since .to() would round the rotary frequencies as well
    dense = transformers.LlamaForCausalLM._from_config(llama_config(), dtype=torch.bfloat16).eval()
    small = st.compress(dense, st.Rank(4), example_inputs=NETWORKS["llama"][1]).model
    small.save_pretrained(tmp_path)
    for dtype in ("auto", torch.bfloat16):
        again = loaded(type(small), tmp_path, dtype=dtype)
        assert same_state(again, state(small))
        assert torch.equal(logits(again, "llama"), logits(small, "llama"))
    assert (
        loaded(type(small), tmp_path, dtype=torch.float64).model.layers[0].mlp.up_proj.down.weight.dtype == torch.double
    )


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"model": "cpu", "lm_head": "disk"}], ids=str)
def test_device_maps(tmp_path: Path, device_map: Any) -> None:
    pytest.importorskip("accelerate")
    small = compressed("llama")
    small.save_pretrained(tmp_path)
    again = loaded(type(small), tmp_path, device_map=device_map, offload_folder=tmp_path / "disk")
    assert torch.equal(logits(again, "llama"), logits(small, "llama"))
    if "disk" in str(device_map) and transformers.__version__ < "5":
        with pytest.raises(errors.ModelError, match="offloaded"):
            again.save_pretrained(tmp_path / "again")
        return
    again.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(loaded(type(small), tmp_path / "again"), "llama"), logits(small, "llama"))


def test_weights_lie_where_torch_puts_them(tmp_path: Path) -> None:
    """As views of the file they would not: a product with one row is rounded by the addresses of its weights."""
    small = compressed("llama")
    small.save_pretrained(tmp_path)
    again = loaded(type(small), tmp_path)
    assert all(tensor.data_ptr() % 64 == 0 for tensor in (*again.parameters(), *again.buffers()))


def test_a_pipeline_reads_the_folder(tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = WordLevel({str(number): number for number in range(24)}, unk_token="3")
    small = compressed("llama")
    small.save_pretrained(tmp_path)
    transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words)).save_pretrained(tmp_path)
    generate = transformers.pipeline("text-generation", model=str(tmp_path), device="cpu")
    answer = generate("5", max_new_tokens=4, do_sample=False, return_tensors=True)
    ids = small.generate(torch.tensor([[5]]), max_new_tokens=4, do_sample=False)[0]
    assert answer[0]["generated_token_ids"] == ids.tolist()


def test_a_loaded_model_is_an_ordinary_one(tmp_path: Path) -> None:
    compressed("llama").save_pretrained(tmp_path)
    again = loaded(transformers.LlamaForCausalLM, tmp_path)
    assert again.half().dtype == torch.float16
    smaller = st.load(st.save(again, tmp_path / "own.safetensors"), llama())
    assert same_state(smaller, state(again))
    with pytest.raises(errors.ModelError, match=r"st\.merge"):
        again.dequantize()


def test_a_loaded_model_is_compressed_again_once_it_is_dense(tmp_path: Path) -> None:
    compressed("llama").save_pretrained(tmp_path / "small")
    again = loaded(transformers.LlamaForCausalLM, tmp_path / "small")
    with pytest.raises(errors.RuleError, match=r"cannot be reached: .*already a low-rank factor; st\.merge"):
        st.compress(again, st.Budget(params=0.8), example_inputs=NETWORKS["llama"][1])
    smaller = st.compress(st.merge(again), st.Rank(2), example_inputs=NETWORKS["llama"][1]).model
    smaller.save_pretrained(tmp_path / "smaller")
    assert torch.equal(logits(loaded(type(again), tmp_path / "smaller"), "llama"), logits(smaller, "llama"))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_perplexity_is_that_of_the_models_own_loss(name: str) -> None:
    model = compressed(name)
    mask = (torch.arange(12) < torch.tensor([[12], [7]])).long()
    batch = {"input_ids": IDS, "attention_mask": mask}
    with torch.no_grad():
        loss = model(**batch, labels=IDS.masked_fill(mask == 0, -100)).loss
    assert st.evaluate(model, [batch], "perplexity").value == pytest.approx(float(loss.exp()), rel=1e-5)


def test_a_model_from_gguf_is_saved(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    write_gguf(tmp_path / "tiny.gguf")
    dense = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf")
    small = st.compress(dense, st.Ratio(0.5), example_inputs={"input_ids": IDS}).model
    small.save_pretrained(tmp_path / "small")
    again = loaded(transformers.AutoModelForCausalLM, tmp_path / "small")
    assert same_state(again, state(small))
    st.merge(small).save_pretrained(tmp_path / "merged")
    assert "quantization_config" not in saved_config(tmp_path / "merged")


class TestBodiesAndHeads:
    def test_the_body_of_a_model_with_a_head(self, tmp_path: Path) -> None:
        small = compressed("bert")
        small.save_pretrained(tmp_path)
        body = transformers.AutoModel.from_pretrained(tmp_path)
        with torch.no_grad():
            assert torch.equal(body(IDS).last_hidden_state, small.bert.eval()(IDS).last_hidden_state)

    def test_another_head_on_the_body(self, tmp_path: Path) -> None:
        small = compressed("bert")
        small.bert.save_pretrained(tmp_path)
        model, info = transformers.BertForTokenClassification.from_pretrained(tmp_path, output_loading_info=True)
        assert set(info["missing_keys"]) == {"classifier.weight", "classifier.bias"}
        assert not info["mismatched_keys"]
        with torch.no_grad():
            body = small.bert.eval()(IDS).last_hidden_state
            assert torch.equal(model.bert(IDS, token_type_ids=None).last_hidden_state, body)

    def test_an_encoder_alone(self, tmp_path: Path) -> None:
        small = compressed("t5")
        small.save_pretrained(tmp_path)
        encoder = loaded(transformers.T5EncoderModel, tmp_path)
        with torch.no_grad():
            assert torch.equal(encoder(IDS).last_hidden_state, small.encoder.eval()(IDS).last_hidden_state)

    def test_a_part_that_was_saved_leaves_the_whole_as_it_is(self, tmp_path: Path) -> None:
        small = compressed("llama")
        small.model.save_pretrained(tmp_path / "body")
        small.save_pretrained(tmp_path / "whole")
        assert torch.equal(logits(loaded(type(small), tmp_path / "whole"), "llama"), logits(small, "llama"))

    def test_a_body_that_was_compressed_alone(self, tmp_path: Path) -> None:
        whole = llama().eval()
        whole.model = st.compress(whole.model, st.Rank(4), example_inputs={"input_ids": IDS}).model
        whole.save_pretrained(tmp_path)
        assert torch.equal(logits(loaded(type(whole), tmp_path), "llama"), logits(whole, "llama"))


class TestTheStructureIsThatOfTheModel:
    def test_a_merged_model_is_an_ordinary_folder(self, tmp_path: Path) -> None:
        small = compressed("llama")
        small.save_pretrained(tmp_path / "small")  # after which the configuration speaks of factors
        for number, model in enumerate((small, loaded(type(small), tmp_path / "small"))):
            merged, folder = st.merge(model), tmp_path / str(number)
            merged.save_pretrained(folder)
            assert "quantization_config" not in saved_config(folder)
            again = loaded(type(small), folder)
            assert not low_rank_layers(again)
            assert torch.equal(logits(again, "llama"), logits(merged, "llama"))

    def test_a_merged_model_with_biases_that_others_would_leave_out_is_refused(self, tmp_path: Path) -> None:
        model, example = llama().eval(), NETWORKS["llama"][1]
        small = st.compress(model, st.Rank(4), example_inputs=example, data=[example]).model
        merged = st.merge(small)
        with pytest.raises(errors.ModelError, match=r"q_proj has got a bias, .*before it is merged"):
            merged.save_pretrained(tmp_path / "merged")
        again = st.load(st.save(merged, tmp_path / "merged.safetensors"), model)
        assert torch.equal(logits(again, "llama"), logits(merged, "llama"))

    @pytest.mark.parametrize("form", ["width", "head_vo"])
    def test_narrowed_layers_come_back_and_are_refused_by_others(self, tmp_path: Path, form: str) -> None:
        model, example = llama().eval(), NETWORKS["llama"][1]
        batches = [{**example, "input_ids": IDS.roll(turn, 1)} for turn in range(4)]
        budget = st.Budget(params=0.6 if form == "width" else 0.9, of="body")
        only = "*mlp*" if form == "width" else ["*v_proj", "*o_proj"]
        small = st.compress(model, budget, example_inputs=example, data=batches, forms=form, include=only)
        assert {layer.form for layer in small.plan if layer.unit} == {form}
        small.model.save_pretrained(tmp_path)
        again = loaded(type(model), tmp_path)
        assert torch.equal(logits(again, "llama"), logits(small.model, "llama"))
        assert torch.equal(again.generate(IDS, max_new_tokens=4), small.model.generate(IDS, max_new_tokens=4))
        assert again.num_parameters() == small.measurement.params
        config = saved_config(tmp_path)
        del config["quantization_config"]
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(RuntimeError, match="mismatched"):
            loaded(type(model), tmp_path)

    def test_a_new_model_of_a_loaded_configuration(self, tmp_path: Path) -> None:
        compressed("llama").save_pretrained(tmp_path)
        config = transformers.AutoConfig.from_pretrained(tmp_path)
        transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "new")
        assert "quantization_config" not in saved_config(tmp_path / "new")

    def test_a_layer_that_was_exchanged_afterwards(self, tmp_path: Path) -> None:
        small = compressed("llama")
        small.save_pretrained(tmp_path)
        small.model.layers[0].mlp.up_proj = st.merge(small).model.layers[0].mlp.up_proj
        small.save_pretrained(tmp_path)
        again = loaded(type(small), tmp_path)
        assert not is_low_rank(again.model.layers[0].mlp.up_proj)
        assert torch.equal(logits(again, "llama"), logits(small, "llama"))

    def test_a_dense_model_is_left_alone(self, tmp_path: Path) -> None:
        model = llama()
        assert not hasattr(model, "hf_quantizer")
        model.save_pretrained(tmp_path)
        assert "quantization_config" not in saved_config(tmp_path)


class TestRefusals:
    def test_layers_that_share_factors(self, tmp_path: Path) -> None:
        small = compressed("llama")
        first, second = small.model.layers
        second.mlp.up_proj.down.weight = first.mlp.up_proj.down.weight
        with pytest.raises(errors.ModelError, match=r"mlp\.up_proj.* are one, .*st\.save"):
            small.save_pretrained(tmp_path / "tensor")
        second.mlp.up_proj = first.mlp.up_proj
        with pytest.raises(errors.ModelError, match=r"mlp\.up_proj.* are one, .*st\.merge"):
            small.save_pretrained(tmp_path / "layer")
        assert not list(tmp_path.rglob("*.json"))

    def test_a_folder_for_another_network(self, tmp_path: Path) -> None:
        compressed("llama").save_pretrained(tmp_path)
        config = transformers.AutoConfig.from_pretrained(tmp_path, num_hidden_layers=1)
        with pytest.raises(errors.FileError, match=r"for another network: .*layers\.1"):
            transformers.LlamaForCausalLM.from_pretrained(tmp_path, config=config)

    def test_a_damaged_structure(self, tmp_path: Path) -> None:
        compressed("llama").save_pretrained(tmp_path)
        config = saved_config(tmp_path)
        config["quantization_config"]["structure"]["low_rank"]["lm_head"]["form"] = "round"
        (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
        with pytest.raises(errors.FileError, match=r"quantization_config of .*lm_head\.form: .*round"):
            transformers.LlamaForCausalLM.from_pretrained(tmp_path)

    def test_dense_weights_under_a_factored_structure(self, tmp_path: Path) -> None:
        small = compressed("llama")
        small.save_pretrained(tmp_path)
        save_file(st.merge(small).state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(errors.FileError, match="delete quantization_config"):
            transformers.LlamaForCausalLM.from_pretrained(tmp_path)

    def test_a_factor_that_is_missing(self, tmp_path: Path) -> None:
        compressed("llama").save_pretrained(tmp_path)
        weights = load_file(tmp_path / "model.safetensors")
        del weights["model.layers.0.mlp.up_proj.up.weight"]
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(errors.FileError, match=r"layers\.0\.mlp\.up_proj\.up\.weight is not in"):
            transformers.LlamaForCausalLM.from_pretrained(tmp_path)

    def test_a_structure_for_dense_weights(self, tmp_path: Path) -> None:
        from spectrim.integrations.huggingface import FactoredConfig

        llama().save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="spectrim does require the model to be pre-quantized"):
            transformers.LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=FactoredConfig({}))

    def test_tensor_parallelism(self, tmp_path: Path) -> None:
        compressed("llama").save_pretrained(tmp_path)
        config = transformers.AutoConfig.from_pretrained(tmp_path)
        config.distributed_config = object()  # as from_pretrained sets it where there are several processes
        with pytest.raises(errors.ModelError, match="not split over devices"):
            transformers.LlamaForCausalLM.from_pretrained(tmp_path, config=config)

    def test_transformers_that_cannot_be_told(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from transformers.quantizers.base import HfQuantizer

        small = compressed("llama")
        monkeypatch.delattr(HfQuantizer, "get_state_dict_and_metadata")
        with pytest.raises(errors.ModelError, match=r"this version of transformers.*st\.save"):
            small.save_pretrained(tmp_path)


def test_transformers_that_are_too_old_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "spectrim.integrations.huggingface", None)
    with pytest.warns(UserWarning, match=r"too old.*st\.save"):
        registration.register()


class TestPeft:
    def test_an_adapter_on_top_is_trained_and_comes_back(self, tmp_path: Path) -> None:
        peft = pytest.importorskip("peft")
        compressed("llama").save_pretrained(tmp_path / "small")
        small, again = (loaded(transformers.LlamaForCausalLM, tmp_path / "small") for _ in range(2))
        model = peft.get_peft_model(small, peft.LoraConfig(target_modules=["up"], r=2, task_type="CAUSAL_LM"))
        before = logits(model, "llama")
        optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=1.0)
        for _ in range(2):  # the first step moves only the half of the adapter that begins at zero
            model(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
        tuned = logits(model, "llama")
        assert not torch.equal(tuned, before)
        model.save_pretrained(tmp_path / "adapter")
        assert torch.equal(logits(peft.PeftModel.from_pretrained(again, tmp_path / "adapter"), "llama"), tuned)

        for save in (model.base_model.model.save_pretrained, lambda path: st.save(model, path / "model.safetensors")):
            with pytest.raises(errors.ModelError, match="merge adapters first"):
                save(tmp_path / "injected")
        merged = model.merge_and_unload()
        merged.save_pretrained(tmp_path / "merged")
        again = loaded(transformers.LlamaForCausalLM, tmp_path / "merged")
        assert torch.equal(logits(again, "llama"), logits(merged, "llama"))


def test_a_trainer_trains_and_saves(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    compressed("llama").save_pretrained(tmp_path / "small")
    model = loaded(transformers.LlamaForCausalLM, tmp_path / "small")
    before = logits(model, "llama")
    options = {"max_steps": 2, "learning_rate": 1e-2, "report_to": "none", "disable_tqdm": True, "use_cpu": True}
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(tmp_path / "runs", save_steps=1, **options),
        train_dataset=[{"input_ids": row, "labels": row} for row in IDS],
    )
    trainer.train()
    trainer.save_model(tmp_path / "tuned")
    again = loaded(transformers.LlamaForCausalLM, tmp_path / "tuned")
    assert torch.equal(logits(again, "llama"), logits(model, "llama"))
    assert not torch.equal(logits(again, "llama"), before)
    trainer.train(resume_from_checkpoint=str(tmp_path / "runs" / "checkpoint-1"))
    assert torch.allclose(logits(model, "llama"), logits(again, "llama"), atol=1e-5)


PLAIN = """
import json, sys
import torch
from transformers import (AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, BertModel,
                          GPT2LMHeadModel, LlamaForCausalLM, LlamaModel, T5EncoderModel, T5ForConditionalGeneration,
                          ViTModel, pipeline)

folder = sys.argv[1]
load = lambda cls, name, **options: cls.from_pretrained(f"{folder}/{name}", **options)

def forget_config(name):
    config = json.load(open(f"{folder}/{name}/config.json"))
    del config["quantization_config"]
    json.dump(config, open(f"{folder}/{name}/config.json", "w"))
    return load(AutoModel, name)

def from_disk(name):
    places = {"model": "disk", "lm_head": "disk"}
    model = load(LlamaForCausalLM, name, device_map=places, offload_folder=folder + "/disk")
    return model(torch.zeros(1, 4, dtype=torch.long))

attempts = {
    "the class": lambda: load(LlamaForCausalLM, "llama"),
    "the body": lambda: load(AutoModel, "llama"),
    "another head": lambda: load(AutoModelForSequenceClassification, "llama"),
    "a head on a body": lambda: load(LlamaForCausalLM, "body"),
    "a body": lambda: load(LlamaModel, "body"),
    "half precision": lambda: load(AutoModelForCausalLM, "llama", dtype="bfloat16", device_map="cpu"),
    "disk": lambda: from_disk("llama"),
    "pipeline": lambda: pipeline("text-generation", model=f"{folder}/llama"),
    "bert": lambda: load(BertModel, "bert"),
    "shards": lambda: load(T5ForConditionalGeneration, "t5"),
    "an encoder": lambda: load(T5EncoderModel, "t5"),
    "transposed": lambda: load(GPT2LMHeadModel, "gpt2"),
    "vit": lambda: load(ViTModel, "vit"),
    "no quantization_config": lambda: forget_config("vit"),
}
for name, attempt in attempts.items():
    try:
        attempt()
    except (RuntimeError, ValueError) as error:
        print(name, type(error).__name__)
    else:
        sys.exit(f"{name}: loaded")
assert "spectrim" not in sys.modules

import spectrim  # after transformers

assert any("LowRank" in type(module).__name__ for module in load(AutoModel, "llama").modules())
"""


def test_without_spectrim_a_folder_is_refused_and_with_it_loaded(tmp_path: Path) -> None:
    for name in NETWORKS:
        compressed(name).save_pretrained(tmp_path / name, max_shard_size="8KB" if name == "t5" else "1GB")
    compressed("llama").model.save_pretrained(tmp_path / "body")
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, str(tmp_path)], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.splitlines()) == 14, done.stdout
