"""Folders of sentence-transformers: its own class reads what was compressed, and gives the same embeddings."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import spectrim as st
from spectrim.export.folders import save_folder
from spectrim.layers.factored import low_rank_layers
from spectrim.models.folders import load_pretrained
from spectrim.recipes.texts import Embedder

transformers = pytest.importorskip("transformers", reason="the extra 'hf' is not installed")
sentence_transformers = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")

TEXTS = ["1 2 3", "4 5 6 7 8 9", "10"]


@pytest.fixture(params=["", "0_Transformer"], ids=["at the root", "in a folder"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str]:
    """A folder of sentence-transformers with a tiny BERT, and where in it that is."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    root, inner = tmp_path / "dense", request.param
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    transformers.BertModel(transformers.BertConfig(vocab_size=24, **sizes)).save_pretrained(root / inner)
    words = Tokenizer(WordLevel({"[PAD]": 0, "[UNK]": 1} | {str(n): n + 2 for n in range(22)}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", model_max_length=64)
    tokenizer.save_pretrained(root / inner)
    modules = [("Transformer", inner), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")]
    listed = [
        {"idx": place, "name": str(place), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for place, (kind, path) in enumerate(modules)
    ]
    for name in ("1_Pooling", "2_Normalize"):
        (root / name).mkdir()
    pooling = {"word_embedding_dimension": 32, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
    (root / "1_Pooling/config.json").write_text(json.dumps(pooling))
    (root / "modules.json").write_text(json.dumps(listed))
    (root / inner / "sentence_bert_config.json").write_text('{"max_seq_length": 16, "do_lower_case": false}')
    return root, inner


def embeddings(model: Any) -> torch.Tensor:
    return torch.from_numpy(model.encode(TEXTS))


def read(folder: Path) -> Any:
    return sentence_transformers.SentenceTransformer(str(folder), device="cpu")


def test_its_own_class_reads_a_compressed_folder(folder: tuple[Path, str], tmp_path: Path) -> None:
    root, inner = folder
    encoded = transformers.AutoTokenizer.from_pretrained(root / inner)(TEXTS, padding=True, return_tensors="pt")
    batch = {name: encoded[name] for name in ("input_ids", "attention_mask")}
    dense = Embedder(load_pretrained(root / inner))
    small = st.compress(dense, st.Ratio(0.5), example_inputs=batch, data=[batch]).model.eval()
    if inner:  # what is written takes its place in a copy of the rest
        shutil.copytree(root, tmp_path / "small", ignore=shutil.ignore_patterns(inner))
    save_folder(small.encoder, tmp_path / "small" / inner, source=root / inner)
    again = read(tmp_path / "small")
    assert low_rank_layers(again).keys() == {f"0.model.{name}" for name in low_rank_layers(small.encoder)}
    with torch.no_grad():
        assert torch.equal(embeddings(again), small(**batch))


def test_its_own_model_is_compressed_and_saved(folder: tuple[Path, str], tmp_path: Path) -> None:
    model = read(folder[0])
    inputs = {name: value for name, value in model.preprocess(TEXTS).items() if isinstance(value, torch.Tensor)}
    small = st.compress(model, st.Ratio(0.5), example_inputs=(inputs,), data=[(inputs,)]).model
    assert low_rank_layers(small)
    small.save(str(tmp_path / "small"))
    again = read(tmp_path / "small")
    assert low_rank_layers(again).keys() == low_rank_layers(small).keys()
    assert torch.equal(embeddings(again), embeddings(small))
