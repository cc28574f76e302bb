"""Files of exported networks: their marks, their inputs and outputs, and how several are written together."""

import tempfile
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule

from spectrim.core.errors import FileError
from spectrim.core.files import TEMPORARY, Frozen

if TYPE_CHECKING:
    import onnx

MARK = "spectrim"
"""Stands in every file that is written, so that it can be recognised."""


class Port(Frozen):
    """An input or an output of an exported network.

    Attributes:
        name: As the file has it.
        shape: Sizes; text such as `batch` for a size that is open.
    """

    name: str
    shape: tuple[int | str, ...]


def is_exported(path: Path) -> bool:
    """Whether a file is one that this module wrote, as far as its own mark says. Nothing in it is run or unpickled."""
    with suppress(OSError, ValueError, KeyError, zipfile.BadZipFile):
        if path.suffix == ".bin":
            return is_exported(path.with_suffix(".xml"))
        if path.suffix == ".xml":
            return f"<{MARK}>" in path.read_text(encoding="utf-8")[-4096:]
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                return any(name.endswith(f"/extra/{MARK}") for name in archive.namelist())
        with path.open("rb") as opened:
            return f"\x12\x08{MARK}".encode() in opened.read(64)
    return False


def sign(proto: "onnx.ModelProto", metadata: Mapping[str, str]) -> None:
    """Say who wrote it, and the caller's notes."""
    proto.producer_name, proto.producer_version = MARK, version("spectrim")
    for name, text in metadata.items():
        proto.metadata_props.add(key=name, value=text)


def without_traces(program: ExportedProgram) -> ExportedProgram:
    """Without the example inputs, and without the source lines and paths of this machine in each operator."""
    program.example_inputs = None
    for module in program.graph_module.modules():
        if isinstance(module, GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)
    return program


def ports_of_onnx(proto: "onnx.ModelProto") -> tuple[tuple[Port, ...], tuple[Port, ...]]:
    """Inputs and outputs of an ONNX model."""

    def port(value: Any) -> Port:
        sizes = value.type.tensor_type.shape.dim
        return Port(name=value.name, shape=tuple(size.dim_param or size.dim_value for size in sizes))

    return tuple(map(port, proto.graph.input)), tuple(map(port, proto.graph.output))


def ports_of_program(program: ExportedProgram) -> tuple[tuple[Port, ...], tuple[Port, ...]]:
    """Inputs and outputs of a torch program; outputs are numbered, since it has no names for them."""
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    signature = program.graph_signature

    def tensors(names: Iterable[Any]) -> list[tuple[str, Tensor]]:
        return [(name, values[name]) for name in names if isinstance(values.get(name), Tensor)]

    inputs, outputs = tensors(signature.user_inputs), tensors(signature.user_outputs)
    sizes = (size for _, tensor in (*inputs, *outputs) for size in tensor.shape)
    symbol = next((str(size) for size in sizes if not isinstance(size, int)), "")

    def port(name: str, tensor: Tensor) -> Port:
        shape = (size if isinstance(size, int) else str(size).replace(symbol, "batch") for size in tensor.shape)
        return Port(name=name, shape=tuple(shape))

    numbered = ((f"output_{position}", tensor) for position, (_, tensor) in enumerate(outputs))
    return tuple(port(*named) for named in inputs), tuple(port(*named) for named in numbered)


def target_of(path: str | Path, name: str) -> Path:
    """The path itself, or in an existing folder the file of this name."""
    path = Path(path)
    return path / name if path.is_dir() else path


def write_together(targets: Sequence[Path], write: Callable[[Path], None]) -> tuple[Path, ...]:
    """Let `write` fill files of the targets' names in a temporary folder, then put them in place, all or none."""
    folder = targets[0].parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=TEMPORARY) as temporary:
            new, old = Path(temporary) / "new", Path(temporary) / "old"
            new.mkdir()
            old.mkdir()
            write(new)
            try:
                for target in targets:
                    if target.exists():
                        target.replace(old / target.name)
                    (new / target.name).replace(target)
            except OSError:
                for target in targets:
                    if (old / target.name).exists():
                        (old / target.name).replace(target)
                    elif not (new / target.name).exists():
                        target.unlink(missing_ok=True)
                raise
    except OSError as error:
        reason = error.strerror or error
        raise FileError(f"cannot write {targets[-1]}: {reason}; choose a folder you may write to") from error
    return tuple(targets)
