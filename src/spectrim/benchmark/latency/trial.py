"""Timing one layer by itself, as it is and in factors, with the processor's caches as a network leaves them.

In a network the other layers' weights pass through the caches between two calls of a layer. Timed on its own, a large
linear layer would find its weights there, and seem to take a fraction of its time.
"""

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from spectrim.benchmark.latency.graphs import layer_graph
from spectrim.benchmark.latency.shapes import Shape, Variant
from spectrim.core.plans import FormName
from spectrim.layers.registry import Geometry, build
from spectrim.linalg import Factors, Ranks
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
    layer: nn.Module, shape: Shape, variants: Sequence[Variant], *, runtime: str, threads: int, rest: Tensor
) -> tuple[float, ...]:
    """Milliseconds of one pass of a layer, and of each variant of it, all of them in the same interleaved rounds.

    Args:
        layer: As it is.
        shape: Of the layer, and its input.
        variants: Forms and ranks.
        runtime: What runs them.
        threads: With so many threads.
        rest: From `rest_of` the network.

    Raises:
        EngineError: the runtime refuses the layer.
    """
    chance = torch.Generator().manual_seed(0)
    layers = [layer, *(_filled(layer, variant, chance) for variant in variants)]
    with ExitStack() as opened:
        timers = [
            opened.enter_context(timer(one, shape, runtime=runtime, threads=threads, rest=rest)) for one in layers
        ]
        laps = interleaved(timers, rounds=_ROUNDS)
    return tuple(statistics.median(seconds) * 1e3 for seconds in steady(*laps))


@contextmanager
def timer(
    layer: nn.Module, shape: Shape, *, runtime: str, threads: int, rest: Tensor
) -> Iterator[Callable[[], Timing]]:
    """A function that times passes of a layer over random numbers of this shape; see `timed`.

    Raises:
        EngineError: the runtime refuses the layer.
    """
    given = torch.randn(shape.input, generator=torch.Generator().manual_seed(0)).to(next(layer.parameters()).detach())
    own = sum(weight.numel() for weight in layer.parameters())
    others = rest[min(own, len(rest)) :]

    def between() -> None:
        others.sum()
        given.sum()  # the layer before has only just written it

    with _prepared(layer, given, runtime=runtime, threads=threads) as made:
        yield made.timer(between=between if len(others) else None)


def _prepared(layer: nn.Module, given: Tensor, *, runtime: str, threads: int) -> Session:
    if runtime not in _READS_ONNX:
        return prepare(layer, given, runtime=runtime, threads=threads, checked=True)
    return from_onnx(layer_graph(layer, given.shape), [given.numpy()], runtime=runtime, threads=threads)


def _filled(layer: nn.Module, variant: Variant, chance: torch.Generator) -> nn.Module:
    """Factors of random numbers, none of which grows or dies out: the time does not depend on them otherwise."""
    made = cast(nn.Module, build(layer, form=variant.form, ranks=variant.ranks, bias=True))
    with torch.no_grad():
        for parameter in made.parameters():
            scale = 1 / math.sqrt(max(1, parameter[0].numel()))
            parameter.copy_(torch.randn(parameter.shape, generator=chance) * scale)
    return made


def random_factors(sizes: Geometry, *, form: FormName, ranks: Ranks, seed: int) -> Factors:
    """Factors for a layer of these sizes, float64, to time it with: scaled so that no signal grows or dies out."""
    groups, out, into, kernel = sizes.groups, sizes.out, sizes.into, sizes.kernel
    shapes: list[tuple[int, ...]]
    if form == "spatial":
        shapes = [(ranks[0], into, kernel[0], 1), (out, ranks[0], 1, kernel[1])]
    elif form == "tucker2":
        shapes = [(ranks[0], into), (ranks[1], ranks[0], *kernel), (out, ranks[1])]
    else:
        shapes = [(ranks[0], into, *kernel), (out, ranks[0])]
    chance = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(groups, *shape, generator=chance, dtype=torch.float64) / math.sqrt(math.prod(shape[1:]))
        for shape in shapes
    )
