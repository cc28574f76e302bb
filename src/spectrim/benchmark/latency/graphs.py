"""ONNX graphs of single layers and short chains of them, written directly: an export takes seconds each."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, nn

from spectrim.layers.factored import is_low_rank
from spectrim.runtimes.conversion import OPSET, optional

if TYPE_CHECKING:
    import onnx

_MODES = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}


def layer_graph(layer: nn.Module, shape: Sequence[int]) -> "onnx.ModelProto":
    """A dense or a factored layer as a graph from `input` of a shape, batch included, to `output`.

    Raises:
        DependencyError: onnx is not installed.
    """
    package: Any = optional("onnx", extra="onnx")
    chain = tuple(layer.children()) if is_low_rank(layer) else (layer,)
    made = _Graph(package)
    name = "input"
    for part in chain:
        name = made.add(part, name, dimensions=len(shape))
    number = package.helper.np_dtype_to_tensor_dtype(_array(chain[0].get_parameter("weight")).dtype)
    given = package.helper.make_tensor_value_info("input", number, list(shape))
    gives = package.helper.make_tensor_value_info(name, number, [None] * len(shape))
    graph = package.helper.make_graph(made.nodes, "layer", [given], [gives], made.constants)
    opsets = [package.helper.make_opsetid("", OPSET)]
    proto: onnx.ModelProto = package.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return proto


class _Graph:
    """Nodes and constants, as they are added."""

    def __init__(self, onnx: Any) -> None:
        self.onnx = onnx
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def add(self, layer: nn.Module, name: str, *, dimensions: int) -> str:
        """Add what a layer does to `name`; gives the name of its output."""
        if isinstance(layer, nn.Linear):
            return self._linear(layer, name, dimensions=dimensions)
        return self._convolution(layer, name)

    def _linear(self, layer: nn.Linear, name: str, *, dimensions: int) -> str:
        weight, bias = layer.weight, layer.bias
        if dimensions == 2:  # as exporters write it
            constants = [self._constant(weight), *([] if bias is None else [self._constant(bias)])]
            return self._node("Gemm", [name, *constants], transB=1)
        product = self._node("MatMul", [name, self._constant(weight.T)])
        return product if bias is None else self._node("Add", [product, self._constant(bias)])

    def _convolution(self, layer: nn.Module, name: str) -> str:
        assert isinstance(layer, nn.Conv1d | nn.Conv2d | nn.ConvTranspose2d)
        before, after = _pads(layer)
        if layer.padding_mode != "zeros":
            amounts = self._constant(np.array([0, 0, *before, 0, 0, *after], dtype=np.int64))
            name = self._node("Pad", [name, amounts], mode=_MODES[layer.padding_mode])
            before, after = [0] * len(before), [0] * len(after)
        options: dict[str, Any] = {
            "kernel_shape": layer.kernel_size,
            "strides": layer.stride,
            "dilations": layer.dilation,
            "group": layer.groups,
            "pads": [*before, *after],
        }
        operator = "Conv"
        if isinstance(layer, nn.ConvTranspose2d):
            operator, options["output_padding"] = "ConvTranspose", layer.output_padding
        constants = [self._constant(layer.weight), *([] if layer.bias is None else [self._constant(layer.bias)])]
        return self._node(operator, [name, *constants], **options)

    def _node(self, operator: str, names: list[str], **options: Any) -> str:
        output = f"value_{len(self.nodes)}"
        self.nodes.append(self.onnx.helper.make_node(operator, names, [output], **options))
        return output

    def _constant(self, value: Any) -> str:
        name = f"constant_{len(self.constants)}"
        array = _array(value) if isinstance(value, Tensor) else value
        self.constants.append(self.onnx.numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name


def _array(value: Tensor) -> Any:
    return value.detach().cpu().numpy()


def _pads(layer: nn.Conv1d | nn.Conv2d | nn.ConvTranspose2d) -> tuple[list[int], list[int]]:
    """Places added before and after, by dimension."""
    if layer.padding == "valid":
        return [0] * len(layer.kernel_size), [0] * len(layer.kernel_size)
    if layer.padding == "same":
        whole = [step * (size - 1) for step, size in zip(layer.dilation, layer.kernel_size, strict=True)]
        return [one // 2 for one in whole], [one - one // 2 for one in whole]
    sides = [int(one) for one in layer.padding]
    return sides, sides
