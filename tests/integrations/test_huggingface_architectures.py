"""Architectures, compressed with data and saved: bit-equal in a fresh process, at the planned cost."""

import json
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import spectrim as st

transformers = pytest.importorskip("transformers", reason="the extra 'hf' is not installed")

pytestmark = pytest.mark.filterwarnings("ignore:.*jit.script. is deprecated:FutureWarning")  # DeBERTa in 4.57

WORDS, LENGTH, SHARE = 64, 10, 0.75
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": WORDS,
}
GROUPED = {**SIZES, **IDS, "num_key_value_heads": 2, "head_dim": 8}
IMAGES = {"image_size": 16, "patch_size": 4}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
QWEN3_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
GPT_OSS = {"num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": ["full_attention"]}
GPT2 = {"n_positions": 64, "n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": WORDS, **IDS}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4, "vocab_size": WORDS}
WHISPER = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_source_positions": 8,
    "max_target_positions": 32,
    "num_mel_bins": 16,
    "vocab_size": WORDS,
    "decoder_start_token_id": 1,
}
CLIP = {
    "text_config": {**SIZES, **IDS, "max_position_embeddings": 32},
    "vision_config": {**SIZES, **IMAGES},
    "projection_dim": 16,
}


def text(batch: int) -> dict[str, Tensor]:
    """Token numbers, padded at the end in all but the first sample."""
    ids = torch.randint(3, WORDS, (batch, LENGTH))
    mask = (torch.arange(LENGTH) < torch.randint(4, LENGTH, (batch, 1))).long()
    mask[0] = 1
    return {"input_ids": ids * mask, "attention_mask": mask}


def pairs(batch: int) -> dict[str, Tensor]:
    answer = text(batch)
    names = {"input_ids": "decoder_input_ids", "attention_mask": "decoder_attention_mask"}
    return text(batch) | {names[name]: tensor for name, tensor in answer.items()}


def sound(batch: int) -> dict[str, Tensor]:
    return {"input_features": torch.randn(batch, 16, 16), "decoder_input_ids": torch.randint(3, WORDS, (batch, 5))}


def pixels(batch: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(batch, 3, 16, 16)}


@dataclass(frozen=True)
class Network:
    """Configuration, class of the model, the class that is asked to load it, inputs, and how it writes text, if so."""

    config: str
    model: str
    auto: str
    options: Mapping[str, Any]
    inputs: Callable[[int], dict[str, Tensor]]
    prompt: tuple[str, ...] = ()
    params: float | None = None

    @property
    def rule(self) -> st.Budget | st.Ratio:
        """A budget, whose layers are weighed and fitted; where there are many layers this would take long."""
        if self.params:
            return st.Budget(params=self.params)
        return st.Budget(macs=SHARE) if self.auto in QUICK else st.Ratio(0.3)


QUICK = ("AutoModelForCausalLM", "AutoModelForImageClassification")


def _causal(name: str, options: Mapping[str, Any]) -> Network:
    model = "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM"
    return Network(f"{name}Config", model, "AutoModelForCausalLM", options, text, ("input_ids", "attention_mask"))


def _masked(name: str, options: Mapping[str, Any]) -> Network:
    return Network(f"{name}Config", f"{name}ForMaskedLM", "AutoModelForMaskedLM", options, text)


NETWORKS = {
    "BERT": _masked("Bert", SIZES),
    "GPT-2": _causal("GPT2", GPT2),
    "Llama": _causal("Llama", GROUPED),
    "Qwen3": _causal("Qwen3", GROUPED),
    "Gemma": _causal("Gemma", GROUPED),
    "Mixtral": _causal("Mixtral", GROUPED | EXPERTS),
    "Qwen3-MoE": _causal("Qwen3Moe", GROUPED | QWEN3_MOE),
    "GPT-OSS": _causal("GptOss", GROUPED | GPT_OSS),
    "T5": Network(
        "T5Config",
        "T5ForConditionalGeneration",
        "AutoModelForSeq2SeqLM",
        T5 | {"decoder_start_token_id": 0},
        pairs,
        ("input_ids", "attention_mask"),
    ),
    "Whisper": Network(
        "WhisperConfig",
        "WhisperForConditionalGeneration",
        "AutoModelForSpeechSeq2Seq",
        WHISPER | IDS,
        sound,
        ("input_features",),
    ),
    "ViT": Network(
        "ViTConfig",
        "ViTForImageClassification",
        "AutoModelForImageClassification",
        {**SIZES, **IMAGES, "num_labels": 9},
        pixels,
    ),
    "CLIP": Network("CLIPConfig", "CLIPModel", "AutoModel", CLIP, lambda batch: text(batch) | pixels(batch)),
    "DeBERTa": _masked("DebertaV2", SIZES | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}),
    "ModernBERT": _masked("ModernBert", SIZES | IDS | {"cls_token_id": 1, "sep_token_id": 2}),
}

TIED = {
    f"tied {name}": replace(
        NETWORKS[name],
        options={**NETWORKS[name].options, **options, "vocab_size": 8 * WORDS, "tie_word_embeddings": True},
        params=0.45 if name == "T5" else 0.6,  # whose queries and keys may shrink as well
    )
    for name, options in {"GPT-2": {}, "Llama": {}, "BERT": {"max_position_embeddings": 32}, "T5": {}}.items()
}
"""Of embeddings so large that nothing but these can be made small enough."""

