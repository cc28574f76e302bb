"""Several processes that work on one network, through Hugging Face Accelerate: each takes a share, and all add up."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from spectrim.core.errors import DataError
from spectrim.core.nested import map_tensors, tensors

T = TypeVar("T")


class Accelerator(Protocol):
    """What is used of an `accelerate.Accelerator`; nothing here imports that package."""

    @property
    def num_processes(self) -> int:
        """How many processes there are."""

    @property
    def process_index(self) -> int:
        """Which of them this is; the first one, 0, writes files and shows progress."""

    @property
    def device(self) -> torch.device:
        """Where this process computes."""

    def reduce(self, tensor: Any, reduction: str = "sum") -> Any:
        """The sum over all processes."""


def shard(batches: Iterable[T], accelerator: Accelerator | None) -> Iterator[tuple[int, T, bool]]:
    """Number, batch, and whether it is this process's: they are dealt out one after the other.

    Every process must be given the same batches.
    """
    count, index = (accelerator.num_processes, accelerator.process_index) if accelerator else (1, 0)
    for position, batch in enumerate(batches):
        yield position, batch, position % count == index


def if_distributed(accelerator: Accelerator | None) -> Accelerator | None:
    """The accelerator where there is more than one process, else None."""
    return accelerator if accelerator is not None and accelerator.num_processes > 1 else None


def ddp(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """The model, with gradients averaged over all processes (Li 2020); parameters without gradients stay out."""
    devices = [accelerator.device] if accelerator.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices)


def share_of(batch: Any, accelerator: Accelerator, *, position: int) -> tuple[Any, float]:
    """This process's samples of a batch that every process is given, and what their mean loss weighs.

    With the weight, the mean over processes is the mean over the batch, also where shares differ by a sample.

    Raises:
        DataError: fewer samples than processes, or nothing that can be divided.
    """
    sizes = {len(tensor) for tensor in tensors(batch) if tensor.ndim}
    count, index = accelerator.num_processes, accelerator.process_index
    if len(sizes) != 1 or min(sizes) < count:
        has = "no tensors" if not sizes else f"{' and '.join(map(str, sorted(sizes)))} samples"
        raise DataError(
            f"batch {position} has {has}, which cannot be divided among {count} processes; give batches of at least "
            f"{count} samples, best a multiple, and leave a smaller last one out (drop_last=True)"
        )
    (size,) = sizes
    start, end = size * index // count, size * (index + 1) // count
    part = map_tensors(batch, lambda tensor: tensor[start:end] if tensor.ndim else tensor)
    return part, count * (end - start) / size


def all_reduce(
    values: Mapping[str, Tensor], *, names: Collection[str], accelerator: Accelerator | None
) -> dict[str, Tensor]:
    """By name, the sum over all processes, to which one that lacks the name adds nothing.

    Args:
        values: Of this process, all of one dtype; the same name has the same shape everywhere.
        names: All that may occur, in the same order in every process.
        accelerator: The processes; without it, `values` is all there is.
    """
    if if_distributed(accelerator) is None or accelerator is None:
        return dict(values)
    by_process: list[dict[str, torch.Size]] = [{}] * accelerator.num_processes
    torch.distributed.all_gather_object(by_process, {name: value.shape for name, value in values.items()})
    shapes = {name: shape for known in by_process for name, shape in known.items()}
    zeros = {name: torch.zeros(shapes[name], dtype=torch.float64) for name in shapes.keys() - values.keys()}
    parts = {**zeros, **values}
    return {name: total(parts[name], accelerator) for name in names if name in parts}


def total(part: Tensor, accelerator: Accelerator) -> Tensor:
    """The sum over all processes of tensors with the same shape, where `part` is."""
    whole: Tensor = accelerator.reduce(part.to(accelerator.device).contiguous(), reduction="sum")
    return whole.to(part.device)
