"""Saving and loading factored models: one safetensors file with the structure in its header. Never pickle."""

import hashlib
import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from spectrim.core.arguments import checked
from spectrim.core.errors import FileError, ModelError, warn
from spectrim.core.execution import device_of
from spectrim.core.files import parse, write_atomically
from spectrim.core.nested import is_plain
from spectrim.core.state import fill_state, unique_tensors
from spectrim.layers.replacement import duplicate
from spectrim.layers.structure import Structure, rebuild, structure_of
from spectrim.models.weights import fill_, is_saved, read_state

_KEY = "spectrim"
_NAME = "model.safetensors"


class _Header(Structure):
    same_tensor: dict[str, str]
    digest: str


@checked
def save(model: nn.Module, path: str | Path) -> Path:
    """Write the model to one safetensors file, with what is needed to rebuild its factored layers in the header.

    Args:
        model: Any module, factored or not.
        path: The file, `.safetensors`; a folder, or a name without a suffix, stands for `model.safetensors` in it.

    Raises:
        FileError: a name of another kind of file, or one that cannot be written; an older one is left as it was.
        ModelError: state that is not an ordinary tensor.
    """
    path = _target(path)
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
    header = _Header(**dict(structure), same_tensor=aliases, digest=_digest(stored))
    # one entry only: safetensors writes several in random order, and equal models shall give equal files
    metadata = {_KEY: header.model_dump_json(exclude=None if structure.narrowed else {"narrowed"})}
    return write_atomically(path, lambda part: save_file(stored, part, metadata=metadata))


@checked
def load(path: str | Path, model: nn.Module) -> nn.Module:
    """Rebuild a saved model from a dense instance of the same network; outputs are bit-equal to the saved model's.

    Any other safetensors file, or a state or checkpoint that torch saved (read without running code), goes into a copy
    of the network strictly, in its number types; prefixes such as `module.` are left out with a warning.

    Args:
        path: The file, or the folder that holds `model.safetensors`.
        model: The network as its own code makes it, trained or not; it is left as it is.

    Returns:
        A new module with the file's layers, weights and number types, on the devices of `model`.

    Raises:
        FileError: a missing, cut, changed or foreign file, or one for another network.
    """
    folder = Path(path)
    path = folder / _NAME if (folder / _NAME).is_file() else path
    if not is_saved(Path(path)):
        filled = duplicate(model)
        fill_(filled, read_state(path), origin=Path(path))
        return filled
    path = Path(path)
    header, tensors = _read(path)
    rebuilt = duplicate(model)
    rebuild(rebuilt, header, origin=str(path))
    _fill(rebuilt, tensors, header.same_tensor, path)
    prefixes = tuple(f"{name}." for name in header.low_rank)
    broken = [name for name, tensor in tensors.items() if name.startswith(prefixes) and _is_broken(tensor)]
    if broken:
        warn(f"{path} holds NaN or infinite values in {broken[0]}; they were saved so")
    return rebuilt


def _is_broken(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.itemsize > 1 and not bool(torch.isfinite(tensor).all())


def _target(path: str | Path) -> Path:
    path = Path(path)
    if path.is_dir() or not path.suffix:
        return path / _NAME
    if path.suffix.lower() != ".safetensors":
        name = f"{path.with_suffix('') if path.suffix[1:].isalpha() else path}.safetensors"  # net.v2 is whole
        raise FileError(f"{path}: what is written is a safetensors file; name it so: st.save(model, {name!r})")
    return path


def _read(path: Path) -> tuple[_Header, dict[str, Tensor]]:
    with safe_open(path, framework="pt") as opened:
        metadata = opened.metadata()
        # a copy, since what safetensors gives may look into the file itself
        tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
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
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
