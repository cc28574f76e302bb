"""Several processes that work on one network, through Hugging Face Accelerate: each takes a share, and all add up."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from spectrim.core.errors import DataError

T = TypeVar("T")


class Accelerator(Protocol):
    """What is used of an `accelerate.Accelerator`; nothing here imports that package."""

    @property
    def num_processes(self) -> int:
        """How many processes there are."""

    @property
    def process_index(self) -> int:
        """Which of them this is."""

    @property
    def is_main_process(self) -> bool:
        """Whether this one writes files and shows progress."""

    @property
    def device(self) -> torch.device:
        """Where this process computes."""

    def reduce(self, tensor: Any, reduction: str = "sum") -> Any:
        """The sum over all processes."""


def in_turn(batches: Iterable[T], accelerator: Accelerator | None) -> Iterator[tuple[int, T, bool]]:
    """Number, batch, and whether it is this process's: they are dealt out one after the other.

    Every process must be given the same batches.
    """
    count, index = (accelerator.num_processes, accelerator.process_index) if accelerator else (1, 0)
    for position, batch in enumerate(batches):
        yield position, batch, position % count == index


def several(accelerator: Accelerator | None) -> Accelerator | None:
    """The accelerator where there is more than one process, else None."""
    return accelerator if accelerator is not None and accelerator.num_processes > 1 else None


def averaging(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """The model, with gradients that are the mean over all processes (Li 2020); what does not ask for any stays out."""
    places = [accelerator.device] if accelerator.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=places)


def share_of(batch: Any, accelerator: Accelerator, *, position: int) -> tuple[Any, float]:
    """This process's samples of a batch that every process is given, and what their mean loss weighs.

    With the weight, the mean over processes is the mean over the batch, also where shares differ by a sample.

    Raises:
        DataError: fewer samples than processes, or nothing that can be divided.
    """
    sizes = {len(one) for one in _tensors(batch)}
    count, index = accelerator.num_processes, accelerator.process_index
    if len(sizes) != 1 or min(sizes) < count:
        has = "no tensors" if not sizes else f"{' and '.join(map(str, sorted(sizes)))} samples"
        raise DataError(
            f"batch {position} has {has}, which cannot be divided among {count} processes; give batches of at least "
            f"{count} samples, best a multiple, and leave a smaller last one out (drop_last=True)"
        )
    (size,) = sizes
    start, end = size * index // count, size * (index + 1) // count
    return _sliced(batch, start, end), count * (end - start) / size


def _tensors(value: Any) -> list[Tensor]:
    """All that have a first dimension, of a tensor, a sequence or a mapping."""
    if isinstance(value, Tensor):
        return [value] if value.ndim else []
    inside = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return [tensor for one in inside for tensor in _tensors(one)]


def _sliced(value: Any, start: int, end: int) -> Any:
    if isinstance(value, Tensor):
        return value[start:end] if value.ndim else value
    if isinstance(value, Mapping):
        return {name: _sliced(one, start, end) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return tuple(_sliced(one, start, end) for one in value)
    return value


def summed(
    tensors: Mapping[str, Tensor], *, names: Collection[str], accelerator: Accelerator | None
) -> dict[str, Tensor]:
    """By name, the sum over all processes, to which one that lacks the name adds nothing.

    Args:
        tensors: Of this process, all of one dtype; the same name has the same shape everywhere.
        names: All that may occur, in the same order in every process.
        accelerator: The processes; without it, `tensors` is all there is.
    """
    if accelerator is None or accelerator.num_processes == 1:
        return dict(tensors)
    mine = [tensors.get(name) for name in names]
    result: dict[str, Tensor] = {}
    for name, own, shape in zip(names, mine, _shapes(mine, accelerator), strict=True):
        if shape is None:
            continue
        part = torch.zeros(shape, dtype=torch.float64) if own is None else own
        result[name] = total(part, accelerator)
    return result


def total(part: Tensor, accelerator: Accelerator) -> Tensor:
    """The sum over all processes of tensors with the same shape, where `part` is."""
    found: Tensor = accelerator.reduce(part.to(accelerator.device).contiguous(), reduction="sum")
    return found.to(part.device)


def _shapes(mine: list[Tensor | None], accelerator: Accelerator) -> list[tuple[int, ...] | None]:
    """What shape each tensor has in the processes that have it; None where none has."""
    table = torch.zeros(len(mine), 6, dtype=torch.float64)
    for row, own in enumerate(mine):
        if own is not None:
            table[row, : 2 + own.ndim] = torch.tensor([1, own.ndim, *own.shape], dtype=torch.float64)
    shapes: list[tuple[int, ...] | None] = []
    for having, ndim, *sizes in total(table, accelerator).tolist():
        shapes.append(tuple(round(size / having) for size in sizes[: round(ndim / having)]) if having else None)
    return shapes
