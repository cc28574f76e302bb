"""What lies between layers as a function of its own: the calls of one pass, repeated on other values."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from spectrim.core.execution import Inputs, call, evaluating, temporary
from spectrim.core.nested import map_tensors, operands

FunctionBetween = Callable[[Sequence[Tensor]], Tensor]
"""From the outputs of the layers before, in their order, to the input of the layer after."""


def functions_between(
    model: nn.Module, inputs: Inputs, feeders: Mapping[str, Sequence[str]]
) -> dict[str, FunctionBetween]:
    """By layer, its input as a function of the outputs of its feeders, the layers called right before it.

    The calls depend on the values that they were recorded with in other ways as well (sizes, masks), so that what the
    function gives has to be compared with what the network does.
    """
    recorder = _Recorder()
    hooks = []
    for name, own in feeders.items():
        for feeder in own:
            hooks.append(model.get_submodule(feeder).register_forward_hook(partial(recorder.begin, name, feeder)))
        hooks.append(model.get_submodule(name).register_forward_pre_hook(partial(recorder.end, name, own)))
    with evaluating(model), temporary(hooks), recorder:
        call(model, inputs)
    return {name: recorder.functions[name] for name in feeders if name in recorder.functions}


@dataclass(frozen=True, eq=False)
class _Call:
    """A function, what it was called with, and what it gave, which may be one of its arguments, written to."""

    function: Callable[..., Any]
    args: Any
    result: Tensor
    in_place: bool


class _Recorder(TorchFunctionMode):
    """Records the calls that depend on the outputs of feeders."""

    def __init__(self) -> None:
        super().__init__()
        self.functions: dict[str, FunctionBetween] = {}
        self._forget()

    def begin(self, name: str, feeder: str, _: nn.Module, __: Any, output: Tensor) -> None:
        """A feeder of the layer `name` gave this."""
        if name != self.name:
            self._forget(name)
        self.outputs[feeder] = output
        self.dependent.add(id(output))

    def end(self, name: str, feeders: Sequence[str], _: nn.Module, args: tuple[Any, ...]) -> None:
        """The layer after them receives this."""
        if name == self.name and self.outputs.keys() == set(feeders) and args and id(args[0]) in self.dependent:
            outputs = tuple(self.outputs[feeder] for feeder in feeders)
            self.functions[name] = _Replay(outputs, tuple(self.calls), args[0])
        self._forget()

    def _forget(self, name: str = "") -> None:
        self.name, self.outputs = name, dict[str, Tensor]()
        self.calls, self.dependent = list[_Call](), set[int]()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        used = {id(operand) for operand in operands(args, kwargs)} & self.dependent if self.dependent else set()
        result = func(*args, **kwargs)
        if used and isinstance(result, Tensor):
            self.calls.append(_Call(func, (args, kwargs), result, in_place=id(result) in used))
            self.dependent.add(id(result))
        return result


@dataclass(frozen=True, eq=False)
class _Replay:
    """The recorded calls, done anew on other outputs of the feeders."""

    outputs: tuple[Tensor, ...] = field(repr=False)
    calls: tuple[_Call, ...] = field(repr=False)
    end: Tensor = field(repr=False)

    def __call__(self, values: Sequence[Tensor]) -> Tensor:
        now = {id(output): value for output, value in zip(self.outputs, values, strict=True)}
        for done in self.calls:
            if done.in_place:  # what derivatives are made of must stay as it is
                now[id(done.result)] = now[id(done.result)].clone()
            args, kwargs = map_tensors(done.args, lambda tensor: now.get(id(tensor), tensor))
            now[id(done.result)] = done.function(*args, **kwargs)
        return now[id(self.end)]
