"""Exported files give what torch gives, for every kind of network, and nothing is left of a failed export."""

import copy
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import inputs, same_state, state
from torch import Tensor, nn

import spectrim as st
from spectrim import export
from spectrim.core.execution import Inputs, as_inputs, tensors
from spectrim.export import Exported, export_onnx, export_openvino, export_program
from spectrim.export.checks import Reference
from spectrim.layers.factored import low_rank_layers
from spectrim.layers.heads import HeadOutput, HeadValues
from spectrim.layers.padding import padded
from spectrim.models.networks import CifarResNet
from spectrim.runtimes.conversion import openvino_core
from spectrim.runtimes.timing import Comparison, Interval

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")


class Attention(nn.Module):
    """Token ids and a mask in, a mapping out, as language models have it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(31, 16)
        self.query, self.key, self.value, self.out = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Any]:
        x = self.embed(input_ids)
        mask = None if attention_mask is None else attention_mask[:, None, None, :].bool()
        q, k, v = (layer(x).unflatten(2, (2, 8)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        y = self.out(mixed.transpose(1, 2).flatten(2))
        return {"hidden": x + y, "pooled": (y.mean(dim=1), None)}


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.2, activation="gelu", batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 16, 3, stride=2, groups=2),
        nn.ReLU(),
        nn.ConvTranspose2d(16, 8, 3, stride=2),
        nn.Flatten(),
        nn.Linear(8 * 81, 5),
    )


@dataclass
class Case:
    make: Callable[[], nn.Module]
    example: Any
    rank: int


def image(batch: int, size: int) -> Tensor:
    return inputs(batch, 3, size, size, dtype=torch.float32)


def words(batch: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(31, (batch, 6), generator=generator)
    return {"attention_mask": (torch.arange(6) < torch.tensor([[3], [6]])[:batch]).long(), "input_ids": ids}


CASES = {
    "linear": Case(lambda: nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4)), torch.zeros(1, 12), 3),
    "convolutional": Case(convolutional, image(2, 9), 3),
    "residual": Case(lambda: CifarResNet(blocks=1, outputs=10), image(1, 16), 4),
    "encoder": Case(encoder, inputs(2, 5, 16, dtype=torch.float32), 4),
    "attention": Case(Attention, words(2), 4),
}


@pytest.fixture(scope="module")
def networks() -> dict[str, tuple[nn.Module, nn.Module]]:
    """Every network, dense and compressed."""
    pairs = {}
    for name, case in CASES.items():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            dense = case.make()
        small = st.compress(dense, st.Rank(case.rank), example_inputs=case.example, allow_growth=True).model
        assert low_rank_layers(small)
        pairs[name] = dense.eval(), small.eval()
    return pairs


@pytest.fixture(scope="module")
def graphs() -> dict[int, Any]:
    """ONNX graphs by the network's identity."""
    return {}


