"""Every argument of every public function with what it cannot take: it works, or an error of ours says why not."""

import copy
import inspect
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import inputs, same_state, small_cnn, small_mlp, state
from torch import nn

import spectrim as st

DATA = ("data", "batches", "test", "held_out")
"""Arguments that hold batches, whose reading has tests of its own."""


class Pairs(torch.utils.data.Dataset[Any]):
    """A data set where a loader belongs."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Any:
        if index > 1:
            raise IndexError
        return torch.zeros(12), 0


class Plain(nn.Module):
    """No parameters, no layers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def model() -> nn.Sequential:
    return small_mlp(dtype=torch.float32).eval()


def example() -> torch.Tensor:
    return inputs(4, 12, dtype=torch.float32)


def with_nan() -> nn.Module:
    network = model()
    network[0].weight.data[0, 0] = float("nan")
    return network


def files(folder: Path) -> dict[str, Path]:
    """Paths that hold no model."""
    paths = {"garbage": b"\x00\xff\x13 no file of ours", "pickle": pickle.dumps({"a": 1}), "empty file": b""}
    written = st.save(model(), folder / "whole.safetensors").read_bytes()
    paths |= {"truncated": written[: len(written) // 2], "other format": b'{"version": 1, "layers": []}'}
    for name, content in paths.items():
        (folder / name).write_bytes(content)
    return {name: folder / name for name in paths} | {
        "folder": folder,
        "missing": folder / "no" / "such" / "file",
        "below a file": folder / "garbage" / "file",
    }


def wrong(folder: Path) -> dict[str, Any]:
    """What a caller may give by mistake, by name."""
    x = example()
    other = small_cnn(dtype=torch.float32).eval()
    analysis = st.analyze(other, inputs(1, 3, 12, 12, dtype=torch.float32))
    numbers: dict[str, Any] = {
        str(number): number for number in (0, -1, 0.5, -0.5, 1.5, float("nan"), float("inf"), 2**63, True)
    }
    values: dict[str, Any] = {
        "None": None,
        "empty text": "",
        "number in text": "20",
        "word": "no such",
        "bytes": b"bytes",
        "object": object(),
        "function": lambda: None,
        "class": int,
        "empty list": [],
        "empty dict": {},
        "empty tuple": (),
        "list of None": [None],
        "unknown names": ["no such layer"],
        "unknown keys": {"no such": 1},
        "set": {1},
        "used up": iter(()),
        "data set": Pairs(),
    }
    tensors: dict[str, Any] = {
        "one number": torch.tensor(1.0),
        "wrong shape": torch.zeros(2, 5),
        "no rows": torch.zeros(0, 12),
        "whole numbers": torch.zeros(4, 12, dtype=torch.uint8),
        "double": x.double(),
        "complex": x.to(torch.complex64),
        "sparse": x.to_sparse(),
        "on meta": x.to("meta"),
        "nothing but nan": torch.full_like(x, float("nan")),
    }
    models: dict[str, Any] = {
        "a class of models": nn.Linear,
        "a lone layer": nn.Linear(12, 4),
        "no modules": nn.Sequential(),
        "no parameters": Plain(),
        "lazy": nn.Sequential(nn.LazyLinear(4)),
        "scripted": torch.jit.trace(model(), x, check_trace=False),
        "wrapped": nn.DataParallel(model()),
        "nan weights": with_nan(),
        "meta weights": model().to("meta"),
        "another network": other,
    }
    plans: dict[str, Any] = {
        "a rank too high": st.Rank(10**6),
        "a budget too low": st.Budget(macs=1e-9),
        "a budget of latency": st.Budget(latency=0.5, runtime="no such"),
        "a rule's class": st.Rank,
        "an analysis of another": analysis,
        "a plan of another": st.plan(analysis, st.Rank(1)),
    }
    return numbers | values | tensors | models | plans | dict(files(folder))


def right(folder: Path) -> dict[str, Any]:
    """What each argument can take, by its name."""
    network, x = model(), example()
    analysis = st.analyze(network, x, calibration=st.calibrate(network, [x]))
    measured = st.measure(network, x, latency=False)
    variant = st.Variant(name="dense", stage="dense", measurement=measured)
    results = st.Results(title="a title", dense=variant, variants=())
    return {
        **{"model": network, "dense": network, "teacher": network, "small": network, "example_inputs": x},
        "analysis": analysis,
        **{name: [(x, torch.zeros(4, dtype=torch.int64))] for name in DATA},
        **{"rule": st.Rank(2), "rule_or_plan": st.Rank(2), "results": results, "source": analysis, "value": analysis},
        **{"path": folder / "written", "folder": folder / "folder", "out": folder / "out", "epochs": 1, "rounds": 5},
        **{"history": [st.Epoch(epoch=1, loss=1.0, seconds=1.0)], "schemes": [], "figure": None, "changes": None},
        **{"points": 2, "latency": False, "check": False},
    }


FUNCTIONS = {name: value for name in st.__all__ if inspect.isfunction(value := getattr(st, name))}
FUNCTIONS |= {f"{name}.load": kind.load for name in st.__all__ if hasattr(kind := getattr(st, name), "load")}
CLASSES = {name: value for name in st.__all__ if inspect.isclass(value := getattr(st, name))}


def arguments(function: Callable[..., Any], folder: Path) -> dict[str, Any]:
    """A call that works."""
    values = right(folder)
    if function is st.load:
        values["path"] = st.save(values["model"], folder / "saved.safetensors")
    if function in (st.quantize, st.export_onnx):
        values["path"] = folder / "written.onnx"
    if function is st.export_openvino:
        values["path"] = folder / "written.xml"
    if function is st.runtime_gain:
        values["runtime"] = "torch"
    if function is st.plot_ranks:
        values["history"] = [st.training.RankStep(step=0, ranks={"0": 2}, kept=0.5)]
    if function is st.sensitivity:
        values["batches"] = [example()]
    return {name: values[name] for name in inspect.signature(function).parameters if name in values}


EXPORTS = ("quantize", "compare_quantized", "export_onnx", "export_openvino", "export_program", "latency_table")
QUICK = (
    *("-1", "nan", "object", "number", "bytes", "list of None", "unknown keys", "one number", "on meta"),
    *("a class of models", "lazy", "scripted", "meta weights", "a rank too high", "an analysis of another"),
)
"""Functions that take long once they work, and what they have to refuse before."""

LIMITS = ("macs", "params", "bytes", "latency")


def limited_by(name: str) -> Callable[[Any], object]:
    return lambda value: st.Budget(**{name: value})


@pytest.fixture(scope="module")
def wrong_values(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return wrong(tmp_path_factory.mktemp("wrong"))


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.filterwarnings("ignore")
def test_a_wrong_argument_is_refused_by_an_error_of_ours(
    name: str, tmp_path: Path, wrong_values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # some of the words are good names of files
    function, usual, foreign = FUNCTIONS[name], arguments(FUNCTIONS[name], tmp_path), []
    before = state(usual["model"]) if "model" in usual else {}
    for parameter in inspect.signature(function).parameters:
        for label, value in {} if parameter in DATA else wrong_values.items():
            if name in EXPORTS and label not in QUICK:
                continue
            if parameter.startswith("on_") and callable(value):
                continue  # what a function of the caller raises is the caller's
            try:
                function(**usual | {parameter: copy.deepcopy(value) if parameter == "model" else value})
            except st.errors.SpectrimError:
                pass
            except Exception as error:
                foreign.append(f"{parameter} = {label}: {type(error).__name__}: {error}"[:240])
            if parameter == "inplace" and "model" in usual:  # True works
                usual["model"] = model()
    assert not foreign, "\n" + "\n".join(foreign)
    assert not before or same_state(usual["model"], before)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.filterwarnings("ignore")
def test_a_wrong_value_of_a_class_is_refused_by_an_error_of_ours(name: str, wrong_values: dict[str, Any]) -> None:
    parameters = [parameter for parameter in inspect.signature(CLASSES[name]).parameters if parameter[0] != "_"]
    foreign = []
    for label, value in wrong_values.items():
        try:
            CLASSES[name](**dict.fromkeys(parameters, value))
        except st.errors.SpectrimError:
            pass
        except Exception as error:
            foreign.append(f"{label}: {type(error).__name__}: {error}"[:240])
    assert not foreign, "\n" + "\n".join(foreign)


@pytest.mark.parametrize("rule", [st.Rank, st.Ratio, st.Energy, *map(limited_by, LIMITS)])
def test_a_rule_out_of_range_is_refused(rule: Callable[[Any], object], wrong_values: dict[str, Any]) -> None:
    for label, value in wrong_values.items():
        try:
            rule(value)
        except st.errors.RuleError:
            continue
        assert label in ("0.5", "small", f"{2**63}"), label


def test_the_message_says_what_came_and_what_to_give() -> None:
    with pytest.raises(st.errors.ArgumentError, match=r"max_batches='20': give a whole number or None"):
        st.compress(model(), st.Rank(2), example_inputs=example(), max_batches="20")  # type: ignore[arg-type]
    with pytest.raises(st.errors.ArgumentError, match=r"this is the class, make one: Linear\(\.\.\)"):
        st.merge(nn.Linear)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        st.merge(model(), copy=True)  # type: ignore[call-arg]


def test_an_analysis_of_another_model_is_refused() -> None:
    analysis, x = st.analyze(model(), example()), example()
    other = nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 4))
    for call in (
        lambda: st.compress(other, st.Rank(2), example_inputs=x, analysis=analysis),
        lambda: st.sensitivity(other, analysis, [x], metric="plain"),
        lambda: st.latency_table(other, x, analysis=analysis),
    ):
        with pytest.raises(st.errors.PlanError, match="analysis is of another model"):
            call()


@pytest.mark.parametrize("number", [0, -1])
def test_no_batches_are_refused(number: int) -> None:
    with pytest.raises(st.errors.DataError, match=f"max_batches={number}: give at least 1, or None for all"):
        st.calibrate(model(), [example()], max_batches=number)
