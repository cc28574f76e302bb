"""A module in another representation, in memory: an exported program, an ONNX model, an OpenVINO model."""

import importlib
import inspect
import io
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from functools import cache, partial
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from spectrim.core.errors import DependencyError, ModelError
from spectrim.core.execution import (
    Inputs,
    as_inputs,
    call,
    evaluating,
    on_device_of,
    require_shapes,
    require_values,
    temporary,
)
from spectrim.core.nested import map_tensors, tensors
from spectrim.runtimes.faults import described, module_at, raised_as, root_reason

if TYPE_CHECKING:
    import onnx
    import openvino

OPSET = 20
"""Version of the ONNX operators that `to_onnx` writes; ONNX Runtime knows it since 1.17."""

_BATCH = "batch"
_LARGEST = 2**31 - 2**20
"""Bytes: Protocol Buffers end at 2 GiB, and the graph itself needs a little."""


def to_program(model: nn.Module, example_inputs: Any, *, dynamic_batch: bool = True) -> ExportedProgram:
    """Capture the model in evaluation mode as a graph of torch operators (`torch.export`, not strict).

    Args:
        model: The model; it stays as it is, and the program shares its weights.
        example_inputs: One call's inputs: a tensor, a tuple of them, or a mapping of keyword arguments.
        dynamic_batch: Leave the batch size open. The batch size is the first dimension of the first tensor in the
            inputs; every other tensor whose first dimension is the same is taken to have it as well.

    Raises:
        ModelError: the model cannot run the inputs, depends on the batch size of the example, or does something that
            cannot be captured; the message names the module.
    """
    inputs, shapes, hint = _example(model, example_inputs, dynamic_batch=dynamic_batch)
    with evaluating(model):
        call(model, inputs, hint=hint)
        return _captured(model, inputs, shapes)


def to_onnx(model: nn.Module, example_inputs: Any, *, dynamic_batch: bool = True) -> "onnx.ModelProto":
    """The model in evaluation mode as an ONNX graph of opset `OPSET`, by way of `to_program`.

    Inputs have the names of the model's `forward`, outputs are `output_0`, `output_1`, .. in the order in which the
    tensors stand in what the model returns. Batch norms are folded into the convolutions before them. The arguments are
    those of `to_program`.

    Raises:
        ModelError: as for `to_program`, and for an operator that has no ONNX translation; the message names the module.
        DependencyError: onnx or onnxscript is not installed.
    """
    require_onnx()
    require_shapes(model)
    size = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
    if size >= _LARGEST:  # better known before minutes are spent on it
        raise ModelError(
            f"{type(model).__name__} has {size / 2**30:.1f} GiB of weights, and an ONNX model holds less than "
            f"{_LARGEST / 2**30:.1f}; export the program instead, or compress it first"
        )
    program = to_program(model, example_inputs, dynamic_batch=dynamic_batch)
    with evaluating(model), quiet():
        try:
            translated = torch.onnx.export(program, dynamo=True, opset_version=OPSET, verbose=False)
            assert translated is not None
            _name_ends(translated.model.graph, program)
            proto: onnx.ModelProto = translated.model_proto
        except Exception as error:
            where = module_at(model, error)
            raise ModelError(
                f"{type(model).__name__} cannot become ONNX because of {where}: {root_reason(error)}; write it with "
                "other operators, or export the program instead"
            ) from error
    return _plain(_with_batch_named(proto) if dynamic_batch else proto)


def graph_inputs(model: nn.Module, example_inputs: Any) -> list[Tensor]:
    """The tensors of one call's inputs, in the order in which the program and the ONNX graph of the model take them."""
    return _ordered(model, as_inputs(example_inputs)).tensors()


def _name_ends(graph: Any, program: ExportedProgram) -> None:
    """Name the inputs of an ONNX graph (as the exporter holds it) as in the program, and number the outputs."""
    for position, value in enumerate(graph.outputs):
        value.name = f"output_{position}"
    users = set(program.graph_signature.user_inputs)
    places = [node for node in program.graph.nodes if node.op == "placeholder" and node.name in users]
    names = [node.name for node in places if isinstance(node.meta.get("val"), Tensor)]
    used_names = {value.name for node in graph for value in node.outputs} | set(graph.initializers)
    for value, name in zip(graph.inputs, names, strict=True):
        if name not in used_names:
            value.name = name


