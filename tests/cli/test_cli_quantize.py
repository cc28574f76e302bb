"""`spectrim quantize` on a network that has learnt the embedded digits."""

import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner, Result

from spectrim import data, models
from spectrim.cli.app import app
from spectrim.cli.quantize import Bits
from spectrim.compression import compress
from spectrim.core.errors import FileError, SpectrimError
from spectrim.core.plans import Rank
from spectrim.layers.saving import save
from spectrim.quantization import onnx_accuracy

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

MLP = ("--model", "spectrim:mlp", "--option", "inputs=64", "--option", "width=96", "--option", "hidden=2")
SMALL = (*MLP, "--weights", "small.safetensors")
DIGITS = ("--data", "digits", "--images", "128")
Run = Callable[..., Result]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained network, dense and compressed."""
    folder = tmp_path_factory.mktemp("networks")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = models.mlp(64, width=96, hidden=2)
        optimiser = torch.optim.Adam(network.parameters(), lr=5e-3)
        dataset = data.load("digits", split="train")
        images, labels = dataset.images / 255, dataset.labels
        for _ in range(10):
            for index in torch.randperm(len(images)).split(64):
                optimiser.zero_grad()
                nn.functional.cross_entropy(network(images[index]), labels[index]).backward()
                optimiser.step()
    save_file({name: tensor.detach() for name, tensor in network.state_dict().items()}, folder / "dense.safetensors")
    batches = images[:256].split(64)
    small = compress(network, Rank(12), example_inputs=images[:1], data=batches, keep_last=True).model
    save(small, folder / "small.safetensors")
    return folder


@pytest.fixture
def run(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The command, in a folder with both networks."""
    for name in ("dense.safetensors", "small.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("SPECTRIM_DATA", str(tmp_path / "cache"))
    return lambda *arguments: CliRunner().invoke(app, ["quantize", *map(str, arguments)])


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"dense.safetensors", "small.safetensors", "cache"}


def test_four_rows_where_the_dense_weights_are_known(run: Run, tmp_path: Path) -> None:
    command = (*SMALL, "--dense-weights", "dense.safetensors", *DIGITS, "--scheme", "int8-static", "--no-latency")
    result = run(*command, "--out", "net.onnx")
    assert result.exit_code == 0, result.output
    for name in ("dense", "dense + int8-static", "low rank", "low rank + int8-static"):
        assert f"\n{name} " in result.output
    assert "int8-static: low rank gains on top of quantisation" in result.output
    assert names(tmp_path) == {"net.onnx", "net.json"}
    record = Bits.load(tmp_path / "net.json")
    assert record.quantised.bytes == (tmp_path / "net.onnx").stat().st_size
    assert record.table is not None
    assert [row.scheme for row in record.table.rows] == [None, "int8-static"] * 2
    assert record.table.row("low rank", "int8-static").bytes == record.quantised.bytes
    assert str(tmp_path) not in record.model_dump_json()
    tests = data.load("digits", split="test")
    assert onnx_accuracy(tmp_path / "net.onnx", [(tests.images / 255, tests.labels)]) == record.quantised.accuracy
    assert record.quantised.accuracy is not None
    assert record.quantised.accuracy.value > 0.8
    assert sorted(shlex.split(record.command)) == sorted(["spectrim", "quantize", *command, "--out", "net.onnx"])


def test_without_data_and_without_dense_weights(run: Run, tmp_path: Path) -> None:
    result = run(*SMALL, "--input", "64", "--out", "net.onnx")
    assert result.exit_code == 0, result.output
    assert "int8-weights" in result.output
    assert "Accuracy not measured: there is no --data." in result.output
    assert "Give --dense-weights" in result.output
    before = (tmp_path / "net.onnx").read_bytes()
    again = run(*shlex.split(Bits.load(tmp_path / "net.json").command)[2:])
    assert again.exit_code == 0, again.output
    assert (tmp_path / "net.onnx").read_bytes() == before
    (tmp_path / "net.onnx").write_bytes(b"mine")
    refused = run(*SMALL, "--input", "64", "--out", "net.onnx")
    assert isinstance(refused.exception, FileError)
    assert "not a file that this command wrote" in str(refused.exception)
    assert (tmp_path / "net.onnx").read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*SMALL, "--input", "64", "--scheme", "int8-static", "--out", "net.onnx"), "give --data"),
        ((*SMALL, "--input", "64", "--scheme", "int4", "--out", "net.onnx"), "int8-dynamic"),
        ((*SMALL, "--input", "64", "--out", "net.bin"), "ends in .onnx"),
        ((*SMALL, "--input", "64", "--runtime", "torch", "--out", "net.onnx"), "'torch' is not one of 'onnxruntime'"),
        ((*SMALL, "--input", "64", "--test", "--out", "net.onnx"), "there is no --data"),
        ((*MLP, "--weights", "none.safetensors", "--input", "64", "--out", "net.onnx"), "none.safetensors"),
        ((*SMALL, "--input", "64", "--latency-threads", "4096", "--out", "net.onnx"), "4096"),
    ],
)
def test_a_mistake_is_reported_and_nothing_is_written(
    arguments: tuple[str, ...], message: str, run: Run, tmp_path: Path
) -> None:
    result = run(*arguments)
    assert result.exit_code != 0
    text = str(result.exception) if isinstance(result.exception, SpectrimError) else " ".join(result.output.split())
    assert message in text
    assert not names(tmp_path)
