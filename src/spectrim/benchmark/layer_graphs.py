"""ONNX graphs of single layers and short chains of them, written directly: an export takes seconds each."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from torch import Tensor, nn

from spectrim.layers.factored import FactoredLayer
from spectrim.layers.types import layer_type_of
from spectrim.runtimes.conversion import OPSET, optional
from spectrim.runtimes.engines import array_of

if TYPE_CHECKING:
    import onnx


def layer_graph(layer: nn.Module, shape: Sequence[int]) -> "onnx.ModelProto":
    """A dense or a factored layer as a graph from `input` of a shape, batch included, to `output`.

    Raises:
        DependencyError: onnx is not installed.
    """
    package: Any = optional("onnx", extra="onnx")
    chain = layer.chain if isinstance(layer, FactoredLayer) else (layer,)
    graph, name = _Graph(package), "input"
    for part in chain:
        name = layer_type_of(part).add_to_graph(graph, part, name, dimensions=len(shape))
    number = package.helper.np_dtype_to_tensor_dtype(array_of(chain[0].get_parameter("weight")).dtype)
    inputs = package.helper.make_tensor_value_info("input", number, list(shape))
    outputs = package.helper.make_tensor_value_info(name, number, [None] * len(shape))
    proto = package.helper.make_graph(graph.nodes, "layer", [inputs], [outputs], graph.constants)
    opsets = [package.helper.make_opsetid("", OPSET)]
    return cast("onnx.ModelProto", package.helper.make_model(proto, opset_imports=opsets, ir_version=10))


class _Graph:
    """Nodes and constants, as they are added."""

    def __init__(self, onnx: Any) -> None:
        self.onnx = onnx
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def node(self, operator: str, names: Sequence[str], **options: Any) -> str:
        output = f"value_{len(self.nodes)}"
        self.nodes.append(self.onnx.helper.make_node(operator, list(names), [output], **options))
        return output

    def constant(self, value: Any) -> str:
        name = f"constant_{len(self.constants)}"
        array = array_of(value) if isinstance(value, Tensor) else value
        self.constants.append(self.onnx.numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name
