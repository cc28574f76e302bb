"""Quantised networks: near the float32 ones, as small as their bits, and files that are whole or absent."""

import functools
import itertools
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from bfloat16 import refused_without_bfloat16
from cases import Residual, WordModel, inputs, same_state, small_cnn, small_mlp, state
from torch import Tensor, nn

import spectrim as st
from spectrim.benchmark.measurement import Accuracy
from spectrim.compression import compress
from spectrim.core.errors import DataError, DependencyError, EngineError, FileError, ModelError, RuleError
from spectrim.core.plans import Budget, Rank
from spectrim.quantization import (
    Quantized,
    QuantizedRow,
    QuantizedTable,
    Scheme,
    before,
    compare_quantized,
    onnx_accuracy,
    quantize,
)
from spectrim.quantization.evaluation import engine
from spectrim.quantization.graphs import compact, rounded, scales, weights
from spectrim.quantization.schemes import Range, Source, quantized_file
from spectrim.runtimes.timing import Comparison, Interval

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


class Attention(nn.Module):
    """One transformer block on (n, 6, 16), seeded."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.qkv, self.out = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).view(-1, 6, 3, 2, 8).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, 6, 16)
        x = x + self.out(y)
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


NETWORKS = {
    "linear": (lambda: small_mlp(dtype=torch.float32), (12,)),
    "convolutional": (lambda: small_cnn(dtype=torch.float32), (3, 12, 12)),
    "residual": (lambda: Residual().float(), (3, 10, 10)),
    "transformer": (Attention, (6, 16)),
}
LIMIT = {"int8-weights": 0.03, "int8-dynamic": 0.06, "int8-static": 0.12, "bf16": 0.02}


def images(*shape: int, seed: int = 1) -> Tensor:
    return inputs(*shape, seed=seed, dtype=torch.float32)


def run(path: Path, x: Tensor) -> np.ndarray:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]


def computed(path: Path, folder: Path) -> Counter[str]:
    """The operators that ONNX Runtime really runs."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(folder / "optimised.onnx").graph.node)


# scales


def test_scales_of_a_weight_worked_out_by_hand() -> None:
    weight = np.array([[1.27, -0.64, 0.0], [-2.54, 0.02, 1.0], [0.0, 0.0, 0.0]], dtype=np.float32)
    best = scales(weight, axis=0)
    assert best.shape == (3, 1)
    assert best[:, 0] == pytest.approx([0.01, 0.02, 1.0])
    assert rounded(weight, best).tolist() == [[127, -64, 0], [-127, 1, 50], [0, 0, 0]]


def test_channels_lie_along_the_axis_that_is_named() -> None:
    weight = np.array([[1.27, 12.7], [-0.3, 1.1]], dtype=np.float32)
    assert scales(weight, axis=1) == pytest.approx(np.array([[0.01, 0.1]]))
    assert scales(weight.T.copy(), axis=0) == pytest.approx(np.array([[0.01], [0.1]]))


def test_a_lone_large_entry_is_clipped_where_that_lowers_the_error() -> None:
    weight = np.full((1, 1001), 0.005, dtype=np.float32)
    weight[0, 0] = 1.27

    def error(scale: np.ndarray) -> float:
        return float(np.square(rounded(weight, scale) * scale - weight).sum())

    chosen, full = scales(weight, axis=0), np.array([[0.01]], dtype=np.float32)
    assert chosen < full
    assert error(chosen) < 0.96 * error(full)


@pytest.mark.parametrize(("shape", "axis"), [((7, 5), 0), ((7, 5), 1), ((4, 3, 3, 3), 0), ((3, 6, 2, 2), 1)])
def test_no_scale_of_the_search_is_better(shape: tuple[int, ...], axis: int) -> None:
    weight = np.random.default_rng(0).standard_t(3, size=shape).astype(np.float32)
    others = tuple(other for other in range(len(shape)) if other != axis)

    def errors(scale: np.ndarray) -> np.ndarray:
        return np.square(np.clip(np.rint(weight / scale), -127, 127) * scale - weight).sum(axis=others)

    full = np.abs(weight).max(axis=others, keepdims=True) / 127
    least = np.min([errors(full * clip) for clip in np.linspace(1, 0.7, 16)], axis=0)
    assert errors(scales(weight, axis=axis)) == pytest.approx(least, rel=1e-4)


# the schemes


@functools.cache
def source(network: str) -> tuple[nn.Module, Source]:
    """A network, exported once for all tests."""
    make, shape = NETWORKS[network]
    model, data = make().eval(), images(96, *shape).split(32)
    return model, Source.of(model, data[0][:2], data=data)


