"""How a compression is carried out, and how many data it is given."""

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, Self

from torch.utils.data import DataLoader

from spectrim.core.batches import length_of, without_labels
from spectrim.core.errors import DataError
from spectrim.core.execution import Inputs
from spectrim.core.memory import IN_PLACE, Storage


@dataclass(frozen=True)
class RunOptions:
    """What a caller may say of how it is done: arguments of `st.compress`.

    Attributes:
        cache: Bytes of activations.
        storage: The device and the folder of the statistics.
        max_batches: Calibration batches at most.
        reconstruct: Whether layers are fitted one after the other.
        distill: Whether the compressed network is trained afterwards.
    """

    cache: int | None = None
    storage: Storage = IN_PLACE
    max_batches: int | None = None
    reconstruct: Literal["auto"] | bool = "auto"
    distill: bool = False


@dataclass(frozen=True)
class DataSize:
    """How many calibration samples there are, as far as that is known without reading them.

    Attributes:
        samples: All together.
        batch: In the largest batch.
        resident: Whether they are in memory already.
    """

    samples: int
    batch: int
    resident: bool

    @classmethod
    def of(
        cls, data: Iterable[Any], example: Inputs, *, max_batches: int | None = None, samples: int | None = None
    ) -> Self | None:
        """Of a list or tuple from its tensors, of a `DataLoader` from its length; None where it is not known."""
        if isinstance(data, list | tuple):
            sizes = [batch.samples for batch in islice(without_labels(data, like=example), max_batches)]
            return cls(sum(sizes), max(sizes, default=0), resident=True)
        size = data.batch_size if isinstance(data, DataLoader) else None
        size = size or getattr(getattr(data, "batch_sampler", None), "batch_size", None) or example.samples
        numbers = [number for number in (length_of(data), max_batches) if number]
        if not (samples or numbers):
            return None
        counted = size * min(numbers, default=0)
        total = samples or min(counted, length_of(getattr(data, "sampler", None)) or counted)
        return cls(total, min(size, total), resident=False)

    @classmethod
    def least(cls, data: Iterable[Any] | None, example: Inputs, max_batches: int | None) -> Self | None:
        """The same, or one batch like the example where that is all that is known; None without data."""
        if data is None:
            return None
        with suppress(DataError):  # of data that cannot be read there is a better message when they are
            if (size := cls.of(data, example, max_batches=max_batches)) is not None:
                return size
        return cls(example.samples, example.samples, resident=False)
