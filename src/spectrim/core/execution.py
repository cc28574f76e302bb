"""Running a user's model without side effects."""

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.nn.utils.rnn import PackedSequence
from torch.utils.hooks import RemovableHandle

from spectrim.core.errors import FileError, ModelError, ResourceError
from spectrim.core.nested import alike, describe, from_numpy, has_ragged, map_tensors, rows, tensors

LABELS = ("labels", "label")
"""Entries of a mapping that are labels, and no inputs."""

ProgressCallback = Callable[[str, int, int], None]
"""Called with the name of what is done next, how many steps are done, and of how many, or of at least how many."""


@dataclass(frozen=True)
class Inputs:
    """What one call of a model is given.

    Attributes:
        args: Positional arguments.
        kwargs: Those with names.
        mask: Name of the argument (batch, length) that says which positions are tokens, or this mask itself where no
            argument is; None for the usual names.
        channels_last: Whether a call gets images with the channels last in memory, see `ImageLayout`.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    mask: str | Tensor | None = None
    channels_last: bool = False

    def describe(self) -> str:
        """Types and shapes, for messages."""
        named = [describe(value) for value in self.args] + [f"{k}={describe(v)}" for k, v in self.kwargs.items()]
        return ", ".join(named) or "nothing"

    def map(self, change: Callable[[Tensor], Tensor]) -> "Inputs":
        """The same with `change` of every tensor."""
        return replace(self, args=map_tensors(self.args, change), kwargs=map_tensors(dict(self.kwargs), change))

    def tensors(self) -> list[Tensor]:
        """Every tensor, positional arguments first."""
        return list(tensors((self.args, dict(self.kwargs))))

    def rows(self) -> list[Tensor]:
        """Every tensor that has dimensions; nested tensors and packed sequences as matrices of one row a part."""
        return [tensor for tensor in rows((self.args, dict(self.kwargs))) if tensor.ndim]

    @property
    def is_ragged(self) -> bool:
        """Whether there is a nested tensor or a packed sequence, whose samples are of different sizes."""
        return has_ragged((self.args, dict(self.kwargs)))

    @property
    def samples(self) -> int:
        """The size of the first dimension that most tensors have; the smallest of several, and 1 without any.

        Vectors, such as tables, and square matrices, such as masks, count only where there is nothing else. A `mask`
        that is no argument has one row a sample.
        """
        if isinstance(self.mask, Tensor):
            return len(self.mask)
        rows = self.rows()
        likely = [tensor for tensor in rows if tensor.ndim > 2 or len(set(tensor.shape)) == 2]
        sizes = Counter(len(tensor) for tensor in likely or rows if len(tensor))
        most = max(sizes.values(), default=0)
        return min((size for size, number in sizes.items() if number == most), default=0 if rows else 1)

    @property
    def places(self) -> int:
        """Indices in all, of sequences of them (batch, length); else as many as samples."""
        return next((t.numel() for t in self.tensors() if t.ndim == 2 and not t.is_floating_point()), self.samples)

    def parts(self, *, places: int) -> "list[Inputs]":
        """Long sequences in parts of whole samples with about so many places; in one part what cannot be taken splits.

        Sequences are long if four of them have more places than that.
        """
        size = max(1, places * self.samples // max(1, self.places))
        return [self] if 4 * self.places <= places * self.samples else self.split(size)

    @property
    def splits(self) -> bool:
        """Whether it can be told which dimension of each tensor has the samples."""
        shapes, samples = [tensor.shape for tensor in self.tensors()], self.samples
        known = all(len(shape) > 1 and shape[0] == samples != shape[1] for shape in shapes)
        known &= all(tensor.layout == torch.strided for tensor in self.tensors())
        return known and not self.is_ragged and not isinstance(self.mask, Tensor)

    def split(self, size: int) -> "list[Inputs]":
        """In parts of so many samples; in one part if it does not split."""
        if self.samples <= size or not self.splits:
            return [self]
        return [self.map(itemgetter(slice(start, start + size))) for start in range(0, self.samples, size)]


def as_inputs(value: Any) -> Inputs:
    """A tensor is the one argument, a tuple or list the positional ones, a mapping the keyword ones.

    NumPy arrays become tensors. Raises `DataError` for an array that holds no numbers.
    """
    if isinstance(value, Inputs):
        return value
    value = from_numpy(value)
    if isinstance(value, Mapping):
        return Inputs((), dict(value))
    if isinstance(value, Sequence) and not isinstance(value, str | PackedSequence):
        return Inputs(tuple(value), {})
    return Inputs((value,), {})


ForwardFunction = Callable[[nn.Module, Any], Any]
"""From a network and one batch of inputs, as they come in the data, to its outputs."""


class Forward(nn.Module):
    """A network that is called by a function of the user's."""

    def __init__(self, model: nn.Module, function: ForwardFunction) -> None:
        super().__init__()
        self.model, self.function = model, function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the function gives for one argument, several as a tuple, or a mapping of those with names."""
        return self.function(self.model, kwargs or (args[0] if len(args) == 1 else args))


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter or buffer lives; the CPU for a model without either."""
    return next((tensor.device for tensor in chain(model.parameters(), model.buffers())), torch.device("cpu"))


