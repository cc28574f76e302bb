"""Every call reads batches in the same way: by the example where there is one, and refuses what is no batch."""

import itertools
from collections import UserDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import same_state, small_mlp, state
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import spectrim as st
from spectrim import errors
from spectrim.core.batches import length_of, split_labels, without_labels
from spectrim.core.execution import Inputs, as_inputs

torch.manual_seed(0)
A, B, Y = torch.randn(24, 12), torch.randn(24, 12), torch.arange(24) % 4


class Two(nn.Module):
    """The absolute difference of two inputs, classified."""

    def __init__(self) -> None:
        super().__init__()
        self.body = small_mlp(dtype=torch.float32)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.body((a - b).abs())


class Pair(Two):
    """The same with one argument."""

    def forward(self, pair: Any) -> Tensor:  # type: ignore[override]
        a, b = pair
        return super().forward(a, b)


class Samples(Dataset[Any]):
    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> Any:
        return (A[index], B[index]), Y[index]


class Flow(IterableDataset[Any]):
    """Without a length, and without an end if that is `None`."""

    def __init__(self, batches: int | None = 2) -> None:
        self.samples = None if batches is None else 8 * batches

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(itertools.cycle(zip(A, Y, strict=True)), self.samples)


NAMES = {"a": A, "b": B}
READ: dict[str, tuple[Any, Any, Any, bool]] = {
    # example, batch, what the model gets, whether there is a label
    "a tensor": (A[:1], A, ((A,), {}), False),
    "a tuple of one": (A[:1], (A,), ((A,), {}), False),
    "a list of one": (A[:1], [A], ((A,), {}), False),
    "a pair": (A[:1], (A, Y), ((A,), {}), True),
    "a list with a label": (A[:1], [A, Y], ((A,), {}), True),
    "a nested single": (A[:1], ((A,), Y), ((A,), {}), True),
    "arrays": (A[:1], (A.numpy(), Y.numpy()), ((A,), {}), True),
    "an array": (A[:1], A.numpy(), ((A,), {}), False),
    "two": ((A[:1], B[:1]), (A, B), ((A, B), {}), False),
    "two and a label": ((A[:1], B[:1]), [A, B, Y], ((A, B), {}), True),
    "two nested and a label": ((A[:1], B[:1]), [[A, B], Y], ((A, B), {}), True),
    "two nested arrays": ((A[:1], B[:1]), ((A.numpy(), B.numpy()), Y.numpy()), ((A, B), {}), True),
    "one argument of two": (((A[:1], B[:1]),), (A, B), (((A, B),), {}), False),
    "one argument of two and a label": (((A[:1], B[:1]),), ((A, B), Y), (((A, B),), {}), True),
    "one argument of two, flat": (((A[:1], B[:1]),), (A, B, Y), (((A, B),), {}), True),
    "images in a list": (([A[0], A[1]],), [[A[0], A[1], A[2]], Y], (([A[0], A[1], A[2]],), {}), True),
    "by name": ({"a": A[:1], "b": B[:1]}, NAMES, ((), NAMES), False),
    "by name with labels": ({"a": A[:1], "b": B[:1]}, {**NAMES, "labels": Y}, ((), NAMES), True),
    "by name with a label": ({"a": A[:1], "b": B[:1]}, {**NAMES, "label": Y}, ((), NAMES), True),
    "by name and a label": ({"a": A[:1], "b": B[:1]}, (NAMES, Y), ((), NAMES), True),
    "of another package": ({"a": A[:1], "b": B[:1]}, UserDict({**NAMES, "labels": Y}), ((), NAMES), True),
    "more than the example": ({"a": A[:1]}, NAMES, ((), {"a": A}), False),
    "one mapping as the argument": (({"a": A[:1]},), {**NAMES, "labels": Y}, (({"a": A},), {}), True),
    "names for positions": ((A[:1], B[:1]), {"a": A}, ((), {"a": A}), False),
    "names for positions, and labels": ((A[:1], B[:1]), {**NAMES, "labels": Y}, ((), NAMES), True),
    "names for positions, and a label": ((A[:1], B[:1]), (NAMES, Y), ((), NAMES), True),
    "the only name": ({"a": A[:1]}, A, ((), {"a": A}), False),
    "the only name and a label": ({"a": A[:1]}, [A, Y], ((), {"a": A}), True),
    "read already": (A[:1], Inputs((A,), {}), ((A,), {}), False),
    "longer sequences": (torch.zeros(1, 3, 12), (torch.zeros(2, 5, 12), Y), ((torch.zeros(2, 5, 12),), {}), True),
}


