"""Running a user's model without leaving a trace in it."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.nn.utils.rnn import PackedSequence

from spectrim.core.errors import DataError, ModelError
from spectrim.layers.registry import Positions


@dataclass(frozen=True)
class Inputs:
    """What one call of a model is given."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def describe(self) -> str:
        """Types and shapes, for messages."""
        named = [_describe(value) for value in self.args] + [f"{k}={_describe(v)}" for k, v in self.kwargs.items()]
        return ", ".join(named) or "nothing"


def as_inputs(value: Any) -> Inputs:
    """A tensor is the one argument, a tuple or list the positional ones, a mapping the keyword ones."""
    if isinstance(value, Inputs):
        return value
    if isinstance(value, Mapping):
        return Inputs((), dict(value))
    if isinstance(value, Sequence) and not isinstance(value, str):
        return Inputs(tuple(value), {})
    return Inputs((value,), {})


def split_labels(batch: Any, *, position: int) -> tuple[Inputs, Any]:
    """Split a labelled batch (inputs.., labels) into the model's inputs and the labels.

    Raises:
        DataError: the batch is not a tuple or list of at least two.
    """
    if not isinstance(batch, Sequence) or isinstance(batch, str) or len(batch) < 2:
        raise DataError(
            f"batch {position} is {_describe(batch)}, not (inputs, labels); give pairs, as a DataLoader does"
        )
    first, labels = batch[:-1], batch[-1]
    return as_inputs(first[0] if len(first) == 1 else first), labels


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter or buffer lives; the CPU for a model without either."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def to_device(value: Any, device: torch.device, *, copy: bool = False) -> Any:
    """`value` with every tensor in it, at any depth of tuples, lists and mappings, on `device`.

    With `copy` the tensors there are new ones even where they need not be moved.
    """
    if isinstance(value, Tensor):
        return value.to(device, copy=copy)
    if isinstance(value, PackedSequence):
        data, sizes, *orders = value  # the sizes stay on the CPU
        return PackedSequence(to_device(data, device, copy=copy), sizes, *to_device(orders, device, copy=copy))
    if isinstance(value, Inputs):
        return Inputs(to_device(value.args, device, copy=copy), to_device(value.kwargs, device, copy=copy))
    if isinstance(value, Mapping):
        return {key: to_device(item, device, copy=copy) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(to_device(item, device, copy=copy) for item in value))
    if type(value) in (tuple, list):
        return type(value)(to_device(item, device, copy=copy) for item in value)
    return value


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients and no shortcut kernels that bypass layers; everything is put back afterwards.

    Random states (torch, numpy, Python) are put back as well, so that a model that draws numbers does not change the
    caller's next ones, and so are the values of buffers that the model's forward pass writes to.
    """
    flags = {module: module.training for module in model.modules()}
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        model.eval()
        with torch.no_grad(), _random_states_kept(model), _buffers_kept(model):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, flag in flags.items():
            module.training = flag


@contextmanager
def _random_states_kept(model: nn.Module) -> Iterator[None]:
    gpus = sorted({tensor.device.index or 0 for tensor in model.parameters() if tensor.device.type == "cuda"})
    python, arrays = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=gpus):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)


@contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    before = [(buffer, buffer.detach().clone()) for buffer in model.buffers() if _is_plain(buffer)]
    try:
        yield
    finally:
        for buffer, value in before:
            if buffer.shape == value.shape and not torch.equal(buffer, value):
                buffer.copy_(value)


def _is_plain(buffer: Tensor) -> bool:
    if isinstance(buffer, UninitializedBuffer):
        return False
    return buffer.layout == torch.strided and not (buffer.is_meta or buffer.is_inference())


def call(model: nn.Module, inputs: Inputs, *, what: str = "example_inputs", hint: str = "") -> Any:
    """Call the model on its own device with copies of the inputs, which it may write to.

    Args:
        model: The model.
        inputs: What it is given.
        what: Names the inputs in the message.
        hint: What to do about it, for the message.

    Raises:
        ModelError: the model does not accept these inputs.
    """
    try:
        own = to_device(inputs, device_of(model), copy=True)
        return model(*own.args, **own.kwargs)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{type(model).__name__} cannot run {what} ({inputs.describe()}): {reason}."
            f"{hint or ' Give inputs as the model takes them.'}"
        ) from error


def require_repeatable(model: nn.Module, inputs: Inputs) -> None:
    """Run the model twice and compare its outputs, up to the rounding of kernels that sum in any order.

    Raises:
        ModelError: the outputs differ; the message names the first module whose outputs do although its inputs do not.
    """
    _require_values(model)
    with evaluating(model):
        if _alike(call(model, inputs), call(model, inputs)):
            return
        first = _first_difference(model, inputs)
    raise ModelError(
        f"{type(model).__name__} is not repeatable: two passes over the same example_inputs differ{first}; "
        "turn dropout and noise off in evaluation mode, and keep no state from one pass to the next"
    )


def _first_difference(model: nn.Module, inputs: Inputs) -> str:
    """`, first in 'name' (Type)` for the innermost, earliest module that differs by itself; empty if none does."""
    with _recording(model) as one:
        call(model, inputs)
    with _recording(model) as other:
        call(model, inputs)
    for key, (given, made) in one.items():
        if key in other and _alike(given, other[key][0]) and not _alike(made, other[key][1]):
            module = model.get_submodule(key[0])
            return f", first in {key[0]!r} ({type(module).__name__})" if key[0] else ", first in its own forward"
    return ""


_Record = dict[tuple[str, int], tuple[list[Tensor], list[Tensor]]]
"""By a module's name and the number of the call: copies of the tensors it was given and of those it gave."""


