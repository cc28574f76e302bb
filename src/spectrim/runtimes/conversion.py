"""A module in another representation, in memory: an exported program, an ONNX model, an OpenVINO model."""

import contextlib
import importlib
import inspect
import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram

from spectrim.core.errors import DependencyError, ModelError
from spectrim.core.execution import Inputs, as_inputs, call, evaluating, on_device_of
from spectrim.core.nested import map_tensors, tensors

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
    given = _given(model, example_inputs, dynamic_batch=dynamic_batch)
    with evaluating(model):
        call(model, given.inputs, hint=given.hint)
        return _captured(model, given)


def to_onnx(model: nn.Module, example_inputs: Any, *, dynamic_batch: bool = True) -> "onnx.ModelProto":
    """The model in evaluation mode as an ONNX graph of opset `OPSET`, by way of `to_program`.

    Inputs have the names of the model's `forward`, outputs are `output_0`, `output_1`, .. in the order in which the
    tensors stand in what the model returns. Batch norms are folded into the convolutions before them.

    Args:
        model: The model; it stays as it is.
        example_inputs: As for `to_program`.
        dynamic_batch: As for `to_program`.

    Raises:
        ModelError: as for `to_program`, and for an operator that has no ONNX translation; the message names the module.
        DependencyError: onnx or onnxscript is not installed.
    """
    require_onnx()
    _require_small(model)
    program = to_program(model, example_inputs, dynamic_batch=dynamic_batch)
    with evaluating(model), quiet():
        try:
            translated = torch.onnx.export(program, dynamo=True, opset_version=OPSET, verbose=False)
            assert translated is not None
            _name_ends(translated.model.graph, _input_names(program))
            proto: onnx.ModelProto = translated.model_proto
        except Exception as error:
            where = _module_at(model, error)
            raise ModelError(
                f"{type(model).__name__} cannot become ONNX because of {where}: {_reason(error)}; write it with other "
                "operators, or export the program instead"
            ) from error
    return _plain(_with_batch_named(proto) if dynamic_batch else proto)


def graph_inputs(model: nn.Module, example_inputs: Any) -> list[Tensor]:
    """The tensors of one call's inputs, in the order in which the program and the ONNX graph of the model take them."""
    return _ordered(model, as_inputs(example_inputs)).tensors()


def _input_names(program: ExportedProgram) -> list[str]:
    """What the program calls those of its inputs that are tensors."""
    users = set(program.graph_signature.user_inputs)
    places = (node for node in program.graph.nodes if node.op == "placeholder" and node.name in users)
    return [node.name for node in places if isinstance(node.meta.get("val"), Tensor)]


def _name_ends(graph: Any, names: list[str]) -> None:
    """Give the inputs of an ONNX graph (as the exporter holds it) these names, and the outputs theirs."""
    for position, value in enumerate(graph.outputs):
        value.name = f"output_{position}"
    taken = {value.name for node in graph for value in node.outputs} | set(graph.initializers)
    for value, name in zip(graph.inputs, names, strict=True):
        if name not in taken:
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
    """Without what the exporter notes beside each operator: the user's source lines, and paths of this machine."""
    graph = proto.graph
    functions = [node for function in proto.functions for node in function.node]
    for noted in (proto, graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *functions):
        noted.doc_string = ""
        del noted.metadata_props[:]
    return proto


def to_openvino(model: nn.Module, example_inputs: Any, *, dynamic_batch: bool = True) -> "openvino.Model":
    """The model in evaluation mode as an OpenVINO model with weights as they are, by way of `to_onnx`.

    Args:
        model: The model; it stays as it is.
        example_inputs: As for `to_program`.
        dynamic_batch: As for `to_program`.

    Raises:
        ModelError: as for `to_onnx`.
        DependencyError: openvino, onnx or onnxscript is not installed.
    """
    openvino = require_openvino()
    proto = to_onnx(model, example_inputs, dynamic_batch=dynamic_batch)
    return openvino_of(proto, openvino)


