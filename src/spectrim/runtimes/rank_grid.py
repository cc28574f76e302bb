"""The hardware's grid: by which steps of the rank a factored layer takes longer, measured in about a second.

Vector units work on 8 or 16 numbers at a time, and a runtime pads channels to blocks of them: latency against rank is a
staircase. Ranks just below a step give the most for their time.
"""

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from spectrim.core.arguments import checked
from spectrim.core.errors import EngineError, RuleError
from spectrim.core.files import Frozen
from spectrim.runtimes.conversion import OPSET
from spectrim.runtimes.sessions import Runtime, RuntimeName, Session, fingerprint, require_runtime, timed_together
from spectrim.runtimes.timing import medians_ms

STEPS = (32, 16, 8)
"""The steps that can be found."""
_CHANNELS, _SIDE = 64, 28
_ROUNDS, _PATIENCE = 15, 1.0


class Grid(Frozen):
    """At which multiples of the rank latency steps, in one runtime on one machine.

    Attributes:
        multiple: 32, 16 or 8; 1 where no step was seen.
        times: Milliseconds of a pair of layers by its rank, from which that was read: a 3x3 convolution from 64
            channels to the rank, and a 1x1 convolution back to 64.
        runtime: Where it was timed.
        threads: Threads of one pass.
        batch: Images of one pass.
        fingerprint: Processor, instructions and versions; see `spectrim.runtimes.fingerprint`.
    """

    multiple: int
    times: Mapping[int, float]
    runtime: RuntimeName
    threads: int
    batch: int
    fingerprint: str


@checked
def probe(*, runtime: str = "torch", threads: int = 1, batch: int = 1) -> Grid:
    """Find the multiple of the rank at which latency steps on this CPU, in about a second.

    `compile` is probed through `channels_last`: both hand convolutions to the same kernels.

    Args:
        runtime: One of `spectrim.runtimes.RUNTIMES`.
        threads: Threads of one pass.
        batch: Images of one pass.

    Raises:
        EngineError: an unknown runtime, more threads than cores, or a batch below 1.
        DependencyError: the runtime is not installed.
    """
    chosen = require_runtime(runtime, threads=threads)
    if batch < 1:
        raise EngineError(f"batch={batch}: give at least 1")
    pairs = (_pair(rank, runtime=chosen, batch=batch) for rank in RANKS)
    times = dict(zip(RANKS, medians_ms(*timed_together(pairs, rounds=_ROUNDS, patience=_PATIENCE)), strict=True))
    return Grid(
        multiple=step_of(times),
        times=times,
        runtime=chosen.name,
        threads=threads,
        batch=batch,
        fingerprint=fingerprint(runtime, threads=threads),
    )


def _climbs(step: int) -> tuple[tuple[tuple[int, int], ...], ...]:
    """Ranks and the next multiple of `step`: from just above a multiple, and from half way between two."""
    starts = (32, 64) if step == 32 else tuple(range(32, 32 + 3 * step, step))
    above = tuple((start + 1, start + step) for start in starts)
    return above, tuple((start + step // 2, start + step) for start in starts)


_ENDS = (32, 64, 96)
RANKS: tuple[int, ...] = tuple(
    sorted({*_ENDS, *(rank for step in STEPS for kind in _climbs(step) for climb in kind for rank in climb)})
)
"""The ranks that `probe` times."""


def step_of(times: Mapping[int, float]) -> int:
    """The step of the staircase that these times by rank show: the largest one up to which rounding up is free.

    What a rank costs is the slope between ranks that every grid holds. On a grid of step s, going from any rank up to
    the next multiple of s takes no time; without one, it takes the slope times the ranks in between, and on a finer
    grid it takes that at least from half way. So a step counts when both climbs, from just above a multiple and from
    half way, take less than half of it on average. `times` are those of all `RANKS`, in any unit; the result is 32, 16
    or 8, or 1 where rounding up is never free or time does not grow with rank.
    """
    low, high = _ENDS[0], _ENDS[-1]
    slope = (times[high] - times[low]) / (high - low)
    if slope <= 0:
        return 1

    def share(climbs: Iterable[tuple[int, int]]) -> float:
        return statistics.fmean((times[end] - times[start]) / (slope * (end - start)) for start, end in climbs)

    return next((step for step in STEPS if all(share(climbs) < 0.5 for climbs in _climbs(step))), 1)


def _pair(rank: int, *, runtime: Runtime, batch: int) -> Session:
    """A 3x3 convolution to `rank` channels and a 1x1 back; the more images there are, the smaller they are."""
    side = max(7, round(_SIDE / batch**0.5))
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) / math.sqrt(math.prod(shape[1:]))

    image = normal(batch, _CHANNELS, side, side)
    down, up = normal(rank, _CHANNELS, 3, 3), normal(_CHANNELS, rank, 1, 1)
    if runtime.reads_onnx:  # written directly, since an export takes a second
        from onnx import numpy_helper, parser

        shape = list(image.shape)
        graph = parser.parse_model(
            f'<ir_version: 10, opset_import: ["": {OPSET}]> pair (float{shape} x) => (float{shape} y) '
            "{ inner = Conv<pads = [1, 1, 1, 1]>(x, down)  y = Conv(inner, up) }"
        )
        weights = {"down": down, "up": up}.items()
        graph.graph.initializer.extend(numpy_helper.from_array(weight.numpy(), name) for name, weight in weights)
        return runtime.from_onnx(graph, [image.numpy()])
    first = nn.utils.skip_init(nn.Conv2d, _CHANNELS, rank, 3, padding=1, bias=False)
    last = nn.utils.skip_init(nn.Conv2d, rank, _CHANNELS, 1, bias=False)
    first.weight.data, last.weight.data = down, up
    same_kernels = replace(runtime, name="channels_last") if runtime.name == "compile" else runtime
    return same_kernels.prepare(nn.Sequential(first, last), image, checked=True)


def multiple_of(rank_multiple: int | Grid | str | None) -> int | None:
    """The number that ranks must be multiples of; None where it is not given or has to be probed (`auto`).

    Raises:
        RuleError: neither a whole number of at least 1, nor a grid, nor `auto`.
    """
    number = rank_multiple.multiple if isinstance(rank_multiple, Grid) else rank_multiple
    if number is None or number == "auto":
        return None
    if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number < 2**31:
        raise RuleError(f"rank_multiple={rank_multiple!r}: give a whole number of at least 1, such as 8, or 'auto'")
    return number