AGAIN = """
import json, sys
from pathlib import Path

import torch

torch.set_num_threads(1)  # as here: sums of more threads are rounded otherwise
import transformers
from safetensors.torch import load_file

import spectrim

results = {}
for folder in sorted(Path(sys.argv[1]).iterdir()):
    told = json.loads((folder / "told.json").read_text())
    tensors = load_file(folder / "told.safetensors")
    # copies, since how a product is rounded may depend on the address of what is a view of a file
    inputs = {name[3:]: tensor.clone() for name, tensor in tensors.items() if name.startswith("in.")}
    model, info = getattr(transformers, told["auto"]).from_pretrained(folder, output_loading_info=True)
    with torch.no_grad():
        outputs = model(**inputs)
    outputs = outputs.logits_per_image if "logits_per_image" in outputs else outputs.logits
    found = {
        "class": type(model).__name__,
        "left over": sum(map(len, info.values())),
        "params": sum(parameter.numel() for parameter in model.parameters()),
        "factored": sum("LowRank" in type(module).__name__ for module in model.modules()),
        "equal": torch.equal(outputs, tensors["out"]),
    }
    prompt = {name: inputs[name] for name in told["prompt"]}
    for cached in (True, False) if prompt else ():
        ids = model.generate(**prompt, max_new_tokens=5, do_sample=False, use_cache=cached)
        found[f"text {cached}"] = torch.equal(ids, tensors["text"])
    results[folder.name] = found
print(json.dumps(results))
"""


def _compressed(name: str, folder: Path) -> st.Compressed:
    """Compress, save, and write beside the model what the fresh process is to find."""
    network = (NETWORKS | TIED)[name]
    torch.manual_seed(0)
    config = getattr(transformers, network.config)(**network.options)
    dense = getattr(transformers, network.model)(config).eval()
    data = [network.inputs(4) for _ in range(2)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of outputs far from those of an untrained network
        small = st.compress(dense, network.rule, example_inputs=network.inputs(2), data=data)
    small.model.save_pretrained(folder)
    inputs = network.inputs(2)
    with torch.no_grad():
        outputs = small.model(**inputs)
    tensors = {f"in.{name}": tensor for name, tensor in inputs.items()}
    tensors["out"] = outputs.logits_per_image if "logits_per_image" in outputs else outputs.logits
    if network.prompt:
        prompt = {name: inputs[name] for name in network.prompt}
        tensors["text"] = small.model.generate(**prompt, max_new_tokens=5, do_sample=False)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "told.safetensors")
    (folder / "told.json").write_text(json.dumps({"auto": network.auto, "prompt": network.prompt}))
    return small


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[st.Compressed, dict[str, Any]]]:
    """By name the compressed network, and what one fresh process says of all the folders."""
    root = tmp_path_factory.mktemp("folders")
    small = {name: _compressed(name, root / name) for name in NETWORKS | TIED}
    done = subprocess.run(
        [sys.executable, "-c", AGAIN, str(root)], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    again = json.loads(done.stdout.splitlines()[-1])
    return {name: (small[name], again[name]) for name in small}


@pytest.mark.parametrize("name", NETWORKS | TIED)
def test_a_folder_comes_back_in_a_fresh_process(results: Any, name: str) -> None:
    small, again = results[name]
    params = sum(parameter.numel() for parameter in small.model.parameters())
    factored = sum("LowRank" in type(module).__name__ for module in small.model.modules())
    narrowed = [layer for layer in small.plan if layer.unit]
    network = (NETWORKS | TIED)[name]
    texts = {f"text {cached}": True for cached in (True, False)} if network.prompt else {}
    expected = {"class": network.model, "left over": 0, "params": params, "factored": factored, "equal": True}
    assert again == expected | texts
    assert factored or narrowed


@pytest.mark.parametrize("name", NETWORKS | TIED)
def test_the_planned_cost_is_the_measured_one(results: Any, name: str) -> None:
    small, _ = results[name]
    plan, measured = small.plan, small.measurement
    for cost in ("macs", "params"):
        after, ratio = getattr(measured, cost), getattr(measured, f"{cost}_ratio")
        saved = getattr(plan.dense_cost, cost) - getattr(plan.kept_cost, cost)
        assert round(after / ratio) - after == saved
    assert plan.rule != st.Budget(macs=SHARE) or measured.macs_ratio <= SHARE


@pytest.mark.parametrize("name", TIED)
def test_an_output_layer_stays_tied_to_the_embedding(results: Any, name: str) -> None:
    small, _ = results[name]
    assert small.measurement.params_ratio <= (TIED[name].params or 0)
    output, embedding = small.model.get_output_embeddings(), small.model.get_input_embeddings()
    assert output.up.weight is embedding.down.weight
    assert output.down.weight is embedding.up.weight
    small.model.tie_weights()
    assert output.up.weight is embedding.down.weight


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3-MoE", "GPT-OSS"])
def test_experts_are_factored(results: Any, name: str) -> None:
    small, _ = results[name]
    stacks = [
        {layer.name.split(".")[-2] for layer in layers if ".experts." in layer.name}
        for layers in (small.plan, small.plan.factored)
    ]
    assert stacks[0] == {"gate_up", "down"}
    assert stacks[1]


def test_the_documentation_lists_them() -> None:
    page = (Path(__file__).parents[2] / "docs" / "transformers.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\S+) \| `(Auto\w+)` \| (yes)? ?\|$", page, re.MULTILINE)
    assert rows == [(name, network.auto, "yes" if network.prompt else "") for name, network in NETWORKS.items()]