def quantised(network: str, scheme: Scheme, path: Path) -> Quantized:
    return quantized_file(source(network)[1], scheme, path=path)


@pytest.mark.parametrize(("network", "scheme"), list(itertools.product(NETWORKS, LIMIT)))
def test_a_quantised_network_answers_nearly_as_before(network: str, scheme: Scheme, tmp_path: Path) -> None:
    model, exported = source(network)
    before_proto = exported.proto.SerializeToString()
    file = quantised(network, scheme, tmp_path / "net.onnx")
    assert exported.proto.SerializeToString() == before_proto
    assert file.bytes == file.path.stat().st_size
    assert 0 < file.difference < LIMIT[scheme]
    x = images(5, *NETWORKS[network][1])
    with torch.no_grad():
        expected = model(x).numpy()
    assert np.abs(run(file.path, x) - expected).max() < 2 * LIMIT[scheme] * np.abs(expected).max()
    layers = sum(isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d) for module in model.modules())
    assert len(file.quantised) == layers
    assert file.float32 == ()
    stored = Counter(weight.data_type for weight in onnx.load(file.path).graph.initializer if len(weight.dims) > 1)
    assert stored[onnx.TensorProto.BFLOAT16 if scheme == "bf16" else onnx.TensorProto.INT8] == layers


def test_the_model_and_the_random_numbers_stay_as_they_are(tmp_path: Path) -> None:
    model = Residual().float().train()
    before_state, random = state(model), torch.get_rng_state()
    data = images(64, 3, 10, 10).split(16)
    file = quantize(model, data[0][:1], path=tmp_path / "net.onnx", scheme="int8-static", data=data, max_batches=2)
    assert same_state(model, before_state)
    assert model.training
    assert torch.equal(torch.get_rng_state(), random)
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]
    assert file.difference < LIMIT["int8-static"]


def test_the_difference_is_the_largest_one_to_the_network_itself(tmp_path: Path) -> None:
    model, data = source("linear")[0], images(96, 12)
    file = quantised("linear", "int8-weights", tmp_path / "net.onnx")
    with torch.no_grad():
        exact = model(data).numpy()
    assert file.difference == pytest.approx(np.abs(run(file.path, data) - exact).max() / np.abs(exact).max(), rel=1e-3)


def test_int8_weights_are_each_within_half_a_step(tmp_path: Path) -> None:
    layer = nn.Linear(40, 30)
    file = quantize(layer, torch.zeros(2, 40), path=tmp_path / "net.onnx")
    identity = torch.eye(40)
    with torch.no_grad():
        weights_in_file = run(file.path, identity) - layer.bias.numpy()
        weight = layer.weight.T.numpy()
    step = np.abs(weight).max(axis=0) / 127
    inside = np.abs(weight) < 0.69 * np.abs(weight).max(axis=0)  # beyond may be clipped
    assert (np.abs(weights_in_file - weight) <= 0.51 * step)[inside].all()


def test_int8_weights_are_float32_again_when_the_file_is_loaded(tmp_path: Path) -> None:
    file = quantised("convolutional", "int8-weights", tmp_path / "net.onnx")
    assert not computed(file.path, tmp_path).keys() & {"Cast", "Mul", "DequantizeLinear"}


def test_static_int8_computes_in_int8(tmp_path: Path) -> None:
    operators = computed(quantised("residual", "int8-static", tmp_path / "net.onnx").path, tmp_path)
    assert operators["QLinearConv"] == 4
    assert operators["QLinearAdd"] == 2
    assert not operators.keys() & {"Conv", "FusedConv"}


def test_dynamic_int8_computes_linear_layers_in_int8_and_convolutions_in_float32(tmp_path: Path) -> None:
    operators = computed(quantised("convolutional", "int8-dynamic", tmp_path / "net.onnx").path, tmp_path)
    assert operators["MatMulInteger"] + operators["DynamicQuantizeMatMul"] + operators["MatMulIntegerToFloat"] == 1
    assert "ConvInteger" not in operators


def test_a_layer_is_as_large_as_its_bits(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256))
    layers = Source.of(model, torch.zeros(2, 256), data=None)
    weight, rest = 2 * 256 * 256, 2 * 256 * 4
    sizes = [quantized_file(layers, scheme, path=tmp_path / "net.onnx").bytes for scheme in ("int8-weights", "bf16")]
    assert weight + 2 * rest < sizes[0] < weight + 2 * rest + 600  # with biases and scales
    assert 2 * weight + rest < sizes[1] < 2 * weight + rest + 500


