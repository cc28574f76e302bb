"""The commands with data of one's own: image folders, arrays, texts, loaders; and networks that guess."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from spectrim import data, models
from spectrim.benchmark.measurement import Accuracy
from spectrim.cli import loading
from spectrim.cli.options import Source
from spectrim.cli.samples import Preparation, StoredData
from spectrim.data.samples import Samples

Run = Callable[..., Any]
MLP = ("--model", "spectrim:mlp", "--option", "inputs=64", "--option", "width=48", "--option", "hidden=2")
TRAINED = (*MLP, "--weights", "mlp.safetensors")
MODULE = """
import torch
from torch import nn
from spectrim import data

class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))

    def forward(self, pixel_values, scale=None):
        return {"logits": self.network(pixel_values)}

def named():
    torch.manual_seed(0)
    return Named()

def batches(split):
    own = data.load("digits", split=split)
    pairs = zip((own.images / 255).split(64), own.labels.split(64))
    return [{"pixel_values": x, "labels": y} for x, y in pairs]

def loaders():
    train = batches("train")
    return {"train": train[4:], "valid": train[:4], "test": batches("test")}

def only_train():
    return batches("train")

def wrong():
    return {"training": []}

def broken():
    raise ValueError("no disk")

def once():
    return {"train": (batch for batch in batches("train"))}

def unlabelled():
    return batches("train"), [{"pixel_values": batch["pixel_values"]} for batch in batches("test")]

class Bytes(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.hidden = nn.Embedding(256, 32), nn.Linear(32, 64)
        self.output = nn.Linear(64, 256)

    def forward(self, ids):
        return self.output(torch.relu(self.hidden(self.embedding(ids))))

def language():
    torch.manual_seed(0)
    return Bytes()
"""


def digits(split: data.access.Split) -> tuple[torch.Tensor, torch.Tensor]:
    own = data.load("digits", split=split)
    return own.images, own.labels


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    """A small network that has learnt the digits, from pixels less 0.5 over 0.25."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = models.mlp(64, width=48, hidden=2)
        optimiser = torch.optim.Adam(network.parameters(), lr=5e-3)
        images, labels = digits("train")
        for _ in range(10):
            for index in torch.randperm(len(images)).split(64):
                optimiser.zero_grad()
                inputs = (images[index] / 255 - 0.5) / 0.25
                nn.functional.cross_entropy(network(inputs), labels[index]).backward()
                optimiser.step()
    return {name: tensor.detach() for name, tensor in network.state_dict().items()}


@pytest.fixture
def run(run: Run, tmp_path: Path, weights: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> Run:
    """The command line, in a folder with a trained network, a module, and images in class folders."""
    save_file(weights, tmp_path / "mlp.safetensors")
    (tmp_path / "mine.py").write_text(MODULE)
    monkeypatch.delitem(__import__("sys").modules, "mine", raising=False)
    for split, most in (("train", 40), ("test", 20)):
        images, labels = digits(split)  # type: ignore[arg-type]
        for label in range(10):
            folder = tmp_path / "digits" / split / f"digit-{label}"
            folder.mkdir(parents=True)
            for number, image in enumerate(images[labels == label][:most]):
                Image.fromarray(image[0].numpy()).save(folder / f"{number:03}.png")
    return run


SCALE = ("--mean", 0.5, "--std", 0.25)


def test_every_command_takes_a_folder_of_images(run: Run, tmp_path: Path) -> None:
    own = (*TRAINED, "--data", "folder:digits", *SCALE)
    analysed = run("analyze", *own, "--images", 128)
    assert analysed.code == 0, analysed.err
    assert run("plan", *own, "--macs", 0.5, "--out", "plan.json").code == 0
    compressed = run("compress", *own, "--plan", "plan.json", "--out", "small")
    assert compressed.code == 0, compressed.err
    assert "on the 200 test images of folder:digits: dense 9" in compressed.out
    small = (*MLP, "--weights", "small", "--data", "folder:digits", *SCALE)
    tuned = run("finetune", *small, "--teacher-weights", "mlp.safetensors", "--epochs", 2, "--out", "tuned")
    assert tuned.code == 0, tuned.err
    record = json.loads((tmp_path / "tuned" / "measurement.json").read_text())
    assert record["held_out"][1]["total"] == 40
    assert record["after"]["accuracy"]["total"] == 200
    small = (*MLP, "--weights", "tuned", "--data", "folder:digits", *SCALE)
    quantised = run(
        "quantize", *small, "--scheme", "int8-static", "--images", 64, "--no-latency", "--out", "small.onnx"
    )
    assert quantised.code == 0, quantised.err


def test_arrays_in_a_file(run: Run) -> None:
    images, labels = digits("train")
    np.savez("digits.npz", x=images[:, 0].numpy(), y=labels.numpy())
    result = run("compress", *TRAINED, "--data", "digits.npz", *SCALE, "--macs", 0.5, "--out", "small")
    assert result.code == 0, result.err
    assert "test images of digits.npz: dense" in result.out, result.out
    assert "warning" not in result.err


def test_too_few_samples_for_a_test_split(run: Run) -> None:
    np.savez("few.npz", x=np.random.default_rng(0).normal(size=(5, 64)).astype(np.float32), y=np.arange(5))
    with pytest.warns(UserWarning, match="are 5 samples"):
        result = run("compress", *MLP, "--data", "few.npz", "--macs", 0.5, "--out", "small")
    assert "Accuracy not measured: few.npz has no test data with labels" in result.out, result.err


def test_what_the_network_takes_is_said_of_floats_too(run: Run) -> None:
    np.savez("floats.npz", x=np.random.default_rng(0).normal(size=(60, 64)).astype(np.float32), y=np.arange(60) % 10)
    plain = run("compress", *MLP, "--data", "floats.npz", "--rank", 4, "--out", "small")
    assert "takes float32 (batch, 64), as they are" in plain.out
    scaled = run("compress", *MLP, "--data", "floats.npz", *SCALE, "--rank", 4, "--out", "small")
    assert "takes float32 (batch, 64), (x - 0.5) / 0.25" in scaled.out


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.zeros((60, 64), np.uint8), "--mean and --std take one value or 64"),
        (np.zeros((60, 64), np.int64), "whole.npz has samples of int64, which are taken as they are"),
    ],
)
def test_mean_and_std_that_do_not_fit_arrays(run: Run, x: Any, message: str) -> None:
    np.savez("whole.npz", x=x, y=np.arange(60) % 10)
    scale = ("--mean", "0.1,0.2,0.3", "--std", "1,1,1")
    result = run("compress", *MLP, "--data", "whole.npz", *scale, "--rank", 4, "--out", "small")
    assert result.code != 0
    assert message in " ".join(result.err.replace("│", " ").split())


