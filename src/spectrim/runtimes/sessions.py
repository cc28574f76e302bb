"""The runtimes that a network can be timed in, each behind the same two calls: run once, and show the outputs.

A runtime is prepared with a fixed number of threads and its precision stated, so that like is compared with like.
"""

import copy
import difflib
import importlib.metadata
import inspect
import os
import platform
import shutil
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from spectrim.core.errors import DependencyError, EngineError, ModelError, SpectrimError
from spectrim.core.execution import (
    Inputs,
    as_inputs,
    call,
    device_of,
    evaluating,
    on_device_of,
    require_repeatable,
)
from spectrim.core.nested import tensors
from spectrim.runtimes.conversion import first_line, openvino_of, to_onnx
from spectrim.runtimes.timing import Lap, pass_timer

if TYPE_CHECKING:
    import onnx

RuntimeName = Literal["torch", "channels_last", "compile", "onnxruntime", "openvino", "openvino-bf16", "torch-bf16"]
OnnxRuntimeName = Literal["onnxruntime", "openvino", "openvino-bf16"]
Arrays = Sequence[NDArray[Any]] | Mapping[str, NDArray[Any]]

RUNTIMES: tuple[RuntimeName, ...] = get_args(RuntimeName)
"""Every runtime: torch eager; the same with images and weights in channels_last; torch.compile with frozen weights in
channels_last; ONNX Runtime with all its optimisations; OpenVINO in float32 and in bfloat16; torch eager in bfloat16."""

_OF_ONNX: tuple[OnnxRuntimeName, ...] = get_args(OnnxRuntimeName)
_PACKAGES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"onnxruntime": ("onnx", "onnxruntime"), "openvino": ("onnx", "openvino"), "openvino-bf16": ("onnx", "openvino")}
)


class Prepared:
    """A network in a runtime, ready to run on the inputs it was prepared with, until it is closed.

    A context manager. Several may be open at once; they are closed in the opposite order, as `with` and `ExitStack` do.
    """

    def __init__(
        self,
        *,
        run: Callable[[], object],
        outputs: Callable[[], list[Tensor]],
        resources: ExitStack,
        device: torch.device,
        threads: int,
    ) -> None:
        self._run, self._outputs, self._resources = run, outputs, resources
        self._device, self._threads = device, threads

    def run(self) -> None:
        """One forward pass; on a GPU it may still be under way, see `finish`."""
        self._run()

    def outputs(self) -> list[Tensor]:
        """One forward pass, and every tensor that it gives, on the CPU; shorter floats as float32."""
        return self._outputs()

    def finish(self) -> None:
        """Wait until the passes that were begun are done."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def timer(self, *, between: Callable[[], object] | None = None) -> Callable[[], Lap]:
        """Warm up, and give a function that times a pass; processor time too where one thread does the work.

        `between` is called before every pass and not timed.
        """
        cpu = self._threads == 1 and self._device.type == "cpu"
        return pass_timer(self.run, finish=self.finish, cpu=cpu, between=between)

    def close(self) -> None:
        """Free all that was made, and put back the number of threads and the model's flags."""
        self._run = self._outputs = _closed
        self._resources.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def require_runtime(name: str, *, threads: int = 1) -> RuntimeName:
    """The runtime of that name, if it can be had here with so many threads.

    Raises:
        EngineError: there is no runtime of that name, fewer processor cores than threads, or no compiler for `compile`.
        DependencyError: a package that it needs is not installed.
    """
    known = next((one for one in RUNTIMES if one == name), None)
    if known is None:
        near = difflib.get_close_matches(str(name), RUNTIMES, n=1)
        hint = f"did you mean {near[0]!r}? There are" if near else "there are"
        raise EngineError(f"runtime {name!r} is unknown; {hint} {', '.join(RUNTIMES)}")
    require_threads(threads)
    for package in _PACKAGES.get(known, ()):
        _require_package(package, runtime=known)
    return known


