"""Repeated passes over the same beginning of a network, without computing it each time."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

from spectrim.layers.factored import is_low_rank

DEFAULT_BYTES = 5 * 2**25
"""Bytes of activations kept to save time, if nothing else is said: 160 MiB."""

_Outputs = dict[tuple[str, int], Tensor]
"""By a module's name and the number of the call within one pass."""


@dataclass(eq=False)
class ActivationCache:
    """Outputs of the parts of a network that will not change any more, by batch.

    If layers are worked on in execution order, whatever a pass has finished before the layer at hand is final. The
    outputs of modules made of modules (blocks, stages) are kept as long as the bytes suffice; on the next pass these
    modules return what is kept instead of running.

    Attributes:
        model: The network, whose layers may be exchanged between passes.
        free_bytes: Bytes that may still be kept.
    """

    model: nn.Module
    free_bytes: int
    _outputs: dict[int, _Outputs] = field(default_factory=dict)

    @contextmanager
    def recalling(self, batch: int) -> Iterator[Callable[[], None]]:
        """Run the network on the batch of this number within this; call what it gives where finality ends."""
        run = _Pass(self._outputs.get(batch, {}), self.free_bytes)
        replaced = []
        try:
            for name, module in list(self.model.named_modules()):
                if name and not is_low_rank(module) and next(module.children(), None) is not None:
                    replaced.append((module, module.__dict__.get("forward")))
                    module.__dict__["forward"] = partial(run.forward, name, module.forward)
            yield run.stop
        finally:
            for module, forward in replaced:
                del module.__dict__["forward"]
                if forward is not None:
                    module.__dict__["forward"] = forward
            self._keep(batch, run)

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


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
