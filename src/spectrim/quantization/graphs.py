"""Changes of ONNX graphs in memory: weights stored in fewer bits, and everything left out that runtimes do not need."""

import copy
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

if TYPE_CHECKING:
    import onnx

_DEFAULTS = {"strides": {1}, "dilations": {1}, "pads": {0}}
"""Values of attributes that hold in `_WINDOWED` operators where the attribute is missing."""
_WINDOWED = ("Conv", "ConvTranspose", "MaxPool", "AveragePool")
_CLIPS = np.linspace(1.0, 0.7, 16)
_LEVELS = 127


def weights(proto: "onnx.ModelProto") -> dict[str, int]:
    """The float32 weights of linear layers, convolutions and look-ups by name, each with the axis of its channels.

    The axis is that of the output channels, or of the rows that are looked up; a weight with several users has the axis
    of the first.
    """
    dimensions = {tensor.name: len(tensor.dims) for tensor in _float32(proto) if len(tensor.dims) > 1}
    axes: dict[str, int] = {}
    for node in proto.graph.node:
        for position, axis in _channels(node):
            if (name := node.input[position]) in dimensions:
                axes.setdefault(name, axis % dimensions[name])
    return axes


def large(proto: "onnx.ModelProto") -> list[str]:
    """Names of all float32 constants that are more than a vector."""
    return [tensor.name for tensor in _float32(proto) if math.prod(tensor.dims) > max(tensor.dims, default=1)]


def _float32(proto: "onnx.ModelProto") -> Iterator["onnx.TensorProto"]:
    return (tensor for tensor in proto.graph.initializer if tensor.data_type == tensor.FLOAT)


def _channels(node: "onnx.NodeProto") -> list[tuple[int, int]]:
    """Which inputs of a node may be weights, and along which axis their channels lie."""
    attributes = {attribute.name: attribute.i for attribute in node.attribute}
    channels = {
        "Conv": [(1, 0)],
        "ConvTranspose": [(1, 1)],
        "Gemm": [(1, 0 if attributes.get("transB") else 1)],
        "MatMul": [(1, -1), (0, -2)],
        "Gather": [] if attributes.get("axis") else [(0, 0)],
    }
    return channels.get(node.op_type, [])


def scales(weight: NDArray[Any], *, axis: int) -> NDArray[np.float32]:
    """One step of int8 for each channel: of 16 ranges up to the largest entry, the one of least squared error.

    Symmetric: -127..127 times the scale. A channel of zeros has the scale 1. The scales have the shape of `weight`,
    with 1 in every axis but `axis`, that of the channels.
    """
    others = tuple(other for other in range(weight.ndim) if other != axis)
    largest = np.abs(weight).max(axis=others, keepdims=True).astype(np.float64)
    full = np.where(largest > 0, largest / _LEVELS, 1.0).astype(np.float32)
    best, least = full, np.full(full.shape, np.inf)
    for clip in _CLIPS:
        scale = (full * clip).astype(np.float32)
        error = np.square(rounded(weight, scale) * scale - weight).sum(axis=others, keepdims=True)
        better = error < least
        best, least = np.where(better, scale, best), np.where(better, error, least)
    return best


def rounded(weight: NDArray[Any], scale: NDArray[np.float32]) -> NDArray[np.int8]:
    """The weight in whole steps of `scale`, at most 127 of them."""
    return np.clip(np.rint(weight / scale), -_LEVELS, _LEVELS).astype(np.int8)


def store_int8(proto: "onnx.ModelProto") -> "onnx.ModelProto":
    """A copy whose weights are int8 with one scale a channel, and are made float32 by a Cast and a Mul.

    Every runtime folds these two when it loads the file, so that it computes as fast as with float32 weights. ONNX
    Runtime would not fold a DequantizeLinear: it runs that in every pass, without its blocked convolutions.
    """
    from onnx import TensorProto, helper, numpy_helper

    def store(name: str, values: NDArray[Any], axis: int) -> _Parts:
        scale = scales(values, axis=axis)
        steps = numpy_helper.from_array(rounded(values, scale), f"{name}/int8")
        cast = helper.make_node("Cast", [f"{name}/int8"], [f"{name}/steps"], to=TensorProto.FLOAT)
        scaled = helper.make_node("Mul", [f"{name}/steps", f"{name}/scale"], [name])
        return [steps, numpy_helper.from_array(scale, f"{name}/scale")], [cast, scaled]

    return _stored(proto, store)


