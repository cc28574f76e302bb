"""One pass through a network in which parts of it give what is known of an earlier pass instead of running."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from spectrim.core.execution import Inputs
from spectrim.core.nested import map_tensors, size_of, tensors

Key = tuple[str, int]
"""A module's name, or of what arrives in a chain `NAME..PLACE`, and the number of the call within one pass."""

Outputs = dict[Key, Any]
"""Tensors, or tuples of tensors and None."""


@dataclass(eq=False)
class RecordedPass:
    """Inputs, what the network and its blocks give for them, and by block the outermost ones that finish before it."""

    inputs: Inputs
    expected: Any = None
    outputs: Outputs = field(default_factory=dict)
    before: dict[Key, list[Key]] = field(default_factory=dict)
    finished: list[Key] = field(default_factory=list)
    calls: Counter[str] = field(default_factory=Counter)

    def forward_of(self, name: str, module: nn.Module) -> Callable[..., Any]:
        """What a block is to run in place of its forward pass."""
        return partial(self.forward, name, module.forward)

    def forward(self, name: str, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """In place of a block's forward pass: the pass itself."""
        key, inside = (name, self.calls[name]), len(self.finished)
        self.calls[name] += 1
        output = original(*args, **kwargs)
        if _is_storable(output):
            self.outputs[key], self.before[key] = copied(output), self.finished[:inside]
            self.finished[inside:] = [key]
        return output


@dataclass(eq=False)
class Pass:
    """One pass: what was known before, and which blocks have finished, outermost ones only.

    Attributes:
        known: By block and call its output; by child of a chain and call what arrives there.
        free_bytes: That an output may take.
        frontiers: Blocks after which nothing reads what is before.
        chains: Blocks, and the whole network (""), that give their input to one child after the other.
        finished: What is known after the pass.
        final: Whether what finishes now is final.
        calls: How often each block was called.
        arrived: In a chain, where the pass is, what arrived there, and the calls before the chain.
        inner_calls: How often blocks are called within what is known, so that calls are counted as if it ran.
    """

    known: Outputs
    free_bytes: int
    frontiers: frozenset[str] = frozenset()
    chains: frozenset[str] = frozenset()
    finished: list[tuple[Key, Any]] = field(default_factory=list)
    final: bool = True
    calls: Counter[str] = field(default_factory=Counter)
    arrived: tuple[str, Key, Any, Counter[str]] | None = None
    inner_calls: dict[Key, Counter[str]] = field(default_factory=dict)

    def forward_of(self, name: str, module: nn.Module) -> Callable[..., Any]:
        """What a block or a chain is to run in place of its forward pass."""
        if name not in self.chains:
            return partial(self.forward, name, module.forward)
        chain = partial(self.chain, name, tuple(cast(nn.Sequential, module)))
        return partial(self.forward if name else self.whole, name, chain)

    def stop(self) -> None:
        """What finishes from here on is not final, and nothing is recalled any more."""
        if self.final and self.arrived:
            name, key, x, before = self.arrived
            self.inner_calls[key] = self.calls - before
            if _is_storable(x) and bytes_of(x) <= self.free_bytes:
                self.finished = [*self._before(name, self.finished), (key, copied(x))]
            elif start := self._start(name, key[1]):
                self.finished = [*self._before(name, self.finished), (start, self.known[start])]
        self.final = False

    def forward(self, name: str, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """In place of a block's forward pass: the known output of this call, or the pass itself."""
        key, inside = (name, self.calls[name]), len(self.finished)
        self.calls[name] += 1
        before, is_known = self.calls.copy(), self.final and key in self.known
        # copies, since what follows may work in place
        output = copied(self.known[key]) if is_known else original(*args, **kwargs)
        if is_known:
            self.calls += self.inner_calls.get(key, Counter())
        self.inner_calls[key] = self.calls - before
        if is_known:
            self.finished[inside:] = [(key, self.known[key])]
        elif self.final and _is_storable(output):
            if bytes_of(output) > self.free_bytes:
                self.finished.append((key, Unkept(forgotten(output))))  # those inside are kept in its place
                return output
            self.finished = [*self._before(name, self.finished[:inside]), (key, copied(output))]
        return output

    def whole(self, name: str, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """In place of the whole network's forward pass: the pass itself."""
        self.calls[name] += 1
        return original(*args, **kwargs)

    def chain(self, name: str, children: Sequence[nn.Module], input: Any) -> Any:  # noqa: A002  # as in torch
        """The forward pass of an `nn.Sequential`, from the child on of which is known what arrives there."""
        call, before = self.calls[name] - 1, self.calls.copy()
        start = self._start(name, call) if self.final else None
        first, x = (int(start[0].removeprefix(f"{name}..")), copied(self.known[start])) if start else (0, input)
        self.calls += self.inner_calls[start] if start else Counter()
        for place, child in enumerate(children[first:], first):
            self.arrived = (name, (f"{name}..{place}", call), x, before) if self.final else None
            x = child(x)
        self.arrived = None
        return x

    def _start(self, name: str, call: int) -> Key | None:
        return next((key for key in self.known if key[1] == call and key[0].startswith(f"{name}..")), None)

    def _before(self, name: str, finished: Sequence[tuple[Key, Any]]) -> list[tuple[Key, Any]]:
        """What was finished before; once it takes no bytes, there are enough for what comes now, which is then kept."""
        return [(key, forgotten(value)) if name in self.frontiers else (key, value) for key, value in finished]


@dataclass(frozen=True, eq=False)
class Unkept:
    """An output for which there are not enough bytes: what stands for it where it need not be known any more."""

    forgotten: Any


def is_equal(first: Any, second: Any) -> bool:
    """Whether two nested results have the same tensors."""
    pairs = [list(tensors(value)) for value in (first, second)]
    return len(pairs[0]) == len(pairs[1]) and all(map(torch.equal, *pairs))


def _is_storable(output: Any) -> bool:
    parts = output if type(output) is tuple else (output,)
    return any(isinstance(part, Tensor) for part in parts) and all(
        part is None or (isinstance(part, Tensor) and part.layout == torch.strided and not part.is_nested)
        for part in parts
    )


def copied(output: Any) -> Any:
    """The same with tensors of its own, without a history."""
    return map_tensors(output, lambda tensor: tensor if isinstance(tensor, _Forgotten) else tensor.detach().clone())


class ForgottenOutputError(BaseException):
    """A pass reads an output that was not kept. Not an Exception, so that no model catches it."""


class _Forgotten(Tensor):
    """In the place of an output that is not kept: it has a shape and a type, and takes no memory."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") not in _SHAPES:
            raise ForgottenOutputError(f"{func} reads an output that was not kept")
        return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]


_SHAPES = {"__get__", "size", "dim", "numel", "stride", "element_size", "__len__", "is_floating_point", "is_complex"}
"""What does not look at values; `__get__` is that of attributes such as `shape`."""


def forgotten(output: Any) -> Any:
    """What stands for an output that need not be known."""
    if isinstance(output, Unkept):
        return output.forgotten
    if _is_forgotten(output):
        return output
    return map_tensors(output, lambda tensor: tensor.new_zeros(()).expand(tensor.shape).as_subclass(_Forgotten))


def _is_forgotten(output: Any) -> bool:
    return any(isinstance(tensor, _Forgotten) for tensor in tensors(output))


def bytes_of(output: Any) -> int:
    """Bytes of memory; none of what is forgotten."""
    return size_of([tensor for tensor in tensors(output) if not isinstance(tensor, _Forgotten)])
