"""Work on ONNX graphs in memory: weights stored in fewer bits, and nothing kept that a runtime does not need."""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

if TYPE_CHECKING:
    import onnx

_ALWAYS_ONE = ("strides", "dilations")
_ALWAYS_NOUGHT = ("pads",)
_WINDOWED = ("Conv", "ConvTranspose", "MaxPool", "AveragePool")
_CLIPS = np.linspace(1.0, 0.7, 16)
_LEVELS = 127


def weights(proto: "onnx.ModelProto") -> dict[str, int]:
    """The float32 weights of linear layers, convolutions and look-ups by name, each with the axis of its channels.

    The axis is that of the output channels, or of the rows that are looked up; a weight with several users has the axis
    of the first.
    """
    shapes = {one.name: tuple(one.dims) for one in proto.graph.initializer if one.data_type == 1 and len(one.dims) > 1}
    found: dict[str, int] = {}
    for node in proto.graph.node:
        for position, axis in _channels(node, shapes):
            name = node.input[position]
            if name in shapes:
                found.setdefault(name, axis % len(shapes[name]))
    return found


def large(proto: "onnx.ModelProto") -> list[str]:
    """Names of all float32 constants that are more than a vector."""
    found = [one for one in proto.graph.initializer if one.data_type == 1]
    return [one.name for one in found if math.prod(one.dims) > max(one.dims, default=1)]


def _channels(node: "onnx.NodeProto", shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[int, int]]:
    """Which inputs of a node may be weights, and along which axis their channels lie."""
    match node.op_type:
        case "Conv":
            yield 1, 0
        case "ConvTranspose":
            yield 1, 1
        case "Gemm":
            yield 1, 0 if _attribute(node, "transB", 0) else 1
        case "MatMul":
            yield 1, -1
            yield 0, -2
        case "Gather" if _attribute(node, "axis", 0) == 0:
            yield 0, 0


def _attribute(node: "onnx.NodeProto", name: str, default: Any) -> Any:
    from onnx import helper

    return next((helper.get_attribute_value(one) for one in node.attribute if one.name == name), default)