def _with_batch_named(proto: "onnx.ModelProto") -> "onnx.ModelProto":
    """Call the open dimension `batch`; the exporter calls it something like s31."""
    shapes = [value.type.tensor_type.shape for value in (*proto.graph.input, *proto.graph.output)]
    sizes = [size for shape in shapes for size in shape.dim if size.dim_param]
    symbol = next((size.dim_param for shape in shapes for size in shape.dim[:1] if size.dim_param), None)
    for size in sizes:
        size.dim_param = re.sub(rf"\b{re.escape(symbol or '')}\b", _BATCH, size.dim_param)
    del proto.graph.value_info[:]  # may use the old name; nothing needs it
    return proto


def _plain(proto: "onnx.ModelProto") -> "onnx.ModelProto":
    """Without the exporter's notes on each operator: the user's source lines, and paths of this machine."""
    graph = proto.graph
    functions = [node for function in proto.functions for node in function.node]
    for part in (proto, graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *functions):
        part.doc_string = ""
        del part.metadata_props[:]
    return proto


def to_openvino(proto: "onnx.ModelProto") -> "openvino.Model":
    """An ONNX model as an OpenVINO model, weights as they are.

    Raises `ModelError` for an operator that OpenVINO does not know, `DependencyError` where it is not installed.
    """
    core = openvino_core()
    with raised_as(ModelError, "OpenVINO cannot read the model", advice="; use ONNX Runtime"), quiet():
        return core.read_model(proto.SerializeToString(), b"")


def openvino_core() -> "openvino.Core":
    """The only one of this process. Raises `DependencyError` where OpenVINO is not installed."""
    return _only_core(optional("openvino", extra="openvino"))


@cache
def _only_core(package: ModuleType) -> "openvino.Core":
    """Stays as long as the process.

    Each core that runs a model sets a stack for the handlers of signals, and sets the one before again as it goes. Of
    two that overlap, the last to go would set one that is gone, and the next Ctrl-C would crash the process.
    """
    return cast("openvino.Core", package.Core())


def require_onnx() -> None:
    """Raises `DependencyError` where onnx, or the onnxscript that torch's exporter is built on, is not installed."""
    for package in ("onnx", "onnxscript"):
        optional(package, extra="onnx")


def optional(package: str, *, extra: str) -> ModuleType:
    """An optional package. Raises `DependencyError`, which names the extra that installs it, where it is not there."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        advice = f'pip install "spectrim[{extra}]"'
        raise DependencyError(f"{package} is not installed (or broken: {error}); {advice}") from error


_Shapes = dict[str, Any] | None
"""The open dimensions of every tensor, by argument."""


def _example(model: nn.Module, example_inputs: Any, *, dynamic_batch: bool) -> tuple[Inputs, _Shapes, str]:
    """The inputs as they are captured, their open dimensions, and a hint for the error about them."""
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError("the model is TorchScript, which cannot be captured; give the module it was made from")
    require_values(model)
    inputs = on_device_of(model, _ordered(model, as_inputs(example_inputs)))
    if inputs.is_ragged:
        raise ModelError(f"{inputs.describe()} cannot be captured; give a network that takes padded tensors")
    if not dynamic_batch:
        return inputs, None, ""
    batch, hint = batch_size(inputs), ""
    if batch == 1:  # the exporter would fix a dimension of 1
        batch = 2
        inputs = inputs.map(lambda tensor: torch.cat([tensor, tensor]) if has_batch(tensor, 1) else tensor)
        hint = f" The example was doubled, so that the batch size can stay open; {_FIXED_BATCH}."
    size, bound = Dim(_BATCH, min=1), _bound(model, inputs)
    shapes = map_tensors(bound, lambda tensor: {0: size} if has_batch(tensor, batch) else None, other=lambda _: None)
    return inputs, shapes, hint


def _bound(model: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """The inputs by the names of the arguments, in the order of the model's `forward`."""
    try:
        return inspect.signature(model.forward).bind(*inputs.args, **inputs.kwargs).arguments
    except TypeError as error:
        raise ModelError(f"{type(model).__name__} does not take {inputs.describe()}: {error}") from error