def require_threads(threads: int) -> None:
    """Raises `EngineError` for less than 1 thread, or more than this process may use processor cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not 1 <= threads <= cores:
        has = (
            "1 processor core; give threads=1" if cores == 1 else f"{cores} processor cores; give 1 to {cores} threads"
        )
        raise EngineError(f"threads={threads}: this process may use {has}")


def prepare(
    model: nn.Module, example_inputs: Any, *, runtime: str = "torch", threads: int = 1, checked: bool = False
) -> Prepared:
    """Bring a model into a runtime.

    While it is open, the model is in evaluation mode and gradients are off; closing puts back everything. torch runs
    the model itself, every other runtime a copy of it.

    Args:
        model: The model; `onnxruntime` and `openvino` take one on the CPU only.
        example_inputs: One call's inputs, as for `st.measure`; the batch size is fixed by them.
        runtime: One of `RUNTIMES`.
        threads: How many one pass may use.
        checked: It is known that the model is repeatable; saves two passes.

    Raises:
        EngineError: as `require_runtime`; a model on a GPU in a runtime for CPUs; a failure of the runtime.
        DependencyError: a package that the runtime needs is not installed.
        ModelError: the model cannot run the inputs, changes its output between runs, or cannot be copied or exported.
    """
    name, inputs, device = require_runtime(runtime, threads=threads), as_inputs(example_inputs), device_of(model)
    exported = next((one for one in _OF_ONNX if one == name), None)
    if exported and device.type != "cpu":
        raise EngineError(f"{name} is for the CPU, and the model is on {device}; give it a copy that is on the CPU")
    with ExitStack() as resources:
        resources.enter_context(_threads(threads))
        resources.enter_context(evaluating(model))
        if not checked:
            require_repeatable(model, inputs)
        if exported:
            proto = to_onnx(model, inputs, dynamic_batch=False)
            run, outputs = _engine(proto, _arrays(model, inputs, proto), runtime=exported, threads=threads)
        else:
            run, outputs = _torch(model, on_device_of(model, inputs), runtime=name)
        return Prepared(run=run, outputs=outputs, resources=resources.pop_all(), device=device, threads=threads)


def from_onnx(proto: "onnx.ModelProto", arrays: Arrays, *, runtime: str, threads: int = 1) -> Prepared:
    """Bring an ONNX model into a runtime.

    Args:
        proto: The model.
        arrays: Its inputs, in the graph's order or by name.
        runtime: `onnxruntime`, `openvino` or `openvino-bf16`.
        threads: How many one pass may use.

    Raises:
        EngineError: as `require_runtime`; a runtime that does not read ONNX; a model that the runtime refuses, or that
            changes its output between runs.
        ModelError: OpenVINO does not know an operator.
        DependencyError: a package that the runtime needs is not installed.
    """
    name = require_runtime(runtime, threads=threads)
    exported = next((one for one in _OF_ONNX if one == name), None)
    if exported is None:
        raise EngineError(f"{name} does not read ONNX; {', '.join(_OF_ONNX)} do")
    run, outputs = _engine(proto, _by_name(proto, arrays), runtime=exported, threads=threads)
    device = torch.device("cpu")
    if any(not torch.equal(one, other) for one, other in zip(outputs(), outputs(), strict=True)):
        raise EngineError("two passes of the ONNX model over the same inputs differ; it draws random numbers")
    return Prepared(run=run, outputs=outputs, resources=ExitStack(), device=device, threads=threads)


def fingerprint(runtime: str, *, threads: int = 1) -> str:
    """What times depend on besides the network: processor, instructions, packages, runtime, threads; keys of caches.

    Raises:
        EngineError, DependencyError: as `require_runtime`.
    """
    name = require_runtime(runtime, threads=threads)
    packages = [f"{one} {importlib.metadata.version(one)}" for one in ("torch", *_PACKAGES.get(name, ()))]
    instructions = torch.backends.cpu.get_cpu_capability()
    return "; ".join([_processor(), f"{os.cpu_count()} cores", instructions, name, *packages, f"threads {threads}"])


_Runs = tuple[Callable[[], object], Callable[[], list[Tensor]]]


def _torch(model: nn.Module, inputs: Inputs, *, runtime: RuntimeName) -> _Runs:
    if runtime != "torch":
        model = _copied(model)
    if runtime == "torch-bf16":
        model, inputs = model.to(torch.bfloat16), inputs.map(_halved)
    if runtime != "torch":
        model, inputs = model.to(memory_format=torch.channels_last), inputs.map(_laid_out)
    call(model, inputs)
    function: Callable[..., Any] = model
    if runtime == "compile":
        function = _compiled(model, inputs)
    args, kwargs = inputs.args, dict(inputs.kwargs)

    def run() -> Any:
        with torch.inference_mode():
            return function(*args, **kwargs)

    return run, lambda: [_widened(one) for one in tensors(run())]


def _copied(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except (RuntimeError, TypeError) as error:
        raise ModelError(f"{type(model).__name__} cannot be copied ({error}); time it with runtime='torch'") from error


def _compiled(model: nn.Module, inputs: Inputs) -> Callable[..., Any]:
    """The model, compiled with its weights as constants.

    torch keeps what it compiles with the code of the function, and gives up after a few versions of one: so this one
    has code of its own, which goes when the function does, and no other compiled network is disturbed.
    """
    if device_of(model).type == "cpu":
        _require_compiler()

    def forward(*args: Any, **kwargs: Any) -> Any:
        return model(*args, **kwargs)

    own = types.FunctionType(forward.__code__.replace(), globals(), closure=forward.__closure__)
    made: Callable[..., Any] = torch.compile(own, dynamic=False)
    try:
        # not as options of torch.compile: what captures the graph does not see those, and freezes nothing
        with torch.inference_mode(), torch._inductor.config.patch(freezing=True, compile_threads=1):
            made(*inputs.args, **inputs.kwargs)
    except Exception as error:
        raise EngineError(f"torch.compile cannot compile {type(model).__name__}: {first_line(error)}") from error
    return made


def _require_compiler() -> None:
    if not any(map(shutil.which, filter(None, (os.environ.get("CXX"), "g++", "clang++", "c++", "cl")))):
        raise EngineError("torch.compile needs a C++ compiler, and there is none; install one, or set CXX to its name")


def _engine(
    proto: "onnx.ModelProto", arrays: Mapping[str, NDArray[Any]], *, runtime: OnnxRuntimeName, threads: int
) -> _Runs:
    make = _onnxruntime if runtime == "onnxruntime" else _openvino
    try:
        run, outputs = make(proto, arrays, runtime, threads)
        run()
    except SpectrimError:
        raise
    except Exception as error:
        raise EngineError(f"{runtime} cannot run the model: {first_line(error)}") from error
    return run, outputs


def _onnxruntime(proto: "onnx.ModelProto", arrays: Mapping[str, NDArray[Any]], _: str, threads: int) -> _Runs:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    # threads that wait busily between two passes would take the core from what is timed next
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    for name, array in arrays.items():
        binding.bind_cpu_input(name, array)  # once, so that no pass copies it
    for output in session.get_outputs():
        binding.bind_output(output.name, "cpu")

    def outputs() -> list[Tensor]:
        session.run_with_iobinding(binding)
        return [torch.from_numpy(array).clone() for array in binding.copy_outputs_to_cpu()]

    return lambda: session.run_with_iobinding(binding), outputs


def _openvino(proto: "onnx.ModelProto", arrays: Mapping[str, NDArray[Any]], runtime: str, threads: int) -> _Runs:
    import openvino

    precision = "bf16" if runtime == "openvino-bf16" else "f32"  # by default it takes bf16 where the CPU has it
    settings = {
        "INFERENCE_PRECISION_HINT": precision,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
    }
    compiled = openvino.Core().compile_model(openvino_of(proto, openvino), "CPU", settings)
    got = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    if got != precision:
        raise EngineError(f"OpenVINO computes in {got} on this processor, not in {precision}")
    request = compiled.create_infer_request()
    taken = {name for place in compiled.inputs for name in place.names}  # an input that nothing depends on is gone
    given = {name: openvino.Tensor(array, shared_memory=True) for name, array in arrays.items() if name in taken}
    for name, tensor in given.items():
        request.set_tensor(name, tensor)

    def outputs() -> list[Tensor]:
        found = request.infer(share_outputs=True)
        return [_widened(torch.from_numpy(found[place]).clone()) for place in compiled.outputs]

    return lambda: request.infer(share_outputs=True), outputs


def _arrays(model: nn.Module, inputs: Inputs, proto: "onnx.ModelProto") -> dict[str, NDArray[Any]]:
    """The inputs by their names in the graph, which has them in the order of the model's own arguments."""
    given = inspect.signature(model.forward).bind(*inputs.args, **inputs.kwargs)
    flat = list(tensors((given.args, given.kwargs)))
    if any(one.dtype == torch.bfloat16 for one in flat):
        raise EngineError("an input is bfloat16, which cannot be given to this runtime; give float32")
    return _by_name(proto, [one.detach().contiguous().numpy() for one in flat])


