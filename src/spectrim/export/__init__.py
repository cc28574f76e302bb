"""A network as a file that other programs run: ONNX, a torch program, OpenVINO; compared with torch before it stays."""

from collections.abc import Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from spectrim.core.arguments import checked
from spectrim.core.errors import FileError, RuleError
from spectrim.core.execution import as_inputs
from spectrim.core.files import Frozen, write_atomically
from spectrim.export.checks import Check, Reference
from spectrim.export.files import (
    MARK,
    Port,
    is_exported,
    ports_of_onnx,
    ports_of_program,
    sign,
    target_of,
    without_traces,
    write_together,
)
from spectrim.layers.factored import low_rank_layers
from spectrim.layers.forms import find_form
from spectrim.layers.padding import padded
from spectrim.runtimes.conversion import OPSET, optional, quiet, require_onnx, to_onnx, to_openvino, to_program
from spectrim.runtimes.rank_grid import probe
from spectrim.runtimes.sessions import require_runtime, timed_together
from spectrim.runtimes.timing import Interval, compare

__all__ = ["Check", "Exported", "Pad", "Port", "export_onnx", "export_openvino", "export_program", "is_exported"]

Pad = int | Literal["auto"] | None
_ROUNDS = 15


class Exported(Frozen):
    """A network that was written to a file.

    Attributes:
        path: The file; OpenVINO's weights lie beside it, in the file of the same name that ends in .bin.
        bytes: Size of all that was written.
        opset: Version of the ONNX operators; None where the file is not ONNX.
        inputs: In the order in which they are taken.
        outputs: In the order in which the tensors stand in what the model returns.
        padded: The multiple to which ranks were padded, or None.
        padding_speedup: Where padding was timed: time without it over time with it.
        check: None where it was not asked for.
    """

    path: Path
    bytes: int
    opset: int | None = None
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    padded: int | None = None
    padding_speedup: Interval | None = None
    check: Check | None = None


@checked
def export_onnx(
    model: nn.Module,
    path: str | Path,
    example_inputs: Any,
    *,
    dynamic_batch: bool = True,
    pad: Pad = None,
    check: bool = True,
    tolerance: float = 1e-4,
    runtime: str = "onnxruntime",
    threads: int = 1,
    metadata: Mapping[str, str] | None = None,
) -> Exported:
    """Write the model in evaluation mode as one ONNX file of opset 20, and compare it with torch in ONNX Runtime.

    Args:
        model: The model; it stays as it is.
        path: The file; an existing folder stands for `model.onnx` in it. An older file is replaced, once the new one
            has passed the check.
        example_inputs: One call's inputs: a tensor, a tuple of them, or a mapping of keyword arguments.
        dynamic_batch: Leave the batch size open: the first dimension of the first tensor in the inputs, and of every
            other tensor in which it is the same.
        pad: Zero-pad the ranks of factored layers to a multiple: a number, `auto` for the step of this hardware and
            `runtime` where that is measurably faster, or None. See `padding.padded` for what it costs.
        check: Compare with torch on the example, on two random inputs of its shapes, and with an open batch size on
            other batch sizes. Whole numbers are drawn from those of the example, so that token ids stay valid.
        tolerance: Largest difference allowed, as a share of an output's largest entry.
        runtime: Where `pad="auto"` takes its times, with so many `threads`.
        threads: See `runtime`.
        metadata: Notes to write into the file, text by name.

    Raises:
        ModelError: the model cannot run the inputs, changes its output between runs, depends on the batch size, or has
            an operator that cannot be exported; the message names the module.
        EngineError: ONNX Runtime cannot run the file, or gives other outputs; nothing is written.
        DependencyError: onnx, onnxscript or, for the check, onnxruntime is not installed.
        RuleError: a multiple or a tolerance that is not a positive number.
        FileError: the file cannot be written.
    """
    require_onnx()
    if check:
        optional("onnxruntime", extra="onnx")
    reference = Reference(model, as_inputs(example_inputs), dynamic_batch, tolerance)
    network, exported = _padded(reference, pad, runtime=runtime, threads=threads)
    proto = to_onnx(network, reference.inputs, dynamic_batch=dynamic_batch)
    sign(proto, metadata or {})
    inputs, outputs = ports_of_onnx(proto)
    checks: list[Check] = []

    def write(part: Path) -> None:
        part.write_bytes(proto.SerializeToString())
        if check:
            checks.append(reference.check_file(part, inputs, runtime="onnxruntime"))

    written = write_atomically(target_of(path, "model.onnx"), write)
    size, result = written.stat().st_size, next(iter(checks), None)
    return exported(path=written, bytes=size, opset=OPSET, inputs=inputs, outputs=outputs, check=result)


