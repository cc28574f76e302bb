"""Programs, ONNX and OpenVINO models of any module and inputs; and refusals that name the module."""

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cases import same_state, state
from torch import Tensor, library, nn

import spectrim as st
from spectrim.core.errors import DependencyError, ModelError
from spectrim.runtimes import conversion
from spectrim.runtimes.conversion import graph_inputs, openvino_core, to_onnx, to_openvino, to_program

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")


class Many(nn.Module):
    """Several inputs and outputs, one of them unused, one an input itself, and a name that is given twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(
        self,
        a: Tensor,
        pair: tuple[Tensor, Tensor],
        mask: Tensor | None = None,
        *,
        twice: bool = False,
        unused: Any = 0,
    ) -> dict[str, Any]:
        y = self.layer(a) + pair[0].sum(dim=1, keepdim=True) * (2 if twice else 1)
        if mask is not None:
            y = y * mask[:, None]
        return {"z": y, "a": (y + pair[1], None), "again": y, "given": a}


class Step(nn.Module):
    """One function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class InNumpy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.from_numpy(np.sin(x.numpy()))


def around(function: Callable[[Tensor], Tensor]) -> nn.Sequential:
    """The function's module is called `1.0`."""
    return nn.Sequential(nn.Linear(4, 4), nn.Sequential(Step(function)), nn.ReLU())


def many(batch: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(batch)
    first, second, a = (torch.randn(size, generator=generator) for size in ((batch, 3), (1, 4), (batch, 4)))
    mask = (torch.arange(batch) % 2).float()
    # not in the order of the arguments
    return {"unused": torch.zeros(batch), "mask": mask, "twice": True, "pair": (first, second), "a": a}


def run(proto: Any, arrays: list[Tensor]) -> list[Tensor]:
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [port.name for port in session.get_inputs()]
    feed = {name: array.numpy() for name, array in zip(names, arrays, strict=True)}
    return [torch.as_tensor(array) for array in session.run(None, feed)]


def test_inputs_and_outputs_of_any_kind() -> None:
    model = Many()
    proto = to_onnx(model, many(2))
    assert [port.name for port in proto.graph.input] == ["a", "pair_0", "pair_1", "mask", "unused"]
    assert [port.name for port in proto.graph.output] == ["output_0", "output_1", "output_2", "output_3"]
    sizes = [
        [size.dim_param or size.dim_value for size in port.type.tensor_type.shape.dim] for port in proto.graph.input
    ]
    assert sizes == [["batch", 4], ["batch", 3], [1, 4], ["batch"], ["batch"]]
    for batch in (1, 2, 5):
        example = many(batch)
        expected = model(**example)
        outputs = run(proto, graph_inputs(model, example))
        for output, tensor in zip(outputs, (expected["z"], expected["a"][0], expected["z"], example["a"]), strict=True):
            torch.testing.assert_close(output, tensor.detach(), rtol=0, atol=1e-5)


def test_an_example_of_one_leaves_the_batch_open_and_batch_norms_are_folded() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
    model(torch.randn(8, 3, 4, 4))
    proto = to_onnx(model, torch.zeros(1, 3, 4, 4))
    assert proto.opset_import[0].version == conversion.OPSET
    assert "BatchNormalization" not in {node.op_type for node in proto.graph.node}
    x = torch.randn(3, 3, 4, 4)
    torch.testing.assert_close(run(proto, [x])[0], model.eval()(x).detach(), rtol=0, atol=1e-5)


def test_settings_stay_and_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("openvino")
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    model[0].eval()
    model[1].weight.requires_grad_(False)

    def settings() -> tuple[Any, ...]:
        hooks = [dict(vars(module).get("_forward_hooks", {})) for module in model.modules()]
        flags = (
            [module.training for module in model.modules()],
            [parameter.requires_grad for parameter in model.parameters()],
        )
        return torch.get_rng_state().tolist(), torch.get_num_threads(), torch.is_grad_enabled(), flags, hooks

    refused = around(lambda x: x.view(8, -1))
    before, weights = settings(), state(model)
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    to_program(model, x)
    to_openvino(to_onnx(model, x))
    with pytest.raises(ModelError):
        to_program(refused, torch.zeros(8, 4))
    assert settings() == before
    assert same_state(model, weights)
    assert capfd.readouterr() == ("", "")


def test_openvino_models_run_with_any_batch() -> None:
    pytest.importorskip("openvino")
    model, example = Many(), many(2)
    converted = to_openvino(to_onnx(model, example))
    compiled = openvino_core().compile_model(converted, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    other = many(3)
    names = [port.any_name for port in compiled.inputs]
    assert names == ["a", "pair_0", "pair_1", "mask"]  # what nothing depends on is dropped
    outputs = compiled([tensor.numpy() for tensor in graph_inputs(model, other)[:4]])
    torch.testing.assert_close(
        torch.from_numpy(outputs["output_1"]), model(**other)["a"][0].detach(), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda x: x.view(8, -1).relu(), r"constant \(8\)"),
        (lambda x: x + 1 if x.shape[0] > 3 else x - 1, "range satisfy"),
    ],
)
def test_a_model_of_one_batch_size_names_the_module_and_the_option(
    function: Callable[[Tensor], Tensor], why: str
) -> None:
    model, x = around(function), torch.randn(8, 4)
    with pytest.raises(ModelError, match=rf"open batch size, because of '1\.0' \(Step\): .*{why}.*--fixed-batch"):
        to_program(model, x)
    with_fixed_batch = to_program(model, x, dynamic_batch=False)
    with torch.no_grad():
        torch.testing.assert_close(with_fixed_batch.module()(x), model(x))


