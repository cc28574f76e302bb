"""Comparing an exported network with torch, on the example and on random inputs."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.export import ExportedProgram

from spectrim.core.errors import EngineError, RuleError
from spectrim.core.execution import Inputs, call, evaluating, require_repeatable
from spectrim.core.files import Frozen
from spectrim.core.nested import tensors
from spectrim.export.files import Port
from spectrim.runtimes.conversion import batch_size, graph_inputs, has_batch, quiet
from spectrim.runtimes.engines import array_of, load_engine, relative_difference
from spectrim.runtimes.faults import raised_as

_failing = partial(raised_as, EngineError, advice="; check=False writes it nevertheless")

_RANDOM = 2
"""Random inputs of the example's batch size that a check takes, beside the example itself."""


class Check(Frozen):
    """The result of comparing the exported network with torch.

    Attributes:
        runtime: What ran it, with its version.
        batches: The batch size of every pass that was compared, that of the example itself first.
        difference: Largest difference of an entry, as a share of the largest entry of that output.
    """

    runtime: str
    batches: tuple[int, ...]
    difference: float = Field(ge=0)


@dataclass(frozen=True)
class Reference:
    """What an exported network is compared with: the model as it was given, on its example and on random inputs.

    Raises:
        RuleError: a tolerance that is not a positive number.
        ModelError: `dynamic_batch` for inputs without a batch.
    """

    model: nn.Module
    inputs: Inputs
    dynamic_batch: bool
    tolerance: float

    def __post_init__(self) -> None:
        if not 0 < self.tolerance < math.inf:
            raise RuleError(f"tolerance={self.tolerance}: give a share above 0, such as 1e-4")
        if self.dynamic_batch:
            batch_size(self.inputs)

    @property
    def batch(self) -> int:
        """The batch size of the example; 1 for inputs without a first dimension."""
        return batch_size(self.inputs) if self.dynamic_batch else self.inputs.samples or 1

    def check_file(self, path: Path, ports: Sequence[Port], *, runtime: str) -> Check:
        """Run a file in ONNX Runtime or OpenVINO in float32; `ports` are all its inputs, also unused ones.

        Raises:
            ModelError: the model changes its output between runs, or cannot run random inputs.
            EngineError: the exported network cannot be run, or differs by more than the tolerance.
        """
        name = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}[runtime]
        with _failing(f"{name} cannot run the exported network"), quiet():
            engine = load_engine(path, runtime=runtime, threads=torch.get_num_threads())

        def run(inputs: Inputs) -> list[Tensor]:
            flat = graph_inputs(self.model, inputs)
            arrays = {port.name: array_of(tensor) for port, tensor in zip(ports, flat, strict=True)}
            return [torch.as_tensor(array) for array in engine(arrays)]

        return self.check(run, runtime=f"{name} {version(runtime)}")

    def check_program(self, program: ExportedProgram) -> Check:
        """Run a torch program; raises as `check_file`."""
        module = program.module()

        def run(inputs: Inputs) -> list[Tensor]:
            with torch.no_grad():
                return list(tensors(call(module, inputs, what="random inputs")))

        return self.check(run, runtime=f"torch {torch.__version__}")

    def check(self, run: Callable[[Inputs], list[Tensor]], *, runtime: str) -> Check:
        """Compare what `run` gives with what the model gives in torch; raises as `check_file`."""
        require_repeatable(self.model, self.inputs)
        largest, cases = 0.0, self._cases()
        for size, case in cases:
            with evaluating(self.model):
                expected = list(tensors(call(self.model, case, what="random inputs", hint=" Use check=False?")))
            with _failing(f"{runtime} cannot run the exported network"), quiet():
                outputs = run(case)
            difference = relative_difference(expected, outputs)
            if difference > self.tolerance:
                raise EngineError(
                    f"{runtime} gives other outputs than torch on a batch of {size}: they differ by {difference:.2g} "
                    f"of the largest entry, and tolerance={self.tolerance:g}; nothing was written. Networks in half "
                    "precision round more: export in float32, or give a larger tolerance"
                )
            largest = max(largest, difference)
        return Check(runtime=runtime, batches=tuple(size for size, _ in cases), difference=largest)

    def _cases(self) -> list[tuple[int, Inputs]]:
        """Inputs to compare on, by batch size: the example, and random ones."""
        batch = self.batch
        sizes = [batch] * _RANDOM
        if self.dynamic_batch:
            sizes += [3] if batch == 1 else [1, batch + 1]
        generator = torch.Generator().manual_seed(0)

        def random(tensor: Tensor, size: int) -> Tensor:
            rows = example = tensor.detach().cpu()
            if self.dynamic_batch and has_batch(tensor, batch):
                rows = rows[torch.randint(batch, (size,), generator=generator)]
            return _random_like(rows, example, generator)

        cases = [(size, self.inputs.map(partial(random, size=size))) for size in sizes]
        return [(batch, self.inputs), *cases]


def _random_like(rows: Tensor, example: Tensor, generator: torch.Generator) -> Tensor:
    """Random numbers of the shape and type of `rows`, of the same meaning as those of the example.

    Masks (two values, or infinite ones) are taken row by row, whole numbers from those that are there, and floats from
    the normal distribution of the example's mean and deviation.
    """
    if not example.numel() or _is_mask(example):
        return rows
    if not (rows.is_floating_point() or rows.is_complex()):
        return example.flatten()[torch.randint(example.numel(), rows.shape, generator=generator)]
    wide = example.to(torch.promote_types(example.dtype, torch.float32))
    deviation, mean = wide.std(correction=0), wide.mean()
    normal = torch.randn(rows.shape, generator=generator, dtype=wide.dtype)
    return (normal * torch.where(deviation > 0, deviation, 1) + mean).to(rows.dtype)


def _is_mask(example: Tensor) -> bool:
    if example.is_complex():
        return False
    if example.dtype == torch.bool or not example.isfinite().all():
        return True
    low, high = example.aminmax()
    return bool(low < high and ((example == low) | (example == high)).all() and example.numel() > 2)
