"""Folders of Hugging Face by their reference: the model comes back, and what cannot be loaded is said in one error."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import same_state, state
from tiny_llama import IDS, llama

import spectrim as st
from spectrim import errors, models
from spectrim.models.folders import other_files


def edit(folder: Path, **entries: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | entries))


@pytest.mark.parametrize("factored", [False, True])
def test_a_folder_is_a_network(tmp_path: Path, *, factored: bool) -> None:
    model = llama()
    if factored:
        model = st.compress(model, st.Ratio(0.5), example_inputs=IDS).model
    model.to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="8KB")
    again = models.resolve(f"hf:{tmp_path}")
    assert type(again) is type(model)
    assert again.dtype == torch.bfloat16
    assert not again.training
    assert same_state(again, state(model))


def test_what_else_is_in_a_folder(tmp_path: Path) -> None:
    beside = ["tokenizer.json", "1_Pooling/config.json", "modules.json"]
    others = ["config.json", "README.md", "model.safetensors", "modeling_own.py", ".gitattributes", "onnx/model.onnx"]
    for name in (*beside, *others):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    assert {str(path) for path in other_files(tmp_path)} == set(beside)


class TestRefusals:
    def refused(self, folder: Path, message: str, kind: type[Exception] = errors.FileError) -> None:
        with pytest.raises(kind, match=message):
            models.resolve(f"hf:{folder}")

    def test_what_is_no_folder_of_a_model(self, tmp_path: Path) -> None:
        self.refused(tmp_path / "none", "nothing is downloaded")
        self.refused(tmp_path, r"has no config\.json")
        (tmp_path / "0_Transformer").mkdir()
        (tmp_path / "0_Transformer/config.json").write_text("{}")
        self.refused(tmp_path, "give .*/0_Transformer, and put what is written in its place")
        (tmp_path / "config.json").write_text("{")
        self.refused(tmp_path, r"config\.json is damaged")
        (tmp_path / "config.json").write_text("{}")
        self.refused(tmp_path, "names none", errors.ModelError)

    def test_options(self, tmp_path: Path) -> None:
        with pytest.raises(errors.ModelError, match="takes no options"):
            models.resolve(f"hf:{tmp_path}", options={"layers": 2})

    def test_weights_that_are_quantised(self, tmp_path: Path) -> None:
        llama().save_pretrained(tmp_path)
        edit(tmp_path, quantization_config={"quant_method": "frobnicate"})
        self.refused(tmp_path, "quant_method in its config.json is 'frobnicate'", errors.ModelError)

    def test_code_of_its_own_is_named_and_not_run(self, tmp_path: Path) -> None:
        llama().save_pretrained(tmp_path)
        code = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
        (tmp_path / "modeling_own.py").write_text("raise SystemExit('was run')")
        edit(tmp_path, architectures=["OwnModel"], model_type="own", auto_map=code)
        self.refused(tmp_path, "AutoModelForCausalLM = modeling_own.OwnModel.*pkg.module:factory", errors.ModelError)
        edit(tmp_path, auto_map=None)
        self.refused(tmp_path, "'OwnModel', which transformers", errors.ModelError)

    def test_missing_files(self, tmp_path: Path) -> None:
        llama().save_pretrained(tmp_path, max_shard_size="8KB")
        second = sorted(tmp_path.glob("model-*"))[1]
        second.unlink()
        self.refused(tmp_path, rf"lacks 1 of its \d+ files of weights: {second.name}")
        (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"lm_head.weight": 1}}')
        self.refused(tmp_path, "index.json is damaged")
        for shard in tmp_path.glob("model*"):
            shard.unlink()
        self.refused(tmp_path, "no .safetensors file")

    def test_missing_weights(self, tmp_path: Path) -> None:
        llama().model.save_pretrained(tmp_path)
        edit(tmp_path, architectures=["LlamaForCausalLM"])
        self.refused(tmp_path, "lacks 1 of the weights of a LlamaForCausalLM.*lm_head")
        (tmp_path / "model.safetensors").write_bytes(b"cut")
        self.refused(tmp_path, "cannot be loaded as a LlamaForCausalLM")