def _by_name(proto: "onnx.ModelProto", arrays: Arrays) -> dict[str, NDArray[Any]]:
    constants = {one.name for one in proto.graph.initializer}
    names = [one.name for one in proto.graph.input if one.name not in constants]
    if isinstance(arrays, Mapping):
        found = dict(arrays)
    else:
        found = dict(zip(names, arrays, strict=False)) if len(arrays) == len(names) else {}
    if set(found) != set(names):
        got = ", ".join(arrays) if isinstance(arrays, Mapping) else f"{len(arrays)} arrays"
        raise EngineError(f"the ONNX model takes {', '.join(names) or 'no inputs'}; it was given {got or 'none'}")
    return found


def _halved(tensor: Tensor) -> Tensor:
    return tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor


def _laid_out(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor


def _widened(tensor: Tensor) -> Tensor:
    """A copy on the CPU, in float32 at least."""
    short = tensor.is_floating_point() and tensor.itemsize < 4
    return tensor.detach().to("cpu", torch.float32 if short else tensor.dtype, copy=True)


def _require_package(name: str, *, runtime: str) -> None:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError as error:
        extras = "onnx" if runtime == "onnxruntime" else "onnx,openvino"
        raise DependencyError(
            f'{runtime} needs {name}, which is not installed; pip install "spectrim[{extras}]"'
        ) from error


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _closed() -> Any:
    raise EngineError("this network was closed; use it within its with block")


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
