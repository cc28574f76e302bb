"""`spectrim export` on a network that `spectrim compress` wrote."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner, Result

import spectrim as st
from spectrim import models
from spectrim.cli import export
from spectrim.cli.app import app
from spectrim.core.errors import DependencyError, EngineError, FileError, ModelError, SpectrimError
from spectrim.export import Check, Exported, Port
from spectrim.runtimes.conversion import openvino_core
from spectrim.runtimes.timing import Interval

MLP = ("--model", "spectrim:mlp", "--option", "inputs=16", "--option", "width=24", "--option", "hidden=2")
SMALL = (*MLP, "--weights", "small", "--input", "16")
FACTORY = """
from torch import nn
class Fixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
    def forward(self, x):
        return self.layer(x) if x.shape[0] < 6 else -self.layer(x)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dense weights, and what `spectrim compress` made of them."""
    place = tmp_path_factory.mktemp("networks")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_file(models.mlp(16, width=24, hidden=2).state_dict(), place / "mlp.safetensors")
    command = ["compress", *MLP, "--input", "16", "--weights", str(place / "mlp.safetensors"), "--rank", "3"]
    result = CliRunner().invoke(app, [*command, "--out", str(place / "small")])
    assert result.exit_code == 0, result.output
    return place


@pytest.fixture(autouse=True)
def here(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    for path in folder.rglob("*.*"):
        copied = tmp_path / path.relative_to(folder)
        copied.parent.mkdir(exist_ok=True)
        copied.write_bytes(path.read_bytes())
    return tmp_path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["export", *map(str, arguments)])


def failure(*arguments: object) -> SpectrimError:
    error = run(*arguments).exception
    assert isinstance(error, SpectrimError), error
    return error


def usage_error(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    return " ".join(result.output.replace("│", " ").split())


def compressed() -> nn.Module:
    return st.load("small", models.mlp(16, width=24, hidden=2)).eval()


def answer(model: nn.Module, x: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        return model(x).numpy()


X = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))


def test_a_compressed_network_becomes_onnx() -> None:
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    result = run(*SMALL, "--out", "deep/net.onnx")
    assert result.exit_code == 0, result.output
    assert [path.name for path in Path("deep").iterdir()] == ["net.onnx"]
    session = onnxruntime.InferenceSession("deep/net.onnx", providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {session.get_inputs()[0].name: X.numpy()})
    np.testing.assert_allclose(output, answer(compressed(), X), atol=1e-4)
    text = " ".join(result.output.split())
    assert "export to onnx, and compare with torch" in text
    assert "untrained" not in text
    assert "20" in text
    assert "(batch, 16). Compared in ONNX Runtime" in text
    assert "in 4 passes of batch size 1, 3" in text
    assert "deep/net.onnx" in text
    before = Path("deep/net.onnx").read_bytes()
    assert run(*SMALL, "--out", "deep/net.onnx", "--no-check").exit_code == 0  # one of ours, so it is replaced
    assert Path("deep/net.onnx").read_bytes() == before


def test_a_dense_network_becomes_a_program() -> None:
    result = run(*MLP, "--weights", "mlp.safetensors", "--input", "4,4", "--flatten", "--out", ".", "--to", "program")
    assert result.exit_code == 0, result.output
    dense = models.mlp(16, width=24, hidden=2).eval()
    dense.load_state_dict(load_file("mlp.safetensors"))
    output = torch.export.load("model.pt2").module()(X).detach().numpy()
    np.testing.assert_allclose(output, answer(dense, X), atol=1e-5)


def test_openvino_with_padding_and_a_fixed_batch() -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("openvino")
    result = run(*SMALL, "--out", "net.xml", "--pad", "8", "--fixed-batch", "--batch", "5")
    assert result.exit_code == 0, result.output
    assert "(5, 16)" in result.output
    assert all(name in result.output for name in ("net.xml", "net.bin"))
    compiled = openvino_core().compile_model("net.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    np.testing.assert_allclose(compiled([X.numpy()])[0], answer(compressed(), X), atol=1e-4)
    assert run(*SMALL, "--out", "net.xml", "--no-check").exit_code == 0


def test_no_foreign_file_is_replaced(here: Path) -> None:
    for name in ("net.onnx", "net.pt2", "net.xml", "net.bin"):
        Path(name).write_text("mine")
        out = "net.xml" if name == "net.bin" else name
        if name == "net.bin":
            Path("net.xml").unlink()
        error = failure(*SMALL, "--out", out)
        assert isinstance(error, FileError)
        assert "is there already, and is not a file that this command wrote" in str(error)
        assert Path(name).read_text() == "mine"


def test_mistakes_are_reported_before_anything_is_loaded(here: Path) -> None:
    before = sorted(here.rglob("*"))
    assert "by its ending (.onnx .pt2 .xml); give --to" in usage_error(*SMALL, "--out", "net.bin")
    assert "'tflite' is not one of 'onnx', 'program', 'openvino'" in usage_error(
        *SMALL, "--out", "a.onnx", "--to", "tflite"
    )
    for pad in ("0", "eight", "-8", "1.5"):
        assert f"--pad {pad}: give a whole number of at least 1, or auto" in usage_error(
            *SMALL, "--out", "a.onnx", "--pad", pad
        )
    assert "go with --pad auto" in usage_error(*SMALL, "--out", "a.onnx", "--runtime", "torch")
    auto = (*SMALL, "--out", "a.onnx", "--pad", "auto")
    assert "'tensorrt' is not one of 'torch'" in usage_error(*auto, "--runtime", "tensorrt")
    assert isinstance(failure(*auto, "--runtime", "torch", "--latency-threads", "4096"), EngineError)
    program = (*SMALL, "--out", "a.pt2", "--pad", "auto")
    assert "a torch program is timed in torch" in usage_error(*program, "--runtime", "channels_last")
    assert sorted(here.rglob("*")) == before


def test_a_network_that_wants_its_batch(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(here)
    (here / "export_factory.py").write_text(FACTORY)
    asked = ("--model", "export_factory:Fixed", "--input", "4", "--batch", "8", "--out", "a.pt2")
    result = run(*asked, "--fixed-batch")
    assert result.exit_code == 0, result.output
    assert "--model export_factory:Fixed runs the code of that module" in result.output
    assert "(8, 4)" in result.output
    error = failure(*asked)
    assert isinstance(error, ModelError)
    assert "Fixed does not allow an open batch size" in str(error)
    assert "--fixed-batch" in str(error)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, here: Path) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    error = failure(*SMALL, "--out", "new/a.onnx")
    assert isinstance(error, DependencyError)
    assert not (here / "new").exists()


def test_what_padding_gained_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    brought: list[dict[str, object]] = []

    def exported(_: nn.Module, path: Path, __: torch.Tensor, **more: object) -> Exported:
        asked.append((more["pad"], more["runtime"], more["threads"]))
        path.write_text("")
        port = Port(name="x", shape=("batch", 16))
        exported_file = Exported(path=path, bytes=2048, inputs=(port,), outputs=(port,), **brought[-1])
        return exported_file.model_copy(update={"check": Check(runtime="torch", batches=(1,), difference=1e-7)})

    monkeypatch.setitem(export._WRITERS, "onnx", (exported, "onnxruntime"))
    faster, slower = (Interval(value=value, low=value - 0.05, high=value + 0.05) for value in (1.2, 0.8))
    for padding, message in (
        (
            {"padded": 8, "padding_speedup": faster},
            "Padding is kept: with it the network is 1.20x as fast (faster",
        ),
        (
            {"padding_speedup": slower},
            "Padding is not kept: with it the network is 0.80x as fast (slower",
        ),
        ({}, "Padding would change nothing"),
    ):
        brought.append(padding)
        result = run(*SMALL, "--out", "a.onnx", "--pad", "auto", "--runtime", "channels_last")
        assert result.exit_code == 0, result.output
        assert message in result.output.replace("\N{MULTIPLICATION SIGN}", "x")
        assert "2.05 kB" in result.output
        Path("a.onnx").unlink()
    assert asked == [("auto", "channels_last", 1)] * 3