def store_bf16(proto: "onnx.ModelProto") -> "onnx.ModelProto":
    """A copy whose weights are bfloat16 and are made float32 by a Cast, which runtimes fold when they load the file."""
    from onnx import TensorProto, helper

    def store(name: str, values: NDArray[Any], _: int) -> _Parts:
        bits = torch.from_numpy(values.copy()).to(torch.bfloat16).view(torch.int16).numpy().tobytes()
        constant = helper.make_tensor(f"{name}/bf16", TensorProto.BFLOAT16, values.shape, bits, raw=True)
        return [constant], [helper.make_node("Cast", [f"{name}/bf16"], [name], to=TensorProto.FLOAT)]

    return _stored(proto, store)


_Parts = tuple[list["onnx.TensorProto"], list["onnx.NodeProto"]]
"""Constants, and the nodes that make a weight of them."""


def _stored(proto: "onnx.ModelProto", store: Callable[[str, NDArray[Any], int], _Parts]) -> "onnx.ModelProto":
    """A copy with what `store` gives for every weight: its name, its values and the axis of its channels."""
    from onnx import numpy_helper

    proto, axes = copy.deepcopy(proto), weights(proto)
    constants: list[onnx.TensorProto] = []
    nodes: list[onnx.NodeProto] = []
    for tensor in proto.graph.initializer:
        parts = store(tensor.name, numpy_helper.to_array(tensor), axes[tensor.name]) if tensor.name in axes else None
        constants += parts[0] if parts else [tensor]
        nodes += parts[1] if parts else []
    _replace(proto.graph.initializer, constants)
    _replace(proto.graph.node, [*nodes, *proto.graph.node])
    return proto


def compact(proto: "onnx.ModelProto") -> "onnx.ModelProto":
    """A copy of the same function in fewer bytes: matters where a network has few weights.

    Left out: remarks, shapes of intermediate values, names of nodes, attributes at their default, constants that are
    unused or there twice. Intermediate values get short names; inputs and outputs keep theirs.
    """
    proto = copy.deepcopy(proto)
    graph = proto.graph
    proto.producer_name, proto.producer_version, proto.doc_string, graph.doc_string = "spectrim", "", "", ""
    del proto.metadata_props[:], graph.value_info[:], graph.metadata_props[:]
    opsets = {opset.domain: opset.version for opset in proto.opset_import}
    nested = any(a.HasField("g") or a.graphs for node in graph.node for a in node.attribute)
    if not (nested or proto.functions):  # bodies of loops and functions use names and operators of their own
        domains = {"", *(node.domain for node in graph.node)}
        _replace(proto.opset_import, [opset for opset in proto.opset_import if opset.domain in domains])
        _shorten(graph)
    for node in graph.node:
        node.name, node.doc_string = "", ""
        del node.metadata_props[:]
        _replace(node.attribute, [value for value in node.attribute if not _is_default(value, node, opsets)])
    return proto


def _shorten(graph: "onnx.GraphProto") -> None:
    """Short names for everything but inputs and outputs; equal constants become one, and unused ones are removed."""
    from onnx import numpy_helper

    ends = [value.name for value in (*graph.input, *graph.output)]
    names: dict[str, str] = {"": "", **{name: name for name in ends}}
    labels = (str(np.base_repr(number, 36)) for number in itertools.count())
    free = (label for label in labels if label not in ends)
    used = {name for node in graph.node for name in node.input}
    constants: dict[object, onnx.TensorProto] = {}
    for tensor in graph.initializer:
        content = (tensor.data_type, tuple(tensor.dims), numpy_helper.to_array(tensor).tobytes())
        if tensor.name in ends:
            constants[tensor.name] = tensor
        elif tensor.name in used:
            if content not in constants:
                constants[content] = tensor
                names[tensor.name] = next(free)
            names[tensor.name] = names[constants[content].name]
    for tensor in constants.values():
        tensor.name, tensor.doc_string = names[tensor.name], ""
        del tensor.metadata_props[:]
    _replace(graph.initializer, constants.values())
    for node in graph.node:
        for values in (node.input, node.output):
            values[:] = [names[name] if name in names else names.setdefault(name, next(free)) for name in values]


def _is_default(attribute: "onnx.AttributeProto", node: "onnx.NodeProto", opsets: Mapping[str, int]) -> bool:
    """Whether an attribute says what holds without it."""
    from onnx import defs, helper

    value = helper.get_attribute_value(attribute)
    if node.domain == "" and node.op_type in _WINDOWED and attribute.name in _DEFAULTS:
        return set(value) == _DEFAULTS[attribute.name]
    if not defs.has(node.op_type, node.domain):
        return False
    schema = defs.get_schema(node.op_type, opsets.get(node.domain, 1), node.domain)
    usual = schema.attributes[attribute.name].default_value if attribute.name in schema.attributes else None
    return bool(usual is not None and usual.type and helper.get_attribute_value(usual) == value)


def _replace(field: Any, items: Iterable[Any]) -> None:
    """Exchange the content of a repeated field."""
    copies = [copy.deepcopy(item) for item in items]
    del field[:]
    field.extend(copies)
