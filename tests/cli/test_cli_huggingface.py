"""Folders of Hugging Face on the command line: in, and out again with all that lay beside the weights."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_gguf import WORDS, write_gguf
from torch import nn

import spectrim as st
from spectrim.cli.pretrained import require_dense
from spectrim.planning import latency_budget

transformers = pytest.importorskip("transformers", reason="the extra 'hf' is not installed")

Run = Callable[..., Any]
TEXT = ("--data", "text:text.txt", "--tokens", 12, "--samples", 32, "--batch", 16)
MODEL = ("--model", "hf:dense", *TEXT)


@pytest.fixture
def folder(run: Run) -> Run:
    """A model with its tokenizer in `dense`, and a text."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=24, max_position_embeddings=32, **sizes)
    ).save_pretrained("dense")
    words = Tokenizer(WordLevel({str(number): number for number in range(24)}, unk_token="3"))
    words.pre_tokenizer = Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained("dense")
    Path("text.txt").write_text(" ".join(str(number * number % 23) for number in range(700)))
    Path("short.txt").write_text("1 2 3 " * 60)
    return run


def test_a_network_that_is_no_faster_is_written_as_it_was_again_and_again(
    folder: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    decided = latency_budget._with_measured

    def refused(best: Any, target: float, *, solved: int) -> st.Plan:
        plan = decided(best, target, solved=solved)
        return plan if plan.latency.refused else latency_budget.refused(plan, reason="it is not surely faster")

    monkeypatch.setattr(latency_budget, "_with_measured", refused)
    for _ in range(2):
        ended = folder("compress", *MODEL, "--latency", 0.99, "--rank-multiple", 4, "--out", "same")
        if "cannot be reached" in ended.err:
            return  # so small a network may have nothing that is faster here
        assert ended.code == 0, ended.err
        assert "README.md" not in ended.out
        assert "import spectrim" not in ended.out
    dense, same = (transformers.AutoModelForCausalLM.from_pretrained(name) for name in ("dense", "same"))
    assert all(torch.equal(tensor, same.state_dict()[name]) for name, tensor in dense.state_dict().items())


def test_a_folder_becomes_a_smaller_one(folder: Run) -> None:
    for _ in range(2):  # the second replaces what the first has written
        ended = folder("compress", *MODEL, "--tokenizer", "dense", "--macs", 0.8, "--out", "small")
        assert ended.code == 0, ended.err
    small = transformers.AutoModelForCausalLM.from_pretrained("small")
    measured = json.loads(Path("small/measurement.json").read_text())["compressed"]
    assert sum(parameter.numel() for parameter in small.parameters()) == measured["params"]
    assert measured["macs_ratio"] <= 0.8
    tokenizer = transformers.AutoTokenizer.from_pretrained("small")
    assert tokenizer("5 7")["input_ids"] == [5, 7]
    assert "off the dense ones" in Path("small/README.md").read_text()
    assert "model = LlamaForCausalLM.from_pretrained('small')" in ended.out

    scoring = next(line for line in ended.out.splitlines() if line.startswith("  spectrim evaluate"))
    assert "--tokens 12 --tokenizer dense" in scoring
    ended = folder(*scoring.split()[1:], "--json")
    assert ended.code == 0, ended.err
    own, dense, _ = json.loads(ended.out)[0]["rows"]
    assert own["Score"] == pytest.approx(dense["Score"], rel=0.1)

    ended = folder("analyze", "--model", "hf:small", "--tokens", 8)
    assert ended.code == 0, ended.err
    assert re.search(
        r"small was compressed already: \d+ of its layers are factored or narrowed; each stands here", ended.said
    )
    Path("once").mkdir()
    Path("once/plan.json").write_text(Path("small/plan.json").read_text() + "\n")  # of another run
    for out in ("again", "once"):
        ended = folder("compress", "--model", "hf:small", *TEXT, "--macs", 0.5, "--out", out)
        assert ended.code == 1
        assert "small was compressed already" in ended.said


@pytest.mark.parametrize(("forms", "can_be_dense"), [(["linear"], True), (["width"], False)])
def test_only_what_is_factored_alone_is_to_be_merged(forms: list[str], can_be_dense: bool) -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))
    x = torch.randn(64, 8)
    small = st.compress(dense, st.Budget(params=0.6), example_inputs=x[:1], data=[x], forms=forms).model
    with pytest.raises(st.errors.ModelError, match="was compressed already") as raised:
        require_dense(small, Path("small"))
    assert ("spectrim.merge(" in str(raised.value)) == can_be_dense
    require_dense(st.merge(small) if can_be_dense else dense, Path("small"))