def openvino_of(proto: "onnx.ModelProto", openvino: ModuleType) -> "openvino.Model":
    """An ONNX model as an OpenVINO model.

    Raises:
        ModelError: OpenVINO does not know an operator.
    """
    try:
        with quiet():
            model = openvino.Core().read_model(proto.SerializeToString(), b"")
    except Exception as error:
        raise ModelError(f"OpenVINO cannot read the model: {_reason(error)}; use ONNX Runtime") from error
    return model


def require_openvino() -> ModuleType:
    """The package openvino. Raises `DependencyError` where it is not installed."""
    return optional("openvino", extra="openvino")


def require_onnx() -> None:
    """Raises `DependencyError` where onnx, or the onnxscript that torch's exporter is built on, is not installed."""
    for package in ("onnx", "onnxscript"):
        optional(package, extra="onnx")


def optional(package: str, *, extra: str) -> ModuleType:
    """An optional package. Raises `DependencyError`, which names the extra that installs it, where it is not there."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise DependencyError(
            f'{package} is not installed (or broken: {error}); pip install "spectrim[{extra}]"'
        ) from error


def _require_small(model: nn.Module) -> None:
    """Refuse what one ONNX message cannot hold, before minutes are spent on it."""
    size = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
    if size >= _LARGEST:
        raise ModelError(
            f"{type(model).__name__} has {size / 2**30:.1f} GiB of weights, and an ONNX model holds less than "
            f"{_LARGEST / 2**30:.1f}; export the program instead, or compress it first"
        )


@dataclass(frozen=True)
class _Given:
    """The inputs as they are captured, their dynamic dimensions by argument, and what to add to a refusal of them."""

    inputs: Inputs
    shapes: dict[str, Any] | None
    hint: str = ""


def _given(model: nn.Module, example_inputs: Any, *, dynamic_batch: bool) -> _Given:
    inputs = on_device_of(model, _ordered(model, as_inputs(example_inputs)))
    if not dynamic_batch:
        return _Given(inputs, None)
    batch = batch_size(inputs)
    hint = ""
    if batch == 1:  # a dimension of 1 would be taken to be 1 for ever
        inputs = _doubled(inputs)
        batch = 2
        hint = f" The example was doubled, so that the batch size can stay open; {_FIXED}."
    dimension = Dim(_BATCH, min=1)
    bound = _bound(model, inputs)
    shapes = map_tensors(bound, lambda tensor: {0: dimension} if has_batch(tensor, batch) else None, other=_nothing)
    return _Given(inputs, shapes, hint)


def _bound(model: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """The inputs by the names of the arguments, in the order of the model's `forward`."""
    try:
        return inspect.signature(model.forward).bind(*inputs.args, **inputs.kwargs).arguments
    except TypeError as error:
        raise ModelError(f"{type(model).__name__} does not take {inputs.describe()}: {error}") from error


def _ordered(model: nn.Module, inputs: Inputs) -> Inputs:
    """The same inputs, keyword arguments in the order of the model's `forward`."""
    order = list(_bound(model, inputs))
    last = len(order)
    names = sorted(inputs.kwargs, key=lambda name: order.index(name) if name in order else last)
    return Inputs(inputs.args, {name: inputs.kwargs[name] for name in names})


_FIXED = "dynamic_batch=False (--fixed-batch) exports for the example's batch size only"


def batch_size(inputs: Inputs) -> int:
    """The first dimension of the first tensor in the inputs.

    Raises:
        ModelError: there is no tensor with a dimension, or it is of size 0.
    """
    sizes = [tensor.shape[0] for tensor in inputs.tensors() if tensor.ndim]
    if not sizes or not sizes[0]:
        raise ModelError(f"example_inputs ({inputs.describe()}) have no batch dimension to leave open; {_FIXED}")
    return sizes[0]


def _doubled(inputs: Inputs) -> Inputs:
    """A batch of two instead of one."""
    return inputs.map(lambda tensor: torch.cat([tensor, tensor]) if has_batch(tensor, 1) else tensor)


def _nothing(_: Any) -> None: ...