@pytest.mark.parametrize(("weight_range", "most"), [("full", 127), ("reduced", 64)])
def test_seven_bits_use_half_of_the_range(weight_range: Range, most: int) -> None:
    graph = source("linear")[1].converted("int8-static", weight_range=weight_range).proto.graph
    stored = [
        tensor for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) > 1
    ]
    largest = [np.abs(onnx.numpy_helper.to_array(tensor).astype(int)).max() for tensor in stored]
    assert len(largest) == 3
    assert most - 1 <= max(largest) <= most


def test_an_embedding_is_quantised_by_row(tmp_path: Path) -> None:
    tokens = torch.arange(22).view(2, 11) % 11
    model = WordModel().eval()
    file = quantize(model, tokens, path=tmp_path / "net.onnx")
    shapes = {tuple(tensor.dims) for tensor in onnx.load(file.path).graph.initializer}
    assert {(11, 8), (11, 1)} <= shapes
    assert file.float32 == ()
    assert '"left":[]' in file.model_dump_json()  # the name that files of former versions have
    assert Quantized.model_validate_json(file.model_dump_json()) == file
    with torch.no_grad():
        expected = model(tokens).numpy()
    assert np.abs(run(file.path, tokens) - expected).max() < 0.03 * np.abs(expected).max()


# what is left out of the files


def test_a_compact_graph_is_the_same_function_in_fewer_bytes() -> None:
    proto, x = source("convolutional")[1].proto, images(3, 3, 12, 12)
    before_bytes = proto.SerializeToString()
    small = compact(proto)
    assert proto.SerializeToString() == before_bytes
    onnx.checker.check_model(small, full_check=True)
    assert len(small.SerializeToString()) < len(before_bytes) - 500
    for ends in ("input", "output"):
        assert [value.name for value in getattr(small.graph, ends)] == [
            value.name for value in getattr(proto.graph, ends)
        ]
    outputs = [engine(graph)({proto.graph.input[0].name: x.numpy()})[0] for graph in (proto, small)]
    assert np.array_equal(*outputs)


def test_equal_constants_are_kept_once_and_names_do_not_collide() -> None:
    helper, numpy_helper = onnx.helper, onnx.numpy_helper
    ones = np.ones((2, 2), dtype=np.float32)
    constants = [numpy_helper.from_array(ones, "long.name"), numpy_helper.from_array(ones, "same")]
    constants.append(numpy_helper.from_array(ones, "unused"))
    nodes = [
        helper.make_node("MatMul", ["0", "long.name"], ["middle"], name="node", doc_string="message"),
        helper.make_node("MatMul", ["middle", "same"], ["1"]),
    ]
    ends = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", 2]) for name in ("0", "1")]
    graph = helper.make_graph(nodes, "graph", ends[:1], ends[1:], constants)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    small = compact(proto)
    onnx.checker.check_model(small, full_check=True)
    assert len(small.graph.initializer) == 1
    session = onnxruntime.InferenceSession(small.SerializeToString(), providers=["CPUExecutionProvider"])
    assert session.run(None, {"0": np.array([[1, 2]], dtype=np.float32)})[0].tolist() == [[6, 6]]
    assert set(weights(proto)) == {"long.name", "same"}


# accuracy


@pytest.fixture(scope="module")
def chooser(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Answers with the place of the largest of the first three numbers in (n, 2, 2)."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3, bias=False)).eval()
    with torch.no_grad():
        model[1].weight.copy_(torch.eye(4)[:3])
    path = tmp_path_factory.mktemp("chooser") / "net.onnx"
    file = quantize(model, torch.zeros(1, 2, 2), path=path, test=RIGHT)
    assert file.accuracy == Accuracy(correct=3, total=4)
    return path


RIGHT = [(torch.eye(4)[:3].view(3, 2, 2), torch.tensor([0, 1, 0])), (torch.eye(4)[:1].view(1, 2, 2), torch.tensor([0]))]


def test_accuracy_counts_the_right_answers(chooser: Path) -> None:
    assert onnx_accuracy(chooser, RIGHT) == Accuracy(correct=3, total=4)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "empty"),
        ([torch.zeros(3, 2, 2)], "labels"),
        ([(torch.zeros(3, 2, 2), torch.zeros(2))], "labels float32 \\[2\\]"),
        ([(torch.zeros(3, 5), torch.zeros(3))], "batch 0"),
        ([(torch.zeros(3, 2, 2), torch.zeros(3, 2, 2), torch.zeros(3))], "2 tensors"),
    ],
)
def test_bad_data_for_an_accuracy(data: list[object], message: str, chooser: Path) -> None:
    with pytest.raises(DataError, match=message):
        onnx_accuracy(chooser, data)