@checked
def export_program(
    model: nn.Module,
    path: str | Path,
    example_inputs: Any,
    *,
    dynamic_batch: bool = True,
    pad: Pad = None,
    check: bool = True,
    tolerance: float = 1e-4,
    threads: int = 1,
) -> Exported:
    """Write the model in evaluation mode as a torch program (`torch.export.save`, a .pt2 file), compared before that.

    `torch.export.load(path).module()` runs it. Spectrim never loads such a file itself: parts of it may be pickled, and
    can then run code when they are loaded. Load only files that you trust.

    Arguments and errors are those of `export_onnx`. In an existing folder the file is `model.pt2`, the example is not
    written to it, and `pad="auto"` takes its times in torch.
    """
    reference = Reference(model, as_inputs(example_inputs), dynamic_batch, tolerance)
    network, exported = _padded(reference, pad, runtime="torch", threads=threads)
    program = without_traces(to_program(network, reference.inputs, dynamic_batch=dynamic_batch))
    result = reference.check_program(program) if check else None

    def write(part: Path) -> None:
        with quiet(), part.open("wb") as opened:
            torch.export.save(program, opened, extra_files={MARK: version("spectrim")})

    written = write_atomically(target_of(path, "model.pt2"), write)
    inputs, outputs = ports_of_program(program)
    return exported(path=written, bytes=written.stat().st_size, inputs=inputs, outputs=outputs, check=result)


@checked
def export_openvino(
    model: nn.Module,
    path: str | Path,
    example_inputs: Any,
    *,
    dynamic_batch: bool = True,
    pad: Pad = None,
    check: bool = True,
    tolerance: float = 1e-4,
    runtime: str = "openvino",
    threads: int = 1,
) -> Exported:
    """Write the model in evaluation mode as OpenVINO IR: `path`, and its weights, uncompressed, beside it in a .bin.

    Arguments are those of `export_onnx`. In an existing folder the file is `model.xml`; it is checked in OpenVINO on
    the CPU in float32, and an older pair is replaced once the new one has passed.

    Raises:
        ModelError, EngineError, RuleError, FileError: as `export_onnx`, and for a path that does not end in .xml.
        DependencyError: openvino, onnx or onnxscript is not installed.
    """
    openvino = optional("openvino", extra="openvino")
    require_onnx()
    target = target_of(path, "model.xml")
    if target.suffix != ".xml":
        raise FileError(f"{target} must end in .xml; the weights go beside it, into {target.with_suffix('.bin').name}")
    reference = Reference(model, as_inputs(example_inputs), dynamic_batch, tolerance)
    network, exported = _padded(reference, pad, runtime=runtime, threads=threads)
    proto = to_onnx(network, reference.inputs, dynamic_batch=dynamic_batch)
    converted = to_openvino(proto)
    converted.set_rt_info(version("spectrim"), [MARK, "version"])
    inputs, outputs = ports_of_onnx(proto)
    checks: list[Check] = []

    def write(folder: Path) -> None:
        part = folder / target.name
        with quiet():
            openvino.save_model(converted, part, compress_to_fp16=False)
        if check:
            checks.append(reference.check_file(part, inputs, runtime="openvino"))

    weights, written = write_together((target.with_suffix(".bin"), target), write)
    used = {name for port in converted.inputs for name in port.names}  # it drops those that nothing depends on
    read = tuple(port for port in inputs if port.name in used)
    size, result = written.stat().st_size + weights.stat().st_size, next(iter(checks), None)
    return exported(path=written, bytes=size, inputs=read, outputs=outputs, check=result)


def _padded(reference: Reference, pad: Pad, *, runtime: str, threads: int) -> tuple[nn.Module, partial[Exported]]:
    """The model, padded as asked (with `auto` only where that is faster), and the start of the result."""
    model = reference.model
    if isinstance(pad, str) and pad != "auto":
        raise RuleError(f"pad={pad!r}: give a number, 'auto' or None")
    layers = low_rank_layers(model).values()
    ranks = [rank for layer in layers if find_form(layer.form).saves_time for rank in layer.ranks]
    if pad is None or (layers and not ranks):
        return model, partial(Exported)
    if pad != "auto":
        return padded(model, pad), partial(Exported, padded=pad)
    chosen = require_runtime(runtime, threads=threads)
    multiple = probe(runtime=runtime, threads=threads, batch=reference.batch).multiple if ranks else 1
    if all(rank % multiple == 0 for rank in ranks):
        return model, partial(Exported)
    wide = padded(model, multiple)
    sessions = (chosen.prepare(network, reference.inputs) for network in (wide, model))
    speedup = compare(*timed_together(sessions, rounds=_ROUNDS)).ratio
    if speedup.low > 1:
        return wide, partial(Exported, padded=multiple, padding_speedup=speedup)
    return model, partial(Exported, padding_speedup=speedup)
