"""The runtimes that a network can be timed in, each behind the same two calls: run once, and return the outputs.

The number of threads and the precision are fixed, so that times can be compared.
"""

import copy
import importlib.metadata
import os
import platform
import shutil
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from spectrim.core.errors import DependencyError, EngineError, ModelError, warn
from spectrim.core.execution import Inputs, as_inputs, call, device_of, evaluating, on_device_of, require_repeatable
from spectrim.core.names import RUNTIMES as RUNTIMES, RuntimeName as RuntimeName
from spectrim.core.nested import tensors
from spectrim.runtimes.conversion import graph_inputs, optional, to_onnx
from spectrim.runtimes.engines import (
    Arrays,
    array_of,
    input_names,
    onnxruntime_session,
    openvino_model,
    relative_difference,
)
from spectrim.runtimes.faults import raised_as, unknown
from spectrim.runtimes.timing import Timing, interleaved, pass_timer

if TYPE_CHECKING:
    import onnx

ONNX_RUNTIMES: tuple[RuntimeName, ...] = ("onnxruntime", "openvino", "openvino-bf16")
"""Those that read ONNX."""
_FAR = 0.2
"""A share of the largest entry that rounding does not reach, nor that of bfloat16 in most networks."""
_PACKAGES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {name: ("onnx", name.removesuffix("-bf16")) for name in ONNX_RUNTIMES}
)


@dataclass
class Session(AbstractContextManager["Session"]):
    """A network in a runtime, ready to run on the inputs it was prepared with, within its `with` block.

    Leaving the block frees it, and puts back the number of threads and the model's flags. Several may be open at once;
    they are closed in the opposite order, as `with` and `ExitStack` do.

    Attributes:
        run: One forward pass; on a GPU it may still be under way afterwards.
        outputs: One forward pass, and every tensor that it gives, on the CPU; shorter floats as float32.
        resources: Closed with it.
        device: Of the network.
        threads: That a pass may use.
        between: Called before every pass that is timed, and not timed itself.
    """

    run: Callable[[], object]
    outputs: Callable[[], list[Tensor]]
    resources: ExitStack
    device: torch.device
    threads: int
    between: Callable[[], object] | None = None

    def timer(self) -> Callable[[], Timing]:
        """Warm up, and give a function that times a pass; processor time too where one thread does the work."""
        finish = partial(torch.cuda.synchronize, self.device) if self.device.type == "cuda" else None
        cpu = self.threads == 1 and self.device.type == "cpu"
        return pass_timer(self.run, finish=finish, cpu=cpu, between=self.between)

    def __exit__(self, *error: object) -> None:
        self.run = self.outputs = _closed
        self.resources.close()


def timed_together(sessions: Iterable[Session], *, rounds: int, patience: float = 30.0) -> list[list[Timing]]:
    """Open sessions one after the other, time them in interleaved rounds (see `interleaved`), and close them."""
    with ExitStack() as stack:
        timers = [stack.enter_context(session).timer() for session in sessions]
        return interleaved(timers, rounds=rounds, patience=patience)


