"""How every call reads the data that it is given: what a batch is, what of it the model gets, and what is a label."""

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field, replace
from itertools import islice
from numbers import Number
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data import DataLoader, Dataset

from spectrim.core.errors import DataError, ResourceError, SpectrimError
from spectrim.core.execution import LABELS, Inputs, as_inputs
from spectrim.core.memory import free_bytes
from spectrim.core.nested import describe, from_numpy, size_of

_UNLABELLED = object()

_ASIDE_OF, _LEAST_ASIDE, _MOST_ASIDE = 16, 8, 128


def batches_of(data: Iterable[Any], *, what: str = "the data", max_batches: int | None = None) -> Iterator[Any]:
    """The batches in turn, at most so many; `what` names the data in messages.

    Raises `DataError` at once for what gives no batches, and later for a batch that a `DataLoader` cannot make.
    """
    require_batches(data, what=what)
    if max_batches is not None and max_batches < 1:
        raise DataError(f"max_batches={max_batches}: give at least 1, or None for all")
    return islice(_each(data, what), max_batches)


def require_batches(data: object, *, what: str) -> None:
    """Raise `DataError` for what gives no batches: nothing at all, one batch, or single samples."""
    kind = f"{what} is a {type(data).__name__}"
    if isinstance(data, Tensor | np.ndarray):
        raise DataError(
            f"{what} is one {type(data).__name__}, {describe(data)}, which would be run sample by sample; give a list "
            "of batches: [data], or of many samples data.split(64) (torch) or numpy.array_split(data, len(data) // 64)"
        )
    if isinstance(data, Dataset):
        raise DataError(
            f"{kind}, which gives single samples; give torch.utils.data.DataLoader(dataset, batch_size=64), or "
            "DataLoader(dataset, batch_size=None) if its items are whole batches"
        )
    ranks = {getattr(part, "ndim", 0) for part in data} if isinstance(data, tuple) else ()
    if isinstance(data, Mapping | Inputs) or len(ranks) > 1:
        raise DataError(f"{kind}, which is one batch, {describe(data)}; give a list of batches: [data]")
    # by its type alone: to begin an iteration may draw random numbers
    can_iterate = hasattr(type(data), "__iter__") or hasattr(type(data), "__getitem__")
    if not can_iterate or isinstance(data, nn.Module | str | bytes):
        raise DataError(f"{kind}; give batches: a list of them or a DataLoader")


def length_of(data: object) -> int:
    """How many batches there are; 0 if that is not known, as of an `IterableDataset` behind a `DataLoader`."""
    try:
        return len(data) if isinstance(data, Sized) else 0
    except TypeError:
        return 0


@dataclass(frozen=True, eq=False)
class ReservedBatches:
    """Calibration batches to look at the result with.

    Attributes:
        aside: Every sixteenth one, up to 128 samples, which nothing else is done with; none if these would be fewer
            than 8 samples.
        first: The first ones of the others, of at least 8 samples.
    """

    aside: list[Inputs] = field(default_factory=list)
    first: list[Inputs] = field(default_factory=list)

    def taken_from(self, batches: Iterable[Inputs]) -> Iterator[Inputs]:
        """The others, as they come."""
        for position, batch in enumerate(batches, 1):
            if position % _ASIDE_OF == 0 and _samples(self.aside) < _MOST_ASIDE:
                self.aside.append(batch.map(torch.clone))  # the memory may be used again for the next batch
                continue
            if _samples(self.first) < _LEAST_ASIDE:
                self.first.append(batch.map(torch.clone))
            yield batch
        if _samples(self.aside) < _LEAST_ASIDE:
            too_few = self.aside.copy()
            self.aside.clear()
            yield from too_few


def collected(batches: Iterable[Inputs]) -> list[Inputs]:
    """The batches in memory.

    Raises:
        ResourceError: they take more than is free, as those of an endless iterable do.
        DataError: they are written into one memory, each over the one before.
    """
    free, result, versions = free_bytes(torch.device("cpu")), [], []
    for batch in batches:
        result.append(batch)
        versions.append(_versions(batch))
        free -= size_of(batch.tensors())
        if free < 0:
            raise ResourceError(f"{len(result)} calibration batches take all memory that is free; give max_batches=")
    if any(_versions(batch) != version for batch, version in zip(result, versions, strict=True)):
        raise DataError("the calibration batches are written into the same memory one after the other; yield clones")
    return result


def _versions(batch: Inputs) -> list[int]:
    return [tensor._version for tensor in batch.tensors() if not tensor.is_inference()]


def _samples(batches: Iterable[Inputs]) -> int:
    return sum(batch.samples for batch in batches)


