"""Repeated passes over the same beginning of a network, without computing it each time."""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.core.errors import ModelError
from spectrim.core.execution import Inputs, call, evaluating
from spectrim.core.nested import tensors
from spectrim.layers.factored import is_low_rank

DEFAULT_BYTES = 5 * 2**25
"""Bytes of activations kept to save time, if nothing else is said: 160 MiB."""

_TRIED = 4
"""Samples on which the blocks are tried."""

_Outputs = dict[tuple[str, int], Tensor]
"""By a module's name and the number of the call within one pass."""


@dataclass(eq=False)
class ActivationCache:
    """Outputs of the parts of a network that will not change any more, by batch.

    If layers are worked on in execution order, whatever a pass has finished before the layer at hand is final. The
    outputs of modules made of modules (blocks, stages) are kept as long as the bytes suffice; on the next pass these
    modules return what is kept instead of running.

    A block that does more than give an output (it runs hooks, writes to its input or to what others read) has to run.
    So each block is tried: with its output recalled, the network must give what it gives with the block run.

    Attributes:
        model: The network, whose layers may be exchanged between passes.
        free_bytes: Bytes that may still be kept.
        tried_on: Inputs to try the blocks on; without them no block is recalled.
    """

    model: nn.Module
    free_bytes: int
    tried_on: Inputs | None
    _outputs: dict[int, _Outputs] = field(default_factory=dict)

    @cached_property
    def blocks(self) -> frozenset[str]:
        """Names of the blocks that may be recalled."""
        if self.tried_on is None or self.free_bytes <= 0:
            return frozenset()
        names = [name for name, module in self.model.named_modules() if name and _is_block(module)]
        if self.tried_on.is_ragged or any(tensor.layout != torch.strided for tensor in self.tried_on.tensors()):
            return frozenset()  # such inputs cannot be cut or rolled
        with evaluating(self.model):
            few = self._few(self.tried_on)
            return frozenset(name for name in names if self._can_be_recalled(name, few))

    def _few(self, inputs: Inputs) -> Inputs:
        """A few of the samples, if the network takes them."""
        few = inputs.map(lambda tensor: tensor[:_TRIED] if tensor.ndim else tensor)
        try:
            call(self.model, few)
        except ModelError:
            return inputs
        return few

    def _can_be_recalled(self, name: str, inputs: Inputs) -> bool:
        run = _Pass({}, self.free_bytes)
        try:
            with self._following(run, {name}):
                expected = call(self.model, inputs)
            # other inputs, so that what a block left to others is no longer what it would leave now
            call(self.model, inputs.map(lambda tensor: tensor.roll(1, -1) if tensor.ndim else tensor))
            recalled = _Pass(dict(run.finished), self.free_bytes)
            with self._following(recalled, {name}):
                return bool(run.finished) and _equal(expected, call(self.model, inputs))
        except ModelError:
            return False

    @contextmanager
    def recalling(self, batch: int) -> Iterator[Callable[[], None]]:
        """Run the network on the batch of this number within this; call what it gives where finality ends."""
        blocks = self.blocks
        run = _Pass(self._outputs.get(batch, {}), self.free_bytes)
        try:
            with self._following(run, blocks):
                yield run.stop
        finally:
            if not run.final:  # a pass that never came to the layer at hand says nothing of what is final
                self._keep(batch, run)

    @contextmanager
    def _following(self, run: "_Pass", blocks: Collection[str]) -> Iterator[None]:
        replaced = []
        try:
            for name, module in list(self.model.named_modules()):
                if name in blocks and _is_block(module):
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
        for key, output in run.finished:
            if key in run.known or _size(output) <= self.free_bytes:
                self._outputs[batch][key] = output
                self.free_bytes -= _size(output)


@dataclass(eq=False)
class _Pass:
    """One pass: what was known before, and which blocks have finished, outermost ones only."""

    known: _Outputs
    free_bytes: int
    finished: list[tuple[tuple[str, int], Tensor]] = field(default_factory=list)
    final: bool = True
    calls: dict[str, int] = field(default_factory=dict)

    def stop(self) -> None:
        """What finishes from here on is not final."""
        self.final = False

    def forward(self, name: str, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """In place of a block's forward pass: the known output of this call, or the pass itself."""
        key = (name, self.calls.get(name, 0))
        self.calls[name] = key[1] + 1
        inside = len(self.finished)
        # copies, since what follows may work in place
        output = self.known[key].clone() if key in self.known else original(*args, **kwargs)
        if self.final and key in self.known:
            self.finished[inside:] = [(key, self.known[key])]
        elif self.final and isinstance(output, Tensor) and _size(output) <= self.free_bytes:
            self.finished[inside:] = [(key, output.detach().clone())]
        return output


def _equal(first: Any, second: Any) -> bool:
    pairs = [list(tensors(value)) for value in (first, second)]
    return len(pairs[0]) == len(pairs[1]) and all(map(torch.equal, *pairs))


def _is_block(module: nn.Module) -> bool:
    return not is_low_rank(module) and next(module.children(), None) is not None


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