def equal(value: Any, expected: Any) -> bool:
    if isinstance(expected, Tensor):
        return torch.equal(value, expected)
    if isinstance(expected, dict):
        return list(value) == list(expected) and all(equal(value[name], expected[name]) for name in expected)
    return len(value) == len(expected) and all(map(equal, value, expected))


@pytest.mark.parametrize(("example", "batch", "expected", "labelled"), READ.values(), ids=READ.keys())
def test_an_example_decides_what_the_model_gets(example: Any, batch: Any, expected: Any, labelled: bool) -> None:
    like = as_inputs(example)
    (inputs,) = without_labels([batch], like=like)
    assert equal((inputs.args, inputs.kwargs), expected)
    if labelled:
        inputs, labels = split_labels(batch, position=0, like=like)
        assert equal((inputs.args, inputs.kwargs, labels), (*expected, Y))
    else:
        with pytest.raises(errors.DataError, match=r"batch 0 is .*, without labels; give pairs"):
            split_labels(batch, position=0, like=like)


MISFITS: dict[str, tuple[Any, Any, str]] = {
    "too many": (A[:1], (A, Y, Y), r"batch 3 is tuple\(float32 \[24, 12\], int64 \[24\], int64 \[24\]\).*\[1, 12\]"),
    "too few": (
        (A[:1], B[:1]),
        (A,),
        r"tuple\(float32 \[24, 12\]\), which does not fit the example inputs \(float32 .*,",
    ),
    "no batch dimension": (A[:1], A[0], r"batch 3 is float32 \[12\].*: the batch dimension is missing, .*; give"),
    "a missing name": (NAMES, {"a": A, "c": B}, r"a=float32 .*: it has no 'b'; give batches like the example"),
    "positions for names": (NAMES, (A, B, Y), "does not fit"),
    "a string": (A[:1], "A", "batch 3 is str"),
    "nothing": (A[:1], None, "batch 3 is NoneType"),
    "numbers": (A[:1], [1.0, 2.0], r"list\(float, float\)"),
    "objects": (A[:1], [object()] * 12, r"list\((object, ){8}\.\.\)"),
    "words": (A[:1], np.array(["a"]), r"an array of <U1 \[1\] makes no tensor"),
}


@pytest.mark.parametrize(("example", "batch", "message"), MISFITS.values(), ids=MISFITS.keys())
def test_another_structure_than_the_example_is_refused(example: Any, batch: Any, message: str) -> None:
    like = as_inputs(example)
    fits = tuple(like.args) or dict(like.kwargs)
    with pytest.raises(errors.DataError, match=message):
        list(without_labels([fits, fits, fits, batch], like=like))


def calibrated(model: nn.Module) -> st.Analysis:
    return st.analyze(model, A[:1], calibration=st.calibrate(model, [A]))