@pytest.fixture
def converted_once(graphs: dict[int, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every network becomes one ONNX graph for all tests with this fixture, since that takes seconds."""
    convert = export.to_onnx

    def to_onnx(model: nn.Module, example: Any, *, dynamic_batch: bool) -> Any:
        if id(model) not in graphs:
            graphs[id(model)] = convert(model, example, dynamic_batch=dynamic_batch)
        return copy.deepcopy(graphs[id(model)])

    monkeypatch.setattr(export, "to_onnx", to_onnx)


def expected(model: nn.Module, example: Any) -> list[Tensor]:
    with torch.no_grad():
        return list(tensors(model(**example) if isinstance(example, dict) else model(example)))


def close(outputs: list[Any], expected: list[Tensor]) -> None:
    assert len(outputs) == len(expected)
    for output, tensor in zip(outputs, expected, strict=True):
        limit = 1e-4 * float(tensor.abs().max())
        torch.testing.assert_close(torch.as_tensor(np.asarray(output)), tensor, rtol=0, atol=limit)


def another(example: Any) -> Any:
    """Five rows of other values, and of the same sort."""
    if isinstance(example, dict):
        picks = torch.tensor([1, 0, 1, 1, 0])
        return {name: value[picks].flip(-1) if name == "input_ids" else value[picks] for name, value in example.items()}
    return torch.randn(5, *example.shape[1:], generator=torch.Generator().manual_seed(3))


def feed(example: Any, names: list[str]) -> dict[str, Any]:
    if isinstance(example, dict):
        assert set(names) == set(example)
        return {name: example[name].numpy() for name in names}
    return {names[0]: example.numpy()}


def ran_in_onnxruntime(path: Path, example: Any) -> list[Any]:
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return list(session.run(None, feed(example, [port.name for port in session.get_inputs()])))


def ran_in_openvino(path: Path, example: Any) -> list[Any]:
    pytest.importorskip("openvino")
    compiled = openvino_core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    outputs = compiled(feed(example, [port.any_name for port in compiled.inputs]))
    return [outputs[port].copy() for port in compiled.outputs]  # the values are the request's, which ends here


@pytest.mark.usefixtures("converted_once")
@pytest.mark.parametrize("which", ["dense", "compressed"])
@pytest.mark.parametrize("name", CASES)
def test_onnx_runtime_gives_what_torch_gives(
    networks: dict[str, tuple[nn.Module, nn.Module]], name: str, which: str, tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime")
    model, example = networks[name][which == "compressed"], CASES[name].example
    before = state(model)
    exported = export_onnx(model, tmp_path / "network.onnx", example)
    assert same_state(model, before)
    assert exported.check is not None
    assert exported.check.difference <= 1e-4
    assert exported.check.batches == (
        (1, 1, 1, 3) if isinstance(example, Tensor) and len(example) == 1 else (2, 2, 2, 1, 3)
    )
    assert all(port.shape[0] == "batch" for port in (*exported.inputs, *exported.outputs))
    assert exported.bytes == exported.path.stat().st_size
    other = another(example)
    close(ran_in_onnxruntime(exported.path, other), expected(model, other))
    content = exported.path.read_bytes()
    assert str(Path(torch.__file__).parent).encode() not in content
    assert str(Path(__file__).parent).encode() not in content


@pytest.mark.usefixtures("converted_once")
@pytest.mark.parametrize("name", CASES)
def test_openvino_gives_what_torch_gives(
    networks: dict[str, tuple[nn.Module, nn.Module]], name: str, tmp_path: Path
) -> None:
    pytest.importorskip("openvino")
    model, example = networks[name][1], CASES[name].example
    exported = export_openvino(model, tmp_path / "network.xml", example)
    assert exported.check is not None
    assert exported.check.difference <= 1e-4
    assert sorted(file.name for file in tmp_path.iterdir()) == ["network.bin", "network.xml"]
    assert exported.path == tmp_path / "network.xml"
    assert exported.bytes == sum(file.stat().st_size for file in tmp_path.iterdir())
    other = another(example)
    close(ran_in_openvino(exported.path, other), expected(model, other))
    assert "f16" not in exported.path.read_text().lower()  # weights as they are


@pytest.mark.parametrize("name", CASES)
def test_the_program_gives_what_torch_gives(
    networks: dict[str, tuple[nn.Module, nn.Module]], name: str, tmp_path: Path
) -> None:
    model, example = networks[name][1], CASES[name].example
    exported = export_program(model, tmp_path / "network.pt2", example)
    assert exported.check is not None
    assert exported.check.difference <= 1e-5
    assert exported.opset is None
    assert all(port.shape[0] == "batch" for port in (*exported.inputs, *exported.outputs))
    loaded = torch.export.load(exported.path).module()
    other = another(example)
    outputs = loaded(**other) if isinstance(other, dict) else loaded(other)
    close([output.detach() for output in tensors(outputs)], expected(model, other))
    with zipfile.ZipFile(exported.path) as archive:
        content = b"".join(archive.read(name) for name in archive.namelist())
        assert not [
            name for name in archive.namelist() if "sample_inputs" in name and archive.getinfo(name).file_size > 4096
        ]
    assert str(Path(torch.__file__).parent).encode() not in content
    assert str(Path(__file__).parent).encode() not in content


@pytest.fixture(scope="module")
def small() -> nn.Module:
    """Two factored layers of rank 3."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        dense = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4))
    return st.compress(dense, st.Rank(3), example_inputs=torch.zeros(1, 12), allow_growth=True).model.eval()


X = torch.zeros(1, 12)


def test_ports_notes_and_marks(small: nn.Module, tmp_path: Path) -> None:
    import onnx

    exported = export_onnx(small, tmp_path, X, metadata={"plan": "rank 3"})
    assert exported.path == tmp_path / "model.onnx"
    assert exported.opset == 20
    assert [(port.name, port.shape) for port in exported.inputs] == [("input", ("batch", 12))]
    assert [(port.name, port.shape) for port in exported.outputs] == [("output_0", ("batch", 4))]
    proto = onnx.load(str(exported.path))
    onnx.checker.check_model(proto)
    assert proto.producer_name == "spectrim"
    assert [(opset.version, opset.domain) for opset in proto.opset_import if not opset.domain] == [(20, "")]
    assert {note.key: note.value for note in proto.metadata_props} == {"plan": "rank 3"}
    assert Exported.model_validate_json(exported.model_dump_json()) == exported
    first = exported.path.read_bytes()
    export_onnx(small, tmp_path, X, metadata={"plan": "rank 3"}, check=False)
    assert exported.path.read_bytes() == first


def test_its_own_files_are_known_again(small: nn.Module, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    exported = (
        export_onnx(small, tmp_path, X, check=False),
        export_program(small, tmp_path, X, check=False),
        export_openvino(small, tmp_path, X, check=False),
    )
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.bin", "model.onnx", "model.pt2", "model.xml"]
    assert all(result.check is None for result in exported)
    assert all(export.is_exported(path) for path in tmp_path.iterdir())
    for name in ("a.onnx", "a.xml", "a.bin", "a.pt2"):
        (tmp_path / name).write_text("something else")
        assert not export.is_exported(tmp_path / name)
    with zipfile.ZipFile(tmp_path / "b.pt2", "w") as archive:
        archive.writestr("spectrim", "")
    assert not export.is_exported(tmp_path / "b.pt2")
    assert not export.is_exported(tmp_path / "missing.xml")


class Partly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, unused: Tensor, x: Tensor) -> Tensor:
        return self.layer(x)


def test_openvino_drops_inputs_that_nothing_depends_on(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    exported = export_openvino(Partly(), tmp_path, (torch.zeros(2, 3), inputs(2, 4, dtype=torch.float32)))
    assert [port.name for port in exported.inputs] == ["x"]
    assert exported.check is not None


def test_a_fixed_batch_stays_fixed(small: nn.Module, tmp_path: Path) -> None:
    exported = export_onnx(small, tmp_path / "fixed.onnx", torch.zeros(4, 12), dynamic_batch=False)
    assert exported.inputs[0].shape == (4, 12)
    assert exported.check is not None
    assert exported.check.batches == (4, 4, 4)
    onnxruntime = pytest.importorskip("onnxruntime")
    with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument, match="Got: 5 Expected: 4"):
        ran_in_onnxruntime(exported.path, torch.zeros(5, 12))


def test_padding_at_export(small: nn.Module, tmp_path: Path) -> None:
    import onnx

    before = state(small)
    exported = export_onnx(small, tmp_path / "wide.onnx", X, pad=8)
    assert same_state(small, before)
    assert exported.padded == 8
    assert exported.padding_speedup is None
    shapes = {tuple(weight.dims) for weight in onnx.load(str(exported.path)).graph.initializer if len(weight.dims) == 2}
    assert all(8 in shape for shape in shapes)
    other = another(X)
    close(ran_in_onnxruntime(exported.path, other), expected(small, other))


@pytest.mark.parametrize(("speedup", "padding"), [(1.2, 16), (0.8, None)])
def test_padding_is_kept_where_it_measures_faster(
    small: nn.Module, tmp_path: Path, speedup: float, padding: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[str] = []

    def probed(*, runtime: str, threads: int, batch: int) -> Any:
        timed.append(f"{runtime} {threads} {batch}")
        return type("Grid", (), {"multiple": 16})

    monkeypatch.setattr(export, "probe", probed)
    ratio = Interval(value=speedup, low=speedup - 0.05, high=speedup + 0.05)
    monkeypatch.setattr(export, "timed_together", lambda *_, **__: ([], []))
    monkeypatch.setattr(export, "compare", lambda *_: Comparison(ratio=ratio, drift=1.0))
    exported = export_program(small, tmp_path / "auto.pt2", X, pad="auto")
    assert timed == ["torch 1 1"]
    assert exported.padded == padding
    assert exported.padding_speedup == ratio


def test_padding_is_probed_and_timed_for_real(small: nn.Module, tmp_path: Path) -> None:
    exported = export_onnx(small, tmp_path / "auto.onnx", X, pad="auto")
    timed = exported.padding_speedup
    assert exported.padded in (None, 8, 16, 32)
    assert (exported.padded is None) or (timed is not None and timed.low > 1)
    fits = padded(small, 32)
    again = export_onnx(fits, tmp_path / "fits.onnx", X, pad="auto", check=False)
    assert (again.padded, again.padding_speedup) == (None, None)


class Drifting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + torch.rand(1)


class Hidden(nn.Module):
    """Whose export would be wrong: what is a constant to the exporter changes with the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        exporting = torch.compiler.is_exporting() or torch.compiler.is_compiling()
        return self.layer(x) * (2 if exporting else 1)


def exports() -> list[tuple[Callable[..., Exported], str]]:
    return [(export_onnx, "a.onnx"), (export_program, "a.pt2"), (export_openvino, "a.xml")]


@pytest.mark.parametrize(("write", "name"), exports())
def test_a_check_that_fails_leaves_nothing(write: Callable[..., Exported], name: str, tmp_path: Path) -> None:
    if write is export_openvino:
        pytest.importorskip("openvino")
    model, x = Hidden(), inputs(2, 12, dtype=torch.float32)
    older = {tmp_path / name: b"older"} | ({tmp_path / "a.bin": b"weights"} if name == "a.xml" else {})
    for path, content in older.items():
        path.write_bytes(content)
    with pytest.raises(st.errors.EngineError, match=r"other outputs than torch on a batch of 2: they differ by 1 of"):
        write(model, tmp_path / name, x, tolerance=0.5)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == older


@pytest.mark.parametrize(("write", "name"), exports())
def test_heads_that_hold_different_numbers_one_of_them_all(
    write: Callable[..., Exported], name: str, tmp_path: Path
) -> None:
    if write is export_openvino:
        pytest.importorskip("openvino")
    values, output = nn.Linear(12, 7), nn.Linear(7, 12)
    heads = {"size": 4, "ranks": (4, 1, 2), "narrowed_from": (12, 12)}
    model = nn.Sequential(HeadValues(values, **heads), HeadOutput(output, **heads)).eval()
    written = write(model, tmp_path / name, torch.randn(3, 5, 12))
    assert written.check is not None
    assert written.check.difference < 1e-5


def test_a_model_that_changes_its_outputs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(st.errors.ModelError, match="not repeatable"):
        export_program(Drifting(), tmp_path / "a.pt2", X)
    assert list(tmp_path.iterdir()) == []


def test_bad_requests(small: nn.Module, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    for tolerance in (0, -1, float("nan"), float("inf")):
        with pytest.raises(st.errors.RuleError, match="tolerance="):
            export_program(small, tmp_path / "a.pt2", X, tolerance=tolerance)
    with pytest.raises(st.errors.RuleError, match="multiple=0"):
        export_program(small, tmp_path / "a.pt2", X, pad=0)
    with pytest.raises(st.errors.RuleError, match="pad='all'"):
        export_program(small, tmp_path / "a.pt2", X, pad="all")  # type: ignore[arg-type]
    with pytest.raises(st.errors.EngineError, match="unknown"):
        export_onnx(small, tmp_path / "a.onnx", X, pad="auto", runtime="tensorrt")
    with pytest.raises(st.errors.FileError, match=r"must end in \.xml"):
        export_openvino(small, tmp_path / "a.bin", X)
    with pytest.raises(st.errors.ModelError, match="no batch dimension"):
        export_program(small, tmp_path / "a.pt2", torch.tensor(1.0))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    for write, name in exports()[1:]:
        with pytest.raises(st.errors.FileError, match="cannot write"):
            write(small, tmp_path / "file" / name, X, check=False)


@pytest.mark.parametrize(
    ("package", "extra", "write"),
    [
        ("onnx", "onnx", export_onnx),
        ("onnxscript", "onnx", export_onnx),
        ("onnxruntime", "onnx", export_onnx),
        ("openvino", "openvino", export_openvino),
    ],
)
def test_a_missing_package_is_named(
    package: str,
    extra: str,
    write: Callable[..., Exported],
    small: nn.Module,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(st.errors.DependencyError, match=rf'{package} .*pip install "spectrim\[{extra}\]"'):
        write(small, tmp_path / "a.xml", X)
    assert list(tmp_path.iterdir()) == []


def test_masks_stay_masks_and_ids_stay_ids() -> None:
    seen: list[tuple[Tensor, ...]] = []

    class Seeing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, x: Tensor, ids: Tensor, mask: Tensor, bias: Tensor, scale: float) -> Tensor:
            seen.append((x, ids, mask, bias))
            return self.layer(x) * mask.sum() + ids.sum() * scale + bias.exp().sum()

    x = inputs(2, 4, dtype=torch.float32)
    ids, mask = torch.tensor([[5, 7, 9], [11, 13, 17]]), torch.tensor([[True, False], [True, True]])
    bias = torch.tensor([[0.0, -torch.inf], [0.0, 0.0]])
    example = (x, ids, mask, bias, 0.5)
    model = Seeing()

    def run(call: Inputs) -> list[Tensor]:
        with torch.no_grad():
            return [copy.deepcopy(model)(*call.args)]

    check = Reference(model, as_inputs(example), dynamic_batch=True, tolerance=1e-5).check(run, runtime="torch")
    assert check.batches == (2, 2, 2, 1, 3)
    assert {len(xs) for xs, *_ in seen} == {1, 2, 3}
    assert len({tuple(xs.flatten().tolist()) for xs, *_ in seen}) >= 5
    for _, some_ids, some_mask, some_bias in seen:
        assert set(some_ids.flatten().tolist()) <= set(ids.flatten().tolist())
        assert all(row.tolist() in mask.tolist() for row in some_mask)
        assert all(row.tolist() in bias.tolist() for row in some_bias)


def test_a_decoder_is_exported_without_its_cache(tmp_path: Path) -> None:
    tiny_llama = pytest.importorskip("tiny_llama")
    model = tiny_llama.llama()
    exported = st.export_onnx(model, tmp_path / "llama.onnx", tiny_llama.IDS)
    assert len(exported.outputs) == 1
    assert model.config.use_cache
