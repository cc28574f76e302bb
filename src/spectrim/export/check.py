"""Comparing an exported network with torch, on the example and on random inputs."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.export import ExportedProgram

from spectrim.core.errors import EngineError, ModelError, SpectrimError
from spectrim.core.execution import Inputs, call, evaluating, require_repeatable, tensors
from spectrim.core.files import Frozen
from spectrim.runtimes.conversion import batch_size, graph_inputs, has_batch, optional, quiet

Run = Callable[[Inputs], list[Tensor]]
"""One pass of an exported network over a model's inputs."""
_DRAWN = 2
"""Random inputs of the example's batch size that a check takes, beside the example itself."""


class Check(Frozen):
    """What came of comparing the exported network with torch.

    Attributes:
        runtime: What ran it, with its version.
        batches: The batch size of every pass that was compared, that of the example itself first.
        difference: Largest difference of an entry, as a share of the largest entry of that output.
    """

    runtime: str
    batches: tuple[int, ...]
    difference: float = Field(ge=0)


def checked(
    model: nn.Module, inputs: Inputs, run: Run, *, runtime: str, dynamic_batch: bool, tolerance: float
) -> Check:
    """Compare what `run` gives with what the model gives in torch.

    Raises:
        ModelError: the model changes its output between runs, or cannot run random inputs.
        EngineError: the exported network cannot be run, or differs by more than the tolerance.
    """
    require_repeatable(model, inputs)
    largest, cases = 0.0, _cases(inputs, dynamic_batch=dynamic_batch)
    for size, case in cases:
        with evaluating(model):
            wanted = list(tensors(call(model, case, what="random inputs", hint=" Is check=False meant?")))
        with _failing_as(runtime):
            found = run(case)
        difference = _difference(wanted, found)
        if difference > tolerance:
            raise EngineError(
                f"{runtime} gives other outputs than torch on a batch of {size}: they differ by {difference:.2g} of "
                f"the largest entry, and tolerance={tolerance:g}; nothing was written"
            )
        largest = max(largest, difference)
    return Check(runtime=runtime, batches=tuple(size for size, _ in cases), difference=largest)


def _cases(inputs: Inputs, *, dynamic_batch: bool) -> list[tuple[int, Inputs]]:
    """Inputs to compare on, by batch size: the example, and random ones."""
    try:
        batch = batch_size(inputs)
    except ModelError:  # only with a fixed batch, where it serves the messages
        batch = 1
    sizes = [batch] * _DRAWN
    if dynamic_batch:
        sizes += [3] if batch == 1 else [1, batch + 1]
    generator = torch.Generator().manual_seed(0)

    def drawn(tensor: Tensor, size: int) -> Tensor:
        rows = example = tensor.detach().cpu()
        if dynamic_batch and has_batch(tensor, batch):
            rows = rows[torch.randint(batch, (size,), generator=generator)]
        return _like(rows, example, generator)

    random = [(size, inputs.map(partial(drawn, size=size))) for size in sizes]
    return [(batch, inputs), *random]


def _like(rows: Tensor, example: Tensor, generator: torch.Generator) -> Tensor:
    """Random numbers of the shape and type of `rows` that can mean what those of the example mean.

    Masks (two values, or infinite ones) are taken row by row, whole numbers from those that are there, and floats from
    the normal distribution of the example's mean and deviation.
    """
    if not example.numel() or _is_mask(example):
        return rows
    if not (rows.is_floating_point() or rows.is_complex()):
        return example.flatten()[torch.randint(example.numel(), rows.shape, generator=generator)]
    wide = example.to(torch.promote_types(example.dtype, torch.float32))
    deviation, mean = wide.std(correction=0), wide.mean()
    noise = torch.randn(rows.shape, generator=generator, dtype=wide.dtype)
    return (noise * torch.where(deviation > 0, deviation, 1) + mean).to(rows.dtype)


def _is_mask(example: Tensor) -> bool:
    if example.is_complex():
        return False
    if example.dtype == torch.bool or not example.isfinite().all():
        return True
    low, high = example.aminmax()
    return bool(low < high and ((example == low) | (example == high)).all() and example.numel() > 2)


def _difference(wanted: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """Largest difference of an entry, as a share of its tensor's largest finite one; infinite for other shapes."""
    if [one.shape for one in wanted] != [one.shape for one in found]:
        return math.inf
    return max(map(_relative, wanted, found), default=0.0)


def _relative(wanted: Tensor, found: Tensor) -> float:
    if not wanted.numel():
        return 0.0
    kind = torch.complex128 if wanted.is_complex() else torch.float64
    one, other = wanted.detach().cpu().to(kind), found.to(kind)
    same = (one == other) | (one.isnan() & other.isnan())
    apart = torch.where(same, 0.0, (one - other).abs()).nan_to_num(math.inf, math.inf).max()
    scale = one.abs().nan_to_num(0.0, 0.0).max()
    return float(apart / scale) if scale > 0 else math.inf if apart > 0 else 0.0


@contextmanager
def _failing_as(runtime: str) -> Iterator[None]:
    try:
        with quiet():
            yield
    except SpectrimError:
        raise
    except Exception as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise EngineError(
            f"{runtime} cannot run the exported network: {said[0]}; check=False writes it nevertheless"
        ) from error


def require_onnxruntime() -> ModuleType:
    """The package onnxruntime. Raises `DependencyError` where it is not installed."""
    return optional("onnxruntime", extra="onnx")


def in_onnxruntime(path: Path, model: nn.Module) -> Run:
    """Runs a file, with as many threads as torch."""
    onnxruntime = require_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    options.log_severity_level = 4
    with _failing_as("ONNX Runtime"):
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]

    def run(inputs: Inputs) -> list[Tensor]:
        arrays = [one.detach().cpu().numpy() for one in graph_inputs(model, inputs)]
        return [torch.as_tensor(one) for one in session.run(None, dict(zip(names, arrays, strict=True)))]

    return run


def in_openvino(path: Path, model: nn.Module, openvino: ModuleType, *, names: Sequence[str]) -> Run:
    """Runs a file in float32, with as many threads as torch; `names` are those of all inputs, also unused ones."""
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    with _failing_as("OpenVINO"):
        compiled = openvino.Core().compile_model(path, "CPU", settings)
    taken = [port.any_name for port in compiled.inputs]

    def run(inputs: Inputs) -> list[Tensor]:
        given = dict(zip(names, graph_inputs(model, inputs), strict=True))
        arrays = {name: given[name].detach().cpu().contiguous().numpy() for name in taken}
        found = compiled.create_infer_request().infer(arrays)
        return [torch.from_numpy(found[port].copy()) for port in compiled.outputs]

    return run


def in_torch(program: ExportedProgram) -> Run:
    """Runs a program."""
    module = program.module()

    def run(inputs: Inputs) -> list[Tensor]:
        with torch.no_grad():
            return list(tensors(call(module, inputs, what="random inputs")))

    return run
