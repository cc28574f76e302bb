"""Every runtime computes what torch computes, and leaves nothing behind."""

import ctypes
import importlib.metadata
import shutil
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bfloat16 import refused_without_bfloat16
from cases import inputs, same_state, small_mlp, state
from torch import Tensor, nn

import spectrim as st
from spectrim import errors
from spectrim.core.execution import as_inputs
from spectrim.runtimes import engines, sessions
from spectrim.runtimes.conversion import to_onnx
from spectrim.runtimes.sessions import RUNTIMES, Runtime, fingerprint, require_runtime

QUICK = tuple(name for name in RUNTIMES if name != "compile")
EXPORTED = ("onnxruntime", "openvino", "openvino-bf16")
MLP, X = small_mlp(dtype=torch.float32).eval(), inputs(6, 12, dtype=torch.float32)


def small_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 5),
    )


class Two(nn.Module):
    """Two inputs of two types, two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.last = nn.Linear(8, 3)

    def forward(self, tokens: Tensor, scale: Tensor) -> dict[str, Tensor]:
        y = self.embed(tokens) * scale
        return {"y": self.last(y), "sum": y.sum(dim=1)}


class Noisy(nn.Module):
    """Draws numbers in evaluation mode as well."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) + torch.randn(4)


def close(output: Tensor, expected: Tensor, *, runtime: str) -> bool:
    tolerance = 2e-2 if runtime.endswith("bf16") else 1e-4
    return float((output - expected).abs().max()) <= tolerance * float(expected.abs().max())


@pytest.mark.parametrize("runtime", QUICK)
def test_outputs_are_those_of_torch(runtime: str) -> None:
    model, x = small_net().eval(), inputs(3, 3, 9, 9, dtype=torch.float32)
    with torch.no_grad():
        expected = model(x)
    with refused_without_bfloat16(runtime), require_runtime(runtime).prepare(model, x) as session:
        session.run()
        (output,) = session.outputs()
        assert output.dtype == torch.float32
        assert close(output, expected, runtime=runtime)


@pytest.mark.parametrize("runtime", ["torch-bf16", "onnxruntime", "openvino"])
def test_several_inputs_and_outputs(runtime: str) -> None:
    torch.manual_seed(0)
    model = Two().eval()
    tokens, scale = torch.randint(11, (2, 7)), torch.rand(2, 7, 1)
    with torch.no_grad():
        expected = model(tokens, scale)
    example = {"scale": scale, "tokens": tokens}  # not in the order of the signature
    with require_runtime(runtime).prepare(model, example) as session:
        outputs = session.outputs()
    assert [output.shape for output in outputs] == [tensor.shape for tensor in expected.values()]
    for output, tensor in zip(outputs, expected.values(), strict=True):
        assert close(output, tensor, runtime=runtime)