def has_batch(tensor: Tensor, batch: int) -> bool:
    """Whether the first dimension of a tensor is taken to be the batch."""
    return tensor.ndim > 0 and tensor.shape[0] == batch


def _captured(model: nn.Module, given: _Given) -> ExportedProgram:
    try:
        return _export(model, given.inputs, given.shapes)
    except Exception as error:
        name = type(model).__name__
        if given.shapes is not None and _is_captured_fixed(model, given.inputs):
            where = _said(model, _first_fixed(model, given))
            why = f"does not allow an open batch size, because of {where}: {_reason(error)}; {_FIXED}"
        else:
            why = f"cannot be exported because of {_module_at(model, error)}: {_reason(error)}"
        raise ModelError(f"{name} {why}") from error


def _export(model: nn.Module, inputs: Inputs, shapes: dict[str, Any] | None) -> ExportedProgram:
    with quiet():
        return torch.export.export(model, inputs.args, dict(inputs.kwargs), dynamic_shapes=shapes, strict=False)


def _is_captured_fixed(model: nn.Module, inputs: Inputs) -> bool:
    try:
        _export(model, inputs, None)
    except Exception:
        return False
    return True


def _first_fixed(model: nn.Module, given: _Given) -> str | None:
    """The innermost, earliest module during which the open batch size gets a condition; none if none is found."""
    conditions: list[Callable[[], int]] = []
    found: list[str] = []

    def begin(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for size in (size for tensor in tensors((args, kwargs)) for size in tensor.shape[:1]):
            if isinstance(size, torch.SymInt) and not conditions:
                conditions.append(_conditions(size))

    def end(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_: nn.Module, __: Any, ___: Any) -> None:
            if conditions and conditions[0]():
                found.append(name)

        return hook

    handles = [model.register_forward_pre_hook(begin, prepend=True, with_kwargs=True)]
    handles += [module.register_forward_hook(end(name)) for name, module in model.named_modules()]
    try:
        _export(model, given.inputs, given.shapes)
    except Exception:
        return found[0] if found else None
    finally:
        for handle in handles:
            handle.remove()
    return None


def _conditions(size: torch.SymInt) -> Callable[[], int]:
    """A function that tells how many conditions have been put on open sizes since now."""
    environment: Any = size.node.shape_env

    def number() -> int:
        return len(environment.guards) + len(environment.replacements)

    before = number()
    return lambda: number() - before


def _module_at(model: nn.Module, error: BaseException) -> str:
    """`'name' (Class)` of the innermost module that was at work when `error` was raised, or the model's own forward."""
    names = {id(module): name for name, module in model.named_modules()}
    found: str | None = None
    for frame in _frames(error):
        if id(frame.get("self")) in names:
            found = names[id(frame["self"])]
        for value in frame.values():
            if isinstance(value, fx.Node):
                stack = list(value.meta.get("nn_module_stack", {}).values())
                found = stack[-1][0] if stack else None
    return _said(model, found)


def _said(model: nn.Module, name: str | None) -> str:
    """A module for a message."""
    if not name:
        return f"the forward of {type(model).__name__} itself"
    return f"{name!r} ({type(model.get_submodule(name)).__name__})"


def _frames(error: BaseException) -> Iterator[Mapping[str, Any]]:
    """Local variables of the frames that an error and its causes went through, outermost first."""
    for cause in _causes(error):
        trace = cause.__traceback__
        while trace is not None:
            yield dict(trace.tb_frame.f_locals)
            trace = trace.tb_next


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


def _reason(error: BaseException) -> str:
    """What the first cause of an error says, in one line."""
    *_, first = _causes(error)
    lines = [line.strip() for line in str(first).splitlines() if line.strip()]
    details = [line.removeprefix("- ") for line in lines if line.startswith("- ")]
    said = (details or lines or [type(first).__name__])[0]
    return said.split(". If you're using")[0].rstrip(".")


@contextmanager
def quiet() -> Iterator[None]:
    """Without the exporters' warnings, log lines and prints; errors are still raised."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def first_line(error: BaseException) -> str:
    """The first line of what an error of another package says, without its full stop; its class if it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__