def test_a_file_that_is_no_network(tmp_path: Path) -> None:
    (tmp_path / "net.onnx").write_bytes(b"no network at all")
    with pytest.raises(FileError, match="not an ONNX model"):
        onnx_accuracy(tmp_path / "net.onnx", [])
    with pytest.raises(FileError, match="cannot read"):
        onnx_accuracy(tmp_path / "none.onnx", [])


# failures


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"scheme": "int8-static"}, DataError, "pass data="),
        ({"scheme": "int8-static", "data": []}, DataError, "empty"),
        ({"scheme": "int8-static", "data": [torch.zeros(4, 13)]}, DataError, "cannot quantise"),
        ({"data": [(torch.zeros(4, 12), torch.zeros(4), torch.zeros(4))]}, DataError, "batch 0"),
        ({"scheme": "int8-statc"}, RuleError, "int8-static"),
        ({"test": []}, DataError, "empty"),
        ({"path": "net.bin"}, FileError, "ends in .onnx"),
    ],
)
def test_a_failure_leaves_the_former_file(
    options: dict[str, object], error: type[Exception], message: str, tmp_path: Path
) -> None:
    path = tmp_path / str(options.get("path", "net.onnx"))
    path.write_text("former")
    with pytest.raises(error, match=message):
        quantize(small_mlp(dtype=torch.float32), torch.zeros(2, 12), **{**options, "path": path})
    assert path.read_text() == "former"
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_network_without_float32_weights(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no float32 weights"):
        quantize(small_mlp(), torch.zeros(2, 12, dtype=torch.float64), path=tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_a_missing_package_is_named(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [module for module in sys.modules if module.split(".")[0] == package]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(DependencyError, match=rf"{package} .*spectrim\[onnx\]"):
        quantize(small_mlp(dtype=torch.float32), torch.zeros(2, 12), path=tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())


# budgets


def test_the_budget_before_quantisation_counts_the_bits() -> None:
    assert before(Budget(bytes=0.125)) == Budget(bytes=0.5)
    assert before(Budget(bytes=0.25), bits=16) == Budget(bytes=0.5)
    with pytest.raises(RuleError, match="alone"):
        before(Budget(bytes=0.3))
    with pytest.raises(RuleError, match="does not limit bytes"):
        before(Budget(macs=0.3))
    with pytest.raises(RuleError, match="1 to 32"):
        before(Budget(bytes=0.1), bits=0)


# side by side


def wide() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 192), nn.ReLU(), nn.Linear(192, 10))


def test_the_table_has_both_networks_in_every_scheme(tmp_path: Path) -> None:
    model, x = wide(), images(64, 64)
    small = compress(model, Rank(8), example_inputs=x[:1]).model
    with torch.no_grad():
        labels = model(x).argmax(1)
    table = compare_quantized(
        model, small, x[:1], folder=tmp_path, data=x.split(16), test=[(x, labels)], schemes=("int8-weights",), rounds=5
    )
    assert table.row("low rank", "int8-weights").bytes < table.row("dense", "int8-weights").bytes / 2
    assert [row.name for row in table.rows] == ["dense", "dense + int8-weights", "low rank", "low rank + int8-weights"]
    assert {row.path for row in table.rows} == set(tmp_path.iterdir())
    assert all(row.bytes == row.path.stat().st_size for row in table.rows)
    assert table.row("dense").accuracy == Accuracy(correct=64, total=64)
    assert [row.speedup is None for row in table.rows] == [True, False, False, False]
    assert all(row.latency_ms and row.latency_ms > 0 for row in table.rows)
    assert table.row("dense", "int8-weights").bytes < 0.3 * table.row("dense").bytes
    assert "low rank gains" in table.verdicts[0]
    assert QuantizedTable.model_validate_json(table.model_dump_json()) == table
    with pytest.raises(DataError, match="low rank \\+ int8-weights"):
        table.row("dense", "bf16")


def test_low_rank_that_gains_nothing_is_reported(tmp_path: Path) -> None:
    table = compare_quantized(wide(), wide(), images(2, 64), folder=tmp_path, latency=False)
    assert table.schemes == ("int8-weights", "int8-dynamic")
    assert all("quantisation alone would do" in verdict and "of the same size" in verdict for verdict in table.verdicts)


@pytest.mark.parametrize(
    ("schemes", "runtime"), [(("int8-weights", "int8-static"), "openvino"), (("bf16",), "openvino-bf16")]
)
def test_openvino_runs_the_rows_too_and_bf16_in_bfloat16(
    schemes: tuple[Scheme, ...], runtime: str, tmp_path: Path
) -> None:
    pytest.importorskip("openvino")
    model, x = wide(), images(64, 64)
    with torch.no_grad():
        labels = model(x).argmax(1)
    test = [(x, labels)]
    with refused_without_bfloat16(runtime):
        table = compare_quantized(
            *(model, wide(), x[:1]),
            folder=tmp_path,
            schemes=schemes,
            data=x.split(16),
            test=test,
            latency=False,
            runtime="openvino",
        )
        for scheme in schemes:
            row = table.row("dense", scheme)
            assert row.runtime == runtime
            assert 0 < row.difference < {"int8-weights": 0.03, "int8-static": 0.12, "bf16": 0.03}[scheme]
            assert row.accuracy is not None
            assert row.accuracy.value > 0.8


@pytest.mark.parametrize(
    ("bytes_", "ratio", "drift", "correct", "message"),
    [
        (100, 1.0, 1.0, 90, "quantisation alone would do; .* of the same size, as fast, as accurate"),
        (50, 1.0, 1.0, 88, "gains .* 2.00x smaller, as fast, 2.00 points less accurate"),
        (100, 1.5, 1.0, 90, "gains .* of the same size, 1.50x faster, as accurate"),
        (100, 0.5, 1.0, 91, "alone would do; .* 2.00x slower, 1.00 points more accurate"),
        (200, 1.5, 2.0, 90, "alone would do; .* 2.00x larger, of a speed that .* too noisy"),
    ],
)
def test_the_verdict(bytes_: int, ratio: float, drift: float, correct: int, message: str) -> None:
    width = 0.01 if ratio != 1 else 0.02
    compared = Comparison(ratio=Interval(value=ratio, low=ratio - width, high=ratio + width), drift=drift)
    shared = {"scheme": "int8-weights", "path": Path("net.onnx"), "runtime": "onnxruntime"}
    alone = QuantizedRow(network="dense", bytes=100, accuracy=Accuracy(correct=90, total=100), **shared)
    both = QuantizedRow(
        network="low rank",
        bytes=bytes_,
        accuracy=Accuracy(correct=correct, total=100),
        against_quantised=compared,
        **shared,
    )
    (verdict,) = QuantizedTable(rows=(alone, both), runtime="onnxruntime", threads=1).verdicts
    assert re.search(message, verdict), verdict


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"schemes": ()}, DataError, "empty"),
        ({"schemes": ("int8-static",)}, DataError, "pass data="),
        ({"rounds": 4}, DataError, "at least 5"),
        ({"test": iter([])}, DataError, "iterator"),
        ({"runtime": "torch"}, EngineError, "does not read ONNX"),
        ({"runtime": "onnx"}, EngineError, "unknown"),
        ({"threads": 4096}, EngineError, "4096"),
    ],
)
def test_a_failed_comparison_leaves_no_files(
    options: dict[str, object], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        compare_quantized(wide(), wide(), torch.zeros(2, 64), folder=tmp_path, **options)
    assert not list(tmp_path.iterdir())


class Masked(nn.Module):
    """Classes of words that a mask chooses."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(10, 8), nn.Linear(8, 3)

    def forward(self, words: Tensor, mask: Tensor) -> Tensor:
        return self.head((self.table(words) * mask.unsqueeze(2)).sum(dim=1))


def test_inputs_by_name_reach_the_file_by_name(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Masked().eval()
    words, mask = torch.randint(0, 10, (32, 6)), torch.randint(0, 2, (32, 6))
    labels = model(words, mask).argmax(dim=1)
    st.export_onnx(model, tmp_path / "model.onnx", {"mask": mask[:1], "words": words[:1]})
    batch = {"mask": mask, "labels": labels, "words": words}
    assert st.onnx_accuracy(tmp_path / "model.onnx", [batch]).correct == 32
    with pytest.raises(DataError, match="the batches name mask, and the file's inputs are words, mask"):
        st.onnx_accuracy(tmp_path / "model.onnx", [({"mask": mask}, labels)])
    inputs = {"mask": mask[:1], "words": words[:1]}
    done = st.quantize(model, inputs, path=tmp_path / "small.onnx", scheme="int8-weights", data=[batch], test=[batch])
    assert done.accuracy.correct >= 30
