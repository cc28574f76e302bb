"""Repeated passes over the same beginning of a network, without computing it each time."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.core.errors import ModelError
from spectrim.core.execution import Inputs, call, evaluating, temporary
from spectrim.core.memory import free_bytes
from spectrim.core.nested import map_tensors, tensors
from spectrim.layers.factored import is_low_rank
from spectrim.layers.types import find_layer_type

DEFAULT_BYTES, _MOST_BYTES, _OF_FREE = 2**29, 2**30, 8
"""Bytes of activations kept to save time, if nothing else is said: 512 MiB, and where an eighth of the memory that is
free is more, that, up to 1 GiB."""

_TRIED, _TRIED_PLACES = 2, 8
"""Samples on which the blocks are tried, and numbers of a sequence."""

_Key = tuple[str, int]
"""A module's name, and the number of the call within one pass."""

_Outputs = dict[_Key, Any]
"""Tensors, or tuples of tensors and None."""


@dataclass(frozen=True)
class _Blocks:
    """What was learnt about the blocks of a network, by trying.

    Attributes:
        recallable: Those whose output may be recalled.
        frontiers: Those of them after which nothing reads the outputs of blocks before, so that these may be forgotten.
    """

    recallable: frozenset[str] = frozenset()
    frontiers: frozenset[str] = frozenset()


@dataclass(eq=False)
class ActivationCache:
    """Outputs of the parts of a network that will not change any more, by batch.

    If layers are worked on in execution order, whatever a pass has finished before the layer at hand is final. The
    outputs of modules made of modules (blocks, stages) are kept as long as the bytes suffice; on the next pass these
    modules return what is kept instead of running. So do modules beside the outermost blocks that are no layers.

    A block that does more than give an output (it runs hooks, writes to its input or to what others read) has to run.
    So each block is tried: with its output recalled, the network must give what it gives with the block run. Where it
    gives the same and reads none of the outputs before, as in a chain of blocks, these are not kept. A later pass that
    reads one all the same, as on other data, ends with `ForgottenOutputError`.

    Attributes:
        model: The network, whose layers may be exchanged between passes.
        free_bytes: Bytes that may still be kept.
        tried_on: Inputs to try the blocks on; without them no block is recalled.
        forgets: Whether outputs may be forgotten.
    """

    model: nn.Module
    free_bytes: int
    tried_on: Inputs | None
    forgets: bool = True
    _outputs: dict[int, _Outputs] = field(default_factory=dict)

    def of(
        self,
        model: nn.Module,
        *,
        never: frozenset[str] = frozenset(),
        forgets: bool = True,
        free_bytes: int | None = None,
    ) -> "ActivationCache":
        """A cache, by default of as many bytes, for another network with the same blocks; some are to run each time."""
        allowed = self.free_bytes if free_bytes is None else free_bytes
        other = ActivationCache(model, allowed, self.tried_on, self.forgets and forgets)
        frontiers = self._blocks.frontiers - never if other.forgets else frozenset[str]()
        other.__dict__["_blocks"] = _Blocks(self._blocks.recallable - never, frontiers)
        return other

    @property
    def blocks(self) -> frozenset[str]:
        """Names of the blocks that may be recalled."""
        return self._blocks.recallable

    @cached_property
    def _blocks(self) -> _Blocks:
        if self.tried_on is None or self.free_bytes <= 0:
            return _Blocks()
        if self.tried_on.is_ragged or any(tensor.layout != torch.strided for tensor in self.tried_on.tensors()):
            return _Blocks()  # such inputs cannot be cut or rolled
        names = [name for name, module in self.model.named_modules() if name and _is_block(module)]
        names += _beside_blocks(self.model)
        names.sort(key=lambda name: name.count("."), reverse=True)
        with evaluating(self.model), suppress(ModelError):
            # a block is tried after a pass on other inputs, so that what it left to others is not what it leaves now
            turns = [self._recorded(inputs, names) for inputs in self._pair(self.tried_on)]
            recallable = frozenset(name for name in names if self._is_recallable(name, turns))
            turns = [self._recorded(turn.inputs, recallable) for turn in turns]
            frontiers = (name for name in recallable if self.forgets and self._is_frontier(name, turns))
            return _Blocks(recallable, frozenset(frontiers))
        return _Blocks()

    def _pair(self, inputs: Inputs) -> tuple[Inputs, Inputs]:
        """A few of the samples, and of the numbers of a sequence, if the network takes them, and others like them."""
        for size in (slice(_TRIED_PLACES), slice(None)):
            few = inputs.map(partial(_first, places=size))
            others = few.map(_exchanged)
            with suppress(ModelError):
                if not _equal(few.tensors(), others.tensors()):
                    call(self.model, few)
                    call(self.model, others)
                    return few, others
        return inputs, inputs.map(_exchanged)

    def _recorded(self, inputs: Inputs, names: Collection[str]) -> "_RecordedPass":
        """A pass in which all blocks run."""
        recorded = _RecordedPass(inputs)
        with self._following(recorded, names):
            recorded.expected = call(self.model, inputs)
        return recorded

    def _is_recallable(self, name: str, turns: "list[_RecordedPass]") -> bool:
        """Whether the network gives the same with a block's output recalled; exchanges the passes."""
        recorded, other = turns
        known = {key: output for key, output in recorded.outputs.items() if key[0] == name}
        if not known or max(map(_size, known.values())) > self.free_bytes:
            return False
        if any(key not in other.outputs or _equal(output, other.outputs[key]) for key, output in known.items()):
            return False  # what it leaves to others may be the same as well
        try:
            if any(key[0].startswith(f"{name}.") for key in recorded.outputs):
                call(self.model, other.inputs)  # in the pass before, one of the blocks in this one may not have run
        except ModelError:
            return False
        turns.reverse()
        return self._is_same(recorded, known)

    def _is_frontier(self, name: str, turns: "list[_RecordedPass]") -> bool:
        """Whether the network gives the same with a block's output recalled, and reads none of the blocks before."""
        recorded = turns[0]
        key = (name, 0)
        if key not in recorded.before or (name, 1) in recorded.before:
            return False
        turns.reverse()
        forgotten = {earlier: _forgotten(recorded.outputs[earlier]) for earlier in recorded.before[key]}
        return bool(forgotten) and self._is_same(recorded, {**forgotten, key: recorded.outputs[key]})

    def _is_same(self, recorded: "_RecordedPass", known: _Outputs) -> bool:
        try:
            with self._following(_Pass(known, self.free_bytes), {name for name, _ in known}):
                return _equal(recorded.expected, call(self.model, recorded.inputs))
        except (ModelError, ForgottenOutputError):
            return False

    @contextmanager
    def recalling(self, batch: int) -> Iterator[Callable[[], None]]:
        """Run the network on the batch of this number within this; call what it gives where finality ends."""
        blocks, known = self._blocks, self._outputs.get(batch, {})
        # what is known of this batch may be exchanged for what comes after it
        run = _Pass(known, self.free_bytes + sum(map(_size, known.values())), blocks.frontiers)
        try:
            with self._following(run, blocks.recallable):
                yield run.stop
        finally:
            if not run.final:  # a pass that never came to the layer at hand says nothing of what is final
                self._keep(batch, run)

    @contextmanager
    def _following(self, run: "_Pass | _RecordedPass", blocks: Collection[str]) -> Iterator[None]:
        replaced = []
        try:
            for name, module in list(self.model.named_modules()):
                if name in blocks and not is_low_rank(module):
                    replaced.append((module, module.__dict__.get("forward")))
                    module.__dict__["forward"] = partial(run.forward, name, module.forward)
            yield
        finally:
            for module, forward in replaced:
                del module.__dict__["forward"]
                if forward is not None:
                    module.__dict__["forward"] = forward

    def _keep(self, batch: int, run: "_Pass") -> None:
        if not run.finished:
            return
        self.free_bytes += sum(map(_size, run.known.values()))
        self._outputs[batch] = {}
        # those that are known already first, since there were bytes for them
        for key, output in sorted(run.finished, key=lambda entry: entry[0] not in run.known):
            if not isinstance(output, _Unkept) and (key in run.known or _size(output) <= self.free_bytes):
                self._outputs[batch][key] = output
                self.free_bytes -= _size(output)