def without_labels(data: Iterable[Any], *, like: Inputs, what: str = "the calibration data") -> Iterator[Inputs]:
    """The inputs of each batch; what it has beyond those of the example `like`, its labels, is dropped.

    Raises `DataError` as `batches_of`, and for a batch of another structure than the example.
    """
    return (_by_example(batch, like, position)[0] for position, batch in enumerate(batches_of(data, what=what)))


@dataclass(frozen=True, eq=False)
class NamedLabels:
    """Batches that are mappings, with their entry `name` as the labels: ({name: input}, labels).

    Raises `DataError` for what gives no batches, and for batches without this entry.
    """

    data: Iterable[Any]
    name: str

    def __post_init__(self) -> None:
        require_batches(self.data, what="the data")

    def __len__(self) -> int:
        return len(self.data)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[tuple[dict[Any, Any], Any]]:
        for position, batch in enumerate(_each(self.data, "the data")):
            if not isinstance(batch, Mapping) or self.name not in batch:
                raise DataError(
                    f"batch {position} is {describe(batch)}, without the entry {self.name!r} that labels= names; give "
                    "mappings with this entry, or leave labels= out for pairs (inputs, labels)"
                )
            yield {name: value for name, value in batch.items() if name != self.name}, batch[self.name]


def source_of(data: object) -> object:
    """The data, without the name of their labels."""
    return data.data if isinstance(data, NamedLabels) else data


def inputs_of(
    batch: Any, model: nn.Module, *, position: int, labels: bool, mask: str | None = None
) -> tuple[Inputs, str]:
    """What the model gets of a batch with or without `labels`, and what to do if it cannot run that, for a message.

    `mask` names the input that is the mask, see `Inputs`.

    Raises `DataError` as `split_labels`, and for what cannot be a batch.
    """
    if isinstance(batch, Inputs):
        return replace(batch, mask=mask or batch.mask), ""
    if labels:
        return replace(split_labels(batch, position=position, model=model)[0], mask=mask), ""
    if batch is None or isinstance(batch, str | bytes | Number | nn.Module):
        raise DataError(f"batch {position} is a {describe(batch)}; give tensors, tuples of them, or mappings by name")
    single = isinstance(batch, Tensor | np.ndarray)
    hint = "" if single else " If the batches are pairs of inputs and labels, pass labels=True."
    return replace(_as_argument(as_inputs(batch), model), mask=mask), hint


def split_labels(
    batch: Any, *, position: int, like: Inputs | None = None, model: nn.Module | None = None, required: bool = True
) -> tuple[Inputs, Any]:
    """Split a labelled batch into what the model gets and the labels.

    It is (inputs.., labels), ((inputs..), labels), ({name: input}, labels), or a mapping with the entry "labels" or
    "label".

    Args:
        batch: The batch.
        position: Its number, for messages.
        like: An example of the inputs, where there is one: it says which part is the labels.
        model: Without an example, decides whether several inputs are several arguments, or one that is a tuple.
        required: Without it the labels may be missing, and are None then.

    Raises:
        DataError: there are no labels that are required, or the inputs have another structure than the example.
    """
    if like is not None:
        inputs, labels = _by_example(batch, like, position)
    elif isinstance(batch, Mapping):
        inputs, labels = _from_mapping(batch)
    elif _is_sequence(batch) and len(batch) > 1:
        first, labels = batch[:-1], from_numpy(batch[-1])
        inputs = as_inputs(first[0] if len(first) == 1 else first)
    else:
        inputs, labels = as_inputs(batch), _UNLABELLED
    if labels is _UNLABELLED and required:
        last = repr(list(batch)[-1] if isinstance(batch, Mapping) and batch else "..")
        pairs = f"({{name: batch[name] for name in batch if name != {last}}}, batch[{last}])"
        raise DataError(
            f"batch {position} is {describe(batch)}, without labels; give pairs (inputs, labels) or mappings with the "
            f'entry "labels"{f": [{pairs} for batch in data]" if isinstance(batch, Mapping) else ""}'
        )
    if like is None and model is not None:
        inputs = _as_argument(inputs, model)
    return inputs, None if labels is _UNLABELLED else labels


def _each(data: Iterable[Any], what: str) -> Iterator[Any]:
    iterator, position = iter(data), 0
    while True:
        try:
            batch = next(iterator)
        except StopIteration:
            return
        except (TypeError, ValueError, RuntimeError) as error:
            if not isinstance(data, DataLoader) or isinstance(error, SpectrimError):
                raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
            raise DataError(
                f"the DataLoader cannot make batch {position} of {what}: {reason}; give tensors of one shape in the "
                "data set (a transform such as ToTensor makes them), or a collate_fn"
            ) from error
        yield batch
        position += 1


def _from_mapping(batch: Mapping[Any, Any]) -> tuple[Inputs, Any]:
    """By name, with the entry that is the labels."""
    names = [name for name in LABELS if name in batch]
    if len(names) != 1:
        return as_inputs(batch), _UNLABELLED
    return as_inputs({name: value for name, value in batch.items() if name not in names}), from_numpy(batch[names[0]])