def scales(weight: NDArray[Any], *, axis: int) -> NDArray[np.float32]:
    """One step of int8 for each channel: of 16 ranges up to the largest entry, the one of least squared error.

    Symmetric: -127..127 times the scale. A channel of noughts has the scale 1.

    Args:
        weight: Any shape.
        axis: Of the channels.

    Returns:
        The shape of `weight`, with 1 in every axis but `axis`.
    """
    others = tuple(one for one in range(weight.ndim) if one != axis)
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

    Every runtime folds these two when it loads the file, so that it computes as fast as with float32 weights. It would
    not fold a DequantizeLinear: ONNX Runtime keeps that for every pass, and gives up its blocked convolutions for it.
    """
    from onnx import TensorProto, helper, numpy_helper

    def store(name: str, values: NDArray[Any], axis: int) -> _Parts:
        scale = scales(values, axis=axis)
        steps = numpy_helper.from_array(rounded(values, scale), f"{name}/int8")
        nodes = [
            helper.make_node("Cast", [f"{name}/int8"], [f"{name}/steps"], to=TensorProto.FLOAT),
            helper.make_node("Mul", [f"{name}/steps", f"{name}/scale"], [name]),
        ]
        return [steps, numpy_helper.from_array(scale, f"{name}/scale")], nodes

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


def _stored(proto: "onnx.ModelProto", store: Any) -> "onnx.ModelProto":
    from onnx import numpy_helper

    made, found = _copy(proto), weights(proto)
    kept: list[onnx.TensorProto] = []
    nodes: list[onnx.NodeProto] = []
    for one in made.graph.initializer:
        if one.name not in found:
            kept.append(one)
            continue
        constants, more = store(one.name, numpy_helper.to_array(one), found[one.name])
        kept += constants
        nodes += more
    _put(made.graph.initializer, kept)
    _put(made.graph.node, [*nodes, *made.graph.node])
    return made


def compact(proto: "onnx.ModelProto") -> "onnx.ModelProto":
    """A copy of the same function in fewer bytes: matters where a network has few weights.

    Left out: remarks, shapes of intermediate values, names of nodes, attributes at their default, constants that nobody
    uses or that are there twice. Intermediate values get short names; inputs and outputs keep theirs.
    """
    made = _copy(proto)
    made.producer_name, made.producer_version, made.doc_string = "spectrim", "", ""
    del made.metadata_props[:], made.graph.value_info[:], made.graph.metadata_props[:]
    made.graph.doc_string = ""
    opsets = {one.domain: one.version for one in made.opset_import}
    domains = {"", *(node.domain for node in made.graph.node), *(one.domain for one in made.functions)}
    nested = any(a.HasField("g") or a.graphs for node in made.graph.node for a in node.attribute)
    if not (nested or made.functions):  # bodies of loops and functions use names and operators of their own
        _put(made.opset_import, [one for one in made.opset_import if one.domain in domains])
        _share_constants(made.graph)
        _shorten(made.graph)
    for node in made.graph.node:
        node.name, node.doc_string = "", ""
        del node.metadata_props[:]
        _put(node.attribute, [one for one in node.attribute if not _is_default(one, node, opsets)])
    return made


def _share_constants(graph: "onnx.GraphProto") -> None:
    """Keep one of several equal constants, and none that nobody uses."""
    from onnx import numpy_helper

    first: dict[tuple[int, tuple[int, ...], bytes], str] = {}
    renamed: dict[str, str] = {}
    ends = {one.name for one in (*graph.output, *graph.input)}
    for one in graph.initializer:
        if one.name not in ends:
            key = (one.data_type, tuple(one.dims), numpy_helper.to_array(one).tobytes())
            renamed[one.name] = first.setdefault(key, one.name)
    for node in graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
    used = {name for node in graph.node for name in node.input} | ends
    _put(graph.initializer, [one for one in graph.initializer if one.name in used])


def _shorten(graph: "onnx.GraphProto") -> None:
    """Short names for everything but inputs and outputs."""
    ends = [one.name for one in (*graph.input, *graph.output)]
    names: dict[str, str] = {"": "", **{name: name for name in ends}}
    free = (label for number in itertools.count() if (label := _label(number)) not in ends)

    def short(name: str) -> str:
        if name not in names:
            names[name] = next(free)
        return names[name]

    for one in graph.initializer:
        one.name, one.doc_string = short(one.name), ""
        del one.metadata_props[:]
    for node in graph.node:
        node.input[:] = [short(name) for name in node.input]
        node.output[:] = [short(name) for name in node.output]


def _label(number: int) -> str:
    return str(np.base_repr(number, 36))


def _is_default(given: "onnx.AttributeProto", node: "onnx.NodeProto", opsets: Mapping[str, int]) -> bool:
    """Whether an attribute says what holds without it."""
    from onnx import defs, helper

    value = helper.get_attribute_value(given)
    if node.domain == "" and node.op_type in _WINDOWED:
        if given.name in _ALWAYS_ONE and set(value) == {1}:
            return True
        if given.name in _ALWAYS_NOUGHT and set(value) == {0}:
            return True
    if not defs.has(node.op_type, node.domain):
        return False
    schema = defs.get_schema(node.op_type, opsets.get(node.domain, 1), node.domain)
    usual = schema.attributes[given.name].default_value if given.name in schema.attributes else None
    return bool(usual is not None and usual.type and helper.get_attribute_value(usual) == value)


def _copy(proto: "onnx.ModelProto") -> "onnx.ModelProto":
    made = type(proto)()
    made.CopyFrom(proto)
    return made


def _put(field: Any, items: Iterable[Any]) -> None:
    """Exchange the content of a repeated field."""
    copies = [type(one).FromString(one.SerializeToString()) for one in items]
    del field[:]
    field.extend(copies)