def test_an_example_that_cannot_be_doubled_is_an_error() -> None:
    model = nn.Sequential(Step(lambda x: x.view(1, -1)), nn.Linear(4, 4))
    with pytest.raises(ModelError, match=r"The example was doubled.*dynamic_batch=False"):
        to_program(model, torch.randn(1, 4))
    assert to_program(model, torch.randn(1, 4), dynamic_batch=False) is not None


@pytest.mark.parametrize(
    "function",
    [lambda x: x + 1 if x.sum() > 3 else x - 1, InNumpy.apply, lambda x: x[: int(x.argmax())]],
    ids=["control flow", "a function in numpy", "a size from the data"],
)
def test_what_cannot_be_captured_is_named(function: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(ModelError, match=r"Sequential cannot be exported because of '1\.0' \(Step\): "):
        to_program(around(function), torch.randn(3, 4))


def test_an_operator_without_translation_is_named() -> None:
    model = around(lambda x: torch.linalg.svdvals(x[:, None] * torch.ones(4, 4)))
    assert to_program(model, torch.randn(3, 4)) is not None
    with pytest.raises(ModelError, match=r"become ONNX because of '1\.0' \(Step\): No ONNX function.*linalg_svd"):
        to_onnx(model, torch.randn(3, 4))


def test_an_operator_of_ones_own_is_named() -> None:
    @library.custom_op("spectrim_test::lifted", mutates_args=())
    def lifted(x: Tensor) -> Tensor:
        return x + 1

    @lifted.register_fake
    def _(x: Tensor) -> Tensor:
        return torch.empty_like(x)

    with pytest.raises(ModelError, match=r"'1\.0' \(Step\): No ONNX function found for .*spectrim_test"):
        to_onnx(around(lifted), torch.randn(3, 4))


class Alone(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if x.sum() > 3 else x


def test_bad_inputs() -> None:
    model = nn.Linear(4, 4)
    with pytest.raises(ModelError, match="cannot run example_inputs"):
        to_program(model, torch.zeros(2, 5))
    for empty in (torch.zeros(0, 4), torch.tensor(1.0), {"input": 3}):
        with pytest.raises(ModelError, match="no batch dimension to leave open"):
            to_program(model, empty)
    with pytest.raises(ModelError, match="Linear does not take nothing: missing"):
        to_program(model, ())
    with pytest.raises(ModelError, match="does not take"):
        to_program(model, {"inputs": torch.zeros(2, 4)})
    with pytest.raises(ModelError, match="the forward of Alone itself"):
        to_program(Alone(), torch.zeros(2, 4))


def test_a_model_too_large_for_onnx_is_an_error_at_once() -> None:
    with pytest.raises(ModelError, match=r"4\.0 GiB of weights.*program instead"):
        to_onnx(nn.Linear(2**15, 2**15, bias=False, device="meta"), torch.zeros(2, 2**15))


@pytest.mark.parametrize(
    ("package", "convert"),
    [
        ("onnx", lambda: to_onnx(nn.Linear(4, 4), torch.zeros(1, 4))),
        ("onnxscript", lambda: to_onnx(nn.Linear(4, 4), torch.zeros(1, 4))),
        ("openvino", lambda: to_openvino(None)),
    ],
)
def test_a_missing_package_is_named(
    package: str, convert: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DependencyError, match=rf'{package} .*; pip install "spectrim\['):
        convert()


def test_factored_layers_stay_two_products() -> None:
    model = nn.Sequential(nn.Linear(12, 16), nn.Linear(16, 12))
    small = st.compress(model, st.Rank(2), example_inputs=torch.zeros(1, 12)).model
    shapes = sorted(
        tuple(weight.dims) for weight in to_onnx(small, torch.zeros(1, 12)).graph.initializer if len(weight.dims) > 1
    )
    assert [set(shape) for shape in shapes] == [{2, 12}, {2, 16}, {12, 2}, {16, 2}]
