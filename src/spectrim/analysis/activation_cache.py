"""Repeated passes over the same beginning of a network, without computing it each time."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import count

import torch
from torch import Tensor, nn

from spectrim.analysis.recalled_pass import (
    ForgottenOutputError,
    Key,
    Outputs,
    Pass,
    RecordedPass,
    Unkept,
    bytes_of,
    forgotten,
    is_equal,
)
from spectrim.core.errors import ModelError
from spectrim.core.execution import Inputs, call, evaluating, temporary
from spectrim.core.memory import free_bytes
from spectrim.layers.factored import is_low_rank
from spectrim.layers.types import find_layer_type

DEFAULT_BYTES, _MOST_BYTES, _OF_FREE = 2**29, 3 * 2**28, 8
"""Bytes of activations kept to save time, if nothing else is said: 512 MiB, and where an eighth of the memory that is
free is more, that, up to 768 MiB."""

_TRIED, _TRIED_PLACES = 2, 8
"""Samples on which the blocks are tried, and numbers of a sequence."""


@dataclass(frozen=True)
class _Blocks:
    """What was learnt about the blocks of a network, by trying.

    Attributes:
        recallable: Those whose output may be recalled.
        frontiers: Those of them after which nothing reads the outputs of blocks before, so that these may be forgotten.
        chains: Those of them, and the whole network (""), that are an `nn.Sequential` which may begin at any child.
    """

    recallable: frozenset[str] = frozenset()
    frontiers: frozenset[str] = frozenset()
    chains: frozenset[str] = frozenset()


@dataclass(eq=False)
class ActivationCache:
    """Outputs of the parts of a network that will not change any more, by batch.

    If layers are worked on in execution order, whatever a pass has finished before the layer at hand is final. The
    outputs of modules made of modules (blocks, stages) are kept as long as the bytes suffice; on the next pass these
    modules return what is kept instead of running. So do modules beside the outermost blocks that are no layers. In an
    `nn.Sequential` of torch's own modules what arrives at the layer at hand is kept, and the next pass begins there.

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
    _outputs: dict[int, Outputs] = field(default_factory=dict)
    _inner_calls: dict[int, dict[Key, Counter[str]]] = field(default_factory=dict)

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
        chains = (own for own in self._blocks.chains if not any(name.startswith(_inside(own)) for name in never))
        other.__dict__["_blocks"] = _Blocks(self._blocks.recallable - never, frontiers, frozenset(chains))
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
        chains = frozenset(name for name, module in self.model.named_modules() if _is_chain(module))
        names = [name for name, module in self.model.named_modules() if name and _is_block(module)]
        names += [name for name in _beside_blocks(self.model) if name.rpartition(".")[0] not in chains]
        names.sort(key=lambda name: name.count("."), reverse=True)
        with evaluating(self.model), suppress(ModelError):
            # a block is tried after a pass on other inputs, so that what it left to others is not what it leaves now
            turns = [self._recorded(inputs, names) for inputs in self._pair(self.tried_on)]
            recallable = frozenset(name for name in names if self._is_recallable(name, turns))
            turns = [self._recorded(turn.inputs, recallable) for turn in turns]
            frontiers = (name for name in recallable if self.forgets and self._is_frontier(name, turns))
            return _Blocks(recallable, frozenset(frontiers), chains & {*recallable, ""})
        return _Blocks(chains=chains & {""})

    def _pair(self, inputs: Inputs) -> tuple[Inputs, Inputs]:
        """A few of the samples, and of the numbers of a sequence, if the network takes them, and others like them."""
        for size in (slice(_TRIED_PLACES), slice(None)):
            few = inputs.map(partial(_first, places=size))
            others = few.map(_exchanged)
            with suppress(ModelError):
                if not is_equal(few.tensors(), others.tensors()):
                    call(self.model, few)
                    call(self.model, others)
                    return few, others
        return inputs, inputs.map(_exchanged)

    def _recorded(self, inputs: Inputs, names: Collection[str]) -> RecordedPass:
        """A pass in which all blocks run."""
        recorded = RecordedPass(inputs)
        with self._following(recorded, names):
            recorded.expected = call(self.model, inputs)
        return recorded

    def _is_recallable(self, name: str, turns: list[RecordedPass]) -> bool:
        """Whether the network gives the same with a block's output recalled; exchanges the passes."""
        recorded, other = turns
        known = {key: output for key, output in recorded.outputs.items() if key[0] == name}
        if not known or max(map(bytes_of, known.values())) > self.free_bytes:
            return False
        if any(key not in other.outputs or is_equal(output, other.outputs[key]) for key, output in known.items()):
            return False  # what it leaves to others may be the same as well
        try:
            if any(key[0].startswith(f"{name}.") for key in recorded.outputs):
                call(self.model, other.inputs)  # in the pass before, one of the blocks in this one may not have run
        except ModelError:
            return False
        turns.reverse()
        return self._is_same(recorded, known)

    def _is_frontier(self, name: str, turns: list[RecordedPass]) -> bool:
        """Whether the network gives the same with a block's output recalled, and reads none of the blocks before."""
        recorded = turns[0]
        key = (name, 0)
        if key not in recorded.before or (name, 1) in recorded.before:
            return False
        turns.reverse()
        before = {earlier: forgotten(recorded.outputs[earlier]) for earlier in recorded.before[key]}
        return bool(before) and self._is_same(recorded, {**before, key: recorded.outputs[key]})

    def _is_same(self, recorded: RecordedPass, known: Outputs) -> bool:
        try:
            with self._following(Pass(known, self.free_bytes), {name for name, _ in known}):
                return is_equal(recorded.expected, call(self.model, recorded.inputs))
        except (ModelError, ForgottenOutputError):
            return False

    @contextmanager
    def recalling(self, batch: int, *, at_hand: Collection[str]) -> Iterator[Callable[[], None]]:
        """Run the network on the batch of this number within this; call what it gives where finality ends.

        That is at the layers at hand: blocks that have these run, though in other batches they come earlier or later.
        """
        blocks, known = self._blocks, self._outputs.setdefault(batch, {})
        layers = {self.model.get_submodule(name) for name in at_hand}
        for key in [key for key in known if not layers.isdisjoint(self._replaced_by(key))]:
            self.free_bytes += bytes_of(known.pop(key))
        # what is known of this batch may be exchanged for what comes after it
        free_bytes = self.free_bytes + sum(map(bytes_of, known.values()))
        inner_calls = self._inner_calls.setdefault(batch, {})
        run = Pass(known, free_bytes, blocks.frontiers, blocks.chains, inner_calls=inner_calls)
        try:
            with self._following(run, blocks.recallable | blocks.chains):
                yield run.stop
        finally:
            if not run.final:  # a pass that never came to the layer at hand says nothing of what is final
                self._keep(batch, run)

    def _replaced_by(self, key: Key) -> set[nn.Module]:
        """The modules that do not run where what is known of a block, or arrives in a chain, takes their place."""
        name, _, place = key[0].partition("..")
        module = self.model.get_submodule(name)
        parts = list(module._modules.values())[: int(place)] if place else [module]
        return {own for part in parts if part is not None for own in part.modules()}

    @contextmanager
    def _following(self, run: Pass | RecordedPass, blocks: Collection[str]) -> Iterator[None]:
        replaced = []
        try:
            for name, module in list(self.model.named_modules()):
                if name in blocks and not is_low_rank(module):
                    forward = run.forward_of(name, module)
                    replaced.append((module, module.__dict__.get("forward")))
                    module.__dict__["forward"] = forward
            yield
        finally:
            for module, own in replaced:
                del module.__dict__["forward"]
                if own is not None:
                    module.__dict__["forward"] = own

    def _keep(self, batch: int, run: Pass) -> None:
        self.free_bytes += sum(map(bytes_of, run.known.values()))
        self._outputs[batch] = {}
        # those that are known already first, since there were bytes for them
        for key, output in sorted(run.finished, key=lambda entry: entry[0] not in run.known):
            if not isinstance(output, Unkept) and (key in run.known or bytes_of(output) <= self.free_bytes):
                self._outputs[batch][key] = output
                self.free_bytes -= bytes_of(output)