def _as_argument(inputs: Inputs, model: nn.Module) -> Inputs:
    """The same, as one tuple if there are several and the model's forward takes one argument."""
    if len(inputs.args) < 2:
        return inputs
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return inputs
    positional = [each.kind for each in parameters if each.kind not in (each.KEYWORD_ONLY, each.VAR_KEYWORD)]
    is_single = len(positional) == 1 and positional[0] != inspect.Parameter.VAR_POSITIONAL
    return replace(inputs, args=(inputs.args,)) if is_single else inputs


def _by_example(batch: Any, like: Inputs, position: int) -> tuple[Inputs, Any]:
    """What fits the example, and the labels beside it."""
    readings = list(_readings(from_numpy(batch)))
    if len(like.kwargs) == 1 and not like.args:  # the only name needs not be given
        (name,) = like.kwargs
        singles = [(inputs, labels) for inputs, labels in readings if len(inputs.args) == 1]
        readings += [(Inputs((), {name: inputs.args[0]}), labels) for inputs, labels in singles]
    for same_length in (True, False):
        for inputs, labels in readings:
            if _fits(inputs.args, like.args, same_length=True, inner=same_length) and _fits(inputs.kwargs, like.kwargs):
                return _selected(inputs, like, labels)
    for inputs, labels in readings:
        if inputs.kwargs and not (inputs.args or like.kwargs):  # names say by themselves what they are
            named, own = _from_mapping(inputs.kwargs)
            return named, own if labels is _UNLABELLED else labels
    raise DataError(
        f"batch {position} is {describe(batch)}, which does not fit the example inputs ({like.describe()})"
        f"{_difference(readings, like)}; give batches like the example, with or without labels after the inputs; one "
        "batch alone goes into a list, [(inputs, labels)]"
    )


def _readings(batch: Any) -> Iterator[tuple[Inputs, Any]]:
    """What a batch may mean, the likeliest first: the inputs and the labels."""
    values = [(batch, _UNLABELLED)]
    if _is_sequence(batch) and len(batch) == 1:
        values.append((batch[0], _UNLABELLED))
    if _is_sequence(batch) and len(batch) > 1:
        values.append((batch[0] if len(batch) == 2 else batch[:-1], batch[-1]))
    for value, labels in values:
        yield as_inputs(value), labels
        if not isinstance(value, Inputs):
            yield Inputs((value,), {}), labels


def _fits(value: Any, example: Any, *, same_length: bool = True, inner: bool = True) -> bool:
    """Whether a value has the structure of an example, of which a mapping may have more entries.

    Without `same_length`, a list may have any number of things like the first of the example's; `inner` is that of what
    is inside.
    """
    if isinstance(example, Tensor):
        return isinstance(value, Tensor) and value.ndim == example.ndim
    if isinstance(example, PackedSequence):
        return isinstance(value, PackedSequence)
    if isinstance(example, Mapping):
        known = isinstance(value, Mapping) and all(name in value for name in example)
        return known and all(_fits(value[name], example[name], same_length=inner, inner=inner) for name in example)
    if _is_sequence(example):
        if not _is_sequence(value) or (same_length and len(value) != len(example)) or bool(value) != bool(example):
            return False
        examples = example if len(value) == len(example) else [example[0]] * len(value)
        return all(_fits(*pair, same_length=inner, inner=inner) for pair in zip(value, examples, strict=True))
    return True


def _selected(inputs: Inputs, like: Inputs, labels: Any) -> tuple[Inputs, Any]:
    """The entries of mappings that the example has; of the others, the labels where there are none yet."""

    def known(value: Any, example: Any) -> Any:
        nonlocal labels
        if not isinstance(example, Mapping):
            return value
        if labels is _UNLABELLED:
            labels = next((value[name] for name in LABELS if name in value and name not in example), _UNLABELLED)
        return {name: value[name] for name in example}

    args = tuple(known(*pair) for pair in zip(inputs.args, like.args, strict=True))
    return Inputs(args, known(inputs.kwargs, like.kwargs), like.mask), labels


def _difference(readings: Sequence[tuple[Inputs, Any]], like: Inputs) -> str:
    """What is missing, where that can be told."""
    for inputs, _ in readings:
        missing = [repr(name) for name in like.kwargs if name not in inputs.kwargs]
        if inputs.kwargs and missing:
            return f": it has no {', '.join(missing)}"
        pairs = list(zip(inputs.tensors(), like.tensors(), strict=False))
        if len(inputs.args) == len(like.args) and all(own.ndim + 1 == other.ndim for own, other in pairs) and pairs:
            return ": the batch dimension is missing, which [batch[None] for batch in data] adds"
    return ""


def _is_sequence(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | PackedSequence)