CALLS: dict[str, Callable[[nn.Module, Any], object]] = {
    "compress": lambda m, data: st.compress(m, st.Rank(2), example_inputs=A[:1], data=data),
    "calibrate": lambda m, data: st.calibrate(m, data, labels=True),
    "sensitivity": lambda m, data: st.sensitivity(m, calibrated(m), data, labels=True),
    "finetune": lambda m, data: st.finetune(m, data, epochs=1),
    "held out": lambda m, data: st.finetune(m, [(A, Y)], epochs=1, held_out=data),
    "accuracy": lambda m, data: st.accuracy(m, data),
    "measure": lambda m, data: st.measure(m, A[:1], data=data, latency=False),
}
NO_DATA: dict[str, tuple[Any, str]] = {
    "a data set": (TensorDataset(A, Y), "TensorDataset, which gives single samples; give .*DataLoader"),
    "an endless data set": (Flow(None), "Flow, which gives single samples"),
    "a tensor": (A, r"one Tensor, float32 \[24, 12\].*sample by sample; give a list of batches: \[data\], .*split"),
    "an array": (A.numpy(), r"one ndarray, array of float32 \[24, 12\].*give a list of batches"),
    "a batch": ({"x": A, "labels": Y}, r"dict, which is one batch, .*; give a list of batches: \[data\]"),
    "a string": ("cifar10", "is a str; give batches"),
    "a number": (3, "is a int; give batches"),
    "a model": (nn.Linear(12, 4), "is a Linear; give batches"),
    "samples that make no batch": (DataLoader([(object(), 1)]), "the DataLoader cannot make batch 0 of .*: .*object.*"),  # type: ignore[arg-type]
    "samples of two shapes": (
        DataLoader([(A[0], 1), (A[0, :5], 1)], batch_size=2),  # type: ignore[arg-type]
        r"cannot make batch 0 .*equal size.*; give tensors of one shape",
    ),
    "words": ([("a", "b")], "batch 0"),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
@pytest.mark.parametrize(("data", "message"), NO_DATA.values(), ids=NO_DATA.keys())
def test_what_is_no_batches_is_one_clear_error_everywhere(
    call: Callable[[nn.Module, Any], object], data: Any, message: str
) -> None:
    model = small_mlp(dtype=torch.float32)
    before = state(model)
    with pytest.raises(errors.SpectrimError, match=message) as caught:
        call(model, data)
    assert "labels=True" not in str(caught.value)
    assert same_state(model, before)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_every_call_takes_every_kind_of_pairs(call: Callable[[nn.Module, Any], object]) -> None:
    model = small_mlp(dtype=torch.float32)
    sources: list[Any] = [
        [(A, Y)],
        [[A.numpy(), Y.numpy()]],
        [((A,), Y)],
        DataLoader(TensorDataset(A, Y), batch_size=8),
        DataLoader(Flow(), batch_size=8),
    ]
    for data in sources:
        call(model, data)


@pytest.mark.parametrize("kind", [Two, Pair])
@pytest.mark.parametrize("nested", [True, False])
def test_two_inputs_and_one_that_is_a_pair(kind: type[Two], nested: bool) -> None:
    model = kind().eval()
    example = ((A[:1], B[:1]),) if kind is Pair else (A[:1], B[:1])
    data: Any = DataLoader(Samples() if nested else TensorDataset(A, B, Y), batch_size=12)
    assert st.compress(model, st.Rank(2), example_inputs=example, data=data).plan.metric == "activation"
    right = int((model.body((A - B).abs()).argmax(1) == Y).sum())
    assert st.accuracy(model, data).correct == right
    assert st.measure(model, example, data=data, latency=False).accuracy.correct == right
    assert len(st.finetune(model, data, epochs=1).history) == 1
    assert st.calibrate(model, data, labels=True).batches == 2


def test_endless_data_ends_after_the_batches_asked_for(tmp_path: Path) -> None:
    model, endless = small_mlp(dtype=torch.float32).eval(), DataLoader(Flow(None), batch_size=8)
    assert length_of(endless) == 0
    st.compress(model, st.Rank(2), example_inputs=A[:1], data=endless, max_batches=2)
    assert st.calibrate(model, endless, labels=True, max_batches=3).batches == 3
    assert st.calibrate(model, (x for x in itertools.repeat(A)), max_batches=3).batches == 3


def test_the_hint_of_labels_stands_where_there_is_that_argument() -> None:
    model, pairs = small_mlp(dtype=torch.float32), [(A, Y)]
    analysis = calibrated(model)
    for call in (
        lambda: st.calibrate(nn.Sequential(model, Two()), pairs),
        lambda: st.sensitivity(model, analysis, pairs),
    ):
        with pytest.raises(errors.SpectrimError, match=r"pass labels=True"):
            call()
    with pytest.raises(errors.DataError) as caught:
        st.compress(model, st.Rank(2), example_inputs=A[:1], data=[A[:, :5]])
    assert "labels=True" not in str(caught.value)


def test_batches_that_are_written_into_one_memory_are_refused() -> None:
    def batches() -> Iterator[Tensor]:
        memory = torch.empty(16, 12)
        for seed in range(4):
            memory.copy_(torch.randn(16, 12, generator=torch.Generator().manual_seed(seed)))
            yield memory

    model, example = small_mlp(dtype=torch.float32), torch.randn(1, 12)
    with pytest.raises(errors.DataError, match="written into the same memory"):
        st.compress(model, st.Budget(params=0.6), example_inputs=example, data=batches())
    one_by_one = st.compress(model, st.Rank(3), example_inputs=example, data=batches()).fidelity
    again = st.compress(model, st.Rank(3), example_inputs=example, data=[batch.clone() for batch in batches()])
    assert one_by_one is not None
    assert one_by_one.relative_error != 0
    assert again.fidelity is not None


def test_endless_batches_that_are_kept_end_where_memory_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spectrim.core.batches.free_bytes", lambda device: 10_000_000)
    endless = (torch.randn(1000, 12) for _ in itertools.count())
    model, example = small_mlp(dtype=torch.float32), torch.randn(1, 12)
    with pytest.raises(errors.ResourceError, match=r"209 calibration batches .* give max_batches="):
        st.compress(model, st.Budget(params=0.6), example_inputs=example, data=endless)