def test_other_numbers_of_classes_and_outputs_are_said_before_any_work(run: Run) -> None:
    result = run("analyze", *TRAINED, "--data", "folder:digits/train/..", "--images", 16, *SCALE)
    assert "note" not in result.err
    images, labels = digits("train")
    np.savez("eleven.npz", x=images[:, 0].numpy(), y=labels.numpy() + 1)
    result = run("analyze", *TRAINED, "--data", "eleven.npz", "--images", 16, *SCALE)
    assert (
        "note: there will be no accuracy, since eleven.npz has 11 classes (labels 0 to 10), and for one image"
        in result.err
    )
    assert result.err.index("note:") < result.err.index("calibrate")


def test_values_are_learnt_by_a_loss(run: Run, tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(256, 64)).astype(np.float32)
    np.savez("values.npz", x=x, y=x[:, :10])
    result = run("compress", *MLP, "--data", "values.npz", "--macs", 0.5, "--out", "small")
    assert "Accuracy not measured: values.npz has no class indices as labels" in result.out, result.err
    small = (*MLP, "--weights", "small", "--data", "values.npz")
    refused = run("finetune", *small, "--epochs", 1, "--out", "tuned")
    assert refused.code == 1
    assert 'loss="mse"' in refused.err
    result = run("finetune", *small, "--loss", "mse", "--epochs", 3, "--lr", 0.01, "--out", "tuned")
    assert result.code == 0, result.err
    before, after = json.loads((tmp_path / "tuned" / "measurement.json").read_text())["held_out_loss"]
    assert after < before


def test_loaders_of_a_function(run: Run, tmp_path: Path) -> None:
    own = ("--model", "mine:named", "--data", "mine:loaders")
    result = run("compress", *own, "--macs", 0.5, "--out", "small")
    assert result.code == 0, result.err
    assert "--data mine:loaders runs the code of that module" in result.err
    assert "on the 360 test samples of mine:loaders" in result.out
    tuned = run("finetune", *own, "--weights", "small", "--epochs", 2, "--out", "tuned")
    assert tuned.code == 0, tuned.err
    record = json.loads((tmp_path / "tuned" / "measurement.json").read_text())
    assert record["held_out"][1]["correct"] > record["held_out"][0]["correct"]
    without = run("compress", "--model", "mine:named", "--data", "mine:only_train", "--macs", 0.5, "--out", "other")
    assert "Accuracy not measured: mine:only_train has no test data with labels" in without.out
    without = run("compress", "--model", "mine:named", "--data", "mine:unlabelled", "--macs", 0.5, "--out", "third")
    assert "Accuracy not measured: mine:unlabelled has no test data with labels" in without.out, without.err


