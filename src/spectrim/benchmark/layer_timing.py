"""Timing one layer by itself, as it is and in factors, with the processor's caches as a network leaves them.

In a network the other layers' weights pass through the caches between two calls of a layer. Timed on its own, a large
linear layer would find its weights there, and seem to take a fraction of its time.
"""

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from spectrim.benchmark.layer_calls import LayerSignature, Variant
from spectrim.benchmark.layer_graphs import layer_graph
from spectrim.layers.forms import form_named
from spectrim.layers.types import layer_type_of
from spectrim.runtimes.sessions import Session, from_onnx, prepare
from spectrim.runtimes.timing import Timing, interleaved, steady

_ROUNDS = 5
_READS_ONNX = ("onnxruntime", "openvino", "openvino-bf16")
_MOST = 2**26
"""Bytes: more than the last cache of most processors, where a network's weights are never found again."""


def rest_of(model: nn.Module) -> Tensor:
    """As many bytes as the weights of a network have, to be read between two passes of a layer; none on a GPU."""
    weights = list(model.parameters())
    here = all(weight.device.type == "cpu" for weight in weights)
    size = sum(weight.numel() * weight.element_size() for weight in weights) if here else 0
    return torch.ones(min(size, _MOST) // 4)


def timed(
    layer: nn.Module,
    signature: LayerSignature,
    variants: Sequence[Variant],
    *,
    runtime: str,
    threads: int,
    rest: Tensor,
) -> tuple[float, ...]:
    """Milliseconds of one pass of a layer, and of each variant of it, all of them in the same interleaved rounds.

    Args:
        layer: As it is.
        signature: Of the layer, and its input.
        variants: Forms and ranks.
        runtime: What runs them.
        threads: With so many threads.
        rest: From `rest_of` the network.

    Raises:
        EngineError: the runtime refuses the layer.
    """
    generator = torch.Generator().manual_seed(0)
    layers = [layer, *(_factored(layer, variant, generator) for variant in variants)]
    with ExitStack() as stack:
        timers = [
            stack.enter_context(timer(each, signature, runtime=runtime, threads=threads, rest=rest)) for each in layers
        ]
        timings = interleaved(timers, rounds=_ROUNDS)
    return tuple(statistics.median(seconds) * 1e3 for seconds in steady(*timings))


@contextmanager
def timer(
    layer: nn.Module, signature: LayerSignature, *, runtime: str, threads: int, rest: Tensor
) -> Iterator[Callable[[], Timing]]:
    """A function that times passes of a layer over random numbers of this signature; see `timed`.

    Raises:
        EngineError: the runtime refuses the layer.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(signature.input, generator=generator).to(next(layer.parameters()).detach())
    own = sum(weight.numel() for weight in layer.parameters())
    others = rest[min(own, len(rest)) :]

    def between() -> None:
        others.sum()
        x.sum()  # the layer before has only just written it

    with _session(layer, x, runtime=runtime, threads=threads) as session:
        yield session.timer(between=between if len(others) else None)


def _session(layer: nn.Module, x: Tensor, *, runtime: str, threads: int) -> Session:
    if runtime not in _READS_ONNX:
        return prepare(layer, x, runtime=runtime, threads=threads, checked=True)
    return from_onnx(layer_graph(layer, x.shape), [x.numpy()], runtime=runtime, threads=threads)


def _factored(layer: nn.Module, variant: Variant, generator: torch.Generator) -> nn.Module:
    """Factors of random numbers, none of which grows or dies out: the time does not depend on them otherwise."""
    form = form_named(variant.form)
    factored = form.build(layer, layer_type=layer_type_of(layer), ranks=variant.ranks, bias=True)
    with torch.no_grad():
        for parameter in factored.parameters():
            scale = 1 / math.sqrt(max(1, parameter[0].numel()))
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return factored
