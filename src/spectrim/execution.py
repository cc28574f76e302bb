"""Running a user's model without leaving a trace in it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.errors import DataError, ModelError
from spectrim.forms import Positions


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


def to_device(value: Any, device: torch.device) -> Any:
    """`value` with every tensor in it, at any depth of tuples, lists and mappings, on `device`."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Inputs):
        return Inputs(to_device(value.args, device), to_device(value.kwargs, device))
    if isinstance(value, Mapping):
        return {key: to_device(item, device) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(to_device(item, device) for item in value) if type(value) in (tuple, list) else value
    return value


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients and no shortcut kernels that bypass layers; everything is put back afterwards.

    The random state is put back as well, so that a model that draws numbers does not change the caller's next ones.
    """
    flags = {module: module.training for module in model.modules()}
    fast = torch.backends.mha.get_fastpath_enabled()
    devices = [device_of(model).index or 0] if device_of(model).type == "cuda" else []
    torch.backends.mha.set_fastpath_enabled(False)
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, flag in flags.items():
            module.training = flag


def call(model: nn.Module, inputs: Inputs, *, what: str = "example_inputs", hint: str = "") -> Any:
    """Call the model on its own device; `what` names the inputs in the message.

    Raises:
        ModelError: the model does not accept these inputs.
    """
    moved = to_device(inputs, device_of(model))
    try:
        return model(*moved.args, **moved.kwargs)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{type(model).__name__} cannot run {what} ({inputs.describe()}): {reason}."
            f"{hint or ' Give inputs as the model takes them.'}"
        ) from error


WATCHED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d)


@contextmanager
def watching(model: nn.Module, watch: Callable[[str, nn.Module, Tensor, Tensor], None]) -> Iterator[None]:
    """Call `watch(name, layer, input, output)` after each call of a Linear or convolution, in execution order."""
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