@dataclass(frozen=True)
class Runtime:
    """A runtime that can run here, and the threads that one pass may use; see `require_runtime`."""

    name: RuntimeName
    threads: int = 1

    def __str__(self) -> str:
        return self.name

    @property
    def reads_onnx(self) -> bool:
        """Whether it runs ONNX models, and no other."""
        return self.name in ONNX_RUNTIMES

    def prepare(self, model: nn.Module, example_inputs: Any, *, checked: bool = False) -> Session:
        """Bring a model into the runtime.

        While it is open, the model is in evaluation mode and gradients are off; closing puts back everything. torch
        runs the model itself, every other runtime a copy of it. The batch size is that of `example_inputs`. A model
        that is known to be repeatable is `checked`, which saves two passes. Warns where a runtime that reads ONNX gives
        other outputs than torch.

        Raises:
            EngineError: a model on a GPU in a runtime for CPUs; a failure of the runtime.
            DependencyError: a package that the runtime needs is not installed.
            ModelError: the model cannot run the inputs, changes its output between runs, or cannot be copied or
                exported.
        """
        inputs, device = as_inputs(example_inputs), device_of(model)
        if self.reads_onnx and device.type != "cpu":
            raise EngineError(f"{self} is for the CPU, and the model is on {device}; give it a copy that is on the CPU")
        with ExitStack() as resources:
            resources.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(self.threads)
            resources.enter_context(evaluating(model))
            if not checked:
                require_repeatable(model, inputs)
            if self.reads_onnx:
                proto, flat = to_onnx(model, inputs, dynamic_batch=False), graph_inputs(model, inputs)
                if any(tensor.dtype == torch.bfloat16 for tensor in flat):
                    raise EngineError("an input is bfloat16, which cannot be given to this runtime; give float32")
                run, outputs = self._engine(proto, [array_of(tensor) for tensor in flat])
                self._compare(outputs(), list(tensors(call(model, inputs))))
            else:
                run, outputs = _torch(model, on_device_of(model, inputs), runtime=self.name)
            return Session(run, outputs, resources.pop_all(), device, self.threads)

    def from_onnx(self, proto: "onnx.ModelProto", arrays: Arrays | Sequence[NDArray[Any]]) -> Session:
        """Bring an ONNX model into a runtime that reads ONNX, with its inputs in order or by name.

        Raises:
            EngineError: a model that the runtime cannot run, or that changes its output between runs.
            ModelError: OpenVINO does not know an operator.
        """
        run, outputs = self._engine(proto, arrays)
        if not all(map(torch.equal, outputs(), outputs())):
            raise EngineError("two passes of the ONNX model over the same inputs differ; it draws random numbers")
        return Session(run, outputs, ExitStack(), torch.device("cpu"), self.threads)

    def _compare(self, outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
        """Warn of floats that are far from those of torch; other numbers, such as indices, may be so for nothing."""
        pairs = zip(expected, outputs, strict=False)
        floats = ((own, other) for own, other in pairs if own.is_floating_point() and own.shape == other.shape)
        difference = max((relative_difference([own], [other]) for own, other in floats), default=0.0)
        if difference > _FAR:
            warn(
                f"{self} gives other outputs than torch: they differ by {difference:.2g} of the largest entry, so that "
                "what is timed is another network; use another runtime"
            )

    def _engine(self, proto: "onnx.ModelProto", arrays: Arrays | Sequence[NDArray[Any]]) -> "_Runs":
        named, bind = _by_name(proto, arrays), _onnxruntime if self.name == "onnxruntime" else _openvino
        with raised_as(EngineError, f"{self} cannot run the model"):
            run, outputs = bind(proto, named, runtime=self)
            run()
        return run, outputs


def require_runtime(name: str, *, threads: int = 1, reads_onnx: bool = False) -> Runtime:
    """The runtime of that name, if it can run here with so many threads.

    Raises:
        EngineError: there is no runtime of that name, fewer processor cores than threads, no compiler for `compile`,
            or one that does not read ONNX although it has to.
        DependencyError: a package that it needs is not installed.
    """
    known = next((runtime for runtime in RUNTIMES if runtime == name), None)
    if known is None:
        raise EngineError(unknown("runtime", name, RUNTIMES))
    require_threads(threads)
    for package in _PACKAGES.get(known, ()):
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError as error:
            extras = "onnx" if known == "onnxruntime" else "onnx,openvino"
            advice = f'pip install "spectrim[{extras}]"'
            raise DependencyError(f"{known} needs {package}, which is not installed; {advice}") from error
    if reads_onnx and known not in ONNX_RUNTIMES:
        raise EngineError(f"{known} does not read ONNX; {', '.join(ONNX_RUNTIMES)} do")
    return Runtime(known, threads)


def require_threads(threads: int) -> None:
    """Raises `EngineError` for less than 1 thread, or more than this process may use processor cores."""
    cores = len(own_cores())
    if not 1 <= threads <= cores:
        advice = "core; give threads=1" if cores == 1 else f"cores; give 1 to {cores} threads"
        raise EngineError(f"threads={threads}: this process may use {cores} processor {advice}")


def own_cores() -> set[int]:
    """The processor cores that this process may use."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def fingerprint(runtime: str, *, threads: int = 1) -> str:
    """What times depend on besides the network: processor, instructions, packages, runtime, threads; keys of caches.

    Raises as `require_runtime`.
    """
    name = require_runtime(runtime, threads=threads).name
    packages = [f"{package} {importlib.metadata.version(package)}" for package in ("torch", *_PACKAGES.get(name, ()))]
    processor = platform.processor() or platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
        processor = next(names, processor)
    instructions = torch.backends.cpu.get_cpu_capability()
    return "; ".join([processor, f"{os.cpu_count()} cores", instructions, name, *packages, f"threads {threads}"])


_Runs = tuple[Callable[[], object], Callable[[], list[Tensor]]]


def _torch(model: nn.Module, inputs: Inputs, *, runtime: RuntimeName) -> _Runs:
    def bfloat16(tensor: Tensor) -> Tensor:
        return tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor

    def channels_last(tensor: Tensor) -> Tensor:
        return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor

    if runtime != "torch":
        model = _copied(model)
    if runtime == "torch-bf16":
        model, inputs = model.to(torch.bfloat16), inputs.map(bfloat16)
    if runtime != "torch":
        model, inputs = model.to(memory_format=torch.channels_last), inputs.map(channels_last)
    call(model, inputs)
    function = _compiled(model, inputs) if runtime == "compile" else model
    args, kwargs = inputs.args, dict(inputs.kwargs)

    def run() -> Any:
        with torch.inference_mode():
            return function(*args, **kwargs)

    return run, lambda: [_widened(output) for output in tensors(run())]


def _copied(model: nn.Module) -> nn.Module:
    with raised_as(ModelError, f"{type(model).__name__} cannot be copied", advice="; time it with runtime='torch'"):
        return copy.deepcopy(model)


def _compiled(model: nn.Module, inputs: Inputs) -> Callable[..., Any]:
    """The model, compiled with its weights as constants.

    torch stores compiled code with the code object of the function, and stops compiling after a few versions of one. So
    this function gets its own code object, and other compiled networks are not affected.
    """
    compilers = filter(None, (os.environ.get("CXX"), "g++", "clang++", "c++", "cl"))
    if device_of(model).type == "cpu" and not any(map(shutil.which, compilers)):
        raise EngineError("torch.compile needs a C++ compiler, and there is none; install one, or set CXX to its name")

    def forward(*args: Any, **kwargs: Any) -> Any:
        return model(*args, **kwargs)

    own = types.FunctionType(forward.__code__.replace(), globals(), closure=forward.__closure__)
    compiled: Callable[..., Any] = torch.compile(own, dynamic=False)
    # not as options of torch.compile: what captures the graph does not see those, and freezes nothing
    freezing = torch._inductor.config.patch(freezing=True, compile_threads=1)
    failure = f"torch.compile cannot compile {type(model).__name__}"
    with raised_as(EngineError, failure), torch.inference_mode(), freezing:
        compiled(*inputs.args, **inputs.kwargs)
    return compiled


def _onnxruntime(proto: "onnx.ModelProto", arrays: Arrays, *, runtime: Runtime) -> _Runs:
    session = onnxruntime_session(proto, threads=runtime.threads)
    binding = session.io_binding()
    for name, array in arrays.items():
        binding.bind_cpu_input(name, array)  # once, so that no pass copies it
    for output in session.get_outputs():
        binding.bind_output(output.name, "cpu")

    def outputs() -> list[Tensor]:
        session.run_with_iobinding(binding)
        return [torch.from_numpy(array).clone() for array in binding.copy_outputs_to_cpu()]

    return lambda: session.run_with_iobinding(binding), outputs


def _openvino(proto: "onnx.ModelProto", arrays: Arrays, *, runtime: Runtime) -> _Runs:
    tensor_type = optional("openvino", extra="openvino").Tensor
    compiled = openvino_model(proto, runtime=runtime.name, threads=runtime.threads)
    request, names = compiled.create_infer_request(), {name for port in compiled.inputs for name in port.names}
    shared = {name: tensor_type(arrays[name], shared_memory=True) for name in arrays.keys() & names}
    for name, tensor in shared.items():
        request.set_tensor(name, tensor)

    def run(_: object = shared) -> Any:  # the request reads the inputs where they lie, and does not keep them alive
        return request.infer(share_outputs=True)

    def outputs() -> list[Tensor]:
        results = run()
        return [_widened(torch.from_numpy(results[port]).clone()) for port in compiled.outputs]

    return run, outputs


def _by_name(proto: "onnx.ModelProto", arrays: Arrays | Sequence[NDArray[Any]]) -> Arrays:
    names = input_names(proto)
    named = arrays if isinstance(arrays, Mapping) else dict(zip(names, arrays, strict=False))
    if set(named) != set(names) or len(named) != len(arrays):
        what = ", ".join(arrays) if isinstance(arrays, Mapping) else f"{len(arrays)} arrays"
        raise EngineError(f"the ONNX model takes {', '.join(names) or 'no inputs'}; it was given {what or 'none'}")
    return named


def _widened(tensor: Tensor) -> Tensor:
    """A copy on the CPU, in float32 at least."""
    short = tensor.is_floating_point() and tensor.itemsize < 4
    return tensor.detach().to("cpu", torch.float32 if short else tensor.dtype, copy=True)


def _closed() -> Any:
    raise EngineError("this network was closed; use it within its with block")
