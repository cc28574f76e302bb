"""Some of the architectures of `benchmarks/architectures.py`, of each package, in this very process."""

import importlib
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
architectures = importlib.import_module("architectures")
CATALOGUE = importlib.import_module("architecture_catalogue").catalogue()
ARCHITECTURE = importlib.import_module("architecture_catalogue").Architecture

QUICK = (
    *("torchvision/DenseNet", "torchvision/SwinTransformer", "torchvision/VisionTransformer"),
    *("hf/AlbertForMaskedLM", "hf/DebertaV2ForMaskedLM", "hf/GPT2LMHeadModel", "hf/MixtralForCausalLM"),
    *("hf/MambaForCausalLM", "hf/ConvNextForImageClassification", "hf/BartForConditionalGeneration"),
    *("hf/Wav2Vec2ForCTC", "hf/ASTForAudioClassification", "hf/BlipModel"),
    *("hf/T5ForConditionalGeneration", "timm/xcit", "torchvision/mnasnet0_5"),
    *("timm/cait", "timm/convit", "timm/convnext", "timm/deit", "timm/resnetv2", "timm/swin_transformer"),
    *("timm/swin_transformer_v2", "timm/twins", "timm/vision_transformer"),
)
PACKAGES = {"hf": "transformers"}


@pytest.mark.parametrize("name", QUICK)
def test_an_architecture_is_compressed_as_its_plan_promises(name: str) -> None:
    source = name.partition("/")[0]
    pytest.importorskip(PACKAGES.get(source, source))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the packages' own
        row = architectures.examine(CATALOGUE[name])
    assert row.outcome == "compressed", row.detail
    assert row.failures == ()
    assert row.factored > 0
    assert row.ratio <= row.share


def test_an_encoder_of_torch_is_compressed_as_its_plan_promises() -> None:
    def encoder() -> nn.Module:
        layer = nn.TransformerEncoderLayer(32, 4, dim_feedforward=64, batch_first=True)
        return nn.TransformerEncoder(layer, 2)

    network = ARCHITECTURE("torch", "TransformerEncoder", encoder, lambda batch: torch.randn(batch, 9, 32))
    row = architectures.examine(network)
    assert (row.outcome, row.failures) == ("compressed", ())
    assert row.factored > 0


def test_a_budget_that_is_out_of_reach_is_halved_on_the_way_to_it() -> None:
    pytest.importorskip("transformers")
    row = architectures.examine(CATALOGUE["hf/XLNetLMHeadModel"])
    assert architectures.SHARE < row.share < 1
    assert row.failures == ()


def test_rows_survive_their_file(tmp_path: Path) -> None:
    row = architectures.Row("hf/A", "refused", "ModelError: why", failures=("not finite",))
    architectures.write_rows(tmp_path / "rows.json", {row.id: row})
    assert architectures.read_rows(tmp_path / "rows.json") == {row.id: row}
    assert [table.row_count for table in architectures.tables([row])] == [2, 1, 1]
