"""Saving and loading factored models: one safetensors file with the structure in its header. Never pickle."""

import hashlib
import json
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from spectrim.core.arguments import checked
from spectrim.core.errors import FileError, ModelError
from spectrim.core.execution import device_of, fill_state, unique_tensors
from spectrim.core.files import parse, write_atomically
from spectrim.core.nested import is_plain
from spectrim.layers.replacement import duplicate
from spectrim.layers.structure import Structure, rebuild, structure_of

_KEY = "spectrim"


class _Header(Structure):
    same_tensor: dict[str, str]
    digest: str


@checked
def save(model: nn.Module, path: str | Path) -> Path:
    """Write the model to one safetensors file, with what is needed to rebuild its factored layers in the header.

    Args:
        model: Any module, factored or not.
        path: The file; an existing folder stands for `model.safetensors` in it.

    Raises:
        FileError: the file cannot be written; an older one is left as it was.
        ModelError: state that is not an ordinary tensor.
    """
    tensors, aliases = unique_tensors(model)
    for name, tensor in tensors.items():
        if not is_plain(tensor):
            raise ModelError(
                f"{name} is a {type(tensor).__name__}, which a safetensors file cannot hold; save the model before it "
                "is quantised or distributed, and do that after st.load"
            )
        if tensor.is_meta or tensor.is_quantized or tensor.layout != torch.strided:
            raise ModelError(f"{name} is a {tensor.layout} tensor on {tensor.device}, which cannot be saved")
    stored = {name: tensor.detach().to("cpu").contiguous().clone() for name, tensor in tensors.items()}
    structure = structure_of(model)
    header = _Header(
        low_rank=structure.low_rank, same_layer=structure.same_layer, same_tensor=aliases, digest=_digest(stored)
    )
    # one entry only: safetensors writes several in random order, and equal models shall give equal files
    metadata = {_KEY: header.model_dump_json()}
    return write_atomically(_file(path), lambda part: save_file(stored, part, metadata=metadata))


@checked
def load(path: str | Path, model: nn.Module) -> nn.Module:
    """Rebuild a saved model from a dense instance of the same network; outputs are bit-equal to the saved model's.

    Args:
        path: The file, or the folder that holds `model.safetensors`.
        model: The network as its own code makes it, trained or not; it is left as it is.

    Returns:
        A new module with the file's layers, weights and number types, on the devices of `model`.

    Raises:
        FileError: a missing, cut, changed or foreign file, or one for another network.
    """
    path = _file(path)
    header, tensors = _read(path)
    rebuilt = duplicate(model)
    rebuild(rebuilt, header, origin=str(path))
    _fill(rebuilt, tensors, header.same_tensor, path)
    prefixes = tuple(f"{name}." for name in header.low_rank)
    broken = [name for name, tensor in tensors.items() if name.startswith(prefixes) and _is_broken(tensor)]
    if broken:
        warnings.warn(f"{path} holds NaN or infinite values in {broken[0]}; they were saved so", stacklevel=3)
    return rebuilt


def _is_broken(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.itemsize > 1 and not bool(torch.isfinite(tensor).all())


def _file(path: str | Path) -> Path:
    path = Path(path)
    return path / "model.safetensors" if path.is_dir() else path


def _read(path: Path) -> tuple[_Header, dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as opened:
            metadata = opened.metadata() or {}
            # a copy, since what safetensors gives may look into the file itself
            tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise FileError(
            f"cannot read {path}: {error}; it is missing, cut short, or not a file of spectrim.save "
            "(what torch.save wrote goes into a network with load_state_dict)"
        ) from error
    if _KEY not in metadata:
        raise FileError(f"{path} was not written by spectrim.save; load a plain state with safetensors.torch.load_file")
    header = parse(_Header, metadata[_KEY], origin=f"the header of {path}")
    if header.digest != _digest(tensors):
        raise FileError(f"{path} was changed after it was saved (its checksum differs); save the model again")
    return header, tensors


def _fill(model: nn.Module, tensors: dict[str, Tensor], aliases: dict[str, str], path: Path) -> None:
    """Put the file's tensors in, one parameter for all names that shared one."""
    expected = model.state_dict(keep_vars=True)
    names = set(tensors) | set(aliases)
    if names != set(expected):
        missing, extra = sorted(set(expected) - names), sorted(names - set(expected))
        raise FileError(f"{path} is for another network: missing {missing[:3]}, not in the model {extra[:3]}")
    default = device_of(model)
    ready: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        old = expected[name]
        if old.shape != tensor.shape:
            raise FileError(f"{path} is for another network: {name} is {list(tensor.shape)}, not {list(old.shape)}")
        moved = tensor.to(default if old.is_meta else old.device)
        ready[name] = nn.Parameter(moved, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else moved
    fill_state(model, ready | {name: ready[first] for name, first in aliases.items()}, assign=True)


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
