"""`spectrim evaluate`: scores of a network and of another one on the same data, and mistakes in what is asked."""

import csv
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import spectrim as st
from spectrim import data

Run = Callable[..., Any]
MODULE = """
import torch
from torch import nn

def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

def words():
    torch.manual_seed(0)
    return nn.Embedding(256, 256)

class Halves(nn.Module):
    def forward(self, x):
        return x

def batches():
    torch.manual_seed(1)
    x = torch.randn(40, 4)
    return {"train": [], "test": [(x, x + torch.randn(40, 4), torch.arange(40))]}

def confidence(model, batch):
    return model(batch[0]).softmax(dim=1).amax(dim=1)
"""
DIGITS = ("--model", "mine:network", "--data", "digits")


@pytest.fixture
def mine(run: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    Path("mine.py").write_text(MODULE)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    return run


def trained() -> nn.Module:
    """One step from the untrained one."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    own = data.load("digits", split="train")
    loss = nn.functional.cross_entropy(network(own.images / 255), own.labels)
    loss.backward()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter -= parameter.grad
    return network


def test_two_networks_on_the_same_data(mine: Run) -> None:
    st.save(trained(), "trained.safetensors")
    ended = mine("evaluate", *DIGITS, "--weights", "trained.safetensors", "--against", "mine:network", "--json")
    assert ended.code == 0, ended.err
    own, other, difference = json.loads(ended.out)[0]["rows"]
    test = data.load("digits", split="test")
    accuracy = st.accuracy(trained(), [(test.images / 255, test.labels)])
    assert (own["Score"], own["Low"], own["Examples"]) == (accuracy.value, accuracy.interval.low, accuracy.total)
    assert difference["Score"] == pytest.approx(own["Score"] - other["Score"])
    assert difference["Low"] < difference["Score"] < difference["High"]


def test_every_number_goes_into_a_file(mine: Run) -> None:
    ended = mine("evaluate", *DIGITS, "--metric", "mine:confidence", "--out", "score.json")
    assert ended.code == 0, ended.err
    assert "--metric mine:confidence runs the code of that module" in ended.err
    record = json.loads(Path("score.json").read_text())
    score = st.Score.model_validate(record["score"])
    assert score.metric == "mean"
    assert score.examples == len(data.load("digits", split="test").labels)
    assert record["command"].startswith("spectrim evaluate --model mine:network")


def test_a_text(mine: Run) -> None:
    Path("text.txt").write_text("some words and others " * 40)
    text = ("--model", "mine:words", "--data", "text:text.txt", "--tokenizer", "bytes", "--tokens", 16)
    rows = []
    for whole in ((), ("--whole",)):
        ended = mine("evaluate", *text, "--metric", "perplexity", "--csv", *whole)
        assert ended.code == 0, ended.err
        rows += csv.DictReader(io.StringIO(ended.out))
    assert [int(row["Examples"]) for row in rows] == [5, 54]
    assert "runs the code" in ended.err


def test_pairs_with_gold_scores(mine: Run) -> None:
    ended = mine("evaluate", "--model", "mine:Halves", "--data", "mine:batches", "--metric", "spearman")
    assert ended.code == 0, ended.err
    assert "Spearman" in ended.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--metric", "bleu"), "accuracy, perplexity, spearman"),
        (("--metric", "mine:none"), "there is no 'none'"),
        (("--metric", "perplexity"), "give no perplexity"),
        (("--data", "text:mine.py", "--tokenizer", "bytes", "--input", 8), "of a text give --metric perplexity"),
        (("--whole",), "--whole goes with --data text:FILE"),
        (("--against", "mine:missing"), "there is no 'missing'"),
    ],
)
@pytest.mark.usefixtures("mine")
def test_a_mistake_is_one_message(refused: Run, arguments: tuple[str, ...], message: str) -> None:
    refused("evaluate", *DIGITS, *arguments, message=message)


def test_the_other_network_is_looked_at_before_any_is_scored(mine: Run) -> None:
    assert "score mine:network" in mine("evaluate", *DIGITS).err
    ended = mine("evaluate", *DIGITS, "--against", "mine:missing")
    assert ended.code
    assert "score mine:network" not in ended.err


def test_options_are_those_of_the_first_network(mine: Run) -> None:
    result = mine("evaluate", *DIGITS, "--option", "seed=1", "--against", "mine:network", "--json")
    assert result.code == 0, result.err
    own, other, difference = (float(row["Score"]) for row in json.loads(result.out)[0]["rows"])
    assert own != other
    assert difference == pytest.approx(own - other)