def default_bytes() -> int:
    """How many bytes to keep on this machine as it is now."""
    return max(DEFAULT_BYTES, min(_MOST_BYTES, free_bytes(torch.device("cpu")) // _OF_FREE))


def blocks_after_feeders(model: nn.Module, inputs: Inputs, pairs: Iterable[tuple[str, str]]) -> frozenset[str]:
    """Pairs of layers that are narrowed together, and modules that end after the first and before the second begins.

    What these give changes with the first layer, when the second one is worked on. The model is run once.
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
    after = {name for name, own in spans.items() if any(low < at < high for _, at in own for low, high in between)}
    return frozenset(after.union(*pairs))


def _inside(name: str) -> str:
    """How the names of the modules in one begin."""
    return f"{name}." if name else ""


def _is_chain(module: nn.Module) -> bool:
    """Whether it gives its input to one child after the other, several of them layers, none of which does any more."""
    if type(module) is not nn.Sequential or "forward" in vars(module):
        return False
    layers = sum(is_low_rank(child) or find_layer_type(child) is not None for child in module)
    return layers > 1 and all(_is_function(child) for child in module)


def _is_function(module: nn.Module) -> bool:
    """Whether it is one of torch's own modules without others inside, or a factored layer, and has no hooks."""
    is_known = type(module).__module__.startswith("torch.nn.modules.") and next(module.children(), None) is None
    has_hooks = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return (is_known or is_low_rank(module)) and not has_hooks


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