@dataclass(eq=False)
class _RecordedPass:
    """Inputs, what the network and its blocks give for them, and by block the outermost ones that finish before it."""

    inputs: Inputs
    expected: Any = None
    outputs: _Outputs = field(default_factory=dict)
    before: dict[_Key, list[_Key]] = field(default_factory=dict)
    finished: list[_Key] = field(default_factory=list)
    calls: Counter[str] = field(default_factory=Counter)

    def forward(self, name: str, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """In place of a block's forward pass: the pass itself."""
        key, inside = (name, self.calls[name]), len(self.finished)
        self.calls[name] += 1
        output = original(*args, **kwargs)
        if _is_storable(output):
            self.outputs[key], self.before[key] = _copied(output), self.finished[:inside]
            self.finished[inside:] = [key]
        return output


@dataclass(eq=False)
class _Pass:
    """One pass: what was known before, and which blocks have finished, outermost ones only."""

    known: _Outputs
    free_bytes: int
    frontiers: frozenset[str] = frozenset()
    finished: list[tuple[_Key, Any]] = field(default_factory=list)
    final: bool = True
    calls: Counter[str] = field(default_factory=Counter)

    def stop(self) -> None:
        """What finishes from here on is not final."""
        self.final = False

    def forward(self, name: str, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """In place of a block's forward pass: the known output of this call, or the pass itself."""
        key, inside = (name, self.calls[name]), len(self.finished)
        self.calls[name] += 1
        # copies, since what follows may work in place
        output = _copied(self.known[key]) if key in self.known else original(*args, **kwargs)
        if self.final and key in self.known:
            self.finished[inside:] = [(key, self.known[key])]
        elif self.final and _is_storable(output):
            if _size(output) > self.free_bytes:
                self.finished.append((key, _Unkept(_forgotten(output))))  # those inside are kept in its place
                return output
            before = self.finished[:inside]
            # once what is before takes no bytes, there are enough for this output, which is then kept
            if name in self.frontiers:
                before = [(earlier, _forgotten(value)) for earlier, value in before]
            self.finished = [*before, (key, _copied(output))]
        return output


@dataclass(frozen=True, eq=False)
class _Unkept:
    """An output for which there are not enough bytes: what stands for it where it need not be known any more."""

    forgotten: Any


def default_bytes() -> int:
    """How many bytes to keep on this machine as it is now."""
    return max(DEFAULT_BYTES, min(_MOST_BYTES, free_bytes(torch.device("cpu")) // _OF_FREE))


def blocks_after_feeders(model: nn.Module, inputs: Inputs, pairs: Iterable[tuple[str, str]]) -> frozenset[str]:
    """Modules that end after the first layer of a pair that is narrowed together, and before the second one begins.

    What they give changes with the first layer, when the second one is worked on. The model is run once.
    """
    spans: dict[str, list[tuple[int, int]]] = {}
    begun: list[int] = []
    clock = count()

    def begin(*_: object) -> None:
        begun.append(next(clock))

    def end(name: str, *_: object) -> None:
        spans.setdefault(name, []).append((begun.pop(), next(clock)))

    pairs = list(pairs)
    named = [pair for pair in model.named_modules() if not isinstance(pair[1], torch.jit.ScriptModule)]
    if not pairs:
        return frozenset()
    hooks = [module.register_forward_pre_hook(begin) for _, module in named]
    hooks += [module.register_forward_hook(partial(end, name)) for name, module in named]
    # inputs that do not fit are told of by the pass that needs them
    with evaluating(model), temporary(hooks), torch.no_grad(), suppress(ModelError):
        call(model, inputs)
    if any(name not in spans for pair in pairs for name in pair):
        return frozenset(name for name, _ in named)
    between = [(spans[feeder][0][1], spans[last][-1][0]) for feeder, last in pairs]
    return frozenset(
        name for name, own in spans.items() if any(low < at < high for _, at in own for low, high in between)
    )


def _equal(first: Any, second: Any) -> bool:
    pairs = [list(tensors(value)) for value in (first, second)]
    return len(pairs[0]) == len(pairs[1]) and all(map(torch.equal, *pairs))


def _is_storable(output: Any) -> bool:
    parts = output if type(output) is tuple else (output,)
    return any(isinstance(part, Tensor) for part in parts) and all(
        part is None or (isinstance(part, Tensor) and part.layout == torch.strided and not part.is_nested)
        for part in parts
    )


def _copied(output: Any) -> Any:
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


def _forgotten(output: Any) -> Any:
    """What stands for an output that need not be known."""
    if isinstance(output, _Unkept):
        return output.forgotten
    if _is_forgotten(output):
        return output
    return map_tensors(output, lambda tensor: tensor.new_zeros(()).expand(tensor.shape).as_subclass(_Forgotten))


def _is_forgotten(output: Any) -> bool:
    return any(isinstance(tensor, _Forgotten) for tensor in tensors(output))


def _size(output: Any) -> int:
    """Bytes of memory; none of what is forgotten."""
    real = (tensor for tensor in tensors(output) if not isinstance(tensor, _Forgotten))
    return sum(tensor.numel() * tensor.element_size() for tensor in real)


def _is_block(module: nn.Module) -> bool:
    return not is_low_rank(module) and next(module.children(), None) is not None


def _beside_blocks(model: nn.Module) -> list[str]:
    """What lies beside the outermost blocks and is no layer, as the pooling after the first layer of a network."""
    path, children = "", dict(model.named_children())
    while len(children) == 1:
        ((name, child),) = children.items()
        path, children = f"{path}{name}.", dict(child.named_children())
    leaves = (name for name, child in children.items() if next(child.children(), None) is None)
    return [f"{path}{name}" for name in leaves if find_layer_type(children[name]) is None]


def _first(tensor: Tensor, places: slice) -> Tensor:
    """A few samples; of matrices of whole numbers, such as tokens and masks, the places as well."""
    if tensor.ndim == 2 and not tensor.is_floating_point():
        return tensor[:_TRIED, places]
    return tensor[:_TRIED] if tensor.ndim else tensor


def _exchanged(tensor: Tensor) -> Tensor:
    """Its values at other places, or those of another sample."""
    turned = (tensor.roll(1, dim) for dim in (-1, 0) if tensor.ndim)
    return next((other for other in turned if not torch.equal(other, tensor)), tensor)