def _ordered(model: nn.Module, inputs: Inputs) -> Inputs:
    """The same inputs, keyword arguments in the order of the model's `forward`."""
    order = list(_bound(model, inputs))
    names = sorted(inputs.kwargs, key=lambda name: order.index(name) if name in order else len(order))
    return Inputs(inputs.args, {name: inputs.kwargs[name] for name in names})


_FIXED_BATCH = "dynamic_batch=False (--fixed-batch) exports for the example's batch size only"


def batch_size(inputs: Inputs) -> int:
    """The first dimension of the first tensor in the inputs; `ModelError` where there is none, or it is of size 0."""
    sizes = [tensor.shape[0] for tensor in inputs.tensors() if tensor.ndim]
    if not sizes or not sizes[0]:
        raise ModelError(f"example_inputs ({inputs.describe()}) have no batch dimension to leave open; {_FIXED_BATCH}")
    return sizes[0]


def has_batch(tensor: Tensor, batch: int) -> bool:
    """Whether the first dimension of a tensor is taken to be the batch."""
    return tensor.ndim > 0 and tensor.shape[0] == batch


def _captured(model: nn.Module, inputs: Inputs, shapes: _Shapes) -> ExportedProgram:
    try:
        return _export(model, inputs, shapes)
    except Exception as error:
        why = f"cannot be exported because of {module_at(model, error)}: {root_reason(error)}"
        if shapes is not None:
            with suppress(Exception):  # what cannot be captured with a fixed batch size either has another reason
                _export(model, inputs, None)
                where = described(model, _first_fixed(model, inputs, shapes))
                why = f"does not allow an open batch size, because of {where}: {root_reason(error)}; {_FIXED_BATCH}"
        raise ModelError(f"{type(model).__name__} {why}") from error


def _export(model: nn.Module, inputs: Inputs, shapes: _Shapes) -> ExportedProgram:
    with quiet(), _without_cache(model):
        return torch.export.export(model, inputs.args, dict(inputs.kwargs), dynamic_shapes=shapes, strict=False)


@contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    """A decoder of transformers gives its outputs alone, and not the keys and values for the next token."""
    config: Any = getattr(model, "config", None)
    cached = getattr(config, "use_cache", None)
    if cached:
        config.use_cache = False
    try:
        yield
    finally:
        if cached:
            config.use_cache = cached


def _first_fixed(model: nn.Module, inputs: Inputs, shapes: _Shapes) -> str | None:
    """The innermost, earliest module during which the open batch size gets a condition; none if none is found."""
    opened: list[tuple[torch.SymInt, int]] = []
    modules: list[str] = []

    def begin(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        sizes: list[Any] = [size for tensor in tensors((args, kwargs)) for size in tensor.shape[:1]]
        opened.extend((size, _conditions(size)) for size in sizes if isinstance(size, torch.SymInt))

    def end(name: str, *_: object) -> None:
        if any(_conditions(size) > number for size, number in opened):
            modules.append(name)

    handles = [model.register_forward_pre_hook(begin, prepend=True, with_kwargs=True)]
    handles += [module.register_forward_hook(partial(end, name)) for name, module in model.named_modules()]
    with temporary(handles), suppress(Exception):
        _export(model, inputs, shapes)
    return next(iter(modules), None)


def _conditions(size: torch.SymInt) -> int:
    """How many conditions have been put on open sizes so far."""
    environment: Any = size.node.shape_env
    return len(environment.guards) + len(environment.replacements)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the exporters' warnings, log lines and prints; errors are still raised."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    with warnings.catch_warnings(action="ignore"), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        try:
            yield
        finally:
            logging.disable(before)