class Unused(nn.Module):
    """A model that leaves one of its inputs alone."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor, unused: Tensor) -> Tensor:
        return self.linear(x)


@pytest.mark.parametrize("runtime", ["torch", *EXPORTED])
def test_an_input_that_nothing_depends_on(runtime: str) -> None:
    torch.manual_seed(0)
    model, x = Unused().eval(), torch.rand(2, 4)
    with torch.no_grad():
        expected = model(x, x)
    with refused_without_bfloat16(runtime), require_runtime(runtime).prepare(model, (x, torch.rand(2, 5))) as session:
        (output,) = session.outputs()
        assert close(output, expected, runtime=runtime)


@pytest.mark.parametrize("runtime", EXPORTED)
def test_inputs_live_as_long_as_the_session(runtime: str) -> None:
    model = nn.Linear(64, 3).eval()
    x = torch.rand(64, 500).T  # the arrays of the session are a copy, since this is not contiguous
    with torch.no_grad():
        expected = model(x)
    with refused_without_bfloat16(runtime), require_runtime(runtime).prepare(model, x) as session:
        others = [torch.full((500, 64), 7.0) for _ in range(50)]
        (output,) = session.outputs()
        assert close(output, expected, runtime=runtime)
        del others


def test_compiled_outputs_are_those_of_torch_and_weights_are_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = small_net()[:3].eval(), inputs(2, 3, 9, 9, dtype=torch.float32)  # compiling takes seconds a layer
    with torch.no_grad():
        expected = model(x)
    monkeypatch.setattr(sessions, "_copied", lambda model: model)  # to get at the weights that are compiled
    with require_runtime("compile").prepare(model, x) as session:
        assert close(session.outputs()[0], expected, runtime="compile")
        for parameter in model.parameters():
            parameter.data = torch.zeros_like(parameter)
        assert close(session.outputs()[0], expected, runtime="compile")
    assert not torch._inductor.config.freezing


@pytest.mark.parametrize("runtime", ["torch", "channels_last", "torch-bf16", "onnxruntime"])
def test_nothing_is_left_behind(runtime: str) -> None:
    model, x = small_net().train(), inputs(2, 3, 9, 9, dtype=torch.float32)
    before, before_x = state(model), x.clone()
    outside = torch.get_rng_state(), torch.get_num_threads(), torch.is_grad_enabled()
    with require_runtime(runtime).prepare(model, x) as session:
        assert not model.training
        session.run()
    assert same_state(model, before)
    assert torch.equal(x, before_x)
    assert all(module.training for module in model.modules())
    assert all(parameter.is_contiguous() for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), outside[0])
    assert (torch.get_num_threads(), torch.is_grad_enabled()) == outside[1:]
    with pytest.raises(errors.EngineError, match="was closed"):
        session.run()


def test_threads_hold_within_the_block_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions.os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    before = torch.get_num_threads()
    with Runtime("torch", threads=3).prepare(MLP, X):
        assert torch.get_num_threads() == 3
        with Runtime("torch", threads=2).prepare(MLP, X):
            assert torch.get_num_threads() == 2
        assert torch.get_num_threads() == 3
    assert torch.get_num_threads() == before


def test_a_failure_leaves_nothing_behind() -> None:
    model, threads = small_net().train(), torch.get_num_threads()
    with pytest.raises(errors.ModelError, match="cannot run example_inputs"):
        Runtime("torch").prepare(model, X)
    assert model.training
    assert torch.is_grad_enabled()
    assert torch.get_num_threads() == threads


def test_a_timer_tells_processor_time_of_one_thread() -> None:
    with Runtime("torch").prepare(MLP, X) as session:
        timing = session.timer()()
    assert timing.wall > 0
    assert timing.cpu is not None


@pytest.mark.parametrize("runtime", ["torch", "torch-bf16", "onnxruntime"])
def test_a_model_that_changes_its_output_is_refused(runtime: str) -> None:
    with pytest.raises(errors.ModelError, match="not repeatable"):
        require_runtime(runtime).prepare(Noisy(), X)


def graph(*kinds: str) -> Any:
    """x -> the named operators, one after the other -> y."""
    from onnx import TensorProto, helper

    names = ["x", *(f"inner{number}" for number in range(1, len(kinds))), "y"]
    nodes = [helper.make_node(kind, [names[i]], [names[i + 1]]) for i, kind in enumerate(kinds)]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 3]) for name in ("x", "y")]
    whole = helper.make_graph(nodes, "test", values[:1], values[1:])
    return helper.make_model(whole, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.parametrize("runtime", EXPORTED)
def test_an_onnx_model_by_position_and_by_name(runtime: str) -> None:
    x = np.array([[-1, 0, 2], [3, -4, 5]], dtype=np.float32)
    for arrays in ([x], {"x": x}):
        with (
            refused_without_bfloat16(runtime),
            require_runtime(runtime).from_onnx(graph("Relu", "Neg"), arrays) as session,
        ):
            assert torch.equal(session.outputs()[0], -torch.from_numpy(x).relu())


def test_two_networks_are_open_at_once() -> None:
    x = np.ones((2, 3), dtype=np.float32)
    with ExitStack() as opened:
        kinds = (("Neg",), ("Neg", "Relu"))
        first, second = (
            opened.enter_context(require_runtime(runtime).from_onnx(graph(*kind), [x]))
            for kind, runtime in zip(kinds, EXPORTED, strict=False)
        )
        assert torch.equal(first.outputs()[0], -torch.ones(2, 3))
        assert torch.equal(second.outputs()[0], torch.zeros(2, 3))


def signal_stack() -> int | None:
    """Where the handlers of this thread's signals have their stack."""

    class Stack(ctypes.Structure):
        _fields_ = (("address", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))

    stack = Stack()
    assert ctypes.CDLL(None).sigaltstack(None, ctypes.byref(stack)) == 0
    return stack.address


@pytest.mark.skipif(sys.platform != "linux", reason="reads the stack of signals as Linux gives it")
def test_openvino_sets_the_stack_of_signals_once() -> None:
    """Else the stack of a closed session is set again by the next one to close, and the next Ctrl-C crashes."""
    pytest.importorskip("openvino")
    openvino = Runtime("openvino", 1)
    with openvino.from_onnx(graph("Relu"), [np.ones((2, 3), np.float32)]):
        before = signal_stack()
        with openvino.from_onnx(graph("Relu"), [np.ones((2, 3), np.float32)]):
            assert signal_stack() == before


def test_onnx_models_that_cannot_be_timed() -> None:
    x, runtime = np.zeros((2, 3), dtype=np.float32), require_runtime("onnxruntime", reads_onnx=True)
    with pytest.raises(errors.EngineError, match="does not read ONNX; onnxruntime"):
        require_runtime("torch", reads_onnx=True)
    with pytest.raises(errors.EngineError, match="takes x; it was given 2 arrays"):
        runtime.from_onnx(graph("Relu"), [x, x])
    with pytest.raises(errors.EngineError, match="takes x; it was given z"):
        runtime.from_onnx(graph("Relu"), {"z": x})
    with pytest.raises(errors.EngineError, match="draws random numbers"):
        runtime.from_onnx(graph("RandomNormalLike"), [x])
    with pytest.raises(errors.EngineError, match="onnxruntime cannot run the model"):
        runtime.from_onnx(graph("NoSuchOperator"), [x])
    with pytest.raises(errors.ModelError, match="OpenVINO cannot read the model"):
        require_runtime("openvino").from_onnx(graph("NoSuchOperator"), [x])