def on_device_of(model: nn.Module, inputs: Inputs) -> Inputs:
    """Copies of the inputs where the model is."""
    device = device_of(model)
    if device.type != "meta" and any(tensor.is_meta for tensor in inputs.tensors()):
        raise ModelError(f"the inputs ({inputs.describe()}) are on the meta device, without values; give real ones")

    def copied(tensor: Tensor) -> Tensor:
        order = torch.channels_last if inputs.channels_last and is_image(tensor) else torch.preserve_format
        return tensor.to(device, copy=True, memory_format=order)

    return inputs.map(copied)


def is_image(tensor: Tensor) -> bool:
    """Whether it has the dimensions of a batch of images, (batch, channels, height, width), of fractions."""
    return tensor.ndim == 4 and tensor.is_floating_point() and tensor.layout == torch.strided


@contextmanager
def temporary(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Remove these hooks afterwards."""
    handles = list(handles)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients and no shortcut kernels that bypass layers; everything is put back afterwards.

    Random states (torch, numpy, Python) are put back as well, so that a model that draws numbers does not change the
    caller's next ones, and so are buffers that the model's forward pass writes to or exchanges.
    """
    flags = {module: module.training for module in model.modules()}
    fast = torch.backends.mha.get_fastpath_enabled()
    gpus = sorted({tensor.device.index or 0 for tensor in model.parameters() if tensor.device.type == "cuda"})
    python, arrays = random.getstate(), np.random.get_state()
    owned = [(module, dict(module._buffers)) for module in flags if module._buffers]
    dense = (own for own in model.buffers() if not isinstance(own, UninitializedBuffer) and own.layout == torch.strided)
    buffers = [(own, own.detach().clone()) for own in dense if not (own.is_meta or own.is_inference())]
    with torch.no_grad(), torch.random.fork_rng(devices=gpus):
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            model.eval()
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
            for module, flag in flags.items():
                module.training = flag
            random.setstate(python)
            np.random.set_state(arrays)
            for module, own in owned:
                module._buffers.update(own)
            for buffer, value in buffers:
                if buffer.shape == value.shape and not torch.equal(buffer, value):
                    buffer.copy_(value)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter is differentiated, so that less is kept of a forward pass; put back afterwards."""
    # what is made in inference mode cannot be put back
    trained = [own for own in model.parameters() if own.requires_grad and not own.is_inference()]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_()


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
        own = on_device_of(model, inputs)
        return model(*own.args, **own.kwargs)
    except (FileError, ResourceError):  # of a hook that writes or counts, such as statistics on a full disk
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{type(model).__name__} cannot run {what} ({inputs.describe()}): {reason}."
            f"{_conversion(model, inputs, what) + hint or ' Give inputs as the model takes them.'}"
        ) from error


def _conversion(model: nn.Module, inputs: Inputs, what: str) -> str:
    """What of these inputs the model can run, as an expression for a message; empty if none of the usual ones is."""
    name = "example_inputs" if what == "example_inputs" else "inputs"
    first, conversions = next(iter(inputs.args), None), list[tuple[str, Callable[[], Inputs]]]()
    if inputs.kwargs:
        names = [key for key in inputs.kwargs if key not in LABELS]
        named = f"{{name: {name}[name] for name in {names}}}"
        conversions = [(named, lambda: Inputs((), {key: inputs.kwargs[key] for key in names}))]
        conversions += [(f"({name},)", lambda: Inputs((inputs.kwargs,), {}))]
        values = [key for key in names if "mask" not in key]
        conversions += [(f"{name}[{key!r}]", partial(as_inputs, inputs.kwargs[key])) for key in values]
    elif isinstance(first, Tensor):
        dtype = next((weight.dtype for weight in model.parameters() if weight.is_floating_point()), first.dtype)
        text = f"{name}[0]" if len(inputs.args) > 1 else f"torch.as_tensor({name})"
        if first.dtype != dtype and not first.is_complex():
            scale = 255 if first.dtype == torch.uint8 else 1
            first, text = first.to(dtype) / scale, f"{text}.to({dtype})" + (" / 255" if scale > 1 else "")
        conversions = [(text, lambda: as_inputs(first))]
        if first.ndim == 3:  # images without the dimension of their one channel, or one image
            conversions.append((f"({text})[:, None]", lambda: as_inputs(first[:, None])))
        conversions.append((f"({text})[None]", lambda: as_inputs(first[None])))
        conversions += [(f"({text}).movedim(-1, 1)", lambda: as_inputs(first.movedim(-1, 1)))]
    for expression, converted in conversions:
        with suppress(Exception), evaluating(model):
            own = on_device_of(model, converted())
            model(*own.args, **own.kwargs)
            return f" It can run {expression}" + (", normalised as in training." if "255" in expression else ".")
    return ""


def require_repeatable(model: nn.Module, inputs: Inputs) -> None:
    """Run the model twice and compare its outputs, up to the rounding of kernels that sum in any order.

    Raises:
        ModelError: the outputs differ; the message names the first module whose outputs do although its inputs do not.
    """
    require_values(model)
    with evaluating(model):
        if alike(call(model, inputs), call(model, inputs)):
            return
        first = _first_difference(model, inputs)
    raise ModelError(
        f"{type(model).__name__} is not repeatable: two passes over the same example_inputs differ{first}; "
        "turn dropout and noise off in evaluation mode, and keep no state from one pass to the next"
    )


def _first_difference(model: nn.Module, inputs: Inputs) -> str:
    """`, first in 'name' (Type)` for the innermost, earliest module that differs by itself; empty if none does."""
    first, second = _recorded(model, inputs), _recorded(model, inputs)
    for key, (received, returned) in first.items():
        if key in second and alike(received, second[key][0]) and not alike(returned, second[key][1]):
            module = model.get_submodule(key[0])
            return f", first in {key[0]!r} ({type(module).__name__})" if key[0] else ", first in its own forward"
    return ""


_Record = dict[tuple[str, int], tuple[list[Tensor], list[Tensor]]]
"""By a module's name and the number of the call: copies of the tensors that it received and returned."""


def _recorded(model: nn.Module, inputs: Inputs) -> _Record:
    """Every call of every module, in the order in which the calls end: an inner one before the one around it."""
    record: _Record = {}
    calls: Counter[str] = Counter()
    received: list[list[Tensor]] = []

    def begin(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        received.append(_copies((args, kwargs)))

    def end(name: str, _: nn.Module, __: Any, output: Any) -> None:
        calls[name] += 1
        record[name, calls[name]] = (received.pop(), _copies(output))

    handles = []
    for name, module in model.named_modules():
        if not isinstance(module, torch.jit.ScriptModule):
            handles.append(module.register_forward_pre_hook(begin, prepend=True, with_kwargs=True))
            handles.append(module.register_forward_hook(partial(end, name)))
    with temporary(handles):
        call(model, inputs)
    return record


def _copies(value: Any) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in tensors(value, floats=True)]


_WRAPPERS = {
    **dict.fromkeys(("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel"), ("module", "wrap")),
    "OptimizedModule": ("_orig_mod", "compile"),
}
"""By class: where the model is that it wraps, and what makes such a one."""


def require_unwrapped(model: nn.Module) -> None:
    """Raise `ModelError` for modules whose layers are not called one by one, or whose replacement others would miss.

    These are wrappers for several processes, which keep a list of the parameters, compiled models, which run no
    hooks, and TorchScript.
    """
    if isinstance(model, torch.jit.ScriptModule):
        advice = "give the module it was made from, filled: network.load_state_dict(model.state_dict())"
        raise ModelError(f"the model is TorchScript, whose layers cannot be replaced; {advice}")
    for name, module in model.named_modules():
        where = f"the model's {name!r}" if name else "the model"
        path = f"model.{name}" if name else "model"
        wrapper = next((base.__name__ for base in type(module).__mro__ if base.__name__ in _WRAPPERS), None)
        if wrapper is not None:
            inner, make = _WRAPPERS[wrapper]
            raise ModelError(
                f"{where} is of class {wrapper}; give what it wraps, {path}.{inner}, and {make} that again"
            )
        if getattr(module, "_compiled_call_impl", None) is not None:
            raise ModelError(
                f"{where} is compiled (by its compile method), and its layers cannot be followed; set "
                f"{path}._compiled_call_impl = None, and compile the result again"
            )


def require_shapes(model: nn.Module) -> None:
    """Raise `ModelError` for lazy weights, which the first run of the model would initialise."""
    known = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    lazy = [name for name, tensor in known.items() if isinstance(tensor, UninitializedParameter | UninitializedBuffer)]
    if lazy:
        raise ModelError(
            f"{lazy[0]} of {type(model).__name__} has no shape yet; run the model once, then load or train its weights"
        )


def require_values(model: nn.Module) -> None:
    """Raise `ModelError` for weights that were never loaded."""
    require_shapes(model)
    known = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    empty = [name for name, tensor in known.items() if tensor.is_meta]
    if empty:
        raise ModelError(
            f"{len(empty)} of the {len(known)} tensors of {type(model).__name__} have no values (they are on the "
            f"meta device), first {empty[0]!r}; load the weights first"
        )