@contextmanager
def _recording(model: nn.Module) -> Iterator[_Record]:
    """Record every call of every module, in the order in which the calls end: an inner one before the one around it."""
    record: _Record = {}
    calls: dict[str, int] = {}
    begun: list[list[Tensor]] = []

    def begin(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        begun.append(_copies((args, kwargs)))

    def end(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            calls[name] = calls.get(name, 0) + 1
            record[name, calls[name]] = (begun.pop(), _copies(output))

        return hook

    handles = []
    for name, module in model.named_modules():
        if not isinstance(module, torch.jit.ScriptModule):
            handles.append(module.register_forward_pre_hook(begin, prepend=True, with_kwargs=True))
            handles.append(module.register_forward_hook(end(name)))
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()


def _copies(value: Any) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in tensors(value)]


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor and float in `value`, at any depth of tuples, lists, mappings and dataclasses."""
    if isinstance(value, float):
        yield torch.tensor(value)
    elif isinstance(value, Tensor):
        yield from value.unbind() if value.is_nested else (value,)
    elif isinstance(value, Mapping):
        yield from tensors(list(value.values()))
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors(item)
    elif is_dataclass(value):
        yield from tensors([getattr(value, field.name, None) for field in fields(value)])


def _alike(one: Any, other: Any) -> bool:
    """Whether all tensors in two values agree to 1e-4 of their largest entry; NaN and infinity equal themselves."""
    left, right = list(tensors(one)), list(tensors(other))
    return len(left) == len(right) and all(map(_close, left, right))


def _close(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    tolerance = max(1e-4, 2 * torch.finfo(one.dtype).eps) if one.is_floating_point() else 1e-4
    one, other = _plain(one), _plain(other)
    if not (one.is_floating_point() or one.is_complex()):
        return torch.equal(one, other)
    scale = one.abs().nan_to_num(0.0, 0.0, 0.0).max() if one.numel() else 0.0
    same = (one == other) | (one.isnan() & other.isnan())
    return bool((same | ((one - other).abs() <= tolerance * scale)).all())


def _plain(tensor: Tensor) -> Tensor:
    """A dense tensor whose number type has all operations."""
    tensor = tensor.dequantize() if tensor.is_quantized else tensor.detach()
    tensor = tensor if tensor.layout == torch.strided else tensor.to_dense()
    return tensor.float() if tensor.is_floating_point() and tensor.itemsize < 4 else tensor


def _require_values(model: nn.Module) -> None:
    """Refuse a model with weights that were never loaded, before running it makes some up."""
    known = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    lazy = [name for name, one in known.items() if isinstance(one, UninitializedParameter | UninitializedBuffer)]
    if lazy:
        raise ModelError(
            f"{lazy[0]} of {type(model).__name__} has no shape yet; run the model once, then load or train its weights"
        )
    empty = [name for name, one in known.items() if one.is_meta]
    if empty:
        raise ModelError(
            f"{len(empty)} of the {len(known)} tensors of {type(model).__name__} have no values (they are on the "
            f"meta device), first {empty[0]!r}; load the weights first"
        )


WATCHED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d)


@contextmanager
def watching(model: nn.Module, watch: Callable[[str, nn.Module, Tensor, Tensor], None]) -> Iterator[None]:
    """Call `watch(name, layer, input, output)` after each call of a Linear or convolution, in execution order.

    Raises:
        ModelError: the model has weights without values.
    """
    _require_values(model)
    handles = []

    def observe(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None]:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            given = args[0] if args else kwargs.get("input")
            if isinstance(given, Tensor) and isinstance(output, Tensor):
                watch(name, layer, given, output)

        return hook

    for name, module in model.named_modules():
        if isinstance(module, WATCHED):
            handles.append(module.register_forward_hook(observe(name), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Trace:
    """What one forward pass did, by layer name in order of first call.

    Attributes:
        positions: How many vectors each layer handled in all its calls together.
        calls: How often each layer was called.
    """

    positions: Mapping[str, Positions]
    calls: Mapping[str, int]


def trace(model: nn.Module, inputs: Inputs) -> Trace:
    """Run the model once and record which Linear and convolution layers are called, in which order and how much."""
    positions: dict[str, Positions] = {}
    calls: dict[str, int] = {}

    def watch(name: str, layer: nn.Module, given: Tensor, output: Tensor) -> None:
        positions[name] = positions.get(name, Positions()) + _positions(layer, given, output)
        calls[name] = calls.get(name, 0) + 1

    with evaluating(model), watching(model, watch):
        call(model, inputs)
    return Trace(positions, calls)


def _positions(layer: nn.Module, given: Tensor, output: Tensor) -> Positions:
    if isinstance(layer, nn.Linear):
        vectors = output.numel() // max(layer.out_features, 1)
        return Positions(vectors, vectors, vectors)
    assert isinstance(layer, nn.Conv1d | nn.Conv2d | nn.ConvTranspose2d)
    made, taken = output.numel() // layer.out_channels, given.numel() // layer.in_channels
    return Positions(made, made // max(output.shape[-1], 1) * given.shape[-1], taken)


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, tuple | list):
        return f"{type(value).__name__}({', '.join(map(_describe, value))})"
    return type(value).__name__