def test_a_text(run: Run, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("It was the best of times, it was the worst of times. " * 60)
    own = ("--model", "mine:language", "--data", "text:text.txt", "--tokenizer", "bytes", "--input", 16)
    result = run("compress", *own, "--macs", 0.5, "--out", "small")
    assert result.code == 0, result.err
    assert "takes int64 (batch, 16)" in result.out
    tuned = run("finetune", *own, "--weights", "small", "--epochs", 2, "--lr", 0.01, "--batch", 16, "--out", "tuned")
    assert tuned.code == 0, tuned.err
    before, after = json.loads((tmp_path / "tuned" / "measurement.json").read_text())["held_out_loss"]
    assert after < before


def test_wrong_preprocessing_is_said_before_any_work(run: Run) -> None:
    result = run(
        "compress", *TRAINED, "--data", "folder:digits", "--mean", -20, "--std", 9, "--rank", 4, "--out", "small"
    )
    warning = result.err[result.err.index("warning:") :]
    assert "little more than by guessing" in warning
    assert "With --mean 0.5 --std 0.5 it has" in warning
    assert result.err.index("warning:") < result.err.index("calibrate")


def test_an_expected_accuracy_that_is_missed_is_said(run: Run) -> None:
    own = ("compress", *TRAINED, "--data", "folder:digits", "--rank", 4)
    missed = run(*own, "--mean", 0.1, "--std", 0.6, "--expect", 97, "--out", "first")
    assert "and --expect says 97.00 %" in missed.err
    met = run(*own, *SCALE, "--expect", 95, "--out", "second")
    assert "warning" not in met.err


def test_another_order_of_classes_is_said(run: Run, tmp_path: Path) -> None:
    for split in ("train", "test"):  # names whose order is another one: 0, 1, 10, 2, ..
        for label in range(10):
            folder = tmp_path / "digits" / split / f"digit-{label}"
            folder.rename(folder.with_name(f"{(label + 7) % 10}"))
    result = run("compress", *TRAINED, "--data", "folder:digits", *SCALE, "--rank", 4, "--out", "small")
    assert "numbers them in another order (7 comes out as 0, 8 comes out as 1, 9 comes out as 2, ..)" in result.err


def test_a_preparation_with_which_it_still_guesses_is_not_proposed() -> None:
    class Shifted(nn.Module):
        """Never right on these images, and for one in ten by chance where they are prepared otherwise."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            label = (x.flatten(1)[:, 0] * 255).round().long() % 10
            return nn.functional.one_hot((label + (x.flatten(1).min(dim=1).values >= 0)) % 10, 10).float()

    images = torch.arange(100, dtype=torch.uint8)[:, None, None, None].expand(100, 1, 2, 2)
    labels = torch.arange(100) % 10
    samples = Samples("own", images, labels, tuple("0123456789"), "")
    own = StoredData(Source(model="own"), Preparation(), samples, lambda split: samples)
    scores, known = loading._scored(Shifted(), own.first(128))
    wrong = Accuracy(correct=0, total=100)
    text = loading._likely_cause(Shifted(), own, wrong, scores=scores, labels=known)
    assert "numbers them in another order (9 comes out as 0, 0 comes out as 1," in text


def test_only_classes_that_come_out_otherwise_are_listed(run: Run) -> None:
    images, labels = digits("train")
    order = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 9, 8])
    np.savez("swapped.npz", x=images[:, 0].numpy(), y=order[labels].numpy())
    result = run("analyze", *TRAINED, "--data", "swapped.npz", *SCALE, "--expect", 97, "--images", 64)
    assert "numbers them in another order (9 comes out as 8, 8 comes out as 9)" in result.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data", "./digits"), "write --data folder:./digits for images in class folders"),
        (("--data", "folder:nowhere"), "there is no folder nowhere"),
        (("--data", "folder:digits/train/digit-0"), "has 0 class folders"),
        (("--data", "mlp.safetensors"), "write --data text:mlp.safetensors"),
        (("--data", "nowhere.npz"), "there is no such file"),
        (("--data", "digist"), "did you mean 'digits'"),
        (("--data", "digist"), "For data of your own give folder:PATH"),
        (("--data", "./nowhere/x"), "there is no such file or folder"),
        (("--data", "mine:loader"), "there is no 'loader'"),
        (("--data", "mine:wrong"), 'return {"train": .., "valid": .., "test": ..}'),
        (("--data", "mine:broken"), "failed to make the data: ValueError: no disk"),
        (("--data", "mine:once"), "the train data of mine:once is a generator, which can be read only once"),
        (("--data", "digits", "--option", "outputs=7", "--expect", 90), "--expect: digits has 10 classes"),
        (("--data", "mine:loaders", "--mean", 0.5, "--std", 0.5), "--mean does not go with --data mine:loaders"),
        (("--data", "text:mine.py"), "needs --tokenizer"),
        (("--data", "digits", "--tokenizer", "bytes"), "--tokenizer does not go with --data digits, only with text"),
        (("--data", "folder:digits", "--data-folder", "digits"), "--data-folder does not go with --data folder:digits"),
        (("--data", "digits", "--data-folder", "nowhere"), "'nowhere' does not exist"),
        (("--expect", 90, "--input", "1,8,8"), "--expect goes with --data"),
        (("--data", "folder:digits", "--mean", "0.5,0.5,0.5", "--std", 0.5), "--mean and --std take one value"),
    ],
)
def test_a_mistake_about_the_data_is_one_message(refused: Run, arguments: tuple[Any, ...], message: str) -> None:
    refused("compress", *MLP, *arguments, "--rank", 4, "--out", "small", message=" ".join(message.split()))