def test_an_unknown_runtime_is_refused() -> None:
    with pytest.raises(errors.EngineError, match="did you mean 'onnxruntime'"):
        require_runtime("onnx_runtime")
    with pytest.raises(errors.EngineError, match=r"'' is unknown; there are torch, channels_last"):
        require_runtime("")


@pytest.mark.parametrize("threads", [0, -1, 4096])
def test_impossible_numbers_of_threads_are_refused(threads: int) -> None:
    with pytest.raises(errors.EngineError, match=f"threads={threads}: this process may use"):
        require_runtime("torch", threads=threads)


@pytest.mark.parametrize(
    ("runtime", "missing", "extra"),
    [
        ("onnxruntime", "onnxruntime", "onnx"),
        ("openvino", "openvino", "onnx,openvino"),
        ("openvino-bf16", "onnx", "onnx"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(
    runtime: str, missing: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = importlib.metadata.version

    def version(name: str) -> str:
        if name == missing:
            raise importlib.metadata.PackageNotFoundError(name)
        return known(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(errors.DependencyError, match=rf'needs {missing}, .* pip install "spectrim\[{extra}'):
        require_runtime(runtime)


def test_compiling_needs_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(errors.EngineError, match=r"needs a C\+\+ compiler"):
        require_runtime("compile").prepare(MLP, X)


def test_the_fingerprint_tells_what_times_depend_on(monkeypatch: pytest.MonkeyPatch) -> None:
    first = fingerprint("onnxruntime", threads=1)
    assert first == fingerprint("onnxruntime", threads=1)
    assert f"onnxruntime {importlib.metadata.version('onnxruntime')}" in first
    assert "threads 1" in first
    assert len({fingerprint(name, threads=1) for name in RUNTIMES}) == len(RUNTIMES)
    known = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: f"{known(name)}.next")
    assert fingerprint("onnxruntime", threads=1) != first


class AddAndNorm(nn.Module):
    """What ONNX Runtime fuses into one slow kernel where the batch size is fixed."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(16, 16), nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.layer(x))


@pytest.mark.parametrize("disabled", [engines._DISABLED, []], ids=["as it is", "with all fusions"])
def test_slow_fusions_are_off(disabled: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    make = onnxruntime.SessionOptions

    def options() -> Any:
        session_options = make()
        session_options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
        return session_options

    monkeypatch.setattr(onnxruntime, "SessionOptions", options)
    monkeypatch.setattr(engines, "_DISABLED", disabled)
    engines.onnxruntime_session(
        to_onnx(AddAndNorm().eval(), as_inputs(torch.randn(2, 5, 16)), dynamic_batch=False), threads=1
    )
    graph = onnx.load(tmp_path / "optimised.onnx").graph
    assert ("SkipLayerNormalization" in {node.op_type for node in graph.node}) == (not disabled)


@pytest.mark.gpu
@pytest.mark.parametrize("runtime", ["torch", "channels_last", "torch-bf16"])
def test_a_model_on_a_gpu(runtime: str) -> None:
    model, x = small_net().cuda().eval(), inputs(2, 3, 9, 9, dtype=torch.float32)
    with torch.no_grad():
        expected = model(x.cuda()).cpu()
    with require_runtime(runtime).prepare(model, x) as session:
        assert close(session.outputs()[0], expected, runtime="torch-bf16")  # TF32 as well
        assert session.timer()().cpu is None
    assert st.measure(model, x, reference=model, rounds=5, runtime=runtime).speedup is not None


@pytest.mark.gpu
@pytest.mark.parametrize("runtime", EXPORTED)
def test_runtimes_for_the_cpu_refuse_a_model_on_a_gpu(runtime: str) -> None:
    with pytest.raises(errors.EngineError, match="for the CPU, and the model is on cuda"):
        require_runtime(runtime).prepare(small_net().cuda(), inputs(2, 3, 9, 9))


class Drifting(nn.Module):
    """Gives something else in every pass, and something else again once it is exported."""

    passes = 0

    def forward(self, x: Tensor) -> Tensor:
        Drifting.passes += 1  # of copies too
        return x * 2.0**Drifting.passes


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_outputs_that_are_not_those_of_torch_are_said(runtime: str) -> None:
    pytest.importorskip(runtime)
    with (
        pytest.warns(UserWarning, match=f"{runtime} gives other outputs than torch"),
        sessions.require_runtime(runtime).prepare(Drifting(), torch.ones(2, 3), checked=True),
    ):
        pass