def test_a_gguf_file_becomes_a_smaller_folder(run: Run) -> None:
    pytest.importorskip("gguf")
    Path("packed").mkdir()
    write_gguf(Path("packed/tiny.gguf"))
    Path("text.txt").write_text("".join(WORDS[number * number % 11] for number in range(900)))
    for _ in range(2):  # the second replaces what the first has written
        ended = run("compress", "--model", "hf:packed", *TEXT, "--macs", 0.8, "--out", "small")
        assert ended.code == 0, ended.err
    assert transformers.AutoTokenizer.from_pretrained("small")("12", add_special_tokens=False)["input_ids"] == [10]
    scoring = next(line for line in ended.out.splitlines() if line.startswith("  spectrim evaluate"))
    ended = run(*scoring.split()[1:], "--json")
    assert ended.code == 0, ended.err
    own, dense, _ = json.loads(ended.out)[0]["rows"]
    assert own["Score"] == pytest.approx(dense["Score"], rel=0.1)
    Path("small/config.json").write_text("{}")
    ended = run("compress", "--model", "hf:packed", *TEXT, "--macs", 0.8, "--out", "small")
    assert "is there already" in ended.said


def test_a_plan_is_applied(folder: Run) -> None:
    assert folder("plan", *MODEL, "--rank", 4, "--out", "plan.json").code == 0
    ended = folder("compress", *MODEL, "--plan", "plan.json", "--out", "small")
    assert ended.code == 0, ended.err
    small, dense = (
        sum(parameter.numel() for parameter in transformers.LlamaForCausalLM.from_pretrained(name).parameters())
        for name in ("small", "dense")
    )
    plan = st.Plan.load("plan.json")
    assert dense - small == plan.dense_cost.params - plan.kept_cost.params > 0


def test_a_share_of_the_body(folder: Run) -> None:
    ended = folder("plan", *MODEL, "--params", 0.7, "--of", "body", "--out", "plan.json")
    assert ended.code == 0, ended.err
    assert st.Plan.load("plan.json").rule == st.Budget(params=0.7, of="body")
    ended = folder("plan", *MODEL, "--rank", 4, "--of", "body", "--out", "rank.json")
    assert ended.code != 0
    assert "--of body goes with --macs or --params" in ended.said


def test_without_data_a_text_model_runs_on_tokens(folder: Run) -> None:
    ended = folder("analyze", "--model", "hf:dense", "--tokens", 8)
    assert ended.code == 0, ended.err
    assert "mlp.up_proj" in ended.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "hf:none", *TEXT), "there is no folder none"),
        (("--model", "./dense", *TEXT), "--model ./dense is a folder; write --model hf:./dense"),
        ((*MODEL, "--weights", "text.txt"), "the folder holds its weights"),
        ((*MODEL[:2], "--data", "text:short.txt", "--tokens", 30), "too few for 10 samples of 30"),
        ((*MODEL, "--tokenizer", "bytes"), "the tokenizer bytes gives a token 57, and the network knows 0 to 23"),
        ((*MODEL, "--option", "layers=3"), "takes no options"),
        ((*MODEL, "--tokens", 40), "--tokens 40 is longer than the texts that the model takes: 32 tokens"),
        (("--model", "hf:dense", "--tokens", 40), "give --tokens 32 or less"),
    ],
)
@pytest.mark.usefixtures("folder")
def test_a_mistake_is_one_message(refused: Run, arguments: tuple[str, ...], message: str) -> None:
    refused("compress", *arguments, "--macs", 0.8, "--out", "small", message=message)


def test_files_of_others_stay(folder: Run) -> None:
    ended = folder("compress", *MODEL, "--macs", 0.8, "--out", "dense")
    assert "which stays as it is" in ended.said
    for name in ("README.md", "config.json", "tokenizer.json"):
        other = Path("other") / name
        other.parent.mkdir(exist_ok=True)
        other.write_text("{}")
        ended = folder("compress", *MODEL, "--macs", 0.8, "--out", "other")
        assert ended.code == 1
        assert f"{other} is there already" in ended.said
        assert other.read_text() == "{}"
        other.unlink()


def test_a_folder_is_compressed_block_by_block(folder: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = folder("compress", *MODEL, "--params", 0.8, "--of", "body", "--block-by-block", "--out", "small")
    assert ended.code == 0, ended.err
    small = transformers.AutoModelForCausalLM.from_pretrained("small")
    body = sum(parameter.numel() for parameter in small.model.layers.parameters())
    plan = st.Plan.load("small/plan.json")
    assert plan.kept_cost.params + 64 == body
    assert plan.kept_cost.params <= 0.8 * plan.dense_cost.params
    assert transformers.AutoTokenizer.from_pretrained("small")("5 7")["input_ids"] == [5, 7]
    assert "model = LlamaForCausalLM.from_pretrained('small')" in ended.out
    assert "The last hidden states are" in ended.out

    from spectrim.cli import checkpoints

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "free_bytes", lambda _: 1000)
        ended = folder("compress", *MODEL, "--params", 0.9, "--out", "other")  # it does not fit twice
    assert ended.code == 0, ended.err
    assert Path("other/model-00001-of-00002.safetensors").exists()
    ended = folder("compress", *MODEL, "--params", 0.8, "--of", "body", "--block-by-block", "--out", "small")
    assert ended.code == 1
    assert "is there already" in ended.said
    for options in (("--latency", 0.5), ("--params", 0.8, "--metric", "loss"), ("--params", 0.8, "--keep-last")):
        ended = folder("compress", *MODEL, *options, "--block-by-block", "--out", "new")
        assert ended.code == 2, ended.err
        assert "--block-by-block" in ended.said
