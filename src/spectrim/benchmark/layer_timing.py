"""Timing one layer by itself, as it is and in factors, with the processor's caches as a network leaves them.

In a network the other layers' weights pass through the caches between two calls of a layer. Timed on its own, a large
linear layer would find its weights there, and seem to take a fraction of its time.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from spectrim.benchmark.layer_calls import LayerSignature, Variant
from spectrim.benchmark.layer_graphs import layer_graph
from spectrim.layers.forms import form_named
from spectrim.layers.heads import AroundHeads
from spectrim.layers.replacement import NARROWED_FROM, narrowed_like
from spectrim.layers.types import layer_type_of
from spectrim.runtimes.sessions import Runtime, Session, timed_together
from spectrim.runtimes.timing import medians_ms

_ROUNDS = 5
_MOST = 2**26
"""Bytes: more than the last cache of most processors, where a network's weights are never found again."""


def rest_of(model: nn.Module) -> Tensor:
    """As many bytes as the weights of a network have, to be read between two passes of a layer; none on a GPU."""
    weights = list(model.parameters())
    here = all(weight.device.type == "cpu" for weight in weights)
    size = sum(weight.numel() * weight.element_size() for weight in weights) if here else 0
    return torch.ones(min(size, _MOST) // 4)


@dataclass(frozen=True, eq=False)
class LayerBench:
    """Times the layers of a network one by one.

    Attributes:
        layers: One of each signature.
        runtime: What runs them.
        rest: From `rest_of` the network.
    """

    layers: Mapping[LayerSignature, nn.Module]
    runtime: Runtime
    rest: Tensor

    def measure(self, signature: LayerSignature, variants: Sequence[Variant]) -> tuple[float, ...]:
        """Milliseconds of one pass of a layer, and of each variant of it, all of them in the same interleaved rounds.

        Raises:
            EngineError: the runtime refuses the layer.
        """
        layer, generator = self.layers[signature], torch.Generator().manual_seed(0)
        networks = [layer, *(_changed(layer, variant, generator) for variant in variants)]
        sessions = (self.session(signature, network) for network in networks)
        return tuple(medians_ms(*timed_together(sessions, rounds=_ROUNDS)))

    def session(self, signature: LayerSignature, layer: nn.Module) -> Session:
        """A layer, as it is or in factors, on random numbers of this signature; raises as `measure`."""
        generator = torch.Generator().manual_seed(0)
        shape, has_heads = signature.input, isinstance(layer, AroundHeads)
        if hasattr(layer, NARROWED_FROM) and not has_heads:
            shape = (*shape[:-1], layer_type_of(layer).geometry(layer).into)
        x = torch.randn(shape, generator=generator).to(next(layer.parameters()).detach())
        own = sum(weight.numel() for weight in layer.parameters())
        others = self.rest[min(own, len(self.rest)) :]

        def between() -> None:
            others.sum()
            x.sum()  # the layer before has only just written it

        if self.runtime.reads_onnx and not has_heads:
            session = self.runtime.from_onnx(layer_graph(layer, x.shape), [x.numpy()])
        else:
            session = self.runtime.prepare(layer, x, checked=True)
        return replace(session, between=between if len(others) else None)


def _changed(layer: nn.Module, variant: Variant, generator: torch.Generator) -> nn.Module:
    """Factors of random numbers, none of which grows or dies out: the time does not depend on them otherwise."""
    if variant.sizes:
        into, out, heads = variant.sizes
        ranks = _uneven(variant.ranks[0], heads) if heads else ()
        changed = narrowed_like(layer, out=out, into=into, bias=True, head_ranks=ranks)
        changed.to_empty(device=layer.get_parameter("weight").device)
    else:
        build, kind = form_named(variant.form).build, layer_type_of(layer)
        changed = build(layer, layer_type=kind, ranks=variant.ranks, bias=True)
    with torch.no_grad():
        for parameter in changed.parameters():
            scale = 1 / math.sqrt(max(1, parameter[0].numel()))
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return changed


def _uneven(mean: int, heads: int) -> tuple[int, ...]:
    """Ranks of heads that are not the same, as they hardly ever are: it takes longer."""
    pair = (mean + 1, mean - 1) if mean > 1 else (mean, mean)
    return (*pair * (heads // 2), *[mean] * (heads % 2))
