"""Running the same beginning of a network again and again without computing it again and again."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

from spectrim.layers.factored import is_low_rank

DEFAULT_BYTES = 5 * 2**25
"""Bytes of activations kept to save time, if nothing else is said: 160 MiB."""

_Key = tuple[str, int]
"""A module's name and the number of the call within one pass."""


@dataclass(eq=False)
class ActivationCache:
    """Outputs of the parts of a network that will not change any more, by batch.

    Whatever a pass has finished before it comes to the layer that is worked on is final, if layers are worked on in
    execution order. Kept are the outputs of modules made of modules (blocks, stages) as long as the bytes suffice; on
    the next pass these modules give what is kept instead of running.

    Attributes:
        model: The network, whose layers may be exchanged between passes.
        free_bytes: Bytes that may still be kept.
    """

    model: nn.Module
    free_bytes: int
    _outputs: dict[int, dict[_Key, Tensor]] = field(default_factory=dict)

    @contextmanager
    def recalling(self, batch: int) -> Iterator[Callable[[], None]]:
        """Run the network on the batch of this number within this; call what it gives where finality ends."""
        run = _Pass(self._outputs.get(batch, {}), self.free_bytes)
        handles, replaced = [], []
        try:
            for name, module in self._blocks():
                handles.append(module.register_forward_pre_hook(partial(run.enter, name)))
                handles.append(module.register_forward_hook(run.leave))
                if any(key[0] == name for key in run.known):
                    replaced.append((module, module.__dict__.get("forward")))
                    module.__dict__["forward"] = partial(run.recall, name, module.forward)
            yield run.stop
        finally:
            for handle in handles:
                handle.remove()
            for module, forward in replaced:
                del module.__dict__["forward"]
                if forward is not None:
                    module.__dict__["forward"] = forward
            self._keep(batch, run)

    def _blocks(self) -> list[tuple[str, nn.Module]]:
        named = self.model.named_modules()
        return [
            (name, block)
            for name, block in named
            if name and not is_low_rank(block) and next(block.children(), None) is not None
        ]

    def _keep(self, batch: int, run: "_Pass") -> None:
        if not run.finished:
            return
        self.free_bytes += sum(map(_size, run.known.values()))
        outputs: dict[_Key, Tensor] = {}
        for key, output in run.finished:
            if key in run.known or _size(output) <= self.free_bytes:
                outputs[key] = output
                self.free_bytes -= _size(output)
        self._outputs[batch] = outputs


class _Pass:
    """One pass: which blocks have finished, outermost ones only, and what they gave."""

    def __init__(self, known: dict[_Key, Tensor], free_bytes: int) -> None:
        self.known = known
        self.free_bytes = free_bytes
        self.finished: list[tuple[_Key, Tensor]] = []
        self.final = True
        self.calls: dict[str, int] = {}
        self.started: list[tuple[_Key, int]] = []

    def stop(self) -> None:
        """What finishes from here on is not final."""
        self.final = False

    def enter(self, name: str, *_: Any) -> None:
        """A block begins."""
        number = self.calls.get(name, 0)
        self.calls[name] = number + 1
        self.started.append(((name, number), len(self.finished)))

    def leave(self, _: nn.Module, __: Any, output: Any) -> None:
        """A block has finished; what it gave stands for all that finished within it."""
        key, inside = self.started.pop()
        if not self.final:
            return
        if key in self.known:
            self.finished[inside:] = [(key, self.known[key])]
        elif isinstance(output, Tensor) and _size(output) <= self.free_bytes:
            # a copy, since what follows may work in place
            self.finished[inside:] = [(key, output.detach().clone())]

    def recall(self, name: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """In place of a block's forward pass: what is kept of this call, or the real thing."""
        key = (name, self.calls[name] - 1)
        return self.known[key].clone() if key in self.known else forward(*args, **kwargs)


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
